"""Samplers: which units take part in a step, and which event that makes of the mechanism's.

Guarantee: a sampler draws from the generator it is given and from the size of the population alone, includes each unit
at most once, and states the event of exactly that draw. The realised size is private; only ``sample_rate`` and
``expected_batch`` may divide anything.

Sources: Poisson sampling: Mironov, Talwar and Zhang 2019, https://arxiv.org/abs/1908.10530. Truncation: the proof
stands in ``accounting.truncated``.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

import accounting
from dpkit.errors import InvalidArgument


class Sampler(Protocol):
    """Draws the units of one logical batch."""

    @property
    def sample_rate(self) -> float:
        """Probability q that a given unit takes part in a step."""
        ...

    def draw(self, population: int, generator: torch.Generator) -> Tensor:
        """Indices of the units that take part, each at most once."""
        ...

    def event(self, mechanism: accounting.Event, num_examples: int) -> accounting.Event:
        """The event of one step: ``mechanism`` on such a draw."""
        ...

    def largest_batch(self, num_examples: int) -> int:
        """A public size that a draw exceeds with probability below 1e-20 (never, where there is a cap)."""
        ...


@dataclass(frozen=True)
class Poisson:
    """Each unit takes part with probability ``sample_rate``, independently of all others and of all other steps.

    Args:
      sample_rate: q in (0, 1].
    Raises:
      InvalidArgument: for a rate outside (0, 1].
    """

    sample_rate: float

    def __post_init__(self) -> None:
        _check_rate(self.sample_rate)

    def draw(self, population: int, generator: torch.Generator) -> Tensor:
        # 53-bit uniforms: the inclusion probability is q to within 1.2e-16.
        uniforms = torch.rand(population, generator=generator, dtype=torch.float64)
        return (uniforms < self.sample_rate).nonzero().flatten()

    def event(self, mechanism: accounting.Event, num_examples: int) -> accounting.Event:
        return accounting.Poisson(sample_rate=self.sample_rate, event=mechanism)

    def largest_batch(self, num_examples: int) -> int:
        # Bernstein: P(X > B + t) <= exp(-t²/(2(B + t/3))); t = 10√B + 50 makes the exponent at least 48 for every B.
        expected = self.sample_rate * num_examples
        return math.ceil(expected + 10 * math.sqrt(expected) + 50)


@dataclass(frozen=True)
class TruncatedPoisson:
    """A Poisson draw; when it has more than ``cap`` units, ``cap`` of them chosen uniformly.

    Gives a batch a public largest size, which makes the number of microbatches public. It is accounted as what it is:
    see ``accounting.TruncatedPoisson``.

    Args:
      sample_rate: q in (0, 1].
      cap: largest batch, at least 1. :meth:`cap_for` gives one that costs next to nothing.
    Raises:
      InvalidArgument: for values outside these ranges.
    """

    sample_rate: float
    cap: int

    def __post_init__(self) -> None:
        _check_rate(self.sample_rate)
        if isinstance(self.cap, bool) or not isinstance(self.cap, int):
            raise InvalidArgument(f"cap is {self.cap!r}; it must be a whole number.")
        if self.cap < 1:
            raise InvalidArgument(f"cap is {self.cap}; a batch must have room for at least one unit.")

    @staticmethod
    def cap_for(expected_batch: float) -> int:
        """B + 6√B, rounded up: truncation at six standard deviations costs nothing that can be seen in ε."""
        return math.ceil(expected_batch + 6 * math.sqrt(expected_batch))

    def draw(self, population: int, generator: torch.Generator) -> Tensor:
        units = Poisson(self.sample_rate).draw(population, generator)
        if len(units) <= self.cap:
            return units
        return units[torch.randperm(len(units), generator=generator)[: self.cap]]

    def event(self, mechanism: accounting.Event, num_examples: int) -> accounting.Event:
        return accounting.TruncatedPoisson(
            sample_rate=self.sample_rate, cap=self.cap, max_examples=num_examples, event=mechanism
        )

    def largest_batch(self, num_examples: int) -> int:
        return self.cap


def _check_rate(sample_rate: float) -> None:
    if isinstance(sample_rate, bool) or not isinstance(sample_rate, (int, float)) or not 0 < sample_rate <= 1:
        raise InvalidArgument(
            f"sample_rate is {sample_rate!r}; it is a probability in (0, 1], usually expected batch size / "
            f"num_examples."
        )
