"""The best banded strategy is the best there is, and a noise plan says of each choice what it costs and gives."""

from __future__ import annotations

import itertools
import math

import numpy as np
import pytest

from accounting import (
    Gaussian,
    InvalidParameter,
    MatrixMechanism,
    Poisson,
    Relation,
    Repeated,
    TargetUnreachable,
    calibrate_noise_multiplier,
    epsilon,
    matrix,
)
from accounting.matrix import (
    band_mf,
    banded_square_root,
    identity,
    inverse,
    inverse_square_root,
    rooted_mean_error,
    square_root,
)
from accounting.plan_noise import Batches, Strategy, most_bands, plan_noise

STEPS_AND_BANDS = [
    (1, 1),
    (1, 5),
    (2, 2),
    (5, 2),
    (5, 9),
    (16, 16),
    (33, 4),
    (100, 8),
    (257, 64),
    (1024, 16),
    (5000, 3),
]


def dense(coefficients):
    """The lower-triangular Toeplitz matrix, entry by entry."""
    n = len(coefficients)
    return np.array([[coefficients[t - s] if t >= s else 0.0 for s in range(n)] for t in range(n)])


def dense_error(coefficients, workload=None):
    """The root mean square of the rows of ``A C^-1``, by dense matrices."""
    n = len(coefficients)
    noise = (np.tril(np.ones((n, n))) if workload is None else workload) @ np.linalg.inv(dense(coefficients))
    return math.sqrt((noise**2).sum() / n)


def error_and_norm(coefficients):
    return rooted_mean_error(coefficients) * float(np.linalg.norm(coefficients))


def brute_force_sensitivity(coefficients, min_separation):
    """The furthest that contributions of 1 in any set of steps this far apart move the rows; for c >= 0."""
    c, steps, furthest = dense(coefficients), len(coefficients), 0.0
    for chosen in itertools.product((False, True), repeat=steps):
        places = np.flatnonzero(chosen)
        if (np.diff(places) >= min_separation).all():
            furthest = max(furthest, float(np.linalg.norm(c[:, places].sum(axis=1))))
    return furthest


@pytest.mark.parametrize(("steps", "bands"), STEPS_AND_BANDS)
def test_the_best_bands_begin_with_one_fall_and_end(steps, bands):
    c = band_mf(steps, bands)
    assert c.shape == (steps,)
    assert c[0] == 1 and (c >= 0).all() and (np.diff(c) <= 0).all()
    assert (c[bands:] == 0).all()


@pytest.mark.parametrize(("steps", "bands"), STEPS_AND_BANDS)
def test_the_best_bands_are_never_worse_than_the_banded_square_root(steps, bands):
    assert error_and_norm(band_mf(steps, bands)) <= error_and_norm(banded_square_root(steps, bands)) * (1 + 1e-14)


def test_one_band_is_the_identity():
    assert band_mf(50, 1).tolist() == identity(50).tolist()


def test_more_bands_are_better():
    errors = [error_and_norm(band_mf(200, bands)) for bands in range(1, 60)]
    assert all(later < sooner * (1 + 1e-6) for sooner, later in itertools.pairwise(errors))


@pytest.mark.parametrize(("steps", "bands"), [(12, 2), (12, 4), (40, 7), (40, 40), (120, 16)])
def test_no_random_change_of_the_best_bands_is_better(steps, bands):
    best = band_mf(steps, bands)
    least = dense_error(best) * np.linalg.norm(best)
    generator = np.random.default_rng(steps + bands)
    for size in (1e-3, 1e-2, 1e-1):
        for _ in range(40):
            other = np.zeros(steps)
            other[:bands] = np.abs(best[:bands] + size * generator.normal(size=bands))
            assert dense_error(other) * np.linalg.norm(other) >= least * (1 - 1e-6)


def test_two_and_three_bands_are_the_best_of_a_grid():
    for steps in (2, 3, 7, 30):
        grid = [np.array([1.0, second, *np.zeros(steps - 2)]) for second in np.linspace(0, 1.2, 601)]
        least = min(map(error_and_norm, grid))
        assert least * (1 - 1e-5) <= error_and_norm(band_mf(steps, 2)) <= least * (1 + 1e-9)
    grid = [np.array([1.0, *rest, *np.zeros(9)]) for rest in itertools.product(np.linspace(0, 1.2, 41), repeat=2)]
    least = min(map(error_and_norm, grid))
    assert least * (1 - 1e-3) <= error_and_norm(band_mf(12, 3)) <= least * (1 + 1e-9)


def test_the_gradient_of_the_search_is_that_of_finite_differences():
    generator = np.random.default_rng(5)
    for steps, bands in ((6, 2), (15, 4), (30, 30)):
        later = np.sort(generator.uniform(0.05, 0.9, size=bands - 1))[::-1]

        def value(later, steps=steps, bands=bands):
            c = np.concatenate([[1.0], later, np.zeros(steps - bands)])
            return 2 * math.log(dense_error(c) * np.linalg.norm(c))

        found, gradient = matrix._log_squared_error(later, steps)
        assert found == pytest.approx(value(later), rel=1e-10)
        for place, step in enumerate(1e-6 * np.eye(bands - 1)):
            slope = (value(later + step) - value(later - step)) / 2e-6
            assert gradient[place] == pytest.approx(slope, abs=1e-7 * max(1.0, abs(gradient).max()))


@pytest.mark.parametrize("steps", [4, 16, 64, 200])
def test_with_all_bands_the_best_toeplitz_matrix_is_near_the_bound_for_any_matrix(steps):
    # For every C: |A C^-1|_F |C|_F >= |A|_* (trace norm), and a largest column norm is at least |C|_F / sqrt(n).
    least = np.linalg.svd(np.tril(np.ones((steps, steps))), compute_uv=False).sum() / steps
    assert least <= error_and_norm(band_mf(steps, steps)) <= 1.08 * least


def test_the_search_gives_the_same_coefficients_again():
    found = [band_mf(300, 12)]
    matrix._best_bands.cache_clear()
    found.append(band_mf(300, 12))
    assert found[0].tolist() == found[1].tolist()
    assert (found[0] * matrix._GRID == np.round(found[0] * matrix._GRID)).all()  # few digits: the same on any machine


def test_who_writes_to_the_coefficients_writes_to_a_copy():
    before = band_mf(20, 4)
    before[1] = 7.0
    assert band_mf(20, 4)[1] < 1


def test_a_long_run_is_no_trouble():
    errors = [error_and_norm(band_mf(20_000, 64)), error_and_norm(banded_square_root(20_000, 64))]
    assert errors[0] < 0.9 * errors[1]


def test_the_inverse_square_root_is_the_inverse_of_the_square_root():
    assert inverse_square_root(4).tolist() == [1, -0.5, -0.125, -0.0625]
    assert np.abs(inverse_square_root(60) - inverse(square_root(60))).max() < 1e-14


@pytest.mark.parametrize("momentum", [0.0, 0.5, 0.9])
def test_the_error_under_momentum_is_that_of_the_dense_workload(momentum):
    n, c = 25, banded_square_root(25, 4)
    with_momentum = np.array([[momentum ** (t - s) if t >= s else 0.0 for s in range(n)] for t in range(n)])
    workload = np.tril(np.ones((n, n))) @ with_momentum
    found = rooted_mean_error(c, momentum=momentum)
    assert found == pytest.approx(dense_error(c, workload), rel=1e-12)
    assert found == pytest.approx(rooted_mean_error(c, inverse_coefficients=inverse(c), momentum=momentum), rel=1e-15)


# 50 records in batches of 10: two passes of 5 steps, and 2 steps of a third.
SMALL = {"num_examples": 50, "batch_size": 10, "steps": 12}


@pytest.fixture(scope="module")
def small():
    return plan_noise(2.0, 1e-5, **SMALL)


def coefficients_of(choice, steps):
    match choice.strategy:
        case Strategy.IDENTITY:
            return np.eye(steps)[0]
        case Strategy.SQUARE_ROOT:
            return square_root(steps)
        case Strategy.BSR:
            return np.where(np.arange(steps) < choice.bands, square_root(steps), 0.0)
        case Strategy.BISR:
            kept = np.where(np.arange(steps) < choice.bands, np.linalg.inv(dense(square_root(steps)))[:, 0], 0.0)
            return np.linalg.inv(dense(kept))[:, 0]
        case Strategy.BAND_MF:
            return band_mf(steps, choice.bands)


def test_the_small_plan_has_all_choices(small):
    found = [(choice.batches.value, choice.strategy.value, choice.bands, choice.kept) for choice in small.choices]
    assert found == [
        ("poisson", "identity", 1, 0),
        ("fixed-order", "identity", 1, 0),
        ("fixed-order", "square-root", 12, 11),
        ("fixed-order", "bsr", 2, 1),
        ("fixed-order", "bsr", 4, 3),
        ("fixed-order", "bisr", 2, 1),
        ("fixed-order", "bisr", 4, 3),
        ("fixed-order", "band-mf", 2, 1),
        ("fixed-order", "band-mf", 4, 3),
        ("cyclic-poisson", "band-mf", 2, 1),
        ("cyclic-poisson", "band-mf", 4, 3),
    ]
    assert small.left_out == ()


def test_each_error_is_that_of_dense_matrices_and_of_the_worst_pattern(small):
    for choice in small.choices:
        c = coefficients_of(choice, 12)
        apart = 5 if choice.batches is Batches.FIXED_ORDER else 12  # sampled: of one participation
        moved = brute_force_sensitivity(c, apart)
        assert choice.sensitivity == pytest.approx(moved, rel=1e-12)
        assert choice.error == pytest.approx(dense_error(c) * moved * choice.noise_multiplier, rel=1e-12)
        assert small.ratio(choice) == choice.error / small.choices[0].error


def test_each_choice_keeps_to_the_target_and_does_not_waste_it(small):
    for choice in small.choices:
        assert epsilon(choice.event, 1e-5, relation=Relation.ZERO_OUT) == choice.bound
        assert 2.0 * 0.999 <= choice.bound.upper <= 2.0


def test_batches_in_a_fixed_order_are_one_gaussian_release_of_the_same_noise_multiplier(small):
    fixed = [choice for choice in small.choices if choice.batches is Batches.FIXED_ORDER]
    [noise] = {choice.noise_multiplier for choice in fixed}
    alone = epsilon(Gaussian(noise), 1e-5, relation=Relation.ZERO_OUT).upper
    for choice in fixed:
        assert isinstance(choice.event, MatrixMechanism)
        assert (choice.event.min_separation, choice.event.max_participations) == (5, 3)
        assert choice.event.sensitivity == choice.sensitivity
        assert choice.bound.upper == pytest.approx(alone, rel=1e-9)


def test_plain_dp_sgd_has_the_noise_and_the_event_of_dp_sgd(small):
    plain = small.plain
    assert plain is small.choices[0]
    assert plain.event == Repeated(Poisson(0.2, Gaussian(plain.noise_multiplier)), 12)
    known = calibrate_noise_multiplier(
        2.0, 1e-5, lambda noise: Repeated(Poisson(0.2, Gaussian(noise)), 12), relation=Relation.ZERO_OUT
    )
    assert known <= plain.noise_multiplier <= known * (1 + 1e-4)
    # The sum of t independent draws has t times the variance, and the mean of t over 1 .. n is (n + 1) / 2.
    assert plain.error == pytest.approx(plain.noise_multiplier * math.sqrt(13 / 2), rel=1e-12)


def test_a_group_of_cyclic_batches_is_drawn_at_its_own_rate(small):
    for choice in small.choices[-2:]:
        noise = Gaussian(choice.noise_multiplier)
        assert choice.event == Repeated(Poisson(choice.bands / 5, noise), 12 // choice.bands)


# Passes of b steps, k of them: error over noise multiplier, as printed in the comparison of strategies (n = 1024).
PUBLISHED = [
    (1024, "identity", 1, "22.6"),
    (1024, "square-root", 1024, "3.11"),
    (1024, "bsr", 4, "12.7"),
    (1024, "bisr", 4, "9.1"),
    (1024, "bsr", 16, "7.2"),
    (1024, "bisr", 16, "5.1"),
    (1024, "bsr", 64, "4.4"),
    (128, "identity", 1, "64.0"),
    (128, "square-root", 1024, "13.0"),
    (128, "bsr", 4, "35.8"),
    (128, "bisr", 4, "25.8"),
    (128, "bsr", 16, "20.4"),
    (128, "bisr", 16, "14.4"),
    (128, "bsr", 64, "12.4"),
    (128, "bisr", 64, "10.6"),
    (64, "bsr", 64, "17.5"),
    (64, "bisr", 64, "17.7"),
]


def test_the_errors_in_a_fixed_order_are_the_published_ones():
    # Replace-one, which has no sampled choices to be calibrated; its factor of two is taken out.
    plans = {
        length: plan_noise(
            5.0, 1e-6, num_examples=length, batch_size=1, steps=1024, relation=Relation.REPLACE_ONE, bands=[4, 16, 64]
        )
        for length in (64, 128, 1024)
    }
    for length, strategy, bands, known in PUBLISHED:
        [choice] = [c for c in plans[length].choices if (c.strategy, c.bands) == (strategy, bands)]
        tolerance = 0.6 * 10.0 ** -len(known.partition(".")[2])
        assert choice.error / choice.noise_multiplier / 2 == pytest.approx(float(known), abs=tolerance)


def test_the_best_choice_has_the_least_error(small):
    assert small.best.error == min(choice.error for choice in small.choices)
    # A short run at a large rate: independent noise, which is amplified best, wins.
    short = plan_noise(1.0, 1e-5, num_examples=100, batch_size=30, steps=10)
    assert short.best is short.plain
    assert all(choice.error > short.plain.error for choice in short.choices[1:])
    # One pass of many steps: correlated noise wins, without amplification.
    long = plan_noise(8.0, 1e-5, num_examples=2000, batch_size=20, steps=100, bands=[16])
    assert long.best.batches is Batches.FIXED_ORDER
    assert long.ratio(long.best) < 0.5


def test_under_replace_one_there_is_no_sampling_and_twice_the_noise(small):
    plan = plan_noise(2.0, 1e-5, **SMALL, relation=Relation.REPLACE_ONE)
    fixed = [choice for choice in small.choices if choice.batches is Batches.FIXED_ORDER]
    assert [choice.strategy for choice in plan.choices] == [choice.strategy for choice in fixed]
    for choice, half in zip(plan.choices, fixed, strict=True):
        assert choice.noise_multiplier == half.noise_multiplier
        assert choice.error == pytest.approx(2 * half.error, rel=1e-15)
    assert plan.plain is None and plan.ratio(plan.best) is None
    [reason] = plan.left_out
    assert reason.startswith("poisson and cyclic-poisson batches: poisson sampling under replace_one has no theorem")


def test_under_add_remove_there_is_no_fixed_order(small):
    plan = plan_noise(2.0, 1e-5, **SMALL, relation=Relation.ADD_REMOVE)
    assert [choice.error for choice in plan.choices] == [
        choice.error for choice in small.choices if choice.batches is not Batches.FIXED_ORDER
    ]
    [reason] = plan.left_out
    assert reason.startswith("fixed-order batches: matrix_mechanism under add_remove has no theorem")


@pytest.mark.parametrize(
    ("examples", "batch", "steps", "most", "tried"),
    [
        (6000, 10, 2000, 600, [1, 2, 4, 8, 16, 32, 64]),
        (6000, 10, 20, 20, [1, 2, 4, 8, 16]),
        (40, 10, 12, 4, [1, 2, 4]),
        (31, 10, 12, 4, [1, 2, 4]),
        (10, 10, 12, 1, [1]),
        (10, 9, 1, 1, [1]),
    ],
)
def test_the_powers_of_two_that_fit_into_a_pass_are_tried(examples, batch, steps, most, tried):
    assert most_bands(examples, batch, steps) == most
    plan = plan_noise(
        3.0, 1e-5, num_examples=examples, batch_size=batch, steps=steps, relation=Relation.REPLACE_ONE
    )  # without sampling, to be quick
    found = {choice.bands for choice in plan.choices if choice.strategy is not Strategy.SQUARE_ROOT}
    assert sorted(found) == tried


def test_groups_that_are_smaller_than_a_batch_are_left_out():
    plan = plan_noise(3.0, 1e-5, num_examples=31, batch_size=10, steps=8, bands=[4, 3])
    assert [(c.strategy.value, c.bands) for c in plan.choices[3:]] == [
        *((name, bands) for name in ("bsr", "bisr", "band-mf") for bands in (3, 4)),
        ("band-mf", 3),
    ]
    [reason] = plan.left_out
    assert "4 groups" in reason and "a batch, 10" in reason


def test_what_no_noise_reaches_is_left_out_or_refused_by_name():
    plan = plan_noise(1e-8, 1e-20, num_examples=10**6, batch_size=1, steps=1)
    assert plan.choices == (plan.plain,)
    assert plan.left_out[0].startswith("fixed-order batches: epsilon 1e-08 at delta 1e-20 is out of reach")
    with pytest.raises(TargetUnreachable, match="out of reach"):
        plan_noise(1e-9, 1e-12, num_examples=100, batch_size=100, steps=5)


RUN = {"target_epsilon": 1.0, "delta": 1e-5, "num_examples": 100, "batch_size": 10, "steps": 20}


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"target_epsilon": 0.0}, "target_epsilon = 0"),
        ({"target_epsilon": math.nan}, "epsilon = nan"),
        ({"delta": 1.0}, r"delta = 1\.0"),
        ({"delta": 0.0}, r"delta = 0\.0"),
        ({"num_examples": 9}, "batch_size = 10 and num_examples = 9"),
        ({"num_examples": 0}, "num_examples = 0"),
        ({"batch_size": 0}, "batch_size = 0"),
        ({"batch_size": 1.5}, r"batch_size = 1\.5"),
        ({"steps": 0}, "steps = 0"),
        ({"steps": True}, "steps = True"),
        ({"steps": 10**7}, "steps = 10000000: strategies are made for at most 1000000"),
        ({"bands": [0]}, "bands = 0"),
        ({"bands": [2, 11]}, "bands = 11: give whole numbers from 1 to 10"),
        ({"bands": [2.0]}, r"bands = 2\.0"),
        ({"relation": "nobody"}, "nobody"),
    ],
)
def test_a_bad_plan_is_refused_by_name(change, said):
    with pytest.raises(InvalidParameter, match=said):
        plan_noise(**(RUN | change))


@pytest.mark.parametrize(
    ("make", "said"),
    [
        (lambda: band_mf(0, 2), "steps = 0"),
        (lambda: band_mf(10, 0), "bands = 0"),
        (lambda: band_mf(10, 2.0), r"bands = 2\.0"),
        (lambda: inverse_square_root(0), "steps = 0"),
        (lambda: rooted_mean_error(identity(3), momentum=1.0), r"momentum = 1\.0"),
        (lambda: rooted_mean_error(identity(3), momentum=math.nan), "momentum = nan"),
    ],
)
def test_a_bad_strategy_is_refused_by_name(make, said):
    with pytest.raises(InvalidParameter, match=said):
        make()
