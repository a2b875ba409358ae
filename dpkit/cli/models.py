"""Models of the command line. Inputs are images or rows in [0, 1], or token ids; where they are shifted, it is by
constants, never by statistics of the data.

``tanh_cnn`` is the network of Papernot et al. 2021, "Tempered sigmoid activations for deep learning with differential
privacy" (https://arxiv.org/abs/2007.14191): bounded activations keep per-example gradients short.
"""

from __future__ import annotations

import math
from collections.abc import Callable

from torch import Tensor, nn

from dpkit.datasets.text import SST2_TOKEN_IDS

HIDDEN_UNITS = 32
EMBEDDING_SIZE = 16


class Centre(nn.Module):
    """Images from [0, 1] to [-1, 1]."""

    def forward(self, images: Tensor) -> Tensor:
        return images * 2 - 1


def _flat(shape: tuple[int, ...]) -> tuple[nn.Module, ...]:
    """Images are centred and become rows; rows stay as they are.

    Rows are mostly categories, a few ones among many zeros. Shifted to -1 the zeros would make up most of every
    example's gradient, in nearly the same direction for all.
    """
    return (Centre(), nn.Flatten()) if len(shape) > 1 else ()


def _linear(shape: tuple[int, ...], classes: int) -> nn.Module:
    return nn.Sequential(*_flat(shape), nn.Linear(math.prod(shape), classes))


def _mlp(shape: tuple[int, ...], classes: int) -> nn.Module:
    return nn.Sequential(
        *_flat(shape),
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


class BagOfEmbeddings(nn.Module):
    """Token ids (N, length), 0 is padding, to logits (N, classes): the mean of the words' vectors, then linear."""

    def __init__(self, token_ids: int, classes: int) -> None:
        super().__init__()
        self.embedding = nn.Embedding(token_ids, EMBEDDING_SIZE)
        nn.init.zeros_(self.embedding.weight)  # a word that training hardly sees should say nothing
        self.head = nn.Linear(EMBEDDING_SIZE, classes)
        # torch starts the head so small that an example's gradient is mostly that of the bias: the clip, and with it
        # the noise, would be set by the one parameter that says nothing about words.
        nn.init.normal_(self.head.weight)

    def forward(self, tokens: Tensor) -> Tensor:
        words = (tokens != 0).unsqueeze(2).to(self.embedding.weight.dtype)
        count = words.sum(1).clamp(min=1)  # a row of padding alone has the mean 0
        return self.head((self.embedding(tokens) * words).sum(1) / count)


def _bag_of_embeddings(_: tuple[int, ...], classes: int) -> nn.Module:
    return BagOfEmbeddings(SST2_TOKEN_IDS, classes)  # sst2 is the only text that config.py lets through


_BUILDERS: dict[str, Callable[[tuple[int, ...], int], nn.Module]] = {
    "linear": _linear,
    "mlp": _mlp,
    "tanh_cnn": _tanh_cnn,
    "bag_of_embeddings": _bag_of_embeddings,
}


def build(name: str, shape: tuple[int, ...], classes: int) -> nn.Module:
    """A fresh model of inputs of ``shape``; its weights come from torch's global generator."""
    return _BUILDERS[name](shape, classes)
