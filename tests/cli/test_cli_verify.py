"""``dpkit verify``: an honest run verifies, and whatever is changed in one fails the check that is named here."""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import sqlite3
import stat
import subprocess
import sys
import textwrap
from collections.abc import Callable
from contextlib import closing
from pathlib import Path
from typing import Any

import pytest

from accounting import Gaussian, Ledger, PlanRecord, Poisson, epsilon, round_up
from accounting.ledger import _encode
from dpkit.cli import main
from dpkit.cli import verify as verify_module

Damage = Callable[[Path], object]


@pytest.fixture(scope="module")
def reported(trained: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An honest run with both reports."""
    for package in ("jinja2", "matplotlib"):
        pytest.importorskip(package, reason="the extra `report` is not installed")
    folder = tmp_path_factory.mktemp("reported") / "run"
    shutil.copytree(trained, folder)
    assert main(["report", str(folder), "--with-nonprivate"]) == 0
    return folder


@pytest.fixture
def run(reported: Path, tmp_path: Path) -> Path:
    """A copy that a test may change."""
    return Path(shutil.copytree(reported, tmp_path / "copy"))


def verdicts(done) -> dict[str, str]:
    return {check["name"]: check["verdict"] for check in done.json["checks"]}


def failed(done) -> set[str]:
    return {name for name, verdict in verdicts(done).items() if verdict == "failed"}


TEXTS = {"PRIVACY.md: text", "report.html: text"}


def tree(folder: Path) -> dict[str, tuple[int, bytes]]:
    return {
        str(path.relative_to(folder)): (path.stat().st_mtime_ns, path.read_bytes() if path.is_file() else b"")
        for path in sorted(folder.rglob("*"))
    }


# -- an honest run ----------------------------------------------------------------------------------------------------


def test_an_honest_run_verifies_in_every_check(dpkit, run: Path):
    done = dpkit("verify", run, "--json")
    assert done.code == 0, done.out
    assert done.json["verified"] is True
    assert set(verdicts(done).values()) == {"ok"}, done.out
    assert verdicts(done).keys() >= {
        "hash chain",
        "sampler and accountant",
        "config.yaml",
        "model.safetensors",
        "links",
    }


def test_epsilon_is_never_printed_without_its_meaning(dpkit, run: Path):
    said, stated = dpkit("verify", run, "--json").json, dpkit("statement", run, "--json").json
    assert (said["epsilon"], said["delta"]) == (stated["epsilon"], stated["delta"])
    for name in ("unit", "relation", "sampling", "accountant", "dataset_name", "anchor_digest"):
        assert said[name]
    text = " ".join(dpkit("verify", run).out.split())
    for part in ("delta = 0.0001", "unit: one example", "relation: zero_out", "sampling: Poisson", "accountant: prv"):
        assert part in text
    assert "verified" in text and "NOT VERIFIED" not in text


def test_what_cannot_be_verified_has_no_epsilon(dpkit, run: Path):
    (run / "ledger.sqlite").write_bytes(b"this was a ledger")
    done = dpkit("verify", run, "--json")
    assert (done.code, done.json["verified"], done.json["epsilon"], done.json["delta"]) == (4, False, None, None)
    assert "epsilon" not in dpkit("verify", run).out


def test_a_ledger_file_alone_can_be_verified(dpkit, run: Path):
    done = dpkit("verify", run / "ledger.sqlite", "--json")
    assert done.code == 0
    assert verdicts(done).keys() == {
        "hash chain",
        "sampler and accountant",
        "budget",
        "certified",
        "delta",
        "versions",
    }


def test_what_is_not_there_is_not_called_ok(dpkit, run: Path):
    for name in ("result.json", "PRIVACY.md", "report.html", "metrics.jsonl", "config.yaml", "model.safetensors"):
        (run / name).unlink()
    shutil.rmtree(run / "checkpoints")
    done = dpkit("verify", run, "--json")
    assert done.code == 0
    missing = {name for name, verdict in verdicts(done).items() if verdict == "not checked"}
    assert missing == {
        "config.yaml",
        "result.json: anchor",
        "result.json: epsilon",
        "PRIVACY.md: anchor",
        "PRIVACY.md: epsilon",
        "PRIVACY.md: text",
        "report.html: anchor",
        "report.html: text",
        "metrics.jsonl: charges",
        "metrics.jsonl: epsilon",
        "checkpoints: anchors",
        "checkpoints: plan and steps",
        "model.safetensors",
    }


def test_verifying_changes_nothing_and_does_not_load_torch(run: Path):
    before = tree(run)
    code = (
        f"import sys; from dpkit.cli import main; c = main(['verify', {str(run)!r}]); print('torch' in sys.modules, c)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.splitlines()[-1] == "False 0"
    assert tree(run) == before


@pytest.mark.skipif(os.geteuid() == 0, reason="root may write everywhere")
def test_a_folder_that_cannot_be_written_to_verifies(dpkit, run: Path):
    for path in (*run.rglob("*"), run):
        path.chmod(0o500 if path.is_dir() else 0o400)
    try:
        assert dpkit("verify", run).code == 0
    finally:
        for path in (run, *run.rglob("*")):
            path.chmod(0o700)


# -- a process that died while it charged -----------------------------------------------------------------------------


def interrupted(path: Path) -> None:
    """Leaves the ledger as a process that was killed within a charge: pages half written, the old ones in a journal."""
    code = textwrap.dedent(f"""
        import os, sqlite3
        database = sqlite3.connect({str(path)!r}, isolation_level=None)
        database.execute("PRAGMA cache_size = 1")
        database.execute("PRAGMA cache_spill = 1")
        database.execute("BEGIN IMMEDIATE")
        database.execute("UPDATE head SET sequence = 999")
        for number in range(1000, 1200):
            database.execute("INSERT INTO entries VALUES (?, zeroblob(4000), zeroblob(32))", (number,))
        os._exit(0)
    """)
    subprocess.run([sys.executable, "-c", code], check=True)


def test_an_interrupted_charge_is_undone_in_a_copy_only(dpkit, run: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(sys.modules["dpkit.cli.verify"], "_WRITER_PATIENCE", 0.05)
    honest = dpkit("verify", run, "--json").json
    ledger = run / "ledger.sqlite"
    whole = ledger.read_bytes()
    interrupted(ledger)
    assert ledger.read_bytes() != whole and (run / "ledger.sqlite-journal").stat().st_size > 0
    before = tree(run)
    done = dpkit("verify", run, "--json")
    assert done.code == 0, done.out
    assert (done.json["anchor_digest"], done.json["source"]) == (honest["anchor_digest"], honest["source"])
    assert "undone in a copy" in done.out
    assert tree(run) == before


def test_a_ledger_in_another_journal_mode_is_not_touched_either(dpkit, run: Path):
    with closing(sqlite3.connect(run / "ledger.sqlite")) as database:
        assert database.execute("PRAGMA journal_mode = WAL").fetchone() == ("wal",)
    before = tree(run)
    assert dpkit("verify", run).code == 0
    assert tree(run) == before


# -- tampering --------------------------------------------------------------------------------------------------------


def edited(name: str, **changes: Any) -> Damage:
    """Changes fields of a JSON file."""

    def damage(run: Path) -> None:
        path = run / name
        path.write_text(json.dumps(json.loads(path.read_text()) | changes))

    return damage


def replaced(name: str, old: str, new: str) -> Damage:
    """Changes the text of a file, once."""

    def damage(run: Path) -> None:
        text = (run / name).read_text()
        assert old in text
        (run / name).write_text(text.replace(old, new, 1))

    return damage


def without(name: str, key: str) -> Damage:
    def damage(run: Path) -> None:
        said = json.loads((run / name).read_text())
        del said[key]
        (run / name).write_text(json.dumps(said))

    return damage


def last_line(**changes: Any) -> Damage:
    """Changes fields of the last line of metrics.jsonl."""

    def damage(run: Path) -> None:
        *lines, last = (run / "metrics.jsonl").read_text().splitlines()
        changed = json.dumps(json.loads(last) | changes)
        (run / "metrics.jsonl").write_text("\n".join([*lines, changed]) + "\n")

    return damage


def flipped(name: str, place: int) -> Damage:
    def damage(run: Path) -> None:
        data = bytearray((run / name).read_bytes())
        data[place] ^= 1
        (run / name).write_bytes(data)

    return damage


def broken_chain(run: Path) -> None:
    """One digit of one charge is another one."""
    with closing(sqlite3.connect(run / "ledger.sqlite")) as database, database:
        change = "UPDATE entries SET body = CAST(replace(body, '\"step\":3', '\"step\":2') AS BLOB)"
        assert database.execute(change).rowcount > 0


def older_ledger(run: Path) -> None:
    """The ledger as it was two charges ago, whole in itself."""
    rebuilt(run, lambda bodies: bodies[:-2])


def rebuilt(run: Path, change: Callable[[list[dict[str, Any]]], list[dict[str, Any]]]) -> None:
    """A forged ledger: the bodies are changed, and the chain is made anew, so that it is whole in itself."""
    path = run / "ledger.sqlite"
    with Ledger.open(path, read_only=True) as ledger:
        bodies = change([json.loads(body) for _, body, _ in ledger.entries()])
    with closing(sqlite3.connect(path)) as database, database:
        database.execute("DELETE FROM entries")
        tip, sequence = bytes(32), -1
        for sequence, body in enumerate(bodies):
            text = _encode(body.pop("kind"), body)
            tip = hashlib.sha256(tip + text).digest()
            database.execute("INSERT INTO entries VALUES (?, ?, ?)", (sequence, text, tip))
        database.execute("UPDATE head SET sequence = ?, tip = ?", (sequence, tip))
    (run / "ledger.sqlite.tip").unlink()  # or it would be given away at once


def older_ledger_beside_its_note(run: Path) -> None:
    """As a restored backup leaves it."""
    note = (run / "ledger.sqlite.tip").read_bytes()
    older_ledger(run)
    (run / "ledger.sqlite.tip").write_bytes(note)


def forged_plan(change: Callable[[dict[str, Any]], object]) -> Damage:
    """Changes the plan in the ledger and everything that would give it away by its digest."""

    def damage(run: Path) -> None:
        def changed(bodies: list[dict[str, Any]]) -> list[dict[str, Any]]:
            change(next(body for body in bodies if body["kind"] == "plan"))
            return bodies

        rebuilt(run, changed)
        for path in (run / "PRIVACY.md", run / "report.html", run / "nonprivate" / "report.html"):
            path.unlink()
        shutil.rmtree(run / "checkpoints")
        (run / "result.json").unlink()

    return damage


def second_plan(run: Path) -> PlanRecord:
    """Adds one charge of a second plan like the first, which the budget would not allow; returns the first."""
    path = run / "ledger.sqlite"
    with Ledger.open(path, read_only=True) as ledger:
        [(first, _)] = ledger.plans()
    fields = first.model_dump(mode="json") | {"plan_id": "0" * 32}
    more = [{"kind": "plan", **fields}, {"kind": "charge", "plan_id": "0" * 32, "step": 1}]
    rebuilt(run, lambda bodies: [*bodies, *more])
    return first


def checkpoint_of_another_run(run: Path) -> None:
    """The manifest names a plan that the ledger does not know."""
    change_manifest(run, lambda manifest: manifest["plan"].update(plan_id="f" * 32))


def change_manifest(run: Path, change: Callable[[dict[str, Any]], object]) -> None:
    path = max((run / "checkpoints").iterdir())
    data = path.read_bytes()
    length = int.from_bytes(data[:8], "little")
    header = json.loads(data[8 : 8 + length])
    manifest = json.loads(header["__metadata__"]["dpkit"])
    change(manifest)
    header["__metadata__"]["dpkit"] = json.dumps(manifest)
    text = json.dumps(header).encode()
    path.write_bytes(len(text).to_bytes(8, "little") + text + data[8 + length :])


def linked(name: str) -> Damage:
    """A file becomes a symbolic link to a copy of itself outside."""

    def damage(run: Path) -> None:
        outside = run.parent / "outside"
        shutil.move(run / name, outside)
        (run / name).symlink_to(outside)

    return damage


TAMPERED: dict[str, tuple[Damage, set[str]]] = {
    "a bit of the model": (flipped("model.safetensors", -1), {"model.safetensors"}),
    "no digest of the model": (without("result.json", "model_sha256"), {"model.safetensors"}),
    "a smaller epsilon in the result": (edited("result.json", epsilon=1.5), {"result.json: epsilon"}),
    "a larger epsilon in the result": (edited("result.json", epsilon=9.5), {"result.json: epsilon"}),
    "a smaller committed epsilon": (edited("result.json", committed_epsilon=0.5), {"result.json: epsilon"}),
    "NaN for epsilon": (edited("result.json", epsilon=float("nan")), {"result.json: epsilon"}),
    "another delta in the result": (edited("result.json", delta=1e-6), {"result.json: epsilon"}),
    "another relation in the result": (edited("result.json", relation="add_remove"), {"result.json: epsilon"}),
    "another unit in the result": (edited("result.json", unit="user"), {"result.json: epsilon"}),
    "certified in the result": (edited("result.json", certified=False), {"result.json: epsilon"}),
    "more steps than charges": (edited("result.json", steps=7), {"result.json: epsilon"}),
    "another anchor in the result": (edited("result.json", anchor_digest="0" * 64), {"result.json: anchor"}),
    "an anchor beyond all numbers": (edited("result.json", anchor_sequence=2**63 - 1), {"result.json: anchor"}),
    "no anchor in the result": (without("result.json", "anchor_digest"), {"result.json: anchor"}),
    "no JSON in the result": (
        lambda run: (run / "result.json").write_bytes(b"\xff{" * 1000),
        {"result.json: anchor", "result.json: epsilon", "model.safetensors"},
    ),
    "nesting without end": (
        lambda run: (run / "result.json").write_text("[" * 100_000),
        {"result.json: anchor", "result.json: epsilon", "model.safetensors"},
    ),
    "a smaller epsilon in the text": (
        replaced("PRIVACY.md", "epsilon <= 3.0", "epsilon <= 1.0"),
        {"PRIVACY.md: epsilon"},
    ),
    "an epsilon that is no number": (
        replaced("PRIVACY.md", "epsilon <= 3.0", "epsilon <= 1.2.3"),
        {"PRIVACY.md: epsilon"},
    ),
    "another delta in the text": (
        replaced("PRIVACY.md", "at delta = 0.0001", "at delta = 1e-09"),
        {"PRIVACY.md: epsilon"},
    ),
    "another anchor in the text": (
        replaced("PRIVACY.md", "anchor: entry 7", "anchor: entry 6"),
        {"PRIVACY.md: anchor"},
    ),
    "no text": (
        lambda run: (run / "PRIVACY.md").write_bytes(b"\xfe\xff\x00"),
        {"PRIVACY.md: epsilon", "PRIVACY.md: anchor"},
    ),
    "another anchor in the report": (replaced("report.html", "entry 7", "entry 8"), {"report.html: anchor"}),
    "another anchor in the other report": (
        replaced("nonprivate/report.html", "entry 7", "entry 5"),
        {"nonprivate/report.html: anchor"},
    ),
    "an older ledger beside its note": (older_ledger_beside_its_note, {"hash chain"}),
    "an older ledger": (
        older_ledger,
        {
            "result.json: anchor",
            "result.json: epsilon",
            "PRIVACY.md: anchor",
            "PRIVACY.md: epsilon",
            "report.html: anchor",
            "nonprivate/report.html: anchor",
            "metrics.jsonl: charges",
            "checkpoints: anchors",
            "checkpoints: plan and steps",
        },
    ),
    "a broken chain": (broken_chain, {"hash chain"}),
    "a smaller epsilon in the formal statement": (
        replaced("PRIVACY.md", "0001)-differentially private", "00001)-differentially private"),
        {"PRIVACY.md: text"},
    ),
    "half of the text": (
        lambda run: (run / "PRIVACY.md").write_text((run / "PRIVACY.md").read_text().partition("## Diff")[0]),
        {"PRIVACY.md: text"},
    ),
    "a smaller epsilon in the report": (replaced("report.html", "3.0000", "0.3000"), {"report.html: text"}),
    "a certified report": (replaced("report.html", "Certified", "Certified by everybody"), {"report.html: text"}),
    "another accountant": (
        replaced("result.json", '"accountant": "prv"', '"accountant": "RDP"'),
        {"result.json: epsilon"},
    ),
    "no ledger": (lambda run: (run / "ledger.sqlite").unlink(), {"hash chain"}),
    "a rewritten sampling rate": (
        forged_plan(lambda plan: plan["event"].update(sample_rate=0.01)),
        {"sampler and accountant", "config.yaml", "metrics.jsonl: epsilon"},
    ),
    "a rewritten noise multiplier": (
        forged_plan(lambda plan: plan["event"]["event"].update(noise_multiplier=9.0)),
        {"sampler and accountant", "metrics.jsonl: epsilon"},
    ),
    "a rewritten sampler": (
        forged_plan(lambda plan: plan["facts"].update(sampler="Shuffle(batch_size=256)")),
        {"sampler and accountant"},
    ),
    "a rewritten batch size": (
        forged_plan(lambda plan: plan["facts"].update(expected_batch_size=16.0)),
        {"sampler and accountant"},
    ),
    "a rewritten N": (
        forged_plan(lambda plan: plan.update(num_examples=143_700)),
        {"sampler and accountant", "config.yaml"},
    ),
    "more than the budget": (
        lambda run: rebuilt(run, lambda bodies: [bodies[0] | {"budget": {"epsilon": 1.0, "delta": 1e-4}}, *bodies[1:]]),
        {
            "budget",
            "result.json: anchor",
            "PRIVACY.md: anchor",
            "report.html: anchor",
            "nonprivate/report.html: anchor",
            "checkpoints: anchors",
        },
    ),
    "another data set": (replaced("config.yaml", "dataset: digits", "dataset: mnist"), {"config.yaml"}),
    "another batch size": (replaced("config.yaml", "batch_size: 256", "batch_size: 128"), {"config.yaml"}),
    "more epochs": (replaced("config.yaml", "epochs: 1", "epochs: 2"), {"config.yaml"}),
    "another clipping norm": (replaced("config.yaml", "max_grad_norm: 1.0", "max_grad_norm: 0.5"), {"config.yaml"}),
    "another delta": (replaced("config.yaml", "delta: 0.0001", "delta: 0.00001"), {"config.yaml"}),
    "a smaller target": (replaced("config.yaml", "epsilon: 3.0", "epsilon: 1.0"), {"config.yaml"}),
    "a larger target": (replaced("config.yaml", "epsilon: 3.0", "epsilon: 8.0"), {"config.yaml"}),
    "noise instead of a target": (replaced("config.yaml", "epsilon: 3.0", "noise_multiplier: 3.0"), {"config.yaml"}),
    "a declared N": (replaced("config.yaml", "delta: 0.0001", "delta: 0.0001\n  num_examples: 1437"), {"config.yaml"}),
    "cut batches": (
        replaced("config.yaml", "batch_size: 256", "batch_size: 256\n  max_physical_batch_size: 32"),
        {"config.yaml"},
    ),
    "a seed": (replaced("config.yaml", "delta: 0.0001", "delta: 0.0001\n  noise_seed: 1"), {"config.yaml"}),
    "no privacy": (replaced("config.yaml", "private: true", "private: false"), {"config.yaml"}),
    "no configuration": (lambda run: (run / "config.yaml").write_bytes(b"\x00\xff"), {"config.yaml"}),
    "more charges in the metrics": (
        last_line(charged=7, planned=6),
        {"metrics.jsonl: charges", "metrics.jsonl: epsilon"},
    ),
    "steps without charges": (last_line(step=7), {"metrics.jsonl: charges"}),
    "charges that go back": (last_line(charged=1, step=1), {"metrics.jsonl: charges", "metrics.jsonl: epsilon"}),
    "a smaller epsilon in the metrics": (last_line(epsilon=0.1), {"metrics.jsonl: epsilon"}),
    "another delta in the metrics": (last_line(delta=1e-7), {"metrics.jsonl: epsilon"}),
    "another plan in the metrics": (last_line(planned=600), {"metrics.jsonl: charges", "metrics.jsonl: epsilon"}),
    "no metrics that can be read": (
        lambda run: (run / "metrics.jsonl").write_bytes(b"\xff\n" * 9),
        {"metrics.jsonl: charges", "metrics.jsonl: epsilon"},
    ),
    "metrics of two gigabytes": (
        lambda run: os.truncate(run / "metrics.jsonl", 2**31),
        {"metrics.jsonl: charges", "metrics.jsonl: epsilon"},
    ),
    "a checkpoint of another run": (checkpoint_of_another_run, {"checkpoints: plan and steps"}),
    "a checkpoint of another plan": (
        lambda run: change_manifest(run, lambda manifest: manifest["plan"].update(delta=1e-9)),
        {"checkpoints: plan and steps"},
    ),
    "a checkpoint of another data set": (
        lambda run: change_manifest(run, lambda manifest: manifest.update(dataset_name="mnist")),
        {"checkpoints: plan and steps"},
    ),
    "a checkpoint beyond the charges": (
        lambda run: change_manifest(run, lambda manifest: manifest.update(steps_taken=7)),
        {"checkpoints: plan and steps"},
    ),
    "a checkpoint beyond the ledger": (
        lambda run: change_manifest(run, lambda manifest: manifest.update(anchor_sequence=70)),
        {"checkpoints: anchors"},
    ),
    "a checkpoint without a plan": (
        lambda run: change_manifest(run, lambda manifest: manifest["plan"].update(steps="many")),
        {"checkpoints: plan and steps"},
    ),
    "a checkpoint that is cut off": (
        lambda run: (run / "checkpoints" / "step-0000000006.safetensors").write_bytes(b"\x10"),
        {"checkpoints: anchors", "checkpoints: plan and steps"},
    ),
    "a checkpoint with an endless header": (
        lambda run: (run / "checkpoints" / "step-0000000006.safetensors").write_bytes(b"\xff" * 100),
        {"checkpoints: anchors", "checkpoints: plan and steps"},
    ),
    "a linked model": (linked("model.safetensors"), {"model.safetensors", "links"}),
    "a linked configuration": (linked("config.yaml"), {"config.yaml", "links"}),
    "a linked ledger": (linked("ledger.sqlite"), {"hash chain"}),
    "a linked checkpoint": (
        linked("checkpoints/step-0000000006.safetensors"),
        {"checkpoints: anchors", "checkpoints: plan and steps", "links"},
    ),
    "a linked folder": (
        linked("nonprivate"),
        {"nonprivate/report.html: anchor", "links"},
    ),
    "a link beside": (lambda run: (run / ".hidden").symlink_to("/etc/hostname"), {"links"}),
    "a pipe for a result": (
        lambda run: ((run / "result.json").unlink(), os.mkfifo(run / "result.json")),
        {"result.json: anchor", "result.json: epsilon", "model.safetensors", "links"},
    ),
    "a pipe for a ledger": (
        lambda run: ((run / "ledger.sqlite").unlink(), os.mkfifo(run / "ledger.sqlite")),
        {"hash chain"},
    ),
}


@pytest.mark.parametrize("what", TAMPERED)
def test_tampering_fails_the_checks_that_are_named(dpkit, run: Path, what: str):
    damage, expected = TAMPERED[what]
    damage(run)
    done = dpkit("verify", run, "--json")
    assert (done.code, done.json["verified"]) == (4, False)
    # The texts repeat what is elsewhere, so they differ from it as well; the cases that name them are about them.
    assert failed(done) - (TEXTS - expected) == expected, done.out
    table = dpkit("verify", run)
    assert table.code == 4
    assert "FAILED" in table.out and "NOT VERIFIED" in table.out


def test_each_check_that_can_fail_is_failed_by_something(dpkit, run: Path):
    names = {check["name"] for check in dpkit("verify", run, "--json").json["checks"]}
    only_warn = {"certified", "delta", "versions"}
    assert set().union(*(expected for _, expected in TAMPERED.values())) == names - only_warn


@pytest.mark.slow
def test_no_flipped_byte_gives_a_traceback(dpkit, run: Path, tmp_path: Path):
    for name in (
        "result.json",
        "config.yaml",
        "metrics.jsonl",
        "PRIVACY.md",
        "checkpoints/step-0000000006.safetensors",
    ):
        whole = (run / name).read_bytes()
        for place in range(0, min(len(whole), 4000), 97):
            for value in (0x00, 0x7B, 0xFF):
                changed = bytearray(whole)
                changed[place] = value
                (run / name).write_bytes(changed)
                assert dpkit("verify", run, "--json").code in (0, 4), (name, place, value)
        (run / name).write_bytes(whole)


# -- what is doubtful, but not wrong ----------------------------------------------------------------------------------


def test_words_of_a_ledger_cannot_steer_the_terminal(dpkit, tmp_path: Path):
    fields = {"event": Poisson(0.5, Gaussian(50.0)), "steps": 2, "delta": 0.001, "relation": "zero_out"}
    facts = {"sampler": "\x1b[2Jall is well", "expected_batch_size": 50.0, "mechanism": "\x07"}
    plan = PlanRecord(**fields, unit="\x1b[31mexample", num_examples=100, facts=facts)
    with Ledger.create(tmp_path / "l.sqlite", dataset_name="d\x1b[0m", budget={"epsilon": 9.0, "delta": 0.5}) as ledger:
        ledger.charge(plan, plan.event)
    done = dpkit("verify", tmp_path / "l.sqlite")
    assert done.code == 4
    assert "all is well" in " ".join(done.out.split()) and "example" in done.out
    assert "\x1b" not in done.out and "\x07" not in done.out


def test_a_large_delta_warns_and_does_not_fail(dpkit, run: Path, tmp_path: Path):
    plan = PlanRecord(
        event=Poisson(0.5, Gaussian(50.0)), steps=2, delta=0.02, relation="zero_out", unit="example", num_examples=100
    )
    with Ledger.create(tmp_path / "l.sqlite", dataset_name="d", budget={"epsilon": 9.0, "delta": 0.5}) as ledger:
        ledger.charge(plan, plan.event)
    done = dpkit("verify", tmp_path / "l.sqlite", "--json")
    assert done.code == 0
    assert verdicts(done)["delta"] == "warning"
    assert verdicts(done)["sampler and accountant"] == "not checked"


def test_another_version_warns_and_may_have_known_a_weaker_bound(dpkit, run: Path, monkeypatch: pytest.MonkeyPatch):
    edited("result.json", epsilon=3.5)(run)
    monkeypatch.setattr("dpkit.__version__", "99.0")
    done = dpkit("verify", run, "--json")
    assert done.code == 0, done.out
    assert verdicts(done)["versions"] == verdicts(done)["result.json: epsilon"] == "warning"
    edited("result.json", epsilon=0.5)(run)  # below is below, whatever the version
    assert failed(dpkit("verify", run, "--json")) == {"result.json: epsilon"}


def test_a_line_that_a_crash_cut_off_warns(dpkit, run: Path):
    whole = (run / "metrics.jsonl").read_text()
    (run / "metrics.jsonl").write_text(whole + '{"step": 6, "char')
    done = dpkit("verify", run, "--json")
    assert done.code == 0
    assert verdicts(done)["metrics.jsonl: charges"] == "warning"


def test_a_second_plan_in_the_folder_begins_its_own_charges(dpkit, run: Path):
    plan = second_plan(run)
    spent = round_up(epsilon(plan.event, plan.delta, relation=plan.relation).upper)
    last = json.loads((run / "metrics.jsonl").read_text().splitlines()[-1])
    begun = json.dumps(last | {"step": 1, "charged": 1, "epsilon": spent})
    with (run / "metrics.jsonl").open("a") as file:
        file.write(begun + "\n")
    found = verdicts(dpkit("verify", run, "--json"))
    assert found["metrics.jsonl: charges"] == found["metrics.jsonl: epsilon"] == "ok"


def test_a_run_that_is_charged_more_after_its_result_was_written_fails(dpkit, run: Path):
    """A second plan on the ledger: what the result says is below what the data set has spent by now."""
    second_plan(run)
    done = dpkit("verify", run, "--json")
    assert {"budget", "result.json: epsilon", "PRIVACY.md: epsilon"} | TEXTS == failed(done), done.out


# -- the export -------------------------------------------------------------------------------------------------------


def documented_lines() -> str:
    """The lines of code in the module's docstring, exactly as they stand there."""
    lines = [line for line in (verify_module.__doc__ or "").splitlines() if line.startswith("    ")]
    return textwrap.dedent("\n".join(lines)) + "\n"


def recompute(export: Path) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-I", "-c", documented_lines(), export], capture_output=True, text=True, check=False
    )


def test_the_documented_lines_recompute_the_chain_from_the_export_alone(dpkit, run: Path, tmp_path: Path):
    export = tmp_path / "entries.jsonl"
    before = tree(run)
    assert dpkit("verify", run, "--export", export).code == 0
    assert tree(run) == before
    assert len(documented_lines().splitlines()) == 5
    assert recompute(export).returncode == 0
    entries = [json.loads(line) for line in export.read_text().splitlines()]
    with Ledger.open(run / "ledger.sqlite", read_only=True) as ledger:
        assert ledger.anchor() == (entries[-1]["sequence"], entries[-1]["digest"])
        assert [entry["body"].encode() for entry in entries] == [body for _, body, _ in ledger.entries()]


def test_the_documented_lines_see_a_changed_entry(dpkit, run: Path, tmp_path: Path):
    export = tmp_path / "entries.jsonl"
    dpkit("verify", run, "--export", export)
    export.write_text(export.read_text().replace('\\"step\\":3', '\\"step\\":4'))
    done = recompute(export)
    assert done.returncode == 1
    assert "AssertionError: 4" in done.stderr  # header, plan, and two charges come before


@pytest.mark.parametrize("how", ["file", "folder", "link"])
def test_an_export_never_overwrites(dpkit, run: Path, tmp_path: Path, how: str):
    export = tmp_path / "there.jsonl"
    if how == "file":
        export.write_text("mine")
    elif how == "folder":
        export.mkdir()
    else:
        export.symlink_to(tmp_path / "nowhere")
    done = dpkit("verify", run, "--export", export)
    assert (done.code, done.out) == (1, "")
    assert "exists already" in done.err
    assert how != "file" or export.read_text() == "mine"
    assert not (tmp_path / "nowhere").exists()


def test_an_export_that_fails_leaves_nothing(dpkit, run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    before = set(tmp_path.iterdir())

    def full(_: int) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    done = dpkit("verify", run, "--export", tmp_path / "entries.jsonl")
    assert done.code == 1 and "No space left" in done.err
    assert set(tmp_path.iterdir()) == before


def test_an_export_is_for_its_owner_and_not_made_from_a_ledger_that_is_damaged(dpkit, run: Path, tmp_path: Path):
    export = tmp_path / "entries.jsonl"
    whole = (run / "ledger.sqlite").read_bytes()
    broken_chain(run)
    assert dpkit("verify", run, "--export", export).code == 4
    assert not export.exists()
    (run / "ledger.sqlite").write_bytes(whole)
    assert dpkit("verify", run, "--export", export).code == 0
    assert stat.S_IMODE(export.stat().st_mode) == 0o600
