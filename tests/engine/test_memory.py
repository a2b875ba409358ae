"""A batch that does not fit into memory is reported with the number of rows that would."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.data import DataLoader, TensorDataset

import dpkit
from dpkit.engine import memory
from dpkit.errors import OutOfMemory, OutOfOrder

MESSAGES = {
    "cuda": torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB."),
    "cpu": RuntimeError("[enforce fail] DefaultCPUAllocator: can't allocate memory: you tried to allocate 8 bytes."),
}


class Full(torch.autograd.Function):
    """The identity, whose backward pass finds no memory for more than so many rows."""

    error: Any = None
    limit = 40

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        return x.view_as(x)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> Tensor:
        if len(gradient) > Full.limit:
            raise Full.error
        return gradient


class Model(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = nn.Linear(5, 8), nn.Linear(8, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.second(Full.apply(self.first(x)))


def data() -> TensorDataset:
    return TensorDataset(torch.randn(60, 5), torch.arange(60) % 3)


@pytest.mark.parametrize("kind", MESSAGES)
@pytest.mark.parametrize("free", [1 << 40, 6_000], ids=["plenty", "little"])
def test_the_loop_learns_which_batch_would_fit(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, kind: str, free: int
) -> None:
    monkeypatch.setattr(Full, "error", MESSAGES[kind])
    monkeypatch.setattr(memory, "free_bytes", lambda device: free)
    torch.manual_seed(0)
    model, engine = Model(), dpkit.PrivacyEngine(tmp_path / "run")
    _, _, loader = engine.make_private(
        model,
        torch.optim.SGD(model.parameters(), lr=0.1),
        DataLoader(data(), batch_size=60),
        num_examples=60,
        noise_multiplier=1.0,
        target_delta=1e-3,
        steps=2,
        max_grad_norm=1.0,
    )
    x, y = next(iter(loader))
    assert len(x) == 64
    fits = 32 if free > 1 << 30 else 16
    with pytest.raises(OutOfMemory, match=rf"batch of 64 rows .* max_physical_batch_size={fits}\b.*PerLayer") as caught:
        engine.backward(F.cross_entropy(model(x), y, reduction="none"))
    assert caught.value.__cause__ is None
    assert engine.steps_left == 2, "nothing was charged"
    with pytest.raises(OutOfOrder, match="failed"):
        next(iter(loader))


def test_the_functional_form_learns_it_too_and_then_fits(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Full, "error", MESSAGES["cuda"])
    torch.manual_seed(0)
    plan = dpkit.Plan(
        sampler=dpkit.Poisson(1.0),
        clip=dpkit.clipping.Flat(1.0),
        mechanism=dpkit.Gaussian(1.0),
        steps=1,
        num_examples=60,
        delta=1e-3,
    )

    def loss_fn(model: nn.Module, batch: Any) -> Tensor:
        return F.cross_entropy(model(batch[0]), batch[1], reduction="none")

    def train(folder: str, **options: Any) -> None:
        model, engine = Model(), dpkit.PrivacyEngine(tmp_path / folder)
        optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
        step = engine.attach(model, loss_fn, optimizer, plan=plan, dataset=data(), **options)
        for batch in engine.batches():
            step(batch)

    with pytest.raises(OutOfMemory, match=r"max_physical_batch_size=32\b"):
        train("whole")
    train("cut", max_physical_batch_size=32)


def test_other_errors_pass() -> None:
    with pytest.raises(RuntimeError, match="shape"), memory.explained(8, torch.device("cpu")):
        raise RuntimeError("mat1 and mat2 have another shape")
