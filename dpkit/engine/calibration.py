"""The mechanism that a user asked for: given as it is, by its noise multiplier, or by the ε that it has to reach."""

from __future__ import annotations

from collections.abc import Callable
from typing import cast

import accounting
from accounting import PlanRecord
from dpkit.errors import InvalidArgument
from dpkit.mechanisms import Gaussian, Mechanism

from .plan import Plan, check_number


def choose_mechanism(
    target_epsilon: float | None,
    noise_multiplier: float | None,
    mechanism: Mechanism | Callable[[float], Mechanism] | None,
    plan_with: Callable[[Mechanism], Plan],
    resumed: PlanRecord | None,
) -> Mechanism:
    """The mechanism, calibrated (or that of the run that is resumed) when only its outcome was asked for.

    Args:
      mechanism: as it is; or a function of the noise multiplier that makes one, together with ``target_epsilon``.
    Raises:
      InvalidArgument: not exactly one of the three was given, or a function without a target.
      accounting.TargetUnreachable: when no noise reaches ``target_epsilon``.
    """
    for name, number in (("target_epsilon", target_epsilon), ("noise_multiplier", noise_multiplier)):
        if number is not None:
            check_number(name, number)
    made = callable(mechanism)
    make = cast(Callable[[float], Mechanism], mechanism) if made else Gaussian
    given = [value for value in (target_epsilon, noise_multiplier, None if made else mechanism) if value is not None]
    if len(given) != 1 or (made and target_epsilon is None):
        raise InvalidArgument(
            f"target_epsilon is {target_epsilon}, noise_multiplier is {noise_multiplier} and mechanism is {mechanism}; "
            "give exactly one of them (a function that makes a mechanism of a noise multiplier goes with "
            "target_epsilon)."
        )
    if mechanism is not None and not made:
        return cast(Mechanism, mechanism)
    if noise_multiplier is not None:
        return Gaussian(float(noise_multiplier))
    if resumed is not None and resumed.facts.get("target_epsilon") == target_epsilon:
        # Another release of scipy, or another machine, may calibrate to a multiplier that differs in its last digit,
        # and a plan never changes.
        for multiplier in _multipliers(resumed):
            if plan_with(earlier := make(multiplier)).event == resumed.event:
                return earlier
    template = plan_with(make(1.0))

    def event_of(candidate: float) -> accounting.Event:
        return plan_with(make(candidate)).event_of(template.steps)

    return make(
        accounting.calibrate_noise_multiplier(
            float(target_epsilon or 0.0), template.delta, event_of, relation=template.relation
        )
    )


def _multipliers(record: PlanRecord) -> list[float]:
    """The noise multipliers of the Gaussian releases, continuous or discrete, in the plan's event."""
    atoms = [atom for atom, _ in accounting.normal_form(record.event)]
    events = [*atoms, *(getattr(atom, "event", None) for atom in atoms)]
    noise = (accounting.Gaussian, accounting.DiscreteGaussian)
    return [event.noise_multiplier for event in events if isinstance(event, noise)]
