"""A raw parameter that meets a batch by broadcasting: scales, biases, whole position tables.

The parameter is expanded over the batch before the operation, so that autograd itself delivers one gradient for each
example; the operation runs unchanged.  The other tensor must bring the batch axis: a parameter with an axis of its own
in that place would have one row for each slot of the batch.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from torch import Tensor

from dpkit.gradients.factors import Dense, Factor

if TYPE_CHECKING:
    from dpkit.gradients.capture import Call


def broadcast(call: Call, /, *args: Any, **kwargs: Any) -> Tensor:
    """Any function of one parameter and one batched tensor that works entry by entry, with broadcasting."""
    tensors = [value for value in (*args, *kwargs.values()) if isinstance(value, Tensor)]
    tracked = [value for value in tensors if call.name(value) is not None]
    others = [value for value in tensors if call.name(value) is None]
    if len(tracked) != 1 or len(others) != 1:
        raise call.unsupported("they meet no batch of examples here, and a function of parameters alone has no rule")
    parameter, x = tracked[0], others[0]
    if args[0] is parameter and _in_place(call.function.__name__):
        raise call.unsupported("the batch would be written into the parameter", "write the result to a new tensor")
    own = parameter.dim()
    if x.dim() == 0 or own > x.dim() or (own == x.dim() and parameter.shape[0] != 1):
        raise call.unsupported(
            f"its shape {tuple(parameter.shape)} and the other tensor's {tuple(x.shape)} leave no batch axis before "
            "its own axes",
            "give the batch a leading axis that the parameter lacks, or has with length 1",
        )
    shape = (1,) * (x.dim() - own) + tuple(parameter.shape)
    expanded = call.record(_Expand((call.name(parameter),), x.shape[0], shape), None, call.detached(parameter))

    def swap(value: Any) -> Any:
        return expanded if value is parameter else value

    return call.function(*map(swap, args), **{key: swap(value) for key, value in kwargs.items()})


@dataclass(frozen=True, slots=True)
class _Expand:
    """p -> the parameter, once for each example: (B, 1, ..., 1, *p.shape)."""

    names: tuple[str | None]
    size: int
    shape: tuple[int, ...]

    def forward(self, x: None, parameter: Tensor) -> tuple[Tensor, tuple[Tensor | None, ...]]:
        return parameter.view(self.shape).expand(self.size, *self.shape[1:]), ()

    def backward(
        self, grad: Tensor, saved: tuple[()], *, need_input: bool
    ) -> tuple[Tensor | None, list[tuple[str, Factor]]]:
        return None, [(name, Dense(grad)) for name in self.names if name is not None]


def _in_place(name: str) -> bool:
    return name.startswith("__i") or (name.endswith("_") and not name.endswith("__"))
