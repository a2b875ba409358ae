"""White-box audits of the shipped engine: tight where it is right, a contradiction where it is not."""

from __future__ import annotations

from statistics import fmean

import numpy as np
import pytest
import torch
from torch import nn
from torch.nn.functional import cross_entropy
from torch.utils.data import TensorDataset

import accounting
import dpkit
from dpkit.audit.estimators import scaled
from dpkit.audit.white_box_audit import WhiteBox, in_run, white_box
from dpkit.clipping import Automatic, Flat, GroupAdaptive, PerLayer, Quantile
from dpkit.engine.canaries import Canaries
from dpkit.errors import InvalidArgument, OutOfOrder
from dpkit.gradients import PerSampleGradients
from dpkit.mechanisms import gaussian

SURE = 1 - 1e-6
"""Confidence of the audits that must not contradict: each of them is a false alarm with probability 1e-6 at most."""


def audit(noise: float, rate: float, steps: int, canaries: int, **settings) -> WhiteBox:
    return white_box(dpkit.Gaussian(noise), sample_rate=rate, steps=steps, canaries=canaries, **settings)


@pytest.mark.parametrize(
    ("noise", "rate", "steps", "canaries", "tight"),
    [(2.684, 1.0, 20, 20_000, 0.93), (4.835, 1.0, 20, 20_000, 0.92), (16.68, 1.0, 20, 100_000, 0.88)],
    ids=["eps8", "eps4", "eps1"],
)
def test_the_bound_is_close_below_the_claim(noise, rate, steps, canaries, tight):
    """``tight`` is where less than one seed in a million falls below, from theory, so that a loose audit is noticed."""
    found = audit(noise, rate, steps, canaries, seed=11, confidence=0.95).verdict
    assert not found.contradicted
    assert tight * found.claim <= found.epsilon <= found.claim
    assert len(found.exercised) == 4


@pytest.mark.slow
@pytest.mark.parametrize(
    ("noise", "rate", "steps", "canaries", "mean"),
    [
        (2.684, 1.0, 20, 20_000, 0.90),
        (4.835, 1.0, 20, 20_000, 0.85),
        (1.0, 0.1, 100, 20_000, 0.80),
        (16.68, 1.0, 20, 500_000, 0.90),
    ],
    ids=["eps8", "eps4", "sampled", "eps1"],
)
def test_the_mean_of_eight_seeds_is_tight(noise, rate, steps, canaries, mean):
    found = [audit(noise, rate, steps, canaries, seed=seed).verdict for seed in range(8)]
    assert fmean(verdict.epsilon / verdict.claim for verdict in found) >= mean


@pytest.mark.slow
def test_no_claim_is_exceeded_in_two_hundred_audits():
    """False-alarm probability at most 200 * 1e-6."""
    plans = [(2.684, 1.0, 20), (4.835, 1.0, 20), (0.9, 0.25, 10), (1.5, 0.5, 15)]
    for seed in range(200):
        noise, rate, steps = plans[seed % len(plans)]
        assert not audit(noise, rate, steps, 2000, seed=seed, confidence=SURE).verdict.contradicted


def test_noise_that_is_a_tenth_too_small_is_caught(monkeypatch):
    shipped = gaussian._add_noise
    monkeypatch.setattr(gaussian, "_add_noise", lambda value, std, generator: shipped(value, 0.9 * std, generator))
    for noise, rate, steps in ((2.684, 1.0, 20), (1.0, 0.25, 20)):
        assert audit(noise, rate, steps, 20_000, seed=1).verdict.contradicted


def test_a_layer_that_is_not_clipped_is_caught_although_few_canaries_go_through_it(monkeypatch):
    shipped = PerSampleGradients.sq_norms

    def without_the_linear_layer(self):
        return {
            name: torch.zeros_like(square) if "linear" in name else square for name, square in shipped(self).items()
        }

    monkeypatch.setattr(PerSampleGradients, "sq_norms", without_the_linear_layer)
    found = audit(4.835, 1.0, 20, 20_000, seed=1).verdict
    assert found.contradicted and found.details["inside"] == 64


def test_a_rate_above_the_one_that_is_charged_is_caught(monkeypatch):
    shipped = dpkit.Poisson.draw

    def draw(self, population, generator, **more):
        return shipped(dpkit.Poisson(min(1.0, 1.5 * self.sample_rate)), population, generator)

    monkeypatch.setattr(dpkit.Poisson, "draw", draw)
    assert audit(0.8, 0.2, 20, 20_000, seed=1).verdict.contradicted


@pytest.mark.parametrize("relation", [accounting.Relation.ADD_REMOVE, accounting.Relation.ZERO_OUT])
@pytest.mark.parametrize("rule", [Automatic(0.5), PerLayer(2.0), Flat(0.01)], ids=["automatic", "per layer", "small"])
def test_rules_and_relations_are_audited(rule, relation):
    """False-alarm probability at most 6e-6: a bound above the claim."""
    found = audit(1.2, 0.5, 10, 5000, clipping=rule, relation=relation, seed=3, confidence=SURE).verdict
    assert 0 < found.epsilon <= found.claim
    # A rule with several groups leaves no room for a block beside the layers.
    assert len(found.exercised) == (3 if isinstance(rule, PerLayer) else 4)


def test_a_typed_claim_is_what_is_contradicted():
    found = audit(2.684, 1.0, 20, 5000, seed=1, claim=4.0).verdict
    assert found.contradicted and found.claim == 4.0 and "typed" in found.claim_source


@pytest.mark.parametrize(
    ("settings", "named"),
    [
        ({"clipping": Quantile(1.0)}, "learns"),
        ({"clipping": GroupAdaptive(1.0, 2)}, "label"),
        ({"sample_rate": 0.0}, "sample_rate"),
        ({"steps": 0}, "steps"),
        ({"canaries": -1}, "canaries"),
        ({"canaries": 1.5}, "canaries"),
        ({"delta": 0.0}, "delta"),
        ({"claim": -1.0}, "claim"),
        ({"claim": float("nan")}, "claim"),
        ({"confidence": 1.0}, "confidence"),
    ],
)
def test_what_cannot_be_audited_is_refused_by_name(settings, named):
    with pytest.raises(InvalidArgument, match=named):
        white_box(dpkit.Gaussian(1.0), **({"steps": 2, "canaries": 60} | settings))


def test_a_scaled_event_is_cheaper_the_more_noise_it_has():
    event = accounting.Repeated(accounting.Poisson(0.1, accounting.Gaussian(1.0)), 10)
    epsilons = [accounting.epsilon(scaled(event, s), 1e-5, relation="add_remove").upper for s in (0.5, 1.0, 2.0)]
    assert epsilons == sorted(epsilons, reverse=True)


# ---------------------------------------------------------------------------------------------------- inside a run


def train(folder, canaries, steps=20, rate=1.0, noise=4.835, stop_after=None):
    torch.manual_seed(2)
    model = nn.Linear(3, 2)
    plan = dpkit.Plan(
        sampler=dpkit.Poisson(rate),
        clip=Flat(0.5),
        mechanism=dpkit.Gaussian(noise),
        steps=steps,
        num_examples=30,
        delta=1e-5,
    )
    engine = dpkit.PrivacyEngine(folder, dataset_name="patients", seed=4)
    step = engine.attach(
        model,
        lambda model, batch: cross_entropy(model(batch[0]), batch[1], reduction="none"),
        torch.optim.SGD(model.parameters(), lr=0.1),
        plan=plan,
        dataset=TensorDataset(torch.randn(30, 3), torch.randint(2, (30,))),
        canaries=canaries,
    )
    for number, batch in enumerate(engine.batches()):
        if number == stop_after:
            break
        step(batch)
    return engine


def test_a_training_run_is_audited_from_inside(tmp_path):
    canaries = Canaries(20_000, seed=5)
    engine = train(tmp_path, canaries)
    found = in_run(engine, canaries).verdict
    assert 0.9 * found.claim <= found.epsilon <= found.claim
    assert found.claim == accounting.round_up(engine.epsilon().upper)
    assert "patients" in found.claim_source and "not the gradients" in found.exercised[0]


def test_a_run_that_stopped_early_is_held_to_what_it_charged(tmp_path):
    canaries = Canaries(20_000, seed=5)
    engine = train(tmp_path, canaries, stop_after=5)
    found = in_run(engine, canaries)
    assert found.verdict.claim == accounting.round_up(engine.epsilon().upper)
    assert 0.85 * found.verdict.claim <= found.verdict.epsilon <= found.verdict.claim
    assert len(found.inside) == len(found.outside) == 20_000 and np.isfinite(found.inside).all()


def test_canaries_of_another_run_or_of_no_step_are_refused(tmp_path):
    canaries = Canaries(100)
    engine = train(tmp_path, canaries, stop_after=0)
    with pytest.raises(OutOfOrder, match="no step"):
        in_run(engine, canaries)
    with pytest.raises(OutOfOrder, match="did not ride"):
        in_run(engine, Canaries(100))
