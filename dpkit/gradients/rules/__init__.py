"""Torch function -> per-sample rule, called as ``rule(call, *args, **kwargs)`` in place of the function.

What is missing here goes to the fallback when a tracked tensor meets a batch.  A new rule is one file and its lines
below.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from dpkit.gradients.rules import recurrent
from dpkit.gradients.rules.attention import multi_head_attention, scaled_dot_product_attention
from dpkit.gradients.rules.conv import convolution, transposed_convolution
from dpkit.gradients.rules.elementwise import broadcast, joined
from dpkit.gradients.rules.embedding import (
    embedding,
    embedding_bag,
    refused_embedding,
    refused_embedding_bag,
)
from dpkit.gradients.rules.fallback import per_example
from dpkit.gradients.rules.linear import addmm, bilinear, linear, matmul, matmul_reversed
from dpkit.gradients.rules.norm import group_norm, instance_norm, layer_norm, rms_norm

RULES: dict[Callable[..., Any], Callable[..., Any]] = {
    F.linear: linear,
    torch.matmul: matmul,
    torch.mm: matmul,
    torch.addmm: addmm,
    Tensor.matmul: matmul,
    Tensor.__matmul__: matmul,
    Tensor.__rmatmul__: matmul_reversed,
    Tensor.mm: matmul,
    Tensor.addmm: addmm,
    F.conv1d: convolution(1),
    F.conv2d: convolution(2),
    F.conv3d: convolution(3),
    F.conv_transpose1d: transposed_convolution(1),
    F.conv_transpose2d: transposed_convolution(2),
    F.conv_transpose3d: transposed_convolution(3),
    F.embedding: embedding,
    F.embedding_bag: embedding_bag,
    F.bilinear: bilinear,
    F.layer_norm: layer_norm,
    F.group_norm: group_norm,
    F.instance_norm: instance_norm,
    F.rms_norm: rms_norm,
    torch.rms_norm: rms_norm,
    F.multi_head_attention_forward: multi_head_attention,
    F.scaled_dot_product_attention: scaled_dot_product_attention,
    torch.lstm: recurrent.lstm,
    torch.gru: recurrent.gru,
    torch.rnn_tanh: recurrent.rnn_tanh,
    torch.rnn_relu: recurrent.rnn_relu,
    torch.lstm_cell: recurrent.lstm_cell,
    torch.gru_cell: recurrent.gru_cell,
    torch.rnn_tanh_cell: recurrent.rnn_tanh_cell,
    torch.rnn_relu_cell: recurrent.rnn_relu_cell,
    **dict.fromkeys((torch.mv, Tensor.mv, torch.bmm, Tensor.bmm), matmul),
    **dict.fromkeys(
        (
            *(torch.add, Tensor.add, Tensor.__add__, Tensor.__radd__, Tensor.add_, Tensor.__iadd__),
            *(torch.sub, Tensor.sub, Tensor.__sub__, Tensor.__rsub__, Tensor.sub_, Tensor.__isub__),
            *(torch.mul, Tensor.mul, Tensor.__mul__, Tensor.__rmul__, Tensor.mul_, Tensor.__imul__),
            *(torch.div, Tensor.div, Tensor.__truediv__, Tensor.__rtruediv__, Tensor.div_, Tensor.__itruediv__),
            *(torch.pow, Tensor.pow, Tensor.__pow__, Tensor.__rpow__, torch.where, Tensor.where),
            *(torch.maximum, torch.minimum, torch.max, torch.min, torch.lerp, Tensor.lerp, torch.clamp, Tensor.clamp),
            *(torch.addcmul, Tensor.addcmul, torch.addcdiv, Tensor.addcdiv),
        ),
        broadcast,
    ),
    **dict.fromkeys((torch.cat, torch.concat, torch.concatenate, torch.stack), joined),
}

FALLBACK = per_example

ARGUMENT_IS_TEMPLATE: frozenset[Callable[..., Any]] = frozenset(
    {Tensor.to, Tensor.type_as, Tensor.view_as, Tensor.reshape_as, Tensor.expand_as}
)
"""Functions of a tensor that read only the type, device or shape of a second one."""

Why = tuple[str, str]


def _batch_norm(input: Tensor, running_mean: Any = None, *args: Any, **kwargs: Any) -> Why | None:
    training = kwargs.get("training", args[3] if len(args) > 3 else False)
    if not training and running_mean is not None:
        return None
    return (
        "it mixes the examples of a batch",
        "replace it by group normalization (opacus.validators.ModuleValidator.fix), or freeze its statistics: eval()",
    )


REFUSED: dict[Callable[..., Any], Callable[..., Why | None]] = {
    F.batch_norm: _batch_norm,
    F.embedding: refused_embedding,
    F.embedding_bag: refused_embedding_bag,
}
"""Function -> why a call of it is refused, and the way out; None where it is not."""

_LOWER: frozenset[Callable[..., Any]] = frozenset(
    {
        *(F.linear, torch.matmul, torch.mm, torch.addmm, torch.bmm),
        *(Tensor.matmul, Tensor.__matmul__, Tensor.__rmatmul__, Tensor.mm, Tensor.addmm),
        *(F.conv1d, F.conv2d, F.conv3d, F.conv_transpose1d, F.conv_transpose2d, F.conv_transpose3d),
    }
)
_FULL_ON_CUDA: frozenset[Callable[..., Any]] = frozenset({F.layer_norm, F.group_norm})


def autocast_dtype(function: Callable[..., Any], device: str) -> torch.dtype | None:
    """The type to which autocast brings the floating-point arguments of a function; None if it leaves them."""
    if function in _LOWER:
        return torch.get_autocast_dtype(device)
    return torch.float32 if device == "cuda" and function in _FULL_ON_CUDA else None
