"""A process that charges a ledger: ``python ledger_worker.py COMMAND LEDGER ...``. Run by the crash tests."""

from __future__ import annotations

import os
import resource
import signal
import sys

from accounting import Budget, BudgetExceeded, Gaussian, Ledger, LedgerError, PlanRecord, Poisson, Relation

EVENT = Poisson(0.01, Gaussian(1.0))
PLAN = PlanRecord(EVENT, 10_000, 1e-5, Relation.ADD_REMOVE, "example", 60_000, plan_id="shared")
SHORT = PLAN.model_copy(update={"steps": 100})
BUDGET = Budget(100.0, 1e-5)


def release_forever(path: str, log: str) -> None:
    """Charge, then write one byte to ``log``, until killed. What was written survives kill -9 of this process."""
    out = os.open(log, os.O_WRONLY | os.O_APPEND | os.O_CREAT)
    with Ledger.open(path) as ledger:
        while True:
            ledger.charge(PLAN, EVENT).consume()
            os.write(out, b".")


def share(path: str) -> None:
    """Charge the short plan until it is used up; print how many charges were ours."""
    ours = 0
    with Ledger.open(path) as ledger:
        try:
            while True:
                ledger.charge(SHORT, EVENT).consume()
                ours += 1
        except BudgetExceeded:
            print(ours)


def charge_on_a_full_disk(path: str, room: str) -> None:
    """Charge while files may not grow beyond ``room`` bytes; print the acknowledged charges and the error."""
    acknowledged = 0
    with Ledger.open(path) as ledger:
        signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
        resource.setrlimit(resource.RLIMIT_FSIZE, (int(room), int(room)))
        try:
            for _ in range(2000):
                ledger.charge(PLAN, EVENT).consume()
                acknowledged += 1
        except LedgerError as error:
            print(acknowledged, type(error).__name__, error)


if __name__ == "__main__":
    {
        "release": release_forever,
        "share": share,
        "full": charge_on_a_full_disk,
    }[sys.argv[1]](*sys.argv[2:])
