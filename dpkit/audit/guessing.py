"""Lower bounds on epsilon from one run: guess which canaries were used, and count how often that is right.

The experiment: each of m canaries was put into the training set by a fair coin of its own, and one model was trained.
``scores`` hold one number for each canary, larger where it rather looks as if it was used. The canaries with the
largest scores are guessed "inside", those with the smallest "outside", and the others are left alone; how many of each
was fixed before looking, or is one of a few fixed choices that share the risk.

Guarantee, of both functions: if the canaries were drawn so, the bound is above the true epsilon with probability at
most 1 - ``confidence``, whatever else is in the data, and however the canaries influence each other.

Where scores are equal across the edge between guessed and left alone, as many wrong guesses are assumed as could be:
the count is then at most that of any rule that does not know who is a member. So the order of the scores tells nothing,
and constant scores give the bound 0.

Each needs that a canary's presence makes neighbours: used or not used is add-or-remove and zero-out. Under replace-one
a canary that is not used must have been replaced by another record.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import NamedTuple

import numpy as np
import scipy
from numpy.typing import ArrayLike, NDArray

from accounting import Event, Relation
from accounting.trade_off import tangents
from accounting.values import check_delta
from dpkit.errors import InvalidArgument

from .scaling import inverted
from .thresholds import Vector, as_scores, checked_confidence
from .verdict import LowerBound

_SHARES = (0.005, 0.01, 0.02, 0.05, 0.1, 0.2, 0.35, 0.5)
"""Of the canaries, guessed inside, and as many outside; each has an equal part of the risk."""
_FEWEST_GUESSES = 10
_UNFAIR = 1e-6
_FARTHEST = 60.0
_KNOTS = 240
_LEAST_DELTA = 1e-12
_ROUND_DOWN, _ROUND_UP = 1 - 1e-9, 1 + 1e-9


class Guesses(NamedTuple):
    """``correct`` of ``inside + outside`` guesses about ``canaries`` were right."""

    inside: int
    outside: int
    correct: int
    canaries: int

    @property
    def made(self) -> int:
        return self.inside + self.outside


def one_run(
    scores: ArrayLike,
    member: ArrayLike,
    *,
    delta: float,
    confidence: float = 0.95,
    guesses: Sequence[tuple[int, int]] | None = None,
) -> LowerBound:
    """The epsilon below which no (epsilon, delta)-private training lets so many guesses be right.

    Why: given all other coins, the odds of a canary's coin are at most e^epsilon whatever was released, so that with
    delta = 0 the number of right guesses is stochastically at most binomial with rate e^epsilon / (1 + e^epsilon). The
    chance of v or more right guesses is then at most

        P[B >= v] + 2 m delta max over i of (P[B >= v - i] - P[B >= v]) / i

    (Steinke, Nasr and Jagielski 2023, https://arxiv.org/abs/2305.08846, theorem 5.2).

    Args:
      scores: one for each canary.
      member: whether it was used.
      guesses: numbers of guesses (inside, outside) to try, fixed without looking at the scores; left out, a few shares
        of the canaries.

    Raises:
      InvalidArgument: arrays that do not fit, or canaries that a fair coin would hardly have drawn so.
    """
    delta, alpha = check_delta(delta), 1 - checked_confidence(confidence)
    made = _guesses(scores, member, guesses)

    def epsilon_of(each: Guesses) -> float:
        return _least_epsilon(each, delta, alpha / len(made))

    best = max(made, key=epsilon_of)
    return LowerBound(epsilon_of(best), delta, confidence, "one run, (epsilon, delta)", _details(best, len(made)))


def one_run_f_dp(
    scores: ArrayLike,
    member: ArrayLike,
    event_of: Callable[[float], Event],
    *,
    relation: Relation,
    delta: float,
    confidence: float = 0.95,
    guesses: Sequence[tuple[int, int]] | None = None,
) -> LowerBound:
    """The epsilon of the claimed event with other noise, at the least noise that so many right guesses contradict.

    Why: let t_j be the chance of j or more right guesses of c about m canaries, and f the trade-off curve. Turning one
    canary's coin around turns a right guess about it into a wrong one. With the f-privacy of each pair of coins, the
    average over canaries and coins, and the concavity of 1 - f, for every i,

        R_{i+1} <= 1 - f(H_i),   m R_i = i t_i + sum over j > i of t_j,   m H_i = (c - i) t_i - sum over j > i of t_j

    (Mahloujifar, Melis and Chaudhuri 2024, https://arxiv.org/abs/2410.22235, theorem 3.2 and algorithm 3, which this
    follows). So t_i is at least a number that grows with every later t_j, and from t_v = alpha with nothing beyond it
    follow lower bounds of t_{v-1}, .., t_0. If that of t_0 is above 1, v or more right guesses have a chance below
    alpha.

    Args:
      event_of: the claimed event with every noise multiplier times the argument; :func:`scaled` makes it.
      relation: under which the canary's presence makes neighbours.
      scores, member, guesses: as of :func:`one_run`.

    Raises:
      InvalidArgument: as :func:`one_run`.
    """
    delta, alpha = check_delta(delta), 1 - checked_confidence(confidence)
    made = _guesses(scores, member, guesses)

    def rejected(scale: float) -> bool:
        curve = mirrored_curve(event_of(scale), relation)
        return any(contradict(each, curve, alpha / len(made)) for each in made)

    best = max(made, key=lambda each: _least_epsilon(each, delta, alpha / len(made)))
    return inverted(
        rejected,
        event_of,
        relation=relation,
        delta=delta,
        confidence=confidence,
        method="one run, claimed trade-off curve",
        details=_details(best, len(made)),
    )


def check_fair_coin(inside: int, outside: int) -> None:
    """Returns if ``inside`` of all canaries can have been drawn by fair coins; else InvalidArgument."""
    least = min(inside, outside)
    if 2 * scipy.stats.binom.cdf(least, inside + outside, 0.5) < _UNFAIR:
        raise InvalidArgument(
            f"{inside} canaries were used and {outside} were not: fair coins would hardly ever draw so unevenly (less "
            "than once in a million), and the one-run bound holds for fair coins only. Draw each canary with "
            "probability 1/2, or use an estimator for independent scores (Clopper-Pearson)."
        )


def _guesses(scores: ArrayLike, member: ArrayLike, counts: Sequence[tuple[int, int]] | None) -> list[Guesses]:
    scores, member = as_scores("scores", scores), np.asarray(member)
    if member.dtype != np.bool_ or member.shape != scores.shape:
        raise InvalidArgument(
            f"member has shape {member.shape} and type {member.dtype}, scores {scores.shape}: give one bool for each."
        )
    size = len(scores)
    check_fair_coin(int(member.sum()), int((~member).sum()))
    if counts is None:
        shares = dict.fromkeys(min(round(share * size), size // 2) for share in _SHARES)
        counts = [(each, each) for each in shares if 2 * each >= _FEWEST_GUESSES] or [(size // 2, size // 2)]
    for top, bottom in counts:
        if not (top >= 0 and bottom >= 0 and 1 <= top + bottom <= size):
            raise InvalidArgument(f"guesses holds {(top, bottom)}: of {size} canaries 1 to {size} are guessed.")
    return [
        Guesses(top, bottom, _right(scores, member, top) + _right(-scores, ~member, bottom), size)
        for top, bottom in counts
    ]


def _right(scores: Vector, member: NDArray[np.bool_], count: int) -> int:
    """Right guesses among the ``count`` largest scores, the fewest that ties allow."""
    if count == 0:
        return 0
    edge = np.partition(scores, len(scores) - count)[len(scores) - count]
    surely, tied = scores > edge, scores == edge
    left = count - int(surely.sum())
    return int(member[surely].sum()) + max(0, left - int((tied & ~member).sum()))


def _least_epsilon(guesses: Guesses, delta: float, alpha: float) -> float:
    """The largest epsilon found at which so many right guesses have a chance of at most ``alpha``."""

    def unlikely(epsilon: float) -> bool:
        return _chance(guesses, epsilon, delta) <= alpha

    if not unlikely(0.0):
        return 0.0
    low, high = 0.0, 2.0**-6
    while high < _FARTHEST and unlikely(high):
        low, high = high, high * 1.5
    if high >= _FARTHEST:
        return low
    while high - low > 1e-5:
        middle = (low + high) / 2
        low, high = (middle, high) if unlikely(middle) else (low, middle)
    return low


def _chance(guesses: Guesses, epsilon: float, delta: float) -> float:
    """Of so many right guesses or more, never too small."""
    right, made = guesses.correct, guesses.made
    if right == 0:
        return 1.0
    rate = 1 / (1 + math.exp(-epsilon))
    at_least = float(scipy.special.bdtrc(right - 1, made, rate))
    # Where the tail is 1 already, fewer guesses only make the quotient smaller.
    spread = 10 * math.sqrt(made) + 10
    farthest = min(right, max(1, math.ceil(right - made * rate + spread)))
    fewer = np.arange(1, farthest + 1)
    tails = np.where(right == fewer, 1.0, scipy.special.bdtrc(np.maximum(right - fewer - 1, 0), made, rate))
    quotient = max(float(np.max((tails - at_least) / fewer)), (1 - at_least) / (farthest + 1))
    return min(1.0, (at_least + 2 * guesses.canaries * delta * quotient) * _ROUND_UP)


class MirroredCurve(NamedTuple):
    """x -> f(1 - x) as the largest of lines ``slope (x - origin) + height`` and 0, never above it.

    ``until`` is where the next line, which is steeper, overtakes each; the last one's is infinite.
    """

    lines: list[tuple[float, float, float]]
    until: list[float]


def mirrored_curve(event: Event, relation: Relation) -> MirroredCurve:
    """The trade-off curve of ``event``, mirrored; its tangents, one for each of a few epsilons.

    Raises:
      Unsupported: no accountant covers the event under this relation.
    """
    found = tangents(event, relation=relation, least=_LEAST_DELTA, knots=_KNOTS)
    pairs = list(zip(found.epsilons.tolist(), found.deltas.tolist(), strict=True))
    # By slope: e^-epsilon (x - delta), from the largest epsilon on, and then 1 - delta - e^epsilon (1 - x).
    sloped = [(math.exp(-epsilon), delta, 0.0) for epsilon, delta in reversed(pairs)]
    sloped += [(math.exp(epsilon), 1.0, 1 - delta) for epsilon, delta in pairs[1:]]
    lines: list[tuple[float, float, float]] = []
    until: list[float] = []
    for line in sloped:
        while lines:
            meeting = _meeting(lines[-1], line)
            if meeting > (until[-2] if len(until) > 1 else -math.inf):
                until[-1] = meeting
                break
            lines.pop()
            until.pop()
        lines.append(line)
        until.append(math.inf)
    return MirroredCurve(lines, until)


def contradict(guesses: Guesses, curve: MirroredCurve, alpha: float) -> bool:
    """Whether so many right guesses, or more, have a chance of less than ``alpha`` under this curve."""
    made, right = guesses.made, guesses.correct
    if right == 0:
        return False
    # Of the number of canaries, as shares of it; see one_run_f_dp. At right == made nothing is beyond it.
    all_, r, h = made / guesses.canaries, alpha * right / guesses.canaries, alpha * (made - right) / guesses.canaries
    lines, until = curve
    place = 0
    slope, origin, height = lines[0]
    for i in range(right - 1, -1, -1):
        while r > until[place]:  # r only grows
            place += 1
            slope, origin, height = lines[place]
        needed = (slope * (r - origin) + height) * _ROUND_DOWN
        if needed > h:
            r += i / (made - i) * (needed - h)
            h = needed
        if r + h > all_ * _ROUND_UP:
            return True
        if r >= 1:
            return True
    return False


def _meeting(flat: tuple[float, float, float], steep: tuple[float, float, float]) -> float:
    """The x at which two lines meet."""
    (a, x, y), (b, u, v) = flat, steep
    return (y - v + b * u - a * x) / (b - a)


def _details(guesses: Guesses, tried: int) -> dict[str, float]:
    return {
        "canaries": float(guesses.canaries),
        "guessed_inside": float(guesses.inside),
        "guessed_outside": float(guesses.outside),
        "right_guesses": float(guesses.correct),
        "choices_tried": float(tried),
    }
