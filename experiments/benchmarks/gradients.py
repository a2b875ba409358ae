"""``python -m experiments.benchmarks.gradients``: what per-sample clipping costs, beside the step without privacy.

What is measured:

* *core*: forward, backward and the clipped sum against forward and backward. Every contestant of a workload takes its
  turn in every round of one process; a ratio is the median, over the rounds, of its time divided by that of the
  non-private step of the same round, so that what else the machine does hits both. Quartiles stand beside it.
* *memory*: the largest resident memory of a fresh process within its first three steps, above what it held when model
  and data were there; on a GPU, that of the allocator.
* *faults*: minor page faults of the later of these steps.
* *overhead*: what the contestant takes longer than the non-private step, for each trainable tensor (tiny models, which
  have one thread).
* *whole step*: the loop of ``make_private`` with loader, core, charge on the disk, noise and optimizer, against the
  plain loop with its loader and optimizer.

Two threads that wait for each other on two busy cores lose whole time slices: where other programs run, measure with
``--threads 1``. The headline tells the load before the start.

All contestants get one loss per example, the same weights and the same synthetic data; models are built from
configurations with random weights and nothing is downloaded. A clipped sum whose norm is not that of vmap is marked.
For Opacus, modules that it does not support are replaced by its own (``ModuleValidator.fix``), and positions are looked
up once for each example, as it needs.
"""

from __future__ import annotations

import contextlib
import ctypes
import gc
import json
import logging
import math
import os
import platform
import resource
import statistics
import subprocess
import sys
import tempfile
import time
import warnings
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass, replace
from functools import partial
from importlib.metadata import PackageNotFoundError, version
from itertools import pairwise
from pathlib import Path
from typing import Annotated, Any

import torch
import typer
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.data import DataLoader, TensorDataset

import dpkit
from dpkit import clipping
from dpkit.engine.step import ClippedAccumulator
from dpkit.gradients import trainable

ROOT = Path(__file__).resolve().parents[2]
RESULTS = Path(__file__).with_name("RESULTS.md")

BOUND = 1.0  # clipping norm
WARM_UP = 3
FRESH_STEPS = 3
AT_LEAST = 0.03  # seconds of one contestant in one round
MOST_REPEATS = 50
MOST_SECONDS = (
    20.0  # of one contestant in one workload: a slow one takes its turn in the first rounds only, three at least
)
SAME = 1e-3  # relative difference of two norms that float32 explains
MEBIBYTE = 1 << 20

Batch = tuple[Tensor, Tensor]
Step = Callable[[], list[Tensor]]
"""One step of a contestant; returns its clipped sum, nothing if it does not clip."""


# -- models -----------------------------------------------------------------------------------------------------------


def mlp(*widths: int) -> nn.Module:
    layers: list[nn.Module] = []
    for fan_in, fan_out in pairwise(widths):
        layers += [nn.Linear(fan_in, fan_out), nn.ReLU()]
    return nn.Sequential(*layers[:-1])


def cnn(width: int) -> nn.Module:
    """Six convolutions with GroupNorm, at three resolutions."""

    def block(fan_in: int, fan_out: int, stride: int) -> list[nn.Module]:
        return [nn.Conv2d(fan_in, fan_out, 3, stride, padding=1), nn.GroupNorm(8, fan_out), nn.ReLU()]

    return nn.Sequential(
        *(*block(3, width, 1), *block(width, width, 1)),
        *(*block(width, 2 * width, 2), *block(2 * width, 2 * width, 1)),
        *(*block(2 * width, 4 * width, 2), *block(4 * width, 4 * width, 1)),
        *(nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(4 * width, 10)),
    )


class Residual(nn.Module):
    """The basic block of ResNet-18, with GroupNorm."""

    def __init__(self, fan_in: int, fan_out: int, stride: int) -> None:
        super().__init__()
        self.first = nn.Conv2d(fan_in, fan_out, 3, stride, padding=1, bias=False)
        self.first_norm = nn.GroupNorm(32, fan_out)
        self.second = nn.Conv2d(fan_out, fan_out, 3, padding=1, bias=False)
        self.second_norm = nn.GroupNorm(32, fan_out)
        self.shortcut = nn.Sequential()
        if stride != 1 or fan_in != fan_out:
            self.shortcut = nn.Sequential(nn.Conv2d(fan_in, fan_out, 1, stride, bias=False), nn.GroupNorm(32, fan_out))

    def forward(self, x: Tensor) -> Tensor:
        y = F.relu(self.first_norm(self.first(x)))
        return F.relu(self.second_norm(self.second(y)) + self.shortcut(x))


def resnet18() -> nn.Module:
    """As for CIFAR: a stem of 3x3 and no pooling before the blocks."""
    blocks = [
        Residual(fan_in, fan_out, stride)
        for fan_in, fan_out, stride in [
            *((64, 64, 1), (64, 64, 1), (64, 128, 2), (128, 128, 1)),
            *((128, 256, 2), (256, 256, 1), (256, 512, 2), (512, 512, 1)),
        ]
    ]
    stem = [nn.Conv2d(3, 64, 3, padding=1, bias=False), nn.GroupNorm(32, 64), nn.ReLU()]
    return nn.Sequential(*stem, *blocks, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(512, 10))


class GPTBlock(nn.Module):
    """Pre-norm: causal self-attention, then a feed-forward layer of four times the width."""

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.attention_norm = nn.LayerNorm(width)
        self.qkv = nn.Linear(width, 3 * width)
        self.mix = nn.Linear(width, width)
        self.feed_norm = nn.LayerNorm(width)
        self.up = nn.Linear(width, 4 * width)
        self.down = nn.Linear(4 * width, width)

    def forward(self, x: Tensor) -> Tensor:
        rows, length, width = x.shape
        qkv = self.qkv(self.attention_norm(x)).view(rows, length, 3, self.heads, width // self.heads)
        query, key, value = qkv.permute(2, 0, 3, 1, 4)
        mixed = F.scaled_dot_product_attention(query, key, value, is_causal=True)
        x = x + self.mix(mixed.transpose(1, 2).reshape(rows, length, width))
        return x + self.down(F.gelu(self.up(self.feed_norm(x))))


class GPT(nn.Module):
    """A decoder with learned positions and a head of its own."""

    def __init__(self, width: int, layers: int, length: int, vocabulary: int, heads: int) -> None:
        super().__init__()
        self.tokens = nn.Embedding(vocabulary, width)
        self.positions = nn.Embedding(length, width)
        self.blocks = nn.Sequential(*(GPTBlock(width, heads) for _ in range(layers)))
        self.norm = nn.LayerNorm(width)
        self.head = nn.Linear(width, vocabulary, bias=False)
        self.repeat_positions = False

    def forward(self, ids: Tensor) -> Tensor:
        positions = torch.arange(ids.shape[1], device=ids.device)
        if self.repeat_positions:
            positions = positions.repeat(ids.shape[0], 1)
        return self.head(self.norm(self.blocks(self.tokens(ids) + self.positions(positions))))


class HuggingFace(nn.Module):
    """A model of transformers as a function of one tensor."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model
        self.repeat_positions = False

    def forward(self, x: Tensor) -> Tensor:
        repeated = {}
        if self.repeat_positions and not x.is_floating_point():
            repeated["position_ids"] = torch.arange(x.shape[1], device=x.device).repeat(x.shape[0], 1)
        return self.model(x, **repeated).logits


def bert() -> nn.Module:
    from transformers import BertConfig, BertForSequenceClassification

    config = BertConfig(
        vocab_size=2000,
        hidden_size=256,
        num_hidden_layers=4,
        num_attention_heads=4,
        intermediate_size=1024,
        max_position_embeddings=128,
        hidden_dropout_prob=0.0,
        attention_probs_dropout_prob=0.0,
        num_labels=10,  # pyright: ignore[reportCallIssue]
    )
    return HuggingFace(BertForSequenceClassification(config))


def vit(width: int, layers: int, heads: int, side: int, patch: int) -> nn.Module:
    from transformers import ViTConfig, ViTForImageClassification

    config = ViTConfig(
        hidden_size=width,
        num_hidden_layers=layers,
        num_attention_heads=heads,
        intermediate_size=4 * width,
        image_size=side,
        patch_size=patch,
        hidden_dropout_prob=0.0,
        attention_probs_dropout_prob=0.0,
        num_labels=10,  # pyright: ignore[reportCallIssue]
    )
    return HuggingFace(ViTForImageClassification(config))


def llama_lora() -> nn.Module:
    from peft import LoraConfig, get_peft_model
    from transformers import LlamaConfig, LlamaForCausalLM

    config = LlamaConfig(
        vocab_size=8000,
        hidden_size=512,
        num_hidden_layers=4,
        num_attention_heads=8,
        num_key_value_heads=8,
        intermediate_size=1376,
        max_position_embeddings=128,
        use_cache=False,
    )
    lora = LoraConfig(r=8, lora_alpha=16, lora_dropout=0.0, target_modules=["q_proj", "v_proj"])
    return HuggingFace(get_peft_model(LlamaForCausalLM(config), lora))  # pyright: ignore[reportArgumentType]


class Encoder(nn.Module):
    """torch's own TransformerEncoder, a mean over the sequence, a linear classifier."""

    def __init__(self, width: int, layers: int) -> None:
        super().__init__()
        layer = nn.TransformerEncoderLayer(width, 4, 4 * width, dropout=0.0, batch_first=True)
        self.encoder = nn.TransformerEncoder(layer, layers, enable_nested_tensor=False)
        self.head = nn.Linear(width, 10)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.encoder(x).mean(1))


class Recurrent(nn.Module):
    """An LSTM, and a linear classifier of its last output."""

    def __init__(self, fan_in: int, width: int) -> None:
        super().__init__()
        self.lstm = nn.LSTM(fan_in, width, batch_first=True)
        self.head = nn.Linear(width, 10)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.lstm(x)[0][:, -1])


# -- workloads --------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Workload:
    """A model, and batches for it.

    Attributes:
      inputs, targets: make so many rows; targets of several axes are one class per position.
      target: largest ratio that the flat core is to have; None where there is none.
      tiny: its overhead per tensor is shown.
      needs_gpu: too large for a CPU; in bfloat16 by autocast.
    """

    name: str
    model: Callable[[], nn.Module]
    size: int
    inputs: Callable[[int], Tensor]
    targets: Callable[[int], Tensor]
    target: float | None = None
    tiny: bool = False
    needs_gpu: bool = False

    def make(self, device: str) -> nn.Module:
        torch.manual_seed(0)
        return self.model().train().to(device)

    def batch(self, device: str, rows: int | None = None) -> Batch:
        torch.manual_seed(1)
        rows = self.size if rows is None else rows
        return self.inputs(rows).to(device), self.targets(rows).to(device)

    def losses(self, model: nn.Module, batch: Batch) -> Tensor:
        """One per example: the cross-entropy, of a sequence its mean."""
        x, y = batch
        with torch.autocast(x.device.type, torch.bfloat16, enabled=self.needs_gpu):
            scores = model(x)
        if y.dim() == 1:
            return F.cross_entropy(scores.float(), y, reduction="none")
        losses = F.cross_entropy(scores.flatten(0, 1).float(), y.flatten(), reduction="none")
        return losses.view(y.shape).mean(1)


def numbers(*shape: int) -> Callable[[int], Tensor]:
    return lambda rows: torch.randn(rows, *shape)


def classes(count: int, *shape: int) -> Callable[[int], Tensor]:
    return lambda rows: torch.randint(0, count, (rows, *shape))


def gpt(name: str, width: int, layers: int, length: int, size: int, vocabulary: int, **more: Any) -> Workload:
    heads = max(4, width // 64)
    words = classes(vocabulary, length)
    return Workload(name, partial(GPT, width, layers, length, vocabulary, heads), size, words, words, **more)


WORKLOADS = [
    Workload("MLP 784-1024-1024-10 B=256", partial(mlp, 784, 1024, 1024, 10), 256, numbers(784), classes(10), 1.10),
    Workload("CNN w=32 B=64 32px", partial(cnn, 32), 64, numbers(3, 32, 32), classes(10), 1.35),
    Workload("ResNet-18 GroupNorm B=32 32px", resnet18, 32, numbers(3, 32, 32), classes(10), 1.20),
    gpt("GPT d=256 L=4 T=128 B=16 V=2000", 256, 4, 128, 16, 2000, target=1.10),
    gpt("GPT d=256 L=2 T=512 B=8 V=2000", 256, 2, 512, 8, 2000, target=1.10),
    gpt("GPT d=512 L=2 T=64 B=16 V=8000", 512, 2, 64, 16, 8000, target=1.10),
    Workload("HF BERT d=256 L=4 T=128 B=16", bert, 16, classes(2000, 128), classes(10), 1.10),
    Workload("HF ViT d=192 L=4 32px/4 B=32", partial(vit, 192, 4, 3, 32, 4), 32, numbers(3, 32, 32), classes(10), 1.20),
    Workload("Llama d=512 L=4 LoRA r=8 T=128 B=8", llama_lora, 8, classes(8000, 128), classes(8000, 128), 1.05),
    Workload(
        "TransformerEncoder d=256 L=2 T=64 B=16", partial(Encoder, 256, 2), 16, numbers(64, 256), classes(10), 1.25
    ),
    Workload("LSTM 128-256 T=64 B=32", partial(Recurrent, 128, 256), 32, numbers(64, 128), classes(10), 2.0),
    Workload("tiny MLP 64-64-10 B=32", partial(mlp, 64, 64, 10), 32, numbers(64), classes(10), tiny=True),
    gpt("tiny GPT d=64 L=2 T=32 B=8 V=64", 64, 2, 32, 8, 64, tiny=True),
    gpt("GPT-2-small-like bf16 d=768 L=12 T=512 B=8 V=50257", 768, 12, 512, 8, 50257, needs_gpu=True),
    Workload(
        "ViT-B-like bf16 d=768 L=12 224px/16 B=64",
        partial(vit, 768, 12, 12, 224, 16),
        64,
        numbers(3, 224, 224),
        classes(10),
        needs_gpu=True,
    ),
]


# -- contestants ------------------------------------------------------------------------------------------------------


def plain(workload: Workload, model: nn.Module, batch: Batch) -> Step:
    def step() -> list[Tensor]:
        model.zero_grad(set_to_none=True)
        workload.losses(model, batch).mean().backward()
        return []

    return step


def accumulator(workload: Workload, model: nn.Module, clip: clipping.ClipRule) -> Callable[[], ClippedAccumulator]:
    """Makes what the engine makes for every batch."""
    plan = dpkit.Plan(
        sampler=dpkit.Poisson(0.01),
        clip=clip,
        mechanism=dpkit.Gaussian(1.0),
        steps=1000,
        num_examples=100 * workload.size,
        delta=1e-5,
    )
    parameters: dict[str, Tensor] = dict(trainable(model))
    state = clip.init(plan.setting(parameters))

    def fresh() -> ClippedAccumulator:
        made = ClippedAccumulator(plan, state, parameters, 1)
        made.open(workload.size)
        return made

    return fresh


def by_ghost(workload: Workload, model: nn.Module, batch: Batch, clip: clipping.ClipRule) -> Step:
    """The default backend; a rule that can is applied layer after layer inside the backward pass."""
    fresh = accumulator(workload, model, clip)
    # As the engine's probe does before the first step: where the examples are in tensors that are not batch-first.
    rows = workload.batch(batch[0].device.type, 4)
    others = [tuple(replaced(tensor, row) for tensor in rows) for row in (0, 3)]
    dpkit.ghost.observe(model, workload.losses, [rows, *others], (0, 3), 4)

    def step() -> list[Tensor]:
        sums = fresh()
        gradients, losses = dpkit.ghost.per_sample(model, workload.losses, batch, workload.size, consumer=sums.consumer)
        sums.add(gradients, losses)
        return list(sums.result().queries[0].value.values())

    return step


def replaced(tensor: Tensor, row: int) -> Tensor:
    """With other values in one row."""
    other = tensor.clone()
    other[row] = tensor[row].flip(-1) if tensor.dim() > 1 else tensor[row - 1]
    return other


def by_vmap(workload: Workload, model: nn.Module, batch: Batch) -> Step:
    """The second backend: the whole model under vmap."""
    fresh = accumulator(workload, model, clipping.Flat(BOUND))

    def step() -> list[Tensor]:
        sums = fresh()
        sums.add(*dpkit.vmap.per_sample(model, workload.losses, batch, workload.size))
        return list(sums.result().queries[0].value.values())

    return step


def for_opacus(model: nn.Module) -> nn.Module:
    """With Opacus' own modules in place of those that it does not support, and one row of positions per example."""
    from opacus.validators import ModuleValidator

    device = next(model.parameters()).device
    for module in model.modules():
        if hasattr(module, "repeat_positions"):
            module.repeat_positions = True  # pyright: ignore[reportArgumentType]
    return model if ModuleValidator.is_valid(model) else ModuleValidator.fix(model).train().to(device)


def opacus_instances(workload: Workload, model: nn.Module, batch: Batch, kind: str) -> Step:
    """Per-sample gradients written out: by hooks, by functorch, or by torch's expanded weights."""
    from opacus.grad_sample import GradSampleModule, GradSampleModuleExpandedWeights
    from opacus.optimizers import DPOptimizer

    model = for_opacus(model)
    if kind == "ew":
        wrapped = GradSampleModuleExpandedWeights(model)
    else:
        wrapped = GradSampleModule(model, force_functorch=kind == "functorch")
    parameters = list(trainable(model).values())
    optimizer = DPOptimizer(
        torch.optim.SGD(parameters, lr=1e-3),
        noise_multiplier=0.0,
        max_grad_norm=BOUND,
        expected_batch_size=workload.size,
    )

    def step() -> list[Tensor]:
        optimizer.zero_grad(set_to_none=True)
        workload.losses(wrapped, batch).mean().backward()
        optimizer.clip_and_accumulate()
        return [p.summed_grad for p in parameters]  # pyright: ignore[reportAttributeAccessIssue]

    return step


def opacus_ghost(workload: Workload, model: nn.Module, batch: Batch) -> Step:
    from opacus.grad_sample import GradSampleModuleFastGradientClipping
    from opacus.optimizers import DPOptimizerFastGradientClipping
    from opacus.utils.fast_gradient_clipping_utils import DPTensorFastGradientClipping

    model = for_opacus(model)
    wrapped = GradSampleModuleFastGradientClipping(model, max_grad_norm=BOUND, use_ghost_clipping=True)  # pyright: ignore
    parameters = list(trainable(model).values())
    optimizer = DPOptimizerFastGradientClipping(
        torch.optim.SGD(parameters, lr=1e-3),
        noise_multiplier=0.0,
        max_grad_norm=BOUND,
        expected_batch_size=workload.size,
    )

    def step() -> list[Tensor]:
        optimizer.zero_grad(set_to_none=True)
        DPTensorFastGradientClipping(wrapped, optimizer, workload.losses(wrapped, batch)).backward()
        return [p.grad for p in parameters if p.grad is not None]

    return step


PLAIN, FLAT, PER_LAYER, VMAP = "non-private", "dpkit flat", "dpkit per-layer", "dpkit vmap"
OPACUS = ("Opacus hooks", "Opacus ghost", "Opacus functorch", "Opacus ew")
CONTESTANTS: dict[str, Callable[[Workload, nn.Module, Batch], Step]] = {
    PLAIN: plain,
    FLAT: partial(by_ghost, clip=clipping.Flat(BOUND)),
    PER_LAYER: partial(by_ghost, clip=clipping.PerLayer(BOUND)),
    OPACUS[0]: partial(opacus_instances, kind="hooks"),
    OPACUS[1]: opacus_ghost,
    OPACUS[2]: partial(opacus_instances, kind="functorch"),
    OPACUS[3]: partial(opacus_instances, kind="ew"),
    VMAP: by_vmap,
}


# -- measuring --------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Row:
    """What came of one contestant in one workload.

    Attributes:
      note: why there is no time, or what is wrong with it.
      memory: MiB above model and data at the peak; ``faults``: minor page faults of a step; both in a fresh process.
      faults_here: the same beside the other contestants, whose blocks of memory come and go.
      overhead: microseconds per trainable tensor.
    """

    milliseconds: float | None = None
    ratio: float | None = None
    quartiles: tuple[float, float] | None = None
    memory: float | None = None
    faults: float | None = None
    faults_here: float | None = None
    overhead: float | None = None
    note: str = ""


def page_faults() -> int:
    return resource.getrusage(resource.RUSAGE_SELF).ru_minflt


def again(step: Step, repeats: int) -> None:
    for _ in range(repeats):
        step()


def timed(run: Callable[[], object], device: str) -> float:
    start = time.perf_counter()
    run()
    if device == "cuda":
        torch.cuda.synchronize()
    return time.perf_counter() - start


def refusal(error: Exception) -> str:
    """One line that says who refused what."""
    words = " ".join(str(error).split()).replace("|", "/")
    return f"refused: {words or type(error).__name__}"


def measure(workload: Workload, names: list[str], rounds: int, device: str) -> dict[str, Row]:
    """The core of every contestant; the non-private one is the first."""
    rows: dict[str, Row] = {}
    steps: dict[str, tuple[Step, int, int]] = {}
    norms: dict[str, float] = {}
    batch = workload.batch(device)
    for name in names:
        try:
            step = CONTESTANTS[name](workload, workload.make(device), batch)
            norms[name] = math.sqrt(sum(float(part.double().square().sum()) for part in step()))
            once = timed(step, device)
            if once < MOST_SECONDS / 10:
                once = min(once, *(timed(step, device) for _ in range(WARM_UP - 1)))
        except Exception as error:  # whatever a library cannot do
            if name == PLAIN:
                raise
            rows[name] = Row(note=refusal(error))
            continue
        repeats = max(1, min(MOST_REPEATS, round(AT_LEAST / once)))
        steps[name] = step, repeats, rounds if name == PLAIN else max(2, int(MOST_SECONDS / once / repeats))
    gc.collect()
    seconds: dict[str, list[float]] = {name: [] for name in steps}
    faults: dict[str, list[float]] = {name: [] for name in steps}
    for number_of_round in range(rounds):
        for name, (step, repeats, most_rounds) in steps.items():
            if number_of_round < most_rounds:
                before = page_faults()
                seconds[name].append(timed(partial(again, step, repeats), device) / repeats)
                faults[name].append((page_faults() - before) / repeats)
    tensors = len(trainable(workload.make(device)))
    for name in steps:
        ratios = [own / base for own, base in zip(seconds[name], seconds[PLAIN], strict=False)]
        longer = [own - base for own, base in zip(seconds[name], seconds[PLAIN], strict=False)]
        rows[name] = Row(
            milliseconds=1e3 * statistics.median(seconds[name]),
            ratio=statistics.median(ratios),
            quartiles=quartiles(ratios),
            faults_here=statistics.median(faults[name]),
            overhead=1e6 * statistics.median(longer) / tensors,
            note=disagreement(name, norms),
        )
    return {name: rows[name] for name in names}


def quartiles(values: list[float]) -> tuple[float, float]:
    if len(values) < 2:
        return values[0], values[0]
    lower, _, upper = statistics.quantiles(values, n=4, method="inclusive")
    return lower, upper


def disagreement(name: str, norms: dict[str, float]) -> str:
    """Whether the norm of the clipped sum is another than that of vmap, which knows no operations."""
    if name in (PLAIN, PER_LAYER) or VMAP not in norms:
        return ""
    off = abs(norms[name] / norms[VMAP] - 1)
    return "" if off < SAME else f"its clipped sum has a norm {100 * off:.1f} % off that of vmap"


class Fresh:
    """A process of its own for one contestant: memory and page faults without the blocks of the others."""

    @staticmethod
    def ask(workload: Workload, name: str, device: str, threads: int) -> dict[str, float]:
        """Start the process; empty if it found nothing out."""
        command = [sys.executable, "-m", "experiments.benchmarks.gradients", "--device", device]
        command += ["--threads", str(threads), "--fresh", f"{workload.name}/{name}"]
        done = subprocess.run(command, check=False, capture_output=True, text=True, cwd=ROOT)
        last = done.stdout.strip().rpartition("\n")[2]
        return json.loads(last) if done.returncode == 0 and last.startswith("{") else {}

    @staticmethod
    def answer(workload: Workload, name: str, device: str) -> dict[str, float]:
        """What the process does."""
        small = next(each for each in WORKLOADS if each.tiny)
        with contextlib.suppress(Exception):  # so that modules that are loaded on first use are no part of the memory
            CONTESTANTS[name](small, small.make(device), small.batch(device))()
        step = CONTESTANTS[name](workload, workload.make(device), workload.batch(device))
        gc.collect()
        base = Fresh.reset_peak(device)
        faults = []
        for _ in range(FRESH_STEPS):
            before = page_faults()
            step()
            faults.append(page_faults() - before)
        memory = (Fresh.peak(device) - base) / MEBIBYTE
        return {"memory": memory, "faults": statistics.mean(faults[1:])}

    @staticmethod
    def reset_peak(device: str) -> int:
        """The bytes that are held now, and from here on the peak starts again."""
        if device == "cuda":
            torch.cuda.reset_peak_memory_stats()
            return torch.cuda.memory_allocated()
        ctypes.CDLL(None).malloc_trim(0)
        Path("/proc/self/clear_refs").write_text("5", encoding="ascii")
        return Fresh.resident("VmRSS")

    @staticmethod
    def peak(device: str) -> int:
        return torch.cuda.max_memory_allocated() if device == "cuda" else Fresh.resident("VmHWM")

    @staticmethod
    def resident(field: str) -> int:
        for line in Path("/proc/self/status").read_text(encoding="ascii").splitlines():
            if line.startswith(f"{field}:"):
                return 1024 * int(line.split()[1])
        raise OSError(f"/proc/self/status has no {field}: memory can only be measured on Linux")


@dataclass(frozen=True)
class WholeStep:
    """A private loop beside a plain one; ``rows``: of a private batch, padding included, by those of a plain one."""

    parameters: int = 0
    plain_milliseconds: float | None = None
    milliseconds: float | None = None
    ratio: float | None = None
    quartiles: tuple[float, float] | None = None
    rows: float | None = None
    noise: str = "default"
    note: str = ""


def whole_step(workload: Workload, rounds: int, device: str) -> WholeStep:
    """Through ``make_private``, with eight batches of data."""
    data = TensorDataset(*workload.batch("cpu", 8 * workload.size))
    model, private_model = workload.make(device), workload.make(device)
    parameters = sum(parameter.numel() for parameter in trainable(model).values())
    optimizer = torch.optim.SGD(trainable(model).values(), lr=1e-3)
    private_optimizer = torch.optim.SGD(trainable(private_model).values(), lr=1e-3)
    plain_batches = endless(DataLoader(data, batch_size=workload.size, shuffle=True))
    with tempfile.TemporaryDirectory() as folder:
        engine = dpkit.PrivacyEngine(Path(folder) / "run")
        try:
            _, _, loader = engine.make_private(
                private_model,
                private_optimizer,
                DataLoader(data, batch_size=workload.size),
                num_examples=len(data),
                noise_multiplier=1.0,
                target_delta=1e-5,
                steps=10_000,
                max_grad_norm=BOUND,
            )
            batches = endless(loader)
            rows: list[int] = []

            def plain_loop() -> None:
                x, y = next(plain_batches)
                optimizer.zero_grad()
                workload.losses(model, (x.to(device), y.to(device))).mean().backward()
                optimizer.step()

            def private_loop() -> None:
                x, y = next(batches)
                rows.append(len(x))
                private_optimizer.zero_grad()
                engine.backward(workload.losses(private_model, (x.to(device), y.to(device))))
                private_optimizer.step()

            for _ in range(WARM_UP):
                plain_loop()
                private_loop()
            rows.clear()
            pairs = [(timed(plain_loop, device), timed(private_loop, device)) for _ in range(rounds)]
        except Exception as error:
            return WholeStep(parameters, note=refusal(error))
    ratios = [own / base for base, own in pairs]
    return WholeStep(
        parameters,
        1e3 * statistics.median([base for base, _ in pairs]),
        1e3 * statistics.median([own for _, own in pairs]),
        statistics.median(ratios),
        quartiles(ratios),
        statistics.mean(rows) / workload.size,
    )


def endless(loader: Any) -> Iterator[Any]:
    while True:
        yield from loader


# -- tables and the plot ----------------------------------------------------------------------------------------------


def markdown(figures: dict[str, Any]) -> str:
    """Everything that was found, as three tables."""
    parts = [headline(figures)]
    if figures["note"]:
        return f"{parts[0]}\n\n{figures['note']}"
    parts += [
        "Ratio of the core (forward, backward, clipped sum) to the non-private forward and backward. *target* is the "
        "largest ratio that *dpkit flat* is to have; bold is above it.",
        table_of_ratios(figures),
        "Details. *memory*: MiB above model and data, peak of a fresh process. *faults*: minor page faults a step, in "
        "that process. *µs/tensor*: extra time for each trainable tensor, of tiny models.",
        table_of_details(figures),
        "The whole step: the loop of `make_private` (private loader, core, charge on the disk, noise, SGD) against the "
        "plain loop (loader, SGD). *rows*: rows of a private batch, filled up as they are, by those of a plain one.",
        table_of_whole_steps(figures),
    ]
    return "\n\n".join(part for part in parts if part)


def headline(figures: dict[str, Any]) -> str:
    versions = ", ".join(f"{name} {number}" for name, number in figures["versions"].items())
    busy = f" {figures['load']:.1f} other threads were running when it started." if figures["load"] > 0.5 else ""
    rounds = figures["rounds"]
    return f"{figures['machine']}; {versions}; float32 unless said; medians of {rounds} rounds [quartiles].{busy}"


def as_table(heads: list[str], rows: list[list[str]]) -> str:
    lines = [heads, ["---"] * len(heads), *rows]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)


def number(value: float | None, places: int) -> str:
    return "" if value is None else f"{value:,.{places}f}"


def with_quartiles(row: dict[str, Any]) -> str:
    if row["ratio"] is None:
        return ""
    lower, upper = row["quartiles"]
    return f"{row['ratio']:.2f} [{lower:.2f}, {upper:.2f}]"


def first_words(note: str, most: int = 80) -> str:
    return note if len(note) <= most else note[:most].rpartition(" ")[0] + " ..."


def table_of_ratios(figures: dict[str, Any]) -> str:
    private_names = [name for name in CONTESTANTS if name != PLAIN]
    lines = []
    for title, entry in figures["workloads"].items():
        line = [title]
        if entry["note"]:
            lines.append([*line, entry["note"], *[""] * (1 + len(private_names))])
            continue
        rows, target = entry["contestants"], entry["target"]
        line += [number(rows[PLAIN]["milliseconds"], 2), number(target, 2)]
        for name in private_names:
            row = rows.get(name)
            if row is None:
                line.append("not asked")
            elif row["ratio"] is None:
                line.append(first_words(row["note"]))
            else:
                missed = name == FLAT and target is not None and row["ratio"] > target
                line.append(f"**{row['ratio']:.2f}**" if missed else f"{row['ratio']:.2f}")
                line[-1] += " (wrong sum)" if row["note"] else ""
        lines.append(line)
    return as_table(["workload", f"{PLAIN}, ms", "target", *private_names], lines)


def table_of_details(figures: dict[str, Any]) -> str:
    lines = []
    for title, entry in figures["workloads"].items():
        for name, row in entry.get("contestants", {}).items():
            if row["ratio"] is None:
                continue
            overhead = number(row["overhead"], 0) if entry["tiny"] and name != PLAIN else ""
            lines.append(
                [
                    *(title, name, number(row["milliseconds"], 2), "" if name == PLAIN else with_quartiles(row)),
                    *(number(row["memory"], 0), number(row["faults"], 0), overhead, first_words(row["note"])),
                ]
            )
    heads = ["workload", "contestant", "ms", "ratio", "memory, MiB", "faults", "µs/tensor", "note"]
    return as_table(heads, lines)


def table_of_whole_steps(figures: dict[str, Any]) -> str:
    lines = []
    for title, entry in figures["workloads"].items():
        row = entry.get("whole_step")
        if row is None:
            continue
        lines.append(
            [
                *(title, number(row["parameters"] / 1e6, 2), row["noise"]),
                *(number(row["plain_milliseconds"], 2), number(row["milliseconds"], 2)),
                *(with_quartiles(row) or first_words(row["note"]), number(row["rows"], 2)),
            ]
        )
    return as_table(
        ["workload", "parameters, M", "noise", "plain loop, ms", "private loop, ms", "ratio", "rows"], lines
    )


def plot(figures: dict[str, Any], path: Path) -> None:
    """Bars of the ratios, a group for each workload; a cross where a contestant refused."""
    import matplotlib as mpl
    from matplotlib.figure import Figure
    from matplotlib.patches import Patch
    from matplotlib.ticker import FixedLocator, FuncFormatter, NullLocator

    colours = {FLAT: "#0b4f9e", PER_LAYER: "#5fa2e0"}
    colours |= dict(zip(OPACUS, ("#b5452c", "#e58a4e", "#edbb84", "#a8a29a"), strict=True)) | {VMAP: "#63a375"}
    entries = {title: entry["contestants"] for title, entry in figures["workloads"].items() if not entry["note"]}
    names = [name for name in colours if any(rows.get(name, {}).get("ratio") for rows in entries.values())]
    thick = 0.84 / max(1, len(names))
    with mpl.rc_context({"font.size": 9}):
        figure = Figure(figsize=(10, 1.4 + len(entries) * max(0.45, 0.135 * len(names))), layout="constrained")
        axes = figure.add_subplot()
        for place, rows in enumerate(entries.values()):
            for line, name in enumerate(names):
                row = rows.get(name)
                if row is None:
                    continue
                height = place - 0.42 + (line + 0.5) * thick
                ratio = row["ratio"]
                if ratio is None:
                    axes.text(1.01, height, f"{name}: refused", va="center", fontsize=6, color="#444444")
                    continue
                axes.barh(height, ratio - 1, 0.9 * thick, left=1, color=colours[name])
                axes.text(max(ratio, 1) * 1.015, height, f"{ratio:.2f}", va="center", fontsize=6)
        axes.set_xscale("log")
        largest = max((row["ratio"] or 1 for rows in entries.values() for row in rows.values()), default=2)
        axes.set_xlim(0.95, 1.25 * max(2.0, largest))
        fine = (1.1, 1.25, 1.5) if largest < 10 else (1.5,)  # no two labels on top of each other
        ticks = [tick for tick in (1, *fine, 2, 3, 5, 10, 20, 50, 100, 200, 500) if tick <= 1.25 * largest]
        axes.xaxis.set_major_locator(FixedLocator(ticks))
        axes.xaxis.set_minor_locator(NullLocator())
        axes.xaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
        axes.axvline(1, color="black", linewidth=0.8)
        axes.grid(axis="x", color="#dddddd", linewidth=0.6)
        axes.set_axisbelow(True)
        axes.set_yticks(range(len(entries)), list(entries))
        axes.set_ylim(len(entries) - 0.5, -0.5)
        axes.set_xlabel("time of forward, backward and clipped sum / forward and backward (logarithmic)")
        handles = [Patch(color=colours[name], label=name) for name in names]
        figure.legend(handles=handles, loc="outside upper center", ncols=max(1, len(names)), frameon=False)
        figure.savefig(path, dpi=150)


def write_into(results: Path, text: str, device: str) -> None:
    """Put ``text`` between the markers of ``device``, at the end where there are none."""
    begin, end = f"<!-- gradients {device}: begin -->", f"<!-- gradients {device}: end -->"
    old = results.read_text(encoding="utf-8") if results.exists() else ""
    section = f"{begin}\n\n{text}\n\n{end}"
    if begin in old and end in old:
        before, _, rest = old.partition(begin)
        new = before + section + rest.partition(end)[2]
    else:
        title = f"## The gradient core on {'a GPU' if device == 'cuda' else 'a CPU'}"
        new = f"{old.rstrip()}\n\n{title}\n\n{section}\n".lstrip()
    results.write_text(new, encoding="utf-8")


# -- the command ------------------------------------------------------------------------------------------------------


def quiet() -> None:
    """No warnings of the libraries: of Opacus about hooks and random generators, of transformers about defaults."""
    warnings.simplefilter("ignore")
    logging.disable(logging.WARNING)


def machine(device: str, threads: int) -> str:
    if device == "cuda":
        return torch.cuda.get_device_name() if torch.cuda.is_available() else "GPU"
    model = platform.processor() or platform.machine()
    cpuinfo = Path("/proc/cpuinfo")
    if cpuinfo.exists():
        lines = cpuinfo.read_text(encoding="utf-8", errors="replace").splitlines()
        model = next((line.partition(":")[2].strip() for line in lines if line.startswith("model name")), model)
    return f"CPU, threads: {threads}, {model}"


def version_of(library: str) -> str:
    try:
        return version(library)
    except PackageNotFoundError:
        return "not installed"


def chosen(only: list[str]) -> list[Workload]:
    """The workloads with one of these in their names; all without any."""
    names = [workload.name for workload in WORKLOADS]
    for part in only:
        if not any(part.lower() in name.lower() for name in names):
            raise typer.BadParameter(f"no workload has {part!r} in its name; there are {names}")
    return [each for each in WORKLOADS if not only or any(part.lower() in each.name.lower() for part in only)]


def run(workload: Workload, names: list[str], rounds: int, device: str, threads: int, quick: bool) -> dict[str, Any]:
    """All figures of one workload."""
    if workload.needs_gpu and device == "cpu":
        return {"note": "not run: needs a GPU"}
    if (
        workload.tiny
    ):  # Nothing in them is worth a second thread, and waiting for one on a busy machine would be measured.
        threads = 1
    torch.set_num_threads(threads)
    rows = measure(workload, names, rounds, device)
    if not quick:
        for name, row in rows.items():
            if row.ratio is not None:
                rows[name] = replace(row, **Fresh.ask(workload, name, device, threads))
    return {
        "note": "",
        "target": workload.target,
        "tiny": workload.tiny,
        "contestants": {name: asdict(row) for name, row in rows.items()},
        "whole_step": asdict(whole_step(workload, rounds, device)),
    }


def main(
    only: Annotated[
        list[str] | None, typer.Option(help="Only workloads with this in their name; may be given several times.")
    ] = None,
    rounds: Annotated[int, typer.Option(min=1, help="How often every contestant takes its turn.")] = 10,
    no_opacus: Annotated[bool, typer.Option("--no-opacus", help="Leave Opacus out.")] = False,
    quick: Annotated[
        bool, typer.Option("--quick", help="At most three rounds, and neither memory nor page faults.")
    ] = False,
    device: Annotated[str, typer.Option(help="cpu or cuda.")] = "cpu",
    threads: Annotated[int, typer.Option(min=1, help="Threads of torch on a CPU.")] = 2,
    json_file: Annotated[Path | None, typer.Option("--json", help="Write the figures there, too.")] = None,
    from_file: Annotated[
        Path | None,
        typer.Option("--from", help="Figures of an earlier --json; only what --only names is measured again."),
    ] = None,
    write: Annotated[bool, typer.Option("--write", help="Put tables and plot beside this script.")] = False,
    fresh: Annotated[str, typer.Option(hidden=True)] = "",
) -> None:
    """Time and memory of the gradient core, as ratios to the step without privacy."""
    if device not in ("cpu", "cuda"):
        raise typer.BadParameter(f"--device is {device!r}; it is cpu or cuda")
    if write and (quick or (only and from_file is None)):
        raise typer.BadParameter(
            "--write wants all workloads, measured in full: leave out --quick, give --from to --only"
        )
    warnings.simplefilter(
        "ignore"
    )  # theirs: of Opacus about hooks and random generators, of transformers about configs
    logging.disable(logging.WARNING)
    if fresh:
        torch.set_num_threads(threads)
        title, _, name = fresh.rpartition("/")
        [workload] = [each for each in WORKLOADS if each.name == title]
        typer.echo(json.dumps(Fresh.answer(workload, name, device)))
        return
    figures: dict[str, Any] = {
        "machine": machine(device, threads),
        "versions": {name: version_of(name) for name in ("torch", "opacus", "transformers", "peft")},
        "rounds": min(rounds, 3) if quick else rounds,
        "load": os.getloadavg()[0],
        "quick": quick,
        "note": "",
        "workloads": {},
    }
    if from_file is not None:
        figures = joined(json.loads(from_file.read_text(encoding="utf-8")), figures if only else None)
        if write and (figures["quick"] or len(figures["workloads"]) < len(WORKLOADS)):
            raise typer.BadParameter(f"{from_file} holds a quick or unfinished run, which --write does not take")
    if device == "cuda" and not torch.cuda.is_available():
        figures["note"] = "not run: torch finds no GPU"
    elif only or from_file is None:
        names = [name for name in CONTESTANTS if not (no_opacus and name in OPACUS)]
        for workload in chosen(only or []):
            typer.echo(f"{workload.name} ...", err=True)
            figures["workloads"][workload.name] = run(
                workload, names, min(rounds, 3) if quick else rounds, device, threads, quick
            )
            keep(figures, json_file)
    keep(figures, json_file)
    text = markdown(figures)
    typer.echo(text)
    if write:
        suffix = "" if device == "cpu" else f"_{device}"
        if not figures["note"]:
            plot(figures, RESULTS.with_name(f"gradients{suffix}.png"))
            text += f"\n\n![Ratios by workload](gradients{suffix}.png)"
        elif f"<!-- gradients {device}: begin -->" in RESULTS.read_text(encoding="utf-8"):
            return  # what was measured on another machine stays
        write_into(RESULTS, text, device)


def joined(old: dict[str, Any], new: dict[str, Any] | None) -> dict[str, Any]:
    """The figures of an earlier run, to which a new one of some workloads is added; its headline is true of both."""
    if new is None:
        return old
    if (old["machine"], old["versions"]) != (new["machine"], new["versions"]):
        raise typer.BadParameter(
            f"the earlier figures are of {old['machine']}, {old['versions']}, and these would be of {new['machine']}, "
            f"{new['versions']}; one table cannot hold both: measure all workloads again"
        )
    more = {"rounds": min(old["rounds"], new["rounds"]), "load": max(old["load"], new["load"])}
    return old | more | {"quick": old["quick"] or new["quick"]}


def keep(figures: dict[str, Any], json_file: Path | None) -> None:
    """After each workload, so that a run that is cut short leaves what it has."""
    if json_file is not None:
        json_file.write_text(json.dumps(figures, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    os.environ.setdefault("HF_HUB_OFFLINE", "1")
    typer.run(main)
