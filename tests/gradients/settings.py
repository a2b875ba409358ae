"""The models over which the laws of per-sample gradients are stated, the backends under them, and the oracle."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from types import SimpleNamespace
from typing import Any

import torch
from gradients.loop import PROBE_ROWS, observe, one_by_one, recorded
from torch import Tensor, nn
from torch.nn import functional as F

from dpkit.gradients import Capture, ghost, trainable, vmap


@dataclass(frozen=True)
class Setting:
    """One model with one batch: ``build()`` returns the model and (inputs, targets, per-example loss weights).

    Attributes:
      observed: whether the backend is shown where the examples are, because they are not along the first axis.
      mapped: whether ``torch.func.vmap`` can run the model.
    """

    name: str
    model: Callable[[], nn.Module]
    inputs: Callable[[], Tensor]
    loss: Callable[[nn.Module, Any], Tensor]
    dtype: torch.dtype = torch.float32
    tolerance: float = 1e-5
    observed: bool = False
    mapped: bool = True

    def build(self) -> tuple[nn.Module, tuple[Tensor, ...], int]:
        torch.manual_seed(7)
        inputs = self.inputs()
        size = len(inputs)
        model = self.model().to(self.dtype)
        if inputs.is_floating_point():
            inputs = inputs.to(self.dtype)
        if self.observed:
            repeated = (
                torch.randn(PROBE_ROWS, *inputs.shape[1:]).to(inputs.dtype)
                if inputs.is_floating_point()
                else (torch.arange(PROBE_ROWS * inputs[0].numel()).view(PROBE_ROWS, *inputs.shape[1:]) % 11)
            )
            targets, ones = torch.arange(PROBE_ROWS) % 3, torch.ones(PROBE_ROWS, dtype=self.dtype)
            observe(model, self.loss, (repeated, targets, ones))
        return model, (inputs, torch.arange(size) % 3, torch.ones(size, dtype=self.dtype)), size


def classify(model: nn.Module, batch: tuple[Tensor, ...]) -> Tensor:
    x, y, weight = batch
    return F.cross_entropy(model(x), y, reduction="none") * weight


def next_token(model: nn.Module, batch: tuple[Tensor, ...]) -> Tensor:
    """Every token of an example counts: mean over its own tokens."""
    x, _, weight = batch
    scores = model(x)
    return F.cross_entropy(scores.flatten(0, 1), x.flatten(), reduction="none").view(x.shape).mean(1) * weight


def energy(model: nn.Module, batch: tuple[Tensor, ...]) -> Tensor:
    x, _, weight = batch
    return model(x).flatten(1).square().sum(1) * weight


def tilted(model: nn.Module, batch: tuple[Tensor, ...]) -> Tensor:
    """Unlike the energy, it has a gradient after a normalization."""
    x, _, weight = batch
    out = model(x).flatten(1)
    return (out * torch.cos(torch.arange(out.shape[1]).to(out)) + 0.1 * out.square()).sum(1) * weight


class TiedBag(nn.Module):
    """Mean of token vectors, scored by the same table."""

    def __init__(self) -> None:
        super().__init__()
        self.table = nn.Embedding(11, 6, padding_idx=-1)
        self.head = nn.Linear(6, 11, bias=False)
        self.head.weight = self.table.weight

    def forward(self, ids: Tensor) -> Tensor:
        return self.head(torch.tanh(self.table(ids).mean(1)))


class TiedTokens(TiedBag):
    def forward(self, ids: Tensor) -> Tensor:
        return self.head(torch.tanh(self.table(ids)))


class TwoTables(nn.Module):
    """One table looked up at two places, and added."""

    def __init__(self) -> None:
        super().__init__()
        self.table = nn.Embedding(11, 4)

    def forward(self, ids: Tensor) -> Tensor:
        return self.table(ids).mean(1) + torch.tanh(self.table(ids[:, :2])).sum(1)


class Raw(nn.Module):
    """Raw parameters: a scalar, a scale, a bias, a position table, a matrix from the right, a vector."""

    def __init__(self) -> None:
        super().__init__()
        self.gain = nn.Parameter(torch.tensor(0.7))
        self.scale = nn.Parameter(torch.randn(5))
        self.shift = nn.Parameter(torch.randn(5))
        self.position = nn.Parameter(torch.randn(1, 4, 5))
        self.matrix = nn.Parameter(torch.randn(5, 6))
        self.vector = nn.Parameter(torch.randn(6))
        self.bias = nn.Parameter(torch.randn(3))

    def forward(self, x: Tensor) -> Tensor:
        x = (self.scale * x + self.position - self.shift) / self.gain
        x = torch.tanh(x @ self.matrix)
        weight = torch.matmul(x, self.vector)
        pooled = (x * weight[:, :, None]).mean(1)[:, :3].clone()
        pooled += self.bias
        return pooled


class Reused(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(5, 5)
        self.norm = nn.LayerNorm(5)

    def forward(self, x: Tensor) -> Tensor:
        return self.layer(self.norm(torch.tanh(self.layer(self.norm(x)))))


class ReusedConvolution(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Conv2d(3, 3, 3, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        return self.layer(torch.tanh(self.layer(x))).mean((2, 3))


class Functional(nn.Module):
    """Weights in another module and used by hand; one in two layouts, with and without its bias."""

    def __init__(self) -> None:
        super().__init__()
        self.a = nn.Linear(5, 4)
        self.unused = nn.Linear(2, 2)

    def forward(self, x: Tensor) -> Tensor:
        h = torch.tanh(F.linear(x, self.a.weight))
        h = torch.tanh(h @ self.a.weight)
        return torch.addmm(self.a.bias, h, torch.ones(5, 4, dtype=h.dtype))


class Block(nn.Module):
    def __init__(self, width: int) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(width)
        self.up = nn.Linear(width, 2 * width)
        self.down = nn.Linear(2 * width, width, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.down(F.gelu(self.up(self.norm(x))))


def frozen_parts() -> nn.Module:
    model = nn.Sequential(nn.Linear(6, 5), nn.Tanh(), nn.Linear(5, 4), nn.LayerNorm(4), nn.Linear(4, 3))
    for parameter in (model[0].bias, model[2].weight, model[3].weight, model[4].weight):
        parameter.requires_grad_(False)
    return model


def mlp() -> nn.Module:
    return nn.Sequential(nn.Linear(6, 8), nn.ReLU(), nn.Linear(8, 8, bias=False), nn.Tanh(), nn.Linear(8, 3))


def cnn() -> nn.Module:
    """The convolutional network of the DP-SGD literature for 28 x 28 images."""
    return nn.Sequential(
        *(nn.Conv2d(1, 16, 8, stride=2, padding=2), nn.Tanh(), nn.MaxPool2d(2, 1)),
        *(nn.Conv2d(16, 32, 4, stride=2), nn.Tanh(), nn.MaxPool2d(2, 1)),
        *(nn.Flatten(), nn.Linear(512, 32), nn.Tanh(), nn.Linear(32, 10)),
    )


def group_norm_cnn() -> nn.Module:
    return nn.Sequential(
        *(nn.Conv2d(2, 4, 3, padding=1), nn.GroupNorm(2, 4), nn.ReLU()),
        *(nn.Conv2d(4, 6, 3, stride=2, bias=False), nn.GroupNorm(3, 6), nn.Flatten(), nn.Linear(54, 3)),
    )


def convolution(*args: Any, **kwargs: Any) -> Callable[[], nn.Module]:
    return lambda: nn.Sequential(nn.Conv2d(*args, **kwargs), nn.Tanh(), nn.Conv2d(8, 2, 1), nn.Flatten())


def normal(*shape: int) -> Callable[[], Tensor]:
    return lambda: torch.randn(*shape)


def tokens(*shape: int) -> Callable[[], Tensor]:
    return lambda: torch.randint(0, 11, shape)


SETTINGS = [
    Setting("linear", lambda: nn.Linear(6, 3), normal(5, 6), classify),
    Setting("mlp", mlp, normal(9, 6), classify),
    Setting("mlp, 150 examples", mlp, normal(150, 6), classify),
    Setting("mlp, one example", mlp, normal(1, 6), classify),
    Setting("mlp, no example", mlp, normal(0, 6), classify),
    Setting("mlp, float64", mlp, normal(70, 6), classify, torch.float64),
    Setting("mlp, bfloat16", mlp, normal(9, 6), classify, torch.bfloat16, 4e-2),
    Setting("frozen parts", frozen_parts, normal(4, 6), classify),
    Setting("cnn", cnn, normal(6, 1, 28, 28), classify),
    Setting("cnn, no example", cnn, normal(0, 1, 28, 28), classify),
    Setting(
        "convolution, stride and padding",
        convolution(4, 8, (3, 2), stride=(2, 1), padding=(0, 1)),
        normal(5, 4, 7, 6),
        energy,
    ),
    Setting("convolution, dilation and groups", convolution(4, 8, 3, dilation=2, groups=2), normal(5, 4, 7, 6), energy),
    Setting("convolution, depthwise", convolution(4, 8, 2, groups=4, padding="valid"), normal(5, 4, 7, 6), energy),
    Setting("convolution, same", convolution(4, 8, (4, 3), padding="same"), normal(5, 4, 7, 6), energy),
    Setting(
        "convolution, same, dilated",
        convolution(4, 8, (2, 4), padding="same", dilation=(3, 1)),
        normal(5, 4, 7, 6),
        energy,
    ),
    Setting("convolution, float64", convolution(4, 8, 3), normal(5, 4, 7, 6), energy, torch.float64),
    Setting("convolution, bfloat16", convolution(4, 8, 3), normal(5, 4, 7, 6), energy, torch.bfloat16, 4e-2),
    Setting(
        "convolution, one axis",
        lambda: nn.Sequential(nn.Conv1d(3, 4, 3, padding=1), nn.Flatten()),
        normal(5, 3, 8),
        energy,
    ),
    Setting(
        "convolution, three axes",
        lambda: nn.Sequential(nn.Conv3d(2, 3, 2), nn.Flatten()),
        normal(5, 2, 3, 4, 3),
        energy,
    ),
    Setting("convolution, used twice", ReusedConvolution, normal(5, 3, 5, 5), energy),
    Setting("group norm cnn", group_norm_cnn, normal(5, 2, 8, 8), classify),
    Setting("group norm cnn, bfloat16", group_norm_cnn, normal(5, 2, 8, 8), classify, torch.bfloat16, 6e-2),
    Setting("group norm cnn, no example", group_norm_cnn, normal(0, 2, 8, 8), classify),
    Setting(
        "layer norm",
        lambda: nn.Sequential(nn.LayerNorm((3, 6)), nn.Flatten(), nn.Linear(18, 3)),
        normal(5, 3, 6),
        classify,
    ),
    Setting("embedding, pooled, tied head", TiedBag, tokens(6, 7), classify),
    Setting("embedding, tied head on tokens", TiedTokens, tokens(6, 7), next_token),
    Setting("embedding, no example", TiedTokens, tokens(0, 7), next_token),
    Setting("embedding, looked up twice", TwoTables, tokens(6, 7), energy),
    Setting("raw parameters", Raw, normal(6, 4, 5), classify),
    Setting("layer used twice", Reused, normal(6, 5), energy),
    Setting("layer used twice on tokens", Reused, normal(6, 4, 5), energy),
    Setting("functional use", Functional, normal(6, 5), energy),
    Setting(
        "tokens",
        lambda: nn.Sequential(nn.Embedding(11, 8), Block(8), Block(8), nn.Linear(8, 11)),
        tokens(6, 10),
        next_token,
    ),
    Setting("tokens, no token", lambda: nn.Sequential(nn.Linear(5, 4), nn.LayerNorm(4)), normal(6, 0, 5), energy),
]


def oracle(setting: Setting) -> tuple[Tensor, dict[str, Tensor]]:
    """The losses and name -> (B, entries) gradients in float64, by one backward pass for each example."""
    model, batch, size = setting.build()
    losses, gradients = one_by_one(model, setting.loss, batch, size)
    return losses.to(setting.dtype), gradients


def _without_memory(model: nn.Module, loss_fn: Any, batch: Any, size: int) -> tuple[Any, Tensor]:
    return recorded(model, loss_fn, batch, size, keep_bytes=0)


def _attached(model: nn.Module, loss_fn: Any, batch: Any, size: int) -> tuple[Any, Tensor]:
    capture = Capture(trainable(model), layouts=ghost.memory(model).layouts)
    capture.attach(model)
    capture.begin(size)
    losses = loss_fn(model, batch)
    torch.autograd.backward(losses, torch.ones_like(losses))
    found = capture.collect(size)
    capture.detach()
    return found, losses.detach()


BACKENDS = {
    "ghost": ghost,
    "vmap": vmap,
    "ghost, nothing kept": SimpleNamespace(per_sample=_without_memory),
    "attached": SimpleNamespace(per_sample=_attached),
}
"""The two backends, and two ways in which an engine may use a capture."""
