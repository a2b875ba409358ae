"""DPAdamBC against its formula in double precision, and as an optimizer among others: schedulers, groups, states."""

from __future__ import annotations

import copy
import itertools
import math
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from dpkit.errors import InvalidArgument, RawGradient
from dpkit.filters import first_order
from dpkit.optim import DPAdamBC
from dpkit.types import Released

SHAPES = ((3, 2), (4,), ())
NOISE_STD = 0.3


def parameters(dtype: torch.dtype = torch.float64) -> list[nn.Parameter]:
    generator = torch.Generator().manual_seed(1)
    return [nn.Parameter(torch.randn(shape, generator=generator, dtype=torch.float64).to(dtype)) for shape in SHAPES]


def releases(steps: int, seed: int = 0) -> list[list[tuple[Tensor, Tensor, float]]]:
    """For each step and parameter what was released, what the filters made of it, and the noise, which changes."""
    generator = torch.Generator().manual_seed(seed)
    found = []
    for step in range(steps):
        raw = [0.2 + torch.randn(shape, generator=generator, dtype=torch.float64) for shape in SHAPES]
        stds = [NOISE_STD * (1 + 0.2 * step) / (1 + i) for i in range(len(SHAPES))]
        found.append([(g, 0.5 * g + 0.1, std) for g, std in zip(raw, stds, strict=True)])
    return found


def take_step(optimizer: DPAdamBC, params: Sequence[Tensor], released: list[tuple[Tensor, Tensor, float]]) -> None:
    for parameter, (raw, filtered, std) in zip(params, released, strict=True):
        parameter.grad = filtered.to(parameter.dtype)
        optimizer.observe_release(parameter, raw.to(torch.promote_types(parameter.dtype, torch.float32)), std)
    optimizer.step()


def by_the_formula(start: np.ndarray, steps: list[tuple[np.ndarray, np.ndarray, float, dict[str, Any]]]) -> np.ndarray:
    """Every average anew from the whole history: Σ_i w_i x_i / Σ_i w_i, w_i = (1 - β_i) Π_{j > i} β_j."""
    p = start.astype(np.float64)
    for t in range(len(steps)):
        group = steps[t][3]

        def average(which: int, values: list[Any], t: int = t) -> Any:
            betas = [past[3]["betas"][which] for past in steps[: t + 1]]
            weights = [(1 - betas[i]) * math.prod(betas[i + 1 :]) for i in range(t + 1)]
            return sum(w * v for w, v in zip(weights, values, strict=True)) / sum(weights)

        m = average(0, [past[1] for past in steps[: t + 1]])
        v = average(1, [past[0] ** 2 for past in steps[: t + 1]])
        noise_variance = average(1, [past[2] ** 2 for past in steps[: t + 1]])
        denominator = np.sqrt(np.maximum(v - noise_variance, group["eps_root"]))
        p = p * (1 - group["lr"] * group["weight_decay"])
        p = p - group["lr"] * m / denominator
    return p


Schedule = Callable[[DPAdamBC], torch.optim.lr_scheduler.LRScheduler]
SCHEDULES: dict[str, Schedule] = {
    "constant": lambda o: torch.optim.lr_scheduler.LambdaLR(o, lambda _: 1.0),
    "decay": lambda o: torch.optim.lr_scheduler.StepLR(o, step_size=3, gamma=0.5),
    "one cycle, which moves β1 as well": lambda o: torch.optim.lr_scheduler.OneCycleLR(
        o, max_lr=[0.05] * len(o.param_groups), total_steps=40
    ),
}


@pytest.mark.parametrize("betas", [(0.9, 0.999), (0.0, 0.99), (0.5, 0.0)], ids=str)
@pytest.mark.parametrize("weight_decay", [0.0, 0.2])
@pytest.mark.parametrize("schedule", SCHEDULES)
def test_every_step_is_that_of_the_formula(schedule: str, weight_decay: float, betas: tuple[float, float]) -> None:
    params = parameters()
    starts = [p.detach().numpy().copy() for p in params]
    groups = [{"params": params[:2]}, {"params": params[2:], "lr": 0.02, "eps_root": 1e-3, "weight_decay": 0.05}]
    optimizer = DPAdamBC(groups, lr=0.01, betas=betas, eps_root=1e-2, weight_decay=weight_decay)
    scheduler = SCHEDULES[schedule](optimizer)
    history: list[list[Any]] = [[] for _ in params]
    floored = 0
    for released in releases(25):
        for i, (raw, filtered, std) in enumerate(released):
            group = optimizer.param_groups[0 if i < 2 else 1]
            history[i].append((raw.numpy(), filtered.numpy(), std, {k: v for k, v in group.items() if k != "params"}))
            floored += int((raw.square() < std**2).sum())
        take_step(optimizer, params, released)
        scheduler.step()
    assert floored > 25, "the floor was hardly ever needed"
    for parameter, start, steps in zip(params, starts, history, strict=True):
        assert np.allclose(parameter.detach().numpy(), by_the_formula(start, steps), rtol=1e-10, atol=1e-12)
        assert optimizer.state[parameter]["step"] == 25


def test_without_noise_it_is_adamw_but_for_where_epsilon_stands() -> None:
    ours, theirs = parameters(), parameters()
    mine = DPAdamBC(ours, lr=0.01, eps_root=1e-30, weight_decay=0.1)
    reference = torch.optim.AdamW(theirs, lr=0.01, eps=1e-15, weight_decay=0.1)
    for released in releases(30):
        take_step(mine, ours, [(raw, raw, 0.0) for raw, _, _ in released])
        for parameter, (raw, _, _) in zip(theirs, released, strict=True):
            parameter.grad = raw.clone()
        reference.step()
    assert all(torch.allclose(p, q, rtol=1e-9, atol=1e-12) for p, q in zip(ours, theirs, strict=True))


def test_the_second_moment_estimates_the_squared_gradient_under_the_noise() -> None:
    truth, std, count = 0.5, 1.0, 200_000
    parameter = nn.Parameter(torch.zeros(count))
    optimizer = DPAdamBC([parameter], betas=(0.0, 0.9))
    generator = torch.Generator().manual_seed(4)
    for _ in range(20):
        raw = truth + std * torch.randn(count, generator=generator)
        take_step(optimizer, [parameter], [(raw, raw, std)])
    state = optimizer.state[parameter]
    estimates = (state["exp_avg_sq"] / state["exp_avg_sq_weight"]).double()
    standard_error = float(estimates.std()) / math.sqrt(count)
    # 6 standard errors: false alarm 2e-9. Without the correction the mean would be 1.25, hundreds of them away.
    assert abs(float(estimates.mean()) - truth**2) < 6 * standard_error < 0.02


def test_behind_a_low_pass_filter_it_is_the_published_combination() -> None:
    """m_t / c_t of the filter over the root of the second moment of the unfiltered release."""
    (parameter,) = [nn.Parameter(torch.zeros(5, dtype=torch.float64))]
    optimizer = DPAdamBC([parameter], lr=0.1, betas=(0.0, 0.9), eps_root=1e-4)
    filter_ = first_order()
    state = filter_.init({"w": parameter})
    expected, v, c, before, m = np.zeros(5), 0.0, 0.0, 0.0, 0.0
    for step, released in enumerate(releases(15, seed=7), start=1):
        raw = released[0][0].flatten()[:5]
        filtered, state = filter_.update(Released({"w": raw}), state)
        take_step(optimizer, [parameter], [(raw, filtered.value["w"], NOISE_STD)])
        m = 0.9 * m + 0.15 * raw.numpy() - 0.05 * before
        c = 0.9 * c + 0.15 - (0.05 if step > 1 else 0.0)
        v = 0.9 * v + 0.1 * raw.numpy() ** 2
        before = raw.numpy()
        expected = expected - 0.1 * (m / c) / np.sqrt(np.maximum(v / (1 - 0.9**step) - NOISE_STD**2, 1e-4))
    assert np.allclose(parameter.detach().numpy(), expected, rtol=1e-9)


def test_a_gradient_that_was_clipped_in_place_leaves_the_observed_release_as_it_was() -> None:
    """Without filters p.grad IS the release, and clip_grad_norm_ writes into it before the step."""
    clipped, apart = (DPAdamBC(parameters()[:1], lr=0.1, betas=(0.0, 0.9)) for _ in range(2))
    raw = torch.full(SHAPES[0], 2.0, dtype=torch.float64)
    for optimizer, gradient in ((clipped, raw.clone()), (apart, raw.clone() / 4)):
        (parameter,) = optimizer.param_groups[0]["params"]
        parameter.grad = gradient
        optimizer.observe_release(parameter, gradient if optimizer is clipped else raw, 0.5)
        if optimizer is clipped:
            gradient.div_(4)
        optimizer.step()
    assert torch.equal(clipped.param_groups[0]["params"][0], apart.param_groups[0]["params"][0])


# -- steps that must not be taken, and steps that move nothing --------------------------------------------------------


def snapshot(optimizer: DPAdamBC) -> list[Tensor]:
    tensors = [p for group in optimizer.param_groups for p in group["params"]]
    tensors += [v for state in optimizer.state.values() for v in state.values() if isinstance(v, Tensor)]
    return [tensor.detach().clone() for tensor in tensors]


@pytest.mark.parametrize("named", [True, False])
def test_a_gradient_without_a_release_is_refused_by_name_and_nothing_moves(named: bool) -> None:
    params = parameters()
    names = ["body.weight", "body.bias", "scale"]
    optimizer = DPAdamBC(list(zip(names, params, strict=True)) if named else params)
    take_step(optimizer, params, releases(1)[0])
    before = snapshot(optimizer)
    for parameter in params:
        parameter.grad = torch.ones_like(parameter)
    for parameter in (params[0], params[2]):
        optimizer.observe_release(parameter, torch.ones_like(parameter), 0.1)
    called = "'body.bias'" if named else r"1 of group 0, of shape \(4,\),"
    with pytest.raises(RawGradient, match=f"parameter {called} has a gradient.*dpkit.PrivacyEngine"):
        optimizer.step()
    assert all(map(torch.equal, before, snapshot(optimizer)))


def test_a_release_serves_one_step() -> None:
    params = parameters()
    optimizer = DPAdamBC(params)
    take_step(optimizer, params, releases(1)[0])
    with pytest.raises(RawGradient):
        optimizer.step()


def test_a_parameter_without_a_gradient_is_left_alone() -> None:
    params = parameters()
    optimizer = DPAdamBC(params, weight_decay=0.5)
    (released,) = releases(1)
    before = params[1].detach().clone()
    for parameter, (raw, filtered, std) in zip(params, released, strict=True):
        parameter.grad = None if parameter is params[1] else filtered
        optimizer.observe_release(parameter, raw, std)
    optimizer.step()
    assert torch.equal(before, params[1]) and params[1] not in optimizer.state
    assert not torch.equal(parameters()[0], params[0])
    # A microbatch that completes no batch: no gradients, and step is called all the same.
    optimizer.zero_grad()
    everything = snapshot(optimizer)
    optimizer.step()
    assert all(map(torch.equal, everything, snapshot(optimizer)))


def test_a_parameter_of_another_optimizer_is_none_of_its_business() -> None:
    params = parameters()
    optimizer = DPAdamBC(params[:1])
    take_step(optimizer, params, releases(1)[0])
    assert set(optimizer.state) == {params[0]}
    assert optimizer.state_dict()["state"].keys() == {0}


def test_a_closure_that_releases_is_called_before_the_step() -> None:
    params = parameters()
    plain, with_closure = DPAdamBC(params), DPAdamBC(others := parameters())
    (released,) = releases(1)
    take_step(plain, params, released)

    def closure() -> float:
        assert torch.is_grad_enabled()
        for parameter, (raw, filtered, std) in zip(others, released, strict=True):
            parameter.grad = filtered
            with_closure.observe_release(parameter, raw, std)
        return 1.5

    assert with_closure.step(closure) == 1.5
    assert all(map(torch.equal, params, others))


@pytest.mark.parametrize(
    ("settings", "why"),
    [
        ({"lr": -1.0}, "lr is -1.0"),
        ({"lr": math.nan}, "lr is nan"),
        ({"betas": (1.0, 0.9)}, "betas is"),
        ({"betas": (0.9,)}, "betas is"),
        ({"betas": 0.9}, "betas is"),
        ({"eps_root": 0.0}, "eps_root is 0.0"),
        ({"eps_root": math.inf}, "eps_root is inf"),
        ({"weight_decay": -0.1}, "weight_decay is -0.1"),
    ],
)
def test_settings_outside_their_domain_are_refused_for_all_and_for_a_group(settings: dict[str, Any], why: str) -> None:
    with pytest.raises(InvalidArgument, match=why):
        DPAdamBC(parameters(), **settings)
    with pytest.raises(InvalidArgument, match=why):
        DPAdamBC([{"params": parameters(), **settings}])
    optimizer = DPAdamBC(parameters())
    with pytest.raises(InvalidArgument, match=why):
        optimizer.add_param_group({"params": parameters(), **settings})
    assert len(optimizer.param_groups) == 1


def test_an_observation_that_makes_no_sense_is_refused() -> None:
    params = parameters()
    optimizer = DPAdamBC(params)
    for std in (-1.0, math.nan, math.inf):
        with pytest.raises(InvalidArgument, match="noise_std"):
            optimizer.observe_release(params[0], params[0], std)
    with pytest.raises(InvalidArgument, match=r"shape \(4,\).*\(3, 2\)"):
        optimizer.observe_release(params[0], params[1], 0.1)


# -- its state --------------------------------------------------------------------------------------------------------


def same_values(one: Any, other: Any) -> bool:
    if isinstance(one, dict):
        return one.keys() == other.keys() and all(same_values(one[key], other[key]) for key in one)
    if isinstance(one, Tensor):
        return (one.dtype, one.shape) == (other.dtype, other.shape) and torch.equal(one, other)
    return type(one) is type(other) and one == other


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("betas", [(0.9, 0.999), (0.0, 0.999)], ids=str)
def test_a_state_comes_back_in_every_bit_and_goes_on_identically(
    dtype: torch.dtype, betas: tuple[float, float]
) -> None:
    params = parameters(dtype)
    optimizer = DPAdamBC(params, lr=0.01, betas=betas)
    steps = releases(20)
    for released in steps[:9]:
        take_step(optimizer, params, released)
    stored = copy.deepcopy(optimizer.state_dict())
    others = [nn.Parameter(p.detach().clone()) for p in params]
    resumed = DPAdamBC(others, lr=0.5)
    resumed.load_state_dict(stored)
    assert same_values(resumed.state_dict()["state"], stored["state"])
    for released in steps[9:]:
        take_step(optimizer, params, released)
        take_step(resumed, others, released)
    assert all(map(torch.equal, params, others))
    assert same_values(resumed.state_dict(), optimizer.state_dict())
    assert not same_values(resumed.state_dict()["state"], stored["state"]), "the stored state was written to"


def test_a_copy_of_the_optimizer_goes_on_like_the_original() -> None:
    params = parameters()
    optimizer = DPAdamBC(params)
    first, second = releases(2)
    take_step(optimizer, params, first)
    copied = copy.deepcopy(optimizer)
    others = copied.param_groups[0]["params"]
    take_step(optimizer, params, second)
    take_step(copied, others, second)
    assert all(map(torch.equal, params, others)) and all(p is not q for p, q in zip(params, others, strict=True))


def test_with_beta1_zero_one_tensor_is_kept_for_each_parameter_and_else_two() -> None:
    for betas, kept in (((0.0, 0.999), 1), ((0.9, 0.999), 2)):
        params = parameters(torch.bfloat16)
        optimizer = DPAdamBC(params, betas=betas)
        take_step(optimizer, params, releases(1)[0])
        tensors = [v for v in itertools.chain(*(s.values() for s in optimizer.state.values())) if isinstance(v, Tensor)]
        assert [t.dtype for t in tensors] == [torch.float32] * kept * len(SHAPES)


def test_weight_decay_below_the_spacing_of_half_precision_acts_together_with_the_step() -> None:
    """1 - 1e-3 is 1 in bfloat16: a decay that is applied there apart from the step would never act."""
    parameter = nn.Parameter(torch.full((4,), 256.0, dtype=torch.bfloat16))
    optimizer = DPAdamBC([parameter], lr=1e-3, weight_decay=1.0, eps_root=1.0)
    # Half a spacing of 256 downwards is 0.5: the decay of 0.256 and the step of 0.3 reach it together only.
    optimizer.observe_release(parameter, torch.zeros(4), 0.0)
    parameter.grad = torch.full((4,), 300.0, dtype=torch.bfloat16)
    optimizer.step()
    assert (parameter < 256).all()
