"""Where recorded operations leave the factors of per-sample gradients, and the autograd function that records them.

Guarantees:
  * a parameter is no part of the graph of an operation that was recorded, so the backward pass never touches it;
  * the graph holds the tape and the tape holds no graph of a batch, so reference counting alone frees a step;
  * a parameter whose last use of the forward pass has delivered its factors is *settled* at once, inside the backward
    pass: its activations are freed, and what remains is a form of bounded size (``forms.join``), or nothing at all
    where a consumer takes the gradients of whole groups of parameters as they become complete.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from contextlib import AbstractContextManager, nullcontext
from typing import Any, NamedTuple, Protocol

import torch
from torch import Tensor, nn
from torch.overrides import resolve_name

from dpkit import errors
from dpkit.gradients.derived import Key, Pulled, pull, sources
from dpkit.gradients.factors import Factor
from dpkit.gradients.forms import Form, PerSampleGradients, join
from dpkit.gradients.strategy import Workspace
from dpkit.gradients.units import fold

REMEDY = "use backend=dpkit.vmap in the functional form engine.attach(...), or freeze it with requires_grad_(False)"

_COPY = "write the new value to a new tensor, as in w = w * 2 instead of w.mul_(2)"

SMALLEST_BUDGET = 64 << 20
"""Bytes of written-out gradients that are always allowed, however small the activations are."""


class Operation(Protocol):
    """What a rule puts in place of one torch function: names, numbers and keys, never tensors of a batch."""

    @property
    def names(self) -> tuple[Key | None, ...]:
        """Keys of the tracked tensors among its weights, None where a weight is not tracked."""
        ...

    def forward(self, *args: Any, **kwargs: Any) -> tuple[Any, tuple[Tensor | None, ...]]:
        """Of inputs and detached weights: the output, and what :meth:`backward` needs to see."""
        ...

    def backward(self, *args: Any, **kwargs: Any) -> tuple[Any, list[tuple[Key, Factor]]]:
        """Of gradients and what was saved: the inputs' gradients, and factors of the weights' per-sample gradients."""
        ...


class Record(NamedTuple):
    """One parameter's share of one operation in one backward pass."""

    function: Callable[..., Any]
    factor: Factor


class Consumer(Protocol):
    """Takes the gradients of one group of parameters as soon as they are complete, and keeps none of them."""

    @property
    def groups(self) -> Mapping[str, int]:
        """Name -> group of each parameter."""
        ...

    def consume(self, group: int, gradients: PerSampleGradients) -> None:
        """The per-sample gradients of all parameters of ``group``."""
        ...


class Tape:
    """The factors of one batch, and the forms of the parameters that are settled.

    Args:
      parameters: name -> parameter.
      workspace: memory for written-out gradients.
      size: B, if it is known beforehand; without it nothing is settled before :meth:`finish`.
      rows: how many rows the model sees, where a unit has several.
      keep_bytes: budget for written-out gradients; the size of the recorded activations when left out.

    Attributes:
      places: (B, M) rows of each unit, where a unit has several.
      checkpointed: whether a part of the forward pass will be computed again in the backward pass.
      recomputable: whether the capture will be active then.
      over: whether the batch is over; what still arrives is refused.
      listening: whether a backward pass may come now; one that comes all the same is refused.
      muted: whether what arrives is of no interest, and is forgotten.
      activations: bytes of the inputs and outputs of the operations that were recorded.
    """

    def __init__(
        self,
        parameters: Mapping[str, nn.Parameter],
        workspace: Workspace,
        size: int | None = None,
        rows: int | None = None,
        keep_bytes: int | None = None,
    ) -> None:
        self.size = size
        self.rows = size if rows is None else rows
        self.places: Tensor | None = None
        self.checkpointed = False
        self.over = False
        self.listening = True
        self.muted = False
        self.recomputable = False
        self.on_backward_end: Callable[[], None] | None = None
        self._parameters = parameters
        self._workspace = workspace
        self._keep_bytes = keep_bytes
        self._consumer: Consumer | None = None
        self.activations = 0
        self._kept = 0
        self._awaited: dict[str, int] = {}
        self._records: dict[Key, list[Record]] = {}
        self._forms: dict[str, Form] = {}
        self._consumed: set[int] = set()
        self._graph_task = -1
        self._members: dict[int, list[str]] = {}

    def consume_with(self, consumer: Consumer) -> None:
        """Hand over complete groups of parameters instead of keeping them. Before the backward pass."""
        self._consumer = consumer
        for name in self._parameters:
            self._members.setdefault(consumer.groups[name], []).append(name)

    @property
    def pending(self) -> bool:
        """Whether a backward pass has left anything."""
        return bool(self._records or self._forms or self._consumed)

    def expect(self, names: Iterable[Key | None], bytes_kept: int) -> None:
        """An operation was recorded in the forward pass: its factors will come."""
        if torch._C._current_graph_task_id() != -1:
            return  # a checkpoint computes its forward pass again, inside the backward pass
        self.activations += bytes_kept
        for key in names:
            for name in sources(key):
                self._awaited[name] = self._awaited.get(name, 0) + 1

    def add(
        self,
        function: Callable[..., Any],
        names: Iterable[Key | None],
        found: Iterable[tuple[Key, Factor]],
    ) -> None:
        """An operation with the weights ``names`` was differentiated, and left these factors."""
        if self.muted:
            return
        if not self.listening:
            raise errors.OutOfOrder(
                "a gradient was taken inside the model or the loss (torch.autograd.grad, backward), before the "
                "backward pass of the batch; take it on copy.deepcopy(model), or use backend=dpkit.vmap with torch.func"
            )
        if self.over:
            raise errors.OutOfOrder(
                "a backward pass went through a forward pass of an attached model whose batch is over; nothing of it "
                "was used"
            )
        # The number of the running backward pass, not a flag: a pass that fails half-way never calls back.
        task = torch._C._current_graph_task_id()
        if self.on_backward_end is not None and task != self._graph_task:
            self._graph_task = task
            torch.autograd.Variable._execution_engine.queue_callback(self._backward_ended)
        later: set[str] = set()  # parameters that wait for the product of :meth:`_pull_back`
        for key, factor in found:
            if self.rows is not None:
                self._check(function, key, factor)
            if not isinstance(key, str) and key.overwritten:
                raise refusal(function, sources(key), "its weight was overwritten after it was used", _COPY)
            target, pulled = pull(key, factor if self.places is None else fold(factor, self.places))
            self._records.setdefault(target, []).append(Record(function, pulled))
            if not isinstance(target, str):
                later.update(sources(target))
        if self.size is None:
            return
        for key in names:
            for name in sources(key):
                if name not in later and self._came(name) == 0:
                    self._settle(name, self.size)

    def finish(self, size: int) -> PerSampleGradients:
        """Settle what is left; the gradients of all parameters, or of none where a consumer took them."""
        if self.size is not None and size != self.size:
            raise errors.InvalidArgument(f"a batch of {self.size} examples was begun, and {size} are collected")
        with precisely(next(iter(self._parameters.values())).device):
            self._pull_back(size)
            for name in self._parameters:
                if name not in self._forms:
                    self._settle(name, size)
        self._workspace.next_step(self._budget())
        if self._consumer is not None:
            return PerSampleGradients(size, {}, {})
        return PerSampleGradients(size, self._forms, {name: p.shape for name, p in self._parameters.items()})

    def _budget(self) -> int:
        return max(SMALLEST_BUDGET, self.activations) if self._keep_bytes is None else self._keep_bytes

    def _came(self, name: str) -> int:
        """How many uses of a parameter are still to come."""
        self._awaited[name] = self._awaited.get(name, 0) - 1
        if self._awaited[name] < 0:
            raise errors.OutOfOrder(
                f"a second backward pass reached parameter {name!r} in one batch; add the losses and differentiate once"
            )
        return self._awaited[name]

    def _pull_back(self, size: int) -> None:
        """Gradients with respect to derived tensors become gradients of the parameters behind them."""
        for key in [key for key in self._records if not isinstance(key, str)]:
            records = self._records.pop(key)
            for record in records:
                self._check(record.function, key, record.factor, size)
            uses = tuple(record.factor for record in records)
            for name in sources(key):
                factor = Pulled(key.tensor, uses, self._parameters[name])
                self._records.setdefault(name, []).append(Record(records[0].function, factor))

    def _settle(self, name: str, size: int) -> None:
        records = self._records.pop(name, [])
        for record in records:
            self._check(record.function, name, record.factor, size)
        uses = [record.factor for record in records]
        del records
        left = max(0, self._budget() - self._kept)
        self._forms[name], taken = join(uses, self._parameters[name], size, left, self._workspace)
        self._kept += taken
        if self._consumer is not None:
            self._offer(self._consumer, self._consumer.groups[name], size)

    def _offer(self, consumer: Consumer, group: int, size: int) -> None:
        """Hand a group over once all its parameters are settled."""
        members = self._members[group]
        if any(name not in self._forms and self._awaited.get(name, 0) > 0 for name in members):
            return
        for name in members:
            if name not in self._forms:  # used by no operation, unless through a derived tensor that comes at the end
                if any(name in sources(key) for key in self._records):
                    return
                self._forms[name], _ = join([], self._parameters[name], size, 0, self._workspace)
        shapes = {name: self._parameters[name].shape for name in members}
        forms = {name: self._forms[name] for name in members}
        if group in self._consumed:
            raise errors.OutOfOrder(f"parameters {members} were differentiated again after their group was clipped")
        self._consumed.add(group)
        consumer.consume(group, PerSampleGradients(size, forms, shapes))
        forms.clear()
        for name in members:
            self._forms[name] = CONSUMED
        self._kept = 0

    def _check(self, function: Callable[..., Any], key: Key, factor: Factor, size: int | None = None) -> None:
        size = self.rows if size is None else size
        if factor.size != size:
            raise refusal(
                function,
                sources(key),
                f"the input has a leading axis of {factor.size} in a batch of {size} examples",
                f"keep the examples along the first axis, as in (B, T, d) instead of (B*T, d); or {REMEDY}",
            )

    def _backward_ended(self) -> None:
        if self.on_backward_end is not None:
            self.on_backward_end()


class _Consumed:
    """Stands where the form of a parameter was that a consumer has taken."""


CONSUMED: Any = _Consumed()


def precisely(device: torch.device) -> AbstractContextManager[Any]:
    """Outside of autocast: norms and sums are not to be computed in a lower precision, wherever they are asked for."""
    if torch.is_autocast_enabled(device.type):
        return torch.autocast(device.type, enabled=False)
    return nullcontext()


class Use(NamedTuple):
    """What an operation is, where it came from, and where its factors go."""

    operation: Operation
    function: Callable[..., Any]
    tape: Tape
    many: bool


class Recorded(torch.autograd.Function):
    """One recorded operation. Weights come inside a tuple: as arguments, autograd would send them gradients."""

    @staticmethod
    def forward(ctx: Any, anchor: Tensor, weights: tuple[Tensor | None, ...], use: Use, *inputs: Tensor | None) -> Any:
        operation = use.operation
        outputs, saved = operation.forward(inputs, weights) if use.many else operation.forward(*inputs, *weights)
        ctx.set_materialize_grads(False)
        ctx.save_for_backward(*saved)
        ctx.use = use
        return outputs

    @staticmethod
    def backward(ctx: Any, *grads: Tensor | None) -> tuple[Tensor | None, ...]:
        use: Use = ctx.use
        operation = use.operation
        if torch.is_grad_enabled():
            raise refusal(
                use.function,
                [name for key in operation.names for name in sources(key)],
                "create_graph=True asks for their derivatives, which are not recorded",
                "call backward without create_graph, or use backend=dpkit.vmap in the functional form",
            )
        if all(grad is None for grad in grads):
            use.tape.add(use.function, operation.names, [])
            return None, None, None, *(None for _ in ctx.needs_input_grad[3:])
        if use.tape.checkpointed and not use.tape.recomputable:
            raise refusal(
                use.function,
                [name for key in operation.names for name in sources(key)],
                "gradient checkpointing computes the forward pass again, and the capture must see it",
                "call engine.backward(losses) instead of loss.backward()",
            )
        needs = ctx.needs_input_grad[3:]
        with precisely(next(grad.device for grad in grads if grad is not None)):
            if use.many:
                grad_inputs, found = operation.backward(grads, ctx.saved_tensors, need_inputs=needs)
            else:
                grad_input, found = operation.backward(grads[0], ctx.saved_tensors, need_input=needs[0])
                grad_inputs = (grad_input,)
            use.tape.add(use.function, operation.names, found)
        return None, None, None, *grad_inputs


class Refusal(NamedTuple):
    """Makes the refusals of one call; holds no tensor."""

    function: Callable[..., Any]
    names: tuple[str, ...]

    def __call__(
        self, why: str, remedy: str = REMEDY, kind: type[errors.Refused] = errors.UnsupportedOperation
    ) -> errors.Refused:
        return refusal(self.function, self.names, why, remedy, kind)


def refusal(
    function: Callable[..., Any],
    names: Iterable[str | None],
    why: str,
    remedy: str,
    kind: type[errors.Refused] = errors.UnsupportedOperation,
) -> errors.Refused:
    """The refusal of one call, with the operation, the parameters that it received, and the way out."""
    found = [name for name in names if name is not None]
    error = kind(f"{title(function)}: no per-sample gradients of {listed(found)}: {why}; {remedy}")
    error.parameters, error.operation = tuple(dict.fromkeys(found)), title(function)
    return error


def title(function: Callable[..., Any]) -> str:
    """The name under which a user knows a torch function."""
    return resolve_name(function) or getattr(function, "__qualname__", repr(function))


def listed(found: Iterable[str | None]) -> str:
    """Up to four names."""
    names = list(dict.fromkeys(name for name in found if name is not None))
    shown = ", ".join(repr(name) for name in names[:4]) + (", ..." if len(names) > 4 else "")
    return f"parameter{'s' if len(names) > 1 else ''} {shown}"
