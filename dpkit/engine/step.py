"""One logical step, as functions: per-sample gradients in, a clipped sum out; a clipped sum in, a release out.

Guarantees (Laws 1, 3, 4 and 7 of the design):
  * :class:`ClippedAccumulator` holds a sum to which each unit adds at most the rule's bound, and nothing if its
    gradient is not finite. Nothing is divided by the size of a batch.
  * :func:`release` asks for noise in exchange for the receipt of a durable charge; what it returns has passed the
    mechanism and is divided by the public expected batch size alone.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from types import MappingProxyType
from typing import Any, cast

import torch
from torch import Tensor

from accounting import Receipt
from dpkit.clipping import SeparableRule
from dpkit.errors import InvalidArgument
from dpkit.gradients import PerSample, PerSampleGradients, precisely
from dpkit.mechanisms import RunKey
from dpkit.metrics import ClippedCount
from dpkit.types import ClippedSum, Named, Query, Question, Released

from .plan import Plan

NO_VALUES: Mapping[str, Tensor] = MappingProxyType({})
"""Of the metrics of a plan that has none."""


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
    """The clipped sum of one logical batch and the answers to what is asked beside it, built up over its microbatches.

    Guarantee: one unit moves :meth:`result` by at most the sensitivities that stand in it, rounding included; padding
    and units whose gradient is not finite add nothing, neither to the sum nor to an answer.
    Requires: per-sample gradients that depend on their unit alone (the backend's promise, and the neighbour probe's
    test), norms that are not below the true ones, at most ``microbatches`` microbatches.
    Why: each unit adds factor·gradient, of norm at most the rule's bound, and answers that are scaled to theirs; what
    is not finite is left out, not multiplied by 0; ``Plan.sensitivities`` has the rounding.

    Args:
      plan: whose rule clips.
      rule_state: state of that rule, the same for the whole logical batch.
      parameters: every trainable parameter; each has a place in the sum whether or not it took part in the loss.
      microbatches: public upper bound of the number of microbatches; part of the rounding that the noise covers.
      questions: what is asked beside the gradient: ``plan.questions``.
    """

    def __init__(
        self,
        plan: Plan,
        rule_state: Any,
        parameters: Named,
        microbatches: int,
        questions: Sequence[Question] = (),
    ) -> None:
        self._plan = plan
        self._state = rule_state
        self._groups = dict(zip(parameters, plan.clip.groups(parameters), strict=True))
        self._parameters = parameters
        self._sum: Named = {}  # of parameters that came already
        self._microbatches = microbatches
        self._device = next(iter(parameters.values())).device
        self._separable = hasattr(plan.clip, "group_factor")  # asking for the protocol takes as long as a small layer
        self._questions = questions
        self._answers = [
            torch.zeros(question.size, dtype=torch.float64, device=self._device) for question in self._questions
        ]
        self._values = NO_VALUES  # of the plan's metrics, for the microbatch in hand
        self._group_norms: dict[int, Tensor] = {}  # of groups that were clipped inside the backward pass
        self._labels: Tensor | None = None
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

    def open(
        self,
        real: int,
        scale: float = 1.0,
        *,
        labels: Tensor | None = None,
        values: Mapping[str, Tensor] = NO_VALUES,
    ) -> None:
        """A microbatch comes.

        Args:
          real: the first ``real`` units are units of the batch; the others are padding and add nothing.
          scale: factor by which the gradients are too small (a mean loss over B rows: B).
          labels: (B,) label of each unit, if the rule needs them.
          values: (B,) of each metric of the plan that the loop computes.
        """
        self._real, self._scale, self._labels, self._values = real, scale, labels, values
        self._clipped = self._dropped = None
        self._group_norms = {}

    def consume(self, group: int, gradients: PerSampleGradients) -> None:
        """Clip and add the gradients of one group; a unit adds zero where its norm in that group is not finite."""
        rule = cast(SeparableRule, self._plan.clip)
        with precisely(self._device):
            norms = torch.stack(list(gradients.sq_norms().values())).sum(0).double().sqrt() * self._scale
            if self._questions:
                self._group_norms[group] = norms
            keep = self._keep(norms[None])
            if not bool(keep.any()):
                return
            gradients = gradients if bool(keep.all()) else gradients.select(keep)
            factors = rule.group_factor(group, norms[keep], self._state)
            self._note(keep, factors < 1)
            weights = (factors * self._scale).float()
            self._add(_finite_sums(gradients, dict.fromkeys(gradients.forms, weights)))

    def add(self, gradients: PerSample, losses: Tensor | None = None) -> None:
        """Clip and add one microbatch, or what is left of it after :meth:`consume`.

        Args:
          gradients: per-sample gradients of all units, padding included; without parameters if they were consumed.
          losses: (B,) for the diagnostics, if there is one a unit.
        """
        self._count_losses(losses, self._real)
        norms = None
        if self.consumer is None or getattr(gradients, "forms", True):
            with precisely(self._device):
                norms = self._add_all(gradients)
        if self._questions:
            self._answer(norms, gradients.size)
        dropped = 0 if self._dropped is None else int(self._dropped.sum())
        self.diagnostics.units += self._real
        self.diagnostics.dropped += dropped
        self.diagnostics.clipped += 0 if self._clipped is None else int(self._clipped.sum())

    def join(self, gradients: PerSample, units: int) -> None:
        """Clip and add units that are not of the data: no diagnostics count them."""
        counted, self.diagnostics = self.diagnostics, BatchDiagnostics()
        self.open(units)
        self.add(gradients)
        self.diagnostics = counted

    def _add_all(self, gradients: PerSample) -> Tensor:
        norms = self._norms(gradients) * self._scale
        keep = self._keep(norms)
        if not bool(keep.any()):
            return norms
        # A row is left out, not multiplied by zero: 0·NaN and 0·inf are NaN.
        gradients = gradients if bool(keep.all()) else gradients.select(keep)
        factors = self._plan.clip.factors(norms[:, keep], self._labels_of(keep), self._state)
        self._note(keep, (factors < 1).any(dim=0))
        weights = {name: (factors[k] * self._scale).float() for name, k in self._groups.items()}
        self._add(_finite_sums(gradients, weights))
        return norms

    def _keep(self, norms: Tensor) -> Tensor:
        """(B,) the units that add something: no padding, and finite."""
        is_unit = torch.arange(norms.shape[1], device=norms.device) < self._real
        finite = norms.isfinite().all(dim=0)
        lost = is_unit & ~finite
        self._dropped = lost if self._dropped is None else self._dropped | lost
        return is_unit & finite

    def _labels_of(self, keep: Tensor) -> Tensor | None:
        return None if self._labels is None else self._labels.to(self._device)[keep]

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

    def _answer(self, norms: Tensor | None, size: int) -> None:
        """Add what each unit answers; padding and units that were dropped answer nothing."""
        if norms is None:
            norms = torch.zeros(max(self._groups.values()) + 1, size, dtype=torch.float64, device=self._device)
        for group, row in self._group_norms.items():
            norms[group] = row
        is_unit = torch.arange(size, device=self._device) < self._real
        keep = is_unit if self._dropped is None else is_unit & ~self._dropped
        answers = list(self._plan.clip.answers(norms[:, keep], self._labels_of(keep), self._state))
        clipped = torch.zeros(size, dtype=torch.bool, device=self._device) if self._clipped is None else self._clipped
        for metric in self._plan.metrics:
            values = clipped if isinstance(metric, ClippedCount) else self._values[metric.name].to(self._device)
            answers.append(metric.contributions(values[keep])[:, None])
        units = int(keep.sum())
        for number, (question, answer) in enumerate(zip(self._questions, answers, strict=True)):
            self._answers[number] = self._answers[number] + _bounded(answer, question, units).sum(0)

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
        """The sums with the sensitivities that the noise must cover; every parameter has a place in them."""
        plan, rule = self._plan, self._plan.clip
        bounds, spread = rule.bounds(self._state), rule.spread(self._state)
        # A rule with one bound for all groups together has one group of noise.
        groups = dict.fromkeys(self._groups, 0) if len(bounds) == 1 else self._groups
        value = {name: self._sum[name] if name in self._sum else _zeros(p) for name, p in self._parameters.items()}
        share, *shares = plan.noise_shares(self._questions)
        sensitivity = plan.sensitivities(bounds, self._microbatches)
        gradient = Query(value, groups, sensitivity, share, dict(enumerate(spread)))
        side = (
            Query({"answer": total}, {"answer": 0}, {0: plan.sensitivity_of(question)}, part)
            for question, total, part in zip(self._questions, self._answers, shares, strict=True)
        )
        return ClippedSum((gradient, *side))


def _bounded(answers: Tensor, question: Question, units: int) -> Tensor:
    """(units, size) answers of which each row has a norm of at most the bound, whatever the rule or metric gave.

    Raises:
      InvalidArgument: they have another shape.
    """
    if answers.shape != (units, question.size):
        raise InvalidArgument(
            f"the answers to {question} have {answers.shape[-1] if answers.dim() == 2 else answers.dim()} columns or "
            "axes; a clipping rule or metric gives one row of its size for each unit."
        )
    answers = answers.double()
    norms = torch.linalg.vector_norm(answers, dim=1, keepdim=True)
    # Rows at the bound stay as they are: rounding has its place in the sensitivity (2^-40 of the bound).
    scaled = torch.where(norms > question.bound * (1 + 2.0**-41), answers * (question.bound / norms), answers)
    return torch.where(norms.isfinite(), scaled, 0.0)


def _finite_sums(gradients: PerSample, weights: Named) -> Iterable[tuple[str, Tensor]]:
    """The weighted sums; a unit whose own part is not finite adds nothing.

    A finite gradient times a factor is finite, for it has a norm of at most the bound. But where a factor above 1 meets
    a gradient that is a product, of 1e35 and 1e-40 say, a factor of the product may leave the range of float32 on the
    way. Then the batch is halved until the units that do it are alone, and left out.
    """
    if all(bool((weight <= 1).all()) for weight in weights.values()):
        return gradients.weighted_sum(weights)
    sums = list(gradients.weighted_sum(weights))
    if all(bool(total.isfinite().all()) for _, total in sums):
        return sums
    types = {name: total.dtype for name, total in sums}
    # Joined in double precision and rounded once: the sensitivity allows for no chain of further additions.
    return [(name, total.to(types[name])) for name, total in _halved(gradients, weights).items()]


def _halved(gradients: PerSample, weights: Named) -> Named:
    """The weighted sums in double precision, of two halves if they are not finite; nothing of one unit that is not."""
    sums = {name: total.double() for name, total in gradients.weighted_sum(weights)}
    if all(bool(total.isfinite().all()) for total in sums.values()):
        return sums
    if gradients.size == 1:
        return {}
    first = torch.arange(gradients.size, device=next(iter(sums.values())).device) < gradients.size // 2
    totals: Named = {}
    for half in (first, ~first):
        part = {name: weight[half] for name, weight in weights.items()}
        for name, total in _halved(gradients.select(half), part).items():
            totals[name] = totals[name] + total if name in totals else total
    return totals


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
            rule=plan.clip.init(plan.setting(parameters)),
            mechanism=plan.mechanism.init(parameters, plan.participation),
            filters=tuple(filter_.init(parameters) for filter_ in plan.filters),
        )


def release(
    clipped: ClippedSum,
    plan: Plan,
    state: StepState,
    receipt: Receipt,
    run_key: RunKey,
    take: Callable[[Released], Released] = lambda released: released,
) -> Released:
    """Add noise, divide by the expected batch size, filter. Updates ``state``.

    Guarantee: what comes back is a function of one release of the mechanism, for which ``receipt`` paid.
    Requires: sensitivities in ``clipped`` that hold; a state that was made of earlier releases alone.
    Why: the key of the noise exists only in exchange for the receipt; q·N, by which sums are divided, is public; rule
    and filters see nothing but the mechanism's output (post-processing).

    Args:
      receipt: of the charge for this step, which is on the disk: a crash in here over-counts, never under-counts.
      take: takes out of the release what no filter and no parameter is there for.
    Raises:
      accounting.LedgerError: the receipt has paid for another release.
    """
    released, state.mechanism = plan.mechanism.release(clipped, state.mechanism, run_key.noise_key(receipt))
    asked = len(plan.metrics)
    state.rule = plan.clip.update(state.rule, released.queries[: len(released.queries) - asked])
    value = {name: total / plan.expected_batch for name, total in released.value.items()}
    stds = {name: std / plan.expected_batch for name, std in released.noise_std.items()}
    released = take(released._replace(value=value, raw=value, noise_std=stds))
    filter_states = []
    for filter_, filter_state in zip(plan.filters, state.filters, strict=True):
        filtered, after = filter_.update(released, filter_state)
        released = released._replace(value=filtered.value)  # all else is what it was before the filters
        filter_states.append(after)
    state.filters = tuple(filter_states)
    return released
