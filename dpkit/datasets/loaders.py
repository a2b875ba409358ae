"""The data sets that the trainer takes, by name."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

from dpkit.errors import DataError

from .images import digits, fashion, mnist
from .split import Split
from .tabular import adult, compas, dutch
from .text import sst2

LOADERS: dict[str, Callable[[Path | None], Split]] = {
    "digits": digits,
    "mnist": mnist,
    "fashion": fashion,
    "adult": adult,
    "dutch": dutch,
    "compas": compas,
    "sst2": sst2,
}


def load(name: str, data_dir: Path | None = None) -> Split:
    """The data set ``name``, as arrays.

    Args:
      data_dir: folder of the files; left out, the environment variable DPKIT_DATA.
    Raises:
      DataError: there is no such data set, a file is missing, or one is not what it should be.
    """
    if name not in LOADERS:
        raise DataError(f"there are no arrays of a data set {name!r}; those that there are: {', '.join(LOADERS)}.")
    return LOADERS[name](data_dir)
