"""``python -m experiments``: the experiments by name; ``python -m experiments NAME ...`` runs one."""

from __future__ import annotations

import importlib
import sys

EXPERIMENTS = {
    "audits": "how tight white-box audits of the engine are, and what they catch",
    "data": "which data sets there are, which files are present, and how to get the others",
    "inversion": "the image that an update was made of, computed back from it, without noise and with",
    "low_pass": "a case in which a low-pass filter helps, one in which it does not, and why",
    "methods": "test accuracy of every clipping rule, filter, optimizer and noise, tuned over one grid",
}
BESIDES = {
    "benchmarks": "what privacy costs in time",
    "benchmarks.gradients": "time and memory of per-sample clipping, beside other libraries",
    "benchmarks.accounting": "time of the accountant, beside other libraries",
    "benchmarks.methods": "what each clipping rule, filter and optimizer adds to a step",
}


def main(arguments: list[str]) -> int:
    """The command; returns the exit code."""
    name, *rest = arguments or ["--help"]
    if name in ("-h", "--help"):
        width = max(len(each) for each in (*EXPERIMENTS, *BESIDES))
        for each, what in EXPERIMENTS.items():
            print(f"python -m experiments {each:{width}}  {what}")
        for each, what in BESIDES.items():
            print(f"python -m experiments.{each:{width}}  {what}")
        return 0
    if name not in EXPERIMENTS:
        print(f"there is no experiment {name!r}; those that there are: {', '.join(EXPERIMENTS)}.", file=sys.stderr)
        return 1
    return importlib.import_module(f"experiments.{name}").main(rest)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
