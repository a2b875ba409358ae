"""Epsilon against 46 intervals in which the truth is known to lie (``reference_epsilons.json`` says how)."""

from __future__ import annotations

import json
import math
from pathlib import Path

import pytest
from inversion import log_delta

from accounting import Gaussian, Poisson, Repeated, delta, epsilon

CASES = json.loads((Path(__file__).parent / "reference_epsilons.json").read_text())["cases"]
NAMES = ["{noise_multiplier:g}-{sample_rate:g}-{steps}-{delta:g}".format_map(case) for case in CASES]


def of(case):
    return Repeated(Poisson(case["sample_rate"], Gaussian(case["noise_multiplier"])), case["steps"])


def test_all_cases_are_here_and_differ():
    assert len(CASES) == 46 == len(set(NAMES))


@pytest.mark.parametrize("relation", ["add_remove", "zero_out"])
@pytest.mark.parametrize("case", CASES, ids=NAMES)
def test_epsilon_is_never_below_the_truth_and_hardly_above_it(case, relation):
    found = epsilon(of(case), case["delta"], relation=relation)
    assert case["epsilon_lower"] <= found.upper <= case["epsilon_upper"] + max(1e-3, 1e-3 * case["epsilon_upper"])
    assert 0 < found.lower <= case["epsilon_upper"]
    assert found.lower <= found.estimate <= found.upper


@pytest.mark.parametrize("case", CASES, ids=NAMES)
def test_delta_at_the_ends_of_the_interval_is_on_the_right_side(case):
    # Of an epsilon below the truth, delta must be above the case's; of one that is above, delta is less.
    assert delta(of(case), case["epsilon_lower"], relation="add_remove").upper >= case["delta"] * (1 - 1e-12)
    assert delta(of(case), case["epsilon_upper"], relation="add_remove").lower <= case["delta"]


def test_an_inverted_transform_says_so_too():
    settled = 0
    for case in CASES:
        run, target = (case["noise_multiplier"], case["sample_rate"], case["steps"]), math.log(case["delta"])
        at = (
            [log_delta(*run, case[end]) for end in ("epsilon_lower", "epsilon_upper")]
            if case["sample_rate"] < 1
            else [None]
        )
        if None not in at:
            settled += 1
            assert at[0] > target > at[1], case
    assert settled >= 25
