"""Neighbouring data sets, one pair for each step of a run: see ``harness.run``."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch

from accounting import Relation

from .subjects import CROWDS, HARM, PRODUCTS, Data, dropped_record, honest, null_record, of_norm


@dataclass
class Film:
    """Pairs of neighbouring data sets; all of ``left`` have one size, and so have all of ``right``.

    Attributes:
      said: what each pair is, for the report of a failure.
    """

    left: list[Data]
    right: list[Data]
    said: list[str]

    def only(self, keep: Sequence[str]) -> Film:
        """The scenes whose description begins with one of ``keep``."""
        chosen = [k for k, said in enumerate(self.said) if said.split(" in ")[0] in keep or said in keep]
        return Film([self.left[k] for k in chosen], [self.right[k] for k in chosen], [self.said[k] for k in chosen])

    def then(self, more: Film) -> Film:
        """All scenes of this one, then all of ``more``."""
        return Film(self.left + more.left, self.right + more.right, self.said + more.said)


def film(
    subject: str,
    size: int,
    relation: Relation,
    dtype: torch.dtype,
    seed: int = 0,
    null: Callable[[Data], Data] = null_record,
) -> Film:
    """Every kind of record, put first into ``size`` - 1 others: it leaves, becomes null, or becomes another one.

    It stands first because its leaving then moves every other record to another place and another microbatch.
    """
    found = Film([], [], [])
    others = honest(subject, size - 1, dtype, seed)
    extra = honest(subject, 2, dtype, seed + 500)
    record, second = extra[:1], extra[1:]

    def scene(crowd: Data, one: Data, other: Data, said: str) -> None:
        found.left.append(crowd.put(0, one))
        found.right.append(
            {
                Relation.ADD_REMOVE: crowd,
                Relation.ZERO_OUT: crowd.put(0, null(one)),
                Relation.REPLACE_ONE: crowd.put(0, other),
            }[relation]
        )
        found.said.append(said)

    for name, harm in HARM.items():
        scene(others, harm(record), second, f"{name} in ordinary")
    if size > 1:
        scene(others, others[:1], second, "duplicate in ordinary")
    for name in ("aligned", "offset300", "offset3000"):
        # The record belongs to the crowd: its gradient points where all of the others do. For the replacement it points
        # the other way: the loss is counted negatively.
        everyone = CROWDS[name](others.put(0, record))
        one = everyone[:1]._replace(w=torch.full_like(record.w, 1e3))
        scene(everyone[1:], one, one._replace(w=-one.w), f"member in {name}")
        scene(everyone[1:], HARM["NaN"](one), one, f"NaN in {name}")
    return found


def special_film(
    subject: str, size: int, relation: Relation, dtype: torch.dtype, kinds: Sequence[Callable[[Data], Data]], said: str
) -> Film:
    """Records of special ``kinds``, put first into ``size`` - 1 ordinary ones; where they are replaced, by their
    opposite, whose loss is counted negatively."""
    others, one = honest(subject, size - 1, dtype), honest(subject, 1, dtype, seed=500)
    found = Film([], [], [])
    for number, kind in enumerate(kinds):
        record = kind(one)
        found.left.append(others.put(0, record))
        found.right.append(
            {
                Relation.ADD_REMOVE: others,
                Relation.ZERO_OUT: others.put(0, dropped_record(record)),
                Relation.REPLACE_ONE: others.put(0, record._replace(w=-2 - record.w)),
            }[relation]
        )
        found.said.append(f"{said} {number} in ordinary")
    return found


def products(size: int, relation: Relation, dtype: torch.dtype) -> Film:
    """Gradients that are products of a huge and a tiny number, or hardly there."""
    found = special_film("product", size, relation, dtype, list(PRODUCTS.values()), "product")
    found.said = [f"{name} in ordinary" for name in PRODUCTS]
    return found


def edges(subject: str, size: int, relation: Relation, dtype: torch.dtype, norms: Sequence[float]) -> Film:
    """Records whose gradient is just below each of ``norms``, and just above."""
    kinds = [
        lambda record, norm=norm * side: of_norm(subject, record, norm) for norm in norms for side in (0.9999, 1.0001)
    ]
    return special_film(subject, size, relation, dtype, kinds, "edge")


def random_film(
    subject: str, size: int, scenes: int, relation: Relation, dtype: torch.dtype, generator: torch.Generator
) -> Film:
    """Crowds of records each of a random kind; the LAST record differs, so that the others keep their draws."""
    found = Film([], [], [])
    kinds = list(HARM)
    for number in range(scenes):
        seed = int(torch.randint(0, 2**31, (), generator=generator))
        plain = honest(subject, size + 1, dtype, seed)
        chosen = torch.randint(0, len(kinds), (size + 1,), generator=generator)
        # Half of the crowds are harmless apart from one or two, so that their sums are not dropped altogether.
        chosen[torch.rand(size + 1, generator=generator) < 0.5 * (number % 2)] = 0
        rows = [HARM[kinds[int(kind)]](plain[k : k + 1]) for k, kind in enumerate(chosen)]
        crowd = _joined(rows[: size - 1], plain)
        one, other = rows[size - 1], rows[size]
        found.left.append(crowd.put(size - 1, one))
        found.right.append(
            {
                Relation.ADD_REMOVE: crowd,
                Relation.ZERO_OUT: crowd.put(size - 1, null_record(one)),
                Relation.REPLACE_ONE: crowd.put(size - 1, other),
            }[relation]
        )
        found.said.append(f"{kinds[int(chosen[size - 1])]} in random crowd {seed}")
    return found


def _joined(rows: list[Data], like: Data) -> Data:
    return Data(*(torch.cat(columns) for columns in zip(*rows, strict=True))) if rows else like[:0]
