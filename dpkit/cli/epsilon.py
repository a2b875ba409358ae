"""``dpkit epsilon``: epsilon of a planned training run from its numbers, or of a finished one from its ledger.

The value is an upper bound, rounded up, and comes with delta, unit, relation, sampling and accountant. From numbers, it
holds for training that really samples, clips and adds noise in this way, as ``dpkit train`` does. Shuffled batches are
not Poisson batches: theirs is the guarantee without amplification, and what Poisson batches would have given stands
beside it under a name that nobody can take for the guarantee.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import asdict, dataclass
from decimal import ROUND_CEILING, ROUND_FLOOR, Decimal
from pathlib import Path
from typing import Annotated, Any, cast

import typer

import accounting
from accounting import Bound, Event, Ledger, PlanRecord, Unsupported

from .statement import ledger_path
from .terminal import BUDGET_EXCEEDED, Debug, Json, out, print_error, print_json
from .training_run import Numbers, RunPath, TrainingRun, from_numbers, refuse_beside_ledger, takes_numbers

IF_POISSON = "epsilon_if_poisson_NOT_A_GUARANTEE"


@dataclass(frozen=True)
class Answer:
    """Epsilon and everything that gives it a meaning.

    Attributes:
      epsilon: the upper bound, rounded up; of a ledger, at the steps that were charged so far.
      committed_epsilon: the same at all planned steps. If a run was stopped because of what was seen, this is the
        guarantee.
      lower, estimate: what the accountant knows besides; never to be reported as the guarantee.
      slack: how far the upper bound, before it was rounded, lies above ``lower``.
      certified: whether nobody can repeat the noise of the run; None where nothing says so, as for bare numbers.
    """

    epsilon: float
    committed_epsilon: float
    lower: float
    estimate: float
    delta: float
    unit: str
    relation: str
    sampling: str
    accountant: str
    noise_multiplier: str
    steps: int
    source: str
    slack: float
    certified: bool | None = None


@takes_numbers
def epsilon(
    run: RunPath = None,
    *,
    numbers: Numbers,
    accountant: Annotated[
        str | None, typer.Option(help="Ask one accountant by name; left out, the best of those that apply answers.")
    ] = None,
    max_epsilon: Annotated[
        float | None,
        typer.Option(
            help="Exit with 2 if the committed epsilon is above this: that of all planned steps, which is the "
            "guarantee if somebody stopped the run because of what was seen."
        ),
    ] = None,
    json_output: Json = False,
    debug: Debug = False,
) -> None:
    """Compute epsilon from numbers, or from the ledger of a run."""
    more: dict[str, Any] = {}
    caveats: tuple[str, ...] = ()
    if run is not None:
        refuse_beside_ledger([*numbers.given(), *(["--accountant"] if accountant is not None else [])])
        answer = from_ledger(run)
    else:
        described = from_numbers(numbers)
        answer = answer_of(described, epsilon_of(described, accountant))
        caveats = described.caveats
        if described.if_poisson is not None:
            more[IF_POISSON] = _if_poisson(described)
        more["caveats"] = list(caveats)

    if json_output:
        print_json(asdict(answer) | more | ({} if max_epsilon is None else {"max_epsilon": max_epsilon}))
    else:
        print_answer(answer)
        if IF_POISSON in more:
            _print_if_poisson(more[IF_POISSON], answer)
        print_caveats(caveats)
    # Whether a run was stopped because of what was seen is not in its ledger, so the gate asks for all planned steps.
    if max_epsilon is not None and answer.certified is False:
        print_error("the run is NOT certified: its noise can be repeated and removed, so it keeps to no --max-epsilon.")
        raise typer.Exit(BUDGET_EXCEEDED)
    if max_epsilon is not None and not answer.committed_epsilon <= max_epsilon:  # a NaN limit is not kept either
        print_error(
            f"the committed epsilon {shown(answer.committed_epsilon)} (at all planned steps) at delta "
            f"{accounting.round_up_text(answer.delta)} is above --max-epsilon {max_epsilon}."
        )
        raise typer.Exit(BUDGET_EXCEEDED)


def epsilon_of(run: TrainingRun, accountant: str | None = None) -> Bound:
    """The bound of all steps of ``run``, by the accountant of that name or by the best."""
    return accounting.epsilon(run.event, run.delta, relation=run.relation, by=cast(Any, accountant))


def answer_of(run: TrainingRun, bound: Bound) -> Answer:
    """``bound``, which is of the whole ``run``, with all that it means."""
    upper = accounting.round_up(bound.upper)
    return Answer(
        epsilon=upper,
        committed_epsilon=upper,
        lower=bound.lower,
        estimate=bound.estimate,
        delta=run.delta,
        unit=run.unit,
        relation=run.relation.value,
        sampling=run.sampling,
        accountant=bound.accountant,
        noise_multiplier=run.noise_multiplier,
        steps=run.steps,
        source=run.source,
        slack=bound.upper - bound.lower,
        certified=run.certified,
    )


def _if_poisson(run: TrainingRun) -> float | None:
    """What Poisson batches would have given; None under a relation without a theorem for them."""
    try:
        bound = accounting.epsilon(cast(Event, run.if_poisson), run.delta, relation=run.relation)
    except Unsupported:
        return None
    return accounting.round_up(bound.upper)


def from_ledger(run: Path) -> Answer:
    """What the ledger of ``run``, a run folder or the ledger file itself, says was spent.

    Raises:
      LedgerError: the ledger cannot be verified.
    """
    path = ledger_path(run)
    with Ledger.open(path, read_only=True) as ledger:
        stated = accounting.statement(ledger)
        plans = ledger.plans()
        spent = ledger.spent()
    lower = estimate = 0.0
    if len(plans) == 1:
        [(plan, charged)] = plans
        lower, estimate, _, _ = accounting.epsilon(plan.event_of(charged), plan.delta, relation=plan.relation)
    elif plans:
        # Plans that may have been chosen after one another: their sum (or the budget of a filter) is the bound, and
        # nothing is known from below.
        estimate = stated.committed_epsilon
    return Answer(
        epsilon=stated.epsilon,
        committed_epsilon=stated.committed_epsilon,
        lower=lower,
        estimate=estimate,
        delta=stated.delta,
        unit=stated.unit,
        relation=plans[0][0].relation.value if plans else "none",
        sampling="; ".join(dict.fromkeys(plan.sampling for plan in stated.plans)) or "none",
        accountant=spent.accountant,
        noise_multiplier="; ".join(dict.fromkeys(plan.noise_multiplier for plan in stated.plans)) or "none",
        steps=stated.data_accesses,
        source=str(path),
        slack=spent.epsilon - lower,
        certified=_certified([plan for plan, _ in plans]),
    )


def _certified(plans: list[PlanRecord]) -> bool | None:
    """Whether all plans say that their noise cannot be repeated; None if one of them does not say."""
    said = [plan.facts.get("certified") for plan in plans]
    if False in said:
        return False
    return True if said and all(word is True for word in said) else None


def print_answer(answer: Answer) -> None:
    """Epsilon for people, and under it everything that gives it a meaning."""
    say(f"epsilon <= {shown(answer.epsilon)} at delta = {accounting.round_up_text(answer.delta)}", style="bold")
    if answer.committed_epsilon > answer.epsilon:
        say(
            f"  committed  epsilon <= {shown(answer.committed_epsilon)} at all planned steps: the guarantee if "
            "somebody\n             stopped the run because of what was seen"
        )
    print_meaning(answer)


def print_meaning(answer: Answer) -> None:
    """Everything but epsilon and delta."""
    known = f"lower {shown_below(answer.lower)}, estimate {answer.estimate:.6g}, slack {answer.slack:.2g}"
    rows = {
        "unit": f"one {answer.unit}",
        "relation": answer.relation,
        "sampling": answer.sampling,
        "noise": f"multiplier {answer.noise_multiplier}, {answer.steps} steps",
        "accountant": f"{answer.accountant} ({known})",
        "source": answer.source,
    }
    if answer.certified is not None:
        rows["certified"] = "yes" if answer.certified else "NO: the noise can be repeated, so the guarantee is void"
    for name, text in rows.items():
        say(f"  {name:<11}{text}")


def print_caveats(caveats: Iterable[str]) -> None:
    """What must be read with a guarantee."""
    for caveat in caveats:
        say(f"  - {caveat}", style="yellow")


def say(text: str, style: str | None = None) -> None:
    """Text for people on stdout, as it is."""
    out.print(text, style=style, markup=False, soft_wrap=True)


def shown(epsilon: float) -> str:
    """An epsilon with four decimals, rounded up; one that was rounded up before stays what it is."""
    return _rounded(epsilon, ROUND_CEILING)


def shown_below(lower: float) -> str:
    """A lower bound with four decimals, rounded down."""
    return _rounded(lower, ROUND_FLOOR)


def _rounded(x: float, rounding: str) -> str:
    if x >= 1e9:  # decimals mean nothing there
        return accounting.round_up_text(x) if rounding == ROUND_CEILING else f"{x * (1 - 1e-5):.6g}"
    return str(Decimal(repr(float(x))).quantize(Decimal("0.0001"), rounding=rounding))


def _print_if_poisson(value: float | None, answer: Answer) -> None:
    if value is None:
        say(
            "  if batches were Poisson (NOT this run): no number, since no theorem here covers Poisson batches under "
            f"{answer.relation}"
        )
        return
    say(
        f"  if batches were Poisson (NOT this run): epsilon <= {shown(value)} at delta = "
        f"{accounting.round_up_text(answer.delta)}, relation {answer.relation}. This is NOT A GUARANTEE.",
        style="yellow",
    )
