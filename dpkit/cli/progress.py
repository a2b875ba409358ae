"""A progress bar that shows epsilon being spent. It shows public and released numbers only."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

from rich.progress import BarColumn, MofNCompleteColumn, Progress, TaskID, TextColumn, TimeRemainingColumn

from accounting import round_up, round_up_text
from dpkit.callbacks import Callback, StepRecord

from .terminal import err


class TrainingBar(Callback):
    """A bar of steps; made by :func:`training_bar`."""

    def __init__(self, progress: Progress, task: TaskID, target_epsilon: float | None) -> None:
        self._progress = progress
        self._task = task
        self._limit = "" if target_epsilon is None else f" of {target_epsilon}"

    def moved(self, step: int, planned: int, spent: str = "") -> None:
        """The run is after ``step`` of ``planned`` steps."""
        self._progress.update(self._task, completed=step, total=planned, spent=spent)

    def on_step(self, record: StepRecord) -> None:
        spent = f"epsilon {round_up(record.epsilon, 3):.3f}{self._limit} (delta {round_up_text(record.delta)})"
        # Steps that are redone after a crash were paid before, so the run ends that much earlier.
        self.moved(record.step, record.planned - (record.charged - record.step), spent)


@contextmanager
def training_bar(title: str, target_epsilon: float | None) -> Iterator[TrainingBar]:
    """A bar on stderr, as a callback for the engine."""
    columns = (
        TextColumn("{task.description}", markup=False),
        BarColumn(),
        MofNCompleteColumn(),
        TextColumn("steps {task.fields[spent]}", markup=False),
        TimeRemainingColumn(),
    )
    with Progress(*columns, console=err) as progress:
        yield TrainingBar(progress, progress.add_task(title, total=None, spent=""), target_epsilon)
