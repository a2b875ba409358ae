"""Checkpoints: when one may be written, what survives a failure, and what is refused when one is read."""

from __future__ import annotations

import errno
import gc
import json
import os
import resource
import signal
import subprocess
import sys
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import safetensors.torch
import torch
from torch.nn import functional as F

from dpkit.engine import PrivacyEngine, checkpoint
from dpkit.errors import CheckpointError, InvalidArgument, OutOfOrder, RunFolderError
from dpkit.run_folder import RunFolder

from .runs import begin, dataset, resume


def test_a_run_is_saved_between_two_steps_and_nowhere_else(tmp_path: Path):
    run = begin(tmp_path)
    run.save()  # before the first step
    batches = iter(run.loader)
    x, y = next(batches)
    with pytest.raises(OutOfOrder, match="between two logical batches"):
        run.save()
    run.engine.backward(F.cross_entropy(run.model(x), y, reduction="none"))
    with pytest.raises(OutOfOrder, match=r"optimizer\.step"):
        run.save()
    run.optimizer.step()
    assert run.save().name == "step-0000000001.safetensors"


def test_a_run_is_not_saved_between_microbatches(tmp_path: Path):
    run = begin(tmp_path, max_physical_batch_size=16)
    batches = iter(run.loader)
    x, y = next(batches)
    run.engine.backward(F.cross_entropy(run.model(x), y, reduction="none"))
    assert run.engine.steps_taken == 0
    with pytest.raises(OutOfOrder, match="between two logical batches"):
        run.save()


def test_a_run_that_failed_is_not_saved(tmp_path: Path):
    run = begin(tmp_path).train(1)
    x, y = next(iter(run.loader))
    losses = F.cross_entropy(run.model(x), y, reduction="none")
    with pytest.raises(ZeroDivisionError):
        losses.register_hook(lambda gradient: 1 // 0)
        run.engine.backward(losses)
    with pytest.raises(OutOfOrder):
        run.save()


class Unstorable:
    def state_dict(self) -> dict[str, object]:
        return {"deep": [{"function": print}]}

    def load_state_dict(self, state: dict[str, object]) -> None: ...


def test_a_state_that_cannot_be_stored_is_named_by_its_place(tmp_path: Path):
    run = begin(tmp_path).train(1)
    with pytest.raises(CheckpointError, match="user/odd/deep/0/function is a builtin_function_or_method"):
        run.engine.save(odd=Unstorable())
    with pytest.raises(InvalidArgument, match="without state_dict"):
        run.engine.save(odd=3)
    assert not (tmp_path / "checkpoints").exists()


# -- failures while writing -------------------------------------------------------------------------------------------


def failing_at(call: int, function: Callable[..., Any], error: int) -> Callable[..., Any]:
    """``function``, which fails at its ``call``-th call."""
    calls = 0

    def wrapped(*args: Any, **kwargs: Any) -> Any:
        nonlocal calls
        calls += 1
        if calls == call:
            raise OSError(error, os.strerror(error))
        return function(*args, **kwargs)

    return wrapped


@pytest.mark.parametrize(
    ("name", "calls", "error"),
    [("fsync", 2, errno.EIO), ("replace", 1, errno.EACCES), ("fdopen", 9, errno.ENOSPC), ("open", 9, errno.EROFS)],
)
def test_whatever_call_fails_the_last_good_checkpoint_stays(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str, calls: int, error: int
):
    run = begin(tmp_path).train(2)
    run.save()
    run.train(1)
    failures = 0
    for call in range(1, calls + 1):
        with monkeypatch.context() as patched:
            patched.setattr(f"dpkit.run_folder.os.{name}", failing_at(call, getattr(os, name), error))
            try:
                run.save()
            except RunFolderError as caught:
                failures += 1
                assert os.strerror(error) in str(caught)
        files = [path.name for path in (tmp_path / "checkpoints").iterdir()]
        assert not [file for file in files if file.endswith(".tmp")]
        for file in files:
            checkpoint.read(RunFolder(tmp_path), file)  # whole
        assert "step-0000000002.safetensors" in files
    assert failures >= 1
    run.leave()
    assert resume(tmp_path).engine.steps_taken in (2, 3)


def test_a_full_disk_leaves_the_last_good_checkpoint(tmp_path: Path):
    run = begin(tmp_path).train(2)
    good = run.save()
    content = good.read_bytes()
    run.train(1)
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    previous = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    try:
        resource.setrlimit(resource.RLIMIT_FSIZE, (len(content) // 2, limits[1]))
        with pytest.raises(RunFolderError, match="cannot be written"):
            run.save()
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
        signal.signal(signal.SIGXFSZ, previous)
    assert [path.name for path in (tmp_path / "checkpoints").iterdir()] == [good.name]
    assert good.read_bytes() == content


@pytest.mark.skipif(os.geteuid() == 0, reason="root may write into read-only folders")
def test_a_read_only_folder_is_refused_by_name_as_a_user(tmp_path: Path):
    tmp_path.chmod(0o500)
    with pytest.raises(RunFolderError, match="Check the path, its rights"):
        begin(tmp_path / "run")


def test_a_folder_that_cannot_be_written_to_is_refused_by_name(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    run = begin(tmp_path / "run").train(1)
    run.leave()

    def refuse(*args: Any, **kwargs: Any) -> Any:
        raise OSError(errno.EROFS, os.strerror(errno.EROFS))

    monkeypatch.setattr("dpkit.run_folder.os.open", refuse)
    monkeypatch.setattr(Path, "mkdir", refuse)
    with pytest.raises(RunFolderError, match="Read-only file system"):
        RunFolder(tmp_path / "run").write("x", data="y")
    with pytest.raises(RunFolderError, match="Read-only file system"):
        RunFolder(tmp_path / "other").lock()


# -- one process at a time --------------------------------------------------------------------------------------------


def test_two_engines_do_not_train_in_one_folder(tmp_path: Path):
    first = begin(tmp_path).train(2)
    first.save()
    with pytest.raises(RunFolderError, match="in use"):
        resume(tmp_path)
    first.leave()
    assert resume(tmp_path).train(1).engine.steps_taken == 3


def test_another_process_does_not_train_in_the_same_folder(tmp_path: Path):
    run = begin(tmp_path).train(1)
    run.save()
    code = (
        "import sys; from dpkit.run_folder import RunFolder; from dpkit.errors import RunFolderError\n"
        "try: RunFolder(sys.argv[1]).lock()\n"
        "except RunFolderError as error: print(error)\n"
        "else: print('locked')"
    )

    def ask() -> str:
        command = [sys.executable, "-c", code, str(tmp_path)]
        return subprocess.run(command, capture_output=True, text=True, check=True).stdout

    assert "in use" in ask()
    run.leave()
    assert ask() == "locked\n"


def test_a_model_that_is_forgotten_gives_its_folder_back(tmp_path: Path):

    run = begin(tmp_path).train(1)
    run.save()
    del run
    gc.collect()
    assert resume(tmp_path).engine.steps_taken == 1


# -- autosave ---------------------------------------------------------------------------------------------------------


def saved_steps(folder: Path) -> list[int]:
    return [int(path.stem.removeprefix("step-")) for path in sorted((folder / "checkpoints").iterdir())]


def test_autosave_writes_at_the_beginning_at_intervals_and_at_the_end(tmp_path: Path):
    run = begin(tmp_path)
    with run.engine.autosave(every=5):
        run.train(12)
    assert saved_steps(tmp_path) == [0, 5, 10, 12]


def test_autosave_keeps_the_newest_and_resuming_takes_the_newest(tmp_path: Path):
    run = begin(tmp_path)
    with run.engine.autosave(every=2, keep=3):
        run.train(9)
    assert saved_steps(tmp_path) == [6, 8, 9]
    run.leave()
    # From an older one: what is written then is newer, whatever its step.
    again = resume(tmp_path, checkpoint="step-0000000006.safetensors")
    with again.engine.autosave(every=100, keep=3):
        again.train(1)
    assert saved_steps(tmp_path) == [6, 7, 9]
    assert checkpoint.newest(RunFolder(tmp_path)) == "step-0000000007.safetensors"


def test_autosave_restores_what_it_saves(tmp_path: Path):
    def make(optimizer: torch.optim.Optimizer) -> Any:
        return torch.optim.lr_scheduler.ExponentialLR(optimizer, 0.9)

    run = begin(tmp_path, make_scheduler=make)
    with run.engine.autosave(every=3, scheduler=run.scheduler):
        run.train(5)
    run.leave()
    again = begin(tmp_path, make_scheduler=make, engine=PrivacyEngine.resume(tmp_path))
    with again.engine.autosave(every=3, scheduler=again.scheduler):
        assert again.scheduler.last_epoch == 5
        again.train(1)


@pytest.mark.parametrize(("number", "raised"), [(signal.SIGINT, KeyboardInterrupt), (signal.SIGTERM, SystemExit)])
@pytest.mark.parametrize("moment", ["while the loss is computed", "before the optimizer steps", "in the last step"])
def test_a_signal_lets_the_step_finish_saves_and_ends_the_loop(
    tmp_path: Path, number: signal.Signals, raised: type[BaseException], moment: str
):
    run = begin(tmp_path)
    before = signal.getsignal(number)
    with pytest.raises(raised) as caught, run.engine.autosave(every=100):
        while run.engine.steps_left:
            for x, y in run.loader:
                run.optimizer.zero_grad()
                losses = F.cross_entropy(run.model(x), y, reduction="none")
                if run.engine.steps_taken == 3 and moment.startswith("while"):
                    signal.raise_signal(number)
                run.engine.backward(losses)
                if run.engine.steps_taken == 4 and moment.startswith("before"):
                    signal.raise_signal(number)
                run.optimizer.step()
                if run.engine.steps_taken == 20 and moment.startswith("in the last"):
                    signal.raise_signal(number)
    if raised is SystemExit:
        assert caught.value.code == 143
    assert signal.getsignal(number) is before
    last = 20 if moment.startswith("in the last") else 4
    assert saved_steps(tmp_path) == [0, last]
    run.leave()
    assert resume(tmp_path).engine.steps_left == 20 - last


def test_a_second_signal_ends_the_loop_at_once(tmp_path: Path):
    run = begin(tmp_path)
    with pytest.raises(KeyboardInterrupt), run.engine.autosave(every=100):
        for x, _ in run.loader:
            signal.raise_signal(signal.SIGINT)
            run.model(x)
            signal.raise_signal(signal.SIGINT)
            pytest.fail("still running")
    assert saved_steps(tmp_path) == [0]


def test_an_error_in_the_loop_leaves_the_last_good_checkpoint_and_the_signals_alone(tmp_path: Path):
    run = begin(tmp_path)
    before = signal.getsignal(signal.SIGINT)
    with pytest.raises(ZeroDivisionError), run.engine.autosave(every=2):
        run.train(3)
        1 // 0  # noqa: B018
    assert saved_steps(tmp_path) == [0, 2]
    assert signal.getsignal(signal.SIGINT) is before
    run.train(1)
    assert saved_steps(tmp_path) == [0, 2]


def test_autosave_works_in_another_thread_without_the_signals(tmp_path: Path):
    run = begin(tmp_path)

    def loop() -> None:
        with run.engine.autosave(every=2):
            run.train(4)

    thread = threading.Thread(target=loop)
    thread.start()
    thread.join()
    assert saved_steps(tmp_path) == [0, 2, 4]


@pytest.mark.parametrize("options", [{"every": 0}, {"every": 1.5}, {"every": True}, {"every": 1, "keep": 0}])
def test_odd_intervals_are_refused(tmp_path: Path, options: dict[str, Any]):
    with pytest.raises(InvalidArgument):
        begin(tmp_path).engine.autosave(**options)


# -- files that are no good -------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def good(tmp_path_factory: pytest.TempPathFactory) -> bytes:
    run = begin(tmp_path_factory.mktemp("good")).train(2)
    return run.save().read_bytes()


def read_bytes(folder: Path, content: bytes) -> checkpoint.Checkpoint:
    run = RunFolder(folder)
    run.write("checkpoints", "step-0000000002.safetensors", data=content)
    return checkpoint.read(run, "step-0000000002.safetensors")


def test_every_single_flipped_bit_is_seen(tmp_path: Path, good: bytes):
    assert read_bytes(tmp_path, good).manifest.steps_taken == 2
    step = max(1, len(good) // 700)
    for place in range(0, len(good), step):
        changed = bytearray(good)
        changed[place] ^= 1 << (place % 8)
        with pytest.raises(CheckpointError):
            read_bytes(tmp_path, bytes(changed))


@pytest.mark.parametrize("length", [0, 1, 7, 8, 9, 100, 1000, -1])
def test_a_file_that_was_cut_is_refused(tmp_path: Path, good: bytes, length: int):
    with pytest.raises(CheckpointError):
        read_bytes(tmp_path, good[:length])
    with pytest.raises(CheckpointError):
        read_bytes(tmp_path, good + b"\0")


def forged(good: bytes, change: Callable[[dict[str, Any]], None]) -> bytes:
    """A checkpoint whose digest is right and whose manifest was changed."""
    length = int.from_bytes(good[:8], "little")
    manifest = json.loads(json.loads(good[8 : 8 + length])["__metadata__"]["dpkit"])
    tensors = safetensors.torch.load(good)
    change(manifest)
    text = json.dumps(manifest)
    return safetensors.torch.save(tensors, {"dpkit": text, "sha256": checkpoint._digest(text, tensors)})


FORGERIES: dict[str, tuple[Callable[[dict[str, Any]], Any], str]] = {
    "newer format": (lambda m: m.update(format=2), "Upgrade"),
    "unknown key": (lambda m: m.update(extra=1), "makes no sense"),
    "missing key": (lambda m: m.pop("plan"), "makes no sense"),
    "negative steps": (lambda m: m.update(steps_taken=-1), "makes no sense"),
    "steps as text": (lambda m: m.update(steps_taken="2"), "makes no sense"),
    "digest of another kind": (lambda m: m.update(anchor_digest="00"), "makes no sense"),
    "no plan": (lambda m: m.update(plan={}), "makes no sense"),
    "left-over tensor": (lambda m: m["states"].pop("optimizer"), "belong to no state"),
    "states as list": (lambda m: m.update(states=[]), "makes no sense"),
}


def test_a_forged_manifest_with_a_right_digest_is_otherwise_accepted(tmp_path: Path, good: bytes):
    assert read_bytes(tmp_path, forged(good, lambda m: None)).manifest.steps_taken == 2


@pytest.mark.parametrize("name", FORGERIES)
def test_a_manifest_that_makes_no_sense_is_refused(tmp_path: Path, good: bytes, name: str):
    change, named = FORGERIES[name]
    with pytest.raises(CheckpointError, match=named):
        read_bytes(tmp_path, forged(good, change))


def test_a_named_pipe_or_a_folder_in_place_of_a_checkpoint_is_refused(tmp_path: Path):
    run = RunFolder(tmp_path)
    run.make("checkpoints")
    os.mkfifo(tmp_path / "checkpoints" / "step-0000000001.safetensors")
    (tmp_path / "checkpoints" / "step-0000000002.safetensors").mkdir()
    for name in ("step-0000000001.safetensors", "step-0000000002.safetensors"):
        with pytest.raises(RunFolderError):
            checkpoint.read(run, name)


# -- what a checkpoint may depend on ----------------------------------------------------------------------------------


@pytest.mark.parametrize("other", ["a record changed", "a record of nan", "records removed", "no records"])
def test_with_the_releases_fixed_a_checkpoint_is_the_same_for_every_data_set(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, other: str
):
    # Then what is in a checkpoint depends on the data through what was released, and through nothing else.
    def frozen(value: torch.Tensor, std: float, generator: torch.Generator) -> torch.Tensor:
        return torch.ones_like(value) * 0.1

    monkeypatch.setattr("dpkit.mechanisms.gaussian._add_noise", frozen)
    monkeypatch.setattr("accounting.records.secrets.token_hex", lambda _: "0" * 32)
    rows = dataset()
    x, y = (tensor.clone() for tensor in rows.tensors)
    if other == "a record changed":
        x[7] = 1e30
    elif other == "a record of nan":
        x[7] = float("nan")
    else:
        x, y = (tensor[: 50 if other == "records removed" else 0] for tensor in (x, y))
    written = []
    for number, data in enumerate((rows, torch.utils.data.TensorDataset(x, y))):
        run = begin(
            tmp_path / str(number), engine=PrivacyEngine(tmp_path / str(number), dataset_name="people"), data=data
        )
        _, text, _, _ = checkpoint._read_header(RunFolder(tmp_path / str(number)), run.train(4).save().name)
        written.append(
            (text, checkpoint.read(RunFolder(tmp_path / str(number)), "step-0000000004.safetensors").tensors)
        )
    (text, tensors), (other_text, other_tensors) = written
    assert text == other_text
    assert tensors.keys() == other_tensors.keys()
    assert all(torch.equal(tensors[name], other_tensors[name]) for name in tensors)
