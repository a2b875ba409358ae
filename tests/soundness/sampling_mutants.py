"""Bugs of who takes part, and of what is charged for it. Checks A and V must catch them."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor

import accounting
from accounting import Ledger, Receipt
from dpkit.engine import engine
from dpkit.engine.attachment import Attachment
from dpkit.engine.plan import Plan
from dpkit.mechanisms import RunKey
from dpkit.sampling import Poisson

from .checks import check_V_passes
from .mutants import Active, Patch, mutant, plain


@mutant(
    "M18",
    "A",
    "takes shuffled batches for Poisson ones",
    "Opacus, poisson_sampling=False; fastDP examples",
    plain,
    slow=True,
)
def _shuffled_batches(patch: Patch, active: Active) -> None:
    left: list[int] = []

    def draw(self: Poisson, population: int, generator: torch.Generator, **_: Any) -> Tensor:
        active()
        size = int(self.sample_rate * population)
        if len(left) < size:
            left[:] = torch.randperm(population, generator=generator).tolist()
        taken, left[:] = left[:size], left[size:]
        return torch.tensor(taken)

    patch.setattr(Poisson, "draw", draw)


@mutant("M19", "A", "draws with 1 / (number of batches) and charges q", "1 / len(loader), drop_last", plain)
def _rate_of_the_loader(patch: Patch, active: Active) -> None:
    shipped = Poisson.draw

    def draw(self: Poisson, population: int, generator: torch.Generator, **_: Any) -> Tensor:
        active()
        rate = 1.0 if self.sample_rate == 1 else 1.0 / math.floor(0.99 / self.sample_rate)
        return shipped(Poisson(rate), population, generator)

    patch.setattr(Poisson, "draw", draw)


@mutant("M38", "A", "draws with replacement", "DistributedUniformWithReplacementSampler", plain)
def _with_replacement(patch: Patch, active: Active) -> None:
    def draw(self: Poisson, population: int, generator: torch.Generator, **_: Any) -> Tensor:
        active()
        return torch.randint(0, population, (int(self.sample_rate * population),), generator=generator)

    patch.setattr(Poisson, "draw", draw)


@mutant("M39", "A", "draws the same batches in every epoch", "sampler re-seeded each epoch", plain, slow=True)
def _same_batches_every_epoch(patch: Patch, active: Active) -> None:
    shipped = RunKey.sampling

    def sampling(self: RunKey, draw: int) -> torch.Generator:
        active()
        return shipped(self, draw % 10)

    patch.setattr(RunKey, "sampling", sampling)


@mutant("M20", "V", "charges every second step", "virtual steps, Opacus accountant hook")
def _charge_every_second_step(patch: Patch, active: Active) -> None:
    shipped, steps = Ledger.charge, {}

    def charge(self: Ledger, plan: accounting.PlanRecord, event: accounting.Event) -> Receipt:
        steps[plan.plan_id] = steps.get(plan.plan_id, 0) + 1
        if steps[plan.plan_id] % 2 == 0:
            shipped(self, plan, event)
        else:
            active()
        # The engine knows for which step it drew: a receipt that tells the true count would end the run.
        return Receipt(sequence=0, plan_id=plan.plan_id, step=steps[plan.plan_id], digest="")

    patch.setattr(Ledger, "charge", charge)
    patch.setattr(Attachment, "charged", property(lambda self: steps.get(self.record.plan_id, 0)))


@mutant("M48", "V", "charges half the sample rate", "the last, smaller batch stands for all", plain)
def _cheaper_event(patch: Patch, active: Active) -> None:
    def event(self: Plan) -> accounting.Event:
        active()
        half = Poisson(self.sampler.sample_rate / 2)
        return half.event(self.mechanism.event(self.participation), self.num_examples)

    patch.setattr(Plan, "event", property(event))


@mutant("B62", "V", "makes int(1 / q) steps of an epoch", "Opacus, sample_rate = 1 / len(loader)", by=check_V_passes)
def _steps_by_division(patch: Patch, active: Active) -> None:
    def steps_per_epoch(num_examples: int, batch_size: int) -> int:
        active()
        return int(1 / (batch_size / num_examples))

    patch.setattr(engine, "steps_per_epoch", steps_per_epoch)
