"""Plans to charge, and the records that a run of them would leave."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

from accounting import Event, Gaussian, PlanRecord, Poisson, Relation, round_up
from accounting.ledger import epsilon_of

MakeRun = Callable[..., Path]

FACTS: dict[str, Any] = {
    "clipping": "Flat(max_grad_norm=1.0)",
    "max_grad_norm": 1.0,
    "sampler": "Poisson(sample_rate=0.178)",
    "expected_batch_size": 256.0,
    "mechanism": "Gaussian(noise_multiplier=3.8)",
    "noise_generator": "torch, seeded with 256 bits by the operating system; not cryptographic",
    "certified": True,
    "certified_reason": None,
    "caveats": ["Assumed: the loop computes one loss per row."],
    "torch_version": "2.13.0",
    "dpkit_version": "0.1.0",
}
CONFIG = "dataset: digits\nmodel: mlp\ntraining:\n  epochs: 40\n"


def plan(*, steps: int = 40, **changes: Any) -> PlanRecord:
    """A plan of 40 steps on 1,437 units at delta 1e-4; ``facts`` are put over the usual ones."""
    event: Event = Poisson(0.178, Gaussian(3.8))
    fields: dict[str, Any] = {
        "event": event,
        "steps": steps,
        "delta": 1e-4,
        "relation": Relation.ZERO_OUT,
        "unit": "example",
        "num_examples": 1437,
    }
    facts = FACTS | changes.pop("facts", {})
    return PlanRecord(**(fields | changes), facts=facts)


def metrics_lines(record: PlanRecord, charged: int, *, every: int = 5) -> str:
    """What the callback writes for ``charged`` steps with an evaluation after every ``every`` of them."""
    lines = []
    for step in range(1, charged + 1):
        line = {
            "step": step,
            "charged": step,
            "planned": record.steps,
            "epsilon": round_up(epsilon_of(record, step).upper),
            "delta": record.delta,
            "learning_rate": 2.0 * (1 - step / record.steps),
        }
        lines.append(line)
        if step % every == 0:
            lines.append(line | {"metrics": {"test_accuracy": 0.3 + 0.6 * step / record.steps}})
    return "".join(json.dumps(line) + "\n" for line in lines)
