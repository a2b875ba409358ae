"""``dpkit plan-noise``: the choices, the recommendation as code that makes it, the picture, and what is refused."""

from __future__ import annotations

import ast
import math
import sys
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

import pytest

import dpkit as dpkit_package
from accounting import epsilon
from accounting.plan_noise import plan_noise

from .conftest import Run

TARGET = ("--target-epsilon", "2", "--delta", "1e-5")
RUN = (*TARGET, "--num-examples", "600", "--batch-size", "20", "--epochs", "2")
FEW = (*RUN, "--bands", "1,4")


def test_the_choices_are_those_of_the_plan(dpkit: Run):
    done = dpkit("plan-noise", *FEW, "--json")
    assert done.code == 0, done.err
    plan = plan_noise(2.0, 1e-5, num_examples=600, batch_size=20, steps=60, bands=[1, 4])
    assert [row["error"] for row in done.json["choices"]] == [choice.error for choice in plan.choices]
    for row, choice in zip(done.json["choices"], plan.choices, strict=True):
        assert (row["batches"], row["strategy"], row["bands"]) == (choice.batches, choice.strategy, choice.bands)
        assert (row["noise_multiplier"], row["sensitivity"]) == (choice.noise_multiplier, choice.sensitivity)
        assert row["noise_vectors_kept"] == choice.kept
        assert choice.bound.upper <= row["epsilon"] <= 2.0
        assert row["error_relative_to_dp_sgd"] == row["error"] / done.json["choices"][0]["error"]
        assert (row["relation"], row["accountant"]) == ("zero_out", choice.bound.accountant)
    expected = {"target_epsilon": 2.0, "delta": 1e-5, "unit": "example", "relation": "zero_out", "steps": 60}
    assert {name: done.json[name] for name in expected} == expected
    assert (done.json["left_out"], done.json["plot"]) == ([], None)


@pytest.mark.parametrize(
    "arguments",
    [
        FEW,
        (*FEW, "--relation", "add_remove"),
        (*FEW, "--relation", "replace_one"),
        (*TARGET, "--num-examples", "90", "--batch-size", "30", "--steps", "4"),
    ],
    ids=["zero-out", "add-remove", "replace-one", "few-steps"],
)
def test_the_recommended_choice_is_the_one_with_the_least_error(dpkit: Run, arguments: tuple[str, ...]):
    done = dpkit("plan-noise", *arguments, "--json").json
    least = min(done["choices"], key=lambda row: row["error"])
    assert {name: value for name, value in done["recommended"].items() if name != "python"} == least


def made(lines: list[str]) -> dict[str, Any]:
    """The arguments that these lines of Python stand for."""
    found = {}
    for line in lines:
        [keyword] = ast.parse(f"f({line})", mode="eval").body.keywords
        found[keyword.arg] = eval(ast.unparse(keyword.value), {"dpkit": dpkit_package})
    return found


LONG = ("--target-epsilon", "8", "--delta", "1e-5", "--num-examples", "1000", "--batch-size", "10", "--steps", "100")


@pytest.mark.parametrize(
    ("arguments", "expected"),
    [
        ((*FEW, "--relation", "add_remove"), "BandMF(bands=4)"),
        ((*LONG, "--bands", "32"), "BISR(bands=32)"),
        ((*LONG, "--bands", "1"), "SquareRoot()"),
        ((*TARGET, "--num-examples", "90", "--batch-size", "30", "--steps", "4"), "none"),
        ((*TARGET, "--num-examples", "90", "--batch-size", "90", "--steps", "3", "--relation", "replace_one"), "none"),
    ],
    ids=["cyclic", "bisr", "square-root", "plain", "full-batch"],
)
def test_the_lines_of_python_make_a_run_of_that_epsilon(dpkit: Run, arguments: tuple[str, ...], expected: str):
    done = dpkit("plan-noise", *arguments, "--json").json
    best = done["recommended"]
    keywords = made(best["python"])
    assert str(getattr(keywords["mechanism"], "strategy", "none")) == expected
    examples = done["num_examples"]
    plan = dpkit_package.Plan(
        sampler=keywords.get("sampler", dpkit_package.Poisson(done["batch_size"] / examples)),
        clip=dpkit_package.clipping.Flat(1.0),
        mechanism=keywords["mechanism"],
        steps=done["steps"],
        num_examples=examples,
        delta=1e-5,
        relation=done["relation"],
    )
    assert plan.expected_batch == pytest.approx(done["batch_size"], rel=1e-12)
    assert plan.epsilon().upper == pytest.approx(best["epsilon"], abs=1e-4)
    assert plan.epsilon().upper <= done["target_epsilon"]


def test_the_text_recommends_with_all_that_gives_epsilon_a_meaning(dpkit: Run):
    done = dpkit("plan-noise", *RUN)
    assert done.code == 0, done.err
    lines = done.out.splitlines()
    assert "epsilon <= 2 at delta = 1e-05" in lines[0] and "zero_out" in lines[0] and "60 steps" in lines[0]
    rows = lines[2 : lines.index("")]
    assert len(rows) == 2 + 1 + 3 * 4 + 4
    assert all(len(line) <= 80 for line in lines[1 : lines.index("")])
    errors = [float(row.split()[-3]) for row in rows]
    assert errors == sorted(errors)
    recommended = dpkit("plan-noise", *RUN, "--json").json["recommended"]
    assert all(line in done.out for line in recommended["python"])
    for word in (
        f"recommended: BandMF({recommended['bands']}), cyclic Poisson batches",
        f"{recommended['error_relative_to_dp_sgd']:.3f} of that of plain DP-SGD",
        "unit one example, relation zero_out, accountant prv",
        "engine.make_private(model, optimizer, loader, max_grad_norm=...,",
        'num_examples=600, steps=60, target_delta=1e-05, relation="zero_out"',
        "constant learning rate without momentum",
        "It is not accuracy",
        "under add_remove too",
        "depends on that example alone",
    ):
        assert word in done.out, word


def test_where_plain_dp_sgd_wins_the_text_says_so(dpkit: Run):
    done = dpkit("plan-noise", *TARGET, "--num-examples", "90", "--batch-size", "30", "--steps", "4")
    assert "recommended: plain DP-SGD; no correlated noise has a smaller error here" in done.out
    assert "mechanism=dpkit.Gaussian(noise_multiplier=" in done.out
    assert "sampler=" not in done.out


def test_a_gain_that_is_hardly_one_is_called_so(dpkit: Run):
    arguments = ("plan-noise", *TARGET, "--num-examples", "100", "--batch-size", "10", "--steps", "10")
    assert 0.99 < dpkit(*arguments, "--json").json["recommended"]["error_relative_to_dp_sgd"] < 1
    assert "hardly less, and plain DP-SGD is simpler" in dpkit(*arguments).out
    assert "hardly less" not in dpkit("plan-noise", *FEW).out


def test_what_no_theorem_covers_is_left_out_with_the_reason(dpkit: Run):
    done = dpkit("plan-noise", *FEW, "--relation", "replace_one")
    assert "left out: poisson and cyclic-poisson batches: poisson sampling under replace_one" in done.out
    assert "2C" in done.out and "cyclic Poisson  " not in done.out
    row = dpkit("plan-noise", *FEW, "--relation", "replace_one", "--json").json["recommended"]
    assert row["error_relative_to_dp_sgd"] is None
    assert row["batches"] == "fixed-order"


def test_epochs_are_passes_of_whole_batches(dpkit: Run):
    rest = (*TARGET, "--num-examples", "610", "--batch-size", "20", "--bands", "1")
    assert dpkit("plan-noise", *rest, "--epochs", "2", "--json").json["steps"] == 62
    by_steps = dpkit("plan-noise", *rest, "--steps", "62", "--json").json
    assert dpkit("plan-noise", *rest, "--epochs", "2", "--json").json == by_steps


def test_a_delta_above_one_over_n_is_warned_of(dpkit: Run):
    rest = ("--num-examples", "90", "--batch-size", "30", "--steps", "4", "--bands", "1")
    done = dpkit("plan-noise", "--target-epsilon", "2", "--delta", "0.1", *rest, "--json").json
    assert any("not below 1/N" in caveat for caveat in done["caveats"])


UNSAMPLED = ("--num-examples", "9", "--batch-size", "9", "--steps", "2")


def without(name: str) -> tuple[str, ...]:
    place = RUN.index(name)
    return (*RUN[:place], *RUN[place + 2 :])


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        ((*without("--target-epsilon"), "--target-epsilon", "0"), "--target-epsilon is 0"),
        ((*without("--target-epsilon"), "--target-epsilon", "-1"), "--target-epsilon is -1"),
        ((*without("--target-epsilon"), "--target-epsilon", "nan"), "--target-epsilon is nan"),
        ((*without("--delta"), "--delta", "0"), "--delta is 0"),
        ((*without("--delta"), "--delta", "1"), "--delta is 1"),
        ((*without("--delta"), "--delta", "nan"), "--delta is nan"),
        ((*without("--batch-size"), "--batch-size", "601"), "--batch-size is 601 and --num-examples is 600"),
        ((*without("--batch-size"), "--batch-size", "0"), "--batch-size is 0"),
        ((*without("--num-examples"), "--num-examples", "-3"), "--num-examples is -3"),
        ((*RUN, "--steps", "60"), "exactly one of --steps and --epochs"),
        (without("--epochs"), "exactly one of --steps and --epochs"),
        ((*without("--epochs"), "--steps", "0"), "--steps is 0"),
        ((*without("--epochs"), "--epochs", "0"), "--epochs is 0"),
        ((*without("--epochs"), "--steps", "2000000"), "steps = 2000000: strategies are made for at most 1000000"),
        ((*RUN, "--bands", "0,1"), "--bands is 0,1: give whole numbers from 1 to 30"),
        ((*RUN, "--bands", "31"), "--bands is 31: give whole numbers from 1 to 30"),
        ((*RUN, "--bands", "two"), "--bands is two"),
        ((*RUN, "--bands", ""), "--bands is : give"),
        ((*RUN, "--relation", "friends"), "--relation"),
        (without("--target-epsilon"), "--target-epsilon"),
        (without("--delta"), "--delta"),
        (without("--num-examples"), "--num-examples"),
        (("--target-epsilon", "1e-9", "--delta", "1e-12", *UNSAMPLED), "out of reach"),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_bad_input_is_refused_by_name_in_one_line(dpkit: Run, arguments: tuple[str, ...], said: str):
    done = dpkit("plan-noise", *arguments)
    assert (done.code, done.out) == (1, "")
    assert said in done.err
    assert done.err.count("\n") == 1


@pytest.fixture
def _matplotlib() -> None:
    pytest.importorskip("matplotlib", reason="pictures take the extra `report`")


@pytest.mark.usefixtures("_matplotlib")
def test_a_picture_says_what_it_shows(dpkit: Run, tmp_path: Path):
    path = tmp_path / "plan.svg"
    done = dpkit("plan-noise", *FEW, "--plot", path, "--json")
    assert (done.code, done.json["plot"]) == (0, str(path))
    text = " ".join(ElementTree.fromstring(path.read_bytes()).itertext())
    for word in (
        "bands",
        "error of the running sums, in clipping norms",
        "epsilon 2 at delta = 1e-05; unit: one example; relation: zero_out; 60 steps",
        "recommended: BandMF(4), cyclic Poisson batches",
        "plain DP-SGD",
        "square root, fixed order",
        "BSR, fixed order",
        "BISR, fixed order",
        "BandMF, fixed order",
        "BandMF, cyclic Poisson",
    ):
        assert word in text, word
    again = tmp_path / "again.svg"
    dpkit("plan-noise", *FEW, "--plot", again)
    assert again.read_bytes() == path.read_bytes()


@pytest.mark.usefixtures("_matplotlib")
@pytest.mark.parametrize("relation", ["zero_out", "add_remove", "replace_one"])
@pytest.mark.parametrize("bands", ["1", "2,3,4,5,6,7,8,9,10,11,12,13"])
def test_whatever_is_left_out_there_is_a_picture_for_print(dpkit: Run, tmp_path: Path, relation: str, bands: str):
    path = tmp_path / "plan.PNG"
    rest = (*TARGET, "--num-examples", "60", "--batch-size", "4", "--steps", "20")
    done = dpkit("plan-noise", *rest, "--relation", relation, "--bands", bands, "--plot", path)
    assert done.code == 0, done.err
    assert done.out.splitlines()[-1] == f"wrote {path}"
    assert path.read_bytes()[:8] == b"\x89PNG\r\n\x1a\n"


@pytest.mark.parametrize("name", ["plan.pdf", "plan", "nowhere/plan.png", "there.svg"])
def test_a_picture_that_cannot_be_written_is_refused_beforehand(dpkit: Run, tmp_path: Path, name: str):
    there = tmp_path / "there.svg"
    there.write_text("mine", encoding="utf-8")
    done = dpkit("plan-noise", *FEW, "--plot", tmp_path / name)
    assert (done.code, done.out) == (1, "")
    assert f"--plot {tmp_path / name}" in done.err
    assert list(tmp_path.iterdir()) == [there]
    assert there.read_text(encoding="utf-8") == "mine"


def test_without_matplotlib_the_extra_is_named(dpkit: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    done = dpkit("plan-noise", *FEW, "--plot", tmp_path / "plan.png")
    assert (done.code, done.out) == (1, "")
    assert "dpkit[report]" in done.err


def test_the_printed_multiplier_is_the_evaluated_one(dpkit: Run):
    done = dpkit("plan-noise", *FEW, "--json").json
    plan = plan_noise(2.0, 1e-5, num_examples=600, batch_size=20, steps=60, bands=[1, 4])
    for row, choice in zip(done["choices"], plan.choices, strict=True):
        assert float(f"{row['noise_multiplier']:g}") == row["noise_multiplier"]
        assert math.isclose(epsilon(choice.event, 1e-5, relation=plan.relation).upper, row["epsilon"], abs_tol=1e-4)
