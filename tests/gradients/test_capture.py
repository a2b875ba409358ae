"""When a capture is active, what it leaves behind, and how the engine learns that a backward pass has ended."""

from __future__ import annotations

import copy
import gc
import io
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.overrides import _get_current_function_mode_stack

from dpkit import errors
from dpkit.gradients import Capture, ghost, trainable, vmap


def make(seed: int = 0) -> nn.Sequential:
    torch.manual_seed(seed)
    return nn.Sequential(nn.Linear(4, 5), nn.Dropout(0.5), nn.Linear(5, 3))


def attached(model: nn.Module) -> Capture:
    capture = Capture(trainable(model))
    capture.attach(model)
    return capture


def losses_of(model: nn.Module, size: int = 6) -> Tensor:
    return model(torch.randn(size, 4)).square().sum(1)


class Fails(nn.Module):
    def __init__(self, error: BaseException) -> None:
        super().__init__()
        self.layer = nn.Linear(4, 4)
        self.error = error

    def forward(self, x: Tensor) -> Tensor:
        self.layer(x)
        raise self.error


@pytest.mark.parametrize("training", [True, False])
def test_capture_is_on_exactly_while_gradients_are(training: bool) -> None:
    model = make().train(training)
    capture = attached(model)
    with torch.no_grad():
        assert not model(torch.randn(2, 4)).requires_grad
    losses = losses_of(model)
    assert not capture.pending
    losses.sum().backward()
    assert capture.pending
    assert capture.collect(6).sq_norms().keys() == dict(model.named_parameters()).keys()
    assert not capture.pending
    assert all(parameter.grad is None for parameter in model.parameters())
    assert _get_current_function_mode_stack() == []


def test_gradients_switched_off_inside_forward_are_not_captured() -> None:
    class Half(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.weight = nn.Parameter(torch.ones(4))

        def forward(self, x: Tensor) -> Tensor:
            with torch.no_grad():
                scale = self.weight.norm() + torch.outer(self.weight, self.weight).sum()
            return x * self.weight + scale

    model = Half()
    capture = attached(model)
    model(torch.ones(3, 4)).sum().backward()
    assert capture.collect(3).sq_norms()["weight"].tolist() == pytest.approx([4.0] * 3, rel=1e-5)


def test_an_exception_in_forward_leaves_no_mode_behind() -> None:
    model = Fails(KeyError("boom"))
    capture = attached(model)
    for _ in range(2):
        with pytest.raises(KeyError):
            model(torch.ones(2, 4))
        assert _get_current_function_mode_stack() == []
    with pytest.raises(KeyError), capture:
        raise KeyError("boom")
    assert _get_current_function_mode_stack() == []


def test_reset_leaves_the_mode_that_a_keyboard_interrupt_left_on() -> None:
    model = Fails(KeyboardInterrupt())
    capture = attached(model)
    with pytest.raises(KeyboardInterrupt):
        model(torch.ones(2, 4))
    capture.reset()
    assert _get_current_function_mode_stack() == []
    model.forward = model.layer.forward  # pyright: ignore[reportAttributeAccessIssue]
    model(torch.ones(2, 4)).sum().backward()
    assert capture.pending
    assert _get_current_function_mode_stack() == []


def test_a_refused_operation_leaves_no_mode_behind() -> None:
    model = nn.Sequential(nn.Linear(4, 4), nn.BatchNorm1d(4))
    capture = attached(model)
    with pytest.raises(errors.UnsupportedOperation):
        model(torch.ones(2, 4))
    assert _get_current_function_mode_stack() == []
    assert not capture.pending


def test_detached_model_is_as_before() -> None:
    model = make()
    capture = attached(model)
    losses_of(model).sum().backward()
    capture.detach()
    assert not capture.pending
    assert not model._forward_hooks
    assert not model._forward_pre_hooks
    losses_of(model).sum().backward()
    assert not capture.pending
    assert all(parameter.grad is not None for parameter in model.parameters())


def test_a_second_attachment_is_refused() -> None:
    model = make()
    capture = attached(model)
    with pytest.raises(errors.InvalidArgument, match="attached to a model already"):
        capture.attach(model)


def through_pickle(model: nn.Module) -> nn.Module:
    buffer = io.BytesIO()
    torch.save(model, buffer)
    buffer.seek(0)
    return torch.load(buffer, weights_only=False)


@pytest.mark.parametrize("copied", [copy.deepcopy, through_pickle], ids=["deepcopy", "pickle"])
def test_copies_are_plain_models(copied: Any) -> None:
    model = make()
    keys = list(model.state_dict())
    capture = attached(model)
    assert list(model.state_dict()) == keys
    twin = copied(model)
    assert list(twin.state_dict()) == keys
    losses_of(twin).sum().backward()
    assert not capture.pending
    assert all(parameter.grad is not None for parameter in twin.parameters())
    assert all(parameter.grad is None for parameter in model.parameters())


def test_a_forgotten_capture_leaves_a_plain_model() -> None:
    model = make()
    attached(model)
    losses_of(model).sum().backward()
    assert all(parameter.grad is not None for parameter in model.parameters())


def test_two_forwards_and_two_backwards_add_up() -> None:
    model, x = make().eval(), torch.randn(6, 4)
    capture = attached(model)
    losses = model(x).square().sum(1)
    losses.sum().backward()
    once = capture.collect(6).sq_norms()["0.weight"]
    model(x).square().sum(1).sum().backward()
    model(x).square().sum(1).sum().backward()
    twice = capture.collect(6).sq_norms()["0.weight"]
    torch.testing.assert_close(twice, 4 * once, rtol=1e-5, atol=0)


def test_a_graph_that_is_walked_again_after_its_batch_is_refused() -> None:
    model, x = make().eval(), torch.randn(6, 4)
    capture = attached(model)
    losses = model(x).square().sum(1)
    losses.sum().backward(retain_graph=True)
    capture.collect(6)
    with pytest.raises(errors.OutOfOrder, match="whose batch is over"):
        losses.sum().backward()
    assert not capture.pending


def test_a_graph_that_is_walked_twice_in_a_batch_is_refused() -> None:
    model, x = make().eval(), torch.randn(6, 4)
    capture = attached(model)
    capture.begin(6)
    losses = model(x).square().sum(1)
    losses.sum().backward(retain_graph=True)
    with pytest.raises(errors.OutOfOrder, match=r"second backward pass reached parameter '2.*' in one batch"):
        losses.sum().backward()


def test_the_end_of_a_backward_pass_is_reported_once() -> None:
    model = make()
    capture = attached(model)
    calls: list[bool] = []
    capture.on_backward_end = lambda: calls.append(capture.pending)
    losses_of(model).sum().backward()
    assert calls == [True]
    capture.backward(losses_of(model))
    torch.autograd.backward(losses := losses_of(model), torch.ones_like(losses), inputs=[capture.anchor])
    assert calls == [True] * 3
    torch.ones(2, requires_grad=True).sum().backward()
    assert calls == [True] * 3
    assert capture.anchor.grad is None


def test_an_exception_at_the_end_of_a_backward_pass_reaches_the_caller() -> None:
    model = make()
    capture = attached(model)

    def refuse() -> None:
        raise errors.OutOfOrder("not now")

    capture.on_backward_end = refuse
    for _ in range(2):
        with pytest.raises(errors.OutOfOrder, match="not now"):
            losses_of(model).sum().backward()
    with pytest.raises(errors.OutOfOrder, match="not now"):
        capture.backward(losses_of(model))


def test_the_end_is_reported_after_a_pass_that_failed_half_way() -> None:
    model = make()
    capture = attached(model)
    calls: list[int] = []
    capture.on_backward_end = lambda: calls.append(1)

    def fail(gradient: Tensor) -> None:
        raise KeyError("boom")

    with capture:
        first = model[0](torch.randn(6, 4))
        first.register_hook(fail)
        losses = model[2](first).sum(1)
    with pytest.raises(KeyError):
        losses.sum().backward()
    capture.reset()
    calls.clear()
    losses_of(model).sum().backward()
    assert calls == [1]


def test_in_place_changes_between_forward_and_backward_are_noticed() -> None:
    model = nn.Linear(4, 3)
    capture = attached(model)
    x = torch.randn(6, 4)
    y = model(x)
    x.mul_(2)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        y.sum().backward()
    deeper = nn.Sequential(nn.Linear(4, 3), nn.Linear(3, 2))
    capture = attached(deeper)
    y = deeper(torch.randn(6, 4))
    with torch.no_grad():
        deeper[1].weight.add_(1)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        y.sum().backward()
    assert capture.anchor.grad is None


def test_memory_does_not_grow_without_the_garbage_collector() -> None:
    model = nn.Sequential(nn.Linear(8, 8), nn.LayerNorm(8), nn.Unflatten(1, (2, 4)), nn.Conv1d(2, 3, 2), nn.Flatten())
    capture = attached(model)
    capture.on_backward_end = lambda: None

    def step() -> None:
        losses = model(torch.randn(5, 8)).square().sum(1)
        capture.backward(losses)
        found = capture.collect(5)
        weights = {name: norm.clamp(max=1) for name, norm in found.sq_norms().items()}
        dict(found.select(torch.arange(5) > 0).weighted_sum({name: w[1:] for name, w in weights.items()}))
        ghost.per_sample(model, lambda m, x: m(x).sum(1), torch.randn(5, 8), 5)

    def alive() -> int:
        return sum(issubclass(type(thing), Tensor) for thing in gc.get_objects())

    step()
    gc.collect()
    gc.disable()
    try:
        step()
        before = alive()
        for _ in range(5):
            step()
        after = alive()
        assert gc.collect() >= 0
    finally:
        gc.enable()
    assert after == before
    assert after == alive(), "a step left tensors in a reference cycle"


def test_graphs_die_with_their_losses() -> None:
    """Activations are freed by reference counting alone, whether or not the backward pass ran."""
    model = make()
    attached(model)
    freed: list[int] = []

    class Watched(torch.autograd.Function):
        @staticmethod
        def forward(ctx: Any, x: Tensor) -> Tensor:
            ctx.watch = Witness()
            return x.clone()

        @staticmethod
        def backward(ctx: Any, gradient: Tensor) -> Tensor:
            return gradient

    class Witness:
        def __del__(self) -> None:
            freed.append(1)

    gc.disable()
    try:
        for backward in (True, False):
            losses = model(Watched.apply(torch.randn(2, 4).requires_grad_())).sum()
            if backward:
                losses.backward()
            del losses
    finally:
        gc.enable()
    assert freed == [1, 1]


def test_the_input_gets_its_own_gradient() -> None:
    model = make().eval()
    x = torch.randn(6, 4, requires_grad=True)
    expected = torch.autograd.grad(model(x).square().sum(), x)[0]
    capture = attached(model)
    found = torch.autograd.grad(model(x).square().sum(), x)[0]
    torch.testing.assert_close(found, expected)
    capture.reset()
    capture.backward(model(x).square().sum(1))
    assert x.grad is None


def test_a_learner_of_tied_weights_sees_one_parameter() -> None:
    model = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4))
    model[1].weight = model[0].weight
    assert list(trainable(model)) == ["0.weight", "0.bias", "1.bias"]


def test_vmap_draws_other_masks_for_each_example() -> None:
    model = nn.Sequential(nn.Linear(4, 64), nn.Dropout(0.5))
    x = torch.ones(3, 4)
    found, _ = vmap.per_sample(model, lambda m, x: m(x).square().sum(1), x, 3)
    assert len(set(found.sq_norms()["0.bias"].tolist())) == 3


def test_vmap_maps_nested_batches_and_passes_numbers_on() -> None:
    model = nn.Linear(4, 3)
    batch = {"x": [torch.randn(5, 4)], "power": 2, "y": (torch.arange(5) % 3,)}

    def loss_fn(model: nn.Module, batch: dict[str, Any]) -> Tensor:
        return F.cross_entropy(model(batch["x"][0]) ** batch["power"], batch["y"][0], reduction="none")

    by_map, _ = vmap.per_sample(model, loss_fn, batch, 5)
    by_ghost, _ = ghost.per_sample(model, loss_fn, batch, 5)
    torch.testing.assert_close(by_map.sq_norms(), by_ghost.sq_norms(), rtol=1e-5, atol=0)


def test_harmless_looks_at_a_parameter_pass() -> None:
    class Looks(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.weight = nn.Parameter(torch.randn(3, 4))

        def forward(self, x: Tensor) -> Tensor:
            w = self.weight
            assert (w.shape, w.size(0), w.dim(), w.numel(), len(w)) == (torch.Size([3, 4]), 3, 2, 12, 3)
            assert w.dtype == torch.float32
            assert w.device.type == "cpu"
            assert w.requires_grad
            assert w.is_leaf
            assert w.is_floating_point()
            assert w.data_ptr() != 0
            assert w.grad is None
            assert repr(w).startswith("Parameter")
            assert isinstance(hash(w), int)
            assert w.contiguous() is w
            assert w.float() is w
            x = x.to(w).type_as(w) + torch.zeros_like(w)[0] + w.new_zeros(4) + w.detach()[0] + w.data[1]
            assert bool((w > -100).all())
            w.requires_grad_()
            return F.linear(x * x.to(w.dtype), w)

    model = Looks()
    capture = attached(model)
    x = torch.randn(5, 4, requires_grad=True)
    capture.backward(model(x).sum(1))
    assert (capture.collect(5).sq_norms()["weight"] > 0).all()
