"""Products with a weight matrix: y_bt = W x_bt + c, or x_bt W + c.

With the output's gradient q, the per-sample gradient of W is sum_t q_bt x_bt^T, or sum_t x_bt q_bt^T for x W; that of
the bias is sum_t q_bt.  The axes between the first and the last are flattened into t.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import Tensor
from torch.nn import functional as F

from dpkit.gradients.factors import Dense, Factor, Outer, accumulation_dtype

if TYPE_CHECKING:
    from dpkit.gradients.capture import Call


def linear(call: Call, /, input: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """``F.linear``: input (B, ..., d), weight (p, d), bias (p,)."""
    return _record(call, input, weight, bias, outputs_first=True)


def matmul(call: Call, /, input: Tensor, other: Tensor | None = None, *, mat2: Tensor | None = None) -> Tensor:
    """``input @ weight``: input (B, ..., d), weight (d, p) or (d,)."""
    weight = other if mat2 is None else mat2
    if weight is not None and weight.dim() == 1 and call.name(weight) is not None:
        return _record(call, input, weight, None, outputs_first=False, vector=True).squeeze(-1)
    return _record(call, input, weight, None, outputs_first=False)


def addmm(call: Call, /, input: Tensor, mat1: Tensor, mat2: Tensor, *, beta: float = 1, alpha: float = 1) -> Tensor:
    """``input + mat1 @ mat2``: bias (p,), batch (B, d), weight (d, p)."""
    if (alpha, beta) != (1, 1) or input.dim() != 1:
        raise call.unsupported("the rule needs a bias of one axis and alpha = beta = 1", "write bias + x @ weight")
    return _record(call, mat1, mat2, input, outputs_first=False)


def _record(
    call: Call,
    x: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    *,
    outputs_first: bool,
    vector: bool = False,
) -> Tensor:
    x = call.batched(x, 2)
    if weight is None or weight.dim() != (1 if vector else 2):
        raise call.unsupported("the rule needs a weight of two axes as the right-hand factor")
    matrix = call.detached(weight)
    if vector and matrix is not None:
        matrix = matrix.unsqueeze(1)
    names = (call.name(weight), None if bias is None else call.name(bias))
    return call.record(_Linear(names, outputs_first), x, matrix, call.detached(bias))


@dataclass(frozen=True, slots=True)
class _Linear:
    names: tuple[str | None, str | None]
    outputs_first: bool

    def forward(self, x: Tensor, weight: Tensor, bias: Tensor | None) -> tuple[Tensor, tuple[Tensor | None, ...]]:
        if self.outputs_first:
            y = F.linear(x, weight, bias)
        else:
            y = x @ weight if bias is None else torch.addmm(bias, x, weight)
        return y, (x if self.names[0] else None, weight if x.requires_grad else None)

    def backward(
        self, grad: Tensor, saved: tuple[Tensor | None, Tensor | None], *, need_input: bool
    ) -> tuple[Tensor | None, list[tuple[str, Factor]]]:
        x, weight = saved
        grad_input = None
        if need_input and weight is not None:
            grad_input = grad @ (weight if self.outputs_first else weight.mT)
        found: list[tuple[str, Factor]] = []
        name, bias_name = self.names
        q = _steps(grad)
        if name is not None and x is not None:
            inputs = _steps(x.detach())
            found.append((name, Outer(q, inputs) if self.outputs_first else Outer(inputs, q)))
        if bias_name is not None:
            found.append(
                (bias_name, Dense(q[:, 0] if q.shape[1] == 1 else q.sum(1, dtype=accumulation_dtype(q.dtype))))
            )
        return grad_input, found


def _steps(x: Tensor) -> Tensor:
    """(B, ..., d) -> (B, T, d)."""
    return x.reshape(x.shape[0], math.prod(x.shape[1:-1]), x.shape[-1])
