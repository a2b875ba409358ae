"""The experiment ``low_pass``: its arithmetic against simulation, its true gradients against a loop, and its page."""

from __future__ import annotations

import math
from pathlib import Path

import numpy as np
import pytest
import torch
from scipy.signal import lfilter
from torch.nn import functional as F

from dpkit.datasets import Split
from dpkit.filters import LowPass, first_order, momentum
from experiments import low_pass
from experiments.low_pass import Case, Trace

TINY = Case("tiny", batch_size=60, steps=4, rates=(0.5, 1.0), tuning_seeds=1, seeds=2, watched=3)


def tiny_split() -> Split:
    generator = np.random.default_rng(0)
    x = generator.normal(size=(400, 2, 3)).astype(np.float32)
    return Split(x[:360], (x[:360, 0, 0] > 0).astype(np.int64), x[360:], (x[360:, 0, 0] > 0).astype(np.int64), 2)


# -- arithmetic -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("pull", [0.03, 0.5, 1.0, 1.6])
def test_without_a_filter_the_noise_left_is_a_geometric_sum(pull: float):
    expected = sum((1 - pull) ** (2 * k) for k in range(50))
    assert low_pass.noise_left(None, 50, pull) == pytest.approx(expected, rel=1e-12)


@pytest.mark.parametrize("pull", [0.01, 0.3, 1.0, 2.5])
def test_the_noise_left_behind_momentum_is_that_of_the_heavy_ball_in_the_long_run(pull: float):
    # Stationary variance of x <- x - α(λx + n) + β·(last move), α = 1 - β.
    beta = 0.9
    alpha = 1 - beta
    expected = alpha * (1 + beta) / (pull * (1 - beta) * (2 * (1 + beta) - alpha * pull))
    assert low_pass.noise_left(momentum(beta), 1500, pull) == pytest.approx(expected, rel=1e-6)


def test_noise_left_is_the_variance_of_simulated_runs():
    # 20,000 runs: the standard error of a variance is 1 percent, so 5 percent fails by chance with probability 1e-6.
    generator, filter_, pull = np.random.default_rng(1), first_order(), 0.7
    x, outputs, ones = np.zeros(20_000), [], []
    noise = generator.normal(size=(25, 20_000))
    gradients: list[np.ndarray] = []
    for row in noise:
        gradients.append(pull * x + row)
        ones.append(1.0)
        outputs = lfilter(filter_.b, filter_.a, np.array(gradients), axis=0)
        x = x - outputs[-1] / lfilter(filter_.b, filter_.a, ones)[-1]
    assert low_pass.noise_left(filter_, 25, pull) == pytest.approx(x.var(), rel=0.05)


def test_the_gradient_error_is_that_of_a_simulated_slow_signal_in_noise():
    # 400,000 steps of a signal with R(k) = 4·0.98^k; noise of variance 9. The signal forgets in 50 steps, so there are
    # some 8,000 independent stretches: 10 percent is six standard errors, failing by chance with probability 1e-8.
    generator, filter_ = np.random.default_rng(2), first_order()
    signal = lfilter([1.0], [1.0, -0.98], generator.normal(0, 2 * math.sqrt(1 - 0.98**2), size=400_000))
    filtered = lfilter(filter_.b, filter_.a, signal + generator.normal(0, 3, size=signal.shape))
    expected = low_pass.gradient_error(filter_, 4 * 0.98 ** np.arange(150), 9.0)
    assert np.mean((filtered[200:] - signal[200:]) ** 2) == pytest.approx(expected, rel=0.1)


def test_a_constant_gradient_is_not_distorted_and_leaves_the_noise_gain():
    for filter_ in (first_order(), momentum(0.5), LowPass(b=(0.5, 0.5))):
        expected = 3 * filter_.noise_gain
        assert low_pass.gradient_error(filter_, np.full(80, 7.0), 3.0) == pytest.approx(expected, rel=1e-9)


def test_the_autocorrelation_of_turning_and_bouncing_gradients():
    steps = torch.arange(40)
    turning = [torch.tensor([math.cos(0.2 * t), math.sin(0.2 * t)]) * (1 + t) for t in range(40)]
    assert Trace(turning).autocorrelation(10) == pytest.approx(np.cos(0.2 * np.arange(11)), abs=1e-6)
    bouncing = [torch.tensor([(-1.0) ** int(t), 0.0]) for t in steps]
    assert Trace(bouncing).autocorrelation(3) == pytest.approx([1, -1, 1, -1])


def test_the_error_of_what_was_used_is_its_mean_squared_distance():
    trace = Trace([torch.tensor([1.0, 2.0]), torch.zeros(2)], [torch.tensor([1.0, 4.0]), torch.tensor([1.0, 1.0])])
    assert trace.error == pytest.approx(3.0)
    assert trace.covariance(1) == pytest.approx([2.5, 0.0])


# -- runs -------------------------------------------------------------------------------------------------------------


def test_true_gradients_are_the_sum_of_gradients_clipped_one_by_one(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(low_pass, "_CHUNK", 100)  # the last chunk is shorter
    data = tiny_split()
    model = low_pass.linear(data, 0)
    x, y = torch.from_numpy(data.train_x), torch.from_numpy(data.train_y)
    total = [torch.zeros_like(p) for p in model.parameters()]
    for row, target in zip(x, y, strict=True):
        model.zero_grad()
        F.cross_entropy(model(row[None]), target[None]).backward()
        gradients = [p.grad for p in model.parameters()]
        norm = torch.stack([g.norm() for g in gradients]).norm()
        for part, gradient in zip(total, gradients, strict=True):
            part += gradient * min(1.0, 0.8 / float(norm))
    found = low_pass.clipped_sum(model, x, y, 0.8)
    for part, each in zip(total, found.values(), strict=True):
        torch.testing.assert_close(each, part, rtol=1e-4, atol=1e-5)


def test_a_private_run_stays_within_its_target_and_leaves_no_folder(tmp_path: Path):
    outcome, epsilon, multiplier = low_pass.train(TINY, tiny_split(), (first_order(),), 1.0, 0, tmp_path)
    assert 0 <= outcome.accuracy <= 1
    assert 0.9 * TINY.epsilon < epsilon <= TINY.epsilon
    assert multiplier > 0.3
    assert list(tmp_path.iterdir()) == []


def test_a_trace_holds_the_last_steps_and_releases_scatter_around_true_gradients_as_the_noise_says(tmp_path: Path):
    # Without a filter the error of 3 releases in 14 coordinates is the noise's variance and that of the sampling, which
    # is smaller here: below a quarter or above four times the noise with probability under 1e-6 (chi-squared, 42).
    trace = low_pass.traced(TINY, tiny_split(), (), 0.5, 0, tmp_path)
    assert len(trace.true) == len(trace.used) == TINY.watched
    assert 0.25 < trace.error / trace.noise_variance < 4


def test_without_noise_equal_seeds_come_to_equal_ends_and_a_filter_changes_them():
    data = tiny_split()
    first, again = (low_pass.train_without_noise(TINY, data, (), 1.0, 3) for _ in range(2))
    assert first == again
    assert low_pass.train_without_noise(TINY, data, (momentum(0.9),), 1.0, 3).loss != first.loss
    # A filter that lets everything through changes nothing.
    assert low_pass.train_without_noise(TINY, data, (LowPass(b=(2.0,)),), 1.0, 3).loss == pytest.approx(first.loss)


# -- the command ------------------------------------------------------------------------------------------------------


def test_the_command_writes_page_and_picture_of_every_case(monkeypatch: pytest.MonkeyPatch, tmp_path: Path):
    monkeypatch.setattr(low_pass, "CASES", (TINY,))
    monkeypatch.setattr(low_pass, "load", lambda name, folder: tiny_split())
    threads = torch.get_num_threads()
    assert low_pass.main(["--out", str(tmp_path / "out")]) == 0
    assert torch.get_num_threads() == threads
    assert sorted(path.name for path in (tmp_path / "out").iterdir()) == ["low_pass.md", "low_pass.png"]
    text = (tmp_path / "out" / "low_pass.md").read_text(encoding="utf-8")
    assert "nan" not in text
    lines = [line for line in text.splitlines() if line.startswith("| tiny | 4 of 60 ")]
    assert len(lines) == len(low_pass.ARMS)
    tables = [part.splitlines() for part in text.split("\n\n") if part.startswith("| ")]
    assert len(tables) == 3
    assert all(len({line.count("|") for line in lines}) == 1 for lines in tables)
    page = tmp_path / "out" / "low_pass.md"
    page.write_text(text.replace("(To be written after the run.)", "By hand."), encoding="utf-8")
    assert low_pass.written_by_hand(page) == "By hand."


def test_without_the_data_it_says_what_is_missing_and_ends_with_1(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.delenv("DPKIT_DATA", raising=False)
    assert low_pass.main(["--data-dir", str(tmp_path), "--out", str(tmp_path / "out")]) == 1
    assert "fashion" in capsys.readouterr().err
