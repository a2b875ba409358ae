r"""The algebra of per-sample gradients: norms that are upper bounds, and weighted sums with a stated rounding error.

An operation leaves *factors* of the gradient G_b of each unit b (the dimensions of a factor are written B, T, p, d):

    Dense(g)        G_b = g_b
    Outer(u, v)     G_b = sum_t u_bt v_bt^T                  linear layers; T is 1, or the length of a sequence
    OneHot(i, v)    G_b = sum_t e_(i_bt) v_bt^T              embeddings: u is one-hot and never written out

All factors of one parameter are joined into one *form* before any norm is taken, so that a weight that is tied or used
twice has the norm of its total gradient.  :func:`join` alone decides on the form:

    RankOne         one Outer with T = 1: |G|^2 = |u|^2 |v|^2, and the weighted sum is one matrix product
    Coalesced       embeddings alone: one row for each (unit, token), rows of equal tokens added up
    Kept            G_b written out for every unit
    Gram            |G|^2 = sum_tt' (u_t.u_t')(v_t.v_t'), for what is too large to write out
    Recomputed      G_b written out twice, some units at a time: for the norm, then for the sum

**Norms are upper bounds.**  A sum of n squares in a precision of unit roundoff u is wrong by a factor of at most
1 + (n + 2) u.  Squares are added in float32 over at most 64 entries and in float64 above, and the result is inflated by
that factor.  Gram norms cancel: their error is relative to S^2 with S = sum_t |u_t| |v_t|, not to |G|^2, so they are
computed in float64 and raised by c 2^-53 S^2.  What is stored is what is summed: the norm is that of the very tensors
in the form, whatever rounding produced them.

**Rounding of weighted sums.**  With n_b the root of the reported squared norm,

    | weighted_sum(w) - sum_b w_b G_b |_2  <=  (ROUNDING_CHAIN + 8) 2^-24 sum_b w_b n_b

for weights w >= 0 and any number of units, outside the range of underflow.  Chains of additions in float32 have at
most ROUNDING_CHAIN terms; up to four such partial sums are added in float32 (three more roundings), the rest in
float64.  The other five cover the weights, the scaled factor and the final rounding.  Float64 parameters stay in
float64.
Reference: Higham, Accuracy and Stability of Numerical Algorithms (2002), sections 3.1 and 4.2.
"""

from __future__ import annotations

import math
import weakref
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

from dpkit.types import Named

ROUNDING_CHAIN = 64
"""Terms that a weighted sum adds in float32 before it changes to a wider sum."""

KEEP_BYTES = 512 << 20
"""How many bytes of per-sample gradients one microbatch may write out and keep."""

_PARTIAL_SUMS = 4
_SQUARES_CHAIN = 64
_FEW_STEPS = 4
# Larger blocks of main memory go back to the system when they are freed, and a page fault for each 4 KiB brings them
# back: more than the arithmetic costs.
_BLOCK_BYTES = {"cpu": 8 << 20}
_BLOCK_BYTES_ELSEWHERE = 1 << 30
# Rows of a product that stay in the second-level cache while its partial sums are added.
_PANEL_ENTRIES = 128 << 10


def accumulation_dtype(dtype: torch.dtype) -> torch.dtype:
    """Where norms and sums of a parameter of this type live: never below float32."""
    return torch.float64 if dtype == torch.float64 else torch.float32


class Factor(Protocol):
    """One operation's part of the per-sample gradients of one parameter."""

    @property
    def size(self) -> int:
        """B, the number of units."""
        ...

    @property
    def dtype(self) -> torch.dtype:
        """The type in which the operation was computed."""
        ...

    def write(self, rows: slice, out: Tensor) -> None:
        """Write the gradients of some units into ``out``: (b, number of entries of the parameter)."""
        ...

    def magnitude(self) -> Tensor:
        """(B,) float64, at least sum_t |u_bt| |v_bt|: what rounding errors of :meth:`write` are relative to."""
        ...

    def select(self, keep: Tensor) -> Factor:
        """The units where ``keep`` is true."""
        ...


class Form(Protocol):
    """The joined per-sample gradients of one parameter."""

    def sq_norms(self) -> Tensor:
        """(B,) float64 squared norms, never below the true value."""
        ...

    def weighted_sum(self, weights: Tensor) -> Tensor:
        """The sum over b of ``weights[b]`` G_b, flat or shaped like the parameter."""
        ...

    def select(self, keep: Tensor) -> Form:
        """The units where ``keep`` is true."""
        ...


# ------------------------------------------------------------------------------------------------------------- factors


@dataclass(frozen=True, slots=True)
class Dense:
    """Gradients that the operation wrote out itself: (B, ...)."""

    gradients: Tensor

    @property
    def size(self) -> int:
        return self.gradients.shape[0]

    @property
    def dtype(self) -> torch.dtype:
        return self.gradients.dtype

    def write(self, rows: slice, out: Tensor) -> None:
        out.copy_(_flat(self.gradients[rows]))

    def magnitude(self) -> Tensor:
        return _sq_norms(_flat(self.gradients)).sqrt()

    def select(self, keep: Tensor) -> Dense:
        return Dense(self.gradients[keep])


@dataclass(frozen=True, slots=True)
class Outer:
    """G_b = sum_t u_bt v_bt^T with u: (B, T, p) and v: (B, T, d), for a parameter of p x d entries."""

    u: Tensor
    v: Tensor

    @property
    def size(self) -> int:
        return self.u.shape[0]

    @property
    def dtype(self) -> torch.dtype:
        return self.u.dtype

    @property
    def steps(self) -> int:
        return self.u.shape[1]

    def write(self, rows: slice, out: Tensor) -> None:
        u, v = self.u[rows].to(out.dtype), self.v[rows].to(out.dtype)
        torch.bmm(u.mT, v, out=out.view(len(out), u.shape[2], v.shape[2]))

    def left(self, rows: slice) -> Tensor:
        return self.u[rows].double()

    def left_lengths(self) -> Tensor:
        return torch.linalg.vector_norm(self.u.double(), dim=2)

    def magnitude(self) -> Tensor:
        return (self.left_lengths() * torch.linalg.vector_norm(self.v.double(), dim=2)).sum(1)

    def add_to(self, total: Tensor, weights: Tensor) -> None:
        """Add sum_b ``weights[b]`` G_b to the float64 (p, d) ``total``."""
        for rows in _blocks(self.size, 8 * self.steps * (self.u.shape[2] + self.v.shape[2]), self.u.device):
            scaled = self.u[rows].double() * weights[rows, None, None]
            total.addmm_(scaled.flatten(0, 1).mT, self.v[rows].double().flatten(0, 1))

    def select(self, keep: Tensor) -> Outer:
        return Outer(self.u[keep], self.v[keep])


@dataclass(frozen=True, slots=True)
class OneHot:
    """G_b = sum_t e_(ids_bt) v_bt^T with ids: (B, T) and v: (B, T, d), for a table of ``entries`` x d."""

    ids: Tensor
    v: Tensor
    entries: int

    @property
    def size(self) -> int:
        return self.ids.shape[0]

    @property
    def dtype(self) -> torch.dtype:
        return self.v.dtype

    @property
    def steps(self) -> int:
        return self.ids.shape[1]

    def write(self, rows: slice, out: Tensor) -> None:
        v = self.v[rows].to(out.dtype)
        table = out.zero_().view(len(out), self.entries, v.shape[2])
        table.scatter_add_(1, self.ids[rows, :, None].expand_as(v), v)

    def left_lengths(self) -> Tensor:
        return torch.ones(self.ids.shape, dtype=torch.float64, device=self.v.device)

    def magnitude(self) -> Tensor:
        return torch.linalg.vector_norm(self.v.double(), dim=2).sum(1)

    def add_to(self, total: Tensor, weights: Tensor) -> None:
        """Add sum_b ``weights[b]`` G_b to the float64 (entries, d) ``total``."""
        total.index_add_(0, self.ids.flatten(), (self.v.double() * weights[:, None, None]).flatten(0, 1))

    def select(self, keep: Tensor) -> OneHot:
        return OneHot(self.ids[keep], self.v[keep], self.entries)


# --------------------------------------------------------------------------------------------------------------- forms


@dataclass(frozen=True, slots=True)
class RankOne:
    """G_b = u_b v_b^T with u: (B, p) and v: (B, d)."""

    u: Tensor
    v: Tensor

    def sq_norms(self) -> Tensor:
        return _sq_norms(self.u) * _sq_norms(self.v)

    def weighted_sum(self, weights: Tensor) -> Tensor:
        dtype = accumulation_dtype(self.u.dtype)
        u, v, weights = self.u.to(dtype), self.v.to(dtype), weights.to(dtype)[:, None]
        if u.shape[1] < v.shape[1]:
            u = u * weights
        else:
            v = v * weights
        (size, p), d = u.shape, v.shape[1]
        panel = max(1, _PANEL_ENTRIES // max(1, d)) if u.device.type == "cpu" else p
        out = u.new_empty(p, d)
        with _full_precision(u.device):
            for top in range(0, p, panel):
                _product(u[:, top : top + panel], v, out[top : top + panel], _chain(dtype, size))
        return out

    def select(self, keep: Tensor) -> RankOne:
        return RankOne(self.u[keep], self.v[keep])


@dataclass(frozen=True, slots=True)
class Kept:
    """G_b written out: (B, entries of the parameter), in float32 or better."""

    gradients: Tensor

    def sq_norms(self) -> Tensor:
        return _sq_norms(self.gradients)

    def weighted_sum(self, weights: Tensor) -> Tensor:
        size, entries = self.gradients.shape
        dtype = self.gradients.dtype
        out = self.gradients.new_empty(entries, 1)
        with _full_precision(out.device):
            _product(self.gradients, weights.to(dtype)[:, None], out, _chain(dtype, size))
        return out

    def select(self, keep: Tensor) -> Kept:
        return Kept(self.gradients[keep])


@dataclass(frozen=True, slots=True)
class Coalesced:
    """A table of embeddings: the rows (K, d), each the gradient of one token in one unit."""

    rows: Tensor
    units: Tensor
    tokens: Tensor
    size: int
    entries: int

    @staticmethod
    def of(factors: Sequence[OneHot], dtype: torch.dtype) -> Coalesced:
        ids = torch.cat([factor.ids for factor in factors], dim=1)
        v = torch.cat([factor.v for factor in factors], dim=1).to(dtype)
        entries = factors[0].entries
        keys = ids + entries * torch.arange(len(ids), device=ids.device)[:, None]
        found, row_of = torch.unique(keys, return_inverse=True)
        rows = v.new_zeros(len(found), v.shape[2]).index_add_(0, row_of.flatten(), v.flatten(0, 1))
        return Coalesced(rows, found // entries, found % entries, len(ids), entries)

    def sq_norms(self) -> Tensor:
        squares = _sq_norms(self.rows)
        # Float64 additions of terms of one sign: 2^-30 covers millions of tokens a unit, in any order.
        return squares.new_zeros(self.size).index_add_(0, self.units, squares) * (1 + 2.0**-30)

    def weighted_sum(self, weights: Tensor) -> Tensor:
        touched, row_of = torch.unique(self.tokens, return_inverse=True)
        scaled = self.rows.double() * weights.double()[self.units, None]
        sums = scaled.new_zeros(len(touched), scaled.shape[1]).index_add_(0, row_of, scaled)
        out = self.rows.new_zeros(self.entries, self.rows.shape[1])
        out[touched] = sums.to(out.dtype)
        return out

    def select(self, keep: Tensor) -> Coalesced:
        rows = keep[self.units]
        renumbered = keep.cumsum(0) - 1
        units = renumbered[self.units[rows]]
        return Coalesced(self.rows[rows], units, self.tokens[rows], int(keep.sum()), self.entries)


@dataclass(frozen=True, slots=True)
class Gram:
    """Outer and OneHot factors of one p x d parameter that are never written out; everything in float64."""

    factors: tuple[Outer | OneHot, ...]
    shape: tuple[int, int]

    def sq_norms(self) -> Tensor:
        (p, d), steps = self.shape, sum(factor.steps for factor in self.factors)
        size, device = self.factors[0].size, self.factors[0].v.device
        squares = torch.zeros(size, dtype=torch.float64, device=device)
        for rows in _blocks(size, 16 * steps * (steps + p + d), device):
            for i, one in enumerate(self.factors):
                for j, other in enumerate(self.factors[: i + 1]):
                    products = _left_products(one, other, rows)
                    products = products * (one.v[rows].double() @ other.v[rows].double().mT)
                    squares[rows] += products.sum((1, 2)) * (1 if i == j else 2)
        # c = p + d + T^2 roundings; 2^19 more make S <= 2^17 n_b, so that the float64 sum of up to 290,000 vectors
        # keeps the promise of weighted_sum even where G_b cancels completely.
        scale = _magnitude(self.factors)
        return squares.clamp_min(0) + (steps**2 + p + d + 2**19) * 2.0**-53 * scale.square()

    def weighted_sum(self, weights: Tensor) -> Tensor:
        total = torch.zeros(self.shape, dtype=torch.float64, device=self.factors[0].v.device)
        for factor in self.factors:
            factor.add_to(total, weights.double())
        return total.to(accumulation_dtype(self.factors[0].dtype))

    def select(self, keep: Tensor) -> Gram:
        return Gram(tuple(factor.select(keep) for factor in self.factors), self.shape)


@dataclass(frozen=True, slots=True)
class Recomputed:
    """Any factors, written out in float64 whenever they are needed, some units at a time."""

    factors: tuple[Factor, ...]
    entries: int
    device: torch.device

    def sq_norms(self) -> Tensor:
        lengths = torch.cat([_sq_norms(block).sqrt() for _, block in self._blocks()])
        scale = _magnitude(self.factors)
        # Two computations of one float64 sum of up to 2^20 terms differ by less than 2^-32 of its magnitude.
        return (lengths + 2.0**-32 * scale).square() * (1 + 2.0**-50)

    def weighted_sum(self, weights: Tensor) -> Tensor:
        total = torch.zeros(self.entries, dtype=torch.float64, device=self.device)
        weights = weights.double()
        for rows, block in self._blocks():
            total.addmv_(block.mT, weights[rows])
        return total.to(accumulation_dtype(self.factors[0].dtype))

    def select(self, keep: Tensor) -> Recomputed:
        return Recomputed(tuple(factor.select(keep) for factor in self.factors), self.entries, self.device)

    def _blocks(self) -> Iterator[tuple[slice, Tensor]]:
        for rows in _blocks(self.factors[0].size, 8 * self.entries, self.device):
            out = torch.empty(rows.stop - rows.start, self.entries, dtype=torch.float64, device=self.device)
            yield rows, written(self.factors, rows, out)


@dataclass(frozen=True, slots=True)
class Zero:
    """A parameter that no operation of this microbatch used."""

    size: int
    entries: int
    dtype: torch.dtype
    device: torch.device

    def sq_norms(self) -> Tensor:
        return torch.zeros(self.size, dtype=torch.float64, device=self.device)

    def weighted_sum(self, weights: Tensor) -> Tensor:
        return torch.zeros(self.entries, dtype=accumulation_dtype(self.dtype), device=self.device)

    def select(self, keep: Tensor) -> Zero:
        return Zero(int(keep.sum()), self.entries, self.dtype, self.device)


class Workspace:
    """Memory for written-out gradients that outlives a step, because fresh pages cost more than writing on them.

    Each parameter's buffer is lent to one form at a time, and lent again when that form is gone.
    """

    def __init__(self) -> None:
        self._buffers: dict[Tensor, tuple[Tensor, weakref.ref[Tensor]]] = {}

    def take(self, parameter: Tensor, size: int) -> Tensor:
        """Uninitialized memory for the gradients of ``size`` units: (size, entries), float32 or better."""
        dtype, device = accumulation_dtype(parameter.dtype), parameter.device
        shape = (size, parameter.numel())
        if device.type != "cpu":
            return torch.empty(shape, dtype=dtype, device=device)
        buffer, lent = self._buffers.get(parameter, (None, None))
        if buffer is None or buffer.dtype != dtype or len(buffer) < size or (lent is not None and lent() is not None):
            buffer = torch.empty(shape, dtype=dtype)
        rows = buffer[:size]
        self._buffers[parameter] = (buffer, weakref.ref(rows))
        return rows

    def clear(self) -> None:
        """Give all memory back."""
        self._buffers.clear()


def join(
    factors: Sequence[Factor], parameter: Tensor, size: int, keep_bytes: int, workspace: Workspace
) -> tuple[Form, int]:
    """The form of one parameter's gradients, and how many of ``keep_bytes`` it took.

    Written-out gradients are the fastest form of long sequences and convolutions as long as memory allows; a Gram
    matrix wins where few vectors meet (T <= 4), because the parameter's entries are then never touched per unit.
    """
    entries, device = parameter.numel(), parameter.device
    dtype = accumulation_dtype(parameter.dtype)
    if not factors:
        return Zero(size, entries, dtype, device), 0
    if len(factors) == 1 and isinstance(factors[0], Dense):
        return kept(factors[0].gradients.to(dtype)), 0
    if len(factors) == 1 and isinstance(factors[0], Outer) and factors[0].steps == 1:
        return RankOne(factors[0].u[:, 0], factors[0].v[:, 0]), 0
    one_hot = [factor for factor in factors if isinstance(factor, OneHot)]
    if len(one_hot) == len(factors):
        return Coalesced.of(one_hot, dtype), 0
    needed = size * entries * dtype.itemsize
    vectors = [factor for factor in factors if isinstance(factor, Outer | OneHot)]
    if len(vectors) == len(factors):
        shape = (entries // max(1, vectors[0].v.shape[2]), vectors[0].v.shape[2])
        if needed > keep_bytes or sum(factor.steps for factor in vectors) <= _FEW_STEPS:
            return Gram(tuple(vectors), shape), 0
    if needed > keep_bytes:
        return Recomputed(tuple(factors), entries, device), 0
    out = workspace.take(parameter, size)
    for rows in _blocks(size, entries * dtype.itemsize, device):
        written(factors, rows, out[rows])
    return Kept(out), needed


@dataclass(frozen=True, slots=True)
class PerSampleGradients:
    """A :class:`~dpkit.gradients.backend.PerSample` made of one form for each parameter.

    Attributes:
      size: B, the number of units.
      forms: name -> form; every tracked parameter has one.
      shapes: name -> shape of the parameter.
    """

    size: int
    forms: dict[str, Form]
    shapes: dict[str, torch.Size]

    def sq_norms(self) -> Named:
        """Name -> (B,) squared norms in float64, never below the true value; infinite beyond the range of float32."""
        return {name: _within_float32(form.sq_norms()) for name, form in self.forms.items()}

    def weighted_sum(self, weights: Named) -> Iterator[tuple[str, Tensor]]:
        """Yield (name, sum over b of ``weights[name][b]`` g_b); see the module's docstring for the rounding error."""
        for name, form in self.forms.items():
            yield name, form.weighted_sum(weights[name]).view(self.shapes[name])

    def select(self, keep: Tensor) -> PerSampleGradients:
        """The units where the boolean (B,) ``keep`` is true."""
        if bool(keep.all()):
            return self
        forms = {name: form.select(keep) for name, form in self.forms.items()}
        return PerSampleGradients(int(keep.sum()), forms, self.shapes)


# ---------------------------------------------------------------------------------------------------------- arithmetic


def _product(left: Tensor, right: Tensor, out: Tensor, chain: int) -> None:
    """``out`` = left^T right, in partial products of ``chain`` rows: four are added in place, the fours in float64."""
    if len(left) <= chain:
        torch.mm(left.mT, right, out=out)
        return
    spare, wide = torch.empty_like(out), None
    for index, first in enumerate(range(0, len(left), chain)):
        rows = slice(first, first + chain)
        if index % _PARTIAL_SUMS:
            torch.mm(left[rows].mT, right[rows], out=spare)
            out.add_(spare)
            continue
        if index:
            wide = out.double() if wide is None else wide.add_(out)
        torch.mm(left[rows].mT, right[rows], out=out)
    if wide is not None:
        out.copy_(wide.add_(out))


def _sq_norms(rows: Tensor) -> Tensor:
    """(B, n) -> (B,) float64, at least the true sums of squares; a row that is not finite stays alone with it."""
    if rows.dtype == torch.float64:
        return torch.linalg.vector_norm(rows, dim=1).square() * (1 + (rows.shape[1] + 8) * 2.0**-52)
    rows, n = rows.float(), rows.shape[1]
    whole = n - n % _SQUARES_CHAIN
    squares = torch.linalg.vector_norm(rows[:, whole:], dim=1).double().square_() if whole < n or not n else None
    if whole:
        chunks = torch.linalg.vector_norm(rows[:, :whole].unflatten(1, (-1, _SQUARES_CHAIN)), dim=2)
        wide = torch.linalg.vector_norm(chunks, dim=1, dtype=torch.float64).square_()
        squares = wide if squares is None else squares.add_(wide)
    assert squares is not None
    # 64 squares, 63 sums, the root and its square; then what underflow may have swallowed.
    return squares.mul_(1 + (_SQUARES_CHAIN + 4) * 2.0**-24).add_(n * 2.0**-126)


def _within_float32(squares: Tensor) -> Tensor:
    """A norm that float32 cannot hold is infinite: the weight that would tame it underflows."""
    return squares.masked_fill(squares > torch.finfo(torch.float32).max, math.inf)


def _left_products(one: Outer | OneHot, other: Outer | OneHot, rows: slice) -> Tensor:
    """(b, T, T') inner products of the left factors, in float64."""
    if isinstance(one, Outer) and isinstance(other, Outer):
        return one.left(rows) @ other.left(rows).mT
    if isinstance(one, OneHot) and isinstance(other, OneHot):
        return (one.ids[rows, :, None] == other.ids[rows, None, :]).double()
    if isinstance(one, Outer) and isinstance(other, OneHot):
        ids = other.ids[rows, None, :].expand(-1, one.steps, -1)
        return one.u[rows].gather(2, ids).double()
    return _left_products(other, one, rows).mT


def _magnitude(factors: Sequence[Factor]) -> Tensor:
    return torch.stack([factor.magnitude() for factor in factors]).sum(0)


def written(factors: Sequence[Factor], rows: slice, out: Tensor) -> Tensor:
    """``out``, with the gradients of some units from all factors together: (b, entries of the parameter)."""
    factors[0].write(rows, out)
    for factor in factors[1:]:
        more = torch.empty_like(out)
        factor.write(rows, more)
        out.add_(more)
    return out


def kept(gradients: Tensor) -> Kept:
    """Gradients (B, ...) that exist already, as a form."""
    return Kept(_flat(gradients))


def _flat(gradients: Tensor) -> Tensor:
    return gradients.reshape(len(gradients), math.prod(gradients.shape[1:]))


def _blocks(size: int, bytes_per_unit: int, device: torch.device) -> Iterator[slice]:
    """Slices of at most ROUNDING_CHAIN units that stay below the block size; one empty slice of an empty batch."""
    limit = _BLOCK_BYTES.get(device.type, _BLOCK_BYTES_ELSEWHERE)
    units = max(1, min(ROUNDING_CHAIN, limit // max(1, bytes_per_unit)))
    for first in range(0, max(1, size), units):
        yield slice(first, min(size, first + units))


def _chain(dtype: torch.dtype, size: int) -> int:
    return max(1, size) if dtype == torch.float64 else ROUNDING_CHAIN


@contextmanager
def _full_precision(device: torch.device) -> Iterator[None]:
    """Products of float32 numbers in float32: TF32 and bfloat16 shortcuts round by 2^-11 and 2^-8."""
    cpu = torch.backends.mkldnn.matmul  # pyright: ignore[reportAttributeAccessIssue]
    backend = torch.backends.cuda.matmul if device.type == "cuda" else cpu
    before = backend.fp32_precision
    backend.fp32_precision = "ieee"
    try:
        yield
    finally:
        backend.fp32_precision = before
