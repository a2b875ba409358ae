"""What is shipped: a wheel that installs without the checkout, with its types and its command."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
import sysconfig
import zipfile
from importlib.util import find_spec
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]

pytestmark = pytest.mark.skipif(
    not (find_spec("build") and find_spec("setuptools")),
    reason="the packages build and setuptools are not installed (extra `dev`)",
)


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The wheel, built from a copy so that the checkout stays as it is; without a network."""
    source = tmp_path_factory.mktemp("source")
    for name in ("pyproject.toml", "README.md", "LICENSE", "PRIVACY_PROMISE.md", "KNOWN_LIMITS.md"):
        shutil.copy(ROOT / name, source)
    for package in ("accounting", "dpkit", "experiments", "tests"):
        shutil.copytree(ROOT / package, source / package, ignore=shutil.ignore_patterns("__pycache__"))
    out = tmp_path_factory.mktemp("wheel")
    command = [sys.executable, "-m", "build", "--wheel", "--no-isolation", "--outdir", str(out), str(source)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    [found] = out.glob("*.whl")
    return found


def test_the_wheel_holds_both_packages_with_their_types_and_nothing_else(wheel: Path):
    with zipfile.ZipFile(wheel) as archive:
        names = archive.namelist()
    assert {"dpkit/py.typed", "accounting/py.typed", "dpkit/cli/app.py", "accounting/ledger.py"} <= set(names)
    assert {name.split("/")[0].partition("-")[0] for name in names} == {"dpkit", "accounting"}
    for page in ("LICENSE", "PRIVACY_PROMISE.md", "KNOWN_LIMITS.md"):
        assert any(name.endswith(f"licenses/{page}") for name in names), page


def test_the_installed_wheel_answers_on_the_command_line(wheel: Path, tmp_path: Path):
    environment = tmp_path / "venv"
    subprocess.run([sys.executable, "-m", "venv", "--without-pip", str(environment)], check=True)
    python = environment / "bin" / "python"
    site = Path(sysconfig.get_path("purelib", "venv", {"base": str(environment)}))
    command = [sys.executable, "-m", "pip", "--python", str(python), "install", "--no-deps", "--no-index", str(wheel)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    # The dependencies come from this environment, behind what the wheel installed.
    (site / "dependencies.pth").write_text(sysconfig.get_path("purelib") + "\n")

    def run(*arguments: str) -> str:
        command = [str(environment / "bin" / "dpkit"), *arguments]
        return subprocess.run(command, capture_output=True, text=True, cwd=tmp_path, check=True).stdout

    assert "statement" in run("--help")
    answer = json.loads(
        run("epsilon", "--noise-multiplier", "1", "--sample-rate", "0.01", "--steps", "9", "--delta", "1e-5", "--json")
    )
    assert answer["epsilon"] > 0
    where = subprocess.run(
        [str(python), "-c", "import dpkit, accounting; print(dpkit.__file__, accounting.__file__)"],
        capture_output=True,
        text=True,
        cwd=tmp_path,
        check=True,
    ).stdout.split()
    assert all(Path(file).is_relative_to(site) for file in where), where
