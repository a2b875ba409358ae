"""Check K: whatever dies, and whatever becomes of the files, the ledger covers what was released.

The parts run the shipped engine, its checkpoints and its ledger file; what dies is simulated by an exception at the
place of death, after which a new engine finds nothing but files.  ``killed_run.py`` kills processes for real.
"""

from __future__ import annotations

import os
import shutil
import tempfile
from collections.abc import Callable, Iterator
from functools import partial
from itertools import combinations
from pathlib import Path
from typing import Any

import torch
from torch.utils.data import DataLoader, TensorDataset

import accounting
import dpkit
from accounting import AccountingError, Relation
from dpkit.clipping import PerLayerQuantile, Quantile
from dpkit.errors import DpkitError
from dpkit.filters import momentum
from dpkit.mechanisms import Gaussian
from dpkit.sampling import FixedOrder, WithoutReplacement

from .checks import Violation
from .crashes import Crashes, Death, Life, Mortal, run_with_crashes
from .harness import Setup, charges_on_disk
from .subjects import build, honest, loss_of

Chosen = Callable[[str], bool]

LIVES = (
    Life(3, Death.AFTER_THE_RELEASE, goes_on_from=0),
    Life(3, Death.BETWEEN_STEPS, goes_on_from=1),
    Life(2, Death.AFTER_THE_CHARGE, goes_on_from=2),
    Life(1, Death.AFTER_THE_DRAW, goes_on_from=3),
    Life(2, Death.AFTER_THE_RELEASE, goes_on_from=4),
    Life(2, Death.BETWEEN_STEPS, goes_on_from=-1),
    Life(100, Death.BETWEEN_STEPS),
)
"""Every way to die, and going on from each of the first checkpoints."""


def grid_K() -> Iterator[Setup]:
    base = Setup(steps=20, q=0.5, public_n=8, bound=0.7)
    yield base
    yield base.but(micro=3, seed=None)
    yield base.but(clip=Quantile(0.7, noise_std=6.0), filters=(momentum(0.9),))
    yield base.but(clip=PerLayerQuantile(0.7, noise_std=6.0), sampler=WithoutReplacement(4, 8), relation=_REPLACE)
    yield base.but(sampler=FixedOrder(4, 8), relation=Relation.ZERO_OUT)


_REPLACE = Relation.REPLACE_ONE


def check_K(folder: Path, *, only: Chosen = lambda part: True) -> dict[str, int]:
    """All parts. Returns for each of them how many releases, or refusals, were looked at."""
    found = {}
    for name, check in PARTS.items():
        if only(name):
            found[name] = check(folder)
    return found


def check_K_crashes(folder: Path, *, only: Callable[[Setup], bool] = lambda setup: True) -> int:
    """Charges never fall behind releases, and the steps that are left are the planned ones less the charged ones."""
    looked = 0
    for setup in grid_K():
        if only(setup):
            crashes = run_with_crashes(setup, LIVES, folder)
            _compare(crashes, setup)
            looked += len(crashes.past)
    return looked


def _compare(crashes: Crashes, setup: Setup) -> None:
    for number, past in enumerate(crashes.past):
        if past.charges < number + 1:
            what = f"release {number + 1} was made when {past.charges} charges were on the disk"
            raise Violation("K", f"{what} ({setup})")
    for life, (releases, charges) in enumerate(crashes.counts):
        if releases > charges:
            raise Violation("K", f"{releases} releases and {charges} charges after life {life + 1} ({setup})")
    for (charges, left), (_, before) in zip(crashes.states[1:], crashes.counts, strict=False):
        if charges < before:
            raise Violation("K", f"{charges} charges after a resume, {before} before it ({setup})")
        if left != setup.steps - charges:
            raise Violation("K", f"{left} steps are left after {charges} of {setup.steps} charges ({setup})")
    if crashes.charges != setup.steps:
        raise Violation("K", f"{crashes.charges} charges in the end, planned were {setup.steps} ({setup})")
    for (i, one), (j, other) in combinations(enumerate(crashes.past), 2):
        if one.key == other.key or torch.equal(one.noise, other.noise):
            raise Violation("K", f"releases {i + 1} and {j + 1} have the same noise ({setup})")


class Run:
    """A run on made-up data that is led from outside, one step at a time; every step is saved.

    Args:
      checkpoint: goes on from there.
      mechanism: counts the releases, over several runs if they share it.
    """

    def __init__(
        self,
        run_dir: Path,
        mechanism: Mortal,
        *,
        steps: int = 8,
        checkpoint: str | None = None,
        public_n: int = 8,
        delta: float = 1e-5,
        seed: int | None = 3,
        **engine: Any,
    ) -> None:
        self.mechanism = mechanism
        if checkpoint is None:
            self.engine = dpkit.PrivacyEngine(run_dir, seed=seed, **{"dataset_name": "made up", **engine})
        else:
            self.engine = dpkit.PrivacyEngine.resume(run_dir, checkpoint=checkpoint, seed=seed, **engine)
        model = build("mlp", torch.float32)
        self.model, self.optimizer, self.loader = self.engine.make_private(
            model,
            torch.optim.SGD(model.parameters(), lr=0.1),
            DataLoader(TensorDataset(*honest("mlp", 8, torch.float32)), batch_size=4),
            mechanism=mechanism,
            target_delta=delta,
            steps=steps,
            max_grad_norm=1.0,
            num_examples=public_n,
        )
        self.saved: list[str] = []

    def step(self, times: int) -> None:
        for _ in range(times):
            for batch in self.loader:
                self.engine.backward(loss_of(self.model, batch))
                self.optimizer.step()
                self.saved.append(self.engine.save().name)
                break

    def stop(self) -> None:
        self.engine.detach()
        self.engine.ledger.close()


def _new(folder: Path) -> tuple[Path, Mortal]:
    run_dir = Path(tempfile.mkdtemp(dir=folder))
    return run_dir, Mortal(Gaussian(1.3), run_dir / "ledger.sqlite")


def _goes_on(what: str, mechanism: Mortal, start: Callable[[], Run]) -> None:
    """Nothing may be released: :class:`Violation` if it is."""
    before = len(mechanism.past)
    run = None
    try:
        run = start()
        run.step(1)
    except (DpkitError, AccountingError):
        pass
    finally:
        if run is not None:
            run.stop()
    if len(mechanism.past) > before:
        raise Violation("K", f"a run went on {what}, and released")


def _check_older_copies(folder: Path) -> int:
    """A ledger that was put back to an earlier state: alone, with the note beside it, or under a run that goes on."""
    for with_note in (False, True):
        _check_older_copy(folder, with_note)
    run_dir, mechanism = _new(folder)
    run = Run(run_dir, mechanism)
    run.step(2)
    older = mechanism.path.read_bytes()
    run.step(1)
    mechanism.path.write_bytes(older)
    before = len(mechanism.past)
    try:
        run.step(1)
    except (DpkitError, AccountingError):
        pass
    else:
        raise Violation("K", "a run went on after its ledger was replaced by an older copy under its hands")
    finally:
        run.stop()
    if len(mechanism.past) > before:
        raise Violation("K", "a step was released after the ledger was replaced by an older copy")
    return 5


def _check_older_copy(folder: Path, with_note: bool) -> None:
    run_dir, mechanism = _new(folder)
    ledger, note = run_dir / "ledger.sqlite", run_dir / "ledger.sqlite.tip"
    run = Run(run_dir, mechanism)
    run.step(2)
    older, older_note = ledger.read_bytes(), note.read_bytes()
    run.step(2)
    run.stop()
    ledger.write_bytes(older)
    if with_note:
        note.write_bytes(older_note)
    what = f"with an older ledger{' and its note' if with_note else ''}"
    _goes_on(what, mechanism, lambda: Run(run_dir, mechanism, checkpoint=run.saved[-1]))
    if with_note:
        return  # nothing that is left in the folder knows of the later steps, but for the later checkpoints
    then = run.saved[1]
    _goes_on(f"{what}, from the checkpoint of that time", mechanism, lambda: Run(run_dir, mechanism, checkpoint=then))
    try:
        told = accounting.Ledger.open(ledger).spent()
    except AccountingError:
        return
    raise Violation("K", f"an older ledger tells that {told.steps_charged} of 4 steps were charged")


def _damages(content: bytes) -> Iterator[tuple[str, bytes | None]]:
    """What may become of a ledger's file; None for a file that is gone."""
    middle = len(content) // 2
    yield "that is gone", None
    yield "that is empty", b""
    yield "of zeros", bytes(len(content))
    yield "of text", b"not a ledger\n" * 50
    yield "cut in the middle", content[:middle]
    yield "with its end overwritten", content[:-200] + os.urandom(200)
    yield "with its head overwritten", os.urandom(100) + content[100:]


def _check_damage(folder: Path) -> int:
    """A ledger that is damaged or gone is not an empty one: nothing is released, and no epsilon is told."""
    run_dir, mechanism = _new(folder)
    run = Run(run_dir, mechanism)
    run.step(3)
    run.stop()
    content = mechanism.path.read_bytes()
    looked = 0
    for what, damaged in _damages(content):
        starts: tuple[Callable[[Path], Run], ...] = (
            lambda copy: Run(copy, mechanism),
            lambda copy: Run(copy, mechanism, checkpoint=run.saved[-1]),
            lambda copy: Run(copy.with_name("new"), mechanism, ledger=copy / "ledger.sqlite"),
        )
        for start in starts:
            elsewhere = Path(tempfile.mkdtemp(dir=folder)) / "run"
            shutil.copytree(run_dir, elsewhere)
            ledger = elsewhere / "ledger.sqlite"
            ledger.unlink() if damaged is None else ledger.write_bytes(damaged)
            mechanism.path = ledger
            _goes_on(f"with a ledger {what}", mechanism, partial(start, elsewhere))
            try:
                told = accounting.Ledger.open(ledger).spent()
            except AccountingError:
                pass
            else:
                if told.steps_charged < 3:
                    raise Violation(
                        "K", f"epsilon is {told.epsilon} after {told.steps_charged} steps, of a ledger {what}"
                    )
            looked += 1
    return looked


def _check_two_runs(folder: Path) -> int:
    """Runs on one data set share its ledger: what one of them has planned is not there for another one."""
    run_dir, mechanism = _new(folder)
    shared = {"ledger": mechanism.path, "dataset_name": "made up"}
    first = Run(run_dir, mechanism, **shared)
    first.step(2)
    elsewhere = Path(tempfile.mkdtemp(dir=folder))
    what = "beside one that had the whole budget of the data set"
    _goes_on(what, mechanism, lambda: Run(elsewhere, mechanism, **shared))
    first.step(2)
    first.stop()
    _goes_on(f"{what}, when that had ended", mechanism, lambda: Run(elsewhere, mechanism, **shared))
    _goes_on(
        "in the folder of an earlier one, on other data",
        mechanism,
        lambda: Run(elsewhere, mechanism, ledger=mechanism.path, dataset_name="another name"),
    )
    charges = len(charges_on_disk(mechanism.path))
    if charges != len(mechanism.past):
        raise Violation("K", f"{len(mechanism.past)} releases and {charges} charges of two runs")
    # With room for two, both are there.
    budget = accounting.Budget(2 * first.engine.plan.epsilon().upper + 0.01, 2e-5)
    run_dir, mechanism = _new(folder)
    shared = {"ledger": mechanism.path, "dataset_name": "made up"}
    runs = [
        Run(run_dir, mechanism, budget=budget, seed=1, **shared),
        Run(Path(tempfile.mkdtemp(dir=folder)), mechanism, seed=2, **shared),
    ]
    for run in runs * 2:
        run.step(2)
    spent = runs[0].engine.ledger.spent()
    for run in runs:
        run.stop()
    if not len(mechanism.past) == len(charges_on_disk(mechanism.path)) == spent.steps_charged == 8:
        raise Violation("K", f"{len(mechanism.past)} releases, {spent.steps_charged} charges of two runs")
    return 11


PARTS: dict[str, Callable[[Path], int]] = {
    "crashes": check_K_crashes,
    "older copies": _check_older_copies,
    "damage": _check_damage,
    "two runs": _check_two_runs,
}
