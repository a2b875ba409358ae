"""Score files: one number for each canary, as text (``.csv``, ``.txt``) or as a NumPy array (``.npy``).

Guarantee: what is returned are the numbers of the file in its order, at least ``FEWEST``, all finite, none left out.
Everything else is refused with file, line and rule. Nothing in a file is ever run: an array of objects is refused.

A text file is UTF-8 with one number a line, with a decimal point; its first line may be a name.
"""

from __future__ import annotations

import re
from pathlib import Path

import numpy as np

from dpkit.errors import DataError

from .thresholds import Vector

FEWEST = 50
"""Scores of a file. Fewer bound an error rate by 0.06 at best, which says next to nothing about epsilon."""

_TEXT, _ARRAY = (".csv", ".txt"), ".npy"
_NUMBER = re.compile(r"[+-]?(\d+\.?\d*|\.\d+)([eE][+-]?\d+)?|[+-]?(nan|inf|infinity)", re.ASCII | re.IGNORECASE)
_COLUMNS = re.compile(r"[,;\t]| +")


def read_scores(path: str | Path) -> Vector:
    """The scores in the file ``path``.

    Raises:
      DataError: there is no such file, or it is no score file as the module says.
    """
    path = Path(path)
    if not path.is_file():
        raise DataError(f"{path} is no file; give a score file ({', '.join((*_TEXT, _ARRAY))}).")
    match path.suffix.lower():
        case ".npy":
            scores = _from_array(path)
            places = "entry", 0
        case suffix if suffix in _TEXT:
            scores, first_line = _from_text(path)
            places = "line", first_line
        case suffix:
            raise DataError(
                f"{path}: the name ends in {suffix or 'nothing'}; score files are {', '.join((*_TEXT, _ARRAY))}. "
                "Save one number a line, or a flat NumPy array."
            )
    if len(scores) < FEWEST:
        raise DataError(
            f"{path} holds {len(scores)} scores; with fewer than {FEWEST} no audit says anything. Use more canaries, "
            "or more runs."
        )
    if not np.all(finite := np.isfinite(scores)):
        place = int(np.argmin(finite))
        raise DataError(
            f"{path}, {places[0]} {place + places[1]}: {scores[place]} is no finite number. Leaving such scores out "
            "would change what is audited; find out where they come from."
        )
    return scores


def _from_array(path: Path) -> Vector:
    try:
        # Memory-mapped: a header that promises more than the file holds is seen before anything is allocated.
        found = np.load(path, mmap_mode="r", allow_pickle=False)
    except Exception as error:  # a damaged header raises whatever NumPy's parser and the operating system raise
        raise DataError(f"{path} is no NumPy array of numbers ({error}). Save one with numpy.save.") from None
    if not isinstance(found, np.ndarray) or found.ndim != 1:
        shape = found.shape if isinstance(found, np.ndarray) else "of an archive"
        raise DataError(f"{path} has the shape {shape}; scores are a flat array, one number for each canary.")
    if found.dtype.kind not in "fiu":
        raise DataError(f"{path} holds {found.dtype}; scores are real numbers. Convert them before saving.")
    return np.array(found, dtype=np.float64)


def _from_text(path: Path) -> tuple[Vector, int]:
    """The numbers, and the line, counted from 1, on which the first of them stands."""
    try:
        lines = path.read_text(encoding="utf-8-sig").splitlines()
    except UnicodeDecodeError:
        raise DataError(f"{path} is no text in UTF-8. Save one number a line, or an array as .npy.") from None
    while lines and not lines[-1].strip():
        lines.pop()
    first = 1
    if lines and not _is_number(lines[0]) and not _COLUMNS.search(lines[0].strip()) and lines[0].strip():
        first = 2  # a name
    scores = []
    for number, line in enumerate(lines[first - 1 :], start=first):
        text = line.strip()
        if not _is_number(text):
            raise DataError(f"{path}, line {number}: {_what_is_wrong(text)}")
        scores.append(float(text))
    return np.array(scores, dtype=np.float64), first


def _is_number(text: str) -> bool:
    return _NUMBER.fullmatch(text.strip()) is not None


def _what_is_wrong(text: str) -> str:
    shown = repr(text if len(text) <= 40 else text[:37] + "...")
    if not text:
        return "it is empty; one number stands on each line."
    columns = len(_COLUMNS.split(text))
    if columns > 1:
        return (
            f"{shown} has {columns} columns; one number stands on each line, with a decimal point. Save the scores of "
            "members and of others in two files."
        )
    return f"{shown} is no number; one number stands on each line."
