"""Which form the gradients of a parameter take, and the memory in which they are written out.

Written-out gradients (Kept) are the fastest form of long sequences and large images as long as memory allows; Gram
matrices win where few products meet, because the parameter's entries are then never touched for each unit; writing
everything twice (Recomputed) is the way out where both cost too much.  Decisions depend on shapes alone.
"""

from __future__ import annotations

import weakref
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from dpkit.gradients import probes
from dpkit.gradients.arithmetic import accumulation_dtype
from dpkit.gradients.factors import Factor, OneHot, Outer, Products, Vectors


@dataclass(frozen=True, slots=True)
class Machine:
    """What work costs, in multiply-add operations at the peak of a float32 matrix product.

    Attributes:
      entry: to write an entry of a gradient, and read it for the norm and for the sum.
      patch: what it costs more to write one by a grouped convolution.
      convolution: a multiply-add of a convolution.
      wide: a multiply-add in float64.
      element: to touch one float64 number outside of a matrix product.
      call: to start one operation.
    """

    entry: float
    patch: float
    convolution: float
    wide: float
    element: float
    call: float


# Fitted to the times of a processor core of 47 G multiply-adds a second; those of the
# graphics card follow from its data sheet and were not measured.
_MACHINES = {
    "cpu": Machine(entry=30.0, patch=38.0, convolution=0.5, wide=2.0, element=20.0, call=0.25e6),
    "cuda": Machine(entry=75.0, patch=150.0, convolution=1.0, wide=2.0, element=100.0, call=150e6),
}
_GRAM_CALLS = 40


@dataclass(frozen=True, slots=True)
class Option:
    """One possible form.

    Attributes:
      cost: of norms and sum, beyond the ordinary gradient that all pay; see :class:`Machine`.
      kept_bytes: memory that it holds until the sum is taken.
      products: what a Gram form is made of; None for the written-out ones.
    """

    cost: float
    kept_bytes: int = 0
    products: Products | None = None


def options(factors: Sequence[Factor], parameter: Tensor, size: int) -> list[Option]:
    """The forms that factors of different kinds can take: kept, recomputed, and Gram if they are products."""
    machine = _MACHINES.get(parameter.device.type, _MACHINES["cuda"])
    entries = parameter.numel()
    needed = size * entries * accumulation_dtype(parameter.dtype).itemsize
    writing, touching = 0.0, machine.entry * entries
    for factor in factors:
        if isinstance(factor, Outer):
            writing += factor.steps * entries
        elif isinstance(factor, Products):
            writing += machine.convolution * factor.steps * entries
            touching += machine.patch * entries
        else:
            touching += machine.entry * entries
    found = [Option(size * touching, kept_bytes=needed), Option(size * (writing + 2 * touching))]
    products = as_products(factors)
    if products is not None:
        multiplications, touched = products.work(probes.count(products.steps))
        cost = size * (machine.wide * multiplications + machine.element * touched)
        found.append(Option(cost + _GRAM_CALLS * machine.call, products=products))
    return found


def choose(found: Sequence[Option], parameter: Tensor, keep_bytes: float, workspace: Workspace) -> Option:
    """The cheapest option that the budget allows."""
    lean = min((option for option in found if not option.kept_bytes), key=lambda option: option.cost)
    keeping = min((option for option in found if option.kept_bytes), key=lambda option: option.cost, default=lean)
    gain = lean.cost - keeping.cost
    if gain > 0 and workspace.grants(parameter, gain, keeping.kept_bytes) and keeping.kept_bytes <= keep_bytes:
        return keeping
    return lean


_NOBODY: weakref.ref[Tensor] = weakref.ref(torch.empty(0))


class Workspace:
    """Memory for written-out gradients that outlives a step, because fresh pages cost more than writing on them.

    A buffer is lent to one form at a time, and lent again when that form is gone.  The workspace also remembers what
    each parameter would gain from memory, so that from the second step on those with the most to gain get it.
    """

    def __init__(self) -> None:
        self._buffers: list[tuple[Tensor, weakref.ref[Tensor]]] = []
        self._wishes: dict[int, tuple[float, int]] = {}
        self._granted: dict[int, bool] = {}

    def take(self, parameter: Tensor, size: int) -> Tensor:
        """Uninitialized memory for the gradients of ``size`` units: (size, entries), float32 or better."""
        dtype, shape = accumulation_dtype(parameter.dtype), (size, parameter.numel())
        if parameter.device.type != "cpu":
            return torch.empty(shape, dtype=dtype, device=parameter.device)
        needed = size * parameter.numel() * dtype.itemsize
        free = [i for i, (_, lent) in enumerate(self._buffers) if lent() is None]
        fitting = [i for i in free if needed <= len(self._buffers[i][0])]
        if fitting:
            index = min(fitting, key=lambda i: len(self._buffers[i][0]))
        else:
            # The largest that is too small makes room: batches of slightly different sizes must not pile up.
            index = max(free, key=lambda i: len(self._buffers[i][0]), default=len(self._buffers))
            del self._buffers[index : index + 1]
            buffer = torch.empty(needed, dtype=torch.uint8)
            self._buffers.insert(index, (buffer, _NOBODY))
        buffer, _ = self._buffers[index]
        rows = buffer[:needed].view(dtype).view(shape)
        self._buffers[index] = (buffer, weakref.ref(rows))
        return rows

    def grants(self, parameter: Tensor, gain: float, needed: int) -> bool:
        """Note what a parameter would gain from memory; whether it may have it."""
        self._wishes[id(parameter)] = (gain / max(1, needed), needed)
        return self._granted.get(id(parameter), True)

    def next_step(self, keep_bytes: float) -> None:
        """Give the next step's memory to the parameters that gained most per byte in this one."""
        for parameter, (_, needed) in sorted(self._wishes.items(), key=lambda wish: -wish[1][0]):
            self._granted[parameter] = needed <= keep_bytes
            if needed <= keep_bytes:
                keep_bytes -= needed
        self._wishes.clear()

    def clear(self) -> None:
        """Give all memory back."""
        self._buffers.clear()
        self._wishes.clear()
        self._granted.clear()


def as_products(factors: Sequence[Factor]) -> Products | None:
    """The factors as products, if that is what they are together."""
    if len(factors) == 1 and isinstance(factors[0], Products):
        return factors[0]
    outers = [factor for factor in factors if isinstance(factor, Outer)]
    tables = [factor for factor in factors if isinstance(factor, OneHot)]
    fitting = all(outers and table.v.shape[2] == outers[0].v.shape[2] for table in tables)
    if len(outers) == 1 and len(outers) + len(tables) == len(factors) and len(tables) <= 1 and fitting:
        return Vectors.of(outers[0], tables[0] if tables else None)
    return None
