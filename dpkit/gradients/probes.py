r"""A test, after the fact, of a sum that was computed in float32 from products that cancel.

Let W = sum_b w_b G_b be a sum that is never seen, W' what was computed in its place, and E = W' - W, one side of which
has n entries.  Draw A: (n, k) with independent standard normal entries, after everything that decides on W' was fixed.
W' A and W A are cheap in float64 where W is not, and they differ by E A.

**Theorem.**  For 0 < y < 1,   P( |E A|_F^2 <= y k |E|_F^2 )  <=  (y e^(1 - y))^(k/2).

*Proof.*  With E's singular values s_j and p_j = s_j^2 / |E|_F^2, |E A|_F^2 / |E|_F^2 has the law of sum_j p_j Q_j with
independent Q_j ~ chi^2_k, as A's law does not change under rotations.  By Markov's inequality, for every z > 0,

    P( sum_j p_j Q_j <= y k )  <=  e^(z y k) prod_j (1 + 2 z p_j)^(-k/2)  <=  ( e^(2 z y) / (1 + 2 z) )^(k/2),

because prod_j (1 + 2 z p_j) >= 1 + 2 z sum_j p_j = 1 + 2 z.  Take 2 z = 1/y - 1.  QED

So |E|_F <= :func:`tail`\(k) |E A|_F with probability at least 1 - 2^-50, whatever E is: a single wrong entry, an error
of rank one, or rounding all over.  The entries of A come from 128 bits of the operating system, expanded by numpy's
PCG64, so the probability is that of an ideal generator; the user's random state is neither read nor moved.
Reference: Freivalds, Probabilistic machines can use less running time (1977), for the idea over finite fields.
"""

from __future__ import annotations

import math
from functools import cache

import numpy
import torch
from torch import Tensor

from dpkit.gradients.arithmetic import ROUNDING_CHAIN

ALLOWED = ROUNDING_CHAIN + 7
"""What a tested sum may be off by, in units of 2^-24 sum_b w_b n_b: one less than the forms promise, because the test
knows the weights as they were rounded to float32."""

_FAILURE_BITS = 50
# Measured rounding errors of float32 sums of T products with random signs stay below this much and this much times
# sqrt(T), in units of 2^-24 sum_b w_b |G_b|.  What exceeds it is computed again: that costs time, not precision.
_SCALING_ERROR = 0.5
_SUMMING_ERROR = 0.4
_MOST_PROBES = 32


def draw(length: int, count: int, device: torch.device) -> Tensor:
    """(``length``, ``count``) float64 probes, fresh from the operating system's entropy."""
    values = numpy.random.default_rng().standard_normal((length, count), dtype=numpy.float32)
    return torch.from_numpy(values).to(device=device, dtype=torch.float64)


@cache
def tail(count: int) -> float:
    """f with P( |E|_F > f |E A|_F ) <= 2^-50 for ``count`` probes."""
    # The logarithm of y e^(1 - y) = 2^(-2 bits / k), solved for y in (0, 1) where it rises.
    target = -2 * _FAILURE_BITS / count * math.log(2)
    low, high = 1e-300, 1.0
    for _ in range(200):
        middle = math.sqrt(low * high)
        low, high = (middle, high) if math.log(middle) + 1 - middle < target else (low, middle)
    return 1 / math.sqrt(low * count) * (1 + 2.0**-40)


@cache
def count(steps: int) -> int:
    """As few probes as let ordinary rounding of ``steps`` products a unit pass."""
    expected = _SCALING_ERROR + _SUMMING_ERROR * math.sqrt(steps)
    for number in range(4, _MOST_PROBES):
        if tail(number) * math.sqrt(number) * expected <= ALLOWED:
            return number
    return _MOST_PROBES


def close(difference: Tensor, drawn: Tensor, blur: Tensor, norms: Tensor) -> bool:
    """Whether a sum is as close to the true one as the forms promise.

    Args:
      difference: of the two sketches, in float64.
      drawn: the probes.
      blur: what float64 rounding may have put into either sketch.
      norms: sum_b w_b n_b.
    """
    error = tail(drawn.shape[1]) * (torch.linalg.vector_norm(difference) + 2 * blur)
    return bool(error * (1 + 2.0**-20) <= ALLOWED * 2.0**-24 * norms)
