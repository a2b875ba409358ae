"""One run of the shipped engine in several processes that die: what dies is simulated by an exception at that place.

A new engine then finds nothing but the files.  ``killed_run.py`` kills processes for real.
"""

from __future__ import annotations

import shutil
import tempfile
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from enum import StrEnum
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader

import accounting
import dpkit
from dpkit.mechanisms import NoiseKey
from dpkit.types import ClippedSum, Named, Participation, Released

from .harness import Noise, Setup, Trace, Watched, charges_on_disk, flat, print_of
from .subjects import build, loss_of, marked


class Death(StrEnum):
    """When a process dies."""

    BETWEEN_STEPS = "between two steps"
    AFTER_THE_DRAW = "with a batch in hand"
    AFTER_THE_CHARGE = "between charge and release"
    AFTER_THE_RELEASE = "before anybody but its reader knows of the release"


@dataclass(frozen=True)
class Life:
    """One process: how many steps it takes, how it dies, and from which of all checkpoints the next one goes on."""

    steps: int
    dies: Death
    goes_on_from: int = -1


class Died(Exception):
    """The process did."""


@dataclass
class Past:
    """A release, as it was when it was made.

    Attributes:
      charges: in the ledger's file, as another connection saw it.
      units: who took part, as the model was shown them.
      noise: what was added to the gradient.
      key: print of the key that it was drawn with.
    """

    charges: int
    units: list[int]
    noise: Tensor
    key: str


class Mortal:
    """The shipped mechanism, which writes down every release, and dies before or after one."""

    def __init__(self, inner: Noise, path: Path) -> None:
        self.inner, self.path = inner, path
        self.in_hand: list[int] = []
        self.dies: Death | None = None
        self.past: list[Past] = []

    @property
    def noise_multiplier(self) -> float:
        return self.inner.noise_multiplier

    @property
    def tier(self) -> Any:
        return self.inner.tier

    def init(self, parameters: Named, participation: Participation) -> Any:
        return self.inner.init(parameters, participation)

    def scale(self, participation: Participation) -> float:
        return self.inner.scale(participation)

    def event(self, participation: Participation) -> accounting.Event:
        return self.inner.event(participation)

    def release(self, clipped: ClippedSum, state: Any, key: NoiseKey) -> tuple[Released, Any]:
        if self.dies is Death.AFTER_THE_CHARGE:
            raise Died
        charges = len(charges_on_disk(self.path))
        released, state = self.inner.release(clipped, state, key)
        noise = flat(released.value) - flat(clipped.queries[0].value)
        self.past.append(Past(charges, self.in_hand, noise, print_of(key.generator(0, "no parameter has this name"))))
        self.in_hand = []
        if self.dies is Death.AFTER_THE_RELEASE:
            raise Died
        return released, state


@dataclass
class Crashes:
    """What became of a run of several processes.

    Attributes:
      past: its releases.
      counts: after each life, how many releases there were, and how many charges in the ledger's file.
      states: for each life, how many charges the ledger's file held when it began, and how many steps the engine then
        said were left.
    """

    past: list[Past] = field(default_factory=list)
    counts: list[tuple[int, int]] = field(default_factory=list)
    states: list[tuple[int, int]] = field(default_factory=list)

    @property
    def charges(self) -> int:
        return self.counts[-1][1]


def run_with_crashes(setup: Setup, lives: Sequence[Life], folder: Path) -> Crashes:
    """One run of several processes, each of which saves after every step. All have the seed of ``setup``."""
    data = marked(setup.subject, setup.public_n)
    run_dir = Path(tempfile.mkdtemp(dir=folder))
    mechanism = Mortal(setup.noise, run_dir / "ledger.sqlite")
    found = Crashes(mechanism.past)
    saved: list[str] = []
    goes_on_from = -1
    for life in lives:
        engine = (
            dpkit.PrivacyEngine.resume(run_dir, checkpoint=saved[goes_on_from], seed=setup.seed)
            if saved
            else dpkit.PrivacyEngine(run_dir, dataset_name="made up", seed=setup.seed)
        )
        model = build(setup.subject, setup.dtype)
        model, optimizer, loader = engine.make_private(
            model,
            torch.optim.SGD(model.parameters(), lr=setup.lr),
            DataLoader(Watched([data], Trace()), batch_size=setup.batch_size, num_workers=setup.workers),
            mechanism=mechanism,
            sampler=setup.sampler,
            target_delta=1e-5,
            steps=setup.steps,
            max_grad_norm=setup.bound if setup.clip is None else None,
            clipping=setup.clip,
            filters=setup.filters,
            num_examples=setup.public_n,
            relation=setup.relation,
            max_physical_batch_size=setup.micro,
        )
        found.states.append((len(charges_on_disk(mechanism.path)), engine.steps_left))
        with suppress(Died):
            _live(life, engine, model, optimizer, loader, mechanism, saved)
        mechanism.dies, mechanism.in_hand = None, []
        found.counts.append((len(mechanism.past), len(charges_on_disk(mechanism.path))))
        engine.detach()
        engine.ledger.close()
        goes_on_from = life.goes_on_from
    shutil.rmtree(run_dir)
    return found


def _live(
    life: Life,
    engine: dpkit.PrivacyEngine,
    model: nn.Module,
    optimizer: torch.optim.Optimizer,
    loader: Any,
    mechanism: Mortal,
    saved: list[str],
) -> None:
    before = len(mechanism.past)
    while engine.steps_left:
        for batch in loader:
            last = len(mechanism.past) - before == life.steps
            if last and life.dies is Death.AFTER_THE_DRAW:
                raise Died
            mechanism.in_hand += [round(mark) - 1 for mark in batch[0][:, 0].tolist() if mark]
            mechanism.dies = life.dies if last else None
            taken = engine.steps_taken
            engine.backward(loss_of(model, batch))
            optimizer.step()
            if engine.steps_taken == taken:
                continue  # a microbatch that was not the last one
            saved.append(engine.save().name)
            if len(mechanism.past) - before == life.steps and life.dies is Death.BETWEEN_STEPS:
                raise Died
