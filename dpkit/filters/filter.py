"""What a filter is: a pair of pure functions on what was released.

A filter is post-processing: it sees :class:`~dpkit.types.Released` values only, so it costs no privacy (Dwork and Roth
2014, Proposition 2.1).  It runs once per logical step, after the noise and the division by the expected batch size.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple, Protocol

from dpkit.types import Named, Released

State = Any
"""What a filter remembers between steps: a value, never changed in place."""


class Filter(Protocol):
    """Turns one release after the other into what the optimizer sees."""

    def init(self, parameters: Named) -> State:
        """The state before the first release. ``parameters`` gives names, shapes and types; its values are the model's
        at the start and must not be kept."""
        ...

    def update(self, released: Released, state: State) -> tuple[Released, State]:
        """``released`` with another ``value``, and the next state."""
        ...


class FilterOf(NamedTuple):
    """A filter of two functions: ``FilterOf(init, update)``."""

    init: Callable[[Named], State]
    update: Callable[[Released, State], tuple[Released, State]]
