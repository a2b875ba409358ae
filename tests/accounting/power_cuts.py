"""Replays what a charging process wrote, and cuts the power at every point.

    python tests/accounting/power_cuts.py FOLDER thin|whole [weak]

One run of each scenario of ``boundary_trials.py`` is recorded: every change of a file or a folder, and every fsync.
After each of these a power cut may have left what was synced, and of the rest any part: the model takes away every set
of unsynced changes if there are few, and otherwise all, each one, all but each one, and all after each one, and it
tears each write at sectors.  An fsync makes the content of its file durable, but not its name: that is the fsync of
the folder.  (File systems keep more than that; few promise it.)  Every such state must open, hold every charge whose
receipt was given by then, and take the next charge.

With ``whole``, every fsync of a scenario also fails once, and what it should have made durable stays in doubt for good,
as Linux has it.  A ledger that this damaged may be refused; it must not be short.
Prints one JSON object; exits with 1 at the first state that falls short.  With ``weak``, the ledger does not sync its
folder after a commit, and must be found to fall short.
"""

from __future__ import annotations

import errno
import hashlib
import json
import os
import shutil
import sys
from collections import Counter
from collections.abc import Iterable, Iterator
from itertools import product
from pathlib import Path
from typing import NamedTuple

from boundary_trials import OTHER, SCENARIOS, FellShort, Marks, Scenario, charges_in, ledger_in, run, weaken
from system_calls import NOTHING, Act, Call, CannotTrace, Child

from accounting import Ledger, LedgerError

_SECTOR = 512
_READING = {"openat", "close", "newfstatat", "lseek", "pread64", "read", "fcntl", "getcwd", "readlink", "readlinkat"}


class Change(NamedTuple):
    """One change of a disk: a write, a cut to ``offset`` bytes, a name created or removed, a folder made."""

    kind: str
    path: str
    file: int = 0  # another file of the same name has another number
    offset: int = 0
    data: bytes = b""
    number: int = 0  # in the order of the recording: the same change may be made twice

    @property
    def of(self) -> int | str:
        """What it changes: the content of a file, or a name."""
        return self.file if self.kind in ("write", "cut") else self.path

    @property
    def synced_with(self) -> int | str:
        """The file, or the folder, whose fsync makes it durable."""
        return self.file if self.kind in ("write", "cut") else str(Path(self.path).parent)


class State(NamedTuple):
    """What a disk holds: the content of each file by number, and the names and folders that lead there."""

    contents: dict[int, bytes]
    names: dict[str, int]
    folders: frozenset[str]

    def after(self, changes: Iterable[Change]) -> State:
        contents, names, folders = dict(self.contents), dict(self.names), set(self.folders)
        for change in changes:
            old = contents.get(change.file, b"").ljust(change.offset, b"\0")
            match change.kind:
                case "write":
                    end = change.offset + len(change.data)
                    contents[change.file] = old[: change.offset] + change.data + old[end:]
                case "cut":
                    contents[change.file] = old[: change.offset]
                case "create":
                    names[change.path] = change.file
                case "remove":
                    names.pop(change.path, None)
                case "folder":
                    folders.add(change.path)
        return State(contents, names, frozenset(folders))

    def files(self) -> dict[str, bytes]:
        """The content of every file that can be reached, by path."""
        return {
            path: self.contents.get(file, b"")
            for path, file in self.names.items()
            if self.folders.issuperset(map(str, Path(path).parents))
        }


class Moment(NamedTuple):
    """A point of a recording.

    Attributes:
      durable: what is on the disk whatever happens.
      later: the changes after it in order, each with whether it was synced meanwhile.
      created, receipts, attempted: what the process had been told, and had tried, by then.
    """

    durable: State
    later: list[tuple[Change, bool]]
    created: bool
    receipts: int
    attempted: int


class Recorder:
    """Follows the system calls of a process and knows what they leave on a disk.

    Args:
      failing: this fsync fails; -1 for none.
    """

    def __init__(self, folder: Path, marks: Marks, failing: int = -1) -> None:
        self._folder, self._marks, self._failing = folder, marks, failing
        start = State({}, {}, frozenset(map(str, (folder, *folder.parents))))
        for number, path in enumerate(sorted(folder.rglob("*"))):
            name, file = str(path), number + 1
            content = (Change("folder", name),)
            if path.is_file():
                content = (Change("create", name, file), Change("write", name, file, 0, path.read_bytes()))
            start = start.after(content)
        self._now, self._durable = start, start
        self._later: list[tuple[Change, bool]] = []
        self._in_doubt: set[int] = set()  # the numbers of changes whose fsync failed: no later one helps them
        self._changes = self.syncs = 0
        self.moments: list[Moment] = []
        self._note_moment()

    def at(self, call: Call) -> Act:
        if call.name not in ("fsync", "fdatasync"):
            return NOTHING
        self.syncs += 1
        return Act(error=errno.EIO) if self.syncs - 1 == self._failing else NOTHING

    def after(self, call: Call, result: int) -> None:
        here = call.path == str(self._folder) or call.path.startswith(f"{self._folder}{os.sep}")
        if call.name in ("fsync", "fdatasync"):
            self._sync(self._now.names.get(call.path, call.path), result == 0)
        elif here and result >= 0 and (change := self._change(call, result)):
            self._now = self._now.after([change])
            self._changes += 1
            self._later = [*self._later, (change._replace(number=self._changes), False)]
        else:
            return
        self._note_moment()

    def _change(self, call: Call, result: int) -> Change | None:
        path, known = call.path, self._now.names.get(call.path, 0)
        match call.name:
            case "openat" if call.arguments[2] & os.O_TRUNC:
                raise FellShort(f"{path} is truncated when it is opened, which is not in the model")
            case "openat" if call.arguments[2] & os.O_CREAT and not known:
                return Change("create", path, 1 + max(self._now.contents.keys() | self._now.names.values(), default=0))
            case "pwrite64" if result:
                return Change("write", path, self._now.names[path], call.offset, call.data[:result])
            case "ftruncate":
                return Change("cut", path, self._now.names[path], call.arguments[1])
            case "unlink":
                return Change("remove", path)
            case "mkdir":
                return Change("folder", path)
            case name if name in _READING or name == "fchown":
                return None
        raise FellShort(f"{call.name} of {path} is not in the model")

    def _sync(self, what: int | str, worked: bool) -> None:
        if not worked:
            hit = (change for change, synced in self._later if change.synced_with == what and not synced)
            self._in_doubt.update(change.number for change in hit)
            return
        self._later = [
            (change, synced or (change.synced_with == what and change.number not in self._in_doubt))
            for change, synced in self._later
        ]
        # What was synced joins what is durable, unless an earlier change of the same is still open.
        open_before: set[int | str] = set()
        later = []
        for change, synced in self._later:
            if synced and change.of not in open_before:
                self._durable = self._durable.after([change])
            else:
                open_before.add(change.of)
                later.append((change, synced))
        self._later = later

    def _note_moment(self) -> None:
        marks = self._marks
        moment = Moment(self._durable, self._later, marks.created, len(marks.receipts), marks.attempted)
        self.moments.append(moment)


def cuts(moment: Moment, limit: int) -> Iterator[State]:
    """What a power cut at this moment may leave; all of it, if at most ``limit`` changes are not synced."""
    places = [place for place, (_, synced) in enumerate(moment.later) if not synced]
    number = len(places)
    if number <= limit:
        kept_sets = [
            [place for place, kept in zip(places, bits, strict=True) if kept] for bits in product((0, 1), repeat=number)
        ]
    else:
        kept_sets = [[], places]
        for at in range(number):
            kept_sets += [places[:at], places[at : at + 1], places[:at] + places[at + 1 :]]
    for kept in kept_sets:
        yield left(moment, kept)
    for place in places:
        for kept in ([place], places):
            for part in torn(moment.later[place][0]):
                yield left(moment, kept, {place: part})


def left(moment: Moment, kept: list[int], torn_ones: dict[int, Change] | None = None) -> State:
    replaced = torn_ones or {}
    return moment.durable.after(
        replaced.get(place, change) for place, (change, synced) in enumerate(moment.later) if synced or place in kept
    )


def torn(change: Change) -> Iterator[Change]:
    """What may be left of a write that the power cut struck: a disk writes whole sectors, in any order."""
    if change.kind != "write":
        return
    start, end = change.offset, change.offset + len(change.data)
    edges = range(_SECTOR * (start // _SECTOR + 1), end, _SECTOR)
    for edge in {*edges[:1], *edges[len(edges) // 2 :][:1], *edges[-1:]}:
        yield change._replace(data=change.data[: edge - start])
        yield change._replace(offset=edge, data=change.data[edge - start :])


class Judge:
    """Looks at states, each different one once."""

    def __init__(self, scenario: Scenario, folder: Path, existing: int, receipts: list[tuple[int, str]]) -> None:
        self._scenario, self._folder, self._existing, self._receipts = scenario, folder, existing, receipts
        self._seen: dict[bytes, int] = {}
        self.outcomes: Counter[str] = Counter()

    def look(self, state: State, moment: Moment, in_doubt: bool) -> None:
        files = state.files()
        digest = hashlib.sha256()
        for path in sorted(files):
            digest.update(path.encode() + b"\0%d\0" % len(files[path]) + files[path])
        promised = moment.receipts + moment.created
        if self._seen.get(digest.digest(), -1) >= promised:
            return
        outcome = self._judged(files, moment, in_doubt)
        if digest.digest() not in self._seen:
            self.outcomes[outcome] += 1
        self._seen[digest.digest()] = promised

    def _judged(self, files: dict[str, bytes], moment: Moment, in_doubt: bool) -> str:
        try:
            for path, content in files.items():
                Path(path).parent.mkdir(parents=True, exist_ok=True)
                Path(path).write_bytes(content)
            return self._opened(moment, in_doubt)
        except LedgerError as error:
            if in_doubt or (self._scenario.create and not moment.created):
                return "refused"
            told = f"{moment.receipts} receipts were given"
            raise FellShort(f"{self._scenario.name}: after a power cut, when {told}: {error}") from error
        finally:
            shutil.rmtree(self._folder, ignore_errors=True)

    def _opened(self, moment: Moment, in_doubt: bool) -> str:
        path = ledger_in(self._folder)
        with Ledger.open(path, dataset_name="d") as ledger:
            charged = sum(count for _, count in ledger.plans())
            least, most = self._existing + moment.receipts, self._existing + moment.attempted + in_doubt
            if not least <= charged <= most or charged != charges_in(path):
                raise FellShort(f"{self._scenario.name}: {charged} charges left, not {least} to {most}")
            for anchor in self._receipts[: moment.receipts]:
                ledger.check_anchor(*anchor)
            ledger.charge(OTHER, OTHER.event)
        with Ledger.open(path, read_only=True) as ledger:
            if sum(count for _, count in ledger.plans()) != charged + 1:
                raise FellShort(f"{self._scenario.name}: the next charge is not there")
        return "whole" if charged == least else "charged more"


def recorded(scenario: Scenario, base: Path, folder: Path, failing: int = -1) -> tuple[Recorder, Marks]:
    """The recording of one run in ``folder``, and what the process was given."""
    shutil.copytree(base, folder)
    marks = Marks()
    recorder = Recorder(folder, marks, failing)
    Child(lambda: run(scenario, folder, marks)).follow(recorder.at, recorder.after)
    shutil.rmtree(folder)
    if marks.failure:
        raise FellShort(f"{scenario.name}: the process stopped with {marks.failure}")
    return recorder, marks


def main(root: Path, how: str) -> int:
    found: dict[str, dict[str, int]] = {}
    thin = how == "thin"
    for number, scenario in enumerate(SCENARIOS[:2] if thin else SCENARIOS):
        if scenario.older:
            continue
        base, folder = root / f"base-{number}", root / "trial"
        existing = scenario.prepare(base)
        shutil.copytree(base, folder)
        run(scenario, folder, Marks())  # what is imported late, is imported now
        shutil.rmtree(folder)
        recorder, marks = recorded(scenario, base, folder)
        judge = Judge(scenario, folder, existing, marks.receipts)
        for moment in recorder.moments:
            for state in cuts(moment, 4 if thin else 8):
                judge.look(state, moment, in_doubt=False)
        found[scenario.name] = {"moments": len(recorder.moments), "fsyncs": recorder.syncs, **judge.outcomes}
        failing: Counter[str] = Counter()
        for sync in range(0 if thin else recorder.syncs):
            after_failure, marks = recorded(scenario, base, folder, sync)
            judge = Judge(scenario, folder, existing, marks.receipts)
            for moment in after_failure.moments:
                for state in cuts(moment, 0):
                    judge.look(state, moment, in_doubt=True)
            failing += judge.outcomes
        found[scenario.name] |= {f"{outcome}, after an fsync that failed": count for outcome, count in failing.items()}
    print(json.dumps(found))
    return 0


if __name__ == "__main__":
    if sys.argv[3:] == ["weak"]:
        weaken("PRAGMA synchronous = FULL")
    try:
        sys.exit(main(Path(sys.argv[1]), sys.argv[2]))
    except FellShort as error:
        sys.exit(f"fell short: {error}")
    except CannotTrace as error:
        print(json.dumps({"skipped": str(error)}))
