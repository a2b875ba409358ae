"""The ``dpkit`` command: one word per subcommand, and Typer's own usage errors mapped to exit code 1.

A subcommand is loaded when it is asked for: most of the time of a short answer goes into imports.
"""

from __future__ import annotations

import importlib
from collections.abc import Sequence
from typing import Any

import typer
from typer.core import TyperGroup

from .terminal import INTERRUPTED, WRONG_INPUT, print_error, reported

# Newer releases of Typer carry click inside themselves, older ones use the installed one. BadParameter is public in
# both, and its first base is the class of every usage error.
_UsageError: type[Exception] = typer.BadParameter.__mro__[1]

# Each is the function of this name in the module of this name.
_COMMANDS = (
    "demo",
    "init",
    "train",
    "epsilon",
    "compare",
    "calibrate",
    "curve",
    "plan-noise",
    "tune-leak",
    "statement",
    "report",
    "verify",
    "check",
    "audit",
)
# Each is the function of this name in the module audit_NAME.
_AUDITS = ("engine", "scores", "model")


def _loaded(module: str, name: str) -> Any:
    """The command of the function ``name``."""
    alone = typer.Typer(add_completion=False, pretty_exceptions_enable=False)
    function = getattr(importlib.import_module(f".{module}", __package__), name)
    alone.command(name.replace("_", "-"))(reported(function))
    return typer.main.get_command(alone)


class _Audits(TyperGroup):
    def list_commands(self, ctx: Any) -> list[str]:
        return list(_AUDITS)

    def get_command(self, ctx: Any, cmd_name: str) -> Any:
        return _loaded(f"audit_{cmd_name}", cmd_name) if cmd_name in _AUDITS else None


class _Commands(TyperGroup):
    def list_commands(self, ctx: Any) -> list[str]:
        return list(_COMMANDS)

    def get_command(self, ctx: Any, cmd_name: str) -> Any:
        if cmd_name == "audit":
            return typer.main.get_command(_audit)
        name = cmd_name.replace("-", "_")
        return _loaded(name, name) if cmd_name in _COMMANDS else None


_audit = typer.Typer(
    name="audit",
    cls=_Audits,
    help="Attack a trainer or a model, and compare what was learnt with what is claimed.",
    epilog="Exit code 3: the evidence contradicts the claim. No contradiction proves nothing.",
    add_completion=False,
    pretty_exceptions_enable=False,
)
app = typer.Typer(
    name="dpkit",
    cls=_Commands,
    help="Train with differential privacy, and say what was spent.",
    epilog="Exit codes: 0 done, 1 wrong input or usage, 2 a budget is exceeded, 3 an audit contradicts the claim, 4 a "
    "ledger cannot be verified, a file contradicts it, a library contradicts an epsilon, or a model is refused, 130 "
    "and 143 stopped by a signal.",
    add_completion=False,
    pretty_exceptions_enable=False,
)


@_audit.callback(invoke_without_command=True)
@app.callback(invoke_without_command=True)
def _root(context: typer.Context) -> None:
    if context.invoked_subcommand is None:
        typer.echo(context.get_help())


def main(arguments: Sequence[str] | None = None) -> int:
    """Run one command; returns the exit code."""
    try:
        code = app(args=None if arguments is None else list(arguments), prog_name="dpkit", standalone_mode=False)
    except typer.Abort:
        print_error("interrupted. What a ledger was charged stays charged.")
        return INTERRUPTED
    except _UsageError as error:
        # Exit code 2 is Typer's for usage; here it means an exceeded budget.
        print_error(f"{getattr(error, 'format_message', error.__str__)()} `dpkit COMMAND --help` shows the usage.")
        return WRONG_INPUT
    return code if isinstance(code, int) else 0
