"""Threads that share a model take turns."""

from __future__ import annotations

import functools
import threading
from collections.abc import Callable
from typing import Any, Concatenate, ParamSpec, Protocol, TypeVar

Given = ParamSpec("Given")
Result = TypeVar("Result")


class Turns:
    """A lock that its own thread may take again; a pickled or copied one is free."""

    def __init__(self) -> None:
        self._lock = threading.RLock()

    def __enter__(self) -> None:
        self._lock.acquire()

    def __exit__(self, *error: object) -> None:
        self._lock.release()

    def __reduce__(self) -> tuple[Any, ...]:
        return Turns, ()


class Shared(Protocol):
    """What several threads may use."""

    @property
    def turns(self) -> Turns:
        """Taken while it computes."""


Owner = TypeVar("Owner", bound=Shared)


def in_turn(
    method: Callable[Concatenate[Owner, Given], Result],
) -> Callable[Concatenate[Owner, Given], Result]:
    """The method of an object, run by one thread at a time."""

    @functools.wraps(method)
    def run(self: Owner, *args: Given.args, **options: Given.kwargs) -> Result:
        with self.turns:
            return method(self, *args, **options)

    return run
