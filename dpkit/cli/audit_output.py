"""What the audits share: the picture of claim and evidence, and the words for a run that is not certified."""

from __future__ import annotations

import math
import textwrap
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple, Protocol

import numpy as np

import accounting
from accounting import Event, Relation, Unsupported
from accounting.trade_off import tangents

from .epsilon import say
from .pictures import form_of, write_picture

if TYPE_CHECKING:
    from dpkit.audit.verdict import Verdict
    from dpkit.report.audit_plot import Curve

_TITLE_WIDTH = 84
_LEAST_RATE, _KNOTS = 1e-6, 320
_NOT_CERTIFIED = "the noise can be repeated, and removed by who knows the seed: the claim is void, whatever was found"


class Evidence(Protocol):
    """What a picture shows."""

    @property
    def verdict(self) -> Verdict: ...
    @property
    def inside(self) -> np.ndarray: ...
    @property
    def outside(self) -> np.ndarray: ...
    @property
    def event(self) -> Event | None:
        """What is claimed to have touched the data, if that is known."""
        ...


class HasRelation(Protocol):
    @property
    def relation(self) -> Relation: ...


class Scored(NamedTuple):
    """Scores that were read, and what was found."""

    verdict: Verdict
    inside: np.ndarray
    outside: np.ndarray
    event: Event | None


def print_not_certified(certified: bool | None, reason: str = _NOT_CERTIFIED) -> None:
    """A line where a run says that it is not certified; nothing otherwise."""
    if certified is False:
        say(f"  CERTIFIED: NO ({reason})", style="bold red")


def draw_trade_off(path: Path, evidence: Evidence, run: HasRelation | None) -> None:
    """Writes the picture to a file that does not exist yet.

    Curves are those of the event where the bound was found by its noise and the claimed epsilon is its own; else both
    are what an epsilon with its delta allows, as that is what was compared.
    """
    from dpkit.report.audit_plot import ErrorBounds, draw_audit

    verdict, event = evidence.verdict, evidence.event
    details = verdict.details
    claimed = found = None
    if run is not None and event is not None and _is_its_epsilon(verdict, event, run.relation):
        if "noise_scale" in details:
            from dpkit.audit.scaling import scaled

            found = _of_event(scaled(event, details["noise_scale"]), run.relation)
        if found is not None or verdict.epsilon == 0:
            claimed = _of_event(event, run.relation)
    if found is None and verdict.epsilon > 0:
        found = _of_epsilon(verdict.epsilon, verdict.delta)
    if claimed is None and verdict.claim is not None and verdict.claim < math.inf:
        claimed = _of_epsilon(verdict.claim, verdict.delta)
    # The rank test uses more than these two bounds, which then say too little.
    bounded = "false_positive_rate_upper" in details and "chance_under_the_claim" not in details
    first, *rest = str(verdict).splitlines()
    lines = [first, *(line.strip().replace("claim       ", "claim: ") for line in rest if "claim  " in line)]
    picture = draw_audit(
        inside=evidence.inside,
        outside=evidence.outside,
        claimed=claimed,
        found=found,
        bounds=ErrorBounds(details["false_positive_rate_upper"], details["false_negative_rate_upper"])
        if bounded
        else None,
        confidence=verdict.confidence,
        title="\n".join(part for line in lines for part in textwrap.wrap(line, _TITLE_WIDTH)),
        form=form_of(path),
    )
    write_picture(path, picture)


def _is_its_epsilon(verdict: Verdict, event: Event, relation: Relation) -> bool:
    bound = accounting.epsilon(event, verdict.delta, relation=relation)
    return verdict.claim == accounting.round_up(bound.upper)


def _alphas() -> np.ndarray:
    return np.unique(np.concatenate([np.linspace(0, 1, 201), np.geomspace(_LEAST_RATE, 1, 200)]))


def _of_event(event: Event, relation: Relation) -> Curve | None:
    from dpkit.report.audit_plot import Curve

    try:
        return Curve(_alphas(), tangents(event, relation=relation, least=_LEAST_RATE, knots=_KNOTS).at(_alphas()))
    except Unsupported:
        return None


def _of_epsilon(epsilon: float, delta: float) -> Curve:
    from dpkit.report.audit_plot import Curve

    alphas = _alphas()
    # e^epsilon beyond the largest double: no test is bound by it, but for the delta.
    with_record = 1 - delta - math.exp(min(epsilon, 700.0)) * alphas
    return Curve(alphas, np.maximum(0, np.maximum(with_record, math.exp(-epsilon) * (1 - delta - alphas))))
