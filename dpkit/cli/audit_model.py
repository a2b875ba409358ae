"""``dpkit audit model``: membership inference against the model of a finished run. An ATTACK REPORT, never an epsilon.

Members are the training examples, non-members the test examples of the run's data set. Nobody tossed a coin for either,
so the scores support no lower bound on epsilon and are not written in the form that ``dpkit audit scores`` reads: for
that, train with canaries (``dpkit.audit.input_canaries``). Where training and test part differ in more than chance, the
attack by loss measures that difference as well; the attack with shadow models compares each example with itself.

Shadow models are trained as the run was: same model, settings and noise multiplier, on random halves of the training
and test examples, in pairs of a half and the other half. They are private data; they lie under RUN/nonprivate while
they are needed, and are charged to no ledger, as nothing of them is released.

Everything that is printed or written is computed from training examples without noise: NOT PRIVATE. It goes to
RUN/nonprivate/membership.json and where ``--plot`` says.
"""

from __future__ import annotations

import hashlib
import json
import math
import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

import accounting
from accounting import Gaussian, Ledger, Statement
from dpkit import datasets
from dpkit.callbacks import StepRecord
from dpkit.datasets import Split
from dpkit.errors import CheckpointError, ConfigError, LedgerError, RunFolderError
from dpkit.run_folder import RunFolder

from . import config as configs
from .audit_output import print_not_certified
from .config import Config
from .epsilon import say
from .pictures import form_of, refuse_plot, write_picture
from .progress import TrainingBar, training_bar
from .terminal import Debug, Json, err, print_json
from .training_run import check_option

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray
    from torch import nn

    from dpkit.audit.membership import MembershipReport

LARGEST_MODEL = 2**30
"""Bytes of a model that are read at most; those of `dpkit train` are far smaller."""

_FEWEST_SHADOWS, _MOST_SHADOWS = 4, 1000
_ROWS = 1000  # scored at once
_NOT_A_BOUND = (
    "This neither confirms nor contradicts an epsilon: natural examples are told apart far worse than epsilon allows "
    "for, and a better attack may tell them apart better. `dpkit audit engine` and canaries bound epsilon from below."
)
_DIFFERENCE = (
    "Non-members are the test part. Where it differs from the training part in more than chance, the attack by loss "
    "measures that difference as well."
)


@dataclass(frozen=True)
class _Subject:
    """A finished run.

    Attributes:
      weights: the content of its model file.
      statement: what its ledger says; None for a run without privacy.
      noise_multiplier: what the ledger was charged for; likewise.
      seconds: how long its training took, if it says so.
    """

    folder: RunFolder
    config: Config
    weights: bytes
    statement: Statement | None
    noise_multiplier: float | None
    seconds: float | None


def model(
    run: Annotated[Path, typer.Argument(help="The folder of a finished run of `dpkit train`.")],
    *,
    data_dir: Annotated[
        Path | None, typer.Option(help="Folder of the data files; left out, the variable DPKIT_DATA.")
    ] = None,
    shadows: Annotated[
        int, typer.Option(help="Train so many shadow models as the run was, for the stronger attack; 16 is a start.")
    ] = 0,
    confidence: Annotated[float, typer.Option(help="Of every interval by itself.")] = 0.95,
    seed: Annotated[int, typer.Option(help="Of the random halves and first weights of the shadow models.")] = 0,
    plot: Annotated[
        Path | None,
        typer.Option(metavar="FILE.png|svg", help="Draw members found against false alarms; NOT PRIVATE, as all here."),
    ] = None,
    json_output: Json = False,
    debug: Debug = False,
) -> None:
    """Attack a trained model: who was in the training data? A report, NOT PRIVATE, and no bound on epsilon."""
    check_option(
        "--shadows",
        shadows,
        lambda x: x == 0 or _FEWEST_SHADOWS <= x <= _MOST_SHADOWS,
        f"fewer do not tell how much scores vary; give 0, or from {_FEWEST_SHADOWS} to {_MOST_SHADOWS}",
    )
    check_option("--confidence", confidence, lambda x: 0 < x < 1, "it is a probability; give 0.95, say")
    check_option("--seed", seed, lambda x: 0 <= x < 2**63, "give a number from 0 to 2^63")
    folder = RunFolder(run)
    if plot is not None:
        refuse_plot(plot)
        _refuse_shareable(plot, folder)
    subject = _subject(folder)
    data = datasets.load(subject.config.dataset, data_dir)

    attack = _Attack(subject, data, confidence)
    reports = [attack.by_loss()]
    if shadows:
        _tell_time(subject, data, shadows)
        reports.append(attack.by_shadows(shadows, seed))
    found = _as_json(subject, reports, run)
    written = folder.write("nonprivate", "membership.json", data=json.dumps(found, indent=2) + "\n")
    if plot is not None:
        _draw(plot, attack, subject)
    if json_output:
        print_json(found | {"written": str(written)})
        return
    _print(subject, reports)
    say(f"wrote {written}" + ("" if plot is None else f" and {plot}"))


# -- the run ----------------------------------------------------------------------------------------------------------


def _subject(folder: RunFolder) -> _Subject:
    """The finished run in ``folder``.

    Raises:
      RunFolderError: there is none, it has not finished, or it cannot be read.
      ConfigError: its configuration is none.
      LedgerError: its ledger cannot be verified, is of another data set, or a file contradicts it.
    """
    config = configs.decode(folder.read("config.yaml"), source=str(folder.path / "config.yaml"))
    place = () if config.private else ("nonprivate",)
    statement = multiplier = None
    if not config.private and folder.exists("ledger.sqlite"):
        raise LedgerError(
            f"{folder.path / 'config.yaml'} says `private: false`, and there is a ledger beside it. "
            f"`dpkit verify {folder.path}` looks at all files."
        )
    for name in ("model.safetensors", "result.json"):
        if not folder.exists(*place, name):
            go_on = f"`dpkit train --resume {folder.path}` goes on with it" if config.private else "train it again"
            raise RunFolderError(f"{folder.entry(*place, name)} is missing: the run has not finished; {go_on}.")
    weights = folder.read(*place, "model.safetensors", limit=LARGEST_MODEL)
    result = _object(folder, *place, "result.json")
    if result.get("model_sha256") != hashlib.sha256(weights).hexdigest():
        raise LedgerError(
            f"{folder.entry(*place, 'model.safetensors')} is not the model of result.json, so whose it is, is unknown. "
            f"`dpkit verify {folder.path}` looks at all files."
        )
    timed = result
    if config.private:
        statement, multiplier = _ledger(folder, config, result)
        timed = _object(folder, "nonprivate", "times.json") if folder.exists("nonprivate", "times.json") else {}
    seconds = timed.get("seconds")
    known = isinstance(seconds, (int, float)) and 0 <= seconds < math.inf
    return _Subject(folder, config, weights, statement, multiplier, seconds if known else None)


def _ledger(folder: RunFolder, config: Config, result: dict[str, Any]) -> tuple[Statement, float]:
    """What the ledger says of the run, and the noise multiplier that it was charged for."""
    path = folder.entry("ledger.sqlite")
    with Ledger.open(path, dataset_name=config.dataset, read_only=True) as ledger:
        sequence, digest = result.get("anchor_sequence"), result.get("anchor_digest")
        if type(sequence) is not int or not isinstance(digest, str):
            raise LedgerError(
                f"result.json names no entry of {path}, so an older copy of the ledger would not be seen."
            )
        ledger.check_anchor(sequence, digest)
        plans = ledger.plans()
        if not plans:
            raise LedgerError(f"{path} holds no charge: no model was trained under it.")
        event = plans[0][0].event
        noise = event if isinstance(event, Gaussian) else getattr(event, "event", None)
        if not isinstance(noise, Gaussian):
            raise LedgerError(f"{path} is that of {event!r}, which `dpkit train` does not charge.")
        return accounting.statement(ledger), noise.noise_multiplier


def _object(folder: RunFolder, *names: str) -> dict[str, Any]:
    """The JSON object in a file of the run."""
    try:
        found = json.loads(folder.read(*names))
    except (ValueError, RecursionError):
        found = None
    if not isinstance(found, dict):
        raise RunFolderError(
            f"{folder.entry(*names)} is damaged: it is no JSON object. Run `dpkit verify` on the folder."
        )
    return found


def _refuse_shareable(plot: Path, folder: RunFolder) -> None:
    """A picture of private data must not lie among the files that are shared."""
    target, inside = plot.parent.resolve(), folder.path.resolve()
    if target.is_relative_to(inside) and not target.is_relative_to(inside / "nonprivate"):
        raise ConfigError(
            f"--plot {plot} lies in the shareable part of the run, and the picture is NOT PRIVATE; choose "
            f"{folder.path / 'nonprivate' / plot.name}, or a place outside the run."
        )


# -- the attacks ------------------------------------------------------------------------------------------------------


class _Attack:
    """The scores of all examples under the run's model, and the attacks on them."""

    def __init__(self, subject: _Subject, data: Split, confidence: float) -> None:
        import numpy as np

        self._subject, self._data, self._confidence = subject, data, confidence
        self._inputs: NDArray[Any] = np.concatenate([data.train_x, data.test_x])
        self._labels = np.concatenate([data.train_y, data.test_y])
        self._member = np.arange(len(self._labels)) < len(data.train_y)
        self._scores = self._score(_rebuilt(subject.config, data, subject.weights))
        self.ratios: NDArray[np.float64] | None = None

    def by_loss(self) -> MembershipReport:
        from dpkit.audit.membership import loss_threshold

        inside, outside = self.split(self._scores)
        return loss_threshold(inside, outside, confidence=self._confidence)

    def by_shadows(self, count: int, seed: int) -> MembershipReport:
        import numpy as np

        from dpkit.audit.membership import likelihood_ratios, report

        rng = np.random.default_rng(seed)
        inside, scores = [], []
        half = np.zeros(0, dtype=bool)
        # Whatever happens, what is left of a shadow model is left in the non-private part of the run.
        with (
            tempfile.TemporaryDirectory(dir=self._subject.folder.make("nonprivate"), prefix="shadows-") as place,
            training_bar(f"{count} shadow models", None) as bar,
        ):
            for number in range(count):
                half = ~half if number % 2 else rng.permutation(len(self._labels)) < len(self._labels) // 2
                inside.append(half)
                weights = self._train(half, Path(place) / str(number), seed + number, _PartBar(bar, number, count))
                scores.append(self._score(_rebuilt(self._subject.config, self._data, weights)))
        self.ratios = likelihood_ratios(self._scores, np.stack(scores), np.stack(inside))
        words = f"LiRA online, {count} shadow models"
        return report(*self.split(self.ratios), attack=words, confidence=self._confidence)

    def curves(self) -> list[tuple[str, NDArray[np.float64]]]:
        """(attack, one statistic for each example)."""
        found = [("loss threshold", self._scores)]
        return found if self.ratios is None else [*found, ("LiRA", self.ratios)]

    def split(self, values: NDArray[np.float64]) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
        """Those of members and of non-members."""
        return values[self._member], values[~self._member]

    def _train(self, inside: NDArray[np.bool_], place: Path, seed: int, bar: TrainingBar) -> bytes:
        """The weights of a model that is trained as the run's was, on the examples that are ``inside``."""
        from .loop import train

        outside = (~inside).nonzero()[0][:_ROWS]  # for a test accuracy that nobody reads
        part = Split(
            self._inputs[inside], self._labels[inside], self._inputs[outside], self._labels[outside], self._data.classes
        )
        config = _shadow_config(self._subject, len(part.train_y), place, seed)
        train(config, part, bar)
        folder = RunFolder(place)
        return folder.read(*(() if config.private else ("nonprivate",)), "model.safetensors", limit=LARGEST_MODEL)

    def _score(self, attacked: nn.Module) -> NDArray[np.float64]:
        """The logit of the confidence in the true label, of every example."""
        import numpy as np
        import torch

        from dpkit.audit.membership import logit_confidence

        attacked.eval()
        with torch.no_grad():
            logits = [
                attacked(torch.from_numpy(self._inputs[start : start + _ROWS])).numpy()
                for start in range(0, len(self._inputs), _ROWS)
            ]
        return logit_confidence(np.concatenate(logits), self._labels)


class _PartBar(TrainingBar):
    """The bar of one of several trainings, as a part of the bar of all. The epsilon of a shadow model is nobody's."""

    def __init__(self, whole: TrainingBar, number: int, count: int) -> None:
        self._whole, self._number, self._count = whole, number, count

    def moved(self, step: int, planned: int, spent: str = "") -> None:
        self._whole.moved(self._number * planned + step, self._count * planned)

    def on_step(self, record: StepRecord) -> None:
        self.moved(record.step, record.planned)


def _rebuilt(config: Config, data: Split, weights: bytes) -> nn.Module:
    """The model of the configuration with these weights.

    Raises:
      CheckpointError: they are damaged, or those of another model.
    """
    import safetensors
    import safetensors.torch

    from . import models

    built = models.build(config.model, data.train_x.shape[1:], data.classes)
    try:
        built.load_state_dict(safetensors.torch.load(weights))
    except (RuntimeError, safetensors.SafetensorError) as error:
        reason = " ".join(str(error).split())[:200]
        raise CheckpointError(
            f"model.safetensors is not one of the model {config.model!r} on {config.dataset!r} ({reason}). Run `dpkit "
            "verify` on the folder."
        ) from None
    return built


def _shadow_config(subject: _Subject, examples: int, output: Path, seed: int) -> Config:
    """The run's configuration for another, smaller data set: noise as it was, and no checkpoints on the way."""
    config = subject.config
    privacy = config.privacy
    if config.private and privacy is not None:
        declared = None if privacy.num_examples is None else examples
        noise = {"epsilon": None, "noise_multiplier": subject.noise_multiplier, "noise_seed": None}
        privacy = privacy.model_copy(update=noise | {"num_examples": declared})
    training = config.training.model_copy(update={"seed": seed % 2**63, "checkpoint_every": 10**9})
    return config.model_copy(update={"output": output, "privacy": privacy, "training": training, "logging": ()})


def _tell_time(subject: _Subject, data: Split, shadows: int) -> None:
    """How long it will take, before it begins."""
    half = (len(data.train_y) + len(data.test_y)) // 2
    words = f"training {shadows} shadow models on {half} examples each"
    if subject.seconds is None:
        err.print(f"{words}; how long the run itself took is not known, so neither is this", markup=False)
    else:
        seconds = subject.seconds * shadows * half / len(data.train_y)
        long = f"{seconds:.0f} s" if seconds < 120 else f"{seconds / 60:.0f} minutes"
        err.print(f"{words}: about {long}, from the {subject.seconds:.1f} s of the run", markup=False)


# -- what is said -----------------------------------------------------------------------------------------------------


def _as_json(subject: _Subject, reports: list[MembershipReport], run: Path) -> dict[str, Any]:
    stated = subject.statement
    return {
        "kind": "attack report, not private, not a bound on epsilon",
        "run": str(run),
        "dataset": subject.config.dataset,
        "model": subject.config.model,
        "reports": [report.to_json() for report in reports],
        "claim": None
        if stated is None
        else {
            "epsilon": stated.epsilon,
            "delta": stated.delta,
            "unit": stated.unit,
            "relation": stated.relation,
            "accountant": stated.accountant,
            "sampling": "; ".join(dict.fromkeys(plan.sampling for plan in stated.plans)),
        },
        "certified": None if stated is None else stated.certified,
        "notes": [_NOT_A_BOUND, _DIFFERENCE],
    }


def _print(subject: _Subject, reports: list[MembershipReport]) -> None:
    for report in reports:
        say(str(report))
    say("")
    stated = subject.statement
    if stated is None:
        say("The run was trained WITHOUT privacy and claims nothing.", style="yellow")
    else:
        say(
            f"The run claims epsilon <= {stated.epsilon:.4f} at delta = "
            f"{accounting.round_up_text(stated.delta)}\n"
            f"  unit: one {stated.unit}; relation: {stated.relation}; accountant: {stated.accountant}\n"
            f"  sampling: {'; '.join(dict.fromkeys(plan.sampling for plan in stated.plans))}"
        )
        print_not_certified(stated.certified, stated.certified_reason)
    say(_NOT_A_BOUND, style="yellow")
    say(_DIFFERENCE, style="yellow")
    say("NOT PRIVATE: computed from training examples without noise. Do not share it.", style="red")


def _draw(path: Path, attack: _Attack, subject: _Subject) -> None:
    """Writes the picture to a file that does not exist yet."""
    from dpkit.audit.membership import roc
    from dpkit.report.membership_plot import Curve, draw_membership

    curves = [Curve(name, *roc(*attack.split(values))) for name, values in attack.curves()]
    _, outside = attack.split(attack.curves()[0][1])
    stated = subject.statement
    how = (
        "trained without privacy"
        if stated is None
        else f"claimed: epsilon <= {stated.epsilon:.4g} at delta = {accounting.round_up_text(stated.delta)}"
    )
    title = f"{subject.config.model} on {subject.config.dataset}, {how}"
    write_picture(path, draw_membership(curves, title, form_of(path), nonmembers=len(outside)))
