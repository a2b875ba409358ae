"""The picture of a noise plan: the error of each strategy against its number of bands, and plain DP-SGD as a line.

Both axes are logarithmic. The same plan gives the same bytes. What the errors are, and what not, says
``accounting.plan_noise``.
"""

from __future__ import annotations

import io

from accounting.plan_noise import Batches, NoiseChoice, NoisePlan, Strategy

_INK, _GRID, _RED = "#1b2733", "#dfe4ea", "#a3181e"
_MOST_TICKS = 10
# Lines differ in dash and marker as well as in colour.
_FAMILIES = (
    (Batches.FIXED_ORDER, Strategy.BSR, "BSR, fixed order", "#8a5a00", "--", "s"),
    (Batches.FIXED_ORDER, Strategy.BISR, "BISR, fixed order", "#5b3a8c", "-.", "^"),
    (Batches.FIXED_ORDER, Strategy.BAND_MF, "BandMF, fixed order", "#1d6b52", ":", "D"),
    (Batches.CYCLIC_POISSON, Strategy.BAND_MF, "BandMF, cyclic Poisson", "#1f5fa8", "-", "o"),
)


def draw_noise_plan(plan: NoisePlan, title: str, form: str) -> bytes:
    """The picture as a file of the kind ``form``, "png" or "svg"; a circle is around the best choice."""
    import matplotlib.style
    from matplotlib.figure import Figure
    from matplotlib.ticker import LogFormatter, NullLocator

    with matplotlib.style.context(["default", {"svg.hashsalt": "dpkit", "svg.fonttype": "none"}]):
        figure = Figure(figsize=(6.4, 4.6), layout="constrained")
        axes = figure.add_subplot()
        for batches, strategy, label, colour, dash, marker in _FAMILIES:
            if line := _line(plan, batches, strategy):
                bands, errors = zip(*((choice.bands, choice.error) for choice in line), strict=True)
                axes.plot(bands, errors, color=colour, linestyle=dash, marker=marker, markersize=5, label=label)
        if plan.plain is not None:
            axes.axhline(plan.plain.error, color=_RED, linestyle=(0, (6, 3)), label="plain DP-SGD")
        for choice in plan.choices:
            if choice.strategy is Strategy.SQUARE_ROOT:  # as many bands as steps: no place on this axis
                axes.axhline(choice.error, color=_INK, linestyle=(0, (1, 2)), label="square root, fixed order")
        if plan.best.strategy is not Strategy.SQUARE_ROOT:
            axes.plot([plan.best.bands], [plan.best.error], "o", markersize=13, fillstyle="none", color=_INK)
        axes.set_xscale("log", base=2)
        axes.set_yscale("log")
        ticks = _ticks(plan)
        axes.set_xticks(ticks, [str(number) for number in ticks])
        axes.xaxis.set_minor_locator(NullLocator())
        # Numbers as they are, those between powers of ten where they do not crowd.
        axes.yaxis.set_major_formatter(LogFormatter())
        axes.yaxis.set_minor_formatter(LogFormatter(minor_thresholds=(2, 0.5)))
        axes.set(xlabel="bands", ylabel="error of the running sums, in clipping norms")
        axes.set_title(title, fontsize=9)
        axes.grid(color=_GRID, which="both")
        axes.set_axisbelow(True)
        axes.spines[["top", "right"]].set_visible(False)
        figure.legend(loc="outside lower center", ncols=2, frameon=False, fontsize=9)
        picture = io.BytesIO()
        # Without the date, the same numbers give the same bytes.
        figure.savefig(picture, format=form, dpi=150, metadata={"Date": None} if form == "svg" else None)
    return picture.getvalue()


def _line(plan: NoisePlan, batches: Batches, strategy: Strategy) -> list[NoiseChoice]:
    """The choices of a family; with one band it is independent noise, over Poisson batches plain DP-SGD."""
    family = [choice for choice in plan.choices if (choice.batches, choice.strategy) == (batches, strategy)]
    first = Batches.POISSON if batches is Batches.CYCLIC_POISSON else batches
    single = [choice for choice in plan.choices if (choice.batches, choice.strategy) == (first, Strategy.IDENTITY)]
    return [*single, *family] if family else []


def _ticks(plan: NoisePlan) -> list[int]:
    """The numbers of bands that are named on the axis."""
    bands = sorted({choice.bands for choice in plan.choices if choice.strategy is not Strategy.SQUARE_ROOT})
    return bands if len(bands) <= _MOST_TICKS else [2**power for power in range(bands[-1].bit_length())]
