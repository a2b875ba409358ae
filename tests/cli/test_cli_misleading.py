"""What could mislead a reader without anybody forging anything, and what says so now."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path

import pytest

from .conftest import Run

pytest.importorskip("jinja2", reason="the report takes the extra `report`")
pytest.importorskip("sklearn", reason="the data set digits comes with scikit-learn (extra `demo`)")

Write = Callable[..., Path]
SEED = ("max_grad_norm: 1.0", "max_grad_norm: 1.0\n  noise_seed: 918273645546372819")


def checks(done) -> dict[str, str]:
    return {check["name"]: check["verdict"] for check in done.json["checks"]}


def test_a_report_of_an_earlier_moment_fails(dpkit: Run, trained: Path, tmp_path: Path):
    run = Path(shutil.copytree(trained, tmp_path / "copy"))
    assert dpkit("report", run).code == 0
    page = (run / "report.html").read_text(encoding="utf-8")
    assert dpkit("verify", run).code == 0
    (run / "report.html").write_text(page.replace("finished, all 6", "not finished, 3 of 6"), encoding="utf-8")
    done = dpkit("verify", run, "--json")
    assert (done.code, checks(done)["report.html: text"]) == (4, "failed")
    assert dpkit("report", run).code == dpkit("verify", run).code == 0


def test_a_resumed_run_leaves_no_report_of_an_earlier_moment(dpkit: Run, config: Write, tmp_path: Path):
    run = tmp_path / "run"
    assert dpkit("train", config()).code == dpkit("report", run).code == 0
    assert dpkit("train", "--resume", run).code == 0
    assert not (run / "report.html").exists()
    assert dpkit("verify", run).code == 0


def test_a_report_is_not_written_beside_the_ledger_of_another_run(
    dpkit: Run, trained: Path, config: Write, tmp_path: Path
):
    assert dpkit("train", config("epsilon: 3.0", "epsilon: 0.5")).code == 0
    run = Path(shutil.copytree(trained, tmp_path / "copy"))
    for name in ("ledger.sqlite", "ledger.sqlite.tip"):
        shutil.copy(tmp_path / "run" / name, run / name)
    done = dpkit("report", run)
    assert done.code == 4
    assert "another ledger" in done.err
    assert not (run / "report.html").exists()


def test_a_run_that_is_not_certified_says_so_everywhere(dpkit: Run, config: Write, tmp_path: Path):
    run = tmp_path / "run"
    assert dpkit("train", config(*SEED)).code == dpkit("report", run).code == 0
    verified = dpkit("verify", run, "--json")
    assert (verified.code, checks(verified)["certified"]) == (0, "warning")
    assert dpkit("epsilon", run, "--json").json["certified"] is False
    assert "certified  NO" in dpkit("epsilon", run).out
    assert dpkit("epsilon", run, "--max-epsilon", 100).code == 2
    assert "seeded with 256 bits by the operating system" not in dpkit("statement", run).out
    assert "seeded by the user" in dpkit("statement", run).out


def test_the_noise_seed_is_in_no_file_of_the_run(dpkit: Run, config: Write, tmp_path: Path):
    run = tmp_path / "run"
    assert dpkit("train", config(*SEED)).code == dpkit("report", run).code == 0
    for path in run.rglob("*"):
        assert not path.is_file() or b"918273645546372819" not in path.read_bytes(), path
    assert dpkit("train", "--resume", run).code == 0
    assert dpkit("epsilon", run, "--json").json["certified"] is False


def test_a_folder_that_was_never_begun_is_not_said_to_be_resumable(dpkit: Run, config: Write, tmp_path: Path):
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "other").write_text("", encoding="utf-8")
    done = dpkit("train", config())
    assert done.code == 1
    assert "--resume" not in done.err


@pytest.mark.slow
def test_a_tracking_server_of_no_known_kind_is_an_error_of_one_line(
    dpkit: Run, config: Write, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    pytest.importorskip("mlflow", reason="MLflow is in the extra `log`")
    monkeypatch.setenv("MLFLOW_TRACKING_URI", "nonsense://x")
    done = dpkit("train", config("learning_rate: 2.0", "learning_rate: 2.0\nlogging: [mlflow]"))
    assert done.code == 1
    assert "Check the tracking URI" in done.err
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize("arguments", [("init", "no/dir/x.yaml"), ("train", ".")])
def test_a_path_that_cannot_be_used_is_one_line_with_a_way_out(dpkit: Run, tmp_path: Path, monkeypatch, arguments):
    monkeypatch.chdir(tmp_path)
    done = dpkit(*arguments)
    assert done.code == 1
    assert done.err.count("\n") == 1 and "[Errno 2]" not in done.err
