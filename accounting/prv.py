r"""Privacy of a composition from its loss distribution: connect the dots, tilt, transform. Upper and lower bounds.

The name is that of the field (privacy random variable); the method is a privacy loss distribution on a grid
(``privacy_loss.py``) that is composed in the frequency domain after exponential tilting.

**Setting.** One step has masses p_j at the losses ``t_j = o + j h``; T steps have the T-fold convolution p^T, and

    delta(epsilon) = sum_{t > epsilon} p^T(t) (1 - e^(epsilon - t))  +  mass of infinite loss

for the direction "removed"; "added" is the same with the Q-masses of the losses -t.  Epsilon is the larger of both.

**Tilting.** With ``r_j = p_j e^(theta t_j) / M`` the sum is ``M^T sum_t r^T(t) w(t)``, where ``w(t) = e^(-theta t) (1
- e^(epsilon - t))_+``.  Theta is chosen where the Chernoff bound of delta is least, so that r^T is centred at epsilon:
the rounding of the transform is then small relative to *delta*, however small delta is.  Without it, rounding in the
transform drowns any delta below about 1e-10.  Each direction has its own theta.

**No inverse transform.** With the discrete Fourier transform R of r on N points, r^T summed over all residues mod N is
``(1/N) sum_k R_k^T e^(i k ..)``, so delta is ``(M^T/N) sum_k R_k^T W_k``, where W, the transform of w over the whole
half line, is two geometric series.  ``|R_k|^T`` falls like a Gaussian, so a few dozen frequencies carry everything and
epsilon after another number of steps costs microseconds.

**What makes it a bound.**

* *Aliasing.* r^T on residues is never below r^T, and w >= 0: what wraps around only raises the sum.  The upper bound
  needs no correction for it (the window is wide enough that it is not felt either); from the lower bound the excess is
  subtracted: at most ``2 e^(-theta N h / 2)`` from the masses less than half a window below epsilon, and the Chernoff
  bounds of r^T beyond, times the largest weight that w has on a residue.
* *Tails* that were cut off have infinite loss (union bound ``1 - (1 - p_infinite)^T``).
* *Rounding.* A transform of N points is a tree of depth log2 N of additions and products, so that each R_k is off by
  at most ``20 u log2 N =: eta`` (the r_j sum to 1), and R_k^T by ``T eta (|R_k| + eta)^(T-1)``. Phases and sums are off
  by a few units times T. Both, times ``|W_k|``, are added. Weights are off by the factor ``1 + RELATIVE_ERROR``
  each, which is ``e^(T RELATIVE_ERROR)`` in all. Frequencies that were left out are added with their absolute values.
* *The grid* raises or lowers the masses of one step in the sound direction, by second-order amounts: an epsilon too
  large by about ``T (theta + 1) h^2 / 12``. That is a rule for choosing h only; upper and lower bound are both
  computed, and h is made smaller until they are as close as promised.

Everything here is about a *fixed* list of events.  For steps chosen after seeing earlier results see
``privacy_filters.py``.

Sources: Koskela, Jälkö and Honkela 2020 (https://arxiv.org/abs/1906.03049), Gopi, Lee and Wutschitz 2021
(https://arxiv.org/abs/2106.02848) for composition by Fourier transform; Doroshenko et al. 2022 for the grid.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from functools import cache, cached_property, lru_cache
from typing import NamedTuple

import numpy as np
import scipy
from numpy.typing import NDArray

from . import privacy_loss
from .errors import Unsupported
from .events import Relation
from .normal_form import Atom, Counted
from .privacy_loss import RELATIVE_ERROR, Masses
from .sampled_gaussian import Vector

Interval = tuple[float, float, float]
Step = tuple[tuple[Atom, int], ...]
Counts = NDArray[np.int64]

_UNIT = 2.0**-53
_TINY = 1e-300
_MOST_CELLS = 2**19
_LONGEST_WINDOW = 2**20
_MANY_FREQUENCIES = 40_000  # few steps of hardly any loss: finer grids would take seconds
_MOST_STEPS = 10**9
_LEAST_DELTA, _MOST_DELTA = 1e-200, 0.9
_LEAST_TILT, _MOST_TILT = 1e-9, 1e12
_FARTHEST = 1e5  # of all epsilons that are looked at
_LEAST_LOG_POWER = -50.0  # of a frequency that is kept
_SHARE_ABOVE, _STEP_BELOW = 0.2, 0.5  # of the promise, for the upper bound; grid step of the lower bound / of the upper


def default_tolerance(epsilon: float) -> float:
    """How far the upper bound is from the lower one if nothing else was asked for: 0.05 %, and at least 1e-5."""
    return max(1e-5, 5e-4 * epsilon)


def covers(atoms: Counted) -> bool:
    """Whether every atom has a loss distribution here, with numbers that the arithmetic can hold."""
    return sum(count for _, count in atoms) <= _MOST_STEPS and all(privacy_loss.covers(atom) for atom, _ in atoms)


def epsilon_bounds(atoms: Counted, delta: float, relation: Relation, tolerance: float | None = None) -> Interval:
    """(lower, estimate, upper) of the epsilon of the composition at ``delta``.

    Args:
      tolerance: ``upper - lower`` is at most this where a grid that fine can be held in memory, unless atoms are among
        them whose lower bound is only of first order (Laplace, pure DP) or unknown.

    Raises:
      Unsupported: delta is too small or too large for the arithmetic.
    """
    _check_delta(delta)
    if _total_variation(atoms, relation) <= delta:
        return 0.0, 0.0, 0.0
    step, times = _per_step(atoms)
    [bounds] = _in_block(step, relation, np.array([times]), delta, tolerance)
    return bounds


def epsilon_curve(atoms: Counted, steps: int, delta: float, relation: Relation) -> list[Interval]:
    """:func:`epsilon_bounds` after 1, 2, .., ``steps`` repetitions of ``atoms``."""
    _check_delta(delta)
    step, times = _per_step(atoms)
    once = _total_variation(atoms, relation)
    numbers = np.array([times * count for count in range(1, steps + 1) if not count * once <= delta], dtype=np.int64)
    found: list[Interval] = [(0.0, 0.0, 0.0)] * (steps - len(numbers))
    tops = np.array([_block(int(number))[1] for number in numbers])
    for top in np.unique(tops):
        for some in np.array_split(numbers[tops == top], 1 + np.count_nonzero(tops == top) // 256):
            found += _in_block(step, relation, some, delta, None)
    return found


def delta_bounds(atoms: Counted, epsilon: float, relation: Relation) -> Interval:
    """(lower, estimate, upper) of the delta of the composition at ``epsilon``, 0.2 % apart where that can be had."""
    if not atoms:
        return 0.0, 0.0, 0.0
    if epsilon > _FARTHEST:
        raise Unsupported(f"epsilon = {epsilon!r} is beyond the prv accountant ({_FARTHEST:g}); use by='rdp'.")
    step, times = _per_step(atoms)
    aim = _aim_at_epsilon(step, relation, times, epsilon)
    if aim.log_delta < math.log(_LEAST_DELTA):
        raise Unsupported(f"delta at epsilon = {epsilon!r} is too small for the prv accountant; use by='rdp'.")
    at, numbers = np.array([epsilon]), np.array([times])

    def log_deltas(run: _Run) -> tuple[Vector, Vector]:
        high = np.maximum(*(each.after(numbers).log_delta_above(at)[0] for each in run.above))
        return np.full(1, -math.inf) if run.below is None else run.below.after(numbers).log_delta_below(at)[0], high

    _, log_low, log_high = _settled(
        step, relation, (times, times), aim, lambda _: 2e-3, 1 / aim.removed.theta, log_deltas
    )
    low = math.exp(min(0.0, log_low[0])) * (1 - 1e-12)
    high = min(1.0, math.exp(min(0.0, log_high[0])) * (1 + 1e-12))
    return low, math.sqrt(low * high) if low else high, high


def profile(atoms: Counted, relation: Relation) -> Callable[[float], float]:
    """An upper bound of delta as a function of epsilon >= 0, cheap to ask often: the grids are kept.

    Each grid was tilted for one delta and is a bound at any epsilon; the best of the nearest ones is given.
    """
    step, times = _per_step(atoms)
    numbers, once = np.array([times]), min(1.0, _total_variation(atoms, relation))
    aims = [_aim_at_delta(step, relation, times, math.exp(-(1.6**power))) for power in range(14)]

    @cache
    def sides(place: int) -> list[_Composition]:
        aim = aims[place]
        h = max(aim.finest, aim.grid_step(_SHARE_ABOVE * default_tolerance(aim.epsilon), times))
        return [each.after(numbers) for each in _run(step, relation, (times, times), aim, h).above]

    def delta(epsilon: float) -> float:
        at = np.array([epsilon])
        place = min(range(len(aims)), key=lambda k: abs(aims[k].epsilon - epsilon))
        found = [
            max(float(each.log_delta_above(at)[0][0]) for each in sides(near))
            for near in range(max(0, place - 1), min(len(aims), place + 2))
        ]
        return min(once, math.exp(min(0.0, *found)) * (1 + 1e-12))

    return delta


def _check_delta(delta: float) -> None:
    if not _LEAST_DELTA <= delta <= _MOST_DELTA:
        raise Unsupported(
            f"delta = {delta!r}: the arithmetic of the prv accountant goes from {_LEAST_DELTA:g} to {_MOST_DELTA:g}. "
            "Use by='rdp'."
        )


def _total_variation(atoms: Counted, relation: Relation) -> float:
    return math.fsum(count * privacy_loss.total_variation(atom, relation) for atom, count in atoms) * (1 + 1e-12)


def _per_step(atoms: Counted) -> tuple[Step, int]:
    """The atoms divided by the greatest common divisor of their counts, and that divisor."""
    times = math.gcd(*(count for _, count in atoms))
    return tuple((atom, count // times) for atom, count in atoms), times


def _block(times: int) -> tuple[int, int]:
    """(least, most) of the numbers of steps that share a grid: one number up to 16, then an eighth more."""
    if times <= 16:
        return times, times
    least, top = 17, 18
    while top < times:
        least, top = top + 1, top + top // 8
    return least, top


def _in_block(step: Step, relation: Relation, numbers: Counts, delta: float, tolerance: float | None) -> list[Interval]:
    """Bounds of epsilon after each of ``numbers`` times ``step``, all of one block."""
    block = _block(int(numbers[-1]))
    run, low, high = _run_for(step, relation, block, delta, tolerance)
    if block[0] < block[1]:  # to be looked for between what is known at the ends of the block
        share = np.log(numbers / block[0]) / math.log(block[1] / block[0])
        guesses = (np.clip(ends, 1e-9, _FARTHEST) for ends in (low, high))
        low, high = _epsilons(run, numbers, delta, *(first ** (1 - share) * last**share for first, last in guesses))
    # Rounding of epsilon itself, and of the shift of the grid of the lower bound.
    high = high * (1 + 1e-12)
    offset = 0.0 if run.below is None else abs(run.below.offset)
    low = np.maximum(0.0, low * (1 - 1e-12) - 1e-15 * numbers * offset)
    pairs = zip(low.tolist(), high.tolist(), strict=True)
    return [(under, (under + over) / 2 if under else over, over) for under, over in pairs]


@lru_cache(maxsize=64)
def _run_for(
    step: Step, relation: Relation, block: tuple[int, int], delta: float, tolerance: float | None
) -> tuple[_Run, Vector, Vector]:
    """The grid on which the bounds at the end of the block are as close as promised; lower and upper at its ends."""
    aim, ends = _aim_at_delta(step, relation, block[1], delta), np.unique(block)
    guess = np.full(len(ends), max(aim.epsilon, 1e-9))

    def promise(upper: float) -> float:
        return default_tolerance(upper) if tolerance is None else tolerance

    def bounds(run: _Run) -> tuple[Vector, Vector]:
        return _epsilons(run, ends, delta, guess, guess)

    return _settled(step, relation, block, aim, promise, 1.0, bounds)


def _epsilons(run: _Run, numbers: Counts, delta: float, low: Vector, high: Vector) -> tuple[Vector, Vector]:
    """(lower, upper) bounds of epsilon after ``numbers`` of steps, looked for around ``low`` and ``high``.

    The lower bounds are 0 where nothing is known, the upper ones infinite where the tails alone are above delta.
    """
    target, nothing = math.log(delta), np.zeros(len(numbers))
    removed, added = (each.after(numbers).log_delta_above for each in run.above)
    _, high = _crossing(removed, target, nothing, nothing + math.inf, high)
    high = np.where(removed(nothing)[0] > target, high, 0.0)
    if not np.all(np.isfinite(high)):
        return nothing, nothing + math.inf
    if np.any(added(high)[0] > target):
        _, more = _crossing(added, target, nothing, nothing + math.inf, np.maximum(high, 1e-9))
        high = np.maximum(high, np.where(added(nothing)[0] > target, more, 0.0))
    if run.below is None or not np.all(np.isfinite(high)):
        return nothing, high
    low = np.minimum(low, high * (1 - 1e-3))
    low, _ = _crossing(run.below.after(numbers).log_delta_below, target, nothing, high, low)
    return low, high


def _settled(
    step: Step,
    relation: Relation,
    block: tuple[int, int],
    aim: _Aim,
    promise: Callable[[float], float],
    unit: float,
    bounds: Callable[[_Run], tuple[Vector, Vector]],
) -> tuple[_Run, Vector, Vector]:
    """Finer and finer grids, until ``bounds`` are as close as ``promise(upper)``, in units of ``unit`` epsilon."""
    h = aim.grid_step(_SHARE_ABOVE * promise(aim.epsilon) * unit, block[1])
    before, upper, best = math.inf, math.inf, None
    while True:
        h = max(h, aim.finest)
        run = _run(step, relation, block, aim, h)
        found = (run, *bounds(run))
        low, high = (float(ends[-1]) for ends in found[1:])
        # With less known from below: errors are of second order, so the next half is a third of the last one.
        gap = high - low if run.close else abs(upper - high) / 3
        if best is not None and gap >= before and run.close:  # rounding has the better of the finer grid
            return best
        allowed = promise(high)
        slow = max(len(each.order) for each in run.above) > _MANY_FREQUENCIES
        if not gap > allowed or h == aim.finest or slow or (gap > 0.8 * before and math.isfinite(gap)):
            return found
        before, upper, best = gap, high, found
        h *= min(0.75, max(0.2, 0.9 * math.sqrt(allowed / gap)))


# -- where to look ----------------------------------------------------------------------------------------------------


Cost = Callable[[float, float], float]
"""(theta, log of the exponential moment of one step at theta) -> what is to be least."""
Named = Callable[[float, float], tuple[float, float]]
"""(the same) -> (epsilon, log of delta) of the Chernoff bound."""


class _Tilt(NamedTuple):
    """Where the composition of one direction has its mass after tilting by ``theta``. Rough: only a design."""

    theta: float
    log_delta: float
    epsilon: float
    deviation: float


class _Aim(NamedTuple):
    """What a grid must be good for. Rough: no bound rests on it."""

    removed: _Tilt
    added: _Tilt
    epsilon: float
    log_delta: float
    window: float
    span: float
    finest: float
    negligible: float

    def grid_step(self, excess: float, times: int) -> float:
        """The step that makes epsilon too large by about ``excess``."""
        step = math.sqrt(12 * excess / (times * (self.removed.theta + 1)))
        return min(step, self.span / 8, self.window / 64)


@lru_cache(maxsize=64)
def _aim_at_delta(step: Step, relation: Relation, times: int, delta: float) -> _Aim:
    """Tilts at which the Chernoff bound of epsilon is least."""
    log_delta = math.log(delta)

    def cost(theta: float, log_moment: float) -> float:
        return (times * log_moment + _log_conversion(theta) - log_delta) / theta

    return _aimed(
        step,
        relation,
        times,
        _negligible(step, times, delta),
        cost,
        lambda tilt, moment: (cost(tilt, moment), log_delta),
    )


@lru_cache(maxsize=64)
def _aim_at_epsilon(step: Step, relation: Relation, times: int, epsilon: float) -> _Aim:
    """Tilts at which the Chernoff bound of delta is least."""

    def cost(theta: float, log_moment: float) -> float:
        return times * log_moment + _log_conversion(theta) - theta * epsilon

    def named(theta: float, log_moment: float) -> tuple[float, float]:
        return epsilon, cost(theta, log_moment)

    first = _aimed(step, relation, times, _negligible(step, times, 1e-12), cost, named)
    return _aimed(
        step, relation, times, _negligible(step, times, math.exp(min(0.0, max(first.log_delta, -570.0)))), cost, named
    )


def _negligible(step: Step, times: int, delta: float) -> float:
    """Mass of the tails of one atom that may count as infinite loss: a share of 1e-4 of delta over all steps.

    More would be felt, and less would let the far tails, which no composition reaches, decide the tilt.
    """
    return max(_TINY, delta * 1e-4 / (times * sum(count for _, count in step)))


def _log_conversion(theta: float) -> float:
    """log of the largest ``e^(theta (epsilon - t)) (1 - e^(epsilon - t))``: theta^theta / (theta + 1)^(theta + 1)."""
    return theta * math.log(theta / (theta + 1)) - math.log1p(theta)


def _aimed(step: Step, relation: Relation, times: int, negligible: float, cost: Cost, named: Named) -> _Aim:
    rough = [(*privacy_loss.rough(atom, relation, negligible), count) for atom, count in step]
    removed = _tilted([(*losses, count) for losses, _, count in rough], times, cost, named)
    added = _tilted([(*losses, count) for _, losses, count in rough], times, cost, named)
    window = max(max(14 * tilt.deviation, 50 / tilt.theta) for tilt in (removed, added))
    span = 1.5 * max(float(np.ptp(loss)) for (loss, _), _, _ in rough)
    return _Aim(
        removed,
        added,
        epsilon=max(0.0, removed.epsilon, added.epsilon),
        log_delta=max(removed.log_delta, added.log_delta),
        window=window,
        span=span,
        finest=max(window / _LONGEST_WINDOW, span / _MOST_CELLS),
        negligible=negligible,
    )


def _tilted(parts: list[tuple[Vector, Vector, int]], times: int, cost: Cost, named: Named) -> _Tilt:
    def moment(theta: float) -> float:
        return math.fsum(count * _log_sum(mass, theta * loss) for loss, mass, count in parts)

    def price(theta: float) -> float:
        log_moment = moment(theta)
        epsilon, log_delta = named(theta, log_moment)
        # The largest of finitely many losses draws theta to infinity; beyond this, nothing is gained by it.
        useless = theta * max(epsilon, 1e-9) > 100 * (1 + abs(log_delta))
        return math.inf if useless else cost(theta, log_moment)

    theta = 1.0
    while (best := price(theta)) == math.inf and theta > _LEAST_TILT:
        theta /= 4
    factor = 4.0
    while factor > 1.1:
        for candidate in (theta * factor, theta / factor):
            if _LEAST_TILT < candidate < _MOST_TILT and (found := price(candidate)) < best:
                theta, best = candidate, found
                break
        else:
            factor = math.sqrt(factor)
    here, centre, variance = moment(theta), 0.0, 0.0
    for loss, mass, count in parts:
        weight = mass * np.exp(theta * loss - np.max(theta * loss))
        weight /= np.sum(weight)
        mean = float(np.sum(weight * loss))
        centre += count * mean
        variance += count * float(np.sum(weight * (loss - mean) ** 2))
    deviation = max(math.sqrt(times * variance), 1 / theta)
    # The weights w fall by e^-3 over a deviation at least, unless the far tail takes over there.
    more = max(theta, 3 / deviation)
    if times * (moment(more) - here - centre * (more - theta) - variance * (more - theta) ** 2 / 2) < 10:
        theta = more
    epsilon, log_delta = named(theta, moment(theta))
    return _Tilt(theta, log_delta, epsilon, deviation)


def _log_sum(mass: Vector, exponent: Vector) -> float:
    """log of ``sum mass e^exponent`` without overflow."""
    top = float(np.max(exponent))
    total = float(np.sum(mass * np.exp(exponent - top)))
    if total < 1e-200:  # the largest exponents have hardly any mass
        some = mass > 0
        exponent = exponent[some] + np.log(mass[some])
        top = float(np.max(exponent))
        total = float(np.sum(np.exp(exponent - top)))
    return top + math.log(total)


# -- one grid ---------------------------------------------------------------------------------------------------------


class _Run(NamedTuple):
    """Spectra of one step on one grid: upper bounds in both directions, and a lower bound of "removed".

    Attributes:
      close: whether the lower bound is of second order too, so that finer grids bring it close to the upper one.
      epsilon: where to begin to look for it.
    """

    above: tuple[_Spectrum, _Spectrum]
    below: _Spectrum | None
    close: bool
    epsilon: float


@lru_cache(maxsize=32)
def _run(step: Step, relation: Relation, block: tuple[int, int], aim: _Aim, h: float) -> _Run:
    upper = [(privacy_loss.upper(atom, relation, h, aim.negligible), count) for atom, count in step]
    above = (
        _spectrum([(each.removed, count) for each, count in upper], h, aim.removed, aim.window, block),
        _spectrum([(each.added, count) for each, count in upper], h, aim.added, aim.window, block),
    )
    h *= _STEP_BELOW
    lower = [(privacy_loss.lower(atom, relation, h, aim.negligible), count) for atom, count in step]
    known = [(masses, count) for masses, count in lower if masses is not None]
    if len(known) < len(lower):
        return _Run(above, None, False, aim.epsilon)
    close = all(privacy_loss.merges(atom) for atom, _ in step)
    return _Run(above, _spectrum(known, h, aim.removed, aim.window, block), close, aim.epsilon)


def _spectrum(
    parts: list[tuple[Masses, int]], h: float, tilt: _Tilt, window: float, block: tuple[int, int]
) -> _Spectrum:
    """On a window so wide that what wraps around is not felt, if it can be had."""
    while True:
        spectrum = _Spectrum(parts, h, tilt, window, block)
        if 2 * window > _LONGEST_WINDOW * h or not spectrum.after(np.array([block[1]])).is_wrapped(tilt.epsilon):
            return spectrum
        window *= 2


class _Spectrum:
    """The tilted masses of one step in the frequency domain, to be raised to any number of steps in ``block``."""

    def __init__(
        self, parts: list[tuple[Masses, int]], h: float, tilt: _Tilt, window: float, block: tuple[int, int]
    ) -> None:
        self.h, self.theta = h, min(tilt.theta, 20 / h)  # beyond, the grid resolves nothing
        self.size = size = scipy.fft.next_fast_len(math.ceil(window / h) + 8, real=True)
        self.offset = math.fsum(count * masses.offset for masses, count in parts)
        self.first = sum(count * masses.first for masses, count in parts)
        self.reach = h * sum(count * len(masses.mass) for masses, count in parts)
        self.log_finite = math.fsum(count * math.log1p(-min(masses.infinite, 1 - 1e-16)) for masses, count in parts)
        self.error = 0.0  # relative, of the weights of one step
        self.log_normaliser = 0.0
        self._moments: list[tuple[Vector, Vector, int]] = []
        self.order = np.arange(size // 2 + 1)
        self.log_r: NDArray[np.complex128] = np.zeros(size // 2 + 1, dtype=np.complex128)
        for masses, count in parts:
            loss = h * np.arange(len(masses.mass), dtype=np.float64)  # from the first on: what was before is in `first`
            log_normaliser = _log_sum(masses.mass, self.theta * loss)
            tilted = masses.mass * np.exp(np.minimum(self.theta * loss - log_normaliser, 700.0))  # more has no mass
            self._moments.append((loss, masses.mass, count))
            self.log_normaliser += count * log_normaliser
            self.error += count * (RELATIVE_ERROR + 16 * _UNIT * (self.theta * float(loss[-1]) + 8))
            folded = np.bincount(np.arange(len(tilted)) % size, tilted) if len(tilted) > size else tilted
            self._multiply(scipy.fft.rfft(folded, size), count, block[0])
        self.eta = 20 * _UNIT * math.log2(size) * sum(count for _, count in parts)
        weight = np.where((self.order == 0) | (2 * self.order == size), 1.0, 2.0) / size
        turn = 2j * math.pi * self.order / size
        self.pole = -weight / np.expm1(turn - self.theta * h)
        self.next_pole = -weight / np.expm1(turn - (self.theta + 1) * h)
        self.size_of_poles = np.abs(self.pole) + np.abs(self.next_pole)
        largest_dropped = (math.exp(_LEAST_LOG_POWER / block[0]) + self.eta) ** block[0]
        self.left_out = 2 * largest_dropped / -math.expm1(-self.theta * h)
        self._deviation = tilt.deviation

    def _multiply(self, transform: NDArray[np.complex128], count: int, times: int) -> None:
        """Takes ``count`` factors into each step, and drops the frequencies that vanish in ``times`` steps."""
        transform = transform[self.order]
        square = transform.real**2 + transform.imag**2
        with np.errstate(divide="ignore"):
            size = self.log_r.real + 0.5 * count * np.log(square)
        kept = times * size > _LEAST_LOG_POWER
        self.order = self.order[kept]
        self.log_r = self.log_r[kept] + count * np.log(transform[kept])

    def after(self, numbers: Counts) -> _Composition:
        """The composition of each of ``numbers`` of steps."""
        return _Composition(self, numbers)

    def log_moment(self, theta: float) -> float:
        """log of the sum of ``mass e^(theta (loss - least loss))`` over one step."""
        return math.fsum(count * _log_sum(mass, theta * loss) for loss, mass, count in self._moments)

    @cached_property
    def chernoff(self) -> list[tuple[float, float]]:
        """(nu, log of the nu-th exponential moment of one tilted step), to bound where the tilted sum is not."""
        scale = 1 / max(self._deviation, self.h)
        nus = [sign * times * scale for sign in (-1, 1) for times in (0.4, 1.0, 1.7, 4.0, 10.0)]
        return [(nu, self.log_moment(self.theta + nu) - self.log_normaliser) for nu in nus]


class _Composition:
    """``delta`` after given numbers of steps, as a function of epsilon; all arrays run over the numbers."""

    def __init__(self, spectrum: _Spectrum, numbers: Counts) -> None:
        self.spectrum, self.numbers = spectrum, numbers
        of = spectrum
        self._power = np.exp(numbers[:, None] * of.log_r)
        rounding = numbers * of.eta + _UNIT * (16 * numbers + 256)  # sums are pairwise, phases are exact up to 2 pi
        powers = np.minimum(1.0, np.exp(of.log_r.real) + of.eta) ** (numbers[:, None] - 1)
        size_of_terms = np.sum(powers * of.size_of_poles, axis=1)
        self._error = rounding * size_of_terms + of.left_out

    def log_delta_above(self, epsilon: Vector) -> tuple[Vector, Vector]:
        """(log of an upper bound of delta, its derivative by epsilon)."""
        scale, total, falling = self._sums(epsilon)
        of = self.spectrum
        log_finite = scale + self.numbers * of.error + np.log(np.maximum(total, 0.0) + self._error)
        with np.errstate(divide="ignore"):
            log_infinite = np.log(-np.expm1(self.numbers * of.log_finite) * (1 + 1e-12))
        return np.logaddexp(log_finite, log_infinite), -(falling + of.theta * self._error) / (
            np.maximum(total, 0.0) + self._error
        )

    def log_delta_below(self, epsilon: Vector) -> tuple[Vector, Vector]:
        """(log of a lower bound of delta, its derivative by epsilon)."""
        scale, total, falling = self._sums(epsilon)
        of = self.spectrum
        total = total - self._error - self._wrapped(epsilon)
        infinite = -np.expm1(self.numbers * of.log_finite)
        with np.errstate(divide="ignore", invalid="ignore"):
            finite = np.where(total > 0, scale + np.log(total), -math.inf) - self.numbers * of.error
            return np.logaddexp(finite, np.log(infinite * (1 - 1e-12))), -falling / total

    def is_wrapped(self, epsilon: float) -> bool:
        """Whether aliasing may change delta at ``epsilon`` by more than a share of 1e-5."""
        at = np.array([max(0.0, epsilon)])
        _, total, _ = self._sums(at)
        return bool(self._wrapped(at)[0] > 1e-5 * max(float(total[0]), float(self._error[0])))

    def _sums(self, epsilon: Vector) -> tuple[Vector, Vector, Vector]:
        """(log of the common factor, the sum over frequencies, its part that falls with e^epsilon)."""
        of = self.spectrum
        at = epsilon - self.numbers * of.offset
        index = np.floor(at / of.h) + 1  # the first grid point above epsilon
        fraction = index * of.h - at
        turns = (of.order * ((index.astype(np.int64) - self.numbers * of.first) % of.size)[:, None]) % of.size
        terms = self._power * np.exp(2j * math.pi / of.size * turns)
        whole = np.sum((terms * of.pole).real, axis=1)
        falling = np.exp(-fraction) * np.sum((terms * of.next_pole).real, axis=1)
        scale = self.numbers * (of.log_normaliser + of.theta * of.h * of.first) - of.theta * (at + fraction)
        return scale, whole - falling, falling

    def _wrapped(self, epsilon: Vector) -> Vector:
        """What the window adds to the sum by wrapping around, at most; in the units of the sum."""
        of = self.spectrum
        length = of.size * of.h
        away = epsilon - self.numbers * (of.offset + of.h * of.first)  # losses are counted from the least one
        far = -math.expm1(-of.theta * length)
        heaviest = math.exp(_log_conversion(of.theta)) + math.exp(-of.theta * length) / far
        bounds = {-1: np.zeros(len(epsilon)), 1: np.zeros(len(epsilon))}
        for nu, log_moment in of.chernoff:
            side, edge = (-1, away - length / 2) if nu < 0 else (1, away + length - of.h)
            bounds[side] = np.minimum(bounds[side], self.numbers * log_moment - nu * edge)
        # Beyond the least and the largest loss that there is, nothing can lie.
        beyond = np.where(away > length / 2, np.exp(bounds[-1]), 0.0)
        beyond += np.where(away + length - of.h <= self.numbers * of.reach, np.exp(bounds[1]), 0.0)
        near = 2 * math.exp(-of.theta * length / 2) / far
        return (near + heaviest * beyond) * math.exp(of.theta * of.h) * (1 + 1e-9)


def _crossing(log_delta, target: float, low: Vector, high: Vector, guess: Vector) -> tuple[Vector, Vector]:
    """(x, y), a hair apart, between ``low`` and ``high`` with ``log_delta(x) >= target >= log_delta(y)``.

    Newton's method inside a bracket whose ends are not looked at; ``high`` may be infinite, and stays so where nothing
    reaches the target.
    """
    x = guess
    for attempt in range(80):
        value, slope = log_delta(x)
        high = np.where(value <= target, np.minimum(high, x), high)
        low = np.where(value > target, np.maximum(low, x), low)
        if np.all(np.isfinite(high) & (high - low <= 1e-9 * high) | (low > _FARTHEST)):
            break
        with np.errstate(all="ignore"):
            root = x - (value - target) / slope
            side = np.where(high > root * (1 + 1e-9), 1, -1)  # beyond the root, so that the bracket closes
            root = root * (1 + side * 4e-10)
            middle = np.where(np.isfinite(high), (low + high) / 2, 2 * x)
        x = np.where(
            (root > low) & (root < high) & ((attempt < 8) | (attempt % 4 < 3)), np.minimum(root, 2 * _FARTHEST), middle
        )
    return low, high
