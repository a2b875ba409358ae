"""Where the runs of the soundness checks live, and the table of bugs that were tried."""

from __future__ import annotations

import os
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest

# The truths about epsilon that the accountant's own tests know.
sys.path.insert(0, str(Path(__file__).parents[1] / "accounting"))


@pytest.fixture
def folder() -> Iterator[Path]:
    """An empty folder, in memory where there is one: thousands of durable charges are made and thrown away."""
    memory = Path("/dev/shm")
    place = memory if memory.is_dir() and os.access(memory, os.W_OK) else None
    with tempfile.TemporaryDirectory(dir=place) as name:
        yield Path(name)


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter) -> None:
    """One line for each bug: its number, the check that caught it, seconds, and what it does."""
    rows = []
    for outcome in ("passed", "failed"):
        for report in terminalreporter.getreports(outcome):
            told = dict(report.user_properties)
            if "bug" in told:
                number, bug, source = told["bug"]
                rows.append((number, told.get("caught by", "NOT CAUGHT"), report.duration, bug, source))
    if not rows:
        return
    terminalreporter.section("bugs that were put in", sep="-")
    terminalreporter.write_line("id   caught by   seconds   bug (seen in)")
    for number, check, seconds, bug, source in sorted(rows, key=lambda row: ("MBX".index(row[0][0]), row[0], row[3])):
        terminalreporter.write_line(f"{number}  {check:<10}  {seconds:7.2f}   {bug} ({source})")
    entries = {row[0] for row in rows if not row[0].startswith("X")}
    missed = {row[0] for row in rows if row[1] == "NOT CAUGHT"}
    terminalreporter.write_line(
        f"{len(entries - missed)} of {len(entries)} entries of the catalogue that were tried, and "
        f"{len({row[0] for row in rows} - entries - missed)} bugs of single methods, were caught by the check that "
        "owns them, or refused."
    )
