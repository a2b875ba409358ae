"""Which tensors among the arguments of a forward call are of the batch, and along which axis.

A tensor of the batch has an axis as long as the batch: mostly the first, the second where a model wants sequences
first.  A table or a mask that has nothing to do with the batch may be as long by chance.  Then the model decides: a
reading of the arguments under which it runs on four rows and on five is the right one, because whatever is of the batch
must follow its number of rows.  Readings with more tensors of the batch, along earlier axes, come first, and none is
chosen by what the probe says about it: a tensor whose examples are mixed must not be read as a constant.

Constants get made-up values, too: nobody can tell whether a tensor that has no axis of the batch holds private data.
Parameters and buffers of the model stay as they are.
"""

from __future__ import annotations

import inspect
import itertools
from collections.abc import Callable, Collection, Iterator
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from .batch import map_tensors, tensors
from .synthetic import STYLES, Examples, Style, map_named

_MOST_READINGS = 64
_ROWS = (4, 5)


class Place(NamedTuple):
    """An argument of the batch.

    Attributes:
      number: of the tensor among all tensors of the call.
      axis: that holds the examples.
    """

    number: int
    axis: int


Arguments = tuple[tuple[Any, ...], dict[str, Any]]
"""(args, kwargs) of a forward call."""


class Reading:
    """A call of a model, and which of its tensors are of the batch.

    Args:
      call: gives structure, types and shapes; of its tensors, only the values of the model's own are read.
      places: of the batch.
    """

    def __init__(self, model: nn.Module, call: Arguments, places: Collection[Place]) -> None:
        self.places = tuple(places)
        own = {id(tensor) for tensor in (*model.parameters(), *model.buffers())}
        names: list[str] = []
        _map_arguments(model, lambda name, leaf: names.append(name) or leaf, call)
        found = listed(call)
        self._constants = [leaf if id(leaf) in own else None for leaf in found]
        # Views of the batch that the examples are made up from: shapes and types, in the order of the call.
        self.template = [{names[place.number]: found[place.number].movedim(place.axis, 0)} for place in self.places]
        self._call = call

    def arguments(self, examples: list[dict[str, Tensor]], style: Style) -> Arguments:
        """The call with these examples; see :attr:`template`."""
        given = {place.number: tensor for place, tensor in zip(self.places, tensors(examples), strict=True)}
        axes = dict(self.places)
        numbers = itertools.count()

        def fill(leaf: Tensor) -> Tensor:
            number = next(numbers)
            if number in given:
                return given[number].movedim(0, axes[number])
            own = self._constants[number]
            if own is not None:
                return own
            return torch.full(leaf.shape, int(style.true_counts), dtype=leaf.dtype, device=leaf.device)

        return map_tensors(fill, self._call)


def listed(call: Arguments) -> list[Tensor]:
    """The tensors of a call, in the order of their numbers."""
    found: list[Tensor] = []
    map_tensors(lambda leaf: found.append(leaf) or leaf, call)
    return found


def places_of_batch(call: Arguments, rows: int, runs: Callable[[tuple[Place, ...]], bool]) -> tuple[Place, ...] | None:
    """Where the batch is among the arguments of a call; empty if nowhere.

    Args:
      rows: of the batch.
      runs: whether the model can run when these places, and no others, hold the examples.
    Returns: None where several tensors are as long as the batch and no reading of them can be run.
    """
    found = listed(call)
    axes = {
        number: [axis for axis, length in enumerate(leaf.shape) if length == rows] for number, leaf in enumerate(found)
    }
    if rows == 1:  # axes of length 1 say nothing
        return tuple(Place(number, 0) for number, leaf in enumerate(found) if leaf.dim() and len(leaf) == 1)
    certain = tuple(Place(number, 0) for number, ways in axes.items() if ways == [0])
    possible = sum(bool(ways) for ways in axes.values())
    if possible == 0 or (possible == 1 and certain):
        return certain
    for places in itertools.islice(_readings(axes), _MOST_READINGS):
        if runs(places):
            return places
    # Only along later axes, and it does not run: that was no batch.
    return None if any(ways[:1] == [0] for ways in axes.values()) else ()


def runs_with_rows(model: nn.Module, call: Arguments, places: tuple[Place, ...], restore: Callable[[], None]) -> bool:
    """Whether the model runs on made-up examples at these places, for more than one number of rows."""
    reading = Reading(model, call, places)
    for style in STYLES[:2]:
        try:
            for rows in _ROWS:
                args, kwargs = reading.arguments(Examples.like(reading.template, style, rows).batch, style)
                model(*args, **kwargs)
        except Exception:  # the model may raise anything: then it does not run
            continue
        finally:
            restore()
        return True
    return False


def _readings(axes: dict[int, list[int]]) -> Iterator[tuple[Place, ...]]:
    numbers = [number for number, ways in axes.items() if ways]
    ways = [[*axes[number], None] for number in numbers]
    chosen = sorted(
        itertools.islice(itertools.product(*ways), 4096),
        key=lambda choice: (choice.count(None), sum(axis or 0 for axis in choice)),
    )
    for choice in chosen:
        places = tuple(Place(number, axis) for number, axis in zip(numbers, choice, strict=True) if axis is not None)
        if places:
            yield places


def _map_arguments(model: nn.Module, function: Callable[[str, Tensor], Any], call: Arguments) -> Arguments:
    """``map_named`` over the arguments of ``model.forward``, which give the positional ones their names."""
    args, kwargs = call
    try:
        names = [name for name, p in inspect.signature(model.forward).parameters.items() if p.kind is not p.VAR_KEYWORD]
    except (TypeError, ValueError):
        names = []
    names += [""] * len(args)
    return (
        tuple(map_named(function, value, name) for value, name in zip(args, names, strict=False)),
        map_named(function, kwargs),
    )
