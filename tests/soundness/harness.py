"""One way to run the shipped engine on tensors and to write down everything that happened.

:func:`run` trains through the public interface only, in both of its forms, with a user's loop around it that has a
scheduler, a moving average and a counter of its own.  A :class:`Witness` stands in front of the plan's mechanism, where
private values end: it keeps what went in and what came out, looks into the ledger's file through a connection of its
own, and can put recorded releases in place of fresh ones.  Nothing of the package is replaced.

What a run is made of (clipping rule, sampler, mechanism, filters, metrics) stands in its :class:`Setup` as objects, so
that a new member of the package is checked by being written into a list.
"""

from __future__ import annotations

import hashlib
import json
import math
import re
import shutil
import sqlite3
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, closing, contextmanager, suppress
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Literal
from unittest import mock

import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset, TensorDataset, default_collate

import accounting
import dpkit
from accounting import PlanRecord, Relation
from dpkit.callbacks import Callback
from dpkit.clipping import ClipRule, Flat
from dpkit.engine.attachment import attached_to
from dpkit.engine.canaries import Canaries
from dpkit.errors import CheckpointError, Refused
from dpkit.filters import Filter
from dpkit.mechanisms import Correlated, DiscreteGaussian, Gaussian, HardenedGaussian, NoiseKey, RunKey, gaussian
from dpkit.metrics import Count, Mean, Metric
from dpkit.optim import DPAdamBC
from dpkit.sampling import Poisson, Sampler, TruncatedPoisson
from dpkit.types import ClippedSum, Named, Participation, Released

from .subjects import Data, build, honest, loss_of

Noise = Gaussian | Correlated | HardenedGaussian | DiscreteGaussian

_SALT = re.compile(r'"salt": ?"[0-9a-f]{16}", ?')  # random in every charge, whatever the data


@dataclass(frozen=True)
class Setup:
    """Everything public about a run: two runs with equal setups differ in their data alone.

    Attributes:
      form: "loop" (make_private and engine.backward) or "step" (attach and step).
      q: sample rate; in the loop form q times ``public_n`` is the loader's batch size and must be whole.
      micro: max_physical_batch_size.
      reduction: the loop's own; with "mean" and "sum" it calls loss.backward() as it always did.
      cap: truncates the Poisson draw at this size ("step" only).
      stop_after: number of iterations after which the user stops; None for never.
      leave_after: number of iterations after which the user leaves every pass and begins another; None for never.
      epochs: in place of ``steps``, of which one pass then has as many as the engine makes of it ("loop" only).
      canaries: how many made-up units ride along, for an audit.
      rows: of a user, each of them another view of the user's record; the unit is then the user ("loop" only).
      workers: processes that fetch batches ahead of time ("loop" only).
      clip: the rule, in place of flat clipping to ``bound``. Labels, for a rule that needs them, are the classes.
      sampler: in place of Poisson sampling at ``q``.
      mechanism: in place of independent noise of multiplier ``sigma``.
      metrics: means are given a number of the record itself, counts whether its class is the first. Not the losses,
        which for the same record may end in another digit where a batch has other rows: ``test_isolation.py``.
    """

    form: str = "loop"
    subject: str = "mlp"
    backend: str = "ghost"
    q: float = 1.0
    steps: int = 1
    public_n: int = 9
    sigma: float = 1.3
    bound: float = 1.0
    micro: int | None = None
    reduction: Literal["none", "mean", "sum"] = "none"
    cap: int | None = None
    dtype: torch.dtype = torch.float32
    relation: Relation = Relation.ADD_REMOVE
    seed: int | None = 5
    optimizer: str = "sgd"
    lr: float = 0.05
    stop_after: int | None = None
    leave_after: int | None = None
    epochs: int | None = None
    rows: int = 1
    canaries: int = 0
    workers: int = 0
    clip: ClipRule | None = None
    sampler: Sampler | None = None
    mechanism: Noise | None = None
    filters: tuple[Filter, ...] = ()
    metrics: tuple[Metric, ...] = ()

    @property
    def rule(self) -> ClipRule:
        return Flat(self.bound) if self.clip is None else self.clip

    @property
    def noise(self) -> Noise:
        return Gaussian(self.sigma) if self.mechanism is None else self.mechanism

    @property
    def draws(self) -> Sampler:
        """Of the functional form; the loop form makes its own where none is given."""
        if self.sampler is not None:
            return self.sampler
        return Poisson(self.q) if self.cap is None else TruncatedPoisson(self.q, self.cap)

    @property
    def rate(self) -> float:
        return self.draws.sample_rate

    @property
    def batch_size(self) -> int:
        return round(self.rate * self.public_n)

    @property
    def asks(self) -> bool:
        """Whether anything is released beside the gradient."""
        return bool(self.metrics) or type(self.rule).questions is not ClipRule.questions

    def but(self, **changes: Any) -> Setup:
        return replace(self, **changes)

    def __str__(self) -> str:
        told = {name: value for name, value in vars(self).items() if value != getattr(Setup, name)}
        return f"Setup({', '.join(f'{name}={value}' for name, value in told.items())})"


@dataclass
class Trace:
    """What happened in one run.

    Attributes:
      sums, sensitivities: the gradient that reached the mechanism at each release, and what its noise was scaled to.
      clipped: all that reached the mechanism, with what is asked beside the gradient.
      stds: for each release and each query of it, the standard deviation of the noise in each group, before it is
        correlated over the steps.
      scale: that standard deviation per unit of sensitivity, were the gradient released alone.
      released: what left the mechanism.
      shown: for each release, the first feature of every row that the model was shown since the last one.
      estimates: what the engine tells of the plan's metrics after each release.
      told: what callbacks were told, of what is public.
      states: what a checkpoint at the end would hold of the engine's own.
      inputs: gradients as the optimizer saw them, at each of its steps that had any.
      asked: for each release, the indices for which the data set was asked since the last one.
      charges_seen: for each release, the charges that another connection saw in the ledger's file at that moment.
      noise_keys: for each release, a print of the key that it was given.
      sampling_streams, noise_streams: prints of the state of each generator as it was handed out.
      lr, iterations, counter: of the user's loop.
      error: type of the exception that ended the run, if one did.
      ledger: every entry of the ledger, without the random name of the plan.
      stated_epsilons: what the engine says was spent, after each release.
      statement: what may be claimed, without that name and the anchor that depends on it.
    """

    sums: list[Named] = field(default_factory=list)
    sensitivities: list[dict[int, float]] = field(default_factory=list)
    clipped: list[ClippedSum] = field(default_factory=list)
    stds: list[list[dict[int, float]]] = field(default_factory=list)
    scale: float = math.nan
    shown: list[list[float]] = field(default_factory=list)
    estimates: list[dict[str, float]] = field(default_factory=list)
    told: list[Any] = field(default_factory=list)
    states: dict[str, Any] = field(default_factory=dict)
    released: list[Released] = field(default_factory=list)
    inputs: list[Named] = field(default_factory=list)
    asked: list[list[int]] = field(default_factory=list)
    charges_seen: list[int] = field(default_factory=list)
    noise_keys: list[str] = field(default_factory=list)
    sampling_streams: list[str] = field(default_factory=list)
    noise_streams: list[str] = field(default_factory=list)
    iterations: int = 0
    steps_taken: int = 0
    counter: float = 0.0
    lr: list[float] = field(default_factory=list)
    average: Named = field(default_factory=dict)
    parameters: Named = field(default_factory=dict)
    optimizer_state: dict[str, Any] = field(default_factory=dict)
    error: type[BaseException] | None = None
    message: str = ""
    ledger: list[str] = field(default_factory=list)
    charges: int = 0
    plan: PlanRecord | None = None
    expected_batch: float = math.nan
    epsilon: float = math.nan
    statement: str = ""
    refused_beyond: bool = False
    stated_epsilons: list[float] = field(default_factory=list)

    def sensitivity(self, step: int) -> float:
        """L2 sensitivity over all groups together."""
        return math.sqrt(math.fsum(value**2 for value in self.sensitivities[step].values()))


class Witness:
    """The shipped mechanism, watched. With ``replay``, recorded releases take the place of fresh ones."""

    def __init__(
        self,
        inner: Noise,
        trace: Trace,
        dataset: Watched,
        path: Path,
        replay: Sequence[Released] | None,
    ) -> None:
        self.inner, self.trace, self.dataset, self.path, self.replay = inner, trace, dataset, path, replay

    @property
    def noise_multiplier(self) -> float:
        return self.inner.noise_multiplier

    @property
    def tier(self) -> Any:
        return self.inner.tier

    def init(self, parameters: Named, participation: Participation) -> Any:
        self.trace.scale = self.inner.scale(participation)
        return self.inner.init(parameters, participation)

    def scale(self, participation: Participation) -> float:
        return self.inner.scale(participation)

    def event(self, participation: Participation) -> accounting.Event:
        return self.inner.event(participation)

    def release(self, clipped: ClippedSum, state: Any, key: NoiseKey) -> tuple[Released, Any]:
        query = clipped.queries[0]
        self.trace.sums.append(_copy(query.value))
        self.trace.sensitivities.append(dict(query.sensitivity))
        self.trace.clipped.append(
            ClippedSum(tuple(asked._replace(value=_copy(asked.value)) for asked in clipped.queries))
        )
        self.trace.stds.append([gaussian.standard_deviations(asked, self.trace.scale) for asked in clipped.queries])
        self.trace.asked.append(self.dataset.take())
        self.trace.charges_seen.append(len(charges_on_disk(self.path)))
        self.trace.noise_keys.append(print_of(key.generator(0, "no parameter has this name")))
        number = len(self.trace.released)
        if self.replay is None or number >= len(self.replay):
            released, state = self.inner.release(clipped, state, key)
        else:
            released = _copied(self.replay[number])
        self.trace.released.append(_copied(released))
        return released, state


class _Listener(Callback):
    """Remembers all that a callback is told of what is public."""

    def __init__(self, trace: Trace) -> None:
        self.told = trace.told

    def on_begin(self, settings: Any) -> None:
        self.told.append(dict(settings))

    def on_step(self, record: Any) -> None:
        self.told.append(tuple(record))

    def on_metrics(self, record: Any, metrics: Any) -> None:
        self.told.append((tuple(record), dict(metrics)))

    def on_end(self) -> None:
        self.told.append("end")


class Watched(Dataset[Any]):
    """A data set that remembers for which records it was asked.

    Given several scenes, it turns into the next one after each release.
    """

    def __init__(self, scenes: Sequence[Data], trace: Trace) -> None:
        if len({data.size for data in scenes}) != 1:
            raise ValueError("all scenes of one run have the same number of records")
        self.scenes, self.trace = scenes, trace
        self.asked: list[int] = []

    def __getitem__(self, index: int) -> tuple[Tensor, ...]:
        self.asked.append(index)
        data = self.scenes[min(len(self.trace.released), len(self.scenes) - 1)]
        return data.x[index], data.y[index], data.w[index]

    def __len__(self) -> int:
        return self.scenes[0].size

    def take(self) -> list[int]:
        taken, self.asked = self.asked, []
        return taken


class _Views(Dataset[Any]):
    """``rows`` rows for each record of ``records``, of which all but the first are a little longer."""

    def __init__(self, records: Dataset[Any], rows: int) -> None:
        self.records, self.rows = records, rows

    def __getitem__(self, row: int) -> tuple[Tensor, ...]:
        record, view = divmod(row, self.rows)
        x, y, w = self.records[record]
        return x * (1 + view / 100), y, w

    def __len__(self) -> int:
        return self.rows * len(self.records)  # pyright: ignore[reportArgumentType]


def _of_users(records: Dataset[Any], rows: int) -> dpkit.Users:
    """The records as users, who own ``rows`` rows each."""
    views = _Views(records, rows)
    return dpkit.Users(views, torch.arange(len(views)) // rows, rows_per_user=rows)


def run(
    setup: Setup,
    data: Data | Sequence[Data],
    folder: Path,
    *,
    replay: Sequence[Released] | None = None,
    streams: bool = False,
    listen: bool = False,
) -> Trace:
    """Train as ``setup`` says and tell what happened; whatever the engine raises is part of that.

    Args:
      data: the data set; or one for each step, all of one size, which makes one run as good as many where lr is 0.
      folder: where a run folder is made and taken away again.
      replay: releases of another run, in place of fresh ones.
      streams: also take the prints of every generator.
      listen: also write down what callbacks are told, and what the engine says was spent at every step.
    """
    trace = Trace()
    dataset = Watched([data] if isinstance(data, Data) else data, trace)
    run_dir = Path(tempfile.mkdtemp(dir=folder))
    model = build(setup.subject, setup.dtype)
    optimizer = _OPTIMIZERS[setup.optimizer](model.parameters(), lr=setup.lr)
    witness = Witness(setup.noise, trace, dataset, run_dir / "ledger.sqlite", replay)
    callbacks = [_Listener(trace)] if listen else []
    engine = dpkit.PrivacyEngine(run_dir, dataset_name="made up", seed=setup.seed, callbacks=callbacks)
    with ExitStack() as stack:
        if streams:
            stack.enter_context(_watch_streams(trace))
        try:
            _train(setup, engine, model, optimizer, dataset, witness, trace)
        except Exception as error:  # what a run raises is one of its outputs
            trace.error, trace.message = type(error), str(error)
    _close(setup, engine, model, optimizer, run_dir / "ledger.sqlite", trace)
    shutil.rmtree(run_dir)
    return trace


_OPTIMIZERS: dict[str, Any] = {"sgd": torch.optim.SGD, "adam": torch.optim.Adam, "adambc": DPAdamBC}


def _train(
    setup: Setup,
    engine: dpkit.PrivacyEngine,
    model: nn.Module,
    optimizer: torch.optim.Optimizer,
    dataset: Watched,
    witness: Witness,
    trace: Trace,
) -> None:
    records = honest(setup.subject, 4, setup.dtype, seed=99)
    probe: Any = tuple(records)
    if setup.rows > 1:
        users = _of_users(TensorDataset(*records), setup.rows)
        probe = default_collate([users[user] for user in range(4)])
    scheduler = torch.optim.lr_scheduler.ExponentialLR(optimizer, gamma=0.9)

    def see(stepped: torch.optim.Optimizer, args: Any, kwargs: Any) -> None:
        gradients = {name: p.grad.detach().clone() for name, p in model.named_parameters() if p.grad is not None}
        if gradients:
            trace.inputs.append(gradients)

    def bookkeeping() -> None:
        scheduler.step()
        trace.lr.append(float(scheduler.get_last_lr()[0]))
        trace.iterations += 1
        trace.counter += 1.0 / trace.iterations
        for name, parameter in model.named_parameters():
            old = trace.average.get(name, torch.zeros_like(parameter))
            trace.average[name] = 0.9 * old + 0.1 * parameter.detach()

    shown: list[float] = []
    canaries = Canaries(setup.canaries, seed=1) if setup.canaries else None

    def afterwards(batch: Any) -> None:
        bookkeeping()
        x = batch[0] if setup.rows == 1 else batch[0][0]
        shown.extend(x.flatten(1)[:, 0].tolist())
        if len(trace.shown) < len(trace.released):
            trace.shown.append(shown[:])
            shown.clear()
            trace.estimates.append(engine.released)
            if trace.told:
                trace.stated_epsilons.append(engine.epsilon().upper)

    def left(started: int) -> bool:
        """Whether the user leaves a pass that began after ``started`` iterations."""
        return trace.iterations in (setup.stop_after, started + (setup.leave_after or math.inf))

    labels = (lambda batch: batch[1]) if setup.rule.needs_labels else None
    if setup.form == "loop":
        model, optimizer, loader = engine.make_private(
            model,
            optimizer,
            DataLoader(
                dataset if setup.rows == 1 else _of_users(dataset, setup.rows),
                batch_size=setup.batch_size,
                num_workers=setup.workers,
            ),
            mechanism=witness,
            sampler=setup.sampler,
            target_delta=1e-5,
            steps=setup.steps if setup.epochs is None else None,
            epochs=setup.epochs,
            max_grad_norm=setup.bound if setup.clip is None else None,
            clipping=setup.clip,
            filters=setup.filters,
            metrics=setup.metrics,
            num_examples=setup.public_n,
            relation=setup.relation,
            max_physical_batch_size=setup.micro,
            loss_reduction=setup.reduction,
            rows_per_unit=setup.rows,
            probe_batch=probe,
            canaries=canaries,
        )
        optimizer.register_step_pre_hook(see)
        dataset.take()
        in_all = setup.steps * len(loader) // -(-setup.public_n // setup.batch_size)
        in_all = in_all if setup.epochs is None else setup.epochs * len(loader)
        # One pass more than is planned: it must be empty.
        for _ in range(-(-in_all // min(len(loader), setup.leave_after or len(loader))) + 1):
            started = trace.iterations
            for batch in loader:
                optimizer.zero_grad()
                losses = loss_of(model, batch) if setup.rows == 1 else _losses_of_rows(model, batch)
                _give(setup, engine, batch)
                if setup.rows > 1:
                    engine.backward(losses, units=torch.arange(len(batch[1])).repeat_interleave(setup.rows))
                elif setup.reduction != "none":
                    (losses.mean() if setup.reduction == "mean" else losses.sum()).backward()
                elif labels is None:
                    engine.backward(losses)
                else:
                    engine.backward(losses, labels=labels(batch))
                optimizer.step()
                afterwards(batch)
                if left(started):
                    break
            if trace.iterations == setup.stop_after:
                return
        return
    plan = dpkit.Plan(
        sampler=setup.draws,
        clip=setup.rule,
        mechanism=witness,
        filters=setup.filters,
        metrics=setup.metrics,
        steps=setup.steps,
        num_examples=setup.public_n,
        delta=1e-5,
        relation=setup.relation,
    )
    step = engine.attach(
        model,
        loss_of,
        optimizer,
        plan=plan,
        dataset=dataset,
        backend=getattr(dpkit, setup.backend),
        max_physical_batch_size=setup.micro,
        labels=labels,
        probe_batch=probe,
        canaries=canaries,
    )
    optimizer.register_step_pre_hook(see)
    dataset.take()
    for _ in range(-(-setup.steps // (setup.leave_after or setup.steps)) + 1):
        started = trace.iterations
        for batch in engine.batches():
            _give(setup, engine, batch)
            step(batch)
            afterwards(batch)
            if left(started):
                break
        if trace.iterations == setup.stop_after:
            return


def _losses_of_rows(model: nn.Module, batch: Any) -> Tensor:
    """(B K,) of batches of users, each loss with the weight of its row."""
    columns, weights = batch
    return loss_of(model, tuple(column.flatten(0, 1) for column in columns)) * weights.flatten()


def _give(setup: Setup, engine: dpkit.PrivacyEngine, batch: Any) -> None:
    """The values of the plan's metrics that the loop knows."""
    for metric in setup.metrics:
        if isinstance(metric, Mean):
            engine.release_mean(metric.name, batch[0].flatten(1)[:, 0].abs() + batch[2])
        elif isinstance(metric, Count):
            engine.release_count(metric.name, batch[1] == 0)


def _close(
    setup: Setup,
    engine: dpkit.PrivacyEngine,
    model: nn.Module,
    optimizer: torch.optim.Optimizer,
    path: Path,
    trace: Trace,
) -> None:
    trace.parameters = {name: p.detach().clone() for name, p in model.named_parameters()}
    trace.optimizer_state = optimizer.state_dict()
    trace.steps_taken = engine.steps_taken
    if (attachment := attached_to(model)) is not None:
        with suppress(Refused, CheckpointError):  # no checkpoint in the middle of a logical batch, or of NaN
            trace.states = attachment.states()
    if not path.exists():
        return
    trace.expected_batch = setup.rate * setup.public_n
    entries = entries_on_disk(path)
    trace.charges = len(charges_on_disk(path))
    plans = engine.ledger.plans()
    if plans:
        trace.plan = plans[0][0]
        trace.epsilon = engine.epsilon().upper
        told = engine.statement().model_dump(mode="json", exclude={"anchor_digest"})
        trace.statement = json.dumps(told, sort_keys=True).replace(trace.plan.plan_id, "PLAN")
        entries = [_SALT.sub("", entry.replace(trace.plan.plan_id, "PLAN")) for entry in entries]
        trace.refused_beyond = _refuses_one_more(engine.ledger, trace.plan)
    trace.ledger = entries
    engine.ledger.close()


def _refuses_one_more(ledger: accounting.Ledger, plan: PlanRecord) -> bool:
    """Whether the ledger takes the steps that are left and then no more."""
    for _ in range(plan.steps + 1):
        try:
            ledger.charge(plan, plan.event)
        except accounting.BudgetExceeded:
            return len(charges_on_disk(ledger.path)) == plan.steps
    return False


# --------------------------------------------------------------------------------------------------------- looking


def entries_on_disk(path: Path) -> list[str]:
    """Every entry that another process would see in the ledger's file now."""
    with closing(sqlite3.connect(f"{path.absolute().as_uri()}?mode=ro", uri=True)) as connection:
        rows = connection.execute("SELECT body FROM entries ORDER BY sequence").fetchall()
    return [bytes(body).decode() for (body,) in rows]


def charges_on_disk(path: Path) -> list[str]:
    """The entries among them that are charges."""
    return [entry for entry in entries_on_disk(path) if json.loads(entry)["kind"] == "charge"]


@contextmanager
def _watch_streams(trace: Trace) -> Iterator[None]:
    sampling, noise, cipher = RunKey.sampling, NoiseKey.generator, NoiseKey.cipher_key

    def seen_sampling(key: RunKey, *args: Any, **kwargs: Any) -> torch.Generator:
        generator = sampling(key, *args, **kwargs)
        trace.sampling_streams.append(print_of(generator))
        return generator

    def seen_noise(key: NoiseKey, *args: Any, **kwargs: Any) -> torch.Generator:
        generator = noise(key, *args, **kwargs)
        trace.noise_streams.append(print_of(generator))
        return generator

    def seen_cipher(key: NoiseKey, *args: Any, **kwargs: Any) -> bytes:
        found = cipher(key, *args, **kwargs)
        trace.noise_streams.append(hashlib.sha256(found).hexdigest()[:24])
        return found

    with (
        mock.patch.object(RunKey, "sampling", seen_sampling),
        mock.patch.multiple(NoiseKey, generator=seen_noise, cipher_key=seen_cipher),
    ):
        yield


def print_of(generator: torch.Generator) -> str:
    return hashlib.sha256(generator.get_state().numpy().tobytes()).hexdigest()[:24]


def _copy(named: Named) -> Named:
    return {name: value.detach().clone() for name, value in named.items()}


def _copied(released: Released) -> Released:
    return released._replace(value=_copy(released.value), queries=tuple(total.clone() for total in released.queries))


def distance(left: Named, right: Named) -> float:
    """L2 distance over all tensors together, in double precision; NaN if anything in it is."""
    return math.sqrt(sum(float((left[name].double() - right[name].double()).square().sum()) for name in left))


def length(named: Named) -> float:
    """L2 norm over all tensors together."""
    return math.sqrt(sum(float(value.double().square().sum()) for value in named.values()))


def finite(named: Named) -> bool:
    return all(bool(value.isfinite().all()) for value in named.values())


def flat(named: Named) -> Tensor:
    """All coordinates of all tensors in one row, in double precision."""
    return torch.cat([value.double().flatten() for value in named.values()])
