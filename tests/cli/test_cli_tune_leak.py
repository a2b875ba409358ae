"""``dpkit tune-leak``: what a search costs, and which claims about it are refused."""

from __future__ import annotations

import pytest

import accounting
from accounting import selection
from accounting.events import BinomialTrials, PoissonTrials, Select

from .conftest import Run

NUMBERS = ("--noise-multiplier", "4.2247", "--sampling", "full", "--steps", "1", "--delta", "1e-6")
BASE = accounting.Repeated(accounting.Gaussian(4.2247), 1)
ADD_REMOVE = accounting.Relation.ADD_REMOVE
LAWS = {
    "tnb": (("--mean", "10", "--shape", "0.5"), lambda: selection.truncated_negative_binomial(10.0, 0.5)),
    "logarithmic": (("--mean", "10"), lambda: selection.logarithmic(10.0)),
    "geometric": (("--mean", "10"), lambda: selection.geometric(10.0)),
    "poisson": (("--mean", "10"), lambda: PoissonTrials(10.0)),
    "binomial": (("--count", "20", "--probability", "0.5"), lambda: BinomialTrials(20, 0.5)),
}


@pytest.mark.parametrize("law", LAWS)
def test_a_law_costs_what_the_accountant_says_of_the_selection(dpkit: Run, law: str):
    options, trials = LAWS[law]
    done = dpkit("tune-leak", *NUMBERS, "--trials-law", law, *options, "--json")
    assert done.code == 0, done.err
    bound = accounting.epsilon(Select(BASE, trials()), 1e-6, relation=ADD_REMOVE)
    assert done.json["epsilon"] == pytest.approx(bound.upper, abs=1e-4)
    assert done.json["epsilon"] >= bound.upper
    assert done.json["accountant"] == bound.accountant
    assert done.json["conditions"] == list(selection.CONDITIONS)
    assert done.json["expected_trials"] == pytest.approx(10.0)
    for name in ("delta", "unit", "relation", "sampling", "slack", "lower"):
        assert name in done.json


def test_one_trial_the_best_of_ten_and_all_of_ten(dpkit: Run):
    """PAPERS.md 4.3, table B: 1 alone, at most 1.457 and at least 1.115 for the best, 3.525 for all (delta 1e-6)."""
    done = dpkit("tune-leak", *NUMBERS, "--trials-law", "logarithmic", "--mean", "10", "--json").json
    assert done["epsilon_of_one_trial"] == pytest.approx(1.0, abs=2e-3)
    assert 1.115 <= done["epsilon"] <= 1.458
    assert done["epsilon_if_all_were_released"] == pytest.approx(3.525, abs=2e-3)


@pytest.mark.parametrize("how", ["--grid", "--adaptive"])
def test_a_fixed_number_of_trials_is_full_composition_and_says_so(dpkit: Run, how: str):
    done = dpkit("tune-leak", *NUMBERS, how, "10", "--json")
    assert done.json["epsilon"] == done.json["epsilon_if_all_were_released"]
    assert done.json["epsilon"] == pytest.approx(3.525, abs=2e-3)
    assert done.json["charged_as"].startswith("Full composition of 10 trials")
    assert "Full composition of 10 trials" in dpkit("tune-leak", *NUMBERS, how, "10").out
    everything = dpkit("tune-leak", *NUMBERS, how, "10", "--released", "all", "--json").json
    assert everything["epsilon"] == done.json["epsilon"]


def test_the_text_has_all_numbers_and_the_conditions(dpkit: Run):
    text = " ".join(dpkit("tune-leak", *NUMBERS, "--trials-law", "geometric", "--mean", "10").out.split())
    for condition in selection.CONDITIONS:
        assert " ".join(condition.split()) in text
    for word in ("one trial alone", "all of 10 trials released", "It holds if", "delta = 1e-06", "one example"):
        assert word in text


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ((), "exactly one of --trials-law, --grid and --adaptive"),
        (("--grid", "3", "--adaptive", "3"), "exactly one of"),
        (("--grid", "3", "--trials-law", "geometric", "--mean", "3"), "exactly one of"),
        (("--grid", "3", "--mean", "3"), "--mean"),
        (("--grid", "0"), "--grid is 0"),
        (("--adaptive", "-1"), "--adaptive is -1"),
        (("--trials-law", "geometric"), "takes --mean"),
        (("--trials-law", "geometric", "--mean", "3", "--shape", "1"), "takes --mean"),
        (("--trials-law", "geometric", "--mean", "0.5"), "--mean is 0.5"),
        (("--trials-law", "geometric", "--mean", "nan"), "--mean is nan"),
        (("--trials-law", "tnb", "--mean", "3"), "--mean and --shape"),
        (("--trials-law", "tnb", "--mean", "3", "--shape", "-1"), "shape"),
        (("--trials-law", "poisson", "--mean", "-3"), "mean"),
        (("--trials-law", "poisson", "--mean", "nan"), "mean"),
        (("--trials-law", "binomial", "--mean", "3"), "--count and --probability"),
        (("--trials-law", "binomial", "--count", "3", "--probability", "1.5"), "probability"),
        (("--trials-law", "always-20", "--mean", "20"), "always-20"),
        (("--trials-law", "geometric", "--mean", "3", "--scores", "private"), "--scores private"),
        (("--grid", "3", "--scores", "private"), "--scores private"),
        (("--trials-law", "geometric", "--mean", "3", "--released", "all"), "--grid K"),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, tuple) else "",
)
def test_a_claim_whose_conditions_fail_is_refused(dpkit: Run, options: tuple[str, ...], said: str):
    done = dpkit("tune-leak", *NUMBERS, *options)
    assert (done.code, done.out) == (1, "")
    assert said in done.err
    assert done.err.count("\n") == 1


def test_the_plan_of_a_run_folder_is_one_trial(dpkit: Run, tmp_path):
    event = accounting.Poisson(0.1, accounting.Gaussian(3.0))
    plan = accounting.PlanRecord(event, 50, 1e-5, ADD_REMOVE, "example", 1000)
    budget = accounting.Budget(epsilon=100.0, delta=1e-4)
    with accounting.Ledger.create(tmp_path / "ledger.sqlite", dataset_name="d", budget=budget) as ledger:
        ledger.charge(plan, event)
        planned = ledger.spent().committed_epsilon
    done = dpkit("tune-leak", tmp_path, "--grid", "3", "--json").json
    assert done["epsilon_of_one_trial"] == pytest.approx(planned, abs=1e-4)
    assert done["source"] == str(tmp_path / "ledger.sqlite")
