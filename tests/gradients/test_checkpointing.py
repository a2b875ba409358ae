"""Checkpoints that compute the forward pass again leave the gradients of the model without them, and no memory."""

from __future__ import annotations

import gc
from collections.abc import Callable
from contextlib import nullcontext
from typing import Any

import pytest
import torch
from gradients.loop import PROBE_ROWS, LossFn, assert_like_loop, observe, one_by_one, recorded
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint, checkpoint_sequential

from dpkit import errors
from dpkit.gradients import Capture, PerSample, trainable


class Block(nn.Module):
    def __init__(self, width: int) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(width)
        self.up = nn.Linear(width, 2 * width)
        self.drop = nn.Dropout(0.0)
        self.down = nn.Linear(2 * width, width, bias=False)
        self.scale = nn.Parameter(torch.randn(width))

    def forward(self, x: Tensor) -> Tensor:
        return x + self.scale.exp() * self.down(self.drop(F.gelu(self.up(self.norm(x)))))


class Deep(nn.Module):
    """Token vectors, blocks that may be checkpointed, and a tied head."""

    def __init__(self, run: Callable[..., Any] | None, blocks: int = 2) -> None:
        super().__init__()
        self.table = nn.Embedding(11, 4)
        self.blocks = nn.ModuleList(Block(4) for _ in range(blocks))
        self.run = run

    def forward(self, ids: Tensor) -> Tensor:
        x = self.table(ids)
        for block in self.blocks:
            x = block(x) if self.run is None else self.run(block, x)
        return F.linear(x, self.table.weight)


def again(block: nn.Module, x: Tensor, **options: Any) -> Any:
    return checkpoint(block, x, use_reentrant=False, **options)


def nested(block: nn.Module, x: Tensor, **options: Any) -> Any:
    return checkpoint(lambda x: checkpoint(block, x, use_reentrant=False), x, use_reentrant=False)


def in_pieces(block: nn.Module, x: Tensor, **options: Any) -> Any:
    return checkpoint_sequential([block.norm, block.up, block.down], 2, x, use_reentrant=False)


def tokens_loss(model: nn.Module, ids: Tensor) -> Tensor:
    return F.cross_entropy(model(ids).flatten(0, 1), ids.flatten(), reduction="none").view(ids.shape).mean(1)


def built(run: Callable[..., Any] | None) -> tuple[nn.Module, Tensor]:
    torch.manual_seed(2)
    return Deep(run), torch.randint(0, 11, (6, 5))


def clipped(found: PerSample) -> dict[str, Tensor]:
    norms = found.sq_norms()
    factors = 1 / (1 + torch.stack([norm.double() for norm in norms.values()]).sum(0)).sqrt()
    return {name: value.double() for name, value in found.weighted_sum(dict.fromkeys(norms, factors))}


@pytest.mark.parametrize("attach", [True, False])
@pytest.mark.parametrize("keep_bytes", [None, 0])
@pytest.mark.parametrize(
    "run",
    [again, nested, in_pieces, lambda block, x: again(block, x, preserve_rng_state=False, determinism_check="none")],
)
def test_checkpoints_change_nothing(run: Callable[..., Any], keep_bytes: int | None, attach: bool) -> None:
    model, ids = built(run)
    found, losses = recorded(model, tokens_loss, ids, 6, keep_bytes=keep_bytes, attach=attach)
    assert_like_loop(found, losses, one_by_one(model, tokens_loss, ids, 6))
    if run is not in_pieces:
        plain, _ = recorded(built(None)[0], tokens_loss, ids, 6, keep_bytes=keep_bytes)
        for name, norm in plain.sq_norms().items():
            torch.testing.assert_close(found.sq_norms()[name], norm, rtol=1e-6, atol=0)
        expected = clipped(plain)
        for name, value in clipped(found).items():
            torch.testing.assert_close(value, expected[name], rtol=1e-5, atol=1e-7)


def test_dropout_draws_the_same_mask_again() -> None:
    torch.manual_seed(4)
    x, layer = torch.randn(6, 8), nn.Sequential(nn.Linear(8, 8), nn.Dropout(0.5), nn.Linear(8, 3))
    norms = []
    for run in (lambda model, x: model(x), again):
        torch.manual_seed(9)
        found, _ = recorded(layer, lambda model, x, run=run: run(model, x).square().sum(1), x, 6)
        norms.append(found.sq_norms())
    torch.testing.assert_close(norms[0], norms[1], rtol=1e-6, atol=0)


def test_checkpoints_in_another_layout() -> None:
    """The sites of the second forward pass are those of the first."""

    class Turned(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.blocks = nn.ModuleList(Block(4) for _ in range(2))

        def forward(self, x: Tensor) -> Tensor:
            x = again(self.blocks[0], x.transpose(0, 1)).transpose(0, 1)
            return again(self.blocks[1], x.flatten(0, 1)).unflatten(0, x.shape[:2])

    def loss_fn(model: nn.Module, x: Tensor) -> Tensor:
        return model(x).square().sum((1, 2))

    torch.manual_seed(3)
    model, x = Turned(), torch.randn(6, 6, 4)
    observe(model, loss_fn, torch.randn(PROBE_ROWS, 6, 4))
    found, losses = recorded(model, loss_fn, x, 6)
    assert_like_loop(found, losses, one_by_one(model, loss_fn, x, 6))


def test_a_layer_used_inside_and_outside_of_a_checkpoint() -> None:
    layer = nn.Linear(4, 4)

    def loss_fn(model: nn.Module, x: Tensor) -> Tensor:
        return model(torch.tanh(again(model, torch.tanh(model(x))))).square().sum(1)

    x = torch.randn(6, 4)
    found, losses = recorded(layer, loss_fn, x, 6)
    assert_like_loop(found, losses, one_by_one(layer, loss_fn, x, 6))


def test_a_plain_backward_pass_through_checkpoints_is_refused() -> None:
    model, ids = built(again)
    capture = Capture(trainable(model))
    capture.attach(model)
    losses = tokens_loss(model, ids)
    with pytest.raises(errors.UnsupportedOperation, match=r"checkpointing.*engine\.backward\(losses\)"):
        losses.sum().backward()
    capture.reset()
    assert all(parameter.grad is None for parameter in model.parameters())


def test_reentrant_checkpoints_are_refused() -> None:
    model, ids = built(lambda block, x: checkpoint(block, x, use_reentrant=True))
    capture = Capture(trainable(model))
    capture.attach(model)
    with pytest.raises(errors.UnsupportedOperation, match=r"reentrant.*use_reentrant=False"):
        capture.backward(tokens_loss(model, ids))
    assert all(parameter.grad is None for parameter in model.parameters())


def test_hooks_that_move_saved_tensors_are_not_taken_for_checkpoints() -> None:
    """``save_on_cpu`` packs what autograd saves; a plain backward pass unpacks it."""
    model, ids = built(None)
    capture = Capture(trainable(model))
    capture.attach(model)
    with torch.autograd.graph.save_on_cpu():
        losses = tokens_loss(model, ids)
    losses.sum().backward()
    found = capture.collect(6)
    assert_like_loop(found, losses.detach(), one_by_one(built(None)[0], tokens_loss, ids, 6))


def test_transformers_checkpoint_their_own_way() -> None:
    transformers = pytest.importorskip("transformers", reason="the extra 'hf' is not installed")
    torch.manual_seed(0)
    config = transformers.LlamaConfig(
        vocab_size=11, hidden_size=8, num_hidden_layers=2, num_attention_heads=2, intermediate_size=12, use_cache=False
    )
    model = transformers.LlamaForCausalLM(config).train()

    def loss_fn(model: Any, ids: Tensor) -> Tensor:
        scores = model(ids).logits
        return F.cross_entropy(scores.flatten(0, 1), ids.flatten(), reduction="none").view(ids.shape).mean(1)

    ids = torch.randint(0, 11, (5, 6))
    truth = one_by_one(model, loss_fn, ids, 5)
    enable = getattr(
        model, "activation_checkpointing_enable", model.gradient_checkpointing_enable
    )  # as in v5, or before
    enable({"use_reentrant": False})
    for attach in (True, False):
        found, losses = recorded(model, loss_fn, ids, 5, attach=attach)
        assert_like_loop(found, losses, truth)


def test_what_is_computed_outside_of_checkpoints_and_passed_in() -> None:
    """T5 makes its relative bias once, and hands it to every layer."""
    pytest.importorskip("transformers", reason="the extra 'hf' is not installed")
    from gradients.test_families import SIZE, built, t5

    for attention in ("eager", "sdpa"):
        truth = one_by_one(*built(t5, attention, torch.float64), SIZE)
        model, loss_fn, batch = built(t5, attention)
        run: Any = model
        getattr(run, "activation_checkpointing_enable", run.gradient_checkpointing_enable)({"use_reentrant": False})
        found, losses = recorded(model, loss_fn, batch, SIZE)
        assert_like_loop(found, losses, truth)


class Derives(nn.Module):
    """Weight norm, a table of constants, positions, a class token."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.utils.parametrizations.weight_norm(nn.Linear(4, 4))
        self.token = nn.Parameter(torch.randn(1, 1, 4))
        self.positions = nn.Embedding(6, 4)

    def forward(self, x: Tensor) -> Tensor:
        x = torch.cat([self.token.expand(len(x), -1, -1), x], 1) + self.positions(torch.arange(x.shape[1] + 1))
        return self.layer(x * self.token[0].exp())


class Sequences(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.inner = nn.LSTM(4, 3, batch_first=True)

    def forward(self, x: Tensor) -> Tensor:
        return self.inner(x)[0]


def energy(model: nn.Module, x: Tensor) -> Tensor:
    return model(x).square().flatten(1).sum(1)


LONG: dict[str, tuple[Callable[[], nn.Module], Callable[[], Tensor], LossFn]] = {
    "tokens": (lambda: Deep(None, 1), lambda: torch.randint(0, 11, (2, 3)), tokens_loss),
    "tokens, checkpointed": (lambda: Deep(again, 1), lambda: torch.randint(0, 11, (2, 3)), tokens_loss),
    "derived weights": (Derives, lambda: torch.randn(2, 3, 4), energy),
    "derived weights, checkpointed": (
        Derives,
        lambda: torch.randn(2, 3, 4),
        lambda model, x: energy(lambda x: again(model, x), x),  # pyright: ignore[reportArgumentType]
    ),
    "LSTM": (Sequences, lambda: torch.randn(2, 3, 4), energy),
    "fallback": (
        lambda: nn.Sequential(nn.Linear(4, 4), nn.PReLU(3), nn.RMSNorm(4)),
        lambda: torch.randn(2, 3, 4),
        energy,
    ),
}


STEPS = 200


@pytest.mark.parametrize("case", LONG.values(), ids=LONG.keys())
def test_nothing_grows_over_many_steps_without_the_garbage_collector(
    case: tuple[Callable[[], nn.Module], Callable[[], Tensor], LossFn],
) -> None:
    build, draw, loss_fn = case
    model = build()
    capture = Capture(trainable(model))
    if loss_fn in (tokens_loss, energy):
        capture.attach(model)

    def step() -> None:
        capture.begin(2)
        with nullcontext() if loss_fn in (tokens_loss, energy) else capture:
            losses = loss_fn(model, capture.batch(draw()))
        capture.backward(losses)
        found = capture.collect(2)
        dict(found.weighted_sum({name: norm.clamp(max=1) for name, norm in found.sq_norms().items()}))

    def alive() -> int:
        return sum(issubclass(type(thing), Tensor) for thing in gc.get_objects())

    step()
    gc.collect()
    gc.disable()
    try:
        step()
        before = alive()
        for _ in range(STEPS):
            step()
        after = alive()
        gc.collect()
        assert (after, alive()) == (before, before), "tensors before; after; and after a collection"
    finally:
        gc.enable()
