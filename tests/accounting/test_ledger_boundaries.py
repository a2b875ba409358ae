"""Kills, failing calls and power cuts at every system call of a charge: no receipt without its charge on the disk.

The places are counted through, not drawn, and a correct ledger fails none of them (false-alarm probability 0). The work
is done by programs of their own, ``boundary_trials.py`` and ``power_cuts.py``, which fork.
"""

from __future__ import annotations

import errno
import json
import os
import subprocess
import sys
import tempfile
from collections import Counter
from pathlib import Path

import pytest
from ledger_worker import BUDGET, EVENT, PLAN

from accounting import Ledger, LedgerError

HERE = Path(__file__).parent
MEMORY = Path("/dev/shm")  # where there is one: thousands of small ledgers are written


def start(program: str, *arguments: str) -> subprocess.CompletedProcess[str]:
    threads = {"OMP_NUM_THREADS": "1", "OPENBLAS_NUM_THREADS": "1"}  # a program that forks has one
    with tempfile.TemporaryDirectory(dir=MEMORY if os.access(MEMORY, os.W_OK) else None) as folder:
        command = [sys.executable, str(HERE / program), folder, *arguments]
        return subprocess.run(command, capture_output=True, text=True, check=False, env=os.environ | threads)


def found_by(program: str, how: str) -> dict[str, dict]:
    done = start(program, how)
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout)
    if "skipped" in found:
        pytest.skip(found["skipped"])
    return found


def total(found: dict[str, dict[str, dict[str, int]]]) -> Counter[str]:
    return sum((Counter(outcomes) for faults in found.values() for outcomes in faults.values()), Counter())


def falls_short(program: str) -> bool:
    done = start(program, "thin", "weak")
    if '"skipped"' in done.stdout:
        pytest.skip(json.loads(done.stdout)["skipped"])
    return done.returncode == 1 and done.stderr.startswith("fell short")


def test_no_charge_is_lost_by_a_kill_or_an_error_at_a_call_that_changes_the_disk():
    found = found_by("boundary_trials.py", "thin")
    outcomes = total(found)
    assert outcomes["whole"] > 150 and outcomes["charged more"] > 0  # died between charge and receipt
    assert not any(name.startswith("refused") for name in total({"": found["first charges of a plan"]}))


@pytest.mark.slow
def test_no_charge_is_lost_by_any_fault_at_any_system_call():
    found = found_by("boundary_trials.py", "whole")
    outcomes = total(found)
    assert sum(outcomes.values()) > 5000
    assert outcomes["refused: an older copy"] == sum(total({"": found["open an older copy"]}).values()) > 400
    # After a charge that was begun, a ledger opens, but for a note of which a full disk took half.
    assert outcomes["refused: half of a note"] <= 10
    for name in ("first charges of a plan", "charges that add a page", "charge after a crash", "read after a crash"):
        assert not total({"": found[name]})["refused: created in part"]
        assert min(sum(outcomes.values()) for outcomes in found[name].values()) > 0


def test_no_power_cut_takes_a_charge_whose_receipt_was_given():
    found = found_by("power_cuts.py", "thin")
    assert "refused" not in found["first charges of a plan"]
    assert sum(scenario["whole"] for scenario in found.values()) > 500


@pytest.mark.slow
def test_no_power_cut_takes_a_charge_even_if_an_fsync_failed_before():
    found = found_by("power_cuts.py", "whole")
    assert [name for name, outcomes in found.items() if "refused" in outcomes] == ["create and charge"]
    assert sum(scenario["whole"] for scenario in found.values()) > 1500
    assert sum(scenario["whole, after an fsync that failed"] for scenario in found.values()) > 5000


@pytest.fixture
def path(tmp_path: Path) -> Path:
    """A closed ledger with a charge and a note."""
    path = tmp_path / "ledger.sqlite"
    with Ledger.create(path, dataset_name="d", budget=BUDGET) as ledger:
        ledger.charge(PLAN, EVENT)
    return path


def test_a_note_that_does_not_close_is_no_failure(path: Path):
    with Ledger.open(path) as ledger:
        ledger.charge(PLAN, EVENT)
        assert ledger._note._descriptor is not None
        os.close(ledger._note._descriptor)  # closing it again gives EBADF, as a network file system may give EIO
    with Ledger.open(path) as ledger:
        assert ledger.plans() == [(PLAN, 2)]


@pytest.mark.parametrize("number", [errno.EIO, errno.ESTALE, errno.EACCES, errno.ETIMEDOUT])
def test_a_note_of_which_the_disk_says_nothing_is_not_a_missing_one(
    path: Path, monkeypatch: pytest.MonkeyPatch, number: int
):
    original = {"open": os.open, "lstat": os.lstat}

    def failing(name: str):
        def call(file, *arguments, **options):
            if str(file).endswith(".tip"):
                raise OSError(number, os.strerror(number), file)
            return original[name](file, *arguments, **options)

        return call

    for name in original:
        monkeypatch.setattr(os, name, failing(name))
    with pytest.raises(LedgerError, match="unknown whether the ledger beside it is the newest"):
        Ledger.open(path)


@pytest.mark.parametrize("program", ["boundary_trials.py", "power_cuts.py"])
def test_a_ledger_with_less_care_is_found_to_fall_short(program: str):
    assert falls_short(program)
