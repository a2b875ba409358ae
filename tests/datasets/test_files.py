"""Files in the data folder: where they are found, and what is refused by name."""

from __future__ import annotations

import gzip
import os
import tracemalloc
from pathlib import Path

import pytest

from dpkit.datasets.catalogue import CATALOGUE, File, describe
from dpkit.datasets.files import find, read
from dpkit.errors import DataError

from .conftest import changed

CONTENT = b"one\ntwo\n"
TABLE = changed(File("tabular/small/table.csv", "", 0), CONTENT)


@pytest.mark.parametrize(
    "place", ["tabular/small/table.csv.gz", "tabular/small/table.csv", "table.csv.gz", "table.csv"]
)
def test_a_file_is_found_packed_or_not_in_its_folder_or_in_the_data_folder(tmp_path: Path, place: str):
    path = tmp_path / place
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(gzip.compress(CONTENT, mtime=0) if place.endswith(".gz") else CONTENT)
    assert find(TABLE, tmp_path) == (TABLE, path)
    assert read(TABLE, tmp_path) == CONTENT


def test_the_environment_variable_names_the_data_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    (tmp_path / "table.csv").write_bytes(CONTENT)
    monkeypatch.setenv("DPKIT_DATA", str(tmp_path))
    assert read(TABLE, None) == CONTENT
    monkeypatch.delenv("DPKIT_DATA")
    with pytest.raises(DataError, match="--data-dir DIR or set DPKIT_DATA"):
        read(TABLE, None)


def test_a_file_that_is_packed_anew_is_the_same_file(tmp_path: Path):
    for level in (0, 9):
        (tmp_path / "table.csv.gz").write_bytes(gzip.compress(CONTENT, level, mtime=level))
        assert read(TABLE, tmp_path) == CONTENT


def test_a_missing_file_and_a_missing_folder_are_named(tmp_path: Path):
    with pytest.raises(DataError, match=r"tabular/small/table.csv.gz is missing .* experiments.data"):
        read(TABLE, tmp_path)
    with pytest.raises(DataError, match=r"nowhere does not exist; give the folder that holds tabular/small"):
        read(TABLE, tmp_path / "nowhere")


@pytest.mark.parametrize(
    ("name", "content", "named"),
    [
        ("table.csv.gz", gzip.compress(CONTENT, mtime=0)[:-6], "table.csv.gz cannot be unpacked"),
        ("table.csv.gz", gzip.compress(CONTENT, mtime=0)[:4], "cannot be unpacked"),
        ("table.csv.gz", b"", "not the published file"),
        ("table.csv.gz", CONTENT, "cannot be unpacked"),
        ("table.csv.gz", b"\x1f\x8b\x08\x00" + bytes(100), "cannot be unpacked"),
        ("table.csv.gz", gzip.compress(b"one\nTWO\n", mtime=0), "SHA-256 .* expected"),
        ("table.csv", b"one\nTWO\n", "SHA-256 .* expected"),
        ("table.csv", CONTENT[:-1], "SHA-256"),
        ("table.csv", CONTENT + b"\n", "more than the 8 bytes"),
    ],
)
def test_a_damaged_or_changed_file_is_refused_by_name(tmp_path: Path, name: str, content: bytes, named: str):
    (tmp_path / name).write_bytes(content)
    with pytest.raises(DataError, match=named):
        read(TABLE, tmp_path)


def test_a_wrong_file_is_not_passed_over_for_a_right_one_elsewhere(tmp_path: Path):
    (tmp_path / "table.csv.gz").write_bytes(gzip.compress(b"other", mtime=0))
    (tmp_path / "table.csv").write_bytes(CONTENT)
    with pytest.raises(DataError, match=r"table.csv.gz is not the published file"):
        read(TABLE, tmp_path)


def test_a_small_file_that_unpacks_to_a_huge_one_is_refused_without_unpacking_it(tmp_path: Path):
    (tmp_path / "table.csv.gz").write_bytes(gzip.compress(bytes(60_000_000), 1, mtime=0))
    tracemalloc.start()
    try:
        with pytest.raises(DataError, match="more than the 8 bytes"):
            read(TABLE, tmp_path)
        assert tracemalloc.get_traced_memory()[1] < 2_000_000
    finally:
        tracemalloc.stop()


def test_a_folder_in_its_place_is_refused(tmp_path: Path):
    (tmp_path / "table.csv").mkdir()
    with pytest.raises(DataError, match=r"table.csv is not a file"):
        read(TABLE, tmp_path)


@pytest.mark.skipif(os.name == "nt", reason="Windows has no such links and pipes")
def test_links_that_lead_nowhere_and_pipes_are_refused(tmp_path: Path):
    path = tmp_path / "table.csv"
    path.symlink_to("table.csv")  # a loop
    with pytest.raises(DataError, match=r"table.csv cannot be read"):
        read(TABLE, tmp_path)
    path.unlink()
    path.symlink_to("nothing")
    with pytest.raises(DataError, match=r"table.csv cannot be read"):
        read(TABLE, tmp_path)
    path.unlink()
    os.mkfifo(path)
    with pytest.raises(DataError, match=r"table.csv is not a file"):
        read(TABLE, tmp_path)


def test_another_file_serves_instead_where_the_first_one_is_missing(tmp_path: Path):
    either = File("a/short.csv", "0" * 64, 1, instead=TABLE)
    (tmp_path / "table.csv").write_bytes(CONTENT)
    assert read(either, tmp_path) == CONTENT
    (tmp_path / "short.csv").write_bytes(b"x")  # now the first one is there, and wrong
    with pytest.raises(DataError, match=r"short.csv is not the published file"):
        read(either, tmp_path)


@pytest.mark.parametrize("name", CATALOGUE)
def test_every_file_of_the_catalogue_can_be_fetched_safely_or_says_why_not(name: str):
    for file in describe(name).files:
        assert bool(file.url) != bool(file.why_no_url)
        for one in (file, file.instead):
            if one is not None:
                assert len(one.sha256) == 64
                assert one.size > 0
                assert one.url is None or one.url.startswith("https://")


def test_an_unknown_name_is_refused_with_the_known_ones():
    with pytest.raises(DataError, match="no data set 'celeba'.*adult"):
        describe("celeba")
