"""What exports say of posts, as soft labels: computed once, shared over the ranks, kept on disk by content.

A cache folder belongs to one export (the hash of its files, and the precision it runs in) and holds
chunks of posts, each under the hash of the posts in it. So other runs with the same teacher compute
only the posts that are new, and a computation that was interrupted goes on at the next chunk.
"""

from __future__ import annotations

import hashlib
import json
import time
import zipfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from tqdm import tqdm

from comoe.config.errors import nearest
from comoe.config.files import cache_file
from comoe.config.recipe import DistillConfig
from comoe.data.posts import PostSplit
from comoe.data.sampling.sampler import eval_batches
from comoe.data.soft_labels import SoftLabels, mean_of
from comoe.data.text.normalize import VERSION
from comoe.data.tokens.split import TokenizedSplit
from comoe.distributed import all_gather_objects, is_main, rank, world_size
from comoe.inference.checkpoint_folder import CARD
from comoe.inference.export_config import read_export_config
from comoe.inference.predictor import Predictor
from comoe.tasks.labels import split_words
from comoe.tasks.task import Task

FORMAT = 1
"""Changes when the arrays of a cache file, or what a teacher is asked, mean something else."""

CHUNK = 2048
"""Posts per file of the cache, and between two looks at it after an interruption."""

BATCH = 64
"""Posts per forward pass."""

DISTILLED = ("train", "validation")
"""Splits that teachers are asked about."""


@dataclass(frozen=True, slots=True)
class Teacher:
    """An export that knows some tasks of a student; its weights are read when they are needed."""

    folder: Path
    """The export."""
    tasks: Mapping[str, Task]
    """What it can say of a post: task -> as its own."""
    columns: Mapping[str, Sequence[int]]
    """Task of the student -> its labels among those of the teacher."""

    @property
    def words(self) -> bool:
        """Whether it must see posts cut into words."""
        config = read_export_config(self.folder)
        return any(t.mode == "tokens" for t in self.tasks.values()) or bool(config.get("as_words"))


def find_teachers(config: DistillConfig, tasks: Sequence[Task]) -> tuple[Teacher, ...]:
    """The teachers of a recipe, checked against the student's tasks; no weights are read.

    Args:
        config: ``distill`` of the recipe.
        tasks: of the student.

    Raises:
        ValueError: no export there, a teacher that knows no task of the student, a task of
            ``distill.tasks`` that no teacher knows, or labels or kinds that differ.
    """
    wanted = [task for task in tasks if task.name in config.tasks or not config.tasks]
    teachers = tuple(_find_teacher(folder, wanted) for folder in config.teachers)
    known = {name for teacher in teachers for name in teacher.columns}
    for name in config.tasks:
        if teachers and name not in known:
            raise ValueError(
                f"distill.tasks names {name}, but no teacher knows a task of that name; leave it "
                "out: it is learned from its gold labels."
            )
    return teachers


def _find_teacher(path: str, wanted: Sequence[Task]) -> Teacher:
    folder = Path(path).expanduser()
    try:
        config = read_export_config(folder)
    except ValueError as error:
        raise ValueError(f"distill.teachers: {error}") from error
    own = {plain["name"]: Task.from_dict(plain) for plain in config["tasks"]}
    own = {name: task for name, task in own.items() if task.rules.soft}
    columns = {
        task.name: _columns(folder, own[task.name], task) for task in wanted if task.name in own
    }
    if not columns:
        names = ", ".join(own) or "none"
        guess = next((found for task in wanted if (found := nearest(task.name, own))), None)
        hint = (
            f" (Is {guess} the task that is meant? A task is known by its name.)" if guess else ""
        )
        raise ValueError(
            f"distill.teachers: {folder} knows {names}, which are no tasks of this run "
            f"({', '.join(task.name for task in wanted)}); leave it out, or name the tasks alike.{hint}"
        )
    return Teacher(folder, own, columns)


def _columns(folder: Path, own: Task, student: Task) -> list[int]:
    """Places of the student's labels among the teacher's, whatever their order there."""
    place = f"distill.teachers: {folder} knows task {own.name}"
    if own.rules.soft != student.rules.soft:
        raise ValueError(
            f"{place} as kind {own.kind} ({own.rules.soft}), but tasks.{student.name}.kind is {student.kind} "
            f"({student.rules.soft or 'without soft labels'}); leave the task to its gold labels "
            "with distill.tasks, or take another teacher."
        )
    if set(own.labels) != set(student.labels):
        raise ValueError(
            f"{place} with the labels {', '.join(own.labels)}, but here it has {', '.join(student.labels)}; give "
            f"tasks.{student.name}.labels these names, or leave the task to its gold labels with distill.tasks."
        )
    return [own.labels.index(label) for label in student.labels] or [0]


def soft_labels_of(
    config: DistillConfig,
    teachers: Sequence[Teacher],
    posts: PostSplit,
    *,
    device: torch.device,
    bf16: bool = False,
    cache_dir: Path | None = None,
    progress: bool = True,
) -> dict[str, SoftLabels]:
    """Task of the student -> the mean of what the teachers that know it say of each post. Every rank must call it.

    Args:
        config: ``distill`` of the recipe.
        teachers: of ``find_teachers``.
        posts: raw.
        device: where the teachers run.
        bf16: the teachers' weights in bfloat16.
        cache_dir: folder of all caches; None keeps nothing.
        progress: show a bar, and print what was done.
    """
    found: dict[str, list[SoftLabels]] = {}
    for teacher in teachers:
        known = _Known(teacher, bf16=bf16, cache_dir=cache_dir)
        keys = post_keys(posts, words=teacher.words)
        began, missing = time.perf_counter(), known.missing(keys)
        if missing:
            known.compute(missing, keys, posts, device=device, progress=progress)
        if progress and is_main():
            seconds = time.perf_counter() - began
            print(
                f"teacher {teacher.folder}: {len(set(keys)):,} posts, {len(missing):,} of them computed"
                + (f" ({len(missing) / seconds:,.0f} posts/s)" if missing else "")
            )
        for name, columns in teacher.columns.items():
            found.setdefault(name, []).append(known.of(keys, name).permuted(columns))
    return {name: mean_of(parts) for name, parts in found.items()}


def post_keys(posts: PostSplit, *, words: bool) -> list[bytes]:
    """A hash of all that a teacher reads of each post; ``words``: of the words that it is cut into too."""
    return [
        hashlib.sha256(
            json.dumps([text, [*(cut or ())] if words else None, pair, _image_key(image)]).encode()
        ).digest()
        for text, cut, pair, image in zip(
            posts.texts, posts.words, posts.pairs, posts.images, strict=True
        )
    ]


def _image_key(image: bytes | str | None) -> Any:
    if image is None:
        return None
    if isinstance(image, bytes):
        return hashlib.sha256(image).hexdigest()
    found = Path(image).stat()
    return [str(Path(image).resolve()), found.st_size, found.st_mtime_ns]


@dataclass
class _Known:
    """What is known of one teacher: its cache, and what has been computed since."""

    teacher: Teacher
    bf16: bool
    cache_dir: Path | None
    places: dict[bytes, int] = field(default_factory=dict)
    parts: dict[str, list[SoftLabels]] = field(default_factory=dict)

    def __post_init__(self) -> None:
        self.parts = {name: [] for name in self.teacher.tasks}
        if self.cache_dir is None:
            return
        self.cache_dir = self.cache_dir / export_key(self.teacher.folder, bf16=self.bf16)
        for path in sorted(self.cache_dir.glob("*.npz")):
            self._add(_load(path, self.teacher.tasks))

    def missing(self, keys: Sequence[bytes]) -> list[int]:
        """The first post of each key that some rank does not know, ascending; the same on every rank."""
        first = {key: post for post, key in reversed([*enumerate(keys)])}
        mine = sorted(post for key, post in first.items() if key not in self.places)
        # Machines may have caches of their own.
        return sorted({post for share in all_gather_objects(mine) for post in share})

    def compute(
        self,
        missing: Sequence[int],
        keys: Sequence[bytes],
        posts: PostSplit,
        *,
        device: torch.device,
        progress: bool,
    ) -> None:
        """Ask the teacher about posts, each rank about some chunks of them, and tell all ranks."""
        predictor = Predictor.from_pretrained(self.teacher.folder, device=str(device))
        if self.bf16:
            # As DeepSpeed trains it; what must stay float32 (the gates) does.
            predictor.exported.model.bfloat16()
        # Alike in length, so that ranks take about as long, and little is padding.
        order = sorted(missing, key=lambda post: (len(posts.texts[post]), post))
        chunks = [order[start : start + CHUNK] for start in range(0, len(order), CHUNK)]
        mine = chunks[rank() :: world_size()]
        made = []
        with tqdm(
            total=sum(map(len, mine)),
            desc=f"teacher {self.teacher.folder.name}",
            unit="post",
            dynamic_ncols=True,
            disable=not (progress and is_main()),
        ) as bar:
            for chunk in mine:
                some = posts.take(np.array(chunk))
                soft = ask(predictor, some, self.teacher, done=bar.update)
                made.append(([keys[post] for post in chunk], soft))
                self._save(*made[-1])
        for share in all_gather_objects(made):
            for found in share:
                self._save(*found)
                self._add(found)

    def of(self, keys: Sequence[bytes], name: str) -> SoftLabels:
        """The soft labels of posts for one task."""
        return SoftLabels.join(self.parts[name]).take(np.array([self.places[key] for key in keys]))

    def _add(self, found: tuple[Sequence[bytes], Mapping[str, SoftLabels]] | None) -> None:
        if found is None:
            return
        keys, soft = found
        start = sum(map(len, next(iter(self.parts.values()))))
        for place, key in enumerate(keys):
            self.places.setdefault(key, start + place)
        for name, labels in soft.items():
            self.parts[name].append(labels)

    def _save(self, keys: Sequence[bytes], soft: Mapping[str, SoftLabels]) -> None:
        if self.cache_dir is None:
            return
        path = self.cache_dir / f"{hashlib.sha256(b''.join(keys)).hexdigest()[:32]}.npz"
        if _load(path, self.teacher.tasks) is not None:
            return
        arrays = {"posts": np.frombuffer(b"".join(keys), dtype=np.uint8).reshape(-1, 32)}
        for name, labels in soft.items():
            arrays |= {f"{name}.values": labels.values_RY, f"{name}.offsets": labels.offsets}
        with cache_file(path) as file:
            np.savez(file, **arrays)


def export_key(folder: Path, *, bf16: bool) -> str:
    """Hash of all that decides what an export says: its files but the card, and how it is run."""
    digest = hashlib.sha256(json.dumps([FORMAT, VERSION, bf16]).encode())
    for path in sorted(folder.iterdir()):
        if path.is_file() and path.name != CARD:
            with path.open("rb") as file:
                digest.update(path.name.encode() + hashlib.file_digest(file, "sha256").digest())
    return digest.hexdigest()[:32]


def _load(
    path: Path, tasks: Mapping[str, Task]
) -> tuple[list[bytes], dict[str, SoftLabels]] | None:
    """A file of the cache, None where there is none or it is damaged."""
    try:
        with np.load(path, allow_pickle=False) as stored:
            keys = [row.tobytes() for row in stored["posts"]]
            soft = {
                name: SoftLabels(stored[f"{name}.values"], stored[f"{name}.offsets"])
                for name in tasks
            }
    except (OSError, zipfile.BadZipFile, EOFError, KeyError, ValueError):
        return None
    whole = all(
        len(labels) == len(keys) and labels.offsets[-1] == len(labels.values_RY)
        for labels in soft.values()
    )
    return (keys, soft) if whole else None


@torch.inference_mode()
def ask(
    predictor: Predictor,
    posts: PostSplit,
    teacher: Teacher,
    *,
    done: Callable[[int], object] = lambda count: None,
) -> dict[str, SoftLabels]:
    """What a teacher says of posts, per task of its own.

    As in ``Predictor``, tasks that were trained on posts cut into words read them so, and the
    others read the text.

    Args:
        predictor: the teacher's.
        posts: raw.
        teacher: names the tasks.
        done: called after each batch with its number of posts.
    """
    cut = [task for name, task in teacher.tasks.items() if name in predictor.as_words]
    whole = [task for name, task in teacher.tasks.items() if name not in predictor.as_words]
    words = [
        list(words or split_words(text))
        for text, words in zip(posts.texts, posts.words, strict=True)
    ]
    rows: dict[str, list[np.ndarray | None]] = {name: [None] * len(posts) for name in teacher.tasks}
    passes = [(tasks, seen) for tasks, seen in ((whole, None), (cut, words)) if tasks]
    for turn, (tasks, seen) in enumerate(passes):
        split = _tokenized(predictor, posts, tasks, seen)
        for indices in eval_batches(split.lengths, batch_size=BATCH):
            for name, post, values in _of_batch(predictor, split, indices, tasks):
                rows[name][post] = values
            if turn == 0:
                done(len(indices))
    return {
        name: SoftLabels.from_rows(rows[name], width=task.rules.num_outputs(task.labels))
        for name, task in teacher.tasks.items()
    }


def _tokenized(
    predictor: Predictor,
    posts: PostSplit,
    tasks: Sequence[Task],
    words: Sequence[Sequence[str]] | None,
) -> TokenizedSplit:
    collator, exported = predictor.collator, predictor.exported
    split = collator.encode_texts(
        posts.texts,
        posts.pairs,
        words,
        images=None if collator.pixels is None else posts.images,
        config=exported.data_config,
        asked=tasks,
    )
    # Where a row serves one task, the collator makes rows for labeled ones only.
    split.labelled[:, [exported.tasks.index(task) for task in tasks]] = True
    return split


def _of_batch(
    predictor: Predictor, split: TokenizedSplit, indices: np.ndarray, tasks: Sequence[Task]
) -> Iterator[tuple[str, int, np.ndarray]]:
    """(task, post, its rows) of some posts."""
    batch = predictor.collator(split, indices)
    output = predictor.exported.model(batch.to(predictor.device))
    for task in tasks:
        mine_B = task.rules.serves(batch.task_ids_B, predictor.exported.tasks.index(task))
        places = (mine_B & (batch.row_ids_B >= 0)).nonzero()[:, 0].tolist()
        found = task.rules.outputs(output, batch, places, task=task)
        soft = task.rules.soft_labels(task.rules.stack(found, task)[0], task).numpy()
        for one, values in zip(found, soft, strict=True):
            rows = values[: len(one.logits)] if task.mode == "tokens" else values[None]
            yield task.name, one.row, rows
