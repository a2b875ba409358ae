"""What may be said about a ledger's data set: epsilon with everything that gives it a meaning.

Epsilon is an upper bound, rounded up, and never stands without delta, unit, relation, sampling and accountant.
"""

from __future__ import annotations

import textwrap

from . import descriptions
from .accountant import DESCRIPTIONS
from .events import Relation
from .ledger import Ledger, cost_of, epsilon_of
from .normal_form import normal_form
from .records import Budget, PlanRecord, Spent
from .rounding import round_up, round_up_text
from .values import Value

_RELATIONS = {
    Relation.ADD_REMOVE: "add or remove one",
    Relation.REPLACE_ONE: "replace one",
    Relation.ZERO_OUT: "zero out one (the number of units is public)",
}

PAGES = "What is promised, what that requires, and what is not: PRIVACY_PROMISE.md and KNOWN_LIMITS.md of dpkit."

NEVER_COVERED = (
    "Not covered: choices made by looking at this data outside the ledger, such as a hyperparameter search or the "
    "choice of the architecture.",
    "Not covered: what can be learnt from timing, and from when a process stopped or failed (memory, crashes).",
)

_CIPHER = (
    "Assumed: without its key, nobody can tell ChaCha20 from random bits. Batches are drawn by a generator that is not "
    "cryptographic, whose output nobody sees."
)
_OF_TIER: dict[str, tuple[str, ...]] = {
    "default": ("Not covered: noise is drawn in floating point; attacks on its low-order bits.",),
    "hardened": (
        _CIPHER,
        "Every released number is a multiple of a step that is the same for all data sets, so that its low-order bits "
        "tell nothing more than the number that the guarantee is about.",
        "Not covered: the difference between a Gaussian in double precision, which is drawn here and then rounded to "
        "such steps, and a Gaussian; tests bound it, and no theorem.",
    ),
    "exact": (
        _CIPHER,
        "Noise is a discrete Gaussian, drawn in integer arithmetic and counted in steps that are the same for all data "
        "sets: nothing in its law is approximate.",
    ),
}
"""What has to be said of how the noise was made; whatever is no tier of these counts as the first."""


class PlanStatement(Value):
    """One run as the statement shows it. ``epsilon`` is at the charged steps, ``committed_epsilon`` at the planned."""

    plan_id: str
    epsilon: float
    committed_epsilon: float
    delta: float
    noise_multiplier: str
    sampling: str
    max_grad_norm: str
    noise_tier: str
    noise_generator: str
    steps_charged: int
    steps_planned: int
    steps_left: int
    num_examples: int
    certified: bool
    certified_reason: str


class Statement(Value):
    """The privacy statement of one ledger; ``str()`` is for people, ``model_dump_json()`` for programs."""

    dataset_name: str
    epsilon: float
    committed_epsilon: float
    delta: float
    unit: str
    relation: str
    accountant: str
    budget: Budget
    plans: tuple[PlanStatement, ...]
    data_accesses: int
    certified: bool
    certified_reason: str
    caveats: tuple[str, ...]
    anchor_sequence: int
    anchor_digest: str
    pages: str = PAGES

    def __str__(self) -> str:
        if not self.plans:
            return f"Data set {self.dataset_name!r}: nothing was charged yet; epsilon = 0."
        lines = [
            f"Privacy statement for data set {self.dataset_name!r}",
            f"  epsilon <= {self.epsilon:.4f} at delta = {round_up_text(self.delta)}",
            f"  unit: one {self.unit}; relation: {self.relation}",
            f"  accountant: {self.accountant}",
            f"  committed: epsilon <= {self.committed_epsilon:.4f} at all planned steps; if a run was stopped because "
            "of what was seen, this is the guarantee",
            f"  budget: {_budget(self.budget)}",
            f"  data accesses: {self.data_accesses}",
        ]
        for plan in self.plans:
            lines += [
                f"  run {plan.plan_id[:12]}: {_progress(plan)}",
                f"    sampling: {plan.sampling}; public N = {plan.num_examples}",
                f"    noise multiplier {plan.noise_multiplier}, max_grad_norm {plan.max_grad_norm}, "
                f"noise tier: {plan.noise_tier}, noise generator: {plan.noise_generator}",
            ]
        lines.append(f"  CERTIFIED: {'YES' if self.certified else 'NO'} ({self.certified_reason})")
        lines += [f"  - {caveat}" for caveat in self.caveats]
        lines.append(f"  {self.pages}")
        lines.append(f"  ledger anchor: entry {self.anchor_sequence}, {self.anchor_digest}")
        return "\n".join(_wrapped(line) for line in lines)


def statement(ledger: Ledger) -> Statement:
    """The statement of ``ledger`` as it stands now.

    Guarantee: its epsilon is a bound for everything that was charged, rounded up, of one moment, and stands beside all
    that gives it a meaning. Of a run that was stopped because of what was seen, ``committed_epsilon`` is that bound.
    Requires: that the plans in the ledger are what was released; ``facts`` and ``certified`` are what the trainer said.
    Why: ``accountant.py`` for one plan, the budget rule of ``ledger.py`` for several.

    Raises:
      LedgerError: the ledger cannot be trusted; there is no statement then.
    """
    # Of one moment: the anchor of a run that goes on must not be newer than the charges beside it.
    charges, sequence, digest = ledger.snapshot()
    spent = cost_of(charges, ledger.budget)
    plans = tuple(_plan_statement(plan, charged) for plan, charged in charges)
    records = [plan for plan, _ in charges]
    doubts = list(dict.fromkeys(plan.certified_reason for plan in plans if not plan.certified))
    return Statement(
        dataset_name=ledger.dataset_name,
        epsilon=round_up(spent.epsilon),
        committed_epsilon=round_up(spent.committed_epsilon),
        delta=spent.delta,
        unit=records[0].unit if records else "none",
        relation=_RELATIONS[records[0].relation] if records else "none",
        accountant=" + ".join(DESCRIPTIONS.get(name, name) for name in spent.accountant.split("+")),
        budget=ledger.budget,
        plans=plans,
        data_accesses=spent.steps_charged,
        certified=not doubts,
        certified_reason="; ".join(doubts or [plan.certified_reason for plan in plans[:1]] or ["nothing was released"]),
        caveats=tuple(
            dict.fromkeys(caveat for record in records for caveat in _caveats(record, _together(records, spent)))
        ),
        anchor_sequence=sequence,
        anchor_digest=digest,
    )


def _budget(budget: Budget) -> str:
    orders = ", ".join(f"{order:g}" for order in budget.orders)
    kept = f", kept by a Renyi filter of order {orders}" if orders else ""
    return f"epsilon {budget.epsilon!r}, delta {budget.delta!r}{kept}"


def _together(records: list[PlanRecord], spent: Spent) -> list[str]:
    """How several runs are counted together."""
    if len(records) < 2:
        return []
    if spent.accountant == "renyi_filter":
        return [
            "Several runs used this data; the budget, fixed before the first of them, is the guarantee for all of them "
            "together. No smaller number may be claimed, since later runs may have been chosen after seeing earlier "
            "ones."
        ]
    return [
        "Several runs used this data; their epsilons and deltas at the planned steps are added, since later runs may "
        "have been chosen after seeing earlier ones."
    ]


def _progress(plan: PlanStatement) -> str:
    more = f"{plan.steps_left} more may be taken" if plan.steps_left else "none is left"
    return f"{plan.steps_charged} of {plan.steps_planned} planned steps charged; {more}"


def _wrapped(line: str) -> str:
    """``line`` on lines of at most 80 columns, the later ones indented further; long words stay whole."""
    indent = line[: len(line) - len(line.lstrip())]
    return textwrap.fill(
        line.strip(),
        width=80,
        initial_indent=indent,
        subsequent_indent=indent + "    ",
        break_long_words=False,
        break_on_hyphens=False,
    )


def _plan_statement(plan: PlanRecord, charged: int) -> PlanStatement:
    facts = plan.facts
    return PlanStatement(
        plan_id=plan.plan_id,
        epsilon=round_up(epsilon_of(plan, charged).upper),
        committed_epsilon=round_up(epsilon_of(plan, plan.steps).upper),
        delta=plan.delta,
        noise_multiplier=descriptions.each(plan.event, descriptions.noise),
        sampling=descriptions.each(plan.event, descriptions.sampling)
        + (f"; {plan.steps_per_event} consecutive steps count as one such release" if plan.steps_per_event > 1 else "")
        + (f" ({facts['sampling']})" if facts.get("sampling") else ""),
        max_grad_norm=str(facts.get("max_grad_norm", "not stated")),
        noise_tier=_tier(plan),
        noise_generator=str(facts.get("noise_generator", "not stated")),
        steps_charged=charged,
        steps_planned=plan.steps,
        steps_left=plan.steps - charged,
        num_examples=plan.num_examples,
        certified=facts.get("certified") is True,
        certified_reason=str(facts.get("certified_reason") or _default_reason(facts.get("certified"))),
    )


def _tier(plan: PlanRecord) -> str:
    """How the noise was made; plans of the time before there were tiers had the first."""
    return str(plan.facts.get("noise_tier", "default"))


def _default_reason(certified: object) -> str:
    if certified is True:
        return "every release was charged by a certified run"
    if certified is False:
        return "the run was not certified"
    return "the run did not say whether it is certified"


def _caveats(plan: PlanRecord, together: list[str]) -> list[str]:
    found = []
    if plan.delta * plan.num_examples >= 1:
        found.append(
            f"WARNING: delta = {round_up_text(plan.delta)} is not below 1/N = {1 / plan.num_examples:.3g}; "
            "publishing one unit at random would satisfy such a delta. Choose delta well below 1/N."
        )
    found += together
    found += [caveat for atom, _ in normal_form(plan.event) for caveat in descriptions.caveats(atom)]
    generator = str(plan.facts.get("noise_generator", "not stated"))
    if generator == "not stated" or "not cryptographic" in generator:
        found.append(f"Noise generator: {generator}. The guarantee assumes that nobody can predict its output.")
    more = plan.facts.get("caveats")
    found += more if isinstance(more, list) else [str(more)] if more else []
    return [*found, *_OF_TIER.get(_tier(plan), _OF_TIER["default"]), *NEVER_COVERED]
