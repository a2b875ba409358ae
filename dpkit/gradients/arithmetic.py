r"""Sums of squares that are upper bounds, and weighted sums whose rounding error is stated.

**Squares.**  A sum of n squares in a precision of unit roundoff u is wrong by a factor of at most 1 + (n + 2) u.
Squares are added in float32 over at most 64 entries and in float64 above, and the result is inflated by that factor.

**Sums.**  :func:`product` adds in float32 in chains of at most ``ROUNDING_CHAIN`` terms; up to four such partial sums
are added in float32, the rest in float64.  With vectors G_b and weights w_b >= 0 its result is off by at most
(ROUNDING_CHAIN + 4) 2^-24 sum_b w_b |G_b|, for any number of vectors, outside the range of underflow.

Reference: Higham, Accuracy and Stability of Numerical Algorithms (2002), sections 3.1 and 4.2.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

ROUNDING_CHAIN = 64
"""Terms that a weighted sum adds in float32 before it changes to a wider sum."""

_PARTIAL_SUMS = 4
_SQUARES_CHAIN = 64
# Larger blocks of main memory go back to the system when they are freed, and a page fault for each 4 KiB brings them
# back: more than the arithmetic costs.  These also fit into the last-level cache, where their norms are taken.
_BLOCK_BYTES = {"cpu": 8 << 20}
_BLOCK_BYTES_ELSEWHERE = 1 << 30


def accumulation_dtype(dtype: torch.dtype) -> torch.dtype:
    """Where norms and sums of a parameter of this type live: never below float32."""
    return dtype if dtype == torch.float64 or dtype.is_complex else torch.float32


def sq_norms(rows: Tensor) -> Tensor:
    """(..., n) -> (...) float64, at least the true sums of squares; a row that is not finite stays alone with it."""
    n = rows.shape[-1]
    if rows.dtype == torch.float64:
        return torch.linalg.vector_norm(rows, dim=-1).square_().mul_(1 + (n + 8) * 2.0**-52)
    if rows.dtype != torch.float32:
        rows = rows.float()
    rest = n % _SQUARES_CHAIN
    squares = None
    if rest or not n:
        squares = torch.linalg.vector_norm(rows[..., n - rest :], dim=-1).double().square_()
    if n > rest:
        chunks = (rows[..., : n - rest] if rest else rows).unflatten(-1, (-1, _SQUARES_CHAIN))
        chunks = torch.linalg.vector_norm(chunks, dim=-1)
        wide = torch.linalg.vector_norm(chunks, dim=-1, dtype=torch.float64).square_()
        squares = wide if squares is None else squares.add_(wide)
    assert squares is not None
    # 64 squares, 63 sums, the root and its square; then what underflow may have swallowed.
    return squares.mul_(1 + (_SQUARES_CHAIN + 4) * 2.0**-24).add_(n * 2.0**-126)


def product(left: Tensor, right: Tensor, out: Tensor) -> None:
    """``out`` = left^T right, summed over the rows as the module says; one more axis in front is a batch."""
    multiply = torch.mm if left.dim() == 2 else torch.bmm
    size = left.shape[-2]
    if size <= ROUNDING_CHAIN or left.dtype == torch.float64:
        multiply(left.mT, right, out=out)
        return
    spare, wide = torch.empty_like(out), None
    for index, first in enumerate(range(0, size, ROUNDING_CHAIN)):
        rows = slice(first, first + ROUNDING_CHAIN)
        if index % _PARTIAL_SUMS:
            multiply(left[..., rows, :].mT, right[..., rows, :], out=spare)
            out.add_(spare)
            continue
        if index:
            wide = out.double() if wide is None else wide.add_(out)
        multiply(left[..., rows, :].mT, right[..., rows, :], out=out)
    if wide is not None:
        out.copy_(wide.add_(out))


def blocks(size: int, bytes_per_unit: int, device: torch.device) -> Iterator[slice]:
    """Slices of units that stay below the block size; one empty slice of an empty batch."""
    limit = _BLOCK_BYTES.get(device.type, _BLOCK_BYTES_ELSEWHERE)
    units = max(1, min(ROUNDING_CHAIN, limit // max(1, bytes_per_unit)))
    for first in range(0, max(1, size), units):
        yield slice(first, min(size, first + units))


@contextmanager
def full_precision(device: torch.device) -> Iterator[None]:
    """Products of float32 numbers in float32: TF32 and bfloat16 shortcuts round by 2^-11 and 2^-8."""
    library = torch.backends.cuda if device.type == "cuda" else torch.backends.mkldnn
    convolutions = torch.backends.cudnn if device.type == "cuda" else torch.backends.mkldnn
    switches = (library.matmul, convolutions.conv)  # pyright: ignore[reportAttributeAccessIssue]
    before = [switch.fp32_precision for switch in switches]
    if before != ["ieee", "ieee"]:
        for switch in switches:
            switch.fp32_precision = "ieee"
    try:
        yield
    finally:
        if before != ["ieee", "ieee"]:
            for switch, precision in zip(switches, before, strict=True):
                switch.fp32_precision = precision


# ------------------------------------------------------------------------------------------ the faster of two libraries

_LARGE_PRODUCT = 1 << 20
"""Multiplications from which on a call of oneDNN costs less than it saves."""


def linear_product(x: Tensor, weight: Tensor, bias: Tensor | None = None, *, plus: Tensor | None = None) -> Tensor:
    """``x @ weight^T + bias``, or ``x @ weight^T + plus`` with ``plus`` of the result's shape; records no gradient.

    On a CPU, large products in float32 go to oneDNN, which is twice as fast as the library behind ``torch.matmul`` on
    processors that the latter does not know, and as fast on others.
    """
    if (
        x.dtype == torch.float32 == weight.dtype
        and x.device.type == "cpu"
        and x.numel() * weight.shape[0] >= _LARGE_PRODUCT
        and _ONEDNN is not None
    ):
        if plus is not None:
            return _ONEDNN.binary(x, plus, weight, bias, "add")
        return _ONEDNN(x, weight, bias, "none", [], "")
    y = F.linear(x, weight, bias)
    return y if plus is None else y.add_(plus)


_ONEDNN: Any = getattr(torch.ops.mkldnn, "_linear_pointwise", None) if torch.backends.mkldnn.is_available() else None


# ------------------------------------------------------------------------------------ float64 without float64 copies

# Numbers that are widened at a time, so that the wide ones never leave the second-level cache.
_PANEL_ENTRIES = {"cpu": 64 << 10}
_PANEL_ENTRIES_ELSEWHERE = 16 << 20


def wide_gram(x: Tensor, probes: Tensor | None) -> tuple[Tensor, Tensor | None]:
    """x x^T (b, T, T) and x ``probes`` (b, T, k) in float64, for x: (b, T, n)."""
    (size, steps, length), wide = x.shape, torch.float64
    gram = torch.zeros(size, steps, steps, dtype=wide, device=x.device)
    sketch = None if probes is None else torch.zeros(size, steps, probes.shape[1], dtype=wide, device=x.device)
    for columns, panel in _panels(x, size * steps, length):
        gram.baddbmm_(panel, panel.mT)
        if sketch is not None and probes is not None:
            sketch.add_(panel @ probes[columns])
    return gram, sketch


def wide_product(left: Tensor, right: Tensor) -> Tensor:
    """left^T right (k, n) in float64, for a float64 left: (N, k) and any right: (N, n)."""
    out = left.new_zeros(left.shape[1], right.shape[1])
    for rows, panel in _panels(right.mT, right.shape[1], len(right)):
        out.addmm_(left[rows].mT, panel.mT)
    return out


def _panels(x: Tensor, height: int, width: int) -> Iterator[tuple[slice, Tensor]]:
    """Slices of the last axis, with what they hold in float64; each panel is gone when the next one comes."""
    if x.dtype == torch.float64:
        yield slice(0, width), x
        return
    entries = _PANEL_ENTRIES.get(x.device.type, _PANEL_ENTRIES_ELSEWHERE)
    columns = max(1, min(width, max(64, entries // max(1, height))))
    for first in range(0, width, columns):
        chosen = slice(first, min(width, first + columns))
        yield chosen, x[..., chosen].double()
