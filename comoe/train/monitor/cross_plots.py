"""Heatmaps of cross-tables: what the label of one task says of the label of another."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from comoe.evaluation.cross_tables import CrossTable
from comoe.train.monitor.plots import INK, MAX_NAMED_CLASSES, new_figure


def cross_panel(
    panel: Axes, share_RC: np.ndarray, *, rows: Sequence[str], columns: Sequence[str]
) -> None:
    """Shares, each row of which sums to 1, in percent."""
    panel.imshow(100 * share_RC, cmap="Blues", vmin=0, vmax=100, aspect="auto")
    for row, column in np.ndindex(share_RC.shape):
        share = share_RC[row, column]
        panel.text(
            column,
            row,
            "" if np.isnan(share) else f"{100 * share:.0f}",
            ha="center",
            va="center",
            fontsize=8,
            color="white" if share > 0.55 else INK,
        )
    panel.set_xticks(range(len(columns)), columns, rotation=35, ha="right")
    panel.set_yticks(range(len(rows)), rows)
    panel.tick_params(length=0)


def cross_tables_figure(tables: Mapping[str, CrossTable], *, title: str) -> Figure | None:
    """Tables of one pair of tasks side by side; None where there are too many labels to read.

    Args:
        tables: what the labels are (gold, predicted) -> table.
        title: of the figure.
    """
    shapes = [table.counts_RC.shape for table in tables.values()]
    most_rows, columns = (max(sizes) for sizes in zip(*shapes, strict=True))
    if max(most_rows, columns) > MAX_NAMED_CLASSES:
        return None
    figure = new_figure((2.1 + 0.5 * columns) * len(tables), 1.9 + 0.32 * most_rows)
    for panel, (name, table) in zip(
        figure.subplots(1, len(tables), squeeze=False)[0], tables.items(), strict=True
    ):
        counts = table.counts_RC.sum(1)
        rows = [f"{name} ({n:,.0f})" for name, n in zip(table.row_labels, counts, strict=True)]
        names = {"rows": rows, "columns": table.column_labels}
        cross_panel(panel, table.share_RC, **names)
        panel.tick_params(labelsize=7)
        panel.set_ylabel(table.rows, fontsize=8)
        panel.set_xlabel(table.columns, fontsize=8)
        panel.set_title(
            f"{name}: {table.posts:,} posts, corrected V = {table.corrected_v:.2f}", fontsize=8
        )
    figure.suptitle(title, fontsize=10)
    return figure
