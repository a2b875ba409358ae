"""The prv accountant against closed forms, exact sums and integrals: lower <= truth <= upper, and both close to it."""

from __future__ import annotations

import math
import threading

import mpmath
import numpy as np
import pytest
from hockey_sticks import (
    after,
    exchanged,
    gaussian,
    gaussian_losses,
    laplace,
    laplace_losses,
    mirrored,
    sampled,
    two_answers,
    two_answers_losses,
)
from inversion import log_delta
from lower_bounds import gaussian_epsilon, one_step_delta

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
    delta,
    epsilon,
    prv,
)
from accounting.normal_form import atoms_under

ADD = Relation.ADD_REMOVE


def by_prv(event, target, relation=ADD, **options):
    bound = epsilon(event, target, relation=relation, by="prv", **options)
    assert 0 <= bound.lower <= bound.estimate <= bound.upper
    return bound


def promised(bound):
    return bound.upper - bound.lower <= prv.default_tolerance(bound.upper)


# -- closed forms -----------------------------------------------------------------------------------------------------


GAUSSIANS = {
    "one": [(1.0, 1)],
    "little noise": [(0.1, 1)],
    "many": [(40.0, 5000)],
    "unequal": [(0.9, 1), (2.0, 1), (7.0, 1), (50.0, 1)],
    "counts without a common divisor": [(8.0, 35), (3.0, 12)],
    "a million": [(3e3, 10**6)],
    "next to nothing": [(1e5, 3)],
}


@pytest.mark.parametrize("target", [0.5, 1e-2, 1e-6, 1e-14, 1e-200])
@pytest.mark.parametrize("parts", GAUSSIANS.values(), ids=GAUSSIANS)
def test_unsampled_gaussians_have_their_exact_epsilon_between_the_bounds(parts, target):
    truth = gaussian_epsilon(math.sqrt(sum(count / noise**2 for noise, count in parts)), target)
    bound = by_prv(Composed(tuple(Repeated(Gaussian(noise), count) for noise, count in parts)), target)
    assert bound.lower <= truth * (1 + 1e-12) and truth * (1 - 1e-12) <= bound.upper
    assert bound.upper - truth <= max(1e-4, 1e-3 * truth)


STEPS = [(1.0, 0.01), (0.3, 1e-3), (0.1, 0.2), (5.0, 0.5), (0.8, 0.999999), (300.0, 0.1), (0.5, 1e-6)]


@pytest.mark.parametrize("target", [0.1, 1e-3, 1e-8, 1e-30, 1e-150])
@pytest.mark.parametrize("noise, rate", STEPS)
def test_one_sampled_step_has_its_closed_form_between_the_bounds(noise, rate, target):
    bound = by_prv(Poisson(rate, Gaussian(noise)), target)
    assert one_step_delta(noise, rate, bound.upper) <= target * (1 + 1e-9)
    assert bound.lower == 0 or one_step_delta(noise, rate, bound.lower) >= target * (1 - 1e-9)
    near = bound.upper - max(1e-4, 5e-3 * bound.upper)
    assert near < 0 or one_step_delta(noise, rate, near) >= target


@pytest.mark.parametrize("noise, rate, target", [(0.06, 0.01, 1e-110), (0.06, 0.3, 1e-199), (0.08, 1e-4, 1e-165)])
def test_a_step_that_betrays_everything_keeps_its_far_tail(noise, rate, target):
    """Where the density without the record is 0 to a double, the one with it is not."""
    step = Poisson(rate, Gaussian(noise))
    alone = epsilon(step, target, relation=ADD, by="gaussian").lower
    for event in (step, Composed((step, Poisson(0.01, Gaussian(1.0))))):
        bound = by_prv(event, target, tolerance=1.0)
        assert alone * (1 - 1e-9) <= bound.upper <= alone * 1.03


@pytest.mark.parametrize("target", [1e-3, 1e-6, 1e-12])
@pytest.mark.parametrize("noise", [0.08, 0.1, 0.2, 0.5])
def test_little_noise_without_sampling_goes_beside_other_steps(noise, target):
    event = Composed((Gaussian(noise), Poisson(1e-6, Gaussian(1.0))))
    alone = epsilon(Gaussian(noise), target, relation=ADD)
    bound = epsilon(event, target, relation=ADD)
    assert alone.lower <= bound.upper <= alone.upper * 1.002


# -- two and three steps ----------------------------------------------------------------------------------------------


def sampled_gaussian(rate, noise):
    return Poisson(rate, Gaussian(noise)), sampled(gaussian(1 / noise), rate), gaussian_losses(1 / noise, rate)


def sampled_laplace(rate, noise):
    return Poisson(rate, Laplace(noise)), sampled(laplace(noise), rate), laplace_losses(noise, rate)


def answers(rate, eps, fails):
    event = ApproximateDP(eps, fails)
    curve, losses = two_answers(eps, fails), two_answers_losses(eps, fails, rate)
    return (event, curve, losses) if rate == 1 else (Poisson(rate, event), sampled(curve, rate), losses)


LISTS = {
    "gaussian twice": [sampled_gaussian(0.1, 0.8)] * 2,
    "gaussian often": [sampled_gaussian(0.9, 2.0)] * 2,
    "gaussian rarely": [sampled_gaussian(1e-3, 0.4)] * 2,
    "unequal gaussians": [sampled_gaussian(0.3, 1.0), sampled_gaussian(0.02, 0.5)],
    "laplace twice": [sampled_laplace(0.2, 0.7)] * 2,
    "laplace unsampled": [(Laplace(1.5), laplace(1.5), laplace_losses(1.5))] * 2,
    "gaussian and laplace": [sampled_laplace(0.1, 0.5), sampled_gaussian(0.2, 1.0)],
    "gaussian and answers": [answers(1.0, 0.8, 1e-9), sampled_gaussian(0.2, 1.0)],
    "gaussian and sampled answers": [answers(0.3, 1.5, 1e-5), sampled_gaussian(0.5, 1.5)],
    "laplace and sampled answers": [answers(0.4, 1.0, 0.0), sampled_laplace(0.4, 1.0)],
}


def both_directions(parts, at):
    """The true delta of two releases, removed and added, at an array of epsilons."""
    (_, _, first), (_, then, _) = parts
    removed = after(first, then)
    return np.maximum(removed(at), exchanged(removed)(at))


@pytest.mark.parametrize("target", [0.2, 1e-2, 1e-4])
@pytest.mark.parametrize("name", LISTS)
def test_two_releases_have_their_integral_between_the_bounds(name, target):
    parts = LISTS[name]
    bound = by_prv(Composed(tuple(event for event, _, _ in parts)), target)
    at_upper, at_lower = both_directions(parts, np.array([bound.upper, bound.lower]))
    cancelled = 1e-12  # by the exchange in the oracle, and of its panels
    assert at_upper <= target * (1 + 1e-7) + cancelled
    assert bound.lower == 0 or at_lower >= target * (1 - 1e-7) - cancelled
    if bound.upper > 2e-3:
        [before] = both_directions(parts, np.array([bound.upper * (1 - 5e-3) - 1e-3]))
        assert before >= target * (1 - 1e-7)


@pytest.mark.parametrize("name", LISTS)
def test_delta_of_two_releases_has_its_integral_between_the_bounds(name):
    parts = LISTS[name]
    event = Composed(tuple(event for event, _, _ in parts))
    for at in (0.0, 0.05, 0.3, 0.6):
        bound = delta(event, at, relation=ADD, by="prv")
        [truth] = both_directions(parts, np.array([at]))
        assert bound.lower * (1 - 1e-7) - 1e-12 <= truth <= bound.upper * (1 + 1e-7) + 1e-12
        assert bound.upper <= truth * 1.05 + 1e-9


@pytest.mark.parametrize("target", [1e-2, 1e-5])
def test_three_releases_have_their_double_integral_between_the_bounds(target):
    (one, _, first), (two, _, second), (three, last, _) = (
        answers(0.4, 1.2, 0.0),
        sampled_gaussian(0.3, 1.0),
        sampled_gaussian(0.05, 0.6),
    )
    loss, mass = np.add.outer(first[0], second[0]).ravel(), np.outer(first[1], second[1]).ravel()
    kept = mass > 1e-13
    curve = after((loss[kept], mass[kept], 0.0), last)
    bound = by_prv(Composed((one, two, three)), target)
    at_upper, at_lower, before = curve(np.array([bound.upper, bound.lower, bound.upper * 0.995 - 1e-3]))
    assert at_upper <= target + 1e-8 and at_lower >= target - 1e-8 and before >= target


# -- exact sums -------------------------------------------------------------------------------------------------------


def composed_answers(eps, fails, rate, steps, at):
    """The exact delta of (sampled) answers of two kinds, the larger of both directions, to 50 digits."""
    with mpmath.workdps(50):
        eps, fails, rate, at = (mpmath.mpf(x) for x in (eps, fails, rate, at))
        q = [(1 - fails) / (1 + mpmath.exp(-eps)), (1 - fails) / (1 + mpmath.exp(eps)), fails, 0]
        p = [q[1], q[0], 0, fails]
        p = [(1 - rate) * without + rate * own for without, own in zip(q, p, strict=True)]
        removed, added = 1 - (1 - p[3]) ** steps, mpmath.mpf(0)
        for low in range(steps + 1):
            for high in range(steps - low + 1 if fails else 1):
                high = high if fails else steps - low
                rest = steps - low - high
                ways = mpmath.binomial(steps, low) * mpmath.binomial(steps - low, high)
                with_, without = (ways * x[0] ** low * x[1] ** high * x[2] ** rest for x in (p, q))
                removed += max(0, with_ - mpmath.exp(at) * without)
                added += max(0, without - mpmath.exp(at) * with_)
        return max(removed, added)


ANSWERS = {
    "pure": (0.3, 0.0, 1.0, 60),
    "pure, many": (0.01, 0.0, 1.0, 900),
    "pure, strong": (3.0, 0.0, 1.0, 7),
    "sampled": (1.0, 0.0, 0.1, 200),
    "sampled often": (0.5, 0.0, 0.9, 50),
    "sampled, strong": (5.0, 0.0, 0.01, 100),
    "approximate": (0.3, 1e-4, 1.0, 20),
    "approximate, sampled": (0.6, 1e-3, 0.2, 20),
}


@pytest.mark.parametrize("target", [0.3, 1e-1, 1e-3, 1e-8, 1e-40])
@pytest.mark.parametrize("name", ANSWERS)
def test_answers_of_two_kinds_have_their_exact_sum_between_the_bounds(name, target):
    eps, fails, rate, steps = ANSWERS[name]
    event = Repeated(ApproximateDP(eps, fails) if rate == 1 else Poisson(rate, ApproximateDP(eps, fails)), steps)
    if 1 - (1 - rate * fails) ** steps >= target:
        assert by_prv(event, target).upper == math.inf
        return
    bound = by_prv(event, target)
    assert composed_answers(eps, fails, rate, steps, bound.upper) <= target
    assert bound.lower == 0 or composed_answers(eps, fails, rate, steps, bound.lower) >= target * (1 - 1e-9)
    before = bound.upper * (1 - 2e-2) - 1e-3
    assert before < 0 or composed_answers(eps, fails, rate, steps, before) > target


# -- many steps -------------------------------------------------------------------------------------------------------


def spectra(event, target, h):
    """(tilts, bounds of log delta as functions of epsilon) on a grid of step ``h``: removed, added."""
    step, times = prv._per_step(atoms_under(event, ADD))
    aim = prv._aim_at_delta(step, ADD, times, target)
    run = prv._run(step, ADD, (times, times), aim, h)
    return (aim.removed, aim.added), [each.after(np.array([times])).log_delta_above for each in run.above]


@pytest.mark.parametrize("target", [1e-4, 1e-16, 1e-60])
@pytest.mark.parametrize("noise, rate, steps", [(1.0, 0.05, 300), (2.0, 0.5, 40), (20.0, 0.2, 20_000)])
def test_both_directions_lie_above_the_inverted_transform_and_near_it(noise, rate, steps, target):
    event = Repeated(Poisson(rate, Gaussian(noise)), steps)
    bound = by_prv(event, target)
    h = 0.003 * math.sqrt(bound.upper / steps)
    for tilt, log_bound, added in zip(*spectra(event, target, h), (False, True), strict=True):
        for at, close in ((bound.upper, not added), (tilt.epsilon, True)):
            truth, found = log_delta(noise, rate, steps, at, added=added), float(log_bound(np.array([at]))[0][0])
            assert truth is None or truth - 1e-8 <= found
            assert truth is None or not close or found <= truth + 0.1
    truth = log_delta(noise, rate, steps, bound.upper)
    assert truth is None or truth <= math.log(target) + 1e-8
    truth = log_delta(noise, rate, steps, bound.lower)
    assert truth is None or truth >= math.log(target) - 1e-8


@pytest.mark.parametrize("target", [1e-3, 1e-6])
@pytest.mark.parametrize("rate, noise, steps", [(1.0, 8.0, 100), (0.1, 1.0, 50), (0.01, 0.5, 400)], ids=str)
def test_composed_laplace_agrees_with_dp_accounting(rate, noise, steps, target):
    pld = pytest.importorskip("dp_accounting.pld.privacy_loss_distribution")
    bound = by_prv(Repeated(Poisson(rate, Laplace(noise)), steps), target)
    for pessimistic in (False, True):
        theirs = pld.from_laplace_mechanism(
            noise, sampling_prob=rate, value_discretization_interval=1e-3, pessimistic_estimate=pessimistic
        ).self_compose(steps)
        found = theirs.get_epsilon_for_delta(target)
        if pessimistic:
            assert bound.upper <= found + 2e-3 and bound.lower <= found
        else:
            assert bound.upper >= found - 1e-9


# -- what has no closed form ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("rate, noise", [(0.1, 0.5), (0.5, 1.0), (0.02, 0.3)])
def test_fixed_batches_are_no_better_than_two_data_sets_and_no_worse_than_renyi(rate, noise):
    """Record x = 1/2 against x = -1/2 among zeros, in sensitivities: mixtures of N(0, s^2) and N(+-1/2, s^2)."""
    size = 1000
    event = WithoutReplacement(round(rate * size), size, Gaussian(noise))
    y = np.linspace(-0.5 - 12 * noise, 0.5 + 12 * noise, 4001)
    p, q = (
        ((1 - rate) * np.exp(-((y / noise) ** 2) / 2) + rate * np.exp(-(((y - x) / noise) ** 2) / 2))
        for x in (0.5, -0.5)
    )
    p, q = p / p.sum(), q / q.sum()
    for at in (0.0, 0.1, 0.5, 2.0):
        bound = delta(event, at, relation="replace_one", by="prv")
        assert np.sum(np.maximum(0.0, p - math.exp(at) * q)) <= bound.upper * (1 + 1e-6)
        closed = float(mirrored(sampled(gaussian(1 / noise), rate))(np.array([at]))[0])
        assert closed * (1 - 1e-9) <= bound.upper <= closed * 1.01 + 1e-12
    twice, many = Repeated(event, 2), Repeated(event, 500)
    p2, q2 = np.outer(p[::4], p[::4]), np.outer(q[::4], q[::4])
    p2, q2 = p2 / p2.sum(), q2 / q2.sum()
    for at in (0.1, 0.5, 2.0):
        truth = np.sum(np.maximum(0.0, p2 - math.exp(at) * q2))
        assert truth <= delta(twice, at, relation="replace_one", by="prv").upper * (1 + 1e-4)
    for target in (1e-3, 1e-6, 1e-10):
        bound = by_prv(many, target, "replace_one")
        renyi = epsilon(many, target, relation="replace_one", by="rdp").upper
        assert (
            epsilon(Repeated(Poisson(rate, Gaussian(noise)), 500), target, relation=ADD).lower <= bound.upper <= renyi
        )


@pytest.mark.parametrize("relation", ["add_remove", "zero_out"])
@pytest.mark.parametrize("target", [1e-4, 1e-7])
def test_a_cap_that_is_rarely_met_costs_next_to_nothing_and_a_low_one_more(relation, target):
    plain = by_prv(Repeated(Poisson(0.01, Gaussian(1.0)), 500), target, relation)
    found = [
        by_prv(Repeated(TruncatedPoisson(0.01, cap, 5000, Gaussian(1.0)), 500), target, relation).upper
        for cap in (150, 60, 30)
    ]
    more = 1.06 if relation == "zero_out" else 1.0  # the mirrored pair is used for cut batches only
    assert plain.lower <= found[0] <= plain.upper * more * (1 + 1e-3)
    assert found == sorted(found)


# -- laws -------------------------------------------------------------------------------------------------------------


MANY = {
    "poisson": Repeated(Poisson(0.01, Gaussian(0.9)), 800),
    "unequal": Composed(tuple(Poisson(0.01 * k, Gaussian(0.5 + 0.3 * k)) for k in range(1, 5))),
    "laplace": Repeated(Poisson(0.05, Laplace(0.8)), 100),
    "a batch": Repeated(Poisson(0.1, Composed((Gaussian(2.0), Laplace(3.0)))), 30),
}


@pytest.mark.parametrize("event", MANY.values(), ids=MANY)
def test_delta_and_epsilon_undo_each_other(event):
    for target in (1e-2, 1e-7):
        bound = by_prv(event, target)
        assert delta(event, bound.upper, relation=ADD, by="prv").lower <= target
        assert delta(event, bound.upper, relation=ADD, by="prv").upper >= target * 0.97
        assert delta(event, bound.lower, relation=ADD, by="prv").upper >= target


@pytest.mark.parametrize("event", MANY.values(), ids=MANY)
def test_answers_depend_on_no_earlier_question_and_on_no_thread(event):
    targets = [1e-3, 1e-6]
    caches = prv._run, prv._run_for, prv._aim_at_delta, prv._aim_at_epsilon

    def answers():
        return [by_prv(event, target) for target in targets], delta(event, 1.0, relation=ADD, by="prv")

    for cache in caches:
        cache.cache_clear()
    first = answers()
    for cache in caches:
        cache.cache_clear()
    delta(event, 1.0, relation=ADD, by="prv")
    for target in reversed(targets):
        by_prv(event, target, tolerance=0.3)
    found = []
    threads = [threading.Thread(target=lambda: found.append(answers())) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert found == [first] * 4


@pytest.mark.parametrize("tolerance", [1e-4, 1e-2, 1e6])
def test_any_tolerance_is_kept_where_both_bounds_are_of_second_order(tolerance):
    event = Repeated(Poisson(0.02, Gaussian(1.1)), 100)
    bound, fine = by_prv(event, 1e-6, tolerance=tolerance), by_prv(event, 1e-6)
    assert bound.upper - bound.lower <= tolerance
    assert bound.lower <= fine.upper and fine.lower <= bound.upper


@pytest.mark.parametrize("target", [1e-201, 0.95])
def test_deltas_beyond_the_arithmetic_are_refused_by_name_and_answered_otherwise(target):
    event = Repeated(Poisson(0.02, Gaussian(1.1)), 100)
    with pytest.raises(Unsupported, match="rdp"):
        by_prv(event, target)
    assert 0 <= epsilon(event, target, relation=ADD).upper < math.inf
