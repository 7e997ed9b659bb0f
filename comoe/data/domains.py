"""What only losses read of posts: how sure their labels are, and what an adversary is to tell of them."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from comoe.data.posts import PostSplit
from comoe.protocols import IGNORED
from comoe.schema import AdversarialConfig
from comoe.tasks.catalog import CONFIDENCE_STRATEGIES, Task
from comoe.tasks.labels import natural_order

MANY = 100
"""More values than this are no platforms or domains, but texts or numbers."""
OF_TASKS = "task"
"""``loss.adversarial.predict`` that names no column."""


@dataclass(frozen=True, slots=True)
class Domains:
    """The values that training posts have."""

    predict: str
    """``loss.adversarial.predict``."""
    names: tuple[str, ...]
    """Values, the commonest one first."""
    shares: tuple[float, ...]
    """Share of each among the training posts that have one."""
    missing: int
    """Training posts without."""
    weights: tuple[float, ...]
    """Of a post with this value."""

    def classes(self, posts: PostSplit, rows: Sequence[int]) -> np.ndarray:
        """Class of some posts, int64, IGNORED without a value that training posts have too. Row -1 is no post."""
        known = {name: number for number, name in enumerate(self.names)}
        values = [_value(posts, self.predict, row) if row >= 0 else None for row in rows]
        return np.array([IGNORED if value is None else known.get(value, IGNORED) for value in values], dtype=np.int64)

    def line(self) -> str:
        """What was found, for people."""
        shown = [f"{name} {share:.0%}" for name, share in zip(self.names, self.shares, strict=True)][:8]
        more = f" and {len(self.names) - 8} more" if len(self.names) > 8 else ""
        left_out = f"; {self.missing:,} training posts have none and are left out" if self.missing else ""
        return f"loss.adversarial predicts {self.predict}: {', '.join(shown)}{more}{left_out}"


def find_domains(train: PostSplit, config: AdversarialConfig) -> Domains | None:
    """The values of ``loss.adversarial.predict`` in the training split; None where the term is off.

    Under ``task`` a value is a data set: a post that several tasks share is one post, of the data set that they share.

    Raises:
        ValueError: fewer than two values, or more than ``MANY``.
    """
    if not config.weight:
        return None
    values = [_value(train, config.predict, row) for row in range(len(train))]
    counts = Counter(value for value in values if value is not None)
    if len(counts) < 2:
        found = f"only {next(iter(counts))}" if counts else "none"
        hint = "; all tasks share one data set" if config.predict == OF_TASKS else ""
        raise ValueError(
            f"loss.adversarial.predict is {config.predict!r}, but there must be two values or more and the training "
            f"posts have {found}{hint}. Name another column, or set loss.adversarial.weight to 0."
        )
    if len(counts) > MANY:
        raise ValueError(
            f"loss.adversarial.predict is {config.predict!r}, whose cells in the training posts have {len(counts):,} "
            f"different values; a column of up to {MANY} is meant, such as the platform. Name another column."
        )
    names = tuple(sorted(natural_order(counts), key=lambda name: -counts[name]))
    total = counts.total()
    weights = tuple(total / (len(names) * counts[name]) if config.balanced else 1.0 for name in names)
    shares = tuple(counts[name] / total for name in names)
    return Domains(config.predict, names, shares, len(train) - total, weights)


def domain_columns(
    domains: Domains | None, posts: PostSplit, rows: Sequence[int], shares: Sequence[int]
) -> dict[str, Tensor]:
    """``domains_B`` and ``domain_weights_B`` of a batch; nothing where nothing is predicted.

    Args:
        domains: what is predicted.
        posts: of the split.
        rows: post of each row, -1 for none.
        shares: how many rows the post of each row has, at least 1: it counts once.
    """
    if domains is None:
        return {}
    classes = domains.classes(posts, rows)
    weights = [0.0 if number == IGNORED else domains.weights[number] for number in classes]
    return {
        "domains_B": torch.from_numpy(classes),
        "domain_weights_B": torch.tensor(weights) / torch.tensor(shares, dtype=torch.float32),
    }


def confidences_of(posts: PostSplit, rows: Sequence[int], tasks: Sequence[Task]) -> dict[str, Tensor]:
    """``Batch.confidences`` of some posts, float32; 1 where a post has none, and for row -1."""
    columns = {
        task.name: posts.confidences[task.name]
        for task in tasks
        if CONFIDENCE_STRATEGIES[task.confidence_strategy] and task.name in posts.confidences
    }
    return {
        name: torch.tensor([1.0 if row < 0 or column[row] is None else column[row] for row in rows])
        for name, column in columns.items()
    }


def _value(posts: PostSplit, predict: str, row: int) -> str | None:
    """The value of one post, None where it has none."""
    if predict == OF_TASKS:
        return posts.group_names[posts.groups[row]]
    cell = posts.columns[predict][row] if predict in posts.columns else None
    return None if cell is None or not cell.strip() else cell.strip()
