"""The catalogue: every known way in which a trainer lies about its epsilon, tried against this one.

M01 to M48 and B49 to B74 are the entries of the project's catalogue of privacy bugs, X01 and so on are bugs of single
members of the package.  ``PREDICTED`` was written before the mutants: it says which check must catch which entry.
"""

from __future__ import annotations

from . import (  # noqa: F401  # each adds its bugs to the list
    ledger_mutants,
    loop_mutants,
    member_mutants,
    noise_mutants,
    sampling_mutants,
    sensitivity_mutants,
    source_mutants,
)
from .mutants import MUTANTS, Mutant

BUGS: tuple[Mutant, ...] = tuple(sorted(MUTANTS, key=lambda bug: ("MBX".index(bug.id[0]), bug.id, bug.check)))

_IDS_BY_CHECK = {
    # Sensitivity, noise, what else is to be seen, sampling, events, crashes, accountants, source, files.
    "D": (1, 2, 3, 4, 5, 6, 7, 8, 16, 24, 30, 31, 34, 35, 36, 37, 46, 47, 49, 50, 51, 52, 53),
    "N": (9, 10, 11, 12, 13, 14, 15, 22, 32, 33, 40, 43, 44, 45, 54, 55, 56, 72),
    "R": (17, 25, 26, 27, 28, 29, 57, 58, 59, 60, 61),
    "A": (18, 19, 38, 39),
    "V": (20, 48, 62, 65),
    "K": (21, 23, 67, 68),
    "E": (41, 42, 63, 64, 65, 66, 73),
    "L": (69, 70, 74),
    "F": (69, 71),
}


def name_of(number: int) -> str:
    """M01 to M48, B49 to B74."""
    return f"{'M' if number <= 48 else 'B'}{number:02d}"


PREDICTED: frozenset[tuple[str, str]] = frozenset(
    (name_of(number), check) for check, numbers in _IDS_BY_CHECK.items() for number in numbers
)
