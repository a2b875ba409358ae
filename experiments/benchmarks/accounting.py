"""``python -m experiments.benchmarks.accounting``: the time of the accountant, beside the libraries that do the same.

What is measured is CPU time (``time.process_time``) in one process with one thread. In every round each contestant of a
job is asked in turn, for a tenth of a second or at least once, and all our caches are emptied before each answer. Times
are medians over the rounds, ratios medians of the ratios within a round, so that what else the machine does hits both
sides. A first answer does not count.

*Slack*: ours is the width of the whole interval, upper bound minus lower bound. PRV accountants have intervals of twice
their ``eps_error``; in the queries they get half of our slack, 0.01 for 0.02, so that the intervals are equally wide.
PLD rounds losses up on a grid and has no lower bound.

Every answer stands beside its time, and how far its upper bound lies above the best lower bound of ours in that job. Of
a calibration it is the noise that was found and, by our bounds, epsilon there.

Start-up is wall time of fresh processes, since that is what a person waits for.
"""

from __future__ import annotations

import os

if __name__ == "__main__":  # Before numpy is loaded: what a second thread burns would be counted too.
    os.environ.update(OMP_NUM_THREADS="1", OPENBLAS_NUM_THREADS="1", MKL_NUM_THREADS="1")

import json
import logging
import statistics
import subprocess
import sys
import time
import warnings
from collections.abc import Callable
from functools import cache, partial
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Annotated, Any, NamedTuple

import numpy as np
import typer
from rich.console import Console
from rich.table import Table

import accounting
from accounting import Composed, Gaussian, Poisson, Relation, Repeated

OURS = "dpkit"
PRV, OPACUS, GOOGLE = THEIRS = ("prv-accountant", "opacus", "dp-accounting")
DELTA = 1e-5
TARGET_EPSILON = 2.0
CURVE_STEPS = 10_000
AT_LEAST = 0.1  # seconds, of each contestant in each round
START_UP, STARTS = "start-up", 5
ROOT = Path(__file__).resolve().parents[2]

Runs = list[tuple[float, float, int]]
"""(noise multiplier, sample rate, steps) of the parts of a training run."""


class Answer(NamedTuple):
    """Bounds of epsilon, ``lower`` None where there is none; ``noise`` is the multiplier that a calibration found."""

    lower: float | None
    upper: float
    noise: float | None = None


class Contestant(NamedTuple):
    """Somebody who can do a job.

    Attributes:
      ask: does it; what comes back is read by ``Job.read``, outside the time.
      against: the contestant to whose time this one's is compared, "" for none.
      target: how many times as long it has to take at least; None where nothing was promised.
      scale: how many times what ``ask`` does is the job; above 1, its time is extrapolated.
      most_ms: what it may take; None where nothing was promised.
    """

    name: str
    library: str
    ask: Callable[[], Any]
    against: str = ""
    target: float | None = None
    scale: float = 1.0
    most_ms: float | None = None


class Job(NamedTuple):
    """One question to several contestants."""

    name: str
    contestants: list[Contestant]
    read: Callable[[Any], Answer] = lambda found: found


class Row(NamedTuple):
    """What came of one contestant; ``excess`` is its upper bound minus the best lower bound of ours, of a query."""

    contestant: str
    milliseconds: float | None = None
    ratio: float | None = None
    target: str = ""
    missed: bool = False
    answer: Answer | None = None
    excess: float | None = None
    note: str = ""


# -- who is asked -----------------------------------------------------------------------------------------------------


def our_event(runs: Runs) -> Composed:
    return Composed(tuple(Repeated(Poisson(rate, Gaussian(noise)), steps) for noise, rate, steps in runs))


def ours(runs: Runs, delta: float, slack: float | None) -> Answer:
    bound = accounting.epsilon(our_event(runs), delta, relation=Relation.ADD_REMOVE, tolerance=slack)
    return Answer(bound.lower, bound.upper)


def their_prv(runs: Runs, delta: float, slack: float):
    """prv-accountant, ready to be asked."""
    from prv_accountant import PRVAccountant
    from prv_accountant.privacy_random_variables import PoissonSubsampledGaussianMechanism

    return PRVAccountant(
        prvs=[PoissonSubsampledGaussianMechanism(rate, noise) for noise, rate, _ in runs],
        max_self_compositions=[steps for _, _, steps in runs],
        eps_error=slack,
        delta_error=delta / 1000,
    )


def prv_accountant(runs: Runs, delta: float, slack: float) -> Answer:
    lower, _, upper = their_prv(runs, delta, slack).compute_epsilon(delta, [steps for _, _, steps in runs])
    return Answer(float(lower), float(upper))


def opacus_prv(runs: Runs, delta: float, slack: float) -> Answer:
    from opacus.accountants import PRVAccountant

    accountant = PRVAccountant()
    accountant.history = list(runs)
    return Answer(None, float(accountant.get_epsilon(delta, eps_error=slack, delta_error=delta / 1000)))


def opacus_rdp(runs: Runs, delta: float) -> Answer:
    from opacus.accountants import RDPAccountant

    accountant = RDPAccountant()
    accountant.history = list(runs)
    return Answer(None, float(accountant.get_epsilon(delta)))


def their_event(runs: Runs):
    """``runs`` as an event of dp-accounting."""
    from dp_accounting.dp_event import ComposedDpEvent, GaussianDpEvent, PoissonSampledDpEvent, SelfComposedDpEvent

    return ComposedDpEvent(
        [SelfComposedDpEvent(PoissonSampledDpEvent(rate, GaussianDpEvent(noise)), steps) for noise, rate, steps in runs]
    )


def dp_accounting_rdp(runs: Runs, delta: float) -> Answer:
    from dp_accounting.rdp import RdpAccountant

    return Answer(None, float(RdpAccountant().compose(their_event(runs)).get_epsilon(delta)))


def dp_accounting_pld(runs: Runs, delta: float, grid: float) -> Answer:
    from dp_accounting.pld import PLDAccountant

    accountant = PLDAccountant(value_discretization_interval=grid)
    return Answer(None, float(accountant.compose(their_event(runs)).get_epsilon(delta)))


# -- what is asked ----------------------------------------------------------------------------------------------------


def one_query(noise: float, rate: float, steps: int, delta: float) -> Job:
    runs = [(noise, rate, steps)]

    def at(slack: float) -> Contestant:
        return Contestant(f"{OURS}, slack {slack:g}", OURS, partial(ours, runs, delta, slack))

    def pld(grid: float) -> partial[Answer]:
        return partial(dp_accounting_pld, runs, delta, grid)

    loose, close, closest = at(2e-2), at(1e-3), at(1e-4)
    return Job(
        f"one query at noise {noise:g}, rate {rate:.4g}, {steps} steps, delta {delta:g}",
        [
            loose,
            Contestant(f"{PRV}, eps_error 0.01", PRV, partial(prv_accountant, runs, delta, 1e-2), loose.name, 50),
            Contestant("opacus PRV, eps_error 0.01", OPACUS, partial(opacus_prv, runs, delta, 1e-2), loose.name, 10),
            Contestant("opacus RDP", OPACUS, partial(opacus_rdp, runs, delta), loose.name),
            Contestant("dp-accounting RDP", GOOGLE, partial(dp_accounting_rdp, runs, delta), loose.name),
            close,
            Contestant("dp-accounting PLD, grid 1e-3", GOOGLE, pld(1e-3), close.name),
            closest,
            Contestant("dp-accounting PLD, grid 1e-4", GOOGLE, pld(1e-4), closest.name, 3),
        ],
    )


def calibration() -> Job:
    """The noise multiplier for epsilon 2 in 5,000 steps."""
    rate, steps = 0.01, 5_000

    def our_search() -> float:
        return accounting.calibrate_noise_multiplier(
            TARGET_EPSILON, DELTA, lambda noise: our_event([(noise, rate, steps)]), relation=Relation.ADD_REMOVE
        )

    def opacus_search(accountant: str) -> float:
        from opacus.accountants.utils import get_noise_multiplier

        return get_noise_multiplier(
            target_epsilon=TARGET_EPSILON, target_delta=DELTA, sample_rate=rate, steps=steps, accountant=accountant
        )

    def prv_search() -> float:
        from prv_accountant.dpsgd import find_noise_multiplier

        return float(find_noise_multiplier(rate, steps, TARGET_EPSILON, DELTA))

    def dp_accounting_search(method: str) -> float:
        from dp_accounting import calibrate_dp_mechanism
        from dp_accounting.pld import PLDAccountant
        from dp_accounting.rdp import RdpAccountant

        fresh = PLDAccountant if method == "PLD" else RdpAccountant
        return float(
            calibrate_dp_mechanism(fresh, lambda noise: their_event([(noise, rate, steps)]), TARGET_EPSILON, DELTA)
        )

    def at_its_noise(noise: float) -> Answer:
        return ours([(noise, rate, steps)], DELTA, 1e-4)._replace(noise=noise)

    return Job(
        f"calibration of noise to epsilon {TARGET_EPSILON:g} at rate {rate:g}, {steps} steps, delta {DELTA:g}",
        [
            Contestant(OURS, OURS, our_search),
            Contestant("opacus PRV", OPACUS, partial(opacus_search, "prv"), OURS, 15),
            Contestant(PRV, PRV, prv_search, OURS),
            Contestant("dp-accounting PLD", GOOGLE, partial(dp_accounting_search, "PLD"), OURS),
            Contestant("opacus RDP", OPACUS, partial(opacus_search, "rdp"), OURS),
            Contestant("dp-accounting RDP", GOOGLE, partial(dp_accounting_search, "RDP"), OURS),
        ],
        at_its_noise,
    )


def curve() -> Job:
    """Epsilon after each step. The libraries answer at a few steps, from which their time is extrapolated."""
    noise, rate = 1.0, 0.01
    places = [CURVE_STEPS // 4, CURVE_STEPS // 2, 3 * CURVE_STEPS // 4, CURVE_STEPS]

    def our_curve() -> Answer:
        event = Poisson(rate, Gaussian(noise))
        last = accounting.epsilon_curve(event, CURVE_STEPS, DELTA, relation=Relation.ADD_REMOVE)[-1]
        return Answer(last.lower, last.upper)

    @cache
    def built():
        return their_prv([(noise, rate, CURVE_STEPS)], DELTA, 1e-2)

    def prv_queries() -> Answer:
        """From one grid, which the first round builds; its time, less than that of two queries, is left out."""
        lower, _, upper = [built().compute_epsilon(DELTA, [steps]) for steps in places][-1]
        return Answer(float(lower), float(upper))

    def few(ask: Callable[[Runs], Answer]) -> Callable[[], Answer]:
        return lambda: [ask([(noise, rate, steps)]) for steps in places][-1]

    more = {"against": OURS, "scale": CURVE_STEPS / len(places)}
    return Job(
        f"epsilon after each of {CURVE_STEPS} steps at noise {noise:g}, rate {rate:g}, delta {DELTA:g}",
        [
            Contestant(OURS, OURS, our_curve),
            Contestant(f"{PRV}, slack 0.01", PRV, prv_queries, target=500, **more),
            Contestant("opacus PRV, slack 0.01", OPACUS, few(partial(opacus_prv, delta=DELTA, slack=1e-2)), **more),
            Contestant(
                "dp-accounting PLD, grid 1e-4", GOOGLE, few(partial(dp_accounting_pld, delta=DELTA, grid=1e-4)), **more
            ),
            Contestant("opacus RDP", OPACUS, few(partial(opacus_rdp, delta=DELTA)), **more),
        ],
    )


def noise_levels() -> Job:
    runs = [(noise, 0.01, 20) for noise in np.linspace(1.0, 2.0, 50).tolist()]
    loose = f"{OURS}, slack 0.01"
    return Job(
        f"50 noise levels from 1 to 2, 20 steps each, rate 0.01, delta {DELTA:g}",
        [
            Contestant(loose, OURS, partial(ours, runs, DELTA, 1e-2), most_ms=300),
            Contestant(f"{PRV}, slack 0.01", PRV, partial(prv_accountant, runs, DELTA, 1e-2), loose),
            Contestant("opacus PRV, slack 0.01", OPACUS, partial(opacus_prv, runs, DELTA, 1e-2), loose),
            Contestant("dp-accounting PLD, grid 1e-4", GOOGLE, partial(dp_accounting_pld, runs, DELTA, 1e-4), loose),
            Contestant("opacus RDP", OPACUS, partial(opacus_rdp, runs, DELTA), loose),
        ],
    )


JOBS = [
    one_query(4, 0.01, 10_000, 1e-5),
    one_query(1.1, 256 / 60_000, 14_040, 1e-5),
    one_query(1, 0.01, 1_000, 1e-6),
    one_query(10, 0.5, 500, 1e-6),
    calibration(),
    curve(),
    noise_levels(),
]


# -- measuring --------------------------------------------------------------------------------------------------------


def measure(job: Job, rounds: int) -> list[Row]:
    """One row per contestant, each asked once in every round and once before."""
    first = {one.name: first_answer(one, job.read) for one in job.contestants}
    answers = {name: answer for name, answer in first.items() if isinstance(answer, Answer)}
    seconds: dict[str, list[float]] = {one.name: [] for one in job.contestants}
    for _ in range(rounds):
        for one in job.contestants:
            if one.name in answers:
                seconds[one.name].append(cpu_seconds(one.ask) * one.scale)
    known = max(answers[one.name].lower or 0.0 for one in job.contestants if one.library == OURS)
    return [row(one, first[one.name], seconds, known) for one in job.contestants]


def first_answer(one: Contestant, read: Callable[[Any], Answer]) -> Answer | str:
    """Before anything is timed; or why there is none."""
    if version_of(one.library) is None:
        return "not installed"
    try:
        return read(one.ask())
    except (ArithmeticError, ImportError, MemoryError, RuntimeError, ValueError) as error:
        if one.library == OURS:
            raise
        return f"no answer: {type(error).__name__}"


def row(one: Contestant, answer: Answer | str, seconds: dict[str, list[float]], known: float) -> Row:
    target = f">= {one.target:g}" if one.target else f"<= {one.most_ms:g} ms" if one.most_ms else ""
    if isinstance(answer, str):
        return Row(one.name, target=target, note=answer)
    milliseconds = 1e3 * statistics.median(seconds[one.name])
    ratios = [theirs / own for theirs, own in zip(seconds[one.name], seconds.get(one.against, []), strict=False)]
    ratio = statistics.median(ratios) if ratios else None
    return Row(
        one.name,
        milliseconds,
        ratio,
        target,
        missed=bool((one.target and ratio and ratio < one.target) or (one.most_ms and milliseconds > one.most_ms)),
        answer=answer,
        excess=answer.upper - known if answer.noise is None else None,
        note="extrapolated" if one.scale > 1 else "",
    )


def cpu_seconds(ask: Callable[[], object]) -> float:
    """Median CPU time of an answer that none of our caches knows, over as many as fit into ``AT_LEAST``, or one."""
    seconds: list[float] = []
    while sum(seconds) < AT_LEAST:
        forget()
        start = time.process_time()
        ask()
        seconds.append(time.process_time() - start)
    return statistics.median(seconds)


def forget() -> None:
    """Empties every cache of our modules. The libraries have none."""
    for name, module in list(sys.modules.items()):
        if name.partition(".")[0] == "accounting":
            for member in vars(module).values():
                if hasattr(member, "cache_clear"):
                    member.cache_clear()


def version_of(library: str) -> str | None:
    """None for one that is not installed."""
    try:
        return version(library)
    except PackageNotFoundError:
        return None


class Start(NamedTuple):
    """A command in a fresh process: median of its wall seconds, what it may take, whether it loaded torch."""

    command: str
    seconds: float
    most: float
    loads_torch: bool


def starts() -> list[Start]:
    numbers = "epsilon --noise-multiplier 1.1 --sample-rate 0.01 --steps 1000 --delta 1e-5"
    return [
        start('python -c "import accounting"', ["-c", "import accounting"], 0.4),
        start(f"dpkit {numbers}", ["-m", "dpkit.cli", *numbers.split()], 1.0),
    ]


def start(command: str, arguments: list[str], most: float) -> Start:
    """``command``, which is the interpreter with ``arguments``."""

    def run(*options: str) -> str:
        return subprocess.run(
            [sys.executable, *options, *arguments], check=True, capture_output=True, text=True, cwd=ROOT
        ).stderr

    seconds = []
    imported = run("-X", "importtime")  # writes a line for each module, and warms the disk cache
    for _ in range(STARTS):
        begin = time.perf_counter()
        run()
        seconds.append(time.perf_counter() - begin)
    modules = {line.rpartition("|")[2].strip() for line in imported.splitlines()}
    return Start(command, statistics.median(seconds), most, "torch" in modules)


# -- the command ------------------------------------------------------------------------------------------------------


def main(
    rounds: Annotated[
        int, typer.Option(min=1, help="How often everybody is asked; all of it takes a minute a round.")
    ] = 5,
    only: Annotated[str, typer.Option(help=f"Only jobs with this in their name; one is '{START_UP}'.")] = "",
    json_file: Annotated[Path | None, typer.Option("--json", help="Write the figures there, too.")] = None,
) -> None:
    """Time of the accountant, and of the libraries that do the same."""
    console = Console(width=140)
    if not any(only in name for name in (*(job.name for job in JOBS), START_UP)):
        raise typer.BadParameter(
            f"no job has {only!r} in its name; there are {[job.name for job in JOBS]} and {START_UP!r}"
        )
    versions = {library: version_of(library) or "not installed" for library in (OURS, *THEIRS)}
    console.print(f"medians of {rounds} rounds; " + ", ".join(f"{name} {number}" for name, number in versions.items()))
    figures: dict[str, Any] = {"rounds": rounds, "versions": versions, "jobs": {}, "starts": []}
    for job in JOBS:
        if only in job.name:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")  # theirs, about orders and grids
                logging.disable(logging.WARNING)  # the same
                rows = measure(job, rounds)
                logging.disable(logging.NOTSET)
            console.print(table_of(job, rows))
            figures["jobs"][job.name] = [as_json(each) for each in rows]
    if only in START_UP:
        found = starts()
        console.print(table_of_starts(found))
        figures["starts"] = [each._asdict() for each in found]
    if json_file is not None:
        json_file.write_text(json.dumps(figures, indent=1) + "\n", encoding="utf-8")


def as_json(row: Row) -> dict[str, Any]:
    return row._asdict() | {"answer": None if row.answer is None else row.answer._asdict()}


def table_of(job: Job, rows: list[Row]) -> Table:
    table = Table(title=job.name, title_justify="left", title_style="bold")
    table.add_column("", width=30)
    for head, width in (("CPU, ms", 14), ("times ours", 10), ("target", 9)):
        table.add_column(head, width=width, justify="right")
    for head, width in (("epsilon", 40), ("above truth", 13)):
        table.add_column(head, width=width)
    for row in rows:
        if row.answer is None:
            table.add_row(row.contestant, "", "", row.target, row.note)
            continue
        about = "~" if row.note else ""
        table.add_row(
            row.contestant,
            f"{about}{row.milliseconds:,.1f}",
            "" if row.ratio is None else f"{about}{row.ratio:,.1f}",
            f"[red]{row.target}[/red]" if row.missed else row.target,
            shown(row.answer),
            "" if row.excess is None else f"<= {row.excess:.1e}",
        )
    return table


def shown(answer: Answer) -> str:
    interval = f"<= {answer.upper:.5f}" if answer.lower is None else f"{answer.lower:.5f} .. {answer.upper:.5f}"
    return interval if answer.noise is None else f"{interval} at noise {answer.noise:.5f}"


def table_of_starts(starts: list[Start]) -> Table:
    table = Table(
        "",
        "wall, ms",
        "target",
        "torch",
        title=f"{START_UP} of a fresh process",
        title_justify="left",
        title_style="bold",
    )
    for each in starts:
        limit = f"<= {1e3 * each.most:.0f} ms"
        table.add_row(each.command, f"{1e3 * each.seconds:.0f}", limit, "loaded" if each.loads_torch else "not loaded")
    return table


if __name__ == "__main__":
    typer.run(main)
