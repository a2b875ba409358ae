"""Real processes, killed by SIGKILL: the ledger covers what they released; and with a bug put in it does not."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

HERE = Path(__file__).parent


def killed(folder: Path, kills: int, *bug: str) -> subprocess.CompletedProcess[str]:
    paths = os.pathsep.join(str(path) for path in (HERE.parent, HERE.parents[1], HERE.parent / "accounting"))
    return subprocess.run(
        [sys.executable, "-m", "soundness.killed_run", str(folder), str(kills), *bug],
        capture_output=True,
        text=True,
        check=False,
        env=os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": paths},
    )


@pytest.mark.slow
def test_forty_kills_leave_no_release_that_was_not_charged(folder: Path) -> None:
    done = killed(folder, 40)
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout)
    assert found["charges"] >= found["releases"] >= 20


@pytest.mark.slow
def test_kills_find_a_run_that_charges_after_the_release(folder: Path) -> None:
    # M23. Every second kill comes within 50 ms after a release, and for 20 ms after each of them the charge is missing:
    # that all of the thirty miss has a probability below 0.7^30 = 2e-5.
    done = killed(folder, 60, "M23")
    assert done.returncode == 1 and "releases" in done.stderr, done.stderr
