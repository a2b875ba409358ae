"""The oracle: a loop of one backward pass for each example, and what it takes to agree with it."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree

from dpkit.gradients import Capture, PerSample, ghost, trainable

LossFn = Callable[[Any, Any], Tensor]

PROBE_ROWS = 4
"""Examples in the batches from which layouts are learnt, as in the engine's probe."""


class Truth(NamedTuple):
    """(B,) losses, and name -> (B, entries) gradients in float64."""

    losses: Tensor
    gradients: dict[str, Tensor]


def one_by_one(model: nn.Module, loss_fn: LossFn, batch: Any, size: int) -> Truth:
    """One forward and one backward pass for each example of a batch (nested lists, tuples, dicts of tensors)."""
    parameters = trainable(model)
    losses: list[Tensor] = []
    found: dict[str, list[Tensor]] = {name: [] for name in parameters}
    for b in range(size):
        loss = loss_fn(model, take(batch, slice(b, b + 1)))[0]
        losses.append(loss.detach())
        gradients = torch.autograd.grad(loss, list(parameters.values()), allow_unused=True)
        for (name, parameter), gradient in zip(parameters.items(), gradients, strict=True):
            found[name].append((torch.zeros_like(parameter) if gradient is None else gradient).double().flatten())
    stacked = {
        name: torch.stack(rows) if rows else torch.zeros(0, parameters[name].numel(), dtype=torch.float64)
        for name, rows in found.items()
    }
    return Truth(torch.stack(losses) if losses else torch.zeros(0), stacked)


def take(batch: Any, rows: slice) -> Any:
    """Some examples of a batch."""
    return pytree.tree_map(lambda leaf: leaf[rows] if isinstance(leaf, Tensor) else leaf, batch)


def recorded(
    model: nn.Module, loss_fn: LossFn, batch: Any, size: int, *, keep_bytes: int | None = None, attach: bool = False
) -> tuple[PerSample, Tensor]:
    """Per-sample gradients and losses from a capture, under a budget, around the loss or attached to the model."""
    capture = Capture(trainable(model), layouts=ghost.memory(model).layouts)
    if attach:
        capture.attach(model)
    capture.begin(size, keep_bytes=keep_bytes)
    if attach:
        losses = loss_fn(model, batch)
    else:
        with capture:
            losses = loss_fn(model, capture.batch(batch))
    capture.backward(losses)
    found = capture.collect(size)
    if attach:
        capture.detach()
    assert all(parameter.grad is None for parameter in model.parameters()), "a raw gradient reached p.grad"
    return found, losses.detach()


def neighbours(batch: Any, rows: Sequence[int] = (0, 2)) -> Iterator[Any]:
    """A batch, and once more for each of ``rows`` with other values in that example; whole numbers stay in range."""

    def replaced(leaf: Any, row: int) -> Any:
        if not isinstance(leaf, Tensor):
            return leaf
        leaf = leaf.clone()
        if leaf.is_floating_point():
            leaf[row] = 1 - 3 * leaf[row]
        elif leaf.dtype != torch.bool:
            leaf[row] = leaf[row].flip(0) if leaf.dim() > 1 else leaf[row]
            leaf[row] = torch.where(leaf[row] > 0, leaf[row] - 1, leaf[row] + 1)
        return leaf

    yield batch
    for row in rows:
        yield pytree.tree_map(lambda leaf, row=row: replaced(leaf, row), batch)


def observe(model: nn.Module, loss_fn: LossFn, batch: Any, size: int = PROBE_ROWS) -> None:
    """Let the backend see where the examples of a batch of ``size`` are in the tensors inside the model."""
    ghost.observe(model, loss_fn, neighbours(batch), (0, 2), size)


def assert_like_loop(found: PerSample, losses: Tensor, truth: Truth, tolerance: float = 1e-5) -> None:
    """Losses, norms and clipped sums are those of the loop, and no norm is below what is summed.

    Norms are compared relative to the largest of the parameter's, with a floor of rounding errors for parameters whose
    gradients are zero but for those (the bias of the keys in attention).
    """
    torch.testing.assert_close(losses.double(), truth.losses.double(), rtol=tolerance, atol=tolerance)
    norms = found.sq_norms()
    assert norms.keys() == truth.gradients.keys()
    lengths = {name: rows.norm(dim=1) for name, rows in truth.gradients.items()}
    total = torch.stack([length.square() for length in lengths.values()]).sum(0).sqrt()
    noise = tolerance / 50 * float(total.max())
    for name, length in lengths.items():
        error = (norms[name].double().sqrt() - length).abs().max()
        assert error <= tolerance * float(length.max()) + noise, (name, float(error), float(length.max()))
    # Flat clipping at the median: some examples are clipped and some are not.
    reached = torch.stack([norm.double() for norm in norms.values()]).sum(0).sqrt()
    factors = (reached.median() / (reached + 1e-30)).clamp(max=1)
    for name, value in found.weighted_sum(dict.fromkeys(norms, factors)):
        error = (value.double().flatten() - factors @ truth.gradients[name]).norm()
        assert error <= tolerance * float(factors @ lengths[name]) + len(factors) * noise, (name, float(error))
    assert_norms_bound_the_sums(found)


def assert_norms_bound_the_sums(found: PerSample, units: int = 3, slack: float = 1e-6) -> None:
    """The norm of a unit is never below the norm of what the unit alone adds to the sum."""
    norms = found.sq_norms()
    for b in range(min(found.size, units)):
        alone = torch.zeros(found.size, dtype=torch.float64)
        alone[b] = 1
        for name, value in found.weighted_sum(dict.fromkeys(norms, alone)):
            length, bound = float(value.double().norm()), float(norms[name][b].sqrt())
            assert length <= bound * (1 + slack), (name, b, length, bound)
