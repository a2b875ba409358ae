"""Per-operation capture: every use of a tracked parameter leaves per-sample gradient factors instead of a gradient.

A :class:`Capture` is a torch function mode.  While it is active and gradients are enabled, each torch function that
receives a tracked parameter is replaced, according to ``rules.RULES``, by an autograd function that computes the same
output, passes the gradient on to its input, and leaves factors of the parameter's per-sample gradient (``factors.py``)
on a tape.  The parameter itself is no part of the graph, so the backward pass never touches ``p.grad``.

Guarantees:
  * an operation that receives a tracked parameter is recorded, or carries no gradient, or is refused by name;
  * a use that torch functions do not show (another autograd function, a scripted module) is refused by
    :meth:`Capture.backward`, which sees that a gradient arrived at the parameter itself;
  * parameters are known by identity: tied weights are one parameter, a module used twice is recorded twice and joined.

Not promised: that the leading axis of an operation's input is the batch.  :meth:`Capture.collect` compares its length
with the batch size, which a sequence of the same length passes; the engine's neighbour probe tells those apart.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from typing import Any, NamedTuple, Protocol, cast

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode, resolve_name

from dpkit import errors
from dpkit.gradients import factors
from dpkit.gradients.rules import ARGUMENT_IS_TEMPLATE, REMEDIES, RULES

REMEDY = "use backend=dpkit.vmap in the functional form engine.attach(...), or freeze it with requires_grad_(False)"


class Operation(Protocol):
    """What a rule puts in place of one torch function: names and numbers, never tensors."""

    @property
    def names(self) -> tuple[str | None, ...]:
        """The names of the tracked parameters, None where the weight is not tracked."""
        ...

    def forward(self, *args: Any, **kwargs: Any) -> tuple[Tensor, tuple[Tensor | None, ...]]:
        """Of the batched input and the detached parameters: the output, and what :meth:`backward` needs to see."""
        ...

    def backward(
        self, grad: Tensor, saved: tuple[Any, ...], *, need_input: bool
    ) -> tuple[Tensor | None, list[tuple[str, factors.Factor]]]:
        """The input's gradient, if needed, and (parameter name, factor of its per-sample gradient) pairs."""
        ...


class Record(NamedTuple):
    """One parameter's share of one operation in one backward pass."""

    name: str
    function: Callable[..., Any]
    factor: factors.Factor


class Call(NamedTuple):
    """One call of a torch function that received a tracked parameter: what a rule has to work with."""

    function: Callable[..., Any]
    args: tuple[Any, ...]
    kwargs: dict[str, Any]
    names: dict[int, str]
    anchor: Tensor
    tape: Tape

    def name(self, value: object) -> str | None:
        """The name of a tracked parameter; None for anything else."""
        return self.names.get(id(value))

    def detached(self, weight: Tensor | None) -> Tensor | None:
        """A weight of the operation without its graph; refused if that would lose a gradient."""
        if weight is None:
            return None
        if weight.requires_grad and self.name(weight) is None:
            raise self.unsupported(
                "a weight beside it requires a gradient and is not among the parameters, so its gradient would be lost"
            )
        return weight.detach()

    def batched(self, x: Tensor, dimensions: int) -> Tensor:
        """The batched input; refused if it is a parameter, or has no room for a batch axis before its own axes."""
        if self.name(x) is not None:
            raise self.unsupported("a parameter is the input, where the rule expects a batch of examples")
        if x.dim() < dimensions:
            raise self.unsupported(
                f"the input has shape {tuple(x.shape)} and no batch axis",
                "keep the examples of a batch along the first axis",
            )
        return x

    def record(self, operation: Operation, x: Tensor | None, *weights: Tensor | None) -> Tensor:
        """Run the operation so that its backward pass leaves factors on the tape."""
        device = next((weight.device for weight in weights if weight is not None), self.anchor.device)
        if torch.is_autocast_enabled(device.type):
            raise self.unsupported(
                "the casts of autocast are not recorded",
                "leave autocast and cast the model instead, as in model.bfloat16()",
            )
        hooks = torch._C._autograd._top_saved_tensors_default_hooks(True)  # pyright: ignore
        if hooks is not None and "checkpoint" in getattr(hooks[0], "__qualname__", ""):
            raise self.unsupported(
                "gradient checkpointing recomputes it in the backward pass, where uses are not recorded yet",
                "switch checkpointing off, and use max_physical_batch_size to save memory",
            )
        output = _Recorded.apply(self.anchor, x, weights, (operation, self.function, self.tape))
        return cast(Tensor, output)

    def unsupported(self, why: str, remedy: str = REMEDY) -> errors.UnsupportedOperation:
        """The refusal of this call, with the operation, the parameters that it received, and the way out."""
        found = {id(value): name for value in _flatten((self.args, self.kwargs)) if (name := self.name(value))}
        return _refusal(self.function, found.values(), why, remedy)


class Tape:
    """Where the backward passes of one capture leave their records.

    The graph holds the tape, and the tape holds no graph: records are detached, so no cycle can keep a step alive.
    """

    __slots__ = ("graph_task", "on_backward_end", "records")

    def __init__(self) -> None:
        self.records: list[Record] = []
        self.on_backward_end: Callable[[], None] | None = None
        self.graph_task = -1

    def add(self, function: Callable[..., Any], found: list[tuple[str, factors.Factor]]) -> None:
        self.records += [Record(name, function, factor) for name, factor in found]
        # The number of the running backward pass, not a flag: a pass that fails half-way never calls back.
        task = torch._C._current_graph_task_id()
        if self.on_backward_end is not None and task != self.graph_task:
            self.graph_task = task
            torch.autograd.Variable._execution_engine.queue_callback(self._backward_ended)

    def take(self) -> list[Record]:
        taken, self.records = self.records, []
        return taken

    def _backward_ended(self) -> None:
        if self.on_backward_end is not None:
            self.on_backward_end()


class Capture(TorchFunctionMode):
    """Records per-sample gradients of ``parameters`` while it is active; see the module's docstring.

    Use it around a forward pass (``with capture:``) or attach it to a model; then :meth:`backward`, :meth:`collect`.

    Attributes:
      parameters: name -> parameter; each name must be a distinct parameter that requires a gradient.
      workspace: memory for written-out gradients, which stays allocated between steps; its own by default.
      on_forward: called with the arguments of each forward pass of an attached model that is about to be captured.
      anchor: an empty tensor that requires a gradient and is an input of every recorded operation, so that the backward
        pass reaches all of them even where the batch itself requires no gradient.
    """

    def __init__(self, parameters: dict[str, nn.Parameter], *, workspace: factors.Workspace | None = None) -> None:
        super().__init__()
        self.parameters = dict(parameters)
        device = next((p.device for p in self.parameters.values()), torch.device("cpu"))
        self.anchor = torch.empty(0, device=device, requires_grad=True)
        self._names = {id(parameter): name for name, parameter in self.parameters.items()}
        self._tape = Tape()
        self._workspace = factors.Workspace() if workspace is None else workspace
        self._depth = 0
        self._entered: list[bool] = []
        self._handles: list[Any] = []
        self._suspended = False
        self.on_forward: Callable[[tuple[Any, ...], dict[str, Any]], None] | None = None

    # ------------------------------------------------------------------------------------------------ when it is active

    def __enter__(self) -> Capture:
        self._depth += 1
        if self._depth == 1:
            super().__enter__()
        return self

    def __exit__(self, *exception: object) -> None:
        if self._depth == 0:
            return
        self._depth -= 1
        if self._depth == 0:
            super().__exit__(None, None, None)

    def attach(self, model: nn.Module) -> None:
        """Be active exactly while ``model`` runs with gradients enabled, whatever train() or eval() says.

        The hooks hold the capture weakly, and copies of the model (deepcopy, pickle) have hooks that do nothing.

        Raises:
          InvalidArgument: this capture is attached already.
        """
        if self._handles:
            raise errors.InvalidArgument("this capture is attached to a model already; detach() it first")
        self._handles = [
            model.register_forward_pre_hook(_EnterHook(self), prepend=True, with_kwargs=True),
            model.register_forward_hook(_ExitHook(self), always_call=True),
        ]

    def detach(self) -> None:
        """Leave the model as it was before :meth:`attach`, forget what was recorded, and give its memory back."""
        for handle in self._handles:
            handle.remove()
        self._handles = []
        self._workspace.clear()
        self.reset()

    @contextmanager
    def suspended(self) -> Iterator[None]:
        """The attached model runs as if this capture were not attached."""
        self._suspended = True
        try:
            yield
        finally:
            self._suspended = False

    # ------------------------------------------------------------------------------------------------ what it recorded

    @property
    def pending(self) -> bool:
        """Whether a backward pass has left records that were not collected."""
        return bool(self._tape.records)

    @property
    def on_backward_end(self) -> Callable[[], None] | None:
        """Called once at the end of each backward pass that recorded something; what it raises, the pass raises."""
        return self._tape.on_backward_end

    @on_backward_end.setter
    def on_backward_end(self, callback: Callable[[], None] | None) -> None:
        self._tape.on_backward_end = callback

    def backward(self, losses: Tensor) -> None:
        """Backpropagate the (B,) losses, each with gradient 1, onto the tape; no ``.grad`` of any tensor is written.

        Raises:
          UnsupportedOperation: a gradient reached a tracked parameter past the capture. Nothing stays recorded.
        """
        targets = [self.anchor, *self.parameters.values()]
        _, *raw = torch.autograd.grad(losses, targets, torch.ones_like(losses), allow_unused=True)
        escaped = [name for name, gradient in zip(self.parameters, raw, strict=True) if gradient is not None]
        if escaped:
            self._tape.take()
            raise errors.UnsupportedOperation(
                f"a gradient reached {_listed(escaped)} past the capture: used outside of the attached model's "
                f"forward(), or by an operation that is no torch function (a custom autograd function, a scripted "
                f"module); {REMEDY}"
            )

    def collect(self, size: int, *, keep_bytes: int = factors.KEEP_BYTES) -> factors.PerSampleGradients:
        """The per-sample gradients of all tracked parameters since the last call, and an empty tape.

        Args:
          size: B, the number of units in the batch.
          keep_bytes: how much may be written out; a parameter that would exceed it takes a form that needs less.

        Raises:
          UnsupportedOperation: an operation's leading axis is not ``size`` long, hence not the batch.
        """
        uses: dict[str, list[factors.Factor]] = {name: [] for name in self.parameters}
        for record in self._tape.take():
            if record.factor.size != size:
                raise _refusal(
                    record.function,
                    [record.name],
                    f"the input has a leading axis of {record.factor.size} in a batch of {size} examples",
                    f"keep the examples along the first axis, as in (B, T, d) instead of (B*T, d); or {REMEDY}",
                )
            uses[record.name].append(record.factor)
        forms: dict[str, factors.Form] = {}
        for name, parameter in self.parameters.items():
            # Popped, so that activations are freed while the gradients of the next parameters are written out.
            forms[name], taken = factors.join(uses.pop(name), parameter, size, keep_bytes, self._workspace)
            keep_bytes -= taken
        return factors.PerSampleGradients(size, forms, {name: p.shape for name, p in self.parameters.items()})

    def reset(self) -> None:
        """Forget the records, those that older graphs may still deliver too, and leave a mode that was kept active.

        A KeyboardInterrupt in forward() keeps it active.
        """
        # A new tape: graphs made before this write to the old one, which nobody reads any more.
        old, self._tape = self._tape, Tape()
        self._tape.on_backward_end, old.on_backward_end = old.on_backward_end, _refuse_old_graph
        self._entered.clear()
        if self._depth and torch.overrides._get_current_function_mode() is self:
            self._depth = 1
            self.__exit__()

    # ---------------------------------------------------------------------------------------------------- what it does

    def __torch_function__(
        self,
        func: Callable[..., Any],
        types: Iterable[type],
        args: tuple[Any, ...] = (),
        kwargs: dict[str, Any] | None = None,
    ) -> Any:
        kwargs = kwargs or {}
        if not (self._tracks(args) or (kwargs and self._tracks(kwargs.values()))) or not torch.is_grad_enabled():
            return func(*args, **kwargs)
        call = Call(func, args, kwargs, self._names, self.anchor, self._tape)
        rule = RULES.get(func)
        return self._without_rule(call) if rule is None else rule(call, *args, **kwargs)

    def _tracks(self, values: Iterable[Any]) -> bool:
        names = self._names
        for value in values:
            if id(value) in names:
                return True
            if isinstance(value, (list, tuple)):
                if self._tracks(value):
                    return True
            elif isinstance(value, dict) and self._tracks(value.values()):
                return True
        return False

    def _without_rule(self, call: Call) -> Any:
        """Run a function that only looks at the parameter (shape, detach(), comparisons); refuse what uses it."""
        function, args, kwargs = call.function, call.args, call.kwargs
        if function in ARGUMENT_IS_TEMPLATE and call.name(args[0]) is None:
            return function(*args, **kwargs)
        if not (_writes(function) and self._tracks((*args[1:], kwargs))):
            result = function(*args, **kwargs)
            if self._carries_no_gradient(result):
                return result
        raise call.unsupported("this use has no rule", REMEDIES.get(function, REMEDY))

    def _carries_no_gradient(self, result: Any) -> bool:
        if isinstance(result, Tensor):
            return not result.requires_grad or id(result) in self._names
        if isinstance(result, (list, tuple)):
            return all(map(self._carries_no_gradient, result))
        return result is None or isinstance(result, _PLAIN)


_PLAIN = (bool, int, float, complex, str, bytes, torch.dtype, torch.device, torch.layout, torch.memory_format)


def _refuse_old_graph() -> None:
    raise errors.OutOfOrder(
        "a backward pass went through a forward pass of an attached model whose batch is over; nothing of it was used"
    )


class _Recorded(torch.autograd.Function):
    """One recorded operation. Parameters come inside a tuple: as arguments, autograd would send them gradients."""

    @staticmethod
    def forward(
        ctx: Any,
        anchor: Tensor,
        x: Tensor | None,
        weights: tuple[Tensor | None, ...],
        use: tuple[Operation, Callable[..., Any], Tape],
    ) -> Tensor:
        operation, function, tape = use
        y, saved = operation.forward(x, *weights)
        ctx.set_materialize_grads(False)
        ctx.save_for_backward(*saved)
        ctx.operation, ctx.function, ctx.tape = operation, function, tape
        return y

    @staticmethod
    def backward(ctx: Any, grad: Tensor | None) -> tuple[Tensor | None, ...]:
        if torch.is_grad_enabled():
            raise _refusal(
                ctx.function,
                ctx.operation.names,
                "create_graph=True asks for their derivatives, which are not recorded",
                "call backward without create_graph, or use backend=dpkit.vmap in the functional form",
            )
        grad_input = None
        if grad is not None:
            grad_input, found = ctx.operation.backward(grad, ctx.saved_tensors, need_input=ctx.needs_input_grad[1])
            ctx.tape.add(ctx.function, found)
        return None, grad_input, None, None


class _Hook:
    """Holds the capture weakly; copies and unpickled ones hold nothing and do nothing."""

    def __init__(self, capture: Capture | None = None) -> None:
        self._capture = (lambda: None) if capture is None else weakref.ref(capture)

    def __reduce__(self) -> tuple[type, tuple[()]]:
        return type(self), ()


class _EnterHook(_Hook):
    def __call__(self, module: nn.Module, args: Any, kwargs: Any) -> None:
        capture = self._capture()
        if capture is not None:
            active = torch.is_grad_enabled() and not capture._suspended
            if active and capture.on_forward is not None:
                capture.on_forward(args, kwargs)
            capture._entered.append(active)
            if capture._entered[-1]:
                capture.__enter__()


class _ExitHook(_Hook):
    def __call__(self, module: nn.Module, args: Any, output: Any) -> None:
        capture = self._capture()
        # Nothing was entered if a global hook raised before ours ran.
        if capture is not None and capture._entered and capture._entered.pop():
            capture.__exit__()


def _writes(function: Callable[..., Any]) -> bool:
    """Whether a function changes its first argument: its result would not show a gradient that it wrote there."""
    name = getattr(function, "__name__", "")
    return name == "__setitem__" or (name.endswith("_") and not name.endswith("__")) or name.startswith("__i")


def _refusal(
    function: Callable[..., Any], names: Iterable[str | None], why: str, remedy: str
) -> errors.UnsupportedOperation:
    return errors.UnsupportedOperation(
        f"{_title(function)}: no per-sample gradients of {_listed(names)}: {why}; {remedy}"
    )


def _title(function: Callable[..., Any]) -> str:
    return resolve_name(function) or getattr(function, "__qualname__", repr(function))


def _listed(found: Iterable[str | None]) -> str:
    names = [name for name in found if name is not None]
    shown = ", ".join(repr(name) for name in names[:4]) + (", ..." if len(names) > 4 else "")
    return f"parameter{'s' if len(names) > 1 else ''} {shown}"


def _flatten(values: Any) -> Iterator[object]:
    for value in values.values() if isinstance(values, dict) else values:
        if isinstance(value, (list, tuple, dict)):
            yield from _flatten(value)
        else:
            yield value
