"""What all commands share: two consoles, JSON, and the way from an error to one line and an exit code.

Exit codes: 0 done; 1 wrong input or usage; 2 a budget is exceeded; 3 an audit contradicts the claim; 4 a ledger cannot
be verified; 130 and 143 stopped by SIGINT or SIGTERM. An error that dpkit knows is one red line on stderr, with a
traceback only under ``--debug`` or ``DPKIT_DEBUG=1``. With ``--json``, stdout holds one JSON object and nothing else.
"""

from __future__ import annotations

import functools
import json
from collections.abc import Callable
from typing import Annotated, Any

import typer
from rich.console import Console
from rich.text import Text

from dpkit.errors import AccountingError, BudgetExceeded, DpkitError, LedgerError

BUDGET_EXCEEDED = 2
CONTRADICTED = 3
UNVERIFIABLE = 4
WRONG_INPUT = 1
INTERRUPTED = 130  # as shells have it: 128 + the number of the signal
TERMINATED = 143

out = Console(highlight=False)
err = Console(stderr=True, highlight=False)

Json = Annotated[bool, typer.Option("--json", help="Print one JSON object instead of text.")]
Debug = Annotated[bool, typer.Option("--debug", envvar="DPKIT_DEBUG", help="Show the traceback of an error.")]


def print_json(value: dict[str, Any]) -> None:
    """One JSON object on stdout, without terminal colours or wrapping."""
    typer.echo(json.dumps(value, indent=2, ensure_ascii=False))


def print_error(message: str) -> None:
    """One red line on stderr, whatever line breaks the message has."""
    err.print(Text("error: " + " ".join(message.split()), style="red"), soft_wrap=True)


def exit_code(error: Exception) -> int:
    """The exit code that tells a calling script what kind of failure this is."""
    match error:
        case BudgetExceeded():
            return BUDGET_EXCEEDED
        case LedgerError():
            return UNVERIFIABLE
        case _:
            return WRONG_INPUT


def reported(command: Callable[..., None]) -> Callable[..., None]:
    """``command`` with the errors that a user can cause turned into one line and an exit code.

    The command takes ``debug``; under it the error goes through as it is.
    """

    @functools.wraps(command)
    def run(*args: Any, debug: bool = False, **kwargs: Any) -> None:
        try:
            command(*args, debug=debug, **kwargs)
        except (DpkitError, AccountingError) as error:
            if debug:
                raise
            print_error(str(error))
            raise typer.Exit(exit_code(error)) from None
        except OSError as error:
            if debug:
                raise
            print_error(f"{error.filename or 'a file'}: {error.strerror or error}. Check the path and its rights.")
            raise typer.Exit(WRONG_INPUT) from None

    return run
