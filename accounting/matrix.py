r"""Matrix mechanisms (correlated noise): Toeplitz strategies, their sensitivity rounded up, and the events they are.

A run of n steps with per-step sums G (n rows) releases ``G + C^-1 Z = C^-1 (C G + Z)``, Z with independent rows.  C is
lower triangular, so step t needs only the noise drawn so far, and the run is a post-processing of the *one* Gaussian
mechanism ``C G + Z``, also when later rows of G depend on earlier releases (Denisov, McMahan, Rush, Smith and Thakurta
2022, https://arxiv.org/abs/2202.08312, theorem 2.1).  What it reveals is decided by its sensitivity: how far ``C G``
moves, in units of one participation, when one record changes.  What it is good for is the error of the running sums
``A C^-1 Z``, A the lower-triangular matrix of ones.

Strategies are Toeplitz, ``C[t, s] = c[t - s]``, and given by their first column: a vector c of n coefficients.
``accounting.plan_noise`` compares what they are good for under one epsilon.

**Sensitivity.**  A record takes part in at most k steps t_1 < t_2 < .., at least b apart, each time with a contribution
of norm at most 1.  ``C G`` then moves by ``sum_i C[:, t_i] x_i``, whose square is at most
``sum_ij <|C|[:, t_i], |C|[:, t_j]>``, with equality when c >= 0 and all x_i are equal.  For s <= t,
``<|C|[:, s], |C|[:, t]> = sum_{v < n - t} |c[v + t - s]| |c[v]|``, a sum with fewer terms the later t is, and with
smaller ones the larger t - s is, provided that |c| does not increase.  So the worst steps are 0, b, 2b, ..:

    sens^2 = sum_t (sum_{j < k} |c[t - j b]|)^2,   k at most ceil(n / b)

exact where c is nonnegative and non-increasing (the formula: Kalinin and Lampert 2024,
https://arxiv.org/abs/2405.13763, theorem 2).  It is also exact, whatever c is, for one participation, and where c has
at most b bands, since no two columns of a record then overlap: ``<C[:, s], C[:, t]> = 0``; that is at most sqrt(k)
times the largest column norm.  Any other c is replaced by ``max_{u >= v} |c[u]|``, the least non-increasing sequence
above |c|: an upper bound, as every inner product grows.

What it does not promise: Poisson sampling breaks the separation of steps, and a run longer than planned breaks the
sensitivity.  A removed record shifts every later batch of a fixed order, so the relation is zero-out, or replace-one at
twice the sensitivity, unless the batches are those of :func:`cyclic_poisson_event`.
"""

from __future__ import annotations

import math
from functools import lru_cache

import numpy as np
import scipy
from numpy.typing import ArrayLike, NDArray

from .errors import InvalidParameter
from .events import Gaussian, MatrixMechanism, Poisson, Repeated
from .values import shown

Vector = NDArray[np.float64]

_GRID = 2.0**12
"""Coefficients that were found numerically are multiples of 1 / this."""


def identity(steps: int) -> Vector:
    """C = I: independent noise in every step. Shape (steps,)."""
    return _first(np.ones(1), steps)


def square_root(steps: int) -> Vector:
    """The strategy with ``C C = A``: 1, 1/2, 3/8, 5/16, .. Shape (steps,), positive and decreasing.

    Source: Fichtenberger, Henzinger and Upadhyay 2023, https://arxiv.org/abs/2202.11205: ``c[k] = c[k-1] (2k-1)/(2k)``,
    the coefficients of ``(1 - x)^(-1/2)``, whose square is ``1/(1 - x) = 1 + x + x^2 + ..``.
    """
    k = np.arange(1, _whole("steps", steps), dtype=float)
    return np.cumprod(np.concatenate([[1.0], (2 * k - 1) / (2 * k)]), dtype=np.float64)


def banded_square_root(steps: int, bands: int) -> Vector:
    """BSR: the first ``bands`` coefficients of :func:`square_root`, and zeros. Shape (steps,).

    The noise needs the last ``bands - 1`` rows of its own: ``x_t = z_t - sum_{k < bands} c[k] x_{t-k}``.
    Source: Kalinin and Lampert 2024, https://arxiv.org/abs/2405.13763.
    """
    return _first(square_root(_whole("bands", bands)), steps)


def banded_inverse_square_root(steps: int, bands: int) -> tuple[Vector, Vector]:
    """BISR: (coefficients of C, coefficients of C^-1), of which the latter are zero from ``bands`` on. Shapes (steps,).

    The noise needs the last ``bands`` draws: ``x_t = sum_{k < bands} r[k] z_{t-k}``, with r the first coefficients of
    ``(1 - x)^(1/2)``: 1, -1/2, -1/8, -1/16, .. C itself is dense, nonnegative and non-increasing.
    Source: Kalinin, McKenna, Upadhyay and Lampert 2025, https://arxiv.org/abs/2505.12128.
    """
    inverse_coefficients = _first(inverse_square_root(_whole("bands", bands)), steps)
    return inverse(inverse_coefficients), inverse_coefficients


def inverse_square_root(steps: int) -> Vector:
    """The first column of the inverse of :func:`square_root`: 1, -1/2, -1/8, -1/16, .. Shape (steps,).

    The coefficients of ``(1 - x)^(1/2)``, whose product with ``(1 - x)^(-1/2)`` is 1.
    """
    k = np.arange(1, _whole("steps", steps), dtype=float)
    return np.cumprod(np.concatenate([[1.0], (k - 1.5) / k]), dtype=np.float64)


def band_mf(steps: int, bands: int) -> Vector:
    """BandMF: the Toeplitz strategy with ``bands`` bands that has the least error. Shape (steps,).

    It minimises ``rooted_mean_error(c) * |c|``, the error of the running sums where a record takes part once; under k
    participations at least ``bands`` steps apart it is sqrt(k) times that, less what the end of the run cuts off. The
    coefficients begin with 1, are nonnegative and do not increase. They are found numerically, from those of
    :func:`banded_square_root`, and are never worse; found again, they are the same. One band is the identity. The noise
    needs the last ``bands - 1`` rows of its own.

    The optimum is one among Toeplitz matrices. Choquette-Choo et al. 2023, https://arxiv.org/abs/2306.08153, who named
    it, optimise over all banded matrices, which can only be better; McKenna 2024, https://arxiv.org/abs/2405.15913,
    has both, and the Toeplitz one for long runs.
    """
    return _first(_best_bands(_whole("steps", steps), min(_whole("bands", bands), steps)), steps)


@lru_cache(maxsize=256)
def _best_bands(steps: int, bands: int) -> Vector:
    """The nonzero coefficients of :func:`band_mf`; not to be written to."""
    start = square_root(bands)
    found = np.ones(1)
    if bands > 1:
        # Steps of the search may leave the region in which 1/c(x) stays bounded; it does not go on from there.
        with np.errstate(over="ignore", invalid="ignore"):
            later = scipy.optimize.minimize(
                _log_squared_error,
                start[1:],
                args=(steps,),
                jac=True,
                method="L-BFGS-B",
                bounds=[(0, 1)] * (bands - 1),
                options={"maxiter": 1000, "ftol": 1e-16, "gtol": 1e-12, "maxcor": 30},
            ).x
        # The last digits of a search differ from machine to machine, and those of a plan must not. Where the error is
        # least it is flat: this moves it by less than a millionth.
        found = np.minimum.accumulate(np.concatenate([[1.0], np.round(later * _GRID) / _GRID]))
        if not _log_squared_error(found[1:], steps)[0] <= _log_squared_error(start[1:], steps)[0]:
            found = start
    found.flags.writeable = False
    return found


def _log_squared_error(later: Vector, steps: int) -> tuple[float, Vector]:
    """``2 log(rooted_mean_error(c) * |c|)`` and its gradient in ``later``, where c is 1 and then ``later``.

    ``h = 1 / ((1 - x) c(x))`` is the first column of ``A C^-1``, hence ``dh / dc_j = -x^j h(x) / c(x)``.
    """
    c = np.concatenate([[1.0], later])
    row = scipy.signal.lfilter([1.0], c, np.ones(steps))
    weighted = np.arange(steps, 0, -1) / steps * row
    moved = scipy.signal.lfilter([1.0], c, row)
    mean = float(weighted @ row)
    slope = np.array([-2 * (weighted[j:] @ moved[: steps - j]) for j in range(1, len(c))])
    size = float(c @ c)
    return math.log(mean) + math.log(size), slope / mean + 2 * later / size


def inverse(coefficients: ArrayLike) -> Vector:
    """The first column of the inverse of the lower-triangular Toeplitz matrix with first column ``coefficients``.

    Forward substitution, in as many operations as there are steps times bands.

    Raises:
      InvalidParameter: no invertible strategy, or its inverse leaves the range of a double.
    """
    c = _strategy(coefficients)
    impulse = np.zeros_like(c)
    impulse[0] = 1.0
    result = np.asarray(scipy.signal.lfilter([1.0], c[: _bands(c)], impulse))
    if not np.isfinite(result).all():
        raise InvalidParameter("The inverse of these coefficients leaves the range of a double: no strategy to use.")
    return result


def sensitivity(coefficients: ArrayLike, steps: int, *, min_separation: int = 1, max_participations: int = 1) -> float:
    """How far ``C G`` moves at most when one record changes, in units of one participation; rounded up.

    Guarantee: no pattern of participations that keeps to the arguments moves it further.
    Requires: contributions of norm at most 1, a run of at most ``steps`` steps.
    Why: see the module.

    Args:
      coefficients: the first column of C, at least ``steps`` of them.
      steps: of the whole run; fixed before its first release.
      min_separation: least number of steps from one participation of a record to its next; 1 for no rule.
      max_participations: most steps in which a record takes part.

    Returns:
      The exact value for one participation, for at most ``min_separation`` bands, and for nonnegative non-increasing
      coefficients; else an upper bound. The module says why.

    Raises:
      InvalidParameter: a count below 1, fewer coefficients than steps, or no invertible strategy.
    """
    c = _strategy(coefficients)
    if len(c) < _whole("steps", steps):
        raise InvalidParameter(
            f"steps = {steps}: there are {len(c)} coefficients only. Make the strategy for all steps of the run."
        )
    apart = min(_whole("min_separation", min_separation), steps)
    times = min(_whole("max_participations", max_participations), -(-steps // apart))
    size = np.abs(c[:steps])
    scale = size.max()
    size = size / scale
    if times > 1 and _bands(c[:steps]) > apart:
        size = np.maximum.accumulate(size[::-1])[::-1]
    if times * apart >= steps:  # as often as it fits: sum every apart-th entry up to each
        moved = np.zeros(times * apart)
        moved[:steps] = size
        moved = moved.reshape(times, apart).cumsum(axis=0).ravel()[:steps]
    else:
        moved = np.zeros(steps)
        for first in range(0, times * apart, apart):
            moved[first:] += size[: steps - first]
    return _raised(scale * math.sqrt(float(moved @ moved)), operations=steps + times)


def column_sensitivity(matrix: ArrayLike) -> float:
    """The sensitivity of any strategy ``matrix``, of shape (rows, steps), for one participation; rounded up.

    Guarantee, Requires: as of :func:`sensitivity`, for one participation.
    Why: it moves one column, so it is the largest column norm.

    Raises:
      InvalidParameter: not a matrix of finite numbers, or zero throughout.
    """
    entries = _finite(matrix, dimensions=2)
    if not (scale := np.abs(entries).max()) > 0:
        raise InvalidParameter("The strategy is zero throughout: it releases nothing, and has no sensitivity.")
    return _raised(scale * float(np.linalg.norm(entries / scale, axis=0).max()), operations=len(entries))


def rooted_mean_error(
    coefficients: ArrayLike, *, inverse_coefficients: ArrayLike | None = None, momentum: float = 0.0
) -> float:
    """``sqrt(mean_t |(A C^-1)[t, :]|^2)``: the error of the running sums per unit standard deviation of Z.

    Times sensitivity and noise multiplier, it is the error by which strategies are compared. Not a bound: an estimate
    to the digits of a double.

    Args:
      coefficients: the first column of C.
      inverse_coefficients: that of C^-1, where it is known; else :func:`inverse` finds it.
      momentum: in [0, 1). What is summed is ``m_t = momentum * m_{t-1} + g_t``, the steps of gradient descent with it.

    Raises:
      InvalidParameter: as :func:`inverse`, or momentum outside [0, 1).
    """
    if not 0 <= momentum < 1:
        raise InvalidParameter(f"momentum = {shown(momentum)}: it must lie in [0, 1), or the sums would not settle.")
    noise = inverse(coefficients) if inverse_coefficients is None else _strategy(inverse_coefficients)
    row = np.cumsum(scipy.signal.lfilter([1.0], [1.0, -momentum], noise))  # A C^-1 is Toeplitz too
    n = len(row)
    return math.sqrt(float(np.arange(n, 0, -1) @ row**2) / n)


def matrix_event(
    noise_multiplier: float, coefficients: ArrayLike, steps: int, min_separation: int, max_participations: int
) -> MatrixMechanism:
    """A whole run of ``steps`` steps, batches in a fixed or shuffled order, as one event.

    Guarantee: the event covers all ``steps`` releases together.
    Requires: participations as the arguments say, and no more steps (the ledger refuses one more).
    Why: ``C G + Z`` is one Gaussian release, and multiplying by ``C^-1`` is post-processing; see the module.

    Args:
      noise_multiplier: standard deviation of Z / sensitivity of one participation (the clipping norm C under zero-out,
        2C under replace-one). Of two strategies with the same value the one with the larger sensitivity reveals more.
      coefficients, steps, min_separation, max_participations: as for :func:`sensitivity`. k passes in the same order
        of n/k steps each have min_separation n/k and max_participations k; shuffled anew in each pass, only 1 and k.

    Raises:
      InvalidParameter: as :func:`sensitivity`, or a noise multiplier that is not positive.
    """
    return MatrixMechanism(
        noise_multiplier=noise_multiplier,
        sensitivity=sensitivity(
            coefficients, steps, min_separation=min_separation, max_participations=max_participations
        ),
        min_separation=min_separation,
        max_participations=max_participations,
    )


def cyclic_poisson_event(noise_multiplier: float, bands: int, steps: int, sample_rate_within_group: float) -> Repeated:
    """BandMF with amplification: a run of a strategy with ``bands`` bands under cyclic Poisson sampling.

    The records are split into ``bands`` groups for good, each by itself (a hash of it, or an independent draw; never
    its index, which a removal would shift). Step t draws each record of group ``t mod bands`` with probability
    ``sample_rate_within_group``; for an expected batch B of N records that is ``bands * B / N``.

    Guarantee: the event, ``ceil(steps / bands)`` Poisson-subsampled Gaussians, covers all ``steps`` releases together.
    Requires: a strategy of at most ``bands`` bands, columns of norm at most 1, and groups as above.
    Why: a record takes part only in steps t, t + bands, ..,
    and C[:, t] is zero outside of rows t .. t + bands - 1. So these steps move disjoint blocks of rows of ``C G + Z``,
    whose noise is independent. Each block moves by at most the norm of its column, and only if the record was drawn,
    independently of the other draws: as DP-SGD on the group alone. With one band it is DP-SGD. Not valid for a
    strategy with more bands (square root, BISR): there, its noise correlates the blocks.
    Source: Choquette-Choo et al. 2023, "(Amplified) banded matrix factorization", https://arxiv.org/abs/2306.08153.

    Args:
      noise_multiplier: standard deviation of Z / sensitivity of one participation, for columns of norm at most 1.
        For Toeplitz coefficients c with ``bands`` bands: draw Z with ``noise_multiplier * sensitivity(c, steps)``
        times the clipping norm, that is ``c / |c|``; or divide each column by its own norm ``|c[:steps - t]|``, which
        is to multiply row t of ``C^-1 Z`` by it.

    Raises:
      InvalidParameter: a count below 1, a rate outside [0, 1] or a noise multiplier that is not positive.
    """
    releases = -(-_whole("steps", steps) // _whole("bands", bands))
    release = Poisson(sample_rate=sample_rate_within_group, event=Gaussian(noise_multiplier=noise_multiplier))
    return Repeated(event=release, count=releases)


def _first(coefficients: Vector, steps: int) -> Vector:
    """``coefficients`` cut or filled with zeros to ``steps``."""
    result = np.zeros(_whole("steps", steps))
    result[: len(coefficients)] = coefficients[:steps]
    return result


def _bands(c: Vector) -> int:
    """How many coefficients there are up to the last that is not zero."""
    return int(np.flatnonzero(c)[-1]) + 1


def _raised(x: float, operations: int) -> float:
    """``x`` above the rounding of ``operations`` additions of nonnegative numbers, and of a dozen more."""
    return math.nextafter(x * (1 + (operations + 12) * 2.0**-52), math.inf)


def _strategy(coefficients: ArrayLike) -> Vector:
    c = _finite(coefficients, dimensions=1)
    if c[0] == 0:
        raise InvalidParameter("coefficients[0] = 0: the strategy has no inverse. The diagonal must not be zero.")
    return c


def _finite(numbers: ArrayLike, dimensions: int) -> NDArray[np.float64]:
    try:
        array = np.asarray(numbers, dtype=float)
    except (TypeError, ValueError, OverflowError):
        array = np.empty(0)
    if array.ndim != dimensions or array.size == 0 or not np.isfinite(array).all():
        kind = "vector of coefficients" if dimensions == 1 else "matrix of entries"
        raise InvalidParameter(f"{shown(numbers)}: a strategy is a {kind}, finite and not empty.")
    return array


def _whole(name: str, number: int) -> int:
    if isinstance(number, bool) or not isinstance(number, int | np.integer) or number < 1:
        raise InvalidParameter(f"{name} = {shown(number)}: it must be a whole number, at least 1.")
    return int(number)
