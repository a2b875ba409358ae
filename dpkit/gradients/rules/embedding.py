"""A table of embeddings: y_bt = W[i_bt], so that G_b = sum_t e_(i_bt) q_bt^T with the output's gradient q."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import Tensor
from torch.nn import functional as F

from dpkit.gradients.factors import Factor, OneHot

if TYPE_CHECKING:
    from dpkit.gradients.capture import Call


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
    for option, used, effect in (
        ("max_norm", max_norm is not None, "changes the table while it is read"),
        ("scale_grad_by_freq", scale_grad_by_freq, "divides by counts over all examples"),
        ("sparse", sparse, "asks for gradients that are not of the table's shape"),
    ):
        if used:
            raise call.unsupported(f"{option} {effect}", f"leave {option} at its default")
    ids = call.batched(input, 1)
    if padding_idx is not None and padding_idx < 0:
        padding_idx += weight.shape[0]
    operation = _Embedding((call.name(weight),), weight.shape, padding_idx)
    return call.record(operation, ids, call.detached(weight))


@dataclass(frozen=True, slots=True)
class _Embedding:
    names: tuple[str | None]
    table: torch.Size
    padding_idx: int | None

    def forward(self, x: Tensor, weight: Tensor) -> tuple[Tensor, tuple[Tensor | None, ...]]:
        return F.embedding(x, weight), (x,)

    def backward(
        self, grad: Tensor, saved: tuple[Tensor], *, need_input: bool
    ) -> tuple[None, list[tuple[str, Factor]]]:
        (ids,) = saved
        entries, width = self.table
        steps = math.prod(ids.shape[1:])
        tokens = ids.detach().reshape(ids.shape[0], steps).long()
        q = grad.reshape(ids.shape[0], steps, width)
        if self.padding_idx is not None:
            q = q.masked_fill((tokens == self.padding_idx)[:, :, None], 0)
        return None, [(name, OneHot(tokens, q, entries)) for name in self.names if name is not None]
