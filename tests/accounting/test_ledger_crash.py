"""kill -9 and several processes: never more releases than charges, never more charges than planned.

The moments are random, the claims are not: a correct ledger fails none of these, ever (false-alarm probability 0).
"""

from __future__ import annotations

import random
import subprocess
import sys
import time
from pathlib import Path

import pytest
from ledger_worker import BUDGET, EVENT, PLAN, SHORT

from accounting import BudgetExceeded, Ledger

WORKER = Path(__file__).parent / "ledger_worker.py"


def start(*arguments):
    return subprocess.Popen([sys.executable, WORKER, *map(str, arguments)], stdout=subprocess.PIPE, text=True)


def kill_trials(tmp_path, trials, seed):
    """Alternates one and two writers on one ledger, kills them at a random moment, and compares after every trial."""
    path, log = tmp_path / "ledger.sqlite", tmp_path / "releases"
    Ledger.create(path, dataset_name="d", budget=BUDGET).close()
    log.touch()
    draw = random.Random(seed)
    for trial in range(trials):
        before = log.stat().st_size
        workers = [start("release", path, log) for _ in range(1 + trial % 2)]
        deadline = time.monotonic() + 60
        while log.stat().st_size == before and time.monotonic() < deadline:
            time.sleep(0.001)
        time.sleep(draw.uniform(0, 0.03))
        for worker in workers:
            worker.kill()
        for worker in workers:
            worker.communicate()
        with Ledger.open(path) as ledger:
            charged = {plan.plan_id: count for plan, count in ledger.plans()}.get(PLAN.plan_id, 0)
        releases = log.stat().st_size
        assert before < releases <= charged <= releases + 2 * (trial + 1)


def test_after_kill_nine_no_release_is_uncharged(tmp_path):
    kill_trials(tmp_path, 4, seed=1)


@pytest.mark.slow
def test_after_eighty_kills_no_release_is_uncharged(tmp_path):
    kill_trials(tmp_path, 80, seed=2)


def test_four_processes_share_a_plan_exactly(tmp_path):
    path = tmp_path / "ledger.sqlite"
    Ledger.create(path, dataset_name="d", budget=BUDGET).close()
    workers = [start("share", path) for _ in range(4)]
    ours = [int(worker.communicate(timeout=60)[0]) for worker in workers]
    assert sum(ours) == SHORT.steps
    with Ledger.open(path) as ledger:
        assert ledger.plans() == [(SHORT, SHORT.steps)]
        with pytest.raises(BudgetExceeded):
            ledger.charge(SHORT, EVENT)


@pytest.mark.parametrize("read_only", [False, True])
def test_a_journal_left_by_a_crash_is_rolled_back(tmp_path, read_only):
    # A writer that dies between writing pages and committing leaves a hot journal behind.
    path = tmp_path / "ledger.sqlite"
    with Ledger.create(path, dataset_name="d", budget=BUDGET) as ledger:
        ledger.charge(PLAN, EVENT)
        anchor = ledger.anchor()
    crash = (
        "import os, sqlite3, sys;"
        "c = sqlite3.connect(sys.argv[1], isolation_level=None);"
        "c.execute('PRAGMA cache_size = 1'); c.execute('PRAGMA cache_spill = 1');"
        "c.execute('BEGIN IMMEDIATE'); c.execute('UPDATE head SET sequence = 0');"
        "c.executemany('INSERT INTO entries VALUES (?, zeroblob(3000), x\\'00\\')', [(n,) for n in range(9, 99)]);"
        "os._exit(9)"
    )
    subprocess.run([sys.executable, "-c", crash, path], check=False)
    assert Path(f"{path}-journal").stat().st_size > 0
    with Ledger.open(path, read_only=read_only) as ledger:
        assert ledger.anchor() == anchor and ledger.plans() == [(PLAN, 1)]
