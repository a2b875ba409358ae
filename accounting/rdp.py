r"""Renyi accounting over wide orders: always available, never below the truth, somewhat loose.

The log-moments ``log A(alpha) = (alpha - 1) * (Renyi divergence of order alpha)`` of adaptively composed steps add up
(Mironov 2017, https://arxiv.org/abs/1702.07476, proposition 1), and any order alpha > 1 gives

    delta(epsilon) <= A e^{-(alpha-1) epsilon} / (alpha - 1) * (1 - 1/alpha)^alpha

(Canonne, Kamath and Steinke 2020, https://arxiv.org/abs/2004.00010, proposition 12).  All orders are tried and the
best bound is kept; the set of orders is fixed, so this is a minimum over valid statements.  Small orders matter when
epsilon is in the hundreds, large ones when it is small.

The moments of an atom are cached: asking for epsilon after every step of a run costs microseconds.

Truncated Poisson steps are explained in ``truncated.py``.
"""

from __future__ import annotations

import math
from functools import lru_cache
from typing import NamedTuple

import numpy as np

from . import truncated
from .errors import Unsupported
from .events import Gaussian, Poisson, Relation, TruncatedPoisson
from .normal_form import Atom, Counted
from .sampled_gaussian import ORDERS, Vector, log1p_exp, log_moment_excess

_ABOVE_ONE = ORDERS - 1
# log of (1 - 1/alpha)^alpha / (alpha - 1)
_CONVERSION = ORDERS * np.log1p(-1 / ORDERS) - np.log(_ABOVE_ONE)
_ROUNDING = 1e-12


def epsilon_upper(atoms: Counted, delta: float, relation: Relation) -> float:
    """An epsilon >= 0 such that the composition of ``atoms`` is (epsilon, delta)-private.

    Raises:
      Unsupported: a subsampled atom under replace-one.
    """
    if not atoms:
        return 0.0
    high = max(0.0, float(np.min((_log_moment(atoms, relation) + _CONVERSION - math.log(delta)) / _ABOVE_ONE)))
    mixture = _mixture_over_bad_steps(atoms, relation, negligible=delta * 1e-4)
    if mixture is not None and mixture.delta(high) <= delta:
        low = 0.0
        while high - low > 1e-10 * high:
            middle = (low + high) / 2
            low, high = (low, middle) if mixture.delta(middle) <= delta else (middle, high)
    return high * (1 + _ROUNDING)


def delta_upper(atoms: Counted, epsilon: float, relation: Relation) -> float:
    """A delta in [0, 1] such that the composition of ``atoms`` is (epsilon, delta)-private."""
    if not atoms:
        return 0.0
    delta = float(_deltas(_log_moment(atoms, relation), epsilon))
    mixture = _mixture_over_bad_steps(atoms, relation, negligible=1e-30)
    if mixture is not None:
        delta = min(delta, mixture.delta(epsilon))
    return min(1.0, delta * (1 + 1e-9) + math.ulp(0.0))  # what underflows is not nothing


def _deltas(log_moments: Vector, epsilon: float) -> Vector:
    """The best bound of delta over the orders (the last axis), at most 1."""
    epsilon = min(epsilon, 1e300)  # delta falls with epsilon; beyond this the product would overflow
    return np.exp(np.minimum(0.0, np.min(log_moments + _CONVERSION - _ABOVE_ONE * epsilon, axis=-1)))


def _log_moment(atoms: Counted, relation: Relation) -> Vector:
    total = np.zeros_like(ORDERS)
    for atom, count in atoms:
        total += count * step_log_moment(atom, relation)
    return total


@lru_cache(maxsize=256)
def step_log_moment(atom: Atom, relation: Relation) -> Vector:
    """log A(alpha) of one step for every order of ``ORDERS``, never below the true value; cached."""
    match atom:
        case Gaussian(noise_multiplier=noise):
            return ORDERS * _ABOVE_ONE / 2 * noise**-2
        case Poisson() | TruncatedPoisson() if relation is Relation.REPLACE_ONE:
            raise Unsupported(
                f"{atom.kind} sampling under replace_one has no theorem here. State the guarantee for add_remove or "
                "zero_out, or release the sum over all records without sampling."
            )
        case Poisson(sample_rate=rate, event=Gaussian(noise_multiplier=noise)):
            return log1p_exp(log_moment_excess(noise, rate))
        case TruncatedPoisson():
            p = truncated.bad_probability(atom)
            with np.errstate(divide="ignore"):
                parts = np.log1p(-p) + truncated.good_excess(atom), np.log(p) + truncated.bad_excess(atom, relation)
            return log1p_exp(np.logaddexp(*parts))
    raise Unsupported(f"{atom!r} has no Renyi bound here; use Gaussian, Poisson or TruncatedPoisson events.")


class _Mixture(NamedTuple):
    """The run as a mixture over its number of bad (cut) steps; see ``truncated.py``."""

    log_moments: Vector  # (numbers of bad steps, orders)
    weights: Vector  # (numbers of bad steps,)
    beyond: float  # probability of more bad steps than any row has; charged in full

    def delta(self, epsilon: float) -> float:
        return float(self.weights @ _deltas(self.log_moments, epsilon)) + self.beyond


def _mixture_over_bad_steps(atoms: Counted, relation: Relation, negligible: float) -> _Mixture | None:
    """None where no step can be cut. Several cut atoms are charged with the worst of them in every bad step."""
    cut = [(atom, count) for atom, count in atoms if isinstance(atom, TruncatedPoisson)]
    if not cut:
        return None
    good = _log_moment([pair for pair in atoms if pair not in cut], relation)
    dearer = np.zeros_like(ORDERS)
    for atom, count in cut:
        good_step, bad_step = (
            log1p_exp(x) for x in (truncated.good_excess(atom), truncated.bad_excess(atom, relation))
        )
        good += count * good_step
        dearer = np.maximum(dearer, bad_step - good_step)
    probability = max(truncated.bad_probability(atom) for atom, _ in cut)
    knots, weights, beyond = truncated.bad_step_counts(sum(count for _, count in cut), probability, negligible)
    return _Mixture(good + np.multiply.outer(np.array(knots, float), dearer), np.array(weights), beyond)
