"""Each bug of the catalogue, put into the shipped package, is caught by the check that owns it."""

from __future__ import annotations

from pathlib import Path

import pytest
from soundness import member_checks
from soundness.checks import CHECKS, Violation
from soundness.member_mutants import MEMBER_MUTANTS
from soundness.mutants import MUTANTS, Active, Mutant

FIRST_TWENTY = {f"M{number:02d}" for number in range(1, 21)}


def test_the_first_twenty_bugs_are_all_here() -> None:
    found = [mutant.id for mutant in MUTANTS + MEMBER_MUTANTS]
    assert set(found) >= FIRST_TWENTY
    assert len(set(found)) == len(found)


@pytest.mark.parametrize("mutant", MUTANTS + MEMBER_MUTANTS, ids=lambda mutant: f"{mutant.id}-{mutant.check}")
def test_the_check_that_owns_a_bug_catches_it(mutant: Mutant, folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    active = Active()
    mutant.apply(monkeypatch, active)
    with pytest.raises(Violation) as caught:
        (member_checks.CHECKS if mutant.of_members else CHECKS)[mutant.check](folder, only=mutant.where)
    assert caught.value.check == mutant.check
    assert active.times > 0, "the bug never came into play"
    # A mutant that no longer fits the package crashes, and that would look like a catch.
    assert "ended" not in str(caught.value), caught.value
