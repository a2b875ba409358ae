"""The default backend: one forward pass, one backward pass, and what the operations left behind (``capture.py``).

``loss_fn`` may do anything with the model as long as example b alone decides loss b.  Where the examples are in the
tensors inside the model is found by :func:`observe`; without it, along the first axis.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any, NamedTuple
from weakref import WeakKeyDictionary

import torch
from torch import Tensor, nn

from dpkit.gradients.backend import LossFn, check_losses, trainable
from dpkit.gradients.capture import Capture
from dpkit.gradients.forms import PerSampleGradients
from dpkit.gradients.layout import Layouts, Site
from dpkit.gradients.strategy import Workspace
from dpkit.gradients.tape import Consumer


class Memory(NamedTuple):
    """What outlives a batch: room for written-out gradients, and where examples were observed. No data."""

    workspace: Workspace
    layouts: Layouts


# It lives as long as the model does.
_MEMORIES: WeakKeyDictionary[nn.Module, Memory] = WeakKeyDictionary()


def memory(model: nn.Module) -> Memory:
    """The memory of a model, made at first use."""
    return _MEMORIES.setdefault(model, Memory(Workspace(), Layouts()))


def per_sample(
    model: nn.Module, loss_fn: LossFn, batch: Any, size: int, *, consumer: Consumer | None = None
) -> tuple[PerSampleGradients, Tensor]:
    """The gradients of each of ``size`` losses ``loss_fn(model, batch)``, and the detached (size,) losses.

    Args:
      batch: all tensors in it (nested lists, tuples and dicts) have the examples along their first axis.
      consumer: takes the gradients of complete groups of parameters inside the backward pass; then none are returned.
    Raises:
      UnsupportedOperation: an operation on a trainable parameter cannot be handled, or its first axis is not the batch.
      LossShape: the losses are not one differentiable number per unit.
    """
    capture = Capture(trainable(model), workspace=memory(model).workspace, layouts=memory(model).layouts)
    capture.begin(size)
    capture.tape.listening = False  # until the pass of the whole batch
    losses = _forward(capture, model, loss_fn, batch, size)
    capture.backward(losses, consumer=consumer)
    return capture.collect(size), losses.detach()


def observe(
    model: nn.Module, loss_fn: LossFn, batches: Iterable[Any], replaced: Sequence[int], size: int
) -> set[torch.dtype]:
    """Learn where the examples are in the tensors inside the model, for all captures of it that share its memory.

    Args:
      batches: a public or synthetic batch of ``size`` examples, and one more for each number in ``replaced``: the same
        batch with other values in that example.
    Returns: the types of the tensors inside the model, where they met parameters.
    """
    runs: list[list[Site]] = []
    for batch in batches:
        capture = Capture(trainable(model))
        capture.watched = []
        _forward(capture, model, loss_fn, batch, size)
        runs.append(capture.watched)
    memory(model).layouts.learn(runs, replaced, size)
    return {tensor.dtype for run in runs for site in run for tensor in site.tensors if tensor is not None}


def _forward(capture: Capture, model: nn.Module, loss_fn: LossFn, batch: Any, size: int) -> Tensor:
    with torch.enable_grad(), capture:
        losses = loss_fn(model, capture.batch(batch))
        check_losses(losses, size)
    return losses
