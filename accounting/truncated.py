r"""Truncated Poisson subsampling: what one step may reveal, and how often truncation strikes.

A step draws each record with probability q; if more than ``cap`` were drawn, it keeps a uniform subset of ``cap``.
Let x be the record in which neighbours differ and S the draw of *the others*: n <= ``max_examples`` of them, so S has
the same law on both sides and depends on no output.  All statements are conditional on S, and divergences are jointly
convex, so the bound below may be averaged over S.

**|S| < cap: a good step.** Nothing is cut, with or without x: the pair is that of plain Poisson sampling,
``(1-q) N(m) + q N(m + x)`` against ``N(m)``, shift at most 1.

**|S| >= cap: a bad step**, of probability at most ``p = P(Bin(max_examples, q) >= cap)`` (increasing in n). Without x
the step keeps A, a uniform ``cap``-subset of S, with sum m.  If x was drawn (probability q), the uniform
``cap``-subset of S + x contains x with probability ``cap / (|S| + 1)``, and is then distributed as A with a uniformly
chosen record y replaced by x.  So x enters with probability ``r = q cap / (|S| + 1) <= q`` and displaces y:

* add-or-remove-one: ``(1-r) N(m) + r N(m - y + x)`` against ``N(m)``: plain Poisson sampling with shift at most 2, in
  both directions; divergences grow with r and with the shift.
* zero-out, where the null record keeps its slot and displaces y as well: P = ``(1-r) N(m) + r N(m - y + x)`` against
  Q = ``(1-r) N(m) + r N(m - y)``.  This is *not* covered by the plain Poisson pair, because the displacement of y
  betrays on both sides that the slot was drawn.  Two bounds hold, and the smaller is used:

  - joint convexity of the Renyi integral over the two branches: ``A - 1 <= q (e^{alpha(alpha-1)/2s^2} - 1)``;
  - advanced joint convexity (Balle, Barthe and Gaboardi 2018, https://arxiv.org/abs/1807.01647, theorem 2): for
    g >= 1 and g' = 1 + r (g - 1), ``H_g'(P|Q) <= r ((1-b) H_g(N(m-y+x)|N(m)) + b H_g(N(m-y+x)|N(m-y)))``, at most
    r H_g at shift 2, which is H_g' of the plain Poisson pair (R0, N(m)) with shift 2; the same with P and Q
    exchanged.  As ``A - 1 = alpha (alpha-1) int_1^inf (g^(alpha-2) H_g(P|Q) + g^(-alpha-1) H_g(Q|P)) dg``, the two
    halves are at most those of A(R0|N(m)) and of A(N(m)|R0), hence ``A - 1 <= 2 (A_shift 2 - 1)``.

**A run** of T steps has K bad ones, K stochastically at most Bin(T, p). Given which steps are bad, the run is an
adaptive composition of good and bad steps, so joint convexity of the hockey-stick divergence gives

    delta(epsilon) <= sum_k P(K = k) delta_k(epsilon)

with delta_k the profile of T - k good and k bad steps.  That is far smaller than what the average moment
``(1-p) A_good + p A_bad`` of a step gives, whose rare huge term forbids all large orders; both are computed, and the
smaller is used.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable

import numpy as np
import scipy

from .errors import Unsupported
from .events import Gaussian, Relation, TruncatedPoisson
from .sampled_gaussian import ORDERS, Vector, log_expm1, log_moment_excess

_MOST_KNOTS = 64
# The binomial tail is an incomplete beta function, accurate to about 1e-12; this is room to spare.
_TAIL_SLACK = 1e-6


def good_excess(event: TruncatedPoisson) -> Vector:
    """log(A - 1) of a step in which nothing was cut."""
    return log_moment_excess(_noise(event), event.sample_rate)


def bad_excess(event: TruncatedPoisson, relation: Relation) -> Vector:
    """log(A - 1) of a step in which the draw may have been cut."""
    shift_two = log_moment_excess(_noise(event) / 2, event.sample_rate)
    if relation is Relation.ADD_REMOVE:
        return shift_two
    if relation is Relation.ZERO_OUT:
        not_amplified = math.log(event.sample_rate) + log_expm1(ORDERS * (ORDERS - 1) / 2 * _noise(event) ** -2)
        # A bad step is charged at least as a good one, so that epsilon cannot fall when more steps are bad.
        return np.maximum(good_excess(event), np.minimum(shift_two + math.log(2), not_amplified + 1e-9))
    raise Unsupported(f"truncated Poisson sampling has no theorem here under {relation.value}; use add_remove.")


def bad_probability(event: TruncatedPoisson) -> float:
    """p, rounded up: the chance that a draw of ``max_examples`` records reaches ``cap``."""
    return tail(event.cap, event.max_examples, event.sample_rate)


def tail(least: int, trials: int, probability: float) -> float:
    """P(Bin(trials, probability) >= least), rounded up."""
    if least <= 0:
        return 1.0
    if least > trials or probability == 0:
        return 0.0
    exact = float(scipy.special.betainc(least, trials - least + 1, probability))
    return min(1.0, exact * (1 + _TAIL_SLACK) + 1e-300)


def bad_step_counts(steps: int, probability: float, negligible: float) -> tuple[list[int], list[float], float]:
    """(knots k_0 < k_1 < .., weights, beyond) with ``E f(K) <= sum_j weights_j f(k_j) + beyond``, K ~ Bin(steps, p).

    ``f`` is any increasing function with values in [0, 1]: K in (k_{j-1}, k_j] is charged f(k_j), and what lies beyond
    the last knot is charged 1. ``beyond`` is at most ``negligible``.
    """
    last = _least(steps, lambda k: tail(k + 1, steps, probability) <= negligible)
    first = _least(last, lambda k: tail(k + 1, steps, probability) < 0.99)
    knots = np.unique(np.linspace(first, last, _MOST_KNOTS).round().astype(int)).tolist()
    # Summation by parts: tails that are rounded up can only raise the sum, since f is increasing.
    tails = [1.0, *(tail(k + 1, steps, probability) for k in knots)]
    weights = [max(0.0, above - below) for above, below in itertools.pairwise(tails)]
    return knots, weights, tails[-1]


def _least(most: int, holds: Callable[[int], bool]) -> int:
    """The least k in 0..most for which the monotone condition holds (it does at ``most``)."""
    low, high = 0, most
    while low < high:
        middle = (low + high) // 2
        low, high = (low, middle) if holds(middle) else (middle + 1, high)
    return high


def _noise(event: TruncatedPoisson) -> float:
    assert isinstance(event.event, Gaussian)  # the normal form leaves nothing else
    return event.event.noise_multiplier
