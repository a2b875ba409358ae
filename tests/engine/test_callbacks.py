"""Callbacks hear what is public, in order; what is not private reaches only those that asked for it."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
import torch

import dpkit
from accounting import round_up
from dpkit.callbacks import Callback, MetricsFile, StepRecord
from dpkit.engine import PrivacyEngine
from dpkit.run_folder import RunFolder

from .runs import begin


class Listener(Callback):
    def __init__(self, nonprivate: bool = False) -> None:
        self.nonprivate = nonprivate
        self.heard: list[tuple[str, Any]] = []

    def on_begin(self, settings: Mapping[str, Any]) -> None:
        self.heard.append(("begin", dict(settings)))

    def on_step(self, record: StepRecord) -> None:
        self.heard.append(("step", record))

    def on_metrics(self, record: StepRecord, metrics: Mapping[str, float]) -> None:
        self.heard.append(("metrics", (record, dict(metrics))))

    def on_nonprivate(self, record: StepRecord, values: Mapping[str, float]) -> None:
        self.heard.append(("nonprivate", dict(values)))

    def on_end(self) -> None:
        self.heard.append(("end", None))

    def kinds(self) -> list[str]:
        return [kind for kind, _ in self.heard]


def test_a_run_is_told_from_beginning_to_end_once(tmp_path: Path):
    listener = Listener()
    run = begin(tmp_path, engine=PrivacyEngine(tmp_path, callbacks=[listener])).train(3)
    run.engine.log(test_accuracy=0.5)
    run.engine.log_nonprivate(train_accuracy=0.9)
    run.leave()
    run.leave()
    assert listener.kinds() == ["begin", "step", "step", "step", "metrics", "end"]
    settings = listener.heard[0][1]
    assert (settings["steps"], settings["num_examples"], settings["delta"]) == (20, 60, 1e-3)
    assert (settings["relation"], settings["mechanism"]) == ("add_remove", "Gaussian(noise_multiplier=1.5)")
    record = listener.heard[3][1]
    expected = round_up(run.engine.plan.epsilon(3).upper)
    assert record == StepRecord(3, 3, 20, expected, 1e-3, 0.1)
    assert listener.heard[4][1] == (record, {"test_accuracy": 0.5})


def test_what_is_not_private_reaches_those_that_asked(tmp_path: Path):
    quiet, curious = Listener(), Listener(nonprivate=True)
    run = begin(tmp_path, engine=PrivacyEngine(tmp_path, callbacks=[quiet, curious])).train(1)
    run.engine.log_nonprivate(train_accuracy=0.9)
    assert "nonprivate" not in quiet.kinds()
    counts, own = (values for kind, values in curious.heard if kind == "nonprivate")
    assert own == {"train_accuracy": 0.9}
    assert set(counts) == {"units", "clipped", "dropped", "mean_loss"}


def test_the_mean_loss_is_that_of_the_units_and_not_of_the_padding(tmp_path: Path):
    run = begin(tmp_path, max_physical_batch_size=16)
    losses, wanted = [], []
    for x, y in run.loader:
        run.optimizer.zero_grad()
        values = torch.nn.functional.cross_entropy(run.model(x), y, reduction="none")
        real = run.engine._attached._draw.real  # pyright: ignore[reportOptionalMemberAccess]
        losses += values.detach()[:real].tolist()
        run.engine.backward(values)
        run.optimizer.step()
        if run.engine.steps_taken == len(wanted) + 1:
            wanted.append(sum(losses) / len(losses))
            losses = []
            assert run.engine.nonprivate.mean_loss == pytest.approx(wanted[-1], rel=1e-6)
    assert len(wanted) == 6


def test_redone_steps_are_shown_as_charged(tmp_path: Path):
    first = begin(tmp_path).train(2)
    first.save()
    first.train(3)
    first.leave()
    listener = Listener()
    begin(tmp_path, engine=PrivacyEngine.resume(tmp_path, callbacks=[listener])).train(1)
    record = listener.heard[-1][1]
    assert (record.step, record.charged, record.planned) == (3, 6, 20)


def test_the_metrics_file_holds_public_numbers_and_no_times(tmp_path: Path):
    run = RunFolder(tmp_path)
    engine = PrivacyEngine(tmp_path, callbacks=[MetricsFile(run)])
    trained = begin(tmp_path, engine=engine).train(2)
    engine.log(test_accuracy=0.25)
    trained.leave()
    lines = [json.loads(line) for line in run.read("metrics.jsonl").splitlines()]
    fields = {"step", "charged", "planned", "epsilon", "delta", "learning_rate"}
    assert [set(line) for line in lines] == [fields, fields, fields | {"metrics"}]
    assert lines[-1]["metrics"] == {"test_accuracy": 0.25}
    assert not run.exists("nonprivate", "steps.jsonl")


def test_the_metrics_file_keeps_what_is_not_private_apart(tmp_path: Path):
    run = RunFolder(tmp_path)
    engine = PrivacyEngine(tmp_path, callbacks=[MetricsFile(run, nonprivate=True)])
    trained = begin(tmp_path, engine=engine).train(2)
    engine.log_nonprivate(loss=float("inf"))
    trained.leave()
    lines = [json.loads(line) for line in run.read("nonprivate", "steps.jsonl").splitlines()]
    assert [line["step"] for line in lines] == [1, 2, 2]
    assert lines[-1]["loss"] is None
    assert b"units" not in run.read("metrics.jsonl")


def test_a_resumed_run_goes_on_in_the_same_files(tmp_path: Path):
    for steps in (2, 1):
        engine = PrivacyEngine if steps == 2 else PrivacyEngine.resume
        run = begin(tmp_path, engine=engine(tmp_path, callbacks=[MetricsFile(RunFolder(tmp_path))])).train(steps)
        run.save()
        run.leave()
    lines = [json.loads(line) for line in RunFolder(tmp_path).read("metrics.jsonl").splitlines()]
    assert [line["charged"] for line in lines] == [1, 2, 3]


def test_an_error_in_a_callback_comes_through_and_the_step_stays_charged(tmp_path: Path):
    class Broken(Callback):
        def on_step(self, record: StepRecord) -> None:
            raise ZeroDivisionError

    run = begin(tmp_path, engine=dpkit.PrivacyEngine(tmp_path, callbacks=[Broken()]))
    with pytest.raises(ZeroDivisionError):
        run.train(1)
    assert run.engine.ledger.spent().steps_charged == 1
