"""Canaries ride along: they cost and change nothing, and their scores are what theory says of the shipped mechanism."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from scipy import stats
from torch import nn
from torch.nn.functional import cross_entropy
from torch.utils.data import DataLoader, TensorDataset

import dpkit
from dpkit import clipping, filters, optim
from dpkit.engine.canaries import BLOCK, Canaries, log_ratio
from dpkit.errors import InvalidArgument, OutOfOrder
from dpkit.metrics import ClippedCount

FALSE_ALARM = 1e-7


def plan(**changes):
    settings = {
        "sampler": dpkit.Poisson(0.25),
        "clip": clipping.Flat(0.7),
        "mechanism": dpkit.Gaussian(1.3),
        "steps": 6,
        "num_examples": 40,
        "delta": 1e-5,
    }
    return dpkit.Plan(**(settings | changes))


def train(folder, plan, canaries=None, *, seed=5, optimizer=torch.optim.Adam):
    """A small run in the functional form; returns the model and the engine, detached."""
    torch.manual_seed(1)
    model = nn.Sequential(nn.Linear(5, 6), nn.Tanh(), nn.Linear(6, 3))
    data = TensorDataset(torch.randn(40, 5), torch.randint(3, (40,)))
    engine = dpkit.PrivacyEngine(folder, dataset_name="made up", seed=seed)
    step = engine.attach(
        model,
        lambda model, batch: cross_entropy(model(batch[0]), batch[1], reduction="none"),
        optimizer(model.parameters(), lr=0.1),
        plan=plan,
        dataset=data,
        canaries=canaries,
    )
    for batch in engine.batches():
        step(batch)
    return model, engine


def same_bits(one: nn.Module, other: nn.Module) -> bool:
    return all(torch.equal(p, q) for p, q in zip(one.parameters(), other.parameters(), strict=True))


@pytest.mark.parametrize("count", [50, 700])
@pytest.mark.parametrize(
    ("settings", "optimizer"),
    [
        ({}, torch.optim.Adam),
        ({"filters": (filters.first_order(),)}, torch.optim.SGD),
        ({"sampler": dpkit.TruncatedPoisson(0.25, 20)}, optim.DPAdamBC),
    ],
    ids=["adam", "filter", "adam-bc"],
)
def test_a_run_with_canaries_trains_to_the_same_bits(tmp_path, count, settings, optimizer):
    plain, first = train(tmp_path / "plain", plan(**settings), optimizer=optimizer)
    canaries = Canaries(count, seed=2)
    audited, second = train(tmp_path / "audited", plan(**settings), canaries, optimizer=optimizer)
    assert same_bits(plain, audited)
    assert first.epsilon() == second.epsilon()
    assert first.nonprivate == second.nonprivate
    assert canaries.steps == 6 and np.isfinite(canaries.inside).all() and len(canaries.outside) == count


def test_the_loop_form_takes_canaries_too(tmp_path):
    found = []
    for name, canaries in (("plain", None), ("audited", Canaries(50, seed=1))):
        torch.manual_seed(1)
        model = nn.Linear(5, 3)
        engine = dpkit.PrivacyEngine(tmp_path / name, dataset_name="made up", seed=3)
        model, optimizer, loader = engine.make_private(
            model,
            torch.optim.SGD(model.parameters(), lr=0.1),
            DataLoader(TensorDataset(torch.randn(40, 5), torch.randint(3, (40,))), batch_size=10),
            noise_multiplier=1.0,
            target_delta=1e-5,
            epochs=2,
            max_grad_norm=1.0,
            num_examples=40,
            max_physical_batch_size=4,
            canaries=canaries,
        )
        for x, y in loader:
            engine.backward(cross_entropy(model(x), y, reduction="none"))
            optimizer.step()
        assert {name for name, p in model.named_parameters() if p.grad is not None} == {"weight", "bias"}
        found.append(model)
        saved = engine.save()
        assert BLOCK.encode() not in saved.read_bytes()
    assert same_bits(*found)


def test_scores_of_a_full_batch_are_those_of_a_gaussian_mechanism(tmp_path):
    """False-alarm probability at most 3 FALSE_ALARM: two Kolmogorov-Smirnov tests, one of a correlation."""
    count, steps, noise = 40_000, 12, 3.0
    canaries = Canaries(count, seed=4)
    train(tmp_path, plan(sampler=dpkit.Poisson(1.0), mechanism=dpkit.Gaussian(noise), steps=steps), canaries)
    mu = math.sqrt(steps) / noise
    # The noise covers rounding too: it is larger than noise * C by less than 0.2 %, which the distance allows for.
    for scores, mean in ((canaries.inside, mu**2 / 2), (canaries.outside, -(mu**2) / 2)):
        distance = stats.kstest(scores, stats.norm(mean, mu).cdf).statistic
        assert distance < math.sqrt(math.log(2 / FALSE_ALARM) / (2 * count)) + 0.002 * mu
    between = np.corrcoef(canaries.inside, canaries.outside)[0, 1]
    assert abs(between) < stats.norm.isf(FALSE_ALARM / 2) / math.sqrt(count)


def test_canaries_take_part_at_the_sample_rate(tmp_path):
    """With next to no noise a score tells how often its canary took part: a binomial number.

    False-alarm probability at most 2 FALSE_ALARM: the mean and the variance over all canaries.
    """
    count, steps, rate, noise = 5000, 30, 0.25, 0.05
    canaries = Canaries(count, seed=9)
    train(tmp_path, plan(mechanism=dpkit.Gaussian(noise), steps=steps), canaries)
    missed, taken = math.log1p(-rate), math.log(rate) + 1 / (2 * noise**2)
    times = np.round((canaries.inside - steps * missed) / (taken - missed))
    assert times.min() >= 0 and times.max() <= steps
    low, high = stats.binom.interval(1 - FALSE_ALARM, count * steps, rate)
    assert low <= times.sum() <= high
    spread = times.var(ddof=1) * (count - 1) / (steps * rate * (1 - rate))
    # The sum of squares of binomial numbers is nearly chi-squared; six standard deviations allow for the difference.
    assert abs(spread - count) < 6 * math.sqrt(2 * count)
    assert np.allclose(canaries.outside, steps * missed)


def test_the_score_is_the_log_ratio_of_the_densities():
    y = np.linspace(-6, 6, 25)
    for rate, noise in ((1.0, 0.7), (0.1, 1.0), (0.02, 0.8), (1e-6, 0.01)):
        signal = 1 / noise
        inside = rate * stats.norm.pdf(y, signal) + (1 - rate) * stats.norm.pdf(y)
        assert np.allclose(log_ratio(y, signal, rate), np.log(inside) - stats.norm.logpdf(y), atol=1e-9)


def test_canaries_go_through_the_clip_of_the_run(tmp_path, monkeypatch):
    monkeypatch.setattr(clipping.Flat, "factors", lambda self, norms, labels, state: torch.ones_like(norms))
    canaries = Canaries(100, seed=4)
    train(tmp_path, plan(sampler=dpkit.Poisson(1.0)), canaries)
    assert canaries.inside.min() > 100 * canaries.outside.max()


@pytest.mark.parametrize(
    ("changes", "named"),
    [
        ({"clip": clipping.PerLayer(1.0)}, "PerLayer"),
        ({"clip": clipping.Quantile(1.0, noise_std=50.0)}, "learns"),
        ({"metrics": (ClippedCount(50.0),)}, "metrics"),
        ({"sampler": dpkit.FixedOrder(10, 40), "relation": "zero_out"}, "FixedOrder"),
        ({"clip": clipping.GroupAdaptive(1.0, 2)}, "label"),
        ({"clip": clipping.Global(1.0, 10.0)}, "would see nothing"),
        ({"clip": clipping.Flat(1e-46)}, "would see nothing"),
    ],
    ids=["groups", "learns", "metrics", "sampler", "labels", "drops", "too small"],
)
def test_what_canaries_cannot_audit_is_refused_by_name(changes, named):
    with pytest.raises(InvalidArgument, match=named):
        Canaries(50).check(plan(**changes), dict(nn.Linear(2, 2).named_parameters()))


def test_canaries_serve_one_run(tmp_path):
    canaries = Canaries(50)
    train(tmp_path / "one", plan(), canaries)
    with pytest.raises(OutOfOrder, match="served a run already"):
        train(tmp_path / "two", plan(), canaries)
    with pytest.raises(OutOfOrder, match="serve no run"):
        _ = Canaries(50).join(None, ())  # pyright: ignore[reportArgumentType]


def test_canaries_are_not_used_up_by_a_run_that_was_refused(tmp_path):
    canaries = Canaries(50)
    with pytest.raises(InvalidArgument):
        train(tmp_path / "one", plan(sampler=dpkit.FixedOrder(10, 40), relation="zero_out"), canaries)
    train(tmp_path / "two", plan(), canaries)
    assert canaries.steps == 6


def test_a_parameter_of_the_same_name_is_refused():
    model = nn.Module()
    model.register_parameter(BLOCK, nn.Parameter(torch.zeros(2)))
    with pytest.raises(InvalidArgument, match="rename"):
        Canaries(50).check(plan(), dict(model.named_parameters()))


@pytest.mark.parametrize(("count", "seed"), [(0, None), (49, None), (-3, None), (80.5, None), (True, None), (50, "a")])
def test_counts_and_seeds_that_are_none_are_refused(count, seed):
    with pytest.raises(InvalidArgument):
        Canaries(count, seed=seed)
