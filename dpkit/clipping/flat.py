"""Flat clipping: one norm over all parameters, one bound.

Guarantee: each unit's clipped gradient g·min(1, C/‖g‖) has L2 norm at most C over all parameters together.
Source: Abadi et al. 2016, "Deep Learning with Differential Privacy", Algorithm 1, https://arxiv.org/abs/1607.00133.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from dpkit.errors import InvalidArgument
from dpkit.types import Named, Query

_SMALLEST_FACTOR = 2.0**-100


@dataclass(frozen=True)
class Flat:
    """Clip the whole gradient of a unit to ``max_grad_norm``.

    Args:
      max_grad_norm: clipping norm C > 0, in gradient units.
    Raises:
      InvalidArgument: when C is not a positive finite number.
    """

    max_grad_norm: float

    def __post_init__(self) -> None:
        value = self.max_grad_norm
        is_number = isinstance(value, (int, float)) and not isinstance(value, bool)
        if not (is_number and math.isfinite(value) and value > 0):
            raise InvalidArgument(
                f"max_grad_norm is {value!r}; it must be a positive finite number, because the noise is "
                "scaled to it. A usual start is 1.0."
            )

    def groups(self, names: Iterable[str]) -> list[int]:
        return [0 for _ in names]

    def init(self, groups: Sequence[int]) -> tuple[()]:
        return ()

    def bounds(self, state: tuple[()]) -> list[float]:
        return [self.max_grad_norm]

    def factors(self, norms: Tensor, units: Tensor | None, state: tuple[()]) -> Tensor:
        # C/norm is inf for a zero gradient, hence the clamp; where() and not a product, because 0·inf is NaN. A factor
        # near the smallest float32 would be rounded by more than the sensitivity allows for, and 0 is within the bound.
        factors = (self.max_grad_norm / norms).clamp(max=1.0)
        return torch.where(norms.isfinite() & (factors > _SMALLEST_FACTOR), factors, 0.0)

    def queries(self, norms: Tensor, units: Tensor | None, state: tuple[()]) -> list[Query]:
        return []

    def update(self, state: tuple[()], released: Sequence[Named]) -> tuple[()]:
        return state
