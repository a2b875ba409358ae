"""What the tests of the command line share: the command itself, and the smallest run that trains."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from dpkit.cli import main

SMALL = """\
dataset: digits
model: linear
output: {output}
privacy:
  epsilon: 3.0
  delta: 1.0e-4
  max_grad_norm: 1.0
training:
  epochs: 1
  batch_size: 256
  learning_rate: 2.0
"""


@dataclass(frozen=True)
class Done:
    """What a command left behind."""

    code: int
    out: str
    err: str

    @property
    def json(self) -> dict[str, Any]:
        """What stdout holds, which must be one JSON object."""
        return json.loads(self.out)


Run = Callable[..., Done]


@pytest.fixture
def dpkit(capsys: pytest.CaptureFixture[str]) -> Run:
    """``dpkit(*arguments)`` in this process; the exit code is what the shell would see."""

    def run(*arguments: object) -> Done:
        capsys.readouterr()
        code = main([str(argument) for argument in arguments])
        captured = capsys.readouterr()
        return Done(code, captured.out, captured.err)

    return run


@pytest.fixture
def dpkit_process(tmp_path: Path) -> Run:
    """``dpkit(*arguments)`` as a process of its own, in an empty folder."""

    def run(*arguments: object) -> Done:
        command = [sys.executable, "-m", "dpkit.cli", *map(str, arguments)]
        done = subprocess.run(command, capture_output=True, text=True, cwd=tmp_path, check=False)
        return Done(done.returncode, done.stdout, done.stderr)

    return run


@pytest.fixture
def config(tmp_path: Path) -> Callable[..., Path]:
    """``config(old, new, ...)``: the file of the smallest run, with pieces of its text replaced."""

    def write(*replacements: str) -> Path:
        text = SMALL.format(output=tmp_path / "run")
        for old, new in zip(replacements[::2], replacements[1::2], strict=True):
            assert old in text
            text = text.replace(old, new)
        path = tmp_path / "config.yaml"
        path.write_text(text, encoding="utf-8")
        return path

    return write


@pytest.fixture(scope="session")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of one finished private run. Tests read it; one that changes it takes a copy."""
    pytest.importorskip("sklearn", reason="the data set digits comes with scikit-learn (extra `demo`)")
    folder = tmp_path_factory.mktemp("trained")
    path = folder / "config.yaml"
    path.write_text(SMALL.format(output=folder / "run"), encoding="utf-8")
    assert main(["train", str(path), "--json"]) == 0
    return folder / "run"
