r"""The true delta of many Poisson-sampled Gaussian steps, by inverting the transform of the privacy loss.

With M(s) = E_P[e^{s L}], the moments of one step's loss L = log(P/Q) (P and Q exchanged for an added record), and any
theta > 0,

    delta(epsilon) = (1 / 2 pi i) integral over Re s = theta of  M(s)^T e^{-s epsilon} / (s (s + 1)) ds

since ``1/(s (s+1))`` is the transform of ``(1 - e^{-x})_+``.  Nothing is put on a grid of losses and nothing is
composed: M is a smooth integral over outcomes, and the contour integral one over frequencies, both by Gauss-Legendre
panels.  Right to about 1e-9 where the integrand dies out in a few dozen panels, which is where many steps are drawn;
None elsewhere.  No bound, but an independent answer with far more digits than any slack.
"""

from __future__ import annotations

import math

import numpy as np
import scipy

_NODES, _WEIGHTS = np.polynomial.legendre.leggauss(20)
_MOST_PANELS = 60
_FAR = 38.0  # standard deviations, beyond which no double is left of a density


def log_delta(noise: float, rate: float, steps: int, epsilon: float, *, added: bool = False) -> float | None:
    """log delta(epsilon) for the removed record, or the added one; None where the integrals do not settle."""
    theta, coarse = _inverted(_law(noise, rate, 1.0, added), steps, epsilon, None, 2.0)
    if coarse is None:
        return None
    _, fine = _inverted(_law(noise, rate, 1.5, added), steps, epsilon, theta, 1.6)
    return fine if fine is not None and abs(fine - coarse) < 1e-8 else None


def mean_loss(noise: float, rate: float) -> float:
    """E_P[L] of one step."""
    loss, log_mass = _law(noise, rate, 4.0, added=False)
    return float(np.exp(log_mass) @ loss)


def _panels(ends: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    half, middle = np.diff(ends) / 2, (ends[1:] + ends[:-1]) / 2
    return (middle[:, None] + half[:, None] * _NODES).ravel(), (half[:, None] * _WEIGHTS).ravel()


def _law(noise: float, rate: float, density: float, added: bool) -> tuple[np.ndarray, np.ndarray]:
    """(loss, log of its mass) at the nodes of ``density`` panels a standard deviation of the noise."""
    mu = 1 / noise
    outcome, weight = _panels(np.linspace(-_FAR, mu + _FAR, math.ceil((2 * _FAR + mu) * density) + 1))
    loss = np.logaddexp(math.log1p(-rate), math.log(rate) + mu * outcome - mu**2 / 2)
    without = np.log(weight) - outcome**2 / 2 - math.log(2 * math.pi) / 2
    return (-loss, without) if added else (loss, loss + without)


def _inverted(law, steps, epsilon, theta, width) -> tuple[float, float | None]:
    loss, log_mass = law

    def log_moment(theta: float) -> float:
        return float(scipy.special.logsumexp(log_mass + theta * loss))

    def chernoff(log_theta: float) -> float:
        theta = math.exp(log_theta)
        return steps * log_moment(theta) - theta * epsilon - log_theta - math.log1p(theta)

    if theta is None:
        theta = math.exp(scipy.optimize.minimize_scalar(chernoff, bounds=(-8, 16), method="bounded").x)
    tilted = np.exp(log_mass + theta * loss - log_moment(theta))
    mean = float(tilted @ loss)
    panel = width / math.sqrt(steps * float(tilted @ (loss - mean) ** 2))
    kept = tilted > 1e-20
    away, turned = loss[kept] - mean, tilted[kept].astype(complex)
    first, weight = _panels(np.array([0.0, panel]))
    phases, turn = np.exp(1j * np.outer(first, away)), np.exp(1j * panel * away)
    total = largest = 0.0
    for index in range(_MOST_PANELS):
        s = theta + 1j * (first + index * panel)
        values = (phases @ turned) ** steps * np.exp((s - theta) * (steps * mean - epsilon)) / (s * (s + 1))
        total += float(values.real @ weight)
        largest = max(largest, abs(total))
        turned *= turn
        if np.abs(values).max() * panel * _MOST_PANELS < 1e-11 * largest:
            break
    else:
        return theta, None
    return theta, math.log(total / math.pi) + steps * log_moment(theta) - theta * epsilon if total > 0 else None
