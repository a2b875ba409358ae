r"""Renyi moments of one Poisson-subsampled Gaussian step, rounded up.

With mu0 = N(0, s^2), mu1 = N(1, s^2) and rate q, a step is at most as revealing as the pair
``P = (1 - q) mu0 + q mu1`` against ``Q = mu0``, in both directions, and

    A(alpha) = E_Q[(P/Q)^alpha] >= E_P[(Q/P)^alpha]        (the order-alpha Renyi divergence is log A / (alpha - 1))

so that one number covers "the record was added" and "it was removed".
Source: Mironov, Talwar and Zhang, "Renyi differential privacy of the sampled Gaussian mechanism" (2019,
https://arxiv.org/abs/1908.10530), theorems 4 and 5.

What is computed is ``log(A - 1)``, since both forms below are sums of *positive* terms and nothing cancels, however
little a step reveals:

* integer alpha: ``A - 1 = sum_k C(alpha, k) (1-q)^(alpha-k) q^k (e^{k(k-1) / 2s^2} - 1)``  (exact);
* fractional alpha: ``A - 1 = E_Q[f(u)]``, ``f(u) = (1 + u)^alpha - 1 - alpha u >= 0``, ``u = q (mu1/mu0 - 1)``,
  by the trapezoid rule, with bounds for everything that the rule leaves out:

  - *grid*: in z = x/s the integrand is analytic for ``|Im z| < pi s`` and there ``|1 + u(z + ia)| <= 1 + u(z)`` and
    ``|phi(z + ia)| = phi(z) e^{a^2/2}``; with step h the rule errs by at most
    ``2 e^{a^2/2} (A + 1 + 2 alpha q) / (e^{2 pi a / h} - 1)`` for every a below pi s (Trefethen and Weideman 2014,
    theorem 5.1);
  - *left of -L*: ``f <= alpha q`` there, so at most ``alpha q Phi(-L)``;
  - *right of alpha/s + L*: ``(1 + u)^alpha <= max(1, r)^alpha`` for ``r = mu1/mu0``, so at most
    ``e^{alpha(alpha-1)/2s^2} Phi(-L) <= q^-alpha A Phi(-L)``;
  - these two are integrals; the grid points left out add at most h times the value at the cut, and
    ``h phi(L) <= 2 h L Phi(-L)``.

* fractional alpha at small s, where the grid would be long: ``log A`` is convex in alpha, so the chord between
  neighbouring integers is an upper bound.

Rounding: every term's exponent is right to a few units of 2^-53 of the largest number in it; the result is raised by
more than that.
"""

from __future__ import annotations

import math
from functools import lru_cache

import numpy as np
import scipy
from numpy.typing import NDArray

Vector = NDArray[np.float64]

_MOST_FRACTIONAL = 11.0
FRACTIONAL = np.unique(
    np.round(
        np.concatenate(
            [
                1 + np.array([0.001, 0.002, 0.005, 0.01, 0.015, 0.02, 0.03, 0.04, 0.05, 0.06, 0.07, 0.08, 0.09]),
                np.arange(1.1, 3.0, 0.05),
                np.arange(3.0, _MOST_FRACTIONAL, 0.1),
            ]
        ),
        4,
    )
)
FRACTIONAL = FRACTIONAL[np.round(FRACTIONAL) != FRACTIONAL]
INTEGER = np.unique(np.concatenate([np.arange(2, 65), np.round(np.geomspace(64, 1e4, 48)), [128, 256, 512, 1024]]))
ORDERS: Vector = np.sort(np.concatenate([FRACTIONAL, INTEGER]))
UP_TO_LAST: Vector = np.arange(INTEGER[-1] + 1)

_RELATIVE_SLACK = 1e-9
_LONGEST_GRID = 8_000


@lru_cache(maxsize=256)
def log_moment_excess(noise_multiplier: float, rate: float) -> Vector:
    """``log(A(alpha) - 1)`` for every order of ``ORDERS``, never below the true value; ``rate`` in (0, 1]."""
    if rate == 1:
        result = log_expm1(ORDERS * (ORDERS - 1) / 2 * noise_multiplier**-2) + _RELATIVE_SLACK
    else:
        rate = max(rate, 1e-100)  # moments grow with the rate; below this, squares would underflow
        integer = at_integers(log_expm1(UP_TO_LAST * (UP_TO_LAST - 1) / 2 * noise_multiplier**-2), rate)
        fractional = _at_fractions(noise_multiplier, rate)
        result = with_fractions(integer, by_chords(integer) if fractional is None else fractional)
    result.setflags(write=False)
    return result


def with_fractions(integer: Vector, fractional: Vector) -> Vector:
    """One value for every order of ``ORDERS`` from those at ``INTEGER`` and at ``FRACTIONAL``."""
    result = np.empty_like(ORDERS)
    result[np.searchsorted(ORDERS, INTEGER)] = integer
    result[np.searchsorted(ORDERS, FRACTIONAL)] = fractional
    return result


def log_expm1(x: Vector) -> Vector:
    """log(e^x - 1) for x >= 0, without overflow; -inf at 0."""
    with np.errstate(divide="ignore"):
        return x + np.log(-np.expm1(-x))


def log1p_exp(x: Vector) -> Vector:
    """log(1 + e^x), without overflow: from the log of an excess to the log of the moment."""
    return np.logaddexp(0.0, x)


@lru_cache(maxsize=1)
def _binomials() -> tuple[NDArray[np.int64], NDArray[np.int64], Vector, NDArray[np.int64]]:
    """All (alpha, k) with 2 <= k <= alpha in one row: alpha, k, log C(alpha, k), and where each alpha begins."""
    orders = INTEGER.astype(np.int64)
    k = np.concatenate([np.arange(2, order + 1) for order in orders])
    alpha = np.repeat(orders, orders - 1)
    log_factorial = scipy.special.gammaln(np.arange(orders[-1] + 1) + 1.0)
    starts = np.concatenate([[0], np.cumsum(orders - 1)[:-1]])
    return alpha, k, log_factorial[alpha] - log_factorial[k] - log_factorial[alpha - k], starts


def at_integers(growth: Vector, rate: float) -> Vector:
    """log(A - 1) at ``INTEGER`` by the exact sum; ``growth[k]`` is log(A(k) - 1) without sampling, k = 0, 1, ..."""
    alpha, k, log_binomial, starts = _binomials()
    terms = log_binomial + (alpha - k) * math.log1p(-rate) + k * math.log(rate) + growth[k]
    largest = np.maximum.reduceat(terms, starts)
    total = np.add.reduceat(np.exp(terms - np.repeat(largest, INTEGER.astype(np.int64) - 1)), starts)
    # The largest numbers that were added up to make an exponent.
    scale = scipy.special.gammaln(INTEGER + 1) - INTEGER * math.log(rate) + np.abs(growth[INTEGER.astype(np.int64)])
    return largest + np.log(total) + _RELATIVE_SLACK + 1e-14 * scale


def _at_fractions(noise_multiplier: float, rate: float) -> Vector | None:
    """By quadrature; None where the grid would be long."""
    s = noise_multiplier
    margin = math.sqrt(2 * (80 - _MOST_FRACTIONAL * math.log(rate)))
    step = min(0.25, 0.2 * s)
    if not (_MOST_FRACTIONAL / s + 2 * margin) / step < _LONGEST_GRID:
        return None
    z = np.arange(-margin, _MOST_FRACTIONAL / s + margin + step, step)
    log_ratio = z / s - 0.5 / s**2
    with np.errstate(over="ignore"):
        u = rate * np.expm1(log_ratio)
    log_1u = np.where(u < 1, np.log1p(u), np.logaddexp(math.log1p(-rate), math.log(rate) + log_ratio))
    log_density = -0.5 * z**2 - 0.5 * math.log(2 * math.pi) + math.log(step)
    result = np.array([_log_sum(_log_f(order, u, log_1u) + log_density) for order in FRACTIONAL])

    strip = min(0.999 * math.pi * s, 2 * math.pi / step)
    log_grid_error = math.log(2) + strip**2 / 2 - 2 * math.pi * strip / step + 1e-9
    log_moments = log1p_exp(result)
    left_out = np.logaddexp(
        log_grid_error + np.logaddexp(log_moments, np.log1p(2 * FRACTIONAL * rate)),
        scipy.special.log_ndtr(-margin)
        + math.log1p(2 * step * margin)
        + np.logaddexp(log_moments - FRACTIONAL * math.log(rate), np.log(FRACTIONAL * rate)),
    )
    scale = 80 + _MOST_FRACTIONAL * (abs(math.log(rate)) + 1 / s**2) + FRACTIONAL**2 / s**2
    # Twice what was left out, since the bounds are stated with the true A, of which log_moments may be a hair short.
    return np.logaddexp(result, left_out + math.log(2)) + _RELATIVE_SLACK + 1e-14 * scale


def _log_f(alpha: float, u: Vector, log_1u: Vector) -> Vector:
    """log((1 + u)^alpha - 1 - alpha u) for u > -1, by series near 0 and without overflow far away."""
    power = alpha * log_1u
    with np.errstate(divide="ignore", over="ignore", invalid="ignore"):
        series = 1 + (alpha - 2) * u / 3 * (1 + (alpha - 3) * u / 4 * (1 + (alpha - 4) * u / 5))
        near = math.log(alpha * (alpha - 1) / 2) + 2 * np.log(np.abs(u)) + np.log(series)
        middle = np.log(np.expm1(power) - alpha * u)
        far = power + np.log1p((alpha - 1) * np.exp(-power) - alpha * np.exp(log_1u - power))
    return np.where(np.abs(u) < 1e-3 / alpha, near, np.where(power > 30, far, middle))


def _log_sum(terms: Vector) -> float:
    largest = float(np.max(terms))
    return largest + math.log(float(np.sum(np.exp(terms - largest))))


def by_chords(integer: Vector) -> Vector:
    """Upper bounds at ``FRACTIONAL`` from the convexity of log A in alpha, where log A(1) = 0."""
    chord = np.interp(FRACTIONAL, np.concatenate([[1.0], INTEGER]), np.concatenate([[0.0], log1p_exp(integer)]))
    return log_expm1(chord) + _RELATIVE_SLACK
