"""The checks behind ``dpkit verify``: does what lies in a run folder agree with its ledger?

Guarantee: nothing in the folder is changed, no file outside it is read, and whatever is wrong with a file is a failed
check in words. A check that had nothing to look at says "not checked", never "ok".

Not shown by any of this: that training did what the ledger says (the engine's promise), and that nobody forged ledger
and files together: the hashes hold no secret. Only an anchor that was kept elsewhere tells a rewritten history.
"""

from __future__ import annotations

import hashlib
import itertools
import json
import math
import os
import re
import stat
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from enum import StrEnum
from importlib import metadata
from typing import Annotated, Any, NamedTuple

from pydantic import BaseModel, ConfigDict, Field, ValidationError

import dpkit
from accounting import (
    Bound,
    Ledger,
    PlanRecord,
    Poisson,
    Relation,
    Statement,
    TruncatedPoisson,
    round_up,
    round_up_text,
)
from accounting.ledger import epsilon_of, with_releases_beside
from dpkit import report
from dpkit.errors import AccountingError, CheckpointError, DataError, DpkitError, LedgerError, RunFolderError
from dpkit.run_folder import RunFolder

from . import config as configs
from .epsilon import Answer
from .sampler_check import sampler_problems

LARGEST_HEADER = 16 * 2**20
"""Bytes of a checkpoint's header that are read at most."""

LARGEST_LOG = 2**30
"""Bytes of metrics.jsonl that are read at most."""

_ANCHOR = re.compile(r"entry\s+(\d{1,18}),\s+([0-9a-f]{64})")
_NUMBER = r"[0-9]+(?:\.[0-9]+)?(?:e[+-]?[0-9]+)?"
_EPSILON = re.compile(rf"epsilon <= ({_NUMBER}|inf)(?: at delta = ({_NUMBER}))?")
_CHECKPOINT = re.compile(r"step-\d{10}\.safetensors")

Natural = Annotated[int, Field(ge=0, lt=2**63)]


class Verdict(StrEnum):
    """What a check found."""

    OK = "ok"
    WARNING = "warning"
    FAILED = "failed"
    NOT_CHECKED = "not checked"


class Check(NamedTuple):
    """One check, and why its verdict is what it is."""

    name: str
    verdict: Verdict
    detail: str


class Found(NamedTuple):
    """What a check returns; :func:`run_checks` adds its name."""

    verdict: Verdict
    detail: str


class _Read(BaseModel):
    """JSON of a run, as far as it is looked at. Other keys are nobody's business here."""

    model_config = ConfigDict(extra="ignore", frozen=True, strict=True)


class _Result(_Read):
    private: bool
    epsilon: float
    committed_epsilon: float
    delta: float
    unit: str
    relation: str
    sampling: str
    noise_multiplier: str
    accountant: str
    steps: Natural
    steps_charged: Natural
    certified: bool
    anchor_sequence: Natural | None = None
    anchor_digest: str | None = None
    model_sha256: str | None = None


class _Line(_Read):
    step: Natural
    charged: Natural
    planned: Natural
    epsilon: float
    delta: float
    metrics: dict[str, float | None] | None = None


class _Manifest(_Read):
    steps_taken: Natural
    anchor_sequence: Natural
    anchor_digest: str
    dataset_name: str
    plan: dict[str, Any]


class _Metadata(_Read):
    dpkit: str


class _Header(_Read):
    metadata: Annotated[_Metadata, Field(alias="__metadata__")]


@dataclass(frozen=True)
class Run:
    """A run folder and its verified ledger.

    Attributes:
      ledger: open for reading; of the folder, or of a copy.
      stated, answer: what the ledger says, for people and for programs.
    """

    folder: RunFolder
    ledger: Ledger
    stated: Statement
    answer: Answer

    @property
    def plans(self) -> list[tuple[PlanRecord, int]]:
        """Every plan with the number of its charges, as the ledger has them now."""
        return self.ledger.plans()


def ledger_checks(ledger: Ledger, stated: Statement) -> list[Check]:
    """What can be said from a verified ledger alone."""
    return [
        _guarded("sampler and accountant", _sampler, ledger.plans()),
        _guarded("budget", _budget, ledger, stated),
        _guarded("certified", _certified, stated),
        _guarded("delta", _delta, ledger.plans()),
        _guarded("versions", _versions, ledger.plans()),
    ]


def folder_checks(run: Run) -> list[Check]:
    """How the files of a run agree with its verified ledger."""
    return [
        _guarded("config.yaml", _config, run),
        _guarded("result.json: anchor", _result_anchor, run),
        _guarded("result.json: epsilon", _result_epsilon, run),
        _guarded("PRIVACY.md: anchor", _text_anchor, run, "PRIVACY.md"),
        _guarded("PRIVACY.md: epsilon", _privacy_epsilon, run),
        _guarded("PRIVACY.md: text", _report_text, run, "PRIVACY.md"),
        _guarded("report.html: anchor", _text_anchor, run, "report.html"),
        _guarded("report.html: text", _report_text, run, "report.html"),
        _guarded("nonprivate/report.html: anchor", _text_anchor, run, "nonprivate", "report.html"),
        _guarded("metrics.jsonl: charges", _metrics_charges, run),
        _guarded("metrics.jsonl: epsilon", _metrics_epsilon, run),
        _guarded("checkpoints: anchors", _checkpoint_anchors, run),
        _guarded("checkpoints: plan and steps", _checkpoint_plans, run),
        _guarded("model.safetensors", _model, run),
        _guarded("links", _links, run.folder),
    ]


def _guarded(name: str, look: Callable[..., Found], *arguments: Any) -> Check:
    """The check ``name``. What cannot be read has failed, whatever is wrong with it."""
    try:
        verdict, detail = look(*arguments)
    except (DpkitError, AccountingError, OSError) as error:
        verdict, detail = Verdict.FAILED, " ".join(str(error).split())
    return Check(name, verdict, printable(detail))


def printable(text: str) -> str:
    """``text`` without what would move the cursor or change colours: words of a ledger may be anybody's."""
    return "".join(character if character.isprintable() else "\N{REPLACEMENT CHARACTER}" for character in text)


def _ok(detail: str) -> Found:
    return Found(Verdict.OK, detail)


def _failed(*problems: str) -> Found:
    return Found(Verdict.FAILED, "; ".join(problems))


def _not_checked(detail: str) -> Found:
    return Found(Verdict.NOT_CHECKED, detail)


# -- the ledger alone -------------------------------------------------------------------------------------------------


def _sampler(plans: list[tuple[PlanRecord, int]]) -> Found:
    """The event that was charged is the one that the engine's own words about sampler and mechanism give."""
    if not plans:
        return _not_checked("nothing was charged")
    problems, silent = [], []
    for plan, _ in plans:
        missing = [name for name in ("sampler", "expected_batch_size", "mechanism") if plan.facts.get(name) is None]
        if missing:
            silent.append(f"plan {plan.plan_id[:12]} does not say its {', '.join(missing)}")
        else:
            problems += [f"plan {plan.plan_id[:12]}: {problem}" for problem in sampler_problems(plan)]
    if problems:
        return _failed(*problems)
    if silent:
        return _not_checked("; ".join(silent))
    return _ok(f"{'; '.join(str(plan.facts['sampler']) for plan, _ in plans)} is what was charged, q*N the batch")


def _budget(ledger: Ledger, stated: Statement) -> Found:
    spent, budget = ledger.spent(), ledger.budget
    limits = f"the budget {budget.epsilon!r} at delta {budget.delta!r}"
    if spent.committed_epsilon > budget.epsilon or spent.delta > budget.delta:
        return _failed(
            f"all planned steps cost {stated.committed_epsilon:.4f} at delta {round_up_text(stated.delta)}, which is "
            f"over {limits}"
        )
    return _ok(f"all planned steps cost {stated.committed_epsilon:.4f}, within {limits}")


def _certified(stated: Statement) -> Found:
    if not stated.plans:
        return _not_checked("nothing was charged")
    if not stated.certified:
        return Found(Verdict.WARNING, f"the run is NOT certified: {stated.certified_reason}")
    return _ok(stated.certified_reason)


def _delta(plans: list[tuple[PlanRecord, int]]) -> Found:
    if not plans:
        return _not_checked("nothing was charged")
    large = [plan for plan, _ in plans if plan.delta * plan.num_examples >= 1]
    if large:
        return Found(
            Verdict.WARNING,
            "; ".join(f"delta {p.delta!r} is not below 1/N = {1 / p.num_examples:.3g}" for p in large)
            + ": publishing one unit at random would satisfy such a delta",
        )
    return _ok("; ".join(f"delta {plan.delta!r} is below 1/N, N = {plan.num_examples}" for plan, _ in plans))


def _versions(plans: list[tuple[PlanRecord, int]]) -> Found:
    installed = {"dpkit": dpkit.__version__, "torch": _installed("torch")}
    recorded = {
        (name, str(plan.facts[f"{name}_version"]))
        for plan, _ in plans
        for name in installed
        if plan.facts.get(f"{name}_version") is not None
    }
    if not recorded:
        return _not_checked("the ledger names no versions")
    different = [
        f"{name} {then} then, {installed[name]} now" for name, then in sorted(recorded) if installed[name] != then
    ]
    if different:
        return Found(Verdict.WARNING, f"{'; '.join(different)}: bounds and words may differ between versions")
    return _ok(", ".join(f"{name} {version}" for name, version in sorted(recorded)))


def _installed(name: str) -> str:
    try:
        return metadata.version(name)
    except metadata.PackageNotFoundError:
        return "not installed"


# -- config.yaml ------------------------------------------------------------------------------------------------------


def _config(run: Run) -> Found:
    """What the configuration asks for is what was charged."""
    if not run.folder.exists("config.yaml"):
        return _not_checked("there is none: the run was not made by `dpkit train`")
    config = configs.decode(run.folder.read("config.yaml"), source="config.yaml")
    if not run.plans:
        return _not_checked("nothing was charged")
    privacy = config.privacy if config.private else None
    if privacy is None:
        return _failed("config.yaml says `private: false`, and the ledger was charged")
    named = (
        []
        if config.dataset == run.ledger.dataset_name
        else [f"the data set is {config.dataset!r}, and the ledger is that of {run.ledger.dataset_name!r}"]
    )
    # A ledger with several plans agrees with the configuration if one of them is the plan that it asks for.
    closest = min((list(_config_problems(privacy, config.training, *each)) for each in run.plans), key=len)
    if named or closest:
        return _failed(*named, *closest)
    return _ok("data set, N, batch size, steps, clipping, noise and delta are those that were charged")


def _config_problems(
    privacy: configs.Privacy, training: configs.Training, plan: PlanRecord, charged: int
) -> Iterator[str]:
    n = plan.num_examples
    declared = privacy.num_examples is not None
    if declared and privacy.num_examples != n:
        yield f"num_examples is {privacy.num_examples}, and the charged N is {n}"
    if (plan.relation == Relation.ADD_REMOVE) != declared:
        yield f"num_examples is {'given' if declared else 'left out'}, and the relation is {plan.relation.value}"
    steps = training.epochs * -(-n // training.batch_size)
    if steps != plan.steps:
        yield (
            f"{training.epochs} epochs of batch_size {training.batch_size} are {steps} steps, and the plan has "
            f"{plan.steps}"
        )
    rate = min(1.0, training.batch_size / n)
    event = plan.event
    if not isinstance(event, Poisson | TruncatedPoisson) or not math.isclose(event.sample_rate, rate):
        yield f"batch_size {training.batch_size} of N = {n} is rate {rate:.6g}, and what was charged is {event!r}"
    elif isinstance(event, TruncatedPoisson) != (training.max_physical_batch_size is not None):
        yield f"max_physical_batch_size is {training.max_physical_batch_size}, and what was charged is {event!r}"
    if privacy.delta != plan.delta:
        yield f"delta is {privacy.delta!r}, and the plan's is {plan.delta!r}"
    if plan.facts.get("max_grad_norm") != privacy.max_grad_norm:
        yield f"max_grad_norm is {privacy.max_grad_norm!r}, and the plan's is {plan.facts.get('max_grad_norm')!r}"
    if privacy.noise_multiplier is not None:
        noise = getattr(getattr(event, "event", None), "noise_multiplier", None)
        if noise != privacy.noise_multiplier:
            yield f"noise_multiplier is {privacy.noise_multiplier!r}, and the charged one is {noise!r}"
    if privacy.epsilon is not None:
        if (committed := epsilon_of(plan, plan.steps).upper) > privacy.epsilon:
            yield f"epsilon is {privacy.epsilon!r}, and the plan costs {round_up(committed):.4f}"
        if plan.facts.get("target_epsilon") not in (None, privacy.epsilon):
            yield f"epsilon is {privacy.epsilon!r}, and the noise was chosen for {plan.facts['target_epsilon']!r}"
    if privacy.noise_seed is not None and plan.facts.get("certified") is True:
        yield f"noise_seed is {privacy.noise_seed}, and the plan says certified: {plan.facts.get('certified')}"


# -- result.json, PRIVACY.md and the reports --------------------------------------------------------------------------


def _result_anchor(run: Run) -> Found:
    result = _result(run)
    if result is None:
        return _not_checked("there is no result.json")
    if result.anchor_sequence is None or result.anchor_digest is None:
        return _failed("result.json names no entry of the ledger, so an older copy of the ledger would not be seen")
    return _anchored(run, [("result.json", result.anchor_sequence, result.anchor_digest)])


def _result_epsilon(run: Run) -> Found:
    """Epsilon and everything that gives it a meaning, against the ledger as it is now."""
    result, now = _result(run), run.answer
    if result is None:
        return _not_checked("there is no result.json")
    problems = [
        f"{name} is {said!r}, and the ledger gives {true!r}"
        for name, said, true in (
            ("private", result.private, True),
            ("delta", result.delta, now.delta),
            ("unit", result.unit, now.unit),
            ("relation", result.relation, now.relation),
            ("sampling", result.sampling, now.sampling),
            ("noise_multiplier", result.noise_multiplier, now.noise_multiplier),
            ("certified", result.certified, run.stated.certified),
            ("accountant", result.accountant, now.accountant),
            ("steps_charged", result.steps_charged, now.steps),
        )
        if said != true
    ]
    if result.steps > now.steps:
        problems.append(f"{result.steps} steps were trained, and {now.steps} charged")
    claims = [
        _claim(run, "epsilon", result.epsilon, now.epsilon),
        _claim(run, "committed_epsilon", result.committed_epsilon, now.committed_epsilon),
    ]
    return _claimed(run, problems, claims)


def _privacy_epsilon(run: Run) -> Found:
    """The text names epsilon and delta as the ledger gives them, each time."""
    if not run.folder.exists("PRIVACY.md"):
        return _not_checked("there is no PRIVACY.md")
    text = " ".join(_text(run.folder, "PRIVACY.md").split())
    found = _EPSILON.findall(text)
    if not any(delta for _, delta in found):
        return _failed("PRIVACY.md does not say `epsilon <= ... at delta = ...`")
    problems = [
        f"delta is {delta}, and the ledger gives {round_up_text(run.stated.delta)}"
        for _, delta in found
        if delta and delta != round_up_text(run.stated.delta)
    ]
    claims = [
        _claim(run, "epsilon", float(epsilon), run.stated.epsilon)
        if delta
        else _claim(run, "committed epsilon", float(epsilon), run.stated.committed_epsilon)
        for epsilon, delta in found
    ]
    agreed = _claimed(run, problems, claims)
    if agreed.verdict == Verdict.OK and " ".join(str(run.stated).split()) not in text:
        return Found(Verdict.WARNING, f"{agreed.detail}; other words of the statement differ from what is stated now")
    return agreed


def _report_text(run: Run, name: str) -> Found:
    """The file says what would be written now: every number and every word, plots excepted."""
    if not run.folder.exists(name):
        return _not_checked(f"there is no {name}")
    stale = report.stale(run.folder, run.ledger)[(name,)]
    if stale is None:
        return _not_checked("it takes the extra `report`: pip install 'dpkit[report]'")
    if not stale:
        return _ok("it says what the ledger and the other files give now")
    detail = (
        f"{name} says something else than the ledger and the other files give now: it was changed, or the run went on "
        "since. `dpkit report` writes it anew"
    )
    older = _versions(run.plans).verdict == Verdict.WARNING
    return Found(Verdict.WARNING, f"{detail} (another version may have used other words)") if older else _failed(detail)


def _claim(run: Run, name: str, said: float, true: float) -> Found:
    """A printed epsilon against the one that the events give now, both rounded up."""
    if said == true:
        return _ok(f"{name} {said:.4f}")
    if not said > true:
        return _failed(f"{name} is {said:.4f}, which is below {true:.4f}, what the events cost")
    # An accountant of another version may have known a weaker bound; the same one gives the same.
    verdict = Verdict.WARNING if _versions(run.plans).verdict == Verdict.WARNING else Verdict.FAILED
    return Found(verdict, f"{name} is {said:.4f}, and the events cost {true:.4f}")


def _claimed(run: Run, problems: list[str], claims: list[Found]) -> Found:
    failures = [*problems, *(claim.detail for claim in claims if claim.verdict == Verdict.FAILED)]
    if failures:
        return _failed(*dict.fromkeys(failures))
    said = "; ".join(dict.fromkeys(claim.detail for claim in claims))
    if any(claim.verdict == Verdict.WARNING for claim in claims):
        return Found(Verdict.WARNING, f"{said}; another version of the accountant may have given that")
    return _ok(f"{said} at delta {round_up_text(run.stated.delta)}, as the events give now")


def _text_anchor(run: Run, *names: str) -> Found:
    if not run.folder.exists(*names):
        return _not_checked(f"there is no {'/'.join(names)}")
    text = _text(run.folder, *names)
    if names[-1].endswith(".html"):
        text = re.sub(r"<[^<>]*>", " ", text)
    anchors = [("/".join(names), int(sequence), digest) for sequence, digest in _ANCHOR.findall(text)]
    if not anchors:
        return _failed(f"{'/'.join(names)} names no entry of the ledger, so an older copy of it would not be seen")
    return _anchored(run, anchors)


def _anchored(run: Run, anchors: Iterable[tuple[str, int, str]]) -> Found:
    """(where it stands, sequence, digest) of anchors that the ledger must hold."""
    last, _ = run.ledger.anchor()
    problems, held = [], []
    for where, sequence, digest in anchors:
        if sequence > last:
            problems.append(f"{where} names entry {sequence}, and the ledger ends at entry {last}: it is an older copy")
            continue
        try:
            run.ledger.check_anchor(sequence, digest)
            held.append(sequence)
        except LedgerError:
            problems.append(f"{where} names another entry {sequence} than the ledger has: one of them was changed")
    return _failed(*problems) if problems else _ok(f"the ledger holds entry {', '.join(map(str, held))}")


def _result(run: Run) -> _Result | None:
    if not run.folder.exists("result.json"):
        return None
    return _parsed(_Result, run.folder.read("result.json"), "result.json")


# -- metrics.jsonl ----------------------------------------------------------------------------------------------------


def _metrics_charges(run: Run) -> Found:
    lines, unread = _metrics(run)
    if not lines:
        return _nothing_read(unread)
    # Asked after the file was read: a run that is going on charges before it writes.
    plans = run.plans
    charges: dict[int, int] = {}
    for plan, charged in plans:
        charges[plan.steps] = max(charged, charges.get(plan.steps, 0))
    for line in lines:
        if line.planned not in charges:
            return _failed(f"no plan of the ledger has the {line.planned} planned steps of metrics.jsonl")
        if line.charged > charges[line.planned]:
            return _failed(
                f"metrics.jsonl says {line.charged} steps were charged, and the ledger has {charges[line.planned]}: it "
                "is an older copy"
            )
        if line.step > line.charged:
            return _failed(f"metrics.jsonl has step {line.step} at {line.charged} charges, so one was not charged")
    # A second plan in the same folder begins at its own first charge.
    if len(plans) == 1 and any(later.charged < line.charged for line, later in itertools.pairwise(lines)):
        return _failed("metrics.jsonl has charges that go back")
    said = f"{lines[-1].charged} of {charges[lines[-1].planned]} charges are in metrics.jsonl"
    if unread:
        return Found(Verdict.WARNING, f"{said}; {unread} of its lines cannot be read, as a crash may leave one")
    return _ok(said)


def _metrics_epsilon(run: Run) -> Found:
    lines, unread = _metrics(run)
    if not lines:
        return _nothing_read(unread)
    # Those that the report plots, and the last: each costs an evaluation of the accountant.
    looked_at = [*(line for line in lines if line.metrics is not None), lines[-1]]
    found = [_line_epsilon(run, line) for line in looked_at]
    return next((each for each in found if each.verdict != Verdict.OK), found[-1])


def _line_epsilon(run: Run, line: _Line) -> Found:
    at = f"at {line.charged} charges and delta {line.delta!r}, epsilon"
    claims = [
        _claim(run, at, line.epsilon, round_up(bound.upper))
        for plan, _ in run.plans
        if plan.steps == line.planned and line.charged <= plan.steps
        for bound, delta in _with_releases_beside(run, plan, line.charged)
        if delta == line.delta
    ]
    if not claims:
        return _failed(f"delta {line.delta!r} and {line.planned} planned steps in metrics.jsonl are no plan's")
    # With several such plans, which of them the file belongs to is not written there.
    return next((claim for claim in claims if claim.verdict == Verdict.OK), claims[0])


def _with_releases_beside(run: Run, plan: PlanRecord, charged: int) -> Iterator[tuple[Bound, float]]:
    """(epsilon, delta) of the plan's first charges, with none, one, .. of the releases that were made beside it."""
    beside = [other for other, _ in run.plans if other.facts.get("beside") == plan.plan_id]
    for count in range(len(beside) + 1):
        yield with_releases_beside(plan, charged, beside[:count])


def _nothing_read(unread: int) -> Found:
    if unread:
        return _failed(f"none of the {unread} lines of metrics.jsonl can be read")
    return _not_checked("there is no metrics.jsonl, or nothing in it")


def _metrics(run: Run) -> tuple[list[_Line], int]:
    """(the lines that can be read, how many cannot): a crash may leave one that is cut off."""
    if not run.folder.exists("metrics.jsonl"):
        return [], 0
    lines = []
    size = run.folder.entry("metrics.jsonl").lstat().st_size
    if size > LARGEST_LOG:
        raise DataError(f"metrics.jsonl has {size} bytes; more than {LARGEST_LOG} are not read.")
    content = run.folder.read_start("metrics.jsonl", length=size)  # and not what a live run adds now
    *whole, torn = content.split(b"\n")
    for number, text in enumerate(whole, start=1):
        try:
            lines.append(_Line.model_validate_json(text))
        except ValidationError:
            raise DataError(f"line {number} of metrics.jsonl is damaged.") from None
    return lines, 1 if torn else 0


# -- checkpoints and the model ----------------------------------------------------------------------------------------


def _checkpoint_anchors(run: Run) -> Found:
    manifests = _manifests(run)
    if not manifests:
        return _not_checked("there are no checkpoints")
    return _anchored(run, [(name, m.anchor_sequence, m.anchor_digest) for name, m in manifests.items()])


def _checkpoint_plans(run: Run) -> Found:
    """Each checkpoint is of a plan of this ledger, and of no more steps than that was charged."""
    manifests = _manifests(run)
    if not manifests:
        return _not_checked("there are no checkpoints")
    problems = []
    for name, manifest in manifests.items():
        plan_id = manifest.plan.get("plan_id")
        found = run.ledger.find_plan(plan_id) if isinstance(plan_id, str) else None
        if found is None:
            # Before its first step, a plan has no charge, and the ledger does not know it yet.
            if manifest.steps_taken:
                problems.append(f"{name} is of plan {str(plan_id)[:12]}, which the ledger does not have: another run")
            continue
        plan, charged = found
        if _plan(name, manifest.plan) != plan:
            problems.append(f"{name} has another plan {plan.plan_id[:12]} than the ledger")
        if manifest.steps_taken > charged:
            problems.append(f"{name} is after {manifest.steps_taken} steps, and the ledger has charged {charged}")
        if manifest.dataset_name != run.ledger.dataset_name:
            problems.append(f"{name} is of data set {manifest.dataset_name!r}, not {run.ledger.dataset_name!r}")
    if problems:
        return _failed(*problems)
    return _ok(f"{len(manifests)} of this run, none beyond its charges (tensors are verified when a run is resumed)")


def _manifests(run: Run) -> dict[str, _Manifest]:
    found = {}
    for name in run.folder.names("checkpoints"):
        if _CHECKPOINT.fullmatch(name):
            try:
                found[name] = _manifest(run.folder, name)
            except RunFolderError:
                if run.folder.exists("checkpoints", name):
                    raise
                # Else the run, which goes on, has deleted it: it keeps the newest ones.
    return found


def _manifest(folder: RunFolder, name: str) -> _Manifest:
    """The manifest in the header of a checkpoint: 8 bytes of length, then JSON. PyTorch is not needed for that.

    Raises:
      CheckpointError: the file has no such header.
      RunFolderError: it cannot be read.
    """
    length = int.from_bytes(folder.read_start("checkpoints", name, length=8), "little")
    if length > LARGEST_HEADER:
        raise CheckpointError(f"{name} is damaged: its header claims {length} bytes.")
    try:
        header = _Header.model_validate_json(folder.read_start("checkpoints", name, length=8 + length)[8:])
        return _Manifest.model_validate_json(header.metadata.dpkit)
    except ValidationError:
        raise CheckpointError(f"{name} is damaged: its header is not that of a checkpoint.") from None


def _plan(name: str, fields: dict[str, Any]) -> PlanRecord:
    try:
        return PlanRecord.model_validate_json(json.dumps(fields))
    except (ValidationError, AccountingError) as error:
        raise CheckpointError(
            f"{name} is damaged: its plan makes no sense ({' '.join(str(error).split())[:200]})."
        ) from None


def _model(run: Run) -> Found:
    if not run.folder.exists("model.safetensors"):
        return _not_checked("there is no model.safetensors")
    result = _result(run)
    if result is None:
        return _not_checked("there is no result.json that says which model came out")
    if result.model_sha256 is None:
        return _failed("result.json does not say the model's sha256")
    run.folder.read_start("model.safetensors", length=1)  # a regular file, and no link
    with run.folder.entry("model.safetensors").open("rb") as file:
        found = hashlib.file_digest(file, "sha256").hexdigest()
    if found != result.model_sha256:
        return _failed(f"its sha256 is {found[:12]}..., and result.json says {result.model_sha256[:12]}...")
    return _ok(f"its sha256 {found[:12]}... is the one in result.json")


def _links(folder: RunFolder) -> Found:
    """The shareable part is regular files and folders: what is published is what was looked at."""
    problems: list[str] = []
    errors: list[OSError] = []
    count = 0
    for place, folders, files in os.walk(folder.path, onerror=errors.append):
        for name in [*folders, *files]:
            entry = os.path.join(place, name)  # noqa: PTH118  # as os.walk gives it; a name need not be text
            try:
                mode = os.lstat(entry).st_mode
            except FileNotFoundError:  # a temporary file of a run that goes on
                continue
            count += 1
            if stat.S_ISLNK(mode):
                problems.append(f"{os.path.relpath(entry, folder.path)} is a symbolic link")
            elif not (stat.S_ISREG(mode) or stat.S_ISDIR(mode)):
                problems.append(f"{os.path.relpath(entry, folder.path)} is neither a file nor a folder")
        if place == str(folder.path) and "nonprivate" in folders:
            folders.remove("nonprivate")
    problems += [f"{error.filename} cannot be read ({error.strerror})" for error in errors]
    return _failed(*problems) if problems else _ok(f"none among {count} files and folders outside nonprivate")


# -- reading ----------------------------------------------------------------------------------------------------------


def _text(folder: RunFolder, *names: str) -> str:
    return folder.read(*names).decode("utf-8", errors="replace")


def _parsed(form: type[_Result], data: bytes, name: str) -> _Result:
    try:
        return form.model_validate_json(data)
    except ValidationError as error:
        first = error.errors(include_url=False, include_input=False)[0]
        place = ".".join(map(str, first["loc"]))
        raise DataError(f"{name} is damaged: {place} {first['msg'][:1].lower()}{first['msg'][1:]}.") from None
