"""Metrics of the training data, released with noise: the mean of a bounded number, a count, the share that was clipped.

Guarantee: each unit's contribution to a metric is bounded, and centred, so that it moves the sum by half of the range
at most: Σ_i (v_i - m), |v_i - m| <= (upper - lower)/2 with m the middle of the range.  Numbers outside of the range are
clamped to it; what is not a number, padding and units whose gradient was dropped add nothing.  A metric of a plan
(``metrics=``) is a question to the batch of every step, released in the event of that step: it costs no epsilon of its
own, but takes a part of the precision from the gradient.
Requires: a number for each unit that depends on that unit alone (nobody can check this; the statement says so), and
noise that leaves something for the gradient (``Plan.noise_shares`` refuses less).
Why: |v - m| <= (upper - lower)/2 for clamped v; what is made of the noisy sum is post-processing.

What is estimated.  With B the expected batch size, m + (1/B)(Σ_i (v_i - m) + noise) has the mean over all units as its
expectation where N is the size of the data set, with a standard deviation of at least noise_std/B.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

from dpkit.errors import InvalidArgument
from dpkit.types import Question

_WIDEST = 1e100


class Metric(Protocol):
    """One number a unit, bounded; and what the noisy sum of them says.

    For guarantee, requirements and proof see the module.
    """

    @property
    def name(self) -> str: ...

    def question(self) -> Question:
        """What is asked of every batch."""
        ...

    def contributions(self, values: Tensor) -> Tensor:
        """(B,) values -> (B,) bounded contributions, row b from row b alone."""
        ...

    def estimate(self, total: float, expected_units: float) -> float:
        """The metric, from the noisy sum of the contributions of ``expected_units`` units."""
        ...


@dataclass(frozen=True)
class Mean:
    """The mean of a number that lies in [lower, upper], such as a clamped loss.

    For guarantee, requirements and proof see the module.

    Args:
      name: under which values are given and the estimate is told.
      noise_std: standard deviation of the noise on the sum (of its draws, where noise is correlated over the steps);
        must be well above noise multiplier·(upper - lower)/2.
      lower, upper: values are clamped to this range; public.
    Raises:
      InvalidArgument: for an empty range, or noise that is not positive.
    """

    name: str
    noise_std: float
    lower: float = 0.0
    upper: float = 1.0

    def __post_init__(self) -> None:
        _check(self.name, self.noise_std)
        numbers = isinstance(self.lower, (int, float)) and isinstance(self.upper, (int, float))
        if not (
            numbers and self.lower < self.upper and math.isfinite(self.lower) and self.upper - self.lower < _WIDEST
        ):
            raise InvalidArgument(
                f"the metric {self.name!r} has the range [{self.lower}, {self.upper}]; its lower end must be finite "
                f"and below its upper end by less than {_WIDEST:g}, because the noise is scaled to it."
            )

    def question(self) -> Question:
        return Question(size=1, bound=(self.upper - self.lower) / 2, noise_std=self.noise_std)

    def contributions(self, values: Tensor) -> Tensor:
        values = values.detach().double()
        centred = values.clamp(self.lower, self.upper) - self._middle
        half = (self.upper - self.lower) / 2
        return torch.where(values.isnan(), 0.0, centred.clamp(-half, half))

    def estimate(self, total: float, expected_units: float) -> float:
        return self._middle + total / expected_units

    @property
    def _middle(self) -> float:
        return (self.lower + self.upper) / 2


@dataclass(frozen=True)
class Count:
    """How many units of a batch have a property, such as being classified correctly.

    For guarantee, requirements and proof see the module.

    Args:
      name: under which the property is given and the estimate is told.
      noise_std: standard deviation of the noise on the count; must exceed half the noise multiplier.
    Raises:
      InvalidArgument: for noise that is not positive.
    """

    name: str
    noise_std: float

    def __post_init__(self) -> None:
        _check(self.name, self.noise_std)

    def question(self) -> Question:
        return Question(size=1, bound=0.5, noise_std=self.noise_std)

    def contributions(self, values: Tensor) -> Tensor:
        values = values.detach()
        return torch.where(values.isnan(), 0.0, (values != 0).double() - 0.5)

    def estimate(self, total: float, expected_units: float) -> float:
        return expected_units / 2 + total


@dataclass(frozen=True)
class ClippedCount:
    """How many units of a batch had their gradient scaled down; the engine knows it, and is told nothing.

    For guarantee, requirements and proof see the module.

    Args:
      noise_std: standard deviation of the noise on the count; must exceed half the noise multiplier.
      name: under which the estimate is told.
    Raises:
      InvalidArgument: for noise that is not positive.
    """

    noise_std: float
    name: str = "clipped"

    def __post_init__(self) -> None:
        _check(self.name, self.noise_std)

    def question(self) -> Question:
        return Count(self.name, self.noise_std).question()

    def contributions(self, values: Tensor) -> Tensor:
        return Count(self.name, self.noise_std).contributions(values)

    def estimate(self, total: float, expected_units: float) -> float:
        return Count(self.name, self.noise_std).estimate(total, expected_units)


def _check(name: str, noise_std: float) -> None:
    if not isinstance(name, str) or not name:
        raise InvalidArgument(f"a metric is called {name!r}; give it a name, under which its estimate is told.")
    is_number = isinstance(noise_std, (int, float)) and not isinstance(noise_std, bool)
    if not (is_number and math.isfinite(noise_std) and noise_std > 0):
        raise InvalidArgument(
            f"noise_std of the metric {name!r} is {noise_std!r}; it must be positive and finite, because without noise "
            "the metric would not be private."
        )
