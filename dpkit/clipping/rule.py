"""What a clipping rule is: norms in, factors out, and nothing else known.

A rule never sees a gradient, a backend, noise or a rank.  Its promise, tested for every member: scaled by the factors,
the part of a unit's gradient that lies in group k has L2 norm at most ``bounds(state)[k]``, whatever the norms are; and
the factor of a unit depends on that unit alone.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any, Protocol, runtime_checkable

from torch import Tensor

from dpkit.types import Named, Query

State = Any
"""What a rule remembers between steps: a value, never changed in place."""


class ClipRule(Protocol):
    """Turns per-unit gradient norms into per-unit factors.

    Shapes: K groups, B units; B is the batch in hand and is private.
    """

    def groups(self, names: Iterable[str]) -> list[int]:
        """The group, 0 to K - 1, of each parameter name."""
        ...

    def init(self, groups: Sequence[int]) -> State:
        """The state before the first step."""
        ...

    def bounds(self, state: State) -> list[float]:
        """Clipping norm of each group (length K), in gradient units: public, known before the batch is drawn."""
        ...

    def factors(self, norms: Tensor, units: Tensor | None, state: State) -> Tensor:
        """Scale of each unit in each group.

        Args:
          norms: (K, B) L2 norms before clipping, upper bounds, finite or not.
          units: (B,) public labels of the units, or None.
          state: what ``init`` or ``update`` returned.
        Returns: (K, B) factors in [0, 1]; 0 where the norm is not finite. Column b is a function of column b.
        """
        ...

    def queries(self, norms: Tensor, units: Tensor | None, state: State) -> list[Query]:
        """What the rule must learn privately from this batch, each query bounded per unit."""
        ...

    def update(self, state: State, released: Sequence[Named]) -> State:
        """The next state, from the RELEASED answers to ``queries`` in their order."""
        ...


@runtime_checkable
class SeparableRule(ClipRule, Protocol):
    """A rule whose factor for a group is a function of that group's norm alone.

    The backward pass can then clip a group as soon as its gradients are complete, and keep none of them.
    """

    def group_factor(self, group: int, norms: Tensor, state: State) -> Tensor:
        """(B,) factors of one group, from its (B,) norms: row ``group`` of :meth:`factors`."""
        ...
