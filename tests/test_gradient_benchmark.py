"""The benchmark of the gradient core runs, and its contestants compute the same clipped sum. No time is judged here."""

from __future__ import annotations

import json
import math

import pytest
import torch
from typer import Typer
from typer.testing import CliRunner

from experiments.benchmarks import gradients as benchmark

APP = Typer()
APP.command()(benchmark.main)
TINY = next(each for each in benchmark.WORKLOADS if each.name.startswith("tiny MLP"))


@pytest.fixture(autouse=True)
def threads_and_warnings_as_they_were(monkeypatch):
    monkeypatch.setattr(benchmark, "AT_LEAST", 0.0)  # one step in each round
    monkeypatch.setattr(benchmark, "quiet", lambda: None)
    threads = torch.get_num_threads()
    yield
    torch.set_num_threads(threads)


def clipped_sum(workload, per_layer):
    """By one backward pass for each example."""
    model, (x, y) = workload.make("cpu"), workload.batch("cpu")
    layers = [module for module in model.modules() if list(module.parameters(recurse=False))]
    groups = [list(layer.parameters()) for layer in layers] if per_layer else [list(model.parameters())]
    bound = benchmark.BOUND / math.sqrt(len(groups))
    total = {parameter: torch.zeros_like(parameter) for parameter in model.parameters()}
    for row in range(workload.size):
        [loss] = workload.losses(model, (x[row : row + 1], y[row : row + 1]))
        model.zero_grad()
        loss.backward()
        for group in groups:
            norm = torch.stack([parameter.grad.norm() for parameter in group]).norm()
            for parameter in group:
                total[parameter] += parameter.grad * min(1.0, bound / float(norm))
    return list(total.values())


@pytest.mark.parametrize("name", [name for name in benchmark.CONTESTANTS if name != benchmark.PLAIN])
@pytest.mark.filterwarnings("ignore")  # of Opacus and torch, about hooks
def test_every_private_contestant_computes_the_clipped_sum(name):
    step = benchmark.CONTESTANTS[name](TINY, TINY.make("cpu"), TINY.batch("cpu"))
    step()  # what one step leaves behind must not be in the next
    for found, expected in zip(step(), clipped_sum(TINY, name == benchmark.PER_LAYER), strict=True):
        torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-5)


@pytest.mark.filterwarnings("ignore")
def test_the_table_has_a_ratio_or_a_reason_in_every_cell(tmp_path):
    file = tmp_path / "figures.json"
    done = CliRunner().invoke(APP, ["--only", "tiny mlp", "--rounds", "2", "--quick", "--json", str(file)])
    assert done.exit_code == 0, done.output
    entry = json.loads(file.read_text(encoding="utf-8"))["workloads"][TINY.name]
    rows = entry["contestants"]
    assert list(rows) == list(benchmark.CONTESTANTS)
    assert [name for name, row in rows.items() if (row["ratio"] is None) == (row["note"] == "")] == []
    assert all(math.isfinite(row["ratio"]) and row["ratio"] > 0 for row in rows.values() if row["ratio"] is not None)
    assert rows[benchmark.FLAT]["ratio"] is not None
    assert entry["whole_step"]["ratio"] > 0
    lines = [line for line in done.output.splitlines() if line.startswith("| ")]
    again = CliRunner().invoke(APP, ["--from", str(file), "--threads", "7"])
    assert again.stdout == done.stdout  # the headline is of the run that measured
    assert CliRunner().invoke(APP, ["--from", str(file), "--write"]).exit_code == 2
    assert CliRunner().invoke(APP, ["--from", str(file), "--only", "tiny mlp", "--threads", "7"]).exit_code == 2
    heads = [line for line in lines if line.startswith("| workload")]
    assert all(f" {name} " in heads[0] for name in benchmark.CONTESTANTS if name != benchmark.PLAIN)
    widths = {line.count("|") for line in lines if line.startswith(f"| {TINY.name}")}
    assert widths == {head.count("|") for head in heads}


def test_a_fresh_process_gives_memory_and_page_faults():
    found = benchmark.Fresh.ask(TINY, benchmark.PLAIN, "cpu", 1)
    assert set(found) == {"memory", "faults"}
    assert 0 <= found["memory"] < 100


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_without_a_gpu_it_says_not_run(tmp_path):
    file = tmp_path / "figures.json"
    done = CliRunner().invoke(APP, ["--device", "cuda", "--json", str(file)])
    assert done.exit_code == 0, done.output
    assert "not run" in done.output
    assert "not run" in json.loads(file.read_text(encoding="utf-8"))["note"]


def test_what_is_too_large_for_a_cpu_is_in_the_table_as_not_run():
    large = next(each for each in benchmark.WORKLOADS if each.needs_gpu)
    found = benchmark.run(large, list(benchmark.CONTESTANTS), 1, "cpu", 1, quick=True)
    figures = {"workloads": {large.name: found}}
    assert f"| {large.name} | not run: needs a GPU |" in benchmark.table_of_ratios(figures)


def test_a_refusal_and_a_wrong_sum_are_told(monkeypatch):
    def refuses(workload, model, batch):
        raise RuntimeError("no rule for\nthis | operation")

    def half(workload, model, batch):
        step = benchmark.by_vmap(workload, model, batch)
        return lambda: [part / 2 for part in step()]

    monkeypatch.setitem(benchmark.CONTESTANTS, "refuses", refuses)
    monkeypatch.setitem(benchmark.CONTESTANTS, "half", half)
    names = [benchmark.PLAIN, benchmark.FLAT, benchmark.VMAP, "refuses", "half"]
    rows = benchmark.measure(TINY, names, 2, "cpu")
    assert rows["refuses"].note == "refused: no rule for this / operation"
    assert rows["refuses"].ratio is None
    assert rows["half"].note == "its clipped sum has a norm 50.0 % off that of vmap"
    assert rows[benchmark.FLAT].note == rows[benchmark.VMAP].note == ""


def test_a_section_is_replaced_and_what_is_around_it_stays(tmp_path):
    results = tmp_path / "RESULTS.md"
    results.write_text("# Results\n\nbefore\n", encoding="utf-8")
    benchmark.write_into(results, "first", "cpu")
    results.write_text(results.read_text(encoding="utf-8") + "\nafter\n", encoding="utf-8")
    benchmark.write_into(results, "other", "cuda")
    benchmark.write_into(results, "second", "cpu")
    text = results.read_text(encoding="utf-8")
    assert "first" not in text
    assert [word for word in text.split() if word in ("before", "second", "after", "other")] == [
        *("before", "second", "after", "other")
    ]


def test_a_name_of_no_workload_is_refused_with_the_names_that_there_are():
    done = CliRunner().invoke(APP, ["--only", "nothing"])
    assert done.exit_code == 2
    assert "LSTM" in done.output


def test_several_names_choose_the_workloads_of_each():
    found = [workload.name.split()[0] for workload in benchmark.chosen(["lstm", "LLAMA"])]
    assert found == ["Llama", "LSTM"]
    assert benchmark.chosen([]) == benchmark.WORKLOADS


def test_part_of_the_workloads_is_not_written_as_the_results():
    done = CliRunner().invoke(APP, ["--only", "tiny", "--write"])
    assert done.exit_code == 2
    assert "--from" in done.output
