"""Slices of a task's scores: the posts of one value of a column, or those below a bound of numbers."""

from __future__ import annotations

import math
import re
from collections.abc import Mapping, Sequence
from typing import NamedTuple

from comoe.tasks.labels import natural_order

_BOUND = re.compile(r"(.+)<([+-]?(?:\d+\.?\d*|\.\d+)(?:[eE][+-]?\d+)?)")


class Slice(NamedTuple):
    """One entry of ``tasks.<name>.slices``."""

    column: str
    bound: float | None
    """Posts are cut in two, below it and not; None: by each value of the column."""


def slice_of(entry: str) -> Slice:
    """``platform`` is a column, ``confidence<0.7`` its numbers below 0.7 and the others."""
    found = _BOUND.fullmatch(entry)
    return Slice(found[1], float(found[2])) if found else Slice(entry, None)


def slice_columns(entries: Sequence[str]) -> list[str]:
    """The columns that they read, each once."""
    return list(dict.fromkeys(slice_of(entry).column for entry in entries))


def slice_values(
    entry: str, columns: Mapping[str, Sequence[str | None]]
) -> tuple[list[str | None], tuple[str, ...]]:
    """The value of each post, None where it is in no slice, and the different ones in order.

    A post whose cell is empty, or is no number where there is a bound, is in no slice.

    Args:
        entry: of ``tasks.<name>.slices``.
        columns: column -> its cells; one that is not there has no slices.
    """
    column, bound = slice_of(entry)
    cells = list(columns.get(column, ()))
    if bound is not None:
        numbers = [number_of(cell) for cell in cells]
        cells = [None if math.isnan(number) else str(number < bound).lower() for number in numbers]
    return cells, natural_order(cell for cell in cells if cell is not None)


def number_of(cell: str | None) -> float:
    """The number that a cell spells, NaN where it spells none."""
    try:
        return float(cell) if cell is not None else math.nan
    except ValueError:
        return math.nan
