"""What touched the data, as frozen values: the only language in which plans, ledgers and accountants speak.

An event is a *description*; it promises nothing by itself.  Its meaning never changes once released: a new mechanism
gets a new ``kind``, and an accountant that does not know a kind refuses it.

``noise_multiplier`` always means: standard deviation of the noise / L2 sensitivity of the sum, where the sensitivity
is taken under the neighbouring relation of the plan (one record's clipping norm C for add-or-remove-one and zero-out,
2C for replace-one).
"""

from __future__ import annotations

from enum import StrEnum
from typing import Annotated, Any, Literal

from pydantic import Field, PrivateAttr, TypeAdapter, ValidationError

from .errors import InvalidParameter, LedgerError, Unsupported
from .values import Count, PositiveCount, PositiveFloat, Probability, Value, explain

EVENT_VERSION = 1
DEEPEST = 50
"""Most events inside one another: everything that reads an event, JSON parsers too, has a limit of its own."""


class Relation(StrEnum):
    """Which pairs of data sets must be hard to tell apart."""

    ADD_REMOVE = "add_remove"
    """One record more or less; the public N is typed by the user, the true size stays hidden."""
    REPLACE_ONE = "replace_one"
    """One record replaced by any other; the size is public."""
    ZERO_OUT = "zero_out"
    """One record replaced by a null record that contributes nothing but keeps its slot; the size is public."""


class Gaussian(Value):
    """A sum over all records, released with Gaussian noise of ``noise_multiplier`` times its sensitivity."""

    noise_multiplier: PositiveFloat
    kind: Literal["gaussian"] = "gaussian"


class _Nested(Value):
    """An event that holds events."""

    _depth: int = PrivateAttr(default=0)

    def model_post_init(self, _: Any, /) -> None:
        inner = self.events if isinstance(self, Composed) else [getattr(self, "event", None)]
        depth = 1 + max((part._depth for part in inner if isinstance(part, _Nested)), default=0)
        if depth > DEEPEST:
            raise ValueError(f"events may lie in one another at most {DEEPEST} deep")
        self._depth = depth  # pyright: ignore[reportAttributeAccessIssue]  # private, and set before anyone sees it


class Poisson(_Nested):
    """``event`` on a fresh subsample that holds each record independently with probability ``sample_rate``."""

    sample_rate: Probability
    event: Event
    kind: Literal["poisson"] = "poisson"


class TruncatedPoisson(_Nested):
    """A Poisson subsample that, if larger than ``cap``, is cut to a uniformly drawn subset of ``cap`` records.

    Attributes:
      cap: most records that a step may use.
      max_examples: public upper bound of the number of records, without the one that neighbours differ in.
    """

    sample_rate: Probability
    cap: PositiveCount
    max_examples: Count
    event: Event
    kind: Literal["truncated_poisson"] = "truncated_poisson"


class Repeated(_Nested):
    """``event`` run ``count`` times, each with fresh randomness; later runs may depend on earlier outputs."""

    event: Event
    count: Count
    kind: Literal["repeated"] = "repeated"


class Composed(_Nested):
    """All ``events`` one after the other. Inside a Poisson event: all of them on the same subsample."""

    events: tuple[Event, ...]
    kind: Literal["composed"] = "composed"


Event = Annotated[
    Gaussian | Poisson | TruncatedPoisson | Repeated | Composed,
    Field(discriminator="kind"),
]

for _recursive in (Poisson, TruncatedPoisson, Repeated, Composed):
    _recursive.model_rebuild()


class _Envelope(Value):
    version: PositiveCount
    event: Event


_VERSION = TypeAdapter(dict)


def event_to_json(event: Event) -> str:
    """One line of JSON that :func:`event_from_json` turns into an equal event."""
    return _Envelope(version=EVENT_VERSION, event=event).model_dump_json()


def event_from_json(text: str | bytes) -> Event:
    """The event that :func:`event_to_json` wrote.

    Raises:
      Unsupported: the text was written by a newer version of this package, or holds a kind that is unknown here.
      LedgerError: the text is not an event at all, or its numbers lie outside their domain.
    """
    try:
        version = _VERSION.validate_json(text).get("version")
        if isinstance(version, int) and version > EVENT_VERSION:
            raise Unsupported(
                f"The event has version {version}; this package reads up to {EVENT_VERSION}. Upgrade the package."
            )
        return _Envelope.model_validate_json(text).event
    except ValidationError as error:
        reason = explain(error)
    except InvalidParameter as error:
        reason = str(error)
    if "does not match any of the expected tags" in reason:
        raise Unsupported(f"Unknown kind of event ({reason}) Upgrade the package.")
    raise LedgerError(f"This is not an event: {reason}")
