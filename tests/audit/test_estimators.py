"""Lower bounds from independent scores: their arithmetic, how often they are too high, and how high they come."""

from __future__ import annotations

import math

import numpy as np
import pytest
from scipy import integrate, optimize
from scipy.stats import beta, binom, binomtest, norm

import accounting
from accounting import (
    ApproximateDP,
    Composed,
    DiscreteGaussian,
    Gaussian,
    Laplace,
    Poisson,
    PureDP,
    Relation,
    Repeated,
    Unsupported,
)
from accounting.events import OnePass, Select, TruncatedNegativeBinomial, TruncatedPoisson, WithoutReplacement
from accounting.trade_off import tangents
from dpkit.audit.estimators import clopper_pearson, family_inversion, gaussian_dp, rank_test
from dpkit.audit.scaling import scaled
from dpkit.audit.thresholds import Bonferroni, Explicit, Split, clopper_pearson_upper, error_rates
from dpkit.errors import InvalidArgument

ADD_REMOVE = Relation.ADD_REMOVE
AUDITS, ALPHA = 400, 0.05
# If every audit goes wrong with probability 0.05, more than this many do with probability below 1e-6.
MOST_WRONG = int(binom.isf(1e-6, AUDITS, ALPHA))
STRATEGIES = (Explicit(0.5), Split(), Bonferroni())


def family(event):
    return lambda scale: scaled(event, scale)


def gaussian_scores(draw, mu, size):
    return draw.normal(mu, 1, size), draw.normal(0, 1, size)


def log_ratios(draw, event, audits, size, *, inside):
    """Log-likelihood ratios of sampled Gaussian steps, one row for each audit."""
    rate, noise, steps = event.event.sample_rate, event.event.event.noise_multiplier, event.count
    total = np.zeros((audits, size))
    for _ in range(steps):
        drawn = draw.random((audits, size)) < rate if inside else 0.0
        seen = drawn + noise * draw.standard_normal((audits, size))
        total += np.log1p(rate * np.expm1((2 * seen - 1) / (2 * noise**2)))
    return total


# --------------------------------------------------------------------------------------------------- the arithmetic


@pytest.mark.parametrize("alpha", [0.4, 0.025, 1e-6])
def test_the_upper_bound_of_a_rate_is_that_of_the_exact_binomial_test(alpha):
    for successes, trials in ((0, 1), (1, 1), (0, 50), (3, 50), (50, 50), (700, 20_000)):
        # A two-sided interval has alpha on each side.
        exact = binomtest(successes, trials).proportion_ci(1 - 2 * alpha, method="exact").high
        assert clopper_pearson_upper(successes, trials, alpha) == pytest.approx(exact, rel=1e-6)


def test_counts_and_rates_are_those_of_the_threshold():
    inside, outside = np.array([0.0, 1, 1, 2, 3]), np.array([0.0, 0, 1, 2])
    [rates] = error_rates(inside, outside, confidence=0.9, threshold=Explicit(1.0), objective=max)
    assert (rates.false_positives, rates.outside, rates.false_negatives, rates.inside) == (2, 4, 1, 5)


def upper(successes, trials, alpha):
    return binomtest(int(successes), int(trials)).proportion_ci(1 - 2 * alpha, method="exact").high


def test_what_chose_the_threshold_is_not_counted():
    inside, outside = np.arange(100.0), np.arange(40.0)
    [rates] = error_rates(inside, outside, confidence=0.9, threshold=Split(0.25), objective=lambda a, b: -a - b)
    assert (rates.inside, rates.outside) == (75, 30)
    assert rates.false_positive_rate_upper == pytest.approx(upper(rates.false_positives, 30, 0.05), rel=1e-6)
    assert rates.false_negative_rate_upper == pytest.approx(upper(rates.false_negatives, 75, 0.05), rel=1e-6)


def test_several_thresholds_share_the_risk_at_ranks_that_the_scores_do_not_choose():
    draw = np.random.default_rng(13)
    ranks = []
    for inside, outside in ((draw.normal(size=200), draw.normal(size=150)), (np.ones(200), draw.exponential(size=150))):
        found = error_rates(inside, outside, confidence=0.9, threshold=Bonferroni(10), objective=max)
        assert 5 <= len(found) <= 10
        for rates in found:
            assert rates.threshold == np.sort(inside)[rates.false_negatives]
            assert rates.false_positives == np.sum(outside >= rates.threshold)
            alpha = 0.05 / len(found)
            assert rates.false_positive_rate_upper == pytest.approx(upper(rates.false_positives, 150, alpha), rel=1e-6)
            assert rates.false_negative_rate_upper == pytest.approx(upper(rates.false_negatives, 200, alpha), rel=1e-6)
        ranks.append([rates.false_negatives for rates in found])
    assert ranks[0] == ranks[1]


def test_clopper_pearson_is_the_closed_form():
    inside, outside = np.repeat([0.0, 1.0], [20, 80]), np.repeat([0.0, 1.0], [97, 3])
    found = clopper_pearson(inside, outside, delta=1e-3, threshold=Explicit(1.0))
    alarms, misses = (binomtest(k, 100).proportion_ci(0.95, method="exact").high for k in (3, 20))
    expected = max(math.log((1 - misses - 1e-3) / alarms), math.log((1 - alarms - 1e-3) / misses))
    assert found.epsilon == pytest.approx(expected, rel=1e-6)
    assert (found.details["false_positives"], found.details["false_negatives"]) == (3, 20)


def test_gaussian_dp_is_the_closed_form():
    inside, outside = np.repeat([0.0, 1.0], [20, 80]), np.repeat([0.0, 1.0], [97, 3])
    found = gaussian_dp(inside, outside, delta=1e-3, threshold=Explicit(1.0))
    alarms, misses = (binomtest(k, 100).proportion_ci(0.95, method="exact").high for k in (3, 20))
    mu = norm.isf(alarms) - norm.ppf(misses)

    def delta(epsilon):
        return norm.cdf(mu / 2 - epsilon / mu) - math.exp(epsilon) * norm.cdf(-mu / 2 - epsilon / mu)

    assert found.epsilon == pytest.approx(optimize.brentq(lambda e: delta(e) - 1e-3, 0, 30), rel=1e-5)


@pytest.mark.parametrize(("rank", "count"), [(1, 150), (60, 90), (100, 60), (100, 10), (160, 25), (200, 0)])
def test_the_chance_of_a_count_is_the_integral_over_the_false_negative_rate(rank, count):
    """Of a Gaussian mechanism, whose curve is known; the curve in use lies below it, so the chance is not smaller."""
    mu, size = 1.2, 200
    outside = np.repeat([1e9, -1e9], [count, size - count])
    test = rank_test(np.arange(size, dtype=float), outside, rank)

    def density(u):
        return beta.pdf(u, rank, size - rank + 1) * binom.cdf(count, size, norm.cdf(norm.isf(u) - mu))

    exact = integrate.quad(density, 0, 1, points=[rank / (size + 1)], limit=500)[0]
    found = test.chance(tangents(Gaussian(1 / mu), relation=ADD_REMOVE, least=1e-8, knots=200))
    assert exact * (1 - 1e-6) <= found <= 1.05 * exact + 1e-12


# ------------------------------------------------------------------------------------- how often they are too high


@pytest.mark.parametrize("threshold", STRATEGIES, ids=str)
def test_clopper_pearson_is_seldom_above_the_epsilon_of_randomised_response(threshold):
    """Randomised response is as revealing as epsilon allows. False alarm: 1e-6."""
    epsilon, draw = 1.0, np.random.default_rng(1)
    rate = 1 / (1 + math.exp(-epsilon))
    wrong = 0
    for _ in range(AUDITS):
        inside, outside = (draw.random(300) < rate).astype(float), (draw.random(300) > rate).astype(float)
        wrong += clopper_pearson(inside, outside, delta=1e-9, threshold=threshold).epsilon > epsilon
    assert wrong <= MOST_WRONG


@pytest.mark.parametrize("threshold", STRATEGIES, ids=str)
def test_gaussian_dp_is_seldom_above_the_epsilon_of_the_gaussian_mechanism(threshold):
    """False alarm: 1e-6."""
    mu, draw, wrong = 1.0, np.random.default_rng(2), 0
    epsilon = accounting.epsilon(Gaussian(1 / mu), 1e-5, relation=ADD_REMOVE).upper
    for _ in range(AUDITS):
        wrong += gaussian_dp(*gaussian_scores(draw, mu, 300), delta=1e-5, threshold=threshold).epsilon > epsilon
    assert wrong <= MOST_WRONG


def most_rejected(curve, rank, size):
    """The largest count that rejects the curve; -1 if none does."""
    inside = np.arange(size, dtype=float)
    outside = (np.repeat([1e9, -1e9], [count, size - count]) for count in range(size + 1))
    return next(count for count, each in enumerate(outside, -1) if rank_test(inside, each, rank).chance(curve) > ALPHA)


def counts(inside, outside, rank):
    """Of each row, how many outside scores are at or above the inside score of this rank."""
    return np.sum(outside >= np.sort(inside, axis=1)[:, rank - 1, None], axis=1)


@pytest.mark.parametrize("rank", [20, 150, 240])
def test_the_rank_test_rejects_the_truth_as_often_as_it_says(rank):
    """Full batches, 20,000 audits. A true scale is rejected with probability 0.05 and, since a count is a whole number,
    not much less. False alarm: 1e-6 on each side, if it is 0.035 at least."""
    mu, size, audits, draw = 1.0, 300, 20_000, np.random.default_rng(3)
    most = most_rejected(tangents(Gaussian(1 / mu), relation=ADD_REMOVE, least=1e-8, knots=200), rank, size)
    wrong = np.sum(counts(draw.normal(mu, 1, (audits, size)), draw.normal(0, 1, (audits, size)), rank) <= most)
    assert binom.ppf(1e-6, audits, 0.035) <= wrong <= binom.isf(1e-6, audits, ALPHA)


def test_the_rank_test_seldom_rejects_the_truth_of_sampled_steps():
    """The best score there is, of 20 sampled steps, in 2,000 audits. False alarm: 1e-6."""
    event, size, audits, draw = Repeated(Poisson(0.1, Gaussian(0.8)), 20), 200, 2000, np.random.default_rng(4)
    most = most_rejected(tangents(event, relation=ADD_REMOVE, least=1e-8, knots=200), 120, size)
    scores = (log_ratios(draw, event, audits, size, inside=inside) for inside in (True, False))
    assert 0 < np.sum(counts(*scores, 120) <= most) <= binom.isf(1e-6, audits, ALPHA)


def test_with_bounds_of_both_rates_it_seldom_rejects_the_truth():
    """What ``family_inversion`` asks at scale 1 if it is given a threshold. False alarm: 1e-6 for each strategy."""
    mu, draw = 1.0, np.random.default_rng(5)
    curve = tangents(Gaussian(1 / mu), relation=ADD_REMOVE, least=1e-8, knots=200)
    wrong = dict.fromkeys(STRATEGIES, 0)
    for _ in range(AUDITS):
        pair = gaussian_scores(draw, mu, 300)
        for threshold in STRATEGIES:
            rates = error_rates(*pair, confidence=1 - ALPHA, threshold=threshold, objective=lambda a, b: -a - b)
            least = curve.at([each.false_positive_rate_upper for each in rates])
            wrong[threshold] += any(each.false_negative_rate_upper < b for each, b in zip(rates, least, strict=True))
    assert max(wrong.values()) <= MOST_WRONG


@pytest.mark.slow
def test_family_inversion_is_seldom_above_epsilon():
    """300 whole audits, of full batches since those are fast. False alarm: 1e-6."""
    event, draw, audits = Repeated(Gaussian(4.835), 20), np.random.default_rng(6), 300
    epsilon = accounting.epsilon(event, 1e-5, relation=ADD_REMOVE).upper
    wrong = sum(
        family_inversion(
            *gaussian_scores(draw, math.sqrt(20) / 4.835, 500), family(event), relation=ADD_REMOVE, delta=1e-5
        ).epsilon
        > epsilon
        for _ in range(audits)
    )
    assert wrong <= binom.isf(1e-6, audits, ALPHA)


# ------------------------------------------------------------------------------------------- how high they come


@pytest.mark.parametrize(("epsilon", "noise", "least"), [(8.0, 2.684, 0.90), (4.0, 4.835, 0.85), (1.0, 16.68, 0.70)])
def test_family_inversion_comes_near_the_epsilon_of_full_batches(epsilon, noise, least):
    """Twenty steps, 2,500 canaries on each side, the mean of 8 seeds. Its standard deviation is about 0.02 epsilon at
    8 and 4, and 0.06 at 1, and the means are 0.95, 0.92 and 0.85, so that a false alarm has probability below 0.01."""
    event = Repeated(Gaussian(noise), 20)
    found = [
        family_inversion(
            *gaussian_scores(np.random.default_rng(seed), math.sqrt(20) / noise, 2500),
            family(event),
            relation=ADD_REMOVE,
            delta=1e-5,
        ).epsilon
        for seed in range(8)
    ]
    assert np.mean(found) / epsilon >= least, found


@pytest.mark.parametrize("seeds", [1, pytest.param(8, marks=pytest.mark.slow)])
def test_family_inversion_comes_near_the_epsilon_of_sampled_batches(seeds):
    """The mean is 0.9 of epsilon with a standard deviation of 0.05 an audit: a false alarm has probability below
    0.01."""
    event = Repeated(Poisson(0.1, Gaussian(1.0)), 100)
    draw = np.random.default_rng(7)
    scores = (log_ratios(draw, event, seeds, 2500, inside=inside) for inside in (True, False))
    epsilon = accounting.epsilon(event, 1e-5, relation=ADD_REMOVE).upper
    found = [
        family_inversion(*pair, family(event), relation=ADD_REMOVE, delta=1e-5).epsilon
        for pair in zip(*scores, strict=True)
    ]
    assert np.mean(found) / epsilon >= 0.8, found


def test_a_tenth_too_little_noise_is_caught():
    """With 10,000 canaries on each side a true claim is contradicted with probability 0.05, and this one with more than
    0.999: the expected distance is above 5 standard deviations."""
    event = Repeated(Gaussian(4.835), 20)
    scores = gaussian_scores(np.random.default_rng(8), math.sqrt(20) / (0.9 * 4.835), 10_000)
    found = family_inversion(*scores, family(event), relation=ADD_REMOVE, delta=1e-5)
    assert found.epsilon > accounting.epsilon(event, 1e-5, relation=ADD_REMOVE).upper


@pytest.mark.parametrize("threshold", [None, Explicit(0.5)], ids=str)
def test_a_claim_is_rejected_where_the_bound_is_above_it_and_nowhere_else(threshold):
    event = Gaussian(1.0)
    claim = accounting.epsilon(event, 1e-5, relation=ADD_REMOVE).upper
    above = 0
    for seed, mu in enumerate(np.repeat([1.0, 1.05, 1.1, 1.15, 1.2, 1.4], 3)):
        pair = gaussian_scores(np.random.default_rng(seed), mu, 1000)
        found = family_inversion(*pair, family(event), relation=ADD_REMOVE, delta=1e-5, threshold=threshold)
        if threshold is None:
            rejected = found.details["chance_under_the_claim"] <= 0.05
        else:
            rates = found.details
            least = accounting.trade_off(event, [rates["false_positive_rate_upper"]], relation=ADD_REMOVE)[0]
            rejected = rates["false_negative_rate_upper"] < least
        assert rejected == (found.epsilon > claim * (1 - 1e-6)), (seed, mu, found)
        above += rejected
    assert 3 <= above <= 15  # both answers were seen


def test_discrete_noise_has_the_lower_bound_of_continuous_noise():
    """The accountant knows none for it. The curve, of Renyi moments, is lower, so that less is rejected."""
    pair = gaussian_scores(np.random.default_rng(12), math.sqrt(20) / 2.684, 2500)
    continuous, discrete = (
        family_inversion(*pair, family(Repeated(noise(2.684), 20)), relation=ADD_REMOVE, delta=1e-5).epsilon
        for noise in (Gaussian, DiscreteGaussian)
    )
    assert 2 < discrete < continuous


def test_a_gaussian_null_is_no_certificate_for_sampled_steps():
    """Twenty steps with noise 0.6 at rate 0.05 have epsilon 2.239 at delta 0.01. The Gaussian null finds more, for good
    reason: it claims what it was not told. The family of the claim does not, with probability 0.95."""
    event = Repeated(Poisson(0.05, Gaussian(0.6)), 20)
    epsilon = accounting.epsilon(event, 1e-2, relation=ADD_REMOVE).upper
    assert epsilon == pytest.approx(2.239, abs=2e-3)
    draw = np.random.default_rng(9)
    inside, outside = (log_ratios(draw, event, 1, 100_000, inside=each)[0] for each in (True, False))
    assert gaussian_dp(inside, outside, delta=1e-2).epsilon > 1.1 * epsilon
    assert family_inversion(inside, outside, family(event), relation=ADD_REMOVE, delta=1e-2).epsilon <= epsilon
    assert clopper_pearson(inside, outside, delta=1e-2).epsilon <= epsilon


# ----------------------------------------------------------------------------------------------- odd scores, refusals

ESTIMATORS = {
    "clopper_pearson": clopper_pearson,
    "gaussian_dp": gaussian_dp,
    "family_inversion": lambda *pair, **options: family_inversion(
        *pair, family(Gaussian(1.0)), relation=ADD_REMOVE, **options
    ),
}


@pytest.mark.parametrize("name", ESTIMATORS)
@pytest.mark.parametrize("threshold", [Split(), Bonferroni(), Explicit(0.0)], ids=str)
def test_scores_that_tell_nothing_give_zero(name, threshold):
    draw = np.random.default_rng(10)
    for inside, outside in (
        (np.zeros(100), np.zeros(80)),
        (-np.ones(100), np.ones(80)),
        (draw.normal(-5, 1, 100), draw.normal(5, 1, 80)),
    ):
        assert ESTIMATORS[name](inside, outside, delta=1e-5, threshold=threshold).epsilon == 0
    assert family_inversion(
        np.zeros(99), np.zeros(99), family(Gaussian(1.0)), relation=ADD_REMOVE, delta=1e-5
    ).epsilon == 0  # fmt: skip


@pytest.mark.parametrize("name", ESTIMATORS)
def test_sorted_files_are_split_at_random(name):
    """A split by place would choose the threshold on the smallest scores, and count with the largest."""
    inside, outside = gaussian_scores(np.random.default_rng(11), 3.0, 1000)
    shuffled = ESTIMATORS[name](inside, outside, delta=1e-5, threshold=Split()).epsilon
    in_order = ESTIMATORS[name](np.sort(inside), np.sort(outside), delta=1e-5, threshold=Split()).epsilon
    assert in_order == pytest.approx(shuffled, rel=0.25)
    assert shuffled > 1


def test_scores_apart_are_bounded_by_their_number():
    """Of n canaries on each side Clopper-Pearson shows at most log(n / log(2 / alpha)), and delta matters little."""
    found = clopper_pearson(np.ones(1000), np.zeros(1000), delta=1e-5, threshold=Explicit(0.5)).epsilon
    assert found == pytest.approx(math.log(1000 / math.log(40)), abs=0.02)


@pytest.mark.slow
def test_evidence_against_any_noise_gives_a_finite_bound():
    found = family_inversion(
        np.ones(5000), np.zeros(5000), family(Poisson(0.1, Gaussian(1.0))), relation=ADD_REMOVE, delta=1e-5
    )
    assert 10 < found.epsilon < math.inf


@pytest.mark.parametrize(
    ("inside", "options", "named"),
    [
        ([0.0, math.nan], {}, r"inside\[1\] is nan"),
        ([0.0, math.inf], {}, r"inside\[1\] is inf"),
        ([1.0], {}, "at least two"),
        ([[1.0, 2.0]], {}, "shape"),
        ([1.0, 2.0], {"confidence": 1.0}, "confidence"),
        ([1.0, 2.0], {"confidence": math.nan}, "confidence"),
        ([1.0, 2.0], {"delta": 0.0}, "delta"),
    ],
)
def test_bad_input_is_named(inside, options, named):
    for estimator in ESTIMATORS.values():
        with pytest.raises(ValueError, match=named):
            estimator(inside, [0.0, 1.0], **({"delta": 1e-5} | options))


@pytest.mark.parametrize("make", [lambda: Explicit(math.nan), lambda: Split(0.0), lambda: Split(1.0)])
def test_thresholds_refuse_what_is_none(make):
    with pytest.raises(InvalidArgument):
        make()
    with pytest.raises(InvalidArgument, match=r"Bonferroni\.most"):
        Bonferroni(0)


# ------------------------------------------------------------------------------------------------------ the family

NOISE = Gaussian(2.0)
EVENTS = [
    NOISE,
    DiscreteGaussian(2.0),
    Laplace(2.0),
    Repeated(NOISE, 3),
    Poisson(0.1, NOISE),
    TruncatedPoisson(0.1, 20, 100, NOISE),
    WithoutReplacement(10, 100, NOISE),
    OnePass(NOISE),
    Select(NOISE, TruncatedNegativeBinomial(1.0, 0.5)),
    Composed((Repeated(Poisson(0.1, Composed((NOISE, Laplace(3.0)))), 5), NOISE)),
    accounting.MatrixMechanism(2.0, 1.5),
]


@pytest.mark.parametrize("event", EVENTS, ids=lambda event: event.kind)
def test_every_noise_multiplier_is_scaled_and_nothing_else(event):
    text = accounting.event_to_json(scaled(event, 2.0))
    expected = accounting.event_to_json(event)
    for multiplier in ("2.0", "3.0"):
        expected = expected.replace(f'"noise_multiplier":{multiplier}', f'"noise_multiplier":{2 * float(multiplier)}')
    assert text == expected
    assert scaled(event, 1.0) == event


@pytest.mark.parametrize("event", [PureDP(1.0), ApproximateDP(1.0, 1e-6)], ids=lambda event: event.kind)
def test_what_has_no_noise_multiplier_is_refused_by_name(event):
    with pytest.raises(Unsupported, match=event.kind):
        scaled(Composed((Gaussian(1.0), Repeated(event, 2))), 1.5)


@pytest.mark.parametrize("factor", [0.0, -1.0, math.nan, math.inf])
def test_a_scale_is_positive_and_finite(factor):
    with pytest.raises(InvalidArgument, match="factor"):
        scaled(Gaussian(1.0), factor)
