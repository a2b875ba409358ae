"""Draws of the discrete Gaussian by integer arithmetic alone: the law is exact if the random words are uniform.

Guarantee: the integers are independent, each with probability proportional to ``exp(-y² / 2s²)``, s a whole number.  No
logarithm, no exponential and no floating-point number takes part; whether something happens with probability ``a/b`` is
decided by a uniform integer below b.
Requires: a stream from which nothing else is drawn, and words that are uniform.
Why: each step below says which probability it has, as a fraction.

Source: Canonne, Kamath and Steinke 2020, https://arxiv.org/abs/2004.00010, algorithms 1 to 3, here with t = s: a
discrete Laplace draw of scale s is kept with probability ``exp(-(|y| - s)² / 2s²)``, which happens to about 3 of 4.

Not promised: that it takes the same time whatever was drawn.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from .chacha import KeyStream

LARGEST_SCALE = 2**22
"""Squares of draws of up to 500 scales then fit into 64 bits."""

_FARTHEST = 500  # scales; the chance that a draw goes beyond it is below e^-499
_LONGEST = 100  # trials; the chance that so many succeed is 1/100!
_NOT_RANDOM = "a draw of probability below 1e-150: the random words are not random."
_AT_A_TIME = 2**15  # draws: what they need beside the result stays in a processor's cache

Integers = NDArray[np.int64]
Bits = NDArray[np.bool_]


def discrete_gaussian(scale: int, count: int, stream: KeyStream) -> Integers:
    """(count,) independent draws of the discrete Gaussian of ``scale``, which is 1 or more and at most LARGEST_SCALE.

    ``scale`` is what the standard deviation of a continuous Gaussian would be; the discrete one's is no larger.
    """
    found = np.empty(count, dtype=np.int64)
    for start in range(0, count, _AT_A_TIME):
        part = found[start : start + _AT_A_TIME]
        missing = np.arange(len(part))
        while missing.size:
            kept, values = _proposals(scale, missing.size, stream)
            part[missing[kept]] = values
            missing = np.delete(missing, kept)
    return found


def _proposals(scale: int, count: int, stream: KeyStream) -> tuple[Integers, Integers]:
    """(which of ``count`` trials gave a draw, the draws)."""
    below = _uniform(scale, count, stream)
    kept = np.flatnonzero(_happens(below, scale, stream))
    size = below[kept] + scale * _successes(kept.size, stream)
    negative = _uniform(2, kept.size, stream) == 1
    once = ~(negative & (size == 0))  # zero has one sign, or it would come twice as often
    kept, size, negative = kept[once], size[once], negative[once]
    accepted = _happens((size - scale) ** 2, 2 * scale**2, stream)
    return kept[accepted], np.where(negative, -size, size)[accepted]


def _happens(numerators: Integers, denominator: int, stream: KeyStream) -> Bits:
    """For each ``a`` of ``numerators``, True with probability ``exp(-a/denominator)``."""
    whole, rest = np.divmod(numerators, denominator)
    alive = np.arange(len(numerators))
    for times in range(int(whole.max(initial=0))):
        due = whole[alive] > times
        if not due.any():
            break
        survived = ~due
        survived[due] = _happens_at_most_one(np.ones(int(due.sum()), np.int64), 1, stream)
        alive = alive[survived]
    result = np.zeros(len(numerators), dtype=bool)
    result[alive] = _happens_at_most_one(rest[alive], denominator, stream)
    return result


def _happens_at_most_one(numerators: Integers, denominator: int, stream: KeyStream) -> Bits:
    """:func:`_happens` for ``a <= denominator``.

    With x = a/denominator, the first trial of probabilities x/1, x/2, x/3, .. that fails is number k with probability
    ``x^(k-1)/(k-1)! - x^k/k!``; over odd k these add up to e^-x.
    """
    result = np.zeros(len(numerators), dtype=bool)
    active = np.arange(len(numerators))
    k = 1
    while active.size:
        succeeded = _uniform(denominator * k, active.size, stream) < numerators[active]
        result[active[~succeeded]] = k % 2 == 1
        active = active[succeeded]
        k += 1
        if k > _LONGEST:
            raise RuntimeError(_NOT_RANDOM)
    return result


def _successes(count: int, stream: KeyStream) -> Integers:
    """For each of ``count``, how often in a row what has probability 1/e happens."""
    result = np.zeros(count, dtype=np.int64)
    active = np.arange(count)
    while active.size:
        active = active[_happens_at_most_one(np.ones(active.size, np.int64), 1, stream)]
        result[active] += 1
        if active.size and result[active[0]] > _FARTHEST:  # all that are active have succeeded equally often
            raise RuntimeError(_NOT_RANDOM)
    return result


def _uniform(below: int, count: int, stream: KeyStream) -> Integers:
    """(count,) uniform integers from 0 to ``below`` - 1, ``below`` at most 2^63."""
    # Words beyond the last multiple of `below` are drawn again, or small numbers would come a little more often.
    last = np.uint64(2**64 // below * below - 1)
    words = stream.words(count).numpy().view(np.uint64)
    while (bad := np.flatnonzero(words > last)).size:
        words[bad] = stream.words(bad.size).numpy().view(np.uint64)
    return (words % np.uint64(below)).astype(np.int64)
