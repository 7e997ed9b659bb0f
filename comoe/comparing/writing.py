"""How numbers and tables of a comparison are written in Markdown."""

from __future__ import annotations

import math
from collections.abc import Sequence

from comoe.comparing.intervals import Interval


def table(head: Sequence[str], rows: Sequence[Sequence[str]]) -> list[str]:
    """The lines of a Markdown table."""
    return [f"| {' | '.join(cells)} |" for cells in (head, ["---"] * len(head), *rows)]


def cell(item: Interval | None, *, signed: bool = False) -> str:
    """A number with its interval, where it has one; empty for None."""
    if item is None:
        return ""
    form = "+.3f" if signed else ".3f"
    mean = format(item.mean, form)
    return f"{mean} [{item.low:{form}}, {item.high:{form}}]" if math.isfinite(item.low) else mean


def figure(item: Interval | None) -> str:
    """A large number without its interval."""
    return "" if item is None else f"{item.mean:,.0f}"
