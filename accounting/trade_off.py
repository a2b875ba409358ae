r"""Epsilon and delta in the language of tests. Information beside a guarantee, and no second way to state one.

Who tries to tell two neighbours apart from what was released makes errors of two kinds: alpha, to see the record where
it is not, and beta, to miss it. (epsilon, delta)-privacy at all epsilon says

    beta >= max over epsilon of  1 - delta(epsilon) - e^epsilon alpha  and  e^-epsilon (1 - delta(epsilon) - alpha)

(Wasserman and Zhou 2010; Dong, Roth and Su 2022, "Gaussian differential privacy", proposition 2.12).
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
from numpy.typing import ArrayLike, NDArray

from . import gaussian
from .accountant import profile
from .errors import InvalidParameter
from .events import Event, Relation
from .values import check_delta, check_epsilon, shown

_KNOTS = 160
_LEAST = 1e-3  # of alpha or beta, that the knots are laid for
_FARTHEST = 500.0  # of their epsilons


class Tangents(NamedTuple):
    """A trade-off curve from below: of each epsilon with its delta the two lines above, none of which it crosses."""

    epsilons: NDArray[np.float64]
    deltas: NDArray[np.float64]

    def at(self, alphas: ArrayLike) -> NDArray[np.float64]:
        """For each alpha in [0, 1] a beta that is not above the curve."""
        rows = np.asarray(alphas, dtype=float)[..., None]
        with_record = 1 - self.deltas - np.exp(self.epsilons) * rows
        without = np.exp(-self.epsilons) * (1 - self.deltas - rows)
        return np.maximum(0.0, np.maximum(with_record, without).max(axis=-1))


def tangents(event: Event, *, relation: Relation, least: float = _LEAST, knots: int = _KNOTS) -> Tangents:
    """The tangents of the trade-off curve of ``event``, never above the true one.

    Args:
      least: the smallest alpha or beta that the knots are laid for.
      knots: how many epsilons have tangents; more come nearer to the curve, and cost time.

    Raises:
      Unsupported: no accountant covers the event under this relation.
    """
    delta_of = profile(event, relation)
    # A release that is approximately private as a whole keeps its delta at every epsilon: no knots beyond.
    least = max(least, delta_of(_FARTHEST) * (1 + 1e-6))
    farthest = 0.1
    while delta_of(farthest) > least and farthest < _FARTHEST:
        farthest *= 1.25
    epsilons = np.linspace(0.0, farthest, knots)
    return Tangents(epsilons, np.array([delta_of(float(epsilon)) for epsilon in epsilons]))


def trade_off(event: Event, alphas: Sequence[float], *, relation: Relation) -> list[float]:
    """For each alpha the least beta that any test of ``event`` can have.

    Guarantee: never above the true trade-off curve.
    Requires: as of :func:`~accounting.epsilon`.
    Why: each (epsilon, delta) of the event's profile gives two lines that no test crosses; see the module.

    Args:
      event: what touches the data, fixed before its first release.
      alphas: probabilities of a false alarm, in [0, 1].
      relation: the neighbouring relation.

    Raises:
      InvalidParameter: an alpha outside [0, 1], or an unknown relation.
      Unsupported: no accountant covers the event under this relation.
    """
    for alpha in alphas:
        if not 0 <= alpha <= 1:  # a NaN is neither
            raise InvalidParameter(f"alphas holds {shown(alpha)}: each must be a number from 0 to 1.")
    return tangents(event, relation=relation).at(alphas).tolist()


def gaussian_mu(epsilon: float, delta: float) -> float:
    """The mu whose Gaussian mechanism has exactly this (epsilon, delta): to compare runs stated at different deltas.

    It is no bound: the event that has this epsilon at this delta may have more than ``mu`` at another.

    Raises:
      InvalidParameter: epsilon negative or infinite, or delta outside (0, 1).
    """
    epsilon, delta = check_epsilon(epsilon), check_delta(delta)
    low, high = 0.0, 1.0
    while gaussian.delta_bounds(high, epsilon)[1] < delta:
        low, high = high, 2 * high
    while low < (middle := (low + high) / 2) < high and not math.isclose(low, high, rel_tol=1e-12):
        low, high = (middle, high) if gaussian.delta_bounds(middle, epsilon)[1] < delta else (low, middle)
    return high
