"""``dpkit audit engine``: a bound beside the claim, exit code 3 for a contradiction, and refusals by name."""

from __future__ import annotations

import sqlite3
from contextlib import closing
from pathlib import Path

import pytest
import torch
from torch import nn
from torch.nn.functional import cross_entropy
from torch.utils.data import TensorDataset

import accounting
import dpkit as package
from dpkit.mechanisms import gaussian

from .conftest import Run

FULL = ("--noise-multiplier", "4.835", "--sample-rate", "1", "--steps", "5", "--delta", "1e-5")
FEW = ("--canaries", "3000", "--seed", "1")


def trained(folder: Path, mechanism=None, sampler=None, seed: int | None = None, **settings) -> Path:
    """A run folder with two steps charged."""
    model = nn.Linear(3, 2)
    engine = package.PrivacyEngine(folder, dataset_name="patients", seed=seed)
    plan = package.Plan(
        sampler=sampler or package.Poisson(0.5),
        clip=package.clipping.Flat(1.0),
        mechanism=mechanism or package.Gaussian(1.5),
        steps=4,
        num_examples=30,
        delta=1e-5,
        **settings,
    )
    step = engine.attach(
        model,
        lambda model, batch: cross_entropy(model(batch[0]), batch[1], reduction="none"),
        torch.optim.SGD(model.parameters(), lr=0.1),
        plan=plan,
        dataset=TensorDataset(torch.randn(30, 3), torch.randint(2, (30,))),
    )
    for batch, _ in zip(engine.batches(), range(2), strict=False):
        step(batch)
    engine.detach()
    engine.ledger.close()
    return folder


def test_the_engine_is_not_contradicted(dpkit: Run):
    """False-alarm probability 1e-6: the confidence that is asked for."""
    done = dpkit("audit", "engine", *FULL, *FEW, "--confidence", "0.999999", "--json")
    claim = accounting.epsilon(accounting.Gaussian(4.835 / 5**0.5), 1e-5, relation="zero_out").upper
    assert done.code == 0
    assert done.json["claim"] == accounting.round_up(claim)
    assert 0.3 * claim < done.json["epsilon"] <= done.json["claim"]
    assert not done.json["contradicted"] and len(done.json["exercised"]) == 4
    assert done.json["bounds"] == [done.json["epsilon"]]


def test_too_little_noise_ends_with_exit_code_three(dpkit: Run, monkeypatch: pytest.MonkeyPatch):
    shipped = gaussian._add_noise
    monkeypatch.setattr(gaussian, "_add_noise", lambda value, std, generator: shipped(value, 0.7 * std, generator))
    done = dpkit("audit", "engine", *FULL, *FEW)
    assert done.code == 3 and done.out.startswith("CONTRADICTED")


def test_a_typed_claim_is_contradicted_and_several_audits_share_the_risk(dpkit: Run):
    done = dpkit("audit", "engine", *FULL, *FEW, "--claim", "0.5", "--repeats", "3", "--json")
    assert done.code == 3 and len(set(done.json["bounds"])) == 3
    assert done.json["epsilon"] == max(done.json["bounds"])
    assert done.json["confidence"] == pytest.approx(1 - 0.001 / 3)


def test_the_plan_and_the_claim_of_a_run_are_those_of_its_ledger(dpkit: Run, tmp_path: Path):
    run = trained(tmp_path / "run", package.HardenedGaussian(1.5))
    stated = dpkit("epsilon", run, "--json").json
    done = dpkit("audit", "engine", run, *FEW, "--confidence", "0.999999", "--json")
    assert done.code == 0
    assert done.json["claim"] == stated["committed_epsilon"]
    assert "HardenedGaussian" in done.json["claim_source"] and str(run) in done.json["claim_source"]
    assert done.json["certified"] is True


def test_a_seeded_run_is_never_called_certified(dpkit: Run, tmp_path: Path):
    done = dpkit("audit", "engine", trained(tmp_path / "run", seed=1), *FEW)
    assert "CERTIFIED: NO" in done.out


def test_batches_that_are_cut_are_audited_as_poisson_batches_and_that_is_said(dpkit: Run, tmp_path: Path):
    run = trained(tmp_path / "run", sampler=package.TruncatedPoisson(0.5, 28))
    done = dpkit("audit", "engine", run, *FEW, "--confidence", "0.999999")
    assert done.code == 0 and "not cut" in done.out


def test_a_plan_that_canaries_cannot_audit_is_refused(dpkit: Run, tmp_path: Path):
    order = package.FixedOrder(10, 30)
    done = dpkit("audit", "engine", trained(tmp_path / "run", sampler=order, relation=accounting.Relation.ZERO_OUT))
    assert done.code == 1 and "Poisson or full batches" in done.err


def test_steps_that_share_an_event_are_not_audited_as_poisson_batches(dpkit: Run, tmp_path: Path):
    cyclic = trained(tmp_path / "run", sampler=package.CyclicPoisson(0.1, groups=2))
    done = dpkit("audit", "engine", cyclic)
    assert done.code == 1 and "Poisson or full batches" in done.err


def test_the_rule_of_a_run_is_not_audited_and_that_is_said(dpkit: Run, tmp_path: Path):
    assert "whatever rule the run had" in dpkit("audit", "engine", trained(tmp_path / "run"), *FEW).out


def test_a_ledger_that_was_changed_is_not_audited(dpkit: Run, tmp_path: Path):
    ledger = trained(tmp_path / "run") / "ledger.sqlite"
    with closing(sqlite3.connect(ledger)) as connection:
        connection.execute("UPDATE entries SET body = replace(body, '1.5', '2.5')")
        connection.commit()
    assert dpkit("audit", "engine", ledger).code == 4


@pytest.mark.parametrize(
    ("options", "named"),
    [
        (("--canaries", "10"), "--canaries"),
        (("--repeats", "0"), "--repeats"),
        (("--confidence", "1"), "--confidence"),
        (("--confidence", "0.4"), "--confidence"),
        (("--canaries", "99999999999"), "--canaries"),
        (("--claim", "inf"), "--claim"),
        (("--max-grad-norm", "1e-46"), "see nothing"),
        (("--confidence", "nan"), "--confidence"),
        (("--claim", "-1"), "--claim"),
        (("--tier", "best"), "--tier"),
        (("--max-grad-norm", "0"), "max_grad_norm"),
        (("--noise-multiplier", "1"), "missing"),
        (("--plot", "picture.txt"), ".png"),
        (("--plot", "missing/folder/picture.png"), "folder"),
        (("nowhere",), "nowhere"),
    ],
)
def test_wrong_input_is_refused_by_name(dpkit: Run, options: tuple[str, ...], named: str):
    done = dpkit("audit", "engine", *options)
    assert done.code in (1, 4) and named in done.err


def test_a_tier_beside_a_ledger_is_refused(dpkit: Run, tmp_path: Path):
    done = dpkit("audit", "engine", trained(tmp_path / "run"), "--tier", "exact")
    assert done.code == 1 and "--tier" in done.err


@pytest.mark.parametrize("tier", ["hardened", "exact"])
def test_other_tiers_are_audited(dpkit: Run, tier: str):
    """False-alarm probability 0.001: the default confidence; the seed is fixed."""
    done = dpkit("audit", "engine", *FULL, "--canaries", "2000", "--seed", "1", "--tier", tier, "--json")
    assert done.code == 0 and 0 < done.json["epsilon"] <= done.json["claim"]


def test_the_picture_is_written(dpkit: Run, tmp_path: Path):
    pytest.importorskip("matplotlib")
    done = dpkit("audit", "engine", *FULL, *FEW, "--plot", tmp_path / "audit.png")
    assert done.code == 0 and (tmp_path / "audit.png").stat().st_size > 10_000


def test_the_audits_are_listed(dpkit: Run):
    done = dpkit("audit")
    assert done.code == 0 and all(word in done.out for word in ("engine", "scores", "model", "Exit code 3"))
    assert dpkit("audit", "nonsense").code == 1
