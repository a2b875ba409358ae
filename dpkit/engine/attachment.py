"""The attachment: hooks on one model and one optimizer, and the order of events of one run.

States of a logical batch: drawn -> every microbatch differentiated once -> charged and released -> the next one may be
drawn. Any other order raises :class:`dpkit.errors.OutOfOrder` and releases nothing.
"""

from __future__ import annotations

import weakref
from typing import Any

import torch
from torch import Tensor, nn

from accounting import Ledger, PlanRecord
from dpkit.errors import InvalidArgument, OutOfOrder, RawGradient, UncoveredParameter, UnsupportedOptimizer
from dpkit.gradients import Capture, PerSample, trainable
from dpkit.mechanisms import RunKey

from .guards import refuse_batch_statistics, refuse_foreign_leaves, refuse_grad_scaler, refuse_loss_shape
from .loader import Draw, PrivateLoader
from .plan import Plan
from .probe import probe_forward
from .step import BatchDiagnostics, ClippedAccumulator, StepState, release

REDUCTIONS = ("none", "mean", "sum")


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
        self._model = model
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
        self._reduction = "none"
        self._differentiating = False
        self._watch(optimizer)

    # -- the order of events ------------------------------------------------------------------------------------------

    def begin_pass(self, steps_per_pass: int) -> int:
        """Public number of logical steps of the pass that begins: no more than the plan has left."""
        if self._sum is not None and not self._failed:
            raise OutOfOrder(
                "a new pass over the loader began in the middle of a logical batch, whose microbatches would be lost "
                "or counted twice. Finish the pass, or break out of it only after a logical batch."
            )
        self._draw = None  # a batch that was only looked at: nothing of it was used
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
        if (self._sum is None) != (draw.microbatch == 0):
            raise OutOfOrder("microbatches of two logical batches would mix; iterate over one loader at a time.")
        self._draw = draw

    def take_draw(self) -> Draw:
        """The batch in hand, once."""
        if self._draw is None:
            raise OutOfOrder(
                "there is no private batch to differentiate: it was used already (add the losses of one batch before "
                "engine.backward; a closure may be evaluated once a step), or it did not come from the private loader."
            )
        draw, self._draw = self._draw, None
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
        if reduction not in REDUCTIONS:
            raise InvalidArgument(f"loss_reduction is {reduction!r}; it is one of {', '.join(map(repr, REDUCTIONS))}.")
        self._reduction = reduction
        self.capture = Capture(self._parameters)
        self.capture.attach(self._model)
        self.capture.on_forward = self._probe_first_call
        self.capture.on_backward_end = self._after_foreign_backward

    def backward(self, losses: Tensor) -> None:
        """See :meth:`dpkit.PrivacyEngine.backward`."""
        if self.capture is None:
            raise OutOfOrder("engine.backward belongs to make_private; in the functional form call step(batch).")
        draw = self.take_draw()
        refuse_loss_shape(losses, draw.rows, self._reduction)
        refuse_foreign_leaves(losses, {id(self.capture.anchor), *self._names})
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
        if self._reduction == "none":
            self.capture.reset()
            raise OutOfOrder(
                "loss.backward() was called on an attached model; call engine.backward(losses) with one loss per "
                'example, or say loss_reduction="mean" or "sum" in make_private.'
            )
        self._finish(self.take_draw())

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
        refuse_batch_statistics(self._model)
        now = {id(p) for p in trainable(self._model).values()}
        if now != self._names.keys():
            names = [name for name, p in trainable(self._model).items() if id(p) not in self._names]
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

        optimizer.register_step_pre_hook(before)
        optimizer.register_step_post_hook(after)
        for parameter in self._parameters.values():
            parameter.register_post_accumulate_grad_hook(arrived)
        self._versions: dict[int, int] | None = None

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

    def _probe_first_call(self, args: Any, kwargs: Any) -> None:
        """The neighbour probe, when the first private batch shows how the model is called."""
        if self._draw is None or self.capture is None:
            return  # a forward of the user's own, outside the loop
        self.capture.on_forward = None
        with self.capture.suspended():
            probe_forward(self._model, (args, kwargs), self._draw.rows)
