"""The picture of an audit: both error rates of telling members from others, beside the least that the claim allows.

Every point is a test: how often it sees a member who is none, and how often it misses one. Below the curve of the claim
lie the error rates that no test can have if the claim is true. The rates that were counted are drawn as they are, and
may lie there by chance; what the audit says with its confidence is the curve of the lower bound, above which not all
tests stay. The claim is contradicted where that curve lies below the curve of the claim.

The same numbers give the same bytes.
"""

from __future__ import annotations

import io
from typing import NamedTuple

import numpy as np
from numpy.typing import ArrayLike

_INK, _SOFT, _GRID, _BLUE, _RED = "#1b2733", "#55616e", "#dfe4ea", "#1f5fa8", "#a3181e"
_SMALL = 0.03
"""Curves that let both errors be rarer than this are drawn on logarithmic axes."""
_MOST_POINTS = 400


_IMPOSSIBLE = "impossible, if the claim is true"


class Curve(NamedTuple):
    """For each false positive rate the least false negative rate."""

    alphas: np.ndarray
    betas: np.ndarray


class ErrorBounds(NamedTuple):
    """Upper bounds of both error rates of a test, which hold together."""

    false_positive_rate: float
    false_negative_rate: float


def draw_audit(
    *,
    inside: ArrayLike,
    outside: ArrayLike,
    claimed: Curve | None,
    found: Curve | None,
    bounds: ErrorBounds | None,
    confidence: float,
    title: str,
    form: str,
) -> bytes:
    """The picture as a file of the kind ``form``, "png" or "svg".

    Args:
      inside, outside: scores of members and of others; larger looks more like a member.
      claimed: the least errors that the claim allows; None without a claim.
      found: the least errors at the lower bound; None where it is 0.
      bounds: upper bounds of the error rates of one test; None where the audit did not use such.
    """
    import matplotlib.style
    from matplotlib.figure import Figure
    from matplotlib.ticker import FuncFormatter

    positives, negatives = _rates(np.asarray(inside, dtype=float), np.asarray(outside, dtype=float))
    logarithmic = any(curve is not None and _crossing(curve) < _SMALL for curve in (claimed, found))
    fewest = 1 / max(np.size(inside), np.size(outside))
    least = float(10 ** np.floor(np.log10(fewest))) if logarithmic else 0.0
    with matplotlib.style.context(["default", {"svg.hashsalt": "dpkit", "svg.fonttype": "none"}]):
        figure = Figure(figsize=(5.6, 6.1), layout="constrained")
        axes = figure.add_subplot()
        if claimed is not None:
            alphas, betas = claimed
            axes.fill_between(
                alphas, least, betas, where=betas > least, color=_RED, alpha=0.1, linewidth=0, label=_IMPOSSIBLE
            )
            axes.plot(alphas, betas, color=_RED, linewidth=1.8, label="least errors by the claim")
        if found is not None:
            axes.plot(
                *found, color=_INK, linestyle="--", linewidth=1.5, label=f"at the lower bound, {_said(confidence)}"
            )
        guessing = np.linspace(0, 1, 200)
        axes.plot(guessing, 1 - guessing, color=_SOFT, linestyle=(0, (2, 3)), linewidth=1, label="guessing")
        axes.plot(positives, negatives, color=_BLUE, linewidth=1.5, label="errors that were counted")
        if bounds is not None:
            alpha, beta = bounds
            axes.plot([least, alpha, alpha], [beta, beta, least], color=_INK, linestyle=(0, (1, 1.5)), linewidth=1)
            axes.plot([alpha], [beta], "s", color=_INK, markersize=6, label="upper bounds of both errors")
        axes.set(xlabel="false positive rate: a stranger taken for a member")
        axes.set(ylabel="false negative rate: a member not seen")
        if logarithmic:
            axes.set(xscale="log", yscale="log", xlim=(least, 1.15), ylim=(least, 1.15))
        else:
            axes.set(xlim=(0, 1), ylim=(0, 1))
            for axis in (axes.xaxis, axes.yaxis):
                axis.set_major_formatter(FuncFormatter(lambda rate, _: f"{rate:g}"))
        axes.set_aspect("equal")
        axes.set_title(title, fontsize=8.5)
        axes.grid(color=_GRID)
        axes.set_axisbelow(True)
        axes.spines[["top", "right"]].set_visible(False)
        figure.legend(loc="outside lower center", ncols=2, frameon=False, fontsize=9)
        picture = io.BytesIO()
        # Without the date, the same numbers give the same bytes.
        figure.savefig(picture, format=form, dpi=150, metadata={"Date": None} if form == "svg" else None)
    return picture.getvalue()


def _rates(inside: np.ndarray, outside: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """(false positive rates, false negative rates) of thresholds at some of the scores, and beyond all."""
    values = np.unique(np.concatenate([inside, outside]))
    if len(values) > _MOST_POINTS:
        # Closer together towards both ends, where few errors are made.
        places = (1 / (1 + np.exp(-np.linspace(-1, 1, _MOST_POINTS) * np.log(len(values))))) * (len(values) - 1)
        values = values[np.unique([0, *np.round(places).astype(int), len(values) - 1])]
    values = np.append(values, np.inf)
    positives = 1 - np.searchsorted(np.sort(outside), values, "left") / len(outside)
    return positives, np.searchsorted(np.sort(inside), values, "left") / len(inside)


def _crossing(curve: Curve) -> float:
    """The rate at which it lets both errors be equally rare."""
    return float(curve.alphas[np.argmin(np.abs(curve.alphas - curve.betas))])


def _said(confidence: float) -> str:
    return f"{100 * confidence:g} %" if confidence <= 0.9999 else f"1 - {1 - confidence:.2g}"
