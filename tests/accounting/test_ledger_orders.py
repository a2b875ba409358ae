"""A ledger whose budget has Renyi orders: plans fit by a filter fixed beforehand, and its budget is what is claimed."""

from __future__ import annotations

import json
import math
import random
import subprocess
import sys

import pytest

from accounting import (
    Budget,
    BudgetExceeded,
    Gaussian,
    InvalidParameter,
    Ledger,
    LedgerError,
    PlanRecord,
    Poisson,
    Relation,
    Repeated,
    Unsupported,
    epsilon,
    statement,
)
from accounting.chain import Chain
from accounting.events import ApproximateDP
from accounting.privacy_filters import best_order

EVENT = Poisson(0.01, Gaussian(1.0))
BUDGET = Budget(4.0, 1e-5, orders=(8,))


def plan(**changes):
    fields = {
        "event": EVENT,
        "steps": 200,
        "delta": 1e-6,
        "relation": Relation.ADD_REMOVE,
        "unit": "example",
        "num_examples": 60_000,
    }
    return PlanRecord(**(fields | changes))


def gaussian_cost(noise, steps, order=8):
    """Of an order's budget: the closed form alpha / (2 s^2), as a log-moment."""
    return steps * order * (order - 1) / 2 / noise**2


def budget_of(order, budget):
    """The log-moment of an order that means (epsilon, delta), by Canonne, Kamath and Steinke 2020, proposition 12."""
    return (order - 1) * budget.epsilon + math.log(budget.delta * (order - 1)) - order * math.log(1 - 1 / order)


@pytest.fixture
def path(tmp_path):
    return tmp_path / "ledger.sqlite"


@pytest.fixture
def ledger(path):
    with Ledger.create(path, dataset_name="digits", budget=BUDGET) as made:
        yield made


def test_the_orders_are_part_of_the_ledger(ledger, path):
    with Ledger.open(path) as again:
        assert again.budget == BUDGET == Budget(4.0, 1e-5, (8.0,))
    assert Budget(4.0, 1e-5) != BUDGET


def test_the_order_in_which_orders_are_given_makes_no_difference():
    assert Budget(4.0, 1e-5, orders=(64, 8, 8.0)) == Budget(4.0, 1e-5, orders=(8, 64))


@pytest.mark.parametrize(
    ("orders", "said"),
    [
        ((7.03,), r"orders.*order 7\.03: .* nearest is 7\.$"),
        ((2,), r"orders.*order 2 cannot give epsilon 4 at delta 1e-05, even with nothing spent; the least that can is"),
        ((8, 1.5), r"order 1\.5 cannot give"),
        ((0.0,), "orders"),
        (("8",), "orders"),
        ((math.nan,), "orders"),
    ],
    ids=str,
)
def test_orders_that_cannot_keep_the_budget_are_refused(path, orders, said):
    with pytest.raises(InvalidParameter, match=said):
        Ledger.create(path, dataset_name="d", budget=Budget(4.0, 1e-5, orders=orders))
    assert not path.exists()


def test_a_wrong_epsilon_beside_orders_is_named_first():
    with pytest.raises(InvalidParameter, match=r"Budget\.epsilon = -1"):
        Budget(-1, 1e-5, orders=(8,))


def test_one_plan_is_reported_at_its_own_bound(ledger):
    p = plan()
    for _ in range(3):
        ledger.charge(p, EVENT)
    spent = ledger.spent()
    own = epsilon(Repeated(EVENT, 200), 1e-6, relation=p.relation)
    assert spent.committed_epsilon == own.upper < BUDGET.epsilon
    assert spent.epsilon == epsilon(Repeated(EVENT, 3), 1e-6, relation=p.relation).upper
    assert (spent.delta, spent.steps_charged, spent.steps_planned) == (1e-6, 3, 200)
    assert "renyi_filter" not in spent.accountant


def test_from_the_second_plan_on_the_budget_is_claimed_and_nothing_smaller(ledger):
    first, second = plan(), plan(event=Gaussian(1e4), steps=1)
    ledger.charge(first, EVENT)
    ledger.charge(second, second.event)
    assert ledger.spent() == (4.0, 1e-5, 4.0, "renyi_filter", 2, 201)
    said = statement(ledger)
    assert (said.epsilon, said.committed_epsilon, said.delta, said.budget) == (4.0, 4.0, 1e-5, BUDGET)
    assert said.accountant.startswith("Renyi filter")
    text = " ".join(str(said).split())
    assert "budget: epsilon 4.0, delta 1e-05, kept by a Renyi filter of order 8" in text
    assert "No smaller number may be claimed" in text and "are added" not in text
    assert type(said).model_validate_json(said.model_dump_json()) == said


def test_far_more_plans_fit_than_by_adding_up(path, tmp_path):
    each, order = plan(), best_order(EVENT, 4.0, 1e-5, relation=Relation.ADD_REMOVE)
    admitted = {}
    for name, orders in (("sum", ()), ("filter", (order,))):
        with Ledger.create(tmp_path / name, dataset_name="d", budget=Budget(4.0, 1e-5, orders=orders)) as ledger:
            for number in range(40):
                try:
                    ledger.charge(each.model_copy(update={"plan_id": str(number)}), EVENT)
                except BudgetExceeded:
                    break
                admitted[name] = number + 1
    assert admitted["filter"] >= 3 * admitted["sum"]
    together = Repeated(EVENT, 200 * admitted["filter"])
    assert epsilon(together, 1e-5, relation=Relation.ADD_REMOVE, by="rdp").upper <= 4.0


@pytest.mark.parametrize("orders", [(8,), (4, 32), (16, 64, 128)], ids=str)
@pytest.mark.parametrize("seed", range(3))
def test_plans_are_admitted_at_their_planned_steps_until_an_order_is_full(path, orders, seed):
    draw, budget = random.Random(seed), Budget(4.0, 1e-5, orders=orders)
    room = {order: budget_of(order, budget) for order in orders}
    refused = 0
    with Ledger.create(path, dataset_name="d", budget=budget) as ledger:
        for number in range(25):
            noise, steps = math.exp(draw.uniform(2, 5)), draw.randint(1, 40)
            p = plan(event=Gaussian(noise), steps=steps, plan_id=str(number))
            left = {order: room[order] - gaussian_cost(noise, steps, order) for order in orders}
            assert min(map(abs, left.values())) > 1e-6  # no draw is on the edge
            if min(left.values()) > 0:
                ledger.check(p)
                ledger.charge(p, p.event)  # one step of many: the plan is paid for in full
                room = left
            else:
                refused += 1
                for attempt in (lambda p=p: ledger.check(p), lambda p=p: ledger.charge(p, p.event)):
                    with pytest.raises(BudgetExceeded, match=r"budget of 'd', .* order \d+ from .* % to"):
                        attempt()
        assert refused and len(ledger.plans()) == 25 - refused
        spent = ledger.spent()
        assert (spent.committed_epsilon, spent.delta) <= (budget.epsilon, budget.delta)


def test_what_is_planned_stays_paid_for(ledger):
    big = plan(event=Gaussian(16.0), steps=60)  # of the 178 that fit
    ledger.charge(big, big.event)
    small = plan(event=Gaussian(16.0), steps=120)
    with pytest.raises(BudgetExceeded):
        ledger.charge(small, small.event)
    for _ in range(59):
        ledger.charge(big, big.event)
    with pytest.raises(BudgetExceeded, match="All 60 planned steps"):
        ledger.charge(big, big.event)


def test_a_plan_of_a_larger_delta_than_the_budgets_is_refused(ledger):
    with pytest.raises(BudgetExceeded, match=r"delta 2e-05 is above the budget's 1e-05 of 'digits'"):
        ledger.check(plan(delta=2e-5))
    ledger.check(plan(delta=1e-5))


def test_the_deltas_of_plans_do_not_add_up(ledger):
    for _ in range(3):
        p = plan(delta=1e-5, steps=1)
        ledger.charge(p, p.event)
    assert ledger.spent().delta == 1e-5


def test_a_plan_at_a_tiny_delta_is_covered_by_the_budget(path):
    p = plan(event=Gaussian(3.0), steps=1, delta=1e-40)
    own = epsilon(p.event, p.delta, relation=p.relation).upper
    with Ledger.create(path, dataset_name="d", budget=Budget(own - 1, 1e-5, orders=(16,))) as ledger:
        ledger.charge(p, p.event)
        spent = ledger.spent()
        assert (spent.epsilon, spent.committed_epsilon, spent.delta) == (own - 1, own - 1, 1e-5)
        assert spent.accountant == "renyi_filter"


def test_an_event_without_a_renyi_divergence_is_refused_by_name(ledger):
    p = plan(event=ApproximateDP(0.01, 1e-9), steps=1)
    for attempt in (lambda: ledger.check(p), lambda: ledger.charge(p, p.event)):
        with pytest.raises(Unsupported, match=r"ApproximateDP.*no Renyi divergence of order 8"):
            attempt()
    assert ledger.plans() == []


@pytest.mark.parametrize("changes", [{"unit": "user"}, {"relation": Relation.ZERO_OUT}])
def test_plans_of_another_unit_or_relation_are_refused(ledger, changes):
    ledger.charge(plan(), EVENT)
    with pytest.raises(LedgerError, match="do not add up"):
        ledger.charge(plan(**changes), EVENT)


def test_a_plan_is_resumed_beside_others(ledger, path):
    first, second = plan(steps=3), plan(steps=3)
    for p in (first, second, first, second):
        ledger.charge(p, EVENT)
    with Ledger.open(path) as again:
        assert again.charge(first, EVENT).step == 3
        assert again.spent() == (4.0, 1e-5, 4.0, "renyi_filter", 5, 6)


def test_if_the_moments_were_found_too_small_the_sum_is_reported(ledger, monkeypatch):
    """As by a later version that corrects a bound: the plans do not fit any more, and the budget is not claimed."""
    from accounting import rdp

    plans = [plan(event=Gaussian(16.0), steps=40, plan_id=str(number)) for number in range(3)]
    for p in plans:
        ledger.charge(p, p.event)
    assert ledger.spent().accountant == "renyi_filter"
    true = rdp.step_log_moment
    monkeypatch.setattr(rdp, "step_log_moment", lambda atom, relation: 2 * true(atom, relation))
    spent = ledger.spent()
    assert spent.accountant != "renyi_filter" and spent.delta == 3e-6
    assert spent.committed_epsilon > BUDGET.epsilon
    with pytest.raises(BudgetExceeded):
        ledger.check(plan(event=Gaussian(1e5), steps=1))


def test_a_header_without_orders_is_that_of_every_version(path):
    with Ledger.create(path, dataset_name="d", budget=Budget(4.0, 1e-5)) as ledger:
        [(_, header, _)] = ledger.entries()
    assert json.loads(header) == {"kind": "header", "dataset_name": "d", "budget": {"epsilon": 4.0, "delta": 1e-5}}


def test_a_header_with_orders_names_them(ledger):
    [(_, header, _)] = ledger.entries()
    assert json.loads(header)["budget"] == {"epsilon": 4.0, "delta": 1e-5, "orders": [8.0]}


def entry(kind, **fields):
    return json.dumps({"kind": kind, **fields}).encode()


PLAIN = entry("header", dataset_name="d", budget={"epsilon": 4.0, "delta": 1e-5})
NEWER = plan(plan_id="p").model_dump(mode="json")


@pytest.mark.parametrize(
    "bodies",
    [
        pytest.param([entry("header", dataset_name="d", budget=json.loads(PLAIN)["budget"] | extra)], id=str(extra))
        for extra in ({"orders": [8.00001]}, {"orders": [2.0]}, {"profile": "f"})
    ]
    + [
        pytest.param([PLAIN, entry("plan", **(NEWER | {"event": {"kind": "telepathy"}}))], id="mechanism"),
        pytest.param([PLAIN, entry("plan", **NEWER, seal="x")], id="field of a plan"),
        pytest.param([PLAIN, entry("plan", **(NEWER | {"relation": "friends"}))], id="relation"),
        pytest.param([PLAIN, entry("refund", plan_id="p")], id="kind of entry"),
    ],
)
def test_what_only_a_newer_version_can_have_written_is_refused(path, bodies):
    chain = Chain.create(path, bodies[0], timeout=1.0)
    chain.read()
    for body in bodies[1:]:
        chain.append(lambda unseen, body=body: [body])
    chain.close()
    for read_only in (False, True):
        with pytest.raises(LedgerError, match="Restore it from a backup or upgrade the package"):
            Ledger.open(path, read_only=read_only)


RACE = """
import sys
from accounting import *
EVENT = Gaussian(16.0)
admitted = 0
with Ledger.open(sys.argv[1]) as ledger:
    for number in range(40):
        plan = PlanRecord(EVENT, 4, 1e-6, Relation.ADD_REMOVE, "example", 60_000, plan_id=f"{sys.argv[2]}-{number}")
        try:
            ledger.charge(plan, EVENT)
            admitted += 1
        except BudgetExceeded:
            pass
print(admitted)
"""


@pytest.mark.parametrize("orders", [(8,), ()], ids=["filter", "sum"])
def test_processes_with_plans_of_their_own_share_the_budget_exactly(path, orders):
    """Each begins 4-step plans until none fits: together as many as fit for one process alone."""
    budget = Budget(4.0, 1e-5, orders=orders)
    one = epsilon(Repeated(Gaussian(16.0), 4), 1e-6, relation=Relation.ADD_REMOVE).upper
    fit = budget_of(8, budget) // gaussian_cost(16.0, 4) if orders else min(budget.epsilon // one, 10)
    Ledger.create(path, dataset_name="d", budget=budget).close()
    workers = [
        subprocess.Popen([sys.executable, "-c", RACE, str(path), name], stdout=subprocess.PIPE, text=True)
        for name in ("a", "b")
    ]
    admitted = [int(worker.communicate(timeout=60)[0]) for worker in workers]
    assert sum(admitted) == fit > 1
    with Ledger.open(path) as ledger:
        assert len(ledger.plans()) == fit
        assert ledger.spent().committed_epsilon <= budget.epsilon and ledger.spent().delta <= budget.delta
