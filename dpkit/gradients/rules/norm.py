"""Layer, root-mean-square, group and instance normalization: y = z * scale + shift, z normalized within one example.

With the output's gradient q, the per-sample gradients of scale and shift are the sums of q z and q over all positions
that share an entry of them.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from torch.nn import functional as F

from dpkit.gradients.arithmetic import accumulation_dtype
from dpkit.gradients.factors import Dense, Factor

if TYPE_CHECKING:
    from dpkit.gradients.capture import Call
    from dpkit.gradients.layout import Layout


# --------------------------------------------------------------------------------------------------------------- rules


def layer_norm(
    call: Call,
    /,
    input: Tensor,
    normalized_shape: Sequence[int],
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    eps: float = 1e-5,
    **unused: Any,
) -> Tensor:
    """``F.layer_norm``: input (B, ..., *normalized_shape)."""
    shape = tuple(normalized_shape)
    x = call.batched(input, len(shape) + 1)
    names = tuple(None if p is None else call.name(p) for p in (weight, bias))
    operation = _LayerNorm(names, _outside(call, x, shape), shape, eps)
    return call.record(operation, x, call.detached(weight), call.detached(bias))


def rms_norm(
    call: Call,
    /,
    input: Tensor,
    normalized_shape: Sequence[int],
    weight: Tensor | None = None,
    eps: float | None = None,
) -> Tensor:
    """``F.rms_norm``: input (B, ..., *normalized_shape)."""
    shape = tuple(normalized_shape)
    x = call.batched(input, len(shape) + 1)
    name = None if weight is None else call.name(weight)
    return call.record(_RMSNorm((name,), _outside(call, x, shape), shape, eps), x, call.detached(weight))


def group_norm(
    call: Call,
    /,
    input: Tensor,
    num_groups: int,
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    eps: float = 1e-5,
    **unused: Any,
) -> Tensor:
    """``F.group_norm``: input (B, C, ...), weight and bias (C,)."""
    x = call.batched(input, 2)
    layout = call.layout(x)
    if layout.axis != 0:
        raise call.unsupported("it normalizes over the axis of the examples", "keep the examples along the first axis")
    names = tuple(None if p is None else call.name(p) for p in (weight, bias))
    return call.record(_GroupNorm(names, layout, num_groups, eps), x, call.detached(weight), call.detached(bias))


def instance_norm(
    call: Call,
    /,
    input: Tensor,
    running_mean: Tensor | None = None,
    running_var: Tensor | None = None,
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    use_input_stats: bool = True,
    momentum: float = 0.1,
    eps: float = 1e-5,
) -> Tensor:
    """``F.instance_norm``: group normalization with a group for each channel."""
    if running_mean is not None or running_var is not None or not use_input_stats:
        raise call.unsupported(
            "its running statistics move with the batch, past the noise", "use track_running_stats=False"
        )
    return group_norm(call, input, input.shape[1], weight, bias, eps)


def _outside(call: Call, x: Tensor, shape: tuple[int, ...]) -> Layout:
    """Where the examples are; refused if the normalization runs over them."""
    layout = call.layout(x)
    if layout.axis >= x.dim() - len(shape):
        raise call.unsupported("it normalizes over the axis of the examples", "keep the examples along the first axis")
    return layout


# ---------------------------------------------------------------------------------------------------------- operations


@dataclass(frozen=True, slots=True)
class _LayerNorm:
    names: tuple[Any, ...]
    layout: Layout
    shape: tuple[int, ...]
    eps: float

    def forward(
        self, x: Tensor, weight: Tensor | None, bias: Tensor | None
    ) -> tuple[Tensor, tuple[Tensor | None, ...]]:
        y, mean, deviation = torch.native_layer_norm(x, self.shape, weight, bias, self.eps)
        return y, (x, mean, deviation, weight)

    def backward(
        self, grad: Tensor, saved: tuple[Tensor, Tensor, Tensor, Tensor | None], *, need_input: bool
    ) -> tuple[Tensor | None, list[tuple[Any, Factor]]]:
        x, mean, deviation, weight = saved
        grad_input = None
        if need_input:
            grad_input, *_ = torch.ops.aten.native_layer_norm_backward(
                grad, x, self.shape, mean, deviation, weight, None, [True, False, False]
            )
        dtype = accumulation_dtype(grad.dtype)
        q = _positions(self.layout, grad, len(self.shape))
        found: list[tuple[Any, Factor]] = []
        scale, shift = self.names
        if scale is not None:
            x, mean, deviation = (
                _positions(self.layout, each.detach(), len(self.shape)) for each in (x, mean, deviation)
            )
            found.append((scale, Dense(_scale_gradients(q, x, mean, deviation))))
        if shift is not None:
            found.append((shift, Dense(q.sum(1, dtype=dtype))))
        return grad_input, found


@dataclass(frozen=True, slots=True)
class _RMSNorm:
    names: tuple[Any]
    layout: Layout
    shape: tuple[int, ...]
    eps: float | None

    def forward(self, x: Tensor, weight: Tensor | None) -> tuple[Tensor, tuple[Tensor | None, ...]]:
        return F.rms_norm(x, self.shape, weight, self.eps), (x, weight)

    def backward(
        self, grad: Tensor, saved: tuple[Tensor, Tensor | None], *, need_input: bool
    ) -> tuple[Tensor | None, list[tuple[Any, Factor]]]:
        x, weight = saved
        dtype, axes = accumulation_dtype(grad.dtype), tuple(range(-len(self.shape), 0))
        eps = torch.finfo(dtype).eps if self.eps is None else self.eps
        wide = x.detach().to(dtype)
        deviation = (wide.square().mean(axes, keepdim=True) + eps).rsqrt()
        z, q = wide * deviation, grad.to(dtype)
        found: list[tuple[Any, Factor]] = []
        if self.names[0] is not None:
            products = _positions(self.layout, q * z, len(self.shape))
            found.append((self.names[0], Dense(products.sum(1))))
        grad_input = None
        if need_input:
            g = q if weight is None else q * weight.to(dtype)
            grad_input = ((g - z * (g * z).mean(axes, keepdim=True)) * deviation).to(x.dtype)
        return grad_input, found


@dataclass(frozen=True, slots=True)
class _GroupNorm:
    names: tuple[Any, ...]
    layout: Layout
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
    ) -> tuple[Tensor | None, list[tuple[Any, Factor]]]:
        x, mean, deviation, weight = saved
        rows, channels, positions = x.shape[0], x.shape[1], math.prod(x.shape[2:])
        dtype = accumulation_dtype(grad.dtype)
        if rows == 0:
            none = grad.new_zeros(0, channels, dtype=dtype)
            return grad, [(name, Dense(none)) for name in self.names if name is not None]
        # One example with B C channels in B times as many groups: its scale and shift gradients are per sample.
        one = (1, rows * channels, positions)
        scales = None if weight is None else weight.to(dtype).repeat(rows)
        grad_input, scale, shift = torch.ops.aten.native_group_norm_backward(
            grad.to(dtype).reshape(one),
            x.detach().to(dtype).reshape(one),
            mean.to(dtype).reshape(1, -1),
            deviation.to(dtype).reshape(1, -1),
            scales,
            *(1, rows * channels, positions, rows * self.groups),
            [need_input, True, True],
        )
        found: list[tuple[Any, Factor]] = []
        for name, gradients in zip(self.names, (scale, shift), strict=True):
            if name is not None:
                split = self.layout.split(gradients.view(rows, channels))
                found.append((name, Dense(split[:, 0] if split.shape[1] == 1 else split.sum(1))))
        return grad_input.to(x.dtype).view(x.shape) if need_input else None, found


def _scale_gradients(q: Tensor, x: Tensor, mean: Tensor, deviation: Tensor) -> Tensor:
    """sum_t q_bt (x_bt - mean_bt) deviation_bt."""
    dtype = accumulation_dtype(q.dtype)
    return ((x.to(dtype) - mean.to(dtype)).mul_(deviation.to(dtype)).mul_(q)).sum(1)


def _positions(layout: Layout, values: Tensor, entries: int) -> Tensor:
    """The examples first, then all positions, then the last ``entries`` axes as one: (B, T, E)."""
    return layout.split(values).flatten(-entries).flatten(1, -2)
