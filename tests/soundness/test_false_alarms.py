"""The correct engine, fifty times with fresh seeds: no statistical check may cry out.

A run makes fewer than 500 comparisons of FALSE_ALARM = 1e-7 at most, so a correct build fails one of these fifty runs
with a probability below 50 * 500 * 1e-7 = 0.25 % for another choice of seeds; those here are fixed.  Each run takes one
setup of every grid, in turns, so that all of them come up; checks D, R, K, E, L and F use no chance that could differ.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
from soundness import checks, member_checks, members
from soundness.harness import Setup

RUNS = 50
GRIDS: dict[str, tuple[object, Callable[[], list[Setup]]]] = {
    "plain N": (checks, lambda: list(checks.grid_N())),
    "plain A": (checks, lambda: list(checks.grid_A())),
    "plain V": (checks, lambda: list(checks.grid_V())),
    "member N": (members, lambda: list(members.grid_N(full=True))),
    "member A": (members, lambda: list(members.grid_A())),
    "member V": (members, lambda: list(members.grid_V())),
}
CHECKS: dict[str, Callable[..., object]] = {
    **{f"plain {letter}": checks.CHECKS[letter] for letter in "NAV"},
    **{f"member {letter}": member_checks.CHECKS[letter] for letter in "NV"},
    "member A": member_checks.check_A,  # without the crashes, which use no chance
}


@pytest.mark.slow
@pytest.mark.parametrize("number", range(RUNS))
def test_the_correct_engine_raises_no_alarm(number: int, folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name, (module, grid) in GRIDS.items():
        setups = grid()
        chosen = setups[number % len(setups)].but(seed=1000 + number)
        monkeypatch.setattr(module, f"grid_{name[-1]}", lambda *_, chosen=chosen: iter([chosen]))
        CHECKS[name](folder, only=lambda setup, chosen=chosen: setup == chosen)
        monkeypatch.undo()
