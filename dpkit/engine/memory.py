"""When a batch does not fit into memory: how many rows would.

A step's memory grows with its rows: activations, the gradients that flow back, and the written-out gradients, whose
budget is the size of the activations. The estimate divides what is free after the failure by what a row had taken.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager

import torch

from dpkit.errors import OutOfMemory

from .loader import ROW_MULTIPLE

_SHARE = 0.8  # of the free memory: allocators round up, and fragments stay
# Activations, gradients of activations, and written-out gradients.
_TIMES_ACTIVATIONS = 3


def is_out_of_memory(error: BaseException) -> bool:
    """Whether torch failed to allocate memory, on any device."""
    return isinstance(error, torch.OutOfMemoryError) or (
        isinstance(error, RuntimeError) and "allocate memory" in str(error)
    )


@contextmanager
def explained(rows: int, device: torch.device, activations: Callable[[], int] = lambda: 0) -> Iterator[None]:
    """Inside, a lack of memory is reported with the number of rows that would fit.

    Args:
      rows: of the batch.
      activations: bytes of them that were recorded in the forward pass; 0 if nothing is known.
    Raises:
      OutOfMemory: naming that number.
    """
    try:
        yield
    except RuntimeError as error:
        if not is_out_of_memory(error):
            raise
        refusal = _refusal(rows, activations(), device)
    else:
        return
    # Outside of the handler: the traceback of the other error holds what did not fit.
    raise refusal


def _refusal(rows: int, activations: int, device: torch.device) -> OutOfMemory:
    fit = _rows_that_fit(rows, activations, free_bytes(device))
    way = (
        f"about {fit} rows would fit: start again with max_physical_batch_size={fit}"
        if fit >= 1
        else "not even one row would fit: make the model or the example smaller, or use gradient checkpointing"
    )
    return OutOfMemory(
        f"a batch of {rows} rows did not fit into the memory of {device}; {way}. clipping=dpkit.clipping.PerLayer(...) "
        "and torch.utils.checkpoint(use_reentrant=False) save memory, too. Nothing of this batch was released."
    )


def free_bytes(device: torch.device) -> int:
    """What can be allocated now, about."""
    if device.type == "cuda":
        cached = torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
        return torch.cuda.mem_get_info(device)[0] + cached
    return os.sysconf("SC_AVPHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")


def _rows_that_fit(rows: int, activations: int, free: int) -> int:
    """At most half of what failed, in multiples of :data:`ROW_MULTIPLE` where that is possible."""
    if rows <= 1:
        return 0
    fit = rows // 2
    if activations:
        fit = min(fit, int(_SHARE * free / (_TIMES_ACTIVATIONS * activations / rows)))
    return fit // ROW_MULTIPLE * ROW_MULTIPLE or fit
