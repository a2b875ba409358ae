"""Where the examples of a batch are in a tensor, found by replacing one example and looking at what moved.

Shapes cannot tell: a sequence may be as long as the batch is large.  :func:`observe` compares the tensors that one
operation received in two runs which differ in one example: the axis along which only that example's place moved holds
the examples.  Models put them first, second (``batch_first=False``), or fold another axis into theirs, example by
example ((B, T, d) as B*T rows) or step by step ((T, B, d) as T*B rows).
"""

from __future__ import annotations

import math
from collections.abc import Hashable, Iterable, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from dpkit import errors


@dataclass(frozen=True, slots=True)
class Layout:
    """Examples along ``axis``: one row each, or ``folded`` with M rows each.

    Attributes:
      axis: the axis that holds the examples.
      size: B, the number of examples, if it is known; needed where rows are folded.
      folded: None for one row each; "major" where the rows of one example follow one another, "minor" where the
        examples alternate.
    """

    axis: int = 0
    size: int | None = None
    folded: str | None = None

    def split(self, tensor: Tensor) -> Tensor:
        """(B, M, the other axes in their order): a view where the memory allows it."""
        rows = tensor if self.axis == 0 else tensor.movedim(self.axis, 0)
        if self.folded is None:
            return rows.unsqueeze(1)
        count = self.examples(tensor)
        if not count:
            return rows.unsqueeze(1)
        if self.folded == "major":
            return rows.unflatten(0, (count, -1))
        return rows.unflatten(0, (-1, count)).transpose(0, 1)

    def examples(self, tensor: Tensor) -> int:
        """B, from the number of rows and what is known of it."""
        rows = tensor.shape[self.axis]
        if self.folded is None:
            return rows
        if self.size is None or (rows % self.size if self.size else rows):
            raise errors.UnsupportedOperation(
                f"{rows} rows do not divide among the examples of a batch of {self.size}; keep a public number of rows "
                "for each example, padded and masked"
            )
        return self.size


class Site(NamedTuple):
    """One call of a function that received tracked and batched tensors, as it was seen in one run."""

    key: Hashable
    tensors: tuple[Tensor | None, ...]


MIXED = "mixed"
"""In place of a layout: more than one example's place moved."""

Found = tuple[Layout | str | None, ...]


class Layouts:
    """What was observed of a model: for each site, the layout of each of its tensors.

    A site is a function, the parameters that it received, and how often both had met before in one forward pass.  Where
    a model is called in several ways, a site may have several layouts; one must fit.
    """

    def __init__(self) -> None:
        self._found: dict[Hashable, dict[Hashable, list[Found]]] = {}

    def learn(self, runs: Sequence[Sequence[Site]], replaced: Sequence[int], size: int) -> None:
        """Compare ``runs[0]`` with ``runs[1:]``, in which the examples ``replaced`` are others; B is ``size``."""
        first, *others = runs
        if any([site.key for site in run] != [site.key for site in first] for run in others):
            return  # another path for other values: nothing was learnt, and the probe says what it thinks of that
        for number, site in enumerate(first):
            if any(len(run[number].tensors) != len(site.tensors) for run in others):
                continue
            found = tuple(
                layout_of([run[number].tensors[place] for run in (first, *others)], replaced, size)
                for place in range(len(site.tensors))
            )
            group, ordinal = site.key  # pyright: ignore[reportGeneralTypeIssues]
            alternatives = self._found.setdefault(group, {}).setdefault(ordinal, [])
            if found not in alternatives:
                alternatives.append(found)

    def copy(self) -> Layouts:
        """The same, of which later lessons do not become part."""
        twin = Layouts()
        twin.become(self)
        return twin

    def become(self, other: Layouts) -> None:
        """Forget what was learnt, and know what ``other`` knows."""
        self._found = {
            group: {ordinal: list(found) for ordinal, found in sites.items()} for group, sites in other._found.items()
        }

    def of(self, group: Hashable, ordinal: int, place: int, dimensions: int | None) -> Layout | str | None:
        """The layout of the tensor at ``place`` of a site; None if nothing was observed."""
        sites = self._found.get(group)
        if sites is None:
            return None
        # A use that was not observed, such as one step more of a loop, is like the others if those agree.
        everywhere = [found for alternatives in sites.values() for found in alternatives]
        fitting = _fitting(sites.get(ordinal, []), place, dimensions) or _fitting(everywhere, place, dimensions)
        return fitting.pop() if len(fitting) == 1 else (MIXED if fitting else None)


def _fitting(known: Iterable[Found], place: int, dimensions: int | None) -> set[Layout | str]:
    return {
        layout
        for found in known
        if place < len(found) and (layout := found[place]) is not None
        if isinstance(layout, str) or dimensions is None or layout.axis < dimensions
    }


def layout_of(versions: Iterable[Tensor | None], replaced: Sequence[int], size: int) -> Layout | str | None:
    """Where the examples are in a tensor; None if nothing tells, and :data:`MIXED` if more than their place moved.

    Args:
      versions: the tensor, and once more for each number in ``replaced``: with that example replaced.
    """
    first, *others = versions
    if first is None or not first.dim():
        return None
    moved: list[tuple[int, Tensor]] = []
    for row, other in zip(replaced, others, strict=True):
        if other is None or other.shape != first.shape:
            return None
        differs = (first != other) & ~(first.isnan() & other.isnan())
        if bool(differs.any()):
            moved.append((row, differs))
    if not moved:
        return None
    for axis in range(first.dim()):
        length = first.shape[axis]
        if length < size or length % size:
            continue
        for folded in (None,) if length == size else ("major", "minor"):
            if all(_only(differs, axis, row, size, folded) for row, differs in moved):
                return Layout(axis, None, folded)
    return MIXED


def _only(differs: Tensor, axis: int, row: int, size: int, folded: str | None) -> bool:
    """Whether nothing moved along ``axis`` but in the places of example ``row``."""
    places = differs.movedim(axis, 0).reshape(differs.shape[axis], -1).any(1).nonzero().flatten()
    repeat = math.ceil(differs.shape[axis] / size)
    owners = places % size if folded == "minor" else torch.div(places, repeat, rounding_mode="floor")
    return bool((owners == row).all())
