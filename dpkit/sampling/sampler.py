"""What a sampler is: who takes part in a step, and which event that makes of the mechanism's.

Guarantee: a sampler draws from the generator it is given, the number of the step and the size of the population alone,
includes each unit at most once in a step, and states the event of exactly that draw, with the participations that it
allows.  Tested for every member.
Requires: a generator whose state nobody knows and nothing else draws from (``RunKey.sampling``), and secrecy about who
was drawn.  The realised size is private where units are drawn at random; only ``sample_rate`` and ``expected_batch``
may divide anything.
Why: draw and event are made of the same fields of one object.  Each member's module says which theorem the event has.

The number of a step is the number of charges before it, as the ledger counts them: a step that is taken again after a
crash is the next step of the order, so that no unit takes part more often than the event says.
"""

from __future__ import annotations

from typing import Protocol

import torch
from torch import Tensor

import accounting
from dpkit.errors import InvalidArgument
from dpkit.types import Participation


class Sampler(Protocol):
    """Draws the units of one logical batch. For guarantee, requirements and proof see the module."""

    @property
    def sample_rate(self) -> float:
        """q: expected batch size / number of units."""
        ...

    @property
    def cap(self) -> int | None:
        """A public size that no draw ever exceeds; None where there is none."""
        ...

    @property
    def resumable(self) -> bool:
        """Whether a run may go on with fresh keys: not where something was drawn for the whole run."""
        ...

    def arrange(self, population: int, generator: torch.Generator) -> Tensor | None:
        """What is fixed once for the whole run: (population,) the place or the group of each unit. None: nothing."""
        ...

    def draw(
        self, population: int, generator: torch.Generator, *, step: int = 0, arranged: Tensor | None = None
    ) -> Tensor:
        """Indices of the units that take part in step ``step`` (from 0), each at most once."""
        ...

    def event(self, mechanism: accounting.Event, num_examples: int) -> accounting.Event:
        """The event of :meth:`steps_per_event` consecutive steps of ``mechanism`` on such draws."""
        ...

    def steps_per_event(self, num_examples: int) -> int:
        """How many consecutive steps, from the first on, the event covers."""
        ...

    def participation(self, steps: int, num_examples: int) -> Participation:
        """In which of ``steps`` steps one unit may take part."""
        ...

    def check(self, population: int, num_examples: int) -> None:
        """Refuse a data set on which the event would not be that of the draws; called before anything is charged.

        Raises:
          InvalidArgument: saying what does not fit.
        """
        ...

    def largest_batch(self, num_examples: int) -> int:
        """A public size that a draw exceeds with probability below 1e-20 (never, where there is a cap)."""
        ...


def check_rate(sample_rate: float) -> None:
    """Refuse what is no sample rate.

    Raises:
      InvalidArgument: naming it.
    """
    if isinstance(sample_rate, bool) or not isinstance(sample_rate, (int, float)) or not 0 < sample_rate <= 1:
        raise InvalidArgument(
            f"sample_rate is {sample_rate!r}; it is a probability in (0, 1], usually expected batch size / "
            f"num_examples."
        )


def check_whole(name: str, value: object, least: int = 1) -> None:
    """Refuse what is no whole number of at least ``least``.

    Raises:
      InvalidArgument: naming it.
    """
    if isinstance(value, bool) or not isinstance(value, int):
        raise InvalidArgument(f"{name} is {value!r}; it must be a whole number.")
    if value < least:
        raise InvalidArgument(f"{name} is {value}; it must be at least {least}.")


def check_size(sampler: object, declared: int, population: int, num_examples: int) -> None:
    """Refuse a data set, or a plan, of another size than the sampler was made for.

    Raises:
      InvalidArgument: naming the sizes.
    """
    if not declared == population == num_examples:
        raise InvalidArgument(
            f"{sampler} is made for {declared} units, the plan says num_examples = {num_examples}, and the data set "
            f"holds {population}; batches of a fixed size or order need the exact, public size of the data set in all "
            "three places. Where the size is private, draw Poisson batches."
        )
