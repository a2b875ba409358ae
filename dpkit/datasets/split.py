"""What a loader gives to training: arrays with a fixed split, and who belongs to which group."""

from __future__ import annotations

from dataclasses import dataclass, field

import numpy as np
from numpy.typing import NDArray


@dataclass(frozen=True)
class SensitiveAttribute:
    """One group per example, as an index into ``values``.

    Attributes:
      values: names of the groups, from the published description; a group may be empty.
      train, test: int64 (N,), in the order of the examples.
    """

    values: tuple[str, ...]
    train: NDArray[np.int64]
    test: NDArray[np.int64]


@dataclass(frozen=True)
class Split:
    """A data set, cut into training and test part once and for all.

    Attributes:
      train_x, test_x: images float32 (N, height, width) in [0, 1]; tables float32 (N, columns) in [0, 1]; texts int64
        (N, length) of token ids, 0 is padding.
      train_y, test_y: int64 (N,), below ``classes``.
      sensitive: attribute -> groups, where the set has any.
      columns: names of the columns of a table.
    """

    train_x: NDArray[np.float32] | NDArray[np.int64]
    train_y: NDArray[np.int64]
    test_x: NDArray[np.float32] | NDArray[np.int64]
    test_y: NDArray[np.int64]
    classes: int
    sensitive: dict[str, SensitiveAttribute] = field(default_factory=dict)
    columns: tuple[str, ...] = ()
