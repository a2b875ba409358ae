"""The experiment ``methods``: what is run, what is run again, and what the page makes of the runs."""

from __future__ import annotations

import json
import math
import statistics
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import nn

from dpkit.datasets import SensitiveAttribute, Split
from experiments import __main__ as command
from experiments import methods, methods_page, methods_runs
from experiments.methods import METHODS, TASKS, Task, final_runs, tuning_runs
from experiments.methods_page import Cell
from experiments.methods_runs import TUNING_SEED, Result, RunConfig, append, best_rate, read

TINY = Task(
    name="tiny",
    title="made-up rows",
    model=lambda: nn.Sequential(nn.Linear(4, 3), nn.Tanh(), nn.Linear(3, 2)),
    batch_size=100,
    passes=1,
    max_grad_norm=1.0,
    base_rate=0.5,
    num_examples=800,
    labels=2,
    groups="side",
)


def made_up(rows: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    generator = np.random.default_rng(rows)
    x = generator.normal(size=(rows, 4)).astype(np.float32)
    return x, (x[:, 0] > 0).astype(np.int64), (x[:, 1] > 0).astype(np.int64)


def tiny_split() -> Split:
    (x, y, side), (test_x, test_y, test_side) = made_up(800), made_up(30)
    return Split(x, y, test_x, test_y, classes=2, sensitive={"side": SensitiveAttribute(("a", "b"), side, test_side)})


@pytest.fixture
def tiny(monkeypatch: pytest.MonkeyPatch) -> Iterator[Task]:
    """A data set of 800 rows is the only one; eight batches of 100 are a pass."""
    monkeypatch.setattr(methods, "TASKS", {"tiny": TINY})
    monkeypatch.setattr(methods, "_loaded", lambda dataset, data_dir: tiny_split())
    yield TINY


@pytest.fixture
def counted(monkeypatch: pytest.MonkeyPatch) -> list[RunConfig]:
    """Runs are not run: their accuracy is made of rate and seed. The list holds which were asked for."""
    made: list[RunConfig] = []

    def run(config: RunConfig, data: Split, folder: Path) -> Result:
        made.append(config)
        return result_of(config, 0.5 + config.learning_rate / 10 + config.seed / 1000)

    monkeypatch.setattr(methods, "run", run)
    return made


def result_of(config: RunConfig, accuracy: float) -> Result:
    spent = None if config.epsilon is None else config.epsilon - 0.001
    return Result(config, accuracy, spent, 2, 36.0, "a machine", "2.13", "2026-11-21")


def call(*arguments: object) -> int:
    return methods.main([str(argument) for argument in arguments])


# -- methods ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", METHODS)
def test_every_method_takes_a_pass_of_private_steps_and_its_ledger_stays_within_the_target(
    name: str, tiny: Task, tmp_path: Path
):
    threads = torch.get_num_threads()
    config = tuning_runs(tiny, name)[1]
    result = methods.run(config, tiny_split(), tmp_path)
    assert result.config == config
    assert result.steps == 8
    assert 0 <= result.test_accuracy <= 1
    if config.epsilon is None:
        assert result.epsilon_spent is None
    else:
        assert result.epsilon_spent is not None
        assert 0.9 * config.epsilon < result.epsilon_spent <= config.epsilon
    assert list(tmp_path.iterdir()) == []  # the run folder is gone
    assert torch.get_num_threads() == threads


@pytest.mark.parametrize("task", TASKS.values(), ids=list(TASKS))
def test_the_settings_of_methods_are_all_different_and_the_same_when_asked_again(task: Task):
    settings = {name: methods.settings_of(task, name) for name in METHODS if name != "non-private"}
    assert len(set(settings.values())) == len(settings)
    assert settings == {name: methods.settings_of(task, name) for name in settings}
    assert [words for words in settings.values() if " at 0x" in words] == []


def test_the_models_take_the_data_and_have_the_size_that_the_page_tells():
    images, rows = torch.zeros(2, 28, 28), torch.zeros(2, 108)
    assert TASKS["fashion"].model()(images).shape == (2, 10)
    assert TASKS["adult"].model()(rows).shape == (2, 2)
    sizes = {name: sum(p.numel() for p in task.model().parameters()) for name, task in TASKS.items()}
    assert [name for name, size in sizes.items() if f"({size:,} parameters)" not in TASKS[name].title] == []


def test_private_runs_of_equal_seeds_start_equal_and_differ_by_their_noise(tiny: Task, tmp_path: Path):
    config = replace(final_runs(tiny, "flat", 0.5, 1)[0], epsilon=0.5)
    seen = []
    for _ in range(2):
        models: list[nn.Module] = []
        task = replace(tiny, model=lambda kept=models: kept.append(tiny.model()) or kept[0])
        methods.TASKS["tiny"] = task
        torch.manual_seed(config.seed)
        start = tiny.model().state_dict()["0.weight"].clone()
        methods.run(config, tiny_split(), tmp_path)
        seen.append((start, models[0].state_dict()["0.weight"].clone()))
    methods.TASKS["tiny"] = tiny
    assert torch.equal(seen[0][0], seen[1][0])
    assert not torch.equal(seen[0][1], seen[1][1])


# -- which runs -------------------------------------------------------------------------------------------------------


def test_every_method_is_tuned_over_the_same_multiples_and_not_with_a_seed_of_the_table(tiny: Task):
    for name, method in METHODS.items():
        rates = [config.learning_rate / (tiny.base_rate * method.factor) for config in tuning_runs(tiny, name)]
        assert rates == pytest.approx(list(methods.MULTIPLES))
        seeds = {config.seed for config in final_runs(tiny, name, 1.0, 50)}
        assert TUNING_SEED not in seeds
        assert len(seeds) == 50


def test_tuning_picks_the_rate_with_the_best_accuracy_and_none_before_all_are_there(tiny: Task):
    tuning = tuning_runs(tiny, "flat")
    results = {c: result_of(c, accuracy) for c, accuracy in zip(tuning, (0.7, 0.8, 0.75), strict=True)}
    assert best_rate(results, tuning) == tuning[1].learning_rate
    assert best_rate({c: result_of(c, 0.8) for c in tuning}, tuning) == min(c.learning_rate for c in tuning)
    del results[tuning[0]]
    assert best_rate(results, tuning) is None


def test_the_command_runs_tuning_and_then_all_seeds_and_epsilons_at_the_best_rate(
    tiny: Task, counted: list[RunConfig], tmp_path: Path
):
    assert call("--dataset", "tiny", "--methods", "flat,non-private", "--seeds", 2, "--out", tmp_path) == 0
    final = [config for config in counted if config.seed != TUNING_SEED]
    assert len(counted) - len(final) == 6
    flat = [config for config in final if config.method == "flat"]
    assert sorted((c.seed, c.epsilon) for c in flat) == [(s, e) for s in (0, 1) for e in (1.0, 3.0, 8.0)]
    # The made-up accuracy grows with the rate.
    assert {c.learning_rate for c in flat} == {tiny.base_rate * max(methods.MULTIPLES)}
    assert [(c.seed, c.epsilon) for c in final if c.method == "non-private"] == [(0, None), (1, None)]


# -- resuming ---------------------------------------------------------------------------------------------------------


def test_a_second_call_runs_nothing_and_more_seeds_only_what_is_missing(
    tiny: Task, counted: list[RunConfig], tmp_path: Path
):
    arguments = ("--dataset", "tiny", "--methods", "flat", "--out", tmp_path)
    assert call(*arguments, "--seeds", 1) == 0
    assert len(counted) == 3 + 3
    counted.clear()
    assert call(*arguments, "--seeds", 1) == 0
    assert counted == []
    assert call(*arguments, "--seeds", 2) == 0
    assert [config.seed for config in counted] == [1, 1, 1]


@pytest.mark.parametrize("kept", [1, 40, -1])
def test_a_line_that_was_cut_off_is_ignored_and_its_run_is_run_again(
    kept: int, tiny: Task, counted: list[RunConfig], tmp_path: Path
):
    arguments = ("--dataset", "tiny", "--methods", "flat", "--seeds", 1, "--out", tmp_path)
    assert call(*arguments) == 0
    file = tmp_path / "methods.jsonl"
    whole = read(file)
    before, last = file.read_bytes().removesuffix(b"\n").rsplit(b"\n", 1)
    file.write_bytes(before + b"\n" + last[:kept])
    counted.clear()
    assert call(*arguments) == 0
    assert len(counted) == 1
    assert read(file) == whole
    assert file.read_bytes().endswith(b"\n")


def test_runs_of_other_settings_do_not_count(
    tiny: Task, counted: list[RunConfig], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    arguments = ("--dataset", "tiny", "--methods", "flat", "--seeds", 1, "--out", tmp_path)
    assert call(*arguments) == 0
    counted.clear()
    monkeypatch.setattr(methods, "TASKS", {"tiny": replace(TINY, max_grad_norm=2.0)})
    assert call(*arguments) == 0
    assert len(counted) == 6


def test_a_run_that_fails_does_not_end_the_others(
    tiny: Task, counted: list[RunConfig], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
):
    made_up_run = methods.run

    def run(config: RunConfig, data: Split, folder: Path) -> Result:
        if config.epsilon == 8.0:
            raise methods.InvalidArgument("noise_std is too small")
        return made_up_run(config, data, folder)

    monkeypatch.setattr(methods, "run", run)
    assert call("--dataset", "tiny", "--methods", "flat", "--seeds", 1, "--out", tmp_path) == 1
    assert "tiny, flat, epsilon 8" in capsys.readouterr().err
    assert {config.epsilon for config in read(tmp_path / "methods.jsonl")} == {1.0, 3.0}
    assert "not run" in (tmp_path / "methods.md").read_text(encoding="utf-8")


def test_workers_hand_back_why_a_run_failed(tmp_path: Path):
    config = tuning_runs(TASKS["adult"], "flat")[0]
    [(same, result)] = methods._finished([config], tmp_path, tmp_path / "nowhere", workers=2)
    assert same == config
    assert isinstance(result, str)
    assert result.startswith("DataError: ")


def test_a_line_that_is_no_result_is_refused_by_its_number(tiny: Task, tmp_path: Path, capsys: pytest.CaptureFixture):
    file = tmp_path / "methods.jsonl"
    append(file, result_of(tuning_runs(tiny, "flat")[0], 0.5))
    with file.open("a", encoding="utf-8") as lines:
        lines.write('{"accuracy": 1}\n')
    assert call("--table", "--out", tmp_path) == 1
    assert "line 2" in capsys.readouterr().err


# -- the page ---------------------------------------------------------------------------------------------------------

ACCURACIES = {"flat": (0.80, 0.81, 0.82), "per-layer": (0.70, 0.72, 0.74), "auto-s": (0.80, 0.82, 0.84)}


@pytest.fixture
def page(tiny: Task, tmp_path: Path) -> str:
    """The page of three seeds of three methods at every ε, and of one without privacy."""
    file = tmp_path / "methods.jsonl"
    for name, accuracies in ACCURACIES.items():
        tuning = tuning_runs(tiny, name)
        for config, accuracy in zip(tuning, (0.9, 0.6, 0.7), strict=True):
            append(file, result_of(config, accuracy))
        for config in final_runs(tiny, name, tuning[0].learning_rate, 3):
            append(file, result_of(config, accuracies[config.seed]))
    for config in tuning_runs(tiny, "non-private"):
        append(file, result_of(config, 0.9))
    append(
        file, result_of(final_runs(tiny, "non-private", tuning_runs(tiny, "non-private")[0].learning_rate, 1)[0], 0.95)
    )
    assert call("--table", "--seeds", 3, "--out", tmp_path) == 0
    return (tmp_path / "methods.md").read_text(encoding="utf-8")


def row(page: str, method: str, after: str = "| method | ε = 1 |") -> list[str]:
    table = page.partition(after)[2].partition("\n\n")[0]
    [line] = [line for line in table.splitlines() if line.startswith(f"| {method} |")]
    return [cell.strip() for cell in line.strip("|").split("|")]


def test_the_table_has_mean_and_standard_deviation(page: str):
    # By hand: 0.80, 0.81, 0.82 have mean 0.81 and deviation sqrt((0.01² + 0 + 0.01²)/2) = 0.01.
    assert row(page, "flat") == ["flat", "0.8100 ± 0.0100", "0.8100 ± 0.0100", "0.8100 ± 0.0100"]
    assert "Without privacy: 0.9500 (one run)" in page


def test_only_differences_beyond_two_standard_errors_are_marked(page: str):
    # per-layer: -0.09 with standard error sqrt(0.02²/3 + 0.01²/3) = 0.0129; auto-s: +0.01 with the same error.
    assert row(page, "per-layer")[1] == "0.7200 ± 0.0200 ▼"
    assert row(page, "auto-s")[1] == "0.8200 ± 0.0200"
    difference, error = Cell(ACCURACIES["per-layer"]).difference(Cell(ACCURACIES["flat"]))
    assert (difference, error) == pytest.approx((-0.09, math.sqrt((4e-4 + 1e-4) / 3)))
    assert "-9.0 ± 1.3" in row(page, "per-layer", "| method | claim |")


def test_a_best_rate_at_the_border_of_the_grid_is_told(page: str):
    cells = row(page, "flat", "| method | factor |")
    assert cells[2].startswith("**0.2: 0.9")
    assert cells[-1] == "yes, low"


def test_the_page_tells_hours_and_the_epsilon_of_the_ledgers(page: str):
    runs = 3 * (3 + 9) + 3 + 1
    assert f"{runs} runs, {runs * 36 / 3600:.2f} core-hours" in page
    assert "0.9990; 2.9990; 7.9990" in page
    assert "Tuning is not charged" in page
    # Two methods at three ε; of Student's t with 4 degrees of freedom 11.6 % lie beyond 2.
    assert "with probability 0.12, so that chance alone marks about 1 of 6 comparisons" in page


def test_plots_are_written_and_what_was_written_by_hand_stays(page: str, tmp_path: Path):
    assert (tmp_path / "methods_tiny.png").read_bytes().startswith(b"\x89PNG")
    begin, end = methods_page.BEGIN, methods_page.END
    path = tmp_path / "methods.md"
    before, rest = page.split(begin)
    path.write_text(f"{before}{begin}\n\nSeen: nothing.\n\n{end}{rest.split(end)[1]}", encoding="utf-8")
    assert call("--table", "--seeds", 3, "--out", tmp_path) == 0
    assert path.read_text(encoding="utf-8") == page.replace(methods_page._TO_BE_WRITTEN, "Seen: nothing.")


def test_missing_runs_are_named_and_an_empty_file_gives_a_page(page: str, tiny: Task, tmp_path: Path):
    assert call("--table", "--seeds", 3, "--out", tmp_path / "empty") == 0
    assert "No run is there yet" in (tmp_path / "empty" / "methods.md").read_text(encoding="utf-8")
    lines = (tmp_path / "methods.jsonl").read_text(encoding="utf-8").splitlines()
    kept = [line for line in lines if json.loads(line)["config"] != json.loads(lines[3])["config"]]
    (tmp_path / "methods.jsonl").write_text("\n".join(kept) + "\n", encoding="utf-8")
    assert call("--table", "--seeds", 3, "--out", tmp_path) == 0
    assert "Not complete: flat at ε = 1 (runs: 2)" in (tmp_path / "methods.md").read_text(encoding="utf-8")


def test_a_single_run_has_no_deviation_and_no_mark(tiny: Task, tmp_path: Path):
    for name, accuracy in (("flat", 0.5), ("per-layer", 0.9)):
        tuning = tuning_runs(tiny, name)
        for config in (*tuning, *final_runs(tiny, name, tuning[0].learning_rate, 1)):
            append(tmp_path / "methods.jsonl", result_of(config, accuracy))
    assert call("--table", "--seeds", 1, "--out", tmp_path) == 0
    text = (tmp_path / "methods.md").read_text(encoding="utf-8")
    assert row(text, "per-layer")[1:] == ["0.9000 (one run)"] * 3
    assert "+40.0 (few runs)" in row(text, "per-layer", "| method | claim |")
    assert Cell((0.5, 0.7)).deviation == pytest.approx(statistics.stdev([0.5, 0.7]))


# -- the command ------------------------------------------------------------------------------------------------------


def test_without_a_data_folder_it_names_the_variable(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
):
    monkeypatch.delenv("DPKIT_DATA", raising=False)
    assert call("--dataset", "adult", "--out", tmp_path) == 1
    assert "DPKIT_DATA" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("arguments", "named"),
    [
        (("--dataset", "cifar"), "'cifar'"),
        (("--methods", "flat,sharp"), "'sharp'"),
        (("--seeds", "0"), "--seeds is 0"),
        (("--workers", "0"), "--workers is 0"),
    ],
)
def test_wrong_input_is_named(arguments: tuple[str, ...], named: str, tmp_path: Path, capsys: pytest.CaptureFixture):
    assert call(*arguments, "--out", tmp_path) == 1
    assert named in capsys.readouterr().err


def test_experiments_are_listed_and_found_by_name(tmp_path: Path, capsys: pytest.CaptureFixture):
    assert command.main([]) == 0
    assert {"data", "methods"} <= set(capsys.readouterr().out.split())
    assert command.main(["nothing"]) == 1
    assert "'nothing'" in capsys.readouterr().err
    assert command.main(["data", "digits"]) == 0
    assert command.main(["methods", "--table", "--out", str(tmp_path)]) == 0


def test_an_interrupt_keeps_what_is_done(
    tiny: Task, counted: list[RunConfig], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    made_up_run = methods.run

    def run(config: RunConfig, data: Split, folder: Path) -> Result:
        if len(counted) == 2:
            raise KeyboardInterrupt
        return made_up_run(config, data, folder)

    monkeypatch.setattr(methods, "run", run)
    assert call("--dataset", "tiny", "--methods", "flat", "--out", tmp_path) == 130
    assert len(methods_runs.read(tmp_path / "methods.jsonl")) == 2
