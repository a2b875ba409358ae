"""The attachment: hooks on one model and one optimizer, and the order of events of one run.

States of a logical batch: drawn -> every microbatch differentiated once -> charged and released -> the next one may be
drawn. Any other order raises :class:`dpkit.errors.OutOfOrder` and releases nothing.
"""

from __future__ import annotations

import weakref
from collections.abc import Hashable
from typing import Any

import torch
from torch import Tensor, nn

from accounting import Ledger, PlanRecord
from dpkit.errors import (
    CrossExample,
    InvalidArgument,
    OutOfOrder,
    RawGradient,
    UncoveredParameter,
    UnsupportedOptimizer,
)
from dpkit.gradients import Capture, PerSample, trainable
from dpkit.mechanisms import RunKey

from .batch import structure
from .guards import (
    refuse_batch_statistics,
    refuse_foreign_leaves,
    refuse_foreign_roots,
    refuse_grad_scaler,
    refuse_loss_shape,
)
from .loader import Draw, PrivateLoader
from .plan import Plan
from .probe import probe_forward, rows_of_examples, training_mode
from .step import BatchDiagnostics, ClippedAccumulator, StepState, release

REDUCTIONS = ("none", "mean", "sum")

# A model stays attached as long as it lives, or until it is detached: were it the engine that kept the attachment
# alive, a loop that lost its engine would go on without privacy and without a word.
_ATTACHMENTS: weakref.WeakKeyDictionary[nn.Module, Attachment] = weakref.WeakKeyDictionary()


def check_reduction(reduction: str) -> None:
    """Refuse anything but "none", "mean" and "sum".

    Raises:
      InvalidArgument: naming them.
    """
    if reduction not in REDUCTIONS:
        raise InvalidArgument(f"loss_reduction is {reduction!r}; it is one of {', '.join(map(repr, REDUCTIONS))}.")


class Attachment:
    """One model, one optimizer and one plan, bound to one ledger.

    Args:
      parameters: every trainable parameter, by name.
      ledger: what is charged.
      record: the plan as the ledger keeps it.
      run_key: secret of the run.
      microbatches: public upper bound of the microbatches of a logical batch.
    """

    def __init__(
        self,
        model: nn.Module,
        optimizer: torch.optim.Optimizer,
        plan: Plan,
        parameters: dict[str, nn.Parameter],
        *,
        ledger: Ledger,
        record: PlanRecord,
        run_key: RunKey,
        microbatches: int,
    ) -> None:
        self.plan = plan
        self.capture: Capture | None = None
        self.batches: PrivateLoader | None = None
        self.steps_taken = 0
        self.nonprivate = BatchDiagnostics()
        self._model = weakref.ref(model)
        self._parameters = parameters
        self._ledger = ledger
        self._record = record
        self._run_key = run_key
        self._microbatches = microbatches
        self._names = {id(p): name for name, p in parameters.items()}
        self._state = StepState.initial(plan, dict(parameters))
        self._draw: Draw | None = None  # handed out and not differentiated yet
        self._sum: ClippedAccumulator | None = None  # of a logical batch that is not released yet
        self._failed = False
        self._written: dict[int, Tensor] = {}  # id of a parameter -> the gradient that the engine gave it
        self._unused = False  # a release that no optimizer has stepped with
        self._reduction = "none"
        self._differentiating = False
        self._probed: set[Hashable] = set()
        self._went_through = False  # the batch in hand, through the model in a way that was probed
        self._versions: dict[int, int] | None = None
        self._handles: list[Any] = []
        if (earlier := _ATTACHMENTS.get(model)) is not None:
            earlier.detach()
        _ATTACHMENTS[model] = self
        self._watch(optimizer)

    def detach(self) -> None:
        """Leave model and optimizer as they were; this attachment takes no further step."""
        self._failed = True
        for handle in self._handles:
            handle.remove()
        self._handles = []
        if self.capture is not None:
            self.capture.detach()
        if (model := self._model()) is not None and _ATTACHMENTS.get(model) is self:
            del _ATTACHMENTS[model]

    # -- the order of events ------------------------------------------------------------------------------------------

    def begin_pass(self, steps_per_pass: int) -> int:
        """Public number of logical steps of the pass that begins: no more than the plan has left."""
        if self._sum is not None and not self._failed:
            raise OutOfOrder(
                "a new pass over the loader began in the middle of a logical batch, whose microbatches would be lost "
                "or counted twice. Finish the pass, or break out of it only after a logical batch."
            )
        if self.capture is not None and self.capture.pending:
            self._failed = True  # a backward pass had begun and died: this is no batch that was only looked at
        self._forget()
        return min(steps_per_pass, self.plan.steps - self.steps_taken)

    def receive(self, draw: Draw) -> None:
        """The loader hands out the next batch."""
        if self._failed:
            raise OutOfOrder(
                "an earlier batch of this run failed and was not released; going on without it would show that. Mend "
                "the cause and start a new run; what was charged stays charged."
            )
        if self._draw is not None:
            raise OutOfOrder(
                "the next batch was drawn before engine.backward had seen the one before; leaving batches out shows "
                "which ones. Call engine.backward on every batch, and evaluate on a loader of your own."
            )
        self._forget()
        if (self._sum is None) != (draw.microbatch == 0):
            raise OutOfOrder("microbatches of two logical batches would mix; iterate over one loader at a time.")
        self._draw = draw

    def _forget(self) -> None:
        """Nothing of a batch before the next one may still arrive."""
        self._draw = None
        self._went_through = False
        if self.capture is not None:
            self.capture.reset()

    def _in_hand(self) -> Draw:
        if self._draw is None:
            raise OutOfOrder(
                "there is no private batch to differentiate: it was used already (add the losses of one batch before "
                "engine.backward; a closure may be evaluated once a step), or it did not come from the private loader."
            )
        return self._draw

    def take_draw(self) -> Draw:
        """The batch in hand, once."""
        draw, self._draw = self._in_hand(), None
        self._failed = True  # until the batch is through: whatever happens in between ends the run
        return draw

    def add(self, gradients: PerSample, real: int, scale: float = 1.0) -> None:
        """Clip and add the per-sample gradients of one microbatch."""
        if self._sum is None:
            self._sum = ClippedAccumulator(self.plan, self._state.rule, dict(self._parameters), self._microbatches)
        self._sum.add(gradients, real, scale)

    def release(self) -> None:
        """Charge the logical batch, release it and write ``p.grad``."""
        if self._sum is None:
            raise OutOfOrder("there is nothing to release.")
        clipped, self._sum = self._sum, None
        self.nonprivate = clipped.diagnostics
        released = release(
            clipped.result(),
            self.plan,
            self._state,
            ledger=self._ledger,
            record=self._record,
            run_key=self._run_key,
        )
        self.steps_taken += 1
        self._unused = True
        self._versions = None  # released inside a step, by a closure: the step may move
        for name, parameter in self._parameters.items():
            gradient = released.value[name].to(parameter.dtype)
            parameter.grad = gradient
            self._written[id(parameter)] = gradient
        self._failed = False

    def clear_gradients(self) -> None:
        """No gradients until the next release: an optimizer step in between moves nothing."""
        for parameter in self._parameters.values():
            parameter.grad = None
        self._written.clear()

    # -- the user's loop ----------------------------------------------------------------------------------------------

    def capture_loop(self, reduction: str) -> None:
        """Capture per-sample gradients of every forward of the model, for :meth:`backward`."""
        self._reduction = reduction
        self.capture = Capture(self._parameters)
        self.capture.attach(self._require_model())
        self.capture.on_forward = self._probe_new_call
        self.capture.on_backward_end = self._after_foreign_backward

    def backward(self, losses: Tensor) -> None:
        """See :meth:`dpkit.PrivacyEngine.backward`."""
        if self.capture is None:
            raise OutOfOrder("engine.backward belongs to make_private; in the functional form call step(batch).")
        refuse_loss_shape(losses, self._in_hand().rows, self._reduction)
        self._refuse_unprobed()
        self._refuse_unused_release()
        refuse_foreign_leaves(losses, self._covered())
        draw = self.take_draw()
        self._differentiating = True
        try:
            self.capture.backward(losses)
        except BaseException:
            self.capture.reset()
            raise
        finally:
            self._differentiating = False
        self._finish(draw)

    def _after_foreign_backward(self) -> None:
        """A backward pass ended that may not have been ours: ``loss.backward()`` in the user's loop."""
        if self._differentiating or self.capture is None:
            return
        try:
            if self._reduction == "none":
                raise OutOfOrder(
                    "a backward pass went through an attached model without the engine (loss.backward(), "
                    "torch.autograd.grad); call engine.backward(losses) with one loss per example, or say "
                    'loss_reduction="mean" or "sum" in make_private. For other gradients, copy.deepcopy(model) is a '
                    "plain model."
                )
            self._in_hand()
            self._refuse_unprobed()
            self._refuse_unused_release()
            refuse_foreign_roots(self._covered())
            draw = self.take_draw()
        except BaseException:
            self.capture.reset()
            raise
        self._finish(draw)

    def _refuse_unprobed(self) -> None:
        if not self._went_through:
            raise CrossExample(
                "the batch in hand did not go through the attached model as a tensor with one row per example "
                f"({self._in_hand().rows} rows), so the neighbour probe could not tell whether examples influence each "
                "other. Pass the batch to the model as it came, or use the functional form: engine.attach(model, "
                "loss_fn, ...)."
            )

    def _covered(self) -> set[int]:
        """Ids of the leaves that a backward pass may reach."""
        anchor = [] if self.capture is None else [id(self.capture.anchor)]
        return {*anchor, *self._names}

    def _refuse_unused_release(self) -> None:
        """A release that was never stepped with is about to be overwritten."""
        kept = [p.grad for p in self._parameters.values() if p.grad is not None]
        if self._unused and self._written and kept and bool(kept[0].any()):
            raise OutOfOrder(
                "the gradient released before was not used: no optimizer.step() and no zero_grad() came after it, and "
                "the next release would overwrite it. dpkit does not accumulate over logical batches; a larger "
                "batch_size with max_physical_batch_size does what gradient accumulation is for."
            )

    def _finish(self, draw: Draw) -> None:
        assert self.capture is not None
        self.refuse_changes()
        self.clear_gradients()
        if not self.capture.pending:
            raise OutOfOrder(
                "the losses do not depend on any trainable parameter of the attached model; call the model itself with "
                "gradients enabled."
            )
        gradients = self.capture.collect(draw.rows)
        self.add(gradients, draw.real, scale=float(draw.rows) if self._reduction == "mean" else 1.0)
        if draw.last:
            self.release()
        else:
            self._failed = False

    def refuse_changes(self) -> None:
        """Refuse a model whose trainable parameters or batch statistics are not those that were attached."""
        model = self._require_model()
        refuse_batch_statistics(model)
        now = {id(p) for p in trainable(model).values()}
        if now != self._names.keys():
            names = [name for name, p in trainable(model).items() if id(p) not in self._names]
            raise UncoveredParameter(
                f"the trainable parameters changed after the engine was attached (new: {', '.join(names) or 'none'}), "
                "so what is clipped is not what is trained. Freeze or unfreeze before make_private."
            )

    # -- hooks --------------------------------------------------------------------------------------------------------

    def _watch(self, optimizer: torch.optim.Optimizer) -> None:
        """Check every optimizer step, and every gradient that reaches a parameter past the engine."""
        weak = weakref.ref(self)

        def before(stepped: torch.optim.Optimizer, args: Any, kwargs: Any) -> None:
            if (attachment := weak()) is not None:
                attachment._check_gradients(stepped)

        def after(stepped: torch.optim.Optimizer, args: Any, kwargs: Any) -> None:
            if (attachment := weak()) is not None:
                attachment._check_still(stepped)

        def arrived(parameter: Tensor) -> None:
            if (attachment := weak()) is not None:
                name = attachment._names[id(parameter)]
                parameter.grad = None
                raise RawGradient(
                    f"a gradient without clipping and noise reached parameter '{name}': something called backward past "
                    "the engine. Use engine.backward, and a copy.deepcopy of the model for gradients of other kinds."
                )

        self._handles = [
            optimizer.register_step_pre_hook(before),
            optimizer.register_step_post_hook(after),
            *(p.register_post_accumulate_grad_hook(arrived) for p in self._parameters.values()),
        ]

    def _check_gradients(self, optimizer: torch.optim.Optimizer) -> None:
        refuse_grad_scaler()
        moving = False
        for group in optimizer.param_groups:
            for parameter in group["params"]:
                if parameter.grad is None:
                    continue
                moving = True
                if self._written.get(id(parameter)) is not parameter.grad:
                    name = self._names.get(id(parameter), f"of shape {tuple(parameter.shape)}")
                    raise RawGradient(
                        f"the gradient of parameter '{name}' was not written by the engine. Change released gradients "
                        "in place (clip_grad_norm_ does), and let nothing else assign p.grad."
                    )
        # Between releases there are no gradients, and a step must not move anything.
        self._unused = self._unused and not moving
        self._versions = None if moving else {id(p): p._version for p in self._parameters.values()}

    def _check_still(self, optimizer: torch.optim.Optimizer) -> None:
        if self._versions is None:
            return
        moved = [name for name, p in self._parameters.items() if self._versions[id(p)] != p._version]
        self._versions = None
        if moved:
            raise UnsupportedOptimizer(
                f"{type(optimizer).__name__} moved parameter '{moved[0]}' in a step without gradients; "
                "between releases nothing may move. Use an optimizer that skips parameters whose gradient is None (all "
                "of torch.optim)."
            )

    def _probe_new_call(self, args: Any, kwargs: Any) -> None:
        """The neighbour probe, whenever a private batch is about to go through the model in a new way."""
        if self._draw is None or self.capture is None or not rows_of_examples((args, kwargs), self._draw.rows):
            return  # a forward of the user's own, on other data
        model = self._require_model()
        way = (training_mode(model), structure((args, kwargs)))
        if way not in self._probed:
            with self.capture.suspended():
                probe_forward(model, (args, kwargs), self._draw.rows)
            self._probed.add(way)
        self._went_through = True

    def _require_model(self) -> nn.Module:
        model = self._model()
        if model is None:
            raise OutOfOrder("the attached model no longer exists.")
        return model
