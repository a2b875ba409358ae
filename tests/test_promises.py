"""The two pages, and the docstrings behind them: what they name exists, and whatever guarantees something says why.

``PRIVACY_PROMISE.md`` and ``KNOWN_LIMITS.md`` name files, tests, errors and objects, which must be there.  Every public
function and class that clips, sums, draws, charges or accounts has a docstring in three parts: **Guarantee**, what it
**Requires**, and **Why**.
"""

from __future__ import annotations

import ast
import importlib
import inspect
import re
import sys
from collections import Counter
from collections.abc import Iterator, Sequence
from contextlib import suppress
from functools import cache
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

import accounting
import dpkit
from accounting import Budget, Ledger
from dpkit import errors

ROOT = Path(__file__).resolve().parents[1]
PAGES = ("PRIVACY_PROMISE.md", "KNOWN_LIMITS.md")

# -------------------------------------------------------------------------------------------------- what the pages name

_QUOTED = re.compile(r"`([^`\n]+)`")
_LINK = re.compile(r"\]\(([^)#]+)\)")
_FILE = re.compile(r"[\w.-]+(?:/[\w.-]+)*\.(?:py|md|toml|yaml|html)|(?:[\w.-]+/)+")
_TEST = re.compile(r"test_\w+")
_OBJECT = re.compile(r"(?:dpkit|accounting)(?:\.\w+)+")
_ERROR = re.compile(r"[A-Z][a-z]+(?:[A-Z][a-z]+)+")
# Of a run, not of the repository.
_OF_A_RUN = {"RUN/nonprivate/"}


@cache
def defined_tests() -> Counter[str]:
    """How many test functions of each name there are."""
    files = (ROOT / "tests").rglob("test_*.py")
    return Counter(
        node.name
        for file in files
        for node in ast.walk(ast.parse(file.read_text(encoding="utf-8")))
        if isinstance(node, ast.FunctionDef) and node.name.startswith("test_")
    )


def unknown_names(text: str, tests: Counter[str]) -> list[str]:
    """What ``text`` names that does not exist, or, of tests, exists more than once."""
    found = [name for name in _LINK.findall(text) if not (ROOT / name).is_file()]
    for name in _QUOTED.findall(text):
        if _TEST.fullmatch(name):
            wrong = tests[name] != 1
        elif _FILE.fullmatch(name):
            wrong = name not in _OF_A_RUN and not (ROOT / name).exists()
        elif _OBJECT.fullmatch(name):
            wrong = resolved(name) is None
        elif _ERROR.fullmatch(name):
            wrong = not hasattr(errors, name)
        else:
            continue
        if wrong:
            found.append(name)
    return found


def resolved(name: str) -> Any:
    """The module, class or function called ``name``; None if there is none."""
    first, *parts = name.split(".")
    found: Any = importlib.import_module(first)
    for part in parts:
        if not hasattr(found, part) and isinstance(found, ModuleType):
            with suppress(ModuleNotFoundError):
                importlib.import_module(f"{found.__name__}.{part}")
        found = getattr(found, part, None)
    return found


@pytest.mark.parametrize("page", PAGES)
def test_whatever_a_page_names_exists(page: str):
    text = (ROOT / page).read_text(encoding="utf-8")
    assert unknown_names(text, defined_tests()) == []
    assert sum(bool(_TEST.fullmatch(name)) for name in _QUOTED.findall(text)) >= 5


@pytest.mark.parametrize(
    "text",
    [
        "`accounting/no_such_file.py`",
        "`dpkit/no_such_folder/`",
        "[here](NO_SUCH_PAGE.md)",
        "`test_that_nobody_wrote`",
        "`dpkit.NoSuchNoise`",
        "`accounting.ledger.Ledger.no_such_method`",
        "`NoSuchError`",
    ],
)
def test_a_name_that_does_not_exist_is_seen(text: str):
    assert len(unknown_names(text, defined_tests())) == 1


def test_a_name_of_two_tests_is_seen():
    assert unknown_names("`test_twice`", Counter(test_twice=2)) == ["test_twice"]


def test_what_exists_is_not_complained_about():
    text = "`accounting/ledger.py` `dpkit/clipping/` `dpkit.Users` `LedgerError` `test_a_name_of_two_tests_is_seen`"
    assert unknown_names(text, defined_tests()) == []


def rows_of(text: str, head: str) -> list[list[str]]:
    """The cells of each row of the table whose head begins with ``head``."""
    lines = text.split(f"\n{head}", 1)[1].splitlines()[2:]
    table = lines[: next((number for number, line in enumerate(lines) if not line.startswith("|")), len(lines))]
    return [[cell.strip() for cell in line.strip("|").split("|")] for line in table]


def test_every_promise_has_files_and_tests_and_every_pitfall_a_test():
    text = (ROOT / PAGES[0]).read_text(encoding="utf-8")
    statements = rows_of(text, "| | statement |")
    assert [row[0] for row in statements] == ["1", "2", "3", "4", "5"]
    for _, _, files, tests in statements:
        assert _FILE.search(files) and len(_TEST.findall(tests)) >= 3
    pitfalls = rows_of(text, "| pitfall |")
    assert len(pitfalls) == 20
    assert [row[0] for row in pitfalls if not _TEST.search(row[2])] == []
    for requirement, guard in rows_of(text, "| requirement |"):
        assert "obody can check" in guard or "statement" in guard or "CERTIFIED" in guard or _ERROR.search(guard), (
            requirement
        )


def test_the_readme_leads_to_both_pages_and_they_to_each_other():
    assert set(_LINK.findall((ROOT / "README.md").read_text(encoding="utf-8"))) >= set(PAGES)
    for page, other in (PAGES, PAGES[::-1]):
        assert other in _LINK.findall((ROOT / page).read_text(encoding="utf-8"))


def test_a_statement_leads_to_both_pages_for_people_and_for_programs(tmp_path: Path):
    step = accounting.Poisson(0.01, accounting.Gaussian(1.0))
    plan = accounting.PlanRecord(
        event=step, steps=5, delta=1e-5, relation=accounting.Relation.ADD_REMOVE, unit="example", num_examples=1000
    )
    with Ledger.create(tmp_path / "ledger.sqlite", dataset_name="made up", budget=Budget(1.0, 1e-5)) as ledger:
        ledger.charge(plan, step)
        stated = accounting.statement(ledger)
    for page in PAGES:
        assert page in " ".join(str(stated).split())
        assert page in stated.model_dump_json()


# ---------------------------------------------------------------------------------- what guarantees something, says why

GUARANTEES = (
    # clips
    *(f"dpkit.clipping.{name}" for name in ("Automatic", "Flat", "Global", "GlobalAdapt", "GroupAdaptive")),
    *(f"dpkit.clipping.{name}" for name in ("NormalizeIfExceeds", "PerLayer", "PerLayerQuantile", "Quantile")),
    *(f"dpkit.clipping.{name}" for name in ("ClipRule", "SeparableRule")),
    "dpkit.gradients.Backend",
    "dpkit.gradients.PerSample",
    # sums and asks
    *(f"dpkit.metrics.{name}" for name in ("ClippedCount", "Count", "Mean", "Metric")),
    *(f"dpkit.engine.step.{name}" for name in ("ClippedAccumulator", "release")),
    *(f"dpkit.Plan{name}" for name in ("", ".epsilon", ".noise_shares", ".sensitivities", ".sensitivity_of")),
    # samples
    *(f"dpkit.sampling.{name}" for name in ("CyclicPoisson", "FixedOrder", "Poisson", "Sampler")),
    *(f"dpkit.sampling.{name}" for name in ("TruncatedPoisson", "Users", "WithoutReplacement")),
    # draws
    *(f"dpkit.mechanisms.{name}" for name in ("Correlated", "DiscreteGaussian", "Gaussian", "HardenedGaussian")),
    *(f"dpkit.mechanisms.{name}" for name in ("Mechanism", "NoiseKey", "RunKey", "chacha", "discrete")),
    # trains
    "dpkit.PrivacyEngine",
    *(f"dpkit.PrivacyEngine.{name}" for name in ("attach", "backward", "epsilon", "make_private", "release_count")),
    *(f"dpkit.PrivacyEngine.{name}" for name in ("release_mean", "resume", "save", "statement")),
    # charges
    *(f"accounting.{name}" for name in ("Ledger", "Ledger.charge", "statement", "round_up", "round_up_text")),
    *(f"accounting.{name}" for name in ("RenyiFilter", "WorstCaseSchedule", "ZCDPFilter")),
    "dpkit.cli.verify",
    # accounts
    *(f"accounting.{name}" for name in ("delta", "epsilon", "epsilon_curve", "trade_off")),
    *(f"accounting.calibrate_{name}" for name in ("noise_multiplier", "sample_rate", "steps")),
    *(f"accounting.{name}" for name in ("atoms_under", "joint_noise_multiplier", "normal_form")),
    *(f"accounting.{name}" for name in ("from_dp_accounting", "from_opacus_history")),
    *(f"accounting.matrix.{name}" for name in ("column_sensitivity", "cyclic_poisson_event", "matrix_event")),
    "accounting.matrix.sensitivity",
    *(f"accounting.selection.{name}" for name in ("epsilon_bound", "full_composition", "profile_delta")),
    *(f"accounting.selection.{name}" for name in ("profile_deltas", "profile_epsilon", "renyi_log_moments")),
)
"""Public things that clip, sum, ask, sample, draw, charge or account."""

_EVENT = "describes what happened, and counts nothing; ``normal_form`` says what it means"
_VALUE = "holds what others computed"
_SHAPE = "the shape of the noise; Correlated takes its sensitivity from accounting.matrix, and checks the inverse"
_ERROR_CLASS = "an error"
_POST = "works on what was released"
_ADVICE = "compares or advises, and is no bound"
_STRATEGY = "coefficients; what they cost is accounting.matrix.sensitivity's"
EXEMPT: dict[str, str] = {
    **dict.fromkeys(
        (
            *("accounting.ApproximateDP", "accounting.BinomialTrials", "accounting.Composed"),
            *("accounting.DiscreteGaussian", "accounting.Gaussian", "accounting.Laplace", "accounting.MatrixMechanism"),
            *("accounting.OnePass", "accounting.Poisson", "accounting.PoissonTrials", "accounting.PureDP"),
            *("accounting.Relation", "accounting.Repeated", "accounting.Select", "accounting.TruncatedPoisson"),
            *("accounting.TruncatedNegativeBinomial", "accounting.WithoutReplacement", "dpkit.Relation"),
            *("accounting.event_from_json", "accounting.event_to_json"),
        ),
        _EVENT,
    ),
    **dict.fromkeys(
        (
            *("accounting.Bound", "accounting.Budget", "accounting.Check", "accounting.PlanRecord"),
            *("accounting.PlanStatement", "accounting.Receipt", "accounting.Spent", "accounting.Statement"),
            *("dpkit.Budget", "dpkit.clipping.Setting", "accounting.selection.FullComposition"),
            "dpkit.engine.step.BatchDiagnostics",
            "dpkit.engine.step.StepState",
        ),
        _VALUE,
    ),
    **dict.fromkeys(
        (
            *("accounting.AccountingError", "accounting.BudgetExceeded", "accounting.InvalidParameter"),
            *("accounting.LedgerError", "accounting.TargetUnreachable", "accounting.Unsupported"),
        ),
        _ERROR_CLASS,
    ),
    **dict.fromkeys(("accounting.best_order", "accounting.crosscheck", "accounting.gaussian_mu"), _ADVICE),
    "accounting.matrix.rooted_mean_error": _ADVICE,
    **dict.fromkeys(
        (f"dpkit.mechanisms.{name}" for name in ("BISR", "BSR", "BandMF", "SquareRoot", "Strategy")), _SHAPE
    ),
    **dict.fromkeys(
        (
            *("accounting.matrix.band_mf", "accounting.matrix.banded_inverse_square_root", "accounting.matrix.inverse"),
            *("accounting.matrix.banded_square_root", "accounting.matrix.identity", "accounting.matrix.square_root"),
            "accounting.matrix.inverse_square_root",
        ),
        _STRATEGY,
    ),
    **dict.fromkeys(
        (f"dpkit.filters.{name}" for name in ("Filter", "FilterOf", "LowPass", "LowPassState", "butterworth")), _POST
    ),
    **dict.fromkeys((f"dpkit.filters.{name}" for name in ("first_order", "momentum", "nyquist_zero")), _POST),
    "dpkit.optim.DPAdamBC": _POST,
    "dpkit.clipping.BoundSplit": "chooses bounds; the rule states the ones that it keeps",
    "dpkit.clipping.NoiseSplit": "the guarantee is the same for all of them, as mechanisms/gaussian.py shows",
    "dpkit.check": "trains nothing and releases nothing; its batch is public",
    "dpkit.sampling.unit_of": "reads a name",
    **{
        f"dpkit.PrivacyEngine.{name}": reason
        for name, reason in {
            "autosave": "calls save",
            "batches": "hands out what the sampler drew",
            "detach": "charges and releases nothing",
            "log": "tells what the caller declares public",
            "log_nonprivate": "is called what it is",
            "restore": "gives back what save wrote",
        }.items()
    },
    **{
        f"accounting.Ledger.{name}": reason
        for name, reason in {
            "anchor": "reads",
            "check": "charges nothing: what charge would say",
            "check_anchor": "reads",
            "close": "closes the file",
            "create": "the guarantee is the class's",
            "entries": "reads",
            "find_plan": "reads",
            "open": "the guarantee is the class's",
            "plans": "reads",
            "snapshot": "reads",
            "spent": "reads; statement has the guarantee",
        }.items()
    },
    **{
        f"dpkit.Plan.{name}": reason
        for name, reason in {
            "event_of": "repeats the plan's event",
            "questions": "lists what rule and metrics ask",
            "setting": "reads shapes",
        }.items()
    },
}
"""Public names that guarantee nothing of their own, each with the reason."""

_PARTS = {
    "Guarantee": re.compile(r"\bGuarantees?(?:, Requires)?(?:, Why)?(?: \([^)]*\))?:"),
    "Requires": re.compile(r"\bRequires(?:, Why)?:"),
    "Why": re.compile(r"\bWhy:"),
}
_AS_OF = re.compile(r"\bGuarantee, Requires(?:, Why)?: as of (?:(?::\w+:)?`+~?([\w.]+?)`+)")


def lacking(text: str) -> list[str]:
    """Which of the three parts ``text`` has not; where it says so, another one has them."""
    return [part for part, pattern in _PARTS.items() if not pattern.search(text)]


def text_of(thing: Any) -> str:
    """Its docstring, with the module's where it leads there."""
    own = inspect.getdoc(thing) or ""
    if isinstance(thing, ModuleType) or "see the module" not in own:
        return own
    module = sys.modules[thing.__module__].__doc__ or ""
    # A part that stands here already is not taken from there.
    return own.replace("Guarantee, Requires, Why: see the module.", "") + "\n" + module


@pytest.mark.parametrize("name", GUARANTEES)
def test_each_says_what_it_guarantees_what_it_requires_and_why(name: str):
    thing = resolved(name)
    assert thing is not None, f"{name} is no more"
    assert lacking(text_of(thing)) == [], name
    for other in _AS_OF.findall(inspect.getdoc(thing) or ""):
        last = other.rpartition(".")[2]
        assert any(known.rpartition(".")[2] == last for known in GUARANTEES if known != name), (
            f"{name} leads to {other}, which has no place in the list"
        )


@pytest.mark.parametrize(
    ("text", "parts"),
    [
        ("Clips.", ["Guarantee", "Requires", "Why"]),
        ("Guarantee: it holds. Why: it must.", ["Requires"]),
        ("Guarantees:\n  * it holds\nRequires: nothing.", ["Why"]),
        ("It requires nothing: guaranteed. Here is why: so.", ["Guarantee", "Requires", "Why"]),
        ("Guarantee, Requires, Why: as of :func:`epsilon`.", []),
        ("Guarantee, Requires: as of :func:`epsilon`. Why: because.", []),
    ],
)
def test_a_missing_part_is_seen(text: str, parts: Sequence[str]):
    assert lacking(text) == parts


def test_a_docstring_that_leads_nowhere_is_seen():
    def function() -> None:
        """For guarantee, requirements and proof see the module."""

    function.__module__ = "dpkit.clipping.noise_split"  # whose text has none of the parts
    assert lacking(text_of(function)) == ["Guarantee", "Requires", "Why"]


def public_names() -> Iterator[str]:
    """Every public function and class of the packages that clip, draw, sample, charge or account."""
    yield from (f"dpkit.{name}" for name in dpkit.__all__ if callable(getattr(dpkit, name)))
    for module in (
        *("dpkit.clipping", "dpkit.filters", "dpkit.mechanisms", "dpkit.metrics", "dpkit.optim", "dpkit.sampling"),
        *("dpkit.engine.step", "accounting", "accounting.matrix", "accounting.selection"),
    ):
        for name, thing in vars(importlib.import_module(module)).items():
            own = inspect.isclass(thing) or inspect.isfunction(thing)
            # A package exports what its files define; a file has what it defines itself.
            home = getattr(thing, "__module__", "")
            is_package = hasattr(importlib.import_module(module), "__path__")
            if own and not name.startswith("_") and (home.startswith(module + ".") if is_package else home == module):
                yield f"{module}.{name}"
    for owner in ("dpkit.PrivacyEngine", "dpkit.Plan", "accounting.Ledger"):
        for name, thing in vars(resolved(owner)).items():
            if not name.startswith("_") and (inspect.isfunction(thing) or isinstance(thing, classmethod)):
                yield f"{owner}.{name}"


def test_nothing_public_is_missing_from_the_list():
    """Of one object under two names one is enough."""
    listed = {id(resolved(name)) for name in (*GUARANTEES, *EXEMPT)}
    # Bound methods of a class are new objects each time; their names are compared.
    names = {*GUARANTEES, *EXEMPT}
    assert [name for name in public_names() if name not in names and id(resolved(name)) not in listed] == []


def test_no_name_is_listed_twice_or_gone():
    assert sorted({*GUARANTEES} & {*EXEMPT}) == []
    assert len({*GUARANTEES}) == len(GUARANTEES)
    assert [name for name in EXEMPT if resolved(name) is None] == []
