"""White-box audits: how much of the claimed epsilon an adversary can be shown to get who sees every release.

Two ways. :func:`white_box` runs the shipped engine on made-up data of its own. :func:`in_run` reads the canaries that
rode along in somebody's training run (:class:`dpkit.engine.canaries.Canaries`), which cost it no privacy and changed
nothing else. Both end in a lower bound on epsilon: if it lies above the claim, the claim is false but for the stated
confidence; if it lies below, no contradiction was found, and nothing was proved.

What is assumed: canaries are independent experiments, that is, noise is independent over coordinates and who takes part
over units. The checks N and A of ``tests/soundness`` test just that; an audit that sees every canary as one experiment
cannot. The bound inverts the family of the claimed mechanism with every noise multiplier scaled (``estimators.
family_inversion``).

Source: Nasr et al. 2023, https://arxiv.org/abs/2302.07956; canaries of one coordinate each instead of two runs.
"""

from __future__ import annotations

import math
import tempfile
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn.functional import one_hot

import accounting
import dpkit
from accounting import Event, Relation
from accounting.trade_off import Tangents, tangents
from dpkit.clipping import ClipRule, Flat, Setting
from dpkit.engine.canaries import LARGER, Canaries, log_ratio, refuse_groups, refuse_plan, refuse_unseen
from dpkit.engine.plan import Plan, check_count
from dpkit.errors import InvalidArgument, OutOfOrder
from dpkit.mechanisms import Mechanism

from .estimators import family_inversion, rank_test
from .scaling import scaled
from .verdict import LowerBound, Verdict, judge

DEFAULT_CANARIES = 10_000
_PER_LAYER = 64  # canaries through each kind of layer: with more units the noise has more rounding to cover
_PER_LAYER_ALONE = 1000  # the most, under a rule that leaves no room for others
_LAYERS_PART = 0.1  # of the probability of error, for the layers looked at one by one

_ASSUMED = "Noise is independent over coordinates and steps, and units take part independently (not tested here)."


class WhiteBox(NamedTuple):
    """What a white-box audit found, and what it saw.

    Attributes:
      verdict: the lower bound beside the claim.
      inside, outside: scores of the canaries that took part, and of those that did not.
      event: the claimed event, of all steps that were audited.
    """

    verdict: Verdict
    inside: np.ndarray
    outside: np.ndarray
    event: Event


def white_box(
    mechanism: Mechanism,
    *,
    sample_rate: float = 1.0,
    steps: int = 20,
    delta: float = 1e-5,
    clipping: ClipRule | None = None,
    canaries: int = DEFAULT_CANARIES,
    relation: Relation = Relation.ADD_REMOVE,
    confidence: float = 0.95,
    claim: float | None = None,
    claim_source: str = "typed",
    seed: int | None = None,
) -> WhiteBox:
    """Audit the shipped engine with a plan of ``steps`` steps of Poisson batches, on made-up data.

    Most canaries are put into the sum through the run's own clipping rule, at a cost of one number each; 64 go through
    each of an embedding, a linear layer and a convolution, as examples that the loader draws, the layers differentiate
    and the rule clips.

    Args:
      mechanism: independent noise, such as ``dpkit.Gaussian(1.0)``.
      sample_rate, steps, delta, relation: of the plan.
      clipping: the rule; flat clipping to 1 where it is left out. Under a rule with several groups all canaries go
        through the layers, a third through each and 1,000 at most.
      canaries: how many take part beside those of the layers; as many again do not. An audit of 20 steps at sample rate
        1 takes about 3 s for 100,000.
      confidence: probability with which the bound is below the true epsilon.
      claim: the epsilon that is to be contradicted; what the accountant says of the plan where it is left out.
      claim_source: where a given claim comes from, in words.
      seed: makes the audit repeatable; None takes noise and draws from the operating system, and gives the global
        generators of the process a secret state, as every certified run does.
    Raises:
      InvalidArgument: a value outside its domain, or a rule or mechanism that canaries cannot audit.
    """
    check_count("canaries", canaries)
    if canaries < 0:
        raise InvalidArgument(f"canaries is {canaries}; give how many take part beside those of the layers.")
    rule = Flat(1.0) if clipping is None else clipping
    apart = canaries > 0 and _one_group(rule)
    per_layer = _PER_LAYER if apart else min(max(_PER_LAYER, canaries // 3), _PER_LAYER_ALONE)
    layers = _Layers(per_layer)
    bounds = rule.bounds(rule.init(_setting(rule, layers)))
    layers.size = LARGER * math.hypot(*bounds)
    examples = layers.inside()
    plan = Plan(
        sampler=dpkit.Poisson(sample_rate),
        clip=rule,
        mechanism=mechanism,
        steps=steps,
        num_examples=len(examples),
        delta=delta,
        relation=relation,
    )
    refuse_plan(plan)
    refuse_unseen(plan, dict(layers.named_parameters()))
    beside = Canaries(canaries, seed=seed) if apart else None
    reader = _Reader(layers, plan, bounds)
    # The folder holds a ledger like any other; nothing of a made-up run is kept.
    with tempfile.TemporaryDirectory() as folder:
        engine = dpkit.PrivacyEngine(folder, dataset_name="made-up canaries", seed=seed)
        step = engine.attach(
            layers,
            lambda model, batch: model(batch[0], batch[1]),
            reader,
            plan=plan,
            dataset=torch.utils.data.TensorDataset(*examples.T),
            canaries=beside,
        )
        try:
            for batch in engine.batches():
                step(batch)
        finally:
            engine.detach()
            engine.ledger.close()
    inside, outside = layers.split(reader.scores)
    parts = [(inside[kind], outside[kind]) for kind in range(len(_Layers.NAMES))]
    evidence = (inside.ravel(), outside.ravel())
    exercised = [f"gradients of {name}: {per_layer} canaries" for name in _Layers.NAMES]
    if beside is not None:
        evidence = (np.append(evidence[0], beside.inside), np.append(evidence[1], beside.outside))
        exercised.append(f"rule, sum, charge and noise: {beside.count} canaries")
    return _judged(
        evidence,
        parts,
        plan,
        steps,
        confidence=confidence,
        claim=claim,
        claim_source=claim_source,
        audited=f"{plan.mechanism}, sample rate {sample_rate:g}, {steps} steps",
        exercised=exercised,
    )


def in_run(engine: dpkit.PrivacyEngine, canaries: Canaries, *, confidence: float = 0.95) -> WhiteBox:
    """Audit a training run in which ``canaries`` rode along, as far as it has come.

    The claim is the epsilon of the steps that the canaries saw, by the plan that the ledger was charged for. Steps of
    an earlier process (a resumed run) are not in it: their canaries are gone. The confidence is that of one look, at a
    moment fixed beforehand; who looks k times asks for a confidence of 1 - (1 - confidence)/k each time.

    Raises:
      OutOfOrder: the canaries are of another run, or no step was released yet.
    """
    if not canaries.serves(engine.plan):
        raise OutOfOrder("these canaries did not ride along in this run; pass them to make_private as canaries=.")
    if canaries.steps == 0:
        raise OutOfOrder("no step was released yet, so there is nothing to audit.")
    return _judged(
        (canaries.inside, canaries.outside),
        [],
        engine.plan,
        canaries.steps,
        confidence=confidence,
        claim=None,
        claim_source="",
        audited=f"{canaries.steps} steps of the plan in the ledger of {engine.ledger.dataset_name!r}",
        exercised=[
            f"rule, sum, charge and noise: {canaries.count} canaries; not the gradients of the model's own layers"
        ],
    )


def _judged(
    evidence: tuple[np.ndarray, np.ndarray],
    parts: list[tuple[np.ndarray, np.ndarray]],
    plan: Plan,
    steps: int,
    *,
    confidence: float,
    claim: float | None,
    claim_source: str,
    audited: str,
    exercised: list[str],
) -> WhiteBox:
    """The bound of all canaries together, or of a part that contradicts the claim by itself, if it is larger.

    They share the probability of error.
    """
    event = plan.event_of(steps)
    accounted = accounting.epsilon(event, plan.delta, relation=plan.relation)
    if claim is None:
        claim, claim_source = accounting.round_up(accounted.upper), f"{accounted.accountant} accountant"

    def bound_of(scores: tuple[np.ndarray, np.ndarray], error: float) -> LowerBound:
        found = family_inversion(
            *scores,
            lambda scale: scaled(event, scale),
            relation=plan.relation,
            delta=plan.delta,
            confidence=1 - error,
        )
        return found._replace(confidence=confidence)

    error, apart = 1 - confidence, _LAYERS_PART if parts else 0.0
    each = error * apart / max(1, len(parts))
    bounds = [bound_of(evidence, error * (1 - apart))]
    claimed = tangents(event, relation=plan.relation)
    bounds += [bound_of(part, each) for part in parts if _contradicts(part, claimed, each)]
    verdict = judge(
        max(bounds, key=lambda found: found.epsilon),
        claim=claim,
        claim_source=f"{claim_source}; {audited}",
        exercised=tuple(exercised),
        assumptions=(_ASSUMED,),
    )
    return WhiteBox(verdict, *evidence, event)


def _contradicts(scores: tuple[np.ndarray, np.ndarray], claimed: Tangents, error: float) -> bool:
    """Whether so few errors have at most the chance ``error`` under the claim, at the median of those inside."""
    return rank_test(*scores, rank=len(scores[0]) // 2).chance(claimed) <= error


# ------------------------------------------------------------------------------------------- canaries through layers


class _Layers(nn.Module):
    """One layer of each kind; canary (kind, j) has a gradient of length ``size`` in the j-th weight of that kind.

    Even weights belong to canaries that take part, odd ones to those that do not.
    """

    NAMES = ("an embedding", "a linear layer", "a convolution")

    def __init__(self, count: int) -> None:
        super().__init__()
        self.count, self.size = count, 0.0
        self.width = math.isqrt(2 * count - 1) + 1
        self.embedding = nn.Embedding(self.width**2, 1)
        self.linear = nn.Linear(self.width, self.width, bias=False)
        self.convolution = nn.Conv1d(self.width, self.width, 1, bias=False)

    def inside(self) -> Tensor:
        """(3 count, 2): kind and weight of each canary that takes part."""
        weights = 2 * torch.arange(self.count)
        return torch.cat([torch.stack([torch.full_like(weights, kind), weights], 1) for kind in range(3)])

    def forward(self, kind: Tensor, weight: Tensor) -> Tensor:
        row, column = weight // self.width, weight % self.width
        inputs = one_hot(column, self.width).float()
        outputs = (
            self.embedding(weight)[:, 0],
            self.linear(inputs).gather(1, row[:, None])[:, 0],
            self.convolution(inputs[:, :, None])[:, :, 0].gather(1, row[:, None])[:, 0],
        )
        return self.size * torch.stack(outputs).gather(0, kind[None])[0]

    def split(self, scores: dict[int, np.ndarray]) -> tuple[np.ndarray, np.ndarray]:
        """(3, count) scores of the canaries inside, and of those outside."""
        flat = np.stack([scores[id(layer.weight)] for layer in (self.embedding, self.linear, self.convolution)])
        return flat[:, 0 : 2 * self.count : 2], flat[:, 1 : 2 * self.count : 2]


class _Reader(torch.optim.Optimizer):
    """Moves nothing, and adds up the log-likelihood ratio of each weight's canary from what an optimizer is given."""

    def __init__(self, layers: _Layers, plan: Plan, bounds: list[float]) -> None:
        super().__init__(layers.parameters(), {"lr": 0.0})
        self._rate = plan.sampler.sample_rate
        names = dict(layers.named_parameters())
        groups = plan.clip.groups(names) if len(bounds) > 1 else [0] * len(names)
        # What a canary adds to a gradient, at most.
        self._brings = {id(p): bounds[k] / plan.expected_batch for p, k in zip(names.values(), groups, strict=True)}
        self._stds: dict[int, float] = {}
        self.scores = {id(parameter): np.zeros(parameter.numel()) for parameter in names.values()}

    def observe_release(self, parameter: nn.Parameter, raw: Tensor, noise_std: float) -> None:
        self._stds[id(parameter)] = noise_std

    def step(self, closure: Any = None) -> None:
        for parameter in self.param_groups[0]["params"]:
            std = self._stds[id(parameter)]
            noisy = parameter.grad.double().flatten().numpy() / std
            self.scores[id(parameter)] += log_ratio(noisy, self._brings[id(parameter)] / std, self._rate)


def _one_group(rule: ClipRule) -> bool:
    try:
        refuse_groups(rule)
    except InvalidArgument:
        return False
    return True


def _setting(rule: ClipRule, layers: _Layers) -> Setting:
    """What a rule that learns nothing may know of the audited model; such a rule has no use for the batch size."""
    groups = rule.groups(dict(layers.named_parameters()))
    sizes = [0] * (max(groups) + 1)
    for group, parameter in zip(groups, layers.parameters(), strict=True):
        sizes[group] += parameter.numel()
    return Setting(tuple(sizes), 1.0)
