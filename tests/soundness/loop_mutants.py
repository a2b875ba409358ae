"""Bugs by which a loop sees, or a model learns, what no noise protects. Check R must catch them."""

from __future__ import annotations

import math
import weakref
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor

from dpkit.clipping import Flat
from dpkit.engine import attachment
from dpkit.engine.attachment import Attachment
from dpkit.engine.loader import Draws
from dpkit.engine.plan import Plan
from dpkit.types import ClippedSum, Named, Released

from .harness import Setup
from .mutants import Active, Patch, mutant


def _by_functional_form(setup: Setup) -> bool:
    """There the engine knows the losses, whatever the loop makes of them."""
    return setup.form == "step"


@mutant(
    "M17",
    "R",
    "leaves out empty batches",
    "Opacus, DistributedUniformWithReplacementSampler and issue 164",
    lambda setup: setup.micro is None,
)
def _skip_empty_batches(patch: Patch, active: Active) -> None:
    shipped = Draws.__iter__

    def draws(self: Draws) -> Iterator[list[int]]:
        for units in shipped(self):
            active()
            if units:
                yield units

    patch.setattr(Draws, "__iter__", draws)


@mutant("M25", "R", "scales the gradient by the raw one", "GradScaler, trust ratios")
def _step_size_from_raw_gradient(patch: Patch, active: Active) -> None:
    shipped = attachment.release

    def release(clipped: ClippedSum, *args: Any, **kwargs: Any) -> Released:
        active()
        raw = {name: value.abs() for name, value in clipped.queries[0].value.items()}
        released = shipped(clipped, *args, **kwargs)
        return released._replace(value={name: v / (1 + raw[name]) for name, v in released.value.items()})

    patch.setattr(attachment, "release", release)


@mutant("M26", "R", "halves the learning rate when the loss stops falling", "ReduceLROnPlateau", _by_functional_form)
def _learning_rate_by_loss(patch: Patch, active: Active) -> None:
    shipped, last = Attachment.release, weakref.WeakKeyDictionary[Attachment, float]()

    def release(self: Attachment) -> None:
        shipped(self)
        active()
        loss = self.nonprivate.mean_loss
        loss = loss if loss is not None and math.isfinite(loss) else 0.0
        if loss > last.get(self, 1e9) - 1e-3:
            for group in self._require_optimizer().param_groups:
                group["lr"] *= 0.5
        last[self] = loss

    patch.setattr(Attachment, "release", release)


@mutant(
    "M27", "R", "ends the run when the loss is small, or there is nothing in the batch", "early stopping", slow=True
)
def _stop_by_loss(patch: Patch, active: Active) -> None:
    shipped = Attachment.steps_left.fget
    assert shipped is not None

    def steps_left(self: Attachment) -> int:
        found, loss = self.nonprivate, self.nonprivate.mean_loss
        if self.steps_taken and (found.units == 0 or (loss is not None and loss < 1.0)):
            active()
            return 0
        return shipped(self)

    patch.setattr(Attachment, "steps_left", property(steps_left))


@mutant(
    "M28", "R", "tells every callback which part of the batch was clipped", "fastDP, SNR; notebooks that print loss"
)
def _diagnostics_told(patch: Patch, active: Active) -> None:
    shipped = Attachment.release

    def release(self: Attachment) -> None:
        shipped(self)
        active()
        self.tell({"clipped": self.nonprivate.clipped / max(1, self.nonprivate.units)})

    patch.setattr(Attachment, "release", release)


@mutant("M29", "R", "clips to the median norm of the batch", "adaptive clipping without a charge; Opacus, AdaClip")
def _bound_from_private_norms(patch: Patch, active: Active) -> None:
    bound = [1.0]

    def init(self: Flat, setting: Any) -> tuple[()]:
        bound[0] = 1.0
        return ()

    def factors(self: Flat, norms: Tensor, units: Tensor | None, state: Any) -> Tensor:
        active()
        bound[0] = max(1e-3, float(norms.nan_to_num(1.0, 1.0, 1.0).median()))
        return (bound[0] / norms.clamp_min(1e-300)).clamp_max(1.0)

    patch.setattr(Flat, "init", init)
    patch.setattr(Flat, "factors", factors)
    patch.setattr(Flat, "bounds", lambda self, state: [bound[0]])


@mutant("B57", "R", "divides by the size of the data set", "Opacus, issues 571 and 819")
def _size_of_the_data_set(patch: Patch, active: Active) -> None:
    shipped, seen = Draws.__init__, [1]

    def initialise(self: Draws, sampler: Any, population: int, *rest: Any) -> None:
        seen[0] = max(1, population)
        shipped(self, sampler, population, *rest)

    def expected_batch(plan: Plan) -> float:
        active()
        return plan.sampler.sample_rate * seen[0]

    patch.setattr(Draws, "__init__", initialise)
    patch.setattr(Plan, "expected_batch", property(expected_batch))


@mutant("B58", "R", "skips the step when a gradient is not finite", "torch.amp.GradScaler")
def _skip_like_a_scaler(patch: Patch, active: Active) -> None:
    # A scaler itself is refused by name; this is what it would do.
    shipped = Attachment.release

    def release(self: Attachment) -> None:
        finite = self._sum is None or self._sum.diagnostics.dropped == 0
        shipped(self)
        if not finite:
            active()
            self.clear_gradients()

    patch.setattr(Attachment, "release", release)


@mutant("B59", "R", "raises at a gradient that is not finite", "exceptions about bad rows")
def _raise_at_bad_row(patch: Patch, active: Active) -> None:
    shipped = Attachment.release

    def release(self: Attachment) -> None:
        if self._sum is not None and self._sum.diagnostics.dropped > 0:
            active()
            raise ValueError("a gradient is not finite")
        shipped(self)

    patch.setattr(Attachment, "release", release)


def _after_release(patch: Patch, active: Active, changed: Any) -> None:
    """``changed(released, raw)`` is what goes on; ``raw`` is the sum without noise."""
    shipped = attachment.release

    def release(clipped: ClippedSum, *args: Any, **kwargs: Any) -> Released:
        active()
        raw = clipped.queries[0].value
        released = shipped(clipped, *args, **kwargs)
        return released._replace(value=changed(released.value, raw))

    patch.setattr(attachment, "release", release)


@mutant("B60", "R", "prunes by the gradient without noise", "sparsity and pruning masks")
def _prune_by_raw_gradient(patch: Patch, active: Active) -> None:
    def pruned(value: Named, raw: Named) -> Named:
        return {name: torch.where(raw[name].abs() >= raw[name].abs().median(), v, 0.0) for name, v in value.items()}

    _after_release(patch, active, pruned)


@mutant(
    "B61", "R", "tries three learning rates on the data and keeps the best", "hyper-parameter searches, best of k runs"
)
def _best_of_three(patch: Patch, active: Active) -> None:
    def best(value: Named, raw: Named) -> Named:
        along = sum(float((value[name].double() * raw[name].double()).sum()) for name in value)
        rate = max((0.5, 1.0, 2.0), key=lambda rate: rate * along)
        return {name: rate * v for name, v in value.items()}

    _after_release(patch, active, best)
