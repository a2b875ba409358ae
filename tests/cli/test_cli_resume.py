"""``dpkit train --resume``: a stopped run goes on, and what was charged stays charged."""

from __future__ import annotations

import json
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from accounting import Ledger
from dpkit import datasets

from .conftest import Run

pytest.importorskip("sklearn", reason="the data set digits comes with scikit-learn (extra `demo`)")

Write = Callable[..., Path]
LONG = ("epochs: 1", "epochs: 30\n  checkpoint_every: 10")
PLANNED = 30 * 6  # steps


def stopped(config: Path, folder: Path, number: signal.Signals, after: int = 12) -> tuple[int, str]:
    """Exit code and messages of a training that got the signal ``number`` once ``after`` steps were charged."""
    command = [sys.executable, "-m", "dpkit.cli", "train", str(config)]
    metrics = folder / "metrics.jsonl"
    with subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True) as process:
        for _ in range(6000):
            if process.poll() is not None or (metrics.exists() and metrics.read_bytes().count(b"\n") >= after):
                break
            time.sleep(0.01)
        process.send_signal(number)
        _, messages = process.communicate(timeout=60)
    return process.returncode, messages


def charged(folder: Path) -> int:
    with Ledger.open(folder / "ledger.sqlite", read_only=True) as ledger:
        return ledger.spent().steps_charged


@pytest.mark.parametrize(("number", "code"), [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
def test_a_run_that_is_asked_to_stop_saves_itself_and_loses_nothing(
    dpkit: Run, config: Write, tmp_path: Path, number: signal.Signals, code: int
):
    run = tmp_path / "run"
    found, messages = stopped(config(*LONG), run, number)
    assert found == code, messages
    assert f"dpkit train --resume {run}" in messages
    before = charged(run)
    assert 0 < before < PLANNED
    done = dpkit("train", "--resume", run, "--json")
    assert done.code == 0, done.err
    assert done.json["steps"] == PLANNED == charged(run)  # no step was taken twice
    assert done.json["epsilon"] <= 3.0
    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text(encoding="utf-8").splitlines()]
    steps = [line["step"] for line in lines if "metrics" not in line]
    assert steps == list(range(1, PLANNED + 1))


def test_a_killed_run_pays_for_the_steps_that_it_takes_again(dpkit: Run, config: Write, tmp_path: Path):
    run = tmp_path / "run"
    assert stopped(config(*LONG), run, signal.SIGKILL, after=15)[0] == -signal.SIGKILL
    before = charged(run)
    saved = max(int(path.stem.removeprefix("step-")) for path in (run / "checkpoints").iterdir())
    assert saved <= before
    done = dpkit("train", "--resume", run, "--json")
    assert done.code == 0, done.err
    assert done.json["steps"] == PLANNED - (before - saved)
    assert charged(run) == PLANNED
    assert json.loads((run / "result.json").read_text(encoding="utf-8"))["steps"] == done.json["steps"]


def test_a_finished_run_can_be_resumed_and_changes_nothing(dpkit: Run, config: Write, tmp_path: Path):
    run = tmp_path / "run"
    assert dpkit("train", config()).code == 0
    model = (run / "model.safetensors").read_bytes()
    assert dpkit("train", "--resume", run).code == 0
    assert (run / "model.safetensors").read_bytes() == model


@pytest.mark.parametrize(
    ("old", "new", "code", "named"),
    [
        ("delta: 0.0001", "delta: 0.001", 1, "delta was 0.0001 and is 0.001"),
        ("max_grad_norm: 1.0", "max_grad_norm: 2.0", 1, "max_grad_norm was 1.0 and is 2.0"),
        ("epsilon: 3.0", "epsilon: 4.0", 1, "target_epsilon was 3.0 and is 4.0"),
        ("model: linear", "model: mlp", 1, "of another model"),
        ("batch_size: 256", "batch_size: 128", 1, "another plan"),
        ("epochs: 1", "epochs: 2", 1, "steps was 6 and is 12"),
        ("learning_rate: 2.0", "learning_rate: 1.0", 1, "learning_rate: 1.0; learning_rate: 2.0"),
        ("schedule: constant", "schedule: linear", 1, "schedule: constant; schedule: linear"),
        ("private: true", "private: false", 1, "without privacy"),
        ("dataset: digits", "dataset: fashion", 1, "on the data set 'digits', not on 'fashion'"),
        ("model: linear", "model: linear\nmodell: mlp", 1, "unknown key modell"),
        ("model: linear", "model: linear\nmodel: mlp", 1, "there twice"),
    ],
)
def test_a_configuration_that_was_changed_is_refused_and_nothing_is_charged(
    dpkit: Run, config: Write, tmp_path: Path, monkeypatch, old: str, new: str, code: int, named: str
):
    digits = datasets.load("digits", None)
    monkeypatch.setattr(datasets, "load", lambda name, data_dir: digits)  # whatever it is called
    run = tmp_path / "run"
    assert dpkit("train", config()).code == 0
    text = (run / "config.yaml").read_text(encoding="utf-8")
    assert old in text
    (run / "config.yaml").write_text(text.replace(old, new), encoding="utf-8")
    before = charged(run)
    done = dpkit("train", "--resume", run)
    assert (done.code, done.err.count("\n") <= 2) == (code, True)
    assert named in done.err
    assert charged(run) == before


def test_a_resumed_run_writes_into_its_folder_wherever_its_configuration_points(
    dpkit: Run, config: Write, tmp_path: Path
):
    run, elsewhere = tmp_path / "run", tmp_path / "elsewhere"
    assert dpkit("train", config()).code == 0
    text = (run / "config.yaml").read_text(encoding="utf-8")
    (run / "config.yaml").write_text(text.replace(str(run), str(elsewhere)), encoding="utf-8")
    (run / "result.json").unlink()
    assert dpkit("train", "--resume", run).code == 0
    assert (run / "result.json").exists()
    assert not elsewhere.exists()


def test_a_run_that_another_process_trains_is_not_resumed(dpkit: Run, config: Write, tmp_path: Path):
    run = tmp_path / "run"
    assert dpkit("train", config()).code == 0
    code = (
        "import sys; from dpkit.run_folder import RunFolder\n"
        "lock = RunFolder(sys.argv[1]).lock(); print('held', flush=True); sys.stdin.read()"
    )
    command = [sys.executable, "-c", code, str(run)]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as holder:
        assert holder.stdout is not None and holder.stdout.readline() == "held\n"
        done = dpkit("train", "--resume", run)
        holder.kill()
    assert done.code == 1
    assert "in use" in done.err


@pytest.mark.parametrize(
    ("arguments", "named"),
    [
        (["--resume", "nowhere"], "nowhere"),
        (["--resume", ".", "--output", "x"], "give nothing else"),
        (["--resume", ".", "--non-private"], "give nothing else"),
        (["a.yaml", "--resume", "."], "give nothing else"),
        ([], "give a configuration file"),
    ],
)
def test_odd_arguments_are_refused(dpkit: Run, tmp_path: Path, arguments: list[str], named: str):
    done = dpkit("train", *arguments)
    assert done.code == 1
    assert named in done.err
    assert list(tmp_path.iterdir()) == []
