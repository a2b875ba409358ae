"""A hundred thousand damaged, edited and exchanged ledgers: none is taken for one that spent less than its anchor.

An anchor that is kept apart (as checkpoints and reports keep it) or an untouched note beside the file must give away
every file that holds less than the newest one did; nothing but ``LedgerError`` may be raised on the way, and what is
accepted must take the next charge, or refuse it.  The changes are drawn with fixed seeds; the claim holds for all of
them, so the false-alarm probability is 0.
"""

from __future__ import annotations

import hashlib
import itertools
import json
import os
import random
import sqlite3
import struct
import tempfile
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import closing
from pathlib import Path
from typing import NamedTuple

import pytest
from ledger_worker import PLAN

from accounting import Budget, Gaussian, Ledger, LedgerError, Spent

EVENT = Gaussian(20.0)
FIRST = PLAN.model_copy(update={"event": EVENT, "steps": 60})
SECOND = FIRST.model_copy(update={"plan_id": "second"})
MEMORY = Path("/dev/shm")
PAGE = 4096


class Files(NamedTuple):
    """What lies in the folder; None for a file that is not there."""

    ledger: bytes
    note: bytes | None
    journal: bytes | None = None
    log: bytes | None = None  # of journal_mode=WAL, which no ledger is in


class History(NamedTuple):
    """A ledger as it was after each of its charges.

    Attributes:
      moments: oldest first.
      forked: the charges after an older moment were made a second time, elsewhere.
      foreign: the ledger of other data.
    """

    moments: list[Files]
    forked: list[Files]
    foreign: Files
    anchor: tuple[int, str]
    spent: Spent

    @property
    def newest(self) -> Files:
        return self.moments[-1]


class Changed(NamedTuple):
    files: Files
    note_is_whole: bool  # the newest note lies beside it, so that no anchor is needed


def charge_in_turn(path: Path, plans: list, charges: int) -> Iterator[Files]:
    with Ledger.open(path) as ledger:
        for number in range(charges):
            ledger.charge(plans[number % len(plans)], EVENT)
            yield Files(path.read_bytes(), Path(f"{path}.tip").read_bytes())


def history(folder: Path, plans: list) -> History:
    path, budget = folder / "ledger.sqlite", Budget(1e3, 1e-3)
    put(folder, None)
    Ledger.create(path, dataset_name="digits", budget=budget).close()
    moments = [Files(path.read_bytes(), None), *charge_in_turn(path, plans, 24)]
    with Ledger.open(path) as ledger:
        anchor, spent = ledger.anchor(), ledger.spent()
    put(folder, moments[12])
    forked = list(charge_in_turn(path, plans, 20))
    put(folder, None)
    Ledger.create(path, dataset_name="faces", budget=budget).close()
    return History(moments, forked, list(charge_in_turn(path, plans, 30))[-1], anchor, spent)


def put(folder: Path, files: Files | None) -> None:
    """Makes the folder hold exactly this."""
    for end, content in zip(("", ".tip", "-journal", "-wal", "-shm"), (*(files or (None,) * 4), None), strict=True):
        path = folder / f"ledger.sqlite{end}"
        if content is None:
            path.unlink(missing_ok=True)
        else:
            path.write_bytes(content)


@pytest.fixture(scope="module")
def folder() -> Iterator[Path]:
    with tempfile.TemporaryDirectory(dir=MEMORY if os.access(MEMORY, os.W_OK) else None) as name:
        yield Path(name)


@pytest.fixture(scope="module", params=[[FIRST], [FIRST, SECOND]], ids=["one plan", "two plans"])
def known(request: pytest.FixtureRequest, folder: Path) -> Iterator[History]:
    with pytest.MonkeyPatch.context() as patch:
        salts = itertools.count()
        patch.setattr("secrets.token_hex", lambda size: f"{next(salts):0{2 * size}x}")  # the same ledger in every run
        found = history(folder, request.param)
    yield found


@pytest.fixture(autouse=True)
def no_waiting(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("accounting.tip._PAUSE", 0)


# -- changes ----------------------------------------------------------------------------------------------------------


def bytes_changed(data: bytes, draw: random.Random, first: int = 0, last: int | None = None) -> bytes:
    changed = bytearray(data)
    for _ in range(draw.choice((1, 1, 1, 2, 8))):
        place = draw.randrange(first, min(last or len(data), len(data)))
        match draw.randrange(4):
            case 0 | 1:
                changed[place] ^= 1 << draw.randrange(8)
            case 2:
                changed[place] = draw.choice((0, 1, 2, 0xFF, draw.randrange(256)))
            case 3:
                length = draw.choice((2, 4, 16, 512))
                changed[place : place + length] = draw.choice((bytes(length), draw.randbytes(length)))[
                    : len(changed[place : place + length])
                ]
    return bytes(changed)


def flip(known: History, draw: random.Random) -> Changed:
    return Changed(known.newest._replace(ledger=bytes_changed(known.newest.ledger, draw)), True)


def edit_header(known: History, draw: random.Random) -> Changed:
    """The first 100 bytes say how SQLite reads all others; those of the tables' first pages how it finds rows."""
    page = draw.randrange(0, len(known.newest.ledger), PAGE)
    return Changed(known.newest._replace(ledger=bytes_changed(known.newest.ledger, draw, page, page + 112)), True)


def cut(known: History, draw: random.Random) -> Changed:
    data = known.newest.ledger
    length = draw.choice((draw.randrange(len(data)), draw.randrange(0, len(data) + 1, 512), draw.randrange(100)))
    ends = (b"", b"", bytes(len(data) - length), draw.randbytes(len(data) - length), known.moments[3].ledger[length:])
    return Changed(known.newest._replace(ledger=data[:length] + draw.choice(ends)), True)


def move_pages(known: History, draw: random.Random) -> Changed:
    """Pages are exchanged, doubled, cleared, or those of an older copy."""
    data = known.newest.ledger
    pages = [data[place : place + PAGE] for place in range(0, len(data), PAGE)]
    for _ in range(draw.choice((1, 1, 2))):
        one, other = draw.randrange(len(pages)), draw.randrange(len(pages))
        older = draw.choice(known.moments + known.forked).ledger
        match draw.randrange(5):
            case 0:
                pages[one], pages[other] = pages[other], pages[one]
            case 1:
                pages[one] = pages[other]
            case 2:
                pages.insert(one, pages[other])
            case 3:
                pages[one] = bytes(PAGE)
            case 4:
                pages[one] = older[one * PAGE : (one + 1) * PAGE]
    return Changed(known.newest._replace(ledger=b"".join(pages)), True)


def change_note(note: bytes | None, known: History, draw: random.Random) -> bytes | None:
    """None, an older one, another ledger's, or a damaged one."""
    some = draw.choice([*known.moments[1:], *known.forked, known.foreign]).note or b""
    return draw.choice((None, None, some, some, b"", bytes_changed(note or some, draw), some[: draw.randrange(109)]))


def edit_note(known: History, draw: random.Random) -> Changed:
    """The note alone, beside the newest ledger or an older one: only the anchor can tell."""
    older = draw.choice(known.moments)
    ledger = draw.choice((known.newest.ledger, older.ledger, flip(known, draw).files.ledger))
    return Changed(Files(ledger, change_note(older.note, known, draw)), False)


def exchange(known: History, draw: random.Random) -> Changed:
    """Another whole ledger in its place: an older copy, one with another history, one of other data."""
    other = draw.choice((draw.choice(known.moments[:-1]), draw.choice(known.forked), known.foreign))
    if draw.random() < 0.5:
        return Changed(other._replace(note=known.newest.note), True)
    return Changed(other._replace(note=draw.choice((other.note, change_note(other.note, known, draw)))), False)


def bodies_of(data: bytes) -> list[bytes]:
    with closing(sqlite3.connect(":memory:")) as connection:
        connection.deserialize(data)
        return [body for (body,) in connection.execute("SELECT body FROM entries ORDER BY sequence")]


def rewritten(data: bytes, bodies: list[bytes], draw: random.Random) -> bytes:
    """The ledger with these entries, and their hash chain right from the start to a place, or to the end."""
    right_to = draw.choice((len(bodies), len(bodies), len(bodies), draw.randrange(len(bodies) + 1)))
    with closing(sqlite3.connect(":memory:")) as connection:
        connection.deserialize(data)
        kept = connection.execute("SELECT digest FROM entries ORDER BY sequence").fetchall()
        connection.execute("DELETE FROM entries")
        digest = bytes(32)
        for sequence, body in enumerate(bodies):
            digest = hashlib.sha256(digest + body).digest()
            if sequence >= right_to and sequence < len(kept):
                digest = kept[sequence][0]
            connection.execute("INSERT INTO entries VALUES (?, ?, ?)", (sequence, body, digest))
        if draw.random() < 0.9:
            connection.execute("UPDATE head SET sequence = ?, tip = ?", (len(bodies) - 1, digest))
        if draw.random() < 0.05:
            connection.execute(
                draw.choice(
                    (
                        "CREATE TRIGGER t AFTER INSERT ON entries BEGIN DELETE FROM entries WHERE sequence > 3; END",
                        "CREATE INDEX i ON entries (body)",
                        "CREATE VIEW v AS SELECT * FROM entries",
                        "UPDATE entries SET body = CAST(body AS TEXT) WHERE sequence = 2",
                        "PRAGMA user_version = 7",
                        "INSERT INTO entries VALUES (99, x'7b7d', zeroblob(32))",
                    )
                )
            )
        connection.commit()
        return connection.serialize()


def renumbered(bodies: list[bytes]) -> list[bytes]:
    """The charges of each plan counted from 1 again, so that a missing one leaves no gap."""
    steps: Counter[str] = Counter()
    after = []
    for body in bodies:
        entry = None if body in SENSELESS else json.loads(body)
        if entry and entry["kind"] == "charge":
            steps[entry["plan_id"]] += 1
            entry["step"] = steps[entry["plan_id"]]
            body = json.dumps(entry, sort_keys=True, separators=(",", ":")).encode()
        after.append(body)
    return after


SENSELESS = (
    *(b"", b"{}", b"[1]", b"5", b'"x"', b"null", b"true", b"no json", b"\xff", b"[" * 90_000, b"9" * 9_000, b"1e999"),
    *(b'{"kind":1}', b'{"kind":[]}', b'{"kind":"charge"}', b'{"kind":"charge","plan_id":[],"step":1}'),
    *(b'{"kind":"charge","plan_id":"shared","step":"1"}', b'{"kind":"plan","plan_id":{}}', b'{"kind":"header"}'),
    *(b'{"kind":"plan","plan_id":"shared","event":{}}', b'{"kind":"plan","plan_id":"x","event":{"type":"Gaussian"}}'),
)


def edit_rows(known: History, draw: random.Random) -> Changed:
    """Entries deleted, exchanged, edited and added, with none, some or all of the digests computed anew."""
    bodies = bodies_of(known.newest.ledger)
    for _ in range(draw.choice((1, 1, 2))):
        place, other = draw.randrange(len(bodies)), draw.randrange(len(bodies))
        match draw.randrange(8):
            case 0:
                del bodies[place]
            case 1:
                del bodies[max(2, place) :]
            case 2:
                bodies[place], bodies[other] = bodies[other], bodies[place]
            case 3:
                bodies[1] = bodies[1].replace(b"20.0", draw.choice((b"200.0", b"2e9", b"0.1", b"-1", b"null")))
            case 4:
                bodies[1] = bodies[1].replace(b'"steps":60', draw.choice((b'"steps":24', b'"steps":1', b'"steps":999')))
            case 5:
                bodies[0] = bodies[0].replace(*draw.choice(((b"digits", b"faces"), (b"1000.0", b"1.0"))))
            case 6:
                bodies.append(bodies[place])
            case 7:
                bodies[place] = draw.choice(SENSELESS)
        bodies = bodies or [b"{}"]
    bodies = renumbered(bodies) if draw.random() < 0.7 else bodies
    ledger = rewritten(known.newest.ledger, bodies, draw)
    if draw.random() < 0.3:
        return Changed(known.newest._replace(ledger=ledger), True)
    return Changed(Files(ledger, change_note(known.newest.note, known, draw)), False)


def journal_to(older: bytes, newer: bytes, draw: random.Random) -> bytes:
    """A journal with which SQLite takes ``newer`` back to ``older`` (https://sqlite.org/fileformat.html, section 3)."""
    nonce = draw.randrange(2**32)
    records = []
    for place in range(0, len(older), PAGE):
        page = older[place : place + PAGE]
        if page != newer[place : place + PAGE]:
            check = (nonce + sum(page[PAGE - 200 : 0 : -200])) % 2**32
            records.append(struct.pack(">I", place // PAGE + 1) + page + struct.pack(">I", check))
    magic = bytes.fromhex("d9d505f920a163d7")
    header = magic + struct.pack(">5I", len(records), nonce, len(older) // PAGE, 512, PAGE)
    return header.ljust(512, b"\0") + b"".join(records)


def plant_journal(known: History, draw: random.Random) -> Changed:
    """Beside the newest ledger lies what makes SQLite roll back, or what looks like it."""
    newest = known.newest
    older = draw.choice(known.moments[:-1] + known.forked).ledger
    journal = journal_to(older, newest.ledger, draw)
    match draw.randrange(5):
        case 0 | 1:
            return Changed(newest._replace(journal=journal), True)
        case 2:
            return Changed(newest._replace(journal=journal[: draw.randrange(len(journal))]), True)
        case 3:
            return Changed(newest._replace(journal=bytes_changed(journal, draw)), True)
    ledger = bytearray(newest.ledger)
    ledger[18:20] = b"\2\2"  # says that it is in journal_mode=WAL
    log = bytes.fromhex("377f0682") + struct.pack(">II", 3007000, PAGE) + draw.randbytes(draw.randrange(9000))
    return Changed(newest._replace(ledger=bytes(ledger), log=draw.choice((b"", log, None))), True)


CHANGES: dict[str, Callable[[History, random.Random], Changed]] = {
    "bytes": flip,
    "headers": edit_header,
    "cuts": cut,
    "pages": move_pages,
    "rows": edit_rows,
    "exchanges": exchange,
    "journals": plant_journal,
    "notes": edit_note,
}

# -- the law ----------------------------------------------------------------------------------------------------------


def holds_all(spent: Spent, known: History) -> bool:
    names = ("epsilon", "delta", "committed_epsilon", "steps_charged")
    return all(getattr(spent, name) >= getattr(known.spent, name) for name in names)


def judged(folder: Path, known: History, changed: Changed, *, read_only: bool) -> str:
    """What became of a changed ledger."""
    put(folder, changed.files)
    path = folder / "ledger.sqlite"
    try:
        ledger = Ledger.open(path, dataset_name="digits", read_only=read_only, timeout=0.1)
    except LedgerError:
        return "refused when opened"
    with ledger:
        try:
            if changed.note_is_whole:
                assert holds_all(ledger.spent(), known), "accepted with less, beside the newest note"
            ledger.check_anchor(*known.anchor)
        except LedgerError:
            return "refused by its anchor"
        spent = ledger.spent()
        assert holds_all(spent, known), "accepted with less than its anchor"
        if read_only:
            return "accepted"
        try:
            ledger.charge(FIRST, EVENT)
        except LedgerError:
            return "accepted, but not charged"
    try:
        with Ledger.open(path, timeout=0.1) as ledger:
            ledger.check_anchor(*known.anchor)
            assert ledger.spent().steps_charged == spent.steps_charged + 1, "the next charge is lost"
    except LedgerError:
        return "accepted, and refused after a charge"
    return "accepted and charged"


def outcomes(folder: Path, known: History, kind: str, count: int) -> Counter[str]:
    draw, found = random.Random(f"{kind}, {known.spent.steps_planned} steps planned"), Counter()
    for trial in range(count):
        changed = CHANGES[kind](known, draw)
        try:
            found[judged(folder, known, changed, read_only=trial % 2 == 1)] += 1
        except Exception as error:
            error.add_note(f"trial {trial} of {count}")
            raise
    return found


@pytest.mark.parametrize("number", [0, 1, 12, 23])
def test_a_planted_journal_does_take_a_ledger_back_and_its_note_or_anchor_tells(
    folder: Path, known: History, number: int
):
    newest, path = known.newest, folder / "ledger.sqlite"
    journal = journal_to(known.moments[number].ledger, newest.ledger, random.Random(number))
    put(folder, newest._replace(journal=journal))
    with pytest.raises(LedgerError, match="older copy"):
        Ledger.open(path)
    assert path.read_bytes() == known.moments[number].ledger  # rolled back, as SQLite was told to
    put(folder, newest._replace(journal=journal, note=None))
    with Ledger.open(path) as ledger:
        assert sum(charged for _, charged in ledger.plans()) == number
        with pytest.raises(LedgerError, match="older copy"):
            ledger.check_anchor(*known.anchor)


@pytest.mark.parametrize(
    "header",
    [b"\x16\x15\x15\x01", b"\x17\x14\x15\x01", b"\x16\x14\x14\x01"],
    ids=["type", "name", "both"],
)
def test_a_schema_of_bytes_for_text_is_refused(folder: Path, known: History, header: bytes):
    # The header of a row gives each column's type: an even number is bytes, the odd one after it text of that length.
    before = b"\x17\x15\x15\x01"
    assert known.newest.ledger.count(before) == 1
    put(folder, known.newest._replace(ledger=known.newest.ledger.replace(before, header)))
    with pytest.raises(LedgerError, match="damaged"):
        Ledger.open(folder / "ledger.sqlite")


@pytest.mark.parametrize("body", [b"5", b"null", b'"x"', b"true", b"1e999"])
def test_an_entry_that_is_no_object_is_refused_though_its_chain_is_whole(folder: Path, known: History, body: bytes):
    bodies = [*bodies_of(known.newest.ledger), body]
    ledger = rewritten(known.newest.ledger, bodies, random.Random(3))
    put(folder, Files(ledger, None))
    with pytest.raises(LedgerError, match="no sense"):
        Ledger.open(folder / "ledger.sqlite")


COUNTS = [pytest.param(125, id="some"), pytest.param(6250, id="many", marks=pytest.mark.slow)]


@pytest.mark.parametrize("kind", CHANGES)
@pytest.mark.parametrize("count", COUNTS)
def test_no_changed_ledger_is_taken_for_one_that_spent_less(folder: Path, known: History, kind: str, count: int):
    found = outcomes(folder, known, kind, count)
    assert sum(found.values()) == count
    assert found["refused when opened"] > count / 10
    if kind in ("exchanges", "notes", "rows"):  # whole files without the newest note: nothing else gives them away
        assert found["refused by its anchor"] > count / 50
