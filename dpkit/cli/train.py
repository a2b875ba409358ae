"""``dpkit train``: train a small model as a configuration file says, with the ledger charged at every step."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from dpkit import datasets
from dpkit.errors import ConfigError
from dpkit.run_folder import RunFolder

from . import config as configs
from .progress import training_bar
from .terminal import INTERRUPTED, TERMINATED, Debug, Json, out, print_error, print_json


def train(
    config_file: Annotated[Path | None, typer.Argument(metavar="[CONFIG.yaml]", help="See `dpkit init`.")] = None,
    *,
    resume: Annotated[
        Path | None,
        typer.Option(
            help="Run folder of a run that stopped: go on from its newest checkpoint, with its configuration."
        ),
    ] = None,
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
    if resume is not None:
        if config_file is not None or output is not None or non_private:
            raise typer.BadParameter("--resume goes on with the configuration in the run folder; give nothing else.")
        config = _config_of(resume)
    elif config_file is None:
        raise typer.BadParameter("give a configuration file, or --resume with a run folder.")
    else:
        config = configs.read(config_file)
    config = config.model_copy(
        update=({"private": False} if non_private else {}) | ({"output": output} if output is not None else {})
    )
    data = datasets.load(config.dataset, data_dir)

    from .loop import train as run_training  # torch: only once the input is known to be right

    privacy = config.privacy if config.private else None
    title = f"{config.model} on {config.dataset}" + ("" if config.private else ", without privacy")
    try:
        with training_bar(title, privacy and privacy.epsilon) as bar:
            result = run_training(config, data, bar, resume=resume is not None)
    except (KeyboardInterrupt, SystemExit) as stop:
        if not (config.private and RunFolder(config.output).names("checkpoints")):
            raise
        # The loop ended between two steps and saved itself.
        print_error(
            f"stopped. What the ledger was charged stays charged; `dpkit train --resume {config.output}` goes on."
        )
        raise typer.Exit(INTERRUPTED if isinstance(stop, KeyboardInterrupt) else TERMINATED) from None

    if json_output:
        print_json(result.to_json() | {"run": str(config.output)})
        return
    out.print(f"test accuracy {result.test_accuracy:.4f} after {result.steps} steps, {result.seconds:.1f} s")
    if result.statement is None:
        out.print("trained WITHOUT privacy: do not publish this model or this number as private", style="yellow")
    else:
        typer.echo(str(result.statement))
    out.print(f"run folder: {config.output}", markup=False, soft_wrap=True)


def _config_of(path: Path) -> configs.Config:
    """The configuration with which the run in the folder ``path`` was begun.

    Raises:
      RunFolderError: the folder or the file cannot be read.
      ConfigError: the file is no configuration, or one of a run without privacy.
    """
    run = RunFolder(path)
    source = str(path / "config.yaml")
    config = configs.decode(run.read("config.yaml"), source=source)
    if not config.private:
        raise ConfigError(f"{source} is of a run without privacy, which keeps no checkpoints; run it again.")
    # Wherever the folder lies now: a run never writes outside of it.
    return config.model_copy(update={"output": path})
