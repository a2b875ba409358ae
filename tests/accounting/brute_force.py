"""The true privacy of one small release, by enumeration and fine numerical integration. Knows nothing of accounting.

Records are scalars in [-1, 1] (clipping norm 1); a release is their sum plus N(0, noise^2), so its law is a mixture of
Gaussians: a dict from the sum to its probability.
"""

from __future__ import annotations

import itertools
import math

import numpy as np
from scipy.stats import binom, norm

Law = dict[float, float]


def truncated_law(records: list[float], rate: float, cap: int) -> Law:
    """Draw each record with probability ``rate``; cut a draw above ``cap`` to a uniform subset; sum."""
    law: Law = {}
    for size in range(len(records) + 1):
        chance = rate**size * (1 - rate) ** (len(records) - size)
        for drawn in itertools.combinations(records, size):
            kept = list(itertools.combinations(drawn, min(size, cap)))
            for subset in kept:
                total = round(math.fsum(subset), 12)
                law[total] = law.get(total, 0.0) + chance / len(kept)
    return law


def law_among_equals(others: int, value: float, own: float | None, rate: float, cap: int) -> Law:
    """The same with ``others`` records of one ``value`` and one slot that holds ``own`` (None: no slot)."""
    law: Law = {}

    def add(total: float, chance: float) -> None:
        law[round(total, 12)] = law.get(round(total, 12), 0.0) + chance

    for size, chance in enumerate(binom.pmf(np.arange(others + 1), others, rate)):
        if chance == 0:
            continue
        without = min(size, cap) * value
        if own is None:
            add(without, chance)
            continue
        stays = rate * min(1.0, cap / (size + 1))
        add(without, chance * (1 - stays))
        add((min(size + 1, cap) - 1) * value + own, chance * stays)
    return law


def densities(p: Law, q: Law, noise: float) -> tuple[np.ndarray, np.ndarray, float]:
    """Both densities on one grid, and its step."""
    support = [*p, *q]
    step = noise / 40
    grid = np.arange(min(support) - 14 * noise, max(support) + 14 * noise, step)
    return *(sum(w * norm.pdf(grid, loc=m, scale=noise) for m, w in law.items() if w > 1e-300) for law in (p, q)), step


def hockey_stick(p: Law, q: Law, noise: float, epsilon: float) -> float:
    """The true delta of (p, q) at ``epsilon``, this direction only."""
    p_density, q_density, step = densities(p, q, noise)
    return float(np.sum(np.maximum(0.0, p_density - math.exp(epsilon) * q_density)) * step)


def hockey_stick_of_two_runs(p: Law, q: Law, noise: float, epsilon: float) -> float:
    """The true delta of two independent releases."""
    p_density, q_density, step = densities(p, q, noise)
    p_density, q_density, step = p_density[::8], q_density[::8], 8 * step
    gap = np.outer(p_density, p_density) - math.exp(epsilon) * np.outer(q_density, q_density)
    return float(np.sum(np.maximum(0.0, gap)) * step * step)


def log_renyi_moment(p: Law, q: Law, noise: float, order: float) -> float:
    """log of the integral of p^order q^(1 - order)."""
    p_density, q_density, step = densities(p, q, noise)
    keep = (p_density > 1e-290) & (q_density > 1e-290)
    terms = order * np.log(p_density[keep]) + (1 - order) * np.log(q_density[keep])
    largest = terms.max()
    return float(largest + math.log(np.sum(np.exp(terms - largest)) * step))
