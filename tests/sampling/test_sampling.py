"""The samplers draw what their events say."""

from __future__ import annotations

import pytest
import torch
from scipy import stats

import accounting
from dpkit.errors import InvalidArgument
from dpkit.mechanisms import RunKey
from dpkit.sampling import Poisson, Sampler, TruncatedPoisson

POPULATION, DRAWS = 40, 4000
FALSE_ALARM = 1e-7
SAMPLERS = [Poisson(0.23), Poisson(1.0), Poisson(0.01), TruncatedPoisson(0.23, 30), TruncatedPoisson(0.23, 5)]


def inclusions(sampler: Sampler, draws: int = DRAWS) -> torch.Tensor:
    """(draws, population) of 0 and 1, and a check that no unit is drawn twice."""
    run = RunKey()
    table = torch.zeros(draws, POPULATION)
    for step in range(draws):
        units = sampler.draw(POPULATION, run.sampling(step))
        assert len(units.unique()) == len(units)
        table[step, units] = 1
    return table


@pytest.mark.parametrize("rate", [0.23, 0.01, 0.9])
def test_poisson_includes_each_unit_independently_with_probability_q(rate: float) -> None:
    table = inclusions(Poisson(rate))
    total = int(table.sum())
    low, high = stats.binom.ppf([FALSE_ALARM, 1 - FALSE_ALARM], table.numel(), rate)
    assert low <= total <= high
    sizes = table.sum(1)
    expected_variance = POPULATION * rate * (1 - rate)
    statistic = float(((sizes - POPULATION * rate) ** 2).sum()) / expected_variance
    # A sum of 4000 squared, nearly normal sizes; the kurtosis of a binomial adds at most 1/variance per term.
    spread = (2 + 1 / expected_variance) * DRAWS
    assert abs(statistic - DRAWS) < 6 * spread**0.5, "batch sizes do not vary like a binomial"


@pytest.mark.parametrize("lag", [1, 2, 4, 11, 100])
def test_draws_are_independent_over_steps(lag: int) -> None:
    table = inclusions(Poisson(0.23)) - 0.23
    products = (table[lag:] * table[:-lag]).sum() / (0.23 * 0.77)
    assert abs(float(products)) < 6 * (table[lag:].numel()) ** 0.5  # false alarm below 2e-9


@pytest.mark.parametrize("sampler", SAMPLERS, ids=str)
def test_a_draw_never_exceeds_its_largest_batch(sampler: Sampler) -> None:
    assert int(inclusions(sampler, 500).sum(1).max()) <= sampler.largest_batch(POPULATION)


def test_truncation_keeps_a_uniform_subset() -> None:
    table = inclusions(TruncatedPoisson(0.5, 5))
    assert int(table.sum(1).max()) == 5
    counts = table.sum(0)
    expected = float(counts.mean())
    assert stats.chi2.sf(float(((counts - expected) ** 2 / expected).sum()), POPULATION - 1) > FALSE_ALARM


def test_events_name_the_draw_that_happens() -> None:
    mechanism = accounting.Gaussian(noise_multiplier=1.1)
    assert Poisson(0.1).event(mechanism, 1000) == accounting.Poisson(sample_rate=0.1, event=mechanism)
    assert TruncatedPoisson(0.1, 160).event(mechanism, 1000) == accounting.TruncatedPoisson(
        sample_rate=0.1, cap=160, max_examples=1000, event=mechanism
    )


def test_empty_populations_and_empty_draws_are_ordinary() -> None:
    assert len(Poisson(0.5).draw(0, RunKey().sampling(0))) == 0
    assert len(TruncatedPoisson(0.5, 3).draw(0, RunKey().sampling(0))) == 0


@pytest.mark.parametrize("rate", [0.0, -0.1, 1.1, float("nan")])
def test_rates_outside_zero_to_one_are_refused(rate: float) -> None:
    with pytest.raises(InvalidArgument, match="sample_rate"):
        Poisson(rate)
    with pytest.raises(InvalidArgument, match="sample_rate"):
        TruncatedPoisson(rate, 5)


def test_a_cap_without_room_is_refused() -> None:
    with pytest.raises(InvalidArgument, match="cap"):
        TruncatedPoisson(0.5, 0)
