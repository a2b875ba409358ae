"""What an audit found: a lower bound on epsilon that holds with a stated confidence, and how it stands to a claim.

Guarantee: ``contradicted`` is true if and only if a finite epsilon was claimed and the lower bound is above it. If
every assumption that the verdict lists holds and the claim is true, that happens with probability at most 1 -
``confidence``.

No audit can show that something is private: an attack that was not tried may do better. So the words for people are
"CONTRADICTED" and "no contradiction found", and there is no third.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from decimal import ROUND_FLOOR, Decimal
from typing import NamedTuple

from accounting import round_up_text
from dpkit.errors import InvalidArgument


class LowerBound(NamedTuple):
    """With probability at least ``confidence``, what was audited is not (e, ``delta``)-private for any e < ``epsilon``.

    Attributes:
      method: the estimator, in words.
      details: what it counted, by name.
    """

    epsilon: float
    delta: float
    confidence: float
    method: str
    details: dict[str, float]


@dataclass(frozen=True)
class Verdict:
    """A lower bound beside a claim.

    Attributes:
      epsilon, delta, confidence, method, details: as in :class:`LowerBound`.
      claim: the epsilon that was claimed at this delta; None if there is none.
      claim_source: where the claim comes from, in words.
      exercised: the parts whose work the scores went through, for example the layers that had to clip a canary.
      assumptions: what the confidence rests on.
      contradicted: whether the lower bound is above the claim.
    """

    epsilon: float
    delta: float
    confidence: float
    method: str
    details: dict[str, float]
    claim: float | None
    claim_source: str
    exercised: tuple[str, ...] = ()
    assumptions: tuple[str, ...] = ()
    contradicted: bool = field(init=False)

    def __post_init__(self) -> None:
        if not self.epsilon >= 0:
            raise InvalidArgument(f"epsilon is {self.epsilon!r}: a lower bound is a number and at least 0.")
        if self.claim is not None and not self.claim >= 0:
            raise InvalidArgument(
                f"claim is {self.claim!r}: an epsilon is a number and at least 0; leave out no claim."
            )
        exceeded = self.claim is not None and math.isfinite(self.claim) and self.epsilon > self.claim
        object.__setattr__(self, "contradicted", exceeded)

    def __str__(self) -> str:
        found = (
            f"epsilon >= {rounded_down(self.epsilon)} at delta = {round_up_text(self.delta)} with confidence "
            f"{shown_confidence(self.confidence)}"
        )
        word = "CONTRADICTED" if self.contradicted else "no contradiction found"
        lines = [f"{word}: {found}"]
        if self.claim is None:
            lines.append("  claim       none was given")
        else:
            lines.append(f"  claim       epsilon <= {round_up_text(self.claim)} ({self.claim_source})")
        lines.append(f"  method      {self.method}")
        if self.exercised:
            lines.append(f"  exercised   {', '.join(self.exercised)}")
        lines += [f"  assumed     {assumption}" for assumption in self.assumptions]
        return "\n".join(lines)


def judge(
    bound: LowerBound,
    *,
    claim: float | None,
    claim_source: str,
    exercised: tuple[str, ...] = (),
    assumptions: tuple[str, ...] = (),
) -> Verdict:
    """``bound`` beside ``claim``.

    Raises:
      InvalidArgument: a claim that is negative or no number.
    """
    return Verdict(
        **bound._asdict(), claim=claim, claim_source=claim_source, exercised=exercised, assumptions=assumptions
    )


def rounded_down(epsilon: float) -> str:
    """A lower bound with four decimals, never above it."""
    if not math.isfinite(epsilon):
        return str(epsilon)
    return str(Decimal(repr(float(epsilon))).quantize(Decimal("0.0001"), rounding=ROUND_FLOOR))


def shown_confidence(confidence: float) -> str:
    """A confidence as it was meant: 0.95 in per cent, one very near 1 as its distance."""
    return f"{100 * confidence:g} %" if confidence <= 0.9999 else f"1 - {1 - confidence:.3g}"
