"""Bounds of a search against its exact law, over thousands of small mechanisms, laws, orders and both directions."""

from __future__ import annotations

import numpy as np
import pytest
from discrete_selection import (
    Vector,
    binned_gaussians,
    binomial,
    hockey_stick,
    log_moment,
    orders,
    poisson,
    random_base,
    selected,
    truncated_negative_binomial,
)

from accounting import selection
from accounting.events import BinomialTrials, PoissonTrials
from accounting.sampled_gaussian import ORDERS

LAWS = [
    (law, truncated_negative_binomial(law.shape, law.gamma))
    for shape in (-0.5, 0.0, 1.0, 4.0)
    for law in (selection.truncated_negative_binomial(mean, shape) for mean in (1.5, 10.0, 200.0))
]
LAWS += [(PoissonTrials(mean), poisson(mean)) for mean in (0.5, 5.0, 100.0)]
LAWS += [(BinomialTrials(*law), binomial(*law)) for law in ((1, 0.5), (3, 0.9), (20, 0.5), (1000, 0.02))]
EPSILONS = np.array([0.0, 0.01, 0.1, 0.5, 1.0, 1.5, 2.0, 4.0])
ROUNDING = 1e-12
"""Of the exact law, whose probabilities are differences of numbers up to 1."""


def compare(bases: list[tuple[Vector, Vector]], rolled: int) -> tuple[int, float]:
    """(comparisons, largest share of a bound that was attained with several trials).

    Every comparison is with the worse of both directions, and counts as two.
    """
    rng = np.random.default_rng(len(bases))
    done, attained = 0, 0.0
    for index, (p, q) in enumerate(bases):
        arranged = orders(rng, p, q, rolled)
        moments = np.array([log_moment(p, q, order) for order in ORDERS])
        for trials, phi in LAWS:
            released = selected(phi, p, arranged), selected(phi, q, arranged)
            bounds = selection.profile_deltas(trials, EPSILONS, lambda epsilon: float(hockey_stick(p, q, epsilon)))  # noqa: B023
            for epsilon, bound in zip(EPSILONS, bounds, strict=True):
                exact = hockey_stick(*released, epsilon)
                assert np.all(exact <= bound + ROUNDING), (index, trials, epsilon, exact.max(), bound)
                done += 2 * len(arranged)
                if selection.mean(trials) >= 5 and 1e-7 < bound < 0.5:
                    attained = max(attained, float(exact.max() / bound))
            bounds = selection.renyi_log_moments(trials, moments)
            for order, bound in list(zip(ORDERS, bounds, strict=True))[index % 7 :: 23]:
                exact = log_moment(*released, order)
                # Where an output is very rare, its share of the moment has lost its digits.
                digits = ROUNDING * order / min(released[0][released[0] > 0].min(), released[1][released[1] > 0].min())
                assert np.all(exact <= bound * (1 + 1e-9) + digits), (index, trials, order, exact.max(), bound)
                done += 2 * len(arranged)
    return done, attained


def some_bases(count: int, seed: int) -> list[tuple[Vector, Vector]]:
    rng = np.random.default_rng(seed)
    return [random_base(rng, outputs=int(rng.choice([2, 3, 6, 12]))) for _ in range(count)]


def test_no_small_search_leaks_more_than_its_bound():
    done, attained = compare(some_bases(2, seed=1), rolled=4)
    assert done >= 2000 and attained > 0.1


def test_no_search_over_gaussians_leaks_more_than_its_bound_and_some_leak_most_of_it():
    done, attained = compare([binned_gaussians(0.25, outputs=300)], rolled=60)
    assert done >= 2000 and attained > 0.5


@pytest.mark.slow
def test_none_of_many_searches_leaks_more_than_its_bound():
    done, _ = compare(some_bases(60, seed=2), rolled=8)
    assert done >= 100_000
    done, attained = compare([binned_gaussians(distance, outputs=300) for distance in (0.05, 0.5, 1.0)], rolled=100)
    assert done >= 100_000 and attained > 0.5
