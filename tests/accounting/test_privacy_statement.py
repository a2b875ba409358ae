"""The statement: rounded up, never epsilon without its meaning, doubts said aloud."""

from __future__ import annotations

import json
import math
import random

import pytest

from accounting import (
    Budget,
    Gaussian,
    InvalidParameter,
    Ledger,
    PlanRecord,
    Poisson,
    Relation,
    TruncatedPoisson,
    round_up,
    round_up_text,
    statement,
)

FACTS = {
    "sampling": "drawn by the engine",
    "noise_generator": "philox (not cryptographic)",
    "max_grad_norm": 1.5,
    "certified": True,
    "certified_reason": "unseeded run of the engine",
    "caveats": ["the probe used synthetic batches"],
}


def plan(**changes):
    fields = {
        "event": Poisson(0.01, Gaussian(1.1)),
        "steps": 10,
        "delta": 1e-6,
        "relation": Relation.ADD_REMOVE,
        "unit": "example",
        "num_examples": 60_000,
        "facts": FACTS,
    }
    return PlanRecord(**(fields | changes))


@pytest.fixture
def ledger(tmp_path):
    with Ledger.create(tmp_path / "l.sqlite", dataset_name="digits", budget=Budget(50.0, 0.5)) as made:
        yield made


@pytest.mark.parametrize("x", [0.0, 1e-300, 0.00005, 0.1, 1.23456, 1.2345, 2.99999999, 123456.00001, 1e17, 1e300])
@pytest.mark.parametrize("digits", [0, 2, 4])
def test_rounding_is_up_and_by_less_than_one_unit(x, digits):
    assert x <= round_up(x, digits) <= x + 10.0**-digits
    assert round_up(round_up(x, digits), digits) <= round_up(x, digits) + 10.0**-digits


def test_rounding_keeps_infinity_and_refuses_nan():
    assert round_up(math.inf) == math.inf
    with pytest.raises(InvalidParameter):
        round_up(math.nan)


@pytest.mark.parametrize("x", ["1", None, 1j, [1], 10**400], ids=["str", "None", "complex", "list", "huge"])
def test_only_numbers_are_rounded(x):
    for rounded in (round_up, round_up_text):
        with pytest.raises(InvalidParameter, match="cannot be rounded up"):
            rounded(x)


@pytest.mark.parametrize(
    ("x", "text"),
    [(1e-5, "1e-05"), (1.00000049e-5, "1.00001e-05"), (0.5000004, "0.500001"), (0.1, "0.1"), (0.9999999, "1")],
)
def test_a_shortened_number_is_not_below_the_one_that_was_typed(x, text):
    assert round_up_text(x) == text


def test_a_shortened_number_read_again_is_never_below(ledger):
    draw = random.Random(0)
    for x in [math.ulp(0.0), 1e-310, *(draw.random() * 10.0 ** draw.randint(-320, 3) for _ in range(2000))]:
        again = float(round_up_text(x))
        assert x <= again <= x * (1 + 1e-5) + 1e-323, x
    assert round_up_text(math.inf) == "inf"


def test_the_printed_delta_is_not_below_the_true_one(ledger):
    p = plan(delta=1.00000049e-5)
    ledger.charge(p, p.event)
    assert "at delta = 1.00001e-05" in str(statement(ledger))
    assert statement(ledger).delta == p.delta


def test_the_text_fits_80_columns(ledger):
    p = plan(facts=FACTS | {"caveats": ["a caveat of many words " * 20, "word" * 30]})
    ledger.charge(p, p.event)
    lines = str(statement(ledger)).splitlines()
    assert [line for line in lines if len(line) > 80] == ["      " + "word" * 30]
    assert all(line.startswith("  ") for line in lines[1:])
    assert " ".join("a caveat of many words " * 20) not in lines
    assert " ".join(" ".join(lines).split()).count("a caveat of many words") == 20


def test_epsilon_never_stands_without_its_meaning(ledger):
    p = plan()
    for _ in range(4):
        ledger.charge(p, p.event)
    said = statement(ledger)
    text = " ".join(str(said).split())
    for part in (
        "digits",
        "1e-06",
        "example",
        "add or remove one",
        "Poisson, rate 0.01",
        "privacy loss",
        "1.1",
        "4 of 10",
    ):
        assert part in text
    for part in ("drawn by the engine", "philox", "1.5", "60000", "CERTIFIED: YES", "committed", "hyperparameter"):
        assert part in text
    assert f"{said.epsilon:.4f}" in text and said.epsilon >= ledger.spent().epsilon
    assert said.committed_epsilon >= ledger.spent().committed_epsilon > said.epsilon
    assert (said.anchor_sequence, said.anchor_digest) == ledger.anchor()
    assert said.data_accesses == 4


def test_the_statement_says_how_many_steps_are_left(ledger):
    p = plan(steps=3)
    for taken in (1, 2, 3):
        ledger.charge(p, p.event)
        said = statement(ledger)
        assert said.plans[0].steps_left == 3 - taken
        text = " ".join(str(said).split())
        rest = f"{3 - taken} more may be taken" if taken < 3 else "none is left"
        assert f"{taken} of 3 planned steps charged; {rest}" in text


def test_what_a_crash_shows_is_said_not_to_be_covered(ledger):
    p = plan()
    ledger.charge(p, p.event)
    text = " ".join(str(statement(ledger)).split())
    assert "what can be learnt from timing, and from when a process stopped or failed (memory, crashes)" in text


def test_the_json_holds_the_same(ledger):
    p = plan()
    ledger.charge(p, p.event)
    said = statement(ledger)
    assert json.loads(said.model_dump_json())["epsilon"] == said.epsilon
    assert type(said).model_validate_json(said.model_dump_json()) == said


def test_an_unused_ledger_says_that_nothing_was_charged(ledger):
    assert "nothing was charged" in str(statement(ledger))
    assert statement(ledger).epsilon == 0 and statement(ledger).plans == ()


@pytest.mark.parametrize(
    ("facts", "reason"),
    [
        ({}, "did not say"),
        ({"certified": False}, "not certified"),
        ({"certified": False, "certified_reason": "s"}, "s"),
    ],
)
def test_a_run_that_is_not_certified_says_why(ledger, facts, reason):
    p = plan(facts=facts)
    ledger.charge(p, p.event)
    assert statement(ledger).certified is False
    assert "CERTIFIED: NO" in str(statement(ledger)) and reason in statement(ledger).certified_reason


def test_a_delta_as_large_as_one_over_n_warns(ledger):
    p = plan(delta=0.01, num_examples=100)
    ledger.charge(p, p.event)
    assert any("1/N" in caveat for caveat in statement(ledger).caveats)


def test_several_runs_are_added_and_the_doubt_about_one_is_a_doubt_about_all(ledger):
    first, second = plan(), plan(event=TruncatedPoisson(0.01, 800, 60_000, Gaussian(2.0)), facts={"certified": False})
    ledger.charge(first, first.event)
    ledger.charge(second, second.event)
    said = statement(ledger)
    assert said.epsilon == said.committed_epsilon >= sum(p.committed_epsilon for p in said.plans) - 2e-4
    assert not said.certified and "cut to 800" in str(said)
    assert any("added" in caveat for caveat in said.caveats)


@pytest.mark.parametrize(
    ("tier", "said", "unsaid"),
    [
        (None, "attacks on its low-order bits.", "ChaCha20"),
        ("default", "attacks on its low-order bits.", "ChaCha20"),
        ("quantum", "attacks on its low-order bits.", "ChaCha20"),
        ("hardened", "tests bound it, and no theorem", "attacks on"),
        ("exact", "nothing in its law is approximate", "attacks on"),
    ],
)
def test_what_is_not_covered_of_the_noise_is_that_of_its_tier(ledger, tier, said, unsaid):
    facts = FACTS if tier is None else FACTS | {"noise_tier": tier}
    made = plan(facts=facts)
    ledger.charge(made, made.event)
    stated = statement(ledger)
    assert stated.plans[0].noise_tier == (tier or "default")
    assert said in " ".join(stated.caveats) and unsaid not in " ".join(stated.caveats)
    assert f"noise tier: {tier or 'default'}, noise generator: philox" in " ".join(str(stated).split())
    # Another run on the data, of another tier: what is said of each is said of both together.
    other = plan(facts=FACTS | {"noise_tier": "exact"})
    ledger.charge(other, other.event)
    both = " ".join(statement(ledger).caveats)
    assert said in both and "nothing in its law is approximate" in both
