"""``python -m experiments low_pass``: where a low-pass filter of the releases helps, and where it does not.

    python -m experiments low_pass --data-dir DIR [--out DIR]     about five minutes of one core

One model, one data set and one ε, twice: *few large steps* and *many small steps*. In both, SGD without momentum is
tuned over one grid of constant learning rates with and without :func:`dpkit.filters.first_order`; then runs with other
seeds are made at the best rates. Every private run is a real one: ``PrivacyEngine.make_private`` with a ledger, noise
and batches from the operating system.

What explains the difference is measured on one run of each, with *true* gradients: clipped, of all training data,
without noise. NOT PRIVATE: that, and the runs without noise beside, are possible because the data are public; neither
the tuning nor they are charged to the ε of a run.

The arithmetic. For a filter with weights h (Σ h = 1), white noise of variance V per step and true gradients with
R(k) = mean ⟨g_t, g_{t+k}⟩, the filtered gradient is wrong by

    V·noise_gain + Σ_jk h_j h_k R(|j-k|) - 2 Σ_k h_k R(k) + R(0)                     (``gradient_error``)

where the noise does not act on later gradients. But SGD sums the gradients up, and sums are what the filter leaves
alone. What counts is the noise in the last iterate of x <- x - filter(p·x + noise), where p = learning rate times
curvature is how fast a step forgets (``noise_left``). The autocorrelation tells p: without filter and near a minimum
the true gradient shrinks by 1 - p from step to step, so p is about 1 - R(1)/R(0). Where p is small, the gradient is
slow, the filter finds its noise easily, and the iterate has averaged it already; a filter has something to take away
where p is near 1 or beyond.

Exit code 0; 1 for wrong input or missing data.
"""

from __future__ import annotations

import argparse
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from datetime import date
from pathlib import Path

import numpy as np
import torch
from scipy.linalg import toeplitz
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.data import DataLoader, TensorDataset

import dpkit
from dpkit.clipping import Flat
from dpkit.datasets import Split, load
from dpkit.errors import DataError
from dpkit.filters import LowPass, first_order
from dpkit.gradients import ghost
from dpkit.types import Released

from .methods_page import BEGIN, END

FILTER = first_order()
LAGS = 30
ARMS: dict[str, tuple[LowPass, ...]] = {"no filter": (), "low-pass": (FILTER,)}
_CHUNK = 10_000
_COLOURS = {"no filter": "#1f5fa8", "low-pass": "#a3181e"}


@dataclass(frozen=True)
class Case:
    """Settings that both arms share.

    Attributes:
      rates: constant learning rates to be tried, smallest first.
      tuning_seeds, seeds: runs at each rate; runs at the best rate, with other seeds.
      watched: last steps of the run at which true gradients are computed.
    """

    name: str
    batch_size: int
    steps: int
    rates: tuple[float, ...]
    tuning_seeds: int
    seeds: int
    watched: int = 100
    max_grad_norm: float = 1.0
    epsilon: float = 1.0
    delta: float = 1e-5


CASES = (
    Case("few large steps", 600, 100, (1.0, 2.0, 4.0, 8.0, 16.0, 32.0), tuning_seeds=2, seeds=10),
    Case("many small steps", 128, 1000, (0.125, 0.25, 0.5, 1.0, 2.0, 4.0), tuning_seeds=1, seeds=5),
)


@dataclass(frozen=True)
class Outcome:
    """Of a run, on the public test part, at the last iterate."""

    accuracy: float
    loss: float


@dataclass
class Trace:
    """NOT PRIVATE. What happened at the watched steps, one row a step.

    Attributes:
      true: gradients of all data, clipped, without noise.
      used: what the optimizer got.
      noise_variance: of the privacy noise before the filter, all coordinates together.
    """

    true: list[Tensor] = field(default_factory=list)
    used: list[Tensor] = field(default_factory=list)
    noise_variance: float = 0.0

    def autocorrelation(self, lags: int = LAGS) -> np.ndarray:
        """(lags + 1,) mean cosine between the true gradients of two steps, by how far they are apart."""
        return _mean_products(F.normalize(torch.stack(self.true).double(), dim=1), lags)

    def covariance(self, lags: int) -> np.ndarray:
        """(lags + 1,) R: mean inner product, by how far they are apart."""
        return _mean_products(torch.stack(self.true).double(), lags)

    @property
    def error(self) -> float:
        """Mean squared distance of what the optimizer got from the true gradient."""
        return float((torch.stack(self.used) - torch.stack(self.true)).double().square().sum(1).mean())


@dataclass
class Found:
    """All that was measured of one arm of a case.

    Attributes:
      tuned: rate -> outcomes.
      best: the rate with the best mean accuracy, the smallest such.
      final: runs at the best rate.
      noiseless: rate -> the run without noise.
      trace: of one run at the best rate of the arm without filter.
      epsilon: the largest that a ledger reports.
    """

    tuned: dict[float, list[Outcome]]
    best: float
    final: list[Outcome]
    noiseless: dict[float, Outcome]
    trace: Trace
    epsilon: float


def _mean_products(rows: Tensor, lags: int) -> np.ndarray:
    products = rows @ rows.T
    return np.array([float(products.diagonal(lag).mean()) for lag in range(min(lags, len(rows) - 1) + 1)])


# -- arithmetic -------------------------------------------------------------------------------------------------------


def gradient_error(filter_: LowPass, covariance: np.ndarray, noise_variance: float) -> float:
    """Mean squared error of the filtered gradient, from R(0), R(1), .. and V; see the module.

    Lags beyond those given are left out, with the weights h that would meet them; the rest is scaled to Σ h = 1.
    """
    weights = filter_.impulse_response(len(covariance))
    weights = weights / weights.sum()
    distortion = weights @ toeplitz(covariance) @ weights - 2 * weights @ covariance + covariance[0]
    return float(noise_variance * filter_.noise_gain + distortion)


def noise_left(filter_: LowPass | None, steps: int, pull: float) -> float:
    """Variance of x after ``steps`` steps x <- x - filter(pull·x + n) from 0, with independent n of variance 1."""
    filter_ = LowPass(b=(1.0,)) if filter_ is None else filter_
    # Column t is what x becomes where the noise of step t alone is 1.
    x = torch.zeros(steps, dtype=torch.float64)
    state = filter_.init({"x": x})
    for unit in torch.eye(steps, dtype=torch.float64):
        released, state = filter_.update(Released({"x": pull * x + unit}, (), {}), state)
        x = x - released.value["x"]
    return float(x.square().sum())


# -- runs -------------------------------------------------------------------------------------------------------------


def linear(data: Split, seed: int) -> nn.Module:
    torch.manual_seed(seed)
    return nn.Sequential(nn.Flatten(), nn.Linear(data.train_x[0].size, data.classes))


def train(
    case: Case,
    data: Split,
    filters: Sequence[LowPass],
    rate: float,
    seed: int,
    folder: Path,
    watch: Callable[[int, nn.Module], None] = lambda step, model: None,
) -> tuple[Outcome, float, float]:
    """A private run; returns what it came to, ε by the ledger, and the noise multiplier.

    Args:
      seed: of the initial weights; batches and noise have none.
      watch: called with the number of the step and the model, between the release and the optimizer's step.
    """
    model = linear(data, seed)
    optimizer = torch.optim.SGD(model.parameters(), lr=rate)
    dataset = TensorDataset(torch.from_numpy(data.train_x), torch.from_numpy(data.train_y))
    with tempfile.TemporaryDirectory(prefix=".run-", dir=folder) as run_dir:
        engine = dpkit.PrivacyEngine(Path(run_dir) / "run", dataset_name="low_pass")
        model, optimizer, batches = engine.make_private(
            model,
            optimizer,
            DataLoader(dataset, batch_size=case.batch_size),
            target_epsilon=case.epsilon,
            target_delta=case.delta,
            steps=case.steps,
            num_examples=len(dataset),
            max_grad_norm=case.max_grad_norm,
            filters=filters,
        )
        try:
            while engine.steps_left:
                for inputs, targets in batches:
                    optimizer.zero_grad()
                    engine.backward(F.cross_entropy(model(inputs), targets, reduction="none"))
                    watch(engine.steps_taken, model)
                    optimizer.step()
            multiplier = engine.plan.mechanism.scale(engine.plan.participation)
            return tested(model, data), engine.statement().epsilon, multiplier
        finally:
            engine.detach()


def train_without_noise(case: Case, data: Split, filters: Sequence[LowPass], rate: float, seed: int) -> Outcome:
    """NOT PRIVATE. The same clipping, batches drawn in the same way, and no noise."""
    model = linear(data, seed)
    x, y = torch.from_numpy(data.train_x), torch.from_numpy(data.train_y)
    generator = torch.Generator().manual_seed(seed)
    parameters = dict(model.named_parameters())
    states = [filter_.init({name: p.detach() for name, p in parameters.items()}) for filter_ in filters]
    for _ in range(case.steps):
        drawn = torch.rand(len(x), generator=generator) < case.batch_size / len(x)
        sums = clipped_sum(model, x[drawn], y[drawn], case.max_grad_norm)
        released = Released({name: total / case.batch_size for name, total in sums.items()}, (), {})
        for place, filter_ in enumerate(filters):
            released, states[place] = filter_.update(released, states[place])
        with torch.no_grad():
            for name, parameter in parameters.items():
                parameter.sub_(rate * released.value[name])
    return tested(model, data)


def clipped_sum(model: nn.Module, x: Tensor, y: Tensor, max_grad_norm: float) -> dict[str, Tensor]:
    """NOT PRIVATE. Sum of the clipped gradients of all rows, by name of parameter."""
    rule, sums = Flat(max_grad_norm), {name: torch.zeros_like(p.detach()) for name, p in model.named_parameters()}

    def losses(module: nn.Module, batch: tuple[Tensor, Tensor]) -> Tensor:
        return F.cross_entropy(module(batch[0]), batch[1], reduction="none")

    for rows, targets in zip(x.split(_CHUNK), y.split(_CHUNK), strict=True):
        gradients, _ = ghost.per_sample(model, losses, (rows, targets), len(rows))
        norms = torch.stack(list(gradients.sq_norms().values())).sum(0, keepdim=True).double().sqrt()
        factors = rule.factors(norms, None, ())[0].float()
        for name, total in gradients.weighted_sum(dict.fromkeys(sums, factors)):
            sums[name] += total
    return sums


@torch.no_grad()
def tested(model: nn.Module, data: Split) -> Outcome:
    scores, targets = model(torch.from_numpy(data.test_x)), torch.from_numpy(data.test_y)
    return Outcome(
        accuracy=float((scores.argmax(1) == targets).double().mean()), loss=float(F.cross_entropy(scores, targets))
    )


def traced(case: Case, data: Split, filters: Sequence[LowPass], rate: float, seed: int, folder: Path) -> Trace:
    """NOT PRIVATE. One more private run, with true gradients of its last steps beside."""
    trace, plain = Trace(), linear(data, seed)
    x, y = torch.from_numpy(data.train_x), torch.from_numpy(data.train_y)

    def watch(step: int, model: nn.Module) -> None:
        if step > case.steps - case.watched:
            plain.load_state_dict(model.state_dict())
            sums = clipped_sum(plain, x, y, case.max_grad_norm)
            trace.true.append(torch.cat([sums[name].flatten() / len(x) for name, _ in model.named_parameters()]))
            used = [p.grad.flatten() for p in model.parameters() if p.grad is not None]
            trace.used.append(torch.cat(used).clone())

    _, _, multiplier = train(case, data, filters, rate, seed, folder, watch)
    size = sum(p.numel() for p in plain.parameters())
    trace.noise_variance = size * (multiplier * case.max_grad_norm / case.batch_size) ** 2
    return trace


def mean_accuracy(outcomes: Sequence[Outcome]) -> float:
    return statistics.fmean(outcome.accuracy for outcome in outcomes)


def mean_loss(outcomes: Sequence[Outcome]) -> float:
    return statistics.fmean(outcome.loss for outcome in outcomes)


def measure(case: Case, data: Split, folder: Path) -> dict[str, Found]:
    """Tune both arms, run them at their best rates, and look at one run of each at one common rate."""
    tuned = {
        arm: {
            rate: [train(case, data, filters, rate, 100 + seed, folder)[0] for seed in range(case.tuning_seeds)]
            for rate in case.rates
        }
        for arm, filters in ARMS.items()
    }
    best = {arm: max(rates, key=lambda rate: mean_accuracy(rates[rate])) for arm, rates in tuned.items()}
    common = best["no filter"]
    found = {}
    for arm, filters in ARMS.items():
        runs = [train(case, data, filters, best[arm], seed, folder) for seed in range(case.seeds)]
        found[arm] = Found(
            tuned=tuned[arm],
            best=best[arm],
            final=[outcome for outcome, _, _ in runs],
            noiseless={
                rate: train_without_noise(case, data, filters, rate, 100) for rate in sorted({common, best[arm]})
            },
            trace=traced(case, data, filters, common, 100, folder),
            epsilon=max(epsilon for _, epsilon, _ in runs),
        )
    return found


# -- the page ---------------------------------------------------------------------------------------------------------


def table(heads: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    return "\n".join(f"| {' | '.join(line)} |" for line in (heads, ["---"] * len(heads), *rows))


def with_deviation(values: Sequence[float]) -> str:
    spread = statistics.stdev(values) if len(values) > 1 else 0.0
    return f"{statistics.fmean(values):.4f} ± {spread:.4f}"


def page(cases: Sequence[tuple[Case, dict[str, Found]]], seconds: float, by_hand: str = "") -> str:
    """Markdown with every number that was measured, and what was written by hand on an earlier page."""
    parts = [
        "# Where a low-pass filter helps, and where it does not",
        f"`python -m experiments low_pass`, {date.today().isoformat()}, one thread, {seconds:.0f} s of processor time. "
        "Softmax regression on Fashion-MNIST (7,850 parameters, grey values in [0, 1]), SGD without momentum at a "
        f"constant rate, flat clipping to 1, Poisson batches, ε = {CASES[0].epsilon:g}, δ = {CASES[0].delta:g}, "
        "add/remove. The filter is `first_order()`: a = [1, -0.9], b = [0.15, -0.05], noise gain "
        f"{FILTER.noise_gain:.4f}. Test accuracy and test loss of the last iterate.",
        "**Tuning is not charged to ε**: both arms get their rate from one grid, by test accuracy, with other seeds "
        "than those of the table. Rows marked *not private* use true gradients (clipped, all 60,000 examples, no "
        "noise) or leave the noise out; the data are public.",
        "![Autocorrelation of the true gradient, and accuracies](low_pass.png)",
        "The axes of the bars do not begin at 0.",
        _outcomes(cases),
        _explanation(cases),
        f"{BEGIN}\n\n{by_hand}\n\n{END}",
        _tuning(cases),
    ]
    return "\n\n".join(parts) + "\n"


def written_by_hand(path: Path) -> str:
    """What stands between the markers of the page that is there."""
    old = path.read_text(encoding="utf-8") if path.exists() else ""
    return old.partition(BEGIN)[2].partition(END)[0].strip() or "(To be written after the run.)"


def _outcomes(cases: Sequence[tuple[Case, dict[str, Found]]]) -> str:
    rows = []
    for case, found in cases:
        for arm, each in found.items():
            noiseless = each.noiseless[each.best]
            rows.append(
                [
                    *(case.name, f"{case.steps} of {case.batch_size}", arm, f"{each.best:g}", f"{len(each.final)}"),
                    with_deviation([outcome.accuracy for outcome in each.final]),
                    with_deviation([outcome.loss for outcome in each.final]),
                    *(f"{noiseless.accuracy:.4f}", f"{noiseless.loss:.4f}", f"{each.epsilon:.4f}"),
                ]
            )
    heads = ["case", "steps of batch", "arm", "best rate", "runs", "accuracy", "loss"]
    return "## At the best rate of each arm\n\nMean ± standard deviation over runs.\n\n" + table(
        [*heads, "accuracy without noise, not private", "loss without noise, not private", "ε spent"], rows
    )


def _explanation(cases: Sequence[tuple[Case, dict[str, Found]]]) -> str:
    rows: list[list[str]] = []

    def add(what: str, value: Callable[[Case, dict[str, Found]], str]) -> None:
        rows.append([what, *(value(case, found) for case, found in cases)])

    add("common rate: the best one without filter", lambda case, found: f"{_common(found):g}")
    for lag in (1, 2, 5, 10, 20):
        add(
            f"autocorrelation of the true gradient at lag {lag}: no filter, low-pass",
            lambda case, found, lag=lag: ", ".join(
                f"{each.trace.autocorrelation()[lag]:+.3f}" if lag < case.watched else "" for each in found.values()
            ),
        )
    add(
        "signal to noise of a release, ‖true gradient‖² / noise variance: no filter, low-pass",
        lambda case, found: ", ".join(
            f"{each.trace.covariance(0)[0] / each.trace.noise_variance:.3g}" for each in found.values()
        ),
    )
    add("squared error of the gradient that the optimizer gets, low-pass / no filter: predicted", _predicted_gradient)
    add("... measured", _measured_gradient)
    add("pull p = 1 - autocorrelation at lag 1, no filter", lambda case, found: f"{_pull(found):.3f}")
    add("noise variance of the last iterate, low-pass / no filter: predicted from p", _predicted_iterate)
    add("test loss that the noise costs, no filter", lambda case, found: f"{_cost(found['no filter'], found):+.4f}")
    add("test loss that the noise costs, low-pass", lambda case, found: f"{_cost(found['low-pass'], found):+.4f}")
    add(
        "test loss without noise: no filter, low-pass",
        lambda case, found: ", ".join(f"{each.noiseless[_common(found)].loss:.4f}" for each in found.values()),
    )
    return "## What explains it\n\n" + "\n\n".join(
        [
            "Not private. Both arms at one common rate, one run each, true gradients of the last "
            f"{CASES[0].watched} steps; losses are means of the tuning runs at that rate. The arithmetic is in "
            "`experiments/low_pass.py`.",
            table(["", *(case.name for case, _ in cases)], rows),
        ]
    )


def _common(found: dict[str, Found]) -> float:
    return found["no filter"].best


def _pull(found: dict[str, Found]) -> float:
    return 1 - float(found["no filter"].trace.autocorrelation(1)[1])


def _predicted_gradient(case: Case, found: dict[str, Found]) -> str:
    before = found["no filter"].trace.error
    covariance = found["low-pass"].trace.covariance(case.watched // 2)
    return f"{gradient_error(FILTER, covariance, before) / before:.3f}"


def _measured_gradient(case: Case, found: dict[str, Found]) -> str:
    return f"{found['low-pass'].trace.error / found['no filter'].trace.error:.3f}"


def _predicted_iterate(case: Case, found: dict[str, Found]) -> str:
    pull = _pull(found)
    return f"{noise_left(FILTER, case.steps, pull) / noise_left(None, case.steps, pull):.3f}"


def _cost(each: Found, found: dict[str, Found]) -> float:
    """What the noise adds to the test loss, at the common rate."""
    return mean_loss(each.tuned[_common(found)]) - each.noiseless[_common(found)].loss


def _tuning(cases: Sequence[tuple[Case, dict[str, Found]]]) -> str:
    parts = ["## Tuning\n\nMean accuracy / mean loss of the tuning runs at each rate; the best accuracy in bold."]
    for case, found in cases:
        rows = []
        for arm, each in found.items():
            words = [f"{mean_accuracy(runs):.4f} / {mean_loss(runs):.3f}" for runs in each.tuned.values()]
            bold = [f"**{word}**" if rate == each.best else word for rate, word in zip(each.tuned, words, strict=True)]
            rows.append([arm, *bold])
        heads = [f"{case.name} ({case.tuning_seeds} a rate)", *(f"{rate:g}" for rate in case.rates)]
        parts.append(table(heads, rows))
    return "\n\n".join(parts)


def plot(cases: Sequence[tuple[Case, dict[str, Found]]], path: Path) -> None:
    """A row for each case: autocorrelation of the true gradient, tuning, accuracy at the best rate of each arm."""
    import matplotlib as mpl
    from matplotlib.figure import Figure
    from matplotlib.ticker import FuncFormatter, NullLocator

    with mpl.rc_context({"font.size": 10, "axes.spines.top": False, "axes.spines.right": False}):
        figure = Figure(figsize=(11, 3.3 * len(cases)), layout="constrained")
        grid = figure.subplots(len(cases), 3, squeeze=False, width_ratios=(1.2, 1.2, 0.7))
        for (case, found), (left, middle, right) in zip(cases, grid, strict=True):
            for place, (arm, each) in enumerate(found.items()):
                style = {"color": _COLOURS[arm], "linestyle": ("-", "--")[place], "marker": ("o", "s")[place]}
                left.plot(each.trace.autocorrelation(), markersize=3, label=arm, **style)
                rates = list(each.tuned)
                middle.plot(rates, [mean_accuracy(runs) for runs in each.tuned.values()], markersize=4, **style)
                values = [outcome.accuracy for outcome in each.final]
                deviation = statistics.stdev(values) if len(values) > 1 else 0.0
                right.bar(place, statistics.fmean(values), 0.6, yerr=deviation, capsize=4, color=_COLOURS[arm])
                right.annotate(
                    f"{statistics.fmean(values):.3f}",
                    (place, statistics.fmean(values) + deviation),
                    xytext=(0, 4),
                    textcoords="offset points",
                    ha="center",
                )
            left.axhline(0, color="#55616e", linewidth=0.8)
            left.set(xlabel="lag, steps", ylabel="cosine of true gradients")
            left.set_title(f"{case.name}: {case.steps} of {case.batch_size}", fontsize=10, loc="left")
            middle.set_xscale("log", base=2)
            middle.xaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
            middle.xaxis.set_minor_locator(NullLocator())
            middle.set(xlabel="learning rate", ylabel="test accuracy", title="tuning")
            right.set_xticks(range(len(found)), list(found))
            lowest = min(outcome.accuracy for each in found.values() for outcome in each.final)
            right.set_ylim(max(0.0, lowest - 0.04), None)
            right.margins(y=0.15)
            right.set(title="best rate of each")
        grid[0][0].legend(frameon=False)
        figure.savefig(path, dpi=150, metadata={"Software": None})


# -- the command ------------------------------------------------------------------------------------------------------


@contextmanager
def _one_thread() -> Iterator[None]:
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(threads)


def main(arguments: list[str] | None = None) -> int:
    """The command; returns the exit code."""
    parser = argparse.ArgumentParser(prog="python -m experiments low_pass", description="Where a filter helps.")
    parser.add_argument("--data-dir", type=Path, help="folder of the data files; left out, the variable DPKIT_DATA")
    parser.add_argument("--out", type=Path, default=Path(__file__).with_name("results"), help="folder of the page")
    options = parser.parse_args(arguments)
    begun = time.process_time()
    try:
        data = load("fashion", options.data_dir)
        try:
            options.out.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise DataError(f"{options.out} cannot be made ({error.strerror}); give another --out.") from None
    except DataError as error:
        print(error, file=sys.stderr)
        return 1
    cases = []
    with _one_thread():
        for case in CASES:
            cases.append((case, measure(case, data, options.out)))
            print(
                f"{case.name}: done after {time.process_time() - begun:.0f} s of processor time",
                file=sys.stderr,
                flush=True,
            )
    plot(cases, options.out / "low_pass.png")
    path = options.out / "low_pass.md"
    text = page(cases, time.process_time() - begun, written_by_hand(path))
    path.write_text(text, encoding="utf-8")
    print(f"wrote {path}", file=sys.stderr)
    return 0


if __name__ == "__main__":
    sys.exit(main())
