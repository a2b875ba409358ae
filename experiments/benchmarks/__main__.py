"""``python -m experiments.benchmarks``: what privacy costs in time, as ratios to the plain training step.

Every ratio is the median of interleaved runs in one process, so that what else the machine does hits both sides. The
columns: the core (forward, backward, clipped sum), the whole step (core, noise, charge, optimizer, loader), and one
checkpoint, durable on the disk, in milliseconds.
"""

from __future__ import annotations

import statistics
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import torch
from rich.console import Console
from rich.table import Table
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.data import DataLoader, TensorDataset

import dpkit
from dpkit.gradients import ghost

ROUNDS = 30
WARM_UP = 5


def mlp() -> nn.Module:
    return nn.Sequential(nn.Linear(784, 1024), nn.ReLU(), nn.Linear(1024, 1024), nn.ReLU(), nn.Linear(1024, 10))


def tanh_cnn() -> nn.Module:
    return nn.Sequential(
        *(nn.Conv2d(1, 16, 8, stride=2, padding=2), nn.Tanh(), nn.MaxPool2d(2, 1)),
        *(nn.Conv2d(16, 32, 4, stride=2), nn.Tanh(), nn.MaxPool2d(2, 1)),
        *(nn.Flatten(), nn.Linear(512, 32), nn.Tanh(), nn.Linear(32, 10)),
    )


def group_norm_cnn() -> nn.Module:
    width = 32
    return nn.Sequential(
        *(nn.Conv2d(3, width, 3, padding=1), nn.GroupNorm(8, width), nn.ReLU()),
        *(nn.Conv2d(width, 2 * width, 3, stride=2, padding=1), nn.GroupNorm(8, 2 * width), nn.ReLU()),
        *(nn.Conv2d(2 * width, 4 * width, 3, stride=2, padding=1), nn.GroupNorm(8, 4 * width), nn.ReLU()),
        *(nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(4 * width, 10)),
    )


def tiny() -> nn.Module:
    return nn.Sequential(nn.Linear(64, 64), nn.ReLU(), nn.Linear(64, 10))


WORKLOADS: dict[str, tuple[Callable[[], nn.Module], tuple[int, ...], int]] = {
    "MLP 784-1024-1024-10, B=256": (mlp, (784,), 256),
    "tanh CNN, 28x28, B=256": (tanh_cnn, (1, 28, 28), 256),
    "GroupNorm CNN w=32, 32x32, B=64": (group_norm_cnn, (3, 32, 32), 64),
    "tiny MLP 64-64-10, B=32": (tiny, (64,), 32),
}


def losses_of(model: nn.Module, batch: tuple[Tensor, Tensor]) -> Tensor:
    return F.cross_entropy(model(batch[0]), batch[1], reduction="none")


def timed(run: Callable[[], object]) -> float:
    start = time.perf_counter()
    run()
    return time.perf_counter() - start


def measure(make: Callable[[], nn.Module], shape: tuple[int, ...], size: int, folder: Path) -> dict[str, float]:
    """Median seconds of the plain step, and median ratios of the private ones to the plain step beside them."""
    torch.manual_seed(0)
    x, y = torch.randn(size, *shape), torch.randint(0, 10, (size,))
    plain = make()
    optimizer = torch.optim.SGD(plain.parameters(), lr=1e-3)

    def plain_core() -> None:
        optimizer.zero_grad()
        losses_of(plain, (x, y)).mean().backward()

    def private_core() -> None:
        gradients, _ = ghost.per_sample(plain, losses_of, (x, y), size)
        norms = torch.stack(list(gradients.sq_norms().values())).sum(0).sqrt()
        factors = (1.0 / norms).clamp(max=1.0).float()
        dict(gradients.weighted_sum({name: factors for name, _ in plain.named_parameters()}))

    model = make()
    private_optimizer = torch.optim.SGD(model.parameters(), lr=1e-3)
    engine = dpkit.PrivacyEngine(folder)
    data = TensorDataset(torch.randn(8 * size, *shape), torch.randint(0, 10, (8 * size,)))
    _, _, loader = engine.make_private(
        model,
        private_optimizer,
        DataLoader(data, batch_size=size),
        num_examples=8 * size,
        noise_multiplier=1.0,
        target_delta=1e-5,
        steps=10_000,
        max_grad_norm=1.0,
    )

    def batches():
        while True:
            yield from loader

    stream = batches()
    plain_stream = iter(DataLoader(data, batch_size=size, shuffle=True))

    def plain_loop() -> None:
        nonlocal plain_stream
        batch = next(plain_stream, None)
        if batch is None:
            plain_stream = iter(DataLoader(data, batch_size=size, shuffle=True))
            batch = next(plain_stream)
        optimizer.zero_grad()
        losses_of(plain, batch).mean().backward()
        optimizer.step()

    def private_loop() -> None:
        batch = next(stream)
        private_optimizer.zero_grad()
        engine.backward(losses_of(model, batch))
        private_optimizer.step()

    core, whole, seconds, saves = [], [], [], []
    for number in range(WARM_UP + ROUNDS):
        base, private = timed(plain_core), timed(private_core)
        base_loop, private_loop_seconds = timed(plain_loop), timed(private_loop)
        if number >= WARM_UP:
            seconds.append(base)
            core.append(private / base)
            whole.append(private_loop_seconds / base_loop)
        if number >= ROUNDS:  # the last few: a checkpoint is rare
            saves.append(timed(engine.save))
    return {
        "plain ms": 1e3 * statistics.median(seconds),
        "core ratio": statistics.median(core),
        "whole ratio": statistics.median(whole),
        "save ms": 1e3 * statistics.median(saves),
    }


def main() -> None:
    table = Table("workload", "plain step, ms", "core / plain", "whole step / plain loop", "checkpoint, ms")
    with tempfile.TemporaryDirectory() as folder:
        for number, (name, workload) in enumerate(WORKLOADS.items()):
            row = measure(*workload, folder=Path(folder) / str(number))
            table.add_row(
                name,
                f"{row['plain ms']:.2f}",
                f"{row['core ratio']:.2f}",
                f"{row['whole ratio']:.2f}",
                f"{row['save ms']:.1f}",
            )
    Console(width=120).print(table)


if __name__ == "__main__":
    main()
