"""The picture of an audit says what it shows, draws what it is given and nothing of it by chance."""

from __future__ import annotations

from xml.etree import ElementTree

import numpy as np
import pytest
from scipy.stats import norm

pytest.importorskip("matplotlib", reason="pictures take the extra `report`")

from dpkit.report.audit_plot import Curve, ErrorBounds, _rates, draw_audit

ALPHAS = np.unique(np.concatenate([np.linspace(0, 1, 201), np.geomspace(1e-6, 1, 200)]))


def gaussian(mu):
    return Curve(ALPHAS, norm.cdf(norm.isf(ALPHAS) - mu))


def draw(form="svg", mu=1.0, **changes):
    random = np.random.default_rng(0)
    given = {
        "inside": random.normal(mu, 1, 500),
        "outside": random.normal(0, 1, 400),
        "claimed": gaussian(mu),
        "found": gaussian(0.8 * mu),
        "bounds": ErrorBounds(0.4, 0.38),
        "confidence": 0.95,
        "title": "no contradiction found: epsilon >= 3.1",
        "form": form,
    }
    return draw_audit(**(given | changes))


def words(picture):
    return " ".join(ElementTree.fromstring(picture).itertext())


def test_it_names_claim_evidence_and_axes():
    text = words(draw())
    for word in (
        "no contradiction found: epsilon >= 3.1",
        "false positive rate",
        "false negative rate",
        "impossible, if the claim is true",
        "least errors by the claim",
        "at the lower bound, 95 %",
        "upper bounds of both errors",
        "errors that were counted",
        "guessing",
    ):
        assert word in text, word


def test_what_is_not_given_is_not_drawn():
    text = words(draw(claimed=None, found=None, bounds=None))
    assert "errors that were counted" in text
    for word in ("claim", "lower bound", "upper bounds"):
        assert word not in text


def test_rare_errors_have_logarithmic_axes():
    assert "0.2" in words(draw(mu=1.0))
    assert "0.2" not in words(draw(mu=5.0))
    assert "0.2" not in words(draw(claimed=None, found=gaussian(5.0)))


def test_a_confidence_near_one_is_not_rounded_to_it():
    assert "1 - 1e-06" in words(draw(confidence=1 - 1e-6))


def test_the_same_numbers_give_the_same_bytes():
    assert draw() == draw()
    assert draw("png").startswith(b"\x89PNG")


@pytest.mark.parametrize(("sizes", "whole"), [((30, 20), True), ((3000, 2000), False)])
def test_the_counted_errors_are_those_of_thresholds(sizes, whole):
    """Against counting at every score."""
    random = np.random.default_rng(1)
    inside, outside = (np.round(random.normal(0, 1, size), 1 if whole else 6) for size in sizes)
    positives, negatives = _rates(inside, outside)
    every = {(float(np.mean(outside >= t)), float(np.mean(inside < t))) for t in [*inside, *outside, np.inf]}
    found = set(zip(positives.tolist(), negatives.tolist(), strict=True))
    assert all(any(abs(a - x) + abs(b - y) < 1e-12 for x, y in every) for a, b in found)
    assert {(1.0, 0.0), (0.0, 1.0)} <= found
    assert whole is (len(found) == len(every))
    assert np.all(np.diff(positives) <= 0)
    assert np.all(np.diff(negatives) >= 0)
