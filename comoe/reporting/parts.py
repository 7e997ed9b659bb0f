"""Parts of a corpus that a report looks at one by one: its periods, and the values of a column."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

import numpy as np

from comoe.reporting.predictions import Corpus
from comoe.reporting.times import PERIODS, choose_period, names_between, read_times

MAX_SLICES, MAX_PERIODS = 20, 400
"""Values of a column, and periods, that are shown."""


@dataclass(frozen=True, slots=True)
class ReportOptions:
    """What ``comoe report`` is asked for."""

    time: str | None = None
    """Column with the time of a post."""
    period: str = "auto"
    """Key of ``PERIODS``, or auto: by the time that the corpus spans."""
    by: Sequence[str] = ()
    """Columns whose values are looked at one by one."""
    weight: str | None = None
    """Column with the weight of a post."""
    least: int = 50
    """Posts that a period or slice needs."""
    examples: int = 3
    """Typical and borderline posts of each label; 0 shows no post."""
    seed: int = 0
    """Of the draws for intervals."""


@dataclass(frozen=True, slots=True)
class Group:
    """A partition of some posts: periods, or the values of a column."""

    column: str
    rows: Mapping[str, np.ndarray]
    """Period or value -> numbers of its posts, in the order to be shown."""
    left_out: int
    """Posts of periods or values that have too few."""
    periods: Sequence[str] = ()
    """All periods in order, those with too few posts too; none for values."""


def groups_of(corpus: Corpus, options: ReportOptions) -> tuple[list[Group], list[str]]:
    """The parts that are asked for, periods first, and what to say of the time.

    Raises:
        ValueError: no such column, no readable time, or too many periods.
    """
    groups, notes = [], []
    if options.time is not None:
        times = read_times(corpus.column(options.time, flag="--time"))
        known = [time for time in times if time is not None]
        if not known:
            raise ValueError(
                f"{corpus.source}: no cell of {options.time} (--time) is a time, like 2026-05-31, "
                "2026-05-31T12:00:00Z or seconds since 1970."
            )
        period = options.period
        if period == "auto":
            period = choose_period(known, least=options.least)
        names = [None if time is None else time.strftime(PERIODS[period]) for time in times]
        every = names_between(min(known), max(known), period)
        if len(every) > MAX_PERIODS:
            raise ValueError(
                f"--period {period}: the posts span {len(every):,} of them; at most {MAX_PERIODS} "
                "can be shown. Choose a longer one, or auto."
            )
        groups.append(replace(_group(options.time, names, options), periods=every))
        if lost := len(times) - len(known):
            notes.append(
                f"{lost:,} posts have no readable {options.time}; they are in no {period}."
            )
        notes.append(f"Times are in UTC; the period is the {period}.")
        if not groups[-1].rows:
            notes.append(
                f"No {period} has {options.least:,} posts; a longer --period, or fewer --min-posts, shows some."
            )
    for column in options.by:
        cells = corpus.column(column, flag="--by")
        names = [None if cell in (None, "") else str(cell) for cell in cells]
        groups.append(_group(column, names, options))
    return groups, notes


def _group(column: str, names: Sequence[str | None], options: ReportOptions) -> Group:
    counts = Counter(name for name in names if name is not None)
    large = [name for name, count in counts.most_common() if count >= options.least]
    kept = sorted(large) if column == options.time else large[:MAX_SLICES]
    column_N = np.array(names, dtype=object)
    rows = {name: np.flatnonzero(column_N == name) for name in kept}
    left_out = sum(counts.values()) - sum(map(len, rows.values()))
    return Group(column, rows, left_out)
