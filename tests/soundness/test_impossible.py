"""What cannot be done at all: there is no option for it, one place in the source that does it rightly, or a refusal.

These go further than the mutants, which show that a bug would be seen: whoever adds a second place that draws noise,
charges, or writes a gradient, or another option, fails here, and writes a check for it first.
"""

from __future__ import annotations

import ast
import inspect
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from soundness.crashes import Mortal
from soundness.harness import charges_on_disk
from soundness.ledger_checks import Run
from soundness.source_checks import sources
from soundness.subjects import loss_of
from torch import nn

import dpkit
from dpkit.errors import DpkitError, RawGradient, UnsupportedModule, UnsupportedOptimizer
from dpkit.mechanisms import Gaussian

Record = Callable[[str, object], None]


def known(record_property: Record, number: str, bug: str, source: str) -> None:
    """A line of the table of bugs."""
    record_property("bug", (number, bug, source))
    record_property("caught by", "refused")


# ------------------------------------------------------------------------------------------------------- no such option

OPTIONS = {
    "PrivacyEngine": "run_dir ledger dataset_name budget seed callbacks",
    "PrivacyEngine.resume": "run_dir checkpoint ledger dataset_name seed callbacks",
    "PrivacyEngine.make_private": "model optimizer loader target_delta target_epsilon noise_multiplier mechanism "
    "sampler epochs steps max_grad_norm clipping filters metrics num_examples unit relation max_physical_batch_size "
    "loss_reduction rows_per_unit probe_batch canaries",
    "PrivacyEngine.attach": "model loss_fn optimizer plan dataset backend collate_fn max_physical_batch_size labels "
    "probe_batch canaries",
    "PrivacyEngine.backward": "losses units labels",
    "Plan": "sampler clip mechanism steps num_examples delta filters metrics unit relation",
}
"""Everything that can be asked of a run: no clipping of microbatches of k (B49), no shuffled batches under Poisson's
name (M18), no skipping or filling up of empty batches (M17, B51), no choice of an accountant (M41, M42), no schedule of
the noise beside the plan (M44), no generator that is fixed or said to be secure (M14, B73), no scaler (B58), no rank
(M15, M16)."""


@pytest.mark.parametrize("name", OPTIONS)
def test_nothing_else_can_be_asked_of_a_run(name: str) -> None:
    found: Any = dpkit
    for part in name.split("."):
        found = getattr(found, part)
    parameters = set(inspect.signature(found).parameters) - {"self"}
    assert parameters == set(OPTIONS[name].split())


# ---------------------------------------------------------------------------------------------- one place in the source


def _calls(tree: ast.AST, name: str) -> bool:
    """Whether a function or method of this name is called, in the scope of ``tree``."""
    return any(
        isinstance(node, ast.Call)
        and (getattr(node.func, "attr", None) == name or getattr(node.func, "id", None) == name)
        for node in ast.walk(tree)
    )


def _writes(tree: ast.AST, attribute: str) -> bool:
    """Whether an attribute of this name is assigned, other than None."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Assign) and not (isinstance(node.value, ast.Constant) and node.value.value is None):
            targets = [leaf for target in node.targets for leaf in ast.walk(target)]
            if any(isinstance(leaf, ast.Attribute) and leaf.attr == attribute for leaf in targets):
                return True
        if isinstance(node, ast.AugAssign) and isinstance(node.target, ast.Attribute) and node.target.attr == attribute:
            return True
        if _is_setattr(node, attribute):
            return True
    return False


def _is_setattr(node: ast.AST, attribute: str) -> bool:
    match node:
        case ast.Call(func=ast.Name(id="setattr"), args=[_, ast.Constant(value=name), _]):
            return name == attribute
    return False


def _where(found: Callable[[ast.AST], bool]) -> set[str]:
    """ "file: function" of every function of the package, or module outside of functions, with such a thing in it."""
    places = set[str]()
    for file, text in sources():
        if not file.startswith("dpkit/"):
            continue
        for node in ast.walk(ast.parse(text)):
            if isinstance(node, ast.FunctionDef) and found(node):
                places.add(f"{file}: {node.name}")
    return places


def test_a_release_is_charged_in_two_places_and_no_other() -> None:
    # A step (M20, M23, M48), and a number that is released beside the steps (B65).
    assert _where(lambda tree: _calls(tree, "charge")) == {
        "dpkit/engine/attachment.py: release",
        "dpkit/engine/engine.py: _release_alone",
    }


def test_one_function_writes_the_gradient_that_an_optimizer_sees() -> None:
    # M24 and B56. What reconstructs an image from a release optimises the image.
    found = _where(lambda tree: _writes(tree, "grad"))
    assert {place for place in found if not place.startswith("dpkit/audit/")} == {"dpkit/engine/attachment.py: release"}


def test_normal_noise_is_drawn_by_mechanisms_alone() -> None:
    # M10, M11, M15, B55: no hook, layer or rank draws any of its own. Models are initialised by it, too.
    drawn = _where(lambda tree: _calls(tree, "normal_") or _calls(tree, "normal") or _calls(tree, "ndtri"))
    assert {place for place in drawn if not place.startswith(("dpkit/mechanisms/", "dpkit/audit/"))} == {
        "dpkit/cli/models.py: __init__"
    }


def test_no_sum_is_cleaned_of_what_is_not_finite() -> None:
    # M06: a record is left out before its batch is summed, and a release stays as the noise made it.
    found = _where(lambda tree: _calls(tree, "nan_to_num") or _calls(tree, "nan_to_num_"))
    assert {place for place in found if not place.startswith("dpkit/audit/")} == set()


def test_the_size_of_the_data_set_is_read_where_it_is_drawn_from_and_nowhere_else() -> None:
    # B57: q, the divisor and the number of steps come from the public N.
    def measures(tree: ast.AST) -> bool:
        return any(
            isinstance(node, ast.Call)
            and getattr(node.func, "id", None) == "len"
            and getattr(node.args[0], "attr", getattr(node.args[0], "id", None)) in ("dataset", "_dataset")
            for node in ast.walk(tree)
        )

    found = {place for place in _where(measures) if place.startswith("dpkit/engine/")}
    assert found == {
        "dpkit/engine/engine.py: make_private",  # declared public where num_examples is left out; else drawn from
        "dpkit/engine/engine.py: attach",
        "dpkit/engine/engine.py: _attach",
        "dpkit/engine/loader.py: template",
        "dpkit/engine/loader.py: __len__",
    }


# ------------------------------------------------------------------------------------------------------------- refusals


def run_in(folder: Path, **options: Any) -> Run:
    return Run(folder / "run", Mortal(Gaussian(1.3), folder / "run" / "ledger.sqlite"), **options)


def test_several_ranks_are_refused(folder: Path, monkeypatch: pytest.MonkeyPatch, record_property: Record) -> None:
    known(record_property, "M16", "trains on several ranks, each of which draws the same batch", "Opacus, issue 444")
    monkeypatch.setattr(torch.distributed, "is_initialized", lambda: True)
    monkeypatch.setattr(torch.distributed, "get_world_size", lambda: 2)
    with pytest.raises(UnsupportedModule, match="2 processes"):
        run_in(folder)


def test_copies_of_a_model_are_refused(folder: Path, monkeypatch: pytest.MonkeyPatch, record_property: Record) -> None:
    known(record_property, "M15", "draws noise on every copy of the model", "DataParallel")
    monkeypatch.setattr("soundness.ledger_checks.build", lambda *_: nn.DataParallel(nn.Linear(6, 3)))
    with pytest.raises(UnsupportedModule, match="DataParallel"):
        run_in(folder)


def test_a_gradient_scaler_is_refused_and_moves_nothing(folder: Path, record_property: Record) -> None:
    known(record_property, "B58", "steps through a gradient scaler", "torch.amp.GradScaler")
    run = run_in(folder)
    before = [parameter.detach().clone() for parameter in run.model.parameters()]
    scaler = torch.amp.GradScaler("cpu")
    scaler.scale(torch.zeros(1))
    batch = next(iter(run.loader))
    run.engine.backward(loss_of(run.model, batch))
    with pytest.raises(UnsupportedOptimizer, match="GradScaler"):
        scaler.step(run.optimizer)
    assert all(map(torch.equal, before, run.model.parameters()))
    run.stop()


def test_a_gradient_that_somebody_else_wrote_is_refused(folder: Path, record_property: Record) -> None:
    known(record_property, "B56", "puts another gradient in the place of the released one", "private-transformers")
    run = run_in(folder)
    before = [parameter.detach().clone() for parameter in run.model.parameters()]
    run.engine.backward(loss_of(run.model, next(iter(run.loader))))
    for parameter in run.model.parameters():
        parameter.grad = torch.ones_like(parameter)
    with pytest.raises(RawGradient):
        run.optimizer.step()
    assert all(map(torch.equal, before, run.model.parameters()))
    run.stop()


def test_a_tensor_outside_of_the_model_is_not_trained(folder: Path, record_property: Record) -> None:
    known(record_property, "M24", "trains a tensor beside the model", "Opacus, a second optimizer")
    run = run_in(folder)
    beside = nn.Parameter(torch.ones(()))
    with pytest.raises(DpkitError):
        run.engine.backward(loss_of(run.model, next(iter(run.loader))) * beside)
    assert beside.grad is None and not charges_on_disk(run.mechanism.path)
    run.stop()


def test_a_batch_is_not_left_out(folder: Path, record_property: Record) -> None:
    known(record_property, "M17", "leaves a batch out in the loop", "hand-written loops")
    run = run_in(folder)
    batches = iter(run.loader)
    next(batches)
    with pytest.raises(DpkitError, match="leaving batches out"):
        next(batches)
    run.stop()


def test_a_batch_is_not_used_twice(folder: Path, record_property: Record) -> None:
    known(record_property, "M33", "releases one batch twice", "closures, gradient accumulation")
    run = run_in(folder)
    batch = next(iter(run.loader))
    run.engine.backward(loss_of(run.model, batch))
    with pytest.raises(DpkitError):
        run.engine.backward(loss_of(run.model, batch))
    assert len(charges_on_disk(run.mechanism.path)) == 1
    run.stop()
