"""Run a model on made-up examples as if it had never run: no dropout, and every trace taken back.

Put back, also when the model raises: buffers and tensor attributes in every bit, attributes of other kinds, what lists,
dicts and sets of its modules hold, training modes, and the state of torch's random numbers.  Python objects of other
kinds that a module changes from inside are not known.
"""

from __future__ import annotations

import logging
import warnings
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.modules.dropout import _DropoutNd
from torch.overrides import TorchFunctionMode

from dpkit.types import Named

Restore = Callable[[], None]


@contextmanager
def undisturbed(model: nn.Module) -> Iterator[Restore]:
    """Dropout off; gives a function that puts back whatever the model's modules keep."""
    modules = list(model.modules())
    dropouts = [module for module in modules if isinstance(module, _DropoutNd) and module.training]
    keeps_rate = [module for module in modules if isinstance(module, (nn.RNNBase, nn.MultiheadAttention))]
    rates = [module.dropout for module in keeps_rate]
    with torch.random.fork_rng(devices=_graphics_cards(model)), torch.enable_grad():
        try:
            for module in dropouts:
                module.eval()
            for module in keeps_rate:
                module.dropout = 0.0
            snapshot = _Snapshot(modules, state(model))
            torch.manual_seed(0)
            try:
                with _NoDropout(), _quiet():
                    yield snapshot.restore
            finally:
                snapshot.restore()
        finally:
            for module in dropouts:
                module.train()
            for module, rate in zip(keeps_rate, rates, strict=True):
                module.dropout = rate


@contextmanager
def _quiet() -> Iterator[None]:
    """What a model's operations have to say about speed is said when it trains."""
    logger = logging.getLogger("dpkit.gradients")
    disabled, logger.disabled = logger.disabled, True
    try:
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", message="There is a performance drop because we have not yet implemented")
            yield
    finally:
        logger.disabled = disabled


def random_state(model: nn.Module) -> list[Tensor]:
    """Of torch's generators that the model may draw from."""
    return [torch.random.get_rng_state(), *(torch.cuda.get_rng_state(device) for device in _graphics_cards(model))]


def _graphics_cards(model: nn.Module) -> list[int]:
    return sorted({p.device.index or 0 for p in model.parameters() if p.device.type == "cuda"})


def state(model: nn.Module) -> Named:
    """Buffers, and tensors that a module keeps as plain attributes."""
    found = dict(model.named_buffers())
    for path, module in model.named_modules():
        for name, value in vars(module).items():
            if isinstance(value, Tensor):
                found[f"{path}.{name}" if path else name] = value
    return found


class _Snapshot:
    """What the modules hold: their attributes, the contents of containers among those, and the bits of tensors."""

    def __init__(self, modules: Iterable[nn.Module], tensors: Named) -> None:
        self._attributes = [(vars(module), dict(vars(module))) for module in modules]
        # Among them the dicts in which torch keeps buffers and parameters: one that was exchanged comes back.
        self._containers = [
            (value, type(value)(value))
            for _, attributes in self._attributes
            for value in attributes.values()
            if type(value) in _CONTENTS
        ]
        self._bits = [(tensor, tensor.detach().clone()) for tensor in tensors.values()]

    def restore(self) -> None:
        for now, before in self._attributes:
            for name in [name for name in now if name not in before]:
                del now[name]
            now.update(before)
        for container, before in self._containers:
            if len(container) != len(before) or any(a is not b for a, b in zip(container, before, strict=True)):
                container.clear()
                _CONTENTS[type(container)](container, before)
            elif isinstance(container, dict):
                container.update(before)
        with torch.no_grad():
            for tensor, before in self._bits:
                if tensor.shape == before.shape:
                    tensor.copy_(before)


_CONTENTS: dict[type, Callable[[Any, Any], None]] = {
    list: list.extend,
    dict: dict.update,
    set: set.update,
    deque: deque.extend,
}


# Function -> how its rate is called, where it stands among the arguments, and its default.
_RATES: dict[Callable[..., Any], tuple[str, int, float]] = {
    **dict.fromkeys(
        (F.dropout, F.dropout1d, F.dropout2d, F.dropout3d, F.alpha_dropout, F.feature_alpha_dropout), ("p", 1, 0.5)
    ),
    **dict.fromkeys((torch.dropout, torch.alpha_dropout, torch.feature_dropout), ("p", 1, 0.5)),
    F.scaled_dot_product_attention: ("dropout_p", 4, 0.0),
}


class _NoDropout(TorchFunctionMode):
    """Dropout that a model calls as a function drops nothing."""

    def __torch_function__(self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if func in _RATES:
            name, place, default = _RATES[func]
            rate = kwargs.get(name, args[place] if len(args) > place else default)
            if rate:
                if len(args) > place:
                    args = (*args[:place], 0.0, *args[place + 1 :])
                else:
                    kwargs = {**kwargs, name: 0.0}
        return func(*args, **kwargs)
