"""Images with grey values in [0, 1]: scikit-learn's digits, MNIST and Fashion-MNIST.

Grey values are divided by the largest one that the format has (16, 255): a constant, never a statistic of the data, so
an image depends on its own record alone. ``digits`` has no published split: every fifth image, from the first on, is a
test image (360), the others are for training (1,437).
"""

from __future__ import annotations

import math
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from dpkit.errors import DataError

from .catalogue import File, describe
from .files import read
from .split import Split


def digits(_: Path | None) -> Split:
    """scikit-learn's digits, (N, 8, 8); needs no data folder.

    Raises:
      DataError: scikit-learn is not installed.
    """
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
    return Split(images[~test], labels[~test], images[test], labels[test], classes=10)


def mnist(data_dir: Path | None) -> Split:
    """MNIST, (N, 28, 28), from the four IDX files of LeCun, Cortes and Burges.

    Raises:
      DataError: a file is missing or is not the published one.
    """
    return _four_files("mnist", data_dir)


def fashion(data_dir: Path | None) -> Split:
    """Fashion-MNIST, (N, 28, 28), from the four IDX files of Xiao, Rasul and Vollgraf.

    Raises:
      DataError: a file is missing or is not the published one.
    """
    return _four_files("fashion", data_dir)


def _four_files(name: str, data_dir: Path | None) -> Split:
    train_x, train_y, test_x, test_y = (_idx(file, data_dir) for file in describe(name).files)
    return Split(
        train_x=_grey(train_x),
        train_y=train_y.astype(np.int64),
        test_x=_grey(test_x),
        test_y=test_y.astype(np.int64),
        classes=10,
    )


def _grey(images: NDArray[np.uint8]) -> NDArray[np.float32]:
    return (images / np.float32(255)).astype(np.float32)


def _idx(file: File, data_dir: Path | None) -> NDArray[np.uint8]:
    """An IDX file of bytes: 0, 0, 8 (unsigned bytes), number of axes; 4 bytes per axis, big endian; then the values."""
    content = read(file, data_dir)
    axes = content[3] if len(content) >= 4 else 0
    header = 4 + 4 * axes
    shape = tuple(int(size) for size in np.frombuffer(content[4:header], dtype=">u4"))
    if content[:3] != b"\0\0\x08" or len(content) != header + math.prod(shape):
        raise DataError(f"{file.name} is no IDX file of bytes; get it again.")
    return np.frombuffer(content, dtype=np.uint8, offset=header).reshape(shape)
