"""``dpkit check``: can this model be trained privately, and how are its per-sample gradients computed?

Exit code 0 if the neighbour probe passed, 4 if something is refused, 1 if there was nothing to look at.  The code that
is checked is the user's own, and runs in this process.
"""

from __future__ import annotations

import importlib
import sys
from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.table import Table
from rich.text import Text

from dpkit.errors import ConfigError

from .terminal import UNVERIFIABLE, Debug, Json, out, print_json

if TYPE_CHECKING:
    from dpkit.engine.check import Check

_WANTED = "(model, loss_fn, batch), or (model, batch) for a model whose loss stays in a loop of your own"


def check(
    function: Annotated[
        str,
        typer.Argument(
            metavar="MODULE:FUNCTION",
            help=f"A function without arguments that returns {_WANTED}. Modules are looked for in this folder, too.",
        ),
    ],
    *,
    json_output: Json = False,
    debug: Debug = False,
) -> None:
    """Look at a model operation by operation, and run the neighbour probe. Exit code 4 if it is refused.

    FUNCTION takes no arguments and returns (model, loss_fn, batch), or (model, batch) for a model whose loss stays in a
    loop of your own. MODULE is looked for in this folder, too.

    The batch must be public or synthetic. loss_fn(model, batch) returns one loss per example. Without it, the batch is
    what the model is called with: a dict gives keyword arguments, a tuple positional ones.

    \b
    # mymodels.py                       dpkit check mymodels:make
    def make():
        model = nn.Sequential(nn.Linear(20, 8), nn.ReLU(), nn.Linear(8, 3))
        def loss_fn(model, batch):
            x, y = batch
            return F.cross_entropy(model(x), y, reduction="none")
        return model, loss_fn, (torch.randn(8, 20), torch.randint(0, 3, (8,)))
    """
    model, loss_fn, batch = _subject(function, debug)
    from dpkit.engine.check import check as look  # torch, which the user's module has loaded by now

    found = look(model, loss_fn, batch)
    if json_output:
        print_json({"function": function, "ok": found.ok, **asdict(found)})
    else:
        _print(function, found)
    if not found.ok:
        raise typer.Exit(UNVERIFIABLE)


def _subject(function: str, debug: bool) -> tuple[Any, Any, Any]:
    """Model, loss function or None, and batch.

    Raises:
      ConfigError: saying what of the module, the function or its value is not as it should be.
    """
    module_name, _, name = function.partition(":")
    if not module_name or not name:
        raise ConfigError(f"{function!r} does not name a function; write MODULE:FUNCTION, as in mymodels:make.")
    if (here := str(Path.cwd())) not in sys.path:
        sys.path.insert(0, here)
    try:
        module = importlib.import_module(module_name)
    except Exception as error:  # a stranger's module may raise anything
        if debug:
            raise
        missing = isinstance(error, ModuleNotFoundError) and error.name == module_name.partition(".")[0]
        what = "was not found in this folder or among the installed packages" if missing else _raised(error)
        raise ConfigError(f"the module {module_name!r} {what}. Check the name, or run with --debug.") from None
    if not callable(make := getattr(module, name, None)):
        raise ConfigError(f"{module.__name__!r} has no function {name!r}; {function!r} must name one.")
    try:
        made = make()
    except Exception as error:
        if debug:
            raise
        raise ConfigError(f"{function} {_raised(error)}. It is called without arguments; see --debug.") from None
    from torch import nn

    if not isinstance(made, (tuple, list)) or len(made) not in (2, 3) or not isinstance(made[0], nn.Module):
        kinds = ", ".join(type(value).__name__ for value in made) if isinstance(made, (tuple, list)) else None
        shown = type(made).__name__ if kinds is None else f"({kinds})"
        raise ConfigError(f"{function} returned {shown}; it returns {_WANTED}, with an nn.Module first.")
    if len(made) == 3 and made[1] is not None and not callable(made[1]):
        raise ConfigError(f"{function} returned a {type(made[1]).__name__} as loss_fn, which cannot be called.")
    model, *loss_fn, batch = made
    return model, loss_fn[0] if loss_fn else None, batch


def _raised(error: Exception) -> str:
    return f"raised {type(error).__name__}: {error}"


def _print(function: str, found: Check) -> None:
    table = Table(box=None, pad_edge=False, header_style="bold")
    for heading in ("parameter", "shape", "operation", "rule", "strategy", "kept", "examples", "verdict"):
        table.add_column(heading, overflow="fold")
    for row in found.parameters:
        verdict = row.verdict if row.verdict in _STYLES else "REFUSED"
        table.add_row(
            Text(row.parameter),
            Text("x".join(map(str, row.shape))),
            Text(", ".join(row.operations)),
            Text(row.rule),
            Text(row.strategy),
            Text(_bytes(row.kept_bytes)),
            Text(row.layout),
            Text(verdict, style=_STYLES.get(verdict, "bold red")),
        )
    out.print(table)
    out.print(
        f"\n{len(found.parameters)} trainable parameters, {found.frozen} frozen; strategies for {found.examples} "
        "examples, kept bytes for each of them.",
        markup=False,
        soft_wrap=True,
    )
    for refusal in found.refusals:
        out.print(Text("refused: " + " ".join(refusal.split()), style="red"), soft_wrap=True)
    answer = "ok: no example moved the gradient of another one" if found.ok else "CANNOT BE TRAINED PRIVATELY AS IT IS"
    out.print(Text(f"{function}: {answer}", style="green" if found.ok else "bold red"), soft_wrap=True)


_STYLES: Mapping[str, str] = {"ok": "green", "not used": "yellow", "not reached": "yellow"}


def _bytes(count: int | None) -> str:
    if not count:
        return ""
    size, unit = float(count), "B"
    for larger in ("KiB", "MiB", "GiB"):
        if size < 1024:
            break
        size, unit = size / 1024, larger
    return f"{size:.0f} {unit}" if unit == "B" else f"{size:.1f} {unit}"
