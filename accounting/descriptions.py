"""An atom in words: its noise, how its data were drawn, and what its guarantee takes for granted.

No word of this is part of a guarantee; but who reads an epsilon has to know what it was computed for.
"""

from __future__ import annotations

from collections.abc import Callable

from .events import (
    ApproximateDP,
    BinomialTrials,
    DiscreteGaussian,
    Event,
    Gaussian,
    Laplace,
    MatrixMechanism,
    OnePass,
    Poisson,
    PoissonTrials,
    Select,
    Trials,
    TruncatedNegativeBinomial,
    TruncatedPoisson,
    WithoutReplacement,
)
from .normal_form import Atom, normal_form
from .rounding import round_up_text


def noise(atom: Atom) -> str:
    """The noise multiplier, of continuous Gaussian noise unless another is named."""
    match atom:
        case Gaussian(noise_multiplier=multiplier):
            return f"{multiplier:.6g}"
        case DiscreteGaussian(noise_multiplier=multiplier):
            return f"{multiplier:.6g} (discrete Gaussian)"
        case Laplace(noise_multiplier=multiplier):
            return f"{multiplier:.6g} (Laplace)"
        case ApproximateDP(epsilon=epsilon, delta=delta):
            return f"not stated, ({round_up_text(epsilon)}, {round_up_text(delta)})-private as it is"
        case MatrixMechanism(noise_multiplier=multiplier, sensitivity=sensitivity):
            return f"{multiplier:.6g} (correlated over the steps, sensitivity {sensitivity:.6g})"
        case _:
            return each(atom.event, noise)


def sampling(atom: Atom) -> str:
    """How the data of one step are drawn."""
    match atom:
        case Gaussian() | DiscreteGaussian() | Laplace() | ApproximateDP():
            return "none, all units in every step"
        case Poisson(sample_rate=rate):
            return f"Poisson, rate {rate:.6g}"
        case TruncatedPoisson(sample_rate=rate, cap=cap):
            return f"Poisson, rate {rate:.6g}, larger draws cut to {cap} units and charged as such"
        case WithoutReplacement(batch_size=size, num_examples=number):
            return f"{size} of {number} units without replacement, drawn afresh in every step"
        case OnePass():
            return "one pass over the data in fixed or shuffled batches, no amplification"
        case MatrixMechanism(min_separation=separation, max_participations=most):
            apart = f", at least {separation} steps apart" if most > 1 else ""
            return (
                f"fixed order, each unit in at most {most} {'steps' if most > 1 else 'step'}{apart}, no amplification"
            )
        case Select(event=event, trials=trials):
            return f"{_number(trials)} of runs, of which the best is released; in a run: {each(event, sampling)}"


def caveats(atom: Atom) -> list[str]:
    """What has to be said with every number about ``atom``, one sentence or two each."""
    match atom:
        case ApproximateDP(epsilon=epsilon, delta=delta):
            private = f"({round_up_text(epsilon)}, {round_up_text(delta)})-private"
            return [f"Assumed: one of the releases is {private}, as the plan says; how it was made is not known here."]
        case OnePass():
            return [
                "No amplification: batches are shuffled or fixed, and count as if each unit's place were known.",
                "Assumed: order, borders and number of batches do not depend on the data (nothing is sorted by length, "
                "say), and no unit comes twice in a pass.",
            ]
        case MatrixMechanism():
            return [
                "No amplification: correlated noise was accounted for a fixed order of the units.",
                "Assumed: the number of steps was fixed before the first one, and no unit takes part more often, or at "
                "a smaller distance, than the sampling says.",
            ]
        case WithoutReplacement():
            return ["Assumed: every batch was drawn afresh; batches of a shuffled order are another mechanism."]
        case Select(event=event):
            from .selection import CONDITIONS  # it needs the accountants, which need no words

            inner = [caveat for part, _ in normal_form(event) for caveat in caveats(part)]
            return [*(f"Assumed: {condition}" for condition in CONDITIONS), *inner]
        case Poisson() | TruncatedPoisson():
            return [caveat for part, _ in normal_form(atom.event) for caveat in caveats(part)]
    return []


def each(event: Event, describe: Callable[[Atom], str]) -> str:
    """The atoms of ``event`` in words; the usual one atom of a step without its count."""
    atoms = normal_form(event)
    return " + ".join(describe(atom) + (f" ({count} times)" if count > 1 else "") for atom, count in atoms) or "none"


def _number(trials: Trials) -> str:
    match trials:
        case TruncatedNegativeBinomial(shape=shape, gamma=gamma):
            return f"a truncated negative binomial number (shape {shape:.6g}, gamma {gamma:.6g})"
        case PoissonTrials(mean=mean):
            return f"a Poisson number (mean {mean:.6g})"
        case BinomialTrials(count=count, probability=probability):
            return f"a binomial number ({count} chances of {probability:.6g})"
