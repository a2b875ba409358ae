"""Checkpoints: what a run needs to go on, in one safetensors file with a JSON manifest in its metadata.

Guarantees:
  * What is in a checkpoint is public or released: parameters, optimizer, clipping rule, filters, step counts, the plan.
    No key, no state of a random generator, no noise: a resumed run draws from fresh keys.
  * A file is whole or refused: a digest covers manifest, names, types, shapes and every byte of every tensor, and it
    is written as a whole (:meth:`dpkit.run_folder.RunFolder.write`). Reading executes nothing.
  * The ledger wins: a checkpoint names the last entry that the ledger had when it was written (its anchor), and a
    ledger without that entry is an older copy, with which nothing is resumed. Steps that were charged after the
    checkpoint stay charged; taken again, they are paid again.

Not promised: that nobody forged it. The digest holds no secret. Whoever can write the run folder can change the model,
but not what the ledger says.
"""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Callable, Mapping
from typing import Annotated, Any, NamedTuple

import safetensors.torch
import torch
from pydantic import BaseModel, ConfigDict, Field, ValidationError
from safetensors import SafetensorError
from torch import Tensor

from accounting import AccountingError, PlanRecord
from dpkit.errors import CheckpointError, RunFolderError
from dpkit.run_folder import RunFolder

from .packing import Packed, pack, unpack

FOLDER = "checkpoints"
FORMAT_VERSION = 1
LARGEST_HEADER = 16 * 2**20
"""Bytes of a checkpoint's header at most: names, shapes and the manifest."""

_LENGTH_BYTES = 8
_NAME = re.compile(r"step-\d{10}\.safetensors")
_Natural = Annotated[int, Field(ge=0, lt=2**63, strict=True)]


class Manifest(BaseModel):
    """The JSON part of a checkpoint.

    Attributes:
      number: checkpoints of a run are numbered in the order in which they were written, whatever their steps.
      steps_taken: logical steps behind the parameters.
      steps_into_pass: how many of them belong to a pass over the loader that has not ended.
      dataset_name, plan: what the ledger knows the run by.
      anchor_sequence, anchor_digest: the last entry of the ledger.
      states: name -> packed state of the engine's own parts and of what the user gave.
    """

    model_config = ConfigDict(extra="forbid", frozen=True)

    format: Annotated[int, Field(ge=1, le=FORMAT_VERSION, strict=True)] = FORMAT_VERSION
    number: _Natural
    steps_taken: _Natural
    steps_into_pass: _Natural
    dataset_name: str
    plan: PlanRecord
    anchor_sequence: _Natural
    anchor_digest: Annotated[str, Field(pattern=r"^[0-9a-f]{64}$")]
    states: dict[str, Any]


class Checkpoint(NamedTuple):
    """A manifest with the tensors that its states refer to. ``name`` is that of the file."""

    name: str
    manifest: Manifest
    tensors: Mapping[str, Tensor]

    def state(self, name: str, like: Any = None) -> Any:
        """The state called ``name``, as it was packed; see :func:`dpkit.engine.packing.unpack`.

        Raises:
          CheckpointError: there is none, or it does not have the form of ``like``.
        """
        if name not in self.manifest.states:
            raise CheckpointError(f"the checkpoint {self.name} holds no state of {name!r}.")
        try:
            return unpack(self.manifest.states[name], name, self.tensors, like)
        except RecursionError:
            raise _damaged(self.name, "its states are nested too deeply") from None

    def load(self, name: str, load_state_dict: Callable[[Any], object], like: Any = None) -> None:
        """Hands the state called ``name`` to ``load_state_dict``.

        Raises:
          CheckpointError: there is none, or ``load_state_dict`` does not take it.
        """
        state = self.state(name, like)
        try:
            load_state_dict(state)
        except Exception as error:  # whatever a load_state_dict of torch or of the user makes of a wrong state
            raise CheckpointError(
                f"the state of {name!r} in the checkpoint {self.name} does not fit: {type(error).__name__}: {error}. "
                "Make the same objects as in the run that saved it."
            ) from error


def write(run: RunFolder, states: Mapping[str, Any], describe: Callable[[int, dict[str, Packed]], Manifest]) -> str:
    """Packs ``states`` and writes them; returns the name of the file. ``describe(number, packed states)`` is the rest.

    Raises:
      CheckpointError: a state cannot be stored.
      RunFolderError: the file could not be written; the checkpoints before it are as they were.
    """
    tensors: dict[str, Tensor] = {}
    packed = {name: pack(state, name, tensors) for name, state in states.items()}
    numbers = [manifest.number for manifest in _readable(run).values()]
    manifest = describe(1 + max(numbers, default=0), packed)
    text = json.dumps(manifest.model_dump(mode="json"), allow_nan=False, separators=(",", ":"))
    metadata = {"dpkit": text, "sha256": _digest(text, tensors)}
    try:
        data = safetensors.torch.save(tensors, metadata)
    except (SafetensorError, KeyError, ValueError, RuntimeError) as error:
        raise CheckpointError(f"the states cannot be stored ({error}).") from None
    if int.from_bytes(data[:_LENGTH_BYTES], "little") > LARGEST_HEADER:
        raise CheckpointError(
            f"the checkpoint's names, shapes and plain values take more than {LARGEST_HEADER} bytes; keep large states "
            "in tensors."
        )
    name = f"step-{manifest.steps_taken:010d}.safetensors"
    run.write(FOLDER, name, data=data)
    return name


def read(run: RunFolder, name: str) -> Checkpoint:
    """The checkpoint ``name`` of the run, verified.

    Raises:
      CheckpointError: it is no checkpoint, damaged, or of a newer version.
      RunFolderError: it is missing, cannot be read, or is not inside the run folder.
    """
    manifest, text, metadata, size = _read_header(run, name)
    data = run.read_start(FOLDER, name, length=size + 1)
    if len(data) != size:
        raise _damaged(name, "it is longer or shorter than its header says")
    try:
        tensors = safetensors.torch.load(data)
    except (SafetensorError, KeyError, ValueError, TypeError, RuntimeError) as error:
        raise _damaged(name, str(error)) from None
    if metadata.get("sha256") != _digest(text, tensors):
        raise _damaged(name, "its content is not what was written")
    try:
        left = tensors.keys() - _mentioned(manifest.states)
    except RecursionError:
        raise _damaged(name, "its states are nested too deeply") from None
    if left:
        raise _damaged(name, f"it holds {len(left)} tensors that belong to no state")
    return Checkpoint(name, manifest, tensors)


def read_manifest(run: RunFolder, name: str) -> Manifest:
    """The manifest alone, without the tensors; what a digest would show is not looked at.

    Raises:
      CheckpointError, RunFolderError: as :func:`read`.
    """
    return _read_header(run, name)[0]


def names(run: RunFolder) -> list[str]:
    """The run's checkpoints, in no particular order of age; a damaged one is among them."""
    return [name for name in run.names(FOLDER) if _NAME.fullmatch(name)]


def newest(run: RunFolder) -> str:
    """The name of the checkpoint that was written last.

    Raises:
      CheckpointError: there is none, or one of them is damaged, so that it is not known which one is the newest.
    """
    manifests = {name: read_manifest(run, name) for name in names(run)}
    if not manifests:
        raise CheckpointError(
            f"{run.path} holds no checkpoint to resume from. What the run was charged stays charged; start a new run "
            "if the budget allows one."
        )
    return max(manifests, key=lambda name: manifests[name].number)


def prune(run: RunFolder, keep: int, plan_id: str) -> None:
    """Deletes all but the ``keep`` newest checkpoints of a plan; damaged ones are left for somebody to look at."""
    manifests = {name: manifest for name, manifest in _readable(run).items() if manifest.plan.plan_id == plan_id}
    for name in sorted(manifests, key=lambda name: manifests[name].number)[:-keep]:
        run.remove(FOLDER, name)


def _readable(run: RunFolder) -> dict[str, Manifest]:
    found = {}
    for name in names(run):
        try:
            found[name] = read_manifest(run, name)
        except (CheckpointError, RunFolderError):
            continue  # it will be refused by name when somebody resumes from it
    return found


def _read_header(run: RunFolder, name: str) -> tuple[Manifest, str, dict[str, str], int]:
    """(manifest, its text, the metadata, size of the whole file) from the header of a safetensors file."""
    if not _NAME.fullmatch(name):
        raise CheckpointError(f"{name!r} is not the name of a checkpoint, which look like step-0000000120.safetensors.")
    length = int.from_bytes(run.read_start(FOLDER, name, length=_LENGTH_BYTES), "little")
    if length > LARGEST_HEADER:
        raise _damaged(name, f"its header claims {length} bytes")
    start = run.read_start(FOLDER, name, length=_LENGTH_BYTES + length)
    try:
        header = json.loads(start[_LENGTH_BYTES:])
        metadata = header.pop("__metadata__")
        text = metadata["dpkit"]
        content = json.loads(text)
        size = len(start) + max((entry["data_offsets"][1] for entry in header.values()), default=0)
        if not isinstance(size, int):
            raise TypeError("an offset is not a whole number")
    except (ValueError, KeyError, TypeError, AttributeError, IndexError, RecursionError) as error:
        raise _damaged(name, f"its header is no header of a checkpoint ({type(error).__name__})") from None
    if isinstance(content, dict) and isinstance(newer := content.get("format"), int) and newer > FORMAT_VERSION:
        raise CheckpointError(
            f"the checkpoint {name} has format {newer}; this version of dpkit reads up to {FORMAT_VERSION}. Upgrade it."
        )
    try:
        return Manifest.model_validate(content), text, metadata, size
    except (ValidationError, AccountingError, RecursionError) as error:
        raise _damaged(name, f"its manifest makes no sense ({' '.join(str(error).split())[:200]})") from None


def _digest(manifest: str, tensors: Mapping[str, Tensor]) -> str:
    """SHA-256 of the manifest, and of name, type, shape and bytes of each tensor in the order of the names."""
    digest = hashlib.sha256()
    for part in (manifest, *(f"{name}\0{t.dtype}\0{tuple(t.shape)}" for name, t in sorted(tensors.items()))):
        encoded = part.encode("utf-8", "surrogatepass")
        digest.update(len(encoded).to_bytes(8, "little") + encoded)
    for _, tensor in sorted(tensors.items()):
        # A zero-dimensional tensor has no bytes view; flattened, it does.
        digest.update(tensor.reshape(-1).view(torch.uint8).numpy().data)
    return digest.hexdigest()


def _mentioned(packed: Packed) -> set[str]:
    """Names of the tensors that packed states refer to."""
    match packed:
        case {"tensor": str(name)}:
            return {name}
        case dict():
            return set().union(*(_mentioned(item) for item in packed.values()))
        case list():
            return set().union(*(_mentioned(item) for item in packed))
    return set()


def _damaged(name: str, how: str) -> CheckpointError:
    return CheckpointError(
        f"the checkpoint {name} is damaged: {how}. Delete it, or name another one (checkpoint=...): steps that were "
        "taken since then are paid again."
    )
