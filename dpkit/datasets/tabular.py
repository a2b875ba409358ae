"""Tables as rows in [0, 1]: Adult, the Dutch census of 2001, COMPAS.

Categories become one column each; which ones there are is written here, copied from the published descriptions
(adult.names, the header of the ARFF file, ProPublica's documentation). Numbers are scaled by constants that follow from
what they mean, and cut to [0, 1]. NOTHING here is learned from the data: no means, no largest values, no list of the
categories that occur. A row of the result depends on one line of the file and on nothing else. That is part of the
privacy guarantee: it covers the training on these rows, and one person must not move the rows of the others.

A missing value ("?") is a category of its own. Where no test set is published, every fifth line of the file, from the
first on, is a test row; lines are counted BEFORE any filter, so that a line that the filter drops moves no other line
from one side to the other.
"""

from __future__ import annotations

import csv
import io
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from dpkit.errors import DataError

from .catalogue import describe
from .files import lines, read
from .split import SensitiveAttribute, Split

Row = Mapping[str, str]


@dataclass(frozen=True)
class Categories:
    """A column of words: one output column for each of ``values``, 1 where it is the row's."""

    name: str
    values: tuple[str, ...]


@dataclass(frozen=True)
class Number:
    """A column of numbers: one output column, ``scaled`` and then cut to [0, 1]; called ``label`` where it has one."""

    name: str
    scaled: Callable[[float], float]
    label: str = ""


def _over(largest: float) -> Callable[[float], float]:
    return lambda value: value / largest


def _logarithm_over(largest: float) -> Callable[[float], float]:
    """For amounts and counts that are mostly 0 and have a long tail: 0 stays 0, ``largest`` becomes 1."""
    return lambda value: math.log1p(max(value, 0.0)) / math.log1p(largest)


# -- Adult ------------------------------------------------------------------------------------------------------------

_ADULT_FIELDS = (
    *("age", "workclass", "fnlwgt", "education", "education-num", "marital-status", "occupation", "relationship"),
    *("race", "sex", "capital-gain", "capital-loss", "hours-per-week", "native-country", "income"),
)
_ADULT_RACES = ("White", "Asian-Pac-Islander", "Amer-Indian-Eskimo", "Other", "Black")
_ADULT_SEXES = ("Female", "Male")

# Left out: fnlwgt, which is how many people the census let the row stand for, and education-num, which is education
# as a number.
ADULT_COLUMNS: tuple[Categories | Number, ...] = (
    Number("age", _over(100)),  # years
    Categories(
        "workclass",
        (
            *("Private", "Self-emp-not-inc", "Self-emp-inc", "Federal-gov", "Local-gov", "State-gov", "Without-pay"),
            *("Never-worked", "?"),
        ),
    ),
    Categories(
        "education",
        (
            *("Bachelors", "Some-college", "11th", "HS-grad", "Prof-school", "Assoc-acdm", "Assoc-voc", "9th"),
            *("7th-8th", "12th", "Masters", "1st-4th", "10th", "Doctorate", "5th-6th", "Preschool"),
        ),
    ),
    Categories(
        "marital-status",
        (
            *("Married-civ-spouse", "Divorced", "Never-married", "Separated", "Widowed", "Married-spouse-absent"),
            "Married-AF-spouse",
        ),
    ),
    Categories(
        "occupation",
        (
            *("Tech-support", "Craft-repair", "Other-service", "Sales", "Exec-managerial", "Prof-specialty"),
            *("Handlers-cleaners", "Machine-op-inspct", "Adm-clerical", "Farming-fishing", "Transport-moving"),
            *("Priv-house-serv", "Protective-serv", "Armed-Forces", "?"),
        ),
    ),
    Categories("relationship", ("Wife", "Own-child", "Husband", "Not-in-family", "Other-relative", "Unmarried")),
    Categories("race", _ADULT_RACES),
    Categories("sex", _ADULT_SEXES),
    # Dollars, five digits. The logarithm tells none from some, and its order of magnitude; the amount itself counts up
    # to 10,000, so that large ones do not make all others vanish.
    Number("capital-gain", _logarithm_over(99_999), label="log capital-gain"),
    Number("capital-gain", _over(10_000)),
    Number("capital-loss", _logarithm_over(99_999), label="log capital-loss"),
    Number("capital-loss", _over(10_000)),
    Number("hours-per-week", _over(100)),  # two digits
    Categories(
        "native-country",
        (
            *("United-States", "Cambodia", "England", "Puerto-Rico", "Canada", "Germany"),
            *("Outlying-US(Guam-USVI-etc)", "India", "Japan", "Greece", "South", "China", "Cuba", "Iran", "Honduras"),
            *("Philippines", "Italy", "Poland", "Jamaica", "Vietnam", "Mexico", "Portugal", "Ireland", "France"),
            *("Dominican-Republic", "Laos", "Ecuador", "Taiwan", "Haiti", "Columbia", "Hungary", "Guatemala"),
            *("Nicaragua", "Scotland", "Thailand", "Yugoslavia", "El-Salvador", "Trinadad&Tobago", "Peru", "Hong"),
            *("Holand-Netherlands", "?"),
        ),
    ),
)

# The boundaries of COMPAS, so that the two sets can be compared.
_AGE_GROUPS = ("Less than 25", "25 - 45", "Greater than 45")


def adult(data_dir: Path | None) -> Split:
    """UCI Adult: does somebody earn more than 50,000 dollars a year? Test set: adult.test.

    Raises:
      DataError: a file is missing or is not the published one.
    """
    train, test = (_adult_rows(read(file, data_dir)) for file in describe("adult").files)

    def both(of: Callable[[Row], int]) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
        return _integers(train, of), _integers(test, of)

    train_y, test_y = both(lambda row: _position("income", row["income"].removesuffix("."), ("<=50K", ">50K")))
    return Split(
        train_x=_encoded(train, ADULT_COLUMNS),
        train_y=train_y,
        test_x=_encoded(test, ADULT_COLUMNS),
        test_y=test_y,
        classes=2,
        sensitive={
            "sex": SensitiveAttribute(_ADULT_SEXES, *both(lambda row: _position("sex", row["sex"], _ADULT_SEXES))),
            "race": SensitiveAttribute(_ADULT_RACES, *both(lambda row: _position("race", row["race"], _ADULT_RACES))),
            "age_group": SensitiveAttribute(_AGE_GROUPS, *both(lambda row: _age_group(float(row["age"])))),
        },
        columns=_names(ADULT_COLUMNS),
    )


def _adult_rows(content: bytes) -> list[Row]:
    return [
        _row("Adult", number, _ADULT_FIELDS, [field.strip() for field in line.split(",")])
        for number, line in lines(content)
        if line[0] != "|"  # a comment
    ]


def _age_group(years: float) -> int:
    return 0 if years < 25 else 1 if years <= 45 else 2


# -- Dutch census -----------------------------------------------------------------------------------------------------

# Name -> codes, as the header of the ARFF file lists them (the order is made numeric). All are categories: the codes
# of age are groups of five years, the others have no order.
_DUTCH_CODES: dict[str, tuple[str, ...]] = {
    "sex": ("1", "2"),
    "age": tuple(str(code) for code in range(1, 18)),
    "household_position": ("1110", "1121", "1122", "1131", "1132", "1140", "1210", "1220"),
    "household_size": ("111", "112", "113", "114", "125", "126"),
    "prev_residence_place": ("1", "2", "9"),
    "citizenship": ("1", "2", "3"),
    "country_birth": ("1", "2", "3"),
    "edu_level": ("0", "1", "2", "3", "4", "5", "9"),
    "economic_status": ("111", "112", "120", "210", "221", "222", "223", "224"),
    "cur_eco_activity": (
        *("111", "122", "124", "131", "132", "133", "134", "135", "136", "137", "138", "139"),
        "200",
    ),
    "Marital_status": ("1", "2", "3", "4"),
}
DUTCH_COLUMNS: tuple[Categories | Number, ...] = tuple(Categories(name, codes) for name, codes in _DUTCH_CODES.items())


def dutch(data_dir: Path | None) -> Split:
    """Dutch census of 2001: does somebody have a high-level occupation? Test set: every fifth line.

    Raises:
      DataError: the file is missing or is not the published one.
    """
    [file] = describe("dutch").files
    rows = [
        _row("Dutch census", number, (*_DUTCH_CODES, "occupation"), line.strip().split(","))
        for number, line in lines(read(file, data_dir))
        if line[0] not in "@%"
    ]
    sexes = _integers(rows, lambda row: _position("sex", row["sex"], _DUTCH_CODES["sex"]))
    test = np.arange(len(rows)) % 5 == 0
    return _cut(
        rows,
        DUTCH_COLUMNS,
        labels=_integers(rows, lambda row: _position("occupation", row["occupation"], ("5_4_9", "2_1"))),
        sensitive={"sex": (("male", "female"), sexes)},
        test=test,
    )


# -- COMPAS -----------------------------------------------------------------------------------------------------------

_COMPAS_RACES = ("African-American", "Asian", "Caucasian", "Hispanic", "Native American", "Other")
_COMPAS_SEXES = ("Female", "Male")
_COMPAS_AGES = _AGE_GROUPS

# Counts of offences have no largest value; 100 is cut off, and so is what is above. Left out: everything that is known
# only later (the label says it) and the scores of COMPAS itself, whose fairness is the question.
COMPAS_COLUMNS: tuple[Categories | Number, ...] = (
    Categories("sex", _COMPAS_SEXES),
    Number("age", _over(100)),  # years
    Categories("age_cat", _COMPAS_AGES),
    Categories("race", _COMPAS_RACES),
    Number("juv_fel_count", _logarithm_over(100)),
    Number("juv_misd_count", _logarithm_over(100)),
    Number("juv_other_count", _logarithm_over(100)),
    Number("priors_count", _logarithm_over(100)),
    Categories("c_charge_degree", ("F", "M")),
)

# All that is read; names, birth dates and case numbers of ProPublica's original are not.
_COMPAS_FIELDS = (
    *(column.name for column in COMPAS_COLUMNS),
    *("days_b_screening_arrest", "is_recid", "score_text", "two_year_recid"),
)


def compas(data_dir: Path | None) -> Split:
    """COMPAS: was somebody charged again within two years? Test set: every fifth line of the file.

    ProPublica's filter leaves 6,172 of 7,214 lines: charged within 30 days of the screening, known recidivism, no
    ordinary traffic offence, a score. Source: https://github.com/propublica/compas-analysis.

    Raises:
      DataError: the file is missing or is not the published one.
    """
    [file] = describe("compas").files
    table = csv.reader(io.StringIO(read(file, data_dir).decode("utf-8"), newline=""))
    header = next(table, [])
    if missing := [name for name in _COMPAS_FIELDS if name not in header]:
        raise DataError(f"COMPAS: the column {missing[0]} is missing in the header; get the file again.")
    # priors_count is there twice, with the same values; the first one is taken.
    places = [header.index(name) for name in _COMPAS_FIELDS]
    rows: list[Row] = []
    kept: list[int] = []
    for number, fields in enumerate(table):
        if len(fields) != len(header):
            raise DataError(f"COMPAS: line {table.line_num} has {len(fields)} fields instead of {len(header)}.")
        row = {name: fields[place] for name, place in zip(_COMPAS_FIELDS, places, strict=True)}
        if _propublica_keeps(row):
            rows.append(row)
            kept.append(number)
    return _cut(
        rows,
        COMPAS_COLUMNS,
        labels=_integers(rows, lambda row: _position("two_year_recid", row["two_year_recid"], ("0", "1"))),
        sensitive={
            name: (values, _integers(rows, lambda row, n=name, v=values: _position(n, row[n], v)))
            for name, values in (("race", _COMPAS_RACES), ("sex", _COMPAS_SEXES), ("age_cat", _COMPAS_AGES))
        },
        test=np.asarray(kept, dtype=np.int64) % 5 == 0,
    )


def _propublica_keeps(row: Row) -> bool:
    days = row["days_b_screening_arrest"]
    return (
        days != ""
        and -30 <= float(days) <= 30
        and row["is_recid"] != "-1"
        and row["c_charge_degree"] != "O"
        and row["score_text"] != "N/A"
    )


# -- what the three share ---------------------------------------------------------------------------------------------


def _row(title: str, number: int, names: Sequence[str], fields: Sequence[str]) -> Row:
    if len(fields) != len(names):
        raise DataError(f"{title}: line {number} has {len(fields)} fields instead of {len(names)}; get the file again.")
    return dict(zip(names, fields, strict=True))


def _position(name: str, value: str, values: Sequence[str]) -> int:
    try:
        return values.index(value)
    except ValueError:
        raise DataError(f"{value!r} is no {name} that the published description knows; get the file again.") from None


def _integers(rows: Sequence[Row], of: Callable[[Row], int]) -> NDArray[np.int64]:
    return np.fromiter((of(row) for row in rows), dtype=np.int64, count=len(rows))


def _names(columns: Sequence[Categories | Number]) -> tuple[str, ...]:
    names: list[str] = []
    for column in columns:
        names += (
            [column.label or column.name]
            if isinstance(column, Number)
            else [f"{column.name}={v}" for v in column.values]
        )
    return tuple(names)


def _encoded(rows: Sequence[Row], columns: Sequence[Categories | Number]) -> NDArray[np.float32]:
    """(rows, output columns) in [0, 1]; every row from itself alone."""
    result = np.zeros((len(rows), len(_names(columns))), dtype=np.float32)
    everybody = np.arange(len(rows))
    start = 0
    for column in columns:
        if isinstance(column, Number):
            values = np.fromiter((_scaled(column, row) for row in rows), dtype=np.float32, count=len(rows))
            result[:, start] = values
            start += 1
        else:
            chosen = _integers(rows, lambda row, c=column: _position(c.name, row[c.name], c.values))
            result[everybody, start + chosen] = 1
            start += len(column.values)
    return result


def _scaled(column: Number, row: Row) -> float:
    try:
        value = float(row[column.name])
    except ValueError:
        raise DataError(f"{row[column.name]!r} is no number in the column {column.name}; get the file again.") from None
    return min(max(column.scaled(value), 0.0), 1.0)


def _cut(
    rows: Sequence[Row],
    columns: Sequence[Categories | Number],
    *,
    labels: NDArray[np.int64],
    sensitive: Mapping[str, tuple[tuple[str, ...], NDArray[np.int64]]],
    test: NDArray[np.bool_],
) -> Split:
    """All rows, cut into those that ``test`` marks and the others."""
    encoded = _encoded(rows, columns)
    return Split(
        train_x=encoded[~test],
        train_y=labels[~test],
        test_x=encoded[test],
        test_y=labels[test],
        classes=2,
        sensitive={
            name: SensitiveAttribute(values, groups[~test], groups[test])
            for name, (values, groups) in sensitive.items()
        },
        columns=_names(columns),
    )
