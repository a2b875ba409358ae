"""``dpkit curve``: epsilon after each step, and its picture."""

from __future__ import annotations

import sys
from pathlib import Path
from xml.etree import ElementTree

import pytest

import accounting

from .conftest import Run

NUMBERS = ("--noise-multiplier", "1.1", "--sample-rate", "0.01", "--delta", "1e-5")
PASSES = ("--noise-multiplier", "4", "--sample-rate", "0.1", "--delta", "1e-5", "--sampling", "shuffled")


@pytest.mark.parametrize("numbers", [NUMBERS, PASSES], ids=["poisson", "shuffled"])
def test_each_point_is_the_epsilon_of_a_run_that_was_planned_to_end_there(dpkit: Run, numbers: tuple[str, ...]):
    done = dpkit("curve", *numbers, "--steps", 21, "--json").json
    assert [point["step"] for point in done["points"]] == list(range(1, 22))
    for step in (1, 10, 11, 21):
        alone = dpkit("epsilon", *numbers, "--steps", step, "--json").json
        point = done["points"][step - 1]
        assert point["lower"] <= alone["epsilon"]
        assert alone["lower"] <= point["epsilon"]
        assert point["epsilon"] == pytest.approx(alone["epsilon"], abs=1e-3)
    values = [point["epsilon"] for point in done["points"]]
    assert values == sorted(values)
    for name in ("delta", "unit", "relation", "sampling", "accountant"):
        assert done[name]


@pytest.mark.parametrize(
    ("steps", "every", "expected"),
    [(10, 3, [3, 6, 9, 10]), (10, 5, [5, 10]), (10, 100, [10]), (1, 1, [1]), (0, 1, [])],
)
def test_every_kth_step_and_the_last(dpkit: Run, steps: int, every: int, expected: list[int]):
    done = dpkit("curve", *NUMBERS, "--steps", steps, "--every", every, "--json")
    assert [point["step"] for point in done.json["points"]] == expected


def test_the_text_shows_a_few_steps_with_all_that_they_mean(dpkit: Run):
    text = dpkit("curve", *NUMBERS, "--steps", 30).out
    for word in ("delta = 1e-05", "one example", "add_remove", "Poisson, rate 0.01", "multiplier 1.1", "accountant"):
        assert word in text
    assert len(text.splitlines()) < 25
    assert text.splitlines()[-1].split()[0] == "30"


@pytest.mark.parametrize("every", [0, -1])
def test_every_counts_steps(dpkit: Run, every: int):
    done = dpkit("curve", *NUMBERS, "--steps", 5, "--every", every)
    assert (done.code, done.out) == (1, "")
    assert f"--every is {every}" in done.err


@pytest.fixture
def _matplotlib() -> None:
    pytest.importorskip("matplotlib", reason="pictures take the extra `report`")


@pytest.mark.usefixtures("_matplotlib")
def test_a_picture_says_what_it_shows(dpkit: Run, tmp_path: Path):
    path = tmp_path / "curve.svg"
    done = dpkit("curve", *NUMBERS, "--steps", 20, "--plot", path, "--json")
    assert (done.code, done.json["plot"]) == (0, str(path))
    text = " ".join(ElementTree.fromstring(path.read_bytes()).itertext())
    for word in ("steps", "epsilon at delta = 1e-05", "Poisson, rate 0.01", "add_remove", "one example"):
        assert word in text
    again = tmp_path / "again.svg"
    dpkit("curve", *NUMBERS, "--steps", 20, "--plot", again)
    assert again.read_bytes() == path.read_bytes()


@pytest.mark.usefixtures("_matplotlib")
def test_a_picture_for_print_is_a_png(dpkit: Run, tmp_path: Path):
    path = tmp_path / "curve.PNG"
    done = dpkit("curve", *NUMBERS, "--steps", 20, "--plot", path)
    assert done.code == 0
    assert done.out.splitlines()[-1] == f"wrote {path}"
    assert path.read_bytes()[:8] == b"\x89PNG\r\n\x1a\n"


@pytest.mark.parametrize("how", ["file", "folder", "link"])
def test_a_picture_never_overwrites(dpkit: Run, tmp_path: Path, how: str):
    path = tmp_path / "there.svg"
    if how == "file":
        path.write_text("mine", encoding="utf-8")
    elif how == "folder":
        path.mkdir()
    else:
        path.symlink_to(tmp_path / "nowhere")
    done = dpkit("curve", *NUMBERS, "--steps", 5, "--plot", path)
    assert (done.code, done.out) == (1, "")
    assert "exists already" in done.err
    assert how != "file" or path.read_text(encoding="utf-8") == "mine"
    assert not (tmp_path / "nowhere").exists()


@pytest.mark.parametrize(("name", "steps"), [("curve.pdf", 5), ("curve", 5), ("curve.png", 0)])
def test_a_picture_that_cannot_be_is_refused(dpkit: Run, tmp_path: Path, name: str, steps: int):
    done = dpkit("curve", *NUMBERS, "--steps", steps, "--plot", tmp_path / name)
    assert (done.code, done.out) == (1, "")
    assert list(tmp_path.iterdir()) == []


def test_without_matplotlib_the_extra_is_named(dpkit: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    done = dpkit("curve", *NUMBERS, "--steps", 5, "--plot", tmp_path / "curve.png")
    assert (done.code, done.out) == (1, "")
    assert "dpkit[report]" in done.err


def test_a_run_whose_event_covers_a_pass_is_told_in_steps(dpkit: Run, tmp_path: Path):
    event = accounting.OnePass(event=accounting.Gaussian(noise_multiplier=2.0))
    plan = accounting.PlanRecord(
        event=event,
        steps=20,
        delta=1e-3,
        relation=accounting.Relation.ZERO_OUT,
        unit="example",
        num_examples=60,
        steps_per_event=6,
    )
    budget = accounting.Budget(epsilon=100.0, delta=1e-2)
    with accounting.Ledger.create(tmp_path / "ledger.sqlite", dataset_name="made up", budget=budget) as ledger:
        for _ in range(8):
            ledger.charge(plan, event)
    costs = [
        accounting.round_up(accounting.epsilon(accounting.Repeated(event, passes), 1e-3, relation=plan.relation).upper)
        for passes in (1, 2, 3, 4)
    ]
    points = dpkit("curve", tmp_path, "--json").json["points"]
    assert [point["epsilon"] for point in points] == pytest.approx([costs[step // 6] for step in range(20)], abs=1e-3)
    done = dpkit("epsilon", tmp_path, "--json").json
    assert (done["epsilon"], done["committed_epsilon"]) == (costs[1], costs[3])
    assert done["lower"] <= costs[1] and done["steps"] == 8
