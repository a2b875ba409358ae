"""One logical step, as functions: per-sample gradients in, a clipped sum out; a clipped sum in, a release out.

Guarantees (Laws 1, 3, 4 and 7 of the design):
  * :class:`ClippedAccumulator` holds a sum to which each unit adds at most the rule's bound, and nothing if its
    gradient is not finite. Nothing is divided by the size of a batch.
  * :func:`release` asks for noise in exchange for the receipt of a durable charge; what it returns has passed the
    mechanism and is divided by the public expected batch size alone.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from accounting import Receipt
from dpkit.gradients import PerSample
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
        self._names = list(parameters)
        self._groups = dict(zip(parameters, plan.clip.groups(parameters), strict=True))
        self._sum: Named = {
            name: torch.zeros_like(p, dtype=torch.promote_types(p.dtype, torch.float32), requires_grad=False)
            for name, p in parameters.items()
        }
        self._microbatches = microbatches
        self.diagnostics = BatchDiagnostics()

    def add(self, gradients: PerSample, real: int, scale: float = 1.0, losses: Tensor | None = None) -> None:
        """Clip and add one microbatch.

        Args:
          gradients: per-sample gradients of all rows, padding included.
          real: the first ``real`` rows are units; the others are padding and add nothing.
          scale: factor by which the gradients are too small (a mean loss over B rows: B).
          losses: (B,) for the diagnostics, if there is one a row.
        """
        self._count_losses(losses, real)
        norms = self._norms(gradients) * scale
        is_unit = torch.arange(gradients.size, device=norms.device) < real
        keep = is_unit & norms.isfinite().all(dim=0)
        kept = int(keep.sum())
        self.diagnostics.units += real
        self.diagnostics.dropped += real - kept
        if kept == 0:
            return
        # A row is left out, not multiplied by zero: 0·NaN and 0·inf are NaN.
        gradients = gradients if kept == gradients.size else gradients.select(keep)
        factors = self._plan.clip.factors(norms[:, keep], None, self._state)
        self.diagnostics.clipped += int((factors < 1).any(dim=0).sum())
        weights = {name: (factors[self._groups[name]] * scale).float() for name in self._names}
        for name, total in gradients.weighted_sum(weights):
            self._sum[name] += total

    def _count_losses(self, losses: Tensor | None, real: int) -> None:
        if losses is not None and real > 0:
            seen, mean = self.diagnostics.units, self.diagnostics.mean_loss or 0.0
            total = float(losses.detach()[:real].sum(dtype=torch.float64))
            self.diagnostics.mean_loss = (mean * seen + total) / (seen + real)

    def _norms(self, gradients: PerSample) -> Tensor:
        """(K, B) upper bounds of the L2 norms, in double precision."""
        squares = gradients.sq_norms()
        device = next(iter(squares.values())).device
        groups = max(self._groups.values()) + 1
        totals = torch.zeros(groups, gradients.size, dtype=torch.float64, device=device)
        for name, square in squares.items():
            totals[self._groups[name]] += square
        return totals.sqrt()

    def result(self) -> ClippedSum:
        """The sum with the sensitivity that the noise must cover."""
        sensitivity = self._plan.sensitivities(self._plan.clip.bounds(self._state), self._microbatches)
        return ClippedSum((Query(self._sum, self._groups, sensitivity),))


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
