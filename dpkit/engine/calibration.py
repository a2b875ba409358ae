"""The mechanism that a user asked for: given as it is, by its noise multiplier, or by the ε that it has to reach."""

from __future__ import annotations

from collections.abc import Callable

import accounting
from accounting import PlanRecord
from dpkit.errors import InvalidArgument
from dpkit.mechanisms import Gaussian, Mechanism

from .plan import Plan, check_number


def choose_mechanism(
    target_epsilon: float | None,
    noise_multiplier: float | None,
    mechanism: Mechanism | None,
    plan_with: Callable[[Mechanism], Plan],
    resumed: PlanRecord | None,
) -> Mechanism:
    """The mechanism, calibrated (or that of the run that is resumed) when only its outcome was asked for.

    Raises:
      InvalidArgument: not exactly one of the three was given.
      accounting.TargetUnreachable: when no noise reaches ``target_epsilon``.
    """
    for name, number in (("target_epsilon", target_epsilon), ("noise_multiplier", noise_multiplier)):
        if number is not None:
            check_number(name, number)
    given = [value for value in (target_epsilon, noise_multiplier, mechanism) if value is not None]
    if len(given) != 1:
        raise InvalidArgument(
            f"target_epsilon is {target_epsilon}, noise_multiplier is {noise_multiplier} and mechanism is {mechanism}; "
            "give exactly one of them."
        )
    if mechanism is not None:
        return mechanism
    if noise_multiplier is not None:
        return Gaussian(float(noise_multiplier))
    if resumed is not None and resumed.facts.get("target_epsilon") == target_epsilon:
        # Another release of scipy, or another machine, may calibrate to a multiplier that differs in its last digit,
        # and a plan never changes.
        for earlier in _gaussians(resumed):
            if plan_with(earlier).event == resumed.event:
                return earlier
    template = plan_with(Gaussian(1.0))

    def event_of(candidate: float) -> accounting.Event:
        return accounting.Repeated(event=plan_with(Gaussian(candidate)).event, count=template.steps)

    return Gaussian(
        accounting.calibrate_noise_multiplier(
            float(target_epsilon or 0.0), template.delta, event_of, relation=template.relation
        )
    )


def _gaussians(record: PlanRecord) -> list[Gaussian]:
    """The Gaussian mechanisms in the event of one step."""
    atoms = [atom for atom, _ in accounting.normal_form(record.event)]
    inner = [atom if isinstance(atom, accounting.Gaussian) else getattr(atom, "event", None) for atom in atoms]
    return [Gaussian(event.noise_multiplier) for event in inner if isinstance(event, accounting.Gaussian)]
