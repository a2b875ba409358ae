"""Bugs of the ledger and of the accountant. Checks K and E must catch them, and V what is not charged at all."""

from __future__ import annotations

import math
from importlib import import_module
from pathlib import Path
from typing import Any

from scipy import optimize, stats

import accounting
import dpkit
from accounting import Ledger, PlanRecord, Receipt, accountant, calibrate, ledger
from accounting.errors import LedgerError
from accounting.records import Budget, Spent
from dpkit.engine import attachment, record
from dpkit.types import Released

from .checks import check_V_beside
from .mutants import Active, Patch, mutant, part

statement = import_module("accounting.statement")  # the package has a function of this name

# ------------------------------------------------------------------------------------------------- crashes and files


@mutant("M21", "K", "puts the ledger back to where the checkpoint was", "a ledger in the checkpoint", part("crashes"))
def _ledger_of_the_checkpoint(patch: Patch, active: Active) -> None:
    save, resume, kept = dpkit.PrivacyEngine.save, dpkit.PrivacyEngine.resume.__func__, dict[str, list[Any]]()

    def files(folder: Any) -> list[Any]:
        return [folder / "ledger.sqlite", folder / "ledger.sqlite.tip"]

    def saved(self: dpkit.PrivacyEngine, **states: Any) -> Any:
        path = save(self, **states)
        kept[path.name] = [file.read_bytes() for file in files(self.run_dir)]
        return path

    def resumed(cls: Any, run_dir: Any, *, checkpoint: str, **rest: Any) -> dpkit.PrivacyEngine:
        active()
        for file, content in zip(files(run_dir), kept[checkpoint], strict=True):
            file.write_bytes(content)
        return resume(cls, run_dir, checkpoint=checkpoint, **rest)

    patch.setattr(dpkit.PrivacyEngine, "save", saved)
    patch.setattr(dpkit.PrivacyEngine, "resume", classmethod(resumed))


@mutant("M23", "K", "charges after the release", "Opacus, accountant step hook", part("crashes"))
def _charge_after_release(patch: Patch, active: Active) -> None:
    shipped = Ledger.charge
    owed: list[tuple[Ledger, Any, Any]] = []

    def charge(self: Ledger, plan: PlanRecord, event: accounting.Event) -> Receipt:
        active()
        owed[:] = [(self, plan, event)]  # what is owed dies with its process
        found = self.find_plan(plan.plan_id)
        return Receipt(sequence=0, plan_id=plan.plan_id, step=1 if found is None else found[1] + 1, digest="")

    release_shipped = attachment.release

    def release(*args: Any, **kwargs: Any) -> Released:
        released = release_shipped(*args, **kwargs)
        while owed:
            shipped(*owed.pop())
        return released

    patch.setattr(Ledger, "charge", charge)
    patch.setattr(attachment, "release", release)


@mutant("B67", "K", "opens a ledger of its own for every run", "two runs on one data set", part("two runs"))
def _a_ledger_for_every_run(patch: Patch, active: Active) -> None:
    shipped = dpkit.PrivacyEngine.__init__

    def initialise(self: dpkit.PrivacyEngine, run_dir: Any, *, ledger: Any = None, **rest: Any) -> None:
        active()
        shipped(self, run_dir, ledger=None, **rest)

    patch.setattr(dpkit.PrivacyEngine, "__init__", initialise)


@mutant(
    "B68", "K", "takes a ledger that cannot be read for an empty one", "an empty list on any exception", part("damage")
)
def _unreadable_is_empty(patch: Patch, active: Active) -> None:
    shipped = Ledger.open.__func__

    def opened(cls: type[Ledger], path: Any, *, dataset_name: str | None = None, **rest: Any) -> Ledger:
        try:
            return shipped(cls, path, dataset_name=dataset_name, **rest)
        except LedgerError:
            active()
            for file in (Path(path), Path(f"{path}.tip")):
                file.unlink(missing_ok=True)
            return Ledger.create(path, dataset_name=dataset_name or "run", budget=Budget(1e3, 1e-2))

    patch.setattr(Ledger, "open", classmethod(opened))


@mutant(
    "B65", "V", "lets one charge pay for two releases", "MostlyAI; arXiv 2602.17454", part("beside"), by=check_V_beside
)
def _one_charge_for_two(patch: Patch, active: Active) -> None:
    shipped = Ledger.charge

    def charge(self: Ledger, plan: PlanRecord, event: accounting.Event) -> Receipt:
        if "beside" not in plan.facts:
            return shipped(self, plan, event)
        active()
        return Receipt(sequence=0, plan_id=plan.plan_id, step=1, digest="")

    patch.setattr(Ledger, "charge", charge)


# ---------------------------------------------------------------------------------------------------- the accountant


def _of_sampled_steps(patch: Patch, active: Active, wrong: Any) -> None:
    """``wrong(noise, rate, steps, delta)`` in place of the numerical accountant, where that covers plain runs."""
    shipped = accountant._ACCOUNTANTS["prv"]

    def epsilon(atoms: Any, delta: float, relation: Any, tolerance: Any) -> tuple[float, float, float]:
        match atoms:
            case [(accounting.Poisson(sample_rate=rate, event=accounting.Gaussian(noise_multiplier=noise)), steps)]:
                active()
                found = wrong(noise, rate, steps, delta)
                return found, found, found
        return shipped.epsilon(atoms, delta, relation, tolerance)

    patch.setitem(accountant._ACCOUNTANTS, "prv", shipped._replace(epsilon=epsilon))


@mutant("M41", "E", "counts with the central limit theorem", "Opacus, issues 384 and 400", part("bracket"))
def _central_limit(patch: Patch, active: Active) -> None:
    def epsilon(noise: float, rate: float, steps: int, delta: float) -> float:
        mu = rate * math.sqrt(steps * math.expm1(min(noise**-2, 50.0)))

        def excess(value: float) -> float:
            upper = stats.norm.cdf(-value / mu + mu / 2)
            return float(upper - math.exp(value) * stats.norm.cdf(-value / mu - mu / 2) - delta)

        return optimize.root_scalar(excess, bracket=(0.0, 500.0)).root if excess(0.0) > 0 else 0.0

    _of_sampled_steps(patch, active, epsilon)


@mutant(
    "M42", "E", "amplifies Renyi divergences beyond where that holds", "q^2 a / sigma^2 at every order", part("bracket")
)
def _amplified_everywhere(patch: Patch, active: Active) -> None:
    def epsilon(noise: float, rate: float, steps: int, delta: float) -> float:
        orders = range(2, 256)
        return min(steps * rate**2 * a / noise**2 + math.log(1 / delta) / (a - 1) for a in orders)

    _of_sampled_steps(patch, active, epsilon)


@mutant("B63", "E", "forgets a charge when it is asked", "Opacus, issue 535", part("asked again"))
def _asking_pops(patch: Patch, active: Active) -> None:
    shipped = Ledger.snapshot

    def snapshot(self: Ledger) -> Any:
        found = shipped(self)
        for plan in self._charged:
            active()
            self._charged[plan] = max(1, self._charged[plan] - 1)
        return found

    patch.setattr(Ledger, "snapshot", snapshot)


@mutant("B64", "E", "finds noise for a little more than the target", "Opacus, issue 346", part("calibration"))
def _loose_calibration(patch: Patch, active: Active) -> None:
    def holds(self: calibrate._Search, x: float) -> bool:
        active()
        return self.upper(x) <= 1.01 * self.target

    def nearest(self: calibrate._Search, x: float, safe: float) -> float:
        while not self.holds(x):
            x *= safe
        return x / safe**2

    patch.setattr(calibrate._Search, "holds", holds)
    patch.setattr(calibrate._Search, "nearest", nearest)


@mutant("B65", "E", "counts two plans of one kind once", "SmartNoise, issue 621", part("sums"))
def _plans_counted_once(patch: Patch, active: Active) -> None:
    shipped = ledger.cost_of

    def cost_of(plans: Any, budget: Budget) -> Spent:
        seen = {plan.event: (plan, charged) for plan, charged in plans}
        active()
        found, whole = shipped(list(seen.values()), budget), shipped(plans, budget)
        return whole._replace(epsilon=found.epsilon, committed_epsilon=found.committed_epsilon)

    patch.setattr(ledger, "cost_of", cost_of)
    patch.setattr(statement, "cost_of", cost_of)


# ------------------------------------------------------------------------------------------------------ the statement


@mutant("B66", "E", "does not say that delta is too large", "delta above 1/N", part("statement"))
def _silent_about_delta(patch: Patch, active: Active) -> None:
    shipped = statement._caveats

    def caveats(plan: PlanRecord, together: list[str]) -> list[str]:
        active()
        return [caveat for caveat in shipped(plan, together) if not caveat.startswith("WARNING")]

    patch.setattr(statement, "_caveats", caveats)


@mutant("B66", "E", "tells epsilon without its delta", "epsilon alone", part("statement"))
def _epsilon_alone(patch: Patch, active: Active) -> None:
    shipped = statement.Statement.__str__

    def text(self: accounting.Statement) -> str:
        active()
        return shipped(self).replace(" at delta = ", " at the usual delta; not ")

    patch.setattr(statement.Statement, "__str__", text)


@mutant("B73", "E", "calls an ordinary generator cryptographic", "jax_privacy, SFC64 as secure", part("statement"))
def _called_cryptographic(patch: Patch, active: Active) -> None:
    shipped = record._of_the_process

    def of_the_process(*args: Any) -> Any:
        active()
        facts = shipped(*args)
        return facts | {"noise_generator": str(facts["noise_generator"]).replace("not cryptographic", "cryptographic")}

    patch.setattr(record, "_of_the_process", of_the_process)
