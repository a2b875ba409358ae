"""Membership inference: how well somebody who has the model can tell who was in the training data.

An ATTACK REPORT, never an epsilon. The members and the others are whoever they are: nobody flipped a coin for them, so
no lower bound on epsilon follows from how well they are told apart, and natural examples are told apart far worse than
epsilon allows for. An attack that succeeds is a warning; one that fails proves nothing, as a better one may succeed.
(Lower bounds come from canaries: ``input_canaries`` and ``estimators``.)

Two attacks. :func:`loss_threshold` takes the model's confidence in the true label as it is (Yeom et al. 2018,
https://arxiv.org/abs/1709.01604). :func:`likelihood_ratio`, LiRA, asks for each example how that confidence looks in
models that were trained with and without it (Carlini et al. 2022, "Membership inference attacks from first principles",
https://arxiv.org/abs/2112.03570); it needs such shadow models. Not done here: several augmented queries an example.

Everything in a report is computed from private data without noise: it is NOT PRIVATE.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from enum import StrEnum
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import ArrayLike, NDArray
from scipy import special, stats

from dpkit.errors import InvalidArgument

FALSE_POSITIVE_RATES = (0.001, 0.01)
FEWEST_FALSE_POSITIVES = 10
"""Non-members that must be expected above the threshold for a rate to be worth its name."""
FEWEST_SHADOWS_PER_VARIANCE = 32
"""Shadow models on either side of an example from which its own variance is estimated, as in Carlini et al. 2022."""
_SMALLEST_SPREAD = 1e-9  # of the largest score

Scores = NDArray[np.float64]


class Variant(StrEnum):
    """Which shadow models the likelihood ratio needs."""

    ONLINE = "online"
    """With the example and without it."""
    OFFLINE = "offline"
    """Without it: trained once, before anybody is asked about."""


class Rate(NamedTuple):
    """How many members are found at a low rate of false alarms.

    Attributes:
      target: false positive rate that the threshold keeps to on the non-members at hand.
      false_positives, true_positives: non-members and members above the threshold.
      rate, low, high: share of the members that are found, with its interval by Clopper and Pearson.
      false_positive_high: upper end of the interval for the share of non-members, which may be well above ``target``.
      enough: whether there are enough non-members to speak of this false positive rate.
    """

    target: float
    false_positives: int
    true_positives: int
    rate: float
    low: float
    high: float
    false_positive_high: float
    enough: bool


@dataclass(frozen=True)
class MembershipReport:
    """What an attack achieved. NOT PRIVATE, and no epsilon.

    Attributes:
      attack: in words.
      members, nonmembers: how many of each were scored.
      auc, auc_low, auc_high: probability that a member scores above a non-member, ties counted as halves, and its
        interval; 0.5 is guessing.
      balanced_accuracy: mean of both classes' accuracies at the best threshold, chosen with hindsight.
      balanced_accuracy_by_chance: what hindsight makes of scores that know nothing, at most, with probability
        ``confidence``.
      rates: true positive rates at low false positive rates.
      confidence: of every interval by itself.
    """

    attack: str
    members: int
    nonmembers: int
    auc: float
    auc_low: float
    auc_high: float
    balanced_accuracy: float
    balanced_accuracy_by_chance: float
    rates: tuple[Rate, ...]
    confidence: float

    def to_json(self) -> dict[str, Any]:
        """Every number by its name, and what they are."""
        found: Mapping[str, Any] = asdict(self) | {"rates": [rate._asdict() for rate in self.rates]}
        return {"kind": "attack report, not private, not a bound on epsilon", **found}

    def __str__(self) -> str:
        percent = f"{100 * self.confidence:g} %"
        lines = [
            f"ATTACK REPORT (NOT PRIVATE, not a bound on epsilon): membership inference, {self.attack}",
            f"  scored               {self.members} members, {self.nonmembers} non-members",
            f"  AUC                  {self.auc:.4f} ({percent}: {self.auc_low:.4f} to {self.auc_high:.4f}); 0.5 is "
            "guessing",
            f"  balanced accuracy    {self.balanced_accuracy:.4f} at the best threshold in hindsight; scores that know "
            f"nothing reach up to {self.balanced_accuracy_by_chance:.4f}",
        ]
        for rate in self.rates:
            lines.append(
                f"  TPR at {100 * rate.target:g} % FPR".ljust(23)
                + f"{100 * rate.rate:.2f} % ({percent}: {100 * rate.low:.2f} to {100 * rate.high:.2f} %), "
                f"{rate.true_positives} members found with {rate.false_positives} false alarms"
            )
            if not rate.enough:
                lines.append(
                    f"                       too few non-members for this rate: {self.nonmembers}, of "
                    f"{math.ceil(FEWEST_FALSE_POSITIVES / rate.target)} or more; the true one may be up to "
                    f"{100 * rate.false_positive_high:.2f} %"
                )
        return "\n".join(lines)


def logit_confidence(logits: ArrayLike, labels: ArrayLike) -> Scores:
    """log p_y - log(1 - p_y) of each example, in float64: large for an example that the model is sure of.

    With logits z this is z_y - log Σ_{j≠y} exp z_j, in which nothing cancels and nothing overflows.

    Args:
      logits: (N, classes), before softmax.
      labels: (N,) the true classes.
    Raises:
      InvalidArgument: other shapes, fewer than two classes, values that are not finite, labels that are no classes.
    """
    z, y = np.asarray(logits, dtype=np.float64), np.asarray(labels)
    if z.ndim != 2 or z.shape[1] < 2 or y.shape != z.shape[:1] or len(z) == 0:
        raise InvalidArgument(
            f"logits have shape {z.shape} and labels {y.shape}; give one row of at least two classes, and one label, "
            "for each of at least one example."
        )
    if not np.issubdtype(y.dtype, np.integer) or y.min() < 0 or y.max() >= z.shape[1]:
        raise InvalidArgument(f"labels are not all classes; give integers from 0 to {z.shape[1] - 1}.")
    if (bad := _first_not_finite(z)) is not None:
        raise InvalidArgument(f"row {bad} of the logits is not finite; a model that diverged cannot be attacked.")
    rows = np.arange(len(z))
    others = z.copy()
    others[rows, y] = -np.inf
    return z[rows, y] - special.logsumexp(others, axis=1)


def loss_threshold(members: ArrayLike, nonmembers: ArrayLike, *, confidence: float = 0.95) -> MembershipReport:
    """The attack that calls those members whose loss is below a threshold.

    Args:
      members, nonmembers: (N,) scores of the training examples, and of others from the same distribution, such as
        :func:`logit_confidence` gives or the negative loss; larger means "looks like a member".
    Raises: as :func:`report`.
    """
    return report(members, nonmembers, attack="loss threshold", confidence=confidence)


def likelihood_ratio(
    scores: ArrayLike,
    member: ArrayLike,
    shadow_scores: ArrayLike,
    shadow_members: ArrayLike,
    *,
    variant: Variant = Variant.ONLINE,
    confidence: float = 0.95,
) -> MembershipReport:
    """LiRA on N examples, of which ``member`` (N,) says who was in the training data of the attacked model.

    Args: otherwise as :func:`likelihood_ratios`.
    Raises: as :func:`likelihood_ratios` and :func:`report`.
    """
    ratios = likelihood_ratios(scores, shadow_scores, shadow_members, variant=variant)
    inside = np.asarray(member)
    if inside.shape != ratios.shape or inside.dtype != np.bool_:
        raise InvalidArgument(
            f"member has shape {inside.shape} and type {inside.dtype}; give one True or False for each of the "
            f"{len(ratios)} scores."
        )
    words = f"LiRA {variant.value}, {np.shape(shadow_scores)[0]} shadow models"
    return report(ratios[inside], ratios[~inside], attack=words, confidence=confidence)


def likelihood_ratios(
    scores: ArrayLike,
    shadow_scores: ArrayLike,
    shadow_members: ArrayLike,
    *,
    variant: Variant = Variant.ONLINE,
) -> Scores:
    """(N,) the statistic of LiRA: larger means "looks like a member".

    Online it is log N(s; μ_in, σ_in²) - log N(s; μ_out, σ_out²), with the moments of the example's own score in shadow
    models with and without it. Offline it is (s - μ_out) / σ_out, which orders examples as the one-sided test of
    Carlini et al. does, and does not saturate. With fewer than 32 shadow models on a side, that side has one variance
    for all examples, pooled around their own means.

    Args:
      scores: (N,) of the attacked model.
      shadow_scores: (S, N) of the same examples under each shadow model.
      shadow_members: (S, N) whether the example was in the training data of that shadow model.
    Raises:
      InvalidArgument: other shapes, values that are not finite, or an example without a shadow model on a side that
        the variant needs.
    """
    own = _scores("scores", scores)
    shadows, inside = np.asarray(shadow_scores, dtype=np.float64), np.asarray(shadow_members)
    if shadows.ndim != 2 or shadows.shape[1:] != own.shape or inside.shape != shadows.shape:
        raise InvalidArgument(
            f"shadow_scores have shape {shadows.shape} and shadow_members {inside.shape}; give (shadow models, "
            f"{len(own)}) for both."
        )
    if inside.dtype != np.bool_:
        raise InvalidArgument(f"shadow_members are of type {inside.dtype}; give True and False.")
    if (bad := _first_not_finite(shadows)) is not None:
        raise InvalidArgument(f"shadow model {bad} gives scores that are not finite; leave it out.")
    mean, std = _moments(shadows, ~inside, "without")
    if variant == Variant.OFFLINE:
        return (own - mean) / std
    mean_in, std_in = _moments(shadows, inside, "with")
    return ((own - mean) / std) ** 2 / 2 + np.log(std) - ((own - mean_in) / std_in) ** 2 / 2 - np.log(std_in)


def report(
    members: ArrayLike,
    nonmembers: ArrayLike,
    *,
    attack: str,
    confidence: float = 0.95,
    false_positive_rates: tuple[float, ...] = FALSE_POSITIVE_RATES,
) -> MembershipReport:
    """How well ``members`` can be told from ``nonmembers`` by their scores.

    Raises:
      InvalidArgument: scores that are no list of finite numbers, or rates or a confidence outside (0, 1).
    """
    inside, outside = _scores("members", members), _scores("nonmembers", nonmembers)
    for name, value in (("confidence", confidence), *(("false positive rate", rate) for rate in false_positive_rates)):
        if not 0 < value < 1:
            raise InvalidArgument(f"{name} is {value!r}; it lies strictly between 0 and 1.")
    auc, low, high = _auc(inside, outside, confidence)
    false, true = roc(inside, outside)
    chance = special.kolmogi(1 - confidence) * math.sqrt(1 / len(inside) + 1 / len(outside))
    return MembershipReport(
        attack=attack,
        members=len(inside),
        nonmembers=len(outside),
        auc=auc,
        auc_low=low,
        auc_high=high,
        balanced_accuracy=float(0.5 + (true - false).max() / 2),
        # The largest difference of two empirical distributions, as in the test of Kolmogorov and Smirnov.
        balanced_accuracy_by_chance=float(min(1.0, 0.5 + chance / 2)),
        rates=tuple(_rate(inside, outside, target, confidence) for target in false_positive_rates),
        confidence=confidence,
    )


def roc(members: ArrayLike, nonmembers: ArrayLike) -> tuple[Scores, Scores]:
    """(false positive rates, true positive rates) of every threshold, from (0, 0) to (1, 1)."""
    inside, outside = np.sort(_scores("members", members)), np.sort(_scores("nonmembers", nonmembers))
    thresholds = np.unique(np.concatenate([inside, outside]))[::-1]
    false = 1 - np.searchsorted(outside, thresholds, side="left") / len(outside)
    true = 1 - np.searchsorted(inside, thresholds, side="left") / len(inside)
    return np.concatenate([[0.0], false]), np.concatenate([[0.0], true])


def _rate(inside: Scores, outside: Scores, target: float, confidence: float) -> Rate:
    # A product such as 0.001 * 1000 may fall just below its count.
    allowed = math.floor(target * len(outside) * (1 + 1e-12))
    threshold = np.sort(outside)[::-1][
        min(allowed, len(outside) - 1)
    ]  # above it there are at most as many as allowed, fewer with ties
    true, false = int((inside > threshold).sum()), int((outside > threshold).sum())
    found = stats.binomtest(true, len(inside)).proportion_ci(confidence, "exact")
    alarms = stats.binomtest(false, len(outside)).proportion_ci(confidence, "exact")
    enough = target * len(outside) * (1 + 1e-12) >= FEWEST_FALSE_POSITIVES
    return Rate(target, false, true, true / len(inside), found.low, found.high, alarms.high, enough)


def _auc(inside: Scores, outside: Scores, confidence: float) -> tuple[float, float, float]:
    """Area under the curve and its interval.

    The variance is that of DeLong, DeLong and Clarke-Pearson 1988. It is zero where the two are fully apart, which says
    nothing of the next sample; so it is turned into the number of coin flips with that variance, and the interval is
    Wilson's for so many.
    """
    n, m = len(inside), len(outside)
    together = stats.rankdata(np.concatenate([inside, outside]))
    above = (together[:n] - stats.rankdata(inside)) / m  # share of the non-members below each member, ties half
    below = 1 - (together[n:] - stats.rankdata(outside)) / n
    area = float(above.mean())
    variance = sum(np.var(each, ddof=1) / len(each) if len(each) > 1 else 0.25 for each in (above, below))
    flips = float(min(n, m)) if variance == 0 else area * (1 - area) / variance
    flips = min(max(flips, 1.0), float(n) * m)
    z = float(stats.norm.ppf((1 + confidence) / 2))
    centre = (area + z**2 / (2 * flips)) / (1 + z**2 / flips)
    half = z * math.sqrt(area * (1 - area) / flips + z**2 / (4 * flips**2)) / (1 + z**2 / flips)
    return area, float(max(0.0, min(area, centre - half))), float(min(1.0, max(area, centre + half)))


def _moments(scores: Scores, chosen: NDArray[np.bool_], side: str) -> tuple[Scores, Scores]:
    """Mean and standard deviation of each example's scores over the chosen shadow models."""
    count = chosen.sum(axis=0)
    if not count.all():
        raise InvalidArgument(
            f"{int((count == 0).sum())} examples have no shadow model {side} them; train shadow models in pairs, on a "
            "random half and on the other half."
        )
    mean = np.where(chosen, scores, 0).sum(axis=0) / count
    squares = (np.where(chosen, scores - mean, 0) ** 2).sum(axis=0)
    if count.min() >= FEWEST_SHADOWS_PER_VARIANCE:
        variance = squares / (count - 1)
    else:
        spare = int((count - 1).sum())
        if spare == 0:
            raise InvalidArgument(
                f"no example has two shadow models {side} it, so how much scores vary is unknown; train more."
            )
        # A mean of so few models is itself off by 1/count of the variance, and the score is compared with that mean.
        variance = squares.sum() / spare * (1 + 1 / count)
    # Scores that never vary, as those of a model without randomness: a difference is then certain, but not infinite.
    return mean, np.maximum(np.sqrt(variance), _SMALLEST_SPREAD * max(1.0, float(np.abs(scores).max())))


def _scores(name: str, values: ArrayLike) -> Scores:
    try:
        found = np.asarray(values, dtype=np.float64)
    except (TypeError, ValueError):
        raise InvalidArgument(f"{name} are no numbers; give one score for each example.") from None
    if found.ndim != 1 or len(found) == 0:
        raise InvalidArgument(f"{name} have shape {found.shape}; give one score for each of at least one example.")
    if (bad := _first_not_finite(found)) is not None:
        raise InvalidArgument(f"{name}[{bad}] is {found[bad]}; scores are finite.")
    return found


def _first_not_finite(values: Scores) -> int | None:
    """The first row with a value that is not finite."""
    bad = ~np.isfinite(values).reshape(len(values), -1).all(axis=1)
    return int(bad.argmax()) if bad.any() else None
