"""Tables: what a row becomes, and that it comes from its own line alone."""

from __future__ import annotations

import math

import numpy as np
import pytest

from dpkit.datasets import Split, load
from dpkit.datasets.tabular import ADULT_COLUMNS, COMPAS_COLUMNS, DUTCH_COLUMNS, Categories
from dpkit.errors import DataError

from .conftest import Publish

ADULT = [
    "39, State-gov, 77516, Bachelors, 13, Never-married, Adm-clerical, Not-in-family, White, Male, 2174, 0, 40, "
    "United-States, <=50K",
    "24, ?, 1, HS-grad, 9, Divorced, ?, Unmarried, Black, Female, 0, 0, 120, ?, >50K",
    "90, Private, 1, 10th, 6, Widowed, Sales, Husband, Other, Male, 99999, 1902, 1, Cuba, >50K",
    "46, Private, 1, 10th, 6, Widowed, Sales, Wife, Other, Female, 0, 0, 1, Hong, <=50K",
]


def adult(publish: Publish, rows: list[str]) -> Split:
    train = "\n".join(rows) + "\n\n"
    test = "|1x3 Cross validator\n" + "".join(f"{row}.\n" for row in ADULT[:2]) + "\n"
    return load("adult", publish("adult", train.encode(), test.encode()))


def value(split: Split, row: int, column: str) -> float:
    return float(split.train_x[row, split.columns.index(column)])


def test_adult_rows_are_ones_for_categories_and_fixed_scales_for_numbers(publish: Publish):
    split = adult(publish, ADULT)
    assert split.train_x.shape == (4, 108)
    assert split.train_y.tolist() == [0, 1, 1, 0]
    assert value(split, 0, "age") == pytest.approx(0.39)
    assert value(split, 0, "workclass=State-gov") == 1
    assert value(split, 0, "workclass=Private") == 0
    assert value(split, 0, "log capital-gain") == pytest.approx(math.log(2175) / math.log(100_000))
    assert value(split, 0, "capital-gain") == pytest.approx(0.2174)
    assert value(split, 1, "capital-gain") == value(split, 1, "log capital-gain") == 0
    assert value(split, 2, "capital-gain") == value(split, 2, "log capital-gain") == 1  # 99,999, and cut
    assert value(split, 2, "capital-loss") == pytest.approx(0.1902)
    assert value(split, 1, "hours-per-week") == 1  # 120 is cut
    # eight categories each: workclass, education, marital-status, occupation, relationship, race, sex, native-country
    assert (split.train_x == 1).sum(1).tolist() == [8, 9, 10, 8]


def test_a_missing_value_is_a_category_of_its_own(publish: Publish):
    split = adult(publish, ADULT)
    for column in ("workclass", "occupation", "native-country"):
        assert [value(split, row, f"{column}=?") for row in range(4)] == [0, 1, 0, 0]


def test_the_test_part_has_a_comment_and_full_stops(publish: Publish):
    split = adult(publish, ADULT)
    assert split.test_y.tolist() == [0, 1]
    assert (split.test_x == split.train_x[:2]).all()


def test_adult_groups(publish: Publish):
    groups = {name: [a.values[i] for i in a.train] for name, a in adult(publish, ADULT).sensitive.items()}
    assert groups == {
        "sex": ["Male", "Female", "Male", "Female"],
        "race": ["White", "Black", "Other", "Other"],
        "age_group": ["25 - 45", "Less than 25", "Greater than 45", "Greater than 45"],
    }


@pytest.mark.parametrize("row", range(4))
def test_another_line_of_adult_changes_no_other_row(publish: Publish, row: int):
    before = adult(publish, ADULT)
    lines = list(ADULT)
    lines[row] = (
        "17, Never-worked, 9, Preschool, 1, Separated, Armed-Forces, Own-child, Asian-Pac-Islander, Female, 5, 6, 99, "
        "Scotland, <=50K"
    )
    after = adult(publish, lines)
    others = [other for other in range(4) if other != row]
    assert (before.train_x[others] == after.train_x[others]).all()
    assert (before.train_x[row] != after.train_x[row]).any()
    assert (before.test_x == after.test_x).all()
    for name, groups in before.sensitive.items():
        assert (groups.train[others] == after.sensitive[name].train[others]).all()


@pytest.mark.parametrize(
    ("old", "new", "named"),
    [
        ("State-gov", "Pirate", "'Pirate' is no workclass"),
        ("Male", "male", "'male' is no sex"),
        ("<=50K", "50K", "'50K' is no income"),
        ("39", "old", "'old' is no number in the column age"),
        ("39, ", "", "line 1 has 14 fields instead of 15"),
    ],
)
def test_what_the_description_does_not_know_is_refused(publish: Publish, old: str, new: str, named: str):
    with pytest.raises(DataError, match=named):
        adult(publish, [ADULT[0].replace(old, new, 1), *ADULT[1:]])


# -- Dutch census -----------------------------------------------------------------------------------------------------

DUTCH = [
    "1,6,1131,112,1,1,1,5,111,135,1,2_1",
    "2,10,1122,113,1,1,1,2,111,122,2,5_4_9",
    "1,17,1121,126,9,3,3,9,224,200,4,2_1",
    "2,4,1110,114,1,1,1,2,111,138,1,5_4_9",
    "2,8,1122,126,1,1,1,2,120,131,2,2_1",
    "1,1,1220,111,2,2,2,0,210,139,3,5_4_9",
    "2,8,1122,114,1,1,1,5,111,135,2,2_1",
]


def dutch(publish: Publish, rows: list[str]) -> Split:
    return load(
        "dutch", publish("dutch", ("@relation r\n\n@attribute sex {2,1}\n@data\n\n" + "\n".join(rows)).encode())
    )


def test_every_fifth_line_of_the_dutch_census_is_a_test_row(publish: Publish):
    split = dutch(publish, DUTCH)
    assert split.test_y.tolist() == [1, 0]  # lines 0 and 5
    assert split.train_y.tolist() == [0, 1, 0, 1, 1]
    assert split.train_x.shape == (5, 74)
    assert (split.train_x.sum(1) == 11).all()  # eleven attributes, all categories
    assert [split.sensitive["sex"].values[i] for i in split.sensitive["sex"].train] == [
        *("female", "male", "female", "female", "female")
    ]


def test_another_line_of_the_dutch_census_changes_no_other_row(publish: Publish):
    before = dutch(publish, DUTCH)
    after = dutch(publish, [*DUTCH[:2], DUTCH[5], *DUTCH[3:]])
    assert (before.train_x != after.train_x).any(1).tolist() == [False, True, False, False, False]
    assert (before.test_x == after.test_x).all()


# -- COMPAS -----------------------------------------------------------------------------------------------------------

PERSON = {
    "id": "1",
    "sex": "Male",
    "age": "34",
    "age_cat": "25 - 45",
    "race": "African-American",
    "juv_fel_count": "0",
    "decile_score": "3",
    "juv_misd_count": "1",
    "juv_other_count": "0",
    "priors_count": "9",
    "days_b_screening_arrest": "-1",
    "c_charge_degree": "F",
    "c_charge_desc": "Battery, w/Prior",
    "is_recid": "1",
    "score_text": "Low",
    "two_year_recid": "1",
}
PEOPLE = [PERSON | {"id": str(n), "age": str(30 + n), "two_year_recid": str(n % 2)} for n in range(12)]


def compas_file(people: list[dict[str, str]]) -> bytes:
    header = [*people[0], "priors_count"]  # twice, as in the original
    rows = [header, *([*person.values(), person["priors_count"]] for person in people)]
    return "".join(",".join(f'"{cell}"' if "," in cell else cell for cell in row) + "\n" for row in rows).encode()


def compas(publish: Publish, people: list[dict[str, str]]) -> Split:
    return load("compas", publish("compas", compas_file(people)))


def test_compas_rows_and_groups(publish: Publish):
    split = compas(publish, PEOPLE)
    assert (len(split.train_x), len(split.test_x)) == (9, 3)
    assert value(split, 0, "age") == pytest.approx(0.31)
    assert value(split, 0, "priors_count") == pytest.approx(math.log(10) / math.log(101))
    assert value(split, 0, "c_charge_degree=F") == 1
    assert split.train_y.tolist() == [1, 0, 1, 0, 0, 1, 0, 1, 1]
    groups = {name: a.values[a.train[0]] for name, a in split.sensitive.items()}
    assert groups == {"race": "African-American", "sex": "Male", "age_cat": "25 - 45"}


@pytest.mark.parametrize(
    "reason",
    [
        {"days_b_screening_arrest": ""},
        {"days_b_screening_arrest": "31"},
        {"days_b_screening_arrest": "-31"},
        {"is_recid": "-1"},
        {"c_charge_degree": "O"},
        {"score_text": "N/A"},
    ],
)
def test_the_filter_drops_a_person_and_moves_nobody_else(publish: Publish, reason: dict[str, str]):
    before = compas(publish, PEOPLE)
    after = compas(publish, [*PEOPLE[:3], PEOPLE[3] | reason, *PEOPLE[4:]])
    dropped = 2  # line 3 is the third training row
    assert (np.delete(before.train_x, dropped, 0) == after.train_x).all()
    assert (before.test_x == after.test_x).all()
    assert (before.test_y == after.test_y).all()


def test_names_and_case_numbers_of_the_original_change_nothing(publish: Publish):
    private = {"name": "a, b", "first": "a", "last": "b", "dob": "1980-01-01", "c_case_number": "13"}
    plain = compas(publish, PEOPLE)
    original = compas(publish, [private | person for person in PEOPLE])
    assert (plain.train_x == original.train_x).all()
    assert plain.columns == original.columns
    assert not any(name in column for name in private for column in plain.columns)


def test_a_compas_file_without_a_column_is_refused(publish: Publish):
    with pytest.raises(DataError, match="the column race is missing"):
        compas(publish, [{k: v for k, v in person.items() if k != "race"} for person in PEOPLE])
    broken = compas_file(PEOPLE) + b"1,2,3\n"
    with pytest.raises(DataError, match="line 14 has 3 fields instead of 17"):
        load("compas", publish("compas", broken))


@pytest.mark.parametrize("columns", [ADULT_COLUMNS, DUTCH_COLUMNS, COMPAS_COLUMNS])
def test_no_category_is_there_twice(columns):
    for column in columns:
        if isinstance(column, Categories):
            assert len(set(column.values)) == len(column.values)
