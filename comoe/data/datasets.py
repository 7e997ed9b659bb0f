"""Data sets of a recipe: which tasks share their posts, the files, and whether the columns that are asked for exist."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path

from comoe.config.recipe import Recipe, TaskConfig
from comoe.data.labels import discovered
from comoe.data.reading.files import RawSplit
from comoe.data.reading.inputs import check_columns
from comoe.data.reading.label_studio import VOTES
from comoe.data.reading.sources import NAMES, Source, open_source, read_split
from comoe.tasks.kinds.base import Kind
from comoe.tasks.kinds.classification import MultiLabel
from comoe.tasks.kinds.generation import Text
from comoe.tasks.kinds.registry import KINDS
from comoe.tasks.task import kind_of


@dataclass(slots=True)
class Group:
    """One data set and the tasks that share its posts."""

    name: str
    source: Source
    tasks: dict[str, TaskConfig]
    raw: dict[str, RawSplit] = field(default_factory=dict)
    labels: dict[str, tuple[str, ...]] = field(default_factory=dict)

    @property
    def scored(self) -> bool:
        """False where no task predicts: such posts are read for training alone."""
        return any(kind_of(task.kind).scored for task in self.tasks.values())


def groups_of(recipe: Recipe) -> list[Group]:
    """Data sets in the order of their first task, with names that tell them apart."""
    shared: dict[tuple, dict[str, TaskConfig]] = {}
    for name, task in recipe.tasks.items():
        shared.setdefault(_posts_of(task), {})[name] = task
    # Posts for soft labels alone are those of a task that the recipe does not have.
    for number, path in enumerate(recipe.distill.unlabelled):
        task = TaskConfig(path, kind="unlabelled", text=recipe.distill.unlabelled_text)
        shared[path, number] = {f"distill.unlabelled.{number}": task}
    groups: list[Group] = []
    for members in shared.values():
        _check_together(members)
        first, task = next(iter(members.items()))
        source = open_source(
            f"tasks.{first}" if first in recipe.tasks else first,
            root=recipe.data.root,
            path=task.path,
            format=task.format,
            subset=task.subset,
            splits=task.splits,
        )
        source = replace(source, text=task.text, kinds=kinds_of_columns(members))
        taken = {group.name for group in groups}
        stem = Path(task.path).stem or task.path
        names = (stem, f"{stem}/{task.subset or first}", f"{task.path} ({first})")
        groups.append(Group(next(name for name in names if name not in taken), source, members))
    return groups


def kinds_of_columns(tasks: Mapping[str, TaskConfig]) -> dict[str, Kind]:
    """Column of labels, and what a column of their votes is named after -> kind of its task; several labels first."""
    found: dict[str, Kind] = {}
    for task in tasks.values():
        kind = kind_of(task.kind)
        for column in (task.label, (task.soft_label or "").removesuffix(VOTES)):
            if column and kind.predicts and not isinstance(found.get(column), MultiLabel):
                found[column] = kind
    return found


def cuts_all_posts(recipe: Recipe) -> bool:
    """Whether every post is cut into words: teachers say of each one what its words are."""
    word_tasks = (task for task in recipe.tasks.values() if kind_of(task.kind).mode == "tokens")
    return bool(recipe.distill.teachers) and any(word_tasks)


def read_as_words(recipe: Recipe) -> tuple[str, ...]:
    """Tasks that learn from posts cut into words: one on the same posts predicts each word."""
    tasks = recipe.tasks
    if cuts_all_posts(recipe):
        return tuple(tasks)
    cut = {_posts_of(task) for task in tasks.values() if kind_of(task.kind).mode == "tokens"}
    return tuple(name for name, task in tasks.items() if _posts_of(task) in cut)


def _posts_of(task: TaskConfig) -> tuple:
    """Equal for tasks that share their posts."""
    named = tuple(sorted(task.splits.items()))
    read = (task.text, task.pair, task.image, task.context, task.context_as, task.author, task.per)
    return task.path, task.format, task.subset, named, read


def _check_together(members: Mapping[str, TaskConfig]) -> None:
    """What the tasks of one data set must agree on."""
    first, task = next(iter(members.items()))
    for name, other in members.items():
        if other.hold_out != task.hold_out:
            raise ValueError(
                f"tasks.{name}.hold_out is {other.hold_out}, but tasks.{first}, which shares its posts, has "
                f"{task.hold_out}; a post held out for one would be learned by the other: write the same in both."
            )
        if other.balanced_sampling and not KINDS[other.kind].exclusive:
            raise ValueError(
                f"tasks.{name}.balanced_sampling needs one label of several per post (kind: "
                f"single_label or label_words), not {other.kind}; leave it out."
            )


def read_group(group: Group, *, with_images: bool) -> None:
    """Read the files of a data set; check columns; settle the labels."""
    for split in NAMES if group.scored else ("train",):
        raw = read_split(group.source, split)
        if raw is None:
            continue
        if not raw.rows and not raw.bad:
            raise ValueError(
                f"{raw.file} holds no posts; give {group.source.key} a file with posts, or remove the file."
            )
        _check_columns(group, raw, split, with_images=with_images)
        group.raw[split] = raw
    train = group.raw["train"]
    for name, task in group.tasks.items():
        known = train.label_names.get(task.label, ()) if kind_of(task.kind).predicts else ()
        values = (row.get(task.label) for row in train.rows)
        if known and isinstance(kind_of(task.kind), Text):
            raise ValueError(
                f"tasks.{name} is of kind {task.kind}, but column {task.label!r} of {train.file} holds ids of the "
                f"labels {', '.join(known)}; list them as tasks.{name}.labels, and the decoder scores their words."
            )
        group.labels[name] = tuple(task.labels) or known or discovered(kind_of(task.kind), values)


def _check_columns(group: Group, raw: RawSplit, split: str, *, with_images: bool) -> None:
    """Every column that the recipe names is there.

    Labels may lack in the test split, and those of some tasks in the validation split: these cannot
    be measured then.
    """
    if not raw.rows:
        return
    labelled = split == "test" or (
        split == "validation" and any(t.label in raw.columns for t in group.tasks.values())
    )
    plain = " Plain text has no labels: use it for kind unlabelled or masked_words, or write .jsonl with labels."
    for name, task in group.tasks.items():
        if name == group.source.key:
            check_columns(raw, {"distill.unlabelled_text": task.text})
            continue
        wanted = {key: getattr(task, key) for key in ("text", "pair", "context", "author")}
        wanted |= {"image": task.image} if with_images else {}
        check_columns(raw, {f"tasks.{name}.{key}": column for key, column in wanted.items()})
        if not labelled and (kind := kind_of(task.kind)).scored:
            wanted = {"label": task.label} if kind.predicts else {}
            wanted |= {"confidence": task.confidence}
            wanted |= {"soft_label": task.soft_label} if split == "train" else {}
            check_columns(
                raw,
                {f"tasks.{name}.{key}": column for key, column in wanted.items()},
                hint=plain if group.source.format == "txt" else "",
            )
