"""epsilon(event, delta): the smallest upper bound that an applicable accountant gives.

Every accountant here is an upper bound for a fixed list of events, so the minimum of several is one as well (same
delta, same relation, same events).  That is true inside one plan that was fixed before its first release.  It is not
true across plans that were chosen after seeing earlier results: there add the plans' (epsilon, delta), as the ledger
does.

Never NaN, never negative; what no theorem covers raises ``Unsupported``.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Literal, NamedTuple

from . import gaussian, rdp
from .errors import InvalidParameter, Unsupported
from .events import Event, Gaussian, Relation
from .normal_form import Counted, normal_form
from .values import check_delta, check_epsilon, shown

By = Literal["gaussian", "rdp"]

DESCRIPTIONS: dict[str, str] = {
    "gaussian": "exact Gaussian mechanism (Balle and Wang 2018)",
    "rdp": "Renyi DP over wide orders (Mironov, Talwar and Zhang 2019; conversion of Canonne, Kamath and Steinke 2020)",
}


class Bound(NamedTuple):
    """Where the true value lies. Report ``upper``; ``lower`` is 0 where nothing is known from below."""

    lower: float
    estimate: float
    upper: float
    accountant: str


def epsilon(event: Event, delta: float, *, relation: Relation, by: By | None = None) -> Bound:
    """Epsilon of ``event`` at ``delta``: every pair of neighbours under ``relation`` is (upper, delta)-close.

    Args:
      event: what touches the data, fixed before its first release.
      delta: in (0, 1); choose it well below 1/N.
      relation: the neighbouring relation, stated by the caller since it is half of the meaning of epsilon.
      by: one accountant by name; the default takes the best of those that apply.

    Raises:
      Unsupported: no accountant covers the event under this relation, or not the one that was named.
      InvalidParameter: delta outside (0, 1), or an unknown relation or accountant.
    """
    delta = check_delta(delta)
    return _best(event, relation, by, lambda accountant, atoms, kind: accountant.epsilon(atoms, delta, kind))


def delta(event: Event, epsilon: float, *, relation: Relation, by: By | None = None) -> Bound:
    """Delta of ``event`` at ``epsilon``, in [0, 1]; otherwise as :func:`epsilon`."""
    epsilon = check_epsilon(epsilon)
    return _best(event, relation, by, lambda accountant, atoms, kind: accountant.delta(atoms, epsilon, kind))


class _Accountant(NamedTuple):
    covers: Callable[[Counted], bool]
    epsilon: Callable[[Counted, float, Relation], tuple[float, float, float]]
    delta: Callable[[Counted, float, Relation], tuple[float, float, float]]


def _only_upper(bound: Callable[[Counted, float, Relation], float]):
    def triple(atoms: Counted, at: float, relation: Relation) -> tuple[float, float, float]:
        upper = bound(atoms, at, relation)
        return 0.0, upper, upper

    return triple


_ACCOUNTANTS: dict[str, _Accountant] = {
    "gaussian": _Accountant(
        covers=lambda atoms: all(isinstance(atom, Gaussian) for atom, _ in atoms),
        epsilon=lambda atoms, delta, _: gaussian.epsilon_bounds(gaussian.mu_of(atoms), delta),
        delta=lambda atoms, epsilon, _: gaussian.delta_bounds(gaussian.mu_of(atoms), epsilon),
    ),
    "rdp": _Accountant(
        covers=lambda atoms: True,
        epsilon=_only_upper(rdp.epsilon_upper),
        delta=_only_upper(rdp.delta_upper),
    ),
}


def _best(
    event: Event,
    relation: Relation,
    by: str | None,
    ask: Callable[[_Accountant, Counted, Relation], tuple[float, float, float]],
) -> Bound:
    if by is not None and not (isinstance(by, str) and by in _ACCOUNTANTS):
        raise InvalidParameter(
            f"by = {shown(by)}: the accountants are {', '.join(_ACCOUNTANTS)}; leave it out for the best."
        )
    relation = _relation(relation)
    atoms = normal_form(event)
    bounds = [
        Bound(*ask(accountant, atoms, relation), accountant=name)
        for name, accountant in _ACCOUNTANTS.items()
        if by in (None, name) and accountant.covers(atoms)
    ]
    if not bounds:
        raise Unsupported(f"The {by} accountant does not cover sampled events; leave `by` out, or use by='rdp'.")
    return min(bounds, key=lambda bound: bound.upper)


def _relation(relation: Relation) -> Relation:
    try:
        return Relation(relation)
    except ValueError:
        names = ", ".join(member.value for member in Relation)
        raise InvalidParameter(f"relation = {shown(relation)}: it must be one of {names}.") from None
