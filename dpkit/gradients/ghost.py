"""The default backend: one forward pass, one backward pass, and what the operations left behind (``capture.py``).

``loss_fn`` may do anything with the model as long as example b alone decides loss b; each operation that receives a
trainable parameter needs a rule, and has the batch as the leading axis of its input.
"""

from __future__ import annotations

from typing import Any
from weakref import WeakKeyDictionary

import torch
from torch import Tensor, nn

from dpkit.gradients.backend import LossFn, check_losses, trainable
from dpkit.gradients.capture import Capture
from dpkit.gradients.factors import PerSampleGradients, Workspace

# Memory alone lives from call to call, as long as the model does.
_WORKSPACES: WeakKeyDictionary[nn.Module, Workspace] = WeakKeyDictionary()


def per_sample(model: nn.Module, loss_fn: LossFn, batch: Any, size: int) -> tuple[PerSampleGradients, Tensor]:
    """The gradients of each of ``size`` losses ``loss_fn(model, batch)``, and the detached (size,) losses.

    Raises:
      UnsupportedOperation: an operation on a trainable parameter has no rule, or its leading axis is not the batch.
      LossShape: the losses are not one differentiable number per unit.
    """
    capture = Capture(trainable(model), workspace=_WORKSPACES.setdefault(model, Workspace()))
    with torch.enable_grad(), capture:
        losses = loss_fn(model, batch)
        check_losses(losses, size)
    capture.backward(losses)
    return capture.collect(size), losses.detach()
