"""Events, budgets and plans: checked when made, equal by content, the same after JSON."""

from __future__ import annotations

import json
import subprocess
import sys

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import accounting
from accounting import Budget, InvalidParameter, LedgerError, PlanRecord, Unsupported, normal_form
from accounting.events import (
    ApproximateDP,
    BinomialTrials,
    Composed,
    DiscreteGaussian,
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
    event_from_json,
    event_to_json,
)
from accounting.normal_form import atoms_under

EVENTS = [
    Gaussian(1.0),
    Poisson(0.01, Gaussian(0.7)),
    TruncatedPoisson(0.01, 600, 50_000, Gaussian(1.1)),
    Repeated(Poisson(0.5, Composed((Gaussian(1.0), Gaussian(8.0)))), 1000),
    Composed(()),
    Composed((Repeated(Gaussian(3), 0), Poisson(1, Gaussian(2)))),
    Laplace(2.5),
    DiscreteGaussian(2.5),
    Poisson(0.01, Composed((DiscreteGaussian(1.0), DiscreteGaussian(1.0), Gaussian(2.0)))),
    ApproximateDP(0.3, 1e-7),
    PureDP(0.0),
    Poisson(0.01, Composed((Gaussian(1.0), PureDP(0.1)))),
    WithoutReplacement(500, 50_000, Gaussian(1.0)),
    Repeated(OnePass(Gaussian(4.0)), 3),
    MatrixMechanism(2.0, 3.5, 64, 16),
    MatrixMechanism(2.0, 3.5),
    Select(Repeated(Poisson(0.01, Gaussian(1.0)), 100), TruncatedNegativeBinomial(0, 0.1)),
    Select(Gaussian(1.0), TruncatedNegativeBinomial(-0.5, 0.1)),
    Select(Gaussian(1.0), PoissonTrials(10.0)),
    Select(Select(Gaussian(1.0), BinomialTrials(10, 0.5)), PoissonTrials(1.0)),
]


def made(make, *fields):
    return st.tuples(*fields).map(lambda values: make(*values))


multipliers = st.floats(1e-99, 1e99, exclude_min=True)
shares = st.floats(0.0, 1.0)
inside = st.floats(0.0, 1.0, exclude_min=True, exclude_max=True)
epsilons = st.floats(0.0, 1e99)
counts = st.integers(1, 2**53 - 1)
plain = st.one_of(
    made(Gaussian, multipliers),
    made(Laplace, multipliers),
    made(DiscreteGaussian, multipliers),
    made(ApproximateDP, epsilons, st.floats(0.0, 1.0, exclude_max=True)),
    made(PureDP, epsilons),
    made(MatrixMechanism, multipliers, multipliers, counts, counts),
)
laws = st.one_of(
    made(TruncatedNegativeBinomial, st.floats(-1.0, 1e99, exclude_min=True), inside),
    made(PoissonTrials, multipliers),
    made(BinomialTrials, counts, inside),
)
events = st.recursive(
    plain,
    lambda inner: st.one_of(
        made(Poisson, shares, inner),
        made(TruncatedPoisson, shares, counts, counts, inner),
        made(lambda size, more, event: WithoutReplacement(size, size + more, event), *[st.integers(1, 9)] * 2, inner),
        made(OnePass, inner),
        made(Select, inner, laws),
        made(Repeated, inner, counts),
        made(lambda parts: Composed(tuple(parts)), st.lists(inner, max_size=3)),
    ),
    max_leaves=8,
)


def nested(depth):
    event = Gaussian(1.0)
    for _ in range(depth):
        event = Composed((event,))
    return event


def test_every_nesting_event_counts_towards_the_depth():
    for wrap in (
        OnePass,
        lambda event: Select(event, PoissonTrials(1.0)),
        lambda event: WithoutReplacement(1, 2, event),
        lambda event: Poisson(0.5, event),
        lambda event: TruncatedPoisson(0.5, 1, 2, event),
        lambda event: Repeated(event, 2),
    ):
        wrap(nested(49))
        with pytest.raises(InvalidParameter, match="at most 50 deep"):
            wrap(nested(50))


def test_the_deepest_event_still_goes_through_everything(tmp_path):
    event = nested(50)
    assert event_from_json(event_to_json(event)) == event and len({event, nested(50)}) == 1
    assert normal_form(event) == [(Gaussian(1.0), 1)]
    event = nested(49)  # a plan repeats it
    plan = PlanRecord(event, 1, 1e-5, Relation.ADD_REMOVE, "example", 10)
    with accounting.Ledger.create(tmp_path / "l", dataset_name="d", budget=Budget(100.0, 1e-5)) as ledger:
        ledger.charge(plan, event)
    with accounting.Ledger.open(tmp_path / "l") as ledger:
        assert ledger.plans() == [(plan, 1)]


def test_json_that_nests_too_deep_is_refused():
    for depth in (51, 3000):
        text = '{"kind":"composed","events":[' * depth + "]}" * depth
        with pytest.raises(LedgerError):
            event_from_json('{"version":1,"event":' + text + "}")


def test_more_releases_than_can_be_counted_are_refused():
    event = Gaussian(1.0)
    for _ in range(40):
        event = Repeated(event, 2**52)
    for many in (event, Repeated(Repeated(Gaussian(1.0), 2**27), 2**26)):
        with pytest.raises(InvalidParameter, match="counts"):
            normal_form(many)
        with pytest.raises(InvalidParameter, match="counts"):
            accounting.epsilon(many, 1e-5, relation="add_remove")


@pytest.mark.parametrize("event", EVENTS, ids=str)
def test_an_event_is_the_same_after_json(event):
    assert event_from_json(event_to_json(event)) == event
    assert hash(event_from_json(event_to_json(event))) == hash(event)


@given(event=events)
@settings(derandomize=True, max_examples=200, deadline=None)
def test_any_event_is_the_same_after_json(event):
    assert event_from_json(event_to_json(event)) == event


@given(event=events, relation=st.sampled_from(Relation))
@settings(derandomize=True, max_examples=300, deadline=None)
def test_any_event_has_atoms_or_a_typed_error(event, relation):
    try:
        atoms = atoms_under(event, relation)
    except (Unsupported, InvalidParameter) as error:
        assert str(error).endswith(".")
    else:
        kinds = {
            "gaussian",
            "discrete_gaussian",
            "laplace",
            "approximate_dp",
            "poisson",
            "truncated_poisson",
            "without_replacement",
            "select",
        }
        assert all(atom.kind in kinds and 1 <= count < 2**53 for atom, count in atoms)


@pytest.mark.parametrize(
    "make",
    [
        lambda: Gaussian(0.0),
        lambda: Gaussian(-1.0),
        lambda: Gaussian(float("nan")),
        lambda: Gaussian(float("inf")),
        lambda: Gaussian(1e-200),
        lambda: Gaussian("1.0"),
        lambda: Gaussian(True),
        Gaussian,
        lambda: Gaussian(1.0, 2.0),
        lambda: Gaussian(1.0, noise_multiplier=2.0),
        lambda: Gaussian(1.0, seed=3),
        lambda: Poisson(-0.1, Gaussian(1.0)),
        lambda: Poisson(1.1, Gaussian(1.0)),
        lambda: Poisson(float("nan"), Gaussian(1.0)),
        lambda: Poisson(0.1, 1.0),
        lambda: Poisson(0.1, {"kind": "gaussian", "noise_multiplier": -1}),
        lambda: TruncatedPoisson(0.1, 0, 10, Gaussian(1.0)),
        lambda: TruncatedPoisson(0.1, 5, -1, Gaussian(1.0)),
        lambda: Repeated(Gaussian(1.0), -1),
        lambda: Repeated(Gaussian(1.0), 1.5),
        lambda: Composed((Gaussian(1.0), 3)),
        lambda: Laplace(0.0),
        lambda: ApproximateDP(-0.1, 0.0),
        lambda: ApproximateDP(float("inf"), 0.0),
        lambda: ApproximateDP(1.0, 1.0),
        lambda: ApproximateDP(1.0, -1e-9),
        lambda: PureDP(float("nan")),
        lambda: WithoutReplacement(0, 10, Gaussian(1.0)),
        lambda: WithoutReplacement(11, 10, Gaussian(1.0)),
        lambda: MatrixMechanism(1.0, 0.0),
        lambda: MatrixMechanism(1.0, 1.0, 0),
        lambda: OnePass(TruncatedNegativeBinomial(1.0, 0.1)),
        lambda: Select(Gaussian(1.0), 20),
        lambda: Select(Gaussian(1.0), Gaussian(1.0)),
        lambda: TruncatedNegativeBinomial(-1.0, 0.1),
        lambda: TruncatedNegativeBinomial(1.0, 0.0),
        lambda: TruncatedNegativeBinomial(1.0, 1.0),
        lambda: PoissonTrials(0.0),
        lambda: BinomialTrials(0, 0.5),
        lambda: BinomialTrials(10, 1.0),
        lambda: Budget(0.0, 1e-5),
        lambda: Budget(1.0, 0.0),
        lambda: Budget(1.0, 1.0),
        lambda: PlanRecord(Gaussian(1.0), 0, 1e-5, Relation.ADD_REMOVE, "example", 10),
        lambda: PlanRecord(Gaussian(1.0), 1, 1e-5, "sideways", "example", 10),
        lambda: PlanRecord(Gaussian(1.0), 1, 1e-5, Relation.ADD_REMOVE, "", 10),
        lambda: PlanRecord(Gaussian(1.0), 1, 1e-5, Relation.ADD_REMOVE, "example", 0),
        lambda: PlanRecord(Gaussian(1.0), 1, 1e-5, Relation.ADD_REMOVE, "example", 10, {"a": 10**5000}),
        lambda: Repeated(Gaussian(1.0), 10**5000),
        lambda: Gaussian(10**5000),
        lambda: nested(51),
        lambda: nested(2000),
    ],
)
def test_a_wrong_number_raises_one_typed_error_that_names_the_class(make):
    with pytest.raises(InvalidParameter, match=r"^[A-Z][A-Za-z]+([.:]| = | takes )"):
        make()


def test_a_batch_larger_than_the_data_names_both_numbers_and_the_way_out():
    with pytest.raises(InvalidParameter, match="batch_size 11 is above num_examples 10; draw fewer"):
        WithoutReplacement(11, 10, Gaussian(1.0))


def test_numpy_numbers_are_numbers():
    assert Repeated(Gaussian(np.float32(0.5)), np.int64(3)) == Repeated(Gaussian(0.5), 3)
    assert ApproximateDP(np.float32(0.5), np.float64(0.25)) == ApproximateDP(0.5, 0.25)
    assert TruncatedNegativeBinomial(np.int64(0), np.float32(0.5)) == TruncatedNegativeBinomial(0.0, 0.5)


def test_values_are_frozen():
    with pytest.raises(Exception, match="frozen"):
        EVENTS[0].noise_multiplier = 2.0


def test_a_newer_version_and_an_unknown_kind_are_unsupported():
    newer = json.loads(event_to_json(EVENTS[1])) | {"version": 4}
    with pytest.raises(Unsupported, match="version 4; this package reads up to 3. Upgrade"):
        event_from_json(json.dumps(newer))
    for text in (
        '{"version":2,"event":{"kind":"staircase","scale":1}}',
        '{"version":2,"event":{"kind":"poisson","sample_rate":0.1,"event":{"kind":"staircase","scale":1}}}',
        '{"version":2,"event":{"kind":"select","event":{"kind":"gaussian","noise_multiplier":1},'
        '"trials":{"law":"staircase"}}}',
    ):
        with pytest.raises(Unsupported, match="staircase"):
            event_from_json(text)


def test_what_the_first_version_wrote_is_read():
    text = (
        '{"version":1,"event":{"event":{"sample_rate":0.01,"cap":600,"max_examples":50000,'
        '"event":{"noise_multiplier":1.1,"kind":"gaussian"},"kind":"truncated_poisson"},"count":7,"kind":"repeated"}}'
    )
    assert event_from_json(text) == Repeated(TruncatedPoisson(0.01, 600, 50_000, Gaussian(1.1)), 7)


@pytest.mark.parametrize(
    "text",
    ["", "{", "[]", "{}", '{"version":1}', '{"version":1,"event":{"kind":"gaussian","noise_multiplier":-1}}', b"\xff"],
)
def test_text_that_is_no_event_is_refused(text):
    with pytest.raises(LedgerError):
        event_from_json(text)


def test_importing_accounting_loads_neither_torch_nor_the_slow_parts_of_scipy():
    code = (
        "import sys, accounting;"
        "print([m for m in ('torch', 'opacus', 'dpkit', 'scipy.special', 'scipy.stats') if m in sys.modules])"
    )
    ran = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert ran.stdout.strip() == "[]"


def test_the_public_names_are_all_there():
    for name in ("epsilon", "delta", "Ledger", "statement", "calibrate_noise_multiplier", "crosscheck", "round_up"):
        assert hasattr(accounting, name)
