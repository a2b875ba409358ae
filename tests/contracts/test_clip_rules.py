"""Laws of every clipping rule. A new rule joins by standing in ``CLIP_RULES``."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from dpkit.clipping import ClipRule, Flat
from dpkit.errors import InvalidArgument

CLIP_RULES = [Flat(1.0), Flat(0.01), Flat(37.5)]
NAMES = ["weight", "bias", "head"]

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
