"""The plan as the ledger keeps it, and whether a resumed run has the same one."""

from __future__ import annotations

import math

import torch

from accounting import PlanRecord
from accounting.records import Fact
from dpkit.clipping import Setting
from dpkit.errors import CheckpointError, InvalidArgument
from dpkit.filters import FilterOf
from dpkit.mechanisms import Mechanism, Tier
from dpkit.metrics import ClippedCount, Metric
from dpkit.version import __version__

from .plan import Plan

_GENERATORS: dict[Tier, str] = {
    "default": "torch, {seeded}; not cryptographic",
    "hardened": "ChaCha20, {seeded}; Gaussian in double precision, rounded to a grid",
    "exact": "ChaCha20, {seeded}; discrete Gaussian in integer arithmetic",
}
_GUARANTEE = ("event", "steps_per_event", "steps", "delta", "relation", "unit", "num_examples")
# What may differ when a run goes on: it is another process, and perhaps another machine.
_MAY_DIFFER = ("certified", "certified_reason", "noise_generator", "torch_version", "dpkit_version")


def plan_record(
    plan: Plan, *, setting: Setting, certified: bool, caveats: list[str], target_epsilon: float | None
) -> PlanRecord:
    """What the ledger keeps of the plan, for the guarantee and for the statement.

    Args:
      setting: of the plan with the model's parameters.
    """
    bound = math.hypot(*plan.clip.bounds(plan.clip.init(setting)))
    learns = bool(plan.clip.questions(setting))
    facts: dict[str, Fact] = {
        "clipping": _words(plan.clip),
        "max_grad_norm": f"{bound:.6g} at the start, then as the rule learns" if learns else bound,
        "sampler": _words(plan.sampler),
        "expected_batch_size": plan.expected_batch,
        "mechanism": _words(plan.mechanism),
        "noise_tier": plan.mechanism.tier,
        "filters": [_filter_words(filter_) for filter_ in plan.filters],
        "target_epsilon": target_epsilon,
        **_of_the_process(plan.mechanism.tier, certified),
        "caveats": [*caveats, *_assumed(plan)],
    }
    if plan.metrics:
        facts["metrics"] = [_words(metric) for metric in plan.metrics]
    return PlanRecord(
        event=plan.event,
        steps=plan.steps,
        delta=plan.delta,
        relation=plan.relation,
        unit=plan.unit,
        num_examples=plan.num_examples,
        facts=facts,
        steps_per_event=plan.steps_per_event,
    )


def _assumed(plan: Plan) -> list[str]:
    """What the loop says of each unit, and nobody can check."""
    given = ["label"] if plan.clip.needs_labels else []
    given += [f"value for {metric.name!r}" for metric in plan.metrics if not isinstance(metric, ClippedCount)]
    return [f"Assumed: the {what} of each {plan.unit} depends on that {plan.unit} alone." for what in given]


def query_record(plan: Plan, metric: Metric, mechanism: Mechanism, *, beside: str, certified: bool) -> PlanRecord:
    """What the ledger keeps of a number over the whole data set that is released beside the steps of ``plan``.

    Args:
      beside: the id of the plan.
    """
    return PlanRecord(
        event=mechanism.event(plan.participation),
        steps=1,
        delta=plan.delta,
        relation=plan.relation,
        unit=plan.unit,
        num_examples=plan.num_examples,
        facts={
            "release": f"{metric.name!r}, over the whole data set",
            "beside": beside,
            "mechanism": _words(mechanism),
            "noise_tier": mechanism.tier,
            **_of_the_process(mechanism.tier, certified),
            "caveats": [
                f"Assumed: the value of each {plan.unit} for {metric.name!r} depends on that {plan.unit} alone."
            ],
        },
    )


def _of_the_process(tier: Tier, certified: bool) -> dict[str, Fact]:
    seeded = (
        "seeded with 256 bits by the operating system"
        if certified
        else "seeded by the user; whoever knows the seed can repeat it"
    )
    if tier not in _GENERATORS:
        raise InvalidArgument(f"tier of the mechanism is {tier!r}; it is one of {', '.join(_GENERATORS)}.")
    return {
        "noise_generator": _GENERATORS[tier].format(seeded=seeded),
        "certified": certified,
        "certified_reason": None if certified else "seeded: whoever knows the seed can remove the noise",
        "torch_version": str(torch.__version__),
        "dpkit_version": __version__,
    }


def _filter_words(filter_: object) -> str:
    """A filter with its settings; one that was made of functions, by the name of the function."""
    if isinstance(filter_, FilterOf):
        return f"{filter_.update.__module__}.{filter_.update.__qualname__}"
    return _words(filter_)


def _words(part: object) -> str:
    """``part`` with its settings, or its class where it does not tell them: an address in memory is no setting."""
    tells = type(part).__repr__ is not object.__repr__ or type(part).__str__ is not object.__str__
    return str(part) if tells else f"{type(part).__module__}.{type(part).__qualname__}"


def continued(saved: PlanRecord, now: PlanRecord) -> PlanRecord:
    """``saved``, if ``now`` is the same plan; the ledger takes no changed one.

    Raises:
      CheckpointError: naming what differs.
    """
    differences = [
        f"{name} was {getattr(saved, name)!r} and is {getattr(now, name)!r}"
        for name in _GUARANTEE
        if getattr(saved, name) != getattr(now, name)
    ]
    before: dict[str, Fact] = {"noise_tier": "default"} | saved.facts  # older records knew no other
    differences += [
        f"{name} was {before.get(name)!r} and is {now.facts.get(name)!r}"
        for name in sorted(before.keys() | now.facts.keys())
        if name not in _MAY_DIFFER and before.get(name) != now.facts.get(name)
    ]
    if differences:
        raise CheckpointError(
            f"the checkpoint is of another plan: {'; '.join(differences)}. A plan never changes once it is charged: "
            "give the same values as in the run that saved it, or start a new run."
        )
    if saved.facts.get("certified") is True and now.facts.get("certified") is not True:
        raise CheckpointError(
            "the run that is resumed was certified, and a seed would make its further noise repeatable; leave seed out."
        )
    return saved
