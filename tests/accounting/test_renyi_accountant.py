"""Renyi accounting against brute-force integrals, two libraries and the reference table."""

from __future__ import annotations

import json
import warnings
from pathlib import Path

import mpmath
import numpy as np
import pytest

from accounting import Gaussian, Poisson, Relation, Repeated, epsilon
from accounting.rdp import step_log_moment
from accounting.sampled_gaussian import FRACTIONAL, INTEGER, ORDERS, log_moment_excess

CASES = json.loads((Path(__file__).parent / "reference_epsilons.json").read_text())["cases"]


def name_of(case):
    return f"{case['noise_multiplier']}-{case['sample_rate']:.4g}-{case['steps']}-{case['delta']}"


def integrated_excess(noise: float, rate: float, order: float, *, remove: bool) -> mpmath.mpf:
    """A(order) - 1 to 25 digits: E_Q[(P/Q)^order] - 1, or with the roles of P and Q exchanged."""
    with mpmath.workdps(25):
        noise, rate, order = mpmath.mpf(noise), mpmath.mpf(rate), mpmath.mpf(order)
        power = order if remove else 1 - order

        def integrand(z):
            ratio = 1 - rate + rate * mpmath.exp(z / noise - 1 / (2 * noise**2))
            return mpmath.npdf(z) * ratio**power

        centre = order / noise
        points = sorted({start + step for start in (0, centre) for step in mpmath.linspace(-12, 12, 9)})
        return mpmath.quad(integrand, points) - 1


@pytest.mark.parametrize(
    ("noise", "rate"), [(1.0, 0.01), (0.4, 0.1), (0.25, 0.001), (2.0, 0.5), (20.0, 0.05), (1.0, 0.9), (5.0, 1e-4)]
)
@pytest.mark.parametrize("order", [1.01, 2, 2.75, 24])
def test_a_moment_is_never_below_its_integral_and_hardly_above(noise, rate, order):
    index = int(np.flatnonzero(order == ORDERS)[0])
    ours = mpmath.exp(float(log_moment_excess(noise, rate)[index]))
    true = integrated_excess(noise, rate, order, remove=True)
    assert true <= ours * (1 + mpmath.mpf(10) ** -14) + mpmath.mpf(10) ** -21
    assert ours <= true * (1 + 1e-6) + mpmath.mpf(10) ** -21
    # The other direction is smaller, so that one moment covers both.
    assert integrated_excess(noise, rate, order, remove=False) <= ours


def test_small_noise_uses_chords_that_lie_above_the_integral():
    log_moments = step_log_moment(Poisson(0.01, Gaussian(0.05)), Relation.ADD_REMOVE)
    for order in (1.5, 2.75):
        true = mpmath.log(1 + integrated_excess(0.05, 0.01, order, remove=True))
        assert true <= log_moments[int(np.flatnonzero(order == ORDERS)[0])]


@pytest.mark.parametrize(("noise", "rate"), [(1.1, 0.004), (0.5, 0.2), (30.0, 0.01), (0.8, 1.0)])
def test_divergences_match_opacus_and_dp_accounting_at_shared_orders(noise, rate):
    analysis = pytest.importorskip("opacus.accountants.analysis.rdp")
    shared = [order for order in (*np.round(np.arange(1.1, 10.9, 0.1), 4), *range(12, 64)) if order in ORDERS]
    places = np.searchsorted(ORDERS, shared)
    ours = step_log_moment(Poisson(rate, Gaussian(noise)), Relation.ADD_REMOVE)[places] / (ORDERS[places] - 1)
    opacus = analysis.compute_rdp(q=rate, noise_multiplier=noise, steps=1, orders=shared)
    np.testing.assert_allclose(ours, opacus, rtol=1e-6, atol=1e-13)

    rdp = pytest.importorskip("dp_accounting.rdp")
    from dp_accounting import GaussianDpEvent, PoissonSampledDpEvent

    theirs = rdp.RdpAccountant(orders=shared)
    theirs.compose(PoissonSampledDpEvent(rate, GaussianDpEvent(noise)))
    whole = np.array([order == int(order) for order in shared])
    np.testing.assert_allclose(ours[whole], theirs._rdp[whole], rtol=1e-6, atol=1e-13)
    # Between integers dp_accounting gives an upper bound, at small noise even infinity.
    assert np.all(ours <= theirs._rdp * (1 + 1e-6) + 1e-13)


@pytest.mark.parametrize("case", CASES, ids=name_of)
def test_reference_cases_are_never_below_the_truth_nor_looser_than_the_reference_rdp(case):
    event = Repeated(Poisson(case["sample_rate"], Gaussian(case["noise_multiplier"])), case["steps"])
    bound = epsilon(event, case["delta"], relation="add_remove", by="rdp" if case["sample_rate"] < 1 else None)
    assert bound.upper >= case["epsilon_lower"]
    assert bound.upper <= case["rdp_upper"] + 1e-6


def test_orders_reach_from_next_to_one_to_ten_thousand():
    assert ORDERS[0] < 1.01 and ORDERS[-1] == 1e4
    assert np.all(np.diff(ORDERS) > 0) and len(ORDERS) == len(FRACTIONAL) + len(INTEGER)


@pytest.mark.parametrize("noise", [1e-90, 1e-6, 0.03, 0.2, 1e4, 1e90])
@pytest.mark.parametrize("rate", [1e-300, 1e-9, 0.5, 1 - 1e-15])
def test_extreme_parameters_give_finite_moments_without_a_warning(noise, rate):
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        moments = step_log_moment(Poisson(rate, Gaussian(noise)), Relation.ZERO_OUT)
    assert np.all(np.isfinite(moments)) and np.all(moments >= 0)
    # log A(alpha) / (alpha - 1) grows with alpha.
    assert np.all(np.diff(moments / (ORDERS - 1)) >= -1e-6 * (moments / (ORDERS - 1))[1:] - 1e-12)


def test_high_privacy_has_no_floor_at_sixty_three_orders():
    assert epsilon(Repeated(Poisson(0.01, Gaussian(50.0)), 1000), 1e-5, relation="add_remove").upper < 0.035
