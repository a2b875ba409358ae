"""The outputs of a model that follow the examples of a batch, as losses: for a model whose loss is not known.

Where the examples are in an output is found by what moves when one example is replaced: (B, V), (T, B, V) and (B*T, V)
are alike.  An output that nothing moves (behind a layer that begins with zeros) shows it by its shape instead, which
must follow the number of examples.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from dpkit.gradients.layout import MIXED, Layout, layout_of

from .arguments import Reading
from .batch import Batch, tensors
from .synthetic import REPLACED, ROWS, Examples, Style
from .undisturbed import Restore


class Outputs:
    """Outputs of one model, called in one way.

    Attributes:
      examples: with which they were found.
      layouts: number of an output -> where the examples are in it.
      numbers: of the outputs that are single numbers.
      mixed: number of an output in which examples are mixed, if there is one.
      seen: the outputs with which this was found.
    """

    def __init__(self, model: nn.Module, reading: Reading, examples: Examples, runs: list[list[Tensor]]) -> None:
        self._model, self._reading, self.examples = model, reading, examples
        self.layouts: dict[int, Layout] = {}
        self.numbers: list[int] = []
        self.mixed: int | None = None
        self.seen: list[Tensor] = []
        *runs, longer = runs
        for number, versions in enumerate(zip(*runs, strict=True)):
            if not versions[0].is_floating_point():
                continue
            found = layout_of(versions, REPLACED, ROWS)
            if found == MIXED and self.mixed is None:
                self.mixed = number
            if found is None or found == MIXED:
                found = _by_shape(versions[0], longer[number])
            if isinstance(found, Layout):
                self.layouts[number] = Layout(found.axis, ROWS, found.folded)
            elif not versions[0].dim() and any(not torch.equal(versions[0], other) for other in versions[1:]):
                self.numbers.append(number)
            else:
                continue
            self.seen.extend(versions)

    @staticmethod
    def found(model: nn.Module, reading: Reading, style: Style, restore: Restore) -> Outputs:
        """Run the model on examples of this style and on their neighbours."""
        examples = Examples.like(reading.template, style)
        runs = []
        longer = Examples.like(reading.template, style, ROWS + 1).batch
        for batch in (examples.batch, *map(examples.replaced, REPLACED), longer):
            torch.manual_seed(0)
            args, kwargs = reading.arguments(batch, style)
            runs.append([output.detach() for output in tensors(model(*args, **kwargs))])
            restore()
        return Outputs(model, reading, examples, runs)

    def of(self, model: nn.Module, examples: Batch) -> list[Tensor]:
        """All tensors that the model returns."""
        args, kwargs = self._reading.arguments(examples, self.examples.style)
        return tensors(model(*args, **kwargs))

    def losses(self, model: nn.Module, examples: Batch) -> Tensor:
        """(B,): for each example, of its numbers in all outputs."""
        outputs, size = self.of(model, examples), len(tensors(examples)[0])
        losses = []
        for number, layout in self.layouts.items():
            flat = Layout(layout.axis, size, layout.folded).split(outputs[number]).reshape(size, -1).float()
            direction = torch.linspace(-1.0, 2.0, flat.shape[1], device=flat.device)
            losses.append((flat * direction).sum(1) + (flat * flat).sum(1))
        return torch.stack(losses).sum(0)

    def total(self, model: nn.Module, examples: Batch) -> Tensor:
        """(B,) times the sum of the outputs that are single numbers."""
        outputs, size = self.of(model, examples), len(tensors(examples)[0])
        return torch.stack([outputs[number].float() for number in self.numbers]).sum().expand(size)


def _by_shape(output: Tensor, longer: Tensor) -> Layout | None:
    """Where the examples must be if one more of them gives ``longer``."""
    if output.dim() == longer.dim():
        for axis, (length, with_one_more) in enumerate(zip(output.shape, longer.shape, strict=True)):
            if length and not length % ROWS and with_one_more * ROWS == length * (ROWS + 1):
                return Layout(axis, ROWS, None if length == ROWS else "major")
    return None
