"""How a bound and the noise are split among groups of parameters.

Noise.  With clipping norms C_k, any relative standard deviations γ_k > 0 give a release of noise multiplier z when
group k has noise of standard deviation s_k = z·γ_k·√(Σ_j C_j²/γ_j²), because then Σ_k (C_k/s_k)² = 1/z²
(``accounting.joint_noise_multiplier``). The mechanism computes s_k; here the γ_k are chosen.

The smallest total noise Σ_k d_k s_k² over d_k coordinates is had with γ_k² = C_k/√d_k: minimise (Σ_k d_k γ_k²)(Σ_k
C_k²/γ_k²), which by Cauchy and Schwarz is at least (Σ_k √d_k C_k)², with equality where d_k γ_k² ~ C_k²/γ_k².

Source of the rules' names: He et al. 2023, https://arxiv.org/abs/2212.01539. Its third rule, weighted by dimension, is
not built: its weights are not known here.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from enum import StrEnum

from dpkit.errors import InvalidArgument


class NoiseSplit(StrEnum):
    """Which groups get how much of the noise; the guarantee is the same for all."""

    DIMENSION_OPTIMAL = "dimension_optimal"
    """The least noise in all: γ_k = (C_k/√d_k)^½."""
    EQUAL_BUDGET = "equal_budget"
    """The same ratio of noise and bound in every group: γ_k = C_k."""
    GLOBAL = "global"
    """The same noise on every coordinate: γ_k = 1."""

    def spread(self, bounds: Sequence[float], sizes: Sequence[int]) -> list[float]:
        """γ_k of each group, from its clipping norm and its number of coordinates."""
        match self:
            case NoiseSplit.GLOBAL:
                return [1.0] * len(bounds)
            case NoiseSplit.EQUAL_BUDGET:
                return list(bounds)
            case NoiseSplit.DIMENSION_OPTIMAL:
                return [math.sqrt(bound / math.sqrt(max(1, size))) for bound, size in zip(bounds, sizes, strict=True)]


class BoundSplit(StrEnum):
    """How a bound C on the whole gradient becomes one bound C_k a group, with Σ C_k² = C²."""

    UNIFORM = "uniform"
    """C_k = C/√K."""
    DIMENSION = "dimension"
    """C_k = C·√(d_k/Σd)."""

    def bounds(self, max_grad_norm: float, sizes: Sequence[int]) -> tuple[float, ...]:
        """C_k of each group, from its number of coordinates d_k."""
        match self:
            case BoundSplit.UNIFORM:
                return (max_grad_norm / math.sqrt(max(1, len(sizes))),) * len(sizes)
            case BoundSplit.DIMENSION:
                total = max(1, sum(sizes))
                return tuple(max_grad_norm * math.sqrt(max(1, size) / total) for size in sizes)


def as_noise_split(value: object) -> NoiseSplit:
    """``value``, which may be the text of one.

    Raises:
      InvalidArgument: naming what there is.
    """
    try:
        return NoiseSplit(value)
    except ValueError:
        raise InvalidArgument(f"noise_split is {value!r}; it is one of {_listed(NoiseSplit)}.") from None


def as_bound_split(value: object) -> BoundSplit:
    """``value``, which may be the text of one.

    Raises:
      InvalidArgument: naming what there is.
    """
    try:
        return BoundSplit(value)
    except ValueError:
        raise InvalidArgument(f"bound_split is {value!r}; it is one of {_listed(BoundSplit)}.") from None


def _listed(splits: type[StrEnum]) -> str:
    return ", ".join(repr(split.value) for split in splits)
