"""The guarantee in sentences, shared by the page and the model card, so that both say the same.

The one number here that is not in the statement is a bound on every test that looks at the released results and guesses
whether one unit was used: if it raises a false alarm with probability a, it finds the unit with probability at most
min(e^ε·a + δ, 1 - e^-ε·(1 - δ - a)) (Kairouz, Oh and Viswanath 2015, "The composition theorem for differential
privacy", section 2).
"""

from __future__ import annotations

import math

from accounting import PlanRecord, Relation, round_up

from .summary import PlanSummary

FALSE_ALARMS = 0.01

NOT_COVERED = (
    (
        "Choices made by looking at the data",
        "A hyperparameter search, the choice of the architecture, cleaning or feature selection on this data count "
        "only if the ledger was charged for them.",
    ),
    (
        "The people and machines that train",
        "Who operates the training sees the data, and who knows the random keys can remove the noise. "
        "They are trusted.",
    ),
    (
        "Timing",
        "How long a step or a run takes, and when it fails, may depend on the data. Who can watch that learns more "
        "than is counted here.",
    ),
    (
        "Data outside the unit",
        "The promise is about one unit as it is named above. A person who appears in several units, or labels and "
        "tables that were kept beside the units, are not protected by it.",
    ),
    (
        "Arithmetic of the hardware",
        "GPUs may add numbers in another order from run to run. What that does to the low-order bits of results is not "
        "accounted for, beyond the rounding that is inside the noise.",
    ),
    (
        "Remaining error of the random draws",
        "Batches and noise come from pseudo-random generators, which are close to the distributions of the theory and "
        "not equal to them; how close depends on the noise tier.",
    ),
    (
        "Test data",
        "Accuracy is measured on held-out data without noise. Those data are not covered, and the numbers about them "
        "were not made private.",
    ),
    (
        "What is true of everybody",
        "A model may still reveal facts that hold for the population, whether or not a given unit was in the data.",
    ),
)


def neighbours(relation: Relation, unit: str) -> str:
    """Which two data sets can hardly be told apart, as the end of a sentence that begins with "if"."""
    match relation:
        case Relation.ADD_REMOVE:
            return f"one {unit} were added to the data or taken out of them"
        case Relation.REPLACE_ONE:
            return f"one {unit} in the data were replaced by any other"
        case Relation.ZERO_OUT:
            return f"one {unit} in the data were replaced by an empty one that contributes nothing"


def size(plan: PlanRecord) -> str:
    """N, and whether it is the size of the data set."""
    if plan.relation == Relation.ADD_REMOVE:
        return f"N = {plan.num_examples}, a public number; the true size stays hidden"
    return f"N = {plan.num_examples}, which is the size of the data set and public"


def how_sampled(plans: tuple[PlanSummary, ...]) -> str:
    """The sampling of all plans, each way once."""
    return "; ".join(dict.fromkeys(plan.stated.sampling for plan in plans))


def most_found(epsilon: float, delta: float, false_alarms: float = FALSE_ALARMS) -> float:
    """Largest share of used units that a test with this rate of false alarms can find, rounded up to 0.001."""
    grown = math.inf if epsilon > 700 else math.exp(epsilon) * false_alarms + delta
    return min(1.0, round_up(min(grown, 1 - math.exp(-epsilon) * max(0.0, 1 - delta - false_alarms)), 3))


def percent(share: float) -> str:
    """A share as text, without digits that say nothing: 0.201 is "20.1 %"."""
    return f"{100 * share:.1f}".removesuffix(".0") + " %"
