"""``dpkit verify``: is what a run folder says what its ledger says?

Guarantee: exit code 0 only if the hash chain is whole and no check failed, 4 otherwise. Nothing in the folder is
changed, and a folder that cannot be written to can be verified: a ledger with a half-written charge in its journal,
which SQLite would undo in the file, is looked at in a copy.
Requires: an anchor that was kept elsewhere, where files and ledger may have been forged or put back together.
Why: every number is computed again from the verified ledger. ``run_checks.py`` says what is looked at, and what no
check can show.

The export holds every entry of the ledger. Anybody can compute its hash chain again, without dpkit:

    import hashlib, json, sys
    tip = bytes(32)
    for entry in map(json.loads, open(sys.argv[1], encoding="utf-8")):
        tip = hashlib.sha256(tip + entry["body"].encode()).digest()
        assert entry["digest"] == tip.hex(), entry["sequence"]

The last digest is the anchor that was printed in the statement.
"""

from __future__ import annotations

import json
import os
import secrets
import shutil
import stat
import tempfile
import time
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import asdict, fields, replace
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.table import Table
from rich.text import Text

import accounting
from accounting import Ledger, Statement
from dpkit.errors import AccountingError, ConfigError, DpkitError, LedgerError
from dpkit.run_folder import RunFolder

from .epsilon import Answer, from_ledger
from .run_checks import Check, Run, Verdict, folder_checks, ledger_checks, printable
from .terminal import UNVERIFIABLE, Debug, Json, out, print_json

_WRITER_PATIENCE = 2.0  # seconds: a charge holds its journal for milliseconds, a killed writer leaves it for good
_STYLES = {Verdict.OK: "green", Verdict.WARNING: "yellow", Verdict.FAILED: "bold red", Verdict.NOT_CHECKED: "dim"}


def verify(
    run: Annotated[Path, typer.Argument(help="A run folder, or a ledger file.")],
    *,
    export: Annotated[
        Path | None,
        typer.Option(
            metavar="FILE.jsonl",
            help='Write every entry of the ledger as one line {"sequence", "body", "digest"}; each digest is '
            "SHA-256(digest before || body), and 32 zero bytes stand before the first.",
        ),
    ] = None,
    json_output: Json = False,
    debug: Debug = False,
) -> None:
    """Check that a run's files agree with its ledger. Exit code 4 if one does not."""
    if export is not None and os.path.lexists(export):
        raise _in_the_way(export)
    checks, found, lines = _look(run, with_entries=export is not None, debug=debug)
    verified = all(check.verdict != Verdict.FAILED for check in checks)
    if export is not None and found is not None:
        _write_new(export, lines)
    if json_output:
        print_json(_json(run, verified, checks, found))
    else:
        _print(run, verified, checks, found)
        if export is not None:
            out.print(
                f"wrote {export}" if found is not None else f"{export} was not written",
                markup=False,
                soft_wrap=True,
            )
    if not verified:
        raise typer.Exit(UNVERIFIABLE)


def _look(run: Path, *, with_entries: bool, debug: bool) -> tuple[list[Check], tuple[Statement, Answer] | None, str]:
    """(checks, what the ledger says, its export); nothing but a failed check if the ledger cannot be trusted."""
    try:
        own = RunFolder(run).entry("ledger.sqlite") if run.is_dir() else run
        with _readable(own) as path:
            try:
                with Ledger.open(path, read_only=True) as ledger:
                    stated, answer = accounting.statement(ledger), from_ledger(path)
                    how = "" if path == own else "; what was being charged when a process died was undone in a copy"
                    checks = [
                        Check(
                            "hash chain", Verdict.OK, f"{stated.anchor_sequence + 1} entries, whole to the last{how}"
                        ),
                        *ledger_checks(ledger, stated),
                        *(folder_checks(Run(RunFolder(run), ledger, stated, answer)) if run.is_dir() else []),
                    ]
                    return checks, (stated, replace(answer, source=str(own))), _lines(ledger) if with_entries else ""
            except AccountingError as error:
                raise LedgerError(str(error).replace(str(path), str(own))) from error
    except (AccountingError, DpkitError, OSError) as error:
        if debug:
            raise
        return [Check("hash chain", Verdict.FAILED, printable(" ".join(str(error).split())))], None, ""


@contextmanager
def _readable(path: Path) -> Iterator[Path]:
    """A path that SQLite can open without writing beside it: ``path`` itself, or a copy in a temporary folder."""
    begun = time.monotonic()
    while (extra := _unfinished(path)) and time.monotonic() < begun + _WRITER_PATIENCE:
        time.sleep(0.02)
    if not extra and not _in_wal_mode(path):
        yield path
        return
    with tempfile.TemporaryDirectory(prefix="dpkit-verify-") as folder:
        before = [_state(each) for each in (path, *extra)]
        for each in (path, *extra):
            shutil.copyfile(each, Path(folder) / each.name, follow_symlinks=False)
        if before != [_state(each) for each in (path, *extra)]:
            raise LedgerError(f"{path} is being written. Verify it again when the run has stopped.")
        yield Path(folder) / path.name


def _unfinished(path: Path) -> list[Path]:
    """Files beside a ledger with which SQLite would finish or undo what a writer began."""
    found = []
    for each in (path, Path(f"{path}-journal"), Path(f"{path}-wal")):
        try:
            status = each.lstat() if each != path else each.stat()
        except FileNotFoundError:
            continue
        if not stat.S_ISREG(status.st_mode):
            raise LedgerError(f"{each} is not a regular file. Check the path.")
        if each != path and status.st_size > 0:
            found.append(each)
    return found


def _in_wal_mode(path: Path) -> bool:
    """Whether somebody switched the file to the mode in which SQLite writes beside it even to read."""
    try:
        with path.open("rb") as file:
            return b"\2" in file.read(20)[18:]
    except FileNotFoundError:
        return False


def _state(path: Path) -> tuple[int, int, int]:
    status = path.stat()
    return status.st_ino, status.st_size, status.st_mtime_ns


def _lines(ledger: Ledger) -> str:
    """The export: one JSON object an entry, with the exact text that was hashed."""
    found = []
    for sequence, body, digest in ledger.entries():
        try:
            found.append(json.dumps({"sequence": sequence, "body": body.decode("utf-8"), "digest": digest}))
        except UnicodeDecodeError:
            raise LedgerError(f"entry {sequence} is no text in UTF-8; it was written by something else.") from None
    return "".join(line + "\n" for line in found)


def _write_new(path: Path, text: str) -> None:
    """Writes a file that does not exist yet, as a whole or not at all."""
    temporary = path.with_name(f".{path.name}.{secrets.token_hex(8)}.tmp")
    try:
        with os.fdopen(os.open(temporary, os.O_CREAT | os.O_EXCL | os.O_WRONLY, 0o600), "w", encoding="utf-8") as file:
            file.write(text)
            file.flush()
            os.fsync(file.fileno())
        try:
            os.link(temporary, path)  # unlike a rename, never replaces a file that came to be meanwhile
        except FileExistsError:
            raise _in_the_way(path) from None
        except (OSError, NotImplementedError):  # a file system without hard links
            if os.path.lexists(path):
                raise _in_the_way(path) from None
            os.rename(temporary, path)  # noqa: PTH104  # on Windows it refuses what exists, unlike Path.replace
    except OSError as error:
        raise ConfigError(f"--export {path} cannot be written ({error.strerror}). Choose another place.") from None
    finally:
        with suppress(OSError):
            temporary.unlink(missing_ok=True)


def _in_the_way(path: Path) -> ConfigError:
    return ConfigError(f"--export {path} exists already and is not overwritten; give another name.")


def _json(run: Path, verified: bool, checks: list[Check], found: tuple[Statement, Answer] | None) -> dict[str, Any]:
    names = ("dataset_name", "anchor_sequence", "anchor_digest")
    said: dict[str, Any] = dict.fromkeys([*(field.name for field in fields(Answer)), *names])
    if found is not None:
        stated, answer = found
        said |= asdict(answer) | {name: getattr(stated, name) for name in names}
    return {"run": str(run), "verified": verified, "checks": [check._asdict() for check in checks], **said}


def _print(run: Path, verified: bool, checks: list[Check], found: tuple[Statement, Answer] | None) -> None:
    table = Table("check", "verdict", "why", box=None, pad_edge=False, header_style="bold")
    for column in table.columns:
        column.overflow = "fold"
    for name, verdict, detail in checks:
        word = verdict.upper() if verdict == Verdict.FAILED else verdict
        table.add_row(Text(name), Text(word, style=_STYLES[verdict]), Text(detail))
    out.print(table)
    out.print()
    if found is not None:
        stated, answer = found
        out.print(
            f"the ledger of {stated.dataset_name!r}: epsilon <= {answer.epsilon:.4f} at delta = "
            f"{accounting.round_up_text(answer.delta)} (committed: {answer.committed_epsilon:.4f})\n"
            f"  {printable(f'unit: one {answer.unit}; relation: {answer.relation}; sampling: {answer.sampling}')}\n"
            f"  accountant: {answer.accountant}; anchor: entry {stated.anchor_sequence}, {stated.anchor_digest}",
            markup=False,
            soft_wrap=True,
        )
    counts = Counter(check.verdict for check in checks)
    summary = ", ".join(f"{counts[verdict]} {verdict}" for verdict in Verdict if counts[verdict])
    out.print(
        f"{run}: {'verified' if verified else 'NOT VERIFIED'} ({summary})",
        style="green" if verified else "bold red",
        markup=False,
        soft_wrap=True,
    )
