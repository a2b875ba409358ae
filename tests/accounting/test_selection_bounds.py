"""What a search costs: against published tables, other forms of the theorems, exact cases and orders that attain it."""

from __future__ import annotations

import math
from collections.abc import Callable

import numpy as np
import pytest
import scipy
from scipy.stats import norm

from accounting import Gaussian, Relation, Repeated, rdp, selection
from accounting.errors import InvalidParameter, Unsupported
from accounting.events import BinomialTrials, PoissonTrials, Trials, TruncatedNegativeBinomial
from accounting.gaussian import delta_bounds, epsilon_bounds
from accounting.sampled_gaussian import ORDERS

NOISE = 4.2247
"""Of a Gaussian trial that is (1, 1e-6)-private."""
DELTA = 1e-6
TNB = selection.truncated_negative_binomial

# Law; Renyi of theorems 2 and 6; one line; full profile or layered; exact if the best is the largest output.
TABLE = {
    "log 3": (selection.logarithmic(3), 1.568, 1.383, 1.245, 1.056),
    "log 10": (selection.logarithmic(10), 1.798, 1.635, 1.457, 1.115),
    "log 100": (selection.logarithmic(100), 2.117, 1.962, 1.785, 1.220),
    "log 1000": (selection.logarithmic(1000), 2.372, 2.223, 2.056, 1.318),
    "geometric 10": (selection.geometric(10), 2.150, 1.876, 1.568, 1.115),
    "geometric 100": (selection.geometric(100), 2.674, 2.430, 2.068, 1.220),
    "geometric 1000": (selection.geometric(1000), 3.094, 2.859, 2.507, 1.318),
    "eta 4, 100": (TNB(100, 4), 4.174, 3.649, 2.780, 1.220),
    "poisson 10": (PoissonTrials(10.0), 2.364, 2.057, 2.057, 1.115),
    "poisson 100": (PoissonTrials(100.0), 8.649, 10.641, 7.252, 5.242),
    "poisson 1000": (PoissonTrials(1000.0), 17.134, 95.53, 12.424, 9.747),
}
LAWS: dict[str, Trials] = {name: row[0] for name, row in TABLE.items()}
LAWS |= {"eta -0.5, 10": TNB(10, -0.5), "binomial 10": BinomialTrials(20, 0.5)}


def gaussian_profile(noise: float = NOISE) -> Callable[[float], float]:
    return lambda epsilon: delta_bounds(1 / noise, epsilon)[2]


def moments(noise: float = NOISE) -> np.ndarray:
    return rdp.step_log_moment(Gaussian(noise), Relation.ADD_REMOVE)


def epsilon_by_moments(log_moments: np.ndarray, delta: float = DELTA) -> float:
    conversion = np.log1p(-1 / ORDERS) - np.log(delta * ORDERS) / (ORDERS - 1)
    return float(np.min(log_moments / (ORDERS - 1) + conversion))


def pure_profile(pure: float, delta: float = 0.0) -> Callable[[float], float]:
    """The exact profile of the worst (pure, delta)-private mechanism."""

    def profile(epsilon: float) -> float:
        return delta + (1 - delta) * max(0.0, (math.exp(pure) - math.exp(epsilon)) / (1 + math.exp(pure)))

    return profile


@pytest.mark.parametrize("name", TABLE)
def test_bounds_lie_between_the_exact_cost_of_one_order_and_the_published_bounds(name):
    trials, by_renyi, by_one_line, by_profile, exact = TABLE[name]
    bound = selection.profile_epsilon(trials, DELTA, gaussian_profile())
    assert exact <= bound <= by_profile + 1e-3
    assert bound <= by_one_line + 1e-3
    assert bound <= epsilon_by_moments(selection.renyi_log_moments(trials, moments())) <= by_renyi + 1e-3
    assert selection.epsilon_bound(trials, DELTA, gaussian_profile(), moments()) == bound


def log_weight(trials: Trials, u: np.ndarray) -> np.ndarray:
    """ln phi'(1 - u)."""
    match trials:
        case TruncatedNegativeBinomial(shape=shape, gamma=gamma):
            return math.log(selection.mean(trials)) + (shape + 1) * np.log(gamma / (gamma + (1 - gamma) * u))
        case PoissonTrials(mean=mean):
            return math.log(mean) - mean * u
        case BinomialTrials(count=count, probability=p):
            return math.log(count * p) + (count - 1) * np.log1p(-p * u)


def epsilon_of_an_order(trials: Trials, noise: float, share: float) -> float:
    """The epsilon that is attained where the best outputs are the lowest, of probability ``share``, then the highest.

    The density of the released output is integrated under both neighbours, N(1/noise, 1) and N(0, 1).
    """
    distance = 1 / noise
    lowest = norm.ppf(share, loc=distance)
    y = np.linspace(max(lowest, -8), 8 + distance, 8001)
    released = [
        np.exp(log_weight(trials, np.minimum(1, norm.cdf(lowest, loc=mean) + norm.sf(y, loc=mean))))
        * norm.pdf(y, loc=mean)
        for mean in (distance, 0.0)
    ]

    def delta(epsilon: float) -> float:
        return float(np.maximum(released[0] - math.exp(epsilon) * released[1], 0).sum() * (y[1] - y[0]))

    return scipy.optimize.brentq(lambda epsilon: delta(epsilon) - DELTA, 0, 60) if delta(0) > DELTA else 0.0


@pytest.mark.parametrize("name", LAWS)
def test_some_order_on_outputs_attains_most_of_the_bound(name):
    trials = LAWS[name]
    attained = max(epsilon_of_an_order(trials, NOISE, share) for share in np.geomspace(1e-4, 0.6, 60))
    bound = selection.profile_epsilon(trials, DELTA, gaussian_profile())
    assert attained <= bound
    assert attained >= bound * (0.8 if isinstance(trials, PoissonTrials) else 0.96)


def theorem(trials: Trials, u: np.ndarray, above: np.ndarray, deltas: Callable[[np.ndarray], np.ndarray], epsilon):
    """The profile theorem on a fine grid of u, without any bound: T and the profile are given in closed form."""
    w = np.exp(log_weight(trials, u))
    climb = np.maximum.accumulate(log_weight(trials, u) - log_weight(trials, above))
    here = deltas(epsilon - climb)
    reached = np.minimum(u, u + np.minimum.accumulate(here - u))
    return w[0] * reached[0] + float(np.sum((w[1:] + w[:-1]) / 2 * np.diff(reached)))


@pytest.mark.parametrize("name", LAWS)
@pytest.mark.parametrize("epsilon", [0.1, 2.0])
def test_delta_is_the_integral_of_the_theorem_for_gaussian_trials(name, epsilon):
    u = np.unique(np.concatenate([[0.0], np.geomspace(1e-12, 1, 60_000), 1 - np.geomspace(1e-9, 1, 10_000)]))
    above = norm.cdf(norm.ppf(u) + 1 / NOISE)

    def deltas(eps):
        return norm.cdf(-eps * NOISE + 0.5 / NOISE) - np.exp(eps) * norm.cdf(-eps * NOISE - 0.5 / NOISE)

    expected = min(1.0, theorem(LAWS[name], u, above, deltas, epsilon))
    bound = selection.profile_delta(LAWS[name], epsilon, gaussian_profile())
    assert expected * (1 - 1e-3) <= bound <= expected * 1.05 + 1e-12


@pytest.mark.parametrize("name", LAWS)
@pytest.mark.parametrize("delta", [0.0, 1e-3])
def test_the_kink_where_the_other_direction_takes_over_is_not_forgotten(name, delta):
    """With one pure epsilon t the supremum lies at u = (1 - delta) / (1 + e^t), or where the line reaches 1."""
    trials, t, epsilon = LAWS[name], 0.3, 0.5
    kink = (1 - delta) / (1 + math.exp(t))
    u = np.unique(np.concatenate([[0.0, kink], np.geomspace(1e-12, 1, 40_000)]))
    above = np.minimum(math.exp(t) * u + delta, 1 - math.exp(-t) * (1 - u - delta))

    def deltas(eps):
        positive = np.maximum(0.0, (math.exp(t) - np.exp(np.abs(eps))) / (1 + math.exp(t)))
        positive = delta + (1 - delta) * positive
        return np.where(eps >= 0, positive, 1 - np.exp(eps) * (1 - positive))

    expected = min(1.0, theorem(trials, u, np.minimum(above, 1.0), deltas, epsilon))
    bound = selection.profile_delta(trials, epsilon, pure_profile(t, delta))
    assert expected * (1 - 1e-6) <= bound <= expected * 1.03 + 1e-9


@pytest.mark.parametrize("name", LAWS)
@pytest.mark.parametrize("epsilon", [0.0, 1.0])
def test_the_bound_is_below_the_one_line_form_which_may_exceed_1(name, epsilon):
    trials = LAWS[name]
    mean, deltas = selection.mean(trials), gaussian_profile()
    match trials:
        case TruncatedNegativeBinomial(shape=shape, gamma=gamma):
            climbs = [
                (shape + 1) * math.log(math.exp(t) + (1 - gamma) / gamma * deltas(t)) for t in np.linspace(0, 3, 60)
            ]
        case PoissonTrials():
            climbs = [mean * deltas(0.0)]
        case BinomialTrials(count=count, probability=p):
            climbs = [
                (count - 1) * math.log1p(p * math.expm1(t) + p / (1 - p) * deltas(t)) for t in np.linspace(0, 3, 60)
            ]

    def both_signs(eps: float) -> float:
        return deltas(eps) if eps >= 0 else 1 - math.exp(eps) * (1 - deltas(-eps))

    bound = selection.profile_delta(trials, epsilon, deltas)
    assert bound <= 1 and bound <= min(mean * both_signs(epsilon - climb) for climb in climbs) * (1 + 1e-6)


@pytest.mark.parametrize("shape", [-0.5, 0.0, 1.0, 4.0])
def test_one_expected_trial_costs_one_trial(shape):
    trials = TNB(1.0, shape)
    assert selection.profile_epsilon(trials, DELTA, gaussian_profile()) == pytest.approx(
        epsilon_bounds(1 / NOISE, DELTA)[1], rel=5e-4
    )
    assert selection.renyi_log_moments(trials, moments()) == pytest.approx(moments(), rel=1e-6)


def test_one_trial_or_none_costs_the_share_that_is_run():
    trials = BinomialTrials(1, 0.25)
    for epsilon in (0.0, 0.4, 1.0):
        bound = selection.profile_delta(trials, epsilon, gaussian_profile())
        assert bound == pytest.approx(0.25 * gaussian_profile()(epsilon), rel=1e-2)
    mixture = np.log1p(0.25 * np.expm1(np.minimum(moments(), 700)))
    assert np.all(selection.renyi_log_moments(trials, moments()) <= np.where(moments() < 700, mixture + 1e-9, np.inf))


@pytest.mark.parametrize("shape", [-0.5, 0.0, 1.0, 4.0])
@pytest.mark.parametrize("pure", [0.01, 0.5, 2.0])
def test_pure_privacy_grows_by_two_and_the_shape(shape, pure):
    """Papernot and Steinke 2022, corollary 3: (2 + eta) epsilon, and 3 epsilon for geometric numbers of trials."""
    trials = TNB(100, shape)
    worst = (2 + shape) * pure
    # Beyond it nothing is left but what knots of the profile cannot tell from it.
    assert selection.profile_delta(trials, worst * (1 + 1e-3), pure_profile(pure)) < 1e-12
    assert selection.profile_epsilon(trials, 1e-9, pure_profile(pure)) <= worst * (1 + 1e-3)
    randomised = 1 / (1 + math.exp(-pure))
    log_moments = np.logaddexp(
        ORDERS * math.log(randomised) + (1 - ORDERS) * math.log1p(-randomised),
        ORDERS * math.log1p(-randomised) + (1 - ORDERS) * math.log(randomised),
    )
    by_moments = selection.renyi_log_moments(trials, log_moments) / (ORDERS - 1)
    assert by_moments[-1] <= worst * (1 + 1e-2) + 1e-3


@pytest.mark.parametrize("mean", [1.0, 10.0, 1000.0])
@pytest.mark.parametrize("shape", [0.0, 0.5, 4.0, math.inf], ids=lambda shape: f"eta={shape}")
@pytest.mark.parametrize("noise", [0.8, NOISE])
def test_the_renyi_bound_is_never_above_that_of_dp_accounting(mean, shape, noise):
    """Theirs are theorems 2 and 6 of Papernot and Steinke 2022 at the same orders, with the same conversion."""
    event = pytest.importorskip("dp_accounting").dp_event
    theirs = pytest.importorskip("dp_accounting.rdp").RdpAccountant(orders=ORDERS)
    theirs.compose(event.RepeatAndSelectDpEvent(event.GaussianDpEvent(noise), mean, shape))
    trials = PoissonTrials(mean) if math.isinf(shape) else TNB(mean, shape)
    ours = epsilon_by_moments(selection.renyi_log_moments(trials, moments(noise)))
    assert ours <= theirs.get_epsilon(DELTA) * (1 + 5e-3)


@pytest.mark.parametrize(
    ("trials", "published", "everything"),
    [
        (selection.logarithmic(10), 3.493, 8.95),
        (selection.logarithmic(100), 4.317, 40.3),
        (selection.geometric(10), 3.738, 8.95),
        (selection.geometric(100), 4.971, 40.3),
        (PoissonTrials(10.0), 4.938, 8.95),
        (PoissonTrials(100.0), 18.95, 40.3),
    ],
    ids=lambda value: str(value)[:60],
)
def test_searches_over_training_runs_cost_no_more_than_published(trials, published, everything):
    """Noise 1.1, rate 256/60000, 14040 steps, delta 1e-5: one run has epsilon 2.380."""
    library = pytest.importorskip("dp_accounting.pld.privacy_loss_distribution")
    run = library.from_gaussian_mechanism(
        1.1, sampling_prob=256 / 60000, value_discretization_interval=2e-4, use_connect_dots=True
    ).self_compose(14040)
    one = run.get_epsilon_for_delta(1e-5)
    assert one == pytest.approx(2.380, abs=5e-3)
    bound = selection.profile_epsilon(trials, 1e-5, run.get_delta_for_epsilon)
    assert one <= bound <= published + 5e-3 < everything


@pytest.mark.parametrize("name", LAWS)
def test_less_delta_and_less_noise_cost_more(name):
    trials = LAWS[name]
    by_delta = [
        selection.profile_epsilon(trials, delta, gaussian_profile()) for delta in (1e-12, 1e-9, 1e-6, 1e-3, 0.3)
    ]
    assert by_delta == sorted(by_delta, reverse=True)
    by_noise = [selection.profile_epsilon(trials, DELTA, gaussian_profile(noise)) for noise in (2.0, 4.0, 8.0, 50.0)]
    assert by_noise == sorted(by_noise, reverse=True)
    by_epsilon = [selection.profile_delta(trials, epsilon, gaussian_profile()) for epsilon in (0.0, 0.5, 1.0, 2.0, 8.0)]
    assert by_epsilon == sorted(by_epsilon, reverse=True)


@pytest.mark.parametrize("shape", [-0.5, 0.0, 1.0, 4.0, None])
def test_more_expected_trials_cost_more(shape):
    means = (1.5, 2.0, 5.0, 20.0, 300.0)
    laws = [PoissonTrials(mean) if shape is None else TNB(mean, shape) for mean in means]
    costs = [selection.profile_epsilon(trials, DELTA, gaussian_profile()) for trials in laws]
    assert costs == sorted(costs)
    costs = [epsilon_by_moments(selection.renyi_log_moments(trials, moments())) for trials in laws]
    assert costs == sorted(costs)


def test_delta_at_the_bound_of_epsilon_is_delta():
    trials = selection.logarithmic(10)
    epsilon = selection.profile_epsilon(trials, DELTA, gaussian_profile())
    assert selection.profile_delta(trials, epsilon, gaussian_profile()) == pytest.approx(DELTA, rel=0.05)


def test_the_profile_is_asked_seldom():
    asked = []

    def profile(epsilon: float) -> float:
        asked.append(epsilon)
        return gaussian_profile()(epsilon)

    selection.profile_epsilon(selection.geometric(10), DELTA, profile)
    assert len(asked) <= 150 and len(set(asked)) == len(asked) and min(asked) >= 0


EXTREME_LAWS = [
    TNB(1e6, -0.9),
    TNB(1e15, 1.0),
    TruncatedNegativeBinomial(1e6, 0.5),
    TruncatedNegativeBinomial(-0.999, 1e-299),
    PoissonTrials(1e-50),
    PoissonTrials(1e50),
    BinomialTrials(2**52, 1e-300),
    BinomialTrials(2**52, 1 - 1e-16),
]
EXTREME_PROFILES = {
    "perfect": lambda _: 0.0,
    "none": lambda _: 1.0,
    "nan": lambda _: math.nan,
    "floor": lambda epsilon: max(1e-8, pure_profile(1.0)(epsilon)),
    "pure 1e-9": pure_profile(1e-9),
    "pure 300": pure_profile(300.0),
    "gaussian 0.02": gaussian_profile(0.02),
    "gaussian 1e9": gaussian_profile(1e9),
}


@pytest.mark.parametrize("trials", EXTREME_LAWS, ids=str)
@pytest.mark.parametrize("profile", EXTREME_PROFILES)
def test_extremes_give_numbers_never_nan(trials, profile):
    base = EXTREME_PROFILES[profile]
    for epsilon in (0.0, 3.0, 1e308):
        assert 0 <= selection.profile_delta(trials, epsilon, base) <= 1
    for delta in (1e-300, 0.999):
        assert selection.profile_epsilon(trials, delta, base) >= 0
    if profile in ("none", "nan") and selection.mean(trials) >= 1:
        assert selection.profile_epsilon(trials, 0.1, base) == math.inf


@pytest.mark.parametrize("trials", EXTREME_LAWS, ids=str)
def test_extreme_moments_give_moments_never_nan(trials):
    for base in (moments(), moments(1e-3), moments(1e40), np.zeros_like(ORDERS), np.full_like(ORDERS, np.inf)):
        found = selection.renyi_log_moments(trials, base)
        assert np.all(found >= 0)
        finite = found[np.isfinite(found)]
        assert np.isfinite(found[: len(finite)]).all()  # where a moment is finite, those of smaller orders are
        assert np.all(np.diff(finite / (ORDERS[: len(finite)] - 1)) >= -1e-9 * finite[1:])
    some = np.where(ORDERS < 10, moments(), np.inf)
    assert np.isfinite(selection.renyi_log_moments(trials, some)).tolist() == (ORDERS < 10).tolist()


@pytest.mark.parametrize("trials", [20, None])
def test_a_fixed_number_of_trials_is_refused_with_the_way_out(trials):
    for ask in (
        lambda: selection.profile_delta(trials, 1.0, gaussian_profile()),
        lambda: selection.profile_epsilon(trials, DELTA, gaussian_profile()),
        lambda: selection.renyi_log_moments(trials, moments()),
    ):
        with pytest.raises(Unsupported, match=r"full_composition\(event, count\)"):
            ask()


def test_full_composition_repeats_the_trial_and_says_why():
    charge = selection.full_composition(Gaussian(3.0), 12)
    assert charge.event == Repeated(Gaussian(3.0), 12)
    assert "12 trials" in charge.reason and "fixed size" in charge.reason and "earlier scores" in charge.reason
    with pytest.raises(InvalidParameter):
        selection.full_composition(Gaussian(3.0), -1)


@pytest.mark.parametrize("delta", [0.0, 1.0, math.nan, -1.0])
def test_delta_outside_its_domain_is_refused(delta):
    with pytest.raises(InvalidParameter, match="delta ="):
        selection.profile_epsilon(selection.geometric(10), delta, gaussian_profile())
    with pytest.raises(InvalidParameter, match="delta ="):
        selection.epsilon_bound(selection.geometric(10), delta, gaussian_profile(), moments())


@pytest.mark.parametrize("epsilon", [-0.1, math.nan, math.inf])
def test_epsilon_outside_its_domain_is_refused(epsilon):
    with pytest.raises(InvalidParameter, match="epsilon ="):
        selection.profile_delta(selection.geometric(10), epsilon, gaussian_profile())


def test_conditions_are_sentences_that_can_be_printed():
    for words in (
        "drawn from the stated law",
        "cut off",
        "hyperparameters",
        "fresh noise",
        "NaN",
        "Only the best",
        "no trial",
    ):
        assert any(words in condition for condition in selection.CONDITIONS)
    assert all(condition.endswith(".") and "\n" not in condition for condition in selection.CONDITIONS)
