"""Per-operation capture: every use of a tracked parameter leaves per-sample gradient factors instead of a gradient.

A :class:`Capture` is a torch function mode.  While it is active and gradients are enabled, it sorts the tensors that
each torch function receives:

  * *tracked*: a parameter, or a tensor derived from parameters and constants alone (``derived.py``);
  * *batched*: a tensor of the batch, or computed from one, or one that requires a gradient and is not tracked;
  * constants: everything else.

A function of tracked tensors alone runs as usual, and its result is tracked.  One that mixes tracked and batched
tensors is replaced, according to ``rules.RULES`` or else by a vector-Jacobian product for each example
(``rules/fallback.py``): the same output, the same gradient for its batched inputs, and factors of the per-sample
gradients (``factors.py``) on a tape (``tape.py``).  The parameter itself is no part of that graph, so the backward pass
never touches ``p.grad``.

Guarantees:
  * an operation that receives a tracked parameter is recorded, or carries no gradient, or is refused by name;
  * a use that torch functions do not show (another autograd function, a scripted module) is refused by
    :meth:`Capture.backward`, which sees that a gradient arrived at the parameter itself;
  * parameters are known by identity: tied weights are one parameter, a module used twice is recorded twice and joined.

Not promised: that the examples are where a rule expects them.  They are where :class:`~dpkit.gradients.layout.Layouts`
saw them move, or along the first axis where nothing was observed, and only the length of that axis is compared with the
batch size; the engine's neighbour probe looks at what comes out.
"""

from __future__ import annotations

import logging
import sys
import weakref
from collections.abc import Callable, Hashable, Iterable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Any, NamedTuple, cast

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode
from torch.utils import _pytree as pytree
from torch.utils.checkpoint import CheckpointFunction

from dpkit import errors
from dpkit.gradients import derived
from dpkit.gradients.derived import Derived, Key, origin, sources
from dpkit.gradients.forms import PerSampleGradients
from dpkit.gradients.layout import MIXED, Layout, Layouts, Site
from dpkit.gradients.rules import ARGUMENT_IS_TEMPLATE, FALLBACK, REFUSED, RULES, autocast_dtype
from dpkit.gradients.rules.elementwise import broadcast, expanded
from dpkit.gradients.strategy import Workspace
from dpkit.gradients.tape import REMEDY, Consumer, Operation, Recorded, Refusal, Tape, Use, listed, refusal, title

_LOG = logging.getLogger("dpkit.gradients")
_FALLEN_BACK: set[Callable[..., Any]] = set()  # what was said about it was said
_BATCHED = "_dpkit_batched"
_UNBATCHED = frozenset({Tensor.new_zeros, Tensor.new_ones, Tensor.new_full, Tensor.new_empty, Tensor.new_tensor})


class Call(NamedTuple):
    """One call of a torch function that received tracked and batched tensors: what a rule has to work with."""

    function: Callable[..., Any]
    args: tuple[Any, ...]
    kwargs: dict[str, Any]
    keys: dict[int, Key]
    capture: Capture
    group: Hashable
    ordinal: int

    def name(self, value: object) -> Key | None:
        """The key of a tracked tensor; None for anything else."""
        return self.keys.get(id(value)) if isinstance(value, Tensor) else None

    def is_batched(self, value: object) -> bool:
        """Whether a value is a tensor that has the examples along one of its axes."""
        return isinstance(value, Tensor) and self.name(value) is None and is_batched(value)

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

    def layout(self, x: Tensor, axis: int = 0) -> Layout:
        """Where the examples are in an argument of this call: what was observed, or else along ``axis``.

        Raises:
          UnsupportedOperation: examples were seen to mix before they came here.
        """
        place = next((place for place, value in enumerate(_tensors((self.args, self.kwargs))) if value is x), None)
        observed = None if place is None else self.capture.layouts.of(self.group, self.ordinal, place, x.dim())
        if observed == MIXED:
            raise self.unsupported(
                "more than one place of its input moved when one example was replaced: examples have mixed before it",
                "look for normalisation over the batch, losses that compare examples, and ragged layouts",
                errors.CrossExample,
            )
        rows = self.capture.rows
        if isinstance(observed, Layout):
            return Layout(observed.axis, rows, observed.folded)
        return Layout(axis, rows)

    def result_layout(self, number: int, default: Layout) -> Layout:
        """Where the examples are in result ``number`` of this call: what was observed, or the default."""
        place = sum(1 for _ in _tensors((self.args, self.kwargs))) + number
        observed = self.capture.layouts.of(self.group, self.ordinal, place, None)
        return Layout(observed.axis, self.capture.rows, observed.folded) if isinstance(observed, Layout) else default

    def capturing(self) -> AbstractContextManager[None]:
        """A context in which the pieces of a decomposed function are captured in their turn."""
        return self.capture.pushed()

    def expanded(self, tensor: Tensor, like: Tensor) -> Tensor:
        """A tracked tensor, once for each example of ``like``, with which it broadcasts: ``elementwise.expanded``."""
        return expanded(self, tensor, like)

    def record(self, operation: Operation, x: Tensor | None, *weights: Tensor | None) -> Tensor:
        """Run an operation of one input and one output so that its backward pass leaves factors on the tape."""
        return cast(Tensor, self._record(operation, (x,), weights, many=False))

    def record_many(
        self, operation: Operation, inputs: tuple[Tensor | None, ...], weights: tuple[Tensor | None, ...]
    ) -> tuple[Tensor, ...]:
        """:meth:`record` for an operation of several inputs and outputs."""
        return cast(tuple[Tensor, ...], self._record(operation, inputs, weights, many=True))

    def _record(
        self, operation: Operation, inputs: tuple[Tensor | None, ...], weights: tuple[Tensor | None, ...], *, many: bool
    ) -> Any:
        tape, device = self.capture.tape, self.capture.anchor.device.type
        context: Any = nullcontext()
        if torch.is_autocast_enabled(device):
            dtype = autocast_dtype(self.function, device)
            if dtype is not None:
                inputs = tuple(_cast(x, dtype) for x in inputs)
                weights = tuple(_cast(weight, dtype) for weight in weights)
                context = torch.autocast(device, enabled=False)
        hooks = torch._C._autograd._top_saved_tensors_default_hooks(True)  # pyright: ignore
        if hooks is not None and "checkpoint" in getattr(hooks[0], "__qualname__", ""):
            tape.checkpointed = True
        with context:
            outputs = Recorded.apply(self.capture.anchor, weights, Use(operation, self.function, tape, many), *inputs)
        first = outputs[0] if many else outputs
        tape.expect(operation.names, first.nbytes + sum(x.nbytes for x in inputs if x is not None))
        return outputs

    @property
    def unsupported(self) -> Refusal:
        """``call.unsupported(why, remedy)``: the refusal, with the operation, its parameters, and the way out."""
        return Refusal(self.function, tuple(name for key in self.keys.values() for name in sources(key)))


class Capture(TorchFunctionMode):
    """Records per-sample gradients of ``parameters`` while it is active; see the module's docstring.

    Use it around a forward pass (``with capture:``) or attach it to a model; then :meth:`backward`, :meth:`collect`.

    Args:
      parameters: name -> parameter; each name must be a distinct parameter that requires a gradient.
      workspace: memory for written-out gradients, which stays allocated between steps; its own by default.
      layouts: where examples were observed in the tensors of the model; nothing by default.

    Attributes:
      on_forward: called with the arguments of each forward pass of an attached model that is about to be captured.
      outputs: where the outputs of an attached model are gathered; None to let them go.
      anchor: an empty tensor that requires a gradient and is an input of every recorded operation, so that the backward
        pass reaches all of them even where the batch itself requires no gradient.
    """

    def __init__(
        self,
        parameters: dict[str, nn.Parameter],
        *,
        workspace: Workspace | None = None,
        layouts: Layouts | None = None,
    ) -> None:
        super().__init__()
        self.parameters = dict(parameters)
        device = next((p.device for p in self.parameters.values()), torch.device("cpu"))
        self.anchor = torch.empty(0, device=device, requires_grad=True)
        self.layouts = Layouts() if layouts is None else layouts
        self.watched: list[Site] | None = None
        self.outputs: list[Tensor] | None = None
        self.on_forward: Callable[[tuple[Any, ...], dict[str, Any]], list[Tensor] | None] | None = None
        self._names = {id(parameter): name for name, parameter in self.parameters.items()}
        self._workspace = Workspace() if workspace is None else workspace
        self.tape = Tape(self.parameters, self._workspace)
        self._ordinals: dict[Hashable, int] = {}
        self._depth = 0
        self._entered: list[bool] = []
        self._handles: list[Any] = []
        self._suspended = False

    # ------------------------------------------------------------------------------------------------ when it is active

    def __enter__(self) -> Capture:
        if self._depth == 0:
            self._ordinals.clear()
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

    @contextmanager
    def pushed(self) -> Iterator[None]:
        """Active again, inside a rule: torch takes a mode off while the mode itself runs."""
        super().__enter__()
        try:
            yield
        finally:
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
    def rows(self) -> int | None:
        """How many rows the model sees of the batch that was begun."""
        return self.tape.rows

    @property
    def pending(self) -> bool:
        """Whether a backward pass has left records that were not collected."""
        return self.tape.pending

    @property
    def on_backward_end(self) -> Callable[[], None] | None:
        """Called once at the end of each backward pass that recorded something; what it raises, the pass raises."""
        return self.tape.on_backward_end

    @on_backward_end.setter
    def on_backward_end(self, callback: Callable[[], None] | None) -> None:
        self.tape.on_backward_end = callback

    def begin(self, size: int, *, rows: int | None = None, keep_bytes: int | None = None) -> None:
        """A batch of ``size`` units comes; what was recorded before is forgotten.

        Without this call nothing is known of the batch before :meth:`collect`, so all factors are kept until then.

        Args:
          rows: how many rows the model sees, where a unit has several; ``size`` when left out.
          keep_bytes: how many bytes of gradients may be written out; the size of the activations when left out.
        """
        self.reset()
        callback = self.on_backward_end
        self.tape = Tape(self.parameters, self._workspace, size, rows, keep_bytes)
        self.on_backward_end = callback

    def batch(self, values: Any) -> Any:
        """Declare all tensors in ``values`` (nested lists, tuples, dicts) to be of the batch; returns ``values``."""
        for value in pytree.tree_leaves(values):
            if isinstance(value, Tensor):
                _mark(value)
        return values

    def backward(self, losses: Tensor, *, places: Tensor | None = None, consumer: Consumer | None = None) -> None:
        """Backpropagate the (B,) losses, each with gradient 1, onto the tape; no ``.grad`` of any tensor is written.

        Args:
          places: (B, M) rows of each unit, where a unit has several (``units.places_of``).
          consumer: takes the gradients of complete groups of parameters inside the backward pass.
        Raises:
          UnsupportedOperation: a gradient reached a tracked parameter past the capture. Nothing stays recorded.
        """
        self.tape.places = places
        if consumer is not None:
            self.tape.consume_with(consumer)
        targets = (self.anchor, *self.parameters.values())
        # Checkpoints run their forward pass again in here, and it must be captured as the first one was. The engine is
        # called directly: torch.autograd.grad is a torch function itself, inside which the mode would be off.
        self.tape.recomputable = self.tape.listening = True
        with self if self.tape.checkpointed else nullcontext():
            _, *raw = torch.autograd.Variable._execution_engine.run_backward(
                (losses,),
                (torch.ones_like(losses),),
                False,
                False,
                targets,
                allow_unreachable=True,
                accumulate_grad=False,
            )
        escaped = [name for name, gradient in zip(self.parameters, raw, strict=True) if gradient is not None]
        if escaped:
            self._forget()
            error = errors.UnsupportedOperation(
                f"a gradient reached {listed(escaped)} past the capture: used outside of the attached model's "
                f"forward(), or by an operation that is no torch function (a custom autograd function, a scripted "
                f"module); {REMEDY}"
            )
            error.parameters = tuple(escaped)
            raise error

    def collect(self, size: int) -> PerSampleGradients:
        """The per-sample gradients of all tracked parameters since the last call, and an empty tape.

        Args:
          size: B, the number of units in the batch.

        Raises:
          UnsupportedOperation: an operation's leading axis is not ``size`` long, hence not the batch.
        """
        tape = self._forget()
        return tape.finish(size)

    def reset(self) -> None:
        """Forget the records, those that older graphs may still deliver too, and leave a mode that was kept active.

        A KeyboardInterrupt in forward() keeps it active.
        """
        self._forget()
        self._entered.clear()
        if self._depth and torch.overrides._get_current_function_mode() is self:
            self._depth = 1
            self.__exit__()

    def _forget(self) -> Tape:
        """A new tape; the old one, to which graphs made before this still write and which refuses that, is returned."""
        old, self.tape = self.tape, Tape(self.parameters, self._workspace)
        self.tape.on_backward_end, old.over = old.on_backward_end, True
        return old

    # ---------------------------------------------------------------------------------------------------- what it does

    def __torch_function__(
        self,
        func: Callable[..., Any],
        types: Iterable[type],
        args: tuple[Any, ...] = (),
        kwargs: dict[str, Any] | None = None,
    ) -> Any:
        kwargs = kwargs or {}
        keys: dict[int, Key] = {}
        if func in ARGUMENT_IS_TEMPLATE:
            batched = self._sort(args[:1], keys)
        else:
            batched = self._sort(args, keys)
            if kwargs and self._sort(kwargs.values(), keys):
                batched = True
        if not keys or not torch.is_grad_enabled():
            if keys and _in_reentrant_checkpoint():
                raise refusal(func, [name for key in keys.values() for name in sources(key)], *_REENTRANT)
            return _run(func, args, kwargs, batched)
        if not batched:
            return self._derive(func, args, kwargs, keys)
        # The numbers of axes belong to a site: one weight may meet steps of a sequence, and the sequence.
        axes = tuple(tensor.dim() for tensor in _tensors((args, kwargs)))
        group = (func, tuple(name for key in keys.values() for name in sorted(sources(key))), axes)
        ordinal = self._ordinals[group] = self._ordinals.get(group, -1) + 1
        call = Call(func, args, kwargs, keys, self, group, ordinal)
        result = self._apply(call) if self.watched is None else self._observed(call)
        _mark_all(func, args, result)
        if self.watched is not None:
            self.watched.append(Site((group, ordinal), tuple(map(self._seen, _tensors((args, kwargs, result))))))
        return result

    def _sort(self, values: Iterable[Any], keys: dict[int, Key]) -> bool:
        """Add the tracked tensors among ``values`` to ``keys``; whether there is a batched one."""
        batched = False
        for value in values:
            if isinstance(value, Tensor):
                name = self._names.get(id(value))
                if name is not None:
                    keys[id(value)] = name
                elif (known := origin(value)) is not None and value.requires_grad:
                    keys[id(value)] = Derived(value, known)
                elif is_batched(value):
                    batched = True
            elif isinstance(value, (list, tuple)):
                batched |= self._sort(value, keys)
            elif isinstance(value, dict):
                batched |= self._sort(value.values(), keys)
        return batched

    def _derive(
        self, func: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any], keys: dict[int, Key]
    ) -> Any:
        """Run a function of parameters and constants, and track what it returns."""
        if (check := REFUSED.get(func)) is not None and (why := check(*args, **kwargs)) is not None:
            raise refusal(func, [name for key in keys.values() for name in sources(key)], *why)
        # Outside of checkpoints: the graph of a derived tensor is walked after the backward pass.
        hooks = torch._C._autograd._top_saved_tensors_default_hooks(True)  # pyright: ignore
        keep = torch.autograd.graph.saved_tensors_hooks(Tensor.detach, _same) if hooks is not None else nullcontext()
        with keep:
            result = func(*args, **kwargs)
        writes = bool(args) and _writes(func)
        derived.mark(func, args, kwargs, args[0] if writes else result, keys, written=writes)
        return result

    def _observed(self, call: Call) -> Any:
        """As it is recorded; or as it is, where a rule must know where the examples are, which is being found out."""
        try:
            return self._apply(call)
        except errors.UnsupportedOperation:
            return call.function(*call.args, **call.kwargs)

    def _seen(self, tensor: Tensor) -> Tensor | None:
        """A copy of a tensor of the batch, for :class:`Layouts`."""
        tracked = id(tensor) in self._names or origin(tensor) is not None
        return None if tracked or not is_batched(tensor) else tensor.detach().clone()

    def _apply(self, call: Call) -> Any:
        """A function of parameters and a batch: by its rule, by the fallback, or refused."""
        function = call.function
        if (check := REFUSED.get(function)) is not None and (why := check(*call.args, **call.kwargs)) is not None:
            raise call.unsupported(*why)
        complex_values = False
        for value in _tensors((call.args, call.kwargs)):
            if value.is_nested or value.layout != torch.strided:
                kind = "nested" if value.is_nested else str(value.layout)
                raise call.unsupported(f"a tensor that it receives is {kind}", "pad it to a dense tensor, with a mask")
            complex_values |= value.is_complex()
        rule = RULES.get(function)
        # Only the junction knows conjugates.
        if rule is not None and (not complex_values or rule is broadcast):
            return rule(call, *call.args, **call.kwargs)
        if _writes(function):
            raise call.unsupported("a tensor is overwritten", "write the result to a new tensor")
        result = function(*call.args, **call.kwargs)
        if not _carries_gradient(result):
            return result  # a comparison, a shape: nothing to differentiate
        del result
        if function not in _FALLEN_BACK:
            _FALLEN_BACK.add(function)
            _LOG.warning(
                "%s of %s has no rule of its own; its per-sample gradients are computed by vmap: exact, but slower",
                title(function),
                listed(name for key in call.keys.values() for name in sources(key)),
            )
        return FALLBACK(call)


def is_batched(tensor: Tensor) -> bool:
    """Whether a tensor that is not tracked belongs to the batch."""
    return tensor.requires_grad or getattr(tensor, _BATCHED, False)


def is_computed_from_batch(tensor: Tensor) -> bool:
    """Whether a capture saw that a tensor is of the batch, whatever its flags say."""
    return getattr(tensor, _BATCHED, False)


def _mark(tensor: Tensor) -> None:
    setattr(tensor, _BATCHED, True)


def _mark_all(function: Callable[..., Any], args: tuple[Any, ...], result: Any) -> None:
    """The results of a function of the batch, or the tensor that it wrote to, are of the batch."""
    if function in _UNBATCHED:
        return
    written = args[0] if args and _writes(function) else None
    for value in result if isinstance(result, (tuple, list)) else (result, written):
        # A function that returns an argument as it was (x.to(y) where nothing changes) says nothing about it.
        if isinstance(value, Tensor) and (value is written or not any(value is argument for argument in args)):
            setattr(value, _BATCHED, True)


def _run(function: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any], batched: bool) -> Any:
    result = function(*args, **kwargs)
    if batched:
        _mark_all(function, args, result)
    return result


def _carries_gradient(result: Any) -> bool:
    if isinstance(result, Tensor):
        return result.requires_grad
    if isinstance(result, (list, tuple)):
        return any(map(_carries_gradient, result))
    return not (result is None or isinstance(result, _PLAIN))


_PLAIN = (bool, int, float, complex, str, bytes, torch.dtype, torch.device, torch.layout, torch.memory_format)


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
            given = capture.on_forward(args, kwargs) if active and capture.on_forward is not None else None
            capture._entered.append(active)
            if active:
                if given is None:
                    rows = capture.rows
                    given = [t for t in _tensors((args, kwargs)) if t.dim() and (rows is None or len(t) == rows)]
                capture.batch(given)
                capture.__enter__()


class _ExitHook(_Hook):
    def __call__(self, module: nn.Module, args: Any, output: Any) -> None:
        capture = self._capture()
        # Nothing was entered if a global hook raised before ours ran; a reset inside forward() forgot what was.
        if capture is not None and (capture._entered.pop() if capture._entered else capture._depth > 0):
            capture.__exit__()
            if capture.outputs is not None and capture._depth == 0:
                capture.outputs += [t for t in _tensors((output,)) if t.requires_grad]


_REENTRANT = (
    "a reentrant checkpoint runs it without gradients, and differentiates a forward pass of its own later",
    "pass use_reentrant=False to torch.utils.checkpoint.checkpoint",
)


def _in_reentrant_checkpoint() -> bool:
    frame = sys._getframe(2)
    while frame is not None:
        if frame.f_code is CheckpointFunction.forward.__code__:
            return True
        frame = frame.f_back
    return False


_WRITING = frozenset(
    {
        *("__setitem__", "__iadd__", "__isub__", "__imul__", "__itruediv__", "__ifloordiv__", "__imod__", "__ipow__"),
        *("__imatmul__", "__iand__", "__ior__", "__ixor__", "__ilshift__", "__irshift__"),
    }
)


def _writes(function: Callable[..., Any]) -> bool:
    """Whether a function changes its first argument."""
    name = getattr(function, "__name__", "")
    return name in _WRITING or (name.endswith("_") and not name.endswith("__"))


def _cast(tensor: Tensor | None, dtype: torch.dtype) -> Tensor | None:
    """As autocast would: float64 and whole numbers stay."""
    eligible = tensor is not None and tensor.is_floating_point() and tensor.dtype != torch.float64
    return tensor.to(dtype) if tensor is not None and eligible else tensor


def _same(tensor: Tensor) -> Tensor:
    return tensor


def _tensors(values: Any) -> Iterator[Tensor]:
    for value in values.values() if isinstance(values, dict) else values:
        if isinstance(value, Tensor):
            yield value
        elif isinstance(value, (list, tuple, dict)):
            yield from _tensors(value)
