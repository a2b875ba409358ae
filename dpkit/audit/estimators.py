"""Lower bounds on epsilon from two sets of scores, of canaries that were used and of canaries that were not.

Scores are larger where an attacker would rather say "it was used". All of these turn a threshold on the scores into
upper bounds of its two error rates (``thresholds.py``) and ask how private a mechanism can be that lets errors be so
rare. They differ in what they take for granted:

* :func:`clopper_pearson` takes nothing for granted, and needs very many scores for a large epsilon.
* :func:`gaussian_dp` asks for the Gaussian mechanism that allows these errors. That is a certificate where the
  mechanism is Gaussian and nothing is sampled, and nowhere else.
* :func:`family_inversion` asks for the least noise with which the claimed event allows these errors.

The scores of one side must be independent draws of one law. Scores of many canaries in one run are that if noise and
sampling are independent for each of them; otherwise take one score per run, or the estimators of ``guessing.py``.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import replace
from typing import NamedTuple

import numpy as np
import scipy
from numpy.typing import ArrayLike

import accounting
from accounting import Event, Gaussian, Relation
from accounting.trade_off import Tangents, tangents
from accounting.values import check_delta

from .scaling import inverted
from .scaling import scaled as scaled
from .thresholds import (
    SPLIT,
    ErrorRates,
    Split,
    Threshold,
    Vector,
    as_scores,
    checked_confidence,
    clopper_pearson_upper,
    error_rates,
)
from .verdict import LowerBound

_LEAST_RATE, _KNOTS = 1e-8, 200
_ALTERNATIVE = 1.1  # times the claimed noise: what the rank is planned to tell from it


def clopper_pearson(
    inside: ArrayLike,
    outside: ArrayLike,
    *,
    delta: float,
    confidence: float = 0.95,
    threshold: Threshold = SPLIT,
) -> LowerBound:
    """The epsilon that no (epsilon, delta)-private mechanism of a smaller one allows, whatever the mechanism is.

    Guarantee: it is above the true epsilon with probability at most 1 - ``confidence``.

    Why: (epsilon, delta)-privacy says 1 - FNR <= e^epsilon FPR + delta and 1 - FPR <= e^epsilon FNR + delta (Wasserman
    and Zhou 2010). Each leaves an epsilon out that is too small for the true rates, and a smaller one still for the
    upper bounds of both.

    Source: Jagielski, Ullman and Oprea 2020, https://arxiv.org/abs/2006.07709.
    """
    delta = check_delta(delta)

    def epsilons(false_positive: Vector, false_negative: Vector) -> Vector:
        with np.errstate(divide="ignore"):
            one = np.log(np.maximum(0, 1 - false_negative - delta)) - np.log(false_positive)
            other = np.log(np.maximum(0, 1 - false_positive - delta)) - np.log(false_negative)
        return np.maximum(0.0, np.maximum(one, other))

    rates = error_rates(inside, outside, confidence=confidence, threshold=threshold, objective=epsilons)
    epsilon, best = max(((float(epsilons(*_uppers(each))[0]), each) for each in rates), key=lambda pair: pair[0])
    return LowerBound(epsilon, delta, confidence, "Clopper-Pearson", best.details())


def gaussian_dp(
    inside: ArrayLike,
    outside: ArrayLike,
    *,
    delta: float,
    confidence: float = 0.95,
    threshold: Threshold = SPLIT,
) -> LowerBound:
    """The epsilon of the Gaussian mechanism with the most noise that allows these error rates.

    Guarantee: if what was audited is as revealing as one Gaussian release, as all steps with full batches are together,
    it is above the true epsilon with probability at most 1 - ``confidence``.

    With sampled batches it is no lower bound: twenty steps with noise multiplier 0.6 at sample rate 0.05 have
    epsilon 2.24 at delta 0.01, and their best test is as good as that of a Gaussian mechanism with epsilon 2.74. Use
    :func:`family_inversion` there.

    Source: Nasr et al. 2023, https://arxiv.org/abs/2302.07956.
    """
    delta = check_delta(delta)
    rates = error_rates(inside, outside, confidence=confidence, threshold=threshold, objective=gaussian_mu)
    mu, best = max(((float(gaussian_mu(*_uppers(each))[0]), each) for each in rates), key=lambda pair: pair[0])
    mu = max(0.0, mu * (1 - 1e-12))
    epsilon = accounting.epsilon(Gaussian(1 / mu), delta, relation=Relation.ZERO_OUT).lower if mu > 1e-6 else 0.0
    return LowerBound(
        epsilon, delta, confidence, "Gaussian mechanism (no sampling)", best.details() | {"gaussian_mu": mu}
    )


def family_inversion(
    inside: ArrayLike,
    outside: ArrayLike,
    event_of: Callable[[float], Event],
    *,
    relation: Relation,
    delta: float,
    confidence: float = 0.95,
    threshold: Threshold | None = None,
    seed: int | None = None,
) -> LowerBound:
    """The epsilon of the claimed event with more or less noise, at the least noise that these scores contradict.

    Guarantee: if what was audited is ``event_of(s)`` for some s, it is above the true epsilon with probability at most
    1 - ``confidence``; so a true claim, s = 1, is contradicted no more often.

    Why, without ``threshold``: the threshold is the inside score at a rank k that was fixed by the claim and the
    numbers of scores. The false negative rate at it is at most the k-th smallest of n uniform numbers, U ~ Beta(k, n -
    k + 1), and if f is the trade-off curve of ``event_of(s)``, the false positive rate is then at least f(U). So few
    false positives as were counted among m outside scores, or fewer, have at most the chance

        E[ P[Binomial(m, f(U)) <= count] ]

    and s is rejected if that is at most 1 - ``confidence``. With a ``threshold``, s is rejected where the two upper
    bounds of ``thresholds.py`` lie below the curve. That is more cautious than it needs to be, but can be asked at
    several thresholds, for scores that tell little at the rank that the claim suggests.

    The curve that is used is never above the true one, so that less is rejected.

    Args:
      event_of: the claimed event with every noise multiplier times the argument; :func:`scaled` makes it.
      relation: under which the canary's presence makes neighbours.
      seed: of the random split, where ``threshold`` is a ``Split``.
    """
    delta = check_delta(delta)
    inside, outside = as_scores("inside", inside), as_scores("outside", outside)

    def curve(scale: float) -> Tangents:
        return tangents(event_of(scale), relation=relation, least=_LEAST_RATE, knots=_KNOTS)

    if threshold is None:
        rank = _planned_rank(curve(1.0), curve(_ALTERNATIVE), len(inside), len(outside))
        test = rank_test(inside, outside, rank)
        alpha = 1 - checked_confidence(confidence)
        details = test.details(alpha) | {"chance_under_the_claim": test.chance(curve(1.0))}

        def rejected(scale: float) -> bool:
            return test.chance(curve(scale)) <= alpha
    else:
        if seed is not None and isinstance(threshold, Split):
            threshold = replace(threshold, seed=seed)
        rates = error_rates(inside, outside, confidence=confidence, threshold=threshold, objective=gaussian_mu)
        details = max(rates, key=lambda each: float(gaussian_mu(*_uppers(each))[0])).details()

        def rejected(scale: float) -> bool:
            least = curve(scale).at([each.false_positive_rate_upper for each in rates])
            return any(each.false_negative_rate_upper < beta for each, beta in zip(rates, least, strict=True))

    return inverted(
        rejected,
        event_of,
        relation=relation,
        delta=delta,
        confidence=confidence,
        method="claimed event with other noise",
        details=details,
    )


class RankTest(NamedTuple):
    """``count`` of ``outside`` scores are at or above the inside score of rank ``rank``, counted from 1 = smallest."""

    threshold: float
    rank: int
    inside: int
    count: int
    outside: int

    def chance(self, curve: Tangents) -> float:
        """Of so few outside scores, or fewer, at or above that inside score, under this curve; never too small."""
        # Slices of U, thin where the false negative rate is large: there the count is likely to be small. In each slice
        # f is taken at the right end, where it is least.
        above = np.concatenate([np.linspace(1, 0.5, 100, endpoint=False), np.geomspace(0.5, 1e-16, 500)])
        ends = scipy.special.betainccinv(self.rank, self.inside - self.rank + 1, above)
        slices = np.append(above[:-1] - above[1:], above[-1])
        rates = np.append(curve.at(np.minimum(1.0, ends[1:] * (1 + 1e-9))), 0.0)
        return float(min(1.0, np.sum(slices * scipy.special.bdtr(self.count, self.outside, rates)) * (1 + 1e-9)))

    def details(self, alpha: float) -> dict[str, float]:
        """What was counted, with upper bounds of both rates that hold together."""
        negatives = self.rank - 1
        return ErrorRates(
            self.threshold,
            self.count,
            self.outside,
            negatives,
            self.inside,
            float(clopper_pearson_upper(self.count, self.outside, alpha / 2)),
            float(clopper_pearson_upper(negatives, self.inside, alpha / 2)),
        ).details()


def rank_test(inside: Vector, outside: Vector, rank: int) -> RankTest:
    """The test whose threshold is the inside score of ``rank``, from 1 on, which was fixed without looking at them."""
    threshold = float(np.partition(inside, rank - 1)[rank - 1])
    return RankTest(threshold, rank, len(inside), int(np.count_nonzero(outside >= threshold)), len(outside))


def _planned_rank(claimed: Tangents, other: Tangents, inside: int, outside: int) -> int:
    """The rank at which the count tells the claimed noise from a little more noise best, in standard deviations."""
    odds = np.linspace(-1, 1, 400) * math.log(inside)
    misses = scipy.special.expit(odds)
    alarms, more = claimed.at(misses), other.at(misses)
    slope = np.gradient(alarms, misses)
    variance = (alarms * (1 - alarms) + 1 / outside) / outside + slope**2 * misses * (1 - misses) / inside
    best = misses[int(np.argmax((more - alarms) / np.sqrt(variance)))]
    return min(inside, max(1, round(best * inside)))


def gaussian_mu(false_positive: Vector, false_negative: Vector) -> Vector:
    """mu of the Gaussian mechanism whose trade-off curve goes through these error rates; negative for worse tests."""
    return -scipy.special.ndtri(false_positive) - scipy.special.ndtri(false_negative)


def _uppers(rates: ErrorRates) -> tuple[Vector, Vector]:
    return np.array([rates.false_positive_rate_upper]), np.array([rates.false_negative_rate_upper])
