"""Bugs that were made by somebody once, put into the shipped package: what such a bug is, and what many of them share.

The identifiers and sources are those of the project's catalogue of privacy bugs; ``catalogue.py`` joins the lists.  A
mutant patches the narrowest place of the package in which the bug could live.  Where the package would notice the bug
by itself and refuse, the mutant takes that guard away as well: it is the check that has to catch it then.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from accounting import Relation
from dpkit.engine.step import ClippedAccumulator
from dpkit.gradients import PerSample
from dpkit.mechanisms import Gaussian, NoiseKey
from dpkit.types import ClippedSum, Named, Released

from .checks import CHECKS
from .epsilon_checks import check_E
from .harness import Setup
from .ledger_checks import check_K
from .source_checks import check_F, check_L

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
      source: who made it.
      apply: puts it in.
      catch: runs the check, on the setups that suffice.
      slow: whether it is left to the slow tests.
    """

    id: str
    check: str
    bug: str
    source: str
    apply: Callable[[Patch, Active], None]
    catch: Callable[[Path], object]
    slow: bool = False


MUTANTS: list[Mutant] = []
BY_LETTER: dict[str, Callable[..., object]] = {
    **CHECKS,
    "K": check_K,
    "E": check_E,
    "L": check_L,
    "F": check_F,
}


def everywhere(setup: Any) -> bool:
    return True


def plain(setup: Setup) -> bool:
    return setup.form == "loop" and setup.micro is None


def small(setup: Setup) -> bool:
    return setup.subject == "mlp" and setup.public_n <= 9 and setup.rows == 1 and setup.relation is Relation.ADD_REMOVE


def mutant(
    number: str,
    check: str,
    bug: str,
    source: str,
    where: Callable[[Any], bool] = everywhere,
    *,
    by: Callable[..., object] | None = None,
    slow: bool = False,
) -> Callable[[Callable[[Patch, Active], None]], Callable[[Patch, Active], None]]:
    """Adds a bug to the list.

    Args:
      where: setups, or parts, of the check that suffice.
      by: the function that is the check; the one of its letter if left out.
    """
    catch = partial(BY_LETTER[check] if by is None else by, only=where)

    def register(apply: Callable[[Patch, Active], None]) -> Callable[[Patch, Active], None]:
        MUTANTS.append(Mutant(number, check, bug, source, apply, catch, slow))
        return apply

    return register


def part(*names: str) -> Callable[[str], bool]:
    """Of a check that consists of parts with names: these."""
    return lambda name: name in names


def rows_of(gradients: PerSample, real: int) -> list[Named]:
    """The gradient of each real row, written out in double precision."""
    found = []
    for row in range(min(real, gradients.size)):
        keep = torch.zeros(gradients.size, dtype=torch.bool)
        keep[row] = True
        names = gradients.sq_norms()
        one = gradients.select(keep).weighted_sum(dict.fromkeys(names, torch.ones(1)))
        found.append({name: value.double() for name, value in one})
    return found


def norm_of(row: Named) -> float:
    return math.sqrt(sum(float(value.square().sum()) for value in row.values()))


def bound_of(accumulator: ClippedAccumulator) -> float:
    return accumulator._plan.clip.bounds(())[0]


def sum_by(patch: Patch, active: Active, clipped: Callable[[list[Named], float], list[Named]]) -> None:
    """Replace what a microbatch adds to the sum by the sum of ``clipped(rows, C)``."""

    def add(self: ClippedAccumulator, gradients: PerSample, losses: Any = None) -> None:
        self.diagnostics.units += self._real
        active()
        rows = [{k: v * self._scale for k, v in row.items()} for row in rows_of(gradients, self._real)]
        for row in clipped(rows, bound_of(self)):
            self._add((name, value.float()) for name, value in row.items())

    patch.setattr(ClippedAccumulator, "add", add)


def clipped_flat(rows: list[Named], bound: float) -> list[Named]:
    """Clipped as it should be."""
    finite = [row for row in rows if math.isfinite(norm_of(row))]
    return [{name: g * min(1.0, bound / max(norm_of(row), 1e-300)) for name, g in row.items()} for row in finite]


def release_by(patch: Patch, active: Active, changed: Callable[[Released, ClippedSum], Released]) -> None:
    """Change what leaves the shipped mechanism, which sees the sum as well."""
    shipped = Gaussian.release

    def release(self: Gaussian, clipped: ClippedSum, state: Any, key: NoiseKey) -> tuple[Released, Any]:
        released, state = shipped(self, clipped, state, key)
        active()
        return changed(released, clipped), state

    patch.setattr(Gaussian, "release", release)


def noise_by(patch: Patch, active: Active, changed: Callable[[str, Tensor, float], Tensor]) -> None:
    """Change the noise: ``changed(name, noise, std)``."""

    def change(released: Released, clipped: ClippedSum) -> Released:
        (query,) = clipped.queries
        found = {}
        for name, value in released.value.items():
            noise = value.double() - query.value[name].double()
            std = next(iter(query.sensitivity.values()))
            found[name] = (query.value[name].double() + changed(name, noise, std)).to(value.dtype)
        return released._replace(value=found)

    release_by(patch, active, change)
