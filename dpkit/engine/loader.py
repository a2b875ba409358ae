"""The private loader: Poisson draws behind the interface of the user's own ``DataLoader``.

Guarantees:
  * Batches are drawn by the plan's sampler from the run's secret; the user's shuffling is not used. ``collate_fn``,
    workers and pinning are.
  * What a loop can count is public: a pass has a public number of iterations, every logical step has the same public
    number of microbatches, passes end for good at the planned number of steps. Batches are filled up with rows of zeros
    that carry no weight; an empty draw is nothing but such rows.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

from torch import Tensor
from torch.utils.data import DataLoader, Dataset, IterableDataset, RandomSampler, SequentialSampler, default_collate

from dpkit.errors import DataError, InvalidArgument, UnsupportedLoader
from dpkit.mechanisms import RunKey
from dpkit.sampling import Sampler

from .batch import Batch, blank, check_rows, pad, tensors
from .plan import check_count


@dataclass(frozen=True)
class Draw:
    """What the engine knows about the batch in hand.

    Attributes:
      rows: rows that the model sees, padding included.
      real: how many of them, from the first on, are units of the data set. Private.
      microbatch: position within the logical batch, from 0.
      microbatches: how many microbatches every logical batch has. Public.
      step: the number of the logical step for which it was drawn, from 0. Public.
      mark: of the pass to which it belongs.
    """

    rows: int
    real: int
    microbatch: int
    microbatches: int
    step: int = 0
    mark: object = None

    @property
    def last(self) -> bool:
        return self.microbatch == self.microbatches - 1


ROW_MULTIPLE = 16
"""Matrix kernels treat the last rows of a product differently, and which ones these are depends on the number of rows.
One example more would then change the rounding of all others, and with it, where an example sits on a tie, its
gradient. Row counts in steps of 16 leave next to no neighbours with different counts. A mitigation: no proof covers
rounding forward."""


def filled(rows: int) -> int:
    """The next multiple of :data:`ROW_MULTIPLE`, at least one of them."""
    return max(1, math.ceil(rows / ROW_MULTIPLE)) * ROW_MULTIPLE


def microbatch_rows(max_physical_batch_size: int) -> int:
    """The largest multiple of :data:`ROW_MULTIPLE` within the limit, or the limit itself where it is smaller.

    Raises:
      InvalidArgument: for a limit that leaves no room for a row.
    """
    check_count("max_physical_batch_size", max_physical_batch_size)
    if max_physical_batch_size < 1:
        raise InvalidArgument(f"max_physical_batch_size is {max_physical_batch_size}; it must be at least 1.")
    return max_physical_batch_size // ROW_MULTIPLE * ROW_MULTIPLE or max_physical_batch_size


class Draws:
    """Batch sampler of one run: index lists, one per physical batch, each draw from fresh randomness.

    Attributes:
      logical_steps: of the pass that is about to begin.
      first_step: the number of its first step, as the ledger counts: batches that were drawn and never charged, ahead
        of time or before a crash, are drawn again for the same place in the order.
    """

    def __init__(self, sampler: Sampler, population: int, run_key: RunKey, microbatch_size: int | None) -> None:
        self._sampler = sampler
        self._population = population
        self._run_key = run_key
        self._size = microbatch_size
        self._drawn = 0
        self._arranged: Tensor | None = None
        self.logical_steps = 0
        self.first_step = 0
        if microbatch_size is None:
            self.microbatches = 1
        elif sampler.cap is not None:
            self.microbatches = math.ceil(sampler.cap / microbatch_size)
        else:
            raise InvalidArgument(
                f"max_physical_batch_size cuts batches into a public number of microbatches, and {sampler} has no "
                "largest batch; use dpkit.TruncatedPoisson(sample_rate, cap), or the functional form (engine.attach), "
                "which cuts batches of any sampler inside the step."
            )

    def __iter__(self) -> Iterator[list[int]]:
        if self._drawn == 0:
            self._arranged = self._sampler.arrange(self._population, self._run_key.arrangement())
        for step in range(self.first_step, self.first_step + self.logical_steps):
            generator = self._run_key.sampling(self._drawn)
            self._drawn += 1
            units = self._sampler.draw(self._population, generator, step=step, arranged=self._arranged).tolist()
            if self._size is None:
                yield units
            else:
                for start in range(0, self.microbatches * self._size, self._size):
                    yield units[start : start + self._size]

    def __len__(self) -> int:
        return self.logical_steps * self.microbatches


class _Rows(Dataset[Any]):
    """The user's data set, asked for a list of rows that may be empty."""

    def __init__(self, dataset: Any) -> None:
        self._dataset = dataset

    def __getitems__(self, indices: list[int]) -> list[Any]:
        if not (hasattr(self._dataset, "__getitems__") and indices):
            return [self._dataset[index] for index in indices]
        rows = self._dataset.__getitems__(indices)
        if len(rows) != len(indices):
            # Each row is clipped on its own: two rows of one unit would count twice.
            raise UnsupportedLoader(
                f"the data set's __getitems__ returned {len(rows)} rows for {len(indices)} indices; one index is one "
                "unit and one row. Several views of an example belong into one row, averaged in its loss."
            )
        return rows

    def __getitem__(self, index: int) -> Any:
        return self._dataset[index]

    def __len__(self) -> int:
        return len(self._dataset)


class _Collate:
    """The user's ``collate_fn``, taught about empty and short batches. Picklable, for workers.

    Batches are filled up to a multiple of :data:`ROW_MULTIPLE` rows, or to the microbatch size.
    """

    def __init__(self, collate_fn: Callable[[list[Any]], Batch], template: Batch, rows: int | None) -> None:
        self._collate_fn = collate_fn
        self._template = template
        self._rows = rows

    def __call__(self, examples: list[Any]) -> tuple[Batch, int, int]:
        real = len(examples)
        batch = self._collate_fn(examples) if real else self._template
        rows = self._rows or filled(real)
        while self._rows is None and any(rows in tensor.shape[1:] for tensor in tensors(batch)):
            rows += ROW_MULTIPLE  # a sequence as long as the batch could be taken for it
        if real == 0:
            return blank(self._template, rows), rows, 0
        check_rows(batch, real)
        return (batch if real == rows else pad(batch, rows)), rows, real


@dataclass(frozen=True)
class Loading:
    """How batches are fetched: the part of a ``DataLoader`` that privacy does not touch."""

    dataset: Any
    collate_fn: Callable[[list[Any]], Batch] = default_collate
    options: tuple[tuple[str, Any], ...] = ()

    @staticmethod
    def of(loader: DataLoader[Any]) -> Loading:
        """What the user's loader does, apart from choosing the examples.

        Raises:
          UnsupportedLoader: for data sets and samplers that cannot be drawn from as the plan says.
        """
        if not isinstance(loader, DataLoader):
            raise UnsupportedLoader(
                f"the loader is a {type(loader).__name__}; make_private takes a torch.utils.data.DataLoader over a "
                "map-style data set. A loop without one can use engine.attach and engine.batches()."
            )
        if loader.batch_sampler is None or loader.batch_size is None:
            raise UnsupportedLoader(
                "the DataLoader has its own batch_sampler or no batching; dpkit draws the batches itself (Poisson), "
                "so give it a DataLoader made with batch_size=, which becomes the expected batch size."
            )
        if not isinstance(loader.sampler, (RandomSampler, SequentialSampler)) or getattr(
            loader.sampler, "replacement", False
        ):
            raise UnsupportedLoader(
                f"the DataLoader samples with {type(loader.sampler).__name__}; dpkit draws every example with the same "
                "probability (Poisson), so this sampler's choice would be lost. Remove it, and make_private again."
            )
        # Not its generator, which would seed the workers with what somebody knows; the draws are not its own anyway.
        options = {
            "num_workers": loader.num_workers,
            "pin_memory": loader.pin_memory,
            "timeout": loader.timeout,
            "worker_init_fn": loader.worker_init_fn,
            "multiprocessing_context": loader.multiprocessing_context,
            "prefetch_factor": loader.prefetch_factor,
            "persistent_workers": loader.persistent_workers,
        }
        return Loading(loader.dataset, loader.collate_fn or default_collate, tuple(options.items()))

    def template(self, probe_batch: Batch | None) -> Batch:
        """A batch whose structure, types and shapes (never values) every empty draw takes over.

        Raises:
          DataError: when the data set is empty and there is no public batch to learn the structure from.
          UnsupportedLoader: when the structure has leaves that are not tensors with one row per example.
        """
        if probe_batch is not None:
            return blank(probe_batch, 1)
        if len(self.dataset) == 0:
            raise DataError(
                "the data set is empty, so the structure of a batch is unknown; pass probe_batch=, a public or "
                "synthetic batch as collate_fn would return it."
            )
        batch = self.collate_fn([self.dataset[0]])
        check_rows(batch, 1)
        return blank(batch, 1)

    def check(self) -> None:
        """Refuse data sets that cannot be drawn from by index.

        Raises:
          UnsupportedLoader: naming the data set's type.
        """
        if isinstance(self.dataset, IterableDataset) or not hasattr(self.dataset, "__len__"):
            raise UnsupportedLoader(
                f"the data set is a {type(self.dataset).__name__}, which has no length and no index; Poisson sampling "
                "needs a map-style data set (__len__ and __getitem__)."
            )


class PrivateLoader:
    """Iterates over private batches as the user's loader did; one pass is one epoch of 1/q logical steps.

    Args:
      loading: where the rows come from.
      draws: which rows.
      template: structure of a batch.
      microbatch_size: rows of every physical batch, or None for whatever was drawn.
      begin_pass: called with a mark of the pass when it begins; returns its public number of logical steps, and the
        number of its first one.
      end_pass: called with the mark when the pass ends, at its last step or because the loop was left.
      announce: called with the :class:`Draw` just before its batch is handed out.
    """

    def __init__(
        self,
        loading: Loading,
        draws: Draws,
        template: Batch,
        *,
        microbatch_size: int | None,
        steps_per_pass: int,
        begin_pass: Callable[[object], tuple[int, int]],
        end_pass: Callable[[object], None],
        announce: Callable[[Draw], None],
    ) -> None:
        self.dataset = loading.dataset
        self._draws = draws
        self._steps_per_pass = steps_per_pass
        self._begin_pass = begin_pass
        self._end_pass = end_pass
        self._announce = announce
        self._inner: DataLoader[Any] = DataLoader(
            _Rows(loading.dataset),
            batch_sampler=draws,  # pyright: ignore[reportArgumentType]  # any iterable of index lists will do
            collate_fn=_Collate(loading.collate_fn, template, microbatch_size),
            **dict(loading.options),
        )

    def __len__(self) -> int:
        """Iterations of one full pass: public."""
        return self._steps_per_pass * self._draws.microbatches

    def __iter__(self) -> Iterator[Batch]:
        mark = object()
        self._draws.logical_steps, first = self._begin_pass(mark)
        self._draws.first_step = first
        microbatches = self._draws.microbatches
        try:
            for number, (batch, rows, real) in enumerate(self._inner):
                step, microbatch = divmod(number, microbatches)
                self._announce(Draw(rows, real, microbatch, microbatches, first + step, mark))
                yield batch
        finally:
            self._end_pass(mark)
