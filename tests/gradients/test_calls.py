"""How loops call their models: several times, in parts, with nested batches and outputs, at batches of every size."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import pytest
import torch
from gradients.loop import LossFn, assert_like_loop, one_by_one, recorded, take
from torch import Tensor, nn
from torch.nn import functional as F

from dpkit.gradients import Capture, trainable

SIZE = 6


class Tower(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.net = nn.Sequential(nn.Linear(4, 5), nn.Tanh(), nn.LayerNorm(5), nn.Linear(5, 3))

    def forward(self, x: Tensor) -> Tensor:
        return F.normalize(self.net(x), dim=-1)


class Output(NamedTuple):
    scores: Tensor
    extra: dict[str, Any]


class Structured(nn.Module):
    """Keyword arguments and nested structures in and out, with things that are no tensors."""

    def __init__(self) -> None:
        super().__init__()
        self.words, self.numbers = nn.Embedding(9, 4), nn.Linear(4, 4)
        self.head = nn.Linear(4, 3)

    def forward(self, *, inputs: dict[str, Any], scale: float = 1.0, flag: bool | None = None) -> Output:
        hidden = self.words(inputs["ids"]).mean(1) * scale + self.numbers(inputs["nested"][0]["x"])
        scores = self.head(torch.tanh(hidden))
        return Output(scores, {"hidden": [hidden], "flag": flag, "none": None})


class TwoHeads(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.trunk = nn.Linear(4, 4)
        self.heads = nn.ModuleList([nn.Linear(4, 3), nn.Linear(4, 1)])

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        x = torch.tanh(self.trunk(x))
        return self.heads[0](x), self.heads[1](x)


class Unrolled(nn.Module):
    """A layer that is called a number of times which is known only at run time."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(4, 4)

    def forward(self, x: Tensor, times: int = 1) -> Tensor:
        for _ in range(times):
            x = torch.tanh(self.layer(x))
        return x


class Sparse(nn.Module):
    """Experts, all of which run for each example, weighted by a gate; one of them is never used."""

    def __init__(self) -> None:
        super().__init__()
        self.gate = nn.Linear(4, 3)
        self.experts = nn.ModuleList(nn.Linear(4, 4) for _ in range(4))

    def forward(self, x: Tensor) -> Tensor:
        weights = self.gate(x).softmax(-1)
        return sum(expert(x) * weights[:, n : n + 1] for n, expert in enumerate(list(self.experts)[:3]))  # pyright: ignore


def siamese(model: nn.Module, batch: Any) -> Tensor:
    return (model(batch[0]) - model(batch[1])).square().sum(1)


def triplets(model: nn.Module, batch: Any) -> Tensor:
    return F.triplet_margin_loss(*(model(part) for part in batch), margin=3.0, reduction="none")


def structured(model: nn.Module, batch: Any) -> Tensor:
    found = model(inputs=batch["inputs"], scale=0.5, flag=True)
    return F.cross_entropy(found.scores, batch["labels"], reduction="none") + found.extra["hidden"][0].square().sum(1)


def both_heads(model: nn.Module, x: Tensor) -> Tensor:
    scores, value = model(x)
    return scores.square().sum(1) + (value[:, 0] - 1).abs()


def one_head(model: nn.Module, x: Tensor) -> Tensor:
    return model(x)[1][:, 0]


def unrolled(model: nn.Module, x: Tensor) -> Tensor:
    return model(x, times=3).sum(1) + model(x, times=2).square().sum(1) + model(x[:, [1, 0, 3, 2]]).sum(1)


def stacked(model: nn.Module, x: Tensor) -> Tensor:
    """The example and a disturbed copy of it, one after the other."""
    return F.kl_div(model(x).log_softmax(-1), model(x + 0.1).softmax(-1), reduction="none").sum(1)


def part_of_the_outputs(model: nn.Module, x: Tensor) -> Tensor:
    return model(x)[:, 0] * 2 + model(x).detach().sum(1)


def direction(model: nn.Module, x: Tensor) -> Tensor:
    out = model(x)
    return (out * torch.arange(out.shape[1])).sum(1)


def tensors(*shapes: tuple[int, ...]) -> Callable[[], Any]:
    return lambda: tuple(torch.randn(SIZE, *shape) for shape in shapes)


def nested() -> Any:
    inputs = {"ids": torch.randint(0, 9, (SIZE, 3)), "nested": [{"x": torch.randn(SIZE, 4)}], "name": "a batch"}
    return {"inputs": inputs, "labels": torch.arange(SIZE) % 3}


def matrix() -> Tensor:
    return torch.randn(SIZE, 4)


CALLS: dict[str, tuple[Callable[[], nn.Module], Callable[[], Any], LossFn]] = {
    "siamese": (Tower, tensors((4,), (4,)), siamese),
    "triplets": (Tower, tensors((4,), (4,), (4,)), triplets),
    "nested batches and outputs": (Structured, nested, structured),
    "two heads": (TwoHeads, matrix, both_heads),
    "one of two heads": (TwoHeads, matrix, one_head),
    "other numbers of uses in each call": (Unrolled, matrix, unrolled),
    "two views": (Tower, matrix, stacked),
    "a part of the outputs": (Tower, matrix, part_of_the_outputs),
    "experts": (Sparse, matrix, direction),
    "no gradient for one example": (
        Tower,
        matrix,
        lambda model, x: model(x)[:, 0] * (x[:, 0] > 0),
    ),
}


@pytest.mark.parametrize("attach", [True, False], ids=["attached", "around the loss"])
@pytest.mark.parametrize("keep_bytes", [None, 0])
@pytest.mark.parametrize("call", CALLS.values(), ids=CALLS.keys())
def test_calls_of_every_kind(
    call: tuple[Callable[[], nn.Module], Callable[[], Any], LossFn], keep_bytes: int | None, attach: bool
) -> None:
    build, draw, loss_fn = call
    torch.manual_seed(0)
    model, batch = build(), draw()
    found, losses = recorded(model, loss_fn, batch, SIZE, keep_bytes=keep_bytes, attach=attach)
    assert_like_loop(found, losses, one_by_one(model, loss_fn, batch, SIZE))


@pytest.mark.parametrize("attach", [True, False], ids=["attached", "around the loss"])
def test_batches_of_every_size_through_one_model(attach: bool) -> None:
    torch.manual_seed(0)
    model = Tower()
    for size in (7, 1, 0, 64, 130, 3):
        x = torch.randn(size, 4)
        found, losses = recorded(model, direction, x, size, attach=attach)
        truth = one_by_one(model, direction, x, size)
        if size:
            assert_like_loop(found, losses, truth)
        else:
            assert found.size == 0
            assert all(not norm.numel() for norm in found.sq_norms().values())


def test_a_frozen_layer_between_trained_ones_passes_gradients_on() -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(4, 5), nn.Linear(5, 5), nn.LayerNorm(5), nn.Linear(5, 3))
    for layer in (model[1], model[2]):
        layer.requires_grad_(False)
    x = torch.randn(SIZE, 4)
    found, losses = recorded(model, direction, x, SIZE, attach=True)
    assert set(found.sq_norms()) == {"0.weight", "0.bias", "3.weight", "3.bias"}
    assert_like_loop(found, losses, one_by_one(model, direction, x, SIZE))


def test_parts_of_a_model_called_by_hand_while_it_is_not_attached() -> None:
    """The capture around the loop sees every call, of whichever module."""
    torch.manual_seed(0)
    model = TwoHeads()

    def by_parts(model: Any, x: Tensor) -> Tensor:
        return model.heads[1](torch.tanh(model.trunk(x)))[:, 0] + model.trunk.weight.square().sum()

    x = torch.randn(SIZE, 4)

    def loss_fn(model: Any, x: Tensor) -> Tensor:
        return by_parts(model, x) * torch.ones(len(x))

    found, losses = recorded(model, loss_fn, x, SIZE)
    assert_like_loop(found, losses, one_by_one(model, loss_fn, x, SIZE))


def test_evaluation_between_forward_and_backward_disturbs_nothing() -> None:
    torch.manual_seed(0)
    model, x = Tower(), torch.randn(SIZE, 4)
    truth = one_by_one(model, direction, x, SIZE)
    capture = Capture(trainable(model))
    capture.attach(model)
    capture.begin(SIZE)
    losses = direction(model, x)
    with torch.no_grad():
        model(torch.randn(50, 4))
    capture.backward(losses)
    model.eval()
    with torch.inference_mode():
        model(torch.randn(9, 4))
    assert_like_loop(capture.collect(SIZE), losses.detach(), truth)


def test_a_part_of_a_batch_is_a_batch() -> None:
    torch.manual_seed(0)
    model, batch = Structured(), nested()
    whole, _ = recorded(model, structured, batch, SIZE)
    for rows in (slice(0, 2), slice(2, 6)):
        part = take(batch, rows)
        found, _ = recorded(model, structured, part, rows.stop - rows.start)
        for name, norm in found.sq_norms().items():
            torch.testing.assert_close(norm, whole.sq_norms()[name][rows], rtol=1e-5, atol=1e-12)
