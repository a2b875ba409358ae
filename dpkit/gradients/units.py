"""Several rows of one unit: their gradients are one gradient, before anything is measured or clipped.

Rows of a batch may be augmentations of one example, or the examples of one user.  :func:`fold` joins the factors of the
rows of each unit, G_u = sum of G_r over the rows r of u, without writing any gradient out: vectors are laid behind one
another along T.  Units may have different numbers of rows; the missing ones add nothing.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from dpkit import errors
from dpkit.gradients.arithmetic import accumulation_dtype
from dpkit.gradients.derived import Placed
from dpkit.gradients.factors import Dense, Factor, OneHot, Outer


def places_of(units: Tensor, size: int) -> Tensor:
    """(size, M): the rows of each unit, and -1 where a unit has fewer than M.

    Args:
      units: (R,) the unit, 0 to ``size`` - 1, of each row.
    Raises:
      InvalidArgument: a unit outside of the batch, or numbers that are not whole.
    """
    if units.dim() != 1 or units.is_floating_point() or units.is_complex() or units.dtype == torch.bool:
        raise errors.InvalidArgument(
            f"units is {units.dtype} of shape {tuple(units.shape)}; it is one whole number for each loss: the place, "
            "in the batch that the loader handed out, of the example that the row was made from"
        )
    if len(units) and (int(units.min()) < 0 or int(units.max()) >= size):
        raise errors.InvalidArgument(
            f"units holds {int(units.min())} to {int(units.max())}; a batch of {size} examples has the units 0 to "
            f"{size - 1}"
        )
    counts = torch.bincount(units, minlength=size)
    order = torch.argsort(units, stable=True)
    starts = counts.cumsum(0) - counts
    places = torch.full((size, max(1, int(counts.max()) if size else 1)), -1, dtype=torch.long, device=units.device)
    sorted_units = units[order]
    places[sorted_units, torch.arange(len(units), device=units.device) - starts[sorted_units]] = order
    return places


def fold(factor: Factor, places: Tensor) -> Factor:
    """The factor of units, from the factor of their rows."""
    if isinstance(factor, Dense):
        rows = _taken(factor.gradients, places)
        return Dense(rows[:, 0] if rows.shape[1] == 1 else rows.sum(1, dtype=accumulation_dtype(rows.dtype)))
    if isinstance(factor, Outer):
        return Outer(_taken(factor.u, places).flatten(1, 2), _taken(factor.v, places).flatten(1, 2))
    if isinstance(factor, OneHot):
        ids = factor.ids[places.clamp_min(0)].flatten(1, 2)
        return OneHot(ids, _taken(factor.v, places).flatten(1, 2), factor.entries)
    if isinstance(factor, Placed):
        rows = _taken(factor.rows, places).flatten(1, 2)
        return Placed(rows, factor.places[places.clamp_min(0)].flatten(1, 2), factor.axis, factor.shape)
    return Folded(factor, places)


@dataclass(frozen=True, slots=True)
class Folded:
    """Any other factor: written out for each row, and added up."""

    factor: Factor
    places: Tensor

    @property
    def size(self) -> int:
        return len(self.places)

    @property
    def dtype(self) -> torch.dtype:
        return self.factor.dtype

    def write(self, rows: slice, out: Tensor) -> None:
        out.zero_()
        for column in self.places[rows].unbind(1):
            present = (column >= 0).nonzero().flatten()
            part = self.factor.select(column[present])
            written = out.new_empty(len(present), out.shape[1])
            part.write(slice(0, len(present)), written)
            out.index_add_(0, present, written)

    def select(self, keep: Tensor) -> Folded:
        return Folded(self.factor, self.places[keep])


def _taken(rows: Tensor, places: Tensor) -> Tensor:
    """(R, ...) -> (B, M, ...), zero where there is no row."""
    taken = rows[places.clamp_min(0)]
    if bool((places < 0).any()):
        taken = taken.masked_fill((places < 0).view(*places.shape, *(1,) * (rows.dim() - 1)), 0)
    return taken
