"""Gradient inversion: an attack that computes a training example back from the update that was made of it.

An update made of one example shows that example. :func:`linear_input` reads it off the gradient of a linear layer, in
closed form: with z = W x + b, row i of the weight's gradient is ∂L/∂b_i · x (Phong et al. 2017; Geiping et al. 2020,
proposition 3.1). :func:`invert` works for any model: it looks for an example whose gradient matches, by squared
distance (:class:`Distance`; Zhu et al. 2019, "Deep leakage from gradients", https://arxiv.org/abs/1906.08935) or by
angle with a prior for smooth images (:class:`Angle`; Geiping et al. 2020, "Inverting gradients",
https://arxiv.org/abs/2003.14053).

Clipping does not stop either: it multiplies the whole gradient by one number, which leaves its direction and the
quotient of its coordinates as they are. Noise does.

An ATTACK, never a bound: where it succeeds, the update was not private; where it fails, a better attack, a better prior
or more updates may succeed.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple, Protocol

import torch
from torch import Tensor, nn

from dpkit.errors import InvalidArgument
from dpkit.types import Named

LossFunction = Callable[[Any, Any], Tensor]
"""``loss_fn(model, (inputs, labels))`` -> (B,), as the functional form of the engine takes it."""


class Matching(Protocol):
    """How far the gradient of a candidate is from the one that was seen, and how the candidate is moved."""

    def __call__(self, found: Sequence[Tensor], wanted: Sequence[Tensor], candidate: Tensor) -> Tensor: ...

    def minimize(self, candidate: Tensor, mismatch: Callable[[], Tensor], clamp: Callable[[], None]) -> None: ...


@dataclass(frozen=True)
class Distance:
    """Σ (g' - g)² relative to Σ g², by L-BFGS, as in Zhu et al. 2019; smooth models only, ReLU has no curvature.

    Under Gaussian noise of one size on all coordinates the candidate at the smallest distance is the likeliest one, if
    nothing is known of the data.

    Attributes:
      steps: iterations of L-BFGS.
      max_grad_norm: the C to which the trainer clips; candidates are then clipped as the example was. Without it, a
        clipped gradient matches no example.
    """

    steps: int = 100
    max_grad_norm: float | None = None

    def __post_init__(self) -> None:
        _check_steps(self.steps)
        bound = self.max_grad_norm
        if bound is not None and not 0 < bound < math.inf:
            raise InvalidArgument(f"max_grad_norm is {bound!r}; it is the trainer's clipping norm, above 0, or None.")

    def __call__(self, found: Sequence[Tensor], wanted: Sequence[Tensor], candidate: Tensor) -> Tensor:
        if self.max_grad_norm is not None:
            factor = (self.max_grad_norm / _norm(found)).clamp(max=1.0)
            found = [each * factor for each in found]
        return _sum((one - other).square() for one, other in zip(found, wanted, strict=True)) / _norm(wanted) ** 2

    def minimize(self, candidate: Tensor, mismatch: Callable[[], Tensor], clamp: Callable[[], None]) -> None:
        optimizer = torch.optim.LBFGS(
            [candidate],
            lr=1.0,
            max_iter=self.steps,
            max_eval=2 * self.steps,
            tolerance_grad=1e-12,
            tolerance_change=1e-14,
            line_search_fn="strong_wolfe",
        )

        def closure() -> Tensor:
            loss = mismatch()
            (candidate.grad,) = torch.autograd.grad(loss, [candidate])
            return loss.detach()

        optimizer.step(closure)
        clamp()


@dataclass(frozen=True)
class Angle:
    """1 - cos(g', g) + ``total_variation`` · TV(x), by Adam on the signs of the gradient, as in Geiping et al. 2020.

    Attributes:
      steps: of Adam; its step size falls by ten after 3/8, 5/8 and 7/8 of them.
      total_variation: weight of the mean difference between neighbouring pixels; 0 for what is no image.
      step_size: of Adam, at the start.
    """

    steps: int = 400
    total_variation: float = 0.0
    step_size: float = 0.1

    def __post_init__(self) -> None:
        _check_steps(self.steps)
        if not 0 <= self.total_variation < math.inf:
            raise InvalidArgument(
                f"total_variation is {self.total_variation!r}; it is the weight of a penalty, finite and not negative."
            )
        if not 0 < self.step_size < math.inf:
            raise InvalidArgument(f"step_size is {self.step_size!r}; give a positive finite number, such as 0.1.")

    def __call__(self, found: Sequence[Tensor], wanted: Sequence[Tensor], candidate: Tensor) -> Tensor:
        product = _sum(one * other for one, other in zip(found, wanted, strict=True))
        mismatch = 1 - product / (_norm(found) * _norm(wanted))
        return mismatch + self.total_variation * total_variation(candidate) if self.total_variation else mismatch

    def minimize(self, candidate: Tensor, mismatch: Callable[[], Tensor], clamp: Callable[[], None]) -> None:
        optimizer = torch.optim.Adam([candidate], lr=self.step_size)
        milestones = [round(self.steps * part) for part in (3 / 8, 5 / 8, 7 / 8)]
        schedule = torch.optim.lr_scheduler.MultiStepLR(optimizer, milestones, gamma=0.1)
        for _ in range(self.steps):
            (gradient,) = torch.autograd.grad(mismatch(), [candidate])
            candidate.grad = gradient.sign()
            optimizer.step()
            schedule.step()
            clamp()


class Inversion(NamedTuple):
    """What the attack found.

    Attributes:
      reconstruction: of the shape that was asked for.
      label: the one that was given, or inferred.
      mismatch: of the reconstruction, which is the restart where it was smallest: the attacker sees no more.
      mismatches: of every restart.
    """

    reconstruction: Tensor
    label: int
    mismatch: float
    mismatches: tuple[float, ...]


def invert(
    gradient: Named,
    model: nn.Module,
    loss_fn: LossFunction,
    shape: Sequence[int],
    *,
    generator: torch.Generator,
    matching: Matching | None = None,
    label: int | None = None,
    restarts: int = 1,
    lower: float = 0.0,
    upper: float = 1.0,
) -> Inversion:
    """Look for one example of ``shape`` whose gradient is ``gradient``, up to what the matching leaves open.

    Args:
      gradient: name -> gradient, for every trainable parameter of the model: a released update, or a raw one.
      model: as it was when the gradient was computed. It is copied; nothing is written to it.
      loss_fn: as the trainer's: (model, (inputs, labels)) -> one loss per example.
      shape: of one input, without the batch.
      generator: draws where each restart begins.
      matching: :class:`Angle` if left out.
      label: the class, where the attacker knows it; left out, see :func:`inferred_label`.
      lower, upper: range of the inputs; reconstructions stay within it.
    Raises:
      InvalidArgument: for a gradient that is not one of this model or not finite, and values outside their domain.
    """
    if not (isinstance(restarts, int) and restarts >= 1):
        raise InvalidArgument(f"restarts is {restarts!r}; the attack starts at least once.")
    if not (math.isfinite(lower) and math.isfinite(upper) and lower < upper):
        raise InvalidArgument(
            f"inputs cannot lie between {lower!r} and {upper!r}; give the range of the data, lower < upper."
        )
    if any(not isinstance(size, int) or size < 1 for size in shape):
        raise InvalidArgument(f"shape is {tuple(shape)!r}; give the sizes of one input, without the batch.")
    attacked = copy.deepcopy(model)  # of a model that is attached to an engine, the copy is a plain one
    parameters = {name: p for name, p in attacked.named_parameters() if p.requires_grad}
    _check_gradient(gradient, parameters)
    matching = matching if matching is not None else Angle()
    label = label if label is not None else inferred_label(gradient)
    wanted = [gradient[name].detach() for name in parameters]
    like = wanted[0]
    target = torch.tensor([label], device=like.device)

    found: list[tuple[float, Tensor]] = []
    for _ in range(restarts):
        start = torch.rand(tuple(shape), generator=generator) * (upper - lower) + lower
        candidate = start.to(like.device, like.dtype).requires_grad_(True)

        def mismatch(candidate: Tensor = candidate) -> Tensor:
            loss = loss_fn(attacked, (candidate[None], target)).sum()
            of_candidate = torch.autograd.grad(
                loss, list(parameters.values()), create_graph=True, materialize_grads=True
            )
            return matching(of_candidate, wanted, candidate)

        def clamp(candidate: Tensor = candidate) -> None:
            with torch.no_grad():
                candidate.nan_to_num_(nan=lower).clamp_(lower, upper)

        matching.minimize(candidate, mismatch, clamp)
        value = mismatch().item()
        found.append((math.inf if math.isnan(value) else value, candidate.detach().clone()))
    mismatches = tuple(value for value, _ in found)
    best, reconstruction = min(found, key=lambda each: each[0])
    return Inversion(reconstruction, label, best, mismatches)


def linear_input(weight_gradient: Tensor, bias_gradient: Tensor) -> Tensor:
    """The input of a linear layer, from the gradients of its weight (out, in) and bias (out,): exact without noise.

    Row i of the first is the second's entry i times the input. Of all rows together the least squares solution is
    taken: Wᵀ b / ‖b‖². A factor that both have, as clipping gives them, cancels out.

    Raises:
      InvalidArgument: shapes that do not belong together, values that are not finite, or a bias gradient of zeros,
        which says nothing of the input.
    """
    if weight_gradient.ndim != 2 or bias_gradient.shape != weight_gradient.shape[:1]:
        raise InvalidArgument(
            f"the gradients have shapes {tuple(weight_gradient.shape)} and {tuple(bias_gradient.shape)}; give those of "
            "the weight (out, in) and the bias (out,) of one linear layer."
        )
    weight, bias = weight_gradient.double(), bias_gradient.double()
    if not (weight.isfinite().all() and bias.isfinite().all()):
        raise InvalidArgument("the gradients hold values that are not finite; give those of one linear layer.")
    largest = bias.abs().max()
    if largest == 0:
        raise InvalidArgument("the gradient of the bias is 0, which says nothing of the input; give another update.")
    scaled = bias / largest  # squares of very small gradients would vanish
    return (weight.T @ scaled / (scaled @ scaled) / largest).to(weight_gradient.dtype)


def inferred_label(gradient: Named) -> int:
    """The class that cross-entropy's gradient gives away: that of the last bias is softmax minus one-hot.

    Only the entry of the true class is negative (Zhao, Mopuri and Bilen 2020, https://arxiv.org/abs/2001.02610); of a
    noisy gradient the smallest entry is the best guess.

    Raises:
      InvalidArgument: the last parameter is no bias.
    """
    last = list(gradient.values())[-1] if gradient else torch.empty(0, 0)
    if last.ndim != 1 or len(last) < 2:
        raise InvalidArgument(
            "the label is inferred from the bias of the last layer, and the last parameter is none; give label=."
        )
    return int(last.argmin())


# -- how good a reconstruction is -------------------------------------------------------------------------------------


def mean_squared_error(reconstruction: Tensor, original: Tensor) -> float:
    """Mean of the squared differences.

    Raises:
      InvalidArgument: the shapes differ.
    """
    _check_same_shape(reconstruction, original)
    return float((reconstruction.double() - original.double()).square().mean())


def peak_signal_to_noise(reconstruction: Tensor, original: Tensor, *, peak: float = 1.0) -> float:
    """10 log10(peak² / mean squared error), in decibels; infinite for an exact copy.

    Mind what a guess without any gradient reaches: on images that are mostly dark, a black one has about 10 dB.
    """
    error = mean_squared_error(reconstruction, original)
    return math.inf if error == 0 else 10 * math.log10(peak**2 / error)


def correlation(reconstruction: Tensor, original: Tensor) -> float:
    """Pearson's correlation of the pixels; 0 where one of the two is constant. Blind to brightness and contrast."""
    _check_same_shape(reconstruction, original)
    one, other = (each.double().flatten() - each.double().mean() for each in (reconstruction, original))
    norms = one.norm() * other.norm()
    return float(one @ other / norms) if norms > 0 else 0.0


def total_variation(image: Tensor) -> Tensor:
    """Mean absolute difference between neighbours along the last two axes."""
    if image.ndim < 2:
        raise InvalidArgument(
            f"total variation is that of an image, and the shape is {tuple(image.shape)}; set it to 0."
        )
    return image.diff(dim=-1).abs().mean() + image.diff(dim=-2).abs().mean()


def _check_steps(steps: int) -> None:
    if not isinstance(steps, int) or isinstance(steps, bool) or steps < 1:
        raise InvalidArgument(f"steps is {steps!r}; give a count of at least 1.")


def _check_same_shape(reconstruction: Tensor, original: Tensor) -> None:
    if reconstruction.shape != original.shape or original.numel() == 0:
        raise InvalidArgument(
            f"the reconstruction has shape {tuple(reconstruction.shape)} and the original {tuple(original.shape)}; "
            "compare two inputs of one shape."
        )


def _check_gradient(gradient: Mapping[str, Tensor], parameters: Mapping[str, Tensor]) -> None:
    shapes = {name: tuple(value.shape) for name, value in gradient.items()}
    wanted = {name: tuple(value.shape) for name, value in parameters.items()}
    if shapes != wanted or not wanted:
        different = sorted(name for name in shapes.keys() | wanted.keys() if shapes.get(name) != wanted.get(name))
        raise InvalidArgument(
            f"the gradient is not one of this model's trainable parameters: {', '.join(different) or 'there are none'} "
            "differ; give one tensor for each, by its name."
        )
    for name, value in gradient.items():
        if not value.isfinite().all():
            raise InvalidArgument(f"the gradient of {name!r} holds values that are not finite; it shows nothing.")


def _norm(tensors: Sequence[Tensor]) -> Tensor:
    return _sum(each.square() for each in tensors).sqrt().clamp(min=torch.finfo(tensors[0].dtype).tiny)


def _sum(tensors: Any) -> Tensor:
    return torch.stack([each.sum() for each in tensors]).sum()
