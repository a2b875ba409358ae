"""epsilon(event, delta): the smallest upper bound that an applicable accountant gives, and a lower bound beside it.

Guarantee: ``upper`` is an upper bound, and never NaN or negative; what no theorem covers raises ``Unsupported``.
Requires: a list of events that was fixed before the first release.
Why: every accountant here is an upper bound for such a list, so the minimum of several is one as well (same delta, same
relation, same events).  That is true inside one plan that was fixed before its first release.  It is not
true across plans that were chosen after seeing earlier results: there the ledger adds the plans' (epsilon, delta), or
keeps a filter (``privacy_filters.py``).

Never NaN, never negative; what no theorem covers raises ``Unsupported``.

Renyi accounting is not asked where the loss distribution gave both bounds as close as promised: it is an upper bound
too, so it cannot lie below the lower one.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Literal, NamedTuple

from . import gaussian, prv, rdp, selection
from .errors import InvalidParameter, Unsupported
from .events import Event, Gaussian, Poisson, Relation, Repeated, Select, TruncatedNegativeBinomial
from .normal_form import Counted, atoms_under
from .values import check_count, check_delta, check_epsilon, check_tolerance, shown

By = Literal["gaussian", "prv", "rdp", "selection"]

DESCRIPTIONS: dict[str, str] = {
    "gaussian": "exact Gaussian mechanism (Balle and Wang 2018)",
    "prv": "privacy loss distribution, upper bound (connected dots, exponentially tilted Fourier transform)",
    "rdp": "Renyi DP over wide orders (Mironov, Talwar and Zhang 2019; conversion of Canonne, Kamath and Steinke 2020)",
    "selection": "private selection from a random number of trials (Papernot and Steinke 2022; privacy profile)",
    "renyi_filter": "Renyi filter of orders fixed beforehand, at its whole budget (Feldman and Zrnic 2021)",
}


class Bound(NamedTuple):
    """Where the true value lies. Report ``upper``; ``lower`` is 0 where nothing is known from below."""

    lower: float
    estimate: float
    upper: float
    accountant: str


def epsilon(
    event: Event, delta: float, *, relation: Relation, by: By | None = None, tolerance: float | None = None
) -> Bound:
    """Epsilon of ``event`` at ``delta``: every pair of neighbours under ``relation`` is (upper, delta)-close.

    Guarantee: ``upper`` is a bound in both directions, never NaN and never negative; ``lower`` is not above the truth.
    Requires: an event that was fixed before its first release, and that describes what happened (nobody can check
    either here); a theorem for it under ``relation``, without which ``Unsupported`` is raised.
    Why: see the module; each accountant's module has its theorem and its rounding.

    Args:
      event: what touches the data, fixed before its first release.
      delta: in (0, 1); choose it well below 1/N.
      relation: the neighbouring relation, stated by the caller since it is half of the meaning of epsilon.
      by: one accountant by name; the default takes the best of those that apply.
      tolerance: how far apart upper and lower bound may be, where the numerical accountant applies; the default is 0.05
        percent of epsilon, and at least 1e-5. Less costs time.

    Raises:
      Unsupported: no accountant covers the event under this relation, or not the one that was named.
      InvalidParameter: delta outside (0, 1), a tolerance that is not positive, or an unknown relation or accountant.
    """
    delta, tolerance = check_delta(delta), check_tolerance(tolerance)

    def settled(bound: Bound) -> bool:
        promise = prv.default_tolerance(bound.upper) if tolerance is None else tolerance
        return bound.upper < math.inf and bound.upper - bound.lower <= promise

    return _best(
        event, relation, by, lambda accountant, atoms, kind: accountant.epsilon(atoms, delta, kind, tolerance), settled
    )


def delta(event: Event, epsilon: float, *, relation: Relation, by: By | None = None) -> Bound:
    """Delta of ``event`` at ``epsilon``, in [0, 1].

    Guarantee, Requires, Why: as of :func:`epsilon`.
    """
    epsilon = check_epsilon(epsilon)

    def settled(bound: Bound) -> bool:
        return 0 < bound.upper <= 1.003 * bound.lower

    return _best(event, relation, by, lambda accountant, atoms, kind: accountant.delta(atoms, epsilon, kind), settled)


def epsilon_curve(event: Event, steps: int, delta: float, *, relation: Relation) -> list[Bound]:
    """Epsilon after 1, 2, .., ``steps`` runs of ``event``: what :func:`epsilon` says of each, in far less time.

    Guarantee: each ``upper`` is a bound for a run of that many steps.
    Requires: that the run was planned to end there. One that stops because of what was seen has the epsilon of its
    planned steps.
    Why: as of :func:`epsilon`, with the composition of all steps computed once.

    Raises:
      Unsupported, InvalidParameter: as :func:`epsilon`; ``steps`` is negative or no whole number.
    """
    delta, steps, relation = check_delta(delta), check_count("steps", steps), checked_relation(relation)
    atoms = atoms_under(event, relation)
    intervals = _prv_curve(atoms, steps, delta, relation)
    if intervals is None:
        return [epsilon(Repeated(event=event, count=count), delta, relation=relation) for count in range(1, steps + 1)]
    found = [epsilon(event, delta, relation=relation)]
    for count, interval in enumerate(intervals[1:], start=2):
        bound = Bound(*interval, "prv")
        if not (bound.upper < math.inf and bound.upper - bound.lower <= prv.default_tolerance(bound.upper)):
            repeated = [(atom, count * times) for atom, times in atoms]
            bound = _smaller(bound, Bound(*_rdp_epsilon(repeated, delta, relation, None), "rdp"))
        found.append(bound)
    return found


def _prv_curve(atoms: Counted, steps: int, delta: float, relation: Relation) -> list[tuple[float, float, float]] | None:
    """None where the numerical accountant does not answer, or another one does exactly."""
    exact = all(isinstance(atom, Gaussian) for atom, _ in atoms)
    if not steps or exact or not _prv_covers([(atom, count * steps) for atom, count in atoms]):
        return None
    try:
        return prv.epsilon_curve(atoms, steps, delta, relation)
    except Unsupported:
        return None


class _Accountant(NamedTuple):
    covers: Callable[[Counted], bool]
    epsilon: Callable[[Counted, float, Relation, float | None], tuple[float, float, float]]
    delta: Callable[[Counted, float, Relation], tuple[float, float, float]]


def _gaussian_covers(atoms: Counted) -> bool:
    match atoms:
        case [(Poisson(event=Gaussian()), 1)]:
            return True
    return all(isinstance(atom, Gaussian) for atom, _ in atoms)


def _gaussian_epsilon(atoms: Counted, delta: float, *_: object) -> tuple[float, float, float]:
    match atoms:
        case [(Poisson(sample_rate=rate, event=Gaussian(noise_multiplier=noise)), 1)]:
            return gaussian.sampled_epsilon_bounds(1 / noise, rate, delta)
    return gaussian.epsilon_bounds(gaussian.mu_of(atoms), delta)


def _gaussian_delta(atoms: Counted, epsilon: float, *_: object) -> tuple[float, float, float]:
    match atoms:
        case [(Poisson(sample_rate=rate, event=Gaussian(noise_multiplier=noise)), 1)]:
            return gaussian.sampled_delta_bounds(1 / noise, rate, epsilon)
    return gaussian.delta_bounds(gaussian.mu_of(atoms), epsilon)


def _prv_covers(atoms: Counted) -> bool:
    return bool(atoms) and prv.covers(atoms)


def _rdp_epsilon(atoms: Counted, delta: float, relation: Relation, _: object) -> tuple[float, float, float]:
    upper = rdp.epsilon_upper(atoms, delta, relation)
    return 0.0, upper, upper


def _rdp_delta(atoms: Counted, epsilon: float, relation: Relation) -> tuple[float, float, float]:
    upper = rdp.delta_upper(atoms, epsilon, relation)
    return 0.0, upper, upper


def profile(event: Event, relation: Relation) -> Callable[[float], float]:
    """An upper bound of delta as a function of epsilon, cheap to ask a hundred times; else as :func:`delta`."""
    relation = checked_relation(relation)
    return _profile(atoms_under(event, relation), relation)


def _profile(atoms: Counted, relation: Relation) -> Callable[[float], float]:
    if all(isinstance(atom, Gaussian) for atom, _ in atoms):
        return lambda epsilon: _gaussian_delta(atoms, epsilon)[2]
    if not _prv_covers(atoms):
        return lambda epsilon: rdp.delta_upper(atoms, epsilon, relation)
    by_losses = prv.profile(atoms, relation)
    return lambda epsilon: min(by_losses(epsilon), rdp.delta_upper(atoms, epsilon, relation))


def _selection_epsilon(atoms: Counted, delta: float, relation: Relation, _: object) -> tuple[float, float, float]:
    select, base = _trial(atoms, relation)
    upper = selection.epsilon_bound(select.trials, delta, _profile(base, relation), rdp.log_moment(base, relation))
    # A score that ignores the data makes the best of the trials one trial like any other; if there is one for certain.
    lower = 0.0
    if isinstance(select.trials, TruncatedNegativeBinomial):
        lower = min(upper, epsilon(select.event, delta, relation=relation).lower)
    return lower, upper, upper


def _selection_delta(atoms: Counted, epsilon: float, relation: Relation) -> tuple[float, float, float]:
    select, base = _trial(atoms, relation)
    upper = min(
        selection.profile_delta(select.trials, epsilon, _profile(base, relation)),
        rdp.delta_upper(atoms, epsilon, relation),
    )
    return 0.0, upper, upper


def _trial(atoms: Counted, relation: Relation) -> tuple[Select, Counted]:
    [(select, _)] = atoms
    assert isinstance(select, Select)
    return select, atoms_under(select.event, relation)


def _selection_covers(atoms: Counted) -> bool:
    return len(atoms) == 1 and isinstance(atoms[0][0], Select) and atoms[0][1] == 1


_ACCOUNTANTS: dict[str, _Accountant] = {
    "gaussian": _Accountant(_gaussian_covers, _gaussian_epsilon, _gaussian_delta),
    "prv": _Accountant(_prv_covers, prv.epsilon_bounds, prv.delta_bounds),
    "selection": _Accountant(_selection_covers, _selection_epsilon, _selection_delta),
    "rdp": _Accountant(lambda atoms: True, _rdp_epsilon, _rdp_delta),
}
_NOT_COVERED = {
    "gaussian": "Gaussian releases without sampling, or one sampled one",
    "prv": "Gaussian, Laplace, pure and approximate DP and their samples, with noise that a double can hold",
    "selection": "one private selection on its own",
}


def _best(
    event: Event,
    relation: Relation,
    by: str | None,
    ask: Callable[[_Accountant, Counted, Relation], tuple[float, float, float]],
    settled: Callable[[Bound], bool],
) -> Bound:
    if by is not None and not (isinstance(by, str) and by in _ACCOUNTANTS):
        raise InvalidParameter(
            f"by = {shown(by)}: the accountants are {', '.join(_ACCOUNTANTS)}; leave it out for the best."
        )
    relation = checked_relation(relation)
    atoms = atoms_under(event, relation)
    if by is not None:
        if not _ACCOUNTANTS[by].covers(atoms):
            raise Unsupported(f"The {by} accountant covers {_NOT_COVERED[by]}; leave `by` out, or use by='rdp'.")
        return Bound(*ask(_ACCOUNTANTS[by], atoms, relation), by)
    best = None
    for name, accountant in _ACCOUNTANTS.items():
        if not accountant.covers(atoms):
            continue
        try:
            found = Bound(*ask(accountant, atoms, relation), name)
        except Unsupported:  # beyond the range of this one; the last one has no such range
            continue
        best = found if best is None else _smaller(best, found)
        if name == "gaussian" or settled(best):
            break
    assert best is not None
    return best


def _smaller(one: Bound, other: Bound) -> Bound:
    """Both are true of the same events: the lower upper bound, the higher lower bound."""
    best = min(one, other, key=lambda bound: bound.upper)
    low = min(max(one.lower, other.lower), best.upper)
    return best._replace(lower=low, estimate=min(max(low, best.estimate), best.upper))


def checked_relation(relation: Relation) -> Relation:
    """``relation``, or one of their names, as a member of the enum; InvalidParameter if there is no such relation."""
    try:
        return Relation(relation)
    except ValueError:
        names = ", ".join(member.value for member in Relation)
        raise InvalidParameter(f"relation = {shown(relation)}: it must be one of {names}.") from None
