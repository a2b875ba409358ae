"""``python -m experiments.benchmarks.noise``: what a number of noise costs in each tier, on this machine.

One release of a vector of zeros by each mechanism in turn, round after round in one process with one thread; the figure
is the median over the rounds of the processor time of a release divided by its length, with quartiles.
"""

from __future__ import annotations

import argparse
import statistics
import time
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from dpkit.mechanisms import DiscreteGaussian, Gaussian, HardenedGaussian, NoiseKey
from dpkit.mechanisms.chacha import KeyStream, key_stream_in_torch
from dpkit.mechanisms.secure import standard_normal
from dpkit.types import ClippedSum, Query

SIZES = (1_000, 30_000, 1_000_000)
_KEY = b"not a secret".ljust(32)


def _release(mechanism: Any) -> Callable[[int], object]:
    def run(size: int) -> object:
        sums: dict[str, Tensor] = {"p": torch.zeros(size)}
        return mechanism.release(ClippedSum((Query(sums, {"p": 0}, {0: 1.0}),)), (), NoiseKey(_KEY))

    return run


CONTESTANTS: dict[str, Callable[[int], object]] = {
    "Gaussian (default)": _release(Gaussian(1.0)),
    "HardenedGaussian (hardened)": _release(HardenedGaussian(1.0)),
    "DiscreteGaussian (exact)": _release(DiscreteGaussian(1.0)),
    "of hardened: ChaCha20 by OpenSSL": lambda size: KeyStream(_KEY).words(size),
    "of hardened: words and quantiles": lambda size: standard_normal(size, _KEY),
    "ChaCha20 in torch operations, on CPU": lambda size: key_stream_in_torch(_KEY, bytes(12), 0, -(-size // 8), "cpu"),
}


def measure(rounds: int, sizes: Sequence[int]) -> dict[str, dict[int, list[float]]]:
    """Contestant -> size -> nanoseconds a number, one for each round; a first round warms up and is left out."""
    found: dict[str, dict[int, list[float]]] = {name: {size: [] for size in sizes} for name in CONTESTANTS}
    for number in range(rounds + 1):
        for size in sizes:
            for name, run in CONTESTANTS.items():
                start = time.process_time()
                run(size)
                if number:
                    found[name][size].append(1e9 * (time.process_time() - start) / size)
    return found


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(prog="python -m experiments.benchmarks.noise", description=__doc__)
    parser.add_argument("--rounds", type=int, default=15)
    rounds = max(2, parser.parse_args(arguments).rounds)
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    found = measure(rounds, SIZES)
    torch.set_num_threads(threads)
    print("| ns a number | " + " | ".join(f"{size:,} numbers" for size in SIZES) + " |")
    print("|---|" + "---|" * len(SIZES))
    for name, rows in found.items():
        cells = []
        for times in rows.values():
            low, middle, high = statistics.quantiles(times, n=4)
            cells.append(f"{middle:.0f} [{low:.0f}, {high:.0f}]")
        print(f"| {name} | {' | '.join(cells)} |")


if __name__ == "__main__":
    main()
