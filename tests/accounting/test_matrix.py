"""Matrix mechanisms: the strategies are what they say, and no pattern of participation moves them further than said."""

from __future__ import annotations

import itertools
import math

import numpy as np
import pytest

from accounting import Gaussian, InvalidParameter, Poisson, Relation, Repeated, epsilon
from accounting.matrix import (
    banded_inverse_square_root,
    banded_square_root,
    column_sensitivity,
    cyclic_poisson_event,
    identity,
    inverse,
    matrix_event,
    rooted_mean_error,
    sensitivity,
    square_root,
)


def dense(coefficients):
    """The lower-triangular Toeplitz matrix, entry by entry."""
    n = len(coefficients)
    return np.array([[coefficients[t - s] if t >= s else 0.0 for s in range(n)] for t in range(n)])


def brute_force_sensitivity(matrix, min_separation, max_participations):
    """The furthest that contributions of -1 and 1 in any allowed set of steps move the rows, pattern by pattern."""
    steps, furthest = matrix.shape[1], 0.0
    for times in range(1, max_participations + 1):
        for pattern in itertools.combinations(range(steps), times):
            if all(later - sooner >= min_separation for sooner, later in itertools.pairwise(pattern)):
                for signs in itertools.product((-1.0, 1.0), repeat=times):
                    furthest = max(furthest, float(np.linalg.norm(matrix[:, pattern] @ signs)))
    return furthest


STRATEGIES = {
    "identity": identity(9),
    "square_root": square_root(9),
    "banded_square_root": banded_square_root(9, 3),
    "banded_inverse_square_root": banded_inverse_square_root(9, 3)[0],
    "negative": -square_root(9),
    "constant": np.ones(9),
}
ODD_STRATEGIES = {
    "increasing": np.arange(1.0, 10.0),
    "bump": np.array([1.0, 0.2, 0.9, 0.1, 0.0, 0.5, 0.0, 0.0, 0.0]),
    "signs": np.array([1.0, -0.8, 0.6, -0.7, 0.3, 0.0, 0.1, 0.0, -0.2]),
    "inverse_square_root": inverse(square_root(9)),
    "random": np.random.default_rng(1).normal(size=9),
}
PATTERNS = list(itertools.product((1, 2, 3, 4, 9, 20), (1, 2, 3, 5)))


@pytest.mark.parametrize(("apart", "times"), PATTERNS)
@pytest.mark.parametrize("name", STRATEGIES)
def test_the_sensitivity_of_a_non_increasing_strategy_is_that_of_the_worst_pattern(name, apart, times):
    c = STRATEGIES[name]
    found = sensitivity(c, 9, min_separation=apart, max_participations=times)
    worst = brute_force_sensitivity(dense(c), apart, times)
    assert worst <= found <= worst * (1 + 1e-13)


@pytest.mark.parametrize(("apart", "times"), PATTERNS)
@pytest.mark.parametrize("name", ODD_STRATEGIES)
def test_no_pattern_moves_an_odd_strategy_further_than_said(name, apart, times):
    c = ODD_STRATEGIES[name]
    found = sensitivity(c, 9, min_separation=apart, max_participations=times)
    worst = brute_force_sensitivity(dense(c), apart, times)
    assert worst <= found
    if times == 1 or apart >= 9:
        assert found <= worst * (1 + 1e-13)


@pytest.mark.parametrize("coefficients", [[1.0, -0.8, 0.6], [0.5, 0.2, 1.0], [1.0, 0.0, -1.0]])
@pytest.mark.parametrize("apart", [3, 4])
def test_bands_that_never_meet_are_counted_exactly_whatever_they_are(coefficients, apart):
    c = np.concatenate([coefficients, np.zeros(6)])
    for times in (1, 2, 3):
        found = sensitivity(c, 9, min_separation=apart, max_participations=times)
        worst = brute_force_sensitivity(dense(c), apart, times)
        assert worst <= found <= worst * (1 + 1e-13)
        assert found <= math.sqrt(times) * column_sensitivity(dense(c)) * (1 + 1e-13)


def test_the_sensitivity_grows_with_participations_and_falls_with_separation():
    c = square_root(200)
    for times in range(1, 8):
        values = [sensitivity(c, 200, min_separation=b, max_participations=times) for b in range(1, 60)]
        assert values == sorted(values, reverse=True)
    values = [sensitivity(c, 200, min_separation=10, max_participations=times) for times in range(1, 40)]
    assert values == sorted(values)
    assert values[19] == values[38]  # only 20 fit into the run


def test_a_shorter_run_of_a_strategy_is_less_sensitive():
    c = square_root(64)
    values = [sensitivity(c, n, min_separation=4, max_participations=5) for n in range(1, 65)]
    assert values == sorted(values)
    assert values[15] == sensitivity(square_root(16), 16, min_separation=4, max_participations=5)


def test_the_sensitivity_is_above_the_exact_sum():
    # Of squares that no double holds; the sum of 10,000 of them is done in whole numbers.
    c = np.full(10_000, 0.1)
    exact = 10_000 * int(0.1 * 2**60) ** 2  # 0.1 is a whole number of 2^-60
    assert int(sensitivity(c, 10_000) * 2**60) ** 2 >= exact


def test_tiny_and_huge_strategies_keep_their_scale():
    for scale in (1e-200, 1e200):
        assert sensitivity(scale * identity(4), 4) == pytest.approx(scale, rel=1e-12)
        assert column_sensitivity(scale * np.eye(4)) == pytest.approx(scale, rel=1e-12)
        assert column_sensitivity(scale * np.eye(4)) >= scale <= sensitivity(scale * identity(4), 4)


def test_the_sensitivity_of_any_matrix_is_its_largest_column():
    matrix = np.array([[1.0, -3.0, 0.0], [2.0, 4.0, 1.0]])
    assert 5.0 <= column_sensitivity(matrix) <= 5.0 + 1e-12


@pytest.mark.parametrize("steps", [1, 2, 17, 100])
def test_the_square_root_squares_to_the_running_sum(steps):
    c = dense(square_root(steps))
    assert np.abs(c @ c - np.tril(np.ones((steps, steps)))).max() < 1e-13


@pytest.mark.parametrize("bands", [1, 2, 4, 8, 64])
def test_the_banded_inverse_times_its_strategy_is_the_identity(bands):
    c, r = banded_inverse_square_root(60, bands)
    assert np.abs(dense(r) @ dense(c) - np.eye(60)).max() < 1e-13
    assert np.count_nonzero(r) == min(bands, 60)
    assert (c >= 0).all() and (np.diff(c) <= 1e-16).all()
    assert np.abs(r[:bands] - np.linalg.inv(dense(square_root(60)))[:bands, 0]).max() < 1e-13


def test_the_known_coefficients():
    assert square_root(4).tolist() == [1, 0.5, 0.375, 0.3125]
    assert banded_square_root(4, 2).tolist() == [1, 0.5, 0, 0]
    assert banded_square_root(2, 9).tolist() == [1, 0.5]
    assert banded_inverse_square_root(5, 4)[1].tolist() == [1, -0.5, -0.125, -0.0625, 0]
    # Two bands: noise z_t - z_{t-1} / 2, so that C sums with weights 2^-k.
    assert banded_inverse_square_root(5, 2)[0].tolist() == [1, 0.5, 0.25, 0.125, 0.0625]


@pytest.mark.parametrize("name", [*STRATEGIES, *ODD_STRATEGIES])
def test_the_inverse_is_that_of_the_matrix(name):
    c = (STRATEGIES | ODD_STRATEGIES)[name]
    assert np.abs(dense(inverse(c)) @ dense(c) - np.eye(9)).max() < 1e-6 * np.abs(inverse(c)).max()


@pytest.mark.parametrize("bands", [None, 1, 3])
def test_the_error_is_that_of_the_dense_matrices(bands):
    c = square_root(30) if bands is None else banded_square_root(30, bands)
    noise = np.tril(np.ones((30, 30))) @ np.linalg.inv(dense(c))
    assert rooted_mean_error(c) == pytest.approx(math.sqrt((noise**2).sum() / 30), rel=1e-12)


# n = 1024, running sums: root mean squared error times sensitivity, as printed in the comparison of strategies.
ERRORS = [
    ("identity", 1, ("22.6", "64.0", None)),
    ("square_root", 1024, ("3.11", "13.0", None)),
    ("bsr", 4, ("12.7", "35.8", None)),
    ("bisr", 4, ("9.1", "25.8", None)),
    ("bsr", 16, ("7.2", "20.4", None)),
    ("bisr", 16, ("5.1", "14.4", None)),
    ("bsr", 64, ("4.4", "12.4", "17.5")),
    ("bisr", 64, ("3.5", "10.6", "17.7")),  # 3.448, printed in two digits by way of three
]


@pytest.mark.parametrize(("kind", "bands", "errors"), ERRORS, ids=[f"{kind}-{bands}" for kind, bands, _ in ERRORS])
def test_the_errors_of_the_strategies_are_the_published_ones(kind, bands, errors):
    c = {
        "identity": lambda: identity(1024),
        "square_root": lambda: square_root(1024),
        "bsr": lambda: banded_square_root(1024, bands),
        "bisr": lambda: banded_inverse_square_root(1024, bands)[0],
    }[kind]()
    for (times, apart), known in zip([(1, 1), (8, 128), (16, 64)], errors, strict=True):
        if known is not None:
            found = rooted_mean_error(c) * sensitivity(c, 1024, min_separation=apart, max_participations=times)
            assert found == pytest.approx(float(known), abs=0.6 * 10.0 ** -len(known.partition(".")[2]))


def test_ten_thousand_steps_are_no_trouble():
    c, r = banded_inverse_square_root(10_000, 100)
    assert sensitivity(c, 10_000, min_separation=1000, max_participations=10) < 10 * sensitivity(c, 10_000)
    assert np.abs(np.convolve(c, r)[:10_000] - np.eye(1, 10_000)[0]).max() < 1e-12


def test_the_event_of_a_run_is_the_gaussian_of_its_sensitivity():
    event = matrix_event(3.0, square_root(100), 100, 25, 4)
    assert event.sensitivity == sensitivity(square_root(100), 100, min_separation=25, max_participations=4)
    assert (event.noise_multiplier, event.min_separation, event.max_participations) == (3.0, 25, 4)
    for relation in (Relation.ZERO_OUT, Relation.REPLACE_ONE):
        found = epsilon(event, 1e-6, relation=relation).upper
        assert found == pytest.approx(epsilon(Gaussian(3.0 / event.sensitivity), 1e-6, relation=relation).upper)


def test_independent_noise_in_k_passes_is_k_gaussians():
    event = matrix_event(3.0, identity(100), 100, 25, 4)
    found = epsilon(event, 1e-6, relation=Relation.ZERO_OUT).upper
    assert found == pytest.approx(epsilon(Repeated(Gaussian(3.0), 4), 1e-6, relation=Relation.ZERO_OUT).upper)


def test_one_band_under_cyclic_sampling_is_dp_sgd():
    assert cyclic_poisson_event(1.0, 1, 1024, 0.01) == Repeated(Poisson(0.01, Gaussian(1.0)), 1024)


@pytest.mark.parametrize(("steps", "bands", "releases"), [(1024, 4, 256), (1023, 4, 256), (1025, 4, 257), (3, 4, 1)])
def test_a_group_takes_part_in_every_bands_th_step(steps, bands, releases):
    assert cyclic_poisson_event(1.0, bands, steps, 0.04) == Repeated(Poisson(0.04, Gaussian(1.0)), releases)


# sigma 1, expected batch N/100, 1024 steps, delta 1e-5: dp_accounting 0.6.0, PLD.
@pytest.mark.parametrize(("bands", "known"), [(1, 1.849), (4, 4.232), (16, 9.153), (64, 16.617)])
def test_cyclic_sampling_costs_what_another_library_says(bands, known):
    event = cyclic_poisson_event(1.0, bands, 1024, bands * 0.01)
    upper = epsilon(event, 1e-5, relation=Relation.ADD_REMOVE).upper
    assert known - 1e-3 <= upper <= 1.01 * known


GOOD = square_root(8)


@pytest.mark.parametrize(
    ("make", "said"),
    [
        (lambda: square_root(0), "steps = 0"),
        (lambda: identity(True), "steps = True"),
        (lambda: banded_square_root(8, 0), "bands = 0"),
        (lambda: banded_inverse_square_root(8, 2.0), r"bands = 2\.0"),  # pyright: ignore[reportArgumentType]
        (lambda: sensitivity(GOOD, 9), "steps = 9: there are 8 coefficients only"),
        (lambda: sensitivity(GOOD, 8, min_separation=0), "min_separation = 0"),
        (lambda: sensitivity(GOOD, 8, max_participations=-1), "max_participations = -1"),
        (lambda: sensitivity([1.0, math.nan], 2), "finite and not empty"),
        (lambda: sensitivity([], 1), "finite and not empty"),
        (lambda: sensitivity([[1.0]], 1), "vector of coefficients"),
        (lambda: sensitivity(["a"], 1), "vector of coefficients"),
        (lambda: sensitivity([0.0, 1.0], 2), "no inverse"),
        (lambda: inverse([1e-200, 1e200]), "range of a double"),
        (lambda: column_sensitivity(GOOD), "matrix of entries"),
        (lambda: column_sensitivity(np.zeros((2, 2))), "zero throughout"),
        (lambda: matrix_event(0.0, GOOD, 8, 1, 1), "noise_multiplier = 0"),
        (lambda: matrix_event(1.0, GOOD, 16, 1, 1), "8 coefficients only"),
        (lambda: cyclic_poisson_event(1.0, 4, 0, 0.1), "steps = 0"),
        (lambda: cyclic_poisson_event(1.0, 4, 8, 1.5), r"sample_rate = 1\.5"),
        (lambda: cyclic_poisson_event(math.nan, 4, 8, 0.5), "noise_multiplier = nan"),
    ],
)
def test_bad_input_is_refused_by_name(make, said):
    with pytest.raises(InvalidParameter, match=said):
        make()
