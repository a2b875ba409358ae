"""Batches of a fixed size, each a fresh uniform subset of the data set.

Guarantee: every batch is a uniform subset of exactly ``batch_size`` units, independent of the other batches.
Requires: what ``sampler.py`` requires; exactly N units, which is checked; the replace-one relation (the accountant
refuses others): a batch of fixed size tells of a missing unit by the one that takes its place.
Why: they are the first places of a uniform permutation. Amplification: Balle, Barthe and Gaboardi 2018,
https://arxiv.org/abs/1807.01647, theorem 2 (``accounting.WithoutReplacement``).
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

import accounting
from dpkit.errors import InvalidArgument
from dpkit.types import Participation

from .sampler import check_size, check_whole


@dataclass(frozen=True)
class WithoutReplacement:
    """Exactly ``batch_size`` of ``num_examples`` units, drawn afresh in every step.

    For guarantee, requirements and proof see the module.

    Args:
      batch_size: units of a batch, at least 1.
      num_examples: N, the exact size of the data set, which is public.
    Raises:
      InvalidArgument: for counts below 1, or a batch larger than the data set.
    """

    batch_size: int
    num_examples: int

    def __post_init__(self) -> None:
        check_whole("batch_size", self.batch_size)
        check_whole("num_examples", self.num_examples)
        if self.batch_size > self.num_examples:
            raise InvalidArgument(
                f"batch_size is {self.batch_size}, and there are {self.num_examples} units; draw at most all of them."
            )

    @property
    def sample_rate(self) -> float:
        return self.batch_size / self.num_examples

    @property
    def cap(self) -> int:
        return self.batch_size

    @property
    def resumable(self) -> bool:
        return True

    def arrange(self, population: int, generator: torch.Generator) -> None:
        return None

    def draw(
        self, population: int, generator: torch.Generator, *, step: int = 0, arranged: Tensor | None = None
    ) -> Tensor:
        return torch.randperm(population, generator=generator)[: self.batch_size]

    def event(self, mechanism: accounting.Event, num_examples: int) -> accounting.Event:
        return accounting.WithoutReplacement(batch_size=self.batch_size, num_examples=num_examples, event=mechanism)

    def steps_per_event(self, num_examples: int) -> int:
        return 1

    def participation(self, steps: int, num_examples: int) -> Participation:
        return Participation(steps, min_separation=1, max_participations=steps, sampled=True)

    def check(self, population: int, num_examples: int) -> None:
        check_size(self, self.num_examples, population, num_examples)

    def largest_batch(self, num_examples: int) -> int:
        return self.batch_size
