"""The same event by independent libraries, where they are installed and sound. Never the reported value.

A library that is absent, does not know the event, or is not sound in the range gives a row that says so.  Below
delta = 1e-9 double-precision FFT noise makes numerical accountants report too little, and beyond 1e5 steps they do not
finish, so they are not asked there.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable
from typing import NamedTuple

import numpy as np

from .errors import Unsupported
from .events import Event, Gaussian, Poisson, Relation, TruncatedPoisson
from .normal_form import Counted, normal_form
from .values import check_delta

_LEAST_DELTA = 1e-9
_MOST_STEPS = 100_000
_EPS_ERROR = 0.01


class Check(NamedTuple):
    """What one library says. ``lower`` and ``upper`` are None where it gives none; ``note`` says why.

    An ``upper`` here is only as good as the library; a reported epsilon below ``lower`` is a contradiction.
    """

    library: str
    version: str
    method: str
    lower: float | None
    upper: float | None
    note: str = ""

    def contradicts(self, reported: float) -> bool:
        """True if this library proves that the reported epsilon is too small."""
        return self.lower is not None and reported < self.lower


def crosscheck(event: Event, delta: float, *, relation: Relation) -> list[Check]:
    """One row per library and method, in a fixed order; slow (seconds) compared with :func:`accounting.epsilon`.

    Raises:
      InvalidParameter: delta outside (0, 1).
      Unsupported: the event has no normal form.
    """
    delta = check_delta(delta)
    atoms = normal_form(event)
    return [_ask(judge, atoms, delta, Relation(relation)) for judge in _JUDGES]


Interval = tuple[float | None, float | None]


class _Judge(NamedTuple):
    library: str
    method: str
    interval: Callable[[Counted, float, Relation], Interval]


def _ask(judge: _Judge, atoms: Counted, delta: float, relation: Relation) -> Check:
    from importlib.metadata import PackageNotFoundError, version  # slow to import, and needed only here

    library, method, interval = judge
    try:
        release = version(library)
    except PackageNotFoundError:
        return Check(library, "", method, None, None, "not installed")

    def silent(reason: str) -> Check:
        return Check(library, release, method, None, None, reason)

    if method != "rdp" and delta < _LEAST_DELTA:
        return silent(f"not asked below delta {_LEAST_DELTA:g}: rounding in its FFT")
    if method != "rdp" and sum(count for _, count in atoms) > _MOST_STEPS:
        return silent(f"not asked beyond {_MOST_STEPS} steps: it does not finish")
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # theirs are about their own grids and orders
            lower, upper = interval(atoms, delta, relation)
    except Unsupported as error:
        return silent(str(error))
    except ImportError as error:
        return silent(f"cannot be imported: {error}")
    except (RuntimeError, ValueError, MemoryError, OverflowError) as error:
        return silent(f"gave no answer: {type(error).__name__}: {error}")
    return Check(library, release, method, _clamp(lower), _clamp(upper))


def _clamp(bound: float | None) -> float | None:
    """Their lower bounds may be negative where the truth is next to nothing."""
    return None if bound is None else max(0.0, float(bound))


def _pairs(atoms: Counted, relation: Relation) -> list[tuple[float, float, int]]:
    """(noise multiplier, rate, count) of every atom, or Unsupported."""
    found = []
    for atom, count in atoms:
        match atom:
            case Gaussian(noise_multiplier=noise):
                found.append((noise, 1.0, count))
            case Poisson(sample_rate=rate, event=Gaussian(noise_multiplier=noise)) if (
                relation is not Relation.REPLACE_ONE
            ):
                found.append((noise, rate, count))
            case _:
                raise Unsupported(f"does not know {atom.kind} under {relation.value}")
    return found


def _prv_accountant(atoms: Counted, delta: float, relation: Relation) -> Interval:
    from prv_accountant import PRVAccountant
    from prv_accountant.privacy_random_variables import PoissonSubsampledGaussianMechanism

    pairs = _pairs(atoms, relation)
    if not pairs:
        return 0.0, 0.0
    accountant = PRVAccountant(
        prvs=[PoissonSubsampledGaussianMechanism(sampling_probability=q, noise_multiplier=s) for s, q, _ in pairs],
        max_self_compositions=[count for _, _, count in pairs],
        eps_error=_EPS_ERROR,
        delta_error=delta / 1000,
    )
    lower, _, upper = accountant.compute_epsilon(delta, [count for _, _, count in pairs])
    return lower, upper


def _opacus_rdp(atoms: Counted, delta: float, relation: Relation) -> Interval:
    from opacus.accountants.analysis.rdp import compute_rdp, get_privacy_spent
    from opacus.accountants.rdp import RDPAccountant

    orders = RDPAccountant.DEFAULT_ALPHAS
    total = np.zeros(len(orders))
    for noise, rate, count in _pairs(atoms, relation):
        total += compute_rdp(q=rate, noise_multiplier=noise, steps=count, orders=orders)
    return None, get_privacy_spent(orders=orders, rdp=total.tolist(), delta=delta)[0] if atoms else 0.0


def _dp_accounting_rdp(atoms: Counted, delta: float, relation: Relation) -> Interval:
    from dp_accounting.rdp import RdpAccountant

    return None, _dp_accounting(RdpAccountant(neighboring_relation=_their(relation)), atoms, delta)


def _dp_accounting_pld(atoms: Counted, delta: float, relation: Relation) -> Interval:
    from dp_accounting.pld import PLDAccountant

    return None, _dp_accounting(PLDAccountant(neighboring_relation=_their(relation)), atoms, delta)


def _dp_accounting(accountant, atoms: Counted, delta: float) -> float:
    from dp_accounting import dp_event as theirs
    from dp_accounting.privacy_accountant import UnsupportedEventError

    for atom, count in atoms:
        match atom:
            case Gaussian(noise_multiplier=noise):
                event = theirs.GaussianDpEvent(noise)
            case Poisson(sample_rate=rate, event=Gaussian(noise_multiplier=noise)):
                event = theirs.PoissonSampledDpEvent(rate, theirs.GaussianDpEvent(noise))
            case TruncatedPoisson(event=Gaussian(noise_multiplier=noise)):
                event = theirs.TruncatedSubsampledGaussianDpEvent(
                    dataset_size=atom.max_examples + 1,
                    sampling_probability=atom.sample_rate,
                    truncated_batch_size=atom.cap,
                    noise_multiplier=noise,
                )
            case _:
                raise Unsupported(f"does not know {atom.kind}")
        try:
            accountant.compose(event, count)
        except UnsupportedEventError as error:
            raise Unsupported(f"does not know {atom.kind} here: {error}") from None
    return accountant.get_epsilon(delta)


def _their(relation: Relation):
    from dp_accounting.privacy_accountant import NeighboringRelation

    return {
        Relation.ADD_REMOVE: NeighboringRelation.ADD_OR_REMOVE_ONE,
        Relation.REPLACE_ONE: NeighboringRelation.REPLACE_ONE,
        Relation.ZERO_OUT: NeighboringRelation.REPLACE_SPECIAL,
    }[relation]


_JUDGES = (
    _Judge("prv-accountant", "prv", _prv_accountant),
    _Judge("opacus", "rdp", _opacus_rdp),
    _Judge("dp-accounting", "rdp", _dp_accounting_rdp),
    _Judge("dp-accounting", "pld", _dp_accounting_pld),
)
