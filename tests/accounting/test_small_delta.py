"""Small delta, where the rounding of a Fourier transform in double precision makes epsilon too small.

The table holds settings at which opacus' PRV accountant or dp-accounting's PLD accountant report less than the truth
(measured with opacus 1.6.0 and dp-accounting 0.6.0).
"""

from __future__ import annotations

import itertools
import math

import pytest
from lower_bounds import gaussian_delta, gaussian_epsilon, sum_test

from accounting import Gaussian, Poisson, Repeated, delta, epsilon

ALMOST_ALL = 0.9999999  # sampled for the accountants, yet next to the exact Gaussian
TABLE = [
    # noise, rate, steps, delta, the truth to the digits given
    (100.0, 1.0, 10_000, 1e-12, 7.23849, 7.23849),
    (30.0, 1.0, 3000, 1e-12, 14.10065, 14.10065),
    (300.0, 1.0, 100_000, 1e-10, 6.93819, 6.93819),
    (300.0, 1.0, 100_000, 1e-11, 7.31089, 7.31089),
    (100.0, 1.0, 100_000, 1e-10, 24.56966, 24.56966),
    (100.0, 1.0, 100_000, 1e-11, 25.67090, 25.67090),
    (2.0, 0.05, 5000, 1e-12, 14.92409, 14.92496),
    (1.0, 0.01, 10_000, 1e-12, 10.34607, 10.34698),
]
FAMILIES = [(100.0, 10_000), (30.0, 3000), (300.0, 100_000), (100.0, 100_000)]  # noise, steps
DELTAS = [1e-9, 1e-10, 1e-11, 1e-12, 1e-13, 1e-14]
TINY = [1e-30, 1e-100]
HALF_A_DIGIT = 5e-6


def run(noise, rate, steps):
    return Repeated(Poisson(rate, Gaussian(noise)), steps)


def slack(truth):
    return max(1e-3, 1e-3 * truth)


@pytest.mark.parametrize(("noise", "rate", "steps", "d", "low", "high"), TABLE)
def test_where_other_libraries_report_too_little(noise, rate, steps, d, low, high):
    found = epsilon(run(noise, rate, steps), d, relation="add_remove")
    assert low - HALF_A_DIGIT <= found.upper <= high + slack(high)
    assert found.lower <= high + HALF_A_DIGIT
    at = delta(run(noise, rate, steps), low - HALF_A_DIGIT, relation="add_remove")
    assert at.upper >= d * (1 - 1e-9) and at.lower <= 1.01 * d


@pytest.mark.parametrize("d", [*DELTAS, *TINY])
@pytest.mark.parametrize(("noise", "steps"), FAMILIES)
def test_without_sampling_the_answer_is_exact_at_any_delta(noise, steps, d):
    truth = gaussian_epsilon(math.sqrt(steps) / noise, d)
    found = epsilon(run(noise, 1.0, steps), d, relation="add_remove")
    assert found.lower <= truth * (1 + 1e-12) and truth * (1 - 1e-12) <= found.upper <= truth * (1 + 1e-9)


@pytest.mark.parametrize("d", [*DELTAS, *TINY])
@pytest.mark.parametrize(("noise", "steps"), FAMILIES)
def test_sampling_nearly_everything_costs_nearly_the_exact_epsilon(noise, steps, d):
    exact = gaussian_epsilon(math.sqrt(steps) / noise, d)
    below = sum_test(noise, ALMOST_ALL, steps, d)
    assert exact * (1 - 1e-3) <= below <= exact  # the oracle itself: a lower bound of nearly the same run
    found = epsilon(run(noise, ALMOST_ALL, steps), d, relation="add_remove")
    assert below <= found.upper <= exact + slack(exact)
    assert found.lower <= exact


@pytest.mark.parametrize("d", [*DELTAS, *TINY])
@pytest.mark.parametrize(("noise", "steps"), FAMILIES)
def test_delta_of_nearly_everything_brackets_the_exact_delta(noise, steps, d):
    mu = math.sqrt(steps) / noise
    below, exact = sum_test(noise, ALMOST_ALL, steps, d), gaussian_epsilon(mu, d)
    assert delta(run(noise, ALMOST_ALL, steps), below, relation="add_remove").upper >= d * (1 - 1e-9)
    at = delta(run(noise, ALMOST_ALL, steps), exact, relation="add_remove")
    assert at.lower <= gaussian_delta(mu, exact) * (1 + 1e-9) and at.upper <= 1.05 * d


@pytest.mark.parametrize(("noise", "rate", "steps"), sorted({row[:3] for row in TABLE}))
def test_epsilon_grows_without_a_jump_as_delta_falls(noise, rate, steps):
    exponents = [4, 6, 8, 9, 10, 11, 12, 13, 14, 15, 16, 18, 20, 25, 30, 50, 70, 100]
    found = [epsilon(run(noise, rate, steps), 10.0**-k, relation="add_remove").upper for k in exponents]
    rises = [(b - a) / (j - i) for a, b, i, j in zip(found, found[1:], exponents, exponents[1:], strict=False)]
    assert all(rise > 0 for rise in rises)
    # -log delta is convex in epsilon out here: the price of another factor of ten falls (but for the slack of each).
    assert all(b <= a + 2 * slack(found[-1]) for a, b in itertools.pairwise(rises))
