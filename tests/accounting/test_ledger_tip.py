"""The note beside the ledger: an older copy put back is refused, and nothing that is true is ever refused."""

from __future__ import annotations

import hashlib
import os
import re
import resource
import shutil
import signal
import socket
import sqlite3
import stat
import subprocess
import sys
import tempfile
import zlib
from contextlib import closing, contextmanager
from pathlib import Path

import pytest
from ledger_worker import BUDGET, EVENT, PLAN, SHORT

from accounting import Budget, BudgetExceeded, Ledger, LedgerError, PlanRecord

WORKER = Path(__file__).parent / "ledger_worker.py"


@pytest.fixture
def path(tmp_path):
    """A closed ledger with a plan and five charges: entries 0 to 6."""
    path = tmp_path / "ledger.sqlite"
    with Ledger.create(path, dataset_name="digits", budget=BUDGET) as ledger:
        charge(ledger, 5)
    return path


def charge(ledger, times=1):
    return [ledger.charge(PLAN, EVENT) for _ in range(times)][-1]


def note_of(path):
    return Path(f"{path}.tip")


def record(sequence, digest):
    """What a note says, put together by hand."""
    text = f"entry {sequence:019d}, {digest}, crc32 ".encode()
    return text + b"%08x\n" % zlib.crc32(text)


def charged(path):
    with Ledger.open(path, read_only=True) as ledger:
        return sum(count for _, count in ledger.plans())


@contextmanager
def without_privileges():
    """Root may read and write anywhere, so root becomes nobody for a moment."""
    root = os.geteuid() == 0
    if root:
        os.seteuid(65534)
    try:
        yield
    finally:
        if root:
            os.seteuid(0)


@pytest.fixture
def open_folder():
    """A folder that everybody may enter; pytest's own are closed to others."""
    with tempfile.TemporaryDirectory() as name:
        Path(name).chmod(0o777)
        yield Path(name)
        Path(name).chmod(0o700)


# -- what is noted ----------------------------------------------------------------------------------------------------


def test_every_charge_is_noted_with_its_own_digest(path):
    with Ledger.open(path) as ledger:
        for _ in range(3):
            receipt = charge(ledger)
            assert note_of(path).read_bytes() == record(receipt.sequence, receipt.digest)
        *_, (sequence, body, digest) = ledger.entries()
        before = [bytes.fromhex(each) for _, _, each in ledger.entries()][-2]
    assert hashlib.sha256(before + body).hexdigest() == digest
    assert note_of(path).read_bytes() == record(sequence, digest)


def test_the_note_is_its_owners_alone(path):
    assert stat.S_IMODE(note_of(path).stat().st_mode) == 0o600


def test_there_is_no_note_before_the_first_charge(tmp_path):
    path = tmp_path / "ledger.sqlite"
    with Ledger.create(path, dataset_name="digits", budget=BUDGET) as ledger:
        with Ledger.open(path) as other:
            assert other.plans() == []
        with pytest.raises(BudgetExceeded):
            ledger.charge(PLAN.model_copy(update={"delta": 0.1}), EVENT)
        assert not note_of(path).exists()
        charge(ledger)
        assert note_of(path).exists()


def test_looking_and_refused_charges_leave_the_note_as_it_was(path):
    before = note_of(path).read_bytes(), note_of(path).stat().st_mtime_ns
    with Ledger.open(path) as ledger, Ledger.open(path, read_only=True) as reader:
        assert ledger.spent().steps_charged == 5 and reader.plans() and list(reader.entries())
        with pytest.raises(LedgerError):
            charge(reader)
        with pytest.raises(BudgetExceeded):
            ledger.charge(PlanRecord(EVENT, 9, 0.1, PLAN.relation, PLAN.unit, PLAN.num_examples), EVENT)
    assert (note_of(path).read_bytes(), note_of(path).stat().st_mtime_ns) == before


def test_a_ledger_has_one_note_whatever_it_is_called(path, tmp_path):
    (tmp_path / "elsewhere").mkdir()
    link = tmp_path / "elsewhere" / "link.sqlite"
    link.symlink_to(path)
    older = path.read_bytes()
    with Ledger.open(link) as ledger:
        receipt = charge(ledger)
    assert note_of(path).read_bytes() == record(receipt.sequence, receipt.digest)
    assert [each.name for each in link.parent.iterdir()] == ["link.sqlite"]
    path.write_bytes(older)
    for name in (path, link):
        with pytest.raises(LedgerError, match="older copy"):
            Ledger.open(name)


# -- older copies -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("read_only", [False, True])
@pytest.mark.parametrize("lost", [1, 2, 20])
def test_an_older_copy_put_back_is_refused_with_the_way_out(path, read_only, lost):
    older = path.read_bytes()
    with Ledger.open(path) as ledger:
        charge(ledger, lost)
    newest = path.read_bytes()
    path.write_bytes(older)
    for _ in range(2):
        with pytest.raises(LedgerError, match=rf"entry {6 + lost} .*older copy.*newest ledger back.*count as spent"):
            Ledger.open(path, read_only=read_only)
    path.write_bytes(newest)
    with Ledger.open(path, read_only=read_only) as ledger:
        assert ledger.plans() == [(PLAN, 5 + lost)]


def test_an_empty_copy_put_back_is_refused(tmp_path):
    path = tmp_path / "ledger.sqlite"
    with Ledger.create(path, dataset_name="digits", budget=BUDGET) as ledger:
        older = path.read_bytes()
        charge(ledger)
    path.write_bytes(older)
    with pytest.raises(LedgerError, match="older copy"):
        Ledger.open(path)


@pytest.mark.parametrize("more", [0, 1, 30])
def test_an_older_copy_that_another_plan_charged_elsewhere_is_refused(tmp_path, more):
    # As long as the lost one, or longer, but another history.
    path, other = tmp_path / "ledger.sqlite", tmp_path / "other.sqlite"
    Ledger.create(path, dataset_name="digits", budget=Budget(1e3, 1e-4)).close()
    shutil.copy(path, other)
    with Ledger.open(path) as ledger:
        charge(ledger, 3)
    with Ledger.open(other) as ledger:
        for _ in range(3 + more):
            ledger.charge(plan := SHORT.model_copy(update={"plan_id": "other"}), plan.event)
    shutil.copy(other, path)
    with pytest.raises(LedgerError, match="another ledger"):
        Ledger.open(path)


def test_an_older_copy_that_took_the_same_steps_elsewhere_is_refused(path, tmp_path):
    # As two copies of one run folder do that both go on: their entries are salted, so they are not the same.
    other = tmp_path / "other.sqlite"
    shutil.copy(path, other)
    for ledger_path in (path, other):
        with Ledger.open(ledger_path) as ledger:
            charge(ledger, 3)
    shutil.copy(other, path)
    with pytest.raises(LedgerError, match="another ledger"):
        Ledger.open(path)


def test_the_ledger_of_other_data_in_its_place_is_refused(path, tmp_path):
    other = tmp_path / "other.sqlite"
    with Ledger.create(other, dataset_name="faces", budget=Budget(50.0, 1e-5)) as ledger:
        charge(ledger, 30)
    shutil.copy(other, path)
    with pytest.raises(LedgerError, match="another ledger"):
        Ledger.open(path)


def test_an_older_copy_is_noticed_after_kill_nine(tmp_path):
    path, log = tmp_path / "ledger.sqlite", tmp_path / "releases"
    with Ledger.create(path, dataset_name="digits", budget=BUDGET) as ledger:
        charge(ledger)
    older = path.read_bytes()
    worker = subprocess.Popen([sys.executable, WORKER, "release", path, log])
    while not (log.exists() and log.stat().st_size >= 3):
        assert worker.poll() is None
    worker.kill()
    worker.wait()
    assert charged(path) > 3
    for journal in tmp_path.glob("*-journal"):
        journal.unlink()
    path.write_bytes(older)
    with pytest.raises(LedgerError, match="older copy"):
        Ledger.open(path)


def test_the_number_of_a_note_has_no_limit(path):
    note_of(path).write_bytes(record(10**19 - 1, "00" * 32))
    with pytest.raises(LedgerError, match="older copy"):
        Ledger.open(path)
    note_of(path).unlink()
    with Ledger.open(path) as ledger:
        for sequence in (-1, 2**63, 2**200):
            with pytest.raises(LedgerError, match="older copy"):
                ledger.check_anchor(sequence, "00" * 32)


# -- what is true stays usable ----------------------------------------------------------------------------------------


def test_a_note_older_than_its_ledger_is_fine(path):
    older = note_of(path).read_bytes()
    with Ledger.open(path) as ledger:
        charge(ledger, 3)
    note_of(path).write_bytes(older)
    for read_only in (False, True):
        with Ledger.open(path, read_only=read_only) as ledger:
            assert ledger.plans() == [(PLAN, 8)]


def test_a_ledger_without_a_note_is_fine_and_gets_one(path):
    note_of(path).unlink()
    assert charged(path) == 5 and not note_of(path).exists()
    with Ledger.open(path) as ledger:
        receipt = charge(ledger)
    assert note_of(path).read_bytes() == record(receipt.sequence, receipt.digest)


def test_note_and_ledger_copied_together_are_not_noticed(path, tmp_path):
    # A limit, written down: only an anchor that is kept elsewhere shows it.
    backup = tmp_path / "backup"
    backup.mkdir()
    for file in (path, note_of(path)):
        shutil.copy(file, backup)
    with Ledger.open(path) as ledger:
        charge(ledger, 3)
        anchor = ledger.anchor()
    for file in (path, note_of(path)):
        shutil.copy(backup / file.name, file)
    with Ledger.open(path) as ledger:
        assert ledger.plans() == [(PLAN, 5)]
        with pytest.raises(LedgerError, match="older copy"):
            ledger.check_anchor(*anchor)


def test_notes_that_overtake_one_another_are_fine(path, monkeypatch):
    # One of two writers is stopped between its charge and its note, and writes the note after the other's.
    late = []
    with Ledger.open(path) as slow, Ledger.open(path) as fast:
        charge(slow)
        charge(fast)
        monkeypatch.setattr(slow._note, "write", late.append)
        charge(slow)
        charge(fast, 4)
        newest = note_of(path).read_bytes()
        monkeypatch.undo()
        slow._note.write(*late)
    assert note_of(path).read_bytes() == record(late[0].sequence, late[0].tip.hex()) != newest
    with Ledger.open(path) as ledger:
        assert ledger.plans() == [(PLAN, 12)]
        charge(ledger)


def test_nobody_is_refused_while_two_processes_charge(tmp_path):
    path, log = tmp_path / "ledger.sqlite", tmp_path / "releases"
    Ledger.create(path, dataset_name="digits", budget=BUDGET).close()
    workers = [subprocess.Popen([sys.executable, WORKER, "release", path, log]) for _ in range(2)]
    try:
        while not note_of(path).exists():
            assert [worker.poll() for worker in workers] == [None, None]
        seen = [charged(path)]
        while len(seen) < 3 or seen[0] == seen[-1]:  # a slow machine may read many times between two charges
            seen.append(charged(path))
            assert [worker.poll() for worker in workers] == [None, None]
    finally:
        for worker in workers:
            worker.kill()
            worker.wait()
    assert seen == sorted(seen) and seen[-1] <= charged(path)
    named = re.fullmatch(rb"entry (\d+), (\w+), crc32 \w+\n", note_of(path).read_bytes())
    assert named
    with Ledger.open(path) as ledger:
        ledger.check_anchor(int(named[1]), named[2].decode())


def test_what_is_noted_while_the_ledger_is_opened_is_in_it(path, monkeypatch):
    # The note is read before the ledger: a charge in between makes the note older, never newer.
    from accounting.chain import Chain

    original = Chain.open.__func__

    def charged_meanwhile(cls, *arguments, **options):
        monkeypatch.undo()
        with Ledger.open(path) as other:
            charge(other)
        found = original(cls, *arguments, **options)
        with Ledger.open(path) as other:
            charge(other)
        return found

    monkeypatch.setattr(Chain, "open", classmethod(charged_meanwhile))
    with Ledger.open(path) as ledger:
        assert ledger.plans() == [(PLAN, 7)]


def test_a_forked_child_leaves_the_note_alone(path):
    with Ledger.open(path) as ledger:
        charge(ledger)
        before = note_of(path).read_bytes()
        child = os.fork()
        if child == 0:
            code = 1
            try:
                try:
                    charge(ledger)
                except LedgerError as error:
                    code = 0 if "fork" in str(error) else 2
                ledger._note.write(ledger._chain.position._replace(sequence=0))
                ledger.close()
            finally:
                os._exit(code)
        assert os.waitpid(child, 0)[1] == 0
        assert note_of(path).read_bytes() == before
        receipt = charge(ledger)
    assert note_of(path).read_bytes() == record(receipt.sequence, receipt.digest)


def test_a_closed_ledger_gives_its_descriptors_back(path):
    def descriptors():
        return len(list(Path("/dev/fd").iterdir()))

    before = descriptors()
    for _ in range(5):
        with Ledger.open(path) as ledger:
            charge(ledger)
        with pytest.raises(LedgerError, match="closed"):
            charge(ledger)
        forgotten = Ledger.open(path)
        charge(forgotten)
        del forgotten
    assert descriptors() == before


# -- damaged notes ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("length", [0, 1, 40, 108])
def test_what_a_power_cut_leaves_of_a_new_note_counts_as_none(path, length):
    note_of(path).write_bytes(bytes(length))
    assert charged(path) == 5
    with Ledger.open(path) as ledger:
        receipt = charge(ledger)
    assert note_of(path).read_bytes() == record(receipt.sequence, receipt.digest)


WHOLE = record(6, "ab" * 32)


@pytest.mark.parametrize(
    "content",
    [
        WHOLE[:1],
        WHOLE[:40],
        WHOLE[:-1],
        WHOLE + b"\n",
        WHOLE * 2,
        WHOLE[:40] + bytes(68),
        WHOLE.replace(b"6, ab", b"5, ab"),
        WHOLE.replace(b"abab", b"abba", 1),
        WHOLE.upper(),
        b"\n",
        bytes(109),
        b"\xff" * 108,
        b"another program's file\n" * 9,
    ],
)
@pytest.mark.parametrize("read_only", [False, True])
def test_a_note_that_is_none_is_refused_and_not_written_over(path, content, read_only):
    note_of(path).write_bytes(content)
    with pytest.raises(LedgerError, match=r"ledger\.sqlite\.tip is damaged.*delete the note"):
        Ledger.open(path, read_only=read_only)
    assert note_of(path).read_bytes() == content


def test_every_flipped_bit_of_a_note_is_refused(path, monkeypatch):
    monkeypatch.setattr("accounting.tip._PAUSE", 0)
    whole = note_of(path).read_bytes()
    for bit in range(8 * len(whole)):
        changed = bytearray(whole)
        changed[bit // 8] ^= 1 << bit % 8
        note_of(path).write_bytes(changed)
        with pytest.raises(LedgerError, match="is damaged"):
            Ledger.open(path, read_only=True)
    note_of(path).write_bytes(whole)
    assert charged(path) == 5


def test_a_note_in_the_middle_of_a_write_is_looked_at_again(path, monkeypatch):
    whole = note_of(path).read_bytes()
    note_of(path).write_bytes(whole[:50] + b"?" * 58)
    monkeypatch.setattr("accounting.tip.time.sleep", lambda _: note_of(path).write_bytes(whole))
    assert charged(path) == 5


def a_link(note):
    note.with_name("target").write_bytes(WHOLE)
    note.symlink_to("target")


def a_socket(note):
    here = Path.cwd()
    os.chdir(note.parent)  # names of sockets are short
    try:
        with socket.socket(socket.AF_UNIX) as made:
            made.bind(note.name)
    finally:
        os.chdir(here)


ODD = {
    "link": a_link,
    "dangling link": lambda note: note.symlink_to("nowhere"),
    "link to itself": lambda note: note.symlink_to(note.name),
    "folder": lambda note: note.mkdir(),
    "pipe": os.mkfifo,
    "socket": a_socket,
}


@pytest.mark.parametrize("make", ODD.values(), ids=ODD)
def test_what_is_no_plain_file_is_refused_by_name(path, make):
    note_of(path).unlink()
    with Ledger.open(path) as ledger:
        make(note_of(path))
        before = sorted((each.name, each.lstat().st_mode, each.lstat().st_size) for each in path.parent.iterdir())
        for read_only in (False, True):
            with pytest.raises(LedgerError, match=r"ledger\.sqlite\.tip is a link, a folder"):
                Ledger.open(path, read_only=read_only)
        with pytest.raises(LedgerError, match=r"ledger\.sqlite\.tip is a link, a folder"):
            charge(ledger)
        assert ledger.plans() == [(PLAN, 5)]
    after = sorted((each.name, each.lstat().st_mode, each.lstat().st_size) for each in path.parent.iterdir())
    assert after == before


def test_a_strangers_file_that_came_after_opening_is_not_written_over(path):
    note_of(path).unlink()
    with Ledger.open(path) as ledger:
        note_of(path).write_bytes(b"my thesis")
        with pytest.raises(LedgerError, match="is damaged"):
            charge(ledger)
        assert ledger.plans() == [(PLAN, 5)] and note_of(path).read_bytes() == b"my thesis"


# -- a charge that is on the disk is never taken back by its note -----------------------------------------------------


def test_a_write_of_the_note_that_fails_costs_no_receipt(path, monkeypatch):
    older = note_of(path).read_bytes()
    with Ledger.open(path) as ledger:
        charge(ledger)
        ledger._note.close()
        ledger._note._descriptor = os.open(note_of(path), os.O_RDONLY)  # writes to it give EBADF
        assert charge(ledger).step == 7
    assert charged(path) == 7 and note_of(path).read_bytes() != older


def test_half_a_note_becomes_none(path):
    # Files may not grow beyond 50 bytes from here on, as on a full disk; the ledger's own commit is past by then.
    with Ledger.open(path) as ledger:
        charge(ledger)
        position = ledger._chain.position
        os.truncate(note_of(path), 0)
        before = resource.getrlimit(resource.RLIMIT_FSIZE)
        handler = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
        resource.setrlimit(resource.RLIMIT_FSIZE, (50, before[1]))
        try:
            ledger._note.write(position)
        finally:
            resource.setrlimit(resource.RLIMIT_FSIZE, before)
            signal.signal(signal.SIGXFSZ, handler)
    assert note_of(path).read_bytes() == b""
    assert charged(path) == 6


def test_a_note_that_may_not_be_written_stays_behind(path, open_folder):
    inside = open_folder / "ledger.sqlite"
    shutil.copy(path, inside)
    shutil.copy(note_of(path), note_of(inside))
    inside.chmod(0o666)
    note_of(inside).chmod(0o444)
    before = note_of(inside).read_bytes()
    with without_privileges(), Ledger.open(inside) as ledger:
        assert charge(ledger).step == 6
    assert note_of(inside).read_bytes() == before
    assert charged(inside) == 6


def test_a_folder_that_cannot_be_written_to_can_be_read_and_its_older_copies_are_refused(path, open_folder):
    inside, older = open_folder / "ledger.sqlite", path.read_bytes()
    with Ledger.open(path) as ledger:
        charge(ledger)
    for file in (path, note_of(path)):
        shutil.copy(file, open_folder)
        (open_folder / file.name).chmod(0o444)
    open_folder.chmod(0o555)
    with without_privileges():
        assert charged(inside) == 6
        with pytest.raises(LedgerError, match="writable"), Ledger.open(inside) as ledger:
            charge(ledger)
    open_folder.chmod(0o777)
    inside.chmod(0o644)
    inside.write_bytes(older)
    open_folder.chmod(0o555)
    with without_privileges(), pytest.raises(LedgerError, match="older copy"):
        Ledger.open(inside, read_only=True)


def test_a_note_that_may_not_be_read_is_refused(path, open_folder):
    inside = open_folder / "ledger.sqlite"
    shutil.copy(path, inside)
    shutil.copy(note_of(path), note_of(inside))
    inside.chmod(0o666)
    note_of(inside).chmod(0o000)
    for read_only in (False, True):
        with without_privileges(), pytest.raises(LedgerError, match="Make it readable"):
            Ledger.open(inside, read_only=read_only)


# -- a ledger that is gone --------------------------------------------------------------------------------------------


@pytest.mark.parametrize("content", [None, b"", b"x"])
def test_a_lost_ledger_is_not_created_anew(path, content):
    if content is not None:
        note_of(path).write_bytes(content)
    whole = path.read_bytes()
    path.unlink()
    with pytest.raises(LedgerError, match=r"Put it back.*count as spent.*another name"):
        Ledger.create(path, dataset_name="digits", budget=BUDGET)
    assert not path.exists()
    if content is None:
        path.write_bytes(whole)
        assert charged(path) == 5


def test_an_existing_ledger_is_still_said_to_exist(path):
    with pytest.raises(LedgerError, match="exists already"):
        Ledger.create(path, dataset_name="digits", budget=BUDGET)


def test_a_lost_ledger_is_missing_not_empty(path):
    path.unlink()
    with pytest.raises(LedgerError, match="is missing"):
        Ledger.open(path)


def test_an_older_copy_with_as_many_commits_is_noticed_by_a_ledger_that_is_open(tmp_path):
    """SQLite trusts the pages it remembers while a counter of commits in the file stays the same."""
    path, other = tmp_path / "ledger.sqlite", tmp_path / "other.sqlite"
    with Ledger.create(path, dataset_name="d", budget=BUDGET) as ledger:
        ledger.charge(PLAN, EVENT)
        other.write_bytes(path.read_bytes())
        ledger.charge(PLAN, EVENT)
        with closing(sqlite3.connect(other)) as connection:  # as many commits, and one charge less
            connection.execute("UPDATE head SET sequence = sequence")
            connection.commit()
        path.write_bytes(other.read_bytes())
        with pytest.raises(LedgerError):
            ledger.charge(PLAN, EVENT)
