"""The curve of epsilon over steps says at each step what a question about that step alone would."""

from __future__ import annotations

import itertools
import math
import threading

import pytest

from accounting import (
    ApproximateDP,
    Composed,
    Gaussian,
    InvalidParameter,
    Laplace,
    Poisson,
    Repeated,
    TruncatedPoisson,
    Unsupported,
    WithoutReplacement,
    epsilon,
    epsilon_curve,
    prv,
)

EVENTS = {
    "poisson": (Poisson(0.02, Gaussian(0.9)), "add_remove"),
    "rarely": (Poisson(1e-4, Gaussian(0.5)), "zero_out"),
    "two a step": (Composed((Repeated(Poisson(0.01, Gaussian(0.8)), 3), Poisson(0.1, Gaussian(5.0)))), "add_remove"),
    "unsampled beside sampled": (Composed((Gaussian(60.0), Poisson(0.05, Gaussian(2.0)))), "add_remove"),
    "truncated": (TruncatedPoisson(0.01, 25, 1000, Gaussian(1.0)), "add_remove"),
    "fixed batches": (WithoutReplacement(10, 1000, Gaussian(1.0)), "replace_one"),
    "laplace": (Poisson(0.05, Laplace(2.0)), "add_remove"),
    "answers": (Poisson(0.1, ApproximateDP(0.1, 1e-10)), "add_remove"),
    "gaussian": (Gaussian(20.0), "replace_one"),
}
STEPS = 20


def slack(value: float) -> float:
    return 2.5 * prv.default_tolerance(value)


@pytest.mark.parametrize("event, relation", EVENTS.values(), ids=EVENTS)
def test_each_point_is_the_epsilon_of_that_many_steps(event, relation):
    delta = 1e-6
    curve = epsilon_curve(event, STEPS, delta, relation=relation)
    assert len(curve) == STEPS
    for steps in (2, 17, STEPS):
        alone, point = epsilon(Repeated(event, steps), delta, relation=relation), curve[steps - 1]
        assert 0 <= point.lower <= point.estimate <= point.upper < math.inf
        assert point.lower <= alone.upper and alone.lower <= point.upper
        assert point.upper == pytest.approx(alone.upper, abs=slack(alone.upper))
    for before, after in itertools.pairwise(curve):
        assert after.upper >= before.upper - slack(before.upper)


def test_it_is_0_as_long_as_the_record_was_hardly_ever_drawn():
    curve = epsilon_curve(Poisson(1e-7, Gaussian(0.5)), 15, 1e-6, relation="add_remove")
    once = math.erf(2 / math.sqrt(8)) * 1e-7
    for steps, point in enumerate(curve, start=1):
        assert (point.upper == 0) == (steps * once * (1 + 1e-9) <= 1e-6)


@pytest.mark.parametrize("delta", [1e-250, 0.97])
def test_deltas_beyond_the_numerical_accountant_have_a_curve_too(delta):
    curve = epsilon_curve(Poisson(0.02, Gaussian(0.9)), 5, delta, relation="add_remove")
    alone = epsilon(Repeated(Poisson(0.02, Gaussian(0.9)), 5), delta, relation="add_remove")
    assert curve[-1].upper == pytest.approx(alone.upper, rel=1e-6)


def test_more_steps_than_the_numerical_accountant_counts_have_a_curve_too():
    event = Repeated(Poisson(1e-6, Gaussian(50.0)), 600_000_000)
    curve = epsilon_curve(event, 3, 1e-6, relation="add_remove")
    assert all(0 < point.upper < math.inf for point in curve)


def test_a_failure_that_uses_up_delta_is_infinite_in_the_curve_as_alone():
    event = Poisson(0.5, ApproximateDP(0.1, 1e-3))
    curve = epsilon_curve(event, 22, 1e-2, relation="add_remove")
    for steps in (10, 20, 21, 22):
        alone = epsilon(Repeated(event, steps), 1e-2, relation="add_remove").upper
        assert curve[steps - 1].upper == pytest.approx(alone, rel=1e-3)
        assert math.isinf(alone) or 1 - (1 - 5e-4) ** steps < 1e-2


def test_no_steps_have_no_points_and_bad_counts_are_refused():
    event = Poisson(0.02, Gaussian(0.9))
    assert epsilon_curve(event, 0, 1e-6, relation="add_remove") == []
    for steps in (-1, 2.5, True, "3", math.nan):
        with pytest.raises(InvalidParameter, match="steps"):
            epsilon_curve(event, steps, 1e-6, relation="add_remove")
    with pytest.raises(InvalidParameter, match="delta"):
        epsilon_curve(event, 3, 0.0, relation="add_remove")
    with pytest.raises(Unsupported, match="replace_one"):
        epsilon_curve(event, 3, 1e-6, relation="replace_one")


def test_it_is_the_same_in_every_thread_and_order():
    event = EVENTS["two a step"][0]
    expected = epsilon_curve(event, 18, 1e-6, relation="add_remove")
    for cache in (prv._run, prv._run_for, prv._aim_at_delta):
        cache.cache_clear()
    found = []
    threads = [
        threading.Thread(target=lambda: found.append(epsilon_curve(event, 18, 1e-6, relation="add_remove")))
        for _ in range(4)
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert found == [expected] * 4
    assert epsilon_curve(event, 10, 1e-6, relation="add_remove") == expected[:10]
