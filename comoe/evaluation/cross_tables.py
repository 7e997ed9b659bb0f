"""What two tasks say of each other: counts of their labels on the same posts, conditional shares, Cramer's V."""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from scipy.stats import chi2_contingency

Choice = tuple[Sequence[str], np.ndarray]
"""Labels of a task, and the label id of each of N posts, int, (N,); -1 for a post without one."""


@dataclass(frozen=True, slots=True)
class CrossTable:
    """Two tasks with one label per post; labels without a post are left out."""

    rows: str
    columns: str
    row_labels: tuple[str, ...]
    column_labels: tuple[str, ...]
    counts_RC: np.ndarray
    """Posts, or their weights, with both labels, float64."""

    @property
    def share_RC(self) -> np.ndarray:
        """Share of the columns' labels within each row."""
        return self.counts_RC / self.counts_RC.sum(1, keepdims=True)

    @property
    def turned(self) -> CrossTable:
        """Rows and columns exchanged."""
        return CrossTable(
            self.columns, self.rows, self.column_labels, self.row_labels, self.counts_RC.T
        )

    def to_dict(self) -> dict[str, Any]:
        """Plain numbers; ``counts`` has the sum of each row."""
        return {
            "rows": self.rows, "columns": self.columns,
            "row_labels": list(self.row_labels), "column_labels": list(self.column_labels),
            "share": self.share_RC.tolist(), "counts": self.counts_RC.sum(1).tolist(),
            "cramers_v": cramers_v(self.counts_RC),
            "cramers_v_corrected": cramers_v(self.counts_RC, corrected=True),
        }  # fmt: skip

    def cells(self) -> Iterator[dict[str, Any]]:
        """A flat row per pair of labels."""
        within_columns = self.turned.share_RC.T
        for row, column in np.ndindex(self.counts_RC.shape):
            yield {
                "rows": self.rows, "columns": self.columns,
                "row_label": self.row_labels[row], "column_label": self.column_labels[column],
                "count": float(self.counts_RC[row, column]),
                "share_of_row": float(self.share_RC[row, column]),
                "share_of_column": float(within_columns[row, column]),
            }  # fmt: skip


def cross_tables(
    choices: Mapping[str, Choice], weights_N: np.ndarray | None = None
) -> Iterator[CrossTable]:
    """The table of each pair of tasks of which either has two labels or more among the posts that have both.

    Args:
        choices: task -> its labels on the same N posts.
        weights_N: of the posts; None is 1 for each.
    """
    for (first, (row_labels, row_N)), (second, (column_labels, column_N)) in itertools.combinations(
        choices.items(), 2
    ):
        both = (row_N >= 0) & (column_N >= 0)
        weights = np.ones(both.sum()) if weights_N is None else weights_N[both]
        counts_RC = np.zeros((len(row_labels), len(column_labels)))
        np.add.at(counts_RC, (row_N[both], column_N[both]), weights)
        rows, columns = (counts_RC.sum(axis) > 0 for axis in (1, 0))
        if rows.sum() < 2 or columns.sum() < 2:
            continue
        yield CrossTable(
            first,
            second,
            tuple(itertools.compress(row_labels, rows)),
            tuple(itertools.compress(column_labels, columns)),
            counts_RC[rows][:, columns],
        )


def cramers_v(counts_RC: np.ndarray, *, corrected: bool = False) -> float:
    """Association of rows and columns: 0 where they are independent, 1 where one tells the other.

    sqrt(phi^2 / (min(R, C) - 1)) with phi^2 = chi^2 / n. Independent labels of few posts have a V above 0;
    corrected, phi^2, R and C are replaced by estimates without that bias, and V may be 0.

    Args:
        counts_RC: two rows and two columns or more, none of them empty; for the correction real counts of posts.
        corrected: see above.

    Source: Cramer 1946; the correction is Bergsma 2013, doi:10.1016/j.jkss.2012.10.002.
    """
    n, (rows, columns) = float(counts_RC.sum()), counts_RC.shape
    phi2 = float(chi2_contingency(counts_RC, correction=False).statistic) / n
    if corrected:
        if n <= 1:
            return 0.0
        phi2 = max(0.0, phi2 - (rows - 1) * (columns - 1) / (n - 1))
        rows, columns = (size - (size - 1) ** 2 / (n - 1) for size in (rows, columns))
    least = min(rows, columns) - 1
    return float(np.sqrt(phi2 / least)) if least > 0 else 0.0
