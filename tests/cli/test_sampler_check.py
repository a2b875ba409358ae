"""The event that was charged is built again from the words of the plan, for every sampler and mechanism."""

from __future__ import annotations

from typing import Any

import pytest

from accounting import PlanRecord, Relation
from dpkit.cli.sampler_check import parsed, sampler_problems
from dpkit.clipping import Flat, Setting
from dpkit.engine import Plan
from dpkit.engine.record import plan_record
from dpkit.mechanisms import (
    BISR,
    BSR,
    BandMF,
    Correlated,
    DiscreteGaussian,
    Gaussian,
    HardenedGaussian,
    Mechanism,
    SquareRoot,
)
from dpkit.sampling import CyclicPoisson, FixedOrder, Poisson, Sampler, TruncatedPoisson, WithoutReplacement

N = 60
PAIRS: list[tuple[Sampler, Mechanism, Relation]] = [
    (Poisson(0.1), Gaussian(1.3), Relation.ADD_REMOVE),
    (TruncatedPoisson(0.1, 12), Gaussian(1.3), Relation.ADD_REMOVE),
    (CyclicPoisson(0.1, 4), Gaussian(1.3), Relation.ADD_REMOVE),
    (CyclicPoisson(0.1, 4), Correlated(1.3, BandMF(3)), Relation.ZERO_OUT),
    (WithoutReplacement(7, N), Gaussian(1.3), Relation.REPLACE_ONE),
    (FixedOrder(7, N), Gaussian(1.3), Relation.ZERO_OUT),
    (Poisson(0.1), HardenedGaussian(1.3), Relation.ADD_REMOVE),
    (TruncatedPoisson(0.1, 12), HardenedGaussian(1.3), Relation.ADD_REMOVE),
    (Poisson(0.1), DiscreteGaussian(1.3), Relation.ADD_REMOVE),
    (CyclicPoisson(0.1, 4), DiscreteGaussian(1.3), Relation.ADD_REMOVE),
    (FixedOrder(7, N), DiscreteGaussian(1.3), Relation.ZERO_OUT),
    (FixedOrder(7, N, None), Correlated(1.3, SquareRoot(), regenerate=True), Relation.REPLACE_ONE),
    (FixedOrder(7, N), Correlated(1.3, BSR(3)), Relation.ZERO_OUT),
    (FixedOrder(7, N), Correlated(1.3, BISR(3)), Relation.ZERO_OUT),
    (FixedOrder(7, N), Correlated(1.3, BandMF(3)), Relation.ZERO_OUT),
]


def record_of(sampler: Sampler, mechanism: Mechanism, relation: Relation, steps: int = 20) -> PlanRecord:
    plan = Plan(
        sampler=sampler,
        clip=Flat(1.0),
        mechanism=mechanism,
        steps=steps,
        num_examples=N,
        delta=1e-3,
        relation=relation,
    )
    return plan_record(
        plan, setting=Setting((1,), plan.expected_batch), certified=True, caveats=[], target_epsilon=None
    )


def changed(record: PlanRecord, **facts: Any) -> PlanRecord:
    return record.model_copy(update={"facts": {**record.facts, **facts}})


@pytest.mark.parametrize("steps", [1, 2, 20])
@pytest.mark.parametrize(("sampler", "mechanism", "relation"), PAIRS, ids=str)
def test_the_words_of_a_run_are_what_it_was_charged_for(
    sampler: Sampler, mechanism: Mechanism, relation: Relation, steps: int
) -> None:
    assert list(sampler_problems(record_of(sampler, mechanism, relation, steps))) == []


@pytest.mark.parametrize(("sampler", "mechanism", "relation"), PAIRS, ids=str)
def test_other_words_are_seen(sampler: Sampler, mechanism: Mechanism, relation: Relation) -> None:
    record = record_of(sampler, mechanism, relation)
    said, noise = str(record.facts["sampler"]), str(record.facts["mechanism"])
    for facts in (
        {"mechanism": noise.replace("1.3", "1.4")},
        {"sampler": "Poisson(sample_rate=0.11)"},
        {"expected_batch_size": 9.0},
        {"sampler": said + "x"},
        {"mechanism": "Exponential(noise_multiplier=1.3)"},
        {"sampler": "FixedOrder(batch_size=0, num_examples=60)"},
        {"sampler": "CyclicPoisson()"},
        {"sampler": "__import__('os').abort()"},
    ):
        assert list(sampler_problems(changed(record, **facts))), facts
    if record.steps_per_event > 1:
        assert list(sampler_problems(record.model_copy(update={"steps_per_event": record.steps_per_event + 1})))


def test_words_are_read_and_never_executed() -> None:
    assert parsed("Correlated(noise_multiplier=1.0, strategy=BISR(bands=4), regenerate=False)") == (
        "Correlated",
        {"noise_multiplier": 1.0, "strategy": ("BISR", {"bands": 4}), "regenerate": False},
    )
    for text in ("", "1", "f(1)", "a.b(c=1)", "f(x=open('/etc/passwd'))", "(" * 5000, "f(x=[y for y in ()])", "\x00"):
        assert parsed(text) is None, text
