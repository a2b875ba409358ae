"""``dpkit init``: a commented configuration that is valid as it stands."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from dpkit.errors import ConfigError

from .config import EXAMPLE, parse
from .terminal import Debug, Json, out, print_json


def init(
    path: Annotated[Path, typer.Argument(help="File to write; '-' writes to stdout.")] = Path("dpkit.yaml"),
    *,
    force: Annotated[bool, typer.Option("--force", help="Replace the file if it exists.")] = False,
    json_output: Json = False,
    debug: Debug = False,
) -> None:
    """Write a commented example configuration for `dpkit train`."""
    if str(path) == "-":
        typer.echo(EXAMPLE, nl=False)
        return
    if path.exists() and not force:
        raise ConfigError(f"{path} exists; give another name, or --force to replace it.")
    path.write_text(EXAMPLE, encoding="utf-8")
    if json_output:
        print_json({"path": str(path), "config": parse(EXAMPLE, source=str(path)).model_dump(mode="json")})
    else:
        out.print(f"wrote {path}; next: dpkit train {path}", soft_wrap=True, markup=False)
