"""Epsilon on a grid of 700 settings: noise 0.2..200, rate 1e-5..1, steps 1..1e6, delta 1e-4..1e-12.

Every point is held against something that this package had no hand in:

    whole batches (q = 1)     exact Gaussian, 40 digits                              140 points
    one step (T = 1)          closed form of both directions                         112 points
    all others                the better of two tests on the outputs: a bound        448 points, and
      where many are drawn    the inverted transform: the truth, to 1e-8             about 270 of them
      elsewhere               prv-accountant's lower end, where it is sound (delta
                              at least 1e-9, at most 30,000 steps, right mean)       about 40 of them

Tests on outputs (``lower_bounds.py``) hold everywhere but may miss two fifths of the truth.  Where nothing closer is
independent (few draws with tiny delta or very many steps), how close epsilon is to the truth rests on our own lower
bound.  The slow test prints how many points each of them decides.
"""

from __future__ import annotations

import itertools
import math
import statistics
import warnings
from collections import Counter
from collections.abc import Iterator
from functools import cache
from typing import NamedTuple

import numpy as np
import pytest
from inversion import log_delta, mean_loss
from lower_bounds import gaussian_delta, gaussian_epsilon, one_step_delta, sum_test, threshold_test

from accounting import Bound, Composed, Gaussian, Poisson, Repeated, epsilon

NOISES = (0.2, 0.5, 1.0, 2.0, 5.0, 20.0, 200.0)
RATES = (1e-5, 1e-3, 0.01, 0.1, 1.0)
STEPS = (1, 10, 1000, 30_000, 1_000_000)
DELTAS = (1e-4, 1e-6, 1e-9, 1e-12)
FULL = (NOISES, RATES, STEPS, DELTAS)
THIN = ((0.2, 1.0, 20.0), (1e-3, 0.1, 1.0), (1, 1000, 1_000_000), (1e-6, 1e-12))


class Point(NamedTuple):
    noise: float
    rate: float
    steps: int
    delta: float


@cache
def found(point: Point) -> Bound:
    event = Repeated(Poisson(point.rate, Gaussian(point.noise)), point.steps)
    return epsilon(event, point.delta, relation="add_remove")


def slack(value: float) -> float:
    return max(1e-3, 1e-3 * value)


def is_sane(bound: Bound) -> bool:
    return 0 <= bound.lower <= bound.estimate <= bound.upper < math.inf


def is_exact(point: Point) -> bool:
    """The closed form holds at ``upper``, and not just below it; the other way round at ``lower``."""
    bound = found(point)

    def true_delta(epsilon: float) -> float:
        if point.rate == 1:
            return gaussian_delta(math.sqrt(point.steps) / point.noise, epsilon)
        return one_step_delta(point.noise, point.rate, epsilon)

    rounding = 1e-9 * max(1.0, bound.upper)  # in epsilon, and at most this share of delta
    sound = true_delta(bound.upper) <= point.delta * (1 + rounding)
    tight = bound.upper <= rounding or true_delta(bound.upper - rounding) >= point.delta
    return sound and tight and (bound.lower == 0 or true_delta(bound.lower) >= point.delta * (1 - rounding))


@cache
def prv_accountant(
    noise: float, rate: float, steps: int, deltas: tuple[float, ...]
) -> dict[float, tuple[float, float]]:
    """prv-accountant's interval for each delta in its range; empty where it is not installed, not sound, or fails."""
    deltas = tuple(delta for delta in deltas if delta >= 1e-9)
    if steps > 100_000 or np.finfo(np.longdouble).eps > 1e-18:
        return {}
    try:
        from prv_accountant import PRVAccountant
        from prv_accountant.accountant import compute_safe_domain_size
        from prv_accountant.privacy_random_variables import PoissonSubsampledGaussianMechanism
    except ImportError:
        return {}
    variable = PoissonSubsampledGaussianMechanism(sampling_probability=rate, noise_multiplier=noise)
    delta_error = min(deltas) / 1000
    with warnings.catch_warnings(), np.errstate(all="ignore"):
        warnings.simplefilter("ignore")
        try:
            width = 2 * compute_safe_domain_size([variable], [steps], eps_error=0.01, delta_error=delta_error)
            eps_error = max(0.005, width * math.sqrt(steps / 2 * math.log(12 / delta_error)) / 2**19)
            if eps_error > 1:
                return {}
            composed = PRVAccountant([variable], eps_error, delta_error, [steps]).compute_composition([steps])
            if abs(composed.domain.ts() @ composed.pmf - steps * mean_loss(noise, rate)) > eps_error / 4:
                return {}  # its quadrature went wrong, and its interval with it
            intervals = {delta: composed.compute_epsilon(delta, delta_error, eps_error) for delta in deltas}
        except (RuntimeError, ValueError, MemoryError, OverflowError):
            return {}
    return {delta: (low, high) for delta, (low, _, high) in intervals.items()}


def check(noises, rates, steps, deltas) -> str:
    """Every law at every point of the grid; a table of what decided."""
    points = [Point(*numbers) for numbers in itertools.product(noises, rates, steps, deltas)]
    assert not [(point, found(point)) for point in points if not is_sane(found(point))]
    closed = [point for point in points if 1 in (point.rate, point.steps)]
    assert not [(point, found(point)) for point in closed if not is_exact(point)]
    assert not list(falling(points))

    decided = Counter("whole batches" if point.rate == 1 else "one step" for point in closed)
    below, between = [], []
    for point in points:
        if point in closed:
            continue
        bound = found(point)
        between.append((bound.upper - bound.lower) / max(bound.upper, 1e-2))
        independent = {"tests on outputs": max(sum_test(*point), threshold_test(*point))}
        most = gaussian_epsilon(math.sqrt(point.steps) / point.noise, point.delta)  # sampling costs no more than none
        true = is_true(point)
        if not true and (theirs := prv_accountant(*point[:3], deltas).get(point.delta)):
            independent["prv-accountant"], most = max(0.0, theirs[0]), min(most, theirs[1])
        kind = max(independent, key=independent.__getitem__)
        assert independent[kind] <= bound.upper, (point, bound, independent)
        assert bound.lower <= most * (1 + 1e-9) + 1e-12, (point, bound, most)
        decided["inverted transform" if true else kind] += 1
        if not true:
            below.append(independent[kind] / bound.upper if bound.upper else 1.0)

    assert sum(decided.values()) == len(points)
    # Of the rest, most are runs of a million steps with an epsilon in the hundreds or more, or with next to no draws.
    assert sum(gap <= 0.01 for gap in between) >= 0.9 * len(between)
    lines = [f"{kind}: {number} points" for kind, number in sorted(decided.items())]
    if below:
        lines.append(f"lower bounds that decided, as a share of epsilon: median {statistics.median(below):.3f}")
    lines += [
        f"own bounds within {x:g}: {sum(gap <= x for gap in between)} of {len(between)}" for x in (1e-3, 1e-2, 0.1)
    ]
    return "\n".join(lines)


def is_true(point: Point) -> bool:
    """Checks ``upper`` and ``lower`` against the inverted transform; False where that does not settle."""
    bound, target = found(point), math.log(point.delta)
    if point.steps * point.rate < 0.1 or bound.lower < 1e-9:
        return False
    at_upper, at_lower = (log_delta(*point[:3], at) for at in (bound.upper, bound.lower))
    if at_upper is None or at_lower is None:
        return False
    assert at_upper <= target + 1e-7, (point, bound, at_upper - target)
    assert at_lower >= target - 1e-7, (point, bound, at_lower - target)
    added = log_delta(*point[:3], bound.upper, added=True)
    assert added is None or added <= target + 1e-7, (point, bound, added - target)
    return True


def falling(points: list[Point]) -> Iterator[tuple[Point, Point]]:
    """Neighbours on the grid between which epsilon moves the wrong way by more than its slack."""
    for axis, rising in enumerate((False, True, True, False)):

        def others(point: Point, axis=axis) -> tuple[float, ...]:
            return point[:axis] + point[axis + 1 :]

        for _, row in itertools.groupby(sorted(points, key=lambda p: (others(p), p[axis])), key=others):
            for low, high in itertools.pairwise(row):
                less, more = (low, high) if rising else (high, low)
                if found(less).upper > found(more).upper + slack(found(more).upper):
                    yield less, more


def test_a_thinned_grid_keeps_every_law():
    assert check(*THIN)


@pytest.mark.slow
def test_the_full_grid_keeps_every_law():
    table = check(*FULL)
    print(table)
    assert math.prod(len(axis) for axis in FULL) == 700
    assert "whole batches: 140 points" in table and "one step: 112 points" in table


@pytest.mark.parametrize(
    "point", [Point(0.8, 0.01, 60, 1e-6), Point(3.0, 0.2, 60, 1e-11), Point(0.3, 1e-3, 60, 1e-9)], ids=str
)
def test_counts_are_repetitions_and_order_does_not_matter(point):
    noise, rate, steps, delta = point
    one, other = Poisson(rate, Gaussian(noise)), Poisson(rate / 2, Gaussian(2 * noise))

    def upper(event) -> float:
        return epsilon(event, delta, relation="add_remove").upper

    whole = upper(Repeated(one, steps))
    assert upper(Composed((one,) * steps)) == whole
    assert upper(Repeated(Repeated(one, steps // 4), 4)) == whole
    assert upper(Composed((Repeated(one, steps - 7), Repeated(one, 7)))) == whole
    mixed = Composed((Repeated(one, steps), Repeated(other, steps)))
    assert upper(mixed) == pytest.approx(upper(Composed((Repeated(other, steps), Repeated(one, steps)))), rel=1e-6)
    assert upper(Repeated(Composed((other, one)), steps)) == pytest.approx(upper(mixed), rel=1e-6)
    assert whole <= upper(mixed) + slack(whole)
