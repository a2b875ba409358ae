"""The training loop behind ``dpkit train`` and ``dpkit demo``: one loop with privacy, one without, one result.

What it returns and shows is public or released: step counts, epsilon, the accuracy of the released model on a public
test set. Losses and batch counts are not; they go to ``RUN/nonprivate/`` and nowhere else. A run without privacy is
non-private as a whole: its model and its result go there, too.
"""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from typing import Any, TextIO

import torch
from safetensors.torch import save_file
from torch import nn
from torch.nn import functional as F
from torch.optim import SGD
from torch.optim.lr_scheduler import LambdaLR
from torch.utils.data import DataLoader, TensorDataset

import dpkit
from accounting import Statement, round_up
from dpkit.errors import ConfigError

from . import config as configs
from . import models
from .config import Config
from .datasets import Split
from .epsilon import Answer, from_ledger

Progress = Callable[[int, int, float | None], None]
"""Called with (steps taken, steps planned, epsilon so far or None)."""


@dataclass(frozen=True)
class Result:
    """What a run gave. Without privacy there is neither a statement nor an answer, and nothing here is private.

    Attributes:
      test_accuracy: share of the public test set that the trained model gets right.
      seconds: training alone.
      statement, answer: what the ledger says, for people and for programs.
    """

    test_accuracy: float
    steps: int
    seconds: float
    statement: Statement | None = None
    answer: Answer | None = None

    def to_json(self) -> dict[str, Any]:
        """Accuracy and time, and epsilon with all that gives it a meaning."""
        found: dict[str, Any] = {
            "private": self.statement is not None,
            "test_accuracy": self.test_accuracy,
            "seconds": round(self.seconds, 2),
            "steps": self.steps,
        }
        if self.statement is None or self.answer is None:
            return found
        return found | asdict(self.answer) | {"certified": self.statement.certified}


def train(config: Config, data: Split, on_step: Progress) -> Result:
    """Train as ``config`` says and write the run folder ``config.output``.

    Writes config.yaml; with privacy also ledger.sqlite, model.safetensors, result.json and PRIVACY.md, and non-private
    step logs under nonprivate/; without privacy, everything else goes under nonprivate/.

    Raises:
      ConfigError: the run folder has been used.
      dpkit.errors.Refused, accounting.AccountingError: as :meth:`dpkit.PrivacyEngine.make_private`.
    """
    run = config.output
    if run.exists() and (not run.is_dir() or any(run.iterdir())):
        raise ConfigError(f"the run folder {run} has been used; give another `output`, since its ledger belongs to it.")
    if config.training.seed is None:
        torch.seed()  # torch starts every process from the same seed, and runs should differ
    else:
        torch.manual_seed(config.training.seed)
    model = models.build(config.model, data.train_x.shape[1:], data.classes)
    dataset = TensorDataset(torch.from_numpy(data.train_x), torch.from_numpy(data.train_y))
    loader = DataLoader(dataset, batch_size=config.training.batch_size, shuffle=True)
    settings = config.training
    optimizer = SGD(model.parameters(), lr=settings.learning_rate, momentum=settings.momentum)

    begun = time.perf_counter()
    statement = answer = None
    with _threads_for(data):
        if config.private:
            steps, statement = _private(config, model, optimizer, loader, on_step)
        else:
            steps = _plain(config, model, optimizer, loader, on_step)
    seconds = time.perf_counter() - begun
    if config.private:
        answer = from_ledger(run)

    result = Result(_accuracy(model, data), steps, seconds, statement, answer)
    shareable = run / "nonprivate" if statement is None else run
    save_file({name: value.contiguous() for name, value in model.state_dict().items()}, shareable / "model.safetensors")
    (shareable / "result.json").write_text(json.dumps(result.to_json(), indent=2) + "\n", encoding="utf-8")
    if statement is not None:
        (run / "PRIVACY.md").write_text(f"# Privacy statement\n\n```\n{statement}\n```\n", encoding="utf-8")
    return result


@contextmanager
def _threads_for(data: Split) -> Iterator[None]:
    """One thread for tiny images: sharing so little work among threads costs several times the work."""
    threads = torch.get_num_threads()
    if data.train_x[0].size < 28 * 28:
        torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(threads)


def _private(
    config: Config, model: nn.Module, optimizer: SGD, loader: DataLoader[Any], on_step: Progress
) -> tuple[int, Statement]:
    privacy = config.privacy
    assert privacy is not None  # Config saw to it
    engine = dpkit.PrivacyEngine(config.output, dataset_name=config.dataset, seed=privacy.noise_seed)
    model, optimizer, batches = engine.make_private(
        model,
        optimizer,
        loader,
        num_examples=privacy.num_examples,
        target_epsilon=privacy.epsilon,
        noise_multiplier=privacy.noise_multiplier,
        target_delta=privacy.delta,
        epochs=config.training.epochs,
        max_grad_norm=privacy.max_grad_norm,
        max_physical_batch_size=config.training.max_physical_batch_size,
    )
    planned = engine.plan.steps
    schedule = _schedule(optimizer, config, planned)
    on_step(0, planned, 0.0)
    with _begin(config) as log:
        while (begun := engine.steps_taken) < planned:
            for images, labels in batches:
                optimizer.zero_grad()
                losses = F.cross_entropy(model(images), labels, reduction="none")
                engine.backward(losses)
                optimizer.step()
                if engine.steps_taken == begun:
                    continue  # a microbatch: the logical batch is not released yet
                begun = engine.steps_taken
                schedule.step()
                on_step(begun, planned, round_up(engine.epsilon().upper))
                record = {"step": begun, "mean_loss": losses.detach().mean().item(), **asdict(engine.nonprivate)}
                log.write(json.dumps(record) + "\n")
    return engine.steps_taken, engine.statement()


def _plain(config: Config, model: nn.Module, optimizer: SGD, loader: DataLoader[Any], on_step: Progress) -> int:
    planned = config.training.epochs * len(loader)
    schedule = _schedule(optimizer, config, planned)
    step = 0
    on_step(step, planned, None)
    with _begin(config) as log:
        for _ in range(config.training.epochs):
            for images, labels in loader:
                optimizer.zero_grad()
                loss = F.cross_entropy(model(images), labels)
                loss.backward()
                optimizer.step()
                schedule.step()
                step += 1
                on_step(step, planned, None)
                log.write(json.dumps({"step": step, "mean_loss": loss.item()}) + "\n")
    return step


def _begin(config: Config) -> TextIO:
    """Make the run folder, once nothing can be refused any more; returns the log of what is not private."""
    nonprivate = config.output / "nonprivate"
    nonprivate.mkdir(parents=True, exist_ok=True)
    (config.output / "config.yaml").write_text(configs.dump(config), encoding="utf-8")
    return (nonprivate / "steps.jsonl").open("w", encoding="utf-8")


def _schedule(optimizer: SGD, config: Config, planned: int) -> LambdaLR:
    """The learning rate as a function of the public step count."""
    if config.training.schedule == "linear":
        return LambdaLR(optimizer, lambda step: max(0.0, 1 - step / planned))
    return LambdaLR(optimizer, lambda _: 1.0)


def _accuracy(model: nn.Module, data: Split) -> float:
    """Share of the public test set that the model gets right."""
    model.eval()
    right = 0
    with torch.no_grad():
        for start in range(0, len(data.test_x), 1000):
            images = torch.from_numpy(data.test_x[start : start + 1000])
            labels = torch.from_numpy(data.test_y[start : start + 1000])
            right += int((model(images).argmax(1) == labels).sum())
    return right / len(data.test_x)
