"""Gradient inversion: the closed form against autograd, the search against images that it must find, and what clipping
and noise do to both when the update comes from the engine."""

from __future__ import annotations

import copy
import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.data import DataLoader, TensorDataset

import accounting
import dpkit
from accounting import Gaussian, Relation
from dpkit.audit.inversion import (
    Angle,
    Distance,
    correlation,
    inferred_label,
    invert,
    linear_input,
    mean_squared_error,
    peak_signal_to_noise,
    total_variation,
)
from dpkit.datasets import Split
from dpkit.errors import InvalidArgument
from dpkit.types import Named
from experiments import inversion as experiment


def losses(model, batch: tuple[Tensor, Tensor]) -> Tensor:
    inputs, labels = batch
    return F.cross_entropy(model(inputs), labels, reduction="none")


def linear_model() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Flatten(), nn.Linear(36, 16), nn.Tanh(), nn.Linear(16, 5))


def convolutional() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Unflatten(1, (1, 6)), nn.Conv2d(1, 8, 3, padding=1), nn.Tanh(), nn.Flatten(), nn.Linear(8 * 36, 5)
    )


def image(seed: int = 0) -> Tensor:
    """A bright square in a dark image."""
    rng = np.random.default_rng(seed)
    found = torch.zeros(6, 6)
    top, left = rng.integers(0, 3, 2)
    found[top : top + 3, left : left + 3] = torch.from_numpy(rng.uniform(0.5, 1, (3, 3)).astype(np.float32))
    return found


def gradient_of(model: nn.Module, x: Tensor, label: int) -> Named:
    loss = losses(model, (x[None], torch.tensor([label]))).sum()
    named = dict(model.named_parameters())
    return dict(zip(named, torch.autograd.grad(loss, list(named.values())), strict=True))


def released(
    model: nn.Module, x: Tensor, label: int, folder: Path, noise_multiplier: float, bound: float = 1.0
) -> Named:
    """What the engine releases of a batch of one record."""
    engine = dpkit.PrivacyEngine(folder, dataset_name="one", seed=3)
    _, _, loader = engine.make_private(
        model,
        torch.optim.SGD(model.parameters(), lr=1.0),
        DataLoader(TensorDataset(x[None], torch.tensor([label])), batch_size=1),
        num_examples=1,
        noise_multiplier=noise_multiplier,
        target_delta=1e-5,
        steps=1,
        max_grad_norm=bound,
    )
    for batch in loader:
        engine.backward(losses(model, batch))
    found = {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}
    engine.detach()
    return found


def norm(gradient: Named) -> float:
    return math.sqrt(sum(float(value.double().square().sum()) for value in gradient.values()))


# -- read off a linear layer ------------------------------------------------------------------------------------------


def test_a_linear_layers_gradient_holds_its_input():
    for seed in range(5):
        gradient = gradient_of(linear_model(), image(seed), seed)
        found = linear_input(gradient["1.weight"], gradient["1.bias"]).reshape(6, 6)
        assert torch.allclose(found, image(seed), atol=1e-5)


def test_gradients_too_small_to_be_squared_still_show_it():
    gradient = gradient_of(linear_model(), image(), 0)
    scaled = {name: value.double() * 1e-200 for name, value in gradient.items()}
    found = linear_input(scaled["1.weight"], scaled["1.bias"]).reshape(6, 6)
    assert torch.allclose(found.float(), image(), atol=1e-5)


def test_of_noisy_rows_it_is_the_least_squares_solution():
    generator = torch.Generator().manual_seed(0)
    weight, bias = (torch.randn(s, generator=generator, dtype=torch.float64) for s in ((20, 7), (20,)))
    expected, *_ = np.linalg.lstsq(bias.numpy()[:, None], weight.numpy(), rcond=None)
    assert linear_input(weight, bias).numpy() == pytest.approx(expected[0], rel=1e-10)


@pytest.mark.parametrize(
    ("weight", "bias", "words"),
    [
        (torch.zeros(3, 4), torch.zeros(3), "is 0"),
        (torch.zeros(3, 4), torch.ones(4), "shapes"),
        (torch.zeros(3), torch.ones(3), "shapes"),
        (torch.full((3, 4), math.nan), torch.ones(3), "not finite"),
        (torch.ones(3, 4), torch.full((3,), math.inf), "not finite"),
    ],
)
def test_what_is_no_pair_of_gradients_is_refused(weight: Tensor, bias: Tensor, words: str):
    with pytest.raises(InvalidArgument, match=words):
        linear_input(weight, bias)


# -- search -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("matching", [Distance(steps=100), Angle(steps=300, total_variation=1e-3)])
def test_the_search_finds_the_image_behind_a_raw_gradient(matching):
    model, x = convolutional(), image()
    found = invert(
        gradient_of(model, x, 3), model, losses, (6, 6), generator=torch.Generator().manual_seed(0), matching=matching
    )
    assert found.label == 3
    assert correlation(found.reconstruction, x) > 0.99
    assert peak_signal_to_noise(found.reconstruction, x) > 25  # a black image has 6.6


def test_the_angle_is_blind_to_the_length_of_the_gradient_and_the_distance_must_know_the_bound():
    model, x = convolutional(), image()
    whole = gradient_of(model, x, 1)
    clipped = {name: 0.05 * value / norm(whole) for name, value in whole.items()}

    def similarity(matching) -> float:
        found = invert(clipped, model, losses, (6, 6), generator=torch.Generator().manual_seed(0), matching=matching)
        return correlation(found.reconstruction, x)

    assert similarity(Angle(steps=300, total_variation=1e-3)) > 0.99
    assert similarity(Distance(steps=100, max_grad_norm=0.05)) > 0.99
    assert similarity(Distance(steps=100)) < 0.9


def test_the_mismatch_is_what_its_definition_says():
    generator = torch.Generator().manual_seed(1)
    one, other = ([torch.randn(4, 3, generator=generator), torch.randn(2, generator=generator)] for _ in range(2))
    a, b = (np.concatenate([each.numpy().ravel() for each in pair]).astype(float) for pair in (one, other))
    x = image()
    flat = float(Distance()(one, other, x))
    assert flat == pytest.approx(((a - b) ** 2).sum() / (b**2).sum(), rel=1e-5)
    bounded = float(Distance(max_grad_norm=0.5)(one, other, x))
    assert bounded == pytest.approx(((a * 0.5 / np.linalg.norm(a) - b) ** 2).sum() / (b**2).sum(), rel=1e-5)
    cosine = a @ b / np.linalg.norm(a) / np.linalg.norm(b)
    variation = np.abs(np.diff(x, axis=0)).mean() + np.abs(np.diff(x, axis=1)).mean()
    assert float(Angle(total_variation=0.3)(one, other, x)) == pytest.approx(1 - cosine + 0.3 * variation, rel=1e-5)
    assert float(total_variation(x)) == pytest.approx(variation, rel=1e-6)


def test_the_best_restart_is_the_one_with_the_smallest_mismatch():
    model = convolutional()
    gradient = gradient_of(model, image(), 0)
    short = Angle(steps=8)
    found = invert(
        gradient, model, losses, (6, 6), generator=torch.Generator().manual_seed(0), matching=short, restarts=4
    )
    assert len(set(found.mismatches)) == 4 and found.mismatch == min(found.mismatches)
    again = gradient_of(model, found.reconstruction, found.label)
    mismatch = short(list(again.values()), list(gradient.values()), found.reconstruction)
    assert float(mismatch) == pytest.approx(found.mismatch, rel=1e-4)


def test_the_same_generator_gives_the_same_reconstruction_and_the_model_is_left_alone():
    model = convolutional()
    before = copy.deepcopy(model.state_dict())
    gradient = gradient_of(model, image(), 0)
    one, other = (
        invert(gradient, model, losses, (6, 6), generator=torch.Generator().manual_seed(7), matching=Angle(steps=5))
        for _ in range(2)
    )
    assert torch.equal(one.reconstruction, other.reconstruction)
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    assert all(p.grad is None for p in model.parameters())
    assert one.reconstruction.min() >= 0 and one.reconstruction.max() <= 1


def test_the_last_bias_gives_the_label_away():
    for label in range(5):
        assert inferred_label(gradient_of(linear_model(), image(), label)) == label
    with pytest.raises(InvalidArgument, match="give label="):
        inferred_label({"weight": torch.zeros(3, 4)})
    with pytest.raises(InvalidArgument, match="give label="):
        inferred_label({})


# -- what the engine releases -----------------------------------------------------------------------------------------


def test_clipping_alone_does_not_protect(tmp_path: Path):
    """Noise multiplier 1e-6 is next to no noise; the update has norm 0.1 and still holds the whole image."""
    x = image()
    model = linear_model()
    assert norm(gradient_of(model, x, 2)) > 0.5
    update = released(model, x, 2, tmp_path / "linear", 1e-6, bound=0.1)
    assert norm(update) == pytest.approx(0.1, rel=1e-3)
    assert torch.allclose(linear_input(update["1.weight"], update["1.bias"]).reshape(6, 6), x, atol=1e-3)

    model = convolutional()
    update = released(model, x, 2, tmp_path / "convolutional", 1e-6, bound=0.1)
    found = invert(
        update,
        model,
        losses,
        (6, 6),
        generator=torch.Generator().manual_seed(0),
        matching=Angle(steps=300, total_variation=1e-3),
    )
    assert found.label == 2 and correlation(found.reconstruction, x) > 0.99


def test_noise_does(tmp_path: Path):
    """At noise multiplier 1 the reconstructions of 8 images are uncorrelated with them.

    The mean of 8 correlations over 36 pixels has a standard deviation of about 0.06; the noise is seeded, and 0.3 is
    five of them (false alarms below 1e-5 for a new seed).
    """
    model = linear_model()
    similar = []
    for seed in range(8):
        update = released(model, image(seed), seed % 5, tmp_path / str(seed), 1.0)
        model.zero_grad()
        found = linear_input(update["1.weight"], update["1.bias"]).reshape(6, 6)
        similar.append(correlation(found, image(seed)))
    assert abs(float(np.mean(similar))) < 0.3, similar


# -- measures ---------------------------------------------------------------------------------------------------------


def test_the_measures_agree_with_numpy():
    a, b = image(1), image(2)
    error = ((a.numpy().astype(float) - b.numpy().astype(float)) ** 2).mean()
    assert mean_squared_error(a, b) == pytest.approx(error)
    assert peak_signal_to_noise(a, b) == pytest.approx(-10 * math.log10(error))
    assert peak_signal_to_noise(a * 255, b * 255, peak=255) == pytest.approx(-10 * math.log10(error), rel=1e-5)
    assert peak_signal_to_noise(a, a) == math.inf
    assert correlation(a, b) == pytest.approx(np.corrcoef(a.numpy().ravel(), b.numpy().ravel())[0, 1], abs=1e-6)
    assert correlation(a, 1 - a) == pytest.approx(-1)
    assert correlation(a, torch.ones(6, 6)) == 0
    with pytest.raises(InvalidArgument, match="one shape"):
        mean_squared_error(a, b.flatten())
    with pytest.raises(InvalidArgument, match="one shape"):
        correlation(torch.zeros(0), torch.zeros(0))
    with pytest.raises(InvalidArgument, match="that of an image"):
        total_variation(torch.zeros(5))


# -- bad input --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"4.bias": torch.full((5,), math.nan)}, "not finite"),
        ({"4.bias": torch.zeros(6)}, "4.bias"),
        ({"other": torch.zeros(6)}, "other"),
    ],
)
def test_a_gradient_of_another_model_is_refused(change: Named, words: str):
    model = convolutional()
    gradient = gradient_of(model, image(), 0) | change
    with pytest.raises(InvalidArgument, match=words):
        invert(gradient, model, losses, (6, 6), generator=torch.Generator())


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"restarts": 0}, "restarts"),
        ({"lower": 1.0, "upper": 1.0}, "lower < upper"),
        ({"upper": math.inf}, "lower < upper"),
        ({"shape": (6, 0)}, "shape"),
    ],
)
def test_values_outside_their_domain_are_refused(change: dict[str, object], words: str):
    model = convolutional()
    arguments: dict[str, Any] = {"shape": (6, 6), "generator": torch.Generator(), **change}
    with pytest.raises(InvalidArgument, match=words):
        invert(gradient_of(model, image(), 0), model, losses, **arguments)


@pytest.mark.parametrize(
    ("make", "words"),
    [
        (lambda: Angle(steps=0), "steps"),
        (lambda: Angle(total_variation=-1), "total_variation"),
        (lambda: Angle(total_variation=math.nan), "total_variation"),
        (lambda: Angle(step_size=0), "step_size"),
        (lambda: Distance(steps=-1), "steps"),
        (lambda: Distance(max_grad_norm=0), "max_grad_norm"),
        (lambda: Distance(max_grad_norm=math.nan), "max_grad_norm"),
    ],
)
def test_a_matching_outside_its_domain_is_refused(make, words: str):
    with pytest.raises(InvalidArgument, match=words):
        make()


# -- the picture ------------------------------------------------------------------------------------------------------


def test_the_picture_is_the_same_for_the_same_panels_and_refuses_what_is_no_grid():
    pytest.importorskip("matplotlib", reason="the extra `report` is not installed")
    from dpkit.report.inversion_plot import Panel, draw_inversion

    panel = Panel(image().numpy(), "ε = 1\n7.0 dB", unsafe=True)
    one, other = (draw_inversion(["a", "b"], [("row", [panel, panel])], "title", "svg") for _ in range(2))
    assert one == other and "ε = 1" in one.decode() and "7.0 dB" in one.decode()
    assert draw_inversion(["a"], [("row", [panel])], "title").startswith(b"\x89PNG")
    for columns, rows, words in (
        ([], [], "nothing to draw"),
        (["a", "b"], [("row", [panel])], "1 panels"),
        (["a"], [("row", [Panel(np.zeros(4), "")])], "grey image"),
        (["a"], [("row", [Panel(np.full((2, 2), np.nan), "")])], "grey image"),
    ):
        with pytest.raises(InvalidArgument, match=words):
            draw_inversion(columns, rows, "title")


# -- the experiment ---------------------------------------------------------------------------------------------------


@pytest.fixture
def small() -> Split:
    """Six images each for training and test; three classes."""
    images = torch.stack([image(seed) for seed in range(12)]).numpy()
    labels = np.arange(12) % 3
    return Split(images[:6], labels[:6], images[6:], labels[6:], 3)


def test_the_experiment_measures_every_way_and_writes_it_down(small: Split):
    pytest.importorskip("matplotlib", reason="the extra `report` is not installed")
    setting = experiment.Setting(images=1, tuning=1, shown=1, steps=2)
    images, found = experiment.attack(setting, small)
    assert torch.equal(images, torch.from_numpy(small.test_x[:1]))
    names = ["no privacy", "clipped only", "ε = 10,000", "ε = 1,000", "ε = 100", "ε = 10", "ε = 1"]
    assert list(found["read off"]) == list(found["search"]) == names
    for way in ("no privacy", "clipped only"):
        for reconstruction, original in zip(found["read off"][way].reconstructions, images, strict=True):
            assert torch.allclose(reconstruction, original, atol=1e-3)
    for epsilon, way in ((1e4, "ε = 10,000"), (1.0, "ε = 1")):
        cost = found["search"][way].epsilon
        assert 0.99 * epsilon <= cost <= epsilon
        expected = accounting.epsilon(
            Gaussian(found["search"][way].noise_multiplier), 1e-5, relation=Relation.ADD_REMOVE
        ).upper
        assert cost == pytest.approx(expected, rel=1e-6)
    text = experiment.page("made-up images", setting, small, images, found, 1.0, "by hand")
    assert all(f"| {name} |" in text or f"| **{name}** |" in text for name in names)
    assert "attacks, not bounds" in text and "by hand" in text
    assert experiment.picture(setting, images, found).startswith(b"\x89PNG")


def test_the_experiment_takes_one_image_of_each_class_in_turn(small: Split):
    _, labels = experiment.first_of_each_class(small, 6)
    assert labels.tolist() == [0, 1, 2, 0, 1, 2]


def test_the_experiment_refuses_a_folder_without_data(tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    assert experiment.main(["--data-dir", str(tmp_path), "--out", str(tmp_path / "out")]) == 1
    assert "train-images-idx3-ubyte.gz is missing" in capsys.readouterr().err
    assert not (tmp_path / "out").exists()
