"""Score files: what is read is what stands in them, and everything doubtful is refused with its place."""

from __future__ import annotations

import io
import math

import numpy as np
import pytest

from dpkit.audit.score_files import FEWEST, read_scores
from dpkit.errors import DataError

NUMBERS = [0.5, -1.25, 3.0, 1e-7, -2e10] * 12


@pytest.fixture
def written(tmp_path):
    def write(name, content):
        path = tmp_path / name
        path.write_bytes(content if isinstance(content, bytes) else content.encode())
        return path

    return write


def text(numbers, head="", end="\n"):
    return head + end.join(str(number) for number in numbers) + end


@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("a.txt", text(NUMBERS)),
        ("a.csv", text(NUMBERS, head="score\n")),
        ("a.CSV", text(NUMBERS, head="﻿")),
        ("a.csv", text(NUMBERS, end="\r\n")),
        ("a.txt", text(NUMBERS) + "\n\n"),
        ("a.txt", text([f"  {number}\t" for number in NUMBERS])),
        ("a.txt", text(NUMBERS).rstrip()),
    ],
    ids=["plain", "name first", "byte order mark", "Windows", "blank end", "blanks around", "no last line break"],
)
def test_one_number_a_line(written, name, content):
    assert read_scores(written(name, content)).tolist() == NUMBERS


@pytest.mark.parametrize("dtype", [np.float64, np.float32, np.float16, np.int64, np.uint8])
def test_a_numpy_array(tmp_path, dtype):
    numbers = np.arange(60).astype(dtype)
    np.save(tmp_path / "a.npy", numbers)
    found = read_scores(tmp_path / "a.npy")
    assert found.dtype == np.float64
    assert found.tolist() == numbers.tolist()


@pytest.mark.parametrize(
    ("name", "content", "named"),
    [
        ("a.txt", text([*NUMBERS, math.nan]), "line 61: nan is no finite number"),
        ("a.csv", text([*NUMBERS[:3], "inf", *NUMBERS], head="score\n"), "line 5: inf is no finite number"),
        ("a.txt", text([*NUMBERS, "1e999"]), "line 61: inf is no finite number"),
        ("a.txt", text([*NUMBERS, "abc"]), "line 61: 'abc' is no number"),
        ("a.txt", text([*NUMBERS, "1_000"]), "line 61: '1_000' is no number"),
        ("a.txt", text([*NUMBERS, "0x1p3"]), "line 61: '0x1p3' is no number"),
        ("a.txt", text([*NUMBERS, "True"]), "line 61: 'True' is no number"),
        ("a.txt", text([*NUMBERS, "x" * 200]), "line 61: 'x"),
        ("a.csv", text(["0.5,1"] * 60), "line 1: '0.5,1' has 2 columns"),
        ("a.csv", text(["0.5 1 2"] * 60), "line 1: '0.5 1 2' has 3 columns"),
        ("a.csv", text(["0.5\t1"] * 60), "2 columns"),
        ("a.csv", text(NUMBERS, head="in,out\n"), "line 1: 'in,out' has 2 columns"),
        ("a.txt", text(NUMBERS, head="score\nscore\n"), "line 2: 'score' is no number"),
        ("a.txt", text([*NUMBERS, "", 1.0]), "line 61: it is empty"),
        ("a.txt", text(NUMBERS, head="\n"), "line 1: it is empty"),
        ("a.txt", text(NUMBERS[:49]), f"holds 49 scores; with fewer than {FEWEST}"),
        ("a.txt", "", "holds 0 scores"),
        ("a.txt", "score\n", "holds 0 scores"),
        ("a.txt", b"\xff\xfe\x00", "UTF-8"),
        ("a.json", "[1, 2]", "ends in .json"),
        ("a", "1", "ends in nothing"),
        ("a.npy", "no array", "no NumPy array"),
        ("a.npy", "", "no NumPy array"),
    ],
)
def test_what_is_no_score_file_is_refused_with_its_place(written, name, content, named):
    path = written(name, content)
    with pytest.raises(DataError) as error:
        read_scores(path)
    assert named in str(error.value)
    assert str(path) in str(error.value)
    assert len(str(error.value)) < 400 + len(str(path))


@pytest.mark.parametrize(
    ("array", "named"),
    [
        (np.zeros((60, 2)), "shape (60, 2)"),
        (np.array(1.0), "shape ()"),
        (np.zeros(60, dtype=complex), "complex128"),
        (np.zeros(60, dtype=bool), "bool"),
        (np.array(["1"] * 60), "<U1"),
        (np.zeros(49), "49 scores"),
        (np.append(np.zeros(70), np.nan), "entry 70: nan"),
    ],
    ids=str,
)
def test_arrays_that_are_no_scores_are_refused(tmp_path, array, named):
    np.save(tmp_path / "a.npy", array)
    with pytest.raises(DataError) as error:
        read_scores(tmp_path / "a.npy")
    assert named in str(error.value)


def test_an_array_of_objects_is_refused_and_never_unpickled(tmp_path):
    ran = []

    class Loud:
        def __reduce__(self):
            return (print, ("this must not be printed",))

    np.save(tmp_path / "a.npy", np.array([Loud()] * 60, dtype=object), allow_pickle=True)
    with pytest.raises(DataError, match="no NumPy array"):
        read_scores(tmp_path / "a.npy")
    assert ran == []


def header(**changes):
    """A NumPy file of 60 zeros with another header."""
    whole = io.BytesIO()
    fields = {"descr": "<f8", "fortran_order": False, "shape": (60,)} | changes
    np.lib.format.write_array_header_1_0(whole, fields)
    return whole.getvalue() + bytes(60 * 8)


def test_the_header_of_these_tests_is_one(written):
    assert read_scores(written("a.npy", header())).tolist() == [0.0] * 60


@pytest.mark.parametrize(
    "content",
    [
        header(shape=(6 * 10**12,)),
        header(shape=(2**70,)),
        header(shape=(-1,)),
        header(descr="<f800"),
        header().replace(b"}", b" "),
        header().replace(b"'shape'", b"__name"),
        header()[:100],
        header()[:4],
        header()[:-8],
        b"\x93NUMPY\xff\xff" + header()[8:],
    ],
    ids=[
        "too long",
        "no index",
        "negative",
        "no number",
        "open brace",
        "no literal",
        "half",
        "start",
        "short",
        "version",
    ],
)
def test_a_damaged_array_is_refused(written, content):
    """A header that promises more than the file holds, too: before anything of that size is allocated."""
    with pytest.raises(DataError, match="no NumPy array"):
        read_scores(written("a.npy", content))


def test_an_archive_of_arrays_is_refused(tmp_path):
    np.savez(tmp_path / "a.npz", np.zeros(60))
    (tmp_path / "a.npz").rename(tmp_path / "a.npy")
    with pytest.raises(DataError):
        read_scores(tmp_path / "a.npy")


def test_a_missing_file_is_named(tmp_path):
    for path in (tmp_path / "none.npy", tmp_path):
        with pytest.raises(DataError, match="is no file"):
            read_scores(path)
