"""Images from IDX files."""

from __future__ import annotations

import struct

import numpy as np
import pytest

from dpkit.datasets import load
from dpkit.errors import DataError

from .conftest import Publish

PIXELS = (np.arange(3 * 4 * 5) * 4 % 256).astype(np.uint8).reshape(3, 4, 5)


def idx(values: np.ndarray) -> bytes:
    return struct.pack(f">BBBB{values.ndim}I", 0, 0, 8, values.ndim, *values.shape) + values.tobytes()


def files(pixels: np.ndarray = PIXELS) -> list[bytes]:
    labels = np.array([7, 0, 9], dtype=np.uint8)
    return [idx(pixels), idx(labels), idx(pixels[:2]), idx(labels[:2])]


@pytest.mark.parametrize("name", ["mnist", "fashion"])
def test_the_four_files_become_grey_values_and_labels(publish: Publish, name: str):
    split = load(name, publish(name, *files()))
    assert split.train_x.dtype == np.float32
    assert split.train_x.shape == (3, 4, 5)
    assert split.train_x[1, 2, 3] == np.float32(PIXELS[1, 2, 3] / 255)
    assert split.train_y.tolist() == [7, 0, 9]
    assert split.test_y.tolist() == [7, 0]
    assert (len(split.test_x), split.classes) == (2, 10)


def test_another_image_changes_no_other_image(publish: Publish):
    before = load("mnist", publish("mnist", *files())).train_x
    pixels = PIXELS.copy()
    pixels[1] = 255 - pixels[1]
    after = load("mnist", publish("mnist", *files(pixels))).train_x
    assert (before[[0, 2]] == after[[0, 2]]).all()
    assert (before[1] != after[1]).any()


DAMAGED = {
    "empty": b"",
    "two bytes": b"\0\0",
    "numbers that are no bytes": b"\0\0\x0d\1" + bytes(8),
    "one value too few": idx(PIXELS)[:-1],
    "one value too many": idx(PIXELS) + b"x",
    "half a header": b"\0\0\x08\x03\0\0\0\1",
}


@pytest.mark.parametrize("damaged", DAMAGED.values(), ids=DAMAGED)
def test_what_is_no_idx_file_is_refused(publish: Publish, damaged: bytes):
    with pytest.raises(DataError, match="train-images-idx3-ubyte is no IDX file"):
        load("mnist", publish("mnist", damaged, *files()[1:]))


def test_digits_is_one_fixed_split():
    pytest.importorskip("sklearn", reason="the data set digits comes with scikit-learn (extra `demo`)")
    split = load("digits")
    assert (len(split.train_x), len(split.test_x)) == (1437, 360)
    assert split.train_x.shape[1:] == split.test_x.shape[1:] == (8, 8)
    assert (float(split.train_x.min()), float(split.train_x.max())) == (0.0, 1.0)
    assert set(split.test_y.tolist()) == set(range(10))


@pytest.mark.parametrize("name", ["e2e", "celeba"])
def test_a_set_without_arrays_is_refused_by_name(name: str):
    with pytest.raises(DataError, match=f"no arrays of a data set '{name}'"):
        load(name)
