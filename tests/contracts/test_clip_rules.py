"""Laws of every clipping rule. A new rule joins by standing in ``CLIP_RULES``."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from dpkit.clipping import ClipRule, Flat, PerLayer, SeparableRule
from dpkit.errors import InvalidArgument

CLIP_RULES = [Flat(1.0), Flat(0.01), Flat(37.5), PerLayer(1.0), PerLayer((0.5, 2.0))]
NAMES = ["body.weight", "body.bias", "head.weight"]

any_norm = st.one_of(
    st.floats(min_value=0, allow_nan=False, allow_infinity=True), st.just(float("nan")), st.floats(0, 1e-30)
)


def norms_of(rule: ClipRule, columns: list[float]) -> torch.Tensor:
    groups = max(rule.groups(NAMES)) + 1
    return torch.tensor([columns] * groups, dtype=torch.float64)


@pytest.mark.parametrize("rule", CLIP_RULES, ids=str)
@settings(max_examples=200, deadline=None)
@given(columns=st.lists(any_norm, min_size=1, max_size=8))
def test_clipped_norm_never_exceeds_the_bound(rule: ClipRule, columns: list[float]) -> None:
    state = rule.init(rule.groups(NAMES))
    norms = norms_of(rule, columns)
    factors = rule.factors(norms, None, state)
    assert factors.shape == norms.shape
    assert bool(((factors >= 0) & (factors <= 1)).all()), factors
    clipped = torch.where(factors > 0, norms, 0.0) * factors
    bounds = torch.tensor(rule.bounds(state), dtype=torch.float64)[:, None]
    assert bool((clipped <= bounds * (1 + 1e-15)).all()), (clipped, bounds)


@pytest.mark.parametrize("rule", CLIP_RULES, ids=str)
@settings(max_examples=100, deadline=None)
@given(columns=st.lists(any_norm, min_size=2, max_size=6), other=any_norm)
def test_a_unit_s_factor_depends_on_that_unit_alone(rule: ClipRule, columns: list[float], other: float) -> None:
    state = rule.init(rule.groups(NAMES))
    before = rule.factors(norms_of(rule, columns), None, state)[:, 1:]
    after = rule.factors(norms_of(rule, [other, *columns[1:]]), None, state)[:, 1:]
    assert torch.equal(before, after)


@pytest.mark.parametrize("rule", CLIP_RULES, ids=str)
def test_non_finite_norms_get_factor_zero_and_small_ones_pass(rule: ClipRule) -> None:
    state = rule.init(rule.groups(NAMES))
    factors = rule.factors(norms_of(rule, [float("nan"), float("inf"), 0.0, 1e-12]), None, state)
    assert factors[0].tolist() == [0.0, 0.0, 1.0, 1.0]


@pytest.mark.parametrize("bound", [0.0, -1.0, float("nan"), float("inf")])
def test_a_clipping_norm_that_bounds_nothing_is_refused(bound: float) -> None:
    with pytest.raises(InvalidArgument, match="max_grad_norm"):
        Flat(bound)


@pytest.mark.parametrize("rule", [rule for rule in CLIP_RULES if isinstance(rule, SeparableRule)], ids=str)
@settings(max_examples=100, deadline=None)
@given(columns=st.lists(any_norm, min_size=1, max_size=6))
def test_a_separable_rule_needs_one_group_at_a_time(rule: SeparableRule, columns: list[float]) -> None:
    state = rule.init(rule.groups(NAMES))
    norms = norms_of(rule, columns) * torch.arange(1, max(rule.groups(NAMES)) + 2, dtype=torch.float64)[:, None]
    for group, factors in enumerate(rule.factors(norms, None, state)):
        assert torch.equal(factors, rule.group_factor(group, norms[group], state))


def test_layers_are_the_modules_that_own_parameters() -> None:
    names = ["scale", "a.weight", "a.bias", "b.0.weight", "a.inner.weight", "b.0.bias"]
    assert PerLayer(1.0).groups(names) == [0, 1, 1, 2, 3, 2]
    assert sum(bound**2 for bound in PerLayer(3.0).bounds(PerLayer(3.0).init([0, 1, 1, 2]))) == pytest.approx(9.0)


def test_bounds_for_another_number_of_layers_are_refused() -> None:
    with pytest.raises(InvalidArgument, match="2 bounds.*3 layers"):
        PerLayer((1.0, 2.0)).init([0, 1, 2])
    with pytest.raises(InvalidArgument, match="max_grad_norm"):
        PerLayer((1.0, -2.0))
