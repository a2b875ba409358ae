"""The neighbour probe: does one example's gradient depend on another example?

Clipping bounds what an example adds through its own gradient. If it also moves the gradients of others, no clip bounds
its influence. Before the first charge, and before a model is called in a new way, the engine therefore runs a small
synthetic (or public) batch, learns where the examples are in the tensors inside the model (``gradients/layout.py``),
and requires that

  1. the recorded gradient of every other example stays the same when one is replaced by one of other values and another
     length,
  2. an example alone in its batch has the gradient that it had among the others,
  3. a batch has the gradients that it had before another batch went through the model,
  4. the recorded gradients add up to autograd's gradient of the summed loss,
  5. book-keeping and functorch (vmap) agree, where functorch can run the model,
  6. no parameter is written to, and no buffer or tensor attribute ends up elsewhere for another batch.

It answers with nothing or with a refusal, never with a number, and private data decides nothing: only shapes and types
of a batch are used (``synthetic.py``). Where the model draws random numbers of its own, 2 and 5 say nothing and are
left out. It is a test and not a proof: a dependence at a rarely taken branch, or (in the form with the user's own loop)
one inside the user's loss, is not seen.
"""

from __future__ import annotations

from collections.abc import Callable, Hashable, Iterator
from enum import Enum
from typing import Any, TypeVar

import torch
from torch import Tensor, nn

from dpkit.errors import CrossExample, DpkitError, UnsupportedModule
from dpkit.gradients import Backend, Capture, PerSample, ghost, trainable, vmap
from dpkit.gradients.watch import functions_of
from dpkit.types import Named

from .arguments import Arguments, Place, Reading, places_of_batch, runs_with_rows
from .batch import Batch, tensors
from .contents import persistent_buffers
from .guards import refuse_foreign_leaves
from .mixing import where_examples_meet
from .outputs import Outputs
from .synthetic import REPLACED, ROWS, STYLES, Examples, Style
from .undisturbed import Restore, random_state, state, undisturbed

LossFunction = Callable[[Any, Batch], Tensor]
_Found = TypeVar("_Found")

_TOLERANCE = {torch.float64: 1e-7, torch.float32: 1e-3}  # relative to the largest gradient in the batch
_LOW_PRECISION_TOLERANCE = 5e-2
_REMEDY = (
    "Look for normalisation over the batch, losses that compare examples, token means over a padded batch, layouts "
    "whose first axis is not the batch, and modules that remember what went through them."
)


def training_mode(model: nn.Module) -> Hashable:
    """Flags of all modules, training mode among them: a model may compute something else in every mode."""
    return tuple(
        (name, value)
        for module in model.modules()
        for name, value in vars(module).items()
        if isinstance(value, (bool, str, Enum))
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
    with undisturbed(model) as restore:
        Probe(model, loss_fn, runnable_examples(model, loss_fn, batch, restore), backend, restore).everything()


def probe_forward(model: nn.Module, call: Arguments, rows: int) -> tuple[Place, ...]:
    """Probe a model whose loss is in the user's loop: per example, a fixed combination of the model's outputs.

    Args:
      call: (args, kwargs) of a forward call; its tensors give shapes and types and are not read.
      rows: size of the batch in that call.
    Returns: which tensors of the call are of the batch; none if the call has nothing to do with the batch, which was
      not probed then.
    Raises:
      CrossExample, UnsupportedModule: naming what failed and the way out.
    """
    with undisturbed(model) as restore:
        reading = reading_of(model, call, rows, restore)
        if reading.places:
            _probe_reading(model, reading, restore)
    return reading.places


def runnable_examples(model: nn.Module, loss_fn: LossFunction, batch: Batch, restore: Restore) -> Examples:
    """Examples like those of a public batch, on which the loss is finite.

    Raises:
      CrossExample: there are none.
    """

    def run(style: Style) -> tuple[Examples, Tensor]:
        examples = Examples.of(batch, style)
        losses = loss_fn(model, examples.replaced(REPLACED[0]))
        restore()
        return examples, losses

    return _runnable(run, restore)


def reading_of(model: nn.Module, call: Arguments, rows: int, restore: Restore) -> Reading:
    """Which arguments of a call are of the batch.

    Raises:
      CrossExample: it cannot be told.
    """
    places = places_of_batch(call, rows, lambda places: runs_with_rows(model, call, places, restore))
    if places is None:
        raise CrossExample(
            f"the batch has {rows} rows, and so many do several axes of the tensors that the model is called with; the "
            "neighbour probe found no reading of them under which the model runs on four rows and on five. Give "
            "max_physical_batch_size= another value, keep tables and masks as buffers of the model, or use the "
            "functional form: engine.attach(model, loss_fn, ...)."
        )
    return Reading(model, call, places)


def outputs_of(model: nn.Module, reading: Reading, restore: Restore) -> Outputs:
    """The outputs of a model that follow the examples.

    Raises:
      CrossExample: there are none, or they are not finite.
    """

    def run(style: Style) -> tuple[Outputs, list[Tensor]]:
        outputs = Outputs.found(model, reading, style, restore)
        return outputs, outputs.seen

    outputs = _runnable(run, restore)
    if outputs.mixed is None and not outputs.layouts and not outputs.numbers:
        raise CrossExample(
            "the neighbour probe found no output of the model that follows the examples of a batch, so it cannot tell "
            "whether examples influence each other. Use the functional form: engine.attach(model, loss_fn, ...)."
        )
    return outputs


def _probe_reading(model: nn.Module, reading: Reading, restore: Restore) -> None:
    outputs = outputs_of(model, reading, restore)
    if outputs.layouts:
        Probe(model, outputs.losses, outputs.examples, ghost, restore).everything()
    if outputs.numbers:
        # A mean over the batch, for example: for an example alone it is another one, and may be.
        try:
            Probe(model, outputs.total, outputs.examples, ghost, restore).neighbours()
        except CrossExample as error:
            raise CrossExample(
                f"the model also returns a single number for the whole batch, such as a loss, and there {error} If you "
                "do not use it, do not ask for it (labels=), and compute one loss per example."
            ) from error
    if outputs.mixed is not None:  # what its gradients did not show
        met = _met(lambda batch: outputs.of(model, batch), outputs.examples, restore)
        raise CrossExample(
            f"output number {outputs.mixed} of the model moves in more than one example's place when one example is "
            f"replaced: the model mixes the examples of a batch{met}. {_REMEDY}"
        )


def _runnable(run: Callable[[Style], tuple[_Found, Tensor | list[Tensor]]], restore: Restore) -> _Found:
    """What ``run`` gives for the first style with which the model runs and its losses are finite."""
    failed: Exception | None = None
    for style in STYLES:
        try:
            torch.manual_seed(0)
            found, losses = run(style)
        except DpkitError:
            raise
        except Exception as error:  # the user's model may raise anything on made-up values
            failed = failed or error
            continue
        finally:
            restore()
        if all(bool(t.isfinite().all()) for t in ([losses] if isinstance(losses, Tensor) else losses)):
            return found
    if failed is None:
        raise CrossExample(
            "the model's losses are not finite on made-up values, so the neighbour probe can tell nothing. Pass a "
            "public batch: engine.attach(model, loss_fn, ..., probe_batch=...)."
        )
    raise _not_run(failed) from failed


def _not_run(error: Exception) -> CrossExample:
    return CrossExample(
        f"the neighbour probe could not run the model on a synthetic batch ({type(error).__name__}: {error}). A "
        "batch may hold a single example, too. Pass a public batch: engine.attach(model, loss_fn, ..., "
        "probe_batch=...)."
    )


class Probe:
    """The requirements, of one model, loss and batch."""

    def __init__(
        self, model: nn.Module, loss_fn: LossFunction, examples: Examples, backend: Backend, restore: Restore
    ) -> None:
        self._model, self._loss_fn, self._examples = model, loss_fn, examples
        self._backend, self._restore = backend, restore
        self._parameters = trainable(model)
        self._tolerance = max(
            (_TOLERANCE.get(p.dtype, _LOW_PRECISION_TOLERANCE) for p in self._parameters.values()), default=0.0
        )

    def everything(self) -> None:
        """All requirements of the module's docstring.

        Raises:
          CrossExample, UnsupportedModule, UnsupportedOperation: the first that is not met.
        """
        self._check(self._everything)

    def neighbours(self) -> None:
        """The first requirement alone."""
        self._check(self._neighbours)

    def _check(self, requirements: Callable[[], Any]) -> None:
        layouts = ghost.memory(self._model).layouts
        before = layouts.copy()
        try:
            if self._backend is ghost:
                seen = ghost.observe(self._model, self._loss_fn, self._seen(), REPLACED, ROWS)
                if seen & {torch.bfloat16, torch.float16}:  # autocast: the parameters do not show it
                    self._tolerance = max(self._tolerance, _LOW_PRECISION_TOLERANCE)
            requirements()
        except DpkitError:
            layouts.become(before)  # a refused model must not leave what was seen of it to the next one
            raise
        except Exception as error:  # the user's model may raise anything on made-up values
            layouts.become(before)
            raise _not_run(error) from error

    def _seen(self) -> Iterator[Batch]:
        """The batch and its neighbours, each from the same state."""
        for batch in (self._examples.batch, *map(self._examples.replaced, REPLACED)):
            torch.manual_seed(0)
            yield batch
            self._restore()

    def _gradients(self, of: Batch, by: Backend | None = None) -> list[Named]:
        torch.manual_seed(0)  # undone in the end: the same draws in every run of the probe
        backend = self._backend if by is None else by
        try:
            found, _ = backend.per_sample(self._model, self._loss_fn, of, len(tensors(of)[0]))
        except CrossExample as error:  # of an operation whose examples were seen to be mixed already
            about = CrossExample(
                f"the gradient of parameter '{next(iter(error.parameters), '?')}' ({error.operation}) is not one for "
                "each example: the model mixes the examples of a batch before "
                f"it{self._where_examples_meet()}. {_REMEDY}"
            )
            about.parameters, about.operation = error.parameters, error.operation
            raise about from error
        return _rows_of(found, self._parameters)

    def _where_examples_meet(self) -> str:
        return _met(lambda batch: self._loss_fn(self._model, batch), self._examples, self._restore)

    def _neighbours(self) -> list[Named]:
        """The recorded gradients, after they were compared with those of the neighbours."""
        recorded = self._gradients(self._examples.batch)
        self._restore()
        for row in REPLACED:
            neighbour = self._gradients(self._examples.replaced(row))
            self._restore()
            self._same_but(row, recorded, neighbour)
        return recorded

    def _same_but(self, row: int, recorded: list[Named], neighbour: list[Named]) -> None:
        others = [number for number in range(ROWS) if number != row]
        self._require(
            [recorded[number] for number in others],
            [neighbour[number] for number in others],
            "changes when another example is replaced",
            mixes=True,
        )

    def _everything(self) -> None:
        model, examples, restore = self._model, self._examples, self._restore
        versions = {name: p._version for name, p in model.named_parameters()}
        held = {name: tensor.shape for name, tensor in state(model).items()}  # what is there before the forward pass
        stored = persistent_buffers(model).keys()
        torch.manual_seed(0)
        draws = random_state(model)
        recorded = self._gradients(examples.batch)
        draws_random_numbers = any(
            not torch.equal(one, other) for one, other in zip(draws, random_state(model), strict=True)
        )
        kept = {name: tensor.clone() for name, tensor in state(model).items()}
        restore()
        neighbour = self._gradients(examples.replaced(REPLACED[0]))
        moved = [
            name
            for name, tensor in state(model).items()
            # What is stored with the model must not hold a note of the last batch, of whatever shape.
            if (name in stored or tensor.shape == held.get(name)) and _differ(tensor, kept.get(name))
        ]
        again = self._gradients(examples.batch)
        moved += [name for name, p in model.named_parameters() if p._version != versions[name]]
        restore()
        if moved:
            raise UnsupportedModule(
                f"'{moved[0]}' of the model is written to by the forward pass, and no noise protects it. Freeze it, or "
                "compute it from public data."
            )
        self._same_but(REPLACED[0], recorded, neighbour)
        self._require(recorded, again, "changes when another batch went before: the model remembers data")
        for row in REPLACED[1:]:
            neighbour = self._gradients(examples.replaced(row))
            restore()
            self._same_but(row, recorded, neighbour)
        if not draws_random_numbers:
            alone = [self._gradients(examples.alone(row))[0] for row in (0, ROWS - 1)]
            restore()
            self._require(
                [recorded[0], recorded[-1]], alone, "is another one when an example is alone in its batch", mixes=True
            )
        summed = {name: torch.stack([row[name] for row in recorded]).sum(0) for name in self._parameters}
        self._require(
            [summed],
            [self._total()],
            "as recorded per example does not add up to autograd's: the parameter is used in a way that was not seen",
        )
        if self._backend is not vmap and not draws_random_numbers:
            try:
                independent = self._gradients(examples.batch, vmap)
            except (DpkitError, RuntimeError, ValueError, TypeError, NotImplementedError):
                return  # functorch cannot run this model: the checks above stand alone
            finally:
                restore()
            self._require(recorded, independent, "differs between book-keeping and functorch")

    def _functions_of(self, name: str) -> tuple[str, ...]:
        """The operations that receive a parameter, if it can be told."""
        try:
            return functions_of(self._model, self._loss_fn, self._examples.batch, ROWS, name)
        except Exception:  # the refusal stands without them
            return ()
        finally:
            self._restore()

    def _total(self) -> Named:
        """Autograd's gradient of the summed loss."""
        torch.manual_seed(0)
        with (marking := Capture({})):  # tracks nothing, and marks what is computed from the batch
            losses = self._loss_fn(self._model, marking.batch(self._examples.batch))
        refuse_foreign_leaves(losses, {id(p) for p in self._parameters.values()})
        found = torch.autograd.grad(losses.sum(), list(self._parameters.values()), allow_unused=True)
        self._restore()
        return {
            name: torch.zeros_like(p) if gradient is None else gradient
            for (name, p), gradient in zip(self._parameters.items(), found, strict=True)
        }

    def _require(self, left: list[Named], right: list[Named], what: str, *, mixes: bool = False) -> None:
        failed = _worst(left, right, self._tolerance)
        if failed is None:
            return
        used = self._functions_of(failed)
        where = ""
        if mixes:
            where = f": the model or the loss mixes the examples of a batch{self._where_examples_meet()}"
        operation = f" ({', '.join(used)})" if used else ""
        raise CrossExample(f"the gradient of parameter '{failed}'{operation} {what}{where}. {_REMEDY}")


def _met(run: Callable[[Batch], object], examples: Examples, restore: Restore) -> str:
    """Where examples meet, as a part of a sentence."""
    for row in REPLACED:
        found = where_examples_meet(run, examples.batch, examples.replaced(row), row, ROWS)
        restore()
        if found is not None:
            return f", first seen in {found}"
    return ""


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
