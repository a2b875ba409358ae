"""Files and names that nobody would write by hand: typed errors only, nothing executed, nothing written elsewhere.

The default suite throws some hundred of each kind, the slow one twelve thousand in all. Each kind has its own seed,
printed on failure.
"""

from __future__ import annotations

import copy
import json
import os
import random
import shutil
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import safetensors.torch
import torch
from torch.utils.data import DataLoader, TensorDataset

import dpkit
from accounting import Ledger
from dpkit.cli import config as configs
from dpkit.engine import checkpoint
from dpkit.errors import AccountingError, ConfigError, DpkitError, RunFolderError
from dpkit.run_folder import RunFolder

COUNTS = [pytest.param(150, id="some"), pytest.param(3000, id="many", marks=pytest.mark.slow)]

# -- what must not happen ---------------------------------------------------------------------------------------------

_DANGEROUS = {"os.system", "os.exec", "os.posix_spawn", "subprocess.Popen", "pickle.find_class", "socket.connect"}
_seen: list[str] = []
_watching = False


def _audit(event: str, arguments: tuple[Any, ...]) -> None:
    if _watching and event in _DANGEROUS:
        _seen.append(event)


sys.addaudithook(_audit)


@contextmanager
def nothing_executed() -> Iterator[None]:
    global _watching  # noqa: PLW0603  # an audit hook cannot be taken away again
    _seen.clear()
    _watching = True
    try:
        yield
    finally:
        _watching = False
    assert _seen == []


def content(folder: Path) -> dict[str, bytes]:
    return {str(path): path.read_bytes() for path in folder.rglob("*") if path.is_file() and not path.is_symlink()}


# -- checkpoints ------------------------------------------------------------------------------------------------------


def attached(engine: dpkit.PrivacyEngine) -> dpkit.PrivacyEngine:
    model = torch.nn.Linear(3, 2)
    optimizer = torch.optim.Adam(model.parameters())
    scheduler = torch.optim.lr_scheduler.MultiStepLR(optimizer, [2])
    data = TensorDataset(torch.zeros(20, 3), torch.zeros(20, dtype=torch.long))
    model, optimizer, loader = engine.make_private(
        model,
        optimizer,
        DataLoader(data, batch_size=5),
        num_examples=20,
        noise_multiplier=2.0,
        target_delta=1e-2,
        steps=8,
        max_grad_norm=1.0,
    )
    if engine.steps_taken == 0 and not (engine.run_dir / "checkpoints").exists():
        for x, y in loader:
            engine.backward(torch.nn.functional.cross_entropy(model(x), y, reduction="none"))
            optimizer.step()
            scheduler.step()
            break
        engine.save(scheduler=scheduler)
    else:
        engine.restore(scheduler=scheduler)
    return engine


NAME = "step-0000000001.safetensors"


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("fuzz") / "run"
    attached(dpkit.PrivacyEngine(folder)).detach()
    return folder


def resumes_or_refuses(run: Path) -> bool:
    """Whether the run in the folder can be resumed; anything but an error of ours is a failure."""
    engine = None
    try:
        engine = dpkit.PrivacyEngine.resume(run, checkpoint=NAME)
        attached(engine)
    except (DpkitError, AccountingError):
        return False
    finally:
        if engine is not None and engine._attached is not None:
            engine.detach()
    with Ledger.open(run / "ledger.sqlite", read_only=True) as ledger:
        ((plan, charged),) = ledger.plans()
    assert (plan.steps, plan.num_examples, charged) == (8, 20, 1)
    assert engine.steps_left == 7 and engine.steps_taken <= 1
    return True


def scrambled(data: bytes, chance: random.Random) -> bytes:
    """``data`` with bytes flipped, cut, doubled or moved."""
    changed = bytearray(data)
    for _ in range(chance.choice([1, 1, 1, 2, 5, 40])):
        place, length = chance.randrange(len(changed) + 1), chance.choice([1, 1, 2, 8, 100])
        match chance.randrange(5):
            case 0 if place < len(changed):
                changed[place] ^= 1 << chance.randrange(8)
            case 1:
                del changed[place : place + length]
            case 2:
                changed[place:place] = chance.randbytes(length)
            case 3:
                changed[place:place] = changed[: place + length][-length:]
            case _:
                changed[place : place + length] = chance.choice([b"\0", b"\xff", b'"', b"{", b"9"]) * length
    return bytes(changed)


STRANGE: list[Any] = [
    *(None, True, -1, 0, 1, 2**63, 10**400, 1.5, "", "x", "../../etc/passwd", "\ud800", [], {}, [[]]),
    *({"tensor": "model/weight"}, {"tensor": "none"}, {"float": "nan"}, {"dict": [["a", 1]]}, {"tuple": []}),
    *({"fields": []}, {"counter": [["a", "b"]]}, {"dict": [["__class__", 1]]}, {"__reduce__": ["os.system", ["true"]]}),
    {"dict": [["step", {"tensor": "optimizer/state/0/exp_avg"}]]},
]


def with_something_strange(value: Any, chance: random.Random) -> Any:
    """A deep copy of the JSON ``value`` in which one node became another one, vanished or was doubled."""
    value = copy.deepcopy(value)
    nodes: list[tuple[Any, Any]] = []

    def walk(node: Any) -> None:
        for key in list(node) if isinstance(node, dict) else range(len(node)) if isinstance(node, list) else ():
            nodes.append((node, key))
            walk(node[key])

    walk(value)
    holder, key = chance.choice(nodes)
    match chance.randrange(6):
        case 0 if isinstance(holder, dict):
            del holder[key]
        case 1 if isinstance(holder, dict):
            holder[chance.choice(["x", "format", "__class__"])] = holder[key]
        case 2 if isinstance(holder, list):
            holder.insert(key, copy.deepcopy(holder[chance.randrange(len(holder))]))
        case 3:
            other, place = chance.choice(nodes)
            holder[key] = copy.deepcopy(other[place])
        case _:
            holder[key] = chance.choice(STRANGE)
    return value


def strange_tensors(tensors: dict[str, torch.Tensor], chance: random.Random) -> dict[str, torch.Tensor]:
    changed = dict(tensors)
    name = chance.choice(list(changed))
    match chance.randrange(6):
        case 0:
            del changed[name]
        case 1:
            changed["x"] = torch.zeros(2)
        case 2:
            changed[name] = changed[name].reshape(-1)
        case 3:
            changed[name] = changed[name].to(chance.choice([torch.float64, torch.int64, torch.bool, torch.bfloat16]))
        case 4:
            changed[name] = torch.full_like(changed[name], float("nan"))
        case _:
            changed[name] = torch.zeros(chance.choice([(0,), (), (3, 3, 3)]))
    return changed


def forged(good: bytes, chance: random.Random) -> bytes:
    """A checkpoint with a right digest over a manifest or tensors that are not right."""
    length = int.from_bytes(good[:8], "little")
    manifest = json.loads(json.loads(good[8 : 8 + length])["__metadata__"]["dpkit"])
    tensors = safetensors.torch.load(good)
    if chance.random() < 0.3:
        tensors = strange_tensors(tensors, chance)
    else:
        manifest = with_something_strange(manifest, chance)
    text = json.dumps(manifest)
    return safetensors.torch.save(tensors, {"dpkit": text, "sha256": checkpoint._digest(text, tensors)})


@pytest.mark.parametrize("make", [scrambled, forged])
@pytest.mark.parametrize("count", COUNTS)
def test_strange_checkpoints_are_resumed_as_they_should_or_refused(
    run: Path, tmp_path: Path, make: Callable[[bytes, random.Random], bytes], count: int
):
    seed = random.randrange(2**32)
    chance = random.Random(seed)
    folder = tmp_path / "run"
    shutil.copytree(run, folder)
    good = (folder / "checkpoints" / NAME).read_bytes()
    (tmp_path / "beside").write_text("beside", encoding="utf-8")
    before = content(tmp_path)
    resumed = 0
    for trial in range(count):
        data = make(good, chance)
        (folder / "checkpoints" / NAME).write_bytes(data)
        with nothing_executed():
            try:
                resumed += resumes_or_refuses(folder)
            except Exception as error:
                pytest.fail(f"trial {trial} of seed {seed}: {type(error).__name__}: {error}")
    if make is scrambled:
        assert resumed <= count // 20  # only what was changed into itself
    (folder / "checkpoints" / NAME).write_bytes(good)
    after = content(tmp_path)
    assert {path: data for path, data in after.items() if path != str(folder / ".lock")} == {
        path: data for path, data in before.items() if path != str(folder / ".lock")
    }
    assert resumes_or_refuses(folder)


# -- configurations ---------------------------------------------------------------------------------------------------

_WORDS = [
    *(
        "!!python/object/apply:os.system ['true']",
        "!!python/name:os.system",
        "!!binary x",
        "&a *a",
        "<<: *a",
        "%YAML 9.9",
    ),
    *("{", "}", "[", "]", "- ", "? ", ": ", "|", ">", "---", "...", "\t", "\0", "\x85", "\ufeff", "'", '"', "#"),
    *("epsilon: 1e400", "epsilon: .inf", "0x", "1_0", "2001-99-99", "9" * 5000, "null", "true", "private: 1"),
    *("output: ../../../outside", "output: /", "output: ~", "dataset: digits", "logging: [tensorboard]", "logging: {}"),
    *("privacy:", "training:"),
]


def strange_configuration(chance: random.Random) -> bytes:
    lines = configs.EXAMPLE.splitlines()
    for _ in range(chance.choice([1, 1, 2, 4, 9])):
        place = chance.randrange(len(lines))
        match chance.randrange(6):
            case 0:
                del lines[place]
            case 1:
                lines.insert(place, lines[chance.randrange(len(lines))])
            case 2:
                lines.insert(place, "  " * chance.randrange(4) + chance.choice(_WORDS))
            case 3:
                key, colon, _ = lines[place].partition(":")
                lines[place] = key + colon + " " + chance.choice(_WORDS)
            case 4:
                lines[place] = "  " * chance.randrange(3) + lines[place].strip()
            case _:
                lines[place] = lines[place].replace(chance.choice("aeo:.0 "), chance.choice(["", ":", "\0", "é", "#"]))
        lines = lines or [""]
    data = "\n".join(lines).encode()
    return scrambled(data, chance) if chance.random() < 0.3 and data else data


@pytest.mark.parametrize("count", COUNTS)
def test_strange_configurations_are_read_or_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, count: int):
    monkeypatch.chdir(tmp_path)
    seed = random.randrange(2**32)
    chance = random.Random(seed)
    for trial in range(count):
        data = strange_configuration(chance)
        with nothing_executed():
            try:
                config = configs.decode(data, source="fuzz.yaml")
                assert configs.parse(configs.dump(config), source="dump") == config
            except ConfigError:
                pass
            except Exception as error:
                pytest.fail(f"trial {trial} of seed {seed}: {type(error).__name__}: {error}: {data!r}")
    assert list(tmp_path.iterdir()) == []


# -- names and paths --------------------------------------------------------------------------------------------------

_PIECES = [
    "..",
    ".",
    "/",
    "\\",
    "~",
    "a",
    "B9",
    "-",
    "_",
    " ",
    "\0",
    "\n",
    "é",
    "\ud800",
    "link",
    "file",
    "C:",
    "%2e",
    "x" * 70,
    "",
]


@pytest.mark.parametrize("count", COUNTS)
def test_strange_names_stay_in_the_run_folder_or_are_refused(run: Path, tmp_path: Path, count: int):
    seed = random.randrange(2**32)
    chance = random.Random(seed)
    outside = tmp_path / "outside"
    outside.mkdir()
    (outside / "file").write_text("outside", encoding="utf-8")
    inside = tmp_path / "run"
    shutil.copytree(run, inside)
    (inside / "link").symlink_to(outside)
    folder = RunFolder(inside)
    for trial in range(count):
        names = ["".join(chance.choices(_PIECES, k=chance.choice([1, 1, 2, 3]))) for _ in range(chance.choice([1, 2]))]
        attempts: list[Callable[[], object]] = [
            lambda names=names: folder.write(*names, data="x"),
            lambda names=names: folder.append(*names).close(),
            lambda names=names: folder.read(*names),
            lambda names=names: folder.remove(*names),
            lambda names=names: folder.make(*names),
            lambda names=names: folder.names(*names),
            lambda names=names: dpkit.PrivacyEngine.resume(inside, checkpoint=names[0]),
        ]
        with nothing_executed():
            try:
                found = chance.choice(attempts)()
            except (DpkitError, AccountingError):
                continue
            except Exception as error:
                pytest.fail(f"trial {trial} of seed {seed}: {type(error).__name__}: {error}: {names!r}")
            if isinstance(found, Path):
                assert os.path.realpath(found).startswith(os.path.realpath(inside) + os.sep)
    assert content(outside) == {str(outside / "file"): b"outside"}
    assert sorted(path.name for path in tmp_path.iterdir()) == ["outside", "run"]


@pytest.mark.parametrize("path", ["a\0b", "\ud800", "/proc/self/mem", "/dev/null", "x" * 5000])
def test_strange_run_folders_are_refused(path: str):
    with pytest.raises((RunFolderError, DpkitError, AccountingError)):
        dpkit.PrivacyEngine.resume(path)
