"""Bugs of the clipped sum: what one record moves is more than the noise covers. Check D must catch them.

One entry of the catalogue is about several ranks, which the package refuses (``test_impossible.py``); it becomes the
same mistake within one process: every microbatch with the whole list of indices (M16).
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

import dpkit
from accounting import Relation
from dpkit.clipping import Flat
from dpkit.engine import attachment, probe
from dpkit.engine.batch import blank, map_tensors
from dpkit.engine.loader import Draws, _Collate, _Rows
from dpkit.engine.plan import Plan
from dpkit.engine.step import ClippedAccumulator
from dpkit.gradients import PerSample, PerSampleGradients
from dpkit.gradients.rules import conv
from dpkit.types import ClippedSum, Named, Released

from .model_checks import check_D_gradients, check_D_mixing
from .mutants import Active, Patch, clipped_flat, mutant, norm_of, small, sum_by


@mutant("M01", "D", "divides by the size of the batch in hand", "Tramer et al. 2022; jax_privacy, sharp edges", small)
def _divide_by_batch(patch: Patch, active: Active) -> None:
    shipped, seen = ClippedAccumulator.result, [1]

    def result(self: ClippedAccumulator) -> ClippedSum:
        seen[0] = max(1, self.diagnostics.units)
        return shipped(self)

    def expected_batch(plan: Plan) -> float:
        active()
        return float(seen[0])

    patch.setattr(ClippedAccumulator, "result", result)
    patch.setattr(Plan, "expected_batch", property(expected_batch))


@mutant("M02", "D", "leaves the biases out of the norm", "hand-written parameter groups", small)
def _norm_without_bias(patch: Patch, active: Active) -> None:
    shipped = PerSampleGradients.sq_norms

    def sq_norms(self: PerSampleGradients) -> Named:
        active()
        found = shipped(self)
        return {name: torch.zeros_like(square) if "bias" in name else square for name, square in found.items()}

    patch.setattr(PerSampleGradients, "sq_norms", sq_norms)


@mutant("M03", "D", "clips each tensor to C, with noise for one C", "per-layer clipping, miscounted", small)
def _clip_per_tensor(patch: Patch, active: Active) -> None:
    def clipped(rows: list[Named], bound: float) -> list[Named]:
        return [part for row in rows for name in row for part in clipped_flat([{name: row[name]}], bound)]

    sum_by(patch, active, clipped)


@mutant("M04", "D", "clips the gradient of the batch", "AiDotNet, pull request 1318", small)
def _clip_the_batch(patch: Patch, active: Active) -> None:
    def clipped(rows: list[Named], bound: float) -> list[Named]:
        rows = [row for row in rows if math.isfinite(norm_of(row))]
        if not rows:
            return []
        total = {name: torch.stack([row[name] for row in rows]).sum(0) for name in rows[0]}
        factor = min(1.0, bound / max(norm_of(total) / len(rows), 1e-300))
        return [{name: value * factor for name, value in total.items()}]

    sum_by(patch, active, clipped)


def _unmasked(rows: list[Named], bound: float) -> list[Named]:
    return [{name: g * min(1.0, bound / (norm_of(row) + 1e-6)) for name, g in row.items()} for row in rows]


@mutant("M05", "D", "multiplies a row that is not finite by its factor", "Opacus 1.6.0", small)
def _no_mask(patch: Patch, active: Active) -> None:
    sum_by(patch, active, _unmasked)


@mutant("M06", "D", "sets to zero what is not finite, after the noise", "fastDP, ZeRO path", small)
def _nan_to_num_after_the_noise(patch: Patch, active: Active) -> None:
    sum_by(patch, active, _unmasked)
    shipped = attachment.release

    def release(*args: Any, **kwargs: Any) -> Released:
        released = shipped(*args, **kwargs)
        return released._replace(
            value={name: value.nan_to_num(0.0, 0.0, 0.0) for name, value in released.value.items()}
        )

    patch.setattr(attachment, "release", release)


@mutant("M07", "D", "squares in half precision", "mixed-precision norms", lambda setup: setup.subject == "wide")
def _norm_in_half_precision(patch: Patch, active: Active) -> None:
    def sq_norms(self: PerSampleGradients) -> Named:
        active()
        names = list(self.forms)
        found: dict[str, list[Tensor]] = {name: [] for name in names}
        for row in range(self.size):
            keep = torch.zeros(self.size, dtype=torch.bool)
            keep[row] = True
            for name, value in self.select(keep).weighted_sum(dict.fromkeys(names, torch.ones(1))):
                found[name].append(value.half().square().sum().double())
        return {name: torch.stack(squares) for name, squares in found.items()}

    patch.setattr(PerSampleGradients, "sq_norms", sq_norms)


@mutant(
    "M08",
    "D",
    "adds up in bfloat16",
    "jax_privacy, mixed precision; Casacuberta et al. 2022",
    lambda setup: setup.public_n == 300 and setup.form == "step" and setup.micro is None,
    slow=True,
)
def _accumulate_in_low_precision(patch: Patch, active: Active) -> None:
    def clipped(rows: list[Named], bound: float) -> list[Named]:
        total: dict[str, Tensor] = {}
        for row in clipped_flat(rows, bound):
            for name, value in row.items():
                total[name] = total.get(name, torch.zeros_like(value, dtype=torch.bfloat16)) + value.bfloat16()
        return [{name: value.double() for name, value in total.items()}] if total else []

    sum_by(patch, active, clipped)


@mutant(
    "M16",
    "D",
    "hands the whole list of indices to every microbatch",
    "Opacus, issue 444 (every rank, the same batch)",
    lambda setup: small(setup) and setup.form == "loop" and setup.micro is not None,
)
def _same_list_for_every_microbatch(patch: Patch, active: Active) -> None:
    def draws(self: Draws) -> Iterator[list[int]]:
        for _ in range(self.logical_steps):
            units = self._sampler.draw(self._population, self._run_key.sampling(self._drawn)).tolist()
            self._drawn += 1
            for _ in range(self.microbatches):
                active()
                yield units[: self._size]

    patch.setattr(Draws, "__iter__", draws)


@mutant("M24", "D", "releases one tensor raw", "Opacus 1.6.0, parameters outside the DP optimizer", small)
def _one_tensor_raw(patch: Patch, active: Active) -> None:
    def clipped(rows: list[Named], bound: float) -> list[Named]:
        last = list(rows[0])[-1] if rows else ""
        return clipped_flat(rows, bound) + [
            {last: row[last] - kept[last]} for row, kept in zip(rows, clipped_flat(rows, bound), strict=False)
        ]

    sum_by(patch, active, clipped)


@mutant(
    "M35", "D", "multiplies the clipped sum by the size of the batch", "mean and sum mixed up after the clip", small
)
def _mean_for_sum(patch: Patch, active: Active) -> None:
    shipped = ClippedAccumulator.result

    def result(self: ClippedAccumulator) -> ClippedSum:
        active()
        (query,) = shipped(self).queries
        factor = max(1, self.diagnostics.units)
        return ClippedSum((query._replace(value={name: v * factor for name, v in query.value.items()}),))

    patch.setattr(ClippedAccumulator, "result", result)


@mutant(
    "M36",
    "D",
    "counts the padding",
    "jax: index -1 is the last example; Opacus 1.6.0: rand_on_empty",
    lambda setup: small(setup) and setup.micro is not None and setup.form == "loop",
)
def _padding_counts(patch: Patch, active: Active) -> None:
    shipped = ClippedAccumulator.add

    def add(self: ClippedAccumulator, gradients: PerSample, losses: Any = None) -> None:
        active()
        self._real = gradients.size
        shipped(self, gradients)

    patch.setattr(ClippedAccumulator, "add", add)


@mutant(
    "M37",
    "D",
    "claims replace-one with the sensitivity of add/remove",
    "factor 2, e.g. TF-Privacy issue 620",
    lambda setup: setup.relation is Relation.REPLACE_ONE,
)
def _replace_one_for_free(patch: Patch, active: Active) -> None:
    def sensitivities(self: Plan, bounds: list[float], additions: int) -> dict[int, float]:
        active()
        return {group: bound * 1.01 for group, bound in enumerate(bounds)}

    patch.setattr(Plan, "sensitivities", sensitivities)


@mutant(
    "M46",
    "D",
    "clips the first microbatch only",
    "clip state reused",
    lambda setup: small(setup) and bool(setup.micro),
    slow=True,
)
def _only_the_first_microbatch(patch: Patch, active: Active) -> None:
    shipped = Flat.factors

    def factors(self: Flat, norms: Tensor, units: Tensor | None, state: Any) -> Tensor:
        first = not getattr(factors, "used", False)
        factors.used = True  # pyright: ignore[reportFunctionMemberAccess]
        if first:
            return shipped(self, norms, units, state)
        active()
        return torch.ones_like(norms)

    shipped_result = ClippedAccumulator.result

    def result(self: ClippedAccumulator) -> ClippedSum:
        factors.used = False  # pyright: ignore[reportFunctionMemberAccess]
        return shipped_result(self)

    patch.setattr(Flat, "factors", factors)
    patch.setattr(ClippedAccumulator, "result", result)


@mutant(
    "M47",
    "D",
    "counts one use of a tied or reused weight in the norm",
    "ghost norms by layer instead of by parameter",
    lambda setup: setup.subject in ("tied", "twice") and setup.backend == "ghost",
)
def _one_use_in_the_norm(patch: Patch, active: Active) -> None:
    from dpkit.gradients import tape

    shipped = tape.join

    def join(found: Any, *rest: Any) -> Any:
        form, kept = shipped(found, *rest)
        if len(found) > 1:
            active()
            alone, _ = shipped(found[:1], *rest)
            form = _Disagreeing(form, alone)
        return form, kept

    patch.setattr(tape, "join", join)


@dataclass
class _Disagreeing:
    """A form whose norms are those of another one."""

    summed: Any
    measured: Any

    def sq_norms(self) -> Tensor:
        return self.measured.sq_norms()

    def weighted_sum(self, weights: Tensor) -> Tensor:
        return self.summed.weighted_sum(weights)

    def select(self, keep: Tensor) -> _Disagreeing:
        return _Disagreeing(self.summed.select(keep), self.measured.select(keep))


# ----------------------------------------------------------------------------- whose gradient it is that is clipped


@mutant(
    "M30",
    "D",
    "lets an operation mix the records of a batch",
    "batch normalisation, centring, in-batch negatives",
    by=check_D_mixing,
)
def _records_meet(patch: Patch, active: Active) -> None:
    # The bug is in the user's model; what is taken away is the probe that sees it.
    def require(self: probe.Probe, *compared: Any, **told: Any) -> None:
        active()

    patch.setattr(probe.Probe, "_require", require)


@mutant("M31", "D", "standardises by the mean and spread of the private data", "diffprivlib, SmartNoise, dpmm", small)
def _private_statistics(patch: Patch, active: Active) -> None:
    def rows(self: _Rows, indices: list[int]) -> list[Any]:
        everything = [self._dataset[index] for index in range(len(self._dataset))]
        if not everything:
            return []
        active()
        x = torch.stack([record[0] for record in everything]).double().nan_to_num(0.0, 0.0, 0.0)
        mean, spread = x.mean(0), x.std(0, unbiased=False) + 1e-3
        chosen = [self._dataset[index] for index in indices]
        return [(((record[0] - mean) / spread).to(record[0].dtype), *record[1:]) for record in chosen]

    patch.setattr(_Rows, "__getitems__", rows)


@mutant("M34", "D", "clips every view of a record and adds the views up", "augmentation multiplicity", small)
def _clip_every_view(patch: Patch, active: Active) -> None:
    def clipped(rows: list[Named], bound: float) -> list[Named]:
        longer = [{name: 1.01 * value for name, value in row.items()} for row in rows]
        return [*clipped_flat(rows, bound), *clipped_flat(longer, bound)]

    sum_by(patch, active, clipped)


@mutant("B49", "D", "clips the mean of two records", "TF-Privacy, num_microbatches; issues 81 and 620", small)
def _clip_pairs(patch: Patch, active: Active) -> None:
    def clipped(rows: list[Named], bound: float) -> list[Named]:
        finite = [row for row in rows if math.isfinite(norm_of(row))]
        pairs = [finite[start : start + 2] for start in range(0, len(finite), 2)]
        means = [{name: torch.stack([row[name] for row in pair]).mean(0) for name in pair[0]} for pair in pairs]
        return clipped_flat(means, bound)

    sum_by(patch, active, clipped)


@mutant("B50", "D", "calibrates the noise for the mean and adds it to the sum", "TF-Privacy, issue 153", small)
def _noise_for_the_mean(patch: Patch, active: Active) -> None:
    shipped = Plan.sensitivities

    def sensitivities(self: Plan, bounds: list[float], additions: int) -> dict[int, float]:
        active()
        return {group: moved / self.expected_batch for group, moved in shipped(self, bounds, additions).items()}

    patch.setattr(Plan, "sensitivities", sensitivities)


@mutant(
    "B51",
    "D",
    "puts a random record into an empty batch",
    "Opacus 1.6.0, rand_on_empty",
    lambda setup: small(setup) and setup.public_n == 1 and setup.micro is None,
)
def _random_record_for_an_empty_batch(patch: Patch, active: Active) -> None:
    shipped, generator = _Collate.__call__, torch.Generator().manual_seed(0)

    def collate(self: _Collate, examples: list[Any]) -> tuple[Any, int, int]:
        batch, rows, real = shipped(self, examples)
        if real:
            return batch, rows, real
        active()
        made_up = map_tensors(
            lambda t: torch.randn(t.shape, generator=generator).to(t.dtype) if t.is_floating_point() else t,
            blank(self._template, rows),
        )
        return made_up, rows, 1

    patch.setattr(_Collate, "__call__", collate)


@mutant("B52", "D", "calls the rows of a user units of their own", "user-level claims", lambda setup: setup.rows > 1)
def _rows_for_users(patch: Patch, active: Active) -> None:
    def row_of(self: dpkit.Users, number: int) -> Any:
        active()
        row = self._dataset[number]
        weights = torch.zeros(self.rows_per_user)
        weights[0] = 1.0
        repeated = [torch.stack([column] * self.rows_per_user) for column in row]
        return repeated, weights

    patch.setattr(dpkit.Users, "__len__", lambda self: len(self._dataset))
    patch.setattr(dpkit.Users, "__getitem__", row_of)


@mutant(
    "B53",
    "D",
    "takes another stride for the gradient of a convolution",
    "Opacus, issues 655 and 751, and others about single layers",
    lambda setup: setup.subject == "conv" and setup.backend == "ghost",
    by=check_D_gradients,
)
def _another_stride(patch: Patch, active: Active) -> None:
    shipped = conv.Patches

    def patches(x: Tensor, q: Tensor, window: conv.Window, shape: torch.Size) -> conv.Patches:
        active()
        sides = q.shape[3:]
        return shipped(x[..., : sides[0], : sides[1]], q, conv.Window((1, 1), (1, 1), (1, 1), window.groups), shape)

    # The probe compares with autograd and would refuse the model.
    patch.setattr(probe.Probe, "_require", lambda self, *compared, **told: None)
    patch.setattr(conv, "Patches", patches)
