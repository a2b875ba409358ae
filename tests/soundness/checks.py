"""The checks: each runs the shipped engine and raises :class:`Violation` with the number that breaks the rule.

D  neighbours: no record moves a released sum by more than the sensitivity that the noise covers.
R  record and replay: with the releases frozen, nothing else differs between neighbours.
N  noise: what is added is normal, of the stated size, on every coordinate, fresh at every release.
A  sampling: who takes part is drawn as the ledger says.
V  events: every release was charged before it was drawn, as what it was.
K  crashes: whatever dies and whatever becomes of the files, the ledger covers what was released.
E  epsilon: what is reported is no less than the truth, and is never said without what gives it a meaning.
L  source: no construct by which such a promise is broken stands in the package.
F  files: no name leads out of a run's folder.

The same functions run on the shipped build (``test_checks.py``, ``test_members.py``, ``test_further_checks.py``) and on
builds with a bug put in (``test_mutants.py``).  The checks of this module go through sizes, types and models with the
plainest members; those of ``member_checks.py`` through all members; K, E, L and F have modules of their own.

False alarms.  D and R are deterministic.  Every statistical comparison in N, A and V has a false-alarm probability of
at most FALSE_ALARM = 1e-7, shared among its parts (Bonferroni) where it has several.  One run of all checks makes fewer
than 500 of them, so that a correct build fails less than once in 20,000 runs with fresh seeds; the seeds are fixed, but
for the one comparison of unseeded runs, where no alarm can be false.
"""

from __future__ import annotations

import math
import tempfile
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from itertools import combinations, product
from pathlib import Path
from typing import Any
from unittest import mock

import numpy as np
import torch
from scipy import stats
from torch.utils.data import DataLoader, TensorDataset

import accounting
import dpkit
from accounting import Relation
from dpkit.mechanisms import Gaussian

from .crashes import Death, Life, run_with_crashes
from .films import Film, film, random_film
from .harness import Setup, Trace, charges_on_disk, distance, finite, flat, length, run
from .subjects import HARM, Data, build, honest, loss_of

FALSE_ALARM = 1e-7


class Violation(AssertionError):
    """A check failed. ``check`` is its letter."""

    def __init__(self, check: str, what: str) -> None:
        super().__init__(f"{check}: {what}")
        self.check = check


# ---------------------------------------------------------------------------------------------------- D neighbours


@dataclass
class Reach:
    """What a check D found.

    Attributes:
      pairs: neighbouring pairs in which the record took part.
      largest: the largest distance between their sums, in units of the clipping norm ``bound``.
      cost: the largest cost of a pair, in units of what the release may cost: all queries and groups together.
      empty: pairs in which one of the batches was empty.
    """

    pairs: int = 0
    largest: float = 0.0
    cost: float = 0.0
    empty: int = 0


def compare_neighbours(setup: Setup, scenes: Film, folder: Path, reach: Reach | None = None) -> Reach:
    """Run both sides of a film with the same keys, and compare step by step.

    For each pair: the sums that reach the mechanism, of the gradient in each group and of each side question, differ by
    no more than the sensitivity that came with them, without any tolerance, and are finite; with the noise that the
    shipped mechanism takes for them, all differences together cost no more than the event says; what the optimizer sees
    is finite and differs by no more than sensitivity / (q N), to within 1e-4 for the rounding of the released numbers
    (and the unit roundoff of a bfloat16 parameter's gradient).
    """
    reach = Reach() if reach is None else reach
    setup = setup.but(steps=len(scenes.said), lr=0.0)
    left = run(setup, scenes.left, folder)
    # A rule that learns has to know the same on both sides: the right run is given what the left one released.
    right = run(setup, scenes.right, folder, replay=left.released if setup.asks else None)
    for side in (left, right):
        if side.error is not None:
            raise Violation("D", f"a record ended the run with {side.error.__name__}: {side.message[:200]} ({setup})")
        if not len(side.sums) == len(side.inputs) == len(scenes.said):
            raise Violation("D", f"{len(side.sums)} releases in {len(scenes.said)} steps ({setup})")
    rounding = 2.0**-8 if setup.dtype is torch.bfloat16 else 0.0
    for k, said in enumerate(scenes.said):
        where = f"{said}: {setup}"
        if left.sensitivities[k] != right.sensitivities[k] or left.stds[k] != right.stds[k]:
            raise Violation("D", f"the noise is scaled to {left.sensitivities[k]} or {right.sensitivities[k]}, {where}")
        for side in (left, right):
            if not all(finite(query.value) for query in side.clipped[k].queries):
                raise Violation("D", f"the clipped sum is not finite, {where}")
            if not finite(side.inputs[k]):
                raise Violation("D", f"the released gradient is not finite, {where}")
        sensitivity = left.sensitivity(k)
        moved = distance(left.sums[k], right.sums[k])
        if not moved <= sensitivity:
            raise Violation("D", f"the sums differ by {moved:.9g}, the noise covers {sensitivity:.9g}, {where}")
        cost = _cost(left, right, k, where)
        limit = sensitivity / left.expected_batch * (1 + 1e-4)
        limit += rounding * (length(left.inputs[k]) + length(right.inputs[k]))
        seen = distance(left.inputs[k], right.inputs[k])
        if not seen <= limit:
            raise Violation("D", f"the optimizer's gradients differ by {seen:.9g}, allowed are {limit:.9g}, {where}")
        took_part = left.asked[k] != right.asked[k] or setup.rate == 1 or setup.public_n - 1 in left.asked[k]
        if took_part or moved > 0:
            reach.pairs += 1
            reach.largest = max(reach.largest, moved / setup.bound)
            reach.cost = max(reach.cost, cost)
            reach.empty += not right.asked[k]
    return reach


def _cost(left: Trace, right: Trace, step: int, where: str) -> float:
    """What the differences of all queries cost together, in units of what the release may cost."""
    squares = []
    for number, query in enumerate(left.clipped[step].queries):
        other = right.clipped[step].queries[number]
        for group, covered in query.sensitivity.items():
            names = [name for name, its_group in query.groups.items() if its_group == group]
            moved = distance({name: query.value[name] for name in names}, other.value)
            if not moved <= covered:
                what = f"query {number} differs in group {group} by {moved:.9g}, the noise covers {covered:.9g}"
                raise Violation("D", f"{what}, {where}")
            squares.append((moved / left.stds[step][number][group]) ** 2)
    cost = left.scale * math.sqrt(math.fsum(squares))
    if not cost <= 1:
        raise Violation("D", f"all queries together cost {cost:.9g} of what the event says, {where}")
    return cost


ALL_KINDS: tuple[str, ...] = ()
FEW_KINDS = ("normal", "loss1e3", "NaN", "loss1e30", "lossInf", "duplicate", "member")
LARGE_KINDS = ("normal", "1e30", "NaN", "member")


def grid_D(full: bool = False) -> Iterator[tuple[Setup, tuple[str, ...]]]:
    """Setups with the kinds of records that are shown to them; no kinds means all."""
    forms, bounds = ("loop", "step"), ((1.0, torch.float32), (0.01, torch.bfloat16))
    if full:
        bounds = tuple(product((1.0, 0.01), (torch.float32, torch.bfloat16, torch.float64)))
    # The default grid leaves out pairs of choices that it shows in other company, and what takes many microbatches.
    for form, (bound, dtype), n, micro in product(forms, bounds, (1, 2, 9), (None, 3, 4)):
        if full or micro != 4 or dtype is torch.float32:
            yield Setup(form=form, bound=bound, dtype=dtype, public_n=n, micro=micro), ALL_KINDS
    for form, (bound, dtype), n, micro in product(forms, bounds, (33, 300), (None, 3, 4)):
        if full or micro is None or (form, dtype, micro) == ("step", torch.float32, 4) or (n, micro) == (33, 4):
            chosen = Setup(form=form, bound=bound, dtype=dtype, public_n=n, micro=micro)
            yield chosen, ALL_KINDS if full and n == 33 else LARGE_KINDS
    for subject, form, (bound, dtype), n in product(
        ("conv", "tied", "twice", "norms", "sequence"), forms, bounds, (1, 2, 9, 33) if full else (2, 9)
    ):
        for micro in (None, 3):
            chosen = Setup(form=form, subject=subject, bound=bound, dtype=dtype, public_n=n, micro=micro)
            if full or (n == 9 and (micro is None or form == "step" or bound == 1)) or (n == 2 and form == "step"):
                yield chosen, ALL_KINDS if full or subject == "sequence" else FEW_KINDS
    for reduction, n, micro in product(("mean", "sum") if full else ("mean",), (1, 2, 9), (None, 4)):
        yield Setup(reduction=reduction, public_n=n, micro=micro), ALL_KINDS
    for form in forms:
        yield Setup(form=form, subject="wide", bound=0.01, public_n=3), FEW_KINDS
    for subject, (bound, dtype), n in product(
        ("mlp", "conv", "tied", "norms", "sequence") if full else ("mlp", "tied"), bounds, (1, 2, 9)
    ):
        micro = None if n < 9 else 4
        chosen = Setup(form="step", backend="vmap", subject=subject, bound=bound, dtype=dtype, public_n=n, micro=micro)
        yield chosen, ALL_KINDS if full else FEW_KINDS
    for form, n, micro in product(forms, (1, 2, 9), (None, 4)):
        yield Setup(form=form, relation=Relation.ZERO_OUT, public_n=n, micro=micro), ALL_KINDS
    for rows, n in ((2, 1), (2, 9), (3, 2)):  # users who own several rows
        yield Setup(rows=rows, public_n=n), FEW_KINDS
    for form, micro in (("loop", None), ("step", 4)):
        yield Setup(form=form, public_n=9, micro=micro, canaries=50), FEW_KINDS
    # Replace-one has no theorem for sampling: only whole batches, which the loop form cuts with a truncated sampler.
    for form, n, micro in (("loop", 2, None), ("loop", 9, None), ("step", 1, None), ("step", 9, None), ("step", 9, 4)):
        yield Setup(form=form, relation=Relation.REPLACE_ONE, public_n=n, micro=micro), ALL_KINDS


def check_D(folder: Path, *, full: bool = False, only: Callable[[Setup], bool] = lambda setup: True) -> Reach:
    """Neighbours at q = 1, over the grid; then random pairs. The reach must come to 0.99 C: no room is wasted."""
    reach = Reach()
    for setup, kinds in grid_D(full):
        if only(setup):
            scenes = film(setup.subject, setup.public_n, setup.relation, setup.dtype)
            compare_neighbours(setup, scenes.only(kinds) if kinds else scenes, folder, reach)
    return reach


def check_D_random(folder: Path, *, pairs: int = 1000, scenes: int = 50) -> Reach:
    """Random crowds of n - 1 records sampled at q = 1 - 1/n, beside the same draws of a crowd with one record more."""
    generator, reach, number = torch.Generator().manual_seed(8), Reach(), 0
    forms = list(
        product(
            ("mlp", "sequence", "tied", "conv"),
            (("loop", None), ("step", 3), ("loop", 12), ("step", None)),
            (Relation.ADD_REMOVE, Relation.ZERO_OUT),
        )
    )
    while reach.pairs < pairs:
        subject, (form, micro), relation = forms[number * 5 % len(forms)]
        n = (2, 6, 14)[number % 3]
        setup = Setup(
            form=form,
            subject=subject,
            micro=micro,
            relation=relation,
            q=(n - 1) / n,
            public_n=n,
            bound=(1.0, 0.01)[number % 2],
            seed=number,
        )
        shown = random_film(subject, setup.public_n, scenes, relation, setup.dtype, generator)
        compare_neighbours(setup, shown, folder, reach)
        number += 1
    return reach


# ----------------------------------------------------------------------------------------------- R record, replay


def neighbours_R(size: int, dtype: torch.dtype) -> dict[str, tuple[Data, Data]]:
    """Pairs for the replay: one record is another one, has another label, is poison, or the whole set is empty."""
    data = honest("mlp", size, dtype)
    flipped = data._replace(y=torch.cat([(data.y[:1] + 1) % 3, data.y[1:]]))
    rest = data[1:]
    return {
        "outlier": (data, rest.put(0, HARM["x1e3"](data[:1]))),
        "loss 1e30": (data, rest.put(0, HARM["loss1e30"](data[:1]))),
        "label flip": (data, flipped),
        "NaN": (data, rest.put(0, HARM["NaN"](data[:1]))),
        "one fewer": (data, rest),
        "empty": (data[:1], data[:0]),
    }


def grid_R() -> Iterator[Setup]:
    base = Setup(steps=7, q=0.5, public_n=8, optimizer="adam", bound=0.7)
    for form, micro in product(("loop", "step"), (None, 3)):
        yield base.but(form=form, micro=micro)
    yield base.but(form="step", backend="vmap")
    yield base.but(form="loop", relation=Relation.ZERO_OUT, dtype=torch.float64)
    yield base.but(form="step", cap=2)
    yield base.but(form="loop", reduction="mean", micro=3)
    yield base.but(form="loop", canaries=50, optimizer="adambc")


def check_R(
    folder: Path, *, only: Callable[[Setup], bool] = lambda setup: True, grid: Callable[[], Iterable[Setup]] = grid_R
) -> int:
    """Record the releases on D, replay them on D': everything else must be the same, to the last bit."""
    compared = 0
    for setup in grid():
        if not only(setup):
            continue
        for said, (left, right) in neighbours_R(setup.public_n, setup.dtype).items():
            if left.size != right.size and hasattr(setup.sampler, "num_examples"):
                continue  # the size is public there, and another one is refused
            recorded = run(setup, left, folder, listen=True)
            replayed = run(setup, right, folder, replay=recorded.released, listen=True)
            where = f"{said}: {setup}"
            if recorded.error is not None:
                raise Violation("R", f"the run ended early: {recorded.message[:200]}, {where}")
            if not any(0 in indices for indices in recorded.asked):
                raise ValueError(f"the record in which the data differ never took part: take another seed, {where}")
            for name, one, other in _observations(recorded, replayed):
                if not _same(one, other):
                    raise Violation("R", f"{name} shows the data: {_shown(one)} or {_shown(other)}, {where}")
            compared += 1
    return compared


def _observations(left: Trace, right: Trace) -> Iterator[tuple[str, Any, Any]]:
    """Everything that somebody without the data may see."""
    yield "the exception", left.error, right.error
    yield "the number of releases", len(left.released), len(right.released)
    yield "the shares of the noise", _shares(left), _shares(right)
    for name in (
        *("iterations", "steps_taken", "counter", "lr", "average", "parameters", "optimizer_state", "inputs"),
        *("estimates", "told", "states", "stds", "stated_epsilons"),
        *("sensitivities", "charges_seen", "noise_keys", "ledger", "charges", "epsilon", "statement", "message"),
    ):
        yield name, getattr(left, name), getattr(right, name)


def _shares(trace: Trace) -> list[list[Any]]:
    return [[query.noise_share, query.spread] for clipped in trace.clipped for query in clipped.queries]


def _same(left: Any, right: Any) -> bool:
    if isinstance(left, torch.Tensor):
        return isinstance(right, torch.Tensor) and left.dtype == right.dtype and torch.equal(left, right)
    if isinstance(left, dict):
        return isinstance(right, dict) and list(left) == list(right) and all(_same(left[k], right[k]) for k in left)
    if isinstance(left, (list, tuple)):
        return len(left) == len(right) and all(map(_same, left, right))
    if isinstance(left, float) and isinstance(right, float) and math.isnan(left):
        return math.isnan(right)
    return left == right


def _shown(value: Any) -> str:
    return str(value)[:120]


# --------------------------------------------------------------------------------------------------------- N noise

STEPS_N = 120  # times 2,259 coordinates: 2.7e5 values


def grid_N() -> Iterator[Setup]:
    """C = 0.7 and sigma = 1.3, never 1: a missing factor must show."""
    base = Setup(subject="noise", steps=STEPS_N, q=1.0, public_n=4, bound=0.7, sigma=1.3, lr=0.0)
    yield base.but(form="loop")
    yield base.but(form="step", micro=2)
    yield base.but(form="loop", micro=8)


def check_N(folder: Path, *, only: Callable[[Setup], bool] = lambda setup: True) -> dict[str, float]:
    """The noise of the shipped engine. Returns the largest statistic of each kind.

    Two runs on one data set with frozen weights and different keys differ by noise alone: z = (a - b) / (sqrt(2) sigma
    sensitivity) is standard normal on every coordinate.  Power: a scale error of 1 % in the 2.7e5 values of a run is
    caught with probability above 0.97, because (5.2 + 2) / sqrt(2 * 2.7e5) = 0.98 %; one of 5 % always.
    """
    worst: dict[str, float] = {}
    for setup in grid_N():
        if not only(setup):
            continue
        data = honest(setup.subject, setup.public_n, setup.dtype)
        one, other = (run(setup.but(seed=2 * (setup.seed or 0) + key), data, folder, streams=True) for key in (1, 2))
        for trace in (one, other):
            if trace.error is not None or len(trace.inputs) != setup.steps:
                raise Violation("N", f"the run ended early: {trace.message[:200]} ({setup})")
            _check_scale(trace, setup)
        if distance(one.parameters, other.parameters) != 0 or not _same(one.sums, other.sums):
            raise Violation("N", f"the data do not cancel: the sums depend on the key ({setup})")
        scale = math.sqrt(2) * setup.sigma * one.sensitivity(0) / one.expected_batch
        names = list(one.inputs[0])
        sizes = [one.inputs[0][name].numel() for name in names]
        z = torch.stack([flat(a) - flat(b) for a, b in zip(one.inputs, other.inputs, strict=True)]).numpy() / scale
        for name, statistic, limit in noise_tests(z, names, sizes):
            if not statistic <= limit:
                raise Violation("N", f"{name}: {statistic:.6g}, at most {limit:.6g} is normal ({setup})")
            worst[name.split(" of ")[0]] = max(worst.get(name.split(" of ")[0], -math.inf), statistic / limit)
        for trace in (one, other):
            _check_streams(trace, setup)
        # A key of its own for every release of both runs.
        both = one.noise_keys + other.noise_keys
        if len(set(both)) != len(both):
            raise Violation("N", f"{len(both) - len(set(both))} of {len(both)} releases share a noise key ({setup})")
    _check_unseeded(folder)
    return worst


def _check_scale(trace: Trace, setup: Setup) -> None:
    """The sensitivity is C and its rounding, and no more: too much noise is a bug as well."""
    for step in range(setup.steps):
        if not setup.bound <= trace.sensitivity(step) <= 1.02 * setup.bound:
            raise Violation("N", f"noise is scaled to {trace.sensitivity(step)} for C = {setup.bound} ({setup})")


def _check_streams(trace: Trace, setup: Setup) -> None:
    """No generator state is handed out twice, and none both for sampling and for noise."""
    if not trace.sampling_streams or not trace.noise_streams:
        raise Violation("N", f"no generator was seen ({setup})")
    for name, prints in (("sampling", trace.sampling_streams), ("noise", trace.noise_streams)):
        if len(set(prints)) != len(prints):
            raise Violation("N", f"{len(prints) - len(set(prints))} of {len(prints)} {name} streams repeat ({setup})")
    if shared := set(trace.sampling_streams) & set(trace.noise_streams):
        raise Violation("N", f"{len(shared)} generators serve sampling and noise ({setup})")


def noise_tests(z: np.ndarray, names: list[str], sizes: list[int]) -> Iterator[tuple[str, float, float]]:
    """(name, statistic, limit): the statistic of true noise exceeds the limit with probability at most FALSE_ALARM.

    Args:
      z: (steps, coordinates), standard normal if all is well; ``sizes`` coordinates for each of ``names``.
    """
    steps, coordinates = z.shape
    total = z.size

    def deficit(values: np.ndarray, tests: int = 1) -> tuple[float, float]:
        """One-sided: minus the sum of squares, against the lower quantile of chi-squared."""
        return -float((values**2).sum()), -float(stats.chi2.ppf(FALSE_ALARM / tests, values.size))

    def normal_limit(tests: int) -> float:
        return float(stats.norm.isf(FALSE_ALARM / tests / 2))

    yield "too little noise over all", *deficit(z)
    yield "too much noise over all", float((z**2).sum()), float(stats.chi2.isf(FALSE_ALARM, total))
    start = 0
    for name, size in zip(names, sizes, strict=True):
        yield f"too little noise of tensor {name}", *deficit(z[:, start : start + size], len(names))
        start += size
    weakest = (z**2).sum(0)
    limit = -float(stats.chi2.ppf(FALSE_ALARM / coordinates, steps))
    yield f"too little noise of coordinate {int(weakest.argmin())}", -float(weakest.min()), limit
    yield "mean over all", abs(float(z.sum())) / math.sqrt(total), normal_limit(1)
    distances = stats.kstest(z.ravel(), "norm", method="asymp")
    yield "Kolmogorov-Smirnov: -log10 of p", -math.log10(max(distances.pvalue, 1e-300)), -math.log10(FALSE_ALARM)
    # Products of independent standard normals have mean 0 and variance 1; their sum is normal for so many of them.
    lags = (1, 2, 3, 5)
    for lag in lags:
        products = z[lag:] * z[:-lag]
        yield f"lag {lag} correlation", abs(float(products.sum())) / math.sqrt(products.size), normal_limit(len(lags))
    # Coordinates against each other: Fisher's transform is near normal in the tails too, unlike r sqrt(steps).
    if coordinates > 1:
        unit = (z - z.mean(0)) / z.std(0)
        correlation = unit.T @ unit / steps
        np.fill_diagonal(correlation, 0.0)
        largest = min(float(np.abs(correlation).max()), 1 - 1e-12)
        pairs = coordinates * (coordinates - 1) // 2
        yield "correlation of two coordinates", math.atanh(largest) * math.sqrt(steps - 3), normal_limit(pairs)
    # Of 2.8e5 float32 numbers about one in 250 meets another by chance; a coarse grid repeats nearly all of them.
    yield "share of repeated values", 1.0 - len(np.unique(z)) / total, 0.05


def _check_unseeded(folder: Path) -> None:
    setup = Setup(seed=None, steps=2, lr=0.0)
    data = honest("mlp", setup.public_n, setup.dtype)
    one, other = (run(setup, data, folder) for _ in range(2))
    same = [k for k, (a, b) in enumerate(zip(one.inputs, other.inputs, strict=True)) if distance(a, b) == 0]
    if same or set(one.noise_keys) & set(other.noise_keys):
        raise Violation("N", f"two runs without a seed have the same noise at steps {same}: whoever runs it knows it")


LIVES_N = (
    Life(3, Death.BETWEEN_STEPS, goes_on_from=1),
    Life(2, Death.BETWEEN_STEPS, goes_on_from=1),
    Life(2, Death.AFTER_THE_CHARGE, goes_on_from=-1),
    Life(2, Death.BETWEEN_STEPS),
)


def check_N_resumed(folder: Path, *, only: Callable[[Setup], bool] = lambda setup: True) -> int:
    """Runs that go on from one checkpoint, more than once: no release has the noise of another one.

    Noise is compared to a thousandth of its length, because sum and release are rounded; that two independent draws of
    83 coordinates come so close has a probability far below FALSE_ALARM. Returns the number of releases.
    """
    found = 0
    for seed in (None, 5):
        setup = Setup(steps=12, q=0.5, public_n=8, seed=seed)
        if not only(setup):
            continue
        past = run_with_crashes(setup, LIVES_N, folder).past
        if len(past) != sum(life.steps for life in LIVES_N):
            raise Violation("N", f"the run ended early, with {len(past)} releases ({setup})")
        for (i, one), (j, other) in combinations(enumerate(past), 2):
            if one.key == other.key or float((one.noise - other.noise).norm()) <= 1e-3 * float(one.noise.norm()):
                raise Violation("N", f"releases {i} and {j} of a resumed run have the same noise ({setup})")
        found += len(past)
    return found


# ------------------------------------------------------------------------------------------------------ A sampling

STEPS_A = 500


def grid_A() -> Iterator[Setup]:
    base = Setup(steps=STEPS_A, q=0.25, public_n=40, lr=0.0, sigma=3.0)
    yield base.but(form="loop")
    yield base.but(form="loop", micro=10)  # truncated at B + 6 sqrt(B) = 29
    yield base.but(form="step", cap=11)  # truncated in earnest


def check_A(folder: Path, *, only: Callable[[Setup], bool] = lambda setup: True) -> dict[str, float]:
    """Who takes part in 500 steps of the real loader, against the event in the ledger."""
    worst: dict[str, float] = {}
    for setup in grid_A():
        if not only(setup):
            continue
        trace = run(setup, honest("mlp", setup.public_n, setup.dtype), folder)
        if trace.error is not None or len(trace.asked) != setup.steps or trace.plan is None:
            raise Violation("A", f"the run ended early: {trace.message[:200]} ({setup})")
        taken = np.zeros((setup.steps, setup.public_n))
        for step, indices in enumerate(trace.asked):
            np.add.at(taken[step], indices, 1)
        if taken.max() > 1:
            raise Violation("A", f"a record took part {int(taken.max())} times in one step ({setup})")
        for name, statistic, limit in sampling_tests(taken, trace.plan.event):
            if not statistic <= limit:
                raise Violation("A", f"{name}: {statistic:.6g}, at most {limit:.6g} is chance ({setup})")
            worst[name] = max(worst.get(name, -math.inf), statistic / limit)
    return worst


def sampling_tests(taken: np.ndarray, event: accounting.Event) -> Iterator[tuple[str, float, float]]:
    """(name, statistic, limit) for the (steps, records) indicators, against the LEDGER's event."""
    steps, n = taken.shape
    cap = getattr(event, "cap", n)
    q = getattr(event, "sample_rate", 1.0)
    sizes = taken.sum(1)
    # The law of a batch size is exact: Bin(n, q), cut at the cap.
    law = stats.binom.pmf(np.arange(min(cap, n) + 1), n, q)
    law[-1] += stats.binom.sf(min(cap, n), n, q)
    if sizes.max() >= len(law):
        yield "batch beyond the cap", float(sizes.max()), float(cap)
        return
    values = np.arange(len(law))
    mean = float(law @ values)
    moments = [float(law @ (values - mean) ** k) for k in (2, 4)]
    yield "inclusions beyond q", float(taken.sum()), float(stats.binom.isf(FALSE_ALARM, steps * n, q))
    limit = float(stats.norm.isf(FALSE_ALARM / 2))
    yield "mean batch size", abs(sizes.mean() - mean) / math.sqrt(moments[0] / steps), limit
    # The variance of the sample variance about the known mean is (m4 - m2^2) / T; T = 500 terms make it near normal,
    # and 6.5 instead of 5.3 pays for what is missing to that in the tail (skewness 0.15).
    spread = float(((sizes - mean) ** 2).mean())
    yield (
        "variance of the batch size",
        abs(spread - moments[0]) / math.sqrt((moments[1] - moments[0] ** 2) / steps),
        6.5,
    )
    counts = taken.sum(0)
    rate = mean / n
    yield (
        "inclusions of one record",
        float(np.abs(counts - steps * rate).max()) / math.sqrt(steps * rate * (1 - rate)),
        float(stats.norm.isf(FALSE_ALARM / n / 2)) + 0.5,  # 0.5 for a binomial of 500 in place of a normal
    )
    # Indicators of one record at two steps are independent. The products have mean 0, and within one step they are
    # correlated a little where the cap binds, so their variance is that of sum_i sum_j over the covariance of a step.
    centred = taken - rate
    lags = sorted(lag for lag in {*range(1, 12), max(1, n // 10), 50, 100} if lag < steps)
    covariance = moments[0]  # of the batch size: sum over all pairs of records
    own = n * rate * (1 - rate)
    cross = (covariance - own) / (n * (n - 1))
    variance = n * (rate * (1 - rate)) ** 2 + n * (n - 1) * cross**2
    for lag in lags:
        products = float((centred[lag:] * centred[:-lag]).sum())
        statistic = abs(products) / math.sqrt((steps - lag) * variance)
        yield f"lag {lag}", statistic, float(stats.norm.isf(FALSE_ALARM / len(lags) / 2)) + 0.5


# -------------------------------------------------------------------------------------------------------- V events


def grid_V() -> Iterator[Setup]:
    base = Setup(subject="noise", steps=24, q=0.5, public_n=8, bound=0.7, sigma=1.3, lr=0.0)
    for form, micro in product(("loop", "step"), (None, 3)):
        yield base.but(form=form, micro=micro)
    yield base.but(form="step", cap=3)
    yield base.but(form="loop", stop_after=5)
    yield base.but(form="step", stop_after=5)


def check_V(folder: Path, *, only: Callable[[Setup], bool] = lambda setup: True) -> int:
    """Charges against what happened. Returns the number of releases that were looked at."""
    looked = 0
    for setup in grid_V():
        if not only(setup):
            continue
        trace = run(setup, honest(setup.subject, setup.public_n, setup.dtype), folder)
        if trace.error is not None or trace.plan is None:
            raise Violation("V", f"the run ended early: {trace.message[:200]} ({setup})")
        releases, keys = len(trace.released), len(set(trace.noise_keys))
        expected = setup.steps if setup.stop_after is None else setup.stop_after
        if releases != expected:
            raise Violation("V", f"{releases} releases in {expected} steps ({setup})")
        if not trace.charges >= keys >= releases:
            raise Violation("V", f"{trace.charges} charges, {keys} noise keys, {releases} releases ({setup})")
        for number, seen in enumerate(trace.charges_seen):
            if seen < number + 1:
                raise Violation("V", f"release {number + 1} was made when {seen} charges were on the disk ({setup})")
        if trace.steps_taken != releases:
            raise Violation("V", f"the engine counts {trace.steps_taken} steps and released {releases} ({setup})")
        if not trace.refused_beyond:
            raise Violation("V", f"the ledger took more charges than the {setup.steps} planned ones ({setup})")
        _check_event(trace, setup)
        looked += releases
    return looked


def _check_event(trace: Trace, setup: Setup) -> None:
    """The event in the ledger is no cheaper than what was measured."""
    assert trace.plan is not None
    event = trace.plan.event
    q = getattr(event, "sample_rate", 1.0)
    inner: Any = getattr(event, "event", event)
    taken = sum(len(indices) for indices in trace.asked)
    most = float(stats.binom.isf(FALSE_ALARM, len(trace.asked) * setup.public_n, q))
    if taken > most:
        raise Violation("V", f"{taken} records took part, the charged q = {q} allows {most:.0f} ({setup})")
    noise = torch.stack(
        [
            (flat(released.value) - flat(total)) / trace.sensitivity(step)
            for step, (released, total) in enumerate(zip(trace.released, trace.sums, strict=True))
        ]
    )
    squares, values = float(noise.square().sum()), noise.numel()
    least = float(stats.chi2.ppf(FALSE_ALARM, values)) * inner.noise_multiplier**2
    if squares < least:
        measured = math.sqrt(squares / values)
        raise Violation("V", f"the noise has multiplier {measured:.4f}, charged is {inner.noise_multiplier} ({setup})")


def check_V_passes(folder: Path, *, only: Callable[[Setup], bool] = lambda setup: True) -> int:
    """A pass has ceil(N / batch size) steps, all of them planned and charged: int(1 / q) is one less for many N."""
    looked = 0
    for n, batch in ((93, 1), (10, 3)):
        setup = Setup(q=batch / n, public_n=n, epochs=1, lr=0.0)
        if not only(setup):
            continue
        trace = run(setup, honest(setup.subject, n, setup.dtype), folder)
        if trace.error is not None or trace.plan is None:
            raise Violation("V", f"the run ended early: {trace.message[:200]} ({setup})")
        wanted, told = math.ceil(n / batch), (trace.iterations, trace.plan.steps, trace.charges, len(trace.released))
        if set(told) != {wanted}:
            what = "{} iterations, {} planned steps, {} charges and {} releases".format(*told)
            raise Violation("V", f"{what} in a pass of {wanted} steps ({setup})")
        looked += wanted
    return looked


def check_V_beside(folder: Path, *, only: Callable[[str], bool] = lambda what: True) -> int:
    """Numbers of the whole data set that are released beside the steps of a run are charged as well, before the draw.

    Returns the number of releases.
    """
    if not only("beside"):
        return 0
    run_dir = Path(tempfile.mkdtemp(dir=folder))
    data, model = honest("mlp", 8, torch.float32), build("mlp", torch.float32)
    shipped, seen = Gaussian.release, list[int]()

    def release(self: Gaussian, *args: Any) -> Any:
        seen.append(len(charges_on_disk(run_dir / "ledger.sqlite")))
        return shipped(self, *args)

    with mock.patch.object(Gaussian, "release", release):
        engine = dpkit.PrivacyEngine(run_dir, dataset_name="made up", budget=accounting.Budget(1e3, 1e-2), seed=1)
        model, optimizer, loader = engine.make_private(
            model,
            torch.optim.SGD(model.parameters(), lr=0.1),
            DataLoader(TensorDataset(*data), batch_size=4),
            mechanism=Gaussian(1.3),
            target_delta=1e-5,
            steps=4,
            max_grad_norm=1.0,
            num_examples=8,
        )
        for batch in loader:
            engine.backward(loss_of(model, batch))
            optimizer.step()
            engine.release_mean("first", data.x[:, 0].abs(), lower=0.0, upper=2.0, noise_multiplier=3.0)
            engine.release_count("class", data.y == 0, noise_multiplier=3.0)
        epsilon, accesses = engine.epsilon().upper, engine.statement().data_accesses
        engine.detach()
        engine.ledger.close()
    for number, charges in enumerate(seen):
        if charges < number + 1:
            raise Violation("V", f"release {number + 1} was made when {charges} charges were on the disk (beside)")
    alone = accounting.Gaussian(noise_multiplier=3.0)
    # Less is not possible, for one release of the whole data set is among them.
    least = accounting.epsilon(alone, 1e-5, relation=Relation.ADD_REMOVE).lower
    if accesses != len(seen) or epsilon <= least:
        raise Violation("V", f"{len(seen)} releases, and the statement tells of {accesses} at epsilon {epsilon:.4g}")
    return len(seen)


CHECKS: dict[str, Callable[..., object]] = {
    "D": check_D,
    "R": check_R,
    "N": check_N,
    "A": check_A,
    "V": check_V,
}
