r"""What a search leaks that runs a random number of trials and releases the best: an upper bound, by two theorems.

The search draws K from a law with generating function phi, runs Q (a whole training run with its score) K times with
fresh randomness, and releases the best output by some order on outputs; if K = 0 it releases a fixed symbol.  What is
computed here holds under :data:`CONDITIONS`, both directions of neighbours included.  A grid of fixed size and a sweep
that looks at earlier scores do not meet them, and are charged by :func:`full_composition`.

Write p, p' for the densities of Q on two neighbours and u(y), u'(y) for the probabilities of an output better than y.
Ties are broken by an independent uniform number, which changes no divergence of Q and makes u uniform under p.  The
search releases y with density ``p(y) phi'(1 - u(y))``, and the symbol with probability phi(0) on both sides.  Let
m = E[K] = phi'(1), ``w(u) = phi'(1 - u)``, which falls from m, and delta(e) any bound of the privacy profile of Q that
holds in both directions; for negative e it means ``delta(-e) = 1 - e^-e (1 - delta(e))``, the same statement about the
other direction.

**Profile theorem.**  Let ``T(u) = inf_e min(1, e^e u + delta(e))`` over all real e, and H(v) the supremum of
``ln w(u) - ln w(T(u))`` over u <= v.  For every epsilon >= 0

    delta_search(epsilon) <= int_0^1 w da    for every increasing a, a(0) = 0, that is nowhere below
    b(v) = min(v, inf_{x <= v} delta(epsilon - H(x)) + v - x)

*Proof.*  The event {better than y} has u' <= T(u), so ``p' w(u') >= p' w(u) e^-H(v)`` wherever u <= v, and the symbol
adds ``(phi(0) - e^epsilon phi(0))_+ = 0``.  What the densities differ by is therefore at most ``w(u) g``, where
``g = (p - e^(epsilon - h) p')_+``, ``h = ln w(u) - ln w(T(u))``.  Let c(v) be the integral of g over {u <= v}.  It is
at most delta(epsilon - H(v)), since h <= H(v) there, and c(v) - c(x) is at most v - x, the probability of x < u <= v
under p.  So c <= b <= a, and since w falls, ``delta_search(epsilon) <= int w dc <= int w da``.  QED

The constant a = delta(epsilon - H(1)) gives ``m delta(epsilon - H(1))``; with one line ``e^t u + delta(t)`` for T that
is the form of Koskela, Redberg and Wang (ICML 2024, https://arxiv.org/abs/2402.06701; all proofs here are our
own).  A constant up to x and the slope 1 behind give ``m delta(epsilon - H(x)) + P(no trial among the best x)``, which
is what Poisson trials need.  For Gaussian trials there are orders on outputs that attain all but 4 % of epsilon
(truncated negative binomial and binomial laws) or all but 20 % (Poisson trials, means up to 1000).

*Computation.*  A profile is convex and falls as a function of e^epsilon: chords between evaluations are upper bounds,
and so are the lines ``e^e u + delta(e)`` of the same evaluations for T.  [0, 1] is cut into cells; in each, T is
replaced by one line, on which ln w(u) - ln w(line) is monotone for all three laws (linear, or the logarithm of a
Moebius function of u), so that H is known from the ends of cells.  a is constant within a cell, at what bounds b at its
right end, and w is taken at its left end.  All of that is sound for any knots and cells; they decide how tight it is.

**Renyi theorem.**  Let A be the moment of Q of order alpha > 1, and S a bound of ``h = w(u)^alpha w(u')^(1-alpha)`` for
all y.  The moment of the search is at most ``phi(0) + S A``, and at most ``1 + S (A - 1)`` where ln phi' is convex
(truncated negative binomial and Poisson laws).

*Proof.*  The moment is ``phi(0) + int p^alpha p'^(1-alpha) h``: the first claim.  By Bernoulli's inequality
``p^alpha p'^(1-alpha) >= alpha p - (alpha-1) p'``, so ``int p^alpha p'^(1-alpha) (S - h) >= S - J`` with
``J = int (alpha p - (alpha-1) p') h``.  With F = 1 - u and F' = 1 - u', J is a line integral along the rising path of
(F, F') from (0, 0) to (1, 1).  Along the diagonal it would be ``int phi'(z) dz = 1 - phi(0)``.  By Green's theorem the
two differ by the integral of ``alpha (alpha-1) h |l(F') - l(F)|``, with l = phi''/phi', over the area between them; if
l grows, J is the smaller one, on either side of the diagonal.  So the moment is at most
``phi(0) + S A - S + J <= 1 + S (A - 1)``.  QED

S is the lesser of two bounds.  One is the supremum of ``w(u)^alpha w(T(u))^(1-alpha)``, with the T of the profile that
the moments themselves imply.  The other uses a moment ``e^L(beta)`` of any order beta >= 1 directly (L(1) = 0): one
event gives ``u' <= u^(1-1/beta) e^(L/beta)``, and

* truncated negative binomial: ``w(u)/w(u') = ((gamma + (1-gamma) u') / (gamma + (1-gamma) u))^(eta+1)``.  By Hoelder
  ``gamma + (1-gamma) u' <= (gamma + (1-gamma) e^L)^(1/beta) (gamma + (1-gamma) u)^(1-1/beta)``, hence
  ``ln S = ln m + (alpha-1) (eta+1) min_beta (1/beta) ln(1 + (1-gamma)/gamma e^L(beta))``;
* binomial: the same with F, F' for u', u, from ``w(u)/w(u') = ((1-p + p F) / (1-p + p F'))^(n-1)``, hence
  ``ln S = ln m + (alpha-1) (n-1) min_beta (1/beta) ln(1 + p/(1-p) e^L(beta))``.

This improves on theorems 2 and 6 of Papernot and Steinke (ICLR 2022, https://arxiv.org/abs/2110.03620), which have S A
for ``1 + S (A - 1)``.  In theorem 2 (truncated negative binomial) S is the second bound, with ``e^L / gamma`` for
``1 + (1-gamma)/gamma e^L``.  In theorem 6 (Poisson; it needs max(ln m, 0) for ln m, as m may be below 1) S is the first
bound with one line for T: where ``e^t = alpha/(alpha-1)``, ``(alpha-1) u' - alpha u <= (alpha-1) delta(t)``.

Renyi divergences grow with the order, so the least over larger orders is taken last.
"""

from __future__ import annotations

import heapq
import math
from collections.abc import Callable
from itertools import pairwise
from typing import NamedTuple

import numpy as np

from . import rdp
from .events import Event, Repeated, Trials
from .sampled_gaussian import ORDERS, Vector, log1p_exp, log_expm1
from .trials import ROUNDING, UP, Law, law_of
from .trials import geometric as geometric
from .trials import logarithmic as logarithmic
from .trials import mean as mean
from .trials import probability as probability
from .trials import sample as sample
from .trials import truncated_negative_binomial as truncated_negative_binomial
from .values import check_delta, check_epsilon

Profile = Callable[[float], float]
"""An upper bound of the delta of one trial at an epsilon >= 0, in both directions."""

CONDITIONS: tuple[str, ...] = (
    "The number of trials was drawn from the stated law, with the stated parameters, before anything was looked at.",
    "Every trial that was drawn is run: a number of trials cut off by time or cost has another law.",
    "Each trial draws its hyperparameters from one distribution that depends neither on the data nor on other trials.",
    "Each trial has fresh noise and fresh batches, and the bound of one trial holds for all hyperparameters.",
    "The score is computed from public data, or its cost is part of the bound of one trial.",
    "The score is one function of a trial's own outcome, fixed before the search: no choice by eye afterwards.",
    "No trial is stopped, pruned or changed because of another one.",
    "Trials that crash or score NaN have the lowest score; they are neither repeated nor left out.",
    "Only the best trial is released: not the others, not their scores, and not the number of trials, which no "
    "released ledger, log or duration may show.",
    "If no trial is drawn (Poisson and binomial laws), a fixed symbol is released and nothing is drawn again.",
)
"""What has to be true of a search for the numbers of this module to hold; to be printed with every one of them."""


class FullComposition(NamedTuple):
    """What a search is charged that does not meet the conditions, and why."""

    event: Repeated
    reason: str


def full_composition(event: Event, count: int) -> FullComposition:
    """The charge for a grid of ``count`` trials, or for an adaptive sweep of at most ``count``: every trial in full.

    Guarantee: the event covers all outputs of all trials.
    Requires: a ``count`` that was fixed before the first trial.
    Why: composition of ``count`` releases, each at most as revealing as ``event``.

    Args:
      event: one trial, a training run with its score; of trials that differ, one that is as revealing as any.
      count: trials that were started, crashed and pruned ones included; fixed before the first.

    Raises:
      InvalidParameter: a count that is not a whole number from 0 to 2^53.
    """
    return FullComposition(
        Repeated(event=event, count=count),
        f"Full composition of {count} trials, as if all of them were released: the cheaper bound for the best of a "
        "search needs a number of trials that was drawn from a law and stays secret, and trials that do not depend on "
        "each other. A grid of fixed size and a sweep that looks at earlier scores do not have that.",
    )


def renyi_log_moments(trials: Trials, base: Vector) -> Vector:
    """log A(alpha) = (alpha - 1) * (Renyi divergence) of the search, for every order of ``ORDERS``; never too small.

    Guarantee: no moment of a search that meets :data:`CONDITIONS` is larger.
    Requires: :data:`CONDITIONS`, and moments of one trial that are not too small, in both directions.
    Why: see the module, its Renyi theorem.

    Args:
      trials: law of the number of trials.
      base: the same of one trial, in both directions; inf where it has no moment.

    Source: the Renyi theorem of the module; Papernot and Steinke 2022, theorems 2 and 6.

    Raises:
      Unsupported: ``trials`` is a fixed number, or no law that is known here.
    """
    law = law_of(trials)
    with np.errstate(divide="ignore"):  # an excess of 0
        log_supremum = _log_supremum(law, base)
        if law.log_nothing is None:
            result = log1p_exp(log_supremum + log_expm1(base))
        else:
            result = np.logaddexp(law.log_nothing, log_supremum + base)
    divergences = np.minimum.accumulate((result / _ABOVE_ONE)[::-1])[::-1]
    return divergences * _ABOVE_ONE * (1 + ROUNDING)


def profile_delta(trials: Trials, epsilon: float, base: Profile) -> float:
    """An upper bound of the delta of the search at ``epsilon``, in [0, 1] and in both directions.

    Guarantee: no search that meets :data:`CONDITIONS` has a larger delta.
    Requires: :data:`CONDITIONS`, and a profile of one trial that is nowhere too small, in both directions.
    Why: see the module, its profile theorem.

    Args:
      trials: law of the number of trials.
      epsilon: at least 0.
      base: profile of one trial; called about a hundred times, for epsilons up to some times ``epsilon``.

    Source: the profile theorem of the module.

    Raises:
      Unsupported: ``trials`` is a fixed number, or no law that is known here.
      InvalidParameter: a negative or infinite epsilon.
    """
    return float(profile_deltas(trials, np.array([check_epsilon(epsilon)]), base)[0])


def profile_deltas(trials: Trials, epsilons: Vector, base: Profile) -> Vector:
    """:func:`profile_delta` at each of ``epsilons`` (at least 0) from the same evaluations of ``base``.

    Guarantee, Requires, Why: as of :func:`profile_delta`.
    """
    law = law_of(trials)
    table = _tabulate(base, _NEGLIGIBLE * _bounded(base(min(float(np.max(epsilons)), _LARGEST))))
    cells = _cut(law, table)
    return np.array([_delta(law, table, cells, epsilon) for epsilon in epsilons])


def profile_epsilon(trials: Trials, delta: float, base: Profile) -> float:
    """An epsilon >= 0 at which the delta of the search was bounded by ``delta``; inf if none below 700 was found.

    Guarantee, Requires, Why: as of :func:`profile_delta`.

    Raises:
      Unsupported: ``trials`` is a fixed number, or no law that is known here.
      InvalidParameter: delta outside (0, 1).
    """
    delta = check_delta(delta)
    law = law_of(trials)
    table = _tabulate(base, _NEGLIGIBLE * delta / law.mean)
    cells = _cut(law, table)
    low, high = 0.0, min(_LARGEST, math.log(table.x[-1]) + float(cells.climb[-1]))
    if _delta(law, table, cells, high) > delta:
        return math.inf
    if _delta(law, table, cells, low) <= delta:
        return low
    while high - low > 1e-9 * high:
        middle = (low + high) / 2
        low, high = (low, middle) if _delta(law, table, cells, middle) <= delta else (middle, high)
    return high


def epsilon_bound(trials: Trials, delta: float, base_delta: Profile, base_log_moments: Vector) -> float:
    """The smaller of both theorems.

    Guarantee: a search that meets :data:`CONDITIONS` is (epsilon_bound, delta)-private.
    Requires: :data:`CONDITIONS`, and bounds of one trial that hold in both directions.
    Why: see the module; the lesser of two upper bounds is one.

    Args:
      trials: law of the number of trials.
      delta: in (0, 1).
      base_delta: profile of one trial.
      base_log_moments: its log-moments, as for :func:`renyi_log_moments`.

    Raises:
      Unsupported: ``trials`` is a fixed number, or no law that is known here.
      InvalidParameter: delta outside (0, 1).
    """
    delta = check_delta(delta)
    moments = renyi_log_moments(trials, base_log_moments)
    by_moments = float(np.min((moments + rdp._CONVERSION - math.log(delta)) / _ABOVE_ONE)) * (1 + ROUNDING)
    return min(max(0.0, by_moments), float(profile_epsilon(trials, delta, base_delta)))


_ABOVE_ONE = ORDERS - 1
_LARGEST = 700.0  # e^epsilon must stay a double
_NEGLIGIBLE = 1e-3


def _log_supremum(law: Law, base: Vector) -> Vector:
    """ln S of the Renyi theorem at each order, rounded up."""
    table = _tabulate(lambda epsilon: _delta_by_moments(base, epsilon), 1e-9 / law.mean)
    cells = _cut(law, table)
    by_profile = np.array([np.max(order * cells.climb_here - cells.fallen) for order in _ABOVE_ONE])
    power, log_odds = law.odds
    growth = min(float(np.min(log1p_exp(log_odds + base) / ORDERS)), float(np.logaddexp(0.0, log_odds)))
    least = np.minimum(by_profile, _ABOVE_ONE * (power * growth))
    return math.log(law.mean) + least + ROUNDING * (1 + np.abs(least))


def _delta_by_moments(base: Vector, epsilon: float) -> float:
    """By the conversion of ``rdp.py``, or total variation (Pinsker; Bretagnolle and Huber) where that is less."""
    divergence = float(base[0] / _ABOVE_ONE[0])
    variation = math.sqrt(min(divergence / 2, -math.expm1(-divergence)))
    return min(float(rdp._deltas(base, epsilon)), variation) * (1 + 1e-9) + math.ulp(0.0)


class _Table(NamedTuple):
    """Corners of an upper bound of one trial's profile, convex and decreasing in x = e^epsilon, from (0, 1) on."""

    x: Vector
    delta: Vector

    def at(self, x: Vector) -> Vector:
        """The chord above each of ``x``; behind the last corner its delta."""
        x = np.minimum(x, self.x[-1])
        right = np.clip(np.searchsorted(self.x, x, side="right"), 1, len(self.x) - 1)
        before, behind = x - self.x[right - 1], self.x[right] - x
        return (behind * self.delta[right - 1] + before * self.delta[right]) / (before + behind) * UP


_EVALUATIONS = 128


def _tabulate(base: Profile, negligible: float) -> _Table:
    """Evaluates ``base`` where it bends, up to where it falls to ``negligible``."""
    top, deltas = 0.0, {0.0: _bounded(base(0.0))}
    while deltas[top] > negligible and top < _LARGEST:
        top = min(max(2 * top, 2.0**-10), _LARGEST)
        deltas[top] = _bounded(base(top))

    def interval(left: float, right: float) -> tuple[float, float, float]:
        """What a chord over the interval may cost in epsilon, negative, for the heap: the dearest is cut first."""
        width = right - left
        high, low = deltas[left] + negligible, deltas[right] + negligible
        drop = math.log(high / low) if low > 0 else math.inf if high > 0 else 0.0
        return -width * min(1.0, drop) - min(width * width, drop), left, right

    knots = sorted(deltas)
    heap = [interval(*ends) for ends in pairwise(knots)]
    heapq.heapify(heap)
    while heap and len(deltas) < _EVALUATIONS and -heap[0][0] > 1e-6 * top:
        _, left, right = heapq.heappop(heap)
        middle = (left + right) / 2
        deltas[middle] = _bounded(base(middle))
        heapq.heappush(heap, interval(left, middle))
        heapq.heappush(heap, interval(middle, right))

    epsilon = np.array(sorted(deltas))
    delta = np.minimum.accumulate([deltas[knot] for knot in epsilon])
    # The other direction: 1 - e^-epsilon (1 - delta) at -epsilon. Moving a corner right or up keeps it a bound.
    shrunk = np.exp(-epsilon[:0:-1])
    x = np.concatenate([[0.0], shrunk * UP, np.exp(epsilon) * UP])
    y = np.concatenate([[1.0], (-np.expm1(-epsilon[:0:-1]) + shrunk * delta[:0:-1]) * UP, delta])
    kept = _lower_hull(x, y)
    return _Table(x[kept], y[kept])


def _bounded(delta: float) -> float:
    return 1.0 if math.isnan(delta) else max(0.0, min(1.0, delta))  # NaN says nothing


def _lower_hull(x: Vector, y: Vector) -> list[int]:
    """Indices of the corners of the greatest convex function below the points that falls; any subset would be sound."""
    kept = [0]
    for index in range(1, len(x)):
        if y[index] >= y[kept[-1]]:
            continue
        while len(kept) > 1:
            first, last = kept[-2:]
            if (y[last] - y[first]) / (x[last] - x[first]) < (y[index] - y[last]) / (x[index] - x[last]):
                break
            kept.pop()
        kept.append(index)
    return kept if len(kept) > 1 else [0, len(x) - 1]


class _Cells(NamedTuple):
    """[0, 1] in intervals of u."""

    left: Vector
    right: Vector
    climb_here: Vector
    """Supremum of ln w(u) - ln w(T(u)) over the cell."""
    climb: Vector
    """H at the right end: the same over this cell and all before."""
    fallen: Vector
    """ln w(0) - ln w(left), rounded down."""


def _cut(law: Law, table: _Table) -> _Cells:
    """Cells that are short where w, T or H change."""
    bends = np.clip(-(np.diff(table.delta) / np.diff(table.x))[::-1], 0.0, 1.0)  # where T passes to the next line
    levels = law.where(_LEVELS)
    levels = levels[levels < 1]
    tops = np.min(np.multiply.outer(bends, table.x) + table.delta, axis=1)
    reached = np.interp(levels, tops, bends, left=0.0)
    cuts = np.unique(np.concatenate([[0.0], bends, levels, reached, [1.0]]))
    climb = np.maximum.accumulate(_climb(law, table, bends, cuts))
    with np.errstate(invalid="ignore"):
        pieces = np.nan_to_num(np.diff(climb, prepend=0.0) / (_FINEST * (0.1 + climb)), nan=1.0)
    pieces = np.clip(np.ceil(pieces), 1, 200).astype(int)
    share = np.concatenate([np.arange(count) / count for count in pieces])
    cuts = np.unique(np.append(np.repeat(cuts[:-1], pieces) + np.repeat(np.diff(cuts), pieces) * share, 1.0))
    left, here = cuts[:-1], _climb(law, table, bends, cuts)
    return _Cells(left, cuts[1:], here, np.maximum.accumulate(here), law.climb(np.zeros_like(left), left) / UP**2)


_FINEST = 2e-3
# ln(w(0)/w(u)) at ends of cells: 0.02 apart while it is below 10, then in proportion.
_LEVELS = np.concatenate([np.geomspace(1e-6, 0.02, 100)[:-1], np.arange(0.02, 10.0, 0.02), np.geomspace(10, 700, 2000)])


def _climb(law: Law, table: _Table, bends: Vector, cuts: Vector) -> Vector:
    left, right = cuts[:-1], cuts[1:]
    line = len(table.x) - 1 - np.searchsorted(bends, (left + right) / 2)
    x, delta = table.x[line], table.delta[line]
    ends = (law.climb(end, np.maximum(end, (x * end + delta) * UP)) for end in (left, right))
    return np.maximum(*ends)


def _delta(law: Law, table: _Table, cells: _Cells, epsilon: float) -> float:
    """The bound of the profile theorem with a constant a in each cell."""
    rounding = 1e-15 * (epsilon + cells.climb)
    here = table.at(np.exp(np.minimum(epsilon - cells.climb - rounding, _LARGEST)) / UP)
    # min over x of here(x) + v - x for each right end v; sums of positive numbers, at whichever x looked least.
    start, value = np.append(0.0, cells.right), np.append(0.0, here)
    behind = value - start
    least = np.maximum.accumulate(np.where(behind == np.minimum.accumulate(behind), np.arange(len(start)), 0))[1:]
    reached = value[least] + (cells.right - start[least])
    total = law.mean * float(np.exp(-cells.fallen) @ np.diff(reached, prepend=0.0))
    # Abel's sum errs by no more than the number of cells times 2^-52, relatively, since every w * reached is below it.
    return min(1.0, total * (1 + 1e-9) + law.mean * 1e-300 + math.ulp(0.0))
