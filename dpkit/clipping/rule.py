"""What a clipping rule is: norms in, factors out, and nothing else known.

A rule never sees a gradient, a backend, noise or a rank.

Guarantee: scaled by the factors, the part of a unit's gradient that lies in group k has L2 norm at most
``bounds(state)[k]`` (or, of a rule with one bound, the whole gradient has at most that norm), whatever the norms are;
and what a unit adds, its factor and its answers, depends on that unit alone.  Tested for every member.
Requires: norms that are never below the true ones, and a state that was made of released answers alone.
Why: neighbours' sums then differ in the terms of one unit, and the largest size of these is a public number that was
known before the batch was drawn.  Each member's module has the proof of its bound.

A rule may learn: it asks bounded questions about each batch, and moves its state by the RELEASED answers.  They are
released in the same event as the gradient, so what is learnt in one step serves from the next step on.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any, NamedTuple, Protocol, runtime_checkable

from torch import Tensor

from dpkit.types import Question

State = Any
"""What a rule remembers between steps: a value, never changed in place."""


class Setting(NamedTuple):
    """Public facts of the run.

    Attributes:
      sizes: d_k, number of coordinates of each of the K groups.
      expected_batch: B = q·N, the only number that may divide a sum.
    """

    sizes: tuple[int, ...]
    expected_batch: float


class ClipRule(Protocol):
    """Turns per-unit gradient norms into per-unit factors. For guarantee, requirements and proof see the module.

    Shapes: K groups, B units; B is the batch in hand and is private.
    """

    needs_labels: bool = False
    """Whether factors or answers depend on labels of the units."""

    def groups(self, names: Iterable[str]) -> list[int]:
        """The group, 0 to K - 1, of each parameter name."""
        ...

    def init(self, setting: Setting) -> State:
        """The state before the first step."""
        ...

    def bounds(self, state: State) -> list[float]:
        """Clipping norm of each group (length K), or of all groups together (length 1), in gradient units: public,
        known before the batch is drawn."""
        ...

    def spread(self, state: State) -> list[float]:
        """γ_k > 0, how the noise is spread: the standard deviation in group k relative to the others; length as
        ``bounds``. Equal to the bounds, each group has an equal part of the precision."""
        return self.bounds(state)

    def factors(self, norms: Tensor, labels: Tensor | None, state: State) -> Tensor:
        """Scale of each unit in each group.

        Args:
          norms: (K, B) L2 norms before clipping, upper bounds in float64, finite or not.
          labels: (B,) labels of the units, 0, 1, .., if the rule needs them.
          state: what ``init`` or ``update`` returned.
        Returns: (K, B) factors, at least 0; 0 where the norm is not finite. Column b is a function of column b.
        """
        ...

    def questions(self, setting: Setting) -> tuple[Question, ...]:
        """What the rule asks of every batch; the same in every step."""
        return ()

    def answers(self, norms: Tensor, labels: Tensor | None, state: State) -> Sequence[Tensor]:
        """Each unit's contribution to each question: (B, size) of norm at most ``bound``. Row b is a function of column
        b, and is left out of the sum where the unit is padding or its gradient is not finite."""
        return ()

    def update(self, state: State, released: Sequence[Tensor]) -> State:
        """The next state, from the RELEASED sums of the answers, (size,) each."""
        return state


@runtime_checkable
class SeparableRule(ClipRule, Protocol):
    """A rule whose factor for a group is a function of that group's norm alone.

    For guarantee, requirements and proof see the module.

    The backward pass can then clip a group as soon as its gradients are complete, and keep none of them.
    """

    def group_factor(self, group: int, norms: Tensor, state: State) -> Tensor:
        """(B,) factors of one group, from its (B,) norms: row ``group`` of :meth:`factors`."""
        ...
