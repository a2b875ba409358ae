"""Canaries that anybody can add to a data set: records that training should notice, each in by the toss of a fair coin.

The auditor makes canaries, tosses one coin for each, adds those that are in, trains, and scores how well the model
fits each of them. Under a true claim of (ε, δ) nobody can tell from the scores well how the coins fell;
``estimators.one_run`` says what it means if somebody can (Steinke, Nasr and Jagielski 2023,
https://arxiv.org/abs/2305.08846).

    rng = numpy.random.default_rng()                     # unseeded: the coins must be unknown to the training code
    canaries = mislabelled(public_x, public_y, count=1000, num_classes=10, rng=rng)
    dataset, num_examples = canaries.added_to(dataset)
    ... train on it, num_examples=num_examples ...
    one_run(scores_of(model, canaries), canaries.member, delta=1e-5)

Guarantees: the coins are fair, independent of each other and of what the canaries are, and are tossed once, when the
canaries are made. The bound that follows holds whatever the canaries look like; what they look like decides how much
of ε it shows. Input canaries are weak: a model that trains privately hardly moves for one record, so a bound of 0 is
the usual outcome, and shows nothing.

**The public N must not depend on the coins.** With ``num_examples=len(dataset)`` the sample rate, the divisor and the
number of steps would tell how many canaries are in: data sets that differ in one canary would be trained with different
public numbers, which no (ε, δ) of add/remove covers, and what was audited would not be what was claimed. So
:meth:`InputCanaries.added_to` returns an N that counts every canary, in or out. It is an upper bound of the size, as
truncated Poisson sampling demands; batches are then a little smaller than planned, which costs no privacy. For the same
reason the data set goes with the add/remove relation and samplers that take any size, Poisson and truncated Poisson.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.data import ConcatDataset, Dataset

from dpkit.errors import InvalidArgument

_ROWS = 1000  # scored at once


class Audited(NamedTuple):
    """What to train on.

    Attributes:
      dataset: the user's, with the canaries that are in behind it.
      num_examples: the public N to train it with; it does not depend on the coins.
    """

    dataset: Dataset[Any]
    num_examples: int


@dataclass(frozen=True, eq=False)
class InputCanaries:
    """Canaries and their coins. SECRET from whoever trains: the coins are what the audit guesses.

    Attributes:
      inputs: (m, ...) one canary each.
      labels: (m,) int64.
      member: (m,) bool, whether the canary is in.
      copies: rows that each canary has in the data set when it is in.
    """

    inputs: Tensor
    labels: Tensor
    member: NDArray[np.bool_]
    copies: int = 1

    def __len__(self) -> int:
        return len(self.inputs)

    def added_to(self, dataset: Dataset[Any]) -> Audited:
        """``dataset`` with the canaries that are in, behind its own examples, and the public N.

        Its items must be pairs of a tensor like a canary and a label, a number or a tensor of one.

        Raises:
          InvalidArgument: the data set is empty, has no length, or holds something else.
        """
        size = _size_of(dataset)
        item = dataset[0]
        like = item[0] if isinstance(item, (tuple, list)) and len(item) == 2 else None
        if not isinstance(like, Tensor) or like.shape != self.inputs.shape[1:] or like.dtype != self.inputs.dtype:
            raise InvalidArgument(
                f"the data set's items are not pairs of a tensor of shape {tuple(self.inputs.shape[1:])} and type "
                f"{self.inputs.dtype} and a label; make canaries like its items."
            )
        return Audited(ConcatDataset([dataset, _Inside(self, item[1])]), size + self.copies * len(self))


class _Inside(Dataset[Any]):
    """The canaries that are in, as many times as they have copies; labels of the kind that ``like`` has."""

    def __init__(self, canaries: InputCanaries, like: Any) -> None:
        chosen = np.flatnonzero(canaries.member).repeat(canaries.copies)
        self._inputs = canaries.inputs[torch.from_numpy(chosen)]
        self._labels = [int(label) for label in canaries.labels[torch.from_numpy(chosen)]]
        self._like = like

    def __len__(self) -> int:
        return len(self._labels)

    def __getitem__(self, index: int) -> tuple[Tensor, Any]:
        label = self._labels[index]
        # Collating stacks tensors or numbers, and no mixture of them.
        return self._inputs[index], torch.full_like(self._like, label) if isinstance(self._like, Tensor) else label


def mislabelled(
    inputs: Tensor, labels: Tensor, *, count: int, num_classes: int, rng: np.random.Generator
) -> InputCanaries:
    """Real inputs with a wrong label, each of the other classes being as likely.

    A model can only fit them by heart. Take inputs that are not in the training data: beside the same input with its
    right label, a wrong one is learnt less.

    Args:
      inputs, labels: (n, ...) and (n,), of which ``count`` different ones are drawn.
    Raises:
      InvalidArgument: other shapes, values that are not finite, fewer than ``count`` inputs, or values outside their
        domain.
    """
    _check(inputs, labels, count, num_classes)
    if len(inputs) < count:
        raise InvalidArgument(f"count is {count} and there are {len(inputs)} inputs; give more of them.")
    chosen = torch.from_numpy(rng.permutation(len(inputs))[:count])
    shift = torch.from_numpy(rng.integers(1, num_classes, size=count))
    return _tossed(inputs[chosen].clone(), (labels[chosen].long() + shift) % num_classes, 1, rng)


def random_noise(
    shape: tuple[int, ...],
    *,
    count: int,
    num_classes: int,
    rng: np.random.Generator,
    lower: float = 0.0,
    upper: float = 1.0,
) -> InputCanaries:
    """Inputs of independent uniform noise with uniform labels: nothing of the data helps to fit them.

    Args:
      shape: of one input.
      lower, upper: range of its values.
    Raises:
      InvalidArgument: values outside their domain.
    """
    if not (math.isfinite(lower) and math.isfinite(upper) and lower < upper):
        raise InvalidArgument(f"noise cannot lie between {lower!r} and {upper!r}; give the range of the data.")
    if any(isinstance(size, bool) or not isinstance(size, int) or size < 1 for size in shape):
        raise InvalidArgument(f"shape is {tuple(shape)!r}; give the sizes of one input.")
    _check_counts(count, num_classes)
    noise = rng.uniform(lower, upper, size=(count, *shape))
    labels = rng.integers(num_classes, size=count)
    return _tossed(torch.from_numpy(noise.astype(np.float32)), torch.from_numpy(labels), 1, rng)


def clip_bkd(
    inputs: Tensor,
    labels: Tensor,
    *,
    count: int,
    num_classes: int,
    rng: np.random.Generator,
    model: Callable[[Tensor], Tensor] | None = None,
    copies: int = 1,
) -> InputCanaries:
    """ClipBKD: inputs along the directions in which the data vary least (Jagielski, Ullman and Oprea 2020,
    https://arxiv.org/abs/2006.07709).

    Clipping cuts a poison to the length of every other gradient, so that a direction is wanted in which no other
    gradient points: for linear first layers a right singular vector of the data with a small singular value. Canary j
    is the j-th of them from the smallest, as long as the median input, with the label that is least likely there: under
    ``model``, a public or earlier one, or else the class whose mean points away from it most.

    The paper makes one poison and trains many times; here there are ``count`` orthogonal ones with a coin each, for one
    run. Values may leave the range of the data, as in the paper. Computed from ``inputs``: those of the training data
    make the strongest canaries and then must not be published.

    Args:
      inputs, labels: (n, ...) and (n,), typical of the data.
      copies: rows that each canary has when it is in. Several copies test the claim for groups: compare the bound with
        :func:`group_claim` and not with ε.
    Raises:
      InvalidArgument: other shapes, values that are not finite, more canaries than an input has numbers, or values
        outside their domain.
    """
    _check(inputs, labels, count, num_classes)
    if isinstance(copies, bool) or not isinstance(copies, int) or copies < 1:
        raise InvalidArgument(f"copies is {copies!r}; a canary that is in has at least one row.")
    if not inputs.is_floating_point():
        raise InvalidArgument(f"inputs are of type {inputs.dtype}; directions are those of numbers, not of token ids.")
    rows = inputs.flatten(1).double()
    if rows.shape[1] < count:
        raise InvalidArgument(
            f"count is {count} and an input has {rows.shape[1]} numbers, so no more directions; ask for fewer."
        )
    # Eigenvectors of XᵀX are the right singular vectors of X, smallest first, also those that X itself lacks.
    _, directions = torch.linalg.eigh(rows.T @ rows)
    length = rows.norm(dim=1).median()
    if length == 0:
        raise InvalidArgument("the median input is all zeros, so no length is typical; give inputs with values.")
    found = (directions.T[:count] * length).to(inputs.dtype).reshape(count, *inputs.shape[1:])
    if model is None:
        means = torch.zeros(num_classes, rows.shape[1], dtype=torch.float64).index_add_(0, labels.long(), rows)
        means /= torch.bincount(labels.long(), minlength=num_classes).clamp(min=1)[:, None]
        likelihood = found.flatten(1).double() @ means.T
    else:
        likelihood = _logits(model, found)
        if likelihood.shape != (count, num_classes):
            raise InvalidArgument(
                f"the model returns shape {tuple(likelihood.shape)}; give one that returns {num_classes} logits for "
                "each input."
            )
    return _tossed(found, likelihood.argmin(dim=1), copies, rng)


def scores_of(model: Callable[[Tensor], Tensor], canaries: InputCanaries) -> NDArray[np.float64]:
    """(m,) minus the cross-entropy of each canary: large where the model fits it, as if it had been in.

    A module is evaluated as it would be used (``eval()``), and left in the mode it was in.

    Raises:
      InvalidArgument: the model returns no finite logits for each canary.
    """
    logits = _logits(model, canaries.inputs)
    if logits.ndim != 2 or len(logits) != len(canaries) or logits.shape[1] <= int(canaries.labels.max()):
        raise InvalidArgument(
            f"the model returns shape {tuple(logits.shape)} for {len(canaries)} canaries of "
            f"{int(canaries.labels.max()) + 1} or more classes; it must return one row of logits for each."
        )
    if not logits.isfinite().all():
        raise InvalidArgument("the model returns values that are not finite; one that diverged cannot be audited.")
    return -F.cross_entropy(logits, canaries.labels, reduction="none").numpy()


def group_claim(epsilon: float, delta: float, copies: int) -> tuple[float, float]:
    """What (ε, δ) for one unit says of ``copies`` units that come and go together: k·ε and δ·(e^{kε} - 1)/(e^ε - 1).

    Why: between neighbours P(S) <= e^ε P'(S) + δ, and k such steps one after another give
    P(S) <= e^{kε} P'(S) + δ·(1 + e^ε + ... + e^{(k-1)ε}).

    Raises:
      InvalidArgument: values outside their domain.
    """
    if not (0 <= epsilon < math.inf and 0 <= delta <= 1) or isinstance(copies, bool) or copies < 1:
        raise InvalidArgument(
            f"epsilon {epsilon!r}, delta {delta!r} and copies {copies!r} are no claim; epsilon is at least 0 and "
            "finite, delta a probability, copies at least 1."
        )
    if copies * epsilon > 700:  # exp would overflow; delta is 1 long before
        return copies * epsilon, min(1.0, delta if copies == 1 else 1.0 if delta else 0.0)
    terms = sum(math.exp(epsilon * power) for power in range(copies))
    return copies * epsilon, min(1.0, delta * terms)


def _tossed(inputs: Tensor, labels: Tensor, copies: int, rng: np.random.Generator) -> InputCanaries:
    return InputCanaries(inputs, labels.long(), rng.integers(2, size=len(inputs)).astype(np.bool_), copies)


def _logits(model: Callable[[Tensor], Tensor], inputs: Tensor) -> Tensor:
    """What the model returns, in float64 on the CPU."""
    parameters = list(model.parameters()) if isinstance(model, nn.Module) else []
    device = parameters[0].device if parameters else inputs.device
    training = isinstance(model, nn.Module) and model.training
    if isinstance(model, nn.Module):
        model.eval()
    try:
        with torch.no_grad():
            return torch.cat([model(part.to(device)).cpu().double() for part in inputs.split(_ROWS)])
    finally:
        if isinstance(model, nn.Module):
            model.train(training)


def _size_of(dataset: Dataset[Any]) -> int:
    length = getattr(dataset, "__len__", None)
    size = length() if length is not None else 0
    if size < 1:
        raise InvalidArgument("the data set is empty or has no length; give the one that will be trained on.")
    return size


def _check(inputs: Tensor, labels: Tensor, count: int, num_classes: int) -> None:
    _check_counts(count, num_classes)
    if inputs.ndim < 2 or labels.shape != inputs.shape[:1] or len(inputs) == 0:
        raise InvalidArgument(
            f"inputs have shape {tuple(inputs.shape)} and labels {tuple(labels.shape)}; give (n, ...) and (n,), n at "
            "least 1."
        )
    bad = ~inputs.flatten(1).isfinite().all(dim=1)
    if bad.any():
        raise InvalidArgument(f"input {int(bad.int().argmax())} holds values that are not finite; leave it out.")
    if labels.is_floating_point() or labels.min() < 0 or labels.max() >= num_classes:
        raise InvalidArgument(f"labels are not all classes; give integers from 0 to {num_classes - 1}.")


def _check_counts(count: int, num_classes: int) -> None:
    for name, value, least in (("count", count, 1), ("num_classes", num_classes, 2)):
        if isinstance(value, bool) or not isinstance(value, int) or value < least:
            raise InvalidArgument(f"{name} is {value!r}; it is an integer of at least {least}.")
