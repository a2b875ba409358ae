"""The second backend: ``torch.func.vmap`` of the whole loss, one example at a time as far as the model can tell.

It knows no operations, so it covers what ``ghost`` refuses, and it serves as an oracle; it keeps B gradients of every
parameter.  A model that draws random numbers (dropout) draws new ones for each example.  Models that read values of
their activations in Python (``.item()``, ``if x.sum() > 0``) or change buffers cannot be mapped, and torch says so.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.func import functional_call, grad_and_value
from torch.utils import _pytree as pytree

from dpkit import errors
from dpkit.gradients.arithmetic import accumulation_dtype
from dpkit.gradients.backend import LossFn, check_losses, trainable
from dpkit.gradients.forms import Form, PerSampleGradients, kept

CHUNK = 64
"""Examples that are mapped at a time."""


def per_sample(model: nn.Module, loss_fn: LossFn, batch: Any, size: int) -> tuple[PerSampleGradients, Tensor]:
    """The gradients of each of ``size`` losses ``loss_fn(model, batch)``, and the detached (size,) losses.

    Every tensor in ``batch`` (nested lists, tuples and dicts) has the examples along its first axis; ``loss_fn`` sees
    batches of one.

    Raises:
      InvalidArgument: a tensor of the batch has another leading axis.
      LossShape: the loss of a batch of one is not of shape (1,).
    """
    parameters = trainable(model)
    shapes = {name: parameter.shape for name, parameter in parameters.items()}
    leaves, structure = pytree.tree_flatten(batch)
    for leaf in leaves:
        if isinstance(leaf, Tensor) and (leaf.dim() == 0 or leaf.shape[0] != size):
            raise errors.InvalidArgument(
                f"a tensor of shape {tuple(leaf.shape)} in a batch of {size} examples: every tensor of the batch needs "
                f"the examples along its first axis; pass constants as attributes of the model, or as Python numbers"
            )
    frame = _Loss(model, loss_fn)

    def loss_of_one(weights: dict[str, Tensor], example: list[Any]) -> Tensor:
        one = [leaf.unsqueeze(0) if isinstance(leaf, Tensor) else leaf for leaf in example]
        losses = functional_call(frame, weights, (pytree.tree_unflatten(one, structure),))
        check_losses(losses, 1)
        return losses[0]

    weights = {f"model.{name}": parameter.detach() for name, parameter in parameters.items()}
    if size == 0:
        dtypes = {name: accumulation_dtype(parameter.dtype) for name, parameter in parameters.items()}
        empty: dict[str, Form] = {
            name: kept(p.new_zeros(0, *p.shape, dtype=dtypes[name])) for name, p in parameters.items()
        }
        anyone = next(iter(parameters.values()), torch.empty(0))
        return PerSampleGradients(0, empty, shapes), anyone.new_zeros(0).detach()
    axes = [0 if isinstance(leaf, Tensor) else None for leaf in leaves]
    mapped = torch.func.vmap(
        grad_and_value(loss_of_one), in_dims=(None, axes), randomness="different", chunk_size=CHUNK
    )
    gradients, losses = mapped(weights, leaves)
    forms: dict[str, Form] = {}
    for name, parameter in parameters.items():
        # Popped, so that at most one parameter's gradients exist twice when they are widened.
        forms[name] = kept(gradients.pop(f"model.{name}").detach().to(accumulation_dtype(parameter.dtype)))
    return PerSampleGradients(size, forms, shapes), losses.detach()


class _Loss(nn.Module):
    """The loss as a module, so that ``functional_call`` can put weights into the model inside it."""

    def __init__(self, model: nn.Module, loss_fn: LossFn) -> None:
        super().__init__()
        self.model = model
        self.loss_fn = loss_fn

    def forward(self, batch: Any) -> Tensor:
        return self.loss_fn(self.model, batch)
