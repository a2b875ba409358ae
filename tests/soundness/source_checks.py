"""Checks L and F: no construct stands in the package by which a promise is broken, and no name leads out of a run.

The scanner of forbidden constructs is that of ``test_layering.py``, which runs it over every file.
"""

from __future__ import annotations

import ast
import os
import pickle
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import test_layering

import dpkit
from accounting import AccountingError
from dpkit.errors import CheckpointError, DpkitError
from dpkit.mechanisms import Gaussian
from dpkit.run_folder import RunFolder

from .checks import Violation
from .crashes import Mortal
from .ledger_checks import Run

Chosen = Callable[[str], bool]


# -------------------------------------------------------------------------------------------------------- L source


def sources() -> Iterator[tuple[str, str]]:
    """(name, text) of every file that is shipped."""
    for path in test_layering.SHIPPED:
        yield str(path.relative_to(test_layering.ROOT)), path.read_text(encoding="utf-8")


def check_L(folder: Path, *, only: Chosen = lambda part: True) -> int:
    """Every shipped file is free of them. Returns the number of files."""
    looked = 0
    for name, text in sources():
        found = list(checks_that_vanish(text)) if only("assert") else []
        if only("foreign code"):
            found += test_layering.forbidden_constructs(text)
            found += list(trust_in_strangers(text))
        if found:
            raise Violation("L", f"{name}: {'; '.join(found)}")
        looked += 1
    return looked


def checks_that_vanish(source: str) -> Iterator[str]:
    """``assert`` statements that check something: ``python -O`` leaves them out.

    That a value is not None, or of a type, may be asserted for the type checker: whatever follows fails by itself if it
    is not.
    """
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Assert) and not _is_about_types(node.test):
            yield f"{node.lineno}: assert {ast.unparse(node.test)}"


def _is_about_types(test: ast.expr) -> bool:
    match test:
        case ast.BoolOp(op=ast.And(), values=values):
            return all(map(_is_about_types, values))
        case ast.Compare(ops=[ast.IsNot()], comparators=[ast.Constant(value=None)]):
            return True
        case ast.Call(func=ast.Name(id="isinstance")):
            return True
    return False


def trust_in_strangers(source: str) -> Iterator[str]:
    """Calls that would let somebody else's file run code."""
    for node in ast.walk(ast.parse(source)):
        match node:
            case ast.keyword(arg="trust_remote_code" | "allow_pickle" as name, value=value) if not _is(value, False):
                yield f"{node.lineno}: {name}={ast.unparse(value)}"
            case ast.keyword(arg="weights_only", value=value) if not _is(value, True):
                yield f"{node.lineno}: weights_only={ast.unparse(value)}"


def _is(node: ast.expr, value: bool) -> bool:
    return isinstance(node, ast.Constant) and node.value is value


# --------------------------------------------------------------------------------------------------------- F files


class _Bomb:
    """Makes a folder when it is unpickled."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> tuple[Any, ...]:
        return os.mkdir, (str(self.path),)


def check_F(folder: Path, *, only: Chosen = lambda part: True) -> int:
    """Names and files that nobody would give by mistake. Returns how many were refused."""
    return sum(check(folder) for name, check in PARTS.items() if only(name))


def _check_pickles(folder: Path) -> int:
    """A pickle in the place of a checkpoint is refused, and not run."""
    run_dir = Path(tempfile.mkdtemp(dir=folder))
    run = Run(run_dir, Mortal(Gaussian(1.3), run_dir / "ledger.sqlite"))
    run.step(1)
    run.stop()
    made = folder / "made by a pickle"
    (run_dir / "checkpoints" / run.saved[-1]).write_bytes(pickle.dumps({"model": _Bomb(made)}))
    try:
        dpkit.PrivacyEngine.resume(run_dir, checkpoint=run.saved[-1])
    except CheckpointError:
        refused = True
    except Exception:  # whatever a reader makes of it once the harm is done
        refused = False
    else:
        refused = False
    if made.exists() or not refused:
        ran = "run" if made.exists() else "taken for a checkpoint"
        if made.exists():
            made.rmdir()
        raise Violation("F", f"a pickle in the place of a checkpoint was {ran}")
    return 1


def _names(outside: Path) -> list[tuple[str, ...]]:
    """Names that lead out of a folder, or would if they were taken as they are."""
    plain = [
        "..",
        ".",
        "",
        "../secret",
        "a/../../secret",
        "/etc/hostname",
        str(outside / "secret"),
        "~",
        "a\0b",
        "a\\..\\b",
    ]
    plain += [
        ".hidden",
        "x" * 65,
        "name\n",
        " name",
        "CON:",
        "checkpoints/../../secret",
        "..\N{FULLWIDTH SOLIDUS}secret",
    ]
    return [(name,) for name in plain] + [("checkpoints", name) for name in plain] + [("link",), ("link", "secret")]


def _check_paths(folder: Path) -> int:
    """Nothing outside of a run's folder is read or written, whatever a file of it is called."""
    root = Path(tempfile.mkdtemp(dir=folder))
    inside, outside = root / "run", root / "elsewhere"
    (inside / "checkpoints").mkdir(parents=True)
    outside.mkdir()
    (outside / "secret").write_text("secret", encoding="utf-8")
    (root / "secret").write_text("secret", encoding="utf-8")
    (inside / "link").symlink_to(outside)
    run, refused = RunFolder(inside), 0
    attempts: tuple[tuple[str, Callable[..., Any]], ...] = (
        ("written", lambda *names: run.write(*names, data="harm")),
        ("read", run.read),
        ("appended to", lambda *names: run.append_bytes(*names).close()),
        ("made", run.make),
        ("deleted", run.remove),
        ("resumed from", lambda *names: dpkit.PrivacyEngine.resume(inside, checkpoint="/".join(names))),
    )
    for names in _names(outside):
        for what, attempt in attempts:
            try:
                attempt(*names)
            except (DpkitError, AccountingError):
                refused += 1
            except (OSError, ValueError) as error:
                raise Violation("F", f"{names} was not refused when it was {what}: {error!r}") from None
            else:
                raise Violation("F", f"{names} was {what}")
    left = sorted(str(path.relative_to(root)) for path in root.rglob("*"))
    if left != ["elsewhere", "elsewhere/secret", "run", "run/checkpoints", "run/link", "secret"]:
        raise Violation("F", f"names that lead out of a run changed files: {left}")
    return refused


PARTS: dict[str, Callable[[Path], int]] = {"pickles": _check_pickles, "paths": _check_paths}
