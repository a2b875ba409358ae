"""make_private on an existing loop: what changes, what does not, and what is counted."""

from __future__ import annotations

import copy
import gc
import pickle
from pathlib import Path

import pytest
import torch
from torch import nn
from torch.nn import functional as F
from torch.utils.data import DataLoader, TensorDataset

import dpkit
from accounting import Relation
from dpkit.engine import PrivacyEngine
from dpkit.errors import OutOfOrder


def data(n: int = 60, features: int = 5, classes: int = 3) -> TensorDataset:
    generator = torch.Generator().manual_seed(1)
    x = torch.randn(n, features, generator=generator)
    return TensorDataset(x, torch.randint(0, classes, (n,), generator=generator))


def mlp(features: int = 5, classes: int = 3) -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(features, 8), nn.Tanh(), nn.Linear(8, classes))


def attach(tmp_path: Path, model: nn.Module | None = None, **changes: object):
    model = mlp() if model is None else model
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    options: dict[str, object] = {
        "num_examples": 60,
        "target_epsilon": 8.0,
        "target_delta": 1e-4,
        "epochs": 2,
        "max_grad_norm": 1.0,
    }
    dataset = changes.pop("dataset", data())
    seed = changes.pop("seed", None)
    options.update(changes)
    engine = PrivacyEngine(tmp_path / "run", seed=seed)
    loader = DataLoader(dataset, batch_size=10, shuffle=True)
    return engine, *engine.make_private(model, optimizer, loader, **options)


def train(engine: PrivacyEngine, model: nn.Module, optimizer: torch.optim.Optimizer, loader, epochs: int) -> int:
    iterations = 0
    for _ in range(epochs):
        for x, y in loader:
            optimizer.zero_grad()
            engine.backward(F.cross_entropy(model(x), y, reduction="none"))
            optimizer.step()
            iterations += 1
    return iterations


def test_the_same_objects_come_back_with_the_same_keys(tmp_path: Path) -> None:
    model = mlp()
    keys, kind = list(model.state_dict()), type(model)
    _, private, _, _ = attach(tmp_path, model)
    assert private is model and type(private) is kind and list(private.state_dict()) == keys


def test_a_run_takes_the_planned_steps_and_no_more(tmp_path: Path) -> None:
    engine, model, optimizer, loader = attach(tmp_path)
    assert len(loader) == 6
    assert train(engine, model, optimizer, loader, epochs=5) == 12 == engine.steps_taken
    ((_, charged),) = engine.ledger.plans()
    assert charged == 12
    assert engine.epsilon().upper <= 8.0
    assert engine.epsilon().upper == pytest.approx(8.0, rel=1e-2)
    assert engine.ledger.spent().epsilon == pytest.approx(engine.epsilon().upper)


def test_every_parameter_moves_and_every_gradient_is_noisy_even_unused_ones(tmp_path: Path) -> None:
    class Unused(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.used, self.unused = nn.Linear(5, 3), nn.Linear(4, 2)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return self.used(x)

    model = Unused()
    engine, model, optimizer, loader = attach(tmp_path, model)
    x, y = next(iter(loader))
    engine.backward(F.cross_entropy(model(x), y, reduction="none"))
    for name, parameter in model.named_parameters():
        assert parameter.grad is not None and bool((parameter.grad != 0).all()), name


def test_the_gradient_is_the_clipped_sum_over_the_expected_batch(tmp_path: Path) -> None:
    """With noise of 1e-6 the released gradient equals the one computed example by example."""
    engine, model, optimizer, loader = attach(
        tmp_path, target_epsilon=None, noise_multiplier=1e-6, max_grad_norm=0.5, epochs=1
    )
    parameters = list(model.parameters())
    compared = 0
    for x, y in loader:
        rows = []
        for row, label in zip(x, y, strict=True):
            twin = copy.deepcopy(model)
            loss = F.cross_entropy(twin(row[None]), label[None])
            gradient = torch.cat([g.flatten() for g in torch.autograd.grad(loss, list(twin.parameters()))])
            rows.append(gradient * min(1.0, 0.5 / float(gradient.norm())))
        optimizer.zero_grad()
        engine.backward(F.cross_entropy(model(x), y, reduction="none"))
        released = torch.cat([p.grad.flatten() for p in parameters])
        # The first rows are the examples, the others are padding and count for nothing.
        expected = torch.stack([*rows[: engine.nonprivate.units], torch.zeros_like(released)]).sum(0) / 10
        torch.testing.assert_close(released, expected, atol=2e-6, rtol=1e-4)
        compared += engine.nonprivate.units
        optimizer.step()
    assert compared > 0


@pytest.mark.parametrize(
    ("reduction", "through"), [("mean", "engine"), ("sum", "engine"), ("mean", "loss"), ("sum", "loss")]
)
def test_reduced_losses_give_the_same_gradients(tmp_path: Path, reduction: str, through: str) -> None:
    gradients = []
    for number, (mode, how) in enumerate([("none", "engine"), (reduction, through)]):
        engine, model, _, loader = attach(tmp_path / str(number), loss_reduction=mode, seed=7)
        x, y = next(iter(loader))
        loss = F.cross_entropy(model(x), y, reduction=mode)
        engine.backward(loss) if how == "engine" else loss.backward()
        gradients.append(torch.cat([p.grad.flatten() for p in model.parameters()]))
    torch.testing.assert_close(gradients[0], gradients[1], rtol=1e-4, atol=1e-5)


def test_microbatches_give_the_same_release_as_the_whole_batch_up_to_noise(tmp_path: Path) -> None:
    engine, model, optimizer, loader = attach(
        tmp_path, target_epsilon=None, noise_multiplier=1e-6, epochs=1, max_physical_batch_size=4
    )
    cap = engine.plan.sampler.cap
    per_step = -(-cap // 4)
    assert len(loader) == 6 * per_step
    before = [p.detach().clone() for p in model.parameters()]
    moved, rows = 0, []
    for number, (x, y) in enumerate(loader):
        assert len(x) == 4
        rows.append((x, y))
        optimizer.zero_grad()
        engine.backward(F.cross_entropy(model(x), y, reduction="none"))
        if number % per_step != per_step - 1:
            assert all(p.grad is None for p in model.parameters())
            optimizer.step()
            assert all(torch.equal(p, b) for p, b in zip(model.parameters(), before, strict=True))
        else:
            optimizer.step()
            moved += 1
            before = [p.detach().clone() for p in model.parameters()]
    assert moved == 6 == engine.steps_taken


def test_empty_draws_are_steps_like_any_other(tmp_path: Path) -> None:
    engine, model, optimizer, loader = attach(
        tmp_path, dataset=data(3), num_examples=1000, epochs=None, steps=20, target_epsilon=None, noise_multiplier=1.0
    )
    assert train(engine, model, optimizer, loader, epochs=1) == 20  # a pass of 100 steps, cut at the plan's 20
    assert engine.steps_taken == 20


def test_without_num_examples_the_size_is_declared_public_and_the_relation_is_zero_out(tmp_path: Path) -> None:
    engine, *_ = attach(tmp_path, num_examples=None)
    assert engine.plan.relation is Relation.ZERO_OUT and engine.plan.num_examples == 60
    engine, *_ = attach(tmp_path / "typed", num_examples=60)
    assert engine.plan.relation is Relation.ADD_REMOVE


def test_schedulers_clip_grad_norm_and_state_dicts_work_as_before(tmp_path: Path) -> None:
    engine, model, optimizer, loader = attach(tmp_path)
    scheduler = torch.optim.lr_scheduler.StepLR(optimizer, 1, gamma=0.5)
    x, y = next(iter(loader))
    engine.backward(F.cross_entropy(model(x), y, reduction="none"))
    nn.utils.clip_grad_norm_(model.parameters(), 1e-3)
    total = torch.cat([p.grad.flatten() for p in model.parameters()]).norm()
    assert float(total) <= 1e-3 * 1.001
    optimizer.step()
    scheduler.step()
    assert optimizer.param_groups[0]["lr"] == 0.05
    fresh = mlp()
    fresh.load_state_dict(model.state_dict())


def test_copies_and_pickles_of_an_attached_model_are_plain(tmp_path: Path) -> None:
    engine, model, optimizer, loader = attach(tmp_path)
    for twin in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        F.cross_entropy(twin(torch.randn(4, 5)), torch.zeros(4, dtype=torch.long)).backward()
        assert all(p.grad is not None for p in twin.parameters())
    assert engine.steps_taken == 0
    assert train(engine, model, optimizer, loader, epochs=1) == 6


def test_evaluation_on_a_loader_of_one_s_own_is_untouched(tmp_path: Path) -> None:
    engine, model, optimizer, loader = attach(tmp_path)
    train(engine, model, optimizer, loader, epochs=1)
    with torch.no_grad():
        assert model(torch.randn(7, 5)).shape == (7, 3)
    assert model(torch.randn(7, 5)).shape == (7, 3)
    train(engine, model, optimizer, loader, epochs=1)


def test_losing_the_engine_does_not_make_a_private_loop_plain(tmp_path: Path) -> None:
    _, model, _, _ = attach(tmp_path)
    gc.collect()
    with pytest.raises(OutOfOrder, match=r"engine\.backward"):
        F.cross_entropy(model(torch.randn(4, 5)), torch.zeros(4, dtype=torch.long)).backward()
    assert all(p.grad is None for p in model.parameters())


def test_attaching_anew_detaches_what_was_attached_before(tmp_path: Path) -> None:
    first, model, optimizer, _ = attach(tmp_path / "first")
    second = PrivacyEngine(tmp_path / "second")
    loop = second.make_private(
        model, optimizer, DataLoader(data(), 10), target_epsilon=8.0, target_delta=1e-4, epochs=1, max_grad_norm=1.0
    )
    assert train(second, *loop, epochs=1) == 6
    with pytest.raises(OutOfOrder):
        first.backward(torch.zeros(16))


def test_the_model_is_plain_again_when_the_engine_is_detached(tmp_path: Path) -> None:
    engine, model, optimizer, loader = attach(tmp_path)
    train(engine, model, optimizer, loader, epochs=1)
    engine.detach()
    model.zero_grad()
    F.cross_entropy(model(torch.randn(4, 5)), torch.zeros(4, dtype=torch.long)).backward()
    assert all(p.grad is not None for p in model.parameters())
    optimizer.step()
    with pytest.raises(OutOfOrder):
        next(iter(loader))


def test_closures_and_accelerated_loops_step_with_the_released_gradient(tmp_path: Path) -> None:
    engine, model, optimizer, loader = attach(tmp_path)
    for x, y in loader:

        def closure(x=x, y=y) -> torch.Tensor:
            optimizer.zero_grad()
            losses = F.cross_entropy(model(x), y, reduction="none")
            engine.backward(losses)
            return losses.detach().mean()

        before = model[0].weight.detach().clone()
        optimizer.step(closure)
        assert not torch.equal(before, model[0].weight)
    assert engine.steps_taken == 6


def test_workers_collate_and_structures_are_kept(tmp_path: Path) -> None:
    class Records(torch.utils.data.Dataset):
        def __len__(self) -> int:
            return 60

        def __getitem__(self, index: int) -> dict[str, torch.Tensor]:
            return {"x": torch.full((5,), float(index)), "y": torch.tensor(index % 3)}

    model = mlp()
    optimizer = torch.optim.Adam(model.parameters())
    engine = PrivacyEngine(tmp_path / "run")
    loader = DataLoader(Records(), batch_size=10, num_workers=2)
    _, _, private = engine.make_private(
        model, optimizer, loader, target_epsilon=5.0, target_delta=1e-4, epochs=1, max_grad_norm=1.0
    )
    seen = 0
    for batch in private:
        assert set(batch) == {"x", "y"}
        engine.backward(F.cross_entropy(model(batch["x"]), batch["y"], reduction="none"))
        optimizer.step()
        seen += engine.nonprivate.units
    assert 20 < seen < 110  # 60 expected, standard deviation 7.1: false alarm below 1e-7


@pytest.mark.parametrize("rows", [None, 4])
def test_filters_see_each_release_once(rows: int | None, tmp_path: Path) -> None:
    calls = []

    def update(released, state):
        calls.append(released)
        return released._replace(value={n: torch.zeros_like(v) for n, v in released.value.items()}), state + 1

    still = dpkit.filters.FilterOf(init=lambda parameters: 0, update=update)
    engine, model, optimizer, loader = attach(tmp_path, filters=(still,), max_physical_batch_size=rows)
    before = [p.detach().clone() for p in model.parameters()]
    train(engine, model, optimizer, loader, epochs=2)
    assert len(calls) == 12
    assert all(torch.equal(a, b) for a, b in zip(before, model.parameters(), strict=True))


def test_the_statement_names_everything_that_epsilon_depends_on(tmp_path: Path) -> None:
    engine, model, optimizer, loader = attach(tmp_path)
    train(engine, model, optimizer, loader, epochs=2)
    text = str(engine.statement())
    for word in ("epsilon", "delta", "example", "add", "Poisson", "privacy loss", "12"):
        assert word.lower() in text.lower(), (word, text)
