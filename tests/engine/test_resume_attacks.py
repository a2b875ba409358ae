"""What an attack on save and resume found, and what now stands in its way."""

from __future__ import annotations

import copy
import os
import shutil
import signal
import sys
from collections.abc import Callable
from enum import IntEnum
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

import dpkit
from accounting import Ledger
from dpkit.callbacks import Callback, MetricsFile, StepRecord
from dpkit.engine import PrivacyEngine
from dpkit.errors import (
    CheckpointError,
    DpkitError,
    LedgerError,
    OutOfOrder,
    RawGradient,
    RunFolderError,
    UnsupportedModule,
)
from dpkit.mechanisms import RunKey
from dpkit.run_folder import RunFolder

from .runs import begin, mlp, resume

# -- raw data in what is stored ---------------------------------------------------------------------------------------


class Noted(nn.Module):
    """Linear, with a place in which ``note`` leaves something in every forward pass."""

    def __init__(self, note: Callable[[Any, Tensor], None]) -> None:
        super().__init__()
        self.linear = nn.Linear(5, 3)
        self.register_buffer("cache", torch.zeros(0))
        self.frozen = nn.Parameter(torch.zeros(5), requires_grad=False)
        self.note = note

    def forward(self, x: Tensor) -> Tensor:
        self.note(self, x.detach())
        return self.linear(x)


def _replaces_a_buffer(self: Any, x: Tensor) -> None:
    self.cache = x.clone()


def _keeps_a_row(self: Any, x: Tensor) -> None:
    self.cache = x[0].clone()


def _writes_past_the_version(self: Any, x: Tensor) -> None:
    self.frozen.data.copy_(x[0])


def _writes_a_frozen_parameter(self: Any, x: Tensor) -> None:
    with torch.no_grad():
        self.frozen.copy_(x[0])


@pytest.mark.parametrize(
    "note", [_replaces_a_buffer, _keeps_a_row, _writes_past_the_version, _writes_a_frozen_parameter]
)
def test_what_a_forward_pass_writes_down_is_never_saved(tmp_path: Path, note: Callable[[Any, Tensor], None]):
    model = Noted(note)
    try:
        run = begin(tmp_path, model=model).train(2)  # pyright: ignore[reportArgumentType]
    except UnsupportedModule:
        return  # the neighbour probe saw it
    with pytest.raises(CheckpointError, match="was written to"):
        run.save()
    assert not (tmp_path / "checkpoints").exists()


def test_statistics_that_were_moved_between_steps_are_not_saved(tmp_path: Path):
    norm = nn.BatchNorm1d(5).eval().requires_grad_(False)
    run = begin(tmp_path, model=nn.Sequential(norm, nn.Linear(5, 3))).train(1)
    norm.train()
    with torch.no_grad():
        norm(torch.randn(8, 5))
    norm.eval()
    with pytest.raises(CheckpointError, match=r"0\.running_mean"):
        run.save()


class Extra(nn.Linear):
    def get_extra_state(self) -> Any:
        return torch.ones(1)

    def set_extra_state(self, state: Any) -> None: ...


def test_extra_state_is_not_saved(tmp_path: Path):
    run = begin(tmp_path, model=nn.Sequential(Extra(5, 3))).train(1)
    with pytest.raises(CheckpointError, match="extra state"):
        run.save()


# -- privacy that is lost on the way ----------------------------------------------------------------------------------


def test_a_second_attachment_that_fails_leaves_the_first_one_on_guard(tmp_path: Path):
    held = begin(tmp_path / "held", engine=PrivacyEngine(tmp_path / "held", budget=dpkit.Budget(1000.0, 0.5))).train(1)
    first = begin(tmp_path / "first", loss_reduction="mean").train(0)
    x, y = next(iter(first.loader))
    with pytest.raises(RunFolderError, match="in use"):
        begin(tmp_path / "held", model=first.model)  # pyright: ignore[reportArgumentType]
    before = [p.detach().clone() for p in first.model.parameters()]
    F.cross_entropy(first.model(x), y).backward()
    first.optimizer.step()
    assert first.engine.ledger.spent().steps_charged == 1  # it was charged and noised: still private
    assert any(not torch.equal(p, q) for p, q in zip(before, first.model.parameters(), strict=True))
    held.leave()


def test_a_resume_that_fails_on_an_attached_model_does_not_set_it_free(tmp_path: Path):
    saved = begin(tmp_path / "saved", model=mlp(hidden=9)).train(1)
    saved.save()
    saved.leave()
    first = begin(tmp_path / "first", loss_reduction="mean").train(0)
    x, y = next(iter(first.loader))
    with pytest.raises(CheckpointError):
        resume(tmp_path / "saved", model=first.model)
    with pytest.raises((RawGradient, OutOfOrder)):
        F.cross_entropy(first.model(x), y).backward()
    assert all(p.grad is None for p in first.model.parameters())


def test_a_model_may_be_attached_anew_in_its_own_folder(tmp_path: Path):
    first = begin(tmp_path, engine=PrivacyEngine(tmp_path, budget=dpkit.Budget(1000.0, 0.5))).train(1)
    second = begin(tmp_path, model=first.model)  # pyright: ignore[reportArgumentType]
    with pytest.raises(OutOfOrder):
        first.train(1)
    assert second.train(1).engine.steps_taken == 1
    with pytest.raises(RunFolderError, match="in use"):
        begin(tmp_path)


def test_a_lock_that_is_a_link_is_refused_and_what_it_points_to_is_whole(tmp_path: Path):
    other = begin(tmp_path / "other").train(1)
    other.leave()
    victim = tmp_path / "other" / "ledger.sqlite"
    content = victim.read_bytes()
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / ".lock").symlink_to(victim)
    with pytest.raises(RunFolderError, match="symbolic link"):
        begin(tmp_path / "run")
    assert victim.read_bytes() == content


# -- epsilon is the ledger's ------------------------------------------------------------------------------------------


def test_two_engines_that_spend_one_plan_both_report_what_the_ledger_says(tmp_path: Path):
    first = begin(tmp_path / "one").train(3)
    first.save()
    first.leave()
    shutil.copytree(tmp_path / "one" / "checkpoints", tmp_path / "two" / "checkpoints")
    one = resume(tmp_path / "one")
    ledger = tmp_path / "one" / "ledger.sqlite"
    two = begin(
        tmp_path / "two", model=mlp(), engine=PrivacyEngine.resume(tmp_path / "two", ledger=ledger, dataset_name="one")
    )
    one.train(4)
    two.train(5)
    assert one.engine.epsilon() == two.engine.epsilon() == one.engine.plan.epsilon(12)
    assert one.engine.steps_left == two.engine.steps_left == 20 - 12


def test_what_is_charged_counts_from_the_moment_of_the_charge(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    run = begin(tmp_path).train(2)

    def interrupted(self: Any, *arguments: Any) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(dpkit.Gaussian, "release", interrupted)
    with pytest.raises(KeyboardInterrupt):
        run.train(1)
    assert run.engine.epsilon() == run.engine.plan.epsilon(3)


# -- keys -------------------------------------------------------------------------------------------------------------


def test_a_copied_engine_cannot_train_with_the_same_key(tmp_path: Path):
    first = begin(tmp_path).train(2)
    first.save()
    first.leave()
    engine = PrivacyEngine.resume(tmp_path)
    twin = copy.copy(engine)
    begin(tmp_path, engine=engine).train(1).leave()
    with pytest.raises(OutOfOrder, match="key is in use"):
        begin(tmp_path, engine=twin)


@pytest.mark.skipif(not hasattr(os, "fork"), reason="needs fork")
def test_an_engine_does_not_draw_in_a_forked_process(tmp_path: Path):
    key = RunKey()
    reader, writer = os.pipe()
    process = os.fork()
    if process == 0:
        try:
            key.sampling(0)
            os.write(writer, b"drew")
        except OutOfOrder:
            os.write(writer, b"refused")
        finally:
            os._exit(0)
    os.waitpid(process, 0)
    assert os.read(reader, 100) == b"refused"


def test_two_seeded_engines_resumed_one_after_the_other_differ(tmp_path: Path):
    first = begin(tmp_path, engine=PrivacyEngine(tmp_path, seed=1)).train(3)
    first.save()
    first.leave()
    engines = [PrivacyEngine.resume(tmp_path, seed=1) for _ in range(2)]
    secrets = []
    for engine in engines:
        run = begin(tmp_path, engine=engine).train(1)
        secrets.append(engine._run_key._secret)
        run.leave()
    assert secrets[0] != secrets[1]


# -- the same run, or a refusal ---------------------------------------------------------------------------------------


class LeavesOut(nn.Module):
    """An adapter-style model whose state_dict holds only a part of what is trained."""

    def __init__(self, seed: int = 0) -> None:
        super().__init__()
        torch.manual_seed(seed)
        self.first, self.second = nn.Linear(5, 4), nn.Linear(4, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.second(self.first(x))

    def state_dict(self, *args: Any, **kwargs: Any) -> Any:
        return {"second.weight": self.second.weight.half()}


def test_parameters_that_state_dict_leaves_out_come_back_as_well(tmp_path: Path):
    first = begin(tmp_path, model=LeavesOut()).train(2)  # pyright: ignore[reportArgumentType]
    first.save()
    first.leave()
    second = resume(tmp_path, model=LeavesOut(seed=5))
    for p, q in zip(first.model.parameters(), second.model.parameters(), strict=True):
        assert torch.equal(p, q)


def test_another_trainable_set_is_refused(tmp_path: Path):
    first = begin(tmp_path).train(1)
    first.save()
    first.leave()
    frozen = mlp()
    frozen[0].weight.requires_grad_(False)
    with pytest.raises(CheckpointError, match="Freeze the same"):
        resume(tmp_path, model=frozen)


def test_another_optimizer_class_or_order_of_groups_is_refused_before_anything_is_charged(tmp_path: Path):
    first = begin(tmp_path, lambda model: torch.optim.SGD(model.parameters(), lr=0.1)).train(1)
    first.save()
    first.leave()
    for make in (
        lambda model: torch.optim.Adam(model.parameters()),
        lambda model: torch.optim.SGD(list(model.parameters())[::-1], lr=0.1),
        lambda model: torch.optim.SGD([{"params": [p]} for p in model.parameters()], lr=0.1),
    ):
        with pytest.raises(CheckpointError, match="'optimizer'"):
            resume(tmp_path, make)
    with Ledger.open(tmp_path / "ledger.sqlite", read_only=True) as ledger:
        assert ledger.spent().steps_charged == 1


def test_nothing_is_restored_after_the_run_has_gone_on(tmp_path: Path):
    first = begin(tmp_path).train(2)
    first.save()
    first.leave()
    second = resume(tmp_path)
    second.engine.restore()
    second.train(1)
    with pytest.raises(OutOfOrder, match="gone on"):
        second.engine.restore()


def test_autosave_asks_for_the_states_that_were_saved(tmp_path: Path):
    first = begin(tmp_path).train(2)
    first.save()
    first.leave()
    second = begin(tmp_path, engine=PrivacyEngine.resume(tmp_path))
    scheduler = torch.optim.lr_scheduler.ExponentialLR(second.optimizer, 0.9)
    with pytest.raises(CheckpointError, match="scheduler"):
        second.engine.autosave(every=1, scheduler=scheduler)


def test_a_run_is_not_saved_while_the_optimizer_steps(tmp_path: Path):
    run = begin(tmp_path).train(1)
    refused = []

    def in_the_middle(*arguments: Any) -> None:
        with pytest.raises(OutOfOrder):
            run.save()
        refused.append(True)

    run.optimizer.register_step_pre_hook(in_the_middle)
    run.train(1)
    assert refused == [True]


class Fails(torch.optim.SGD):
    fails = False

    def step(self, closure: Any = None) -> Any:
        return 1 // 0 if self.fails else super().step(closure)


def test_a_step_that_failed_in_the_optimizer_is_not_saved(tmp_path: Path):
    run = begin(tmp_path, lambda model: Fails(model.parameters(), lr=0.1)).train(1)
    run.optimizer.fails = True  # pyright: ignore[reportAttributeAccessIssue]
    with pytest.raises(ZeroDivisionError):
        run.train(1)
    with pytest.raises(OutOfOrder, match="was not used"):
        run.save()


class Average(NamedTuple):
    value: Tensor
    count: int


class Averages:
    def __init__(self, count: int = 0) -> None:
        self.average = Average(torch.full((2,), float(count)), count)

    def state_dict(self) -> dict[str, Any]:
        return {"average": self.average}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.average = state["average"]


def test_a_named_tuple_in_a_state_of_the_users_comes_back(tmp_path: Path):
    first = begin(tmp_path).train(1)
    first.engine.save(averages=Averages(7))
    first.leave()
    second = begin(tmp_path, engine=PrivacyEngine.resume(tmp_path))
    averages = Averages()
    second.engine.restore(averages=averages)
    assert type(averages.average) is Average and averages.average.count == 7


class Level(IntEnum):
    HIGH = 3


class Plain:
    def __init__(self) -> None:
        self.state: dict[str, Any] = {"level": Level.HIGH, "rate": np.float64(0.5)}

    def state_dict(self) -> dict[str, Any]:
        return self.state

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.state = state


def test_subclasses_of_numbers_come_back_as_numbers(tmp_path: Path):
    first = begin(tmp_path).train(1)
    first.engine.save(plain=Plain())
    first.leave()
    second = begin(tmp_path, engine=PrivacyEngine.resume(tmp_path))
    plain = Plain()
    second.engine.restore(plain=plain)
    assert [(type(value), value) for value in plain.state.values()] == [(int, 3), (float, 0.5)]


# -- folders and files ------------------------------------------------------------------------------------------------


def test_a_new_run_does_not_begin_on_top_of_checkpoints(tmp_path: Path):
    first = begin(tmp_path, engine=PrivacyEngine(tmp_path, budget=dpkit.Budget(1000.0, 0.5))).train(2)
    first.save()
    first.leave()
    with pytest.raises(LedgerError, match=r"PrivacyEngine\.resume goes on"):
        begin(tmp_path)
    assert [path.name for path in (tmp_path / "checkpoints").iterdir()] == ["step-0000000002.safetensors"]


@pytest.mark.parametrize("left", ["checkpoints", "metrics.jsonl", "nonprivate"])
def test_a_lost_ledger_is_noticed_by_whatever_else_a_run_left(tmp_path: Path, left: str):
    run = begin(tmp_path, engine=PrivacyEngine(tmp_path, callbacks=[MetricsFile(RunFolder(tmp_path))])).train(2)
    run.save()
    run.leave()
    for path in tmp_path.iterdir():
        if path.name != left:
            shutil.rmtree(path) if path.is_dir() else path.unlink()
    with pytest.raises(LedgerError, match="is gone"):
        PrivacyEngine(tmp_path)


def test_a_stray_link_among_the_checkpoints_does_not_stop_a_run_from_saving(tmp_path: Path):
    run = begin(tmp_path).train(1)
    (tmp_path / "checkpoints").mkdir()
    (tmp_path / "checkpoints" / "step-0000000099.safetensors").symlink_to("/dev/zero")
    assert run.save().name == "step-0000000001.safetensors"
    with pytest.raises(RunFolderError, match="symbolic link"):
        PrivacyEngine.resume(tmp_path)
    run.leave()
    assert resume(tmp_path, checkpoint="step-0000000001.safetensors").engine.steps_taken == 1


# -- callbacks and signals --------------------------------------------------------------------------------------------


class Breaks(Callback):
    def __init__(self, where: str) -> None:
        self.where = where

    def on_begin(self, settings: Any) -> None:
        self._break("begin")

    def on_step(self, record: StepRecord) -> None:
        self._break("step")

    def on_end(self) -> None:
        self._break("end")

    def _break(self, here: str) -> None:
        if here == self.where:
            raise ZeroDivisionError


def test_a_callback_that_fails_at_the_beginning_leaves_nothing_attached(tmp_path: Path):
    model = mlp()
    with pytest.raises(ZeroDivisionError):
        begin(tmp_path, model=model, engine=PrivacyEngine(tmp_path, callbacks=[Breaks("begin")]))
    model(torch.zeros(2, 5)).sum().backward()  # a plain model again
    begin(tmp_path)


def test_a_callback_that_fails_at_the_end_leaves_model_and_folder_free(tmp_path: Path):
    run = begin(tmp_path, engine=PrivacyEngine(tmp_path, callbacks=[Breaks("end")])).train(1)
    run.save()
    with pytest.raises(ZeroDivisionError):
        run.leave()
    run.model(torch.zeros(2, 5)).sum().backward()
    assert resume(tmp_path).engine.steps_taken == 1


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="needs /dev/full")
def test_a_full_disk_under_the_log_is_an_error_of_ours(tmp_path: Path):
    metrics = MetricsFile(RunFolder(tmp_path))
    run = begin(tmp_path, engine=PrivacyEngine(tmp_path, callbacks=[metrics]))
    metrics._files[False] = Path("/dev/full").open("a", buffering=1, encoding="utf-8")  # noqa: SIM115
    with pytest.raises(RunFolderError, match="No space left"):
        run.train(1)
    assert run.engine.ledger.spent().steps_charged == 1
    run.leave()


@pytest.mark.parametrize(("number", "raised"), [(signal.SIGINT, KeyboardInterrupt), (signal.SIGTERM, SystemExit)])
def test_an_error_does_not_swallow_a_signal_that_came_before_it(
    tmp_path: Path, number: signal.Signals, raised: type[BaseException]
):
    run = begin(tmp_path)
    with pytest.raises(raised), run.engine.autosave(every=5):
        signal.raise_signal(number)
        raise ValueError("on the way")


def test_states_that_are_nested_beyond_reason_are_refused(tmp_path: Path):
    class Deep(Plain):
        def __init__(self) -> None:
            self.state = {"x": []}
            inner = self.state["x"]
            for _ in range(sys.getrecursionlimit()):
                inner.append([])
                inner = inner[0]

    with pytest.raises((DpkitError, RecursionError)):
        begin(tmp_path).train(1).engine.save(deep=Deep())
    assert not (tmp_path / "checkpoints").exists()
