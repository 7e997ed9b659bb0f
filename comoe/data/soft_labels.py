"""Soft labels of posts: what a model, or several annotators, say of each label instead of one right label."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np


@dataclass(frozen=True, slots=True)
class SoftLabels:
    """The soft labels of N posts for one task, in flat arrays; post i has rows ``offsets[i]`` to ``offsets[i + 1]``.

    A post has no row (nothing is known of it), one, or, where the task labels words, one per word
    from the first on.
    """

    values_RY: np.ndarray
    """Probability of each label, or the one number of a regression task, float32."""
    offsets: np.ndarray
    """First row of each post, int64, shape (N + 1,)."""

    def __len__(self) -> int:
        return len(self.offsets) - 1

    @classmethod
    def from_rows(cls, rows: Sequence[np.ndarray | None], *, width: int) -> SoftLabels:
        """Of posts that each have rows (words, Y) or None."""
        counts = [0 if row is None else len(row) for row in rows]
        nothing = np.zeros((0, width), dtype=np.float32)
        values = np.concatenate([nothing, *(row for row in rows if row is not None)])
        offsets = np.concatenate(([0], np.cumsum(counts, dtype=np.int64)))
        return cls(values.astype(np.float32), offsets.astype(np.int64))

    @classmethod
    def join(cls, parts: Sequence[SoftLabels]) -> SoftLabels:
        """All posts of several parts, in their order."""
        counts = np.concatenate([np.diff(part.offsets) for part in parts])
        offsets = np.concatenate(([0], np.cumsum(counts, dtype=np.int64)))
        return cls(np.concatenate([part.values_RY for part in parts]), offsets)

    def take(self, posts: np.ndarray) -> SoftLabels:
        """The posts of these numbers, in this order."""
        counts = np.diff(self.offsets)[posts]
        offsets = np.concatenate(([0], np.cumsum(counts, dtype=np.int64)))
        # Row r of post i here is row r - offsets[i] behind its first row there.
        rows = np.arange(offsets[-1]) + np.repeat(self.offsets[:-1][posts] - offsets[:-1], counts)
        return SoftLabels(self.values_RY[rows], offsets)

    def has(self, post: int) -> bool:
        """Whether a post has a soft label."""
        return bool(self.offsets[post + 1] > self.offsets[post])

    @property
    def present(self) -> np.ndarray:
        """Whether each post has one, bool, shape (N,)."""
        return np.diff(self.offsets) > 0

    def rows(self, post: int) -> np.ndarray | None:
        """The rows of one post, None without any."""
        first, end = self.offsets[post], self.offsets[post + 1]
        return self.values_RY[first:end] if end > first else None

    def permuted(self, columns: Sequence[int]) -> SoftLabels:
        """The same with its columns in this order."""
        return SoftLabels(self.values_RY[:, list(columns)], self.offsets)


def mean_of(parts: Sequence[SoftLabels]) -> SoftLabels:
    """The mean over the teachers that know a post; of words only those that all of these have seen.

    Args:
        parts: of the same posts and labels.
    """
    if len(parts) == 1:
        return parts[0]
    rows: list[np.ndarray | None] = []
    for post in range(len(parts[0])):
        found = [row for part in parts if (row := part.rows(post)) is not None]
        shortest = min(map(len, found), default=0)
        rows.append(
            np.mean([row[:shortest] for row in found], axis=0, dtype=np.float64) if found else None
        )
    return SoftLabels.from_rows(rows, width=parts[0].values_RY.shape[1])


def preferred(own: SoftLabels, other: SoftLabels) -> SoftLabels:
    """``own`` where a post has it, else ``other``."""
    both = SoftLabels.join([own, other])
    numbers = np.arange(len(own))
    return both.take(np.where(own.present, numbers, numbers + len(own)))
