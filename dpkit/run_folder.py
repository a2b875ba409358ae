"""The run folder: the one door through which the files of a run are read and written.

    RUN/config.yaml          the settings, as they were read
    RUN/ledger.sqlite        what was charged (accounting.ledger)
    RUN/checkpoints/         from which the run can be resumed
    RUN/metrics.jsonl        numbers that are public or released
    RUN/model.safetensors    the released model
    RUN/result.json          what came out, with the ledger's anchor
    RUN/PRIVACY.md           the statement, and a fragment for a model card
    RUN/report.html          the same as a page, with plots
    RUN/nonprivate/          what depends on the data without noise: never to be published

Guarantees:
  * Nothing outside the folder is read or written: names are plain words, and no entry below the folder may be a
    symbolic link.
  * A file that is written is either the old one or the new one, after a crash as well: temporary file, fsync, rename,
    fsync of the folder. A failed write leaves the old one.
  * One process at a time trains in a folder (:meth:`RunFolder.lock`).

Not promised: protection from somebody who changes the folder's links while a process uses it.
"""

from __future__ import annotations

import io
import os
import re
import secrets
import stat
from pathlib import Path
from typing import BinaryIO, TextIO

from filelock import FileLock, Timeout

from dpkit.errors import RunFolderError

LARGEST_TEXT = 64 * 2**20
"""Bytes of a text file of a run that are read at most."""

_BLOCK = 2**16
_NAME = re.compile(r"[A-Za-z0-9_-][A-Za-z0-9._-]{0,63}")
_TEMPORARY = re.compile(r"\.[0-9a-f]{16}\.tmp")  # no valid name: never taken for a file of the run
_NO_FOLLOW = getattr(os, "O_NOFOLLOW", 0)  # Windows has none; the check of the entry remains


class RunFolder:
    """The folder of one run. It need not exist yet: writing makes it."""

    def __init__(self, path: str | os.PathLike[str]) -> None:
        try:
            self.path = Path(path)
            possible = b"\0" not in os.fsencode(self.path)
        except (TypeError, UnicodeEncodeError):
            possible = False
        if not possible:
            raise RunFolderError(f"{path!r} is not the name of a folder; give the run folder's path.")
        if os.path.lexists(self.path) and not os.path.isdir(self.path):  # noqa: PTH112
            raise RunFolderError(f"{self.path} is not a folder; give the run folder's path.")

    def __repr__(self) -> str:
        return f"RunFolder({str(self.path)!r})"

    def entry(self, *names: str) -> Path:
        """The path of ``names`` below the folder, which need not exist.

        Raises:
          RunFolderError: for a name that could leave the folder, and for symbolic links on the way.
        """
        path = self.path
        for name in names:
            if not isinstance(name, str) or not _NAME.fullmatch(name):
                raise RunFolderError(
                    f"{name!r} cannot be a file of a run: names have 1 to 64 letters, digits, dots, dashes and "
                    "underscores, do not start with a dot and have no folders in them."
                )
            path /= name
            if os.path.islink(path):  # noqa: PTH114  # Path.is_symlink raises for names that are too long
                raise RunFolderError(f"{path} is a symbolic link, which may lead out of the run folder; remove it.")
        return path

    def exists(self, *names: str) -> bool:
        """Whether there is such an entry."""
        return os.path.exists(self.entry(*names))  # noqa: PTH110

    def names(self, *names: str) -> list[str]:
        """Names of the entries of a subfolder, sorted; none if it does not exist. Temporary files are left out."""
        folder = self.entry(*names)
        try:
            found = sorted(entry.name for entry in folder.iterdir()) if folder.is_dir() else []
        except OSError as error:
            raise _failed(folder, "read", error) from None
        return [name for name in found if _NAME.fullmatch(name)]

    def read(self, *names: str, limit: int = LARGEST_TEXT) -> bytes:
        """The content of a regular file of at most ``limit`` bytes.

        Raises:
          RunFolderError: it is missing, no regular file, larger, or cannot be read.
        """
        content = self.read_start(*names, length=limit + 1)
        if len(content) > limit:
            raise RunFolderError(f"{self.entry(*names)} is larger than {limit} bytes, which no such file of a run is.")
        return content

    def read_start(self, *names: str, length: int) -> bytes:
        """The first ``length`` bytes of a regular file, or all of them if it has fewer.

        Raises:
          RunFolderError: it is missing, no regular file, or cannot be read.
        """
        path = self.entry(*names)
        try:
            # Not blocking: a named pipe in place of the file must not hold the process.
            with os.fdopen(os.open(path, os.O_RDONLY | _NO_FOLLOW | getattr(os, "O_NONBLOCK", 0)), "rb") as file:
                found = os.fstat(file.fileno())
                if not stat.S_ISREG(found.st_mode):
                    raise RunFolderError(f"{path} is not a regular file.")
                # One more than there are: room is made for what is asked, and headers may lie about sizes.
                return file.read(min(length, found.st_size + 1))
        except OSError as error:
            raise _failed(path, "read", error) from None

    def write(self, *names: str, data: bytes | str) -> Path:
        """Replaces the file as a whole; when this returns, it is on the disk.

        Raises:
          RunFolderError: it could not be written; the file is the one before, or (when only the folder could not be
            synced) the new one, whole.
        """
        path = self.entry(*names)
        temporary = path.with_name(f".{secrets.token_hex(8)}.tmp")
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            try:
                with os.fdopen(
                    os.open(temporary, os.O_CREAT | os.O_EXCL | os.O_WRONLY | _NO_FOLLOW, 0o600), "wb"
                ) as file:
                    file.write(data.encode() if isinstance(data, str) else data)
                    file.flush()
                    os.fsync(file.fileno())
                os.replace(temporary, path)  # noqa: PTH105  # the name under which faults are injected in tests
            except BaseException:
                temporary.unlink(missing_ok=True)
                raise
            _sync_folder(path.parent)
        except OSError as error:
            raise _failed(path, "written", error) from None
        return path

    def append(self, *names: str) -> TextIO:
        """An open log of lines: each is written as it comes, none is synced, and a lost one is no loss.

        A last line that a killed process left unfinished is cut off.

        Raises:
          RunFolderError: it cannot be opened.
        """
        file = self.append_bytes(*names)
        try:
            _end_last_line(file)
        except OSError as error:
            file.close()
            raise _failed(self.entry(*names), "written", error) from None
        return io.TextIOWrapper(file, encoding="utf-8", line_buffering=True)

    def append_bytes(self, *names: str) -> BinaryIO:
        """An open file to whose end bytes are added; it goes on where it ended.

        Raises:
          RunFolderError: it cannot be opened.
        """
        path = self.entry(*names)
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            descriptor = os.open(path, os.O_CREAT | os.O_RDWR | os.O_APPEND | _NO_FOLLOW, 0o600)
        except OSError as error:
            raise _failed(path, "written", error) from None
        return os.fdopen(descriptor, "a+b")

    def make(self, *names: str) -> Path:
        """The subfolder ``names`` (the folder itself without names), made if missing.

        Raises:
          RunFolderError: it cannot be made.
        """
        path = self.entry(*names)
        try:
            path.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise _failed(path, "made", error) from None
        return path

    def remove(self, *names: str) -> None:
        """Deletes a file, if it is there.

        Raises:
          RunFolderError: it cannot be deleted.
        """
        path = self.entry(*names)
        try:
            path.unlink(missing_ok=True)
        except OSError as error:
            raise _failed(path, "deleted", error) from None

    def sweep(self, *names: str) -> None:
        """Deletes the temporary files that killed processes left in a subfolder. Only for the holder of the lock.

        Raises:
          RunFolderError: one cannot be deleted.
        """
        folder = self.entry(*names)
        try:
            for path in folder.iterdir() if folder.is_dir() else ():
                if _TEMPORARY.fullmatch(path.name):
                    path.unlink(missing_ok=True)
        except OSError as error:
            raise _failed(folder, "cleaned", error) from None

    @property
    def lock_file(self) -> str:
        """Where the lock lies, whatever the folder is called from here."""
        return os.path.realpath(self.path) + os.sep + ".lock"

    def lock(self) -> FileLock:
        """The lock of the one process that trains here, taken; it ends with the process, or with ``release()``.

        Raises:
          RunFolderError: another run holds it, or the folder cannot be written to.
        """
        self.make()
        if Path(self.lock_file).is_symlink():
            raise RunFolderError(
                f"{self.lock_file} is a symbolic link, which may lead out of the run folder; remove it."
            )
        lock = FileLock(self.lock_file, mode=0o600)
        try:
            lock.acquire(timeout=0)
        except Timeout:
            raise RunFolderError(
                f"{self.path} is in use: another engine trains in it. Wait until it has finished (or call its "
                "engine.detach()), or give another folder with ledger= to share the budget."
            ) from None
        except (OSError, NotImplementedError) as error:
            raise _failed(self.path, "locked", error) from None
        return lock


def _end_last_line(file: BinaryIO) -> None:
    """Cuts what follows the last line break, looking for it in blocks from the end."""
    end = position = file.seek(0, os.SEEK_END)
    while position > 0:
        start = max(0, position - _BLOCK)
        file.seek(start)
        found = file.read(position - start).rfind(b"\n")
        if found >= 0:
            position = start + found + 1
            break
        position = start
    if position < end:
        file.truncate(position)
    file.seek(0, os.SEEK_END)


def _sync_folder(path: Path) -> None:
    """Makes a rename in ``path`` durable; where folders cannot be opened (Windows), renames are left to the system."""
    if hasattr(os, "O_DIRECTORY"):
        descriptor = os.open(path, os.O_RDONLY | os.O_DIRECTORY)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)


def _failed(path: Path, what: str, error: Exception) -> RunFolderError:
    reason = getattr(error, "strerror", None) or str(error)
    return RunFolderError(f"{path} cannot be {what} ({reason}). Check the path, its rights and the free space.")
