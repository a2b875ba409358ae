"""Attention taken apart gives the library's output, and the per-sample gradients of one backward pass an example."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from gradients.one_by_one import check_each, check_seeded, energy, observe
from torch import Tensor, nn
from torch.nn import functional as F

from dpkit import errors
from dpkit.gradients import Capture, ghost, trainable

HEADS, WIDTH, QUERIES, KEYS, SIZE = 2, 6, 4, 5, 3
over_dtypes = pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
over_weights = pytest.mark.parametrize("need_weights", [True, False])


class Attention(nn.Module):
    """A linear layer, and nn.MultiheadAttention on what comes out of it; ``inputs`` says what is query, key, value."""

    def __init__(self, inputs: str = "self", mask: str | None = None, **options: Any) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.call = {key: options.pop(key) for key in ("need_weights", "average_attn_weights") if key in options}
        self.causal, self.padding = options.pop("causal", False), options.pop("padding", None)
        self.inputs, self.mask = inputs, mask
        self.first = nn.Linear(3, WIDTH)
        self.attention = nn.MultiheadAttention(WIDTH, HEADS, **options)
        for parameter in self.attention.parameters():  # biases begin as zeros
            nn.init.normal_(parameter, std=0.4)
        if mask == "learnt":
            self.table = nn.Parameter(torch.randn(QUERIES, QUERIES))
        if mask == "learnt heads":
            self.table = nn.Parameter(torch.randn(HEADS, QUERIES, QUERIES))
        if inputs == "learnt query":
            self.query = nn.Parameter(torch.randn(QUERIES, WIDTH))

    def forward(self, x: Tensor, memory: Tensor | None = None, other: Tensor | None = None) -> Any:
        size = len(x)
        query = self.first(x)
        key: Any = query
        value: Any = query
        if self.inputs == "pair":
            key = value = memory
        elif self.inputs == "three":
            key, value = memory, other
        elif self.inputs == "learnt query":
            key = value = query
            query = self.query.expand(size, -1, -1)
        padding = None
        if self.padding is not None:
            # Another length for each example, read off its numbers.
            lengths = 2 + (x[:, 0, 0] > 0).long() + (x[:, 1, 1] > 0).long()
            padding = torch.arange(KEYS if memory is not None else QUERIES) >= lengths[:, None]
            if self.padding == "float":
                padding = padding.to(x.dtype) * -1.5
        if not self.attention.batch_first:
            same = (key is query, value is key)
            query, key = query.transpose(0, 1), key.transpose(0, 1)
            key = query if same[0] else key
            value = key if same[1] else value.transpose(0, 1)
        output, weights = self.attention(
            query,
            key,
            value,
            key_padding_mask=padding,
            attn_mask=self._mask(x, KEYS if memory is not None else QUERIES),
            is_causal=self.causal,
            **self.call,
        )
        output = output if self.attention.batch_first else output.transpose(0, 1)
        return output if weights is None else (output, weights)

    def _mask(self, x: Tensor, keys: int) -> Tensor | None:
        if self.mask is None:
            return None
        causal = torch.ones(QUERIES, keys, dtype=torch.bool).triu(1)
        if self.mask == "bool":
            return causal
        if self.mask == "float":
            return torch.linspace(-1, 1, QUERIES * keys, dtype=x.dtype).view(QUERIES, keys)
        if self.mask == "causal":
            return nn.Transformer.generate_square_subsequent_mask(QUERIES, dtype=x.dtype)
        if self.mask == "bool, each":
            return (causal[None] & (x[:, 0, 0] > 0)[:, None, None]).repeat_interleave(HEADS, 0)
        if self.mask == "float, each":
            ramp = torch.linspace(-1, 1, HEADS * QUERIES * keys, dtype=x.dtype).view(HEADS, QUERIES, keys)
            return (x[:, :1, 0, None, None] * ramp).reshape(len(x) * HEADS, QUERIES, keys)
        if self.mask == "learnt":
            return torch.sin(self.table)
        assert self.mask == "learnt heads"
        return self.table.repeat(len(x), 1, 1)


def batch(inputs: str = "self") -> tuple[Tensor, ...]:
    torch.manual_seed(1)
    x = torch.randn(SIZE, QUERIES, 3)
    if inputs == "pair":
        return x, torch.randn(SIZE, KEYS, WIDTH)
    if inputs == "three":
        return x, torch.randn(SIZE, KEYS, WIDTH), torch.randn(SIZE, KEYS, WIDTH)
    return (x,)


@over_dtypes
@over_weights
@pytest.mark.parametrize("batch_first", [True, False])
@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("inputs", ["self", "pair", "three", "learnt query"])
def test_projections(dtype: torch.dtype, need_weights: bool, batch_first: bool, bias: bool, inputs: str) -> None:
    model = Attention(inputs, batch_first=batch_first, bias=bias, need_weights=need_weights)
    check_each(model, batch(inputs), dtype)


@over_weights
@pytest.mark.parametrize("bias", [True, False])
def test_keys_and_values_of_other_widths(need_weights: bool, bias: bool) -> None:
    model = Attention("three", batch_first=True, bias=bias, kdim=7, vdim=5, need_weights=need_weights)
    torch.manual_seed(1)
    inputs = torch.randn(SIZE, QUERIES, 3), torch.randn(SIZE, KEYS, 7), torch.randn(SIZE, KEYS, 5)
    check_each(model, inputs, torch.float64)


@over_weights
@pytest.mark.parametrize("inputs", ["self", "three"])
@pytest.mark.parametrize("mask", [None, "bool", "float", "bool, each", "float, each"])
@pytest.mark.parametrize("padding", [None, "bool", "float"])
@pytest.mark.parametrize("extra", [{}, {"add_bias_kv": True}, {"add_bias_kv": True, "add_zero_attn": True}])
@pytest.mark.filterwarnings("ignore:Support for mismatched key_padding_mask and attn_mask:UserWarning")
def test_masks(need_weights: bool, inputs: str, mask: str | None, padding: str | None, extra: dict[str, bool]) -> None:
    model = Attention(inputs, mask, batch_first=True, padding=padding, need_weights=need_weights, **extra)
    check_each(model, batch(inputs), torch.float64)


@over_weights
@pytest.mark.parametrize("padding", [None, "bool"])
@pytest.mark.filterwarnings("ignore:Support for mismatched key_padding_mask and attn_mask:UserWarning")
def test_the_causal_hint(need_weights: bool, padding: str | None) -> None:
    model = Attention(mask="causal", causal=True, padding=padding, batch_first=True, need_weights=need_weights)
    check_each(model, batch(), torch.float64)


@over_weights
@over_dtypes
@pytest.mark.parametrize("padding", [None, "float"])
@pytest.mark.parametrize("mask", ["learnt", "learnt heads"])
def test_a_learnt_mask(need_weights: bool, dtype: torch.dtype, padding: str | None, mask: str) -> None:
    check_each(Attention(mask=mask, padding=padding, batch_first=True, need_weights=need_weights), batch(), dtype)


@pytest.mark.parametrize("average", [True, False])
def test_weights_are_returned_for_each_head_or_averaged(average: bool) -> None:
    model = Attention(batch_first=True, need_weights=True, average_attn_weights=average)
    check_each(model, batch(), torch.float64)
    model, shapes = model.float(), []
    with Capture(trainable(model)) as capture:
        shapes.append(model(*capture.batch(batch()))[1].shape)
    shapes.append(model(*batch())[1].shape)
    assert shapes[0] == shapes[1]


@over_weights
def test_dropout_draws_the_same_mask(need_weights: bool) -> None:
    for batch_first in (True, False):
        check_seeded(Attention(batch_first=batch_first, dropout=0.4, need_weights=need_weights), batch())


@pytest.mark.parametrize("norm_first", [True, False])
def test_transformer_layers(norm_first: bool) -> None:
    torch.manual_seed(0)
    encoder = nn.TransformerEncoderLayer(WIDTH, HEADS, 8, 0.0, norm_first=norm_first, batch_first=True)
    check_each(encoder, (torch.randn(SIZE, QUERIES, WIDTH),), torch.float64)
    check_each(encoder.train(), (torch.randn(SIZE, QUERIES, WIDTH),), torch.float32)
    decoder = nn.TransformerDecoderLayer(WIDTH, HEADS, 8, 0.0, norm_first=norm_first, batch_first=True)
    check_each(decoder, (torch.randn(SIZE, QUERIES, WIDTH), torch.randn(SIZE, KEYS, WIDTH)), torch.float64)


def test_frozen_projections() -> None:
    for frozen in ("in_proj", "out_proj", "weight", "bias"):
        model = Attention(batch_first=True)
        for name, parameter in model.attention.named_parameters():
            parameter.requires_grad_(frozen not in name)
        check_each(model, batch(), torch.float64)


def test_what_is_refused_says_what_to_do() -> None:
    model = Attention(batch_first=True)

    def unbatched(_: Any, x: tuple[Tensor]) -> Tensor:
        return torch.stack([model.attention(y, y, y)[0].sum() for y in model.first(x[0]).unbind(0)])

    with pytest.raises(errors.UnsupportedOperation, match="no batch axis"):
        ghost.per_sample(model, unbatched, batch(), SIZE)


class Biased(nn.Module):
    """scaled_dot_product_attention with a learnt bias, as relative positions have it."""

    def __init__(self, kind: str) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.kind = kind
        self.projection = nn.Linear(3, 3 * WIDTH)
        self.bias = nn.Parameter(torch.randn(HEADS, QUERIES, QUERIES) if kind != "table" else torch.randn(4, HEADS))

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = self.projection(x).view(len(x), QUERIES, 3, HEADS, -1).permute(2, 0, 3, 1, 4)
        if self.kind == "table":
            distances = (torch.arange(QUERIES)[:, None] - torch.arange(QUERIES)).abs()
            bias = F.embedding(distances, self.bias).permute(2, 0, 1).unsqueeze(0)
        else:
            bias = {"heads": self.bias, "one": self.bias[:1], "two axes": self.bias[0]}[self.kind]
        return F.scaled_dot_product_attention(q, k, v, attn_mask=bias, scale=0.3)


@over_dtypes
@pytest.mark.parametrize("kind", ["heads", "one", "two axes", "table"])
def test_a_learnt_bias_of_the_scores(dtype: torch.dtype, kind: str) -> None:
    check_each(Biased(kind), batch(), dtype)


class Slots(nn.Module):
    """Learnt queries without a batch axis of their own, and a table of keys and values."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.queries = nn.Parameter(torch.randn(1, HEADS, QUERIES, 3))
        self.keys = nn.Parameter(torch.randn(HEADS, KEYS, 3))

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        heads = torch.stack((x, 2 * x), 1)
        return (
            F.scaled_dot_product_attention(self.queries, heads, heads),
            F.scaled_dot_product_attention(heads, self.keys, self.keys.sin()),
        )


@over_dtypes
def test_learnt_queries_keys_and_values(dtype: torch.dtype) -> None:
    check_each(Slots(), batch(), dtype)


def test_examples_that_would_attend_to_one_another_are_refused() -> None:
    class Transposed(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.inner = Attention(batch_first=True)

        def forward(self, x: Tensor) -> Tensor:
            y = self.inner.first(x).transpose(0, 1)
            return self.inner.attention(y, y, y)[0].transpose(0, 1)

    model = Transposed()
    torch.manual_seed(1)
    x = torch.randn(QUERIES, QUERIES, 3)
    observe(model, (x,))
    with pytest.raises(errors.UnsupportedOperation, match="would attend to one another"):
        ghost.per_sample(model, energy, (x,), QUERIES)


@pytest.mark.parametrize("batch_first", [True, False])
def test_sequences_as_long_as_the_batch(batch_first: bool) -> None:
    torch.manual_seed(1)
    check_each(Attention(batch_first=batch_first), (torch.randn(QUERIES, QUERIES, 3),), torch.float64, observed=True)
