"""The run folder: whole files or the old ones, and nothing outside of it."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from dpkit.errors import RunFolderError
from dpkit.run_folder import RunFolder


def test_what_is_written_is_read_and_nothing_is_left_beside_it(tmp_path: Path):
    run = RunFolder(tmp_path / "run")
    run.write("result.json", data="one")
    run.write("result.json", data=b"two")
    run.write("checkpoints", "a.bin", data=b"\0")
    assert run.read("result.json") == b"two"
    assert run.read("checkpoints", "a.bin") == b"\0"
    assert run.names() == ["checkpoints", "result.json"]
    assert sorted(path.name for path in (tmp_path / "run").rglob("*")) == ["a.bin", "checkpoints", "result.json"]


def test_files_are_for_their_owner_alone(tmp_path: Path):
    run = RunFolder(tmp_path)
    run.write("a", data="")
    run.append("b").close()
    assert [(tmp_path / name).stat().st_mode & 0o777 for name in "ab"] == [0o600, 0o600]


@pytest.mark.parametrize(
    "name",
    [
        "..",
        ".",
        "",
        "/etc/passwd",
        "../up",
        "a/b",
        "a\\b",
        ".hidden",
        "a\0b",
        "a\n",
        "ü",
        "x" * 65,
        "a b",
        "~",
        "\ud800",
    ],
)
def test_names_that_could_lead_out_of_the_folder_are_refused(tmp_path: Path, name: str):
    run = RunFolder(tmp_path / "run")
    for attempt in (
        lambda: run.write(name, data="x"),
        lambda: run.write("sub", name, data="x"),
        lambda: run.read(name),
        lambda: run.append(name),
        lambda: run.remove(name),
        lambda: run.make(name),
        lambda: run.exists(name),
    ):
        with pytest.raises(RunFolderError, match="cannot be a file of a run"):
            attempt()
    assert list(tmp_path.iterdir()) == []


def test_symbolic_links_are_neither_read_nor_written_through(tmp_path: Path):
    outside = tmp_path / "outside"
    outside.mkdir()
    (outside / "secret").write_text("secret", encoding="utf-8")
    run = RunFolder(tmp_path / "run")
    run.make()
    (tmp_path / "run" / "file").symlink_to(outside / "secret")
    (tmp_path / "run" / "folder").symlink_to(outside)
    (tmp_path / "run" / "dangling").symlink_to(outside / "none")
    for names in (("file",), ("folder", "secret"), ("dangling",), ("folder", "new")):
        for attempt in (
            lambda names=names: run.read(*names),
            lambda names=names: run.write(*names, data="x"),
            lambda names=names: run.append(*names),
            lambda names=names: run.remove(*names),
        ):
            with pytest.raises(RunFolderError, match="symbolic link"):
                attempt()
    with pytest.raises(RunFolderError, match="symbolic link"):
        run.names("folder")
    assert [path.name for path in outside.iterdir()] == ["secret"]
    assert (outside / "secret").read_text(encoding="utf-8") == "secret"


def test_a_run_folder_that_is_itself_a_link_is_the_users_choice(tmp_path: Path):
    (tmp_path / "disk").mkdir()
    (tmp_path / "run").symlink_to(tmp_path / "disk")
    RunFolder(tmp_path / "run").write("a", data="x")
    assert (tmp_path / "disk" / "a").read_text(encoding="utf-8") == "x"


def test_large_files_and_what_is_no_file_are_refused(tmp_path: Path):
    run = RunFolder(tmp_path)
    run.write("a", data="12345")
    assert run.read("a", limit=5) == b"12345"
    assert run.read_start("a", length=2) == b"12"
    assert run.read_start("a", length=2**62) == b"12345"
    with pytest.raises(RunFolderError, match="larger than 4"):
        run.read("a", limit=4)
    os.mkfifo(tmp_path / "pipe")
    run.make("folder")
    for name in ("pipe", "folder", "missing"):
        with pytest.raises(RunFolderError, match=name):
            run.read(name)


@pytest.mark.parametrize(
    ("before", "after"),
    [("", ""), ("whole\n", "whole\n"), ("whole\ntorn", "whole\n"), ("torn", ""), ("a\n" + "b" * 200_000, "a\n")],
)
def test_a_torn_last_line_of_a_log_is_cut(tmp_path: Path, before: str, after: str):
    (tmp_path / "log").write_text(before, encoding="utf-8")
    with RunFolder(tmp_path).append("log") as log:
        log.write("next\n")
    assert (tmp_path / "log").read_text(encoding="utf-8") == after + "next\n"


@pytest.mark.parametrize("path", ["a\0b", "\ud800", 7, None])
def test_a_path_that_no_folder_can_have_is_refused(path: object):
    with pytest.raises(RunFolderError):
        RunFolder(path)  # pyright: ignore[reportArgumentType]


def test_a_file_in_place_of_the_folder_is_refused(tmp_path: Path):
    (tmp_path / "run").write_text("", encoding="utf-8")
    with pytest.raises(RunFolderError, match="not a folder"):
        RunFolder(tmp_path / "run")
    with pytest.raises(RunFolderError, match="cannot be written"):
        RunFolder(tmp_path / "run" / "below").write("a", data="x")


def test_the_temporary_files_of_killed_processes_are_swept_and_nothing_else(tmp_path: Path):
    run = RunFolder(tmp_path)
    run.write("sub", "a", data="x")
    (tmp_path / "sub" / ".0123456789abcdef.tmp").write_text("half", encoding="utf-8")
    (tmp_path / "sub" / ".mine.tmp").write_text("mine", encoding="utf-8")
    run.sweep("sub")
    run.sweep("none")
    assert sorted(path.name for path in (tmp_path / "sub").iterdir()) == [".mine.tmp", "a"]


def test_the_lock_is_held_once_and_given_back(tmp_path: Path):
    lock = RunFolder(tmp_path).lock()
    with pytest.raises(RunFolderError, match="in use"):
        RunFolder(tmp_path).lock()
    lock.release()
    RunFolder(tmp_path).lock().release()
