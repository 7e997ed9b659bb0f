"""Times of posts in the forms that people have them, and the periods that they fall into."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from datetime import UTC, datetime, timedelta
from typing import Any

PERIODS = {
    "hour": "%Y-%m-%d %H:00",
    "day": "%Y-%m-%d",
    "week": "%G-W%V",
    "month": "%Y-%m",
    "year": "%Y",
}
"""``--period`` -> name of the period of a time."""

LONGEST = {"hour": 3, "day": 62, "week": 366, "month": 5 * 366}
"""Period -> days of a corpus up to which it is chosen."""


def read_times(cells: Sequence[Any]) -> list[datetime | None]:
    """Times in UTC from ISO 8601, seconds since 1970, or Twitter's ``Wed Oct 10 20:19:24 +0000 2018``."""
    return [_time(cell) for cell in cells]


def _time(cell: Any) -> datetime | None:
    text = str(cell).strip()
    for read in (_compact, _seconds, datetime.fromisoformat, _twitter):
        try:
            found = read(text)
            found = found.replace(tzinfo=UTC) if found.tzinfo is None else found.astimezone(UTC)
        except (ValueError, OverflowError, OSError):
            continue
        return found if FIRST_YEAR <= found.year <= LAST_YEAR else None
    return None


FIRST_YEAR, LAST_YEAR = 1990, 2100
"""A time outside of these is none, as null dates of databases are."""


def _compact(text: str) -> datetime:
    """``20260531``, with hours and minutes, or seconds too."""
    form = {8: "%Y%m%d", 12: "%Y%m%d%H%M", 14: "%Y%m%d%H%M%S"}.get(len(text))
    if form is None or not text.startswith(("19", "20")):
        raise ValueError
    return datetime.strptime(text, form)


def _seconds(text: str) -> datetime:
    seconds = float(text)
    # Milliseconds, where seconds would be after the year 5000.
    return datetime.fromtimestamp(seconds / 1000 if seconds > 1e11 else seconds, UTC)


def _twitter(text: str) -> datetime:
    return datetime.strptime(text, TWITTER)


TWITTER = "%a %b %d %H:%M:%S %z %Y"


def choose_period(times: Sequence[datetime], *, least: int = 1) -> str:
    """The period of ``PERIODS`` that fits how long a time these span.

    A longer one where only then two periods, or else one, have ``least`` posts.
    """
    days = (max(times) - min(times)).total_seconds() / 86400
    fit = next((period for period, longest in LONGEST.items() if days <= longest), "year")
    longer = list(PERIODS)[list(PERIODS).index(fit) :]
    enough = {}
    for period in longer:
        counts = Counter(time.strftime(PERIODS[period]) for time in times)
        enough[period] = sum(count >= least for count in counts.values())
    some = (period for most in (2, 1) for period in longer if enough[period] >= most)
    return next(some, fit)


def names_between(first: datetime, last: datetime, period: str) -> list[str]:
    """Names of all periods from one time to another, in order."""
    step = timedelta(hours=1) if period == "hour" else timedelta(days=1)
    names, time = {}, first
    while time < last:
        names[time.strftime(PERIODS[period])] = None
        time += step
    return [*(names | {last.strftime(PERIODS[period]): None})]
