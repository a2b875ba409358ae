"""Global clipping: all gradients are scaled by one factor, so that their directions are not changed among each other.

Guarantee: each unit's scaled gradient has L2 norm at most C.  With a strict threshold Z >= C, a gradient of norm at
most Z is multiplied by C/Z; a longer one is left out (``Global``) or clipped to C (``GlobalAdapt``).  ``GlobalAdapt``
moves Z so that a public share of the units lies above τ·Z: it asks of every batch how many do, a count of sensitivity 1
that is released in the same event as the gradient.
Requires: norms that are not below the true ones, and a count with enough noise (``Plan.noise_shares`` refuses less).
Why: ‖g‖·C/Z <= C where ‖g‖ <= Z, and ‖g‖·C/‖g‖ = C beyond.  A unit adds 0 or 1 to the count.  Z was made of earlier
releases alone, so it may depend on them as any later release may.

Gradients are scaled down by C/Z, so the learning rate has to be larger than that of flat clipping.

Sources: Bu et al. 2021, "On the convergence and calibration of deep learning with differential privacy",
https://arxiv.org/abs/2106.07830 (global clipping); Esipova et al. 2023, "Disparate Impact in Differential Privacy from
Gradient Misalignment", https://arxiv.org/abs/2206.07737 (adaptive). Two things differ from the authors' code: the count
is divided by the public expected batch size and not by the one in hand, and Z never falls below C, where the rule would
silently be flat clipping.
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

from .flat import check_bound, finite_factors
from .rule import ClipRule, Setting

_LARGEST_THRESHOLD = 2.0**60


@dataclass(frozen=True)
class Global(ClipRule):
    """Scale gradients of norm at most ``threshold`` by C/Z, and leave longer ones out.

    For guarantee, requirements and proof see the module.

    Args:
      max_grad_norm: C > 0, the norm that a gradient of norm Z comes to.
      threshold: Z >= C.
    Raises:
      InvalidArgument: for values outside these ranges.
    """

    max_grad_norm: float
    threshold: float

    def __post_init__(self) -> None:
        _check_threshold(self.max_grad_norm, self.threshold)

    def groups(self, names: Iterable[str]) -> list[int]:
        return [0 for _ in names]

    def init(self, setting: Setting) -> tuple[()]:
        return ()

    def bounds(self, state: tuple[()]) -> list[float]:
        return [self.max_grad_norm]

    def factors(self, norms: Tensor, labels: Tensor | None, state: tuple[()]) -> Tensor:
        scaled = torch.full_like(norms, self.max_grad_norm / self.threshold)
        return torch.where(norms <= self.threshold, scaled, 0.0)


class GlobalState(NamedTuple):
    """The strict threshold Z, and the expected batch size that its updates divide by."""

    threshold: float
    expected_batch: float


@dataclass(frozen=True)
class GlobalAdapt(ClipRule):
    """Scale gradients of norm at most Z by C/Z and clip longer ones to C; Z follows the norms.

    For guarantee, requirements and proof see the module.

    After each step Z is multiplied by exp(-learning_rate + share), where ``share`` is the released number of units with
    a norm above ``tolerance``·Z over the expected batch size: at rest the share is ``learning_rate``.

    Args:
      max_grad_norm: C > 0.
      threshold: Z >= C at the start.
      learning_rate: of Z, and the share at rest; in (0, 1).
      tolerance: τ > 0.
      noise_std: σ_b, standard deviation of the noise on the count; must exceed the noise multiplier.
    Raises:
      InvalidArgument: for values outside these ranges.
    """

    max_grad_norm: float
    threshold: float = 50.0
    learning_rate: float = 0.1
    tolerance: float = 1.0
    noise_std: float = 10.0

    def __post_init__(self) -> None:
        _check_threshold(self.max_grad_norm, self.threshold)
        check_bound("tolerance", self.tolerance)
        check_bound("noise_std", self.noise_std)
        check_bound("learning_rate", self.learning_rate)
        if self.learning_rate >= 1:
            raise InvalidArgument(
                f"learning_rate is {self.learning_rate}; it is also the share of units above the threshold at rest, "
                "so it lies in (0, 1)."
            )

    def groups(self, names: Iterable[str]) -> list[int]:
        return [0 for _ in names]

    def init(self, setting: Setting) -> GlobalState:
        return GlobalState(float(self.threshold), setting.expected_batch)

    def bounds(self, state: GlobalState) -> list[float]:
        return [self.max_grad_norm]

    def factors(self, norms: Tensor, labels: Tensor | None, state: GlobalState) -> Tensor:
        return finite_factors(self.max_grad_norm / norms.clamp(min=state.threshold), norms)

    def questions(self, setting: Setting) -> tuple[Question, ...]:
        return (Question(size=1, bound=1.0, noise_std=self.noise_std),)

    def answers(self, norms: Tensor, labels: Tensor | None, state: GlobalState) -> Sequence[Tensor]:
        return ((norms[0] > self.tolerance * state.threshold)[:, None].double(),)

    def update(self, state: GlobalState, released: Sequence[Tensor]) -> GlobalState:
        share = float(released[0][0]) / state.expected_batch
        moved = state.threshold * math.exp(min(share - self.learning_rate, 1.0))
        return state._replace(threshold=min(max(moved, self.max_grad_norm), _LARGEST_THRESHOLD))


def _check_threshold(max_grad_norm: float, threshold: float) -> None:
    check_bound("max_grad_norm", max_grad_norm)
    check_bound("threshold", threshold)
    if threshold < max_grad_norm:
        raise InvalidArgument(
            f"threshold is {threshold} and max_grad_norm is {max_grad_norm}; below max_grad_norm, gradients would be "
            "scaled up. Give a threshold of at least max_grad_norm."
        )
