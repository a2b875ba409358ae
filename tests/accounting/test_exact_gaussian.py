"""The exact Gaussian against numerical integrals, closed forms and extremes."""

from __future__ import annotations

import json
import math
from pathlib import Path

import mpmath
import pytest

from accounting import Composed, Gaussian, Relation, Repeated, delta, epsilon
from accounting.gaussian import delta_bounds, epsilon_bounds

CASES = json.loads((Path(__file__).parent / "reference_epsilons.json").read_text())["cases"]


def integrated_delta(mu: float, eps: float) -> float:
    """Integral of max(0, N(mu, 1) - e^eps N(0, 1)) to 40 digits."""
    with mpmath.workdps(40):
        mu, eps = mpmath.mpf(mu), mpmath.mpf(eps)
        threshold = eps / mu + mu / 2
        size = mpmath.npdf(threshold, mu, 1)  # quad stops at an absolute error

        def gap(x):
            return (mpmath.npdf(x, mu, 1) - mpmath.exp(eps) * mpmath.npdf(x)) / size

        return float(size * mpmath.quad(gap, [threshold + step for step in (0, 0.1, 0.3, 1, 3, 10, 50)]))


@pytest.mark.parametrize("mu", [0.01, 0.3, 1.0, 4.0, 12.0])
@pytest.mark.parametrize("eps", [0.0, 0.1, 1.0, 5.0, 30.0])
def test_delta_brackets_the_integral(mu, eps):
    lower, estimate, upper = delta_bounds(mu, eps)
    truth = integrated_delta(mu, eps)
    assert lower <= truth * (1 + 1e-13) and truth * (1 - 1e-13) <= upper
    if truth > 1e-250:
        assert upper <= lower * (1 + 1e-9) and estimate == pytest.approx(truth, rel=1e-9)


@pytest.mark.parametrize("mu", [1e-3, 0.2, 1.0, 7.0, 40.0])
@pytest.mark.parametrize("d", [0.3, 1e-5, 1e-12, 1e-100])
def test_epsilon_at_delta_is_the_least_with_that_delta(mu, d):
    lower, estimate, upper = epsilon_bounds(mu, d)
    assert 0 <= lower <= estimate <= upper <= lower * (1 + 1e-8) + 1e-12
    assert integrated_delta(mu, upper) <= d * (1 + 1e-12)
    assert upper == 0 or integrated_delta(mu, max(0.0, upper * (1 - 1e-6) - 1e-9)) >= d * (1 - 1e-12)


@pytest.mark.parametrize("case", [c for c in CASES if c["sample_rate"] == 1], ids=lambda c: str(c["noise_multiplier"]))
def test_full_batch_reference_cases_are_met_exactly(case):
    event = Repeated(Gaussian(case["noise_multiplier"]), case["steps"])
    for relation in Relation:
        bound = epsilon(event, case["delta"], relation=relation)
        assert bound.accountant == "gaussian"
        assert bound.upper == pytest.approx(case["epsilon_exact"], abs=1e-6)
        assert case["epsilon_lower"] <= bound.upper <= case["epsilon_upper"]


def test_composition_is_the_root_of_summed_squares():
    apart = Composed((Repeated(Gaussian(3.0), 9), Gaussian(1.0)))
    joint = Gaussian(math.sqrt(0.5))
    assert epsilon(apart, 1e-6, relation="add_remove").upper == pytest.approx(
        epsilon(joint, 1e-6, relation="add_remove").upper, rel=1e-13
    )


@pytest.mark.parametrize("noise", [1e-90, 1e-8, 1e8, 1e90])
@pytest.mark.parametrize("d", [1e-300, 1e-5, 1 - 1e-12])
def test_extremes_give_numbers_never_nan(noise, d):
    bound = epsilon(Repeated(Gaussian(noise), 10**6), d, relation="add_remove")
    assert 0 <= bound.lower <= bound.upper < math.inf


def test_delta_and_epsilon_undo_each_other():
    event = Repeated(Gaussian(4.0), 10)
    eps = epsilon(event, 1e-7, relation="add_remove").upper
    assert delta(event, eps, relation="add_remove").upper == pytest.approx(1e-7, rel=1e-8)
