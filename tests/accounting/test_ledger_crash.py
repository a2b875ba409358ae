"""kill -9 and several processes: never more releases than charges, never more charges than planned.

The moments are random, the claims are not: a correct ledger fails none of these, ever (false-alarm probability 0).
"""

from __future__ import annotations

import json
import math
import os
import random
import subprocess
import sys
import time
from contextlib import suppress
from itertools import cycle
from pathlib import Path

import pytest
from ledger_worker import BUDGET, EVENT, PART, PLAN, SHORT

from accounting import Budget, BudgetExceeded, Ledger, epsilon
from accounting.privacy_filters import RenyiFilter

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


def budgets() -> list[tuple[str, Budget, int]]:
    """(whose plan is charged, budget, how many plans it holds), with the last as one process alone finds it."""
    one = epsilon(PART.event_of(PART.steps), PART.delta, relation=PART.relation).upper
    summed = Budget(math.nextafter(3 * one, math.inf), 3e-5)  # three plans, and no epsilon is left
    by_orders = Budget(1.4, 3e-5, orders=(7.0,))
    filtered = RenyiFilter(by_orders.epsilon, by_orders.delta, by_orders.orders)
    held = 0
    with suppress(BudgetExceeded):
        while True:
            filtered.spend(PART.event_of(PART.steps), PART.relation)
            held += 1
    return [("shared", summed, 1), ("own", summed, 3), ("own", by_orders, held)]


def eight_processes_share(tmp_path, rounds):
    """Every round is a new ledger, which eight processes charge at once until it refuses each of them.

    Returns the number of rounds in which several processes charged one plan, or plans in turns.
    """
    mixed = 0
    worker = subprocess.Popen(
        [sys.executable, WORKER, "rounds", "8"],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
        env=os.environ | {"OMP_NUM_THREADS": "1", "OPENBLAS_NUM_THREADS": "1"},  # it forks
    )
    assert worker.stdin and worker.stdout
    with worker:
        for number, (whose, budget, holds) in zip(range(rounds), cycle(budgets())):
            path = tmp_path / f"{number}.sqlite"
            Ledger.create(path, dataset_name="d", budget=budget).close()
            with Ledger.open(path, read_only=True, timeout=300) as reader:
                print(whose, path, file=worker.stdin, flush=True)
                ours = []
                while len(ours) < 8:  # when the first has finished, others still charge
                    ours.append(int(worker.stdout.readline()))
                    assert reader.spent().committed_epsilon <= budget.epsilon
                assert sum(ours) == reader.spent().steps_charged == holds * PART.steps
                assert [charged for _, charged in reader.plans()] == [PART.steps] * holds
                plans = [json.loads(body)["plan_id"] for _, body, _ in reader.entries() if b'"charge"' in body]
                mixed += ours.count(0) < 7 if whose == "shared" else plans != sorted(plans, key=plans.index)
                if whose == "own":
                    assert sorted(ours) == [0] * (8 - holds) + [PART.steps] * holds
        worker.stdin.close()
    assert worker.returncode == 0
    return mixed


def test_eight_processes_share_a_budget_exactly(tmp_path):
    eight_processes_share(tmp_path, 3)


@pytest.mark.slow
def test_eight_processes_share_fifty_budgets_exactly(tmp_path):
    assert eight_processes_share(tmp_path, 50) >= 25  # 49 on a busy machine


@pytest.mark.parametrize("year", [1971, 2399])
def test_no_clock_is_asked(tmp_path, monkeypatch, year):
    # A clock that jumps far back or ahead between two charges, and files that are as old as that.
    path = tmp_path / "ledger.sqlite"
    seconds = (year - 1970) * 31_556_952
    with Ledger.create(path, dataset_name="d", budget=BUDGET) as ledger:
        ledger.charge(PLAN, EVENT)
        for name in ("time", "monotonic", "perf_counter"):
            monkeypatch.setattr(time, name, lambda: float(seconds))
            monkeypatch.setattr(time, f"{name}_ns", lambda: seconds * 10**9)
        for file in (path, Path(f"{path}.tip")):
            os.utime(file, (seconds, seconds))
        assert ledger.charge(PLAN, EVENT).step == 2
    with Ledger.open(path) as ledger:
        assert ledger.charge(PLAN, EVENT).step == 3
        bodies = [json.loads(body) for _, body, _ in ledger.entries()]
    assert [sorted(body) for body in bodies[2:]] == [["kind", "plan_id", "salt", "step"]] * 3


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
