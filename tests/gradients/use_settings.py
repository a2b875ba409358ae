"""Ways in which models use a parameter by hand: derived from it, joined with the batch, or in an odd function."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from gradients.settings import Setting, normal, tilted
from torch import Tensor, nn
from torch.nn import functional as F


class Uses(nn.Module):
    """Parameters of several shapes, and a forward pass from the tables below."""

    def __init__(self, use: Callable[[Any, Tensor], Tensor]) -> None:
        super().__init__()
        self.w = nn.Parameter(torch.randn(4, 4))
        self.v = nn.Parameter(torch.randn(4))
        self.gain = nn.Parameter(torch.tensor(0.7))
        self.token = nn.Parameter(torch.randn(1, 1, 4))
        self.pairs = nn.Parameter(torch.randn(4, 3, 2))
        self.heads = nn.Parameter(torch.randn(2, 2, 3))
        self.position = nn.Embedding(9, 4)
        self.relative = nn.Embedding(5, 2)
        self.register_buffer("buffer", torch.randn(4))
        self.register_buffer("places", torch.arange(3)[None])
        self.use = use

    def forward(self, x: Tensor) -> Tensor:
        return self.use(self, x)


def row_by_row(m: Any, x: Tensor) -> Tensor:
    return sum((x * row for row in m.w), x)


def split_product(m: Any, x: Tensor) -> Tensor:
    first, second = m.w.chunk(2)
    return torch.cat([torch.tanh(F.linear(x, first, m.v[:2])), F.linear(x, second, m.v.chunk(2)[1])], -1)


def class_token(m: Any, x: Tensor) -> Tensor:
    return torch.tanh(torch.cat([m.token.expand(len(x), -1, -1), x], 1) + m.position(torch.arange(4)))


def repeated_token(m: Any, x: Tensor) -> Tensor:
    return torch.tanh(torch.cat([m.token.repeat(len(x), 1, 1), x], 1) @ m.w)


def queries(m: Any, x: Tensor) -> Tensor:
    """Learnt queries that attend to the example, as in a perceiver or a detection transformer."""
    asked = m.w[None, :2].expand(len(x), -1, -1)
    return F.scaled_dot_product_attention(asked, x, x)


def relative_bias(m: Any, x: Tensor) -> Tensor:
    """A bias of each head for each distance, added to the scores of attention."""
    places = torch.arange(3)
    bias = m.relative(places[:, None] - places[None, :] + 2).permute(2, 0, 1)[None]
    x = x.unflatten(2, (2, 2)).transpose(1, 2)
    return F.scaled_dot_product_attention(x, x, x, attn_mask=bias)


def low_rank(m: Any, x: Tensor) -> Tensor:
    """A frozen product and a trained one of low rank beside it."""
    return x * m.buffer + 2.0 * ((x @ m.w[:, :2]) @ m.w[:2])


def masked_tokens(m: Any, x: Tensor) -> Tensor:
    return torch.where(x[..., :1] > 0, m.v, x) @ m.w


def two_forwards(m: Any, x: Tensor) -> Tensor:
    return torch.tanh(x @ m.w) * torch.tanh(x.flip(-1) @ m.w)


def merged(m: Any, x: Tensor) -> Tensor:
    """Weights merged from two parameters, as in adapters that are folded in."""
    return F.linear(x, m.w + 0.5 * torch.outer(m.v, m.v), m.v * m.gain)


def under_a_mask(m: Any, x: Tensor) -> Tensor:
    return F.linear(x, m.w.masked_fill(torch.eye(4, dtype=torch.bool), 0.0))


def in_a_buffer(m: Any, x: Tensor) -> Tensor:
    return torch.zeros(4, dtype=x.dtype).copy_(m.v) * x


def filled_in(m: Any, x: Tensor) -> Tensor:
    table = torch.zeros(6, 4, dtype=x.dtype)
    table[1:5] = m.w
    return torch.tanh(x) @ table[:4]


def normalized(m: Any, x: Tensor) -> Tensor:
    """Cosines with the rows of a matrix, scaled by a learnt temperature."""
    return F.normalize(x, dim=-1) @ F.normalize(m.w, dim=-1).T * m.gain.exp()


def scaled_in_place(m: Any, x: Tensor) -> Tensor:
    x = x.clone()
    x *= m.v
    x += m.gain
    return x.div_(m.v.square() + 1)


def spectral(m: Any, x: Tensor) -> Tensor:
    """Complex weights, which are stored as pairs of real numbers, of the frequencies of a sequence."""
    weights = torch.view_as_complex(m.pairs)
    return torch.fft.irfft(torch.fft.rfft(x, dim=1) @ weights, n=x.shape[1], dim=1)


def rotated(m: Any, x: Tensor) -> Tensor:
    """Pairs of entries, each turned by a learnt angle."""
    turns = torch.polar(torch.ones_like(m.w[:2, :3]), m.w[:2, :3]).T
    return torch.view_as_real(torch.view_as_complex(x.unflatten(-1, (2, 2)).contiguous()) * turns)


def generated(m: Any, x: Tensor) -> Tensor:
    """Weights that a network makes of the example."""
    weights = F.linear(x.mean(1), torch.outer(m.v, m.v).flatten()[:, None].expand(-1, 4)).unflatten(1, (4, 4))
    return torch.bmm(x, weights @ m.w)


def prefixed(m: Any, x: Tensor) -> Tensor:
    """Learnt keys and values before those of the example."""
    first, second = (w.expand(len(x), -1, -1) for w in (m.w[None, :2], m.w[None, 2:]))
    return F.scaled_dot_product_attention(x, torch.cat([first, x], 1), torch.cat([second, x], 1))


def rounded(m: Any, x: Tensor) -> Tensor:
    """A weight that is rounded in the forward pass and not in the backward pass."""
    return x @ (m.w + (m.w.round() - m.w).detach())


def overlapping(m: Any, x: Tensor) -> Tensor:
    """A band matrix out of one vector, whose entries appear several times."""
    return torch.cat([x @ torch.as_strided(m.position.weight, (4, 3), (1, 1)), x[..., :3] @ m.v.unfold(0, 3, 1).T], -1)


def recurrent(m: Any, x: Tensor) -> Tensor:
    """A state that starts as a parameter."""
    state = m.v.expand(len(x), -1)
    for step in x.unbind(1):
        state = torch.tanh(step + state @ m.w)
    return state


MATRIX = (5, 4)
SEQUENCE = (5, 3, 4)

_TABLE: dict[str, tuple[Callable[[Any, Tensor], Tensor], tuple[int, ...]]] = {
    "transposed by a method": (lambda m, x: x @ m.w.t(), MATRIX),
    "transposed by a property": (lambda m, x: torch.tanh(x @ m.w.T) @ m.w.mT, SEQUENCE),
    "one row": (lambda m, x: x * m.w[0], MATRIX),
    "some columns": (lambda m, x: x @ m.w[:, 1:3], SEQUENCE),
    "chunks of a weight": (split_product, SEQUENCE),
    "rows of a weight in turn": (row_by_row, MATRIX),
    "a function of a parameter": (lambda m, x: x * torch.exp(m.v) + F.softplus(m.v), SEQUENCE),
    "a parameter with a number": (lambda m, x: x * (1 + m.v), SEQUENCE),
    "a parameter with a buffer": (lambda m, x: x * (m.buffer * m.v), SEQUENCE),
    "a parameter in a buffer": (in_a_buffer, SEQUENCE),
    "a parameter in a table of constants": (filled_in, SEQUENCE),
    "joined parameters": (lambda m, x: x * torch.cat([m.v, m.w[0]])[2:6], SEQUENCE),
    "stacked parameters": (lambda m, x: x @ torch.stack([m.v, m.v * m.gain], 1), SEQUENCE),
    "two parameters": (lambda m, x: x @ (m.w * m.v), SEQUENCE),
    "merged weights": (merged, SEQUENCE),
    "a masked weight": (under_a_mask, SEQUENCE),
    "a parameter as the input": (lambda m, x: F.linear(m.w, m.w)[0] + x, MATRIX),
    "a softmax of a parameter": (lambda m, x: x * torch.softmax(m.v, 0)[2] * m.v.mean(), SEQUENCE),
    "a weight beside batched weights": (lambda m, x: torch.matmul(x, x.mT @ x + m.w), SEQUENCE),
    "a weight on the left": (lambda m, x: m.w @ x.mT, SEQUENCE),
    "a weight on the left of a matrix": (lambda m, x: (m.w @ x.mT).mT, MATRIX),
    "a vector as the weight": (lambda m, x: torch.tanh(x @ m.v)[:, :, None] * x, SEQUENCE),
    "a matrix for each head": (lambda m, x: x.unflatten(2, (2, 2)).transpose(1, 2) @ m.heads, SEQUENCE),
    "einsum": (lambda m, x: torch.einsum("bti,ij->btj", x, m.w), SEQUENCE),
    "einsum over heads": (lambda m, x: torch.einsum("btj,hjk->bthk", x[..., :2], m.heads), SEQUENCE),
    "baddbmm": (lambda m, x: torch.baddbmm(m.token, x, x.mT @ x), SEQUENCE),
    "an addition of a scaled product": (lambda m, x: torch.addmm(m.v, x, m.w, beta=0.5, alpha=2), MATRIX),
    "a power": (lambda m, x: x.square().pow(m.gain) + m.gain**x, MATRIX),
    "scaled in place": (scaled_in_place, SEQUENCE),
    "a class token, expanded": (class_token, SEQUENCE),
    "a class token, repeated": (repeated_token, SEQUENCE),
    "a mask token": (masked_tokens, SEQUENCE),
    "learnt queries": (queries, SEQUENCE),
    "positions counted": (lambda m, x: x * m.position(torch.arange(3)), SEQUENCE),
    "positions counted for a batch of one": (lambda m, x: x * m.position(m.places[:, :3]), SEQUENCE),
    "positions for each example": (lambda m, x: x * m.position(m.places.expand(len(x), -1)), SEQUENCE),
    "positions sliced": (lambda m, x: x * torch.tanh(m.position.weight[:3]), SEQUENCE),
    "positions that the data decides": (lambda m, x: x + m.position((x[..., 0] > 0).cumsum(1)), SEQUENCE),
    "a relative bias in attention": (relative_bias, SEQUENCE),
    "an adapter of low rank": (low_rank, SEQUENCE),
    "two forwards of one weight": (two_forwards, SEQUENCE),
    "cosines and a temperature": (normalized, SEQUENCE),
    "a first state": (recurrent, SEQUENCE),
    "clamped by a parameter": (lambda m, x: torch.maximum(x, m.v).clamp(max=m.gain.square() + 1), SEQUENCE),
    "an interpolation": (lambda m, x: torch.lerp(x, m.v, torch.sigmoid(m.gain)), SEQUENCE),
    "in another type": (lambda m, x: F.linear(x.double(), m.w.double()).to(x.dtype), SEQUENCE),
    "in one of two types": (lambda m, x: F.linear(x.double(), m.w.double()).to(x.dtype) @ m.w, SEQUENCE),
    "complex weights": (spectral, SEQUENCE),
    "learnt rotations": (rotated, SEQUENCE),
    "weights made of the example": (generated, SEQUENCE),
    "learnt keys and values": (prefixed, SEQUENCE),
    "a rounded weight": (rounded, SEQUENCE),
    "overlapping views": (overlapping, SEQUENCE),
    "a value to fill with": (lambda m, x: x.masked_fill(x > 0, m.gain) @ m.w, SEQUENCE),
    "two weights in one einsum": (lambda m, x: torch.einsum("bti,ij,jk->btk", x, m.w, m.w[:, :2]), SEQUENCE),
    "cosines with several vectors": (lambda m, x: F.cosine_similarity(x[:, :, None], m.w, dim=-1), SEQUENCE),
    "distances from several points": (lambda m, x: torch.cdist(x, m.w), SEQUENCE),
    "an addition of products": (lambda m, x: torch.addcmul(m.v, x, x, value=0.5), SEQUENCE),
    "batch normalization with fixed statistics": (
        lambda m, x: F.batch_norm(x.mT, torch.zeros(4), torch.ones(4), m.v, m.w[0]),
        SEQUENCE,
    ),
    "a mean over the sequence first": (lambda m, x: F.linear(x.mean(1), m.w), SEQUENCE),
}

# Under functorch, the values of a batch may not be written into a tensor outside of it.
_NOT_MAPPED = {"a parameter in a buffer", "a parameter in a table of constants"}

USES = [
    Setting(name, lambda use=use: Uses(use), normal(*shape), tilted, mapped=name not in _NOT_MAPPED)
    for name, (use, shape) in _TABLE.items()
]
