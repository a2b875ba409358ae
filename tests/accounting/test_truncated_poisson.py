"""Truncated Poisson sampling against enumeration of every draw, and against dp_accounting."""

from __future__ import annotations

import itertools
import math

import numpy as np
import pytest
from brute_force import (
    hockey_stick,
    hockey_stick_of_two_runs,
    law_among_equals,
    log_renyi_moment,
    truncated_law,
)
from scipy.stats import binom

from accounting import Gaussian, Poisson, Relation, Repeated, TruncatedPoisson, Unsupported, delta, epsilon
from accounting.gaussian import delta_bounds
from accounting.rdp import step_log_moment
from accounting.sampled_gaussian import ORDERS
from accounting.truncated import bad_probability, bad_step_counts, tail

SMALL = [
    # others, own record, rate, cap, noise
    ([-1.0, -1.0, -1.0], 1.0, 0.5, 1, 1.0),
    ([-1.0, -1.0, -1.0], 1.0, 0.5, 2, 0.6),
    ([-1.0, -1.0, -1.0, -1.0], 1.0, 0.3, 1, 0.5),
    ([0.7, -0.2, 1.0, -1.0, 0.1], -1.0, 0.4, 2, 0.8),
    ([1.0, 1.0, 1.0, 1.0], 1.0, 0.6, 3, 1.5),
    ([0.0, 0.5], 1.0, 0.9, 1, 0.7),
    ([-1.0] * 5, 1.0, 1.0, 3, 1.0),
]
EPSILONS = [0.0, 0.2, 1.0, 2.5, 5.0]
RELATIONS = [Relation.ADD_REMOVE, Relation.ZERO_OUT]


def pair(others, own, rate, cap, relation):
    neighbour = others if relation is Relation.ADD_REMOVE else [*others, 0.0]
    return truncated_law([*others, own], rate, cap), truncated_law(neighbour, rate, cap)


@pytest.mark.parametrize("relation", RELATIONS)
@pytest.mark.parametrize("case", SMALL, ids=str)
def test_delta_is_never_below_the_enumerated_truth(case, relation):
    others, own, rate, cap, noise = case
    p, q = pair(others, own, rate, cap, relation)
    event = TruncatedPoisson(rate, cap, len(others), Gaussian(noise))
    for eps in EPSILONS:
        bound = delta(event, eps, relation=relation).upper
        assert bound >= hockey_stick(p, q, noise, eps) - 1e-9
        assert bound >= hockey_stick(q, p, noise, eps) - 1e-9


@pytest.mark.parametrize("relation", RELATIONS)
@pytest.mark.parametrize("case", SMALL, ids=str)
def test_renyi_moments_are_never_below_the_enumerated_truth(case, relation):
    others, own, rate, cap, noise = case
    p, q = pair(others, own, rate, cap, relation)
    bound = step_log_moment(TruncatedPoisson(rate, cap, len(others), Gaussian(noise)), relation)
    for order in (1.1, 2, 3.5, 8, 20):
        at = int(np.flatnonzero(order == ORDERS)[0])
        assert bound[at] >= log_renyi_moment(p, q, noise, order) - 1e-7
        assert bound[at] >= log_renyi_moment(q, p, noise, order) - 1e-7


@pytest.mark.parametrize("relation", RELATIONS)
@pytest.mark.parametrize("case", SMALL[:4], ids=str)
def test_two_steps_are_never_below_the_enumerated_truth(case, relation):
    others, own, rate, cap, noise = case
    p, q = pair(others, own, rate, cap, relation)
    event = Repeated(TruncatedPoisson(rate, cap, len(others), Gaussian(noise)), 2)
    for eps in (0.5, 2.0):
        bound = delta(event, eps, relation=relation).upper
        assert bound >= hockey_stick_of_two_runs(p, q, noise, eps) - 1e-6
        assert bound >= hockey_stick_of_two_runs(q, p, noise, eps) - 1e-6


@pytest.mark.parametrize("relation", RELATIONS)
@pytest.mark.parametrize(
    ("others", "rate", "cap", "noise"), [(200, 0.05, 2, 0.5), (200, 0.05, 20, 0.5), (1000, 0.01, 25, 0.6)]
)
def test_many_equal_records_against_their_opposite_stay_below_the_bound(others, rate, cap, noise, relation):
    p = law_among_equals(others, -1.0, 1.0, rate, cap)
    q = law_among_equals(others, -1.0, None if relation is Relation.ADD_REMOVE else 0.0, rate, cap)
    event = TruncatedPoisson(rate, cap, others, Gaussian(noise))
    for eps in EPSILONS:
        bound = delta(event, eps, relation=relation).upper
        assert bound >= max(hockey_stick(p, q, noise, eps), hockey_stick(q, p, noise, eps)) - 1e-9


def test_truncation_is_not_free_under_zero_out():
    # The null record displaces another one whenever its slot is drawn, which betrays that it was drawn.
    others, rate, cap, noise, eps = 200, 0.05, 2, 0.5, 2.0
    p, q = (law_among_equals(others, -1.0, own, rate, cap) for own in (1.0, 0.0))
    truth = hockey_stick(p, q, noise, eps)
    plain_poisson = rate * delta_bounds(1 / noise, math.log(1 + math.expm1(eps) / rate))[2]
    assert truth == pytest.approx(0.00299, abs=1e-5)
    assert truth > 1.5 * plain_poisson
    assert delta(TruncatedPoisson(rate, cap, others, Gaussian(noise)), eps, relation="zero_out").upper >= truth


def test_the_bad_probability_is_the_exact_tail_rounded_up():
    for rate, cap, most in itertools.product((1e-4, 0.01, 0.3, 1.0), (1, 5, 40), (39, 1000, 60_000)):
        exact = float(binom.sf(cap - 1, most, rate))
        ours = bad_probability(TruncatedPoisson(rate, cap, most, Gaussian(1.0)))
        assert exact * (1 - 1e-9) <= ours <= min(1.0, exact * (1 + 1e-5)) + 1e-299
    assert tail(0, 5, 0.1) == 1.0 and tail(6, 5, 0.1) == 0.0 and tail(1, 5, 0.0) == 0.0


@pytest.mark.parametrize(
    ("steps", "p"), [(1, 0.3), (14040, 4e-9), (1000, 0.01), (5000, 0.5), (100, 1.0), (10**6, 0.02)]
)
def test_the_knots_bound_every_increasing_function_of_the_number_of_bad_steps(steps, p):
    knots, weights, beyond = bad_step_counts(steps, p, 1e-12)
    k = np.arange(steps + 1)
    law = binom.pmf(k, steps, p)
    assert beyond <= 1e-12 and len(knots) <= 64
    for f in (np.minimum(1, k / steps), 1 - np.exp(-k / 10), (k >= steps * p).astype(float)):
        assert np.dot(weights, f[knots]) + beyond >= np.dot(law, f) * (1 - 1e-9)


def test_a_cap_at_the_expected_batch_is_a_disaster_and_six_deviations_cost_nothing():
    def at(cap):
        event = Repeated(TruncatedPoisson(0.01, cap, 50_000, Gaussian(1.0)), 1000)
        return epsilon(event, 1e-5, relation="add_remove").upper

    plain = epsilon(Repeated(Poisson(0.01, Gaussian(1.0)), 1000), 1e-5, relation="add_remove")
    assert at(500) > 5 * plain.upper
    for cap in (634, 700):  # 634 = 500 + 6 sqrt(500); upper bounds are above the truth by up to 0.05 percent
        assert plain.lower <= at(cap) <= plain.lower * (1 + 1e-3)
    assert [at(cap) for cap in (500, 550, 600, 650)] == sorted((at(cap) for cap in (500, 550, 600, 650)), reverse=True)


@pytest.mark.parametrize("cap", [500, 550, 600, 650])
def test_epsilon_is_not_below_that_of_dp_accounting(cap):
    pld = pytest.importorskip("dp_accounting.pld")
    from dp_accounting import dp_event
    from dp_accounting.privacy_accountant import NeighboringRelation

    theirs = pld.PLDAccountant(NeighboringRelation.ADD_OR_REMOVE_ONE, value_discretization_interval=1e-3)
    theirs.compose(dp_event.TruncatedSubsampledGaussianDpEvent(50_000, 0.01, cap, 1.0), 100)
    event = Repeated(TruncatedPoisson(0.01, cap, 49_999, Gaussian(1.0)), 100)
    # Their grid of 1e-3 makes their value too large by less than 0.02. In a cut step they charge that a record was
    # replaced, whatever the relation; one that was added makes the laws differ on one side only, which is less.
    found = epsilon(event, 1e-5, relation="add_remove").upper
    assert found >= theirs.get_epsilon(1e-5) - (0.02 if cap > 500 else 0.05)


def test_replace_one_is_unsupported_with_the_way_out():
    for event in (Poisson(0.1, Gaussian(1.0)), TruncatedPoisson(0.1, 5, 20, Gaussian(1.0))):
        with pytest.raises(Unsupported, match="add_remove"):
            epsilon(event, 1e-5, relation="replace_one")
    assert epsilon(Gaussian(1.0), 1e-5, relation="replace_one").upper == pytest.approx(4.377178, abs=1e-6)
