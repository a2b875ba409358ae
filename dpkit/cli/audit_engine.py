"""``dpkit audit engine``: a lower bound on the epsilon of the engine as it is installed, against what is claimed.

The plan is that of a run's ledger, or the numbers that are typed; the data is made up. What is audited is this
installation: its gradients, rule, sum, sampling, charge and noise, on this machine. It says nothing about another
machine, or about what a user's loop does. A bound below the claim proves nothing.
"""

from __future__ import annotations

import math
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

import accounting
from accounting import descriptions, events
from accounting.events import Poisson, TruncatedPoisson
from dpkit.errors import InvalidArgument

from .audit_output import draw_trade_off, print_not_certified
from .epsilon import epsilon_of, print_caveats, say
from .pictures import refuse_plot
from .terminal import CONTRADICTED, Debug, Json, print_json
from .training_run import (
    Numbers,
    RunPath,
    TrainingRun,
    check_option,
    refuse_beside_ledger,
    takes_numbers,
    training_run,
)

if TYPE_CHECKING:
    from dpkit.audit.white_box_audit import WhiteBox
    from dpkit.mechanisms import Mechanism

_DEFAULT = Numbers(noise_multiplier=1.0, sample_rate=0.1, steps=100, delta=1e-5)
_TIERS = ("default", "hardened", "exact")
_OTHER_SAMPLING = (
    "Audited with Poisson batches that are not cut; the claim is that of the plan, whose cut batches cost as much or "
    "more."
)
_OTHER_RULE = "Audited with flat clipping to --max-grad-norm, whatever rule the run had."
_MOST_CANARIES = 10_000_000


@takes_numbers
def engine(
    run: RunPath = None,
    *,
    numbers: Numbers,
    canaries: Annotated[int, typer.Option(help="Made-up units that take part; as many again do not.")] = 20_000,
    max_grad_norm: Annotated[float, typer.Option(help="Clipping norm of the audited plan.")] = 1.0,
    tier: Annotated[
        str | None, typer.Option(help="Noise tier: default, hardened or exact. Left out, that of the ledger's run.")
    ] = None,
    claim: Annotated[
        float | None, typer.Option(help="The epsilon to contradict. Left out, what the accountant says of the plan.")
    ] = None,
    confidence: Annotated[
        float, typer.Option(help="With which the verdict holds; several audits share its probability of error.")
    ] = 0.999,
    repeats: Annotated[int, typer.Option(help="How many audits.")] = 1,
    seed: Annotated[int | None, typer.Option(help="Makes the audits repeatable. Left out, fresh randomness.")] = None,
    plot: Annotated[
        Path | None, typer.Option(metavar="FILE.png|svg", help="Draw claim and evidence; needs the extra `report`.")
    ] = None,
    json_output: Json = False,
    debug: Debug = False,
) -> None:
    """Audit the engine with canaries on made-up data. Without numbers: noise 1, rate 0.1, 100 steps, delta 1e-5."""
    check_option("--canaries", canaries, lambda x: 50 <= x <= _MOST_CANARIES, f"give from 50 to {_MOST_CANARIES:,}")
    check_option("--repeats", repeats, lambda x: 1 <= x <= 1000, "give a number of audits from 1 to 1000")
    check_option("--confidence", confidence, lambda x: 0.5 <= x < 1, "it is a probability of at least 0.5; give 0.999")
    check_option("--claim", claim, lambda x: 0 <= x < math.inf, "it is an epsilon; give the one that was claimed")
    if tier is not None and tier not in _TIERS:
        raise InvalidArgument(f"--tier is {tier!r}: it is one of {', '.join(_TIERS)}.")
    if plot is not None:
        refuse_plot(plot)
    if run is not None and tier is not None:
        refuse_beside_ledger(["--tier"])
    described = training_run(run, _DEFAULT if run is None and not numbers.given() else numbers)
    mechanism, sample_rate, caveats = _audited(described, tier or described.noise_tier)
    claimed = accounting.round_up(epsilon_of(described).upper) if run is not None and claim is None else claim
    from dpkit.audit.white_box_audit import white_box
    from dpkit.clipping import Flat

    found = [
        white_box(
            mechanism,
            sample_rate=sample_rate,
            steps=described.steps,
            delta=described.delta,
            relation=described.relation,
            clipping=Flat(max_grad_norm),
            canaries=canaries,
            confidence=1 - (1 - confidence) / repeats,
            claim=claimed,
            claim_source="typed" if claim is not None else described.source,
            seed=None if seed is None else seed + number,
        )
        for number in range(repeats)
    ]
    best = max(found, key=lambda audit: audit.verdict.epsilon)
    if plot is not None:
        draw_trade_off(plot, best, described)
    if json_output:
        print_json(_as_json(best, found, described, caveats))
    else:
        say(str(best.verdict), style="bold red" if best.verdict.contradicted else None)
        if repeats > 1:
            bounds = [audit.verdict.epsilon for audit in found]
            say(f"  audits      {repeats}, bounds from {min(bounds):.4f} to {max(bounds):.4f}")
        print_not_certified(described.certified)
        print_caveats(caveats)
    if best.verdict.contradicted:
        raise typer.Exit(CONTRADICTED)


def _audited(run: TrainingRun, tier: str) -> tuple[Mechanism, float, tuple[str, ...]]:
    """Mechanism and sample rate of the run as an audit draws them, and what must be read with it.

    Raises:
      InvalidArgument: the run is of a kind that canaries cannot audit.
    """
    from dpkit.mechanisms import DiscreteGaussian, Gaussian, HardenedGaussian

    kinds = {"default": Gaussian, "hardened": HardenedGaussian, "exact": DiscreteGaussian}
    match run.release:
        case Poisson(sample_rate=rate, event=noise) | TruncatedPoisson(sample_rate=rate, event=noise):
            pass
        case noise:
            rate = 1.0
    caveats = (_OTHER_SAMPLING,) if isinstance(run.release, TruncatedPoisson) else ()
    caveats += () if run.source == "numbers" else (_OTHER_RULE,)
    match noise:
        # An event that covers several steps is no Poisson batch, whatever is inside it.
        case events.Gaussian(noise_multiplier=multiplier) | events.DiscreteGaussian(noise_multiplier=multiplier) if (
            run.steps_per_release == 1 and tier in kinds
        ):
            return kinds[tier](multiplier), rate, caveats
    raise InvalidArgument(
        f"the run has noise multiplier {descriptions.each(run.release, descriptions.noise)} of tier {tier!r} and "
        f"sampling {run.sampling}; canaries audit independent Gaussian noise of the tiers {', '.join(kinds)}, with "
        "Poisson or full batches. Give the numbers of such a run."
    )


def _as_json(best: WhiteBox, found: list[WhiteBox], run: TrainingRun, caveats: tuple[str, ...]) -> dict[str, Any]:
    return asdict(best.verdict) | {
        "bounds": [audit.verdict.epsilon for audit in found],
        "sampling": run.sampling,
        "noise_multiplier": run.noise_multiplier,
        "steps": run.steps,
        "relation": run.relation.value,
        "source": run.source,
        "certified": run.certified,
        "caveats": list(caveats),
    }
