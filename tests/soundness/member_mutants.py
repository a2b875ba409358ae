"""Bugs that the members of the package could have, put into the shipped modules: each is caught by its check.

Those of the catalogue of privacy bugs that are about one member stand here with numbers of their own (X..): most were
seen in public code of the paper that the member comes from, or are the obvious way to get it wrong.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor

import accounting
from accounting import Relation, matrix
from dpkit import clipping, metrics
from dpkit.clipping import GroupAdaptive, PerLayer, Quantile, Setting, quantile
from dpkit.clipping.flat import shrink
from dpkit.engine import attachment, step
from dpkit.engine.loader import Draws
from dpkit.engine.plan import Plan
from dpkit.engine.step import ClippedAccumulator, StepState
from dpkit.mechanisms import Correlated, NoiseKey, correlated, gaussian
from dpkit.sampling import CyclicPoisson, FixedOrder, WithoutReplacement
from dpkit.types import ClippedSum, Participation, Query, Released

from . import member_checks
from .harness import Setup
from .mutants import Active, Patch, mutant

Where = Callable[[Setup], bool]


def bug(
    number: str, check: str, what: str, source: str, where: Where
) -> Callable[[Callable[[Patch, Active], None]], Callable[[Patch, Active], None]]:
    return mutant(number, check, what, source, where, by=member_checks.CHECKS[check])


def clips_by(*kinds: type) -> Where:
    return lambda setup: isinstance(setup.clip, kinds)


def draws_by(kind: type) -> Where:
    return lambda setup: isinstance(setup.sampler, kind)


def _trust_answers(patch: Patch) -> None:
    """The engine shortens answers that are longer than their question says; a bug in a rule alone does no harm."""
    patch.setattr(step, "_bounded", lambda answer, question, units: answer.double())


def _correlated(setup: Setup) -> bool:
    return isinstance(setup.mechanism, Correlated)


# ------------------------------------------------------------------------------------------------------ sensitivity


@bug("X01", "D", "does not shift the bits, with noise for a half", "Opacus 1.6, AdaClip", clips_by(Quantile))
def _unshifted_bits(patch: Patch, active: Active) -> None:
    def below(norms: Tensor, state: Any) -> Tensor:
        active()
        return (norms <= norms.new_tensor(state.quantiles)[:, None]).T.double()

    patch.setattr(quantile, "_below", below)
    _trust_answers(patch)


@bug(
    "X02",
    "D",
    "releases the bits for nothing: the gradient keeps all of z",
    "AdaClip without z_Delta",
    clips_by(Quantile),
)
def _bits_for_free(patch: Patch, active: Active) -> None:
    shipped = Plan.noise_shares

    def noise_shares(self: Plan, questions: Any) -> list[float]:
        active()
        return [1.0, *shipped(self, questions)[1:]]

    patch.setattr(Plan, "noise_shares", noise_shares)
    patch.setattr(gaussian, "check_shares", lambda clipped: None)


@bug("X03", "D", "divides what was asked by the batch in hand", "Opacus 1.6, AdaClip; Xu et al.", clips_by(Quantile))
def _statistic_over_realised_batch(patch: Patch, active: Active) -> None:
    shipped = ClippedAccumulator.result

    def result(self: ClippedAccumulator) -> ClippedSum:
        active()
        factor = self._plan.expected_batch / max(1, self.diagnostics.units)
        self._answers = [total * factor for total in self._answers]
        return shipped(self)

    patch.setattr(ClippedAccumulator, "result", result)


@bug("X04", "D", "lets padding answer", "a gradient of zero lies below any bound: + 1/2", clips_by(Quantile))
def _padding_answers(patch: Patch, active: Active) -> None:
    shipped = ClippedAccumulator._answer

    def answer(self: ClippedAccumulator, norms: Tensor | None, size: int) -> None:
        active()
        real, self._real = self._real, size
        shipped(self, norms, size)
        self._real = real

    patch.setattr(ClippedAccumulator, "_answer", answer)


@bug(
    "X05",
    "D",
    "lets units answer whose gradient was dropped",
    "the null record of the zero-out relation answers",
    lambda setup: isinstance(setup.clip, Quantile) and setup.relation is Relation.ZERO_OUT and setup.sampler is None,
)
def _dropped_units_answer(patch: Patch, active: Active) -> None:
    shipped = ClippedAccumulator._answer

    def answer(self: ClippedAccumulator, norms: Tensor | None, size: int) -> None:
        active()
        dropped, self._dropped = self._dropped, None
        shipped(self, norms, size)
        self._dropped = dropped

    patch.setattr(ClippedAccumulator, "_answer", answer)


@bug(
    "X06",
    "D",
    "scales the noise to the groups that the batch holds",
    "Xu et al., groups present",
    lambda setup: isinstance(setup.clip, GroupAdaptive) and setup.public_n == 2,
)
def _largest_bound_present(patch: Patch, active: Active) -> None:
    shipped, present = GroupAdaptive.factors, set[int]()

    def factors(self: GroupAdaptive, norms: Tensor, labels: Tensor | None, state: Any) -> Tensor:
        assert labels is not None
        present.update(labels.tolist())
        return shipped(self, norms, labels, state)

    def bounds(self: GroupAdaptive, state: tuple[float, ...]) -> list[float]:
        active()
        found = [state[label] for label in present] or list(state)
        present.clear()
        return [max(found)]

    patch.setattr(GroupAdaptive, "factors", factors)
    patch.setattr(GroupAdaptive, "bounds", bounds)


@bug("X07", "D", "does not clamp what it averages", "losses above the range", lambda setup: bool(setup.metrics))
def _metric_not_clamped(patch: Patch, active: Active) -> None:
    def contributions(self: metrics.Mean, values: Tensor) -> Tensor:
        active()
        return values.double().nan_to_num(0.0) - self._middle

    patch.setattr(metrics.Mean, "contributions", contributions)
    _trust_answers(patch)


@bug(
    "X08",
    "D",
    "clips each of K layers to C in place of C / sqrt(K)",
    "per-layer clipping, miscounted",
    clips_by(PerLayer),
)
def _every_layer_to_the_whole_bound(patch: Patch, active: Active) -> None:
    def group_factor(self: PerLayer, group: int, norms: Tensor, state: Any) -> Tensor:
        active()
        return shrink(norms, state.bounds[group] * math.sqrt(len(state.bounds)))

    patch.setattr(PerLayer, "group_factor", group_factor)


@bug(
    "X09",
    "D",
    "normalises each of K layers to C in place of C / sqrt(K)",
    "layer-wise normalisation, miscounted",
    clips_by(clipping.NormalizeIfExceeds),
)
def _every_layer_normalised_to_the_whole_bound(patch: Patch, active: Active) -> None:
    def init(self: clipping.NormalizeIfExceeds, setting: Setting) -> tuple[float, ...]:
        active()
        return (self.max_grad_norm,) * len(setting.sizes)

    patch.setattr(clipping.NormalizeIfExceeds, "init", init)


# ------------------------------------------------------------------------------------------------------------ noise


@bug("X10", "N", "leaves sqrt(K) out of the noise of K groups", "noise for one group", clips_by(PerLayer))
def _noise_for_one_group(patch: Patch, active: Active) -> None:
    def standard_deviations(query: Query, scale: float) -> dict[int, float]:
        active()
        spread = query.sensitivity if query.spread is None else query.spread
        one = max(sensitivity / spread[group] for group, sensitivity in query.sensitivity.items())
        return {group: scale * spread[group] * one / math.sqrt(query.noise_share) for group in query.sensitivity}

    patch.setattr(gaussian, "standard_deviations", standard_deviations)


@bug("X11", "N", "swaps the noise of two groups", "groups numbered in another order", clips_by(PerLayer))
def _noise_of_another_group(patch: Patch, active: Active) -> None:
    shipped = gaussian._add_noise

    def add_noise(value: Tensor, std: float, generator: torch.Generator) -> Tensor:
        active()
        # The first layer of the subject is 60 by 16; it gets the noise of a smaller one.
        return shipped(value, std * (0.9 if value.shape == (60, 16) else 1.0), generator)

    patch.setattr(gaussian, "_add_noise", add_noise)


@bug("X12", "N", "draws correlated noise with z, without the sensitivity of C", "DP-FTRL, unnormalised C", _correlated)
def _strategy_without_its_sensitivity(patch: Patch, active: Active) -> None:
    def scale(self: Correlated, participation: Participation) -> float:
        active()
        return self.noise_multiplier

    patch.setattr(Correlated, "scale", scale)


@bug(
    "X13",
    "N",
    "draws earlier noise anew where it should be made again",
    "regenerated noise, another stream",
    lambda setup: _correlated(setup) and setup.noise.regenerate,  # pyright: ignore[reportAttributeAccessIssue]
)
def _earlier_noise_is_fresh(patch: Patch, active: Active) -> None:
    shipped, drawn = correlated._draw, dict[Any, int]()

    def draw(key: NoiseKey, number: int, name: str, like: Tensor) -> Tensor:
        times = drawn[key, number, name] = drawn.get((key, number, name), 0) + 1
        if times > 1:
            active()
        return shipped(key, number, name + " again" * (times - 1), like)

    patch.setattr(correlated, "_draw", draw)


@bug("X14", "N", "adds independent noise and calls it correlated", "the memory is lost", _correlated)
def _noise_without_memory(patch: Patch, active: Active) -> None:
    shipped = Correlated.release

    def release(self: Correlated, clipped: ClippedSum, state: Any, key: NoiseKey) -> tuple[Released, Any]:
        active()
        return shipped(self, clipped, state._replace(rows=()), key)

    patch.setattr(Correlated, "release", release)


@bug(
    "X15", "N", "halves the noise of what is asked beside", "sigma_b for a sensitivity of 1", lambda s: bool(s.metrics)
)
def _half_the_noise_of_the_answers(patch: Patch, active: Active) -> None:
    shipped = gaussian.released_as

    def released_as(clipped: ClippedSum, noisy: Any, stds: Any) -> Released:
        active()
        halved = [
            {name: (value + query.value[name]) / 2 for name, value in answer.items()}
            for answer, query in zip(noisy[1:], clipped.queries[1:], strict=True)
        ]
        return shipped(clipped, [noisy[0], *halved], stds)

    patch.setattr(gaussian, "released_as", released_as)
    patch.setattr(correlated, "released_as", released_as)


# ------------------------------------------------------------------------------------------------ what a loop can see


def _after_release(
    patch: Patch, active: Active, change: Callable[[Released, ClippedSum, Plan, StepState, StepState], Released]
) -> None:
    """``change(released, clipped, plan, state before, state after)``, after the shipped release."""
    shipped = attachment.release

    def release(clipped: ClippedSum, plan: Plan, state: StepState, *rest: Any) -> Released:
        active()
        before = StepState(state.rule, state.mechanism, state.filters)
        return change(shipped(clipped, plan, state, *rest), clipped, plan, before, state)

    patch.setattr(attachment, "release", release)


def _raw(clipped: ClippedSum) -> tuple[Tensor, ...]:
    return tuple(query.value["answer"] for query in clipped.queries[1:])


@bug("X16", "R", "feeds the filter raw sums", "a filter before the noise", lambda setup: bool(setup.filters))
def _filter_of_raw_sums(patch: Patch, active: Active) -> None:
    def change(released: Released, clipped: ClippedSum, plan: Plan, before: StepState, state: StepState) -> Released:
        raw = Released(clipped.queries[0].value)
        state.filters = tuple(
            filter_.update(raw, old)[1] for filter_, old in zip(plan.filters, before.filters, strict=True)
        )
        return released

    _after_release(patch, active, change)


@bug(
    "X17",
    "R",
    "moves the bound by the sum without noise",
    "adaptive clipping without a charge; Esipova et al., authors' code",
    clips_by(Quantile, clipping.GlobalAdapt, GroupAdaptive, clipping.PerLayerQuantile),
)
def _rule_learns_from_raw_sums(patch: Patch, active: Active) -> None:
    def change(released: Released, clipped: ClippedSum, plan: Plan, before: StepState, state: StepState) -> Released:
        answers = _raw(clipped)
        state.rule = plan.clip.update(before.rule, answers[: len(answers) - len(plan.metrics)])
        return released

    _after_release(patch, active, change)


@bug("X18", "R", "tells metrics without noise", "log lines of raw counts", lambda setup: bool(setup.metrics))
def _raw_metrics(patch: Patch, active: Active) -> None:
    _after_release(patch, active, lambda released, clipped, *rest: released._replace(queries=_raw(clipped)))


@bug(
    "X19",
    "R",
    "tells the optimizer of the raw gradient",
    "second moments of Adam from raw gradients",
    lambda setup: setup.optimizer == "adambc",
)
def _second_moment_of_raw_gradient(patch: Patch, active: Active) -> None:
    def change(released: Released, clipped: ClippedSum, plan: Plan, before: StepState, state: StepState) -> Released:
        return released._replace(raw={name: v / plan.expected_batch for name, v in clipped.queries[0].value.items()})

    _after_release(patch, active, change)


# ------------------------------------------------------------------------------------------ sampling and accounting


@bug(
    "X20",
    "A",
    "counts the places of the order by batches that were drawn",
    "samplers with a cursor of their own",
    lambda setup: isinstance(setup.sampler, FixedOrder) and setup.leave_after is not None and setup.workers > 0,
)
def _order_by_draws(patch: Patch, active: Active) -> None:
    def draws(self: Draws) -> Iterator[list[int]]:
        self._arranged = self._sampler.arrange(self._population, self._run_key.arrangement())
        for _ in range(self.logical_steps):
            generator, step = self._run_key.sampling(self._drawn), self._drawn
            self._drawn += 1
            active()
            yield self._sampler.draw(self._population, generator, step=step, arranged=self._arranged).tolist()

    patch.setattr(Draws, "__iter__", draws)


@bug(
    "X21",
    "A",
    "begins the order anew when a run is resumed",
    "epoch-based samplers",
    lambda setup: setup.public_n == 18 and setup.workers == 0,
)
def _order_from_the_start(patch: Patch, active: Active) -> None:
    shipped = Draws.__iter__

    def draws(self: Draws) -> Iterator[list[int]]:
        active()
        self.first_step, kept = self._drawn, self.first_step
        yield from shipped(self)
        self.first_step = kept

    patch.setattr(Draws, "__iter__", draws)


@bug("X22", "A", "shuffles the order in every pass", "reshuffling loaders", draws_by(FixedOrder))
def _another_order_every_pass(patch: Patch, active: Active) -> None:
    def draw(
        self: FixedOrder, population: int, generator: torch.Generator, *, step: int = 0, arranged: Any = None
    ) -> Tensor:
        active()
        number, place = divmod(step, self.steps_per_event(population))
        order = torch.randperm(population, generator=torch.Generator().manual_seed(number))
        return order[place * self.batch_size : (place + 1) * self.batch_size]

    patch.setattr(FixedOrder, "draw", draw)


@bug(
    "X23",
    "A",
    "puts units into groups by their index",
    "BandMF: a removal shifts all",
    lambda setup: setup.public_n == 2000,
)
def _groups_by_index(patch: Patch, active: Active) -> None:
    def arrange(self: CyclicPoisson, population: int, generator: torch.Generator) -> Tensor:
        active()
        return torch.arange(population) % self.groups

    patch.setattr(CyclicPoisson, "arrange", arrange)


@bug(
    "X24",
    "A",
    "draws the groups anew in every step",
    "Poisson, charged as cyclic",
    lambda setup: setup.public_n == 2000,
)
def _groups_anew(patch: Patch, active: Active) -> None:
    shipped = CyclicPoisson.draw

    def draw(
        self: CyclicPoisson, population: int, generator: torch.Generator, *, step: int = 0, arranged: Any = None
    ) -> Tensor:
        active()
        return shipped(self, population, generator, step=step, arranged=self.arrange(population, generator))

    patch.setattr(CyclicPoisson, "draw", draw)


@bug("X25", "A", "draws with replacement", "DistributedUniformWithReplacementSampler", draws_by(WithoutReplacement))
def _with_replacement(patch: Patch, active: Active) -> None:
    def draw(self: WithoutReplacement, population: int, generator: torch.Generator, **rest: Any) -> Tensor:
        active()
        return torch.randint(population, (self.batch_size,), generator=generator)

    patch.setattr(WithoutReplacement, "draw", draw)


@bug(
    "X26",
    "A",
    "draws half of a batch from the one before",
    "a window over a shuffled list",
    draws_by(WithoutReplacement),
)
def _overlapping_subsets(patch: Patch, active: Active) -> None:
    left: list[int] = []

    def draw(self: WithoutReplacement, population: int, generator: torch.Generator, **rest: Any) -> Tensor:
        active()
        half = left[-(self.batch_size // 2) :]
        others = [unit for unit in torch.randperm(population, generator=generator).tolist() if unit not in half]
        left[:] = half + others[: self.batch_size - len(half)]
        return torch.tensor(left)

    patch.setattr(WithoutReplacement, "draw", draw)


def _charge(patch: Patch, active: Active, event: Callable[[Plan, list[float]], accounting.Event]) -> None:
    """Charge ``event(plan, shares of the noise)``."""

    def charged(self: Plan) -> accounting.Event:
        active()
        return event(self, self.noise_shares(self.questions(Setting((2259,), self.expected_batch))))

    patch.setattr(Plan, "event", property(charged))


def _z(multiplier: float) -> accounting.Gaussian:
    return accounting.Gaussian(noise_multiplier=multiplier)


@bug("X27", "V", "charges z_Delta, the noise of the gradient alone", "Opacus 1.6, AdaClip", clips_by(Quantile))
def _charges_the_gradient_alone(patch: Patch, active: Active) -> None:
    _charge(
        patch,
        active,
        lambda plan, shares: plan.sampler.event(
            _z(plan.mechanism.noise_multiplier / math.sqrt(shares[0])), plan.num_examples
        ),
    )


@bug("X28", "V", "charges the bits as a query on a batch of their own", "two events for one batch", clips_by(Quantile))
def _charges_two_batches(patch: Patch, active: Active) -> None:
    def event(plan: Plan, shares: list[float]) -> accounting.Event:
        z = plan.mechanism.noise_multiplier
        parts = [plan.sampler.event(_z(z / math.sqrt(share)), plan.num_examples) for share in shares]
        return accounting.Composed(events=tuple(parts))

    _charge(patch, active, event)


@bug(
    "X29",
    "V",
    "takes correlated noise under Poisson sampling",
    "amplification that no theorem gives",
    lambda setup: _correlated(setup) and setup.sampler is None,
)
def _correlated_under_poisson(patch: Patch, active: Active) -> None:
    def sensitivity(strategy: Any, participation: Participation) -> float:
        active()
        return matrix.sensitivity(strategy.coefficients(participation.steps), participation.steps)

    patch.setattr(correlated, "_sensitivity", sensitivity)


@bug("X30", "V", "charges one participation for several passes", "DP-FTRL, single epoch", _correlated)
def _one_participation(patch: Patch, active: Active) -> None:
    shipped = FixedOrder.participation

    def participation(self: FixedOrder, steps: int, num_examples: int) -> Participation:
        active()
        return shipped(self, steps, num_examples)._replace(max_participations=1)

    patch.setattr(FixedOrder, "participation", participation)


@bug("X31", "V", "charges a cycle every two cycles", "groups and bands mixed up", draws_by(CyclicPoisson))
def _every_second_cycle(patch: Patch, active: Active) -> None:
    def steps_per_event(self: CyclicPoisson, num_examples: int) -> int:
        active()
        return 2 * self.groups

    patch.setattr(CyclicPoisson, "steps_per_event", steps_per_event)


@bug("X32", "V", "charges q in place of the rate within a group", "cyclic Poisson as Poisson", draws_by(CyclicPoisson))
def _rate_over_all_groups(patch: Patch, active: Active) -> None:
    def event(self: CyclicPoisson, mechanism: accounting.Event, num_examples: int) -> accounting.Event:
        active()
        return accounting.Poisson(sample_rate=self.sample_rate, event=mechanism)

    patch.setattr(CyclicPoisson, "event", event)


@bug("X33", "V", "charges subsets of a larger data set", "N of all splits", draws_by(WithoutReplacement))
def _subset_of_more(patch: Patch, active: Active) -> None:
    def event(self: WithoutReplacement, mechanism: accounting.Event, num_examples: int) -> accounting.Event:
        active()
        return accounting.WithoutReplacement(batch_size=self.batch_size, num_examples=2 * num_examples, event=mechanism)

    patch.setattr(WithoutReplacement, "event", event)
