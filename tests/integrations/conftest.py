"""What the tests of the integrations share: the records of a small run, told to a callback as the engine does."""

from __future__ import annotations

import time
from collections.abc import Callable

import pytest

from dpkit.callbacks import Callback, StepRecord

SETTINGS = {
    "dataset_name": "digits",
    "steps": 4,
    "num_examples": 1437,
    "delta": 1e-4,
    "unit": "example",
    "relation": "zero_out",
    "sampler": "Poisson(sample_rate=0.5)",
}


@pytest.fixture
def records() -> list[StepRecord]:
    """Four steps; no epsilon or learning rate among them is exact in single precision."""
    return [StepRecord(step, step, 4, 0.1 + step / 7, 1e-4, 2.3 / step) for step in range(1, 5)]


@pytest.fixture
def clock() -> float:
    """What the clock says once a run has begun: a number that is unlike all others."""
    return 9_876_543_210.0


@pytest.fixture
def tell(monkeypatch: pytest.MonkeyPatch, clock: float) -> Callable[[Callback, list[StepRecord]], None]:
    """``tell(callback, records)``: a whole run, in the order of the engine, under a clock that gives itself away."""

    def run(callback: Callback, records: list[StepRecord]) -> None:
        callback.on_begin(SETTINGS)
        with monkeypatch.context() as patched:
            patched.setattr(time, "time", lambda: clock)
            patched.setattr(time, "time_ns", lambda: int(clock * 1e9))
            for record in records:
                callback.on_step(record)
                # Not only as the engine does: a callback that did not ask must not take them either.
                callback.on_nonprivate(record, {"units": 250.0 + record.step, "mean_loss": 3.25})
            callback.on_metrics(records[-1], {"test_accuracy": 0.75})
            callback.on_end()

    return run
