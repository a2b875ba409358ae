"""A durable, append-only chain of byte strings in one SQLite file.

What it guarantees: when :meth:`Chain.append` returns, what it appended is on the disk and survives a crash of the
process or the machine; when it raises, nothing is relied on.  Several processes may append;
one at a time holds the lock, and each sees what the others wrote before it decides.  ``kill -9`` at any moment leaves
the last committed state (SQLite: ``journal_mode=DELETE``, ``synchronous=EXTRA``, ``BEGIN IMMEDIATE``).

Every entry carries ``SHA-256(digest of the entry before || body)``, and one row holds (last sequence, last digest) and
is updated in the same transaction, so that a changed, swapped or deleted row is seen, the last one included.  All of
it is verified when the file is opened; later only what was appended since.  A file that lost entries which this
object has seen or written, say because an older copy was written over it, is damaged: a step would repeat its noise.

What it does not promise: the hashes hold no secret.  They show accidents and careless edits.  Whoever can write the
file can also forge it as a whole, or put an older copy in its place; against that, keep an anchor (sequence, digest)
elsewhere.  ``tip.py`` keeps one beside the file, against accidents.  File locks on network file systems are only as
good as the file system.
"""

from __future__ import annotations

import hashlib
import os
import sqlite3
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import NamedTuple

from .errors import LedgerError

FORMAT_VERSION = 1
_APPLICATION_ID = 0x64704C67  # "dpLg"
_TABLES = {
    "entries": "CREATE TABLE entries (sequence INTEGER PRIMARY KEY, body BLOB NOT NULL, digest BLOB NOT NULL)",
    "head": "CREATE TABLE head (id INTEGER PRIMARY KEY CHECK (id = 1), sequence INTEGER NOT NULL, tip BLOB NOT NULL)",
}


class Position(NamedTuple):
    """The last entry that was verified: its number (-1 before the first) and its digest."""

    sequence: int
    tip: bytes


_START = Position(-1, bytes(32))


class Chain:
    """An open chain; :meth:`create` and :meth:`open` are the ways in. The owner serialises its threads."""

    def __init__(self, path: Path, *, read_only: bool, timeout: float, fresh: bool = False) -> None:
        self.path = path
        self.read_only = read_only
        self.position = _START
        self._witnessed = _START
        self._pid = os.getpid()
        with self._translated():
            self._file = _identity(path)
            # "rw" for readers too: a killed writer leaves a journal, and only a connection that may write can undo the
            # half-written charge in it. SQLite falls back to reading where the file is write-protected.
            # isolation_level=None: transactions are begun and ended by hand.
            self._connection = sqlite3.connect(
                f"{path.absolute().as_uri()}?mode=rw",
                uri=True,
                timeout=timeout,
                isolation_level=None,
                check_same_thread=False,
            )
        try:
            with self._translated():
                self._configure(fresh)
        except LedgerError:
            self._connection.close()
            raise

    @classmethod
    def create(cls, path: Path, first: bytes, *, timeout: float) -> Chain:
        """A new file, readable by its owner alone, that holds ``first`` as entry 0."""
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            os.close(os.open(path, os.O_CREAT | os.O_EXCL | os.O_RDWR, 0o600))
            _sync_folders(path)
        except FileExistsError:
            raise LedgerError(f"{path} exists already. Open it instead; a ledger is never overwritten.") from None
        except OSError as error:
            raise LedgerError(
                f"{path} cannot be created: {error.strerror}. Choose a folder you can write to."
            ) from None
        chain = cls(path, read_only=False, timeout=timeout, fresh=True)
        try:
            with chain._translated(), chain._transaction("IMMEDIATE"):
                run = chain._connection.execute
                for statement in _TABLES.values():
                    run(statement)
                run(f"PRAGMA application_id = {_APPLICATION_ID}")
                run(f"PRAGMA user_version = {FORMAT_VERSION}")
                run("INSERT INTO head VALUES (1, ?, ?)", _START)
                chain._append([first])
        except LedgerError:
            chain.close()
            raise
        return chain

    @classmethod
    def open(cls, path: Path, *, read_only: bool, timeout: float) -> tuple[Chain, list[bytes]]:
        """An existing chain with all its bodies, verified from the first to the last."""
        try:
            empty = path.stat().st_size == 0
        except FileNotFoundError:
            raise LedgerError(
                f"{path} is missing. Restore it from a backup if this data set was used before; create a new ledger "
                "only for a data set that was never trained on."
            ) from None
        except OSError as error:
            raise LedgerError(f"{path} cannot be read: {error.strerror}.") from None
        if empty:
            raise LedgerError(
                f"{path} is empty. If its very creation was interrupted, nothing was charged: delete it and create it "
                "again. Otherwise restore it from a backup."
            )
        chain = cls(path, read_only=read_only, timeout=timeout)
        try:
            return chain, chain.read()
        except LedgerError:
            chain.close()
            raise

    def read(self) -> list[bytes]:
        """The bodies appended since the last look, by this or by another process, verified."""
        with self._translated(), self._transaction("DEFERRED"):
            return self._catch_up()

    def entries(self) -> list[tuple[int, bytes, bytes]]:
        """(sequence, body, digest) of each entry up to :attr:`position`, read again in one transaction and verified."""
        with self._translated(), self._transaction("DEFERRED"):
            rows = self._connection.execute(
                "SELECT sequence, body, digest FROM entries WHERE sequence <= ? ORDER BY sequence",
                (self.position.sequence,),
            ).fetchall()
        sequence, tip = _START
        for number, body, digest in rows:
            sequence += 1
            if not isinstance(body, bytes) or number != sequence or digest != (tip := _link(tip, body)):
                raise _damaged(self.path, f"the chain breaks at entry {sequence}")
        if (sequence, tip) != self.position:
            raise _damaged(self.path, f"it ends at entry {sequence}, which is not the one that was verified before")
        return rows

    def append(self, decide: Callable[[list[bytes]], list[bytes]]) -> Position:
        """Appends what ``decide(bodies appended since the last look)`` returns, under the write lock.

        Returns the position of the last appended entry, once it is on the disk; the next look begins after it. If
        ``decide`` raises, nothing is written. If COMMIT fails, the next look tells what was.
        """
        if self.read_only:
            raise LedgerError(f"{self.path} was opened for reading. Open it with read_only=False to charge.")
        with self._translated(), self._transaction("IMMEDIATE"):
            position = self._append(decide(self._catch_up()))
        # Only now: memory never runs ahead of the file, nor stays behind it, where a lost entry would go unseen.
        self.position = position
        return position

    def rewind(self) -> None:
        """The next look starts from the first entry, and must find again what was seen before."""
        self._witnessed = max(self._witnessed, self.position)
        self.position = _START

    def digest_of(self, sequence: int) -> bytes | None:
        """The digest of an entry that this object has verified; None if there is no such entry."""
        if not 0 <= sequence <= self.position.sequence:  # SQLite's numbers end at 2**63
            return None
        with self._translated():
            row = self._connection.execute("SELECT digest FROM entries WHERE sequence = ?", (sequence,)).fetchone()
        return row[0] if row else None

    def close(self) -> None:
        """Closes the file; calling it again does nothing. A forked child leaves its parent's file alone."""
        if os.getpid() == self._pid:
            self._connection.close()

    def _configure(self, fresh: bool) -> None:
        run = self._connection.execute
        if not fresh:
            self._check_schema()
        # A power cut after COMMIT must not bring the old state back: the folder is synced too.
        run("PRAGMA synchronous = EXTRA")
        run("PRAGMA fullfsync = ON")  # macOS: past the cache of the drive; no effect elsewhere
        run("PRAGMA trusted_schema = OFF")
        run(f"PRAGMA query_only = {'ON' if self.read_only else 'OFF'}")
        if not self.read_only and run("PRAGMA journal_mode = DELETE").fetchone()[0] != "delete":
            raise LedgerError(f"{self.path} cannot be switched to journal_mode=DELETE. Close what else has it open.")

    def _check_schema(self) -> None:
        run = self._connection.execute
        version = run("PRAGMA user_version").fetchone()[0]
        if run("PRAGMA application_id").fetchone()[0] != _APPLICATION_ID:
            raise LedgerError(f"{self.path} is an SQLite file, but not a privacy ledger. Check the path.")
        if version > FORMAT_VERSION:
            raise LedgerError(
                f"{self.path} has format {version}; this package reads up to {FORMAT_VERSION}. Upgrade the package."
            )
        # Exactly our tables: a trigger or a view could make a charge disappear.
        found = run("SELECT type, name, sql FROM sqlite_master").fetchall()
        wanted = {("table", *table) for table in _TABLES.items()}
        if version != FORMAT_VERSION or len(found) != len(wanted) or set(found) != wanted:
            raise _damaged(self.path, "its tables are not those of a ledger")

    @contextmanager
    def _transaction(self, kind: str) -> Iterator[None]:
        if os.getpid() != self._pid:
            raise LedgerError(f"{self.path} was opened before a fork. Open it again in the child process.")
        if _identity(self.path) != self._file:
            raise LedgerError(f"{self.path} was replaced while it was open. Find out why, then open it again.")
        if self._connection.in_transaction:  # left behind by a signal that struck between two lines
            self._connection.execute("ROLLBACK")
        # SQLite trusts the pages it remembers as long as a counter in the file is the same, and an older copy with as
        # many commits after it has the same: forget them.
        self._connection.execute("PRAGMA shrink_memory")
        self._connection.execute(f"BEGIN {kind}")
        try:
            yield
            self._connection.execute("COMMIT")
        except BaseException:
            # Also after a failed COMMIT: whether it reached the disk is unknown, so the entry counts as written
            # if a later read finds it, and no one was told that it succeeded.
            if self._connection.in_transaction:
                self._connection.execute("ROLLBACK")
            raise

    def _catch_up(self) -> list[bytes]:
        heads = self._connection.execute("SELECT sequence, tip FROM head").fetchall()
        if heads == [self.position]:
            return []
        bodies: list[bytes] = []
        sequence, tip = self.position
        rows = self._connection.execute(
            "SELECT sequence, body, digest FROM entries WHERE sequence > ? ORDER BY sequence", (sequence,)
        )
        for number, body, digest in rows:
            sequence += 1
            if not isinstance(body, bytes) or number != sequence or digest != (tip := _link(tip, body)):
                raise _damaged(self.path, f"the chain breaks at entry {sequence}")
            if number == self._witnessed.sequence and tip != self._witnessed.tip:
                raise _damaged(self.path, f"entry {number} is another one than before")
            bodies.append(body)
        if heads != [(sequence, tip)]:
            raise _damaged(self.path, f"it ends at entry {sequence}, which is not the one that was written last")
        if sequence < self._witnessed.sequence:
            raise _damaged(self.path, f"it ends at entry {sequence}; it held {self._witnessed.sequence} before")
        self.position = Position(sequence, tip)
        return bodies

    def _append(self, bodies: list[bytes]) -> Position:
        sequence, tip = self.position
        for body in bodies:
            sequence, tip = sequence + 1, _link(tip, body)
            self._connection.execute("INSERT INTO entries VALUES (?, ?, ?)", (sequence, body, tip))
        self._connection.execute("UPDATE head SET sequence = ?, tip = ?", (sequence, tip))
        return Position(sequence, tip)

    @contextmanager
    def _translated(self) -> Iterator[None]:
        """SQLite's and the system's errors as LedgerError, with the way out."""
        try:
            yield
        except sqlite3.Error as error:
            code = getattr(error, "sqlite_errorcode", 0) & 0xFF
            if code in (sqlite3.SQLITE_BUSY, sqlite3.SQLITE_LOCKED):
                way = "is locked by another process. Wait until it has finished, or raise timeout."
            elif code in (sqlite3.SQLITE_CORRUPT, sqlite3.SQLITE_NOTADB):
                way = f"is damaged or not a ledger ({error}). Restore it from a backup; never start an empty one."
            elif code in (sqlite3.SQLITE_READONLY, sqlite3.SQLITE_CANTOPEN, sqlite3.SQLITE_PERM):
                way = f"cannot be written to ({error}). Make the file and its folder writable for this user."
            elif code in (sqlite3.SQLITE_FULL, sqlite3.SQLITE_IOERR):
                way = f"could not be written ({error}). Free the disk; what was being charged counts as charged."
            else:
                way = f"cannot be used ({error}). Check the path; restore the file from a backup if it is damaged."
            raise LedgerError(f"{self.path} {way}") from None
        except UnicodeDecodeError:
            raise _damaged(self.path, "it holds text that is no text") from None
        except OSError as error:
            raise LedgerError(
                f"{self.path} cannot be reached ({error.strerror}). Check the path and its rights."
            ) from None


def _link(tip: bytes, body: bytes) -> bytes:
    return hashlib.sha256(tip + body).digest()


def _identity(path: Path) -> tuple[int, int]:
    status = path.stat()
    return status.st_dev, status.st_ino


def _sync_folders(path: Path) -> None:
    """Keeps the folders that lead to a new file through a power cut; SQLite syncs only the one that it lies in."""
    for folder in path.resolve().parents:
        with suppress(OSError):  # it may not be ours to open, and some file systems cannot sync a folder
            descriptor = os.open(folder, os.O_RDONLY)
            try:
                os.fsync(descriptor)
            finally:
                os.close(descriptor)


def _damaged(path: Path, how: str) -> LedgerError:
    return LedgerError(f"{path} is damaged: {how}. Restore it from a backup; never start an empty one instead.")
