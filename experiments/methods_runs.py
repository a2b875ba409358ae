"""The finished runs of ``python -m experiments methods``: one JSON line each, appended and never rewritten.

Guarantee: a line is on the disk before the next run begins, and what is in the file is what was measured: a run that
was killed has no line, and a line that was cut off does not count, so both are run again. A run is known by everything
that went into it (``RunConfig``): where a setting changes, the old lines no longer count and stay.
"""

from __future__ import annotations

import os
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path

import pydantic

from dpkit.errors import DataError

TUNING_EPSILON = 3.0
TUNING_SEED = 100
"""Not among the seeds that the table is made of, which begin at 0."""


@dataclass(frozen=True)
class RunConfig:
    """Everything that went into a run, except for chance.

    Attributes:
      settings: the objects that make the method, in words.
      epsilon: target; None without privacy.
      learning_rate: as the optimizer got it, the method's factor included.
      seed: of the initial weights (without privacy: of the order of the examples, too). Sampling and noise of a private
        run have no seed.
      passes: over the data.
    """

    dataset: str
    method: str
    settings: str
    epsilon: float | None
    learning_rate: float
    seed: int
    batch_size: int
    passes: int
    max_grad_norm: float
    delta: float


@dataclass(frozen=True)
class Result:
    """What a run gave.

    Attributes:
      test_accuracy: on the public test part, once, at the end.
      epsilon_spent: by the ledger; None without privacy.
      core_seconds: processor time of all threads, setting up and testing included.
      machine, torch, date: where, with what and when it ran.
    """

    config: RunConfig
    test_accuracy: float
    epsilon_spent: float | None
    steps: int
    core_seconds: float
    machine: str
    torch: str
    date: str


Results = Mapping[RunConfig, Result]

_RESULT = pydantic.TypeAdapter(Result)


def read(path: Path) -> dict[RunConfig, Result]:
    """The runs in ``path``, none where there is no file; of equal ones the first.

    Raises:
      DataError: the file cannot be read, or a line is JSON and no result.
    """
    found: dict[RunConfig, Result] = {}
    try:
        text = path.read_text(encoding="utf-8", errors="replace") if path.exists() else ""
    except OSError as error:
        raise DataError(f"{path} cannot be read ({error.strerror or error}); give another folder with --out.") from None
    for number, line in enumerate(text.split("\n"), 1):
        try:
            result = _RESULT.validate_json(line)
        except pydantic.ValidationError as error:
            if error.errors()[0]["type"] == "json_invalid":
                continue  # empty, or cut off by a kill: that run is missing and is run again
            raise DataError(
                f"line {number} of {path} is not the result of a run ({error.errors()[0]['msg']}); remove it, or give "
                "another folder with --out."
            ) from None
        found.setdefault(result.config, result)
    return found


def append(path: Path, result: Result) -> str:
    """Write ``result`` at the end of ``path``, durably; returns its line."""
    line = _RESULT.dump_json(result).decode()
    with path.open("a+b") as file:
        if file.tell() > 0:
            file.seek(-1, os.SEEK_END)
            if file.read(1) != b"\n":  # the line of a killed run stays what it is: not a line
                file.write(b"\n")
        file.write(f"{line}\n".encode())
        file.flush()
        os.fsync(file.fileno())
    return line


def rates_in(results: Results, tuning: Iterable[RunConfig]) -> dict[float, float]:
    """Learning rate -> test accuracy of those of the ``tuning`` runs that are there, smallest rate first."""
    found = {config.learning_rate: results[config].test_accuracy for config in tuning if config in results}
    return dict(sorted(found.items()))


def best_rate(results: Results, tuning: Iterable[RunConfig]) -> float | None:
    """The rate with the largest accuracy among the tuning runs, the smallest such; None while one is missing."""
    tuning = list(tuning)
    rates = rates_in(results, tuning)
    return max(rates, key=lambda rate: rates[rate]) if len(rates) == len({c.learning_rate for c in tuning}) else None


def as_words(config: RunConfig) -> str:
    """A run in a few words, for messages."""
    privacy = "without privacy" if config.epsilon is None else f"epsilon {config.epsilon:g}"
    return f"{config.dataset}, {config.method}, {privacy}, rate {config.learning_rate:g}, seed {config.seed}"
