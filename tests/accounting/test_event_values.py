"""Events, budgets and plans: checked when made, equal by content, the same after JSON; normal form."""

from __future__ import annotations

import json
import subprocess
import sys

import numpy as np
import pytest

import accounting
from accounting import (
    Budget,
    Composed,
    Gaussian,
    InvalidParameter,
    LedgerError,
    PlanRecord,
    Poisson,
    Relation,
    Repeated,
    TruncatedPoisson,
    Unsupported,
    event_from_json,
    event_to_json,
    normal_form,
)

EVENTS = [
    Gaussian(1.0),
    Poisson(0.01, Gaussian(0.7)),
    TruncatedPoisson(0.01, 600, 50_000, Gaussian(1.1)),
    Repeated(Poisson(0.5, Composed((Gaussian(1.0), Gaussian(8.0)))), 1000),
    Composed(()),
    Composed((Repeated(Gaussian(3), 0), Poisson(1, Gaussian(2)))),
]


def nested(depth):
    event = Gaussian(1.0)
    for _ in range(depth):
        event = Composed((event,))
    return event


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
    with pytest.raises(InvalidParameter, match=r"^(Gaussian|Poisson|Truncated|Repeated|Composed|Budget|PlanRecord)"):
        make()


def test_numpy_numbers_are_numbers():
    assert Repeated(Gaussian(np.float32(0.5)), np.int64(3)) == Repeated(Gaussian(0.5), 3)


def test_values_are_frozen():
    with pytest.raises(Exception, match="frozen"):
        EVENTS[0].noise_multiplier = 2.0


def test_a_newer_version_and_an_unknown_kind_are_unsupported():
    newer = json.loads(event_to_json(EVENTS[1])) | {"version": 2}
    with pytest.raises(Unsupported, match="Upgrade"):
        event_from_json(json.dumps(newer))
    for text in (
        '{"version":1,"event":{"kind":"laplace","scale":1}}',
        '{"version":1,"event":{"kind":"poisson","sample_rate":0.1,"event":{"kind":"laplace","scale":1}}}',
    ):
        with pytest.raises(Unsupported, match="laplace"):
            event_from_json(text)


@pytest.mark.parametrize(
    "text",
    ["", "{", "[]", "{}", '{"version":1}', '{"version":1,"event":{"kind":"gaussian","noise_multiplier":-1}}', b"\xff"],
)
def test_text_that_is_no_event_is_refused(text):
    with pytest.raises(LedgerError):
        event_from_json(text)


def test_counts_multiply_and_equal_atoms_merge():
    step = Poisson(0.1, Gaussian(1.0))
    nested = Composed((Repeated(Repeated(step, 3), 4), Gaussian(5.0), step, Repeated(step, 0)))
    assert normal_form(nested) == [(step, 13), (Gaussian(5.0), 1)]


def test_queries_on_one_batch_become_one_gaussian():
    together = Poisson(0.1, Composed((Gaussian(1.0), Repeated(Gaussian(2.0), 4))))
    assert normal_form(together) == [(Poisson(0.1, Gaussian(0.5**0.5)), 1)]


def test_full_rate_is_no_sampling_and_rate_zero_is_nothing():
    assert normal_form(Poisson(1.0, Gaussian(2.0))) == [(Gaussian(2.0), 1)]
    assert normal_form(Repeated(Poisson(0.0, Gaussian(2.0)), 9)) == []
    assert normal_form(Poisson(0.5, Composed(()))) == []


def test_a_cap_that_cannot_be_reached_cuts_nothing():
    assert normal_form(TruncatedPoisson(0.1, 11, 10, Gaussian(1.0))) == [(Poisson(0.1, Gaussian(1.0)), 1)]
    assert normal_form(TruncatedPoisson(0.1, 10, 10, Gaussian(1.0)))[0][0].kind == "truncated_poisson"


def test_sampling_inside_sampling_is_unsupported():
    with pytest.raises(Unsupported, match="poisson around"):
        normal_form(Poisson(0.1, Repeated(Poisson(0.1, Gaussian(1.0)), 2)))


def test_what_is_no_event_has_no_normal_form():
    with pytest.raises(InvalidParameter):
        normal_form("gaussian")


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
