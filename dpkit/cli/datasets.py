"""Data sets of the command line, as arrays in [0, 1] with a fixed public test set.

``digits`` comes with scikit-learn: 1,797 images of 8x8, every fifth one, from the first on, is a test image (360), the
others are for training (1,437). ``mnist`` is read from the four IDX files in gzip form that the user has; the unpacked
content must be that of the originals of LeCun, Cortes and Burges, byte for byte. Nothing is downloaded.
"""

from __future__ import annotations

import gzip
import hashlib
import math
import os
import zlib
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from dpkit.errors import DataError


@dataclass(frozen=True)
class Split:
    """Images as float32 (N, height, width) in [0, 1] and labels as int64 (N,)."""

    train_x: NDArray[np.float32]
    train_y: NDArray[np.int64]
    test_x: NDArray[np.float32]
    test_y: NDArray[np.int64]
    classes: int = 10


def load(name: str, data_dir: Path | None) -> Split:
    """The data set ``name``.

    Args:
      data_dir: folder of the files; left out, the environment variable DPKIT_DATA.
    Raises:
      DataError: something is missing, or is not what it should be.
    """
    return _LOADERS[name](data_dir)


def _digits(_: Path | None) -> Split:
    try:
        from sklearn.datasets import load_digits
    except ImportError:
        raise DataError(
            "the data set 'digits' comes with scikit-learn, which is not installed: pip install 'dpkit[demo]'."
        ) from None
    rows, targets = load_digits(return_X_y=True)
    images = (np.asarray(rows) / 16).astype(np.float32).reshape(-1, 8, 8)
    labels = np.asarray(targets).astype(np.int64)
    test = np.arange(len(images)) % 5 == 0
    return Split(images[~test], labels[~test], images[test], labels[test])


# Name, shape and SHA-256 of the unpacked original.
_MNIST = {
    "train_x": (
        "train-images-idx3-ubyte",
        (60_000, 28, 28),
        "ba891046e6505d7aadcbbe25680a0738ad16aec93bde7f9b65e87a2fc25776db",
    ),
    "train_y": (
        "train-labels-idx1-ubyte",
        (60_000,),
        "65a50cbbf4e906d70832878ad85ccda5333a97f0f4c3dd2ef09a8a9eef7101c5",
    ),
    "test_x": (
        "t10k-images-idx3-ubyte",
        (10_000, 28, 28),
        "0fa7898d509279e482958e8ce81c8e77db3f2f8254e26661ceb7762c4d494ce7",
    ),
    "test_y": (
        "t10k-labels-idx1-ubyte",
        (10_000,),
        "ff7bcfd416de33731a308c3f266cc351222c34898ecbeaf847f06e48f7ec33f2",
    ),
}


def _mnist(data_dir: Path | None) -> Split:
    folder = _folder(data_dir, "image/mnist")
    arrays = {part: _idx(folder / f"{name}.gz", shape, digest) for part, (name, shape, digest) in _MNIST.items()}
    return Split(
        train_x=(arrays["train_x"] / 255).astype(np.float32),
        train_y=arrays["train_y"].astype(np.int64),
        test_x=(arrays["test_x"] / 255).astype(np.float32),
        test_y=arrays["test_y"].astype(np.int64),
    )


def _folder(data_dir: Path | None, inside: str) -> Path:
    """``inside`` below the data folder where it exists, or else the data folder itself."""
    if data_dir is None:
        if not (variable := os.environ.get("DPKIT_DATA")):
            raise DataError(f"no data folder is known; give --data-dir DIR or set DPKIT_DATA (files in DIR/{inside}).")
        data_dir = Path(variable)
    if not data_dir.is_dir():
        raise DataError(f"the data folder {data_dir} does not exist; give the folder that holds {inside}.")
    return data_dir / inside if (data_dir / inside).is_dir() else data_dir


def _idx(path: Path, shape: tuple[int, ...], digest: str) -> NDArray[np.uint8]:
    """An IDX file of bytes: a header of 4 bytes plus 4 per axis, then the values."""
    header = 4 + 4 * len(shape)
    size = header + math.prod(shape)
    try:
        with gzip.open(path) as file:
            content = file.read(size + 1)  # never more: a wrong file must not fill the memory
    except FileNotFoundError:
        raise DataError(
            f"{path} is missing; put the four MNIST files (IDX, .gz) there, or give another folder."
        ) from None
    except (OSError, EOFError, zlib.error) as error:
        raise DataError(f"{path} cannot be unpacked ({error}); it is damaged, get it again.") from None
    found = hashlib.sha256(content).hexdigest()
    if found != digest:
        raise DataError(
            f"{path} is not the original MNIST file: SHA-256 of its unpacked content is {found[:16]}..., expected "
            f"{digest[:16]}...; get it again."
        )
    return np.frombuffer(content, dtype=np.uint8, offset=header).reshape(shape)


_LOADERS: dict[str, Callable[[Path | None], Split]] = {"digits": _digits, "mnist": _mnist}
