"""Norms are upper bounds and sums round as promised where float32 cancels: offset, aligned and repeated activations."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode

from dpkit.gradients import arithmetic, factors, forms
from dpkit.gradients.arithmetic import ROUNDING_CHAIN
from dpkit.gradients.factors import Dense, Factor, OneHot, Outer, written
from dpkit.gradients.forms import Form, join
from dpkit.gradients.strategy import Workspace, as_products

UNIT = 2.0**-24
KEEP = {"kept": 1 << 40, "not kept": 0, "Gram": -1}


def exact(found: list[Factor], entries: int) -> Tensor:
    """(B, entries) float64 gradients of the numbers in the factors."""
    return written(found, slice(None), torch.empty(found[0].size, entries, dtype=torch.float64))


def stored(form: Form, found: list[Factor], entries: int) -> Tensor:
    """(B, entries) float64: what the form adds up, without further rounding."""
    if isinstance(form, forms.Kept):
        return form.gradients.double()
    if isinstance(form, forms.Coalesced):
        tables = torch.zeros(form.size, form.entries, form.rows.shape[1], dtype=torch.float64)
        tables[form.units, form.tokens] = form.rows.double()
        return tables.flatten(1)
    if isinstance(form, forms.Recomputed):
        dtype = torch.float64 if found[0].dtype == torch.float64 else torch.float32
        return written(form.factors, slice(None), torch.empty(found[0].size, entries, dtype=dtype)).double()
    return exact(found, entries)


def joined(found: list[Factor], entries: int, keep_bytes: int) -> Form:
    dtype = torch.float64 if found[0].dtype == torch.float64 else torch.float32
    products = as_products(factors.joined(found)) if keep_bytes < 0 else None
    if products is not None:
        return forms.Gram.of(products, torch.device("cpu"))
    form, _ = join(found, torch.empty(entries, dtype=dtype), found[0].size, keep_bytes, Workspace())
    return form


def magnitude(factor: Factor) -> Tensor:
    """(B,) the sum of the lengths of the products that a factor adds up."""
    if isinstance(factor, Dense):
        return factor.gradients.flatten(1).double().norm(dim=1)
    assert isinstance(factor, Outer | OneHot)
    left = factor.u.double().norm(dim=2) if isinstance(factor, Outer) else torch.ones(factor.ids.shape)
    return (left * factor.v.double().norm(dim=2)).sum(1)


def offset_tokens(offset: float) -> list[Factor]:
    """Output gradients that add up to nearly nothing over the tokens, inputs that share an offset."""
    u = torch.randn(6, 33, 20)
    u = u - u.mean(1, keepdim=True)
    return [Outer(u, offset + torch.randn(6, 33, 24))]


def offset_and_tied(offset: float) -> list[Factor]:
    table = OneHot(torch.randint(0, 20, (6, 33)), offset + torch.randn(6, 33, 24), 20)
    return [*offset_tokens(offset), table]


def repeated_tokens(offset: float) -> list[Factor]:
    """Every token twice, with opposite output gradients: G is zero but for rounding."""
    u, v = torch.randn(6, 16, 20), offset + torch.randn(6, 16, 24)
    return [Outer(torch.cat([u, -u], 1), torch.cat([v, v], 1))]


def used_twice(offset: float) -> list[Factor]:
    u, v = torch.randn(6, 1, 20), offset + torch.randn(6, 1, 24)
    return [Outer(u, v), Outer(-u, v * (1 + 2.0**-20))]


def repeated_lookups(offset: float) -> list[Factor]:
    v = offset + torch.randn(6, 16, 24)
    ids = torch.randint(0, 20, (6, 16))
    return [OneHot(torch.cat([ids, ids], 1), torch.cat([v, -v], 1), 20)]


def one_vector(offset: float) -> list[Factor]:
    return [Outer(torch.randn(6, 1, 20), offset + torch.randn(6, 1, 24))]


def mixed(offset: float) -> list[Factor]:
    return [*offset_tokens(offset), Dense(torch.randn(6, 20, 24))]


@pytest.mark.parametrize("keep", KEEP.values(), ids=KEEP.keys())
@pytest.mark.parametrize("offset", [0.0, 300.0, 3000.0])
@pytest.mark.parametrize(
    "build", [offset_tokens, offset_and_tied, repeated_tokens, used_twice, repeated_lookups, one_vector, mixed]
)
def test_no_cancellation_hides_a_norm(build: Callable[[float], list[Factor]], offset: float, keep: int) -> None:
    torch.manual_seed(11)
    found = build(offset)
    form = joined(found, 20 * 24, keep)
    bounds = form.sq_norms().sqrt()
    for b in range(6):
        added = form.weighted_sum(torch.eye(6)[b]).double().norm()
        assert added <= bounds[b] * (1 + (ROUNDING_CHAIN + 8) * UNIT)
    lengths = stored(form, found, 20 * 24).norm(dim=1)
    scale = torch.stack([magnitude(factor) for factor in found]).sum(0)
    assert (bounds >= lengths).all()
    assert (bounds <= lengths * (1 + 1e-5) + 2.0**-16 * scale).all()


@pytest.mark.parametrize("keep", KEEP.values(), ids=KEEP.keys())
@pytest.mark.parametrize("size", [3, 64, 65, 300, 1100])
@pytest.mark.parametrize("kind", ["one vector", "tokens", "lookups", "dense", "tied"])
def test_sums_of_aligned_examples_round_as_promised(kind: str, size: int, keep: int) -> None:
    """Rounding errors of equal examples all point in one direction: the worst case of a chain of additions."""
    torch.manual_seed(5)
    u, v = torch.rand(1, 5, 6).repeat(size, 1, 1) + 0.1, torch.rand(1, 5, 7).repeat(size, 1, 1) + 0.1
    ids = torch.randint(0, 6, (1, 5)).repeat(size, 1)
    found: list[Factor] = {
        "one vector": [Outer(u[:, :1], v[:, :1])],
        "tokens": [Outer(u, v)],
        "lookups": [OneHot(ids, v, 6)],
        "dense": [Dense(u[:, 0, :, None] * v[:, 0, None, :])],
        "tied": [Outer(u, v), OneHot(ids, v, 6)],
    }[kind]
    form = joined(found, 42, keep)
    weights = torch.rand(size, dtype=torch.float64)
    truth = weights @ stored(form, found, 42)
    error = (form.weighted_sum(weights).double().flatten() - truth).norm()
    bound = (ROUNDING_CHAIN + 8) * UNIT * (weights @ form.sq_norms().sqrt())
    assert error <= bound, f"{float(error / bound):.3f} of the promise"


def test_blocks_of_a_few_rows_round_as_promised(monkeypatch: pytest.MonkeyPatch) -> None:
    """Gradients so large that they are written out two examples at a time."""
    monkeypatch.setattr(arithmetic, "_BLOCK_BYTES", {"cpu": 2 * 42 * 4})
    test_sums_of_aligned_examples_round_as_promised("tokens", 300, 1 << 40)
    test_no_cancellation_hides_a_norm(offset_tokens, 3000.0, 1 << 40)
    test_no_cancellation_hides_a_norm(offset_and_tied, 3000.0, 0)
    test_no_cancellation_hides_a_norm(offset_and_tied, 3000.0, -1)


@pytest.mark.parametrize("kind", ["one vector", "written out"])
def test_sums_keep_their_precision_where_float32_products_are_shortened(kind: str) -> None:
    """Whether a processor takes the shortcut differs; that it is closed during the product must not."""
    seen: list[str] = []

    class Spy(TorchFunctionMode):
        def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
            if func is torch.mm:
                seen.append(torch.backends.mkldnn.matmul.fp32_precision)  # pyright: ignore[reportAttributeAccessIssue]
            return func(*args, **(kwargs or {}))

    found: dict[str, Factor] = {
        "one vector": Outer(torch.rand(200, 1, 9), torch.rand(200, 1, 9)),
        "written out": Dense(torch.rand(200, 81)),
    }
    form = joined([found[kind]], 81, 0)
    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision("medium")
    try:
        with Spy():
            form.weighted_sum(torch.rand(200))
        assert torch.get_float32_matmul_precision() == "medium"
    finally:
        torch.set_float32_matmul_precision(before)
    assert set(seen) == {"ieee"}


def test_a_gradient_beyond_float32_has_an_infinite_norm() -> None:
    gradients = forms.PerSampleGradients(
        2, {"w": forms.RankOne(torch.tensor([[1e12], [1.0]]), torch.tensor([[1e12], [2.0]]))}, {"w": torch.Size([1])}
    )
    norms = gradients.sq_norms()["w"]
    assert norms[0] == torch.inf
    assert norms[1] == pytest.approx(4.0, rel=1e-5)
