"""Losses of the loop that two rows of a batch share are refused before anything is differentiated."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.data import DataLoader, TensorDataset

import dpkit
from dpkit.errors import CrossExample


class Model(nn.Module):
    def __init__(self, balances: bool) -> None:
        super().__init__()
        self.body, self.head, self.balances = nn.Linear(5, 8), nn.Linear(8, 3), balances

    def forward(self, x: Tensor) -> Tensor:
        h = torch.tanh(self.body(x))
        if self.balances:
            self.balance = h.mean(0).square().sum()
        return self.head(h)


def plain(model: Any, x: Tensor, y: Tensor) -> Tensor:
    return F.cross_entropy(model(x), y, reduction="none")


def support(model: Any, x: Tensor, y: Tensor) -> Tensor:
    """Public data of as many rows as the batch, through the model beside it."""
    anchors = torch.randn(x.shape, generator=torch.Generator().manual_seed(3))
    return F.cross_entropy(model(x) @ model(anchors).T, y, reduction="none")


def contrast(model: Any, x: Tensor, y: Tensor) -> Tensor:
    scores = model(x)
    return F.cross_entropy(scores @ scores.T, torch.arange(len(x)), reduction="none")


def mean_first(model: Any, x: Tensor, y: Tensor) -> Tensor:
    return plain(model, x, y).mean().expand(len(x)).clone()


def attribute(model: Any, x: Tensor, y: Tensor) -> Tensor:
    return plain(model, x, y) + 0.01 * model.balance


def centred(model: Any, x: Tensor, y: Tensor) -> Tensor:
    scores = model(x)
    return F.cross_entropy(scores - scores.mean(0), y, reduction="none")


def prepared(folder: Path, rows_per_unit: int = 1, *, balances: bool = False) -> tuple[Any, Any, Any]:
    torch.manual_seed(0)
    model, engine = Model(balances), dpkit.PrivacyEngine(folder / "run")
    data = TensorDataset(torch.randn(60, 5), torch.arange(60) % 3)
    _, _, loader = engine.make_private(
        model,
        torch.optim.SGD(model.parameters(), lr=0.1),
        DataLoader(data, batch_size=30),
        num_examples=60,
        noise_multiplier=1.0,
        target_delta=1e-3,
        steps=4,
        max_grad_norm=1.0,
        rows_per_unit=rows_per_unit,
    )
    return engine, model, loader


@pytest.mark.parametrize("loss", [support, contrast, mean_first, attribute, centred])
def test_losses_that_rows_share_are_refused(tmp_path: Path, loss: Callable[..., Tensor]) -> None:
    engine, model, loader = prepared(tmp_path, balances=loss is attribute)
    x, y = next(iter(loader))
    with pytest.raises(CrossExample, match=r"enters the losses of several rows.*copy\.deepcopy\(model\)"):
        engine.backward(loss(model, x, y))
    assert engine.steps_left == 4, "nothing was charged"
    assert all(p.grad is None for p in model.parameters())


def weighted(model: Any, x: Tensor, y: Tensor) -> Tensor:
    counts = torch.bincount(y, minlength=3).clamp_min(1)
    return plain(model, x, y) / counts[y]


def twice(model: Any, x: Tensor, y: Tensor) -> Tensor:
    return plain(model, x, y) + (model(x + 0.1) - model(x)).square().sum(1)


def penalised(model: Any, x: Tensor, y: Tensor) -> Tensor:
    scores = model(x)
    return F.cross_entropy(scores, y, reduction="none") + 0.1 * scores.square().sum(1) + scores.mT[0].abs()


@pytest.mark.parametrize("loss", [plain, weighted, twice, penalised])
def test_losses_of_single_rows_pass(tmp_path: Path, loss: Callable[..., Tensor]) -> None:
    engine, model, loader = prepared(tmp_path)
    for x, y in loader:
        model.zero_grad()
        engine.backward(loss(model, x, y))
    assert engine.steps_taken == 2


def test_rows_of_one_unit_pass_and_may_be_in_any_order(tmp_path: Path) -> None:
    engine, model, loader = prepared(tmp_path, rows_per_unit=2)
    x, y = next(iter(loader))
    units = torch.arange(len(x)).repeat(2)
    engine.backward(plain(model, x[units], y[units]), units=units)
    assert engine.steps_taken == 1
