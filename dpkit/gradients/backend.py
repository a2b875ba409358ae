"""What a gradient backend promises: per-sample gradients of one microbatch, seen only through norms and weighted sums.

A backend is anything with the function ``per_sample`` of :class:`Backend`; the modules ``dpkit.ghost`` and
``dpkit.vmap`` are the two that ship.  Neither knows that clipping, noise or an engine exist.

Guarantee: no norm is below the true one of what is summed, a weighted sum is off by no more than ``arithmetic.py``
says, and a unit that is left out leaves no trace.
Requires: a model and a loss in which example b alone decides about row b; the neighbour probe looks for what does not.
Why: each operation's rule has its own file and its own proof or oracle; ``arithmetic.py`` has the rounding.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any, Protocol

from torch import Tensor, nn

from dpkit import errors
from dpkit.types import Named

LossFn = Callable[[nn.Module, Any], Tensor]
"""``loss_fn(model, batch) -> (B,)``: one loss per example, each a function of that example alone."""


class PerSample(Protocol):
    """The gradients g_1, ..., g_B of one microbatch, one per unit and never averaged.

    For guarantee, requirements and proof see the module.
    """

    @property
    def size(self) -> int:
        """B, the number of units."""
        ...

    def sq_norms(self) -> Named:
        """Name -> (B,) squared L2 norms, never below the true value of what :meth:`weighted_sum` adds up.

        A unit whose gradient is not finite, or too large for float32, has a norm that is not finite.
        """
        ...

    def weighted_sum(self, weights: Named) -> Iterator[tuple[str, Tensor]]:
        """Yield (name, sum over b of ``weights[name][b]`` g_b), shaped like the parameter, in float32 or better."""
        ...

    def select(self, keep: Tensor) -> PerSample:
        """The units where the boolean (B,) ``keep`` is true; the others leave no trace, not even 0 * inf."""
        ...


class Backend(Protocol):
    """How per-sample gradients are computed. For guarantee, requirements and proof see the module."""

    def per_sample(self, model: nn.Module, loss_fn: LossFn, batch: Any, size: int) -> tuple[PerSample, Tensor]:
        """The gradients of ``loss_fn(model, batch)`` for each of ``size`` units, and the detached (B,) losses."""
        ...


def trainable(model: nn.Module) -> dict[str, nn.Parameter]:
    """First name -> parameter, for each distinct parameter that requires a gradient; tied weights appear once.

    Raises:
      UnsupportedOperation: a parameter is complex; its gradient has no norm of the kind that is clipped here.
    """
    found = {name: parameter for name, parameter in model.named_parameters() if parameter.requires_grad}
    for name, parameter in found.items():
        if parameter.is_complex():
            raise errors.UnsupportedOperation(
                f"parameter {name!r} is complex ({parameter.dtype}): per-sample gradients are defined for real "
                "parameters; store it as torch.view_as_real(...), or freeze it with requires_grad_(False)"
            )
    return found


def check_losses(losses: Tensor, size: int) -> None:
    """Refuse a loss that is not one differentiable number per unit.

    Raises:
      LossShape: ``losses`` is not a tensor of shape (``size``,), or carries no gradient.
    """
    if not isinstance(losses, Tensor) or losses.shape != (size,):
        found = tuple(losses.shape) if isinstance(losses, Tensor) else type(losses).__name__
        raise errors.LossShape(
            f"the loss function returned {found} for a batch of {size} examples; it must return one loss per example, "
            f'shape ({size},): use reduction="none" and sum over everything but the first axis'
        )
    if not losses.requires_grad:
        raise errors.LossShape(
            "the losses carry no gradient: no trainable parameter reaches them; look for detach(), no_grad(), or a "
            "model that is frozen throughout"
        )
