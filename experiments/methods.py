"""``python -m experiments methods``: test accuracy of every method of dpkit, under equal conditions.

    python -m experiments methods --data-dir DIR                  runs what is missing, then writes the page
    python -m experiments methods --dataset adult --methods flat,auto-s --seeds 2 --out OUT
    python -m experiments methods --table                         only the page, from the runs that are there

What is the same for all methods: model, data, batch size, passes over the data, clipping norm, (ε, δ), relation
(zero-out, which suits batches in a fixed order, too), a constant learning rate, plain SGD unless the method is an
optimizer. What is tuned: the learning rate, for every method over the same three multiples of a base rate times a
factor that belongs to the method, with one seed at ε = 3; the rate with the best test accuracy is used at every ε.

Every private run is a real one: ``PrivacyEngine.make_private`` with a ledger, noise and batches from the operating
system. The data sets are public, and all choices (models, batch sizes, factors, rates) were made by looking at their
test accuracy; none of that is charged to the ε of a run.

Runs go to OUT/methods.jsonl as they finish; started again, the command runs what is missing. Exit code 0; 1 for wrong
input and where a run failed; 130 where it was interrupted.
"""

from __future__ import annotations

import argparse
import functools
import multiprocessing
import os
import platform
import sys
import tempfile
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from contextlib import contextmanager
from dataclasses import dataclass, fields, is_dataclass
from datetime import date
from enum import Enum
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.optim import SGD, Adam, Optimizer
from torch.utils.data import DataLoader, TensorDataset

import dpkit
from accounting import AccountingError, Relation
from dpkit import clipping, filters, mechanisms
from dpkit.datasets import Split, describe, load
from dpkit.errors import DataError, DpkitError, InvalidArgument
from dpkit.optim import DPAdamBC

from .methods_page import Entry, Section, write_page
from .methods_runs import TUNING_EPSILON, TUNING_SEED, Result, RunConfig, append, as_words, best_rate, read

EPSILONS = (1.0, 3.0, 8.0)
MULTIPLES = (0.4, 1.0, 2.5)
"""The grid: of the data set's base rate times the method's factor."""


# -- the methods ------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Setting:
    """What a method is made from: public numbers.

    Attributes:
      bound: clipping norm C.
      labels: number of groups that examples belong to.
    """

    bound: float
    num_examples: int
    batch_size: int
    labels: int

    @property
    def sample_rate(self) -> float:
        """q, the share of the data set that a batch is expected to hold."""
        return self.batch_size / self.num_examples


MakeOptimizer = Callable[[Iterable[nn.Parameter], float], Optimizer]


@dataclass(frozen=True)
class Method:
    """One row of the table.

    Attributes:
      what: in a few words.
      private: what :meth:`dpkit.PrivacyEngine.make_private` gets beside what all methods share; None trains without.
      factor: learning rates are the grid times this, because methods scale what the optimizer gets.
      optimizer: what makes it of parameters and learning rate.
      claim: what its paper says, and which paper.
    """

    what: str
    private: Callable[[Setting], dict[str, Any]] | None
    factor: float = 1.0
    optimizer: Callable[[Setting], MakeOptimizer] = lambda setting: SGD
    claim: str = ""


METHODS = {
    "non-private": Method("plain SGD: no clipping, no noise, shuffled batches", None, factor=1 / 8),
    "flat": Method(
        "clip the whole gradient to C; Poisson batches, independent noise: what all others are compared with",
        lambda setting: {"clipping": clipping.Flat(setting.bound)},
        claim="Abadi et al. 2016: the baseline",
    ),
    "momentum": Method(
        "flat, with the momentum that most training uses",
        lambda setting: {"clipping": clipping.Flat(setting.bound)},
        factor=0.1,  # a momentum of 0.9 makes ten steps of one
        optimizer=lambda setting: functools.partial(SGD, momentum=0.9),
        claim="(no paper)",
    ),
    "per-layer": Method(
        "clip each of K layers to C/sqrt(K)",
        lambda setting: {"clipping": clipping.PerLayer(setting.bound)},
        claim="He et al. 2023: fixed bounds for each layer are worse than flat clipping",
    ),
    "per-layer-quantile": Method(
        "bounds of the layers follow the medians of their norms, C in all",
        lambda setting: {"clipping": clipping.PerLayerQuantile(setting.bound)},
        claim="He et al. 2023: adaptive bounds for each layer match flat clipping or beat it",
    ),
    "normalize-if-exceeds": Method(
        "normalise every layer of a gradient longer than C",
        lambda setting: {"clipping": clipping.NormalizeIfExceeds(setting.bound)},
        claim="Pelikan et al. 2025: made for large transformers, whose layers have gradients of very different length",
    ),
    "auto-s": Method(
        "normalise every gradient, nearly",
        lambda setting: {"clipping": clipping.Automatic(setting.bound)},
        claim="Bu et al. 2023: as good as flat clipping or better, without a C to be tuned",
    ),
    "auto-v": Method(
        "normalise every gradient",
        lambda setting: {"clipping": clipping.Automatic(setting.bound, gamma=0.0)},
        claim="Bu et al. 2023: the simplest form; AUTO-S is advised",
    ),
    "quantile": Method(
        "C begins as that of the others and follows the median of the norms",
        lambda setting: {"clipping": clipping.Quantile(setting.bound)},
        claim="Andrew et al. 2021: close to the best fixed C, sometimes better, without tuning it",
    ),
    "global": Method(
        "scale gradients shorter than 20 C alike, leave out the others",
        lambda setting: {"clipping": clipping.Global(setting.bound, threshold=20 * setting.bound)},
        factor=2.0,  # gradients are scaled down more than by clipping them
        claim="Bu et al. 2021: predictions that are better calibrated (not measured here)",
    ),
    "global-adapt": Method(
        "scale gradients alike, clip those above a threshold that follows the norms",
        lambda setting: {
            "clipping": clipping.GlobalAdapt(setting.bound, threshold=5 * setting.bound, tolerance=0.7),
        },
        claim="Esipova et al. 2023: groups suffer more equally (not measured here)",
    ),
    "group-adaptive": Method(
        "a bound for each group (Fashion-MNIST: class, Adult: sex) between C and (1 + K) C",
        lambda setting: {"clipping": clipping.GroupAdaptive(setting.bound, num_labels=setting.labels)},
        factor=0.5,  # bounds are 2 C on average
        claim="Xu et al. 2021: groups suffer more equally (not measured here)",
    ),
    "low-pass": Method(
        "flat, then a first-order low-pass filter of the releases",
        lambda setting: {"clipping": clipping.Flat(setting.bound), "filters": (filters.first_order(),)},
        claim="Zhang et al. 2024 (DOPPLER): 3 to 10 points more; an independent re-test found next to nothing",
    ),
    "ema": Method(
        "flat, then the exponential average of the releases, unbiased: momentum as a filter",
        lambda setting: {"clipping": clipping.Flat(setting.bound), "filters": (filters.momentum(0.9),)},
        claim="the simplest low-pass filter; as above",
    ),
    "adam": Method(
        "flat, with Adam",
        lambda setting: {"clipping": clipping.Flat(setting.bound)},
        factor=1 / 400,
        optimizer=lambda setting: Adam,
        claim="Tang et al. 2024: Adam divides by the noise, and so is DP-SGD with momentum",
    ),
    "adam-bc": Method(
        "flat, with Adam whose second moment is corrected for the noise",
        lambda setting: {"clipping": clipping.Flat(setting.bound)},
        factor=1 / 1000,
        # In units of the squared noise on each coordinate, which is about (C/B)².
        optimizer=lambda setting: functools.partial(DPAdamBC, eps_root=0.1 * (setting.bound / setting.batch_size) ** 2),
        claim="Tang et al. 2024: better than Adam",
    ),
    "bisr": Method(
        "flat, batches in a fixed order, correlated noise with 32 bands of the inverse square root",
        lambda setting: {
            "clipping": clipping.Flat(setting.bound),
            "mechanism": functools.partial(dpkit.Correlated, strategy=mechanisms.BISR(32)),
            "sampler": dpkit.FixedOrder(setting.batch_size, setting.num_examples),
        },
        claim="Kalinin et al. 2026: least error over several passes where nothing is amplified by sampling",
    ),
    "band-mf": Method(
        "flat, cyclic Poisson batches from 8 groups, correlated noise with 8 bands",
        lambda setting: {
            "clipping": clipping.Flat(setting.bound),
            "mechanism": functools.partial(dpkit.Correlated, strategy=mechanisms.BandMF(8)),
            "sampler": dpkit.CyclicPoisson(setting.sample_rate, groups=8),
        },
        claim="Choquette-Choo et al. 2023: at least as good as DP-SGD at every ε",
    ),
}


# -- the tasks --------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Task:
    """A data set with a model and everything that all methods share.

    Attributes:
      title: for the page.
      base_rate: learning rate in the middle of the grid, where the factor is 1.
      groups: the sensitive attribute that methods with groups go by; "" takes the labels.
    """

    name: str
    title: str
    model: Callable[[], nn.Module]
    batch_size: int
    passes: int
    max_grad_norm: float
    base_rate: float
    num_examples: int
    labels: int
    groups: str = ""
    delta: float = 1e-5

    @property
    def setting(self) -> Setting:
        return Setting(self.max_grad_norm, self.num_examples, self.batch_size, self.labels)


def strided_cnn() -> nn.Module:
    """Two convolutions with strides and no pooling, tanh, for 28x28: a third of the time of the usual tanh CNN."""
    return nn.Sequential(
        *(nn.Unflatten(1, (1, 28)), nn.Conv2d(1, 16, 6, stride=3, padding=1), nn.Tanh()),
        *(nn.Conv2d(16, 32, 3, stride=2), nn.Tanh()),
        *(nn.Flatten(), nn.Linear(512, 32), nn.Tanh(), nn.Linear(32, 10)),
    )


def small_mlp() -> nn.Module:
    return nn.Sequential(nn.Linear(108, 32), nn.Tanh(), nn.Linear(32, 2))


TASKS = {
    task.name: task
    for task in (
        Task(
            name="fashion",
            title="Fashion-MNIST, small convolutional network (21,978 parameters)",
            model=strided_cnn,
            batch_size=256,
            passes=1,
            max_grad_norm=1.0,
            base_rate=4.0,
            num_examples=describe("fashion").num_train,
            labels=10,
        ),
        Task(
            name="adult",
            title="Adult, 32 hidden units (3,554 parameters)",
            model=small_mlp,
            batch_size=256,
            passes=3,
            max_grad_norm=1.0,
            base_rate=2.0,
            num_examples=describe("adult").num_train,
            labels=2,
            groups="sex",
        ),
    )
}


# -- which runs there are to be ---------------------------------------------------------------------------------------


def tuning_runs(task: Task, method: str) -> list[RunConfig]:
    """The three runs that choose the learning rate."""
    epsilon = None if METHODS[method].private is None else TUNING_EPSILON
    rates = [task.base_rate * METHODS[method].factor * multiple for multiple in MULTIPLES]
    return [_config(task, method, epsilon, rate, TUNING_SEED) for rate in rates]


def final_runs(task: Task, method: str, learning_rate: float, seeds: int) -> list[RunConfig]:
    """The runs that the table is made of, by seed."""
    epsilons = (None,) if METHODS[method].private is None else EPSILONS
    return [_config(task, method, epsilon, learning_rate, seed) for seed in range(seeds) for epsilon in epsilons]


def _config(task: Task, method: str, epsilon: float | None, learning_rate: float, seed: int) -> RunConfig:
    return RunConfig(
        dataset=task.name,
        method=method,
        settings=settings_of(task, method),
        epsilon=epsilon,
        learning_rate=learning_rate,
        seed=seed,
        batch_size=task.batch_size,
        passes=task.passes,
        max_grad_norm=task.max_grad_norm,
        delta=task.delta,
    )


def settings_of(task: Task, method: str) -> str:
    """The objects that make the method, in words."""
    chosen = METHODS[method]
    given = {} if chosen.private is None else chosen.private(task.setting)
    words = [f"{name}={_shown(value)}" for name, value in given.items()]
    return ", ".join([*words, f"optimizer={_shown(chosen.optimizer(task.setting))}"])


def _shown(value: Any) -> str:
    match value:
        case functools.partial():
            return (
                f"{_shown(value.func)}({', '.join(f'{name}={_shown(each)}' for name, each in value.keywords.items())})"
            )
        case Enum():
            return value.value
        case float():
            return f"{value:g}"
        case list() | tuple():
            return f"[{', '.join(map(_shown, value))}]"
        case type():
            return value.__name__
        case _ if is_dataclass(value):
            given = (f"{field.name}={_shown(getattr(value, field.name))}" for field in fields(value) if field.repr)
            return f"{type(value).__name__}({', '.join(given)})"
        case _:
            return repr(value)


# -- one run ----------------------------------------------------------------------------------------------------------


def run(config: RunConfig, data: Split, folder: Path) -> Result:
    """Train and test as ``config`` says; ``folder`` is where the run folder is made and removed.

    Raises:
      dpkit.errors.DpkitError, accounting.AccountingError: as :meth:`dpkit.PrivacyEngine.make_private`.
    """
    begun = time.process_time()
    task, method = TASKS[config.dataset], METHODS[config.method]
    with _one_thread():
        torch.manual_seed(config.seed)
        model = task.model()
        optimizer = method.optimizer(task.setting)(model.parameters(), config.learning_rate)
        parts = [data.train_x, data.train_y]
        private = None if method.private is None else method.private(task.setting)
        if private is not None and _needs_groups(private):
            parts.append(data.sensitive[task.groups].train if task.groups else data.train_y)
        dataset = TensorDataset(*map(torch.from_numpy, parts))
        loader = DataLoader(dataset, batch_size=config.batch_size, shuffle=True)
        if private is None:
            steps, spent = _plain(model, optimizer, loader, config.passes), None
        else:
            with tempfile.TemporaryDirectory(prefix=".run-", dir=folder) as run_dir:
                steps, spent = _private(config, private, model, optimizer, loader, Path(run_dir) / "run")
        accuracy = _accuracy(model, data)
    return Result(
        config=config,
        test_accuracy=accuracy,
        epsilon_spent=spent,
        steps=steps,
        core_seconds=round(time.process_time() - begun, 2),
        machine=machine(),
        torch=torch.__version__,
        date=date.today().isoformat(),
    )


def _needs_groups(private: dict[str, Any]) -> bool:
    return getattr(private["clipping"], "needs_labels", False)


def _private(
    config: RunConfig,
    private: dict[str, Any],
    model: nn.Module,
    optimizer: Optimizer,
    loader: DataLoader[tuple[Tensor, ...]],
    run_dir: Path,
) -> tuple[int, float]:
    """Steps taken, and ε by the ledger."""
    engine = dpkit.PrivacyEngine(run_dir, dataset_name=config.dataset)
    model, optimizer, batches = engine.make_private(
        model,
        optimizer,
        loader,
        target_epsilon=config.epsilon,
        target_delta=config.delta,
        epochs=config.passes,
        num_examples=TASKS[config.dataset].num_examples,
        relation=Relation.ZERO_OUT,
        **private,
    )
    try:
        while engine.steps_left:
            for inputs, targets, *groups in batches:
                optimizer.zero_grad()
                losses = F.cross_entropy(model(inputs), targets, reduction="none")
                engine.backward(losses, labels=groups[0] if groups else None)
                optimizer.step()
        return engine.steps_taken, engine.statement().epsilon
    finally:
        engine.detach()


def _plain(model: nn.Module, optimizer: Optimizer, loader: DataLoader[tuple[Tensor, ...]], passes: int) -> int:
    for _ in range(passes):
        for inputs, targets in loader:
            optimizer.zero_grad()
            F.cross_entropy(model(inputs), targets).backward()
            optimizer.step()
    return passes * len(loader)


@torch.no_grad()
def _accuracy(model: nn.Module, data: Split) -> float:
    """Share of the public test part that the model gets right."""
    inputs, targets = torch.from_numpy(data.test_x), torch.from_numpy(data.test_y)
    scores = torch.cat([model.eval()(rows) for rows in inputs.split(1000)])
    return float((scores.argmax(1) == targets).double().mean())


@contextmanager
def _one_thread() -> Iterator[None]:
    """The models are so small that a second thread would cost more than it gives."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(threads)


def machine() -> str:
    """The hardware in words."""
    model = platform.processor() or platform.machine()
    cpuinfo = Path("/proc/cpuinfo")
    if cpuinfo.exists():
        lines = cpuinfo.read_text(encoding="utf-8", errors="replace").splitlines()
        model = next((line.partition(":")[2].strip() for line in lines if line.startswith("model name")), model)
    return f"{os.cpu_count()} cores, {model}"


# -- all runs ---------------------------------------------------------------------------------------------------------


@functools.cache
def _loaded(dataset: str, data_dir: Path | None) -> Split:
    return load(dataset, data_dir)


def _run_alone(config: RunConfig, data_dir: Path | None, folder: Path) -> Result | str:
    """:func:`run`, or why it failed: an error of one method must not end the others."""
    try:
        return run(config, _loaded(config.dataset, data_dir), folder)
    except (DpkitError, AccountingError) as error:
        return f"{type(error).__name__}: {error}"


def run_missing(wanted: Iterable[RunConfig], file: Path, data_dir: Path | None, workers: int) -> int:
    """Run those of ``wanted`` that ``file`` does not hold; returns how many failed."""
    done = read(file)
    missing = [config for config in dict.fromkeys(wanted) if config not in done]
    failed = 0
    for number, (config, result) in enumerate(_finished(missing, file.parent, data_dir, workers), 1):
        if isinstance(result, str):
            print(f"FAILED: {as_words(config)}: {result}", file=sys.stderr)
            failed += 1
        else:
            print(append(file, result), flush=True)
        print(f"{number} of {len(missing)} missing runs", file=sys.stderr, flush=True)
    return failed


def _finished(
    missing: Sequence[RunConfig], folder: Path, data_dir: Path | None, workers: int
) -> Iterator[tuple[RunConfig, Result | str]]:
    """The runs as they finish."""
    if workers == 1:
        yield from ((config, _run_alone(config, data_dir, folder)) for config in missing)
        return
    # Not forked: threads of torch that exist already would be copied without what they hold.
    with ProcessPoolExecutor(workers, mp_context=multiprocessing.get_context("spawn")) as executor:
        futures = {executor.submit(_run_alone, config, data_dir, folder): config for config in missing}
        try:
            for future in as_completed(futures):
                yield futures[future], future.result()
        finally:
            executor.shutdown(cancel_futures=True)


def sections(file: Path, seeds: int) -> list[Section]:
    """All tasks and methods with the runs that the page is made of."""
    results = read(file)
    found = []
    for task in TASKS.values():
        entries = []
        for name, method in METHODS.items():
            tuning = tuning_runs(task, name)
            rate = best_rate(results, tuning)
            entries.append(
                Entry(
                    method=name,
                    what=method.what,
                    claim=method.claim,
                    factor=method.factor,
                    settings=settings_of(task, name),
                    tuning=tuple(tuning),
                    rate=rate,
                    runs=() if rate is None else tuple(final_runs(task, name, rate, seeds)),
                )
            )
        found.append(Section(task.name, task.title, _conditions(task), tuple(entries)))
    return found


def _conditions(task: Task) -> str:
    return (
        f"N = {task.num_examples:,}, batches of {task.batch_size} (expected), {task.passes} "
        f"{'pass' if task.passes == 1 else 'passes'}, "
        f"C = {task.max_grad_norm:g}, delta = {task.delta:g}, learning rates "
        f"{', '.join(f'{task.base_rate * multiple:g}' for multiple in MULTIPLES)} times the factor of the method."
    )


def main(arguments: list[str] | None = None) -> int:
    """The command; returns the exit code."""
    options = _parser().parse_args(arguments)
    file = options.out / "methods.jsonl"
    failed = 0
    try:
        tasks = [TASKS[name] for name in _known("data set", options.dataset, TASKS)]
        methods = _known("method", options.methods, METHODS)
        if options.seeds < 1 or options.workers < 1:
            raise InvalidArgument(
                f"--seeds is {options.seeds} and --workers is {options.workers}; both are at least 1."
            )
        try:
            options.out.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise DataError(f"{options.out} cannot be made ({error.strerror}); give another --out.") from None
        if not options.table:
            for task in tasks:  # a missing file is found before the first run
                _loaded(task.name, options.data_dir)
            tuning = [config for task in tasks for name in methods for config in tuning_runs(task, name)]
            failed = run_missing(tuning, file, options.data_dir, options.workers)
            results = read(file)
            final = [  # method after method: what is there when the command is stopped is complete
                config
                for name in methods
                for task in tasks
                if (rate := best_rate(results, tuning_runs(task, name))) is not None
                for config in final_runs(task, name, rate, options.seeds)
            ]
            failed += run_missing(final, file, options.data_dir, options.workers)
        page = write_page(options.out, sections(file, options.seeds), read(file))
    except (DataError, InvalidArgument) as error:
        print(error, file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        print("interrupted; the same command runs what is missing.", file=sys.stderr)
        return 130
    print(f"wrote {page}", file=sys.stderr)
    return int(failed > 0)


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="python -m experiments methods", description="Methods, equally tuned.")
    parser.add_argument("--data-dir", type=Path, help="folder of the data files; left out, the variable DPKIT_DATA")
    parser.add_argument("--dataset", default=",".join(TASKS), help=f"of {', '.join(TASKS)}; left out: all")
    parser.add_argument("--methods", default=",".join(METHODS), help=f"of {', '.join(METHODS)}; left out: all")
    parser.add_argument("--seeds", type=int, default=5, help="runs of each method at each epsilon")
    parser.add_argument("--out", type=Path, default=Path(__file__).with_name("results"), help="folder of the results")
    parser.add_argument("--workers", type=int, default=1, help="runs at the same time, one core each")
    parser.add_argument("--table", action="store_true", help="run nothing, make page and plots anew")
    return parser


def _known(kind: str, names: str, known: Iterable[str]) -> list[str]:
    """The names in a list with commas, each once.

    Raises:
      InvalidArgument: one of them is not known.
    """
    chosen = list(dict.fromkeys(name.strip() for name in names.split(",")))
    for name in chosen:
        if name not in known:
            raise InvalidArgument(f"there is no {kind} {name!r} here; those that there are: {', '.join(known)}.")
    return chosen


if __name__ == "__main__":
    sys.exit(main())
