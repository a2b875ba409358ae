"""``dpkit compare``: every accountant and every library in one table, and what a contradiction does."""

from __future__ import annotations

import pytest

import accounting
from accounting import Check

from .conftest import Run

NUMBERS = ("--noise-multiplier", "2", "--sample-rate", "0.05", "--steps", "20", "--delta", "1e-5")


def test_all_accountants_and_libraries_stand_in_one_table(dpkit: Run):
    done = dpkit("compare", *NUMBERS, "--json")
    assert done.code == 0
    assert done.json["contradicted"] is False
    asked = {(row["library"], row["method"]) for row in done.json["rows"]}
    checks = accounting.crosscheck(accounting.Gaussian(1.0), 0.1, relation=accounting.Relation.ADD_REMOVE)
    assert asked >= {("dpkit", "rdp")} | {(check.library, check.method) for check in checks}
    ours = [row["upper"] for row in done.json["rows"] if row["library"] == "dpkit"]
    assert done.json["epsilon"] == pytest.approx(min(ours), abs=1e-4)
    for row in done.json["rows"]:
        assert row["verdict"] in ("agrees", "no answer")
        assert row["verdict"] != "no answer" or row["note"]


def test_the_text_has_the_meaning_and_the_table(dpkit: Run):
    text = dpkit("compare", *NUMBERS).out
    for word in ("delta = 1e-05", "one example", "add_remove", "Poisson", "accountant", "dpkit", "dp-accounting"):
        assert word in text


@pytest.mark.parametrize(
    ("lower", "upper", "code", "verdict"),
    [
        pytest.param(1e3, 1e4, 4, "CONTRADICTS", id="proves more than we report"),
        pytest.param(0.0, -1.0, 0, "below our lower bound", id="claims less than can be"),
        pytest.param(None, 1e4, 0, "agrees", id="looser"),
        pytest.param(None, None, 0, "no answer", id="silent"),
    ],
)
def test_a_judge_that_disagrees_is_marked(
    dpkit: Run, monkeypatch: pytest.MonkeyPatch, lower: float | None, upper: float | None, code: int, verdict: str
):
    judge = Check("oracle", "1.0", "delphi", lower, upper, "its note")
    monkeypatch.setattr(accounting, "crosscheck", lambda *_, **__: [judge])
    done = dpkit("compare", *NUMBERS, "--json")
    assert done.code == code
    assert done.json["contradicted"] is (code == 4)
    assert done.json["rows"][-1]["verdict"] == verdict
    assert ("oracle 1.0 (delphi) proves" in done.err) == (code == 4)


def test_a_planned_run_is_compared_by_its_ledger(dpkit: Run, tmp_path):
    event = accounting.Poisson(0.05, accounting.Gaussian(2.0))
    plan = accounting.PlanRecord(event, 20, 1e-5, accounting.Relation.ADD_REMOVE, "example", 1000)
    budget = accounting.Budget(epsilon=100.0, delta=1e-4)
    with accounting.Ledger.create(tmp_path / "ledger.sqlite", dataset_name="d", budget=budget) as ledger:
        empty = dpkit("compare", tmp_path)
        assert empty.code == 1 and "0 runs" in empty.err
        ledger.charge(plan, event)
    by_plan, by_numbers = dpkit("compare", tmp_path, "--json").json, dpkit("compare", *NUMBERS, "--json").json
    assert by_plan["rows"] == by_numbers["rows"]
    assert (by_plan["epsilon"], by_plan["steps"]) == (by_numbers["epsilon"], 20)
