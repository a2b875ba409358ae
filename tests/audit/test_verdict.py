"""A verdict contradicts or finds no contradiction; it never says that something is private."""

from __future__ import annotations

import json
import math
from dataclasses import asdict

import pytest

from dpkit.audit import LowerBound, Verdict, judge
from dpkit.errors import InvalidArgument

BOUND = LowerBound(2.50004, 1e-5, 0.95, "one run", {"canaries": 1000.0})


@pytest.mark.parametrize(
    ("claim", "contradicted"),
    [(2.5, True), (0.0, True), (2.50004, False), (8.0, False), (math.inf, False), (None, False)],
)
def test_only_a_finite_claim_below_the_bound_is_contradicted(claim, contradicted):
    verdict = judge(BOUND, claim=claim, claim_source="typed")
    assert verdict.contradicted is contradicted
    assert str(verdict).startswith("CONTRADICTED" if contradicted else "no contradiction found")


def test_the_words_never_call_anything_private_or_safe():
    for claim in (1.0, 8.0, None):
        text = str(judge(BOUND, claim=claim, claim_source="a ledger", assumptions=("coins are fair",))).lower()
        assert not any(word in text for word in ("private", "safe", "confirmed", "verified", "passed"))


def test_a_bound_is_printed_rounded_down_and_a_claim_rounded_up():
    text = str(judge(BOUND, claim=8.00000001, claim_source="typed", exercised=("linear",), assumptions=("fair coins",)))
    assert "epsilon >= 2.5000 at delta = 1e-05 with confidence 95 %" in text
    assert "epsilon <= 8.00001 (typed)" in text
    assert "linear" in text
    assert "fair coins" in text
    assert "1 - 1e-06" in str(judge(BOUND._replace(confidence=1 - 1e-6), claim=None, claim_source=""))


def test_it_is_json():
    verdict = judge(BOUND, claim=1.0, claim_source="typed", exercised=("linear",))
    read = json.loads(json.dumps(asdict(verdict)))
    assert read["contradicted"] is True
    assert read["details"] == {"canaries": 1000.0}
    with pytest.raises(TypeError, match="contradicted"):
        Verdict(**asdict(verdict))  # it follows from the rest


@pytest.mark.parametrize("claim", [-1.0, math.nan])
def test_a_claim_is_an_epsilon(claim):
    with pytest.raises(InvalidArgument, match="claim"):
        judge(BOUND, claim=claim, claim_source="typed")
    with pytest.raises(InvalidArgument, match="epsilon"):
        judge(BOUND._replace(epsilon=claim), claim=None, claim_source="typed")
