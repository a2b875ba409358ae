"""What a statement says of every kind of event: noise, sampling, and what the number takes for granted."""

from __future__ import annotations

import pytest

from accounting import Budget, Ledger, PlanRecord, statement
from accounting.descriptions import caveats, each, noise, sampling
from accounting.events import (
    ApproximateDP,
    BinomialTrials,
    Composed,
    Gaussian,
    Laplace,
    MatrixMechanism,
    OnePass,
    Poisson,
    PoissonTrials,
    PureDP,
    Relation,
    Repeated,
    Select,
    TruncatedNegativeBinomial,
    TruncatedPoisson,
    WithoutReplacement,
)
from accounting.normal_form import normal_form
from accounting.selection import CONDITIONS

SAID = [
    (Gaussian(1.1), "1.1", "none, all units in every step"),
    (Laplace(2.0), "2 (Laplace)", "none, all units in every step"),
    (PureDP(0.25), "not stated, (0.25, 0)-private as it is", "none, all units"),
    (ApproximateDP(0.25, 1e-9), "(0.25, 1e-09)-private", "none, all units"),
    (Poisson(0.01, Gaussian(1.1)), "1.1", "Poisson, rate 0.01"),
    (
        Poisson(0.01, Composed((Repeated(Laplace(2.0), 3), Gaussian(1.1)))),
        "1.1 + 2 (Laplace) (3 times)",
        "Poisson, rate",
    ),
    (TruncatedPoisson(0.01, 600, 50_000, Gaussian(1.1)), "1.1", "larger draws cut to 600 units"),
    (WithoutReplacement(500, 50_000, Gaussian(1.1)), "1.1", "500 of 50000 units without replacement, drawn afresh"),
    (OnePass(Gaussian(1.1)), "1.1", "one pass over the data in fixed or shuffled batches, no amplification"),
    (
        MatrixMechanism(2.0, 3.5, 64, 16),
        "2 (correlated",
        "each unit in at most 16 steps, at least 64 steps apart, no amp",
    ),
    (MatrixMechanism(2.0, 3.5), "sensitivity 3.5)", "each unit in at most 1 step, no amplification"),
    (
        Select(Repeated(Poisson(0.01, Gaussian(1.1)), 9), TruncatedNegativeBinomial(0.0, 0.1)),
        "1.1 (9 times)",
        "a truncated negative binomial number (shape 0, gamma 0.1) of runs, of which the best is released; in a run: "
        "Poisson, rate 0.01 (9 times)",
    ),
    (Select(Gaussian(1.1), PoissonTrials(3.0)), "1.1", "a Poisson number (mean 3) of runs"),
    (Select(Gaussian(1.1), BinomialTrials(7, 0.5)), "1.1", "a binomial number (7 chances of 0.5) of runs"),
    (Composed(()), "none", "none"),
]


@pytest.mark.parametrize(("event", "its_noise", "its_sampling"), SAID, ids=[str(said[0]) for said in SAID])
def test_noise_and_sampling_are_said_of_every_kind(event, its_noise, its_sampling):
    assert its_noise in each(event, noise)
    assert its_sampling in each(event, sampling)


def caveats_of(event):
    return [caveat for atom, _ in normal_form(event) for caveat in caveats(atom)]


@pytest.mark.parametrize(
    ("event", "words"),
    [
        (OnePass(Gaussian(1.0)), "No amplification: batches are shuffled or fixed"),
        (MatrixMechanism(1.0, 2.0), "Assumed: the number of steps was fixed before the first one"),
        (WithoutReplacement(2, 9, Gaussian(1.0)), "Assumed: every batch was drawn afresh"),
        (Poisson(0.1, Composed((Gaussian(1.0), ApproximateDP(0.5, 1e-9)))), "(0.5, 1e-09)-private, as the plan says"),
        (Select(OnePass(Gaussian(1.0)), PoissonTrials(2.0)), "No amplification"),
    ],
    ids=str,
)
def test_what_a_number_takes_for_granted_is_said(event, words):
    assert any(words in caveat for caveat in caveats_of(event))


@pytest.mark.parametrize("event", [Gaussian(1.0), Poisson(0.1, Gaussian(1.0)), Laplace(1.0)], ids=str)
def test_what_is_checked_by_the_trainer_needs_no_caveat(event):
    assert caveats_of(event) == []


def test_every_condition_of_a_selection_is_said():
    said = caveats_of(Select(Gaussian(1.0), PoissonTrials(2.0)))
    assert said == [f"Assumed: {condition}" for condition in CONDITIONS]


@pytest.mark.parametrize(
    ("event", "relation"),
    [
        (OnePass(Gaussian(4.0)), Relation.ZERO_OUT),
        (MatrixMechanism(8.0, 2.0, 4, 2), Relation.REPLACE_ONE),
        (WithoutReplacement(10, 1000, Gaussian(4.0)), Relation.REPLACE_ONE),
        (Select(Poisson(0.01, Gaussian(4.0)), TruncatedNegativeBinomial(0.0, 0.5)), Relation.ADD_REMOVE),
        (Poisson(0.01, Composed((Gaussian(4.0), PureDP(0.1)))), Relation.ADD_REMOVE),
    ],
    ids=str,
)
def test_the_statement_of_a_ledger_says_it_all(tmp_path, event, relation):
    plan = PlanRecord(event, 2, 1e-6, relation, "example", 1000)
    with Ledger.create(tmp_path / "l.sqlite", dataset_name="digits", budget=Budget(50.0, 0.5)) as ledger:
        ledger.charge(plan, event)
        said = statement(ledger)
    assert said.plans[0].sampling == each(event, sampling) and said.plans[0].noise_multiplier == each(event, noise)
    assert set(caveats_of(event)) <= set(said.caveats)
    for caveat in caveats_of(event):
        assert caveat in " ".join(str(said).split())
