"""Automatic mutation of the privacy core: small changes to the code, each of which a test must notice.

    python tests/soundness/mutation.py run --results FOLDER --seconds 2
    python tests/soundness/mutation.py run --results FOLDER --seconds 60    # what lived gets more tests
    python tests/soundness/mutation.py score --results FOLDER
    python tests/soundness/mutation.py show ID ...

The changes are those of mutmut (its operators, applied to whole modules: mutmut's own runner leaves out decorated
functions, and with them every property), and three more: a condition is forced to True or to False, a call whose value
nobody uses is left out, a loop is left out.

How a mutant is run.  One process imports everything and collects the tests, and measures once, in a fork, which tests
execute which lines and how long they take.  For each mutant it forks: the child puts the changed code into the function
objects that exist, and runs tests that execute the changed line until one fails.  Those that killed a neighbour come
first, then the quickest variant of each test function; ``--seconds`` says how many seconds of them a mutant is given.
What is executed on import (constants, defaults, class bodies) takes a fork of a second process, which has imported
nothing of ours.

A mutant is killed when a test fails that passes without it, or when it takes ten times as long as the tests do
(``timeout``); ``broken`` says that pytest could not begin, and counts as alive.  That tests fail for no other reason is
shown by ``run --unchanged``, which does all of this with code that was not changed: everything must survive.  Results
are added to FOLDER/results.jsonl one by one; a run that was interrupted goes on where it was.  ``SURVIVORS.md`` says
what lived and why.
"""

from __future__ import annotations

import argparse
import difflib
import functools
import gc
import hashlib
import importlib
import importlib.abc
import importlib.util
import json
import os
import random
import signal
import sys
import time
import traceback
from collections import Counter, defaultdict
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from types import CodeType, FunctionType
from typing import Any

import libcst as cst
import pytest
from libcst.metadata import (
    MetadataWrapper,
    ParentNodeProvider,
    PositionProvider,
    WhitespaceInclusivePositionProvider,
)
from mutmut.mutation.mutators import mutation_operators

ROOT = Path(__file__).parents[2]

Failed = Callable[[str], None]

CORE = [
    *sorted(
        str(path.relative_to(ROOT))
        for folder in ("clipping", "mechanisms", "sampling")
        for path in (ROOT / "dpkit" / folder).glob("[a-z]*.py")
    ),
    "accounting/chain.py",
    "accounting/ledger.py",
    "accounting/normal_form.py",
    "accounting/tip.py",
    "dpkit/engine/plan.py",
    "dpkit/engine/step.py",
]
"""What decides how far a unit moves a sum, what noise is added, who takes part and what is charged."""

TESTS = [
    f"tests/{folder}"
    for folder in (
        "clipping",
        "contracts",
        "mechanisms",
        "sampling",
        "filters",
        "accounting",
        "engine",
        "soundness",
    )
]

# They start processes of their own, which import the code as it is, or change it themselves.
IGNORED = (
    "accounting/test_ledger_crash",
    "engine/test_killed_run",
    "soundness/test_kills",
    "soundness/test_mutants",
    "soundness/test_mutation",
)

NEAR = {
    "dpkit/clipping": (
        "tests/clipping",
        "tests/contracts",
        "tests/soundness/test_survivors",
    ),
    "dpkit/mechanisms": ("tests/mechanisms",),
    "dpkit/sampling": ("tests/sampling",),
    "dpkit/engine": ("tests/engine/test_functional", "tests/soundness"),
    "accounting": ("tests/accounting",),
}
"""Folder of the code -> the tests that are about it, which are tried before the others."""

SECONDS = 8.0
"""Of tests that a mutant is given, their measured times added up."""


@dataclass(frozen=True)
class Mutant:
    """One change.

    Attributes:
      id: file, function and a digest of the change: the same until that line, or the function's name, is another.
      lines: first and last line of the statement that is changed.
      owner: qualified name of the outermost function that it lies in; "" for what is executed on import.
      message: whether it changes only what an error says.
    """

    id: str
    file: str
    line: int
    lines: tuple[int, int]
    owner: str
    operator: str
    message: bool
    source: str

    @property
    def diff(self) -> str:
        before = (ROOT / self.file).read_text(encoding="utf-8").splitlines()
        changed = difflib.unified_diff(before, self.source.splitlines(), lineterm="", n=0)
        return "\n".join(line for line in changed if not line.startswith(("---", "+++", "@@")))


def mutants_of(file: str) -> list[Mutant]:
    """All mutants of one file, in the order of its lines."""
    source = (ROOT / file).read_text(encoding="utf-8")
    wrapper = MetadataWrapper(cst.parse_module(source))
    visitor = _Visitor(source, wrapper.module)
    wrapper.visit(visitor)
    found: dict[str, Mutant] = {}
    for line, lines, owner, operator, message, changed in visitor.found:
        if changed == source or not _compiles(changed):
            continue
        digest = hashlib.sha256((owner + _difference(source, changed)).encode()).hexdigest()[:8]
        key = f"{file}:{owner or 'module'}:{digest}"
        while key in found and found[key].source != changed:
            key += "'"
        found[key] = Mutant(key, file, line, lines, owner, operator, message, changed)
    return list({mutant.source: mutant for mutant in reversed(found.values())}.values())[::-1]


def _difference(before: str, after: str) -> str:
    start = _alike(before, after)
    end = _alike(before[start:][::-1], after[start:][::-1])
    line = before.rfind("\n", 0, start) + 1
    return before[line:start] + "|" + before[start : len(before) - end] + "|" + after[start : len(after) - end]


def _alike(one: str, other: str) -> int:
    """How many characters they begin with in common."""
    pairs = zip(one, other, strict=False)
    return next(
        (place for place, (a, b) in enumerate(pairs) if a != b),
        min(len(one), len(other)),
    )


def _compiles(source: str) -> bool:
    try:
        compile(source, "mutant", "exec", dont_inherit=True)
    except SyntaxError:
        return False
    return True


class _Visitor(cst.CSTVisitor):
    METADATA_DEPENDENCIES = (
        PositionProvider,
        WhitespaceInclusivePositionProvider,
        ParentNodeProvider,
    )

    def __init__(self, source: str, module: cst.Module) -> None:
        super().__init__()
        self.found: list[tuple[int, tuple[int, int], str, str, bool, str]] = []
        self._module = module
        starts = [0]
        for text in source.splitlines(keepends=True):
            starts.append(starts[-1] + len(text))
        self._source, self._starts = source, starts
        self._classes: list[str] = []
        self._functions: list[str] = []
        self._owner = ""
        self._parameters = self._raises = self._checks = 0

    def on_visit(self, node: cst.CSTNode) -> bool:
        if isinstance(node, (cst.Annotation, cst.Decorator, cst.Import, cst.ImportFrom)):
            return False
        if isinstance(node, cst.Call) and isinstance(node.func, cst.Name) and node.func.value in ("len", "isinstance"):
            return False
        simple = (cst.Name, cst.BaseNumber, cst.BaseString)
        if isinstance(node, cst.Param) and node.default and not isinstance(node.default, simple):
            return False
        if isinstance(node, cst.ClassDef):
            self._classes.append(node.name.value)
        if isinstance(node, cst.FunctionDef):
            if not self._functions:
                self._owner = ".".join([*self._classes, node.name.value])
            self._functions.append(node.name.value)
        if isinstance(node, cst.Parameters) and len(self._functions) == 1:
            self._parameters += 1
        if isinstance(node, cst.Raise):
            self._raises += 1
        if _is_check(node):
            self._checks += 1
        for kind, operator in mutation_operators:
            if isinstance(node, kind):
                for changed in operator(node):
                    self._take(node, changed, operator.__name__.removeprefix("operator_"))
        for part, changed, name in _ours(node):
            self._take(part, changed, name)
        return True

    def on_leave(self, node: cst.CSTNode) -> None:
        if isinstance(node, cst.ClassDef):
            self._classes.pop()
        if isinstance(node, cst.FunctionDef):
            self._functions.pop()
            if not self._functions:
                self._owner = ""
        if isinstance(node, cst.Parameters) and len(self._functions) == 1:
            self._parameters -= 1
        if isinstance(node, cst.Raise):
            self._raises -= 1
        if _is_check(node):
            self._checks -= 1

    def _take(self, node: cst.CSTNode, changed: cst.CSTNode, operator: str) -> None:
        if isinstance(node, cst.Match):
            source = self._module.deep_replace(node, changed).code
        else:
            span = self.get_metadata(WhitespaceInclusivePositionProvider, node, None)
            if span is None:
                return
            start = self._starts[span.start.line - 1] + span.start.column
            end = self._starts[span.end.line - 1] + span.end.column
            source = self._source[:start] + self._module.code_for_node(changed) + self._source[end:]
        owner = "" if self._parameters else self._owner
        line = self.get_metadata(PositionProvider, node).start.line
        message = bool(self._raises) or (isinstance(node, cst.SimpleString) and bool(self._checks))
        self.found.append((line, self._statement(node), owner, operator, message, source))

    def _statement(self, node: cst.CSTNode) -> tuple[int, int]:
        """The lines of the innermost statement around ``node``: of a compound one, its head."""
        inside = node
        while not isinstance(node, (cst.SimpleStatementLine, cst.BaseCompoundStatement, cst.Module)):
            inside, node = node, self.get_metadata(ParentNodeProvider, node)
        span = self.get_metadata(PositionProvider, inside if isinstance(node, cst.Module) else node)
        end = span.end.line
        if isinstance(node, cst.BaseCompoundStatement):
            body = getattr(node, "body", None) or getattr(node, "cases", [None])[0]
            end = self.get_metadata(PositionProvider, body).start.line if body is not None else end
        return span.start.line, end


def _is_check(node: cst.CSTNode) -> bool:
    """A call like ``check_bound("max_grad_norm", ...)``, whose text is for the message alone."""
    return isinstance(node, cst.Call) and isinstance(node.func, cst.Name) and "check_" in node.func.value


def _ours(node: cst.CSTNode) -> Iterator[tuple[cst.CSTNode, cst.CSTNode, str]]:
    if isinstance(node, (cst.If, cst.While)):
        yield node.test, cst.Name("False"), "condition"
        if isinstance(node, cst.If):
            yield node.test, cst.Name("True"), "condition"
    if isinstance(node, cst.CompIf):
        yield node.test, cst.Name("True"), "condition"
    if isinstance(node, cst.Expr) and isinstance(node.value, cst.Call):
        yield node, cst.Pass(), "call_left_out"
    if isinstance(node, cst.For):
        yield node.iter, cst.parse_expression("()"), "loop_left_out"


class _Runner:
    """A pytest plugin: in the place of the run of all tests, the run of all mutants."""

    def __init__(self, mutants: Sequence[Mutant], results: Path, seconds: float) -> None:
        self.mutants, self.results, self.seconds, self.fresh = (
            mutants,
            results,
            seconds,
            _Fresh(),
        )

    def pytest_configure(self) -> None:
        _settle_hypothesis()

    def pytest_collection_modifyitems(self, items: list[pytest.Item]) -> None:
        items[:] = [item for item in items if "dpkit_process" not in getattr(item, "fixturenames", ())]

    @pytest.hookimpl(tryfirst=True)
    def pytest_runtestloop(self, session: pytest.Session) -> bool:
        if session.testsfailed:
            raise session.Interrupted(f"{session.testsfailed} errors during collection")
        self.caches = _caches()
        self._forget()
        self.functions = _functions()
        gc.collect()
        gc.freeze()  # a fork then shares what is here, and its collections leave it alone
        self.session, self.items = (
            session,
            {item.nodeid: item for item in session.items},
        )
        self.times, self.lines = self._measured()
        self.killers: dict[str, Counter[str]] = defaultdict(Counter)
        done = {}
        log = self.results / "results.jsonl"
        if log.exists():
            for text in log.read_text().splitlines():
                entry = json.loads(text)
                done[entry["id"]] = entry
                if entry.get("test"):
                    self.killers[entry["owner"]][entry["test"]] += 1
        with log.open("a", encoding="utf-8") as file:
            for number, mutant in enumerate(self.mutants):
                if mutant.id in done and done[mutant.id]["seconds_of_tests"] >= self.seconds:
                    continue
                if mutant.id in done and done[mutant.id]["outcome"] != "survived":
                    continue
                entry = self._one(mutant)
                file.write(json.dumps(entry) + "\n")
                file.flush()
                print(
                    f"{number + 1}/{len(self.mutants)} {entry['outcome']:9} {entry['wall']:6.2f} s "
                    f"{mutant.id} {mutant.operator}",
                    flush=True,
                )
        return True

    def _one(self, mutant: Mutant) -> dict[str, Any]:
        chosen, covered = self._chosen(mutant)
        owner = f"{mutant.file}:{mutant.owner}"
        entry: dict[str, Any] = {
            "id": mutant.id,
            "owner": owner,
            "operator": mutant.operator,
            "message": mutant.message,
            "seconds_of_tests": self.seconds,
            "tests": len(chosen),
            "covering": covered,
        }
        began = time.monotonic()
        if not chosen:
            outcome, test = "survived", ""
        else:
            expected = sum(self.times[name] for name in chosen)
            outcome, test = self._outcome(mutant, chosen, 20 + 10 * expected)
        if test:
            self.killers[owner][test] += 1
            self.killers[mutant.file][test] += 1
        entry.update(outcome=outcome, test=test, wall=round(time.monotonic() - began, 3))
        return entry

    def _chosen(self, mutant: Mutant) -> tuple[list[str], int]:
        """Tests that execute the changed line: those that killed neighbours first, then the quickest."""
        by_line = self.lines.get(mutant.file, {})
        if mutant.owner:
            first, last = mutant.lines
            covering = {name for line in range(first, last + 1) for name in by_line.get(line, ())}
        else:
            covering = {name for names in by_line.values() for name in names}
        near, far = (
            self.killers[f"{mutant.file}:{mutant.owner}"],
            self.killers[mutant.file],
        )
        folder = NEAR[mutant.file.rpartition("/")[0]]
        quickest = sorted(covering, key=lambda name: self.times[name])
        variants: Counter[str] = Counter()
        variant = {}  # 0 for the quickest variant of a test function, then 1, 2, ..
        for name in quickest:
            function = name.partition("[")[0]
            variant[name] = variants[function]
            variants[function] += 1
        order = sorted(
            quickest,
            key=lambda name: (
                -near[name],
                variant[name],
                not name.startswith(folder),
                -min(far[name], 3),
            ),
        )
        chosen, spent = [], 0.0
        for name in order:
            if spent + self.times[name] <= self.seconds:
                chosen.append(name)
                spent += self.times[name]
        return chosen, len(covering)

    def _outcome(self, mutant: Mutant, chosen: list[str], limit: float) -> tuple[str, str]:
        code = _changed_code(mutant, self.functions) if mutant.owner else None
        if code is None:
            return self.fresh.outcome(mutant, chosen, limit)

        def act(failed: Failed) -> None:
            for function in self.functions[mutant.file, mutant.owner]:
                function.__code__ = code
            self._run_items([self.items[name] for name in chosen], failed)

        return _forked(act, limit)

    def _run_items(self, items: list[pytest.Item], failed: Failed) -> None:
        _quiet(self.session.config)
        self.session.config.pluginmanager.register(_FailFast(failed))
        for item, following in zip(items, [*items[1:], None], strict=True):
            item.config.hook.pytest_runtest_protocol(item=item, nextitem=following)

    def _forget(self) -> None:
        """Empty the caches: a bound that was computed before would hide the mutant from the test."""
        for cache in self.caches:
            cache.cache_clear()

    def _measured(self) -> tuple[dict[str, float], dict[str, dict[int, list[str]]]]:
        """Seconds of each test that passes, and file -> line -> the tests that execute it."""
        path = self.results / "coverage.json"
        if not path.exists():
            child = os.fork()
            if child == 0:
                self._measure(path)
            os.waitpid(child, 0)
        if not path.exists():
            raise SystemExit((self.results / "coverage_error.txt").read_text())
        measured = json.loads(path.read_text())
        times = {name: seconds for name, seconds in measured["times"].items() if name in self.items}
        lines = {
            file: {int(line): [name for name in names if name in times] for line, names in by_line.items()}
            for file, by_line in measured["lines"].items()
        }
        print(
            f"{len(times)} of {len(self.items)} tests, {sum(times.values()):.0f} s",
            flush=True,
        )
        return times, lines

    def _measure(self, path: Path) -> None:
        import coverage

        try:
            _quiet(self.session.config)
            cov = coverage.Coverage(
                data_file=None,
                config_file=False,
                include=[str(ROOT / file) for file in CORE],
            )
            timer = _Timer(cov)
            self.session.config.pluginmanager.register(timer)
            cov.start()
            items = list(self.items.values())
            for item, following in zip(items, [*items[1:], None], strict=True):
                self._forget()
                cov.switch_context(item.nodeid)
                item.config.hook.pytest_runtest_protocol(item=item, nextitem=following)
            cov.stop()
            data = cov.get_data()
            lines = {
                file: {
                    line: [name for name in names if name in timer.times and name not in timer.failed]
                    for line, names in data.contexts_by_lineno(str(ROOT / file)).items()
                }
                for file in CORE
            }
            times = {name: seconds for name, seconds in timer.times.items() if name not in timer.failed}
            path.write_text(json.dumps({"times": times, "lines": lines, "failed": sorted(timer.failed)}))
        except BaseException:
            (path.parent / "coverage_error.txt").write_text(traceback.format_exc())
        os._exit(0)


_BROKEN = "(pytest ended with) "


def _forked(act: Callable[[Failed], None], limit: float) -> tuple[str, str]:
    """What became of ``act`` in a process of its own: survived, killed (and by which test) or timeout."""
    report, into = os.pipe()
    child = os.fork()
    if child == 0:
        os.setpgid(0, 0)

        def failed(what: str) -> None:
            os.write(into, what.encode()[:4000])
            os._exit(1)

        try:
            act(failed)
        except BaseException as error:  # whatever a mutant does, the child reports and ends
            failed(f"({type(error).__name__})")
        os.write(into, b"passed")
        os._exit(0)
    os.close(into)
    told = b""
    signal.signal(signal.SIGALRM, _late)
    signal.setitimer(signal.ITIMER_REAL, limit)
    try:
        while piece := os.read(report, 4096):
            told += piece
    except TimeoutError:
        os.killpg(child, signal.SIGKILL)
        os.waitpid(child, 0)
        return "timeout", ""
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        os.close(report)
    _, status = os.waitpid(child, 0)
    if told == b"passed":
        return "survived", ""
    if told.startswith(_BROKEN.encode()):
        return "broken", ""
    return "killed", told.decode() or f"(the process ended with status {status})"


class _FailFast:
    def __init__(self, failed: Failed) -> None:
        self._failed = failed

    def pytest_configure(self) -> None:
        _settle_hypothesis()

    def pytest_runtest_logreport(self, report: pytest.TestReport) -> None:
        if report.failed:
            self._failed(report.nodeid)

    def pytest_collectreport(self, report: pytest.CollectReport) -> None:
        if report.failed:
            self._failed(f"(collecting {report.nodeid})")


class _Timer:
    def __init__(self, cov: Any) -> None:
        self.times: dict[str, float] = defaultdict(float)
        self.failed: set[str] = set()

    def pytest_runtest_logreport(self, report: pytest.TestReport) -> None:
        if report.skipped or report.failed:
            self.failed.add(report.nodeid)
        self.times[report.nodeid] += report.duration


def _settle_hypothesis() -> None:
    """The same examples every time, and no failure because the machine is busy."""
    from hypothesis import HealthCheck, settings

    everything = list(HealthCheck)
    settings.register_profile(
        "mutation",
        deadline=None,
        derandomize=True,
        database=None,
        suppress_health_check=everything,
    )
    settings.load_profile("mutation")


def _late(*_: object) -> None:
    raise TimeoutError


def _quiet(config: pytest.Config | None = None) -> None:
    if config is not None:
        config.pluginmanager.unregister(name="terminalreporter")
    null = os.open(os.devnull, os.O_RDWR)
    for stream in (0, 1, 2):
        os.dup2(null, stream)


def _caches() -> list[Any]:
    """Every functools cache of ours."""
    kind = type(functools.lru_cache(_quiet))
    held = [one for one in gc.get_objects() if type(one) is kind]
    return [one for one in held if str(one.__module__).startswith(("dpkit", "accounting"))]


def _functions() -> dict[tuple[str, str], list[FunctionType]]:
    """(file, qualified name) -> the function objects of the core."""
    paths = {str(ROOT / file): file for file in CORE}
    found: dict[tuple[str, str], list[FunctionType]] = defaultdict(list)
    for held in gc.get_objects():
        if type(held) is FunctionType and held.__code__.co_filename in paths:
            found[paths[held.__code__.co_filename], held.__code__.co_qualname].append(held)
    return found


def _changed_code(mutant: Mutant, functions: dict[tuple[str, str], list[FunctionType]]) -> CodeType | None:
    """What to put into the functions that exist; None where that cannot be done."""
    path = str(ROOT / mutant.file)
    code = {part.co_qualname: part for part in _codes(compile(mutant.source, path, "exec", dont_inherit=True))}
    new = code.get(mutant.owner)
    found = functions.get((mutant.file, mutant.owner), [])
    if new is None or not found or any(held.__code__.co_freevars != new.co_freevars for held in found):
        return None
    return new


def _codes(code: CodeType) -> Iterator[CodeType]:
    """The code of functions and methods, not of what is inside of them."""
    for part in code.co_consts:
        if isinstance(part, CodeType):
            if "<locals>" not in part.co_qualname:
                yield part
            yield from (inner for inner in _codes(part) if "<locals>" not in inner.co_qualname)


class _Finder(importlib.abc.MetaPathFinder, importlib.abc.Loader):
    def __init__(self, file: str, source: str) -> None:
        self._path, self._source = ROOT / file, source
        self._name = file.removesuffix(".py").replace("/", ".")

    def find_spec(self, fullname: str, path: Any, target: Any = None) -> Any:
        if fullname != self._name:
            return None
        return importlib.util.spec_from_file_location(fullname, self._path, loader=self)

    def create_module(self, spec: Any) -> None:
        return None

    def exec_module(self, module: Any) -> None:
        exec(
            compile(self._source, str(self._path), "exec", dont_inherit=True),
            module.__dict__,
        )

    def get_filename(self, fullname: str) -> str:
        return str(self._path)


class _Fresh:
    """A process that has imported what we build on, and nothing of ours: a fork of it for each mutant."""

    def __init__(self) -> None:
        import multiprocessing

        self._ours, theirs = multiprocessing.Pipe()
        if os.fork() == 0:
            self._ours.close()
            self._serve(theirs)
        theirs.close()

    def outcome(self, mutant: Mutant, chosen: list[str], limit: float) -> tuple[str, str]:
        self._ours.send_bytes(json.dumps([mutant.file, mutant.source, chosen, limit]).encode())
        return tuple(json.loads(self._ours.recv_bytes()))

    def _serve(self, connection: Any) -> None:
        for name in (
            "torch",
            "scipy.signal",
            "scipy.stats",
            "opacus",
            "hypothesis",
            "cryptography",
        ):
            importlib.import_module(name)

        try:
            while True:
                file, source, chosen, limit = json.loads(connection.recv_bytes())

                def act(
                    failed: Failed,
                    file: str = file,
                    source: str = source,
                    chosen: list[str] = chosen,
                ) -> None:
                    _quiet()
                    sys.meta_path.insert(0, _Finder(file, source))
                    code = pytest.main([*_OPTIONS, *chosen], plugins=[_FailFast(failed)])
                    if code != 0:  # it could not begin: a test of another name here, which says nothing of the mutant
                        failed(f"{_BROKEN}{code!r}")

                connection.send_bytes(json.dumps(_forked(act, limit)).encode())
        finally:
            os._exit(0)


_OPTIONS = [
    f"--rootdir={ROOT}",
    "-p",
    "no:cacheprovider",
    "-W",
    "ignore::pytest.PytestAssertRewriteWarning",
]


def run(arguments: argparse.Namespace) -> None:
    results = arguments.results.resolve()
    results.mkdir(parents=True, exist_ok=True)
    mutants = list(_selected(arguments))
    os.chdir(ROOT)
    marks = [] if arguments.slow else ["-m", "not slow"]
    pytest.main(
        [
            *_OPTIONS,
            f"--basetemp={results / 'tmp'}",
            *marks,
            *(f"--ignore=tests/{name}.py" for name in IGNORED),
            *(arguments.tests or TESTS),
        ],
        plugins=[_Runner(mutants, results, arguments.seconds)],
    )


def _selected(arguments: argparse.Namespace) -> list[Mutant]:
    files = [file for file in CORE if not arguments.module or any(name in file for name in arguments.module)]
    mutants = [mutant for file in files for mutant in mutants_of(file)]
    if arguments.ids:
        known = {mutant.id: mutant for mutant in mutants}
        mutants = [known[name] for name in arguments.ids.read_text().split() if name in known]
    if not arguments.messages:
        mutants = [mutant for mutant in mutants if not mutant.message]
    if arguments.unchanged:
        mutants = [replace(mutant, source=(ROOT / mutant.file).read_text(encoding="utf-8")) for mutant in mutants]
    if arguments.sample:
        drawn = random.Random(arguments.seed).sample(mutants, min(arguments.sample, len(mutants)))
        mutants = [mutant for mutant in mutants if mutant in drawn]
    if arguments.shuffle:
        random.Random(arguments.seed).shuffle(mutants)
    return mutants


def show(arguments: argparse.Namespace) -> None:
    for file in dict.fromkeys(name.split(":")[0] for name in arguments.ids):
        for mutant in mutants_of(file):
            if mutant.id in arguments.ids:
                print(f"{mutant.id} {mutant.operator} {mutant.owner}\n{mutant.diff}\n")


def score(arguments: argparse.Namespace) -> None:
    last = {}
    for text in (arguments.results / "results.jsonl").read_text().splitlines():
        entry = json.loads(text)
        last[entry["id"]] = entry
    rows: dict[str, Counter[str]] = defaultdict(Counter)
    for entry in last.values():
        for file in (entry["id"].split(":")[0], "total"):
            rows[file][entry["outcome"]] += 1
    for file, row in rows.items():
        caught = row["killed"] + row["timeout"]
        print(
            f"{file:42} {row.total():5} mutants {row['killed']:5} killed {row['timeout']:3} timeout "
            f"{row['survived']:4} survived {row['broken']} broken {100 * caught / row.total():6.1f} %"
        )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    commands = parser.add_subparsers(required=True)
    for name, function in (
        ("run", run),
        ("list", None),
        ("show", show),
        ("score", score),
    ):
        command = commands.add_parser(name)
        command.set_defaults(function=function)
        if name in ("run", "list"):
            command.add_argument("--module", nargs="*")
            command.add_argument("--sample", type=int)
            command.add_argument("--seed", type=int, default=0)
            command.add_argument("--ids", type=Path)
            command.add_argument("--messages", action="store_true")
            command.add_argument("--unchanged", action="store_true")
            command.add_argument("--shuffle", action="store_true")
        if name in ("run", "score"):
            command.add_argument("--results", type=Path, required=True)
        if name == "run":
            command.add_argument("--seconds", type=float, default=SECONDS)
            command.add_argument("--tests", nargs="*")
            command.add_argument("--slow", action="store_true")
        if name == "show":
            command.add_argument("ids", nargs="+")
    arguments = parser.parse_args()
    if arguments.function:
        arguments.function(arguments)
        return
    mutants = _selected(arguments)
    for file, count in Counter(mutant.file for mutant in mutants).items():
        print(f"{file:42} {count:5}")
    print(f"{'total':42} {len(mutants):5}")


if __name__ == "__main__":
    main()
