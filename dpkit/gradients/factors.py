r"""What an operation leaves behind: factors of the gradient G_b of each unit b.

    Dense(g)        G_b = g_b
    Outer(u, v)     G_b = sum_t u_bt v_bt^T                  linear layers; T is 1, or the length of a sequence
    OneHot(i, v)    G_b = sum_t e_(i_bt) v_bt^T              embeddings: u is one-hot and never written out
    Patches(x, q)   G_b = sum_t q_bt (patch t of x_b)^T      convolutions (``rules/conv.py``)

The dimensions of a factor are written B, T, p, d.  A factor can be *written out*, some units at a time.  Factors that
are sums of products (:class:`Products`) can instead be measured and added up without ever being written out.
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Hashable, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import Tensor

from dpkit.gradients.arithmetic import accumulation_dtype, blocks, linear_product, wide_gram, wide_product

NARROW = 4
"""How much slower a product with few columns is than a square one."""


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

    def select(self, keep: Tensor) -> Any:
        """The units where ``keep`` is true."""
        ...


class Joinable(ABC):
    """A factor that can be joined with others of its kind."""

    __slots__ = ()

    @property
    @abstractmethod
    def kind(self) -> Hashable:
        """Equal for factors that can be joined."""
        ...

    @classmethod
    @abstractmethod
    def joined(cls, factors: Sequence[Any]) -> Factor:
        """One factor for the sum of several of one kind, without rounding in less than the accumulation type."""
        ...


class Products(ABC):
    """G_b = sum_t l_bt r_bt^T, cut into groups of rows and columns that do not meet (one group but for convolutions).

    *Probes* are the k columns of a matrix A that contracts one side of G_b; the *sketch* of a unit is that side of its
    factors, contracted.  What contracts the gradients this way must contract their sum alike.
    """

    __slots__ = ()

    @property
    @abstractmethod
    def size(self) -> int: ...

    @property
    @abstractmethod
    def dtype(self) -> torch.dtype: ...

    @property
    @abstractmethod
    def steps(self) -> int:
        """T, the number of products of a unit."""
        ...

    @property
    @abstractmethod
    def contracted(self) -> int:
        """Length of the side that probes contract: the number of rows of A."""
        ...

    @property
    @abstractmethod
    def terms(self) -> int:
        """At least as many additions as one inner product of the l, one of the r, and one entry of a sketch take."""
        ...

    @abstractmethod
    def work(self, probes: int) -> tuple[float, float]:
        """Of one unit: multiply-adds in float64, and numbers touched besides, of its norm and of testing the sum."""
        ...

    @abstractmethod
    def grams(self, rows: slice, probes: Tensor | None) -> tuple[Tensor, Tensor, Tensor | None]:
        """Of some units: (b g, T, T) inner products of the l, those of the r, and the sketches (b, ...); float64."""
        ...

    @abstractmethod
    def weighted_sum(self, weights: Tensor) -> Tensor:
        """The sum over b of ``weights[b]`` G_b, in the type of the weights, with whatever rounding it has."""
        ...

    @abstractmethod
    def sketched_sum(self, sketches: Tensor, weights: Tensor) -> Tensor:
        """The sum over b of ``weights[b]`` G_b A, in float64 from float64 weights."""
        ...

    @abstractmethod
    def sketch(self, total: Tensor, probes: Tensor) -> Tensor:
        """``total`` A in float64, in the order of :meth:`sketched_sum`."""
        ...

    @abstractmethod
    def select(self, keep: Tensor) -> Any: ...


@dataclass(frozen=True, slots=True)
class Dense(Joinable):
    """Gradients that the operation wrote out itself: (B, ...)."""

    gradients: Tensor

    @property
    def size(self) -> int:
        return self.gradients.shape[0]

    @property
    def dtype(self) -> torch.dtype:
        return self.gradients.dtype

    def write(self, rows: slice, out: Tensor) -> None:
        out.copy_(flat(self.gradients[rows]))

    def select(self, keep: Tensor) -> Dense:
        return Dense(self.gradients[keep])

    @property
    def kind(self) -> Hashable:
        return Dense

    @classmethod
    def joined(cls, factors: Sequence[Dense]) -> Dense:
        total = flat(factors[0].gradients).to(accumulation_dtype(factors[0].dtype), copy=True)
        for factor in factors[1:]:
            total.add_(flat(factor.gradients))
        return cls(total)


@dataclass(frozen=True, slots=True)
class Outer(Joinable):
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
        u, v = self.u[rows], self.v[rows]
        out = out.view(len(out), u.shape[2], v.shape[2])
        if u.dtype != out.dtype and u.dtype == v.dtype and u.is_cuda and out.dtype == torch.float32:
            torch.bmm(u.mT, v, out_dtype=torch.float32, out=out)  # tensor cores add in float32
        else:
            torch.bmm(u.to(out.dtype).mT, v.to(out.dtype), out=out)

    def select(self, keep: Tensor) -> Outer:
        return Outer(self.u[keep], self.v[keep])

    @property
    def kind(self) -> Hashable:
        return Outer, self.u.shape[2], self.v.shape[2]

    @classmethod
    def joined(cls, factors: Sequence[Outer]) -> Outer:
        return cls(torch.cat([factor.u for factor in factors], 1), torch.cat([factor.v for factor in factors], 1))


@dataclass(frozen=True, slots=True)
class OneHot(Joinable):
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

    def select(self, keep: Tensor) -> OneHot:
        return OneHot(self.ids[keep], self.v[keep], self.entries)

    @property
    def kind(self) -> Hashable:
        return OneHot, self.entries, self.v.shape[2]

    @classmethod
    def joined(cls, factors: Sequence[OneHot]) -> OneHot:
        ids, v = torch.cat([factor.ids for factor in factors], 1), torch.cat([factor.v for factor in factors], 1)
        return cls(ids, v, factors[0].entries)


@dataclass(frozen=True, slots=True)
class Vectors(Products):
    """The products of an Outer, and of a OneHot of the same table, if there is one: a tied embedding.

    Attributes:
      u: (B, T, p) left factors; those that are one-hot come after them and are in ``ids``: (B, T').
      v: (B, T + T', d) right factors of both.
    """

    u: Tensor
    ids: Tensor | None
    v: Tensor

    @staticmethod
    def of(outer: Outer, one_hot: OneHot | None) -> Vectors:
        if one_hot is None:
            return Vectors(outer.u, None, outer.v)
        return Vectors(outer.u, one_hot.ids, torch.cat([outer.v, one_hot.v], 1))

    @property
    def size(self) -> int:
        return self.u.shape[0]

    @property
    def dtype(self) -> torch.dtype:
        return self.u.dtype

    @property
    def steps(self) -> int:
        return self.v.shape[1]

    @property
    def contracted(self) -> int:
        return max(self.u.shape[2], self.v.shape[2])

    @property
    def terms(self) -> int:
        return self.u.shape[2] + self.v.shape[2]

    def work(self, probes: int) -> tuple[float, float]:
        shorter = min(self.u.shape[2], self.v.shape[2])
        multiplications = self.steps * (self.steps + NARROW * probes) * self.terms
        return multiplications, 3 * self.steps**2 + self.steps * (self.terms + 2 * shorter)

    @property
    def _contracts_left(self) -> bool:
        return self.u.shape[2] >= self.v.shape[2]

    def grams(self, rows: slice, probes: Tensor | None) -> tuple[Tensor, Tensor, Tensor | None]:
        on_left = self._contracts_left
        left, sketch = wide_gram(self.u[rows], probes if on_left else None)
        right, right_sketch = wide_gram(self.v[rows], None if on_left else probes)
        if self.ids is not None:
            ids, u = self.ids[rows], self.u[rows]
            across = u.gather(2, ids[:, None, :].expand(-1, u.shape[1], -1)).double()
            equal = (ids[:, :, None] == ids[:, None, :]).double()
            left = torch.cat([torch.cat([left, across], 2), torch.cat([across.mT, equal], 2)], 1)
            if sketch is not None and probes is not None:
                sketch = torch.cat([sketch, probes[ids]], 1)
        return left, right, sketch if on_left else right_sketch

    def weighted_sum(self, weights: Tensor) -> Tensor:
        dtype, steps = weights.dtype, self.u.shape[1]
        total = torch.zeros(self.u.shape[2], self.v.shape[2], dtype=dtype, device=self.v.device)
        # Float32 factors are read as they are; wider sums of them widen a block at a time.
        bytes_per_unit = 0 if dtype == self.dtype else dtype.itemsize * self.steps * (self.u.shape[2] + self.v.shape[2])
        for rows in blocks(self.size, bytes_per_unit, self.v.device) if bytes_per_unit else [slice(0, self.size)]:
            u, v, w = self.u[rows].to(dtype), self.v[rows].to(dtype), weights[rows, None, None]
            if self.ids is not None or self._contracts_left:
                v = v * w
            else:
                u = u * w
            left, right = u.flatten(0, 1).mT, v[:, :steps].flatten(0, 1)
            total = linear_product(left, right.mT) if not bytes_per_unit else total.addmm_(left, right)
            if self.ids is not None:
                total.index_add_(0, self.ids[rows].flatten(), v[:, steps:].flatten(0, 1))
        return total

    def sketched_sum(self, sketches: Tensor, weights: Tensor) -> Tensor:
        scaled = sketches * weights[:, None, None]
        if self._contracts_left:
            return wide_product(scaled.flatten(0, 1), self.v.flatten(0, 1))
        steps = self.u.shape[1]
        total = wide_product(scaled[:, :steps].flatten(0, 1), self.u.flatten(0, 1))
        if self.ids is not None:
            total.index_add_(1, self.ids.flatten(), scaled[:, steps:].flatten(0, 1).mT)
        return total

    def sketch(self, total: Tensor, probes: Tensor) -> Tensor:
        return wide_product(probes, total if self._contracts_left else total.mT)

    def select(self, keep: Tensor) -> Vectors:
        return Vectors(self.u[keep], None if self.ids is None else self.ids[keep], self.v[keep])


def joined(factors: Sequence[Factor]) -> list[Factor]:
    """The same sum with one factor of each kind."""
    if len(factors) == 1:
        return list(factors)
    kinds: dict[Hashable, list[Any]] = {}
    for factor in factors:
        kinds.setdefault(factor.kind if isinstance(factor, Joinable) else id(factor), []).append(factor)
    return [group[0] if len(group) == 1 else group[0].joined(group) for group in kinds.values()]


def written(factors: Sequence[Factor], rows: slice, out: Tensor) -> Tensor:
    """``out``, with the gradients of some units from all factors together: (b, entries of the parameter)."""
    factors[0].write(rows, out)
    for factor in factors[1:]:
        more = torch.empty_like(out)
        factor.write(rows, more)
        out.add_(more)
    return out


def flat(gradients: Tensor) -> Tensor:
    """(B, ...) -> (B, n)."""
    if gradients.dim() == 2:
        return gradients
    return gradients.reshape(len(gradients), math.prod(gradients.shape[1:]))
