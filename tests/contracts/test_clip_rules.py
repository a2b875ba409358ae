"""Laws of every clipping rule. A new rule joins by standing in ``CLIP_RULES``."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

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
    SeparableRule,
    Setting,
)
from dpkit.errors import InvalidArgument

CLIP_RULES: list[ClipRule] = [
    Flat(1.0),
    Flat(0.01),
    Flat(37.5),
    PerLayer(1.0),
    PerLayer((0.5, 2.0)),
    PerLayer(0.7, bound_split=BoundSplit.DIMENSION, noise_split=NoiseSplit.GLOBAL),
    Automatic(),
    Automatic(0.3, gamma=0.0),
    Quantile(0.1),
    PerLayerQuantile(1.3),
    Global(0.5, threshold=20.0),
    GlobalAdapt(0.5, threshold=3.0, tolerance=0.7),
    GroupAdaptive(0.4, num_labels=3),
    NormalizeIfExceeds(1.1),
    NormalizeIfExceeds(1.1, bound_split=BoundSplit.DIMENSION),
]
AMPLIFIES = (Automatic, NormalizeIfExceeds)
"""Rules that make short gradients longer."""
NAMES = ["body.weight", "body.bias", "head.weight"]
SIZES = {"body.weight": 12, "body.bias": 4, "head.weight": 20}

any_norm = st.one_of(
    st.floats(min_value=0, allow_nan=False, allow_infinity=True), st.just(float("nan")), st.floats(0, 1e-30)
)


def setting_of(rule: ClipRule, expected_batch: float = 64.0) -> Setting:
    groups = rule.groups(NAMES)
    sizes = [sum(SIZES[n] for n, g in zip(NAMES, groups, strict=True) if g == k) for k in range(max(groups) + 1)]
    return Setting(tuple(sizes), expected_batch)


def norms_of(rule: ClipRule, columns: list[tuple[float, float]]) -> torch.Tensor:
    """(K, B) norms; a rule with one group sees the first of each pair."""
    return torch.tensor(columns, dtype=torch.float64).T[: len(setting_of(rule).sizes)].contiguous()


def labels_of(columns: list[tuple[float, float]]) -> torch.Tensor:
    return torch.arange(len(columns)) % 3


def states_of(rule: ClipRule) -> list[object]:
    """The first state, and two after wild answers."""
    setting = setting_of(rule)
    states, generator = [rule.init(setting)], torch.Generator().manual_seed(3)
    for scale in (10.0, 1e4):
        released = [
            scale * torch.randn(question.size, dtype=torch.float64, generator=generator)
            for question in rule.questions(setting)
        ]
        states.append(rule.update(states[-1], released))
    return states


columns_of_norms = st.lists(st.tuples(any_norm, any_norm), min_size=1, max_size=8)


@pytest.mark.parametrize("rule", CLIP_RULES, ids=str)
@settings(max_examples=150, deadline=None)
@given(columns=columns_of_norms)
def test_clipped_norm_never_exceeds_the_bound(rule: ClipRule, columns: list[tuple[float, float]]) -> None:
    norms = norms_of(rule, columns)
    for state in states_of(rule):
        factors = rule.factors(norms, labels_of(columns), state)
        assert factors.shape == norms.shape
        assert bool((factors >= 0).all()) and bool(factors.isfinite().all()), factors
        assert isinstance(rule, AMPLIFIES) or bool((factors <= 1).all()), factors
        clipped = torch.where(factors > 0, norms, 0.0) * factors
        bounds = torch.tensor(rule.bounds(state), dtype=torch.float64)[:, None]
        assert bool((bounds > 0).all()) and bool(bounds.isfinite().all())
        if len(bounds) == 1:
            clipped = torch.linalg.vector_norm(clipped, dim=0, keepdim=True)
        assert bool((clipped <= bounds * (1 + 1e-14)).all()), (clipped, bounds)


@pytest.mark.parametrize("rule", CLIP_RULES, ids=str)
@settings(max_examples=100, deadline=None)
@given(columns=st.lists(st.tuples(any_norm, any_norm), min_size=2, max_size=6), other=st.tuples(any_norm, any_norm))
def test_what_a_unit_adds_depends_on_that_unit_alone(
    rule: ClipRule, columns: list[tuple[float, float]], other: tuple[float, float]
) -> None:
    state = rule.init(setting_of(rule))
    labels = labels_of(columns)
    changed = norms_of(rule, [other, *columns[1:]])
    factors = rule.factors(norms_of(rule, columns), labels, state)
    assert torch.equal(factors[:, 1:], rule.factors(changed, labels, state)[:, 1:])
    before, after = (rule.answers(norms, labels, state) for norms in (norms_of(rule, columns), changed))
    for one, two in zip(before, after, strict=True):
        assert torch.equal(one[1:], two[1:])


@pytest.mark.parametrize("rule", CLIP_RULES, ids=str)
@settings(max_examples=100, deadline=None)
@given(columns=columns_of_norms)
def test_answers_stay_within_what_the_question_says(rule: ClipRule, columns: list[tuple[float, float]]) -> None:
    questions = rule.questions(setting_of(rule))
    for state in states_of(rule):
        answers = rule.answers(norms_of(rule, columns), labels_of(columns), state)
        for question, answer in zip(questions, answers, strict=True):
            assert answer.shape == (len(columns), question.size)
            lengths = torch.linalg.vector_norm(answer.double(), dim=1)
            assert bool((lengths <= question.bound * (1 + 1e-15)).all()), (lengths, question)


@pytest.mark.parametrize("rule", CLIP_RULES, ids=str)
def test_non_finite_norms_get_factor_zero_and_short_gradients_pass(rule: ClipRule) -> None:
    state = rule.init(setting_of(rule))
    columns = [(bad, bad) for bad in (float("nan"), float("inf"))] + [(0.0, 0.0), (1e-12, 1e-12)]
    factors = rule.factors(norms_of(rule, columns), labels_of(columns), state)
    assert factors[0, :2].tolist() == [0.0, 0.0]
    assert bool((factors[0, 2:] > 0).all())


@pytest.mark.parametrize("rule", [rule for rule in CLIP_RULES if isinstance(rule, SeparableRule)], ids=str)
@settings(max_examples=100, deadline=None)
@given(columns=columns_of_norms)
def test_a_separable_rule_needs_one_group_at_a_time(rule: SeparableRule, columns: list[tuple[float, float]]) -> None:
    norms = norms_of(rule, columns)
    for state in states_of(rule):
        for group, factors in enumerate(rule.factors(norms, None, state)):
            assert torch.equal(factors, rule.group_factor(group, norms[group], state))


@pytest.mark.parametrize("rule", CLIP_RULES, ids=str)
def test_the_noise_has_a_positive_weight_for_every_bound(rule: ClipRule) -> None:
    for state in states_of(rule):
        spread = rule.spread(state)
        assert len(spread) == len(rule.bounds(state))
        assert all(math.isfinite(weight) and weight > 0 for weight in spread)


@pytest.mark.parametrize("bound", [0.0, -1.0, float("nan"), float("inf"), True, "1"])
@pytest.mark.parametrize(
    "make",
    [
        Flat,
        PerLayer,
        Automatic,
        Quantile,
        PerLayerQuantile,
        NormalizeIfExceeds,
        GlobalAdapt,
        lambda bound: Global(bound, 50.0),
        lambda bound: GroupAdaptive(bound, num_labels=2),
        lambda bound: PerLayer((1.0, bound)),
    ],
)
def test_a_clipping_norm_that_bounds_nothing_is_refused(make: type[Flat], bound: float) -> None:
    with pytest.raises(InvalidArgument, match="max_grad_norm"):
        make(bound)
