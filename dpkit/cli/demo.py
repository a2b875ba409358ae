"""``dpkit demo``: the same small network on scikit-learn's digits, without and with differential privacy.

The data set is public, so the runs of ``--runs`` are repetitions of an experiment: each has its own ledger and its own
epsilon. On private data their epsilons would add up.
"""

from __future__ import annotations

from pathlib import Path
from statistics import fmean
from typing import TYPE_CHECKING, Annotated

import typer
from rich.table import Table

from accounting import round_up_text
from dpkit import datasets, report
from dpkit.run_folder import RunFolder

from .config import Config, Privacy, Training
from .progress import training_bar
from .terminal import Debug, Json, err, out, print_json

if TYPE_CHECKING:
    from .loop import Result

# Found by a search on this public data set; a search on private data would have to be paid for.
PRIVATE_TRAINING = Training(epochs=40, batch_size=256, learning_rate=2.0, schedule="linear")
PLAIN_TRAINING = Training(epochs=30, batch_size=64, learning_rate=0.2, momentum=0.9, schedule="linear")
MAX_GRAD_NORM = 1.0


def demo(
    *,
    epsilon: Annotated[float, typer.Option(help="What the private run may cost.")] = 3.0,
    delta: Annotated[float, typer.Option(help="Well below 1/1437.")] = 1e-4,
    runs: Annotated[int, typer.Option(min=1, help="Repetitions; the table shows the mean accuracy.")] = 1,
    seed: Annotated[int | None, typer.Option(min=0, help="Repeatable initial weights; noise stays fresh.")] = None,
    output: Annotated[Path, typer.Option(help="Folder in which the run folders are made.")] = Path("runs"),
    json_output: Json = False,
    debug: Debug = False,
) -> None:
    """Train on a small public data set with and without privacy, and print what it cost."""
    from pydantic import ValidationError

    try:
        privacy = Privacy(epsilon=epsilon, delta=delta, max_grad_norm=MAX_GRAD_NORM)
    except ValidationError:
        raise typer.BadParameter(
            f"epsilon is {epsilon} and delta is {delta}; epsilon must be above 0, delta between 0 and 1."
        ) from None
    data = datasets.load("digits", None)
    folder = _fresh_folder(output)
    err.print(f"digits: {len(data.train_x)} training and {len(data.test_x)} test images of 8x8, 10 classes")

    from .loop import train

    plain: list[Result] = []
    private: list[Result] = []
    for number in range(1, runs + 1):
        suffix = "" if runs == 1 else f" {number}/{runs}"
        weights = {"seed": None if seed is None else seed + number - 1}
        config = Config(
            dataset="digits",
            model="mlp",
            output=folder / f"without-privacy-{number}",
            training=PLAIN_TRAINING.model_copy(update=weights),
            private=False,
        )
        with training_bar(f"without privacy{suffix}", None) as bar:
            plain.append(train(config, data, bar))
        config = Config(
            dataset="digits",
            model="mlp",
            output=folder / f"private-{number}",
            training=PRIVATE_TRAINING.model_copy(update=weights),
            privacy=privacy,
        )
        with training_bar(f"with privacy   {suffix}", epsilon) as bar:
            private.append(train(config, data, bar))

    statement = private[-1].statement
    assert statement is not None  # a private run has one
    page = report.write_report(RunFolder(config.output)).report
    if json_output:
        print_json(
            {
                "nonprivate": _summary(plain),
                "private": _summary(private),
                "statement": statement.model_dump(mode="json"),
                "folder": str(folder),
                "report": str(page),
            }
        )
        return
    out.print(_table(plain, private))
    if runs > 1:
        out.print("Each run has its own epsilon; on private data the epsilons of all runs would add up.")
    typer.echo(str(statement))
    out.print(f"run folders: {folder}", markup=False, soft_wrap=True)
    out.print(f"report: {page}", markup=False, soft_wrap=True)


def _fresh_folder(parent: Path) -> Path:
    """A new folder demo-1, demo-2, ... in ``parent``: a used run folder belongs to its ledger."""
    number = 1
    while True:
        folder = parent / f"demo-{number}"
        try:
            folder.mkdir(parents=True)
        except FileExistsError:
            number += 1
        else:
            return folder


def _summary(results: list[Result]) -> dict[str, object]:
    return {
        "mean_test_accuracy": fmean(result.test_accuracy for result in results),
        "seconds": round(sum(result.seconds for result in results), 2),
        "runs": [result.to_json() for result in results],
    }


def _table(plain: list[Result], private: list[Result]) -> Table:
    table = Table("", "test accuracy", "epsilon", "delta", "seconds")
    for title, results in (("without privacy", plain), ("with privacy", private)):
        accuracies = [result.test_accuracy for result in results]
        spread = f" ({min(accuracies):.3f} to {max(accuracies):.3f})" if len(accuracies) > 1 else ""
        stated = results[-1].statement
        table.add_row(
            title,
            f"{fmean(accuracies):.3f}{spread}",
            "no guarantee" if stated is None else f"{stated.epsilon:.4f}",
            "" if stated is None else round_up_text(stated.delta),
            f"{sum(result.seconds for result in results):.1f}",
        )
    return table
