"""``dpkit audit model``: the report against an attack by hand, what it may write where, and what it refuses."""

from __future__ import annotations

import hashlib
import json
import shutil
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import safetensors.torch
import torch

from accounting import Ledger, round_up
from dpkit.cli import loop, main, models
from dpkit.cli.config import Config
from dpkit.datasets import Split, load
from dpkit.run_folder import RunFolder

LINE = "ATTACK REPORT (NOT PRIVATE, not a bound on epsilon)"


@pytest.fixture
def run(trained: Path, tmp_path: Path) -> Path:
    """A copy of a finished private run that a test may change."""
    return Path(shutil.copytree(trained, tmp_path / "copy"))


@pytest.fixture(scope="module")
def plain(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A finished run without privacy."""
    pytest.importorskip("sklearn", reason="the data set digits comes with scikit-learn (extra `demo`)")
    folder = tmp_path_factory.mktemp("plain")
    text = (
        f"dataset: digits\nmodel: linear\noutput: {folder / 'run'}\nprivate: false\n"
        "training:\n  epochs: 1\n  batch_size: 64\n  learning_rate: 0.1\n"
    )
    (folder / "config.yaml").write_text(text, encoding="utf-8")
    assert main(["train", str(folder / "config.yaml"), "--json"]) == 0
    return folder / "run"


def shareable(folder: Path) -> dict[str, bytes]:
    """Every file outside nonprivate/."""
    return {
        str(path.relative_to(folder)): path.read_bytes()
        for path in folder.rglob("*")
        if path.is_file() and "nonprivate" not in path.relative_to(folder).parts
    }


def by_hand(weights: Path) -> tuple[np.ndarray, np.ndarray]:
    """(members', non-members') logit confidences of the linear model in this file, from probabilities in float64."""
    data = load("digits")
    built = models.build("linear", data.train_x.shape[1:], data.classes)
    built.load_state_dict(safetensors.torch.load_file(weights))
    found = []
    for x, y in ((data.train_x, data.train_y), (data.test_x, data.test_y)):
        with torch.no_grad():
            p = torch.softmax(built(torch.from_numpy(x)).double(), dim=1)[torch.arange(len(y)), torch.from_numpy(y)]
        found.append((p.log() - (1 - p).log()).numpy())
    return found[0], found[1]


# -- what it reports --------------------------------------------------------------------------------------------------


def test_the_report_is_that_of_the_attack_by_hand(dpkit, run: Path):
    metrics = pytest.importorskip("sklearn.metrics")
    done = dpkit("audit", "model", run, "--json")
    assert done.code == 0, done.err
    [report] = done.json["reports"]
    inside, outside = by_hand(run / "model.safetensors")
    truth = np.r_[np.ones(len(inside)), np.zeros(len(outside))]
    assert (report["members"], report["nonmembers"]) == (1437, 360)
    assert report["auc"] == pytest.approx(metrics.roc_auc_score(truth, np.r_[inside, outside]), abs=1e-5)
    assert report["attack"] == "loss threshold"


def test_json_says_what_it_is_and_repeats_the_claim_of_the_ledger(dpkit, run: Path):
    done = dpkit("audit", "model", run, "--json")
    with Ledger.open(run / "ledger.sqlite", read_only=True) as ledger:
        spent = ledger.spent()
    assert done.json["kind"] == "attack report, not private, not a bound on epsilon"
    assert done.json["claim"]["epsilon"] == round_up(spent.epsilon) and done.json["claim"]["delta"] == 1e-4
    assert done.json["certified"] is True and done.json["dataset"] == "digits"
    assert not any("lower" in key for key in done.json)
    written = json.loads((run / "nonprivate" / "membership.json").read_text(encoding="utf-8"))
    assert written == {key: value for key, value in done.json.items() if key != "written"}


def test_text_begins_as_a_report_and_never_calls_it_a_bound(dpkit, run: Path):
    done = dpkit("audit", "model", run)
    assert done.code == 0 and done.out.startswith(LINE)
    assert "too few non-members for this rate: 360" in done.out
    assert "neither confirms nor contradicts an epsilon" in done.out
    assert "delta = 0.0001" in done.out and "unit: one example" in done.out and "accountant: " in done.out
    assert "NOT PRIVATE: computed from training examples" in done.out
    assert "CERTIFIED" not in done.out


def test_nothing_that_may_be_shared_is_changed(dpkit, run: Path):
    before = shareable(run)
    assert dpkit("audit", "model", run).code == 0
    assert shareable(run) == before


def test_a_run_without_privacy_claims_nothing(dpkit, plain: Path):
    done = dpkit("audit", "model", plain)
    assert done.code == 0 and "WITHOUT privacy and claims nothing" in done.out
    assert "epsilon <=" not in done.out
    found = dpkit("audit", "model", plain, "--json").json
    assert found["claim"] is None and found["certified"] is None
    assert set(shareable(plain)) == {"config.yaml"}


def test_a_seeded_run_is_said_not_to_be_certified(dpkit, config: Callable[..., Path], tmp_path: Path):
    path = config("  max_grad_norm: 1.0", "  max_grad_norm: 1.0\n  noise_seed: 3")
    assert dpkit("train", path).code == 0
    done = dpkit("audit", "model", tmp_path / "run")
    assert done.code == 0 and "CERTIFIED: NO" in done.out
    assert dpkit("audit", "model", tmp_path / "run", "--json").json["certified"] is False


# -- shadow models ----------------------------------------------------------------------------------------------------


def test_shadow_models_are_trained_told_about_and_removed(dpkit, run: Path):
    before = shareable(run)
    done = dpkit("audit", "model", run, "--shadows", 4)
    assert done.code == 0, done.err
    assert "training 4 shadow models on 898 examples each: about" in done.err
    assert "membership inference, loss threshold" in done.out
    assert f"{LINE}: membership inference, LiRA online, 4 shadow models" in done.out
    assert shareable(run) == before  # the run's ledger among them: nothing was charged to it
    assert [path.name for path in (run / "nonprivate").iterdir() if path.name.startswith("shadows")] == []


class Recorded:
    """In place of training: keeps what would have been trained on what, and gives the model of the run back."""

    def __init__(self, weights: bytes) -> None:
        self.weights = weights
        self.configs: list[Config] = []
        self.parts: list[Split] = []

    def __call__(self, config: Config, data: Split, bar: object) -> None:
        self.configs.append(config)
        self.parts.append(data)
        place = () if config.private else ("nonprivate",)
        # Random, or scores would not vary.
        weights = {
            name: value + 0.01 * torch.randn_like(value) for name, value in safetensors.torch.load(self.weights).items()
        }
        RunFolder(config.output).write(*place, "model.safetensors", data=safetensors.torch.save(weights))


@pytest.fixture
def recorded(run: Path, monkeypatch: pytest.MonkeyPatch) -> Recorded:
    found = Recorded((run / "model.safetensors").read_bytes())
    monkeypatch.setattr(loop, "train", found)
    return found


def rows(part: np.ndarray) -> list[bytes]:
    return sorted(row.tobytes() for row in part)


def test_shadow_models_come_in_pairs_of_a_random_half_and_the_other_half(dpkit, run: Path, recorded: Recorded):
    assert dpkit("audit", "model", run, "--shadows", 6, "--seed", 1).code == 0
    data = load("digits")
    everything = rows(np.concatenate([data.train_x, data.test_x]))
    assert [len(part.train_y) for part in recorded.parts] == [898, 899] * 3
    for first, second in zip(recorded.parts[::2], recorded.parts[1::2], strict=True):
        assert rows(np.concatenate([first.train_x, second.train_x])) == everything
    assert rows(recorded.parts[0].train_x) != rows(recorded.parts[2].train_x)
    again = Recorded(recorded.weights)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(loop, "train", again)
        dpkit("audit", "model", run, "--shadows", 4, "--seed", 1)
        dpkit("audit", "model", run, "--shadows", 4, "--seed", 2)
    assert rows(again.parts[0].train_x) == rows(recorded.parts[0].train_x) != rows(again.parts[4].train_x)


def test_shadow_models_have_the_settings_and_the_noise_of_the_run(dpkit, run: Path, recorded: Recorded):
    with Ledger.open(run / "ledger.sqlite", read_only=True) as ledger:
        [(plan, _)] = ledger.plans()
    noise = plan.event.event.noise_multiplier  # pyright: ignore[reportAttributeAccessIssue]
    assert dpkit("audit", "model", run, "--shadows", 4, "--seed", 10).code == 0
    for number, config in enumerate(recorded.configs):
        assert config.private and config.privacy is not None
        assert (config.privacy.noise_multiplier, config.privacy.epsilon) == (noise, None)
        assert (config.privacy.max_grad_norm, config.privacy.delta) == (1.0, 1e-4)
        assert (config.training.batch_size, config.training.epochs, config.training.learning_rate) == (256, 1, 2.0)
        assert config.training.seed == 10 + number
        assert config.output.is_relative_to(run / "nonprivate")


def test_a_declared_number_of_examples_becomes_that_of_the_half(dpkit, config: Callable[..., Path], tmp_path: Path):
    path = config("  max_grad_norm: 1.0", "  max_grad_norm: 1.0\n  num_examples: 1437")
    assert dpkit("train", path).code == 0
    found = Recorded((tmp_path / "run" / "model.safetensors").read_bytes())
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(loop, "train", found)
        assert dpkit("audit", "model", tmp_path / "run", "--shadows", 4).code == 0
    assert [config.privacy and config.privacy.num_examples for config in found.configs] == [898, 899, 898, 899]


# -- the picture ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("form", ["png", "svg"])
def test_the_picture_goes_where_the_user_says(dpkit, run: Path, tmp_path: Path, form: str):
    pytest.importorskip("matplotlib", reason="the extra `report` is not installed")
    for place in (tmp_path / f"a.{form}", run / "nonprivate" / f"a.{form}"):
        done = dpkit("audit", "model", run, "--plot", place)
        assert done.code == 0 and str(place) in done.out.replace("\n", "")
        assert place.stat().st_size > 1000
    if form == "svg":
        assert "NOT PRIVATE" in (tmp_path / "a.svg").read_text(encoding="utf-8")


def test_but_not_among_what_is_shared_and_never_over_a_file(dpkit, run: Path, tmp_path: Path):
    (tmp_path / "there.png").write_bytes(b"mine")
    (tmp_path / "link").symlink_to(run)
    for place, words in (
        (run / "a.png", "shareable part"),
        (run / "checkpoints" / "a.png", "shareable part"),
        (run / "nonprivate" / ".." / "a.png", "shareable part"),
        (tmp_path / "link" / "a.png", "shareable part"),
        (tmp_path / "there.png", "exists already"),
        (tmp_path / "a.pdf", ".png or an .svg"),
        (tmp_path / "nowhere" / "a.png", "no folder"),
    ):
        done = dpkit("audit", "model", run, "--plot", place)
        assert done.code == 1 and words in done.err, done.err
    assert (tmp_path / "there.png").read_bytes() == b"mine"
    assert not (run / "nonprivate" / "membership.json").exists()


def test_the_drawing_refuses_what_is_no_curve():
    pytest.importorskip("matplotlib", reason="the extra `report` is not installed")
    from dpkit.errors import InvalidArgument
    from dpkit.report.membership_plot import Curve, draw_membership

    good = Curve("a", np.array([0.0, 0.5, 1.0]), np.array([0.0, 0.7, 1.0]))
    assert draw_membership([good], "t", "svg", nonmembers=5) == draw_membership([good], "t", "svg", nonmembers=5)
    for curves, nonmembers, words in (
        ([], 5, "0 curves"),
        ([good] * 5, 5, "5 curves"),
        ([Curve("b", np.array([0.0, np.nan]), np.array([0.0, 1.0]))], 5, "'b' is no curve"),
        ([Curve("b", np.array([0.0]), np.array([0.0, 1.0]))], 5, "'b' is no curve"),
        ([good], 0, "nonmembers"),
    ):
        with pytest.raises(InvalidArgument, match=words):
            draw_membership(curves, "t", "svg", nonmembers=nonmembers)


# -- what is refused --------------------------------------------------------------------------------------------------


def change_result(run: Path, **changes: object) -> None:
    path = run / "result.json"
    path.write_text(json.dumps(json.loads(path.read_text(encoding="utf-8")) | changes), encoding="utf-8")


def put_model(run: Path, weights: dict[str, torch.Tensor]) -> None:
    """Another model, and the checksum that goes with it."""
    data = safetensors.torch.save(weights)
    (run / "model.safetensors").write_bytes(data)
    change_result(run, model_sha256=hashlib.sha256(data).hexdigest())


def weights_of(run: Path) -> dict[str, torch.Tensor]:
    return safetensors.torch.load_file(run / "model.safetensors")


def flip_ledger(run: Path) -> None:
    path = run / "ledger.sqlite"
    content = bytearray(path.read_bytes())
    content[content.rindex(b'"plan_id"') + 14] ^= 1
    path.write_bytes(bytes(content))


def edit(name: str, old: str, new: str) -> Callable[[Path], object]:
    def change(run: Path) -> None:
        text = (run / name).read_text(encoding="utf-8")
        assert old in text
        (run / name).write_text(text.replace(old, new), encoding="utf-8")

    return change


REFUSED: dict[str, tuple[Callable[[Path], object], int, str]] = {
    "no configuration": (lambda run: (run / "config.yaml").unlink(), 1, "config.yaml cannot be read"),
    "a configuration that is none": (lambda run: (run / "config.yaml").write_text("x: 1"), 1, "config.yaml"),
    "no model": (lambda run: (run / "model.safetensors").unlink(), 1, "the run has not finished"),
    "no result": (lambda run: (run / "result.json").unlink(), 1, "the run has not finished"),
    "a result that is none": (lambda run: (run / "result.json").write_text("[1]"), 1, "no JSON object"),
    "a result that is cut off": (lambda run: (run / "result.json").write_text("{"), 1, "no JSON object"),
    "another model": (lambda run: (run / "model.safetensors").write_bytes(b"x" * 99), 4, "not the model of result"),
    "no ledger": (lambda run: (run / "ledger.sqlite").unlink(), 4, "ledger.sqlite"),
    "a changed ledger": (flip_ledger, 4, "ledger.sqlite"),
    "a ledger of another data set": (edit("config.yaml", "dataset: digits", "dataset: mnist"), 4, "not of 'mnist'"),
    "an older ledger": (lambda run: change_result(run, anchor_sequence=999), 4, "older copy"),
    "a result without anchor": (lambda run: change_result(run, anchor_digest=None), 4, "names no entry"),
    "a ledger beside no privacy": (
        edit("config.yaml", "private: true", "private: false"),
        4,
        "there is a ledger beside it",
    ),
    "weights of another shape": (
        lambda run: put_model(run, {name: value[:3] for name, value in weights_of(run).items()}),
        1,
        "not one of the model 'linear'",
    ),
    "weights that are none": (
        lambda run: (
            (run / "model.safetensors").write_bytes(b"x" * 99),
            change_result(run, model_sha256=hashlib.sha256(b"x" * 99).hexdigest()),
        ),
        1,
        "not one of the model 'linear'",
    ),
    "a model that diverged": (
        lambda run: put_model(run, {name: value * float("nan") for name, value in weights_of(run).items()}),
        1,
        "not finite",
    ),
}


@pytest.mark.parametrize("name", REFUSED)
def test_a_run_that_cannot_be_attacked_is_refused(dpkit, run: Path, name: str):
    change, code, words = REFUSED[name]
    change(run)
    done = dpkit("audit", "model", run)
    assert (done.code, done.out) == (code, ""), done.err
    assert words in done.err and done.err.count("error:") == 1, done.err
    assert not (run / "nonprivate" / "membership.json").exists()


def test_missing_data_are_refused(dpkit, plain: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.delenv("DPKIT_DATA", raising=False)
    run = Path(shutil.copytree(plain, tmp_path / "copy"))
    edit("config.yaml", "dataset: digits", "dataset: mnist")(run)
    done = dpkit("audit", "model", run)
    assert done.code == 1 and "no data folder is known" in done.err
    done = dpkit("audit", "model", run, "--data-dir", tmp_path)
    assert done.code == 1 and "train-images-idx3-ubyte.gz is missing" in done.err


@pytest.mark.parametrize("folder", ["nowhere", "file"])
def test_what_is_no_run_is_refused(dpkit, tmp_path: Path, folder: str):
    (tmp_path / "file").write_text("x")
    done = dpkit("audit", "model", tmp_path / folder)
    assert done.code == 1 and folder in done.err


@pytest.mark.parametrize(
    ("options", "words"),
    [
        (("--shadows", 1), "--shadows is 1"),
        (("--shadows", 3), "--shadows is 3"),
        (("--shadows", -4), "--shadows is -4"),
        (("--shadows", 1001), "--shadows is 1001"),
        (("--confidence", 1), "--confidence is 1"),
        (("--confidence", "nan"), "--confidence is nan"),
        (("--seed", -1), "--seed is -1"),
        (("--shadows", "many"), "many"),
    ],
)
def test_options_outside_their_domain_are_refused_by_name(dpkit, run: Path, options: tuple[object, ...], words: str):
    done = dpkit("audit", "model", run, *options)
    assert done.code == 1 and words in done.err, done.err


def test_the_time_of_shadow_models_is_not_invented(dpkit, run: Path, recorded: Recorded):
    (run / "nonprivate" / "times.json").unlink()
    done = dpkit("audit", "model", run, "--shadows", 4)
    assert done.code == 0 and "not known" in done.err
    (run / "nonprivate" / "times.json").write_text('{"seconds": "soon"}')
    done = dpkit("audit", "model", run, "--shadows", 4)
    assert done.code == 0 and "not known" in done.err
