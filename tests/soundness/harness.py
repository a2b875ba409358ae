"""One way to run the shipped engine on tensors and to write down everything that happened.

:func:`run` trains through the public interface only, in both of its forms, with a user's loop around it that has a
scheduler, a moving average and a counter of its own.  A :class:`Witness` stands in front of the plan's mechanism, where
private values end: it keeps what went in and what came out, looks into the ledger's file through a connection of its
own, and can put recorded releases in place of fresh ones.  Nothing of the package is replaced.
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
from contextlib import ExitStack, closing, contextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Literal
from unittest import mock

import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset

import accounting
import dpkit
from accounting import PlanRecord, Relation
from dpkit.mechanisms import Gaussian, NoiseKey, RunKey
from dpkit.types import ClippedSum, Named, Released

from .subjects import Data, build, honest, loss_of

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

    def but(self, **changes: Any) -> Setup:
        return replace(self, **changes)

    def __str__(self) -> str:
        told = {name: value for name, value in vars(self).items() if value != getattr(Setup, name)}
        return f"Setup({', '.join(f'{name}={value}' for name, value in told.items())})"


@dataclass
class Trace:
    """What happened in one run.

    Attributes:
      sums, sensitivities: what reached the mechanism at each release, and what its noise was scaled to.
      released: what left the mechanism.
      inputs: gradients as the optimizer saw them, at each of its steps that had any.
      asked: for each release, the indices for which the data set was asked since the last one.
      charges_seen: for each release, the charges that another connection saw in the ledger's file at that moment.
      noise_keys: for each release, a print of the key that it was given.
      sampling_streams, noise_streams: prints of the state of each generator as it was handed out.
      lr, iterations, counter: of the user's loop.
      error: type of the exception that ended the run, if one did.
      ledger: every entry of the ledger, without the random name of the plan.
      statement: what may be claimed, without that name and the anchor that depends on it.
    """

    sums: list[Named] = field(default_factory=list)
    sensitivities: list[dict[int, float]] = field(default_factory=list)
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

    def sensitivity(self, step: int) -> float:
        """L2 sensitivity over all groups together."""
        return math.sqrt(math.fsum(value**2 for value in self.sensitivities[step].values()))


class Witness:
    """The shipped mechanism, watched. With ``replay``, recorded releases take the place of fresh ones."""

    def __init__(
        self, inner: Gaussian, trace: Trace, dataset: _Watched, path: Path, replay: Sequence[Released] | None
    ) -> None:
        self.inner, self.trace, self.dataset, self.path, self.replay = inner, trace, dataset, path, replay

    def init(self, parameters: Named) -> Any:
        return self.inner.init(parameters)

    def event(self) -> accounting.Event:
        return self.inner.event()

    def release(self, clipped: ClippedSum, state: Any, key: NoiseKey) -> tuple[Released, Any]:
        (query,) = clipped.queries
        self.trace.sums.append(_copy(query.value))
        self.trace.sensitivities.append(dict(query.sensitivity))
        self.trace.asked.append(self.dataset.take())
        self.trace.charges_seen.append(len(charges_on_disk(self.path)))
        self.trace.noise_keys.append(_print_of(key.generator(0, "no parameter has this name")))
        number = len(self.trace.released)
        if self.replay is None or number >= len(self.replay):
            released, state = self.inner.release(clipped, state, key)
        else:
            released = Released(_copy(self.replay[number].value))
        self.trace.released.append(Released(_copy(released.value)))
        return released, state


class _Watched(Dataset[Any]):
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


def run(
    setup: Setup,
    data: Data | Sequence[Data],
    folder: Path,
    *,
    replay: Sequence[Released] | None = None,
    streams: bool = False,
) -> Trace:
    """Train as ``setup`` says and tell what happened; whatever the engine raises is part of that.

    Args:
      data: the data set; or one for each step, all of one size, which makes one run as good as many where lr is 0.
      folder: where a run folder is made and taken away again.
      replay: releases of another run, in place of fresh ones.
      streams: also take the prints of every generator.
    """
    trace = Trace()
    dataset = _Watched([data] if isinstance(data, Data) else data, trace)
    run_dir = Path(tempfile.mkdtemp(dir=folder))
    model = build(setup.subject, setup.dtype)
    optimizer = {"sgd": torch.optim.SGD, "adam": torch.optim.Adam}[setup.optimizer](model.parameters(), lr=setup.lr)
    witness = Witness(Gaussian(setup.sigma), trace, dataset, run_dir / "ledger.sqlite", replay)
    engine = dpkit.PrivacyEngine(run_dir, dataset_name="made up", seed=setup.seed)
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


def _train(
    setup: Setup,
    engine: dpkit.PrivacyEngine,
    model: nn.Module,
    optimizer: torch.optim.Optimizer,
    dataset: _Watched,
    witness: Witness,
    trace: Trace,
) -> None:
    probe = tuple(honest(setup.subject, 4, setup.dtype, seed=99))
    scheduler = torch.optim.lr_scheduler.ExponentialLR(optimizer, gamma=0.9)

    def see(stepped: torch.optim.Optimizer, args: Any, kwargs: Any) -> None:
        gradients = {name: p.grad.detach().clone() for name, p in model.named_parameters() if p.grad is not None}
        if gradients:
            trace.inputs.append(gradients)

    def bookkeeping() -> None:
        scheduler.step()
        trace.lr.append(scheduler.get_last_lr()[0])
        trace.iterations += 1
        trace.counter += 1.0 / trace.iterations
        for name, parameter in model.named_parameters():
            old = trace.average.get(name, torch.zeros_like(parameter))
            trace.average[name] = 0.9 * old + 0.1 * parameter.detach()

    if setup.form == "loop":
        model, optimizer, loader = engine.make_private(
            model,
            optimizer,
            DataLoader(dataset, batch_size=round(setup.q * setup.public_n)),
            mechanism=witness,
            target_delta=1e-5,
            steps=setup.steps,
            max_grad_norm=setup.bound,
            num_examples=setup.public_n,
            relation=setup.relation,
            max_physical_batch_size=setup.micro,
            loss_reduction=setup.reduction,
            probe_batch=probe,
        )
        optimizer.register_step_pre_hook(see)
        dataset.take()
        # One pass more than is planned: it must be empty.
        for _ in range(-(-setup.steps // -(-setup.public_n // round(setup.q * setup.public_n))) + 1):
            for batch in loader:
                optimizer.zero_grad()
                losses = loss_of(model, batch)
                if setup.reduction == "none":
                    engine.backward(losses)
                else:
                    (losses.mean() if setup.reduction == "mean" else losses.sum()).backward()
                optimizer.step()
                bookkeeping()
                if trace.iterations == setup.stop_after:
                    return
        return
    plan = dpkit.Plan(
        sampler=dpkit.Poisson(setup.q) if setup.cap is None else dpkit.TruncatedPoisson(setup.q, setup.cap),
        clip=dpkit.clipping.Flat(setup.bound),
        mechanism=witness,
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
        probe_batch=probe,
    )
    optimizer.register_step_pre_hook(see)
    dataset.take()
    for _ in range(2):
        for batch in engine.batches():
            step(batch)
            bookkeeping()
            if trace.iterations == setup.stop_after:
                return


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
    if not path.exists():
        return
    trace.expected_batch = setup.q * setup.public_n
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
    sampling, noise = RunKey.sampling, NoiseKey.generator

    def seen_sampling(key: RunKey, *args: Any, **kwargs: Any) -> torch.Generator:
        generator = sampling(key, *args, **kwargs)
        trace.sampling_streams.append(_print_of(generator))
        return generator

    def seen_noise(key: NoiseKey, *args: Any, **kwargs: Any) -> torch.Generator:
        generator = noise(key, *args, **kwargs)
        trace.noise_streams.append(_print_of(generator))
        return generator

    with mock.patch.object(RunKey, "sampling", seen_sampling), mock.patch.object(NoiseKey, "generator", seen_noise):
        yield


def _print_of(generator: torch.Generator) -> str:
    return hashlib.sha256(generator.get_state().numpy().tobytes()).hexdigest()[:24]


def _copy(named: Named) -> Named:
    return {name: value.detach().clone() for name, value in named.items()}


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
