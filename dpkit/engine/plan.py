"""The plan: the one object that owns σ, C, q, N, unit and relation.

Sampler, divisor, noise and ledger event are all derived from here; nothing else keeps a copy. Two runs with equal plans
have equal guarantees: how a run executes (backend, microbatch size, device) is told to the engine and is not in the
plan.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from torch import Tensor

import accounting
from accounting import Relation
from dpkit.clipping import ClipRule, Setting
from dpkit.errors import InvalidArgument
from dpkit.filters import Filter
from dpkit.gradients import ROUNDING_CHAIN
from dpkit.mechanisms import Mechanism
from dpkit.metrics import Metric
from dpkit.sampling import Sampler
from dpkit.types import Participation, Question

LARGEST_EXCESS = 2
"""How many times the public N the data set may hold: a wrong N must not undo the rounding bound."""

LEAST_GRADIENT_SHARE = 0.01
"""Of a release's precision: below it, side questions would multiply the gradient's noise by more than ten."""

_UNIT_ROUNDOFF = 2.0**-24  # of float32, in which clipped sums are formed and kept


@dataclass(frozen=True, kw_only=True)
class Plan:
    """What is promised, fixed before the first release.

    Guarantee: :attr:`event`, repeated over the planned steps, covers what a run of this plan releases.
    Requires: that the run is made by the engine, which derives sampler, sum, noise and charge from this object.
    Why: sampler and mechanism state the event of what they do, with the fields that they do it with.

    Args:
      sampler: how the units of a step are drawn; owns the sample rate q.
      clip: how far one unit may move the sum; owns the clipping norm C.
      mechanism: what noise is added; owns the noise multiplier σ.
      steps: planned number T of logical steps, at least 1. Training stops for good there.
      num_examples: N, a public number of units. Only its product with q divides anything.
      delta: δ of the guarantee, in (0, 1).
      filters: post-processing of the released gradient, applied in order.
      metrics: numbers of each batch that are released beside the gradient, in the same event.
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
    metrics: tuple[Metric, ...] = ()
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
        for kind, protocol in (("sampler", Sampler), ("clip", ClipRule), ("mechanism", Mechanism)):
            check_member(kind, getattr(self, kind), protocol)
        for kind, protocol in (("filters", Filter), ("metrics", Metric)):
            members = getattr(self, kind)
            if not isinstance(members, (tuple, list)):
                raise InvalidArgument(f"{kind} is {members!r}; give a tuple of them, ({members!r},) for one.")
            for member in members:
                check_member(kind, member, protocol)
            object.__setattr__(self, kind, tuple(members))
        names = [metric.name for metric in self.metrics]
        if len(set(names)) != len(names):
            raise InvalidArgument(f"the metrics are called {', '.join(names)}; each needs a name of its own.")

    @property
    def expected_batch(self) -> float:
        """q·N, the only number that divides a sum."""
        return self.sampler.sample_rate * self.num_examples

    @property
    def participation(self) -> Participation:
        """In which steps one unit may take part."""
        return self.sampler.participation(self.steps, self.num_examples)

    @property
    def event(self) -> accounting.Event:
        """The event of :attr:`steps_per_event` consecutive steps."""
        event = self.mechanism.event(self.participation)
        # Correlated noise over batches in a fixed order is one event for the whole run, and nothing is drawn around it.
        return event if _is_whole_run(event) else self.sampler.event(event, self.num_examples)

    @property
    def steps_per_event(self) -> int:
        """How many steps, from the first on, one event covers; an event that was begun counts in full."""
        if _is_whole_run(self.mechanism.event(self.participation)):
            return self.steps
        return min(self.steps, self.sampler.steps_per_event(self.num_examples))

    def setting(self, parameters: Mapping[str, Tensor]) -> Setting:
        """What the clipping rule may know of the model and the plan."""
        sizes: dict[int, int] = {}
        for name, group in zip(parameters, self.clip.groups(parameters), strict=True):
            sizes[group] = sizes.get(group, 0) + parameters[name].numel()
        return Setting(tuple(size for _, size in sorted(sizes.items())), self.expected_batch)

    def questions(self, setting: Setting) -> tuple[Question, ...]:
        """All that is asked of every batch beside the gradient: by the rule, then by the metrics."""
        return (*self.clip.questions(setting), *(metric.question() for metric in self.metrics))

    def noise_shares(self, questions: Sequence[Question]) -> list[float]:
        """The part of the release's precision that the gradient has, and those that the questions have.

        A question with sensitivity Δ and noise of standard deviation std takes (scale·Δ/std)² of it, where scale is the
        standard deviation of the mechanism's noise per unit of sensitivity; what is left is the gradient's.

        Guarantee: gradient and questions together cost what the mechanism's event says.
        Requires: nothing; what would leave the gradient less than a hundredth is refused.
        Why: the shares are positive and add up to 1; ``mechanisms/gaussian.py`` has the sum over queries and groups.

        Raises:
          InvalidArgument: the questions have so little noise that hardly anything is left for the gradient, or a
            number that is no noise.
        """
        scale = self.mechanism.scale(self.participation)
        shares = [(scale * self.sensitivity_of(question) / question.noise_std) ** 2 for question in questions]
        for question, share in zip(questions, shares, strict=True):
            if not (
                math.isfinite(share) and share > 0 and math.isfinite(question.noise_std) and question.noise_std > 0
            ):
                raise InvalidArgument(
                    f"{question} is asked beside the gradient; its bound and noise_std must be positive numbers of "
                    "ordinary size, or no noise could be made for it."
                )
        left = 1 - math.fsum(shares)
        if left < LEAST_GRADIENT_SHARE:
            asked = ", ".join(
                f"{question.noise_std:g} (sensitivity {self.sensitivity_of(question):g}; far above "
                f"{scale * self.sensitivity_of(question):g} is needed)"
                for question in questions
            )
            raise InvalidArgument(
                f"noise_std of what is asked beside the gradient is {asked}, which leaves no precision for the "
                f"gradient at noise multiplier {self.mechanism.noise_multiplier:g}: queries on one batch share one "
                "event. Raise noise_std of the clipping rule or of the metrics; at three times that number the "
                "gradient's noise grows by 6 percent."
            )
        return [left, *shares]

    def sensitivity_of(self, question: Question, *, whole: bool = False) -> float:
        """L2 sensitivity of the sum of the answers, which is formed in float64.

        Guarantee: the computed sums of two neighbours are at most this far apart.
        Requires: answers of norm at most the question's bound (``ClippedAccumulator`` scales them), and batches of at
        most ``largest_batch`` units.
        Why: the exact sums differ by one bound, or by two where a unit is replaced. Each of two neighbouring sums of at
        most n vectors is off by at most (n + 8)·u·n times their bound, u = 2^-53 (Higham 2002, section 4.2).

        Args:
          whole: whether the sum is over the whole data set, and not over a batch.
        """
        most = LARGEST_EXCESS * self.num_examples
        n = most if whole else self.sampler.largest_batch(most)
        return question.bound * (self._moved + 2.0**-40 + 2 * (n + 8) * (n + 1) * 2.0**-53)

    def sensitivities(self, bounds: list[float], additions: int) -> dict[int, float]:
        """Group -> L2 sensitivity of the clipped sum as it is computed, rounding included.

        Guarantee: the computed sums of two neighbours are at most this far apart in each group.
        Requires: clipped gradients of norm at most ``bounds``, batches of at most ``largest_batch`` units, and
        sums that are formed as ``gradients/arithmetic.py`` says.
        Why: one unit moves the exact sum by at most C under add/remove and zero-out, and by 2C when it is replaced. The
        sums of two neighbours are each computed in float32 with chains of at most ``ROUNDING_CHAIN`` additions, plus
        ``additions`` more to join microbatches, over at most n = ``largest_batch`` vectors of norm at most C; each is
        therefore off by at most (chain + additions + 8)·u·n·C, u = 2^-24 (Higham 2002, section 4.2), where the 8 covers
        the rounding of the clipping factors. Both errors are added to the distance.

        Args:
          bounds: clipping norm C of each group.
          additions: how many partial sums are added up in float32, at most.
        """
        # The engine refuses data sets of more than LARGEST_EXCESS times N examples, so this is a bound for them all.
        largest = self.sampler.largest_batch(LARGEST_EXCESS * self.num_examples)
        rounding = 2 * (ROUNDING_CHAIN + additions + 8) * _UNIT_ROUNDOFF * largest
        return {group: bound * (self._moved + rounding) for group, bound in enumerate(bounds)}

    def epsilon(self, steps: int | None = None) -> accounting.Bound:
        """ε after ``steps`` steps (all planned ones when left out) at the plan's δ.

        Guarantee, Requires, Why: as of ``accounting.epsilon``, for what the plan's first ``steps`` steps release.
        """
        event = self.event_of(self.steps if steps is None else steps)
        return accounting.epsilon(event, self.delta, relation=self.relation)

    def event_of(self, steps: int) -> accounting.Event:
        """What the first ``steps`` steps do together."""
        return accounting.Repeated(event=self.event, count=-(-steps // self.steps_per_event))

    @property
    def _moved(self) -> float:
        """Contributions of one unit that neighbours differ by."""
        return 2.0 if self.relation == Relation.REPLACE_ONE else 1.0


def check_member(kind: str, member: object, protocol: type) -> None:
    """Refuse an object that lacks a part of its protocol, before anything is charged.

    Raises:
      InvalidArgument: naming what is missing.
    """
    names = {name for part in protocol.__mro__ for name in (*vars(part), *getattr(part, "__annotations__", ()))}
    missing = sorted(name for name in names if not name.startswith("_") and not hasattr(member, name))
    if missing:
        raise InvalidArgument(
            f"{kind} is {member!r}, which has no {', '.join(missing)}; dpkit's {protocol.__name__} says what it takes."
        )


def _is_whole_run(event: accounting.Event) -> bool:
    return isinstance(event, accounting.MatrixMechanism)


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
