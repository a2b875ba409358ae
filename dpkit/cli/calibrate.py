"""``dpkit calibrate``: the number that is left out, so that a run keeps to a target epsilon.

Guarantee: the number as it is printed was put back into the run, and the epsilon beside it, an upper bound, is that of
the run with this very number and is not above the target. Noise is rounded up; steps, rate and batch size down.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import asdict, replace
from decimal import ROUND_FLOOR, Context, Decimal
from typing import Annotated, Any

import typer

import accounting
from accounting import Event, TargetUnreachable
from dpkit.errors import InvalidArgument

from .epsilon import Answer, answer_of, epsilon_of, print_caveats, print_meaning, say, shown
from .terminal import Debug, Json, print_json
from .training_run import Numbers, Sampling, from_numbers, option, takes_numbers

_DIGITS = 6
_TRIES = 100


@takes_numbers
def calibrate(
    *,
    target_epsilon: Annotated[float, typer.Option(help="What all steps together may cost.")],
    numbers: Numbers,
    json_output: Json = False,
    debug: Debug = False,
) -> None:
    """Find the noise multiplier, steps, sample rate or batch size that is left out, for a target epsilon."""
    if not 0 < target_epsilon < math.inf:
        raise InvalidArgument(f"--target-epsilon is {target_epsilon}: it must be a finite number above 0; give one.")
    unknown = _unknown(numbers)
    found, answer, caveats = _verified(unknown, numbers, target_epsilon)
    if json_output:
        print_json(
            {"found": unknown, "value": found, "target_epsilon": target_epsilon}
            | asdict(answer)
            | {"caveats": list(caveats)}
        )
        return
    say(f"{option(unknown)} {found}", style="bold")
    say(
        f"  gives      epsilon <= {shown(answer.epsilon)} at delta = {accounting.round_up_text(answer.delta)}; the "
        f"target is {target_epsilon:g}"
    )
    print_meaning(answer)
    print_caveats(caveats)


def _unknown(numbers: Numbers) -> str:
    """The field of :class:`Numbers` that is to be found; steps stand for epochs as well."""
    missing = [
        name
        for name, said in (
            ("noise_multiplier", numbers.noise_multiplier is not None),
            ("steps", numbers.steps is not None or numbers.epochs is not None),
            (
                "sample_rate",
                numbers.sample_rate is not None or numbers.batch_size is not None or numbers.sampling is Sampling.FULL,
            ),
        )
        if not said
    ]
    if len(missing) != 1:
        raise typer.BadParameter(
            "leave out exactly one of --noise-multiplier, --steps (or --epochs) and --sample-rate (or --batch-size): "
            f"it is the one to be found. Left out: {', '.join(map(option, missing)) or 'none'}."
        )
    if missing == ["sample_rate"] and numbers.sampling in (Sampling.SHUFFLED, Sampling.FIXED_ORDER):
        raise typer.BadParameter(
            f"--sampling {numbers.sampling} is not amplified by sampling: its epsilon depends on the passes alone, and "
            "no batch size keeps to a target. Leave out --noise-multiplier or --steps."
        )
    # With the size of the data set, a rate is a number of examples.
    return "batch_size" if missing == ["sample_rate"] and numbers.num_examples is not None else missing[0]


def _verified(unknown: str, numbers: Numbers, target: float) -> tuple[Any, Answer, tuple[str, ...]]:
    """(number, answer, caveats): the run with the number as it is printed keeps to ``target``."""
    for value in _candidates(unknown, numbers, target):
        run = from_numbers(_with(numbers, unknown, value))
        bound = epsilon_of(run)
        if bound.upper <= target:
            answer = answer_of(run, bound)
            # Both are upper bounds: the target may have more digits than what is rounded up.
            least = min(answer.epsilon, target)
            return value, replace(answer, epsilon=least, committed_epsilon=least), run.caveats
    raise TargetUnreachable(
        f"no {option(unknown)} keeps to epsilon {target:g}; ask for a larger one, or change the other numbers."
    )


def _with(numbers: Numbers, unknown: str, value: Any) -> Numbers:
    return replace(numbers, **{unknown: value})


def _candidates(unknown: str, numbers: Numbers, target: float) -> Iterator[Any]:
    """The solution as it is printed, and if that does not keep to the target by a hair, safer and safer ones.

    An accountant's bound is monotone only up to its slack, so that a rounded number may lie on the wrong side.
    """
    run = from_numbers(_with(numbers, unknown, 1))  # refuses what is wrong with the other numbers
    delta, relation = run.delta, run.relation

    def event_of(value: Any) -> Event:
        return from_numbers(_with(numbers, unknown, value)).event

    match unknown:
        case "noise_multiplier":
            noise = accounting.calibrate_noise_multiplier(target, delta, event_of, relation=relation)
            for attempt in range(_TRIES):
                yield float(accounting.round_up_text(noise * (1 + attempt * 1e-5), _DIGITS))
        case "steps":
            steps = accounting.calibrate_steps(target, delta, event_of, relation=relation)
            yield from range(steps, max(0, steps - _TRIES), -1)
        case "sample_rate":
            rate = accounting.calibrate_sample_rate(target, delta, event_of, relation=relation)
            for attempt in range(_TRIES):
                yield _round_down(rate * (1 - attempt * 1e-5))
        case "batch_size":
            size = _largest_batch(numbers, target)
            yield from range(size, max(0, size - _TRIES), -1)


def _largest_batch(numbers: Numbers, target: float) -> int:
    """The largest batch within ``target``, by bisection; 0 if there is none."""

    def holds(size: int) -> bool:
        return epsilon_of(from_numbers(_with(numbers, "batch_size", size))).upper <= target

    low, high = 0, numbers.num_examples or 1
    if holds(high):
        return high
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (middle, high) if holds(middle) else (low, middle)
    return low


def _round_down(x: float) -> float:
    return float(Context(prec=_DIGITS, rounding=ROUND_FLOOR).plus(Decimal(repr(x))))
