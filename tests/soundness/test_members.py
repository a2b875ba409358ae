"""Every member of the package passes every check. ``member_checks.py`` says what each of them means."""

from __future__ import annotations

from pathlib import Path

import pytest
from soundness import members
from soundness.member_checks import (
    check_A,
    check_A_crashes,
    check_D,
    check_D_products,
    check_N,
    check_R_members,
    check_V,
)
from soundness.subjects import PRODUCTS

from accounting import Relation
from dpkit import clipping, mechanisms, sampling
from dpkit.clipping import ClipRule

RULES = {name: member.rule for name, member in members.RULES.items()}


def test_no_member_is_left_out() -> None:
    """A new rule, sampler or strategy has to be written into ``members.py``."""
    grids = [
        *(setup for setup, _ in members.grid_D()),
        *(setup for grid in (members.grid_R, members.grid_N) for setup in grid(full=True)),
        *(setup for grid in (members.grid_A, members.grid_V) for setup in grid()),
    ]
    checked = {type(part) for setup in grids for part in (setup.rule, setup.draws, setup.noise)}
    checked |= {type(getattr(setup.mechanism, "strategy", None)) for setup in grids}
    no_members = {"ClipRule", "SeparableRule", "Setting", "NoiseSplit", "BoundSplit", "Sampler", "Users"}
    no_members |= {"Mechanism", "Strategy", "NoiseKey", "RunKey", "TruncatedPoisson"}  # the last one: checks.py
    for package in (clipping, sampling, mechanisms):
        classes = {
            name: kind
            for name, kind in vars(package).items()
            if isinstance(kind, type) and name[0].isupper() and name not in no_members
        }
        missing = sorted(name for name, kind in classes.items() if kind not in checked)
        assert not missing, missing


@pytest.mark.parametrize("name", RULES)
def test_no_record_moves_what_a_rule_releases_beyond_what_the_noise_covers(name: str, folder: Path) -> None:
    rule: ClipRule = RULES[name]
    found = check_D(folder, only=lambda setup: setup.clip == rule)
    (reach,) = found.values()
    # Room for another bound would show here. One unit of the right norm takes all of the sensitivity.
    assert reach.pairs >= 12
    assert members.RULES[name].reach <= reach.cost <= 1


def test_no_record_moves_what_is_released_beyond_what_the_noise_covers_under_any_sampler(folder: Path) -> None:
    found = check_D(folder, only=lambda setup: setup.sampler is not None)
    assert sum(reach.pairs for reach in found.values()) > 25
    assert all(reach.cost >= 0.99 for reach in found.values())


def test_gradients_that_leave_the_range_of_float32_on_the_way_do_no_harm_under_any_rule(folder: Path) -> None:
    assert check_D_products(folder).pairs == (3 + len(members.AMPLIFYING)) * len(PRODUCTS)


@pytest.mark.slow
def test_no_record_moves_what_is_released_on_the_full_grid(folder: Path) -> None:
    found = check_D(folder, full=True)
    assert sum(reach.pairs for reach in found.values()) > 3000
    assert check_D_products(folder, full=True).pairs > 2000


@pytest.mark.parametrize("number", range(len(list(members.grid_R()))))
def test_everything_but_the_releases_of_a_member_is_the_same_for_neighbours(number: int, folder: Path) -> None:
    chosen = list(members.grid_R())[number]
    pairs = 6 if chosen.relation is Relation.ADD_REMOVE else 4
    assert check_R_members(folder, only=lambda setup: setup == chosen) == pairs


@pytest.mark.parametrize("number", range(len(list(members.grid_N()))))
def test_the_noise_of_a_member_is_of_the_documented_size_in_every_group_and_query(number: int, folder: Path) -> None:
    chosen = list(members.grid_N())[number]
    assert len(check_N(folder, only=lambda setup: setup == chosen)) >= 8


@pytest.mark.slow
def test_releases_are_all_that_there_is_to_see_and_noise_is_as_documented_on_the_full_grid(folder: Path) -> None:
    assert check_R_members(folder, full=True) > 70
    assert len(check_N(folder, full=True)) >= 8


@pytest.mark.parametrize("number", range(len(list(members.grid_A()))))
def test_who_takes_part_is_what_the_sampler_promises(number: int, folder: Path) -> None:
    chosen = list(members.grid_A())[number]
    assert check_A(folder, only=lambda setup: setup == chosen)


def test_the_order_goes_on_where_the_ledger_stands_after_every_crash(folder: Path) -> None:
    # 23 charges less 2 that were lost, with workers that fetch ahead and without.
    assert check_A_crashes(folder) == 2 * 21


def test_the_event_of_every_member_is_that_of_what_happened(folder: Path) -> None:
    assert check_V(folder) > 100
