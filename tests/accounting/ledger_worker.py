"""A process that charges a ledger: ``python ledger_worker.py COMMAND LEDGER ...``. Run by the crash tests."""

from __future__ import annotations

import os
import random
import resource
import signal
import sys
import time

from accounting import Budget, BudgetExceeded, Gaussian, Ledger, LedgerError, PlanRecord, Poisson, Relation

EVENT = Poisson(0.01, Gaussian(1.0))
PLAN = PlanRecord(EVENT, 10_000, 1e-5, Relation.ADD_REMOVE, "example", 60_000, plan_id="shared")
SHORT = PLAN.model_copy(update={"steps": 100})
PART = PLAN.model_copy(update={"steps": 40})
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


def charge_all(plan: PlanRecord, path: str) -> int:
    """Charge until no step of the plan is left, or it is not admitted; how many charges were ours."""
    ours = 0
    with Ledger.open(path, timeout=300) as ledger:
        try:
            while True:
                ledger.charge(plan, EVENT).consume()
                ours += 1
                time.sleep(random.uniform(0, 0.004))  # the step itself: without it, the first keeps the lock
        except BudgetExceeded:
            return ours


def rounds(processes: str) -> None:
    """For each line of standard input, so many processes charge a ledger at once; prints how many charges each made.

    A line is a path, and before it what is charged: "shared", one plan for all, or "own", a plan for each.
    """
    for line in sys.stdin:
        which, path = line.rstrip("\n").split(maxsplit=1)
        with Ledger.open(path) as ledger:
            ledger.check(PART)  # computes its epsilon once, not in every child
        ready, go = os.pipe()
        answers = []
        for number in range(int(processes)):
            result, answer = os.pipe()
            if not os.fork():
                code = 1
                try:
                    os.close(go)
                    random.seed(number)
                    os.read(ready, 1)  # until all are there and the pipe is closed
                    plan = PART if which == "shared" else PART.model_copy(update={"plan_id": f"of {number}"})
                    os.write(answer, b"%d" % charge_all(plan, path))
                    code = 0
                finally:
                    os._exit(code)
            os.close(answer)
            answers.append(result)
        os.close(go)
        os.close(ready)
        for result in answers:
            with os.fdopen(result) as answer:
                print(answer.read(), flush=True)
            os.wait()


if __name__ == "__main__":
    {
        "release": release_forever,
        "share": share,
        "full": charge_on_a_full_disk,
        "rounds": rounds,
    }[sys.argv[1]](*sys.argv[2:])
