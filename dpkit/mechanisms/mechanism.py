"""What a mechanism is: the only door between sensitive sums and the world.

A mechanism turns a :class:`~dpkit.types.ClippedSum` into a :class:`~dpkit.types.Released` and says which event that
was.

Guarantee: the event covers what :meth:`Mechanism.release` lets out, and nothing else makes a ``Released``.
Requires: sensitivities that hold for all neighbours, and a key that was made for this release alone.
Why: noise and event come from the same fields of the same object, so that the ledger cannot tell another story than the
noise. Each member's module has its proof.
"""

from __future__ import annotations

from typing import Any, Literal, Protocol

from accounting import Event
from dpkit.types import ClippedSum, Named, Participation, Released

from .keys import NoiseKey

Tier = Literal["default", "hardened", "exact"]
"""How the noise is made: from torch's generators, in floating point; from a cryptographic generator, on a grid; or in
integer arithmetic throughout."""

State = Any
"""What a mechanism remembers between releases (correlated noise does; independent noise does not)."""


class Mechanism(Protocol):
    """Adds noise to the queries on one batch, as one joint event. For guarantee, requirements and proof see the module.

    Attributes:
      noise_multiplier: z = standard deviation / L2 sensitivity of the one Gaussian release that a step (or, with
        correlated noise, the run) amounts to.
      tier: how its noise is made, which the statement names.
    """

    @property
    def noise_multiplier(self) -> float: ...

    @property
    def tier(self) -> Tier: ...

    def init(self, parameters: Named, participation: Participation) -> State:
        """The state before the first release; ``parameters`` gives names and shapes. () says that there is none."""
        ...

    def scale(self, participation: Participation) -> float:
        """Standard deviation of the noise that is drawn in a step, per unit of L2 sensitivity of the step's sum."""
        ...

    def release(self, clipped: ClippedSum, state: State, key: NoiseKey) -> tuple[Released, State]:
        """Noisy sums, in the units of the sums: nothing is divided here."""
        ...

    def event(self, participation: Participation) -> Event:
        """What one release costs when the whole data set takes part, which samplers wrap; or, as
        ``accounting.MatrixMechanism``, what the whole run costs."""
        ...
