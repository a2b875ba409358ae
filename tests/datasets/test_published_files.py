"""The published files themselves, where DPKIT_DATA names a folder that holds them: counts and rates that are known."""

from __future__ import annotations

import functools
import os
from collections import Counter
from pathlib import Path

import numpy as np
import pytest

from dpkit.datasets import Split, describe, load, load_e2e, load_shakespeare
from dpkit.datasets.files import find, lines, read
from dpkit.datasets.loaders import LOADERS
from dpkit.datasets.tabular import ADULT_COLUMNS, DUTCH_COLUMNS, Categories

pytestmark = pytest.mark.skipif(
    "DPKIT_DATA" not in os.environ, reason="DPKIT_DATA, the folder with the published files, is not set"
)


def needs(name: str) -> None:
    for file in describe(name).files:
        if find(file, None) is None:
            pytest.skip(f"{file.path} is not in the folder DPKIT_DATA")


# Of the training part; MNIST and Fashion-MNIST as their authors print them.
LABELS = {
    "mnist": [5_923, 6_742, 5_958, 6_131, 5_842, 5_421, 5_918, 6_265, 5_851, 5_949],
    "fashion": [6_000] * 10,
    "adult": [24_720, 7_841],
    "sst2": [29_780, 37_569],
}

small = functools.cache(load)  # the image sets are large and read once


@pytest.fixture(scope="module", params=[name for name in LOADERS if name != "digits"])
def named(request: pytest.FixtureRequest) -> tuple[str, Split]:
    needs(request.param)
    return request.param, (load if request.param in {"mnist", "fashion"} else small)(request.param)


def test_sizes_ranges_and_groups_are_those_of_the_catalogue(named: tuple[str, Split]):
    name, split = named
    description = describe(name)
    assert (len(split.train_x), len(split.train_y)) == (description.num_train,) * 2
    assert (len(split.test_x), len(split.test_y)) == (description.num_test,) * 2
    assert split.classes == description.classes
    assert set(split.train_y.tolist()) == set(split.test_y.tolist()) == set(range(split.classes))
    assert tuple(split.sensitive) == description.sensitive
    for groups in split.sensitive.values():
        assert (len(groups.train), len(groups.test)) == (description.num_train, description.num_test)
    if name in LABELS:
        assert np.bincount(split.train_y).tolist() == LABELS[name]
    if split.train_x.dtype == np.float32:
        assert split.train_x.min() == 0
        assert split.train_x.max() == 1


def rates(split: Split, attribute: str) -> dict[str, float]:
    """Share of positive labels per group, training and test together."""
    groups = split.sensitive[attribute]
    group = np.concatenate([groups.train, groups.test])
    label = np.concatenate([split.train_y, split.test_y])
    return {value: float(label[group == number].mean()) for number, value in enumerate(groups.values)}


def counts(split: Split) -> list[int]:
    return np.bincount(np.concatenate([split.train_y, split.test_y])).tolist()


def test_adult_has_the_known_counts_and_rates():
    needs("adult")
    split = small("adult")
    assert np.bincount(split.test_y).tolist() == [12_435, 3_846]
    sex = split.sensitive["sex"]
    assert {v: round(float(split.train_y[sex.train == i].mean()), 4) for i, v in enumerate(sex.values)} == {
        "Male": 0.3057,
        "Female": 0.1095,
    }
    race = split.sensitive["race"]
    assert dict(zip(race.values, np.bincount(race.train).tolist(), strict=True)) == {
        "Amer-Indian-Eskimo": 311,
        "Asian-Pac-Islander": 1039,
        "Black": 3124,
        "Other": 271,
        "White": 27816,
    }


def test_the_categories_of_adult_are_those_of_adult_names():
    folder = Path(os.environ["DPKIT_DATA"])
    for path in (folder / "tabular/adult/adult.names", folder / "adult.names"):
        if path.is_file():
            break
    else:
        pytest.skip("adult.names is not in the folder DPKIT_DATA")
    described = {}
    for line in path.read_text(encoding="utf-8").splitlines():
        name, colon, values = line.partition(":")
        if colon and not line.startswith("|"):
            described[name] = tuple(value.strip() for value in values.strip().rstrip(".").split(","))
    for column in ADULT_COLUMNS:
        if isinstance(column, Categories):
            assert tuple(value for value in column.values if value != "?") == described[column.name]
        else:
            assert described[column.name] == ("continuous",)


def test_the_dutch_census_has_the_known_counts_and_rates_and_the_codes_of_its_header():
    needs("dutch")
    split = small("dutch")
    assert counts(split) == [31_657, 28_763]
    assert {value: round(rate, 4) for value, rate in rates(split, "sex").items()} == {"male": 0.6256, "female": 0.3271}
    [file] = describe("dutch").files
    header = {
        line.split()[1]: set(line[line.index("{") + 1 : line.index("}")].split(","))
        for _, line in lines(read(file, None))
        if line.startswith("@attribute")
    }
    assert header.pop("occupation") == {"5_4_9", "2_1"}
    assert {column.name: set(column.values) for column in DUTCH_COLUMNS if isinstance(column, Categories)} == header


def test_compas_has_the_known_counts_after_propublicas_filter():
    needs("compas")
    split = small("compas")
    assert sum(counts(split)) == 6_172
    # As in ProPublica's notebook, after its filter.
    assert counts(split) == [3_363, 2_809]
    race = split.sensitive["race"]
    assert dict(
        zip(race.values, (np.bincount(race.train) + np.bincount(race.test, minlength=6)).tolist(), strict=True)
    ) == {
        "African-American": 3175,
        "Asian": 31,
        "Caucasian": 2103,
        "Hispanic": 509,
        "Native American": 11,
        "Other": 343,
    }


def test_sst2_has_the_known_counts_and_no_sentence_is_empty_or_cut():
    needs("sst2")
    split = small("sst2")
    assert np.bincount(split.test_y).tolist() == [428, 444]
    assert (split.train_x[:, 0] != 0).all()
    assert (split.train_x[:, -1] == 0).all()


def test_e2e_and_shakespeare_have_the_known_counts():
    needs("e2e")
    needs("shakespeare")
    e2e = load_e2e()
    assert (len(e2e.train), len(e2e.dev), len(e2e.test)) == (42_061, 4_672, 4_693)
    assert [len({pair.meaning for pair in part}) for part in (e2e.train, e2e.dev, e2e.test)] == [4_862, 547, 630]
    speeches = load_shakespeare()
    assert sum(len(one) for one in speeches.values()) == 30_876
    by_size = Counter(min(len(one), 10) for one in speeches.values())
    assert len(speeches) == 1_336
    assert len(speeches) - by_size[1] == 1_117
    assert by_size[10] == 620
    assert max(len(one) for one in speeches.values()) == 359
