"""``dpkit epsilon``: epsilon of a planned training run from its numbers, or of a finished one from its ledger.

The value is an upper bound, rounded up, and comes with delta, unit, relation, sampling and accountant. From numbers, it
holds for training that really samples, clips and adds noise in this way, as ``dpkit train`` does; shuffled batches are
not Poisson batches.
"""

from __future__ import annotations

import math
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Annotated

import typer

import accounting
from accounting import Ledger, PlanRecord, Relation

from .statement import ledger_path
from .terminal import BUDGET_EXCEEDED, Debug, Json, out, print_error, print_json


@dataclass(frozen=True)
class Answer:
    """Epsilon and everything that gives it a meaning.

    Attributes:
      epsilon: the upper bound, rounded up; of a ledger, at the steps that were charged so far.
      committed_epsilon: the same at all planned steps. If a run was stopped because of what was seen, this is the
        guarantee.
      lower, estimate: what the accountant knows besides; never to be reported as the guarantee.
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
    certified: bool | None = None


def epsilon(
    run: Annotated[
        Path | None, typer.Argument(help="A run folder or a ledger file; left out, the options describe the run.")
    ] = None,
    *,
    noise_multiplier: Annotated[
        float | None, typer.Option(help="Standard deviation of the noise / L2 sensitivity under the relation.")
    ] = None,
    sample_rate: Annotated[
        float | None, typer.Option(help="Poisson probability of each example in each step; 1 is the full batch.")
    ] = None,
    steps: Annotated[int | None, typer.Option(help="Number of optimizer steps.")] = None,
    delta: Annotated[float | None, typer.Option(help="Choose it well below 1 / number of examples.")] = None,
    relation: Annotated[Relation, typer.Option(help="Which data sets are neighbours.")] = Relation.ADD_REMOVE,
    cap: Annotated[
        int | None, typer.Option(help="Largest batch, if larger draws are cut (max_physical_batch_size).")
    ] = None,
    max_examples: Annotated[
        int | None, typer.Option(help="Upper bound of the data set's size; goes with --cap.")
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
    numbers = {
        "--noise-multiplier": noise_multiplier,
        "--sample-rate": sample_rate,
        "--steps": steps,
        "--delta": delta,
    }
    given = [name for name, value in numbers.items() if value is not None]
    if run is not None:
        extra = given + [
            name for name, value in (("--cap", cap), ("--max-examples", max_examples)) if value is not None
        ]
        if extra:
            raise typer.BadParameter(
                f"{', '.join(extra)}: a ledger has its own numbers; give either it or the options."
            )
        answer = from_ledger(run)
    elif noise_multiplier is None or sample_rate is None or steps is None or delta is None:
        missing = ", ".join(name for name in numbers if name not in given)
        raise typer.BadParameter(f"missing {missing}; or give a run folder as the argument.")
    elif (cap is None) != (max_examples is None):
        raise typer.BadParameter("--cap and --max-examples go together: the cut depends on both.")
    else:
        answer = _from_numbers(
            noise_multiplier=noise_multiplier,
            sample_rate=sample_rate,
            steps=steps,
            delta=delta,
            relation=relation,
            cap=cap,
            max_examples=max_examples,
        )

    if json_output:
        print_json(asdict(answer) | ({} if max_epsilon is None else {"max_epsilon": max_epsilon}))
    else:
        _print(answer)
    # Whether a run was stopped because of what was seen is not in its ledger, so the gate asks for all planned steps.
    if max_epsilon is not None and answer.certified is False:
        print_error("the run is NOT certified: its noise can be repeated and removed, so it keeps to no --max-epsilon.")
        raise typer.Exit(BUDGET_EXCEEDED)
    if max_epsilon is not None and not answer.committed_epsilon <= max_epsilon:  # a NaN limit is not kept either
        print_error(
            f"the committed epsilon {answer.committed_epsilon:.4f} (at all planned steps) at delta "
            f"{accounting.round_up_text(answer.delta)} is above --max-epsilon {max_epsilon}."
        )
        raise typer.Exit(BUDGET_EXCEEDED)


def _from_numbers(
    *,
    noise_multiplier: float,
    sample_rate: float,
    steps: int,
    delta: float,
    relation: Relation,
    cap: int | None,
    max_examples: int | None,
) -> Answer:
    noise = accounting.Gaussian(noise_multiplier=noise_multiplier)
    if cap is not None and max_examples is not None:
        event = accounting.TruncatedPoisson(sample_rate=sample_rate, cap=cap, max_examples=max_examples, event=noise)
        sampling = f"Poisson, rate {sample_rate:.6g}, of at most {max_examples} examples, larger draws cut to {cap}"
    elif sample_rate == 1:
        event = noise
        sampling = "none, all examples in every step"
    else:
        event = accounting.Poisson(sample_rate=sample_rate, event=noise)
        sampling = f"Poisson, rate {sample_rate:.6g}"
    bound = accounting.epsilon(accounting.Repeated(event=event, count=steps), delta, relation=relation)
    upper = accounting.round_up(bound.upper)
    return Answer(
        epsilon=upper,
        committed_epsilon=upper,
        lower=bound.lower,
        estimate=bound.estimate,
        delta=delta,
        unit="example",
        relation=relation.value,
        sampling=sampling,
        accountant=bound.accountant,
        noise_multiplier=f"{noise_multiplier:g}",
        steps=steps,
        source="numbers",
    )


def from_ledger(run: Path) -> Answer:
    """What the ledger of ``run``, a run folder or the ledger file itself, says was spent.

    Raises:
      LedgerError: the ledger cannot be verified.
    """
    path = ledger_path(run)
    with Ledger.open(path, read_only=True) as ledger:
        stated = accounting.statement(ledger)
        plans = ledger.plans()
        accountant = ledger.spent().accountant
    lower = estimate = 0.0
    if len(plans) == 1:
        [(plan, charged)] = plans
        event = accounting.Repeated(event=plan.event, count=charged)
        lower, estimate, _, _ = accounting.epsilon(event, plan.delta, relation=plan.relation)
    elif plans:
        # Plans that may have been chosen after one another: their sum is the bound, and nothing is known from below.
        estimate = math.fsum(plan.committed_epsilon for plan in stated.plans)
    return Answer(
        epsilon=stated.epsilon,
        committed_epsilon=stated.committed_epsilon,
        lower=lower,
        estimate=estimate,
        delta=stated.delta,
        unit=stated.unit,
        relation=plans[0][0].relation.value if plans else "none",
        sampling="; ".join(dict.fromkeys(plan.sampling for plan in stated.plans)) or "none",
        accountant=accountant,
        noise_multiplier="; ".join(dict.fromkeys(plan.noise_multiplier for plan in stated.plans)) or "none",
        steps=stated.data_accesses,
        source=str(path),
        certified=_certified([plan for plan, _ in plans]),
    )


def _certified(plans: list[PlanRecord]) -> bool | None:
    """Whether all plans say that their noise cannot be repeated; None if one of them does not say."""
    said = [plan.facts.get("certified") for plan in plans]
    if False in said:
        return False
    return True if said and all(word is True for word in said) else None


def _print(answer: Answer) -> None:
    delta = accounting.round_up_text(answer.delta)
    out.print(f"epsilon <= {answer.epsilon:.4f} at delta = {delta}", style="bold", markup=False, soft_wrap=True)
    if answer.committed_epsilon > answer.epsilon:
        out.print(
            f"  committed  epsilon <= {answer.committed_epsilon:.4f} at all planned steps: the guarantee if somebody\n"
            "             stopped the run because of what was seen",
            markup=False,
            soft_wrap=True,
        )
    rows = {
        "unit": f"one {answer.unit}",
        "relation": answer.relation,
        "sampling": answer.sampling,
        "noise": f"multiplier {answer.noise_multiplier}, {answer.steps} steps",
        "accountant": f"{answer.accountant} (lower {answer.lower:.4f}, estimate {answer.estimate:.4f})",
        "source": answer.source,
    }
    if answer.certified is not None:
        rows["certified"] = "yes" if answer.certified else "NO: the noise can be repeated, so the guarantee is void"
    for name, text in rows.items():
        out.print(f"  {name:<11}{text}", markup=False, soft_wrap=True)
