"""Trains in child processes, kills them at random times, and looks at what they leave. A program of its own:

    python tests/engine/kill_trials.py FOLDER TRIALS

Every second trial has two children, which train in folders of their own and share one ledger. A child goes on from the
newest checkpoint of its folder. After each release, and before the optimizer steps, a child writes one byte to a file:
what is counted there was certainly released. Prints one JSON object; exits with 1 at the first ledger that is short.

The program imports torch once and forks, so that a trial takes a tenth of a second and not three.
"""

from __future__ import annotations

import json
import os
import random
import shutil
import signal
import sys
import time
from pathlib import Path

import torch
from torch.nn import functional as F
from torch.utils.data import DataLoader, TensorDataset

import dpkit
from accounting import Ledger
from dpkit.engine import checkpoint
from dpkit.errors import RunFolderError
from dpkit.run_folder import RunFolder


def train(folder: Path, ledger: Path, steps: int | None = None) -> None:
    """Train until killed (or for ``steps`` steps), saving every third step."""
    generator = torch.Generator().manual_seed(1)
    data = TensorDataset(torch.randn(100, 4, generator=generator), torch.zeros(100, dtype=torch.long))
    model = torch.nn.Linear(4, 2)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
    scheduler = torch.optim.lr_scheduler.ExponentialLR(optimizer, 0.999)
    shared = {"ledger": ledger, "dataset_name": "trials"}
    if checkpoint.names(RunFolder(folder)):
        engine = dpkit.PrivacyEngine.resume(folder, **shared)
    else:
        budget = None if ledger.exists() else dpkit.Budget(1e6, 0.5)
        engine = dpkit.PrivacyEngine(folder, **shared, budget=budget)
    model, optimizer, loader = engine.make_private(
        model,
        optimizer,
        DataLoader(data, batch_size=10),
        num_examples=100,
        noise_multiplier=1.0,
        target_delta=1e-3,
        steps=100_000,
        max_grad_norm=1.0,
    )
    releases = (folder / "releases").open("ab", buffering=0)
    with engine.autosave(every=3, keep=2, scheduler=scheduler):
        while engine.steps_taken != steps:
            for x, y in loader:
                optimizer.zero_grad()
                engine.backward(F.cross_entropy(model(x), y, reduction="none"))
                releases.write(b".")
                optimizer.step()
                scheduler.step()
                if engine.steps_taken == steps:
                    break
    engine.detach()


def startup(root: Path) -> float:
    """Seconds from the start of a child to its first saved steps; what is imported late is imported after this."""
    for name in ("cold", "warm"):
        begun = time.perf_counter()
        train(root / name, root / f"{name}.sqlite", steps=3)
    return time.perf_counter() - begun


def child(folder: Path, ledger: Path) -> int:
    """A process that trains in ``folder``; returns its id."""
    process = os.fork()
    if process:
        return process
    try:
        train(folder, ledger)
    except BaseException as error:  # a forked child must not run on into its parent's code
        (folder / "failed").write_text(f"{type(error).__name__}: {error}", encoding="utf-8")
    finally:
        os._exit(1)


def look(folders: list[Path], ledger: Path) -> tuple[int, int, int]:
    """(charges, releases, checkpoints) now; every checkpoint must load and have its anchor in the ledger."""
    releases = sum((folder / "releases").stat().st_size for folder in folders if (folder / "releases").exists())
    checkpoints = 0
    with Ledger.open(ledger, read_only=True) as opened:
        charges = opened.spent().steps_charged
        for folder in folders:
            run = RunFolder(folder)
            for name in checkpoint.names(run):
                manifest = checkpoint.read(run, name).manifest
                opened.check_anchor(manifest.anchor_sequence, manifest.anchor_digest)
                checkpoints += 1
    return charges, releases, checkpoints


def main(root: Path, trials: int) -> int:
    torch.set_num_threads(1)
    seed = random.randrange(2**32)
    times = random.Random(seed)
    folders = [root / "one", root / "two"]
    ledger = root / "ledger.sqlite"
    charges = releases = checkpoints = 0
    longest = 4 * startup(root)
    for trial in range(trials):
        children = [child(folder, ledger) for folder in folders[: 1 + trial % 2]]
        time.sleep(times.uniform(0, longest))
        for process in children:
            os.kill(process, signal.SIGKILL)
            os.waitpid(process, 0)
        if failed := [folder / "failed" for folder in folders if (folder / "failed").exists()]:
            print(f"trial {trial} of seed {seed}: {failed[0].read_text(encoding='utf-8')}", file=sys.stderr)
            return 1
        if not ledger.exists() or not any(checkpoint.names(RunFolder(folder)) for folder in folders):
            if any((folder / "releases").exists() and (folder / "releases").stat().st_size for folder in folders):
                print(f"trial {trial} of seed {seed}: releases without a checkpoint or a ledger", file=sys.stderr)
                return 1
            for file in root.glob("ledger.sqlite*"):
                file.unlink()  # killed before the first state was saved, let alone the first step charged
            for folder in folders:
                shutil.rmtree(folder, ignore_errors=True)
            continue
        charges, releases, checkpoints = look(folders, ledger)
        # A child that dies between charge and release is charged for nothing, once.
        if not releases <= charges <= releases + 2 * trials:
            print(f"trial {trial} of seed {seed}: {releases} releases, {charges} charges", file=sys.stderr)
            return 1
    found = {"trials": trials, "charges": charges, "releases": releases, "checkpoints": checkpoints, "seed": seed}
    print(json.dumps(found))
    return 0


if __name__ == "__main__":
    try:
        sys.exit(main(Path(sys.argv[1]), int(sys.argv[2])))
    except RunFolderError as error:
        sys.exit(str(error))
