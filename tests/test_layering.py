"""The table of layers, read from the imports: an arrow may only point downwards.

Besides: accounting and the package's front door load no torch, only the mechanisms make something ``Released``, and the
constructs that would run a stranger's code or swallow an error do not occur.
"""

from __future__ import annotations

import ast
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]

# Lowest first. Units on one line do not import each other; a unit is a file or a package with all that is in it.
LAYERS = (
    ("accounting",),
    ("dpkit.types", "dpkit.errors", "dpkit.version"),
    ("dpkit.run_folder",),
    ("dpkit.callbacks",),
    (
        "dpkit.clipping",
        "dpkit.mechanisms",
        "dpkit.filters",
        "dpkit.sampling",
        "dpkit.metrics",
        "dpkit.distributed",
        "dpkit.optim",
    ),
    ("dpkit.gradients", "dpkit.reparam"),
    ("dpkit.engine",),
    # The front door re-exports everything up to the engine, so what imports it stands above the engine.
    ("dpkit",),
    ("dpkit.recipes", "dpkit.control", "dpkit.preprocess", "dpkit.federated", "dpkit.tune"),
    ("dpkit.audit", "dpkit.report", "dpkit.integrations", "dpkit.datasets"),
    ("experiments", "dpkit.cli"),
)
LEVEL = {unit: level for level, units in enumerate(LAYERS) for unit in units}

FILES = sorted(path for package in ("accounting", "dpkit", "experiments") for path in (ROOT / package).rglob("*.py"))
SHIPPED = [path for path in FILES if path.relative_to(ROOT).parts[0] != "experiments"]


def module_of(path: Path) -> str:
    parts = path.relative_to(ROOT).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


MODULES = {module_of(path) for path in FILES}


def unit_of(module: str) -> str:
    """The unit of the table to which ``module`` belongs; "" when it has no place there."""
    if module == "dpkit":
        return "dpkit"
    inside = [unit for unit in LEVEL if unit != "dpkit" and (module == unit or module.startswith(unit + "."))]
    return max(inside, key=len, default="")


def imports_of(tree: ast.AST, module: str, is_package: bool) -> Iterator[tuple[int, str]]:
    """(line, imported module) of every import of our own packages, those for type checking included."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            for alias in node.names:
                yield node.lineno, alias.name
        elif isinstance(node, ast.ImportFrom):
            base = node.module or ""
            if node.level:
                parents = module.split(".")
                parents = parents[: len(parents) - node.level + is_package]
                base = ".".join(parents + ([node.module] if node.module else []))
            for alias in node.names:
                inner = f"{base}.{alias.name}"
                yield node.lineno, inner if inner in MODULES else base


def upward_imports(source: str, module: str, is_package: bool) -> list[str]:
    own = unit_of(module)
    found = []
    for line, target in imports_of(ast.parse(source), module, is_package):
        if target.partition(".")[0] not in {"accounting", "dpkit", "experiments"}:
            continue
        unit = unit_of(target)
        if unit != own and (unit not in LEVEL or LEVEL[unit] >= LEVEL[own]):
            found.append(f"line {line}: {own} must not import {target}")
    return found


def test_every_module_has_a_place_in_the_table():
    assert [module for module in sorted(MODULES) if not unit_of(module)] == []


@pytest.mark.parametrize("path", FILES, ids=[str(path.relative_to(ROOT)) for path in FILES])
def test_imports_point_downwards(path: Path):
    found = upward_imports(path.read_text(encoding="utf-8"), module_of(path), path.name == "__init__.py")
    assert found == []


@pytest.mark.parametrize(
    ("source", "module"),
    [
        ("import dpkit.types", "accounting.ledger"),
        ("from dpkit import PrivacyEngine", "dpkit.clipping.flat"),
        ("from ..engine import plan", "dpkit.clipping.flat"),
        ("from dpkit.mechanisms import Gaussian", "dpkit.sampling"),
        ("def f():\n    from dpkit.cli import main", "experiments.mnist"),
        ("import dpkit.no_such_module", "dpkit.engine.step"),
    ],
)
def test_the_check_sees_an_arrow_that_points_up_or_sideways(source: str, module: str):
    assert len(upward_imports(source, module, is_package=False)) == 1


@pytest.mark.parametrize("module", ["accounting", "dpkit", "dpkit.errors", "dpkit.cli.app"])
def test_importing_it_does_not_load_torch(module: str):
    code = f"import sys, {module}; print('torch' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=ROOT, check=True)
    assert done.stdout.strip() == "False"


FORBIDDEN_MODULES = {"pickle", "cPickle", "dill", "cloudpickle", "shelve", "marshal"}
FORBIDDEN_CALLS = {"eval", "exec"}
FORBIDDEN_ATTRIBUTES = {("torch", "load"), ("yaml", "load"), ("yaml", "unsafe_load"), ("yaml", "full_load")}


def forbidden_constructs(source: str) -> list[str]:
    found = []
    for node in ast.walk(ast.parse(source)):
        match node:
            case ast.Import(names=names):
                found += [f"{node.lineno}: import {n.name}" for n in names if n.name.split(".")[0] in FORBIDDEN_MODULES]
            case ast.ImportFrom(module=str(name)) if name.split(".")[0] in FORBIDDEN_MODULES:
                found.append(f"{node.lineno}: from {name} import")
            case ast.ImportFrom(module=str(name), names=names):
                found += [f"{node.lineno}: {name}.{n.name}" for n in names if (name, n.name) in FORBIDDEN_ATTRIBUTES]
            case ast.Call(func=ast.Name(id=name)) if name in FORBIDDEN_CALLS:
                found.append(f"{node.lineno}: {name}(")
            case ast.Attribute(value=ast.Name(id=owner), attr=attribute) if (owner, attribute) in FORBIDDEN_ATTRIBUTES:
                found.append(f"{node.lineno}: {owner}.{attribute}")
            case ast.ExceptHandler(type=None):
                found.append(f"{node.lineno}: bare except")
    return found


@pytest.mark.parametrize("path", SHIPPED, ids=[str(path.relative_to(ROOT)) for path in SHIPPED])
def test_no_construct_runs_a_strangers_code_or_swallows_every_error(path: Path):
    assert forbidden_constructs(path.read_text(encoding="utf-8")) == []


@pytest.mark.parametrize(
    "source",
    [
        "import pickle",
        "from pickle import loads",
        "from torch import load",
        "torch.load(f)",
        "yaml.load(f, Loader=yaml.SafeLoader)",
        "eval('1')",
        "try:\n    f()\nexcept:\n    pass",
    ],
)
def test_the_check_sees_each_forbidden_construct(source: str):
    assert len(forbidden_constructs(source)) == 1


def makes_released(source: str) -> list[int]:
    """Lines on which ``Released`` is called, under its own name or as an attribute."""
    return [
        node.lineno
        for node in ast.walk(ast.parse(source))
        if isinstance(node, ast.Call)
        and (
            (isinstance(node.func, ast.Name) and node.func.id == "Released")
            or (isinstance(node.func, ast.Attribute) and node.func.attr == "Released")
        )
    ]


@pytest.mark.parametrize("path", SHIPPED, ids=[str(path.relative_to(ROOT)) for path in SHIPPED])
def test_only_a_mechanism_makes_something_released(path: Path):
    if unit_of(module_of(path)) != "dpkit.mechanisms":
        assert makes_released(path.read_text(encoding="utf-8")) == []


def test_a_mechanism_does_make_something_released():
    sources = [p.read_text(encoding="utf-8") for p in SHIPPED if unit_of(module_of(p)) == "dpkit.mechanisms"]
    assert any(makes_released(source) for source in sources)
