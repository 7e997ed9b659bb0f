"""Columns beside text and label: values that are held out of training, slices of the scores, what a loss asks for."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

import numpy as np

from comoe.data.groups import Group
from comoe.data.posts import UNSEEN, PostSplit, join_splits
from comoe.data.report import DataReport
from comoe.data.rows import cell_text
from comoe.rules import nearest, unknown_name
from comoe.schema import Recipe

MAX_SLICES = 50
"""Most values of a column that scores are sliced by: each becomes a few numbers in every evaluation."""
LEARNED_FROM = ("train", "validation")
"""Splits that held-out posts leave: one teaches, the other chooses the checkpoint."""


def extra_columns(recipe: Recipe) -> tuple[str, ...]:
    """Columns that posts keep as text: of ``hold_out`` and ``slices``, and what ``loss.adversarial`` predicts."""
    found = [column for task in recipe.tasks.values() for column in (*task.hold_out, *task.slices)]
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
            for column in task.slices:
                _check_column(f"tasks.{name}.slices", column, _all_columns([group]))
                for raw in group.raw.values():
                    count = len({cell_text(row.get(column)) for row in raw.rows})
                    if count > MAX_SLICES:
                        raise ValueError(
                            f"tasks.{name}.slices: column {column} has {count:,} values in {raw.file}; scores are "
                            f"sliced by a column with at most {MAX_SLICES}."
                        )
    adversarial = recipe.loss.adversarial
    if adversarial.weight and adversarial.predict != "task":
        _check_column("loss.adversarial.predict", adversarial.predict, ("task", *_all_columns(groups)))


def part_off(group: Group, splits: dict[str, PostSplit], report: DataReport) -> dict[str, PostSplit]:
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
        raise ValueError(f"{group.source.key}.hold_out takes every training post away; hold fewer values out.")
    if "validation" in parts and not len(parts["validation"]):
        del parts["validation"]
    parts[UNSEEN] = join_splits(gone)
    what = "; ".join(f"{column} {', '.join(values)}" for column, values in held_out.items())
    counts = " and ".join(f"{len(posts):,} {split}" for split, posts in zip(LEARNED_FROM, gone, strict=False))
    report.notes.append(f"data set {group.name}: held out {what}: {counts} posts are the split {UNSEEN}")
    return parts


def _check_column(key: str, column: str, columns: Iterable[str]) -> None:
    if column not in columns:
        raise unknown_name(key, column, columns)


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
    return list(dict.fromkeys(column for group in groups for raw in group.raw.values() for column in raw.columns))
