"""Tables of embeddings: y_bt = W[i_bt], so that G_b = sum_t e_(i_bt) q_bt^T with the output's gradient q.

A bag of embeddings is y_b = sum_t s_bt W[i_bt], or the mean, or the maximum of each feature; there
G_b = sum_t e_(i_bt) (s_bt q_b)^T, or with the features of q_b that token t won.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from torch.nn import functional as F

from dpkit.gradients.factors import Factor, OneHot

if TYPE_CHECKING:
    from dpkit.gradients.capture import Call
    from dpkit.gradients.layout import Layout


def embedding(
    call: Call,
    /,
    input: Tensor,
    weight: Tensor,
    padding_idx: int | None = None,
    max_norm: float | None = None,
    norm_type: float = 2.0,
    scale_grad_by_freq: bool = False,
    sparse: bool = False,
) -> Tensor:
    """``F.embedding``: input (B, ...) of token numbers, weight (V, d); no gradient for ``padding_idx``."""
    ids = call.batched(input, 1)
    operation = _Embedding(
        (call.name(weight),), call.layout(ids), weight.shape, _counted_from_zero(padding_idx, weight)
    )
    return call.record(operation, ids, call.detached(weight))


def embedding_bag(
    call: Call,
    /,
    input: Tensor,
    weight: Tensor,
    offsets: Tensor | None = None,
    max_norm: float | None = None,
    norm_type: float = 2,
    scale_grad_by_freq: bool = False,
    mode: str = "mean",
    sparse: bool = False,
    per_sample_weights: Tensor | None = None,
    include_last_offset: bool = False,
    padding_idx: int | None = None,
) -> Tensor:
    """``F.embedding_bag``: input (B, T) of token numbers, weight (V, d); mode "sum", "mean" or "max"."""
    if not call.is_batched(input) or input.dim() != 2 or offsets is not None:
        raise call.unsupported(
            "offsets say where each example begins in one list of tokens",
            "pass one row of ids for each example, padded with padding_idx, and no offsets",
        )
    if per_sample_weights is not None and call.name(per_sample_weights) is not None:
        raise call.unsupported(
            "per_sample_weights is made from parameters alone", "use (embedding(input) * weights).sum(1)"
        )
    layout = call.layout(input)
    if layout.axis != 0:
        raise call.unsupported("the examples are along the axis that a bag sums over", "keep them along the first axis")
    operation = _Bag((call.name(weight),), layout, weight.shape, mode, _counted_from_zero(padding_idx, weight))
    (output,) = call.record_many(operation, (input, per_sample_weights), (call.detached(weight),))
    return output


def refused_embedding(
    input: Tensor,
    weight: Tensor,
    padding_idx: int | None = None,
    max_norm: float | None = None,
    norm_type: float = 2.0,
    scale_grad_by_freq: bool = False,
    sparse: bool = False,
) -> tuple[str, str] | None:
    """Why a call of ``F.embedding`` is refused, and the way out; None if it is not."""
    return _refused(max_norm, scale_grad_by_freq, sparse)


def refused_embedding_bag(
    input: Tensor,
    weight: Tensor,
    offsets: Tensor | None = None,
    max_norm: float | None = None,
    norm_type: float = 2,
    scale_grad_by_freq: bool = False,
    mode: str = "mean",
    sparse: bool = False,
    *_: Any,
    **__: Any,
) -> tuple[str, str] | None:
    """The same of ``F.embedding_bag``."""
    return _refused(max_norm, scale_grad_by_freq, sparse)


def _refused(max_norm: float | None, scale_grad_by_freq: bool, sparse: bool) -> tuple[str, str] | None:
    for option, used, effect in (
        ("max_norm", max_norm is not None, "changes the table while it is read"),
        ("scale_grad_by_freq", scale_grad_by_freq, "divides by counts over all examples"),
        ("sparse", sparse, "asks for gradients that are not of the table's shape"),
    ):
        if used:
            return f"{option} {effect}", f"leave {option} at its default"
    return None


def _counted_from_zero(padding_idx: int | None, weight: Tensor) -> int | None:
    return padding_idx + weight.shape[0] if padding_idx is not None and padding_idx < 0 else padding_idx


@dataclass(frozen=True, slots=True)
class _Embedding:
    names: tuple[Any]
    layout: Layout
    table: torch.Size
    padding_idx: int | None

    def forward(self, x: Tensor, weight: Tensor) -> tuple[Tensor, tuple[Tensor | None, ...]]:
        return F.embedding(x, weight), (x,)

    def backward(
        self, grad: Tensor, saved: tuple[Tensor], *, need_input: bool
    ) -> tuple[None, list[tuple[Any, Factor]]]:
        tokens = self.layout.split(saved[0].detach()).flatten(1).long()
        q = self.layout.split(grad).flatten(1, -2)
        if self.padding_idx is not None:
            q = q.masked_fill((tokens == self.padding_idx)[:, :, None], 0)
        return None, [(self.names[0], OneHot(tokens, q, self.table[0]))]


@dataclass(frozen=True, slots=True)
class _Bag:
    names: tuple[Any]
    layout: Layout
    table: torch.Size
    mode: str
    padding_idx: int | None

    def forward(
        self, inputs: tuple[Tensor, Tensor | None], weights: tuple[Tensor]
    ) -> tuple[tuple[Tensor], tuple[Tensor | None, ...]]:
        ids, scales = inputs
        (weight,) = weights
        if self.mode == "max":
            # The function behind embedding_bag also tells which token won each feature.
            firsts = torch.arange(len(ids), device=ids.device, dtype=ids.dtype) * ids.shape[1]
            y, _, _, winners = torch.embedding_bag(
                weight, ids.flatten(), firsts, False, 2, False, None, False, self.padding_idx
            )
        else:
            y = F.embedding_bag(ids, weight, mode=self.mode, per_sample_weights=scales, padding_idx=self.padding_idx)
            winners = None
        return (y,), (ids, scales, winners, weight if scales is not None and scales.requires_grad else None)

    def backward(
        self, grads: tuple[Tensor], saved: tuple[Tensor | None, ...], *, need_inputs: tuple[bool, ...]
    ) -> tuple[tuple[None, Tensor | None], list[tuple[Any, Factor]]]:
        (grad,) = grads
        ids, scales, winners, weight = saved
        assert ids is not None
        ids = ids.detach().long()
        counts = torch.ones_like(ids, dtype=torch.bool) if self.padding_idx is None else ids != self.padding_idx
        grad_scales = None
        if need_inputs[1] and weight is not None:
            grad_scales = torch.einsum("btd,bd->bt", F.embedding(ids, weight), grad) * counts
        if winners is not None:
            won = (ids[:, :, None] == winners[:, None, :]) & counts[:, :, None]
            first = won & (won.cumsum(1) == 1)  # a token that stands there twice wins once
            q = grad[:, None, :] * first
        else:
            share = counts.to(grad.dtype)
            if self.mode == "mean":
                share = share / share.sum(1, keepdim=True).clamp_min(1)
            if scales is not None:
                share = share * scales.detach()
            q = grad[:, None, :] * share[:, :, None]
        tokens, q = self.layout.split(ids).flatten(1), self.layout.split(q).flatten(1, 2)
        return (None, grad_scales), [(self.names[0], OneHot(tokens, q, self.table[0]))]
