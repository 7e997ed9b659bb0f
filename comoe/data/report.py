"""What reading the data found: counts, rows set aside, warnings."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass, field
from typing import Any

SHOWN_CHARACTERS = 60
"""Characters of a bad value that a message shows."""
SHOWN_ROWS = 10
"""Set-aside rows that ``DataReport.lines`` lists one by one."""


@dataclass(frozen=True, slots=True)
class BadRow:
    """A row that cannot be used, and why."""

    file: str
    """The file, or ``name (split)`` on the hub."""
    line: int
    """Line from 1; the number of the row where a format has no lines."""
    value: Any
    """What was found there."""
    rule: str
    """What is wrong, in words."""

    def __str__(self) -> str:
        return f"{self.file}:{self.line}: {self.rule} Found: {shorten(self.value)}"


@dataclass(slots=True)
class DataReport:
    """Filled while data is read; ``lines`` is what a person reads."""

    posts: dict[str, dict[str, int]] = field(default_factory=dict)
    """Data set -> split -> usable posts."""
    labels: dict[str, dict[str, dict[str, int]]] = field(default_factory=dict)
    """Task -> split -> label -> posts (words, for tags) that have it; a task of numbers has one entry, ``labelled``."""
    confidence: dict[str, float] = field(default_factory=dict)
    """Task -> mean confidence of its training labels."""
    set_aside: list[BadRow] = field(default_factory=list)
    """Rows left out under ``data.on_error: skip``."""
    truncated: dict[str, tuple[int, int]] = field(default_factory=dict)
    """Split -> (posts cut to ``data.max_length``, labelled words lost by that)."""
    notes: list[str] = field(default_factory=list)
    """What was decided on the user's behalf."""
    warnings: list[str] = field(default_factory=list)
    """What the user should look at."""

    def lines(self) -> list[str]:
        """The report as lines of text."""
        lines = [
            f"data set {name}: " + ", ".join(f"{count:,} {split}" for split, count in splits.items())
            for name, splits in self.posts.items()
        ]
        for task, splits in self.labels.items():
            for split, counts in splits.items():
                lines.append(
                    f"task {task}, {split}: " + ", ".join(f"{label} {count:,}" for label, count in counts.items())
                )
        lines += [
            f"task {task}: mean confidence of the training labels {mean:.3f}" for task, mean in self.confidence.items()
        ]
        lines += [
            f"{split}: {posts:,} posts cut to data.max_length" + (f", {words:,} labelled words lost" if words else "")
            for split, (posts, words) in self.truncated.items()
            if posts or words
        ]
        if self.set_aside:
            lines.append(f"set aside: {len(self.set_aside):,} rows")
            lines += [f"  {file}: {count:,}" for file, count in Counter(row.file for row in self.set_aside).items()]
            lines += [f"  {row}" for row in self.set_aside[:SHOWN_ROWS]]
            if len(self.set_aside) > SHOWN_ROWS:
                lines.append(f"  and {len(self.set_aside) - SHOWN_ROWS:,} more")
        return lines + self.notes + [f"warning: {warning}" for warning in self.warnings]


def shorten(value: Any) -> str:
    """A value as a message shows it: quoted, on one line, cut."""
    if isinstance(value, (str, bytes)) and len(value) > SHOWN_CHARACTERS:
        return f"{value[:SHOWN_CHARACTERS]!r}... ({len(value):,} {'characters' if isinstance(value, str) else 'bytes'})"
    shown = repr(value)
    return shown if len(shown) <= 2 * SHOWN_CHARACTERS else f"{shown[: 2 * SHOWN_CHARACTERS]}..."
