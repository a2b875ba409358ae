"""Uses that once gave wrong per-sample gradients in silence, against a loop over examples."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from gradients.loop import assert_like_loop, one_by_one
from torch import Tensor, nn
from torch.nn import functional as F
from torch.overrides import _get_current_function_mode_stack

from dpkit import errors
from dpkit.gradients import Capture, ghost, places_of, trainable


class Uses(nn.Module):
    def __init__(self, use: Callable[[Any, Tensor], Tensor]) -> None:
        super().__init__()
        self.w, self.v = nn.Parameter(torch.randn(4, 4)), nn.Parameter(torch.randn(4))
        self.flat = nn.Parameter(torch.randn(20))
        self.register_buffer("buffer", torch.randn(4))
        self.use = use

    def forward(self, x: Tensor) -> Tensor:
        return self.use(self, x)


def energy(model: nn.Module, x: Tensor) -> Tensor:
    return model(x).flatten(1).square().sum(1)


def doubled(m: Any, x: Tensor) -> Tensor:
    w = m.w.clone()
    w.mul_(2)
    return x @ w


def multiplied(m: Any, x: Tensor) -> Tensor:
    w = m.w.clone()
    w *= m.v
    return x @ w


def clamped(m: Any, x: Tensor) -> Tensor:
    w = m.w.clone()
    w.clamp_(-0.5, 0.5)
    return x @ w


def seen_through_a_view(m: Any, x: Tensor) -> Tensor:
    w = m.w.clone()
    row = w[0]
    w.mul_(3)
    return x * row


def detached(m: Any, x: Tensor) -> Tensor:
    return x * m.v + x @ m.w.clone().detach_()


def two_widths(m: Any, x: Tensor) -> Tensor:
    return (x @ m.flat.view(4, 5)) @ m.flat.view(5, 4)


def returned_as_it_was(m: Any, x: Tensor) -> Tensor:
    return x * (m.v * m.buffer.to(x)) + m.v.type_as(x) * torch.arange(4).type_as(x)


def inverted(m: Any, x: Tensor) -> Tensor:
    return torch.where(~(x > 0), m.v, x)


USES = [doubled, multiplied, clamped, seen_through_a_view, detached, two_widths, returned_as_it_was, inverted]


@pytest.mark.parametrize("use", USES, ids=lambda use: use.__name__)
@pytest.mark.parametrize("shape", [(5, 4), (4, 4), (5, 3, 4), (4, 4, 4)], ids=str)
def test_uses_are_those_of_a_loop(use: Callable[[Any, Tensor], Tensor], shape: tuple[int, ...]) -> None:
    torch.manual_seed(0)
    model, x = Uses(use), torch.randn(shape)
    found, losses = ghost.per_sample(model, energy, x, len(x))
    assert_like_loop(found, losses, one_by_one(model, energy, x, len(x)))


def test_a_weight_that_is_overwritten_between_two_uses_is_refused() -> None:
    def use(m: Any, x: Tensor) -> Tensor:
        w = m.w.clone()
        x = x @ w
        w.mul_(2)
        return x @ w

    with pytest.raises((errors.UnsupportedOperation, RuntimeError), match="overwritten|modified by an inplace"):
        ghost.per_sample(Uses(use), energy, torch.randn(5, 4), 5)


def test_a_gradient_taken_inside_the_loss_is_refused() -> None:
    def adversarial(model: nn.Module, x: Tensor) -> Tensor:
        moved = x.clone().requires_grad_()
        (gradient,) = torch.autograd.grad(energy(model, moved).sum(), moved)
        return energy(model, x + 0.1 * gradient.sign())

    with pytest.raises(errors.OutOfOrder, match=r"inside the model or the loss.*copy.deepcopy"):
        ghost.per_sample(nn.Sequential(nn.Linear(4, 4), nn.Tanh(), nn.Linear(4, 2)), adversarial, torch.randn(5, 4), 5)


def test_a_refusal_inside_forward_leaves_no_mode_behind() -> None:
    def use(m: Any, x: Tensor) -> Tensor:
        m.capture.reset()
        raise KeyError("boom")

    model = Uses(use)
    model.capture = Capture(trainable(model))
    model.capture.attach(model)
    with pytest.raises(KeyError):
        model(torch.randn(5, 4))
    assert _get_current_function_mode_stack() == []


def test_units_of_different_sizes_with_rows_of_their_own() -> None:
    """A class token that the model expanded has a row for each row of the batch."""
    torch.manual_seed(0)
    model = Uses(lambda m, x: torch.cat([m.v.repeat(len(x), 1), x], 1))
    x, units = torch.randn(6, 4), torch.tensor([2, 0, 1, 1, 2, 1])
    capture = Capture(trainable(model))
    capture.begin(3, rows=6)
    with capture:
        losses = energy(model, capture.batch(x))
    capture.backward(losses, places=places_of(units, 3))
    norms = capture.collect(3).sq_norms()["v"].sqrt()
    counts = torch.tensor([1.0, 3.0, 2.0], dtype=torch.float64)
    torch.testing.assert_close(norms, counts * 2 * model.v.detach().double().norm(), rtol=1e-5, atol=0)


def test_a_weight_that_meets_steps_and_sequences_has_a_layout_for_each() -> None:
    """As many steps as examples: the layout of a step must not be taken for that of the sequence."""

    class Loop(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layer = nn.Linear(4, 4)

        def forward(self, x: Tensor) -> Tensor:
            x = x.transpose(0, 1)
            pieces = [self.layer(piece[0]) for piece in x.split(8)]
            return (self.layer(x).sum(0) + sum(pieces)).tanh()

    torch.manual_seed(0)
    model = Loop()
    probe = torch.randn(4, 24, 4)
    others = []
    for row in (0, 2):
        other = probe.clone()
        other[row] = torch.randn(24, 4)
        others.append(other)
    ghost.observe(model, energy, [probe, *others], (0, 2), 4)
    x = torch.randn(16, 16, 4)
    found, losses = ghost.per_sample(model, energy, x, 16)
    assert_like_loop(found, losses, one_by_one(model, energy, x, 16))


@pytest.mark.parametrize("layer", [nn.Conv1d(4, 3, 2), nn.ConvTranspose1d(4, 3, 2), nn.Linear(5, 3), nn.LayerNorm(5)])
def test_biases_alone_may_be_trained(layer: nn.Module) -> None:
    layer.weight.requires_grad_(False)
    x = torch.randn(6, 4, 5)
    found, losses = ghost.per_sample(layer, energy, x, 6)
    assert list(found.sq_norms()) == ["bias"]
    assert_like_loop(found, losses, one_by_one(layer, energy, x, 6))


def test_a_number_of_the_whole_batch_is_refused() -> None:
    model = Uses(lambda m, x: x + m.v * F.relu(x).mean())
    with pytest.raises(errors.UnsupportedOperation, match="no batch axis"):
        ghost.per_sample(model, energy, torch.randn(5, 4), 5)
