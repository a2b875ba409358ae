"""Check D, as far as it is about what models do: whose gradient is recorded, and whether it is that of a record alone.

The sensitivity of a sum of clipped gradients presumes that what is clipped is the gradient of one record, and a
function of that record.  ``checks.py`` says what the letters stand for.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from itertools import product
from pathlib import Path

import torch

from dpkit.errors import Refused
from dpkit.types import Named

from .checks import Violation, compare_neighbours
from .films import film
from .harness import Setup, distance, length, run
from .subjects import Data, build, honest, loss_of


def grid_D_gradients() -> Iterator[Setup]:
    """A clipping norm that no gradient reaches: the clipped sum is the sum."""
    for subject in ("mlp", "conv", "tied", "twice", "norms", "sequence"):
        for form, backend, micro in (("loop", "ghost", None), ("step", "ghost", 2), ("step", "vmap", None)):
            yield Setup(form, subject, backend, micro=micro, bound=1e6, public_n=5, lr=0.0)


def check_D_gradients(folder: Path, *, only: Callable[[Setup], bool] = lambda setup: True) -> int:
    """What is summed is what autograd gives for each record on its own, to 1e-5. Returns the number of comparisons."""
    compared = 0
    for setup in grid_D_gradients():
        if not only(setup):
            continue
        data = honest(setup.subject, setup.public_n, setup.dtype)
        trace = run(setup, data, folder)
        if trace.error is not None or len(trace.sums) != 1:
            raise Violation("D", f"the run ended early: {trace.message[:200]} ({setup})")
        wanted = _one_by_one(setup.subject, data)
        off = distance(trace.sums[0], wanted) / length(wanted)
        if not off <= 1e-5:
            raise Violation("D", f"the sum is off by {off:.3g} of autograd's, record by record ({setup})")
        compared += 1
    return compared


def _one_by_one(subject: str, data: Data) -> Named:
    """The sum of the gradients of single records, in double precision."""
    model = build(subject, torch.float64)
    total = {name: torch.zeros_like(p) for name, p in model.named_parameters()}
    wide = Data(data.x.double() if data.x.is_floating_point() else data.x, data.y, data.w.double())
    for row in range(data.size):
        loss = loss_of(model, wide[row : row + 1]).sum()
        found = torch.autograd.grad(loss, list(model.parameters()), allow_unused=True)
        for name, gradient in zip(total, found, strict=True):
            total[name] += 0 if gradient is None else gradient
    return total


MIXING = ("centred", "contrast")
"""Subjects in which the records of a batch meet."""


def grid_D_mixing() -> Iterator[Setup]:
    for subject, (form, backend) in product(MIXING, (("loop", "ghost"), ("step", "ghost"))):
        yield Setup(form, subject, backend, public_n=9)


def check_D_mixing(folder: Path, *, only: Callable[[Setup], bool] = lambda setup: True) -> int:
    """A model that mixes the records of a batch is refused before anything is charged. Returns how many were."""
    refused = 0
    for setup in grid_D_mixing():
        if not only(setup):
            continue
        scenes = film(setup.subject, setup.public_n, setup.relation, setup.dtype).only(("normal", "x1e3", "duplicate"))
        trace = run(setup.but(steps=len(scenes.said), lr=0.0), scenes.left, folder)
        if trace.error is not None and issubclass(trace.error, Refused) and not trace.released and not trace.charges:
            refused += 1
            continue
        compare_neighbours(setup, scenes, folder)
        raise Violation("D", f"a model that mixes the records of a batch was taken ({setup})")
    return refused
