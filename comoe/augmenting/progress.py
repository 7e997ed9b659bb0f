"""How far a run is: a bar on a terminal, lines now and then in a log."""

from __future__ import annotations

import time
from collections.abc import Callable
from types import TracebackType

from tqdm import tqdm

LINES = 10
"""Lines of a whole run, in a log."""
SILENCE = 60.0
"""Seconds without a line after which the begin of a round is told too."""


class Progress:
    """A context in which posts are counted.

    Args:
        total: posts.
        done: of them, by an earlier run.
        bar: draw a bar instead of printing lines.
        say: prints a line.
        clock: seconds.
    """

    def __init__(
        self,
        total: int,
        *,
        done: int,
        bar: bool,
        say: Callable[[str], None],
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._total, self._first, self._done = total, done, done
        self._say = (lambda line: None) if bar else say
        self._clock = clock
        self._began = self._said = clock()
        self._bar = tqdm(total=total, initial=done, unit="post", disable=not bar, dynamic_ncols=True)

    def __enter__(self) -> Progress:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        self._bar.close()

    def watch(self, number: int, posts: int) -> None:
        """A round begins.

        Args:
            number: of the round, from 1.
            posts: that take part.
        """
        self._bar.set_postfix(round=number, posts=posts)
        if self._clock() - self._said >= SILENCE:
            self._tell(f"; round {number} of {posts:,} more")

    def advance(self, posts: int) -> None:
        """So many posts more are done."""
        before, self._done = self._done, self._done + posts
        self._bar.update(posts)
        if before * LINES // self._total != self._done * LINES // self._total:
            self._tell("")

    def _tell(self, more: str) -> None:
        now, new = self._clock(), self._done - self._first
        self._said = now
        seconds = (now - self._began) / new * (self._total - self._done) if new else 0.0
        left = f", about {duration(seconds)} left" if seconds else ""
        self._say(f"augment: {self._done:,} of {self._total:,} posts ({self._done / self._total:.0%}){left}{more}")


def duration(seconds: float) -> str:
    """Seconds in the unit that suits them."""
    size, unit = next(item for item in ((3600, "h"), (60, "min"), (0, "s")) if seconds >= item[0])
    return f"{seconds / (size or 1):.{int(unit == 'h')}f} {unit}"
