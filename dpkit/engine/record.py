"""The plan as the ledger keeps it, and whether a resumed run has the same one."""

from __future__ import annotations

import math

import torch

from accounting import PlanRecord
from accounting.records import Fact
from dpkit.errors import CheckpointError
from dpkit.version import __version__

from .plan import Plan

_GUARANTEE = ("event", "steps", "delta", "relation", "unit", "num_examples")
# What may differ when a run goes on: it is another process, and perhaps another machine.
_OF_THE_PROCESS = ("certified", "certified_reason", "noise_generator", "torch_version", "dpkit_version")


def plan_record(
    plan: Plan, *, bounds: list[float], certified: bool, caveats: list[str], target_epsilon: float | None
) -> PlanRecord:
    """What the ledger keeps of the plan, for the guarantee and for the statement.

    Args:
      bounds: clipping norm of each group of the model's parameters.
    """
    facts: dict[str, Fact] = {
        "clipping": _words(plan.clip),
        "max_grad_norm": math.hypot(*bounds),
        "sampler": _words(plan.sampler),
        "expected_batch_size": plan.expected_batch,
        "mechanism": _words(plan.mechanism),
        "filters": [f"{filter_.update.__module__}.{filter_.update.__qualname__}" for filter_ in plan.filters],
        "target_epsilon": target_epsilon,
        "noise_generator": (
            "torch, seeded with 256 bits by the operating system; not cryptographic"
            if certified
            else "torch, seeded by the user; whoever knows the seed can repeat it; not cryptographic"
        ),
        "certified": certified,
        "certified_reason": None if certified else "seeded: whoever knows the seed can remove the noise",
        "caveats": caveats,
        "torch_version": str(torch.__version__),
        "dpkit_version": __version__,
    }
    return PlanRecord(
        event=plan.event,
        steps=plan.steps,
        delta=plan.delta,
        relation=plan.relation,
        unit=plan.unit,
        num_examples=plan.num_examples,
        facts=facts,
    )


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
    differences += [
        f"{name} was {saved.facts.get(name)!r} and is {now.facts.get(name)!r}"
        for name in sorted(saved.facts.keys() | now.facts.keys())
        if name not in _OF_THE_PROCESS and saved.facts.get(name) != now.facts.get(name)
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
