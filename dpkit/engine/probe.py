"""The neighbour probe: does one example's gradient depend on another example?

Clipping bounds what an example adds through its own gradient. If it also moves the gradients of others, no clip bounds
its influence. Before the first charge the engine therefore runs a small synthetic (or public) batch as it is, and
again with one example replaced by one of other values and another length, and requires that

  1. the recorded gradient of every other example stays the same,
  2. the recorded gradients add up to autograd's gradient of the summed loss,
  3. book-keeping and functorch (vmap) agree, where functorch can run the model,
  4. no buffer of the model ends up elsewhere.

It answers with nothing or with a refusal, never with a number, and private data decides nothing: only shapes and types
of a batch are used. It is a test and not a proof: a dependence at a rarely taken branch, or (in the form with the
user's own loop) one inside the user's loss, is not seen.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.dropout import _DropoutNd

from dpkit.errors import CrossExample, DpkitError, UnsupportedModule
from dpkit.gradients import Backend, PerSample, ghost, trainable, vmap
from dpkit.types import Named

from .batch import Batch, map_tensors, take, tensors
from .guards import refuse_foreign_leaves

LossFunction = Callable[[Any, Batch], Tensor]

_ROWS = 4
_TOLERANCE = {torch.float64: 1e-7, torch.float32: 1e-3}  # relative to the largest gradient in the batch
_LOW_PRECISION_TOLERANCE = 5e-2
_REMEDY = (
    "Look for normalisation over the batch, losses that compare examples, token means over a padded batch, and layouts "
    "whose first axis is not the batch."
)


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
    original = take(batch, slice(0, _ROWS)) if enough else map_tensors(_synthetic, batch)
    with _undisturbed(model) as restore:
        _compare(model, loss_fn, original, backend, restore)


def probe_forward(model: nn.Module, call: tuple[Any, Any], rows: int) -> None:
    """Probe a model whose loss is in the user's loop: per example, a fixed random combination of the model's outputs.

    Args:
      call: (args, kwargs) of a forward call; tensors with ``rows`` rows give shapes and types and are not read.
      rows: size of the batch in that call.
    Raises:
      CrossExample, UnsupportedModule: naming what failed and the way out.
    """
    original = map_tensors(lambda leaf: _synthetic(leaf) if leaf.dim() and len(leaf) == rows else leaf, call)
    with _undisturbed(model) as restore:
        _compare(model, _combined_outputs, original, ghost, restore)


def _combined_outputs(model: nn.Module, call: tuple[Any, Any]) -> Tensor:
    args, kwargs = call
    losses: list[Tensor] = []

    def combine(output: Tensor) -> None:
        if output.is_floating_point() and output.requires_grad and output.dim() and len(output) == _ROWS:
            flat = output.reshape(_ROWS, -1).float()
            direction = torch.linspace(-1.0, 2.0, flat.shape[1], device=flat.device)
            losses.append((flat * direction).sum(1) + (flat * flat).sum(1))

    map_tensors(combine, model(*args, **kwargs))
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

    def gradients(of: Batch, by: Backend) -> list[Named]:
        restore()
        return _rows_of(by.per_sample(model, loss_fn, of, _ROWS)[0], parameters)

    try:
        recorded = gradients(batch, backend)
        buffers = {name: buffer.clone() for name, buffer in model.named_buffers()}
        neighbour = gradients(map_tensors(_replace_first, batch), backend)
        moved = [name for name, buffer in model.named_buffers() if not torch.equal(buffer, buffers[name])]
        restore()
        losses = loss_fn(model, batch)
        refuse_foreign_leaves(losses, {id(p) for p in parameters.values()})
        total = torch.autograd.grad(losses.sum(), list(parameters.values()), allow_unused=True)
    except DpkitError:
        raise
    except Exception as error:  # the user's model may raise anything on made-up values
        raise CrossExample(
            f"the neighbour probe could not run the model on a synthetic batch ({type(error).__name__}: {error}). "
            "Pass a public batch: engine.attach(model, loss_fn, ..., probe_batch=...)."
        ) from error
    if moved:
        raise UnsupportedModule(
            f"buffer '{moved[0]}' moves with the batch, and no noise protects it. Freeze it, or compute it from "
            "public data."
        )
    tolerance = _tolerance(parameters)
    _require(
        _worst(recorded[1:], neighbour[1:], tolerance),
        "changes when another example is replaced: the model or the loss mixes the examples of a batch",
    )
    reference = {
        name: torch.zeros_like(p) if gradient is None else gradient
        for (name, p), gradient in zip(parameters.items(), total, strict=True)
    }
    summed = {name: torch.stack([row[name] for row in recorded]).sum(0) for name in parameters}
    _require(
        _worst([summed], [reference], tolerance),
        "as recorded per example does not add up to autograd's gradient: the parameter is used in a way that was not "
        "seen",
    )
    if backend is not vmap:
        try:
            independent = gradients(batch, vmap)
        except (DpkitError, RuntimeError, ValueError, TypeError, NotImplementedError):
            return  # functorch cannot run this model: the two checks above stand alone
        _require(_worst(recorded, independent, tolerance), "differs between book-keeping and functorch")


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
    """The first example replaced: other values, and the second half of its first axis blank like padding."""
    if leaf.dim() == 0 or len(leaf) != _ROWS:
        return leaf
    leaf = leaf.clone()
    if leaf.is_floating_point():
        leaf[0] = -3.0 * leaf[0] + 1.0
    elif leaf.dim() == 1:
        leaf[0] = (leaf[0] == 0).to(leaf.dtype)
    if leaf.dim() > 1:
        leaf[0, leaf.shape[1] // 2 + 1 :] = 0
    return leaf


@contextmanager
def _undisturbed(model: nn.Module) -> Iterator[Callable[[], None]]:
    """Dropout off; gives a function that puts random state and buffers back, and calls it at the end."""
    dropouts = [module for module in model.modules() if isinstance(module, _DropoutNd) and module.training]
    buffers = {name: buffer.clone() for name, buffer in model.named_buffers()}
    devices = sorted({p.device.index or 0 for p in model.parameters() if p.device.type == "cuda"})

    def restore() -> None:
        torch.manual_seed(0)  # undone by fork_rng; the same draws in every run of the probe
        with torch.no_grad():
            for name, buffer in model.named_buffers():
                buffer.copy_(buffers[name])

    with torch.random.fork_rng(devices=devices), torch.enable_grad():
        for module in dropouts:
            module.eval()
        try:
            restore()
            yield restore
        finally:
            restore()
            for module in dropouts:
                module.train()
