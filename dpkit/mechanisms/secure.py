"""Independent noise from a cryptographic generator, on a grid: what was released has no telling low-order bits.

Guarantee: :class:`HardenedGaussian` costs what ``gaussian.py`` says, for Gaussian noise in double precision that is
then rounded; :class:`DiscreteGaussian` costs what ``accounting.DiscreteGaussian`` says, with integer noise of exactly
its law.  In both, every released number is a multiple of a power of two g that depends on public numbers alone and is
the same for all data sets, so that none can be reached from one neighbour only (Mironov 2012, "On significance of the
least significant bits for differential privacy"; Jin, McMurtry, Rubinstein and Ohrimenko 2022,
https://arxiv.org/abs/2112.05307).

Requires: sensitivities that hold for all neighbours, shares that add up to 1 (others are refused), a key from which
nothing else is drawn (``keys.py``), and that nobody who lacks the key can tell ChaCha20 from random bits.

Why: each coordinate of the clipped sum is moved to the nearest multiple of g (the upper one of two), by at most g/2.
The d coordinates of a group are then at most ``Δ' = Δ + g√d`` apart on neighbours, where Δ is the query's own
sensitivity; Δ' is what the noise is scaled to.  First comes a grid, from Δ: ``g = 2^(⌊log2 std⌋ - bits)``, with std as
in ``gaussian.py``; then the noise, from Δ' in the same formula, which only makes it larger.  Hence with
std'_{j,k} = z·γ_{j,k}·√(Σ_i Δ'_{j,i}²/γ_{j,i}²)/√s_j the sum there holds as it stands:

    Σ_j Σ_k (Δ'_{j,k} / std'_{j,k})² = Σ_j s_j / z² = 1 / z².

*Rounded noise.* With round(x) = ⌊x + 1/2⌋ we have round(n + x) = n + round(x) for every integer n.  A sum S on the grid
and Gaussian noise Y therefore give ``S + g·round(Y/g) = g·round((S + Y)/g)``: a function of what the Gaussian mechanism
releases.

*Integer noise.* In units of g the sum is an integer vector, and the noise has as its scale a whole number of at
least std'/g in every group of every query, so that the sum above is at most 1/z²: that is the event.

Nothing overflows, whatever finite number came in: sums are cut to ±2^62 g first, a function of one coordinate that
moves no two values apart.  That is 2^31 standard deviations or more, beyond any sum that training forms.

Not promised: the double-precision Gaussian follows its law up to rounding (63 to 127 random bits, an inverse
distribution function that is right to a few units in the last place); tests bound the difference, no theorem does.
Drawing takes a time that depends on what was drawn, though not on the data.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

import accounting
from dpkit.errors import InvalidArgument
from dpkit.types import ClippedSum, Named, Participation, Query, Released

from .chacha import KeyStream
from .discrete import LARGEST_SCALE, discrete_gaussian
from .gaussian import Gaussian, check_shares, released_as, standard_deviations
from .keys import NoiseKey
from .mechanism import Tier

MOST_PARAMETERS = 1_000_000
"""For which :class:`DiscreteGaussian` draws noise; a draw takes about a second then."""

_BITS = 30  # standard deviation in steps of the grid, as a power of two: the hardened tier's
_BITS_EXACT = 20  # the exact tier's, whose squares must fit into 64 bits
_WIDEST = 2.0**50  # standard deviation in steps of the grid at most: draws then stay below 2^54
_FARTHEST = 2.0**62  # steps of the grid; leaves room for the noise in 64 bits
_SLACK = 1 + 2.0**-40  # for the rounding of the formulas of sensitivity and standard deviation
_LEAST, _MOST = 2.0**-900, 2.0**900
_AT_A_TIME = 2**20


@dataclass(frozen=True)
class HardenedGaussian:
    """The noise of :class:`Gaussian` from ChaCha20, rounded to a grid: no attack on low-order bits.

    For guarantee, requirements and proof see the module. Takes about twice the time of :class:`Gaussian`; accounted as
    the same event.

    Args:
      noise_multiplier: as of :class:`Gaussian`.
    Raises:
      InvalidArgument: for a multiplier outside its domain.
    """

    noise_multiplier: float

    def __post_init__(self) -> None:
        Gaussian(self.noise_multiplier)

    @property
    def tier(self) -> Tier:
        return "hardened"

    def init(self, parameters: Named, participation: Participation) -> tuple[()]:
        return ()

    def scale(self, participation: Participation) -> float:
        return self.noise_multiplier

    def event(self, participation: Participation) -> accounting.Event:
        return accounting.Gaussian(noise_multiplier=self.noise_multiplier)

    def release(self, clipped: ClippedSum, state: tuple[()], key: NoiseKey) -> tuple[Released, tuple[()]]:
        def noise(value: Tensor, std: float, cipher_key: bytes) -> Tensor:
            draws = standard_normal(value.numel(), cipher_key, value.device)
            return rounded(draws.mul_(std)).to(torch.int64).reshape(value.shape)

        def grids(query: Query) -> dict[int, Grid]:
            return grids_of(query, self.noise_multiplier, _BITS, _WIDEST)

        return _release(clipped, key, grids, noise), state


@dataclass(frozen=True)
class DiscreteGaussian:
    """Integer noise, drawn without any floating-point number: nothing about it is approximate.

    For guarantee, requirements and proof see the module.

    For small models: a draw takes about a microsecond for each parameter, on CPU (the noise is then moved to the device
    of the model, where whole numbers are added).  Accounted with Renyi DP alone, which states an
    epsilon 7 to 19 % larger than that of a Gaussian of the same size (measured on eleven plans), and by no theorem for
    batches that are cut (``max_physical_batch_size`` in ``make_private``) or of a fixed size.

    Args:
      noise_multiplier: z = scale of the noise / L2 sensitivity of the sum, both on the grid.
    Raises:
      InvalidArgument: for a multiplier outside its domain.
    """

    noise_multiplier: float

    def __post_init__(self) -> None:
        Gaussian(self.noise_multiplier)

    @property
    def tier(self) -> Tier:
        return "exact"

    def init(self, parameters: Named, participation: Participation) -> tuple[()]:
        count = sum(parameter.numel() for parameter in parameters.values())
        if count > MOST_PARAMETERS:
            raise InvalidArgument(
                f"DiscreteGaussian draws noise for at most {MOST_PARAMETERS} parameters, about a second a step, and "
                f"this model has {count}. dpkit.HardenedGaussian has no limit and is twenty times as fast."
            )
        return ()

    def scale(self, participation: Participation) -> float:
        return self.noise_multiplier

    def event(self, participation: Participation) -> accounting.Event:
        return accounting.DiscreteGaussian(noise_multiplier=self.noise_multiplier)

    def release(self, clipped: ClippedSum, state: tuple[()], key: NoiseKey) -> tuple[Released, tuple[()]]:
        def noise(value: Tensor, std: float, cipher_key: bytes) -> Tensor:
            drawn = torch.from_numpy(discrete_gaussian(int(std), value.numel(), KeyStream(cipher_key)))
            return drawn.reshape(value.shape).to(value.device)

        def grids(query: Query) -> dict[int, Grid]:
            found = grids_of(query, self.noise_multiplier, _BITS_EXACT, LARGEST_SCALE)
            return {group: grid._replace(std=math.ceil(grid.std)) for group, grid in found.items()}

        return _release(clipped, key, grids, noise), state


class Grid(NamedTuple):
    """Where the sums of one group lie.

    Attributes:
      step: g, a power of two.
      std: standard deviation of the noise, or what takes its place, in steps.
    """

    step: float
    std: float


def grids_of(query: Query, scale: float, bits: int, widest: float) -> dict[int, Grid]:
    """Group -> grid, with noise that covers the rounding of the sum to it. All of it from public numbers.

    Args:
      bits: the standard deviation has at least 2^bits steps.
      widest: and at most this many.
    Raises:
      InvalidArgument: the noise is of a size for which there is no grid.
    """
    sizes = dict.fromkeys(query.sensitivity, 0)
    for name, value in query.value.items():
        sizes[query.groups[name]] += value.numel()
    steps: dict[int, float] = {}
    for group, std in standard_deviations(query, scale).items():
        if not _LEAST < std < _MOST:
            raise InvalidArgument(
                f"the noise has standard deviation {std:g}, for which there is no grid: bring max_grad_norm (or the "
                "bound and noise_std of a metric) into an ordinary range."
            )
        steps[group] = 2.0 ** (math.frexp(std)[1] - 1 - bits)
    sensitivity = {
        group: (most + steps[group] * math.sqrt(sizes[group])) * _SLACK for group, most in query.sensitivity.items()
    }
    stds = standard_deviations(query._replace(sensitivity=sensitivity), scale)
    grids = {group: Grid(step, stds[group] / step) for group, step in steps.items()}
    if not all(grid.std <= widest for grid in grids.values()):
        raise InvalidArgument(
            f"with noise multiplier {scale:g} the grid of {max(steps.values()):g} is so wide that what rounding adds "
            f"to the sensitivity of {max(sizes.values())} numbers is most of it: use a smaller noise multiplier, or "
            "dpkit.Gaussian."
        )
    return grids


def _release(
    clipped: ClippedSum,
    key: NoiseKey,
    grids_of_query: Callable[[Query], dict[int, Grid]],
    noise: Callable[[Tensor, float, bytes], Tensor],
) -> Released:
    """Every sum on its grid plus whole numbers of steps: ``noise(sum, standard deviation in steps, key)``."""
    check_shares(clipped)
    noisy: list[Named] = []
    # Before anything is drawn: a query without a grid must not leave another one half released.
    grids = [grids_of_query(query) for query in clipped.queries]
    for number, query in enumerate(clipped.queries):
        sums: Named = {}
        for name, value in query.value.items():
            grid = grids[number][query.groups[name]]
            steps = on_grid(value, grid.step).add_(noise(value, grid.std, key.cipher_key(number, name)))
            # The steps are out; which type holds them is post-processing.
            sums[name] = (steps.double() * grid.step).to(torch.promote_types(value.dtype, torch.float32))
        noisy.append(sums)
    return released_as(clipped, noisy, {group: grid.std * grid.step for group, grid in grids[0].items()})


def on_grid(value: Tensor, step: float) -> Tensor:
    """How many steps each coordinate is from zero, rounded and cut; int64."""
    return rounded((value.double() / step).clamp(-_FARTHEST, _FARTHEST)).to(torch.int64)


def rounded(x: Tensor) -> Tensor:
    """⌊x + 1/2⌋, without the error of adding: 0.49999999999999994 + 0.5 is 1 in double precision."""
    low = x.floor()
    return low + (x - low >= 0.5)


def standard_normal(count: int, cipher_key: bytes, device: torch.device | str = "cpu") -> Tensor:
    """(count,) standard normal numbers in double precision, each made of a word of the key's stream.

    The first bit is the sign; the others, v, give the probability ``(v + 1/2) / 2^64`` of the tail beyond the number.
    Where the first ten of them are zero (once in 1,024), 64 more bits follow from the stream of nonce 1, so that the
    probability keeps its 53 digits down to 2^-75 and goes down to 2^-129: 13.1 standard deviations.
    """
    draws, further = KeyStream(cipher_key, 0, device), KeyStream(cipher_key, 1, device)
    result = torch.empty(count, dtype=torch.float64, device=device)
    for part in result.split(_AT_A_TIME):
        words = draws.words(part.numel())
        v = words & (2**63 - 1)
        beyond = v.double().add_(0.5).mul_(2.0**-64)
        rare = (v >> 53 == 0).nonzero()[:, 0]
        if rare.numel():
            more = further.words(rare.numel())
            high, low = (more >> 32) & (2**32 - 1), more & (2**32 - 1)
            follow = high.double() * 2.0**32 + low.double() + 0.5
            beyond[rare] = (v[rare].double() + follow * 2.0**-64) * 2.0**-64
        size = torch.special.ndtri(beyond)
        part.copy_(torch.where(words < 0, size, -size))
    return result
