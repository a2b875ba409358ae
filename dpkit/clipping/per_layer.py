"""Per-layer clipping: each layer of the model has a bound of its own.

Guarantee: each unit's gradient of layer k, g_k·min(1, C_k/‖g_k‖), has L2 norm at most C_k, so the whole clipped
gradient has norm at most √(Σ_k C_k²).  A layer's factor needs that layer's norm alone, so the backward pass can clip a
layer and forget its gradients before it comes to the next one: memory is that of training without privacy and one layer
more.
Source: He et al. 2023, "Exploring the Limits of Differentially Private Deep Learning with Group-wise Clipping",
https://arxiv.org/abs/2212.01539.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from torch import Tensor

from dpkit.errors import InvalidArgument
from dpkit.types import Named, Query

from .flat import Flat

Thresholds = tuple[float, ...]


@dataclass(frozen=True)
class PerLayer:
    """Clip the gradient of each layer separately; a layer is the module that owns the parameters.

    Args:
      max_grad_norm: the bound C of the whole gradient, of which each of K layers gets C/√K; or one bound C_k for each
        layer, in the order in which their first parameters stand in the model.
    Raises:
      InvalidArgument: a bound is not a positive finite number.
    """

    max_grad_norm: float | Thresholds

    def __post_init__(self) -> None:
        for bound in self.max_grad_norm if isinstance(self.max_grad_norm, tuple) else (self.max_grad_norm,):
            Flat(bound)

    def groups(self, names: Iterable[str]) -> list[int]:
        numbers: dict[str, int] = {}
        return [numbers.setdefault(name.rpartition(".")[0], len(numbers)) for name in names]

    def init(self, groups: Sequence[int]) -> Thresholds:
        layers = max(groups, default=-1) + 1
        if not isinstance(self.max_grad_norm, tuple):
            return (self.max_grad_norm / math.sqrt(max(1, layers)),) * layers
        if len(self.max_grad_norm) != layers:
            raise InvalidArgument(
                f"max_grad_norm has {len(self.max_grad_norm)} bounds, and the model has {layers} layers with trainable "
                "parameters; give one bound for each, or one number for all."
            )
        return self.max_grad_norm

    def bounds(self, state: Thresholds) -> list[float]:
        return list(state)

    def group_factor(self, group: int, norms: Tensor, state: Thresholds) -> Tensor:
        return Flat(state[group]).factors(norms, None, ())

    def factors(self, norms: Tensor, units: Tensor | None, state: Thresholds) -> Tensor:
        factors = norms.new_empty(norms.shape)
        for group, row in enumerate(norms):
            factors[group] = self.group_factor(group, row, state)
        return factors

    def queries(self, norms: Tensor, units: Tensor | None, state: Thresholds) -> list[Query]:
        return []

    def update(self, state: Thresholds, released: Sequence[Named]) -> Thresholds:
        return state
