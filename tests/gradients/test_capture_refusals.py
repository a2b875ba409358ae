"""Every refusal names the operation, the parameter and the way out, and comes before anything is recorded."""

from __future__ import annotations

import re
from collections.abc import Callable
from typing import Any

import pytest
import torch
from gradients.loop import PROBE_ROWS, observe
from torch import Tensor, nn
from torch.nn import functional as F
from torch.overrides import _get_current_function_mode_stack, handle_torch_function, has_torch_function
from torch.utils.checkpoint import checkpoint

from dpkit import errors
from dpkit.gradients import Capture, ghost, trainable, vmap

GENERAL = r"backend=dpkit\.vmap.*requires_grad_\(False\)"


class Uses(nn.Module):
    """A model with the parameters w (4, 4), v (4,), some layers, and a forward pass from the table below."""

    def __init__(self, use: Callable[[Any, Tensor], Tensor]) -> None:
        super().__init__()
        self.inner = nn.Module()
        self.inner.w = nn.Parameter(torch.randn(4, 4))
        self.inner.v = nn.Parameter(torch.randn(4))
        self.layer = nn.Linear(4, 4)
        self.lstm = nn.LSTM(4, 4, batch_first=True)
        self.outsider = torch.randn(4, 4, requires_grad=True)
        self.register_buffer("buffer", torch.randn(4))
        self.use = use

    def forward(self, x: Tensor) -> Tensor:
        return self.use(self, x)


def scatter(m: Any, x: Tensor) -> Tensor:
    x = x.clone()
    x[0] = m.inner.v
    return x


def masked(m: Any, x: Tensor) -> Tensor:
    """A mask token, written where the mask says."""
    x = x.clone()
    x[x[:, 0] > 0] = m.inner.v
    return x


def into_a_derived(m: Any, x: Tensor) -> Tensor:
    scale = m.inner.v.exp()
    scale.add_(x.sum(0))
    return x * scale


def into_a_derived_row(m: Any, x: Tensor) -> Tensor:
    weight = m.inner.w.clone()
    weight[0] = x[0]
    return x @ weight


def noisy(x: Tensor, w: Tensor) -> Tensor:
    """A torch function that draws random numbers."""
    if has_torch_function((x, w)):
        return handle_torch_function(noisy, (x, w), x, w)
    return x * w * torch.rand_like(x)


def packed(m: Any, x: Tensor) -> Tensor:
    lengths = torch.ones(len(x), dtype=torch.long)
    return m.lstm(nn.utils.rnn.pack_padded_sequence(x[:, None], lengths, batch_first=True))[0].data


def ids(x: Tensor) -> Tensor:
    return torch.zeros(len(x), 1, dtype=torch.long)


Use = Callable[[Any, Tensor], Any]

USES: dict[str, tuple[Use, str, str, str]] = {
    "written into the batch": (scatter, "__setitem__", "inner.v", "new tensor"),
    "written where a mask says": (masked, "__setitem__", "inner.v", "new tensor"),
    "no batch axis": (lambda m, x: F.linear(x[0], m.inner.w) + x, "linear", "inner.w", "along the first axis"),
    "no batch axis to norm": (
        lambda m, x: F.layer_norm(x[0], (4,), m.inner.v) + x,
        "layer_norm",
        "inner.v",
        "along the first axis",
    ),
    "overwritten": (lambda m, x: m.inner.v.add_(x.sum(0)) + x, "add_", "inner.v", "new tensor"),
    "overwritten by a copy": (lambda m, x: m.inner.v.copy_(x[0]) + x, "copy_", "inner.v", "new tensor"),
    "what was derived from it overwritten": (into_a_derived, "add_", "inner.v", "new tensor"),
    "a row of what was derived from it overwritten": (into_a_derived_row, "__setitem__", "inner.w", "new tensor"),
    "foreign weight": (
        lambda m, x: F.layer_norm(x, (4,), m.outsider[0], m.inner.v),
        "layer_norm",
        "inner.v",
        "not among the parameters.*" + GENERAL,
    ),
    "joined to the examples": (
        lambda m, x: torch.cat([x, m.inner.w]),
        "cat",
        "inner.w",
        "rows of one batch.*along another axis",
    ),
    "random numbers": (lambda m, x: noisy(x, m.inner.v), "noisy", "inner.v", "draws random numbers.*" + GENERAL),
    "batch normalization": (
        lambda m, x: F.batch_norm(x, None, None, m.inner.v, training=True),
        "batch_norm",
        "inner.v",
        "mixes the examples.*group normalization",
    ),
    "batch normalization without statistics of its own": (
        lambda m, x: F.batch_norm(x, None, None, weight=m.inner.v),
        "batch_norm",
        "inner.v",
        "freeze its statistics",
    ),
    **{
        f"lookup with {option}": (
            lambda m, x, option={option: value}: F.embedding(ids(x), m.inner.w, **option),
            "embedding",
            "inner.w",
            f"{option} .*leave {option} at its default",
        )
        for option, value in (("max_norm", 1.0), ("scale_grad_by_freq", True), ("sparse", True))
    },
    "lookup of constants that renormalizes": (
        lambda m, x: x + F.embedding(torch.arange(4), m.inner.w, max_norm=1.0)[0],
        "embedding",
        "inner.w",
        "leave max_norm at its default",
    ),
    "packed sequences": (packed, "lstm", "lstm.weight_ih_l0", "pad .*mask"),
    "reentrant checkpoint": (
        lambda m, x: checkpoint(m.layer, x.requires_grad_(), use_reentrant=True),
        "linear",
        "layer.weight",
        "use_reentrant=False",
    ),
}


@pytest.mark.parametrize("use", USES.values(), ids=USES.keys())
def test_unsupported_uses_are_refused_by_name(use: tuple[Use, str, str, str]) -> None:
    forward, operation, parameter, remedy = use
    model = Uses(forward)
    capture = Capture(trainable(model))
    capture.attach(model)
    with pytest.raises(errors.UnsupportedOperation) as refusal:
        capture.backward(model(torch.randn(5, 4)).sum(1))
    message = str(refusal.value)
    assert operation in message.split(": ", 1)[0], message
    assert f"'{parameter}'" in message, message
    assert re.search(remedy, message), message
    assert not capture.pending
    assert _get_current_function_mode_stack() == []


def refused_at_collect(model: nn.Module, x: Tensor, size: int) -> str:
    capture = Capture(trainable(model))
    with capture:
        losses = model(capture.batch(x)).flatten(1).sum(1)
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


class Rows(nn.Module):
    """Each example for itself, in a loop."""

    def __init__(self) -> None:
        super().__init__()
        self.v = nn.Parameter(torch.randn(4))

    def forward(self, x: Tensor) -> Tensor:
        return torch.stack([row.dot(self.v) for row in x])[:, None]


@pytest.mark.parametrize(
    ("model", "x", "names"),
    [
        (Rows(), torch.randn(5, 4), r"dot: .*parameter 'v'"),
        (Uses(lambda m, x: torch.sparse.mm(x.to_sparse(), m.inner.w)), torch.randn(5, 4), r"mm: .*parameter 'inner.w'"),
        (
            Uses(lambda m, x: m.layer(torch.nested.as_nested_tensor(list(x[:, None]), layout=torch.jagged)).values()),
            torch.randn(5, 4),
            r"linear: .*parameters 'layer.weight', 'layer.bias'.*nested",
        ),
    ],
    ids=["examples in a loop", "sparse", "jagged"],
)
def test_batches_of_other_kinds_are_refused(model: nn.Module, x: Tensor, names: str) -> None:
    capture = Capture(trainable(model))
    capture.attach(model)
    capture.begin(5)
    with pytest.raises(errors.UnsupportedOperation, match=names):
        capture.backward(model(x).sum(1))
        capture.collect(5)
    assert _get_current_function_mode_stack() == []


def test_examples_that_mixed_before_are_refused() -> None:
    """What was observed is a layout that no rule can work with."""
    model = nn.Sequential(nn.Linear(4, 4), Uses(lambda m, x: F.linear(x - x.mean(0), m.inner.w)))

    def loss_fn(model: nn.Module, x: Tensor) -> Tensor:
        return model(x).square().sum(1)

    observe(model, loss_fn, torch.randn(4, 4))
    with pytest.raises(errors.CrossExample, match=r"linear: .*'1.inner.w'.*examples have mixed before it.*norm"):
        ghost.per_sample(model, loss_fn, torch.randn(5, 4), 5)


def test_rows_that_do_not_divide_among_the_examples_are_refused() -> None:
    """Folded rows whose number depends on the data."""

    class Filled(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layer = nn.Linear(4, 4)

        def forward(self, x: Tensor) -> Tensor:
            rows = x.flatten(0, 1)
            out = self.layer(rows if len(x) == PROBE_ROWS else rows[:-1])
            return out.sum(1)[: len(x), None]

    def loss_fn(model: nn.Module, x: Tensor) -> Tensor:
        return model(x).square().sum(1)

    model = Filled()
    observe(model, loss_fn, torch.randn(PROBE_ROWS, 3, 4))
    with pytest.raises(errors.UnsupportedOperation, match=r"14 rows do not divide.*batch of 5.*public number of rows"):
        ghost.per_sample(model, loss_fn, torch.randn(5, 3, 4), 5)


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


PAST: dict[str, Use] = {
    "in another autograd function": lambda m, x: Square.apply(F.linear(x, m.inner.w), m.inner.v),
    "under vmap": lambda m, x: torch.vmap(lambda row: F.linear(row, m.inner.w) * m.inner.v)(x),
    "written into a view of a constant": lambda m, x: into_a_view(torch.zeros(4), m.inner.v) * F.linear(x, m.inner.w),
    "outside of the model": lambda m, x: F.linear(x, m.inner.w),
}


def into_a_view(constant: Tensor, v: Tensor) -> Tensor:
    constant[0:3].copy_(v[0:3])
    return constant


@pytest.mark.parametrize("where", PAST)
def test_a_use_past_the_capture_is_refused(where: str) -> None:
    model = Uses(PAST[where])
    capture = Capture(trainable(model))
    capture.attach(model)
    losses = model(torch.randn(5, 4)).sum(1)
    if "outside" in where:
        losses = losses + model.inner.v.square().sum()
    with pytest.raises(errors.UnsupportedOperation, match=r"'inner\.v' past the capture.*dpkit.vmap"):
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
