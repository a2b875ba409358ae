"""Texts: SST-2 as token ids, E2E and Shakespeare as strings.

The token id of a word is a hash of the word, never its place in a vocabulary that was counted on private text: whether
one person used a word must not show in anybody else's ids. So different words may share an id.
"""

from __future__ import annotations

import csv
import io
import json
from dataclasses import dataclass
from functools import lru_cache
from hashlib import blake2b
from pathlib import Path
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from dpkit.errors import DataError

from .catalogue import File, describe
from .files import lines, read
from .split import Split

SST2_TOKEN_IDS = 32768
"""Different token ids of SST-2, 0 (padding) included."""
SST2_LENGTH = 56
"""Words of a sentence that are kept."""


def sst2(data_dir: Path | None) -> Split:
    """SST-2: is a sentence (or a part of one) positive? int64 (N, SST2_LENGTH); test set: the dev set of GLUE.

    Raises:
      DataError: a file is missing or is not the published one.
    """
    train, test = (_sentences(file, data_dir) for file in describe("sst2").files)
    return Split(*train, *test, classes=2)


def _sentences(file: File, data_dir: Path | None) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    """(token ids, labels) of a table with a header, tabs between the columns and no quoting."""
    _, *rows = lines(read(file, data_dir))
    ids = np.zeros((len(rows), SST2_LENGTH), dtype=np.int64)
    labels = np.zeros(len(rows), dtype=np.int64)
    for place, (number, line) in enumerate(rows):
        sentence, tab, label = line.rstrip("\r").rpartition("\t")
        if not tab or label not in {"0", "1"}:
            raise DataError(f"{file.name}: line {number} is not a sentence, a tab and 0 or 1; get the file again.")
        labels[place] = int(label)
        tokens = [token_id(word, SST2_TOKEN_IDS) for word in sentence.split()[:SST2_LENGTH]]
        ids[place, : len(tokens)] = tokens
    return ids, labels


@lru_cache(maxsize=2**16)
def token_id(word: str, ids: int) -> int:
    """A number from 1 to ``ids`` - 1 that depends on ``word`` alone, the same on every machine."""
    return 1 + int.from_bytes(blake2b(word.encode("utf-8"), digest_size=8).digest()) % (ids - 1)


class Pair(NamedTuple):
    """A meaning representation, e.g. "name[Aromi], eatType[pub]", and a sentence that says it."""

    meaning: str
    reference: str


@dataclass(frozen=True)
class E2E:
    """The three parts of E2E NLG; a meaning representation occurs once for each of its references."""

    train: tuple[Pair, ...]
    dev: tuple[Pair, ...]
    test: tuple[Pair, ...]


def load_e2e(data_dir: Path | None = None) -> E2E:
    """E2E NLG. The training part was rebuilt from a tokenised copy: meanings are exact, references up to white space.

    Args:
      data_dir: folder of the files; left out, the environment variable DPKIT_DATA.
    Raises:
      DataError: a file is missing or is not the published one.
    """
    return E2E(*(_pairs(file, data_dir) for file in describe("e2e").files))


def _pairs(file: File, data_dir: Path | None) -> tuple[Pair, ...]:
    header, *rows = csv.reader(io.StringIO(read(file, data_dir).decode("utf-8-sig"), newline=""))
    if header[:2] != ["mr", "ref"]:
        raise DataError(f"{file.name}: the header does not begin with mr, ref; get the file again.")
    return tuple(Pair(row[0], row[1]) for row in rows)


def load_shakespeare(data_dir: Path | None = None) -> dict[str, list[str]]:
    """Speaker ("play|ROLE") -> speeches in the order of the play; 1,336 speakers, one unit of privacy each.

    Args:
      data_dir: folder of the file; left out, the environment variable DPKIT_DATA.
    Raises:
      DataError: the file is missing or is not the one that the catalogue describes.
    """
    [file] = describe("shakespeare").files
    speeches: dict[str, list[str]] = {}
    for _, line in lines(read(file, data_dir)):
        record = json.loads(line)
        speeches.setdefault(record["user"], []).append(record["text"])
    return speeches
