"""The checks D, R, N, A and V for the members of the package; ``checks.py`` says what the letters stand for.

What a member must do is written here once more, from its mathematics: how the noise is split among groups and queries,
how it is correlated over the steps, which event a sampler makes.  Nothing of that is asked of the package.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch
from scipy import stats
from scipy.linalg import toeplitz

import accounting
from accounting import Relation
from dpkit.clipping import Flat, GlobalAdapt, GroupAdaptive, NoiseSplit, PerLayer, PerLayerQuantile, Quantile
from dpkit.errors import DpkitError
from dpkit.mechanisms import Correlated, DiscreteGaussian
from dpkit.metrics import Mean
from dpkit.sampling import CyclicPoisson, FixedOrder, WithoutReplacement
from dpkit.types import Query

from . import members
from .checks import FALSE_ALARM, Reach, Violation, check_R, compare_neighbours, noise_tests, sampling_tests
from .crashes import Death, Life, run_with_crashes
from .films import Film, edges, film, products
from .harness import Setup, Trace, flat, run
from .subjects import dropped_record, honest, marked, null_record

Chosen = Callable[[Setup], bool]


def _all(setup: Setup) -> bool:
    return True


# ---------------------------------------------------------------------------------------------------- D neighbours

EDGES = {member.rule: member.edges for member in members.RULES.values()}


def scenes_D(setup: Setup, kinds: tuple[str, ...]) -> Film:
    """The kinds of records that are shown to ``setup``, and those on the edges of its rule."""
    null = dropped_record if setup.asks else null_record
    scenes = film(setup.subject, setup.public_n, setup.relation, setup.dtype, null=null).only(kinds)
    norms = EDGES.get(setup.rule, ())
    # The edges come first: a rule that learns stands where it began.
    return edges(setup.subject, setup.public_n, setup.relation, setup.dtype, norms).then(scenes)


def check_D(folder: Path, *, full: bool = False, only: Chosen = _all) -> dict[str, Reach]:
    """Neighbours for every rule, sampler and mechanism. Returns what was found for each rule."""
    found: dict[str, Reach] = {}
    for setup, kinds in members.grid_D(full):
        if only(setup):
            compare_neighbours(setup, scenes_D(setup, kinds), folder, found.setdefault(str(setup.rule), Reach()))
    return found


def check_D_products(folder: Path, *, full: bool = False, only: Chosen = _all) -> Reach:
    """Gradients that leave the range of float32 on the way, under every rule."""
    reach = Reach()
    for setup in members.grid_D_products(full):
        if only(setup):
            compare_neighbours(setup, products(setup.public_n, setup.relation, setup.dtype), folder, reach)
    return reach


# ----------------------------------------------------------------------------------------------- R record, replay


def check_R_members(folder: Path, *, full: bool = False, only: Chosen = _all) -> int:
    """Record and replay for what has a state."""
    return check_R(folder, only=only, grid=lambda: members.grid_R(full))


# --------------------------------------------------------------------------------------------------------- N noise


def strategy(setup: Setup) -> np.ndarray:
    """(T, T) the matrix C by which the noise is correlated; the identity for independent noise."""
    if not isinstance(setup.mechanism, Correlated):
        return np.eye(setup.steps)
    return np.tril(toeplitz(setup.mechanism.strategy.coefficients(setup.steps)))


def sensitivity_of_strategy(setup: Setup) -> float:
    """How far C G moves at most, in contributions of one participation, by trying all first steps."""
    columns = np.abs(strategy(setup))
    if not isinstance(setup.mechanism, Correlated):
        return 1.0
    if isinstance(setup.sampler, CyclicPoisson):
        return float(np.linalg.norm(columns, axis=0).max())
    assert isinstance(setup.sampler, FixedOrder)
    apart = math.ceil(setup.public_n / setup.sampler.batch_size)
    return max(float(np.linalg.norm(columns[:, first::apart].sum(1))) for first in range(apart))


def side_questions(setup: Setup, groups: int) -> list[tuple[float, float]]:
    """(sensitivity, standard deviation of the noise) of what is asked beside the gradient, as the rules' papers say."""
    found: list[tuple[float, float]] = []
    match setup.rule:
        case Quantile(noise_std=std) if std is not None:
            found.append((0.5, std))
        case PerLayerQuantile(noise_std=std) if std is not None:
            found.append((math.sqrt(groups) / 2, std))
        case GlobalAdapt(noise_std=std) | GroupAdaptive(noise_std=std):
            found.append((1.0, std))
    for metric in setup.metrics:
        half = (metric.upper - metric.lower) / 2 if isinstance(metric, Mean) else 0.5
        found.append((half, metric.noise_std))  # pyright: ignore[reportAttributeAccessIssue]
    twice = 2.0 if setup.relation is Relation.REPLACE_ONE else 1.0
    return [(twice * moved, std) for moved, std in found]


def documented_stds(setup: Setup, gradient: Query) -> list[dict[int, float]]:
    """The noise of each query and group: s_k = z gamma_k sqrt(sum_j C_j^2 / gamma_j^2), and z_Delta in place of z.

    z_Delta = (z^-2 - sum (Delta_b / sigma_b)^2)^(-1/2) is what the side questions leave for the gradient.
    """
    scale = setup.noise.noise_multiplier * sensitivity_of_strategy(setup)
    bounds = gradient.sensitivity
    sizes = dict.fromkeys(bounds, 0)
    for name, group in gradient.groups.items():
        sizes[group] += gradient.value[name].numel()
    split = getattr(setup.rule, "noise_split", None)
    by_split: dict[Any, dict[int, float]] = {
        NoiseSplit.GLOBAL: dict.fromkeys(bounds, 1.0),
        NoiseSplit.DIMENSION_OPTIMAL: {k: math.sqrt(bounds[k] / math.sqrt(sizes[k])) for k in bounds},
    }
    gamma = by_split.get(split, bounds)
    side = side_questions(setup, len(set(setup.rule.groups(gradient.groups))))
    left = scale**-2 - math.fsum((moved / std) ** 2 for moved, std in side)
    joint = math.sqrt(math.fsum((bounds[k] / gamma[k]) ** 2 for k in bounds))
    return [{k: left**-0.5 * gamma[k] * joint for k in bounds}, *({0: std} for _, std in side)]


def check_N(folder: Path, *, full: bool = False, only: Chosen = _all) -> dict[str, float]:
    """The noise of every query and group, made independent over the steps again. Returns the largest statistics."""
    worst: dict[str, float] = {}
    for setup in members.grid_N(full):
        if not only(setup):
            continue
        trace = run(setup, honest(setup.subject, setup.public_n, setup.dtype), folder, streams=True)
        if trace.error is not None or len(trace.released) != setup.steps:
            raise Violation("N", f"the run ended early: {trace.message[:200]} ({setup})")
        _check_stds(trace, setup)
        white = strategy(setup)
        names = list(trace.sums[0])
        sizes = [trace.sums[0][name].numel() for name in names]
        noise = np.stack([_standardised(trace, setup, step) for step in range(setup.steps)])
        tests = list(noise_tests(white @ noise, names, sizes))
        if isinstance(setup.mechanism, Correlated):
            tests.extend(_covariance_tests(noise, np.linalg.inv(white)))
        tests.extend(_side_tests(trace, setup, white))
        for name, statistic, limit in tests:
            if not statistic <= limit:
                raise Violation("N", f"{name}: {statistic:.6g}, at most {limit:.6g} is normal ({setup})")
            worst[name.split(" of ")[0]] = max(worst.get(name.split(" of ")[0], -math.inf), statistic / abs(limit))
        _check_streams(trace, setup)
    return worst


def _check_stds(trace: Trace, setup: Setup) -> None:
    """What the mechanism says about its noise, and what the optimizer sees of it."""
    lengths = np.linalg.norm(np.linalg.inv(strategy(setup)), axis=1)  # of the rows of the noise that is added
    # A grid moves sums, for which there is a little more noise, and never less.
    room = {"default": 1e-9, "hardened": 1e-6, "exact": 1e-3}[setup.noise.tier]
    for step, clipped in enumerate(trace.clipped):
        documented = documented_stds(setup, clipped.queries[0])
        for number, (told, wanted) in enumerate(zip(trace.stds[step], documented, strict=True)):
            for group, std in wanted.items():
                if not math.isclose(told[group], std, rel_tol=1e-9):
                    what = f"query {number} has noise {told[group]:.9g} in group {group}, documented is {std:.9g}"
                    raise Violation("N", f"{what}, step {step} ({setup})")
        released, groups = trace.released[step], clipped.queries[0].groups
        for name, std in released.noise_std.items():
            wanted = documented[0][groups[name]] * lengths[step]
            if not wanted * (1 - 1e-9) <= std <= wanted * (1 + room):
                raise Violation("N", f"the noise of {name} is said to be {std}, step {step} ({setup})")
            if not torch.equal(trace.inputs[step][name], released.value[name] / trace.expected_batch):
                raise Violation("N", f"the optimizer's {name} is not what was released, step {step} ({setup})")
    rule = setup.rule
    if isinstance(rule, Flat | PerLayer | PerLayerQuantile):
        fixed = rule.max_grad_norm if isinstance(rule.max_grad_norm, tuple) else (rule.max_grad_norm,)
        for step in range(setup.steps):
            if not math.hypot(*fixed) <= trace.sensitivity(step) <= 1.02 * math.hypot(*fixed):
                raise Violation("N", f"noise is scaled to {trace.sensitivity(step)}, step {step} ({setup})")


def _standardised(trace: Trace, setup: Setup, step: int) -> np.ndarray:
    """The noise that was added to the gradient, in the documented standard deviations of a draw."""
    query, released = trace.clipped[step].queries[0], trace.released[step].value
    (stds, *_) = documented_stds(setup, query)
    parts = [
        (released[name].double() - value.double()).flatten() / stds[query.groups[name]]
        for name, value in query.value.items()
    ]
    return torch.cat(parts).numpy()


def _side_tests(trace: Trace, setup: Setup, white: np.ndarray) -> Iterator[tuple[str, float, float]]:
    """Too little or too much noise on what was asked beside the gradient."""
    questions = trace.clipped[0].queries[1:]
    for number, question in enumerate(questions, start=1):
        (name,) = question.value
        noise = np.stack(
            [
                (released.queries[number - 1] - clipped.queries[number].value[name]).numpy()
                / documented_stds(setup, clipped.queries[0])[number][0]
                for released, clipped in zip(trace.released, trace.clipped, strict=True)
            ]
        )
        squares = float(((white @ noise) ** 2).sum())
        alarm = FALSE_ALARM / len(questions)
        yield f"too little noise of query {number}", -squares, -float(stats.chi2.ppf(alarm, noise.size))
        yield f"too much noise of query {number}", squares, float(stats.chi2.isf(alarm, noise.size))


def _covariance_tests(noise: np.ndarray, colours: np.ndarray) -> Iterator[tuple[str, float, float]]:
    """The covariance over steps of (T, d) noise against C^-1 C^-T: every entry is a mean over d coordinates.

    Entry (s, t) has variance (S_ss S_tt + S_st^2) / d; for d = 2,259 it is near normal, and 0.8 pays for the skewness
    of the diagonal (0.06) that far out.
    """
    steps, coordinates = noise.shape
    wanted = colours @ colours.T
    found = noise @ noise.T / coordinates
    spread = np.sqrt((np.outer(wanted.diagonal(), wanted.diagonal()) + wanted**2) / coordinates)
    limit = float(stats.norm.isf(FALSE_ALARM / (steps * (steps + 1)))) + 0.8
    yield "covariance of two steps", float(np.abs((found - wanted) / spread).max()), limit


def _check_streams(trace: Trace, setup: Setup) -> None:
    """No stream twice, but for draws that are made again on purpose; and none both for sampling and for noise."""
    again = isinstance(setup.mechanism, Correlated) and setup.mechanism.regenerate
    made = sum(len(query.value) for clipped in trace.clipped for query in clipped.queries)
    made += setup.steps  # the prints of the keys come from a stream of their own
    if len(set(trace.noise_streams)) != made or (len(trace.noise_streams) != made and not again):
        counts = f"{len(trace.noise_streams)} noise streams, {len(set(trace.noise_streams))} of them different"
        raise Violation("N", f"{counts}, of {made} ({setup})")
    if len(set(trace.noise_keys)) != setup.steps:
        raise Violation("N", f"{len(set(trace.noise_keys))} noise keys for {setup.steps} releases ({setup})")
    if set(trace.sampling_streams) & set(trace.noise_streams):
        raise Violation("N", f"a generator serves sampling and noise ({setup})")


GRID_BITS = {"hardened": 30, "exact": 20}
"""Of the tiers: a standard deviation of the noise has so many steps of the grid, as a power of two."""


def check_N_grid(folder: Path, *, only: Chosen = _all) -> int:
    """Every number that is released lies on the grid, which depends on public numbers alone: none can be reached from
    one neighbour only. Returns how many numbers were looked at."""
    looked = 0
    for setup in members.grid_N_grid():
        if not only(setup):
            continue
        trace = run(setup, honest(setup.subject, setup.public_n, setup.dtype), folder)
        if trace.error is not None or len(trace.released) != setup.steps:
            raise Violation("N", f"the run ended early: {trace.message[:200]} ({setup})")
        bits = GRID_BITS[setup.noise.tier]
        for step, released in enumerate(trace.released):
            gradient = trace.clipped[step].queries[0].groups
            numbers = [(f"of {name}", 0, gradient[name], value) for name, value in released.value.items()]
            numbers += [("of a metric", k, 0, value) for k, value in enumerate(released.queries, start=1)]
            for name, query, group, value in numbers:
                grid = 2.0 ** (math.floor(math.log2(trace.stds[step][query][group])) - bits)
                steps = value.double() / grid
                if off := int((steps != steps.round()).sum()):
                    what = f"{off} of {steps.numel()} numbers {name} are no multiples of {grid:g}"
                    raise Violation("N", f"{what}, step {step} ({setup})")
                looked += steps.numel()
    return looked


# ------------------------------------------------------------------------------------------------------ A sampling


def check_A(folder: Path, *, only: Chosen = _all) -> dict[str, float]:
    """Who takes part, by what the model was shown, against the sampler's promise."""
    worst: dict[str, float] = {}
    for setup in members.grid_A():
        if not only(setup):
            continue
        taken = _taken(setup, folder)
        found: list[tuple[str, float, float]] = []
        if isinstance(setup.sampler, FixedOrder):
            check_order(taken, setup.sampler, str(setup))
        elif isinstance(setup.sampler, WithoutReplacement):
            found.extend(_subset_tests(taken, setup.sampler))
        elif isinstance(setup.sampler, CyclicPoisson):
            groups = _check_cycle(taken, setup.sampler, str(setup))
            rate = setup.sampler.groups * setup.sampler.sample_rate
            if rate < 1:
                for group in range(setup.sampler.groups):
                    turns = taken[group :: setup.sampler.groups][:, groups == group]
                    found.extend(sampling_tests(turns, accounting.Poisson(sample_rate=rate, event=_ANY)))
            else:
                other = _check_cycle(_taken(setup.but(seed=6), folder), setup.sampler, str(setup))
                found.extend(_group_tests(groups, other, setup.sampler.groups))
        for name, statistic, limit in found:
            if not statistic <= limit:
                raise Violation("A", f"{name}: {statistic:.6g}, at most {limit:.6g} is chance ({setup})")
            worst[name] = max(worst.get(name, -math.inf), statistic / abs(limit))
        worst.setdefault("order", 0.0)
    return worst


_ANY = accounting.Gaussian(noise_multiplier=1.0)


def _taken(setup: Setup, folder: Path) -> np.ndarray:
    """(steps, units) how often each unit was shown to the model for each release."""
    trace = run(setup, marked(setup.subject, setup.public_n), folder)
    if trace.error is not None or len(trace.shown) != setup.steps or trace.plan is None:
        raise Violation("A", f"the run ended early: {trace.message[:200]} ({setup})")
    taken = np.zeros((setup.steps, setup.public_n))
    for step, rows in enumerate(trace.shown):
        units = [round(row) - 1 for row in rows if row]
        np.add.at(taken[step], units, 1)
        if not setup.workers and setup.leave_after is None and sorted(units) != sorted(trace.asked[step]):
            raise Violation("A", f"the model was shown other units than were drawn, step {step} ({setup})")
    if taken.max() > 1:
        raise Violation("A", f"a unit took part {int(taken.max())} times in one step ({setup})")
    return taken


def check_order(taken: np.ndarray, sampler: FixedOrder, where: str) -> None:
    """Every pass the same: each unit once, at the same place; batches as large as they are said to be."""
    steps, units = taken.shape
    apart = math.ceil(units / sampler.batch_size)
    for step in range(steps):
        last = step % apart == apart - 1
        size = units - (apart - 1) * sampler.batch_size if last else sampler.batch_size
        if taken[step].sum() != size:
            raise Violation("A", f"{int(taken[step].sum())} units in step {step}, not {size} ({where})")
        if step >= apart and not np.array_equal(taken[step], taken[step - apart]):
            raise Violation("A", f"step {step} has other units than step {step - apart}, a pass before ({where})")
    if steps >= apart and not (taken[:apart].sum(0) == 1).all():
        raise Violation("A", f"not each unit is in the first pass once ({where})")
    if taken.sum(0).max() > math.ceil(steps / apart):
        raise Violation("A", f"a unit took part {int(taken.sum(0).max())} times in {steps} steps ({where})")
    if sampler.order_seed is None and not taken[0, : sampler.batch_size].all():
        raise Violation("A", f"the order is not that of the data set ({where})")


def _subset_tests(taken: np.ndarray, sampler: WithoutReplacement) -> Iterator[tuple[str, float, float]]:
    """(name, statistic, limit) for uniform subsets of a fixed size."""
    steps, n = taken.shape
    m = sampler.batch_size
    yield "largest batch", float(taken.sum(1).max()), float(m)
    yield "smallest batch", -float(taken.sum(1).min()), -float(m)
    rate, both = m / n, m * (m - 1) / (n * (n - 1))
    for name, counts, chance in (
        ("inclusions of one unit", taken.sum(0), rate),
        ("inclusions of a pair", (taken.T @ taken)[np.triu_indices(n, 1)], both),
    ):
        tail = np.minimum(stats.binom.sf(counts - 1, steps, chance), stats.binom.cdf(counts, steps, chance)).min()
        yield f"{name}: -log10 of p", -math.log10(max(tail, 1e-300)), -math.log10(FALSE_ALARM / 2 / len(counts))
    # Within a step the indicators add up to m: each pair is correlated by -1/(n - 1), so the sum over units of the
    # products of two independent steps has variance n (r (1 - r))^2 (1 + 1/(n - 1)).
    centred = taken - rate
    lags = (1, 2, 3, 4, 7, 8, 50)
    for lag in lags:
        products = float((centred[lag:] * centred[:-lag]).sum())
        spread = math.sqrt((steps - lag) * n * (rate * (1 - rate)) ** 2 * (1 + 1 / (n - 1)))
        yield f"lag {lag}", abs(products) / spread, float(stats.norm.isf(FALSE_ALARM / len(lags) / 2)) + 0.5


def _check_cycle(taken: np.ndarray, sampler: CyclicPoisson, where: str) -> np.ndarray:
    """(units,) the group of each unit: the one residue of the steps in which it takes part."""
    turns = np.stack([taken[group :: sampler.groups].sum(0) for group in range(sampler.groups)])
    if ((turns > 0).sum(0) > 1).any():
        raise Violation("A", f"a unit took part outside of the turns of its group ({where})")
    if not turns.any(0).all():
        raise Violation("A", f"{int((~turns.any(0)).sum())} units never took part ({where})")
    return turns.argmax(0)


def _group_tests(groups: np.ndarray, other: np.ndarray, number: int) -> Iterator[tuple[str, float, float]]:
    """Groups are uniform, those of neighbouring units independent, and those of another run others.

    Chi-squared with at least 60 units expected in a cell; too even a split is as wrong as an uneven one.
    """
    pairs = groups[0::2] * number + groups[1::2]
    again = groups * number + other
    for name, cells, size in (("groups", groups, number), ("pairs", pairs, number**2), ("two runs", again, number**2)):
        counts = np.bincount(cells, minlength=size)
        statistic = float(((counts - counts.sum() / size) ** 2).sum() / (counts.sum() / size))
        yield f"uneven {name}", statistic, float(stats.chi2.isf(FALSE_ALARM / 2, size - 1))
        yield f"too even {name}", -statistic, -float(stats.chi2.ppf(FALSE_ALARM / 2, size - 1))


LIVES = (
    Life(3, Death.BETWEEN_STEPS, goes_on_from=0),
    Life(4, Death.AFTER_THE_CHARGE, goes_on_from=-1),
    Life(2, Death.AFTER_THE_DRAW, goes_on_from=1),
    Life(1, Death.AFTER_THE_CHARGE, goes_on_from=0),
    Life(4, Death.BETWEEN_STEPS, goes_on_from=-1),
    Life(100, Death.BETWEEN_STEPS),
)


def check_A_crashes(folder: Path, *, only: Chosen = _all) -> int:
    """A run in a fixed order that dies again and again, and goes on from old checkpoints: the ledger is its clock.

    Returns the number of releases.
    """
    found = 0
    for workers in (0, 2):
        sampler = FixedOrder(4, 18)
        setup = Setup(steps=23, public_n=18, sampler=sampler, workers=workers, relation=Relation.ZERO_OUT, lr=0.0)
        if not only(setup):
            continue
        apart = math.ceil(setup.public_n / sampler.batch_size)
        whole = _taken(setup.but(workers=0), folder)
        crashes = run_with_crashes(setup, LIVES, folder)
        if crashes.charges != setup.steps or not crashes.past:
            raise Violation("A", f"{crashes.charges} charges for {setup.steps} steps ({setup})")
        taken = np.zeros_like(whole)
        for past in crashes.past:
            np.add.at(taken[past.charges - 1], past.units, 1)
            if not np.array_equal(taken[past.charges - 1], whole[past.charges - 1]):
                what = f"charge {past.charges} paid for {past.units}, which have their turn at another"
                raise Violation("A", f"{what} ({setup})")
        most = max(float(taken[start : start + apart].sum(0).max()) for start in range(0, setup.steps, apart))
        if most > 1:
            raise Violation("A", f"a unit takes part {most:.0f} times in the steps of one event ({setup})")
        found += len(crashes.past)
    return found


# -------------------------------------------------------------------------------------------------------- V events


def documented_event(setup: Setup) -> tuple[accounting.Event, int]:
    """The event of a run, and how many steps it covers."""
    z, n = setup.noise.noise_multiplier, setup.public_n
    exact = isinstance(setup.mechanism, DiscreteGaussian)
    one = (accounting.DiscreteGaussian if exact else accounting.Gaussian)(noise_multiplier=z)
    match setup.sampler:
        case CyclicPoisson(sample_rate=q, groups=groups):
            return accounting.Poisson(sample_rate=q * groups, event=one), groups
        case WithoutReplacement(batch_size=size):
            return accounting.WithoutReplacement(batch_size=size, num_examples=n, event=one), 1
        case FixedOrder(batch_size=size):
            apart = math.ceil(n / size)
            if not isinstance(setup.mechanism, Correlated):
                return accounting.OnePass(event=one), apart
            sensitivity = sensitivity_of_strategy(setup)
            times = math.ceil(setup.steps / apart)
            matrix = accounting.MatrixMechanism(
                noise_multiplier=z * sensitivity,
                sensitivity=sensitivity,
                min_separation=apart,
                max_participations=times,
            )
            return matrix, setup.steps
    if setup.form == "loop" and setup.micro is not None:
        expected = setup.q * n
        cap = math.ceil(expected + 6 * math.sqrt(expected))
        return accounting.TruncatedPoisson(sample_rate=setup.q, cap=cap, max_examples=n, event=one), 1
    return accounting.Poisson(sample_rate=setup.q, event=one), 1


def check_V(folder: Path, *, only: Chosen = _all) -> int:
    """The event in the ledger against what happened, and what it says ε is. Returns the number of releases."""
    looked = 0
    for setup in members.REFUSED:
        if only(setup):
            trace = run(setup, honest(setup.subject, setup.public_n, setup.dtype), folder)
            refused = trace.error is not None and issubclass(trace.error, DpkitError | accounting.AccountingError)
            if not refused or trace.released or trace.charges:
                told = f"{trace.error}, {len(trace.released)} releases"
                raise Violation("V", f"a run that no theorem covers was not refused: {told} ({setup})")
    for setup in members.grid_V():
        if not only(setup):
            continue
        trace = run(setup, honest(setup.subject, setup.public_n, setup.dtype), folder, listen=True)
        expected = setup.steps if setup.stop_after is None else setup.stop_after
        if trace.error is not None or trace.plan is None or len(trace.released) != expected:
            raise Violation("V", f"the run ended early: {trace.message[:200]} ({setup})")
        if any(seen < number + 1 for number, seen in enumerate(trace.charges_seen)):
            raise Violation("V", f"a release was made before its charge was on the disk ({setup})")
        if len(set(trace.noise_keys)) != expected or trace.charges != expected:
            raise Violation("V", f"{trace.charges} charges, {expected} releases ({setup})")
        if not trace.refused_beyond:
            raise Violation("V", f"the ledger took more charges than the {setup.steps} planned ones ({setup})")
        _check_record(trace, setup)
        _check_participations(trace, setup)
        _check_multiplier(trace, setup)
        looked += expected
    return looked


def _check_record(trace: Trace, setup: Setup) -> None:
    """The plan in the ledger, and ε after each step."""
    assert trace.plan is not None
    event, covered = documented_event(setup)
    said, found = event.model_dump(), trace.plan.event.model_dump()
    close = said.keys() == found.keys() and all(
        math.isclose(found[key], value, rel_tol=1e-9) if isinstance(value, float) else found[key] == value
        for key, value in said.items()
    )
    if not close or trace.plan.steps_per_event != covered or trace.plan.steps != setup.steps:
        raise Violation("V", f"{trace.plan.event} is charged every {trace.plan.steps_per_event} steps ({setup})")
    taken = len(trace.released)
    for steps in {1, covered, covered + 1, taken} & set(range(1, taken + 1)):
        run_of_them = accounting.Repeated(event=trace.plan.event, count=math.ceil(steps / covered))
        wanted = accounting.epsilon(run_of_them, 1e-5, relation=setup.relation).upper
        if trace.stated_epsilons[steps - 1] != wanted:
            told = f"{trace.stated_epsilons[steps - 1]} after {steps} steps, the accountant says {wanted}"
            raise Violation("V", f"the run says epsilon is {told} ({setup})")
    if trace.epsilon != trace.stated_epsilons[-1]:
        raise Violation(
            "V", f"epsilon is {trace.epsilon} after the run and {trace.stated_epsilons[-1]} in it ({setup})"
        )


def _check_participations(trace: Trace, setup: Setup) -> None:
    """What one unit moves over the steps of one event, by its real participations, is what the event says."""
    event, covered = documented_event(setup)
    taken = np.zeros((setup.steps, setup.public_n))
    for step, units in enumerate(trace.asked):
        np.add.at(taken[step], units, 1)
    if isinstance(event, accounting.MatrixMechanism):
        moved = float(np.linalg.norm(np.abs(strategy(setup)) @ taken, axis=0).max())
        if moved > event.sensitivity * (1 + 1e-12):
            raise Violation("V", f"a unit moves the run by {moved:.9g}, charged is {event.sensitivity:.9g} ({setup})")
    elif covered > 1 or taken.max() > 1:
        most = max(float(taken[start : start + covered].sum(0).max()) for start in range(0, setup.steps, covered))
        if most > 1:
            raise Violation("V", f"a unit takes part {most:.0f} times in the steps of one event ({setup})")


def _check_multiplier(trace: Trace, setup: Setup) -> None:
    """The multiplier in the event is no larger than what noise and sensitivities amount to, all queries together.

    The noise of each group of the gradient is measured, and given what chance may have taken from it; that of the side
    questions, a few numbers, is taken as it is said to be, since check N looks at it.
    """
    assert trace.plan is not None
    white, groups = (
        strategy(setup)[: len(trace.released), : len(trace.released)],
        trace.clipped[0].queries[0].sensitivity,
    )
    measured: dict[int, float] = {}
    for group in groups:
        noise = np.stack(
            [
                flat(
                    {
                        name: (trace.released[step].value[name].double() - value.double()) / stds[0][group]
                        for name, value in trace.clipped[step].queries[0].value.items()
                        if trace.clipped[step].queries[0].groups[name] == group
                    }
                ).numpy()
                for step, stds in enumerate(trace.stds)
            ]
        )
        squares = float(((white @ noise) ** 2).sum())
        measured[group] = math.sqrt(squares / float(stats.chi2.ppf(FALSE_ALARM / len(groups), noise.size)))
    for step, clipped in enumerate(trace.clipped):
        costs = [
            (sensitivity / trace.stds[step][number][group] / (measured[group] if number == 0 else 1.0)) ** 2
            for number, query in enumerate(clipped.queries)
            for group, sensitivity in query.sensitivity.items()
        ]
        most = math.fsum(costs) ** -0.5 / sensitivity_of_strategy(setup)
        event, _ = documented_event(setup)
        # Of the same kind as the documented one: `_check_record` has compared them.
        charged: Any = trace.plan.event
        charged = charged if isinstance(event, accounting.MatrixMechanism) else charged.event
        z = charged.noise_multiplier / getattr(charged, "sensitivity", 1.0)
        if z > most * (1 + 1e-9):
            raise Violation("V", f"the noise has multiplier {most:.4f} at most, charged is {z:.4f} ({setup})")


def _check_A_with_crashes(folder: Path, *, only: Chosen = _all) -> None:
    check_A(folder, only=only)
    check_A_crashes(folder, only=only)


CHECKS: dict[str, Callable[..., object]] = {
    "D": check_D,
    "R": check_R_members,
    "N": check_N,
    "A": _check_A_with_crashes,
    "V": check_V,
}
