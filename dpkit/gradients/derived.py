"""Derived parameters: tensors that are functions of parameters and constants alone.

A transposed or sliced weight, weight norm, ``exp`` of a parameter, the lookup of position numbers: autograd runs such a
function as usual, and its result is tracked like a parameter.  Factors recorded against it go back to the parameters
behind it: a view, a cast and a lookup by :func:`pull`, which only renames the entries; everything else by the batched
vector-Jacobian product of :class:`Pulled`, which is exact for every function that autograd can differentiate.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from dpkit.gradients import factors
from dpkit.gradients.factors import Dense, Factor, OneHot, Outer

_ORIGIN = "_dpkit_origin"

CASTS: frozenset[Callable[..., Any]] = frozenset(
    {
        *(Tensor.to, Tensor.type_as, Tensor.float, Tensor.double, Tensor.bfloat16, Tensor.half, Tensor.type),
        *(Tensor.clone, torch.clone, Tensor.contiguous),
    }
)
"""Functions whose result has the entries of their first argument, at most in another type."""


@dataclass(frozen=True, slots=True)
class Origin:
    """How a derived tensor came about.

    Attributes:
      sources: names of the parameters behind it.
      version: of the tensor; what was written to later is some function of its sources, no more a view or a cast.
      base: the tracked tensor of which it is a view, a cast or a lookup; None for any other function.
      ids: for a lookup, the row numbers.
      padding_idx: for a lookup, the row that gets no gradient.
    """

    sources: frozenset[str]
    version: int
    base: Tensor | None = None
    base_key: Key | None = None
    ids: Tensor | None = None
    padding_idx: int | None = None


class Derived:
    """The key of a derived tensor. Two are equal if they are of the same tensor."""

    __slots__ = ("_version", "origin", "tensor")

    def __init__(self, tensor: Tensor, origin: Origin) -> None:
        self.tensor = tensor
        self.origin = origin
        self._version = tensor._version

    @property
    def overwritten(self) -> bool:
        """Whether the tensor was written to after this use of it."""
        return self.tensor._version != self._version

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Derived) and other.tensor is self.tensor

    def __hash__(self) -> int:
        return id(self.tensor)


Key = str | Derived
"""What a tracked tensor is called: a parameter by its name, a derived tensor by itself."""


def origin(tensor: Tensor) -> Origin | None:
    """How a tensor was derived from parameters; None if it was not."""
    known: Origin | None = getattr(tensor, _ORIGIN, None)
    if known is not None and known.version != tensor._version:
        known = Origin(known.sources, tensor._version)
        setattr(tensor, _ORIGIN, known)
    return known


def is_derived(tensor: Tensor) -> bool:
    """Whether a tensor is a function of parameters and constants alone."""
    return origin(tensor) is not None


def sources(key: Key | None) -> Iterable[str]:
    """Names of the parameters behind a tracked tensor."""
    if key is None:
        return ()
    return (key,) if isinstance(key, str) else key.origin.sources


def mark(
    function: Callable[..., Any],
    args: tuple[Any, ...],
    kwargs: Any,
    result: Any,
    keys: dict[int, Key],
    *,
    written: bool = False,
) -> None:
    """Remember of the results of ``function`` that they are derived.

    Args:
      keys: id -> key of the tracked tensors among the arguments.
      written: ``result`` is an argument that the function wrote to.
    """
    behind = frozenset(name for key in keys.values() for name in sources(key))
    for tensor in result if isinstance(result, (tuple, list)) else (result,):
        if not isinstance(tensor, Tensor) or not tensor.requires_grad or isinstance(keys.get(id(tensor)), str):
            continue
        if written:
            setattr(tensor, _ORIGIN, Origin(behind, tensor._version))  # no view, cast or lookup any more
        elif id(tensor) not in keys:
            setattr(tensor, _ORIGIN, _origin(function, args, kwargs, tensor, keys, behind))


def _origin(
    function: Callable[..., Any], args: Any, kwargs: Any, result: Tensor, keys: dict[int, Key], behind: frozenset[str]
) -> Origin:
    if len(keys) != 1:
        return Origin(behind, result._version)
    (key,) = keys.values()
    if function is F.embedding:
        bound = dict(zip(("input", "weight", "padding_idx"), args, strict=False)) | kwargs
        weight, padding_idx = bound["weight"], bound.get("padding_idx")
        if padding_idx is not None and padding_idx < 0:
            padding_idx += weight.shape[0]
        return Origin(behind, result._version, weight, key, bound["input"], padding_idx)
    if not args or id(args[0]) not in keys:
        return Origin(behind, result._version)
    base = args[0]
    if (function in CASTS and result.shape == base.shape) or _is_plain_view(result, base):
        return Origin(behind, result._version, base, key)
    return Origin(behind, result._version)


def _is_plain_view(view: Tensor, base: Tensor) -> bool:
    """Whether each entry of ``view`` is one entry of the contiguous ``base``, and no two are the same."""
    if view.dtype != base.dtype or not base.is_contiguous() or not view.numel():
        return False
    if view.untyped_storage().data_ptr() != base.untyped_storage().data_ptr():
        return False
    reach = 0
    for stride, length in sorted((s, n) for s, n in zip(view.stride(), view.shape, strict=True) if n > 1):
        if stride <= reach:
            return False
        reach += stride * (length - 1)
    return True


def pull(key: Key, factor: Factor) -> tuple[Key, Factor]:
    """The factor against the tensor behind, as far back as views, casts and lookups reach."""
    while not isinstance(key, str) and key.origin.base is not None and key.origin.base_key is not None:
        pulled = _pulled(key.tensor, key.origin, key.origin.base, factor)
        if pulled is None:
            break
        key, factor = key.origin.base_key, pulled
    return key, factor


def _pulled(view: Tensor, origin: Origin, base: Tensor, factor: Factor) -> Factor | None:
    if origin.ids is not None:
        return (
            looked_up(origin, origin.ids.expand(factor.size, *origin.ids.shape), factor.gradients, base)
            if (isinstance(factor, Dense))
            else None
        )
    if view.shape == base.shape and view.is_contiguous():
        return factor
    if not _is_plain_view(view, base):
        return None
    first = view.storage_offset() - base.storage_offset()
    if isinstance(factor, Dense):
        size = factor.size
        out = factor.gradients.new_zeros(size, base.numel())
        places = torch.as_strided(out, (size, *view.shape), (base.numel(), *view.stride()), first)
        places.copy_(factor.gradients.reshape(size, *view.shape))
        return Dense(out)
    if isinstance(factor, Outer):
        width = factor.v.shape[2]
        if view.is_contiguous() and not first % width and not base.numel() % width:
            above, below = first // width, (base.numel() - first - view.numel()) // width
            return factor if not above and not below else Outer(F.pad(factor.u, (above, below)), factor.v)
        if view.dim() == 2 and view.mT.is_contiguous() and view.numel() == base.numel():
            return Outer(factor.v, factor.u)
    return None


def looked_up(origin: Origin, ids: Tensor, gradients: Tensor, table: Tensor) -> OneHot:
    """The factor of a lookup: ids (B, ...), gradients (B, ..., d), or anything of as many entries."""
    size, width = len(ids), table.shape[1]
    tokens = ids.reshape(size, -1).long()
    q = gradients.reshape(size, tokens.shape[1], width)
    if origin.padding_idx is not None:
        q = q.masked_fill((tokens == origin.padding_idx)[:, :, None], 0)
    return OneHot(tokens, q, table.shape[0])


@dataclass(frozen=True, slots=True)
class Pulled:
    """Factors against ``derived``, as gradients of one parameter behind it: the vector-Jacobian product, per unit."""

    derived: Tensor
    uses: tuple[Factor, ...]
    parameter: Tensor

    @property
    def size(self) -> int:
        return self.uses[0].size

    @property
    def dtype(self) -> torch.dtype:
        return self.parameter.dtype

    def write(self, rows: slice, out: Tensor) -> None:
        if not len(out):
            return
        dtype = out.dtype.to_complex() if self.derived.is_complex() else out.dtype
        against = torch.empty(len(out), self.derived.numel(), dtype=dtype, device=out.device)
        factors.written(self.uses, rows, against)
        cotangents = against.view(len(out), *self.derived.shape).to(self.derived.dtype)
        try:
            (found,) = self._product(cotangents, batched=True)
        except RuntimeError:  # a function that cannot be batched: one unit at a time
            parts = [self._product(one, batched=False)[0] for one in cotangents]
            found = None if parts[0] is None else torch.stack([part for part in parts if part is not None])
        if found is None:
            out.zero_()
        else:
            out.copy_(found.reshape(out.shape))

    def _product(self, cotangents: Tensor, *, batched: bool) -> tuple[Tensor | None, ...]:
        return torch.autograd.grad(
            self.derived, self.parameter, cotangents, retain_graph=True, allow_unused=True, is_grads_batched=batched
        )

    def select(self, keep: Tensor) -> Pulled:
        return Pulled(self.derived, tuple(use.select(keep) for use in self.uses), self.parameter)


@dataclass(frozen=True, slots=True)
class Placed:
    """Gradients of a tensor that has a row for each unit: zero but for the unit's own rows.

    Attributes:
      rows: (B, M, ...), the gradients of the M rows of each unit.
      places: (B, M), the numbers of those rows along ``axis`` of the tensor.
    """

    rows: Tensor
    places: Tensor
    axis: int
    shape: torch.Size

    @property
    def size(self) -> int:
        return len(self.rows)

    @property
    def dtype(self) -> torch.dtype:
        return self.rows.dtype

    def write(self, rows: slice, out: Tensor) -> None:
        whole = out.zero_().view(len(out), *self.shape).movedim(1 + self.axis, 1)
        places = self.places[rows]
        unit = torch.arange(len(out), device=out.device)[:, None].expand_as(places)
        # Added, not assigned: a place that stands for a missing row brings a zero.
        whole.index_put_((unit, places), self.rows[rows].to(out.dtype), accumulate=True)

    def select(self, keep: Tensor) -> Placed:
        return Placed(self.rows[keep], self.places[keep], self.axis, self.shape)
