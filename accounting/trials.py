r"""Random numbers of trials: their probabilities, a sampler, and what the theorems of ``selection.py`` ask of them.

A law is known by its generating function ``phi(z) = E[z^K]``:

* truncated negative binomial, shape eta > -1: ``phi(z) = ((1 - (1-gamma) z)^-eta - 1) / (gamma^-eta - 1)``, and its
  limit ``ln(1 - (1-gamma) z) / ln gamma`` at eta = 0; both have ``phi'(z) = E[K] (gamma / (1 - (1-gamma) z))^(eta+1)``
  (Papernot and Steinke 2022, https://arxiv.org/abs/2110.03620, definition 1);
* Poisson: ``phi(z) = e^(mean (z-1))``;
* binomial: ``phi(z) = (1 - p + p z)^count``.

Sampler and bounds use the parameters that the law holds, gamma in particular and not the mean it was found from, so
that no rounding on the way to them can come between the two.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Protocol

import numpy as np

from .errors import InvalidParameter, Unsupported
from .events import BinomialTrials, PoissonTrials, Trials, TruncatedNegativeBinomial
from .sampled_gaussian import Vector
from .values import shown

ROUNDING = 1e-12
UP = 1 + 2.0**-48
"""Raises by more than a dozen sums and products of positive doubles can lose."""

_LEAST_GAMMA = 1e-300  # below, 1/gamma leaves the range of a double


def mean(trials: Trials) -> float:
    """E[K], the expected number of trials, to the nearest double but a few.

    Raises:
      Unsupported: ``trials`` is a fixed number, or no law that is known here.
    """
    match trials:
        case TruncatedNegativeBinomial(shape=shape, gamma=gamma):
            return _truncated_mean(shape, gamma)
        case PoissonTrials(mean=expected):
            return expected
        case BinomialTrials(count=count, probability=probability):
            return count * probability
    raise _no_law(trials)


def truncated_negative_binomial(mean: float, shape: float) -> TruncatedNegativeBinomial:
    """The law of this ``shape`` (eta) with this expected number of trials, or a hair more, by bisection on gamma.

    Args:
      mean: expected number of trials, at least 1.
      shape: above -1. The smaller, the less a search of the same mean leaks, and the more its length varies.

    Raises:
      InvalidParameter: a mean below 1, a shape of -1 or less, or no gamma above 1e-300 that has this mean.
    """
    if not _is_number(mean) or not 1 <= mean < math.inf:
        raise InvalidParameter(
            f"mean = {shown(mean)}: a truncated negative binomial number of trials is at least 1, so its mean must be "
            "1 or more and finite. Use PoissonTrials(mean) where no trial at all is allowed."
        )
    if not _is_number(shape) or not -1 < shape < math.inf:
        raise InvalidParameter(
            f"shape = {shown(shape)}: it must be finite and above -1; 0 is logarithmic, 1 geometric."
        )
    low, high = _LEAST_GAMMA, 1.0
    if _truncated_mean(shape, low) < mean:
        raise InvalidParameter(
            f"mean = {mean:g}: with shape {shape:g} no gamma above {_LEAST_GAMMA:g} has it. Take a shape nearer 0."
        )
    while low < (middle := math.sqrt(low) * math.sqrt(high)) < high or low < (middle := (low + high) / 2) < high:
        low, high = (middle, high) if _truncated_mean(shape, middle) >= mean else (low, middle)
    return TruncatedNegativeBinomial(shape=float(shape), gamma=low)


def logarithmic(mean: float) -> TruncatedNegativeBinomial:
    """Shape 0: the default where privacy matters. Otherwise as :func:`truncated_negative_binomial`."""
    return truncated_negative_binomial(mean, 0.0)


def geometric(mean: float) -> TruncatedNegativeBinomial:
    """Shape 1: a length that varies less. Otherwise as :func:`truncated_negative_binomial`."""
    return truncated_negative_binomial(mean, 1.0)


def probability(trials: Trials, k: int) -> float:
    """P(K = k), rounded to no side; 0 for negative ``k``.

    Raises:
      Unsupported: ``trials`` is a fixed number, or no law that is known here.
    """
    mean(trials)  # refuses what is no law
    if k < 0 or (k == 0 and isinstance(trials, TruncatedNegativeBinomial)):
        return 0.0
    match trials:
        case TruncatedNegativeBinomial(shape=shape, gamma=gamma):
            # eta / (gamma^-eta - 1) = (t / (e^t - 1)) / ln(1/gamma) with t = eta ln(1/gamma)
            log_ratio = _log_bernoulli(shape * math.log(gamma)) - math.log(-math.log(gamma))
            log_product = math.lgamma(k + shape) - math.lgamma(1 + shape) - math.lgamma(k + 1)
            return math.exp(k * math.log1p(-gamma) + log_ratio + log_product)
        case PoissonTrials(mean=expected):
            return math.exp(k * math.log(expected) - expected - math.lgamma(k + 1))
        case BinomialTrials(count=count, probability=chance):
            if k > count:
                return 0.0
            log_ways = math.lgamma(count + 1) - math.lgamma(k + 1) - math.lgamma(count - k + 1)
            return math.exp(log_ways + k * math.log(chance) + (count - k) * math.log1p(-chance))


def sample(trials: Trials, rng: np.random.Generator) -> int:
    """One number of trials from the law, without a cap: all of them have to be run.

    For a truncated negative binomial law, K - 1 is negative binomial with shape eta + 1, accepted with probability 1/K:
    ``P(K = k) ~ (1-gamma)^k Gamma(k + eta) / Gamma(k + 1)``.  E[K] proposals are needed in the mean.

    Raises:
      Unsupported: ``trials`` is a fixed number, or no law that is known here.
      InvalidParameter: so many trials to be expected that no integer holds them.
    """
    match trials:
        case TruncatedNegativeBinomial(shape=shape, gamma=gamma):
            while True:
                try:
                    proposals = 1 + rng.negative_binomial(shape + 1, gamma, size=64)
                except ValueError as error:
                    raise InvalidParameter(f"gamma = {gamma:g}: no machine runs so many trials; {error}.") from None
                accepted = proposals[rng.random(64) * proposals < 1]
                if accepted.size:
                    return int(accepted[0])
        case PoissonTrials(mean=expected):
            return int(rng.poisson(expected))
        case BinomialTrials(count=count, probability=chance):
            return int(rng.binomial(count, chance))
    raise _no_law(trials)


class Law(Protocol):
    """What the theorems ask of the number of trials. ``w(u) = phi'(1 - u)``."""

    @property
    def mean(self) -> float:
        """E[K] = w(0), rounded up."""
        ...

    @property
    def log_nothing(self) -> float | None:
        """ln P(K = 0), or None where ln phi' is convex and it is not needed."""
        ...

    def climb(self, u: Vector, above: Vector) -> Vector:
        """ln w(u) - ln w(above) for above >= u, rounded up."""
        ...

    def where(self, fallen: Vector) -> Vector:
        """About the u at which w(u) = w(0) e^-fallen; 1 or more if there is none."""
        ...

    @property
    def odds(self) -> tuple[float, float]:
        """c and ln r of ``ln S = ln m + (alpha-1) c min_beta (1/beta) ln(1 + r e^L(beta))``; c = inf: there is none."""
        ...


@dataclass(frozen=True)
class _TruncatedNegativeBinomial:
    shape: float
    gamma: float
    log_nothing = None

    @property
    def mean(self) -> float:
        return _truncated_mean(self.shape, self.gamma) * (1 + ROUNDING)

    def climb(self, u: Vector, above: Vector) -> Vector:
        gained = (1 - self.gamma) * (above - u) / (self.gamma + (1 - self.gamma) * u)
        return (self.shape + 1) * np.log1p(gained) * UP

    def where(self, fallen: Vector) -> Vector:
        with np.errstate(over="ignore"):
            return self.gamma * np.expm1(fallen / (self.shape + 1)) / (1 - self.gamma)

    @property
    def odds(self) -> tuple[float, float]:
        return self.shape + 1, math.log1p(-self.gamma) - math.log(self.gamma)


@dataclass(frozen=True)
class _Poisson:
    mean: float
    log_nothing = None
    odds = (math.inf, 0.0)

    def climb(self, u: Vector, above: Vector) -> Vector:
        return self.mean * (above - u) * UP

    def where(self, fallen: Vector) -> Vector:
        return fallen / self.mean


@dataclass(frozen=True)
class _Binomial:
    count: int
    probability: float

    @property
    def mean(self) -> float:
        return self.count * self.probability * UP

    @property
    def log_nothing(self) -> float | None:
        return self.count * math.log1p(-self.probability) if self.count > 1 else None

    def climb(self, u: Vector, above: Vector) -> Vector:
        stays = (1 - self.probability) + self.probability * (1 - above)  # 1 - p above, without cancellation
        with np.errstate(divide="ignore", invalid="ignore"):
            gained = np.where(stays > 0, np.log1p(self.probability * (above - u) / stays), np.inf)
        return (self.count - 1) * gained * UP if self.count > 1 else np.zeros_like(u)

    def where(self, fallen: Vector) -> Vector:
        return -np.expm1(-fallen / (self.count - 1)) / self.probability if self.count > 1 else fallen

    @property
    def odds(self) -> tuple[float, float]:
        return self.count - 1, math.log(self.probability) - math.log1p(-self.probability)


def law_of(trials: Trials) -> Law:
    """What the theorems ask of ``trials``; refuses what is no law."""
    match trials:
        case TruncatedNegativeBinomial(shape=shape, gamma=gamma):
            if gamma < _LEAST_GAMMA:
                raise InvalidParameter(f"gamma = {gamma:g}: below {_LEAST_GAMMA:g} no search ends; take a larger one.")
            return _TruncatedNegativeBinomial(shape, gamma)
        case PoissonTrials(mean=expected):
            return _Poisson(expected)
        case BinomialTrials(count=count, probability=chance):
            return _Binomial(count, chance)
    raise _no_law(trials)


def _no_law(trials: object) -> Unsupported:
    if _is_number(trials):
        return Unsupported(
            f"trials = {shown(trials)}: for a fixed number of trials no theorem is cheaper than releasing all of them. "
            "Charge full_composition(event, count), or draw the number from a law, such as logarithmic(mean), before "
            "the search."
        )
    return Unsupported(
        f"trials = {shown(trials)}: the laws are TruncatedNegativeBinomial, PoissonTrials and BinomialTrials. Charge "
        "full_composition(event, count) for any other number of trials."
    )


def _is_number(value: object) -> bool:
    return isinstance(value, int | float | np.integer | np.floating) and not isinstance(value, bool)


def _truncated_mean(shape: float, gamma: float) -> float:
    """eta (1-gamma) / (gamma (1 - gamma^eta)), by t / (1 - e^-t) with t = eta ln(1/gamma), which is 1 at eta = 0."""
    log_inverse = -math.log(gamma)
    return (1 - gamma) / (gamma * log_inverse) * math.exp(_log_bernoulli(shape * log_inverse))


def _log_bernoulli(t: float) -> float:
    """ln(t / (1 - e^-t)), without overflow."""
    if t == 0:
        return 0.0
    return math.log(abs(t) / -math.expm1(-abs(t))) + min(t, 0.0)
