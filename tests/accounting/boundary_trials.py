"""Stops a charging process at each of its file-system calls, one trial per call and fault, and looks at what it leaves.

    python tests/accounting/boundary_trials.py FOLDER thin|whole [weak]

At every call of each scenario the process is killed before the call or after it, or is interrupted by a signal, or the
call fails, once or together with all that follow, or writes only half.  What a receipt was given for is told to the
parent through shared memory, which needs no system call.  After every trial the ledger must open and hold every charge
whose receipt was given, a process that had it open all along must go on with it, and the next charge must work.
Prints one JSON object; exits with 1 at the first ledger that falls short.  With ``weak``, the ledger keeps no journal
on the disk, and must be found to fall short.

The program imports the package once and forks, so that a trial takes hundredths of a second.
"""

from __future__ import annotations

import errno
import hashlib
import json
import mmap
import os
import shutil
import signal
import sqlite3
import struct
import sys
from collections import Counter
from collections.abc import Callable
from contextlib import closing
from pathlib import Path
from typing import NamedTuple

from ledger_worker import EVENT, PLAN
from system_calls import NOTHING, Act, Call, CannotTrace, Child

from accounting import Budget, Ledger, LedgerError, PlanRecord
from accounting.chain import Chain

WIDE = PLAN.model_copy(update={"plan_id": "wide", "facts": {"text": "x" * 9000}})  # longer than a page of the file
OTHER = PLAN.model_copy(update={"plan_id": "other"})
ROOM = Budget(1e3, 1e-3)


class FellShort(Exception):
    """A ledger broke its promise."""


class Marks:
    """What a child was given, as its parent sees it: survives the child, and costs it no system call."""

    _SIZE, _FIRST, _FAILURE = 2**15, 64, 2**14

    def __init__(self) -> None:
        self._shared = mmap.mmap(-1, self._SIZE)

    def _number(self, place: int) -> int:
        return struct.unpack_from("q", self._shared, place)[0]

    def _count(self, place: int) -> None:
        struct.pack_into("q", self._shared, place, self._number(place) + 1)

    @property
    def created(self) -> bool:
        return self._number(0) > 0

    @property
    def attempted(self) -> int:
        return self._number(8)

    @property
    def receipts(self) -> list[tuple[int, str]]:
        """(sequence, digest) of every receipt that was given."""
        found = []
        for number in range(self._number(16)):
            sequence, digest = struct.unpack_from("q32s", self._shared, self._FIRST + 40 * number)
            found.append((sequence, digest.hex()))
        return found

    @property
    def failure(self) -> str:
        return self._shared[self._FAILURE :].split(b"\0", 1)[0].decode(errors="replace")

    def create(self) -> None:
        self._count(0)

    def attempt(self) -> None:
        self._count(8)

    def acknowledge(self, sequence: int, digest: str) -> None:
        place = self._FIRST + 40 * self._number(16)
        struct.pack_into("q32s", self._shared, place, sequence, bytes.fromhex(digest))
        self._count(16)

    def fail(self, error: BaseException) -> None:
        text = f"{type(error).__name__}: {error}".encode()[:8000]
        self._shared[self._FAILURE : self._FAILURE + len(text)] = text


class Scenario(NamedTuple):
    """What a child does to the ledger in its folder.

    Attributes:
      prepare: puts the folder's content there; returns the number of charges in it.
      plan: charged once by each of two openings.
      create: the ledger is created first.
      read_only: opened for reading, and not charged.
      older: it is an older copy beside a newer note, and must never open.
    """

    name: str
    prepare: Callable[[Path], int]
    plan: PlanRecord = PLAN
    create: bool = False
    read_only: bool = False
    older: bool = False


class Fault(NamedTuple):
    """What happens at a boundary.

    Attributes:
      act: at the call.
      lasting: "all": the same at each call after it; "file": at each for the same file; "": at none.
      changing: only at calls that change something.
      names: only at these calls, if any are given.
    """

    name: str
    act: Act
    lasting: str = ""
    changing: bool = False
    names: tuple[str, ...] = ()


FAULTS = (
    Fault("killed before", Act(kill_before=True)),
    Fault("killed after", Act(kill_after=True), changing=True),  # of other calls it is "killed before" the next
    Fault("half written and killed", Act(half=True, kill_after=True), names=("write", "pwrite64")),
    Fault("half written", Act(half=True), names=("write", "pwrite64")),
    Fault("EIO", Act(error=errno.EIO)),
    Fault("ENOSPC", Act(error=errno.ENOSPC), changing=True),
    Fault("EIO from here on", Act(error=errno.EIO), lasting="all", changing=True),
    Fault("EIO of the file from here on", Act(error=errno.EIO), lasting="file"),
    Fault("ENOSPC from here on", Act(error=errno.ENOSPC), lasting="all", changing=True),
    Fault("SIGINT", Act(send=signal.SIGINT)),
    Fault("SIGTERM", Act(send=signal.SIGTERM), changing=True),
)
THIN = ("killed after", "EIO")


def ledger_in(folder: Path) -> Path:
    return folder / "run" / "ledger.sqlite"


def nothing(folder: Path) -> int:
    folder.mkdir()
    return 0


def uncharged(folder: Path) -> int:
    folder.mkdir()
    Ledger.create(ledger_in(folder), dataset_name="d", budget=ROOM).close()
    return 0


def about_to_grow(folder: Path) -> int:
    """A ledger of some pages, of which the second next charge needs one more."""
    uncharged(folder)
    path = ledger_in(folder)
    earlier: list[bytes] = []
    charges = 0
    with Ledger.open(path) as ledger:
        while len(earlier) < 60 or len(earlier[-1]) == len(earlier[-2]):
            ledger.charge((PLAN, OTHER)[charges % 2], EVENT)
            charges += 1
            earlier.append(path.read_bytes())
    path.write_bytes(earlier[-3])
    Path(f"{path}.tip").unlink()
    return charges - 2


def half_committed(folder: Path) -> int:
    """A ledger whose last charge was killed before it was committed: its pages are written, the journal is there."""
    charges = about_to_grow(folder)
    journal = f"{ledger_in(folder)}-journal"

    def charge() -> None:
        with Ledger.open(ledger_in(folder)) as ledger:
            ledger.charge(PLAN, EVENT)
            ledger.charge(PLAN, EVENT)

    seen = 0

    def at_second_commit(call: Call) -> Act:
        nonlocal seen
        seen += call.name == "unlink" and call.path == journal
        return Act(kill_before=seen == 2)

    Child(charge).follow(at_second_commit)
    if seen != 2 or not Path(journal).stat().st_size:
        raise FellShort("the charge that was to be interrupted left no journal")
    return charges + 1


def older_copy(folder: Path) -> int:
    """A ledger of one charge, beside the note of its fourth."""
    uncharged(folder)
    path = ledger_in(folder)
    with Ledger.open(path) as ledger:
        ledger.charge(PLAN, EVENT)
        older = path.read_bytes()
        for _ in range(3):
            ledger.charge(PLAN, EVENT)
    path.write_bytes(older)
    return 1


SCENARIOS = (
    Scenario("create and charge", nothing, create=True),
    Scenario("first charges of a plan", uncharged, plan=WIDE),
    Scenario("charges that add a page", about_to_grow),
    Scenario("charge after a crash", half_committed),
    Scenario("read after a crash", half_committed, read_only=True),
    Scenario("open an older copy", older_copy, older=True),
)


def run(scenario: Scenario, folder: Path, marks: Marks) -> None:
    """What the child does: every failure of a charge is followed by another try."""

    def stop(*_: object) -> None:
        raise SystemExit

    signal.signal(signal.SIGINT, signal.default_int_handler)
    signal.signal(signal.SIGTERM, stop)
    sys.unraisablehook = lambda _: None  # a signal may strike in a finalizer, which can only print it
    path = ledger_in(folder)
    expected = (LedgerError, KeyboardInterrupt, SystemExit)
    try:
        for _ in range(2):
            try:
                if scenario.create and not os.path.lexists(path):
                    Ledger.create(path, dataset_name="d", budget=ROOM).close()
                    marks.create()
                with Ledger.open(path, dataset_name="d", read_only=scenario.read_only, timeout=0.5) as ledger:
                    if scenario.older:
                        raise FellShort("the older copy was opened")
                    if scenario.read_only:
                        ledger.spent()
                        continue
                    for _ in range(2):
                        marks.attempt()
                        try:
                            receipt = ledger.charge(scenario.plan, EVENT)
                            marks.acknowledge(receipt.sequence, receipt.digest)
                            break
                        except expected:
                            pass  # try again with the same object, whatever state the failure left it in
            except expected:
                pass
    except BaseException as error:
        marks.fail(error)


def trial(scenario: Scenario, base: Path, folder: Path, existing: int, fault: Fault, at: int) -> str | None:
    """What a fault at the call number ``at`` led to; None if there is no such call."""
    shutil.copytree(base, folder)
    try:
        marks, matching, fired, path = Marks(), 0, "", ""
        child = Child(lambda: run(scenario, folder, marks), changing=fault.changing)
        bystander = None
        if existing and not scenario.older and not Path(f"{ledger_in(folder)}-journal").exists():
            bystander = Ledger.open(ledger_in(folder), timeout=0.5)

        def act(call: Call) -> Act:
            nonlocal matching, fired, path
            if fired and fault.lasting == "file":
                return fault.act if call.path == path else NOTHING
            if (fault.changing and not call.changing) or (fault.names and call.name not in fault.names):
                return NOTHING
            matching += 1
            if matching - 1 == at:
                fired, path = f"{call.name}({call.path})", call.path
            elif not fired:
                return NOTHING
            return fault.act if matching - 1 == at or fault.lasting else NOTHING

        child.follow(act)
        if not fired:
            return None
        try:
            if marks.failure:
                raise FellShort(f"the process stopped with {marks.failure}")
            return judged(scenario, folder, marks, existing, bystander)
        except (FellShort, LedgerError) as error:
            raise FellShort(f"{scenario.name}, {fault.name}, call {at} ({fired}): {error}") from error
        finally:
            if bystander:
                bystander.close()
    finally:
        shutil.rmtree(folder)


def judged(scenario: Scenario, folder: Path, marks: Marks, existing: int, bystander: Ledger | None) -> str:
    path = ledger_in(folder)
    try:
        ledger = Ledger.open(path, dataset_name="d", timeout=0.5)
    except LedgerError as error:
        if scenario.older:
            return "refused: an older copy"
        # Half of a ledger's creation, or of a note, is refused with the way out; a kill leaves neither of a charge.
        if scenario.create and not marks.created:
            return "refused: created in part"
        if "tip is damaged" in str(error):
            return "refused: half of a note"
        raise FellShort(f"it does not open: {error}") from None
    with ledger:
        if scenario.older:
            raise FellShort("the older copy opens")
        charged = sum(count for _, count in ledger.plans())
        if charged != charges_in(path):
            raise FellShort(f"the ledger says {charged} charges, its file {charges_in(path)}")
        if not existing + len(marks.receipts) <= charged <= existing + marks.attempted:
            raise FellShort(
                f"{existing} charges before, {marks.attempted} more tried, {len(marks.receipts)} receipts "
                f"given, {charged} charges in the ledger"
            )
        for sequence, digest in marks.receipts:
            ledger.check_anchor(sequence, digest)
        ledger.charge(OTHER, EVENT)
        if bystander:
            receipt = bystander.charge(OTHER, EVENT)
            charged += 1
            if (receipt.sequence, receipt.digest) != ledger.anchor():
                raise FellShort("two processes see two ledgers")
        noted = Path(f"{path}.tip").read_bytes()
        if noted.split()[1:3] != [b"%019d," % ledger.anchor()[0], ledger.anchor()[1].encode() + b","]:
            raise FellShort(f"the note says {noted!r} after a charge")
    with Ledger.open(path, read_only=True) as ledger:
        if sum(count for _, count in ledger.plans()) != charged + 1:
            raise FellShort("the charge after it is not in the ledger")
    return "whole" if charged - (bystander is not None) == existing + len(marks.receipts) else "charged more"


def charges_in(path: Path) -> int:
    """Counted by hand, with the hash chain computed anew."""
    with closing(sqlite3.connect(path)) as connection:
        digest, charges = bytes(32), 0
        for body, found in connection.execute("SELECT body, digest FROM entries ORDER BY sequence"):
            digest = hashlib.sha256(digest + body).digest()
            if digest != found:
                raise FellShort("the chain breaks")
            charges += json.loads(body)["kind"] == "charge"
        if connection.execute("SELECT tip FROM head").fetchall() != [(digest,)]:
            raise FellShort("the head is not the last entry")
        if connection.execute("PRAGMA integrity_check").fetchall() != [("ok",)]:
            raise FellShort("SQLite finds the file damaged")
    return charges


def weaken(pragma: str) -> None:
    """Takes a guarantee away from every ledger that this program opens, to see that it is missed."""
    configure = Chain._configure

    def less(self: Chain, fresh: bool) -> None:
        configure(self, fresh)
        self._connection.execute(pragma)

    Chain._configure = less


def main(root: Path, how: str) -> int:
    thin = how == "thin"
    found: dict[str, dict[str, Counter[str]]] = {}
    for number, scenario in enumerate(SCENARIOS[:2] if thin else SCENARIOS):
        base = root / f"base-{number}"
        existing = scenario.prepare(base)
        # Once without a fault, and in this process: what is imported late, is imported now.
        shutil.copytree(base, root / "warm")
        run(scenario, root / "warm", marks := Marks())
        if marks.failure or len(marks.receipts) != marks.attempted:
            raise FellShort(f"{scenario.name}, without a fault: {marks.failure}")
        shutil.rmtree(root / "warm")
        for fault in FAULTS:
            if thin and fault.name not in THIN:
                continue
            fault = fault._replace(changing=fault.changing or thin)
            outcomes = found.setdefault(scenario.name, {}).setdefault(fault.name, Counter())
            at = 0
            while outcome := trial(scenario, base, root / "trial", existing, fault, at):
                outcomes[outcome] += 1
                at += 1
    print(json.dumps(found))
    return 0


if __name__ == "__main__":
    if sys.argv[3:] == ["weak"]:
        weaken("PRAGMA journal_mode = MEMORY")
    try:
        sys.exit(main(Path(sys.argv[1]), sys.argv[2]))
    except FellShort as error:
        sys.exit(f"fell short: {error}")
    except CannotTrace as error:
        print(json.dumps({"skipped": str(error)}))
