"""What the engine refuses, by name and with the way out, and that nothing is released or charged when it does."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from engine.test_loop import attach, data, mlp, train
from torch import nn
from torch.nn import functional as F
from torch.utils.data import DataLoader, IterableDataset, TensorDataset, WeightedRandomSampler

import dpkit
from accounting import Budget, Ledger
from dpkit.engine import PrivacyEngine
from dpkit.errors import (
    BudgetExceeded,
    CrossExample,
    DataError,
    InvalidArgument,
    LedgerError,
    LossShape,
    OutOfOrder,
    RawGradient,
    Refused,
    TargetUnreachable,
    UncoveredParameter,
    UnsupportedLoader,
    UnsupportedModule,
    UnsupportedOperation,
    UnsupportedOptimizer,
)

OPTIONS = {"num_examples": 60, "target_epsilon": 8.0, "target_delta": 1e-4, "epochs": 1, "max_grad_norm": 1.0}


def make(tmp_path: Path, model: nn.Module, optimizer: torch.optim.Optimizer | None = None, loader=None, **changes):
    optimizer = optimizer or torch.optim.SGD(model.parameters(), lr=0.1)
    loader = DataLoader(data(), batch_size=10) if loader is None else loader
    engine = PrivacyEngine(tmp_path / "run")
    return engine, *engine.make_private(model, optimizer, loader, **{**OPTIONS, **changes})


def charges(engine: PrivacyEngine) -> int:
    return sum(count for _, count in engine.ledger.plans())


@pytest.mark.parametrize(
    ("changes", "names"),
    [
        ({"max_grad_norm": 0.0}, "max_grad_norm"),
        ({"max_grad_norm": -1.0}, "max_grad_norm"),
        ({"max_grad_norm": None}, "max_grad_norm"),
        ({"clipping": dpkit.clipping.Flat(1.0)}, "clipping"),
        ({"target_epsilon": None}, "target_epsilon"),
        ({"noise_multiplier": 1.0}, "noise_multiplier"),
        ({"target_epsilon": None, "noise_multiplier": 0.0}, "noise_multiplier"),
        ({"epochs": None}, "epochs"),
        ({"epochs": 0}, "steps"),
        ({"steps": 3}, "epochs"),
        ({"target_delta": 0.0}, "delta"),
        ({"target_delta": 1.0}, "delta"),
        ({"num_examples": 0}, "num_examples"),
        ({"max_physical_batch_size": 0}, "max_physical_batch_size"),
        ({"loss_reduction": "median"}, "loss_reduction"),
    ],
)
def test_values_outside_their_domain_are_named(tmp_path: Path, changes: dict, names: str) -> None:
    with pytest.raises(InvalidArgument, match=names):
        make(tmp_path, mlp(), **changes)


@pytest.mark.parametrize("epsilon", [0.0, -1.0])
def test_a_target_that_no_noise_reaches(tmp_path: Path, epsilon: float) -> None:
    with pytest.raises((TargetUnreachable, ValueError), match="epsilon"):
        make(tmp_path, mlp(), target_epsilon=epsilon)


def test_batch_norm_in_training_mode_is_named_with_its_path(tmp_path: Path) -> None:
    model = nn.Sequential(nn.Linear(5, 8), nn.BatchNorm1d(8), nn.Linear(8, 3))
    with pytest.raises(UnsupportedModule, match=r"BatchNorm1d at '1'.*GroupNorm"):
        make(tmp_path, model)


def test_batch_norm_that_is_switched_on_later_is_caught_before_a_release(tmp_path: Path) -> None:
    model = nn.Sequential(nn.Linear(5, 8), nn.BatchNorm1d(8, affine=False).eval(), nn.Linear(8, 3))
    engine, model, optimizer, loader = make(tmp_path, model)
    model.train()
    with pytest.raises(Refused):
        train(engine, model, optimizer, loader, 1)
    assert charges(engine) == 0


def test_lbfgs_is_refused_by_name(tmp_path: Path) -> None:
    model = mlp()
    with pytest.raises(UnsupportedOptimizer, match="LBFGS"):
        make(tmp_path, model, torch.optim.LBFGS(model.parameters()))


def test_a_closure_evaluated_twice_releases_once(tmp_path: Path) -> None:
    engine, model, _, loader = make(tmp_path, mlp())
    x, y = next(iter(loader))
    engine.backward(F.cross_entropy(model(x), y, reduction="none"))
    with pytest.raises(OutOfOrder, match="once"):
        engine.backward(F.cross_entropy(model(x), y, reduction="none"))
    assert charges(engine) == 1


def test_a_grad_scaler_is_refused_by_name(tmp_path: Path) -> None:
    engine, model, optimizer, loader = make(tmp_path, mlp())
    scaler = torch.amp.GradScaler("cpu", init_scale=2.0)
    x, y = next(iter(loader))
    engine.backward(scaler.scale(F.cross_entropy(model(x), y, reduction="none")))
    before = [p.detach().clone() for p in model.parameters()]
    with pytest.raises(UnsupportedOptimizer, match="GradScaler"):
        scaler.step(optimizer)
    assert all(torch.equal(a, b) for a, b in zip(before, model.parameters(), strict=True))


def test_half_precision_losses_are_refused(tmp_path: Path) -> None:
    engine, model, _, loader = make(tmp_path, mlp())
    x, y = next(iter(loader))
    with pytest.raises(UnsupportedOptimizer, match="bfloat16"):
        engine.backward(F.cross_entropy(model(x), y, reduction="none").half())


def test_an_optimizer_over_foreign_parameters_is_refused(tmp_path: Path) -> None:
    model, head = mlp(), nn.Linear(3, 3)
    with pytest.raises(UncoveredParameter, match="not a parameter of the attached model"):
        make(tmp_path, model, torch.optim.SGD([*model.parameters(), *head.parameters()], lr=0.1))


def test_a_second_optimizer_on_uncovered_parameters_is_refused_and_gets_no_gradient(tmp_path: Path) -> None:
    engine, model, _, loader = make(tmp_path, mlp())
    head = nn.Linear(3, 3)
    x, y = next(iter(loader))
    with pytest.raises(UncoveredParameter, match=r"shape \(3, 3\)|shape \(3,\)"):
        engine.backward(F.cross_entropy(head(model(x)), y, reduction="none"))
    assert head.weight.grad is None and charges(engine) == 0


def test_a_parameter_used_outside_the_model_s_forward_is_named(tmp_path: Path) -> None:
    engine, model, _, loader = make(tmp_path, mlp())
    x, y = next(iter(loader))
    losses = F.cross_entropy(model(x), y, reduction="none") + (model[0].weight ** 2).sum()
    with pytest.raises(UnsupportedOperation, match=r"'0.weight'.*outside"):
        engine.backward(losses)
    assert charges(engine) == 0


def test_a_plain_backward_reaches_no_parameter(tmp_path: Path) -> None:
    engine, model, optimizer, loader = make(tmp_path, mlp())
    x, y = next(iter(loader))
    with pytest.raises(OutOfOrder, match="engine.backward"):
        F.cross_entropy(model(x), y).backward()
    assert all(p.grad is None for p in model.parameters()) and charges(engine) == 0


def test_a_raw_gradient_past_the_engine_is_caught(tmp_path: Path) -> None:
    engine, model, optimizer, _ = make(tmp_path, mlp())
    with pytest.raises(RawGradient, match="'0.weight'"):
        (model[0].weight ** 2).sum().backward()
    assert model[0].weight.grad is None
    model[0].weight.grad = torch.ones_like(model[0].weight)
    with pytest.raises(RawGradient, match="'0.weight'"):
        optimizer.step()


def test_unfreezing_after_attaching_is_refused(tmp_path: Path) -> None:
    model = mlp()
    model[0].requires_grad_(False)
    engine, model, optimizer, loader = make(tmp_path, model)
    model[0].requires_grad_(True)
    with pytest.raises(Refused):
        train(engine, model, optimizer, loader, 1)
    assert charges(engine) == 0


@pytest.mark.parametrize("shape", ["mean", "two columns", "too few"])
def test_losses_that_are_not_one_per_example(tmp_path: Path, shape: str) -> None:
    engine, model, _, loader = make(tmp_path, mlp())
    x, y = next(iter(loader))
    losses = F.cross_entropy(model(x), y, reduction="none")
    wrong = {"mean": losses.mean(), "two columns": torch.stack([losses, losses], 1), "too few": losses[1:]}[shape]
    with pytest.raises(LossShape, match="one loss per example"):
        engine.backward(wrong)
    assert charges(engine) == 0


def test_skipping_a_batch_is_refused(tmp_path: Path) -> None:
    engine, model, _, loader = make(tmp_path, mlp())
    batches = iter(loader)
    next(batches)
    with pytest.raises(OutOfOrder, match="engine.backward"):
        next(batches)


def test_looking_at_a_first_batch_is_allowed(tmp_path: Path) -> None:
    engine, model, optimizer, loader = make(tmp_path, mlp())
    next(iter(loader))
    assert train(engine, model, optimizer, loader, 3) == 6


def test_a_step_that_failed_ends_the_run(tmp_path: Path) -> None:
    engine, model, _, loader = make(tmp_path, mlp())
    batches = iter(loader)
    x, y = next(batches)
    losses = F.cross_entropy(model(x), y, reduction="none")
    losses.register_hook(lambda gradient: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        engine.backward(losses)
    with pytest.raises(OutOfOrder, match="failed"):
        next(batches)
    with pytest.raises(OutOfOrder, match="failed"):
        next(iter(loader))
    assert charges(engine) == 0


def test_a_wrong_shape_can_be_mended_in_the_same_batch(tmp_path: Path) -> None:
    engine, model, _, loader = make(tmp_path, mlp())
    x, y = next(iter(loader))
    with pytest.raises(LossShape):
        engine.backward(F.cross_entropy(model(x), y))
    engine.backward(F.cross_entropy(model(x), y, reduction="none"))
    assert charges(engine) == 1


def test_an_unknown_operation_on_a_parameter_is_named_with_the_remedy(tmp_path: Path) -> None:
    class Odd(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.matrix = nn.Parameter(torch.eye(5))
            self.out = nn.Linear(5, 3)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            x = x.clone()
            x[:, 0] = self.matrix[0, 0]
            return self.out(x)

    engine, model, optimizer, loader = make(tmp_path, Odd())
    with pytest.raises(UnsupportedOperation, match=r"__setitem__.*'matrix'.*overwritten.*new tensor"):
        train(engine, model, optimizer, loader, 1)
    assert charges(engine) == 0


@pytest.mark.parametrize("kind", ["iterable", "weighted", "batch sampler", "no loader", "strings"])
def test_loaders_that_cannot_be_sampled_as_planned(tmp_path: Path, kind: str) -> None:
    class Stream(IterableDataset):
        def __iter__(self):
            return iter(data())

    class Words(torch.utils.data.Dataset):
        def __len__(self) -> int:
            return 60

        def __getitem__(self, index: int):
            return torch.zeros(5), "word"

    loader = {
        "iterable": lambda: DataLoader(Stream(), batch_size=10),
        "weighted": lambda: DataLoader(data(), batch_size=10, sampler=WeightedRandomSampler([1.0] * 60, 60)),
        "batch sampler": lambda: DataLoader(data(), batch_sampler=[[0, 1], [2, 3]]),
        "no loader": lambda: [torch.zeros(5)],
        "strings": lambda: DataLoader(Words(), batch_size=10),
    }[kind]()
    with pytest.raises(UnsupportedLoader):
        make(tmp_path, mlp(), loader=loader)


def test_an_empty_data_set_needs_a_public_batch_and_then_trains_on_nothing(tmp_path: Path) -> None:
    empty = TensorDataset(torch.zeros(0, 5), torch.zeros(0, dtype=torch.long))
    with pytest.raises(DataError, match="probe_batch"):
        make(tmp_path, mlp(), loader=DataLoader(empty, batch_size=10))
    public = (torch.zeros(1, 5), torch.zeros(1, dtype=torch.long))
    engine, model, optimizer, loader = make(
        tmp_path / "public", mlp(), loader=DataLoader(empty, batch_size=10), probe_batch=public
    )
    assert train(engine, model, optimizer, loader, 1) == 6
    with pytest.raises(InvalidArgument, match="num_examples"):
        make(tmp_path / "size", mlp(), loader=DataLoader(empty, batch_size=10), num_examples=None)


def test_a_data_set_above_its_declared_bound_is_refused_where_truncation_relies_on_it(tmp_path: Path) -> None:
    with pytest.raises(InvalidArgument, match="upper bound"):
        make(tmp_path, mlp(), num_examples=50, max_physical_batch_size=5)


def test_replacing_one_record_under_poisson_sampling_is_refused(tmp_path: Path) -> None:
    with pytest.raises(dpkit.errors.Unsupported):
        make(tmp_path, mlp(), relation=dpkit.Relation.REPLACE_ONE)


def test_one_engine_takes_one_model(tmp_path: Path) -> None:
    engine, *_ = make(tmp_path, mlp())
    with pytest.raises(OutOfOrder, match="second PrivacyEngine"):
        engine.make_private(mlp(), torch.optim.SGD(mlp().parameters(), lr=0.1), DataLoader(data(), 10), **OPTIONS)


def test_calls_before_attaching_say_what_comes_first(tmp_path: Path) -> None:
    engine = PrivacyEngine(tmp_path / "run")
    for call in (
        lambda: engine.plan,
        engine.epsilon,
        engine.statement,
        engine.batches,
        lambda: engine.backward(torch.ones(1)),
    ):
        with pytest.raises(OutOfOrder):
            call()


# -- the ledger -------------------------------------------------------------------------------------------------------


def test_a_spent_budget_refuses_the_next_run_in_the_same_folder(tmp_path: Path) -> None:
    engine, model, optimizer, loader = make(tmp_path, mlp())
    train(engine, model, optimizer, loader, 1)
    with pytest.raises(BudgetExceeded):
        make(tmp_path, mlp())


def test_two_runs_share_the_ledger_of_their_data_set(tmp_path: Path) -> None:
    shared = {"ledger": tmp_path / "shared.sqlite", "dataset_name": "made up"}
    budget = Budget(epsilon=16.0, delta=2e-4)
    for number in range(2):
        engine = PrivacyEngine(tmp_path / str(number), budget=budget, **shared)
        model = mlp()
        loop = engine.make_private(
            model, torch.optim.SGD(model.parameters(), lr=0.1), DataLoader(data(), batch_size=10), **OPTIONS
        )
        train(engine, *loop, 1)
    assert engine.ledger.spent().epsilon <= 16.0 and engine.ledger.spent().delta == pytest.approx(2e-4)
    assert engine.ledger.spent().epsilon == pytest.approx(16.0, rel=1e-2)
    engine = PrivacyEngine(tmp_path / "3", **shared)
    with pytest.raises(BudgetExceeded):
        engine.make_private(model, torch.optim.SGD(model.parameters(), 0.1), DataLoader(data(), 10), **OPTIONS)


def test_a_shared_ledger_needs_the_data_set_s_name(tmp_path: Path) -> None:
    with pytest.raises(InvalidArgument, match="dataset_name"):
        PrivacyEngine(tmp_path / "run", ledger=tmp_path / "shared.sqlite")


def test_another_data_set_s_ledger_is_refused(tmp_path: Path) -> None:
    Ledger.create(tmp_path / "shared.sqlite", dataset_name="census", budget=Budget(epsilon=1.0, delta=1e-5))
    with pytest.raises(LedgerError, match="census"):
        PrivacyEngine(tmp_path / "run", ledger=tmp_path / "shared.sqlite", dataset_name="hospital")


def test_an_existing_budget_cannot_be_replaced(tmp_path: Path) -> None:
    make(tmp_path, mlp())
    engine = PrivacyEngine(tmp_path / "run", budget=Budget(epsilon=100.0, delta=1e-3))
    model = mlp()
    with pytest.raises(LedgerError, match="budget"):
        engine.make_private(model, torch.optim.SGD(model.parameters(), 0.1), DataLoader(data(), 10), **OPTIONS)


def test_a_used_folder_without_its_ledger_is_refused(tmp_path: Path) -> None:
    make(tmp_path, mlp())
    (tmp_path / "run" / "ledger.sqlite").unlink()
    with pytest.raises(LedgerError, match="ledger.sqlite is gone"):
        PrivacyEngine(tmp_path / "run")


def test_a_ledger_that_breaks_during_the_run_stops_it_before_the_release(tmp_path: Path) -> None:
    engine, model, optimizer, loader = attach(tmp_path)
    batches = iter(loader)
    x, y = next(batches)
    engine.backward(F.cross_entropy(model(x), y, reduction="none"))
    path = tmp_path / "run" / "ledger.sqlite"
    path.write_bytes(path.read_bytes()[:700])
    x, y = next(batches)
    optimizer.zero_grad()
    with pytest.raises(LedgerError):
        engine.backward(F.cross_entropy(model(x), y, reduction="none"))
    assert all(p.grad is None for p in model.parameters())


# -- the neighbour probe ----------------------------------------------------------------------------------------------


class Centred(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.net = mlp()

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.net(x - x.mean(0))


class TimeMajor(nn.Module):
    """Folds the batch axis into time: with T == B no shape shows it."""

    def __init__(self) -> None:
        super().__init__()
        self.inner, self.out = nn.Linear(5, 4), nn.Linear(4, 3)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        sequence = x.unsqueeze(0).expand(len(x), len(x), 5)  # (T, B, 5) with T = B
        return self.out(torch.tanh(self.inner(sequence))).mean(0)


class Moving(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.net = mlp()
        self.register_buffer("seen", torch.zeros(5))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        if self.training:
            self.seen.add_(x.detach().sum(0))
        return self.net(x)


def test_the_probe_finds_the_examples_of_a_model_that_puts_them_second(tmp_path: Path) -> None:
    engine, model, optimizer, loader = make(tmp_path, TimeMajor())
    train(engine, model, optimizer, loader, 1)
    assert charges(engine) == engine.steps_taken > 0


def test_the_probe_catches_examples_that_move_each_other(tmp_path: Path) -> None:
    engine, attached, optimizer, loader = make(tmp_path, Centred())
    with pytest.raises(CrossExample, match="parameter '"):
        train(engine, attached, optimizer, loader, 1)
    assert charges(engine) == 0


def test_the_probe_catches_buffers_that_move_with_the_batch(tmp_path: Path) -> None:
    engine, attached, optimizer, loader = make(tmp_path, Moving())
    with pytest.raises(UnsupportedModule, match="'seen'"):
        train(engine, attached, optimizer, loader, 1)
    assert charges(engine) == 0


def test_the_probe_leaves_no_trace(tmp_path: Path) -> None:
    model = nn.Sequential(nn.Linear(5, 8), nn.Dropout(0.5), nn.Linear(8, 3))
    engine, model, _, loader = make(tmp_path, model)
    x, y = next(iter(loader))
    torch.manual_seed(3)
    expected = torch.rand(3)
    torch.manual_seed(3)
    with torch.no_grad():
        pass
    with torch.random.fork_rng():
        losses = F.cross_entropy(model(x), y, reduction="none")
    torch.testing.assert_close(torch.rand(3), expected)
    assert model[1].training
    engine.backward(losses)
    assert engine.steps_taken == 1


def test_the_functional_form_probes_the_loss_as_well(tmp_path: Path) -> None:
    model = mlp()
    plan = dpkit.Plan(
        sampler=dpkit.Poisson(0.2),
        clip=dpkit.clipping.Flat(1.0),
        mechanism=dpkit.Gaussian(1.0),
        steps=5,
        num_examples=60,
        delta=1e-4,
    )

    def contrastive(model: nn.Module, batch) -> torch.Tensor:
        z = model(batch[0])
        return F.cross_entropy(z @ z.T, torch.arange(len(z)), reduction="none")

    engine = PrivacyEngine(tmp_path / "run")
    with pytest.raises(CrossExample, match="mixes the examples"):
        engine.attach(model, contrastive, torch.optim.SGD(model.parameters(), 0.1), plan=plan, dataset=data())
