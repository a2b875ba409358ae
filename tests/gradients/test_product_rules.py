"""Products with weights, and tables of embeddings, in all the ways that torch writes them."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from gradients.one_by_one import check_each, energy, observe
from torch import Tensor, nn
from torch.nn import functional as F

from dpkit import errors
from dpkit.gradients import ghost
from dpkit.gradients.arithmetic import linear_product

over_dtypes = pytest.mark.parametrize("dtype", [torch.float64, torch.float32])


class Written(nn.Module):
    """A function of parameters and a batch, behind a linear layer (so that the gradient of the input counts)."""

    def __init__(self, function: Callable[..., Tensor], width: int, *shapes: tuple[int, ...]) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.first = nn.Linear(width, width)
        self.weights = nn.ParameterList([nn.Parameter(torch.randn(*shape)) for shape in shapes])
        self.function = function

    def forward(self, x: Tensor) -> Tensor:
        return self.function(self.first(x), *self.weights)


PRODUCTS: dict[str, tuple[Callable[..., Tensor], tuple[int, ...], tuple[tuple[int, ...], ...]]] = {
    "F.linear": (F.linear, (4, 5), ((3, 5), (3,))),
    "F.linear, positions": (F.linear, (4, 2, 3, 5), ((3, 5), (3,))),
    "F.linear, vector": (F.linear, (4, 2, 5), ((5,),)),
    "x @ W": (lambda x, w: x @ w, (4, 2, 5), ((5, 3),)),
    "torch.mm": (torch.mm, (4, 5), ((5, 3),)),
    "x.mm": (lambda x, w: x.mm(w), (4, 5), ((5, 3),)),
    "x @ w": (lambda x, w: x @ w, (4, 2, 5), ((5,),)),
    "torch.mv": (lambda x, w: torch.mv(x, w)[:, None], (4, 5), ((5,),)),
    "x.mv": (lambda x, w: x.mv(w)[:, None], (4, 5), ((5,),)),
    "W @ x": (lambda x, w: w @ x, (4, 5, 2), ((3, 5),)),
    "W @ x, more axes": (lambda x, w: torch.matmul(w, x), (4, 2, 5, 2), ((3, 5),)),
    "W @ x^T": (lambda x, w: (w @ x.T).T, (4, 5), ((3, 5),)),
    "w @ x": (lambda x, w: w @ x, (4, 5, 3), ((5,),)),
    "x.__rmatmul__": (lambda x, w: x.__rmatmul__(w), (4, 5, 2), ((3, 5),)),
    "matrices for heads": (lambda x, w: x @ w, (4, 2, 6, 5), ((2, 5, 3),)),
    "matrices for heads, left": (lambda x, w: w @ x, (4, 2, 5, 6), ((2, 3, 5),)),
    "matrices and rows": (lambda x, w: (x @ w).movedim(-2, 0), (4, 5), ((2, 5, 3),)),
    "matrices and rows, more axes": (lambda x, w: (x @ w).movedim(-2, 0), (4, 5), ((2, 2, 5, 3),)),
    "torch.bmm": (lambda x, w: torch.bmm(x, w.expand(len(x), -1, -1)), (4, 2, 5), ((1, 5, 3),)),
    "addmm": (lambda x, w, b: torch.addmm(b, x, w), (4, 5), ((5, 3), (3,))),
    "addmm, alpha and beta": (lambda x, w, b: torch.addmm(b, x, w, alpha=0.5, beta=2), (4, 5), ((5, 3), (3,))),
    "addmm, beta zero": (lambda x, w: torch.addmm(x.new_full((3,), torch.nan), x, w, beta=0), (4, 5), ((5, 3),)),
    "addmm, rows": (lambda x, w, b: torch.addmm(b, x, w), (4, 5), ((5, 3), (1, 3))),
    "addmm, residual": (lambda x, w: x.addmm(x, w), (4, 5), ((5, 5),)),
    "overwritten": (lambda x, w, b: F.relu_(F.linear(x, w, b)) + F.relu_(x @ w.T), (4, 2, 5), ((3, 5), (3,))),
    "transposed weight": (lambda x, w: F.linear(x, w.T), (4, 2, 5), ((5, 3),)),
    "product of weights": (lambda x, v, w: x @ (v @ w), (4, 2, 5), ((5, 2), (2, 3))),
    "batch as weight": (lambda x, w: F.linear(w, x).T, (4, 5), ((3, 5),)),
    "bilinear": (lambda x, w, b: F.bilinear(x, x.sin(), w, b), (4, 5), ((3, 5, 5), (3,))),
    "bilinear, positions": (lambda x, w: F.bilinear(x, x[..., :2].contiguous(), w), (4, 3, 5), ((3, 5, 2),)),
}


@over_dtypes
@pytest.mark.parametrize(("function", "shape", "weights"), PRODUCTS.values(), ids=PRODUCTS.keys())
def test_each_way_to_write_a_product(
    dtype: torch.dtype, function: Any, shape: tuple[int, ...], weights: tuple[tuple[int, ...], ...]
) -> None:
    torch.manual_seed(1)
    check_each(Written(function, shape[-1], *weights), (torch.randn(*shape),), dtype)


FOLDED: dict[str, Callable[..., Tensor]] = {
    "rows of an example together": lambda x, w, b: F.linear(x.flatten(0, 1), w, b).unflatten(0, x.shape[:2]),
    "rows of an example apart": lambda x, w, b: (
        F.linear(x.transpose(0, 1).flatten(0, 1), w, b).unflatten(0, (x.shape[1], len(x))).transpose(0, 1)
    ),
    "examples second": lambda x, w, b: F.linear(x.transpose(0, 1), w, b).transpose(0, 1),
    "addmm": lambda x, w, b: torch.addmm(b, x.flatten(0, 1), w.T).unflatten(0, x.shape[:2]),
    "W @ x": lambda x, w, b: (w @ x.permute(1, 2, 0)).permute(2, 0, 1) + b,
    "matrices for heads": lambda x, w, b: (x.transpose(0, 1) @ torch.stack([w, w, w, w]).mT).transpose(0, 1) * b,
    "matrices for heads, rows together": lambda x, w, b: (
        (x.flatten(0, 1) @ torch.stack([w, w.sin()]).mT).movedim(1, 0).unflatten(0, x.shape[:2]) * b
    ),
}


@pytest.mark.parametrize("function", FOLDED.values(), ids=FOLDED.keys())
@pytest.mark.parametrize("size", [3, 4])
def test_where_the_examples_were_observed(function: Any, size: int) -> None:
    torch.manual_seed(1)
    check_each(Written(function, 5, (3, 5), (3,)), (torch.randn(size, 4, 5),), torch.float64, observed=True)


def test_a_product_that_sums_over_the_examples_is_refused() -> None:
    torch.manual_seed(1)
    model = Written(lambda x, w: (w @ x).expand(5, -1, -1), 5, (3, 5))
    x = torch.randn(5, 5)
    observe(model, (x,))
    with pytest.raises(errors.UnsupportedOperation, match="axis that the product sums over"):
        ghost.per_sample(model, energy, (x,), 5)


@pytest.mark.parametrize("shape", [(7, 5), (200, 300), (3, 90, 300), (0, 300)])
def test_product_is_a_product(shape: tuple[int, ...]) -> None:
    torch.manual_seed(0)
    for dtype, tolerance in ((torch.float32, 1e-5), (torch.float64, 1e-12)):
        x, weight = torch.randn(*shape, dtype=dtype), torch.randn(400, shape[-1], dtype=dtype)
        bias, plus = torch.randn(400, dtype=dtype), torch.randn(*shape[:-1], 400, dtype=dtype)
        expected = (x.double() @ weight.double().mT).to(dtype)
        scale = float(shape[-1]) ** 0.5
        for weights in (weight, weight.mT.contiguous().mT):
            torch.testing.assert_close(linear_product(x, weights), expected, rtol=tolerance, atol=tolerance * scale)
            torch.testing.assert_close(
                linear_product(x, weights, bias), expected + bias, rtol=tolerance, atol=tolerance * scale
            )
            torch.testing.assert_close(
                linear_product(x, weights, plus=plus), expected + plus, rtol=tolerance, atol=tolerance * scale
            )


class Bag(nn.Module):
    def __init__(self, *, scaled: bool = False, **options: Any) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.options, self.scaled = options, scaled
        self.table = nn.Parameter(torch.randn(7, 4))
        self.scores = nn.Embedding(7, 1)

    def forward(self, ids: Tensor) -> Tensor:
        scales = self.scores(ids).squeeze(-1) if self.scaled else None
        scores = self.scores(ids).sum(1)
        return scores * F.embedding_bag(ids, self.table, per_sample_weights=scales, **self.options)


@over_dtypes
@pytest.mark.parametrize("padding_idx", [None, 2, -1])
@pytest.mark.parametrize(("mode", "scaled"), [("sum", False), ("sum", True), ("mean", False), ("max", False)], ids=str)
def test_bags(dtype: torch.dtype, padding_idx: int | None, mode: str, scaled: bool) -> None:
    torch.manual_seed(1)
    ids = torch.randint(0, 7, (6, 9))
    ids[0] = 2  # nothing but padding, and one token many times
    ids[1] = 6
    check_each(Bag(mode=mode, scaled=scaled, padding_idx=padding_idx), (ids,), dtype)


def test_the_module_for_bags() -> None:
    torch.manual_seed(0)
    for mode in ("sum", "mean", "max"):
        check_each(nn.EmbeddingBag(7, 4, mode=mode), (torch.randint(0, 7, (5, 3)),), torch.float64)


def test_what_a_bag_cannot_be() -> None:
    ids = torch.randint(0, 7, (6, 3))

    def listed(model: nn.Module, batch: tuple[Tensor]) -> Tensor:
        return model(batch[0].flatten(), torch.arange(0, 18, 3)).square().sum(1)

    with pytest.raises(errors.UnsupportedOperation, match="one row of ids for each example, padded with padding_idx"):
        ghost.per_sample(nn.EmbeddingBag(7, 4), listed, (ids,), 6)
    options: list[dict[str, Any]] = [{"scale_grad_by_freq": True}, {"sparse": True}, {"max_norm": 1.0}]
    for option in options:
        with pytest.raises(errors.UnsupportedOperation, match=next(iter(option))):
            ghost.per_sample(nn.EmbeddingBag(7, 4, **option), energy, (ids,), 6)


class Folded(nn.Module):
    def __init__(self, order: str, *, bag: bool) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.order = order
        self.table = nn.EmbeddingBag(7, 4) if bag else nn.Embedding(7, 4)

    def forward(self, ids: Tensor) -> Tensor:
        size, rows = ids.shape[:2]
        if self.order == "major":
            return self.table(ids.flatten(0, 1)).unflatten(0, (size, rows))
        if self.order == "minor":
            return self.table(ids.transpose(0, 1).flatten(0, 1)).unflatten(0, (rows, size)).transpose(0, 1)
        return self.table(ids.transpose(0, 1)).transpose(0, 1)


@pytest.mark.parametrize(
    ("order", "bag"), [("major", False), ("minor", False), ("second", False), ("major", True), ("minor", True)]
)
def test_where_tokens_were_observed(order: str, bag: bool) -> None:
    torch.manual_seed(2)
    check_each(Folded(order, bag=bag), (torch.randint(0, 7, (3, 4, 5)),), torch.float64, observed=True)
