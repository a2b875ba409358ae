"""Tests that were missing: each was written because automatic mutants of the core lived, see ``SURVIVORS.md``."""

from __future__ import annotations

import hashlib
import json
import math
import os
import random
import sqlite3
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from fractions import Fraction
from itertools import permutations
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from scipy import stats
from torch import Tensor

import accounting
from accounting import Budget, BudgetExceeded, Ledger, LedgerError, PlanRecord, Receipt, Relation, tip
from accounting.chain import Chain
from accounting.ledger import epsilon_of, with_releases_beside
from accounting.normal_form import joint_noise_multiplier, merged, normal_form
from accounting.tip import TipNote
from dpkit.clipping import (
    Automatic,
    BoundSplit,
    ClipRule,
    Flat,
    Global,
    GlobalAdapt,
    GroupAdaptive,
    NoiseSplit,
    NormalizeIfExceeds,
    PerLayer,
    PerLayerQuantile,
    Quantile,
    Setting,
)
from dpkit.clipping.flat import shrink
from dpkit.engine.plan import Plan
from dpkit.engine.step import ClippedAccumulator, StepState, _bounded, _finite_sums, release
from dpkit.errors import InvalidArgument, OutOfOrder
from dpkit.filters import FilterOf
from dpkit.gradients import ROUNDING_CHAIN
from dpkit.mechanisms import BSR, Correlated, Gaussian, NoiseKey, RunKey, SquareRoot
from dpkit.mechanisms.keys import _expand, generator_from
from dpkit.metrics import ClippedCount, Mean
from dpkit.sampling import CyclicPoisson, FixedOrder, Poisson, Sampler, TruncatedPoisson, WithoutReplacement
from dpkit.types import ClippedSum, Query, Question


def receipt(step: int = 1, plan: str = "a" * 16) -> Receipt:
    return Receipt(sequence=step, plan_id=plan, step=step, digest="0" * 64)


def numbers(generator: torch.Generator) -> list[int]:
    return torch.randint(0, 2**31, (700,), generator=generator).tolist()


@contextmanager
def kept_generators() -> Iterator[None]:
    """The generators that everybody shares are afterwards as they were."""
    state = random.getstate(), np.random.get_state()
    try:
        with torch.random.fork_rng(devices=[]):
            yield
    finally:
        random.setstate(state[0])
        np.random.set_state(state[1])


def test_the_numbers_on_cpu_are_those_of_a_twister_whose_whole_state_is_the_key() -> None:
    """Against numpy's Mersenne twister: had a word of the old state been handed out first, or a word of the key been
    left out, the streams would differ. 1400 words are the whole state of 624, and the two blocks after it."""
    words = np.frombuffer(hashlib.shake_256(b"k" * 32 + b"twister").digest(4 * 624), dtype="<u4")
    twister = np.random.MT19937()
    twister.state = {"bit_generator": "MT19937", "state": {"key": words, "pos": 624}}
    pairs = twister.random_raw(1400).reshape(700, 2).tolist()
    expected = [((high << 32 | low) % 2**53) / 2**53 for high, low in pairs]
    assert torch.rand(700, generator=generator_from(b"k" * 32), dtype=torch.float64).tolist() == expected
    drawn = Poisson(0.25).draw(700, generator_from(b"k" * 32)).tolist()
    assert drawn == [unit for unit, uniform in enumerate(expected) if uniform < 0.25]
    # Behind the words the state holds a normal number that was left over: there must be none.
    assert not bool(generator_from(b"k" * 32).get_state()[24 + 8 * 624 :].any())


def test_labels_of_a_stream_are_told_apart_by_type_and_by_where_they_end() -> None:
    labels = [(1,), ("1",), ("ab", "c"), ("a", "bc"), ("abc",), ("None",)]
    assert len({_expand(bytes(32), "noise", *label) for label in labels}) == len(labels)


def test_every_stream_of_a_run_is_another_one() -> None:
    run = RunKey(5)
    streams = [run.sampling(1), run.sampling(2), run.arrangement()]
    with kept_generators():
        run.seed_global_generators()
        streams.append(torch.Generator())
        streams[-1].set_state(torch.get_rng_state())
    keys = [run.noise_key(receipt(1)), run.query_key(receipt(2)), run.noise_key(receipt(3)), run.query_key(receipt(4))]
    labels: list[Any] = [(0, "a"), (1, "a"), (0, "b"), (0, "a", 1)]
    streams += [key.generator(*label) for key in keys for label in labels]
    drawn = [tuple(numbers(stream)) for stream in streams]
    assert len(set(drawn)) == len(drawn) == 20


def test_torch_draws_from_the_key_whatever_it_drew_from_before() -> None:
    states = []
    with kept_generators():
        for seed in (0, 1):
            torch.manual_seed(seed)
            RunKey(5).seed_global_generators()
            states.append(torch.get_rng_state())
    assert torch.equal(*states)


def test_a_receipt_buys_one_key_and_one_run_serves_one_plan() -> None:
    key, paid = RunKey(), receipt()
    key.query_key(paid)
    with pytest.raises(LedgerError):
        key.query_key(paid)
    key.noise_key(receipt())
    with pytest.raises(OutOfOrder, match="one plan"):
        key.noise_key(receipt(plan="b" * 16))


def test_runs_with_different_seeds_share_nothing_and_only_whole_numbers_are_seeds() -> None:
    assert numbers(RunKey(1).sampling(0)) != numbers(RunKey(2).sampling(0))
    for seed in (True, "1", 1.0):
        with pytest.raises(InvalidArgument, match="seed"):
            RunKey(seed)  # pyright: ignore[reportArgumentType]


def test_a_key_is_claimed_once_and_a_resumed_run_has_other_streams() -> None:
    keys = [RunKey(5) for _ in range(4)]
    for key, digest in zip(keys, (None, None, "aa", "ab"), strict=True):
        key.claim(resumed_at=digest)
    first, same, *resumed = (tuple(numbers(key.sampling(1))) for key in keys)
    assert first == same and len({first, *resumed}) == 3
    with pytest.raises(OutOfOrder, match="in use"):
        keys[0].claim()


class Recorded:
    """In the place of the generator of a device that is not here."""

    def __init__(self, device: object) -> None:
        self.device = device

    def manual_seed(self, seed: int) -> tuple[object, int]:
        return self.device, seed


def check_seeds(seeds: list[int], bits: int) -> None:
    """Each bit is set in some and not in others: of 128 fair bits all are alike with probability 2^-127."""
    assert len(set(seeds)) == len(seeds) == 128
    patterns = [seed % 2**64 for seed in seeds]
    for bit in range(bits):
        assert 0 < sum(pattern >> bit & 1 for pattern in patterns) < 128


def test_other_devices_get_64_bits_that_depend_on_the_whole_key(monkeypatch: pytest.MonkeyPatch) -> None:
    """Every bit of a seed is wrong with probability below 64·2^-127."""
    monkeypatch.setattr(torch, "Generator", Recorded)
    keys = [bytes(31) + bytes([n]) for n in range(64)] + [bytes([n + 1]) + bytes(31) for n in range(64)]
    made: list[Any] = [NoiseKey(key).generator(0, "p", device="meta") for key in keys]
    assert {device for device, _ in made} == {torch.device("meta")}
    seeds = [seed for _, seed in made]
    assert all(-(2**63) <= seed < 2**64 for seed in seeds)  # what torch takes
    check_seeds(seeds, 64)


def test_dropout_on_other_devices_is_seeded_too(monkeypatch: pytest.MonkeyPatch) -> None:
    seeds: list[int] = []
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "manual_seed_all", seeds.append)
    with kept_generators():
        for _ in range(128):
            RunKey().seed_global_generators()
    assert all(0 <= seed < 2**63 for seed in seeds)
    check_seeds(seeds, 63)


@pytest.mark.parametrize(
    "use",
    [
        lambda key: key.claim(),
        lambda key: key.sampling(0),
        lambda key: key.seed_global_generators(),
        lambda key: key.arrangement(),
        lambda key: key.query_key(receipt()),
        lambda key: key.noise_key(receipt()),
    ],
    ids=["claim", "sampling", "seed_global_generators", "arrangement", "query_key", "noise_key"],
)
def test_a_forked_process_gets_nothing_from_its_parent_s_key(
    use: Callable[[RunKey], object], monkeypatch: pytest.MonkeyPatch
) -> None:
    key = RunKey()
    parent = os.getpid()
    monkeypatch.setattr(os, "getpid", lambda: parent + 1)
    with pytest.raises(OutOfOrder, match="another process"):
        use(key)


def query(value: torch.Tensor, share: float) -> Query:
    return Query({"p": value}, {"p": 0}, {0: 1.0}, share)


def test_noise_is_drawn_in_double_precision() -> None:
    clipped = ClippedSum((query(torch.zeros(1000, dtype=torch.float64), 1.0),))
    noise = Gaussian(1.0).release(clipped, (), NoiseKey(bytes(32)))[0].value["p"]
    # A double is a float32 by chance once in 2^29 times.
    assert noise.dtype == torch.float64 and not bool((noise == noise.float().double()).any())


def test_a_query_without_a_share_of_the_noise_is_refused() -> None:
    clipped = ClippedSum((query(torch.zeros(2), 1.0), query(torch.zeros(2), 0.0)))
    with pytest.raises(InvalidArgument, match="shares"):
        Gaussian(1.0).release(clipped, (), NoiseKey(bytes(32)))


def test_truth_is_no_noise_multiplier() -> None:
    for value in (True, "1"):
        with pytest.raises(InvalidArgument, match="noise_multiplier"):
            Gaussian(value)  # pyright: ignore[reportArgumentType]


def test_a_factor_is_zero_or_survives_single_precision() -> None:
    """The sensitivity allows for a factor that is rounded by 2^-24 of itself, which no number below 2^-126 is."""
    norms = torch.logspace(0, 308, 20_000, dtype=torch.float64)
    factors = shrink(norms, 1.0)
    assert bool(((factors.float().double() - factors).abs() <= factors * 2.0**-24).all())
    assert bool((factors[norms < 2.0**99] > 0).all())


# One step, against a loop over the units.

SHAPES = {"a.weight": (3, 2), "a.bias": (3,), "b.weight": (4,)}


@dataclass
class Dense:
    """Per-sample gradients that are kept as they are, one row a unit."""

    forms: dict[str, Tensor]
    size: int

    def sq_norms(self) -> dict[str, Tensor]:
        return {name: rows.double().flatten(1).square().sum(1) for name, rows in self.forms.items()}

    def weighted_sum(self, weights: dict[str, Tensor]) -> Iterator[tuple[str, Tensor]]:
        for name, rows in self.forms.items():
            yield name, torch.tensordot(weights[name], rows, dims=1)

    def select(self, keep: Tensor) -> Dense:
        return Dense({name: rows[keep] for name, rows in self.forms.items()}, int(keep.sum()))


def plan_of(clip: ClipRule, **changes: Any) -> Plan:
    fixed: dict[str, Any] = {"sampler": Poisson(0.5), "mechanism": Gaussian(1.0)}
    values = {"clip": clip, "steps": 3, "num_examples": 32, "delta": 1e-5}
    return Plan(**fixed | values | changes)


def parameters() -> dict[str, Tensor]:
    return {name: torch.zeros(shape) for name, shape in SHAPES.items()}


def microbatches(scale: float) -> list[tuple[int, Dense, Tensor, Tensor]]:
    """(real units, gradients too small by ``scale``, losses, a metric's values); rows after the real are padding."""
    generator = torch.Generator().manual_seed(4)
    made = []
    for real, size in ((5, 5), (0, 2), (3, 4), (1, 1)):
        rows = {
            # Norms on both sides of the bounds, other ones in each layer: a unit is clipped in one, in both, in none.
            name: torch.randn(size, *shape, generator=generator) * torch.rand(size, generator=generator).view(
                -1, *[1] * len(shape)
            ) / scale
            for name, shape in SHAPES.items()
        }  # fmt: skip
        if real == 5:
            rows["a.bias"][2, 0] = math.nan
            rows["b.weight"][3, 1] = math.inf
            rows["b.weight"][4] = 0.0
            rows = {
                name: row * torch.tensor([0.1, 1.0, 1.0, 1.0, 1.0]).view(-1, *[1] * (row.dim() - 1))
                for name, row in rows.items()
            }
        losses = torch.rand(size, generator=generator) * (real != 3)
        made.append((real, Dense(rows, size), losses, torch.rand(size, generator=generator)))
    return made


@pytest.mark.parametrize("clip", [Flat(0.9), PerLayer((0.7, 0.4))], ids=["flat", "per layer"])
@pytest.mark.parametrize("inside", [False, True], ids=["after the backward pass", "inside of it"])
def test_a_batch_of_microbatches_is_the_sum_over_its_units(clip: ClipRule, inside: bool) -> None:
    scale, mean = 3.0, Mean("value", noise_std=50.0)
    plan = plan_of(clip, metrics=(mean, ClippedCount(noise_std=50.0)))
    setting = plan.setting(parameters())
    accumulator = ClippedAccumulator(plan, clip.init(setting), parameters(), 4, plan.questions(setting))
    assert (accumulator.consumer is accumulator) == isinstance(clip, PerLayer)
    for real, gradients, losses, values in microbatches(scale):
        accumulator.open(real, scale, values={"value": values})
        left = gradients
        if inside and accumulator.consumer is not None:
            for group in (1, 0):
                names = [name for name in SHAPES if accumulator.groups[name] == group]
                part: Any = Dense({name: gradients.forms[name] for name in names}, gradients.size)
                accumulator.consume(group, part)
            left = Dense({}, gradients.size)
        accumulator.add(left, losses)

    sums = {name: torch.zeros(shape, dtype=torch.float64) for name, shape in SHAPES.items()}
    units = clipped = dropped = 0
    answers, seen = [0.0, 0.0], []
    bounds = [0.9] if isinstance(clip, Flat) else [0.7, 0.4]
    group_of = dict.fromkeys(SHAPES, 0) if len(bounds) == 1 else {"a.weight": 0, "a.bias": 0, "b.weight": 1}
    for real, gradients, losses, values in microbatches(scale):
        for unit in range(real):
            units += 1
            seen.append(float(losses[unit]))
            rows = {name: rows[unit].double() * scale for name, rows in gradients.forms.items()}
            norms = [
                math.sqrt(sum(float(row.square().sum()) for name, row in rows.items() if group_of[name] == group))
                for group in range(len(bounds))
            ]
            factors = [min(1.0, bound / norm) if norm else 1.0 for bound, norm in zip(bounds, norms, strict=True)]
            finite = all(map(math.isfinite, norms))
            if not finite:
                dropped += 1
            # Inside of the backward pass, a layer of finite norm is added before another one is known not to be.
            for name, row in rows.items():
                if finite or (inside and len(bounds) == 2 and math.isfinite(norms[group_of[name]])):
                    sums[name] += row * factors[group_of[name]]
            was = any(factor < 1 for norm, factor in zip(norms, factors, strict=True) if math.isfinite(norm))
            was = was and (finite or (inside and len(bounds) == 2))
            clipped += was
            if finite:
                answers[0] += float(values[unit]) - 0.5
                answers[1] += was - 0.5

    result = accumulator.result()
    for name, total in sums.items():
        assert torch.allclose(result.queries[0].value[name].double(), total, atol=1e-5)
    told = accumulator.diagnostics
    assert (told.units, told.clipped, told.dropped) == (units, clipped, dropped)
    assert 0 < clipped < units and dropped == 2
    assert told.mean_loss == pytest.approx(sum(seen) / len(seen))
    assert result.queries[0].spread == dict(enumerate(clip.spread(clip.init(setting))))
    for query, answer in zip(result.queries[1:], answers, strict=True):
        assert query.value["answer"].tolist() == pytest.approx([answer], abs=1e-6)
        assert query.noise_share == pytest.approx((1.0 * 0.5 / 50) ** 2, rel=1e-6)
    assert sum(query.noise_share for query in result.queries) == pytest.approx(1)


def test_the_rows_of_a_backend_that_shows_no_forms_are_added() -> None:
    rows = {name: torch.ones(2, *shape) for name, shape in SHAPES.items()}

    class Plain:
        size = 2

        def sq_norms(self) -> dict[str, Tensor]:
            return Dense(rows, 2).sq_norms()

        def weighted_sum(self, weights: dict[str, Tensor]) -> Iterator[tuple[str, Tensor]]:
            return Dense(rows, 2).weighted_sum(weights)

        def select(self, keep: Tensor) -> Dense:
            return Dense(rows, 2).select(keep)

    plan = plan_of(PerLayer((30.0, 20.0)))
    accumulator = ClippedAccumulator(plan, plan.clip.init(plan.setting(parameters())), parameters(), 1)
    accumulator.open(2)
    accumulator.add(Plain())
    assert accumulator.result().queries[0].value["b.weight"].tolist() == [2.0] * 4


def test_an_empty_batch_looks_like_any_other() -> None:
    plan = plan_of(Flat(1.0), metrics=(Mean("value", noise_std=50.0),))
    setting = plan.setting(parameters())
    empty = ClippedAccumulator(plan, (), parameters(), 1, plan.questions(setting)).result()
    full = ClippedAccumulator(plan, (), parameters(), 1, plan.questions(setting))
    real, gradients, losses, values = microbatches(1.0)[2]
    full.open(real, values={"value": values})
    full.add(gradients, losses)
    for one, other in zip(empty.queries, full.result().queries, strict=True):
        assert {n: (v.shape, v.dtype) for n, v in one.value.items()} == {
            n: (v.shape, v.dtype) for n, v in other.value.items()
        }
        assert one[1:] == other[1:]


def test_losses_of_zero_have_the_mean_zero_and_no_losses_have_none() -> None:
    accumulator = ClippedAccumulator(plan_of(Flat(1.0)), (), parameters(), 2)
    assert accumulator.diagnostics.mean_loss is None
    for losses in (torch.zeros(4), torch.ones(4)):
        accumulator.open(4)
        accumulator.add(Dense({name: torch.zeros(4, *shape) for name, shape in SHAPES.items()}, 4), losses)
    assert accumulator.diagnostics.mean_loss == 0.5


def test_answers_are_cut_to_the_bound_left_alone_below_it_and_zero_where_they_are_none() -> None:
    answers = torch.tensor([[0.3, 0.4], [0.9, 1.2], [0.0, 0.0], [math.nan, 0.0], [math.inf, 1.0]])
    cut = _bounded(answers, Question(size=2, bound=1.0, noise_std=1.0), 5)
    assert torch.allclose(cut, torch.tensor([[0.3, 0.4], [0.6, 0.8], [0.0, 0.0], [0.0, 0.0], [0.0, 0.0]]).double())
    assert torch.equal(cut[0], answers[0].double())
    for wrong in (answers[:4], answers[:, :1], answers[:, 0]):
        with pytest.raises(InvalidArgument, match="answers"):
            _bounded(wrong, Question(size=2, bound=1.0, noise_std=1.0), 5)


def test_a_rule_that_says_too_little_is_refused() -> None:
    class Few(Flat):
        def groups(self, names: Any) -> list[int]:
            return [0]

        def answers(self, norms: Tensor, labels: Any, state: Any) -> tuple[Tensor, ...]:
            return ()

        def questions(self, setting: Any) -> tuple[Question, ...]:
            return (Question(size=1, bound=1.0, noise_std=50.0),)

    plan = plan_of(Few(1.0))
    with pytest.raises(ValueError, match="zip"):
        plan.setting(parameters())
    with pytest.raises(ValueError, match="zip"):
        ClippedAccumulator(plan, (), parameters(), 1)
    one = {"p": torch.zeros(2)}
    accumulator = ClippedAccumulator(plan, (), one, 1, plan.questions(plan.setting(one)))
    accumulator.open(3)
    with pytest.raises(ValueError, match="zip"):
        accumulator.add(Dense({"p": torch.zeros(3, 2)}, 3))


def test_a_unit_whose_product_overflows_is_left_out_and_the_others_stay() -> None:
    class Overflowing(Dense):
        large = 1e35

        def weighted_sum(self, weights: dict[str, Tensor]) -> Iterator[tuple[str, Tensor]]:
            for name, rows in self.forms.items():
                yield name, torch.tensordot(weights[name] * self.large, rows / self.large, dims=1)

        def select(self, keep: Tensor) -> Overflowing:
            kept = super().select(keep)
            return Overflowing(kept.forms, kept.size)

    rows = torch.arange(1.0, 8.0)[:, None]
    weights = torch.tensor([2.0, 1e4, 0.5, 3.0, 1e5, 1.0, 2.0])
    ((name, total),) = _finite_sums(Overflowing({"p": rows}, 7), {"p": weights})
    expected = sum(float(w * r) for w, r in zip(weights, rows, strict=True) if w < 1000)
    assert name == "p" and total.dtype == torch.float32 and float(total) == pytest.approx(expected)


def test_a_factor_just_above_one_is_looked_at_too() -> None:
    class Halves(Dense):
        def weighted_sum(self, weights: dict[str, Tensor]) -> Iterator[tuple[str, Tensor]]:
            for name, rows in self.forms.items():
                yield name, torch.tensordot(weights[name] * 2.0**127, rows / 2.0**127, dims=1)

        def select(self, keep: Tensor) -> Halves:
            kept = super().select(keep)
            return Halves(kept.forms, kept.size)

    ((_, total),) = _finite_sums(Halves({"p": torch.ones(2, 1)}, 2), {"p": torch.tensor([0.5, 2.0])})
    assert float(total) == 0.5


def test_a_layer_that_no_loss_reached_drops_nobody() -> None:
    plan = plan_of(PerLayer(1.0), metrics=(Mean("value", noise_std=50.0),))
    setting = plan.setting(parameters())
    accumulator = ClippedAccumulator(plan, plan.clip.init(setting), parameters(), 1, plan.questions(setting))
    accumulator.open(2, values={"value": torch.ones(3)})
    accumulator.add(Dense({}, 3))
    assert (accumulator.diagnostics.units, accumulator.diagnostics.dropped) == (2, 0)
    assert accumulator.result().queries[1].value["answer"].tolist() == [1.0]


def test_a_rule_is_told_the_same_norms_inside_of_the_backward_pass() -> None:
    told = []
    for inside in (False, True):
        plan = plan_of(PerLayerQuantile(0.9, noise_std=50.0))
        setting = plan.setting(parameters())
        accumulator = ClippedAccumulator(plan, plan.clip.init(setting), parameters(), 1, plan.questions(setting))
        real, gradients, losses, _ = microbatches(3.0)[0]
        accumulator.open(real, 3.0)
        if inside:
            for group, names in enumerate((["a.weight", "a.bias"], ["b.weight"])):
                part: Any = Dense({name: gradients.forms[name] for name in names}, gradients.size)
                accumulator.consume(group, part)
        accumulator.add(Dense({}, gradients.size) if inside else gradients, losses)
        told.append(accumulator.result().queries[1].value["answer"].tolist())
    # Three of five units are finite: answers of them all that are alike would be +-1.5.
    assert told[0] == told[1] and told[0] != [1.5, 1.5]


def test_parameters_that_no_loss_reached_have_a_place_of_zeros_in_single_precision() -> None:
    parameter = torch.nn.Parameter(torch.ones(3, dtype=torch.bfloat16))
    value = ClippedAccumulator(plan_of(Flat(1.0)), (), {"p": parameter}, 1).result().queries[0].value["p"]
    assert value.dtype == torch.float32 and not value.requires_grad and value.tolist() == [0.0] * 3


class Asking(Flat):
    """A rule that asks for the norm and for the label, and keeps what it was told."""

    needs_labels = True

    def questions(self, setting: Any) -> tuple[Question, ...]:
        return (Question(size=2, bound=100.0, noise_std=1e4),)

    def answers(self, norms: Tensor, labels: Tensor | None, state: Any) -> tuple[Tensor, ...]:
        assert labels is not None and norms.dtype == torch.float64
        return (torch.stack([norms[0], labels.double()], dim=1),)

    def factors(self, norms: Tensor, labels: Tensor | None, state: Any) -> Tensor:
        assert labels is not None and norms.dtype == torch.float64 and labels.shape == norms.shape[1:]
        return super().factors(norms, labels, state)

    def update(self, state: Any, released: Any) -> Any:
        return [answer.shape for answer in released]


def test_a_rule_learns_from_the_norms_and_labels_of_the_units_and_from_its_own_answers() -> None:
    plan = plan_of(Asking(1.0), metrics=(Mean("value", noise_std=50.0),))
    one = {"p": torch.zeros(2)}
    accumulator = ClippedAccumulator(plan, (), one, 1, plan.questions(plan.setting(one)))
    rows = torch.tensor([[3.0, 4.0], [0.0, math.inf], [0.6, 0.8], [7.0, 7.0]])
    accumulator.open(3, 2.0, labels=torch.tensor([5, 6, 7, 8]), values={"value": torch.zeros(4)})
    accumulator.add(Dense({"p": rows}, 4))
    clipped = accumulator.result()
    assert clipped.queries[1].value["answer"].tolist() == pytest.approx([12.0, 12.0])
    state = StepState.initial(plan, one)
    release(clipped, plan, state, receipt(), RunKey())
    assert state.rule == [(2,)]


def test_a_release_says_its_noise_and_keeps_what_the_filters_saw() -> None:
    halve = FilterOf(
        lambda parameters: len(parameters) - 2,
        lambda released, state: (
            released._replace(value={name: value / 2 for name, value in released.value.items()}, noise_std={}, raw={}),
            state + 1,
        ),
    )
    plan = plan_of(PerLayer((0.7, 0.4)), filters=(halve, halve))
    state = StepState.initial(plan, parameters())
    accumulator = ClippedAccumulator(plan, state.rule, parameters(), 1)
    clipped = accumulator.result()
    expected = plan.mechanism.release(clipped, (), RunKey(3).noise_key(receipt()))[0]
    released = release(clipped, plan, state, receipt(), RunKey(3))
    assert released.raw is not None and state.filters == (2, 2)
    for name in SHAPES:
        assert torch.equal(released.raw[name], expected.value[name] / 16)
        assert torch.equal(released.value[name], expected.value[name] / 64)
        assert released.noise_std[name] == pytest.approx(expected.noise_std[name] / 16)


# The plan and its members.

SAMPLERS: list[Sampler] = [
    Poisson(0.3), TruncatedPoisson(0.3, 6), CyclicPoisson(0.2, groups=3), WithoutReplacement(4, 20), FixedOrder(4, 20),
    FixedOrder(4, 20, order_seed=None),
]  # fmt: skip


@pytest.mark.parametrize("sampler", SAMPLERS, ids=str)
def test_a_draw_is_made_of_the_generator_that_is_given_and_of_nothing_else(sampler: Sampler) -> None:
    before = torch.get_rng_state()
    arranged = sampler.arrange(20, generator_from(bytes(32)))
    draws = [sampler.draw(20, generator_from(b"k" * 32), step=1, arranged=arranged) for _ in range(2)]
    assert torch.equal(*draws)
    assert torch.equal(torch.get_rng_state(), before)
    others = [sampler.draw(20, generator_from(bytes([n] * 32)), step=1, arranged=arranged) for n in range(20)]
    assert any(not torch.equal(draws[0], other) for other in others) != isinstance(sampler, FixedOrder)


@pytest.mark.parametrize("sampler", SAMPLERS, ids=str)
def test_a_sampler_can_go_on_unless_something_secret_was_drawn_for_the_run(sampler: Sampler) -> None:
    one, other = (sampler.arrange(20, generator_from(bytes([n] * 32))) for n in (1, 2))
    secret = one is not None and other is not None and not torch.equal(one, other)
    assert sampler.resumable is not secret


@pytest.mark.parametrize("sampler", SAMPLERS, ids=str)
def test_units_are_drawn_at_random_wherever_the_event_is_that_of_a_sample(sampler: Sampler) -> None:
    event = sampler.event(accounting.Gaussian(noise_multiplier=1.0), 20)
    assert sampler.participation(10, 20).sampled == (not isinstance(event, accounting.OnePass))


def test_an_event_covers_the_steps_that_it_says() -> None:
    steps = [sampler.steps_per_event(20) for sampler in SAMPLERS]
    assert steps == [1, 1, 3, 1, 5, 5]  # a cycle over the groups, a pass over the data, or one draw


def test_a_cap_six_standard_deviations_above_the_expected_batch() -> None:
    assert [TruncatedPoisson.cap_for(expected) for expected in (1.0, 100.0, 10_000.0)] == [7, 160, 10_600]


def test_cyclic_draws_take_a_unit_into_one_of_every_so_many_steps() -> None:
    assert [CyclicPoisson(0.2, groups=3).participation(steps, 20).max_participations for steps in (1, 3, 4, 7)] == [
        1,
        1,
        2,
        3,
    ]


def test_a_truncated_draw_needs_an_upper_bound_of_the_size() -> None:
    TruncatedPoisson(0.3, 6).check(20, 20)
    with pytest.raises(InvalidArgument, match="num_examples"):
        TruncatedPoisson(0.3, 6).check(21, 20)


@pytest.mark.parametrize(
    "make",
    [
        lambda: Poisson(True),
        lambda: Poisson("0.5"),  # pyright: ignore[reportArgumentType]
        lambda: CyclicPoisson(True, groups=1),
        lambda: TruncatedPoisson(0.5, 0),
        lambda: WithoutReplacement(0, 10),
        lambda: WithoutReplacement(1.5, 10),  # pyright: ignore[reportArgumentType]
        lambda: WithoutReplacement(2, True),
        lambda: WithoutReplacement(11, 10),
        lambda: FixedOrder(2, True),
        lambda: FixedOrder(1, 1.5),  # pyright: ignore[reportArgumentType]
        lambda: Automatic(gamma=True),
        lambda: Automatic(gamma="1"),  # pyright: ignore[reportArgumentType]
        lambda: plan_of(Flat(1.0), num_examples=0),
        lambda: plan_of(Flat(1.0), steps=0),
        lambda: plan_of(Flat(1.0), delta=1.0),
        lambda: plan_of(Flat(1.0), delta=1.5),
        lambda: plan_of(Flat(1.0), delta=0.0),
        lambda: FixedOrder(0, 10),
        lambda: FixedOrder(2, 10, order_seed=2**32),
        lambda: FixedOrder(2, 10, order_seed=-1),
        lambda: Global(1.0, 0.5),
        lambda: Global(1.0, math.nan),
        lambda: GlobalAdapt(1.0, tolerance=0.0),
        lambda: GlobalAdapt(1.0, noise_std=0.0),
        lambda: GlobalAdapt(1.0, learning_rate=0.0),
        lambda: GlobalAdapt(1.0, learning_rate=math.nan),
        lambda: GlobalAdapt(1.0, learning_rate=1.0),
        lambda: GroupAdaptive(1.0, num_labels=True),
        lambda: GroupAdaptive(1.0, num_labels=1.5),  # pyright: ignore[reportArgumentType]
        lambda: GroupAdaptive(1.0, num_labels=2, noise_std=0.0),
        lambda: Quantile(quantile=0.0),
        lambda: Quantile(quantile=math.nan),
        lambda: Quantile(quantile=1.0),
        lambda: Quantile(learning_rate=0.0),
        lambda: Quantile(noise_std=0.0),
        lambda: Automatic(gamma=-1.0),
        lambda: Automatic(gamma=math.nan),
    ],
)
def test_settings_that_mean_nothing_are_refused(make: Callable[[], object]) -> None:
    with pytest.raises(InvalidArgument):
        make()


def test_settings_at_the_end_of_their_range_are_taken() -> None:
    assert len(FixedOrder(2, 10, order_seed=2**32 - 1).arrange(10, torch.Generator())) == 10
    assert plan_of(Flat(1.0), num_examples=1, sampler=Poisson(1.0), steps=1).expected_batch == 1.0
    assert WithoutReplacement(10, 10).sample_rate == 1.0
    assert Global(1.0, 1.0).threshold == GlobalAdapt(1.0, 1.0).threshold == 1.0


def test_a_fixed_order_needs_no_arrangement() -> None:
    sampler, generator = FixedOrder(4, 20), generator_from(bytes(32))
    arranged = sampler.arrange(20, generator)
    assert torch.equal(sampler.draw(20, generator), sampler.draw(20, generator, step=0, arranged=arranged))


def test_the_largest_poisson_batch_is_exceeded_with_probability_below_1e_20_and_is_no_looser_than_it_must() -> None:
    for n in (1, 7, 100, 10_000, 10**7):
        for rate in (1e-6, 1e-3, 0.05, 0.5, 1.0):
            largest = Poisson(rate).largest_batch(n)
            assert stats.binom.sf(largest, n, rate) < 1e-20
            expected = rate * n
            assert largest <= expected + 10 * math.sqrt(expected) + 51


@pytest.mark.parametrize("value", ["replace_one", Relation.REPLACE_ONE])
def test_a_relation_may_be_typed_as_its_text(value: Any) -> None:
    plan = plan_of(Flat(1.0), relation=value)
    assert plan.relation is Relation.REPLACE_ONE
    assert plan.sensitivities([1.0], 1)[0] > 2


@pytest.mark.parametrize(
    "changes", [{"delta": True}, {"delta": "1e-5"}, {"steps": True}, {"num_examples": 2.0}], ids=str
)
def test_numbers_of_a_plan_are_numbers(changes: dict[str, Any]) -> None:
    with pytest.raises(InvalidArgument, match=next(iter(changes))):
        plan_of(Flat(1.0), **changes)


@pytest.mark.parametrize("make", [PerLayer, NormalizeIfExceeds])
def test_a_split_of_the_bound_may_be_typed_as_its_text(make: type[PerLayer]) -> None:
    rule = make(1.0, bound_split="dimension")  # pyright: ignore[reportArgumentType]
    assert rule == make(1.0, bound_split=BoundSplit.DIMENSION) and rule.bound_split is BoundSplit.DIMENSION
    with pytest.raises(InvalidArgument, match="bound_split"):
        make(1.0, bound_split="fair")  # pyright: ignore[reportArgumentType]


@pytest.mark.parametrize("split", list(BoundSplit))
@pytest.mark.parametrize("sizes", [(1,), (7,), (1, 1), (3, 4, 5)], ids=str)
def test_split_bounds_make_up_the_whole_also_of_one_layer(split: BoundSplit, sizes: tuple[int, ...]) -> None:
    assert math.hypot(*split.bounds(1.7, sizes)) == pytest.approx(1.7)


RULES: list[ClipRule] = [
    Flat(1.0), PerLayer(1.0), Automatic(), Quantile(), PerLayerQuantile(), Global(1.0, 2.0), GlobalAdapt(1.0),
    GroupAdaptive(1.0, num_labels=2), NormalizeIfExceeds(1.0),
]  # fmt: skip


@pytest.mark.parametrize("rule", RULES, ids=lambda rule: type(rule).__name__)
def test_groups_are_numbered_from_zero(rule: ClipRule) -> None:
    groups = rule.groups(list(SHAPES))
    assert groups in ([0, 0, 0], [0, 0, 1])


@pytest.mark.parametrize("make", [PerLayer, PerLayerQuantile])
def test_a_split_of_the_noise_may_be_typed_as_its_text(make: type[PerLayer]) -> None:
    rule = make(1.0, noise_split="global")  # pyright: ignore[reportArgumentType]
    assert rule == make(1.0, noise_split=NoiseSplit.GLOBAL) and rule.noise_split is NoiseSplit.GLOBAL
    plan = plan_of(rule)
    assert rule.spread(rule.init(plan.setting(parameters()))) == [1.0, 1.0]
    with pytest.raises(InvalidArgument, match="noise_split"):
        make(1.0, noise_split="fair")  # pyright: ignore[reportArgumentType]


def test_bounds_of_layers_may_stand_in_a_list() -> None:
    rule = PerLayer([0.5, 2.0])  # pyright: ignore[reportArgumentType]
    assert rule == PerLayer((0.5, 2.0)) and hash(rule) == hash(PerLayer((0.5, 2.0)))


def test_one_group_of_units_is_a_group() -> None:
    with pytest.raises(InvalidArgument, match="num_labels"):
        GroupAdaptive(1.0, num_labels=0)
    assert GroupAdaptive(1.0, num_labels=1).init(Setting((1,), 8.0)) == (2.0,)


@pytest.mark.parametrize(
    ("kind", "members"),
    [("filters", (object(),)), ("metrics", (object(),)), ("filters", object())],
    ids=["0", "1", "2"],
)
def test_what_is_no_filter_or_metric_is_refused(kind: str, members: object) -> None:
    changes: dict[str, Any] = {kind: members}
    with pytest.raises(InvalidArgument, match=kind):
        plan_of(Flat(1.0), **changes)


@pytest.mark.parametrize("relation", [Relation.ADD_REMOVE, Relation.REPLACE_ONE])
def test_the_sensitivity_covers_the_rounding_of_the_largest_batch(relation: Relation) -> None:
    """Higham 2002, section 4.2: a sum of n vectors of norm C with a chain of m additions is off by m·u·n·C."""
    plan = plan_of(Flat(0.7), relation=relation, num_examples=10_000)
    n = Poisson(0.5).largest_batch(20_000)
    for additions in (1, 5, 64):
        excess = plan.sensitivities([0.7], additions)[0] / 0.7 - (2 if relation is Relation.REPLACE_ONE else 1)
        assert excess >= 2 * (ROUNDING_CHAIN + additions) * 2.0**-24 * n
        assert excess <= 2 * (ROUNDING_CHAIN + additions + 16) * 2.0**-24 * n


def test_quantiles_start_at_the_bound_and_stay_numbers_that_can_be_divided_by() -> None:
    for layers in (1, 4):
        rule = PerLayerQuantile(1.5)
        state = rule.init(Setting((3,) * layers, 8.0))
        assert state.quantiles == pytest.approx((1.5 / math.sqrt(layers),) * layers)
        for sign, end in ((1.0, 2.0**-60), (-1.0, 2.0**60)):
            for _ in range(200):
                state = rule.update(state, [torch.full((layers,), sign * 1e6)])
            assert state.quantiles == (end,) * layers


def test_a_group_of_which_nobody_came_counts_as_all_above() -> None:
    rule = GroupAdaptive(1.0, num_labels=2)
    state = rule.update((2.0, 2.0), [torch.tensor([0.0, 0.0, 4.0, 4.0])])  # r = 1 and 1/2, of mean 3/4
    assert state == pytest.approx((1 + 4 / 3, 1 + 2 / 3))


def test_a_count_of_less_than_one_unit_counts() -> None:
    rule = GroupAdaptive(1.0, num_labels=2)
    state = rule.update((2.0, 2.0), [torch.tensor([0.5, 0.0, 4.0, 4.0])])  # noise: half a unit within; r = 0 and 1/2
    assert state == pytest.approx((1.0, 3.0))
    assert rule.questions(Setting((1,), 8.0)) == (Question(size=4, bound=1.0, noise_std=10.0),)


def test_norms_at_a_bound_are_within_it() -> None:
    norms = torch.tensor([[0.9, 1.0, 1.1]], dtype=torch.float64)
    rule = Quantile(1.0)
    assert rule.answers(norms, None, rule.init(Setting((1,), 8.0)))[0].tolist() == [[0.5], [0.5], [-0.5]]
    counts = GroupAdaptive(1.0, num_labels=1).answers(norms, torch.zeros(3, dtype=torch.long), (2.0,))[0]
    assert counts.tolist() == [[1.0, 0.0], [1.0, 0.0], [0.0, 1.0]]


def test_a_rule_asks_with_the_noise_that_it_was_given() -> None:
    setting = Setting((3, 3), 100.0)
    for rule in (Quantile(noise_std=7.0), PerLayerQuantile(noise_std=7.0), GlobalAdapt(1.0, noise_std=7.0)):
        assert [question.noise_std for question in rule.questions(setting)] == [7.0]
    assert Quantile().init(setting).sizes == (3, 3)


def test_a_threshold_moves_by_a_factor_of_e_at_most_and_ends() -> None:
    rule = GlobalAdapt(1.0, threshold=2.0)
    state = rule.init(Setting((1,), 8.0))
    moved = rule.update(state, [torch.tensor([1e9])])
    assert moved.threshold == pytest.approx(2.0 * math.e)
    for _ in range(100):
        moved = rule.update(moved, [torch.tensor([1e9])])
    assert moved.threshold == 2.0**60


def test_a_norm_at_the_threshold_is_not_above_it() -> None:
    rule = GlobalAdapt(1.0, threshold=2.0, tolerance=1.5)
    state = rule.init(Setting((1,), 8.0))
    (above,) = rule.answers(torch.tensor([[2.9, 3.0, 3.1]], dtype=torch.float64), None, state)
    assert above.tolist() == [[0.0], [0.0], [1.0]]


def test_short_gradients_are_made_a_million_times_longer_and_no_more() -> None:
    assert Automatic(1.0, gamma=0.0).factors(torch.tensor([[1e-30]]), None, ()).tolist() == [[2.0**20]]


@pytest.mark.parametrize("kind", ["sampler", "clip", "mechanism"])
def test_a_member_that_lacks_a_part_is_refused_by_name(kind: str) -> None:
    with pytest.raises(InvalidArgument, match=kind):
        members: dict[str, Any] = {"clip": Flat(1.0)} | {kind: object()}
        plan_of(**members)


def test_a_mechanism_must_say_its_multiplier() -> None:
    class Silent:
        init, scale, event, release = Gaussian.init, Gaussian.scale, Gaussian.event, Gaussian.release

    with pytest.raises(InvalidArgument, match="noise_multiplier"):
        plan_of(Flat(1.0), mechanism=Silent())


def test_a_rule_knows_the_sizes_and_the_expected_batch() -> None:
    assert plan_of(PerLayer(1.0)).setting(parameters()) == ((9, 4), 16.0)


@pytest.mark.parametrize("relation", [Relation.ADD_REMOVE, Relation.REPLACE_ONE])
@pytest.mark.parametrize("whole", [False, True])
def test_the_sensitivity_of_a_question_covers_its_rounding(relation: Relation, whole: bool) -> None:
    """A sum of n vectors in float64 is off by n·u·n of their bound, and a row may exceed its bound by 2^-41."""
    plan = plan_of(Flat(1.0), relation=relation, num_examples=10**7)
    n = 2 * 10**7 if whole else Poisson(0.5).largest_batch(2 * 10**7)
    question = Question(size=1, bound=0.7, noise_std=50.0)
    excess = plan.sensitivity_of(question, whole=whole) / 0.7 - (2 if relation is Relation.REPLACE_ONE else 1)
    assert 2 * n * n * 2.0**-53 + 2.0**-41 <= excess <= 2 * (n + 16) ** 2 * 2.0**-53 + 2.0**-39
    small = plan_of(Flat(1.0), relation=relation, num_examples=1).sensitivity_of(question) / 0.7
    n = Poisson(0.5).largest_batch(2)
    assert small - (2 if relation is Relation.REPLACE_ONE else 1) >= 2 * n * n * 2.0**-53 + 2.0**-41


def test_members_may_stand_in_a_list_and_plans_are_equal_all_the_same() -> None:
    metric = ClippedCount(noise_std=50.0)
    assert plan_of(Flat(1.0), metrics=[metric]) == plan_of(Flat(1.0), metrics=(metric,))


def test_rules_without_arguments_have_the_settings_that_are_written_down() -> None:
    quantile, layers = Quantile(), PerLayerQuantile()
    assert (Automatic().max_grad_norm, Automatic().gamma) == (1.0, 0.01)
    assert (quantile.max_grad_norm, layers.max_grad_norm) == (0.1, 1.0)
    for rule in (quantile, layers):
        assert (rule.quantile, rule.learning_rate, rule.noise_std) == (0.5, 0.2, None)
        assert rule.questions(Setting((4,), 100.0))[0].noise_std == 5.0


def test_only_a_rule_that_says_so_needs_labels() -> None:
    assert not any(rule.needs_labels for rule in (Flat(1.0), PerLayer(1.0), PerLayerQuantile()))


# The accountant and its ledger.


def test_what_queries_on_one_batch_amount_to_is_never_rounded_up() -> None:
    """Against exact fractions, on 500 draws: rounding to the nearest would be above in about half of them."""
    generator = np.random.default_rng(3)
    for size in (2, 3, 7) * 167:
        clips, stds = generator.lognormal(size=(2, size)).tolist()
        joint = joint_noise_multiplier(clips, stds)
        whole = sum(((Fraction(clip) / Fraction(std)) ** 2 for clip, std in zip(clips, stds, strict=True)), Fraction(0))
        assert 1 - Fraction(1, 2**47) <= Fraction(joint) ** 2 * whole <= 1
        together = merged([(accounting.Gaussian(noise_multiplier=std), 1) for std in stds])
        whole = sum((1 / Fraction(std) ** 2 for std in stds), Fraction(0))
        assert 1 - Fraction(1, 2**47) <= Fraction(together.noise_multiplier) ** 2 * whole <= 1


def test_releases_on_one_batch_are_one_event_in_whatever_order_they_stand() -> None:
    others: list[accounting.Event] = [
        accounting.Laplace(noise_multiplier=2.0), accounting.Laplace(noise_multiplier=1.0),
        accounting.ApproximateDP(epsilon=0.1, delta=1e-6),
    ]  # fmt: skip
    forms = {
        str(normal_form(accounting.Poisson(sample_rate=0.1, event=accounting.Composed(events=tuple(order)))))
        for order in permutations(others)
    }
    assert len(forms) == 1


@pytest.mark.parametrize("wait", [True, False])
def test_what_was_charged_is_told_by_the_salt_from_what_a_copy_charged(wait: bool, tmp_path: Path) -> None:
    record = record_of()
    first, second = tmp_path / "first.sqlite", tmp_path / "second.sqlite"
    with Ledger.create(first, dataset_name="made up", budget=Budget(epsilon=10.0, delta=1e-5)) as ledger:
        if wait:
            ledger.charge(record, record.event)
    second.write_bytes(first.read_bytes())
    digests = []
    for path in (first, second):
        with Ledger.open(path) as ledger:
            paid = ledger.charge(record, record.event)
            assert (paid.plan_id, paid.step) == (record.plan_id, 2 if wait else 1)
            digests.append(paid.digest)
    assert digests[0] != digests[1]


def test_a_ledger_that_is_read_cannot_be_written_by_its_connection(tmp_path: Path) -> None:
    path = tmp_path / "ledger.sqlite"
    Ledger.create(path, dataset_name="made up", budget=Budget(epsilon=1.0, delta=1e-5)).close()
    chain, _ = Chain.open(path, read_only=True, timeout=1.0)
    with pytest.raises(sqlite3.OperationalError, match="readonly"):
        chain._connection.execute("DELETE FROM entries")
    chain.close()


def test_a_new_ledger_makes_its_folders_and_is_marked_as_one(tmp_path: Path) -> None:
    path = tmp_path / "runs" / "first" / "ledger.sqlite"
    Ledger.create(path, dataset_name="made up", budget=Budget(epsilon=1.0, delta=1e-5)).close()
    assert path.read_bytes()[68:72] == b"dpLg"  # where SQLite keeps the application's mark


def test_releases_beside_a_run_add_to_its_cost() -> None:
    record = record_of()
    alone, whole = epsilon_of(record, 2), epsilon_of(record, 3)
    bound, delta = with_releases_beside(record, 2, [record, record])
    assert bound.upper == pytest.approx(alone.upper + 2 * whole.upper, rel=1e-15)
    assert bound.estimate == pytest.approx(alone.estimate + 2 * whole.estimate, rel=1e-15)
    assert bound.lower == alone.lower and delta == pytest.approx(3e-6)


def test_the_note_is_written_at_its_start_where_there_is_no_pwrite(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delattr(os, "pwrite")
    path = tmp_path / "ledger.sqlite"
    record = record_of()
    with Ledger.create(path, dataset_name="made up", budget=Budget(epsilon=10.0, delta=1e-5)) as ledger:
        for _ in range(3):
            ledger.charge(record, record.event)
        position = ledger.anchor()
    noted = TipNote(path).read()
    assert noted is not None and (noted.sequence, noted.tip.hex()) == position


def record_of(steps: int = 3) -> PlanRecord:
    return PlanRecord(
        event=accounting.Gaussian(noise_multiplier=30.0),
        steps=steps,
        delta=1e-6,
        relation=Relation.ADD_REMOVE,
        unit="example",
        num_examples=10,
        facts={},
    )


@pytest.fixture
def path(tmp_path: Path) -> Path:
    """A new ledger."""
    path = tmp_path / "ledger.sqlite"
    Ledger.create(path, dataset_name="made up", budget=Budget(epsilon=10.0, delta=1e-5)).close()
    return path


def test_a_connection_waits_for_the_disk_and_runs_nothing_of_the_file(path: Path) -> None:
    chain, _ = Chain.open(path, read_only=False, timeout=1.0)
    names = ("synchronous", "fullfsync", "trusted_schema", "query_only")
    found = [chain._connection.execute(f"PRAGMA {name}").fetchone()[0] for name in names]
    chain.close()
    assert found == [3, 1, 0, 0]  # EXTRA, on, off, off


def test_a_ledger_in_another_journal_mode_is_put_back(path: Path) -> None:
    with sqlite3.connect(path) as connection:
        assert connection.execute("PRAGMA journal_mode = WAL").fetchone() == ("wal",)
    connection.close()
    with Ledger.open(path) as ledger:
        assert ledger._chain._connection.execute("PRAGMA journal_mode").fetchone() == ("delete",)


@pytest.mark.parametrize(
    "statement",
    [
        "CREATE TRIGGER lost AFTER INSERT ON entries BEGIN DELETE FROM entries WHERE sequence = new.sequence; END",
        "CREATE VIEW other AS SELECT * FROM entries",
        "CREATE TABLE other (id INTEGER)",
    ],
)
def test_a_ledger_with_more_than_its_two_tables_is_refused(statement: str, path: Path) -> None:
    with sqlite3.connect(path) as connection:
        connection.execute(statement)
    connection.close()
    with pytest.raises(LedgerError, match="tables"):
        Ledger.open(path)


def test_other_threads_charge_the_same_ledger(path: Path) -> None:
    record = record_of()
    with Ledger.open(path) as ledger, ThreadPoolExecutor(1) as pool:
        assert pool.submit(ledger.charge, record, record.event).result().step == 1


def test_a_locked_ledger_is_waited_for_as_long_as_was_asked(path: Path) -> None:
    """SQLite by itself waits for five seconds."""
    other = sqlite3.connect(path, isolation_level=None)
    other.execute("BEGIN EXCLUSIVE")
    began = time.monotonic()
    with pytest.raises(LedgerError, match="locked"):
        Ledger.open(path, timeout=0.1)
    assert time.monotonic() - began < 3
    other.close()


def test_a_refused_charge_keeps_nobody_else_from_charging(path: Path) -> None:
    record, larger = record_of(), record_of(10**7)
    with Ledger.open(path) as ledger, Ledger.open(path, timeout=0.1) as other:
        with pytest.raises(BudgetExceeded):
            ledger.charge(larger, larger.event)
        assert other.charge(record, record.event).step == 1
        assert ledger.charge(record, record.event).step == 2


def test_a_transaction_that_was_left_behind_is_undone(path: Path) -> None:
    record = record_of()
    with Ledger.open(path) as ledger:
        connection = ledger._chain._connection
        connection.execute("BEGIN IMMEDIATE")
        connection.execute("DELETE FROM entries")
        assert ledger.charge(record, record.event).step == 1
        assert [sequence for sequence, _, _ in ledger.entries()] == [0, 1, 2]


def test_what_was_seen_must_be_found_again_when_all_is_read_anew(path: Path) -> None:
    """A longer history in the place of the one that was seen, each of them whole."""
    other, record = path.with_name("other.sqlite"), record_of()
    other.write_bytes(path.read_bytes())
    with Ledger.open(other) as ledger:
        ledger.charge(record, record.event)
        ledger.charge(record, record.event)
    chain, _ = Chain.open(path, read_only=False, timeout=1.0)
    with Ledger.open(path) as ledger:
        ledger.charge(record, record.event)
    chain.read()
    chain.rewind()
    with path.open("r+b") as file:
        file.write(other.read_bytes())
    with pytest.raises(LedgerError, match="another one than before"):
        chain.read()
    chain.close()


def test_what_sqlite_remembers_of_a_file_that_was_written_over_is_not_believed(path: Path) -> None:
    """Two histories of as many commits have the same change counter, by which SQLite tells whether to read anew."""
    other, record = path.with_name("other.sqlite"), record_of()
    with Ledger.open(path) as ledger:
        ledger.charge(record, record.event)
        other.write_bytes(path.read_bytes())
        ledger.charge(record, record.event)
        with Ledger.open(other) as elsewhere:
            elsewhere.charge(record, record.event)
        with path.open("r+b") as file:
            file.write(other.read_bytes())
        with pytest.raises(LedgerError, match="damaged"):
            ledger.charge(record, record.event)


def test_a_note_of_zeros_is_none_and_other_bytes_are_damage(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tip, "_PAUSE", 0.0)
    note = TipNote(path)
    for length in (0, 1, 107, 108):
        note.path.write_bytes(bytes(length))
        assert note.read() is None
    for byte in range(1, 256):
        note.path.write_bytes(bytes([byte]) * 3)
        with pytest.raises(LedgerError, match="damaged"):
            note.read()


def test_everyone_sees_at_once_what_another_charged(path: Path) -> None:
    record, beside = record_of(1), record_of(1)
    with Ledger.open(path) as ledger, Ledger.open(path) as one, Ledger.open(path) as two, Ledger.open(path) as three:
        ledger.charge(record, record.event)
        with pytest.raises(BudgetExceeded, match="planned steps"):
            one.check(record)
        assert len(list(two.entries())) == 3
        three.check_anchor(*ledger.anchor())
        ledger.charge(beside, beside.event)
        assert one.find_plan(beside.plan_id) == (beside, 1)
        assert two.plans() == three.plans() == [(record, 1), (beside, 1)]


@pytest.mark.parametrize("act", ["charge", "check"])
def test_what_was_read_and_not_taken_in_is_read_again(act: str, path: Path) -> None:
    record = record_of(2)
    with Ledger.open(path) as ledger:
        ledger.charge(record, record.event)
        # As an interrupt leaves it that strikes between two lines: the chain has the entry, the ledger has not.
        ledger._charged[record.plan_id] = 0
        ledger._taken -= 1
        if act == "charge":
            assert ledger.charge(record, record.event).step == 2
        else:
            ledger.check(record)
        assert ledger._taken == 3 + (act == "charge")
        assert ledger.plans() == [(record, 1 + (act == "charge"))]


def forged(*entries: dict[str, Any]) -> list[bytes]:
    return [json.dumps(entry).encode() for entry in entries]


def test_a_chain_whose_entries_do_not_follow_from_one_another_is_refused(path: Path) -> None:
    """Each is whole by its hashes, and would make the ledger forget charges or spend more than it may."""
    record = record_of(2)
    plan = {"kind": "plan", **record.model_dump(mode="json")}
    header = {"kind": "header", "dataset_name": "made up", "budget": {"epsilon": 1e9, "delta": 0.5}}

    def charge(step: int, **changes: Any) -> dict[str, Any]:
        return {"kind": "charge", "plan_id": record.plan_id, "salt": "", "step": step} | changes

    for number, entries in enumerate(
        (
            [header],
            [plan, plan],
            [plan, charge(1), plan],
            [charge(1)],
            [plan, charge(2)],
            [plan, charge(1), charge(1)],
            [plan, charge(1), charge(2), charge(3)],
            [plan, charge(1, kind="other")],
            [plan, charge(1), charge(1, kind="plan")],
            [plan | {"kind": "other"}],
        )
    ):
        copy = path.with_name(f"{number}.sqlite")
        copy.write_bytes(path.read_bytes())
        chain, _ = Chain.open(copy, read_only=False, timeout=1.0)
        chain.append(lambda _, entries=entries: forged(*entries))
        chain.close()
        with pytest.raises(LedgerError, match="makes no sense"):
            Ledger.open(copy)
    headless = path.with_name("headless.sqlite")
    Chain.create(headless, forged(plan)[0], timeout=1.0).close()
    with pytest.raises(LedgerError, match="makes no sense"):
        Ledger.open(headless)


def test_a_plan_without_a_finite_epsilon_is_refused_as_one(path: Path) -> None:
    record = record_of()
    fields: dict[str, Any] = dict(record) | {"event": accounting.ApproximateDP(epsilon=0.1, delta=1e-3)}
    endless = PlanRecord(**fields)
    with Ledger.open(path) as ledger, pytest.raises(BudgetExceeded, match="no finite epsilon"):
        ledger.charge(endless, endless.event)


def test_a_ledger_without_a_header_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "ledger.sqlite"
    Ledger.create(path, dataset_name="made up", budget=Budget(epsilon=1.0, delta=1e-5)).close()
    with sqlite3.connect(path) as connection:
        connection.execute("DELETE FROM entries")
        connection.execute("UPDATE head SET sequence = -1, tip = ?", (bytes(32),))
    connection.close()
    with pytest.raises(LedgerError, match="header"):
        Ledger.open(path)


def test_a_plan_costs_what_all_its_steps_cost() -> None:
    """An event that covers too many steps would be charged too seldom."""
    plan = plan_of(Flat(1.0), steps=7)
    step = accounting.Poisson(sample_rate=0.5, event=accounting.Gaussian(noise_multiplier=1.0))
    assert [plan.event_of(steps) for steps in (1, 3, 7)] == [
        accounting.Repeated(event=step, count=steps) for steps in (1, 3, 7)
    ]
    whole = accounting.Repeated(event=step, count=7)
    assert plan.epsilon() == accounting.epsilon(whole, 1e-5, relation=Relation.ADD_REMOVE)
    assert plan.epsilon(3).upper < plan.epsilon(6).upper < plan.epsilon().upper
    cyclic = plan_of(Flat(1.0), steps=7, sampler=CyclicPoisson(0.2, groups=3))
    assert (cyclic.steps_per_event, cyclic.event_of(7)) == (3, accounting.Repeated(event=cyclic.event, count=3))
    assert plan_of(Flat(1.0), steps=2, sampler=CyclicPoisson(0.2, groups=3)).steps_per_event == 2


def test_correlated_noise_over_a_fixed_order_is_one_event_for_the_run() -> None:
    sampler, relation = FixedOrder(8, 32), Relation.ZERO_OUT
    plan = plan_of(Flat(1.0), steps=7, sampler=sampler, relation=relation, mechanism=Correlated(1.0, BSR(2)))
    assert isinstance(plan.event, accounting.MatrixMechanism) and plan.steps_per_event == 7
    assert plan.event_of(1) == plan.event_of(7) == accounting.Repeated(event=plan.event, count=1)
    assert (plan.event.min_separation, plan.event.max_participations) == (4, 2)
    independent = plan_of(Flat(1.0), steps=7, sampler=sampler, relation=relation)
    assert independent.steps_per_event == 4
    assert independent.event_of(7) == accounting.Repeated(event=independent.event, count=2)


def test_correlated_noise_goes_on_from_release_to_release() -> None:
    sampler, relation = FixedOrder(8, 32), Relation.ZERO_OUT
    plan = plan_of(Flat(1.0), steps=7, sampler=sampler, relation=relation, mechanism=Correlated(1.0, BSR(2)))
    state, key = StepState.initial(plan, parameters()), RunKey()
    for step in (1, 2):
        clipped = ClippedAccumulator(plan, state.rule, parameters(), 1).result()
        release(clipped, plan, state, receipt(step), key)
        assert state.mechanism.step == step and len(state.mechanism.rows) == 1
    short = clipped._replace(queries=(clipped.queries[0]._replace(noise_share=2.0),))
    with pytest.raises(InvalidArgument, match="shares"):
        release(short, plan, state, receipt(3), key)
    assert Correlated(1.0).strategy == SquareRoot()
