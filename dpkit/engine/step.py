"""One logical step, as functions: per-sample gradients in, a clipped sum out; a clipped sum in, a release out.

Guarantees (Laws 1, 3, 4 and 7 of the design):
  * :class:`ClippedAccumulator` holds a sum to which each unit adds at most the rule's bound, and nothing if its
    gradient is not finite. Nothing is divided by the size of a batch.
  * :func:`release` asks for noise in exchange for the receipt of a durable charge; what it returns has passed the
    mechanism and is divided by the public expected batch size alone.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any, cast

import torch
from torch import Tensor

from accounting import Receipt
from dpkit.clipping import SeparableRule
from dpkit.gradients import PerSample, PerSampleGradients, precisely
from dpkit.mechanisms import RunKey
from dpkit.types import ClippedSum, Named, Query, Released

from .plan import Plan


@dataclass
class BatchDiagnostics:
    """What happened in a logical batch. NOT PRIVATE: no noise was added to these counts.

    Attributes:
      units: realised batch size.
      clipped: units whose gradient was scaled down.
      dropped: units left out because their gradient was not finite.
      mean_loss: of the units; None where the loop reduced the losses itself, and for an empty batch.
    """

    units: int = 0
    clipped: int = 0
    dropped: int = 0
    mean_loss: float | None = None


class ClippedAccumulator:
    """The clipped sum of one logical batch, built up over its microbatches.

    Args:
      plan: whose rule clips.
      rule_state: state of that rule, the same for the whole logical batch.
      parameters: every trainable parameter; each has a place in the sum whether or not it took part in the loss.
      microbatches: public upper bound of the number of microbatches; part of the rounding that the noise covers.
    """

    def __init__(self, plan: Plan, rule_state: Any, parameters: Named, microbatches: int) -> None:
        self._plan = plan
        self._state = rule_state
        self._groups = dict(zip(parameters, plan.clip.groups(parameters), strict=True))
        self._parameters = parameters
        self._sum: Named = {}  # of parameters that came already
        self._microbatches = microbatches
        self._device = next(iter(parameters.values())).device
        self._separable = hasattr(plan.clip, "group_factor")  # asking for the protocol takes as long as a small layer
        self._real, self._scale = 0, 1.0
        self._clipped: Tensor | None = None
        self._dropped: Tensor | None = None
        self.diagnostics = BatchDiagnostics()

    @property
    def consumer(self) -> ClippedAccumulator | None:
        """Itself, if the rule can clip group after group inside the backward pass."""
        return self if self._separable else None

    @property
    def groups(self) -> dict[str, int]:
        """Name -> clipping group."""
        return self._groups

    def open(self, real: int, scale: float = 1.0) -> None:
        """A microbatch comes.

        Args:
          real: the first ``real`` units are units of the batch; the others are padding and add nothing.
          scale: factor by which the gradients are too small (a mean loss over B rows: B).
        """
        self._real, self._scale = real, scale
        self._clipped = self._dropped = None

    def consume(self, group: int, gradients: PerSampleGradients) -> None:
        """Clip and add the gradients of one group; a unit adds zero where its norm in that group is not finite."""
        rule = cast(SeparableRule, self._plan.clip)
        with precisely(self._device):
            norms = torch.stack(list(gradients.sq_norms().values())).sum(0).sqrt() * self._scale
            keep = self._keep(norms[None])
            if not bool(keep.any()):
                return
            gradients = gradients if bool(keep.all()) else gradients.select(keep)
            factors = rule.group_factor(group, norms[keep], self._state)
            self._note(keep, factors < 1)
            weights = (factors * self._scale).float()
            self._add(gradients.weighted_sum(dict.fromkeys(gradients.forms, weights)))

    def add(self, gradients: PerSample, losses: Tensor | None = None) -> None:
        """Clip and add one microbatch, or what is left of it after :meth:`consume`.

        Args:
          gradients: per-sample gradients of all units, padding included; without parameters if they were consumed.
          losses: (B,) for the diagnostics, if there is one a unit.
        """
        self._count_losses(losses, self._real)
        if self.consumer is None or getattr(gradients, "forms", True):
            with precisely(self._device):
                self._add_all(gradients)
        dropped = 0 if self._dropped is None else int(self._dropped.sum())
        self.diagnostics.units += self._real
        self.diagnostics.dropped += dropped
        self.diagnostics.clipped += 0 if self._clipped is None else int(self._clipped.sum())

    def _add_all(self, gradients: PerSample) -> None:
        norms = self._norms(gradients) * self._scale
        keep = self._keep(norms)
        if not bool(keep.any()):
            return
        # A row is left out, not multiplied by zero: 0·NaN and 0·inf are NaN.
        gradients = gradients if bool(keep.all()) else gradients.select(keep)
        factors = self._plan.clip.factors(norms[:, keep], None, self._state)
        self._note(keep, (factors < 1).any(dim=0))
        self._add(
            gradients.weighted_sum({name: (factors[k] * self._scale).float() for name, k in self._groups.items()})
        )

    def _keep(self, norms: Tensor) -> Tensor:
        """(B,) the units that add something: no padding, and finite."""
        is_unit = torch.arange(norms.shape[1], device=norms.device) < self._real
        finite = norms.isfinite().all(dim=0)
        lost = is_unit & ~finite
        self._dropped = lost if self._dropped is None else self._dropped | lost
        return is_unit & finite

    def _note(self, keep: Tensor, clipped: Tensor) -> None:
        seen = torch.zeros_like(keep)
        seen[keep] = clipped
        self._clipped = seen if self._clipped is None else self._clipped | seen

    def _add(self, sums: Iterable[tuple[str, Tensor]]) -> None:
        for name, total in sums:
            if name in self._sum:
                self._sum[name] += total
            else:
                self._sum[name] = total

    def _count_losses(self, losses: Tensor | None, real: int) -> None:
        if losses is not None and real > 0:
            seen, mean = self.diagnostics.units, self.diagnostics.mean_loss or 0.0
            total = float(losses.detach()[:real].sum(dtype=torch.float64))
            self.diagnostics.mean_loss = (mean * seen + total) / (seen + real)

    def _norms(self, gradients: PerSample) -> Tensor:
        """(K, B) upper bounds of the L2 norms, in double precision."""
        squares = gradients.sq_norms()
        groups = max(self._groups.values()) + 1
        totals = torch.zeros(groups, gradients.size, dtype=torch.float64, device=self._device)
        for name, square in squares.items():
            totals[self._groups[name]] += square
        return totals.sqrt()

    def result(self) -> ClippedSum:
        """The sum with the sensitivity that the noise must cover; every parameter has a place in it."""
        sensitivity = self._plan.sensitivities(self._plan.clip.bounds(self._state), self._microbatches)
        value = {name: self._sum[name] if name in self._sum else _zeros(p) for name, p in self._parameters.items()}
        return ClippedSum((Query(value, self._groups, sensitivity),))


def _zeros(parameter: Tensor) -> Tensor:
    dtype = torch.promote_types(parameter.dtype, torch.float32)
    return torch.zeros_like(parameter, dtype=dtype, requires_grad=False)


@dataclass
class StepState:
    """What the stateful parts of a plan remember between steps; all of it computed from released values."""

    rule: Any
    mechanism: Any
    filters: tuple[Any, ...]

    @staticmethod
    def initial(plan: Plan, parameters: Named) -> StepState:
        return StepState(
            rule=plan.clip.init(plan.clip.groups(parameters)),
            mechanism=plan.mechanism.init(parameters),
            filters=tuple(filter_.init(parameters) for filter_ in plan.filters),
        )


def release(clipped: ClippedSum, plan: Plan, state: StepState, receipt: Receipt, run_key: RunKey) -> Released:
    """Add noise, divide by the expected batch size, filter. Updates ``state``.

    Args:
      receipt: of the charge for this step, which is on the disk: a crash in here over-counts, never under-counts.
    Raises:
      accounting.LedgerError: the receipt has paid for another release.
    """
    released, state.mechanism = plan.mechanism.release(clipped, state.mechanism, run_key.noise_key(receipt))
    state.rule = plan.clip.update(state.rule, released.queries)
    released = released._replace(value={name: v / plan.expected_batch for name, v in released.value.items()})
    filter_states = []
    for filter_, filter_state in zip(plan.filters, state.filters, strict=True):
        released, after = filter_.update(released, filter_state)
        filter_states.append(after)
    state.filters = tuple(filter_states)
    return released
