"""The shipped build passes checks K, E, L and F, and the parts of D, N and V that look at whole runs and models."""

from __future__ import annotations

from pathlib import Path

import pytest
from soundness import epsilon_checks, ledger_checks, source_checks
from soundness.checks import Violation, check_N_resumed, check_V_beside, check_V_passes
from soundness.epsilon_checks import check_E
from soundness.ledger_checks import check_K, grid_K
from soundness.member_checks import check_N_grid
from soundness.members import grid_N_grid
from soundness.model_checks import check_D_gradients, check_D_mixing, grid_D_gradients, grid_D_mixing
from soundness.source_checks import check_F, check_L, checks_that_vanish, trust_in_strangers


@pytest.mark.parametrize("part", [part for part in ledger_checks.PARTS if part != "crashes"])
def test_whatever_becomes_of_the_files_the_ledger_covers_what_was_released(part: str, folder: Path) -> None:
    assert check_K(folder, only=lambda name: name == part)[part] >= 5


@pytest.mark.parametrize("number", range(len(list(grid_K()))))
def test_whenever_a_process_dies_the_ledger_covers_what_was_released(number: int, folder: Path) -> None:
    setup = list(grid_K())[number]
    # 20 charges, of which the one process that died between charge and release lost one.
    assert ledger_checks.check_K_crashes(folder, only=lambda other: other == setup) == 19


@pytest.mark.parametrize("part", epsilon_checks.PARTS)
def test_epsilon_is_no_less_than_the_truth_and_never_stands_alone(part: str, folder: Path) -> None:
    assert check_E(folder, only=lambda name: name == part)[part] >= 2


def test_no_construct_breaks_a_promise() -> None:
    assert check_L(Path()) > 150


@pytest.mark.parametrize(
    ("source", "found"),
    [
        ("assert delta < 1", 1),
        ("assert plan is not None and plan.delta < 1", 1),
        ("assert plan", 1),
        ("assert plan is not None and isinstance(plan, Plan)", 0),
    ],
)
def test_the_scanner_tells_checks_from_help_for_the_type_checker(source: str, found: int) -> None:
    assert len(list(checks_that_vanish(source))) == found


@pytest.mark.parametrize(
    ("bad", "good"),
    [
        ("f(x, weights_only=False)", "f(x, weights_only=True)"),
        ("f(x, allow_pickle=True)", "f(x, allow_pickle=False)"),
        ("f(trust_remote_code=flag)", "f(trust_remote_code=False)"),
    ],
)
def test_the_scanner_sees_trust_in_strangers(bad: str, good: str) -> None:
    assert len(list(trust_in_strangers(bad))) == 1
    assert not list(trust_in_strangers(good))


@pytest.mark.parametrize("part", source_checks.PARTS)
def test_no_file_runs_code_and_no_name_leads_out_of_a_run(part: str, folder: Path) -> None:
    assert check_F(folder, only=lambda name: name == part) >= 1


def test_what_is_summed_is_the_gradient_of_each_record(folder: Path) -> None:
    assert check_D_gradients(folder) == len(list(grid_D_gradients())) == 18


def test_a_model_that_mixes_the_records_of_a_batch_is_refused(folder: Path) -> None:
    assert check_D_mixing(folder) == len(list(grid_D_mixing())) == 4


def test_runs_that_go_on_from_one_checkpoint_have_noise_of_their_own(folder: Path) -> None:
    assert check_N_resumed(folder) == 18


def test_every_number_of_the_hardened_tiers_lies_on_the_grid(folder: Path) -> None:
    assert check_N_grid(folder) > 2000 * 10 * len(list(grid_N_grid()))


def test_ordinary_noise_lies_on_no_grid(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from dpkit.mechanisms import Gaussian

    monkeypatch.setattr(Gaussian, "tier", "hardened")
    setups = [setup.but(mechanism=Gaussian(1.3)) for setup in grid_N_grid()]
    monkeypatch.setattr("soundness.members.grid_N_grid", lambda: iter(setups))
    with pytest.raises(Violation, match="no multiples"):
        check_N_grid(folder)


def test_a_pass_has_as_many_steps_as_are_charged(folder: Path) -> None:
    assert check_V_passes(folder) == 93 + 4


def test_what_is_released_beside_the_steps_is_charged_before_it_is_drawn(folder: Path) -> None:
    assert check_V_beside(folder) == 6
