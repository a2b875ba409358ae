"""Layer and group normalization: y = z * scale + shift, where z is normalized within one example.

With the output's gradient q, the per-sample gradients of scale and shift are the sums of q z and q over all positions
that share an entry of them.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from dpkit.gradients.factors import Dense, Factor, accumulation_dtype

if TYPE_CHECKING:
    from dpkit.gradients.capture import Call


def layer_norm(
    call: Call,
    /,
    input: Tensor,
    normalized_shape: Sequence[int],
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    eps: float = 1e-5,
) -> Tensor:
    """``F.layer_norm``: input (B, ..., *normalized_shape)."""
    shape = tuple(normalized_shape)
    x = call.batched(input, len(shape) + 1)
    names = tuple(None if p is None else call.name(p) for p in (weight, bias))
    return call.record(_LayerNorm(names, shape, eps), x, call.detached(weight), call.detached(bias))


def group_norm(
    call: Call,
    /,
    input: Tensor,
    num_groups: int,
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    eps: float = 1e-5,
) -> Tensor:
    """``F.group_norm``: input (B, C, ...), weight and bias (C,)."""
    x = call.batched(input, 2)
    names = tuple(None if p is None else call.name(p) for p in (weight, bias))
    return call.record(_GroupNorm(names, num_groups, eps), x, call.detached(weight), call.detached(bias))


@dataclass(frozen=True, slots=True)
class _LayerNorm:
    names: tuple[str | None, ...]
    shape: tuple[int, ...]
    eps: float

    def forward(
        self, x: Tensor, weight: Tensor | None, bias: Tensor | None
    ) -> tuple[Tensor, tuple[Tensor | None, ...]]:
        y, mean, deviation = torch.native_layer_norm(x, self.shape, weight, bias, self.eps)
        return y, (x, mean, deviation, weight)

    def backward(
        self, grad: Tensor, saved: tuple[Tensor, Tensor, Tensor, Tensor | None], *, need_input: bool
    ) -> tuple[Tensor | None, list[tuple[str, Factor]]]:
        x, mean, deviation, weight = saved
        grad_input = None
        if need_input:
            grad_input, *_ = torch.ops.aten.native_layer_norm_backward(
                grad, x, self.shape, mean, deviation, weight, None, [True, False, False]
            )
        dtype = accumulation_dtype(grad.dtype)
        q = _positions(grad, self.shape).to(dtype)
        found: list[tuple[str, Factor]] = []
        scale, shift = self.names
        if scale is not None:
            z = _positions((x.detach().to(dtype) - mean.to(dtype)) * deviation.to(dtype), self.shape)
            found.append((scale, Dense(torch.einsum("btd,btd->bd", q, z))))
        if shift is not None:
            found.append((shift, Dense(q.sum(1))))
        return grad_input, found


@dataclass(frozen=True, slots=True)
class _GroupNorm:
    names: tuple[str | None, ...]
    groups: int
    eps: float

    def forward(
        self, x: Tensor, weight: Tensor | None, bias: Tensor | None
    ) -> tuple[Tensor, tuple[Tensor | None, ...]]:
        x = x.contiguous()
        size, channels, positions = x.shape[0], x.shape[1], math.prod(x.shape[2:])
        y, mean, deviation = torch.native_group_norm(x, weight, bias, size, channels, positions, self.groups, self.eps)
        return y, (x, mean, deviation, weight)

    def backward(
        self, grad: Tensor, saved: tuple[Tensor, Tensor, Tensor, Tensor | None], *, need_input: bool
    ) -> tuple[Tensor | None, list[tuple[str, Factor]]]:
        x, mean, deviation, weight = saved
        size, channels, positions = x.shape[0], x.shape[1], math.prod(x.shape[2:])
        dtype = accumulation_dtype(grad.dtype)
        if size == 0:
            none = grad.new_zeros(0, channels, dtype=dtype)
            return grad, [(name, Dense(none)) for name in self.names if name is not None]
        # One example with B C channels in B times as many groups: its scale and shift gradients are per sample.
        one = (1, size * channels, positions)
        scales = None if weight is None else weight.to(dtype).repeat(size)
        grad_input, scale, shift = torch.ops.aten.native_group_norm_backward(
            grad.to(dtype).reshape(one),
            x.detach().to(dtype).reshape(one),
            mean.to(dtype).reshape(1, -1),
            deviation.to(dtype).reshape(1, -1),
            scales,
            *(1, size * channels, positions, size * self.groups),
            [need_input, True, True],
        )
        found: list[tuple[str, Factor]] = [
            (name, Dense(gradients.view(size, channels)))
            for name, gradients in zip(self.names, (scale, shift), strict=True)
            if name is not None
        ]
        return grad_input.to(x.dtype).view(x.shape) if need_input else None, found


def _positions(values: Tensor, shape: tuple[int, ...]) -> Tensor:
    """(B, ..., *shape) -> (B, T, entries)."""
    between = values.shape[1 : values.dim() - len(shape)]
    return values.reshape(values.shape[0], math.prod(between), math.prod(shape))
