"""The nouns that every layer shares.

A step turns a batch into a :class:`ClippedSum` (sensitive), and only a mechanism turns that into a :class:`Released`
(safe).  Nothing here computes: the types say what may be seen by whom.
"""

from __future__ import annotations

from collections.abc import Mapping
from types import MappingProxyType
from typing import NamedTuple

from torch import Tensor

Named = dict[str, Tensor]
"""Parameter name -> tensor."""


class Query(NamedTuple):
    """One bounded sum over the units of one batch. Sensitive: it has no noise yet.

    Attributes:
      value: name -> sum over the batch of one bounded contribution per unit.
      groups: name -> the noise group that the name belongs to.
      sensitivity: group -> how far one unit can move the group's tensors together, in L2, rounding included.
      noise_share: the query's part of the release's precision, in (0, 1]; the shares of one batch add up to 1, so
        that all queries of a batch together cost what the mechanism's event says.
      spread: group -> γ_k > 0, the standard deviation of its noise relative to that of the other groups; None takes the
        sensitivities, so that each group has an equal part of the precision.
    """

    value: Named
    groups: dict[str, int]
    sensitivity: dict[int, float]
    noise_share: float = 1.0
    spread: dict[int, float] | None = None


class ClippedSum(NamedTuple):
    """All queries on ONE batch, the gradient first. Sensitive; it is released as one joint event."""

    queries: tuple[Query, ...]


class Question(NamedTuple):
    """What is asked of every batch beside the gradient: a sum over its units, released with noise in the same event.

    Attributes:
      size: how many numbers each unit contributes.
      bound: largest L2 norm of a unit's contribution; padding and dropped units contribute zero, and so does the null
        record of the zero-out relation.
      noise_std: standard deviation of the noise on each coordinate of the sum, in the units of the contributions; of
        the draws, where noise is correlated over the steps.
    """

    size: int
    bound: float
    noise_std: float


class Participation(NamedTuple):
    """In which steps one unit may take part: what a mechanism must know of the sampler, and nothing else.

    Attributes:
      steps: T, planned number of steps.
      min_separation: least number of steps from one participation of a unit to its next.
      max_participations: most steps in which a unit takes part.
      sampled: whether units take part at random, so that the event of a step is that of a random batch.
    """

    steps: int
    min_separation: int
    max_participations: int
    sampled: bool


class Released(NamedTuple):
    """What the mechanism let out. Safe to print, filter, step with or store; only ``dpkit.mechanisms`` makes one.

    Attributes:
      value: the noisy gradient, name -> tensor. Filters replace it.
      queries: the noisy sums of the side questions to the same batch, in the order in which they were asked.
      noise_std: name -> standard deviation of the noise on each coordinate of the gradient before any filter.
      raw: the noisy gradient before any filter; None where it is ``value``.
    """

    value: Named
    queries: tuple[Tensor, ...] = ()
    noise_std: Mapping[str, float] = MappingProxyType({})
    raw: Named | None = None
