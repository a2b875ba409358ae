"""A progress bar that shows epsilon being spent. It shows public and released numbers only."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager

from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

from accounting import round_up, round_up_text

from .terminal import err


@contextmanager
def training_bar(
    title: str, target_epsilon: float | None, delta: float | None
) -> Iterator[Callable[[int, int, float | None], None]]:
    """A bar on stderr, moved by calling what this yields with (steps, planned steps, epsilon or None)."""
    columns = (
        TextColumn("{task.description}", markup=False),
        BarColumn(),
        MofNCompleteColumn(),
        TextColumn("steps {task.fields[spent]}", markup=False),
        TimeRemainingColumn(),
    )
    with Progress(*columns, console=err) as progress:
        task = progress.add_task(title, total=None, spent="")

        def moved(steps: int, planned: int, epsilon: float | None) -> None:
            spent = ""
            if epsilon is not None and delta is not None:
                limit = "" if target_epsilon is None else f" of {target_epsilon}"
                spent = f"epsilon {round_up(epsilon, 3):.3f}{limit} (delta {round_up_text(delta)})"
            progress.update(task, completed=steps, total=planned, spent=spent)

        yield moved
