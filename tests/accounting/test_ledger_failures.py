"""Everything that can be wrong with a ledger file: it is refused by name, or its content is unchanged."""

from __future__ import annotations

import os
import random
import shutil
import sqlite3
import subprocess
import sys
import tempfile
from contextlib import contextmanager
from pathlib import Path

import pytest
from ledger_worker import BUDGET, EVENT, PLAN

from accounting import Ledger, LedgerError

WORKER = Path(__file__).parent / "ledger_worker.py"


@pytest.fixture
def path(tmp_path):
    """A closed ledger with a plan and 25 charges."""
    path = tmp_path / "ledger.sqlite"
    with Ledger.create(path, dataset_name="digits", budget=BUDGET) as ledger:
        for _ in range(25):
            ledger.charge(PLAN, EVENT)
    return path


def content(path):
    with Ledger.open(path, timeout=0.1) as ledger:
        return ledger.dataset_name, ledger.budget, ledger.plans(), ledger.anchor()


def edit(path, *statements):
    connection = sqlite3.connect(path)
    with connection:
        for statement in statements:
            connection.execute(*statement)
    connection.close()


def test_a_missing_ledger_is_not_an_empty_one(tmp_path):
    with pytest.raises(LedgerError, match="missing"):
        Ledger.open(tmp_path / "nowhere.sqlite")
    assert not (tmp_path / "nowhere.sqlite").exists()


def test_an_empty_file_is_refused(path):
    path.write_bytes(b"")
    with pytest.raises(LedgerError, match="empty"):
        Ledger.open(path)


@pytest.mark.parametrize(
    "garbage",
    [b"x", b"not a database at all\n" * 500, random.Random(0).randbytes(20_000), b"SQLite format 3\x00"],
    ids=["one byte", "text", "noise", "magic"],
)
def test_garbage_is_refused(path, garbage):
    path.write_bytes(garbage)
    with pytest.raises(LedgerError):
        Ledger.open(path)


def test_a_folder_is_refused(tmp_path):
    with pytest.raises(LedgerError):
        Ledger.open(tmp_path)
    with pytest.raises(LedgerError):
        Ledger.create(tmp_path, dataset_name="d", budget=BUDGET)


def test_another_sqlite_file_is_refused(tmp_path):
    other = tmp_path / "other.sqlite"
    edit(other, ("CREATE TABLE entries (x)",))
    with pytest.raises(LedgerError, match="not a privacy ledger"):
        Ledger.open(other)


def test_an_existing_file_is_never_overwritten(path):
    before = path.read_bytes()
    with pytest.raises(LedgerError, match="exists already"):
        Ledger.create(path, dataset_name="digits", budget=BUDGET)
    assert path.read_bytes() == before


def test_every_truncated_file_is_refused(path):
    whole = path.read_bytes()
    for length in sorted({*range(0, 200, 20), *range(200, len(whole), 211), len(whole) - 1}):
        path.write_bytes(whole[:length])
        with pytest.raises(LedgerError):
            content(path)


def flip_and_look(path, flips):
    whole, truth, unseen = path.read_bytes(), content(path), 0
    draw = random.Random(1)
    for _ in range(flips):
        changed = bytearray(whole)
        for _ in range(draw.choice((1, 1, 1, 8))):
            changed[draw.randrange(len(whole))] ^= 1 << draw.randrange(8)
        path.write_bytes(changed)
        for rest in path.parent.glob(path.name + "-*"):
            rest.unlink()
        try:
            assert content(path) == truth
            unseen += 1
        except LedgerError:
            pass
    return unseen


def test_flipped_bits_are_seen_or_change_nothing(path):
    assert flip_and_look(path, 400) < 400


@pytest.mark.slow
def test_ten_thousand_flipped_bits_are_seen_or_change_nothing(path):
    assert flip_and_look(path, 10_000) < 10_000


@pytest.mark.parametrize(
    "statements",
    [
        pytest.param([("DELETE FROM entries WHERE sequence = 26",)], id="last row deleted"),
        pytest.param([("DELETE FROM entries WHERE sequence = 10",)], id="middle row deleted"),
        pytest.param([("DELETE FROM entries",)], id="all rows deleted"),
        pytest.param([("DELETE FROM head",)], id="head deleted"),
        pytest.param([("UPDATE head SET sequence = 25",)], id="head moved back"),
        pytest.param([("UPDATE head SET tip = zeroblob(32)",)], id="tip cleared"),
        pytest.param(
            [("DELETE FROM entries WHERE sequence = 26",), ("UPDATE head SET sequence = 25",)], id="row and head"
        ),
        pytest.param(
            [("UPDATE entries SET body = replace(body, '10000', '99999') WHERE sequence = 1",)], id="plan edited"
        ),
        pytest.param([("UPDATE entries SET body = CAST(body AS TEXT) WHERE sequence = 5",)], id="text for bytes"),
        pytest.param(
            [
                ("UPDATE entries SET sequence = -1 WHERE sequence = 7",),
                ("UPDATE entries SET sequence = 7 WHERE sequence = 8",),
                ("UPDATE entries SET sequence = 8 WHERE sequence = -1",),
            ],
            id="rows swapped",
        ),
        pytest.param([("INSERT INTO entries VALUES (27, x'7b7d', zeroblob(32))",)], id="row added"),
        pytest.param([("CREATE TRIGGER t AFTER INSERT ON entries BEGIN DELETE FROM entries; END",)], id="trigger"),
        pytest.param([("PRAGMA user_version = 0",)], id="no version"),
    ],
)
def test_an_edited_ledger_is_refused(path, statements):
    edit(path, *statements)
    with pytest.raises(LedgerError, match="damaged"):
        Ledger.open(path)


def test_a_newer_format_is_refused(path):
    edit(path, ("PRAGMA user_version = 2",))
    with pytest.raises(LedgerError, match="Upgrade"):
        Ledger.open(path)


def test_a_true_chain_of_senseless_entries_is_refused(tmp_path):
    from accounting.chain import Chain

    for number, body in enumerate((b"{}", b"[1]", b"no json", b'{"kind":"charge","plan_id":"x","step":1}', b"\xff")):
        path = tmp_path / f"{number}.sqlite"
        Chain.create(path, body, timeout=1).close()
        with pytest.raises(LedgerError, match="no sense"):
            Ledger.open(path)


def test_the_wrong_data_set_is_refused(path):
    with pytest.raises(LedgerError, match="'digits', not of 'faces'"):
        Ledger.open(path, dataset_name="faces")


def test_a_locked_ledger_is_refused_after_the_timeout_and_charges_nothing(path):
    with Ledger.open(path, timeout=0.05) as ledger:
        other = sqlite3.connect(path, isolation_level=None)
        try:
            other.execute("BEGIN EXCLUSIVE")
            with pytest.raises(LedgerError, match="locked"):
                Ledger.open(path, timeout=0.05)
            with pytest.raises(LedgerError, match="locked"):
                ledger.charge(PLAN, EVENT)
            other.execute("ROLLBACK")
        finally:
            other.close()
        assert ledger.charge(PLAN, EVENT).step == 26


def test_a_commit_that_readers_block_gives_no_receipt_and_charges_nothing(path):
    with Ledger.open(path, timeout=0.05) as ledger:
        reader = sqlite3.connect(path, isolation_level=None)
        try:
            reader.execute("BEGIN")
            reader.execute("SELECT * FROM head").fetchall()
            with pytest.raises(LedgerError, match="locked"):
                ledger.charge(PLAN, EVENT)
        finally:
            reader.close()
        assert ledger.plans() == [(PLAN, 25)]


def test_a_ledger_edited_while_open_is_refused(path):
    with Ledger.open(path) as ledger:
        edit(path, ("DELETE FROM entries WHERE sequence = 26",), ("UPDATE head SET sequence = 25",))
        with pytest.raises(LedgerError, match="damaged"):
            ledger.charge(PLAN, EVENT)
        with pytest.raises(LedgerError, match="damaged"):
            ledger.spent()


@pytest.mark.parametrize("steps", [1, 2, 25])
def test_an_older_copy_written_over_an_open_ledger_is_refused(path, steps):
    with Ledger.open(path) as ledger:
        older = path.read_bytes()
        for _ in range(steps):
            ledger.charge(PLAN, EVENT)
        inode = path.stat().st_ino
        path.write_bytes(older)
        assert path.stat().st_ino == inode
        for _ in range(2):
            with pytest.raises(LedgerError, match="damaged"):
                ledger.charge(PLAN, EVENT)
        with pytest.raises(LedgerError, match="damaged"):
            ledger.spent()


def test_the_first_charge_of_a_plan_is_not_forgotten_either(tmp_path):
    path = tmp_path / "ledger.sqlite"
    with Ledger.create(path, dataset_name="digits", budget=BUDGET) as ledger:
        older = path.read_bytes()
        ledger.charge(PLAN, EVENT)
        path.write_bytes(older)
        with pytest.raises(LedgerError, match="damaged"):
            ledger.charge(PLAN, EVENT)


@pytest.mark.parametrize("name", ["a\0b", "\ud800", None, b"bytes", 3])
def test_what_no_file_is_called_is_refused(name):
    with pytest.raises(LedgerError, match="not the name of a file"):
        Ledger.open(name)
    with pytest.raises(LedgerError, match="not the name of a file"):
        Ledger.create(name, dataset_name="d", budget=BUDGET)


def test_a_ledger_deleted_or_replaced_while_open_is_refused(path):
    copy = path.with_suffix(".copy")
    shutil.copy(path, copy)
    with Ledger.open(path) as ledger:
        path.unlink()
        with pytest.raises(LedgerError, match="cannot be reached"):
            ledger.charge(PLAN, EVENT)
        copy.rename(path)
        with pytest.raises(LedgerError, match="replaced"):
            ledger.charge(PLAN, EVENT)


def test_a_forked_child_must_open_it_anew(path):
    with Ledger.open(path) as ledger:
        ledger._chain._pid -= 1  # what a child would see
        with pytest.raises(LedgerError, match="fork"):
            ledger.charge(PLAN, EVENT)
        ledger._chain._pid += 1


def test_a_closed_ledger_says_so_by_type(path):
    ledger = Ledger.open(path)
    ledger.close()
    ledger.close()
    with pytest.raises(LedgerError, match="closed"):
        ledger.charge(PLAN, EVENT)


@contextmanager
def without_privileges():
    """Root may write anywhere, so root becomes nobody for a moment."""
    root = os.geteuid() == 0
    if root:
        os.seteuid(65534)
    try:
        yield
    finally:
        if root:
            os.seteuid(0)


def test_a_folder_that_cannot_be_written_to_is_refused(path):
    with tempfile.TemporaryDirectory() as name:
        inside = Path(name) / "ledger.sqlite"
        shutil.copy(path, inside)
        inside.chmod(0o666)
        Path(name).chmod(0o555)
        with without_privileges():
            with pytest.raises(LedgerError, match="cannot be created"):
                Ledger.create(Path(name) / "new.sqlite", dataset_name="d", budget=BUDGET)
            with pytest.raises(LedgerError, match="writable"), Ledger.open(inside) as ledger:
                ledger.charge(PLAN, EVENT)
            with Ledger.open(inside, read_only=True) as reader:
                assert reader.plans() == [(PLAN, 25)]
        Path(name).chmod(0o755)


def test_a_file_that_may_not_be_read_is_refused(path):
    with tempfile.TemporaryDirectory() as name:
        inside = Path(name) / "ledger.sqlite"
        shutil.copy(path, inside)
        Path(name).chmod(0o755)
        inside.chmod(0o000)
        with without_privileges(), pytest.raises(LedgerError):
            Ledger.open(inside)


@pytest.mark.parametrize("room", [13_000, 30_000])
def test_on_a_full_disk_every_acknowledged_charge_is_there(path, room):
    ran = subprocess.run([sys.executable, WORKER, "full", path, str(room)], capture_output=True, text=True, check=True)
    acknowledged, error = ran.stdout.split(maxsplit=2)[:2]
    assert error == "LedgerError"
    assert content(path)[2][0][1] >= 25 + int(acknowledged)
