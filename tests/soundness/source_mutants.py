"""Bugs that stand in the source: code of strangers that is run, checks that vanish, names that lead out of a run.

Those that a scanner finds are written into the text of a shipped file; the scanner must see them there.
"""

from __future__ import annotations

import pickle
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from dpkit import run_folder
from dpkit.engine import checkpoint
from dpkit.run_folder import RunFolder

from . import source_checks
from .mutants import Active, Patch, mutant, part


def _written(patch: Patch, active: Active, file: str, good: str, bad: str) -> None:
    """Show the scanner one file with ``bad`` in place of what matches ``good``, which must be there once."""
    shipped = source_checks.sources

    def sources() -> Iterator[tuple[str, str]]:
        for name, text in shipped():
            if name != file:
                yield name, text
                continue
            changed, times = re.subn(good, bad, text)
            if times != 1:
                raise ValueError(
                    f"{file} has changed: {good!r} is there {times} times; the bug has to be put elsewhere"
                )
            active()
            yield name, changed

    patch.setattr(source_checks, "sources", sources)


@mutant(
    "B69",
    "L",
    "reads checkpoints with torch.load",
    "Opacus 1.6.0, load_checkpoint; CVE-2025-32434",
    part("foreign code"),
)
def _pickled_checkpoints(patch: Patch, active: Active) -> None:
    load, insecure = r"safetensors\.torch\.load\(data\)", "torch.load(io.BytesIO(data), weights_only=False)"
    _written(patch, active, "dpkit/engine/checkpoint.py", load, insecure)


@mutant(
    "B69",
    "F",
    "falls back to a pickle where a checkpoint is none",
    "older checkpoints, read for convenience",
    part("pickles"),
)
def _pickles_as_well(patch: Patch, active: Active) -> None:
    shipped = checkpoint.read

    def read(run: RunFolder, name: str) -> Any:
        content = (run.path / "checkpoints" / name).read_bytes()
        if content[:1] == b"\x80":
            active()
            return pickle.loads(content)
        return shipped(run, name)

    patch.setattr(checkpoint, "read", read)


@mutant("B70", "L", "reads settings with yaml.load", "trust_remote_code, eval in settings", part("foreign code"))
def _unsafe_yaml(patch: Patch, active: Active) -> None:
    quick = "def read_quickly(text):\n    return yaml.load(text, Loader=yaml.Loader)\n"
    _written(patch, active, "dpkit/cli/config.py", r"\Z", quick)


@mutant("B71", "F", "takes the names of files as they are", "path traversal by run and checkpoint names", part("paths"))
def _names_as_they_are(patch: Patch, active: Active) -> None:
    def entry(self: RunFolder, *names: str) -> Path:
        active()
        return self.path.joinpath(*names)

    patch.setattr(RunFolder, "entry", entry)


@mutant("B71", "F", "follows links out of the run", "symbolic links in a run folder", part("paths"))
def _links_are_followed(patch: Patch, active: Active) -> None:
    def entry(self: RunFolder, *names: str) -> Path:
        path = self.path
        for name in names:
            if not run_folder._NAME.fullmatch(name):
                raise run_folder.RunFolderError(f"{name!r} cannot be a file of a run")
            path /= name
        active()
        return path

    patch.setattr(RunFolder, "entry", entry)
    patch.setattr(run_folder, "_NO_FOLLOW", 0)


@mutant("B74", "L", "checks with assert, which python -O leaves out", "assertion-based privacy checks", part("assert"))
def _checks_that_vanish(patch: Patch, active: Active) -> None:
    check = r"if not 0 < self\.delta < 1:\n\s+raise InvalidArgument\(.*\)\n"
    _written(patch, active, "dpkit/engine/plan.py", check, "assert 0 < self.delta < 1\n")
