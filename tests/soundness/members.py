"""Which members of the package the checks run on: a new clipping rule, sampler or mechanism joins by standing here.

The grids of ``checks.py`` go through sizes, types, models and relations with flat clipping, Poisson sampling and
independent noise; these here go through everything else.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from itertools import product

import torch

from accounting import Relation
from dpkit.clipping import (
    Automatic,
    BoundSplit,
    ClipRule,
    Flat,
    Global,
    GlobalAdapt,
    GroupAdaptive,
    NoiseSplit,
    NormalizeIfExceeds,
    PerLayer,
    PerLayerQuantile,
    Quantile,
)
from dpkit.filters import LowPass, butterworth, first_order, momentum
from dpkit.mechanisms import BISR, BSR, BandMF, Correlated, DiscreteGaussian, HardenedGaussian, SquareRoot
from dpkit.metrics import ClippedCount, Count, Mean, Metric
from dpkit.sampling import CyclicPoisson, FixedOrder, WithoutReplacement

from .harness import Setup


@dataclass(frozen=True)
class Member:
    """A clipping rule, and where it is tightest.

    Attributes:
      edges: norms at which the rule does something else, at the start of a run.
      reach: the largest ratio of distance to sensitivity that it must come to.
    """

    rule: ClipRule
    edges: tuple[float, ...] = ()
    reach: float = 0.99


RULES: dict[str, Member] = {
    "flat": Member(Flat(0.7), (0.7,)),
    "per layer, least noise": Member(PerLayer(0.7), (0.7,)),
    "per layer, equal budget": Member(PerLayer(0.7, noise_split=NoiseSplit.EQUAL_BUDGET)),
    "per layer, equal noise": Member(PerLayer((0.3, 1.1), noise_split=NoiseSplit.GLOBAL)),
    "per layer, by dimension": Member(PerLayer(0.7, bound_split=BoundSplit.DIMENSION)),
    "AUTO-S": Member(Automatic(0.7)),
    "AUTO-V": Member(Automatic(0.7, gamma=0.0)),
    "quantile": Member(Quantile(0.7, noise_std=6.0), (0.7,)),
    "per layer, quantile": Member(PerLayerQuantile(0.7, noise_std=6.0), (0.7,)),
    "global": Member(Global(0.7, threshold=5.0), (5.0,)),
    "global, adaptive": Member(GlobalAdapt(0.7, threshold=5.0, noise_std=6.0), (5.0,)),
    "group adaptive": Member(GroupAdaptive(0.4, num_labels=3, noise_std=6.0), (0.4, 0.8)),
    "normalise if exceeds": Member(NormalizeIfExceeds(0.7), (0.7,)),
    "normalise if exceeds, by dimension": Member(NormalizeIfExceeds(0.7, bound_split=BoundSplit.DIMENSION)),
}

METRICS: tuple[Metric, ...] = (Mean("size", 8.0, 0.0, 3.0), Count("first class", 6.0), ClippedCount(6.0))
LEARNING = [name for name, member in RULES.items() if type(member.rule).questions is not ClipRule.questions]
AMPLIFYING = [name for name, member in RULES.items() if isinstance(member.rule, Automatic | NormalizeIfExceeds)]

FEW = ("normal", "loss1e30", "NaN in ordinary", "duplicate", "member in aligned", "member in offset300")
MORE = (*FEW, "x1e3", "loss1e3", "loss1e15", "1e30", "NaN", "Inf", "lossInf", "lossNaN", "offset300", "member")

FormOf = tuple[str, str, int | None, tuple[Metric, ...]]  # form, backend, microbatch, metrics
FORMS: tuple[FormOf, ...] = (
    ("loop", "ghost", None, METRICS),
    ("step", "ghost", 3, ()),
    ("loop", "ghost", 3, ()),
    ("step", "ghost", None, METRICS),
    ("step", "vmap", None, METRICS),
    ("step", "vmap", 4, ()),
)


def grid_D(full: bool = False) -> Iterator[tuple[Setup, tuple[str, ...]]]:
    """Every rule in every form; by default one or two of the forms for each, so that all forms come with some rule."""
    for number, (name, member) in enumerate(RULES.items()):
        forms = FORMS if full else (FORMS[number % 2], FORMS[2 + number % 4])
        sizes = (1, 9, 33) if full else (9,)
        for (form, backend, micro, metrics), n in product(forms, sizes):
            chosen = Setup(form=form, backend=backend, clip=member.rule, micro=micro, metrics=metrics, public_n=n)
            yield chosen, MORE if full and n == 9 else FEW
        if full or name in ("quantile", "group adaptive"):
            for n in (2, 9) if full else (2,):
                yield Setup(clip=member.rule, metrics=METRICS, public_n=n), FEW
        for relation in (Relation.ZERO_OUT, Relation.REPLACE_ONE):
            # Replace-one has no theorem for a truncated draw, which is what the loop form cuts.
            micro = 3 if relation is Relation.ZERO_OUT or full else None
            form = "loop" if relation is Relation.ZERO_OUT else "step"
            if full or name in LEARNING:
                chosen = Setup(form=form, clip=member.rule, metrics=METRICS, micro=micro, relation=relation)
                yield chosen, FEW
        if full:
            for subject, dtype in product(("tied", "conv", "sequence"), (torch.float32, torch.bfloat16)):
                yield Setup(subject=subject, dtype=dtype, clip=member.rule), FEW
                yield Setup(form="step", subject=subject, dtype=dtype, clip=member.rule, micro=3), FEW
    zero_out = Relation.ZERO_OUT
    for form, n in product(("loop", "step"), (9, 10)):
        # A record in one of the batches of a pass, or drawn among others.
        if full or (form, n) in (("loop", 10), ("step", 9)):
            yield Setup(form=form, sampler=FixedOrder(3, n), relation=zero_out, public_n=n, metrics=METRICS), FEW
            drawn = WithoutReplacement(4, n)
            yield Setup(form=form, sampler=drawn, relation=Relation.REPLACE_ONE, public_n=n, metrics=METRICS), FEW
            # Under add/remove the draws of the others would move; their law does not.
            yield Setup(form=form, sampler=CyclicPoisson(n // 2 / n, 2), public_n=n, relation=zero_out), FEW
    for mechanism in (Correlated(1.3, BISR(3)), Correlated(1.3, SquareRoot(), regenerate=True)):
        rule = Quantile(0.7, noise_std=60.0)  # the noise of a draw is larger, and so must be that of the bits
        setup = Setup(sampler=FixedOrder(3, 9), relation=zero_out, mechanism=mechanism, clip=rule)
        yield setup, FEW
    for form, mechanism in (("loop", HardenedGaussian(1.3)), ("step", DiscreteGaussian(1.3))):
        if full:
            yield Setup(form=form, mechanism=mechanism, clip=Quantile(0.7, noise_std=6.0), metrics=METRICS), FEW
        yield Setup(form=form, mechanism=mechanism, public_n=2, relation=zero_out, sampler=FixedOrder(2, 2)), FEW
    cyclic = Setup(form="step", sampler=CyclicPoisson(0.5, 2), mechanism=Correlated(1.3, BandMF(2)), metrics=METRICS)
    yield cyclic.but(relation=zero_out), FEW


def grid_D_products(full: bool = False) -> Iterator[Setup]:
    """Every rule on gradients that are products, or nearly nothing; by default those that make gradients longer."""
    for number, (name, member) in enumerate(RULES.items()):
        if not full and name not in ("flat", "per layer, least noise", "quantile") and name not in AMPLIFYING:
            continue
        for form, backend, micro, metrics in FORMS if full else (FORMS[number % 4],):
            for n in (1, 9) if full else (9,):
                yield Setup(form, "product", backend, clip=member.rule, micro=micro, metrics=metrics, public_n=n)


LOW_PASS: tuple[LowPass, ...] = (momentum(0.9), first_order())


def grid_R(full: bool = False) -> Iterator[Setup]:
    base = Setup(steps=6, q=0.5, public_n=8, optimizer="adam")
    rules = {name: member.rule for name, member in RULES.items()}
    zero_out, replace = Relation.ZERO_OUT, Relation.REPLACE_ONE
    ordered = base.but(sampler=FixedOrder(3, 8), relation=zero_out)
    yield base.but(clip=rules["quantile"], metrics=METRICS, filters=(butterworth(2, 0.1),), optimizer="adambc")
    yield base.but(form="step", backend="vmap", clip=rules["per layer, quantile"], filters=LOW_PASS)
    yield base.but(clip=rules["global, adaptive"], metrics=METRICS)
    yield base.but(form="step", clip=rules["group adaptive"], metrics=METRICS, optimizer="adambc")
    yield ordered.but(mechanism=Correlated(1.3, BISR(2), True), clip=Quantile(0.5, noise_std=60.0), filters=LOW_PASS)
    yield base.but(sampler=WithoutReplacement(3, 8), relation=replace, filters=LOW_PASS)
    yield base.but(form="step", mechanism=DiscreteGaussian(1.3), metrics=METRICS[:2], optimizer="adambc")
    bands = Correlated(1.3, BandMF(2))
    yield base.but(form="step", sampler=CyclicPoisson(0.25, 2), mechanism=bands, optimizer="adambc", seed=8)
    if full:
        yield base.but(mechanism=HardenedGaussian(1.3), clip=rules["quantile"], metrics=METRICS)
        yield base.but(form="step", clip=rules["quantile"], micro=3)
        yield base.but(clip=rules["per layer, quantile"], micro=3, metrics=METRICS)
        yield base.but(clip=rules["AUTO-S"], filters=LOW_PASS, reduction="mean", metrics=METRICS[2:])
        yield base.but(form="step", clip=rules["normalise if exceeds"], micro=3)
        yield ordered.but(metrics=METRICS, mechanism=Correlated(1.3, SquareRoot()), form="step")
        yield ordered.but(metrics=METRICS)
        yield base.but(sampler=CyclicPoisson(0.25, 3), clip=rules["quantile"])


def grid_N(full: bool = False) -> Iterator[Setup]:
    """The keys differ from setup to setup: otherwise all would look at the same draws."""
    base = Setup(subject="noise", steps=120, q=1.0, public_n=4, sigma=1.3, lr=0.0)
    ordered = base.but(sampler=FixedOrder(2, 4), relation=Relation.ZERO_OUT, bound=0.7)
    found = [
        base.but(clip=PerLayer(0.7, bound_split=BoundSplit.DIMENSION)),
        base.but(clip=Quantile(0.7, noise_std=1.0), metrics=METRICS),
        base.but(form="step", clip=PerLayerQuantile(0.7, noise_std=2.0)),
        ordered.but(mechanism=Correlated(1.3, SquareRoot())),
        ordered.but(form="step", mechanism=Correlated(1.3, BISR(5), regenerate=True), metrics=(Count("any", 90.0),)),
        base.but(form="step", sampler=CyclicPoisson(0.25, 4), mechanism=Correlated(1.3, BandMF(4)), bound=0.7),
        base.but(mechanism=HardenedGaussian(1.3), clip=PerLayer(0.7, bound_split=BoundSplit.DIMENSION)),
        base.but(form="step", mechanism=DiscreteGaussian(1.3), metrics=METRICS, bound=0.7),
    ]
    if full:
        found += [
            base.but(clip=PerLayer(0.7, bound_split=BoundSplit.DIMENSION, noise_split=NoiseSplit.EQUAL_BUDGET)),
            base.but(clip=PerLayer(0.7, bound_split=BoundSplit.DIMENSION, noise_split=NoiseSplit.GLOBAL)),
            base.but(form="step", clip=PerLayer((0.2, 0.5, 0.1, 1.5)), micro=2),
            base.but(clip=PerLayerQuantile(0.7, noise_std=2.0, noise_split=NoiseSplit.GLOBAL), metrics=METRICS),
            base.but(clip=GroupAdaptive(0.7, 3, noise_std=1.9), optimizer="adambc"),
            base.but(clip=GlobalAdapt(0.7, 9.0, noise_std=1.9)),
            ordered.but(mechanism=Correlated(1.3, SquareRoot(), regenerate=True)),
            ordered.but(mechanism=Correlated(1.3, BISR(5)), clip=Quantile(0.7, noise_std=60.0)),
            ordered.but(mechanism=Correlated(1.3, BSR(4)), clip=PerLayer(0.7)),
        ]
    for number, setup in enumerate(found):
        yield setup.but(seed=20 + number)


def grid_N_grid() -> Iterator[Setup]:
    """The mechanisms that promise a grid."""
    for number, mechanism in enumerate((HardenedGaussian(1.3), DiscreteGaussian(1.3))):
        base = Setup(subject="noise", steps=10, public_n=4, lr=0.0, mechanism=mechanism, seed=50 + number)
        yield base.but(bound=0.7)
        yield base.but(form="step", clip=PerLayer(0.7, bound_split=BoundSplit.DIMENSION), metrics=METRICS)


def grid_A() -> Iterator[Setup]:
    base = Setup(q=0.25, lr=0.0, sigma=3.0)
    zero_out, replace = Relation.ZERO_OUT, Relation.REPLACE_ONE
    for form in ("loop", "step"):
        yield base.but(form=form, sampler=FixedOrder(5, 23), relation=zero_out, public_n=23, steps=22)
    leaving = base.but(sampler=FixedOrder(4, 20), relation=zero_out, public_n=20, steps=23, leave_after=3)
    yield leaving.but(workers=2)
    yield leaving.but(sampler=FixedOrder(4, 20, order_seed=None), leave_after=2, micro=2, steps=11)
    yield leaving.but(form="step", mechanism=Correlated(3.0, BISR(3)))
    yield base.but(sampler=WithoutReplacement(10, 40), relation=replace, public_n=40, steps=200)
    for mechanism in (HardenedGaussian(3.0), DiscreteGaussian(3.0)):
        yield base.but(sampler=FixedOrder(5, 23), relation=zero_out, public_n=23, steps=11, mechanism=mechanism)
    yield base.but(form="step", sampler=CyclicPoisson(0.125, 4), public_n=40, steps=240)
    yield base.but(sampler=CyclicPoisson(0.25, 4), public_n=2000, steps=8)  # everybody of the group whose turn it is


def grid_V() -> Iterator[Setup]:
    base = Setup(subject="noise", steps=14, q=0.5, public_n=8, bound=0.7, sigma=1.3, lr=0.0)
    zero_out, replace = Relation.ZERO_OUT, Relation.REPLACE_ONE
    yield base.but(clip=Quantile(0.7, noise_std=1.0))
    yield base.but(form="step", clip=PerLayerQuantile(0.7, noise_std=2.0), micro=3)
    yield base.but(clip=PerLayer(0.7), metrics=(Mean("size", 1.5, 0.0, 2.0), ClippedCount(1.4)))
    yield base.but(sampler=FixedOrder(3, 8), relation=zero_out)
    yield base.but(form="step", sampler=FixedOrder(3, 8), relation=replace, stop_after=4)
    yield base.but(sampler=WithoutReplacement(3, 8), relation=replace)
    yield base.but(sampler=CyclicPoisson(0.25, 3))
    yield base.but(sampler=FixedOrder(3, 8), relation=zero_out, mechanism=Correlated(1.3, SquareRoot()))
    yield base.but(form="step", sampler=FixedOrder(3, 8), relation=replace, mechanism=Correlated(1.3, BISR(3), True))
    yield base.but(form="step", sampler=CyclicPoisson(0.25, 3), mechanism=Correlated(1.3, BandMF(3)), stop_after=7)
    yield base.but(mechanism=HardenedGaussian(1.3), clip=Quantile(0.7, noise_std=1.0), micro=3)
    yield base.but(form="step", mechanism=DiscreteGaussian(1.3), metrics=(Mean("size", 1.5, 0.0, 2.0),), micro=3)
    yield base.but(mechanism=DiscreteGaussian(1.3), sampler=FixedOrder(3, 8), relation=zero_out)


REFUSED: tuple[Setup, ...] = (
    Setup(steps=8, q=0.5, mechanism=Correlated(1.3, BSR(2)), form="step"),
    Setup(steps=8, q=0.5, public_n=8, mechanism=Correlated(1.3, SquareRoot())),
    Setup(steps=8, q=0.5, mechanism=Correlated(1.3, BandMF(3)), cap=4, form="step"),
    Setup(steps=9, sampler=CyclicPoisson(0.25, 2), public_n=8, mechanism=Correlated(1.3, BandMF(3))),
    Setup(steps=8, sampler=WithoutReplacement(3, 9), mechanism=Correlated(1.3, BISR(2)), relation=Relation.REPLACE_ONE),
    Setup(steps=8, sampler=FixedOrder(3, 9), relation=Relation.ADD_REMOVE),
    Setup(steps=8, sampler=FixedOrder(3, 9), relation=Relation.ADD_REMOVE, mechanism=Correlated(1.3, BISR(2))),
    Setup(steps=8, sampler=WithoutReplacement(3, 9), relation=Relation.ADD_REMOVE),
    Setup(steps=8, sampler=WithoutReplacement(3, 9), relation=Relation.ZERO_OUT),
    Setup(steps=8, sampler=CyclicPoisson(0.25, 2), public_n=8, relation=Relation.REPLACE_ONE),
    Setup(steps=8, q=0.5, public_n=8, clip=Quantile(0.7, noise_std=0.6)),
    Setup(steps=8, q=0.25, public_n=200, mechanism=DiscreteGaussian(1.3), micro=64),
    Setup(steps=8, q=0.5, mechanism=DiscreteGaussian(1.3), cap=4, form="step"),
    Setup(steps=8, sampler=WithoutReplacement(3, 9), mechanism=DiscreteGaussian(1.3), relation=Relation.REPLACE_ONE),
)
"""Runs that no theorem covers, or whose side questions leave nothing for the gradient: none of them may release."""
