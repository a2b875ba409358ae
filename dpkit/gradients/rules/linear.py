"""Products with a weight matrix: y_bt = W x_bt + c, or x_bt W + c.

With the output's gradient q, the per-sample gradient of W is sum_t q_bt x_bt^T, or sum_t x_bt q_bt^T for x W; that of
the bias is sum_t q_bt.  All axes but the last and the one with the examples are flattened into t.

A weight with axes in front of its last two has a matrix for each entry of them: it is expanded over the batch.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from torch.nn import functional as F

from dpkit.gradients.arithmetic import accumulation_dtype, linear_product
from dpkit.gradients.factors import Dense, Factor, Outer

if TYPE_CHECKING:
    from dpkit.gradients.capture import Call
    from dpkit.gradients.layout import Layout

# --------------------------------------------------------------------------------------------------------------- rules


def linear(call: Call, /, input: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """``F.linear``: input (B, ..., d), weight (p, d), bias (p,)."""
    if weight.dim() == 2 and call.is_batched(input) and not call.is_batched(weight) and not call.is_batched(bias):
        return _record(call, input, weight, bias, outputs_first=True)
    with call.capturing():
        y = torch.matmul(input, weight.mT if weight.dim() > 1 else weight)
        return y if bias is None else y + bias


def matmul(
    call: Call, /, input: Tensor, other: Tensor | None = None, *, mat2: Tensor | None = None, vec: Tensor | None = None
) -> Tensor:
    """``input @ other``, also by the names ``mm``, ``mv`` and ``bmm``; one of the two is a weight, on either side."""
    right = next(value for value in (other, mat2, vec) if value is not None)
    if call.is_batched(input):
        return _on_the_right(call, input, right)
    return _on_the_left(call, input, right)


def matmul_reversed(call: Call, /, input: Tensor, other: Tensor) -> Tensor:
    """``input.__rmatmul__(other)``."""
    return matmul(call, other, input)


def addmm(call: Call, /, input: Tensor, mat1: Tensor, mat2: Tensor, *, beta: float = 1, alpha: float = 1) -> Tensor:
    """``beta * input + alpha * mat1 @ mat2``, where mat1 or mat2 is a weight, or ``input`` is."""
    bias = input.dim() == 1 and not call.is_batched(input) and (alpha, beta) == (1, 1)
    if bias and call.is_batched(mat1) and not call.is_batched(mat2):
        return _record(call, mat1, mat2, input, outputs_first=False)
    with call.capturing():
        y = mat1 @ mat2
        y = y if alpha == 1 else y * alpha
        # As torch has it, the first term is not read where beta is zero: it may hold anything.
        return y if beta == 0 else (input if beta == 1 else input * beta) + y


def bilinear(call: Call, /, input1: Tensor, input2: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """``F.bilinear``: inputs (B, ..., d) and (B, ..., e), weight (p, d, e); linear in the products of the inputs."""
    with call.capturing():
        return F.linear((input1.unsqueeze(-1) * input2.unsqueeze(-2)).flatten(-2), weight.flatten(1), bias)


def _on_the_right(call: Call, x: Tensor, weight: Tensor) -> Tensor:
    """``x @ weight``: weight (d, p), (d,), or (..., d, p)."""
    if weight.dim() == 1:
        with call.capturing():
            return F.linear(x, weight.unsqueeze(0)).squeeze(-1)
    if weight.dim() == 2:
        return _record(call, x, weight, None, outputs_first=False)
    if _examples(call, x) == x.dim() - 2:
        return call.record(_RowsOfMatrices((call.name(weight),), call.layout(x)), x, call.detached(weight))
    expanded = call.expanded(weight, like=x)
    return torch.matmul(x, expanded)


def _on_the_left(call: Call, weight: Tensor, x: Tensor) -> Tensor:
    """``weight @ x``, which is ``x^T weight^T``, transposed."""
    if x.dim() == 1:
        raise call.unsupported(
            f"the input has shape {tuple(x.shape)} and no batch axis", "keep the examples along an axis of their own"
        )
    with call.capturing():
        if weight.dim() == 1:
            return x.mT @ weight
        return (x.mT @ weight.mT).mT


def _examples(call: Call, x: Tensor) -> int:
    """The axis of the examples; refused if it is the one that the product sums over."""
    axis = call.layout(x).axis
    if axis == x.dim() - 1:
        raise call.unsupported(
            "the examples are along the axis that the product sums over", "keep them along the first axis"
        )
    return axis


def _record(call: Call, x: Tensor, weight: Tensor, bias: Tensor | None, *, outputs_first: bool) -> Tensor:
    x = call.batched(x, 2)
    _examples(call, x)
    names = (call.name(weight), None if bias is None else call.name(bias))
    operation = _Linear(names, call.layout(x), outputs_first)
    return call.record(operation, x, call.detached(weight), call.detached(bias))


# ----------------------------------------------------------------------------------------------------------- operation


@dataclass(frozen=True, slots=True)
class _Linear:
    names: tuple[Any, Any]
    layout: Layout
    outputs_first: bool

    def forward(self, x: Tensor, weight: Tensor, bias: Tensor | None) -> tuple[Tensor, tuple[Tensor | None, ...]]:
        if self.outputs_first:
            y = F.linear(x, weight, bias)
        else:
            y = x @ weight if bias is None else torch.addmm(bias, x, weight)
        if y._is_view():  # as the library's own output, it may be overwritten, which a view made in here may not be
            y = torch.ops.aten._unsafe_view(y, y.shape)
        return y, (x if self.names[0] is not None else None, weight if x.requires_grad else None)

    def backward(
        self, grad: Tensor, saved: tuple[Tensor | None, Tensor | None], *, need_input: bool
    ) -> tuple[Tensor | None, list[tuple[Any, Factor]]]:
        x, weight = saved
        grad_input = None
        if need_input and weight is not None:
            grad_input = linear_product(grad, weight.mT if self.outputs_first else weight)
        found: list[tuple[Any, Factor]] = []
        name, bias_name = self.names
        q = self._steps(grad)
        if name is not None and x is not None:
            inputs = self._steps(x.detach())
            found.append((name, Outer(q, inputs) if self.outputs_first else Outer(inputs, q)))
        if bias_name is not None:
            found.append(
                (bias_name, Dense(q[:, 0] if q.shape[1] == 1 else q.sum(1, dtype=accumulation_dtype(q.dtype))))
            )
        return grad_input, found

    def _steps(self, values: Tensor) -> Tensor:
        """(B, M, ..., d) in any layout -> (B, T, d)."""
        return self.layout.split(values).flatten(1, -2)


@dataclass(frozen=True, slots=True)
class _RowsOfMatrices:
    """x (..., n, d) and W (..., d, p) -> x W, where the n rows are those of examples."""

    names: tuple[Any]
    layout: Layout

    def forward(self, x: Tensor, weight: Tensor) -> tuple[Tensor, tuple[Tensor | None, ...]]:
        return x @ weight, (x, weight)

    def backward(
        self, grad: Tensor, saved: tuple[Tensor, Tensor], *, need_input: bool
    ) -> tuple[Tensor | None, list[tuple[Any, Factor]]]:
        x, weight = saved
        grad_input = (grad @ weight.mT).sum_to_size(x.shape) if need_input else None
        # (B, ..., M, d) and (B, ..., M, p); the axes between are those of x, of x W, and of W, which broadcast.
        inputs = self.layout.split(x.detach()).movedim(1, -2)
        q = replace(self.layout, axis=grad.dim() - 2).split(grad).movedim(1, -2)
        inputs = inputs.reshape(len(inputs), *[1] * (q.dim() - inputs.dim()), *inputs.shape[1:])
        between = (1,) * (q.dim() - 1 - weight.dim()) + tuple(weight.shape)
        gradients = (inputs.mT @ q).sum_to_size(len(q), *between).reshape(len(q), *weight.shape)
        return grad_input, [(name, Dense(gradients)) for name in self.names if name is not None]
