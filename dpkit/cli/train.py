"""``dpkit train``: train a small model as a configuration file says, with the ledger charged at every step."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from . import config as configs
from . import datasets
from .progress import training_bar
from .terminal import Debug, Json, out, print_json


def train(
    config_file: Annotated[Path, typer.Argument(metavar="CONFIG.yaml", help="See `dpkit init`.")],
    *,
    data_dir: Annotated[
        Path | None, typer.Option(help="Folder of the data files; left out, the variable DPKIT_DATA.")
    ] = None,
    output: Annotated[Path | None, typer.Option(help="Run folder; left out, the configuration's.")] = None,
    non_private: Annotated[
        bool, typer.Option("--non-private", help="Train without privacy, for comparison; same as `private: false`.")
    ] = False,
    json_output: Json = False,
    debug: Debug = False,
) -> None:
    """Train a model with differential privacy, as a configuration file says."""
    config = configs.read(config_file)
    config = config.model_copy(
        update=({"private": False} if non_private else {}) | ({"output": output} if output is not None else {})
    )
    data = datasets.load(config.dataset, data_dir)

    from .loop import train as run_training  # torch: only once the input is known to be right

    privacy = config.privacy if config.private else None
    title = f"{config.model} on {config.dataset}" + ("" if config.private else ", without privacy")
    with training_bar(title, privacy and privacy.epsilon, privacy and privacy.delta) as moved:
        result = run_training(config, data, moved)

    if json_output:
        print_json(result.to_json() | {"run": str(config.output)})
        return
    out.print(f"test accuracy {result.test_accuracy:.4f} after {result.steps} steps, {result.seconds:.1f} s")
    if result.statement is None:
        out.print("trained WITHOUT privacy: do not publish this model or this number as private", style="yellow")
    else:
        typer.echo(str(result.statement))
    out.print(f"run folder: {config.output}", markup=False, soft_wrap=True)
