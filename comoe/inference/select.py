"""Which posts to label next: those that the model is least sure of, unlike ones, or any."""

from __future__ import annotations

import hashlib
import heapq
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import islice
from typing import Any

import numpy as np
from sklearn.cluster import KMeans

from comoe.config.errors import unknown_name
from comoe.data.posts import Post
from comoe.data.tokens.tokenize import readable
from comoe.inference.columns import text_problem
from comoe.inference.predictor import Predictor
from comoe.tasks.task import Task

MARGIN, ENTROPY, DIVERSE, RANDOM = STRATEGIES = ("margin", "entropy", "diverse", "random")
"""``--strategy``."""

POOL = 10
"""Of so many times the wanted posts, the least sure ones, ``diverse`` chooses."""

CHUNK = 1024
"""Posts predicted at once."""


def margins(scores_NY: np.ndarray) -> np.ndarray:
    """1 - (the largest probability - the second) of each post, 0 sure to 1.

    Source: Scheffer et al. 2001, "Active hidden Markov models for information extraction".
    """
    top_N2 = np.sort(scores_NY, axis=1)[:, -2:]
    return 1 - (top_N2[:, 1] - top_N2[:, 0])


def entropies(scores_NY: np.ndarray) -> np.ndarray:
    """Entropy of each post's probabilities over that of an even mix, 0 sure to 1."""
    logs_NY = np.log(np.maximum(scores_NY, 1e-300))
    return -(scores_NY * logs_NY).sum(axis=1) / np.log(scores_NY.shape[1])


def unlike(vectors_NM: np.ndarray, weights_N: np.ndarray, count: int, *, seed: int) -> np.ndarray:
    """Rows of ``count`` posts that lie apart: of each of so many clusters the post next to its center.

    Args:
        vectors_NM: embeddings.
        weights_N: how much each post counts for the centers, not negative.
        count: at most N.
        seed: of the clusters.

    Source: weighted k-means of Zhdanov 2019, arXiv:1901.05954.
    """
    found = KMeans(n_clusters=count, n_init=1, random_state=seed).fit(
        vectors_NM, sample_weight=weights_N + 1e-6
    )
    off_N = np.linalg.norm(vectors_NM - found.cluster_centers_[found.labels_], axis=1)
    nearest = {}
    for row in np.argsort(-off_N, kind="stable"):
        nearest[found.labels_[row]] = row
    rows = list(nearest.values())
    # Fewer clusters than wanted, where posts have the same vector: the heaviest others.
    chosen = set(rows)
    others = [row for row in np.argsort(-weights_N, kind="stable") if row not in chosen]
    return np.array(rows + others[: count - len(rows)])


def unsureness(prediction: Mapping[str, Any], task: Task, strategy: str) -> float | None:
    """How unsure a prediction is, 0 to 1; None where a task of its kind does not say."""
    if task.mode == "tokens":
        # The export gives the probability of the chosen tag of each word: the least sure word counts.
        return 1 - min(prediction["scores"], default=1.0)
    if "scores" not in prediction:
        return None
    scores_Y = np.array(list(prediction["scores"].values()), dtype=np.float64)
    if task.rules.exclusive:
        return float((entropies if strategy == ENTROPY else margins)(scores_Y[None])[0])
    if strategy == ENTROPY:
        return float(entropies(np.stack([scores_Y, 1 - scores_Y], axis=1)).mean())
    edges_Y = np.asarray(0.5 if task.thresholds is None else task.thresholds)
    return float(1 - (np.abs(scores_Y - edges_Y) / np.maximum(edges_Y, 1 - edges_Y)).min())


@dataclass(order=True, frozen=True, slots=True)
class Candidate:
    """A post that may be chosen."""

    priority: float
    """The larger, the sooner."""
    order: int
    """Minus its number in the input."""
    post: Post = field(compare=False)
    prediction: Mapping[str, Any] | None = field(compare=False)


@dataclass(frozen=True, slots=True)
class Selection:
    """What was chosen, and of what."""

    chosen: list[Candidate]
    """The first to label first, each with its prediction."""
    seen: int
    """Posts of the input."""
    excluded: int
    """Of them labeled already."""
    repeated: int
    """Of them like an earlier one."""
    unusable: int
    """Of them without a prediction."""


class Selector:
    """Chooses posts to label.

    Args:
        predictor: the model.
        strategy: one of ``STRATEGIES``.
        tasks: names of those to label; None is all.
        seed: of ``random``, and of the clusters of ``diverse``.
        batch_size: posts per forward pass.

    Raises:
        ValueError: no such strategy or task, or none of the tasks says how sure it is.
    """

    def __init__(
        self,
        predictor: Predictor,
        *,
        strategy: str,
        tasks: Sequence[str] | None = None,
        seed: int = 0,
        batch_size: int = 64,
    ) -> None:
        if strategy not in STRATEGIES:
            raise unknown_name("--strategy", strategy, STRATEGIES)
        self.predictor, self.strategy = predictor, strategy
        self.tasks = predictor.choose_tasks(tasks)
        if authors := [task.name for task in self.tasks if task.reads == "author"]:
            raise ValueError(
                f"{', '.join(authors)} is answered for each author, and selection is of posts; choose other tasks."
            )
        self.sure = [task for task in self.tasks if task.labels and task.kind != "text"]
        if strategy == ENTROPY:
            self.sure = [task for task in self.sure if task.mode != "tokens"]
        if strategy in (MARGIN, ENTROPY) and not self.sure:
            names = ", ".join(task.name for task in self.tasks)
            raise ValueError(
                f"--strategy {strategy}: {names} has no probabilities to tell it by; choose diverse or random"
                + (", or margin." if strategy == ENTROPY else ".")
            )
        self._seed, self._batch_size = seed, batch_size
        self._random = np.random.default_rng(seed)

    def identity(self, text: Any, pair: Any = None) -> bytes:
        """The same for posts that the model reads alike."""
        config = self.predictor.exported.data_config
        parts = [
            readable(str(part), config.normalize, config.max_length)[0] if part else ""
            for part in (text, pair)
        ]
        return hashlib.blake2b("\0".join(parts).encode(), digest_size=12).digest()

    def choose(
        self, posts: Iterable[Post], count: int, *, excluded: Iterable[bytes] = (), root: Any = None
    ) -> Selection:
        """The posts to label, from a stream: memory grows with the different posts and with ``count``.

        Args:
            posts: of a file.
            count: posts wanted; fewer are chosen where there are no more.
            excluded: ``identity`` of posts that are labeled already.
            root: folder that paths of images start from.
        """
        excluded, met = frozenset(excluded), set()
        counts = dict.fromkeys(("seen", "excluded", "repeated", "unusable"), 0)

        def fresh() -> Iterator[tuple[int, Post]]:
            for number, post in enumerate(posts):
                counts["seen"] += 1
                if post.error or text_problem(post.text, post.words):
                    counts["unusable"] += 1
                    continue
                identity = self.identity(post.text, post.pair)
                known = (
                    "excluded" if identity in excluded else "repeated" if identity in met else None
                )
                if known:
                    counts[known] += 1
                    continue
                met.add(identity)
                yield number, post

        kept: list[Candidate] = []
        size = count * (POOL if self.strategy == DIVERSE else 1)
        rest = fresh()
        while chunk := list(islice(rest, CHUNK)):
            for candidate in self._candidates(chunk, root):
                if candidate is None:
                    counts["unusable"] += 1
                elif len(kept) < size:
                    heapq.heappush(kept, candidate)
                else:
                    heapq.heappushpop(kept, candidate)
        kept.sort(reverse=True)
        if self.strategy == DIVERSE and len(kept) > count:
            kept = self._unlike(kept, count, root)
        if self.strategy == RANDOM:
            drawn, kept = kept, self._with_predictions(kept, root)
            counts["unusable"] += len(drawn) - len(kept)
        return Selection(kept, **counts)

    def _candidates(self, chunk: list[tuple[int, Post]], root: Any) -> Iterator[Candidate | None]:
        if self.strategy == RANDOM:
            for number, post in chunk:
                yield Candidate(float(self._random.random()), -number, post, None)
            return
        predictions = self._run(self.predictor, [post for _, post in chunk], root)
        for (number, post), prediction in zip(chunk, predictions, strict=True):
            if "error" in prediction:
                yield None
                continue
            found = [unsureness(prediction[task.name], task, self.strategy) for task in self.sure]
            values = [value for value in found if value is not None]
            priority = float(np.mean(values)) if values else float(self._random.random())
            yield Candidate(priority, -number, post, prediction)

    def _unlike(self, kept: list[Candidate], count: int, root: Any) -> list[Candidate]:
        found = self._run(
            self.predictor.embed, [one.post for one in kept], root, task=self.tasks[0].name
        )
        usable = [place for place, one in enumerate(found) if "embedding" in one]
        vectors_NM = np.stack([found[place]["embedding"] for place in usable])
        weights_N = np.array([kept[place].priority for place in usable])
        rows = unlike(vectors_NM, weights_N, min(count, len(usable)), seed=self._seed)
        return sorted((kept[usable[row]] for row in rows), reverse=True)

    def _with_predictions(self, kept: list[Candidate], root: Any) -> list[Candidate]:
        predictions = self._run(self.predictor, [one.post for one in kept], root)
        return [
            Candidate(one.priority, one.order, one.post, prediction)
            for one, prediction in zip(kept, predictions, strict=True)
            if "error" not in prediction
        ]

    def _run(self, method: Any, posts: Sequence[Post], root: Any, **options: Any) -> list[dict]:
        if method is self.predictor:
            options = {"tasks": [task.name for task in self.tasks]}
        return method(
            [post.text for post in posts],
            pairs=[post.pair for post in posts],
            words=[post.words for post in posts],
            images=[post.image for post in posts],
            image_root=root,
            batch_size=self._batch_size,
            **options,
        )
