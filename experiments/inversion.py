"""``python -m experiments inversion``: the image that an update was made of, computed back from the update.

    python -m experiments inversion --data-dir DIR [--out DIR]     about two minutes of one core

Each update is made of one image. The private ones come from ``PrivacyEngine.make_private``: one step, sample rate 1,
one record, clipping norm 1, with noise for ε from 10,000 down to 1. Two attacks, both in ``dpkit.audit.inversion``:

  * *read off*: the first layer of a network is linear, and its gradient holds its input (``linear_input``);
  * *search*: a convolutional network, and the image is looked for whose gradient has the same direction (``invert``
    with ``Angle``). How much smoothness it assumes is chosen for each noise, on training images that the attacker is
    taken to have.

Without a data folder scikit-learn's digits take the place of MNIST. Exit code 0; 1 for wrong input or missing data.
"""

from __future__ import annotations

import argparse
import math
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from datetime import date
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.data import DataLoader, TensorDataset

import dpkit
from dpkit.audit.inversion import Angle, correlation, inferred_label, invert, linear_input, peak_signal_to_noise
from dpkit.datasets import Split, load
from dpkit.datasets.files import folder_of
from dpkit.errors import DataError
from dpkit.report.inversion_plot import Panel, draw_inversion
from dpkit.types import Named

from .methods_page import BEGIN, END

MAX_GRAD_NORM = 1.0
DELTA = 1e-5
EPSILONS = (10_000.0, 1_000.0, 100.0, 10.0, 1.0)
SMOOTHNESS = (0.01, 0.1, 0.3, 1.0)
NEXT_TO_NO_NOISE = 1e-6
STEPS = 300


@dataclass(frozen=True)
class Setting:
    """How large the experiment is.

    Attributes:
      images: attacked test images, the first of each class in turn.
      tuning: training images on which the attacker chooses the smoothness.
      shown: images in the picture.
    """

    images: int = 10
    tuning: int = 4
    shown: int = 2
    steps: int = STEPS


@dataclass(frozen=True)
class Way:
    """A way in which the update is made: without privacy, clipped with next to no noise, or for an ε."""

    name: str
    epsilon: float | None = None
    clipped: bool = True

    @property
    def unsafe(self) -> bool:
        return self.epsilon is None


WAYS = (
    Way("no privacy", clipped=False),
    Way("clipped only"),
    *(Way(f"ε = {epsilon:,.0f}", epsilon) for epsilon in EPSILONS),
)


@dataclass(frozen=True)
class Update:
    """What an attacker sees, and what it cost. Without privacy there is no noise and no finite ε."""

    gradient: Named
    noise_multiplier: float = 0.0
    epsilon: float = math.inf


@dataclass
class Attacked:
    """One attack on one way of updating, over all images."""

    reconstructions: list[Tensor] = field(default_factory=list)
    labels: list[int] = field(default_factory=list)
    noise_multiplier: float = 0.0
    epsilon: float = math.inf
    smoothness: float | None = None


def losses(model: Any, batch: tuple[Tensor, Tensor]) -> Tensor:
    """One loss for each image."""
    inputs, labels = batch
    return F.cross_entropy(model(inputs), labels, reduction="none")


def linear_first(pixels: int, classes: int) -> nn.Module:
    """A network whose first layer is linear."""
    return nn.Sequential(nn.Flatten(), nn.Linear(pixels, 64), nn.Tanh(), nn.Linear(64, classes))


def convolutional(side: int, classes: int) -> nn.Module:
    """Two convolutions that halve the image, without pooling, then linear."""
    left = math.ceil(side / 4)
    return nn.Sequential(
        nn.Unflatten(1, (1, side)),
        nn.Conv2d(1, 12, 5, stride=2, padding=2),
        nn.Tanh(),
        nn.Conv2d(12, 12, 5, stride=2, padding=2),
        nn.Tanh(),
        nn.Flatten(),
        nn.Linear(12 * left**2, classes),
    )


def update_of(model: nn.Module, image: Tensor, label: Tensor, way: Way) -> Update:
    """The gradient of one image as it is, or as the engine releases it."""
    if not way.clipped:
        loss = losses(model, (image[None], label[None])).sum()
        named = dict(model.named_parameters())
        return Update(dict(zip(named, torch.autograd.grad(loss, list(named.values())), strict=True)))
    with tempfile.TemporaryDirectory() as folder:
        engine = dpkit.PrivacyEngine(Path(folder) / "run", dataset_name="one image")
        try:
            model, optimizer, loader = engine.make_private(
                model,
                torch.optim.SGD(model.parameters(), lr=1.0),
                DataLoader(TensorDataset(image[None], label[None]), batch_size=1),
                num_examples=1,
                target_epsilon=way.epsilon,
                noise_multiplier=NEXT_TO_NO_NOISE if way.epsilon is None else None,
                target_delta=DELTA,
                steps=1,
                max_grad_norm=MAX_GRAD_NORM,
            )
            for batch in loader:
                optimizer.zero_grad()
                engine.backward(losses(model, batch))
            # What an observer of the update sees; the step itself is left out, so that the model stays the same.
            released = {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}
            multiplier = getattr(engine.plan.mechanism, "noise_multiplier", math.nan)
            return Update(released, multiplier, engine.epsilon().upper)
        finally:
            engine.detach()
            model.zero_grad()


def read_off(update: Update, shape: Sequence[int]) -> Tensor:
    """The image from the gradient of the first, linear layer."""
    weight, bias = list(update.gradient.values())[:2]
    return linear_input(weight, bias).reshape(tuple(shape)).clamp(0, 1)


def searched(update: Update, model: nn.Module, shape: Sequence[int], smoothness: float, steps: int) -> Tensor:
    """The image whose gradient has the direction of the update."""
    return invert(
        update.gradient,
        model,
        losses,
        shape,
        generator=torch.Generator().manual_seed(0),
        matching=Angle(steps=steps, total_variation=smoothness),
    ).reconstruction


def attack(setting: Setting, data: Split) -> tuple[Tensor, dict[str, dict[str, Attacked]]]:
    """(the attacked images, attack -> way -> what was found)."""
    images, labels = first_of_each_class(data, setting.images)
    tuning_x, tuning_y = torch.from_numpy(data.train_x[: setting.tuning]), torch.from_numpy(data.train_y)
    shape = images[0].shape
    torch.manual_seed(0)
    linear = linear_first(shape.numel(), data.classes)
    convolutions = convolutional(shape[0], data.classes)
    found: dict[str, dict[str, Attacked]] = {"read off": {}, "search": {}}
    for way in WAYS:
        updates = [update_of(convolutions, image, label, way) for image, label in zip(tuning_x, tuning_y, strict=False)]

        def quality(smoothness: float, updates: list[Update] = updates) -> float:
            return statistics.fmean(
                peak_signal_to_noise(searched(update, convolutions, shape, smoothness, setting.steps), image)
                for update, image in zip(updates, tuning_x, strict=True)
            )

        smoothness = max(SMOOTHNESS, key=quality)
        found["read off"][way.name] = over(images, labels, linear, way, lambda update: read_off(update, shape))
        found["search"][way.name] = over(
            images,
            labels,
            convolutions,
            way,
            lambda update, smoothness=smoothness: searched(update, convolutions, shape, smoothness, setting.steps),
        )
        found["search"][way.name].smoothness = smoothness
        print(f"{way.name}: done", file=sys.stderr, flush=True)
    return images, found


def over(
    images: Tensor, labels: Tensor, model: nn.Module, way: Way, reconstruct: Callable[[Update], Tensor]
) -> Attacked:
    """One update and one reconstruction for each image."""
    attacked = Attacked()
    for image, label in zip(images, labels, strict=True):
        update = update_of(model, image, label, way)
        attacked.reconstructions.append(reconstruct(update))
        attacked.labels.append(inferred_label(update.gradient))
        attacked.noise_multiplier, attacked.epsilon = update.noise_multiplier, update.epsilon
    return attacked


def first_of_each_class(data: Split, count: int) -> tuple[Tensor, Tensor]:
    """``count`` test images: the first of each class, then the second of each, and so on."""
    seen = [0] * data.classes
    rank = []
    for label in data.test_y:
        rank.append((seen[label], int(label)))
        seen[label] += 1
    chosen = sorted(range(len(rank)), key=rank.__getitem__)[:count]
    return torch.from_numpy(data.test_x[chosen]), torch.from_numpy(data.test_y[chosen])


# -- the page ---------------------------------------------------------------------------------------------------------


def page(
    name: str,
    setting: Setting,
    data: Split,
    images: Tensor,
    found: dict[str, dict[str, Attacked]],
    seconds: float,
    by_hand: str,
) -> str:
    """Markdown with every number that was measured, and what was written by hand on an earlier page."""
    _, labels = first_of_each_class(data, setting.images)
    heads = ["update", "noise multiplier", "ε of the update", "read off: PSNR", "correlation", "search: PSNR"]
    heads += ["correlation", "smoothness", "labels found"]
    rows = []
    for way in WAYS:
        linear, search = found["read off"][way.name], found["search"][way.name]
        right = sum(
            guess == truth
            for each in (linear, search)
            for guess, truth in zip(each.labels, labels.tolist(), strict=True)
        )
        rows.append(
            [
                f"**{way.name}**" if way.unsafe else way.name,
                f"{search.noise_multiplier:.3g}",
                f"{search.epsilon:.4g}",
                *decibels_and_correlation(linear, images),
                *decibels_and_correlation(search, images),
                f"{search.smoothness:g}",
                f"{right} of {2 * len(labels)}",
            ]
        )
    mean_image = torch.from_numpy(data.train_x).mean(0)
    blind = [("black image", torch.zeros_like(images[0])), ("mean of the training images", mean_image)]
    without = [[guess, *decibels_and_correlation(Attacked([image] * len(images)), images)] for guess, image in blind]
    smallest, largest = f"{EPSILONS[-1]:g}", f"{EPSILONS[0]:,.0f}"
    parts = [
        "# The image behind an update",
        f"`python -m experiments inversion`, {date.today()}, one thread, {seconds:.0f} s of processor time. {name}, "
        f"{len(images)} test images, one update of one image each, at untrained weights; ε from {largest} to "
        f"{smallest}. Mean over the images (smallest to largest). Clipping norm {MAX_GRAD_NORM:g}, δ = {DELTA:g}, "
        "add/remove, one step at sample rate 1, through `PrivacyEngine.make_private`. Noise comes from the operating "
        "system: numbers move a little from run to run.",
        "![Originals and reconstructions](inversion.png)",
        "Red frames and bold rows: no noise that protects. *Clipped only* is the engine with noise multiplier "
        f"{NEXT_TO_NO_NOISE:g}, as it has no way to leave the noise out.",
        table(heads, rows),
        "What guesses reach that have seen no update at all:",
        table(["guess", "PSNR", "correlation"], without),
        f"{BEGIN}\n\n{by_hand}\n\n{END}",
        "## How to read it",
        "PSNR in decibels, higher is closer. *Read off* is `linear_input` on a network whose first layer is linear; "
        "*search* is `invert` with `Angle` on a convolutional network, with the smoothness (weight of the total "
        f"variation) that was best on {setting.tuning} other images at the same noise. *Labels found*: by the smallest "
        f"entry of the last bias' gradient, both networks; one in {data.classes} by chance.",
        "**These are attacks, not bounds.** Where one fails, a better one, a better prior, or more than one update may "
        "succeed; what holds for all of them is ε. And ε is about less than a picture: at ε = 100 these attacks see "
        "little, while somebody with two candidate images of different classes could tell from the same update, nearly "
        "without error, which of them it was. A real run has many images in a batch, which makes inversion harder, and "
        "many steps, which makes it easier; neither is in this experiment.",
    ]
    return "\n\n".join(parts) + "\n"


def decibels_and_correlation(attacked: Attacked, images: Tensor) -> list[str]:
    pairs = list(zip(attacked.reconstructions, images, strict=True))
    noise = [peak_signal_to_noise(one, other) for one, other in pairs]
    alike = [correlation(one, other) for one, other in pairs]
    return [
        "exact" if min(noise) == math.inf else f"{statistics.fmean(noise):.1f} ({min(noise):.1f} to {max(noise):.1f})",
        f"{statistics.fmean(alike):.3f}",
    ]


def table(heads: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    return "\n".join(f"| {' | '.join(line)} |" for line in (heads, ["---"] * len(heads), *rows))


def picture(setting: Setting, images: Tensor, found: dict[str, dict[str, Attacked]]) -> bytes:
    """Originals and reconstructions, with PSNR and ε under each."""
    rows = []
    for index in range(min(setting.shown, len(images))):
        for name, by_way in found.items():
            blind = peak_signal_to_noise(torch.zeros_like(images[index]), images[index])
            panels = [Panel(images[index].numpy(), f"trained on this\n(all black: {blind:.1f} dB)")]
            for way in WAYS:
                each = by_way[way.name]
                decibels = peak_signal_to_noise(each.reconstructions[index], images[index])
                cost = "no privacy" if each.epsilon == math.inf else f"ε = {shown(each.epsilon)}"
                close = "exact" if decibels == math.inf else f"{decibels:.1f} dB"
                panels.append(Panel(each.reconstructions[index].numpy(), f"{cost}\n{close}", unsafe=way.unsafe))
            rows.append((name, panels))
    columns = ["original", *("clipped only,\nUNSAFE" if w.clipped and w.unsafe else w.name for w in WAYS)]
    columns[1] = "raw gradient,\nUNSAFE"
    title = f"One image, one update: what an attacker computes back from it (δ = {DELTA:g})"
    return draw_inversion(columns, rows, title)


def shown(epsilon: float) -> str:
    return f"{epsilon:,.0f}" if epsilon < 1e6 else f"{epsilon:.0e}".replace("e+", "e")


def main(arguments: list[str] | None = None) -> int:
    """The command; returns the exit code."""
    parser = argparse.ArgumentParser(prog="python -m experiments inversion", description="Images from updates.")
    parser.add_argument("--data-dir", type=Path, help="folder of the data files; left out, the variable DPKIT_DATA")
    parser.add_argument("--out", type=Path, default=Path(__file__).with_name("results"), help="folder of the page")
    options = parser.parse_args(arguments)
    begun = time.process_time()
    try:
        name = "MNIST"
        try:
            folder_of(options.data_dir)
        except DataError:
            name = "scikit-learn's digits"
            print(
                "no data folder is known (--data-dir or DPKIT_DATA): the digits of scikit-learn are used",
                file=sys.stderr,
            )
        data = load("mnist" if name == "MNIST" else "digits", options.data_dir)
        try:
            options.out.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise DataError(f"{options.out} cannot be made ({error.strerror}); give another --out.") from None
    except DataError as error:
        print(error, file=sys.stderr)
        return 1
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        images, found = attack(Setting(), data)
    finally:
        torch.set_num_threads(threads)
    (options.out / "inversion.png").write_bytes(picture(Setting(), images, found))
    path = options.out / "inversion.md"
    old = path.read_text(encoding="utf-8") if path.exists() else ""
    by_hand = old.partition(BEGIN)[2].partition(END)[0].strip() or "(To be written after the run.)"
    text = page(name, Setting(), data, images, found, time.process_time() - begun, by_hand)
    path.write_text(text, encoding="utf-8")
    print(f"wrote {path}", file=sys.stderr)
    return 0


if __name__ == "__main__":
    sys.exit(main())
