"""The Gaussian mechanism: independent normal noise on every coordinate, fresh at every release.

Guarantee: all queries on one batch, released together, cost what one Gaussian release of noise multiplier z costs.
Requires: sensitivities that hold for all neighbours, shares that add up to 1 (others are refused), and a key from which
nothing else is drawn (``keys.py``).
Why: let Δ_{j,k} be the sensitivity of query j in group k, s_j its noise share and γ_{j,k} how its noise is spread over
its groups. The noise on that group has standard deviation z·γ_{j,k}·√(Σ_i Δ_{j,i}²/γ_{j,i}²)/√s_j, so that over the
whole release

    Σ_j Σ_k (Δ_{j,k} / std_{j,k})² = Σ_j s_j / z² = 1 / z²,

which is one Gaussian mechanism of noise multiplier z (Gaussian noise composes in the squared ratio of sensitivity to
standard deviation, also for queries on one batch).

Not promised: the noise is drawn from torch's generators, which are not cryptographic, in double precision and without a
grid, so that low-order bits may tell more. That is the default tier; ``secure.py`` has those in which they do not.

Source: Dwork and Roth 2014, Appendix A; Balle and Wang 2018, https://arxiv.org/abs/1805.06530.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

import accounting
from dpkit.errors import InvalidArgument
from dpkit.types import ClippedSum, Named, Participation, Query, Released

from .keys import NoiseKey
from .mechanism import Tier

_SHARE_TOLERANCE = 1e-12


@dataclass(frozen=True)
class Gaussian:
    """Gaussian noise with standard deviation ``noise_multiplier`` times the L2 sensitivity.

    For guarantee, requirements and proof see the module.

    Args:
      noise_multiplier: z = standard deviation / L2 sensitivity under the plan's neighbouring relation; positive,
        finite.
    Raises:
      InvalidArgument: for a multiplier outside its domain.
    """

    noise_multiplier: float

    def __post_init__(self) -> None:
        value = self.noise_multiplier
        is_number = isinstance(value, (int, float)) and not isinstance(value, bool)
        if not (is_number and math.isfinite(value) and value > 0):
            raise InvalidArgument(
                f"noise_multiplier is {value!r}; it must be positive and finite, because without noise "
                "no epsilon holds. `accounting.calibrate_noise_multiplier` finds one for a target epsilon."
            )

    @property
    def tier(self) -> Tier:
        return "default"

    def init(self, parameters: Named, participation: Participation) -> tuple[()]:
        return ()

    def scale(self, participation: Participation) -> float:
        return self.noise_multiplier

    def event(self, participation: Participation) -> accounting.Event:
        return accounting.Gaussian(noise_multiplier=self.noise_multiplier)

    def release(self, clipped: ClippedSum, state: tuple[()], key: NoiseKey) -> tuple[Released, tuple[()]]:
        check_shares(clipped)
        noisy: list[Named] = []
        for number, query in enumerate(clipped.queries):
            stds = self.standard_deviations(query)
            noisy.append(
                {
                    name: _add_noise(value, stds[query.groups[name]], key.generator(number, name, device=value.device))
                    for name, value in query.value.items()
                }
            )
        return released_as(clipped, noisy, self.standard_deviations(clipped.queries[0])), state

    def standard_deviations(self, query: Query) -> dict[int, float]:
        """Group -> standard deviation of the noise on each coordinate of that group, in the units of the sum."""
        return standard_deviations(query, self.noise_multiplier)


def standard_deviations(query: Query, scale: float) -> dict[int, float]:
    """Group -> ``scale``·γ_k·√(Σ_j Δ_j²/γ_j²)/√share, with γ the query's spread; see the module."""
    spread = query.sensitivity if query.spread is None else query.spread
    joint = math.hypot(*(sensitivity / spread[group] for group, sensitivity in query.sensitivity.items()))
    return {group: scale * spread[group] * joint / math.sqrt(query.noise_share) for group in query.sensitivity}


def check_shares(clipped: ClippedSum) -> None:
    """Refuse queries that would together cost more than the event says.

    Raises:
      InvalidArgument: their noise shares are not positive or do not add up to 1.
    """
    shares = sum(query.noise_share for query in clipped.queries)
    if any(query.noise_share <= 0 for query in clipped.queries) or abs(shares - 1.0) > _SHARE_TOLERANCE:
        raise InvalidArgument(
            f"the noise shares of the queries on one batch add up to {shares}, not to 1: the release would cost "
            "more than the event says."
        )


def released_as(clipped: ClippedSum, noisy: list[Named], gradient_stds: dict[int, float]) -> Released:
    """The noisy queries as what is released: the gradient first, then the side questions."""
    gradient, *side = noisy
    groups = clipped.queries[0].groups
    return Released(
        gradient,
        tuple(next(iter(answer.values())) for answer in side),
        {name: gradient_stds[groups[name]] for name in gradient},
    )


def _add_noise(value: Tensor, std: float, generator: torch.Generator) -> Tensor:
    # Drawn and added in double precision: a single-precision normal has 24-bit uniforms behind it, stops at 5.8
    # standard deviations, and would be rounded away in a large sum.
    noise = torch.empty(value.shape, dtype=torch.float64, device=value.device)
    noise.normal_(0.0, std, generator=generator)
    return (noise.add_(value)).to(torch.promote_types(value.dtype, torch.float32))
