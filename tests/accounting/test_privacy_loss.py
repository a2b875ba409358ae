"""One step on a grid: at the grid's points exact, nowhere too good (upper) or too bad (lower), for all gamma > 0."""

from __future__ import annotations

import math

import numpy as np
import pytest
from hockey_sticks import (
    after,
    exchanged,
    gaussian,
    gaussian_exchanged,
    laplace,
    laplace_losses,
    mirrored,
    sampled,
    two_answers,
    two_answers_losses,
)
from scipy.stats import binom

from accounting import (
    ApproximateDP,
    Composed,
    Gaussian,
    Laplace,
    Poisson,
    Relation,
    Repeated,
    TruncatedPoisson,
    Unsupported,
    WithoutReplacement,
)
from accounting.normal_form import atoms_under
from accounting.privacy_loss import Masses, covers, lower, merges, total_variation, upper

ADD, REPLACE, ZERO = Relation.ADD_REMOVE, Relation.REPLACE_ONE, Relation.ZERO_OUT
NEGLIGIBLE = 1e-200


def truncated_curve(rate, cap, most, noise):
    p = float(binom.sf(cap - 1, most, rate))
    good, bad = sampled(gaussian(1 / noise), rate), sampled(gaussian(2 / noise), rate)
    return lambda at: (1 - p) * good(at) + p * bad(at)


PAIRS = {
    # event -> its curve, P against Q
    "gaussian": (Gaussian(0.7), gaussian(1 / 0.7)),
    "little noise": (Gaussian(0.1), gaussian(10.0)),
    "much noise": (Gaussian(300.0), gaussian(1 / 300.0)),
    "poisson": (Poisson(0.01, Gaussian(1.0)), sampled(gaussian(1.0), 0.01)),
    "poisson often": (Poisson(0.9, Gaussian(2.0)), sampled(gaussian(0.5), 0.9)),
    "poisson nearly always": (Poisson(1 - 1e-6, Gaussian(0.8)), sampled(gaussian(1.25), 1 - 1e-6)),
    "poisson rarely": (Poisson(1e-8, Gaussian(0.3)), sampled(gaussian(1 / 0.3), 1e-8)),
    "laplace": (Laplace(0.6), laplace(0.6)),
    "poisson laplace": (Poisson(0.2, Laplace(0.4)), sampled(laplace(0.4), 0.2)),
    "answers": (ApproximateDP(1.3, 0.0), two_answers(1.3, 0.0)),
    "answers that fail": (ApproximateDP(0.5, 1e-3), two_answers(0.5, 1e-3)),
    "poisson answers": (Poisson(0.3, ApproximateDP(2.0, 1e-2)), sampled(two_answers(2.0, 1e-2), 0.3)),
}
BOTH_WAYS = {
    # events whose pair is bounded from above by one that has a closed form, equal to its own exchange
    "without replacement": (
        WithoutReplacement(10, 200, Gaussian(0.8)),
        REPLACE,
        mirrored(sampled(gaussian(1.25), 0.05)),
    ),
    "laplace without replacement": (
        WithoutReplacement(1, 3, Laplace(1.1)),
        REPLACE,
        mirrored(sampled(laplace(1.1), 1 / 3)),
    ),
}
STEPS = [0.3, 0.02, 1e-3]


def curve_of(masses: Masses, h: float, at: np.ndarray) -> np.ndarray:
    loss = masses.offset + h * (masses.first + np.arange(len(masses.mass)))
    gain = np.maximum(0.0, -np.expm1(np.minimum(at[:, None] - loss, 0.0)))
    return gain @ masses.mass + masses.infinite


def places(h: float) -> np.ndarray:
    """Between grid points, on both sides of 0, out to where little is left."""
    return np.concatenate([np.linspace(-6, 12, 91) + h / math.pi, [15.0, 20.0, 40.0]])


@pytest.mark.parametrize("h", STEPS)
@pytest.mark.parametrize("name", PAIRS)
def test_connected_dots_are_never_too_good_and_exact_on_the_grid(name, h):
    event, curve = PAIRS[name]
    [(atom, _)] = atoms_under(event, ADD)
    removed, added = upper(atom, ADD, h, NEGLIGIBLE)
    between, on = places(h), h * np.unique(np.round(places(h) / h))
    assert np.all(curve_of(removed, h, between) >= curve(between) * (1 - 3e-12))
    cancelled = 2e-14 * (1 + np.exp(between))  # in the closed form, not in the masses
    assert np.all(curve_of(added, h, between) >= exchanged(curve)(between) * (1 - 3e-12) - cancelled)
    if name == "poisson answers":  # what only Q can give is put at the upper end of its cell
        return
    assert curve_of(removed, h, on) == pytest.approx(curve(on), rel=1e-11, abs=2e-12)
    assert np.all(np.abs(curve_of(added, h, on) - exchanged(curve)(on)) <= 2e-12 * (1 + np.exp(on)))


@pytest.mark.parametrize("h", STEPS)
@pytest.mark.parametrize("noise, rate", [(1.0, 0.01), (0.3, 1e-3), (3.0, 0.7), (0.1, 0.999), (0.5, 1 - 1e-9)])
def test_tails_of_an_added_record_keep_their_digits(noise, rate, h):
    atom = Poisson(rate, Gaussian(noise))
    added = upper(atom, ADD, h, NEGLIGIBLE).added
    at = places(h)
    at = at[at < -0.99 * math.log1p(-rate)]
    assert np.all(curve_of(added, h, at) >= gaussian_exchanged(1 / noise, rate)(at) * (1 - 3e-12))


@pytest.mark.parametrize("h", STEPS)
@pytest.mark.parametrize("name", BOTH_WAYS)
def test_fixed_batches_are_bounded_in_both_directions_by_one_list(name, h):
    event, relation, curve = BOTH_WAYS[name]
    [(atom, _)] = atoms_under(event, relation)
    both = upper(atom, relation, h, NEGLIGIBLE)
    assert both.removed == both.added
    at = places(h)
    assert np.all(curve_of(both.removed, h, at) >= curve(at) * (1 - 3e-12))
    at = h * np.arange(-20, 20)
    assert curve_of(both.removed, h, at) == pytest.approx(curve(at), abs=1e-10)


@pytest.mark.parametrize("h", STEPS)
@pytest.mark.parametrize("relation", [ADD, ZERO], ids=str)
@pytest.mark.parametrize("rate, cap, most, noise", [(0.1, 15, 100, 1.0), (0.3, 3, 5, 0.5), (0.01, 30, 1000, 2.0)])
def test_cut_batches_are_mixtures_of_two_shifts(rate, cap, most, noise, relation, h):
    removed, added = upper(TruncatedPoisson(rate, cap, most, Gaussian(noise)), relation, h, NEGLIGIBLE)
    curve, at = truncated_curve(rate, cap, most, noise), places(h)
    assert np.all(curve_of(removed, h, at) >= curve(at) * (1 - 1e-11))
    assert np.all(curve_of(added, h, at) >= exchanged(curve)(at) * (1 - 1e-11) - 1e-14 * (1 + np.exp(at)))
    near = h * np.arange(1, 10)
    assert curve_of(removed, h, near) == pytest.approx(curve(near), rel=1e-5, abs=1e-12)  # of the rare case's share


BATCHES = {
    "gaussian and laplace": (
        Composed((Gaussian(1.2), Laplace(0.9))),
        after(laplace_losses(0.9), gaussian(1 / 1.2)),
    ),
    "gaussian and answers": (
        Composed((ApproximateDP(0.7, 1e-4), Gaussian(0.8))),
        after(two_answers_losses(0.7, 1e-4), gaussian(1.25)),
    ),
    "laplace twice": (Repeated(Laplace(1.5), 2), after(laplace_losses(1.5), laplace(1.5))),
}


@pytest.mark.parametrize("rate", [0.02, 0.5, 0.999])
@pytest.mark.parametrize("name", BATCHES)
def test_releases_on_one_batch_are_sampled_together(name, rate):
    event, inner = BATCHES[name]
    [(atom, _)] = atoms_under(Poisson(rate, event), ADD)
    h = 0.02
    removed, added = upper(atom, ADD, h, 1e-30)
    at, curve = np.linspace(-3, 4, 30), sampled(inner, rate)
    for masses, truth in ((removed, curve), (added, exchanged(curve))):
        found = curve_of(masses, h, at)
        assert np.all(found >= truth(at) - 1e-10)
        assert found == pytest.approx(truth(at), abs=1e-3)


@pytest.mark.parametrize("h", STEPS)
@pytest.mark.parametrize("name", PAIRS)
def test_merged_masses_are_never_too_bad(name, h):
    event, curve = PAIRS[name]
    [(atom, _)] = atoms_under(event, ADD)
    masses = lower(atom, ADD, h, NEGLIGIBLE)
    at = places(h)
    found = curve_of(masses, h, at)
    assert np.all(found <= curve(at) * (1 + 3e-12) + 1e-15)
    assert float(np.sum(masses.mass)) + masses.infinite == pytest.approx(1, abs=1e-9)
    if merges(atom):  # no loss moved by more than a cell
        assert np.all(found >= curve(at + 3 * h) * (1 - 1e-9) - 1e-15)


@pytest.mark.parametrize("noise", [0.06, 0.5, 1.0, 5.0, 1e3])
@pytest.mark.parametrize("rate", [1e-12, 1e-4, 0.1, 0.8, 1 - 1e-9])
def test_masses_of_sampled_gaussians_bracket_the_closed_form_over_the_whole_range(noise, rate):
    atom = Poisson(rate, Gaussian(noise))
    assert covers(atom)
    spread = rate / noise if noise > 1 else min(1.0, 1 / noise)
    for h in (spread / 3, spread / 40):
        curve, at = sampled(gaussian(1 / noise), rate), np.linspace(-3 * spread, 10 * spread, 40)
        above, below = upper(atom, ADD, h, NEGLIGIBLE), lower(atom, ADD, h, NEGLIGIBLE)
        assert np.all(curve_of(above.removed, h, at) >= curve(at) * (1 - 3e-12) - 1e-15 * spread)
        assert np.all(curve_of(below, h, at) <= curve(at) * (1 + 3e-12) + 1e-15 * (1 + np.abs(at)))


@pytest.mark.parametrize("name", PAIRS)
def test_total_variation_is_delta_at_epsilon_0(name):
    event, curve = PAIRS[name]
    [(atom, _)] = atoms_under(event, ADD)
    truth = float(curve(np.zeros(1))[0])
    assert truth * (1 - 1e-15) <= total_variation(atom, ADD) <= truth * (1 + 1e-9)


@pytest.mark.parametrize("name", BATCHES)
def test_total_variation_of_a_batch_is_no_less_than_its_delta(name):
    event, inner = BATCHES[name]
    [(atom, _)] = atoms_under(Poisson(0.1, event), ADD)
    assert total_variation(atom, ADD) >= float(sampled(inner, 0.1)(np.zeros(1))[0])


@pytest.mark.parametrize(
    "atom",
    [Gaussian(0.05), Poisson(1e-13, Gaussian(1.0)), Laplace(1e-3), ApproximateDP(600.0, 0.0), ApproximateDP(1e-8, 0.1)],
    ids=str,
)
def test_what_a_double_cannot_hold_is_not_covered(atom):
    assert not covers(atom)


def test_what_has_no_pair_is_refused():
    with pytest.raises(Unsupported, match="leave `by` out"):
        upper(Repeated(Gaussian(1.0), 2), ADD, 0.1, 1e-30)
