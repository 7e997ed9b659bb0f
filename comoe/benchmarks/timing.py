"""Interleaved timing of several contestants, their ratios with quartiles, and the table and JSON of a benchmark."""

from __future__ import annotations

import json
import math
import os
import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from tqdm import tqdm

from comoe.config.files import write_atomic
from comoe.distributed import all_gather_objects, barrier, is_main
from comoe.evaluation.tables import in_columns


@dataclass(frozen=True, slots=True)
class Target:
    """Limits of a figure."""

    at_most: float = math.inf
    at_least: float = 0.0

    def met_by(self, value: float) -> bool:
        """Whether a figure is within both limits."""
        return self.at_least <= value <= self.at_most

    def __str__(self) -> str:
        return f"<= {self.at_most:g}" if self.at_most < math.inf else f">= {self.at_least:g}"


@dataclass(slots=True)
class Measurements:
    """Figures of one benchmark."""

    title: str
    targets: Mapping[str, Target]
    """Key -> target; keys without one are informative."""
    notes: list[str] = field(default_factory=list)
    """Lines below the title: machine, posts, sizes."""
    rows: list[dict[str, Any]] = field(default_factory=list)
    """key, case, value, low, high, rounds; the first row of a key with a case of "" is the key's
    figure."""
    seconds: list[dict[str, Any]] = field(default_factory=list)
    """case, what, seconds: the times of the ratios."""

    def add(self, key: str, ratio: Mapping[str, Any], *, case: str = "") -> None:
        """One ratio: ``value``, ``low``, ``high``, ``rounds``."""
        self.rows.append({"key": key, "case": case, **ratio})

    def add_time(self, what: str, seconds: float, *, case: str = "") -> None:
        """One median time."""
        self.seconds.append({"what": what, "case": case, "seconds": seconds})

    def headline(self) -> dict[str, float]:
        """Key -> its figure."""
        return {row["key"]: row["value"] for row in self.rows if not row["case"]}

    def lines(self) -> list[str]:
        """The table."""
        lines = [self.title, *(f"  {note}" for note in self.notes), ""]
        head = ("ratio", "case", "median", "quartiles", "rounds", "target", "")
        lines += in_columns(head, [self._cells(row) for row in self.rows], left=len(head))
        times = [(one["what"], one["case"], f"{1000 * one['seconds']:.1f}") for one in self.seconds]
        return [*lines, "", *in_columns(("milliseconds", "case", ""), times, left=3)]

    def _cells(self, row: Mapping[str, Any]) -> tuple[str, ...]:
        target = None if row["case"] else self.targets.get(row["key"])
        verdict = "" if target is None else "met" if target.met_by(row["value"]) else "MISSED"
        quartiles = f"{row['low']:.3f} to {row['high']:.3f}"
        shown = "" if target is None else str(target)
        value, rounds = f"{row['value']:.3f}", str(row["rounds"])
        return (row["key"], row["case"], value, quartiles, rounds, shown, verdict)

    def missed(self) -> list[str]:
        """Keys whose figure is not within its target."""
        figures = self.headline()
        return [
            key
            for key, target in self.targets.items()
            if key in figures and not target.met_by(figures[key])
        ]

    def publish(self, path: Path | None) -> None:
        """Print the table, and write the figures by key, and all rows, to a JSON file."""
        print("\n".join(self.lines()))
        if path is None:
            return
        targets = {key: str(target) for key, target in self.targets.items()}
        content = {
            **self.headline(), "title": self.title, "notes": self.notes, "targets": targets, "missed": self.missed(),
            "rows": self.rows, "seconds": self.seconds,
        }  # fmt: skip
        path.parent.mkdir(parents=True, exist_ok=True)
        write_atomic(path, json.dumps(content, indent=1) + "\n")


def machine_note(device: str, threads: int) -> str:
    """Description of the machine; a load well above the number of ranks means that it was busy."""
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    note = f"{device}, {cores} cores, {threads} thread(s) per rank"
    if hasattr(os, "getloadavg"):
        note += f", load average {os.getloadavg()[0]:.1f} at the start"
    return note


@dataclass(frozen=True, slots=True)
class Contestant:
    """A timed function."""

    run: Callable[[], None]
    """One repetition, always the same work."""
    every: int = 1
    """Takes part in every n-th round only, for slow contestants."""


@dataclass(frozen=True, slots=True)
class Ratio:
    """Ratio of two times over the rounds with both: median, first and third quartile."""

    value: float
    low: float
    high: float
    rounds: int


Times = Mapping[str, Sequence[float | None]]
"""Contestant -> seconds per round; None for rounds without it."""


def take_turns(
    contestants: Mapping[str, Contestant],
    *,
    rounds: int,
    warmup: int = 2,
    device: torch.device | None = None,
) -> dict[str, list[float | None]]:
    """Time all contestants round by round, so that a slow phase of the machine affects all of them.

    The first contestant rotates. Every rank must call it with the same names; the time of a round
    is that of the slowest rank.

    Args:
        contestants: name -> what to time.
        rounds: timed rounds.
        warmup: runs of each contestant before the first round.
        device: a GPU is synchronized before reading the clock.

    Returns:
        Name -> seconds per round, None for rounds without it; the same on all ranks.
    """
    names = list(contestants)
    for name in names:
        for _ in range(warmup if contestants[name].every == 1 else 1):
            contestants[name].run()
    times: dict[str, list[float | None]] = {name: [None] * rounds for name in names}
    for number in tqdm(range(rounds), unit="round", leave=False, disable=not is_main()):
        start = number % len(names)
        for name in names[start:] + names[:start]:
            if number % contestants[name].every == 0:
                barrier()
                times[name][number] = clocked(contestants[name].run, device)
    return slowest(all_gather_objects(times))


def clocked(run: Callable[[], None], device: torch.device | None = None) -> float:
    """Wall-clock seconds of one call, including the GPU's work."""
    wait_for(device)
    start = time.perf_counter()
    run()
    wait_for(device)
    return time.perf_counter() - start


def wait_for(device: torch.device | None) -> None:
    """Synchronize a GPU; does nothing on a CPU."""
    if device is not None and device.type == "cuda":
        torch.cuda.synchronize(device)


def slowest(ranks: Sequence[Times]) -> dict[str, list[float | None]]:
    """The longest time of all ranks, per contestant and round."""
    return {
        name: [
            None if values[0] is None else max(values)
            for values in zip(*(rank[name] for rank in ranks), strict=True)
        ]
        for name in ranks[0]
    }


def ratio(times: Times, above: str, below: str) -> Ratio:
    """Time of ``above`` over time of ``below``, per round, so that slow phases of the machine cancel."""
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
