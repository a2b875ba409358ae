"""Callbacks: who is told what while a run goes on.

Guarantee: :meth:`Callback.on_begin`, :meth:`Callback.on_step` and :meth:`Callback.on_metrics` carry public settings,
released values and numbers that the caller declared public, and nothing else; no wall-clock time is among them, because
the time of a step grows with the private size of its batch. What depends on the data without noise comes only through
:meth:`Callback.on_nonprivate`, and only to a callback whose ``nonprivate`` is True.

The engine calls them in the order in which they were given, on the thread of the loop. An error in a callback ends the
step that it came from; by then the step is charged and released.
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from contextlib import suppress
from typing import NamedTuple, Protocol, TextIO

from dpkit.errors import RunFolderError
from dpkit.run_folder import RunFolder

Setting = str | int | float | bool | None


class StepRecord(NamedTuple):
    """Where a run stands; all of it is public.

    Attributes:
      step: logical steps behind the parameters as they are now.
      charged: steps that the ledger has charged for this plan: more than ``step`` when steps were redone after a crash.
      planned: the plan's number of steps; the ledger charges no more than these.
      epsilon: upper bound at ``charged`` steps, rounded up; of this run alone. What a data set has spent over several
        runs, the statement of its ledger says.
      delta: at which ``epsilon`` holds.
      learning_rate: of the optimizer's first parameter group.
    """

    step: int
    charged: int
    planned: int
    epsilon: float
    delta: float
    learning_rate: float | None


class Callback(Protocol):
    """What a run tells while it goes on. Inherit from it and define what you need; the rest does nothing."""

    nonprivate: bool = False
    """Whether :meth:`on_nonprivate` is called. Only for eyes that may see the data."""

    def on_begin(self, settings: Mapping[str, Setting]) -> None:
        """The engine was attached; ``settings`` are those of the plan."""

    def on_step(self, record: StepRecord) -> None:
        """A logical step was charged and released."""

    def on_metrics(self, record: StepRecord, metrics: Mapping[str, float]) -> None:
        """The loop declared ``metrics`` public or released: ``engine.log(test_accuracy=...)``."""

    def on_nonprivate(self, record: StepRecord, values: Mapping[str, float]) -> None:
        """NOT PRIVATE: counts of the last batch, and what the loop gave to ``engine.log_nonprivate``."""

    def on_end(self) -> None:
        """The engine was detached; called once, and not when the process is killed."""


class MetricsFile(Callback):
    """Writes ``metrics.jsonl`` into the run folder, one JSON object a line, and ``nonprivate/steps.jsonl`` on request.

    A resumed run goes on in the same files; ``charged`` never goes back there, ``step`` may.

    Args:
      run_dir: the run folder.
      nonprivate: also write what is not private, under ``nonprivate/``.
    """

    def __init__(self, run_dir: RunFolder, *, nonprivate: bool = False) -> None:
        self.nonprivate = nonprivate
        self._folder = run_dir
        self._files: dict[bool, TextIO] = {}

    def on_step(self, record: StepRecord) -> None:
        self._write(record._asdict())

    def on_metrics(self, record: StepRecord, metrics: Mapping[str, float]) -> None:
        self._write(record._asdict() | {"metrics": dict(metrics)})

    def on_nonprivate(self, record: StepRecord, values: Mapping[str, float]) -> None:
        self._write({"step": record.step, "charged": record.charged, **values}, nonprivate=True)

    def on_end(self) -> None:
        files, self._files = self._files, {}
        for file in files.values():
            with suppress(OSError):  # a line that a full disk did not take; what was written is there
                file.close()

    def _write(self, line: Mapping[str, object], *, nonprivate: bool = False) -> None:
        if nonprivate not in self._files:
            names = ("nonprivate", "steps.jsonl") if nonprivate else ("metrics.jsonl",)
            self._files[nonprivate] = self._folder.append(*names)
        try:
            self._files[nonprivate].write(json.dumps(_finite(line), allow_nan=False) + "\n")
        except OSError as error:
            raise RunFolderError(
                f"{self._folder.path}: the log of the run cannot be written ({error.strerror}). Free the disk."
            ) from None


def _finite(value: object) -> object:
    """``value`` with what JSON has no word for (an infinite loss) as null."""
    if isinstance(value, Mapping):
        return {name: _finite(item) for name, item in value.items()}
    return None if isinstance(value, float) and not math.isfinite(value) else value
