"""What the checks train: small models, honest records, and records that want to do harm.

A batch is (x, y, w) and the loss of a row is (1 + w) times the cross entropy, so that every kind of harm can be done
through the loss to any model, and through the activations to those that take floating-point input.  The rows of zeros
that dpkit pads with have w = 0: they would count like any other row if nothing masked them.  A row with w = -1 and
x = 0 is a null record: its gradient is exactly zero.  Where more is asked than the gradient, a record of gradient zero
still answers, and the null record is one that is dropped: its w is not a number.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional as F

CLASSES = 3


class Data(NamedTuple):
    """Rows of a data set; axis 0 counts the records."""

    x: Tensor
    y: Tensor
    w: Tensor

    def __getitem__(self, rows: Any) -> Data:  # pyright: ignore[reportIncompatibleMethodOverride]
        return Data(*(column[rows] for column in (self.x, self.y, self.w)))

    @property
    def size(self) -> int:
        return len(self.y)

    def put(self, position: int, record: Data) -> Data:
        """``record`` (one row) put in before ``position``."""
        pairs = zip((self.x, self.y, self.w), (record.x, record.y, record.w), strict=True)
        return Data(*(torch.cat([column[:position], row, column[position:]]) for column, row in pairs))


def loss_of(model: nn.Module, batch: Any) -> Tensor:
    """(B,) losses, each a function of its own row."""
    x, y, w = batch
    return F.cross_entropy(model(x), y, reduction="none") * (1 + w)


class _Tied(nn.Module):
    """One table, used as embedding and as output layer; ``unused`` takes no part in the loss at all."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(40, 4)
        self.unused = nn.Linear(3, 2)

    def forward(self, x: Tensor) -> Tensor:
        return F.linear(self.embed(x).mean(1), self.embed.weight)


class _Twice(nn.Module):
    """One layer, applied twice."""

    def __init__(self) -> None:
        super().__init__()
        self.layer, self.head = nn.Linear(6, 6), nn.Linear(6, CLASSES)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(torch.tanh(self.layer(torch.tanh(self.layer(x)))))


class _Sequence(nn.Module):
    """A layer over four steps whose output is centred: the gradients of the steps cancel, and so does a Gram norm."""

    def __init__(self) -> None:
        super().__init__()
        self.layer, self.head = nn.Linear(3, 5), nn.Linear(20, CLASSES)

    def forward(self, x: Tensor) -> Tensor:
        hidden = self.layer(x)
        return self.head(torch.tanh(hidden - hidden.mean(1, keepdim=True)).flatten(1))


class _Centred(nn.Module):
    """Subtracts the mean of the batch: every record moves the gradients of all others."""

    def __init__(self) -> None:
        super().__init__()
        self.layer, self.head = nn.Linear(6, 8), nn.Linear(8, CLASSES)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(torch.tanh(self.layer(x - x.mean(0))))


class _Contrast(nn.Module):
    """Scales what it makes of a record by how it compares with the records beside it."""

    def __init__(self) -> None:
        super().__init__()
        self.layer, self.head = nn.Linear(6, 8), nn.Linear(8, CLASSES)

    def forward(self, x: Tensor) -> Tensor:
        hidden = self.layer(x)
        return self.head(torch.tanh(hidden)) * (hidden @ hidden.T).sum(1, keepdim=True)


class _Product(nn.Module):
    """Two layers whose activations (6 features each) and output gradients (1 feature each) a record sets apart."""

    def __init__(self) -> None:
        super().__init__()
        self.head, self.tail = nn.Linear(6, CLASSES), nn.Linear(6, CLASSES)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(x[:, :6]) * x[:, 12:13] + self.tail(x[:, 6:12]) * x[:, 13:]


class _Wide(nn.Module):
    """100,002 coordinates with gradients of 0.7e-4 and 1.3e-4, whose squares are zero in half precision."""

    def __init__(self) -> None:
        super().__init__()
        self.head = nn.Linear(33_334, CLASSES, bias=False)
        nn.init.zeros_(self.head.weight)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(2e-4 + 1e-6 * x)


@dataclass(frozen=True)
class Subject:
    """A model and the shape of one example; ``tokens`` is the size of the vocabulary, 0 for floating-point input."""

    build: Callable[[], nn.Module]
    shape: tuple[int, ...]
    tokens: int = 0


SUBJECTS: dict[str, Subject] = {
    "mlp": Subject(lambda: nn.Sequential(nn.Linear(6, 8), nn.Tanh(), nn.Linear(8, CLASSES)), (6,)),
    "conv": Subject(
        lambda: nn.Sequential(nn.Conv2d(1, 3, 3, stride=2, padding=1), nn.ReLU(), nn.Flatten(), nn.Linear(27, CLASSES)),
        (1, 5, 5),
    ),
    "tied": Subject(_Tied, (3,), tokens=40),
    "twice": Subject(_Twice, (6,)),
    "norms": Subject(
        lambda: nn.Sequential(nn.Linear(6, 8), nn.LayerNorm(8), nn.Tanh(), nn.GroupNorm(2, 8), nn.Linear(8, CLASSES)),
        (6,),
    ),
    "sequence": Subject(_Sequence, (4, 3)),
    "product": Subject(_Product, (14,)),
    "centred": Subject(_Centred, (6,)),
    "contrast": Subject(_Contrast, (6,)),
    "wide": Subject(_Wide, (33_334,)),
    "ties": Subject(lambda: nn.Linear(64, 32, bias=False), (64,)),
    # Rows of the table that no record touches, a bias, normalisation: about 2,300 coordinates for the noise tests.
    "noise": Subject(
        lambda: nn.Sequential(
            nn.Embedding(60, 16), nn.Flatten(), nn.Linear(48, 24), nn.LayerNorm(24), nn.Tanh(), nn.Linear(24, CLASSES)
        ),
        (3,),
        tokens=20,
    ),
}


def build(name: str, dtype: torch.dtype) -> nn.Module:
    """The model with the same weights at every call."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        return SUBJECTS[name].build().to(dtype)


def honest(name: str, size: int, dtype: torch.dtype, seed: int = 0) -> Data:
    """``size`` ordinary records; fewer records of one seed are the beginning of more of them."""
    subject = SUBJECTS[name]
    generator = torch.Generator().manual_seed(1000 + seed)
    x = [_inputs(subject, generator) for _ in range(size)]
    y = [torch.randint(0, CLASSES, (), generator=generator) for _ in range(size)]
    like = torch.zeros(0, *subject.shape, dtype=torch.long if subject.tokens else dtype)
    return Data(
        torch.stack(x).to(like.dtype) if x else like,
        torch.stack(y) if y else torch.zeros(0, dtype=torch.long),
        torch.zeros(size, dtype=dtype),
    )


def _inputs(subject: Subject, generator: torch.Generator) -> Tensor:
    if subject.tokens:
        return torch.randint(0, min(20, subject.tokens), subject.shape, generator=generator)
    return torch.randn(subject.shape, generator=generator)


def null_record(like: Data) -> Data:
    """One row whose gradient is exactly zero."""
    return Data(torch.zeros_like(like.x[:1]), torch.zeros_like(like.y[:1]), -torch.ones_like(like.w[:1]))


def dropped_record(like: Data) -> Data:
    """One row that adds nothing to any sum, because its gradient is not finite."""
    return null_record(like)._replace(w=torch.full_like(like.w[:1], float("nan")))


def of_norm(name: str, record: Data, norm: float) -> Data:
    """``record`` (one row) with a gradient of this norm, by its weight."""
    model = build(name, record.w.dtype)
    loss_of(model, record._replace(w=torch.zeros_like(record.w))).sum().backward()
    squares = [float(p.grad.double().square().sum()) for p in model.parameters() if p.grad is not None]
    return record._replace(w=torch.full_like(record.w, norm / math.sqrt(math.fsum(squares)) - 1))


def marked(name: str, size: int) -> Data:
    """Honest records, whose first feature is their number from 1 on: padding has 0."""
    data = honest(name, size, torch.float32)
    data.x.view(size, -1)[:, 0] = torch.arange(1, size + 1)
    return data


def tied_records(size: int, dtype: torch.dtype) -> Data:
    """Records of "ties" for which two wrong classes come out equally large, at a scale where rounding errors decide.

    Which of the two takes all of the softmax turns the gradient by up to a right angle.  Rounding errors depend on the
    kernel that multiplies the matrices, and that on the number of rows.
    """
    weight = build("ties", torch.float64).get_parameter("weight").detach()
    apart = weight[0] - weight[1]
    generator = torch.Generator().manual_seed(0)
    x = 4 * (weight[0] + weight[1]) + 0.2 * torch.randn(size, 64, generator=generator, dtype=torch.float64)
    x = (x - (x @ apart)[:, None] * apart / (apart @ apart)) / torch.finfo(dtype).eps
    return Data(x.to(dtype), torch.full((size,), 5), torch.zeros(size, dtype=dtype))


# ----------------------------------------------------------------------------------------- records that do harm


def _scaled(by: float) -> Callable[[Data], Data]:
    return lambda record: record._replace(x=record.x * by) if record.x.is_floating_point() else _weighted(by)(record)


def _weighted(by: float) -> Callable[[Data], Data]:
    return lambda record: record._replace(w=torch.full_like(record.w, by))


def _poisoned(by: float) -> Callable[[Data], Data]:
    def poison(record: Data) -> Data:
        if not record.x.is_floating_point():
            return _weighted(by)(record)
        x = record.x.clone()
        x.view(-1)[0] = by
        return record._replace(x=x)

    return poison


def _shifted(by: float) -> Callable[[Data], Data]:
    return lambda record: record._replace(x=record.x + by) if record.x.is_floating_point() else record


HARM: dict[str, Callable[[Data], Data]] = {
    "normal": lambda record: record,
    "x1e3": _scaled(1e3),
    "loss1e3": _weighted(1e3),
    "loss1e15": _weighted(1e15),
    "1e30": _scaled(1e30),
    "loss1e30": _weighted(1e30),
    "NaN": _poisoned(float("nan")),
    "lossNaN": _weighted(float("nan")),
    "Inf": _poisoned(float("inf")),
    "-Inf": _poisoned(float("-inf")),
    "lossInf": _weighted(float("inf")),
    "offset300": _shifted(300.0),
    "offset3000": _shifted(3000.0),
}
"""What becomes of one ordinary record."""

CROWDS: dict[str, Callable[[Data], Data]] = {
    "ordinary": lambda data: data,
    "aligned": lambda data: Data(
        data.x[:1].expand_as(data.x).clone(), data.y[:1].expand_as(data.y).clone(), torch.full_like(data.w, 1e3)
    ),
    "offset300": _shifted(300.0),
    "offset3000": _shifted(3000.0),
}
"""What the other records are: the sum of aligned ones is as long as it can be, where rounding errors are largest."""


def _product(head: tuple[float, float], tail: tuple[float, float]) -> Callable[[Data], Data]:
    """Activations and output gradients of "product" on these scales, for each of its layers."""

    def set_apart(record: Data) -> Data:
        x = record.x.clone()
        for start, (activation, factor) in ((0, head), (1, tail)):
            x[:, 6 * start : 6 * start + 6] = activation * x[:, 6 * start : 6 * start + 6].sign()
            x[:, 12 + start] = factor
        return record._replace(x=x)

    return set_apart


PRODUCTS: dict[str, Callable[[Data], Data]] = {
    "1e35 * 1e-40": _product((1e35, 1e-40), (1.0, 1.0)),
    "1e35 * 1e-40, beside nothing": _product((1e35, 1e-40), (0.0, 0.0)),
    "1e30 * 1e-32": _product((1e30, 1e-32), (0.0, 0.0)),
    "1e30 * 1e-32, beside long": _product((1e30, 1e-32), (10.0, 1.0)),
    "1e-40 * 1e35": _product((1e-40, 1e35), (1.0, 1.0)),
    "1e-32 * 1e30, beside long": _product((1e-32, 1e30), (10.0, 1.0)),
    "1e38 * 1e-44": _product((1e38, 1e-44), (1e38, 1e-44)),
    "1e38 * 1e-38": _product((1e38, 1e-38), (0.0, 0.0)),
    "1e38 * 1e-15": _product((1e38, 1e-15), (0.0, 0.0)),
    "1e20 * 1e-40": _product((1e20, 1e-40), (0.0, 0.0)),
    "1e-22 * 1e-22": _product((1e-22, 1e-22), (1e-22, 1e-22)),
    "denormal": _product((1e-42, 1.0), (0.0, 1e-42)),
    "zero": _product((0.0, 0.0), (0.0, 0.0)),
    "zero beside long": _product((0.0, 0.0), (10.0, 1.0)),
}
"""What becomes of one record of "product": parts of its gradient leave the range of float32, and the whole does not."""
