"""``dpkit epsilon`` and ``dpkit statement``: what they answer, and what they refuse to answer."""

from __future__ import annotations

import shutil
import sqlite3
import subprocess
import sys
from pathlib import Path

import pytest

import accounting

from .conftest import Run

NUMBERS = ("--noise-multiplier", "1.1", "--sample-rate", "0.01", "--steps", "100", "--delta", "1e-5")
FIELDS = {"epsilon", "committed_epsilon", "lower", "estimate", "delta", "unit", "relation", "sampling", "accountant"}


def test_numbers_give_the_accountants_bound_with_all_that_it_means(dpkit: Run):
    done = dpkit("epsilon", *NUMBERS, "--json")
    noise = accounting.Gaussian(noise_multiplier=1.1)
    event = accounting.Repeated(event=accounting.Poisson(sample_rate=0.01, event=noise), count=100)
    bound = accounting.epsilon(event, 1e-5, relation=accounting.Relation.ADD_REMOVE)
    assert done.code == 0
    assert done.json.keys() >= FIELDS
    assert done.json["epsilon"] >= bound.upper
    assert done.json["epsilon"] == pytest.approx(bound.upper, abs=1e-4)
    assert done.json["lower"] <= done.json["estimate"] <= done.json["epsilon"]
    assert (done.json["delta"], done.json["unit"], done.json["relation"]) == (1e-5, "example", "add_remove")
    assert done.json["sampling"] == "Poisson, rate 0.01"


def test_epsilon_is_never_printed_without_its_meaning(dpkit: Run):
    text = dpkit("epsilon", *NUMBERS).out
    for word in ("delta = 1e-05", "one example", "add_remove", "Poisson", "accountant"):
        assert word in text


def test_a_full_batch_needs_no_sampling_and_gives_the_exact_value(dpkit: Run):
    done = dpkit("epsilon", "--noise-multiplier", 5, "--sample-rate", 1, "--steps", 4, "--delta", "1e-5", "--json")
    assert done.json["accountant"] == "gaussian"
    assert done.json["lower"] == pytest.approx(done.json["epsilon"], abs=1e-3)


def test_cutting_large_batches_costs_something_under_add_remove(dpkit: Run):
    plain = dpkit("epsilon", *NUMBERS, "--json").json["epsilon"]
    cut = dpkit("epsilon", *NUMBERS, "--cap", 12, "--max-examples", 1000, "--json").json
    assert cut["epsilon"] > plain
    assert "larger draws cut to 12" in cut["sampling"]


def test_replace_one_of_sampled_batches_is_refused_with_a_reason(dpkit: Run):
    done = dpkit("epsilon", *NUMBERS, "--relation", "replace_one")
    assert done.code == 1
    assert done.out == ""
    assert done.err.startswith("error: ")


@pytest.mark.parametrize(("limit", "code"), [("100", 0), ("0.01", 2), ("nan", 2)])
def test_more_than_max_epsilon_exits_with_2_and_still_answers(dpkit: Run, limit: str, code: int):
    done = dpkit("epsilon", *NUMBERS, "--max-epsilon", limit, "--json")
    assert done.code == code
    assert done.json["epsilon"] > 0
    assert ("--max-epsilon" in done.err) == (code == 2)


def test_the_gate_asks_for_the_committed_epsilon_of_a_run_that_was_stopped(dpkit: Run, tmp_path: Path):
    event = accounting.Poisson(sample_rate=0.1, event=accounting.Gaussian(noise_multiplier=1.0))
    plan = accounting.PlanRecord(event, 50, 1.00000049e-5, accounting.Relation.ADD_REMOVE, "example", 1000)
    budget = accounting.Budget(epsilon=100.0, delta=1e-4)
    with accounting.Ledger.create(tmp_path / "ledger.sqlite", dataset_name="d", budget=budget) as ledger:
        ledger.charge(plan, event)
        spent = ledger.spent()
    limit = (spent.epsilon + spent.committed_epsilon) / 2
    done = dpkit("epsilon", tmp_path, "--max-epsilon", limit, "--json")
    assert done.code == 2
    assert "committed epsilon" in done.err
    assert done.json["epsilon"] < limit < done.json["committed_epsilon"]
    assert dpkit("epsilon", tmp_path, "--max-epsilon", done.json["committed_epsilon"]).code == 0
    assert "committed" in " ".join(dpkit("epsilon", "--help").out.split())
    assert "delta = 1.00001e-05" in dpkit("epsilon", tmp_path).out
    assert done.json["delta"] == 1.00000049e-5


def test_a_delta_is_printed_rounded_up(dpkit: Run):
    numbers = ("--noise-multiplier", "0.02", "--sample-rate", "1", "--steps", "1", "--delta", "0.5000004")
    assert "delta = 0.500001" in dpkit("epsilon", *numbers).out
    assert "delta 0.500001" in dpkit("epsilon", *numbers, "--max-epsilon", "1").err


@pytest.mark.parametrize(
    "arguments",
    [
        ("epsilon", "--noise-multiplier", "1.1"),
        ("epsilon", *NUMBERS, "--cap", "5"),
        ("epsilon", *NUMBERS[:-1], "2"),
        ("epsilon", *NUMBERS[:-1], "nan"),
        ("epsilon", "--noise-multiplier", "0", *NUMBERS[2:]),
        ("epsilon", "--noise-multiplier", "x", *NUMBERS[2:]),
        ("epsilon", *NUMBERS, "--no-such-option"),
        ("epsilon", *NUMBERS, "--relation", "sideways"),
        ("epsilon", "somewhere", *NUMBERS),
        ("no-such-command",),
        ("statement",),
    ],
)
def test_wrong_input_is_one_line_and_exits_with_1(dpkit: Run, arguments: tuple[str, ...]):
    done = dpkit(*arguments)
    assert done.code == 1
    assert done.out == ""
    assert done.err.startswith("error: ")
    assert done.err.count("\n") == 1


def test_a_run_folder_and_its_ledger_give_the_same_answer(dpkit: Run, trained: Path):
    by_folder = dpkit("epsilon", trained, "--json")
    by_file = dpkit("epsilon", trained / "ledger.sqlite", "--json")
    assert by_folder.json == by_file.json
    assert by_folder.json.keys() >= FIELDS
    assert 0 < by_folder.json["epsilon"] <= by_folder.json["committed_epsilon"] <= 3.0
    assert by_folder.json["relation"] == "zero_out"
    assert by_folder.json["steps"] == 6
    assert dpkit("epsilon", trained, "--max-epsilon", 1).code == 2


def test_the_statement_says_everything_in_both_forms(dpkit: Run, trained: Path):
    stated = dpkit("statement", trained, "--json").json
    assert stated["epsilon"] <= 3.0
    assert stated["delta"] == 1e-4
    assert stated["certified"] is True
    text = dpkit("statement", trained).out
    for word in ("epsilon", "delta = 0.0001", "unit: one example", "relation: ", "Poisson", "accountant", "CERTIFIED"):
        assert word in text


def test_reading_leaves_the_ledger_as_it_is(dpkit: Run, trained: Path):
    before = (trained / "ledger.sqlite").read_bytes()
    dpkit("statement", trained)
    dpkit("epsilon", trained)
    assert (trained / "ledger.sqlite").read_bytes() == before


def _cut(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-5000])


def _scribble(path: Path) -> None:
    path.write_text("this was a ledger", encoding="utf-8")


def _drop_last_charge(path: Path) -> None:
    with sqlite3.connect(path) as database:
        [(table,)] = [
            (name,)
            for (name,) in database.execute("SELECT name FROM sqlite_master WHERE type = 'table'").fetchall()
            if database.execute(f"SELECT COUNT(*) FROM {name}").fetchone()[0] > 2
        ]
        database.execute(f"DELETE FROM {table} WHERE rowid = (SELECT MAX(rowid) FROM {table})")
    database.close()


@pytest.mark.parametrize("damage", [_cut, _scribble, _drop_last_charge, Path.unlink])
@pytest.mark.parametrize("command", ["epsilon", "statement"])
def test_a_ledger_that_cannot_be_verified_exits_with_4_and_no_epsilon(
    dpkit: Run, trained: Path, tmp_path: Path, damage, command: str
):
    folder = tmp_path / "copy"
    shutil.copytree(trained, folder)
    damage(folder / "ledger.sqlite")
    done = dpkit(command, folder, "--json")
    assert done.code == 4
    assert done.out == ""
    assert done.err.startswith("error: ")
    assert "Traceback" not in done.err


def test_debug_shows_the_traceback(dpkit_process: Run, monkeypatch: pytest.MonkeyPatch):
    assert "Traceback" not in dpkit_process("statement", "nowhere").err
    assert "Traceback" in dpkit_process("statement", "nowhere", "--debug").err
    monkeypatch.setenv("DPKIT_DEBUG", "1")
    assert "Traceback" in dpkit_process("statement", "nowhere").err


def test_the_shell_sees_the_exit_codes(dpkit_process: Run):
    assert dpkit_process("--help").code == 0
    assert dpkit_process("epsilon", *NUMBERS, "--max-epsilon", "0.01").code == 2
    assert dpkit_process("epsilon", "--no-such-option").code == 1
    assert dpkit_process("statement", "nowhere").code == 4


@pytest.mark.parametrize("arguments", [("epsilon", *NUMBERS), ("statement", "RUN"), ("init", "example.yaml")])
def test_commands_that_only_count_do_not_load_torch(tmp_path: Path, trained: Path, arguments: tuple[str, ...]):
    words = [str(trained) if word == "RUN" else word for word in arguments]
    code = (
        f"import sys; from dpkit.cli import main; code = main({words!r}); print('torch' in sys.modules); sys.exit(code)"
    )
    command = [sys.executable, "-c", code]
    done = subprocess.run(command, capture_output=True, text=True, cwd=tmp_path, check=True)
    assert done.stdout.splitlines()[-1] == "False"
