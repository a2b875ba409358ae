"""Check E: what is reported is no less than the truth, stays the same, and never stands without what it means.

The truths are not the package's: closed forms in forty digits, the inverted transform of the privacy loss, enumeration
of all draws of a small data set, and tests on outputs; they live with the accountant's own tests, which go through
hundreds of settings.  Here the engine and the ledger are asked, at settings where wrong accountants are known to fail.
"""

from __future__ import annotations

import math
import re
import tempfile
from collections.abc import Callable
from pathlib import Path

from brute_force import hockey_stick, truncated_law  # pyright: ignore[reportMissingImports]  # on the path by conftest.py
from inversion import log_delta  # pyright: ignore[reportMissingImports]  # on the path by conftest.py
from lower_bounds import (  # pyright: ignore[reportMissingImports]
    gaussian_delta,
    gaussian_epsilon,
    one_step_delta,
    sum_test,
    threshold_test,
)

import accounting
import dpkit
from accounting import Event, Gaussian, Ledger, PlanRecord, Poisson, Relation, Repeated, TruncatedPoisson

from .checks import Violation
from .crashes import Mortal
from .harness import Setup, run
from .ledger_checks import Run
from .subjects import honest

ADD_REMOVE = Relation.ADD_REMOVE

RUNS = (
    # noise, rate, steps, delta: at the first three the central limit theorem reports 88, 38 and 30 percent of the truth
    (1.0, 0.01, 1000, 1e-5),
    (0.8, 0.001, 2000, 1e-8),
    (0.4, 0.001, 500, 1e-6),
    (2.0, 0.2, 500, 1e-5),
    (50.0, 0.01, 1000, 1e-5),
    (0.5, 0.1, 30, 1e-9),
)


def check_E(folder: Path, *, only: Callable[[str], bool] = lambda part: True) -> dict[str, int]:
    """All parts. Returns for each of them how many numbers were compared."""
    return {name: check(folder) for name, check in PARTS.items() if only(name)}


def _at_least(reported: float, truth: float, what: str, rounding: float = 1e-9) -> None:
    if not reported >= truth * (1 - rounding):
        raise Violation("E", f"epsilon is reported as {reported:.6g}, the truth is at least {truth:.6g}: {what}")


def _check_bracket(folder: Path) -> int:
    """Reported epsilons against lower bounds, or the truth, from elsewhere."""
    compared = 0
    for noise, rate, steps, delta in RUNS:
        event = Repeated(event=Poisson(sample_rate=rate, event=Gaussian(noise_multiplier=noise)), count=steps)
        found, what = accounting.epsilon(event, delta, relation=ADD_REMOVE).upper, f"{event}, delta {delta}"
        _at_least(found, max(sum_test(noise, rate, steps, delta), threshold_test(noise, rate, steps, delta)), what)
        for added in (False, True):
            true = log_delta(noise, rate, steps, found, added=added)
            if true is not None and not true <= math.log(delta) + 1e-7:
                raise Violation("E", f"at the reported epsilon {found:.6g} delta is {math.exp(true):.3g}: {what}")
        compared += 1
    for noise in (0.3, 1.0, 7.0):
        for delta in (1e-5, 1e-10):
            for steps in (1, 30):
                event = Repeated(event=Gaussian(noise_multiplier=noise), count=steps)
                truth = gaussian_epsilon(math.sqrt(steps) / noise, delta)
                found = accounting.epsilon(event, delta, relation=ADD_REMOVE).upper
                _at_least(found, truth, f"{event}, delta {delta}")
                if found > 1.001 * truth + 1e-6:
                    raise Violation("E", f"epsilon is reported as {found:.6g}, and it is {truth:.6g}: {event}")
                compared += 1
            event = Poisson(sample_rate=0.05, event=Gaussian(noise_multiplier=noise))
            found = accounting.epsilon(event, delta, relation=ADD_REMOVE).upper
            if one_step_delta(noise, 0.05, found) > delta * (1 + 1e-9 * max(1.0, found)):
                raise Violation("E", f"the closed form has another delta at the reported epsilon {found:.6g}: {event}")
            compared += 1
    # Five records of which one is all others' opposite, cut at two: all draws, written out.
    crowd, odd, rate, cap, noise = [-1.0] * 4, 1.0, 0.3, 2, 0.8
    event = TruncatedPoisson(sample_rate=rate, cap=cap, max_examples=5, event=Gaussian(noise_multiplier=noise))
    laws = truncated_law([*crowd, odd], rate, cap), truncated_law(crowd, rate, cap)
    for delta in (1e-2, 1e-4):
        found = accounting.epsilon(event, delta, relation=ADD_REMOVE).upper
        true = max(hockey_stick(*pair, noise, found) for pair in (laws, laws[::-1]))
        if true > delta:
            raise Violation("E", f"by enumeration delta is {true:.3g} at the reported epsilon {found:.6g}: {event}")
        compared += 1
    return compared


def _check_engine(folder: Path) -> int:
    """What an engine says of a run, against the same run written down here."""
    setups = (
        Setup(q=1.0, steps=9, public_n=8, sigma=2.0, lr=0.0),
        Setup(form="step", q=0.25, steps=9, public_n=8, sigma=0.9, lr=0.0),
    )
    for setup in setups:
        trace = run(setup, honest(setup.subject, setup.public_n, setup.dtype), folder)
        if trace.error is not None:
            raise Violation("E", f"the run ended early: {trace.message[:200]} ({setup})")
        if setup.q == 1:
            truth = gaussian_epsilon(math.sqrt(setup.steps) / setup.sigma, 1e-5)
            _at_least(trace.epsilon, truth, str(setup))
        for added in (False, True):
            true = log_delta(setup.sigma, setup.q, setup.steps, trace.epsilon, added=added) if setup.q < 1 else None
            if true is not None and not true <= math.log(1e-5) + 1e-7:
                raise Violation("E", f"delta is {math.exp(true):.3g} at the reported {trace.epsilon:.6g} ({setup})")
    return len(setups)


def _plan(event: Event, **changes: object) -> PlanRecord:
    values = {"steps": 10, "delta": 1e-5, "relation": ADD_REMOVE, "unit": "example", "num_examples": 1000}
    return PlanRecord.model_validate({"event": event, **values, **changes})


def _ledger(folder: Path) -> Ledger:
    path = Path(tempfile.mkdtemp(dir=folder)) / "ledger.sqlite"
    return Ledger.create(path, dataset_name="made up", budget=accounting.Budget(100.0, 0.9))


def _check_asked_again(folder: Path) -> int:
    """Asking changes nothing: whoever asks twice is told the same, and so is who asks after a restart."""
    plan = _plan(Poisson(sample_rate=0.1, event=Gaussian(noise_multiplier=1.0)))
    with _ledger(folder) as ledger:
        before = 0.0
        for steps in range(1, 4):
            ledger.charge(plan, plan.event)
            told = [ledger.spent().epsilon for _ in range(3)]
            told += [accounting.statement(ledger).plans[0].steps_charged for _ in range(3)]
            told += [ledger.spent().epsilon, ledger.spent().steps_charged]
            with Ledger.open(ledger.path, read_only=True) as again:
                told += [again.spent().epsilon, again.spent().steps_charged]
            epsilons, counts = [*told[:3], told[6], told[8]], [*told[3:6], told[7], told[9]]
            if len(set(epsilons)) > 1 or set(counts) != {steps}:
                raise Violation("E", f"after {steps} charges, asked again and again, it is {epsilons} and {counts}")
            if epsilons[0] <= before:
                raise Violation("E", f"epsilon is {epsilons[0]} after {steps} charges and was {before} before the last")
            before = epsilons[0]
    return 15


TARGETS = ((0.3, 1.0, 20), (1.0, 1.0, 100), (8.0, 1.0, 3), (2.0, 0.05, 1), (0.7, 0.02, 300), (3.0, 0.004, 2000))


def _check_calibration(folder: Path) -> int:
    """Noise that was found for a target is evaluated again, by something else where there is a closed form."""
    for target, rate, steps in TARGETS:

        def event_of(noise: float, rate: float = rate, steps: int = steps) -> Event:
            return Repeated(event=Poisson(sample_rate=rate, event=Gaussian(noise_multiplier=noise)), count=steps)

        noise = accounting.calibrate_noise_multiplier(target, 1e-5, event_of, relation=ADD_REMOVE)
        what = f"noise multiplier {noise:.6g} was found for epsilon {target}, rate {rate}, {steps} steps"
        if rate == 1 and gaussian_delta(math.sqrt(steps) / noise, target) > 1e-5:
            raise Violation("E", f"{what}, and has more delta than asked for by its closed form")
        if rate < 1 and steps == 1 and one_step_delta(noise, rate, target) > 1e-5:
            raise Violation("E", f"{what}, and has more delta than asked for by its closed form")
        if rate < 1 < steps:
            found = log_delta(noise, rate, steps, target)
            if found is None or found > math.log(1e-5):
                raise Violation("E", f"{what}, and has more delta than asked for by the inverted transform")
        reported = accounting.epsilon(event_of(noise), 1e-5, relation=ADD_REMOVE).upper
        if not 0.98 * target <= reported <= target:
            raise Violation("E", f"{what}, and is reported as {reported:.6g}")
    return len(TARGETS)


def _check_sums(folder: Path) -> int:
    """Two plans of one ledger cost both of them: no event of theirs is counted once."""
    event = Gaussian(noise_multiplier=4.0)
    one = gaussian_epsilon(math.sqrt(10) / 4.0, 1e-5)
    with _ledger(folder) as ledger:
        for number in (1, 2, 3):
            plan = _plan(event)
            for _ in range(10):
                ledger.charge(plan, event)
            spent = ledger.spent()
            # Together they are one Gaussian release at least; at delta 2e-5 or 3e-5 that costs less than their sum.
            least = gaussian_epsilon(math.sqrt(10 * number) / 4.0, spent.delta)
            _at_least(spent.epsilon, least, f"{number} plans of 10 steps with noise multiplier 4")
            if not math.isclose(spent.delta, number * 1e-5) or spent.steps_charged != 10 * number:
                raise Violation("E", f"{number} plans have delta {spent.delta} and {spent.steps_charged} steps")
            # The plans may have been chosen one after the other: what holds for that is their sum.
            _at_least(spent.epsilon, number * one, f"{number} plans, chosen one after the other")
    return 3


MEANING = {
    "epsilon": r"epsilon <= \d",
    "delta": r"delta = 0?\.?\d",
    "unit": r"unit: one (example|user)",
    "relation": r"relation: (add or remove|replace|zero out) one",
    "sampling": r"sampling: \S",
    "accountant": r"accountant: \S",
    "generator": r"noise generator: \S",
    "certificate": r"CERTIFIED: (YES|NO) \(",
}


def _check_statement(folder: Path) -> int:
    """Epsilon is not told without its meaning; and a delta, a seed or a generator that weaken it are named."""
    wrong = []
    for seed, delta, public_n in ((None, 1e-5, 8), (4, 1e-5, 8), (None, 0.3, 8), (4, 1e-5, 5)):
        run_dir = Path(tempfile.mkdtemp(dir=folder))
        mechanism = Mortal(dpkit.Gaussian(1.3), run_dir / "ledger.sqlite")
        run = Run(run_dir, mechanism, seed=seed, public_n=public_n, delta=delta)
        run.step(2)
        statement = run.engine.statement()
        run.stop()
        text = re.sub(r"\s+", " ", str(statement))
        wrong += [f"{name} is not told" for name, pattern in MEANING.items() if not re.search(pattern, text)]
        if statement.delta != delta or f"{delta:g}".replace("e-0", "e-") not in text.replace("e-0", "e-"):
            wrong.append(f"delta is told as {statement.delta}, it is {delta}")
        if (delta * public_n >= 1) != bool(re.search(r"WARNING: delta = \S+ is not below 1/N", text)):
            wrong.append(f"delta = {delta} beside N = {public_n} is told as if it were small")
        if statement.certified != (seed is None) or ("seeded: whoever" in text) != (seed is not None):
            wrong.append(f"a run with the seed {seed} is told to be certified: {statement.certified}")
        if "not cryptographic" not in text:
            wrong.append("the default generator is not told to be no cryptographic one")
        # Under the name of another unit or relation epsilon would be another promise.
        if (statement.unit, statement.relation) != ("example", "add or remove one"):
            wrong.append(f"the unit is told as {statement.unit}, the relation as {statement.relation}")
        if wrong:
            raise Violation("E", f"the statement lies or is silent: {'; '.join(wrong)} (seed {seed}, delta {delta})")
    return 4 * (len(MEANING) + 5)


PARTS: dict[str, Callable[[Path], int]] = {
    "bracket": _check_bracket,
    "engine": _check_engine,
    "asked again": _check_asked_again,
    "calibration": _check_calibration,
    "sums": _check_sums,
    "statement": _check_statement,
}
