"""From scores to rates of error: a threshold, and Clopper-Pearson upper bounds of both error rates at it.

The test says "inside" where a score is at or above the threshold. ``false_positive_rate`` is that of scores from
outside, ``false_negative_rate`` that of scores from inside.

Guarantee, for every strategy: with probability at least ``confidence``, both upper bounds of every :class:`ErrorRates`
that is returned hold, if inside scores are independent draws of one law and outside scores of another.

* ``Explicit``: the threshold was fixed without looking at these scores. Each rate has half of 1 - confidence.
* ``Split``: a random part of the scores chooses the threshold, the rest is counted, so that the threshold is fixed for
  the scores that are counted.
* ``Bonferroni``: thresholds are the inside scores at ranks that were fixed beforehand, and each has an equal share of 1
  - confidence. Of the k-th smallest inside score, the false negative rate is at most the k-th smallest of n uniform
  numbers, and its distribution's quantiles are the Clopper-Pearson bounds for k - 1 of n: so the count is k - 1, also
  where ties make fewer. Given the threshold, outside scores are counted as if it had been fixed.

Source of the interval: Clopper and Pearson 1934, "The use of confidence or fiducial limits illustrated in the case of
the binomial".
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
import scipy
from numpy.typing import ArrayLike, NDArray

from dpkit.errors import InvalidArgument

Vector = NDArray[np.float64]

_ROUNDING = 1e-9  # relative; the inverse of the incomplete beta function is good to a few units of 1e-15
_MOST_CANDIDATES = 4000


@dataclass(frozen=True)
class Explicit:
    """The threshold ``value``, chosen without looking at the scores that it is used on."""

    value: float

    def __post_init__(self) -> None:
        if not math.isfinite(self.value):
            raise InvalidArgument(f"Explicit.value is {self.value!r}: a threshold is a finite number.")


@dataclass(frozen=True)
class Split:
    """``fraction`` of the scores, drawn at random, chooses the threshold; the rest is counted.

    The draw depends on ``seed`` and on the numbers of scores, not on what the scores are.
    """

    fraction: float = 0.25
    seed: int = 0

    def __post_init__(self) -> None:
        if not 0 < self.fraction < 1:
            raise InvalidArgument(f"Split.fraction is {self.fraction!r}: it lies between 0 and 1, for example 0.25.")


@dataclass(frozen=True)
class Bonferroni:
    """Up to ``most`` thresholds at fixed ranks, all scores counted, and an equal share of the risk for each."""

    most: int = 15

    def __post_init__(self) -> None:
        if self.most < 1:
            raise InvalidArgument(f"Bonferroni.most is {self.most!r}: there is at least one threshold.")


Threshold = Explicit | Split | Bonferroni
SPLIT = Split()


class ErrorRates(NamedTuple):
    """The errors of the test "at or above ``threshold``"; the upper bounds hold with the confidence asked for."""

    threshold: float
    false_positives: int
    outside: int
    false_negatives: int
    inside: int
    false_positive_rate_upper: float
    false_negative_rate_upper: float

    def details(self) -> dict[str, float]:
        """Everything, by name, for a report."""
        return {
            **{name: float(value) for name, value in self._asdict().items()},
            "false_positive_rate": self.false_positives / self.outside,
            "false_negative_rate": self.false_negatives / self.inside,
        }


Objective = Callable[[Vector, Vector], Vector]
"""(false positive rates, false negative rates), both upper bounds -> how good these tests are; larger is better."""


def clopper_pearson_upper(successes: ArrayLike, trials: ArrayLike, alpha: float) -> Vector:
    """For each pair the largest rate at which so few ``successes`` in ``trials`` have a probability above ``alpha``.

    Args:
      successes: counts from 0 to ``trials``; what lies between whole numbers is interpolated by the same formula.
      trials: at least 1.
      alpha: probability, in (0, 1), that the bound is too low.
    """
    k, n = np.asarray(successes, dtype=float), np.asarray(trials, dtype=float)
    if not (np.all(k >= 0) and np.all(k <= n) and np.all(n >= 1)):
        raise InvalidArgument(f"successes {successes!r} of trials {trials!r}: counts go from 0 to trials, at least 1.")
    if not 0 < alpha < 1:
        raise InvalidArgument(f"alpha is {alpha!r}: it is a probability between 0 and 1.")
    upper = scipy.special.betainccinv(k + 1, np.maximum(n - k, 1e-300), alpha)
    return np.where(k == n, 1.0, np.minimum(1.0, upper * (1 + _ROUNDING)))


def error_rates(
    inside: ArrayLike, outside: ArrayLike, *, confidence: float, threshold: Threshold, objective: Objective
) -> list[ErrorRates]:
    """The rates at the thresholds of the strategy; all of their bounds hold together.

    Args:
      objective: what the strategy ``Split`` makes as large as it can on the part that chooses.

    Raises:
      InvalidArgument: scores that are not finite or too few, or a confidence that is not between 0 and 1.
    """
    inside, outside = as_scores("inside", inside), as_scores("outside", outside)
    alpha = (1 - checked_confidence(confidence)) / 2
    match threshold:
        case Explicit(value=value):
            return [_counted(inside, outside, value, alpha)]
        case Bonferroni(most=most):
            ranks = _ranks(len(inside), most)
            values = np.sort(inside)[ranks]
            return [
                _counted(inside, outside, float(value), alpha / len(ranks))._replace(
                    false_negatives=int(rank),
                    false_negative_rate_upper=float(clopper_pearson_upper(rank, len(inside), alpha / len(ranks))),
                )
                for rank, value in zip(ranks, values, strict=True)
            ]
        case Split(fraction=fraction, seed=seed):
            draw = np.random.default_rng(seed)
            (few_in, rest_in), (few_out, rest_out) = (_parts(scores, fraction, draw) for scores in (inside, outside))
            value = _best(few_in, few_out, (len(rest_in), len(rest_out)), alpha, objective)
            return [_counted(rest_in, rest_out, value, alpha)]


def as_scores(name: str, scores: ArrayLike) -> Vector:
    """``scores`` as a flat array of at least two finite numbers.

    Raises:
      InvalidArgument: they are something else.
    """
    found = np.asarray(scores, dtype=np.float64)
    if found.ndim != 1 or len(found) < 2:
        raise InvalidArgument(f"{name} has shape {found.shape}: give a flat array of at least two scores.")
    if not np.all(np.isfinite(found)):
        place = int(np.argmin(np.isfinite(found)))
        raise InvalidArgument(
            f"{name}[{place}] is {found[place]}: a score is a finite number. Leaving such scores out would change what "
            "is audited; find out where they come from."
        )
    return found


def checked_confidence(confidence: float) -> float:
    """``confidence``, if it is a probability between 0 and 1."""
    if not 0 < confidence < 1:
        raise InvalidArgument(f"confidence is {confidence!r}: it is a probability between 0 and 1, for example 0.95.")
    return float(confidence)


def _counted(inside: Vector, outside: Vector, value: float, alpha: float) -> ErrorRates:
    positives, negatives = int(np.count_nonzero(outside >= value)), int(np.count_nonzero(inside < value))
    return ErrorRates(
        value,
        positives,
        len(outside),
        negatives,
        len(inside),
        float(clopper_pearson_upper(positives, len(outside), alpha)),
        float(clopper_pearson_upper(negatives, len(inside), alpha)),
    )


def _parts(scores: Vector, fraction: float, draw: np.random.Generator) -> tuple[Vector, Vector]:
    size = min(max(1, round(fraction * len(scores))), len(scores) - 1)
    shuffled = scores[draw.permutation(len(scores))]
    return shuffled[:size], shuffled[size:]


def _best(inside: Vector, outside: Vector, sizes: tuple[int, int], alpha: float, objective: Objective) -> float:
    """The threshold at which the objective is largest, if the scores to count have the rates of these.

    Half an error more than was seen: a threshold beyond all scores of the few would otherwise look free of errors.
    """
    values = np.unique(np.concatenate([inside, outside]))
    if len(values) > _MOST_CANDIDATES:
        values = np.quantile(values, np.linspace(0, 1, _MOST_CANDIDATES), method="nearest")
    inside, outside = np.sort(inside), np.sort(outside)
    negatives = np.searchsorted(inside, values, "left")
    positives = len(outside) - np.searchsorted(outside, values, "left")
    counted_in, counted_out = sizes
    missed = np.minimum(1, (negatives + 0.5) / len(inside)) * counted_in
    alarms = np.minimum(1, (positives + 0.5) / len(outside)) * counted_out
    goodness = objective(
        clopper_pearson_upper(alarms, counted_out, alpha), clopper_pearson_upper(missed, counted_in, alpha)
    )
    return float(values[int(np.argmax(goodness))])


def _ranks(size: int, most: int) -> NDArray[np.int64]:
    """Ranks from 0 that lie closer together towards both ends, where few errors are made."""
    places = scipy.special.expit(np.linspace(-1, 1, most) * math.log(size)) if most > 1 else np.array([0.5])
    return np.unique(np.clip(np.round(places * size), 0, size - 1).astype(np.int64))
