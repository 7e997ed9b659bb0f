"""Posts that are longer than the model reads: cut, refused, or read in windows whose logits are merged."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Container, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np

from comoe.config.errors import unknown_name
from comoe.config.recipe import DataConfig
from comoe.data.tokens.split import TokenizedSplit
from comoe.data.tokens.tokenize import readable
from comoe.inference.columns import Posts
from comoe.inference.forward import Forward, put_prediction, with_spans
from comoe.inference.passes import forward_passes, task_passes
from comoe.tasks.kinds.base import PostOutput
from comoe.tasks.labels import WORD
from comoe.tasks.task import Task

MODES = ("cut", "windows", "error")
"""``--long``: what becomes of a long post."""
MERGES: dict[str, Callable[..., np.ndarray]] = {"mean": np.mean, "max": np.max}
"""``--long-scores`` -> how the logits of windows become those of the post."""
LEAST = 4
"""Tokens that a window must have for the post itself; a second text or prompt may leave less."""
_ALL = 1_000_000


@dataclass(frozen=True, slots=True)
class LongPosts:
    """What becomes of posts that have more tokens than the model reads.

    Raises:
        ValueError: an unknown word, or a number out of range.
    """

    mode: str = "cut"
    """``cut``: what is behind the limit is not read; ``windows``: all is read, in windows;
    ``error``: the post has an error."""
    scores: str = "mean"
    """How the logits of windows are merged: ``mean`` or ``max``, label by label."""
    overlap: int | None = None
    """Tokens that neighboring windows share, to the next word; None is a quarter of a window."""

    def __post_init__(self) -> None:
        if self.mode not in MODES:
            raise unknown_name("--long", self.mode, MODES)
        if self.scores not in MERGES:
            raise unknown_name("--long-scores", self.scores, MERGES)
        if self.overlap is not None and self.overlap < 0:
            raise ValueError(f"--long-overlap is {self.overlap}; it must be at least 0.")
        if self.overlap is not None and self.mode != "windows":
            raise ValueError(
                f"--long-overlap {self.overlap} is of windows; give --long windows, or leave it out."
            )

    def check_overlap(self, size: int) -> None:
        """ValueError where neighbors of windows of ``size`` tokens would share all of them."""
        if self.overlap is not None and self.overlap >= size:
            raise ValueError(
                f"--long-overlap is {self.overlap}; it must be below the {size} tokens of a window."
            )


@dataclass(frozen=True, slots=True)
class LongText:
    """A post as words that can be taken apart."""

    text: str
    """The post."""
    words: Sequence[str] | None
    """Its words where the model reads words; None where it reads the text."""
    spans: Sequence[tuple[int, int]]
    """Beginning and end of each word in the text, of a post that is read as text."""
    pair: str | None
    """Second text."""

    @classmethod
    def of(cls, text: str, words: Sequence[str] | None, pair: str | None) -> LongText:
        """A post as a pass reads it."""
        spans = () if words is not None else [found.span() for found in WORD.finditer(text)]
        return cls(text, words, spans, pair)

    def units(self) -> list[str]:
        """The words."""
        return list(self.words or ()) or [self.text[a:b] for a, b in self.spans]

    def between(self, part: Part) -> tuple[str, list[str] | None]:
        """Text, and words where it is read so, of a window."""
        start, end = part.start, part.end
        if self.words is not None:
            return " ".join(self.words[start:end]), list(self.words[start:end])
        return self.text[self.spans[start][0] : self.spans[end - 1][1]], None


@dataclass(frozen=True, slots=True)
class Part:
    """A window of a long post."""

    post: int
    """Number of the post among the long ones."""
    start: int
    """Its first word."""
    end: int
    """Its last word + 1."""

    def halves(self) -> list[Part]:
        """Two windows with half of the words each."""
        middle = (self.start + self.end) // 2
        return [replace(self, end=middle), replace(self, start=middle)]


def bounds(sizes: Sequence[int], *, room: int, overlap: int) -> list[tuple[int, int]]:
    """(first word, last word + 1) of the windows of a post.

    Args:
        sizes: tokens of each word.
        room: tokens of a window.
        overlap: tokens that a window shares with the one before, at most; they may be fewer by a
            part of a word.
    """
    ends = np.cumsum(sizes)
    starts = ends - np.asarray(sizes)
    found, first = [], 0
    while True:
        end = max(first + 1, int(np.searchsorted(ends, starts[first] + room, side="right")))
        found.append((first, end))
        if end >= len(ends):
            return found
        shared = int(np.searchsorted(starts, ends[end - 1] - overlap, side="left"))
        first = max(first + 1, min(end, shared))


def make_parts(
    posts: Sequence[LongText],
    long: LongPosts,
    *,
    tokenizer: Any,
    config: DataConfig,
    room: int | None,
) -> list[Part]:
    """The windows of some posts, in their order; the whole post where its second text leaves no room.

    Args:
        posts: long ones.
        long: how they overlap.
        tokenizer: of the model.
        config: its longest post, and how posts are cleaned.
        room: tokens that the prompts of tasks in decoder mode leave; None where there are none.
    """
    prompt = 0 if room is None else config.max_length - room
    parts = []
    for number, post in enumerate(posts):
        fixed = max(tokenizer.num_special_tokens_to_add(pair=bool(post.pair)), prompt)
        if post.pair:
            fixed += len(tokenizer(post.pair, add_special_tokens=False)["input_ids"])
        room = config.max_length - fixed
        units, _ = readable(post.units(), config.normalize, _ALL)
        if room < LEAST or len(units) < 2:
            parts.append(Part(number, 0, len(units)))
            continue
        ids = tokenizer(list(units), add_special_tokens=False)["input_ids"]
        sizes = [max(1, len(some)) for some in ids]
        shared = room // 4 if long.overlap is None else min(long.overlap, room // 2)
        parts += [Part(number, a, b) for a, b in bounds(sizes, room=room, overlap=shared)]
    return parts


def encode_parts(
    posts: Sequence[LongText],
    parts: list[Part],
    encode: Callable[[Sequence[Part]], TokenizedSplit],
) -> tuple[list[Part], TokenizedSplit]:
    """The windows as tokens; those that are still too long, as words joined take more tokens, are halved."""
    while True:
        split = encode(parts)
        cut = split.cut
        again = {i for i, part in enumerate(parts) if cut[i] and _divides(posts, part)}
        if not again:
            return parts, split
        parts = [
            half
            for i, part in enumerate(parts)
            for half in (part.halves() if i in again else [part])
        ]


def _divides(posts: Sequence[LongText], part: Part) -> bool:
    whole = part.end - part.start == len(posts[part.post].units())
    return part.end - part.start > 1 and not whole


def parts_by_post(parts: Sequence[Part]) -> dict[int, list[int]]:
    """Post -> numbers of its windows."""
    found: dict[int, list[int]] = {}
    for number, part in enumerate(parts):
        found.setdefault(part.post, []).append(number)
    return found


def merge(
    parts: Sequence[Part], outputs: Sequence[PostOutput], long: LongPosts, *, per_word: bool
) -> tuple[Any, list[int]]:
    """The logits of one post for one task, and the numbers of the words that they are for, if they are.

    Args:
        parts: its windows.
        outputs: of them.
        long: how they are merged.
        per_word: whether a row of the logits is a word; each word has those of the window in which it
            stands farthest from an edge.
    """
    if not isinstance(outputs[0].logits, np.ndarray):
        # A free text cannot be merged: it is that of the first window.
        return outputs[0].logits, []
    if not per_word:
        return MERGES[long.scores]([output.logits for output in outputs], axis=0), []
    best: dict[int, tuple[int, np.ndarray]] = {}
    last = parts[-1].end
    for part, output in zip(parts, outputs, strict=True):
        for word, logits_Y in enumerate(output.logits, start=part.start):
            # The edges of the post itself hide nothing.
            left = word - part.start if part.start else last
            right = part.end - 1 - word if part.end < last else last
            if word not in best or min(left, right) > best[word][0]:
                best[word] = (min(left, right), logits_Y)
    read = sorted(best)
    return np.stack([best[word][1] for word in read]), read


def predict_in_windows(
    forward: Forward,
    long: LongPosts,
    posts: Posts,
    reading: tuple[Sequence[Any], Sequence[Task]],
    numbers: Sequence[int],
    limits: tuple[int, int | None, int | None],
) -> None:
    """Predict posts in windows: the logits of each are merged, and decoded as those of one post.

    Args:
        forward: the model.
        long: how windows overlap, and how they are merged.
        posts: get their predictions.
        reading: words of each post, and tasks, as of ``task_passes``.
        numbers: of the long posts.
        limits: posts and tokens of a forward pass, and the tokens that the prompts of tasks in
            decoder mode leave, None where there are none.
    """
    column, tasks = reading
    texts = [LongText.of(posts.texts[i], column[i], posts.pairs[i]) for i in numbers]
    images = [posts.images[i] for i in numbers]

    def encode(parts: Sequence[Part]) -> TokenizedSplit:
        read, words = zip(*(texts[part.post].between(part) for part in parts), strict=True)
        pairs = [texts[part.post].pair for part in parts]
        own = [images[part.post] for part in parts]
        some = Posts(list(read), pairs, list(words), own, list(range(len(parts))), [])
        return forward.encode(some, some.words, tasks)

    settings = {"tokenizer": forward.exported.tokenizer, "config": forward.exported.data_config}
    parts, split = encode_parts(texts, make_parts(texts, long, **settings, room=limits[2]), encode)
    found = {}
    rows = forward.collator.rows_per_post(tasks)
    for indices in forward_passes(split.lengths, *limits[:2], rows=rows):
        for task, outputs in forward.outputs(split, indices, tasks)[1]:
            found |= {(part, task.name): of_row for part, _, of_row in outputs}
        mine = [posts.predictions[numbers[part.post]] for part in parts]
        forward.remarks(split, indices.tolist(), mine)
    by_post = parts_by_post(parts)
    for (post, some), task in itertools.product(by_post.items(), tasks):
        outputs = [found[i, task.name] for i in some if (i, task.name) in found]
        if not outputs:
            continue
        merged, read = merge(
            [parts[i] for i in some], outputs, long, per_word=task.mode == "tokens"
        )
        (prediction,) = task.rules.decode([outputs[0]._replace(logits=merged)], task)
        if task.mode == "tokens":
            units = texts[post].units()
            prediction = with_spans(prediction, [units[word] for word in read])
        put_prediction(posts.predictions[numbers[post]], task, prediction)
    for post, some in by_post.items():
        row = posts.predictions[numbers[post]]
        if len(some) > 1:
            row["windows"] = max(len(some), row.pop("windows", 0))


def refuse_long(
    forward: Forward, posts: Posts, tasks: Sequence[Task], *, as_words: Container[str]
) -> None:
    """Give posts that are too long an error, and take them out of the usable ones."""
    cut = np.zeros(len(posts.usable), dtype=bool)
    for column, some in task_passes(posts, tasks, as_words=as_words):
        cut |= forward.encode(posts, column, some).cut
    most = forward.exported.data_config.max_length
    for number in np.asarray(posts.usable, dtype=int)[cut].tolist():
        posts.predictions[number]["error"] = (
            f"the post has more than the {most} tokens that the model reads (--long windows reads all)"
        )
        posts.usable.remove(number)
