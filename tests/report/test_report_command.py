"""``dpkit report``: paths, exit codes, refusals by name, and no file half written."""

from __future__ import annotations

import importlib.util
import json
import os
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
from report.folders import MakeRun, metrics_lines, plan

from dpkit.cli import main

pytest.importorskip("matplotlib", reason="the page's plots need matplotlib (extra `report`)")
pytest.importorskip("jinja2", reason="the page needs jinja2 (extra `report`)")

Said = tuple[int, str, str]


@pytest.fixture
def dpkit(capsys: pytest.CaptureFixture[str]) -> Callable[..., Said]:
    """``dpkit(*arguments)``: exit code, stdout, stderr."""

    def run(*arguments: object) -> Said:
        capsys.readouterr()
        code = main([str(argument) for argument in arguments])
        captured = capsys.readouterr()
        return code, captured.out, captured.err

    return run


def test_the_paths_of_both_files_are_printed(finished: Path, dpkit):
    code, out, err = dpkit("report", finished)
    assert (code, err) == (0, "")
    assert out.splitlines() == [str(finished / "report.html"), str(finished / "PRIVACY.md")]
    assert all(Path(line).is_file() for line in out.splitlines())
    assert not (finished / "nonprivate").exists()


def test_json_holds_the_paths_and_the_anchor(finished: Path, dpkit):
    code, out, _ = dpkit("report", finished, "--json", "--with-nonprivate")
    answer = json.loads(out)
    assert code == 0
    assert Path(answer["nonprivate_report"]) == finished / "nonprivate" / "report.html"
    anchor = f"entry {answer['anchor_sequence']}, {answer['anchor_digest']}"
    for name in ("report", "privacy", "nonprivate_report"):
        assert Path(answer[name]).read_text(encoding="utf-8").count(anchor) == 1
    assert answer["certified"] is True


def test_a_run_that_is_not_certified_is_said_to_be_so(make_run: MakeRun, dpkit):
    code, out, _ = dpkit("report", make_run(plan(facts={"certified": False}), 1))
    assert code == 0 and "NOT certified" in out


def test_a_run_without_privacy_is_refused_by_name(tmp_path: Path, dpkit):
    run = tmp_path / "plain"
    (run / "nonprivate").mkdir(parents=True)
    (run / "nonprivate" / "result.json").write_text('{"private": false}', encoding="utf-8")
    code, _, err = dpkit("report", run)
    assert code == 1 and "trained without privacy" in err
    assert not (run / "report.html").exists()


def test_a_missing_folder_and_a_file_are_refused(tmp_path: Path, finished: Path, dpkit):
    code, _, err = dpkit("report", tmp_path / "nowhere")
    assert code == 1 and "does not exist" in err
    code, _, err = dpkit("report", finished / "ledger.sqlite")
    assert code == 1 and "not a folder" in err


def test_a_missing_and_a_damaged_ledger_cannot_be_verified(finished: Path, dpkit):
    ledger = finished / "ledger.sqlite"
    content = ledger.read_bytes()
    ledger.unlink()
    assert dpkit("report", finished)[0] == 4
    ledger.write_bytes(content.replace(b'"step":7', b'"step":8'))
    assert dpkit("report", finished)[0] == 4
    assert not (finished / "report.html").exists()


def test_a_ledger_that_is_older_than_the_metrics_is_refused(finished: Path, make_run: MakeRun, dpkit):
    older = make_run(plan(), 12, name="older")
    shutil.copy(older / "ledger.sqlite", finished / "ledger.sqlite")
    (finished / "ledger.sqlite.tip").unlink()  # or it would be refused before anything is read
    code, _, err = dpkit("report", finished)
    assert code == 4 and "records 40 charged steps" in err and "older copy" in err


@pytest.mark.parametrize(
    ("damage", "reason"),
    [
        ("{", "no JSON"),
        ("[]", "no JSON object"),
        ("", "no JSON"),
        ('{"step": -1}', "step is -1"),
        ('{"step": true}', "step is True"),
        ('{"step": 1, "charged": 1, "planned": 2, "epsilon": NaN, "delta": 0}', "epsilon is nan"),
        ('{"step": 1, "charged": 1, "planned": 2, "epsilon": 1, "delta": 7}', "delta is 7"),
        ('{"step": 1, "charged": 1, "planned": 2, "epsilon": "3", "delta": 0}', "epsilon is '3'"),
        ('{"step": 1, "charged": 1, "planned": 2, "epsilon": 1, "delta": 0, "metrics": {"a": "b"}}', "a is 'b'"),
        ("[" * 100_000, "deep"),
        ("1" * 5_000, ""),
    ],
)
def test_a_damaged_line_is_refused_by_its_number(finished: Path, dpkit, damage: str, reason: str):
    lines = (finished / "metrics.jsonl").read_text(encoding="utf-8").splitlines()
    lines[16] = damage
    (finished / "metrics.jsonl").write_text("\n".join(lines) + "\n", encoding="utf-8")
    code, _, err = dpkit("report", finished)
    assert code == 1 and "metrics.jsonl, line 17:" in err and reason in err


def test_a_last_line_that_a_killed_process_left_unfinished_is_left_out(finished: Path, dpkit):
    with (finished / "metrics.jsonl").open("a", encoding="utf-8") as file:
        file.write(metrics_lines(plan(), 40).splitlines()[-1][:50])
    assert dpkit("report", finished)[0] == 0
    assert "was cut off while it was written" in (finished / "report.html").read_text(encoding="utf-8")


@pytest.mark.parametrize(
    ("name", "content"),
    [("result.json", b"{"), ("result.json", b'{"test_accuracy": "high"}'), ("config.yaml", b"\xff\xfe")],
)
def test_a_damaged_file_is_refused_by_name(finished: Path, dpkit, name: str, content: bytes):
    (finished / name).write_bytes(content)
    code, _, err = dpkit("report", finished)
    assert code == 1 and name in err


@pytest.mark.parametrize("name", ["report.html", "PRIVACY.md", "metrics.jsonl", "ledger.sqlite"])
def test_a_symbolic_link_is_refused_and_nothing_is_written(finished: Path, tmp_path: Path, dpkit, name: str):
    target = tmp_path / "precious"
    target.write_text("precious", encoding="utf-8")
    (finished / name).unlink(missing_ok=True)
    (finished / name).symlink_to(target)
    before = sorted(path.name for path in finished.iterdir())
    code, _, err = dpkit("report", finished)
    assert code == 1 and "symbolic link" in err
    assert target.read_text(encoding="utf-8") == "precious"
    assert sorted(path.name for path in finished.iterdir()) == before


def test_a_folder_that_cannot_be_written_to_keeps_its_files(finished: Path, dpkit, monkeypatch: pytest.MonkeyPatch):
    assert dpkit("report", finished)[0] == 0
    before = {path.name: path.read_bytes() for path in finished.iterdir()}

    def refuse(*_: object) -> None:
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr(os, "replace", refuse)
    code, _, err = dpkit("report", finished)
    assert code == 1 and "cannot be written (Permission denied)" in err
    assert {path.name: path.read_bytes() for path in finished.iterdir()} == before


@pytest.mark.parametrize("absent", ["matplotlib", "jinja2"])
def test_an_absent_extra_is_named_with_the_way_out(finished: Path, dpkit, monkeypatch, absent: str):
    find = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name, *rest: None if name == absent else find(name, *rest))
    code, _, err = dpkit("report", finished)
    assert code == 1 and absent in err and "pip install 'dpkit[report]'" in err
    assert not (finished / "report.html").exists()


def test_a_report_is_written_without_torch(finished: Path):
    code = (
        "import sys; from dpkit.cli import main\n"
        f"assert main(['report', {str(finished)!r}]) == 0\n"
        "print('torch' in sys.modules, 'matplotlib.pyplot' in sys.modules)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.splitlines()[-1] == "False False"
