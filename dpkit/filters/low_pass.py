"""Low-pass filter of the released gradients (DOPPLER): the noise is white, the gradient is slow.

Guarantees: with coefficients a (a_0 = 1) and b, released gradients g_0, g_1, ... and zeros before them,

    m_t = -Σ_{r=1..na} a_r m_{t-r} + Σ_{r=0..nb} b_r g_{t-r},
    c_t = the same for g ≡ 1: the step response, whose second sum has min(t, nb) + 1 terms,
    value_t = m_t / c_t,

so a constant gradient passes unchanged from step 0 on, to a relative rounding error of at most 2^-8 (a hundredth of
that in practice). Filters for which that cannot be shown are refused when they are made: unstable ones, and those with
c_t <= 0 for some t, however late. It is post-processing of released values and costs no privacy.

In the steady state the noise variance is multiplied by ``noise_gain`` = Σ h_k² / (Σ h_k)², h the impulse response. What
happens to the signal depends on how slowly the gradient changes.

Not promised: a better model. The filter REPLACES momentum (give the optimizer momentum 0, or both act one after the
other). The paper claims 3 to 10 percent of accuracy; independent re-tests (https://arxiv.org/abs/2511.08841, tables 1
and 2) found small gains at most, between -1.6 and +1.4 points in seven settings, and a loss where clipping biases the
gradient. The paper's own tables of coefficients were not available here; the presets are named by what they are.

Memory: max(na, nb) tensors of the size of each parameter, in float32, or in float64 where float32 would lose the
guarantee above (steep filters of high order).
Source: Zhang et al. 2024, "DOPPLER: Differentially Private Optimizers with Low-pass Filter for Privacy Noise
Reduction", https://arxiv.org/abs/2408.13460.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from dpkit.errors import InvalidArgument
from dpkit.types import Named, Released

LONGEST_MEMORY = 2**17
"""Steps within which a filter must have forgotten half of what it held: no training is much longer than that."""

_LARGEST_ERROR = 2.0**-8
_GAINS = (2.0**-40, 2.0**40)
_UNIT_ROUNDOFF = {torch.float32: 2.0**-24, torch.float64: 2.0**-53}


class LowPassState(NamedTuple):
    """Between steps.

    Attributes:
      taps: name -> what later outputs will add: tap i goes into the output in i + 1 steps.
      ones: the same for a gradient that is 1 at every step; gives the step response.
    """

    taps: dict[str, tuple[Tensor, ...]]
    ones: tuple[float, ...]


@dataclass(frozen=True)
class LowPass:
    """The filter with the transfer function Σ b_r z^-r / Σ a_r z^-r, divided by its step response.

    Args:
      b: weights of the gradients, the newest first.
      a: weights of the outputs, a[0] being that of the newest; all coefficients are divided by it.
    Raises:
      InvalidArgument: the filter is unstable, its step response is not positive at all times, it remembers for too
        long, or its coefficients are no numbers.
    """

    b: tuple[float, ...]
    a: tuple[float, ...] = (1.0,)
    _dtype: torch.dtype = field(init=False, repr=False, compare=False, default=torch.float32)

    def __post_init__(self) -> None:
        b, a = _numbers("b", self.b), _numbers("a", self.a)
        if a[0] == 0:
            raise InvalidArgument(
                f"a is {a}; a[0] is the weight of the output itself, by which all coefficients are divided, so it must "
                "not be 0."
            )
        object.__setattr__(self, "b", _numbers("b / a[0]", [weight / a[0] for weight in b]))
        object.__setattr__(self, "a", _numbers("a / a[0]", [weight / a[0] for weight in a]))
        object.__setattr__(self, "_dtype", _check(self))

    def init(self, parameters: Named) -> LowPassState:
        taps = {}
        for name, parameter in parameters.items():
            dtype = torch.promote_types(_at_least_float32(parameter), self._dtype)
            taps[name] = tuple(torch.zeros_like(parameter, dtype=dtype) for _ in range(self._order))
        return LowPassState(taps, (0.0,) * self._order)

    def update(self, released: Released, state: LowPassState) -> tuple[Released, LowPassState]:
        response, ones = self._advance(1.0, state.ones)
        value, taps = {}, {}
        for name, gradient in released.value.items():
            dtype = _at_least_float32(gradient)
            newest = gradient.to(torch.promote_types(dtype, self._dtype))
            filtered, taps[name] = self._advance_tensor(newest, state.taps[name])
            value[name] = filtered.div_(response).to(dtype)
        return released._replace(value=value), LowPassState(taps, ones)

    def impulse_response(self, length: int) -> np.ndarray:
        """(length,) h: what m_0, m_1, ... are after a single gradient of 1, before the division by c_t."""
        return _filtered(self, np.eye(1, _length(length))[0])

    def step_response(self, length: int) -> np.ndarray:
        """(length,) c_0, c_1, ..., by which the outputs are divided."""
        return _filtered(self, np.ones(_length(length)))

    def frequency_response(self, frequencies: Sequence[float] | np.ndarray) -> np.ndarray:
        """Complex gain of m at each of ``frequencies``, in cycles per step: from 0 to 0.5, the Nyquist frequency."""
        from scipy.signal import freqz

        where: Any = np.asarray(frequencies, dtype=float)  # scipy's own types know of whole numbers alone
        coefficients: Any = (self.b, self.a)
        return freqz(*coefficients, worN=where, fs=1.0)[1]

    @property
    def dc_gain(self) -> float:
        """Gain of m for a constant gradient, Σ h: where c_t ends."""
        return math.fsum(self.b) / math.fsum(self.a)

    @property
    def noise_gain(self) -> float:
        """Factor on the noise variance of the value in the steady state, Σ h² / (Σ h)²."""
        # 2^-40 of the largest value is left after that many steps, and 2^-80 of its square.
        h = self.impulse_response(len(self.b) + 40 * _memory(self.a))
        return float(np.sum(h**2)) / self.dc_gain**2

    @property
    def largest_pole(self) -> float:
        """Largest magnitude of a pole, below 1; 0 for a filter without feedback."""
        return float(np.abs(np.roots(self.a)).max(initial=0.0))

    @property
    def _order(self) -> int:
        return max(len(self.a), len(self.b)) - 1

    def _advance(self, newest: Any, taps: tuple[Any, ...]) -> tuple[Any, tuple[Any, ...]]:
        """(output, next taps): the transposed direct form, which needs no past inputs and outputs beside its taps."""
        output = self.b[0] * newest + taps[0] if taps else self.b[0] * newest
        after = []
        for r in range(1, self._order + 1):
            tap = taps[r] if r < self._order else 0.0
            if r < len(self.b):
                tap = self.b[r] * newest + tap
            if r < len(self.a):
                tap = tap - self.a[r] * output
            after.append(tap)
        return output, tuple(after)

    def _advance_tensor(self, newest: Tensor, taps: tuple[Tensor, ...]) -> tuple[Tensor, tuple[Tensor, ...]]:
        """:meth:`_advance` with one pass over the memory for each product; changes nothing that it is given."""
        output = torch.add(taps[0], newest, alpha=self.b[0]) if taps else newest * self.b[0]
        after = []
        for r in range(1, self._order + 1):
            terms = [(newest, self.b[r])] if r < len(self.b) else []
            terms += [(output, -self.a[r])] if r < len(self.a) else []
            if r < self._order:
                tap = taps[r]
            else:
                (first, weight), *terms = terms
                tap = first * weight
            for term, weight in terms:
                tap = torch.add(tap, term, alpha=weight)
            after.append(tap)
        return output, tuple(after)


def momentum(beta: float) -> LowPass:
    """The exponential average with bias correction: value_t = Σ_k β^k g_{t-k} / Σ_k β^k. Noise gain (1 - β)/(1 + β)."""
    if not 0 <= beta < 1:
        raise InvalidArgument(f"beta is {beta!r}; the share of the past in an average must be in [0, 1).")
    return LowPass(b=(1 - beta,), a=(1.0, -beta))


def first_order() -> LowPass:
    """A first-order filter that its authors' code names in a comment: a = [1, -0.9], b = [0.15, -0.05]; unit gain."""
    return LowPass(b=(0.15, -0.05), a=(1.0, -0.9))


def nyquist_zero() -> LowPass:
    """First order with a zero at the Nyquist frequency: a = [1, -9/11], b = [1/11, 1/11]; unit gain.

    It takes away what changes sign from step to step.
    """
    return LowPass(b=(1 / 11, 1 / 11), a=(1.0, -9 / 11))


def butterworth(order: int, cutoff: float) -> LowPass:
    """A Butterworth filter: as flat as possible in the passed band.

    From order 2 on the newest gradients weigh less than somewhat older ones, so the value lags behind.

    Args:
      order: at least 1; tensors kept for each parameter.
      cutoff: frequency at which half of the power passes, in cycles per step, in (0, 0.5): what changes over fewer than
        1/cutoff steps is damped.
    Raises:
      InvalidArgument: for arguments outside their domain.
    """
    from scipy.signal import butter

    if isinstance(order, bool) or not isinstance(order, int) or order < 1:
        raise InvalidArgument(f"order is {order!r}; it must be a whole number, at least 1.")
    if not 0 < cutoff < 0.5:
        raise InvalidArgument(f"cutoff is {cutoff!r}; it is a frequency in cycles per step and must be in (0, 0.5).")
    coefficients: Any = butter(order, cutoff, fs=1.0)
    b, a = coefficients
    try:
        return LowPass(b=tuple(b), a=tuple(a))
    except InvalidArgument as error:  # its poles lie so near to each other that rounding the coefficients moves them
        raise InvalidArgument(
            f"the Butterworth filter of order {order} with cutoff {cutoff:g} is too steep for double precision; choose "
            f"a lower order or a higher cutoff. ({error})"
        ) from None


def _numbers(name: str, values: Any) -> tuple[float, ...]:
    try:
        numbers = () if isinstance(values, str) else tuple(float(value) for value in values)
    except (TypeError, ValueError):
        numbers = ()
    if not numbers or not all(map(math.isfinite, numbers)):
        raise InvalidArgument(f"{name} is {values!r}; give the filter's coefficients as a tuple of finite numbers.")
    return numbers


def _length(length: int) -> int:
    if isinstance(length, bool) or not isinstance(length, int) or length < 1:
        raise InvalidArgument(f"length is {length!r}; it is a number of steps, at least 1.")
    return length


def _at_least_float32(tensor: Tensor) -> torch.dtype:
    return torch.promote_types(tensor.dtype, torch.float32)


def _filtered(filter_: LowPass, values: np.ndarray) -> np.ndarray:
    from scipy.signal import lfilter

    return np.asarray(lfilter(filter_.b, filter_.a, values))


def _check(filter_: LowPass) -> torch.dtype:
    """Refuses filters that would not keep the guarantee; returns the type in which ``filter_`` keeps it.

    Raises:
      InvalidArgument: saying how the filter fails.
    """
    poles = np.roots(filter_.a)
    if filter_.largest_pole >= 1:
        pole = poles[np.abs(poles).argmax()]
        raise InvalidArgument(
            f"{filter_} has a pole at {pole:.6g} (magnitude {filter_.largest_pole:.6g}); a stable filter has all poles "
            "inside of the unit circle: otherwise it never forgets. Choose smaller magnitudes in a."
        )
    memory = _memory(filter_.a)
    least, largest = _GAINS
    if not least <= filter_.dc_gain <= largest:
        raise InvalidArgument(
            f"{filter_} has the gain {filter_.dc_gain:.6g} for a constant gradient; the output is divided by it, so it "
            f"must be positive, and in [{least:.1g}, {largest:.1g}] to be computed. Give b another sum: a positive "
            "factor common to all of b cancels out."
        )
    responses = _settled_step_response(filter_, memory)
    if (low := responses.min()) <= 0:
        raise InvalidArgument(
            f"{filter_} has a step response of {low:.6g} at step {responses.argmin()}; the output is divided by it, so "
            "it must be positive at every step. Choose a filter with less overshoot, and a positive b[0]."
        )
    error = _rounding(filter_, responses)
    for dtype in (torch.float32, torch.float64):
        if error * _UNIT_ROUNDOFF[dtype] <= _LARGEST_ERROR:
            return dtype
    raise InvalidArgument(
        f"{filter_} cannot be computed: a constant gradient would come back with a relative rounding error of up to "
        f"{error * _UNIT_ROUNDOFF[torch.float64]:.2g} in double precision. Choose a lower order or a higher cutoff."
    )


def _memory(a: tuple[float, ...]) -> int:
    """N such that without input the largest of ``len(a) - 1`` outputs in a row is at most half as large N steps later.

    It exists for stable filters alone: with x the vector of the last outputs and M the matrix that advances it by one
    step, N is such that ‖M^N‖ <= 1/2 in the maximum norm, and a filter with a pole on or outside of the unit circle has
    ‖M^N‖ >= 1 for all N.

    Raises:
      InvalidArgument: it is longer than ``LONGEST_MEMORY``.
    """
    from scipy.signal import lfilter, lfiltic

    order = len(a) - 1
    if order == 0:
        return 1
    starts = np.stack([lfiltic([1.0], a, y=unit) for unit in np.eye(order)])
    length = 256
    while length <= 2 * LONGEST_MEMORY:
        # Row sums of the matrices: outputs follow from the vector of old outputs linearly.
        left = np.abs(lfilter([1.0], a, np.zeros((order, length)), zi=starts)[0]).sum(0)
        large = np.flatnonzero(~(left <= 0.5))
        memory = order + (int(large[-1]) + 1 if len(large) else 0)
        if memory <= min(length, LONGEST_MEMORY):
            return memory
        length *= 2
    raise InvalidArgument(
        f"a is {a}, whose largest pole has magnitude {np.abs(np.roots(a)).max():.9f}: it takes more than "
        f"{LONGEST_MEMORY} steps to forget half of what it holds. Choose smaller poles."
    )


def _settled_step_response(filter_: LowPass, memory: int) -> np.ndarray:
    """The step response up to where it provably stays above half of the DC gain.

    From step nb on, d_t = c_t - gain follows the recursion without input. If |d| is at most gain/2 on ``memory``
    vectors of old outputs in a row, it is at most gain/4 on all that come later.

    Raises:
      InvalidArgument: the gain is nothing but what is left after cancellation.
    """
    gain = filter_.dc_gain
    window = memory + len(filter_.a)
    for windows in (2, 4, 8, 16, 32, 64):
        responses = filter_.step_response(len(filter_.b) + windows * window)
        if np.abs(responses[-window:] - gain).max() <= gain / 2:
            return responses
    raise InvalidArgument(
        f"{filter_} has the gain {gain:.3g} for a constant gradient and a step response of up to "
        f"{np.abs(responses).max():.3g}: it passes on hardly anything of a constant gradient, which is no low-pass "
        "filter. Choose coefficients b with a larger sum."
    )


def _rounding(filter_: LowPass, responses: np.ndarray) -> float:
    """Relative rounding error of the value for a constant gradient, at most, in units of the unit roundoff.

    To first order. An output is a sum of |a| + |b| products, each rounded with its coefficient and at every addition
    (Higham 2002, section 4.2); an error made in one output goes on as 1/A answers to an impulse.
    """
    from scipy.signal import fftconvolve, lfilter

    length = len(responses)
    spread = np.abs(lfilter([1.0], filter_.a, np.eye(1, length)[0]))
    fed_back = lfilter([0.0, *map(abs, filter_.a[1:])], [1.0], responses)
    fed_in = lfilter(np.abs(filter_.b), [1.0], np.ones(length))
    errors = fftconvolve(spread, fed_back + fed_in)[:length]
    return (len(filter_.a) + len(filter_.b) + 2) * float((errors / responses).max())
