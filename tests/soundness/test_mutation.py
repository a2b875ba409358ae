"""A sample of the automatic mutants dies, and code that nobody changed lives. ``mutation.py`` runs them all."""

from __future__ import annotations

import importlib.util
import json
import subprocess
import sys
from collections import Counter
from pathlib import Path

import pytest

SCRIPT = Path(__file__).with_name("mutation.py")
ABSENT = [name for name in ("mutmut", "libcst", "coverage") if importlib.util.find_spec(name) is None]


@pytest.mark.slow
@pytest.mark.skipif(bool(ABSENT), reason=f"{', '.join(ABSENT)} of the extra `mutation` not installed")
@pytest.mark.parametrize("changed", [True, False])
def test_a_sample_of_the_mutants_of_rules_and_noise(changed: bool, tmp_path: Path) -> None:
    """60 mutants, drawn with a fixed seed: the same every time, so that nothing is left to chance. A tenth may live, as
    of all of them (``SURVIVORS.md``)."""
    command = [
        sys.executable,
        str(SCRIPT),
        "run",
        "--results",
        str(tmp_path),
        "--seconds",
        "20",
    ]
    command += [
        "--module",
        "flat.py",
        "noise_split.py",
        "/gaussian.py",
        "/poisson.py",
        "--sample",
        "60",
        "--seed",
        "1",
    ]
    command += [
        "--tests",
        "tests/clipping",
        "tests/mechanisms/test_gaussian.py",
        "tests/sampling",
    ]
    command += [
        "tests/soundness/test_survivors.py",
        *([] if changed else ["--unchanged"]),
    ]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    results = tmp_path / "results.jsonl"
    assert results.exists(), done.stdout + done.stderr
    outcomes = Counter(json.loads(line)["outcome"] for line in results.read_text(encoding="utf-8").splitlines())
    assert outcomes.total() == 60
    if changed:
        assert outcomes["survived"] <= 6
    else:
        assert outcomes["survived"] == 60
