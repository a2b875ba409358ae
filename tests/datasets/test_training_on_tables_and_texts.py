"""``dpkit train`` takes every table and text from its files to a finished private run."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from dpkit.cli import config as configs
from dpkit.cli import main
from dpkit.datasets import describe

from .conftest import Publish
from .test_tabular import ADULT, DUTCH, PEOPLE, compas_file
from .test_text import TRAIN, table

CONFIG = """\
dataset: {dataset}
model: {model}
output: {output}
privacy: {{epsilon: 3.0, delta: 1.0e-3, max_grad_norm: 1.0, num_examples: {size}}}
training: {{epochs: 2, batch_size: 16, learning_rate: 0.1}}
"""

ADULT_FILE = ("\n".join(ADULT * 20) + "\n").encode()


@pytest.mark.parametrize(
    ("dataset", "model", "files", "size"),
    [
        ("adult", "linear", (ADULT_FILE, ADULT_FILE.replace(b"50K", b"50K.")), 80),
        ("dutch", "mlp", (("@data\n" + "\n".join(DUTCH * 10)).encode(),), 56),
        ("compas", "linear", (compas_file(PEOPLE * 6),), 57),
        ("sst2", "bag_of_embeddings", (table(TRAIN * 20), table(TRAIN)), 80),
    ],
)
def test_a_private_run_finishes(
    publish: Publish,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    dataset: str,
    model: str,
    files: tuple[bytes, ...],
    size: int,
):
    data = publish(dataset, *files)
    path = tmp_path / "config.yaml"
    output = tmp_path / "run"
    path.write_text(CONFIG.format(dataset=dataset, model=model, output=output, size=size), encoding="utf-8")
    assert main(["train", str(path), "--data-dir", str(data), "--json"]) == 0
    result = json.loads(capsys.readouterr().out)
    assert result["certified"]
    assert result["steps"] == 2 * -(-size // 16)
    assert 0 < result["epsilon"] <= 3
    assert 0 <= result["test_accuracy"] <= 1
    assert (output / "model.safetensors").is_file()


EXPERIMENTS = sorted((Path(__file__).resolve().parents[2] / "experiments").glob("*.yaml"))


@pytest.mark.parametrize("path", EXPERIMENTS, ids=[path.stem for path in EXPERIMENTS])
def test_every_configuration_that_is_shipped_is_valid_and_names_its_own_command(path: Path):
    config = configs.read(path)
    assert f"dpkit train experiments/{path.name}" in path.read_text(encoding="utf-8")
    assert config.output.name == path.stem


@pytest.mark.parametrize("path", EXPERIMENTS, ids=[path.stem for path in EXPERIMENTS])
def test_a_configuration_declares_the_public_size_of_its_data_set(path: Path):
    config = configs.read(path)
    assert config.privacy is not None
    assert config.privacy.num_examples in {None, describe(config.dataset).num_train}
