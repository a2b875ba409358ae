"""The methods in a run: what is charged, what the noise is, what goes on after a stop, and what is refused."""

from __future__ import annotations

import math
import random
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.data import DataLoader, Subset, TensorDataset

import accounting
import dpkit
from accounting import Budget, Relation
from dpkit.clipping import Flat, GlobalAdapt, GroupAdaptive, PerLayer, PerLayerQuantile, Quantile, Setting
from dpkit.engine import Plan, PrivacyEngine
from dpkit.engine.step import _finite_sums
from dpkit.errors import CheckpointError, InvalidArgument, OutOfOrder
from dpkit.mechanisms import BISR, BSR, BandMF, Correlated, Gaussian
from dpkit.metrics import ClippedCount, Count, Mean
from dpkit.sampling import CyclicPoisson, FixedOrder, Poisson, Sampler, Users, WithoutReplacement
from dpkit.types import ClippedSum, Released

from .runs import N, begin, dataset, mlp, resume

IN_ORDER: dict[str, Any] = {"sampler": FixedOrder(10, N), "relation": Relation.ZERO_OUT}


class Asked(TensorDataset):
    """The data set of the runs, which remembers what it was asked for."""

    def __init__(self) -> None:
        super().__init__(*dataset().tensors)
        self.rows: list[int] = []

    def __getitem__(self, index: int) -> tuple[Tensor, ...]:
        self.rows.append(index)
        return super().__getitem__(index)


def attach(
    path: Path, rows: Any = None, **settings: Any
) -> tuple[PrivacyEngine, nn.Module, torch.optim.Optimizer, Any]:
    model = mlp()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    plan: dict[str, Any] = {
        "num_examples": N,
        "noise_multiplier": 1.5,
        "target_delta": 1e-3,
        "steps": 20,
        "max_grad_norm": 1.0,
    }
    plan |= settings
    if "clipping" in settings:
        del plan["max_grad_norm"]
    if "mechanism" in settings or "target_epsilon" in settings:
        del plan["noise_multiplier"]
    engine = PrivacyEngine(path, dataset_name="made up", budget=plan.pop("budget", None))
    loader = DataLoader(dataset() if rows is None else rows, batch_size=10)
    return engine, *engine.make_private(model, optimizer, loader, **plan)


def train(engine: PrivacyEngine, model: nn.Module, optimizer: torch.optim.Optimizer, loader: Any, **kw: Any) -> int:
    """All steps that are left; returns how many."""
    steps = 0
    while engine.steps_left:
        for x, y in loader:
            optimizer.zero_grad()
            engine.backward(F.cross_entropy(model(x), y, reduction="none"), **kw)
            optimizer.step()
            steps += 1
    return steps


def watch(monkeypatch: pytest.MonkeyPatch) -> list[ClippedSum]:
    """The clipped sums that reach the Gaussian mechanism."""
    seen: list[ClippedSum] = []
    shipped = Gaussian.release

    def release(self: Gaussian, clipped: ClippedSum, state: Any, key: Any) -> Any:
        seen.append(clipped)
        return shipped(self, clipped, state, key)

    monkeypatch.setattr(Gaussian, "release", release)
    return seen


# -- queries on one batch are one event -------------------------------------------------------------------------------


def test_bits_and_gradient_together_cost_what_the_plan_says(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Andrew et al.: std of the gradient is z_Δ·C with z_Δ = (z⁻² - (2σ_b)⁻²)^(-1/2), and the accountant sees z."""
    seen = watch(monkeypatch)
    z, std = 1.5, 2.0
    run = attach(tmp_path / "run", clipping=Quantile(0.3, noise_std=std))
    train(*run)
    assert run[0].plan.event == accounting.Poisson(sample_rate=1 / 6, event=accounting.Gaussian(noise_multiplier=z))
    assert len(seen) == 20
    for clipped in seen:
        gradient, bits = clipped.queries
        [(_, bound)] = gradient.sensitivity.items()
        [of_gradient] = Gaussian(z).standard_deviations(gradient).values()
        [of_bits] = Gaussian(z).standard_deviations(bits).values()
        assert of_bits == pytest.approx(std, rel=1e-12)
        # To within what is added to sensitivities for rounding.
        assert of_gradient / bound == pytest.approx((z**-2 - (2 * std) ** -2) ** -0.5, rel=1e-6)
        joint = accounting.joint_noise_multiplier([bound, bits.sensitivity[0]], [of_gradient, of_bits])
        assert joint == pytest.approx(z, rel=1e-12)


def test_the_joint_event_of_global_adaptive_clipping_costs_what_the_specification_says() -> None:
    """Gradient of multiplier 0.8 and a count of multiplier 10 on one batch: 5.951 in RDP, not 5.909 or 5.903."""
    joint = accounting.joint_noise_multiplier([1.0, 1.0], [0.8, 10.0])

    def cost(noise_multiplier: float) -> float:
        step = accounting.Poisson(sample_rate=1 / 214, event=accounting.Gaussian(noise_multiplier=noise_multiplier))
        event = accounting.Repeated(event=step, count=12_840)
        return accounting.epsilon(event, 1e-6, relation=Relation.ADD_REMOVE, by="rdp").upper

    assert cost(joint) == pytest.approx(5.951, abs=0.005)
    assert cost(0.8) == pytest.approx(5.903, abs=0.005)
    # And a plan of that rule gives the gradient noise of 0.8 when it pays for the joint multiplier.
    plan = Plan(
        sampler=Poisson(1 / 214),
        clip=GlobalAdapt(1.0, noise_std=10.0),
        mechanism=Gaussian(joint),
        steps=12_840,
        num_examples=54_674,
        delta=1e-6,
    )
    share, _ = plan.noise_shares(plan.questions(plan.setting({"w": torch.zeros(3)})))
    assert joint / math.sqrt(share) == pytest.approx(0.8, rel=1e-4)


@pytest.mark.parametrize(
    "settings",
    [
        {"clipping": Quantile(0.3, noise_std=0.7)},
        {"clipping": PerLayerQuantile(1.0, noise_std=1.2)},
        {"clipping": GlobalAdapt(1.0, noise_std=1.4)},
        {"clipping": GroupAdaptive(1.0, num_labels=2, noise_std=1.4)},
        {"metrics": (Count("correct", noise_std=0.75),)},
        {"metrics": (Mean("loss", 2.0, 0.0, 2.0), Count("correct", noise_std=1.0))},
    ],
    ids=str,
)
def test_noise_too_small_for_the_joint_event_is_refused(settings: dict[str, Any], tmp_path: Path) -> None:
    with pytest.raises(InvalidArgument, match="leaves no precision for the gradient at noise multiplier 1.5"):
        attach(tmp_path / "run", **settings)
    assert not (tmp_path / "run").exists(), "refused before anything was made"


def test_a_replaced_unit_moves_the_bits_by_one() -> None:
    def plan(relation: Relation, sampler: Sampler) -> Plan:
        return Plan(
            sampler=sampler,
            clip=Quantile(0.3, noise_std=9.0),
            mechanism=Gaussian(1.0),
            steps=2,
            num_examples=N,
            delta=1e-3,
            relation=relation,
        )

    for relation, sampler, moved in (
        (Relation.ADD_REMOVE, Poisson(0.1), 0.5),
        (Relation.ZERO_OUT, FixedOrder(6, N), 0.5),
        (Relation.REPLACE_ONE, WithoutReplacement(6, N), 1.0),
    ):
        made = plan(relation, sampler)
        [question] = made.questions(made.setting({"w": torch.zeros(2)}))
        assert moved <= made.sensitivity_of(question) <= moved * (1 + 1e-9)


def test_padding_and_dropped_units_answer_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    seen = watch(monkeypatch)
    x, y = dataset().tensors
    x = x.clone()
    x[:20] = math.inf  # their gradients are not finite
    metrics = (Mean("loss", 50.0, 0.0, 2.0), Count("odd", 50.0), ClippedCount(50.0))
    engine, model, optimizer, loader = attach(
        tmp_path / "run", TensorDataset(x, y), clipping=Quantile(1e-6, noise_std=50.0), metrics=metrics, steps=4
    )
    counts = []
    for batch, target in loader:
        losses = F.cross_entropy(model(batch), target, reduction="none")
        engine.release_mean("loss", torch.full_like(losses, 7.0))
        engine.release_count("odd", torch.ones_like(losses))
        engine.backward(losses)
        optimizer.step()
        counts.append(engine.nonprivate.units - engine.nonprivate.dropped)
    assert sum(counts) > 0 and engine.nonprivate.units != 16
    for count, clipped in zip(counts, seen, strict=True):
        _, bits, loss, odd, scaled = (query.value for query in clipped.queries)
        assert float(bits["answer"]) == -count / 2  # all norms are above the bound
        assert float(loss["answer"]) == count  # clamped to 2, which is 1 above the middle
        assert float(odd["answer"]) == count / 2
        assert float(scaled["answer"]) == count / 2


# -- metrics ----------------------------------------------------------------------------------------------------------


def test_the_metrics_of_a_step_are_estimated_within_their_noise(tmp_path: Path) -> None:
    told: list[Any] = []

    class Callback(dpkit.callbacks.Callback):
        def on_metrics(self, record: Any, metrics: Any) -> None:
            told.append(dict(metrics))

    model = mlp()
    engine = PrivacyEngine(tmp_path / "run", callbacks=[Callback()])
    model, optimizer, loader = engine.make_private(
        model,
        torch.optim.SGD(model.parameters(), lr=0.0),
        DataLoader(dataset(), batch_size=N),
        num_examples=N,
        noise_multiplier=1.0,
        target_delta=1e-3,
        steps=60,
        max_grad_norm=1.0,
        metrics=(Mean("loss", 6.0, 0.0, 3.0), Count("correct", 6.0), ClippedCount(6.0)),
    )
    x, y = dataset().tensors
    with torch.no_grad():
        losses, hits = F.cross_entropy(model(x), y, reduction="none"), (model(x).argmax(1) == y).sum()
    for _ in range(60):
        for batch, target in loader:
            output = model(batch)
            of_batch = F.cross_entropy(output, target, reduction="none")
            engine.release_mean("loss", of_batch)
            engine.release_count("correct", output.argmax(1) == target)
            engine.backward(of_batch)
            optimizer.step()
    assert len(told) == 60 and told[-1] == engine.released
    # Means of 60 estimates with noise of std 6/60 and 6; 7 standard errors: false alarm below 1e-11.
    mean = {name: sum(one[name] for one in told) / 60 for name in told[0]}
    assert mean["loss"] == pytest.approx(float(losses.clamp(0, 3).mean()), abs=7 * 0.1 / math.sqrt(60))
    assert mean["correct"] == pytest.approx(float(hits), abs=7 * 6 / math.sqrt(60))
    assert mean["clipped"] == pytest.approx(engine.nonprivate.clipped, abs=7 * 6 / math.sqrt(60))
    assert engine.epsilon().upper == pytest.approx(
        accounting.epsilon(
            accounting.Repeated(accounting.Gaussian(noise_multiplier=1.0), 60), 1e-3, relation=Relation.ADD_REMOVE
        ).upper
    )


def test_a_metric_that_was_promised_must_be_given_once_for_each_unit(tmp_path: Path) -> None:
    engine, model, optimizer, loader = attach(tmp_path / "run", metrics=(Mean("loss", 20.0, 0.0, 2.0),))
    with pytest.raises(OutOfOrder, match="no private batch"):
        engine.release_mean("loss", torch.zeros(10))
    for x, y in loader:
        losses = F.cross_entropy(model(x), y, reduction="none")
        with pytest.raises(OutOfOrder, match="releases loss in every step"):
            engine.backward(losses)
        with pytest.raises(InvalidArgument, match="one value for each"):
            engine.release_mean("loss", losses[:-1])
        with pytest.raises(InvalidArgument, match="which fixes its kind, range and noise"):
            engine.release_mean("loss", losses, lower=0.0, upper=1.0, noise_multiplier=1.0)
        with pytest.raises(InvalidArgument, match="which fixes its kind"):
            engine.release_count("loss", losses)
        engine.release_mean("loss", losses)
        with pytest.raises(OutOfOrder, match="given for this batch already"):
            engine.release_mean("loss", losses)
        engine.backward(losses)
        optimizer.step()
        break
    assert engine.steps_taken == 1


def test_a_release_of_its_own_is_charged_as_a_plan_of_its_own(tmp_path: Path) -> None:
    engine, model, optimizer, loader = attach(tmp_path / "run", budget=Budget(epsilon=50.0, delta=1e-2))
    with pytest.raises(OutOfOrder, match="before the first step"):
        engine.release_count("all", torch.ones(N), noise_multiplier=3.0)
    first = next(iter(loader))
    engine.backward(F.cross_entropy(model(first[0]), first[1], reduction="none"))
    optimizer.step()
    before = engine.epsilon().upper
    assert engine.statement().epsilon == accounting.round_up(before)
    committed = engine.statement().committed_epsilon
    hits = torch.ones(N)
    found = engine.release_count("all", hits, noise_multiplier=3.0)
    assert found == pytest.approx(N, abs=7 * 1.5)
    loss = engine.release_mean("loss", torch.full((N,), 9.0), lower=0.0, upper=2.0, noise_multiplier=3.0)
    assert loss == pytest.approx(2.0, abs=7 * 3 / N)
    plans = engine.ledger.plans()
    assert [(plan.steps, charged) for plan, charged in plans] == [(20, 1), (1, 1), (1, 1)]
    each = accounting.epsilon(accounting.Gaussian(noise_multiplier=3.0), 1e-3, relation=Relation.ADD_REMOVE).upper
    assert engine.statement().epsilon == pytest.approx(committed + 2 * each, rel=1e-3)
    # What callbacks are told of the run counts these releases, too.
    assert engine.epsilon().upper == pytest.approx(before + 2 * each)
    record = engine._require_attached().step_record()
    assert record.epsilon == accounting.round_up(before + 2 * each)
    assert record.delta == pytest.approx(3e-3)
    train(engine, model, optimizer, loader)
    assert engine.steps_taken == 20


def test_a_release_of_its_own_needs_room_in_the_budget_and_every_unit(tmp_path: Path) -> None:
    engine, *_ = attach(tmp_path / "run")  # the budget is what the plan costs
    train(engine, *_)
    with pytest.raises(accounting.BudgetExceeded):
        engine.release_count("all", torch.ones(N), noise_multiplier=1.0)
    for values, extra, message in (
        (torch.ones(N - 1), {"noise_multiplier": 1.0}, "takes one value for each"),
        (torch.ones(N), {}, "give noise_multiplier="),
        (torch.ones(N), {"noise_multiplier": 0.0}, "noise_multiplier is 0.0"),
    ):
        with pytest.raises(InvalidArgument, match=message):
            engine.release_count("all", values, **extra)
    with pytest.raises(InvalidArgument, match="give lower= and upper="):
        engine.release_mean("loss", torch.ones(N), noise_multiplier=1.0)
    with pytest.raises(InvalidArgument, match=r"range \[2.0, 1.0\]"):
        engine.release_mean("loss", torch.ones(N), lower=2.0, upper=1.0, noise_multiplier=1.0)
    assert len(engine.ledger.plans()) == 1


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: Mean("", 1.0), "give it a name"),
        (lambda: Mean("loss", 0.0), "noise_std of the metric 'loss' is 0.0"),
        (lambda: Mean("loss", 1.0, 0.0, math.inf), "range"),
        (lambda: Mean("loss", 1.0, -1.7e308, 1.7e308), "range"),
        (lambda: Count("hits", math.nan), "noise_std"),
    ],
)
def test_metrics_without_a_meaning_are_refused(make: Callable[[], object], message: str) -> None:
    with pytest.raises(InvalidArgument, match=message):
        make()


def test_two_metrics_of_one_name_are_refused(tmp_path: Path) -> None:
    with pytest.raises(InvalidArgument, match="each needs a name of its own"):
        attach(tmp_path / "run", metrics=(Count("a", 9.0), Mean("a", 9.0)))


# -- labels -----------------------------------------------------------------------------------------------------------


def test_groups_are_clipped_to_bounds_of_their_own_in_both_forms(tmp_path: Path) -> None:
    engine, model, optimizer, loader = attach(tmp_path / "loop", clipping=GroupAdaptive(0.1, 3, noise_std=9.0))
    for x, y in loader:
        losses = F.cross_entropy(model(x), y, reduction="none")
        with pytest.raises(InvalidArgument, match="needs one whole number for each unit"):
            engine.backward(losses)
        with pytest.raises(InvalidArgument, match="of shape"):
            engine.backward(losses, labels=y[:-1])
        engine.backward(losses, labels=y)
        optimizer.step()
        break
    assert engine.steps_taken == 1
    model, rows = mlp(), dataset()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    other = PrivacyEngine(tmp_path / "step")
    plan = Plan(
        sampler=Poisson(0.2),
        clip=GroupAdaptive(0.1, 3, noise_std=9.0),
        mechanism=Gaussian(1.5),
        steps=3,
        num_examples=N,
        delta=1e-3,
    )
    step = other.attach(
        model,
        lambda net, batch: F.cross_entropy(net(batch[0]), batch[1], reduction="none"),
        optimizer,
        plan=plan,
        dataset=rows,
        labels=lambda batch: batch[1],
        max_physical_batch_size=16,
    )
    for batch in other.batches():
        step(batch)
    assert other.steps_taken == 3


def test_a_label_outside_of_the_declared_ones_ends_the_run(tmp_path: Path) -> None:
    engine, model, optimizer, loader = attach(tmp_path / "run", clipping=GroupAdaptive(0.1, 2, noise_std=9.0))
    with pytest.raises(InvalidArgument, match="outside of the 2 declared ones"):
        for x, y in loader:
            engine.backward(F.cross_entropy(model(x), y, reduction="none"), labels=y)
            optimizer.step()
    with pytest.raises(OutOfOrder, match="an earlier batch of this run failed"):
        next(iter(loader))


def test_labels_that_nobody_asked_for_are_refused(tmp_path: Path) -> None:
    engine, model, _, loader = attach(tmp_path / "run")
    for x, y in loader:
        with pytest.raises(InvalidArgument, match="has no use for any"):
            engine.backward(F.cross_entropy(model(x), y, reduction="none"), labels=y)
        break


# -- samplers ---------------------------------------------------------------------------------------------------------


def test_a_pass_in_fixed_order_is_charged_as_one_release_when_it_begins(tmp_path: Path) -> None:
    engine, *rest = attach(tmp_path / "run", **IN_ORDER)
    assert train(engine, *rest) == 20
    [(record, charged)] = engine.ledger.plans()
    assert (record.steps_per_event, charged) == (6, 20)
    one = accounting.Gaussian(noise_multiplier=1.5)
    for steps, passes in ((1, 1), (6, 1), (7, 2), (20, 4)):
        expected = accounting.epsilon(accounting.Repeated(one, passes), 1e-3, relation=Relation.ZERO_OUT)
        assert engine.plan.epsilon(steps).upper == pytest.approx(expected.upper, rel=1e-9)
        assert accounting.ledger.epsilon_of(record, steps).upper == pytest.approx(expected.upper, rel=1e-9)
    assert "6 consecutive steps count as one such release" in str(engine.statement())


@pytest.mark.parametrize("workers", [0, 2])
def test_a_pass_that_was_left_goes_on_where_it_stopped(tmp_path: Path, workers: int) -> None:
    """Batches that were drawn ahead and never charged are not skipped: that would shorten the distance of a unit."""
    model = mlp()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    order = torch.arange(N)
    rows = TensorDataset(*dataset().tensors, order)
    engine = PrivacyEngine(tmp_path / "run")
    model, optimizer, loader = engine.make_private(
        model,
        optimizer,
        DataLoader(rows, batch_size=10, num_workers=workers),
        num_examples=N,
        noise_multiplier=1.5,
        target_delta=1e-3,
        steps=20,
        max_grad_norm=1.0,
        **IN_ORDER,
    )
    taken: list[list[int]] = []
    for length in (2, 6, 1, 3, 6, 6, 6):
        for number, (x, y, index) in enumerate(loader):
            engine.backward(F.cross_entropy(model(x), y, reduction="none"))
            optimizer.step()
            optimizer.zero_grad()
            taken.append(sorted(index[:10].tolist()))
            if number + 1 == length:
                break
    assert len(taken) == 20
    for step in range(14):
        assert taken[step] == taken[step + 6]
    assert sorted(row for batch in taken[:6] for row in batch) == list(range(N))


def test_steps_that_are_taken_again_use_the_next_batches(tmp_path: Path) -> None:
    """The ledger is the clock: after a crash no unit takes part twice within the steps of one charged pass."""
    asked = Asked()

    def go_on(engine: PrivacyEngine, parts: tuple[Any, ...], steps: int) -> None:
        model, optimizer, loader = parts
        while steps:
            for x, y in loader:
                engine.backward(F.cross_entropy(model(x), y, reduction="none"))
                optimizer.step()
                optimizer.zero_grad()
                steps -= 1
                if not steps:
                    break

    def fresh(engine: PrivacyEngine) -> tuple[Any, ...]:
        model = mlp()
        return engine.make_private(
            model,
            torch.optim.SGD(model.parameters(), lr=0.1),
            DataLoader(asked, batch_size=10),
            num_examples=N,
            noise_multiplier=1.5,
            target_delta=1e-3,
            steps=20,
            max_grad_norm=1.0,
            **IN_ORDER,
        )

    engine = PrivacyEngine(tmp_path / "run")
    parts = fresh(engine)
    asked.rows.clear()
    go_on(engine, parts, 2)
    engine.save()
    go_on(engine, parts, 2)
    for _ in range(2):  # killed twice after two more steps, and resumed from the same old checkpoint
        engine.detach()
        engine.ledger.close()
        taken, asked.rows = asked.rows, []
        engine = PrivacyEngine.resume(tmp_path / "run")
        parts = fresh(engine)
        asked.rows = taken
        go_on(engine, parts, 2)
    assert len(asked.rows) == 80
    for first in (0, 6):
        within = asked.rows[first * 10 : (first + 6) * 10]
        assert len(set(within)) == len(within), "a unit took part twice in a pass that was charged once"


def test_a_sampler_of_another_batch_size_or_data_set_is_refused(tmp_path: Path) -> None:
    with pytest.raises(InvalidArgument, match="the DataLoader's batch_size is 10"):
        attach(tmp_path / "a", sampler=Poisson(0.5))
    with pytest.raises(InvalidArgument, match="need the exact, public size"):
        attach(tmp_path / "b", sampler=FixedOrder(10, N - 1), relation=Relation.ZERO_OUT, num_examples=N)
    with pytest.raises(accounting.Unsupported, match="one_pass under add_remove"):
        attach(tmp_path / "c", sampler=FixedOrder(10, N))
    with pytest.raises(accounting.Unsupported, match="without_replacement under add_remove"):
        attach(tmp_path / "d", sampler=WithoutReplacement(10, N))
    with pytest.raises(accounting.Unsupported, match="poisson sampling under replace_one"):
        attach(tmp_path / "e", relation=Relation.REPLACE_ONE)


@pytest.mark.parametrize(
    ("sampler", "relation"),
    [
        (FixedOrder(10, N), Relation.REPLACE_ONE),
        (WithoutReplacement(10, N), Relation.REPLACE_ONE),
    ],
    ids=str,
)
def test_batches_with_a_largest_size_are_cut_into_microbatches(
    sampler: Sampler, relation: Relation, tmp_path: Path
) -> None:
    engine, *rest = attach(tmp_path / "run", sampler=sampler, relation=relation, max_physical_batch_size=4, steps=6)
    assert len(rest[2]) == 6 * 3
    train(engine, *rest)
    assert engine.steps_taken == 6


def test_users_are_the_unit_of_a_run_over_users(tmp_path: Path) -> None:
    x, y = dataset().tensors
    users = Users(TensorDataset(x, y), torch.arange(N) // 3, rows_per_user=2)
    model = mlp()
    engine = PrivacyEngine(tmp_path / "run")
    model, optimizer, loader = engine.make_private(
        model,
        torch.optim.SGD(model.parameters(), lr=0.1),
        DataLoader(users, batch_size=5),
        num_examples=20,
        noise_multiplier=1.5,
        target_delta=1e-3,
        epochs=1,
        max_grad_norm=1.0,
        rows_per_unit=2,
    )
    for (inputs, targets), weights in loader:
        losses = F.cross_entropy(model(inputs.flatten(0, 1)), targets.flatten(), reduction="none") * weights.flatten()
        engine.backward(losses, units=torch.arange(len(inputs)).repeat_interleave(2))
        optimizer.step()
        optimizer.zero_grad()
    assert engine.steps_taken == 4
    assert engine.statement().unit == "user"
    assert engine.plan.unit == "user"


# -- correlated noise -------------------------------------------------------------------------------------------------


def test_a_run_with_correlated_noise_costs_one_release_from_its_first_step(tmp_path: Path) -> None:
    engine, *rest = attach(tmp_path / "run", mechanism=Correlated(1.5, BISR(4)), **IN_ORDER)
    alone = accounting.epsilon(accounting.Gaussian(1.5), 1e-3, relation=Relation.ZERO_OUT).upper
    train(engine, *rest)
    [(record, charged)] = engine.ledger.plans()
    assert (record.steps_per_event, record.event.kind, charged) == (20, "matrix_mechanism", 20)
    assert engine.plan.epsilon(1).upper == pytest.approx(alone, rel=1e-9)
    assert engine.epsilon().upper == pytest.approx(alone, rel=1e-9)


def test_the_target_is_met_by_mechanisms_of_every_kind(tmp_path: Path) -> None:
    for number, (make, settings) in enumerate(
        (
            (Gaussian, {}),
            (lambda z: Correlated(z, BISR(4)), IN_ORDER),
            (lambda z: Correlated(z, BandMF(3)), {"sampler": CyclicPoisson(1 / 6, 3)}),
        )
    ):
        engine, *_ = attach(tmp_path / str(number), target_epsilon=2.0, mechanism=make, **settings)
        assert 1.99 < engine.plan.epsilon().upper <= 2.0
    with pytest.raises(InvalidArgument, match="goes with target_epsilon"):
        attach(tmp_path / "none", mechanism=Gaussian)


def test_correlated_noise_under_batches_that_do_not_match_is_refused(tmp_path: Path) -> None:
    for number, (strategy, settings) in enumerate(
        ((BISR(4), {}), (BSR(4), {"sampler": CyclicPoisson(1 / 6, 3)}), (BISR(2), {"sampler": CyclicPoisson(1 / 6, 3)}))
    ):
        with pytest.raises(InvalidArgument, match="noise that is shared by the two is not accounted for"):
            attach(tmp_path / str(number), mechanism=Correlated(1.5, strategy), **settings)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"mechanism": Correlated(1.5, BISR(4)), **IN_ORDER}, "remembers noise"),
        ({"sampler": CyclicPoisson(1 / 6, 3)}, "drew something for the whole run"),
    ],
    ids=str,
)
def test_what_no_checkpoint_may_hold_is_not_resumed(settings: dict[str, Any], message: str, tmp_path: Path) -> None:
    first, _model, _optimizer, _ = attach(tmp_path / "run", **settings)
    first.save()
    first.detach()
    first.ledger.close()
    engine = PrivacyEngine.resume(tmp_path / "run")
    model = mlp()
    plan = {"noise_multiplier": 1.5} if "mechanism" not in settings else {}
    with pytest.raises(CheckpointError, match=message):
        engine.make_private(
            model,
            torch.optim.SGD(model.parameters(), lr=0.1),
            DataLoader(dataset(), batch_size=10),
            num_examples=N,
            target_delta=1e-3,
            steps=20,
            max_grad_norm=1.0,
            **plan,
            **settings,
        )


# -- checkpoints of rules ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "rule",
    [
        Quantile(0.3, noise_std=9.0),
        PerLayerQuantile(1.0, noise_std=9.0),
        GlobalAdapt(0.5, noise_std=9.0),
        PerLayer(1.0),
    ],
    ids=lambda rule: type(rule).__name__,
)
def test_what_a_rule_has_learnt_goes_on_after_a_stop(rule: Any, tmp_path: Path) -> None:
    first = begin(tmp_path / "run", clipping=rule, max_grad_norm=None).train(7, save=True)
    learnt = first.engine._require_attached()._state.rule
    assert learnt != rule.init(first.engine.plan.setting(dict(first.model.named_parameters()))) or rule == PerLayer(1.0)
    first.leave()
    second = resume(tmp_path / "run", clipping=rule, max_grad_norm=None)
    assert second.engine._require_attached()._state.rule == learnt
    second.train()
    assert second.engine.steps_taken == 20


# -- what the statement says ------------------------------------------------------------------------------------------


def test_the_statement_names_what_the_loop_says_of_each_unit(tmp_path: Path) -> None:
    engine, *rest = attach(
        tmp_path / "run", clipping=GroupAdaptive(0.1, 3, noise_std=9.0), metrics=(Count("correct", 20.0),), steps=1
    )
    model, optimizer, loader = rest
    for x, y in loader:
        losses = F.cross_entropy(model(x), y, reduction="none")
        engine.release_count("correct", torch.ones_like(losses))
        engine.backward(losses, labels=y)
        optimizer.step()
    told = engine.statement()
    assert "Assumed: the label of each example depends on that example alone." in told.caveats
    assert "Assumed: the value for 'correct' of each example depends on that example alone." in told.caveats
    assert told.plans[0].max_grad_norm == "0.2 at the start, then as the rule learns"


@pytest.mark.parametrize("reduction", ["mean", "sum"])
def test_metrics_join_loops_that_reduce_their_loss(reduction: str, tmp_path: Path) -> None:
    metrics = (Mean("loss", 20.0, 0.0, 2.0),)
    engine, model, optimizer, loader = attach(tmp_path / "run", metrics=metrics, loss_reduction=reduction, steps=3)
    for x, y in loader:
        losses = F.cross_entropy(model(x), y, reduction="none")
        engine.release_mean("loss", losses)
        getattr(losses, reduction)().backward()
        optimizer.step()
        optimizer.zero_grad()
        assert engine.released.keys() == {"loss"}
    assert engine.steps_taken == 3


def test_metrics_join_the_functional_form_over_microbatches(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    seen = watch(monkeypatch)
    model = mlp()
    engine = PrivacyEngine(tmp_path / "run")
    plan = Plan(
        sampler=Poisson(1.0),
        clip=PerLayer(1.0),
        mechanism=Gaussian(1.5),
        steps=2,
        num_examples=N,
        delta=1e-3,
        metrics=(Count("first class", 20.0), ClippedCount(20.0)),
    )

    def loss_of(net: nn.Module, batch: Any) -> Tensor:
        return F.cross_entropy(net(batch[0]), batch[1], reduction="none")

    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    step = engine.attach(model, loss_of, optimizer, plan=plan, dataset=dataset(), max_physical_batch_size=16)
    for batch in engine.batches():
        with pytest.raises(OutOfOrder, match="releases first class in every step"):
            step(batch)
        engine.release_count("first class", batch[1] == 0)
        step(batch)
    zeros = int((dataset().tensors[1] == 0).sum())
    for clipped in seen:
        assert float(clipped.queries[1].value["answer"]) == zeros - N / 2


# -- slips of those who write members and loops -----------------------------------------------------------------------


def test_a_run_over_users_says_so_or_is_refused(tmp_path: Path) -> None:
    x, y = dataset().tensors
    users = Users(TensorDataset(x, y), torch.arange(N) // 3, rows_per_user=2)
    for number, rows in enumerate((users, Subset(users, range(20)))):
        plan = Plan(sampler=Poisson(0.2), clip=Flat(1.0), mechanism=Gaussian(1.5), steps=2, num_examples=20, delta=1e-3)
        model = mlp()

        def loss_of(net: nn.Module, batch: Any) -> Tensor:
            (inputs, targets), weights = batch
            losses = F.cross_entropy(net(inputs.flatten(0, 1)), targets.flatten(), reduction="none")
            return (losses.view(weights.shape) * weights).sum(1)

        engine = PrivacyEngine(tmp_path / str(number))
        with pytest.raises(InvalidArgument, match="what is protected is one user"):
            engine.attach(model, loss_of, torch.optim.SGD(model.parameters(), lr=0.1), plan=plan, dataset=rows)
        with pytest.raises(InvalidArgument, match="what is protected is one user"):
            attach(tmp_path / f"loop {number}", rows, unit="example", num_examples=20)
        engine, *_ = attach(tmp_path / f"said {number}", rows, num_examples=20, rows_per_unit=2)
        assert engine.plan.unit == "user"


@pytest.mark.parametrize("settings", [{}, {"max_physical_batch_size": 4}], ids=str)
def test_batches_of_two_passes_never_mix(settings: dict[str, Any], tmp_path: Path) -> None:
    engine, model, optimizer, loader = attach(tmp_path / "run", **settings)
    first, second = iter(loader), iter(loader)
    next(first)
    x, y = next(second)
    engine.backward(F.cross_entropy(model(x), y, reduction="none"))
    optimizer.step()
    optimizer.zero_grad()
    with pytest.raises(OutOfOrder, match="of a pass that is over"):
        next(first)


class _Loud(Count):
    """A metric that does not keep its own bound."""

    def contributions(self, values: Tensor) -> Tensor:
        return torch.full_like(values, 1000.0, dtype=torch.float64)


class _Wide(Quantile):
    """A rule whose answers have one column, and are asked for three."""

    def questions(self, setting: Any) -> Any:
        return (super().questions(setting)[0]._replace(size=3),)


def test_answers_beyond_their_bound_are_scaled_to_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    seen = watch(monkeypatch)
    engine, model, optimizer, loader = attach(tmp_path / "run", metrics=(_Loud("loud", 20.0),), steps=3)
    counts = []
    for x, y in loader:
        losses = F.cross_entropy(model(x), y, reduction="none")
        engine.release_count("loud", losses)
        engine.backward(losses)
        optimizer.step()
        counts.append(engine.nonprivate.units)
    for count, clipped in zip(counts, seen, strict=True):
        assert float(clipped.queries[1].value["answer"]) == pytest.approx(count / 2)


def test_answers_of_another_width_are_refused(tmp_path: Path) -> None:
    engine, *rest = attach(tmp_path / "run", clipping=_Wide(0.3, noise_std=9.0))
    with pytest.raises(InvalidArgument, match="one row of its size for each unit"):
        train(engine, *rest)


class _Silent:
    """A mechanism of somebody who has not read the protocol."""

    noise_multiplier = 1.0

    def release(self, clipped: Any, state: Any, key: Any) -> Any: ...


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"mechanism": _Silent()}, "mechanism is .*_Silent.*, which has no event, init, scale"),
        ({"clipping": "flat"}, "clip is 'flat', which has no answers, bounds"),
        ({"sampler": 3}, "sampler is 3, which has no arrange"),
        ({"filters": ("low pass",)}, "filters is 'low pass', which has no init, update"),
        ({"metrics": "loss"}, "metrics is 'loss'; give a tuple"),
        ({"metrics": Mean("loss", 9.0)}, r"metrics is Mean\(.*; give a tuple"),
        ({"metrics": (Count("a", 1e170),)}, "positive numbers of ordinary size"),
        ({"clipping": Quantile(0.3, noise_std=1e200)}, "positive numbers of ordinary size"),
    ],
    ids=range(8),
)
def test_what_is_no_member_is_refused_before_anything_is_charged(
    settings: dict[str, Any], message: str, tmp_path: Path
) -> None:
    with pytest.raises(InvalidArgument, match=message):
        attach(tmp_path / "run", **settings)
    assert not (tmp_path / "run" / "ledger.sqlite").exists()


def test_a_filter_changes_the_gradient_and_nothing_else(tmp_path: Path) -> None:
    halves = dpkit.filters.FilterOf(
        init=lambda parameters: 0,
        update=lambda released, state: (Released({name: g / 2 for name, g in released.value.items()}), state),
    )
    metrics = (Count("all", 20.0),)
    engine, model, optimizer, loader = attach(tmp_path / "run", filters=[halves], metrics=metrics, steps=2)
    for x, y in loader:
        losses = F.cross_entropy(model(x), y, reduction="none")
        engine.release_count("all", torch.ones_like(losses))
        engine.backward(losses)
        optimizer.step()
        assert engine.released.keys() == {"all"}


def test_labels_and_rules_that_do_not_fit_are_refused_when_they_are_attached(tmp_path: Path) -> None:
    for rule, labels, message in (
        (GroupAdaptive(0.1, 3, noise_std=9.0), None, "needs the label of each unit"),
        (Flat(1.0), lambda batch: batch[1], "has no use for any"),
    ):
        plan = Plan(sampler=Poisson(0.2), clip=rule, mechanism=Gaussian(1.5), steps=2, num_examples=N, delta=1e-3)
        model = mlp()
        with pytest.raises(InvalidArgument, match=message):
            PrivacyEngine(tmp_path / "run").attach(
                model,
                lambda net, batch: F.cross_entropy(net(batch[0]), batch[1], reduction="none"),
                torch.optim.SGD(model.parameters(), lr=0.1),
                plan=plan,
                dataset=dataset(),
                labels=labels,
            )


def test_numbers_that_are_none_count_for_nothing() -> None:
    assert Count("a", 1.0).contributions(torch.tensor([math.nan, 0.0, 2.0])).tolist() == [0.0, -0.5, 0.5]
    assert Mean("a", 1.0, 0.0, 4.0).contributions(torch.tensor([math.nan, math.inf, -math.inf])).tolist() == [0, 2, -2]


def test_a_learning_rate_out_of_all_reason_leaves_a_bound() -> None:
    rule = Quantile(0.3, learning_rate=600.0)
    state = rule.init(Setting((1,), 10.0))
    for answer in (-1e6, 1e6, 1e6, math.inf, -math.inf):
        state = rule.update(state, [torch.tensor([answer])])
        assert 0 < state.quantiles[0] < math.inf


class _Draws(TensorDataset):
    """A data set that augments: each item holds what the generators of its process drew for it."""

    def __init__(self) -> None:
        super().__init__(torch.zeros(N, 5), torch.zeros(N, dtype=torch.int64))

    def __getitem__(self, index: int) -> tuple[Tensor, ...]:
        drawn = [torch.rand(()).item(), np.random.rand(), random.random()]
        return torch.tensor([*drawn, 0.0, 0.0]), self.tensors[1][index]


@pytest.mark.parametrize("workers", [0, 1])
def test_what_a_data_set_draws_in_a_certified_run_is_known_to_nobody(tmp_path: Path, workers: int) -> None:
    """What is drawn for a row depends on how many rows came before it: a known seed would show who is missing."""
    drawn = []
    for run, seed in (("a", None), ("b", None), ("c", 5), ("d", 5)):
        model = mlp()
        engine = PrivacyEngine(tmp_path / run, seed=seed)
        torch.manual_seed(0)
        random.seed(0)
        np.random.seed(0)
        known = torch.Generator().manual_seed(0)
        _, _, loader = engine.make_private(
            model,
            torch.optim.SGD(model.parameters(), lr=0.1),
            DataLoader(_Draws(), batch_size=20, num_workers=workers, generator=known),
            num_examples=N,
            noise_multiplier=1.5,
            target_delta=1e-3,
            steps=2,
            max_grad_norm=1.0,
        )
        x, _ = next(iter(loader))
        drawn.append(x[:, :3])
        engine.detach()
    first, second, third, fourth = drawn
    rows = min(len(first), len(second))
    for kind in range(3):
        assert not torch.equal(first[:rows, kind], second[:rows, kind]), kind
    assert torch.equal(third, fourth)


class _Products:
    """Per-sample gradients u_b·v_b, of which the first factor is scaled: as a layer's activations may be."""

    def __init__(self, u: Tensor, v: Tensor) -> None:
        self.u, self.v, self.size = u, v, len(u)

    def weighted_sum(self, weights: dict[str, Tensor]) -> list[tuple[str, Tensor]]:
        return [("w", ((weights["w"] * self.u)[:, None] * self.v[:, None]).sum(0))]

    def select(self, keep: Tensor) -> Any:
        return _Products(self.u[keep], self.v[keep])


@pytest.mark.parametrize("poison", [[3], [0, 6], [0, 1, 2, 3, 4, 5, 6]], ids=str)
def test_a_unit_whose_product_leaves_the_range_on_the_way_adds_nothing(poison: list[int]) -> None:
    u, v = torch.linspace(1, 2, 7), torch.linspace(-1, 1, 7)
    u[poison], v[poison] = 1e35, 1e-40  # the product is 1e-5, and 2^20 times the first factor is infinite
    weights = {"w": torch.full((7,), 2.0**20)}
    [(_, naive)] = _Products(u, v).weighted_sum(weights)
    assert not bool(naive.isfinite().all())
    sums = dict(_finite_sums(_Products(u, v), weights))  # pyright: ignore[reportArgumentType]
    others = [unit for unit in range(7) if unit not in poison]
    if others:
        assert torch.allclose(sums["w"], (2.0**20 * u[others] * v[others]).sum()[None])
    else:
        assert all(bool((total == 0).all()) for total in sums.values())
