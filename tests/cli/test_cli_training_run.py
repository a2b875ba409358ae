"""Numbers on the command line: which event they mean, and what is refused, for every command that takes them."""

from __future__ import annotations

import math

import pytest
import typer

from accounting import Gaussian, Poisson, Relation, Repeated, TruncatedPoisson
from accounting.events import Event, OnePass, WithoutReplacement
from dpkit.cli.training_run import Numbers, Sampling, from_numbers
from dpkit.errors import DpkitError

from .conftest import Run

NOISE = Gaussian(1.5)


def numbers(**given: object) -> Numbers:
    return Numbers(**({"noise_multiplier": 1.5, "delta": 1e-5} | given))  # pyright: ignore[reportArgumentType]


@pytest.mark.parametrize(
    ("given", "event", "relation"),
    [
        pytest.param(
            {"sample_rate": 0.25, "steps": 7}, Repeated(Poisson(0.25, NOISE), 7), Relation.ADD_REMOVE, id="poisson"
        ),
        pytest.param(
            {"batch_size": 256, "num_examples": 60000, "epochs": 15},
            Repeated(Poisson(256 / 60000, NOISE), 15 * 235),
            Relation.ADD_REMOVE,
            id="poisson by epochs",
        ),
        pytest.param({"sample_rate": 1.0, "steps": 7}, Repeated(NOISE, 7), Relation.ADD_REMOVE, id="rate 1"),
        pytest.param({"sampling": "full", "epochs": 7}, Repeated(NOISE, 7), Relation.ADD_REMOVE, id="full"),
        pytest.param(
            {"sample_rate": 0.25, "steps": 7, "cap": 3, "max_examples": 9},
            Repeated(TruncatedPoisson(0.25, 3, 9, NOISE), 7),
            Relation.ADD_REMOVE,
            id="truncated",
        ),
        pytest.param(
            {"sampling": "shuffled", "sample_rate": 0.1, "steps": 21},
            Repeated(OnePass(NOISE), 3),
            Relation.ZERO_OUT,
            id="shuffled",
        ),
        pytest.param(
            # Floor(10/4) = 2 whole batches: a loader that drops the rest begins its third pass at step 5.
            {"sampling": "fixed-order", "batch_size": 4, "num_examples": 10, "steps": 5},
            Repeated(OnePass(NOISE), 3),
            Relation.ZERO_OUT,
            id="fixed order, last batch dropped",
        ),
        pytest.param(
            {"sampling": "shuffled", "batch_size": 4, "num_examples": 10, "epochs": 5, "relation": "replace_one"},
            Repeated(OnePass(NOISE), 5),
            Relation.REPLACE_ONE,
            id="shuffled by epochs",
        ),
        pytest.param(
            {"sampling": "without-replacement", "batch_size": 4, "num_examples": 10, "epochs": 2},
            Repeated(WithoutReplacement(4, 10, NOISE), 6),
            Relation.REPLACE_ONE,
            id="without replacement",
        ),
        pytest.param({"sample_rate": 0.0, "steps": 7}, Repeated(Poisson(0.0, NOISE), 7), Relation.ADD_REMOVE, id="q=0"),
        pytest.param({"sample_rate": 0.5, "steps": 0}, Repeated(Poisson(0.5, NOISE), 0), Relation.ADD_REMOVE, id="T=0"),
    ],
)
def test_numbers_mean_this_event(given: dict[str, object], event: Event, relation: Relation):
    if "sampling" in given:
        given = given | {"sampling": Sampling(str(given["sampling"]))}
    if "relation" in given:
        given = given | {"relation": Relation(str(given["relation"]))}
    run = from_numbers(numbers(**given))
    assert run.event == event
    assert run.relation == relation


@pytest.mark.parametrize("size", [1, 3, 4, 5, 7, 10])
@pytest.mark.parametrize("drops_last", [True, False])
def test_no_loader_passes_over_the_data_more_often_than_is_charged(size: int, drops_last: bool):
    """Against the loop itself: how often has a record been in a batch, at most, after each step?"""
    examples = 10
    run = from_numbers(numbers(sampling=Sampling.SHUFFLED, batch_size=size, num_examples=examples, steps=40))
    batches = examples // size if drops_last else math.ceil(examples / size)
    for step in range(1, 41):
        assert run.releases_by(step) >= math.ceil(step / batches)


@pytest.mark.parametrize(
    ("given", "said"),
    [
        ({"sample_rate": 0.1}, "missing --steps"),
        ({"steps": 1}, "missing --sample-rate"),
        ({"steps": 1, "batch_size": 5}, "--num-examples"),
        ({"steps": 1, "sampling": Sampling.WITHOUT_REPLACEMENT}, "missing --batch-size and --num-examples"),
        ({"sample_rate": 0.1, "steps": 1, "noise_multiplier": None}, "missing --noise-multiplier"),
        ({"sample_rate": 0.1, "steps": 1, "epochs": 1}, "--steps and --epochs"),
        ({"sample_rate": 0.1, "batch_size": 1, "num_examples": 10, "steps": 1}, "--sample-rate and --batch-size"),
        ({"batch_size": 11, "num_examples": 10, "steps": 1}, "--batch-size is 11"),
        ({"sample_rate": 0.1, "steps": 1, "cap": 3}, "--max-examples"),
        (
            {"sample_rate": 0.1, "steps": 1, "cap": 3, "max_examples": 9, "sampling": Sampling.SHUFFLED},
            "--cap cuts Poisson",
        ),
        ({"sample_rate": 0.1, "steps": 1, "sampling": Sampling.FULL}, "rate 1"),
        ({"sample_rate": 0.0, "epochs": 1}, "--sample-rate is 0"),
        ({"sample_rate": 0.0, "steps": 1, "sampling": Sampling.SHUFFLED}, "--sample-rate is 0"),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_what_is_missing_or_contradicts_itself_is_named(given: dict[str, object], said: str):
    with pytest.raises((typer.BadParameter, DpkitError), match=said):
        from_numbers(numbers(**given))


BAD = (
    ("--noise-multiplier", "0"),
    ("--noise-multiplier", "-1"),
    ("--noise-multiplier", "nan"),
    ("--noise-multiplier", "inf"),
    ("--sample-rate", "-0.1"),
    ("--sample-rate", "1.1"),
    ("--sample-rate", "nan"),
    ("--steps", "-1"),
    ("--steps", "9" * 40),
    ("--delta", "0"),
    ("--delta", "1"),
    ("--delta", "-1e-5"),
    ("--delta", "nan"),
)
GOOD = {"--noise-multiplier": "1.1", "--sample-rate": "0.01", "--steps": "100", "--delta": "1e-5"}
COMMANDS = {"epsilon": (), "compare": (), "curve": (), "tune-leak": ("--grid", "3"), "calibrate": ()}


@pytest.mark.parametrize("command", COMMANDS)
@pytest.mark.parametrize(("name", "value"), BAD, ids=[f"{name[2:]}={value[:8]}" for name, value in BAD])
def test_a_number_outside_its_domain_is_one_line_that_names_it(dpkit: Run, command: str, name: str, value: str):
    given = GOOD | {name: value}
    more = COMMANDS[command]
    if command == "calibrate":
        more = ("--target-epsilon", "1")
        del given["--steps" if name != "--steps" else "--sample-rate"]
    done = dpkit(command, *(word for pair in given.items() for word in pair), *more)
    assert (done.code, done.out) == (1, "")
    assert done.err.startswith(f"error: {name} is ")
    assert done.err.count("\n") == 1
    assert "; " in done.err  # the rule, and then the way out


@pytest.mark.parametrize("command", ["compare", "curve", "tune-leak"])
def test_a_folder_and_numbers_together_are_refused(dpkit: Run, command: str, tmp_path):
    done = dpkit(command, tmp_path, "--delta", "1e-5", *COMMANDS[command])
    assert (done.code, done.out) == (1, "")
    assert "--delta" in done.err
