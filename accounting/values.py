"""Frozen values whose numbers are checked when they are made, with one typed error for whatever is wrong.

Every event, plan and budget is such a value: immutable, equal by content, without unknown fields, and the same before
and after JSON.  A wrong number never gets past the constructor, so that no accountant has to look for it again.
"""

from __future__ import annotations

import math
from typing import Annotated, Any, dataclass_transform

import numpy as np
from pydantic import BaseModel, BeforeValidator, Field, PrivateAttr, ValidationError

from .errors import InvalidParameter


def _plain(number: Any) -> Any:
    """NumPy scalars as Python numbers; strings and booleans stay what they are and are refused by the strict types."""
    return number.item() if isinstance(number, np.generic) else number


# Beyond 1e-100 .. 1e100 the squares that accounting needs leave the range of a double.
PositiveFloat = Annotated[float, BeforeValidator(_plain), Field(gt=1e-100, lt=1e100, strict=True, allow_inf_nan=False)]
Probability = Annotated[float, BeforeValidator(_plain), Field(ge=0, le=1, strict=True, allow_inf_nan=False)]
Delta = Annotated[float, BeforeValidator(_plain), Field(gt=0, lt=1, strict=True, allow_inf_nan=False)]
Count = Annotated[int, BeforeValidator(_plain), Field(ge=0, lt=2**53, strict=True)]
PositiveCount = Annotated[int, BeforeValidator(_plain), Field(ge=1, lt=2**53, strict=True)]
Name = Annotated[str, Field(min_length=1, max_length=1000, strict=True)]


@dataclass_transform(kw_only_default=False, frozen_default=True, field_specifiers=(Field, PrivateAttr))
class _PositionalFields(type(BaseModel)):
    """Tells type checkers that fields may be given by position."""


class Value(BaseModel, metaclass=_PositionalFields, frozen=True, extra="forbid", allow_inf_nan=False):
    """A frozen value; positional arguments follow the order of the fields (``kind`` excepted).

    Raises:
      InvalidParameter: a field is missing, unknown, of the wrong type or outside its domain. The message names the
        class, the field, the value and the rule.
    """

    def __init__(self, *args: Any, **fields: Any) -> None:
        names = [name for name in type(self).model_fields if name != "kind"]
        if len(args) > len(names):
            raise InvalidParameter(f"{type(self).__name__} takes {', '.join(names)}; {len(args)} values were given.")
        positional = dict(zip(names, args, strict=False))
        if twice := sorted(positional.keys() & fields.keys()):
            raise InvalidParameter(f"{type(self).__name__}.{twice[0]} was given twice; give it once.")
        try:
            super().__init__(**positional, **fields)
        except ValidationError as error:
            raise InvalidParameter(f"{type(self).__name__}{explain(error)}") from None

    def __str__(self) -> str:
        return repr(self)


def explain(error: ValidationError) -> str:
    """The first thing that is wrong, as ``.field = value: rule``."""
    first = error.errors(include_url=False)[0]
    place = "".join(f".{part}" for part in first["loc"])
    limits = first.get("ctx", {})
    if first["type"] in ("greater_than", "less_than"):  # pydantic would write 1e-100 with all its zeros
        word, limit = ("above", limits["gt"]) if first["type"] == "greater_than" else ("below", limits["lt"])
        return f"{place} = {shown(first['input'])}: must be {word} {limit:g}."
    if first["type"] == "missing":
        return f"{place}: this field is required."
    return f"{place} = {shown(first['input'])}: {first['msg'].removeprefix('Value error, ')}."


def shown(value: Any) -> str:
    """``repr`` for an error message: short, whatever the value is."""
    try:
        text = repr(value)
    except (ValueError, RecursionError):  # an integer of thousands of digits; nesting without end
        text = f"<{type(value).__name__}, too large to show>"
    return text if len(text) <= 80 else text[:77] + "..."


def check_delta(delta: float) -> float:
    """``delta`` as a float in (0, 1), or InvalidParameter."""
    return _inside("delta", delta, 0.0, 1.0, "strictly between 0 and 1, and well below 1/N")


def check_epsilon(epsilon: float) -> float:
    """``epsilon`` as a float in [0, inf), or InvalidParameter."""
    return _inside("epsilon", epsilon, -math.ulp(0.0), math.inf, "finite and not negative")


def check_tolerance(tolerance: float | None) -> float | None:
    """``tolerance`` as a float in (0, inf), or None; else InvalidParameter."""
    return None if tolerance is None else _inside("tolerance", tolerance, 0.0, math.inf, "finite and above 0")


def check_count(name: str, number: Any) -> int:
    """``number`` as a whole number from 0 to 2^53, or InvalidParameter."""
    number = _plain(number)
    if isinstance(number, bool) or not isinstance(number, int) or not 0 <= number < 2**53:
        raise InvalidParameter(f"{name} = {shown(number)}: it must be a whole number from 0 to 2^53.")
    return number


def _inside(name: str, number: Any, low: float, high: float, rule: str) -> float:
    number = _plain(number)
    try:
        if not isinstance(number, bool) and isinstance(number, int | float) and low < (found := float(number)) < high:
            return found
    except OverflowError:  # an integer beyond the range of a double
        pass
    raise InvalidParameter(f"{name} = {shown(number)}: it must be a number {rule}.")
