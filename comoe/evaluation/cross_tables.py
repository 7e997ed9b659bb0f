"""What two tasks say of each other: counts of their labels on the same posts, conditional shares, Cramer's V."""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
from scipy.stats import chi2_contingency

from comoe.evaluation.prevalence import effective

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
    """Posts, or the sum of their weights, with both labels, float64."""
    posts: int
    """Posts that have both labels."""
    worth: float
    """Equally weighted posts that tell as much (``effective``); unweighted ``posts``."""

    @property
    def share_RC(self) -> np.ndarray:
        """Share of the columns' labels within each row."""
        return self.counts_RC / self.counts_RC.sum(1, keepdims=True)

    @property
    def turned(self) -> CrossTable:
        """Rows and columns exchanged."""
        return replace(
            self, rows=self.columns, columns=self.rows, row_labels=self.column_labels,
            column_labels=self.row_labels, counts_RC=self.counts_RC.T,
        )  # fmt: skip

    @property
    def corrected_v(self) -> float:
        """Cramer's V without the bias of few posts, of which there are ``worth``."""
        return cramers_v(self.counts_RC * self.worth / self.counts_RC.sum(), corrected=True)

    def to_dict(self) -> dict[str, Any]:
        """Plain numbers; ``counts`` has the sum of each row: posts, or their weights."""
        return {
            "rows": self.rows, "columns": self.columns,
            "row_labels": list(self.row_labels), "column_labels": list(self.column_labels),
            "share": self.share_RC.tolist(), "counts": self.counts_RC.sum(1).tolist(),
            "posts": self.posts, "effective_posts": self.worth,
            "cramers_v": cramers_v(self.counts_RC), "cramers_v_corrected": self.corrected_v,
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
    for (first, row_labels, row_B), (second, column_labels, column_B), both_N in _pairs(choices):
        weights_B = np.ones(both_N.sum()) if weights_N is None else weights_N[both_N]
        counts_RC = np.zeros((len(row_labels), len(column_labels)))
        np.add.at(counts_RC, (row_B, column_B), weights_B)
        rows, columns = (counts_RC.sum(axis) > 0 for axis in (1, 0))
        if rows.sum() < 2 or columns.sum() < 2:
            continue
        yield CrossTable(
            first,
            second,
            tuple(itertools.compress(row_labels, rows)),
            tuple(itertools.compress(column_labels, columns)),
            counts_RC[rows][:, columns],
            len(row_B),
            effective(weights_B),
        )


def without_table(choices: Mapping[str, Choice]) -> Iterator[str]:
    """A sentence for each pair of tasks that ``cross_tables`` leaves out where all weights are above 0."""
    for *tasks, both_N in _pairs(choices):
        names = " and ".join(name for name, _, _ in tasks)
        if not both_N.any():
            yield f"{names}: no post has both."
        elif constant := [
            f"all posts have {labels[ids_B[0]]} as {name}"
            for name, labels, ids_B in tasks
            if (ids_B == ids_B[0]).all()
        ]:
            yield f"{names}: {' and '.join(constant)}."


def _pairs(choices: Mapping[str, Choice]) -> Iterator[tuple[Any, Any, np.ndarray]]:
    """Of each two tasks (name, labels, label ids of the posts that have both), and which posts these are."""
    for pair in itertools.combinations(choices.items(), 2):
        both_N = np.logical_and(*(ids_N >= 0 for _, (_, ids_N) in pair))
        first, second = ((name, labels, ids_N[both_N]) for name, (labels, ids_N) in pair)
        yield first, second, both_N


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
