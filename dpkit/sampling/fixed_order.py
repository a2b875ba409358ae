"""Batches in one fixed order, pass after pass: each unit takes part once a pass, always at the same distance.

Guarantee: step t holds the units of one place in the order, so each takes part once a pass, and takes part again one
pass later, never sooner.  The step is counted by the ledger, also after a crash.
Requires: exactly N units, which is checked; an order that does not depend on the units; zero-out or replace-one (the
accountant refuses add/remove): a removal would shift every later batch.
Why: neighbours differ in one batch of a pass.  With independent noise a pass is one release (``accounting.OnePass``);
correlated noise (``dpkit.Correlated``) makes use of the distance.  No amplification: whoever knows the order knows in
which steps a unit takes part.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

import accounting
from dpkit.errors import InvalidArgument
from dpkit.types import Participation

from .sampler import check_size, check_whole


@dataclass(frozen=True)
class FixedOrder:
    """The units in one order, cut into batches of ``batch_size`` (the last of a pass may be smaller).

    For guarantee, requirements and proof see the module.

    Args:
      batch_size: units of a batch, at least 1.
      num_examples: N, the exact size of the data set, which is public.
      order_seed: the order is a shuffling by this public number, the same in every pass; None takes the order of the
        data set, which must not depend on the units (sorted by label or length, say).
    Raises:
      InvalidArgument: for counts below 1, or a batch larger than the data set.
    """

    batch_size: int
    num_examples: int
    order_seed: int | None = 0

    def __post_init__(self) -> None:
        check_whole("batch_size", self.batch_size)
        check_whole("num_examples", self.num_examples)
        if self.order_seed is not None:
            check_whole("order_seed", self.order_seed, least=0)
            if self.order_seed >= 2**32:
                raise InvalidArgument(f"order_seed is {self.order_seed}; it must be below 2^32.")
        if self.batch_size > self.num_examples:
            raise InvalidArgument(
                f"batch_size is {self.batch_size}, and there are {self.num_examples} units; a pass has at least one "
                "full batch."
            )

    @property
    def sample_rate(self) -> float:
        return self.batch_size / self.num_examples

    @property
    def cap(self) -> int:
        return self.batch_size

    @property
    def resumable(self) -> bool:
        return True  # the order is public

    def arrange(self, population: int, generator: torch.Generator) -> Tensor:
        if self.order_seed is None:
            return torch.arange(population)
        # numpy keeps the streams of its old generator for good, and a resumed run must find the order that it had.
        return torch.from_numpy(np.random.RandomState(self.order_seed).permutation(population))

    def draw(
        self, population: int, generator: torch.Generator, *, step: int = 0, arranged: Tensor | None = None
    ) -> Tensor:
        order = self.arrange(population, generator) if arranged is None else arranged
        start = step % self.steps_per_event(self.num_examples) * self.batch_size
        return order[start : start + self.batch_size]

    def event(self, mechanism: accounting.Event, num_examples: int) -> accounting.Event:
        return accounting.OnePass(event=mechanism)

    def steps_per_event(self, num_examples: int) -> int:
        return -(-num_examples // self.batch_size)

    def participation(self, steps: int, num_examples: int) -> Participation:
        apart = self.steps_per_event(num_examples)
        return Participation(steps, min_separation=apart, max_participations=-(-steps // apart), sampled=False)

    def check(self, population: int, num_examples: int) -> None:
        check_size(self, self.num_examples, population, num_examples)

    def largest_batch(self, num_examples: int) -> int:
        return self.batch_size
