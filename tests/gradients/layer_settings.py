"""The layers of ``torch.nn`` that users train, each in its options and layouts."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from typing import Any

import torch
from gradients.settings import Setting, next_token, normal, tilted, tokens
from torch import Tensor, nn
from torch.nn.utils import parametrizations


class SequenceFirst(nn.Module):
    """A network that wants (T, B, d), in a model whose batches are (B, T, d)."""

    def __init__(self, inner: nn.Module) -> None:
        super().__init__()
        self.inner = inner

    def forward(self, x: Tensor) -> Tensor:
        return first(self.inner(x.transpose(0, 1))).transpose(0, 1)


class Recurrent(nn.Module):
    """Outputs and last states of a recurrent network count."""

    def __init__(self, inner: nn.Module) -> None:
        super().__init__()
        self.inner = inner

    def forward(self, x: Tensor) -> Tensor:
        outputs, state = self.inner(x)
        states = torch.cat(state, -1) if isinstance(state, tuple) else state
        return torch.cat([outputs.flatten(1), states.transpose(0, 1).flatten(1)], 1)


class LearntState(nn.Module):
    """The first states are parameters."""

    def __init__(self) -> None:
        super().__init__()
        self.inner = nn.LSTM(4, 3, batch_first=True)
        self.start = nn.Parameter(torch.randn(2, 1, 1, 3))

    def forward(self, x: Tensor) -> Tensor:
        h, c = self.start.expand(-1, -1, len(x), -1)
        return self.inner(x, (h.contiguous(), c.contiguous()))[0]


class Cells(nn.Module):
    """A loop over time, by the user's own hand."""

    def __init__(self, cell: nn.Module) -> None:
        super().__init__()
        self.cell = cell

    def forward(self, x: Tensor) -> Tensor:
        state: Any = None
        outputs = []
        for step in x.unbind(1):
            state = self.cell(step) if state is None else self.cell(step, state)
            outputs.append(first(state))
        return torch.stack(outputs, 1)


class Attention(nn.Module):
    """Self-attention with masks that depend on the example; with ``keys``, of one half to the other."""

    def __init__(
        self, *, pads: bool = False, causal: bool = False, weights: bool = False, keys: bool = False, **options: Any
    ) -> None:
        super().__init__()
        self.inner = nn.MultiheadAttention(4, 2, batch_first=True, **options)
        self.pads, self.causal, self.weights, self.keys = pads, causal, weights, keys

    def forward(self, x: Tensor) -> Tensor:
        length = x.shape[1]
        pads = (x[..., 0] > 1) & (torch.arange(length) > 0) if self.pads else None
        causal = torch.ones(length, length, dtype=torch.bool).triu(1) if self.causal else None
        keys = torch.tanh(x.flip(1)) if self.keys else x
        out, weights = self.inner(x, keys, keys, key_padding_mask=pads, attn_mask=causal, need_weights=self.weights)
        return out if weights is None else torch.cat([out.flatten(1), weights.flatten(1)], 1)


class Translator(nn.Module):
    """``nn.Transformer``: the reversed example is the source."""

    def __init__(self, batch_first: bool) -> None:
        super().__init__()
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", "enable_nested_tensor is True", UserWarning)
            self.inner = nn.Transformer(4, 2, 1, 1, 6, dropout=0.0, batch_first=batch_first)
        self.batch_first = batch_first

    def forward(self, x: Tensor) -> Tensor:
        mask = nn.Transformer.generate_square_subsequent_mask(x.shape[1], dtype=x.dtype)
        if self.batch_first:
            return self.inner(torch.tanh(x.flip(1)), x, tgt_mask=mask)
        x = x.transpose(0, 1)
        return self.inner(torch.tanh(x.flip(0)), x, tgt_mask=mask).transpose(0, 1)


class Halves(nn.Module):
    """``nn.Bilinear`` of the two halves of an example."""

    def __init__(self, bias: bool = True) -> None:
        super().__init__()
        self.inner = nn.Bilinear(3, 3, 2, bias=bias)

    def forward(self, x: Tensor) -> Tensor:
        return self.inner(x[..., :3], x[..., 3:])


class WeightedBag(nn.Module):
    """A bag of tokens, each with a weight that the example decides."""

    def __init__(self) -> None:
        super().__init__()
        self.inner = nn.EmbeddingBag(11, 4, mode="sum", padding_idx=0)

    def forward(self, ids: Tensor) -> Tensor:
        return self.inner(ids, per_sample_weights=ids.float() / 7)


class Folded(nn.Module):
    """(B, T, ...) as rows of one batch, example by example or, with ``minor``, step by step."""

    def __init__(self, inner: nn.Module, minor: bool = False) -> None:
        super().__init__()
        self.inner, self.minor = inner, minor

    def forward(self, x: Tensor) -> Tensor:
        x = x.transpose(0, 1) if self.minor else x
        out = self.inner(x.flatten(0, 1)).unflatten(0, x.shape[:2])
        return out.transpose(0, 1) if self.minor else out


def first(value: Any) -> Any:
    return value[0] if isinstance(value, tuple) else value


def layers(*modules: nn.Module) -> nn.Module:
    return nn.Sequential(*modules)


def encoder(batch_first: bool, **options: Any) -> nn.Module:
    layer = nn.TransformerEncoderLayer(4, 2, 6, dropout=0.0, batch_first=batch_first, **options)
    # Its shortcuts for inference are not taken in training, and say so in a warning where they cannot be.
    inner = nn.TransformerEncoder(layer, 2, enable_nested_tensor=False)
    return inner if batch_first else SequenceFirst(inner)


def legacy_weight_norm() -> nn.Module:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", FutureWarning)
        return nn.utils.weight_norm(nn.Linear(4, 3))


_RECURRENT = {
    "LSTM": (nn.LSTM, {}),
    "LSTM, two layers, two directions": (nn.LSTM, {"num_layers": 2, "bidirectional": True}),
    "LSTM, no bias": (nn.LSTM, {"bias": False}),
    "GRU": (nn.GRU, {}),
    "GRU, two layers, two directions": (nn.GRU, {"num_layers": 2, "bidirectional": True}),
    "RNN, tanh": (nn.RNN, {"num_layers": 2}),
    "RNN, relu": (nn.RNN, {"nonlinearity": "relu", "bidirectional": True}),
}

_IMAGE = normal(5, 4, 5, 5)
_SEQUENCE = normal(5, 3, 4)

_TABLE: dict[str, tuple[Callable[[], nn.Module], Callable[[], Tensor]]] = {
    **{
        f"transposed convolution, {axes} axes": (
            lambda kind=kind, size=size: kind(
                *(2, 4, size), stride=2, padding=1, output_padding=1, groups=2, dilation=2
            ),
            normal(5, 2, *[3] * axes),
        )
        for axes, kind, size in ((1, nn.ConvTranspose1d, 3), (2, nn.ConvTranspose2d, 2), (3, nn.ConvTranspose3d, 2))
    },
    "transposed convolution, plain": (
        lambda: layers(nn.ConvTranspose2d(4, 3, 3, bias=False), nn.Tanh(), nn.ConvTranspose2d(3, 2, 2)),
        _IMAGE,
    ),
    "convolution, one axis, all options": (
        lambda: nn.Conv1d(4, 6, 3, stride=2, padding=2, dilation=2, groups=2),
        normal(5, 4, 9),
    ),
    "convolution, three axes, all options": (
        lambda: nn.Conv3d(2, 4, (1, 2, 3), stride=(1, 2, 1), padding=(0, 1, 1), dilation=(1, 1, 2), groups=2),
        normal(5, 2, 2, 4, 5),
    ),
    **{
        f"convolution, padded by {mode}": (
            lambda mode=mode: nn.Conv2d(4, 3, 3, padding=(1, 2), padding_mode=mode),
            _IMAGE,
        )
        for mode in ("circular", "reflect", "replicate")
    },
    "convolution, stride 1 x 1": (lambda: nn.Conv2d(4, 3, 1), _IMAGE),
    "instance norm, one axis": (lambda: nn.InstanceNorm1d(4, affine=True), normal(5, 4, 6)),
    "instance norm, two axes": (lambda: layers(nn.InstanceNorm2d(4, affine=True), nn.Conv2d(4, 2, 2)), _IMAGE),
    "rms norm": (lambda: layers(nn.RMSNorm(4), nn.Linear(4, 3)), _SEQUENCE),
    "rms norm over two axes": (lambda: nn.RMSNorm((3, 4), eps=1e-3), _SEQUENCE),
    "layer norm without bias": (lambda: layers(nn.LayerNorm(4, bias=False), nn.Linear(4, 3)), _SEQUENCE),
    "one slope for negative values": (lambda: layers(nn.Linear(4, 3), nn.PReLU()), _SEQUENCE),
    "a slope for each channel": (lambda: layers(nn.Conv2d(4, 3, 2), nn.PReLU(3)), _IMAGE),
    "bilinear": (Halves, normal(5, 6)),
    "bilinear on tokens": (lambda: Halves(bias=False), normal(5, 3, 6)),
    "relu in place": (
        lambda: layers(nn.Linear(4, 6), nn.ReLU(inplace=True), nn.Linear(6, 6), nn.ELU(inplace=True), nn.Linear(6, 3)),
        _SEQUENCE,
    ),
    "weight norm": (
        lambda: layers(
            parametrizations.weight_norm(nn.Linear(4, 6)),
            nn.Tanh(),
            parametrizations.weight_norm(nn.Conv1d(3, 2, 2), dim=2),
        ),
        _SEQUENCE,
    ),
    "weight norm by hooks": (legacy_weight_norm, _SEQUENCE),
    "spectral norm": (lambda: parametrizations.spectral_norm(nn.Linear(4, 6)).eval(), _SEQUENCE),
    "an orthogonal weight": (lambda: parametrizations.orthogonal(nn.Linear(4, 4)), _SEQUENCE),
    **{
        name: (lambda kind=kind, options=options: Recurrent(kind(4, 3, batch_first=True, **options)), _SEQUENCE)
        for name, (kind, options) in _RECURRENT.items()
    },
    "LSTM, learnt first states": (LearntState, _SEQUENCE),
    "LSTM cell": (lambda: Cells(nn.LSTMCell(4, 3)), _SEQUENCE),
    "GRU cell": (lambda: Cells(nn.GRUCell(4, 3)), _SEQUENCE),
    "RNN cell, tanh": (lambda: Cells(nn.RNNCell(4, 3)), _SEQUENCE),
    "RNN cell, relu": (lambda: Cells(nn.RNNCell(4, 3, bias=False, nonlinearity="relu")), _SEQUENCE),
    "attention": (Attention, _SEQUENCE),
    "attention, padding": (lambda: Attention(pads=True), _SEQUENCE),
    "attention, causal, its weights": (lambda: Attention(causal=True, weights=True), _SEQUENCE),
    "attention, padding and causal, no bias": (lambda: Attention(pads=True, causal=True, bias=False), _SEQUENCE),
    "attention, learnt key and value": (lambda: Attention(add_bias_kv=True, add_zero_attn=True, pads=True), _SEQUENCE),
    "attention to something else": (lambda: Attention(keys=True), _SEQUENCE),
    "attention, separate projections": (lambda: Attention(keys=True, kdim=4, vdim=4, weights=True), _SEQUENCE),
    "transformer encoder": (lambda: encoder(True), _SEQUENCE),
    "transformer encoder, norm first": (lambda: encoder(True, norm_first=True, activation="gelu"), _SEQUENCE),
    "transformer": (lambda: Translator(True), _SEQUENCE),
}

# torch.func.vmap has no rule for these functions.
_NOT_MAPPED = {name for name in _TABLE if name.startswith(("GRU", "RNN, ")) or " cell" in name}

_OBSERVED: dict[str, tuple[Callable[[], nn.Module], Callable[[], Tensor]]] = {
    "sequence first, LSTM": (lambda: SequenceFirst(nn.LSTM(4, 3, 2, bidirectional=True)), _SEQUENCE),
    "sequence first, GRU, as long as the batch": (lambda: SequenceFirst(nn.GRU(4, 3)), normal(5, 5, 4)),
    "sequence first, encoder": (lambda: encoder(False), _SEQUENCE),
    "sequence first, encoder, as long as the batch": (lambda: encoder(False), normal(5, 5, 4)),
    "sequence first, encoder, as long as the probe": (lambda: encoder(False), normal(5, 4, 4)),
    "sequence first, transformer": (lambda: Translator(False), _SEQUENCE),
    "folded by example": (lambda: Folded(layers(nn.Linear(4, 5), nn.LayerNorm(5), nn.Linear(5, 3))), _SEQUENCE),
    "folded by step": (lambda: Folded(layers(nn.Linear(4, 5), nn.RMSNorm(5)), minor=True), normal(5, 5, 4)),
    "folded images": (
        lambda: Folded(layers(nn.Conv2d(2, 3, 2), nn.GroupNorm(1, 3), nn.PReLU(3))),
        normal(5, 3, 2, 4, 4),
    ),
}

LAYERS = [
    *(Setting(name, model, inputs, tilted, mapped=name not in _NOT_MAPPED) for name, (model, inputs) in _TABLE.items()),
    *(
        Setting(name, model, inputs, tilted, observed=True, mapped="GRU" not in name)
        for name, (model, inputs) in _OBSERVED.items()
    ),
    *(
        Setting(f"bag of tokens, {mode}", lambda mode=mode: nn.EmbeddingBag(11, 4, mode=mode), tokens(6, 7), tilted)
        for mode in ("sum", "mean", "max")
    ),
    Setting("bag of tokens, weighted and padded", WeightedBag, tokens(6, 7), tilted),
    Setting(
        "sequence first, tokens",
        lambda: SequenceFirst(layers(nn.Embedding(11, 4, padding_idx=0), nn.LayerNorm(4), nn.Linear(4, 11))),
        tokens(6, 6),
        next_token,
        observed=True,
    ),
]
