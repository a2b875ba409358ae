"""The page of ``python -m experiments methods``: tables and plots made from the finished runs, from nothing else.

What is written by hand stands between two markers and is kept when the page is made anew.
"""

from __future__ import annotations

import math
import statistics
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

from scipy import stats

from .methods_runs import TUNING_EPSILON, TUNING_SEED, Result, Results, RunConfig, rates_in

BASELINE = "flat"
BEGIN, END = "<!-- by hand: begin -->", "<!-- by hand: end -->"
_TO_BE_WRITTEN = "(To be written after the run.)"
_COLOURS = ("#1f5fa8", "#8a5a00", "#5b3a8c")
_FEWEST_TO_MARK = 3  # runs: the deviation of two says next to nothing
_MARKERS = ("o", "s", "^")
_LOWEST_BELOW_BASELINE = 0.08  # what is further below stands at the border of the plot, as a number


@dataclass(frozen=True)
class Entry:
    """A method on a data set.

    Attributes:
      what, claim: in a few words; the paper's claim with its source.
      factor: the grid of learning rates is that of the data set times this.
      tuning: the runs that choose the rate.
      rate: chosen; None where a tuning run is missing.
      runs: those that the table is made of.
    """

    method: str
    what: str
    claim: str
    factor: float
    settings: str
    tuning: tuple[RunConfig, ...]
    rate: float | None
    runs: tuple[RunConfig, ...]


@dataclass(frozen=True)
class Section:
    """A data set: its name, how the page calls it, what all methods share, and the methods."""

    name: str
    title: str
    conditions: str
    entries: tuple[Entry, ...]


@dataclass(frozen=True)
class Cell:
    """Test accuracies of one method at one ε, one for each seed."""

    accuracies: tuple[float, ...]

    @property
    def runs(self) -> int:
        return len(self.accuracies)

    @property
    def mean(self) -> float:
        return statistics.fmean(self.accuracies)

    @property
    def deviation(self) -> float:
        """Standard deviation over the seeds, with n - 1; 0 for a single one."""
        return statistics.stdev(self.accuracies) if len(self.accuracies) > 1 else 0.0

    def shown(self) -> str:
        return f"{self.mean:.4f} " + (f"± {self.deviation:.4f}" if self.runs > 1 else "(one run)")

    def difference(self, other: Cell) -> tuple[float, float]:
        """How far the mean is above that of ``other``, and the standard error of that."""
        error = math.hypot(*(each.deviation / math.sqrt(each.runs) for each in (self, other)))
        return self.mean - other.mean, error


def cells(entry: Entry, results: Results) -> dict[float | None, Cell]:
    """ε -> accuracies of the runs that are there; None without privacy."""
    found: dict[float | None, list[float]] = {}
    for config in entry.runs:
        if config in results:
            found.setdefault(config.epsilon, []).append(results[config].test_accuracy)
    return {epsilon: Cell(tuple(values)) for epsilon, values in found.items()}


def write_page(folder: Path, sections: Sequence[Section], results: Results) -> Path:
    """Write ``methods.md`` and one plot for each data set; returns the path of the page."""
    path = folder / "methods.md"
    by_hand = _by_hand(path)
    parts = [_heading(sections, results)]
    for section in sections:
        if any(cells(entry, results) for entry in section.entries):
            plot(section, results, folder / f"methods_{section.name}.png")
            parts.append(_about(section, results))
    parts.append(_claims(sections, results))
    parts.append(f"{BEGIN}\n\n{by_hand}\n\n{END}")
    parts.append(_all_settings(sections, results))
    path.write_text("\n\n".join(parts) + "\n", encoding="utf-8")
    return path


def _by_hand(path: Path) -> str:
    old = path.read_text(encoding="utf-8") if path.exists() else ""
    if BEGIN in old and END in old:
        return old.partition(BEGIN)[2].partition(END)[0].strip()
    return _TO_BE_WRITTEN


def _counted(sections: Iterable[Section], results: Results) -> list[Result]:
    wanted = (config for section in sections for entry in section.entries for config in (*entry.tuning, *entry.runs))
    return [results[config] for config in dict.fromkeys(wanted) if config in results]


def _heading(sections: Sequence[Section], results: Results) -> str:
    used = _counted(sections, results)
    if not used:
        return "# Methods under equal conditions\n\nNo run is there yet."
    dates = sorted({result.date for result in used})
    machines = "; ".join(sorted({f"{result.machine}, torch {result.torch}" for result in used}))
    hours = sum(result.core_seconds for result in used) / 3600
    longest = max(used, key=lambda result: result.core_seconds)
    seeds = len({config.seed for section in sections for entry in section.entries for config in entry.runs})
    comparisons = sum(
        len(cells(entry, results)) for section in sections for entry in section.entries if _compared(entry)
    )
    lines = [
        "# Methods under equal conditions",
        f"`python -m experiments methods`, {' to '.join(dict.fromkeys((dates[0], dates[-1])))}; {machines}; one thread "
        f"a run. {len(used)} runs, {hours:.2f} core-hours; the longest run took {longest.core_seconds:.0f} s "
        f"({longest.config.dataset}, {longest.config.method}). Runs: `methods.jsonl`.",
        f"Test accuracy, mean ± standard deviation of {seeds} runs, which differ in their initial weights, batches and "
        "noise. All methods of a data set share model, batch size, passes, clipping norm C, (ε, δ) and relation "
        "(zero-out); the learning rate is constant, the optimizer plain SGD unless the method is one. ε is what the "
        "ledger says was spent.",
        "**Tuning is not charged.** Each method got its learning rate from the same grid of three rates times a factor "
        f"of its own, by test accuracy, with one seed ({TUNING_SEED}, not among those of the table) at ε = "
        f"{TUNING_EPSILON:g}. Models, batch sizes and factors were chosen by trying on the same public data. On "
        "private data all of that would cost privacy, so the accuracies lean optimistic, for all methods.",
        _about_marks(seeds, comparisons),
    ]
    return "\n\n".join(lines)


def _about_marks(seeds: int, comparisons: int) -> str:
    if seeds < _FEWEST_TO_MARK:
        return f"Nothing is marked as a difference: that takes {_FEWEST_TO_MARK} runs."
    by_chance = 2 * float(stats.t.sf(2, 2 * seeds - 2))
    return (
        f"▲ and ▼ mark what is above or below {BASELINE} by more than two standard errors of the difference. With "
        f"{seeds} seeds that is weak evidence: where there is no difference, a mark appears with probability "
        f"{by_chance:.2f}, so that chance alone marks about {by_chance * comparisons:.0f} of {comparisons} comparisons."
    )


def _compared(entry: Entry) -> bool:
    return entry.method != BASELINE and all(config.epsilon is not None for config in entry.runs)


def _epsilons(section: Section) -> list[float]:
    found = {config.epsilon for entry in section.entries for config in entry.runs}
    return sorted(epsilon for epsilon in found if epsilon is not None)


def _baseline(section: Section, results: Results) -> dict[float | None, Cell]:
    return next((cells(entry, results) for entry in section.entries if entry.method == BASELINE), {})


def _about(section: Section, results: Results) -> str:
    """Both tables of a data set and its plot."""
    epsilons, baseline = _epsilons(section), _baseline(section, results)
    rows, tuning = [], []
    without = ""
    for entry in section.entries:
        found = cells(entry, results)
        if None in found:
            cell = found[None]
            without = f" Without privacy: {cell.shown()} ({entry.method})."
        elif found:
            rows.append([entry.method, *(_shown(found.get(e), baseline.get(e), entry) for e in epsilons)])
        tuning.append([entry.method, f"{entry.factor:g}", *_tuned(entry, results)])
    complete = max(cell.runs for entry in section.entries for cell in cells(entry, results).values())
    partial = [
        f"{entry.method} at ε = {epsilon:g} (runs: {cell.runs})"
        for entry in section.entries
        for epsilon, cell in cells(entry, results).items()
        if epsilon is not None and cell.runs < complete
    ]
    lines = [
        f"## {section.title}",
        f"{section.conditions}{without}" + (f" Not complete: {'; '.join(partial)}." if partial else ""),
        as_table(["method", *(f"ε = {epsilon:g}" for epsilon in epsilons)], rows),
        f"![Test accuracy by method and ε](methods_{section.name}.png)",
        f"Tuning, one run each at ε = {TUNING_EPSILON:g}; rates with their accuracies, the best one in bold. A best "
        "rate at the border of the grid means that a better one may lie outside.",
        as_table(["method", "factor", "low", "middle", "high", "best at the border"], tuning),
    ]
    return "\n\n".join(lines)


def _shown(cell: Cell | None, baseline: Cell | None, entry: Entry) -> str:
    if cell is None:
        return "not run"
    text = cell.shown()
    if baseline is None or entry.method == BASELINE or min(cell.runs, baseline.runs) < _FEWEST_TO_MARK:
        return text
    difference, error = cell.difference(baseline)
    return f"{text} {'▲' if difference > 0 else '▼'}" if abs(difference) > 2 * error else text


def _tuned(entry: Entry, results: Results) -> list[str]:
    rates = rates_in(results, entry.tuning)
    words = []
    for config in entry.tuning:
        rate, accuracy = config.learning_rate, rates.get(config.learning_rate)
        text = "not run" if accuracy is None else f"{rate:g}: {accuracy:.4f}"
        words.append(f"**{text}**" if rate == entry.rate else text)
    tried = [config.learning_rate for config in entry.tuning]
    at_border = {min(tried): "yes, low", max(tried): "yes, high"}
    return [*words, "" if entry.rate is None else at_border.get(entry.rate, "no")]


def _claims(sections: Sequence[Section], results: Results) -> str:
    """What the papers say beside the difference from flat clipping, in percentage points."""
    heads = [f"{section.name}, ε = {epsilon:g}" for section in sections for epsilon in _epsilons(section)]
    claims = {entry.method: entry.claim for section in sections for entry in section.entries if _compared(entry)}
    rows = []
    for method, claim in claims.items():
        row = [method, claim]
        for section in sections:
            baseline = _baseline(section, results)
            found = next((cells(entry, results) for entry in section.entries if entry.method == method), {})
            for epsilon in _epsilons(section):
                if epsilon in found and epsilon in baseline:
                    difference, error = found[epsilon].difference(baseline[epsilon])
                    few = min(found[epsilon].runs, baseline[epsilon].runs) < _FEWEST_TO_MARK
                    row.append(f"{100 * difference:+.1f} " + ("(few runs)" if few else f"± {100 * error:.1f}"))
                else:
                    row.append("not run")
        rows.append(row)
    return "\n\n".join(
        [
            "## What the papers claim, and what was seen",
            f"Differences from {BASELINE} in percentage points, ± one standard error.",
            as_table(["method", "claim", *heads], rows),
        ]
    )


def _all_settings(sections: Sequence[Section], results: Results) -> str:
    """What each method was made of, what its ledgers say, and what it took."""
    rows = []
    for section in sections:
        for entry in section.entries:
            runs = [results[config] for config in (*entry.tuning, *entry.runs) if config in results]
            if not runs:
                continue
            spent: dict[float, float] = {}
            for result in runs:
                if result.config.epsilon is not None and result.epsilon_spent is not None:
                    spent[result.config.epsilon] = max(spent.get(result.config.epsilon, 0.0), result.epsilon_spent)
            rows.append(
                [
                    *(section.name, entry.method, entry.what, f"`{entry.settings}`"),
                    "; ".join(f"{value:.4f}" for _, value in sorted(spent.items())) or "none",
                    *(str(runs[0].steps), f"{statistics.median(result.core_seconds for result in runs):.1f}"),
                ]
            )
    heads = ["data", "method", "what", "settings", "largest ε spent", "steps", "core-seconds a run"]
    return "## Settings\n\n" + as_table(heads, rows)


def as_table(heads: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    lines = [heads, ["---"] * len(heads), *rows]
    return "\n".join(f"| {' | '.join(cell.replace('|', '/') for cell in line)} |" for line in lines)


def plot(section: Section, results: Results, path: Path) -> None:
    """Means with standard deviations, a line for each method and a colour for each ε."""
    import matplotlib as mpl
    from matplotlib.figure import Figure

    shown = [(entry, found) for entry in section.entries if (found := cells(entry, results))]
    private = [(entry.method, found) for entry, found in shown if None not in found]
    baseline, epsilons = _baseline(section, results), _epsilons(section)
    least = min((cell.mean for cell in baseline.values()), default=_LOWEST_BELOW_BASELINE) - _LOWEST_BELOW_BASELINE
    with mpl.rc_context({"font.size": 10, "axes.spines.top": False, "axes.spines.right": False}):
        figure = Figure(figsize=(8, 1.6 + 0.42 * len(private)), layout="constrained")
        axes = figure.add_subplot()
        for number, epsilon in enumerate(epsilons):
            colour, marker = _COLOURS[number % 3], _MARKERS[number % 3]
            points = [(row, found[epsilon]) for row, (_, found) in enumerate(private) if epsilon in found]
            axes.errorbar(
                [cell.mean for _, cell in points],
                [row + 0.22 * (number - (len(epsilons) - 1) / 2) for row, _ in points],
                xerr=[cell.deviation for _, cell in points],
                fmt=marker,
                color=colour,
                markersize=5,
                capsize=2.5,
                linewidth=1.2,
                label=f"ε = {epsilon:g}",
            )
            for row, cell in points:
                if cell.mean < least:  # one method that fails must not press all others together
                    height = row + 0.22 * (number - (len(epsilons) - 1) / 2)
                    axes.text(least, height, f"← {cell.mean:.2f}", color=colour, va="center", fontsize=8)
            if epsilon in baseline:
                axes.axvline(baseline[epsilon].mean, color=colour, linewidth=0.8, linestyle=":")
        for entry, found in shown:
            if None in found:
                axes.axvline(found[None].mean, color="#55616e", linewidth=1.5, label=entry.method)
        axes.set_yticks(range(len(private)), [name for name, _ in private])
        axes.set_ylim(len(private) - 0.5, -0.5)
        axes.set_xlim(left=max(least, axes.get_xlim()[0]))
        axes.grid(axis="y", color="#dfe4ea", linewidth=0.6)
        axes.set_axisbelow(True)
        axes.set_xlabel(f"test accuracy, mean ± standard deviation (dotted: {BASELINE} at each ε)")
        figure.suptitle(section.title, fontsize=11)
        figure.legend(loc="outside lower center", ncols=len(epsilons) + 1, frameon=False)
        figure.savefig(path, dpi=150)
