"""The picture of a membership attack: members found against false alarms, both axes logarithmic.

Low rates of false alarms are where an attack does harm, and only logarithmic axes show them. The dashed line is
guessing. The same curves give the same bytes with the same version of matplotlib. The picture is NOT PRIVATE, and says
so; what an attack shows and what not, says ``dpkit.audit.membership``.
"""

from __future__ import annotations

import io
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from dpkit.errors import InvalidArgument

from .plots import BLUE, GRID, INK, RED, SOFT

_STYLES = ((BLUE, "-"), (RED, "--"), ("#1d6b52", "-."), ("#8a5a00", ":"))
_MOST_POINTS = 2000


class Curve(NamedTuple):
    """One attack: rates of every threshold, from (0, 0) to (1, 1)."""

    label: str
    false_positives: NDArray[np.floating]
    true_positives: NDArray[np.floating]


def draw_membership(curves: Sequence[Curve], title: str, form: str, *, nonmembers: int) -> bytes:
    """The picture as a file of the kind ``form``, "png" or "svg".

    Args:
      nonmembers: how many were scored; rates below a few of them are not drawn.
    Raises:
      InvalidArgument: no curves, more than four, or rates that are none.
    """
    if not 1 <= len(curves) <= len(_STYLES):
        raise InvalidArgument(f"there are {len(curves)} curves; from 1 to {len(_STYLES)} can be told apart.")
    for curve in curves:
        rates = np.concatenate([curve.false_positives, curve.true_positives])
        if len(curve.false_positives) != len(curve.true_positives) or not ((rates >= 0) & (rates <= 1)).all():
            raise InvalidArgument(f"{curve.label!r} is no curve of rates from 0 to 1.")
    if nonmembers < 1:
        raise InvalidArgument(f"nonmembers is {nonmembers}; at least one was scored.")
    import matplotlib.style
    from matplotlib.figure import Figure
    from matplotlib.ticker import FuncFormatter, NullFormatter

    lowest = min(0.1, max(1e-5, 1 / nonmembers))
    with matplotlib.style.context(["default", {"svg.hashsalt": "dpkit", "svg.fonttype": "none"}]):
        figure = Figure(figsize=(5.4, 5.4), layout="constrained")
        axes = figure.add_subplot()
        axes.plot([lowest, 1], [lowest, 1], color=SOFT, linewidth=1, linestyle=(0, (4, 3)), label="guessing")
        for curve, (colour, dash) in zip(curves, _STYLES, strict=False):
            false, true = _few(np.asarray(curve.false_positives), np.asarray(curve.true_positives), lowest)
            axes.plot(false, true, color=colour, linestyle=dash, linewidth=2, label=curve.label, drawstyle="steps-post")
        axes.set(xscale="log", yscale="log", xlim=(lowest, 1), ylim=(lowest, 1.1), aspect="equal")
        axes.set(xlabel="false positive rate: non-members called members", ylabel="true positive rate: members found")
        for axis in (axes.xaxis, axes.yaxis):
            axis.set_major_formatter(FuncFormatter(lambda rate, _: f"{100 * rate:g} %"))
            axis.set_minor_formatter(NullFormatter())
        axes.set_title(f"ATTACK REPORT, NOT PRIVATE, not a bound on epsilon\n{title}", fontsize=9, color=INK)
        axes.grid(color=GRID)
        axes.set_axisbelow(True)
        axes.spines[["top", "right"]].set_visible(False)
        axes.legend(frameon=False, loc="upper left", fontsize=9)
        picture = io.BytesIO()
        # Without the date, the same curves give the same bytes.
        metadata = {"Date": None} if form == "svg" else {"Software": None}
        figure.savefig(picture, format=form, dpi=150, metadata=metadata)
    return picture.getvalue()


def _few(
    false: NDArray[np.floating], true: NDArray[np.floating], lowest: float
) -> tuple[NDArray[np.floating], NDArray[np.floating]]:
    """The best true positive rate at each of some false positive rates from the lowest on."""
    at = np.geomspace(lowest, 1, _MOST_POINTS)
    best = true[np.searchsorted(false, at * (1 + 1e-9), side="right") - 1]
    return at, np.maximum(best, lowest / 10)  # a rate of 0 has no place on the axis; this is just below it
