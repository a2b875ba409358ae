"""The plots of a report, as SVG elements to be put into the page as they are.

Guarantees: the same numbers give the same bytes (fixed hash salt, no date); no script, style sheet or address of
another file is in them; every id carries the plot's name, so that several plots fit into one page; each says in words
what it shows (``<title>``, ``<desc>``). Their text is fixed or made of numbers: no text of a run gets in here.

They are narrow for the size of their letters, so that they can be read on a telephone. Lines differ in dash and marker
as well as in colour.
"""

from __future__ import annotations

import io
import re
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any
from xml.etree import ElementTree

import numpy as np

from accounting.ledger import epsilon_of

from .records import MetricsRecord, NonPrivateRecord
from .summary import RunSummary

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

WIDTH = 360
"""Units of a plot's width; the height of letters in it is 13."""

POINTS = 60
MOST_POINTS = 400
"""Points of a line at most; more would not be seen."""

INK, SOFT, GRID, BLUE, RED = "#1b2733", "#55616e", "#dfe4ea", "#1f5fa8", "#a3181e"
_LINES = ((BLUE, "-", "o"), ("#8a5a00", "--", "s"), ("#5b3a8c", "-.", "^"), ("#1d6b52", ":", "D"))
_STYLE: dict[Any, Any] = {
    "svg.hashsalt": "dpkit",
    "svg.fonttype": "none",
    "font.family": ["sans-serif"],
    "font.size": 13,
    "axes.edgecolor": SOFT,
    "axes.labelcolor": INK,
    "axes.labelpad": 7,
    "axes.linewidth": 0.8,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.grid": True,
    "axes.axisbelow": True,
    "axes.formatter.useoffset": False,
    "grid.color": GRID,
    "grid.linewidth": 0.8,
    "xtick.major.pad": 6,
    "ytick.major.pad": 5,
    "xtick.color": SOFT,
    "ytick.color": SOFT,
    "xtick.labelcolor": INK,
    "ytick.labelcolor": INK,
    "lines.linewidth": 2.0,
    "legend.frameon": False,
    "legend.fontsize": 13,
}
_SVG, _XLINK = "{http://www.w3.org/2000/svg}", "{http://www.w3.org/1999/xlink}"


def epsilon_curve(summary: RunSummary) -> str:
    """Epsilon against charged steps, the steps still planned dotted, and the budget as a line.

    Several plans stand one after the other in the order in which they began: the statement counts each at its planned
    steps, so each begins where the one before it would end.
    """
    with _figure(2.75) as (figure, axes):
        begun, spent = 0, 0.0
        for index, plan in enumerate(summary.plans):
            colour, _, _ = _LINES[index % len(_LINES)]
            charged, planned = plan.stated.steps_charged, plan.record.steps
            done = _steps(0, charged)
            axes.plot(
                [begun + step for step in done],
                [spent + epsilon_of(plan.record, step).upper for step in done],
                color=colour,
                label="charged" if index == 0 else None,
            )
            if charged < planned:
                rest = _steps(charged, planned)
                axes.plot(
                    [begun + step for step in rest],
                    [spent + epsilon_of(plan.record, step).upper for step in rest],
                    color=colour,
                    linestyle=(0, (1, 1.6)),
                )
            axes.plot([begun + charged], [spent + epsilon_of(plan.record, charged).upper], "o", color=colour)
            begun += planned if index < len(summary.plans) - 1 else charged
            spent += epsilon_of(plan.record, planned).upper
        budget = summary.statement.budget.epsilon
        if budget_is_shown(summary):
            axes.axhline(budget, color=RED, linestyle=(0, (6, 3)), linewidth=1.5)
            axes.annotate(
                f"budget {budget:g}",
                (0, budget),
                xycoords=("axes fraction", "data"),
                xytext=(6, -5),
                textcoords="offset points",
                va="top",
                color=RED,
            )
        axes.set(xlabel="steps", ylabel="ε, upper bound", ylim=(0, None), xlim=(0, None))
        axes.margins(x=0.02)
        described = (
            f"Epsilon grows with the number of charged steps, to {summary.statement.epsilon:.4f} after "
            f"{summary.steps_charged} of {summary.steps_planned} planned steps. The budget is {budget:g}."
        )
        return _svg(figure, "epsilon", "Epsilon against charged steps", described)


def budget_is_shown(summary: RunSummary) -> bool:
    """Whether the budget is near enough to be a line in the plot of epsilon."""
    return summary.statement.budget.epsilon <= 2.5 * summary.statement.committed_epsilon


def evaluations(summary: RunSummary) -> list[list[MetricsRecord]]:
    """The records with a finite test accuracy and epsilon, apart for each plan."""
    groups: list[list[MetricsRecord]] = []
    last = None
    for record in summary.metrics:
        # Within a plan the charges never go back, also when steps are redone.
        if (
            last is None
            or record.charged < last.charged
            or (record.planned, record.delta) != (last.planned, last.delta)
        ):
            groups.append([])
        last = record
        if np.isfinite(record.metrics.get("test_accuracy", np.nan)) and np.isfinite(record.epsilon):
            groups[-1].append(record)
    return [group for group in groups if group]


def accuracy_curve(groups: Sequence[Sequence[MetricsRecord]]) -> str:
    """Test accuracy against epsilon, one line for each plan."""
    with _figure(2.75) as (figure, axes):
        for index, group in enumerate(groups):
            colour, dash, marker = _LINES[index % len(_LINES)]
            kept = _thinned(group)
            axes.plot(
                [record.epsilon for record in kept],
                [record.metrics["test_accuracy"] for record in kept],
                color=colour,
                linestyle=dash,
                marker=marker if len(kept) <= 40 else None,
                markersize=5,
                label=f"plan {index + 1}",
            )
        values = [record.metrics["test_accuracy"] for group in groups for record in group]
        if min(values) >= 0 and max(values) <= 1:
            axes.set_ylim(
                max(0.0, np.floor(10 * min(values) - 0.5) / 10), min(1.0, np.ceil(10 * max(values) + 0.2) / 10)
            )
        if len(groups) > 1:
            axes.legend(loc="lower right")
        axes.set(xlabel="ε, upper bound", ylabel="test accuracy", xlim=(0, None))
        last = groups[-1][-1]
        described = (
            f"Test accuracy from {values[0]:.3f} at epsilon {groups[0][0].epsilon:.4f} to "
            f"{last.metrics['test_accuracy']:.3f} at epsilon {last.epsilon:.4f}, in {len(values)} evaluations."
        )
        return _svg(figure, "accuracy", "Test accuracy against epsilon", described)


def learning_rates(summary: RunSummary) -> list[tuple[int, float]]:
    """(step, learning rate) of the last plan; of steps that were redone the last time."""
    found: dict[int, float] = {}
    last = None
    for record in summary.metrics:
        if last is not None and record.charged < last.charged:
            found = {}
        last = record
        if record.learning_rate is not None and np.isfinite(record.learning_rate):
            found[record.step] = record.learning_rate
    return sorted(found.items())


def learning_rate_curve(rates: Sequence[tuple[int, float]]) -> str:
    """The learning rate over the steps."""
    with _figure(1.9) as (figure, axes):
        kept = _thinned(rates)
        axes.plot([step for step, _ in kept], [rate for _, rate in kept], color=BLUE)
        axes.set(xlabel="step", ylabel="learning rate", ylim=(0, None), xlim=(0, None))
        axes.margins(x=0.02)
        described = f"The learning rate goes from {rates[0][1]:g} to {rates[-1][1]:g} over {len(rates)} steps."
        return _svg(figure, "learning-rate", "Learning rate over the steps", described)


def nonprivate_curve(records: Sequence[NonPrivateRecord], name: str, label: str, values: Sequence[float]) -> str:
    """NOT PRIVATE: one number of each batch over the charged steps, in red."""
    with _figure(2.2) as (figure, axes):
        kept = _thinned([(r.charged, value) for r, value in zip(records, values, strict=True) if np.isfinite(value)])
        axes.plot([step for step, _ in kept], [value for _, value in kept], color=RED, linewidth=1.2)
        axes.set(xlabel="steps charged", ylabel=label, xlim=(0, None))
        axes.set_ylim(min(0.0, axes.get_ylim()[0]) if min(kept)[1] < 0 else 0.0, max(1.0, axes.get_ylim()[1]))
        axes.set_title("NOT PRIVATE", loc="right", fontsize=13, color=RED, fontweight="bold")
        return _svg(
            figure, name, f"Not private: {label} over the steps", f"{len(kept)} values of {label}, not private."
        )


class _figure:
    """A figure with one pair of axes in the house style, whatever the user's own matplotlib settings are."""

    def __init__(self, height: float) -> None:
        self._height = height

    def __enter__(self) -> tuple[Figure, Axes]:
        import matplotlib
        from matplotlib.figure import Figure

        self._style = matplotlib.rc_context()
        self._style.__enter__()
        matplotlib.rcdefaults()
        matplotlib.rcParams.update(_STYLE)
        figure = Figure(figsize=(WIDTH / 72, self._height), layout="constrained")
        return figure, figure.add_subplot()

    def __exit__(self, *error: Any) -> None:
        self._style.__exit__(*error)


def _steps(first: int, last: int) -> list[int]:
    return sorted({int(step) for step in np.linspace(first, last, POINTS)})


def _thinned(points: Sequence[Any]) -> list[Any]:
    """At most ``MOST_POINTS`` of ``points``, evenly spread, with the first and the last."""
    if len(points) <= MOST_POINTS:
        return list(points)
    return [points[int(index)] for index in np.linspace(0, len(points) - 1, MOST_POINTS)]


def _svg(figure: Figure, name: str, title: str, description: str) -> str:
    """``figure`` as an ``<svg>`` element for the body of an HTML page."""
    file = io.BytesIO()
    figure.savefig(file, format="svg", transparent=True, metadata={"Date": None})
    root = ElementTree.fromstring(file.getvalue())
    parents = {child: parent for parent in root.iter() for child in parent}
    for element in list(root.iter()):
        # The style sheet would hold for the whole page, and the metadata are addresses.
        if element.tag in (f"{_SVG}metadata", f"{_SVG}style"):
            parents[element].remove(element)
    text = ElementTree.tostring(root, encoding="unicode")
    used = set(re.findall(r"#([\w-]+)", text))
    for element in root.iter():
        element.tag = element.tag.removeprefix(_SVG)
        for key, value in list(element.attrib.items()):
            del element.attrib[key]
            if key == "id" and value not in used:
                continue
            kept = re.sub(r" font-family: [^;]*;", "", value)  # the page has its own
            own = f"{name}-{kept}" if key == "id" else re.sub(r"(?<=#)(?=[mp][0-9a-f]{10})", f"{name}-", kept)
            element.set(key.replace(_XLINK, ""), own)
    for key in ("width", "height", "version"):
        root.attrib.pop(key, None)
    root.attrib |= {"role": "img", "aria-labelledby": f"{name}-title {name}-desc"}
    for tag, content in (("desc", description), ("title", title)):
        element = ElementTree.Element(tag, {"id": f"{name}-{tag}"})
        element.text = content
        root.insert(0, element)
    return ElementTree.tostring(root, encoding="unicode")
