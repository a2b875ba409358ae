"""Rows of a batch, whatever structure the user's ``collate_fn`` gave it.

A batch is a tensor, or a mapping, tuple, named tuple or list of batches; axis 0 of every tensor in it counts the rows.
"""

from __future__ import annotations

from collections.abc import Callable, Hashable, Mapping
from dataclasses import fields, is_dataclass
from enum import Enum
from typing import Any

import torch
from torch import Tensor

from dpkit.errors import UnsupportedLoader

Batch = Any


def map_tensors(function: Callable[[Tensor], Any], batch: Batch) -> Batch:
    """The same structure with ``function`` applied to each tensor; leaves of other types stay as they are."""
    if isinstance(batch, Tensor):
        return function(batch)
    if isinstance(batch, Mapping):
        items = {key: map_tensors(function, value) for key, value in batch.items()}
        kind: Any = type(batch)
        return items if kind is dict else kind(items)  # e.g. a tokenizer's BatchEncoding stays one
    if isinstance(batch, tuple):
        items = [map_tensors(function, value) for value in batch]
        return type(batch)(*items) if hasattr(batch, "_fields") else tuple(items)
    if isinstance(batch, list):
        return [map_tensors(function, value) for value in batch]
    return batch


def tensors(batch: Batch) -> list[Tensor]:
    """All tensors of the batch, in order; those in the fields of a data class, too."""
    if isinstance(batch, Tensor):
        return [batch]
    if isinstance(batch, Mapping):
        found = batch.values()
    elif isinstance(batch, (tuple, list)):
        found = batch
    elif is_dataclass(batch) and not isinstance(batch, type):
        found = [getattr(batch, field.name) for field in fields(batch)]
    else:
        found = ()
    return [tensor for value in found for tensor in tensors(value)]


def structure(batch: Batch) -> Hashable:
    """What kind of batch it is: types, names, numbers of axes, and flags (True, "sum"); no sizes, no other values."""
    if isinstance(batch, Tensor):
        return batch.dtype, batch.dim()
    if isinstance(batch, Mapping):
        return tuple((str(key), structure(value)) for key, value in batch.items())
    if isinstance(batch, (tuple, list)):
        return tuple(structure(value) for value in batch)
    return batch if isinstance(batch, (bool, str, Enum)) else type(batch)


def take(batch: Batch, rows: slice | Tensor) -> Batch:
    """The given rows of every tensor."""
    return map_tensors(lambda tensor: tensor[rows], batch)


def blank(template: Batch, rows: int) -> Batch:
    """``rows`` rows of zeros in the structure of ``template``."""
    return map_tensors(lambda tensor: tensor.new_zeros((rows, *tensor.shape[1:])), template)


def pad(batch: Batch, rows: int) -> Batch:
    """The batch with rows of zeros appended until it has ``rows`` rows."""
    return map_tensors(
        lambda tensor: torch.cat([tensor, tensor.new_zeros((rows - len(tensor), *tensor.shape[1:]))]), batch
    )


def check_rows(batch: Batch, rows: int) -> None:
    """Refuse a collated batch whose tensors do not all have ``rows`` rows, or that has leaves that cannot be padded.

    Raises:
      UnsupportedLoader: naming the leaf.
    """

    def check(leaf: Any, path: str) -> None:
        if isinstance(leaf, Tensor):
            if leaf.dim() == 0 or len(leaf) != rows:
                raise UnsupportedLoader(
                    f"collate_fn returned {path} of shape {tuple(leaf.shape)} for {rows} examples; axis 0 of every "
                    "tensor must count the examples, because padding rows are added and dropped along it."
                )
        elif isinstance(leaf, Mapping):
            for key, value in leaf.items():
                check(value, f"{path}[{key!r}]")
        elif isinstance(leaf, (tuple, list)):
            for number, value in enumerate(leaf):
                check(value, f"{path}[{number}]")
        else:
            raise UnsupportedLoader(
                f"collate_fn returned {path} of type {type(leaf).__name__}; a private batch holds tensors only (in "
                "mappings, tuples or lists), because an empty draw becomes a row of zeros. Convert it in collate_fn or "
                "leave it out."
            )

    check(batch, "batch")
