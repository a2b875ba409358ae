"""The reported epsilon against prv-accountant, opacus and dp-accounting, each where it is sound."""

from __future__ import annotations

import itertools
import math

import pytest
from lower_bounds import gaussian_epsilon
from scipy.stats import binom

from accounting import InvalidParameter, Unsupported, crosscheck, epsilon
from accounting.crosscheck import Check
from accounting.events import (
    ApproximateDP,
    BinomialTrials,
    Composed,
    Gaussian,
    Laplace,
    MatrixMechanism,
    OnePass,
    Poisson,
    PoissonTrials,
    PureDP,
    Repeated,
    Select,
    TruncatedNegativeBinomial,
    TruncatedPoisson,
    WithoutReplacement,
)

RUN = Repeated(Poisson(0.02, Gaussian(2.0)), 300)
PRV, OPACUS_PRV = ("prv-accountant", "prv"), ("opacus", "prv")
OPACUS_RDP, PLD, RDP = ("opacus", "rdp"), ("dp-accounting", "pld"), ("dp-accounting", "rdp")
ALL = {PRV, OPACUS_PRV, OPACUS_RDP, PLD, RDP}

EVENTS = {
    # event, relation, delta, the judges that must have an answer
    "sampled": (RUN, "add_remove", 1e-5, ALL),
    "zero out": (RUN, "zero_out", 1e-9, ALL),
    "rare": (Repeated(Poisson(1e-3, Gaussian(1.0)), 2000), "add_remove", 1e-6, ALL),
    "two kinds of step": (Composed((RUN, Repeated(Poisson(0.1, Gaussian(4.0)), 50))), "add_remove", 1e-5, ALL),
    "whole batches": (Repeated(Gaussian(5.0), 100), "replace_one", 1e-5, ALL),
    "epochs": (Repeated(OnePass(Gaussian(2.0)), 3), "zero_out", 1e-6, ALL),
    "correlated": (MatrixMechanism(3.0, 1.5), "replace_one", 1e-5, ALL),
    "Laplace": (Repeated(Laplace(5.0), 20), "add_remove", 1e-5, {PRV, PLD, RDP}),
    "sampled Laplace": (Repeated(Poisson(0.1, Laplace(1.0)), 20), "add_remove", 1e-5, {PLD}),
    "pure": (Repeated(PureDP(0.1), 30), "replace_one", 1e-5, {PLD, RDP}),
    "approximate": (Repeated(ApproximateDP(0.1, 1e-8), 10), "add_remove", 1e-5, {PLD}),
    "mixed": (Composed((RUN, Laplace(2.0), ApproximateDP(0.5, 1e-7))), "zero_out", 1e-5, {PLD}),
    "fixed size": (Repeated(WithoutReplacement(10, 1000, Gaussian(2.0)), 100), "replace_one", 1e-5, {RDP}),
    "truncated": (Repeated(TruncatedPoisson(0.1, 40, 200, Gaussian(5.0)), 50), "zero_out", 1e-5, {PLD}),
}


def rows_of(event, delta, relation):
    return {(row.library, row.method): row for row in crosscheck(event, delta, relation=relation)}


def installed(rows):
    return {name for name, row in rows.items() if row.note != "not installed"}


@pytest.mark.parametrize("name", EVENTS)
def test_no_library_contradicts_the_reported_epsilon(name):
    event, relation, delta, expected = EVENTS[name]
    bound = epsilon(event, delta, relation=relation)
    rows = rows_of(event, delta, relation)
    assert list(rows) == [PRV, OPACUS_PRV, OPACUS_RDP, PLD, RDP]
    assert not [row for row in rows.values() if row.contradicts(bound.upper)]
    for library, row in rows.items():
        if library not in installed(rows):
            continue
        assert (row.upper is not None) == (library in expected), row
        assert row.upper is not None or row.note
        if row.upper is not None:
            assert bound.lower <= row.upper and (row.lower or 0) <= row.upper
    # Where an interval of a library holds the truth, ours is in it.
    for row in rows.values():
        if row.lower is not None and row.upper is not None and row.upper - row.lower < 0.03:
            assert row.lower <= bound.upper <= row.upper + 1e-3


@pytest.mark.parametrize(
    "trials", [TruncatedNegativeBinomial(1.0, 0.1), TruncatedNegativeBinomial(0.0, 0.05), PoissonTrials(10.0)], ids=str
)
def test_selection_is_checked_by_renyi_accounting_alone(trials):
    rows = rows_of(Select(RUN, trials), 1e-5, "add_remove")
    assert {name for name, row in rows.items() if row.upper is not None} == {RDP} & installed(rows)
    assert rows[RDP].upper is None or epsilon(Select(RUN, trials), 1e-5, relation="add_remove").upper <= rows[
        RDP
    ].upper * (1 + 1e-6)


def test_what_a_library_does_not_know_is_said_and_not_guessed():
    rows = rows_of(Select(RUN, BinomialTrials(10, 0.5)), 1e-5, "add_remove")
    assert all(row.upper is None and row.note for row in rows.values())
    assert RDP not in installed(rows) or "binomial" in rows[RDP].note
    rows = rows_of(TruncatedPoisson(0.1, 12, 50, Gaussian(2.0)), 1e-5, "add_remove")
    assert all(row.upper is None for row in rows.values())
    assert PLD not in installed(rows) or "size" in rows[PLD].note
    rows = rows_of(Repeated(PureDP(1.0), 200), 1e-5, "add_remove")
    assert PRV not in installed(rows) or "window" in rows[PRV].note


def test_an_event_without_a_theorem_is_refused_before_anyone_is_asked():
    with pytest.raises(Unsupported, match="add_remove"):
        crosscheck(Poisson(0.1, Gaussian(1.0)), 1e-5, relation="replace_one")
    with pytest.raises(InvalidParameter, match="delta"):
        crosscheck(RUN, 0.0, relation="add_remove")
    with pytest.raises(InvalidParameter, match="zero_out"):
        crosscheck(RUN, 1e-5, relation="neighbours")


@pytest.mark.parametrize(
    ("event", "delta", "word"),
    [
        (Poisson(0.1, Gaussian(1.0)), 1e-10, "rounding"),
        (Repeated(Poisson(0.1, Gaussian(1.0)), 100_001), 1e-5, "finish"),
    ],
    ids=["small delta", "many steps"],
)
def test_libraries_are_not_asked_where_they_are_unsound_or_do_not_finish(event, delta, word):
    rows = rows_of(event, delta, "zero_out")
    for name in installed(rows) & {PRV, OPACUS_PRV, PLD}:
        assert rows[name].upper is None and rows[name].lower is None and word in rows[name].note
    for name in installed(rows) & {OPACUS_RDP, RDP}:
        assert rows[name].upper is not None


def test_a_run_too_large_for_a_library_is_refused_and_not_tried():
    rows = rows_of(Repeated(Poisson(0.1, Gaussian(1.0)), 100_000), 1e-5, "add_remove")
    for name in installed(rows) & {PRV, OPACUS_PRV}:
        assert "cells" in rows[name].note


@pytest.mark.parametrize(
    "event",
    [
        Repeated(Gaussian(5.0), 30_000),
        pytest.param(Repeated(Poisson(0.3, Gaussian(0.4)), 1000), marks=pytest.mark.slow),
    ],
    ids=["whole batches", "sampled"],
)
def test_an_epsilon_beyond_the_exponents_of_a_double_is_not_contradicted(event):
    # Without care dp-accounting's lower end is 0.9 above the truth here, and both ends of opacus are infinite.
    reported = epsilon(event, 1e-9, relation="add_remove").upper
    rows = rows_of(event, 1e-9, "add_remove")
    assert reported > 700 and not [row for row in rows.values() if row.contradicts(reported)]
    assert all(row.lower is None for name, row in rows.items() if name in (OPACUS_PRV, PLD))


def test_no_double_rounding_makes_an_interval_miss_the_exact_gaussian():
    event, delta = Repeated(Gaussian(30.0), 900), 1e-9
    truth = gaussian_epsilon(1.0, delta)
    rows = rows_of(event, delta, "add_remove")
    for name in installed(rows):
        row = rows[name]
        assert (row.lower or 0.0) <= truth * (1 + 1e-9) and row.upper >= truth * (1 - 1e-9), row


@pytest.mark.parametrize(("one", "count"), [(1.0, 200), (0.1, 30), (3.0, 4)])
def test_pure_dp_is_their_exact_composition_of_one_bit(one, count):
    # k bits, each told truly with odds e^one: the number of true ones is binomial under both neighbours.
    rows = rows_of(Repeated(PureDP(one), count), 1e-5, "replace_one")
    if PLD not in installed(rows):
        pytest.skip("dp-accounting is not installed")
    share = 1 / (1 + math.exp(-one))

    def true_delta(at: float) -> float:
        pairs = ((binom.pmf(k, count, share), binom.pmf(k, count, 1 - share)) for k in range(count + 1))
        return math.fsum(max(0.0, p - math.exp(at) * q) for p, q in pairs)

    assert true_delta(rows[PLD].upper) <= 1e-5 * (1 + 1e-6)
    assert true_delta(max(0.0, rows[PLD].lower - 1e-6)) >= 1e-5 * (1 - 1e-6)
    assert rows[RDP].upper >= rows[PLD].lower


@pytest.mark.parametrize(
    ("noise", "rate", "steps", "delta"),
    [(1.0, 0.01, 1, 1e-3), (2.0, 0.5, 10, 1e-5), (5.0, 0.05, 200, 1e-4), (1.2, 0.1, 5, 1e-8)],
)
def test_epsilon_covers_the_added_record_as_well_as_the_removed_one(noise, rate, steps, delta):
    pld = pytest.importorskip("dp_accounting.pld.privacy_loss_distribution")
    bound = epsilon(Repeated(Poisson(rate, Gaussian(noise)), steps), delta, relation="add_remove")
    down, up = (
        pld.from_gaussian_mechanism(
            noise,
            sampling_prob=rate,
            pessimistic_estimate=high,
            use_connect_dots=high,
            value_discretization_interval=1e-4,
        ).self_compose(steps)
        for high in (False, True)
    )
    for direction in ("_pmf_add", "_pmf_remove"):
        at_least, at_most = (getattr(one, direction).get_epsilon_for_delta(delta) for one in (down, up))
        assert at_least <= at_most and at_least <= bound.upper
    assert up.get_epsilon_for_delta(delta) >= bound.lower


def test_a_row_contradicts_exactly_what_lies_below_its_lower_bound():
    row = Check("somebody", "1.0", "prv", 4.0, 5.0)
    assert row.contradicts(3.999) and not row.contradicts(4.0) and not row._replace(lower=None).contradicts(0.0)


def test_nothing_costs_nothing_and_nobody_is_needed_to_say_so():
    for event, delta in itertools.product((Composed(()), Poisson(0.0, Gaussian(1.0))), (1e-5, 1e-20)):
        rows = rows_of(event, delta, "add_remove")
        assert all(row[3:] == (0.0, 0.0, "") for name, row in rows.items() if name in installed(rows))
