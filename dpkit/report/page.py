"""``RUN/report.html``: the report as one self-contained page, written together with ``RUN/PRIVACY.md``.

Guarantees:
  * No script, no reference to another file or server; a Content-Security-Policy in the page forbids both.
  * Every text of the run is escaped; the ledger's anchor stands in each file exactly once.
  * Everything is read and rendered before the first file is written, and each file is the old or the new one.
  * The shareable page is rendered from a :class:`RunSummary` alone, which holds nothing that is not private.

Not promised: that the two files are of one another's moment after a crash between them; their anchors tell.
"""

from __future__ import annotations

import html
import importlib.util
import json
import math
import re
from collections.abc import Callable, Sequence
from dataclasses import replace
from importlib import resources
from pathlib import Path
from typing import Any, NamedTuple

import dpkit
from accounting import Ledger, round_up_text
from accounting.statement import NEVER_COVERED
from dpkit.errors import Refused
from dpkit.run_folder import RunFolder

from . import model_card, plain_words, plots
from .records import NonPrivateRecord, read_nonprivate
from .safe_text import in_html
from .summary import RunSummary, of_ledger, read

Names = tuple[str, ...]
PAGE: Names = ("report.html",)
MODEL_CARD: Names = ("PRIVACY.md",)
NONPRIVATE_PAGE: Names = ("nonprivate", "report.html")


class Written(NamedTuple):
    """Where the files of a report lie, and which state of the ledger they show."""

    report: Path
    privacy: Path
    nonprivate_report: Path | None
    certified: bool
    anchor_sequence: int
    anchor_digest: str


class Appendix(NamedTuple):
    """NOT PRIVATE: what ``nonprivate/report.html`` has besides the page that may be shared."""

    records: list[NonPrivateRecord]
    torn: bool


def write_report(run: RunFolder, *, with_nonprivate: bool = False) -> Written:
    """Write ``report.html`` and ``PRIVACY.md`` into the run folder as its ledger stands now.

    Args:
      with_nonprivate: also write ``nonprivate/report.html``, the same page with what is not private.
    Raises:
      Refused: the extra ``report`` is not installed.
      RunFolderError: there is no such folder, the run was trained without privacy, a file of it is damaged, or a file
        cannot be written.
      LedgerError: the ledger is missing or cannot be trusted.
    """
    _require_extra()
    summary = read(run)
    texts = {
        PAGE: page_html(summary),
        MODEL_CARD: model_card.render(summary.statement, summary.plans),
    }
    if with_nonprivate:
        texts[NONPRIVATE_PAGE] = page_html(summary, Appendix(*read_nonprivate(run)))
    for names in texts:
        run.entry(*names)  # refuses symbolic links before anything is written
    paths = {names: run.write(*names, data=text) for names, text in texts.items()}
    return Written(
        report=paths[PAGE],
        privacy=paths[MODEL_CARD],
        nonprivate_report=paths.get(NONPRIVATE_PAGE),
        certified=summary.statement.certified,
        anchor_sequence=summary.statement.anchor_sequence,
        anchor_digest=summary.statement.anchor_digest,
    )


def stale(run: RunFolder, ledger: Ledger) -> dict[Names, bool | None]:
    """Which of the report's files say something else than ``ledger`` and the run's files give now.

    Plots are not compared: another release of matplotlib draws other lines. None: it cannot be told without the extra.

    Raises:
      RunFolderError: a file of the run is damaged or cannot be read.
    """
    said = of_ledger(ledger)
    found: dict[Names, bool | None] = {}
    for names in (MODEL_CARD, PAGE):
        if not run.exists(*names):
            continue
        there = run.read(*names).decode("utf-8", errors="replace")
        if names == MODEL_CARD:
            found[names] = there != model_card.render(*said)
        elif importlib.util.find_spec("jinja2") is None:
            found[names] = None
        else:
            title = re.search(r"Run <code>([^<]*)</code>", there)  # the folder may have another name by now
            summary = replace(read(run, said), name=html.unescape(title[1]) if title else run.path.name)
            # A line of the metrics that was cut off since changes no number of the page.
            now = [page_html(replace(summary, metrics_torn=torn), drawn=False) for torn in (False, True)]
            found[names] = _without_plots(there) not in map(_without_plots, now)
    return found


def page_html(summary: RunSummary, appendix: Appendix | None = None, *, drawn: bool = True) -> str:
    """The page for ``summary``; with an ``appendix`` it is not private and says so in red.

    Args:
      drawn: False leaves the plots empty, which takes no matplotlib.
    """
    import jinja2
    from markupsafe import Markup

    environment = jinja2.Environment(
        autoescape=True,
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
        # Beyond escaping: nothing invisible, and nothing that reads like a second anchor.
        finalize=lambda value: value if isinstance(value, Markup) else Markup(in_html(str(value))),
    )
    environment.filters |= {
        "delta": round_up_text,
        "epsilon": lambda value: f"{value:.4f}",
        "percent": plain_words.percent,
        "short": lambda value: f"{value:.6g}",
    }

    def plot(draw: Callable[[], str]) -> Markup:
        return Markup(draw() if drawn else "<svg></svg>")

    template = resources.files("dpkit.report").joinpath("page.html").read_text(encoding="utf-8")
    stated = summary.statement
    groups = plots.evaluations(summary)
    rates = plots.learning_rates(summary)
    values: dict[str, Any] = {
        "s": stated,
        "run": summary,
        "plans": summary.plans,
        "words": plain_words,
        "found": plain_words.most_found(stated.committed_epsilon, stated.delta) if stated.plans else None,
        "caveats": [caveat for caveat in stated.caveats if not caveat.startswith("Not covered: ")],
        "not_covered": [
            _capital(caveat.removeprefix("Not covered: "))
            for caveat in stated.caveats
            # Of those that every statement has, plain_words says the same in more words.
            if caveat.startswith("Not covered: ") and caveat not in NEVER_COVERED
        ],
        "epsilon_plot": plot(lambda: plots.epsilon_curve(summary)) if stated.plans else None,
        "budget_is_shown": bool(stated.plans) and plots.budget_is_shown(summary),
        "accuracy_plot": plot(lambda: plots.accuracy_curve(groups)) if groups else None,
        "evaluations": groups,
        "last_metrics": _last_metrics(summary),
        "rate_plot": plot(lambda: plots.learning_rate_curve(rates)) if len(rates) > 1 else None,
        "rates": rates,
        "version": dpkit.__version__,
        "json": json.dumps(stated.model_dump(mode="json"), indent=2, ensure_ascii=False),
        "appendix": appendix,
        "nonprivate_plots": [] if appendix is None else [Markup(plot) for plot in _nonprivate_plots(appendix.records)],
    }
    return environment.from_string(template).render(values)


def _without_plots(page: str) -> str:
    return re.sub(r"<svg.*?</svg>", "", page, flags=re.DOTALL)


def _require_extra() -> None:
    missing = [name for name in ("jinja2", "matplotlib") if importlib.util.find_spec(name) is None]
    if missing:
        raise Refused(
            f"the report is made with {' and '.join(missing)}, which is not installed: pip install 'dpkit[report]'. "
            "`dpkit statement` shows what may be claimed without it."
        )


def _capital(text: str) -> str:
    return text[:1].upper() + text[1:]


def _last_metrics(summary: RunSummary) -> dict[str, float]:
    """The last value of every released metric."""
    found: dict[str, float] = {}
    for record in summary.metrics:
        found |= record.metrics
    return found


def _nonprivate_plots(records: Sequence[NonPrivateRecord]) -> list[str]:
    def values(name: str) -> list[float]:
        return [record.values.get(name, math.nan) for record in records]

    shares = [c / n if n else math.nan for c, n in zip(values("clipped"), values("units"), strict=True)]
    wanted = (
        ("mean-loss", "mean loss", values("mean_loss")),
        ("clipped", "share clipped", shares),
        ("units", "batch size", values("units")),
        ("dropped", "dropped units", values("dropped")),
    )
    return [
        plots.nonprivate_curve(records, f"nonprivate-{name}", label, numbers)
        for name, label, numbers in wanted
        if any(math.isfinite(value) for value in numbers)
    ]
