"""Quantile clipping: the clipping norm follows a quantile of the gradient norms.

Guarantee: each unit's clipped gradient has L2 norm at most C_t, which was known before the batch was drawn.  Beside the
gradient, every batch is asked how many norms are at most C_t, as Σ_i (b_i - ½) with b_i in {0, 1}: shifted like this, a
unit moves the sum by ½ and not by 1 (by 1 where it is replaced).  Units that were dropped and padding add no term.  The
sum is released with noise of standard deviation σ_b in the same event as the gradient: of the precision 1/z² that the
plan pays for, the bits take 1/(2σ_b)², and the gradient has noise multiplier z_Δ = (z⁻² - (2σ_b)⁻²)^(-½).  Then

    b̄ = (1/B)(Σ_i (b_i - ½) + N(0, σ_b²)) + ½,       C <- C·exp(-η (b̄ - γ)),

with B the expected batch size, a public constant.

Requires: norms that are not below the true ones, and bits with enough noise (``Plan.noise_shares`` refuses less).
Why: each unit is clipped as in ``flat.py``; the bits of a unit are a vector of K numbers ±½, of norm √K/2; what both
cost adds up to 1/z² (``mechanisms/gaussian.py``).  C_t was made of earlier releases alone.

Source: Andrew et al. 2021, "Differentially Private Learning with Adaptive Clipping", https://arxiv.org/abs/1905.03871,
Algorithm 1. Per layer: He et al. 2023, https://arxiv.org/abs/2212.01539; the layers' estimates Q_k split a fixed bound,
C_k = C·Q_k/‖Q‖, so that the total noise is controlled.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from dpkit.errors import InvalidArgument
from dpkit.types import Question

from .flat import check_bound, shrink
from .noise_split import NoiseSplit, as_noise_split
from .per_layer import layers_of
from .rule import ClipRule, SeparableRule, Setting

_SMALLEST, _LARGEST, _LONGEST_STEP = 2.0**-60, 2.0**60, 3.0


class Estimates(NamedTuple):
    """The estimated quantile of each group's norm, with what is fixed for the run.

    Attributes:
      quantiles: Q_k.
      sizes: d_k, number of coordinates.
      expected_batch: B, by which the sums are divided.
    """

    quantiles: tuple[float, ...]
    sizes: tuple[int, ...]
    expected_batch: float


@dataclass(frozen=True)
class Quantile(ClipRule):
    """Flat clipping whose bound follows a quantile of the gradient norms.

    For guarantee, requirements and proof see the module.

    Args:
      max_grad_norm: C > 0 at the start.
      quantile: γ in (0, 1), the share of norms that should lie below C.
      learning_rate: η > 0.
      noise_std: σ_b, standard deviation of the noise on the sum of bits; a twentieth of the expected batch size where
        it is left out. It must exceed half the noise multiplier.
    Raises:
      InvalidArgument: for values outside these ranges.
    """

    max_grad_norm: float = 0.1
    quantile: float = 0.5
    learning_rate: float = 0.2
    noise_std: float | None = None

    def __post_init__(self) -> None:
        _check(self.max_grad_norm, self.quantile, self.learning_rate, self.noise_std)

    def groups(self, names: Iterable[str]) -> list[int]:
        return [0 for _ in names]

    def init(self, setting: Setting) -> Estimates:
        return Estimates((float(self.max_grad_norm),), setting.sizes, setting.expected_batch)

    def bounds(self, state: Estimates) -> list[float]:
        return list(state.quantiles)

    def factors(self, norms: Tensor, labels: Tensor | None, state: Estimates) -> Tensor:
        return shrink(norms, state.quantiles[0])

    def questions(self, setting: Setting) -> tuple[Question, ...]:
        return (_bits(setting, self.noise_std),)

    def answers(self, norms: Tensor, labels: Tensor | None, state: Estimates) -> Sequence[Tensor]:
        return (_below(norms, state),)

    def update(self, state: Estimates, released: Sequence[Tensor]) -> Estimates:
        return _moved(state, released[0], self.quantile, self.learning_rate)


@dataclass(frozen=True)
class PerLayerQuantile(SeparableRule):
    """Per-layer clipping whose split follows a quantile of each layer's gradient norms; the total bound is fixed.

    For guarantee, requirements and proof see the module.

    Args:
      max_grad_norm: C > 0, the bound of the whole gradient; layer k gets C·Q_k/‖Q‖.
      quantile: γ in (0, 1), the share of a layer's norms that should lie below its estimate Q_k.
      learning_rate: η > 0.
      noise_std: σ_b, standard deviation of the noise on each layer's sum of bits; a twentieth of the expected batch
        size where it is left out. It must exceed √K/2 times the noise multiplier, for K layers.
      noise_split: which layers get how much of the noise.
    Raises:
      InvalidArgument: for values outside these ranges.
    """

    max_grad_norm: float = 1.0
    quantile: float = 0.5
    learning_rate: float = 0.2
    noise_std: float | None = None
    noise_split: NoiseSplit = NoiseSplit.DIMENSION_OPTIMAL

    def __post_init__(self) -> None:
        _check(self.max_grad_norm, self.quantile, self.learning_rate, self.noise_std)
        object.__setattr__(self, "noise_split", as_noise_split(self.noise_split))

    def groups(self, names: Iterable[str]) -> list[int]:
        return layers_of(names)

    def init(self, setting: Setting) -> Estimates:
        layers = len(setting.sizes)
        start = (self.max_grad_norm / math.sqrt(max(1, layers)),) * layers
        return Estimates(start, setting.sizes, setting.expected_batch)

    def bounds(self, state: Estimates) -> list[float]:
        total = math.hypot(*state.quantiles)
        return [self.max_grad_norm * quantile / total for quantile in state.quantiles]

    def spread(self, state: Estimates) -> list[float]:
        return self.noise_split.spread(self.bounds(state), state.sizes)

    def group_factor(self, group: int, norms: Tensor, state: Estimates) -> Tensor:
        return shrink(norms, self.bounds(state)[group])

    def factors(self, norms: Tensor, labels: Tensor | None, state: Estimates) -> Tensor:
        return torch.stack([self.group_factor(group, row, state) for group, row in enumerate(norms)])

    def questions(self, setting: Setting) -> tuple[Question, ...]:
        return (_bits(setting, self.noise_std),)

    def answers(self, norms: Tensor, labels: Tensor | None, state: Estimates) -> Sequence[Tensor]:
        return (_below(norms, state),)

    def update(self, state: Estimates, released: Sequence[Tensor]) -> Estimates:
        return _moved(state, released[0], self.quantile, self.learning_rate)


def _bits(setting: Setting, noise_std: float | None) -> Question:
    """One bit a group, each ±½: together a vector of norm √K/2."""
    groups = len(setting.sizes)
    std = setting.expected_batch / 20 if noise_std is None else noise_std
    return Question(size=groups, bound=math.sqrt(groups) / 2, noise_std=std)


def _below(norms: Tensor, state: Estimates) -> Tensor:
    return (norms <= norms.new_tensor(state.quantiles)[:, None]).T.double() - 0.5


def _moved(state: Estimates, released: Tensor, quantile: float, learning_rate: float) -> Estimates:
    shares = (released.double() / state.expected_batch + 0.5).tolist()
    # Kept within what a double and a float32 can be divided by; a longer step is noise.
    moved = (
        old * math.exp(min(max(-learning_rate * (share - quantile), -_LONGEST_STEP), _LONGEST_STEP))
        for old, share in zip(state.quantiles, shares, strict=True)
    )
    return state._replace(quantiles=tuple(min(max(new, _SMALLEST), _LARGEST) for new in moved))


def _check(max_grad_norm: float, quantile: float, learning_rate: float, noise_std: float | None) -> None:
    check_bound("max_grad_norm", max_grad_norm)
    check_bound("learning_rate", learning_rate)
    check_bound("quantile", quantile)
    if quantile >= 1:
        raise InvalidArgument(f"quantile is {quantile}; it is the share of norms below the bound, in (0, 1).")
    if noise_std is not None:
        check_bound("noise_std", noise_std)
