"""Bugs that were made by somebody once, put into the shipped modules: each must be caught by the check that owns it.

The identifiers and sources are those of the project's catalogue of privacy bugs.  A mutant patches the narrowest place
of the package in which the bug could live.  Two entries are about several ranks, which the package refuses; they become
the same mistake within one process: the mean of two full draws of noise (M15), and every microbatch with the whole list
of indices (M16).
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import pytest
import torch
from torch import Tensor

import accounting
from accounting import Ledger, Receipt, Relation
from dpkit.clipping import Flat
from dpkit.engine import attachment
from dpkit.engine.attachment import Attachment
from dpkit.engine.loader import Draws
from dpkit.engine.plan import Plan
from dpkit.engine.step import ClippedAccumulator
from dpkit.gradients import PerSample, PerSampleGradients
from dpkit.mechanisms import Gaussian, NoiseKey, RunKey
from dpkit.sampling import Poisson
from dpkit.types import ClippedSum, Named, Released

from .harness import Setup

Patch = pytest.MonkeyPatch


class Active:
    """Counts how often the bug came into play: a mutant that never ran proves nothing."""

    def __init__(self) -> None:
        self.times = 0

    def __call__(self) -> None:
        self.times += 1


@dataclass(frozen=True)
class Mutant:
    """One bug.

    Attributes:
      check: letter of the check that must catch it.
      where: setups of that check that suffice.
      of_members: whether the check is that of ``member_checks.py``.
    """

    id: str
    check: str
    bug: str
    source: str
    apply: Callable[[Patch, Active], None]
    where: Callable[[Setup], bool]
    of_members: bool = False


MUTANTS: list[Mutant] = []


def _everywhere(setup: Setup) -> bool:
    return True


def _small(setup: Setup) -> bool:
    return setup.subject == "mlp" and setup.public_n <= 9 and setup.relation is Relation.ADD_REMOVE


def mutant(
    number: str, check: str, bug: str, source: str, where: Callable[[Setup], bool] = _everywhere
) -> Callable[[Callable[[Patch, Active], None]], Callable[[Patch, Active], None]]:
    def register(apply: Callable[[Patch, Active], None]) -> Callable[[Patch, Active], None]:
        MUTANTS.append(Mutant(number, check, bug, source, apply, where))
        return apply

    return register


# --------------------------------------------------------------------------------------------- what the bugs share


def _rows(gradients: PerSample, real: int) -> list[Named]:
    """The gradient of each real row, written out in double precision."""
    found = []
    for row in range(min(real, gradients.size)):
        keep = torch.zeros(gradients.size, dtype=torch.bool)
        keep[row] = True
        names = gradients.sq_norms()
        one = gradients.select(keep).weighted_sum(dict.fromkeys(names, torch.ones(1)))
        found.append({name: value.double() for name, value in one})
    return found


def _norm(row: Named) -> float:
    return math.sqrt(sum(float(value.square().sum()) for value in row.values()))


def _bound(accumulator: ClippedAccumulator) -> float:
    return accumulator._plan.clip.bounds(())[0]


def _sum_by(patch: Patch, active: Active, clipped: Callable[[list[Named], float], list[Named]]) -> None:
    """Replace what a microbatch adds to the sum by the sum of ``clipped(rows, C)``."""

    def add(self: ClippedAccumulator, gradients: PerSample, losses: Any = None) -> None:
        self.diagnostics.units += self._real
        active()
        rows = [{k: v * self._scale for k, v in row.items()} for row in _rows(gradients, self._real)]
        for row in clipped(rows, _bound(self)):
            self._add((name, value.float()) for name, value in row.items())

    patch.setattr(ClippedAccumulator, "add", add)


def _flat(rows: list[Named], bound: float) -> list[Named]:
    """Clipped as it should be."""
    finite = [row for row in rows if math.isfinite(_norm(row))]
    return [{name: g * min(1.0, bound / max(_norm(row), 1e-300)) for name, g in row.items()} for row in finite]


def _release_by(patch: Patch, active: Active, changed: Callable[[Released, ClippedSum], Released]) -> None:
    """Change what leaves the shipped mechanism, which sees the sum as well."""
    shipped = Gaussian.release

    def release(self: Gaussian, clipped: ClippedSum, state: Any, key: NoiseKey) -> tuple[Released, Any]:
        released, state = shipped(self, clipped, state, key)
        active()
        return changed(released, clipped), state

    patch.setattr(Gaussian, "release", release)


def _noise_by(patch: Patch, active: Active, changed: Callable[[str, Tensor, float], Tensor]) -> None:
    """Change the noise: ``changed(name, noise, std)``."""

    def change(released: Released, clipped: ClippedSum) -> Released:
        (query,) = clipped.queries
        found = {}
        for name, value in released.value.items():
            noise = value.double() - query.value[name].double()
            std = next(iter(query.sensitivity.values()))
            found[name] = (query.value[name].double() + changed(name, noise, std)).to(value.dtype)
        return released._replace(value=found)

    _release_by(patch, active, change)


# ------------------------------------------------------------------------------------------------------ sensitivity


@mutant("M01", "D", "divides by the size of the batch in hand", "Tramer et al. 2022; jax_privacy, sharp edges", _small)
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


@mutant("M02", "D", "leaves the biases out of the norm", "hand-written parameter groups", _small)
def _norm_without_bias(patch: Patch, active: Active) -> None:
    shipped = PerSampleGradients.sq_norms

    def sq_norms(self: PerSampleGradients) -> Named:
        active()
        found = shipped(self)
        return {name: torch.zeros_like(square) if "bias" in name else square for name, square in found.items()}

    patch.setattr(PerSampleGradients, "sq_norms", sq_norms)


@mutant("M03", "D", "clips each tensor to C, with noise for one C", "per-layer clipping, miscounted", _small)
def _clip_per_tensor(patch: Patch, active: Active) -> None:
    def clipped(rows: list[Named], bound: float) -> list[Named]:
        return [part for row in rows for name in row for part in _flat([{name: row[name]}], bound)]

    _sum_by(patch, active, clipped)


@mutant("M04", "D", "clips the gradient of the batch", "AiDotNet, pull request 1318", _small)
def _clip_the_batch(patch: Patch, active: Active) -> None:
    def clipped(rows: list[Named], bound: float) -> list[Named]:
        rows = [row for row in rows if math.isfinite(_norm(row))]
        if not rows:
            return []
        total = {name: sum(row[name] for row in rows) for name in rows[0]}
        factor = min(1.0, bound / max(_norm(total) / len(rows), 1e-300))
        return [{name: value * factor for name, value in total.items()}]

    _sum_by(patch, active, clipped)


def _unmasked(rows: list[Named], bound: float) -> list[Named]:
    return [{name: g * min(1.0, bound / (_norm(row) + 1e-6)) for name, g in row.items()} for row in rows]


@mutant("M05", "D", "multiplies a row that is not finite by its factor", "Opacus 1.6.0", _small)
def _no_mask(patch: Patch, active: Active) -> None:
    _sum_by(patch, active, _unmasked)


@mutant("M06", "D", "sets to zero what is not finite, after the noise", "fastDP, ZeRO path", _small)
def _nan_to_num_after_the_noise(patch: Patch, active: Active) -> None:
    _sum_by(patch, active, _unmasked)
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
)
def _accumulate_in_low_precision(patch: Patch, active: Active) -> None:
    def clipped(rows: list[Named], bound: float) -> list[Named]:
        total: dict[str, Tensor] = {}
        for row in _flat(rows, bound):
            for name, value in row.items():
                total[name] = total.get(name, torch.zeros_like(value, dtype=torch.bfloat16)) + value.bfloat16()
        return [{name: value.double() for name, value in total.items()}] if total else []

    _sum_by(patch, active, clipped)


@mutant(
    "M16",
    "D",
    "hands the whole list of indices to every microbatch",
    "Opacus, issue 444 (every rank, the same batch)",
    lambda setup: _small(setup) and setup.form == "loop" and setup.micro is not None,
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


@mutant("M24", "D", "releases one tensor raw", "Opacus 1.6.0, parameters outside the DP optimizer", _small)
def _one_tensor_raw(patch: Patch, active: Active) -> None:
    def clipped(rows: list[Named], bound: float) -> list[Named]:
        last = list(rows[0])[-1] if rows else ""
        return _flat(rows, bound) + [
            {last: row[last] - kept[last]} for row, kept in zip(rows, _flat(rows, bound), strict=False)
        ]

    _sum_by(patch, active, clipped)


@mutant(
    "M35", "D", "multiplies the clipped sum by the size of the batch", "mean and sum mixed up after the clip", _small
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
    lambda setup: _small(setup) and setup.micro is not None and setup.form == "loop",
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
    lambda setup: _small(setup) and bool(setup.micro),
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


# ------------------------------------------------------------------------------------------------------------ noise


def _plain(setup: Setup) -> bool:
    return setup.form == "loop" and setup.micro is None


@mutant("M09", "N", "leaves C out of the noise, to its disadvantage", "std sigma instead of sigma C", _plain)
def _noise_of_the_wrong_unit(patch: Patch, active: Active) -> None:
    # sigma C squared for C = 0.7: without C at all the noise would be too large, which is no breach.
    _noise_by(patch, active, lambda name, noise, bound: noise * bound)


@mutant(
    "M10",
    "N",
    "divides the noise by the accumulation steps",
    "gradient accumulation",
    lambda setup: setup.micro is not None,
)
def _noise_over_microbatches(patch: Patch, active: Active) -> None:
    shipped, micro = ClippedAccumulator.__init__, [1]

    def initialise(self: ClippedAccumulator, *args: Any, **kwargs: Any) -> None:
        shipped(self, *args, **kwargs)
        micro[0] = self._microbatches

    patch.setattr(ClippedAccumulator, "__init__", initialise)
    _noise_by(patch, active, lambda name, noise, bound: noise / micro[0])


@mutant("M11", "N", "adds no noise to the biases", "tensors without a hook", _plain)
def _no_noise_on_biases(patch: Patch, active: Active) -> None:
    _noise_by(patch, active, lambda name, noise, bound: noise * (0.0 if "bias" in name else 1.0))


@mutant("M12", "N", "uses the key of the first step at every step", "generator re-seeded in the step", _plain)
def _one_key_for_all_steps(patch: Patch, active: Active) -> None:
    shipped = RunKey.noise_key

    def noise_key(self: RunKey, receipt: Receipt) -> NoiseKey:
        active()
        key = shipped(self, receipt)
        self.__dict__.setdefault("first_key", key)
        return self.__dict__["first_key"]

    patch.setattr(RunKey, "noise_key", noise_key)


@mutant("M13", "N", "starts the same stream for every tensor", "generator state restored per tensor", _plain)
def _one_stream_for_all_tensors(patch: Patch, active: Active) -> None:
    shipped = NoiseKey.generator

    def generator(self: NoiseKey, query: int, name: str, shard: int = 0, device: Any = "cpu") -> torch.Generator:
        active()
        return shipped(self, query, "any tensor", shard, device)

    patch.setattr(NoiseKey, "generator", generator)


@mutant("M14", "N", "takes seed 0 when no seed is given", "jax_privacy, secure_noise_example.py", _plain)
def _default_seed(patch: Patch, active: Active) -> None:
    shipped = RunKey.__init__

    def initialise(self: RunKey, seed: int | None = None) -> None:
        if seed is None:
            active()
        shipped(self, 0 if seed is None else seed)

    patch.setattr(RunKey, "__init__", initialise)


@mutant("M15", "N", "averages the noise of two ranks", "fastDP, torch_seed_is_fixed", _plain)
def _mean_of_two_draws(patch: Patch, active: Active) -> None:
    shipped = Gaussian.release

    def release(self: Gaussian, clipped: ClippedSum, state: Any, key: NoiseKey) -> tuple[Released, Any]:
        active()
        second = NoiseKey(hashlib.sha256(key._key + b"rank 1").digest())
        one, _ = shipped(self, clipped, state, key)
        other, _ = shipped(self, clipped, state, second)
        return one._replace(value={name: (one.value[name] + other.value[name]) / 2 for name in one.value}), state

    patch.setattr(Gaussian, "release", release)


@mutant("M32", "N", "adds noise only where the sum is not zero", "sparse embedding gradients", _plain)
def _sparse_noise(patch: Patch, active: Active) -> None:
    def changed(released: Released, clipped: ClippedSum) -> Released:
        (query,) = clipped.queries
        return released._replace(
            value={name: torch.where(query.value[name] != 0, v, 0.0) for name, v in released.value.items()}
        )

    _release_by(patch, active, changed)


@mutant("M33", "N", "uses each draw for two releases", "cached noise", _plain)
def _noise_used_twice(patch: Patch, active: Active) -> None:
    cached: dict[str, Tensor] = {}
    count = [0]

    def changed(released: Released, clipped: ClippedSum) -> Released:
        (query,) = clipped.queries
        fresh = count[0] % 2 == 0
        count[0] += 1
        if fresh:
            cached.update({name: v.double() - query.value[name] for name, v in released.value.items()})
        return released._replace(
            value={name: (query.value[name] + cached[name]).to(v.dtype) for name, v in released.value.items()}
        )

    _release_by(patch, active, changed)


@mutant("M40", "N", "draws noise and batches from one stream", "one generator for everything", _plain)
def _one_stream_for_sampling_and_noise(patch: Patch, active: Active) -> None:
    from dpkit.mechanisms import keys

    shipped, generator_shipped = RunKey.noise_key, NoiseKey.generator

    def noise_key(self: RunKey, receipt: Receipt) -> NoiseKey:
        key = shipped(self, receipt)
        object.__setattr__(key, "twin", keys._expand(self._secret, "sampling", receipt.step - 1))
        return key

    def generator(self: NoiseKey, query: int, name: str, shard: int = 0, device: Any = "cpu") -> torch.Generator:
        active()
        if name == "0.weight":
            return keys.generator_from(self.twin)  # pyright: ignore[reportAttributeAccessIssue]
        return generator_shipped(self, query, name, shard, device)

    patch.setattr(RunKey, "noise_key", noise_key)
    patch.setattr(NoiseKey, "generator", generator)


@mutant("M43", "N", "rounds the noise to a coarse grid", "bfloat16 noise", _plain)
def _coarse_noise(patch: Patch, active: Active) -> None:
    _noise_by(patch, active, lambda name, noise, bound: (noise / (1.3 * bound) * 0.7).round() / 0.7 * 1.3 * bound)


@mutant("M45", "N", "makes the noise 5 % too small", "a rounded constant", _plain)
def _five_percent_less(patch: Patch, active: Active) -> None:
    _noise_by(patch, active, lambda name, noise, bound: 0.95 * noise)


# ------------------------------------------------------------------------------------------------ what a loop can see


@mutant(
    "M17",
    "R",
    "leaves out empty batches",
    "Opacus, DistributedUniformWithReplacementSampler and issue 164",
    lambda setup: setup.micro is None,
)
def _skip_empty_batches(patch: Patch, active: Active) -> None:
    shipped = Draws.__iter__

    def draws(self: Draws) -> Iterator[list[int]]:
        for units in shipped(self):
            active()
            if units:
                yield units

    patch.setattr(Draws, "__iter__", draws)


@mutant("M25", "R", "scales the gradient by the raw one", "GradScaler, trust ratios")
def _step_size_from_raw_gradient(patch: Patch, active: Active) -> None:
    shipped = attachment.release

    def release(clipped: ClippedSum, *args: Any, **kwargs: Any) -> Released:
        active()
        raw = {name: value.abs() for name, value in clipped.queries[0].value.items()}
        released = shipped(clipped, *args, **kwargs)
        return released._replace(value={name: v / (1 + raw[name]) for name, v in released.value.items()})

    patch.setattr(attachment, "release", release)


@mutant("M27", "R", "stops at a gradient that is not finite", "stopping, or raising, on private data")
def _stop_on_private_data(patch: Patch, active: Active) -> None:
    shipped = Attachment.release

    def release(self: Attachment) -> None:
        if self._sum is not None and self._sum.diagnostics.dropped > 0:
            active()
            raise ValueError("a gradient is not finite")
        shipped(self)

    patch.setattr(Attachment, "release", release)


@mutant("M29", "R", "scales the noise by how many were clipped", "adaptive clipping without a charge")
def _bound_from_private_norms(patch: Patch, active: Active) -> None:
    shipped = ClippedAccumulator.result

    def result(self: ClippedAccumulator) -> ClippedSum:
        active()
        (query,) = shipped(self).queries
        factor = 1.0 / (1 + self.diagnostics.clipped)
        return ClippedSum((query._replace(sensitivity={g: s * factor for g, s in query.sensitivity.items()}),))

    patch.setattr(ClippedAccumulator, "result", result)


@mutant("B57", "R", "divides by the size of the data set", "Opacus, issues 571 and 819")
def _size_of_the_data_set(patch: Patch, active: Active) -> None:
    shipped, seen = Draws.__init__, [1]

    def initialise(self: Draws, sampler: Any, population: int, *rest: Any) -> None:
        seen[0] = max(1, population)
        shipped(self, sampler, population, *rest)

    def expected_batch(plan: Plan) -> float:
        active()
        return plan.sampler.sample_rate * seen[0]

    patch.setattr(Draws, "__init__", initialise)
    patch.setattr(Plan, "expected_batch", property(expected_batch))


# ------------------------------------------------------------------------------------------ sampling and accounting


@mutant(
    "M18", "A", "takes shuffled batches for Poisson ones", "Opacus, poisson_sampling=False; fastDP examples", _plain
)
def _shuffled_batches(patch: Patch, active: Active) -> None:
    left: list[int] = []

    def draw(self: Poisson, population: int, generator: torch.Generator, **_: Any) -> Tensor:
        active()
        size = int(self.sample_rate * population)
        if len(left) < size:
            left[:] = torch.randperm(population, generator=generator).tolist()
        taken, left[:] = left[:size], left[size:]
        return torch.tensor(taken)

    patch.setattr(Poisson, "draw", draw)


@mutant("M19", "A", "draws with 1 / (number of batches) and charges q", "1 / len(loader), drop_last", _plain)
def _rate_of_the_loader(patch: Patch, active: Active) -> None:
    shipped = Poisson.draw

    def draw(self: Poisson, population: int, generator: torch.Generator, **_: Any) -> Tensor:
        active()
        rate = 1.0 if self.sample_rate == 1 else 1.0 / math.floor(0.99 / self.sample_rate)
        return shipped(Poisson(rate), population, generator)

    patch.setattr(Poisson, "draw", draw)


@mutant("M38", "A", "draws with replacement", "DistributedUniformWithReplacementSampler", _plain)
def _with_replacement(patch: Patch, active: Active) -> None:
    def draw(self: Poisson, population: int, generator: torch.Generator, **_: Any) -> Tensor:
        active()
        return torch.randint(0, population, (int(self.sample_rate * population),), generator=generator)

    patch.setattr(Poisson, "draw", draw)


@mutant("M39", "A", "draws the same batches in every epoch", "sampler re-seeded each epoch", _plain)
def _same_batches_every_epoch(patch: Patch, active: Active) -> None:
    shipped = RunKey.sampling

    def sampling(self: RunKey, draw: int) -> torch.Generator:
        active()
        return shipped(self, draw % 10)

    patch.setattr(RunKey, "sampling", sampling)


@mutant("M20", "V", "charges every second step", "virtual steps, Opacus accountant hook")
def _charge_every_second_step(patch: Patch, active: Active) -> None:
    shipped, steps = Ledger.charge, {}

    def charge(self: Ledger, plan: accounting.PlanRecord, event: accounting.Event) -> Receipt:
        steps[plan.plan_id] = steps.get(plan.plan_id, 0) + 1
        if steps[plan.plan_id] % 2 == 0:
            shipped(self, plan, event)
        else:
            active()
        # The engine knows for which step it drew: a receipt that tells the true count would end the run.
        return Receipt(sequence=0, plan_id=plan.plan_id, step=steps[plan.plan_id], digest="")

    patch.setattr(Ledger, "charge", charge)
    patch.setattr(Attachment, "charged", property(lambda self: steps.get(self.record.plan_id, 0)))


@mutant("M23", "V", "charges after the release", "Opacus, accountant step hook", _plain)
def _charge_after_release(patch: Patch, active: Active) -> None:
    shipped, step = Ledger.charge, [0]
    owed: list[tuple[Ledger, Any, Any]] = []

    def charge(self: Ledger, plan: accounting.PlanRecord, event: accounting.Event) -> Receipt:
        active()
        step[0] += 1
        owed.append((self, plan, event))
        return Receipt(sequence=0, plan_id=plan.plan_id, step=step[0], digest="")

    release_shipped = attachment.release

    def release(*args: Any, **kwargs: Any) -> Released:
        released = release_shipped(*args, **kwargs)
        while owed:
            shipped(*owed.pop())
        return released

    patch.setattr(Ledger, "charge", charge)
    patch.setattr(attachment, "release", release)


@mutant("M44", "V", "lets the noise decay and charges the plan", "noise schedulers", _plain)
def _decaying_noise(patch: Patch, active: Active) -> None:
    steps = [0]

    def changed(name: str, noise: Tensor, bound: float) -> Tensor:
        steps[0] += name == "0.weight"
        return noise * 0.98 ** min(steps[0], 20)

    _noise_by(patch, active, changed)


@mutant("M48", "V", "charges half the sample rate", "the last, smaller batch stands for all", _plain)
def _cheaper_event(patch: Patch, active: Active) -> None:
    def event(self: Plan) -> accounting.Event:
        active()
        half = Poisson(self.sampler.sample_rate / 2)
        return half.event(self.mechanism.event(self.participation), self.num_examples)

    patch.setattr(Plan, "event", property(event))
