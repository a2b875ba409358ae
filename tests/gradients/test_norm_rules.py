"""Normalization layers give the per-sample gradients of one backward pass for each example."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from gradients.one_by_one import check_each, energy, observe
from torch import Tensor, nn
from torch.nn import functional as F

from dpkit import errors
from dpkit.gradients import ghost

over_dtypes = pytest.mark.parametrize("dtype", [torch.float64, torch.float32])


def randomized(model: nn.Module) -> nn.Module:
    """Scales of one and shifts of zero would hide mistakes."""
    torch.manual_seed(0)
    for parameter in model.parameters():
        nn.init.normal_(parameter)
    return model


def behind_linear(layer: nn.Module, width: int = 6) -> nn.Module:
    """So that the gradient of the input counts too."""
    return randomized(nn.Sequential(nn.Linear(width, width), layer, nn.Sigmoid()))


LAYERS: dict[str, tuple[Callable[[], nn.Module], tuple[int, ...]]] = {
    "layer": (lambda: behind_linear(nn.LayerNorm(6)), (5, 6)),
    "layer, positions": (lambda: behind_linear(nn.LayerNorm(6)), (5, 4, 3, 6)),
    "layer, two axes": (lambda: behind_linear(nn.LayerNorm([4, 6])), (5, 2, 4, 6)),
    "layer, no bias": (lambda: behind_linear(nn.LayerNorm(6, bias=False)), (5, 4, 6)),
    "layer, no parameters": (lambda: behind_linear(nn.LayerNorm(6, elementwise_affine=False)), (5, 4, 6)),
    "layer, no position": (lambda: behind_linear(nn.LayerNorm(6)), (5, 1, 6)),
    "rms": (lambda: behind_linear(nn.RMSNorm(6)), (5, 6)),
    "rms, positions": (lambda: behind_linear(nn.RMSNorm(6, eps=1e-3)), (5, 4, 3, 6)),
    "rms, two axes": (lambda: behind_linear(nn.RMSNorm([4, 6])), (5, 2, 4, 6)),
    "rms, no parameters": (lambda: behind_linear(nn.RMSNorm(6, elementwise_affine=False)), (5, 4, 6)),
    "group": (lambda: behind_linear(nn.GroupNorm(2, 4)), (5, 4, 6)),
    "group, images": (lambda: behind_linear(nn.GroupNorm(2, 4)), (5, 4, 3, 6)),
    "group, no positions": (lambda: behind_linear(nn.GroupNorm(2, 6)), (5, 6)),
    "group, no parameters": (lambda: behind_linear(nn.GroupNorm(2, 4, affine=False)), (5, 4, 6)),
    "instance, 1-D": (lambda: behind_linear(nn.InstanceNorm1d(4, affine=True)), (5, 4, 6)),
    "instance, 2-D": (lambda: behind_linear(nn.InstanceNorm2d(4, affine=True)), (5, 4, 3, 6)),
    "instance, 3-D": (lambda: behind_linear(nn.InstanceNorm3d(4, affine=True, eps=1e-2)), (5, 4, 3, 2, 6)),
}


@over_dtypes
@pytest.mark.parametrize(("model", "shape"), LAYERS.values(), ids=LAYERS.keys())
def test_each_example(dtype: torch.dtype, model: Callable[[], nn.Module], shape: tuple[int, ...]) -> None:
    torch.manual_seed(1)
    check_each(model(), (torch.randn(*shape),), dtype)


def test_frozen_scales_and_shifts() -> None:
    torch.manual_seed(1)
    for layer in (nn.LayerNorm(6), nn.GroupNorm(2, 6), nn.InstanceNorm1d(6, affine=True), nn.RMSNorm(6)):
        for frozen in ("1.weight", "1.bias"):
            model = behind_linear(layer)
            for name, parameter in model.named_parameters():
                parameter.requires_grad_(name != frozen)
            check_each(model, (torch.randn(5, 6, 6),), torch.float64)


@pytest.mark.parametrize("layer", [nn.LayerNorm(6), nn.RMSNorm(6), nn.GroupNorm(2, 6)], ids=["layer", "rms", "group"])
def test_bfloat16(layer: nn.Module) -> None:
    torch.manual_seed(1)
    model = randomized(nn.Sequential(layer)).bfloat16()
    x = torch.randn(5, 6, 6).bfloat16()
    check_each(model, (x,), torch.bfloat16)


def test_an_offset_costs_no_digits() -> None:
    """The scale's gradient is of (x - mean), not of x and the mean apart."""
    torch.manual_seed(1)
    model = randomized(nn.Sequential(nn.LayerNorm(64)))
    check_each(model, (100.0 + torch.randn(5, 7, 64),), torch.float32)


class Folded(nn.Module):
    """Several rows of one example in the axis of the examples, or the examples second."""

    def __init__(self, layer: nn.Module, order: str) -> None:
        super().__init__()
        self.layer, self.order = layer, order

    def forward(self, x: Tensor) -> Tensor:
        size, rows = x.shape[:2]
        if self.order == "major":
            return self.layer(x.flatten(0, 1)).unflatten(0, (size, rows))
        if self.order == "minor":
            return self.layer(x.transpose(0, 1).flatten(0, 1)).unflatten(0, (rows, size)).transpose(0, 1)
        return self.layer(x.transpose(0, 1)).transpose(0, 1)


@pytest.mark.parametrize("order", ["major", "minor", "second"])
@pytest.mark.parametrize("layer", ["layer", "rms", "group", "instance"])
def test_where_the_examples_were_observed(layer: str, order: str) -> None:
    torch.manual_seed(1)
    make = {
        "layer": lambda: nn.LayerNorm(6),
        "rms": lambda: nn.RMSNorm(6),
        "group": lambda: nn.GroupNorm(2, 4),
        "instance": lambda: nn.InstanceNorm1d(4, affine=True),
    }[layer]
    x = torch.randn(3, 4, 4, 6) if order != "second" else torch.randn(4, 4, 6)
    model = randomized(Folded(make(), order))
    if order == "second" and layer in ("group", "instance"):
        observe(model, (x,))
        with pytest.raises(errors.UnsupportedOperation, match="normalizes over the axis of the examples"):
            ghost.per_sample(model, energy, (x,), len(x))
    else:
        check_each(model, (x,), torch.float64, observed=True)


def test_normalizing_over_the_examples_is_refused() -> None:
    class Over(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layer = nn.LayerNorm(5)

        def forward(self, x: Tensor) -> Tensor:
            return self.layer(x.transpose(0, 1)).transpose(0, 1)

    torch.manual_seed(1)
    model, x = randomized(Over()), torch.randn(5, 5)
    observe(model, (x,))
    with pytest.raises(errors.UnsupportedOperation, match=r"normalizes over the axis of the examples|mixed before"):
        ghost.per_sample(model, energy, (x,), 5)


def test_running_statistics_are_refused() -> None:
    torch.manual_seed(1)
    x = torch.randn(5, 4, 6)
    for training in (True, False):
        model = randomized(nn.InstanceNorm1d(4, affine=True, track_running_stats=True)).train(training)
        with pytest.raises(errors.UnsupportedOperation, match="track_running_stats=False"):
            ghost.per_sample(model, energy, (x,), 5)


def test_functions_with_derived_scales() -> None:
    class Shifted(nn.Module):
        """As Gemma has it: one is added to the scale."""

        def __init__(self) -> None:
            super().__init__()
            self.scale = nn.Parameter(torch.randn(6))

        def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
            return F.rms_norm(x, (6,), 1 + self.scale), F.layer_norm(x, (6,), self.scale.exp(), self.scale)

    torch.manual_seed(0)
    check_each(Shifted(), (torch.randn(5, 4, 6),), torch.float64)
