"""The note beside a ledger: ``LEDGER.tip`` holds (sequence, digest) of the entry that was charged last.

An older copy of a ledger that is put back in its place (a restored backup, a copied file) is whole by its hash chain.
The note gives it away: it names an entry that the copy does not hold, and :meth:`Ledger.open` refuses it then.

What it guarantees: it is written after its entry is on the disk, so a whole ledger holds the entry of its own note,
through ``kill -9`` and power loss as well. It costs one write of 108 bytes in place, and no fsync. It is readable by
its owner alone, and nothing else is written to: a link, a folder, a pipe or other content in its place is refused
before anything is charged.

What it does not promise:
  * A note may be a few entries behind its ledger: processes that share a ledger overtake one another, a process dies
    between charge and note, a power cut takes what was not synced, a note or its folder cannot be written to. What is
    charged stays charged and its receipt is given; an older copy that still holds the noted entry is not noticed.
  * No note, no check: ledgers of the first version have none, and a note can be deleted.
  * Whoever puts note and ledger back together, as a copied folder does, is not noticed; nor is a forger, for it holds
    no secret. Against that, keep the ledger's anchor elsewhere.

A note that is empty or has only zero bytes counts as none: a power cut leaves that of a file that was never synced.
Anything else that is no note is refused. The record lies within the first 512 bytes, which a disk writes as a whole,
so a power cut cannot leave half of it, and a guess could only be that the ledger is the newest.
"""

from __future__ import annotations

import errno
import os
import re
import stat
import time
import zlib
from contextlib import suppress
from pathlib import Path

from .chain import Position
from .errors import LedgerError

_NOTE = re.compile(rb"(entry ([0-9]{19}), ([0-9a-f]{64}), crc32 )([0-9a-f]{8})\n")
_SIZE = 6 + 19 + 2 + 64 + 8 + 8 + 1
_LOOKS = 5  # another process may be in the middle of a write: look again, this often
_PAUSE = 0.01  # seconds
# Not blocking: a named pipe in place of the file must not hold the process. Windows has none of the first two.
_FLAGS = getattr(os, "O_NOFOLLOW", 0) | getattr(os, "O_NONBLOCK", 0) | getattr(os, "O_BINARY", 0)


class TipNote:
    """The note of one ledger. The owner serialises its threads; a forked child writes nothing."""

    def __init__(self, ledger: Path) -> None:
        # Of the file, not of a link to it: whatever a ledger is called, it has one note.
        self.path = Path(f"{os.path.realpath(ledger)}.tip")
        self._descriptor: int | None = None
        self._pid = os.getpid()

    def exists(self) -> bool:
        """Whether anything lies in its place, be it a note or not.

        Raises:
          LedgerError: the disk does not say. Were that taken for a missing note, an older copy would pass.
        """
        try:
            os.lstat(self.path)
        except OSError as error:
            if error.errno not in (errno.ENOENT, errno.ENOTDIR, errno.ENAMETOOLONG):
                raise self._unreadable(error) from None
            return False
        return True

    def read(self) -> Position | None:
        """What was noted; None if there is no note, or an empty one.

        Raises:
          LedgerError: what lies there is no note, or cannot be read.
        """
        try:
            descriptor = self._open(os.O_RDONLY)
        except OSError as error:
            if not self.exists():
                return None
            raise self._unreadable(error) from None
        try:
            return self._look(descriptor)
        finally:
            _close(descriptor)

    def prepare(self) -> None:
        """Opens the note, or makes one, before the charge that it is for; does nothing where it cannot be written.

        Raises:
          LedgerError: what lies there is no note.
        """
        if self._descriptor is not None:
            return
        try:
            descriptor = self._open(os.O_RDWR | os.O_CREAT)
        except OSError:  # a folder, file or disk that takes no note must not stop the charge
            return
        try:
            self._look(descriptor)
        except BaseException:
            _close(descriptor)
            raise
        self._descriptor = descriptor

    def write(self, position: Position) -> None:
        """Notes a committed entry. A failure is no error: the charge is on the disk, and an older note is true."""
        if self._descriptor is None or os.getpid() != self._pid:
            return
        record = _encode(position)
        with suppress(OSError):
            if _write_at_start(self._descriptor, record) != len(record):
                os.ftruncate(self._descriptor, 0)  # a full disk took half of it: no note is better than half of one

    def close(self) -> None:
        """Closes the file; calling it again does nothing. A forked child leaves its parent's file alone."""
        descriptor, self._descriptor = self._descriptor, None
        if descriptor is not None and os.getpid() == self._pid:
            _close(descriptor)

    def _open(self, flags: int) -> int:
        with suppress(FileNotFoundError):
            self._check_kind(os.lstat(self.path))
        descriptor = os.open(self.path, flags | _FLAGS, 0o600)
        try:
            self._check_kind(os.fstat(descriptor))
        except BaseException:
            _close(descriptor)
            raise
        return descriptor

    def _check_kind(self, status: os.stat_result) -> None:
        if not stat.S_ISREG(status.st_mode):
            raise LedgerError(
                f"{self.path} is a link, a folder or a device; the note of a ledger's last entry is a plain file. "
                "Find out who put it there, and move it away."
            )

    def _look(self, descriptor: int) -> Position | None:
        for look in range(_LOOKS):
            if look:
                time.sleep(_PAUSE)
            try:
                os.lseek(descriptor, 0, os.SEEK_SET)
                content = os.read(descriptor, _SIZE + 1)
            except OSError as error:
                raise self._unreadable(error) from None
            if len(content) <= _SIZE and not content.strip(b"\0"):
                return None
            found = _NOTE.fullmatch(content)
            if found and int(found[4], 16) == zlib.crc32(found[1]):
                return Position(int(found[2]), bytes.fromhex(found[3].decode()))
        raise LedgerError(
            f"{self.path} is damaged: it does not note a ledger's last entry. Put the newest ledger and its note back. "
            "Only if you know that the ledger beside it is the newest, delete the note; the next charge writes it anew."
        )

    def _unreadable(self, error: OSError) -> LedgerError:
        return LedgerError(
            f"{self.path} cannot be read ({error.strerror}), so it is unknown whether the ledger beside it is the "
            "newest. Make it readable for this user, as the ledger is."
        )


def _close(descriptor: int) -> None:
    """Nothing depends on it: what was written is seen by all, and a note was never synced."""
    with suppress(OSError):
        os.close(descriptor)


def _encode(position: Position) -> bytes:
    text = b"entry %019d, %s, crc32 " % (position.sequence, position.tip.hex().encode())
    return text + b"%08x\n" % zlib.crc32(text)


def _write_at_start(descriptor: int, record: bytes) -> int:
    if hasattr(os, "pwrite"):
        return os.pwrite(descriptor, record, 0)
    os.lseek(descriptor, 0, os.SEEK_SET)  # Windows
    return os.write(descriptor, record)
