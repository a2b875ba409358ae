"""What a ledger holds and hands out: budgets, plans, receipts and sums."""

from __future__ import annotations

import secrets
import threading
from typing import Annotated, NamedTuple

from pydantic import Field, SerializerFunctionWrapHandler, ValidationInfo, field_validator, model_serializer

from .errors import InvalidParameter, LedgerError
from .events import Event, Relation, Repeated
from .privacy_filters import RenyiFilter
from .values import Delta, Name, PositiveCount, PositiveFloat, Value

# Whole numbers as JSON readers everywhere take them.
Fact = str | Annotated[int, Field(gt=-(2**63), lt=2**63)] | float | bool | None | list[str]


class Budget(Value):
    """What one data set may spend in all.

    Attributes:
      epsilon, delta: without orders, the plans' epsilons and deltas may add up to this.
      orders: Renyi orders, fixed here, before the first release. With them, a plan is admitted if a
        :class:`~accounting.privacy_filters.RenyiFilter` of these orders for (epsilon, delta) holds all plans, which is
        far more plans than adding up allows; ``best_order`` names a good one.

    Raises:
      InvalidParameter: an order for which no moments are tabulated, or that cannot give (epsilon, delta).
    """

    epsilon: PositiveFloat
    delta: Delta
    orders: tuple[PositiveFloat, ...] = ()

    @field_validator("orders")
    @classmethod
    def _usable(cls, orders: tuple[float, ...], others: ValidationInfo) -> tuple[float, ...]:
        if not orders or not {"epsilon", "delta"} <= others.data.keys():  # what is wrong with those is said first
            return orders
        try:
            return RenyiFilter(others.data["epsilon"], others.data["delta"], orders).orders
        except InvalidParameter as error:
            raise ValueError(str(error).rstrip(".")) from None


def _new_plan_id() -> str:
    return secrets.token_hex(16)


class PlanRecord(Value):
    """One run as it was fixed before its first release.

    Attributes:
      event: what one step does; or what ``steps_per_event`` of them do together.
      steps: how many steps are planned; the ledger refuses one more.
      delta: at which this plan's epsilon is stated.
      unit: what a neighbour differs in: "example", "user", "client".
      num_examples: the public number of units.
      facts: for the statement, no part of the guarantee: ``sampling``, ``noise_tier``, ``noise_generator``,
        ``max_grad_norm``, ``certified`` (bool), ``certified_reason`` (str), ``caveats`` (list of str), and whatever
        else is public.
      plan_id: random unless given; a resumed run gives the id of the run it resumes.
      steps_per_event: how many steps, counted from the first charge, one event covers: the steps of a pass over the
        data, or of a whole run with correlated noise. An event that was begun counts in full.
    """

    event: Event
    steps: PositiveCount
    delta: Delta
    relation: Relation
    unit: Name
    num_examples: PositiveCount
    facts: dict[str, Fact] = Field(default_factory=dict)
    plan_id: Name = Field(default_factory=_new_plan_id)
    steps_per_event: PositiveCount = 1

    def event_of(self, steps: int) -> Event:
        """What ``steps`` steps, the first ones of the plan, do together."""
        return Repeated(event=self.event, count=-(-steps // self.steps_per_event))

    @model_serializer(mode="wrap")
    def _without_default(self, handler: SerializerFunctionWrapHandler) -> dict[str, object]:
        # A plan whose event is one step stays readable for versions that know no other.
        return {name: value for name, value in handler(self).items() if (name, value) != ("steps_per_event", 1)}


class Spent(NamedTuple):
    """What the ledger's charges cost so far.

    Attributes:
      epsilon, delta: one plan: at the charges so far. Several: the sum over plans at their planned steps, because
        a later plan may have been chosen after seeing what an earlier one gave; with Renyi orders, the budget.
      committed_epsilon: at the planned steps. If a run was stopped because of what was seen, this is the guarantee.
      accountant: which one gave the bound; several are joined by "+"; "renyi_filter" for the budget itself.
      steps_charged, steps_planned: over all plans.
    """

    epsilon: float
    delta: float
    committed_epsilon: float
    accountant: str
    steps_charged: int
    steps_planned: int


class Receipt:
    """Proof of one durable charge: it buys exactly one release.

    Only a ledger makes one. It cannot be copied or pickled, or one charge could buy two releases.
    """

    __slots__ = ("_lock", "_used", "digest", "plan_id", "sequence", "step")

    def __init__(self, *, sequence: int, plan_id: str, step: int, digest: str) -> None:
        self.sequence = sequence
        self.plan_id = plan_id
        self.step = step
        self.digest = digest
        self._used = False
        self._lock = threading.Lock()

    def consume(self) -> None:
        """Marks the receipt as used. Raises LedgerError the second time."""
        with self._lock:
            if self._used:
                raise LedgerError(f"{self} was used before. One charge buys one release: charge again.")
            self._used = True

    def __reduce__(self):
        raise LedgerError(f"{self} cannot be copied or pickled: one charge buys one release.")

    def __repr__(self) -> str:
        return f"Receipt(sequence={self.sequence}, plan_id={self.plan_id!r}, step={self.step})"
