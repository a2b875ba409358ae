"""Trains in processes that are killed by SIGKILL at random times, and looks at what they leave. A program of its own:

    python -m soundness.killed_run FOLDER KILLS [BUG]

Every process goes on from the newest checkpoint of the one before.  The mechanism writes one byte to a file after it
has added the noise: what is counted there was certainly released.  ``BUG`` is the number of a mutant that is put in
first, so that the trials are known to be able to fail.  Prints one JSON object; exits with 1 at the first ledger that
has fewer charges than there were releases.

The program imports torch once and forks, so that a kill takes a tenth of a second and not three.
"""

from __future__ import annotations

import json
import os
import random
import signal
import sys
import time
from pathlib import Path
from typing import Any

import pytest
import torch

from dpkit.engine import checkpoint
from dpkit.mechanisms import Gaussian, NoiseKey
from dpkit.run_folder import RunFolder
from dpkit.types import ClippedSum, Released

from .crashes import Mortal
from .harness import charges_on_disk
from .ledger_checks import Run

SLOWED = 0.02  # seconds after each release: so short a time as a charge takes would seldom be struck


class _Counted(Mortal):
    def release(self, clipped: ClippedSum, state: Any, key: NoiseKey) -> tuple[Released, Any]:
        released = self.inner.release(clipped, state, key)
        with self.path.with_name("releases").open("ab", buffering=0) as file:
            file.write(b".")
        time.sleep(SLOWED)
        return released


def train(run_dir: Path) -> None:
    """Until killed."""
    names = checkpoint.names(RunFolder(run_dir)) if run_dir.exists() else []
    mechanism = _Counted(Gaussian(1.3), run_dir / "ledger.sqlite")
    Run(run_dir, mechanism, steps=100_000, checkpoint=names[-1] if names else None, seed=None).step(100_000)


def _has_gone_on(run_dir: Path, releases: int) -> bool:
    counted = run_dir / "releases"
    saved = run_dir.exists() and bool(checkpoint.names(RunFolder(run_dir)))
    return saved and counted.exists() and counted.stat().st_size > releases


def main(folder: Path, kills: int) -> int:
    torch.set_num_threads(1)
    times, run_dir = random.Random(7), folder / "run"
    ledger, releases, charges = run_dir / "ledger.sqlite", 0, 0
    for kill in range(kills):
        process = os.fork()
        if not process:
            try:
                train(run_dir)
            except BaseException as error:  # a forked child must not run on into its parent's code
                (folder / "failed").write_text(f"{type(error).__name__}: {error}", encoding="utf-8")
            finally:
                os._exit(1)
        # Every second one is left alone until it has released something; the first one, until there is something to go
        # on from.
        while not (kill % 2 or _has_gone_on(run_dir, releases) or (folder / "failed").exists()):
            time.sleep(0.002)
        time.sleep(times.uniform(0.0, 0.05 if kill % 2 == 0 else 0.4))
        os.kill(process, signal.SIGKILL)
        os.waitpid(process, 0)
        if (folder / "failed").exists():
            print((folder / "failed").read_text(encoding="utf-8"), file=sys.stderr)
            return 2
        releases, charges = len((run_dir / "releases").read_bytes()), len(charges_on_disk(ledger))
        if releases > charges:
            print(f"kill {kill + 1}: {releases} releases, {charges} charges", file=sys.stderr)
            return 1
    print(json.dumps({"kills": kills, "releases": releases, "charges": charges}))
    return 0


if __name__ == "__main__":
    with pytest.MonkeyPatch.context() as patch:
        if sys.argv[3:]:
            from .catalogue import BUGS
            from .mutants import Active

            next(bug for bug in BUGS if bug.id == sys.argv[3]).apply(patch, Active())
        code = main(Path(sys.argv[1]), int(sys.argv[2]))
    sys.exit(code)
