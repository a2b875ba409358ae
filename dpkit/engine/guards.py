"""What the engine refuses before it touches private data, and what it refuses while it runs.

Each function either returns or raises a :class:`dpkit.errors.Refused` that names the thing, the rule and the way out.
All of them decide on public things: types, names, shapes, and the structure of the computation.
"""

from __future__ import annotations

import sys
from collections.abc import Collection, Iterator, Mapping

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.nn.modules.instancenorm import _InstanceNorm

from dpkit.errors import LossShape, UncoveredParameter, UnsupportedModule, UnsupportedOptimizer
from dpkit.gradients.capture import is_computed_from_batch

_FRAMES_BETWEEN_SCALER_AND_HOOK = 8


def refuse_model(model: nn.Module) -> None:
    """Refuse wrappers that copy the model and modules that mix the examples of a batch.

    Raises:
      UnsupportedModule: naming the module.
    """
    if (
        torch.distributed.is_available()
        and torch.distributed.is_initialized()
        and torch.distributed.get_world_size() > 1
    ):
        raise UnsupportedModule(
            f"torch.distributed runs {torch.distributed.get_world_size()} processes, and this version of dpkit "
            "trains in one: each process would draw its own batch and add its own noise. Start a single process."
        )
    if isinstance(model, (nn.DataParallel, nn.parallel.DistributedDataParallel)):
        raise UnsupportedModule(
            f"the model is wrapped in {type(model).__name__}, whose copies would escape the engine; attach to "
            "model.module and train in one process."
        )
    for path, module in model.named_modules():
        if hasattr(module, "_orig_mod") or module._compiled_call_impl is not None:
            raise UnsupportedModule(
                f"{type(module).__name__} at '{path}' is compiled, and a compiled module does not show its operations; "
                "attach the plain model (model._orig_mod behind torch.compile, or without model.compile())."
            )
    refuse_batch_statistics(model)


def refuse_batch_statistics(model: nn.Module) -> None:
    """Refuse normalisation over the batch and running statistics that move with it.

    Raises:
      UnsupportedModule: naming the module and its dotted path.
    """
    for path, module in model.named_modules():
        moves_statistics = module.training and getattr(module, "track_running_stats", False)
        if isinstance(module, _BatchNorm) and (module.training or module.running_mean is None):
            raise UnsupportedModule(
                f"{type(module).__name__} at '{path}' normalises over the batch, so one example changes the "
                "gradients of all others and no clip can bound it. Replace it by nn.GroupNorm "
                "(opacus.validators.ModuleValidator.fix does that), or freeze it: put it into eval() mode and give its "
                "weight and bias requires_grad=False."
            )
        if isinstance(module, _InstanceNorm) and moves_statistics:
            raise UnsupportedModule(
                f"{type(module).__name__} at '{path}' keeps running statistics of private batches, which no noise "
                "protects. Make it with track_running_stats=False."
            )


def refuse_optimizer(optimizer: torch.optim.Optimizer, parameters: Mapping[str, Tensor]) -> None:
    """Refuse optimizers that evaluate the loss themselves, and tensors that would be trained without noise.

    Raises:
      UnsupportedOptimizer, UncoveredParameter: naming the optimizer or the tensor.
    """
    if isinstance(optimizer, torch.optim.LBFGS):
        raise UnsupportedOptimizer(
            "LBFGS evaluates the loss several times in one step, and each evaluation would be a release of its own. "
            "Use an optimizer that needs one gradient a step (SGD, Adam, AdamW, ...)."
        )
    if not parameters:
        raise UncoveredParameter("the model has no trainable parameter; there is nothing to train.")
    covered = {id(p) for p in parameters.values()}
    for number, group in enumerate(optimizer.param_groups):
        for tensor in group["params"]:
            if tensor.requires_grad and id(tensor) not in covered:
                raise UncoveredParameter(
                    f"the optimizer trains a tensor of shape {tuple(tensor.shape)} (parameter group {number}) that is "
                    "not a parameter of the attached model, so it would be trained without clipping and noise. Make it "
                    "part of the model, or give it requires_grad=False."
                )


def refuse_foreign_leaves(losses: Tensor, covered: Collection[int]) -> None:
    """Refuse losses that depend on a trainable tensor which is not the model's.

    Args:
      losses: what is about to be differentiated.
      covered: ids of the leaves that may be reached.
    Raises:
      UncoveredParameter: with the shape of the tensor.
    """
    for leaf in _leaves(losses):
        # A model may ask for gradients of its own inputs; no optimizer holds those.
        # A batch that asks for its own gradient is no weight; a parameter stays one, whatever its shape.
        of_batch = is_computed_from_batch(leaf) and not isinstance(leaf, nn.Parameter)
        if id(leaf) not in covered and not of_batch:
            raise UncoveredParameter(
                f"the losses depend on a trainable tensor of shape {tuple(leaf.shape)} that is not a parameter of the "
                "attached model: an optimizer of its own would train it without clipping and noise. Attach to a module "
                "that contains it, or detach it."
            )


def refuse_foreign_roots(covered: Collection[int]) -> None:
    """:func:`refuse_foreign_leaves` for what ``torch.autograd.backward`` is differentiating now, in a caller's frame.

    A gradient that reached a foreign tensor already is taken back.

    Raises:
      UncoveredParameter: as there, or when the caller cannot be found.
    """
    frame = sys._getframe(1)
    while frame is not None and frame.f_code is not torch.autograd.backward.__code__:
        frame = frame.f_back
    roots = None if frame is None else frame.f_locals.get("tensors")
    if roots is None:
        raise UncoveredParameter(
            "the backward pass was not started by loss.backward(), so it cannot be checked which tensors it trains; "
            "call "
            "engine.backward(loss)."
        )
    for root in (roots,) if isinstance(roots, Tensor) else roots:
        try:
            refuse_foreign_leaves(root, covered)
        except UncoveredParameter:
            _take_back(root, covered)
            raise


def _take_back(root: Tensor, covered: Collection[int]) -> None:
    for leaf in _leaves(root):
        if id(leaf) not in covered:
            leaf.grad = None


def _leaves(root: Tensor) -> Iterator[Tensor]:
    """The leaves that a gradient of ``root`` reaches."""
    pending, seen = [root.grad_fn], set()
    while pending:
        node = pending.pop()
        if node is None or node in seen:
            continue
        seen.add(node)
        leaf = getattr(node, "variable", None)
        if isinstance(leaf, Tensor):
            yield leaf
        pending.extend(parent for parent, _ in node.next_functions)


def refuse_loss_shape(losses: Tensor, rows: int, reduction: str) -> None:
    """Refuse losses of the wrong shape or precision.

    Raises:
      LossShape: with the shape that is wanted.
      UnsupportedOptimizer: for float16 losses (GradScaler).
    """
    if not isinstance(losses, Tensor):
        raise LossShape(f"the loss is a {type(losses).__name__}; engine.backward takes a tensor.")
    if losses.dtype is torch.float16:
        raise UnsupportedOptimizer(
            "the loss is float16, whose gradients need a GradScaler, and that skips steps depending on private data. "
            "Use bfloat16."
        )
    if reduction == "none" and tuple(losses.shape) != (rows,):
        raise LossShape(
            f"the losses have shape {tuple(losses.shape)}; engine.backward takes one loss per example, shape "
            f"({rows},): "
            'use reduction="none" and reduce each example\'s own axes. A loop that must reduce the batch says '
            'loss_reduction="mean" or "sum" in make_private.'
        )
    if reduction != "none" and losses.dim() != 0:
        raise LossShape(
            f'the loss has shape {tuple(losses.shape)}, and loss_reduction="{reduction}" promised one number; leave '
            "loss_reduction out to pass one loss per example."
        )


def refuse_grad_scaler() -> None:
    """Refuse an optimizer step that comes from ``torch.amp.GradScaler``. Called from the optimizer's pre-step hook.

    Raises:
      UnsupportedOptimizer: always, when a GradScaler is among the callers.
    """
    frame = sys._getframe(1)
    for _ in range(_FRAMES_BETWEEN_SCALER_AND_HOOK):
        if frame is None:
            return
        # By code and not by f_locals: reading those would keep the tensors of every caller alive.
        if frame.f_code is torch.amp.GradScaler.step.__code__:
            raise UnsupportedOptimizer(
                "the step comes from a GradScaler, which skips steps and changes its scale depending on private "
                "gradients. Train in bfloat16 without a scaler."
            )
        frame = frame.f_back
