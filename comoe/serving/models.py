"""The exports that are served: by name and revision, each with its queue, and replaced while requests run."""

from __future__ import annotations

import hashlib
import logging
import threading
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from comoe.inference.checkpoint_folder import MANIFEST
from comoe.inference.explain import GRADIENTS, METHODS
from comoe.inference.export_config import CONFIG, WEIGHTS, export_name, read_export_config
from comoe.inference.predictor import Predictor
from comoe.serving.batcher import Batcher
from comoe.serving.limits import Limits
from comoe.serving.messages import texts_in
from comoe.serving.metrics import Metrics
from comoe.tasks.task import Task

PREDICT, EMBED = "predict", "embed"
"""What a model is asked for; or a method of ``comoe.inference.explain.METHODS``."""

GRADIENT_COST = 100
"""Forward passes that take as long as explaining one task of a post by gradients, about."""

LOG = logging.getLogger("comoe.serving")

BYTES_PER_TOKEN = 3
"""Of UTF-8: a Chinese character, or three letters, which is less than most tokens have. Decides how
many posts are taken at once; a forward pass is then cut by the tokens that they turn out to
have."""


@dataclass(frozen=True, slots=True)
class Source:
    """Where a model lies."""

    name: str
    folder: Path


def read_source(word: str) -> Source:
    """``[NAME=]FOLDER``, or a folder with = in its name; the name of an export in a run folder is that of the run.

    Raises:
        ValueError: an empty name or folder.
    """
    name, equals, folder = word.partition("=")
    if not equals or Path(word).is_dir():
        name, equals, folder = "", "", word
    path = Path(folder)
    if not folder or (equals and not name):
        raise ValueError(f"{word!r} names no export; give FOLDER or NAME=FOLDER.")
    return Source(name or export_name(path), path)


def revision_of(folder: Path) -> str:
    """Twelve hexadecimal digits of an export's content: of its manifest, which has the digest of every file.

    Raises:
        ValueError: no export there.
    """
    read_export_config(folder)
    digest = hashlib.sha256()
    if (folder / MANIFEST).is_file():
        digest.update((folder / MANIFEST).read_bytes())
    else:  # older versions wrote none
        for name in (CONFIG, WEIGHTS):
            with (folder / name).open("rb") as file:
                digest.update(hashlib.file_digest(file, "sha256").digest())
    return digest.hexdigest()[:12]


def _stamps(folder: Path) -> list[tuple[str, int, int]]:
    """(path, bytes, nanoseconds of its last change) of every file."""
    found = ((path, path.stat()) for path in folder.rglob("*"))
    return sorted((str(path), stat.st_size, stat.st_mtime_ns) for path, stat in found)


class Served:
    """One revision of one model."""

    def __init__(self, source: Source, revision: str, predictor: Predictor, batcher: Batcher):
        self.source, self.revision = source, revision
        self.predictor, self.batcher = predictor, batcher

    @property
    def reads_images(self) -> bool:
        """Whether its posts may have images."""
        return self.predictor.collator.pixels is not None

    def tokens(
        self, post: Mapping[str, Any], rows: int, what: str = PREDICT, tasks: Sequence[Task] = ()
    ) -> int:
        """About the tokens of a post in a batch of so many rows per post, or what takes as long.

        By gradients each of ``tasks`` with a head on the whole post is explained on its own.
        """
        texts = texts_in(post["text"], post["pair"], post["words"])
        size = sum(len(text.encode()) for text in texts)
        config = self.predictor.exported.data_config
        longest = config.max_length
        if any(isinstance(post[field], list) for field in ("text", "pair")):
            longest *= config.max_posts
        if what == GRADIENTS:
            rows += GRADIENT_COST * sum(task.mode in METHODS[GRADIENTS] for task in tasks)
        return rows * (2 + min(size // BYTES_PER_TOKEN, longest))

    def describe(self) -> dict[str, Any]:
        """What ``/v1/tasks`` says of it."""
        tasks = [
            {"name": task.name, "kind": task.kind, "labels": list(task.labels), "explained": task.mode == "pooled"}
            for task in self.predictor.tasks
        ]  # fmt: skip
        return {
            "model": self.source.name,
            "revision": self.revision,
            "reads_images": self.reads_images,
            "max_tokens": self.predictor.exported.data_config.max_length,
            "tasks": tasks,
        }


def _predict(
    predictor: Predictor, key: tuple, posts: Sequence[Mapping[str, Any]], tokens: int
) -> list[dict[str, Any]]:
    """What the thread of a model does: ``key`` is (what to do, names of tasks)."""
    what, names = key
    columns = {
        f"{name}s" if name != "words" else name: [post[name] for post in posts]
        for name in ("text", "pair", "words", "image")
    }
    texts = columns.pop("texts")
    options: dict[str, Any] = {"batch_size": len(posts), "batch_tokens": tokens}
    if what == EMBED:
        results = predictor.embed(texts, **columns, task=names and names[0], **options)
    else:
        results = predictor(
            texts, **columns, tasks=names, explain=what in METHODS and what, **options
        )
    for result in results:
        result.pop("text", None)
        if "embedding" in result:
            result["embedding"] = result["embedding"].tolist()
    return results


class Models:
    """All served models.

    Args:
        sources: several of one name are revisions of it, of which the last answers where a request
            names none.
        limits: of each model's queue.
        metrics: counts.
        options: device, verify, backend and threads of ``Predictor.from_pretrained``.

    Raises:
        ValueError: an export that cannot be read.
    """

    def __init__(
        self,
        sources: Sequence[Source],
        *,
        limits: Limits,
        metrics: Metrics,
        **options: Any,
    ) -> None:
        self.limits, self.metrics = limits, metrics
        self._options = options
        self._reloading = threading.Lock()
        self._tried: dict[int, Any] = {}
        self._served: list[Served] = []
        for source in sources:
            self._served.append(self._load(source, revision_of(source.folder)))
        self._count()

    def __iter__(self) -> Iterable[Served]:
        return iter(self._served)

    def find(self, name: str | None, revision: str | None) -> Served:
        """The last that fits; without a name the first model.

        Raises:
            LookupError: none fits; the message names those there are.
        """
        name = self._served[0].source.name if name is None else name
        named = [one for one in self._served if one.source.name == name]
        if not named:
            names = ", ".join(dict.fromkeys(one.source.name for one in self._served))
            raise LookupError(f"There is no such model; there are: {names}")
        for one in reversed(named):
            if revision in (None, one.revision):
                return one
        there = ", ".join(one.revision for one in named)
        raise LookupError(f"{name} has no such revision; it has: {there}")

    def ready(self) -> bool:
        """Whether every model works."""
        return all(one.batcher.alive() for one in self._served)

    def reload(self, *, retry: bool = True) -> None:
        """Load what has changed on disk; a new revision takes over when it is ready, the old one finishes its queue.

        One that cannot be loaded changes nothing and is logged. May be called on any thread.

        Args:
            retry: load a revision again that failed the last time, and whose files are the same.
        """
        with self._reloading:
            for place, old in enumerate(self._served):
                try:
                    revision = revision_of(old.source.folder)
                    if revision == old.revision:
                        continue
                    # A folder that is still being copied may have the new manifest before the weights.
                    found = (revision, _stamps(old.source.folder))
                    if not retry and found == self._tried.get(place):
                        continue
                    self._tried[place] = found
                    new = self._load(old.source, revision)
                except Exception as error:  # a lack of memory too
                    self.metrics.reloads.labels(old.source.name, "failed").inc()
                    kind = type(error).__name__
                    LOG.warning(
                        "%s stays at %s: %s: %s", old.source.name, old.revision, kind, error
                    )
                    continue
                self._served[place] = new
                self._count()
                self.metrics.reloads.labels(old.source.name, "loaded").inc()
                LOG.info("%s: %s takes over from %s", old.source.name, revision, old.revision)
                old.batcher.close()

    def close(self) -> None:
        """Finish what waits, and end the threads."""
        for one in self._served:
            one.batcher.close()

    def _load(self, source: Source, revision: str) -> Served:
        predictor = Predictor.from_pretrained(source.folder, **self._options)
        if revision_of(source.folder) != revision:
            raise ValueError(f"{source.folder} was replaced while it was read; it is read again.")
        batcher = Batcher(
            lambda key, posts: _predict(predictor, key, posts, self.limits.batch_tokens),
            limits=self.limits,
            done=lambda work: self.metrics.batch(source.name, work),
        )
        return Served(source, revision, predictor, batcher)

    def _count(self) -> None:
        self.metrics.served.clear()
        for one in self._served:
            self.metrics.served.labels(one.source.name, one.revision).set(1)
        for name in {one.source.name for one in self._served}:
            mine = [one for one in self._served if one.source.name == name]
            self.metrics.queue.labels(name).set_function(
                lambda mine=mine: sum(one.batcher.waiting() for one in mine)
            )
