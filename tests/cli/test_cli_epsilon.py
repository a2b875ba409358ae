"""``dpkit epsilon`` and ``dpkit statement``: what they answer, and what they refuse to answer."""

from __future__ import annotations

import json
import shutil
import sqlite3
import subprocess
import sys
from pathlib import Path

import pytest

import accounting
from dpkit.cli.epsilon import shown, shown_below

from .conftest import Run

NUMBERS = ("--noise-multiplier", "1.1", "--sample-rate", "0.01", "--steps", "100", "--delta", "1e-5")
MEANING = {"delta", "unit", "relation", "sampling", "accountant"}
FIELDS = MEANING | {"epsilon", "committed_epsilon", "lower", "estimate", "slack"}


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
    assert done.json["slack"] == bound.upper - bound.lower


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


def test_one_accountant_can_be_asked_by_name(dpkit: Run):
    done = dpkit("epsilon", *NUMBERS, "--accountant", "rdp", "--json")
    assert done.json["accountant"] == "rdp"
    assert done.json["epsilon"] >= dpkit("epsilon", *NUMBERS, "--json").json["epsilon"]
    refused = dpkit("epsilon", *NUMBERS, "--accountant", "abacus")
    assert refused.code == 1
    assert "abacus" in refused.err and "rdp" in refused.err


SHUFFLED = ("--noise-multiplier", "0.7", "--sample-rate", "0.001", "--steps", "1000", "--delta", "1e-6")


@pytest.mark.parametrize("sampling", ["shuffled", "fixed-order"])
def test_a_loader_that_shuffles_gets_the_guarantee_and_poisson_under_another_name(dpkit: Run, sampling: str):
    done = dpkit("epsilon", *SHUFFLED, "--sampling", sampling, "--json").json
    # ACCOUNTING.md 6.3: 7.37 without amplification, at least 7.31 in truth, and 0.98 if batches were Poisson.
    assert done["epsilon"] == pytest.approx(7.37, abs=0.005)
    assert done["epsilon_if_poisson_NOT_A_GUARANTEE"] == pytest.approx(0.98, abs=0.005)
    assert (done["relation"], done["accountant"]) == ("zero_out", "gaussian")
    assert "1 pass" in done["sampling"] and "no amplification" in done["sampling"]
    text = dpkit("epsilon", *SHUFFLED, "--sampling", sampling).out
    assert text.startswith("epsilon <= 7.3")
    assert "if batches were Poisson (NOT this run): epsilon <= " in text
    assert "NOT A GUARANTEE" in text


def test_poisson_batches_have_no_second_number(dpkit: Run):
    done = dpkit("epsilon", *NUMBERS, "--json")
    assert not any("NOT_A_GUARANTEE" in name for name in done.json)


def test_shuffled_batches_under_replace_one_have_no_poisson_number(dpkit: Run):
    done = dpkit("epsilon", *SHUFFLED, "--sampling", "shuffled", "--relation", "replace_one", "--json").json
    assert done["epsilon"] == pytest.approx(7.37, abs=0.005)
    assert done["epsilon_if_poisson_NOT_A_GUARANTEE"] is None


def test_shuffled_batches_under_add_remove_are_refused_with_the_way_out(dpkit: Run):
    done = dpkit("epsilon", *SHUFFLED, "--sampling", "shuffled", "--relation", "add_remove")
    assert (done.code, done.out) == (1, "")
    assert "zero_out" in done.err


def test_a_delta_that_publishing_one_example_would_satisfy_is_warned_of(dpkit: Run):
    many, few = (
        dpkit("epsilon", *NUMBERS, "--num-examples", size, "--json").json["caveats"] for size in (100_000, 99_999)
    )
    assert [caveat for caveat in many if caveat not in few] == [many[0]] and "1/N" in many[0]
    assert [caveat.partition(":")[0] for caveat in few] == ["Assumed"]  # Poisson batches, as --sampling was left out


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
        ("epsilon", *NUMBERS, "--sampling", "shuffle"),
        ("epsilon", "somewhere", "--accountant", "rdp"),
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
    assert dpkit("statement", trained / "ledger.sqlite", "--json").json == stated
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


def test_commands_that_only_count_load_neither_torch_nor_each_other(tmp_path: Path, trained: Path):
    commands = {
        "epsilon": NUMBERS,
        "calibrate": ("--target-epsilon", "1", *NUMBERS[2:]),
        "curve": (*NUMBERS[:4], "--steps", "3", *NUMBERS[6:]),
        "plan-noise": ("--target-epsilon", "1", *NUMBERS[4:], "--num-examples", "90", "--batch-size", "9"),
        "tune-leak": (*NUMBERS, "--grid", "2"),
        "statement": (str(trained),),
        "init": ("example.yaml",),
    }
    code = (
        "import json, sys; from dpkit.cli import main; found = []\n"
        f"for name, words in {commands!r}.items():\n"
        "    assert main([name, *words]) == 0\n"
        "    found.append([name, *sorted({'torch', 'matplotlib', 'opacus', 'yaml'} & sys.modules.keys())])\n"
        "print(json.dumps(found))"
    )
    command = [sys.executable, "-c", code]
    done = subprocess.run(command, capture_output=True, text=True, cwd=tmp_path, check=True)
    found = json.loads(done.stdout.splitlines()[-1])
    # The last one reads what it wrote.
    assert found == [[name] for name in commands if name != "init"] + [["init", "yaml"]]


@pytest.mark.parametrize(
    ("value", "above", "below"),
    [
        (7.3727, "7.3727", "7.3727"),
        (1.13552, "1.1356", "1.1355"),
        (0.0, "0.0000", "0.0000"),
        (1e-12, "0.0001", "0.0000"),
    ],
)
def test_bounds_are_rounded_to_their_own_side(value: float, above: str, below: str):
    assert (shown(value), shown_below(value)) == (above, below)
    assert shown(float(above)) == above


def test_a_bound_of_the_data_set_below_the_data_set_is_refused(dpkit: Run):
    run = ("--noise-multiplier", "1.1", "--batch-size", "256", "--num-examples", "60000", "--steps", "10")
    done = dpkit("epsilon", *run, "--delta", "1e-5", "--cap", "257", "--max-examples", "256")
    assert done.code == 1 and "--max-examples is 256 and --num-examples is 60000" in done.err


def test_under_replace_one_the_factor_of_two_is_said(dpkit: Run):
    run = ("--noise-multiplier", "1.1", "--batch-size", "256", "--num-examples", "60000", "--steps", "10")
    done = dpkit("epsilon", *run, "--delta", "1e-5", "--sampling", "without-replacement", "--json")
    assert any("2C" in caveat for caveat in done.json["caveats"])
    assert any("drawn afresh" in caveat for caveat in done.json["caveats"])
