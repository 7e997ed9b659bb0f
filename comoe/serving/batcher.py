"""Dynamic batching: posts of many requests share forward passes. Knows neither HTTP nor the model.

One thread works on one model. It takes what waits, oldest first, as many posts as some passes of
the limit of tokens hold; a post that arrives while the model is idle waits a few milliseconds for
company.
"""

from __future__ import annotations

import logging
import math
import threading
import time
import traceback
from collections import deque
from collections.abc import Callable, Hashable, Sequence
from concurrent.futures import Future
from dataclasses import dataclass, field
from typing import Any

from comoe.serving.limits import Limits

LOG = logging.getLogger("comoe.serving")

PASSES = 4
"""Full forward passes that are taken at once: posts of like length then share one. With tweets and
reviews from eight clients of 16 posts, padding costs 24 % at four and 54 % at one."""


class QueueFull(Exception):
    """No room for a request; ``seconds`` until there should be."""

    def __init__(self, seconds: int) -> None:
        super().__init__(seconds)
        self.seconds = seconds


class Closed(Exception):
    """The queue takes no more requests: a newer revision took over, or its thread has ended."""


@dataclass(frozen=True, slots=True)
class Work:
    """What was taken at once, and done."""

    posts: int
    """Posts of it."""
    tokens: int
    """Their estimated tokens."""
    seconds: float
    """How long it took."""


@dataclass(eq=False, slots=True)
class _Job:
    """A request: its posts are done in one pass or several."""

    key: Hashable
    arrived: float
    left: int
    results: list[Any]
    future: Future = field(default_factory=Future)


@dataclass(eq=False, slots=True)
class _Item:
    """One post of a request."""

    job: _Job
    place: int
    post: Any
    tokens: int


class Batcher:
    """The queue in front of a model, and the thread that works on it.

    Args:
        predict: (key, posts) -> one result per post; called on the thread.
        limits: of the queue and of a batch.
        done: called on the thread with all that was taken at once.
    """

    def __init__(
        self,
        predict: Callable[[Any, list[Any]], Sequence[Any]],
        *,
        limits: Limits,
        done: Callable[[Work], None] = lambda work: None,
    ) -> None:
        self._predict, self._limits, self._done = predict, limits, done
        self._waiting: deque[_Item] = deque()
        self._changed = threading.Condition()
        self._open = True
        self._posts_per_second = 0.0
        self._thread = threading.Thread(target=self._work, daemon=True)
        self._thread.start()

    def submit(self, key: Hashable, posts: Sequence[Any], tokens: Sequence[int]) -> Future:
        """Queue the posts of a request; the future has the list of results, and may be canceled.

        Args:
            key: requests with equal keys may be done together.
            posts: at least one.
            tokens: about how many each has.

        Raises:
            QueueFull: the queue has no room for all of them.
            Closed: it takes no more.
        """
        job = _Job(key, time.monotonic(), len(posts), [None] * len(posts))
        job.future.add_done_callback(self._forget)
        with self._changed:
            if not (self._open and self.alive()):
                raise Closed
            if self._waiting and len(self._waiting) + len(posts) > self._limits.queue:
                wait = len(self._waiting) / self._posts_per_second if self._posts_per_second else 1
                raise QueueFull(max(1, min(60, math.ceil(wait))))
            for place, (post, count) in enumerate(zip(posts, tokens, strict=True)):
                self._waiting.append(_Item(job, place, post, count))
            self._changed.notify()
        return job.future

    def waiting(self) -> int:
        """Posts in the queue."""
        return len(self._waiting)

    def alive(self) -> bool:
        """Whether the thread works."""
        return self._thread.is_alive()

    def close(self) -> None:
        """Take no more requests, finish those that wait, and end the thread."""
        with self._changed:
            self._open = False
            self._changed.notify()
        self._thread.join()

    def _forget(self, future: Future) -> None:
        """Drop the posts of a request that was given up, or failed."""
        if future.cancelled() or future.exception() is not None:
            with self._changed:
                self._waiting = deque(i for i in self._waiting if i.job.future is not future)

    def _work(self) -> None:
        while batch := self._take():
            try:
                self._work_on(batch)
            except Exception as error:
                # Without its message, which may repeat a post.
                where = "".join(traceback.format_tb(error.__traceback__))
                LOG.error("%s in the queue, which goes on\n%s", type(error).__name__, where)
                _fail(batch, error)

    def _work_on(self, batch: list[_Item]) -> None:
        start = time.monotonic()
        self._run(batch)
        seconds = time.monotonic() - start
        rate = len(batch) / max(seconds, 1e-6)
        # Of the last ten times or so.
        self._posts_per_second += (rate - self._posts_per_second) * (
            0.1 if self._posts_per_second else 1
        )
        self._done(Work(len(batch), sum(item.tokens for item in batch), seconds))

    def _take(self) -> list[_Item]:
        """The posts to do next; none when the queue is closed and empty."""
        with self._changed:
            while True:
                while self._open and not self._waiting:
                    self._changed.wait()
                if not self._waiting:
                    return []
                left = self._waiting[0].job.arrived + self._limits.batch_wait / 1000
                left -= time.monotonic()
                full = sum(item.tokens for item in self._waiting) >= self._limits.batch_tokens
                if left <= 0 or full or not self._open:
                    break
                self._changed.wait(left)
            batch, rest, tokens = [], deque(), 0
            most = PASSES * self._limits.batch_tokens
            key = self._waiting[0].job.key
            for item in self._waiting:
                fits = not batch or tokens + item.tokens <= most
                if fits and item.job.key == key:
                    batch.append(item)
                    tokens += item.tokens
                else:
                    rest.append(item)
            self._waiting = rest
        return batch

    def _run(self, batch: list[_Item]) -> None:
        try:
            results = self._predict(batch[0].job.key, [item.post for item in batch])
            done = list(zip(batch, results, strict=True))
        except Exception as error:
            jobs = list(dict.fromkeys(item.job for item in batch))
            if len(jobs) == 1:
                _fail(batch, error)
                return
            # The post of one request must not fail the others.
            for job in jobs:
                self._run([item for item in batch if item.job is job])
            return
        for item, result in done:
            item.job.results[item.place] = result
            item.job.left -= 1
            if item.job.left == 0 and _wanted(item.job.future):
                item.job.future.set_result(item.job.results)


def _fail(batch: list[_Item], error: Exception) -> None:
    for job in dict.fromkeys(item.job for item in batch):
        if _wanted(job.future):
            job.future.set_exception(error)


def _wanted(future: Future) -> bool:
    """Whether it still lacks a result, and may no longer be canceled then."""
    return not future.done() and future.set_running_or_notify_cancel()
