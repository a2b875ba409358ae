"""Correlated noise (matrix mechanisms, DP-FTRL): what one step adds, later steps take away again in part.

With per-step sums G (one row a step) a run releases ``G + C⁻¹Z = C⁻¹(CG + Z)``, C lower triangular and Toeplitz, Z
independent normal noise.  The error of the running sums, which is what training follows, is smaller than with
independent noise of the same guarantee.

Guarantee: the whole run costs what ONE Gaussian release of noise multiplier z costs; under cyclic Poisson sampling it
costs one such release, on a sample, for each cycle over the groups.
Requires: what ``gaussian.py`` requires, a run of at most the planned steps, and participations as the sampler states
them.
Why: row t of Z has standard deviation z·sens(C)·γ_k·√(Σ_j Δ_j²/γ_j²)/√share in each group (``gaussian.py`` has the same
without sens(C)), where Δ is the sensitivity of one participation and sens(C) that of C under the participations that
the sampler allows (``accounting.matrix``).  In these units the run is ONE Gaussian release of noise multiplier z, also
when later rows depend on earlier releases (Denisov et al. 2022, https://arxiv.org/abs/2202.08312, theorem 2.1): a
clipping norm that moves with what was released only scales a row.  Under cyclic Poisson sampling over
at least as many groups as C has bands, the columns of a unit do not overlap: each is a subsampled Gaussian release of
its own (``accounting.matrix.cyclic_poisson_event``), and sens(C) is the norm of one column.

Refused by name: batches whose steps have no least distance (Poisson) under any strategy of more than one band; more
steps than the run was planned for, to which neither sensitivity nor strategy belongs.

Not promised: any tier but the default one. The noise is what torch's generators make, in floating point; no grid is
known here on which sums of earlier draws and new ones are a function of one Gaussian release.  And a run with
correlated noise cannot be resumed: its next steps would need noise that was drawn before, and no checkpoint may hold
that.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from functools import lru_cache
from typing import NamedTuple, Protocol

import numpy as np
import scipy
import torch
from torch import Tensor

import accounting
from accounting import matrix
from dpkit.errors import InvalidArgument, OutOfOrder
from dpkit.types import ClippedSum, Named, Participation, Released

from .gaussian import Gaussian, check_shares, released_as, standard_deviations
from .keys import NoiseKey
from .mechanism import Tier

_LARGEST_ERROR = 1e-9


class Strategy(Protocol):
    """A lower-triangular Toeplitz matrix C, by the first columns of itself and of its inverse."""

    def coefficients(self, steps: int) -> np.ndarray:
        """First column of C, shape (steps,)."""
        ...

    def inverse(self, steps: int) -> np.ndarray:
        """First column of C⁻¹, shape (steps,)."""
        ...


@dataclass(frozen=True)
class SquareRoot:
    """C with C·C = A, the matrix of ones: the least maximal error where each unit takes part once.

    Each step needs all noise drawn so far. Source: ``accounting.matrix.square_root``.
    """

    def coefficients(self, steps: int) -> np.ndarray:
        return matrix.square_root(steps)

    def inverse(self, steps: int) -> np.ndarray:
        return matrix.inverse_square_root(steps)


@dataclass(frozen=True)
class BSR:
    """The first ``bands`` coefficients of the square root; a step needs the last bands - 1 rows of added noise.

    Source: ``accounting.matrix.banded_square_root``.
    """

    bands: int

    def __post_init__(self) -> None:
        _check_bands(self.bands)

    def coefficients(self, steps: int) -> np.ndarray:
        return matrix.banded_square_root(steps, self.bands)

    def inverse(self, steps: int) -> np.ndarray:
        return matrix.inverse(self.coefficients(steps))


@dataclass(frozen=True)
class BISR:
    """The inverse of the square root, cut to ``bands`` coefficients; a step needs the last bands - 1 draws.

    C itself is dense, so it takes fixed-order batches. Source: ``accounting.matrix.banded_inverse_square_root``.
    """

    bands: int

    def __post_init__(self) -> None:
        _check_bands(self.bands)

    def coefficients(self, steps: int) -> np.ndarray:
        return matrix.banded_inverse_square_root(steps, self.bands)[0]

    def inverse(self, steps: int) -> np.ndarray:
        return matrix.banded_inverse_square_root(steps, self.bands)[1]


@dataclass(frozen=True)
class BandMF:
    """The best C with ``bands`` bands, found numerically; fits cyclic Poisson sampling over as many groups.

    Source: ``accounting.matrix.band_mf``.
    """

    bands: int

    def __post_init__(self) -> None:
        _check_bands(self.bands)

    def coefficients(self, steps: int) -> np.ndarray:
        return matrix.band_mf(steps, self.bands)

    def inverse(self, steps: int) -> np.ndarray:
        return matrix.inverse(self.coefficients(steps))


Row = NoiseKey | dict[tuple[int, str], Tensor]
"""The noise of one step, of standard deviation 1 a draw: the key that makes it again, or (query, name) -> noise."""


class NoiseMemory(NamedTuple):
    """What correlated noise remembers. Secret: it is never written anywhere.

    Attributes:
      step: releases made so far.
      scale: standard deviation of a draw, per unit of sensitivity.
      norms: of each row of C⁻¹: by how much the noise of that step is larger than a draw.
      weights: of the rows before this one, newest first: row t is z_t + Σ_k weights[k]·rows[k].
      of_draws: whether ``rows`` are the draws z (weights from C⁻¹) or the noise that was added (weights from C).
      rows: as many as there are weights, at most.
    """

    step: int
    scale: float
    norms: tuple[float, ...]
    weights: tuple[float, ...]
    of_draws: bool
    rows: tuple[Row, ...] = ()


@dataclass(frozen=True)
class Correlated:
    """Gaussian noise that is correlated over the steps by ``strategy``.

    For guarantee, requirements and proof see the module.

    Args:
      noise_multiplier: z of the one Gaussian release that the run amounts to (under cyclic Poisson sampling: that a
        cycle over the groups amounts to, before sampling).
      strategy: :class:`SquareRoot`, :class:`BSR`, :class:`BISR` or :class:`BandMF`.
      regenerate: draw earlier noise again from its keys, which takes no memory and as many draws a step as the strategy
        looks back; False keeps it, one float64 vector of the model's size for each step it looks back. Only strategies
        with a banded inverse, and the square root, can regenerate.
    Raises:
      InvalidArgument: for a multiplier outside its domain, or a strategy that cannot regenerate.
    """

    noise_multiplier: float
    strategy: Strategy = field(default_factory=SquareRoot)
    regenerate: bool = False

    def __post_init__(self) -> None:
        Gaussian(self.noise_multiplier)
        if self.regenerate and isinstance(self.strategy, BSR | BandMF):
            raise InvalidArgument(
                f"{self.strategy} adds noise that is made of what it added before, down to the first step; keep it "
                "(regenerate=False), or take BISR, whose noise is made of the last draws."
            )

    @property
    def tier(self) -> Tier:
        return "default"

    def init(self, parameters: Named, participation: Participation) -> NoiseMemory:
        steps = participation.steps
        inverse, forward = self.strategy.inverse(steps), self.strategy.coefficients(steps)
        if forward[0] != 1:
            raise InvalidArgument(f"{self.strategy} begins with {forward[0]}; divide its coefficients by that.")
        # The sensitivity is that of C and the noise is made with its inverse: they must belong together.
        unit = scipy.signal.fftconvolve(forward, inverse)[:steps]
        unit[0] -= 1
        if not np.abs(unit).max() <= _LARGEST_ERROR:
            raise InvalidArgument(
                f"{self.strategy} states an inverse which, times its coefficients, differs from the identity by "
                f"{np.abs(unit).max():.3g}; accounting.matrix.inverse computes it."
            )
        draws, added = _trimmed(inverse), _trimmed(forward)
        # C⁻¹Z made of earlier draws, or, because C(C⁻¹Z) = Z, of earlier noise: whichever looks back less far.
        of_draws = self.regenerate or len(draws) <= len(added)
        return NoiseMemory(
            step=0,
            scale=self.scale(participation),
            norms=tuple(np.sqrt(np.cumsum(inverse**2)).tolist()),
            weights=tuple((draws[1:] if of_draws else -added[1:]).tolist()),
            of_draws=of_draws,
        )

    def scale(self, participation: Participation) -> float:
        return self.noise_multiplier * _sensitivity(self.strategy, participation)

    def event(self, participation: Participation) -> accounting.Event:
        sensitivity = _sensitivity(self.strategy, participation)
        if participation.sampled:
            return accounting.Gaussian(noise_multiplier=self.noise_multiplier)
        return accounting.MatrixMechanism(
            noise_multiplier=self.noise_multiplier * sensitivity,
            sensitivity=sensitivity,
            min_separation=participation.min_separation,
            max_participations=participation.max_participations,
        )

    def release(self, clipped: ClippedSum, state: NoiseMemory, key: NoiseKey) -> tuple[Released, NoiseMemory]:
        check_shares(clipped)
        if state.step >= len(state.norms):
            raise OutOfOrder(
                f"the noise was correlated over {len(state.norms)} steps, and all of them are taken: a longer run has "
                "another sensitivity. Plan all steps before the first one."
            )
        noisy: list[Named] = []
        made: dict[tuple[int, str], Tensor] = {}
        stds = [standard_deviations(query, state.scale) for query in clipped.queries]
        for number, query in enumerate(clipped.queries):
            sums: Named = {}
            for name, value in query.value.items():
                row = draw = _draw(key, number, name, value)
                for weight, earlier in zip(state.weights, state.rows, strict=False):
                    again = isinstance(earlier, NoiseKey)
                    before = _draw(earlier, number, name, value) if again else earlier[number, name]
                    row = torch.add(row, before, alpha=weight)
                if not self.regenerate:
                    made[number, name] = draw if state.of_draws else row
                noise = row * stds[number][query.groups[name]]
                sums[name] = noise.add_(value).to(torch.promote_types(value.dtype, torch.float32))
            noisy.append(sums)
        larger = state.norms[state.step]
        released = released_as(clipped, noisy, {group: std * larger for group, std in stds[0].items()})
        rows = (key if self.regenerate else made, *state.rows)[: len(state.weights)]
        return released, state._replace(step=state.step + 1, rows=rows)


@lru_cache(maxsize=64)
def _sensitivity(strategy: Strategy, participation: Participation) -> float:
    """Of C under the sampler's participations, in units of one of them.

    Raises:
      InvalidArgument: units are drawn at random, and two participations of one would share noise.
    """
    steps = participation.steps
    coefficients = strategy.coefficients(steps)
    if not participation.sampled:
        return matrix.sensitivity(
            coefficients,
            steps,
            min_separation=participation.min_separation,
            max_participations=participation.max_participations,
        )
    bands = len(_trimmed(coefficients))
    if bands > participation.min_separation:
        raise InvalidArgument(
            f"{strategy} has {bands} bands over {steps} steps, and the sampler lets a unit take part again after "
            f"{participation.min_separation}: noise that is shared by the two is not accounted for. Use "
            "dpkit.FixedOrder, or a BSR or BandMF strategy with dpkit.CyclicPoisson(groups=bands)."
        )
    return matrix.sensitivity(coefficients, steps)


def _draw(key: NoiseKey, number: int, name: str, like: Tensor) -> Tensor:
    """Standard normal noise in double precision, the same for the same key."""
    noise = torch.empty(like.shape, dtype=torch.float64, device=like.device)
    return noise.normal_(generator=key.generator(number, name, device=like.device))


def _trimmed(coefficients: np.ndarray) -> np.ndarray:
    """``coefficients`` up to the last that is not zero."""
    return coefficients[: int(np.flatnonzero(coefficients)[-1]) + 1]


def _check_bands(bands: object) -> None:
    if isinstance(bands, bool) or not isinstance(bands, int) or bands < 1:
        raise InvalidArgument(f"bands is {bands!r}; a strategy has at least one band (1 is independent noise).")
