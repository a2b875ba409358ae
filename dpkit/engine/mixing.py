"""Which operation brings the examples of a batch together: for the refusal of a model that the probe has caught.

The model runs on a batch and on its neighbour while every torch function shows its results.  The first result in which
more than the replaced example's place has moved is where the examples met.  Single numbers (a sum for a log, a maximum
that is compared) are passed over: what they are combined with is what mixes.
"""

from __future__ import annotations

import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode

from dpkit.gradients.layout import MIXED, layout_of
from dpkit.gradients.tape import title

from .batch import Batch

_TORCH, _HERE = str(Path(torch.__file__).parent), str(Path(__file__).parent)


def where_examples_meet(
    run: Callable[[Batch], object], batch: Batch, neighbour: Batch, row: int, rows: int
) -> str | None:
    """The operation, and the user's line that called it; None if none was seen.

    Args:
      run: computes the losses of a batch.
      neighbour: ``batch`` with another example at ``row``.
    """
    first, second = _Results(), _Results(row=row, rows=rows)
    second.before = first.results
    try:
        for results, of in ((first, batch), (second, neighbour)):
            torch.manual_seed(0)
            with results:
                run(of)
    except Exception:  # the refusal stands without it
        return second.found
    return second.found


class _Results(TorchFunctionMode):
    """Keeps the results of every torch function, or compares them with those that were kept."""

    def __init__(self, *, row: int = 0, rows: int = 0) -> None:
        super().__init__()
        self.results: list[tuple[Any, list[Tensor]]] = []
        self.before: list[tuple[Any, list[Tensor]]] | None = None
        self.found: str | None = None
        self._row, self._rows, self._number = row, rows, 0

    def __torch_function__(self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None) -> Any:
        outputs = func(*args, **(kwargs or {}))
        # Written into its first argument: that is the result, whatever is returned.
        shown = args[0] if outputs is None and args else outputs
        tensors = [t for t in (shown if isinstance(shown, (tuple, list)) else (shown,)) if isinstance(t, Tensor)]
        if self.before is None:
            self.results.append((func, [tensor.detach().clone() for tensor in tensors]))
        elif self.found is None and self._number < len(self.before):
            function, originals = self.before[self._number]
            self._number += 1
            if function is func and len(originals) == len(tensors):
                pairs = zip(originals, tensors, strict=True)
                if any(layout_of([one, other.detach()], [self._row], self._rows) == MIXED for one, other in pairs):
                    line = _line()
                    self.found = None if line is None else title(func) + line
        return outputs


def _line() -> str | None:
    """The innermost line of code that is not torch's; None if it is the probe's own."""
    frame = sys._getframe(2)
    while frame is not None and frame.f_code.co_filename.startswith(_TORCH):
        frame = frame.f_back
    if frame is not None and frame.f_code.co_filename.startswith(_HERE):
        return None
    return "" if frame is None else f" ({Path(frame.f_code.co_filename).name}, line {frame.f_lineno})"
