r"""The true delta of one release, and of two, by closed forms and integrals of them. Knows nothing of accounting.

A curve is ``log(gamma) -> H_gamma(P|Q)`` for every gamma > 0, below 1 as well.  P is the law with the record.

    Gaussian         Phi(mu/2 - e/mu) - gamma Phi(-mu/2 - e/mu)                                  e = log(gamma)
    Laplace          1 - exp((e - 1/b)/2) for |e| < 1/b
    two answers      delta + (1 - delta) (expit(eps) - gamma expit(-eps)) for |e| < eps
    sampled P        (1-q) Q + q P - gamma Q = q (P - g Q) with g = 1 + (gamma - 1)/q; everything where g <= 0
    exchanged        H_gamma(Q|P) = 1 - gamma + gamma H_(1/gamma)(P|Q)
    one after other  H_gamma(P1 P2|Q1 Q2) = E_(P1)[H_(gamma exp(-L1))(P2|Q2)]
"""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import scipy
from scipy.special import erfcx, expit, ndtr

Vector = np.ndarray
Curve = Callable[[Vector], Vector]
Losses = tuple[Vector, Vector, float]
"""Finite losses, their P-masses, and the P-mass of infinite loss."""

_NODES, _WEIGHTS = np.polynomial.legendre.leggauss(16)


def gaussian(mu: float) -> Curve:
    def curve(log_gamma: Vector) -> Vector:
        t = np.asarray(log_gamma / mu - mu / 2)
        with np.errstate(over="ignore", invalid="ignore"):
            # Nothing cancels in the tail: Phi(-t) = phi(t) M(t), and gamma phi(t + mu) = phi(t).
            mills = 0.5 * (erfcx(t / np.sqrt(2)) - erfcx((t + mu) / np.sqrt(2)))
            tail = np.exp(-t * t / 2) * mills
        return np.where(t > 0, tail, ndtr(-t) - np.exp(np.minimum(log_gamma, 700)) * ndtr(-t - mu))

    return curve


def laplace(scale: float) -> Curve:
    def curve(log_gamma: Vector) -> Vector:
        inside = -np.expm1((np.clip(log_gamma, -1 / scale, 1 / scale) - 1 / scale) / 2)
        return np.where(log_gamma < -1 / scale, -np.expm1(log_gamma), inside)

    return curve


def two_answers(epsilon: float, delta: float) -> Curve:
    def curve(log_gamma: Vector) -> Vector:
        e = np.clip(log_gamma, -epsilon, epsilon)
        inside = delta + (1 - delta) * (expit(epsilon) - np.exp(e) * expit(-epsilon))
        return np.where(log_gamma < -epsilon, delta - (1 - delta) * np.expm1(log_gamma), inside)

    return curve


def sampled(curve: Curve, rate: float) -> Curve:
    def sampled_curve(log_gamma: Vector) -> Vector:
        with np.errstate(divide="ignore", invalid="ignore"):
            before = np.log1p(np.expm1(np.minimum(log_gamma, 700)) / rate)
        everything = ~(before > -np.inf)
        return np.where(everything, -np.expm1(log_gamma), rate * curve(np.where(everything, 0.0, before)))

    return sampled_curve


def exchanged(curve: Curve) -> Curve:
    """Of Q against P; loses digits by cancellation where the result is far below 1."""
    return lambda log_gamma: np.maximum(0.0, -np.expm1(log_gamma) + np.exp(log_gamma) * curve(-log_gamma))


def gaussian_exchanged(mu: float, rate: float) -> Curve:
    """Q against the sampled P without cancellation: Q - gamma ((1-q) Q + q P) = a (Q - (gamma q / a) P)."""

    def curve(log_gamma: Vector) -> Vector:
        with np.errstate(divide="ignore", invalid="ignore", over="ignore"):
            left = 1 - np.exp(log_gamma) * (1 - rate)
            found = left * gaussian(mu)(log_gamma + np.log(rate) - np.log(left))
        return np.where(left > 0, found, 0.0)

    return curve


def mirrored(curve: Curve) -> Curve:
    """The same for gamma >= 1, and equal to its own exchange."""
    return lambda log_gamma: np.where(
        log_gamma >= 0, curve(np.abs(log_gamma)), -np.expm1(log_gamma) + np.exp(log_gamma) * curve(np.abs(log_gamma))
    )


def gaussian_losses(mu: float, rate: float = 1.0, panels: int = 2000) -> Losses:
    """Of the sampled pair: Gauss-Legendre panels over outcomes."""
    ends = np.linspace(-14.0, mu + 14.0, panels + 1)
    half, middle = np.diff(ends) / 2, (ends[1:] + ends[:-1]) / 2
    y = (middle[:, None] + half[:, None] * _NODES).ravel()
    without = (half[:, None] * _WEIGHTS).ravel() * scipy.stats.norm.pdf(y)
    loss = np.log1p(rate * np.expm1(mu * y - mu * mu / 2)) if rate < 1 else mu * y - mu * mu / 2
    return loss, without * np.exp(loss), 0.0


def laplace_losses(scale: float, rate: float = 1.0, panels: int = 400) -> Losses:
    """Of the sampled pair: two atoms, and between them P-density ``exp((L - 1/b)/2) / 4`` by panels."""
    ends = np.linspace(-1 / scale, 1 / scale, panels + 1)
    half, middle = np.diff(ends) / 2, (ends[1:] + ends[:-1]) / 2
    x = (middle[:, None] + half[:, None] * _NODES).ravel()
    p = (half[:, None] * _WEIGHTS).ravel() * np.exp((x - 1 / scale) / 2) / 4
    x = np.concatenate([[-1 / scale], x, [1 / scale]])
    p = np.concatenate([[np.exp(-1 / scale) / 2], p, [0.5]])
    q = p * np.exp(-x)
    return np.log1p(rate * np.expm1(x)), (1 - rate) * q + rate * p, 0.0


def two_answers_losses(epsilon: float, delta: float, rate: float = 1.0) -> Losses:
    q = (1 - delta) * expit(np.array([epsilon, -epsilon]))
    growth = rate * np.expm1(np.array([-epsilon, epsilon]))
    loss, p = np.log1p(growth), q * (1 + growth)
    if rate < 1:
        loss, p = np.append(loss, np.log1p(-rate)), np.append(p, (1 - rate) * delta)
    return loss, p, rate * delta


def after(first: Losses, then: Curve) -> Curve:
    """The curve of both. The second one is the smoother: ``first`` stands on a fixed grid."""
    loss, mass, infinite = first

    def curve(log_gamma: Vector) -> Vector:
        log_gamma = np.atleast_1d(log_gamma)
        found = np.empty(len(log_gamma))
        for place, at in enumerate(log_gamma):
            found[place] = mass @ then(at - loss) + infinite
        return found

    return curve
