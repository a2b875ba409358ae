"""The least noise that keeps a promise: the returned noise multiplier never gives more epsilon than was asked for.

Bisection on log(noise multiplier); the answer is always the end at which epsilon was *evaluated* and found at or below
the target, so rounding of the search cannot break the promise.
"""

from __future__ import annotations

import math
from collections.abc import Callable

from .accountant import epsilon
from .errors import InvalidParameter, TargetUnreachable
from .events import Event, Relation
from .values import check_delta, check_epsilon

_LEAST, _MOST = 1e-6, 1e9


def calibrate_noise_multiplier(
    target_epsilon: float, delta: float, event_of: Callable[[float], Event], *, relation: Relation
) -> float:
    """A noise multiplier whose event is (target_epsilon, delta)-private, within 1e-4 of the target where it can be.

    Args:
      target_epsilon: positive.
      delta: in (0, 1).
      event_of: noise multiplier -> everything that will be released with it, all steps included.
      relation: the neighbouring relation.

    Raises:
      TargetUnreachable: no noise reaches the target; the message says what the largest one reaches.
      InvalidParameter: a target that is not positive, or delta outside (0, 1).
      Unsupported: no accountant covers the event.
    """
    target = check_epsilon(target_epsilon)
    if target == 0:
        raise InvalidParameter("target_epsilon = 0: no finite noise gives epsilon 0 for certain; ask for more than 0.")
    delta = check_delta(delta)

    def reached(noise_multiplier: float) -> float:
        return epsilon(event_of(noise_multiplier), delta, relation=relation).upper

    low, high = 1.0, 1.0
    while (at_high := reached(high)) > target:
        low, high = high, 4 * high
        if high > _MOST:
            raise TargetUnreachable(
                f"epsilon {target:g} at delta {delta:g} is out of reach: with noise multiplier {low:.3g} the bound is "
                f"still {at_high:.4g}. Use fewer steps, a smaller sample rate, a larger cap, or a larger delta."
            )
    while low == high or reached(low) <= target:
        low, high = low / 4, low
        if low < _LEAST:
            return high
    at_high = reached(high)
    while target - at_high > 1e-4 * min(1.0, target) and high / low > 1 + 1e-12:
        middle = math.sqrt(low * high)
        if (at_middle := reached(middle)) <= target:
            high, at_high = middle, at_middle
        else:
            low = middle
    return high
