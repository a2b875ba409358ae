"""Numbers as they are added and printed: a printed bound is never below the bound that was computed or typed."""

from __future__ import annotations

import math
from decimal import ROUND_CEILING, Context, Decimal
from fractions import Fraction

from .errors import InvalidParameter
from .values import shown


def round_up(x: float, digits: int = 4) -> float:
    """The least multiple of 10^-digits that is not below ``x``; infinity stays infinity.

    Guarantee: what is printed is never below ``x``, and neither is its nearest double.
    Requires: a number; a NaN is refused.
    Why: decimal arithmetic rounds the exact value of ``x`` up, and the nearest double to a decimal that is at least the
    double ``x`` is at least ``x``.
    """
    x = _number(x)
    if abs(x) >= 2**52:  # whole numbers, and infinity
        return x
    return float(Decimal(x).quantize(Decimal(1).scaleb(-digits), rounding=ROUND_CEILING))


def round_up_text(x: float, digits: int = 6) -> str:
    """``x`` with at most ``digits`` significant digits, not below ``x`` as it was typed: 1e-5 is "1e-05".

    Guarantee: what is printed and read again is not below ``x``, so that a guarantee at delta ``x`` holds at the delta
    that is printed.
    Requires: a number; a NaN is refused.
    Why: the shortest decimal that means ``x`` is rounded up.
    """
    x = _number(x)
    if math.isinf(x):
        return str(x)
    raised = Context(prec=digits, rounding=ROUND_CEILING).plus(Decimal(repr(x)))
    return f"{float(raised):.{digits}g}"


def as_typed(x: float) -> Fraction:
    """The exact value of the shortest decimal that means ``x``: of 0.1 one tenth, not the double next to it."""
    return Fraction(repr(float(x)))


def _number(x: float) -> float:
    try:
        found = float(x)
    except (TypeError, ValueError, OverflowError):
        found = math.nan
    if math.isnan(found) or isinstance(x, str):
        raise InvalidParameter(f"{shown(x)} cannot be rounded up: it must be a number. A NaN is no bound to print.")
    return found
