r"""The joined per-sample gradients of one parameter: norms that are upper bounds, and sums of stated rounding error.

All factors of one parameter are joined into one *form* before any norm is taken, so that a weight that is tied or used
twice has the norm of its total gradient:

    RankOne         one Outer with T = 1: |G|^2 = |u|^2 |v|^2, and the weighted sum is one matrix product
    Coalesced       embeddings alone: one row for each (unit, token), rows of equal tokens added up
    Kept            G_b written out for every unit
    Gram            |G|^2 = sum_tt' (l_t.l_t')(r_t.r_t'), and the weighted sum of the factors: nothing is written out
    Recomputed      G_b written out twice, some units at a time: for the norm, then for the sum

``strategy.py`` decides between the last three.

**Norms are upper bounds.**  Squares are added as ``arithmetic.py`` says.  Gram norms cancel: their error is relative to
S^2 with S = sum_t |l_t| |r_t|, not to |G|^2, so they are computed in float64 and raised by c 2^-53 S^2.  What is stored
is what is summed: the norm is that of the very tensors in the form, whatever rounding produced them.

**Rounding of weighted sums.**  With n_b the root of the reported squared norm,

    | weighted_sum(w) - sum_b w_b G_b |_2  <=  (ROUNDING_CHAIN + 8) 2^-24 sum_b w_b n_b

for weights w >= 0 and any number of units, outside the range of underflow: ROUNDING_CHAIN + 3 for the additions
(``arithmetic.py``), five for the weights, the scaled factor and the final rounding.  The sum of a Gram form is computed
in float32 with no such guarantee and then *tested* (``probes.py``); what fails is computed again in float64.  A wrong
sum passes with probability below 2^-50.  Float64 parameters stay in float64.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

from dpkit.gradients import probes, strategy
from dpkit.gradients.arithmetic import (
    ROUNDING_CHAIN,
    accumulation_dtype,
    blocks,
    full_precision,
    linear_product,
    product,
    sq_norms,
    wide_product,
)
from dpkit.gradients.factors import Dense, Factor, OneHot, Outer, Products, flat, joined, written
from dpkit.gradients.strategy import Workspace
from dpkit.types import Named

# Rows of a product that stay in the second-level cache while its partial sums are added.
_PANEL_ENTRIES = 128 << 10
# Numbers in written-out gradients below which the call costs more than the arithmetic.
_SMALL = 32 << 10
# Entries of a sum from which on one product and its test cost less than products in short chains.
_TESTED = 256 << 10


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


@dataclass(frozen=True, slots=True)
class RankOne:
    """G_b = u_b v_b^T with u: (B, p) and v: (B, d)."""

    u: Tensor
    v: Tensor

    def sq_norms(self) -> Tensor:
        return sq_norms(self.u).mul_(sq_norms(self.v))

    def weighted_sum(self, weights: Tensor) -> Tensor:
        dtype = accumulation_dtype(self.u.dtype)
        u, v, weights = self.u.to(dtype), self.v.to(dtype), weights.to(dtype)[:, None]
        if u.shape[1] < v.shape[1]:
            u = u * weights
        else:
            v = v * weights
        (size, p), d = u.shape, v.shape[1]
        if size > ROUNDING_CHAIN and p * d >= _TESTED and dtype == torch.float32:
            with full_precision(u.device):
                total = linear_product(u.mT, v.mT)
                if self._passes(total, weights[:, 0].double()):
                    return total
        whole = u.device.type != "cpu" or size <= ROUNDING_CHAIN
        panel = p if whole else max(1, _PANEL_ENTRIES // max(1, d))
        out = u.new_empty(p, d)
        with full_precision(u.device):
            for top in range(0, p, max(1, panel)):
                product(u[:, top : top + panel], v, out[top : top + panel])
        return out

    def _passes(self, total: Tensor, weights: Tensor) -> bool:
        """Whether a sum whose chains are longer than promised is as close all the same; see ``probes.py``."""
        (size, p), d = self.u.shape, self.v.shape[1]
        drawn = probes.draw(d, probes.count(1), total.device)
        contracted = wide_product(drawn, self.v.mT).mT * weights[:, None]
        difference = wide_product(drawn, total.mT) - wide_product(contracted, self.u)
        norms = weights @ self.sq_norms().sqrt()
        blur = (size + 4 * (p + d) + 16) * 2.0**-53 * torch.linalg.vector_norm(drawn) * norms
        return probes.close(difference, drawn, blur, norms)

    def select(self, keep: Tensor) -> RankOne:
        return RankOne(self.u[keep], self.v[keep])


@dataclass(frozen=True, slots=True)
class Kept:
    """G_b written out: (B, entries of the parameter), in float32 or better; with its norms, if they are known."""

    gradients: Tensor
    squares: Tensor | None = None

    def sq_norms(self) -> Tensor:
        return sq_norms(self.gradients) if self.squares is None else self.squares

    def weighted_sum(self, weights: Tensor) -> Tensor:
        out = self.gradients.new_empty(1, self.gradients.shape[1])
        with full_precision(out.device):
            product(weights.to(out.dtype)[:, None], self.gradients, out)
        return out

    def select(self, keep: Tensor) -> Kept:
        return Kept(self.gradients[keep], None if self.squares is None else self.squares[keep])


@dataclass(frozen=True, slots=True)
class Coalesced:
    """A table of embeddings: the rows (K, d), each the gradient of one token in one unit."""

    rows: Tensor
    units: Tensor
    tokens: Tensor
    size: int
    entries: int

    @staticmethod
    def of(factor: OneHot, dtype: torch.dtype) -> Coalesced:
        ids, v, entries = factor.ids, factor.v.to(dtype), factor.entries
        keys = ids + entries * torch.arange(len(ids), device=ids.device)[:, None]
        found, row_of = torch.unique(keys, return_inverse=True)
        rows = v.new_zeros(len(found), v.shape[2]).index_add_(0, row_of.flatten(), v.flatten(0, 1))
        return Coalesced(rows, found // entries, found % entries, len(ids), entries)

    def sq_norms(self) -> Tensor:
        squares = sq_norms(self.rows)
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
    """Products that are never written out.

    Attributes:
      products: the factors.
      squares: (B,) squared norms.
      magnitudes: (B,) float64, at least S_b = sum_t |l_bt| |r_bt|.
      probes: contract one side of a sum; None where the sum is computed in float64 anyway.
      sketches: (B, ...) what the probes make of that side of the factors.
    """

    products: Products
    squares: Tensor
    magnitudes: Tensor
    probes: Tensor | None
    sketches: Tensor | None
    dtype: torch.dtype

    @staticmethod
    def of(factor: Products, device: torch.device, dtype: torch.dtype | None = None) -> Gram:
        """Measure the factors, in float64 blocks that stay in the cache; ``dtype`` is that of the sum."""
        dtype = accumulation_dtype(factor.dtype) if dtype is None else dtype
        size, steps = factor.size, factor.steps
        drawn = None
        if factor.dtype != torch.float64:
            drawn = probes.draw(factor.contracted, probes.count(steps), device)
        squares, magnitudes, sketches = [], [], []
        # A block is widened and multiplied by itself.
        for rows in blocks(size, 24 * steps * steps + 1, device):
            units = rows.stop - rows.start
            left, right, sketch = factor.grams(rows, drawn)
            lengths = left.diagonal(dim1=1, dim2=2) * right.diagonal(dim1=1, dim2=2)
            magnitudes.append(lengths.sqrt_().view(units, -1).sum(1))
            squares.append(torch.linalg.vecdot(left.flatten(1), right.flatten(1)).view(units, -1).sum(1))
            sketches.append(sketch)
        magnitude = torch.cat(magnitudes) * (1 + 2.0**-30)
        # c counts roundings, at most the lengths of all sums together; 2^19 more make S <= 2^17 n_b, so that the
        # float64 sum of up to 290,000 vectors keeps the promise of weighted_sum even where G_b cancels completely.
        raised = (steps**2 + 2 * factor.terms + 2**19) * 2.0**-53
        bounds = torch.cat(squares).clamp_min_(0).addcmul_(magnitude, magnitude, value=raised)
        return Gram(factor, bounds, magnitude, drawn, None if drawn is None else torch.cat(sketches), dtype)

    def sq_norms(self) -> Tensor:
        return self.squares

    def weighted_sum(self, weights: Tensor) -> Tensor:
        dtype, device = self.dtype, self.squares.device
        with full_precision(device):
            if self.probes is not None:
                total = self.products.weighted_sum(weights.to(dtype))
                if self._passes(total, weights.to(dtype).double()):
                    return total
            return self.products.weighted_sum(weights.double()).to(dtype)

    def _passes(self, total: Tensor, weights: Tensor) -> bool:
        """Whether ``total`` is as close to the true sum as promised; see ``probes.py``."""
        if self.probes is None or self.sketches is None:
            return True
        difference = self.products.sketch(total, self.probes) - self.products.sketched_sum(self.sketches, weights)
        # Float64 rounds both sketches: a sum of n products is off by n 2^-53 times the sum of their absolute values.
        additions = self.products.size * self.products.steps + 4 * self.products.terms + 16
        blur = additions * 2.0**-53 * torch.linalg.vector_norm(self.probes) * (weights @ self.magnitudes)
        return probes.close(difference, self.probes, blur, weights @ self.squares.sqrt())

    def select(self, keep: Tensor) -> Gram:
        sketches = None if self.sketches is None else self.sketches[keep]
        return Gram(
            self.products.select(keep), self.squares[keep], self.magnitudes[keep], self.probes, sketches, self.dtype
        )


@dataclass(frozen=True, slots=True)
class Recomputed:
    """Any factors, written out whenever they are needed, some units at a time.

    The sum measures again what it adds: where the second writing of a unit is longer than the first, its weight is
    lowered so that it adds no more than the norm that was reported.
    """

    factors: tuple[Factor, ...]
    squares: Tensor
    entries: int
    dtype: torch.dtype

    @staticmethod
    def of(
        factors: Sequence[Factor], entries: int, device: torch.device, dtype: torch.dtype | None = None
    ) -> Recomputed:
        dtype = accumulation_dtype(factors[0].dtype) if dtype is None else dtype
        squares = [sq_norms(block) for _, block in _written(factors, entries, device)]
        return Recomputed(tuple(factors), torch.cat(squares), entries, dtype)

    def sq_norms(self) -> Tensor:
        return self.squares

    def weighted_sum(self, weights: Tensor) -> Tensor:
        device, total = self.squares.device, None
        with full_precision(device):
            for rows, block in _written(self.factors, self.entries, device):
                first, second = self.squares[rows], sq_norms(block)
                # Not the other way round: where both are equal, the quotient of two zeros would be no number.
                lowered = torch.where(second > first, (first / second).sqrt(), 1.0)
                sums = block.new_empty(1, self.entries)
                product((weights[rows] * lowered).to(block.dtype)[:, None], block, sums)
                total = sums.double() if total is None else total.add_(sums)
        assert total is not None
        return total.to(self.dtype)

    def select(self, keep: Tensor) -> Recomputed:
        chosen = tuple(factor.select(keep) for factor in self.factors)
        return Recomputed(chosen, self.squares[keep], self.entries, self.dtype)


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


def join(
    factors: Sequence[Factor], parameter: Tensor, size: int, keep_bytes: float, workspace: Workspace
) -> tuple[Form, int]:
    """The form of one parameter's gradients, and how many of ``keep_bytes`` it took.

    Args:
      factors: of all uses of the parameter; none if it was not used.
      parameter: whose shape, type and device count, never its values.
      size: B, the number of units.
      keep_bytes: how many bytes of gradients may still be written out and kept; may be infinite.
      workspace: memory for them, and of what other parameters asked for in the last step.
    """
    entries, device = parameter.numel(), parameter.device
    dtype = accumulation_dtype(parameter.dtype)
    if not factors:
        return Zero(size, entries, dtype, device), 0
    found = joined(factors)
    if len(found) == 1:
        (factor,) = found
        if isinstance(factor, Dense):
            return kept(factor.gradients.to(dtype)), 0
        if isinstance(factor, Outer) and factor.steps == 1:
            return RankOne(factor.u[:, 0], factor.v[:, 0]), 0
        if isinstance(factor, OneHot):
            return Coalesced.of(factor, dtype), 0
    option = strategy.choose(strategy.options(found, parameter, size), parameter, keep_bytes, workspace)
    if option.products is not None:
        return Gram.of(option.products, device, dtype), 0
    if not option.kept_bytes:
        return Recomputed.of(found, entries, device, dtype), 0
    out = workspace.take(parameter, size)
    squares = torch.empty(size, dtype=torch.float64, device=device)
    for rows in blocks(size, entries * dtype.itemsize, device):
        # Measured while the block is still in the cache.
        squares[rows] = sq_norms(written(found, rows, out[rows]))
    return Kept(out, squares), option.kept_bytes


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
        found: Named = {}
        stacks, others = self._stacks()
        for names in stacks:
            found.update(zip(names, sq_norms(self._stack(names)).unbind(), strict=True))
        found.update({name: self.forms[name].sq_norms() for name in others})
        within = within_float32(torch.stack(list(found.values()))) if found else ()
        squares = dict(zip(found, within, strict=True))
        return {name: squares[name] for name in self.forms}

    def weighted_sum(self, weights: Named) -> Iterator[tuple[str, Tensor]]:
        """Yield (name, sum over b of ``weights[name][b]`` g_b); see the module's docstring for the rounding error."""
        stacks, others = self._stacks()
        for names in stacks:
            gradients = self._stack(names)
            scales = torch.stack([weights[name] for name in names]).to(gradients.dtype).unsqueeze(2)
            out = gradients.new_empty(len(names), 1, gradients.shape[2])
            with full_precision(out.device):
                product(scales, gradients, out)
            for name, total in zip(names, out.unbind(), strict=True):
                yield name, total.view(self.shapes[name])
        for name in others:
            yield name, self.forms[name].weighted_sum(weights[name]).view(self.shapes[name])

    def _stacks(self) -> tuple[list[list[str]], list[str]]:
        """Names of small gradients of one size, which are worth one call together, and the other names."""
        alike: dict[tuple[int, torch.dtype, torch.device], list[str]] = {}
        others = []
        for name, form in self.forms.items():
            if isinstance(form, Kept) and form.squares is None and form.gradients.numel() <= _SMALL:
                gradients = form.gradients
                alike.setdefault((gradients.shape[1], gradients.dtype, gradients.device), []).append(name)
            else:
                others.append(name)
        stacks = [names for names in alike.values() if len(names) > 1]
        return stacks, others + [names[0] for names in alike.values() if len(names) == 1]

    def _stack(self, names: list[str]) -> Tensor:
        return torch.stack([form.gradients for name in names if isinstance(form := self.forms[name], Kept)])

    def select(self, keep: Tensor) -> PerSampleGradients:
        """The units where the boolean (B,) ``keep`` is true."""
        if bool(keep.all()):
            return self
        forms = {name: form.select(keep) for name, form in self.forms.items()}
        return PerSampleGradients(int(keep.sum()), forms, self.shapes)


def kept(gradients: Tensor) -> Kept:
    """Gradients (B, ...) that exist already, as a form."""
    return Kept(flat(gradients))


def within_float32(squares: Tensor) -> Tensor:
    """A norm that float32 cannot hold is infinite: the weight that would tame it underflows."""
    return squares.masked_fill(squares > torch.finfo(torch.float32).max, math.inf)


def _written(factors: Sequence[Factor], entries: int, device: torch.device) -> Iterator[tuple[slice, Tensor]]:
    dtype = accumulation_dtype(factors[0].dtype)
    for rows in blocks(factors[0].size, entries * dtype.itemsize, device):
        out = torch.empty(rows.stop - rows.start, entries, dtype=dtype, device=device)
        yield rows, written(factors, rows, out)
