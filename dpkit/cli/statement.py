"""``dpkit statement``: what may be claimed for a run, from its verified ledger alone."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

import accounting
from accounting import Ledger

from .terminal import Debug, Json, print_json


def statement(
    run: Annotated[Path, typer.Argument(help="A run folder, or a ledger file.")],
    *,
    json_output: Json = False,
    debug: Debug = False,
) -> None:
    """Print the privacy statement of a run."""
    with Ledger.open(ledger_path(run), read_only=True) as ledger:
        stated = accounting.statement(ledger)
    if json_output:
        print_json(stated.model_dump(mode="json"))
    else:
        typer.echo(str(stated))


def ledger_path(run: Path) -> Path:
    """The ledger that belongs to ``run``, a folder or the ledger file itself."""
    return run / "ledger.sqlite" if run.is_dir() else run
