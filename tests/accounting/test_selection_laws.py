"""Laws of the number of trials: probabilities, means and the sampler against their definitions."""

from __future__ import annotations

import math

import mpmath
import numpy as np
import pytest
import scipy
from discrete_selection import binomial, poisson, truncated_negative_binomial

from accounting import selection
from accounting.errors import InvalidParameter, Unsupported
from accounting.events import BinomialTrials, PoissonTrials, TruncatedNegativeBinomial

LAWS = {
    "eta=-0.5": (TruncatedNegativeBinomial(-0.5, 0.05), truncated_negative_binomial(-0.5, 0.05)),
    "logarithmic": (TruncatedNegativeBinomial(0.0, 0.03), truncated_negative_binomial(0.0, 0.03)),
    "eta=1e-9": (TruncatedNegativeBinomial(1e-9, 0.03), truncated_negative_binomial(0.0, 0.03)),
    "eta=0.3": (TruncatedNegativeBinomial(0.3, 0.1), truncated_negative_binomial(0.3, 0.1)),
    "geometric": (TruncatedNegativeBinomial(1.0, 0.1), truncated_negative_binomial(1.0, 0.1)),
    "eta=4": (TruncatedNegativeBinomial(4.0, 0.3), truncated_negative_binomial(4.0, 0.3)),
    "poisson": (PoissonTrials(7.0), poisson(7.0)),
    "poisson, rare": (PoissonTrials(0.1), poisson(0.1)),
    "binomial": (BinomialTrials(20, 0.4), binomial(20, 0.4)),
    "one trial or none": (BinomialTrials(1, 0.9), binomial(1, 0.9)),
}


@pytest.mark.parametrize("name", LAWS)
def test_probabilities_have_the_generating_function_and_the_mean(name):
    trials, phi = LAWS[name]
    k = np.arange(2000)
    probabilities = np.array([selection.probability(trials, int(number)) for number in k])
    for z in (0.0, 0.3, 0.9, 1.0):
        assert np.sum(probabilities * z**k) == pytest.approx(float(phi(np.array(z))), rel=1e-7, abs=1e-12)
    assert np.sum(probabilities * k) == pytest.approx(selection.mean(trials), rel=1e-8)


@pytest.mark.parametrize(("shape", "gamma"), [(-0.9, 0.2), (-0.5, 1e-6), (0.5, 0.3), (2.0, 0.999), (30.0, 0.4)])
def test_truncated_probabilities_are_the_products_of_the_definition(shape, gamma):
    trials = TruncatedNegativeBinomial(shape, gamma)
    for k in (1, 2, 5, 40):
        with mpmath.workdps(30):
            product = mpmath.fprod((mpmath.mpf(shape) + j) / (1 + j) for j in range(k))
            expected = (1 - mpmath.mpf(gamma)) ** k / (mpmath.mpf(gamma) ** -shape - 1) * product
        assert selection.probability(trials, k) == pytest.approx(float(expected), rel=1e-10)
    assert selection.probability(trials, 0) == selection.probability(trials, -1) == 0


@pytest.mark.parametrize("shape", [-0.9, -0.5, 0.0, 1e-12, 0.5, 1.0, 4.0, 1e4])
@pytest.mark.parametrize("mean", [1.0, 1.0001, 3.0, 10.0, 1000.0, 1e6])
def test_gamma_has_the_mean_that_was_asked_for(shape, mean):
    trials = selection.truncated_negative_binomial(mean, shape)
    with mpmath.workdps(400):  # gamma down to 1e-60
        eta, gamma = mpmath.mpf(shape), mpmath.mpf(trials.gamma)
        factor = eta / (1 - gamma**eta) if shape else 1 / mpmath.log(1 / gamma)
        expected = float(factor * (1 - gamma) / gamma)
    assert expected == pytest.approx(mean, rel=1e-11)
    assert selection.mean(trials) == pytest.approx(expected, rel=1e-12)


def test_named_laws_are_shapes_zero_and_one():
    assert selection.logarithmic(5.0) == selection.truncated_negative_binomial(5.0, 0.0)
    assert selection.geometric(5.0).gamma == pytest.approx(0.2, rel=1e-14)


@pytest.mark.parametrize("name", LAWS)
def test_the_sampler_follows_the_law(name):
    """Chi-square over numbers expected at least 20 times; false alarm 1e-9 per law."""
    trials, _ = LAWS[name]
    rng, draws = np.random.default_rng(7), 20_000
    counts = np.bincount([selection.sample(trials, rng) for _ in range(draws)], minlength=400)
    expected = draws * np.array([selection.probability(trials, k) for k in range(len(counts))])
    often = expected >= 20
    rest = draws - counts[often].sum(), max(draws - expected[often].sum(), 1e-9)
    statistic = np.sum((counts[often] - expected[often]) ** 2 / expected[often])
    freedom = int(often.sum()) - 1
    if rest[1] >= 20:
        statistic, freedom = statistic + (rest[0] - rest[1]) ** 2 / rest[1], freedom + 1
    assert scipy.stats.chi2.sf(statistic, freedom) > 1e-9
    assert counts[0] == 0 or selection.probability(trials, 0) > 0


@pytest.mark.parametrize(
    ("mean", "shape", "said"),
    [
        (0.99, 1.0, "mean = 0.99"),
        (0.0, 1.0, "mean = 0.0"),
        (math.nan, 1.0, "mean = nan"),
        (math.inf, 1.0, "mean = inf"),
        ("10", 1.0, "mean = '10'"),
        (True, 1.0, "mean = True"),
        (10.0, -1.0, "shape = -1.0"),
        (10.0, math.nan, "shape = nan"),
        (1e9, -0.99, "mean = 1e+09"),
    ],
)
def test_impossible_laws_are_refused_by_name(mean, shape, said):
    with pytest.raises(InvalidParameter, match="must be|no gamma") as refused:
        selection.truncated_negative_binomial(mean, shape)
    assert said in str(refused.value)


@pytest.mark.parametrize("function", [selection.mean, lambda n: selection.probability(n, 3), selection.sample])
@pytest.mark.parametrize("trials", [20, 20.0, "20", None])
def test_a_fixed_number_of_trials_is_no_law(function, trials):
    arguments = (trials, np.random.default_rng(0)) if function is selection.sample else (trials,)
    with pytest.raises(Unsupported, match=r"full_composition\(event, count\)"):
        function(*arguments)


def test_a_number_of_trials_beyond_all_integers_is_refused():
    with pytest.raises(InvalidParameter, match="no machine"):
        selection.sample(TruncatedNegativeBinomial(1.0, 1e-30), np.random.default_rng(0))
