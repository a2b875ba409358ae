"""Norms bound what is summed and sums are exact to their stated error, in low precision and where float32 cancels."""

from __future__ import annotations

import copy
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from engine.test_loop import attach, mlp
from gradients.loop import assert_norms_bound_the_sums, one_by_one, recorded
from torch import Tensor, nn
from torch.nn import functional as F
from torch.overrides import TorchFunctionMode

from dpkit.gradients import ROUNDING_CHAIN, Capture, PerSample, trainable

UNIT = 2.0**-24
BUDGETS = {"as it comes": None, "nothing kept": 0, "all kept": 1 << 40}
over_budgets = pytest.mark.parametrize("keep_bytes", BUDGETS.values(), ids=BUDGETS.keys())


def centred(model: nn.Module, x: Tensor) -> Tensor:
    """Output gradients that add up to nothing over the steps, so that what inputs share cancels."""
    out = model(x).flatten(2) if x.dim() > 3 else model(x).transpose(1, 2)
    out = out - out.mean(2, keepdim=True)
    return (out * torch.sin(torch.arange(out.shape[2]) ** 2.0).to(out)).sum((1, 2)) + 0.1 * out.square().sum((1, 2))


class Tied(nn.Module):
    """Tokens out of rounded inputs, scored by their own table."""

    def __init__(self) -> None:
        super().__init__()
        self.table = nn.Embedding(12, 8)

    def forward(self, x: Tensor) -> Tensor:
        ids = x[..., 0].abs().long() % 12
        return F.linear(x + self.table(ids), self.table.weight)


class Twice(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(8, 8)

    def forward(self, x: Tensor) -> Tensor:
        return self.layer(x) - self.layer(x * (1 + 2.0**-18))


class Derived(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.utils.parametrizations.weight_norm(nn.Linear(8, 8))
        self.scale = nn.Parameter(torch.randn(8))

    def forward(self, x: Tensor) -> Tensor:
        weight: Any = self.layer.weight
        return self.layer(x) * self.scale.exp() @ weight[:, :3]


SEQUENCES: dict[str, tuple[Callable[[], nn.Module], tuple[int, ...]]] = {
    "linear": (lambda: nn.Linear(8, 6), (4, 20, 8)),
    "linear, long": (lambda: nn.Linear(8, 6), (4, 3000, 8)),
    "linear, wide": (lambda: nn.Linear(8, 700, bias=False), (4, 5, 8)),
    "tied": (Tied, (4, 20, 8)),
    "twice": (Twice, (4, 20, 8)),
    "derived": (Derived, (4, 20, 8)),
    "norms": (lambda: nn.Sequential(nn.LayerNorm(8), nn.RMSNorm(8), nn.Linear(8, 3)), (4, 20, 8)),
    "recurrent": (lambda: nn.Sequential(nn.LSTM(8, 4, batch_first=True), First()), (4, 20, 8)),
    "convolution": (lambda: nn.Conv2d(3, 4, 3, padding=1), (4, 3, 6, 6)),
    "convolution, many channels": (lambda: nn.Conv2d(24, 32, 3), (4, 24, 4, 4)),
    "convolution, grouped": (lambda: nn.Conv2d(4, 8, 2, groups=2, stride=2), (4, 4, 6, 6)),
    "fallback": (lambda: nn.PReLU(3), (4, 3, 6, 6)),
}


class First(nn.Module):
    def forward(self, pair: Any) -> Tensor:
        return pair[0]


def made(name: str, offset: float = 0.0) -> tuple[nn.Module, Tensor]:
    torch.manual_seed(3)
    build, shape = SEQUENCES[name]
    return build(), offset + torch.randn(*shape)


@over_budgets
@pytest.mark.parametrize("offset", [0.0, 300.0, 3000.0])
@pytest.mark.parametrize("case", SEQUENCES)
def test_no_cancellation_hides_a_norm(case: str, offset: float, keep_bytes: int | None) -> None:
    model, x = made(case, offset)
    found, _ = recorded(model, centred, x, len(x), keep_bytes=keep_bytes)
    assert_norms_bound_the_sums(found, slack=(ROUNDING_CHAIN + 8) * UNIT)
    # Nor is a norm made up: it exceeds the true one by rounding errors of what cancels.
    truth = one_by_one(copy.deepcopy(model).double(), centred, x.double(), len(x)).gradients
    scale = (x.flatten(1).norm(dim=1) * (1 + x.abs().max()) * x[0].numel()).double()
    for name, norm in found.sq_norms().items():
        length = truth[name].norm(dim=1)
        assert (norm.sqrt() <= length * (1 + 1e-3) + 1e-4 * scale).all(), name


@over_budgets
@pytest.mark.parametrize("case", SEQUENCES)
def test_aligned_examples_add_up_as_promised(case: str, keep_bytes: int | None) -> None:
    """Equal examples round in one direction: their sum is their number times what one adds."""
    model, x = made(case)
    many = 150 if x[0].numel() < 1000 else 12
    x = x[:1].expand(many, *x.shape[1:]).contiguous()
    found, _ = recorded(model, centred, x, many, keep_bytes=keep_bytes)
    norms = found.sq_norms()
    alone = torch.zeros(many, dtype=torch.float64)
    alone[0] = 1
    one = {name: value.double() for name, value in found.weighted_sum(dict.fromkeys(norms, alone))}
    for name, value in found.weighted_sum(dict.fromkeys(norms, torch.ones(many, dtype=torch.float64))):
        # The gradients of equal examples are equal but for the order in which a matrix product adds.
        bound = (2 * ROUNDING_CHAIN + 16) * UNIT * float(norms[name].sqrt().sum())
        assert float((value.double() - many * one[name]).norm()) <= bound + 1e-4 * float(one[name].norm()), name


LOW = ["linear", "tied", "derived", "norms", "recurrent", "convolution", "convolution, grouped", "fallback"]


def close(found: PerSample, truth: dict[str, Tensor], tolerance: float) -> None:
    """Norms and the sum of clipped gradients, up to the precision of the operations."""
    norms = found.sq_norms()
    total = torch.stack([rows.norm(dim=1).square() for rows in truth.values()]).sum(0).sqrt()
    factors = (0.7 * total.median() / total).clamp(max=1)
    for name, value in found.weighted_sum(dict.fromkeys(norms, factors)):
        assert value.dtype == torch.float32
        length = truth[name].norm(dim=1)
        assert ((norms[name].sqrt() - length).abs() <= tolerance * total).all(), name
        error = (value.double().flatten() - factors @ truth[name]).norm()
        assert error <= tolerance * (factors @ total), (name, float(error))


@over_budgets
@pytest.mark.parametrize("name", LOW)
def test_parameters_in_bfloat16(name: str, keep_bytes: int | None) -> None:
    model, x = made(name)
    model, x = model.to(torch.bfloat16), x.to(torch.bfloat16)
    truth = one_by_one(copy.deepcopy(model).double(), centred, x.double(), len(x)).gradients
    found, _ = recorded(model, centred, x, len(x), keep_bytes=keep_bytes)
    close(found, truth, 3e-2)
    assert_norms_bound_the_sums(found, slack=(ROUNDING_CHAIN + 8) * UNIT)


@pytest.mark.parametrize("offset", [300.0, 3000.0])
@pytest.mark.parametrize("name", LOW)
def test_no_cancellation_hides_a_norm_in_bfloat16(name: str, offset: float) -> None:
    for keep_bytes in BUDGETS.values():
        model, x = made(name, offset)
        found, _ = recorded(model.to(torch.bfloat16), centred, x.to(torch.bfloat16), len(x), keep_bytes=keep_bytes)
        assert_norms_bound_the_sums(found, slack=(ROUNDING_CHAIN + 8) * UNIT)


def under_autocast(model: Any, x: Tensor) -> Tensor:
    with torch.autocast("cpu", torch.bfloat16):
        return centred(model, x).float()


@over_budgets
@pytest.mark.parametrize("name", LOW)
def test_autocast_casts_what_it_always_casts(name: str, keep_bytes: int | None) -> None:
    """Against a loop under the same autocast: its weight gradients are rounded to bfloat16, ours are not."""
    model, x = made(name)
    truth = one_by_one(model, under_autocast, x, len(x))
    found, losses = recorded(model, under_autocast, x, len(x), keep_bytes=keep_bytes)
    torch.testing.assert_close(losses, truth.losses, rtol=1e-2, atol=1e-2)
    close(found, truth.gradients, 1e-2)
    assert_norms_bound_the_sums(found, slack=(ROUNDING_CHAIN + 8) * UNIT)


@pytest.mark.parametrize("offset", [0.0, 3000.0])
@pytest.mark.parametrize("name", LOW)
def test_a_backward_pass_inside_the_autocast_block_is_one_outside(name: str, offset: float) -> None:
    for keep_bytes in BUDGETS.values():
        model, x = made(name, offset)
        results = []
        for inside in (False, True):
            capture = Capture(trainable(model))
            capture.begin(len(x), keep_bytes=keep_bytes)
            with capture, torch.autocast("cpu", torch.bfloat16):
                losses = centred(model, capture.batch(x)).float()
            with torch.autocast("cpu", torch.bfloat16, enabled=inside):
                capture.backward(losses)
                found = capture.collect(len(x))
                norms = found.sq_norms()
                weights = dict.fromkeys(norms, torch.linspace(0, 1, len(x)))
                results.append((norms, dict(found.weighted_sum(weights))))
                assert_norms_bound_the_sums(found, slack=(ROUNDING_CHAIN + 8) * UNIT)
        torch.testing.assert_close(results[0], results[1], rtol=0, atol=0)


def test_the_engine_may_be_called_inside_an_autocast_block(tmp_path: Path) -> None:
    released = []
    for number, inside in enumerate((False, True)):
        options: dict[str, Any] = {"target_epsilon": None, "noise_multiplier": 1e-6, "max_grad_norm": 0.1}
        engine, model, _, loader = attach(tmp_path / str(number), mlp(), seed=7, **options)
        x, y = next(iter(loader))
        with torch.autocast("cpu", torch.bfloat16):
            losses = F.cross_entropy(model(x), y, reduction="none").float()
            if inside:
                engine.backward(losses)
        if not inside:
            engine.backward(losses)
        released.append(torch.cat([p.grad.flatten() for p in model.parameters()]))
        assert all(p.grad is not None and p.grad.dtype == torch.float32 for p in model.parameters())
    torch.testing.assert_close(released[0], released[1], rtol=0, atol=0)


class Spy(TorchFunctionMode):
    """The precision in which products of matrices are computed."""

    def __init__(self) -> None:
        super().__init__()
        self.seen: set[str] = set()

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func in (torch.mm, torch.bmm, torch.addmm, torch.Tensor.addmm_, torch.Tensor.addmm, torch.Tensor.baddbmm_):
            self.seen.add(torch.backends.mkldnn.matmul.fp32_precision)  # pyright: ignore[reportAttributeAccessIssue]
        return func(*args, **(kwargs or {}))


@over_budgets
@pytest.mark.parametrize("name", SEQUENCES)
def test_shortened_float32_products_reach_no_sum(name: str, keep_bytes: int | None) -> None:
    """As with TF32 on a graphics card: a choice of the user for the forward and the backward pass, not for ours."""
    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision("medium")
    try:
        model, x = made(name, 300.0)
        found, _ = recorded(model, centred, x, len(x), keep_bytes=keep_bytes)
        assert_norms_bound_the_sums(found, slack=(ROUNDING_CHAIN + 8) * UNIT)
        with Spy() as spy:
            dict(found.weighted_sum(dict.fromkeys(found.sq_norms(), torch.rand(len(x)))))
        assert spy.seen <= {"ieee"}
        assert torch.get_float32_matmul_precision() == "medium"
    finally:
        torch.set_float32_matmul_precision(before)


@over_budgets
def test_one_product_of_a_long_example(keep_bytes: int | None) -> None:
    """16,384 equal steps: a sum in float32 of as many terms would be off by more than is promised."""
    torch.manual_seed(0)
    model = nn.Linear(3, 2)
    x = (1 + torch.rand(2, 1, 3)).expand(2, 16384, 3).contiguous()
    found, _ = recorded(model, lambda model, x: model(x).sum((1, 2)) * 1.1, x, 2, keep_bytes=keep_bytes)
    assert_norms_bound_the_sums(found, slack=(ROUNDING_CHAIN + 8) * UNIT)
    for name, rows in one_by_one(model.double(), lambda model, x: model(x).sum((1, 2)) * 1.1, x.double(), 2)[1].items():
        torch.testing.assert_close(found.sq_norms()[name].sqrt(), rows.norm(dim=1), rtol=1e-4, atol=0)
