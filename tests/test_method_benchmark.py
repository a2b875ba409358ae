"""The benchmark of methods runs, compares like with like, and shows what it measured. No time is judged here."""

from __future__ import annotations

import json
import math
from pathlib import Path

import pytest
import torch
from torch import nn

from experiments.benchmarks import methods as benchmark
from experiments.benchmarks.methods import BASELINE, CONTESTANTS, Figure


@pytest.fixture(autouse=True)
def tiny_and_threads_as_they_were(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(benchmark, "MODELS", {"tiny": (lambda: nn.Linear(6, 10), (6,))})
    monkeypatch.setattr(benchmark, "STEPS", 200)
    monkeypatch.setattr(benchmark, "WARM_UP", 1)
    threads = torch.get_num_threads()
    yield
    torch.set_num_threads(threads)


def test_every_contestant_takes_private_steps_and_has_a_ratio(tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    file = tmp_path / "figures.json"
    assert benchmark.main(["--rounds", "1", "--json", str(file)]) == 0
    figures = json.loads(file.read_text(encoding="utf-8"))["tiny"]
    assert list(figures) == list(CONTESTANTS)
    assert [name for name, figure in figures.items() if not 0 < figure["ratio"] < math.inf] == []
    lines = [line for line in capsys.readouterr().out.splitlines() if line.startswith("| ")]
    assert len(lines) == 2 + len(CONTESTANTS)
    assert len({line.count("|") for line in lines}) == 1


def test_a_ratio_is_the_median_over_pairs_with_the_baseline_of_the_method(monkeypatch: pytest.MonkeyPatch):
    clock = {"now": 0.0}
    costs = {BASELINE: 2.0, "flat, Adam": 4.0, "LowPass, first order": 3.0, "DPAdamBC, to Adam": 5.0}

    class Detachable:
        def detach(self) -> None:
            pass

    def stepper(contestant, make, shape, run_dir):
        name = next(name for name, each in CONTESTANTS.items() if each is contestant)

        def step() -> None:
            clock["now"] += costs[name]

        return step, Detachable()

    monkeypatch.setattr(benchmark, "stepper", stepper)
    found = benchmark.measure("tiny", ["LowPass, first order", "DPAdamBC, to Adam"], 9, lambda: clock["now"])
    assert {name: figure.ratio for name, figure in found.items()} == pytest.approx(
        {BASELINE: 1.0, "flat, Adam": 1.0, "LowPass, first order": 1.5, "DPAdamBC, to Adam": 1.25}
    )
    assert found["DPAdamBC, to Adam"].milliseconds == pytest.approx(5000)


def test_what_is_slower_than_its_target_is_bold_and_what_was_not_run_is_said():
    slow, fast = Figure(2.0, 1.2, (1.1, 1.3)), Figure(1.0, 1.0, (0.9, 1.1))
    shown = benchmark.table(
        {"a": {BASELINE: fast, "PerLayer": slow, "correlated noise, BISR(8)": slow}, "b": {BASELINE: fast}}
    ).splitlines()
    assert "| PerLayer | 1.05 | 2.00 | **1.20** [1.10, 1.30] | not run |  |" in shown
    assert "| correlated noise, BISR(8) |  | 2.00 | 1.20 [1.10, 1.30] | not run |  |" in shown
    assert f"| {BASELINE} |  | 1.00 |  | 1.00 |  |" in shown


@pytest.mark.parametrize("wrong", [["--only", "nothing"], ["--model", "none"], ["--rounds", "0"], ["--rounds", "5000"]])
def test_what_cannot_be_measured_is_refused_with_what_can(wrong: list[str], capsys: pytest.CaptureFixture[str]):
    assert benchmark.main(wrong) == 1
    assert "tiny" in capsys.readouterr().err
