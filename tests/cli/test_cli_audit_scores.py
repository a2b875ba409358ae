"""``dpkit audit scores``: the bound, the verdict and its exit code, and what it refuses."""

from __future__ import annotations

import math
import sqlite3
import subprocess
import sys
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

import numpy as np
import pytest

import accounting
from accounting import Budget, Event, Gaussian, Ledger, PlanRecord, Poisson, Relation
from dpkit.audit import clopper_pearson, family_inversion, gaussian_dp, one_run, one_run_f_dp, scaled
from dpkit.cli.terminal import CONTRADICTED

from .conftest import Run

METHODS = ("one-run", "one-run-f-dp", "clopper-pearson", "family", "gaussian")
EVENT = Gaussian(5.0)
STEPS = 20
MU = math.sqrt(STEPS) / 5.0  # of the whole run


@pytest.fixture
def files(tmp_path: Path) -> Any:
    """``files(mu, inside, outside)``: options that name two files of Gaussian scores."""

    def write(mu: float = MU, inside: int = 2010, outside: int = 1990) -> tuple[str, Path, str, Path]:
        draw = np.random.default_rng(3)
        one, other = tmp_path / "in.npy", tmp_path / "out.csv"
        np.save(one, draw.normal(mu, 1, inside))
        np.savetxt(other, draw.normal(0, 1, outside), header="score", comments="")
        return "--scores-in", one, "--scores-out", other

    return write


@pytest.fixture
def ledger(tmp_path: Path) -> Any:
    """``ledger(...)``: the folder of a run of 20 steps with full batches, charged in full."""

    def make(name: str = "run", charged: int = STEPS, event: Event = EVENT, plans: int = 1, **changes: Any) -> Path:
        folder = tmp_path / name
        folder.mkdir()
        facts = {"certified": True} | changes.pop("facts", {})
        with Ledger.create(folder / "ledger.sqlite", dataset_name="digits", budget=Budget(100.0, 1e-3)) as book:
            for _ in range(plans):
                record = PlanRecord(
                    event=event,
                    steps=STEPS,
                    delta=1e-5,
                    relation=changes.get("relation", Relation.ZERO_OUT),
                    unit="example",
                    num_examples=1437,
                    facts=facts,
                )
                for _ in range(charged):
                    book.charge(record, event)
        return folder

    return make


def expected(method: str, inside: np.ndarray, outside: np.ndarray) -> float:
    both = np.concatenate([inside, outside]), np.repeat([True, False], [len(inside), len(outside)])
    family = {"relation": Relation.ZERO_OUT, "delta": 1e-5}
    event = accounting.Repeated(EVENT, STEPS)
    match method:
        case "one-run":
            return one_run(*both, delta=1e-5).epsilon
        case "one-run-f-dp":
            return one_run_f_dp(*both, lambda scale: scaled(event, scale), **family).epsilon
        case "clopper-pearson":
            return clopper_pearson(inside, outside, delta=1e-5).epsilon
        case "family":
            return family_inversion(inside, outside, lambda scale: scaled(event, scale), **family).epsilon
        case _:
            return gaussian_dp(inside, outside, delta=1e-5).epsilon


@pytest.mark.parametrize("method", METHODS)
def test_the_bound_is_the_estimators_and_names_its_experiment(dpkit: Run, files: Any, ledger: Any, method: str):
    given = files()
    done = dpkit("audit", "scores", *given, "--ledger", ledger(), "--method", method, "--json")
    assert done.code == 0
    inside, outside = np.load(given[1]), np.loadtxt(given[3], skiprows=1)
    assert done.json["epsilon"] == expected(method, inside, outside)
    assert 0 < done.json["epsilon"] <= done.json["claim"]
    assert done.json["contradicted"] is False
    assert (done.json["delta"], done.json["scores_in"], done.json["scores_out"]) == (1e-5, 2010, 1990)
    [experiment, *_] = done.json["assumptions"]
    assert ("fair coin" if method.startswith("one-run") else "independent draws") in experiment


def test_the_claim_of_a_ledger_is_that_of_its_charged_steps(dpkit: Run, files: Any, ledger: Any):
    for charged in (STEPS, 7):
        run = ledger(f"run{charged}", charged)
        done = dpkit("audit", "scores", *files(), "--ledger", run, "--json").json
        bound = accounting.epsilon(accounting.Repeated(EVENT, charged), 1e-5, relation=Relation.ZERO_OUT)
        assert done["claim"] == accounting.round_up(bound.upper)
        assert "'digits'" in done["claim_source"]
        same = dpkit("audit", "scores", *files(), "--ledger", run / "ledger.sqlite", "--json").json
        assert same["claim"] == done["claim"]


@pytest.mark.parametrize("method", METHODS)
def test_a_run_with_too_little_noise_is_contradicted(dpkit: Run, files: Any, ledger: Any, method: str):
    given = files(mu=9 * MU if method in ("one-run", "clopper-pearson") else 3 * MU)
    done = dpkit("audit", "scores", *given, "--ledger", ledger(), "--method", method)
    assert (done.code, done.err) == (CONTRADICTED, "")
    assert CONTRADICTED == 3
    assert done.out.startswith("CONTRADICTED: epsilon >= ")
    assert "private" not in done.out


def test_a_typed_claim_is_compared(dpkit: Run, files: Any):
    given = (*files(), "--delta", "1e-5")
    bound = dpkit("audit", "scores", *given, "--json")
    assert (bound.code, bound.json["claim"]) == (0, None)
    for claim, code in ((bound.json["epsilon"] * 0.99, CONTRADICTED), (bound.json["epsilon"] * 1.01, 0)):
        done = dpkit("audit", "scores", *given, "--claim", claim)
        assert done.code == code
        assert "(typed)" in done.out
    assert dpkit("audit", "scores", *given).out.startswith("no contradiction found")


def test_a_seeded_run_is_not_certified_whatever_is_found(dpkit: Run, files: Any, ledger: Any):
    facts = {"certified": False, "certified_reason": "noise_seed was given"}
    run = ledger(facts=facts)
    done = dpkit("audit", "scores", *files(), "--ledger", run)
    assert done.code == 0
    assert "CERTIFIED: NO (noise_seed was given)" in done.out
    read = dpkit("audit", "scores", *files(), "--ledger", run, "--json").json
    assert (read["certified"], read["certified_reason"]) == (False, "noise_seed was given")
    assert "CERTIFIED" not in dpkit("audit", "scores", *files(), "--ledger", ledger("other")).out


def test_a_ledger_that_was_changed_is_not_believed(dpkit: Run, files: Any, ledger: Any):
    run = ledger()
    with sqlite3.connect(run / "ledger.sqlite") as database:
        names = [name for (name,) in database.execute("select name from sqlite_master where type = 'table'")]
        for name in names:
            database.execute(f"delete from {name} where rowid = (select max(rowid) - 3 from {name})")
    database.close()
    done = dpkit("audit", "scores", *files(), "--ledger", run)
    assert (done.code, done.out) == (4, "")


def test_unequal_numbers_are_refused_where_a_fair_coin_is_assumed(dpkit: Run, files: Any):
    given = (*files(inside=1200, outside=800), "--delta", "1e-5")
    done = dpkit("audit", "scores", *given)
    assert (done.code, done.out) == (1, "")
    assert "1200 canaries were used and 800 were not" in done.err
    assert dpkit("audit", "scores", *given, "--method", "clopper-pearson").code == 0


@pytest.mark.parametrize(
    ("options", "named"),
    [
        ((), "missing --delta"),
        (("--delta", "0"), "--delta is 0"),
        (("--delta", "nan"), "--delta is nan"),
        (("--delta", "1e-5", "--claim", "-1"), "--claim is -1"),
        (("--delta", "1e-5", "--claim", "nan"), "--claim is nan"),
        (("--delta", "1e-5", "--confidence", "1"), "--confidence is 1"),
        (("--delta", "1e-5", "--method", "family"), "give --ledger"),
        (("--delta", "1e-5", "--method", "one-run-f-dp", "--claim", "3"), "give --ledger"),
        (("--delta", "1e-5", "--method", "magic"), "magic"),
        (("--delta", "1e-5", "--dataset-name", "digits"), "--dataset-name"),
        (("--delta", "1e-5", "--plot", "a.pdf"), "a.pdf"),
        (("--ledger", "LEDGER", "--claim", "3"), "--claim and --ledger"),
        (("--ledger", "LEDGER", "--delta", "1e-6"), "--delta is 1e-06"),
        (("--ledger", "LEDGER", "--dataset-name", "adult"), "data set 'digits', not 'adult'"),
    ],
)
def test_options_that_do_not_fit_are_refused(dpkit: Run, files: Any, ledger: Any, options: tuple[str, ...], named: str):
    given = [ledger() if option == "LEDGER" else option for option in options]
    done = dpkit("audit", "scores", *files(), *given)
    assert (done.code, done.out) == (1, "")
    assert named in done.err
    assert len(done.err.splitlines()) == 1


@pytest.mark.parametrize(
    ("change", "named"),
    [
        (lambda scores: -scores, "score lower"),
        (np.ones_like, "All scores are the same"),
        (lambda scores: np.arange(len(scores), dtype=float), "Both files hold the same"),
    ],
    ids=["losses", "constant", "equal"],
)
def test_scores_that_no_attack_gives_are_not_passed_over(dpkit: Run, tmp_path: Path, change: Any, named: str):
    draw = np.random.default_rng(3)
    for name, mean in (("in", 3.0), ("out", 0.0)):
        np.save(tmp_path / f"{name}.npy", change(draw.normal(mean, 1, 200)))
    options = ("--scores-in", tmp_path / "in.npy", "--scores-out", tmp_path / "out.npy", "--delta", "1e-5")
    done = dpkit("audit", "scores", *options, "--claim", "1")
    assert done.code == 0 and named in done.out
    assert named in dpkit("audit", "scores", *options, "--json").json["looks_wrong"][0]


def test_a_ledger_that_agrees_is_taken(dpkit: Run, files: Any, ledger: Any):
    run = ledger()
    assert dpkit("audit", "scores", *files(), "--ledger", run, "--delta", "1e-5", "--dataset-name", "digits").code == 0


def test_a_ledger_without_a_charge_or_with_several_runs_says_what_it_can(dpkit: Run, files: Any, ledger: Any):
    done = dpkit("audit", "scores", *files(), "--ledger", ledger("empty", charged=0))
    assert (done.code, "nothing to audit" in done.err) == (1, True)
    several = ledger("several", plans=2)
    done = dpkit("audit", "scores", *files(), "--ledger", several, "--json")
    assert (done.code, done.json["delta"]) == (0, 2e-5)
    for method in ("family", "gaussian"):
        done = dpkit("audit", "scores", *files(), "--ledger", several, "--method", method)
        assert (done.code, "several runs" in done.err) == (1, True)


def test_a_gaussian_null_is_refused_for_sampled_batches(dpkit: Run, files: Any, ledger: Any):
    run = ledger(event=Poisson(0.5, EVENT))
    done = dpkit("audit", "scores", *files(), "--ledger", run, "--method", "gaussian")
    assert (done.code, done.out) == (1, "")
    assert "no lower bound where batches are sampled" in done.err
    # These are scores of full batches, which a run at rate 0.5 could not have.
    assert dpkit("audit", "scores", *files(), "--ledger", run, "--method", "family").code == CONTRADICTED


def test_files_are_refused_with_name_and_line(dpkit: Run, files: Any, tmp_path: Path):
    given = files()
    for content, named in (("1\n" * 60 + "nan\n", "line 61: nan"), ("1\n" * 49, "holds 49 scores")):
        (tmp_path / "bad.txt").write_text(content)
        done = dpkit("audit", "scores", "--scores-in", tmp_path / "bad.txt", *given[2:], "--delta", "1e-5")
        assert (done.code, done.out) == (1, "")
        assert "bad.txt" in done.err
        assert named in done.err
    done = dpkit("audit", "scores", *given[:2], "--scores-out", tmp_path / "none.txt", "--delta", "1e-5")
    assert (done.code, "none.txt is no file" in done.err) == (1, True)


@pytest.mark.parametrize("method", METHODS)
def test_a_picture_shows_claim_and_evidence(dpkit: Run, files: Any, ledger: Any, tmp_path: Path, method: str):
    pytest.importorskip("matplotlib", reason="pictures take the extra `report`")
    path = tmp_path / "audit.svg"
    given = (*files(), "--ledger", ledger(), "--method", method, "--plot", path)
    assert f"wrote {path}" in dpkit("audit", "scores", *given).out
    text = " ".join(ElementTree.fromstring(path.read_bytes()).itertext())
    for word in ("no contradiction found: epsilon >=", "claim: epsilon <=", "'digits'", "at the lower bound, 95 %"):
        assert word in text, word
    assert ("upper bounds of both errors" in text) is (method in ("clopper-pearson", "gaussian"))
    again = dpkit("audit", "scores", *given)
    assert (again.code, "exists already" in again.err) == (1, True)


def test_it_loads_no_torch(files: Any):
    arguments = ["audit", "scores", *map(str, files()), "--delta", "1e-5"]
    code = f"import sys; from dpkit.cli import main; print(main({arguments}), 'torch' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.splitlines()[-1] == "0 False"
