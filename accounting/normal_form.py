"""Normal form of an event: which mechanisms touched the data, how often each, and under which relation that is private.

Guarantee: ``normal_form(event)`` is a list of ``(atom, count)`` whose composition is at least as revealing as the
event.  It is the only place that multiplies counts, so that no accountant can forget to.  ``atoms_under(event,
relation)`` is what accountants work on: it refuses every pair of atom and relation for which no theorem holds, and
replaces what is as revealing as something simpler (a pass over the data, correlated noise) by that.  It is the only
place with such rules.
Requires: events that describe what happened.
Why: the rest of this text.

**Queries on one batch are one mechanism.**  Gaussian releases with multipliers s_1, .., s_k on the *same* data are
together one Gaussian release with multiplier ``(sum s_i^-2)^(-1/2)``, adaptively chosen or not (Dong, Roth, Su 2022,
"Gaussian differential privacy", corollary 3.3: the composition is a post-processing of that one Gaussian pair).  A
post-processing acts on both branches "the record was drawn" and "it was not" alike, so the same merge holds inside
one subsample.  Counting them as two independently drawn subsamples would under-report.  Releases of other kinds stay
beside the Gaussian, inside the same sampling event and in a fixed order, so that equal batches are equal atoms.

**Noise per group.**  Groups of coordinates with clipping norms C_k and noise of standard deviation s_k: dividing group
k by s_k gives unit noise and a sensitivity of ``sqrt(sum (C_k/s_k)^2)``, hence one Gaussian release with multiplier
``(sum (C_k/s_k)^2)^(-1/2)``, which is :func:`joint_noise_multiplier`.  It covers side queries on the same batch too.

**Discrete Gaussians on one batch** stay apart, each with its count: no single pair of laws is known to be the worst
for all whole-numbered shifts of one length, so that what they are together is left to ``batch_moments.py``.

**One pass** (``OnePass``).  Fix the order of the records.  Neighbours under zero-out and replace-one then differ in one
batch only, so all other releases have the same law on both sides, whatever was released before them; what is left is
one release of the inner event.  A shuffled order is a mixture over orders, with the same weights on both sides, and
hockey-stick divergences are jointly convex.  Under add-or-remove-one a removal shifts every later batch, and nothing of
this holds.

**Correlated noise** (``MatrixMechanism``).  ``C G + Z`` is a Gaussian release of sensitivity ``sens(C)`` in units of
one participation, and multiplying by ``C^-1`` is post-processing: ``Gaussian(noise_multiplier / sensitivity)``.
Participations at fixed distances need a fixed order, so the relations are those of one pass.

**A batch of everything** (``WithoutReplacement`` with ``batch_size == num_examples``).  The subset is the data set, so
that it is its inner event; but only while the size stays what it is, so the relation is still replace-one.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence

from pydantic import TypeAdapter, ValidationError

from .errors import InvalidParameter, Unsupported
from .events import (
    ApproximateDP,
    Composed,
    DiscreteGaussian,
    Event,
    Gaussian,
    Laplace,
    MatrixMechanism,
    OnePass,
    Poisson,
    PureDP,
    Relation,
    Repeated,
    Select,
    TruncatedPoisson,
    WithoutReplacement,
)
from .values import PositiveFloat, explain

Plain = Gaussian | DiscreteGaussian | Laplace | ApproximateDP
"""Atoms that look at all the data they are given, once."""
Atom = Plain | Poisson | TruncatedPoisson | WithoutReplacement | OnePass | MatrixMechanism | Select
Counted = list[tuple[Atom, int]]

# 1/sqrt of a sum of squared quotients is off by at most 8 units of 2^-53; this takes 16 away.
_ROUND_DOWN = 1 - 2**-49


def normal_form(event: Event) -> Counted:
    """The atoms of ``event`` with their counts (each at least 1), equal atoms merged, in order of first appearance.

    Guarantee: their composition is at least as revealing as ``event``.
    Requires: nothing; what no theorem covers is refused.
    Why: see the module; it has the proof of every merge.

    Raises:
      Unsupported: sampling inside sampling and the like, for which no theorem is implemented here.
      InvalidParameter: more releases of one mechanism than a double can count.
    """
    return _collected(_atoms(event))


def atoms_under(event: Event, relation: Relation) -> Counted:
    """What an accountant composes.

    Guarantee: it is as revealing as ``event``, or more, to who compares neighbours under ``relation``.
    Requires: a theorem for each atom under ``relation``, without which it is refused.
    Why: see the module.

    The atoms are Gaussian, DiscreteGaussian, Laplace, ApproximateDP, Poisson, TruncatedPoisson, WithoutReplacement and
    Select.

    Raises:
      Unsupported: no theorem covers an atom under this relation; the message says which, why and the way out.
      InvalidParameter: as :func:`normal_form`.
    """
    atoms = normal_form(event)
    for atom, _ in atoms:
        check_relation(atom, relation)
    return _collected((simple, count * times) for atom, count in atoms for simple, times in _simpler(atom))


def check_relation(atom: Atom, relation: Relation) -> None:
    """Returns if a theorem covers ``atom`` under ``relation``; raises Unsupported with the reason if not."""
    match atom:
        case Select(event=event):
            atoms_under(event, relation)
        case Poisson() | TruncatedPoisson() if relation is Relation.REPLACE_ONE:
            raise Unsupported(
                f"{atom.kind} sampling under replace_one has no theorem here. State the guarantee for add_remove or "
                "zero_out, or release the sum over all records without sampling."
            )
        case WithoutReplacement() if relation is not Relation.REPLACE_ONE:
            raise Unsupported(
                f"without_replacement under {relation.value} has no theorem here: a batch of fixed size tells of the "
                "record that is missing by the one that takes its place. State the guarantee for replace_one (with "
                "the noise multiplier of its sensitivity, 2C), or draw Poisson batches."
            )
        case OnePass() | MatrixMechanism() if relation is Relation.ADD_REMOVE:
            raise Unsupported(
                f"{atom.kind} under add_remove has no theorem here: removing a record shifts every later batch. State "
                "the guarantee for zero_out or replace_one, or draw Poisson batches."
            )


def joint_noise_multiplier(clip_norms: Sequence[float], noise_stds: Sequence[float]) -> float:
    """``(sum (C_k/s_k)^2)^(-1/2)``, never above it: the one multiplier of Gaussian releases on the same batch.

    Guarantee: one Gaussian release of this multiplier is at least as revealing as all of them together.
    Requires: independent noise, and sensitivities that hold in each group for all neighbours.
    Why: divided by their s_k, the groups are one vector with unit noise; see the module.

    Args:
      clip_norms: C_k, the L2 sensitivity of each group of coordinates, or of each query.
      noise_stds: s_k, the standard deviation of its noise, in the same units.

    Raises:
      InvalidParameter: no group, lists of different lengths, or a number that is not positive and finite.
    """
    if len(clip_norms) != len(noise_stds) or not len(clip_norms):
        raise InvalidParameter(
            f"{len(clip_norms)} clip_norms and {len(noise_stds)} noise_stds: give one of each for every group."
        )
    pairs = zip(_positive("clip_norms", clip_norms), _positive("noise_stds", noise_stds), strict=True)
    quotients = [norm / std for norm, std in pairs]
    largest = max(quotients)  # taken out of the root, or the square might overflow
    return 1 / math.sqrt(math.fsum((x / largest) ** 2 for x in quotients)) / largest * _ROUND_DOWN


def merged(gaussians: Counted) -> Gaussian:
    """The one Gaussian that equals all of ``gaussians`` on the same data, its multiplier never rounded up."""
    match gaussians:
        case [(Gaussian() as only, 1)]:
            return only
    return Gaussian(noise_multiplier=1 / math.sqrt(precision(gaussians)) * _ROUND_DOWN)


def precision(gaussians: Counted) -> float:
    """``sum count / noise_multiplier^2``, the inverse square of what all of ``gaussians`` together amount to."""
    return math.fsum(count / atom.noise_multiplier**2 for atom, count in gaussians if isinstance(atom, Gaussian))


def _collected(pairs: Iterable[tuple[Atom, int]]) -> Counted:
    counts: dict[Atom, int] = {}
    for atom, count in pairs:
        counts[atom] = counts.get(atom, 0) + count
    if max(counts.values(), default=0) >= 2**53:
        raise InvalidParameter("The counts of the event multiply to 2^53 or more: give the steps of a real run.")
    return [(atom, count) for atom, count in counts.items() if count > 0]


def _atoms(event: Event) -> Counted:
    match event:
        case PureDP(epsilon=epsilon):
            return _atoms(ApproximateDP(epsilon=epsilon, delta=0.0))
        case ApproximateDP(epsilon=0.0, delta=0.0):  # the same output law for all data sets
            return []
        case Gaussian() | DiscreteGaussian() | Laplace() | ApproximateDP() | MatrixMechanism():
            return [(event, 1)]
        case Composed(events=events):
            return [pair for part in events for pair in normal_form(part)]
        case Repeated(event=part, count=count):
            return [(atom, count * times) for atom, times in normal_form(part)] if count else []
        case OnePass():
            return [(OnePass(event=atom), count) for atom, count in _on_one_batch(event)]
        case Poisson(sample_rate=rate):
            batch = _on_one_batch(event)
            if rate == 1:
                return batch
            return [(Poisson(sample_rate=rate, event=_together(batch)), 1)] if batch and rate > 0 else []
        case TruncatedPoisson(sample_rate=rate, cap=cap, max_examples=most):
            if cap > most:  # no draw can exceed the cap, so nothing is ever cut
                return _atoms(Poisson(sample_rate=rate, event=event.event))
            batch = _only_gaussian(event)
            if not batch or rate == 0:
                return []
            return [(TruncatedPoisson(sample_rate=rate, cap=cap, max_examples=most, event=batch[0][0]), 1)]
        case WithoutReplacement(batch_size=size, num_examples=all_):
            batch = _on_one_batch(event)
            if size < all_ and any(isinstance(atom, DiscreteGaussian) for atom, _ in batch):
                raise Unsupported(
                    "without_replacement around discrete_gaussian: what a batch of fixed size hides is proved for "
                    "releases with one worst pair of laws, and none is known for discrete noise. Draw Poisson batches, "
                    "or use Gaussian noise (dpkit.HardenedGaussian)."
                )
            return [(WithoutReplacement(size, all_, event=_together(batch)), 1)] if batch else []
        case Select(event=part):
            return [(event, 1)] if normal_form(part) else []
        case _:
            raise InvalidParameter(f"{event!r} is not an event; build one from the classes of accounting.events.")


def _simpler(atom: Atom) -> Counted:
    match atom:
        case OnePass(event=part):
            return normal_form(part)
        case MatrixMechanism(noise_multiplier=noise, sensitivity=sensitivity):
            return [
                (Gaussian(noise_multiplier=noise if sensitivity == 1 else math.nextafter(noise / sensitivity, 0)), 1)
            ]
        case WithoutReplacement(batch_size=size, num_examples=all_, event=part) if size == all_:
            return normal_form(part)
    return [(atom, 1)]


def _on_one_batch(event: Poisson | TruncatedPoisson | WithoutReplacement | OnePass) -> Counted:
    """All queries on one batch: the Gaussians as one, then the others, in an order that depends on nothing else."""
    inner = normal_form(event.event)
    if foreign := [atom for atom, _ in inner if not isinstance(atom, Plain)]:
        raise Unsupported(f"{event.kind} around {foreign[0].kind}: {_NO_THEOREM_AROUND[foreign[0].kind]}")
    gaussians = [pair for pair in inner if isinstance(pair[0], Gaussian)]
    others = [pair for pair in inner if not isinstance(pair[0], Gaussian)]
    others.sort(key=lambda pair: (pair[0].kind, *dict(pair[0]).values()))
    return [*([(merged(gaussians), 1)] if gaussians else []), *others]


_SAMPLING_INSIDE = (
    "sampling inside sampling has no theorem here. Multiply the rates yourself if the inner draw happens once, or "
    "charge the outer event only."
)
_WHOLE_RUN_INSIDE = (
    "that is a whole run over the data, and no theorem here covers it on a part of the data. Charge it without the "
    "outer event."
)
_NO_THEOREM_AROUND = {
    "poisson": _SAMPLING_INSIDE,
    "truncated_poisson": _SAMPLING_INSIDE,
    "without_replacement": _SAMPLING_INSIDE,
    "one_pass": _WHOLE_RUN_INSIDE,
    "matrix_mechanism": _WHOLE_RUN_INSIDE,
    "select": _WHOLE_RUN_INSIDE,
}


def _only_gaussian(event: TruncatedPoisson) -> Counted:
    batch = _on_one_batch(event)
    if foreign := [atom for atom, _ in batch if not isinstance(atom, Gaussian)]:
        raise Unsupported(
            f"truncated_poisson around {foreign[0].kind}: what truncation reveals is proved for Gaussian noise only. "
            "Use Gaussian noise (dpkit.HardenedGaussian, where it was meant to be secure), or Poisson batches without "
            "a cap (no max_physical_batch_size in make_private; the functional form needs no cap)."
        )
    return batch


def _together(batch: Counted) -> Event:
    """The queries on one batch as one event."""
    match batch:
        case [(only, 1)]:
            return only
    return Composed(tuple(atom if count == 1 else Repeated(atom, count) for atom, count in batch))


_POSITIVES = TypeAdapter(list[PositiveFloat])


def _positive(name: str, numbers: Sequence[float]) -> list[float]:
    try:
        return _POSITIVES.validate_python(list(numbers))
    except ValidationError as error:
        raise InvalidParameter(f"{name}{explain(error)}") from None
