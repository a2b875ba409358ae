"""Laws of per-sample gradients, for every backend and every setting, against a loop of one backward pass an example."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from gradients.layer_settings import LAYERS
from gradients.settings import BACKENDS, SETTINGS, Setting, oracle
from gradients.use_settings import USES

from dpkit.gradients.arithmetic import ROUNDING_CHAIN

pytestmark = [
    # torch's own remarks on the oracle's convolution, and on what its vmap does one by one.
    pytest.mark.filterwarnings("ignore:Using padding='same' with even kernel lengths:UserWarning"),
    pytest.mark.filterwarnings("ignore:There is a performance drop because we have not yet implemented:UserWarning"),
]


def pairs(settings: list[Setting], *backends: str) -> list[Any]:
    """Every one of the backends with every setting that it can run."""
    return [
        pytest.param(BACKENDS[name], setting, id=f"{name}-{setting.name}")
        for name in backends
        for setting in settings
        if setting.mapped or name != "vmap"
    ]


def crowds(settings: list[Setting]) -> list[Setting]:
    return [setting for setting in settings if len(setting.inputs()) > 1]


over_all = pytest.mark.parametrize(("backend", "setting"), pairs([*SETTINGS, *LAYERS, *USES], *BACKENDS))
# What holds of one way to run a layer holds of the others once the gradients are the same.
MOST = [*pairs(SETTINGS, *BACKENDS), *pairs([*LAYERS, *USES], "ghost")]
over_most = pytest.mark.parametrize(("backend", "setting"), MOST)
CROWDS = [*pairs(crowds(SETTINGS), *BACKENDS), *pairs(crowds([*LAYERS, *USES]), "ghost")]
over_crowds = pytest.mark.parametrize(("backend", "setting"), CROWDS)


def per_sample(backend: Any, setting: Setting) -> tuple[Any, torch.Tensor]:
    model, batch, size = setting.build()
    found, losses = backend.per_sample(model, setting.loss, batch, size)
    assert all(parameter.grad is None for parameter in model.parameters()), "a raw gradient reached p.grad"
    return found, losses


def some_weights(norms: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(3)
    return {name: torch.rand(len(norm), generator=generator, dtype=torch.float64) for name, norm in norms.items()}


@over_all
def test_norms_and_sums_are_those_of_a_loop_over_examples(backend: Any, setting: Setting) -> None:
    true_losses, gradients = oracle(setting)
    found, losses = per_sample(backend, setting)
    torch.testing.assert_close(losses, true_losses, rtol=setting.tolerance, atol=setting.tolerance)
    assert not losses.requires_grad
    assert found.size == len(true_losses)
    norms = found.sq_norms()
    assert norms.keys() == gradients.keys()
    # A gradient that is zero but for rounding (the keys' bias in attention) has no relative error: measure against the
    # largest of the examples, and against what rounding leaves of the largest gradient.
    largest = max((float(rows.norm(dim=1).max()) for rows in gradients.values() if len(rows)), default=0.0)
    noise = setting.tolerance / 30 * largest + 1e-15
    for name, rows in gradients.items():
        norm = rows.norm(dim=1)
        floor = setting.tolerance * float(norm.max()) + noise if len(norm) else 0.0
        torch.testing.assert_close(norms[name].double().sqrt(), norm, rtol=setting.tolerance, atol=floor)
    weights = some_weights(norms)
    shapes = {name: parameter.shape for name, parameter in setting.build()[0].named_parameters()}
    sums = dict(found.weighted_sum(weights))
    assert sums.keys() == gradients.keys()
    for name, rows in gradients.items():
        assert sums[name].shape == shapes[name]
        assert sums[name].dtype == (torch.float64 if setting.dtype == torch.float64 else torch.float32)
        error = (sums[name].double().flatten() - weights[name] @ rows).norm()
        assert error <= setting.tolerance * (weights[name] @ rows.norm(dim=1)) + len(rows) * noise, name


@over_most
def test_norms_are_never_below_what_is_summed(backend: Any, setting: Setting) -> None:
    found, _ = per_sample(backend, setting)
    norms = found.sq_norms()
    for b in range(min(found.size, 8)):
        only = {name: torch.eye(found.size)[b] for name in norms}
        for name, value in found.weighted_sum(only):
            length, bound = float(value.double().norm()), float(norms[name][b].sqrt())
            assert length <= bound * (1 + (ROUNDING_CHAIN + 8) * 2.0**-24), (name, b)


@over_most
def test_selected_units_are_the_same_units(backend: Any, setting: Setting) -> None:
    found, _ = per_sample(backend, setting)
    keep = torch.arange(found.size) % 3 != 1
    norms, fewer = found.sq_norms(), found.select(keep)
    assert fewer.size == int(keep.sum())
    for name, norm in fewer.sq_norms().items():
        torch.testing.assert_close(norm, norms[name][keep], rtol=1e-6, atol=1e-30)
    weights = some_weights(norms)
    zeroed = dict(found.weighted_sum({name: weight * keep for name, weight in weights.items()}))
    for name, value in fewer.weighted_sum({name: weight[keep] for name, weight in weights.items()}):
        bound = weights[name].double() @ norms[name].double().sqrt()
        assert (value.double() - zeroed[name].double()).norm() <= 2.0**-16 * bound + 1e-30


@over_crowds
@pytest.mark.parametrize("poison", [torch.nan, torch.inf, 1e30])
def test_a_poisoned_example_spoils_itself_alone(backend: Any, setting: Setting, poison: float) -> None:
    model, (x, y, weight), size = setting.build()
    clean, _ = backend.per_sample(model, setting.loss, (x, y, weight), size)
    weight = weight.clone()
    weight[1] = poison
    spoiled, _ = backend.per_sample(model, setting.loss, (x, y, weight), size)
    before, after = clean.sq_norms(), spoiled.sq_norms()
    others = torch.arange(size) != 1
    for name, norm in after.items():
        torch.testing.assert_close(norm[others], before[name][others], rtol=1e-6, atol=1e-30)
        if before[name][1] > 1e-12:
            assert not norm[1] < 1e20, (name, float(norm[1]))
    weights = {name: weight[others] for name, weight in some_weights(before).items()}
    undisturbed = dict(clean.select(others).weighted_sum(weights))
    for name, value in spoiled.select(others).weighted_sum(weights):
        bound = weights[name] @ before[name][others].double().sqrt()
        assert (value.double() - undisturbed[name].double()).norm() <= 2.0**-16 * bound + 1e-30
