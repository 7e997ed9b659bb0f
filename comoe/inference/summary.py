"""What became of the posts of an input: counts that grow window by window and survive a stop."""

from __future__ import annotations

import json
import re
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

REASONS = 50
"""Different reasons that are counted one by one; others are counted together."""


@dataclass(slots=True)
class Counts:
    """Counts of posts."""

    posts: int = 0
    """All."""
    predicted: int = 0
    """Those with a prediction of at least one task."""
    set_aside: Counter[str] = field(default_factory=Counter)
    """Reason -> posts that have an error instead."""
    first_error: str = ""
    """What the first of them says."""
    truncated: int = 0
    """Those that were cut to the model's length."""
    windows: int = 0
    """Those that were read in several windows."""
    deduplicated: int = 0
    """Those that have the prediction of an earlier post with the same text."""
    without_image: int = 0
    """Those that were predicted without their bad image."""
    filled: int = 0
    """Lines without a text that were predicted as a lone user name (tweeteval)."""
    labels: dict[str, Counter[str]] = field(default_factory=dict)
    """Task -> label -> posts that have it; of tags the spans of each type."""

    @classmethod
    def from_json(cls, text: str) -> Counts:
        """What ``to_json`` gave."""
        found = json.loads(text)
        labels = {task: Counter(labels) for task, labels in found.pop("labels", {}).items()}
        return cls(set_aside=Counter(found.pop("set_aside", {})), labels=labels, **found)

    def to_json(self) -> str:
        """All counts, to be kept beside an unfinished output."""
        return json.dumps({name: getattr(self, name) for name in self.__slots__})

    def add(self, prediction: Mapping[str, Any], tasks: Sequence[str]) -> None:
        """Count one post with its prediction."""
        self.posts += 1
        if error := prediction.get("error"):
            self.first_error = self.first_error or error
            # Without the number of the line, up to the first detail.
            reason = re.split(r" \(|[;:]|\. ", re.sub(r"^line \d+ ", "", error))[0].rstrip(".")
            full = reason not in self.set_aside and len(self.set_aside) >= REASONS
            self.set_aside["other" if full else reason] += 1
        self.truncated += "truncated" in prediction
        self.windows += "windows" in prediction
        self.without_image += "image_error" in prediction
        found = [task for task in tasks if task in prediction]
        self.predicted += bool(found)
        for task in found:
            self.labels.setdefault(task, Counter()).update(labels_of(prediction[task]))


def labels_of(prediction: Mapping[str, Any]) -> list[str]:
    """The labels that a prediction of one task gives; of tags the type of each span."""
    if "label" in prediction:
        return [prediction["label"]]
    return prediction.get("labels") or [span["type"] for span in prediction.get("spans", ())]


@dataclass(frozen=True, slots=True)
class Summary:
    """What a run of ``comoe predict`` did."""

    counts: Counts
    """Counts of posts, of an earlier run that was resumed too."""
    source: str
    """The input."""
    target: str
    """The output."""
    model: Mapping[str, str]
    """Folder, digest, device, backend and precision of the model."""
    seconds: float
    """Time of this run, from its first post to its last."""
    kept: tuple[str, ...] = ()
    """Columns of the input that were copied."""
    resumed_at: int = 0
    """Posts that an earlier run had predicted."""
    note: str = ""
    """What the format of the output adds about the posts that were set aside."""

    @property
    def posts_per_second(self) -> float:
        """Posts of this run over its time."""
        return (self.counts.posts - self.resumed_at) / max(self.seconds, 1e-9)

    def __str__(self) -> str:
        counts = self.counts
        if not counts.posts:
            return f"{self.source} has no posts; {self.target} has no predictions"
        done = f"{counts.posts} posts predicted in {self.target}{self.note}"
        if counts.without_image:
            done += f"; {counts.without_image} of them without their bad image (image_error)"
        if counts.truncated:
            done += f"; {counts.truncated} of them cut to the model's length (truncated)"
        if counts.windows:
            done += f"; {counts.windows} of them read in several windows"
        if counts.deduplicated:
            done += f"; {counts.deduplicated} of them as an earlier post with the same text"
        return done

    def record(self) -> dict[str, Any]:
        """Everything as plain data, as ``--json-summary`` writes it."""
        counts = {name: getattr(self.counts, name) for name in self.counts.__slots__}
        return {
            "input": self.source,
            "output": self.target,
            **counts,
            "seconds": round(self.seconds, 3),
            "posts_per_second": round(self.posts_per_second, 1),
            "resumed_at": self.resumed_at,
            "model": dict(self.model),
        }
