"""Where the examples are is seen by replacing one, never guessed from shapes; every rule works in every layout."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
from gradients.loop import PROBE_ROWS, assert_like_loop, neighbours, observe, one_by_one, recorded
from torch import Tensor, nn
from torch.nn import functional as F

from dpkit.gradients import Capture, ghost, trainable
from dpkit.gradients.layout import MIXED, Layout, Layouts, Site

pytestmark = pytest.mark.filterwarnings(
    "ignore:There is a performance drop because we have not yet implemented:UserWarning"
)


class By(nn.Module):
    """A parameter and a function of it and the rows that it gets."""

    def __init__(self, use: Callable[[Any, Tensor], Tensor], *shape: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.randn(*shape))
        self.use = use

    def forward(self, x: Tensor) -> Tensor:
        return self.use(self, x)


class Words(nn.Module):
    """Token vectors of numbers made from the rows, under the layer ``lookup``."""

    def __init__(self, lookup: nn.Module) -> None:
        super().__init__()
        self.lookup = lookup

    def forward(self, x: Tensor) -> Tensor:
        return self.lookup((x.abs() * 3).long().clamp(max=8))


LAYERS: dict[str, Callable[[], nn.Module]] = {
    "linear": lambda: nn.Linear(4, 3),
    "linear without bias": lambda: nn.Linear(4, 3, bias=False),
    "bilinear": lambda: By(
        lambda m, x: F.bilinear(x[..., :2].contiguous(), x[..., 2:].contiguous(), m.weight), 3, 2, 2
    ),
    "matrix product": lambda: By(lambda m, x: x @ m.weight, 4, 3),
    "vector product": lambda: By(lambda m, x: (x @ m.weight)[..., None], 4),
    "einsum": lambda: By(lambda m, x: torch.einsum("...i,ij->...j", x, m.weight), 4, 3),
    "layer norm": lambda: nn.LayerNorm(4),
    "rms norm": lambda: nn.RMSNorm(4),
    "scale": lambda: By(lambda m, x: x * m.weight, 4),
    "scalar": lambda: By(lambda m, x: x.square() + m.weight * x, 1),
    "derived scale": lambda: By(lambda m, x: x * m.weight.exp()[1], 2, 4),
    "where": lambda: By(lambda m, x: torch.where(x > 0, x, m.weight), 4),
    "embedding": lambda: Words(nn.Embedding(9, 3, padding_idx=0)),
    "weight norm": lambda: nn.utils.parametrizations.weight_norm(nn.Linear(4, 3)),
    "two uses": lambda: By(lambda m, x: torch.tanh(x @ m.weight) @ m.weight, 4, 4),
}

ROWS_ONLY: dict[str, Callable[[], nn.Module]] = {
    "convolution": lambda: nn.Sequential(nn.Unflatten(1, (2, 2)), nn.Conv1d(2, 3, 2, padding=1)),
    "convolution, two axes": lambda: nn.Sequential(nn.Unflatten(1, (1, 2, 2)), nn.Conv2d(1, 3, 2)),
    "transposed convolution": lambda: nn.Sequential(nn.Unflatten(1, (2, 2)), nn.ConvTranspose1d(2, 3, 2)),
    "group norm": lambda: nn.GroupNorm(2, 4),
    "instance norm": lambda: nn.Sequential(nn.Unflatten(1, (2, 2)), nn.InstanceNorm1d(2, affine=True)),
    "slopes": lambda: nn.PReLU(4),
    "bag": lambda: Words(nn.EmbeddingBag(9, 3)),
    "addmm": lambda: By(lambda m, x: torch.addmm(m.weight[0], x, m.weight), 4, 4),
    "class token": lambda: By(lambda m, x: torch.cat([m.weight.expand(len(x), -1, -1), x[:, None]], 1), 1, 1, 4),
    "recurrent": lambda: nn.Sequential(nn.Unflatten(1, (2, 2)), nn.GRU(2, 3, batch_first=True), First()),
    "attention": lambda: nn.Sequential(nn.Unflatten(1, (2, 2)), SelfAttention()),
}


class First(nn.Module):
    def forward(self, pair: Any) -> Tensor:
        return pair[0]


class SelfAttention(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.inner = nn.MultiheadAttention(2, 1, batch_first=True)

    def forward(self, x: Tensor) -> Tensor:
        return self.inner(x, x, x, need_weights=False)[0]


class Arranged(nn.Module):
    """An encoder without parameters of its own, around a layer that sees (B, T, d) in another arrangement."""

    def __init__(self, layer: nn.Module, arrangement: str) -> None:
        super().__init__()
        self.layer, self.arrangement = layer, arrangement

    def forward(self, x: Tensor) -> Tensor:
        shape = x.shape[:2]
        if self.arrangement == "sequence first":
            return self.layer(x.transpose(0, 1)).transpose(0, 1)
        if self.arrangement == "by example":
            return self.layer(x.flatten(0, 1)).unflatten(0, shape)
        if self.arrangement == "by step":
            return self.layer(x.transpose(0, 1).flatten(0, 1)).unflatten(0, shape[::-1]).transpose(0, 1)
        if self.arrangement == "last":
            return self.layer(x.permute(1, 2, 0)[..., None] * torch.tensor([1.0, -2.0, 0.5, 3.0])).movedim(2, 0)
        return self.layer(x)


def loss_fn(model: nn.Module, x: Tensor) -> Tensor:
    out = model(x).flatten(1)
    return (out * torch.cos(torch.arange(out.shape[1]))).sum(1) + 0.1 * out.square().sum(1)


CASES = [
    *((name, way) for name in LAYERS for way in ("sequence first", "by example", "by step", "last")),
    *((name, way) for name in ROWS_ONLY for way in ("by example", "by step")),
]
LENGTHS = {"another": 3, "of the batch": 6, "twice the batch": 12, "of the probe": PROBE_ROWS}


@pytest.mark.parametrize(("name", "arrangement"), CASES, ids=[f"{name}, {way}" for name, way in CASES])
def test_a_rule_works_in_every_layout_and_length(name: str, arrangement: str) -> None:
    for length in LENGTHS.values():
        torch.manual_seed(5)
        model = Arranged((LAYERS | ROWS_ONLY)[name](), arrangement)
        observe(model, loss_fn, torch.randn(PROBE_ROWS, length, 4))
        x = torch.randn(6, length, 4)
        found, losses = recorded(model, loss_fn, x, 6, attach=length == 3)
        assert_like_loop(found, losses, one_by_one(model, loss_fn, x, 6), tolerance=2e-5)


@pytest.mark.parametrize("arrangement", ["batch first", "sequence first", "by example", "by step"])
def test_what_was_observed_holds_for_every_size_and_length(arrangement: str) -> None:
    model = Arranged(nn.Linear(4, 3), arrangement)
    observe(model, loss_fn, torch.randn(PROBE_ROWS, 5, 4))
    for size, length in ((6, 5), (5, 5), (2, 5), (1, 5), (7, 3), (8, 4), (3, 6)):
        x = torch.randn(size, length, 4)
        found, losses = recorded(model, loss_fn, x, size)
        assert_like_loop(found, losses, one_by_one(model, loss_fn, x, size))


@pytest.mark.parametrize("arrangement", ["batch first", "sequence first", "by example", "by step"])
def test_an_empty_batch_has_a_layout_too(arrangement: str) -> None:
    model = Arranged(nn.Sequential(nn.Linear(4, 3), nn.LayerNorm(3)), arrangement)
    observe(model, loss_fn, torch.randn(PROBE_ROWS, 5, 4))
    found, losses = recorded(model, loss_fn, torch.randn(0, 5, 4), 0)
    assert losses.shape == (0,)
    assert all(norm.shape == (0,) for norm in found.sq_norms().values())
    ones = {name: torch.ones(0) for name in found.sq_norms()}
    assert all(not value.any() for _, value in found.weighted_sum(ones))


def test_without_observation_the_first_axis_holds_the_examples() -> None:
    model = Arranged(nn.Linear(4, 3), "batch first")
    x = torch.randn(6, 6, 4)
    found, losses = recorded(model, loss_fn, x, 6)
    assert_like_loop(found, losses, one_by_one(model, loss_fn, x, 6))


def test_layouts_are_those_of_the_model_and_not_of_a_copy() -> None:
    model = Arranged(nn.Linear(4, 3), "sequence first")
    observe(model, loss_fn, torch.randn(PROBE_ROWS, 5, 4))
    other = Arranged(nn.Linear(4, 3), "batch first")
    x = torch.randn(5, 5, 4)
    for one in (model, other):
        found, losses = recorded(one, loss_fn, x, 5)
        assert_like_loop(found, losses, one_by_one(one, loss_fn, x, 5))


def test_a_loop_may_take_more_steps_than_were_observed() -> None:
    class Loop(nn.Module):
        """One step at a time, with a first axis of one: (1, B, d)."""

        def __init__(self) -> None:
            super().__init__()
            self.layer = nn.Linear(4, 4)

        def forward(self, x: Tensor) -> Tensor:
            state = torch.zeros_like(x[:, 0])[None]
            for step in x.unbind(1):
                state = torch.tanh(self.layer(state) + step)
            return state[0]

    model = Loop()
    observe(model, loss_fn, torch.randn(PROBE_ROWS, 3, 4))
    x = torch.randn(6, 9, 4)
    found, losses = recorded(model, loss_fn, x, 6)
    assert_like_loop(found, losses, one_by_one(model, loss_fn, x, 6))


@pytest.mark.parametrize("minor", [False, True], ids=["by example", "by step"])
@pytest.mark.parametrize("length", [3, PROBE_ROWS, 6])
def test_positions_are_folded_like_the_examples(minor: bool, length: int) -> None:
    class Positions(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.positions, self.layer = nn.Parameter(torch.randn(length, 4)), nn.Linear(4, 3)

        def forward(self, x: Tensor) -> Tensor:
            size = len(x)
            if not minor:
                rows = x.flatten(0, 1) + self.positions.repeat(size, 1)
                return self.layer(torch.tanh(rows)).unflatten(0, (size, length))
            each = self.positions[:, None].expand(-1, size, -1).reshape(-1, 4)
            rows = x.transpose(0, 1).flatten(0, 1) + each
            return self.layer(torch.tanh(rows)).unflatten(0, (length, size)).transpose(0, 1)

    torch.manual_seed(1)
    model, x = Positions(), torch.randn(6, length, 4)
    observe(model, loss_fn, torch.randn(PROBE_ROWS, length, 4))
    found, losses = recorded(model, loss_fn, x, 6)
    assert_like_loop(found, losses, one_by_one(model, loss_fn, x, 6))


def test_a_model_that_is_called_in_two_ways_keeps_both() -> None:
    """Queries are folded by example, documents are not, through the same layer."""

    class Towers(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layer = nn.Linear(4, 3)

        def forward(self, x: Tensor) -> Tensor:
            each = self.layer(x.flatten(0, 1)).unflatten(0, x.shape[:2])
            return each * self.layer(x.mean(1))[:, None]

    model = Towers()
    observe(model, loss_fn, torch.randn(PROBE_ROWS, 3, 4))
    x = torch.randn(6, 3, 4)
    found, losses = recorded(model, loss_fn, x, 6)
    assert_like_loop(found, losses, one_by_one(model, loss_fn, x, 6))


def test_a_row_for_each_example_gets_that_example_s_gradient() -> None:
    """A parameter with as many rows as the batch: each row belongs to the example in its place."""
    model = By(lambda m, x: x * m.weight, 5, 4)
    x = torch.randn(5, 4)
    found, _ = recorded(model, loss_fn, x, 5)
    whole = torch.autograd.grad(loss_fn(model, x).sum(), model.weight)[0]
    torch.testing.assert_close(found.sq_norms()["weight"].float(), whole.square().sum(1), rtol=1e-5, atol=1e-12)
    for b in range(5):
        alone = dict(found.weighted_sum({"weight": torch.eye(5)[b]}))["weight"]
        assert not alone[torch.arange(5) != b].any()
        torch.testing.assert_close(alone[b].float(), whole[b], rtol=1e-5, atol=1e-7)


@pytest.mark.parametrize(
    ("moved", "shape", "expected"),
    [
        (lambda x: x, (4, 3, 2), Layout(0)),
        (lambda x: x.transpose(0, 1), (4, 3, 2), Layout(1)),
        (lambda x: x.transpose(0, 1), (4, 4, 2), Layout(1)),
        (lambda x: x.movedim(0, 2), (4, 4, 4), Layout(2)),
        (lambda x: x.flatten(0, 1), (4, 3, 2), Layout(0, None, "major")),
        (lambda x: x.flatten(0, 1), (4, 4, 2), Layout(0, None, "major")),
        (lambda x: x.transpose(0, 1).flatten(0, 1), (4, 4, 2), Layout(0, None, "minor")),
        (lambda x: x.transpose(0, 1).flatten(0, 1), (4, 8, 2), Layout(0, None, "minor")),
        (lambda x: x.transpose(1, 2).flatten(0, 1).T, (4, 3, 2), Layout(1, None, "major")),
        (lambda x: x.flatten(0, 1).unflatten(0, (3, 4)), (4, 3, 2), MIXED),
        (lambda x: x - x.mean(0), (4, 3, 2), MIXED),
        (lambda x: x.roll(1, 0), (4, 3, 2), MIXED),
        (lambda x: x.sum((0, 1, 2)), (4, 3, 2), None),
        (lambda x: x.sum((0, 1)), (4, 3, 2), MIXED),
        (lambda x: x.detach() * 0, (4, 3, 2), None),
    ],
)
def test_layout_of_what_moved(moved: Callable[[Tensor], Tensor], shape: tuple[int, ...], expected: Any) -> None:
    x = torch.randn(*shape)
    layouts = Layouts()
    runs = [[Site((("f", ("w",)), 0), (moved(one),))] for one in neighbours(x)]
    layouts.learn(runs, (0, 2), PROBE_ROWS)
    assert layouts.of(("f", ("w",)), 0, 0, len(shape)) == expected


@pytest.mark.parametrize("folded", [None, "major", "minor"])
def test_a_layout_splits_a_tensor_into_examples(folded: str | None) -> None:
    x = torch.arange(math.prod((2, 6, 3))).view(2, 6, 3)
    parts = Layout(1, 3, folded).split(x)
    assert parts.shape == ((6, 1, 2, 3) if folded is None else (3, 2, 2, 3))
    for b in range(len(parts)):
        rows = [b] if folded is None else ([2 * b, 2 * b + 1] if folded == "major" else [b, b + 3])
        assert torch.equal(parts[b], torch.stack([x[:, row] for row in rows]))


def test_a_capture_that_watches_holds_the_sites_of_one_forward_pass() -> None:
    model = nn.Sequential(nn.Linear(4, 4), nn.Tanh(), nn.Linear(4, 3))
    capture = Capture(trainable(model))
    capture.watched = []
    with capture:
        model(capture.batch(torch.randn(5, 4)))
    sites: list[Any] = capture.watched
    assert [site.key[1] for site in sites] == [0, 0]
    assert [site.tensors[0].shape for site in sites] == [(5, 4), (5, 4)]
    assert ghost.memory(model).layouts.of(sites[0].key[0], 0, 0, 2) is None
