"""Records of opacus and dp-accounting as events: what they mean, and what is refused."""

from __future__ import annotations

import math
import random
import types

import pytest

from accounting import InvalidParameter, Unsupported, epsilon
from accounting.events import (
    Composed,
    Gaussian,
    Laplace,
    OnePass,
    Poisson,
    PoissonTrials,
    Repeated,
    Select,
    TruncatedNegativeBinomial,
    TruncatedPoisson,
    WithoutReplacement,
)
from accounting.foreign import from_dp_accounting, from_opacus_history
from accounting.normal_form import normal_form

HISTORY = [(1.0, 0.01, 150), (0.8, 0.01, 50)]
POISSON = Composed((Repeated(Poisson(0.01, Gaussian(1.0)), 150), Repeated(Poisson(0.01, Gaussian(0.8)), 50)))


class Accountant:
    history = HISTORY


@pytest.mark.parametrize(
    "history",
    [
        HISTORY,
        tuple(HISTORY),
        [list(entry) for entry in HISTORY],
        Accountant(),
        {"history": HISTORY, "mechanism": "gdp"},
    ],
    ids=["list", "tuple", "from JSON", "accountant", "state dict"],
)
def test_a_poisson_history_is_its_steps(history):
    assert from_opacus_history(history, sampling="poisson", relation="add_remove") == POISSON


def test_a_history_without_steps_is_free():
    for empty in ([], [(1.0, 0.1, 0)]):
        for sampling in ("poisson", "shuffled"):
            event = from_opacus_history(empty, sampling=sampling, relation="zero_out")
            assert epsilon(event, 1e-5, relation="zero_out").upper == 0


def test_opacus_accountants_themselves_are_understood():
    accountants = pytest.importorskip("opacus.accountants")
    for kind in (accountants.RDPAccountant, accountants.PRVAccountant):
        accountant = kind()
        for noise, rate, steps in HISTORY:
            for _ in range(steps):
                accountant.step(noise_multiplier=noise, sample_rate=rate)
        for form in (accountant, accountant.state_dict()):
            event = from_opacus_history(form, sampling="poisson", relation="add_remove")
            assert event == POISSON
        assert epsilon(event, 1e-5, relation="add_remove").upper <= accountant.get_epsilon(1e-5) * (1 + 1e-6)


def passes(history):
    """How often a shuffled history charges each noise multiplier."""
    event = from_opacus_history(history, sampling="shuffled", relation="zero_out")
    return [count for _, count in normal_form(event)]


@pytest.mark.parametrize(
    ("history", "expected"),
    [
        ([(1.0, 0.01, 100)], [1]),
        ([(1.0, 0.01, 101)], [2]),
        ([(1.0, 1 / 49, 98)], [2]),  # 1/(1/49) is below 49 in double precision
        ([(1.0, 256 / 60_000, 234 * 1000)], [1000]),  # a loader that drops the last batch has 234 steps
        ([(1.0, 1.0, 7)], [7]),
        ([(1.0, 0.7, 7)], [7]),
        ([(1.0, 0.01, 50), (2.0, 0.01, 100)], [1, 2]),  # the second crosses the end of an epoch
        ([(1.0, 0.01, 100), (2.0, 0.1, 20)], [1, 2]),  # the rate changes between two epochs
        ([(1.0, 0.01, 50), (2.0, 0.1, 11), (3.0, 0.1, 10)], [1, 2, 2]),  # and within one
    ],
    ids=str,
)
def test_shuffled_steps_are_charged_for_the_epochs_they_touch(history, expected):
    assert passes(history) == expected


@pytest.mark.parametrize("seed", range(20))
def test_no_shuffled_record_takes_part_more_often_than_is_charged(seed):
    # Walks a loader through its epochs and follows every position of it.
    draw = random.Random(seed)
    epoch = draw.randint(1, 12)
    lengths = [draw.randint(0, 40) for _ in range(6)]
    history = [(1.0 + index, 1 / epoch, length) for index, length in enumerate(lengths)]
    order, done, charged = list(range(epoch)), 0, iter(passes([entry for entry in history if entry[2]]))
    for _, _, length in (entry for entry in history if entry[2]):
        taken = [0] * epoch
        for _ in range(length):
            if done == 0:
                draw.shuffle(order)
            taken[order[done]] += 1
            done = (done + 1) % epoch
        assert max(taken) <= next(charged)


def test_shuffled_is_never_cheaper_than_poisson():
    shuffled = from_opacus_history(HISTORY, sampling="shuffled", relation="zero_out")
    cheap, dear = (epsilon(event, 1e-5, relation="zero_out").upper for event in (POISSON, shuffled))
    assert dear > 2 * cheap
    assert from_opacus_history([(2.0, 0.1, 10)], sampling="shuffled", relation="replace_one") == Composed(
        (Repeated(OnePass(Gaussian(1.0)), 1),)  # the sensitivity is 2C
    )


@pytest.mark.parametrize(
    ("history", "word"),
    [
        (None, "state dict"),
        ("1.0, 0.01, 3", "state dict"),
        ({"mechanism": "rdp"}, "state dict"),
        ([(1.0, 0.01)], r"history\[0\]"),
        ([(1.0, 0.01, 3), (0.0, 0.01, 3)], r"history\[1\]: noise_multiplier = 0.0"),
        ([(math.nan, 0.01, 3)], "noise_multiplier"),
        ([(1.0, 1.5, 3)], "sample_rate"),
        ([(1.0, 0.1, -1)], "steps"),
        ([(1.0, 0.1, 2.5)], "steps"),
    ],
    ids=str,
)
def test_what_is_no_history_is_refused(history, word):
    with pytest.raises(InvalidParameter, match=word):
        from_opacus_history(history, sampling="poisson", relation="add_remove")


def test_how_batches_were_drawn_must_be_said_and_fit_the_relation():
    with pytest.raises(InvalidParameter, match="does not record"):
        from_opacus_history(HISTORY, sampling="unknown", relation="zero_out")
    with pytest.raises(TypeError):
        from_opacus_history(HISTORY, relation="zero_out")
    with pytest.raises(InvalidParameter, match="neighbours"):
        from_opacus_history(HISTORY, sampling="poisson", relation="neighbours")
    with pytest.raises(Unsupported, match="zero_out"):
        from_opacus_history(HISTORY, sampling="shuffled", relation="add_remove")
    with pytest.raises(Unsupported, match="zero_out"):
        from_opacus_history(HISTORY, sampling="poisson", relation="replace_one")
    with pytest.raises(InvalidParameter, match="never ends"):
        from_opacus_history([(1.0, 0.0, 3)], sampling="shuffled", relation="zero_out")


# -- dp-accounting -----------------------------------------------------------------------------------------------------


@pytest.fixture
def theirs():
    return pytest.importorskip("dp_accounting.dp_event")


EVENTS = {
    "nothing": (lambda d: d.NoOpDpEvent(), "add_remove", Composed(())),
    "Gaussian": (lambda d: d.GaussianDpEvent(2), "add_remove", Gaussian(2.0)),
    "Gaussian, 2C": (lambda d: d.GaussianDpEvent(2.0), "replace_one", Gaussian(1.0)),
    "Laplace": (lambda d: d.LaplaceDpEvent(3.0), "zero_out", Laplace(3.0)),
    "several": (
        lambda d: d.ComposedDpEvent([d.GaussianDpEvent(2.0), d.SelfComposedDpEvent(d.LaplaceDpEvent(3.0), 4)]),
        "zero_out",
        Composed((Gaussian(2.0), Repeated(Laplace(3.0), 4))),
    ),
    "sampled": (
        lambda d: d.SelfComposedDpEvent(d.PoissonSampledDpEvent(0.1, d.GaussianDpEvent(2.0)), 10),
        "add_remove",
        Repeated(Poisson(0.1, Gaussian(2.0)), 10),
    ),
    "fixed size": (
        lambda d: d.SampledWithoutReplacementDpEvent(1000, 10, d.GaussianDpEvent(2.0)),
        "replace_one",
        WithoutReplacement(10, 1000, Gaussian(1.0)),
    ),
    "truncated, slot": (
        lambda d: d.TruncatedSubsampledGaussianDpEvent(1000, 0.1, 130, 2.0),
        "zero_out",
        TruncatedPoisson(0.1, 130, 999, Gaussian(2.0)),
    ),
    "truncated, added": (
        lambda d: d.TruncatedSubsampledGaussianDpEvent(1000, 0.1, 130, 2.0),
        "add_remove",
        TruncatedPoisson(0.1, 130, 1000, Gaussian(2.0)),
    ),
    "selected, Poisson": (
        lambda d: d.RepeatAndSelectDpEvent(d.GaussianDpEvent(2.0), 10.0, math.inf),
        "add_remove",
        Select(Gaussian(2.0), PoissonTrials(10.0)),
    ),
}


@pytest.mark.parametrize("name", EVENTS)
def test_their_events_and_ours(theirs, name):
    make, relation, ours = EVENTS[name]
    assert from_dp_accounting(make(theirs), relation=relation) == ours


@pytest.mark.parametrize("shape", [0.0, 1.0, 3.5])
def test_a_random_number_of_trials_keeps_its_mean(theirs, shape):
    from accounting.selection import mean

    event = from_dp_accounting(
        theirs.RepeatAndSelectDpEvent(theirs.GaussianDpEvent(2.0), 10.0, shape), relation="zero_out"
    )
    assert isinstance(event, Select) and isinstance(event.trials, TruncatedNegativeBinomial)
    assert event.trials.shape == shape and mean(event.trials) == pytest.approx(10.0, rel=1e-6)


@pytest.mark.parametrize("relation", ["add_remove", "zero_out", "replace_one"])
def test_epsilon_is_that_of_their_own_accountant_under_every_relation(theirs, relation):
    pld = pytest.importorskip("dp_accounting.pld")
    from dp_accounting.privacy_accountant import NeighboringRelation

    event = theirs.SelfComposedDpEvent(theirs.GaussianDpEvent(6.0), 30)
    names = {"add_remove": "ADD_OR_REMOVE_ONE", "zero_out": "REPLACE_SPECIAL", "replace_one": "REPLACE_ONE"}
    accountant = pld.PLDAccountant(NeighboringRelation[names[relation]])
    accountant.compose(event)
    ours = epsilon(from_dp_accounting(event, relation=relation), 1e-5, relation=relation)
    assert ours.upper == pytest.approx(accountant.get_epsilon(1e-5), abs=1e-3)


@pytest.mark.parametrize(
    ("make", "relation", "word"),
    [
        (lambda d: d.NonPrivateDpEvent(), "zero_out", "infinite"),
        (lambda d: d.GaussianDpEvent(0.0), "zero_out", "infinite"),
        (lambda d: d.UnsupportedDpEvent(), "zero_out", "UnsupportedDpEvent"),
        (lambda d: d.ZCDpEvent(0.1), "zero_out", "ZCDpEvent"),
        (lambda d: d.SampledWithReplacementDpEvent(9, 3, d.GaussianDpEvent(1.0)), "replace_one", "several times"),
        (lambda d: d.ComposedDpEvent([d.GaussianDpEvent(1.0), d.NonPrivateDpEvent()]), "zero_out", "infinite"),
        (lambda d: d.PoissonSampledDpEvent(0.1, d.GaussianDpEvent(1.0)), "replace_one", "add_remove"),
        (lambda d: d.SampledWithoutReplacementDpEvent(9, 3, d.GaussianDpEvent(1.0)), "zero_out", "replace_one"),
    ],
    ids=["not private", "no noise", "unsupported", "zCDP", "with replacement", "inside", "Poisson", "fixed size"],
)
def test_what_has_no_counterpart_is_refused_by_name(theirs, make, relation, word):
    with pytest.raises(Unsupported, match=word):
        from_dp_accounting(make(theirs), relation=relation)


@pytest.mark.parametrize("number", [-1.0, math.nan, math.inf, "2"])
def test_numbers_outside_their_domain_are_refused(theirs, number):
    with pytest.raises(InvalidParameter, match="noise_multiplier"):
        from_dp_accounting(theirs.GaussianDpEvent(number), relation="zero_out")


def test_what_only_looks_like_their_event_is_refused():
    for other in (None, Gaussian(1.0), types.SimpleNamespace(noise_multiplier=1.0), "GaussianDpEvent"):
        with pytest.raises(InvalidParameter, match="dp_accounting"):
            from_dp_accounting(other, relation="zero_out")


def test_an_event_of_a_newer_release_is_known_by_its_name():
    newer = type("EpsilonDeltaDpEvent", (), {"__module__": "dp_accounting.dp_event", "epsilon": 1.0, "delta": 1e-7})
    event = from_dp_accounting(newer(), relation="replace_one")
    assert event.kind == "approximate_dp" and (event.epsilon, event.delta) == (1.0, 1e-7)
