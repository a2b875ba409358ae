r"""Lower bounds of epsilon that no accountant had a hand in. Knows nothing of accounting.

Whoever sees the outputs may run any test on them.  A set A of outputs with probability P(A) when the record is in the
data and Q(A) when it is not shows that (epsilon, delta)-privacy needs

    epsilon >= log((P(A) - delta) / Q(A))

so every test whose two probabilities have a closed form gives a lower bound at any delta, however small:

* *sum test*: the sum of the outputs of T Poisson-sampled Gaussian steps is N(0, T s^2) under Q and a binomial mixture
  of N(k, T s^2) under P.  Nearly the best test where one step reveals little.
* *threshold test*: the number of outputs above a threshold is binomial under both.  Better where a single drawn step
  betrays the record.

Between them they miss up to two fifths of the truth where neither is good (noise 0.7, say).

For one step the truth itself has a closed form: P = (1 - q) Q + q N(1, s^2), so with ``t = log1p((e^eps - 1)/q)``

    E_eps(P || Q) = q delta_gauss(t)
    E_eps(Q || P) = (1 - e^eps (1 - q)) delta_gauss(eps + log q - log(1 - e^eps (1 - q)))    where that is positive.
"""

from __future__ import annotations

import math

import mpmath
import numpy as np
import scipy

Vector = np.ndarray
# The logarithms below are right to a relative and an absolute 1e-11; losing more than that costs nothing.
_ROUNDING = 1e-8


def gaussian_delta(mu: float, epsilon: float) -> float:
    """The exact delta of a Gaussian release of sensitivity / standard deviation ``mu``, to 40 digits."""
    with mpmath.workdps(40):
        mu, epsilon = mpmath.mpf(mu), mpmath.mpf(epsilon)
        return float(mpmath.ncdf(mu / 2 - epsilon / mu) - mpmath.exp(epsilon) * mpmath.ncdf(-mu / 2 - epsilon / mu))


def gaussian_epsilon(mu: float, delta: float) -> float:
    """The epsilon at which :func:`gaussian_delta` is ``delta``, by bisection; 0 if it is never that large."""
    if gaussian_delta(mu, 0.0) <= delta:
        return 0.0
    low, high = 0.0, 1.0
    while gaussian_delta(mu, high) > delta:
        low, high = high, 2 * high
    while high - low > 1e-13 * high:
        middle = (low + high) / 2
        low, high = (middle, high) if gaussian_delta(mu, middle) > delta else (low, middle)
    return low


def one_step_delta(noise: float, rate: float, epsilon: float) -> float:
    """The exact delta of one Poisson-sampled Gaussian step, the larger of both directions."""
    removed = rate * gaussian_delta(1 / noise, math.log1p(math.expm1(epsilon) / rate))
    left = 1 - math.exp(epsilon) * (1 - rate)
    if left <= 0:
        return removed
    return max(removed, left * gaussian_delta(1 / noise, epsilon + math.log(rate) - math.log(left)))


def sum_test(noise: float, rate: float, steps: int, delta: float) -> float:
    """A lower bound of epsilon from the sum of all outputs."""
    mean, spread = steps * rate, 10 * math.sqrt(steps * rate * (1 - rate)) + 60
    drawn = _thinned(mean - spread, mean + spread, steps, 3000)  # fewer k only lower P(A)
    scale = math.sqrt(steps) * noise
    farthest = mean + spread / 2 + (3 + math.sqrt(-2 * math.log(delta))) * scale
    cut = np.linspace(-3 * scale, farthest, 1200)[:, None]
    with np.errstate(divide="ignore"):
        share = np.log(scipy.stats.binom.pmf(drawn, steps, rate))
    p = scipy.special.logsumexp(share + scipy.special.log_ndtr((drawn - cut) / scale), axis=1)
    return _best(p, scipy.special.log_ndtr(-cut[:, 0] / scale), delta)


def threshold_test(noise: float, rate: float, steps: int, delta: float) -> float:
    """A lower bound of epsilon from how many outputs lie above a threshold, for the best of some thresholds."""
    found = 0.0
    for threshold in (*np.linspace(-1, 3, 17), *(noise * np.linspace(-2, 6, 17))):
        without = float(scipy.special.ndtr(-threshold / noise))
        sampled = (1 - rate) * without + rate * float(scipy.special.ndtr((1 - threshold) / noise))
        if not 1e-300 < without < sampled < 1:
            continue
        mean, spread = steps * sampled, 10 * math.sqrt(steps * sampled * (1 - sampled)) + 60
        least = _thinned(mean - spread, mean + spread, steps, 400)
        with np.errstate(divide="ignore"):
            p, q = (np.log(scipy.stats.binom.sf(least - 1, steps, share)) for share in (sampled, without))
        found = max(found, _best(p, np.where(q > -600, q, math.inf), delta))
    return found


def _best(log_p: Vector, log_q: Vector, delta: float) -> float:
    """The largest ``log((P - delta)/Q)`` over the tests, and at least 0."""
    useful = log_p > math.log(delta) + 1e-6
    log_p, log_q = log_p[useful], log_q[useful]
    bounds = log_p + np.log1p(-np.exp(math.log(delta) - log_p)) - log_q
    best = float(np.max(bounds, initial=0.0))
    return max(0.0, best * (1 - _ROUNDING) - _ROUNDING)


def _thinned(low: float, high: float, most: int, size: int) -> Vector:
    low, high = max(0, math.floor(low)), min(most, math.ceil(high))
    return np.unique(np.round(np.linspace(low, high, min(size, high - low + 1))))
