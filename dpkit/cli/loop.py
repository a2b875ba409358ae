"""The training loop behind ``dpkit train`` and ``dpkit demo``: one loop with privacy, one without, one result.

What it returns and shows is public or released: step counts, epsilon, the accuracy of the released model on test data.
Losses, batch counts and times are not; they go to ``RUN/nonprivate/`` and nowhere else. A run without privacy is
non-private as a whole: its model and its result go there, too.
"""

from __future__ import annotations

import hashlib
import json
import os
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import safetensors.torch
import torch
from torch import nn
from torch.nn import functional as F
from torch.optim import SGD
from torch.optim.lr_scheduler import LambdaLR
from torch.utils.data import DataLoader, TensorDataset

import dpkit
from accounting import Statement
from dpkit import report
from dpkit.callbacks import Callback, MetricsFile
from dpkit.datasets import Split
from dpkit.errors import ConfigError
from dpkit.run_folder import RunFolder

from . import config as configs
from . import models
from .config import Config
from .epsilon import Answer, from_ledger
from .progress import TrainingBar

_CHECKPOINTS_KEPT = 2


@dataclass(frozen=True)
class Result:
    """What a run gave. Without privacy there is neither a statement nor an answer, and nothing here is private.

    Attributes:
      test_accuracy: share of the test set that the trained model gets right.
      steps: logical steps behind the model; a run that was killed and resumed was charged for more.
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
        paid = {"steps": self.steps, "steps_charged": self.answer.steps, "certified": self.statement.certified}
        return found | asdict(self.answer) | paid


def train(config: Config, data: Split, bar: TrainingBar, *, resume: bool = False) -> Result:
    """Train as ``config`` says and write the run folder ``config.output``.

    Writes config.yaml; with privacy also ledger.sqlite, checkpoints/, metrics.jsonl, model.safetensors, result.json and
    PRIVACY.md, and non-private step logs under nonprivate/; without privacy, everything else goes under nonprivate/.

    Args:
      resume: go on from the newest checkpoint in the run folder.
    Raises:
      ConfigError: the run folder has been used, and the run is not resumed.
      dpkit.errors.CheckpointError, dpkit.errors.RunFolderError: the run cannot be resumed, or written.
      dpkit.errors.Refused, accounting.AccountingError: as :meth:`dpkit.PrivacyEngine.make_private`.
    """
    run = RunFolder(config.output)
    if not resume and run.path.exists() and any(run.path.iterdir()):
        raise ConfigError(
            f"the run folder {run.path} has been used; give another `output`, since its ledger belongs to it"
            + (f", or go on with `dpkit train --resume {run.path}`." if run.names("checkpoints") else ".")
        )
    if config.training.seed is None:
        torch.seed()  # torch starts every process from the same seed, and runs should differ
    else:
        torch.manual_seed(config.training.seed)
    model = models.build(config.model, data.train_x.shape[1:], data.classes)
    dataset = TensorDataset(torch.from_numpy(data.train_x), torch.from_numpy(data.train_y))
    loader = DataLoader(dataset, batch_size=config.training.batch_size, shuffle=True)
    settings = config.training
    optimizer = SGD(model.parameters(), lr=settings.learning_rate, momentum=settings.momentum)

    def evaluate() -> float:
        return _accuracy(model, data)

    begun = time.perf_counter()
    statement = answer = None
    with _threads_for(data):
        if config.private:
            steps, statement = _private(config, run, model, optimizer, loader, evaluate, bar, resume)
        else:
            steps = _plain(config, run, model, optimizer, loader, bar)
        seconds = time.perf_counter() - begun
        accuracy = evaluate()
    if config.private:
        answer = from_ledger(run.path)
    result = Result(accuracy, steps, seconds, statement, answer)
    _write_results(run, model, result)
    return result


def _write_results(run: RunFolder, model: nn.Module, result: Result) -> None:
    """The model, the result and, with privacy, the statement: to the run folder, or to its non-private part."""
    shareable = () if result.statement is not None else ("nonprivate",)
    weights = {name: value.contiguous() for name, value in model.state_dict().items()}
    data = safetensors.torch.save(weights)
    run.write(*shareable, "model.safetensors", data=data)
    found = result.to_json() | {"model_sha256": hashlib.sha256(data).hexdigest()}
    if result.statement is not None:
        # How long a batch takes tells how large it was, so times stay out of what is shared.
        run.write("nonprivate", "times.json", data=json.dumps({"seconds": found.pop("seconds")}) + "\n")
        # Where the folder lay on this machine, and what is never to be reported as the guarantee.
        for name in ("source", "lower", "estimate"):
            del found[name]
        found |= {
            "anchor_sequence": result.statement.anchor_sequence,
            "anchor_digest": result.statement.anchor_digest,
        }
    run.write(*shareable, "result.json", data=json.dumps(found, indent=2) + "\n")
    if result.statement is not None:
        run.write("PRIVACY.md", data=report.privacy_md(run))
        run.remove("report.html")  # of an earlier moment, when the run was resumed


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
    config: Config,
    run: RunFolder,
    model: nn.Module,
    optimizer: SGD,
    loader: DataLoader[Any],
    evaluate: Callable[[], float],
    bar: TrainingBar,
    resume: bool,
) -> tuple[int, Statement]:
    privacy = config.privacy
    assert privacy is not None  # Config saw to it
    callbacks = [_ConfigFile(config, run), bar, MetricsFile(run, nonprivate=True), *_loggers(config, run)]
    start = dpkit.PrivacyEngine.resume if resume else dpkit.PrivacyEngine
    engine = start(run.path, dataset_name=config.dataset, seed=privacy.noise_seed, callbacks=callbacks)
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
    bar.moved(engine.steps_taken, engine.steps_taken + engine.steps_left)
    every = config.training.checkpoint_every or -(-planned // config.training.epochs)
    try:
        with engine.autosave(every=every, keep=_CHECKPOINTS_KEPT, scheduler=schedule, config=_Settings(config)):
            while engine.steps_left:
                begun = engine.steps_taken
                for inputs, labels in batches:
                    optimizer.zero_grad()
                    engine.backward(F.cross_entropy(model(inputs), labels, reduction="none"))
                    optimizer.step()
                    if engine.steps_taken > begun:  # not a microbatch before the last one, which releases
                        begun = engine.steps_taken
                        schedule.step()
                engine.log(test_accuracy=evaluate())
        return engine.steps_taken, engine.statement()
    finally:
        engine.detach()


class _Settings:
    """The configuration as a state: what a run was begun with is what it goes on with."""

    def __init__(self, config: Config) -> None:
        # How often a run is saved and who is told may change; where it lies is not up to the file.
        training = config.training.model_copy(update={"checkpoint_every": None})
        privacy = config.privacy and config.privacy.model_copy(update={"noise_seed": None})
        fixed = {"training": training, "privacy": privacy, "logging": (), "output": Path()}
        self._text = configs.dump(config.model_copy(update=fixed))

    def state_dict(self) -> dict[str, str]:
        return {"yaml": self._text}

    def load_state_dict(self, state: dict[str, str]) -> None:
        """
        Raises:
          ConfigError: a setting was changed since the run was begun.
        """
        changed = sorted(set(self._text.splitlines()) ^ set(state["yaml"].splitlines()))
        if changed:
            raise ConfigError(
                f"config.yaml was changed since the run was begun ({'; '.join(line.strip() for line in changed)}); put "
                "it back, or start a new run."
            )


class _ConfigFile(Callback):
    """Writes config.yaml, once nothing can be refused any more and before anybody else is told."""

    def __init__(self, config: Config, run: RunFolder) -> None:
        self._config = config
        self._run = run

    def on_begin(self, settings: Mapping[str, object]) -> None:
        if not self._run.exists("config.yaml"):
            _keep_config(self._config, self._run)


def _loggers(config: Config, run: RunFolder) -> list[Callback]:
    """The callbacks that the configuration asks for by name."""
    found: list[Callback] = []
    if "tensorboard" in config.logging:
        from dpkit.integrations.tensorboard import TensorBoard

        found.append(TensorBoard(run))
    if "mlflow" in config.logging:
        from dpkit.integrations.mlflow import MLflow

        # Left to itself, MLflow would write into the folder from which the command was started.
        here = f"sqlite:///{(run.path / 'mlflow.db').absolute()}"
        found.append(MLflow("dpkit", tracking_uri=os.environ.get("MLFLOW_TRACKING_URI") or here))
    return found


def _plain(
    config: Config, run: RunFolder, model: nn.Module, optimizer: SGD, loader: DataLoader[Any], bar: TrainingBar
) -> int:
    planned = config.training.epochs * len(loader)
    schedule = _schedule(optimizer, config, planned)
    step = 0
    bar.moved(step, planned)
    _keep_config(config, run)
    with run.append("nonprivate", "steps.jsonl") as log:
        for _ in range(config.training.epochs):
            for inputs, labels in loader:
                optimizer.zero_grad()
                loss = F.cross_entropy(model(inputs), labels)
                loss.backward()
                optimizer.step()
                schedule.step()
                step += 1
                bar.moved(step, planned)
                log.write(json.dumps({"step": step, "mean_loss": loss.item()}) + "\n")
    return step


def _keep_config(config: Config, run: RunFolder) -> None:
    """Begin the run folder, once nothing can be refused any more.

    Without the noise seed: who has it can take the noise away again. A seeded run is resumed with fresh noise.
    """
    if config.privacy is not None:
        config = config.model_copy(update={"privacy": config.privacy.model_copy(update={"noise_seed": None})})
    run.write("config.yaml", data=configs.dump(config))


def _schedule(optimizer: SGD, config: Config, planned: int) -> LambdaLR:
    """The learning rate as a function of the public step count."""
    if config.training.schedule == "linear":
        return LambdaLR(optimizer, lambda step: max(0.0, 1 - step / planned))
    return LambdaLR(optimizer, lambda _: 1.0)


def _accuracy(model: nn.Module, data: Split) -> float:
    """Share of the test set that the model gets right; the test set is no part of what the guarantee protects."""
    training = model.training
    model.eval()
    right = 0
    with torch.no_grad():
        for start in range(0, len(data.test_x), 1000):
            inputs = torch.from_numpy(data.test_x[start : start + 1000])
            labels = torch.from_numpy(data.test_y[start : start + 1000])
            right += int((model(inputs).argmax(1) == labels).sum())
    model.train(training)
    return right / len(data.test_x)
