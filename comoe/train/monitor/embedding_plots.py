"""Pictures of embeddings: each task on its two principal axes, and all tasks in one space, by t-SNE too."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from comoe.evaluation.embedding_stats import TaskEmbeddings
from comoe.train.monitor.plots import COLORS, GRID, new_figure, panel_grid, short

MOST_MAPPED = 2000
"""Posts of all tasks together on a map: t-SNE takes up to half a minute on one core for so many."""

PERPLEXITY = 30.0
"""Neighbors of a post that t-SNE looks at; fewer of few posts."""


def embedding_figure(points_NP: np.ndarray, labels: Sequence[Any], *, title: str) -> Figure:
    """Scatter plot of the two directions in which the embeddings differ most.

    Args:
        points_NP: embeddings.
        labels: per post a number (colored along a scale), a name, or a list of names. Of many
            names the commonest keep a color of their own and the rest shares one.
        title: what is shown.
    """
    plane_N2, kept = principal_plane(points_NP)
    figure = new_figure(5.2, 4.0)
    panel = figure.add_subplot()
    _scatter(panel, plane_N2, labels)
    panel.set_xlabel(f"first axis ({100 * kept[0]:.0f} % of the variance)", fontsize=8)
    panel.set_ylabel(f"second axis ({100 * kept[1]:.0f} %)", fontsize=8)
    panel.tick_params(labelsize=7)
    panel.spines[["top", "right"]].set_visible(False)
    figure.suptitle(title, fontsize=10)
    return figure


def principal_plane(points_NP: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Coordinates (N, 2) along the two principal axes, and the share of the variance along each.

    An axis' sign is settled by its largest entry, so images of one run do not flip.
    """
    centred = points_NP - points_NP.mean(axis=0)
    _, values, axes = np.linalg.svd(centred, full_matrices=False)
    values, axes = np.append(values, 0.0), np.vstack([axes, np.zeros(axes.shape[1])])
    axes = axes[:2] * np.sign(axes[:2][[0, 1], np.abs(axes[:2]).argmax(axis=1)])[:, None]
    power = values**2
    return centred @ axes.T, power[:2] / max(power.sum(), np.finfo(np.float64).tiny)


def map_figure(
    tasks: Mapping[str, TaskEmbeddings], *, how: str, title: str, seed: int = 0
) -> Figure | None:
    """All tasks in the one space of their embeddings: a panel colored by task, and one per task colored by label.

    The panels have the same places; the posts of other tasks are gray there. None with fewer than
    three posts.

    Args:
        tasks: task -> its embeddings. Of more than ``MOST_MAPPED`` posts every n-th one is drawn.
        how: ``run.embedding_plot``, a key of ``LAYOUTS``.
        title: what is shown.
        seed: of a layout that draws.
    """
    total = sum(len(one.points) for one in tasks.values())
    if total < 3:
        return None
    step = -(-total // MOST_MAPPED)
    parts = {name: (one.points[::step], one.labels[::step]) for name, one in tasks.items()}
    owners = [name for name, (points, _) in parts.items() for _ in points]
    places_N2, axes = LAYOUTS[how](np.concatenate([points for points, _ in parts.values()]), seed)
    # Which posts a panel colors, by what, and its title.
    owners_N, shown = np.array(owners), []
    if len(parts) > 1:
        shown.append((np.full(len(owners), True), owners, "all tasks"))
    shown += [(owners_N == name, labels, name) for name, (_, labels) in parts.items()]
    size = {"size": (4.3, 3.1), "sharex": True, "sharey": True}
    figure, panels = panel_grid(len(shown), title=f"{title}, {NAMES[how]}", **size)
    for panel, (own_N, labels, name) in zip(panels, shown, strict=True):
        panel.scatter(*places_N2[~own_N].T, color=GRID, s=6, linewidths=0)
        _scatter(panel, places_N2[own_N], labels)
        panel.set_title(short(name), fontsize=9)
        panel.set_xlabel(axes[0], fontsize=7)
        panel.set_ylabel(axes[1], fontsize=7)
        if not axes[0]:
            # Distances between clusters, and places, mean nothing in t-SNE.
            panel.set_xticks([])
            panel.set_yticks([])
    return figure


def _principal(points_NP: np.ndarray, seed: int) -> tuple[np.ndarray, tuple[str, str]]:
    plane_N2, kept = principal_plane(points_NP)
    first, second = (f"{100 * share:.0f} % of the variance" for share in kept)
    return plane_N2, (first, second)


def _tsne(points_NP: np.ndarray, seed: int) -> tuple[np.ndarray, tuple[str, str]]:
    """Source: van der Maaten & Hinton 2008, by scikit-learn, begun at the principal axes."""
    from sklearn.manifold import TSNE  # takes a second, which only a run that asks for it waits

    perplexity = min(PERPLEXITY, (len(points_NP) - 1) / 3)
    # Points that are all alike have no axes to begin at.
    varied = min(points_NP.shape) > 1 and np.ptp(points_NP, axis=0).max() > 0
    init = "pca" if varied else "random"
    layout = TSNE(perplexity=perplexity, init=init, random_state=seed)
    return layout.fit_transform(points_NP.astype(np.float32)), ("", "")


LAYOUTS = {"pca": _principal, "tsne": _tsne}
"""``run.embedding_plot`` -> (points, seed) -> places (N, 2), and what the axes are."""

NAMES = {"pca": "principal axes", "tsne": "t-SNE"}
"""The same -> its name in a title."""


def _scatter(panel: Axes, places_N2: np.ndarray, labels: Sequence[Any]) -> None:
    """The posts, colored along a scale where labels are numbers, else by name, with a legend."""
    dots = dict(s=9, alpha=0.75, linewidths=0)
    if all(isinstance(label, float | int) for label in labels):
        shown = panel.scatter(
            *places_N2.T, c=np.array(labels, dtype=np.float64), cmap="cividis", **dots
        )
        panel.figure.colorbar(shown, ax=panel, shrink=0.8).ax.tick_params(labelsize=7)
    else:
        names = np.array(
            [label if isinstance(label, str) else " + ".join(label) or "none" for label in labels]
        )
        found, counts = np.unique(names, return_counts=True)
        common = found[np.argsort(-counts, kind="stable")]
        own = common if len(common) <= len(COLORS) else common[: len(COLORS) - 1]
        for name, color in zip(own, COLORS, strict=False):
            panel.scatter(*places_N2[names == name].T, color=color, label=short(name), **dots)
        if len(own) < len(common):
            rest = ~np.isin(names, own)
            panel.scatter(
                *places_N2[rest].T,
                color=COLORS[-1],
                label=f"{len(common) - len(own)} others",
                **dots,
            )
        panel.legend(
            fontsize=7, frameon=False, markerscale=1.6, loc="center left", bbox_to_anchor=(1.0, 0.5)
        )
