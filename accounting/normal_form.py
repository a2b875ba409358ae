"""Normal form of an event: which mechanisms touched the data, and how often each.

``normal_form(event)`` is a list of ``(atom, count)`` whose composition is at least as revealing as the event.  Atoms
are ``Gaussian``, ``Poisson(q, Gaussian)`` and ``TruncatedPoisson(q, cap, n, Gaussian)``.  This is the only place that
multiplies counts, so that no accountant can forget to.

**Queries on one batch are one mechanism.**  Gaussian releases with multipliers s_1, .., s_k on the *same* data are
together one Gaussian release with multiplier ``(sum s_i^-2)^(-1/2)``, adaptively chosen or not (Dong, Roth, Su 2022,
"Gaussian differential privacy", corollary 3.3: the composition is a post-processing of that one Gaussian pair).  A
post-processing acts on both branches "the record was drawn" and "it was not" alike, so the same merge holds inside
one subsample.  Counting them as two independently drawn subsamples would under-report.
"""

from __future__ import annotations

import math

from .errors import InvalidParameter, Unsupported
from .events import Composed, Event, Gaussian, Poisson, Repeated, TruncatedPoisson

Atom = Gaussian | Poisson | TruncatedPoisson
Counted = list[tuple[Atom, int]]


def normal_form(event: Event) -> Counted:
    """The atoms of ``event`` with their counts (each at least 1), equal atoms merged, in order of first appearance.

    Raises:
      Unsupported: sampling inside sampling, for which no theorem is implemented here.
      InvalidParameter: more releases of one mechanism than a double can count.
    """
    counts: dict[Atom, int] = {}
    for atom, count in _atoms(event):
        counts[atom] = counts.get(atom, 0) + count
    if max(counts.values(), default=0) >= 2**53:
        raise InvalidParameter("The counts of the event multiply to 2^53 or more: give the steps of a real run.")
    return [(atom, count) for atom, count in counts.items() if count > 0]


def merged(gaussians: Counted) -> Gaussian:
    """The one Gaussian that equals all of ``gaussians`` on the same data."""
    return Gaussian(noise_multiplier=precision(gaussians) ** -0.5)


def precision(gaussians: Counted) -> float:
    """``sum count / noise_multiplier^2``, the inverse square of what all of ``gaussians`` together amount to."""
    return math.fsum(count / atom.noise_multiplier**2 for atom, count in gaussians if isinstance(atom, Gaussian))


def _atoms(event: Event) -> Counted:
    match event:
        case Gaussian():
            return [(event, 1)]
        case Composed(events=events):
            return [pair for part in events for pair in normal_form(part)]
        case Repeated(event=part, count=count):
            return [(atom, count * times) for atom, times in normal_form(part)] if count else []
        case Poisson(sample_rate=rate):
            inner = _on_one_batch(event)
            if inner is None or rate == 0:
                return []
            return [(inner if rate == 1 else Poisson(sample_rate=rate, event=inner), 1)]
        case TruncatedPoisson(sample_rate=rate, cap=cap, max_examples=most):
            inner = _on_one_batch(event)
            if cap > most:  # no draw can exceed the cap, so nothing is ever cut
                return _atoms(Poisson(sample_rate=rate, event=event.event))
            if inner is None or rate == 0:
                return []
            return [(TruncatedPoisson(sample_rate=rate, cap=cap, max_examples=most, event=inner), 1)]
        case _:
            raise InvalidParameter(f"{event!r} is not an event; build one from the classes of accounting.events.")


def _on_one_batch(sampled: Poisson | TruncatedPoisson) -> Gaussian | None:
    """All queries on one subsample as one Gaussian; None if there are none."""
    inner = normal_form(sampled.event)
    if foreign := [atom for atom, _ in inner if not isinstance(atom, Gaussian)]:
        raise Unsupported(
            f"{sampled.kind} around {foreign[0].kind}: sampling inside sampling has no theorem here. "
            "Multiply the rates yourself if the inner draw happens once, or charge the outer event only."
        )
    return merged(inner) if inner else None
