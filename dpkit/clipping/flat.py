"""Flat clipping: one norm over all parameters, one bound.

Guarantee: each unit's clipped gradient g·min(1, C/‖g‖) has L2 norm at most C over all parameters together, and is 0
where its norm is not finite.
Requires: a norm that is not below the true one (``rule.py``).
Why: ‖g‖·min(1, C/‖g‖) = min(‖g‖, C), and a norm that is too large only makes the factor smaller.  The rounding of
factors is covered by ``Plan.sensitivities``.
Source: Abadi et al. 2016, "Deep Learning with Differential Privacy", Algorithm 1, https://arxiv.org/abs/1607.00133.
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass

import torch
from torch import Tensor

from dpkit.errors import InvalidArgument

from .rule import ClipRule, Setting

_SMALLEST_FACTOR = 2.0**-100


@dataclass(frozen=True)
class Flat(ClipRule):
    """Clip the whole gradient of a unit to ``max_grad_norm``. For guarantee, requirements and proof see the module.

    Args:
      max_grad_norm: clipping norm C > 0, in gradient units.
    Raises:
      InvalidArgument: when C is not a positive finite number.
    """

    max_grad_norm: float

    def __post_init__(self) -> None:
        check_bound("max_grad_norm", self.max_grad_norm)

    def groups(self, names: Iterable[str]) -> list[int]:
        return [0 for _ in names]

    def init(self, setting: Setting) -> tuple[()]:
        return ()

    def bounds(self, state: tuple[()]) -> list[float]:
        return [self.max_grad_norm]

    def factors(self, norms: Tensor, labels: Tensor | None, state: tuple[()]) -> Tensor:
        return shrink(norms, self.max_grad_norm)


def shrink(norms: Tensor, bound: float | Tensor) -> Tensor:
    """min(1, C/‖g‖), for norms and bounds that broadcast against each other; 0 where the norm is not finite."""
    # C/norm is inf for a zero gradient, hence the clamp.
    return finite_factors((bound / norms).clamp(max=1.0), norms)


def finite_factors(factors: Tensor, norms: Tensor) -> Tensor:
    """``factors``, and 0 where the norm is not finite or the factor too small to be rounded well."""
    # where() and not a product, because 0·inf is NaN. A factor near the smallest float32 would be rounded by more than
    # the sensitivity allows for, and 0 is within the bound.
    return torch.where(norms.isfinite() & (factors > _SMALLEST_FACTOR), factors, 0.0)


def check_bound(name: str, value: float) -> None:
    """Refuse what cannot be a clipping norm.

    Raises:
      InvalidArgument: naming the argument.
    """
    is_number = isinstance(value, (int, float)) and not isinstance(value, bool)
    if not (is_number and math.isfinite(value) and value > 0):
        raise InvalidArgument(
            f"{name} is {value!r}; it must be a positive finite number, because the noise is "
            "scaled to it. A usual start is 1.0."
        )
