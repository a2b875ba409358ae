"""What a checkpoint holds of a model and of an optimizer, and what it must not hold.

Guarantees:
  * Every parameter and every persistent buffer is stored by its own name and comes back in every bit, whatever the
    model's ``state_dict`` leaves out or changes.
  * What training is not supposed to move is stored only as long as it has not moved since the engine was attached:
    frozen parameters and buffers get no noise, so what a forward pass wrote into them may be a row of the data.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from dpkit.errors import CheckpointError

from .checkpoint import Checkpoint


class ModelContents:
    """Parameters and persistent buffers of one model, as they are when this is made and later.

    Args:
      parameters: the trainable ones, by name: those that the engine clips, noises and lets the optimizer move.
    """

    def __init__(self, model: nn.Module, parameters: Mapping[str, nn.Parameter]) -> None:
        self._trainable = sorted(parameters)
        self._still = {name: _digest(tensor) for name, tensor in self._fixed(model).items()}

    def of(self, model: nn.Module) -> dict[str, Any]:
        """What may be stored of ``model`` now.

        Raises:
          CheckpointError: something has moved that no noise protects, or the parameters are not finite.
        """
        for path, module in model.named_modules():
            if type(module).get_extra_state is not nn.Module.get_extra_state:
                raise CheckpointError(
                    f"the module at '{path}' keeps extra state (get_extra_state), and nobody knows what it depends on. "
                    "If it is public or computed from released values, override it away and give the object that holds "
                    "it to engine.save(name=object)."
                )
        for name, tensor in self._fixed(model).items():
            if self._still.get(name) != _digest(tensor):
                raise CheckpointError(
                    f"'{name}' of the model was written to since the engine was attached, and no noise protects it: "
                    "it may hold private data, so it is not saved. Take it out of the model, or register it as a "
                    "buffer with persistent=False; what is public or computed from released values can be kept in an "
                    "object of your own: engine.save(name=object)."
                )
        tensors = _tensors(model)
        for name in self._trainable:
            if not bool(tensors[name].isfinite().all()):
                raise CheckpointError(
                    f"parameter '{name}' is not finite: training has diverged, and nothing can be learnt from here. "
                    "The checkpoints before are kept; resume from one of them, with a smaller learning rate."
                )
        return {"trainable": self._trainable, "tensors": tensors}

    def loading(self, model: nn.Module, checkpoint: Checkpoint) -> Callable[[], None]:
        """Checks that ``checkpoint`` is one of ``model``; what it returns copies the values in.

        Raises:
          CheckpointError: it is of another model.
        """
        current = _tensors(model)
        saved = checkpoint.state("model", like={"trainable": self._trainable, "tensors": current})
        found = saved.get("tensors") if isinstance(saved, dict) else None
        if not isinstance(found, dict) or found.keys() != current.keys():
            different = sorted(map(repr, current.keys() ^ found.keys())) if isinstance(found, dict) else []
            raise CheckpointError(
                f"the checkpoint {checkpoint.name} is of another model: only one of the two has "
                f"{', '.join(different[:5]) or 'parameters'}. Build the model as in the run that saved it."
            )
        if saved.get("trainable") != self._trainable:
            raise CheckpointError(
                f"the checkpoint {checkpoint.name} is of a run that trained {saved.get('trainable')}, and this one "
                f"would train {self._trainable}. Freeze the same parameters."
            )
        for name, value in found.items():
            if not isinstance(value, Tensor):
                raise CheckpointError(f"{name!r} in the checkpoint {checkpoint.name} is no tensor.")

        def load() -> None:
            with torch.no_grad():
                for name, tensor in current.items():
                    tensor.copy_(found[name])
            self._still = {name: _digest(tensor) for name, tensor in self._fixed(model).items()}

        return load

    def _fixed(self, model: nn.Module) -> dict[str, Tensor]:
        """What training does not move: frozen parameters and persistent buffers."""
        return {name: tensor for name, tensor in _tensors(model).items() if name not in self._trainable}


def optimizer_layout(optimizer: torch.optim.Optimizer, model: nn.Module) -> dict[str, Any]:
    """The optimizer's class and the names of the parameters in each of its groups: states are kept by position."""
    names = {id(parameter): name for name, parameter in model.named_parameters()}
    return {
        "class": f"{type(optimizer).__module__}.{type(optimizer).__qualname__}",
        "groups": [
            [names.get(id(p), "none of the model's") for p in group["params"]] for group in optimizer.param_groups
        ],
    }


def same_bits(one: Tensor, other: Any) -> bool:
    """Whether two tensors agree in type, shape and every bit, on whatever device they lie."""
    if not isinstance(other, Tensor) or (one.dtype, one.shape) != (other.dtype, other.shape):
        return False
    return torch.equal(_bytes(one), _bytes(other))


def persistent_buffers(model: nn.Module) -> dict[str, Tensor]:
    """The buffers that are part of what is stored of a model, by name; tied ones once."""
    persistent = {
        f"{path}.{name}" if path else name
        for path, module in model.named_modules(remove_duplicate=False)
        for name in module._buffers.keys() - module._non_persistent_buffers_set
    }
    return {name: buffer for name, buffer in model.named_buffers() if name in persistent}


def _tensors(model: nn.Module) -> dict[str, Tensor]:
    """Parameters and persistent buffers by name; tied ones once."""
    return {name: tensor.detach() for name, tensor in (*model.named_parameters(), *persistent_buffers(model).items())}


def _bytes(tensor: Tensor) -> Tensor:
    return tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8)


def _digest(tensor: Tensor) -> tuple[str, str]:
    """Stands for the value: a copy of what is frozen would take as much memory again."""
    return f"{tensor.dtype} {tuple(tensor.shape)}", hashlib.sha256(_bytes(tensor).numpy().data).hexdigest()
