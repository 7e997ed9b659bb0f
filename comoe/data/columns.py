"""Columns beside text and label: held-out values, slices of the scores, confidences, and what an adversary predicts."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

from comoe.config.errors import nearest, unknown_name
from comoe.config.recipe import AdversarialConfig, Recipe
from comoe.data.posts import UNSEEN, PostSplit
from comoe.data.reading.files import RawSplit
from comoe.data.reading.rows import cell_text
from comoe.data.report import DataReport
from comoe.deferred import Deferred
from comoe.tasks.labels import is_missing, natural_order
from comoe.tasks.slices import number_of, slice_columns, slice_of
from comoe.tasks.task import CONFIDENCE_STRATEGIES, Task
from comoe.types import IGNORED

if TYPE_CHECKING:
    import torch
    from torch import Tensor

    from comoe.data.datasets import Group
else:
    torch = Deferred("torch")

MAX_SLICES = 50
"""Most values of a column that scores are sliced by: each becomes a few numbers in every
evaluation."""


LEARNED_FROM = ("train", "validation")
"""Splits that held-out posts leave: one teaches, the other chooses the checkpoint."""


def extra_columns(recipe: Recipe) -> tuple[str, ...]:
    """Columns that posts keep as text: of ``hold_out``, ``slices``, authors, and what ``loss.adversarial`` predicts."""
    found = [
        column
        for task in recipe.tasks.values()
        for column in (*task.hold_out, *slice_columns(task.slices), task.author)
        if column is not None
    ]
    adversarial = recipe.loss.adversarial
    if adversarial.weight and adversarial.predict != "task":
        found.append(adversarial.predict)
    return tuple(dict.fromkeys(found))


def check_extra_columns(groups: Sequence[Group], recipe: Recipe) -> None:
    """Every column that the recipe asks for is there, and what it says of its values can be done.

    Args:
        groups: data sets whose files have been read.
        recipe: the recipe.

    Raises:
        ValueError: key, column, nearest column or value.
    """
    for group in groups:
        for name, task in group.tasks.items():
            for column, values in task.hold_out.items():
                for split in LEARNED_FROM:
                    if split in group.raw:
                        _check_column(f"tasks.{name}.hold_out", column, group.raw[split].columns)
                _check_values(group, f"tasks.{name}.hold_out.{column}", column, values)
            for entry in task.slices:
                _check_column(f"tasks.{name}.slices", slice_of(entry).column, _all_columns([group]))
                for raw in group.raw.values():
                    check_slices(f"tasks.{name}.slices", entry, raw)
    adversarial = recipe.loss.adversarial
    if adversarial.weight and adversarial.predict != "task":
        _check_column(
            "loss.adversarial.predict", adversarial.predict, ("task", *_all_columns(groups))
        )


def part_off(
    group: Group, splits: dict[str, PostSplit], report: DataReport
) -> dict[str, PostSplit]:
    """Posts with a held-out value leave training and validation and become the split ``unseen``.

    Raises:
        ValueError: no training post is left.
    """
    held_out = next(iter(group.tasks.values())).hold_out
    if not held_out:
        return splits
    parts, gone = dict(splits), []
    for split in LEARNED_FROM:
        if split not in splits:
            continue
        posts = splits[split]
        held = np.zeros(len(posts), dtype=bool)
        for column, values in held_out.items():
            held |= np.isin([cell or "" for cell in posts.columns[column]], values)
        parts[split] = posts.take(np.flatnonzero(~held))
        gone.append(posts.take(np.flatnonzero(held)))
    if not len(parts["train"]):
        raise ValueError(
            f"{group.source.key}.hold_out takes every training post away; hold fewer values out."
        )
    if "validation" in parts and not len(parts["validation"]):
        del parts["validation"]
    parts[UNSEEN] = PostSplit.join(gone)
    what = "; ".join(f"{column} {', '.join(values)}" for column, values in held_out.items())
    counts = " and ".join(
        f"{len(posts):,} {split}" for split, posts in zip(LEARNED_FROM, gone, strict=False)
    )
    report.notes.append(
        f"data set {group.name}: held out {what}: {counts} posts are the split {UNSEEN}"
    )
    return parts


def _check_column(key: str, column: str, columns: Iterable[str]) -> None:
    if column not in columns:
        raise unknown_name(key, column, columns)


def check_slices(key: str, entry: str, raw: RawSplit) -> None:
    """Scores can be sliced so: the column has few values, or numbers where there is a bound.

    Args:
        key: option, for the message.
        entry: of ``tasks.<name>.slices``.
        raw: a file; a column that it lacks has no values.

    Raises:
        ValueError: option, column, file.
    """
    column, bound = slice_of(entry)
    if bound is None:
        count = len({cell_text(row.get(column)) for row in raw.rows})
        if count > MAX_SLICES:
            raise ValueError(
                f"{key}: column {column} has {count:,} values in {raw.file}; scores are sliced by "
                f"a column with at most {MAX_SLICES}, or by a bound of its numbers ({column}<0.5)."
            )
        return
    for line, row in zip(raw.lines, raw.rows, strict=True):
        cell = row.get(column)
        if not is_missing(cell) and np.isnan(number_of(cell_text(cell))):
            raise ValueError(
                f"{key}: {entry} compares numbers, but {column} is {cell!r} in {raw.file}:{line}; "
                "give a number, or leave the cell empty."
            )


def _check_values(group: Group, key: str, column: str, values: Sequence[str]) -> None:
    rows = (row for split in LEARNED_FROM if split in group.raw for row in group.raw[split].rows)
    there = sorted({text for row in rows if (text := cell_text(row.get(column))) is not None})
    if not values:
        raise ValueError(f"{key} lists no value; give some of the column's, or remove it.")
    for value in values:
        if value not in there:
            guess = nearest(value, there)
            shown = ", ".join(there[:20]) + (", ..." if len(there) > 20 else "")
            raise ValueError(
                f"{key}: no training or validation post of {group.name} has the value {value!r}; "
                + (f"did you mean {guess}? " if guess else "")
                + f"(values: {shown or 'none'})"
            )


def _all_columns(groups: Sequence[Group]) -> list[str]:
    return list(
        dict.fromkeys(
            column for group in groups for raw in group.raw.values() for column in raw.columns
        )
    )


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
        return np.array(
            [IGNORED if value is None else known.get(value, IGNORED) for value in values],
            dtype=np.int64,
        )

    def line(self) -> str:
        """What was found, for people."""
        shown = [
            f"{name} {share:.0%}" for name, share in zip(self.names, self.shares, strict=True)
        ][:8]
        more = f" and {len(self.names) - 8} more" if len(self.names) > 8 else ""
        left_out = (
            f"; {self.missing:,} training posts have none and are left out" if self.missing else ""
        )
        return f"loss.adversarial predicts {self.predict}: {', '.join(shown)}{more}{left_out}"


def find_domains(train: PostSplit, config: AdversarialConfig) -> Domains | None:
    """The values of ``loss.adversarial.predict`` in the training split; None where the term is off.

    Under ``task`` a value is a data set: a post that several tasks share is one post, of the data
    set that they share.

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
    weights = tuple(
        total / (len(names) * counts[name]) if config.balanced else 1.0 for name in names
    )
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


def confidences_of(
    posts: PostSplit, rows: Sequence[int], tasks: Sequence[Task]
) -> dict[str, Tensor]:
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
