"""Bugs of the noise: too little, not everywhere, not fresh, or foreseeable. Check N must catch them.

One entry of the catalogue is about several ranks, which the package refuses (``test_impossible.py``); it becomes the
same mistake within one process: the mean of two full draws of noise (M15).
"""

from __future__ import annotations

import hashlib
from typing import Any

import torch
from torch import Tensor

import dpkit
from accounting import Receipt
from dpkit.engine.attachment import Attachment
from dpkit.engine.step import ClippedAccumulator
from dpkit.mechanisms import Gaussian, HardenedGaussian, NoiseKey, RunKey, gaussian
from dpkit.types import ClippedSum, Released

from .checks import check_N_resumed
from .member_checks import check_N_grid
from .mutants import Active, Patch, mutant, noise_by, plain, release_by


@mutant("M09", "N", "leaves C out of the noise, to its disadvantage", "std sigma instead of sigma C", plain)
def _noise_of_the_wrong_unit(patch: Patch, active: Active) -> None:
    # sigma C squared for C = 0.7: without C at all the noise would be too large, which is no breach.
    noise_by(patch, active, lambda name, noise, bound: noise * bound)


@mutant(
    "M10",
    "N",
    "divides the noise by the accumulation steps",
    "gradient accumulation",
    lambda setup: setup.micro is not None,
    slow=True,
)
def _noise_over_microbatches(patch: Patch, active: Active) -> None:
    shipped, micro = ClippedAccumulator.__init__, [1]

    def initialise(self: ClippedAccumulator, *args: Any, **kwargs: Any) -> None:
        shipped(self, *args, **kwargs)
        micro[0] = self._microbatches

    patch.setattr(ClippedAccumulator, "__init__", initialise)
    noise_by(patch, active, lambda name, noise, bound: noise / micro[0])


@mutant("M11", "N", "adds no noise to the biases", "tensors without a hook", plain, slow=True)
def _no_noise_on_biases(patch: Patch, active: Active) -> None:
    noise_by(patch, active, lambda name, noise, bound: noise * (0.0 if "bias" in name else 1.0))


@mutant("M12", "N", "uses the key of the first step at every step", "generator re-seeded in the step", plain)
def _one_key_for_all_steps(patch: Patch, active: Active) -> None:
    shipped = RunKey.noise_key

    def noise_key(self: RunKey, receipt: Receipt) -> NoiseKey:
        active()
        key = shipped(self, receipt)
        self.__dict__.setdefault("first_key", key)
        return self.__dict__["first_key"]

    patch.setattr(RunKey, "noise_key", noise_key)


@mutant("M13", "N", "starts the same stream for every tensor", "generator state restored per tensor", plain, slow=True)
def _one_stream_for_all_tensors(patch: Patch, active: Active) -> None:
    shipped = NoiseKey.generator

    def generator(self: NoiseKey, query: int, name: str, shard: int = 0, device: Any = "cpu") -> torch.Generator:
        active()
        return shipped(self, query, "any tensor", shard, device)

    patch.setattr(NoiseKey, "generator", generator)


@mutant("M14", "N", "takes seed 0 when no seed is given", "jax_privacy, secure_noise_example.py", plain)
def _default_seed(patch: Patch, active: Active) -> None:
    shipped = RunKey.__init__

    def initialise(self: RunKey, seed: int | None = None) -> None:
        if seed is None:
            active()
        shipped(self, 0 if seed is None else seed)

    patch.setattr(RunKey, "__init__", initialise)


@mutant("M15", "N", "averages the noise of two ranks", "fastDP, torch_seed_is_fixed", plain, slow=True)
def _mean_of_two_draws(patch: Patch, active: Active) -> None:
    shipped = Gaussian.release

    def release(self: Gaussian, clipped: ClippedSum, state: Any, key: NoiseKey) -> tuple[Released, Any]:
        active()
        second = NoiseKey(hashlib.sha256(key._key + b"rank 1").digest())
        one, _ = shipped(self, clipped, state, key)
        other, _ = shipped(self, clipped, state, second)
        return one._replace(value={name: (one.value[name] + other.value[name]) / 2 for name in one.value}), state

    patch.setattr(Gaussian, "release", release)


@mutant("M32", "N", "adds noise only where the sum is not zero", "sparse embedding gradients", plain, slow=True)
def _sparse_noise(patch: Patch, active: Active) -> None:
    def changed(released: Released, clipped: ClippedSum) -> Released:
        (query,) = clipped.queries
        return released._replace(
            value={name: torch.where(query.value[name] != 0, v, 0.0) for name, v in released.value.items()}
        )

    release_by(patch, active, changed)


@mutant("M33", "N", "uses each draw for two releases", "cached noise", plain, slow=True)
def _noise_used_twice(patch: Patch, active: Active) -> None:
    cached: dict[str, Tensor] = {}
    count = [0]

    def changed(released: Released, clipped: ClippedSum) -> Released:
        (query,) = clipped.queries
        fresh = count[0] % 2 == 0
        count[0] += 1
        if fresh:
            cached.update({name: v.double() - query.value[name] for name, v in released.value.items()})
        return released._replace(
            value={name: (query.value[name] + cached[name]).to(v.dtype) for name, v in released.value.items()}
        )

    release_by(patch, active, changed)


@mutant("M40", "N", "draws noise and batches from one stream", "one generator for everything", plain, slow=True)
def _one_stream_for_sampling_and_noise(patch: Patch, active: Active) -> None:
    from dpkit.mechanisms import keys

    shipped, generator_shipped = RunKey.noise_key, NoiseKey.generator

    def noise_key(self: RunKey, receipt: Receipt) -> NoiseKey:
        key = shipped(self, receipt)
        object.__setattr__(key, "twin", keys._expand(self._secret, "sampling", receipt.step - 1))
        return key

    def generator(self: NoiseKey, query: int, name: str, shard: int = 0, device: Any = "cpu") -> torch.Generator:
        active()
        if name == "0.weight":
            return keys.generator_from(self.twin)  # pyright: ignore[reportAttributeAccessIssue]
        return generator_shipped(self, query, name, shard, device)

    patch.setattr(RunKey, "noise_key", noise_key)
    patch.setattr(NoiseKey, "generator", generator)


@mutant("M43", "N", "rounds the noise to a coarse grid", "bfloat16 noise", plain, slow=True)
def _coarse_noise(patch: Patch, active: Active) -> None:
    noise_by(patch, active, lambda name, noise, bound: (noise / (1.3 * bound) * 0.7).round() / 0.7 * 1.3 * bound)


@mutant("M45", "N", "makes the noise 5 % too small", "a rounded constant", plain)
def _five_percent_less(patch: Patch, active: Active) -> None:
    noise_by(patch, active, lambda name, noise, bound: 0.95 * noise)


@mutant("M44", "N", "lets the noise decay and charges the plan", "noise schedulers", plain, slow=True)
def _decaying_noise(patch: Patch, active: Active) -> None:
    steps = [0]

    def changed(name: str, noise: Tensor, bound: float) -> Tensor:
        steps[0] += name == "0.weight"
        return noise * 0.98 ** min(steps[0], 20)

    noise_by(patch, active, changed)


@mutant("M22", "N", "keeps the state of the noise in the checkpoint", "RNG states in checkpoints", by=check_N_resumed)
def _noise_state_in_the_checkpoint(patch: Patch, active: Active) -> None:
    save, attach, kept = dpkit.PrivacyEngine.save, dpkit.PrivacyEngine._attach, {}

    def saved(self: dpkit.PrivacyEngine, **states: Any) -> Any:
        path = save(self, **states)
        kept[path.name] = self._run_key._secret, self._run_key._releases
        return path

    def attached(self: dpkit.PrivacyEngine, *args: Any, **kwargs: Any) -> Attachment:
        found = attach(self, *args, **kwargs)
        if self._checkpoint is not None:
            active()
            self._run_key._secret, self._run_key._releases = kept[self._checkpoint.name]
        return found

    patch.setattr(dpkit.PrivacyEngine, "save", saved)
    patch.setattr(dpkit.PrivacyEngine, "_attach", attached)


@mutant("B54", "N", "adds noise to a sum in bfloat16", "noise below half an ulp of the sum vanishes", plain, slow=True)
def _noise_in_low_precision(patch: Patch, active: Active) -> None:
    def add_noise(value: Tensor, std: float, generator: torch.Generator) -> Tensor:
        active()
        noise = torch.empty(value.shape).normal_(0.0, std, generator=generator)
        return (value.bfloat16() + noise.bfloat16()).to(value.dtype)

    patch.setattr(gaussian, "_add_noise", add_noise)


@mutant(
    "B55", "N", "gives no noise to the normalisation, whose layer has no hook", "fastDP, ZeRO-1 path", plain, slow=True
)
def _no_noise_for_a_kind_of_layer(patch: Patch, active: Active) -> None:
    # Layer 3 of the subject is the normalisation.
    noise_by(patch, active, lambda name, noise, bound: noise * (0.0 if name.startswith("3.") else 1.0))


@mutant("B56", "N", "writes the ordinary gradient over the noisy one", "private-transformers, issue 9", plain)
def _gradient_written_over(patch: Patch, active: Active) -> None:
    shipped, sums = Attachment.release, {}
    result = ClippedAccumulator.result

    def seen(self: ClippedAccumulator) -> ClippedSum:
        clipped = result(self)
        sums.update(clipped.queries[0].value)
        return clipped

    def release(self: Attachment) -> None:
        shipped(self)
        active()
        for name, parameter in self._parameters.items():
            parameter.grad = (sums[name] / self.plan.expected_batch).to(parameter.dtype)

    patch.setattr(ClippedAccumulator, "result", seen)
    patch.setattr(Attachment, "release", release)
    # The engine looks before every step of the optimizer whether it wrote what is there.
    patch.setattr(Attachment, "_check_gradients", lambda self, optimizer: None)


@mutant(
    "B72",
    "N",
    "calls noise hardened that is not rounded to a grid",
    "Mironov 2012; Jin et al. 2022",
    by=check_N_grid,
)
def _no_grid(patch: Patch, active: Active) -> None:
    def release(self: HardenedGaussian, clipped: ClippedSum, state: Any, key: NoiseKey) -> tuple[Released, Any]:
        active()
        return Gaussian(self.noise_multiplier).release(clipped, state, key)

    patch.setattr(HardenedGaussian, "release", release)
