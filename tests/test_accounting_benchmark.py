"""The benchmark of the accountant runs, and what it prints beside the times is consistent. No time is judged here."""

from __future__ import annotations

import json

import pytest
from typer import Typer
from typer.testing import CliRunner

from experiments.benchmarks import accounting as benchmark

APP = Typer()
APP.command()(benchmark.main)


@pytest.fixture(scope="module")
def rows(tmp_path_factory):
    file = tmp_path_factory.mktemp("benchmark") / "figures.json"
    done = CliRunner().invoke(APP, ["--rounds", "1", "--only", "1000 steps", "--json", str(file)])
    assert done.exit_code == 0, done.output
    [(_, found)] = json.loads(file.read_text(encoding="utf-8"))["jobs"].items()
    return {row["contestant"]: row for row in found}


def test_every_contestant_has_a_time_or_a_reason(rows):
    assert [name for name, row in rows.items() if (row["milliseconds"] is None) == (row["note"] == "")] == []


def test_our_intervals_are_as_narrow_as_their_names_say(rows):
    for slack in ("0.02", "0.001", "0.0001"):
        answer = rows[f"dpkit, slack {slack}"]["answer"]
        assert 0 < answer["upper"] - answer["lower"] <= float(slack)


def test_nobody_contradicts_our_interval(rows):
    ours = rows["dpkit, slack 0.0001"]["answer"]
    answers = [row["answer"] for row in rows.values() if row["answer"] is not None]
    assert all(answer["upper"] >= ours["lower"] for answer in answers)
    assert all((answer["lower"] or 0.0) <= ours["upper"] for answer in answers)


def test_a_library_that_is_not_there_is_named_as_such():
    job = benchmark.JOBS[0]
    ours = job.contestants[0]
    absent = ours._replace(name="nobody", library="no-such-library", against=ours.name, target=50)
    row = benchmark.measure(job._replace(contestants=[ours, absent]), rounds=1)[1]
    assert (row.milliseconds, row.target, row.note) == (None, ">= 50", "not installed")


def test_a_share_of_a_job_counts_as_the_whole_of_it_and_a_missed_target_is_marked(monkeypatch):
    monkeypatch.setattr(benchmark, "cpu_seconds", lambda ask: ask() and 0.002)
    ours = benchmark.Contestant("ours", "dpkit", lambda: benchmark.Answer(1.0, 1.1), most_ms=1.0)
    share = ours._replace(name="a share", scale=2500.0, against="ours", target=2501.0, most_ms=None)
    first, second = benchmark.measure(benchmark.Job("any", [ours, share]), rounds=3)
    assert (first.milliseconds, first.ratio, first.missed, first.note) == (2.0, None, True, "")
    assert (second.milliseconds, second.ratio, second.missed, second.note) == (5000.0, 2500.0, True, "extrapolated")


def test_a_name_of_no_job_is_refused_with_the_names_that_there_are():
    done = CliRunner().invoke(APP, ["--only", "nothing"])
    assert done.exit_code == 2
    assert "start-up" in done.output


def test_every_job_has_one_of_ours_for_each_ratio():
    for job in benchmark.JOBS:
        names = {one.name for one in job.contestants if one.library == benchmark.OURS}
        assert {one.against for one in job.contestants if one.library != benchmark.OURS} <= names, job.name
