"""``dpkit curve``: epsilon after each step of a run, as numbers and as a picture.

Each value is an upper bound, rounded up, of what the steps up to there release. A run that may end early because of
what was seen does not get the value at its last step: that of all planned steps is its guarantee.
"""

from __future__ import annotations

import io
import textwrap
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Annotated

import typer
from rich.table import Table

import accounting
from accounting import Bound
from dpkit.errors import InvalidArgument

from .epsilon import Answer, answer_of, epsilon_of, print_answer, print_caveats, say, shown, shown_below
from .pictures import form_of, refuse_plot, write_picture
from .terminal import Debug, Json, out, print_json
from .training_run import Numbers, RunPath, TrainingRun, takes_numbers, training_run

_PLANNED = "a value before the last step is the guarantee of a run that was planned to end there"
_IN_TABLE = 12
_IN_PICTURE = 1000
_BLUE = "#1f5fa8"


@dataclass(frozen=True)
class _Point:
    """After ``step`` steps; ``epsilon`` is the upper bound, rounded up."""

    step: int
    epsilon: float
    lower: float
    estimate: float
    accountant: str


@takes_numbers
def curve(
    run: RunPath = None,
    *,
    numbers: Numbers,
    every: Annotated[
        int | None, typer.Option(help="Only every K-th step, and the last; left out, all (the text shows a few).")
    ] = None,
    plot: Annotated[
        Path | None, typer.Option(metavar="FILE.png|svg", help="Draw it; needs the extra `report`.")
    ] = None,
    json_output: Json = False,
    debug: Debug = False,
) -> None:
    """Compute epsilon after each step."""
    if every is not None and every < 1:
        raise InvalidArgument(f"--every is {every}: it counts steps and must be at least 1.")
    described = training_run(run, numbers)
    if plot is not None:
        refuse_plot(plot)
        if described.steps == 0:
            raise InvalidArgument("--steps is 0: a run without steps has no curve to draw; leave --plot out.")
    bounds = _bounds(described)
    points = _points(described, bounds, every or 1)
    answer = answer_of(described, bounds[-1] if bounds else epsilon_of(described))
    if plot is not None:
        _draw(plot, answer, _points(described, bounds, 1))
    if json_output:
        print_json(
            asdict(answer)
            | {
                "points": [asdict(point) for point in points],
                "plot": None if plot is None else str(plot),
                "caveats": [*described.caveats, _PLANNED],
            }
        )
        return
    print_answer(answer)
    print_caveats((*described.caveats, _PLANNED))
    _print(points if every is not None else _spread(points, _IN_TABLE))
    if plot is not None:
        say(f"wrote {plot}")


def _bounds(run: TrainingRun) -> list[Bound]:
    """After each release."""
    if run.count == 0:
        return []
    return accounting.epsilon_curve(run.release, run.count, run.delta, relation=run.relation)


def _points(run: TrainingRun, bounds: list[Bound], every: int) -> list[_Point]:
    steps = [*range(every, run.steps, every), *([run.steps] if run.steps else [])]
    return [_point(step, bounds[run.releases_by(step) - 1]) for step in steps]


def _point(step: int, bound: Bound) -> _Point:
    return _Point(step, accounting.round_up(bound.upper), bound.lower, bound.estimate, bound.accountant)


def _spread(points: list[_Point], most: int) -> list[_Point]:
    """At most ``most`` of ``points``, evenly spread, with the first and the last."""
    if len(points) <= most:
        return points
    return [points[round(index * (len(points) - 1) / (most - 1))] for index in range(most)]


def _print(points: list[_Point]) -> None:
    table = Table(box=None, pad_edge=False, header_style="bold")
    for name in ("after step", "epsilon <=", "lower", "accountant"):
        table.add_column(name, justify="left" if name == "accountant" else "right")
    for point in points:
        table.add_row(str(point.step), shown(point.epsilon), shown_below(point.lower), point.accountant)
    out.print(table)


def _draw(path: Path, answer: Answer, points: list[_Point]) -> None:
    """Writes the picture of ``points`` to a file that does not exist yet."""
    import matplotlib.style
    from matplotlib.figure import Figure

    drawn = _spread(points, _IN_PICTURE)
    steps, upper, lower = zip(*((point.step, point.epsilon, point.lower) for point in drawn), strict=True)
    title = (
        f"{answer.sampling}; noise multiplier {answer.noise_multiplier}",
        f"unit: one {answer.unit}; relation: {answer.relation}; accountant: {answer.accountant}",
    )
    form = form_of(path)
    with matplotlib.style.context(["default", {"svg.hashsalt": "dpkit", "svg.fonttype": "none"}]):
        figure = Figure(figsize=(6.4, 4.2), layout="constrained")
        axes = figure.add_subplot()
        # In steps: a straight line from one pass over the data to the next would lie below epsilon.
        axes.fill_between(
            steps, lower, upper, step="pre", color=_BLUE, alpha=0.3, linewidth=0, label="down to the lower bound"
        )
        axes.plot(steps, upper, drawstyle="steps-pre", color=_BLUE, label="epsilon (upper bound)")
        axes.set(xlabel="steps", ylabel=f"epsilon at delta = {accounting.round_up_text(answer.delta)}")
        axes.set(xlim=(0, steps[-1] * 1.01), ylim=(0, None))
        axes.set_title("\n".join(line for part in title for line in textwrap.wrap(part, 90)), fontsize=9)
        axes.grid(color="#dfe4ea")
        axes.spines[["top", "right"]].set_visible(False)
        axes.legend(loc="lower right", frameon=False)
        picture = io.BytesIO()
        # Without the date, the same numbers give the same bytes.
        figure.savefig(picture, format=form, dpi=150, metadata={"Date": None} if form == "svg" else None)
    write_picture(path, picture.getvalue())
