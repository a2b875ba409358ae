"""TensorBoard's files, read back with TensorBoard's own reader."""

from __future__ import annotations

import importlib.util
import socket
from pathlib import Path

import pytest
import torch
from torch.nn import functional as F
from torch.utils.data import DataLoader, TensorDataset

import dpkit
from dpkit.errors import ConfigError
from dpkit.integrations.tensorboard import TensorBoard
from dpkit.run_folder import RunFolder


def events(folder: Path):
    """Every event in every file of the folder, as TensorBoard reads them."""
    loader = pytest.importorskip(
        "tensorboard.backend.event_processing.event_file_loader", reason="the extra `log` is not installed"
    )
    files = sorted(folder.iterdir())
    assert all("tfevents" in file.name for file in files)
    return [event for file in files for event in loader.LegacyEventFileLoader(str(file)).Load()]


def scalars(folder: Path) -> dict[str, list[tuple[int, float]]]:
    found: dict[str, list[tuple[int, float]]] = {}
    for event in events(folder):
        for value in event.summary.value:
            found.setdefault(value.tag, []).append((event.step, value.simple_value))
    return found


@pytest.fixture(autouse=True)
def _extra():
    pytest.importorskip("tensorboard", reason="the extra `log` is not installed")


def test_public_numbers_are_read_back_at_their_steps(tmp_path: Path, tell, records):
    tell(TensorBoard(tmp_path / "run"), records)
    found = scalars(tmp_path / "run" / "tensorboard")
    assert found.keys() == {"privacy/epsilon", "privacy/charged", "learning_rate", "test_accuracy"}
    assert found["test_accuracy"] == [(4, 0.75)]
    assert found["privacy/charged"] == [(step, step) for step in range(1, 5)]
    assert [rate for _, rate in found["learning_rate"]] == pytest.approx([r.learning_rate for r in records])


def test_epsilon_is_never_shown_below_what_was_spent_and_says_what_it_means(tmp_path: Path, tell, records):
    tell(TensorBoard(tmp_path / "run"), records)
    shown = [epsilon for _, epsilon in scalars(tmp_path / "run" / "tensorboard")["privacy/epsilon"]]
    for record, epsilon in zip(records, shown, strict=True):
        assert record.epsilon <= epsilon <= record.epsilon * (1 + 2.0**-22)
    assert all(torch.tensor(record.epsilon).item() != record.epsilon for record in records)  # rounding was needed
    [meaning] = {
        value.metadata.summary_description
        for event in events(tmp_path / "run" / "tensorboard")
        for value in event.summary.value
        if value.tag == "privacy/epsilon"
    }
    for part in ("delta = 0.0001", "unit: example", "relation: zero_out", "sampler: Poisson", "num_examples: 1437"):
        assert part in meaning


@pytest.mark.parametrize("nonprivate", [False, True])
def test_what_is_not_private_lies_apart_and_only_if_asked_for(tmp_path: Path, tell, records, nonprivate: bool):
    tell(TensorBoard(RunFolder(tmp_path / "run"), nonprivate=nonprivate), records)
    public = (file.read_bytes() for file in (tmp_path / "run" / "tensorboard").iterdir())
    assert not any(b"mean_loss" in content or b"units" in content for content in public)
    apart = tmp_path / "run" / "nonprivate" / "tensorboard"
    assert apart.exists() == nonprivate
    if nonprivate:
        assert scalars(apart).keys() == {"nonprivate/units", "nonprivate/mean_loss"}
        assert scalars(apart)["nonprivate/units"] == [(step, 250.0 + step) for step in range(1, 5)]


def test_no_file_tells_a_time_a_host_or_a_process(tmp_path: Path, tell, records, clock: float):
    tell(TensorBoard(tmp_path / "run", nonprivate=True), records)
    for folder in (tmp_path / "run" / "tensorboard", tmp_path / "run" / "nonprivate" / "tensorboard"):
        times = [event.wall_time for event in events(folder)]
        assert times[0] == 0.0 and set(times[1:]) == {1.0, 2.0, 3.0, 4.0}
        for file in folder.iterdir():
            assert file.name == "events.out.tfevents.0000000001.dpkit"
            assert str(int(clock)) not in file.name and socket.gethostname().encode() not in file.read_bytes()


def test_a_resumed_run_goes_on_beside_the_file_that_was_cut_off(tmp_path: Path, tell, records):
    folder = tmp_path / "run" / "tensorboard"
    tell(TensorBoard(tmp_path / "run"), records[:2])
    [first] = folder.iterdir()
    first.write_bytes(first.read_bytes()[:-3])
    # Step 2 is taken again, and charged a second time.
    redone = [record._replace(charged=record.charged + 1) for record in records[1:]]
    tell(TensorBoard(tmp_path / "run"), redone)
    found = scalars(folder)["privacy/charged"]
    assert found == [(1, 1), (2, 2), (2, 3), (3, 4), (4, 5)]


def test_without_the_extra_the_way_out_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(ConfigError, match=r"pip install 'dpkit\[log\]'"):
        TensorBoard(tmp_path / "run")
    assert not (tmp_path / "run").exists()


def test_the_engine_tells_it_every_step(tmp_path: Path):
    data = TensorDataset(torch.randn(40, 3), torch.randint(0, 2, (40,)))
    model = torch.nn.Linear(3, 2)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.5)
    engine = dpkit.PrivacyEngine(tmp_path / "run", callbacks=[TensorBoard(tmp_path / "run")])
    model, optimizer, loader = engine.make_private(
        model, optimizer, DataLoader(data, 10), noise_multiplier=2.0, target_delta=1e-3, epochs=1, max_grad_norm=1.0
    )
    for x, y in loader:
        optimizer.zero_grad()
        engine.backward(F.cross_entropy(model(x), y, reduction="none"))
        optimizer.step()
    spent = engine.epsilon().upper
    engine.detach()
    found = scalars(tmp_path / "run" / "tensorboard")
    assert [step for step, _ in found["privacy/epsilon"]] == [1, 2, 3, 4]
    assert found["learning_rate"] == [(step, 0.5) for step in range(1, 5)]
    assert found["privacy/epsilon"][-1][1] >= spent
