"""``dpkit plan-noise``: which noise a run should add for a target epsilon, plain DP-SGD's or correlated noise.

Guarantee: every choice was evaluated at the noise multiplier as it is printed, and its epsilon, an upper bound, is not
above the target. The lines of Python that are printed with the recommendation make this very run.

The errors are an estimate by which to choose (``accounting.plan_noise`` says of what), and no forecast of accuracy.
"""

from __future__ import annotations

import math
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.table import Table

import accounting
from accounting import Relation, descriptions
from accounting.plan_noise import Batches, NoiseChoice, NoisePlan, Strategy, most_bands
from accounting.plan_noise import plan_noise as noise_plan
from dpkit.errors import InvalidArgument

from .epsilon import print_caveats, say, shown
from .pictures import form_of, refuse_plot, write_picture
from .terminal import Debug, Json, out, print_json
from .training_run import Numbers, Sampling, TrainingRun, check_option, from_numbers

_HARDLY_BETTER = 0.99
_BATCHES = {
    Batches.POISSON: "Poisson",
    Batches.FIXED_ORDER: "fixed order",
    Batches.CYCLIC_POISSON: "cyclic Poisson",
}
_COMPARED = (
    "The error is that of the running sum of the noise, a root mean square over the steps for each coordinate, in "
    "clipping norms: what noise does to the parameters under a constant learning rate without momentum. It is not "
    "accuracy: what clipping and the choice of batches do is not in it, and the clipping norm is taken to be the same."
)
_RELATIONS = (
    "With Poisson and cyclic Poisson batches the guarantee holds under add_remove too; in a fixed order not, where one "
    "removed example shifts every later batch, but under replace_one, at twice the noise."
)
_GROUPS = (
    "Assumed: an example's group depends on that example alone (a hash, or a draw of its own), never on its index."
)


def plan_noise(
    *,
    target_epsilon: Annotated[float, typer.Option(help="What all steps together may cost.")],
    delta: Annotated[float, typer.Option(help="Choose it well below 1 / number of examples.")],
    num_examples: Annotated[int, typer.Option(help="Public number of examples of the data set.")],
    batch_size: Annotated[int, typer.Option(help="Examples in a batch, expected or fixed.")],
    steps: Annotated[int | None, typer.Option(help="Number of optimizer steps.")] = None,
    epochs: Annotated[
        int | None, typer.Option(help="Instead of --steps: passes, each of ceil(examples / batch size) steps.")
    ] = None,
    relation: Annotated[
        Relation, typer.Option(help="Which data sets are neighbours. Only zero_out covers all choices.")
    ] = Relation.ZERO_OUT,
    bands: Annotated[
        str | None, typer.Option(metavar="P,..", help="Numbers of bands to try; left out, powers of two up to 64.")
    ] = None,
    plot: Annotated[
        Path | None, typer.Option(metavar="FILE.png|svg", help="Draw the errors; needs the extra `report`.")
    ] = None,
    json_output: Json = False,
    debug: Debug = False,
) -> None:
    """Compare plain and correlated noise for a target epsilon, and recommend one."""
    check_option(
        "--target-epsilon", target_epsilon, lambda x: 0 < x < math.inf, "it must be finite and above 0; give one"
    )
    if (steps is None) == (epochs is None):
        raise typer.BadParameter("give exactly one of --steps and --epochs: how long the run is.")
    for name, number in (("--steps", steps), ("--epochs", epochs)):
        check_option(name, number, lambda x: x >= 1, "a run has at least one step; give the length of a real run")
    run = from_numbers(  # refuses what is wrong with these numbers, and says what must be read with them
        Numbers(
            noise_multiplier=1.0,
            batch_size=batch_size,
            num_examples=num_examples,
            steps=steps,
            epochs=epochs,
            delta=delta,
            sampling=Sampling.POISSON,
            relation=relation,
        )
    )
    wanted = _bands(bands, most_bands(num_examples, batch_size, run.steps))
    if plot is not None:
        refuse_plot(plot)
    plan = noise_plan(
        target_epsilon,
        delta,
        num_examples=num_examples,
        batch_size=batch_size,
        steps=run.steps,
        relation=relation,
        bands=wanted,
    )
    size = (batch_size, num_examples)
    caveats = _caveats(plan, run)
    if plot is not None:
        _draw(plot, plan, f"epsilon {target_epsilon:g} at delta = {accounting.round_up_text(delta)}", run)
    if json_output:
        print_json(
            {
                "target_epsilon": target_epsilon,
                "delta": delta,
                "unit": run.unit,
                "relation": relation.value,
                "num_examples": num_examples,
                "batch_size": batch_size,
                "steps": run.steps,
                "recommended": _record(plan, plan.best) | {"python": _python(plan.best, size)},
                "choices": [_record(plan, choice) for choice in plan.choices],
                "left_out": list(plan.left_out),
                "plot": None if plot is None else str(plot),
                "caveats": caveats,
            }
        )
        return
    say(
        f"epsilon <= {target_epsilon:g} at delta = {accounting.round_up_text(delta)} with each, unit one {run.unit}, "
        f"relation {relation}: {run.steps} steps, batches of {batch_size} of {num_examples}",
        style="bold",
    )
    _print(plan)
    for reason in plan.left_out:
        say(f"left out: {reason}")
    out.print()
    _recommend(plan, size, delta, run)
    print_caveats(caveats)
    if plot is not None:
        say(f"wrote {plot}")


def _bands(text: str | None, most: int) -> list[int] | None:
    """The numbers of bands that were asked for."""
    if text is None:
        return None
    try:
        numbers = [int(part) for part in text.split(",")]
    except ValueError:
        numbers = [0]
    if not all(1 <= number <= most for number in numbers):
        raise InvalidArgument(
            f"--bands is {text}: give whole numbers from 1 to {most}, with commas; {most} is the number of steps of a "
            "pass over the data, or of the run if that is shorter."
        )
    return numbers


def _caveats(plan: NoisePlan, run: TrainingRun) -> list[str]:
    """What must be read with the recommendation."""
    best = plan.best
    of_best = [caveat for atom, _ in accounting.normal_form(best.event) for caveat in descriptions.caveats(atom)]
    groups = [_GROUPS] if best.batches is Batches.CYCLIC_POISSON else []
    relations = [_RELATIONS] if plan.relation is Relation.ZERO_OUT else []
    return [_COMPARED, *relations, *of_best, *groups, *run.caveats]


def _record(plan: NoisePlan, choice: NoiseChoice) -> dict[str, Any]:
    return {
        "batches": choice.batches.value,
        "strategy": choice.strategy.value,
        "bands": choice.bands,
        "noise_multiplier": choice.noise_multiplier,
        "sensitivity": choice.sensitivity,
        "error": choice.error,
        "error_relative_to_dp_sgd": plan.ratio(choice),
        "noise_vectors_kept": choice.kept,
        "relation": plan.relation.value,
        "epsilon": accounting.round_up(choice.bound.upper),
        "accountant": choice.bound.accountant,
    }


def _print(plan: NoisePlan) -> None:
    table = Table(box=None, pad_edge=False, header_style="bold")
    names = ("batches", "noise", "multiplier", "sensitivity", "error", "/ DP-SGD", "kept")
    for name in names:
        table.add_column(name, justify="left" if name in names[:2] else "right", no_wrap=True)
    for choice in sorted(plan.choices, key=lambda choice: choice.error):
        ratio = plan.ratio(choice)
        table.add_row(
            _BATCHES[choice.batches],
            _name(choice),
            f"{choice.noise_multiplier:g}",
            f"{choice.sensitivity:.4g}",
            f"{choice.error:.4g}",
            "" if ratio is None else f"{ratio:.3f}",
            str(choice.kept),
            style="bold green" if choice is plan.best else None,
        )
    out.print(table)


def _recommend(plan: NoisePlan, size: tuple[int, int], delta: float, run: TrainingRun) -> None:
    best, ratio = plan.best, plan.ratio(plan.best)
    if best is plan.plain:
        say("recommended: plain DP-SGD; no correlated noise has a smaller error here", style="bold")
    else:
        beside = "" if ratio is None else f", {ratio:.3f} of that of plain DP-SGD"
        say(
            f"recommended: {_name(best)}, {_BATCHES[best.batches]} batches: error {best.error:.4g}{beside}",
            style="bold",
        )
    if ratio is not None and _HARDLY_BETTER < ratio < 1:
        say("  which is hardly less, and plain DP-SGD is simpler")
    say(
        f"  epsilon <= {shown(accounting.round_up(best.bound.upper))} at delta = {accounting.round_up_text(delta)}, "
        f"unit one {run.unit}, relation {plan.relation}, accountant {best.bound.accountant}"
    )
    batch_size, num_examples = size
    say(f"  for a loader with batch_size={batch_size}:")
    say("    engine.make_private(model, optimizer, loader, max_grad_norm=...,")
    say(f'        num_examples={num_examples}, steps={run.steps}, target_delta={delta!r}, relation="{plan.relation}",')
    *lines, last = _python(best, size)
    for line in lines:
        say(f"        {line},")
    say(f"        {last})")


def _name(choice: NoiseChoice) -> str:
    match choice.strategy:
        case Strategy.IDENTITY:
            return "independent" if choice.batches is Batches.FIXED_ORDER else "plain DP-SGD"
        case Strategy.SQUARE_ROOT:
            return "square root"
        case Strategy.BSR | Strategy.BISR | Strategy.BAND_MF:
            return _class(choice)


def _class(choice: NoiseChoice) -> str:
    """The strategy as ``dpkit.mechanisms`` has it."""
    match choice.strategy:
        case Strategy.SQUARE_ROOT:
            return "SquareRoot()"
        case Strategy.IDENTITY | Strategy.BSR:  # one band is independent noise
            return f"BSR({choice.bands})"
        case Strategy.BISR:
            return f"BISR({choice.bands})"
        case Strategy.BAND_MF:
            return f"BandMF({choice.bands})"


def _python(choice: NoiseChoice, size: tuple[int, int]) -> list[str]:
    """The arguments that make this choice."""
    batch_size, num_examples = size
    noise = f"noise_multiplier={choice.noise_multiplier!r}"
    if choice.batches is Batches.POISSON:
        return [f"mechanism=dpkit.Gaussian({noise})"]
    sampler = (
        f"dpkit.FixedOrder(batch_size={batch_size}, num_examples={num_examples})"
        if choice.batches is Batches.FIXED_ORDER
        else f"dpkit.CyclicPoisson(sample_rate={batch_size} / {num_examples}, groups={choice.bands})"
    )
    return [f"mechanism=dpkit.Correlated({noise}, strategy=dpkit.mechanisms.{_class(choice)})", f"sampler={sampler}"]


def _draw(path: Path, plan: NoisePlan, target: str, run: TrainingRun) -> None:
    """Writes the picture to a file that does not exist yet."""
    from dpkit.report.noise_plot import draw_noise_plan

    title = (
        f"{target}; unit: one {run.unit}; relation: {plan.relation}; {run.steps} steps\n"
        f"recommended: {_name(plan.best)}, {_BATCHES[plan.best.batches]} batches"
    )
    picture = draw_noise_plan(plan, title, form_of(path))
    write_picture(path, picture)
