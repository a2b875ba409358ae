"""``dpkit compare``: what every accountant here and every independent library says about one run.

A library is asked only in the range in which it is sound (``accounting.crosscheck`` says so in each row), and is never
the reported value. Exit code 4 if one of them proves that the reported epsilon is too small: the answer cannot be
verified then.
"""

from __future__ import annotations

from dataclasses import asdict
from typing import NamedTuple, get_args

import typer
from rich.table import Table
from rich.text import Text

import accounting
import dpkit
from accounting import Bound, Unsupported
from accounting.accountant import By

from .epsilon import Answer, answer_of, epsilon_of, print_answer, print_caveats, shown, shown_below
from .terminal import UNVERIFIABLE, Debug, Json, out, print_error, print_json
from .training_run import Numbers, RunPath, TrainingRun, takes_numbers, training_run

_AGREES, _SILENT, _TOO_SMALL, _CONTRADICTS = "agrees", "no answer", "below our lower bound", "CONTRADICTS"
_STYLES = {_AGREES: "green", _SILENT: "dim", _TOO_SMALL: "yellow", _CONTRADICTS: "bold red"}


class _Row(NamedTuple):
    library: str
    version: str
    method: str
    lower: float | None
    upper: float | None
    verdict: str
    note: str


@takes_numbers
def compare(run: RunPath = None, *, numbers: Numbers, json_output: Json = False, debug: Debug = False) -> None:
    """Hold epsilon against independent libraries. Exit code 4 if one of them proves it too small."""
    described = training_run(run, numbers)
    reported = epsilon_of(described)
    answer = answer_of(described, reported)
    rows = [*_ours(described), *_theirs(described, reported)]
    if json_output:
        print_json(
            asdict(answer)
            | {
                "contradicted": any(row.verdict == _CONTRADICTS for row in rows),
                "libraries_that_answered": sum(row.library != "dpkit" and row.verdict != _SILENT for row in rows),
                "rows": [row._asdict() for row in rows],
                "caveats": list(described.caveats),
            }
        )
    else:
        _print(answer, rows)
        print_caveats(described.caveats)
    if not json_output and all(row.verdict == _SILENT for row in rows if row.library != "dpkit"):
        out.print("no library answered: nothing was checked", style="yellow", markup=False)
    for row in rows:
        if row.verdict == _CONTRADICTS:
            print_error(
                f"{row.library} {row.version} ({row.method}) proves that epsilon is at least {row.lower}, above the "
                f"reported {reported.upper}: one of the two is wrong, and epsilon cannot be verified. Rely on neither, "
                "and report both numbers with the options that gave them."
            )
            raise typer.Exit(UNVERIFIABLE)


def _ours(run: TrainingRun) -> list[_Row]:
    """A row for every accountant of this package that covers the run."""
    rows = []
    for name in get_args(By):
        try:
            bound = epsilon_of(run, name)
        except Unsupported:
            continue
        rows.append(_Row("dpkit", dpkit.__version__, name, bound.lower, bound.upper, _AGREES, ""))
    return rows


def _theirs(run: TrainingRun, reported: Bound) -> list[_Row]:
    checks = accounting.crosscheck(run.event, run.delta, relation=run.relation)
    return [
        _Row(
            check.library,
            check.version,
            check.method,
            check.lower,
            check.upper,
            _verdict(check, reported),
            check.note or ("it claims less than can be: not sound here" if _is_too_small(check, reported) else ""),
        )
        for check in checks
    ]


def _verdict(check: accounting.Check, reported: Bound) -> str:
    if check.contradicts(reported.upper):
        return _CONTRADICTS
    if check.lower is None and check.upper is None:
        return _SILENT
    return _TOO_SMALL if _is_too_small(check, reported) else _AGREES


def _is_too_small(check: accounting.Check, reported: Bound) -> bool:
    return check.upper is not None and check.upper < reported.lower


def _print(answer: Answer, rows: list[_Row]) -> None:
    print_answer(answer)
    out.print()
    table = Table(box=None, pad_edge=False, header_style="bold")
    for name in ("library", "method", "lower", "upper", "verdict", "note"):
        table.add_column(name, justify="right" if name in ("lower", "upper") else "left", overflow="fold")
    for row in rows:
        table.add_row(
            Text(f"{row.library} {row.version}".strip()),
            Text(row.method),
            Text("" if row.lower is None else shown_below(row.lower)),
            Text("" if row.upper is None else shown(row.upper)),
            Text(row.verdict, style=_STYLES[row.verdict]),
            Text(row.note),
        )
    out.print(table)
