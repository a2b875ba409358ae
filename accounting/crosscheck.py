"""The same event by independent libraries, where they are installed and sound. Never the reported value.

A library that is absent, does not know the event, or is not sound in the range gives a row that says so:

* Below delta = 1e-9 the rounding of double-precision FFTs makes numerical accountants report too little, and beyond
  1e5 steps most do not finish, so they are not asked there.
* prv-accountant needs an 80-bit long double.  Its window for pure DP rests on a Renyi divergence that is too small (200
  releases of 1-DP at delta 1e-5: it says 106, the exact value is 141.8), so it is not asked about those.
* opacus PRV computes in double precision but checks its rounding as if it had 80 bits, so what counts is the lower end
  of its interval; its upper end is shown and proves nothing.
* Both PRV accountants find the mean of the loss by quadrature, which goes wrong without a warning where the window is
  far wider than the loss of a step (noise 0.2, rate 0.1, 1000 steps, delta 1e-6: prv-accountant with an error of 0.9
  said [1501.1, 1502.9], the true value is 1497.45).  The mean is computed here too, and where they differ the answer
  is not used.
* dp-accounting's PLD is asked twice, rounding losses up for ``upper`` and down for ``lower``; it looks at both
  directions, the others at removal only.

What our events call a noise multiplier is relative to the sensitivity under the relation.  The libraries are therefore
asked about the pair of laws that the event stands for, which is the same whatever the relation is called.
"""

from __future__ import annotations

import math
import warnings
from collections.abc import Callable
from functools import reduce
from typing import NamedTuple

import numpy as np

from . import rdp
from .accountant import checked_relation
from .errors import Unsupported
from .events import (
    ApproximateDP,
    Event,
    Gaussian,
    Laplace,
    Poisson,
    PoissonTrials,
    Relation,
    Select,
    TruncatedNegativeBinomial,
    TruncatedPoisson,
    WithoutReplacement,
)
from .normal_form import Atom, Counted, atoms_under
from .values import check_delta

_LEAST_DELTA = 1e-9
_MOST_STEPS = 100_000
_MOST_CELLS = 2**20
_EPS_ERROR = 0.01
_LARGEST_EPS_ERROR = 0.5  # of opacus' domain its authors say that it is right below 1
_MOST_IN_A_DOUBLE = 600.0  # e^-epsilon loses its digits from 708 on, and lower ends are wrong by up to 1 there
_DOUBLE_NOISE = 1e-11  # what rounding in a double-precision FFT was seen to add to a delta, and more


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
      InvalidParameter: delta outside (0, 1), or an unknown relation.
      Unsupported: the event is not covered under this relation; there is nothing to check.
    """
    delta, relation = check_delta(delta), checked_relation(relation)
    atoms = atoms_under(event, relation)
    return [_ask(judge, atoms, delta, relation) for judge in _JUDGES]


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

    if not atoms:
        return Check(library, release, method, 0.0, 0.0)
    if method != "rdp" and delta < _LEAST_DELTA:
        return silent(f"not asked below delta {_LEAST_DELTA:g}: rounding in its FFT")
    if method != "rdp" and sum(count for _, count in atoms) > _MOST_STEPS:
        return silent(f"not asked beyond {_MOST_STEPS} steps: it does not finish")
    try:
        with warnings.catch_warnings(), np.errstate(all="ignore"):
            warnings.simplefilter("ignore")  # theirs are about their own grids and orders
            lower, upper = interval(atoms, delta, relation)
    except Unsupported as error:
        return silent(str(error))
    except ImportError as error:
        return silent(f"cannot be imported: {error}")
    except (ArithmeticError, AssertionError, MemoryError, RuntimeError, ValueError) as error:
        return silent(f"gave no answer: {type(error).__name__}: {error}".rstrip(": "))
    for bound in (lower, upper):
        if bound is not None and not math.isfinite(bound):  # e^epsilon is beyond the range of its doubles
            return silent(f"gave no answer: {bound}")
    return Check(library, release, method, _clamp(lower), _clamp(upper))


def _clamp(bound: float | None) -> float | None:
    """Their lower bounds may be negative where the truth is next to nothing."""
    return None if bound is None else max(0.0, float(bound))


def _unknown(atom: Atom) -> Unsupported:
    inner = getattr(atom, "event", None)
    return Unsupported(f"does not know {atom.kind}" + (f" of {inner.kind}" if inner is not None else ""))


def _pairs(atoms: Counted) -> list[tuple[float, float, int]]:
    """(noise multiplier, rate, count) of every atom, or Unsupported."""
    found = []
    for atom, count in atoms:
        match atom:
            case Gaussian(noise_multiplier=noise):
                found.append((noise, 1.0, count))
            case Poisson(sample_rate=rate, event=Gaussian(noise_multiplier=noise)):
                found.append((noise, rate, count))
            case _:
                raise _unknown(atom)
    return found


def _width(atoms: Counted, delta: float, relation: Relation) -> float:
    """Half the width of the interval to ask a PRV accountant for: more where the usual one needs too much memory.

    Both libraries lay cells of ``eps_error / sqrt(steps log(12/delta_error) / 2)`` over a window that they find by
    Renyi accounting.
    """
    window = 2 * (rdp.epsilon_upper(atoms, delta / 4000, relation) + 4)
    steps = sum(count for _, count in atoms)
    cells_for_one = window * math.sqrt(steps * math.log(12_000 / delta) / 2)
    if cells_for_one > _MOST_CELLS * _LARGEST_EPS_ERROR:
        raise Unsupported(f"not asked: an interval of +-{_LARGEST_EPS_ERROR} would need {cells_for_one * 2:.1g} cells")
    return max(_EPS_ERROR, cells_for_one / _MOST_CELLS)


def _check_mean(atoms: Counted, theirs: float, eps_error: float) -> None:
    """Raises Unsupported where quadrature gave a PRV accountant another mean of the loss than the true one.

    It moves all losses by the difference, whatever that is, and neither end of its interval holds then.
    """
    true = math.fsum(count * _mean_loss(atom) for atom, count in atoms)
    if not abs(theirs - true) <= eps_error / 4:
        raise Unsupported(f"not sound here: its mean of the loss is {float(theirs):.6g}, the true one {true:.6g}")


def _mean_loss(atom: Atom) -> float:
    """Expectation of log(P/Q) under P in one step: P with the record, Q without."""
    match atom:
        case Gaussian(noise_multiplier=noise):
            return 0.5 / noise**2
        case Laplace(noise_multiplier=noise):
            return 1 / noise + math.expm1(-1 / noise)
        case Poisson(sample_rate=rate, event=Gaussian(noise_multiplier=noise)):
            outcome = np.linspace(-12, 12, 8193)
            likely = np.exp(-(outcome**2) / 2)
            centre = outcome / noise
            missed, drawn = (
                likely @ np.logaddexp(math.log1p(-rate), math.log(rate) + centre + sign * 0.5 / noise**2)
                for sign in (-1, 1)
            )
            return float(((1 - rate) * missed + rate * drawn) / likely.sum())
    raise _unknown(atom)


def _prv_accountant(atoms: Counted, delta: float, relation: Relation) -> Interval:
    from prv_accountant import PRVAccountant
    from prv_accountant.privacy_random_variables import LaplaceMechanism, PoissonSubsampledGaussianMechanism

    if np.finfo(np.longdouble).eps > 1e-18:
        raise Unsupported("not asked: it needs an 80-bit long double, which this machine does not have")

    def variable(atom: Atom):
        if isinstance(atom, Laplace):
            return LaplaceMechanism(1 / atom.noise_multiplier)
        if isinstance(atom, ApproximateDP):
            raise Unsupported("not asked about approximate_dp: its window is too small there")
        ((noise, rate, _),) = _pairs([(atom, 1)])
        return PoissonSubsampledGaussianMechanism(sampling_probability=rate, noise_multiplier=noise)

    variables = [variable(atom) for atom, _ in atoms]
    counts = [count for _, count in atoms]
    eps_error, delta_error = _width(atoms, delta, relation), delta / 1000
    accountant = PRVAccountant(variables, eps_error, delta_error, counts)
    composed = accountant.compute_composition(counts)
    _check_mean(atoms, float(composed.domain.ts() @ composed.pmf), eps_error)
    lower, _, upper = composed.compute_epsilon(delta, delta_error, eps_error)
    return lower, upper


def _in_a_double(lower: float) -> float | None:
    """A lower end found in double precision, where it can be right."""
    return lower if lower <= _MOST_IN_A_DOUBLE else None


def _opacus_rdp(atoms: Counted, delta: float, _: Relation) -> Interval:
    from opacus.accountants import RDPAccountant

    accountant = RDPAccountant()
    accountant.history = _pairs(atoms)
    return None, accountant.get_epsilon(delta)


def _opacus_prv(atoms: Counted, delta: float, relation: Relation) -> Interval:
    from opacus.accountants import PRVAccountant

    accountant = PRVAccountant()
    accountant.history = _pairs(atoms)  # before _width: what is unknown is said first
    eps_error, delta_error = _width(atoms, delta, relation), max(delta / 1000, _DOUBLE_NOISE)
    composed = accountant._get_dprv(
        eps_error=eps_error, delta_error=delta_error
    )  # get_epsilon gives the upper end only
    _check_mean(atoms, float(composed.domain.ts @ composed.pmf), eps_error)
    lower, _, upper = composed.compute_epsilon(delta, delta_error, eps_error)
    return _in_a_double(lower), upper


def _dp_accounting_rdp(atoms: Counted, delta: float, relation: Relation) -> Interval:
    from dp_accounting.privacy_accountant import NeighboringRelation, UnsupportedEventError
    from dp_accounting.rdp import RdpAccountant

    # It takes every multiplier as it is, so the two relations of Poisson sampling are one for it.
    theirs = NeighboringRelation["REPLACE_ONE" if relation is Relation.REPLACE_ONE else "ADD_OR_REMOVE_ONE"]
    accountant = RdpAccountant(neighboring_relation=theirs)
    try:
        accountant.compose(_their_event(atoms, relation))
    except UnsupportedEventError as error:
        raise Unsupported(f"does not know the event here: {error}") from None
    return None, accountant.get_epsilon(delta)


def _their_event(atoms: Counted, relation: Relation):
    """What dp-accounting's Renyi accountant knows of ``atoms``, or Unsupported."""
    from dp_accounting import dp_event as theirs

    def one(atom: Atom):
        match atom:
            case Gaussian(noise_multiplier=noise):
                return theirs.GaussianDpEvent(noise)
            case Laplace(noise_multiplier=noise):
                return theirs.LaplaceDpEvent(noise)
            case ApproximateDP(epsilon=epsilon, delta=0.0) if relation is Relation.REPLACE_ONE:
                # The worst pair of pure DP: one bit, told truly with odds e^epsilon.
                return theirs.RandomizedResponseDpEvent(2 / (1 + math.exp(epsilon)), 2)
            case Poisson(sample_rate=rate, event=Gaussian(noise_multiplier=noise)):
                return theirs.PoissonSampledDpEvent(rate, theirs.GaussianDpEvent(noise))
            case WithoutReplacement(event=Gaussian(noise_multiplier=noise)):
                return theirs.SampledWithoutReplacementDpEvent(
                    source_dataset_size=atom.num_examples,
                    sample_size=atom.batch_size,
                    event=theirs.GaussianDpEvent(noise),
                )
            case Select(event=event, trials=TruncatedNegativeBinomial() | PoissonTrials() as trials):
                from .selection import mean

                shape = math.inf if isinstance(trials, PoissonTrials) else trials.shape
                return theirs.RepeatAndSelectDpEvent(
                    _their_event(atoms_under(event, relation), relation), mean(trials), shape
                )
            case Select(trials=trials):
                raise Unsupported(f"does not know a {trials.law} number of trials")
        raise _unknown(atom)

    return theirs.ComposedDpEvent([theirs.SelfComposedDpEvent(one(atom), count) for atom, count in atoms])


def _dp_accounting_pld(atoms: Counted, delta: float, relation: Relation) -> Interval:
    # Losses on a grid of 1e-4, or coarser where that would be millions of points, each of them a call in Python.
    reach = rdp.epsilon_upper(atoms, delta / 4000, relation)
    grid = max(1e-4, reach * 1e-5) if math.isfinite(reach) else 1e-4
    upper = _distribution(atoms, relation, grid, pessimistic=True).get_epsilon_for_delta(delta)
    if any(isinstance(atom, TruncatedPoisson) for atom, _ in atoms):
        return None, upper  # of its pair it is not known that data sets attain it
    below = _distribution(atoms, relation, grid, pessimistic=False)
    return _in_a_double(below.get_epsilon_for_delta(delta + _DOUBLE_NOISE)), upper


def _distribution(atoms: Counted, relation: Relation, grid: float, *, pessimistic: bool):
    """dp-accounting's distribution of the privacy loss, with losses rounded up or down to multiples of ``grid``."""
    from dp_accounting.pld import privacy_loss_distribution as pld
    from dp_accounting.privacy_accountant import NeighboringRelation

    rounding = {
        "value_discretization_interval": grid,
        "pessimistic_estimate": pessimistic,
        "use_connect_dots": pessimistic,  # there is no such method for rounding down
    }

    def composed(atom: Atom, count: int):
        match atom:
            case Gaussian(noise_multiplier=noise):
                return pld.from_gaussian_mechanism(noise / math.sqrt(count), **rounding)
            case Laplace(noise_multiplier=noise):
                one = pld.from_laplace_mechanism(noise, **rounding)
            case ApproximateDP(epsilon=epsilon, delta=delta):
                to_grid = math.ceil if pessimistic else math.floor
                likely = (1 - delta) / (1 + math.exp(-epsilon))
                masses = {to_grid(epsilon / grid): likely, to_grid(-epsilon / grid): 1 - delta - likely}
                one = pld.PrivacyLossDistribution.create_from_rounded_probability(
                    masses if epsilon > 0 else {0: 1 - delta}, delta, grid, pessimistic
                )
            case Poisson(sample_rate=rate, event=Gaussian(noise_multiplier=noise)):
                one = pld.from_gaussian_mechanism(noise, sampling_prob=rate, **rounding)
            case Poisson(sample_rate=rate, event=Laplace(noise_multiplier=noise)):
                one = pld.from_laplace_mechanism(noise, sampling_prob=rate, **rounding)
            case TruncatedPoisson(event=Gaussian(noise_multiplier=noise)) if relation is Relation.ZERO_OUT:
                one = pld.from_truncated_subsampled_gaussian_mechanism(
                    dataset_size=atom.max_examples + 1,
                    sampling_probability=atom.sample_rate,
                    truncated_batch_size=atom.cap,
                    noise_multiplier=noise,
                    value_discretization_interval=grid,
                    neighboring_relation=NeighboringRelation.REPLACE_SPECIAL,
                )
            case TruncatedPoisson():
                raise Unsupported("not asked about truncated_poisson under add_remove: it takes the size for public")
            case _:
                raise _unknown(atom)
        return one.self_compose(count)

    # Their empty composition is one that rounds up, so it is no place to begin.
    return reduce(lambda a, b: a.compose(b), [composed(atom, count) for atom, count in atoms])


_JUDGES = (
    _Judge("prv-accountant", "prv", _prv_accountant),
    _Judge("opacus", "prv", _opacus_prv),
    _Judge("opacus", "rdp", _opacus_rdp),
    _Judge("dp-accounting", "pld", _dp_accounting_pld),
    _Judge("dp-accounting", "rdp", _dp_accounting_rdp),
)
