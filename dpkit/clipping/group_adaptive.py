"""Group-adaptive clipping: groups of units whose gradients are long get a larger bound (Xu, Du and Wu).

Guarantee: the gradient of a unit of group k is clipped to C_k, so its L2 norm is at most max_k C_k, over ALL declared
groups and not over those that the batch happens to hold.  Every batch is asked, in the same event as the gradient, how
many units of each group have a norm above C_0 and how many do not: a unit adds one 1 to one of 2K cells, which is a
vector of norm 1.  From the released counts m_k (above) and o_k (not above), none below 0,

    r_k = m_k/(m_k + o_k)  (1 where both are 0),       C_k = C_0·(1 + r_k / mean_j r_j).

Requires: norms that are not below the true ones, labels that depend on their unit alone (nobody can check this; the
statement says so), and counts with enough noise (``Plan.noise_shares`` refuses less).
Why: each unit is clipped as in ``flat.py`` to its group's bound, and no group's bound is above the largest.  One 1 in a
vector of 2K cells has norm 1.  The bounds were made of earlier releases alone.

The label of a unit is part of its record.  Thresholds of a step come from the counts that were released with the step
before; the authors' code counts and clips the same batch, which would take a second pass over it.

Source: Xu, Du and Wu 2021, "Removing Disparate Impact on Model Accuracy in Differentially Private Stochastic Gradient
Descent", https://arxiv.org/abs/2003.03699. With the batch sizes of usual training most of the ratios is noise.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional as F

from dpkit.errors import InvalidArgument
from dpkit.types import Question

from .flat import check_bound, shrink
from .rule import ClipRule, Setting


@dataclass(frozen=True)
class GroupAdaptive(ClipRule):
    """Clip the units of each group to a bound of its own, learnt from noisy counts.

    For guarantee, requirements and proof see the module.

    Args:
      max_grad_norm: C_0 > 0, the base bound; bounds lie between C_0 and (1 + K)·C_0.
      num_labels: K >= 1, how many groups there are. Labels are 0 to K - 1; a label outside of these ends the run.
      noise_std: standard deviation of the noise on each count; must exceed the noise multiplier.
    Raises:
      InvalidArgument: for values outside these ranges.
    """

    max_grad_norm: float
    num_labels: int
    noise_std: float = 10.0
    needs_labels = True

    def __post_init__(self) -> None:
        check_bound("max_grad_norm", self.max_grad_norm)
        check_bound("noise_std", self.noise_std)
        if isinstance(self.num_labels, bool) or not isinstance(self.num_labels, int) or self.num_labels < 1:
            raise InvalidArgument(f"num_labels is {self.num_labels!r}; it is the number of groups, at least 1.")

    def groups(self, names: Iterable[str]) -> list[int]:
        return [0 for _ in names]

    def init(self, setting: Setting) -> tuple[float, ...]:
        return (2 * self.max_grad_norm,) * self.num_labels  # equal ratios, as before any count

    def bounds(self, state: tuple[float, ...]) -> list[float]:
        return [max(state)]

    def factors(self, norms: Tensor, labels: Tensor | None, state: tuple[float, ...]) -> Tensor:
        return shrink(norms, norms.new_tensor(state)[self._checked(labels)])

    def questions(self, setting: Setting) -> tuple[Question, ...]:
        return (Question(size=2 * self.num_labels, bound=1.0, noise_std=self.noise_std),)

    def answers(self, norms: Tensor, labels: Tensor | None, state: tuple[float, ...]) -> Sequence[Tensor]:
        above = (norms[0] > self.max_grad_norm).long()
        return (F.one_hot(2 * self._checked(labels) + above, 2 * self.num_labels).double(),)

    def update(self, state: tuple[float, ...], released: Sequence[Tensor]) -> tuple[float, ...]:
        within, above = released[0].double().clamp(min=0).view(self.num_labels, 2).T
        units = within + above
        ratios = torch.where(units > 0, above / units, 1.0)
        mean = float(ratios.mean())
        relative = ratios / mean if mean > 0 else torch.ones_like(ratios)
        return tuple(self.max_grad_norm * (1 + value) for value in relative.tolist())

    def _checked(self, labels: Tensor | None) -> Tensor:
        if labels is None:
            raise InvalidArgument(
                "GroupAdaptive clips by the group of each unit and was given none; pass "
                "engine.backward(losses, labels=...), or labels= in engine.attach."
            )
        if labels.is_floating_point() or bool(((labels < 0) | (labels >= self.num_labels)).any()):
            raise InvalidArgument(
                f"a label is outside of the {self.num_labels} declared ones (0 to {self.num_labels - 1}); declare all "
                "groups that there can be (num_labels=), and map unknown ones to one of them. The run ends here, since "
                "the message depends on the data."
            )
        return labels.long()
