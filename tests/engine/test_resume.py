"""A resumed run: the same as one that was never stopped in all but its noise, and never cheaper."""

from __future__ import annotations

import itertools
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.optim import lr_scheduler as schedulers

import dpkit
from accounting import Ledger
from dpkit.engine import PrivacyEngine
from dpkit.errors import CheckpointError, LedgerError, OutOfOrder, RunFolderError
from dpkit.filters import Filter, FilterOf, butterworth, first_order
from dpkit.mechanisms import RunKey
from dpkit.types import Released

from .runs import STEPS_PER_PASS, N, begin, dataset, mlp, resume, sgd


@pytest.fixture
def no_noise(monkeypatch: pytest.MonkeyPatch) -> None:
    """Noise off, and draws that go on where they stopped: what is left must be equal bit for bit."""
    monkeypatch.setattr("dpkit.mechanisms.gaussian._add_noise", lambda value, std, generator: value.clone())


def fixed_draws(monkeypatch: pytest.MonkeyPatch) -> None:
    """From now on the k-th draw is the same, whichever process makes it."""
    draws = itertools.count()
    monkeypatch.setattr(RunKey, "sampling", lambda self, draw: torch.Generator().manual_seed(next(draws)))


def adam(model: nn.Module) -> torch.optim.Optimizer:
    return torch.optim.Adam(model.parameters(), lr=0.01, amsgrad=True)


def two_groups(model: nn.Module) -> torch.optim.Optimizer:
    first, *rest = model.parameters()
    groups = [{"params": [first], "lr": 0.3, "weight_decay": 0.1}, {"params": rest}]
    return torch.optim.AdamW(groups, lr=0.01)


OPTIMIZERS = {
    "sgd": sgd,
    "adam": adam,
    "adamw with two groups": two_groups,
    "rmsprop": lambda model: torch.optim.RMSprop(model.parameters(), lr=0.01, momentum=0.5),
    "adagrad": lambda model: torch.optim.Adagrad(model.parameters(), lr=0.05),
}
SCHEDULERS = {
    "none": None,
    "lambda": lambda optimizer: schedulers.LambdaLR(optimizer, lambda step: 1 - step / 40),
    "multi step": lambda optimizer: schedulers.MultiStepLR(optimizer, [3, 9], gamma=0.5),
    "exponential": lambda optimizer: schedulers.ExponentialLR(optimizer, 0.9),
    "cosine": lambda optimizer: schedulers.CosineAnnealingLR(optimizer, 20),
    "one cycle": lambda optimizer: schedulers.OneCycleLR(optimizer, max_lr=0.2, total_steps=30),
    "plateau": lambda optimizer: schedulers.ReduceLROnPlateau(optimizer, patience=1),
    "sequence": lambda optimizer: schedulers.SequentialLR(
        optimizer, [schedulers.LinearLR(optimizer, 0.1, total_iters=5), schedulers.ExponentialLR(optimizer, 0.9)], [5]
    ),
}


def same(one: Any, other: Any) -> bool:
    """Equal in type and value, tensors in every bit."""
    if isinstance(one, Tensor):
        return isinstance(other, Tensor) and one.dtype == other.dtype and torch.equal(one, other)
    if isinstance(one, dict):
        return one.keys() == other.keys() and all(same(one[key], other[key]) for key in one)
    if isinstance(one, (list, tuple)):
        return len(one) == len(other) and all(map(same, one, other))
    return type(one) is type(other) and one == other


@pytest.mark.parametrize(
    ("optimizer", "scheduler"),
    [*((name, "lambda") for name in OPTIMIZERS), *(("sgd", name) for name in SCHEDULERS)],
)
@pytest.mark.parametrize("stop", [0, 4, STEPS_PER_PASS, 11])
def test_without_noise_a_resumed_run_is_the_uninterrupted_one_bit_for_bit(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, no_noise: None, optimizer: str, scheduler: str, stop: int
):
    make = OPTIMIZERS[optimizer], SCHEDULERS[scheduler]
    fixed_draws(monkeypatch)
    whole = begin(tmp_path / "whole", *make).train()

    fixed_draws(monkeypatch)
    first = begin(tmp_path / "run", *make).train(stop, save=True)
    if stop == 0:
        first.save()
    first.leave()
    second = resume(tmp_path / "run", *make).train()

    assert second.engine.steps_taken == whole.engine.steps_taken == 20
    assert same(whole.model.state_dict(), second.model.state_dict())
    assert same(whole.optimizer.state_dict(), second.optimizer.state_dict())
    if scheduler != "none":
        assert same(whole.scheduler.state_dict(), second.scheduler.state_dict())
    # Passes over the loader end where they would have ended.
    ends = list(itertools.accumulate(second.passes, initial=stop))[1:]
    assert ends == [end for end in (6, 12, 18, 20) if end >= stop]


@pytest.mark.parametrize(("steps", "passes"), [(STEPS_PER_PASS, [6, 6, 2]), (4, [6, 6, 4])])
def test_a_run_that_was_saved_after_a_pass_begins_a_new_one(tmp_path: Path, steps: int, passes: list[int]):
    # Also when the loop left the pass early: the same process would begin a new pass as well.
    first = begin(tmp_path).train(steps)
    first.save()
    first.leave()
    assert resume(tmp_path).train().passes == passes


def test_a_scheduler_that_is_made_after_attaching_does_not_undo_the_resumed_learning_rate(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, no_noise: None
):
    make = SCHEDULERS["exponential"]
    first = begin(tmp_path, sgd, make).train(7)
    first.save()
    first.leave()
    second = begin(tmp_path, engine=PrivacyEngine.resume(tmp_path))
    late = make(second.optimizer)  # sets the learning rate of the optimizer to its initial one
    second.engine.restore(scheduler=late)
    assert second.optimizer.param_groups[0]["lr"] == pytest.approx(0.1 * 0.9**7)
    assert late.last_epoch == 7


class Momentum(NamedTuple):
    velocity: dict[str, Tensor]
    steps: int


def momentum_filter() -> FilterOf:
    def start(parameters: dict[str, Tensor]) -> Momentum:
        return Momentum({name: torch.zeros_like(p, requires_grad=False) for name, p in parameters.items()}, 0)

    def update(released: Released, state: Momentum) -> tuple[Released, Momentum]:
        velocity = {name: 0.9 * state.velocity[name] + value for name, value in released.value.items()}
        return released._replace(value=velocity), Momentum(velocity, state.steps + 1)

    return FilterOf(start, update)


@pytest.mark.parametrize("filter_of", [momentum_filter, first_order, lambda: butterworth(3, 0.1)], ids=range(3))
def test_the_state_of_filters_goes_on(
    filter_of: Callable[[], Filter], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, no_noise: None
):
    fixed_draws(monkeypatch)
    whole = begin(tmp_path / "whole", filters=(filter_of(),)).train()
    fixed_draws(monkeypatch)
    first = begin(tmp_path / "run", filters=(filter_of(),)).train(5)
    first.save()
    first.leave()
    second = resume(tmp_path / "run", filters=(filter_of(),)).train()
    assert same(whole.model.state_dict(), second.model.state_dict())


def test_microbatches_go_on(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, no_noise: None):
    fixed_draws(monkeypatch)
    whole = begin(tmp_path / "whole", max_physical_batch_size=16).train()
    fixed_draws(monkeypatch)
    first = begin(tmp_path / "run", max_physical_batch_size=16).train(5)
    first.save()
    first.leave()
    second = resume(tmp_path / "run", max_physical_batch_size=16).train()
    assert same(whole.model.state_dict(), second.model.state_dict())


@pytest.mark.parametrize("backend", ["ghost", "vmap"])
def test_the_functional_form_is_resumed_too(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, no_noise: None, backend: str
):
    def losses(model: nn.Module, batch: Any) -> Tensor:
        return F.cross_entropy(model(batch[0]), batch[1], reduction="none")

    def run(engine: PrivacyEngine, model: nn.Module, steps: int) -> nn.Module:
        plan = dpkit.Plan(
            sampler=dpkit.Poisson(1 / 6),
            clip=dpkit.clipping.Flat(1.0),
            mechanism=dpkit.Gaussian(1.5),
            steps=12,
            num_examples=N,
            delta=1e-3,
        )
        optimizer = adam(model)
        step = engine.attach(model, losses, optimizer, plan=plan, dataset=dataset(), backend=getattr(dpkit, backend))
        for batch in itertools.islice(engine.batches(), steps):
            step(batch)
        engine.save()
        engine.detach()
        return model

    fixed_draws(monkeypatch)
    whole = run(PrivacyEngine(tmp_path / "whole"), mlp(), 12)
    fixed_draws(monkeypatch)
    run(PrivacyEngine(tmp_path / "run"), mlp(), 5)
    parts = run(PrivacyEngine.resume(tmp_path / "run"), mlp(seed=3), 12)
    assert same(whole.state_dict(), parts.state_dict())


def test_steps_that_are_taken_again_are_paid_again(tmp_path: Path):
    first = begin(tmp_path).train(3)
    first.save()
    first.train(4)  # and then the process dies
    first.leave()
    second = resume(tmp_path)
    assert (second.engine.steps_taken, second.engine.steps_left) == (3, 20 - 7)
    assert second.engine.epsilon() == second.engine.plan.epsilon(7)
    second.train()
    assert (second.engine.steps_taken, second.engine.steps_left) == (16, 0)
    assert second.engine.epsilon() == second.engine.plan.epsilon(20)
    with Ledger.open(tmp_path / "ledger.sqlite", read_only=True) as ledger:
        assert ledger.spent().steps_charged == 20
    assert list(second.loader) == []


def test_the_statement_says_how_many_steps_may_still_be_taken(tmp_path: Path):
    first = begin(tmp_path).train(3)
    first.save()
    first.train(2)
    first.leave()
    second = resume(tmp_path)
    assert "5 of 20 planned steps charged; 15 more may be taken" in str(second.engine.statement())


def test_a_run_that_was_charged_in_full_can_be_loaded_and_takes_no_step(tmp_path: Path):
    first = begin(tmp_path).train(18)
    first.save()
    first.train()
    first.leave()
    second = resume(tmp_path)
    assert (second.engine.steps_taken, second.engine.steps_left) == (18, 0)
    assert second.train().engine.steps_taken == 18


@pytest.mark.parametrize("seed", [None, 7])
def test_a_resumed_run_repeats_neither_noise_nor_draws(tmp_path: Path, seed: int | None):
    first = begin(tmp_path, engine=PrivacyEngine(tmp_path, seed=seed)).train(3)
    first.save()
    first.leave()
    second = resume(tmp_path, seed=seed)
    assert first.engine._run_key._secret != second.engine._run_key._secret
    one, other = first.engine._run_key.sampling(0), second.engine._run_key.sampling(0)
    assert not torch.equal(torch.rand(8, generator=one), torch.rand(8, generator=other))
    # The same run resumed again after more charges has other keys again.
    second.train(1).leave()
    third = resume(tmp_path, seed=seed)
    assert third.engine._run_key._secret != second.engine._run_key._secret


def test_a_checkpoint_holds_no_key(tmp_path: Path):
    run = begin(tmp_path).train(3)
    secret = run.engine._run_key._secret
    content = run.save().read_bytes()
    assert secret not in content and secret.hex().encode() not in content
    assert b"generator" not in content.replace(b"noise_generator", b"")


def test_the_noise_that_a_target_epsilon_was_calibrated_to_stays(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    target = {"noise_multiplier": None, "target_epsilon": 4.0}
    first = begin(tmp_path, **target).train(2)
    first.save()
    first.leave()
    # Another release of scipy calibrates to another last digit.
    monkeypatch.setattr("accounting.calibrate_noise_multiplier", lambda *a, **k: pytest.fail("calibrated anew"))
    second = resume(tmp_path, **target)
    assert second.engine.plan == first.engine.plan


CHANGED_PLANS = {
    "noise": ({"noise_multiplier": 1.6}, "event was"),
    "clipping norm": ({"max_grad_norm": 2.0}, "max_grad_norm was 1.0 and is 2.0"),
    "batch size": ({"batch_size": 20}, "event was"),
    "examples": ({"num_examples": N + 1}, "num_examples was 60 and is 61"),
    "steps": ({"steps": 21}, "steps was 20 and is 21"),
    "delta": ({"target_delta": 1e-2}, "delta was 0.001 and is 0.01"),
    "relation": ({"relation": dpkit.Relation.ZERO_OUT}, "relation was"),
    "target": ({"noise_multiplier": None, "target_epsilon": 50.0}, "target_epsilon was None and is 50.0"),
    "filters": ({"filters": (momentum_filter(),)}, "filters was [] and is"),
    "microbatches": ({"max_physical_batch_size": 16}, "event was"),
}


@pytest.mark.parametrize("change", CHANGED_PLANS)
def test_a_checkpoint_of_another_plan_is_refused_and_nothing_is_charged(tmp_path: Path, change: str):
    first = begin(tmp_path).train(2)
    first.save()
    first.leave()
    changes, named = CHANGED_PLANS[change]
    with pytest.raises(CheckpointError, match="another plan") as caught:
        resume(tmp_path, **changes)
    assert named in str(caught.value)
    with Ledger.open(tmp_path / "ledger.sqlite", read_only=True) as ledger:
        assert ledger.spent().steps_charged == 2


@pytest.mark.parametrize(
    ("model", "named"),
    [
        (lambda: mlp(hidden=9), "shape (9, 5)"),
        (lambda: mlp().double(), "torch.float64"),
        (lambda: nn.Sequential(nn.Linear(5, 3)), "of another model"),
        (lambda: nn.Sequential(*mlp(), nn.Linear(3, 3)), "of another model"),
    ],
)
def test_a_checkpoint_of_another_model_is_refused(tmp_path: Path, model: Any, named: str):
    first = begin(tmp_path).train(2)
    first.save()
    first.leave()
    other = model()
    with pytest.raises(CheckpointError) as caught:
        resume(tmp_path, model=other)
    assert named in str(caught.value)
    # The refused model is free again, and the run folder too.
    assert resume(tmp_path).engine.steps_taken == 2


def test_a_checkpoint_of_another_optimizer_is_refused(tmp_path: Path):
    first = begin(tmp_path, two_groups).train(2)
    first.save()
    first.leave()
    with pytest.raises(CheckpointError, match="'optimizer'"):
        resume(tmp_path, adam)


def test_a_ledger_that_is_older_than_the_checkpoint_is_refused(tmp_path: Path):
    first = begin(tmp_path).train(2)
    shutil.copy(tmp_path / "ledger.sqlite", tmp_path.parent / "older.sqlite")
    first.train(2)
    first.save()
    first.leave()
    shutil.copy(tmp_path.parent / "older.sqlite", tmp_path / "ledger.sqlite")
    with pytest.raises(LedgerError, match="older copy"):
        PrivacyEngine.resume(tmp_path)


def test_a_ledger_that_is_gone_or_of_another_run_is_refused(tmp_path: Path):
    for name in ("one", "two"):
        run = begin(tmp_path / name).train(2)
        run.save()
        run.leave()
    shutil.copy(tmp_path / "one" / "ledger.sqlite", tmp_path / "two" / "ledger.sqlite")
    with pytest.raises(LedgerError):
        PrivacyEngine.resume(tmp_path / "two")
    (tmp_path / "two" / "ledger.sqlite").unlink()
    with pytest.raises(LedgerError, match="gone"):
        PrivacyEngine.resume(tmp_path / "two")
    shutil.rmtree(tmp_path / "two" / "nonprivate")
    with pytest.raises(LedgerError, match="gone"):
        PrivacyEngine.resume(tmp_path / "two")


def test_a_checkpoint_from_another_run_folder_goes_on_with_the_plan_it_was_paid_from(tmp_path: Path):
    shared = {"ledger": tmp_path / "shared.sqlite", "dataset_name": "people"}
    for name, steps in (("one", 5), ("two", 2)):
        budget = dpkit.Budget(100.0, 0.1) if name == "one" else None
        run = begin(tmp_path / name, engine=PrivacyEngine(tmp_path / name, **shared, budget=budget)).train(steps)
        run.save()
        run.leave()
    (copied,) = (tmp_path / "one" / "checkpoints").iterdir()
    shutil.copy(copied, tmp_path / "two" / "checkpoints" / copied.name)
    engine = PrivacyEngine.resume(tmp_path / "two", checkpoint=copied.name, **shared)
    begin(tmp_path / "two", engine=engine).train().leave()
    assert [charged for _, charged in engine.ledger.plans()] == [20, 2]


def test_a_checkpoint_that_is_ahead_of_its_plan_in_the_ledger_is_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    run = begin(tmp_path).train(3)
    monkeypatch.setattr(run.engine._attached, "steps_taken", 4)
    run.save()
    run.leave()
    with pytest.raises(CheckpointError, match="after 4 steps, and the ledger has charged 3"):
        PrivacyEngine.resume(tmp_path)


def test_a_changed_data_set_name_is_refused(tmp_path: Path):
    first = begin(tmp_path).train(2)
    first.save()
    first.leave()
    with pytest.raises(CheckpointError, match="start a new run"):
        PrivacyEngine.resume(tmp_path, dataset_name="others")


def test_a_moved_run_folder_is_resumed_under_its_old_data_set_name(tmp_path: Path):
    first = begin(tmp_path / "before").train(2)
    first.save()
    first.leave()
    (tmp_path / "before").rename(tmp_path / "after")
    assert resume(tmp_path / "after").engine.ledger.dataset_name == "before"


def test_a_certified_run_is_not_resumed_with_a_seed(tmp_path: Path):
    first = begin(tmp_path).train(2)
    first.save()
    first.leave()
    with pytest.raises(CheckpointError, match="leave seed out"):
        resume(tmp_path, seed=1)


def test_a_seeded_run_stays_uncertified_when_it_is_resumed_without_a_seed(tmp_path: Path):
    first = begin(tmp_path, engine=PrivacyEngine(tmp_path, seed=1)).train(2)
    first.save()
    first.leave()
    assert resume(tmp_path).train().engine.statement().certified is False


def test_a_folder_without_checkpoints_is_refused(tmp_path: Path):
    with pytest.raises(CheckpointError, match="no checkpoint"):
        PrivacyEngine.resume(tmp_path / "nothing")
    begin(tmp_path).train(2).leave()
    with pytest.raises(CheckpointError, match="no checkpoint"):
        PrivacyEngine.resume(tmp_path)


@pytest.mark.parametrize("name", ["../ledger.sqlite", "/etc/passwd", "step-1.safetensors", "", "a\0b", ".."])
def test_a_checkpoint_name_that_could_lead_elsewhere_is_refused(tmp_path: Path, name: str):
    with pytest.raises(CheckpointError, match="not the name of a checkpoint"):
        PrivacyEngine.resume(tmp_path, checkpoint=name)


def test_links_that_lead_out_of_the_run_folder_are_refused(tmp_path: Path):
    for name in ("one", "two"):
        run = begin(tmp_path / name).train(2)
        run.save()
        run.leave()
    (own,) = (tmp_path / "two" / "checkpoints").iterdir()
    own.unlink()
    own.symlink_to(tmp_path / "one" / "checkpoints" / own.name)
    with pytest.raises(RunFolderError, match="symbolic link"):
        PrivacyEngine.resume(tmp_path / "two")
    shutil.rmtree(tmp_path / "two" / "checkpoints")
    (tmp_path / "two" / "checkpoints").symlink_to(tmp_path / "one" / "checkpoints")
    with pytest.raises(RunFolderError, match="symbolic link"):
        PrivacyEngine.resume(tmp_path / "two")


def test_states_that_were_saved_must_be_restored_before_training_goes_on(tmp_path: Path):
    make = SCHEDULERS["cosine"]
    first = begin(tmp_path, sgd, make).train(2)
    first.save()
    first.leave()
    second = begin(tmp_path, sgd, make, engine=PrivacyEngine.resume(tmp_path))
    with pytest.raises(OutOfOrder, match="scheduler"):
        second.train(1)
    with pytest.raises(OutOfOrder, match="scheduler"):
        second.engine.save()
    with pytest.raises(CheckpointError, match="ema"):
        second.engine.restore(scheduler=second.scheduler, ema=second.model)
    with pytest.raises(CheckpointError, match="scheduler"):
        second.engine.restore()
    second.engine.restore(scheduler=second.scheduler)
    assert second.train(1).engine.steps_taken == 3


def test_restoring_belongs_to_resumed_runs(tmp_path: Path):
    with pytest.raises(OutOfOrder, match="not resumed"):
        begin(tmp_path).engine.restore()


def test_a_run_that_diverged_is_not_saved_and_the_good_checkpoints_stay(tmp_path: Path):
    first = begin(tmp_path)
    with pytest.raises(CheckpointError, match="not finite"), first.engine.autosave(every=1, keep=1):
        first.train(2)
        with torch.no_grad():
            first.model[0].weight[0, 0] = float("nan")
        first.train(1)
    first.leave()
    assert resume(tmp_path).engine.steps_taken == 1


def test_a_mechanism_that_remembers_noise_is_not_resumed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    first = begin(tmp_path).train(2)
    first.save()
    first.leave()
    monkeypatch.setattr(dpkit.Gaussian, "init", lambda self, parameters, participation: {"noise": torch.zeros(3)})
    with pytest.raises(CheckpointError, match="remembers noise"):
        resume(tmp_path)
