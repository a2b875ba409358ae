"""Events from what other libraries recorded: opacus accountant histories and dp-accounting's ``DpEvent`` trees.

Guarantee: the event that is returned is at least as revealing, under the relation that was named, as what their record
describes.  What has no counterpart here raises ``Unsupported`` by name.
Requires: that their record is true, and that epsilon is asked for under that same relation.
Why: their noise multipliers are relative to the clipping norm C, ours to the sensitivity under the relation, which for
replace-one is 2C; the rest is said below.  Neither library is imported; their objects are read.

**What an opacus history does not say** is how batches were drawn, so the caller says it.  With ``"shuffled"`` every
record enters at most one of the steps of an epoch and sampling is given no credit.  An epoch then has floor(1/rate)
steps, as few as a loader of that rate can have, and epochs follow one another without a break; where the rate changes
within an epoch, every later entry is taken to begin with the last step of an epoch, the worst that it can do.

**Replace-one in dp-accounting.**  The documentation of its events defines noise multipliers by the clipping norm, and
its PLD accountant doubles the sensitivity; its Renyi accountant takes the multipliers as they are, and so reports less.
Here the documentation counts.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from typing import Any, Literal

from .accountant import checked_relation
from .errors import InvalidParameter, Unsupported
from .events import (
    ApproximateDP,
    Composed,
    Event,
    Gaussian,
    Laplace,
    OnePass,
    Poisson,
    PoissonTrials,
    Relation,
    Repeated,
    Select,
    TruncatedPoisson,
    WithoutReplacement,
)
from .normal_form import atoms_under
from .values import Count, PositiveFloat, Probability, Value, shown

Sampling = Literal["poisson", "shuffled"]


def from_opacus_history(history: Any, *, sampling: Sampling, relation: Relation) -> Event:
    """The event of an opacus run.

    Guarantee, Requires, Why: see the module.

    Only the record is taken over: histories of opacus' GDP accountant are as good as others, although its epsilon is
    no bound.  A multiplier that an optimizer rewrote for purposes of its own (AdaClip's is larger than the noise that
    both of its queries amount to) is wrong in the history already.

    Args:
      history: ``(noise_multiplier, sample_rate, steps)`` triples in the order of the run; or an opacus accountant; or
        the state dict of one.
      sampling: "poisson" if opacus' own loader drew the batches (``poisson_sampling=True``), "shuffled" for any loader
        that visits every record once an epoch.
      relation: under which epsilon will be asked; "poisson" has no theorem for replace_one, "shuffled" none for
        add_remove.

    Raises:
      InvalidParameter: this is no history, or an entry of it has a number outside its domain; no noise at all included.
      Unsupported: no theorem for this sampling under this relation.
    """
    relation = checked_relation(relation)
    entries = [_entry(index, entry) for index, entry in enumerate(_triples(history))]
    per_sensitivity = _shrink(relation)
    match sampling:
        case "poisson":
            parts = [
                Repeated(Poisson(entry.sample_rate, Gaussian(entry.noise_multiplier * per_sensitivity)), entry.steps)
                for entry in entries
            ]
        case "shuffled":
            parts = [
                Repeated(OnePass(Gaussian(entry.noise_multiplier * per_sensitivity)), passes)
                for entry, passes in zip(entries, _passes(entries), strict=True)
            ]
        case _:
            raise InvalidParameter(
                f"sampling = {shown(sampling)}: say 'poisson' or 'shuffled'; opacus does not record which it was."
            )
    return _covered(Composed(tuple(parts)), relation)


def from_dp_accounting(event: Any, *, relation: Relation) -> Event:
    """The event that a dp-accounting ``DpEvent`` describes.

    Guarantee, Requires, Why: see the module.

    Args:
      event: an instance of a class of ``dp_accounting.dp_event``.
      relation: under which epsilon will be asked.

    Raises:
      InvalidParameter: not such an event, or a number in it lies outside its domain.
      Unsupported: no counterpart of the event here, or no theorem for it under this relation; an event that is not
        private at all.
    """
    relation = checked_relation(relation)
    return _covered(_ours(event, relation), relation)


def _covered(event: Event, relation: Relation) -> Event:
    """``event``, once it is clear that an accountant will take it under ``relation``."""
    atoms_under(event, relation)
    return event


def _shrink(relation: Relation) -> float:
    """Clipping norm / sensitivity."""
    return 0.5 if relation is Relation.REPLACE_ONE else 1.0


class _Entry(Value):
    noise_multiplier: PositiveFloat
    sample_rate: Probability
    steps: Count


def _triples(history: Any) -> Iterable[Any]:
    found = history.get("history") if isinstance(history, Mapping) else getattr(history, "history", history)
    if isinstance(found, list | tuple):
        return found
    raise InvalidParameter(
        f"{shown(history)} is no opacus history: give an accountant, its state dict, or a list of (noise_multiplier, "
        "sample_rate, steps)."
    )


def _entry(index: int, entry: Any) -> _Entry:
    if not isinstance(entry, list | tuple) or len(entry) != 3:
        raise InvalidParameter(f"history[{index}] = {shown(entry)}: it must be (noise_multiplier, sample_rate, steps).")
    try:
        return _Entry(*entry)
    except InvalidParameter as error:
        raise InvalidParameter(f"history[{index}]: {str(error).removeprefix('_Entry.')}") from None


def _passes(entries: list[_Entry]) -> list[int]:
    """In how many epochs each entry has a step: the most that a record can take part in it."""
    counts: list[int] = []
    epoch, done = 1, 0  # steps of an epoch, and how many of them were done before an entry; None: unknown
    for index, entry in enumerate(entries):
        if entry.sample_rate == 0:
            raise InvalidParameter(f"history[{index}]: sample_rate = 0: a shuffled epoch of that rate never ends.")
        before, epoch = epoch, max(1, _floor(1 / entry.sample_rate))
        if epoch != before and done != 0:
            done = None
        start = epoch - 1 if done is None else done
        counts.append((start + entry.steps - 1) // epoch + 1 if entry.steps else 0)
        done = None if done is None else (done + entry.steps) % epoch
    return counts


def _floor(x: float) -> int:
    """1/(1/n) may come out below n; a rate that far from 1/n has less than a record of a billion less."""
    return round(x) if abs(x - round(x)) <= 1e-9 * x else math.floor(x)


def _ours(event: Any, relation: Relation) -> Event:
    if type(event).__module__.split(".")[0] != "dp_accounting":
        raise InvalidParameter(f"{shown(event)} is no event of dp_accounting.dp_event.")
    match type(event).__name__:
        case "NoOpDpEvent":
            return Composed(())
        case "GaussianDpEvent":
            return Gaussian(_multiplier(event, relation))
        case "LaplaceDpEvent":
            return Laplace(_multiplier(event, relation))
        case "ComposedDpEvent":
            return Composed(tuple(_ours(part, relation) for part in event.events))
        case "SelfComposedDpEvent":
            return Repeated(_ours(event.event, relation), event.count)
        case "PoissonSampledDpEvent":
            return Poisson(event.sampling_probability, _ours(event.event, relation))
        case "SampledWithoutReplacementDpEvent":
            return WithoutReplacement(
                batch_size=event.sample_size,
                num_examples=event.source_dataset_size,
                event=_ours(event.event, relation),
            )
        case "TruncatedSubsampledGaussianDpEvent":
            # Their size counts the record that neighbours differ in; one that is added comes on top of it.
            others = event.dataset_size - (relation is not Relation.ADD_REMOVE)
            return TruncatedPoisson(
                sample_rate=event.sampling_probability,
                cap=event.truncated_batch_size,
                max_examples=others,
                event=Gaussian(_multiplier(event, relation)),
            )
        case "RepeatAndSelectDpEvent":
            from .selection import truncated_negative_binomial

            if math.isinf(event.shape):
                trials = PoissonTrials(event.mean)
            else:
                trials = truncated_negative_binomial(event.mean, event.shape)
            return Select(_ours(event.event, relation), trials)
        case "EpsilonDeltaDpEvent":
            return ApproximateDP(event.epsilon, event.delta)
        case "NonPrivateDpEvent":
            raise Unsupported("NonPrivateDpEvent: epsilon is infinite; there is nothing to account for.")
        case "SampledWithReplacementDpEvent":
            raise Unsupported(
                "SampledWithReplacementDpEvent: a record may enter a batch several times, for which there is no "
                "theorem here. Draw without replacement, or Poisson batches."
            )
        case name:
            raise Unsupported(
                f"{name} has no counterpart here. If its release is (epsilon, delta)-private, describe it as "
                "ApproximateDP(epsilon, delta)."
            )


def _multiplier(event: Any, relation: Relation) -> float:
    """Their multiplier relative to the sensitivity; of no noise at all it is said what that means."""
    noise = event.noise_multiplier
    if noise == 0:
        raise Unsupported(
            f"{type(event).__name__} without noise: epsilon is infinite; there is nothing to account for."
        )
    return Gaussian(noise).noise_multiplier * _shrink(relation)
