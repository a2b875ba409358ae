"""Filters: whatever is chosen on the way, no order exceeds the budget that was fixed beforehand, and it holds."""

from __future__ import annotations

import itertools
import math
import random
import threading

import mpmath
import numpy as np
import pytest

from accounting import (
    BudgetExceeded,
    Composed,
    Gaussian,
    InvalidParameter,
    Poisson,
    Relation,
    Repeated,
    TruncatedPoisson,
    Unsupported,
    epsilon,
)
from accounting.events import ApproximateDP, Laplace, MatrixMechanism, OnePass, PureDP, WithoutReplacement
from accounting.privacy_filters import RenyiFilter, WorstCaseSchedule, ZCDPFilter, best_order
from accounting.sampled_gaussian import ORDERS

ADD, ZERO, REPLACE = Relation.ADD_REMOVE, Relation.ZERO_OUT, Relation.REPLACE_ONE
TARGETS = [(1.0, 1e-5), (8.0, 1e-5), (0.1, 1e-9), (300.0, 1e-12), (2.0, 0.1)]


def converted(order, renyi_epsilon, delta):
    """Epsilon of (order, renyi_epsilon)-RDP at ``delta``, in forty digits."""
    with mpmath.workdps(40):
        a = mpmath.mpf(order)
        return mpmath.mpf(renyi_epsilon) - (mpmath.log(delta) + mpmath.log(a)) / (a - 1) + mpmath.log1p(-1 / a)


def largest_renyi_epsilon(order, target, delta):
    with mpmath.workdps(40):
        return target - converted(order, 0, delta)


def spent_on_gaussians(made):
    """What releases with the multipliers ``made`` cost per order: the closed form is order / (2 s^2) each."""
    return math.fsum(0.5 / s**2 for s in made)


# The budget of an order


@pytest.mark.parametrize("target", TARGETS)
def test_each_order_gets_the_largest_budget_that_means_epsilon_and_delta(target):
    for order in ORDERS[::7]:
        largest = largest_renyi_epsilon(order, *target)
        if largest <= 0:
            with pytest.raises(InvalidParameter, match="even with nothing spent"):
                RenyiFilter(target[0], target[1], [order])
            continue
        kept = RenyiFilter(target[0], target[1], [order])
        just_fits, just_not = (math.sqrt(order / 2 / (float(largest) * part)) for part in (1 - 1e-9, 1 + 1e-9))
        assert kept.admits(Gaussian(just_fits), ADD)
        assert not kept.admits(Gaussian(just_not), ADD)


@pytest.mark.parametrize("target", TARGETS)
def test_the_least_order_that_can_give_the_budget_is_named(target):
    usable = [order for order in ORDERS if largest_renyi_epsilon(order, *target) > 0]
    if usable[0] > ORDERS[0]:
        with pytest.raises(InvalidParameter, match=f"the least that can is {usable[0]:g}"):
            RenyiFilter(target[0], target[1], [ORDERS[0]])
    RenyiFilter(target[0], target[1], usable)


def test_everything_that_fits_one_order_is_within_epsilon_by_the_exact_gaussian():
    for target, order in itertools.product(TARGETS, (4, 16, 64, 1024)):
        if largest_renyi_epsilon(order, *target) <= 0:
            continue
        kept, draw, made = RenyiFilter(target[0], target[1], [order]), random.Random(order), []
        for _ in range(200):
            noise = math.exp(draw.uniform(-1, 6))
            if kept.admits(Gaussian(noise), ADD):
                kept.spend(Gaussian(noise), ADD)
                made.append(noise)
        assert made
        exact = epsilon(Composed(tuple(map(Gaussian, made))), target[1], relation=ADD, by="gaussian")
        assert exact.upper <= target[0]


# Adaptive choice


def play(rng, kept, target, orders):
    """Draws a random strategy over randomised response and plays all of its paths.

    A strategy chooses the next epsilon as a random function of all outputs so far, and stops when the filter refuses.
    Returns E_Q[(P/Q)^order] of each order, and delta at epsilon = target: exact, by enumeration of the outputs.
    """
    paths = [(1.0, 1.0, kept, 0)]
    moments, delta = dict.fromkeys(orders, 0.0), 0.0
    while paths:
        p, q, its_filter, depth = paths.pop()
        chosen = rng.choice([0.2, 0.4, 0.8]) * (0.5 + 0.5 * rng.random())
        if depth == 9 or not its_filter(chosen):
            for order in orders:
                moments[order] += q * (p / q) ** order
            delta += max(0.0, p - math.exp(target) * q)
            continue
        truth = 1 / (1 + math.exp(-chosen))
        paths.append((p * truth, q * (1 - truth), its_filter.copy(), depth + 1))
        paths.append((p * (1 - truth), q * truth, its_filter.copy(), depth + 1))
    return moments, delta


class Spending:
    """A filter that can be copied along the branches of a tree by replaying what it was given."""

    def __init__(self, make, history=()):
        self.make, self.history, self.filter = make, list(history), make()
        for event in self.history:
            self.filter.spend(event, ADD)

    def __call__(self, chosen):
        event = PureDP(chosen)
        if not self.filter.admits(event, ADD):
            return False
        self.filter.spend(event, ADD)
        self.history.append(event)
        return True

    def copy(self):
        return Spending(self.make, self.history)


@pytest.mark.parametrize("seed", range(5))
@pytest.mark.parametrize(("order", "target"), [(3.0, 1.5), (4.0, 1.5), (16.0, 2.0)])
def test_a_strategy_that_looks_at_every_output_stays_within_the_budget(seed, order, target):
    kept = Spending(lambda: RenyiFilter(target, 0.1, [order]))
    moments, reached = play(random.Random(seed), kept, target, [order])
    budget = (order - 1) * float(largest_renyi_epsilon(order, target, 0.1))
    assert 0.5 * budget < math.log(moments[order]) <= budget * (1 + 1e-12)  # 0.5: the strategies do use their budget
    assert 0 < reached <= 0.1


@pytest.mark.parametrize("seed", range(1, 4))
def test_the_same_strategies_stay_within_a_zcdp_budget_at_every_order(seed):
    rho = ZCDPFilter(1.5, 0.1).rho
    moments, reached = play(random.Random(seed), Spending(lambda: ZCDPFilter(1.5, 0.1)), 1.5, [1.5, 4.0, 32.0])
    assert all(0 < math.log(moment) <= order * (order - 1) * rho * (1 + 1e-12) for order, moment in moments.items())
    assert 0 < reached <= 0.1


@pytest.mark.parametrize("seed", range(20))
def test_random_sequences_are_admitted_until_some_order_is_full_and_never_beyond(seed):
    draw = random.Random(seed)
    orders = draw.sample([4.0, 8.0, 16.0, 32.0, 64.0], draw.randint(1, 3))
    kept, made = RenyiFilter(8.0, 1e-5, orders), []
    budgets = {order: float(largest_renyi_epsilon(order, 8.0, 1e-5)) for order in orders}
    for _ in range(300):
        noise, times = math.exp(draw.uniform(0, 4)), draw.randint(1, 4)
        after = spent_on_gaussians([*made, *[noise] * times])
        fits = {order: order * after <= budget for order, budget in budgets.items()}
        near = any(abs(order * after / budget - 1) < 1e-9 for order, budget in budgets.items())
        event = Repeated(Gaussian(noise), times)
        assert near or kept.admits(event, ADD) == all(fits.values())
        if kept.admits(event, ADD):
            kept.spend(event, ADD)
            made += [noise] * times
        else:
            before = kept.remaining
            with pytest.raises(BudgetExceeded, match="Nothing was spent"):
                kept.spend(event, ADD)
            assert kept.remaining == before
        assert all(order * spent_on_gaussians(made) <= budget for order, budget in budgets.items())
    used = max(order * spent_on_gaussians(made) / budget for order, budget in budgets.items())
    assert kept.remaining == pytest.approx(1 - used, abs=1e-9)
    assert kept.guarantee == (8.0, 1e-5)


def test_any_full_order_refuses_also_where_another_has_room():
    # Many weak sampled steps cost next to nothing at small orders, and a lot at large ones.
    step = Repeated(Poisson(0.01, Gaussian(0.8)), 40)
    small, large = RenyiFilter(8.0, 1e-5, [4]), RenyiFilter(8.0, 1e-5, [64])
    both = RenyiFilter(8.0, 1e-5, [4, 64])
    assert small.admits(step, ADD) and not large.admits(step, ADD)
    assert not both.admits(step, ADD)
    with pytest.raises(BudgetExceeded, match="order 64"):
        both.spend(step, ADD)
    assert both.remaining == 1.0


def test_threads_never_spend_the_same_room_twice():
    kept, admitted = RenyiFilter(1.0, 1e-5, [32]), []

    def work():
        for _ in range(100):
            try:
                kept.spend(Gaussian(40.0), ADD)
            except BudgetExceeded:
                return
            admitted.append(40.0)

    threads = [threading.Thread(target=work) for _ in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    most = float(largest_renyi_epsilon(32, 1.0, 1e-5)) / (32 / 2 / 40.0**2)
    assert len(admitted) == math.floor(most)


def test_a_million_small_events_do_not_slip_through_by_rounding():
    at_once, one_by_one = RenyiFilter(8.0, 1e-5, [8]), RenyiFilter(8.0, 1e-5, [8])
    event = Gaussian(1e3)
    for _ in range(10_000):
        one_by_one.spend(event, ADD)
    at_once.spend(Repeated(event, 10_000), ADD)
    assert one_by_one.remaining <= at_once.remaining <= one_by_one.remaining + 1e-9


# What is spent, under which relation


@pytest.mark.parametrize("make", [lambda: RenyiFilter(4.0, 1e-5, [8]), lambda: ZCDPFilter(4.0, 1e-5)])
def test_relations_do_not_mix(make):
    kept = make()
    kept.spend(Gaussian(10.0), ZERO)
    for attempt in (kept.admits, kept.spend):
        with pytest.raises(InvalidParameter, match="do not add up"):
            attempt(Gaussian(10.0), REPLACE)
        with pytest.raises(InvalidParameter, match="it must be one of"):
            attempt(Gaussian(10.0), "both")
    assert kept.admits(Gaussian(10.0), ZERO)


def test_what_was_refused_fixes_no_relation():
    kept = RenyiFilter(4.0, 1e-5, [8])
    with pytest.raises(BudgetExceeded):
        kept.spend(Gaussian(0.1), ZERO)
    kept.spend(Gaussian(10.0), ADD)


@pytest.mark.parametrize(
    ("event", "relation"),
    [
        (ApproximateDP(0.1, 1e-9), ADD),
        (WithoutReplacement(10, 1000, Gaussian(2.0)), ADD),
        (Poisson(0.1, Gaussian(2.0)), REPLACE),
        (OnePass(Gaussian(2.0)), ADD),
    ],
    ids=lambda x: getattr(x, "kind", str(x)),
)
def test_what_has_no_renyi_bound_is_refused_by_name(event, relation):
    kept = RenyiFilter(4.0, 1e-5, [8])
    for attempt in (kept.admits, kept.spend):
        with pytest.raises(
            Unsupported,
            match=event.kind
            if relation is not ADD or event.kind != "approximate_dp"
            else r"ApproximateDP.*no Renyi divergence of order 8",
        ):
            attempt(event, relation)
    assert kept.remaining == 1.0


def test_an_event_of_nothing_is_free():
    for kept in (RenyiFilter(4.0, 1e-5, [8]), ZCDPFilter(4.0, 1e-5)):
        kept.spend(Repeated(Gaussian(1.0), 0), ADD)
        kept.spend(Composed(()), ADD)
        assert kept.remaining == 1.0


@pytest.mark.parametrize(
    ("orders", "said"),
    [
        ((), r"orders = \(\)"),
        ((7.03,), r"order 7\.03: .* nearest is 7"),
        ((1.0,), r"order 1\.0: .* nearest is 1\.001"),
        ((math.nan,), "order nan"),
        ((math.inf,), "order inf"),
        (("8",), "order '8'"),
        ((True,), "order True"),
        ((8, 2), "order 2 cannot give"),
    ],
    ids=str,
)
def test_bad_orders_are_refused_by_name(orders, said):
    with pytest.raises(InvalidParameter, match=said):
        RenyiFilter(1.0, 1e-6, orders)


@pytest.mark.parametrize("make", [lambda e, d: RenyiFilter(e, d, [8]), ZCDPFilter], ids=["renyi", "zcdp"])
@pytest.mark.parametrize(
    ("budget", "said"),
    [
        ((0.0, 1e-5), "epsilon = 0"),
        ((-1.0, 1e-5), "epsilon = -1"),
        ((math.inf, 1e-5), "epsilon = inf"),
        ((1.0, 0.0), "delta = 0"),
        ((1.0, 1.0), "delta = 1"),
        ((1.0, math.nan), "delta = nan"),
        ((1e-300, 1e-300), "even with nothing spent|too little"),
    ],
    ids=str,
)
def test_bad_budgets_are_refused_by_name(make, budget, said):
    with pytest.raises(InvalidParameter, match=said):
        make(*budget)


def test_orders_are_kept_once_and_sorted():
    assert RenyiFilter(8.0, 1e-5, [64, 8, 64.0, np.float64(16)]).orders == (8.0, 16.0, 64.0)


# The best order


@pytest.mark.parametrize(
    "event", [Gaussian(5.0), Poisson(0.01, Gaussian(1.0)), Poisson(0.2, Gaussian(4.0)), Laplace(5.0)], ids=str
)
@pytest.mark.parametrize("target", TARGETS[:3])
def test_no_order_holds_more_repetitions_than_the_best(event, target):
    def most(order):
        low, high = 0, 2**40
        kept = RenyiFilter(target[0], target[1], [order])
        while high - low > 1:
            middle = (low + high) // 2
            low, high = (middle, high) if kept.admits(Repeated(event, middle), ADD) else (low, middle)
        return low

    best = best_order(event, *target, relation=ADD)
    usable = [order for order in ORDERS[::5] if largest_renyi_epsilon(order, *target) > 0]
    assert most(best) >= max(map(most, usable))


def test_a_filter_of_the_best_order_holds_about_what_the_renyi_accountant_allows():
    step = Poisson(0.01, Gaussian(1.0))
    cost = epsilon(Repeated(step, 1000), 1e-5, relation=ADD, by="rdp").upper
    order = best_order(step, cost * 1.001, 1e-5, relation=ADD)
    assert RenyiFilter(cost * 1.001, 1e-5, [order]).admits(Repeated(step, 1000), ADD)
    assert not RenyiFilter(cost * 0.999, 1e-5, [order]).admits(Repeated(step, 1000), ADD)


def test_there_is_no_best_order_where_there_is_none():
    with pytest.raises(InvalidParameter, match="no Renyi order gives it"):
        best_order(Gaussian(1.0), 1e-9, 1e-9, relation=ADD)
    with pytest.raises(Unsupported, match="no finite Renyi divergence"):
        best_order(ApproximateDP(0.1, 1e-9), 1.0, 1e-5, relation=ADD)


# zCDP


@pytest.mark.parametrize("target", [*TARGETS, (1e-4, 1e-6), (1e6, 1e-6)])
def test_the_zcdp_budget_is_sound_and_better_than_the_textbook_conversion(target):
    rho = ZCDPFilter(*target).rho
    # Sound: the Gaussian mechanism of this rho keeps to epsilon at delta, by its closed form.
    exact = epsilon(Gaussian(math.sqrt(0.5 / rho)), target[1], relation=ADD, by="gaussian")
    assert exact.lower <= target[0]
    # Bun and Steinke 2016: rho + 2 sqrt(rho log(1/delta)).
    assert rho + 2 * math.sqrt(rho * math.log(1 / target[1])) >= target[0]


@pytest.mark.parametrize("target", TARGETS)
def test_the_zcdp_budget_is_the_best_over_all_orders(target):
    def rho_of(log_above):
        order = 1 + mpmath.exp(log_above)
        return float(largest_renyi_epsilon(order, *target) / order)

    finer = max(rho_of(x / 50) for x in range(-400, 1200))
    assert finer * (1 - 1e-3) <= ZCDPFilter(*target).rho <= finer * (1 + 1e-3)


@pytest.mark.parametrize(
    ("event", "relation", "rho"),
    [
        (Gaussian(2.0), ADD, 1 / 8),
        (Repeated(Gaussian(2.0), 3), REPLACE, 3 / 8),
        (Composed((Gaussian(2.0), PureDP(0.1), Laplace(10.0))), ADD, 1 / 8 + 0.005 + 0.005),
        (ApproximateDP(0.2, 0.0), ZERO, 0.02),
        (OnePass(Gaussian(2.0)), ZERO, 1 / 8),
        (MatrixMechanism(4.0, 2.0), ZERO, 1 / 8),
        (Poisson(1.0, Gaussian(2.0)), ADD, 1 / 8),
    ],
    ids=str,
)
def test_the_zcdp_costs(event, relation, rho):
    kept = ZCDPFilter(8.0, 1e-5)
    kept.spend(event, relation)
    assert kept.remaining == pytest.approx(1 - rho / kept.rho, rel=1e-9)
    assert (1 - kept.remaining) * kept.rho >= rho * (1 - 1e-15)


def test_the_zcdp_filter_stops_at_its_budget():
    kept = ZCDPFilter(1.0, 1e-5)
    noise = math.sqrt(0.5 / kept.rho)
    kept.spend(Gaussian(noise * math.sqrt(2) * 1.0001), ADD)
    with pytest.raises(BudgetExceeded, match="Nothing was spent"):
        kept.spend(Gaussian(noise * math.sqrt(2) * 0.9999), ADD)
    kept.spend(Gaussian(noise * math.sqrt(2) * 1.0001), ADD)
    assert 0 <= kept.remaining < 1e-3
    assert not kept.admits(Gaussian(100.0), ADD)
    assert kept.guarantee == (1.0, 1e-5)


@pytest.mark.parametrize(
    "event",
    [Poisson(0.01, Gaussian(1.0)), TruncatedPoisson(0.01, 50, 1000, Gaussian(1.0)), ApproximateDP(0.1, 1e-9)],
    ids=lambda event: event.kind,
)
def test_what_has_no_zcdp_is_refused(event):
    kept = ZCDPFilter(8.0, 1e-5)
    for attempt in (kept.admits, kept.spend):
        with pytest.raises(Unsupported, match="zero-concentrated"):
            attempt(event, ADD)
    assert kept.remaining == 1.0


# The worst-case schedule

STEP = Poisson(0.01, Gaussian(1.0))


@pytest.mark.parametrize(
    ("declared", "chosen"),
    [
        (STEP, STEP),
        (STEP, Poisson(0.005, Gaussian(1.5))),
        (STEP, Composed(())),
        (STEP, Poisson(0.01, Composed((Gaussian(2.0), Gaussian(2.0))))),  # together 2 / sqrt(2)
        (Gaussian(1.0), Gaussian(3.0)),
        (Laplace(1.0), Laplace(3.0)),
        (Repeated(STEP, 2), STEP),
        (TruncatedPoisson(0.01, 50, 1000, Gaussian(1.0)), TruncatedPoisson(0.01, 50, 1000, Gaussian(1.2))),
        (Composed((Gaussian(1.0), Laplace(2.0))), Composed((Gaussian(1.0), Laplace(2.0)))),
        (OnePass(Gaussian(2.0)), OnePass(Gaussian(2.0))),
    ],
    ids=str,
)
def test_a_step_that_reveals_no_more_than_declared_passes(declared, chosen):
    schedule = WorstCaseSchedule(declared, 100)
    schedule.check(chosen)
    assert schedule.event == Repeated(declared, 100)
    relation = ADD if "one_pass" not in str(declared) else ZERO
    once = epsilon(chosen, 1e-5, relation=relation, by="rdp").upper
    assert once <= epsilon(declared, 1e-5, relation=relation, by="rdp").upper * (1 + 1e-9)


@pytest.mark.parametrize(
    ("declared", "chosen"),
    [
        (STEP, Poisson(0.01, Gaussian(0.999))),
        (STEP, Poisson(0.0101, Gaussian(5.0))),
        (STEP, Poisson(0.01, Composed((Gaussian(1.0), Gaussian(9.0))))),  # a side query costs
        (STEP, Repeated(STEP, 2)),
        (STEP, Gaussian(100.0)),
        (STEP, Composed((STEP, Gaussian(1e6)))),
        (Gaussian(1.0), Laplace(100.0)),
        (TruncatedPoisson(0.01, 50, 1000, Gaussian(1.0)), TruncatedPoisson(0.01, 49, 1000, Gaussian(2.0))),
        (TruncatedPoisson(0.01, 50, 1000, Gaussian(1.0)), TruncatedPoisson(0.009, 50, 1000, Gaussian(2.0))),
        (ApproximateDP(0.1, 1e-9), ApproximateDP(0.1, 1e-8)),
    ],
    ids=str,
)
def test_a_step_that_may_reveal_more_is_refused(declared, chosen):
    with pytest.raises(InvalidParameter, match="is not covered by the schedule"):
        WorstCaseSchedule(declared, 100).check(chosen)


def test_a_schedule_of_no_steps_is_refused():
    with pytest.raises(InvalidParameter, match="steps"):
        WorstCaseSchedule(STEP, 0)
