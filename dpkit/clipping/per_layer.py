"""Per-layer clipping: each layer of the model has a bound of its own.

Guarantee: each unit's gradient of layer k, g_k·min(1, C_k/‖g_k‖), has L2 norm at most C_k, so the whole clipped
gradient has norm at most √(Σ_k C_k²).
Requires: norms of each layer that are not below the true ones (``rule.py``).
Why: each layer is clipped as in ``flat.py``, and squared norms of the layers add up.

A layer's factor needs that layer's norm alone, so the backward pass can clip a layer and forget its gradients before it
comes to the next one: memory is that of training without privacy and one layer more.
Source: He et al. 2023, "Exploring the Limits of Differentially Private Deep Learning with Group-wise Clipping",
https://arxiv.org/abs/2212.01539.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from dpkit.errors import InvalidArgument

from .flat import check_bound, shrink
from .noise_split import BoundSplit, NoiseSplit, as_bound_split, as_noise_split
from .rule import SeparableRule, Setting


class Layers(NamedTuple):
    """Clipping norms C_k and noise weights γ_k of the layers."""

    bounds: tuple[float, ...]
    spread: tuple[float, ...]


@dataclass(frozen=True)
class PerLayer(SeparableRule):
    """Clip the gradient of each layer separately; a layer is the module that owns the parameters.

    For guarantee, requirements and proof see the module.

    Args:
      max_grad_norm: the bound C of the whole gradient, split among the K layers; or one bound C_k for each layer, in
        the order in which their first parameters stand in the model.
      bound_split: how C is split: C/√K for each layer, or by the number of its parameters.
      noise_split: which layers get how much of the noise.
    Raises:
      InvalidArgument: a bound is not a positive finite number, or a split is unknown.
    """

    max_grad_norm: float | tuple[float, ...]
    bound_split: BoundSplit = BoundSplit.UNIFORM
    noise_split: NoiseSplit = NoiseSplit.DIMENSION_OPTIMAL

    def __post_init__(self) -> None:
        if isinstance(self.max_grad_norm, list):
            object.__setattr__(self, "max_grad_norm", tuple(self.max_grad_norm))
        for bound in self.max_grad_norm if isinstance(self.max_grad_norm, tuple) else (self.max_grad_norm,):
            check_bound("max_grad_norm", bound)
        object.__setattr__(self, "bound_split", as_bound_split(self.bound_split))
        object.__setattr__(self, "noise_split", as_noise_split(self.noise_split))

    def groups(self, names: Iterable[str]) -> list[int]:
        return layers_of(names)

    def init(self, setting: Setting) -> Layers:
        bounds = self.max_grad_norm
        if not isinstance(bounds, tuple):
            bounds = self.bound_split.bounds(bounds, setting.sizes)
        if len(bounds) != len(setting.sizes):
            raise InvalidArgument(
                f"max_grad_norm has {len(bounds)} bounds, and the model has {len(setting.sizes)} layers with trainable "
                "parameters; give one bound for each, or one number for all."
            )
        return Layers(bounds, tuple(self.noise_split.spread(bounds, setting.sizes)))

    def bounds(self, state: Layers) -> list[float]:
        return list(state.bounds)

    def spread(self, state: Layers) -> list[float]:
        return list(state.spread)

    def group_factor(self, group: int, norms: Tensor, state: Layers) -> Tensor:
        return shrink(norms, state.bounds[group])

    def factors(self, norms: Tensor, labels: Tensor | None, state: Layers) -> Tensor:
        return torch.stack([self.group_factor(group, row, state) for group, row in enumerate(norms)])


def layers_of(names: Iterable[str]) -> list[int]:
    """The number of the layer of each parameter: the module that owns it, in order of first appearance."""
    numbers: dict[str, int] = {}
    return [numbers.setdefault(name.rpartition(".")[0], len(numbers)) for name in names]
