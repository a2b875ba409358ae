"""Can a model be trained privately, and how? The function behind ``dpkit check``.

Guarantees:
  * The verdict is the engine's own: what is refused here is refused by ``attach``, for the same reason.
  * An operation that is refused does not hide the others: its parameters are set aside, and the rest is looked at.
  * The model comes back as it was; only the batch that was given is used, which must be public or synthetic.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass

import torch
from torch import nn

from dpkit.errors import DpkitError, InvalidArgument, Refused
from dpkit.gradients import ghost, trainable
from dpkit.gradients.forms import Zero
from dpkit.gradients.layout import Layout
from dpkit.gradients.watch import STRATEGIES, Use, watch

from .arguments import Arguments
from .attachment import attached_to
from .batch import Batch, tensors
from .guards import refuse_model
from .probe import LossFunction, outputs_of, probe_forward, probe_loss, reading_of, runnable_examples
from .synthetic import REPLACED, ROWS, Examples
from .undisturbed import Restore, undisturbed


@dataclass(frozen=True, slots=True)
class ParameterCheck:
    """What was found out about one parameter.

    Attributes:
      parameter: its name.
      shape: its shape.
      operations: torch functions that receive it, in the order of the forward pass.
      rule: what computes its per-sample gradients, for each operation.
      strategy: the form that they take: "exact product", "Gram matrix", "kept", "recomputed", "coalesced rows".
      kept_bytes: of gradients that are written out and kept for each example; None where it was not found out.
      layout: where the examples are in the inputs of the operations.
      verdict: "ok", "not used", or why it is refused and the way out.
    """

    parameter: str
    shape: tuple[int, ...]
    operations: tuple[str, ...]
    rule: str
    strategy: str
    kept_bytes: int | None
    layout: str
    verdict: str


@dataclass(frozen=True, slots=True)
class Check:
    """What was found out about a model.

    Attributes:
      parameters: one row for each trainable parameter.
      frozen: how many parameters do not require a gradient, and take no part.
      examples: rows of the batch with which the strategies were chosen.
      refusals: why the model cannot be trained privately as it is, and the way out; empty if it can.
    """

    parameters: tuple[ParameterCheck, ...]
    frozen: int
    examples: int
    refusals: tuple[str, ...]

    @property
    def ok(self) -> bool:
        """Whether the model can be trained privately, as far as the neighbour probe can tell."""
        return not self.refusals


def check(model: nn.Module, loss_fn: LossFunction | None, batch: Batch) -> Check:
    """Look at a model, operation by operation, and run the neighbour probe on it.

    Args:
      loss_fn: ``loss_fn(model, batch) -> (B,)``, one loss per example; None for a model whose loss stays in a loop of
        the user's own.
      batch: public or synthetic. Without ``loss_fn``, what the model is called with: a mapping gives keyword arguments,
        a tuple or list positional ones. With fewer than four rows only its structure counts, and values are made up.
    Raises:
      InvalidArgument: the batch holds no tensor with rows, or no parameter is trainable.
    """
    shapes = {name: tuple(p.shape) for name, p in trainable(model).items()}
    frozen = sum(not p.requires_grad for p in model.parameters())
    if not shapes:
        raise InvalidArgument("the model has no parameter that requires a gradient, so there is nothing to train.")
    found = tensors(batch)
    if not found or not all(leaf.dim() for leaf in found):
        raise InvalidArgument(
            "the batch holds no tensors, or one without rows; every tensor of it has a row per example."
        )
    seen = _Seen()
    attachment = attached_to(model)
    capture = None if attachment is None else attachment.capture
    with (
        _flags_put_back(model),
        nullcontext() if capture is None else capture.suspended(),
        undisturbed(model) as restore,
    ):
        seen.refused(lambda: refuse_model(model))
        while trainable(model):
            before = len(seen.set_aside)
            seen.refused(lambda: seen.look(model, loss_fn, batch, restore))
            if len(seen.set_aside) == before:
                break  # nothing was refused, or nothing that leaving parameters out would mend
            for name, parameter in model.named_parameters():
                if name in seen.set_aside:
                    parameter.requires_grad_(False)
    rows = tuple(_row(name, shape, seen) for name, shape in shapes.items())
    return Check(rows, frozen, seen.examples, tuple(dict.fromkeys(seen.refusals)))


class _Seen:
    """What was found out so far, while parameters are set aside."""

    def __init__(self) -> None:
        self.refusals: list[str] = []
        self.set_aside: dict[str, Refused] = {}  # parameter -> why
        self.examples = ROWS
        self.uses: tuple[Use, ...] = ()
        self.forms: dict[str, tuple[str, int]] = {}

    def refused(self, step: Callable[[], object]) -> None:
        """Run a step, and note its refusal."""
        try:
            step()
        except Refused as error:
            self.refusals.append(str(error))
            self.set_aside.update({name: error for name in error.parameters if name not in self.set_aside})

    def look(self, model: nn.Module, loss_fn: LossFunction | None, batch: Batch, restore: Restore) -> None:
        """List what the capture makes of the batch, and probe.

        Raises:
          Refused: an operation, or the model as a whole.
        """
        rows = len(tensors(batch)[0])
        if loss_fn is not None:
            examples = runnable_examples(model, loss_fn, batch, restore)
            self.list_uses(model, loss_fn, examples, batch if rows > ROWS else examples.batch, restore)
            probe_loss(model, loss_fn, batch, ghost)
            return
        call = _arguments(batch)
        outputs = outputs_of(model, reading := reading_of(model, call, rows, restore), restore)
        large = Examples.like(reading.template, outputs.examples.style, max(rows, ROWS)).batch
        if outputs.layouts or outputs.numbers:
            losses = outputs.losses if outputs.layouts else outputs.total
            self.list_uses(model, losses, outputs.examples, large, restore)
        probe_forward(model, call, rows)

    def list_uses(
        self, model: nn.Module, loss_fn: LossFunction, examples: Examples, large: Batch, restore: Restore
    ) -> None:
        """What the capture makes of ``large``, after it saw where the examples are in others.

        Raises:
          Refused: an operation.
        """
        layouts = ghost.memory(model).layouts
        before = layouts.copy()
        try:
            ghost.observe(model, loss_fn, _from_one_state(examples, restore), REPLACED, ROWS)
            self.examples = len(tensors(large)[0])
            torch.manual_seed(0)
            watched = watch(model, loss_fn, large, self.examples, layouts)
        except DpkitError:
            raise
        except Exception as error:  # the user's model may raise anything
            raise InvalidArgument(
                f"the model or the loss failed on the batch ({type(error).__name__}: {error})."
            ) from error
        finally:
            layouts.become(before)
            restore()
        self.uses, self.forms = watched.uses, watched.forms


def _from_one_state(examples: Examples, restore: Restore) -> Iterator[Batch]:
    for batch in (examples.batch, *map(examples.replaced, REPLACED)):
        torch.manual_seed(0)
        yield batch
        restore()


def _arguments(batch: Batch) -> Arguments:
    """What a model is called with."""
    if isinstance(batch, Mapping):
        return (), dict(batch)
    return (tuple(batch), {}) if isinstance(batch, (tuple, list)) else ((batch,), {})


@contextmanager
def _flags_put_back(model: nn.Module) -> Iterator[None]:
    """What was trainable is trainable again in the end."""
    flags = [(parameter, parameter.requires_grad) for parameter in model.parameters()]
    try:
        yield
    finally:
        for parameter, flag in flags:
            parameter.requires_grad_(flag)


def _row(name: str, shape: tuple[int, ...], seen: _Seen) -> ParameterCheck:
    uses = [use for use in seen.uses if name in use.names]
    strategy, kept = seen.forms.get(name, ("", None))
    operations = _counted(use.functions[0] for use in uses)
    verdict = "not used" if strategy == STRATEGIES[Zero] else ("ok" if name in seen.forms else "not reached")
    if name in seen.set_aside:
        refusal = seen.set_aside[name]
        operations, strategy, kept, verdict = (refusal.operation.rpartition(".")[2],), "", None, str(refusal)
    return ParameterCheck(
        parameter=name,
        shape=shape,
        operations=operations,
        rule=", ".join(dict.fromkeys(map(_rule, uses))),
        strategy="" if verdict == "not used" else strategy,
        kept_bytes=None if kept is None else kept // max(1, seen.examples),
        layout=", ".join(dict.fromkeys(_where(use.layout) for use in uses)),
        verdict=verdict,
    )


def _counted(names: Iterable[str]) -> tuple[str, ...]:
    return tuple(name if count == 1 else f"{name} x{count}" for name, count in Counter(names).items())


_RULES = {None: "fallback (vmap)", "elementwise": "junction"}


def _rule(use: Use) -> str:
    """linear; multi_head_attention_forward -> linear; derived: weight_norm -> conv."""
    chain = [*use.functions[:-1], _RULES.get(use.rule, str(use.rule))]
    return ("derived: " if use.derived else "") + " -> ".join([*use.derived, *chain])


def _where(layout: Layout | None) -> str:
    """In words, of axes counted from 0."""
    if layout is None:
        return "axis 0 (by default)"
    return f"axis {layout.axis}" + {None: "", "major": ", example by example", "minor": ", step by step"}[layout.folded]
