"""``dpkit tune-leak``: what a search over hyperparameters costs that releases its best run.

A random number of trials whose best is released costs less than releasing all of them (``accounting.selection``), under
conditions that are printed with the number. A fixed number of trials (a grid) and trials that are chosen by looking at
the scores of earlier ones (an adaptive sweep) do not meet them: those are charged as if every trial were released.
"""

from __future__ import annotations

import math
from dataclasses import asdict
from enum import StrEnum
from typing import Annotated, NamedTuple

import typer

import accounting
from accounting import Bound, Event, selection
from accounting.events import BinomialTrials, PoissonTrials, Select, Trials
from dpkit.errors import Refused

from .epsilon import Answer, answer_of, epsilon_of, print_answer, print_caveats, say, shown
from .terminal import Debug, Json, out, print_json
from .training_run import Numbers, RunPath, TrainingRun, check_option, takes_numbers, training_run


class _Law(StrEnum):
    TNB = "tnb"
    LOGARITHMIC = "logarithmic"
    GEOMETRIC = "geometric"
    POISSON = "poisson"
    BINOMIAL = "binomial"


class _Scores(StrEnum):
    PUBLIC = "public"
    CHARGED = "charged"
    PRIVATE = "private"


class _Released(StrEnum):
    BEST = "best"
    ALL = "all"


_MEAN = {
    True: "this law has at least one trial, so its mean must be 1 or more and finite; poisson has lower ones",
    False: "it must be above 0 and finite; give the expected number of trials",
}


_TAKES = {_Law.TNB: "--mean and --shape", _Law.BINOMIAL: "--count and --probability"}
_CONDITIONS_OF_ALL = (
    "Every trial has at least this noise, and at most this sample rate and these steps.",
    "The number of trials was fixed before the first one, and trials that crashed or were pruned count.",
    "The scores are computed from public data, or their cost is part of the numbers.",
)


class _Search(NamedTuple):
    """What is searched and charged: ``trials`` in words, ``event`` in all, and why it is charged so."""

    trials: str
    expected: float
    event: Event
    why: str
    conditions: tuple[str, ...]

    @property
    def whole(self) -> int:
        """The expected number of trials as a whole number; a law's mean is a hair above the one that was typed."""
        return math.ceil(round(self.expected, 6))


@takes_numbers
def tune_leak(
    run: RunPath = None,
    *,
    numbers: Numbers,
    trials_law: Annotated[
        _Law | None, typer.Option(help="Law that the number of trials was drawn from, before anything was looked at.")
    ] = None,
    mean: Annotated[float | None, typer.Option(help="Expected number of trials; all laws but binomial.")] = None,
    shape: Annotated[
        float | None, typer.Option(help="Of tnb, above -1: 0 is logarithmic, 1 geometric. The smaller, the cheaper.")
    ] = None,
    count: Annotated[int | None, typer.Option(help="Of binomial: most trials.")] = None,
    probability: Annotated[float | None, typer.Option(help="Of binomial: that each of them is run.")] = None,
    grid: Annotated[int | None, typer.Option(help="Instead of a law: a fixed number of trials.")] = None,
    adaptive: Annotated[
        int | None, typer.Option(help="Instead of a law: most trials of a sweep that looks at earlier scores.")
    ] = None,
    scores: Annotated[
        _Scores,
        typer.Option(
            help="public: from public data, or from what the trial releases. charged: from private data, its cost is "
            "in the numbers. private: from private data without a cost, which is refused."
        ),
    ] = _Scores.PUBLIC,
    released: Annotated[
        _Released, typer.Option(help="best: the best trial alone, and not how many there were. all: anything else.")
    ] = _Released.BEST,
    json_output: Json = False,
    debug: Debug = False,
) -> None:
    """Compute what a hyperparameter search over such runs costs."""
    described = training_run(run, numbers)
    law = _law(trials_law, mean=mean, shape=shape, count=count, probability=probability)
    search = _search(described.event, law, grid=grid, adaptive=adaptive)
    _refuse_unmet(scores, released, law)
    base = epsilon_of(described)
    answer = answer_of(described, accounting.epsilon(search.event, described.delta, relation=described.relation))
    everything = _all_released(described, search.whole)
    if json_output:
        print_json(
            asdict(answer)
            | {
                "trials": search.trials,
                "law": None if law is None else law.model_dump(),
                "expected_trials": search.expected,
                "charged_as": search.why,
                "epsilon_of_one_trial": accounting.round_up(base.upper),
                "epsilon_if_all_were_released": accounting.round_up(everything.upper),
                "conditions": list(search.conditions),
                "caveats": list(described.caveats),
            }
        )
        return
    _print(answer, search, base, everything)
    print_caveats(described.caveats)


def _law(
    law: _Law | None, *, mean: float | None, shape: float | None, count: int | None, probability: float | None
) -> Trials | None:
    """The law that the options describe; None if they describe none."""
    at_least_one = law in (_Law.TNB, _Law.LOGARITHMIC, _Law.GEOMETRIC)
    check_option("--mean", mean, lambda x: (x >= 1 if at_least_one else x > 0) and x < math.inf, _MEAN[at_least_one])
    check_option("--shape", shape, lambda x: -1 < x < math.inf, "it must be above -1; 0 is logarithmic, 1 geometric")
    check_option("--count", count, lambda x: 1 <= x < 2**53, "it counts trials; give at least 1")
    check_option("--probability", probability, lambda x: 0 < x < 1, "it must lie strictly between 0 and 1; give one")
    match law, mean, shape, count, probability:
        case None, None, None, None, None:
            return None
        case _Law.TNB, float(), float(), None, None:
            return selection.truncated_negative_binomial(mean, shape)
        case _Law.LOGARITHMIC, float(), None, None, None:
            return selection.logarithmic(mean)
        case _Law.GEOMETRIC, float(), None, None, None:
            return selection.geometric(mean)
        case _Law.POISSON, float(), None, None, None:
            return PoissonTrials(mean)
        case _Law.BINOMIAL, None, None, int(), float():
            return BinomialTrials(count, probability)
    if law is None:
        raise typer.BadParameter("--mean, --shape, --count and --probability are of a law; name it with --trials-law.")
    raise typer.BadParameter(f"--trials-law {law} takes {_TAKES.get(law, '--mean')}, and nothing else.")


def _search(one: Event, law: Trials | None, *, grid: int | None, adaptive: int | None) -> _Search:
    if [law, grid, adaptive].count(None) != 2:
        raise typer.BadParameter("give exactly one of --trials-law, --grid and --adaptive: how many trials there were.")
    if law is not None:
        expected = selection.mean(law)
        said = ", ".join(f"{name} {value:.6g}" for name, value in law if name != "law")
        return _Search(
            f"{law.law.replace('_', ' ')} ({said}), {expected:.6g} expected",
            expected,
            Select(event=one, trials=law),
            "Selection of the best of a random number of trials.",
            selection.CONDITIONS,
        )
    name, number = ("--grid", grid) if grid is not None else ("--adaptive", adaptive)
    assert number is not None
    check_option(name, number, lambda x: 1 <= x < 2**53, "it counts trials; give at least 1")
    words = f"a fixed grid of {number}" if grid is not None else f"an adaptive sweep of at most {number}"
    charged = selection.full_composition(one, number)
    return _Search(words, number, charged.event, charged.reason, _CONDITIONS_OF_ALL)


def _refuse_unmet(scores: _Scores, released: _Released, law: Trials | None) -> None:
    """Raises Refused for a claim whose conditions fail."""
    if scores is _Scores.PRIVATE:
        raise Refused(
            "--scores private: a score that is computed from private data without noise tells about them by the choice "
            "it makes, and no number here covers that. Add noise to the score and put its cost into the numbers "
            "(--scores charged), or compute it on public data."
        )
    if released is _Released.ALL and law is not None:
        raise Refused(
            "--released all: the bound for a random number of trials holds if the best one alone is released, and "
            "neither the others nor their scores nor how many there were. Give --grid K with the K trials that were "
            "run: that is full composition."
        )


def _all_released(run: TrainingRun, count: int) -> Bound:
    everything = accounting.Repeated(event=run.event, count=count)
    return accounting.epsilon(everything, run.delta, relation=run.relation)


def _print(answer: Answer, search: _Search, base: Bound, everything: Bound) -> None:
    print_answer(answer)
    say(f"  trials     {search.trials}")
    out.print()
    say(search.why)
    delta = f"at delta = {accounting.round_up_text(answer.delta)}"
    say(f"one trial alone: epsilon <= {shown(base.upper)} {delta}")
    say(f"all of {search.whole} trials released: epsilon <= {shown(everything.upper)} {delta}")
    say("It holds if:")
    for condition in search.conditions:
        say(f"  - {condition}")
