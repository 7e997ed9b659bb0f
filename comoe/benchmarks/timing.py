"""Times of several contestants, taken in turns, and the ratios of such times with their spread."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import torch

from comoe.distributed import all_gather_objects, barrier


@dataclass(frozen=True, slots=True)
class Contestant:
    """Something to be timed."""

    run: Callable[[], None]
    """One repetition, the same work each time."""
    every: int = 1
    """Takes part in every n-th round only: the slow ones would eat the time of the others."""


@dataclass(frozen=True, slots=True)
class Ratio:
    """How often one time holds another, over the rounds in which both were taken."""

    value: float
    """Median over rounds of (time above) / (time below)."""
    low: float
    """First quartile."""
    high: float
    """Third quartile."""
    rounds: int
    """Rounds that it rests on."""


Times = Mapping[str, Sequence[float | None]]
"""Contestant -> seconds per round; None where it did not take part."""


def take_turns(
    contestants: Mapping[str, Contestant], *, rounds: int, warmup: int = 2, device: torch.device | None = None
) -> dict[str, list[float | None]]:
    """Time all contestants round by round, so that whatever slows the machine down for a while slows all of them.

    Each round begins with the next contestant in turn. Every rank must call it with the same names; the time of a
    round is that of the slowest rank, which the others wait for.

    Args:
        contestants: name -> what to time.
        rounds: timed rounds; a contestant with ``every`` above 1 takes part in the first one and each n-th after it.
        warmup: runs of each contestant before the first round.
        device: a GPU is waited for before the clock is read.

    Returns:
        Name -> seconds per round, None where it did not take part; the same on all ranks.
    """
    names = list(contestants)
    for name in names:
        for _ in range(warmup if contestants[name].every == 1 else 1):
            contestants[name].run()
    times: dict[str, list[float | None]] = {name: [None] * rounds for name in names}
    for number in range(rounds):
        start = number % len(names)
        for name in names[start:] + names[:start]:
            if number % contestants[name].every == 0:
                barrier()
                times[name][number] = clocked(contestants[name].run, device)
    return slowest(all_gather_objects(times))


def clocked(run: Callable[[], None], device: torch.device | None = None) -> float:
    """Wall-clock seconds of one call, the GPU's work included."""
    wait_for(device)
    began = time.perf_counter()
    run()
    wait_for(device)
    return time.perf_counter() - began


def wait_for(device: torch.device | None) -> None:
    """Wait until a GPU has done what it was given; nothing to do on a CPU."""
    if device is not None and device.type == "cuda":
        torch.cuda.synchronize(device)


def slowest(ranks: Sequence[Times]) -> dict[str, list[float | None]]:
    """The longest time of all ranks, per contestant and round."""
    return {
        name: [
            None if values[0] is None else max(values) for values in zip(*(rank[name] for rank in ranks), strict=True)
        ]
        for name in ranks[0]
    }


def ratio(times: Times, above: str, below: str) -> Ratio:
    """Time of ``above`` over time of ``below``: each round gives one ratio, so a slow minute of the machine cancels."""
    pairs = zip(times[above], times[below], strict=True)
    return spread_of([a / b for a, b in pairs if a is not None and b is not None])


def spread_of(values: Sequence[float]) -> Ratio:
    """Median and quartiles; of a single value, the value."""
    if len(values) == 1:
        return Ratio(values[0], values[0], values[0], 1)
    low, middle, high = statistics.quantiles(values, n=4, method="inclusive")
    return Ratio(middle, low, high, len(values))


def median(times: Times, name: str) -> float:
    """Median seconds of one contestant."""
    return statistics.median(value for value in times[name] if value is not None)
