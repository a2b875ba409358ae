"""The language of tests: never above the exact trade-off curve, near it, and a mu that gives its epsilon back."""

from __future__ import annotations

import math

import pytest
from scipy.stats import norm

from accounting import (
    ApproximateDP,
    Gaussian,
    InvalidParameter,
    Poisson,
    PureDP,
    Repeated,
    Unsupported,
    delta,
    epsilon,
    gaussian_mu,
    trade_off,
)
from accounting.trade_off import tangents

ALPHAS = (0.0, 1e-4, 0.01, 0.05, 0.2, 0.5, 0.9, 1.0)


@pytest.mark.parametrize("mu", [0.1, 1.0, 3.0])
def test_a_gaussian_has_its_exact_curve(mu):
    exact = [norm.cdf(norm.ppf(1 - alpha) - mu) for alpha in ALPHAS]
    found = trade_off(Gaussian(1 / mu), ALPHAS, relation="add_remove")
    assert all(beta <= truth + 1e-12 and beta >= truth - 2e-3 for beta, truth in zip(found, exact, strict=True)), list(
        zip(found, exact, strict=True)
    )


@pytest.mark.parametrize("mu", [0.05, 1.0, 5.0])
def test_tangents_come_near_the_curve_at_the_smallest_errors_that_are_asked_for(mu):
    alphas = [1e-6, 1e-4, 1e-2, 0.5, 0.999]
    found = tangents(Gaussian(1 / mu), relation="add_remove", least=1e-8, knots=200).at(alphas)
    exact = [norm.cdf(norm.isf(alpha) - mu) for alpha in alphas]
    assert all(0.99 * truth <= beta <= truth * (1 + 1e-12) for beta, truth in zip(found, exact, strict=True))


@pytest.mark.parametrize("least", [1e-3, 1e-8])
def test_a_delta_that_stays_leaves_the_knots_where_the_curve_bends(least):
    event, alphas = ApproximateDP(1.0, 0.01), (0.0, 1e-4, 0.01, 0.3, 0.7, 0.98)
    found = tangents(event, relation="add_remove", least=least).at(alphas)
    exact = [max(0.0, 0.99 - math.e * alpha, (0.99 - alpha) / math.e) for alpha in alphas]
    assert all(truth - 0.02 <= beta <= truth + 1e-9 for beta, truth in zip(found, exact, strict=True))


def test_pure_dp_has_the_curve_of_randomised_response():
    e = 2.718281828459045
    exact = [max(0.0, 1 - e * alpha, (1 - alpha) / e) for alpha in ALPHAS]
    found = trade_off(PureDP(1.0), ALPHAS, relation="add_remove")
    assert all(truth - 0.02 <= beta <= truth + 1e-9 for beta, truth in zip(found, exact, strict=True))


def test_no_test_of_a_sampled_run_is_better_than_the_curve():
    # Of one sampled step, the test "y > t" has errors Phi(-t) and (1-q) Phi(t) + q Phi(t - mu).
    rate, noise = 0.2, 0.7
    thresholds = (-1.0, 0.0, 1.0, 2.0, 3.0)
    alphas = [norm.sf(t) for t in thresholds]
    found = trade_off(Poisson(rate, Gaussian(noise)), alphas, relation="add_remove")
    for t, beta in zip(thresholds, found, strict=True):
        assert beta <= (1 - rate) * norm.cdf(t) + rate * norm.cdf(t - 1 / noise)
    assert found == sorted(found)


def test_more_steps_leave_fewer_errors():
    step = Poisson(0.01, Gaussian(1.0))
    one, many = (trade_off(Repeated(step, count), ALPHAS, relation="add_remove") for count in (10, 1000))
    assert all(after <= before + 1e-9 for before, after in zip(one, many, strict=True))


def test_the_mu_of_an_epsilon_gives_it_back():
    for mu in (0.05, 1.0, 6.0):
        found = epsilon(Gaussian(1 / mu), 1e-6, relation="add_remove").estimate
        assert gaussian_mu(found, 1e-6) == pytest.approx(mu, rel=1e-9)
        assert delta(Gaussian(1 / gaussian_mu(found, 1e-6)), found, relation="add_remove").estimate == pytest.approx(
            1e-6
        )


def test_bad_input_is_named():
    for alpha in (-0.1, 1.1, float("nan")):
        with pytest.raises(InvalidParameter, match="alphas"):
            trade_off(Gaussian(1.0), [alpha], relation="add_remove")
    with pytest.raises(Unsupported, match="replace_one"):
        trade_off(Poisson(0.1, Gaussian(1.0)), [0.1], relation="replace_one")
    with pytest.raises(InvalidParameter, match="delta"):
        gaussian_mu(1.0, 0.0)
    with pytest.raises(InvalidParameter, match="epsilon"):
        gaussian_mu(-1.0, 0.1)
