"""Dirac canaries: made-up units that ride along in a run, so that what leaves the mechanism can be audited.

Each canary owns one coordinate of a block that is nobody's parameter. In every step in which it takes part it brings
the gradient ``1000·C·e_j``, which the run's own rule has to clip, its own accumulator to add and its own mechanism to
cover; from the noisy block the auditor tells who was in and who was not. Half of them take part, each
with the run's sample rate, half never do.

Guarantees:
  * It costs no privacy: the block is part of the step's one release, is charged with it, and no unit of the data
    touches it. Its coordinates take nothing from the sensitivity of the others.
  * It changes nothing else: parameters, filters, checkpoints and callbacks never see the block, and a run with a seed
    trains to the same bits with canaries as without (but for mechanisms whose noise depends on the number of
    coordinates: those that round to a grid).
  * Cost per step: one draw and a few operations for each canary, and noise for its coordinate.

What it exercises: the rule, the sum, the charge, the noise. What it does not: the gradients of the user's layers and
the draws of the loader, since canaries come in by a draw of their own (``dpkit.audit.white_box`` sends some through a
loader and layers of its own).

Source: Nasr et al. 2023, "Tight auditing of differentially private machine learning", https://arxiv.org/abs/2302.07956.
"""

from __future__ import annotations

import math
import os
from collections.abc import Iterator
from typing import Any

import numpy as np
import torch
from torch import Tensor

from dpkit.clipping import ClipRule, Setting
from dpkit.errors import InvalidArgument, OutOfOrder
from dpkit.mechanisms.keys import generator_from
from dpkit.sampling import Poisson, TruncatedPoisson
from dpkit.types import Named, Released

from .plan import Plan, check_count
from .step import ClippedAccumulator

BLOCK = "dpkit canaries"
"""Name of the block; a parameter's name has no space."""

_FEWEST = 50

LARGER = 1000.0
"""How many clipping norms a canary's gradient is long: the run's own clip has to cut it."""


class Canaries:
    """Dirac canaries for one run: ``engine.make_private(..., canaries=dpkit.audit.Canaries(10_000))``.

    Args:
      count: how many take part; as many again never do. At least 50: fewer show nothing.
      seed: of the draws of who takes part in which step; None takes them from the operating system.
    Raises:
      InvalidArgument: for a count below 50 or a seed that is no integer.
    """

    def __init__(self, count: int, *, seed: int | None = None) -> None:
        check_count("count", count)
        if count < _FEWEST:
            raise InvalidArgument(f"count is {count}; fewer than {_FEWEST} canaries show nothing.")
        if seed is not None:
            check_count("seed", seed)
        self.count = count
        self.steps = 0
        """Releases that were seen."""
        key = os.urandom(32) if seed is None else (seed % 2**256).to_bytes(32, "little")
        self._generator = generator_from(key)
        self._scores = np.zeros(2 * count)
        self._plan: Plan | None = None
        self._device = torch.device("cpu")
        self._bound = 0.0

    def check(self, plan: Plan, parameters: Named) -> None:
        """Refuse what :meth:`begin` could not serve, and change nothing.

        Raises:
          OutOfOrder: they served another run.
          InvalidArgument: the plan is of a kind that these canaries cannot audit; the message says which part.
        """
        if self._plan is not None:
            raise OutOfOrder("these canaries served a run already; make new ones for every run.")
        refuse_plan(plan)
        refuse_groups(plan.clip)
        refuse_unseen(plan, parameters)

    def begin(self, plan: Plan, parameters: Named) -> None:
        """Serve ``plan``, once, beside these parameters. Raises as :meth:`check`."""
        self.check(plan, parameters)
        self._plan, self._device = plan, next(iter(parameters.values())).device

    def serves(self, plan: Plan) -> bool:
        """Whether these are the canaries of ``plan``."""
        return self._plan is plan

    @property
    def place(self) -> Named:
        """The block, as an accumulator of clipped sums wants it."""
        return {BLOCK: torch.zeros(2 * self.count, device=self._device)}

    def join(self, accumulator: ClippedAccumulator, rule_state: Any) -> None:
        """Add the canaries of one step to the sum of its batch."""
        plan = self._serving()
        drawn = Poisson(plan.sampler.sample_rate).draw(self.count, self._generator)
        (self._bound,) = plan.clip.bounds(rule_state)
        norm = LARGER * self._bound
        accumulator.join(_Rows(drawn.to(self._device), norm, 2 * self.count), len(drawn))

    def take(self, released: Released) -> Released:
        """``released`` without the block, whose scores are updated: the sum over all steps of :func:`log_ratio`."""
        plan = self._serving()
        value, stds = dict(released.value), dict(released.noise_std)
        std = stds.pop(BLOCK)
        noisy = (value.pop(BLOCK).double() / std).cpu().numpy()
        self._scores += log_ratio(noisy, self._bound / plan.expected_batch / std, plan.sampler.sample_rate)
        self.steps += 1
        return released._replace(value=value, raw=value, noise_std=stds)

    @property
    def inside(self) -> np.ndarray:
        """(count,) scores of the canaries that took part."""
        return self._scores[: self.count].copy()

    @property
    def outside(self) -> np.ndarray:
        """(count,) scores of those that did not."""
        return self._scores[self.count :].copy()

    def _serving(self) -> Plan:
        if self._plan is None:
            raise OutOfOrder("these canaries serve no run yet; pass them to make_private or attach as canaries=.")
        return self._plan


def log_ratio(noisy: np.ndarray, signal: float, sample_rate: float) -> np.ndarray:
    """log-likelihood ratio of one step: log(1 - q + q·exp(s·y - s²/2)).

    Summed over steps, no other test of a canary beats it (Neyman and Pearson).

    Args:
      noisy: y, the canary's coordinate in units of its noise.
      signal: s, what a canary brings at most, in units of its noise.
      sample_rate: q.
    """
    exponent = signal * noisy - signal**2 / 2
    missed = math.log1p(-sample_rate) if sample_rate < 1 else -math.inf
    return np.logaddexp(missed, math.log(sample_rate) + exponent)


def refuse_plan(plan: Plan) -> None:
    """Refuse a plan that Dirac canaries cannot audit.

    Raises:
      InvalidArgument: naming the part and the way out.
    """
    if not isinstance(plan.sampler, Poisson | TruncatedPoisson):
        raise InvalidArgument(
            f"canaries were asked for under {plan.sampler}; their scores are those of Poisson sampling, each unit by "
            "itself. Audit with dpkit.Poisson, or leave canaries out."
        )
    if plan.metrics or plan.clip.needs_labels or plan.clip.questions(Setting((1,), 1.0)):
        raise InvalidArgument(
            f"canaries were asked for under {plan.clip} with {len(plan.metrics)} metrics; they have no label and no "
            "value for a metric, and must not answer what a rule asks of the data. Audit with a rule that learns "
            "nothing, such as clipping.Flat, and without metrics."
        )


def refuse_unseen(plan: Plan, parameters: Named) -> None:
    """Refuse a plan under which canaries would add nothing to see, or nobody could tell them from a parameter.

    Raises:
      InvalidArgument: naming the rule, or the parameter.
    """
    if BLOCK in parameters:
        raise InvalidArgument(f"a parameter is called {BLOCK!r}, which is the name of the canaries; rename it.")
    rule, state = plan.clip, plan.clip.init(plan.setting(parameters))
    bounds = rule.bounds(state)
    bound = math.hypot(*bounds)
    norm = torch.full((max(rule.groups(list(parameters))) + 1, 1), LARGER * bound, dtype=torch.float64)
    factors = rule.factors(norm, None, state)
    # As the accumulator adds it: in single precision.
    added = float((factors.float() * norm.float()).double().square().sum().sqrt())
    if not added >= bound / 2:
        raise InvalidArgument(
            f"of a canary {rule} leaves {added:.3g}, where a unit may add {bound:.3g}: it drops gradients that are "
            f"{LARGER:g} bounds long, or the bound is too small for single precision, and an audit would see nothing. "
            "Audit with clipping.Flat of an ordinary size."
        )


def refuse_groups(rule: ClipRule) -> None:
    """Refuse a rule under which a block of canaries would be a group of its own.

    Raises:
      InvalidArgument: naming the rule.
    """
    if set(rule.groups(["one.weight", "two.weight", BLOCK])) != {0}:
        raise InvalidArgument(
            f"canaries were asked for under {rule}, which would make their block a group of its own and change the "
            "noise of all others. Audit with one group, such as clipping.Flat."
        )


class _Rows:
    """Per-sample gradients of the canaries of one batch: ``norm`` at one coordinate each."""

    def __init__(self, coordinates: Tensor, norm: float, width: int) -> None:
        self.size = len(coordinates)
        self._coordinates, self._norm, self._width = coordinates, norm, width

    def sq_norms(self) -> Named:
        return {BLOCK: torch.full_like(self._coordinates, self._norm**2, dtype=torch.float64)}

    def weighted_sum(self, weights: Named) -> Iterator[tuple[str, Tensor]]:
        block = torch.zeros(self._width, device=self._coordinates.device)
        yield BLOCK, block.index_add_(0, self._coordinates, weights[BLOCK].float() * self._norm)

    def select(self, keep: Tensor) -> _Rows:
        return _Rows(self._coordinates[keep], self._norm, self._width)
