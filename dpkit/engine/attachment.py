"""The attachment: hooks on one model and one optimizer, and the order of events of one run.

States of a logical batch: drawn -> every microbatch differentiated once -> charged and released -> the next one may be
drawn. Any other order raises :class:`dpkit.errors.OutOfOrder` and releases nothing. Between two logical batches, and
only there, the run can be saved.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable, Hashable, Iterable, Mapping
from dataclasses import asdict
from typing import Any

import torch
from filelock import FileLock
from torch import Tensor, nn

from accounting import Bound, Ledger, PlanRecord, round_up
from accounting.ledger import with_releases_beside
from dpkit.callbacks import Callback, Setting, StepRecord
from dpkit.errors import (
    CheckpointError,
    CrossExample,
    InvalidArgument,
    OutOfOrder,
    RawGradient,
    UncoveredParameter,
    UnsupportedOptimizer,
)
from dpkit.gradients import Capture, PerSample, ghost, places_of, trainable
from dpkit.mechanisms import RunKey
from dpkit.metrics import ClippedCount
from dpkit.types import Named, Released

from .arguments import Place, listed
from .batch import structure
from .canaries import Canaries
from .checkpoint import Checkpoint
from .contents import ModelContents, optimizer_layout, same_bits
from .guards import (
    refuse_batch_statistics,
    refuse_foreign_leaves,
    refuse_foreign_roots,
    refuse_grad_scaler,
    refuse_loss_shape,
)
from .loader import Draw, PrivateLoader
from .memory import explained
from .plan import Plan
from .probe import probe_forward, training_mode
from .rows import left_behind, refuse_shared_outputs
from .step import NO_VALUES, BatchDiagnostics, ClippedAccumulator, StepState, release

REDUCTIONS = ("none", "mean", "sum")
_WHOLE = (torch.bool, torch.uint8, torch.int8, torch.int16, torch.int32, torch.int64)

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
      population: number of units of the data set.
      callbacks: who is told what happens.
      lock: of the run folder, held; given back when the attachment ends.
      canaries: made-up units that ride along, see :mod:`dpkit.engine.canaries`.
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
        population: int,
        callbacks: Iterable[Callback],
        lock: FileLock,
        canaries: Canaries | None = None,
    ) -> None:
        self.plan = plan
        self.population = population
        self.canaries = canaries
        self.capture: Capture | None = None
        self.batches: PrivateLoader | None = None
        self.steps_taken = 0
        self.steps_into_pass = 0
        self.nonprivate = BatchDiagnostics()
        self.between_steps: Callable[[], None] | None = None
        self.unrestored: frozenset[str] = frozenset()
        """States of a checkpoint that the user's objects have not taken over yet."""
        self.lock: FileLock | None = lock
        self._callbacks = tuple(callbacks)
        self._ended = False
        self._resumed_into_pass = 0
        self._pass: object = None
        self._model = weakref.ref(model)
        self._optimizer = weakref.ref(optimizer)
        self._parameters = parameters
        self._ledger = ledger
        self.record = record
        self._run_key = run_key
        self._microbatches = microbatches
        self._names = {id(p): name for name, p in parameters.items()}
        self._state = StepState.initial(plan, dict(parameters))
        self._questions = plan.questions(plan.setting(parameters))
        self._step = 0  # of the batch in hand, counted by charges
        self._values: dict[str, Tensor] = {}  # of the plan's metrics, for the batch in hand
        self.beside = tuple(known for known, _ in ledger.plans() if known.facts.get("beside") == record.plan_id)
        """Releases of their own that were charged beside the steps of this run, in an earlier process too."""
        self.released: dict[str, float] = {}
        """Estimates of the plan's metrics, as the last step released them."""
        self._draw: Draw | None = None  # handed out and not differentiated yet
        self._sum: ClippedAccumulator | None = None  # of a logical batch that is not released yet
        self._failed = False
        self._written: dict[int, Tensor] = {}  # id of a parameter -> the gradient that the engine gave it
        self._unused = False  # a release that no optimizer has stepped with
        self._reduction = "none"
        self._rows_per_unit = 1
        self._differentiating = False
        self._probed: dict[Hashable, tuple[Place, ...]] = {}  # way of calling the model -> where the batch is in it
        self._went_through = False  # the batch in hand, through the model in a way that was probed
        self._versions: dict[int, int] | None = None
        self._handles: list[Any] = []
        self._contents = ModelContents(model, parameters)
        if (earlier := _ATTACHMENTS.get(model)) is not None:
            earlier.detach()  # last of all that can fail: until here, the earlier one guards the model
        _ATTACHMENTS[model] = self
        self._watch(optimizer)

    def detach(self) -> None:
        """Leave model and optimizer as they were; this attachment takes no further step."""
        for handle in self._handles:
            handle.remove()
        self._handles = []
        if self.capture is not None:
            self.capture.detach()
        if (model := self._model()) is not None and _ATTACHMENTS.get(model) is self:
            del _ATTACHMENTS[model]
        self.end()

    def end(self) -> None:
        """Take no further step, and give the run folder back. The hooks stay: they refuse what is not private."""
        self._failed = True
        if self.lock is not None:
            self.lock.release()
        if not self._ended:
            self._ended = True
            for callback in self._callbacks:
                callback.on_end()

    # -- the order of events ------------------------------------------------------------------------------------------

    def begin_pass(self, mark: object, steps_per_pass: int) -> tuple[int, int]:
        """(public number of logical steps of the pass that begins: no more than the plan has left; the number of the
        first of them, which is that of the steps charged so far)."""
        if self._sum is not None and not self._failed:
            raise OutOfOrder(
                "a new pass over the loader began in the middle of a logical batch, whose microbatches would be lost "
                "or counted twice. Finish the pass, or break out of it only after a logical batch."
            )
        if self.capture is not None and self.capture.pending:
            self._failed = True  # a backward pass had begun and died: this is no batch that was only looked at
        self._forget()
        # A resumed run first ends the pass that was interrupted: what happens once a pass happens as often as ever.
        self._pass, self.steps_into_pass, self._resumed_into_pass = mark, self._resumed_into_pass, 0
        return max(0, min(steps_per_pass - self.steps_into_pass, self.steps_left)), self.charged

    def end_pass(self, mark: object) -> None:
        """The pass ended, or the loop was left: the next one begins anew."""
        if mark is self._pass:
            self.steps_into_pass = 0

    @property
    def charged(self) -> int:
        """Steps of this plan that were charged, as the ledger has them: nobody else counts."""
        found = self._ledger.find_plan(self.record.plan_id)
        return 0 if found is None else found[1]

    @property
    def steps_left(self) -> int:
        """Logical steps that the plan still pays for: redone ones were paid before."""
        return self.plan.steps - self.charged

    def receive(self, draw: Draw) -> None:
        """The loader hands out the next batch."""
        if self._failed:
            raise OutOfOrder(
                "an earlier batch of this run failed and was not released; going on without it would show that. Mend "
                "the cause and start a new run; what was charged stays charged."
            )
        if self.unrestored:
            raise OutOfOrder(
                f"the checkpoint holds the state of {', '.join(sorted(self.unrestored))}, which nothing has taken "
                "over; call engine.restore(name=object) with the objects that were saved, or enter "
                "engine.autosave(...) with them."
            )
        if self._draw is not None:
            raise OutOfOrder(
                "the next batch was drawn before engine.backward had seen the one before; leaving batches out shows "
                "which ones. Call engine.backward on every batch, and evaluate on a loader of your own."
            )
        if draw.mark is not self._pass:
            raise OutOfOrder(
                "the batch is of a pass that is over: another one has begun since, and the batches of the two would "
                "mix. Use one iterator over the loader at a time."
            )
        self._forget()
        if (self._sum is None) != (draw.microbatch == 0):
            raise OutOfOrder("microbatches of two logical batches would mix; iterate over one loader at a time.")
        if self._sum is None and self.between_steps is not None:
            self.between_steps()
        self._draw = draw
        if self.capture is not None:
            if self.capture.outputs is not None:
                self.capture.outputs = []
            self.capture.begin(draw.rows, rows=draw.rows * self._rows_per_unit)

    def _forget(self) -> None:
        """Nothing of a batch before the next one may still arrive."""
        self._draw = None
        self._values = {}
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
        self._step = draw.step
        self._failed = True  # until the batch is through: whatever happens in between ends the run
        return draw

    def open(
        self,
        real: int,
        scale: float = 1.0,
        *,
        labels: Tensor | None = None,
        values: Mapping[str, Tensor] = NO_VALUES,
    ) -> None:
        """A microbatch comes, of ``real`` units and padding; see :meth:`ClippedAccumulator.open`."""
        if self._sum is None:
            places: Named = dict(self._parameters) | ({} if self.canaries is None else self.canaries.place)
            self._sum = ClippedAccumulator(self.plan, self._state.rule, places, self._microbatches, self._questions)
        self._sum.open(real, scale, labels=labels, values=values)

    @property
    def consumer(self) -> ClippedAccumulator | None:
        """What clips groups of parameters inside the backward pass, if the rule can."""
        return None if self._sum is None else self._sum.consumer

    def add(self, gradients: PerSample, losses: Tensor | None = None) -> None:
        """Clip and add the per-sample gradients of one microbatch."""
        assert self._sum is not None
        self._sum.add(gradients, losses)

    def release(self) -> None:
        """Charge the logical batch, release it and write ``p.grad``."""
        if self._sum is None:
            raise OutOfOrder("there is nothing to release.")
        clipped, self._sum = self._sum, None
        self.nonprivate = clipped.diagnostics
        # Charge before release: a crash between these two lines over-counts, never under-counts.
        receipt = self._ledger.charge(self.record, self.plan.event)
        if receipt.step != self._step + 1:
            raise OutOfOrder(
                f"the batch was drawn for step {self._step + 1} of the plan, and the ledger has just charged step "
                f"{receipt.step}: something else charges this plan. Nothing was released."
            )
        if self.canaries is None:
            released = release(clipped.result(), self.plan, self._state, receipt, self._run_key)
        else:
            self.canaries.join(clipped, self._state.rule)
            result = clipped.result()
            released = release(result, self.plan, self._state, receipt, self._run_key, self.canaries.take)
        self.steps_taken += 1
        self.steps_into_pass += 1
        self._unused = True
        self._versions = None  # released inside a step, by a closure: the step may move
        for name, parameter in self._parameters.items():
            gradient = released.value[name].to(parameter.dtype)
            parameter.grad = gradient
            self._written[id(parameter)] = gradient
        self._show(released)
        self.released = {
            metric.name: metric.estimate(float(total[0]), self.plan.expected_batch)
            for metric, total in zip(self.plan.metrics, _last(released.queries, len(self.plan.metrics)), strict=True)
        }
        self._failed = False
        if self._callbacks:
            record = self.step_record()
            for callback in self._callbacks:
                callback.on_step(record)
                if self.released:
                    callback.on_metrics(record, dict(self.released))
            counts = {name: count for name, count in asdict(self.nonprivate).items() if count is not None}
            self._tell_nonprivate(record, counts)

    def _show(self, released: Released) -> None:
        """Tell an optimizer that asks for it what was released before the filters, and how noisy that is."""
        observe = getattr(self._optimizer(), "observe_release", None)
        if observe is not None:
            raw = released.value if released.raw is None else released.raw
            for name, parameter in self._parameters.items():
                # A copy: what the loop does to p.grad in place must not reach it.
                observe(parameter, raw[name].clone(), released.noise_std[name])

    def clear_gradients(self) -> None:
        """No gradients until the next release: an optimizer step in between moves nothing."""
        for parameter in self._parameters.values():
            parameter.grad = None
        self._written.clear()

    # -- callbacks ----------------------------------------------------------------------------------------------------

    def begin(self, dataset_name: str) -> None:
        """Tell the callbacks the public settings of the run."""
        plan, facts = self.plan, self.record.facts
        settings: dict[str, Setting] = {name: fact for name, fact in facts.items() if not isinstance(fact, list)}
        settings |= {
            "dataset_name": dataset_name,
            "steps": plan.steps,
            "num_examples": plan.num_examples,
            "delta": plan.delta,
            "unit": plan.unit,
            "relation": plan.relation.value,
        }
        for callback in self._callbacks:
            callback.on_begin(settings)

    def step_record(self) -> StepRecord:
        """Where the run stands: public."""
        optimizer = self._optimizer()
        rate = None if optimizer is None else optimizer.param_groups[0].get("lr")
        bound, delta = self.spent()
        return StepRecord(
            step=self.steps_taken,
            charged=self.charged,
            planned=self.plan.steps,
            epsilon=round_up(bound.upper),
            delta=delta,
            learning_rate=None if rate is None else float(rate),
        )

    def spent(self) -> tuple[Bound, float]:
        """(ε, δ) of the steps charged so far and of the releases beside them: basic composition, as in the ledger."""
        return with_releases_beside(self.record, self.charged, self.beside)

    def tell(self, metrics: Mapping[str, float]) -> None:
        """Give every callback numbers that the loop declared public or released."""
        record = self.step_record()
        for callback in self._callbacks:
            callback.on_metrics(record, metrics)

    def tell_nonprivate(self, values: Mapping[str, float]) -> None:
        """Give the callbacks that asked for it what is not private."""
        self._tell_nonprivate(self.step_record(), values)

    def _tell_nonprivate(self, record: StepRecord, values: Mapping[str, float]) -> None:
        for callback in self._callbacks:
            if callback.nonprivate:
                callback.on_nonprivate(record, values)

    # -- checkpoints --------------------------------------------------------------------------------------------------

    def states(self) -> dict[str, Any]:
        """What a checkpoint must hold of the engine's own: all of it public or released.

        Raises:
          OutOfOrder: in the middle of a logical batch, or when the optimizer has not used the last release.
          CheckpointError: the model holds something that may have been written from private data, or has diverged.
        """
        if self._failed or self._draw is not None or self._sum is not None:
            raise OutOfOrder(
                "a run can be saved between two logical batches only, and not after one that failed: call engine.save "
                "after optimizer.step() (and before the next batch is drawn), or use engine.autosave."
            )
        self._refuse_unused_release("what was paid for it would be lost when the run is resumed")
        model, optimizer = self._require_model(), self._require_optimizer()
        return {
            "model": self._contents.of(model),
            "optimizer": {"layout": optimizer_layout(optimizer, model), "state": optimizer.state_dict()},
            "rule": self._state.rule,
            "filters": self._state.filters,
        }

    def resume(self, checkpoint: Checkpoint) -> None:
        """Take over the parameters, the optimizer and all else that the checkpoint holds of the engine's own.

        Raises:
          CheckpointError: it is of another model or optimizer, or holds parameters from which nothing can be learnt.
        """
        if self._state.mechanism != ():
            raise CheckpointError(
                f"{self.plan.mechanism} remembers noise from step to step, which no checkpoint may hold; a run with it "
                "cannot be resumed. Start a new run, from the saved parameters if you like: both are charged."
            )
        if not self.plan.sampler.resumable:
            raise CheckpointError(
                f"{self.plan.sampler} drew something for the whole run, which no checkpoint holds; a run with it "
                "cannot be resumed. Start a new run, from the saved parameters if you like: both are charged."
            )
        model = self._require_model()
        load_model = self._contents.loading(model, checkpoint)
        self.resume_optimizer(checkpoint)
        load_model()
        self._state.rule = checkpoint.state("rule", like=self._state.rule)
        self._state.filters = checkpoint.state("filters", like=self._state.filters)
        self.steps_taken = checkpoint.manifest.steps_taken
        self._resumed_into_pass = checkpoint.manifest.steps_into_pass

    def resume_optimizer(self, checkpoint: Checkpoint) -> None:
        """Give the optimizer its state back.

        Raises:
          CheckpointError: it is another optimizer, or does not take its state.
        """
        optimizer = self._require_optimizer()
        layout = optimizer_layout(optimizer, self._require_model())
        checkpoint.load("optimizer", lambda saved: _load_optimizer(optimizer, layout, saved))

    # -- the user's loop ----------------------------------------------------------------------------------------------

    def capture_loop(self, reduction: str, rows_per_unit: int) -> None:
        """Capture per-sample gradients of every forward of the model, for :meth:`backward`."""
        self._reduction = reduction
        self._rows_per_unit = rows_per_unit
        model = self._require_model()
        memory = ghost.memory(model)
        self.capture = Capture(self._parameters, workspace=memory.workspace, layouts=memory.layouts)
        self.capture.attach(model)
        self.capture.on_forward = self._probe_new_call
        self.capture.on_backward_end = self._after_foreign_backward

    def backward(self, losses: Tensor, units: Tensor | None = None, labels: Tensor | None = None) -> None:
        """See :meth:`dpkit.PrivacyEngine.backward`."""
        if self.capture is None:
            raise OutOfOrder("engine.backward belongs to make_private; in the functional form call step(batch).")
        in_hand = self._in_hand()
        refuse_loss_shape(losses, in_hand.rows * self._rows_per_unit, self._reduction)
        places = self._places(units, in_hand.rows, losses)
        self._refuse_unprobed()
        self._refuse_unused_release("the next release would overwrite it")
        self.check_labels(labels, in_hand.rows)
        self._refuse_missing_metrics()
        refuse_foreign_leaves(losses, self._covered())
        tape, draw = self.capture.tape, self.take_draw()
        if self._reduction == "none" and self.capture.outputs is not None:
            tape.muted = True
            try:
                refuse_shared_outputs(losses, [*self.capture.outputs, *left_behind(self._require_model())])
            finally:
                tape.muted = False
            self.capture.outputs = None  # until the model is called in a new way
        self._open(draw, labels)
        self._differentiating = True
        with explained(draw.rows, self.capture.anchor.device, lambda: tape.activations):
            try:
                self.capture.backward(losses, places=places, consumer=self.consumer)
            except BaseException:
                self.capture.reset()
                raise
            finally:
                self._differentiating = False
            if self._reduction != "none":
                self._finish(draw)
            elif places is None or units is None:
                self._finish(draw, losses)
            else:
                self._finish(draw, losses.new_zeros(draw.rows).index_add(0, units, losses.detach()))

    def _places(self, units: Tensor | None, size: int, losses: Tensor) -> Tensor | None:
        """The rows of each unit, where the loop makes several."""
        if self._rows_per_unit == 1 and units is None:
            return None
        if units is None or not isinstance(units, Tensor) or units.shape != losses.shape:
            shape = None if units is None else tuple(getattr(units, "shape", ()))
            raise InvalidArgument(
                f"units is {shape} beside losses of shape {tuple(losses.shape)} with rows_per_unit="
                f"{self._rows_per_unit}; give the unit of each loss: engine.backward(losses, units=torch.arange(B)"
                ".repeat_interleave(rows_per_unit)), and rows_per_unit in make_private."
            )
        return places_of(units, size)

    def _open(self, draw: Draw, labels: Tensor | None = None) -> None:
        values, self._values = self._values, {}
        self.open(draw.real, float(draw.rows) if self._reduction == "mean" else 1.0, labels=labels, values=values)

    def check_labels(self, labels: Tensor | None, rows: int) -> None:
        """Refuse labels that the rule does not ask for, or that are not one whole number a unit.

        Raises:
          InvalidArgument: naming what was given.
        """
        needed = self.plan.clip.needs_labels
        if not needed and labels is None:
            return
        shape = tuple(labels.shape) if isinstance(labels, Tensor) else None
        if not needed or not isinstance(labels, Tensor) or shape != (rows,) or labels.dtype not in _WHOLE:
            raise InvalidArgument(
                f"labels is {type(labels).__name__} of shape {shape} for {rows} units, and {self.plan.clip} "
                + (
                    "needs one whole number for each unit: engine.backward(losses, labels=...)."
                    if needed
                    else "has no use for any; leave labels out."
                )
            )

    def give(self, name: str, values: Tensor) -> None:
        """Values of a metric of the plan, one for each unit of the batch in hand."""
        rows = self._in_hand().rows
        if not isinstance(values, Tensor) or values.shape != (rows,):
            shape = tuple(getattr(values, "shape", ()))
            raise InvalidArgument(
                f"the values of {name!r} have shape {shape}, and the batch has {rows} units; give one value for each, "
                "padding included."
            )
        if values.is_complex():
            raise InvalidArgument(f"the values of {name!r} are complex; give real numbers.")
        if name in self._values:
            raise OutOfOrder(f"the values of {name!r} were given for this batch already; each unit adds to it once.")
        self._values[name] = values.detach()

    def take_values(self) -> dict[str, Tensor]:
        """The values of the plan's metrics for the batch in hand, once.

        Raises:
          OutOfOrder: some of them were not given.
        """
        self._refuse_missing_metrics()
        values, self._values = self._values, {}
        return values

    def refuse_failed(self) -> None:
        """Refuse to go on after a batch that failed."""
        if self._failed:
            raise OutOfOrder(
                "an earlier batch of this run failed, or the engine was detached; nothing more is released. What was "
                "charged stays charged."
            )

    def _refuse_missing_metrics(self) -> None:
        asked = {metric.name for metric in self.plan.metrics if not isinstance(metric, ClippedCount)}
        if missing := sorted(asked - self._values.keys()):
            raise OutOfOrder(
                f"the plan releases {', '.join(missing)} in every step, and the batch in hand has no values of it; "
                "call engine.release_mean or engine.release_count before the backward pass."
            )

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
            self._refuse_missing_metrics()
            self.check_labels(None, 0)
            self._refuse_unprobed()
            self._refuse_unused_release("the next release would overwrite it")
            refuse_foreign_roots(self._covered())
            draw = self.take_draw()
            self._open(draw)
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

    def _refuse_unused_release(self, loss: str) -> None:
        """A release that was never stepped with is about to be lost; ``loss`` says how."""
        kept = [p.grad for p in self._parameters.values() if p.grad is not None]
        if self._unused and self._written and any(bool(gradient.any()) for gradient in kept):
            raise OutOfOrder(
                "the gradient released before was not used: no optimizer.step() and no zero_grad() came after it, and "
                f"{loss}. dpkit does not accumulate over logical batches; a larger batch_size with "
                "max_physical_batch_size does what gradient accumulation is for."
            )

    def _finish(self, draw: Draw, losses: Tensor | None = None) -> None:
        assert self.capture is not None
        self.refuse_changes()
        self.clear_gradients()
        if not self.capture.pending:
            raise OutOfOrder(
                "the losses do not depend on any trainable parameter of the attached model; call the model itself with "
                "gradients enabled."
            )
        gradients = self.capture.collect(draw.rows)
        self.add(gradients, losses)
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
        self._versions = None if moving else {id(p): p._version for p in self._parameters.values()}

    def _check_still(self, optimizer: torch.optim.Optimizer) -> None:
        if self._versions is None:
            self._unused = False  # only now: a step that was interrupted has not used the release
            return
        moved = [name for name, p in self._parameters.items() if self._versions[id(p)] != p._version]
        self._versions = None
        if moved:
            raise UnsupportedOptimizer(
                f"{type(optimizer).__name__} moved parameter '{moved[0]}' in a step without gradients; "
                "between releases nothing may move. Use an optimizer that skips parameters whose gradient is None (all "
                "of torch.optim)."
            )

    def _probe_new_call(self, args: Any, kwargs: Any) -> list[Tensor] | None:
        """The neighbour probe, whenever a private batch is about to go through the model in a new way.

        Returns: the tensors of the call that are of the batch; None for a forward of the user's own, on other data.
        """
        if self._draw is None or self.capture is None:
            return None
        model, call, rows = self._require_model(), (args, kwargs), self._draw.rows * self._rows_per_unit
        way = (training_mode(model), structure(call))
        places = self._probed.get(way)
        if places is None:
            with self.capture.suspended():
                places = probe_forward(model, call, rows)
            if places:
                self._probed[way] = places
                if self.capture.outputs is None and self._reduction == "none":
                    self.capture.outputs = []
        found = listed(call)
        if not places or any(found[place.number].shape[place.axis] != rows for place in places):
            return None
        self._went_through = True
        return [found[place.number] for place in places]

    def _require_model(self) -> nn.Module:
        model = self._model()
        if model is None:
            raise OutOfOrder("the attached model no longer exists.")
        return model

    def _require_optimizer(self) -> torch.optim.Optimizer:
        optimizer = self._optimizer()
        if optimizer is None:
            raise OutOfOrder("the attached optimizer no longer exists.")
        return optimizer


def _last(queries: tuple[Tensor, ...], count: int) -> tuple[Tensor, ...]:
    return queries[len(queries) - count :]


def attached_to(model: nn.Module) -> Attachment | None:
    """The attachment that guards ``model``, if there is one."""
    return _ATTACHMENTS.get(model)


def _load_optimizer(optimizer: torch.optim.Optimizer, layout: dict[str, Any], saved: dict[str, Any]) -> None:
    if saved["layout"] != layout:
        raise ValueError(f"it was of {saved['layout']}, and this one is {layout}")
    optimizer.load_state_dict(saved["state"])
    now = optimizer.state_dict()["state"]
    for index, values in saved["state"]["state"].items():
        for name, value in values.items():
            # load_state_dict casts to the parameter's type, which may be shorter than what the optimizer kept.
            if isinstance(value, Tensor) and not same_bits(value, now[index][name]):
                raise ValueError(f"{type(optimizer).__name__} does not take its own {name!r} back exactly")
