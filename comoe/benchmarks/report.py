"""The table that a benchmark prints and the JSON that it writes."""

from __future__ import annotations

import json
import math
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any


@dataclass(frozen=True, slots=True)
class Target:
    """What a figure should be."""

    at_most: float = math.inf
    """Upper limit."""
    at_least: float = 0.0
    """Lower limit."""

    def met_by(self, value: float) -> bool:
        """Whether a figure keeps both limits."""
        return self.at_least <= value <= self.at_most

    def __str__(self) -> str:
        return f"<= {self.at_most:g}" if self.at_most < math.inf else f">= {self.at_least:g}"


@dataclass(slots=True)
class Report:
    """Figures of one benchmark."""

    title: str
    """First line."""
    targets: Mapping[str, Target]
    """Key -> target; keys without one are shown for information."""
    notes: list[str] = field(default_factory=list)
    """Lines beneath the title: machine, posts, sizes."""
    rows: list[dict[str, Any]] = field(default_factory=list)
    """key, case, value, low, high, rounds; the first row of a key with a case of "" is the key's figure."""
    seconds: list[dict[str, Any]] = field(default_factory=list)
    """case, what, seconds: the times behind the ratios."""

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
        cells = [self._cells(row) for row in self.rows]
        lines += _aligned([head, *cells])
        lines += ["", *_aligned([("milliseconds", "case", ""), *self._times()])]
        return lines

    def _cells(self, row: Mapping[str, Any]) -> tuple[str, ...]:
        target = None if row["case"] else self.targets.get(row["key"])
        verdict = "" if target is None else "met" if target.met_by(row["value"]) else "MISSED"
        quartiles = f"{row['low']:.3f} to {row['high']:.3f}"
        shown = "" if target is None else str(target)
        return row["key"], row["case"], f"{row['value']:.3f}", quartiles, str(row["rounds"]), shown, verdict

    def _times(self) -> list[tuple[str, ...]]:
        return [(row["what"], row["case"], f"{1000 * row['seconds']:.1f}") for row in self.seconds]

    def missed(self) -> list[str]:
        """Keys whose figure is not within its target."""
        figures = self.headline()
        return [key for key, target in self.targets.items() if key in figures and not target.met_by(figures[key])]

    def write(self, path: Path) -> None:
        """The figures by key, and all rows, as JSON."""
        targets = {key: str(target) for key, target in self.targets.items()}
        content = {
            **self.headline(), "title": self.title, "notes": self.notes, "targets": targets, "missed": self.missed(),
            "rows": self.rows, "seconds": self.seconds,
        }  # fmt: skip
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(json.dumps(content, indent=1) + "\n", encoding="utf-8")


def machine_note(device: str, threads: int) -> str:
    """What the figures were taken on; a load well above the ranks means that others used the machine too."""
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    load = f", load average {os.getloadavg()[0]:.1f} at the start" if hasattr(os, "getloadavg") else ""
    return f"{device}, {cores} cores, {threads} thread(s) per rank{load}"


def _aligned(table: Sequence[Sequence[str]]) -> list[str]:
    widths = [max(len(row[column]) for row in table) for column in range(len(table[0]))]
    return ["  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip() for row in table]
