"""White-box audits of the engine: how tight they are, and what they catch.

``python -m experiments audits`` runs eight audits of each plan with noise as it should be, audits of the same plans
with noise that is too small, and 200 audits at a confidence of 1 - 1e-6, of which none may contradict the claim. It
writes ``results/audits.md``.
"""

from __future__ import annotations

import math
import platform
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import date
from pathlib import Path
from statistics import fmean, stdev
from typing import NamedTuple
from unittest import mock

from scipy import stats

import dpkit
from dpkit.audit.white_box_audit import white_box
from dpkit.mechanisms import gaussian

PAGE = Path(__file__).parent / "results" / "audits.md"
SEEDS = 8
SURE = 1 - 1e-6


class Setting(NamedTuple):
    """An audited plan, and how many canaries fit into the time."""

    noise_multiplier: float
    sample_rate: float
    steps: int
    canaries: int


SETTINGS = (
    Setting(2.684, 1.0, 20, 2500),
    Setting(2.684, 1.0, 20, 20_000),
    Setting(4.835, 1.0, 20, 2500),
    Setting(4.835, 1.0, 20, 20_000),
    Setting(16.68, 1.0, 20, 20_000),
    Setting(16.68, 1.0, 20, 1_000_000),
    Setting(1.0, 0.1, 100, 2500),
    Setting(1.0, 0.1, 100, 20_000),
    Setting(2.0, 0.1, 100, 20_000),
    Setting(0.8, 0.02, 500, 20_000),
)
WEAKER = (0.95, 0.9, 0.8)
CAUGHT = (SETTINGS[1], SETTINGS[3], SETTINGS[7])


@contextmanager
def noise_times(factor: float) -> Iterator[None]:
    """The shipped engine, whose noise is smaller than it says."""
    shipped = gaussian._add_noise
    with mock.patch.object(
        gaussian, "_add_noise", lambda value, std, generator: shipped(value, factor * std, generator)
    ):
        yield


def audit(setting: Setting, seed: int, confidence: float = 0.95) -> tuple[float, float, float]:
    """(lower bound, claim, seconds)."""
    started = time.perf_counter()
    verdict = white_box(
        dpkit.Gaussian(setting.noise_multiplier),
        sample_rate=setting.sample_rate,
        steps=setting.steps,
        canaries=setting.canaries,
        confidence=confidence,
        seed=seed,
    ).verdict
    return verdict.epsilon, verdict.claim or math.inf, time.perf_counter() - started


def main(arguments: list[str]) -> int:
    """Run all audits and write the page; returns the exit code."""
    if arguments:
        print(f"audits takes no arguments, and {' '.join(arguments)} was given.", file=sys.stderr)
        return 1
    rows = []
    for setting in SETTINGS:
        found = [audit(setting, seed) for seed in range(SEEDS)]
        ratios = [bound / claim for bound, claim, _ in found]
        half = stats.t.ppf(0.975, SEEDS - 1) * stdev(ratios) / math.sqrt(SEEDS)
        rows.append(
            f"| {setting.sample_rate:g}, {setting.steps}, {setting.noise_multiplier:g} | {found[0][1]:.3f} | "
            f"{setting.canaries:,} | **{fmean(ratios):.3f}** | {fmean(ratios) - half:.3f} to "
            f"{fmean(ratios) + half:.3f} | {min(ratios):.3f} | {max(ratios):.3f} | "
            f"{fmean(seconds for *_, seconds in found):.1f} |"
        )
        print(rows[-1], flush=True)
    caught = []
    for setting in CAUGHT:
        for factor in WEAKER:
            with noise_times(factor):
                found = [audit(setting, seed) for seed in range(SEEDS)]
            times = sum(bound > claim for bound, claim, _ in found)
            caught.append(
                f"| {setting.sample_rate:g}, {setting.steps}, {setting.noise_multiplier:g} | x {factor:g} | "
                f"{fmean(bound / claim for bound, claim, _ in found):.3f} | {times} of {SEEDS} |"
            )
            print(caught[-1], flush=True)
    plans = (SETTINGS[0], SETTINGS[2], Setting(0.9, 0.25, 10, 2500), Setting(1.5, 0.5, 15, 2500))
    sure = [audit(plans[number % len(plans)], 1000 + number, SURE) for number in range(200)]
    exceeded = sum(bound > claim for bound, claim, _ in sure)
    page = _PAGE.format(
        date=date.today().isoformat(),
        machine=f"{platform.machine()}, Python {platform.python_version()}",
        rows="\n".join(rows),
        caught="\n".join(caught),
        exceeded=exceeded,
        largest=max(bound / claim for bound, claim, _ in sure),
    )
    PAGE.write_text(page, encoding="utf-8")
    print(f"{exceeded} of 200 claims exceeded; wrote {PAGE}")
    return 0


_PAGE = """# White-box audits of the engine

Written by `python -m experiments audits` on {date} ({machine}, one thread, beside other work).

An audit runs the shipped engine on made-up data in which canaries take part, each with a gradient of a thousand
clipping norms at a coordinate of its own, and asks of the releases which canaries were in. The lower bound on epsilon
holds with confidence 95 % (delta = 1e-5). A bound below the claim proves nothing; a bound above it contradicts it.

## How tight the bounds are

Lower bound / claimed epsilon over eight seeds: mean, its 95 % interval (Student), least, largest. At a confidence of
95 % one bound in twenty may lie above the true epsilon; for an alarm, ask for more, as the last section does.

| rate, steps, noise | claimed epsilon | canaries in and out, each | mean | interval | least | largest | seconds |
|---|---|---|---|---|---|---|---|
{rows}

## Noise that is smaller than it should be

The shipped mechanism was changed to draw its noise times a factor. 95 % confidence, eight seeds.

| rate, steps, noise | noise | mean bound / claim | contradicted |
|---|---|---|---|
{caught}

## False alarms

200 audits of the engine as it is, at a confidence of 1 - 1e-6: {exceeded} exceeded the claim; the largest bound was
{largest:.3f} of it.
"""
