"""What reading the data found: counts, rows set aside, warnings."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass, field
from typing import Any

SHOWN_CHARACTERS = 60
"""Characters of a bad value that a message shows."""


SHOWN_ROWS = 10
"""Set-aside rows that ``DataReport.lines`` lists one by one."""


OF_THE_ROW = "row"
"""``BadRow.reason`` of all that is no image's."""


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
    reason: str = OF_THE_ROW
    """What to count it by: row, or ``image:`` and a word or two."""

    def __str__(self) -> str:
        return f"{self.file}:{self.line}: {self.rule} Found: {shorten(self.value)}."


@dataclass(slots=True)
class DataReport:
    """Filled while data is read; ``lines`` is what a person reads."""

    posts: dict[str, dict[str, int]] = field(default_factory=dict)
    """Data set -> split -> usable posts."""
    images: dict[str, dict[str, int]] = field(default_factory=dict)
    """Data set -> split -> usable posts with an image; empty where none are read."""
    labels: dict[str, dict[str, dict[str, int]]] = field(default_factory=dict)
    """Task -> split -> label -> posts (words, for tags) that have it; a task of numbers has one
    entry, ``labelled``."""
    confidence: dict[str, float] = field(default_factory=dict)
    """Task -> mean confidence of its training labels."""
    confidence_unused: list[str] = field(default_factory=list)
    """Those of them whose ``confidence_strategy`` is none."""
    set_aside: list[BadRow] = field(default_factory=list)
    """Rows left out under ``data.on_error: skip`` or ``data.on_bad_image: skip``."""
    without_image: list[BadRow] = field(default_factory=list)
    """Rows kept without their bad image under ``data.on_bad_image: text``."""
    truncated: dict[str, tuple[int, int]] = field(default_factory=dict)
    """Split -> (posts cut to ``data.max_length``, labeled words lost by that)."""
    prompts_cut: dict[str, dict[str, tuple[int, int]]] = field(default_factory=dict)
    """Split -> task in decoder mode -> (prompts that lost part of their post, all of its
    prompts)."""
    targets_cut: dict[str, dict[str, int]] = field(default_factory=dict)
    """Split -> task of free text -> targets cut to its ``max_answer_length``."""
    notes: list[str] = field(default_factory=list)
    """What was decided on the user's behalf."""
    warnings: list[str] = field(default_factory=list)
    """What the user should look at."""

    def lines(self, *, all_in: str = "") -> list[str]:
        """The report as lines of text; ``all_in`` is the file that lists every bad row, where one is written."""
        lines = [
            f"data set {name}: "
            + ", ".join(f"{count:,} {split}" for split, count in splits.items())
            for name, splits in self.posts.items()
        ]
        lines += [
            f"images of {name}: "
            + ", ".join(f"{count:,} {split}" for split, count in splits.items())
            for name, splits in self.images.items()
        ]
        for task, splits in self.labels.items():
            for split, counts in splits.items():
                lines.append(
                    f"task {task}, {split}: "
                    + ", ".join(f"{label} {count:,}" for label, count in counts.items())
                )
        lines += [
            f"task {task}: mean confidence of the training labels {mean:.3f}"
            + (" (not used: confidence_strategy is none)" if task in self.confidence_unused else "")
            for task, mean in self.confidence.items()
        ]
        lines += [
            f"{split}: {posts:,} posts cut to data.max_length"
            + (f", {words:,} labeled words lost" if words else "")
            for split, (posts, words) in self.truncated.items()
            if posts or words
        ]
        lines += [
            f"{split}: {cut:,} of {count:,} prompts of task {task} lost part of {{text}} (data.max_length)"
            for split, counts in self.prompts_cut.items()
            for task, (cut, count) in counts.items()
        ]
        lines += [
            f"{split}: {count:,} targets cut to tasks.{task}.max_answer_length"
            for split, counts in self.targets_cut.items()
            for task, count in counts.items()
        ]
        lines += _listed("set aside", self.set_aside, all_in)
        lines += _listed("kept without their image", self.without_image, all_in)
        return lines + self.notes + [f"warning: {warning}" for warning in self.warnings]

    def rows(self) -> list[dict[str, Any]]:
        """Every bad row as plain data: file, line, reason, rule, value, and whether its post was kept."""
        return [
            {
                "file": row.file,
                "line": row.line,
                "reason": row.reason,
                "rule": row.rule,
                "value": shorten(row.value),
                "kept": kept,
            }
            for kept, rows in ((False, self.set_aside), (True, self.without_image))
            for row in rows
        ]


def _listed(what: str, rows: list[BadRow], all_in: str) -> list[str]:
    """Rows counted by file and reason, the first ones in full."""
    if not rows:
        return []
    lines = [f"{what}: {len(rows):,} row" + "s" * (len(rows) > 1)]
    lines += [f"  {file}: {count:,}" for file, count in Counter(row.file for row in rows).items()]
    reasons = Counter(row.reason for row in rows if row.reason != OF_THE_ROW)
    lines += [f"  {reason}: {count:,}" for reason, count in sorted(reasons.items())]
    lines += [f"  {row}" for row in rows[:SHOWN_ROWS]]
    where = f", all in {all_in}" if all_in else ""
    return lines + (
        [f"  and {len(rows) - SHOWN_ROWS:,} more{where}"] if len(rows) > SHOWN_ROWS else []
    )


def shorten(value: Any) -> str:
    """A value as a message shows it: quoted, on one line, cut."""
    if isinstance(value, (str, bytes)) and len(value) > SHOWN_CHARACTERS:
        return f"{value[:SHOWN_CHARACTERS]!r}... ({len(value):,} {'characters' if isinstance(value, str) else 'bytes'})"
    shown = repr(value)
    return shown if len(shown) <= 2 * SHOWN_CHARACTERS else f"{shown[: 2 * SHOWN_CHARACTERS]}..."
