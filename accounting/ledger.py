"""The privacy ledger of one named data set: every release is charged here, durably, before its noise is drawn.

Guarantee: at every instant, through ``kill -9``, power loss, concurrent runs and resumed runs, the ledger holds at
least one charge for every release that was bought with one of its receipts, and the epsilon computed from it covers
them.  Anything wrong with the ledger raises ``LedgerError``: no charge, no receipt, no training, no epsilon.
Requires: one release for a receipt, of the event that was charged; a disk that keeps what it was told to sync, and
file locks that work; and that nobody puts an older ledger and the note beside it back together.
Why: ``chain.py`` for the file, the budget rule below for epsilon.

The budget rule.  A plan is one event per step, or per so many steps, repeated a number of times that is fixed before
its first release, so its epsilon is an accountant's bound at the planned steps.  Later plans may be chosen after seeing
earlier results, and then joint Renyi or numerical accounting over plans is not a bound; the (epsilon, delta) of the
plans add up instead (basic composition: Dwork and Roth 2014, theorem B.1, for plans chosen adaptively one after the
other; Lyu 2022, "Composition theorems for interactive differential privacy", for plans that run at the same time).  The
sum at the planned steps must stay within the budget when a plan makes its first charge; after that, a charge only
counts.

A budget with Renyi orders holds more plans.  A plan is then admitted if the Renyi filter for (epsilon, delta) of these
orders, which were fixed with the ledger, holds all plans at their planned steps; no step is taken that was not held, so
the filter's theorem covers the steps of all plans in the order in which they were taken (``privacy_filters.py``).  The
first plan alone was fixed beforehand, and is reported at its own bound.  From the second on, what may be claimed is the
budget, and no smaller number.  What the plans have used of it depends on what was released, since later plans were
chosen by it: to claim the conversion of that, or of whichever order turned out best, is to choose the claim after
looking.  (Were the plans found not to fit by better moments than those they were admitted by, the sum is reported.)

The data set is known by the name that a person typed, never by a fingerprint of its content: a fingerprint would
differ between neighbours.  What the file guarantees is written in ``chain.py``.

An older copy of the ledger in its place is whole, and forgets what was spent since.  It is refused when it is opened,
as far as the note beside it knows (``LEDGER.tip``, see ``tip.py``): not if the note was copied along with it, deleted,
or could not be written.  Checkpoints and reports keep an anchor each, for :meth:`Ledger.check_anchor`.
"""

from __future__ import annotations

import json
import math
import os
import secrets
import threading
from collections.abc import Iterable, Iterator
from fractions import Fraction
from functools import lru_cache
from pathlib import Path
from typing import Any

from .accountant import Bound, epsilon
from .chain import Chain, Position
from .errors import BudgetExceeded, InvalidParameter, LedgerError
from .events import Event, Relation
from .privacy_filters import RenyiFilter
from .records import Budget, PlanRecord, Receipt, Spent
from .rounding import as_typed, round_up_text
from .tip import TipNote
from .values import Name, Value

_SALT_BYTES = 8


class _Header(Value):
    dataset_name: Name
    budget: Budget


class Ledger:
    """An open ledger; made by :meth:`create` or :meth:`open`. Safe to share between threads, not across a fork.

    Guarantee, Requires, Why: see the module.
    """

    def __init__(self, chain: Chain, bodies: list[bytes], note: TipNote) -> None:
        self._chain = chain
        self._note = note
        self._lock = threading.RLock()
        self._header: _Header | None = None
        self._plans: dict[str, PlanRecord] = {}
        self._charged: dict[str, int] = {}
        self._taken = 0
        self._replay(bodies)
        if self._header is None:
            raise LedgerError(f"{chain.path} has no header. Restore it from a backup.")

    @classmethod
    def create(
        cls, path: str | os.PathLike[str], *, dataset_name: str, budget: Budget, timeout: float = 30.0
    ) -> Ledger:
        """A new, empty ledger (file mode 0600) for the data set that people call ``dataset_name``.

        Raises:
          LedgerError: the file exists, or its folder cannot be written to, or it is missing beside the note of a ledger
            that was charged.
        """
        note = TipNote(_checked(path))
        # The note first: who creates and charges this ledger meanwhile makes the file before the note.
        if note.exists() and not os.path.lexists(path):
            raise LedgerError(
                f"{path} is missing, but {note.path} was written for it: a ledger that was charged is lost. Put it "
                "back. If it is truly lost, what was spent is unknown and its data must count as spent; for other "
                "data, create a ledger of another name."
            )
        header = _Header(dataset_name=dataset_name, budget=budget)
        # Without defaults: a budget without orders stays readable for versions that know of none.
        first = _encode("header", header.model_dump(mode="json", exclude_defaults=True))
        chain = Chain.create(Path(path), first, timeout=timeout)
        return cls(chain, chain.read(), note)

    @classmethod
    def open(
        cls,
        path: str | os.PathLike[str],
        *,
        dataset_name: str | None = None,
        read_only: bool = False,
        timeout: float = 30.0,
    ) -> Ledger:
        """An existing ledger, verified from the first entry to the last.

        Args:
          dataset_name: if given, must be the ledger's own.
          timeout: seconds to wait for another process that holds the lock.

        Raises:
          LedgerError: missing, damaged, locked, of a newer version, the ledger of another data set, or older than the
            note beside it; or that note is damaged or cannot be read.
        """
        note = TipNote(_checked(path))
        noted = note.read()  # before the ledger, which others may charge meanwhile: what is noted is in it
        chain, bodies = Chain.open(Path(path), read_only=read_only, timeout=timeout)
        try:
            ledger = cls(chain, bodies, note)
            if noted is not None:
                ledger._check_note(noted)
            if dataset_name is not None and dataset_name != ledger.dataset_name:
                raise LedgerError(
                    f"{path} is the ledger of {ledger.dataset_name!r}, not of {dataset_name!r}. "
                    "One ledger belongs to one data set: give the other ledger, or the other name."
                )
        except LedgerError:
            chain.close()
            raise
        return ledger

    @property
    def path(self) -> Path:
        """Where the file lies."""
        return self._chain.path

    @property
    def dataset_name(self) -> str:
        """The name that was typed when the ledger was created."""
        return self._known_header.dataset_name

    @property
    def budget(self) -> Budget:
        """What all plans together may spend."""
        return self._known_header.budget

    def check(self, plan: PlanRecord) -> None:
        """Returns if the first charge of ``plan`` would be accepted now (or its next one, if it has begun).

        Raises:
          BudgetExceeded: the plan does not fit beside the plans that have begun, or all its steps are charged.
          Unsupported: no accountant covers its event, or, with Renyi orders, it has no Renyi divergence.
          LedgerError: its unit or relation is not that of the first plan, or it is not the plan with this id.
        """
        with self._lock:
            self._catch_up()
            self._admit(plan)

    def charge(self, plan: PlanRecord, event: Event) -> Receipt:
        """Charges one step of ``plan``; when this returns, the charge is on the disk.

        Guarantee: the receipt stands for one durable charge, within the budget and the planned steps. Whatever fails,
        no charge that was acknowledged is lost.
        Requires: that what is released for the receipt is ``event``.
        Why: check and charge are one transaction under the lock; the receipt is made after its commit.

        Args:
          plan: registered with its first charge, and from then on the same in every field.
          event: what the step is about to do; must equal ``plan.event``.

        Raises:
          BudgetExceeded: the plan does not fit the budget, or all its planned steps are charged. Nothing was charged.
          Unsupported: as :meth:`check`. Nothing was charged.
          LedgerError: the event is not the plan's, or the ledger cannot be trusted or written to. If the failure came
            while writing, the step may have been charged; no receipt exists, so nothing may be released.

        The note beside the ledger follows the charge. Where it cannot be written, the receipt is given all the same.
        """
        if event != plan.event:
            raise LedgerError(
                f"The step is {event!r}, but the plan says {plan.event!r}. Nothing was charged: make a new plan for a "
                "new mechanism."
            )
        if plan.plan_id not in self._plans:
            # Both are cached, so that nobody waits for the lock while they are computed.
            epsilon_of(plan, plan.steps)
            if self.budget.orders:
                _held([plan], self.budget)
        with self._lock:
            self._heal()
            step, written = 0, []

            def decide(unseen: list[bytes]) -> list[bytes]:
                nonlocal step, written
                self._replay(unseen)
                self._admit(plan)
                self._note.prepare()  # what is wrong with it is said before the charge, never after
                step = self._charged.get(plan.plan_id, 0) + 1
                # The salt tells two histories apart that charge the same: copies of one ledger part ways at once.
                salt = secrets.token_hex(_SALT_BYTES)
                charge = _encode("charge", {"plan_id": plan.plan_id, "salt": salt, "step": step})
                written = [charge] if step > 1 else [_encode("plan", plan.model_dump(mode="json")), charge]
                return written

            sequence, tip = position = self._chain.append(decide)
            self._note.write(position)
            self._replay(written)
        return Receipt(sequence=sequence, plan_id=plan.plan_id, step=step, digest=tip.hex())

    def plans(self) -> list[tuple[PlanRecord, int]]:
        """Every plan that made a charge, in order, with the number of its charges."""
        return self.snapshot()[0]

    def find_plan(self, plan_id: str) -> tuple[PlanRecord, int] | None:
        """The plan with this id and the number of its charges, for resuming it; None if it never made a charge."""
        with self._lock:
            self._catch_up()
            plan = self._plans.get(plan_id)
            return None if plan is None else (plan, self._charged[plan_id])

    def spent(self) -> Spent:
        """What the charges cost so far; see :class:`Spent` for what one plan and several plans mean."""
        return cost_of(self.plans(), self.budget)

    def snapshot(self) -> tuple[list[tuple[PlanRecord, int]], int, str]:
        """(plans with their charges, sequence and digest of the last entry), all of one moment."""
        with self._lock:
            self._catch_up()
            plans = [(plan, self._charged[plan.plan_id]) for plan in self._plans.values()]
            return plans, self._chain.position.sequence, self._chain.position.tip.hex()

    def entries(self) -> Iterator[tuple[int, bytes, str]]:
        """(sequence, body, digest in hex) of every entry, all verified before the first is given.

        Bodies are the exact bytes that were hashed: ``digest = SHA-256(digest of the entry before || body)``, and 32
        zero bytes stand before the first.

        Raises:
          LedgerError: the ledger cannot be trusted.
        """
        with self._lock:
            self._catch_up()
            found = self._chain.entries()
        return ((sequence, body, digest.hex()) for sequence, body, digest in found)

    def anchor(self) -> tuple[int, str]:
        """(sequence, digest) of the last entry. Kept elsewhere, it shows later that no entry was taken away."""
        _, sequence, digest = self.snapshot()
        return sequence, digest

    def check_anchor(self, sequence: int, digest: str) -> None:
        """Returns if the ledger holds the entry that :meth:`anchor` named earlier; else raises LedgerError."""
        with self._lock:
            self._catch_up()
            found = self._chain.digest_of(sequence)
        if found is None or found.hex() != digest:
            raise LedgerError(
                f"{self.path} does not hold entry {sequence} with digest {digest[:12]}...: it is an older copy, or "
                "another ledger. Restore the newest ledger of this data set."
            )

    def close(self) -> None:
        """Closes the file."""
        self._chain.close()
        self._note.close()

    def __enter__(self) -> Ledger:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def __del__(self) -> None:
        for file in (getattr(self, "_chain", None), getattr(self, "_note", None)):
            if file is not None:
                file.close()

    @property
    def _known_header(self) -> _Header:
        assert self._header is not None  # the constructor refuses a ledger without one
        return self._header

    def _check_note(self, noted: Position) -> None:
        if self._chain.digest_of(noted.sequence) != noted.tip:
            raise LedgerError(
                f"{self.path} does not hold entry {noted.sequence} with digest {noted.tip.hex()[:12]}..., which "
                f"{self._note.path} noted when it was charged: it is an older copy, or another ledger. Put the newest "
                "ledger back. If it is truly lost, what was spent since is unknown and this data must count as spent."
            )

    def _admit(self, plan: PlanRecord) -> None:
        known = self._plans.get(plan.plan_id)
        if known is None:
            self._admit_new(plan)
        elif known != plan:
            fields = [name for name in PlanRecord.model_fields if getattr(known, name) != getattr(plan, name)]
            raise LedgerError(
                f"Plan {plan.plan_id} is in the ledger with another {', '.join(fields)}. A plan never changes: give "
                "the same values, or leave plan_id out to begin a new plan."
            )
        elif self._charged[plan.plan_id] >= plan.steps:
            raise BudgetExceeded(
                f"All {plan.steps} planned steps of plan {plan.plan_id} are charged. Begin a new plan if the budget "
                "allows one; nothing was charged."
            )

    def _admit_new(self, plan: PlanRecord) -> None:
        for first in list(self._plans.values())[:1]:
            if (plan.unit, plan.relation) != (first.unit, first.relation):
                raise LedgerError(
                    f"The plan protects one {plan.unit!r} under {plan.relation.value}, but this ledger's plans protect "
                    f"one {first.unit!r} under {first.relation.value}; their epsilons do not add up. Use the same, or "
                    "keep a second ledger and state both."
                )
        if self.budget.orders:
            self._admit_by_filter(plan)
        else:
            self._admit_by_sum(plan)

    def _admit_by_filter(self, plan: PlanRecord) -> None:
        if plan.delta > self.budget.delta:
            raise BudgetExceeded(
                f"The plan's delta {plan.delta!r} is above the budget's {self.budget.delta!r} of "
                f"{self.dataset_name!r}. Take a smaller delta."
            )
        try:
            _hold([*self._plans.values(), plan], self.budget)
        except BudgetExceeded as error:
            raise BudgetExceeded(
                f"The plan does not fit the budget of {self.dataset_name!r}, with {len(self._plans)} plans before it, "
                f"all at their planned steps: {error}"
            ) from None

    def _admit_by_sum(self, plan: PlanRecord) -> None:
        earlier = [epsilon_of(known, known.steps).upper for known in self._plans.values()]
        own = epsilon_of(plan, plan.steps).upper
        if math.isinf(own):
            raise BudgetExceeded(
                f"The plan has no finite epsilon at delta {plan.delta!r}. Take a larger delta, or another mechanism."
            )
        if _total([*earlier, own]) > self.budget.epsilon:
            raise BudgetExceeded(
                f"The plan costs epsilon {round_up_text(own)} and the plans before it "
                f"{round_up_text(_total(earlier))}: together that is over the budget {self.budget.epsilon!r} of "
                f"{self.dataset_name!r}. Take more noise or fewer steps."
            )
        deltas = [plan.delta, *(known.delta for known in self._plans.values())]
        if _exact_sum(deltas) > as_typed(self.budget.delta):
            raise BudgetExceeded(
                f"The plan's delta {plan.delta!r} and the {round_up_text(_total(deltas[1:]))} of the plans before it "
                f"add up to more than the budget {self.budget.delta!r} of {self.dataset_name!r}. Take a smaller delta."
            )

    def _catch_up(self) -> None:
        self._heal()
        self._replay(self._chain.read())

    def _heal(self) -> None:
        """Starts over if an exception or a signal kept entries that were read from being taken in."""
        if self._taken != self._chain.position.sequence + 1:
            self._chain.rewind()
            self._header, self._plans, self._charged, self._taken = None, {}, {}, 0
            self._replay(self._chain.read())

    def _replay(self, bodies: list[bytes]) -> None:
        """Takes verified entries into memory."""
        try:
            for body in bodies:
                self._take(body)
        except (InvalidParameter, KeyError, TypeError, ValueError, RecursionError) as error:
            raise LedgerError(
                f"{self.path} holds an entry that makes no sense: {error}. It was written by something else, or by a "
                "newer version. Restore it from a backup or upgrade the package."
            ) from None

    def _take(self, body: bytes) -> None:
        entry: dict[str, Any] = json.loads(body)
        if not isinstance(entry, dict):
            raise ValueError(f"{body[:40]!r} is no entry")
        kind = entry.pop("kind")
        if kind == "header" and self._header is None:
            self._header = _Header(**entry)
        elif kind == "plan" and self._header is not None and entry["plan_id"] not in self._plans:
            plan = PlanRecord(**entry)
            self._plans[plan.plan_id] = plan
            self._charged[plan.plan_id] = 0
        elif kind == "charge" and self._charged[entry["plan_id"]] + 1 == entry["step"]:
            if entry["step"] > self._plans[entry["plan_id"]].steps:
                raise ValueError(f"charge {entry['step']} of a plan of fewer steps")
            self._charged[entry["plan_id"]] += 1
        else:
            raise ValueError(f"an entry of kind {kind!r} out of order")
        self._taken += 1


def _encode(kind: str, body: dict[str, Any]) -> bytes:
    return json.dumps({"kind": kind, **body}, sort_keys=True, separators=(",", ":"), allow_nan=False).encode()


def _checked(path: str | os.PathLike[str]) -> Path:
    """``path``, unless no file can have that name."""
    try:
        name = os.fspath(path)
        possible = isinstance(name, str) and b"\0" not in os.fsencode(name)
    except (TypeError, UnicodeEncodeError):
        possible = False
    if not possible:
        raise LedgerError(f"{path!r} is not the name of a file. Give the ledger's path as a str or a Path.")
    return Path(path)


def _exact_sum(numbers: Iterable[float]) -> Fraction:
    """The sum of the decimals as people type and read them: three times 1e-5 is 3e-5, and not a hair more."""
    return sum((as_typed(number) for number in numbers), Fraction(0))


def _total(numbers: Iterable[float]) -> float:
    """The double nearest to the exact sum.

    Of epsilons that is off by less than one part in 10^15, and every bound was raised by more than that for rounding.
    """
    return float(_exact_sum(numbers))


def cost_of(plans: list[tuple[PlanRecord, int]], budget: Budget) -> Spent:
    """What ``plans``, each with the number of its charges, cost together in a ledger of this budget."""
    planned = [epsilon_of(plan, plan.steps) for plan, _ in plans]
    now = [epsilon_of(plans[0][0], plans[0][1])] if len(plans) == 1 else planned
    spent = Spent(
        epsilon=_total(bound.upper for bound in now),
        delta=_total(plan.delta for plan, _ in plans),
        committed_epsilon=_total(bound.upper for bound in planned),
        accountant="+".join(dict.fromkeys(bound.accountant for bound in now)) or "none",
        steps_charged=sum(charged for _, charged in plans),
        steps_planned=sum(plan.steps for plan, _ in plans),
    )
    # One plan at a delta far below the budget's may cost more epsilon at it; both statements are true of it then.
    unclear = len(plans) > 1 or spent.committed_epsilon > budget.epsilon
    if budget.orders and unclear and _held([plan for plan, _ in plans], budget):
        epsilon, delta = budget.epsilon, budget.delta
        return spent._replace(epsilon=epsilon, delta=delta, committed_epsilon=epsilon, accountant="renyi_filter")
    return spent


def _held(plans: list[PlanRecord], budget: Budget) -> bool:
    try:
        _hold(plans, budget)
    except BudgetExceeded:
        return False
    return True


def _hold(plans: Iterable[PlanRecord], budget: Budget) -> None:
    """Raises BudgetExceeded unless the budget's Renyi filter holds ``plans`` at their planned steps."""
    kept = RenyiFilter(budget.epsilon, budget.delta, budget.orders)
    for plan in plans:
        kept.spend(plan.event_of(plan.steps), plan.relation)


def epsilon_of(plan: PlanRecord, steps: int) -> Bound:
    """The bound of ``plan`` alone after ``steps`` of its steps, at its own delta; cached."""
    return _cached_epsilon(plan.event_of(steps), plan.delta, plan.relation)


def with_releases_beside(plan: PlanRecord, steps: int, beside: Iterable[PlanRecord]) -> tuple[Bound, float]:
    """(epsilon, delta) of ``steps`` steps of a run and of whole plans that were charged beside it: their sums.

    Basic composition, as for all plans of a ledger. The lower bound is that of the run alone.
    """
    bound, delta = epsilon_of(plan, steps), plan.delta
    for record in beside:
        alone = epsilon_of(record, record.steps)
        bound = bound._replace(estimate=bound.estimate + alone.estimate, upper=bound.upper + alone.upper)
        delta += record.delta
    return bound, delta


@lru_cache(maxsize=1024)
def _cached_epsilon(event: Event, delta: float, relation: Relation) -> Bound:
    return epsilon(event, delta, relation=relation)
