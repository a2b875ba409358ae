"""``dpkit init``, ``dpkit train`` and ``dpkit demo``: what they write, and what they refuse before touching data."""

from __future__ import annotations

import json
import os
import stat
from collections.abc import Callable
from pathlib import Path

import pytest
from safetensors import safe_open

from dpkit.callbacks import StepRecord
from dpkit.cli import config as configs
from dpkit.errors import ConfigError

from .conftest import SMALL, Run

Write = Callable[..., Path]


def test_init_writes_an_example_that_is_valid_and_says_what_each_key_means(dpkit: Run, tmp_path: Path):
    path = tmp_path / "example.yaml"
    done = dpkit("init", path, "--json")
    assert done.code == 0
    assert done.json["config"]["privacy"]["epsilon"] == 3.0
    assert configs.read(path).dataset == "digits"
    assert path.read_text(encoding="utf-8").count("#") > 10
    assert configs.parse(dpkit("init", "-").out, source="stdout") == configs.read(path)


def test_every_key_that_the_example_only_mentions_exists(tmp_path: Path):
    text = configs.EXAMPLE.replace("  # noise_multiplier", "  noise_multiplier").replace("  epsilon: 3.0 ", "  #")
    for key in ("num_examples", "noise_seed", "max_physical_batch_size", "seed"):
        text = text.replace(f"  # {key}:", f"  {key}:")
    parsed = configs.parse(text, source="example")
    assert parsed.privacy is not None
    assert (parsed.privacy.noise_multiplier, parsed.privacy.num_examples, parsed.privacy.noise_seed) == (3.9, 1437, 0)
    assert (parsed.training.max_physical_batch_size, parsed.training.seed) == (64, 0)


def test_init_replaces_a_file_only_when_told_to(dpkit: Run, tmp_path: Path):
    path = tmp_path / "mine.yaml"
    path.write_text("mine", encoding="utf-8")
    assert dpkit("init", path).code == 1
    assert path.read_text(encoding="utf-8") == "mine"
    assert dpkit("init", path, "--force").code == 0


@pytest.mark.parametrize(
    "path", sorted((Path(__file__).resolve().parents[2] / "experiments").glob("*.yaml")), ids=lambda path: path.name
)
def test_the_experiments_configurations_are_valid(path: Path):
    configs.read(path)


def test_a_configuration_survives_being_written_and_read():
    config = configs.parse(configs.EXAMPLE, source="example")
    assert configs.parse(configs.dump(config), source="dump") == config


@pytest.mark.parametrize(
    ("replacements", "named"),
    [
        (("epsilon: 3.0", "epsilonn: 3.0"), "unknown key privacy.epsilonn"),
        (("epsilon: 3.0", "epsilon: 3.0\n  epsilon: 30.0"), "line 6: the key 'epsilon' is there twice"),
        (("dataset: digits", "dataset: digits\ndataset: mnist"), "there twice"),
        (("epsilon: 3.0", "epsilon: -1"), "privacy.epsilon is -1"),
        (("epsilon: 3.0", "epsilon: .nan"), "privacy.epsilon is nan"),
        (("epsilon: 3.0", "epsilon: true"), "privacy.epsilon"),
        (("epsilon: 3.0", "epsilon: 3.0\n  noise_multiplier: 1.0"), "exactly one of epsilon and noise_multiplier"),
        (("delta: 1.0e-4", "delta: 1.0"), "privacy.delta"),
        (("epochs: 1", "epochs: 0"), "training.epochs is 0"),
        (("epochs: 1\n", "\n"), "training.epochs is missing"),
        (("model: linear", "model: tanh_cnn"), "28x28"),
        (("model: linear", "model: [linear"), "is not YAML"),
        (("dataset: digits", "dataset: !!python/object/apply:os.system ['true']"), "the tag tag:yaml.org"),
        (("dataset: digits", "dataset: !!timestamp digits"), "the tag tag:yaml.org"),
        (("dataset: digits", "dataset: 2001-99-99"), "is not YAML"),
        (("dataset: digits", "dataset: digits\n? [a, b]\n: 1"), "line 2: a key is not a plain word"),
        (("dataset: digits", "dataset: digits\n<<: {model: mlp}"), "line 2: a key is not a plain word"),
        (("dataset: digits", "dataset: digits\n7: mlp"), "line 2: a key is not a plain word"),
        (("dataset: digits", "dataset: &a [*a]"), "line 1: the alias *a"),
        (("model: linear", "model: &a\n  y: *a"), "line 3: the alias *a"),
        (("model: linear", "model: " + "[" * 3000 + "]" * 3000), "nesting deeper than 10"),
        (("model: linear", "model: " + "[" * 5000), "nesting deeper than 10"),
        (("output: ", 'output: "a\\0b" # '), "output has characters"),
        (("output: ", 'output: "\\ud800" # '), "output has characters"),
        (("batch_size: 256", f"batch_size: 1{'0' * 400}"), "training.batch_size is 1000"),
        (("batch_size: 256", f"batch_size: 1{'0' * 5000}"), "is not YAML"),
        (("batch_size: 256", f"batch_size: 0x1{'0' * 5000}"), "too large to show"),
        (("epochs: 1", "epochs: 1000000001"), "training.epochs is 1000000001"),
        (("learning_rate: 2.0", f"learning_rate: 1{'0' * 400}"), "training.learning_rate"),
        (("epsilon: 3.0", f"epsilon: 0x1{'0' * 5000}"), "privacy.epsilon"),
        (("max_grad_norm: 1.0", "max_grad_norm: 1.0e+300"), "privacy.max_grad_norm is 1e+300"),
        (("max_grad_norm: 1.0", f"max_grad_norm: 1.0\n  noise_seed: 0x1{'0' * 5000}"), "privacy.noise_seed"),
    ],
)
def test_a_wrong_configuration_is_named_and_nothing_is_trained(
    dpkit: Run, config: Write, tmp_path: Path, replacements: tuple[str, ...], named: str
):
    done = dpkit("train", config(*replacements))
    assert done.code == 1
    assert named in done.err
    assert done.err.count("\n") == 1
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize("text", ["", "just words", "- a\n- list", "\x00"])
def test_a_file_that_is_no_configuration_is_refused(text: str):
    with pytest.raises(ConfigError, match=r"words\.yaml"):
        configs.parse(text, source="words.yaml")


def test_a_missing_configuration_is_refused(dpkit: Run, tmp_path: Path):
    done = dpkit("train", tmp_path / "none.yaml")
    assert done.code == 1
    assert "dpkit init" in done.err


def test_private_training_needs_a_privacy_section():
    text = (
        SMALL.format(output="run").partition("privacy:")[0] + "training: {epochs: 1, batch_size: 9, learning_rate: 1}"
    )
    with pytest.raises(ConfigError, match="section `privacy` is missing"):
        configs.parse(text, source="x")
    assert configs.parse(text + "\nprivate: false", source="x").private is False


def test_a_private_run_leaves_a_folder_that_can_be_shared(trained: Path):
    expected = {"config.yaml", "ledger.sqlite", "model.safetensors", "result.json", "PRIVACY.md", "metrics.jsonl"}
    folders = {"checkpoints", "nonprivate"}
    assert {path.name for path in trained.iterdir() if path.name[0] != "."} - {
        "ledger.sqlite.tip"
    } == expected | folders
    assert stat.S_IMODE((trained / "ledger.sqlite").stat().st_mode) == 0o600
    result = json.loads((trained / "result.json").read_text(encoding="utf-8"))
    assert {
        "test_accuracy",
        "epsilon",
        "delta",
        "unit",
        "relation",
        "sampling",
        "accountant",
        "model_sha256",
        "anchor_digest",
    } <= result.keys()
    assert not {"seconds", "source"} & result.keys()  # times depend on the data, and paths are nobody's business
    assert 0 <= result["test_accuracy"] <= 1
    assert 0 < result["epsilon"] <= 3.0
    assert "CERTIFIED: YES" in (trained / "PRIVACY.md").read_text(encoding="utf-8")
    with safe_open(trained / "model.safetensors", "pt") as saved:
        assert set(saved.keys()) == {"2.weight", "2.bias"}
    assert configs.read(trained / "config.yaml").output == trained


def test_the_progress_bar_never_shows_less_than_was_spent(capsys: pytest.CaptureFixture[str]):
    from dpkit.cli.progress import training_bar

    with training_bar("run", 3.0) as bar:
        bar.on_step(StepRecord(1, 1, 2, 1.2301, 1.00000049e-5, None))
    shown = capsys.readouterr().err
    assert "1.231 of 3.0" in shown
    assert "1.00001e-05" in shown


def test_losses_and_batch_sizes_are_kept_under_nonprivate_only(trained: Path):
    steps = [json.loads(line) for line in (trained / "nonprivate" / "steps.jsonl").read_text().splitlines()]
    assert len(steps) == 6
    assert {"mean_loss", "units", "clipped", "dropped"} <= steps[0].keys()
    for path in trained.glob("*.[jmy]*"):
        if path.suffix != ".safetensors":
            assert "mean_loss" not in path.read_text(encoding="utf-8")


def test_a_run_without_privacy_puts_its_model_and_result_under_nonprivate(dpkit: Run, config: Write, tmp_path: Path):
    pytest.importorskip("sklearn", reason="the data set digits comes with scikit-learn (extra `demo`)")
    done = dpkit("train", config(), "--non-private", "--json")
    assert done.code == 0
    assert done.json["private"] is False
    assert "epsilon" not in done.json
    assert {path.name for path in (tmp_path / "run").iterdir()} == {"config.yaml", "nonprivate"}
    assert {path.name for path in (tmp_path / "run" / "nonprivate").iterdir()} == {
        "model.safetensors",
        "result.json",
        "steps.jsonl",
    }


def test_a_used_run_folder_is_not_used_again(dpkit: Run, trained: Path):
    ledger = (trained / "ledger.sqlite").read_bytes()
    done = dpkit("train", trained / "config.yaml")
    assert done.code == 1
    assert "has been used" in done.err
    assert (trained / "ledger.sqlite").read_bytes() == ledger


def test_a_refused_run_leaves_no_folder_behind(dpkit: Run, config: Write, tmp_path: Path):
    pytest.importorskip("sklearn", reason="the data set digits comes with scikit-learn (extra `demo`)")
    too_small = (
        "epsilon: 3.0",
        "epsilon: 3.0\n  num_examples: 1000",
        "epochs: 1",
        "epochs: 1\n  max_physical_batch_size: 100",
    )
    done = dpkit("train", config(*too_small))
    assert done.code == 1
    assert "num_examples is 1000" in done.err
    assert done.err.splitlines()[-1].startswith("error: ")
    assert not (tmp_path / "run").exists()


def test_microbatches_change_the_sampling_that_is_stated(dpkit: Run, config: Write):
    pytest.importorskip("sklearn", reason="the data set digits comes with scikit-learn (extra `demo`)")
    done = dpkit("train", config("epochs: 1", "epochs: 1\n  max_physical_batch_size: 100"), "--json")
    assert done.code == 0
    assert done.json["steps"] == 6
    assert "larger draws cut to" in done.json["sampling"]


def test_a_noise_seed_is_not_certified_and_repeats_the_run(dpkit: Run, config: Write, tmp_path: Path):
    pytest.importorskip("sklearn", reason="the data set digits comes with scikit-learn (extra `demo`)")
    path = config("epsilon: 3.0", "epsilon: 3.0\n  noise_seed: 1", "epochs: 1", "epochs: 1\n  seed: 1")
    weights = []
    for name in ("first", "second"):
        done = dpkit("train", path, "--output", tmp_path / name, "--json")
        assert done.json["certified"] is False
        weights.append((tmp_path / name / "model.safetensors").read_bytes())
    assert weights[0] == weights[1]


def test_without_a_seed_two_runs_differ(dpkit: Run, config: Write, tmp_path: Path):
    pytest.importorskip("sklearn", reason="the data set digits comes with scikit-learn (extra `demo`)")
    weights = []
    for name in ("first", "second"):
        assert dpkit("train", config(), "--output", tmp_path / name, "--json").code == 0
        weights.append((tmp_path / name / "model.safetensors").read_bytes())
    assert weights[0] != weights[1]


def test_the_demo_compares_private_with_non_private_training(
    dpkit: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    pytest.importorskip("sklearn", reason="the data set digits comes with scikit-learn (extra `demo`)")
    monkeypatch.chdir(tmp_path)
    done = dpkit("demo", "--json")
    assert done.code == 0
    # One run each; the means of five are 0.97 and 0.93, with a standard deviation below 0.01.
    assert done.json["nonprivate"]["mean_test_accuracy"] >= 0.94
    assert done.json["private"]["mean_test_accuracy"] >= 0.88
    assert done.json["statement"]["epsilon"] <= 3.0
    assert done.json["statement"]["certified"] is True
    assert (tmp_path / done.json["folder"] / "private-1" / "PRIVACY.md").is_file()


@pytest.mark.parametrize("arguments", [("--epsilon", "0"), ("--epsilon", "nan"), ("--delta", "1"), ("--runs", "0")])
def test_the_demo_refuses_numbers_outside_their_domain(dpkit: Run, tmp_path: Path, arguments, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert dpkit("demo", *arguments).code == 1
    assert list(tmp_path.iterdir()) == []


@pytest.mark.slow
def test_five_demo_runs_reach_the_stated_accuracies(dpkit: Run, tmp_path: Path):
    pytest.importorskip("sklearn", reason="the data set digits comes with scikit-learn (extra `demo`)")
    done = dpkit("demo", "--runs", 5, "--output", tmp_path, "--json")
    assert done.json["nonprivate"]["mean_test_accuracy"] >= 0.96
    # Means of five have a standard deviation of about 0.003 around 0.93.
    assert done.json["private"]["mean_test_accuracy"] >= 0.91


# -- data -------------------------------------------------------------------------------------------------------------


def test_a_missing_data_folder_says_how_to_name_one(dpkit: Run, config: Write, tmp_path: Path, monkeypatch):
    monkeypatch.delenv("DPKIT_DATA", raising=False)
    path = config("dataset: digits", "dataset: mnist")
    done = dpkit("train", path)
    assert done.code == 1
    assert "--data-dir" in done.err
    assert "DPKIT_DATA" in done.err
    done = dpkit("train", path, "--data-dir", tmp_path / "nowhere")
    assert done.code == 1
    assert "does not exist" in done.err
    done = dpkit("train", path, "--data-dir", tmp_path)
    assert done.code == 1
    assert "train-images-idx3-ubyte.gz is missing" in done.err
    assert not (tmp_path / "run").exists()


@pytest.mark.slow
@pytest.mark.skipif("DPKIT_DATA" not in os.environ, reason="DPKIT_DATA, the folder with the MNIST files, is not set")
def test_the_mnist_network_trains_for_a_few_steps(dpkit: Run, config: Write):
    path = config(
        "dataset: digits",
        "dataset: mnist",
        "model: linear",
        "model: tanh_cnn",
        "batch_size: 256",
        "batch_size: 20000",
        "epochs: 1",
        "epochs: 1\n  max_physical_batch_size: 2000",
    )
    done = dpkit("train", path, "--json")
    assert done.code == 0
    assert done.json["steps"] == 3
