"""The embeddings of a split as a picture: two principal axes, coloured by label."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
from matplotlib.figure import Figure

COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#999999", "#000000")
"""Okabe and Ito's, readers with any colour vision tell them apart."""
MAX_COLOURED = len(COLOURS)


def embedding_figure(points_NP: np.ndarray, labels: Sequence[Any], *, title: str) -> Figure:
    """Scatter plot of the two directions in which the embeddings differ most.

    Args:
        points_NP: embeddings.
        labels: per post a number (coloured along a scale), a name, or a list of names. Of many names the commonest keep
            a colour of their own and the rest shares one.
        title: what is shown.
    """
    plane_N2, kept = principal_plane(points_NP)
    figure = Figure(figsize=(5.2, 4.0), dpi=110, layout="constrained")
    panel = figure.add_subplot()
    dots = dict(s=9, alpha=0.75, linewidths=0)
    if all(isinstance(label, float | int) for label in labels):
        shown = panel.scatter(*plane_N2.T, c=np.array(labels, dtype=np.float64), cmap="cividis", **dots)
        figure.colorbar(shown, ax=panel, shrink=0.8).ax.tick_params(labelsize=7)
    else:
        names = np.array([label if isinstance(label, str) else " + ".join(label) or "none" for label in labels])
        found, counts = np.unique(names, return_counts=True)
        common = found[np.argsort(-counts, kind="stable")]
        own = common if len(common) <= MAX_COLOURED else common[: MAX_COLOURED - 1]
        for name, colour in zip(own, COLOURS, strict=False):
            panel.scatter(*plane_N2[names == name].T, color=colour, label=name, **dots)
        if len(own) < len(common):
            rest = ~np.isin(names, own)
            panel.scatter(*plane_N2[rest].T, color=COLOURS[-1], label=f"{len(common) - len(own)} others", **dots)
        panel.legend(fontsize=7, frameon=False, markerscale=1.6, loc="center left", bbox_to_anchor=(1.0, 0.5))
    panel.set_xlabel(f"first axis ({100 * kept[0]:.0f} % of the variance)", fontsize=8)
    panel.set_ylabel(f"second axis ({100 * kept[1]:.0f} %)", fontsize=8)
    panel.tick_params(labelsize=7)
    panel.spines[["top", "right"]].set_visible(False)
    figure.suptitle(title, fontsize=10)
    return figure


def principal_plane(points_NP: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Coordinates (N, 2) along the two principal axes, and the share of the variance along each.

    An axis' sign is settled by its largest entry, so pictures of one run do not flip.
    """
    centred = points_NP - points_NP.mean(axis=0)
    _, values, axes = np.linalg.svd(centred, full_matrices=False)
    values, axes = np.append(values, 0.0), np.vstack([axes, np.zeros(axes.shape[1])])
    axes = axes[:2] * np.sign(axes[:2][[0, 1], np.abs(axes[:2]).argmax(axis=1)])[:, None]
    power = values**2
    return centred @ axes.T, power[:2] / max(power.sum(), np.finfo(np.float64).tiny)
