"""The benchmark of noise measures every tier and prints a table. No time is judged here."""

from __future__ import annotations

import pytest

from experiments.benchmarks import noise as benchmark


def test_every_tier_has_a_figure_at_every_size(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]):
    monkeypatch.setattr(benchmark, "SIZES", (10, 300))
    benchmark.main(["--rounds", "2"])
    lines = capsys.readouterr().out.splitlines()
    assert len(lines) == 2 + len(benchmark.CONTESTANTS) and {line.count("|") for line in lines} == {4}
    assert all(f"({tier})" in "".join(lines) for tier in ("default", "hardened", "exact"))
