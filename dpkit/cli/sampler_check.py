"""Whether what a plan was charged for is what its own words about sampler and mechanism mean.

The engine writes ``Poisson(sample_rate=0.01)`` and ``Gaussian(noise_multiplier=1.1)`` beside the event that it charges.
Here the event is built again from these words, by the accountant's own functions and without PyTorch.
"""

from __future__ import annotations

import ast
import math
from collections.abc import Callable, Iterator
from typing import Any

import accounting
from accounting import AccountingError, Event, PlanRecord, matrix

_STRATEGIES: dict[str, Callable[..., Any]] = {
    "SquareRoot": matrix.square_root,
    "BSR": matrix.banded_square_root,
    "BISR": lambda steps, bands: matrix.banded_inverse_square_root(steps, bands)[0],
    "BandMF": matrix.band_mf,
}
_NOISE: dict[str, Callable[..., accounting.Gaussian | accounting.DiscreteGaussian]] = {
    "Gaussian": accounting.Gaussian,
    "HardenedGaussian": accounting.Gaussian,
    "DiscreteGaussian": accounting.DiscreteGaussian,
    "Correlated": accounting.Gaussian,
}
Call = tuple[str, dict[str, Any]]


def sampler_problems(plan: PlanRecord) -> Iterator[str]:
    """What the words say and the charge does not; nothing if they agree."""
    said, mechanism = str(plan.facts["sampler"]), str(plan.facts["mechanism"])
    sampler, noise = parsed(said), parsed(mechanism)
    try:
        expected = None if sampler is None or noise is None else _charge(plan, sampler, noise)
    except (ArithmeticError, AttributeError, KeyError, TypeError, ValueError, AccountingError):
        expected = None
    if expected is None:
        yield f"the sampler is {said} and the mechanism {mechanism}, which is no pair that dpkit knows"
        return
    event, steps, batch = expected
    if event != plan.event:
        yield f"the sampler is {said} and the mechanism {mechanism}, and what was charged is {plan.event!r}"
    if steps != plan.steps_per_event:
        yield f"an event covers {steps} steps of {said}, and was charged for {plan.steps_per_event}"
    stated = plan.facts["expected_batch_size"]
    if not (isinstance(stated, int | float) and math.isclose(stated, batch)):
        yield f"the expected batch size is {stated}, and {said} draws {batch:.6g} of N = {plan.num_examples}"


def _charge(plan: PlanRecord, sampler: Call, mechanism: Call) -> tuple[Event, int, float] | None:
    """(event, steps that it covers, expected batch size) of the plan, from its words; None for words unknown here."""
    n, steps = plan.num_examples, plan.steps
    (kind, options), (noise, settings) = sampler, mechanism
    z = float(settings.get("noise_multiplier", math.nan))
    if noise not in _NOISE:
        return None
    gaussian = _NOISE[noise](noise_multiplier=z)
    match kind:
        case "Poisson":
            rate = options["sample_rate"]
            event: Event = accounting.Poisson(sample_rate=rate, event=gaussian)
            return event, 1, rate * n
        case "TruncatedPoisson":
            rate = options["sample_rate"]
            event = accounting.TruncatedPoisson(sample_rate=rate, cap=options["cap"], max_examples=n, event=gaussian)
            return event, 1, rate * n
        case "WithoutReplacement" if options["num_examples"] == n:
            size = options["batch_size"]
            return accounting.WithoutReplacement(batch_size=size, num_examples=n, event=gaussian), 1, size
        case "CyclicPoisson":
            rate, groups = options["sample_rate"], options["groups"]
            event = accounting.Poisson(sample_rate=min(1.0, groups * rate), event=gaussian)
            return event, min(steps, groups), rate * n
        case "FixedOrder" if options["num_examples"] == n:
            size = options["batch_size"]
            apart = -(-n // size)
            if noise != "Correlated":
                return accounting.OnePass(event=gaussian), min(steps, apart), size
            strategy, bands = settings["strategy"]
            return _whole_run(z, _STRATEGIES[strategy](steps, **bands), steps, apart), steps, size
    return None


def _whole_run(noise_multiplier: float, coefficients: Any, steps: int, apart: int) -> Event:
    times = -(-steps // apart)
    sensitivity = matrix.sensitivity(coefficients, steps, min_separation=apart, max_participations=times)
    return matrix.matrix_event(noise_multiplier * sensitivity, coefficients, steps, apart, times)


def parsed(text: str) -> Call | None:
    """``Name(key=1.5, other=Name(...))`` as ("Name", {"key": 1.5, "other": ("Name", {...})}); None if it is not that.

    Nothing is executed: names, numbers and keywords are read from the syntax tree.
    """
    try:
        return _call(ast.parse(text, mode="eval").body)
    except (SyntaxError, ValueError, RecursionError, MemoryError):
        return None


def _call(node: ast.expr) -> Call:
    if not isinstance(node, ast.Call) or not isinstance(node.func, ast.Name) or node.args:
        raise ValueError("no name with keywords")
    return node.func.id, {str(keyword.arg): _value(keyword.value) for keyword in node.keywords}


def _value(node: ast.expr) -> Any:
    return _call(node) if isinstance(node, ast.Call) else ast.literal_eval(node)
