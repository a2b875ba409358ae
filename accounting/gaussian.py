r"""Exact privacy of composed Gaussian mechanisms without sampling, and of one sampled one.

Gaussian releases with multipliers s_1, .., s_k (adaptively chosen in advance of their noise) are together exactly as
revealing as one with ``mu = sqrt(sum 1/s_i^2)``, and

    delta(epsilon) = Phi(mu/2 - epsilon/mu) - e^epsilon Phi(-mu/2 - epsilon/mu)

Source: Balle and Wang, "Improving the Gaussian mechanism for differential privacy", ICML 2018, theorem 8
(https://arxiv.org/abs/1805.06530); composition: Dong, Roth and Su 2022, corollary 3.3.

One Gaussian release on a Poisson sample of rate q, without composition, has

    delta(log(1 + q (e^epsilon - 1))) = q delta_mu(epsilon)

in the direction "removed", exactly: ``((1-q) Q + q P) - (1 + q (g-1)) Q = q (P - g Q)``.  The direction "added" is
below that: with ``g' = 1 + q (g-1)``, ``Q - g' ((1-q) Q + q P) = q (a Q - g' P)``, ``a = 1 - (1-q)(g-1) <= 1``, and
``g' / a >= g`` (or a <= 0), so that it is at most ``q H_g(Q|P) = q H_g(P|Q)``.  (Balle, Barthe and Gaboardi 2018,
https://arxiv.org/abs/1807.01647, theorem 8.)

The difference is evaluated as ``Phi(-t) (1 - M(t + mu) / M(t))`` with ``t = epsilon/mu - mu/2`` and Mills' ratio
M = (1 - Phi)/phi, which neither overflows nor cancels in the tails.  Values are exact up to the rounding of double
precision; that rounding is added to upper bounds and taken from lower bounds.
"""

from __future__ import annotations

import math

import scipy

from .normal_form import Counted, precision

# Relative error of one Mills ratio is a few units of 2^-53; the ratio of two is far below this.
_ROUNDING = 1e-14


def mu_of(atoms: Counted) -> float:
    """``mu = sqrt(sum count / noise_multiplier^2)`` of composed unsampled Gaussians; 0 for none."""
    return math.sqrt(precision(atoms))


def epsilon_bounds(mu: float, delta: float) -> tuple[float, float, float]:
    """(lower, estimate, upper) of the epsilon at ``delta``; they differ by rounding only."""
    lower, estimate, upper = (_epsilon(mu, math.log(delta), slack) for slack in (-_ROUNDING, 0.0, _ROUNDING))
    return lower * (1 - _ROUNDING), estimate, upper * (1 + _ROUNDING)


def delta_bounds(mu: float, epsilon: float) -> tuple[float, float, float]:
    """(lower, estimate, upper) of the delta at ``epsilon``; they differ by rounding only."""
    if mu == 0:
        return 0.0, 0.0, 0.0
    offset = epsilon / mu - mu / 2
    if offset > 1e150:  # less than the least double, and squares would overflow
        return 0.0, 0.0, math.ulp(0.0)
    lower, estimate, upper = (math.exp(_log_delta(offset, mu, slack)) for slack in (-_ROUNDING, 0.0, _ROUNDING))
    return lower * (1 - _ROUNDING), estimate, min(1.0, upper * (1 + _ROUNDING) + math.ulp(0.0))


def sampled_epsilon_bounds(mu: float, rate: float, delta: float) -> tuple[float, float, float]:
    """(lower, estimate, upper) of the epsilon at ``delta`` of one release on a Poisson sample."""
    if rate <= delta:  # a record that is not drawn shows in nothing
        return 0.0, 0.0, 0.0
    found = []
    for slack, base in zip((-_ROUNDING, 0.0, _ROUNDING), epsilon_bounds(mu, delta / rate), strict=True):
        near = base if rate == 1 else math.log1p(rate * math.expm1(base)) if base < 700 else base + math.log(rate)
        found.append(max(0.0, near * (1 + slack) + (0 if base < 700 else math.copysign(1e-12, slack))))
    return found[0], found[1], found[2]


def sampled_delta_bounds(mu: float, rate: float, epsilon: float) -> tuple[float, float, float]:
    """(lower, estimate, upper) of the delta at ``epsilon`` of one release on a Poisson sample."""
    if rate == 0:
        return 0.0, 0.0, 0.0
    found = []
    for place, slack in enumerate((_ROUNDING, 0.0, -_ROUNDING)):
        at = epsilon * (1 + 4 * slack)
        log_quotient = (at + math.log(-math.expm1(-at)) if at > 0 else -math.inf) - math.log(rate)
        base = math.log1p(math.expm1(at) / rate) if log_quotient < 700 else log_quotient
        found.append(rate * delta_bounds(mu, max(0.0, base * (1 + 4 * slack)))[place] * (1 - slack))
    return found[0], found[1], min(rate, found[2] + math.ulp(0.0))


def _epsilon(mu: float, log_delta: float, slack: float) -> float:
    """The least epsilon >= 0 whose delta, moved by ``slack``, is at most the target: bisection on t."""
    if mu == 0 or _log_delta(-mu / 2, mu, slack) <= log_delta:
        return 0.0
    low, high = -mu / 2, 1.0
    while _log_delta(high, mu, slack) > log_delta:  # ends: Phi(-t) alone falls below any positive delta
        low, high = high, 2 * high
    while low < (middle := (low + high) / 2) < high:
        low, high = (middle, high) if _log_delta(middle, mu, slack) > log_delta else (low, middle)
    return mu * (mu / 2 + high)


def _log_delta(offset: float, mu: float, slack: float) -> float:
    """log of delta at ``epsilon = mu (mu/2 + offset)``."""
    share = -math.expm1(_log_mills(offset + mu) - _log_mills(offset)) + slack
    return float(scipy.special.log_ndtr(-offset)) + math.log(share) if share > 0 else -math.inf


def _log_mills(x: float) -> float:
    """log((1 - Phi(x)) / phi(x)), up to a constant."""
    if x > -5:
        return math.log(scipy.special.erfcx(x / math.sqrt(2)))
    return float(scipy.special.log_ndtr(-x)) + x * x / 2 + math.log(2)
