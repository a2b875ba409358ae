"""Attention: the parts of it that meet a parameter, each captured by its own rule.

``F.multi_head_attention_forward`` is taken apart: projections in, attention, projection out, with the masks and the
dropout of the library in its order, so that output and random numbers are the same.  Inside, the examples are along the
first axis, whatever ``batch_first`` says.  ``F.scaled_dot_product_attention`` runs as it is, on a mask (a learnt bias)
or learnt queries that are expanded over the batch.
"""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Any, cast

import torch
from torch import Tensor
from torch.nn import functional as F

if TYPE_CHECKING:
    from dpkit.gradients.capture import Call


def scaled_dot_product_attention(
    call: Call,
    /,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attn_mask: Tensor | None = None,
    dropout_p: float = 0.0,
    is_causal: bool = False,
    **options: Any,
) -> Tensor:
    """``F.scaled_dot_product_attention``: query (B, ..., T, d), key and value (B, ..., S, d), mask (..., T, S)."""
    tensors = (query, key, value, attn_mask)
    like = max((tensor for tensor in tensors if tensor is not None and call.is_batched(tensor)), key=Tensor.dim)
    swapped = [
        call.expanded(tensor, like=like) if tensor is not None and call.name(tensor) is not None else tensor
        for tensor in tensors
    ]
    q, k, v, mask = cast(Any, swapped)
    return F.scaled_dot_product_attention(q, k, v, mask, dropout_p, is_causal, **options)


def multi_head_attention(
    call: Call,
    /,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    embed_dim_to_check: int,
    num_heads: int,
    in_proj_weight: Tensor | None,
    in_proj_bias: Tensor | None,
    bias_k: Tensor | None,
    bias_v: Tensor | None,
    add_zero_attn: bool,
    dropout_p: float,
    out_proj_weight: Tensor,
    out_proj_bias: Tensor | None,
    training: bool = True,
    key_padding_mask: Tensor | None = None,
    need_weights: bool = True,
    attn_mask: Tensor | None = None,
    use_separate_proj_weight: bool = False,
    q_proj_weight: Tensor | None = None,
    k_proj_weight: Tensor | None = None,
    v_proj_weight: Tensor | None = None,
    static_k: Tensor | None = None,
    static_v: Tensor | None = None,
    average_attn_weights: bool = True,
    is_causal: bool = False,
) -> tuple[Tensor, Tensor | None]:
    """``F.multi_head_attention_forward``: query (T, B, d), key and value (S, B, ...)."""
    if query.dim() != 3:
        raise call.unsupported(
            f"the query has shape {tuple(query.shape)} and no batch axis", "keep a batch axis, of length 1 if need be"
        )
    if static_k is not None or static_v is not None:
        raise call.unsupported("static_k and static_v have no rule", "call scaled_dot_product_attention on them")
    if any(call.is_batched(x) and call.layout(x, axis=1).axis != 1 for x in (query, key, value)):
        raise call.unsupported(
            "the examples are not along the batch axis of its input, so they would attend to one another",
            "pass batch_first=True to the layer if its input is (batch, sequence, features)",
        )
    separate = (q_proj_weight, k_proj_weight, v_proj_weight) if use_separate_proj_weight else None
    dropout_p = dropout_p if training else 0.0
    with call.capturing():
        q, k, v = _projected((query, key, value), in_proj_weight, separate, in_proj_bias)
        mask, is_causal = _mask(attn_mask, key_padding_mask, k, num_heads, is_causal, need_weights, q.dtype)
        if bias_k is not None and bias_v is not None:
            k = torch.cat((k, bias_k.expand(len(k), 1, -1)), 1)
            v = torch.cat((v, bias_v.expand(len(v), 1, -1)), 1)
        q, k, v = (x.unflatten(-1, (num_heads, -1)).transpose(1, 2) for x in (q, k, v))
        if add_zero_attn:
            k, v = F.pad(k, (0, 0, 0, 1)), F.pad(v, (0, 0, 0, 1))
        if mask is not None:
            # Keys that were added to those of the sequence are visible to all.
            mask = F.pad(mask, (0, k.shape[2] - mask.shape[-1]))
        weights = None
        if need_weights:
            scores = (q * math.sqrt(1.0 / q.shape[-1])) @ k.mT
            weights = torch.softmax(scores if mask is None else scores + mask, -1)
            weights = F.dropout(weights, dropout_p) if dropout_p else weights
            attended = weights @ v
        else:
            attended = F.scaled_dot_product_attention(q, k, v, mask, dropout_p, is_causal)
        y = F.linear(attended.transpose(1, 2).flatten(2), out_proj_weight, out_proj_bias)
        if weights is not None and average_attn_weights:
            weights = weights.mean(1)
        return y.transpose(0, 1), weights


def _projected(
    inputs: tuple[Tensor, Tensor, Tensor],
    packed: Tensor | None,
    separate: tuple[Tensor | None, ...] | None,
    bias: Tensor | None,
) -> Any:
    """Queries, keys and values: (B, T, d) or (B, S, d). As few products as there are different inputs."""
    query, key, value = inputs
    if separate is not None:
        biases = (None,) * 3 if bias is None else bias.chunk(3)
        parts = zip(inputs, separate, biases, strict=True)
        return [F.linear(x.transpose(0, 1), weight, b) for x, weight, b in parts if weight is not None]
    assert packed is not None
    width = query.shape[-1]
    if query is key and key is value:
        return F.linear(query.transpose(0, 1), packed, bias).chunk(3, -1)
    shares = (width, 2 * width) if key is value else (width, width, width)
    weights = packed.split(shares)
    biases = (None,) * len(shares) if bias is None else bias.split(shares)
    found: list[Tensor] = []
    for x, weight, b in zip(inputs, weights, biases, strict=False):
        found += F.linear(x.transpose(0, 1), weight, b).split(width, -1)
    return found


def _mask(
    attn_mask: Tensor | None,
    key_padding_mask: Tensor | None,
    k: Tensor,
    heads: int,
    is_causal: bool,
    need_weights: bool,
    dtype: torch.dtype,
) -> tuple[Tensor | None, bool]:
    """What is added to the scores, (B or 1, heads or 1, T, S) or None; and whether attention is told to be causal."""
    if is_causal and attn_mask is None:
        raise RuntimeError("is_causal is a hint about attn_mask, which is missing")
    size, keys = k.shape[:2]
    if is_causal and key_padding_mask is None and not need_weights:
        return None, True
    mask = None
    if attn_mask is not None:
        mask = _additive(attn_mask, dtype)
        mask = mask.unflatten(0, (size, heads)) if mask.dim() == 3 else mask[None, None]
    if key_padding_mask is not None:
        padding = _additive(key_padding_mask, dtype).reshape(size, 1, 1, keys)
        mask = padding if mask is None else mask + padding
    return mask, False


def _additive(mask: Tensor, dtype: torch.dtype) -> Tensor:
    """True, which means "not this key", becomes minus infinity."""
    if mask.is_floating_point():
        return mask
    return torch.zeros_like(mask, dtype=dtype).masked_fill_(mask, float("-inf"))
