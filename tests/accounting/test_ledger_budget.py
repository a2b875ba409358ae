"""What the ledger lets pass: plans within the budget, their planned steps, one release per receipt."""

from __future__ import annotations

import copy
import hashlib
import json
import math
import pickle
import sqlite3
import stat
import threading
from contextlib import closing

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
    epsilon,
)

EVENT = Poisson(0.01, Gaussian(1.0))


def plan(**changes):
    fields = {
        "event": EVENT,
        "steps": 20,
        "delta": 1e-6,
        "relation": Relation.ADD_REMOVE,
        "unit": "example",
        "num_examples": 60_000,
        "facts": {"max_grad_norm": 1.0, "certified": True, "caveats": ["a", "b"], "seed": None, "n": 3},
    }
    return PlanRecord(**(fields | changes))


def cost(record):
    return epsilon(Repeated(record.event, record.steps), record.delta, relation=record.relation).upper


@pytest.fixture
def path(tmp_path):
    return tmp_path / "ledger.sqlite"


@pytest.fixture
def ledger(path):
    with Ledger.create(path, dataset_name="digits", budget=Budget(8.0, 1e-5)) as made:
        yield made


def test_a_new_ledger_is_empty_private_and_reopens_as_it_was(ledger, path):
    assert stat.S_IMODE(path.stat().st_mode) == 0o600
    assert ledger.spent() == (0.0, 0.0, 0.0, "none", 0, 0)
    with Ledger.open(path, dataset_name="digits") as again:
        assert (again.dataset_name, again.budget, again.plans()) == ("digits", Budget(8.0, 1e-5), [])
        assert again.anchor() == ledger.anchor() and again.anchor()[0] == 0


def test_charges_are_counted_and_survive_reopening(ledger, path):
    p = plan()
    receipts = [ledger.charge(p, p.event) for _ in range(5)]
    assert [r.step for r in receipts] == [1, 2, 3, 4, 5]
    assert [r.sequence for r in receipts] == [2, 3, 4, 5, 6]  # entry 0: header, entry 1: the plan
    assert (receipts[-1].sequence, receipts[-1].digest) == ledger.anchor()
    with Ledger.open(path) as again:
        assert again.plans() == [(p, 5)] == ledger.plans()


def test_epsilon_spent_is_that_of_the_charges_and_committed_that_of_the_plan(ledger):
    p = plan()
    for _ in range(3):
        ledger.charge(p, EVENT)
    spent = ledger.spent()
    assert spent.epsilon == cost(plan(steps=3)) and spent.committed_epsilon == cost(p)
    assert (spent.delta, spent.accountant, spent.steps_charged, spent.steps_planned) == (1e-6, "prv", 3, 20)


def test_one_charge_more_than_planned_is_refused_and_charges_nothing(ledger):
    p = plan(steps=3)
    for _ in range(3):
        ledger.charge(p, EVENT)
    before = ledger.anchor()
    for attempt in (lambda: ledger.charge(p, EVENT), lambda: ledger.check(p)):
        with pytest.raises(BudgetExceeded, match="3 planned steps"):
            attempt()
    assert ledger.anchor() == before


def test_an_event_that_is_not_the_plans_is_refused(ledger):
    with pytest.raises(LedgerError, match="but the plan says"):
        ledger.charge(plan(), Poisson(0.01, Gaussian(0.99)))
    assert ledger.plans() == []


def test_a_plan_never_changes(ledger):
    p = plan()
    ledger.charge(p, EVENT)
    for changes in ({"steps": 21}, {"delta": 2e-6}, {"facts": {}}, {"num_examples": 59_999}):
        with pytest.raises(LedgerError, match=next(iter(changes))):
            ledger.charge(p.model_copy(update=changes), EVENT)
    assert ledger.charge(plan(plan_id=p.plan_id), EVENT).step == 2  # the same content is the same plan


def test_plans_add_up_and_what_does_not_fit_is_refused(path):
    first, second = plan(), plan()
    with Ledger.create(path, dataset_name="d", budget=Budget(2 * cost(first), 2e-6)) as ledger:
        ledger.charge(first, EVENT)
        ledger.check(second)
        ledger.charge(second, EVENT)
        assert ledger.spent().epsilon == ledger.spent().committed_epsilon == 2 * cost(first)
        assert ledger.spent().delta == 2e-6
        for third in (plan(), plan(steps=1), plan(event=Gaussian(1e4), steps=1, delta=1e-9)):
            with pytest.raises(BudgetExceeded, match="budget"):
                ledger.check(third)
            with pytest.raises(BudgetExceeded):
                ledger.charge(third, third.event)
        # What is planned stays paid for: the plans that began may go on to their end.
        assert ledger.charge(first, EVENT).step == 2
        assert len(ledger.plans()) == 2


def test_the_deltas_add_up_too(path):
    with Ledger.create(path, dataset_name="d", budget=Budget(100.0, 1.5e-6)) as ledger:
        ledger.charge(plan(), EVENT)
        with pytest.raises(BudgetExceeded, match="delta"):
            ledger.check(plan())


@pytest.mark.parametrize("changes", [{"unit": "user"}, {"relation": Relation.ZERO_OUT}])
def test_plans_of_another_unit_or_relation_are_refused(ledger, changes):
    ledger.charge(plan(), EVENT)
    with pytest.raises(LedgerError, match="do not add up"):
        ledger.charge(plan(**changes), EVENT)


def test_a_receipt_buys_one_release(ledger):
    receipt = ledger.charge(plan(), EVENT)
    receipt.consume()
    with pytest.raises(LedgerError, match="used before"):
        receipt.consume()


def test_a_receipt_cannot_be_copied(ledger):
    receipt = ledger.charge(plan(), EVENT)
    for clone in (copy.copy, copy.deepcopy, pickle.dumps):
        with pytest.raises(LedgerError, match="copied"):
            clone(receipt)


def test_another_open_ledger_sees_the_charges_at_once(ledger, path):
    p = plan(steps=4)
    with Ledger.open(path) as other, Ledger.open(path, read_only=True) as reader:
        assert [who.charge(p, EVENT).step for who in (ledger, other, other, ledger)] == [1, 2, 3, 4]
        assert reader.plans() == [(p, 4)] == other.plans()
        with pytest.raises(BudgetExceeded):
            other.charge(p, EVENT)


def test_threads_share_one_ledger(ledger):
    p, steps = plan(steps=100), []

    def charge():
        steps.extend(ledger.charge(p, EVENT).step for _ in range(25))

    threads = [threading.Thread(target=charge) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert sorted(steps) == list(range(1, 101))


def test_an_anchor_is_found_again_and_a_foreign_one_is_not(ledger, path):
    anchor = ledger.anchor()
    ledger.charge(plan(), EVENT)
    ledger.check_anchor(*anchor)
    ledger.check_anchor(*ledger.anchor())
    for sequence, digest in ((99, anchor[1]), (0, "00" * 32), (1, anchor[1])):
        with pytest.raises(LedgerError, match="older copy"):
            ledger.check_anchor(sequence, digest)


def interrupt_the_next_look(ledger, path, p, monkeypatch):
    """Another writer charges ``p`` once, and the look at it is interrupted between its two entries."""
    with Ledger.open(path) as other:
        other.charge(p, EVENT)
    taken = 0

    def interrupted(self, body, original=Ledger._take):
        nonlocal taken
        taken += 1
        if taken == 2:
            raise KeyboardInterrupt
        original(self, body)

    monkeypatch.setattr(Ledger, "_take", interrupted)
    with pytest.raises(KeyboardInterrupt):
        ledger.plans()
    monkeypatch.undo()


def test_an_interrupt_between_two_lines_heals_itself(ledger, path, monkeypatch):
    p = plan()
    interrupt_the_next_look(ledger, path, p, monkeypatch)
    assert ledger.plans() == [(p, 1)]
    assert ledger.charge(p, EVENT).step == 2


@pytest.mark.parametrize("again", [0, 1, 2])
def test_what_was_seen_before_an_interrupt_must_be_there_after_it(ledger, path, monkeypatch, again):
    p, before = plan(), path.read_bytes()
    interrupt_the_next_look(ledger, path, p, monkeypatch)
    path.write_bytes(before)
    path.with_name(f"{path.name}.tip").unlink()  # with its note, the older copy would not open
    if again:  # as long as it was, or longer, but not the same
        with Ledger.open(path) as other:
            for _ in range(again):
                other.charge(q := plan(plan_id="q"), q.event)
    with pytest.raises(LedgerError, match="damaged"):
        ledger.charge(p, EVENT)


def test_deltas_add_up_as_the_decimals_that_were_typed(path):
    # In doubles, 3 * 1e-5 is 3.0000000000000004e-05.
    with Ledger.create(path, dataset_name="d", budget=Budget(100.0, 3e-5)) as ledger:
        for _ in range(3):
            ledger.charge(p := plan(delta=1e-5), p.event)
        assert ledger.spent().delta == 3e-5
        with pytest.raises(BudgetExceeded, match="delta 1e-25 and the 3e-05 of"):
            ledger.check(plan(delta=1e-25))


def test_ten_equal_plans_fit_a_budget_of_ten_times_their_cost(path):
    each = cost(plan())
    with Ledger.create(path, dataset_name="d", budget=Budget(math.nextafter(10 * each, math.inf), 1e-4)) as ledger:
        for _ in range(10):
            ledger.charge(p := plan(), p.event)
        assert ledger.spent().committed_epsilon <= ledger.budget.epsilon
        with pytest.raises(BudgetExceeded, match="over the budget"):
            ledger.check(plan(steps=1))


def test_ledgers_are_made_with_names_and_budgets_only(path):
    with pytest.raises(InvalidParameter):
        Ledger.create(path, dataset_name="", budget=Budget(1.0, 1e-5))
    assert not path.exists()


def test_a_read_only_ledger_does_not_charge(ledger, path):
    with Ledger.open(path, read_only=True) as reader, pytest.raises(LedgerError, match="read_only"):
        reader.charge(plan(), EVENT)


def test_a_plan_is_found_by_its_id_with_its_charges(ledger, path):
    first, second = plan(), plan(event=Poisson(0.02, Gaussian(2.0)))
    assert ledger.find_plan(first.plan_id) is None
    for _ in range(3):
        ledger.charge(first, first.event)
    ledger.charge(second, second.event)
    assert ledger.find_plan(first.plan_id) == (first, 3)
    assert ledger.find_plan(second.plan_id) == (second, 1)
    assert ledger.find_plan(first.plan_id[:8]) is None
    with Ledger.open(path, read_only=True) as reader:
        ledger.charge(first, first.event)  # another process goes on
        assert reader.find_plan(first.plan_id) == (first, 4)


def test_the_entries_are_what_was_hashed(ledger):
    record = plan()
    receipts = [ledger.charge(record, record.event) for _ in range(3)]
    entries = list(ledger.entries())
    assert [sequence for sequence, _, _ in entries] == list(range(5))
    assert [json.loads(body)["kind"] for _, body, _ in entries] == ["header", "plan", "charge", "charge", "charge"]
    before = bytes(32)
    for _, body, digest in entries:
        before = hashlib.sha256(before + body).digest()
        assert before.hex() == digest
    assert ledger.anchor() == (entries[-1][0], entries[-1][2])
    assert [receipt.digest for receipt in receipts] == [digest for _, _, digest in entries[2:]]


def test_entries_of_a_ledger_that_was_changed_are_not_given(ledger, path):
    record = plan()
    for _ in range(3):
        ledger.charge(record, record.event)
    with closing(sqlite3.connect(path)) as other, other:
        other.execute("UPDATE entries SET body = CAST(replace(body, '\"step\":2', '\"step\":9') AS BLOB)")
    with pytest.raises(LedgerError, match="the chain breaks at entry 3"):
        ledger.entries()
