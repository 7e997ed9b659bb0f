"""Kinds whose head labels each word: tags, and phrases that are found in the post."""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from comoe.deferred import Deferred
from comoe.tasks.kinds.base import (
    Kind,
    PostOutput,
    TaskLike,
    class_loss,
    class_units,
    per_class,
    tempered,
)
from comoe.tasks.labels import OUTSIDE, is_missing, label_id, label_name, natural_order, split_words
from comoe.tasks.metrics import METRICS, class_scores, confusion, entities
from comoe.types import IGNORED

if TYPE_CHECKING:
    import torch
    from torch import Tensor
else:
    torch = Deferred("torch")

SPAN_METRICS = ("span_f1", "span_precision", "span_recall")


class Tags(Kind):
    """One label per word: cross-entropy on the first piece of each word.

    A cell is a list of tags, or a text with blanks between them. Parsed: list of ids, one per word;
    a word whose tag is missing has IGNORED and is neither learned nor scored. Alike: two dropout
    views of one post, if the recipe asks.
    """

    mode = "tokens"
    min_labels = 2
    soft = "a label of each word"
    metrics = (*SPAN_METRICS, "accuracy", "macro_precision", "macro_recall", "macro_f1", "micro_f1")

    def discover(self, values: Iterable[object]) -> tuple[str, ...]:
        tags = (tag for value in values for tag in _tags_of(value) or ())
        return natural_order(label_name(tag) for tag in tags if not is_missing(tag))

    def parse(self, value: object, labels: Sequence[str]) -> list[int] | None:
        tags = _tags_of(value)
        return (
            None
            if tags is None
            else [IGNORED if is_missing(tag) else label_id(tag, labels) for tag in tags]
        )

    def fitted(self, parsed: list[int], words: Sequence[str]) -> list[int]:
        if len(parsed) != len(words):
            raise ValueError(f"{len(parsed)} tags for {len(words)} words; give one tag per word.")
        return parsed

    def at_tokens(
        self, value: Sequence[int], word_ids_L: np.ndarray, word_starts_L: np.ndarray
    ) -> np.ndarray:
        ids_L = np.full(len(word_ids_L), IGNORED, dtype=np.int64)
        ids_L[word_starts_L] = np.asarray(value, dtype=np.int64)[word_ids_L[word_starts_L]]
        return ids_L

    def collate(
        self, values: Sequence[Sequence[int] | None], *, labels: Sequence[str], length: int
    ) -> Tensor:
        """``values`` hold one id per token here, IGNORED on all but the first pieces."""
        targets = torch.full((len(values), length), IGNORED, dtype=torch.int64)
        for row, ids in enumerate(values):
            if ids is not None:
                targets[row, : len(ids)] = torch.as_tensor(ids, dtype=torch.int64)
        return targets

    def labelled(self, targets: Tensor) -> Tensor:
        return (targets != IGNORED).any(dim=-1)

    def normalizer(self, targets: Tensor, task: TaskLike) -> Tensor:
        return class_units(targets, task)

    def loss(
        self, logits: Tensor, targets: Tensor, task: TaskLike, weights_B: Tensor | None = None
    ) -> Tensor:
        return class_loss(logits, targets, task, weights_B)

    def collate_soft(
        self, values: Sequence[np.ndarray | None], *, labels: Sequence[str], length: int
    ) -> Tensor:
        """``values`` hold one row per token here, NaN off first pieces."""
        soft = torch.full((len(values), length, len(labels)), math.nan)
        for row, value in enumerate(values):
            if value is not None:
                soft[row, : len(value)] = torch.from_numpy(value)
        return soft

    def decode(self, outputs: Sequence[PostOutput], task: TaskLike) -> list[dict[str, Any]]:
        """``{"tags": [name per word], "scores": [its probability]}``; spans by ``tag_spans``."""
        shown = []
        for output in outputs:
            scores_WY = self.scores([output], task)
            tags = [task.labels[number] for number in scores_WY.argmax(axis=-1).tolist()]
            shown.append({"tags": tags, "scores": scores_WY.max(axis=-1).tolist()})
        return shown

    def gold(self, targets: Iterable[Any], task: TaskLike) -> list[list[str] | None]:
        """The tags of the labeled words of each post."""
        rows = (target.tolist() for target in targets)
        return [[task.labels[i] for i in row if i != IGNORED] or None for row in rows]

    def gold_and_scores(
        self, outputs: Sequence[PostOutput], task: TaskLike
    ) -> tuple[list[np.ndarray], list[np.ndarray]]:
        """Per post with a labeled word: tag ids, (words,), and probabilities, (words, Y)."""
        gold, scores = [], []
        for output in outputs:
            words = np.asarray(output.target) != IGNORED
            if words.any():
                logits = tempered(torch.as_tensor(output.logits), task)[torch.from_numpy(words)]
                gold.append(np.asarray(output.target)[words])
                scores.append(self.probabilities(logits).numpy())
        return gold, scores

    def compared(
        self, rows: Sequence[Mapping[str, Any]], task: TaskLike
    ) -> tuple[list[np.ndarray], list[np.ndarray]]:
        ids = {name: number for number, name in enumerate(task.labels)}
        return tuple(
            [np.array([ids[tag] for tag in row[key]]) for row in rows] for key in ("gold", "tags")
        )

    def decided(self, scores: list[np.ndarray], task: TaskLike) -> list[np.ndarray]:
        return [row.argmax(axis=-1) for row in scores]

    def measure(self, gold: list[np.ndarray], predicted: list[np.ndarray], task: TaskLike) -> float:
        return _measures(gold, predicted, names=(task.metric,), labels=task.labels)[task.metric]

    def score(
        self, gold: list[np.ndarray], scores: list[np.ndarray], task: TaskLike
    ) -> dict[str, float]:
        """Spans over posts, else over words; the baseline predicts "O", else the commonest tag."""
        predicted, labels = self.decided(scores, task), task.labels
        flat_gold, flat_predicted = _joined(gold), _joined(predicted)
        commonest = int(np.bincount(flat_gold, minlength=len(labels)).argmax())
        common = labels.index(OUTSIDE) if OUTSIDE in labels else commonest
        baseline = _measures(
            gold, [np.full_like(row, common) for row in gold], names=(task.metric,), labels=labels
        )
        names = dict.fromkeys((task.metric, *SPAN_METRICS, "accuracy", "macro_f1"))
        return (
            _measures(gold, predicted, names=names, labels=labels)
            | {f"majority/{task.metric}": baseline[task.metric]}
            | per_class(labels, class_scores(flat_gold, flat_predicted, labels))
        )

    def confusion(
        self, gold: list[np.ndarray], scores: list[np.ndarray], task: TaskLike
    ) -> np.ndarray:
        """Counted over words."""
        return confusion(_joined(gold), _joined(self.decided(scores, task)), task.labels)


def tag_spans(tags: Sequence[str], words: Sequence[str]) -> list[dict[str, Any]]:
    """Spans of one post: ``{"type": "PER", "start": word, "end": last word + 1, "text": words}``.

    Read as seqeval reads them, so what is shown is what is scored. Tags without a B-, I-, E- or S-
    prefix are types.
    """
    return [
        {"type": kind, "start": start, "end": end, "text": " ".join(words[start:end])}
        for kind, start, end in entities(tags)
    ]


def _measures(
    gold: Sequence[np.ndarray],
    predicted: Sequence[np.ndarray],
    *,
    names: Iterable[str],
    labels: Sequence[str],
) -> dict[str, float]:
    """Metrics by name: over posts' tag names for spans, over all words' ids otherwise."""
    as_names = tuple([[labels[i] for i in row] for row in rows] for rows in (gold, predicted))
    as_ids = (_joined(gold), _joined(predicted))
    return {
        name: METRICS[name](*(as_names if name in SPAN_METRICS else as_ids), labels)
        for name in names
    }


def _joined(rows: Sequence[np.ndarray]) -> np.ndarray:
    return np.concatenate(rows) if len(rows) else np.zeros(0, dtype=np.int64)


def _tags_of(value: object) -> list[Any] | None:
    """Raw tags in one cell, None when it is missing."""
    if isinstance(value, (list, tuple, np.ndarray)):
        return list(value)
    if is_missing(value):
        return None
    if isinstance(value, str):
        return value.split()
    raise ValueError(
        f"{value!r} is not a list of tags; give one tag per word, as a list or a text with blanks between."
    )


PHRASE_TAGS = (OUTSIDE, "B-phrase", "I-phrase")
"""Labels of every such task, in the order of their ids."""


_CORE = re.compile(r"\w(?:.*\w)?", flags=re.DOTALL)


class NotInPost(ValueError):
    """A phrase that does not occur in its post."""


class Phrases(Tags):
    """Tags that are made of phrases: begin and inside of each phrase, outside elsewhere.

    A cell is a phrase that occurs in the post, or a list of them; upper and lower case count as
    equal, and so do signs around words. Every occurrence of a phrase is marked. Words that stand
    apart in the post ("slow crashes" in "slow to boot and often crashes") are marked in pieces, in
    their order, the longest pieces first. An empty text is a missing label, an empty list says that
    the post has no such phrase. Parsed: the phrases; fitted: one id per word.
    """

    def discover(self, values: Iterable[object]) -> tuple[str, ...]:
        return PHRASE_TAGS if any(_phrases_of(value) is not None for value in values) else ()

    def parse(self, value: object, labels: Sequence[str]) -> list[str] | None:
        if labels and tuple(labels) != PHRASE_TAGS:
            raise ValueError(
                f"a task of kind phrases has the labels {', '.join(PHRASE_TAGS)}; leave its labels out"
            )
        return _phrases_of(value)

    def fitted(self, parsed: list[str], words: Sequence[str]) -> list[int]:
        ids = [0] * len(words)
        # Words of signs alone are stepped over: a comma within a phrase must not hide it.
        places = [(place, folded) for place, word in enumerate(words) if (folded := _folded(word))]
        for phrase in parsed:
            # Phrases often come from a treebank, which writes "do n't".
            plain = phrase.replace(" n't", "n't")
            wanted = [folded for word in split_words(plain) if (folded := _folded(word))]
            spans = _found(wanted, [folded for _, folded in places])
            if not spans:
                raise NotInPost(
                    f"{phrase!r} is not in the post; give words of it as they are written there."
                )
            for first, last in spans:
                begin, end = places[first][0], places[last][0]
                ids[begin : end + 1] = [1] + [2] * (end - begin)
        return ids


def word_splitter(kinds: Iterable[Kind]) -> Callable[[str], list[str]] | None:
    """What cuts posts into words for tasks of these kinds; None where none of them labels words.

    Tags are given for the words between blanks, so they have the last say. For phrases alone signs
    stand apart from words, as prediction splits a plain text.
    """
    cutting = [kind for kind in kinds if kind.mode == "tokens"]
    if not cutting:
        return None
    return split_words if all(isinstance(kind, Phrases) for kind in cutting) else str.split


def _found(wanted: Sequence[str], words: Sequence[str]) -> list[tuple[int, int]]:
    """(first, last) word of every occurrence, or of its pieces; none where a word is missing."""
    if whole := list(_runs(wanted, words)):
        return whole
    spans: list[tuple[int, int]] = []
    places: dict[str, list[int]] = {}
    for place, word in enumerate(words):
        places.setdefault(word, []).append(place)
    done, after = 0, 0
    while done < len(wanted):
        firsts = places.get(wanted[done], ())
        sizes = [_alike(wanted, done, words, first) for first in firsts]
        if not sizes:
            return []
        longest = [first for first, size in zip(firsts, sizes, strict=True) if size == max(sizes)]
        # The words of a phrase are usually given in the order of the post.
        first = next((place for place in longest if place >= after), longest[0])
        after = first + max(sizes)
        spans.append((first, after - 1))
        done += max(sizes)
    return spans


def _alike(wanted: Sequence[str], start: int, words: Sequence[str], first: int) -> int:
    """How many words from ``start`` on stand in the post from ``first`` on."""
    size, most = 0, min(len(wanted) - start, len(words) - first)
    while size < most and wanted[start + size] == words[first + size]:
        size += 1
    return size


def _runs(wanted: Sequence[str], words: Sequence[str]) -> Iterator[tuple[int, int]]:
    """(first, last) of each place where the wanted words stand side by side."""
    size = len(wanted)
    for first in range(len(words) - size + 1 if size else 0):
        if _alike(wanted, 0, words, first) == size:
            yield first, first + size - 1


def _folded(word: str) -> str:
    core = _CORE.search(word)
    return core[0].casefold() if core else ""


def _phrases_of(value: object) -> list[str] | None:
    """The phrases in one cell, None when it is missing."""
    if isinstance(value, (list, tuple, np.ndarray)):
        items = [item for item in value if not is_missing(item)]
    elif is_missing(value):
        return None
    else:
        items = [value]
    for item in items:
        if not isinstance(item, str):
            raise ValueError(
                f"{item!r} is no phrase; give words of the post, as one text or a list of texts"
            )
    return [str(item) for item in items]
