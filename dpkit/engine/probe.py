"""The neighbour probe: does one example's gradient depend on another example?

Clipping bounds what an example adds through its own gradient. If it also moves the gradients of others, no clip bounds
its influence. Before the first charge, and before a model is called in a new way, the engine therefore runs a small
synthetic (or public) batch and requires that

  1. the recorded gradient of every other example stays the same when one is replaced by one of other values and another
     length,
  2. an example alone in its batch has the gradient that it had among the others,
  3. a batch has the gradients that it had before another batch went through the model,
  4. the recorded gradients add up to autograd's gradient of the summed loss,
  5. book-keeping and functorch (vmap) agree, where functorch can run the model,
  6. no parameter is written to, and no buffer or tensor attribute ends up elsewhere for another batch.

It answers with nothing or with a refusal, never with a number, and private data decides nothing: only shapes and types
of a batch are used. It is a test and not a proof: a dependence at a rarely taken branch, or (in the form with the
user's own loop) one inside the user's loss, is not seen.
"""

from __future__ import annotations

from collections.abc import Callable, Hashable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.dropout import _DropoutNd

from dpkit.errors import CrossExample, DpkitError, UnsupportedModule
from dpkit.gradients import Backend, PerSample, ghost, trainable, vmap
from dpkit.types import Named

from .batch import Batch, map_tensors, take, tensors
from .contents import persistent_buffers
from .guards import refuse_foreign_leaves

LossFunction = Callable[[Any, Batch], Tensor]

_ROWS = 4
_TOLERANCE = {torch.float64: 1e-7, torch.float32: 1e-3}  # relative to the largest gradient in the batch
_LOW_PRECISION_TOLERANCE = 5e-2
_REMEDY = (
    "Look for normalisation over the batch, losses that compare examples, token means over a padded batch, layouts "
    "whose "
    "first axis is not the batch, and modules that remember what went through them."
)


def training_mode(model: nn.Module) -> Hashable:
    """Which modules are in training mode: a model may compute something else in every mode."""
    return tuple(module.training for module in model.modules())


def probe_loss(model: nn.Module, loss_fn: LossFunction, batch: Batch, backend: Backend) -> None:
    """Probe a model together with its loss.

    Args:
      loss_fn: ``loss_fn(model, batch) -> (B,)``.
      batch: a public batch; one with fewer than four rows gives only its structure, and values are made up.
      backend: whose records are examined.
    Raises:
      CrossExample, UnsupportedModule, LossShape: naming what failed and the way out.
    """
    enough = len(tensors(batch)[0]) >= _ROWS
    with _undisturbed(model) as restore:
        original = take(batch, slice(0, _ROWS)) if enough else map_tensors(_synthetic, batch)
        _compare(model, loss_fn, original, backend, restore)


def rows_of_examples(call: tuple[Any, Any], rows: int) -> list[Tensor]:
    """The tensors of a forward call that have one row per example."""
    return [leaf for leaf in tensors(call) if leaf.dim() and len(leaf) == rows]


def probe_forward(model: nn.Module, call: tuple[Any, Any], rows: int) -> None:
    """Probe a model whose loss is in the user's loop: per example, a fixed combination of the model's outputs.

    Args:
      call: (args, kwargs) of a forward call; tensors with ``rows`` rows, of which there must be one, give shapes and
        types and are not read.
      rows: size of the batch in that call.
    Raises:
      CrossExample, UnsupportedModule: naming what failed and the way out.
    """
    examples = rows_of_examples(call, rows)
    with _undisturbed(model) as restore:
        _compare(model, _OutputLoss(call, rows), [_synthetic(leaf) for leaf in examples], ghost, restore)


class _OutputLoss:
    """``loss_fn`` of a model alone. A batch is the list of those tensors of a call that have one row per example."""

    def __init__(self, call: tuple[Any, Any], rows: int) -> None:
        self._call = call
        self._rows = rows
        self._positions: list[int] | None = None  # of the outputs that have one row per example

    def __call__(self, model: nn.Module, examples: list[Tensor]) -> Tensor:
        remaining = iter(examples)
        args, kwargs = map_tensors(
            lambda leaf: next(remaining) if leaf.dim() and len(leaf) == self._rows else leaf, self._call
        )
        outputs = tensors(model(*args, **kwargs))
        size = len(examples[0])
        if self._positions is None:
            self._positions = [
                number
                for number, output in enumerate(outputs)
                if output.is_floating_point() and output.requires_grad and output.dim() and len(output) == size
            ]
        losses = []
        for output in (outputs[number] for number in self._positions):
            flat = output.reshape(size, -1).float()
            direction = torch.linspace(-1.0, 2.0, flat.shape[1], device=flat.device)
            losses.append((flat * direction).sum(1) + (flat * flat).sum(1))
        if not losses:
            raise CrossExample(
                "the neighbour probe found no output of the model with one row per example, so it cannot tell whether "
                "examples influence each other. Use the functional form: engine.attach(model, loss_fn, ...)."
            )
        return torch.stack(losses).sum(0)


def _compare(
    model: nn.Module, loss_fn: LossFunction, batch: Batch, backend: Backend, restore: Callable[[], None]
) -> None:
    parameters = trainable(model)
    tolerance = _tolerance(parameters)
    versions = {name: p._version for name, p in model.named_parameters()}
    state = {name: tensor.shape for name, tensor in _state(model).items()}  # what is there before the forward pass

    def gradients(of: Batch, by: Backend = backend) -> list[Named]:
        torch.manual_seed(0)  # undone by fork_rng: the same draws in every run of the probe
        return _rows_of(by.per_sample(model, loss_fn, of, len(tensors(of)[0]))[0], parameters)

    try:
        recorded = gradients(batch)
        stored = persistent_buffers(model).keys()
        kept = {name: tensor.clone() for name, tensor in _state(model).items()}
        restore()
        neighbour = gradients(map_tensors(_replace_first, batch))
        moved = [
            name
            for name, tensor in _state(model).items()
            # What is stored with the model must not hold a note of the last batch, of whatever shape.
            if (name in stored or tensor.shape == state.get(name)) and _differ(tensor, kept.get(name))
        ]
        again = gradients(batch)
        restore()
        alone = [gradients(take(batch, slice(row, row + 1)))[0] for row in (0, _ROWS - 1)]
        restore()
        torch.manual_seed(0)
        losses = loss_fn(model, batch)
        refuse_foreign_leaves(losses, {id(p) for p in parameters.values()})
        total = torch.autograd.grad(losses.sum(), list(parameters.values()), allow_unused=True)
        restore()
    except DpkitError:
        raise
    except Exception as error:  # the user's model may raise anything on made-up values
        raise CrossExample(
            f"the neighbour probe could not run the model on a synthetic batch ({type(error).__name__}: {error}). A "
            "batch may hold a single example, too. Pass a public batch: engine.attach(model, loss_fn, ..., "
            "probe_batch=...)."
        ) from error
    moved += [name for name, p in model.named_parameters() if p._version != versions[name]]
    if moved:
        raise UnsupportedModule(
            f"'{moved[0]}' of the model is written to by the forward pass, and no noise protects it. Freeze it, or "
            "compute it from public data."
        )
    mixes = "the model or the loss mixes the examples of a batch"
    _require(_worst(recorded[1:], neighbour[1:], tolerance), f"changes when another example is replaced: {mixes}")
    _require(_worst(recorded, again, tolerance), "changes when another batch went before: the model remembers data")
    _require(_worst([recorded[0], recorded[-1]], alone, tolerance), f"is another one when an example is alone: {mixes}")
    reference = {
        name: torch.zeros_like(p) if gradient is None else gradient
        for (name, p), gradient in zip(parameters.items(), total, strict=True)
    }
    summed = {name: torch.stack([row[name] for row in recorded]).sum(0) for name in parameters}
    _require(
        _worst([summed], [reference], tolerance),
        "as recorded per example does not add up to autograd's: the parameter is used in a way that was not seen",
    )
    if backend is not vmap:
        try:
            independent = gradients(batch, vmap)
        except (DpkitError, RuntimeError, ValueError, TypeError, NotImplementedError):
            return  # functorch cannot run this model: the checks above stand alone
        _require(_worst(recorded, independent, tolerance), "differs between book-keeping and functorch")


def _state(model: nn.Module) -> Named:
    """Buffers, and tensors that a module keeps as plain attributes."""
    found = dict(model.named_buffers())
    for path, module in model.named_modules():
        for name, value in vars(module).items():
            if isinstance(value, Tensor):
                found[f"{path}.{name}" if path else name] = value
    return found


def _differ(left: Tensor, right: Tensor | None) -> bool:
    return right is None or left.shape != right.shape or not torch.equal(left, right)


def _rows_of(gradients: PerSample, parameters: dict[str, nn.Parameter]) -> list[Named]:
    """The gradient of each row, parameter by parameter."""
    rows = []
    for row in range(gradients.size):
        weights = torch.zeros(gradients.size, device=next(iter(parameters.values())).device)
        weights[row] = 1.0
        found = dict(gradients.weighted_sum(dict.fromkeys(parameters, weights)))
        rows.append({name: found.get(name, torch.zeros_like(p)).detach() for name, p in parameters.items()})
    return rows


def _worst(left: list[Named], right: list[Named], tolerance: float) -> str | None:
    """Name of a parameter whose gradients differ by more than the tolerance, if there is one."""
    scale = max((float(g.double().norm()) for row in (*left, *right) for g in row.values()), default=0.0)
    for a, b in zip(left, right, strict=True):
        for name in a:
            # "not <=": a difference that is not a number is a difference.
            if not float((a[name].double() - b[name].double()).norm()) <= tolerance * scale:
                return name
    return None


def _require(failed: str | None, what: str) -> None:
    if failed is not None:
        raise CrossExample(f"the gradient of parameter '{failed}' {what}. {_REMEDY}")


def _tolerance(parameters: dict[str, nn.Parameter]) -> float:
    return max(_TOLERANCE.get(p.dtype, _LOW_PRECISION_TOLERANCE) for p in parameters.values())


def _synthetic(leaf: Tensor) -> Tensor:
    """Four rows of made-up values in the type and shape of ``leaf``."""
    shape = (_ROWS, *leaf.shape[1:])
    if leaf.is_floating_point():
        return torch.randn(shape, device=leaf.device).to(leaf.dtype)
    # 0 and 1 are valid as token, class, flag and mask almost everywhere.
    return torch.randint(0, 2, shape, device=leaf.device).to(leaf.dtype)


def _replace_first(leaf: Tensor) -> Tensor:
    """The first example replaced: every entry another one, and the second half of its first axis blank like padding."""
    leaf = leaf.clone()
    leaf[0] = 1.0 - 3.0 * leaf[0] if leaf.is_floating_point() else (leaf[0] == 0).to(leaf.dtype)
    if leaf.dim() > 1:
        leaf[0, leaf.shape[1] // 2 + 1 :] = 0
    return leaf


@contextmanager
def _undisturbed(model: nn.Module) -> Iterator[Callable[[], None]]:
    """Dropout off; gives a function that puts buffers and attributes back. At the end, random state is put back, "
    "too."""
    dropouts = [module for module in model.modules() if isinstance(module, _DropoutNd) and module.training]
    state = {name: tensor.detach().clone() for name, tensor in _state(model).items()}
    attributes: list[tuple[dict[str, Any], dict[str, Any]]] = []
    devices = sorted({p.device.index or 0 for p in model.parameters() if p.device.type == "cuda"})

    def restore() -> None:
        for now, before in attributes:
            for name in [name for name in now if name not in before]:
                del now[name]
            now.update(before)
        with torch.no_grad():
            for name, tensor in _state(model).items():
                if name in state and tensor.shape == state[name].shape:
                    tensor.copy_(state[name])

    with torch.random.fork_rng(devices=devices), torch.enable_grad():
        try:
            for module in dropouts:
                module.eval()
            attributes = [(vars(module), dict(vars(module))) for module in model.modules()]
            torch.manual_seed(0)
            yield restore
        finally:
            restore()
            for module in dropouts:
                module.train()
