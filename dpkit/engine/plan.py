"""The plan: the one object that owns σ, C, q, N, unit and relation.

Sampler, divisor, noise and ledger event are all derived from here; nothing else keeps a copy. Two runs with equal plans
have equal guarantees: how a run executes (backend, microbatch size, device) is told to the engine and is not in the
plan.
"""

from __future__ import annotations

from dataclasses import dataclass

import accounting
from accounting import Relation
from dpkit.clipping import ClipRule
from dpkit.errors import InvalidArgument
from dpkit.filters import Filter
from dpkit.gradients import ROUNDING_CHAIN
from dpkit.mechanisms import Mechanism
from dpkit.sampling import Sampler

LARGEST_EXCESS = 2
"""How many times the public N the data set may hold: a wrong N must not undo the rounding bound."""

_UNIT_ROUNDOFF = 2.0**-24  # of float32, in which clipped sums are formed and kept


@dataclass(frozen=True, kw_only=True)
class Plan:
    """What is promised, fixed before the first release.

    Args:
      sampler: how the units of a step are drawn; owns the sample rate q.
      clip: how far one unit may move the sum; owns the clipping norm C.
      mechanism: what noise is added; owns the noise multiplier σ.
      steps: planned number T of logical steps, at least 1. Training stops for good there.
      num_examples: N, a public number of units. Only its product with q divides anything.
      delta: δ of the guarantee, in (0, 1).
      filters: post-processing of the released gradient, applied in order.
      unit: what one row of the data set stands for.
      relation: which data sets are neighbours.
    Raises:
      InvalidArgument: for a value outside its domain.
    """

    sampler: Sampler
    clip: ClipRule
    mechanism: Mechanism
    steps: int
    num_examples: int
    delta: float
    filters: tuple[Filter, ...] = ()
    unit: str = "example"
    relation: Relation = Relation.ADD_REMOVE

    def __post_init__(self) -> None:
        # A plain string must mean the relation everywhere or nowhere: half a meaning would halve the noise.
        object.__setattr__(self, "relation", _relation(self.relation))
        for name in ("steps", "num_examples"):
            check_count(name, getattr(self, name))
        if self.steps < 1:
            raise InvalidArgument(f"steps is {self.steps}; a plan has at least one step.")
        if self.num_examples < 1:
            raise InvalidArgument(
                f"num_examples is {self.num_examples}; it is the public size N of the data set and must be at least 1: "
                "nothing can be trained on an empty data set."
            )
        check_number("delta", self.delta)
        if not 0 < self.delta < 1:
            raise InvalidArgument(f"delta is {self.delta}; it is a probability in (0, 1), well below 1/N.")

    @property
    def expected_batch(self) -> float:
        """q·N, the only number that divides a sum."""
        return self.sampler.sample_rate * self.num_examples

    @property
    def event(self) -> accounting.Event:
        """The event of one step."""
        return self.sampler.event(self.mechanism.event(), self.num_examples)

    def sensitivities(self, bounds: list[float], additions: int) -> dict[int, float]:
        """Group -> L2 sensitivity of the clipped sum as it is computed, rounding included.

        One unit moves the exact sum by at most C under add/remove and zero-out, and by 2C when it is replaced. The sums
        of two neighbours are each computed in float32 with chains of at most ``ROUNDING_CHAIN`` additions, plus
        ``additions`` more to join microbatches, over at most n = ``largest_batch`` vectors of norm at most C; each is
        therefore off by at most (chain + additions + 8)·u·n·C, u = 2^-24 (Higham 2002, section 4.2), where the 8 covers
        the rounding of the clipping factors. Both errors are added to the distance.

        Args:
          bounds: clipping norm C of each group.
          additions: how many partial sums are added up in float32, at most.
        """
        # The engine refuses data sets of more than LARGEST_EXCESS times N examples, so this is a bound for them all.
        largest = self.sampler.largest_batch(LARGEST_EXCESS * self.num_examples)
        moved = 2.0 if self.relation == Relation.REPLACE_ONE else 1.0
        rounding = 2 * (ROUNDING_CHAIN + additions + 8) * _UNIT_ROUNDOFF * largest
        return {group: bound * (moved + rounding) for group, bound in enumerate(bounds)}

    def epsilon(self, steps: int | None = None) -> accounting.Bound:
        """ε after ``steps`` steps (all planned ones when left out) at the plan's δ."""
        event = accounting.Repeated(event=self.event, count=self.steps if steps is None else steps)
        return accounting.epsilon(event, self.delta, relation=self.relation)


def check_count(name: str, value: object) -> None:
    """Refuse what is not a whole number.

    Raises:
      InvalidArgument: naming the argument.
    """
    if isinstance(value, bool) or not isinstance(value, int):
        raise InvalidArgument(f"{name} is {value!r}; it must be a whole number.")


def check_number(name: str, value: object) -> None:
    """Refuse what is not a number.

    Raises:
      InvalidArgument: naming the argument.
    """
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        raise InvalidArgument(f"{name} is {value!r}; it must be a number.")


def _relation(value: object) -> Relation:
    try:
        return Relation(value)
    except ValueError:
        raise InvalidArgument(
            f"relation is {value!r}; it is one of {', '.join(repr(r.value) for r in Relation)}."
        ) from None


def steps_per_epoch(num_examples: int, batch_size: int) -> int:
    """Logical steps in one pass, 1/q rounded up: integers all the way, because int(1/q) is one short for many N."""
    return -(-num_examples // batch_size)
