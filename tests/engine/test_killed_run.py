"""A run that is killed at any instant leaves a ledger that covers everything it released."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import textwrap
import time
from pathlib import Path

import pytest

from accounting import Ledger

RUN = textwrap.dedent(
    """
    import sys, torch
    from pathlib import Path
    from torch.nn import functional as F
    from torch.utils.data import DataLoader, TensorDataset
    import dpkit
    torch.set_num_threads(1)
    folder = Path(sys.argv[1])
    model = torch.nn.Linear(4, 2)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    data = TensorDataset(torch.randn(100, 4), torch.zeros(100, dtype=torch.long))
    engine = dpkit.PrivacyEngine(folder)
    model, optimizer, loader = engine.make_private(
        model, optimizer, DataLoader(data, batch_size=10), num_examples=100, noise_multiplier=1.0, target_delta=1e-3,
        steps=100_000, max_grad_norm=1.0)
    releases = (folder / "releases").open("ab", buffering=0)
    print("begun", flush=True)
    while True:
        for x, y in loader:
            optimizer.zero_grad()
            engine.backward(F.cross_entropy(model(x), y, reduction="none"))
            releases.write(b".")    # after the release: what is counted here was certainly released
            optimizer.step()
    """
)


def killed_after(folder: Path, seconds: float) -> tuple[int, int]:
    """(charges in the ledger, releases that certainly happened) of a run killed ``seconds`` after it began."""
    process = subprocess.Popen([sys.executable, "-c", RUN, str(folder)], stdout=subprocess.PIPE)
    assert process.stdout is not None
    with process:
        assert process.stdout.readline() == b"begun\n"
        time.sleep(seconds)
        process.send_signal(signal.SIGKILL)
    with Ledger.open(folder / "ledger.sqlite", read_only=True) as ledger:
        return ledger.spent().steps_charged, (folder / "releases").stat().st_size


def test_a_killed_run_keeps_its_charges_and_its_epsilon_can_still_be_asked_for(tmp_path: Path) -> None:
    charges, releases = killed_after(tmp_path / "run", 0.3)
    assert releases <= charges <= releases + 1
    answer = subprocess.run(
        [sys.executable, "-m", "dpkit.cli", "epsilon", str(tmp_path / "run"), "--json"],
        capture_output=True,
        text=True,
        check=True,
    )
    stated = json.loads(answer.stdout)
    assert stated["steps"] == charges and stated["epsilon"] > 0


def kill(folder: Path, trials: int) -> dict[str, int]:
    """What ``kill_trials.py`` found; it fails at the first trial that leaves a short ledger or a bad checkpoint."""
    program = Path(__file__).with_name("kill_trials.py")
    command = [sys.executable, str(program), str(folder), str(trials)]
    done = subprocess.run(
        command, capture_output=True, text=True, check=False, env=os.environ | {"OMP_NUM_THREADS": "1"}
    )
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)


def test_killed_and_resumed_runs_never_release_more_than_was_charged(tmp_path: Path) -> None:
    found = kill(tmp_path, 20)
    assert found["charges"] >= found["releases"] > 0


@pytest.mark.slow
def test_three_hundred_kills_leave_no_short_ledger_and_no_checkpoint_that_does_not_load(tmp_path: Path) -> None:
    found = kill(tmp_path, 300)
    assert found["trials"] == 300
    assert found["charges"] >= found["releases"] > 50  # how many depends on the machine; the trials are what counts
    assert found["checkpoints"] > 0
