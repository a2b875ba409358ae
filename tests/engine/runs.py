"""A small run that can be stopped and resumed at will, for the tests of checkpoints."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import nn
from torch.nn import functional as F
from torch.utils.data import DataLoader, TensorDataset

import dpkit
from dpkit.engine import PrivacyEngine

N = 60
STEPS_PER_PASS = 6


def dataset() -> TensorDataset:
    generator = torch.Generator().manual_seed(1)
    return TensorDataset(torch.randn(N, 5, generator=generator), torch.randint(0, 3, (N,), generator=generator))


def mlp(seed: int = 0, hidden: int = 8) -> nn.Sequential:
    torch.manual_seed(seed)
    return nn.Sequential(nn.Linear(5, hidden), nn.Tanh(), nn.LayerNorm(hidden), nn.Linear(hidden, 3))


PLAN: dict[str, Any] = {
    "num_examples": N,
    "noise_multiplier": 1.5,
    "target_delta": 1e-3,
    "steps": 20,
    "max_grad_norm": 1.0,
}

Make = Callable[..., Any]


@dataclass
class Run:
    """Model, optimizer, scheduler, engine and loader of one process of a run."""

    engine: PrivacyEngine
    model: nn.Module
    optimizer: torch.optim.Optimizer
    scheduler: Any
    loader: Any
    epochs_ended: int = 0
    passes: list[int] = field(default_factory=list)

    def train(self, steps: int | None = None, *, save: bool = False) -> Run:
        """``steps`` logical steps, or all that are left, scheduler included; ``save``: right after the last one."""
        goal = self.engine.steps_taken + (self.engine.steps_left if steps is None else steps)
        while self.engine.steps_taken < goal:
            begun = self.engine.steps_taken
            for x, y in self.loader:
                before = self.engine.steps_taken
                self.optimizer.zero_grad()
                self.engine.backward(F.cross_entropy(self.model(x), y, reduction="none"))
                self.optimizer.step()
                if self.engine.steps_taken > before:
                    self.step_schedule()
                if self.engine.steps_taken == goal:
                    if save:
                        self.save()
                    break
            self.passes.append(self.engine.steps_taken - begun)
        return self

    def step_schedule(self) -> None:
        if isinstance(self.scheduler, torch.optim.lr_scheduler.ReduceLROnPlateau):
            self.scheduler.step(float(self.engine.steps_taken % 3))
        elif self.scheduler is not None:
            self.scheduler.step()

    def saved(self) -> dict[str, Any]:
        return {} if self.scheduler is None else {"scheduler": self.scheduler}

    def save(self) -> Path:
        return self.engine.save(**self.saved())

    def leave(self) -> None:
        """The process ends: nothing of it is used again."""
        self.engine.detach()


def sgd(model: nn.Module) -> torch.optim.Optimizer:
    return torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)


def begin(
    folder: Path,
    make_optimizer: Make = sgd,
    make_scheduler: Make | None = None,
    *,
    model: nn.Module | None = None,
    batch_size: int = 10,
    engine: PrivacyEngine | None = None,
    data: TensorDataset | None = None,
    **changes: Any,
) -> Run:
    """A run in ``folder``, or the one that ``engine`` resumes; ``changes`` are arguments of make_private."""
    model = mlp() if model is None else model
    optimizer = make_optimizer(model)
    scheduler = None if make_scheduler is None else make_scheduler(optimizer)
    engine = dpkit.PrivacyEngine(folder) if engine is None else engine
    data = dataset() if data is None else data
    loader = DataLoader(data, batch_size=batch_size, shuffle=len(data) > 0)
    if len(data) == 0:
        changes["probe_batch"] = (torch.zeros(1, 5), torch.zeros(1, dtype=torch.long))
    model, optimizer, loader = engine.make_private(model, optimizer, loader, **{**PLAN, **changes})
    return Run(engine, model, optimizer, scheduler, loader)


def resume(folder: Path, make_optimizer: Make = sgd, make_scheduler: Make | None = None, **changes: Any) -> Run:
    """The run in ``folder`` in a new process: other initial weights, the same calls."""
    options = {name: changes.pop(name) for name in ("checkpoint", "dataset_name", "seed") if name in changes}
    model = changes.pop("model", None)
    run = begin(
        folder,
        make_optimizer,
        make_scheduler,
        model=mlp(seed=99) if model is None else model,
        engine=dpkit.PrivacyEngine.resume(folder, **options),
        **changes,
    )
    if make_scheduler is not None:
        run.engine.restore(scheduler=run.scheduler)
    return run
