"""Models of the command line. Inputs are images in [0, 1]; where they are shifted, it is by constants, never by
statistics of the data.

``tanh_cnn`` is the network of Papernot et al. 2021, "Tempered sigmoid activations for deep learning with differential
privacy" (https://arxiv.org/abs/2007.14191): bounded activations keep per-example gradients short.
"""

from __future__ import annotations

import math
from collections.abc import Callable

from torch import Tensor, nn

HIDDEN_UNITS = 32


class Centre(nn.Module):
    """Images from [0, 1] to [-1, 1]."""

    def forward(self, images: Tensor) -> Tensor:
        return images * 2 - 1


def _linear(shape: tuple[int, ...], classes: int) -> nn.Module:
    return nn.Sequential(Centre(), nn.Flatten(), nn.Linear(math.prod(shape), classes))


def _mlp(shape: tuple[int, ...], classes: int) -> nn.Module:
    return nn.Sequential(
        Centre(),
        nn.Flatten(),
        nn.Linear(math.prod(shape), HIDDEN_UNITS),
        nn.Tanh(),
        nn.Linear(HIDDEN_UNITS, classes),
    )


def _tanh_cnn(shape: tuple[int, ...], classes: int) -> nn.Module:
    # The dark background stays at 0: shifted to -1 it dominates the gradients and costs half a percent of accuracy.
    return nn.Sequential(
        nn.Unflatten(1, (1, shape[0])),
        nn.Conv2d(1, 16, 8, stride=2, padding=2),
        nn.Tanh(),
        nn.MaxPool2d(2, stride=1),
        nn.Conv2d(16, 32, 4, stride=2),
        nn.Tanh(),
        nn.MaxPool2d(2, stride=1),
        nn.Flatten(),
        nn.Linear(32 * 4 * 4, 32),  # 4x4 is what is left of 28x28, the only size that config.py lets through
        nn.Tanh(),
        nn.Linear(32, classes),
    )


_BUILDERS: dict[str, Callable[[tuple[int, ...], int], nn.Module]] = {
    "linear": _linear,
    "mlp": _mlp,
    "tanh_cnn": _tanh_cnn,
}


def build(name: str, shape: tuple[int, ...], classes: int) -> nn.Module:
    """A fresh model of images of ``shape``; its weights come from torch's global generator."""
    return _BUILDERS[name](shape, classes)
