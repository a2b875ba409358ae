"""Every refusal names the operation, the parameter and the way out, and comes before anything is recorded."""

from __future__ import annotations

import re
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from dpkit import errors
from dpkit.gradients import Capture, ghost, trainable, vmap

GENERAL = r"backend=dpkit\.vmap.*requires_grad_\(False\)"


class Uses(nn.Module):
    """A model with the parameters w (4, 4), v (4,), and a forward pass from the table below."""

    def __init__(self, use: Callable[[Any, Tensor], Tensor]) -> None:
        super().__init__()
        self.inner = nn.Module()
        self.inner.w = nn.Parameter(torch.randn(4, 4))
        self.inner.v = nn.Parameter(torch.randn(4))
        self.outsider = torch.randn(4, 4, requires_grad=True)
        self.register_buffer("buffer", torch.randn(4))
        self.use = use

    def forward(self, x: Tensor) -> Tensor:
        return self.use(self, x)


def scatter(m: Any, x: Tensor) -> Tensor:
    x = x.clone()
    x[0] = m.inner.v
    return x


def copied(m: Any, x: Tensor) -> Tensor:
    return torch.zeros(4).copy_(m.inner.v) + x


def rows(m: Any, x: Tensor) -> Tensor:
    return sum((x * row for row in m.inner.w), x)


USES: dict[str, tuple[Callable[[Any, Tensor], Tensor], str, str, str]] = {
    "derived by transposition": (lambda m, x: x @ m.inner.w.t(), "t", "inner.w", GENERAL),
    "derived by a property": (lambda m, x: x @ m.inner.w.T, "T.__get__", "inner.w", GENERAL),
    "derived by indexing": (lambda m, x: x * m.inner.w[0], "__getitem__", "inner.w", GENERAL),
    "derived by a function": (lambda m, x: x * torch.exp(m.inner.v), "exp", "inner.v", GENERAL),
    "derived by concatenation": (lambda m, x: x * torch.cat([m.inner.v, m.inner.v])[:4], "cat", "inner.v", GENERAL),
    "derived from two": (lambda m, x: x @ (m.inner.w * m.inner.v), "mul", "inner.w', 'inner.v", GENERAL),
    "derived with a number": (lambda m, x: x * (1 + m.inner.v), "add", "inner.v", GENERAL),
    "iterated over": (rows, "unbind", "inner.w", GENERAL),
    "written into the batch": (scatter, "__setitem__", "inner.v", GENERAL),
    "copied into a buffer": (copied, "copy_", "inner.v", GENERAL),
    "no rule": (lambda m, x: torch.einsum("bi,ij->bj", x, m.inner.w), "einsum", "inner.w", GENERAL),
    "from the left": (lambda m, x: m.inner.w @ x.mT, "matmul", "inner.w", GENERAL),
    "batched weights": (lambda m, x: torch.matmul(x, x.mT @ x + m.inner.w), "add", "inner.w", "leading axis"),
    "parameter as the input": (lambda m, x: F.linear(m.inner.w, m.inner.w) + x, "linear", "inner.w", GENERAL),
    "no batch axis": (lambda m, x: F.linear(x[0], m.inner.w) + x, "linear", "inner.w", "along the first axis"),
    "no batch axis to norm": (
        lambda m, x: F.layer_norm(x[0], (4,), m.inner.v) + x,
        "layer_norm",
        "inner.v",
        "along the first axis",
    ),
    "a row for each example": (lambda m, x: x[:4] * m.inner.w, "mul", "inner.w", "leading axis"),
    "meets no batch": (lambda m, x: x * (m.buffer * m.inner.v), "mul", "inner.v", "leading axis"),
    "overwritten": (lambda m, x: m.inner.v.add_(x.sum(0)) + x, "add_", "inner.v", "new tensor"),
    "foreign weight": (
        lambda m, x: F.linear(x, m.outsider, m.inner.v),
        "linear",
        "inner.v",
        GENERAL,
    ),
    "scaled product": (
        lambda m, x: torch.addmm(m.inner.v, x, m.inner.w, alpha=2),
        "addmm",
        "inner.v', 'inner.w",
        r"bias \+ x @ weight",
    ),
    "batch normalization": (
        lambda m, x: F.batch_norm(x, None, None, m.inner.v, training=True),
        "batch_norm",
        "inner.v",
        "group normalization",
    ),
    "lookup that renormalizes": (
        lambda m, x: F.embedding(torch.zeros(len(x), dtype=torch.long), m.inner.w, max_norm=1.0),
        "embedding",
        "inner.w",
        "leave max_norm at its default",
    ),
    "lookup scaled by frequency": (
        lambda m, x: F.embedding(torch.zeros(len(x), dtype=torch.long), m.inner.w, scale_grad_by_freq=True),
        "embedding",
        "inner.w",
        "leave scale_grad_by_freq at its default",
    ),
    "sparse lookup": (
        lambda m, x: F.embedding(torch.zeros(len(x), dtype=torch.long), m.inner.w, sparse=True),
        "embedding",
        "inner.w",
        "leave sparse at its default",
    ),
}


@pytest.mark.parametrize("use", USES.values(), ids=USES.keys())
def test_unsupported_uses_are_refused_by_name(use: tuple[Callable[[Any, Tensor], Tensor], str, str, str]) -> None:
    forward, operation, parameter, remedy = use
    model = Uses(forward)
    capture = Capture(trainable(model))
    capture.attach(model)
    with pytest.raises(errors.UnsupportedOperation) as refusal:
        model(torch.randn(5, 4))
    message = str(refusal.value)
    assert operation in message.split(": ", 1)[0], message
    assert f"'{parameter}'" in message, message
    assert re.search(remedy, message), message
    assert not capture.pending


def refused_at_collect(model: nn.Module, x: Tensor, size: int) -> str:
    capture = Capture(trainable(model))
    with capture:
        losses = model(x).flatten(1).sum(1)
    capture.backward(losses)
    with pytest.raises(errors.UnsupportedOperation) as refusal:
        capture.collect(size)
    assert not capture.pending
    return str(refusal.value)


@pytest.mark.parametrize(
    ("model", "x", "operation", "parameter"),
    [
        (nn.Sequential(nn.Flatten(0, 1), nn.Linear(4, 3)), torch.randn(5, 6, 4), "linear", "1.weight"),
        (
            nn.Sequential(nn.Flatten(0, 1), nn.Embedding(9, 3)),
            torch.ones(5, 6, dtype=torch.long),
            "embedding",
            "1.weight",
        ),
        (nn.Sequential(nn.Flatten(0, 1), nn.LayerNorm(4)), torch.randn(5, 6, 4), "layer_norm", "1.weight"),
        (nn.Sequential(nn.Flatten(0, 1), nn.Conv1d(4, 2, 1)), torch.randn(5, 6, 4, 2), "conv1d", "1.weight"),
        (Uses(lambda m, x: x.flatten(0, 1) * m.inner.v), torch.randn(5, 6, 4), "mul", "inner.v"),
    ],
    ids=["linear", "embedding", "layer_norm", "conv1d", "mul"],
)
def test_a_leading_axis_that_is_not_the_batch_is_refused(
    model: nn.Module, x: Tensor, operation: str, parameter: str
) -> None:
    message = refused_at_collect(model, x, 5)
    assert operation in message.split(": ", 1)[0]
    assert f"'{parameter}'" in message
    assert "leading axis of 30 in a batch of 5 examples" in message
    assert "keep the examples along the first axis" in message


def test_attention_is_refused_with_its_parameters() -> None:
    model = nn.MultiheadAttention(4, 2, batch_first=True)
    with pytest.raises(
        errors.UnsupportedOperation,
        match=r"multi_head_attention_forward: parameters 'in_proj_bias'|'in_proj_weight'.*vmap",
    ):
        ghost.per_sample(model, lambda m, x: m(x, x, x)[0].sum((1, 2)), torch.randn(3, 5, 4), 3)


def test_autocast_is_refused() -> None:
    def loss_fn(model: nn.Module, x: Tensor) -> Tensor:
        with torch.autocast("cpu", torch.bfloat16):
            return model(x).sum(1)

    with pytest.raises(
        errors.UnsupportedOperation, match=r"linear: .* parameters 'weight', 'bias'.*autocast.*model.bfloat16\(\)"
    ):
        ghost.per_sample(nn.Linear(4, 3), loss_fn, torch.randn(5, 4), 5)


def test_double_backward_is_refused() -> None:
    model = nn.Linear(4, 3)
    capture = Capture(trainable(model))
    capture.attach(model)
    losses = model(torch.randn(5, 4)).square().sum(1)
    with pytest.raises(
        errors.UnsupportedOperation, match=r"linear: .* parameters 'weight', 'bias'.*create_graph=True.*dpkit.vmap"
    ):
        torch.autograd.grad(losses.sum(), [capture.anchor], create_graph=True, allow_unused=True)
    assert not capture.pending


class Square(torch.autograd.Function):
    """No torch function: the capture's mode does not see it."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, w: Tensor) -> Tensor:
        ctx.save_for_backward(x, w)
        return x * w

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, Tensor]:
        x, w = ctx.saved_tensors
        return gradient * w, (gradient * x).sum(0)


@pytest.mark.parametrize("where", ["in another autograd function", "outside of the model"])
def test_a_use_past_the_capture_is_refused(where: str) -> None:
    model = Uses(
        lambda m, x: Square.apply(F.linear(x, m.inner.w), m.inner.v) if "another" in where else F.linear(x, m.inner.w)
    )
    capture = Capture(trainable(model))
    capture.attach(model)
    losses = model(torch.randn(5, 4)).sum(1)
    if "outside" in where:
        losses = losses + model.inner.v.square().sum()
    with pytest.raises(errors.UnsupportedOperation, match=r"parameter 'inner.v' past the capture.*dpkit.vmap"):
        capture.backward(losses)
    assert not capture.pending
    assert model.inner.v.grad is None


def test_complex_parameters_are_refused() -> None:
    model = nn.Linear(2, 2, dtype=torch.complex64)
    with pytest.raises(errors.UnsupportedOperation, match=r"'weight' is complex.*view_as_real"):
        trainable(model)


@pytest.mark.parametrize("backend", [ghost, vmap], ids=["ghost", "vmap"])
@pytest.mark.parametrize(
    "loss_fn",
    [
        lambda m, x: m(x).sum(),
        lambda m, x: m(x),
        lambda m, x: [m(x).sum(1)],
        lambda m, x: x.sum(1),
    ],
    ids=["a sum", "a matrix", "a list", "no parameter"],
)
def test_a_loss_that_is_not_one_per_example_is_refused(backend: Any, loss_fn: Any) -> None:
    with pytest.raises(errors.LossShape, match=r"one loss per example.*reduction=\"none\"|carry no gradient.*detach"):
        backend.per_sample(nn.Linear(4, 3), loss_fn, torch.randn(5, 4), 5)


def test_vmap_refuses_a_tensor_without_the_examples() -> None:
    with pytest.raises(errors.InvalidArgument, match=r"shape \(2,\) in a batch of 5 examples.*attributes of the model"):
        vmap.per_sample(nn.Linear(4, 3), lambda m, b: m(b[0]).sum(1), (torch.randn(5, 4), torch.ones(2)), 5)
