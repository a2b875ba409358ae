"""The junction: where a tracked tensor meets a batch by broadcasting.

Scales, biases, class tokens, position tables: the tracked tensor is expanded over the batch before the operation, so
that autograd itself delivers one gradient for each example, and the operation runs unchanged.  A tensor that has the
batch axis already (a class token that the model expanded, repeated positions) has rows that belong to one example each.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from torch.utils import _pytree as pytree

from dpkit.gradients.arithmetic import accumulation_dtype
from dpkit.gradients.derived import Derived, Key, Placed, looked_up
from dpkit.gradients.factors import Dense, Factor

if TYPE_CHECKING:
    from dpkit.gradients.capture import Call
    from dpkit.gradients.layout import Layout


def broadcast(call: Call, /, *args: Any, **kwargs: Any) -> Any:
    """Any function of tracked and batched tensors that works entry by entry, with broadcasting."""
    leaves, structure = pytree.tree_flatten((args, kwargs))
    if args and call.name(args[0]) is not None and _in_place(call.function.__name__):
        raise call.unsupported("the batch would be written into the parameter", "write the result to a new tensor")
    like = max((leaf for leaf in leaves if call.is_batched(leaf)), key=Tensor.dim)
    swapped = [expanded(call, leaf, like) if call.name(leaf) is not None else leaf for leaf in leaves]
    args, kwargs = pytree.tree_unflatten(swapped, structure)
    return call.function(*args, **kwargs)


def joined(call: Call, /, *args: Any, **kwargs: Any) -> Any:
    """``torch.cat`` and ``torch.stack``: the tracked pieces need an axis of their own for the batch."""
    leaves, structure = pytree.tree_flatten((args, kwargs))
    like = next(leaf for leaf in leaves if call.is_batched(leaf))
    axis = call.layout(like).axis
    place = kwargs.get("dim", kwargs.get("axis", args[1] if len(args) > 1 else 0))
    place = place + like.dim() if place < 0 else place
    if place == axis and call.function not in (torch.stack,):
        raise call.unsupported("examples and parameters would be rows of one batch", "join them along another axis")
    swapped = [expanded(call, leaf, like) if call.name(leaf) is not None else leaf for leaf in leaves]
    args, kwargs = pytree.tree_unflatten(swapped, structure)
    return call.function(*args, **kwargs)


def expanded(call: Call, tensor: Tensor, like: Tensor) -> Tensor:
    """A tracked tensor that broadcasts with ``like``, with the batch axis of ``like`` and a gradient for each example.

    Raises:
      UnsupportedOperation: it cannot have that axis.
    """
    if not like.dim():
        raise call.unsupported(
            f"its shape {tuple(tensor.shape)} and the other tensor's {tuple(like.shape)} leave no batch axis",
            "keep one number for each example, along a leading axis",
        )
    layout = call.layout(like)
    key = call.name(tensor)
    assert key is not None
    rows, own, place = like.shape[layout.axis], tensor.dim(), layout.axis - like.dim()
    if own >= -place and tensor.shape[place] != 1:
        return _by_rows(call, tensor, key, layout, place + own)
    shape = (1,) * max(0, -place - own) + tuple(tensor.shape)
    axis = len(shape) + place
    target = (*shape[:axis], rows, *shape[axis + 1 :])
    operation = _Expand((key,), type(layout)(axis, layout.size, layout.folded), shape, target, tensor.shape)
    return call.record(operation, None, call.detached(tensor))


def _by_rows(call: Call, tensor: Tensor, key: Key, layout: Layout, axis: int) -> Tensor:
    """A tensor with a row for each example. Where all rows are one row, expanded, that row is what is tracked."""
    if tensor.stride(axis) == 0 and isinstance(key, Derived):
        base, base_key = key.origin.base, key.origin.base_key
        shape = (*tensor.shape[:axis], 1, *tensor.shape[axis + 1 :])
        if base is not None and base_key is not None and base.shape == shape:
            operation = _Expand(
                (base_key,), type(layout)(axis, layout.size, layout.folded), shape, tuple(tensor.shape), base.shape
            )
            return call.record(operation, None, base.detach())
    operation = _Rows((key,), type(layout)(axis, layout.size, layout.folded), tensor.shape)
    return call.record(operation, None, call.detached(tensor))


@dataclass(frozen=True, slots=True)
class _Expand:
    """p -> the parameter, once for each example."""

    names: tuple[Key]
    layout: Layout
    shape: tuple[int, ...]
    target: tuple[int, ...]
    own: torch.Size

    def forward(self, x: None, parameter: Tensor) -> tuple[Tensor, tuple[Tensor | None, ...]]:
        return parameter.reshape(self.shape).expand(self.target), ()

    def backward(
        self, grad: Tensor, saved: tuple[()], *, need_input: bool
    ) -> tuple[Tensor | None, list[tuple[Key, Factor]]]:
        rows = self.layout.split(grad)
        summed = rows[:, 0] if rows.shape[1] == 1 else rows.sum(1, dtype=accumulation_dtype(grad.dtype))
        return None, [(self.names[0], Dense(summed.reshape(len(rows), *self.own)))]


@dataclass(frozen=True, slots=True)
class _Rows:
    """p -> p, whose rows along one axis belong to one example each."""

    names: tuple[Key]
    layout: Layout
    shape: torch.Size

    def forward(self, x: None, parameter: Tensor) -> tuple[Tensor, tuple[Tensor | None, ...]]:
        return parameter.view_as(parameter), ()

    def backward(
        self, grad: Tensor, saved: tuple[()], *, need_input: bool
    ) -> tuple[Tensor | None, list[tuple[Key, Factor]]]:
        (key,), layout = self.names, self.layout
        if isinstance(key, Derived) and (origin := key.origin).ids is not None and layout.axis < origin.ids.dim():
            assert origin.base is not None
            assert origin.base_key is not None
            return None, [
                (origin.base_key, looked_up(origin, layout.split(origin.ids), layout.split(grad), origin.base))
            ]
        numbers = torch.arange(self.shape[layout.axis], device=grad.device)
        places = type(layout)(0, layout.size, layout.folded).split(numbers)
        return None, [(key, Placed(layout.split(grad), places, layout.axis, self.shape))]


def _in_place(name: str) -> bool:
    return name.startswith("__i") or (name.endswith("_") and not name.endswith("__"))
