"""``python -m experiments.data``: which data sets there are, which files are present, and how to get the others.

    python -m experiments.data                              every set: what it is, and the state of its files
    python -m experiments.data adult                        the same of one set
    python -m experiments.data adult --download --data-dir DIR

Without ``--download`` nothing is fetched. What is fetched is kept only if its checksum is that of the catalogue. Every
file that is there is read as a whole, because a file is right when its checksum is.

Exit code 0, or 1 where a download failed or a name is unknown; a missing file is no failure of a list.
"""

from __future__ import annotations

import argparse
import json
import sys
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from dpkit.datasets import CATALOGUE, Description, describe
from dpkit.datasets.catalogue import File
from dpkit.datasets.files import download, find, folder_of, read
from dpkit.errors import DataError


@dataclass(frozen=True)
class FileState:
    """One file: "right", "missing" or "wrong" (with the reason), and where it can be had."""

    path: str
    state: str
    reason: str
    url: str | None
    why_no_url: str


def state_of(file: File, data_dir: Path | None) -> FileState:
    """How ``file`` stands in the data folder; a folder that is not given or not there has no files."""
    public = file if file.url or file.instead is None else file.instead
    state, reason = "right", ""
    try:
        read(file, data_dir)
    except DataError as error:
        reason = str(error)
        try:
            state = "missing" if find(file, data_dir) is None else "wrong"
        except DataError:
            state = "missing"
    return FileState(file.path, state, reason, public.url, "" if public.url else file.why_no_url)


def main(arguments: list[str] | None = None) -> int:
    """The command; returns the exit code."""
    parser = argparse.ArgumentParser(prog="python -m experiments.data", description="Data sets and their files.")
    parser.add_argument("name", nargs="?", help=f"one of {', '.join(CATALOGUE)}; left out: all")
    parser.add_argument("--data-dir", type=Path, help="folder of the data files; left out, the variable DPKIT_DATA")
    parser.add_argument("--download", action="store_true", help="fetch the missing files of NAME")
    parser.add_argument("--json", action="store_true", help="print JSON")
    options = parser.parse_args(arguments)
    try:
        chosen = list(CATALOGUE.values()) if options.name is None else [describe(options.name)]
        if options.download:
            if options.name is None:
                raise DataError("--download takes the name of one data set, e.g. `python -m experiments.data adult`.")
            folder = folder_of(options.data_dir)
    except DataError as error:
        print(error, file=sys.stderr)
        return 1
    failed = False
    if options.download:
        for file in chosen[0].files:
            try:
                print(f"{download(file, folder)} is there and right", file=sys.stderr)
            except DataError as error:  # the other files can still be fetched
                print(error, file=sys.stderr)
                failed = True
    states = {description.name: [state_of(f, options.data_dir) for f in description.files] for description in chosen}
    if options.json:
        print(json.dumps([_as_json(description, states[description.name]) for description in chosen], indent=2))
    else:
        for number, description in enumerate(chosen):
            print(end="\n" if number else "")
            _print_one(description, states[description.name])
    return int(failed)


def _as_json(description: Description, states: list[FileState]) -> dict[str, Any]:
    return asdict(description) | {"files": [asdict(state) for state in states]}


def _print_one(description: Description, states: list[FileState]) -> None:
    sensitive = ", ".join(description.sensitive) or "none"
    testing = f"{description.num_test:,}" if description.num_test else "none"
    print(f"{description.name}: {description.title}")
    print(f"  training {description.num_train:,}, test {testing}; label: {description.label}; sensitive: {sensitive}")
    print(f"  licence: {description.licence}")
    print(f"  citation: {description.citation}")
    if not states:
        print("  no files: it comes with scikit-learn")
    for file in states:
        print(f"  {file.state:8} {file.path}" + (f": {file.reason}" if file.state == "wrong" else ""))
        if file.state != "right":
            print(f"           {file.url or f'cannot be fetched: {file.why_no_url}'}")


if __name__ == "__main__":
    sys.exit(main())
