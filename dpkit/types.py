"""The nouns that every layer shares.

A step turns a batch into a :class:`ClippedSum` (sensitive), and only a mechanism turns that into a :class:`Released`
(safe).  Nothing here computes: the types say what may be seen by whom.
"""

from __future__ import annotations

from typing import NamedTuple

from torch import Tensor

Named = dict[str, Tensor]
"""Parameter name -> tensor."""


class Query(NamedTuple):
    """One bounded sum over the units of one batch. Sensitive: it has no noise yet.

    Attributes:
      value: name -> sum over the batch of one bounded contribution per unit.
      groups: name -> the clipping group that the name belongs to.
      sensitivity: group -> how far one unit can move the group's tensors together, in L2, rounding included.
      noise_share: the query's part of the release's precision, in (0, 1]; the shares of one batch add up to 1, so
        that all queries of a batch together cost what the mechanism's event says (PAPERS 0.1).
    """

    value: Named
    groups: dict[str, int]
    sensitivity: dict[int, float]
    noise_share: float = 1.0


class ClippedSum(NamedTuple):
    """All queries on ONE batch, the gradient first. Sensitive; it is released as one joint event."""

    queries: tuple[Query, ...]


class Released(NamedTuple):
    """What the mechanism let out. Safe to print, filter, step with or store; only ``dpkit.mechanisms`` makes one.

    Attributes:
      value: the noisy gradient, name -> tensor.
      queries: the noisy side queries of the same batch, in the order in which they were asked.
    """

    value: Named
    queries: tuple[Named, ...] = ()
