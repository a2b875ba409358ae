"""MLflow's database, read back with its own client and byte by byte."""

from __future__ import annotations

import getpass
import importlib.util
import os
import socket
import sqlite3
import subprocess
import sys
import time
from contextlib import closing
from pathlib import Path

import pytest

from dpkit.errors import ConfigError
from dpkit.integrations.mlflow import MLflow

# MLflow's own tables, with SQLAlchemy from 2.1 on.
pytestmark = pytest.mark.filterwarnings("ignore:The ``noload`` loader strategy is deprecated:DeprecationWarning")

slow = pytest.mark.slow  # importing mlflow and making its database take seconds


@pytest.fixture
def uri(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> str:
    pytest.importorskip("mlflow", reason="the extra `log` is not installed")
    monkeypatch.chdir(tmp_path)  # where mlflow puts what it was not told where to put
    return f"sqlite:///{tmp_path / 'mlflow.db'}"


def cells(path: Path) -> list[object]:
    """Every cell of every table."""
    with closing(sqlite3.connect(path)) as database:
        tables = [name for (name,) in database.execute("SELECT name FROM sqlite_master WHERE type = 'table'")]
        return [cell for table in tables for row in database.execute(f'SELECT * FROM "{table}"') for cell in row]


@slow
def test_public_numbers_are_read_back_and_others_are_not_there(uri: str, tmp_path: Path, tell, records):
    import mlflow

    logger = MLflow("digits", tracking_uri=uri, run_name="first")
    tell(logger, records)
    client = mlflow.MlflowClient(uri)
    [run] = client.search_runs([client.get_experiment_by_name("digits").experiment_id])
    assert (run.info.run_name, run.info.status) == ("first", "FINISHED")
    assert run.data.params["delta"] == "0.0001" and run.data.params["sampler"] == "Poisson(sample_rate=0.5)"
    assert run.data.tags["dpkit.nonprivate"] == "false"
    assert run.data.metrics.keys() == {"epsilon", "charged", "learning_rate", "test_accuracy"}
    history = client.get_metric_history(run.info.run_id, "epsilon")
    assert [(metric.step, metric.value) for metric in history] == [(r.step, r.epsilon) for r in records]
    for part in ("upper bound", "delta: 0.0001", "unit: example", "relation: zero_out", "sampler: Poisson"):
        assert part in run.data.tags["mlflow.note.content"]


@slow
def test_what_is_not_private_is_named_and_tagged_so(uri: str, tmp_path: Path, tell, records):
    import mlflow

    tell(MLflow("digits", tracking_uri=uri, nonprivate=True), records)
    client = mlflow.MlflowClient(uri)
    [run] = client.search_runs([client.get_experiment_by_name("digits").experiment_id])
    assert run.data.tags["dpkit.nonprivate"] == "true"
    assert run.data.metrics["nonprivate.mean_loss"] == 3.25
    marked = {name for name in run.data.metrics if name.startswith("nonprivate.")}
    assert run.data.metrics.keys() - marked == {"epsilon", "charged", "learning_rate", "test_accuracy"}


@slow
def test_nothing_tells_a_time_after_the_first_step(uri: str, tmp_path: Path, tell, records, clock: float):
    before = time.time() * 1000
    tell(MLflow("digits", tracking_uri=uri, nonprivate=True), records)
    after = time.time() * 1000
    found = cells(tmp_path / "mlflow.db")
    numbers = [cell for cell in found if isinstance(cell, int | float)]
    assert max(numbers) <= after + 4 < clock * 1000
    texts = [str(cell) for cell in found]
    assert not any(str(int(clock)) in text for text in texts)

    import mlflow

    client = mlflow.MlflowClient(uri)
    [run] = client.search_runs([client.get_experiment_by_name("digits").experiment_id])
    assert before - 1 <= run.info.start_time <= after
    assert run.info.end_time == run.info.start_time + 4
    history = client.get_metric_history(run.info.run_id, "nonprivate.units")
    assert [metric.timestamp for metric in history] == [1, 2, 3, 4]


@slow
def test_no_system_metrics_and_no_names_of_people_or_hosts(uri: str, tmp_path: Path, tell, records):
    tell(MLflow("digits", tracking_uri=uri), records)
    texts = [str(cell) for cell in cells(tmp_path / "mlflow.db")]
    assert not any(text.startswith("system/") for text in texts)
    assert not {getpass.getuser(), socket.gethostname()} & set(texts)


@slow
def test_telemetry_is_off(uri: str):
    """In a process without the variables by which MLflow sees that it is tested, and is silent anyway."""
    code = (
        f"from dpkit.integrations.mlflow import MLflow; MLflow('digits', tracking_uri={uri!r})\n"
        "from mlflow.telemetry import get_telemetry_client; print('client:', get_telemetry_client())"
    )
    environment = {name: os.environ[name] for name in ("PATH", "HOME", "PYTHONPATH") if name in os.environ}
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, env=environment)
    assert done.stdout.splitlines()[-1] == "client: None"


@slow
def test_a_run_that_stopped_early_is_not_called_finished(uri: str, tell, records):
    import mlflow

    tell(MLflow("digits", tracking_uri=uri), records[:2])
    client = mlflow.MlflowClient(uri)
    [run] = client.search_runs([client.get_experiment_by_name("digits").experiment_id])
    assert run.info.status == "KILLED"


def test_without_the_extra_the_way_out_is_named(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(ConfigError, match=r"pip install 'dpkit\[log\]'"):
        MLflow("digits")
