"""What the capture makes of a model: for each parameter its operations, their rules, and the form of its gradients.

Watching changes nothing: a :class:`Watch` is a :class:`~dpkit.gradients.capture.Capture` that also writes a list. It is
for explanations (``dpkit check``, the refusals of the neighbour probe), on public or synthetic batches, and is slower.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from dpkit.gradients.backend import LossFn, check_losses, trainable
from dpkit.gradients.capture import Call, Capture
from dpkit.gradients.derived import Derived, Key, origin, sources
from dpkit.gradients.forms import Coalesced, Form, Gram, Kept, RankOne, Recomputed, Zero
from dpkit.gradients.layout import Layout, Layouts
from dpkit.gradients.rules import RULES
from dpkit.gradients.tape import title


@dataclass(frozen=True, slots=True)
class Use:
    """One operation on parameters.

    Attributes:
      names: of the parameters that it receives, directly or through derived tensors.
      functions: the torch function, behind those of whose decomposition it is a part.
      derived: functions that made its weight from the parameters; empty if it received them directly.
      rule: that computes the per-sample gradients; None for the fallback.
      layout: where the examples were observed in its input; None if nothing was.
    """

    names: tuple[str, ...]
    functions: tuple[str, ...]
    derived: tuple[str, ...]
    rule: str | None
    layout: Layout | None


@dataclass(frozen=True, slots=True)
class Watched:
    """What was seen of one batch.

    Attributes:
      uses: in the order of the forward pass.
      forms: parameter -> (strategy in words, bytes of gradients that are written out and kept).
    """

    uses: tuple[Use, ...]
    forms: dict[str, tuple[str, int]]


STRATEGIES: dict[type, str] = {
    RankOne: "exact product",
    Gram: "Gram matrix",
    Kept: "kept",
    Recomputed: "recomputed",
    Coalesced: "coalesced rows",
    Zero: "not used",
}
"""Form -> what users call it."""


class Watch(Capture):
    """A capture that lists the uses of parameters.

    Attributes:
      uses: so far.
    """

    def __init__(self, parameters: dict[str, nn.Parameter], *, layouts: Layouts | None = None) -> None:
        super().__init__(parameters, layouts=layouts)
        self.uses: list[Use] = []
        self._path: list[str] = []
        self._made: dict[int, tuple[Tensor, tuple[str, ...]]] = {}  # derived tensors, and how they were made

    def _derive(
        self, func: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any], keys: dict[int, Key]
    ) -> Any:
        result = super()._derive(func, args, kwargs, keys)
        made = (*self._derivation(keys.values()), _short(func))
        for tensor in result if isinstance(result, (tuple, list)) else (result,):
            if isinstance(tensor, Tensor) and origin(tensor) is not None:
                self._made[id(tensor)] = (tensor, made)
        return result

    def _apply(self, call: Call) -> Any:
        self._path.append(_short(call.function))
        before = len(self.uses)
        try:
            result = super()._apply(call)
            if len(self.uses) == before and _carries_gradient(result):
                self.uses.append(self._use(call))
            return result
        finally:
            self._path.pop()

    def _use(self, call: Call) -> Use:
        rule = RULES.get(call.function)
        observed = [self.layouts.of(call.group, call.ordinal, place, None) for place in range(_MOST_PLACES)]
        return Use(
            names=tuple(dict.fromkeys(name for key in call.keys.values() for name in sorted(sources(key)))),
            functions=tuple(self._path),
            derived=self._derivation(call.keys.values()),
            rule=None if rule is None else rule.__module__.rpartition(".")[2],
            layout=next((layout for layout in observed if isinstance(layout, Layout)), None),
        )

    def _derivation(self, keys: Iterable[Key]) -> tuple[str, ...]:
        """How the first derived tensor among ``keys`` was made."""
        for key in keys:
            if isinstance(key, Derived) and id(key.tensor) in self._made:
                return self._made[id(key.tensor)][1]
        return ()


_MOST_PLACES = 8  # tensors among the arguments and results of a call


def watch(model: nn.Module, loss_fn: LossFn, batch: Any, size: int, layouts: Layouts | None = None) -> Watched:
    """List what the capture makes of a batch.

    Raises:
      UnsupportedOperation: as without watching.
    """
    capture = Watch(trainable(model), layouts=layouts)
    capture.begin(size)
    losses = _forward(capture, model, loss_fn, batch, size)
    capture.backward(losses)
    forms = capture.collect(size).forms
    return Watched(tuple(capture.uses), {name: _described(form) for name, form in forms.items()})


def functions_of(model: nn.Module, loss_fn: LossFn, batch: Any, size: int, name: str) -> tuple[str, ...]:
    """The torch functions that receive a parameter in the forward pass; several are listed once."""
    capture = Watch(trainable(model))
    _forward(capture, model, loss_fn, batch, size)
    return tuple(dict.fromkeys(use.functions[0] for use in capture.uses if name in use.names))


def _forward(capture: Capture, model: nn.Module, loss_fn: LossFn, batch: Any, size: int) -> Tensor:
    with torch.enable_grad(), capture:
        losses = loss_fn(model, capture.batch(batch))
        check_losses(losses, size)
    return losses


def _described(form: Form) -> tuple[str, int]:
    kept = 0
    if isinstance(form, Kept):
        kept = form.gradients.nbytes
    elif isinstance(form, Coalesced):
        kept = form.rows.nbytes
    return STRATEGIES.get(type(form), type(form).__name__), kept


def _carries_gradient(result: Any) -> bool:
    if isinstance(result, (tuple, list)):
        return any(map(_carries_gradient, result))
    return isinstance(result, Tensor) and result.requires_grad


def _short(function: Callable[..., Any]) -> str:
    return title(function).rpartition(".")[2].strip("_")
