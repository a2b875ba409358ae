"""The reported epsilon against prv-accountant, opacus and dp_accounting."""

from __future__ import annotations

import pytest

from accounting import Gaussian, Poisson, Repeated, TruncatedPoisson, crosscheck, epsilon

CASES = [
    # noise, rate, steps, delta
    (1.0, 0.01, 1000, 1e-5),
    (4.0, 0.01, 2000, 1e-5),
    (0.8, 0.02, 500, 1e-5),
    (2.0, 0.1, 300, 1e-6),
    (5.0, 1.0, 100, 1e-5),
]


@pytest.mark.parametrize(("noise", "rate", "steps", "d"), CASES)
def test_no_library_contradicts_the_reported_epsilon(noise, rate, steps, d):
    event = Repeated(Poisson(rate, Gaussian(noise)), steps)
    reported = epsilon(event, d, relation="add_remove").upper
    rows = {(row.library, row.method): row for row in crosscheck(event, d, relation="add_remove")}
    assert not [row for row in rows.values() if row.contradicts(reported)]

    prv = rows["prv-accountant", "prv"]
    if prv.note == "not installed":
        pytest.skip("prv-accountant is not installed")
    assert prv.lower is not None and prv.upper is not None, prv.note
    # Renyi accounting is looser than the numerical truth, but by no more than a quarter here.
    assert prv.lower <= reported <= 1.25 * prv.upper
    for theirs in (rows["opacus", "rdp"], rows["dp-accounting", "rdp"]):
        # Same theorem: never looser than theirs.
        assert theirs.upper is None or reported <= theirs.upper * (1 + 1e-6)


def test_libraries_are_not_asked_where_they_are_unsound_or_do_not_finish():
    for event, d, word in (
        (Poisson(0.1, Gaussian(1.0)), 1e-10, "rounding"),
        (Repeated(Poisson(0.1, Gaussian(1.0)), 100_001), 1e-5, "finish"),
    ):
        rows = crosscheck(event, d, relation="zero_out")
        assert all(word in row.note for row in rows if row.method in ("prv", "pld") and row.version)
        assert all(row.upper is None for row in rows if row.method in ("prv", "pld"))


def test_what_a_library_does_not_know_is_said_and_not_guessed():
    rows = crosscheck(TruncatedPoisson(0.1, 12, 50, Gaussian(2.0)), 1e-5, relation="add_remove")
    by_name = {(row.library, row.method): row for row in rows}
    assert "truncated" in by_name["opacus", "rdp"].note or by_name["opacus", "rdp"].note == "not installed"
    replace = crosscheck(Poisson(0.1, Gaussian(1.0)), 1e-5, relation="replace_one")
    assert all(row.upper is None for row in replace if row.library != "dp-accounting")


def test_a_row_contradicts_exactly_what_lies_below_its_lower_bound():
    row = crosscheck(Gaussian(1.0), 1e-5, relation="add_remove")[0]._replace(lower=4.0)
    assert row.contradicts(3.999) and not row.contradicts(4.0) and not row._replace(lower=None).contradicts(0.0)
