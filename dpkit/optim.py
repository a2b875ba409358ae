"""DP-AdamBC: Adam whose second moment is corrected for the noise of the release.

The second moment of a noisy gradient is that of the gradient plus the variance of the noise, and in private training
the noise is the larger part: plain Adam then divides by a constant and has become momentum. What is guaranteed: for
each coordinate, with g̃ the release before any filter, s its noise standard deviation, p.grad what the filters let
through and avg_β the exponential average with bias correction,

    p <- (1 - lr·weight_decay)·p - lr · avg_β1(p.grad) / √max(avg_β2(g̃² - s²), eps_root).

g̃² - s² has the square of the clipped gradient as its mean, whatever filters stand in between, and s is each step's own,
so that it stays right when clipping norms move. All of it is post-processing of released values.

With ``betas=(0, β2)`` behind a :class:`~dpkit.filters.LowPass` this is LP-DPAdamBC: the filter is the first moment. Not
offered: the Adam variant of DOPPLER without correction for the noise (numerator from the filter, second moment from the
unfiltered release). ``torch.optim.Adam`` behind a filter is not it, since its second moment is that of the filtered
gradient.

Not promised: that it trains better than Adam. Where the estimate is below ``eps_root``, which noise alone brings
about, the step is lr·avg/√eps_root, however large that is: eps_root has to be tuned together with lr, and the variance
of the noise is its natural unit.
Sources: Tang, Shpilevskiy and Lécuyer 2024, "DP-AdamBC: Your DP-Adam Is Actually DP-SGD (Unless You Apply Bias
Correction)", https://arxiv.org/abs/2312.14334; Zhang et al. 2024, https://arxiv.org/abs/2408.13460 (with a filter);
Loshchilov and Hutter 2019, https://arxiv.org/abs/1711.05101 (decoupled weight decay).
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from itertools import chain
from typing import Any

import torch
from torch import Tensor
from torch.optim.optimizer import Optimizer, ParamsT

from dpkit.errors import InvalidArgument, RawGradient


class DPAdamBC(Optimizer):
    """Adam with the noise variance taken out of the second moment. It works with :class:`dpkit.PrivacyEngine` only.

    The engine tells it every release and how noisy that was. State of a parameter: two tensors of its size in float32,
    one where β1 = 0.

    Args:
      params: as for every optimizer of torch.
      lr: learning rate.
      betas: share of the past in the averages of the gradient and of its square. Use (0, β2) behind a low-pass filter.
      eps_root: least value of the second moment, inside of the root; in units of the squared gradient.
      weight_decay: decoupled: the share of each parameter that a step of learning rate 1 takes away.
    Raises:
      InvalidArgument: for a value outside its domain.
    """

    def __init__(
        self,
        params: ParamsT,
        lr: float = 1e-3,
        betas: tuple[float, float] = (0.9, 0.999),
        eps_root: float = 1e-8,
        weight_decay: float = 0.0,
    ) -> None:
        self._observed: dict[Tensor, Tensor] = {}  # g̃² - s² of the last release
        super().__init__(params, {"lr": lr, "betas": betas, "eps_root": eps_root, "weight_decay": weight_decay})

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        _check_settings({**self.defaults, **param_group})
        super().add_param_group(param_group)

    def observe_release(self, parameter: Tensor, raw_gradient: Tensor, noise_std: float) -> None:
        """Called by the engine after each release; holds for the next step alone.

        Args:
          parameter: whose gradient was released; one that is in no group is of no interest.
          raw_gradient: what was released, before any filter.
          noise_std: standard deviation of the noise on each of its coordinates.
        Raises:
          InvalidArgument: the standard deviation is negative or not finite, or the shape is not the parameter's.
        """
        if not (math.isfinite(noise_std) and noise_std >= 0):
            raise InvalidArgument(f"noise_std is {noise_std!r}; a standard deviation is not negative, and finite.")
        if raw_gradient.shape != parameter.shape:
            raise InvalidArgument(
                f"raw_gradient has shape {tuple(raw_gradient.shape)}, and the parameter has {tuple(parameter.shape)}; "
                "they must be equal."
            )
        # Not the gradient itself: without filters it is p.grad, which a user's clip_grad_norm_ changes in place.
        observed = raw_gradient.detach().to(_at_least_float32(parameter)).square()
        self._observed[parameter] = observed.sub_(noise_std**2)

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> Any:  # pyright: ignore[reportIncompatibleMethodOverride]
        """Moves every parameter that has a gradient; all of them must have been observed since the last step.

        Raises:
          RawGradient: naming one that was not. Nothing has moved then.
        """
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        moving = [(p, group) for group in self.param_groups for p in group["params"] if p.grad is not None]
        for parameter, _ in moving:
            if parameter not in self._observed:
                raise RawGradient(
                    f"parameter {self._called(parameter)} has a gradient, and DPAdamBC was not told of the release "
                    "that it comes from, so it cannot correct for the noise. Train with dpkit.PrivacyEngine, attached "
                    "to this very optimizer and not to one that wraps it, or use torch.optim.Adam."
                )
        for parameter, group in moving:
            self._move(parameter, group, self._observed[parameter])
        self._observed.clear()
        return loss

    def load_state_dict(self, state_dict: Mapping[str, Any]) -> None:
        """As in torch, except that tensors come back as copies in their own type, not in the parameter's."""
        super().load_state_dict(dict(state_dict))
        numbers, parameters = (
            chain.from_iterable(group["params"] for group in groups)
            for groups in (state_dict["param_groups"], self.param_groups)
        )
        for number, parameter in zip(numbers, parameters, strict=True):
            for name, value in state_dict["state"].get(number, {}).items():
                if isinstance(value, Tensor):
                    self.state[parameter][name] = value.detach().to(parameter.device, copy=True)

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)
        self.__dict__.setdefault("_observed", {})  # a copy of an optimizer begins without

    def _move(self, parameter: Tensor, group: Mapping[str, Any], square: Tensor) -> None:
        state = self.state[parameter]
        beta1, beta2 = group["betas"]
        assert parameter.grad is not None
        state["step"] = state.get("step", 0) + 1
        mean, mean_weight = _average(state, "exp_avg", parameter.grad.to(square.dtype), beta1)
        squares, squares_weight = _average(state, "exp_avg_sq", square, beta2)
        # avg / √max(avg_sq, eps_root), with both weights in one factor: a pass over the memory is what a step costs.
        root = squares.clamp(min=group["eps_root"] * squares_weight).sqrt_()
        length = group["lr"] * math.sqrt(squares_weight) / mean_weight
        # In the precision of the averages: in bfloat16 the factor 1 - lr·weight_decay would be rounded to 1.
        kept = parameter.to(square.dtype)
        if group["weight_decay"] != 0:
            kept = kept * (1 - group["lr"] * group["weight_decay"])
        parameter.copy_(torch.add(kept, torch.div(mean, root, out=root), alpha=-length, out=root))

    def _called(self, parameter: Tensor) -> str:
        """The parameter's name, or its place where the optimizer was made without names."""
        for number, group in enumerate(self.param_groups):
            for index, own in enumerate(group["params"]):
                if own is parameter:
                    names = group.get("param_names")
                    place = f"{index} of group {number}, of shape {tuple(own.shape)},"
                    return place if names is None else repr(names[index])
        raise AssertionError("a parameter of no group")


def _average(state: dict[str, Any], name: str, value: Tensor, beta: float) -> tuple[Tensor, float]:
    """(sum, weight) whose ratio is the average with ``value`` as its newest, after they were put into ``state``.

    The weights are added up as they were given: 1 - β^t where β is constant, and right where a scheduler moves it.
    """
    total, weight = name, f"{name}_weight"
    if beta == 0:  # nothing of the past is left, and nothing need be kept
        state.pop(total, None)
        state.pop(weight, None)
        return value, 1.0
    # Not in place: a state dict that was taken before stays what it was.
    state[total] = torch.lerp(state[total], value, 1 - beta) if total in state else (1 - beta) * value
    state[weight] = beta * state.get(weight, 0.0) + (1 - beta)
    return state[total], state[weight]


def _at_least_float32(tensor: Tensor) -> torch.dtype:
    return torch.promote_types(tensor.dtype, torch.float32)


def _check_settings(settings: Mapping[str, Any]) -> None:
    betas = settings["betas"]
    if not (isinstance(betas, (tuple, list)) and len(betas) == 2 and all(0 <= beta < 1 for beta in betas)):
        raise InvalidArgument(f"betas is {betas!r}; it is a pair of numbers in [0, 1).")
    for name in ("lr", "weight_decay"):
        if not 0 <= settings[name] < math.inf:
            raise InvalidArgument(f"{name} is {settings[name]!r}; it must be finite and not negative.")
    if not 0 < settings["eps_root"] < math.inf:
        raise InvalidArgument(
            f"eps_root is {settings['eps_root']!r}; it must be positive and finite: the second moment, freed from the "
            "noise, is often negative, and a root of at least √eps_root divides the step."
        )
