"""The privacy engine: attaches to a model, an optimizer and a loader, and owns the order of events.

Guarantees:
  * What reaches ``p.grad`` of an attached model has passed clip, charge and mechanism, in that order (Laws 1, 5 and 7).
  * A unit adds to one release once: a batch is differentiated once, a logical batch is released once, and drawing the
    next one before that is refused (Law 6).
  * Nothing that the user's loop can count depends on the data: one ``backward`` per batch handed out, public numbers of
    batches (Law 11).
  * A run can be killed at any instant and resumed from a checkpoint: what was charged stays charged, steps taken again
    are paid again, and no key is used again. One process at a time trains in a run folder.
  * Copies and pickles of the model are plain models. The model itself stays attached until ``engine.detach()``: losing
    the engine must not turn a private loop into one without privacy.

Requires: numbers in the plan that are public, a data set that holds each unit once, and a loop and ``collate_fn`` that
treat each row by itself.
Why: batch, gradients, charge and release meet in one attachment, which knows one order of events; every other order is
refused. ``plan.py`` and ``step.py`` have the sums, ``mechanisms`` and ``accounting`` what they cost.

Not promised: what the user's own loop and ``collate_fn`` do. A loss or a collation that mixes examples, rows that are
reordered, a weighted mean under ``loss_reduction="mean"``, or other data than the batch handed out are beyond the
neighbour probe, which sees the model (in the functional form the loss as well); the statement lists what is assumed.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Hashable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, Literal, TypeVar, cast

import torch
from filelock import FileLock
from torch import Tensor, nn
from torch.utils.data import DataLoader, default_collate

import accounting
from accounting import Budget, Ledger, PlanRecord, Relation, Statement
from dpkit.callbacks import Callback
from dpkit.clipping import ClipRule, Flat
from dpkit.errors import BudgetExceeded, CheckpointError, InvalidArgument, LedgerError, OutOfOrder
from dpkit.filters import Filter
from dpkit.gradients import Backend, ghost, trainable
from dpkit.mechanisms import DiscreteGaussian, Gaussian, HardenedGaussian, Mechanism, RunKey, Tier
from dpkit.metrics import Count, Mean, Metric
from dpkit.run_folder import RunFolder
from dpkit.sampling import Poisson, Sampler, TruncatedPoisson, unit_of
from dpkit.types import ClippedSum, Query

from . import checkpoint as checkpoints
from .attachment import Attachment, attached_to, check_reduction
from .autosave import Autosave
from .batch import Batch, take
from .calibration import choose_mechanism
from .canaries import Canaries
from .checkpoint import Checkpoint, Manifest
from .guards import refuse_model, refuse_optimizer
from .loader import Draws, Loading, PrivateLoader, filled, microbatch_rows
from .memory import explained
from .plan import LARGEST_EXCESS, Plan, check_count, check_member, check_number, steps_per_epoch
from .probe import probe_loss, training_mode
from .record import continued, plan_record, query_record
from .step import BatchDiagnostics

Model = TypeVar("Model", bound=nn.Module)
Optimizer = TypeVar("Optimizer", bound=torch.optim.Optimizer)
LossFunction = Callable[[Any, Batch], Tensor]
Reduction = Literal["none", "mean", "sum"]

_LEAST_BUDGET = 1e-9
"""Of a ledger that is opened for a plan whose noise is so large that its epsilon rounds to 0."""
_LEFT_BY_A_RUN = ("nonprivate", checkpoints.FOLDER, "metrics.jsonl", "result.json")
_COLLATE_CAVEAT = "Assumed: collate_fn turns each example into one row that depends on that example alone, in order."
_LOOP_CAVEAT = (
    f"{_COLLATE_CAVEAT} The training loop computes one loss per row from that row alone, on the batch that it was "
    f"handed, "
    "and uses the data in no other way. The loop is the user's own and was not inspected."
)


class PrivacyEngine:
    """One training run under differential privacy. For guarantee, requirements and proof see the module.

    Args:
      run_dir: folder of this run; made if missing. Holds ``ledger.sqlite`` unless ``ledger`` says otherwise.
      ledger: path of the ledger, when several runs on one data set share it.
      dataset_name: the name under which the data set's budget is kept, typed by you. It defaults to the run folder's
        name and must be given with ``ledger``.
      budget: the (ε, δ) with which a new ledger is opened; defaults to what the first plan costs. An existing ledger
        keeps its own.
      seed: None (the default) takes all randomness of sampling and noise from the operating system. A number makes a
        run repeatable and not certified.
      callbacks: who is told what happens, see :mod:`dpkit.callbacks`.
    Raises:
      InvalidArgument: when ``ledger`` is given without ``dataset_name``.
      RunFolderError: when ``run_dir`` is no folder.
      LedgerError: when the ledger exists and cannot be trusted, or a used run folder has lost it.
    """

    def __init__(
        self,
        run_dir: str | Path,
        *,
        ledger: str | Path | None = None,
        dataset_name: str | None = None,
        budget: Budget | None = None,
        seed: int | None = None,
        callbacks: Sequence[Callback] = (),
    ) -> None:
        if ledger is not None and dataset_name is None:
            raise InvalidArgument(
                "a ledger belongs to one named data set; pass dataset_name= together with ledger=, the same name in "
                "every run on that data set."
            )
        self._folder = RunFolder(run_dir)
        self.run_dir = self._folder.path
        self._ledger_path = Path(ledger) if ledger is not None else self.run_dir / "ledger.sqlite"
        self._dataset_name = dataset_name if dataset_name is not None else self.run_dir.resolve().name
        self._budget = budget
        self._run_key = RunKey(seed)
        self._callbacks = tuple(callbacks)
        self._checkpoint: Checkpoint | None = None
        self._restored = False
        self._ledger: Ledger | None = None
        if self._ledger_path.exists():
            self._ledger = Ledger.open(self._ledger_path, dataset_name=self._dataset_name)
        elif any(self._folder.exists(name) for name in _LEFT_BY_A_RUN):
            raise LedgerError(
                f"{self.run_dir} was used by an earlier run and its ledger {self._ledger_path} is gone, so what was "
                "spent on this data is unknown. Put the ledger back, or start in a new folder knowing that the earlier "
                "run counts."
            )
        self._attached: Attachment | None = None

    @classmethod
    def resume(
        cls,
        run_dir: str | Path,
        *,
        checkpoint: str | None = None,
        ledger: str | Path | None = None,
        dataset_name: str | None = None,
        seed: int | None = None,
        callbacks: Sequence[Callback] = (),
    ) -> PrivacyEngine:
        """The engine of a run that stopped, ready to go on from a checkpoint.

        Make the model, optimizer and loader as in the first run and attach with the same call to :meth:`make_private`
        or :meth:`attach`: parameters, optimizer, clipping rule and filters are then those of the checkpoint, and the
        loader goes on in the pass that was interrupted. Your own objects follow with :meth:`restore` or
        :meth:`autosave`.

        The ledger decides what may still be done. Steps that were charged after the checkpoint stay charged, so a run
        that was killed ends with as many fewer steps (:attr:`steps_left`).

        Guarantee: what was charged stays charged, and no noise and no draw is repeated.
        Requires: the newest ledger of the run, which its checkpoint, the note beside it and your own anchors tell. A
        copy of a run folder has a ledger of its own, which knows nothing of what the original spends: go on in one.
        Why: sampling and noise use fresh keys; a checkpoint's anchor must be in the ledger, and the ledger counts.

        Args:
          checkpoint: name of a file in ``RUN/checkpoints``; the newest when left out.
          ledger, dataset_name, seed, callbacks: as for a new engine; the data set's name is known from the checkpoint.
        Raises:
          CheckpointError: there is no checkpoint, or it is damaged, or of another data set.
          LedgerError: the ledger is missing, cannot be trusted, or is older than the checkpoint.
          RunFolderError: the run folder or the checkpoint cannot be read, or the name leads out of the folder.
        """
        folder = RunFolder(run_dir)
        saved = checkpoints.read(folder, checkpoints.newest(folder) if checkpoint is None else checkpoint)
        manifest = saved.manifest
        if dataset_name is not None and dataset_name != manifest.dataset_name:
            raise CheckpointError(
                f"the checkpoint {saved.name} is of a run on the data set {manifest.dataset_name!r}, not on "
                f"{dataset_name!r}. What a run learnt about one data set cannot be charged to another: start a new run."
            )
        engine = cls(run_dir, ledger=ledger, dataset_name=manifest.dataset_name, seed=seed, callbacks=callbacks)
        if engine._ledger is None:
            raise LedgerError(
                f"{engine._ledger_path} is missing, and what was spent is known from the ledger alone. Put it back, or "
                "pass ledger= if the run used a ledger elsewhere."
            )
        engine._ledger.check_anchor(manifest.anchor_sequence, manifest.anchor_digest)
        engine._checkpoint = saved
        engine._refuse_other_run()
        return engine

    # -- attaching ----------------------------------------------------------------------------------------------------

    def make_private(
        self,
        model: Model,
        optimizer: Optimizer,
        loader: DataLoader[Any],
        *,
        target_delta: float,
        target_epsilon: float | None = None,
        noise_multiplier: float | None = None,
        mechanism: Mechanism | Callable[[float], Mechanism] | None = None,
        sampler: Sampler | None = None,
        epochs: int | None = None,
        steps: int | None = None,
        max_grad_norm: float | None = None,
        clipping: ClipRule | None = None,
        filters: Sequence[Filter] = (),
        metrics: Sequence[Metric] = (),
        num_examples: int | None = None,
        unit: str | None = None,
        relation: Relation | None = None,
        max_physical_batch_size: int | None = None,
        loss_reduction: Reduction = "none",
        rows_per_unit: int = 1,
        probe_batch: Batch | None = None,
        canaries: Canaries | None = None,
    ) -> tuple[Model, Optimizer, PrivateLoader]:
        """Attach to a training loop that exists. The same model and optimizer come back, with a private loader.

        Unless the engine was given a seed, the global generators of torch, Python and numpy get a secret state, so that
        nobody knows what dropout and augmentations draw: a ``torch.manual_seed`` before this call serves the
        initialisation of the model, and one after it would undo that. The loader's own ``generator`` is not used.

        Guarantee: what later reaches ``p.grad`` is private as the plan says that these arguments make. In here nothing
        is charged, and of the data nothing decides but its size and the structure of one item.
        Requires: a loop that keeps to what the statement lists as assumed; a public ``num_examples``, or none.
        Why: what the engine cannot cover is refused here, by name; :class:`~dpkit.engine.plan.Plan` and
        :meth:`backward` have the rest.

        Args:
          model: trainable parameters must all have per-sample gradient rules.
          optimizer: any optimizer that moves by ``p.grad`` alone.
          loader: its ``batch_size`` becomes the expected batch size; collate_fn, workers and pinning are kept.
          target_delta: δ.
          target_epsilon: ε to stay within after all steps; or give ``noise_multiplier``, or a ``mechanism``. Together
            with a target, ``mechanism`` is a function that makes one of the noise multiplier that is found.
          sampler: how batches are drawn; Poisson sampling at batch_size / N where it is left out.
          epochs: passes over the data, each of ceil(N / batch_size) logical steps; or give ``steps``.
          max_grad_norm: C of flat clipping; or give a ``clipping`` rule.
          filters: post-processing of what was released, before the optimizer sees it.
          metrics: numbers that are released in every step beside the gradient; see :meth:`release_mean`.
          num_examples: the public N. Left out, ``len(dataset)`` is declared public and the relation is zero-out.
          unit: what one item of the data set stands for: "example", or "user" where it is :class:`dpkit.Users`.
          relation: neighbouring relation; add/remove when N is given.
          max_physical_batch_size: cut each logical batch into a public number of microbatches of this size. Batches are
            then drawn by truncated Poisson sampling with cap B + 6√B, and accounted as that.
          loss_reduction: "none" for ``engine.backward(losses)`` with one loss per example, the documented way; "mean"
            or "sum" when the loop reduces the loss itself, with ``engine.backward(loss)`` or ``loss.backward()``.
          rows_per_unit: rows that the loop makes of each example before it calls the model (augmentations, the examples
            of a user): the model then sees that many times the rows of the batch, and ``engine.backward(losses,
            units=...)`` says which example each of them belongs to.
          probe_batch: a public or synthetic batch as ``collate_fn`` returns it; gives the structure of a batch when the
            data set is empty.
          canaries: made-up units that ride along for an audit of this run: ``dpkit.audit.Canaries``.
        Raises:
          dpkit.errors.Refused: when something would break the guarantee; the message names it and the way out.
          dpkit.errors.InvalidArgument: for values outside their domain.
          accounting.TargetUnreachable: when no noise reaches ``target_epsilon``.
          accounting.BudgetExceeded: when the plan does not fit into what the ledger has left.
        """
        loading = Loading.of(loader)
        loading.check()
        for name, count in (("num_examples", num_examples), ("epochs", epochs), ("steps", steps)):
            if count is not None:
                check_count(name, count)
        batch_size = loader.batch_size or 1
        public_n = len(loading.dataset) if num_examples is None else num_examples
        if public_n < 1:
            raise InvalidArgument(
                f"num_examples is {public_n}; it is the public size of the data set, at least 1: there is nothing to "
                "train on."
            )
        if relation is None:
            relation = Relation.ZERO_OUT if num_examples is None else Relation.ADD_REMOVE
        elif relation == Relation.ADD_REMOVE and num_examples is None:
            raise InvalidArgument(
                "under the add/remove relation the size of the data set is private, and without num_examples all else "
                "would be derived from it; give num_examples, a public number."
            )
        if (epochs is None) == (steps is None):
            raise InvalidArgument(f"epochs is {epochs} and steps is {steps}; give exactly one of them.")
        if (max_grad_norm is None) == (clipping is None):
            raise InvalidArgument(
                f"max_grad_norm is {max_grad_norm} and clipping is {clipping}; give exactly one of them."
            )
        if clipping is None:
            check_number("max_grad_norm", max_grad_norm)
            clipping = Flat(float(max_grad_norm or 0.0))
        per_pass = steps_per_epoch(public_n, batch_size)
        sample_rate = min(1.0, batch_size / public_n)
        rows = None if max_physical_batch_size is None else microbatch_rows(max_physical_batch_size)
        if sampler is not None:
            check_member("sampler", sampler, Sampler)
            sampler.check(len(loading.dataset), public_n)
            _refuse_other_batch_size(sampler, batch_size, public_n)
        elif rows is None:
            sampler = Poisson(sample_rate)
        else:
            sampler = TruncatedPoisson(sample_rate, TruncatedPoisson.cap_for(sample_rate * public_n))
        total = steps if steps is not None else (epochs or 0) * per_pass

        def plan_with(chosen: Mechanism) -> Plan:
            return Plan(
                sampler=sampler,
                clip=clipping,
                mechanism=chosen,
                steps=total,
                num_examples=public_n,
                delta=target_delta,
                filters=cast(Any, filters),  # the plan refuses what is no tuple of them
                metrics=cast(Any, metrics),
                unit=unit or unit_of(loading.dataset) or "example",
                relation=relation,
            )

        plan = plan_with(
            choose_mechanism(
                target_epsilon,
                noise_multiplier,
                mechanism,
                plan_with,
                resumed=None if self._checkpoint is None else self._checkpoint.manifest.plan,
            )
        )
        draws = Draws(plan.sampler, len(loading.dataset), self._run_key, rows)
        template = loading.template(probe_batch)
        check_reduction(loss_reduction)
        check_count("rows_per_unit", rows_per_unit)
        if rows_per_unit < 1 or (rows_per_unit > 1 and loss_reduction != "none"):
            raise InvalidArgument(
                f"rows_per_unit is {rows_per_unit} with loss_reduction={loss_reduction!r}; it is at least 1, and "
                'several rows of a unit need one loss for each, loss_reduction="none".'
            )
        attached = self._attach(
            model,
            optimizer,
            plan,
            loading,
            draws.microbatches,
            target_epsilon=target_epsilon,
            caveats=[_LOOP_CAVEAT],
            canaries=canaries,
        )
        attached.capture_loop(loss_reduction, rows_per_unit)
        private_loader = PrivateLoader(
            loading,
            draws,
            template,
            microbatch_size=rows,
            steps_per_pass=per_pass,
            begin_pass=lambda mark: attached.begin_pass(mark, per_pass),
            end_pass=attached.end_pass,
            announce=attached.receive,
        )
        return model, optimizer, private_loader

    def attach(
        self,
        model: nn.Module,
        loss_fn: LossFunction,
        optimizer: torch.optim.Optimizer,
        *,
        plan: Plan,
        dataset: Any,
        backend: Backend = ghost,
        collate_fn: Callable[[list[Any]], Batch] = default_collate,
        max_physical_batch_size: int | None = None,
        labels: Callable[[Batch], Tensor] | None = None,
        probe_batch: Batch | None = None,
        canaries: Canaries | None = None,
    ) -> Callable[[Batch], None]:
        """The functional form: a step function for a loop written from scratch.

        ``for batch in engine.batches(): step(batch)`` trains for ``plan.steps`` steps. The step cuts the batch into
        microbatches of ``max_physical_batch_size`` rows itself, so that it needs no truncation.

        Guarantee: as of :meth:`make_private`, and ``loss_fn`` has passed the neighbour probe as well.
        Requires: a ``collate_fn`` that keeps rows apart and in order, a plan whose numbers are public.
        Why: as of :meth:`make_private`; in here the step does what :meth:`backward` does.

        Args:
          loss_fn: ``loss_fn(model, batch) -> (B,)``, one loss per example.
          labels: ``labels(batch) -> (B,)``, the label of each unit, for a clipping rule that needs them.
          backend: ``dpkit.ghost`` (book-keeping) or ``dpkit.vmap`` (functorch; slower, takes any differentiable model).
          probe_batch: a public batch for the neighbour probe; left out, a synthetic one is made.
          canaries: made-up units that ride along for an audit of this run: ``dpkit.audit.Canaries``.
        Returns: ``step(batch)``, which clips, charges, releases and steps the optimizer.
        Raises:
          dpkit.errors.Refused: when something would break the guarantee; the message names it and the way out.
          accounting.BudgetExceeded: when the plan does not fit into what the ledger has left.
        """
        if (labels is not None) != plan.clip.needs_labels:
            raise InvalidArgument(
                f"labels is {labels}, and {plan.clip} "
                + (
                    "needs the label of each unit: labels=lambda batch: ..."
                    if labels is None
                    else "has no use for any."
                )
            )
        loading = Loading(dataset, collate_fn)
        loading.check()
        largest = filled(plan.sampler.largest_batch(LARGEST_EXCESS * plan.num_examples))
        chunk = largest if max_physical_batch_size is None else microbatch_rows(max_physical_batch_size)
        template = loading.template(probe_batch)
        probed: set[Hashable] = set()

        def probe_new_mode() -> None:
            if (mode := training_mode(model)) not in probed:
                probe_loss(model, loss_fn, template if probe_batch is None else probe_batch, backend)
                probed.add(mode)

        probe_new_mode()
        attached = self._attach(
            model, optimizer, plan, loading, -(-largest // chunk), caveats=[_COLLATE_CAVEAT], canaries=canaries
        )
        attached.batches = PrivateLoader(
            loading,
            Draws(plan.sampler, len(dataset), self._run_key, None),
            template,
            microbatch_size=None,
            steps_per_pass=plan.steps,
            begin_pass=lambda mark: attached.begin_pass(mark, plan.steps),
            end_pass=attached.end_pass,
            announce=attached.receive,
        )

        device = next(iter(trainable(model).values())).device

        def step(batch: Batch) -> None:
            values = attached.take_values()
            draw = attached.take_draw()
            attached.refuse_changes()
            probe_new_mode()
            of_units = None if labels is None else labels(batch)
            attached.check_labels(of_units, draw.rows)
            for start in range(0, draw.rows, chunk):
                rows = slice(start, min(start + chunk, draw.rows))
                size = rows.stop - rows.start
                attached.open(
                    min(max(draw.real - start, 0), size),
                    labels=None if of_units is None else of_units[rows],
                    values={name: given[rows] for name, given in values.items()},
                )
                with explained(size, device):
                    if backend is ghost:
                        gradients, losses = ghost.per_sample(
                            model, loss_fn, take(batch, rows), size, consumer=attached.consumer
                        )
                    else:
                        gradients, losses = backend.per_sample(model, loss_fn, take(batch, rows), size)
                    attached.add(gradients, losses)
            attached.release()
            optimizer.step()

        return step

    def batches(self) -> Iterator[Batch]:
        """Logical batches of the functional form, ``plan.steps`` of them over the life of the engine."""
        if self._attached is None or self._attached.batches is None:
            raise OutOfOrder("engine.batches() belongs to the functional form; call engine.attach first.")
        return iter(self._attached.batches)

    # -- the loop -----------------------------------------------------------------------------------------------------

    def backward(self, losses: Tensor, *, units: Tensor | None = None, labels: Tensor | None = None) -> None:
        """Differentiate, clip and, with the last microbatch of a logical batch, charge and release into ``p.grad``.

        Guarantee: ``p.grad`` holds a release that was charged, durably, before its noise was drawn; or an error is
        raised and nothing was released.
        Requires: ``losses`` whose row b was computed from row b alone, on the batch in hand (tested once, on one batch,
        between the model's outputs and the losses); units and labels that are right, which nobody can check.
        Why: units are joined before the clip, the sum is a :class:`~dpkit.engine.step.ClippedAccumulator`'s, and
        :func:`~dpkit.engine.step.release` gives noise for the receipt of the charge alone.

        Args:
          losses: (B,), one loss per row of the batch in hand; or the mean or sum of them, as ``loss_reduction``
            says.
          units: with ``rows_per_unit`` = K > 1, losses is (K·B,) and units (K·B,) says for each of them from which row
            of the batch in hand, 0 to B - 1, it was made: ``torch.arange(B).repeat_interleave(K)``. The gradients of
            one unit are added up before they are clipped.
          labels: (B,) the label of each unit, 0, 1, .., for a clipping rule that needs them (``GroupAdaptive``).
        Raises:
          LossShape: when the shape is another one.
          OutOfOrder: without a batch from the private loader, or a second time for one batch.
          UncoveredParameter: when the losses depend on a trainable tensor that the engine does not cover.
          accounting.BudgetExceeded, accounting.LedgerError: nothing was released.
        """
        self._require_attached().backward(losses, units, labels)

    # -- metrics of the training data ---------------------------------------------------------------------------------

    def release_mean(
        self,
        name: str,
        values: Tensor,
        *,
        lower: float | None = None,
        upper: float | None = None,
        noise_multiplier: float | None = None,
    ) -> float | None:
        """Release the mean of a bounded number over the training data, such as a loss, with noise.

        With a name that the plan's ``metrics`` hold, the mean is released in the event of the step: give ``values``
        (B,), one for each unit of the batch in hand, before the backward pass, and read the estimate from
        :attr:`released` after it. Returns None.

        With another name it is a release of its own, charged as a plan of its own in the ledger, which must have room
        for it (``budget=``): ``values`` holds one number for every unit of the whole data set. Returns the estimate.

        Guarantee: the estimate was paid for before its noise was drawn, in the step's event or in a plan of its own.
        Requires: the value of each unit depends on that unit alone. Nobody can check this; the statement says so.
        Why: values are clamped and centred (``dpkit.metrics``), so that one unit moves their sum by half the range.

        Args:
          values: clamped to the range; NaN adds nothing.
          lower, upper: the range, of a release of its own.
          noise_multiplier: of a release of its own: standard deviation of the noise / sensitivity of the sum.
        Raises:
          InvalidArgument: values of another shape, or arguments that do not belong to this kind of release.
          OutOfOrder: no batch is in hand, or it has these values already.
          accounting.BudgetExceeded: the ledger has no room for it; nothing was released.
        """
        if self._joins(name, Mean, (lower, upper, noise_multiplier)):
            self._require_attached().give(name, values)
            return None
        if lower is None or upper is None:
            raise InvalidArgument(
                f"{name!r} is no metric of the plan, so its mean is a release of its own: give lower= and upper=, the "
                "range of its values, and noise_multiplier=."
            )
        return self._release_alone(Mean(name, 1.0, lower, upper), values, noise_multiplier)

    def release_count(self, name: str, values: Tensor, *, noise_multiplier: float | None = None) -> float | None:
        """Release how many units have a property, such as being classified correctly, with noise.

        As :meth:`release_mean`: with a name of the plan's ``metrics``, ``values`` (B,) says of each unit of the batch
        in hand whether it has the property; otherwise of every unit of the whole data set.

        Guarantee, Requires, Why: as of :meth:`release_mean`; a unit moves the count by ½ around the middle.

        Args:
          values: boolean, or numbers of which 0 means no.
          noise_multiplier: of a release of its own: standard deviation of the noise / sensitivity of the count.
        Raises: as :meth:`release_mean`.
        """
        if self._joins(name, Count, (noise_multiplier,)):
            self._require_attached().give(name, values)
            return None
        return self._release_alone(Count(name, 1.0), values, noise_multiplier)

    @property
    def released(self) -> dict[str, float]:
        """Estimates of the plan's metrics as the last step released them, by name. They may be shown."""
        return dict(self._require_attached().released)

    def _joins(self, name: str, kind: type[Metric], given: tuple[float | None, ...]) -> bool:
        """Whether ``name`` is a metric of the plan, released with every step."""
        found = [metric for metric in self.plan.metrics if metric.name == name]
        if found and (not isinstance(found[0], kind) or any(value is not None for value in given)):
            raise InvalidArgument(
                f"{name!r} is {found[0]} in the plan, which fixes its kind, range and noise; give its values only, or "
                "release something else under another name."
            )
        return bool(found)

    def _release_alone(self, metric: Mean | Count, values: Tensor, noise_multiplier: float | None) -> float:
        attached = self._require_attached()
        attached.refuse_failed()
        if noise_multiplier is None:
            raise InvalidArgument(
                f"{metric.name!r} is no metric of the plan, so it is a release of its own: give noise_multiplier=."
            )
        if not isinstance(values, Tensor) or values.shape != (attached.population,):
            # Without the number of units, which the add/remove relation hides.
            raise InvalidArgument(
                f"the values of {metric.name!r} have shape {tuple(getattr(values, 'shape', ()))}; a release of its own "
                "takes one value for each unit of the data set. For the units of a batch, name it in metrics= of the "
                "plan."
            )
        if attached.charged == 0:
            raise OutOfOrder(
                f"{metric.name!r} cannot be released before the first step of the run: it would use up budget that the "
                "run was promised. Release it after the first step."
            )
        plan = self.plan
        mechanism = _INDEPENDENT[plan.mechanism.tier](noise_multiplier)
        beside = attached.record.plan_id
        record = query_record(plan, metric, mechanism, beside=beside, certified=self._run_key.certified)
        total = metric.contributions(values).sum(dtype=torch.float64)[None]
        query = Query({"answer": total}, {"answer": 0}, {0: plan.sensitivity_of(metric.question(), whole=True)})
        # Charge before release, as in a step.
        key = self._run_key.query_key(self.ledger.charge(record, record.event))
        released, _ = mechanism.release(ClippedSum((query,)), (), key)
        estimate = metric.estimate(float(released.value["answer"][0]), plan.num_examples)
        attached.beside = (*attached.beside, record)
        attached.tell({metric.name: estimate})
        return estimate

    # -- what was spent -----------------------------------------------------------------------------------------------

    @property
    def plan(self) -> Plan:
        """The plan of this run."""
        return self._require_attached().plan

    @property
    def steps_taken(self) -> int:
        """Logical steps behind the parameters as they are now."""
        return 0 if self._attached is None else self._attached.steps_taken

    @property
    def steps_left(self) -> int:
        """Logical steps that the plan still pays for: the planned ones less all that were charged, redone ones too."""
        return self._require_attached().steps_left

    @property
    def nonprivate(self) -> BatchDiagnostics:
        """Counts of the last logical batch. NOT PRIVATE: look at them, do not publish them."""
        return self._require_attached().nonprivate

    @property
    def ledger(self) -> Ledger:
        """The ledger that this run charges."""
        if self._ledger is None:
            raise OutOfOrder("there is no ledger yet; make_private or attach opens it.")
        return self._ledger

    def epsilon(self) -> accounting.Bound:
        """ε of all that was charged for this run so far: its steps, redone ones included, at the plan's δ.

        With releases of their own (:meth:`release_mean`) it is the sum with theirs, and holds at the sum of their δ, as
        :meth:`statement` says.

        Guarantee, Requires, Why: as of ``accounting.epsilon`` for the charged event; ``upper`` is the bound, and of a
        run that was stopped because of what was seen, only the committed one of :meth:`statement` is.
        """
        return self._require_attached().spent()[0]

    def statement(self) -> Statement:
        """What may be claimed for everything that the ledger has paid for.

        Guarantee, Requires, Why: as of ``accounting.statement``.
        """
        return accounting.statement(self.ledger)

    # -- saving -------------------------------------------------------------------------------------------------------

    def save(self, **states: Any) -> Path:
        """Write a checkpoint of the run as it stands between two logical steps; returns its path.

        Guarantee: it holds the parameters and buffers of the model, the optimizer, the clipping rule, the filters, and
        the plan: nothing that is not public or released, so it may be published like the model. No key is in it.
        Requires: the same of ``states``, which nobody can check.
        Why: each of these is a function of releases; buffers and frozen parameters that something wrote to are refused.

        Args:
          states: objects with ``state_dict()`` and ``load_state_dict()``, by name: ``save(scheduler=scheduler)``.
        Raises:
          OutOfOrder: in the middle of a logical batch, or before the optimizer used the last release.
          CheckpointError: a state holds something that cannot be stored.
          RunFolderError: the file could not be written; the checkpoints before it are as they were.
        """
        attached = self._require_attached()
        if attached.unrestored:
            raise OutOfOrder(
                f"the state of {', '.join(sorted(attached.unrestored))} was not restored yet and would be lost; call "
                "engine.restore first."
            )
        own = attached.states()
        given = {f"user/{name}": _state_dict(name, holder) for name, holder in states.items()}
        sequence, digest = self.ledger.anchor()

        def describe(number: int, packed: dict[str, Any]) -> Manifest:
            return Manifest(
                number=number,
                steps_taken=attached.steps_taken,
                steps_into_pass=attached.steps_into_pass,
                dataset_name=self._dataset_name,
                plan=attached.record,
                anchor_sequence=sequence,
                anchor_digest=digest,
                states=packed,
            )

        name = checkpoints.write(self._folder, own | given, describe)
        return self._folder.entry(checkpoints.FOLDER, name)

    def restore(self, **states: Any) -> None:
        """Give objects that were saved with a checkpoint their states back: ``restore(scheduler=scheduler)``.

        Raises:
          OutOfOrder: the run was not resumed, or is not attached yet.
          CheckpointError: the names are not those that were saved, or an object does not take its state.
        """
        attached = self._require_attached()
        if self._checkpoint is None:
            raise OutOfOrder(
                "this run was not resumed; PrivacyEngine.resume(run_dir) makes an engine that can restore."
            )
        if attached.steps_taken != self._checkpoint.manifest.steps_taken:
            raise OutOfOrder("the run has gone on since it was resumed; restore before the first step.")
        saved = _names_of_users(self._checkpoint)
        if different := saved ^ states.keys():
            raise CheckpointError(
                f"the checkpoint {self._checkpoint.name} holds the states of {', '.join(sorted(saved)) or 'no object'}"
                f", and {', '.join(sorted(different))} differs. Restore the same names as were saved."
            )
        for name, holder in states.items():
            self._checkpoint.load(f"user/{name}", holder.load_state_dict, like=_state_dict(name, holder))
        # Making a scheduler sets the learning rates of the optimizer, maybe after they were resumed.
        attached.resume_optimizer(self._checkpoint)
        attached.unrestored = frozenset()
        self._restored = True

    def autosave(self, *, every: int, keep: int | None = None, **states: Any) -> Autosave:
        """A context in which the run saves itself: ``with engine.autosave(every=100, scheduler=scheduler): ...``.

        A checkpoint is written on entering, whenever ``every`` further logical steps are complete, on SIGINT and
        SIGTERM (which then end the loop), and at the end. In a resumed run ``states`` are restored first.

        Args:
          every: logical steps from one checkpoint to the next.
          keep: how many checkpoints stay, the newest ones; all of them when left out.
          states: as for :meth:`save`.
        Raises:
          OutOfOrder, CheckpointError, RunFolderError: as :meth:`save` and :meth:`restore`.
        """
        attached = self._require_attached()
        if keep is not None:
            check_count("keep", keep)
            if keep < 1:
                raise InvalidArgument(f"keep is {keep}; at least the newest checkpoint must stay.")
        if self._checkpoint is not None and not self._restored:
            self.restore(**states)

        def watch(between_steps: Callable[[], None] | None) -> None:
            attached.between_steps = between_steps

        return Autosave(
            save=lambda: self.save(**states),
            prune=lambda: None if keep is None else checkpoints.prune(self._folder, keep, attached.record.plan_id),
            steps_taken=lambda: self.steps_taken,
            watch=watch,
            every=every,
        )

    # -- logging ------------------------------------------------------------------------------------------------------

    def log(self, **metrics: float) -> None:
        """Tell the callbacks numbers that are public or released, such as ``test_accuracy`` on a public test set.

        You declare them so: a loss on private data is neither. That goes to :meth:`log_nonprivate`.
        """
        self._require_attached().tell(metrics)

    def log_nonprivate(self, **values: float) -> None:
        """Tell numbers that are NOT PRIVATE to those callbacks that asked for such numbers, and to no other."""
        self._require_attached().tell_nonprivate(values)

    # -- inside -------------------------------------------------------------------------------------------------------

    def detach(self) -> None:
        """Give model and optimizer back as they were. What was charged stays charged; this engine takes no more steps.

        A model stays attached until then, also when the engine is forgotten; attaching it anew detaches it first.
        """
        if self._attached is not None:
            self._attached.detach()

    def _require_attached(self) -> Attachment:
        if self._attached is None:
            raise OutOfOrder("the engine is not attached yet; call make_private or attach first.")
        return self._attached

    def _attach(
        self,
        model: nn.Module,
        optimizer: torch.optim.Optimizer,
        plan: Plan,
        loading: Loading,
        microbatches: int,
        *,
        caveats: list[str],
        target_epsilon: float | None = None,
        canaries: Canaries | None = None,
    ) -> Attachment:
        if self._attached is not None:
            raise OutOfOrder(
                "this engine is attached already; a second model takes a second PrivacyEngine (ledger= lets both share "
                "one budget)."
            )
        plan.sampler.check(len(loading.dataset), plan.num_examples)
        if unit_of(loading.dataset) not in (None, plan.unit):
            raise InvalidArgument(
                f"unit is {plan.unit!r}, and the items of the data set are users: what is protected is one user. Say "
                'unit="user".'
            )
        if len(loading.dataset) > LARGEST_EXCESS * plan.num_examples:
            raise InvalidArgument(
                f"num_examples is {plan.num_examples}, and the data set holds more than {LARGEST_EXCESS} times as "
                f"many; "
                "sampling, noise and the bound on rounding are derived from it. Give a public number near the size."
            )
        refuse_model(model)
        parameters = trainable(model)
        refuse_optimizer(optimizer, parameters)
        setting = plan.setting(parameters)
        plan.noise_shares(plan.questions(setting))
        record = plan_record(
            plan, setting=setting, certified=self._run_key.certified, caveats=caveats, target_epsilon=target_epsilon
        )
        if canaries is not None:
            canaries.check(plan, dict(parameters))
        if self._checkpoint is not None:
            record = continued(self._checkpoint.manifest.plan, record)
        if self._checkpoint is None and checkpoints.names(self._folder):
            raise LedgerError(
                f"{self.run_dir} holds checkpoints of an earlier run, whose charges stay. PrivacyEngine.resume goes on "
                "with it; for a new run, take a new folder (ledger= lets both share one budget)."
            )
        self._folder.make()
        self._ledger = self._open_or_create(
            self._budget or Budget(epsilon=target_epsilon or max(plan.epsilon().upper, _LEAST_BUDGET), delta=plan.delta)
        )
        self._check(record)
        earlier = attached_to(model)
        lock = self._lock(earlier)
        attached: Attachment | None = None
        try:
            self._folder.make("nonprivate")
            self._folder.sweep(checkpoints.FOLDER)
            self._refuse_other_run()  # under the lock: nobody else trains in this folder any more
            self._run_key.claim(resumed_at=None if self._checkpoint is None else self._ledger.anchor()[1])
            if canaries is not None:
                canaries.begin(plan, dict(parameters))
            attached = Attachment(
                model,
                optimizer,
                plan,
                parameters,
                ledger=self._ledger,
                record=record,
                run_key=self._run_key,
                microbatches=microbatches,
                population=len(loading.dataset),
                callbacks=self._callbacks,
                lock=lock,
                canaries=canaries,
            )
            if self._run_key.certified:
                self._run_key.seed_global_generators()
            if self._checkpoint is not None:
                attached.resume(self._checkpoint)
                attached.unrestored = _names_of_users(self._checkpoint)
            attached.begin(self._dataset_name)
        except BaseException:
            if attached is None and earlier is not None and earlier.lock is None:
                earlier.lock = lock  # handed over too early: the earlier engine goes on
            elif attached is None:
                lock.release()
            elif earlier is None:
                attached.detach()
            else:
                # The model was private before this call, and its loop may go on: the hooks stay, to refuse that.
                attached.end()
            raise
        self._attached = attached
        return attached

    def _lock(self, earlier: Attachment | None) -> FileLock:
        """The lock of the run folder; an earlier attachment of the same model in the same folder hands its own over."""
        if earlier is not None and earlier.lock is not None and earlier.lock.lock_file == self._folder.lock_file:
            lock, earlier.lock = earlier.lock, None
            return lock if lock.is_locked else self._folder.lock()
        return self._folder.lock()

    def _check(self, record: PlanRecord) -> None:
        """Refuse a plan that the ledger would not charge; a resumed one that has been charged in full takes no step."""
        try:
            self.ledger.check(record)
        except BudgetExceeded:
            found = self.ledger.find_plan(record.plan_id)
            if found is None or found[1] < record.steps:
                raise

    def _refuse_other_run(self) -> None:
        """Refuse a checkpoint that is not of this ledger's run.

        Raises:
          CheckpointError: the ledger has another plan of this name, or has charged less than the checkpoint has taken.
        """
        if self._checkpoint is None:
            return
        manifest = self._checkpoint.manifest
        known = self.ledger.find_plan(manifest.plan.plan_id)
        charged = 0 if known is None else known[1]
        if known is not None and known[0] != manifest.plan:
            raise CheckpointError(
                f"the plan in the checkpoint {self._checkpoint.name} is not the one that the ledger was charged for; "
                "the checkpoint was changed, or belongs to another run."
            )
        if manifest.steps_taken > charged:
            raise CheckpointError(
                f"the checkpoint {self._checkpoint.name} is after {manifest.steps_taken} steps, and the ledger has "
                f"charged {charged} of its plan; it belongs to another run."
            )

    def _open_or_create(self, budget: Budget) -> Ledger:
        if self._ledger is None:
            return Ledger.create(self._ledger_path, dataset_name=self._dataset_name, budget=budget)
        if self._budget is not None and self._budget != self._ledger.budget:
            raise LedgerError(
                f"{self._ledger_path} was opened with the budget {self._ledger.budget} and cannot be given another one "
                f"({self._budget}) afterwards. Leave budget= out."
            )
        return self._ledger


_INDEPENDENT: dict[Tier, Callable[[float], Mechanism]] = {
    "default": Gaussian,
    "hardened": HardenedGaussian,
    "exact": DiscreteGaussian,
}
"""The noise of a release beside the steps, made as carefully as theirs."""


def _refuse_other_batch_size(sampler: Sampler, batch_size: int, num_examples: int) -> None:
    """Refuse a sampler whose batches are not those that the loader was made for."""
    if not math.isclose(sampler.sample_rate * num_examples, min(batch_size, num_examples), rel_tol=1e-9):
        raise InvalidArgument(
            f"{sampler} draws {sampler.sample_rate * num_examples:.6g} of {num_examples} units on average, and the "
            f"DataLoader's batch_size is {batch_size}; make both the same: passes and learning rates are counted in "
            "batches of the loader."
        )


def _names_of_users(checkpoint: Checkpoint) -> frozenset[str]:
    """Names of the states that the user gave to :meth:`PrivacyEngine.save`."""
    return frozenset(name.removeprefix("user/") for name in checkpoint.manifest.states if name.startswith("user/"))


def _state_dict(name: str, holder: Any) -> Mapping[str, Any]:
    if not (hasattr(holder, "state_dict") and hasattr(holder, "load_state_dict")):
        raise InvalidArgument(
            f"{name} is a {type(holder).__name__} without state_dict() and load_state_dict(); give objects that have "
            "both."
        )
    return holder.state_dict()
