"""Convolutions with any stride, padding, dilation and groups.

The per-sample weight gradients of B examples with C channels are the weight gradient of ONE example with B C channels
in B times as many groups, which a single library call computes at nearly the speed of the ordinary one.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import Tensor
from torch.nn import functional as F

from dpkit.gradients.factors import Dense, Factor, accumulation_dtype

if TYPE_CHECKING:
    from dpkit.gradients.capture import Call


def convolution(axes: int) -> Callable[..., Tensor]:
    """The rule of ``F.conv1d``, ``F.conv2d``, ``F.conv3d``: input (B, C, ...), weight (O, C / groups, ...)."""

    def rule(
        call: Call,
        /,
        input: Tensor,
        weight: Tensor,
        bias: Tensor | None = None,
        stride: int | Sequence[int] = 1,
        padding: int | str | Sequence[int] = 0,
        dilation: int | Sequence[int] = 1,
        groups: int = 1,
    ) -> Tensor:
        x = call.batched(input, axes + 2)
        strides, dilations = _each(stride, axes), _each(dilation, axes)
        if padding == "same":
            spans = [step * (length - 1) for step, length in zip(dilations, weight.shape[2:], strict=True)]
            if any(span % 2 for span in spans):
                # Padding is the same on both sides except that 'same' puts the odd row behind.
                x = F.pad(x, [behind for span in reversed(spans) for behind in (0, span % 2)])
            paddings = tuple(span // 2 for span in spans)
        else:
            paddings = _each(0 if isinstance(padding, str) else padding, axes)
        names = (call.name(weight), None if bias is None else call.name(bias))
        operation = _Convolution(names, _Window(strides, paddings, dilations, groups), weight.shape)
        return call.record(operation, x, call.detached(weight), call.detached(bias))

    return rule


@dataclass(frozen=True, slots=True)
class _Window:
    stride: tuple[int, ...]
    padding: tuple[int, ...]
    dilation: tuple[int, ...]
    groups: int

    def forward(self, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        none = [0] * len(self.stride)
        return torch.convolution(x, weight, bias, self.stride, self.padding, self.dilation, False, none, self.groups)

    def backward(self, grad: Tensor, x: Tensor, weight: Tensor, groups: int, which: list[bool]) -> tuple[Tensor, ...]:
        none = [0] * len(self.stride)
        return torch.ops.aten.convolution_backward(
            grad, x, weight, None, self.stride, self.padding, self.dilation, False, none, groups, which
        )


@dataclass(frozen=True, slots=True)
class _Convolution:
    names: tuple[str | None, str | None]
    window: _Window
    weight_shape: torch.Size

    def forward(self, x: Tensor, weight: Tensor, bias: Tensor | None) -> tuple[Tensor, tuple[Tensor | None, ...]]:
        y = self.window.forward(x, weight, bias)
        return y, (x, weight if x.requires_grad else None)

    def backward(
        self, grad: Tensor, saved: tuple[Tensor, Tensor | None], *, need_input: bool
    ) -> tuple[Tensor | None, list[tuple[str, Factor]]]:
        x, weight = saved
        grad_input = None
        if need_input and weight is not None:
            grad_input, *_ = self.window.backward(grad, x, weight, self.window.groups, [True, False, False])
        found: list[tuple[str, Factor]] = []
        name, bias_name = self.names
        if name is not None:
            found.append((name, Patches(x.detach(), grad, self.window, self.weight_shape)))
        if bias_name is not None:
            found.append((bias_name, Dense(grad.flatten(2).sum(2, dtype=accumulation_dtype(grad.dtype)))))
        return grad_input, found


@dataclass(frozen=True, slots=True)
class Patches:
    """G_b = sum_t q_bt (patch t of x_b)^T, for inputs x and output gradients q."""

    x: Tensor
    q: Tensor
    window: _Window
    weight_shape: torch.Size

    @property
    def size(self) -> int:
        return self.x.shape[0]

    @property
    def dtype(self) -> torch.dtype:
        return self.x.dtype

    def write(self, rows: slice, out: Tensor) -> None:
        x, q = self.x[rows].to(out.dtype), self.q[rows].to(out.dtype)
        size, outputs = len(x), self.weight_shape[0]
        if size == 0:
            return
        # Only the shape of the weight is read.
        weight = x.new_empty(size * outputs, *self.weight_shape[1:])
        one_x, one_q = x.reshape(1, -1, *x.shape[2:]), q.reshape(1, -1, *q.shape[2:])
        _, found, _ = self.window.backward(one_q, one_x, weight, size * self.window.groups, [False, True, False])
        out.copy_(found.reshape(out.shape))

    def magnitude(self) -> Tensor:
        # sum_t |q_t| |patch_t| <= |q| (sum_t |patch_t|^2)^(1/2), and an entry of x is in one patch per kernel entry.
        kernel = math.prod(self.weight_shape[2:])
        q = torch.linalg.vector_norm(self.q.flatten(1).double(), dim=1)
        return q * math.sqrt(kernel) * torch.linalg.vector_norm(self.x.flatten(1).double(), dim=1)

    def select(self, keep: Tensor) -> Patches:
        return Patches(self.x[keep], self.q[keep], self.window, self.weight_shape)


def _each(value: int | Sequence[int], axes: int) -> tuple[int, ...]:
    values = (value,) if isinstance(value, int) else tuple(value)
    return values * axes if len(values) == 1 else values
