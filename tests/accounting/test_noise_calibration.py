"""Calibration returns the safe side, close to the target, or says that it cannot: noise, steps and sample rate."""

from __future__ import annotations

import math

import numpy as np
import pytest
from inversion import log_delta

from accounting import (
    Composed,
    Gaussian,
    InvalidParameter,
    Laplace,
    Poisson,
    Repeated,
    TargetUnreachable,
    TruncatedPoisson,
    Unsupported,
    WithoutReplacement,
    calibrate_noise_multiplier,
    calibrate_sample_rate,
    calibrate_steps,
    epsilon,
)

EVENTS = {
    "one gaussian": Gaussian,
    "poisson": lambda s: Repeated(Poisson(0.01, Gaussian(s)), 5000),
    "truncated": lambda s: Repeated(TruncatedPoisson(256 / 60_000, 352, 60_000, Gaussian(s)), 2000),
    "two parts": lambda s: Composed((Repeated(Poisson(0.01, Gaussian(s)), 200), Gaussian(10 * s))),
}


def reached(event, delta=1e-5, relation="add_remove"):
    return epsilon(event, delta, relation=relation).upper


@pytest.mark.parametrize("target", [0.05, 1.0, 8.0])
@pytest.mark.parametrize("event_of", EVENTS.values(), ids=EVENTS)
def test_epsilon_at_the_returned_noise_is_within_the_target_and_close_to_it(event_of, target):
    noise = calibrate_noise_multiplier(target, 1e-5, event_of, relation="add_remove")
    assert target * (1 - 1e-3) <= reached(event_of(noise)) <= target


def random_problems(number: int):
    """Settings of training runs, from the same seed each time: (rate, steps, noise, target, delta)."""
    rng = np.random.default_rng(20)
    for _ in range(number):
        rate, noise = 10 ** rng.uniform(-4, -0.3), 10 ** rng.uniform(-0.3, 1.5)
        yield rate, int(10 ** rng.uniform(0, 4)), noise, 10 ** rng.uniform(-1, 1.3), 10 ** rng.uniform(-12, -2)


# Each asserts that what was found is on the safe side, and returns whether it is close to the target as well.


def check_noise(rate, steps, _, target, delta):
    def event_of(noise):
        return Repeated(Poisson(rate, Gaussian(noise)), steps)

    found = reached(event_of(calibrate_noise_multiplier(target, delta, event_of, relation="add_remove")), delta)
    assert found <= target
    return found >= target * (1 - 1e-3)


def check_rate(_, steps, noise, target, delta):
    def event_of(rate):
        return Repeated(Poisson(rate, Gaussian(noise)), steps)

    rate = calibrate_sample_rate(target, delta, event_of, relation="add_remove")
    found = reached(event_of(rate), delta)
    assert found <= target
    return rate == 1 or found >= target * (1 - 1e-3) or reached(event_of(rate * 1.003), delta) > target


def check_steps(rate, _, noise, target, delta):
    def event_of(steps):
        return Repeated(Poisson(rate, Gaussian(noise)), steps)

    try:
        steps = calibrate_steps(target, delta, event_of, relation="add_remove")
    except TargetUnreachable:
        return reached(event_of(1), delta) > target or reached(event_of(2**40), delta) <= target
    assert reached(event_of(steps), delta) <= target
    return reached(event_of(steps + 1 + steps // 200), delta) > target * (1 - 1e-3)


CHECKS = [check_noise, check_rate, check_steps]


@pytest.mark.parametrize("place", [0, 2])
@pytest.mark.parametrize("check", CHECKS, ids=lambda check: check.__name__)
def test_random_problems_are_solved_on_the_safe_side(check, place):
    assert check(*list(random_problems(3))[place])


@pytest.mark.slow
@pytest.mark.parametrize("check", CHECKS, ids=lambda check: check.__name__)
def test_forty_random_problems_are_solved_on_the_safe_side(check):
    # Safe is every one. Where single steps hardly lose anything and delta is tiny, bounds are wide and jump.
    close = [check(*problem) for problem in random_problems(40)]
    assert sum(close) >= 34


def test_less_noise_than_returned_misses_the_target():
    event_of = EVENTS["poisson"]
    noise = calibrate_noise_multiplier(2.0, 1e-5, event_of, relation="zero_out")
    assert log_delta(noise, 0.01, 5000, 2.0) <= math.log(1e-5) <= log_delta(noise * 0.998, 0.01, 5000, 2.0)
    assert reached(event_of(noise * 0.998), relation="zero_out") > 2.0


def test_one_step_more_than_returned_misses_the_target():
    def event_of(steps):
        return Repeated(Gaussian(10.0), steps)

    steps = calibrate_steps(3.0, 1e-6, event_of, relation="replace_one")
    assert reached(event_of(steps), 1e-6, "replace_one") <= 3.0 < reached(event_of(steps + 1), 1e-6, "replace_one")


def test_batches_of_fixed_size_and_other_noise_can_be_calibrated():
    def fixed(noise):
        return Repeated(WithoutReplacement(50, 1000, Gaussian(noise)), 100)

    noise = calibrate_noise_multiplier(1.0, 1e-6, fixed, relation="replace_one")
    assert 0.999 <= reached(fixed(noise), 1e-6, "replace_one") <= 1.0

    def laplace(noise):
        return Poisson(0.1, Laplace(noise))

    noise = calibrate_noise_multiplier(0.5, 1e-6, laplace, relation="add_remove")
    assert 0.499 <= reached(laplace(noise), 1e-6) <= 0.5


def test_unreachable_targets_say_what_is_reached():
    with pytest.raises(TargetUnreachable, match="still"):
        calibrate_noise_multiplier(0.5, 1e-5, lambda s: Repeated(Gaussian(1.0), 10), relation="add_remove")
    with pytest.raises(TargetUnreachable, match="still"):
        calibrate_sample_rate(0.5, 1e-5, lambda rate: Repeated(Gaussian(1.0), 10), relation="add_remove")
    with pytest.raises(TargetUnreachable, match="one step alone"):
        calibrate_steps(0.5, 1e-5, lambda steps: Repeated(Gaussian(1.0), steps), relation="add_remove")
    with pytest.raises(TargetUnreachable, match="not what limits"):
        calibrate_steps(0.5, 1e-5, lambda steps: Repeated(Gaussian(1e9), steps), relation="add_remove")


def test_what_does_not_matter_is_returned_at_once():
    def nothing(_):
        return Repeated(Gaussian(1.0), 0)

    assert calibrate_noise_multiplier(5.0, 1e-5, nothing, relation="add_remove") > 0
    assert calibrate_sample_rate(5.0, 1e-5, nothing, relation="add_remove") == 1.0


STRANGE = {
    "a staircase": lambda s: Repeated(Gaussian(math.ceil(s)), 10),
    "a jump": lambda s: Repeated(Gaussian(s if s > 7 else 0.1), 10),
    "a wave": lambda s: Gaussian(s * (1.5 + math.sin(40 * s))),
    "a hole": lambda s: Gaussian(0.2 if 3 < s < 4 else s),
}


@pytest.mark.parametrize("event_of", STRANGE.values(), ids=STRANGE)
@pytest.mark.parametrize("target", [0.5, 2.0, 9.0])
def test_epsilon_that_is_not_monotone_in_the_noise_still_keeps_the_promise(event_of, target):
    assert reached(event_of(calibrate_noise_multiplier(target, 1e-5, event_of, relation="add_remove"))) <= target


def test_steps_and_rates_need_not_be_monotone_either():
    def steps_of(steps):
        return Repeated(Gaussian(8.0), steps if steps % 7 else 5 * steps)

    assert reached(steps_of(calibrate_steps(2.0, 1e-5, steps_of, relation="add_remove"))) <= 2.0

    def rate_of(rate):
        return Repeated(Poisson(rate if math.sin(50 * rate) > -0.5 else 1.0, Gaussian(1.0)), 4)

    assert reached(rate_of(calibrate_sample_rate(2.0, 1e-5, rate_of, relation="add_remove"))) <= 2.0


@pytest.mark.parametrize("calibrate", [calibrate_noise_multiplier, calibrate_sample_rate, calibrate_steps])
def test_errors_of_the_event_come_through(calibrate):
    def raising(_):
        raise ZeroDivisionError("mine")

    with pytest.raises(ZeroDivisionError, match="mine"):
        calibrate(1.0, 1e-5, raising, relation="add_remove")
    with pytest.raises(Unsupported, match="replace_one"):
        calibrate(1.0, 1e-5, lambda _: Poisson(0.1, Gaussian(1.0)), relation="replace_one")


@pytest.mark.parametrize("target", [0.0, -1.0, float("nan"), float("inf")])
@pytest.mark.parametrize("calibrate", [calibrate_noise_multiplier, calibrate_sample_rate, calibrate_steps])
def test_a_target_that_is_not_positive_is_refused(calibrate, target):
    with pytest.raises(InvalidParameter, match="epsilon"):
        calibrate(target, 1e-5, lambda _: Gaussian(1.0), relation="add_remove")


@pytest.mark.parametrize("delta", [0.0, 1.0, -1e-5, float("nan")])
def test_a_delta_outside_0_and_1_is_refused(delta):
    with pytest.raises(InvalidParameter, match="delta"):
        calibrate_noise_multiplier(1.0, delta, Gaussian, relation="add_remove")
