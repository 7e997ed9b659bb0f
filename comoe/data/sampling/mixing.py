"""How often each data set is drawn from: rates by size, by temperature, by progress, and by label within a data set."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from comoe.config.recipe import TaskConfig
from comoe.data.posts import PostSplit
from comoe.tasks.task import Task

LEAST = 0.25
"""Least factor of a rate under ``mixing: progress``: no data set falls below this share of its rate
by size."""


@dataclass(frozen=True, slots=True)
class Mixing:
    """One key of ``data.mixing``."""

    rates: Callable[[np.ndarray, float], np.ndarray]
    """(posts per data set, temperature) -> share of the draws per data set, summing to 1."""
    follows_progress: bool = False
    """Whether ``progress_rates`` changes them after each evaluation."""

    def __call__(self, sizes_G: np.ndarray, temperature: float) -> np.ndarray:
        """The rates before any evaluation."""
        return self.rates(sizes_G, temperature)


def proportional(sizes_G: np.ndarray, temperature: float) -> np.ndarray:
    """Rates that follow the sizes: every post once per epoch. ``temperature`` has no effect."""
    return sizes_G / sizes_G.sum()


def uniform(sizes_G: np.ndarray, temperature: float) -> np.ndarray:
    """The same rate for every data set. ``temperature`` has no effect."""
    return np.full(len(sizes_G), 1 / len(sizes_G))


def by_temperature(sizes_G: np.ndarray, temperature: float) -> np.ndarray:
    """Rates proportional to size ** (1 / temperature): 1 is proportional, large is uniform.

    Source: Aharoni et al. 2019, arXiv:1903.00089.
    """
    assert temperature >= 1, "below 1 small data sets would vanish"
    scaled_G = sizes_G.astype(np.float64) ** (1 / temperature)
    return scaled_G / scaled_G.sum()


def progress_rates(base_G: np.ndarray, gains_G: np.ndarray) -> np.ndarray:
    """Rates that follow what the last stretch of training brought to each data set.

    ``base * (1/4 + 3/4 gain / largest gain)``, made to sum to 1: the data set whose validation loss
    fell most keeps its full rate, one whose loss stands or rises a quarter of it, so none vanishes
    and one that forgets comes back as soon as it learns again. Where nothing improves the rates are
    those by size.

    Args:
        base_G: rates by size, summing to 1.
        gains_G: relative fall of the validation loss since the last evaluation; NaN where nothing
            is known, which counts as the mean of the others; what rose counts as 0.

    Source: progress as the signal is Graves et al. 2017, arXiv:1704.03003 (loss gain), and Matiisen
    et al. 2017, arXiv:1707.00183; rates by validation instead of training figures, Gottumukkala et
    al. 2020 (ACL).
    """
    known_G = np.isfinite(gains_G)
    gains_G = np.where(known_G, np.maximum(gains_G, 0.0), 0.0)
    if not gains_G.any():
        return base_G
    gains_G = np.where(known_G, gains_G, gains_G[known_G].mean())
    rates_G = base_G * (LEAST + (1 - LEAST) * gains_G / gains_G.max())
    return rates_G / rates_G.sum()


def loss_gains(
    before: Mapping[str, float],
    now: Mapping[str, float],
    *,
    tasks: Sequence[Task],
    has_GT: np.ndarray,
) -> np.ndarray:
    """Relative fall of the validation loss of each data set, the mean over its tasks; NaN where none is known.

    Args:
        before: task -> loss at the last evaluation.
        now: task -> loss now.
        tasks: all tasks; auxiliary ones have no say.
        has_GT: whether a data set has labels of a task, bool.
    """
    gains_T = np.full(len(tasks), np.nan)
    for place, task in enumerate(tasks):
        if not task.auxiliary and task.name in before and task.name in now:
            gains_T[place] = (before[task.name] - now[task.name]) / max(before[task.name], 1e-12)
    known_GT = has_GT & np.isfinite(gains_T)
    sums_G = np.where(known_GT, gains_T, 0.0).sum(axis=1)
    counts_G = known_GT.sum(axis=1)
    return np.where(counts_G > 0, sums_G / np.maximum(counts_G, 1), np.nan)


def next_turn(rates_G: np.ndarray, turns_G: np.ndarray, first_G: np.ndarray) -> int:
    """The data set whose turn it is, where one has each turn: the one that is furthest behind its rate.

    Args:
        rates_G: share of the turns per data set, summing to 1.
        turns_G: turns that each has had.
        first_G: numbers in [0, 1) that decide the order, which turns alone would leave to the names.
    """
    return int(np.argmax(rates_G * (turns_G.sum() + 1) - turns_G + first_G))


def draws_per_epoch(rates_G: np.ndarray, *, total: int) -> np.ndarray:
    """Whole draws per data set that sum to ``total``, by largest remainder; int64, shape (G,)."""
    exact = rates_G * total
    # The small number keeps 2999.9999999 from losing the post that makes proportional mixing exact.
    draws = np.floor(exact + 1e-6).astype(np.int64)
    missing = total - int(draws.sum())
    draws[np.argsort(-(exact - draws), kind="stable")[:missing]] += 1
    return draws


def draws_in_stretch(rates_G: np.ndarray, *, total: int, seed: Sequence[int]) -> np.ndarray:
    """Whole draws that add up to ``total`` and are ``rates * total`` on average over seeds, also where that is below 1.

    Source: systematic sampling.
    """
    ends = np.floor(np.cumsum(rates_G) * total + np.random.default_rng(list(seed)).random()).astype(
        np.int64
    )
    # The rates sum to 1 but for rounding.
    ends[-1] = total
    return np.diff(ends.clip(max=total), prepend=0)


def balanced_classes(
    posts: PostSplit, tasks: Sequence[Task], configs: Mapping[str, TaskConfig]
) -> np.ndarray:
    """Label ids of each post by which its data set is drawn evenly, int64, (N, C), a column per task; -1 for none."""
    names = [task.name for task in tasks if configs[task.name].balanced_sampling]
    classes_NC = np.full((len(posts), len(names)), -1, dtype=np.int64)
    for column, name in enumerate(names):
        labels = posts.labels[name]
        found = [post for post, value in enumerate(labels) if value is not None]
        classes_NC[found, column] = [labels[post] for post in found]
    return classes_NC


def label_shares(classes: np.ndarray) -> list[tuple[np.ndarray, float]]:
    """(posts, share of the draws) of each label of one data set, equal over labels; posts without label keep theirs.

    Args:
        classes: label ids, int, (n,); -1 has none.
    """
    bare = np.flatnonzero(classes < 0)
    shares = [(bare, len(bare) / len(classes))] if len(bare) else []
    labels = np.unique(classes[classes >= 0])
    rest = 1 - len(bare) / len(classes)
    return shares + [(np.flatnonzero(classes == label), rest / len(labels)) for label in labels]


def joint_label_shares(classes: np.ndarray) -> list[tuple[np.ndarray, float]]:
    """(posts, share of the draws) of each combination of labels, such that those of every task come equally often.

    The shares are those of the data, scaled for one task after the other until nothing changes: of all
    shares with even labels the nearest to the data's. Where no such shares exist, because some
    labels only occur together, tasks are less even: no combination comes less often than ``FLOOR``
    times its share of the data. What posts without a label of a task have in sum follows from
    the other tasks.

    Args:
        classes: label ids, int, (n, C); -1 has none.

    Source: iterative proportional fitting, Deming & Stephan 1940, doi:10.1214/aoms/1177731829.
    """
    kinds, places, counts = np.unique(classes, axis=0, return_inverse=True, return_counts=True)
    shares_K = counts / counts.sum()
    for _ in range(FITTING_STEPS):
        before_K = shares_K.copy()
        for labels_K in kinds.T:
            known_K = labels_K >= 0
            even = shares_K[known_K].sum() / len(np.unique(labels_K[known_K]))
            for label in np.unique(labels_K[known_K]):
                shares_K[labels_K == label] *= even / shares_K[labels_K == label].sum()
        if np.abs(shares_K - before_K).max() < 1e-12:
            break
    shares_K = np.maximum(shares_K, FLOOR * counts / counts.sum())
    shares_K /= shares_K.sum()
    rows = [np.flatnonzero(places.reshape(-1) == kind) for kind in range(len(kinds))]
    return list(zip(rows, shares_K.tolist(), strict=True))


FITTING_STEPS = 1000
"""Most rounds of ``joint_label_shares``."""

FLOOR = 0.1
"""Share of its posts' share of the data that a combination of labels keeps."""


MIXINGS: dict[str, Mixing] = {
    "proportional": Mixing(proportional),
    "uniform": Mixing(uniform),
    "temperature": Mixing(by_temperature),
    "progress": Mixing(by_temperature, follows_progress=True),
}
"""Sampling rule -> rates."""
