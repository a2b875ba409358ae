"""Layer-wise normalisation of gradients that exceed a bound (the rule of the federated speech experiments).

Guarantee: a unit's gradient has L2 norm at most C: one of norm below C is left alone, and of a longer one EVERY layer
is normalised to exactly C_k with Σ C_k² = C², the short layers scaled up.  Layers have no bounds of their own (a
gradient of norm below C may lie in one layer alone), so the noise is the same on every coordinate.
Requires: norms of each layer that are not below the true ones (``rule.py``).
Why: where the norm of the whole is below C, factors are 1; else no layer is longer than C_k, so that the whole is not
longer than √(Σ_k C_k²) = C.  Factors are cut to at most 2^20, which leaves a layer shorter.

Source: Pelikan et al. 2025, "Enabling Differentially Private Federated Learning for Speech Recognition",
https://arxiv.org/abs/2310.00098; its definition 3 clips each layer (``PerLayer``), its published code does this.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

import torch
from torch import Tensor

from .automatic import LARGEST_FACTOR
from .flat import check_bound, finite_factors
from .noise_split import BoundSplit, as_bound_split
from .per_layer import layers_of
from .rule import ClipRule, Setting


@dataclass(frozen=True)
class NormalizeIfExceeds(ClipRule):
    """Leave gradients of norm below ``max_grad_norm`` alone, and normalise every layer of the others.

    For guarantee, requirements and proof see the module.

    Args:
      max_grad_norm: C > 0.
      bound_split: the norms C_k that layers are normalised to: C/√K, or by the number of their parameters.
    Raises:
      InvalidArgument: C is not a positive finite number, or the split is unknown.
    """

    max_grad_norm: float
    bound_split: BoundSplit = BoundSplit.UNIFORM

    def __post_init__(self) -> None:
        check_bound("max_grad_norm", self.max_grad_norm)
        object.__setattr__(self, "bound_split", as_bound_split(self.bound_split))

    def groups(self, names: Iterable[str]) -> list[int]:
        return layers_of(names)

    def init(self, setting: Setting) -> tuple[float, ...]:
        return self.bound_split.bounds(self.max_grad_norm, setting.sizes)

    def bounds(self, state: tuple[float, ...]) -> list[float]:
        return [self.max_grad_norm]

    def factors(self, norms: Tensor, labels: Tensor | None, state: tuple[float, ...]) -> Tensor:
        whole = torch.linalg.vector_norm(norms, dim=0, keepdim=True)
        normalised = (norms.new_tensor(state)[:, None] / norms).clamp(max=LARGEST_FACTOR)
        return finite_factors(torch.where(whole < self.max_grad_norm, 1.0, normalised), whole.expand_as(norms))
