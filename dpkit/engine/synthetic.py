"""Made-up examples for the neighbour probe: a small batch, and the same batch with one example replaced.

Guarantees:
  * Made-up values depend on types, shapes and names alone, never on the values of the batch that gives them.
  * A replaced example has other values and, wherever it has a second axis, another length: tensors that are masks by
    type or name have another number of entries that count, tensors of lengths other lengths, labels another number of
    ignored positions, and everything else ends in zeros.

Whole numbers are 0 and 1, which are valid as token, class, flag and pixel almost everywhere.  What no name tells is
tried: :data:`STYLES` are the conventions that a model may follow, and the probe takes the first that it can run.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from .batch import Batch, take, tensors

ROWS = 4
REPLACED = (0, ROWS - 2)
"""The examples that are replaced, one after the other."""

_IGNORED = -100  # of torch.nn.functional.cross_entropy, and of labels nearly everywhere


@dataclass(frozen=True, slots=True)
class Style:
    """What models do not agree on.

    Attributes:
      ignored_labels: whether ``labels`` may hold -100.
      true_counts: whether True in a mask means that a position counts; and the value that constants get.
    """

    ignored_labels: bool
    true_counts: bool


STYLES = (Style(True, True), Style(False, True), Style(True, False), Style(False, False))


@dataclass(frozen=True, slots=True)
class Examples:
    """A batch of :data:`ROWS` examples, and its neighbours.

    Attributes:
      batch: the batch.
      style: by which examples are replaced.
    """

    batch: Batch
    style: Style

    @staticmethod
    def like(template: Batch, style: Style, rows: int = ROWS) -> Examples:
        """Made-up examples in the structure of ``template``, whose values are not read."""
        longest = _shortest_sequence(template)
        return Examples(map_named(lambda name, leaf: _made_up(name, leaf, rows, style, longest), template), style)

    @staticmethod
    def of(public: Batch, style: Style) -> Examples:
        """The first examples of a public batch, if it has enough; else made-up ones in its structure."""
        found = tensors(public)
        if not found or any(not leaf.dim() or len(leaf) < ROWS for leaf in found):
            return Examples.like(public, style)
        return Examples(take(public, slice(0, ROWS)), style)

    def replaced(self, row: int) -> Batch:
        """The batch with another example at ``row``."""
        longest = _shortest_sequence(self.batch)
        return map_named(lambda name, leaf: _replace(name, leaf, row, self.style, longest), self.batch)

    def alone(self, row: int) -> Batch:
        """The batch of one example."""
        return take(self.batch, slice(row, row + 1))


def map_named(function: Callable[[str, Tensor], Any], batch: Batch, name: str = "") -> Batch:
    """``map_tensors`` of a function that is also told the innermost key or field name above each tensor."""
    if isinstance(batch, Tensor):
        return function(name, batch)
    if isinstance(batch, Mapping):
        items = {key: map_named(function, value, str(key)) for key, value in batch.items()}
        kind: Any = type(batch)
        return items if kind is dict else kind(items)
    if isinstance(batch, tuple):
        names = getattr(batch, "_fields", (name,) * len(batch))
        items = [map_named(function, value, below) for value, below in zip(batch, names, strict=True)]
        return type(batch)(*items) if hasattr(batch, "_fields") else tuple(items)
    if isinstance(batch, list):
        return [map_named(function, value, name) for value in batch]
    return batch


def _shortest_sequence(batch: Batch) -> int:
    """A length that no example exceeds."""
    return min((leaf.shape[1] for leaf in tensors(batch) if leaf.dim() > 1), default=1)


def _is_mask(name: str, leaf: Tensor) -> bool:
    return leaf.dim() > 1 and (leaf.dtype == torch.bool or "mask" in name.lower())


def _is_lengths(name: str, leaf: Tensor) -> bool:
    whole = not leaf.is_floating_point() and leaf.dtype != torch.bool
    return leaf.dim() == 1 and whole and "len" in name.lower()


def _is_labels(name: str, leaf: Tensor) -> bool:
    # On a graphics card a label that the model looks up would end the process, and not just this trial.
    return name == "labels" and leaf.dim() > 1 and not leaf.is_floating_point() and leaf.device.type == "cpu"


def _made_up(name: str, leaf: Tensor, rows: int, style: Style, longest: int) -> Tensor:
    shape, device = (rows, *leaf.shape[1:]), leaf.device
    if _is_mask(name, leaf):
        numbers = torch.arange(rows, device=device)
        half = shape[-1] // 2
        return _mask(name, leaf, shape, half + numbers % max(1, shape[-1] - half), style)
    if leaf.is_floating_point():
        return torch.randn(shape, device=device).to(leaf.dtype)
    if _is_lengths(name, leaf):
        return (1 + torch.arange(rows, device=device) % min(2, max(1, longest))).to(leaf.dtype)
    made_up = _two_kinds(torch.randint(0, 2, shape, device=device).to(leaf.dtype))
    if style.ignored_labels and _is_labels(name, leaf):
        for row in range(rows):
            made_up[row, shape[1] - row % max(1, shape[1] // 2) :] = _IGNORED
    return made_up


def _replace(name: str, leaf: Tensor, row: int, style: Style, longest: int) -> Tensor:
    leaf = leaf.clone()
    holds_flags = leaf.is_floating_point() and leaf.dim() > 1 and bool(((leaf == 0) | (leaf == 1)).all())
    if _is_mask(name, leaf) or holds_flags:
        own, half = leaf[row : row + 1], max(1, leaf.shape[-1] // 2)
        counts = half - 1 if half > 1 and bool(_counting(name, own, style) == half * own[0, ..., 0].numel()) else half
        leaf[row : row + 1] = _mask(name, leaf, own.shape, torch.tensor([counts], device=leaf.device), style)
        return leaf
    if _is_lengths(name, leaf):
        leaf[row] = 2 if longest > 1 and int(leaf[row]) == 1 else 1
        return leaf
    if leaf.is_floating_point():
        leaf[row] = 1.0 - 3.0 * leaf[row]
    else:
        leaf[row] = (leaf[row] == 0).to(leaf.dtype)
        _two_kinds(leaf[row : row + 1])
    if leaf.dim() > 1:
        blank = _IGNORED if style.ignored_labels and _is_labels(name, leaf) else 0
        leaf[row, leaf.shape[1] // 2 + 1 :] = blank
    return leaf


def _mask(name: str, leaf: Tensor, shape: tuple[int, ...] | torch.Size, counts: Tensor, style: Style) -> Tensor:
    """A mask whose first ``counts[b]`` positions of example b count."""
    positions = torch.arange(shape[-1], device=leaf.device)
    counting = (positions < counts[:, None]).view(shape[0], *(1,) * (len(shape) - 2), shape[-1]).expand(shape)
    return (counting if _true_counts(name, leaf, style) else ~counting).to(leaf.dtype)


def _counting(name: str, mask: Tensor, style: Style) -> Tensor:
    return ((mask != 0) == _true_counts(name, mask, style)).sum()


def _true_counts(name: str, mask: Tensor, style: Style) -> bool:
    """Whether True, or 1, says that a position counts; in masks of padding it says the opposite."""
    return style.true_counts != (mask.dtype == torch.bool and "pad" in name.lower())


def _two_kinds(whole: Tensor) -> Tensor:
    """No row of 0 and 1 is of one kind only, in place: as a mask it would leave nothing, or nothing out."""
    if whole.dim() > 1 and whole.shape[1] > 1:
        whole[:, 1] = (whole[:, 0] == 0).to(whole.dtype)
    return whole
