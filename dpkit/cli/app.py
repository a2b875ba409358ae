"""The ``dpkit`` command: one line per subcommand, and Typer's own usage errors mapped to exit code 1."""

from __future__ import annotations

from collections.abc import Sequence

import typer

from .demo import demo
from .epsilon import epsilon
from .init import init
from .report import report
from .statement import statement
from .terminal import INTERRUPTED, WRONG_INPUT, print_error, reported
from .train import train
from .verify import verify

# Newer releases of Typer carry click inside themselves, older ones use the installed one. BadParameter is public in
# both, and its first base is the class of every usage error.
_UsageError: type[Exception] = typer.BadParameter.__mro__[1]

app = typer.Typer(
    name="dpkit",
    help="Train with differential privacy, and say what was spent.",
    epilog="Exit codes: 0 done, 1 wrong input or usage, 2 a budget is exceeded, 4 a ledger cannot be verified or a "
    "file contradicts it, 130 and 143 stopped by a signal.",
    add_completion=False,
    pretty_exceptions_enable=False,
)
for _command in (demo, init, train, epsilon, statement, report, verify):
    app.command()(reported(_command))


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
