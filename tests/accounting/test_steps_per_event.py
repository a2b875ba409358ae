"""A plan whose event covers several steps: an event that was begun counts in full, in every number that is told."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

import accounting
from accounting import Budget, BudgetExceeded, Gaussian, Ledger, OnePass, PlanRecord, Relation, Repeated
from accounting.errors import InvalidParameter

PASS = OnePass(event=Gaussian(noise_multiplier=2.0))


def record(steps: int = 20, steps_per_event: int = 6, delta: float = 1e-3) -> PlanRecord:
    return PlanRecord(
        event=PASS,
        steps=steps,
        delta=delta,
        relation=Relation.ZERO_OUT,
        unit="example",
        num_examples=60,
        plan_id="a plan",
        steps_per_event=steps_per_event,
    )


def cost(passes: int, delta: float = 1e-3) -> float:
    return accounting.epsilon(Repeated(PASS, passes), delta, relation=Relation.ZERO_OUT).upper


@pytest.mark.parametrize(("steps", "passes"), [(0, 0), (1, 1), (5, 1), (6, 1), (7, 2), (12, 2), (13, 3), (20, 4)])
def test_an_event_that_was_begun_counts_in_full(steps: int, passes: int) -> None:
    assert record().event_of(steps) == Repeated(PASS, passes)


def test_the_ledger_counts_charges_and_spends_events(tmp_path: Path) -> None:
    plan, budget = record(), Budget(epsilon=cost(4) * 1.001, delta=1e-3)
    with Ledger.create(tmp_path / "ledger", dataset_name="made up", budget=budget) as ledger:
        for step in range(1, 21):
            ledger.charge(plan, PASS)
            spent = ledger.spent()
            assert spent.steps_charged == step
            assert spent.epsilon == cost(-(-step // 6))
            assert spent.committed_epsilon == cost(4)
        with pytest.raises(BudgetExceeded, match="All 20 planned steps"):
            ledger.charge(plan, PASS)
        stated = accounting.statement(ledger)
        assert stated.epsilon == accounting.round_up(cost(4))
        assert "6 consecutive steps count as one such release" in stated.plans[0].sampling
    with Ledger.open(tmp_path / "ledger") as again:
        assert again.plans() == [(plan, 20)]


def test_a_budget_counts_the_events_of_all_planned_steps(tmp_path: Path) -> None:
    budget = Budget(epsilon=cost(4) * 0.999, delta=1e-3)
    with Ledger.create(tmp_path / "ledger", dataset_name="made up", budget=budget) as ledger:
        with pytest.raises(BudgetExceeded):
            ledger.check(record())
        ledger.check(record(steps=18))


def test_a_filter_of_renyi_orders_holds_the_events(tmp_path: Path) -> None:
    budget = Budget(epsilon=8.0, delta=1e-5, orders=(4.0, 8.0, 16.0))
    with Ledger.create(tmp_path / "ledger", dataset_name="made up", budget=budget) as ledger:
        steps = 6
        while True:
            try:
                ledger.check(record(steps, delta=1e-5))
            except BudgetExceeded:
                break
            steps += 6
        # A plan of as many whole passes, one event each, is refused at the same place.
        passes = record(steps // 6, steps_per_event=1, delta=1e-5)
        with pytest.raises(BudgetExceeded):
            ledger.check(passes)
        ledger.check(record(steps // 6 - 1, steps_per_event=1, delta=1e-5))


def test_a_plan_of_one_step_an_event_is_written_as_it_always_was() -> None:
    plain, several = record(steps_per_event=1), record()
    assert "steps_per_event" not in json.loads(plain.model_dump_json())
    assert PlanRecord(**json.loads(plain.model_dump_json())) == plain
    assert json.loads(several.model_dump_json())["steps_per_event"] == 6
    assert PlanRecord(**json.loads(several.model_dump_json())) == several


@pytest.mark.parametrize("steps_per_event", [0, -1, 1.5])
def test_an_event_covers_a_whole_number_of_steps(steps_per_event: int) -> None:
    with pytest.raises(InvalidParameter, match="steps_per_event"):
        record(steps_per_event=steps_per_event)


def test_a_pass_that_is_longer_than_the_run_takes_no_memory() -> None:
    c = accounting.matrix.square_root(5)
    alone = accounting.matrix.sensitivity(c, 5)
    assert accounting.matrix.sensitivity(c, 5, min_separation=10**15, max_participations=10**15) == pytest.approx(alone)
