"""Everything that a report shows, read once: the verified ledger, the released metrics, the settings, the result.

Nothing here is read from ``RUN/nonprivate/``, except whether a run without privacy left its result there: such a run
has no report.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from decimal import ROUND_FLOOR, Context, Decimal
from fractions import Fraction

import accounting
from accounting import Ledger, PlanRecord, PlanStatement, Statement
from accounting.events import (
    ApproximateDP,
    DiscreteGaussian,
    Gaussian,
    Laplace,
    Poisson,
    TruncatedPoisson,
    WithoutReplacement,
)
from accounting.rounding import as_typed
from dpkit.errors import LedgerError, RunFolderError
from dpkit.run_folder import RunFolder

from .records import MetricsRecord, number, read_metrics, read_object

LEDGER = "ledger.sqlite"

_NOISE_SEED = re.compile(r"(noise_seed[\"']?[ \t]*:[ \t]*)([^\s,}#]+)")
_BY_FILTER = "what the Renyi filter of the ledger admits"
_SEED_LEFT_OUT = "(left out: with it a reader could remove the noise)"


@dataclass(frozen=True)
class PlanSummary:
    """One plan of the ledger: as it was fixed, and as the statement shows it."""

    record: PlanRecord
    stated: PlanStatement

    def fact(self, name: str) -> str | None:
        """What the engine wrote into the ledger under ``name``, as text; None if it wrote nothing."""
        value = self.record.facts.get(name)
        return None if value is None or isinstance(value, list) else str(value)

    @property
    def expected_batch(self) -> float | None:
        """q·N; None where steps are drawn in a way that has no single rate."""
        stored = self.record.facts.get("expected_batch_size")
        if isinstance(stored, float | int) and not isinstance(stored, bool):
            return float(stored)
        match accounting.normal_form(self.record.event):
            case [(Poisson() | TruncatedPoisson() as sampled, _)]:
                return sampled.sample_rate * self.record.num_examples
            case [(WithoutReplacement() as sampled, _)]:
                return float(sampled.batch_size)
            case [(Gaussian() | DiscreteGaussian() | Laplace() | ApproximateDP(), _)]:
                return float(self.record.num_examples)
        return None

    @property
    def delta_is_too_large(self) -> bool:
        """Whether publishing one unit at random would satisfy this delta."""
        return self.record.delta * self.record.num_examples >= 1


@dataclass(frozen=True)
class RunSummary:
    """What is known about a run and may be shared.

    Attributes:
      name: of the run folder.
      statement, plans: what the ledger says; ``plans`` are in the statement's order.
      metrics: the records of metrics.jsonl, in the order in which they were written.
      metrics_torn: whether an unfinished last line of that file was left out.
      config: the text of config.yaml, without the value of a noise seed; None if there is no such file.
      test_accuracy, model_sha256, steps_trained: of result.json; None where it says nothing.
    """

    name: str
    statement: Statement
    plans: tuple[PlanSummary, ...]
    metrics: tuple[MetricsRecord, ...] = ()
    metrics_torn: bool = False
    config: str | None = None
    test_accuracy: float | None = None
    model_sha256: str | None = None
    steps_trained: int | None = None

    @property
    def finished(self) -> bool:
        """Whether all planned steps of all plans are charged."""
        return bool(self.plans) and self.steps_left == 0

    @property
    def steps_charged(self) -> int:
        return sum(plan.stated.steps_charged for plan in self.plans)

    @property
    def steps_planned(self) -> int:
        return sum(plan.stated.steps_planned for plan in self.plans)

    @property
    def steps_left(self) -> int:
        return self.steps_planned - self.steps_charged

    @property
    def epsilon_left(self) -> str:
        """What further plans may cost, rounded down."""
        if self.statement.budget.orders:
            return _BY_FILTER
        left = as_typed(self.statement.budget.epsilon) - as_typed(self.statement.committed_epsilon)
        return str(_decimal(max(left, Fraction(0))).quantize(Decimal("0.0001"), rounding=ROUND_FLOOR))

    @property
    def delta_left(self) -> str:
        """What the deltas of further plans may add up to, rounded down."""
        if self.statement.budget.orders:
            return _BY_FILTER
        left = as_typed(self.statement.budget.delta) - sum(as_typed(plan.record.delta) for plan in self.plans)
        return f"{float(Context(prec=6, rounding=ROUND_FLOOR).plus(_decimal(max(left, Fraction(0))))):.6g}"


def read_ledger(run: RunFolder) -> tuple[Statement, tuple[PlanSummary, ...]]:
    """What the ledger of ``run`` says, verified from the first entry to the last.

    Raises:
      RunFolderError: there is no such folder, or the run was trained without privacy.
      LedgerError: the ledger is missing or cannot be trusted.
    """
    if not run.path.is_dir():
        raise RunFolderError(f"{run.path} does not exist; give the folder of a run, as `dpkit train` printed it.")
    path = run.entry(LEDGER)
    if not path.exists() and run.exists("nonprivate", "result.json") and not run.exists("result.json"):
        raise RunFolderError(
            f"{run.path} was trained without privacy: it has no {LEDGER}, so nothing can be claimed for it and there "
            "is no report. Train with `private: true` for one."
        )
    with Ledger.open(path, read_only=True) as ledger:
        _check_result(run, ledger)
        return of_ledger(ledger)


def of_ledger(ledger: Ledger) -> tuple[Statement, tuple[PlanSummary, ...]]:
    """What an open ledger says."""
    stated = accounting.statement(ledger)
    records = {plan.plan_id: plan for plan, _ in ledger.plans()}
    return stated, tuple(PlanSummary(records[plan.plan_id], plan) for plan in stated.plans)


def read(run: RunFolder, said: tuple[Statement, tuple[PlanSummary, ...]] | None = None) -> RunSummary:
    """The summary of ``run``.

    Args:
      said: what its ledger says, if somebody has it open; read from the folder when left out.
    Raises:
      RunFolderError: as :func:`read_ledger`, or a file of the run is damaged or cannot be read.
      LedgerError: the ledger is missing or cannot be trusted.
    """
    metrics, torn = read_metrics(run) if run.path.is_dir() else ([], False)
    # The ledger after the metrics: a run that goes on meanwhile has charged whatever it recorded.
    stated, plans = read_ledger(run) if said is None else said
    _check_age(run, metrics, plans)
    result = read_object(run, "result.json")
    try:
        accuracy = number(result, "test_accuracy") if "test_accuracy" in result else None
        trained = int(number(result, "steps")) if "steps" in result else None
    except (ValueError, OverflowError) as error:
        raise RunFolderError(f"{run.entry('result.json')}: {error}. Put the file back as it was written.") from None
    digest = result.get("model_sha256")
    return RunSummary(
        name=run.path.resolve().name,
        statement=stated,
        plans=plans,
        metrics=tuple(metrics),
        metrics_torn=torn,
        config=_config(run),
        test_accuracy=accuracy,
        model_sha256=digest if isinstance(digest, str) else None,
        steps_trained=trained,
    )


def _check_result(run: RunFolder, ledger: Ledger) -> None:
    """The ledger must hold the entry that the result was written at, or it is of another run."""
    result = read_object(run, "result.json")
    sequence, digest = result.get("anchor_sequence"), result.get("anchor_digest")
    if sequence is None and digest is None:
        return
    if isinstance(sequence, bool) or not isinstance(sequence, int) or not isinstance(digest, str):
        raise RunFolderError(f"{run.entry('result.json')} names no entry of a ledger. Put the file back as it was.")
    ledger.check_anchor(sequence, digest)


def _check_age(run: RunFolder, metrics: list[MetricsRecord], plans: tuple[PlanSummary, ...]) -> None:
    """Every recorded step was charged first, so a ledger with fewer charges has lost some."""
    recorded = max((record.charged for record in metrics), default=0)
    charged = max((plan.stated.steps_charged for plan in plans), default=0)
    if recorded > charged:
        raise LedgerError(
            f"{run.entry('metrics.jsonl')} records {recorded} charged steps, but no plan in {run.entry(LEDGER)} has "
            f"more than {charged}: the ledger is an older copy, or of another run. Restore the newest ledger."
        )


def _config(run: RunFolder) -> str | None:
    if not run.exists("config.yaml"):
        return None
    try:
        text = run.read("config.yaml").decode("utf-8")
    except UnicodeDecodeError:
        raise RunFolderError(f"{run.entry('config.yaml')} is not UTF-8 text. Put the file back as it was.") from None
    return _NOISE_SEED.sub(rf"\1{_SEED_LEFT_OUT}", text)


def _decimal(number: Fraction) -> Decimal:
    wide = Context(prec=60, rounding=ROUND_FLOOR)
    return wide.divide(Decimal(number.numerator), Decimal(number.denominator))
