r"""Renyi accounting over wide orders: always available, never below the truth, somewhat loose.

The log-moments ``log A(alpha) = (alpha - 1) * (Renyi divergence of order alpha)`` of adaptively composed steps add up
(Mironov 2017, https://arxiv.org/abs/1702.07476, proposition 1), and any order alpha > 1 gives

    delta(epsilon) <= A e^{-(alpha-1) epsilon} / (alpha - 1) * (1 - 1/alpha)^alpha

(Canonne, Kamath and Steinke 2020, https://arxiv.org/abs/2004.00010, proposition 12).  All orders are tried and the
best bound is kept; the set of orders is fixed, so this is a minimum over valid statements.  Small orders matter when
epsilon is in the hundreds, large ones when it is small.

The moments of an atom are cached: asking for epsilon after every step of a run costs microseconds.

Releases about one batch, unsampled or on a Poisson subsample, are explained in ``batch_moments.py``, truncated Poisson
steps in ``truncated.py``, selected runs in ``selection.py``.  An (epsilon, delta)-private release with delta > 0 has
no finite moment: the answers are then epsilon = inf and delta = 1, and another accountant has to give a better one.

**Without replacement, replace-one.**  Of N records, m = q N are drawn.  Neighbours differ in record i.  With
probability 1 - q it is not drawn, and the batch gives the same law w0 on both sides; else it gives w1 or w1'.  By
advanced joint convexity (Balle, Barthe and Gaboardi 2018, https://arxiv.org/abs/1807.01647, theorem 2), for g >= 1,
g' = 1 + q (g - 1) and b = g'/g,

    H_g'((1-q) w0 + q w1 | (1-q) w0 + q w1') = q H_g(w1 | (1-b) w0 + b w1') <= q max(H_g(w1 | w0), H_g(w1 | w1'))

and both are at most H_g of the inner release under replace-one: w1 and w1' use the same other records, and a batch of
w0 is a batch of w1 in which i was replaced by a uniformly chosen record that is not in it.  With the worst pair (P, Q)
of the inner release, ``q H_g(P | Q)`` is H_g' of the Poisson pair (R, Q), R = (1-q) Q + q P.  Both directions of the
step lie below it, and as ``A - 1 = alpha (alpha-1) int_1^inf (g^(alpha-2) H_g + g^(-alpha-1) H_g') dg`` with H and H'
the two directions, ``A - 1`` is at most A(R|Q) - 1 (by its first half) plus A(Q|R) - 1 (by its second), hence at most
``2 (A(R|Q) - 1)``, the add direction being the smaller.  Joint convexity alone gives ``q (A(P|Q) - 1)``; the smaller of
the two is used.
"""

from __future__ import annotations

import math
from functools import lru_cache
from typing import NamedTuple

import numpy as np

from . import truncated
from .batch_moments import log_excess, sampled_log_excess
from .errors import Unsupported
from .events import (
    ApproximateDP,
    DiscreteGaussian,
    Gaussian,
    Laplace,
    Poisson,
    Relation,
    Select,
    TruncatedPoisson,
    WithoutReplacement,
)
from .normal_form import Atom, Counted, atoms_under, check_relation, normal_form
from .sampled_gaussian import ORDERS, Vector, log1p_exp

_ABOVE_ONE = ORDERS - 1
# log of (1 - 1/alpha)^alpha / (alpha - 1)
_CONVERSION = ORDERS * np.log1p(-1 / ORDERS) - np.log(_ABOVE_ONE)
_ROUNDING = 1e-12


def epsilon_upper(atoms: Counted, delta: float, relation: Relation) -> float:
    """An epsilon >= 0 such that the composition of ``atoms`` is (epsilon, delta)-private; inf if no order has a moment.

    Raises:
      Unsupported: as :func:`accounting.normal_form.check_relation`.
    """
    if not atoms:
        return 0.0
    high = max(0.0, float(np.min((log_moment(atoms, relation) + _CONVERSION - math.log(delta)) / _ABOVE_ONE)))
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
    delta = float(_deltas(log_moment(atoms, relation), epsilon))
    mixture = _mixture_over_bad_steps(atoms, relation, negligible=1e-30)
    if mixture is not None:
        delta = min(delta, mixture.delta(epsilon))
    return min(1.0, delta * (1 + 1e-9) + math.ulp(0.0))  # what underflows is not nothing


def _deltas(log_moments: Vector, epsilon: float) -> Vector:
    """The best bound of delta over the orders (the last axis), at most 1."""
    epsilon = min(epsilon, 1e300)  # delta falls with epsilon; beyond this the product would overflow
    return np.exp(np.minimum(0.0, np.min(log_moments + _CONVERSION - _ABOVE_ONE * epsilon, axis=-1)))


def log_moment(atoms: Counted, relation: Relation) -> Vector:
    """log A(alpha) of the composition of ``atoms`` for every order of ``ORDERS``, never below the true value."""
    total = np.zeros_like(ORDERS)
    for atom, count in atoms:
        total += count * step_log_moment(atom, relation)
    return total


@lru_cache(maxsize=256)
def step_log_moment(atom: Atom, relation: Relation) -> Vector:
    """log A(alpha) of one step for every order of ``ORDERS``, never below the true value, inf where there is none.

    Raises:
      Unsupported: no theorem covers ``atom`` under ``relation``, or it is not one that ``atoms_under`` gives.
    """
    check_relation(atom, relation)
    match atom:
        case Gaussian(noise_multiplier=noise) | DiscreteGaussian(noise_multiplier=noise):
            return ORDERS * _ABOVE_ONE / 2 * noise**-2
        case Laplace() | ApproximateDP():
            return log1p_exp(log_excess([(atom, 1)], ORDERS))
        case Poisson(sample_rate=rate, event=inner):
            return log1p_exp(sampled_log_excess(normal_form(inner), rate))
        case WithoutReplacement(batch_size=size, num_examples=most, event=inner):
            batch, rate = normal_form(inner), size / most
            amplified = sampled_log_excess(batch, rate) + math.log(2)
            return log1p_exp(np.minimum(amplified, log_excess(batch, ORDERS) + math.log(rate) + 1e-9))
        case TruncatedPoisson():
            p = truncated.bad_probability(atom)
            with np.errstate(divide="ignore"):
                parts = np.log1p(-p) + truncated.good_excess(atom), np.log(p) + truncated.bad_excess(atom, relation)
            return log1p_exp(np.logaddexp(*parts))
        case Select(event=event, trials=trials):
            from .selection import renyi_log_moments

            return renyi_log_moments(trials, log_moment(atoms_under(event, relation), relation))
    raise Unsupported(f"{atom!r} has no Renyi bound of its own; ask for the atoms that atoms_under gives.")


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
    good = log_moment([pair for pair in atoms if pair not in cut], relation)
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
