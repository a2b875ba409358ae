"""Cyclic Poisson sampling: every unit belongs to one of b groups, and step t draws from group t mod b alone.

Guarantee: each unit draws its group by itself, once for the run, and is then drawn with probability b·q whenever its
group has its turn, independently of all else.
Requires: what ``sampler.py`` requires; one process that makes the whole run, since no checkpoint holds the groups.
Why: couple the draws of all units but one; whatever that one draws, neighbours differ in its group alone, and the
mixture over its group has the same weights on both sides (hockey-stick divergences are jointly convex).  Were the group
given by the index, a removal would move all later units.

A unit takes part only in steps t, t + b, t + 2b, .., so b consecutive steps hold one Poisson-subsampled release of it,
at rate b·q.  On its own this costs more than Poisson sampling at q; it is what correlated noise of at most b bands
(BandMF) needs for amplification.
Source: Choquette-Choo et al. 2023, https://arxiv.org/abs/2306.08153; ``accounting.matrix.cyclic_poisson_event``.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

import accounting
from dpkit.errors import InvalidArgument
from dpkit.types import Participation

from .poisson import Poisson
from .sampler import check_rate, check_whole


@dataclass(frozen=True)
class CyclicPoisson:
    """Poisson draws from one group after the other. For guarantee, requirements and proof see the module.

    Args:
      sample_rate: q = expected batch size / number of units, over all groups.
      groups: b, at least 1; b·q, the rate within a group, is at most 1.
    Raises:
      InvalidArgument: for values outside these ranges.
    """

    sample_rate: float
    groups: int

    def __post_init__(self) -> None:
        check_rate(self.sample_rate)
        check_whole("groups", self.groups)
        if self.groups * self.sample_rate > 1:
            raise InvalidArgument(
                f"sample_rate {self.sample_rate} times {self.groups} groups is above 1; a batch cannot be larger than "
                "the group that it is drawn from. Take fewer groups or smaller batches."
            )

    @property
    def cap(self) -> None:
        return None

    @property
    def resumable(self) -> bool:
        return False  # the groups are drawn for the run, and no checkpoint holds them

    def arrange(self, population: int, generator: torch.Generator) -> Tensor:
        return torch.randint(self.groups, (population,), generator=generator)

    def draw(
        self, population: int, generator: torch.Generator, *, step: int = 0, arranged: Tensor | None = None
    ) -> Tensor:
        if arranged is None or len(arranged) != population:
            # Without the number of units, which the add/remove relation hides.
            raise InvalidArgument(
                "arranged does not hold one group for each unit; give what arrange(population, generator) drew for the "
                "run."
            )
        drawn = Poisson(self._rate_within_group).draw(population, generator)
        return drawn[arranged[drawn] == step % self.groups]

    def event(self, mechanism: accounting.Event, num_examples: int) -> accounting.Event:
        return accounting.Poisson(sample_rate=self._rate_within_group, event=mechanism)

    def steps_per_event(self, num_examples: int) -> int:
        return self.groups

    def participation(self, steps: int, num_examples: int) -> Participation:
        times = -(-steps // self.groups)
        return Participation(steps, min_separation=self.groups, max_participations=times, sampled=True)

    def check(self, population: int, num_examples: int) -> None:
        """Any data set will do."""

    def largest_batch(self, num_examples: int) -> int:
        # Unconditionally, each unit takes part with probability q, independently of the others: as in Poisson.
        return Poisson(self.sample_rate).largest_batch(num_examples)

    @property
    def _rate_within_group(self) -> float:
        return min(1.0, self.groups * self.sample_rate)
