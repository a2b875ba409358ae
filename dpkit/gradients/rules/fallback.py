"""Any other function: as it is in the forward pass, and one vector-Jacobian product for each example in the backward.

Exact for every function whose output for an example depends on that example and the parameters alone and that torch can
batch (``torch.func.vmap``); it computes the function again in the backward pass, so one that draws random numbers is
refused.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from torch.utils import _pytree as pytree

from dpkit.gradients.derived import Key
from dpkit.gradients.factors import Dense, Factor
from dpkit.gradients.layout import Layout

if TYPE_CHECKING:
    from dpkit.gradients.capture import Call

CHUNK = 64
"""Examples that are mapped at a time."""


def per_example(call: Call, /) -> Any:
    """Run the call as it is, and record one vector-Jacobian product for each example.

    Raises:
      UnsupportedOperation: the function draws random numbers, or an input has no batch axis.
    """
    leaves, structure = pytree.tree_flatten((call.args, call.kwargs))
    tracked = [number for number, leaf in enumerate(leaves) if call.name(leaf) is not None]
    batched = [number for number, leaf in enumerate(leaves) if call.is_batched(leaf)]
    inputs = tuple(call.batched(leaves[number], 1) for number in batched)
    constants = [None if number in (*tracked, *batched) else leaf for number, leaf in enumerate(leaves)]
    layouts = tuple(call.layout(x) for x in inputs)
    operation = _Mapped(
        tuple(call.name(leaves[number]) for number in tracked),
        _Function(call.function, constants, structure, (*batched, *tracked)),
        layouts,
        tuple(call.result_layout(number, layouts[0]) for number in range(_MOST_OUTPUTS)),
        call.unsupported,
    )
    before = torch.random.get_rng_state()
    outputs = call.record_many(operation, inputs, tuple(call.detached(leaves[number]) for number in tracked))
    if not torch.equal(before, torch.random.get_rng_state()):
        raise call.unsupported("it draws random numbers, and would draw others when it is computed again")
    return outputs[0] if operation.function.single else outputs


_MOST_OUTPUTS = 8


class _Function:
    """A call with holes for its tensors."""

    def __init__(
        self, function: Callable[..., Any], constants: list[Any], structure: Any, holes: Sequence[int]
    ) -> None:
        self.function = function
        self.single = True
        self._constants = constants
        self._structure = structure
        self._holes = holes

    def __call__(self, *tensors: Tensor) -> tuple[Tensor, ...]:
        leaves = list(self._constants)
        for number, tensor in zip(self._holes, tensors, strict=True):
            leaves[number] = tensor
        args, kwargs = pytree.tree_unflatten(leaves, self._structure)
        outputs = self.function(*args, **kwargs)
        self.single = isinstance(outputs, Tensor)
        return (outputs,) if isinstance(outputs, Tensor) else tuple(outputs)


@dataclass(frozen=True, slots=True)
class _Mapped:
    names: tuple[Key | None, ...]
    function: _Function
    inputs: tuple[Layout, ...]
    outputs: tuple[Layout, ...]
    refusal: Callable[[str], Exception]

    def forward(
        self, inputs: tuple[Tensor, ...], weights: tuple[Tensor, ...]
    ) -> tuple[tuple[Tensor, ...], tuple[Tensor, ...]]:
        return self.function(*inputs, *weights), (*inputs, *weights)

    def backward(
        self, grads: tuple[Tensor | None, ...], saved: tuple[Tensor, ...], *, need_inputs: tuple[bool, ...]
    ) -> tuple[tuple[Tensor | None, ...], list[tuple[Key, Factor]]]:
        inputs, weights = saved[: len(self.inputs)], saved[len(self.inputs) :]
        used = [number for number, grad in enumerate(grads) if grad is not None]
        cotangents = [grad for grad in grads if grad is not None]
        found = self._mapped(inputs, weights, used, cotangents)
        return self._inputs(inputs, weights, used, cotangents, need_inputs), [
            (key, Dense(gradient)) for key, gradient in zip(self.names, found, strict=True) if key is not None
        ]

    def _inputs(
        self,
        inputs: tuple[Tensor, ...],
        weights: tuple[Tensor, ...],
        used: list[int],
        cotangents: list[Tensor],
        needed: tuple[bool, ...],
    ) -> tuple[Tensor | None, ...]:
        if not any(needed):
            return tuple(None for _ in inputs)
        with torch.enable_grad():
            leaves = [x.detach().requires_grad_(need) for x, need in zip(inputs, needed, strict=True)]
            outputs = self.function(*leaves, *weights)
        found = iter(
            torch.autograd.grad(
                [outputs[number] for number in used],
                [leaf for leaf, need in zip(leaves, needed, strict=True) if need],
                cotangents,
                allow_unused=True,
            )
        )
        return tuple(next(found) if need else None for need in needed)

    def _mapped(
        self, inputs: tuple[Tensor, ...], weights: tuple[Tensor, ...], used: list[int], cotangents: list[Tensor]
    ) -> tuple[Tensor, ...]:
        if cotangents[0].dim() and not len(cotangents[0]):
            return tuple(weight.new_zeros(0, *weight.shape) for weight in weights)

        def products(rows: tuple[Tensor, ...], ends: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
            placed = [row.movedim(0, layout.axis) for row, layout in zip(rows, self.inputs, strict=True)]

            def outputs(*weights: Tensor) -> tuple[Tensor, ...]:
                found = self.function(*placed, *weights)
                return tuple(found[number] for number in used)

            product = torch.func.vjp(outputs, *weights)[1]
            return product(
                tuple(end.movedim(0, self.outputs[number].axis) for end, number in zip(ends, used, strict=True))
            )

        try:
            rows = tuple(layout.split(x) for layout, x in zip(self.inputs, inputs, strict=True))
            ends = tuple(self.outputs[number].split(grad) for number, grad in zip(used, cotangents, strict=True))
            found = torch.func.vmap(products, chunk_size=CHUNK)(rows, ends)
        except (RuntimeError, ValueError, IndexError) as error:
            raise self.refusal(
                f"it has no rule, and torch cannot compute it for one example at a time ({error})"
            ) from error
        return tuple(gradient.detach() for gradient in found)
