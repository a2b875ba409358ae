"""Users as units: a data set whose items are whole users, so that any sampler draws users and not their rows.

Guarantee: item u holds rows of user u alone, at most ``rows_per_user`` of them, so a neighbour (one user more or less,
or another user in the place of one) changes one item.  Which rows of a user with more are taken is drawn anew whenever
the user is, from the rows of that user alone and with random numbers that nothing else uses.
Requires: the right id for every row, and the public number of users as ``num_examples``.  Nobody can check either.
Why: what an item holds is a function of one user's rows and of fresh random numbers, so that samplers, clip and event,
which know of items alone, are about users.
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch.utils.data import Dataset, default_collate

from dpkit.errors import InvalidArgument

from .sampler import check_whole

UNIT = "user"


class Users(Dataset[Any]):
    """One item for each user: (K rows of the user, stacked as ``default_collate`` does, and their weights).

    For guarantee, requirements and proof see the module.

    ``num_examples`` of the plan is then the number of users, its unit is "user", and the loop gives the K rows of a
    user one loss each::

        for (x, y), weights in loader:                                # (B, K, ...), (B, K), (B, K)
            losses = F.cross_entropy(model(x.flatten(0, 1)), y.flatten(), reduction="none") * weights.flatten()
            engine.backward(losses, units=torch.arange(len(x)).repeat_interleave(K))    # rows_per_unit=K

    Weights are 1/n for the n rows that a user has in the batch, and 0 for rows that fill up: the loss of a user is the
    mean over the user's rows.

    Args:
      dataset: map-style data set of rows.
      user_ids: (len(dataset),) the user of each row: whole numbers.
      rows_per_user: K, at least 1.
    Raises:
      InvalidArgument: for a count below 1, or ids that are not one whole number a row.
    """

    def __init__(self, dataset: Any, user_ids: Tensor | Sequence[int], *, rows_per_user: int) -> None:
        check_whole("rows_per_user", rows_per_user)
        ids = torch.as_tensor(user_ids)
        if ids.shape != (len(dataset),) or ids.is_floating_point():
            raise InvalidArgument(
                f"user_ids has shape {tuple(ids.shape)} and type {ids.dtype} for a data set of {len(dataset)} rows; "
                "give one whole number for each row."
            )
        self.rows_per_user = rows_per_user
        self._dataset = dataset
        order = torch.argsort(ids, stable=True)
        _, counts = torch.unique_consecutive(ids[order], return_counts=True)
        self._rows = torch.split(order, counts.tolist())

    def __len__(self) -> int:
        return len(self._rows)

    def __getitem__(self, user: int) -> tuple[Any, Tensor]:
        rows, size = self._rows[user], self.rows_per_user
        if len(rows) > size:
            # Not torch's own generator: how often it was asked would depend on the users that were drawn, and with it
            # all that is drawn from it later.
            own = torch.Generator().manual_seed(int.from_bytes(os.urandom(8), "little", signed=True))
            rows = rows[torch.randperm(len(rows), generator=own)[:size]]
        weights = torch.zeros(size)
        weights[: len(rows)] = 1 / len(rows)
        filled = [*rows.tolist(), *[int(rows[0])] * (size - len(rows))]
        return default_collate([self._dataset[row] for row in filled]), weights


def unit_of(dataset: Any) -> str | None:
    """The unit of a data set whose items are users, also inside of torch's subsets and concatenations; else None."""
    if isinstance(dataset, Users):
        return UNIT
    inside = [getattr(dataset, "dataset", None), *(getattr(dataset, "datasets", None) or ())]
    return next((unit for part in inside if part is not None and (unit := unit_of(part))), None)
