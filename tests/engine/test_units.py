"""Several rows of one unit are one gradient before the clip, and layers can be clipped inside the backward pass."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.data import DataLoader, TensorDataset

import dpkit
from dpkit.clipping import Flat, PerLayer, Setting
from dpkit.engine.plan import Plan
from dpkit.errors import InvalidArgument, LossShape, UncoveredParameter

ROWS = 3
N = 12
PADDED = 16  # rows that the loader hands out: a power of two, the last ones padding


def model_of(seed: int = 0) -> nn.Module:
    torch.manual_seed(seed)
    conv = nn.Sequential(
        nn.Conv1d(2, 4, 3), nn.Tanh(), nn.Flatten(), nn.Linear(12, 6), nn.LayerNorm(6), nn.Linear(6, 3)
    )
    conv[3] = nn.utils.parametrizations.weight_norm(conv[3])
    return conv


def data(size: int = 12) -> TensorDataset:
    generator = torch.Generator().manual_seed(1)
    return TensorDataset(torch.randn(size, 2, 5, generator=generator), torch.arange(size) % 3)


def augmented(x: Tensor) -> Tensor:
    """(B, ...) -> (3 B, ...): three versions of each example, one behind the other."""
    factors = torch.tensor([1.0, -0.5, 2.0])
    return (x[:, None] * factors.view(1, ROWS, *(1,) * (x.dim() - 1))).flatten(0, 1)


def clipped_by_hand(model: nn.Module, x: Tensor, y: Tensor, rule: Any, rows: int) -> dict[str, Tensor]:
    """The clipped sum, one unit at a time."""
    parameters = dict(model.named_parameters())
    groups = dict(zip(parameters, rule.groups(parameters), strict=True))
    sizes = [sum(p.numel() for name, p in parameters.items() if groups[name] == g) for g in set(groups.values())]
    bounds = rule.bounds(rule.init(Setting(tuple(sizes), 1.0)))
    total = {name: torch.zeros_like(p, dtype=torch.float64) for name, p in parameters.items()}
    for one, label in zip(x.split(1), y, strict=True):
        inputs = augmented(one) if rows > 1 else one
        loss = F.cross_entropy(model(inputs), label.expand(len(inputs)), reduction="sum")
        gradients = dict(zip(parameters, torch.autograd.grad(loss, list(parameters.values())), strict=True))
        for group, bound in enumerate(bounds):
            inside = [name for name in parameters if groups[name] == group]
            norm = torch.cat([gradients[name].double().flatten() for name in inside]).norm()
            for name in inside:
                total[name] += gradients[name].double() * min(1.0, float(bound / norm))
    return total


def attached(folder: Path, model: nn.Module, rule: Any, **options: Any) -> tuple[dpkit.PrivacyEngine, Any, Any]:
    engine = dpkit.PrivacyEngine(folder / "run")
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    loader = DataLoader(data(), batch_size=12)
    settings = {"noise_multiplier": 1e-6, "target_delta": 1e-3, "steps": 3, "clipping": rule, **options}
    _, _, loader = engine.make_private(model, optimizer, loader, num_examples=12, **settings)
    return engine, optimizer, loader


def assert_released(model: nn.Module, expected: dict[str, Tensor], size: int) -> None:
    for name, parameter in model.named_parameters():
        assert parameter.grad is not None
        error = (parameter.grad.double() * size - expected[name]).abs().max()
        assert error < 1e-3, (name, error)


@pytest.mark.parametrize("rule", [Flat(0.5), PerLayer(0.5), PerLayer((0.1, 0.2, 0.3, 0.4))], ids=str)
@pytest.mark.parametrize("rows", [1, ROWS])
def test_units_and_layers_are_clipped_as_by_hand(tmp_path: Path, rule: Any, rows: int) -> None:
    if isinstance(rule, PerLayer) and isinstance(rule.max_grad_norm, tuple):
        names = [name for name, _ in model_of().named_parameters()]
        rule = PerLayer(tuple(0.1 * (1 + layer) for layer in range(max(rule.groups(names)) + 1)))
    model = model_of()
    engine, _, loader = attached(tmp_path, model, rule, rows_per_unit=rows)
    x, y = next(iter(loader))
    expected = clipped_by_hand(model_of(), x[:N], y[:N], rule, rows)
    if rows == 1:
        engine.backward(F.cross_entropy(model(x), y, reduction="none"))
    else:
        units = torch.arange(len(x)).repeat_interleave(ROWS)
        order = torch.randperm(len(units), generator=torch.Generator().manual_seed(2))
        engine.backward(
            F.cross_entropy(model(augmented(x)[order]), y[units[order]], reduction="none"), units=units[order]
        )
    assert_released(model, expected, 12)
    assert engine.nonprivate.units == N
    assert engine.nonprivate.clipped > 0


def test_units_with_different_numbers_of_rows(tmp_path: Path) -> None:
    """The rows of a unit need not be as many as those of another: here example 0 has all that example 1 lacks."""
    model = model_of()
    engine, _, loader = attached(tmp_path, model, Flat(0.5), rows_per_unit=2)
    x, y = next(iter(loader))
    units = torch.arange(len(x)).repeat_interleave(2)
    units[2:4] = 0
    losses = F.cross_entropy(model(x[units]), y[units], reduction="none")
    engine.backward(losses, units=units)
    plain = model_of()
    total = {name: torch.zeros_like(p, dtype=torch.float64) for name, p in plain.named_parameters()}
    for unit in range(N):
        rows = int((units == unit).sum())
        if rows:
            one = F.cross_entropy(plain(x[unit : unit + 1]), y[unit : unit + 1]) * rows
            gradients = torch.autograd.grad(one, list(plain.parameters()))
            factor = min(1.0, float(0.5 / torch.cat([g.double().flatten() for g in gradients]).norm()))
            for name, gradient in zip(total, gradients, strict=True):
                total[name] += gradient.double() * factor
    assert_released(model, total, 12)


@pytest.mark.parametrize(
    ("units", "error", "message"),
    [
        (None, InvalidArgument, r"units is None beside losses of shape \(48,\)"),
        (torch.zeros(5, dtype=torch.long), InvalidArgument, r"units is \(5,\) beside"),
        (torch.zeros(48), InvalidArgument, "one whole number for each loss"),
        (torch.full((48,), PADDED), InvalidArgument, "units 0 to 15"),
        (torch.full((48,), -1), InvalidArgument, "units 0 to 15"),
    ],
)
def test_units_outside_of_the_batch_are_refused(tmp_path: Path, units: Any, error: Any, message: str) -> None:
    model = model_of()
    engine, _, loader = attached(tmp_path, model, Flat(1.0), rows_per_unit=ROWS)
    x, y = next(iter(loader))
    losses = F.cross_entropy(model(augmented(x)), y.repeat_interleave(ROWS), reduction="none")
    with pytest.raises(error, match=message):
        engine.backward(losses, units=units)
    assert all(p.grad is None for p in model.parameters())
    engine.backward(losses, units=torch.arange(PADDED).repeat_interleave(ROWS))


def test_losses_that_are_not_one_for_each_row_are_refused(tmp_path: Path) -> None:
    model = model_of()
    engine, _, loader = attached(tmp_path, model, Flat(1.0), rows_per_unit=ROWS)
    x, y = next(iter(loader))
    with pytest.raises(LossShape, match=r"\(48,\)"):
        engine.backward(F.cross_entropy(model(augmented(x))[::ROWS], y, reduction="none"))
    with pytest.raises(InvalidArgument, match="rows_per_unit is 2"):
        attached(tmp_path / "other", model_of(), Flat(1.0), rows_per_unit=2, loss_reduction="mean")


@pytest.mark.parametrize("rule", [Flat(0.5), PerLayer(0.5)], ids=str)
@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_an_example_that_is_not_finite_adds_nothing(tmp_path: Path, rule: Any, bad: float) -> None:
    model = model_of()
    engine, _, loader = attached(tmp_path, model, rule)
    x, y = next(iter(loader))
    expected = clipped_by_hand(model_of(), torch.cat([x[:4], x[5:N]]), torch.cat([y[:4], y[5:N]]), rule, 1)
    x[4] = bad
    engine.backward(F.cross_entropy(model(x), y, reduction="none"))
    assert_released(model, expected, 12)
    assert engine.nonprivate.dropped == 1


@pytest.mark.parametrize("backend", [dpkit.ghost, dpkit.vmap], ids=["ghost", "vmap"])
def test_layers_in_the_functional_form(tmp_path: Path, backend: Any) -> None:
    rule, model = PerLayer(0.5), model_of()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.0)
    engine = dpkit.PrivacyEngine(tmp_path / "run")
    plan = Plan(
        sampler=dpkit.Poisson(1.0), clip=rule, mechanism=dpkit.Gaussian(1e-6), steps=1, num_examples=12, delta=1e-3
    )

    def loss_fn(model: nn.Module, batch: Any) -> Tensor:
        return F.cross_entropy(model(batch[0]), batch[1], reduction="none")

    step = engine.attach(
        model, loss_fn, optimizer, plan=plan, dataset=data(), backend=backend, max_physical_batch_size=5
    )
    for batch in engine.batches():
        step(batch)
    x, y = data().tensors
    assert_released(model, clipped_by_hand(model_of(), x, y, rule, 1), 12)


@pytest.mark.parametrize("rule", [PerLayer(0.5), PerLayer((0.1, 0.2, 0.3, 0.4))], ids=str)
def test_a_run_with_bounds_for_layers_goes_on_where_it_stopped(tmp_path: Path, rule: PerLayer) -> None:
    names = [name for name, _ in model_of().named_parameters()]
    if isinstance(rule.max_grad_norm, tuple):
        rule = PerLayer(tuple(0.1 * (1 + layer) for layer in range(max(rule.groups(names)) + 1)))
    for engine in (dpkit.PrivacyEngine(tmp_path / "run"), None):
        engine = engine or dpkit.PrivacyEngine.resume(tmp_path / "run")
        model = model_of()
        optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
        _, _, loader = engine.make_private(
            *(model, optimizer, DataLoader(data(), batch_size=12)),
            **{"num_examples": 12, "noise_multiplier": 1.0, "target_delta": 1e-3, "steps": 4, "clipping": rule},
        )
        before = engine.steps_taken
        for x, y in loader:
            optimizer.zero_grad()
            engine.backward(F.cross_entropy(model(x), y, reduction="none"))
            optimizer.step()
            if engine.steps_taken == before + 1:
                break
        engine.save()
        engine.detach()
    assert engine.steps_taken == 2


def test_a_foreign_parameter_as_long_as_the_batch_is_no_batch(tmp_path: Path) -> None:
    model = model_of()
    engine, _, loader = attached(tmp_path, model, Flat(1.0))
    x, y = next(iter(loader))
    learnt = nn.Parameter(torch.zeros_like(x))
    with pytest.raises(UncoveredParameter, match="not a parameter of the"):
        engine.backward(F.cross_entropy(model(x) + model(learnt), y, reduction="none"))
