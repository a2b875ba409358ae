"""The shipped build passes every check. ``checks.py`` says what each of them means."""

from __future__ import annotations

from pathlib import Path

import pytest
from soundness.checks import check_A, check_D, check_D_random, check_N, check_R, check_V, grid_A, grid_N, grid_R, grid_V
from soundness.harness import Setup


@pytest.mark.parametrize("form", ["loop", "step"])
def test_no_record_moves_a_released_sum_beyond_what_the_noise_covers(form: str, folder: Path) -> None:
    reach = check_D(folder, only=lambda setup: setup.form == form)
    # Room for a doubled record or another clipping norm would show here: the largest distance is C for add/remove and
    # zero-out, and 2C where a record is replaced by its opposite.
    assert reach.pairs > 500
    assert 1.98 <= reach.largest <= 2.02


def test_a_thousand_random_neighbours_stay_within_the_sensitivity_and_reach_it(folder: Path) -> None:
    reach = check_D_random(folder)
    assert reach.pairs >= 1000 and reach.empty >= 20
    assert 0.99 <= reach.largest <= 1.02


@pytest.mark.slow
@pytest.mark.parametrize("form", ["loop", "step"])
def test_no_record_moves_a_released_sum_on_the_full_grid(form: str, folder: Path) -> None:
    assert check_D(folder, full=True, only=lambda setup: setup.form == form).pairs > 5000


@pytest.mark.slow
def test_ten_thousand_random_neighbours_stay_within_the_sensitivity(folder: Path) -> None:
    assert check_D_random(folder, pairs=10_000).largest >= 0.99


@pytest.mark.parametrize("setup", list(grid_R()), ids=str)
def test_everything_but_the_releases_is_the_same_for_neighbours(setup: Setup, folder: Path) -> None:
    assert check_R(folder, only=lambda other: other == setup) == 6


@pytest.mark.parametrize("setup", list(grid_N()), ids=str)
def test_the_noise_is_normal_of_the_stated_size_and_fresh(setup: Setup, folder: Path) -> None:
    worst = check_N(folder, only=lambda other: other == setup)
    assert len(worst) >= 10


@pytest.mark.parametrize("setup", list(grid_A()), ids=str)
def test_who_takes_part_is_drawn_as_the_ledger_says(setup: Setup, folder: Path) -> None:
    worst = check_A(folder, only=lambda other: other == setup)
    assert len(worst) >= 15


@pytest.mark.parametrize("setup", list(grid_V()), ids=str)
def test_every_release_was_charged_before_it_was_drawn_as_what_it_was(setup: Setup, folder: Path) -> None:
    assert check_V(folder, only=lambda other: other == setup) >= 5
