"""The posts of a recipe: every data set read, checked, parsed, split and counted."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path

import numpy as np

from comoe.data.image_checks import ImageReader
from comoe.data.labels import discovered, resolved_task
from comoe.data.posts import PART_NAMES, PostSplit, join_splits
from comoe.data.report import BadRow, DataReport, settle
from comoe.data.rows import BadCell, RowReader
from comoe.data.sources import RawSplit, Source, open_source, read_split
from comoe.data.splitting import hold_out, limited, seed_of, shared_posts
from comoe.rules import nearest, unknown_name
from comoe.schema import Recipe, TaskConfig
from comoe.tasks.catalog import Task, kind_of
from comoe.tasks.kinds import KINDS


@dataclass(frozen=True, slots=True)
class Corpus:
    """All posts of a recipe."""

    tasks: tuple[Task, ...]
    """Tasks in the order of the recipe."""
    splits: dict[str, PostSplit]
    """train, validation, and test where a data set has one."""
    report: DataReport
    """What was found."""


_Splits = dict[str, PostSplit]

NO_LABELS = {("txt", "label"): "; plain text has no labels: use it for kind unlabelled, or a .jsonl with labels"}
"""(format, option of a task) -> more about a column that is not there."""


@dataclass(slots=True)
class _Group:
    """One data set and the tasks that share its posts."""

    name: str
    source: Source
    tasks: dict[str, TaskConfig]
    raw: dict[str, RawSplit] = field(default_factory=dict)
    labels: dict[str, tuple[str, ...]] = field(default_factory=dict)

    @property
    def scored(self) -> bool:
        """False where no task has an answer: such posts are read for training alone."""
        return any(kind_of(task.kind).scored for task in self.tasks.values())


def load_corpus(
    recipe: Recipe,
    *,
    report: DataReport | None = None,
    with_images: bool = False,
    cache_dir: Path | None = None,
    progress: bool = False,
) -> Corpus:
    """Read every data set of a recipe; with pictures, every rank must call it.

    Tasks with equal path, format, subset, splits, text and picture columns share their posts. A data set without a
    validation split gives up a part of its training posts, stratified by label. Training posts without any label are
    left out. The same recipe gives the same corpus on every machine.

    Args:
        recipe: the recipe, with local paths (``comoe.starter.resolve``).
        report: is filled and returned within the corpus; a new one by default.
        with_images: look at all pictures and keep where they are; else no post has one, and no picture is looked at.
        cache_dir: where is remembered which pictures are good; None remembers nothing.
        progress: show a bar while pictures are looked at.

    Raises:
        ValueError: a data set, file, column or label that is missing or wrong; a bad row under ``data.on_error: stop``.
    """
    report = DataReport() if report is None else report
    groups = _groups(recipe)
    names = tuple(group.name for group in groups)
    parts: dict[str, list[PostSplit]] = {split: [] for split in PART_NAMES}
    pictures = ImageReader(recipe.data, report, cache_dir=cache_dir, progress=progress) if with_images else None
    for number, group in enumerate(groups):
        _read(group, with_images=with_images)
        splits = _parse(group, number, recipe=recipe, names=names, report=report, pictures=pictures)
        splits = _with_labels_only(group, splits, report)
        splits = _with_validation(group, splits, recipe=recipe, report=report)
        splits = _limited(group, splits, recipe=recipe)
        _warn_of_repeats(group, splits, report)
        report.posts[group.name] = {split: len(splits[split]) for split in PART_NAMES if split in splits}
        if with_images:
            counts = {split: sum(image is not None for image in posts.images) for split, posts in splits.items()}
            report.pictures[group.name] = {split: counts[split] for split in PART_NAMES if split in counts}
        for split, posts in splits.items():
            parts[split].append(posts)
    joined = {split: join_splits(found) for split, found in parts.items() if found}
    labels = {task: found for group in groups for task, found in group.labels.items()}
    tasks = tuple(
        resolved_task(name, recipe.tasks[name], labels=labels[name], splits=joined, report=report)
        for name in recipe.tasks
    )
    return Corpus(tasks=tasks, splits=joined, report=report)


def _groups(recipe: Recipe) -> list[_Group]:
    """Data sets in the order of their first task, with names that tell them apart."""
    if not recipe.tasks:
        raise ValueError("tasks is empty; give the recipe at least one task, as in `tasks: {mood: {path: mood.csv}}`.")
    shared: dict[tuple, dict[str, TaskConfig]] = {}
    for name, task in recipe.tasks.items():
        if task.kind not in KINDS:
            raise unknown_name(f"tasks.{name}.kind", task.kind, KINDS)
        named = tuple(sorted(task.splits.items()))
        key = (task.path, task.format, task.subset, named, task.text, task.pair, task.image)
        shared.setdefault(key, {})[name] = task
    if not any(KINDS[task.kind].scored for task in recipe.tasks.values()):
        raise ValueError(f"tasks: none of {', '.join(recipe.tasks)} has labels; give the recipe a task that has.")
    groups: list[_Group] = []
    for members in shared.values():
        first, task = next(iter(members.items()))
        source = open_source(
            f"tasks.{first}",
            root=recipe.data.root,
            path=task.path,
            format=task.format,
            subset=task.subset,
            splits=task.splits,
        )
        taken = {group.name for group in groups}
        stem = Path(task.path).stem or task.path
        names = (stem, f"{stem}/{task.subset or first}", f"{task.path} ({first})")
        groups.append(_Group(next(name for name in names if name not in taken), source, members))
    return groups


def _read(group: _Group, *, with_images: bool) -> None:
    """Read the files of a data set; check columns; settle the labels."""
    for split in PART_NAMES if group.scored else ("train",):
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
        known = train.label_names.get(task.label, ()) if kind_of(task.kind).scored else ()
        values = (row.get(task.label) for row in train.rows)
        group.labels[name] = tuple(task.labels) or known or discovered(kind_of(task.kind), values)


def _check_columns(group: _Group, raw: RawSplit, split: str, *, with_images: bool) -> None:
    """Every column that the recipe names is there.

    Labels may lack in the test split, and those of some tasks in the validation split: these cannot be measured then.
    """
    if not raw.rows:
        return
    labelled = split == "test" or (split == "validation" and any(t.label in raw.columns for t in group.tasks.values()))
    for name, task in group.tasks.items():
        wanted = {"text": task.text, "pair": task.pair} | ({"image": task.image} if with_images else {})
        if not labelled:
            wanted |= {"label": task.label, "confidence": task.confidence} if kind_of(task.kind).scored else {}
        for key, column in wanted.items():
            if column is not None and column not in raw.columns:
                guess = nearest(column, raw.columns)
                hint = f"; did you mean {guess}?" if guess else ""
                hint += NO_LABELS.get((group.source.format, key), "")
                raise ValueError(
                    f"tasks.{name}.{key} is {column!r}, but {raw.file} has no such column{hint} "
                    f"(columns: {', '.join(raw.columns)}). Set tasks.{name}.{key} to the right one."
                )


def _parse(
    group: _Group,
    number: int,
    *,
    recipe: Recipe,
    names: tuple[str, ...],
    report: DataReport,
    pictures: ImageReader | None,
) -> _Splits:
    """Rows to posts with parsed labels; bad rows stop the run or are set aside."""
    reader = RowReader(group.tasks, group.labels, max_characters=recipe.data.max_characters)
    splits = {}
    for split, raw in group.raw.items():
        posts, lines, bad = [], [], list(raw.bad)
        for line, row in zip(raw.lines, raw.rows, strict=True):
            try:
                posts.append(reader.read(row))
                lines.append(line)
            except BadCell as error:
                bad.append(BadRow(raw.file, line, error.value, error.rule))
        settle(bad, usable=len(posts), of=raw.file, on_error=recipe.data.on_error, report=report)
        images: list[bytes | str | None] = [None] * len(posts)
        column = next(iter(group.tasks.values())).image
        if pictures is not None and column is not None:
            cells = [post.image for post in posts]
            usable, images = pictures.read(cells, file=raw.file, lines=lines, column=column)
            posts, lines = [posts[row] for row in usable], [lines[row] for row in usable]
        splits[split] = PostSplit(
            texts=[post.text for post in posts],
            pairs=[post.pair for post in posts],
            words=[post.words for post in posts],
            labels={task: [post.labels.get(task) for post in posts] for task in recipe.tasks},
            confidences={
                name: [post.confidences.get(name) for post in posts]
                for name, task in recipe.tasks.items()
                if task.confidence is not None
            },
            groups=np.full(len(posts), number, dtype=np.int64),
            group_names=names,
            origins=[f"{raw.file}:{line}" for line in lines],
            images=images,
        )
    return splits


def _with_labels_only(group: _Group, splits: _Splits, report: DataReport) -> _Splits:
    """Training posts that no task has a label for teach nothing and are left out."""
    columns = [splits["train"].labels[task] for task in group.tasks]
    useful = np.flatnonzero([any(value is not None for value in values) for values in zip(*columns, strict=True)])
    if not len(useful):
        file = group.raw["train"].file
        wanted = ", ".join(f"tasks.{name}.label={task.label}" for name, task in group.tasks.items())
        raise ValueError(f"No post in {file} has a label of any task; check the columns ({wanted}).")
    if left := len(splits["train"]) - len(useful):
        report.notes.append(f"data set {group.name}: {left:,} training posts without any label left out")
    return splits | {"train": splits["train"].take(useful)}


def _with_validation(group: _Group, splits: _Splits, *, recipe: Recipe, report: DataReport) -> _Splits:
    """Where there is no validation split, a part of the training posts."""
    if "validation" in splits or not group.scored:
        return splits
    train, seed = splits["train"], seed_of(recipe.train.seed, group.name)
    try:
        strata = _strata(group, train)
        held, kept = hold_out(train, fraction=recipe.data.validation_fraction, strata=strata, seed=seed)
    except ValueError as error:
        raise ValueError(
            f"{group.source.key}.path: {group.raw['train'].file} has no validation split beside it, and its {error}. "
            "Add a validation file, or posts, or raise data.validation_fraction."
        ) from error
    how = "stratified by label" if kept else "at random"
    report.notes.append(
        f"data set {group.name}: no validation split; {held.sum():,} of {len(train):,} training posts held out, {how}, "
        f"by train.seed {recipe.train.seed}"
    )
    parts = {"train": train.take(np.flatnonzero(~held)), "validation": train.take(np.flatnonzero(held))}
    return splits | parts


def _strata(group: _Group, posts: PostSplit) -> np.ndarray:
    """A number per post, equal for posts with the same label of the first task that labels whole posts."""
    for name, task in group.tasks.items():
        if group.labels[name] and not kind_of(task.kind).per_token:
            return np.unique([str(value) for value in posts.labels[name]], return_inverse=True)[1]
    return np.zeros(len(posts), dtype=np.int64)


def _limited(group: _Group, splits: _Splits, *, recipe: Recipe) -> _Splits:
    """At most the wanted number of posts in each split."""
    limits = {split: recipe.data.limit_eval for split in splits} | {"train": recipe.data.limit_per_task}
    return {
        split: limited(posts, count=limits[split], seed=seed_of(recipe.train.seed, f"{group.name}/{split}"))
        for split, posts in splits.items()
    }


def _warn_of_repeats(group: _Group, splits: _Splits, report: DataReport) -> None:
    """Validation and test posts that are training posts as well."""
    for split in ("validation", "test"):
        repeated = shared_posts(splits[split], known=splits["train"]) if split in splits else 0
        if repeated:
            report.warnings.append(
                f"data set {group.name}: {repeated:,} of {len(splits[split]):,} {split} posts have the text of a "
                "training post; their scores flatter the model"
            )
