"""A training run as numbers on the command line: the one place that makes an event of them.

Guarantee: the event is at least as revealing as every run that the numbers describe. What they leave open is counted
upwards: a pass over the data begins as soon as the whole batches of the last one are used up, and an epoch has as many
steps as batches that a data set can be cut into, the last and smaller one included. Numbers that contradict each other,
are missing or lie outside their domain are refused by the option's name.

Under ``shuffled`` and ``fixed-order`` every example enters at most one batch of a pass, so that a pass is one release
without amplification: no theorem here makes shuffled batches as private as Poisson batches, and they are not
(Chua et al. 2024, "How private are DP-SGD implementations?", https://arxiv.org/abs/2403.17673).
"""

from __future__ import annotations

import functools
import inspect
import math
from collections.abc import Callable
from dataclasses import dataclass, fields
from enum import StrEnum
from fractions import Fraction
from pathlib import Path
from typing import Annotated, Any, get_type_hints

import typer

import accounting
from accounting import Event, Gaussian, Ledger, Relation, descriptions
from accounting.events import OnePass, WithoutReplacement
from accounting.rounding import as_typed
from accounting.values import shown
from dpkit.errors import InvalidArgument

from .statement import ledger_path


class Sampling(StrEnum):
    """How the examples of a batch are chosen."""

    POISSON = "poisson"
    SHUFFLED = "shuffled"
    FIXED_ORDER = "fixed-order"
    WITHOUT_REPLACEMENT = "without-replacement"
    FULL = "full"


_IN_PASSES = (Sampling.SHUFFLED, Sampling.FIXED_ORDER)

RunPath = Annotated[
    Path | None, typer.Argument(help="A run folder or a ledger file; left out, the options describe the run.")
]


@dataclass(frozen=True)
class Numbers:
    """What was typed; None where an option was left out. The annotations are the options."""

    noise_multiplier: Annotated[
        float | None, typer.Option(help="Standard deviation of the noise / L2 sensitivity under the relation.")
    ] = None
    sample_rate: Annotated[
        float | None, typer.Option(help="Share of the data set that a batch is expected to hold; 1 is the full batch.")
    ] = None
    steps: Annotated[int | None, typer.Option(help="Number of optimizer steps.")] = None
    batch_size: Annotated[
        int | None, typer.Option(help="Instead of --sample-rate, with --num-examples: examples in a batch.")
    ] = None
    num_examples: Annotated[int | None, typer.Option(help="Public number of examples of the data set.")] = None
    epochs: Annotated[
        int | None, typer.Option(help="Instead of --steps: passes, each of ceil(examples / batch size) steps.")
    ] = None
    delta: Annotated[float | None, typer.Option(help="Choose it well below 1 / number of examples.")] = None
    sampling: Annotated[
        Sampling | None,
        typer.Option(
            help="How batches are chosen (default: poisson). Shuffled loaders, DataLoader(shuffle=True) among them, "
            "are not poisson."
        ),
    ] = None
    relation: Annotated[
        Relation | None,
        typer.Option(
            help="Which data sets are neighbours (default: add_remove; zero_out for shuffled and fixed-order, "
            "replace_one for without-replacement)."
        ),
    ] = None
    cap: Annotated[
        int | None, typer.Option(help="Largest batch, if larger draws are cut (max_physical_batch_size).")
    ] = None
    max_examples: Annotated[int | None, typer.Option(help="Upper bound of the data set's size; goes with --cap.")] = (
        None
    )

    def given(self) -> list[str]:
        """The options that were typed."""
        return [option(field.name) for field in fields(self) if getattr(self, field.name) is not None]


@dataclass(frozen=True)
class TrainingRun:
    """A run that was fixed before its first step.

    Attributes:
      release: what is done ``count`` times: a step, or a pass over the data.
      steps: optimizer steps in all.
      steps_per_release: 1; of a pass the fewest steps that it can have.
      sampling, noise_multiplier: in words.
      source: "numbers", or the path of the ledger.
      if_poisson: what the same numbers would be with Poisson batches, where batches are shuffled or fixed.
      caveats: what must be read with the guarantee.
      certified: whether nobody can repeat the noise; None where nothing says so, as for bare numbers.
      noise_tier: how the noise is made, see ``dpkit.mechanisms.mechanism``.
    """

    release: Event
    count: int
    steps: int
    delta: float
    relation: Relation
    unit: str
    sampling: str
    noise_multiplier: str
    source: str
    steps_per_release: int = 1
    if_poisson: Event | None = None
    caveats: tuple[str, ...] = ()
    certified: bool | None = None
    noise_tier: str = "default"

    @property
    def event(self) -> Event:
        """The whole run."""
        return accounting.Repeated(event=self.release, count=self.count)

    def releases_by(self, step: int) -> int:
        """How many releases have begun, at most, when ``step`` steps (at least 0) are done."""
        return min(self.count, -(-step // self.steps_per_release))


def option(name: str) -> str:
    """The option of a field of :class:`Numbers`."""
    return "--" + name.replace("_", "-")


def takes_numbers(command: Callable[..., None]) -> Callable[..., None]:
    """``command``, whose parameter ``numbers`` becomes one option for each field of :class:`Numbers`."""
    hints = get_type_hints(Numbers, include_extras=True)
    signature = inspect.signature(command, eval_str=True)
    options = [
        inspect.Parameter(
            field.name, inspect.Parameter.KEYWORD_ONLY, default=field.default, annotation=hints[field.name]
        )
        for field in fields(Numbers)
    ]
    parameters = [
        parameter
        for each in signature.parameters.values()
        for parameter in (options if each.name == "numbers" else [each])
    ]

    @functools.wraps(command)
    def run(*args: Any, **kwargs: Any) -> None:
        numbers = Numbers(**{field.name: kwargs.pop(field.name) for field in fields(Numbers)})
        command(*args, numbers=numbers, **kwargs)

    vars(run)["__signature__"] = signature.replace(parameters=parameters)
    return run


def training_run(path: Path | None, numbers: Numbers) -> TrainingRun:
    """The run that the numbers describe, or the planned run of the ledger at ``path``.

    Raises:
      BadParameter: both were given or neither; a number is missing or contradicts another one.
      InvalidArgument: a number outside its domain.
      LedgerError: the ledger cannot be verified.
    """
    if path is None:
        return from_numbers(numbers)
    refuse_beside_ledger(numbers.given())
    return from_plan(path)


def refuse_beside_ledger(options: list[str]) -> None:
    """Raises BadParameter if there are any: a ledger has its own numbers."""
    if options:
        raise typer.BadParameter(f"{', '.join(options)}: a ledger has its own numbers; give either it or the options.")


def from_plan(path: Path) -> TrainingRun:
    """All planned steps of the only run of a ledger.

    Raises:
      LedgerError: the ledger cannot be verified.
      InvalidArgument: it holds no run, or several.
    """
    with Ledger.open(ledger_path(path), read_only=True) as ledger:
        plans = ledger.plans()
        stated = accounting.statement(ledger)
    if len(plans) != 1:
        raise InvalidArgument(
            f"{path} holds {len(plans)} runs, and this is about one run; give the numbers of one with options "
            "(`dpkit statement` lists them)."
        )
    [(plan, _)], [words] = plans, stated.plans
    return TrainingRun(
        release=plan.event,
        count=-(-plan.steps // plan.steps_per_event),
        steps=plan.steps,
        delta=plan.delta,
        relation=plan.relation,
        unit=plan.unit,
        sampling=words.sampling,
        noise_multiplier=words.noise_multiplier,
        source=str(ledger_path(path)),
        steps_per_release=plan.steps_per_event,
        caveats=stated.caveats,
        certified=said if isinstance(said := plan.facts.get("certified"), bool) else None,
        noise_tier=str(plan.facts.get("noise_tier", "default")),
    )


def from_numbers(numbers: Numbers) -> TrainingRun:
    """The run that the numbers describe; raises as :func:`training_run` does."""
    _refuse_outside_domain(numbers)
    sampling = numbers.sampling or Sampling.POISSON
    rate = _rate(numbers, sampling)
    missing = [option(name) for name in ("noise_multiplier", "delta") if getattr(numbers, name) is None]
    if rate is None:
        missing.append(
            "--batch-size and --num-examples"
            if sampling is Sampling.WITHOUT_REPLACEMENT
            else "--sample-rate (or --batch-size and --num-examples)"
        )
    if numbers.steps is None and numbers.epochs is None:
        missing.append("--steps (or --epochs)")
    if missing or rate is None or numbers.noise_multiplier is None or numbers.delta is None:
        raise typer.BadParameter(f"missing {', '.join(missing)}.")
    _refuse_contradictions(numbers, sampling, rate)

    noise = Gaussian(noise_multiplier=numbers.noise_multiplier)
    steps = numbers.steps if numbers.steps is not None else (numbers.epochs or 0) * math.ceil(1 / rate)
    relation = numbers.relation or _default_relation(sampling)
    release, words = _release(numbers, sampling, rate, noise)
    count, steps_per_release, if_poisson = steps, 1, None
    if sampling in _IN_PASSES:
        # A loader may drop the last, smaller batch, and then begins its next pass earlier.
        steps_per_release = math.floor(1 / rate)
        count = numbers.epochs if numbers.epochs is not None else -(-steps // steps_per_release)
        words = f"{words}, {count} {'pass' if count == 1 else 'passes'} over the data, no amplification by sampling"
        if_poisson = accounting.Repeated(event=accounting.Poisson(sample_rate=float(rate), event=noise), count=steps)
    return TrainingRun(
        release=release,
        count=count,
        steps=steps,
        delta=numbers.delta,
        relation=relation,
        unit="example",
        sampling=words,
        noise_multiplier=f"{numbers.noise_multiplier:g}",
        source="numbers",
        steps_per_release=steps_per_release,
        if_poisson=if_poisson,
        caveats=(*_about_delta(numbers.delta, numbers.num_examples), *_assumed(numbers, release, relation)),
    )


def _release(numbers: Numbers, sampling: Sampling, rate: Fraction, noise: Gaussian) -> tuple[Event, str]:
    """What is repeated, and the sampling in words."""
    match sampling:
        case Sampling.SHUFFLED:
            return OnePass(event=noise), "shuffled batches"
        case Sampling.FIXED_ORDER:
            return OnePass(event=noise), "batches in a fixed order"
        case Sampling.WITHOUT_REPLACEMENT:
            assert numbers.batch_size is not None and numbers.num_examples is not None
            event = WithoutReplacement(batch_size=numbers.batch_size, num_examples=numbers.num_examples, event=noise)
            return event, f"without replacement, {numbers.batch_size} of {numbers.num_examples} drawn anew in each step"
        case _ if numbers.cap is not None and numbers.max_examples is not None:
            event = accounting.TruncatedPoisson(
                sample_rate=float(rate), cap=numbers.cap, max_examples=numbers.max_examples, event=noise
            )
            limits = f"of at most {numbers.max_examples} examples, larger draws cut to {numbers.cap}"
            if numbers.cap > numbers.max_examples:
                limits = f"of at most {numbers.max_examples} examples, of which no draw can exceed {numbers.cap}"
            return event, f"Poisson, rate {float(rate):.6g}, {limits}"
        case _ if rate == 1:
            return noise, "none, all examples in every step"
        case _:
            return accounting.Poisson(sample_rate=float(rate), event=noise), f"Poisson, rate {float(rate):.6g}"


def _default_relation(sampling: Sampling) -> Relation:
    if sampling in _IN_PASSES:
        return Relation.ZERO_OUT
    return Relation.REPLACE_ONE if sampling is Sampling.WITHOUT_REPLACEMENT else Relation.ADD_REMOVE


_DOMAINS: dict[str, tuple[Callable[[Any], bool], str]] = {
    "noise_multiplier": (
        lambda x: 0 < x < math.inf,
        "it must be a finite number above 0; without noise there is no finite epsilon",
    ),
    "sample_rate": (
        lambda x: 0 <= x <= 1,
        "it is a share and must lie in [0, 1]; give --batch-size and --num-examples instead",
    ),
    "steps": (lambda x: 0 <= x < 2**53, "it must be a count from 0 to 2^53; give the steps of a real run"),
    "epochs": (lambda x: 0 <= x < 2**53, "it must be a count from 0 to 2^53; give the epochs of a real run"),
    "batch_size": (lambda x: 1 <= x < 2**53, "a batch must hold at least one example; give the size of a real one"),
    "num_examples": (lambda x: 1 <= x < 2**53, "it must be at least 1; give the public size of the data set"),
    "delta": (lambda x: 0 < x < 1, "it must lie strictly between 0 and 1; choose it well below 1 / number of examples"),
    "cap": (lambda x: 1 <= x < 2**53, "a batch must hold at least one example; leave it out if no draw is cut"),
    "max_examples": (lambda x: 0 <= x < 2**53, "it must not be negative; give an upper bound of the data set's size"),
}


def _refuse_outside_domain(numbers: Numbers) -> None:
    for name, (allowed, rule) in _DOMAINS.items():
        check_option(option(name), getattr(numbers, name), allowed, rule)


def check_option(name: str, value: Any, allowed: Callable[[Any], bool], rule: str) -> None:
    """Raises InvalidArgument if the option was given and ``allowed``, which must refuse a NaN, is false of it."""
    if value is not None and not allowed(value):
        raise InvalidArgument(f"{name} is {shown(value)}: {rule}.")


def _rate(numbers: Numbers, sampling: Sampling) -> Fraction | None:
    """The exact share of the data set that a batch is expected to hold; None if it was not said."""
    size, most = numbers.batch_size, numbers.num_examples
    if size is not None and most is not None:
        if size > most:
            raise InvalidArgument(
                f"--batch-size is {size} and --num-examples is {most}: a batch holds at most the data set; give a "
                "smaller batch."
            )
        return Fraction(size, most)
    if numbers.sample_rate is not None:
        return as_typed(numbers.sample_rate)
    return Fraction(1) if sampling is Sampling.FULL and size is None else None


def _refuse_contradictions(numbers: Numbers, sampling: Sampling, rate: Fraction) -> None:
    for one, other in (("sample_rate", "batch_size"), ("steps", "epochs")):
        if getattr(numbers, one) is not None and getattr(numbers, other) is not None:
            raise typer.BadParameter(f"{option(one)} and {option(other)} say the same thing twice; give one of them.")
    if (numbers.cap is None) != (numbers.max_examples is None):
        raise typer.BadParameter("--cap and --max-examples go together: the cut depends on both.")
    for name in ("num_examples", "batch_size"):
        size = getattr(numbers, name)
        if size is not None and numbers.max_examples is not None and numbers.max_examples < size:
            raise typer.BadParameter(
                f"--max-examples is {numbers.max_examples} and {option(name)} is {size}: it is an upper bound of the "
                "data set's size, not of a batch; give at least that many."
            )
    if numbers.cap is not None and sampling is not Sampling.POISSON:
        raise typer.BadParameter(f"--cap cuts Poisson batches; with --sampling {sampling} no batch is cut.")
    if sampling is Sampling.FULL and rate != 1:
        raise typer.BadParameter(f"--sampling full has the rate 1, not {float(rate):g}; give --sampling poisson.")
    if sampling is Sampling.WITHOUT_REPLACEMENT and numbers.sample_rate is not None:
        raise typer.BadParameter("--sampling without-replacement takes --batch-size and --num-examples, and no rate.")
    if rate == 0 and (numbers.epochs is not None or sampling is not Sampling.POISSON):
        raise typer.BadParameter("--sample-rate is 0: empty batches never pass over the data; give a rate above 0.")


def _assumed(numbers: Numbers, release: Event, relation: Relation) -> list[str]:
    """What the numbers leave open, and has to be true of the run."""
    atoms = [atom for atom, _ in accounting.normal_form(release)]
    found = [caveat for atom in atoms for caveat in descriptions.caveats(atom)]
    if numbers.sampling is None and any(isinstance(atom, accounting.Poisson) for atom in atoms):
        found.append(
            "Assumed: batches are Poisson draws, as --sampling was left out. A loader that shuffles is another "
            "mechanism: --sampling shuffled."
        )
    if relation is Relation.REPLACE_ONE:
        found.append(
            "Assumed: the noise multiplier is relative to the sensitivity of replacing, 2C with clipping norm C. Noise "
            "of standard deviation s has the multiplier s / 2C, half of what most trainers call by that name."
        )
    return found


def _about_delta(delta: float, num_examples: int | None) -> tuple[str, ...]:
    if num_examples is None or delta * num_examples < 1:
        return ()
    return (
        f"WARNING: delta = {accounting.round_up_text(delta)} is not below 1/N = {1 / num_examples:.3g}; publishing one "
        "example at random would satisfy such a delta. Choose delta well below 1/N.",
    )
