"""Torch function -> per-sample rule, called as ``rule(call, *args, **kwargs)`` in place of the function.

What is missing here is refused by name when a tracked parameter meets it.  A new rule is one file and its lines below.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from dpkit.gradients.rules.conv import convolution
from dpkit.gradients.rules.elementwise import broadcast
from dpkit.gradients.rules.embedding import embedding
from dpkit.gradients.rules.linear import addmm, linear, matmul
from dpkit.gradients.rules.norm import group_norm, layer_norm

RULES: dict[Callable[..., Any], Callable[..., Tensor]] = {
    F.linear: linear,
    torch.matmul: matmul,
    torch.mm: matmul,
    torch.addmm: addmm,
    Tensor.matmul: matmul,
    Tensor.__matmul__: matmul,
    Tensor.mm: matmul,
    Tensor.addmm: addmm,
    F.conv1d: convolution(1),
    F.conv2d: convolution(2),
    F.conv3d: convolution(3),
    F.embedding: embedding,
    F.layer_norm: layer_norm,
    F.group_norm: group_norm,
    **dict.fromkeys(
        (
            *(torch.add, Tensor.add, Tensor.__add__, Tensor.__radd__, Tensor.add_, Tensor.__iadd__),
            *(torch.sub, Tensor.sub, Tensor.__sub__, Tensor.__rsub__, Tensor.sub_, Tensor.__isub__),
            *(torch.mul, Tensor.mul, Tensor.__mul__, Tensor.__rmul__, Tensor.mul_, Tensor.__imul__),
            *(torch.div, Tensor.div, Tensor.__truediv__, Tensor.div_, Tensor.__itruediv__),
        ),
        broadcast,
    ),
}

ARGUMENT_IS_TEMPLATE: frozenset[Callable[..., Any]] = frozenset(
    {Tensor.to, Tensor.type_as, Tensor.view_as, Tensor.reshape_as, Tensor.expand_as}
)
"""Functions of a tensor that read only the type, device or shape of a second one."""

_MIXES = "it mixes the examples of a batch: replace it by group normalization (opacus.validators.ModuleValidator.fix)"

REMEDIES: dict[Callable[..., Any], str] = {F.batch_norm: _MIXES, torch.batch_norm: _MIXES}
"""Ways out that are better than the general one."""
