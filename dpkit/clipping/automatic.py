"""Automatic clipping (AUTO-S and AUTO-V): every gradient is normalised, so that no threshold has to be found.

Guarantee: each unit's gradient g·R/(‖g‖ + γ) has L2 norm at most R (strictly below it for γ > 0), and is 0 where its
norm is not finite.
Requires: a norm that is not below the true one (``rule.py``).
Why: ‖g‖·R/(‖g‖ + γ) <= R.  Factors are cut to at most 2^20, which only makes them smaller.
R only scales what the optimizer sees: with SGD it is part of the learning rate, with Adam it does not matter. So R = 1.
Source: Bu et al. 2023, "Automatic Clipping: Differentially Private Deep Learning Made Easier and Stronger",
https://arxiv.org/abs/2206.07136: γ = 0.01 is AUTO-S, γ = 0 is AUTO-V.
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass

from torch import Tensor

from dpkit.errors import InvalidArgument

from .flat import check_bound, finite_factors
from .rule import ClipRule, Setting

LARGEST_FACTOR = 2.0**20
"""Of any rule that makes gradients longer: what is shorter than a millionth of the bound is noise of the arithmetic."""


@dataclass(frozen=True)
class Automatic(ClipRule):
    """Normalise each unit's gradient: AUTO-S; with ``gamma=0`` AUTO-V.

    For guarantee, requirements and proof see the module.

    Args:
      max_grad_norm: R > 0, the norm that long gradients come to.
      gamma: γ >= 0, the stability constant: gradients much shorter than it stay shorter.
    Raises:
      InvalidArgument: for values outside these ranges.
    """

    max_grad_norm: float = 1.0
    gamma: float = 0.01

    def __post_init__(self) -> None:
        check_bound("max_grad_norm", self.max_grad_norm)
        is_number = isinstance(self.gamma, (int, float)) and not isinstance(self.gamma, bool)
        if not (is_number and math.isfinite(self.gamma) and self.gamma >= 0):
            raise InvalidArgument(f"gamma is {self.gamma!r}; it is a number from 0 on: 0.01 is AUTO-S, 0 is AUTO-V.")

    def groups(self, names: Iterable[str]) -> list[int]:
        return [0 for _ in names]

    def init(self, setting: Setting) -> tuple[()]:
        return ()

    def bounds(self, state: tuple[()]) -> list[float]:
        return [self.max_grad_norm]

    def factors(self, norms: Tensor, labels: Tensor | None, state: tuple[()]) -> Tensor:
        return finite_factors((self.max_grad_norm / (norms + self.gamma)).clamp(max=LARGEST_FACTOR), norms)
