"""Forms that are never written out: their norms against one-by-one autograd, and sums that are tested before use."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import numpy
import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from dpkit.gradients import forms, ghost, probes
from dpkit.gradients.arithmetic import ROUNDING_CHAIN
from dpkit.gradients.factors import Factor, OneHot, Outer, Products, Vectors, joined, written
from dpkit.gradients.layout import Layout
from dpkit.gradients.rules import RULES
from dpkit.gradients.rules.conv import Patches, Window, transposed_convolution

CPU = torch.device("cpu")
UNIT = 2.0**-24
CONVOLVE: dict[int, Callable[..., Tensor]] = {1: F.conv1d, 2: F.conv2d, 3: F.conv3d}
OPTIONS = {
    "same": {"padding": 1},
    "strided": {"stride": 2, "padding": 1},
    "uneven": {"stride": (3, 1, 2), "padding": (0, 2, 1)},
    "dilated": {"dilation": 2, "padding": 2},
    "dilated by the stride": {"dilation": 2, "stride": 2},
    "grouped": {"groups": 2},
    "wide of the image": {"padding": 4, "stride": 3},
}


def each(value: Any, axes: int) -> tuple[int, ...]:
    return (value,) * axes if isinstance(value, int) else value[:axes]


def patches(
    axes: int, images: int, dtype: torch.dtype, stride: Any = 1, padding: Any = 0, dilation: Any = 1, groups: int = 1
) -> Patches:
    torch.manual_seed(3)
    window = Window(each(stride, axes), each(padding, axes), each(dilation, axes), groups)
    sides, kernel = (7, 6, 5)[:axes], (3, 2, 3)[:axes]
    x = torch.randn(4, images, 4, *sides, dtype=dtype)
    q = torch.randn(4, images, 6, *window.outputs(sides, kernel), dtype=dtype)
    return Patches(x, q, window, torch.Size((6, 4 // groups, *kernel)))


def one_by_one(factor: Patches) -> Tensor:
    """(B, entries) by autograd, in float64."""
    window, rows = factor.window, []
    for x, q in zip(factor.x.double(), factor.q.double(), strict=True):
        weight = torch.zeros(factor.weight_shape, dtype=torch.float64, requires_grad=True)
        convolve = CONVOLVE[len(window.stride)]
        y = convolve(x, weight, None, window.stride, window.padding, window.dilation, window.groups)
        rows.append(torch.autograd.grad(y, weight, q)[0].flatten())
    return torch.stack(rows)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=["float32", "float64"])
@pytest.mark.parametrize("images", [1, 3])
@pytest.mark.parametrize("options", OPTIONS.values(), ids=OPTIONS.keys())
@pytest.mark.parametrize("axes", [1, 2, 3])
def test_every_form_of_a_convolution_is_that_of_a_loop(
    axes: int, options: dict[str, Any], images: int, dtype: torch.dtype
) -> None:
    factor = patches(axes, images, dtype, **options)
    truth = one_by_one(factor)
    tolerance = 1e-11 if dtype == torch.float64 else 1e-5
    weights = torch.rand(4, dtype=torch.float64)
    entries = truth.shape[1]
    space = forms.Workspace()
    kept, _ = forms.join([factor, factor], torch.empty(entries, dtype=dtype), 4, math.inf, space)
    torch.testing.assert_close(kept.sq_norms().sqrt(), 2 * truth.norm(dim=1), rtol=tolerance, atol=tolerance)
    for form in (forms.Gram.of(factor, CPU), forms.Recomputed.of([factor], entries, CPU)):
        # The bound is above the norm, by little of the magnitude that the products have.
        torch.testing.assert_close(form.sq_norms().sqrt(), truth.norm(dim=1), rtol=max(tolerance, 1e-7), atol=tolerance)
        total = form.weighted_sum(weights)
        assert total.dtype == dtype
        assert (total.double().flatten() - weights @ truth).norm() <= tolerance * (weights @ truth.norm(dim=1))
        few = form.select(torch.tensor([True, False, True, True]))
        assert (
            few.weighted_sum(weights[[0, 2, 3]]).double().flatten() - weights[[0, 2, 3]] @ truth[[0, 2, 3]]
        ).norm() <= (tolerance * (weights @ truth.norm(dim=1)))
        nobody = form.select(torch.zeros(4, dtype=torch.bool))
        assert nobody.sq_norms().shape == (0,)


@pytest.mark.parametrize("order", ["major", "minor"])
def test_images_of_one_example_belong_together(order: str) -> None:
    """A convolution that is applied to B M images."""
    torch.manual_seed(1)
    x, q = torch.randn(12, 2, 5, 5), torch.randn(12, 3, 3, 3)
    layout = Layout(0, 4, order)
    factor = Patches(layout.split(x), layout.split(q), Window((1, 1), (0, 0), (1, 1), 1), torch.Size((3, 2, 3, 3)))
    places = torch.arange(12).view(4, 3) if order == "major" else torch.arange(12).view(3, 4).T
    whole = Patches(x[:, None], q[:, None], factor.window, factor.weight_shape)
    expected = one_by_one(whole)[places].sum(1)
    out = torch.empty(4, 54)
    factor.write(slice(0, 4), out)
    torch.testing.assert_close(out.double(), expected, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(one_by_one(factor), expected)


TRANSPOSED = {
    "plain": {},
    "strided": {"stride": 2, "padding": 1, "output_padding": 1},
    "grouped": {"groups": 2, "padding": 1},
    "dilated": {"dilation": 3, "stride": 2, "padding": 1},
    "output padding beyond the stride": {"dilation": 3, "stride": 2, "padding": 1, "output_padding": 2},
    "output padding beyond both": {"dilation": 3, "stride": 1, "padding": 0, "output_padding": 2},
}


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=["float32", "float64"])
@pytest.mark.parametrize("axes", [1, 2, 3])
@pytest.mark.parametrize("options", TRANSPOSED.values(), ids=TRANSPOSED.keys())
def test_a_transposed_convolution_is_that_of_a_loop(
    options: dict[str, int], axes: int, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    module = {1: nn.ConvTranspose1d, 2: nn.ConvTranspose2d, 3: nn.ConvTranspose3d}[axes]
    function = {1: F.conv_transpose1d, 2: F.conv_transpose2d, 3: F.conv_transpose3d}[axes]
    monkeypatch.setitem(RULES, function, transposed_convolution(axes))
    torch.manual_seed(2)
    model = nn.Sequential(module(4, 4, 1), nn.Tanh(), module(4, 6, 3, **options)).to(dtype)
    x = torch.randn(3, 4, *(4, 3, 5)[:axes], dtype=dtype)

    def losses(model: nn.Module, x: Tensor) -> Tensor:
        return model(x).flatten(1).square().sum(1)

    found, _ = ghost.per_sample(model, losses, x, 3)
    tolerance = 1e-10 if dtype == torch.float64 else 1e-5
    for b in range(3):
        sums = dict(found.weighted_sum({name: torch.eye(3, dtype=dtype)[b] for name in found.forms}))
        truth = torch.autograd.grad(losses(model, x[b : b + 1]).sum(), list(model.parameters()))
        for gradient, (name, _) in zip(truth, model.named_parameters(), strict=True):
            assert (sums[name] - gradient).norm() <= tolerance * gradient.norm(), name
            assert abs(float(found.sq_norms()[name][b].sqrt() / gradient.norm().double()) - 1) <= tolerance


# ------------------------------------------------------------------------------------------------------------ the test


def vectors(steps: int, p: int, d: int, *, lookups: bool = False) -> Vectors:
    torch.manual_seed(4)
    outer = Outer(torch.randn(8, steps, p), torch.randn(8, steps, d))
    return Vectors.of(outer, OneHot(torch.randint(0, p, (8, 5)), torch.randn(8, 5, d), p) if lookups else None)


PRODUCTS: dict[str, Callable[[], Products]] = {
    "tall": lambda: vectors(12, 40, 9),
    "wide": lambda: vectors(12, 9, 40),
    "tied, tall": lambda: vectors(12, 40, 9, lookups=True),
    "tied, wide": lambda: vectors(12, 9, 40, lookups=True),
    "convolution": lambda: patches(2, 1, torch.float32, padding=1),
    "grouped convolution": lambda: patches(2, 2, torch.float32, groups=2, stride=2),
}
over_products = pytest.mark.parametrize("build", PRODUCTS.values(), ids=PRODUCTS.keys())


def errors_of(shape: torch.Size) -> dict[str, Tensor]:
    one, rank_one = torch.zeros(shape), torch.zeros(shape)
    one.view(-1)[5] = 1
    rank_one[2] = torch.randn(shape[1:])
    return {"one entry": one, "rank one": rank_one, "everywhere": torch.randn(shape), "a scale": torch.ones(shape)}


@over_products
def test_an_honest_sum_passes_and_a_wrong_one_does_not(build: Callable[[], Products]) -> None:
    """A false pass has probability 2^-50; a false alarm, on errors of 1/250 of the promise, none to speak of."""
    products = build()
    form, weights = forms.Gram.of(products, CPU), torch.rand(products.size)
    total = products.weighted_sum(weights)
    promise = float((ROUNDING_CHAIN + 8) * UNIT * (weights.double() @ form.squares.sqrt()))
    assert form._passes(total, weights.double())
    for name, error in errors_of(total.shape).items():
        wrong = products.weighted_sum(weights.double()) + error.double() / error.double().norm() * promise
        assert not form._passes(wrong, weights.double()), name
        nearly = products.weighted_sum(weights.double()) + error.double() / error.double().norm() * promise / 250
        assert form._passes(nearly, weights.double()), name
    total.view(-1)[0] = torch.nan
    assert not form._passes(total, weights.double())


@dataclass(frozen=True)
class Spoilt(Vectors):
    """Whose float32 sums are wrong."""

    def weighted_sum(self, weights: Tensor) -> Tensor:
        total = Vectors.weighted_sum(self, weights)
        return total if weights.dtype == torch.float64 else total * (1 + 2.0**-12)


def test_a_sum_that_fails_is_computed_again() -> None:
    products = vectors(12, 20, 30)
    spoilt = Spoilt(products.u, products.ids, products.v)
    weights = torch.rand(8)
    honest = products.weighted_sum(weights.double())
    torch.testing.assert_close(forms.Gram.of(spoilt, CPU).weighted_sum(weights).double(), honest, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("steps", [2, 16, 64, 256])
def test_ordinary_sums_pass_at_the_first_attempt(steps: int) -> None:
    torch.manual_seed(6)
    for offset in (0.0, 1.0):
        products = Vectors(torch.randn(4, steps, 48), None, offset + torch.randn(4, steps, 64))
        form, weights = forms.Gram.of(products, CPU), torch.rand(4)
        assert form._passes(products.weighted_sum(weights), weights.double())


def test_the_tail_bound_holds_where_it_can_be_seen() -> None:
    """2^-50 is out of reach, its formula is not: P(|E A|^2 <= y k |E|^2) <= (y e^(1 - y))^(k/2), for E of rank one."""
    generator = numpy.random.default_rng(0)
    for k in (1, 4, 16):
        squares = (generator.standard_normal((200_000, k)) ** 2).sum(1)
        for y in (0.01, 0.1, 0.5):
            assert (squares <= y * k).mean() <= (y * math.exp(1 - y)) ** (k / 2)
        y = 1 / (probes.tail(k) ** 2 * k)
        assert k / 2 * (math.log2(y) + (1 - y) / math.log(2)) <= -50


def test_probes_leave_the_random_state_of_the_user_alone() -> None:
    torch.manual_seed(0)
    numpy.random.seed(0)
    before, expected = torch.get_rng_state(), numpy.random.random(3)
    numpy.random.seed(0)
    assert not torch.equal(probes.draw(5, 3, CPU), probes.draw(5, 3, CPU))
    assert torch.equal(before, torch.get_rng_state())
    assert (numpy.random.random(3) == expected).all()


# ------------------------------------------------------------------------------------------------------- other promises


@dataclass
class Restless:
    """A factor that is longer each time it is written out."""

    gradients: Tensor
    growth: float = 1.0

    @property
    def size(self) -> int:
        return len(self.gradients)

    @property
    def dtype(self) -> torch.dtype:
        return self.gradients.dtype

    def write(self, rows: slice, out: Tensor) -> None:
        out.copy_(self.gradients[rows] * self.growth)
        self.growth *= 1.5

    def select(self, keep: Tensor) -> Restless:
        return replace(self, gradients=self.gradients[keep])


def test_a_second_writing_never_adds_more_than_the_first_was_measured() -> None:
    factor = Restless(torch.randn(1, 30))
    form = forms.Recomputed.of([factor], 30, CPU)
    added = form.weighted_sum(torch.ones(1)).double().norm()
    assert 0.999 * form.sq_norms().sqrt() <= added <= form.sq_norms().sqrt() * (1 + (ROUNDING_CHAIN + 8) * UNIT)


@pytest.mark.parametrize("keep_bytes", [0, 1 << 40])
def test_many_uses_of_one_parameter_are_one_gradient(keep_bytes: int) -> None:
    torch.manual_seed(8)
    uses: list[Factor] = [
        Outer(torch.randn(3, 1, 5), torch.randn(3, 1, 7)),
        OneHot(torch.randint(0, 5, (3, 4)), torch.randn(3, 4, 7), 5),
        Outer(torch.randn(3, 6, 5), torch.randn(3, 6, 7)),
        OneHot(torch.randint(0, 5, (3, 2)), torch.randn(3, 2, 7), 5),
    ]
    truth = written(uses, slice(None), torch.empty(3, 35, dtype=torch.float64))
    assert len(joined(uses)) == 2
    form, _ = forms.join(uses, torch.empty(5, 7), 3, keep_bytes, forms.Workspace())
    torch.testing.assert_close(form.sq_norms().sqrt(), truth.norm(dim=1), rtol=1e-5, atol=0)
    torch.testing.assert_close(form.weighted_sum(torch.ones(3)).double().flatten(), truth.sum(0), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("size", [1, 30, 130])
def test_small_gradients_together_are_what_they_are_alone(size: int) -> None:
    torch.manual_seed(9)
    alone = {f"p{i}": forms.kept(torch.randn(size, 7 + 60 * (i % 2))) for i in range(5)}
    together = forms.PerSampleGradients(size, dict(alone), {n: f.gradients.shape[1:] for n, f in alone.items()})
    weights = {name: torch.rand(size, dtype=torch.float64) for name in alone}
    norms, sums = together.sq_norms(), dict(together.weighted_sum(weights))
    assert list(norms) == list(alone)
    for name, form in alone.items():
        truth = form.gradients.double()
        assert (norms[name] >= truth.square().sum(1)).all()
        torch.testing.assert_close(norms[name], form.sq_norms(), rtol=1e-12, atol=0)
        torch.testing.assert_close(sums[name].double(), weights[name] @ truth, rtol=1e-5, atol=1e-5)
