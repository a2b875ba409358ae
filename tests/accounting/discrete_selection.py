"""The exact law of a selected output, for mechanisms with finitely many outputs. Knows nothing of accounting.

A base is a pair of probability vectors; an order is a permutation from the worst output to the best.  The best of K
draws is at most the i-th worst with probability phi(F_i), so output i is released with phi(F_i) - phi(F_(i-1)), and a
symbol for K = 0 with phi(0).
"""

from __future__ import annotations

import math
from collections.abc import Callable

import numpy as np
import scipy
from numpy.typing import NDArray

Vector = NDArray[np.float64]
GeneratingFunction = Callable[[Vector], Vector]


def truncated_negative_binomial(shape: float, gamma: float) -> GeneratingFunction:
    if shape == 0:
        return lambda z: np.log(1 - (1 - gamma) * z) / math.log(gamma)
    return lambda z: ((1 - (1 - gamma) * z) ** -shape - 1) / (gamma**-shape - 1)


def poisson(mean: float) -> GeneratingFunction:
    return lambda z: np.exp(mean * (z - 1))


def binomial(count: int, probability: float) -> GeneratingFunction:
    return lambda z: (1 - probability + probability * z) ** count


def random_base(rng: np.random.Generator, outputs: int) -> tuple[Vector, Vector]:
    """Vectors from close to each other to almost disjoint, some with outputs that only one side has."""
    p = rng.dirichlet(np.full(outputs, rng.choice([0.3, 1.0, 5.0])))
    q = p * np.exp(rng.choice([0.05, 0.3, 1.0, 3.0]) * rng.standard_normal(outputs))
    if rng.random() < 0.3:
        q[rng.integers(outputs)] = 0.0
    return p, q / q.sum()


def binned_gaussians(distance: float, outputs: int) -> tuple[Vector, Vector]:
    """N(distance, 1) and N(0, 1) in bins: a trial for which the bounds are nearly attained by some order."""
    edges = np.concatenate([[-np.inf], np.linspace(-4, 4 + distance, outputs - 1), [np.inf]])
    p, q = (np.diff(scipy.stats.norm.cdf(edges - mean)) for mean in (distance, 0.0))
    return p / p.sum(), q / q.sum()


def orders(rng: np.random.Generator, p: Vector, q: Vector, rolled: int) -> NDArray[np.int64]:
    """Random, sorted by p/q either way, and ``rolled`` of the sorted ones with some of one end put before the other.

    Rolled orders are the dangerous ones: the best outputs are likely under one neighbour, which makes all others rare
    there, and the next best are likely under the other.
    """
    with np.errstate(divide="ignore"):
        by_ratio = np.argsort(np.log(p) - np.log(q), kind="stable")
    shifts = np.linspace(1, len(p), rolled // 2, endpoint=False).astype(int)
    rolls = [np.roll(by_ratio[::side], shift) for side in (1, -1) for shift in shifts]
    return np.array([rng.permutation(len(p)), by_ratio, by_ratio[::-1], *rolls])


def selected(phi: GeneratingFunction, base: Vector, order: NDArray[np.int64]) -> Vector:
    """Law of the released output, one row per order; the last column is the symbol."""
    below = np.minimum(np.cumsum(base[order], axis=-1), 1.0)
    below[..., -1] = 1.0
    at_most = phi(below)
    nothing = np.full((len(order), 1), phi(np.zeros(1))[0])
    return np.concatenate([np.diff(at_most, prepend=nothing), nothing], axis=1)


def hockey_stick(p: Vector, q: Vector, epsilon: float) -> Vector:
    """delta at ``epsilon`` in the worse direction, over the last axis."""
    ratio = math.exp(epsilon)
    return np.maximum(np.maximum(p - ratio * q, 0).sum(axis=-1), np.maximum(q - ratio * p, 0).sum(axis=-1))


def log_moment(p: Vector, q: Vector, order: float) -> Vector:
    """log of sum p^order q^(1-order) in the worse direction, over the last axis; inf where one side has no mass."""
    return np.maximum(_log_moment(p, q, order), _log_moment(q, p, order))


def _log_moment(p: Vector, q: Vector, order: float) -> Vector:
    p, q = np.maximum(p, 0), np.maximum(q, 0)
    with np.errstate(divide="ignore", invalid="ignore"):
        terms = np.where(p > 0, order * np.log(p) + (1 - order) * np.log(q), -np.inf)
    largest = terms.max(axis=-1)
    with np.errstate(invalid="ignore"):
        return np.where(np.isinf(largest), largest, largest + np.log(np.exp(terms - largest[..., None]).sum(axis=-1)))
