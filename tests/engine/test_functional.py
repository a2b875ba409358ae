"""attach + step: the functional form, on every backend."""

from __future__ import annotations

from pathlib import Path
from types import ModuleType

import pytest
import torch
from engine.test_loop import data, mlp
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.data import TensorDataset

import dpkit
from dpkit.engine import PrivacyEngine
from dpkit.errors import BudgetExceeded, InvalidArgument, LossShape, OutOfOrder, UncoveredParameter

BACKENDS = [dpkit.ghost, dpkit.vmap]


def cross_entropy(model: nn.Module, batch: tuple[Tensor, Tensor]) -> Tensor:
    return F.cross_entropy(model(batch[0]), batch[1], reduction="none")


def plan(**changes: object) -> dpkit.Plan:
    options: dict = {
        "sampler": dpkit.Poisson(0.3),
        "clip": dpkit.clipping.Flat(0.5),
        "mechanism": dpkit.Gaussian(1.0),
        "steps": 4,
        "num_examples": 60,
        "delta": 1e-4,
    }
    return dpkit.Plan(**{**options, **changes})


def attach(
    tmp_path: Path, model: nn.Module, *, dataset=None, seed: int | None = None, the_plan=None, **options: object
):
    engine = PrivacyEngine(tmp_path, seed=seed)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.5)
    step = engine.attach(
        model,
        options.pop("loss_fn", cross_entropy),
        optimizer,
        plan=the_plan or plan(),
        dataset=data() if dataset is None else dataset,
        **options,
    )
    return engine, step


@pytest.mark.parametrize("backend", BACKENDS, ids=lambda backend: backend.__name__)
def test_it_takes_the_planned_steps_and_charges_each(tmp_path: Path, backend: ModuleType) -> None:
    model = mlp()
    before = [p.detach().clone() for p in model.parameters()]
    engine, step = attach(tmp_path, model, backend=backend)
    for batch in engine.batches():
        step(batch)
    assert engine.steps_taken == 4 and engine.ledger.spent().steps_charged == 4
    assert all(not torch.equal(a, b) for a, b in zip(before, model.parameters(), strict=True))
    assert list(engine.batches()) == []
    assert engine.epsilon().upper == pytest.approx(engine.plan.epsilon().upper)


@pytest.mark.parametrize("backend", BACKENDS, ids=lambda backend: backend.__name__)
@pytest.mark.parametrize("size", [None, 1, 7])
def test_backends_and_microbatches_change_nothing_but_rounding(
    tmp_path: Path, backend: ModuleType, size: int | None
) -> None:
    results = []
    for number, options in enumerate([{"backend": dpkit.ghost}, {"backend": backend, "max_physical_batch_size": size}]):
        model = mlp()
        engine, step = attach(tmp_path / str(number), model, seed=11, **options)
        for batch in engine.batches():
            step(batch)
        results.append(torch.cat([p.detach().flatten() for p in model.parameters()]))
    # The noise follows the rounding bound, which grows with the number of partial sums: a relative 1e-3 here.
    torch.testing.assert_close(results[0], results[1], rtol=5e-3, atol=5e-3)


def test_tied_weights_and_a_layer_used_twice_are_clipped_as_one(tmp_path: Path) -> None:
    class Tied(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.tokens = nn.Embedding(7, 4)
            self.mix = nn.Linear(4, 4)
            self.head = nn.Linear(4, 7, bias=False)
            self.head.weight = self.tokens.weight

        def forward(self, ids: Tensor) -> Tensor:
            hidden = self.tokens(ids)
            return self.head(torch.tanh(self.mix(torch.tanh(self.mix(hidden))))).mean(1)

    ids = torch.randint(0, 7, (60, 5), generator=torch.Generator().manual_seed(0))
    model = Tied()
    engine, step = attach(
        tmp_path, model, dataset=TensorDataset(ids, ids[:, 0]), the_plan=plan(mechanism=dpkit.Gaussian(1e-6))
    )
    parameters = list(model.parameters())
    for batch in engine.batches():
        rows = []
        for row in range(len(batch[0])):
            one = (batch[0][row : row + 1], batch[1][row : row + 1])
            gradient = torch.cat(
                [g.flatten() for g in torch.autograd.grad(cross_entropy(model, one).sum(), parameters)]
            )
            rows.append(gradient * min(1.0, 0.5 / float(gradient.norm())))
        step(batch)
        assert engine.nonprivate.units > 0  # 18 expected: an empty draw has probability 5e-10
        expected = torch.stack(rows[: engine.nonprivate.units]).sum(0) / (0.3 * 60)
        torch.testing.assert_close(torch.cat([p.grad.flatten() for p in parameters]), expected, rtol=1e-4, atol=1e-5)


def test_an_empty_data_set_trains_on_noise_alone(tmp_path: Path) -> None:
    empty = TensorDataset(torch.zeros(0, 5), torch.zeros(0, dtype=torch.long))
    public = (torch.randn(4, 5), torch.tensor([0, 1, 2, 0]))
    engine, step = attach(tmp_path, mlp(), dataset=empty, probe_batch=public)
    for batch in engine.batches():
        step(batch)
    assert engine.steps_taken == 4 and engine.nonprivate.units == 0


def test_rows_that_are_not_finite_are_dropped_and_the_others_count(tmp_path: Path) -> None:
    x, y = data().tensors
    spoilt = x.clone()
    spoilt[::2] = float("nan")
    spoilt[1::6] = float("inf")
    model = mlp()
    engine, step = attach(tmp_path, model, dataset=TensorDataset(spoilt, y), the_plan=plan(sampler=dpkit.Poisson(1.0)))
    step(next(engine.batches()))
    assert engine.nonprivate.units == 60 and engine.nonprivate.dropped == 40
    assert all(bool(p.isfinite().all()) for p in model.parameters())


@pytest.mark.parametrize("backend", BACKENDS, ids=lambda backend: backend.__name__)
def test_a_loss_that_is_reduced_is_refused_before_anything_is_charged(tmp_path: Path, backend: ModuleType) -> None:
    with pytest.raises(LossShape):
        attach(tmp_path, mlp(), loss_fn=lambda m, b: cross_entropy(m, b).mean(), backend=backend)
    assert not (tmp_path / "ledger.sqlite").exists()


def test_a_step_takes_each_batch_once(tmp_path: Path) -> None:
    engine, step = attach(tmp_path, mlp())
    batch = next(engine.batches())
    step(batch)
    with pytest.raises(OutOfOrder):
        step(batch)
    assert engine.steps_taken == 1


def test_a_parameter_that_was_unfrozen_later_is_refused(tmp_path: Path) -> None:
    model = mlp()
    model[0].weight.requires_grad_(False)
    engine, step = attach(tmp_path, model)
    model[0].weight.requires_grad_(True)
    with pytest.raises(UncoveredParameter, match=r"0\.weight"):
        step(next(engine.batches()))
    assert engine.ledger.spent().steps_charged == 0


@pytest.mark.parametrize(
    "changes", [{"steps": 0}, {"num_examples": 0}, {"delta": 0.0}, {"delta": float("nan")}], ids=str
)
def test_plans_outside_their_domain_are_refused(changes: dict) -> None:
    with pytest.raises(InvalidArgument):
        plan(**changes)


@pytest.mark.parametrize("backend", BACKENDS, ids=lambda backend: backend.__name__)
def test_a_trainable_tensor_outside_the_model_is_refused(tmp_path: Path, backend: ModuleType) -> None:
    head = nn.Linear(3, 3)
    with pytest.raises(UncoveredParameter, match="not a parameter of the attached model"):
        attach(
            tmp_path,
            mlp(),
            loss_fn=lambda m, b: F.cross_entropy(head(m(b[0])), b[1], reduction="none"),
            backend=backend,
        )
    assert not (tmp_path / "ledger.sqlite").exists()


def test_a_plan_above_the_budget_is_refused_before_any_release(tmp_path: Path) -> None:
    engine = PrivacyEngine(tmp_path, budget=dpkit.Budget(epsilon=0.1, delta=1e-4))
    model = mlp()
    with pytest.raises(BudgetExceeded):
        engine.attach(model, cross_entropy, torch.optim.SGD(model.parameters(), 0.1), plan=plan(), dataset=data())


def test_equal_plans_are_equal() -> None:
    assert plan() == plan() and plan() != plan(delta=1e-5)
