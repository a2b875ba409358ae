"""Membership inference: every number against brute force or another library, and the attacks against worlds in which
the best possible attack is known."""

from __future__ import annotations

import json
import math
from typing import Any

import mpmath
import numpy as np
import pytest
from scipy import stats

from dpkit.audit.membership import (
    FEWEST_SHADOWS_PER_VARIANCE,
    Variant,
    likelihood_ratio,
    likelihood_ratios,
    logit_confidence,
    loss_threshold,
    report,
    roc,
)
from dpkit.errors import InvalidArgument


def scores(seed: int, n: int, shift: float = 0.0, grid: float | None = None) -> np.ndarray:
    found = np.random.default_rng(seed).normal(shift, 1.0, n)
    return found if grid is None else np.round(found / grid) * grid


# -- the score --------------------------------------------------------------------------------------------------------


def test_the_score_is_the_logit_of_the_true_class_to_fifty_digits():
    logits = np.random.default_rng(0).normal(0, 30, (50, 7))
    labels = np.random.default_rng(1).integers(7, size=50)
    found = logit_confidence(logits, labels)
    with mpmath.workdps(80):
        for row, label, score in zip(logits, labels, found, strict=True):
            weights = [mpmath.exp(mpmath.mpf(float(z))) for z in row]
            p = weights[label] / sum(weights)
            assert score == pytest.approx(float(mpmath.log(p / (1 - p))), rel=1e-12)


def test_a_model_that_is_entirely_sure_has_a_finite_score():
    # In float32 this p is 1 and log(1 - p) is minus infinity.
    found = logit_confidence(np.array([[0.0, 900.0, 100.0], [0.0, -900.0, 100.0]], dtype=np.float32), [1, 1])
    assert found == pytest.approx([800.0, -1000.0])


@pytest.mark.parametrize(
    ("logits", "labels", "words"),
    [
        ([[1.0, np.nan]], [0], "row 0"),
        ([[1.0, 2.0], [np.inf, 0.0]], [0, 1], "row 1"),
        ([[1.0], [2.0]], [0, 0], "at least two classes"),
        ([[1.0, 2.0]], [0, 1], "shape"),
        (np.zeros((0, 3)), np.zeros(0, dtype=int), "at least one"),
        ([[1.0, 2.0]], [2], "0 to 1"),
        ([[1.0, 2.0]], [-1], "0 to 1"),
        ([[1.0, 2.0]], [0.5], "integers"),
    ],
)
def test_logits_that_cannot_be_scored_are_refused(logits, labels, words):
    with pytest.raises(InvalidArgument, match=words):
        logit_confidence(logits, labels)


# -- the numbers of a report ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("grid", [None, 0.5])
@pytest.mark.parametrize("shift", [-0.4, 0.0, 1.3])
def test_auc_is_the_share_of_pairs_and_agrees_with_scikit_learn(shift: float, grid: float | None):
    metrics = pytest.importorskip("sklearn.metrics", reason="scikit-learn is not installed (extra `fair`)")
    inside, outside = scores(0, 83, shift, grid), scores(1, 131, 0.0, grid)
    pairs = [(a > b) + 0.5 * (a == b) for a in inside for b in outside]
    found = report(inside, outside, attack="x")
    assert found.auc == pytest.approx(sum(pairs) / len(pairs), abs=1e-12)
    truth = np.r_[np.ones(83), np.zeros(131)]
    assert found.auc == pytest.approx(metrics.roc_auc_score(truth, np.r_[inside, outside]), abs=1e-12)


@pytest.mark.parametrize("grid", [None, 0.5])
def test_roc_and_balanced_accuracy_are_those_of_every_threshold(grid: float | None):
    inside, outside = scores(2, 60, 0.8, grid), scores(3, 45, 0.0, grid)
    points = [(0.0, 0.0)] + [
        (float((outside >= t).mean()), float((inside >= t).mean())) for t in sorted({*inside, *outside}, reverse=True)
    ]
    false, true = roc(inside, outside)
    assert np.allclose(np.c_[false, true], points, atol=1e-12)
    best = max((t + 1 - f) / 2 for f, t in points)
    assert report(inside, outside, attack="x").balanced_accuracy == pytest.approx(best, abs=1e-12)


@pytest.mark.parametrize("grid", [None, 0.25])
@pytest.mark.parametrize("target", [0.001, 0.01, 0.1, 0.5])
def test_the_rate_is_the_best_one_whose_threshold_keeps_to_the_false_positive_rate(target: float, grid: float | None):
    inside, outside = scores(4, 500, 1.0, grid), scores(5, 300, 0.0, grid)
    allowed = [t for t in [*inside, *outside, math.inf] if (outside > t).mean() <= target]
    best = max(int((inside > t).sum()) for t in allowed)
    [rate] = report(inside, outside, attack="x", false_positive_rates=(target,)).rates
    assert (rate.true_positives, rate.rate) == (best, best / 500)
    assert rate.false_positives / 300 <= target


def test_a_rate_that_divides_the_non_members_exactly_may_use_all_its_false_alarms():
    # 0.001 * 3000 is 3 in arithmetic and may be less in floating point.
    outside = np.arange(3000.0)
    [rate] = report(outside, outside, attack="x", false_positive_rates=(0.001,)).rates
    assert rate.false_positives == 3


def test_intervals_of_the_rates_solve_the_equations_of_clopper_and_pearson():
    [rate] = report(scores(6, 400, 2.0), scores(7, 400), attack="x", false_positive_rates=(0.05,)).rates
    k = rate.true_positives
    assert stats.binom.sf(k - 1, 400, rate.low) == pytest.approx(0.025, rel=1e-6)
    assert stats.binom.cdf(k, 400, rate.high) == pytest.approx(0.025, rel=1e-6)
    assert stats.binom.cdf(rate.false_positives, 400, rate.false_positive_high) == pytest.approx(0.025, rel=1e-6)


@pytest.mark.parametrize(("nonmembers", "enough"), [(9_999, False), (10_000, True)])
def test_too_few_non_members_for_a_low_rate_is_said(nonmembers: int, enough: bool):
    found = report(scores(8, 500), scores(9, nonmembers), attack="x")
    assert [rate.enough for rate in found.rates] == [enough, True]
    assert ("too few non-members" in str(found)) is not enough
    assert enough or "of 10000 or more" in str(found)


@pytest.mark.parametrize(("shift", "n", "m"), [(0.0, 40, 60), (1.0, 200, 50), (2.5, 60, 60)])
def test_the_interval_of_the_auc_covers_the_true_one(shift: float, n: int, m: int):
    """400 samples. At a true coverage of 95 % fewer than 366 are covered with probability 1.3e-3; three cases."""
    rng = np.random.default_rng(10)
    true = stats.norm.cdf(shift / math.sqrt(2))
    covered = 0
    for _ in range(400):
        found = report(rng.normal(shift, 1, n), rng.normal(0, 1, m), attack="x", false_positive_rates=())
        covered += found.auc_low <= true <= found.auc_high
    assert covered >= 366


def test_the_interval_of_the_auc_has_the_width_of_hanley_and_mc_neil_at_one_half():
    # At equal distributions the variance of the area is exactly (1/n + 1/m + 1/(nm)) / 12.
    n, m = 3000, 1000
    found = report(scores(11, n), scores(12, m), attack="x")
    expected = 2 * 1.959964 * math.sqrt((1 / n + 1 / m + 1 / (n * m)) / 12)
    assert found.auc_high - found.auc_low == pytest.approx(expected, rel=0.03)


def test_scores_that_are_fully_apart_do_not_have_an_interval_of_one_point():
    found = report(np.arange(20.0) + 100, np.arange(10.0), attack="x")
    assert (found.auc, found.auc_high, found.balanced_accuracy) == (1.0, 1.0, 1.0)
    # Ten flips without a miss: Wilson's lower end is 10 / (10 + z²).
    assert found.auc_low == pytest.approx(10 / (10 + 1.959964**2), rel=1e-6)


def test_constant_scores_tell_nothing():
    found = report(np.zeros(50), np.zeros(50), attack="x")
    assert (found.auc, found.balanced_accuracy) == (0.5, 0.5)
    assert [rate.true_positives for rate in found.rates] == [0, 0]


def test_hindsight_alone_stays_below_what_the_report_says():
    """1,000 samples that know nothing, at 95 %: more than 81 above the line have probability 1e-5."""
    rng = np.random.default_rng(13)
    above = 0
    for _ in range(1000):
        found = report(rng.normal(size=300), rng.normal(size=200), attack="x", false_positive_rates=())
        above += found.balanced_accuracy > found.balanced_accuracy_by_chance
    assert 10 <= above <= 81  # and the line is no empty promise: fewer than 10 would say that it is far too high


def test_the_report_says_what_it_is_and_what_it_is_not():
    found = loss_threshold(scores(14, 200, 1.0), scores(15, 2000))
    assert str(found).startswith("ATTACK REPORT")
    assert "not a bound on epsilon" in str(found) and "NOT PRIVATE" in str(found)
    data = json.loads(json.dumps(found.to_json()))
    assert data["kind"].startswith("attack report") and data["attack"] == "loss threshold"
    assert data["auc"] == found.auc and data["rates"][1]["target"] == 0.01
    assert not any("epsilon" in key for key in data)


@pytest.mark.parametrize(
    ("inside", "outside", "words"),
    [
        ([1.0, np.nan], [0.0], r"members\[1\] is nan"),
        ([1.0], [0.0, -np.inf], r"nonmembers\[1\] is -inf"),
        ([], [0.0], "members have shape"),
        ([1.0], [], "nonmembers have shape"),
        ([[1.0]], [0.0], "members have shape"),
        (["a"], [0.0], "no numbers"),
    ],
)
def test_scores_that_are_none_are_refused(inside, outside, words):
    with pytest.raises(InvalidArgument, match=words):
        loss_threshold(inside, outside)


@pytest.mark.parametrize("confidence", [0.0, 1.0, -1.0, math.nan])
def test_a_confidence_outside_its_domain_is_refused(confidence: float):
    with pytest.raises(InvalidArgument, match="confidence"):
        loss_threshold([1.0], [0.0], confidence=confidence)


# -- LiRA -------------------------------------------------------------------------------------------------------------


class GaussianWorld:
    """Every example has its own Gaussian of scores with it and without it, and the likelihood ratio is known."""

    def __init__(self, seed: int, examples: int, shadows: int, spread: float = 1.0) -> None:
        rng = np.random.default_rng(seed)
        self.out_mean = rng.normal(0, 3, examples)
        self.in_mean = self.out_mean + rng.exponential(1.0, examples)
        self.out_std = spread ** rng.uniform(-1, 1, examples)
        self.in_std = spread ** rng.uniform(-1, 1, examples)
        half = np.arange(shadows)[:, None] < shadows // 2
        self.shadow_members = rng.permuted(np.broadcast_to(half, (shadows, examples)), axis=0)
        self.shadow_scores = self.draw(rng, self.shadow_members)
        self.member = rng.random(examples) < 0.5
        self.scores = self.draw(rng, self.member)

    def draw(self, rng: np.random.Generator, member: np.ndarray) -> np.ndarray:
        noise = rng.normal(size=member.shape)
        return np.where(member, self.in_mean + self.in_std * noise, self.out_mean + self.out_std * noise)

    def best(self) -> np.ndarray:
        """The likelihood ratio, by SciPy."""
        inside = stats.norm.logpdf(self.scores, self.in_mean, self.in_std)
        return inside - stats.norm.logpdf(self.scores, self.out_mean, self.out_std)

    def auc(self, ratios: np.ndarray) -> float:
        return report(ratios[self.member], ratios[~self.member], attack="x").auc


def test_with_many_shadow_models_it_finds_the_likelihood_ratio_of_every_example():
    world = GaussianWorld(0, 400, 4000, spread=2.0)
    found = likelihood_ratios(world.scores, world.shadow_scores, world.shadow_members)
    # Moments from 2,000 draws: a few percent of the ratio where it is far from 0.
    assert np.abs(found - world.best()).max() <= 0.15 * (1 + np.abs(world.best()).max())
    assert np.corrcoef(found, world.best())[0, 1] > 0.998


@pytest.mark.parametrize("shadows", [8, 2 * FEWEST_SHADOWS_PER_VARIANCE])
def test_it_comes_close_to_the_best_attack_and_far_above_a_threshold(shadows: int):
    """4,000 examples: an AUC has a standard error of 0.009; the margins are 5 of them and more."""
    world = GaussianWorld(1, 4000, shadows)
    best = world.auc(world.best())
    found = world.auc(likelihood_ratios(world.scores, world.shadow_scores, world.shadow_members))
    assert found > best - (0.06 if shadows == 8 else 0.02)
    assert found > world.auc(world.scores) + 0.08


def test_offline_it_needs_no_shadow_model_with_the_example():
    world = GaussianWorld(2, 4000, 256)
    kept = np.where(world.shadow_members, 1e6, world.shadow_scores)  # whatever those with the example say
    found = likelihood_ratios(world.scores, kept, world.shadow_members, variant=Variant.OFFLINE)
    assert np.allclose(
        found, likelihood_ratios(world.scores, world.shadow_scores, world.shadow_members, variant=Variant.OFFLINE)
    )
    assert world.auc(found) > world.auc(world.scores) + 0.08
    expected = (world.scores - world.out_mean) / world.out_std
    assert np.corrcoef(found, expected)[0, 1] > 0.99


def test_few_shadow_models_share_one_variance_and_many_have_their_own():
    few, many = GaussianWorld(3, 2000, 8, spread=4.0), GaussianWorld(3, 2000, 256, spread=4.0)
    for world, own in ((few, False), (many, True)):
        offline = likelihood_ratios(world.scores, world.shadow_scores, world.shadow_members, variant=Variant.OFFLINE)
        outside = ~world.shadow_members
        mean = np.where(outside, world.shadow_scores, 0).sum(0) / outside.sum(0)
        implied = (world.scores - mean) / offline
        assert bool(np.ptp(implied) > 0.5) is own
        if not own:  # the pooled variance, and a fourth of it for the mean of four
            true = np.sqrt((world.out_std**2).mean() * 1.25)
            assert implied[0] == pytest.approx(true, rel=0.06)


def test_a_model_that_remembers_is_found_at_a_false_positive_rate_of_one_percent():
    """In scores that move by four standard deviations the best attack finds Φ(4 - 2.33) = 95 % of the members."""
    rng = np.random.default_rng(4)
    world = GaussianWorld(4, 4000, 16)
    world.in_mean = world.out_mean + 4
    world.shadow_scores, world.scores = world.draw(rng, world.shadow_members), world.draw(rng, world.member)
    found = likelihood_ratio(world.scores, world.member, world.shadow_scores, world.shadow_members)
    assert found.attack == "LiRA online, 16 shadow models"
    assert found.rates[1].low > 0.8 and found.auc_low > 0.98


@pytest.mark.parametrize("seed", range(3))
def test_a_model_that_remembers_nothing_is_not(seed: int):
    """Membership has no effect: the interval at 1 - 1e-6 misses 1/2 with probability 1e-6 or so; three worlds."""
    world = GaussianWorld(10 + seed, 3000, 8)
    rng = np.random.default_rng(seed)
    nobody = np.zeros_like(world.shadow_members)
    world.shadow_scores, world.scores = world.draw(rng, nobody), world.draw(rng, nobody[0])
    found = likelihood_ratio(world.scores, world.member, world.shadow_scores, world.shadow_members, confidence=1 - 1e-6)
    assert found.auc_low <= 0.5 <= found.auc_high
    assert found.rates[1].low <= found.rates[1].false_positive_high
    plain = loss_threshold(world.scores[world.member], world.scores[~world.member], confidence=1 - 1e-6)
    assert plain.auc_low <= 0.5 <= plain.auc_high


def test_shadow_models_that_never_vary_give_finite_ratios():
    members = np.array([[True, False], [False, True], [True, False], [False, True]])
    shadow = np.where(members, 2.0, 1.0)
    found = likelihood_ratios([2.0, 1.0], shadow, members)
    assert np.isfinite(found).all() and found[0] > 0 > found[1]


def good() -> dict[str, Any]:
    world = GaussianWorld(5, 6, 8)
    return {"scores": world.scores, "shadow_scores": world.shadow_scores, "shadow_members": world.shadow_members}


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"shadow_scores": np.zeros((8, 5))}, "shadow_scores have shape"),
        ({"shadow_members": np.zeros((7, 6), dtype=bool)}, "shadow_members"),
        ({"shadow_members": np.zeros((8, 6), dtype=int)}, "True and False"),
        ({"shadow_members": np.zeros((8, 6), dtype=bool)}, "no shadow model with them"),
        ({"shadow_members": np.ones((8, 6), dtype=bool)}, "no shadow model without them"),
        ({"shadow_scores": np.where(np.eye(8, 6) > 0, np.nan, 0.0)}, "shadow model 0"),
        ({"scores": np.array([1.0, 2, 3, np.inf, 5, 6])}, r"scores\[3\]"),
        ({"scores": np.zeros(0), "shadow_scores": np.zeros((8, 0))}, "scores have shape"),
    ],
)
def test_shadow_scores_that_do_not_fit_are_refused(change: dict[str, Any], words: str):
    with pytest.raises(InvalidArgument, match=words):
        likelihood_ratios(**{**good(), **change})


def test_two_shadow_models_say_nothing_of_the_variance():
    members = np.array([[True, False, True], [False, True, False]])
    with pytest.raises(InvalidArgument, match="train more"):
        likelihood_ratios(np.zeros(3), np.zeros((2, 3)), members)


@pytest.mark.parametrize("member", [np.zeros(5, dtype=bool), np.zeros(6, dtype=int)])
def test_membership_must_be_one_truth_value_a_score(member: np.ndarray):
    with pytest.raises(InvalidArgument, match="member has shape"):
        likelihood_ratio(good()["scores"], member, good()["shadow_scores"], good()["shadow_members"])
