"""Poisson sampling: each unit takes part in a step by an independent draw of its own.

Guarantee: every unit of every step is drawn with probability q (to within 1.2e-16, as 53-bit uniforms have it),
independently of all else; the event is that of this draw.  ``TruncatedPoisson`` gives the units of such a draw, and of
a larger one ``cap`` of them, chosen uniformly.
Requires: what ``sampler.py`` requires.  Truncated: a data set of at most N units, which is checked.
Why: one unit more or less changes nothing about how the others are drawn, so the release on a sample is a mixture of
one with the unit and one without it.

Sources: Mironov, Talwar and Zhang 2019, https://arxiv.org/abs/1908.10530. Truncation: the proof stands in
``accounting.truncated``.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

import accounting
from dpkit.errors import InvalidArgument
from dpkit.types import Participation

from .sampler import check_rate, check_whole


@dataclass(frozen=True)
class Poisson:
    """Each unit takes part with probability ``sample_rate``, independently of all others and of all other steps.

    For guarantee, requirements and proof see the module.

    Args:
      sample_rate: q in (0, 1].
    Raises:
      InvalidArgument: for a rate outside (0, 1].
    """

    sample_rate: float

    def __post_init__(self) -> None:
        check_rate(self.sample_rate)

    @property
    def cap(self) -> None:
        return None

    @property
    def resumable(self) -> bool:
        return True

    def arrange(self, population: int, generator: torch.Generator) -> None:
        return None

    def draw(
        self, population: int, generator: torch.Generator, *, step: int = 0, arranged: Tensor | None = None
    ) -> Tensor:
        # 53-bit uniforms: the inclusion probability is q to within 1.2e-16.
        uniforms = torch.rand(population, generator=generator, dtype=torch.float64)
        return (uniforms < self.sample_rate).nonzero().flatten()

    def event(self, mechanism: accounting.Event, num_examples: int) -> accounting.Event:
        return accounting.Poisson(sample_rate=self.sample_rate, event=mechanism)

    def steps_per_event(self, num_examples: int) -> int:
        return 1

    def participation(self, steps: int, num_examples: int) -> Participation:
        return Participation(steps, min_separation=1, max_participations=steps, sampled=True)

    def check(self, population: int, num_examples: int) -> None:
        """Any data set will do."""

    def largest_batch(self, num_examples: int) -> int:
        # Bernstein: P(X > B + t) <= exp(-t²/(2(B + t/3))); t = 10√B + 50 makes the exponent at least 48 for every B.
        expected = self.sample_rate * num_examples
        return math.ceil(expected + 10 * math.sqrt(expected) + 50)


@dataclass(frozen=True)
class TruncatedPoisson:
    """A Poisson draw; when it has more than ``cap`` units, ``cap`` of them chosen uniformly.

    For guarantee, requirements and proof see the module.

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
        check_rate(self.sample_rate)
        check_whole("cap", self.cap)

    @staticmethod
    def cap_for(expected_batch: float) -> int:
        """B + 6√B, rounded up: truncation at six standard deviations costs nothing that can be seen in ε."""
        return math.ceil(expected_batch + 6 * math.sqrt(expected_batch))

    @property
    def resumable(self) -> bool:
        return True

    def arrange(self, population: int, generator: torch.Generator) -> None:
        return None

    def draw(
        self, population: int, generator: torch.Generator, *, step: int = 0, arranged: Tensor | None = None
    ) -> Tensor:
        units = Poisson(self.sample_rate).draw(population, generator)
        if len(units) <= self.cap:
            return units
        return units[torch.randperm(len(units), generator=generator)[: self.cap]]

    def event(self, mechanism: accounting.Event, num_examples: int) -> accounting.Event:
        return accounting.TruncatedPoisson(
            sample_rate=self.sample_rate, cap=self.cap, max_examples=num_examples, event=mechanism
        )

    def steps_per_event(self, num_examples: int) -> int:
        return 1

    def participation(self, steps: int, num_examples: int) -> Participation:
        return Participation(steps, min_separation=1, max_participations=steps, sampled=True)

    def check(self, population: int, num_examples: int) -> None:
        # The cost of truncation is proved for data sets of at most N examples (accounting.truncated).
        if population > num_examples:
            raise InvalidArgument(
                f"num_examples is {num_examples}, but the data set is larger; with truncated Poisson sampling "
                "(max_physical_batch_size) it must be an upper bound of the size."
            )

    def largest_batch(self, num_examples: int) -> int:
        return self.cap
