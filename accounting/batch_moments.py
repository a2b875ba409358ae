r"""Renyi moments of everything that is released about one batch: unsampled, and on a Poisson subsample.

For releases that each have a *symmetric* worst pair (P, Q): some involution swaps P and Q, so that the ratio r = P/Q
has under P the law that 1/r has under Q.  With ``A(alpha) = E_Q[r^alpha]``, and for each formula a form of A - 1 in
which nothing cancels (``phi(y) = e^y - 1 - y >= 0``):

* Gaussian noise, multiplier s: N(1, s^2) against N(0, s^2); ``A = e^{alpha(alpha-1)/2s^2}``.
* discrete Gaussian noise, multiplier s: the same A, see below.
* Laplace noise, scale b: Lap(1, b) against Lap(0, b) (Mironov 2017, https://arxiv.org/abs/1702.07476, proposition 6);
  ``A - 1 = (alpha phi((alpha-1)/b) + (alpha-1) phi(-alpha/b)) / (2 alpha - 1)``.
* any e-private release: randomised response, by which all of them can be simulated (Kairouz, Oh and Viswanath 2015,
  https://arxiv.org/abs/1311.0776, theorem 3.4); ``A - 1 = (e^{alpha e} - 1)(e^{(alpha-1)e} - 1) e^{(1-alpha)e} /
  (1 + e^e)``.

Their logarithms add up under adaptive composition, and the composed worst pair is the product pair, again symmetric.
An (e, d)-private release with d > 0 has no finite moment.

**Discrete Gaussian noise.**  Q has independent coordinates on the integers, with probabilities proportional to
``exp(-x_i^2 / 2 s_i^2)``, and P is Q moved by the whole-numbered vector a.  With ``t = sum (a_i / s_i)^2 <= 1/s^2``,
``E_Q[(P/Q)^alpha] = e^{alpha(alpha-1) t / 2} prod theta_i(alpha a_i) / theta_i(0)``, where ``theta_i(c) = sum_x
exp(-(x - c)^2 / 2 s_i^2)`` is largest at whole c, for it has positive Fourier coefficients.  So A is at most that of
the continuous noise at every alpha, and equal to ``e^{alpha(alpha-1) t / 2}`` at whole alpha (Canonne, Kamath and
Steinke 2020, https://arxiv.org/abs/2004.00010, proposition 5 and theorem 14).  The map x -> a - x of the integer
vectors to themselves swaps P and Q, so the pair is symmetric; this needs no density, only that a is whole.

**Laplace noise on vectors.** Shifting coordinate i by a_i reveals at most what one coordinate shifted by the sum does.
Scale 1, ``W`` the set where the log-ratio, a sum of one term per coordinate, exceeds log gamma, H the hockey-stick
divergence there. Then ``dH/da_i = E_P[sign(x_i - a_i) 1_W]``, hence ``dH/da_i - dH/da_j`` is twice ``P(x_i > a_i, x_j <
a_j, W) - P(x_i < a_i, x_j > a_j, W)``. With e exponential the two coordinates add ``max(a_i + a_j - 2e, a_i - a_j)`` to
the log-ratio in the first event and ``max(a_i + a_j - 2e, a_j - a_i)`` in the second; so H grows as the larger shift
takes from the smaller, until one is left.

For discrete noise nothing more is known: pairs of one t differ in their hockey-stick divergences, and none of them is
the worst.  What follows about sampling therefore speaks of Renyi moments at whole alpha and of chords between them (log
A is convex in alpha for any pair); the integrals for fractional alpha, which take the continuous densities, do not.

**Poisson sampling.** With and without the record, given the draw of the others, the batch gives laws m1 and m0, and m0
and m1 are no easier to tell apart than P and Q, in either order.  For ``g' = 1 - q + q g``,
``H_g'((1-q) m0 + q m1 | m0) = q H_g(m1 | m0)``, and for ``g (1-q) < 1``, ``H_g(m0 | (1-q) m0 + q m1) = c H_{gq/c}(m0 |
m1)`` with ``c = 1 - g (1-q)``; outside of these both sides are those of any pair.  So the pair R = (1-q) Q + q P
against Q bounds the sampled release, and so do their Renyi moments, which are positive mixtures of hockey-stick
divergences.  For integer alpha

    A(alpha) - 1 = sum_k C(alpha, k) (1-q)^(alpha-k) q^k (A_unsampled(k) - 1)

exactly, and ``log A`` is convex in alpha, so that chords bound it between integers.

*The other direction is smaller.*  Write m(r) = 1 - q + q r for R/Q and F(r) = m(r)^alpha - m(r)^(1-alpha). By the
symmetry ``2 E_Q[F(r)] = E_Q[F(r) + r F(1/r)]``, and this is positive at each r > 1 (and so at each r): with
x = log m(r), y = -log m(1/r) and a = alpha - 1/2 it is ``2 sqrt(m(r)) sinh(a x) - 2 r sqrt(m(1/r)) sinh(a y)``, where
x >= y > 0 as m(r) m(1/r) = 1 + q (1-q)(r + 1/r - 2).  At a = 1/2 that is (m(r) - 1) - r (1 - m(1/r)) = 0, and
sinh(a x) / sinh(a y) grows with a.  Hence E_R[(Q/R)^alpha] = E_Q[m^(1-alpha)] <= A(alpha).  (For Gaussian noise this
is theorem 5 of Mironov, Talwar and Zhang 2019, https://arxiv.org/abs/1908.10530.)

*Without a worst pair* (discrete Gaussian noise).  Fix the draw of the others.  The moments of (1-q) m0 + q m1 against
m0 are positive combinations of those of m1 against m0 at whole numbers up to alpha, hence at most A(alpha) above, and
for one release m0, m1 are a symmetric pair, so that the other direction is smaller.  Moments are jointly convex, so
both bounds survive averaging over the draw.  Of several releases on one batch the later may be chosen by what the
earlier gave, and then no map need swap the pair.  But F(r) + r F(1/r) >= 0 holds for every r, whatever its law:
``E_m0[F(r)] + E_m1[F(1/r)] >= 0`` is ``A(R|m0) - A(m0|R) + A(R'|m1) - A(m1|R') >= 0`` with R' = (1-q) m1 + q m0, and as
A(m1|R') >= 1, ``A(m0|R) - 1 <= (A(R|m0) - 1) + (A(R'|m1) - 1) <= 2 (A(alpha) - 1)``.
"""

from __future__ import annotations

import math

import numpy as np

from .events import ApproximateDP, DiscreteGaussian, Gaussian, Laplace
from .normal_form import Counted
from .sampled_gaussian import (
    ORDERS,
    UP_TO_LAST,
    Vector,
    at_integers,
    by_chords,
    log1p_exp,
    log_expm1,
    log_moment_excess,
    with_fractions,
)

# Each formula is right to a few units of 2^-53 of the largest number in it.
_SLACK = 1e-14


def sampled_log_excess(batch: Counted, rate: float) -> Vector:
    """log(A - 1) for every order of ``ORDERS``, never below the truth, of ``batch`` on a Poisson subsample."""
    match batch:
        case [(Gaussian(noise_multiplier=noise), 1)]:
            return log_moment_excess(noise, rate)
    if rate == 1:
        return log_excess(batch, ORDERS)
    growth = log_excess(batch, UP_TO_LAST)
    if np.isinf(growth[-1]):
        return np.full_like(ORDERS, np.inf)
    integer = at_integers(growth, max(rate, 1e-100))  # moments grow with the rate; below this, squares would underflow
    if sum(count for _, count in batch) > 1 and any(isinstance(atom, DiscreteGaussian) for atom, _ in batch):
        integer = integer + math.log(2)
    return with_fractions(integer, by_chords(integer))


def log_excess(batch: Counted, orders: Vector) -> Vector:
    """log(A - 1) without sampling at every one of ``orders``, none of them strictly between 0 and 1."""
    parts = [(_log_excess_of(atom, orders), count) for atom, count in batch]
    composed = log_expm1(np.sum([count * log1p_exp(part) for part, count in parts], axis=0))
    # prod A_i - 1 >= sum (A_i - 1), which does not vanish where A_i rounds to 1.
    return np.maximum(composed, np.logaddexp.reduce([math.log(count) + part for part, count in parts]))


def _log_excess_of(atom: object, orders: Vector) -> Vector:
    above = orders - 1
    match atom:
        case Gaussian(noise_multiplier=noise) | DiscreteGaussian(noise_multiplier=noise):
            return log_expm1(orders * above / 2 * noise**-2)
        case Laplace(noise_multiplier=scale):
            with np.errstate(divide="ignore"):
                up = np.log(orders) + _log_phi(above / scale)
                down = np.log(np.maximum(above, 0)) + _log_phi(-orders / scale)
            return np.logaddexp(up, down) - np.log(np.abs(2 * orders - 1)) + _SLACK * (1 + orders / scale)
        case ApproximateDP(epsilon=e, delta=0.0):
            log_odds = np.logaddexp(0.0, e)
            excess = log_expm1(orders * e) + log_expm1(np.maximum(above, 0) * e) - above * e - log_odds
            return excess + _SLACK * (1 + orders * e)
        case _:
            return np.full_like(orders, np.inf)


def _log_phi(y: Vector) -> Vector:
    """log(e^y - 1 - y), by series near 0 and without overflow far away."""
    near = np.abs(y) < 1e-3
    small, large = np.where(near, y, 1.0), np.where(near, 1.0, y)
    with np.errstate(divide="ignore"):
        series = 2 * np.log(np.abs(small)) + np.log1p(small / 3 * (1 + small / 4 * (1 + small / 5))) - math.log(2)
    far = np.where(
        large > 1,
        large + np.log1p(-(1 + large) * np.exp(-np.abs(large))),
        np.log(np.expm1(np.minimum(large, 1.0)) - np.minimum(large, 1.0)),
    )
    return np.where(near, series, far)
