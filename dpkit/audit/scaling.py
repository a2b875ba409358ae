"""The claimed event with more or less noise: a family with one parameter, and the search for what evidence rejects.

Guarantee: a scale of the noise that is rejected with probability at most alpha where it is the true one gives a lower
bound on epsilon that is too high with probability at most alpha: less noise than a rejected scale is taken for granted
then, epsilon falls as the noise grows, and the accountant's lower bound is not above epsilon at that scale.
"""

from __future__ import annotations

import math
from collections.abc import Callable

import accounting
from accounting import Event, Relation, Unsupported
from accounting.events import (
    Composed,
    DiscreteGaussian,
    Gaussian,
    Laplace,
    MatrixMechanism,
    OnePass,
    Poisson,
    Repeated,
    Select,
    TruncatedPoisson,
    WithoutReplacement,
)
from dpkit.errors import InvalidArgument

from .verdict import LowerBound

_Noise = Gaussian | DiscreteGaussian | Laplace | MatrixMechanism
_LEAST_SCALE, _MOST_SCALE = 2.0**-7, 2.0**10
_FIRST_FACTOR = 1.05
_PRECISION = 1.0005  # of the least rejected scale and the largest that is not, their ratio


def scaled(event: Event, factor: float) -> Event:
    """``event`` with every noise multiplier in it times ``factor``.

    Raises:
      InvalidArgument: ``factor`` is not positive and finite.
      Unsupported: a kind of event in it has no noise multiplier.
    """
    if not 0 < factor < math.inf:
        raise InvalidArgument(f"factor is {factor!r}: noise is scaled by a positive finite number.")
    return _with_noise(
        event, lambda noise: noise.model_copy(update={"noise_multiplier": noise.noise_multiplier * factor})
    )


def _with_noise(event: Event, changed: Callable[[_Noise], Event]) -> Event:
    """``event`` with ``changed`` of every noise in it."""
    match event:
        case Gaussian() | DiscreteGaussian() | Laplace() | MatrixMechanism():
            return changed(event)
        case Composed(events=parts):
            return Composed(tuple(_with_noise(part, changed) for part in parts))
        case Poisson() | TruncatedPoisson() | WithoutReplacement() | OnePass() | Select() | Repeated():
            return event.model_copy(update={"event": _with_noise(event.event, changed)})
        case _:
            raise Unsupported(
                f"{event.kind} has no noise multiplier that could be made larger or smaller, so there is no family of "
                "events to invert. Audit it with an estimator that takes no event: Clopper-Pearson, or one run at "
                "(epsilon, delta)."
            )


def _lower_epsilon(event: Event, delta: float, relation: Relation) -> float:
    """Not above the epsilon of ``event``, that is, of the most revealing mechanism that it describes.

    Discrete Gaussian noise is on whole numbers of any standard deviation: the finer they are, the nearer it comes to
    continuous noise of the same multiplier, which therefore has no larger epsilon.
    """
    continuous = _with_noise(
        event, lambda noise: Gaussian(noise.noise_multiplier) if isinstance(noise, DiscreteGaussian) else noise
    )
    return accounting.epsilon(continuous, delta, relation=relation).lower


def inverted(
    rejected: Callable[[float], bool],
    event_of: Callable[[float], Event],
    *,
    relation: Relation,
    delta: float,
    confidence: float,
    method: str,
    details: dict[str, float],
) -> LowerBound:
    """A lower bound of the epsilon at the smallest scale of the noise that was found rejected; 0 if none was.

    Every scale that was asked about and rejected gives a lower bound, so nothing is assumed about ``rejected``. Where
    it says yes above some scale and no below, the smallest one is the best.
    """
    scales = _rejected_scales(rejected)
    found = [(_lower_epsilon(event_of(scale), delta, relation), scale) for scale in scales]
    epsilon, scale = max(found, default=(0.0, math.inf))
    return LowerBound(
        epsilon, delta, confidence, method, details | ({"noise_scale": scale} if scale < math.inf else {})
    )


def _rejected_scales(rejected: Callable[[float], bool]) -> list[float]:
    """The scales that were asked about and rejected, down to the smallest within ``_PRECISION``."""
    yes: list[float] = []

    def asked(scale: float) -> bool:
        if answer := rejected(scale):
            yes.append(scale)
        return answer

    low = high = 1.0
    factor = _FIRST_FACTOR
    if asked(1.0):
        while high > _LEAST_SCALE and asked(low := high / factor):
            high, factor = low, min(factor**2, 2.0)
    else:
        while low < _MOST_SCALE and not asked(high := low * factor):
            low, factor = high, min(factor**2, 16.0)
    if not yes or low == high:
        return yes
    while high / low > _PRECISION:
        middle = math.sqrt(low * high)
        low, high = (low, middle) if asked(middle) else (middle, high)
    return yes
