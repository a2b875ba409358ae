"""Which noise a run should add for a given epsilon: independent or correlated, and with which batches.

``plan_noise`` lists the choices that there are for a data set, a batch size and a number of steps, each with the noise
that keeps to the target and the error that this noise makes:

* **Poisson batches**, independent noise: plain DP-SGD. A step is amplified by sampling.
* **Batches in a fixed order**, independent or correlated noise: the run is one Gaussian release, without amplification.
  A record takes part once a pass, ``ceil(N / B)`` steps apart.
* **Cyclic Poisson batches** over b groups, noise with b bands: amplified by sampling within a group. One group is plain
  DP-SGD.

Guarantee: the event of every choice was evaluated at the very noise multiplier that is listed, and its epsilon, an
upper bound, is not above the target. A choice that no theorem covers under the relation is left out, with the reason.

The error is ``rooted_mean_error(C) * sens(C) * z`` (``accounting.matrix``): how far the running sums of the released
rows are from those of the clipped ones, as a root mean square over the steps for one coordinate. That is what the noise
does to the parameters under a constant learning rate without momentum; of clipping, and of how batches differ, it knows
nothing. It is an estimate by which to choose, and promises no accuracy of a model.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from enum import StrEnum
from functools import cache

from .accountant import Bound, checked_relation, epsilon
from .calibrate import calibrate_noise_multiplier
from .errors import InvalidParameter, TargetUnreachable, Unsupported
from .events import Event, Gaussian, MatrixMechanism, Relation
from .matrix import (
    Vector,
    band_mf,
    banded_inverse_square_root,
    banded_square_root,
    cyclic_poisson_event,
    identity,
    inverse_square_root,
    rooted_mean_error,
    sensitivity,
    square_root,
)
from .rounding import round_up_text
from .values import check_count, check_epsilon, shown

MOST_BANDS = 64
"""Of those that are tried unless others are asked for."""
_MOST_STEPS = 1_000_000
_DIGITS = 6
_TRIES = 100


class Batches(StrEnum):
    """How the batch of a step is chosen."""

    POISSON = "poisson"
    FIXED_ORDER = "fixed-order"
    CYCLIC_POISSON = "cyclic-poisson"


class Strategy(StrEnum):
    """How the noise of a step depends on that of earlier ones; ``accounting.matrix`` has each."""

    IDENTITY = "identity"
    SQUARE_ROOT = "square-root"
    BSR = "bsr"
    BISR = "bisr"
    BAND_MF = "band-mf"


@dataclass(frozen=True)
class NoiseChoice:
    """One way to add noise.

    Attributes:
      bands: of C, and for BISR of its inverse. Under cyclic Poisson sampling also the number of groups.
      noise_multiplier: z. The noise Z has standard deviation z * sensitivity * (what one participation may contribute:
        the clipping norm C, under replace-one 2C). Rounded up.
      sensitivity: of the strategy, over all participations; under sampling, of one.
      error: of the running sums, in clipping norms C.
      kept: how many vectors of noise, as large as the model, a step needs from earlier ones.
      event: the whole run.
      bound: epsilon of ``event``.
    """

    batches: Batches
    strategy: Strategy
    bands: int
    noise_multiplier: float
    sensitivity: float
    error: float
    kept: int
    event: Event
    bound: Bound


@dataclass(frozen=True)
class NoisePlan:
    """The choices for one run, all under ``relation``.

    Attributes:
      choices: plain DP-SGD first, where it is possible; never empty.
      left_out: why what is missing is not possible, a sentence or two each.
    """

    choices: tuple[NoiseChoice, ...]
    left_out: tuple[str, ...]
    relation: Relation

    @property
    def best(self) -> NoiseChoice:
        """The choice with the least error; of several the first."""
        return min(self.choices, key=lambda choice: choice.error)

    @property
    def plain(self) -> NoiseChoice | None:
        """Plain DP-SGD; None where no theorem covers it under the relation."""
        return next((choice for choice in self.choices if choice.batches is Batches.POISSON), None)

    def ratio(self, choice: NoiseChoice) -> float | None:
        """The error of ``choice`` relative to that of plain DP-SGD, if that is among the choices."""
        return None if self.plain is None else choice.error / self.plain.error


@dataclass(frozen=True)
class _Candidate:
    """A choice before its noise is known: ``event_of`` gives the whole run with a noise multiplier."""

    batches: Batches
    strategy: Strategy
    bands: int
    sensitivity: float
    mean_error: float
    event_of: Callable[[float], Event]


def plan_noise(
    target_epsilon: float,
    delta: float,
    *,
    num_examples: int,
    batch_size: int,
    steps: int,
    relation: Relation = Relation.ZERO_OUT,
    bands: Sequence[int] | None = None,
) -> NoisePlan:
    """All ways to add noise to a run, with their errors at ``target_epsilon``.

    Args:
      num_examples, batch_size: public; ``ceil(num_examples / batch_size)`` steps are a pass over the data.
      steps: of the whole run, fixed before its first release.
      relation: zero-out covers all choices. Add-or-remove-one has no batches in a fixed order, replace-one no sampling.
      bands: to try, each at most :func:`most_bands`; left out, the powers of two up to 64 of them.

    Raises:
      InvalidParameter: a number outside its domain.
      TargetUnreachable: no choice reaches the target.
      Unsupported: no theorem covers any choice under the relation.
    """
    relation = checked_relation(relation)
    if check_epsilon(target_epsilon) == 0:
        raise InvalidParameter("target_epsilon = 0: no finite noise gives epsilon 0 for certain; ask for more.")
    most = most_bands(num_examples, batch_size, steps)
    if bands is None:
        bands = [2**power for power in range(min(most, MOST_BANDS).bit_length())]
    for number in bands:
        if isinstance(number, bool) or not isinstance(number, int) or not 1 <= number <= most:
            raise InvalidParameter(
                f"bands = {shown(number)}: give whole numbers from 1 to {most}, the steps of a pass over the data (or "
                "of the run, if that is shorter); bands beyond it would meet those of a record's next participation."
            )

    @cache
    def calibrated(event_of: Callable[[float], Event]) -> float:
        return calibrate_noise_multiplier(target_epsilon, delta, event_of, relation=relation)

    choices: list[NoiseChoice] = []
    missing: dict[str, tuple[Exception, list[Batches]]] = {}
    for candidate in _candidates(num_examples, batch_size, steps, sorted(set(bands))):
        try:
            # All runs in a fixed order are one Gaussian release of this noise multiplier, whatever the strategy.
            fixed = candidate.batches is Batches.FIXED_ORDER
            noise = calibrated(Gaussian if fixed else candidate.event_of)
            choices.append(_choice(candidate, noise, target_epsilon, delta, relation))
        except (Unsupported, TargetUnreachable) as error:
            _, of = missing.setdefault(str(error), (error, []))
            of += [candidate.batches] if candidate.batches not in of else []
    if not choices:
        raise next(iter(missing.values()))[0]
    left_out = [f"{' and '.join(of)} batches: {reason}" for reason, (_, of) in missing.items()]
    if crowded := [number for number in bands if number > 1 and number * batch_size > num_examples]:
        left_out.append(
            f"{Batches.CYCLIC_POISSON} batches over {max(crowded)} groups: a group would hold fewer examples than a "
            f"batch, {batch_size}."
        )
    return NoisePlan(tuple(choices), tuple(left_out), relation)


def most_bands(num_examples: int, batch_size: int, steps: int) -> int:
    """The most bands that fit: the steps from one participation of a record to its next, or those of the run.

    Raises:
      InvalidParameter: a count below 1, or a batch above the data set.
    """
    for name, number in (("num_examples", num_examples), ("batch_size", batch_size), ("steps", steps)):
        if check_count(name, number) == 0:
            raise InvalidParameter(f"{name} = 0: it must be at least 1.")
    if steps > _MOST_STEPS:
        raise InvalidParameter(
            f"steps = {shown(steps)}: strategies are made for at most {_MOST_STEPS} steps. Take larger batches, or "
            "plain DP-SGD (accounting.calibrate_noise_multiplier)."
        )
    if batch_size > num_examples:
        raise InvalidParameter(
            f"batch_size = {batch_size} and num_examples = {num_examples}: a batch holds at most the data set; give a "
            "smaller batch."
        )
    return min(steps, -(-num_examples // batch_size))


def _candidates(num_examples: int, batch_size: int, steps: int, bands: Sequence[int]) -> Iterator[_Candidate]:
    one = identity(steps)
    yield _sampled(Batches.POISSON, Strategy.IDENTITY, one, 1, num_examples, batch_size)
    separation = -(-num_examples // batch_size)
    yield _in_order(Strategy.IDENTITY, 1, one, one, separation)
    yield _in_order(Strategy.SQUARE_ROOT, steps, square_root(steps), inverse_square_root(steps), separation)
    several = [number for number in bands if number > 1]
    for number in several:
        yield _in_order(Strategy.BSR, number, banded_square_root(steps, number), None, separation)
    for number in several:
        yield _in_order(Strategy.BISR, number, *banded_inverse_square_root(steps, number), separation)
    for number in several:
        yield _in_order(Strategy.BAND_MF, number, band_mf(steps, number), None, separation)
    for number in several:
        if number * batch_size <= num_examples:
            c = band_mf(steps, number)
            yield _sampled(Batches.CYCLIC_POISSON, Strategy.BAND_MF, c, number, num_examples, batch_size)


def _in_order(strategy: Strategy, bands: int, c: Vector, inverse: Vector | None, separation: int) -> _Candidate:
    """A run of a strategy over batches in a fixed order."""
    steps = len(c)
    times = -(-steps // separation)
    moved = sensitivity(c, steps, min_separation=separation, max_participations=times)

    def event_of(noise_multiplier: float) -> Event:
        return MatrixMechanism(
            noise_multiplier=noise_multiplier * moved,
            sensitivity=moved,
            min_separation=separation,
            max_participations=times,
        )

    error = rooted_mean_error(c, inverse_coefficients=inverse)
    return _Candidate(Batches.FIXED_ORDER, strategy, bands, moved, error, event_of)


def _sampled(
    batches: Batches, strategy: Strategy, c: Vector, bands: int, num_examples: int, batch_size: int
) -> _Candidate:
    """A run of a strategy with ``bands`` bands over Poisson batches of one of as many groups."""
    steps, rate = len(c), bands * batch_size / num_examples

    def event_of(noise_multiplier: float) -> Event:
        return cyclic_poisson_event(noise_multiplier, bands, steps, rate)

    return _Candidate(batches, strategy, bands, sensitivity(c, steps), rooted_mean_error(c), event_of)


def _choice(
    candidate: _Candidate, calibrated: float, target_epsilon: float, delta: float, relation: Relation
) -> NoiseChoice:
    """The candidate with the least multiplier of few digits, from ``calibrated`` on, that keeps to the target.

    An accountant's bound is monotone only up to its slack, so that a rounded number may lie on the wrong side.
    """
    for attempt in range(_TRIES):
        noise = float(round_up_text(calibrated * (1 + attempt * 1e-5), _DIGITS))
        event = candidate.event_of(noise)
        bound = epsilon(event, delta, relation=relation)
        if bound.upper <= target_epsilon:
            contribution = 2.0 if relation is Relation.REPLACE_ONE else 1.0
            return NoiseChoice(
                batches=candidate.batches,
                strategy=candidate.strategy,
                bands=candidate.bands,
                noise_multiplier=noise,
                sensitivity=candidate.sensitivity,
                error=candidate.mean_error * candidate.sensitivity * noise * contribution,
                kept=candidate.bands - 1,
                event=event,
                bound=bound,
            )
    raise TargetUnreachable(f"No noise multiplier near {calibrated:.6g} keeps to epsilon {target_epsilon:g}.")
