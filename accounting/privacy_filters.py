r"""Privacy filters: what may be claimed of releases whose parameters were chosen by looking at earlier releases.

Composition theorems and numerical accountants are about a list of mechanisms that is fixed before the first release.
A controller that sets the next noise multiplier, or a person who plans the next run, after looking at what came out is
no such list.  A filter is asked before every release, and refuses what would lead over a budget that was fixed
beforehand; then the *budget* holds, whatever was chosen.  What was spent on the way is no guarantee: it is a function
of the outputs, and whoever stops or claims less where it looks good has chosen after looking.

**Why it holds** (Feldman and Zrnic 2021, "Individual privacy accounting via a Renyi filter",
https://arxiv.org/abs/2008.11193).  Fix neighbours, an order alpha and a budget b of log-moments.  Let Q be
the law of all outputs y_1, y_2, .. on one of the neighbours, P that on the other, ``L_t = prod_{i <= t} p_i / q_i``
the ratio of their conditional densities, and ``c_t`` the log-moment ``log E_q[(p/q)^alpha]`` of release t, or a bound
of it: a function of y_1 .. y_{t-1}.  Then ``L_t^alpha e^{-(c_1 + .. + c_t)}`` is a supermartingale under Q, for given
the past its next factor is ``E_{q_t}[(p_t/q_t)^alpha] e^{-c_t} <= 1``.  A filter keeps ``c_1 + .. + c_t <= b`` on every
path, so ``E_Q[L^alpha] <= e^b``: all of it together has a Renyi divergence of order alpha of at most b / (alpha - 1).
Any number of releases, chosen in any way from earlier outputs (and from coins that do not depend on the data), from
several runs in turns: the argument only reads them in the order in which they happened.

**Several orders.**  The budget of one order says nothing about another, and an order picked afterwards depends on the
outputs.  So every order that is kept has its own budget, and a release must fit *all* of them.  Each alone gives the
guarantee; more orders only refuse more.  Choose one, for what is likely to come: :func:`best_order`.

**Not a bound:** the numerical (PRV, PLD) accountant, or any f-DP composition, of the noise multipliers that a
controller happened to choose.  It composes trade-off functions that must not depend on outputs, and stopping when the
product of those used so far reaches a target is not a filter: the natural f-DP filter is invalid
(https://arxiv.org/abs/2602.06756).  Where a controller promises a least noise, :class:`WorstCaseSchedule` gives it a
list that *is* fixed, for the numerical accountant.

The filters live in memory. What must survive a crash belongs into a ledger: ``Budget(orders=...)`` is a Renyi filter.
"""

from __future__ import annotations

import math
import threading
from collections.abc import Iterable

import numpy as np

from . import rdp
from .accountant import checked_relation
from .errors import BudgetExceeded, InvalidParameter, Unsupported
from .events import (
    ApproximateDP,
    DiscreteGaussian,
    Event,
    Gaussian,
    Laplace,
    Poisson,
    Relation,
    Repeated,
    TruncatedPoisson,
)
from .normal_form import Atom, atoms_under, normal_form
from .sampled_gaussian import ORDERS, Vector
from .values import PositiveCount, Value, check_delta, check_epsilon, shown

# More than the rounding of a few dozen operations.
_ROUNDING = 1e-12


class RenyiFilter:
    """Admits releases while every order keeps to its own budget, the largest that means (epsilon, delta).

    Guarantee: all that was admitted is (epsilon, delta)-private together, however each event was chosen from the
    outputs before it.
    Requires: :meth:`spend` before each release, and one relation.
    Why: see the module. Thread-safe: :meth:`spend` asks and spends in one step.

    Args:
      epsilon, delta: what holds for everything that is spent here together.
      orders: Renyi orders to keep, of those for which moments are tabulated (``sampled_gaussian.ORDERS``).

    Raises:
      InvalidParameter: epsilon is not positive, delta outside (0, 1), no order, one that is not tabulated, or one that
        cannot give (epsilon, delta) even with nothing spent.
    """

    def __init__(self, epsilon: float, delta: float, orders: Iterable[float]) -> None:
        self._guarantee = _target(epsilon, delta)
        self._places = _places(orders)
        self._budgets = _budgets(*self._guarantee)[self._places]
        if (self._budgets <= 0).any():
            least = ORDERS[_budgets(*self._guarantee) > 0][:1]
            way = f"the least that can is {least[0]:g}" if least.size else "none can; take a larger epsilon or delta"
            raise InvalidParameter(
                f"order {self.orders[int(np.argmin(self._budgets))]:g} cannot give epsilon {epsilon:g} at delta "
                f"{delta:g}, even with nothing spent; {way}."
            )
        self._spent = np.zeros_like(self._budgets)
        self._relation: Relation | None = None
        self._lock = threading.Lock()

    @property
    def orders(self) -> tuple[float, ...]:
        """The orders that are kept, each once, in rising order."""
        return tuple(ORDERS[self._places].tolist())

    @property
    def guarantee(self) -> tuple[float, float]:
        """(epsilon, delta) of all that was and will be admitted: the only claim, however little was spent."""
        return self._guarantee

    @property
    def remaining(self) -> float:
        """The share of its budget, 1 to 0, that the order with the least of it has left. For planning, not a claim."""
        return float(np.min(np.maximum(0.0, 1 - self._spent / self._budgets)))

    def admits(self, event: Event, relation: Relation) -> bool:
        """Whether :meth:`spend` would admit ``event`` now; raises what it would raise, BudgetExceeded excepted."""
        return bool((self._after(event, relation) <= self._budgets).all())

    def spend(self, event: Event, relation: Relation) -> None:
        """Spends ``event``, which may be released once this has returned.

        Raises:
          BudgetExceeded: at least one order would exceed its budget. Nothing was spent.
          Unsupported: no theorem covers the event under this relation, or it has no Renyi divergence of a kept order.
          InvalidParameter: another relation than that of the first event, or no relation.
        """
        with self._lock:
            after = self._after(event, relation)
            if (over := after > self._budgets).any():
                worst = int(np.argmax(np.where(over, after / self._budgets, 0.0)))
                raise BudgetExceeded(
                    f"{shown(event)} would raise what is spent at Renyi order {self.orders[worst]:g} from "
                    f"{_percent(self._spent[worst] / self._budgets[worst])} to "
                    f"{_percent(after[worst] / self._budgets[worst])} of its budget. Nothing was spent: take more "
                    "noise or fewer steps, or stop."
                )
            self._spent, self._relation = after, Relation(relation)

    def _after(self, event: Event, relation: Relation) -> Vector:
        relation = _same(self._relation, relation)
        after = self._spent
        for atom, count in atoms_under(event, relation):
            cost = rdp.step_log_moment(atom, relation)[self._places]
            if not np.isfinite(cost).all():
                lacking = self.orders[int(np.argmin(np.isfinite(cost)))]
                raise Unsupported(
                    f"{atom!r} has no Renyi divergence of order {lacking:g}: no Renyi filter can hold it. Charge it "
                    "to a ledger without orders, whose (epsilon, delta) add up, or release something else."
                )
            after = np.nextafter(after + count * cost * (1 + _ROUNDING), np.inf)
        return after


class ZCDPFilter:
    """Admits unsampled releases while their zCDP adds up to at most the largest rho that means (epsilon, delta).

    Guarantee, Requires: as of :class:`RenyiFilter`.
    Why: a rho-zCDP release has the log-moment ``alpha (alpha - 1) rho`` at *every* order alpha, so that one budget of
    rho is a budget of each order, and all of them hold at once (Whitehouse, Ramdas, Rogers and Wu 2023, "Fully-adaptive
    composition in differential privacy", https://arxiv.org/abs/2203.05481).  Of unsampled Gaussians it therefore admits
    as much as a Renyi filter of the best order, with no order to choose.

    Costs: Gaussian, continuous or discrete, ``1 / (2 noise_multiplier^2)``; an epsilon-private release
    ``epsilon^2 / 2`` (Bun and Steinke 2016, https://arxiv.org/abs/1605.02065, proposition 1.4), Laplace noise with
    ``epsilon = 1 / noise_multiplier``.
    Subsampling gives no useful rho: what is sampled is refused.

    Args:
      epsilon, delta: what holds for everything that is spent here together.
    """

    def __init__(self, epsilon: float, delta: float) -> None:
        self._guarantee = _target(epsilon, delta)
        self._budget = _largest_rho(*self._guarantee)
        self._spent = 0.0
        self._relation: Relation | None = None
        self._lock = threading.Lock()

    @property
    def rho(self) -> float:
        """The budget; everything together is rho-zCDP too."""
        return self._budget

    @property
    def guarantee(self) -> tuple[float, float]:
        """(epsilon, delta) of all that was and will be admitted: the only claim, however little was spent."""
        return self._guarantee

    @property
    def remaining(self) -> float:
        """The share of the budget, 1 to 0, that is left. For planning, not a claim."""
        return max(0.0, 1 - self._spent / self._budget)

    def admits(self, event: Event, relation: Relation) -> bool:
        """Whether :meth:`spend` would admit ``event`` now; raises what it would raise, BudgetExceeded excepted."""
        return self._after(event, relation) <= self._budget

    def spend(self, event: Event, relation: Relation) -> None:
        """Spends ``event``, which may be released once this has returned.

        Raises:
          BudgetExceeded: the budget would be exceeded. Nothing was spent.
          Unsupported: the event is sampled, selected or private with a delta only, or not covered under this relation.
          InvalidParameter: another relation than that of the first event, or no relation.
        """
        with self._lock:
            after = self._after(event, relation)
            if after > self._budget:
                raise BudgetExceeded(
                    f"{shown(event)} would raise what is spent from {_percent(self._spent / self._budget)} to "
                    f"{_percent(after / self._budget)} of rho = {self._budget:g}. Nothing was spent: take more noise "
                    "or fewer steps, or stop."
                )
            self._spent, self._relation = after, Relation(relation)

    def _after(self, event: Event, relation: Relation) -> float:
        after = self._spent
        for atom, count in atoms_under(event, _same(self._relation, relation)):
            after = math.nextafter(after + count * _rho(atom) * (1 + _ROUNDING), math.inf)
        return after


class WorstCaseSchedule(Value):
    """Steps chosen on the way, none of which reveals more than ``step``: accounted as ``steps`` times ``step``.

    Guarantee: :attr:`event` covers any ``steps`` steps that :meth:`check` let pass, chosen in any way from the outputs.
    Requires: :meth:`check` before each step, and at most ``steps`` of them (a ledger counts).
    Why: every step that :meth:`check` lets pass has a pair of output laws that is a post-processing of that of ``step``
    in both directions.  More Gaussian noise is less of it and then some more; more Laplace noise too (what is added has
    the characteristic function ``(1 + b^2 t^2) / (1 + b'^2 t^2)``, a mixture of 0 and Laplace noise).  A Poisson step
    of rate q' < q is that of rate q with its output replaced, with probability ``1 - q'/q``, by a fresh draw of the law
    without the record.  Pairs that are dominated one by one, whatever was released before, are dominated together (Zhu,
    Dong and Wang 2022, https://arxiv.org/abs/2106.08567, theorem 10), so that :attr:`event`, a list fixed beforehand,
    covers the run, and every accountant may be asked about it.

    Attributes:
      step: the most revealing step that may be taken: least noise, highest rate.
      steps: most steps that may be taken; whoever takes them counts them (a ledger does, with ``step`` as its event).
    """

    step: Event
    steps: PositiveCount

    @property
    def event(self) -> Repeated:
        """What the whole run is accounted as."""
        return Repeated(event=self.step, count=self.steps)

    def check(self, step: Event) -> None:
        """Returns if ``step`` reveals at most what the declared step does.

        Raises:
          InvalidParameter: less noise, a higher rate, or another kind of step.
        """
        declared, chosen = normal_form(self.step), normal_form(step)
        covered = not chosen or (
            len(declared) == len(chosen) == 1
            and declared[0][1] >= chosen[0][1]
            and _covers(declared[0][0], chosen[0][0])
        )
        if not covered and declared != chosen:
            raise InvalidParameter(
                f"{step!r} is not covered by the schedule's {self.step!r}: a step must be of the same kind, with at "
                "least that noise and at most that rate. Take more noise, or declare the least noise that may occur."
            )


def best_order(event: Event, epsilon: float, delta: float, *, relation: Relation) -> float:
    """The order at which a filter for (epsilon, delta) admits the most repetitions of ``event``.

    Args:
      event: one step of what is likely to be released; a guess that depends on no output. A bad guess wastes budget.

    Raises:
      InvalidParameter: no order gives (epsilon, delta), epsilon is not positive, or delta outside (0, 1).
      Unsupported: no theorem covers the event under this relation, or it has no finite Renyi divergence.
    """
    budgets, costs = _budgets(*_target(epsilon, delta)), np.zeros_like(ORDERS)
    for atom, count in atoms_under(event, relation):
        costs = costs + count * rdp.step_log_moment(atom, relation)
    if not (budgets > 0).any():
        raise InvalidParameter(
            f"epsilon = {epsilon:g} at delta {delta:g}: no Renyi order gives it, even with nothing spent."
        )
    if not np.isfinite(costs).any():
        raise Unsupported(f"{event!r} has no finite Renyi divergence: no Renyi filter can hold it.")
    return float(ORDERS[np.argmin(np.where(budgets > 0, costs, np.inf) / np.where(budgets > 0, budgets, 1.0))])


def _target(epsilon: float, delta: float) -> tuple[float, float]:
    epsilon, delta = check_epsilon(epsilon), check_delta(delta)
    if epsilon == 0:
        raise InvalidParameter("epsilon = 0: a filter of this budget admits nothing. Give more than 0.")
    return epsilon, delta


def _places(orders: Iterable[float]) -> list[int]:
    """Where ``orders`` stand in ``ORDERS``."""
    places = set()
    for order in orders:
        if not isinstance(order, int | float | np.number) or isinstance(order, bool):
            raise InvalidParameter(f"order {shown(order)}: a Renyi order is a number above 1.")
        nearest = int(np.argmin(np.abs(ORDERS - order)))
        if ORDERS[nearest] != order:
            raise InvalidParameter(
                f"order {order!r}: moments are tabulated for other orders; the nearest is {ORDERS[nearest]:g}."
            )
        places.add(nearest)
    if not places:
        raise InvalidParameter("orders = (): a Renyi filter keeps at least one order, fixed beforehand.")
    return sorted(places)


def _budgets(epsilon: float, delta: float) -> Vector:
    """For every order, the largest log-moment whose conversion at ``delta`` gives ``epsilon``, rounded down."""
    return _log_moment_budget(ORDERS, epsilon, delta)


def _log_moment_budget(order: Vector, epsilon: float, delta: float) -> Vector:
    """b with ``e^{b - (alpha-1) epsilon} (1 - 1/alpha)^alpha / (alpha - 1) = delta``; see ``rdp.py`` for the source."""
    # -log(1 - 1/alpha) is written as log(1 + 1/(alpha-1)), which keeps its digits at both ends of the orders.
    parts = [(order - 1) * epsilon, math.log(delta), np.log(order - 1), order * np.log1p(1 / (order - 1))]
    return np.sum(np.broadcast_arrays(*parts), axis=0) - _ROUNDING * sum(np.abs(part) for part in parts)


def _largest_rho(epsilon: float, delta: float) -> float:
    """The best over a fine grid of orders, each of which is valid: within 1e-4 of the largest rho, and not above it."""
    order = 1 + np.geomspace(1e-8, 1e12, 20_001)
    rho = float(np.max(_log_moment_budget(order, epsilon, delta) / (order * (order - 1)))) * (1 - _ROUNDING)
    if rho <= 0:
        raise InvalidParameter(f"epsilon = {epsilon:g} at delta {delta:g}: too little for any release. Give more.")
    return rho


def _rho(atom: Atom) -> float:
    match atom:
        case (
            Gaussian(noise_multiplier=noise)
            | DiscreteGaussian(noise_multiplier=noise)
            | Laplace(noise_multiplier=noise)
        ):
            return noise**-2 / 2
        case ApproximateDP(epsilon=epsilon, delta=0.0):
            return epsilon * epsilon / 2
    raise Unsupported(
        f"{atom!r} has no zero-concentrated DP that is worth having. Use a RenyiFilter for what is sampled or selected."
    )


def _covers(declared: Atom, chosen: Atom) -> bool:
    """Whether ``chosen`` is a post-processing of ``declared``, as far as :class:`WorstCaseSchedule` explains."""
    match declared, chosen:
        case (Gaussian(), Gaussian()) | (Laplace(), Laplace()):
            return chosen.noise_multiplier >= declared.noise_multiplier
        case Poisson(event=Gaussian() as most), Poisson(event=Gaussian() as inner):
            return chosen.sample_rate <= declared.sample_rate and inner.noise_multiplier >= most.noise_multiplier
        case TruncatedPoisson(event=Gaussian() as most), TruncatedPoisson(event=Gaussian() as inner):
            return (
                chosen.model_copy(update={"event": most}) == declared
                and inner.noise_multiplier >= most.noise_multiplier
            )
    return declared == chosen


def _same(relation: Relation | None, found: Relation) -> Relation:
    """``found`` as a relation, if it is the one of the events before it."""
    found = checked_relation(found)
    if relation not in (None, found):
        raise InvalidParameter(
            f"relation = {found.value}: the events before it were spent under {relation.value}, and the two do not "
            "add up. Keep a second filter and state both."
        )
    return found


def _percent(share: float) -> str:
    return f"{100 * share:.4g} %"
