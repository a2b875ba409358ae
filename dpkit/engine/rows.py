"""Do the losses of the loop belong to the rows of the model's outputs?

The neighbour probe sees the model and not the loop. A loss that compares examples, a second batch that went through the
model beside the private one, a number for the whole batch that a module left in an attribute: each makes one output's
gradient a sum over several losses. :func:`refuse_shared_outputs` looks at the part of the graph between outputs and
losses: with random weights r, the gradient of sum_j r_j loss_j with respect to the outputs must be, row by row, r_j
times that of sum_j loss_j. That is so for every value of the data if each loss comes from one row, and for almost none
otherwise, so the answer depends on how the loop is written and not on whom it was given.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator

import torch
from torch import Tensor, nn

from dpkit.errors import CrossExample
from dpkit.gradients import is_derived

_TOLERANCE = {torch.float64: 1e-6, torch.float32: 1e-3}
_LOW_PRECISION_TOLERANCE = 0.1


def left_behind(model: nn.Module) -> Iterator[Tensor]:
    """Tensors with a gradient that modules keep in attributes or in lists, tuples and dicts there."""
    for module in model.modules():
        for value in vars(module).values():
            if isinstance(value, (Tensor, list, tuple)) or type(value) is dict:
                yield from _computed(value)


def refuse_shared_outputs(losses: Tensor, outputs: Iterable[Tensor]) -> None:
    """Refuse losses of which two depend on one row of an output, or all on one number.

    Args:
      losses: (R,), one for each row.
      outputs: what the model returned or left behind, with gradients.
    Raises:
      CrossExample: naming the output's shape.
    """
    unique = list({id(output): output for output in outputs}.values())
    if not unique or len(losses) < 2:
        return
    weights = torch.empty_like(losses).uniform_(1.0, 2.0, generator=_generator(losses.device))
    plain = torch.autograd.grad(losses, unique, torch.ones_like(losses), retain_graph=True, allow_unused=True)
    mixed = torch.autograd.grad(losses, unique, weights, retain_graph=True, allow_unused=True)
    for output, one, other in zip(unique, plain, mixed, strict=True):
        if one is None or other is None or not bool(one.any()) or not bool(one.isfinite().all()):
            continue
        if not any(_is_row_by_row(one, other, scale) for scale in _scales(weights, one)):
            raise CrossExample(
                f"an output of the model of shape {tuple(output.shape)} enters the losses of several rows: the loop "
                "compares examples, takes a mean before engine.backward, sends other data through the model beside the "
                "batch, or adds a number that a module computed from the whole batch. Each loss must come from the "
                "outputs of its own row; use copy.deepcopy(model) for other data."
            )


def _computed(value: object) -> Iterator[Tensor]:
    if isinstance(value, Tensor):
        if value.grad_fn is not None and value.is_floating_point() and not is_derived(value):
            yield value
    elif isinstance(value, (list, tuple)):
        for part in value:
            yield from _computed(part)
    elif type(value) is dict:
        yield from _computed(list(value.values()))


def _scales(weights: Tensor, gradient: Tensor) -> Iterator[Tensor]:
    """The weights along each axis that may hold the rows: one each, or several of one row, by row or alternating."""
    rows = len(weights)
    for axis, length in enumerate(gradient.shape):
        if length and length % rows == 0:
            shape = [1] * axis + [length] + [1] * (gradient.dim() - axis - 1)
            yield weights.repeat_interleave(length // rows).view(shape)
            yield weights.repeat(length // rows).view(shape)


def _is_row_by_row(one: Tensor, other: Tensor, scale: Tensor) -> bool:
    tolerance = _TOLERANCE.get(one.dtype, _LOW_PRECISION_TOLERANCE)
    return bool((other - one * scale).abs().max() <= tolerance * one.abs().max() + 1e-30)


def _generator(device: torch.device) -> torch.Generator:
    generator = torch.Generator(device)
    generator.manual_seed(0)
    return generator
