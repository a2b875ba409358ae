"""What each rule does, against its formula; the laws of all rules are in tests/contracts."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

import accounting
from dpkit.clipping import (
    Automatic,
    BoundSplit,
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
from dpkit.errors import InvalidArgument
from dpkit.mechanisms.gaussian import standard_deviations
from dpkit.types import Query


def row(*norms: float) -> Tensor:
    return torch.tensor([norms], dtype=torch.float64)


# -- layers and noise splits ------------------------------------------------------------------------------------------


def test_layers_are_the_modules_that_own_parameters() -> None:
    names = ["scale", "a.weight", "a.bias", "b.0.weight", "a.inner.weight", "b.0.bias"]
    assert PerLayer(1.0).groups(names) == [0, 1, 1, 2, 3, 2]


@pytest.mark.parametrize("rule", [PerLayer, NormalizeIfExceeds])
@pytest.mark.parametrize("split", BoundSplit)
def test_the_bounds_of_layers_make_up_the_whole(rule: type[PerLayer], split: BoundSplit) -> None:
    state = rule(3.0, bound_split=split).init(Setting((10, 1000, 7), 1.0))
    bounds = state.bounds if rule is PerLayer else state
    assert math.hypot(*bounds) == pytest.approx(3.0)
    if split is BoundSplit.DIMENSION:
        assert bounds[1] / bounds[0] == pytest.approx(math.sqrt(1000 / 10))


def test_bounds_for_another_number_of_layers_are_refused() -> None:
    with pytest.raises(InvalidArgument, match="2 bounds.*3 layers"):
        PerLayer((1.0, 2.0)).init(Setting((1, 1, 1), 1.0))
    with pytest.raises(InvalidArgument, match="noise_split is 'by_weight'; it is one of 'dimension_optimal'"):
        PerLayer(1.0, noise_split="by_weight")  # pyright: ignore[reportArgumentType]


def stds_of(split: NoiseSplit, bounds: list[float], sizes: list[int], scale: float) -> list[float]:
    spread = dict(enumerate(split.spread(bounds, sizes)))
    query = Query({}, {}, dict(enumerate(bounds)), 1.0, spread)
    return list(standard_deviations(query, scale).values())


@pytest.mark.parametrize("split", NoiseSplit)
def test_every_noise_split_has_the_plan_s_joint_multiplier(split: NoiseSplit) -> None:
    bounds, sizes = [0.3, 1.7, 0.01, 4.0], [5, 1000, 64, 1]
    stds = stds_of(split, bounds, sizes, 0.83)
    assert accounting.joint_noise_multiplier(bounds, stds) == pytest.approx(0.83, rel=1e-12)


def test_the_dimension_optimal_split_has_the_least_noise_of_all_splits() -> None:
    generator = torch.Generator().manual_seed(2)
    bounds, sizes = [0.3, 1.7, 0.01, 4.0], [5, 1000, 64, 1]

    def total(stds: list[float]) -> float:
        return sum(size * std**2 for size, std in zip(sizes, stds, strict=True))

    least = total(stds_of(NoiseSplit.DIMENSION_OPTIMAL, bounds, sizes, 1.0))
    # The closed form of the Lagrangian: (Σ_k √d_k C_k)².
    assert least == pytest.approx(sum(math.sqrt(d) * c for d, c in zip(sizes, bounds, strict=True)) ** 2)
    for split in NoiseSplit:
        assert least <= total(stds_of(split, bounds, sizes, 1.0)) * (1 + 1e-12)
    for _ in range(200):
        spread = dict(enumerate(torch.rand(4, generator=generator).add(0.01).tolist()))
        stds = standard_deviations(Query({}, {}, dict(enumerate(bounds)), 1.0, spread), 1.0)
        assert least <= total(list(stds.values())) * (1 + 1e-12)


# -- automatic, global, normalising -----------------------------------------------------------------------------------


def test_automatic_clipping_is_the_formula_of_auto_s_and_auto_v() -> None:
    norms = row(0.0, 0.001, 0.5, 3.0, 1e20)
    assert torch.allclose(Automatic(2.0).factors(norms, None, ()), 2.0 / (norms + 0.01), rtol=1e-15)
    auto_v = Automatic(2.0, gamma=0.0).factors(norms, None, ())[0]
    assert torch.allclose(auto_v[1:] * norms[0, 1:], torch.tensor(2.0, dtype=torch.float64))
    assert math.isfinite(float(auto_v[0]))
    for gamma in (-0.1, math.nan, math.inf):
        with pytest.raises(InvalidArgument, match="gamma"):
            Automatic(1.0, gamma=gamma)


def test_global_clipping_scales_all_alike_or_leaves_out() -> None:
    factors = Global(0.5, threshold=10.0).factors(row(0.0, 5.0, 10.0, 10.1), None, ())
    assert factors.tolist() == [[0.05, 0.05, 0.05, 0.0]]


def test_a_strict_threshold_below_the_clipping_norm_never_amplifies() -> None:
    for rule in (Global, GlobalAdapt):
        with pytest.raises(InvalidArgument, match="below max_grad_norm, gradients would be scaled up"):
            rule(2.0, 1.0)
    rule = GlobalAdapt(1.0, threshold=2.0, learning_rate=0.9)
    state = rule.init(Setting((1,), 10.0))
    for _ in range(50):
        state = rule.update(state, [torch.tensor([-1e3])])  # nobody is above, and noise says less than nobody
    assert state.threshold == 1.0
    assert rule.factors(row(0.1, 1.0, 4.0), None, state).tolist() == [[1.0, 1.0, 0.25]]


def test_the_strict_threshold_comes_to_rest_where_the_share_above_is_the_learning_rate() -> None:
    rule = GlobalAdapt(0.5, threshold=200.0, learning_rate=0.1, tolerance=0.7)
    norms = torch.linspace(0.01, 10, 1000, dtype=torch.float64)[None]
    state = rule.init(Setting((1,), 1000.0))
    for _ in range(400):
        state = rule.update(state, [rule.answers(norms, None, state)[0].sum(0)])
    share = float((norms > 0.7 * state.threshold).double().mean())
    assert share == pytest.approx(0.1, abs=0.02)


def test_gradients_that_exceed_are_normalised_layer_by_layer() -> None:
    rule = NormalizeIfExceeds(1.0)
    state = rule.init(Setting((4, 4), 1.0))
    norms = torch.tensor([[0.9, 3.0, 1e-6], [0.1, 4.0, 2.0]], dtype=torch.float64)
    factors = rule.factors(norms, None, state)
    assert factors[:, 0].tolist() == [1.0, 1.0]  # 0.9 lies in one layer alone, above its part of the bound
    assert (factors * norms)[:, 1].tolist() == pytest.approx([math.sqrt(0.5)] * 2)
    assert (factors * norms)[:, 2].tolist() == pytest.approx([math.sqrt(0.5)] * 2)
    assert rule.bounds(state) == [1.0]


# -- learning rules ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("quantile", [0.2, 0.5, 0.9])
@pytest.mark.parametrize("noise_std", [None, 10.0])
def test_with_fixed_norms_the_bound_comes_to_the_quantile(quantile: float, noise_std: float | None) -> None:
    rule = Quantile(0.1, quantile=quantile, noise_std=noise_std)
    setting = Setting((1,), 400.0)
    generator = torch.Generator().manual_seed(5)
    norms = torch.linspace(0, 4, 400, dtype=torch.float64)[None]
    state, [question] = rule.init(setting), rule.questions(setting)
    assert question == (1, 0.5, 20.0 if noise_std is None else noise_std)
    seen = []
    for step in range(600):
        noise = question.noise_std * torch.randn(1, generator=generator, dtype=torch.float64)
        state = rule.update(state, [rule.answers(norms, None, state)[0].sum(0) + noise])
        if step >= 300:
            seen.append(state.quantiles[0])
    # At rest the shares b̄ err by 20/400 a step; over 300 correlated steps the mean of C is within a few percent of 4·γ.
    assert sum(seen) / len(seen) == pytest.approx(4 * quantile, rel=0.06)


def test_the_update_of_the_quantile_is_the_formula() -> None:
    rule = Quantile(0.8, quantile=0.3, learning_rate=0.2)
    state = rule.update(rule.init(Setting((1,), 50.0)), [torch.tensor([-7.5])])
    assert state.quantiles[0] == pytest.approx(0.8 * math.exp(-0.2 * (-7.5 / 50 + 0.5 - 0.3)))


def test_layers_split_the_bound_by_their_quantiles() -> None:
    rule = PerLayerQuantile(2.0)
    state = rule.init(Setting((3, 3, 3), 100.0))
    norms = torch.linspace(0, 2, 100, dtype=torch.float64)[None] * torch.tensor([[1.0], [4.0], [0.1]])
    assert rule.questions(Setting((3, 3, 3), 100.0)) == ((3, math.sqrt(3) / 2, 5.0),)
    for _ in range(300):
        state = rule.update(state, [rule.answers(norms, None, state)[0].sum(0)])
    assert state.quantiles == pytest.approx((1.0, 4.0, 0.1), rel=0.05)
    bounds = rule.bounds(state)
    assert math.hypot(*bounds) == pytest.approx(2.0)
    assert bounds[1] / bounds[2] == pytest.approx(40, rel=0.1)


def test_groups_with_long_gradients_get_a_larger_bound() -> None:
    rule = GroupAdaptive(0.5, num_labels=3)
    setting = Setting((1,), 100.0)
    norms = row(0.1, 0.2, 0.9, 5.0, 0.4, 3.0)
    labels = torch.tensor([0, 0, 1, 1, 2, 2])
    state = rule.init(setting)
    assert rule.bounds(state) == [1.0]
    [counts] = rule.answers(norms, labels, state)
    assert counts.sum(0).tolist() == [2, 0, 0, 2, 1, 1]
    state = rule.update(state, [counts.sum(0)])
    # Ratios 0, 1 and 1/2, of mean 1/2.
    assert state == pytest.approx((0.5, 0.5 * 3, 0.5 * 2))
    assert rule.bounds(state) == [1.5]  # the largest of all groups, whichever are in the batch
    assert rule.factors(row(3.0, 3.0, 3.0), torch.tensor([0, 1, 2]), state).tolist() == [
        pytest.approx([1 / 6, 0.5, 1 / 3])
    ]


def test_counts_of_nobody_and_negative_counts_are_no_accident() -> None:
    rule = GroupAdaptive(1.0, num_labels=2)
    state = rule.init(Setting((1,), 100.0))
    assert rule.update(state, [torch.tensor([-3.0, -2.0, -1.0, -9.0])]) == (2.0, 2.0)  # both ratios are 1
    assert rule.update(state, [torch.tensor([5.0, -2.0, 8.0, -9.0])]) == (2.0, 2.0)  # both are 0


@pytest.mark.parametrize("labels", [None, torch.tensor([0, 3]), torch.tensor([-1, 0]), torch.tensor([0.0, 1.0])])
def test_a_label_outside_of_the_declared_ones_is_refused(labels: Tensor | None) -> None:
    rule = GroupAdaptive(1.0, num_labels=3)
    with pytest.raises(InvalidArgument, match="label"):
        rule.factors(row(1.0, 2.0), labels, rule.init(Setting((1,), 100.0)))


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: Quantile(1.0, quantile=1.0), "quantile is 1.0"),
        (lambda: Quantile(1.0, learning_rate=0.0), "learning_rate"),
        (lambda: PerLayerQuantile(1.0, noise_std=-1.0), "noise_std"),
        (lambda: GlobalAdapt(1.0, learning_rate=1.0), r"lies in \(0, 1\)"),
        (lambda: GroupAdaptive(1.0, num_labels=0), "num_labels is 0"),
        (lambda: GroupAdaptive(1.0, num_labels=2, noise_std=math.inf), "noise_std"),
    ],
)
def test_settings_without_a_meaning_are_refused(make: type[Flat], message: str) -> None:
    with pytest.raises(InvalidArgument, match=message):
        make()  # pyright: ignore[reportCallIssue]
