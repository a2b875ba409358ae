"""The Gaussian mechanism: how much noise, how fresh, and for which receipt."""

from __future__ import annotations

import copy
import pickle
from pathlib import Path

import pytest
import torch
from scipy import stats

import accounting
from accounting import Budget, Ledger, PlanRecord, Receipt, Relation
from dpkit.errors import InvalidArgument, LedgerError
from dpkit.mechanisms import Gaussian, NoiseKey, RunKey
from dpkit.mechanisms.keys import generator_from
from dpkit.types import ClippedSum, Query

SIGMA, BOUND = 1.3, 0.7  # never 1: a missing factor must show
FALSE_ALARM = 1e-7


def record(steps: int = 10_000) -> PlanRecord:
    return PlanRecord(
        event=accounting.Gaussian(noise_multiplier=SIGMA),
        steps=steps,
        delta=1e-5,
        relation=Relation.ADD_REMOVE,
        unit="example",
        num_examples=1000,
        facts={},
    )


@pytest.fixture
def ledger(tmp_path: Path) -> Ledger:
    return Ledger.create(tmp_path / "ledger.sqlite", dataset_name="made up", budget=Budget(epsilon=1e6, delta=1e-5))


def query(shape: tuple[int, ...] = (1000, 1000), *, share: float = 1.0, groups: int = 1) -> Query:
    names = [f"p{g}" for g in range(groups)]
    return Query(
        {name: torch.zeros(shape) for name in names},
        {name: g for g, name in enumerate(names)},
        dict.fromkeys(range(groups), BOUND),
        share,
    )


def draw(clipped: ClippedSum, key: NoiseKey, sigma: float = SIGMA) -> list[torch.Tensor]:
    released, _ = Gaussian(sigma).release(clipped, (), key)
    return [*released.value.values(), *released.queries]


def test_the_standard_deviation_is_sigma_times_sensitivity_within_one_percent_on_a_million_draws() -> None:
    (noise,) = draw(ClippedSum((query(),)), NoiseKey(b"k" * 32))
    z = noise.double() / (SIGMA * BOUND)
    assert abs(float(z.std()) - 1) < 0.01  # 14 standard errors: false alarm below 1e-40
    n, squares = z.numel(), float((z**2).sum())
    assert stats.chi2.cdf(squares, n) > FALSE_ALARM, "too little noise"
    assert stats.chi2.sf(squares, n) > FALSE_ALARM, "too much noise"
    assert stats.kstest(z.flatten().numpy()[:100_000], "norm").pvalue > FALSE_ALARM
    assert len(torch.unique(noise)) > 0.9 * n, "coarse noise"


def test_the_test_above_would_notice_one_percent() -> None:
    (noise,) = draw(ClippedSum((query(),)), NoiseKey(b"k" * 32), sigma=SIGMA * 0.99)
    z = noise.double() / (SIGMA * BOUND)
    assert stats.chi2.cdf(float((z**2).sum()), z.numel()) < FALSE_ALARM


def test_groups_and_side_queries_together_cost_the_multiplier() -> None:
    clipped = ClippedSum((query((4,), share=0.75, groups=3), query((4,), share=0.25)))
    mechanism = Gaussian(SIGMA)
    precision = sum(
        (q.sensitivity[g] / std) ** 2 for q in clipped.queries for g, std in mechanism.standard_deviations(q).items()
    )
    assert precision == pytest.approx(1 / SIGMA**2, rel=1e-12)


def test_shares_that_do_not_add_up_are_refused() -> None:
    with pytest.raises(InvalidArgument, match="shares"):
        draw(ClippedSum((query((2,)), query((2,)))), NoiseKey(b"k" * 32))
    with pytest.raises(InvalidArgument, match="shares"):
        draw(ClippedSum((query((2,), share=2.0), query((2,), share=-1.0))), NoiseKey(b"k" * 32))


@pytest.mark.parametrize("sigma", [0.0, -1.0, float("nan"), float("inf")])
def test_a_multiplier_that_gives_no_guarantee_is_refused(sigma: float) -> None:
    with pytest.raises(InvalidArgument, match="noise_multiplier"):
        Gaussian(sigma)


@pytest.mark.parametrize("position", [0, 7, 15, 16, 24, 31])
def test_streams_differ_when_any_one_bit_of_the_key_differs(position: int) -> None:
    base = bytearray(32)
    other = bytearray(32)
    other[position] ^= 0x80
    left = torch.randn(1000, generator=generator_from(bytes(base)), dtype=torch.float64)
    right = torch.randn(1000, generator=generator_from(bytes(other)), dtype=torch.float64)
    # 1000 pairs: |correlation| above 0.25 has probability below 1e-14 for independent streams.
    assert abs(float((left * right).mean())) < 0.25


def test_noise_is_fresh_in_every_run_step_query_and_parameter(ledger: Ledger) -> None:
    plan = record()
    runs = [RunKey(), RunKey()]
    tensors = []
    for run in runs:
        for _ in range(3):
            key = run.noise_key(ledger.charge(plan, plan.event))
            tensors += draw(ClippedSum((query((500,), share=0.5, groups=2), query((500,), share=0.5))), key)
    stacked = torch.stack(tensors).double()
    correlation = torch.corrcoef(stacked).fill_diagonal_(0)
    # 18 streams, 153 pairs of 500 numbers: above 0.35 by chance with probability below 1e-12.
    assert float(correlation.abs().max()) < 0.35


def test_one_receipt_buys_one_key(ledger: Ledger) -> None:
    plan = record()
    receipt = ledger.charge(plan, plan.event)
    run = RunKey()
    run.noise_key(receipt)
    with pytest.raises(LedgerError):
        run.noise_key(receipt)


def test_the_secret_cannot_be_copied_stored_or_printed() -> None:
    run = RunKey()
    with pytest.raises(TypeError, match="never copied"):
        pickle.dumps(run)
    with pytest.raises(TypeError, match="never copied"):
        copy.deepcopy(run)
    assert "secret" not in repr(run) and run._secret.hex() not in repr(run)
    assert "\\x" not in repr(NoiseKey(bytes(32)))


def test_a_seeded_run_repeats_itself_and_says_that_it_is_not_certified(ledger: Ledger) -> None:
    assert RunKey().certified and not RunKey(0).certified
    plan = record()
    once, twice = RunKey(3), RunKey(3)
    first, second, repeated = (
        draw(ClippedSum((query((5,)),)), run.noise_key(ledger.charge(plan, plan.event)))[0]
        for run in (once, once, twice)
    )
    assert torch.equal(first, repeated)
    assert not torch.equal(first, second), "two steps of a seeded run must not share their noise"


def test_a_ledger_that_was_put_back_does_not_repeat_noise() -> None:
    """Two receipts for one step, as a ledger file copied back during a run would give."""
    run = RunKey()
    receipts = [Receipt(sequence=5, plan_id="p", step=5, digest="d") for _ in range(2)]
    first, second = (draw(ClippedSum((query((5,)),)), run.noise_key(receipt))[0] for receipt in receipts)
    assert not torch.equal(first, second)


def test_sampling_and_noise_share_no_stream(ledger: Ledger) -> None:
    plan = record()
    run = RunKey(5)
    noise = run.noise_key(ledger.charge(plan, plan.event)).generator(0, "p").get_state()
    assert not any(torch.equal(noise, run.sampling(draw).get_state()) for draw in range(5))


def test_noise_smaller_than_the_spacing_of_half_precision_survives() -> None:
    value = Query({"p": torch.full((10_000,), 1000.0, dtype=torch.bfloat16)}, {"p": 0}, {0: 1.0})
    (released,) = draw(ClippedSum((value,)), NoiseKey(b"k" * 32), sigma=0.5)
    assert released.dtype is torch.float32
    # 10,000 draws: the sample deviation is within 10 % of 0.5 except with probability below 1e-40.
    assert float((released - 1000.0).std()) == pytest.approx(0.5, rel=0.1)
