"""The noise, the steps or the sample rate that keep a promise: none gives more epsilon than was asked for.

The search itself goes over cheap, coarse bounds; what it finds is then evaluated in full, and moved until epsilon was
*evaluated* and found at or below the target. No property of the search, not even that epsilon is monotone, can break
the promise.
"""

from __future__ import annotations

import math
from collections.abc import Callable

from .accountant import Bound, checked_relation, epsilon
from .errors import InvalidParameter, TargetUnreachable
from .events import Event, Relation
from .values import check_delta, check_epsilon

_LEAST_NOISE, _MOST_NOISE = 1e-6, 1e9
_LEAST_RATE = 1e-12
_MOST_STEPS = 2**40
_FEW_STEPS = 1000
_BELOW = 1 - 1e-9
"""Of the target: another machine, or release of a library, may find an epsilon that differs in its last digits."""


def calibrate_noise_multiplier(
    target_epsilon: float, delta: float, event_of: Callable[[float], Event], *, relation: Relation
) -> float:
    """A noise multiplier whose event is (target_epsilon, delta)-private, within 0.02 percent of the target if possible.

    Guarantee: epsilon of ``event_of`` the returned number was evaluated, and its upper bound is at most the target.
    Requires: that exactly the returned number is used, for the event that ``event_of`` describes.
    Why: what a search finds is returned only after :func:`~accounting.epsilon` confirmed it; no property of the search
    matters.

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
    search = _Search(target_epsilon, delta, event_of, relation)
    low = high = 1.0
    while not search.roughly(high):
        low, high = high, 4 * high
        if high > _MOST_NOISE:
            raise TargetUnreachable(
                f"epsilon {search.target:g} at delta {search.delta:g} is out of reach: with noise multiplier {low:.3g} "
                f"the bound is still {search.rough(low):.4g}. Use fewer steps, a smaller sample rate, a larger cap, or "
                "a larger delta."
            )
    while low == high or search.roughly(low):
        low, high = low / 4, low
        if low < _LEAST_NOISE:
            return search.nearest(high, safe=2.0)
    return search.nearest(search.crossing(low, high), safe=1.001)


def calibrate_sample_rate(
    target_epsilon: float, delta: float, event_of: Callable[[float], Event], *, relation: Relation
) -> float:
    """The largest sample rate in (0, 1] whose event is (target_epsilon, delta)-private, up to a fraction of a percent.

    Guarantee, Requires, Why: as of :func:`calibrate_noise_multiplier`.

    Args:
      event_of: sample rate -> everything that will be released with it, all steps included.

    Raises: as :func:`calibrate_noise_multiplier`.
    """
    search = _Search(target_epsilon, delta, event_of, relation)
    if search.holds(1.0):
        return 1.0
    low, high = 0.01, 1.0
    while not search.roughly(low):
        low, high = low / 16, low
        if low < _LEAST_RATE:
            raise TargetUnreachable(
                f"epsilon {search.target:g} at delta {search.delta:g} is out of reach: at sample rate {high:.3g} the "
                f"bound is still {search.rough(high):.4g}. Use more noise, fewer steps, or a larger delta."
            )
    return search.nearest(search.crossing(high, low), safe=1 / 1.001)


def calibrate_steps(
    target_epsilon: float, delta: float, event_of: Callable[[int], Event], *, relation: Relation
) -> int:
    """The largest number of steps whose event is (target_epsilon, delta)-private, up to a fraction of a percent.

    Guarantee, Requires, Why: as of :func:`calibrate_noise_multiplier`.

    Args:
      event_of: number of steps -> everything that will be released in them.

    Raises:
      TargetUnreachable: one step is too much, or more than 2^40 steps are not.
      InvalidParameter, Unsupported: as :func:`calibrate_noise_multiplier`.
    """
    search = _Search(target_epsilon, delta, lambda steps: event_of(round(steps)), relation)
    if not search.holds(1):
        raise TargetUnreachable(
            f"epsilon {search.target:g} at delta {search.delta:g} is out of reach: one step alone has "
            f"{search.upper(1):.4g}. Use more noise, a smaller sample rate, or a larger delta."
        )
    low, high = 1, 2
    while search.roughly(high):
        low, high = high, 4 * high
        if high > _MOST_STEPS:
            raise TargetUnreachable(
                f"More than {_MOST_STEPS} steps stay within epsilon {search.target:g} at delta {search.delta:g}: the "
                "number of steps is not what limits this run."
            )
    if high > _FEW_STEPS:
        low = math.floor(search.nearest(search.crossing(high, low), safe=1 / 1.001))
        while not search.holds(low):
            low -= 1 + low // 10_000
        high = low + 2 + low // 5_000
    while high - low > 1:  # low was found within the target; from here on, every number that counts is looked at
        middle = (low + high) // 2
        low, high = (middle, high) if search.holds(middle) else (low, middle)
    return low if search.holds(low) else 1


class _Search:
    """Epsilon as a function of one positive number x, coarse and in full."""

    def __init__(self, target: float, delta: float, event_of: Callable[..., Event], relation: Relation) -> None:
        self.target = check_epsilon(target)
        if self.target == 0:
            raise InvalidParameter("target_epsilon = 0: no finite noise gives epsilon 0 for certain; ask for more.")
        self.delta, self.event_of, self.relation = check_delta(delta), event_of, checked_relation(relation)
        self._seen: dict[tuple[float, float | None], Bound] = {}

    def _bound(self, x: float, tolerance: float | None) -> Bound:
        if (x, tolerance) not in self._seen:
            found = epsilon(self.event_of(x), self.delta, relation=self.relation, tolerance=tolerance)
            self._seen[x, tolerance] = found
        return self._seen[x, tolerance]

    def upper(self, x: float) -> float:
        return self._bound(x, None).upper

    def holds(self, x: float) -> bool:
        return self.upper(x) <= self.target * _BELOW

    def rough(self, x: float) -> float:
        return self._bound(x, 0.02 * self.target).upper

    def roughly(self, x: float) -> bool:
        return self.rough(x) <= self.target

    def crossing(self, over: float, under: float) -> float:
        """About where epsilon meets the target, between x with too much of it and x with little enough."""
        (a, b) = ((math.log(x), self._gap(x)) for x in (over, under))
        kept = 0  # the end that stayed in the step before: its value is halved if it stays again (Illinois rule)
        for _ in range(40):
            share = a[1] / (a[1] - b[1]) if math.isfinite(a[1]) and math.isfinite(b[1]) else 0.5
            place = a[0] + min(0.95, max(0.05, share)) * (b[0] - a[0])
            found = (place, self._gap(math.exp(place)))
            if abs(found[1]) < 2e-3 or abs(a[0] - b[0]) < 1e-6:
                return math.exp(place)
            if found[1] > 0:
                a, b, kept = found, (b[0], b[1] / 2 if kept == 1 else b[1]), 1
            else:
                a, b, kept = (a[0], a[1] / 2 if kept == -1 else a[1]), found, -1
        return under

    def _gap(self, x: float) -> float:
        at = self.rough(x)
        return math.log(at / self.target) if at > 0 else -math.inf

    def nearest(self, x: float, safe: float) -> float:
        """A number near ``x`` whose epsilon was evaluated and is within the target, by 0.02 percent if it can be.

        Secant steps in logarithms; ``safe``, above or below 1, is a factor that makes epsilon smaller.
        """
        aim = math.log(self.target) + math.log1p(-1e-4)
        far = x * safe**20
        slope = (self._gap(far) - self._gap(x)) / (20 * math.log(safe))
        found, before = None, None
        for _ in range(8):
            at = self.upper(x)
            if self.holds(x) and (found is None or at > self.upper(found)):
                found = x
                if at >= self.target * (1 - 2e-4):
                    break
            here = (math.log(x), math.log(max(at, 1e-300)))
            if before is not None and abs(here[0] - before[0]) > 1e-6:
                slope = (here[1] - before[1]) / (here[0] - before[0])
            if not 1e-3 < -slope * math.copysign(1, safe - 1) < 1e3:
                break
            before, x = here, math.exp(here[0] + min(0.1, max(-0.1, (aim - here[1]) / slope)))
        while found is None:
            x *= safe
            if not _LEAST_RATE < x < _MOST_STEPS:
                raise TargetUnreachable(f"epsilon {self.target:g} at delta {self.delta:g} is out of reach.")
            found = x if self.holds(x) else None
        return found
