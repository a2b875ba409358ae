"""Packing: nested states as JSON with tensors beside it, and back, exactly.

Guarantee: what was packed comes back with every bit of every tensor, and the type and value of everything else that
can be packed: None, booleans, numbers, text, lists, tuples, dictionaries with text or whole numbers as keys, counters,
named tuples and dataclasses of these. Subclasses of numbers and text (``numpy.float64``, an ``IntEnum``) come back as
the plain type. Anything else is refused by its place and type. Nothing is executed: unpacking builds these types and
calls the constructors of the named tuples and dataclasses of ``like`` only.

A list is a JSON list, and text, numbers, booleans and None are themselves. All else is an object with one key that says
what it is: ``{"tuple": [...]}``, ``{"dict": [[key, value], ...]}``, ``{"tensor": name}``, ``{"float": "inf"}``, ...
"""

from __future__ import annotations

import math
from collections import Counter, OrderedDict
from collections.abc import Mapping
from dataclasses import fields, is_dataclass
from typing import Any

import torch
from torch import Tensor

from dpkit.errors import CheckpointError

Packed = Any
"""What ``json`` can write."""


def pack(value: Any, place: str, tensors: dict[str, Tensor]) -> Packed:
    """``value`` as JSON; its tensors, copied to the CPU, go into ``tensors`` under names that begin with ``place``.

    Raises:
      CheckpointError: naming the place and the type of what cannot be stored.
    """
    if value is None or isinstance(value, bool):
        return value
    if isinstance(value, (str, int)):
        return str.__str__(value) if isinstance(value, str) else int(value)
    if isinstance(value, float):
        return float(value) if math.isfinite(value) else {"float": str(float(value))}
    if isinstance(value, Tensor):
        if value.layout != torch.strided or value.is_quantized:
            raise CheckpointError(f"{place} is a {value.layout} tensor, which cannot be stored; keep it dense.")
        name = place
        while name in tensors:
            name += "~"  # two different places may read alike: {"a": {"b": ...}, "a/b": ...}
        # A copy of its own: a step in between must not change what is written, and tied weights share their memory.
        tensors[name] = value.detach().to("cpu", copy=True).contiguous()
        return {"tensor": name}
    if type(value) is list:
        return [pack(item, f"{place}/{index}", tensors) for index, item in enumerate(value)]
    if type(value) is tuple:
        return {"tuple": [pack(item, f"{place}/{index}", tensors) for index, item in enumerate(value)]}
    if type(value) in (dict, OrderedDict, Counter):
        pairs = [[_key(key, place), pack(item, f"{place}/{key}", tensors)] for key, item in value.items()]
        return {"counter" if isinstance(value, Counter) else "dict": pairs}
    if (named := _fields(value)) is not None:
        return {"fields": [[name, pack(item, f"{place}/{name}", tensors)] for name, item in named.items()]}
    raise CheckpointError(
        f"{place} is a {type(value).__name__}, which cannot be stored in a checkpoint; states are made of tensors, "
        "numbers, text, lists, tuples and dictionaries."
    )


def unpack(packed: Packed, place: str, tensors: Mapping[str, Tensor], like: Any = None) -> Any:
    """What :func:`pack` packed.

    Args:
      like: a state of the same structure, which says what the named tuples and dataclasses are; where it has a tensor,
        shape and dtype must be the same.
    Raises:
      CheckpointError: it is no packed value, or not one like ``like``.
    """
    if packed is None or isinstance(packed, (bool, str, int, float)):
        return packed
    if isinstance(packed, list):
        return [unpack(item, f"{place}/{i}", tensors, _item(like, i)) for i, item in enumerate(packed)]
    match packed:
        case {"float": "inf" | "-inf" | "nan" as text}:
            return float(text)
        case {"tensor": str(name)} if name in tensors:
            return _same_form(tensors[name], like, place).clone()  # what is done to it must not reach the checkpoint
        case {"tuple": list(items)}:
            return tuple(unpack(item, f"{place}/{i}", tensors, _item(like, i)) for i, item in enumerate(items))
        case {"dict": list(pairs)}:
            return _unpack_pairs(pairs, place, tensors, like)
        case {"counter": list(pairs)}:
            return Counter(_unpack_pairs(pairs, place, tensors, like))
        case {"fields": list(pairs)}:
            expected = _fields(like)
            named = _unpack_pairs(pairs, place, tensors, expected)
            if expected is None or list(expected) != list(named):
                raise CheckpointError(f"{place} has other parts than the state that it should become.")
            return type(like)(**named)
    raise CheckpointError(f"{place} holds nothing that a checkpoint can hold; it was written by something else.")


def _key(key: Any, place: str) -> str | int:
    if isinstance(key, bool) or not isinstance(key, (str, int)):
        raise CheckpointError(f"{place} has the key {key!r}; keys that can be stored are text and whole numbers.")
    return key


def _unpack_pairs(pairs: list[Any], place: str, tensors: Mapping[str, Tensor], like: Any) -> dict[Any, Any]:
    found: dict[Any, Any] = {}
    for pair in pairs:
        if not (isinstance(pair, list) and len(pair) == 2):
            raise CheckpointError(f"{place} is no list of keys with values.")
        key = _key(pair[0], place)
        if key in found:
            raise CheckpointError(f"{place} has the key {key!r} twice.")
        found[key] = unpack(pair[1], f"{place}/{key}", tensors, _item(like, key))
    return found


def _fields(value: Any) -> dict[str, Any] | None:
    """Names and values of a named tuple or a dataclass; None for anything else."""
    if isinstance(value, tuple) and hasattr(value, "_fields"):
        return {name: getattr(value, name) for name in value._fields}  # pyright: ignore[reportAttributeAccessIssue]
    if is_dataclass(value) and not isinstance(value, type):
        return {field.name: getattr(value, field.name) for field in fields(value)}
    return None


def _item(like: Any, key: str | int) -> Any:
    """The part of ``like`` at ``key``, or None where it has none."""
    if isinstance(like, dict):
        return like.get(key)
    return like[key] if isinstance(like, (list, tuple)) and isinstance(key, int) and key < len(like) else None


def _same_form(tensor: Tensor, like: Any, place: str) -> Tensor:
    if not isinstance(like, Tensor):
        return tensor
    if (tensor.shape, tensor.dtype) != (like.shape, like.dtype):
        raise CheckpointError(
            f"{place} is {tensor.dtype} of shape {tuple(tensor.shape)} in the checkpoint, and {like.dtype} of shape "
            f"{tuple(like.shape)} here; it is the checkpoint of another model or plan."
        )
    return tensor.to(like.device)
