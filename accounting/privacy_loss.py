r"""The privacy loss of one step as masses on a grid: one list that is never too good, one that is never too bad.

A step is described by a pair of laws (P with the record, Q without) that is at least as easy to tell apart as any pair
of neighbours; its loss is ``L = log(P/Q)``.  Everything here is about that pair.

**Above (connect the dots).** Mass at loss L between two grid points ``t`` and ``t + h`` is split between them so that
the masses under P *and* under Q stay what they were: the share ``(1 - e^-(L-t)) / (1 - e^-h)`` of P goes up.  Undoing
the split is a post-processing (both parts go back to L), so the pair on the grid is at least as revealing, and it
composes (Doroshenko, Ghazi, Kamath, Kumar and Manurangsi 2022, https://arxiv.org/abs/2207.04380).  Losses beyond the
ends of the grid become infinite: P-mass ``infinite`` for the direction "removed", Q-mass for the direction "added".
Both directions come from the same nodes and weights; "added" is the Q-mass at the loss ``-L``.

The weights are integrals of *positive* functions by Gauss-Legendre rules of 4 and 8 points on panels that end at the
losses of the grid.  Both integrands are sums of Gaussian (or exponential) densities times constants, without
singularities: on a panel of width w at distance z from the centre of a Gaussian a rule of n points errs by at most
``(n!)^4 (z w)^2n / ((2n+1) (2n)!^3)`` of the density, below 2e-15 with (z w) <= 1 and 8 points or (z w) <= 0.2 and 4.
That, and rounding, is ``RELATIVE_ERROR`` of each weight, and moves a share of at most ``1e-14 / h`` up one cell.

**Below (merging).** Merging the outcomes of a set into one is a post-processing, so the merged pair is at most as
revealing.  Cells of three grid steps are cut in two; if the merged loss of the lower half is at most ``t`` and that of
the upper half at least ``t + h``, the two halves may be mixed further into atoms at exactly ``t`` and ``t + h`` with
the cell's masses under P and Q.  Cells for which that fails are moved down to the next grid point, which only takes
loss away.  The grid is shifted so that the first cell, where the losses crowd, lands on a grid point as a whole.

Both errors are of second order in h.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import NamedTuple

import numpy as np
import scipy
from numpy.typing import NDArray

from . import truncated
from .errors import Unsupported
from .events import (
    ApproximateDP,
    Composed,
    Event,
    Gaussian,
    Laplace,
    Poisson,
    Relation,
    Repeated,
    TruncatedPoisson,
    WithoutReplacement,
)
from .normal_form import Atom, Counted, normal_form
from .sampled_gaussian import Vector

RELATIVE_ERROR = 1e-12
"""Of every weight, its rounding and quadrature together; see :func:`_place`."""

_TINY = 1e-290
_LEAST_RATE, _MOST_RATE = 1e-12, 1 - 1e-9
_FEW = np.polynomial.legendre.leggauss(4)
_MANY = np.polynomial.legendre.leggauss(8)
_WIDEST, _NARROW = 0.08, 0.015  # widths of panels: times |z| <= 12, within the limits that the docstring names
_ROOT_TWO_PI = math.sqrt(2 * math.pi)


class Masses(NamedTuple):
    """Masses at the losses ``offset + (first + i) h``, and the mass at an infinite loss."""

    first: int
    mass: Vector
    infinite: float
    offset: float = 0.0


class Upper(NamedTuple):
    """One step, never below the truth: P-masses by loss, and Q-masses by minus loss."""

    removed: Masses
    added: Masses


_Losses = tuple[Vector, Vector]
"""(losses, masses), in any order."""


class _Continuous(NamedTuple):
    """The part of an unsampled pair that has a density: ``loss = slope y + shift`` for ``low <= y <= high``.

    Attributes:
      p_outside, q_outside: mass beyond [low, high], to be charged as infinite loss.
    """

    slope: float
    shift: float
    low: float
    high: float
    p_outside: float
    q_outside: float
    gaussian: bool

    def densities(self, y: Vector) -> tuple[Vector, Vector]:
        """Of P and of Q, each by itself: far out one of them is 0 to a double, and the other is not."""
        if self.gaussian:
            return np.exp(-0.5 * (y - self.slope) ** 2) / _ROOT_TWO_PI, np.exp(-0.5 * y * y) / _ROOT_TWO_PI
        return 0.25 * np.exp(0.5 * (y - self.high)), 0.25 * np.exp(-0.5 * (y + self.high))


class _Atoms(NamedTuple):
    """The part of an unsampled pair that has none: masses under P and Q at finite losses."""

    loss: Vector
    p: Vector
    q: Vector


_NO_ATOMS = _Atoms(np.zeros(0), np.zeros(0), np.zeros(0))


class _Pair(NamedTuple):
    """An unsampled pair. ``p_infinite``: P-mass where Q has none; ``q_infinite``: Q-mass where P has none."""

    continuous: _Continuous | None
    atoms: _Atoms = _NO_ATOMS
    p_infinite: float = 0.0
    q_infinite: float = 0.0


def upper(atom: Atom, relation: Relation, h: float, negligible: float) -> Upper:
    """``atom`` on a grid of step ``h``, never less revealing than it is.

    Args:
      atom: one of those that :func:`accounting.normal_form.atoms_under` gives under ``relation``, but no Select.
      negligible: mass of the tails that may be charged as infinite loss.

    Raises:
      Unsupported: the atom has no pair of its own here.
    """
    match atom:
        case TruncatedPoisson(sample_rate=rate, event=Gaussian(noise_multiplier=noise)):
            good = upper(Poisson(sample_rate=rate, event=atom.event), relation, h, negligible)
            shift_two = Poisson(sample_rate=rate, event=Gaussian(noise_multiplier=noise / 2))
            bad = upper(shift_two, relation, h, negligible)
            if relation is Relation.ZERO_OUT:
                bad = _symmetrised(bad, h)
            return _mixture(good, bad, truncated.bad_probability(atom))
        case WithoutReplacement(event=event):
            rate = math.nextafter(atom.batch_size / atom.num_examples, 1)
            return _symmetrised(_place(_pair(event, h, negligible), rate, h), h)
        case Poisson(sample_rate=rate, event=event):
            return _place(_pair(event, h, negligible), rate, h)
        case Gaussian() | Laplace() | ApproximateDP():
            return _place(_pair(atom, h, negligible), 1.0, h)
    raise Unsupported(f"{atom.kind} has no privacy loss distribution here; leave `by` out.")


def lower(atom: Atom, relation: Relation, h: float, negligible: float) -> Masses | None:
    """P-masses of ``atom`` on a grid of step ``h``, never more revealing than it is; None where nothing is known.

    Only the direction "removed": what is hard to tell apart in one direction may be easy in the other.
    """
    match atom:
        case TruncatedPoisson(sample_rate=rate, event=event) if relation is Relation.ADD_REMOVE:
            # Data sets so small that nothing is ever cut are among those that the relation speaks of.
            return lower(Poisson(sample_rate=rate, event=event), relation, h, negligible)
        case Poisson(sample_rate=rate, event=Gaussian(noise_multiplier=noise)):
            return _merged(1 / noise, rate, h, negligible)
        case Gaussian(noise_multiplier=noise):
            return _merged(1 / noise, 1.0, h, negligible)
        case Poisson(sample_rate=rate, event=Laplace() | ApproximateDP() as event):
            return _moved_down(_pair(event, h, negligible), rate, h)
        case Laplace() | ApproximateDP():
            return _moved_down(_pair(atom, h, negligible), 1.0, h)
    return None


def covers(atom: Atom) -> bool:
    """Whether there is a pair for ``atom`` here whose losses a double can hold."""
    match atom:
        case Gaussian(noise_multiplier=noise):
            return 0.06 <= noise <= 1e6
        case Laplace(noise_multiplier=noise):
            return 2e-3 <= noise <= 1e6
        case ApproximateDP(epsilon=epsilon):
            return 1e-6 <= epsilon <= 500
        case TruncatedPoisson(event=Gaussian(noise_multiplier=noise)):
            return 0.12 <= noise <= 1e6 and _LEAST_RATE <= atom.sample_rate < _MOST_RATE
        case Poisson(sample_rate=rate, event=event):
            return _LEAST_RATE <= rate <= _MOST_RATE and _covers_batch(event)
        case WithoutReplacement(event=event):
            return atom.batch_size / atom.num_examples <= _MOST_RATE and _covers_batch(event)
    return False


def _covers_batch(event: Event) -> bool:
    parts = normal_form(event)
    return all(covers(part) for part, _ in parts) and sum(count for _, count in parts) <= 4


def rough(atom: Atom, relation: Relation, negligible: float) -> tuple[_Losses, _Losses]:
    """Losses and masses, "removed" and "added", from which the place of a composition can be guessed; no bound."""
    match atom:
        case TruncatedPoisson(sample_rate=rate, event=Gaussian(noise_multiplier=noise)):
            p = truncated.bad_probability(atom)
            good = rough(Poisson(sample_rate=rate, event=atom.event), relation, negligible)
            bad = rough(Poisson(sample_rate=rate, event=Gaussian(noise_multiplier=noise / 2)), relation, negligible)
            if relation is Relation.ZERO_OUT:
                bad = _mirrored(bad[0]), _mirrored(bad[0])
            return _joined(good[0], bad[0], p), _joined(good[1], bad[1], p)
        case WithoutReplacement(batch_size=size, num_examples=number, event=event):
            both = _mirrored(rough(Poisson(sample_rate=size / number, event=event), relation, negligible)[0])
            return both, both
        case Poisson(sample_rate=rate, event=event):
            pass
        case _:
            rate, event = 1.0, atom
    nodes = list(_nodes(_pair(event, 1e-2, negligible), rate, math.inf))
    loss, p, q = (np.concatenate([node[i] for node in nodes], dtype=np.float64) for i in range(3))
    return (loss, p), (-loss, q)


def _joined(good: _Losses, bad: _Losses, p: float) -> _Losses:
    return np.concatenate([good[0], bad[0]]), np.concatenate([(1 - p) * good[1], p * bad[1]])


def _mirrored(losses: _Losses) -> _Losses:
    loss, mass = losses[0][losses[0] > 0], losses[1][losses[0] > 0]
    mirrored = mass * np.exp(-loss)
    rest = max(0.0, 1 - float(np.sum(mass)) - float(np.sum(mirrored)))
    return np.concatenate([loss, -loss, np.zeros(1)]), np.concatenate([mass, mirrored, np.full(1, rest)])


def merges(atom: Atom) -> bool:
    """Whether :func:`lower` is off by a second-order amount only."""
    match atom:
        case Gaussian() | Poisson(event=Gaussian()):
            return True
    return False


def total_variation(atom: Atom, relation: Relation) -> float:
    """An upper bound of delta at epsilon 0 of one step: no event is that much likelier on one side."""
    match atom:
        case Gaussian(noise_multiplier=noise):
            return math.erf(min(1 / noise, 100.0) / math.sqrt(8)) * (1 + 1e-14)
        case Laplace(noise_multiplier=noise):
            return -math.expm1(-0.5 / noise) * (1 + 1e-14)
        case ApproximateDP(epsilon=epsilon, delta=delta):
            return min(1.0, (delta + (1 - delta) * math.tanh(epsilon / 2)) * (1 + 1e-14))
        case TruncatedPoisson(sample_rate=rate, event=Gaussian(noise_multiplier=noise)):
            # Zero-out is below the mirrored pair, which has this value too.
            p, shifts = truncated.bad_probability(atom), (Gaussian(noise), Gaussian(noise / 2))
            good, bad = (total_variation(shift, relation) for shift in shifts)
            return min(1.0, rate * ((1 - p) * good + p * bad) * (1 + 1e-14))
        case Poisson(sample_rate=rate, event=event):
            inner = sum(count * total_variation(part, relation) for part, count in normal_form(event))
            return min(1.0, rate * inner * (1 + 1e-14))
        case WithoutReplacement(batch_size=size, num_examples=number, event=event):
            inner = sum(count * total_variation(part, relation) for part, count in normal_form(event))
            return min(1.0, size / number * inner * (1 + 1e-14))
    return 1.0


def _pair(event: Event, h: float, negligible: float) -> _Pair:
    """The unsampled pair of what happens to one batch."""
    match event:
        case Gaussian(noise_multiplier=noise):
            mu = 1 / noise
            reach = -float(scipy.special.ndtri(negligible / 4))
            outside = 2 * float(scipy.special.ndtr(-reach)) * (1 + 1e-9)
            return _Pair(_Continuous(mu, -mu * mu / 2, -reach, mu + reach, outside, outside, gaussian=True))
        case Laplace(noise_multiplier=noise):
            # Of x = ((2x - 1)/b): the loss of Lap(1, b) against Lap(0, b) between its two atoms.
            end, p = 1 / noise, np.array([0.5 * math.exp(-1 / noise), 0.5])
            between = _Continuous(1.0, 0.0, -end, end, 0.0, 0.0, gaussian=False)
            return _Pair(between, _Atoms(np.array([-end, end]), p, p[::-1]))
        case ApproximateDP(epsilon=epsilon, delta=delta):
            # Randomised response with a share delta that tells all (Kairouz, Oh and Viswanath 2015).
            p = (1 - delta) * scipy.special.expit(np.array([-epsilon, epsilon]))
            return _Pair(None, _Atoms(np.array([-epsilon, epsilon]), p, p[::-1]), delta, delta)
        case Composed() | Repeated():
            return _composed(normal_form(event), h, negligible)
    raise Unsupported(f"{event.kind} inside a sample has no privacy loss distribution here.")


def _composed(parts: Counted, h: float, negligible: float) -> _Pair:
    """Several releases on one batch, as the atoms of their composition on a grid that may be coarser than ``h``."""
    pairs = [(_pair(part, h, negligible), count) for part, count in parts]
    h = max(h, sum(count * _reach(pair) for pair, count in pairs) / 4096)
    first, mass, kept_p, kept_q = 0, np.ones(1), 1.0, 1.0
    for pair, count in pairs:
        placed = _place(pair, 1.0, h)
        for _ in range(count):
            first, mass = first + placed.removed.first, np.convolve(mass, placed.removed.mass)
        kept_p *= (1 - placed.removed.infinite) ** count
        kept_q *= (1 - placed.added.infinite) ** count
    loss = h * np.arange(first, first + len(mass), dtype=np.float64)
    inside = mass > 0
    loss, mass = loss[inside], mass[inside]
    slack = 1e-12 * len(parts)
    return _Pair(None, _Atoms(loss, mass, mass * np.exp(-loss)), 1 - kept_p + slack, 1 - kept_q + slack)


def _reach(pair: _Pair) -> float:
    """The width of the finite losses of an unsampled pair."""
    losses = pair.atoms.loss.tolist()
    if pair.continuous is not None:
        losses += [
            pair.continuous.slope * y + pair.continuous.shift for y in (pair.continuous.low, pair.continuous.high)
        ]
    return max(losses) - min(losses)


def _place(pair: _Pair, rate: float, h: float) -> Upper:
    """The pair ``(1 - rate) Q + rate P`` against Q, its dots connected."""
    shares = [(loss, p, q, cell) for loss, p, q, cell in _nodes(pair, rate, h)]
    first = min(int(cell[0]) for _, _, _, cell in shares)
    size = max(int(cell[-1]) for _, _, _, cell in shares) - first + 2
    removed, added = np.zeros(size), np.zeros(size)
    whole = -math.expm1(-h)
    # A loss is right to a few units of 2^-53, so that its place in the cell may be off by this share.
    farthest = max(float(np.max(np.abs(loss))) for loss, _, _, _ in shares)
    slack = 1e-14 * max(1.0, farthest) / h
    for loss, p, q, cell in shares:
        place = np.clip(loss - cell * h, 0, h)
        up = np.minimum(1.0, -np.expm1(-place) / whole + slack)
        down = np.minimum(1.0, -np.expm1(place - h) / whole + slack)
        below, above = cell - first, cell - first + 1
        removed += np.bincount(below, p * (1 - up), size) + np.bincount(above, p * up, size)
        added += np.bincount(below, q * down, size) + np.bincount(above, q * (1 - down), size)
    outside = pair.continuous
    p_out, q_out = (outside.p_outside, outside.q_outside) if outside is not None else (0.0, 0.0)
    p_infinite = rate * (p_out + pair.p_infinite) + (1 - rate) * q_out
    q_infinite = q_out
    if rate == 1:
        q_infinite += pair.q_infinite
    elif pair.q_infinite > 0:  # where P has nothing the loss is finite after sampling: log(1 - rate)
        missing = max(0, first - math.floor(math.log1p(-rate) / h))
        if missing > 2 * size + 1000:  # far away: infinite for one direction, moved up for the other
            missing, q_infinite = 0, q_out + pair.q_infinite
            removed[0] += (1 - rate) * pair.q_infinite
        else:
            removed, added = (np.concatenate([np.zeros(missing), masses]) for masses in (removed, added))
            first -= missing
            cell = math.floor(math.log1p(-rate) / h) - first
            removed[cell + 1] += (1 - rate) * pair.q_infinite
            added[cell] += pair.q_infinite
    last = first + len(removed) - 1
    return Upper(_trimmed(first, removed, p_infinite), _trimmed(-last, added[::-1], q_infinite))


def _trimmed(first: int, mass: Vector, infinite: float) -> Masses:
    """Without the ends that have next to no mass, which becomes infinite: doubles that small have lost their digits."""
    kept = np.flatnonzero(mass > _TINY)
    if not len(kept):
        return Masses(first, mass, infinite)
    cut = float(np.sum(mass[: kept[0]])) + float(np.sum(mass[kept[-1] + 1 :]))
    return Masses(first + int(kept[0]), mass[kept[0] : kept[-1] + 1], infinite + cut)


_Nodes = tuple[Vector, Vector, Vector, NDArray[np.int64]]


def _nodes(pair: _Pair, rate: float, h: float) -> Iterator[_Nodes]:
    """(loss, P-mass, Q-mass, cell) of nodes that stand for the finite losses of the sampled pair, cells ascending.

    A node lies in ``[cell h, (cell + 1) h]``; see the module's docstring for the error of the masses.
    """
    if len(pair.atoms.loss):
        loss = _sampled(pair.atoms.loss, rate)
        order = np.argsort(loss)
        p = (1 - rate) * pair.atoms.q + rate * pair.atoms.p
        cell = np.floor(loss / h).astype(np.int64)
        yield loss[order], p[order], pair.atoms.q[order], cell[order]
    if pair.continuous is not None:
        yield from _panels(pair.continuous, rate, h)


def _panels(part: _Continuous, rate: float, h: float) -> Iterator[_Nodes]:
    ends = np.array([part.low, part.high])
    first, inner = 0, np.zeros(0)
    if h < math.inf:
        low, high = _sampled(part.slope * ends + part.shift, rate).tolist()
        first = math.floor(low / h)
        inner = (
            _unsampled(h * np.arange(first + 1, math.ceil(high / h), dtype=np.float64), rate) - part.shift
        ) / part.slope
        inner = inner[(inner > part.low) & (inner < part.high)]
    # Exponentials are smoother than Gaussians.
    scale = 12 / max(12.0, -part.low, part.high) if part.gaussian else 12.0
    widest = scale * _WIDEST * (1 if h < math.inf else 4)  # a guess need not be exact
    even = np.linspace(part.low, part.high, int((part.high - part.low) / widest) + 2)
    breaks = np.sort(np.concatenate([even, inner]))
    left, width = breaks[:-1], np.diff(breaks)
    cells = first + np.searchsorted(inner, left, side="right")
    narrow = width < scale * _NARROW
    for chosen, (points, weights) in ((narrow, _FEW), (~narrow, _MANY)):
        if not chosen.any():
            continue
        half = width[chosen, None] / 2
        y = left[chosen, None] + half * (1 + points)
        loss = _sampled((part.slope * y + part.shift).ravel(), rate)
        p, q = ((density * (half * weights)).ravel() for density in part.densities(y))
        yield loss, (1 - rate) * q + rate * p, q, np.repeat(cells[chosen], len(points))


def _sampled(loss: Vector, rate: float) -> Vector:
    """``log(1 - rate + rate e^loss)``: the loss after sampling, right to a few units of 2^-53 times 1 + its size."""
    if rate == 1:
        return loss
    near = np.minimum(loss, 30.0)  # no overflow
    # Close to its least value the quotient of densities is a sum of small numbers, not 1 less nearly 1.
    small = np.log((1 - rate) + rate * np.exp(near))
    near = np.where((rate > 0.5) & (near < -0.7), small, np.log1p(rate * np.expm1(near)))
    return np.where(
        loss < 30, near, loss + math.log(rate) + np.log1p((1 - rate) / rate * np.exp(-np.maximum(loss, 30)))
    )


def _unsampled(loss: Vector, rate: float) -> Vector:
    """The loss before sampling whose sampled loss is ``loss``; -inf below ``log(1 - rate)``."""
    if rate == 1:
        return loss
    with np.errstate(divide="ignore", invalid="ignore", over="ignore"):
        near = np.log1p(np.maximum(np.expm1(np.minimum(loss, 1.0)) / rate, -1.0))
        if rate > 0.5:  # as in _sampled
            near = np.where(loss < -0.7, np.log(np.maximum(np.exp(loss) - (1 - rate), 0.0) / rate), near)
        far = loss - math.log(rate) + np.log1p(-(1 - rate) * np.exp(-np.maximum(loss, 1.0)))
    return np.where(loss < 1, near, far)


def _symmetrised(step: Upper, h: float) -> Upper:
    """The least pair whose hockey-stick divergence at ``e^epsilon >= 1`` is that of "removed", in both directions.

    P-mass at ``t > 0`` stays; "added" has the same, which is Q-mass at ``-t``, so P-mass ``e^-t`` times that; the rest
    of the mass has loss 0.  For a sampled pair this is again a pair: its Q-mass of positive losses is at most its
    P-mass of losses that are not.
    """
    first, mass, infinite, _ = step.removed
    positive = np.concatenate([np.zeros(max(0, first - 1)), mass[max(0, 1 - first) :]])  # at h, 2h, ..
    mirrored = positive * np.exp(-h * np.arange(1, len(positive) + 1))
    rest = max(0.0, 1 - infinite - math.fsum(positive) - math.fsum(mirrored)) + RELATIVE_ERROR
    both = Masses(-len(positive), np.concatenate([mirrored[::-1], [rest], positive]), infinite)
    return Upper(both, both)


def _mixture(good: Upper, bad: Upper, probability: float) -> Upper:
    """Bad with ``probability``, else good, told which: revealing that only helps to tell P from Q."""
    return Upper(*(_weighed(*pair, probability) for pair in zip(good, bad, strict=True)))


def _weighed(good: Masses, bad: Masses, probability: float) -> Masses:
    first = min(good.first, bad.first)
    size = max(good.first + len(good.mass), bad.first + len(bad.mass)) - first
    mass = np.zeros(size)
    for part, share in ((good, 1 - probability), (bad, probability)):
        mass[part.first - first :][: len(part.mass)] += share * part.mass
    return Masses(first, mass, (1 - probability) * good.infinite + probability * bad.infinite)


def _moved_down(pair: _Pair, rate: float, h: float) -> Masses:
    """The sampled pair with every loss moved down to the grid."""
    found = [(np.floor((loss - 1e-14 * np.maximum(1, np.abs(loss))) / h), p) for loss, p, _, _ in _nodes(pair, rate, h)]
    if rate < 1:
        found.append(
            (np.array([math.floor((math.log1p(-rate) - 1e-14) / h)]), np.array([(1 - rate) * pair.q_infinite]))
        )
    index = np.concatenate([place for place, _ in found]).astype(np.int64)
    first = int(np.min(index))
    weight = np.concatenate([p for _, p in found])
    return Masses(first, _summed(index - first, weight), rate * pair.p_infinite)


def _summed(index: NDArray[np.int64], weight: Vector) -> Vector:
    """The weights of each index, from 0 on."""
    return np.asarray(np.bincount(index, weight), dtype=np.float64)


# -- merging, for the sampled Gaussian: y has the law N(0, 1) without the record, and N(mu, 1) with it ----------------


def _merged(mu: float, rate: float, h: float, negligible: float) -> Masses:
    """See the module's docstring; all outcomes are used, so that no mass is missing."""
    reach = -float(scipy.special.ndtri(negligible / 4))
    low, high = _sampled(mu * np.array([-reach, mu + reach]) - mu * mu / 2, rate).tolist()
    end, offset, steps = _first_cell(mu, rate, h, low, reach)
    cells = max(1, math.ceil((high - end) / (3 * h)))
    y = _outcome(
        end + 1.5 * h * np.arange(2 * cells, dtype=np.float64), mu, rate
    )  # ends and middles; the last half is open
    p, q = _between(mu, rate, np.concatenate([[-np.inf], y, [np.inf]]))
    half_p, half_q = p[1:].reshape(-1, 2), q[1:].reshape(-1, 2)
    with np.errstate(divide="ignore", invalid="ignore"):
        loss, whole = np.log(half_p / half_q), np.log(half_p.sum(axis=1) / half_q.sum(axis=1))
    target = steps + 1 + 3 * np.arange(cells)
    grid = offset + target * h
    # Rounding of the merged losses: quotients of differences of Phi, which is right to a few units times 1 + y^2.
    lifted = 1 - (1 - rate) * np.exp(-grid)  # share of P that comes from the record
    margin = 1e-15 * (1 + np.abs(grid)) + 1e-15 * (4 + reach**2) * mu * lifted**2 / h
    fits = (loss[:, 0] <= grid - margin) & (loss[:, 1] >= grid + h + margin) & (whole >= grid + margin)
    share = np.clip(-np.expm1(-(whole[fits] - margin[fits] - grid[fits])) / -math.expm1(-h), 0, 1)
    mass = half_p[fits].sum(axis=1)
    left = ~fits[:, None] & (half_p > 1e-290) & (half_q > 1e-290)
    down = np.floor((loss[left] - np.repeat(margin, 2).reshape(-1, 2)[left] - offset) / h).astype(np.int64)
    index = np.concatenate([[0], target[fits], target[fits] + 1, down])
    weight = np.concatenate([p[:1], mass * (1 - share), mass * share, half_p[left]])
    first = int(np.min(index))
    return Masses(first, _summed(index - first, weight), 0.0, offset)


def _first_cell(mu: float, rate: float, h: float, low: float, reach: float) -> tuple[float, float, int]:
    """(its end, its merged loss, grid steps between the two, about): all losses up to ``end`` as one atom.

    It takes in the outcomes where the density of the loss changes by more than a third over a grid step.
    """
    y = np.arange(-min(reach, 36 - mu), 0.0, 0.25)  # below, nothing is left of N(mu, 1)
    growth = rate * np.exp(mu * y - mu * mu / 2)
    slope = mu * growth / (1 - rate + growth)
    smooth = np.append((np.abs(y) + mu) * h <= 0.3 * slope, True)
    start = np.append(y, 0.0)[np.argmax(smooth)]
    end = max(low, float(_sampled(np.array([mu * start - mu * mu / 2]), rate)[0])) + h

    def merged_loss(end: float) -> float:
        p, q = _between(mu, rate, np.array([-np.inf, float(_outcome(np.array([end]), mu, rate)[0])]))
        return math.log(p[0] / q[0])

    # A whole number of steps, about: the next cells then lie around grid points.
    steps = math.ceil((end - merged_loss(end)) / h)
    low, high = end, end + 64 * h
    for _ in range(12):
        end = (low + high) / 2
        low, high = (low, end) if end - merged_loss(end) > steps * h else (end, high)
    loss = merged_loss(end)
    return end, loss - 1e-15 * (5 + abs(loss) + reach**2), steps  # Phi far out is right to some y^2 units


def _outcome(loss: Vector, mu: float, rate: float) -> Vector:
    """The outcome y whose loss is ``loss``; -inf below the least loss."""
    return (_unsampled(loss, rate) + mu * mu / 2) / mu


def _between(mu: float, rate: float, y: Vector) -> tuple[Vector, Vector]:
    """(P-masses, Q-masses) between neighbouring outcomes ``y``, each by the tail in which nothing cancels."""

    def masses(low: Vector, high: Vector) -> Vector:
        left = scipy.special.ndtr(high) - scipy.special.ndtr(low)
        return np.where(low > 0, scipy.special.ndtr(-low) - scipy.special.ndtr(-high), left)

    q = masses(y[:-1], y[1:])
    return (1 - rate) * q + rate * masses(y[:-1] - mu, y[1:] - mu), q
