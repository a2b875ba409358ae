"""Discrete Gaussian noise against sums over the integers: Renyi moments and delta, sampled and not, both directions.

The probabilities are those of the definition, exp(-x²/2s²) over the integers normalised by their sum, so that the tests
know nothing of the accounting's formulas.
"""

from __future__ import annotations

import itertools
import math

import numpy as np
import pytest
from scipy.signal import fftconvolve

import accounting
from accounting import InvalidParameter, RenyiFilter, Unsupported, ZCDPFilter, descriptions
from accounting.events import (
    Composed,
    DiscreteGaussian,
    Gaussian,
    OnePass,
    Poisson,
    PoissonTrials,
    PureDP,
    Relation,
    Repeated,
    Select,
    TruncatedPoisson,
    WithoutReplacement,
    event_from_json,
    event_to_json,
)
from accounting.normal_form import atoms_under
from accounting.rdp import step_log_moment
from accounting.sampled_gaussian import FRACTIONAL, INTEGER, ORDERS

ADD_REMOVE, ZERO_OUT, REPLACE_ONE = Relation.ADD_REMOVE, Relation.ZERO_OUT, Relation.REPLACE_ONE
SCALES = ((1, 1), (1, 2), (2, 1), (3, 2), (3, 5), (8, 3))  # (s, how far one record moves the sum)


def law(scale: float, shift: int, reach: int = 45) -> np.ndarray:
    """The probabilities of ``shift`` plus noise, on the integers from -reach·s - 60 to reach·s + 60."""
    x = np.arange(-reach * math.ceil(scale) - 60, reach * math.ceil(scale) + 61)
    weights = np.exp(-((x - shift) ** 2) / (2 * scale**2))
    return weights / math.fsum(weights)


def log_law(scale: float, shift: int, reach: int = 45) -> np.ndarray:
    x = np.arange(-reach * math.ceil(scale) - 60, reach * math.ceil(scale) + 61)
    exponents = -((x - shift) ** 2) / (2 * scale**2)
    return exponents - np.logaddexp.reduce(exponents)


def log_moment(log_p: np.ndarray, log_q: np.ndarray, order: float) -> float:
    """log E_q[(p/q)^order], by summation."""
    return float(np.logaddexp.reduce(order * log_p + (1 - order) * log_q))


def sampled(log_with: np.ndarray, log_without: np.ndarray, rate: float) -> np.ndarray:
    if rate == 1:
        return log_with
    return np.logaddexp(math.log(rate) + log_with, math.log1p(-rate) + log_without)


def bound(event, relation=ADD_REMOVE) -> np.ndarray:
    return np.sum([count * step_log_moment(atom, relation) for atom, count in atoms_under(event, relation)], axis=0)


@pytest.mark.parametrize(("scale", "shift"), SCALES)
@pytest.mark.parametrize("rate", [1.0, 0.5, 0.1, 0.003])
def test_moments_are_bounded_in_both_directions_and_met_at_whole_orders(scale: int, shift: int, rate: float) -> None:
    moments = bound(Poisson(rate, DiscreteGaussian(scale / shift)))
    without, present = log_law(scale, 0), log_law(scale, shift)
    mixed = sampled(present, without, rate)
    # The sums are of numbers between e^-1000 and e^1000: what lies outside the window, and rounding, is below 1e-11.
    checked = [*INTEGER[INTEGER <= 20], *FRACTIONAL[::6]]
    for order in checked:
        claimed = moments[np.flatnonzero(order == ORDERS)[0]]
        removed, added = log_moment(mixed, without, order), log_moment(without, mixed, order)
        assert max(removed, added) <= claimed + 1e-11, order
        if order == round(order):
            assert claimed <= removed * (1 + 1e-6) + 1e-11, order


def test_what_the_continuous_formula_says_of_fractional_orders_is_no_bound_under_sampling() -> None:
    """Why chords take its place: at small scales the sampled discrete noise reveals more than its integral."""
    exceeded = 0
    for (scale, shift), rate in itertools.product(((0.3, 1), (0.4, 1), (0.5, 1), (0.5, 2)), (0.5, 0.1, 0.01)):
        continuous = step_log_moment(Poisson(rate, Gaussian(scale / shift)), ADD_REMOVE)
        discrete = step_log_moment(Poisson(rate, DiscreteGaussian(scale / shift)), ADD_REMOVE)
        without = log_law(scale, 0)
        mixed = sampled(log_law(scale, shift), without, rate)
        for order in FRACTIONAL:
            place = np.flatnonzero(order == ORDERS)[0]
            true = max(log_moment(mixed, without, order), log_moment(without, mixed, order))
            assert true <= discrete[place] + 1e-11
            exceeded += true > continuous[place] + 1e-6
    assert exceeded > 10


@pytest.mark.parametrize("rate", [1.0, 0.5, 0.05])
def test_vectors_cost_what_one_coordinate_of_the_same_length_does(rate: float) -> None:
    """Two coordinates with scales of their own, moved together: sum (a_i / s_i)² counts, and nothing else."""
    for (s, a), (t, b) in (((2, 1), (3, 2)), ((4, 3), (2, 1))):
        z = ((a / s) ** 2 + (b / t) ** 2) ** -0.5
        moments = bound(Poisson(rate, DiscreteGaussian(z)))
        without = np.add.outer(log_law(s, 0, 25), log_law(t, 0, 25)).ravel()
        present = np.add.outer(log_law(s, a, 25), log_law(t, b, 25)).ravel()
        mixed = sampled(present, without, rate)
        for order in (2, 3, 5, 8, 1.5, 2.5):
            claimed = moments[np.flatnonzero(order == ORDERS)[0]]
            removed, added = log_moment(mixed, without, order), log_moment(without, mixed, order)
            assert max(removed, added) <= claimed + 1e-11
            if order == round(order):
                assert claimed <= removed * (1 + 1e-6) + 1e-11


@pytest.mark.parametrize("rate", [1.0, 0.3, 0.02])
def test_several_queries_on_one_batch_cost_no_less_than_they_do_also_when_later_ones_are_chosen(rate: float) -> None:
    """The second query's shift depends on the first one's answer; all maps of the parity of the answer are tried."""
    event = Poisson(rate, Composed((DiscreteGaussian(2.0), DiscreteGaussian(3.0))))
    moments = bound(event)
    first_q, first_p = log_law(2, 0, 20), log_law(2, 1, 20)
    for even, odd in itertools.product((1, -1, 0), repeat=2):
        shifts = np.where(np.arange(len(first_q)) % 2 == 0, even, odd)
        second_q = np.stack([log_law(3, 0, 20)] * len(first_q))
        second_p = np.stack([log_law(3, int(shift), 20) for shift in shifts])
        without, present = (first_q[:, None] + second_q).ravel(), (first_p[:, None] + second_p).ravel()
        mixed = sampled(present, without, rate)
        for order in (1.1, 1.5, 2, 3, 6):
            claimed = moments[np.flatnonzero(order == ORDERS)[0]]
            assert max(log_moment(mixed, without, order), log_moment(without, mixed, order)) <= claimed + 1e-11
    # Twice the excess of one release of both at once, and no more.
    joint = bound(Poisson(rate, DiscreteGaussian((2.0**-2 + 3.0**-2) ** -0.5)))
    whole = np.isin(ORDERS, INTEGER)
    if rate < 1:
        assert np.allclose(np.expm1(moments[whole][:8]), 2 * np.expm1(joint[whole][:8]), rtol=1e-6)
    else:
        assert np.allclose(moments, joint, rtol=1e-9)


def true_delta(scale: float, shift: int, rate: float, steps: int, epsilon: float) -> float:
    """The larger hockey-stick divergence of ``steps`` releases, by convolving the losses on a fine grid, rounded down.

    Losses are rounded down to the grid, so that what comes out is never above the truth.
    """
    worst = 0.0
    grid = 2e-3
    without, present = law(scale, 0, 12), law(scale, shift, 12)
    mixed = rate * present + (1 - rate) * without
    for p, q in ((mixed, without), (without, mixed)):
        seen = (p > 1e-290) & (q > 1e-290)
        cells = np.floor(np.log(p[seen] / q[seen]) / grid).astype(int)
        masses = np.bincount(cells - cells.min(), weights=p[seen])
        total, lowest = masses, int(cells.min())
        for _ in range(steps - 1):
            total = fftconvolve(total, masses)
            lowest += int(cells.min())
        losses = (lowest + np.arange(len(total))) * grid
        above = losses > epsilon
        worst = max(worst, float((np.maximum(total, 0)[above] * -np.expm1(epsilon - losses[above])).sum()))
    return worst


@pytest.mark.parametrize(
    ("scale", "shift", "rate", "steps"),
    [(1, 1, 1.0, 1), (2, 1, 1.0, 4), (3, 2, 0.3, 6), (1, 1, 0.1, 8), (0.5, 1, 0.2, 3), (4, 1, 0.5, 20)],
)
def test_epsilon_is_not_below_the_truth_and_not_far_above(scale: float, shift: int, rate: float, steps: int) -> None:
    event = Repeated(Poisson(rate, DiscreteGaussian(scale / shift)), steps)
    for delta in (1e-3, 1e-6):
        claimed = accounting.epsilon(event, delta, relation=ADD_REMOVE)
        assert claimed.accountant == "rdp"
        # 1e-12: what rounding in the Fourier transform behind the convolution may add.
        assert true_delta(scale, shift, rate, steps, claimed.upper) <= delta + 1e-12
        # A test that could not fail would be one whose truth is far below: at 0.6 of the claim it is broken.
        assert true_delta(scale, shift, rate, steps, 0.6 * claimed.upper) > delta


def test_no_other_accountant_answers() -> None:
    event = Repeated(Poisson(0.1, DiscreteGaussian(2.0)), 10)
    for by in ("gaussian", "prv", "selection"):
        with pytest.raises(Unsupported, match="accountant covers"):
            accounting.epsilon(event, 1e-5, relation=ADD_REMOVE, by=by)
        with pytest.raises(Unsupported, match="accountant covers"):
            accounting.epsilon(DiscreteGaussian(2.0), 1e-5, relation=ADD_REMOVE, by=by)
    assert all(row.lower is row.upper is None for row in accounting.crosscheck(event, 1e-5, relation=ADD_REMOVE))


def test_what_no_theorem_covers_is_refused_with_the_way_out() -> None:
    noise = DiscreteGaussian(2.0)
    for event, relation, message in (
        (TruncatedPoisson(0.1, 20, 100, noise), ADD_REMOVE, r"Gaussian noise only.*HardenedGaussian.*functional form"),
        (TruncatedPoisson(0.1, 20, 100, noise), ZERO_OUT, "max_physical_batch_size"),
        (WithoutReplacement(5, 100, noise), REPLACE_ONE, r"discrete_gaussian.*Poisson batches.*HardenedGaussian"),
        (WithoutReplacement(5, 100, Composed((noise, Gaussian(1.0)))), REPLACE_ONE, "one worst pair"),
        (Poisson(0.1, noise), REPLACE_ONE, "replace_one has no theorem"),
        (OnePass(noise), ADD_REMOVE, "add_remove has no theorem"),
        (Poisson(0.1, Poisson(0.1, noise)), ADD_REMOVE, "sampling inside sampling"),
    ):
        with pytest.raises(Unsupported, match=message):
            accounting.epsilon(event, 1e-5, relation=relation)


def test_what_has_no_draw_of_its_own_is_the_noise_itself() -> None:
    noise = DiscreteGaussian(2.0)
    alone = accounting.epsilon(noise, 1e-5, relation=REPLACE_ONE)
    for event in (WithoutReplacement(100, 100, noise), OnePass(noise)):
        assert accounting.epsilon(event, 1e-5, relation=REPLACE_ONE) == alone
    for event in (TruncatedPoisson(0.1, 101, 100, noise), Poisson(0.1, noise)):  # nothing is ever cut
        found = accounting.epsilon(event, 1e-5, relation=ADD_REMOVE)
        assert found == accounting.epsilon(Poisson(0.1, noise), 1e-5, relation=ADD_REMOVE)
    assert accounting.epsilon(Poisson(1.0, noise), 1e-5, relation=ADD_REMOVE).upper == alone.upper


def test_without_sampling_it_costs_what_the_renyi_accountant_says_of_the_continuous_noise() -> None:
    for z in (0.05, 0.7, 3.0, 80.0):
        for delta in (1e-2, 1e-9):
            discrete = accounting.epsilon(Repeated(DiscreteGaussian(z), 7), delta, relation=ADD_REMOVE).upper
            continuous = accounting.epsilon(Repeated(Gaussian(z), 7), delta, relation=ADD_REMOVE, by="rdp").upper
            assert discrete == continuous


def test_more_noise_and_a_lower_rate_never_cost_more() -> None:
    for rate in (1.0, 0.2, 0.01):
        found = [
            accounting.epsilon(Repeated(Poisson(rate, DiscreteGaussian(z)), 50), 1e-5, relation=ADD_REMOVE).upper
            for z in (0.4, 0.8, 1.6, 3.2, 12.8)
        ]
        assert found == sorted(found, reverse=True) and found[0] > found[-1]


def test_selected_runs_filters_and_mixed_batches_count_it() -> None:
    noise = DiscreteGaussian(4.0)
    chosen = accounting.epsilon(Select(noise, PoissonTrials(5.0)), 1e-5, relation=ADD_REMOVE).upper
    assert chosen > accounting.epsilon(noise, 1e-5, relation=ADD_REMOVE).upper
    beside = Poisson(0.1, Composed((noise, Gaussian(4.0), PureDP(0.1))))
    assert (
        accounting.epsilon(beside, 1e-5, relation=ADD_REMOVE).upper
        > accounting.epsilon(Poisson(0.1, noise), 1e-5, relation=ADD_REMOVE).upper
    )
    kept = ZCDPFilter(3.0, 1e-5)
    kept.spend(noise, ADD_REMOVE)
    assert kept.remaining == pytest.approx(1 - 1 / (2 * 4.0**2) / kept.rho)
    renyi = RenyiFilter(3.0, 1e-5, [8])
    renyi.spend(Poisson(0.1, noise), ADD_REMOVE)
    assert 0 < renyi.remaining < 1


def test_words_and_json() -> None:
    event = Repeated(Poisson(0.1, DiscreteGaussian(2.5)), 3)
    assert event_from_json(event_to_json(event)) == event
    assert '"version":3' in event_to_json(event)
    assert descriptions.each(event, descriptions.noise) == "2.5 (discrete Gaussian) (3 times)"
    assert "Poisson, rate 0.1" in descriptions.each(event, descriptions.sampling)
    assert descriptions.each(DiscreteGaussian(2.5), descriptions.sampling) == "none, all units in every step"
    for wrong in (0.0, -1.0, math.inf, math.nan, "2"):
        with pytest.raises(InvalidParameter, match="noise_multiplier"):
            DiscreteGaussian(wrong)  # pyright: ignore[reportArgumentType]


def test_a_target_epsilon_is_met() -> None:
    def run(z: float):
        return Repeated(Poisson(0.05, DiscreteGaussian(z)), 100)

    z = accounting.calibrate_noise_multiplier(2.0, 1e-5, run, relation=ADD_REMOVE)
    assert 1.99 < accounting.epsilon(run(z), 1e-5, relation=ADD_REMOVE).upper <= 2.0
