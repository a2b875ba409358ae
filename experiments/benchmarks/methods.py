"""``python -m experiments.benchmarks.methods``: what clipping rules, filters, optimizers and noises cost in time.

One whole private step (loader, forward, backward, clip, charge on the disk, noise, filter, optimizer) with each method
against the same step with flat clipping and SGD; DP-AdamBC against Adam. All contestants of a model live in one process
and take one step each in every round, in an order that turns from round to round, each beside a step of the baseline;
a ratio is the median, over the rounds, of its time divided by that of the baseline beside it, so that what else the
machine does hits both. All batches have the same size (drawn without replacement), or that would be measured as well.
Correlated noise is another mechanism (it wants batches with a least distance, and makes noise of earlier steps again),
so it has no target.

On a busy machine a thread waits for its turn in the middle of a step; ``--cpu`` measures processor time instead of wall
time, which leaves out those waits and that for the disk. The same baseline runs a second time as a contestant: how far
its ratio is from 1, and how far its quartiles are apart, is what the figures are worth.
"""

from __future__ import annotations

import argparse
import functools
import json
import os
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.optim import SGD, Adam, Optimizer
from torch.utils.data import DataLoader, TensorDataset

import dpkit
from dpkit import clipping, filters, mechanisms
from dpkit.optim import DPAdamBC

from .__main__ import tanh_cnn

TARGET = 1.05
WARM_UP = 5
BATCH = 256
EXAMPLES = 8 * BATCH
STEPS = 4000
BANDS = 8
BASELINE = "flat, SGD"

Clock = Callable[[], float]


def mlp() -> nn.Module:
    """784-512-256-10: 535,818 parameters."""
    return nn.Sequential(nn.Linear(784, 512), nn.ReLU(), nn.Linear(512, 256), nn.ReLU(), nn.Linear(256, 10))


MODELS: dict[str, tuple[Callable[[], nn.Module], tuple[int, ...]]] = {
    "MLP 784-512-256-10": (mlp, (784,)),
    "tanh CNN 28x28": (tanh_cnn, (1, 28, 28)),
}


MakeOptimizer = Callable[[Iterable[nn.Parameter]], Optimizer]
PLAIN_SGD: MakeOptimizer = functools.partial(SGD, lr=1e-3)


@dataclass(frozen=True)
class Contestant:
    """A way of taking a private step.

    Attributes:
      private: what ``make_private`` gets beside what all share; the rule is flat where none is given.
      optimizer: what makes it of the parameters.
      baseline: name of the contestant that it is compared with.
      target: largest ratio that is wanted; None where there is none.
    """

    private: dict[str, Any]
    optimizer: MakeOptimizer = PLAIN_SGD
    baseline: str = BASELINE
    target: float | None = TARGET


FLAT = clipping.Flat(1.0)
CONTESTANTS = {
    BASELINE: Contestant({"clipping": FLAT}, target=None),
    "flat, Adam": Contestant({"clipping": FLAT}, functools.partial(Adam, lr=1e-3), target=None),
    "the baseline again": Contestant({"clipping": FLAT}, target=None),
    "PerLayer": Contestant({"clipping": clipping.PerLayer(1.0)}),
    "NormalizeIfExceeds": Contestant({"clipping": clipping.NormalizeIfExceeds(1.0)}),
    "Automatic (AUTO-S)": Contestant({"clipping": clipping.Automatic(1.0)}),
    "Automatic (AUTO-V)": Contestant({"clipping": clipping.Automatic(1.0, gamma=0.0)}),
    "Quantile": Contestant({"clipping": clipping.Quantile(1.0)}),
    "PerLayerQuantile": Contestant({"clipping": clipping.PerLayerQuantile(1.0)}),
    "Global": Contestant({"clipping": clipping.Global(1.0, threshold=5.0)}),
    "GlobalAdapt": Contestant({"clipping": clipping.GlobalAdapt(1.0)}),
    "GroupAdaptive, 10 groups": Contestant({"clipping": clipping.GroupAdaptive(1.0, num_labels=10)}),
    "LowPass, first order": Contestant({"clipping": FLAT, "filters": (filters.first_order(),)}),
    "LowPass, momentum(0.9)": Contestant({"clipping": FLAT, "filters": (filters.momentum(0.9),)}),
    "LowPass, butterworth(2, 0.1)": Contestant({"clipping": FLAT, "filters": (filters.butterworth(2, 0.1),)}),
    "DPAdamBC, to Adam": Contestant({"clipping": FLAT}, functools.partial(DPAdamBC, lr=1e-3), baseline="flat, Adam"),
    "correlated noise, BandMF(8)": Contestant(
        {
            "clipping": FLAT,
            "mechanism": dpkit.Correlated(1.0, strategy=mechanisms.BandMF(BANDS)),
            "sampler": dpkit.FixedOrder(BATCH, EXAMPLES),
            "relation": dpkit.Relation.ZERO_OUT,
        },
        target=None,
    ),
    "correlated noise, BISR(8)": Contestant(
        {
            "clipping": FLAT,
            "mechanism": dpkit.Correlated(1.0, strategy=mechanisms.BISR(BANDS)),
            "sampler": dpkit.FixedOrder(BATCH, EXAMPLES),
            "relation": dpkit.Relation.ZERO_OUT,
        },
        target=None,
    ),
}


def stepper(contestant: Contestant, make: Callable[[], nn.Module], shape: tuple[int, ...], run_dir: Path) -> Any:
    """(a function that takes one private step, the engine)."""
    torch.manual_seed(0)
    model, data = make(), TensorDataset(torch.randn(EXAMPLES, *shape), torch.randint(0, 10, (EXAMPLES,)))
    settings = dict(contestant.private)
    if "mechanism" not in settings:
        settings |= {"noise_multiplier": 1.0, "sampler": dpkit.WithoutReplacement(BATCH, EXAMPLES)}
        settings["relation"] = dpkit.Relation.REPLACE_ONE
    engine = dpkit.PrivacyEngine(run_dir)
    optimizer = contestant.optimizer(model.parameters())
    model, optimizer, loader = engine.make_private(
        model,
        optimizer,
        DataLoader(data, batch_size=BATCH),
        num_examples=EXAMPLES,
        target_delta=1e-5,
        steps=STEPS,
        **settings,
    )

    def batches() -> Iterator[tuple[Tensor, Tensor]]:
        while True:
            yield from loader

    stream = batches()
    with_labels = getattr(settings["clipping"], "needs_labels", False)

    def step() -> None:
        inputs, targets = next(stream)
        optimizer.zero_grad()
        losses = F.cross_entropy(model(inputs), targets, reduction="none")
        engine.backward(losses, labels=targets if with_labels else None)
        optimizer.step()

    return step, engine


@dataclass(frozen=True)
class Figure:
    """Of one contestant on one model.

    Attributes:
      milliseconds: median of a step.
      ratio, quartiles: to the baseline, in pairs of one round.
    """

    milliseconds: float
    ratio: float
    quartiles: tuple[float, float]


def measure(model: str, names: list[str], rounds: int, clock: Clock = time.perf_counter) -> dict[str, Figure]:
    """Figures of ``names`` and of what they are compared with, by a clock in seconds."""
    baselines = {CONTESTANTS[name].baseline for name in names}
    running = [name for name in CONTESTANTS if name in baselines or name in names]
    seconds: dict[str, list[float]] = {name: [] for name in running}
    ratios: dict[str, list[float]] = {name: [] for name in running}
    with tempfile.TemporaryDirectory() as folder:
        pairs = {
            name: stepper(CONTESTANTS[name], *MODELS[model], Path(folder) / str(number))
            for number, name in enumerate(running)
        }
        steps = {name: step for name, (step, _) in pairs.items()}
        others = [name for name in running if name not in baselines]
        for number in range(WARM_UP + rounds):
            turned = others[number % max(1, len(others)) :] + others[: number % max(1, len(others))]
            for name in turned:
                baseline = CONTESTANTS[name].baseline
                order = (baseline, name) if number % 2 else (name, baseline)
                taken = {each: timed(steps[each], clock) for each in order}
                if number >= WARM_UP:
                    ratios[name].append(taken[name] / taken[baseline])
                    for each in order:
                        seconds[each].append(taken[each])
        for _, engine in pairs.values():
            engine.detach()
    return {
        name: Figure(1e3 * statistics.median(seconds[name]), *with_quartiles(ratios[name]))
        for name in running
        if seconds[name]
    }


def timed(step: Callable[[], object], clock: Clock) -> float:
    start = clock()
    step()
    return clock() - start


def with_quartiles(ratios: list[float]) -> tuple[float, tuple[float, float]]:
    """Median and quartiles; 1 of a baseline."""
    if not ratios:
        return 1.0, (1.0, 1.0)
    if len(ratios) == 1:
        return ratios[0], (ratios[0], ratios[0])
    lower, middle, upper = statistics.quantiles(ratios, n=4, method="inclusive")
    return middle, (lower, upper)


def table(figures: dict[str, dict[str, Figure]]) -> str:
    """A row for each contestant; ratios above the target in bold."""
    names = [name for name in CONTESTANTS if any(name in found for found in figures.values())]
    rows = []
    for name in names:
        target = CONTESTANTS[name].target
        row = [name, "" if target is None else f"{target:.2f}"]
        for found in figures.values():
            figure = found.get(name)
            if figure is None:
                row += ["not run", ""]
                continue
            lower, upper = figure.quartiles
            bold = "**" if target is not None and figure.ratio > target else ""
            is_baseline = any(each.baseline == name for each in CONTESTANTS.values())
            shown = "" if is_baseline else f"{bold}{figure.ratio:.2f}{bold} [{lower:.2f}, {upper:.2f}]"
            row += [f"{figure.milliseconds:.2f}", shown]
        rows.append(row)
    heads = ["method", "target", *(head for model in figures for head in (f"{model}, ms", "ratio"))]
    return "\n".join(f"| {' | '.join(line)} |" for line in (heads, ["---"] * len(heads), *rows))


def main(arguments: list[str] | None = None) -> int:
    """The command; returns the exit code."""
    parser = argparse.ArgumentParser(prog="python -m experiments.benchmarks.methods", description="Time of methods.")
    parser.add_argument("--rounds", type=int, default=60, help="pairs of steps of each contestant")
    parser.add_argument("--only", default="", help="only contestants with this in their name")
    parser.add_argument("--model", default="", help="only models with this in their name")
    parser.add_argument("--threads", type=int, default=1, help="of torch")
    parser.add_argument("--cpu", action="store_true", help="processor time instead of wall time")
    parser.add_argument("--json", type=Path, help="write the figures there, too")
    options = parser.parse_args(arguments)
    names = [name for name in CONTESTANTS if options.only.lower() in name.lower()]
    models = [model for model in MODELS if options.model.lower() in model.lower()]
    most = STEPS // len(CONTESTANTS) - WARM_UP  # the baseline takes nearly one step beside each contestant
    if not names or not models or not 1 <= options.rounds <= most or options.threads < 1:
        print(
            f"--only is {options.only!r}, --model {options.model!r}, --rounds {options.rounds}, --threads "
            f"{options.threads}; contestants are {', '.join(CONTESTANTS)}; models {', '.join(MODELS)}; rounds 1 to "
            f"{most}, threads at least 1.",
            file=sys.stderr,
        )
        return 1
    clock = time.process_time if options.cpu else time.perf_counter
    threads, load = torch.get_num_threads(), os.getloadavg()[0]
    torch.set_num_threads(options.threads)
    try:
        figures = {model: measure(model, names, options.rounds, clock) for model in models}
    finally:
        torch.set_num_threads(threads)
    kind = "processor" if options.cpu else "wall"
    print(
        f"{kind} time; threads: {options.threads}; {options.rounds} pairs of steps, medians [quartiles]; {load:.1f} "
        f"other threads were running when it started; batches of {BATCH} from {EXAMPLES} examples; torch "
        f"{torch.__version__}.\n"
    )
    print(table(figures))
    if options.json is not None:
        plain = {model: {name: vars(figure) for name, figure in found.items()} for model, found in figures.items()}
        options.json.write_text(json.dumps(plain, indent=1) + "\n", encoding="utf-8")
    return 0


if __name__ == "__main__":
    sys.exit(main())
