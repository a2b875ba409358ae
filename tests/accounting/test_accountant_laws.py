"""Laws that every bound keeps: monotone, order-free, counts are repetitions, bad input is refused by type."""

from __future__ import annotations

import itertools
import math
import random

import pytest

from accounting import (
    Composed,
    Gaussian,
    InvalidParameter,
    Poisson,
    Repeated,
    TruncatedPoisson,
    Unsupported,
    delta,
    epsilon,
)
from accounting.gaussian import delta_bounds

MAKERS = {
    "gaussian": lambda s, q, t: Repeated(Gaussian(s), t),
    "poisson": lambda s, q, t: Repeated(Poisson(q, Gaussian(s)), t),
    "truncated": lambda s, q, t: Repeated(TruncatedPoisson(q, 700, 10_000, Gaussian(s)), t),
}
RELATIONS = ["add_remove", "zero_out"]


def eps(event, d=1e-6, relation="add_remove"):
    return epsilon(event, d, relation=relation).upper


def growing(values):
    """Up to the slack that upper bounds may have: 0.05 percent, and 1e-5."""
    return all(low <= high * (1 + 5e-4) + 1e-5 for low, high in itertools.pairwise(values))


@pytest.mark.parametrize("relation", RELATIONS)
@pytest.mark.parametrize("make", MAKERS.values(), ids=MAKERS)
def test_epsilon_grows_with_steps_and_rate_and_falls_with_noise_and_delta(make, relation):
    assert growing([eps(make(1.0, 0.05, t), relation=relation) for t in (0, 1, 2, 10, 100, 1000, 10_000)])
    assert growing([eps(make(1.0, q, 100), relation=relation) for q in (0, 1e-6, 1e-3, 0.01, 0.05, 0.06, 0.07, 0.5, 1)])
    noises = (0.01, 0.05, 0.1, 0.11, 0.12, 0.14, 0.3, 0.7, 1, 1.01, 3, 10, 100, 1e4)
    assert growing([eps(make(s, 0.05, 100), relation=relation) for s in reversed(noises)])
    deltas = (1e-300, 1e-30, 1e-12, 1e-9, 1e-5, 1e-3, 0.1, 0.9)
    assert growing([eps(make(1.0, 0.05, 100), d, relation) for d in reversed(deltas)])


@pytest.mark.parametrize("make", MAKERS.values(), ids=MAKERS)
def test_delta_falls_with_epsilon_and_both_agree(make):
    event = make(1.0, 0.05, 100)
    deltas = [delta(event, e, relation="add_remove").upper for e in (50, 20, 8, 4, 2, 1, 0.1, 0)]
    assert growing(deltas) and deltas[-1] <= 1
    # What was found as epsilon gives back its delta: the mixture over bad steps may differ in its cut-off by 1e-4.
    assert delta(event, eps(event), relation="add_remove").upper == pytest.approx(1e-6, rel=1e-3)


@pytest.mark.parametrize("make", MAKERS.values(), ids=MAKERS)
def test_a_count_is_a_repetition_and_order_does_not_matter(make):
    once, other = make(1.0, 0.02, 1), Repeated(Poisson(0.1, Gaussian(3.0)), 5)
    assert eps(Repeated(once, 4)) == pytest.approx(eps(Composed((once, once, once, once))), rel=1e-12)
    assert eps(Composed((once, other))) == pytest.approx(eps(Composed((other, once))), rel=1e-12)
    assert eps(Composed((once, other))) >= max(eps(once), eps(other))


@pytest.mark.parametrize("noise", [0.2, 0.35, 0.7, 1.0, 2.0, 10.0, 200.0])
@pytest.mark.parametrize("rate", [1e-5, 1e-3, 0.02, 0.3, 0.99])
def test_one_sampled_step_is_never_below_its_closed_form(noise, rate):
    # Of one step the truth is known: delta = q * delta_gaussian(log(1 + (e^eps - 1) / q)), in the remove direction.
    for target in (0.01, 0.3, 1.0, 4.0, 15.0):
        truth = rate * delta_bounds(1 / noise, math.log1p(math.expm1(target) / rate))[0]
        assert delta(Poisson(rate, Gaussian(noise)), target, relation="add_remove").upper >= truth
        if truth > 1e-200:
            assert eps(Poisson(rate, Gaussian(noise)), truth) >= target * (1 - 1e-9)


def test_two_queries_on_one_batch_cost_more_than_two_on_separate_batches():
    # z_total = 1 from a gradient and a side query; accounting them as separately sampled would under-report.
    side = 4.0
    gradient = (1 - side**-2) ** -0.5
    joint = Repeated(Poisson(0.01, Composed((Gaussian(gradient), Gaussian(side)))), 1000)
    apart = Repeated(Composed((Poisson(0.01, Gaussian(gradient)), Poisson(0.01, Gaussian(side)))), 1000)
    assert eps(joint, 1e-5) == pytest.approx(eps(Repeated(Poisson(0.01, Gaussian(1.0)), 1000), 1e-5), rel=1e-9)
    assert eps(joint, 1e-5) > eps(apart, 1e-5)


def test_nothing_costs_nothing():
    for event in (Composed(()), Repeated(Gaussian(1.0), 0), Poisson(0.0, Gaussian(1.0))):
        assert eps(event) == 0.0
        assert delta(event, 0.0, relation="zero_out").upper == 0.0
        assert epsilon(event, 1e-5, relation="add_remove", by="rdp").upper == 0.0


@pytest.mark.parametrize("seed", range(4))
def test_at_the_extremes_the_answer_is_a_number_without_a_warning(seed):
    # Warnings are errors in this suite, so an overflow inside NumPy fails here.
    draw = random.Random(seed)
    noises = (1.1e-100, 1e-60, 1e-30, 1e-3, 0.3, 1.0, 1e3, 1e30, 1e60, 9.9e99)
    rates = (0.0, 5e-324, 1e-300, 1e-20, 1e-3, 0.5, 1 - 1e-16, math.nextafter(1, 0), 1.0)
    for _ in range(60):
        noise, rate = Gaussian(draw.choice(noises)), draw.choice(rates)
        cut = TruncatedPoisson(rate, draw.choice([1, 10, 2**52]), draw.choice([0, 5, 10**7, 2**52]), noise)
        event = Repeated(draw.choice([noise, Poisson(rate, noise), cut]), draw.choice([0, 1, 10**9, 2**53 - 1]))
        relation = draw.choice(RELATIONS)
        at_delta = epsilon(event, draw.choice([5e-324, 1e-100, 1e-5, 0.999, 1 - 1e-16]), relation=relation)
        at_epsilon = delta(event, draw.choice([0, 5e-324, 1.0, 1e5, 1e100, 1e308]), relation=relation)
        assert 0 <= at_delta.lower <= at_delta.upper < math.inf, event
        assert 0 <= at_epsilon.lower <= at_epsilon.upper <= 1, event


def test_a_delta_too_small_for_a_double_is_not_called_zero():
    for event in (Gaussian(1e3), Poisson(0.1, Gaussian(1e3))):
        assert 0 < delta(event, 1e308, relation="add_remove").upper < 1e-300


def test_asking_does_not_change_the_answer():
    event = MAKERS["truncated"](0.9, 0.05, 300)
    assert epsilon(event, 1e-5, relation="zero_out") == epsilon(event, 1e-5, relation="zero_out")


def test_the_best_accountant_is_the_least_upper_bound():
    event = Repeated(Gaussian(5.0), 30)
    best, exact, renyi = (epsilon(event, 1e-5, relation="add_remove", by=by) for by in (None, "gaussian", "rdp"))
    assert best == exact and exact.upper < renyi.upper
    assert renyi.lower <= exact.lower


@pytest.mark.parametrize("d", [0.0, 1.0, -1e-5, 2.0, float("nan"), float("inf"), "1e-5", None, True])
def test_delta_outside_its_domain_is_refused(d):
    with pytest.raises(InvalidParameter, match="delta"):
        epsilon(Gaussian(1.0), d, relation="add_remove")


@pytest.mark.parametrize("e", [-0.1, float("nan"), float("inf"), "1"])
def test_epsilon_outside_its_domain_is_refused(e):
    with pytest.raises(InvalidParameter, match="epsilon"):
        delta(Gaussian(1.0), e, relation="add_remove")


def test_integers_beyond_all_doubles_are_refused_and_not_printed():
    for huge in (10**400, 10**5000):
        with pytest.raises(InvalidParameter, match="delta"):
            epsilon(Gaussian(1.0), huge, relation="add_remove")
        with pytest.raises(InvalidParameter, match="epsilon"):
            delta(Gaussian(1.0), huge, relation="add_remove")


def test_unknown_relations_and_accountants_are_refused():
    with pytest.raises(InvalidParameter, match="replace_one"):
        epsilon(Gaussian(1.0), 1e-5, relation="neighbours")
    for unknown in ("gdp", [1], 10**5000):
        with pytest.raises(InvalidParameter, match="rdp"):
            epsilon(Gaussian(1.0), 1e-5, relation="add_remove", by=unknown)
        with pytest.raises(InvalidParameter, match="zero_out"):
            epsilon(Gaussian(1.0), 1e-5, relation=unknown)
    with pytest.raises(Unsupported, match="rdp"):
        epsilon(Repeated(Poisson(0.1, Gaussian(1.0)), 2), 1e-5, relation="add_remove", by="gaussian")
