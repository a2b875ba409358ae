"""What touched the data, as frozen values: the only language in which plans, ledgers and accountants speak.

An event is a *description*; it promises nothing by itself.  Its meaning never changes once released: a new mechanism
gets a new ``kind``, and an accountant that does not know a kind refuses it.

``noise_multiplier`` always means: standard deviation of the noise / L2 sensitivity of the sum, where the sensitivity
is taken under the neighbouring relation of the plan (one record's clipping norm C for add-or-remove-one and zero-out,
2C for replace-one).  Laplace noise has a scale and an L1 sensitivity instead; ``PureDP`` and ``ApproximateDP`` hold
the epsilon and delta of their mechanism under that relation.

Which events are private under which relation is written in ``normal_form.py``, in one place.
"""

from __future__ import annotations

from enum import StrEnum
from typing import Annotated, Any, Literal

from pydantic import BeforeValidator, Field, PrivateAttr, TypeAdapter, ValidationError, model_validator

from .errors import InvalidParameter, LedgerError, Unsupported
from .values import Count, Delta, PositiveCount, PositiveFloat, Probability, Value, _plain, explain

EVENT_VERSION = 3
"""1: Gaussian, Poisson, TruncatedPoisson, Repeated, Composed. 2: all others but DiscreteGaussian. 3: that as well."""
DEEPEST = 50
"""Most events inside one another: everything that reads an event, JSON parsers too, has a limit of its own."""


_Finite = Annotated[float, BeforeValidator(_plain), Field(lt=1e100, strict=True, allow_inf_nan=False)]


class Relation(StrEnum):
    """Which pairs of data sets must be hard to tell apart."""

    ADD_REMOVE = "add_remove"
    """One record more or less; the public N is typed by the user, the true size stays hidden."""
    REPLACE_ONE = "replace_one"
    """One record replaced by any other; the size is public."""
    ZERO_OUT = "zero_out"
    """One record replaced by a null record that contributes nothing but keeps its slot; the size is public."""


class Gaussian(Value):
    """A sum over all records, released with Gaussian noise of ``noise_multiplier`` times its sensitivity."""

    noise_multiplier: PositiveFloat
    kind: Literal["gaussian"] = "gaussian"


class DiscreteGaussian(Value):
    """A vector of whole numbers, summed over all records and released with discrete Gaussian noise.

    Coordinate i gets an independent integer y with probability proportional to ``exp(-y^2 / 2 s_i^2)``.  One record
    moves the sum by a vector of whole numbers a_i with ``sum (a_i / s_i)^2 <= noise_multiplier^-2``.

    Source: Canonne, Kamath and Steinke 2020, https://arxiv.org/abs/2004.00010.
    """

    noise_multiplier: PositiveFloat
    kind: Literal["discrete_gaussian"] = "discrete_gaussian"


class Laplace(Value):
    """A sum over all records, released with Laplace noise whose scale is ``noise_multiplier`` times its L1 sensitivity.

    Source: Dwork, McSherry, Nissim and Smith 2006, "Calibrating noise to sensitivity in private data analysis".
    """

    noise_multiplier: PositiveFloat
    kind: Literal["laplace"] = "laplace"


class ApproximateDP(Value):
    """Any release that is (``epsilon``, ``delta``)-private, about which nothing else is known."""

    epsilon: Annotated[_Finite, Field(ge=0)]
    delta: Annotated[Probability, Field(lt=1)]
    kind: Literal["approximate_dp"] = "approximate_dp"


class PureDP(Value):
    """Any release that is ``epsilon``-private; the same as ``ApproximateDP(epsilon, 0)``."""

    epsilon: Annotated[_Finite, Field(ge=0)]
    kind: Literal["pure_dp"] = "pure_dp"


class MatrixMechanism(Value):
    """A whole run with correlated noise: rows of ``G + C^-1 Z`` are released, one per step.

    Row t of G is the sum that step t releases, C a fixed lower-triangular matrix and Z independent Gaussian noise.  The
    rows of G may depend on what was released before (Denisov, McMahan, Rush, Smith and Guha Thakurta 2022,
    https://arxiv.org/abs/2202.08312, theorem 2.1), so that all of it is one Gaussian release of ``C G``.

    Attributes:
      noise_multiplier: standard deviation of Z / sensitivity of one participation.
      sensitivity: most that one record changes ``C G``, in sensitivities of one participation, under the pattern
        below; ``accounting.matrix`` computes it.
      min_separation: least number of steps between two participations of one record.
      max_participations: most steps that one record takes part in.
    """

    noise_multiplier: PositiveFloat
    sensitivity: PositiveFloat
    min_separation: PositiveCount = 1
    max_participations: PositiveCount = 1
    kind: Literal["matrix_mechanism"] = "matrix_mechanism"


class TruncatedNegativeBinomial(Value):
    """Number of trials with ``P(K = k) ~ (1 - gamma)^k prod_{l<k} (l + shape)/(l + 1)``, k >= 1.

    Source: Papernot and Steinke 2022, https://arxiv.org/abs/2110.03620, definition 1.

    Attributes:
      shape: eta > -1; 0 is the logarithmic law (where the product begins at l = 1), 1 the geometric one.
      gamma: in (0, 1); the smaller, the more trials.
    """

    shape: Annotated[_Finite, Field(gt=-1)]
    gamma: Delta
    law: Literal["truncated_negative_binomial"] = "truncated_negative_binomial"


class PoissonTrials(Value):
    """A Poisson number of trials, 0 among them: then a fixed symbol is released."""

    mean: PositiveFloat
    law: Literal["poisson"] = "poisson"


class BinomialTrials(Value):
    """``count`` chances of a trial, each taken with ``probability``; if none is, a fixed symbol is released."""

    count: PositiveCount
    probability: Delta
    law: Literal["binomial"] = "binomial"


Trials = Annotated[
    TruncatedNegativeBinomial | PoissonTrials | BinomialTrials,
    Field(discriminator="law"),
]


class _Nested(Value):
    """An event that holds events."""

    _depth: int = PrivateAttr(default=0)

    def model_post_init(self, _: Any, /) -> None:
        inner = self.events if isinstance(self, Composed) else [getattr(self, "event", None)]
        depth = 1 + max((part._depth for part in inner if isinstance(part, _Nested)), default=0)
        if depth > DEEPEST:
            raise ValueError(f"events may lie in one another at most {DEEPEST} deep")
        self._depth = depth  # pyright: ignore[reportAttributeAccessIssue]  # private, and set before anyone sees it


class Poisson(_Nested):
    """``event`` on a fresh subsample that holds each record independently with probability ``sample_rate``."""

    sample_rate: Probability
    event: Event
    kind: Literal["poisson"] = "poisson"


class TruncatedPoisson(_Nested):
    """A Poisson subsample that, if larger than ``cap``, is cut to a uniformly drawn subset of ``cap`` records.

    Attributes:
      cap: most records that a step may use.
      max_examples: public upper bound of the number of records, without the one that neighbours differ in.
    """

    sample_rate: Probability
    cap: PositiveCount
    max_examples: Count
    event: Event
    kind: Literal["truncated_poisson"] = "truncated_poisson"


class WithoutReplacement(_Nested):
    """``event`` on a fresh uniform subset of exactly ``batch_size`` of the ``num_examples`` records (a public number).

    For replace-one only, by advanced joint convexity (Balle, Barthe and Gaboardi 2018,
    https://arxiv.org/abs/1807.01647, theorem 2).
    """

    batch_size: PositiveCount
    num_examples: PositiveCount
    event: Event
    kind: Literal["without_replacement"] = "without_replacement"

    @model_validator(mode="after")
    def _fits(self) -> WithoutReplacement:
        if self.batch_size > self.num_examples:
            raise ValueError(
                f"batch_size {self.batch_size} is above num_examples {self.num_examples}; draw fewer records"
            )
        return self


class OnePass(_Nested):
    """``event`` on each batch of one pass over the data: a record enters at most one of the releases.

    The batches are fixed, or shuffled without looking at the data; their number and sizes are public.  Shuffling is
    given no credit (Chua et al. 2024, https://arxiv.org/abs/2403.17673: it may reveal far more than Poisson sampling).
    k epochs are ``Repeated(OnePass(event), k)``.
    """

    event: Event
    kind: Literal["one_pass"] = "one_pass"


class Select(_Nested):
    """Run ``event`` a random number of times and release the best outcome only.

    ``event`` is a whole training run with the computation of its score; the number of runs is drawn from ``trials``
    before anything is looked at, and is not released.  ``accounting.selection`` states the conditions and the theorems.
    """

    event: Event
    trials: Trials
    kind: Literal["select"] = "select"


class Repeated(_Nested):
    """``event`` run ``count`` times, each with fresh randomness; later runs may depend on earlier outputs."""

    event: Event
    count: Count
    kind: Literal["repeated"] = "repeated"


class Composed(_Nested):
    """All ``events`` one after the other. Inside a sampling event: all of them on the same subsample."""

    events: tuple[Event, ...]
    kind: Literal["composed"] = "composed"


Event = Annotated[
    Gaussian
    | DiscreteGaussian
    | Laplace
    | ApproximateDP
    | PureDP
    | MatrixMechanism
    | Poisson
    | TruncatedPoisson
    | WithoutReplacement
    | OnePass
    | Select
    | Repeated
    | Composed,
    Field(discriminator="kind"),
]

for _recursive in (Poisson, TruncatedPoisson, WithoutReplacement, OnePass, Select, Repeated, Composed):
    _recursive.model_rebuild()


class _Envelope(Value):
    version: PositiveCount
    event: Event


_VERSION = TypeAdapter(dict)


def event_to_json(event: Event) -> str:
    """One line of JSON that :func:`event_from_json` turns into an equal event."""
    return _Envelope(version=EVENT_VERSION, event=event).model_dump_json()


def event_from_json(text: str | bytes) -> Event:
    """The event that :func:`event_to_json` wrote.

    Raises:
      Unsupported: the text was written by a newer version of this package, or holds a kind that is unknown here.
      LedgerError: the text is not an event at all, or its numbers lie outside their domain.
    """
    try:
        version = _VERSION.validate_json(text).get("version")
        if isinstance(version, int) and version > EVENT_VERSION:
            raise Unsupported(
                f"The event has version {version}; this package reads up to {EVENT_VERSION}. Upgrade the package."
            )
        return _Envelope.model_validate_json(text).event
    except ValidationError as error:
        reason = explain(error)
    except InvalidParameter as error:
        reason = str(error)
    if "does not match any of the expected tags" in reason:
        raise Unsupported(f"Unknown kind of event ({reason}) Upgrade the package.")
    raise LedgerError(f"This is not an event: {reason}")
