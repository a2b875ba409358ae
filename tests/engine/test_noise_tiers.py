"""The hardened and the exact tier in whole runs: what is charged and said, what goes on, and what is never written."""

from __future__ import annotations

import base64
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.nn import functional as F

import accounting
import dpkit
from accounting import Budget, Ledger
from dpkit.cli.sampler_check import sampler_problems
from dpkit.engine import PrivacyEngine
from dpkit.engine import engine as engine_module
from dpkit.errors import CheckpointError, InvalidArgument, Unsupported
from dpkit.mechanisms import Correlated, DiscreteGaussian, Gaussian, HardenedGaussian, keys
from dpkit.mechanisms.chacha import KeyStream
from dpkit.metrics import Mean
from dpkit.report import write_report
from dpkit.run_folder import RunFolder
from dpkit.sampling import FixedOrder

from .runs import N, begin, resume

TIERS: dict[str, Any] = {"default": Gaussian, "hardened": HardenedGaussian, "exact": DiscreteGaussian}
SECURE = [name for name in TIERS if name != "default"]


def with_noise(name: str, **changes: Any) -> dict[str, Any]:
    return {"noise_multiplier": None, "mechanism": TIERS[name](1.5), **changes}


@pytest.mark.parametrize("name", TIERS)
def test_a_run_trains_charges_and_says_what_it_did(tmp_path: Path, name: str) -> None:
    run = begin(tmp_path, **with_noise(name), metrics=(Mean("size", 30.0, 0.0, 2.0),))
    for x, y in run.loader:
        run.optimizer.zero_grad()
        losses = F.cross_entropy(run.model(x), y, reduction="none")
        run.engine.release_mean("size", x.abs().mean(1))
        run.engine.backward(losses)
        run.optimizer.step()
        break
    assert -40 < run.engine.released["size"] < 40
    assert all(bool(p.grad.isfinite().all()) for p in run.model.parameters() if p.grad is not None)
    [(plan, charged)] = run.engine.ledger.plans()
    noise = accounting.DiscreteGaussian(1.5) if name == "exact" else accounting.Gaussian(1.5)
    assert plan.event == accounting.Poisson(10 / N, noise) and charged == 1
    assert plan.facts["noise_tier"] == name
    assert list(sampler_problems(plan)) == []
    told = str(run.engine.statement())
    words = " ".join(told.split())
    assert f"noise tier: {name}" in words and "CERTIFIED: YES" in told
    said = {
        "predictable": "not cryptographic. The guarantee assumes that nobody can predict its output." in words,
        "low-order bits.": "noise is drawn in floating point; attacks on its low-order bits" in words,
        "ChaCha20": "noise generator: ChaCha20, seeded with 256 bits by the operating system" in words,
        "grid": "Gaussian in double precision, which is drawn here and then rounded" in words,
        "exact": "nothing in its law is approximate" in words,
    }
    assert said == {
        "predictable": name == "default",
        "low-order bits.": name == "default",
        "ChaCha20": name != "default",
        "grid": name == "hardened",
        "exact": name == "exact",
    }


@pytest.mark.parametrize("name", SECURE)
def test_a_seeded_run_says_so_and_is_not_certified(tmp_path: Path, name: str) -> None:
    weights = []
    for number in range(2):
        folder = tmp_path / str(number)
        run = begin(folder, engine=PrivacyEngine(folder, seed=3), **with_noise(name)).train(3)
        told = " ".join(str(run.engine.statement()).split())
        assert "CERTIFIED: NO (seeded: whoever knows the seed can remove the noise)" in told
        assert "ChaCha20, seeded by the user; whoever knows the seed can repeat it" in told
        weights.append([p.detach().clone() for p in run.model.parameters()])
    assert all(torch.equal(one, other) for one, other in zip(*weights, strict=True)), "a seed repeats a run"


@pytest.mark.parametrize("name", SECURE)
def test_a_target_epsilon_makes_the_mechanism(tmp_path: Path, name: str) -> None:
    target = {"noise_multiplier": None, "target_epsilon": 4.0, "mechanism": getattr(dpkit, TIERS[name].__name__)}
    first = begin(tmp_path, **target).train(2)
    assert isinstance(first.engine.plan.mechanism, TIERS[name])
    assert 3.99 < first.engine.plan.epsilon().upper <= 4.0
    first.save()
    first.leave()
    second = resume(tmp_path, **target)
    assert second.engine.plan == first.engine.plan
    assert second.train().engine.steps_left == 0
    assert second.engine.epsilon().upper <= 4.0


def test_another_tier_is_another_plan_and_an_old_plan_was_of_the_first(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    first = begin(tmp_path, **with_noise("hardened")).train(1)
    first.save()
    first.leave()
    with pytest.raises(CheckpointError, match=r"noise_tier was 'hardened' and is 'default'"):
        resume(tmp_path)
    # A plan of the time before there were tiers does not say one.
    old = tmp_path / "old"
    made = engine_module.plan_record

    def without_tier(*args: Any, **kwargs: Any) -> Any:
        record = made(*args, **kwargs)
        facts = {name: fact for name, fact in record.facts.items() if name != "noise_tier"}
        return record.model_copy(update={"facts": facts})

    with monkeypatch.context() as patch:
        patch.setattr(engine_module, "plan_record", without_tier)
        before = begin(old).train(1)
        before.save()
        before.leave()
    after = resume(old).train(1)
    assert after.engine.statement().plans[0].noise_tier == "default"
    after.save()
    after.leave()
    with pytest.raises(CheckpointError, match=r"noise_tier was 'default' and is 'exact'"):
        resume(old, **with_noise("exact"))


@pytest.mark.parametrize("name", TIERS)
def test_a_release_beside_the_steps_has_the_noise_of_their_tier(
    tmp_path: Path, name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    engine = PrivacyEngine(tmp_path, budget=Budget(epsilon=60.0, delta=1e-2))
    run = begin(tmp_path, engine=engine, **with_noise(name)).train(1)
    used: list[Any] = []
    for kind in TIERS.values():

        def release(self: Any, *args: Any, shipped: Any = kind.release) -> Any:
            used.append(self)
            return shipped(self, *args)

        monkeypatch.setattr(kind, "release", release)
    found = engine.release_mean("x", torch.ones(N), lower=0.0, upper=2.0, noise_multiplier=2.0)
    assert found == pytest.approx(1.0, abs=7 * 2.0 / N)
    _, (beside, charged) = engine.ledger.plans()
    assert charged == 1 and beside.facts["noise_tier"] == name
    assert beside.facts["mechanism"] == f"{TIERS[name].__name__}(noise_multiplier=2.0)"
    assert beside.event == (accounting.DiscreteGaussian(2.0) if name == "exact" else accounting.Gaussian(2.0))
    assert used == [TIERS[name](2.0)]
    run.train()
    assert engine.statement().plans[1].noise_tier == name


def test_a_batch_that_is_cut_has_no_exact_tier_and_the_way_out_is_named(tmp_path: Path) -> None:
    with pytest.raises(Unsupported, match=r"HardenedGaussian.*no max_physical_batch_size.*functional form"):
        begin(tmp_path / "a", **with_noise("exact"), max_physical_batch_size=16, num_examples=200)
    target = {"noise_multiplier": None, "target_epsilon": 4.0, "mechanism": DiscreteGaussian}
    with pytest.raises(Unsupported, match="HardenedGaussian"):
        begin(tmp_path / "b", **target, max_physical_batch_size=16, num_examples=200)
    for folder in ("a", "b"):
        assert not (tmp_path / folder / "ledger.sqlite").exists()
    assert begin(tmp_path / "c", **with_noise("hardened"), max_physical_batch_size=16, num_examples=200).train(2)


def test_a_large_model_is_refused_before_anything_is_charged(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("dpkit.mechanisms.secure.MOST_PARAMETERS", 50)
    with pytest.raises(InvalidArgument, match=r"at most 50 parameters.*HardenedGaussian"):
        begin(tmp_path, **with_noise("exact"))
    with Ledger.open(tmp_path / "ledger.sqlite", read_only=True) as ledger:
        assert ledger.plans() == []


def test_batches_in_a_fixed_order_take_every_tier(tmp_path: Path) -> None:
    for name in TIERS:
        run = begin(tmp_path / name, **with_noise(name), sampler=FixedOrder(10, N), relation="zero_out").train(3)
        assert run.engine.epsilon().upper < 20


def test_correlated_noise_is_of_the_default_tier_and_says_so(tmp_path: Path) -> None:
    run = begin(
        tmp_path,
        noise_multiplier=None,
        mechanism=Correlated(1.5),
        sampler=FixedOrder(10, N),
        relation="zero_out",
    ).train(1)
    assert run.engine.statement().plans[0].noise_tier == "default"


def test_a_mechanism_without_a_tier_or_of_an_unknown_one_is_refused(tmp_path: Path) -> None:
    class Untold:
        noise_multiplier = 1.5
        init, scale, event, release = Gaussian.init, Gaussian.scale, Gaussian.event, Gaussian.release
        standard_deviations = Gaussian.standard_deviations

    with pytest.raises(InvalidArgument, match="which has no tier"):
        begin(tmp_path / "a", noise_multiplier=None, mechanism=Untold())

    class Unknown(Untold):
        tier = "quantum"

    with pytest.raises(InvalidArgument, match="'quantum'; it is one of default, hardened, exact"):
        begin(tmp_path / "b", noise_multiplier=None, mechanism=Unknown())


@pytest.fixture
def secrets_of_a_run(monkeypatch: pytest.MonkeyPatch) -> Iterator[set[bytes]]:
    """Every secret, derived key and beginning of a stream of random numbers that is made while the test runs."""
    seen: set[bytes] = set()
    expand, generator_from, words = keys._expand, keys.generator_from, KeyStream.words

    def expanded(secret: bytes, *labels: Any) -> bytes:
        found = expand(secret, *labels)
        seen.update((secret, found))
        return found

    def generator(key: bytes, device: Any = "cpu") -> torch.Generator:
        made = generator_from(key, device)
        state = made.get_state().numpy().tobytes()
        seen.update((key, state[24:56]))
        return made

    def drawn(stream: KeyStream, count: int) -> torch.Tensor:
        found = words(stream, count)
        seen.add(stream._key)
        if count >= 2:
            seen.add(found[:2].numpy().tobytes())
        return found

    monkeypatch.setattr(keys, "_expand", expanded)
    monkeypatch.setattr(keys, "generator_from", generator)
    monkeypatch.setattr(KeyStream, "words", drawn)
    yield seen


def forms(secret: bytes) -> list[bytes]:
    """As it is, in hexadecimal, in base 64 and as a number."""
    numbers = (int.from_bytes(secret, "little"), int.from_bytes(secret, "big"))
    texts = [secret.hex(), secret.hex().upper(), base64.b64encode(secret).decode().rstrip("="), *map(str, numbers)]
    return [secret, *(text.encode() for text in texts)]


@pytest.mark.parametrize("name", TIERS)
def test_no_file_of_a_run_holds_a_key_or_the_beginning_of_a_stream(
    tmp_path: Path, name: str, secrets_of_a_run: set[bytes]
) -> None:
    told = dpkit.callbacks.MetricsFile(RunFolder(tmp_path), nonprivate=True)
    run = begin(tmp_path, engine=PrivacyEngine(tmp_path, callbacks=[told]), **with_noise(name))
    with run.engine.autosave(every=3):
        run.train(7)
    run.leave()
    second = resume(tmp_path, **with_noise(name))
    with second.engine.autosave(every=4):
        second.train()
    second.engine.statement()
    write_report(RunFolder(tmp_path), with_nonprivate=True)
    secrets = {secret for secret in secrets_of_a_run if len(secret) >= 16}
    assert {run.engine._run_key._secret, second.engine._run_key._secret} <= secrets
    assert len(secrets) > 5 * 20, "the test would look for next to nothing"
    files = [path for path in tmp_path.rglob("*") if path.is_file()]
    assert {"ledger.sqlite", "report.html"} <= {path.name for path in files} and len(files) > 6
    content = b"\0".join(path.read_bytes() for path in files)
    assert not any(form in content for secret in secrets for form in forms(secret))
    (tmp_path / "planted").write_text(f"key: {run.engine._run_key._secret.hex()}")
    content += (tmp_path / "planted").read_bytes()
    assert any(form in content for secret in secrets for form in forms(secret)), "the search finds nothing"
