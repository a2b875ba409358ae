"""``dpkit check``: what it shows of a model, what it refuses, and what it says of input that is none."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from dpkit.engine.check import check
from dpkit.errors import InvalidArgument

from .conftest import Run

SOURCE = """
import torch
from torch import nn
from torch.nn import functional as F

class Net(nn.Module):
    def __init__(self, centred=False):
        super().__init__()
        self.tokens = nn.Embedding(11, 8)
        self.positions = nn.Parameter(torch.randn(16, 8))
        self.conv = nn.utils.parametrizations.weight_norm(nn.Conv1d(8, 8, 3, padding=1))
        self.flat, self.slopes = nn.Linear(8, 8), nn.PReLU(8)
        self.still = nn.Linear(8, 8).requires_grad_(False)
        self.spare = nn.Linear(3, 3)
        self.head = nn.Linear(8, 5)
        self.centred = centred

    def forward(self, ids):
        x = self.tokens(ids) + self.positions[: ids.shape[1]]
        x = self.conv(x.mT).mT
        x = self.slopes(self.still(x).mT).mT
        x = torch.tanh(self.flat(x.mean(1)))
        if self.centred:
            x = x - x.mean(0)
        return self.head(x)

def loss_fn(model, batch):
    return F.cross_entropy(model(batch["ids"]), batch["labels"], reduction="none")

def batch(rows=8):
    return {"ids": torch.randint(0, 11, (rows, 6)), "labels": torch.randint(0, 5, (rows,))}

def functional():
    return Net(), loss_fn, batch()

def loop():
    return Net(), (batch()["ids"],)

def keywords():
    return Net(), {"ids": batch()["ids"]}

def one_row():
    return Net(), loss_fn, batch(1)

def centred():
    return Net(centred=True), loss_fn, batch()

def by_frequency():
    model = Net()
    model.tokens.scale_grad_by_freq = True
    return model, loss_fn, batch()

def statistics():
    model = nn.Sequential(nn.Linear(5, 4), nn.BatchNorm1d(4), nn.Linear(4, 2))
    return model, torch.randn(8, 5)

def number():
    return 3

def no_model():
    return loss_fn, batch()

def no_loss():
    return Net(), "mean", batch()

def frozen():
    return Net().requires_grad_(False), loss_fn, batch()

def no_rows():
    return Net(), torch.tensor(1.0)

def raises():
    raise KeyError("no such data")

def raises_in_the_loss():
    return Net(), lambda model, batch: batch["nothing"], batch()

CONSTANT = 7
"""


@pytest.fixture
def models(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[str]:
    """A module in the folder where the command runs."""
    (tmp_path / "models_to_check.py").write_text(SOURCE, encoding="utf-8")
    (tmp_path / "broken_models.py").write_text("import nothing_of_this_name\n", encoding="utf-8")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", [*sys.path])
    yield "models_to_check"
    sys.modules.pop("models_to_check", None)


@pytest.mark.parametrize("function", ["functional", "loop", "keywords", "one_row"])
def test_every_parameter_has_a_row_that_says_how_it_is_trained(dpkit: Run, models: str, function: str) -> None:
    done = dpkit("check", f"{models}:{function}", "--json")
    assert done.code == 0, done.out + done.err
    assert done.json["ok"] and done.json["refusals"] == []
    assert done.json["frozen"] == 2
    rows = {row["parameter"]: row for row in done.json["parameters"]}
    assert len(rows) == 12
    assert rows["head.weight"] | {"kept_bytes": None} == {
        "parameter": "head.weight",
        "shape": [5, 8],
        "operations": ["linear"],
        "rule": "linear",
        "strategy": "exact product",
        "kept_bytes": None,
        "layout": "axis 0",
        "verdict": "ok",
    }
    assert rows["tokens.weight"]["strategy"] == "coalesced rows"
    assert rows["positions"]["rule"] == "derived: getitem -> junction"
    assert "weight_norm -> conv" in rows["conv.parametrizations.weight.original1"]["rule"]
    assert "fallback" in rows["slopes.weight"]["rule"] or "junction" in rows["slopes.weight"]["rule"]
    assert rows["spare.weight"]["verdict"] == rows["spare.bias"]["verdict"] == "not used"
    assert all(row["verdict"] == "ok" for name, row in rows.items() if "spare" not in name)
    assert done.json["examples"] == (4 if function == "one_row" else 8)


def test_the_table_is_for_people(dpkit: Run, models: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("COLUMNS", "160")
    done = dpkit("check", f"{models}:functional")
    assert done.code == 0
    assert "12 trainable parameters, 2 frozen" in done.out
    assert "ok: no example moved the gradient of another one" in done.out
    for heading in ("parameter", "operation", "rule", "strategy", "kept", "verdict"):
        assert heading in done.out.splitlines()[0]


def test_a_model_that_mixes_examples_is_refused_with_the_place_and_the_rest_is_shown(dpkit: Run, models: str) -> None:
    done = dpkit("check", f"{models}:centred", "--json")
    assert done.code == 4
    assert not done.json["ok"]
    line = 1 + SOURCE.splitlines().index("            x = x - x.mean(0)")
    assert any(f"mean (models_to_check.py, line {line})" in refusal for refusal in done.json["refusals"])
    rows = {row["parameter"]: row for row in done.json["parameters"]}
    assert rows["flat.weight"]["rule"] == "linear"
    done = dpkit("check", f"{models}:centred")
    assert done.code == 4
    assert "refused: " in done.out and "CANNOT BE TRAINED PRIVATELY" in done.out


@pytest.mark.parametrize(
    ("function", "parameter", "operation"),
    [("by_frequency", "tokens.weight", "embedding"), ("statistics", "1.weight", "batch_norm")],
)
def test_an_operation_that_is_refused_does_not_hide_the_others(
    dpkit: Run, models: str, function: str, parameter: str, operation: str
) -> None:
    done = dpkit("check", f"{models}:{function}", "--json")
    assert done.code == 4
    rows = {row["parameter"]: row for row in done.json["parameters"]}
    assert operation in rows[parameter]["operations"][0]
    assert parameter in rows[parameter]["verdict"]
    other = "flat.weight" if function == "by_frequency" else "0.weight"
    assert rows[other]["verdict"] == "ok" and rows[other]["strategy"]


@pytest.mark.parametrize(
    ("function", "said"),
    [
        ("models_to_check:number", "returned int; it returns (model, loss_fn, batch)"),
        ("models_to_check:no_model", "returned (function, dict)"),
        ("models_to_check:no_loss", "returned a str as loss_fn"),
        ("models_to_check:frozen", "no parameter that requires a gradient"),
        ("models_to_check:no_rows", "one without rows"),
        ("models_to_check:raises", "raised KeyError: 'no such data'"),
        ("models_to_check:nothing", "has no function 'nothing'"),
        ("models_to_check:CONSTANT", "has no function 'CONSTANT'"),
        ("models_to_check", "write MODULE:FUNCTION"),
        ("no_such_module:make", "was not found in this folder"),
        ("broken_models:make", "raised ModuleNotFoundError"),
    ],
)
def test_what_is_wrong_with_the_input_is_said_in_one_line(dpkit: Run, models: str, function: str, said: str) -> None:
    done = dpkit("check", function)
    assert done.code == 1
    assert said in done.err and done.err.count("\n") == 1


def test_a_loss_that_fails_is_a_refusal_with_its_error(dpkit: Run, models: str) -> None:
    done = dpkit("check", f"{models}:raises_in_the_loss")
    assert done.code == 4
    assert "KeyError: 'nothing'" in done.out


# -- the function behind it -------------------------------------------------------------------------------------------


def losses(model: nn.Module, batch: tuple[Tensor, Tensor]) -> Tensor:
    return F.cross_entropy(model(batch[0]), batch[1], reduction="none")


def test_the_model_comes_back_as_it_was() -> None:
    model = nn.Sequential(nn.Linear(5, 4), nn.BatchNorm1d(4), nn.Dropout(), nn.Linear(4, 3))
    model[0].bias.requires_grad_(False)
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    flags = [p.requires_grad for p in model.parameters()]
    found = check(model, losses, (torch.randn(8, 5), torch.randint(0, 3, (8,))))
    assert not found.ok and found.frozen == 1
    assert [p.requires_grad for p in model.parameters()] == flags
    assert all(torch.equal(before[name], tensor) for name, tensor in model.state_dict().items())
    assert model.training and model[2].training
    assert all(p.grad is None for p in model.parameters())


def test_a_long_sequence_and_a_short_one_take_different_strategies() -> None:
    model = nn.Linear(300, 200)

    def squares(model: nn.Module, batch: Tensor) -> Tensor:
        return model(batch).flatten(1).square().sum(1)

    forms = {length: check(model, squares, torch.randn(8, length, 300)).parameters[0] for length in (1, 2, 200)}
    assert forms[1].strategy in ("exact product", "Gram matrix")
    assert {form.strategy for form in forms.values()} >= {"kept"}
    assert forms[200].kept_bytes == 4 * 300 * 200


@pytest.mark.parametrize("act", [lambda x: x.view(-1, 5), lambda x: x.transpose(0, 1)])
def test_where_the_examples_are_is_shown(act: Callable[[Tensor], Tensor]) -> None:
    class Turns(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.inner = nn.Linear(5, 3)

        def forward(self, x: Tensor) -> Tensor:
            out = torch.tanh(self.inner(act(x)))
            return out.view(len(x), -1) if out.dim() == 2 else out.transpose(0, 1)

    found = check(Turns(), None, torch.randn(6, 4, 5))
    assert found.ok, found.refusals
    assert found.parameters[0].layout in ("axis 0, example by example", "axis 1")


def test_a_batch_without_tensors_is_no_batch() -> None:
    with pytest.raises(InvalidArgument, match="no tensors"):
        check(nn.Linear(2, 2), None, {"text": "hello"})
