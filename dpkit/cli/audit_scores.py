"""``dpkit audit scores``: a lower bound on epsilon from two files of scores, of canaries used and not used.

Guarantee: under the assumptions that are printed with it, the bound is above the true epsilon with probability at most
1 - confidence. Exit code 3 if and only if it is above the claim.

Each method assumes an experiment, and none of them can be seen in the files:

* ``one-run`` (the default), ``one-run-f-dp``: one model was trained, and every canary was used or not by a fair coin of
  its own. The two files then have nearly the same number of scores; numbers that a fair coin would hardly ever give
  are refused.
* ``clopper-pearson``, ``family``, ``gaussian``: scores are independent draws of one law for each file, as those of
  many runs are. How many there are in each does not matter.

``one-run-f-dp`` and ``family`` compare with the claimed mechanism and need a ledger; ``gaussian`` is no certificate
where batches are sampled, and is refused there.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import asdict, dataclass
from enum import StrEnum
from pathlib import Path
from typing import Annotated

import numpy as np
import scipy
import typer

import accounting
from accounting import Event, Gaussian, Ledger, Relation
from accounting.normal_form import atoms_under
from dpkit.audit.estimators import clopper_pearson, family_inversion, gaussian_dp
from dpkit.audit.guessing import one_run, one_run_f_dp
from dpkit.audit.scaling import scaled
from dpkit.audit.score_files import read_scores
from dpkit.audit.thresholds import Vector
from dpkit.audit.verdict import LowerBound, judge
from dpkit.errors import InvalidArgument

from .audit_output import Scored, draw_trade_off, print_not_certified
from .epsilon import say
from .pictures import refuse_plot
from .statement import ledger_path
from .terminal import CONTRADICTED, Debug, Json, print_json
from .training_run import check_option


class _Method(StrEnum):
    ONE_RUN = "one-run"
    ONE_RUN_F_DP = "one-run-f-dp"
    CLOPPER_PEARSON = "clopper-pearson"
    FAMILY = "family"
    GAUSSIAN = "gaussian"


_BY_CHANCE = 1e-4
_ONE_RUN = (
    "One model was trained; each canary was put into the training set by a fair coin of its own, and the two files "
    "hold the scores of all canaries."
)
_INDEPENDENT = (
    "The scores of each file are independent draws of one law: one for each run, or canaries with independent noise "
    "and sampling."
)
_GAUSSIAN = "What was audited is as revealing as Gaussian noise without sampling: full batches."
_FAMILY = "What was audited is the claimed mechanism with more or less noise."
_ASSUMED = {
    _Method.ONE_RUN: (_ONE_RUN,),
    _Method.ONE_RUN_F_DP: (_ONE_RUN, _FAMILY),
    _Method.CLOPPER_PEARSON: (_INDEPENDENT,),
    _Method.FAMILY: (_INDEPENDENT, _FAMILY),
    _Method.GAUSSIAN: (_INDEPENDENT, _GAUSSIAN),
}
_OF_A_UNIT = "A canary is one {unit}, and used or not used are neighbours under {relation}."
_REPLACED = (
    "A canary is one {unit}, and one that was not used was replaced by another record: the claim is for replace_one."
)


@dataclass(frozen=True)
class _Claimed:
    """What a ledger claims.

    Attributes:
      event: of all steps that were charged; None for several runs, whose epsilons are added.
    """

    epsilon: float
    delta: float
    source: str
    event: Event | None
    relation: Relation
    unit: str
    certified: bool
    certified_reason: str


def scores(
    *,
    scores_in: Annotated[
        Path, typer.Option(metavar="FILE", help="Scores of canaries that were used: .npy, or one number a line.")
    ],
    scores_out: Annotated[Path, typer.Option(metavar="FILE", help="Scores of canaries that were not used.")],
    delta: Annotated[
        float | None, typer.Option(help="At which epsilon is bounded; with --ledger that of the ledger.")
    ] = None,
    claim: Annotated[float | None, typer.Option(help="The epsilon to contradict, at --delta.")] = None,
    ledger: Annotated[
        Path | None, typer.Option(metavar="RUN", help="Instead of --claim: a run folder, or a ledger file.")
    ] = None,
    dataset_name: Annotated[
        str | None, typer.Option(help="Refuse a ledger that is not of the data set of this name.")
    ] = None,
    method: Annotated[_Method, typer.Option(help="The estimator; it says which experiment it assumes.")] = (
        _Method.ONE_RUN
    ),
    confidence: Annotated[float, typer.Option(help="With which the bound is below the true epsilon.")] = 0.95,
    plot: Annotated[
        Path | None, typer.Option(metavar="FILE.png|svg", help="Draw claim and evidence; needs the extra `report`.")
    ] = None,
    json_output: Json = False,
    debug: Debug = False,
) -> None:
    """Bound epsilon from below by the scores of canaries. Larger scores look more like a member."""
    check_option("--confidence", confidence, lambda x: 0.5 <= x < 1, "it is a probability of at least 0.5; give 0.95")
    check_option("--delta", delta, lambda x: 0 < x < 1, "it must lie strictly between 0 and 1; give the claim's")
    check_option("--claim", claim, lambda x: 0 <= x < math.inf, "it is an epsilon; leave it out without a claim")
    if claim is not None and ledger is not None:
        raise typer.BadParameter("--claim and --ledger: give one of them; a ledger has its own epsilon.")
    if dataset_name is not None and ledger is None:
        raise typer.BadParameter("--dataset-name is compared with the name in a ledger; give --ledger as well.")
    if plot is not None:
        refuse_plot(plot)
    claimed = None if ledger is None else _claimed(ledger, delta, dataset_name)
    if claimed is not None:
        delta = claimed.delta
    if delta is None:
        raise typer.BadParameter("missing --delta (or --ledger, which has one): an epsilon means nothing without it.")
    inside, outside = read_scores(scores_in), read_scores(scores_out)
    bound = _estimator(method, claimed)(inside, outside, delta, confidence)
    verdict = judge(
        bound,
        claim=claim if claimed is None else claimed.epsilon,
        claim_source="typed" if claimed is None else claimed.source,
        assumptions=(*_ASSUMED[method], *_about_the_unit(claimed)),
    )
    doubts = _doubts(inside, outside)
    if plot is not None:
        draw_trade_off(plot, Scored(verdict, inside, outside, claimed and claimed.event), claimed)
    if json_output:
        print_json(
            asdict(verdict)
            | {
                "scores_in": len(inside),
                "scores_out": len(outside),
                "looks_wrong": doubts,
                "certified": claimed and claimed.certified,
                "certified_reason": claimed and claimed.certified_reason,
                "plot": None if plot is None else str(plot),
            }
        )
    else:
        say(str(verdict), style="bold red" if verdict.contradicted else None)
        say(f"  scores      {len(inside)} of canaries that were used, {len(outside)} of others")
        for doubt in doubts:
            say(f"  NOTE        {doubt}", style="yellow")
        if claimed is not None:
            print_not_certified(claimed.certified, claimed.certified_reason)
        if plot is not None:
            say(f"wrote {plot}")
    if verdict.contradicted:
        raise typer.Exit(CONTRADICTED)


def _claimed(run: Path, delta: float | None, dataset_name: str | None) -> _Claimed:
    """What the ledger of ``run`` claims for the steps that it was charged for.

    Raises:
      LedgerError: it cannot be verified.
      InvalidArgument: it is of another data set or delta, or nothing was charged to it.
    """
    path = ledger_path(run)
    with Ledger.open(path, read_only=True) as ledger:
        stated, plans = accounting.statement(ledger), ledger.plans()
    if dataset_name is not None and stated.dataset_name != dataset_name:
        raise InvalidArgument(
            f"{path} is of the data set {stated.dataset_name!r}, not {dataset_name!r}: its epsilon says nothing about "
            "these scores. Give the ledger of the run that they come from."
        )
    if stated.data_accesses == 0:
        raise InvalidArgument(f"{path} was not charged for any step: there is nothing to audit.")
    if delta is not None and delta != stated.delta:
        raise InvalidArgument(
            f"--delta is {delta!r}, and {path} states epsilon at delta {stated.delta!r}: they cannot be compared. "
            "Leave --delta out."
        )
    [(plan, charged), *others] = plans
    return _Claimed(
        epsilon=stated.epsilon,
        delta=stated.delta,
        source=f"ledger of {stated.dataset_name!r}, {stated.data_accesses} steps charged",
        event=None if others else plan.event_of(charged),
        relation=plan.relation,
        unit=stated.unit,
        certified=stated.certified,
        certified_reason=stated.certified_reason,
    )


def _doubts(inside: Vector, outside: Vector) -> list[str]:
    """What the scores look like, if it is nothing that an attack would give; the bound stays what it is."""
    if np.ptp(np.concatenate([inside, outside])) == 0:
        return ["All scores are the same: they tell nothing, and neither does this audit."]
    if np.array_equal(inside, outside):
        return ["Both files hold the same scores: they tell nothing, and neither does this audit."]
    if scipy.stats.mannwhitneyu(inside, outside, alternative="less").pvalue < _BY_CHANCE:
        return [
            "The canaries that were used score lower than the others, more than chance explains. A larger score must "
            "look more like a member: were losses given, or the files swapped?"
        ]
    return []


def _about_the_unit(claimed: _Claimed | None) -> tuple[str, ...]:
    if claimed is None:
        return ()
    words = _REPLACED if claimed.relation is Relation.REPLACE_ONE else _OF_A_UNIT
    return (words.format(unit=claimed.unit, relation=claimed.relation.value),)


def _estimator(method: _Method, claimed: _Claimed | None) -> Callable[[Vector, Vector, float, float], LowerBound]:
    """(inside, outside, delta, confidence) -> bound.

    Raises:
      InvalidArgument: the method needs an event that is not known, or is no certificate for it.
    """

    def event_of(scale: float) -> Event:
        return scaled(event, scale)

    event = Gaussian(1.0)
    if method in (_Method.ONE_RUN_F_DP, _Method.FAMILY):
        if claimed is None or claimed.event is None:
            raise InvalidArgument(
                f"--method {method} compares with the claimed mechanism, which "
                + ("a typed epsilon does not name; give --ledger" if claimed is None else "several runs do not have")
                + ", or take --method one-run or clopper-pearson."
            )
        event = claimed.event
    relation = Relation.ADD_REMOVE if claimed is None else claimed.relation
    match method:
        case _Method.ONE_RUN:
            return lambda inside, outside, delta, confidence: one_run(
                *_drawn(inside, outside), delta=delta, confidence=confidence
            )
        case _Method.ONE_RUN_F_DP:
            return lambda inside, outside, delta, confidence: one_run_f_dp(
                *_drawn(inside, outside), event_of, relation=relation, delta=delta, confidence=confidence
            )
        case _Method.FAMILY:
            return lambda inside, outside, delta, confidence: family_inversion(
                inside, outside, event_of, relation=relation, delta=delta, confidence=confidence
            )
        case _Method.CLOPPER_PEARSON:
            return lambda inside, outside, delta, confidence: clopper_pearson(
                inside, outside, delta=delta, confidence=confidence
            )
        case _Method.GAUSSIAN:
            _refuse_sampled(claimed)
            return lambda inside, outside, delta, confidence: gaussian_dp(
                inside, outside, delta=delta, confidence=confidence
            )


def _refuse_sampled(claimed: _Claimed | None) -> None:
    if claimed is None:
        return
    if claimed.event is None or not all(
        isinstance(atom, Gaussian) for atom, _ in atoms_under(claimed.event, claimed.relation)
    ):
        raise InvalidArgument(
            "--method gaussian is no lower bound where batches are sampled, or for several runs: Gaussian noise "
            "without sampling would have to be as revealing. Take --method family or clopper-pearson."
        )


def _drawn(inside: Vector, outside: Vector) -> tuple[Vector, np.ndarray]:
    """(scores, whether each was used) of all canaries."""
    return np.concatenate([inside, outside]), np.repeat([True, False], [len(inside), len(outside)])
