"""``dpkit calibrate``: the number that was left out, on the safe side as it is printed."""

from __future__ import annotations

import math
import re

import pytest

from accounting.gaussian import epsilon_bounds

from .conftest import Run

TARGET = ("--target-epsilon", "2", "--delta", "1e-5")
POISSON = {"--noise-multiplier": "1.5", "--steps": "400", "--sample-rate": "0.02"}
BATCHES = {"--noise-multiplier": "1.5", "--steps": "400", "--batch-size": "20", "--num-examples": "1000"}
PASSES = {"--noise-multiplier": "4", "--steps": "35", "--sample-rate": "0.1", "--sampling": "shuffled"}
FULL = {"--noise-multiplier": "30", "--steps": "400", "--sampling": "full"}
SUBSETS = {**BATCHES, "--noise-multiplier": "3", "--sampling": "without-replacement"}


def words(given: dict[str, str]) -> list[str]:
    return [word for pair in given.items() for word in pair]


@pytest.mark.parametrize(
    ("given", "left_out"),
    [
        *((POISSON, name) for name in POISSON),
        (BATCHES, "--batch-size"),
        *((PASSES, name) for name in ("--noise-multiplier", "--steps")),
        *((FULL, name) for name in ("--noise-multiplier", "--steps")),
        *((SUBSETS, name) for name in ("--noise-multiplier", "--steps", "--batch-size")),
    ],
    ids=lambda value: value if isinstance(value, str) else value.get("--sampling", "poisson"),
)
def test_the_found_number_as_it_is_printed_keeps_to_the_target(dpkit: Run, given: dict[str, str], left_out: str):
    rest = {name: value for name, value in given.items() if name != left_out}
    done = dpkit("calibrate", *TARGET, *words(rest), "--json")
    assert done.code == 0, done.err
    assert "--" + done.json["found"].replace("_", "-") == left_out
    again = rest | {left_out: repr(done.json["value"])}
    epsilon = dpkit("epsilon", *TARGET[2:], *words(again), "--json").json
    assert epsilon["epsilon"] == done.json["epsilon"] <= 2.0
    for name in ("delta", "unit", "relation", "sampling", "accountant", "slack", "lower"):
        assert epsilon[name] == done.json[name]
    printed = re.match(r"(--[a-z-]+) (\S+)\n", dpkit("calibrate", *TARGET, *words(rest)).out)
    assert printed and printed.groups() == (left_out, repr(done.json["value"]))


def test_noise_of_the_full_batch_is_that_of_the_closed_form(dpkit: Run):
    found = dpkit("calibrate", *TARGET, "--steps", 400, "--sampling", "full", "--json").json["value"]
    lower, _, upper = epsilon_bounds(math.sqrt(400) / found, 1e-5)
    assert lower == pytest.approx(2.0, abs=1e-3)
    assert upper <= 2.0


@pytest.mark.parametrize("target", ["0.5", "2", "7.123456789"])
def test_one_step_more_than_was_found_is_too_much(dpkit: Run, target: str):
    rest = ("--target-epsilon", target, "--delta", "1e-5", "--noise-multiplier", "30", "--sampling", "full")
    steps = dpkit("calibrate", *rest, "--json").json["value"]
    below, above = (epsilon_bounds(math.sqrt(count) / 30, 1e-5)[1] for count in (steps, steps + 1))
    assert below <= float(target) < above


def test_one_example_more_in_the_batch_is_too_much(dpkit: Run):
    rest = {name: value for name, value in BATCHES.items() if name != "--batch-size"}
    size = dpkit("calibrate", *TARGET, *words(rest), "--json").json["value"]
    more = dpkit("epsilon", *TARGET[2:], *words(rest | {"--batch-size": str(size + 1)}), "--json").json
    assert more["estimate"] > 2.0 - 1e-3


def test_epsilon_is_not_above_a_target_of_many_digits(dpkit: Run):
    target = 1.00001
    done = dpkit(
        "calibrate", "--target-epsilon", target, "--delta", "1e-5", "--steps", 10, "--sampling", "full", "--json"
    )
    assert done.json["epsilon"] <= target


def test_epochs_stand_for_steps(dpkit: Run):
    rest = ("--target-epsilon", "2", "--delta", "1e-6", "--batch-size", "20", "--num-examples", "1000")
    by_epochs = dpkit("calibrate", *rest, "--epochs", "3", "--json").json
    by_steps = dpkit("calibrate", *rest, "--steps", "150", "--json").json
    assert by_epochs == by_steps


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        ((*TARGET, *words(POISSON)), "Left out: none"),
        ((*TARGET, "--steps", "5"), "Left out: --noise-multiplier, --sample-rate"),
        ((*TARGET, "--noise-multiplier", "1", "--steps", "5", "--sampling", "shuffled"), "not amplified"),
        (("--target-epsilon", "0", "--delta", "1e-5", *words(POISSON)[2:]), "--target-epsilon is 0"),
        (("--target-epsilon", "nan", "--delta", "1e-5", *words(POISSON)[2:]), "--target-epsilon is nan"),
        (("--delta", "1e-5", *words(POISSON)[2:]), "--target-epsilon"),
        (("--target-epsilon", "2", *words(POISSON)[2:]), "missing --delta"),
        ((*TARGET, "--noise-multiplier", "1e-3", "--sample-rate", "0.5"), "epsilon 2"),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_what_cannot_be_calibrated_is_refused_in_one_line(dpkit: Run, arguments: tuple[str, ...], said: str):
    done = dpkit("calibrate", *arguments)
    assert (done.code, done.out) == (1, "")
    assert said in done.err
    assert done.err.count("\n") == 1
