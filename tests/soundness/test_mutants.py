"""Every known way in which a trainer lies about its epsilon is caught by the check that owns it."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
from soundness.catalogue import BUGS, PREDICTED, name_of
from soundness.checks import Violation
from soundness.mutants import Active, Mutant


def test_every_entry_of_the_catalogue_is_tried_and_nothing_else() -> None:
    tried = {(bug.id, bug.check) for bug in BUGS if not bug.id.startswith("X")}
    assert tried == PREDICTED
    assert {number for number, _ in tried} == {name_of(number) for number in range(1, 75)}
    assert len({(bug.id, bug.check, bug.bug) for bug in BUGS}) == len(BUGS)


@pytest.mark.parametrize(
    "bug",
    [pytest.param(bug, id=f"{bug.id}-{bug.check}", marks=[pytest.mark.slow] if bug.slow else []) for bug in BUGS],
)
def test_the_check_that_owns_a_bug_catches_it(
    bug: Mutant, folder: Path, monkeypatch: pytest.MonkeyPatch, record_property: Callable[[str, object], None]
) -> None:
    record_property("bug", (bug.id, bug.bug, bug.source))
    active = Active()
    bug.apply(monkeypatch, active)
    with pytest.raises(Violation) as caught:
        bug.catch(folder)
    assert caught.value.check == bug.check
    assert active.times > 0, "the bug never came into play"
    # A mutant that no longer fits the package crashes, and that would look like a catch.
    assert "ended" not in str(caught.value), caught.value
    record_property("caught by", caught.value.check)
