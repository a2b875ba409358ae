"""Lower bounds from one run: the two theorems against exact chances, a linear program and sums of fractions."""

from __future__ import annotations

import math
from fractions import Fraction

import numpy as np
import pytest
from scipy.optimize import linprog
from scipy.stats import binom, norm

import accounting
from accounting import ApproximateDP, Gaussian, Poisson, Relation, Repeated, Unsupported
from accounting.trade_off import tangents
from dpkit.audit.guessing import (
    Guesses,
    _chance,
    _right,
    check_fair_coin,
    contradict,
    mirrored_curve,
    one_run,
    one_run_f_dp,
)
from dpkit.audit.scaling import scaled
from dpkit.errors import InvalidArgument

ADD_REMOVE = Relation.ADD_REMOVE
DELTA = 1e-5


def family(event):
    return lambda scale: scaled(event, scale)


def drawn(draw, size, mu):
    """Scores of canaries that a Gaussian mechanism shows with ``mu``, and whether each was used."""
    member = draw.random(size) < 0.5
    return draw.normal(0, 1, size) + mu * member, member


# -------------------------------------------------------------------------------------------- (epsilon, delta)


@pytest.mark.parametrize(("right", "made", "canaries"), [(1, 1, 1), (7, 10, 10), (10, 10, 30), (25, 40, 200)])
@pytest.mark.parametrize("odds", [1, 3, 20])
def test_the_chance_is_that_of_theorem_5_2(right, made, canaries, odds):
    """In fractions: e^epsilon is ``odds``."""
    rate, delta = Fraction(odds, odds + 1), Fraction(1, 1000)
    tails = [
        sum(math.comb(made, k) * rate**k * (1 - rate) ** (made - k) for k in range(least, made + 1))
        for least in range(right + 1)
    ]
    largest = max((tails[right - i] - tails[right]) / i for i in range(1, right + 1))
    exact = min(1, tails[right] + 2 * canaries * delta * largest)
    found = _chance(Guesses(made, 0, right, canaries), math.log(odds), float(delta))
    assert float(exact) * (1 - 1e-12) <= found <= float(exact) * (1 + 1e-6)


@pytest.mark.parametrize(("epsilon", "delta"), [(0.5, 0.0), (2.0, 0.0), (1.0, 1e-3), (3.0, 0.02)])
def test_no_mechanism_guesses_right_more_often_than_that(epsilon, delta):
    """Everything is shown with probability delta, and randomised response gives the rest: about 60 canaries, the
    chance of v right guesses is known and may not be above the bound, for any v."""
    canaries, rate = 60, 1 / (1 + math.exp(-epsilon))
    for right in range(1, canaries + 1):
        exact = delta + (1 - delta) * binom.sf(right - 1, canaries, rate)
        bound = _chance(Guesses(canaries, 0, right, canaries), epsilon, delta)
        assert exact <= bound * (1 + 1e-9), right


def test_it_is_seldom_above_epsilon_and_comes_near_it_for_randomised_response():
    """400 audits with 1,000 canaries; scores are the answers with noise that only breaks ties. A bound is too high
    with probability at most 0.05: a false alarm has probability below 1e-6. The rate 0.731 is known to 0.016, which is
    0.08 of epsilon, so that the bound is about epsilon - 0.13."""
    epsilon, size, draw = 1.0, 1000, np.random.default_rng(1)
    found = []
    for _ in range(400):
        member = draw.random(size) < 0.5
        answer = np.where(draw.random(size) < 1 / (1 + math.exp(-epsilon)), member, ~member)
        found.append(one_run(answer + 0.1 * draw.random(size), member, delta=1e-12, guesses=[(450, 450)]).epsilon)
    assert sum(bound > epsilon for bound in found) <= binom.isf(1e-6, 400, 0.05)
    assert np.mean(found) >= 0.8 * epsilon


def test_with_several_numbers_of_guesses_it_is_seldom_above_epsilon():
    """200 audits of randomised response; false alarm: 1e-6."""
    epsilon, size, draw, wrong = 3.0, 400, np.random.default_rng(2), 0
    for _ in range(200):
        member = draw.random(size) < 0.5
        answer = np.where(draw.random(size) < 1 / (1 + math.exp(-epsilon)), member, ~member)
        wrong += one_run(answer + 0.1 * draw.random(size), member, delta=1e-12).epsilon > epsilon
    assert wrong <= binom.isf(1e-6, 200, 0.05)


# ------------------------------------------------------------------------------------------------------------- f-DP


def most_likely(event, guesses, *, relation=ADD_REMOVE):
    """The largest chance of so many right guesses that the theorem's constraints leave, by a linear program.

    Unknowns are the chances of j right guesses; R_{i+1} <= 1 - f(H_i) is one linear constraint for each tangent of f.
    """
    made, right, canaries = guesses.made, guesses.correct, guesses.canaries
    curve = tangents(event, relation=relation, least=1e-12, knots=240)
    numbers = np.arange(made + 1)
    rows, limits = [], []
    for i in range(made):
        above, from_here = (numbers > i) * numbers / canaries, (numbers >= i) * (made - numbers) / canaries
        for epsilon, delta in zip(curve.epsilons, curve.deltas, strict=True):
            # R <= 1 - (1 - delta - e^epsilon H) and R <= 1 - e^-epsilon (1 - delta - H)
            rows += [above - math.exp(epsilon) * from_here, above - math.exp(-epsilon) * from_here]
            limits += [delta, 1 - math.exp(-epsilon) * (1 - delta)]
    scale = np.abs(rows).max(axis=1)
    done = linprog(
        -(numbers >= right).astype(float),
        A_ub=np.array(rows) / scale[:, None],
        b_ub=np.array(limits) / scale,
        A_eq=np.ones((1, made + 1)),
        b_eq=[1],
        bounds=(0, 1),
    )
    assert done.success, done.message
    return -done.fun


@pytest.mark.parametrize(
    ("event", "guesses"),
    [
        (Gaussian(1.0), Guesses(4, 4, 7, 8)),
        (Gaussian(1.0), Guesses(4, 4, 8, 8)),
        (Gaussian(0.5), Guesses(6, 0, 6, 30)),
        (Gaussian(2.0), Guesses(5, 7, 10, 12)),
        (Repeated(Poisson(0.2, Gaussian(0.8)), 5), Guesses(5, 5, 9, 20)),
    ],
    ids=str,
)
def test_the_recursion_finds_the_largest_chance_of_a_linear_program(event, guesses):
    largest, curve = most_likely(event, guesses), mirrored_curve(event, ADD_REMOVE)
    assert 1e-6 < largest < 1
    assert contradict(guesses, curve, 1.001 * largest + 1e-9)
    assert not contradict(guesses, curve, 0.999 * largest - 1e-9)


@pytest.mark.parametrize("event", [Gaussian(0.4), Repeated(Poisson(0.2, Gaussian(0.8)), 5)], ids=str)
def test_the_mirrored_curve_is_the_largest_of_its_tangents(event):
    """With the hull of lines as the recursion walks it, and all tangents as the oracle."""
    lines, until = mirrored_curve(event, ADD_REMOVE)
    curve = tangents(event, relation=ADD_REMOVE, least=1e-12, knots=240)
    assert until == sorted(until)
    for x in (0.0, 1e-9, 1e-6, 1e-3, 0.1, 0.5, 0.9, 0.999, 1 - 1e-6, 1.0):
        slope, origin, height = lines[int(np.searchsorted(until, x))]
        assert max(0.0, slope * (x - origin) + height) == pytest.approx(curve.at(1 - x), rel=1e-6, abs=1e-12)


def test_what_can_happen_is_never_contradicted():
    """Chances of v right guesses that are known, of mechanisms that are as revealing as the claim allows.

    Randomised response, which shows everything with probability delta, and a Gaussian for each canary make independent
    guesses; one Gaussian release of the number of canaries that were used makes all guesses alike.
    """
    size = 40
    rate = 1 / (1 + math.exp(-1.0))
    mu = 1.2
    used = np.arange(size + 1)
    says_many = norm.cdf((used - size / 2) * mu)  # all are guessed inside; else all outside

    def alike(right):
        return np.sum(
            binom.pmf(used, size, 0.5) * (says_many * (used >= right) + (1 - says_many) * (size - used >= right))
        )

    chances = {
        ApproximateDP(1.0, 0.01): lambda right: 0.01 + 0.99 * binom.sf(right - 1, size, rate),
        Gaussian(1 / mu): lambda right: max(binom.sf(right - 1, size, norm.cdf(mu / 2)), alike(right)),
    }
    for event, chance in chances.items():
        curve = mirrored_curve(event, ADD_REMOVE)
        for right in range(1, size + 1):
            assert not contradict(Guesses(size, 0, right, size), curve, chance(right)), (event, right)


def test_the_claim_is_seldom_rejected_if_it_is_true():
    """2,000 audits of 500 canaries that sampled steps show, with seven numbers of guesses, as it is asked at scale 1.
    False alarm: 1e-6."""
    event, size, draw, wrong = Repeated(Poisson(0.2, Gaussian(0.8)), 10), 500, np.random.default_rng(3), 0
    curve = mirrored_curve(event, ADD_REMOVE)
    counts = [(k, k) for k in (5, 10, 25, 50, 100, 175, 250)]
    least = {}  # the fewest right guesses that contradict
    for top, bottom in counts:
        right = top + bottom
        while right and contradict(Guesses(top, bottom, right, size), curve, 0.05 / len(counts)):
            right -= 1
        least[top, bottom] = right + 1
    for _ in range(2000):
        member = draw.random(size) < 0.5
        total = np.zeros(size)
        for _ in range(10):
            seen = (draw.random(size) < 0.2) * member + 0.8 * draw.standard_normal(size)
            total += np.log1p(0.2 * np.expm1((2 * seen - 1) / (2 * 0.8**2)))
        order = member[np.argsort(-total)]
        wrong += any(
            order[:top].sum() + (~order)[size - bottom :].sum() >= least[top, bottom] for top, bottom in counts
        )
    assert wrong <= binom.isf(1e-6, 2000, 0.05)


@pytest.mark.slow
def test_whole_audits_are_seldom_above_epsilon():
    """300 audits of a Gaussian mechanism by both functions; false alarm: 2e-6."""
    event, draw = Gaussian(1 / 0.9), np.random.default_rng(4)
    epsilon = accounting.epsilon(event, DELTA, relation=ADD_REMOVE).upper
    wrong = np.zeros(2)
    for _ in range(300):
        scores, member = drawn(draw, 500, 0.9)
        found = (
            one_run(scores, member, delta=DELTA),
            one_run_f_dp(scores, member, family(event), relation=ADD_REMOVE, delta=DELTA),
        )
        wrong += [bound.epsilon > epsilon for bound in found]
    assert wrong.max() <= binom.isf(1e-6, 300, 0.05)


@pytest.mark.parametrize(
    ("mu", "true", "one", "f_dp"), [(1.666, 8.0, (2.8, 3.5), (4.0, 5.0)), (0.925, 4.0, (1.4, 2.1), (1.8, 2.7))]
)
def test_bounds_are_where_others_found_them(mu, true, one, f_dp):
    """5,000 canaries with ideal Gaussian scores, the mean of 4 seeds: about 40 and 55 per cent of epsilon."""
    event = Gaussian(1 / mu)
    assert accounting.epsilon(event, DELTA, relation=ADD_REMOVE).upper == pytest.approx(true, abs=0.02)
    found = [
        (
            one_run(*pair, delta=DELTA).epsilon,
            one_run_f_dp(*pair, family(event), relation=ADD_REMOVE, delta=DELTA).epsilon,
        )
        for pair in (drawn(np.random.default_rng(seed), 5000, mu) for seed in range(4))
    ]
    means = np.mean(found, axis=0)
    assert one[0] < means[0] < one[1]
    assert f_dp[0] < means[1] < f_dp[1]


# --------------------------------------------------------------------------------------------------- odd scores


def test_ties_count_against_the_guesser_and_order_tells_nothing():
    member = np.array([True] * 6 + [False] * 4)
    assert _right(np.arange(10)[::-1].astype(float), member, 3) == 3
    assert _right(np.array([2.0, 1, 1, 1, 1, 1, 1, 1, 1, 0]), member, 5) == 2  # 1 surely, 4 of 8 of whom 3 are outside
    assert _right(np.zeros(10), member, 4) == 0
    scores, order = np.repeat([0.0, 1.0, 2.0], 40), np.random.default_rng(5).permutation(120)
    used = np.arange(120) % 2 == 0
    first, second = one_run(scores, used, delta=DELTA), one_run(scores[order], used[order], delta=DELTA)
    assert first == second


@pytest.mark.parametrize(
    "scores", [np.zeros(200), np.where(np.arange(200) < 100, -1.0, 1.0)], ids=["constant", "wrong"]
)
def test_scores_that_tell_nothing_give_zero(scores):
    member = np.arange(200) < 100
    assert one_run(scores, member, delta=DELTA).epsilon == 0
    assert one_run_f_dp(scores, member, family(Gaussian(1.0)), relation=ADD_REMOVE, delta=DELTA).epsilon == 0


def test_canaries_that_no_fair_coin_drew_are_refused():
    """At 2,500 of 5,000 a coin is off by more than 173 with probability 1e-6."""
    check_fair_coin(2500 - 160, 2500 + 160)
    for uneven in ((2500 - 180, 2500 + 180), (2500 + 180, 2500 - 180), (50, 500)):
        with pytest.raises(InvalidArgument, match="fair coin"):
            check_fair_coin(*uneven)
    with pytest.raises(InvalidArgument, match="fair coin"):
        one_run(np.arange(300.0), np.arange(300) < 60, delta=DELTA)


@pytest.mark.parametrize(
    ("scores", "member", "options", "named"),
    [
        ([0.0, math.nan], [True, False], {}, r"scores\[1\] is nan"),
        ([0.0, 1.0], [1, 0], {}, "bool"),
        ([0.0, 1.0], [True], {}, "member has shape"),
        ([0.0, 1.0], [True, False], {"guesses": [(2, 1)]}, "guesses"),
        ([0.0, 1.0], [True, False], {"guesses": [(0, 0)]}, "guesses"),
        ([0.0, 1.0], [True, False], {"confidence": 0.0}, "confidence"),
    ],
)
def test_bad_input_is_named(scores, member, options, named):
    with pytest.raises(InvalidArgument, match=named):
        one_run(scores, member, delta=DELTA, **options)


def test_a_relation_without_a_theorem_is_refused():
    scores, member = drawn(np.random.default_rng(6), 100, 1.0)
    with pytest.raises(Unsupported, match="replace_one"):
        one_run_f_dp(scores, member, family(Poisson(0.1, Gaussian(1.0))), relation=Relation.REPLACE_ONE, delta=DELTA)
