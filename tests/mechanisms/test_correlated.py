"""Correlated noise: C⁻¹Z row by row, scaled to the sensitivity of C, and refused where that has no meaning."""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np
import pytest
import torch
from scipy.linalg import toeplitz

import accounting
from accounting import matrix
from dpkit.errors import InvalidArgument, OutOfOrder
from dpkit.mechanisms import BISR, BSR, BandMF, Correlated, Gaussian, NoiseKey, SquareRoot, Strategy
from dpkit.sampling import CyclicPoisson, FixedOrder, Poisson
from dpkit.types import ClippedSum, Participation, Query

STEPS, APART, TIMES = 23, 8, 3
Z, BOUND = 1.3, 0.7  # never 1: a missing factor must show
FIXED = Participation(STEPS, APART, TIMES, sampled=False)
STRATEGIES: list[Strategy] = [SquareRoot(), BSR(1), BSR(5), BISR(1), BISR(4), BISR(30), BandMF(1), BandMF(6)]
MECHANISMS = [
    *(Correlated(Z, strategy) for strategy in STRATEGIES),
    *(Correlated(Z, strategy, regenerate=True) for strategy in STRATEGIES if isinstance(strategy, (SquareRoot, BISR))),
]


def key(step: int) -> NoiseKey:
    return NoiseKey(step.to_bytes(32, "little"))


def run(mechanism: Correlated, shape: tuple[int, ...], bounds: list[float] | None = None) -> torch.Tensor:
    """(STEPS, *shape) of released zeros: the noise alone."""
    state, rows = mechanism.init({"w": torch.zeros(shape)}, FIXED), []
    for step in range(STEPS):
        bound = BOUND if bounds is None else bounds[step]
        query = Query({"w": torch.zeros(shape, dtype=torch.float64)}, {"w": 0}, {0: bound})
        released, state = mechanism.release(ClippedSum((query,)), state, key(step))
        rows.append(released.value["w"])
    return torch.stack(rows)


def draws(shape: tuple[int, ...]) -> torch.Tensor:
    """The standard normal numbers behind :func:`run`."""
    rows = []
    for step in range(STEPS):
        generator = key(step).generator(0, "w")
        rows.append(torch.empty(shape, dtype=torch.float64).normal_(generator=generator))
    return torch.stack(rows)


def dense(coefficients: np.ndarray) -> np.ndarray:
    return np.tril(toeplitz(coefficients))


@pytest.mark.parametrize("mechanism", MECHANISMS, ids=str)
def test_the_noise_is_the_inverse_of_the_strategy_times_fresh_draws(mechanism: Correlated) -> None:
    c = mechanism.strategy.coefficients(STEPS)
    sensitivity = matrix.sensitivity(c, STEPS, min_separation=APART, max_participations=TIMES)
    expected = np.linalg.solve(dense(c), draws((3, 2)).reshape(STEPS, -1).numpy()) * Z * sensitivity * BOUND
    assert np.allclose(run(mechanism, (3, 2)).reshape(STEPS, -1).numpy(), expected, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("mechanism", MECHANISMS, ids=str)
def test_the_covariance_over_the_steps_is_that_of_the_strategy(mechanism: Correlated) -> None:
    samples = 40_000
    noise = run(mechanism, (samples,)).numpy()
    inverse = np.linalg.inv(dense(mechanism.strategy.coefficients(STEPS)))
    std = mechanism.scale(FIXED) * BOUND
    truth = std**2 * inverse @ inverse.T
    found = noise @ noise.T / samples
    # Each entry has standard error at most sqrt(2 a b / samples), a and b the variances of its rows; 276 entries at 7
    # standard errors: false alarm below 1e-9.
    error = np.sqrt((truth**2 + np.outer(np.diag(truth), np.diag(truth))) / samples)
    assert (np.abs(found - truth) <= 7 * error).all()


@pytest.mark.parametrize("mechanism", MECHANISMS, ids=str)
def test_the_stated_noise_of_each_step_is_that_of_its_row(mechanism: Correlated) -> None:
    inverse = np.linalg.inv(dense(mechanism.strategy.coefficients(STEPS)))
    state = mechanism.init({}, FIXED)
    for step in range(STEPS):
        query = Query({"w": torch.zeros(2)}, {"w": 0}, {0: BOUND})
        released, state = mechanism.release(ClippedSum((query,)), state, key(step))
        assert released.noise_std["w"] == pytest.approx(mechanism.scale(FIXED) * BOUND * np.linalg.norm(inverse[step]))


def test_a_bound_that_moves_scales_a_row_and_nothing_else() -> None:
    mechanism = Correlated(Z, BISR(4))
    bounds = [BOUND * (1 + step % 3) for step in range(STEPS)]
    assert torch.allclose(
        run(mechanism, (4,), bounds), run(mechanism, (4,)) * torch.tensor(bounds)[:, None].double() / BOUND
    )


def test_groups_and_side_questions_share_the_precision() -> None:
    """Divided by its own standard deviation of a draw, the whole row of queries has sensitivity 1/(z·sens)."""
    mechanism = Correlated(Z, BISR(4))
    values = {"a": torch.zeros(50_000), "b": torch.zeros(50_000)}
    gradient = Query(values, {"a": 0, "b": 1}, {0: 0.5, 1: 2.0}, 0.8, {0: 1.0, 1: 3.0})
    side = Query({"answer": torch.zeros(50_000)}, {"answer": 0}, {0: 0.5}, 0.2)
    released, _ = mechanism.release(ClippedSum((gradient, side)), mechanism.init({}, FIXED), key(0))
    stds = [float(t.double().std()) for t in (*released.value.values(), *released.queries)]
    joint = accounting.joint_noise_multiplier([0.5, 2.0, 0.5], stds)
    assert joint == pytest.approx(mechanism.scale(FIXED), rel=0.02)  # 50,000 draws each: 6 standard errors


def test_one_band_is_independent_noise() -> None:
    for strategy in (BSR(1), BISR(1), BandMF(1)):
        one, _ = Correlated(Z, strategy).release(
            ClippedSum((Query({"w": torch.zeros(9)}, {"w": 0}, {0: BOUND}),)),
            Correlated(Z, strategy).init({}, Participation(5, 1, 5, sampled=True)),
            key(1),
        )
        other, _ = Gaussian(Z).release(ClippedSum((Query({"w": torch.zeros(9)}, {"w": 0}, {0: BOUND}),)), (), key(1))
        assert torch.allclose(one.value["w"], other.value["w"])


def test_one_band_under_cyclic_sampling_costs_what_dp_sgd_costs() -> None:
    cyclic, poisson = CyclicPoisson(0.01, groups=1), Poisson(0.01)
    mechanism = Correlated(Z, BandMF(1))
    event = cyclic.event(mechanism.event(cyclic.participation(500, 1000)), 1000)
    assert event == poisson.event(Gaussian(Z).event(poisson.participation(500, 1000)), 1000)


def test_a_run_in_fixed_order_costs_one_gaussian_release() -> None:
    for mechanism in MECHANISMS:
        event = mechanism.event(FIXED)
        bound = accounting.epsilon(event, 1e-5, relation=accounting.Relation.ZERO_OUT)
        alone = accounting.epsilon(accounting.Gaussian(Z), 1e-5, relation=accounting.Relation.ZERO_OUT)
        assert alone.upper <= bound.upper <= alone.upper * (1 + 1e-12)
        with pytest.raises(accounting.Unsupported, match="matrix_mechanism under add_remove"):
            accounting.epsilon(event, 1e-5, relation=accounting.Relation.ADD_REMOVE)


@pytest.mark.parametrize("strategy", [SquareRoot(), BISR(2), BSR(3), BandMF(5)])
def test_batches_without_a_least_distance_are_refused(strategy: Strategy) -> None:
    for sampler in (Poisson(0.1), CyclicPoisson(0.1, groups=2)):
        with pytest.raises(InvalidArgument, match="noise that is shared by the two is not accounted for"):
            Correlated(Z, strategy).event(sampler.participation(20, 100))
    in_order = FixedOrder(10, 100).participation(20, 100)
    assert isinstance(Correlated(Z, strategy).event(in_order), accounting.MatrixMechanism)


def test_one_step_more_than_planned_is_refused() -> None:
    mechanism = Correlated(Z, BISR(2))
    state = mechanism.init({}, Participation(1, 1, 1, sampled=False))
    clipped = ClippedSum((Query({"w": torch.zeros(2)}, {"w": 0}, {0: BOUND}),))
    _, state = mechanism.release(clipped, state, key(0))
    with pytest.raises(OutOfOrder, match="correlated over 1 steps, and all of them are taken"):
        mechanism.release(clipped, state, key(1))


def test_regenerated_noise_keeps_keys_and_no_tensors() -> None:
    mechanism = Correlated(Z, BISR(4), regenerate=True)
    state = mechanism.init({}, FIXED)
    for step in range(6):
        query = Query({"w": torch.zeros(1000)}, {"w": 0}, {0: BOUND})
        _, state = mechanism.release(ClippedSum((query,)), state, key(step))
    assert len(state.rows) == 3 and all(isinstance(row, NoiseKey) for row in state.rows)


@dataclass(frozen=True)
class Given:
    """A strategy of somebody's own."""

    forward: tuple[float, ...]
    backward: tuple[float, ...]

    def coefficients(self, steps: int) -> np.ndarray:
        return np.array(self.forward + (0.0,) * (steps - len(self.forward)))

    def inverse(self, steps: int) -> np.ndarray:
        return np.array(self.backward + (0.0,) * (steps - len(self.backward)))


def test_a_strategy_whose_inverse_is_another_one_s_is_refused() -> None:
    halves = tuple(0.5**k * (-1) ** k for k in range(STEPS))
    Correlated(Z, Given((1.0, 0.5), halves)).init({}, FIXED)
    for wrong, message in (
        (Given((1.0, 0.5), (1.0, -0.4)), "states an inverse which"),
        (Given((1.0, 0.5), (1.0, math.nan)), "states an inverse which"),
        (Given((2.0, 1.0), tuple(half / 2 for half in halves)), "begins with 2.0"),
    ):
        with pytest.raises(InvalidArgument, match=message):
            Correlated(Z, wrong).init({}, FIXED)


@pytest.mark.parametrize("bands", [0, -1, 1.5, True])
def test_a_strategy_without_bands_is_refused(bands: int) -> None:
    for make in (BSR, BISR, BandMF):
        with pytest.raises(InvalidArgument, match="at least one band"):
            make(bands)


def test_noise_that_is_made_of_all_noise_before_cannot_be_regenerated() -> None:
    for strategy in (BSR(4), BandMF(4)):
        with pytest.raises(InvalidArgument, match="keep it"):
            Correlated(Z, strategy, regenerate=True)
    for multiplier in (0.0, math.nan, -1.0):
        with pytest.raises(InvalidArgument, match="noise_multiplier"):
            Correlated(multiplier)
