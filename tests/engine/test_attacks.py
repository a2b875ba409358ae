"""Ways in which the reported epsilon could be too small, each tried and closed. Found by people who set out to "
"break it."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from engine.test_loop import attach, data, mlp, train
from engine.test_refusals import charges, make
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint
from torch.utils.data import DataLoader, TensorDataset

import dpkit
from dpkit.errors import (
    CrossExample,
    InvalidArgument,
    LedgerError,
    OutOfOrder,
    Refused,
    UncoveredParameter,
    UnsupportedLoader,
    UnsupportedModule,
    UnsupportedOperation,
)

FULL = {"num_examples": 60, "target_epsilon": None, "noise_multiplier": 1e-6, "max_grad_norm": 1.0}


def test_a_relation_given_as_text_means_what_it_says(tmp_path: Path) -> None:
    plans = [
        dpkit.Plan(
            sampler=dpkit.Poisson(1.0),
            clip=dpkit.clipping.Flat(1.0),
            mechanism=dpkit.Gaussian(1.0),
            steps=1,
            num_examples=10,
            delta=1e-5,
            relation=relation,
        )
        for relation in ("replace_one", dpkit.Relation.REPLACE_ONE)
    ]
    assert plans[0] == plans[1]
    assert plans[0].sensitivities([1.0], 1)[0] > 2.0
    with pytest.raises(InvalidArgument, match="relation"):
        make(tmp_path, mlp(), relation="neighbours")


def test_add_remove_without_a_public_size_is_refused(tmp_path: Path) -> None:
    with pytest.raises(InvalidArgument, match="num_examples"):
        make(tmp_path, mlp(), num_examples=None, relation=dpkit.Relation.ADD_REMOVE)


def test_a_public_size_far_below_the_truth_is_refused(tmp_path: Path) -> None:
    with pytest.raises(InvalidArgument, match="num_examples"):
        make(tmp_path, mlp(), num_examples=29)


class BatchMean(nn.Module):
    """Subtracts the batch mean after an embedding or a cast; ``guard`` keeps functorch out."""

    def __init__(self, first: nn.Module, features: int, *, guard: bool = False, training_only: bool = False) -> None:
        super().__init__()
        self.first, self.out = first, nn.Linear(features, 3)
        self.guard, self.training_only = guard, training_only

    def forward(self, x: Tensor) -> Tensor:
        hidden = self.first(x).flatten(1)
        if self.guard and bool(hidden.sum() > 1e9):
            raise ValueError("never")
        if self.training or not self.training_only:
            hidden = hidden - hidden.mean(0)
        return self.out(hidden)


class Scaled(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return x.float() / 255


@pytest.mark.parametrize("kind", ["ids", "bytes", "floats"])
def test_the_probe_sees_mixing_whatever_the_type_of_the_input(tmp_path: Path, kind: str) -> None:
    inputs, model = {
        "ids": (torch.randint(0, 50, (60, 2)), BatchMean(nn.Embedding(50, 4), 8, guard=True)),
        "bytes": (torch.randint(0, 255, (60, 1, 4, 4)).byte(), BatchMean(Scaled(), 16, guard=True)),
        "floats": (torch.randn(60, 5), BatchMean(nn.Identity(), 5, guard=True)),
    }[kind]
    loader = DataLoader(TensorDataset(inputs, torch.randint(0, 3, (60,))), batch_size=10)
    engine, model, optimizer, private = make(tmp_path, model, loader=loader)
    with pytest.raises(CrossExample):
        train(engine, model, optimizer, private, 1)
    assert charges(engine) == 0


def test_a_refused_model_stays_refused_when_the_loop_is_run_again(tmp_path: Path) -> None:
    engine, model, optimizer, loader = make(tmp_path, BatchMean(nn.Identity(), 5))
    for _ in range(3):
        with pytest.raises(Refused):
            train(engine, model, optimizer, loader, 1)
    assert charges(engine) == 0


def test_a_model_is_probed_again_when_it_is_switched_to_training(tmp_path: Path) -> None:
    engine, model, optimizer, loader = make(tmp_path, BatchMean(nn.Identity(), 5, training_only=True))
    model.eval()
    batches = iter(loader)
    x, y = next(batches)
    engine.backward(F.cross_entropy(model(x), y, reduction="none"))
    optimizer.step()
    model.train()
    x, y = next(batches)
    with pytest.raises(CrossExample):
        model(x)
    assert charges(engine) == 1


def test_the_functional_form_probes_every_mode_too(tmp_path: Path) -> None:
    model = BatchMean(nn.Identity(), 5, training_only=True).eval()
    engine = dpkit.PrivacyEngine(tmp_path)
    plan = dpkit.Plan(
        sampler=dpkit.Poisson(0.2),
        clip=dpkit.clipping.Flat(1.0),
        mechanism=dpkit.Gaussian(1.0),
        steps=5,
        num_examples=60,
        delta=1e-4,
    )
    step = engine.attach(
        model,
        lambda m, b: F.cross_entropy(m(b[0]), b[1], reduction="none"),
        torch.optim.SGD(model.parameters(), 0.1),
        plan=plan,
        dataset=data(),
    )
    batches = engine.batches()
    step(next(batches))
    model.train()
    with pytest.raises(CrossExample):
        step(next(batches))
    assert charges(engine) == 1


class Remembers(nn.Module):
    """Keeps a running mean of its inputs where ``named_buffers`` does not look."""

    def __init__(self, where: str) -> None:
        super().__init__()
        self.net = mlp()
        self.where = where
        mean = torch.zeros(5)
        is_attribute = "attribute" in where
        self.mean = mean if is_attribute else nn.Parameter(mean, requires_grad=where == "trainable")

    def forward(self, x: Tensor) -> Tensor:
        with torch.no_grad():
            if self.where == "attribute":
                self.mean = 0.9 * self.mean + 0.1 * x.mean(0)
            else:
                self.mean.mul_(0.9).add_(0.1 * x.mean(0))  # read by nobody while training
        return self.net(x - (self.mean.detach() if self.where == "attribute" else 0.0))


@pytest.mark.parametrize("where", ["attribute", "attribute in place", "frozen", "trainable"])
def test_the_probe_sees_data_that_the_model_keeps(tmp_path: Path, where: str) -> None:
    model = Remembers(where)
    engine, model, optimizer, loader = make(tmp_path, model)
    with pytest.raises((UnsupportedModule, CrossExample)):
        train(engine, model, optimizer, loader, 1)
    assert charges(engine) == 0
    if "attribute" in where:
        assert torch.equal(model.mean, torch.zeros(5))


def test_a_backward_of_other_records_leaves_nothing_behind(tmp_path: Path) -> None:
    engine, model, _, loader = make(
        tmp_path, mlp(), loss_reduction="mean", **{"target_epsilon": None, "noise_multiplier": 1e-6}
    )
    foreign = 100 * torch.randn(17, 5)
    with pytest.raises(OutOfOrder):
        F.cross_entropy(model(foreign), torch.zeros(17, dtype=torch.long)).backward()
    x, y = next(iter(loader))
    stale = F.cross_entropy(model(foreign), torch.zeros(17, dtype=torch.long))
    engine.backward(F.cross_entropy(model(x), y))
    norm = torch.cat([p.grad.flatten() for p in model.parameters()]).norm() * 10
    assert float(norm) <= engine.nonprivate.units * 1.001 + 1e-3
    with pytest.raises(OutOfOrder):
        stale.backward()


def test_a_batch_that_did_not_go_through_the_model_row_by_row_is_refused(tmp_path: Path) -> None:
    engine, model, _, loader = make(tmp_path, mlp())
    x, y = next(iter(loader))
    model(torch.randn(len(x) + 1, 5))  # other data of the user's own: no business of the engine
    losses = F.cross_entropy(model(torch.cat([x, x]))[: len(x)], y, reduction="none")
    with pytest.raises(CrossExample, match="one row per example"):
        engine.backward(losses)
    assert charges(engine) == 0
    engine.backward(F.cross_entropy(model(x), y, reduction="none"))
    assert charges(engine) == 1


class Dies(nn.Module):
    """Lets the backward pass die, after the layers behind it were recorded."""

    dead = 0  # a number: a flag would be a new way to call the model, and probed

    def forward(self, x: Tensor) -> Tensor:
        if self.dead:
            x.register_hook(lambda gradient: 1 / 0)
        return x


@pytest.mark.parametrize("reduction", ["none", "mean"])
def test_a_backward_that_died_half_way_ends_the_run(tmp_path: Path, reduction: str) -> None:
    dies = Dies()
    model = nn.Sequential(nn.Linear(5, 4), dies, nn.Linear(4, 3))
    engine, model, _, loader = make(tmp_path, model, loss_reduction=reduction)
    x, y = next(iter(loader))
    model(x)  # probed
    dies.dead = 1
    loss = F.cross_entropy(model(x), y, reduction=reduction)
    with pytest.raises(ZeroDivisionError):
        engine.backward(loss) if reduction == "none" else loss.backward()
    with pytest.raises(OutOfOrder, match="failed"):
        next(iter(loader))
    assert charges(engine) == 0


def test_a_head_of_its_own_gets_no_gradient_through_loss_backward(tmp_path: Path) -> None:
    engine, model, _, loader = make(tmp_path, mlp(), loss_reduction="mean")
    head = nn.Linear(3, 3)
    x, y = next(iter(loader))
    with pytest.raises(UncoveredParameter):
        F.cross_entropy(head(model(x)), y).backward()
    assert head.weight.grad is None and charges(engine) == 0


def test_a_data_set_that_returns_several_rows_for_one_index_is_refused(tmp_path: Path) -> None:
    class Crops(TensorDataset):
        def __getitems__(self, indices: list[int]) -> list[tuple[Tensor, ...]]:
            return [self[index] for index in indices for _ in range(10)]

    engine, model, optimizer, loader = make(tmp_path, mlp(), loader=DataLoader(Crops(*data().tensors), batch_size=10))
    with pytest.raises(UnsupportedLoader, match="10 rows|rows for"):
        train(engine, model, optimizer, loader, 1)
    assert charges(engine) == 0


class Checkpointed(nn.Module):
    def __init__(self, reentrant: bool) -> None:
        super().__init__()
        self.first, self.inner, self.out = nn.Linear(5, 5), nn.Linear(5, 5), nn.Linear(5, 3)
        self.reentrant = reentrant

    def forward(self, x: Tensor) -> Tensor:
        return self.out(checkpoint(self.inner, self.first(x), use_reentrant=self.reentrant))


def test_reentrant_checkpoints_are_refused(tmp_path: Path) -> None:
    engine, model, optimizer, loader = make(tmp_path, Checkpointed(True))
    with pytest.raises(UnsupportedOperation, match=r"reentrant checkpoint.*use_reentrant=False"):
        train(engine, model, optimizer, loader, 1)
    assert charges(engine) == 0


def test_checkpoints_need_the_engines_own_backward_pass(tmp_path: Path) -> None:
    engine, model, optimizer, loader = make(tmp_path, Checkpointed(False), loss_reduction="mean")
    x, y = next(iter(loader))
    with pytest.raises(UnsupportedOperation, match=r"checkpoint.*engine\.backward"):
        F.cross_entropy(model(x), y).backward()
    assert charges(engine) == 0


def test_a_release_that_nobody_used_is_not_overwritten_in_silence(tmp_path: Path) -> None:
    engine, model, _, loader = attach(tmp_path)
    batches = iter(loader)
    x, y = next(batches)
    engine.backward(F.cross_entropy(model(x), y, reduction="none"))
    x, y = next(batches)
    with pytest.raises(OutOfOrder, match="accumulate"):
        engine.backward(F.cross_entropy(model(x), y, reduction="none"))
    model.zero_grad()
    engine.backward(F.cross_entropy(model(x), y, reduction="none"))
    assert engine.steps_taken == 2


def test_a_shared_ledger_that_was_deleted_does_not_start_again_in_a_used_folder(tmp_path: Path) -> None:
    where = {"ledger": tmp_path / "shared.sqlite", "dataset_name": "made up"}
    model = mlp()
    engine = dpkit.PrivacyEngine(tmp_path / "run", **where)
    options = {"target_epsilon": 3.0, "target_delta": 1e-4, "epochs": 1, "max_grad_norm": 1.0}
    engine.make_private(model, torch.optim.SGD(model.parameters(), 0.1), DataLoader(data(), 10), **options)
    where["ledger"].unlink()
    with pytest.raises(LedgerError, match="gone"):
        dpkit.PrivacyEngine(tmp_path / "run", **where)


def test_the_statement_says_what_is_assumed_of_the_loop(tmp_path: Path) -> None:
    engine, *loop = attach(tmp_path)
    train(engine, *loop, epochs=1)
    assert "not inspected" in " ".join(str(engine.statement()).split())


@pytest.mark.parametrize("size", [3, 16, 40])
def test_batches_have_public_steps_of_rows(tmp_path: Path, size: int) -> None:
    _, _, _, loader = attach(tmp_path)
    assert all(len(x) % 16 == 0 for x, _ in [next(iter(loader)) for _ in range(5)])
    _, _, _, loader = attach(tmp_path / "micro", max_physical_batch_size=size)
    assert len(next(iter(loader))[0]) == {3: 3, 16: 16, 40: 32}[size]


@pytest.mark.parametrize(
    "changes",
    [
        {"num_examples": "60"},
        {"target_delta": "1e-5"},
        {"max_grad_norm": "1"},
        {"target_epsilon": None, "noise_multiplier": True},
        {"epochs": 2.5},
        {"max_physical_batch_size": 2.5},
    ],
    ids=str,
)
def test_values_of_another_type_are_refused(tmp_path: Path, changes: dict) -> None:
    with pytest.raises(InvalidArgument):
        make(tmp_path, mlp(), **changes)


def test_a_frozen_model_is_refused(tmp_path: Path) -> None:
    model = mlp().requires_grad_(False)
    with pytest.raises(UncoveredParameter, match="no trainable"):
        make(tmp_path, model)
