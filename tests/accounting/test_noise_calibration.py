"""Calibration returns the safe side, close to the target, or says that it cannot."""

from __future__ import annotations

import pytest

from accounting import (
    Gaussian,
    InvalidParameter,
    Poisson,
    Repeated,
    TargetUnreachable,
    TruncatedPoisson,
    calibrate_noise_multiplier,
    epsilon,
)

EVENTS = {
    "one gaussian": Gaussian,
    "poisson": lambda s: Repeated(Poisson(0.01, Gaussian(s)), 5000),
    "truncated": lambda s: Repeated(TruncatedPoisson(256 / 60_000, 352, 60_000, Gaussian(s)), 2000),
}


@pytest.mark.parametrize("target", [0.05, 1.0, 8.0, 50.0])
@pytest.mark.parametrize("event_of", EVENTS.values(), ids=EVENTS)
def test_epsilon_at_the_returned_noise_is_within_the_target_and_close_to_it(event_of, target):
    noise = calibrate_noise_multiplier(target, 1e-5, event_of, relation="add_remove")
    reached = epsilon(event_of(noise), 1e-5, relation="add_remove").upper
    assert target - 1e-3 <= reached <= target


def test_less_noise_than_returned_misses_the_target():
    event_of = EVENTS["poisson"]
    noise = calibrate_noise_multiplier(2.0, 1e-5, event_of, relation="zero_out")
    assert noise == pytest.approx(1.695, abs=0.01)
    assert epsilon(event_of(noise * 0.999), 1e-5, relation="zero_out").upper > 2.0


def test_an_unreachable_target_says_what_is_reached():
    with pytest.raises(TargetUnreachable, match="still"):
        calibrate_noise_multiplier(0.5, 1e-5, lambda s: Repeated(Gaussian(1.0), 10), relation="add_remove")


def test_noise_that_does_not_matter_is_returned_at_once():
    noise = calibrate_noise_multiplier(5.0, 1e-5, lambda s: Repeated(Gaussian(s), 0), relation="add_remove")
    assert noise > 0


@pytest.mark.parametrize("target", [0.0, -1.0, float("nan"), float("inf")])
def test_a_target_that_is_not_positive_is_refused(target):
    with pytest.raises(InvalidParameter, match="epsilon"):
        calibrate_noise_multiplier(target, 1e-5, Gaussian, relation="add_remove")
