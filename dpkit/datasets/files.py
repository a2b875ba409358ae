"""Files of data sets: found in the data folder, unpacked within a limit, and used only if they are the published ones.

A file is looked for in this order: DIR/<folder>/<file>.gz, DIR/<folder>/<file>, DIR/<file>.gz, DIR/<file>. The first
one that is there counts: where it is wrong, the others are not tried. No more bytes than the file has are unpacked.

Nothing is ever downloaded except by :func:`download`, which keeps a file only if the same checksum is right and never
replaces a file that is there. Not promised: that an address still answers.
"""

from __future__ import annotations

import gzip
import hashlib
import os
import stat
import tempfile
import zlib
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path
from typing import BinaryIO

from dpkit.errors import DataError

from .catalogue import File

_PACKING_OVERHEAD = 2**20  # gzip makes a file larger by far less, a plain file not at all


def folder_of(data_dir: Path | None) -> Path:
    """The data folder: ``data_dir``, or else what the environment variable DPKIT_DATA names.

    Raises:
      DataError: neither is given.
    """
    if data_dir is not None:
        return data_dir
    if variable := os.environ.get("DPKIT_DATA"):
        return Path(variable)
    raise DataError("no data folder is known; give --data-dir DIR or set DPKIT_DATA.")


def find(file: File, data_dir: Path | None) -> tuple[File, Path] | None:
    """``file``, or else the one that serves instead, and where it is; None where it is missing."""
    folder = folder_of(data_dir)
    if not folder.is_dir():
        raise DataError(f"the data folder {folder} does not exist; give the folder that holds {file.folder}.")
    wanted: File | None = file
    while wanted is not None:
        for path in (
            folder / f"{wanted.path}.gz",
            folder / wanted.path,
            folder / f"{wanted.name}.gz",
            folder / wanted.name,
        ):
            if os.path.lexists(path):  # a link to nowhere is there, and is refused by name when it is read
                return wanted, path
        wanted = wanted.instead
    return None


def read(file: File, data_dir: Path | None) -> bytes:
    """The unpacked content of ``file`` in the folder ``data_dir`` (left out: DPKIT_DATA).

    Raises:
      DataError: the file is missing, cannot be read or unpacked, or has another content than the published one.
    """
    found = find(file, data_dir)
    if found is None:
        folder = folder_of(data_dir)
        raise DataError(
            f"{folder / file.path}.gz is missing (and neither {file.name}.gz nor {file.name} lies in {folder}); put it "
            f"there, or give another folder; `python -m experiments.data` lists what is needed and what can be fetched."
        )
    wanted, path = found
    return _checked(wanted, path, packed=path.suffix == ".gz", called=str(path))


def _checked(file: File, path: Path, *, packed: bool, called: str) -> bytes:
    """The unpacked content of ``path``, which must be that of ``file``; ``called``: its name in errors."""
    try:
        # Only regular files: to open a named pipe would wait for ever.
        if not stat.S_ISREG(path.stat().st_mode):
            raise DataError(f"{called} is not a file; put {file.name} there, packed (.gz) or as it is.")
        with gzip.open(path) if packed else path.open("rb") as source:
            content = source.read(file.size + 1)  # never more: a wrong file must not fill the memory
    except (EOFError, zlib.error, gzip.BadGzipFile) as error:
        raise DataError(f"{called} cannot be unpacked ({error}); it is damaged, get it again.") from None
    except OSError as error:
        raise DataError(f"{called} cannot be read ({error.strerror or error}); get {file.name} again.") from None
    if len(content) > file.size:
        raise DataError(
            f"{called} is not the published file: it has more than the {file.size} bytes of {file.name}; get it again."
        )
    if (digest := hashlib.sha256(content).hexdigest()) != file.sha256:
        raise DataError(
            f"{called} is not the published file: SHA-256 of its unpacked content is {digest[:16]}..., expected "
            f"{file.sha256[:16]}...; get it again."
        )
    return content


def lines(content: bytes) -> Iterator[tuple[int, str]]:
    """(number from 1, text) of every line that is not blank. Only a line feed ends a line."""
    for number, line in enumerate(content.decode("utf-8").split("\n"), 1):
        if line.strip():
            yield number, line


def download(file: File, data_dir: Path) -> Path:
    """Fetch ``file`` (or the one that serves instead) into ``data_dir``, unless the right one is there already.

    Returns:
      Where it is.
    Raises:
      DataError: it is published nowhere, pooch is not installed, the address does not answer, what came has another
        content, or a wrong file is in the way.
    """
    try:
        data_dir.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise DataError(f"the data folder {data_dir} cannot be made ({error.strerror}); give another one.") from None
    if (found := find(file, data_dir)) is not None:
        try:
            read(file, data_dir)
        except DataError as error:
            raise DataError(f"{error} A file that is there is never replaced: move it away, then fetch.") from None
        return found[1]
    public = file
    while public.url is None:
        if public.instead is None:
            raise DataError(f"{file.name} cannot be fetched: {file.why_no_url}. Put it into {data_dir / file.folder}.")
        public = public.instead
    return _fetch(public, public.url, data_dir)


def _fetch(file: File, url: str, data_dir: Path) -> Path:
    try:
        import pooch
    except ImportError:
        raise DataError(
            f"to fetch {file.name} takes the package pooch, which is not installed: pip install 'dpkit[data]'; or get "
            f"{url} yourself."
        ) from None
    packed = url.endswith(".gz")
    path = data_dir / (f"{file.path}.gz" if packed else file.path)
    # Without this header a server may send a packed file unpacked, or the other way round.
    fetch = pooch.HTTPDownloader(timeout=60, chunk_size=2**16, headers={"Accept-Encoding": "identity"})
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        handle, name = tempfile.mkstemp(dir=path.parent, prefix=".", suffix=".part")
    except OSError as error:
        raise DataError(f"{path} cannot be written ({error.strerror}); give another data folder.") from None
    part = Path(name)
    try:
        with os.fdopen(handle, "wb") as target:
            fetch(url, _Limited(target, file.size + _PACKING_OVERHEAD, url), None)
            target.flush()
            os.fsync(target.fileno())
        _checked(file, part, packed=packed, called=f"what {url} sent")
        part.chmod(0o644)  # a temporary file is the owner's alone
        part.replace(path)
    except OSError as error:  # those of requests, which pooch uses, are such errors, too
        raise DataError(f"{url} cannot be fetched ({error}); try again later, or get it yourself.") from None
    finally:
        with suppress(FileNotFoundError):
            part.unlink()
    return path


class _Limited:
    """A file that takes a limited number of bytes: a server must not fill the disk."""

    def __init__(self, target: BinaryIO, limit: int, url: str) -> None:
        self._target = target
        self._left = limit
        self._url = url

    def write(self, chunk: bytes) -> int:
        self._left -= len(chunk)
        if self._left < 0:
            raise DataError(
                f"{self._url} sends more than the file has; it is not the published one, so nothing was kept."
            )
        return self._target.write(chunk)

    def flush(self) -> None:
        self._target.flush()
