"""TensorBoard: the public numbers of a run as event files; what is not private on request, and apart.

Guarantees:
  * ``RUN/tensorboard/`` holds what :mod:`dpkit.callbacks` calls public: steps, epsilon, learning rate and the metrics
    that the loop declared so. With ``nonprivate=True`` the rest goes to ``RUN/nonprivate/tensorboard/``, under tags
    that begin with ``nonprivate/``, and nowhere else.
  * No clock: the wall time of every event is the number of charges, as if each took one second, because the time of a
    step grows with the private size of its batch. For the same reason the files are named after charges, and their
    writer is not TensorBoard's own, which stamps a file with the time, the host and the process.
  * Epsilon is never rounded down, although TensorBoard keeps numbers with seven digits.

Not promised: anything about TensorBoard itself, or that times of modification, which the file system keeps, are hidden.
"""

from __future__ import annotations

import importlib.util
import math
import os
import struct
from collections.abc import Mapping
from typing import BinaryIO

from dpkit.callbacks import Callback, Setting, StepRecord
from dpkit.errors import ConfigError
from dpkit.run_folder import RunFolder

_MEANING = ("unit", "relation", "sampler", "num_examples")


class TensorBoard(Callback):
    """Writes event files; look at them with ``tensorboard --logdir RUN/tensorboard``.

    Tags: ``privacy/epsilon`` (its description says delta, unit, relation and sampler), ``privacy/charged``,
    ``learning_rate``, and the metrics under their own names. The step is the logical step; a run that was resumed shows
    redone steps a second time.

    Args:
      run_dir: the run folder.
      nonprivate: also write what is NOT PRIVATE, under ``RUN/nonprivate/tensorboard/``.
    Raises:
      ConfigError: TensorBoard is not installed.
      RunFolderError: the folder cannot be used.
    """

    def __init__(self, run_dir: RunFolder | str | os.PathLike[str], *, nonprivate: bool = False) -> None:
        _require_extra()
        self.nonprivate = nonprivate
        self._folder = run_dir if isinstance(run_dir, RunFolder) else RunFolder(run_dir)
        self._files: dict[bool, BinaryIO] = {}
        self._settings: dict[str, Setting] = {}

    def on_begin(self, settings: Mapping[str, Setting]) -> None:
        self._settings = dict(settings)

    def on_step(self, record: StepRecord) -> None:
        values: dict[str, float] = {"privacy/epsilon": _float32_up(record.epsilon), "privacy/charged": record.charged}
        if record.learning_rate is not None:
            values["learning_rate"] = record.learning_rate
        self._write(record, values)

    def on_metrics(self, record: StepRecord, metrics: Mapping[str, float]) -> None:
        self._write(record, metrics)

    def on_nonprivate(self, record: StepRecord, values: Mapping[str, float]) -> None:
        if self.nonprivate:
            self._write(record, {f"nonprivate/{name}": value for name, value in values.items()}, nonprivate=True)

    def on_end(self) -> None:
        for file in self._files.values():
            file.close()
        self._files = {}

    def _write(self, record: StepRecord, values: Mapping[str, float], *, nonprivate: bool = False) -> None:
        # These modules are made when they are imported, so type checkers do not see into them.
        from tensorboard.compat.proto.event_pb2 import Event  # pyright: ignore[reportAttributeAccessIssue]
        from tensorboard.compat.proto.summary_pb2 import (
            Summary,  # pyright: ignore[reportAttributeAccessIssue]
            SummaryMetadata,  # pyright: ignore[reportAttributeAccessIssue]
        )
        from tensorboard.summary.writer.record_writer import RecordWriter

        if nonprivate not in self._files:
            # A file for every time that the run goes on: the end of an older one may be cut off.
            name = f"events.out.tfevents.{record.charged:010d}.dpkit"
            names = ("nonprivate", "tensorboard", name) if nonprivate else ("tensorboard", name)
            self._files[nonprivate] = self._folder.append_bytes(*names)
        file = self._files[nonprivate]
        writer = RecordWriter(file)
        if file.tell() == 0:
            writer.write(Event(wall_time=0.0, file_version="brain.Event:2").SerializeToString())
        meaning = SummaryMetadata(summary_description=self._meaning(record))
        summary = Summary(
            value=[
                Summary.Value(tag=tag, simple_value=value, metadata=meaning if tag == "privacy/epsilon" else None)
                for tag, value in values.items()
            ]
        )
        event = Event(wall_time=float(record.charged), step=record.step, summary=summary)
        writer.write(event.SerializeToString())
        writer.flush()

    def _meaning(self, record: StepRecord) -> str:
        rest = "; ".join(f"{name}: {self._settings[name]}" for name in _MEANING if name in self._settings)
        return f"epsilon, an upper bound at all charged steps, at delta = {record.delta!r}; {rest}"


def _float32_up(value: float) -> float:
    """The least number in single precision that is not below ``value``, which is at least zero."""
    if value > 3.4028234663852886e38 or math.isnan(value):
        return math.inf
    [bits] = struct.unpack("<I", struct.pack("<f", value))
    [rounded] = struct.unpack("<f", struct.pack("<I", bits))
    if rounded < value:
        [rounded] = struct.unpack("<f", struct.pack("<I", bits + 1))
    return rounded


def _require_extra() -> None:
    if importlib.util.find_spec("tensorboard") is None:
        raise ConfigError(
            "logging to TensorBoard takes the package tensorboard, which is not installed: pip install 'dpkit[log]'. "
            "The run folder's metrics.jsonl has the same numbers."
        )
