"""``dpkit report``: the page and the model card of a run, for people who were not there."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from dpkit.run_folder import RunFolder

from .terminal import Debug, Json, out, print_json


def report(
    run: Annotated[Path, typer.Argument(help="A run folder.")],
    *,
    with_nonprivate: Annotated[
        bool,
        typer.Option(
            "--with-nonprivate",
            help="Also write RUN/nonprivate/report.html with losses and batch counts, which must not be shared.",
        ),
    ] = False,
    json_output: Json = False,
    debug: Debug = False,
) -> None:
    """Write RUN/report.html and RUN/PRIVACY.md, which may be shared."""
    from dpkit.report import write_report

    written = write_report(RunFolder(run), with_nonprivate=with_nonprivate)
    if json_output:
        print_json(
            {name: str(value) if isinstance(value, Path) else value for name, value in written._asdict().items()}
        )
        return
    out.print(str(written.report), markup=False, soft_wrap=True)
    out.print(str(written.privacy), markup=False, soft_wrap=True)
    if written.nonprivate_report is not None:
        out.print(
            f"{written.nonprivate_report} is NOT PRIVATE: do not share it", style="red", markup=False, soft_wrap=True
        )
    if not written.certified:
        out.print("this run is NOT certified; the page says so", style="yellow", markup=False)
