"""The oracle of a rule: one backward pass for each example, with the same random numbers where it draws some."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from dpkit.gradients import ghost, trainable

TOLERANCE = {torch.float64: 1e-10, torch.float32: 1e-5, torch.bfloat16: 5e-2}

Loss = Callable[[nn.Module, tuple[Tensor, ...]], Tensor]


def energy(model: nn.Module, batch: tuple[Tensor, ...]) -> Tensor:
    """One number for each example, of everything that the model returns, each entry with a weight of its own."""
    outputs = model(*batch)
    total: Any = 0
    for number, output in enumerate(outputs if isinstance(outputs, tuple) else (outputs,)):
        flat = output.flatten(1)
        ramp = torch.linspace(0.5, 1.5 + number, flat.shape[1], dtype=flat.dtype)
        total = total + (flat.sin() * ramp).sum(1) + flat.square().sum(1)
    return total


def cast(batch: tuple[Tensor, ...], dtype: torch.dtype) -> tuple[Tensor, ...]:
    return tuple(part.to(dtype) if part.is_floating_point() else part for part in batch)


def observe(model: nn.Module, batch: tuple[Tensor, ...], loss: Loss = energy) -> None:
    """Let the capture find where the examples are, by replacing each of them in turn by one of the others."""
    size, versions = len(batch[0]), [batch]
    for b in range(size):
        rows = torch.arange(size)
        rows[b] = (b + 1) % size
        versions.append(tuple(part[rows] for part in batch))
    ghost.observe(model, loss, versions, range(size), size)


def check_each(
    model: nn.Module, batch: tuple[Tensor, ...], dtype: torch.dtype, loss: Loss = energy, *, observed: bool = False
) -> None:
    """Losses are the model's own, and each example's gradient is that of a backward pass over it alone."""
    model, batch, size = model.to(dtype), cast(batch, dtype), len(batch[0])
    parameters = trainable(model)
    expected: dict[str, list[Tensor]] = {name: [] for name in parameters}
    for b in range(size):
        alone = loss(model, tuple(part[b : b + 1] for part in batch))[0]
        gradients = torch.autograd.grad(alone, list(parameters.values()), allow_unused=True)
        for (name, parameter), gradient in zip(parameters.items(), gradients, strict=True):
            expected[name].append(torch.zeros_like(parameter) if gradient is None else gradient)
    with torch.no_grad():
        plain = loss(model, batch)
    if observed:
        observe(model, batch, loss)
    found, losses = ghost.per_sample(model, loss, batch, size)
    tolerance = TOLERANCE[dtype]
    torch.testing.assert_close(losses, plain, rtol=tolerance, atol=tolerance)
    norms = found.sq_norms()
    unit = torch.eye(size)
    each = [dict(found.weighted_sum(dict.fromkeys(parameters, row))) for row in unit]
    for name in parameters:
        rows = torch.stack(expected[name]).double()
        largest = float(rows.flatten(1).norm(dim=1).max())
        assert largest > 0, f"{name} is not used"
        errors = (torch.stack([gradients[name] for gradients in each]).double() - rows).flatten(1).norm(dim=1)
        assert float(errors.max()) <= tolerance * largest, (name, float(errors.max()) / largest)
        # Norms are upper bounds: those of tables are raised by 2^-30.
        slack = max(tolerance, 1e-9)
        expected_norms = rows.flatten(1).norm(dim=1)
        torch.testing.assert_close(norms[name].double().sqrt(), expected_norms, rtol=slack, atol=slack * largest)


def check_seeded(model: nn.Module, batch: tuple[Tensor, ...], loss: Loss = energy) -> None:
    """With random numbers drawn in the forward pass: weighted sums are autograd's own, from the same seed."""
    dtype = torch.float64
    model, batch, size = model.to(dtype), cast(batch, dtype), len(batch[0])
    parameters = trainable(model)
    torch.manual_seed(5)
    found, losses = ghost.per_sample(model, loss, batch, size)
    torch.manual_seed(5)
    plain = loss(model, batch)
    torch.testing.assert_close(losses, plain.detach(), rtol=1e-10, atol=1e-10)
    for weights in torch.eye(size, dtype=dtype):
        gradients = torch.autograd.grad(plain, list(parameters.values()), weights, retain_graph=True, allow_unused=True)
        sums = dict(found.weighted_sum(dict.fromkeys(parameters, weights)))
        for (name, parameter), gradient in zip(parameters.items(), gradients, strict=True):
            expected = torch.zeros_like(parameter) if gradient is None else gradient
            error = float((sums[name] - expected).norm())
            assert error <= 1e-10 * max(1.0, float(expected.norm())), (name, error)
