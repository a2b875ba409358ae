"""Run folders to report on: a ledger that was really charged, and the files beside it, made in a moment."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
from report.folders import CONFIG, MakeRun, metrics_lines, plan

from accounting import Budget, Ledger


def _make(folder: Path, charged: tuple[Any, ...], dataset_name: str = "digits", budget: Budget | None = None) -> Path:
    folder.mkdir()
    budget = Budget(8.0, 1e-3) if budget is None else budget
    with Ledger.create(folder / "ledger.sqlite", dataset_name=dataset_name, budget=budget) as ledger:
        for record, times in zip(charged[::2], charged[1::2], strict=True):
            for _ in range(times):
                ledger.charge(record, record.event)
    return folder


@pytest.fixture
def make_run(tmp_path: Path) -> MakeRun:
    """``make_run(plan, charges, plan, charges, ...)``: a run folder with a ledger of these charges and nothing else."""

    def make(*charged: Any, name: str = "run", **settings: Any) -> Path:
        return _make(tmp_path / name, charged, **settings)

    return make


@pytest.fixture(scope="session")
def _finished_once(tmp_path_factory: pytest.TempPathFactory) -> Path:
    record = plan()
    folder = _make(tmp_path_factory.mktemp("finished") / "run", (record, 40))
    (folder / "metrics.jsonl").write_text(metrics_lines(record, 40), encoding="utf-8")
    (folder / "config.yaml").write_text(CONFIG, encoding="utf-8")
    result = {"private": True, "test_accuracy": 0.9125, "steps": 40, "model_sha256": "ab" * 32}
    (folder / "result.json").write_text(json.dumps(result), encoding="utf-8")
    return folder


@pytest.fixture
def finished(_finished_once: Path, tmp_path: Path) -> Path:
    """A finished run with metrics, settings and a result; a copy of its own."""
    return Path(shutil.copytree(_finished_once, tmp_path / "run"))
