"""The logs of a run, line by line: one JSON object each, checked before a number of them is shown.

A line that is damaged is refused by its number. The one exception is a last line without a line break: a process that
was killed while it wrote leaves such a piece, and it is left out.
"""

from __future__ import annotations

import json
import math
from typing import Any, NamedTuple

from dpkit.errors import RunFolderError
from dpkit.run_folder import RunFolder


class MetricsRecord(NamedTuple):
    """One line of ``metrics.jsonl``; see :class:`dpkit.callbacks.StepRecord`. Metrics may be infinite or NaN."""

    step: int
    charged: int
    planned: int
    epsilon: float
    delta: float
    learning_rate: float | None
    metrics: dict[str, float]


class NonPrivateRecord(NamedTuple):
    """One line of ``nonprivate/steps.jsonl``: counts and losses of one batch, which depend on the data as they are."""

    charged: int
    values: dict[str, float]


def read_metrics(run: RunFolder) -> tuple[list[MetricsRecord], bool]:
    """The records of ``metrics.jsonl``, none if there is no such file, and whether its last line was left out.

    Raises:
      RunFolderError: the file cannot be read, or one of its lines is damaged; the message names the line.
    """
    return _read(run, ("metrics.jsonl",), _metrics)


def read_nonprivate(run: RunFolder) -> tuple[list[NonPrivateRecord], bool]:
    """The records of ``nonprivate/steps.jsonl``, as :func:`read_metrics`."""
    return _read(run, ("nonprivate", "steps.jsonl"), _nonprivate)


def read_object(run: RunFolder, name: str) -> dict[str, Any]:
    """The JSON object in the file ``name``; empty if there is no such file.

    Raises:
      RunFolderError: the file cannot be read, or is no JSON object.
    """
    if not run.exists(name):
        return {}
    try:
        return _object(run.read(name))
    except (ValueError, RecursionError) as error:
        raise RunFolderError(
            f"{run.entry(name)} is damaged: {_reason(error)}. Put the file back as it was written."
        ) from None


def number(found: dict[str, Any], name: str) -> float:
    """``found[name]``, which must be a number; raises ValueError that says so."""
    value = found.get(name)
    if isinstance(value, bool) or not isinstance(value, int | float):
        raise ValueError(f"{name} is {_short(value)} and must be a number")
    try:
        return float(value)
    except OverflowError:
        raise ValueError(f"{name} is beyond every float") from None


def _read(run: RunFolder, names: tuple[str, ...], record_of: Any) -> tuple[list[Any], bool]:
    if not run.exists(*names):
        return [], False
    lines = run.read(*names).split(b"\n")
    records, torn = [], False
    for index, line in enumerate(lines, start=1):
        if not line.strip() and index == len(lines):
            break
        try:
            records.append(record_of(_object(line)))
        except (ValueError, RecursionError) as error:
            if index == len(lines):
                torn = True
                break
            raise RunFolderError(
                f"{run.entry(*names)}, line {index}: {_reason(error)}. Put the line back as it was written, or delete "
                "it: it is a record for people, and no charge is lost with it."
            ) from None
    return records, torn


def _object(content: bytes) -> dict[str, Any]:
    found = json.loads(content.decode("utf-8"))
    if not isinstance(found, dict):
        raise ValueError("it is no JSON object")
    return found


def _metrics(found: dict[str, Any]) -> MetricsRecord:
    step, charged, planned = (_count(found, name) for name in ("step", "charged", "planned"))
    epsilon, delta = number(found, "epsilon"), number(found, "delta")
    if not epsilon >= 0:
        raise ValueError(f"epsilon is {epsilon} and must be 0 or more")
    if not 0 <= delta <= 1:
        raise ValueError(f"delta is {delta} and must be a probability")
    rate = None if found.get("learning_rate") is None else number(found, "learning_rate")
    metrics = found.get("metrics", {})
    if not isinstance(metrics, dict):
        raise ValueError("metrics is no JSON object")
    values = {name: number(metrics, name) for name in metrics}
    return MetricsRecord(step, charged, planned, epsilon, delta, rate, values)


def _nonprivate(found: dict[str, Any]) -> NonPrivateRecord:
    charged = _count(found, "charged" if "charged" in found else "step")
    values = {name: math.nan if found[name] is None else number(found, name) for name in found}
    return NonPrivateRecord(charged, values)


def _count(found: dict[str, Any], name: str) -> int:
    value = found.get(name)
    if isinstance(value, bool) or not isinstance(value, int) or not 0 <= value < 2**53:
        raise ValueError(f"{name} is {_short(value)} and must be a whole number, 0 or more")
    return value


def _short(value: Any) -> str:
    text = "missing" if value is None else repr(value)
    return text if len(text) <= 60 else text[:57] + "..."


def _reason(error: Exception) -> str:
    if isinstance(error, UnicodeDecodeError):
        return "it is not UTF-8 text"
    if isinstance(error, json.JSONDecodeError):
        return f"it is no JSON ({error.msg})"
    return "it is nested too deeply" if isinstance(error, RecursionError) else str(error)
