"""The posts of an input in windows: what is predicted together, written together, and begun anew after a stop.

A prediction depends on the posts of its batch by the last bit of its scores, so batches never cross
a window: then neither a stop nor the number of processes changes a byte of the output.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from itertools import islice
from pathlib import Path
from typing import Any

from comoe.data.posts import Post, shown_text
from comoe.inference.journal import KNOWN, Journal
from comoe.inference.options import PredictOptions
from comoe.inference.passes import WINDOW
from comoe.inference.predictor import Predictor
from comoe.inference.writers import JsonLines


@dataclass(slots=True)
class Window:
    """Some posts that follow one another."""

    start: int
    """Number of the first one, from 0."""
    posts: list[Post]
    """As they are predicted."""
    digest: bytes
    """Of all posts of the input up to the last of these."""
    filled: int
    """Posts that were predicted as a lone user name."""
    asked: list[int]
    """Which of them the model is asked for; the others have the same text as an earlier one."""
    keys: list[bytes] = field(default_factory=list)
    """What each one is recognized by; empty where nobody asked for that."""

    def questions(self) -> list[Post]:
        """The posts for the model."""
        return [self.posts[number] for number in self.asked]


def windows_of(
    posts: Iterable[Post], writer: JsonLines, journal: Journal, *, dedupe: bool
) -> Iterator[Window]:
    """The windows that a journal has not yet; the others are read too, and compared by their digest.

    Raises:
        ValueError: the first posts are not those that the journal knows.
    """
    start, digest, rest, wanted = 0, b"", iter(posts), journal.posts
    known = journal.digest
    seen = _Seen(journal) if dedupe else None
    while chunk := list(islice(rest, WINDOW)):
        digest = _digest(digest, chunk)
        end = start + len(chunk)
        if end == wanted and digest != known or start < wanted < end:
            break
        if end > wanted:
            prepared = [writer.prepare(post) for post in chunk]
            filled = sum(a is not b for a, b in zip(chunk, prepared, strict=True))
            window = Window(start, prepared, digest, filled, list(range(len(chunk))))
            if seen is not None:
                seen.mark(window)
            yield window
        start = end
    if start < wanted:
        raise ValueError(
            f"--resume: the unfinished output was made of another input, whose first {wanted:,} "
            "posts differ from these; give that one, or start anew, without --resume."
        )


def _digest(before: bytes, posts: Sequence[Post]) -> bytes:
    sha256 = hashlib.sha256(before)
    for post in posts:
        image = post.image if isinstance(post.image, (str, bytes)) else type(post.image).__name__
        error = post.error and post.error.rule
        plain = (post.text, post.words, post.pair, image, dict(post.columns), post.line, error)
        sha256.update(repr(plain).encode("utf-8", errors="surrogatepass"))
    return sha256.digest()


class _Seen:
    """Which posts were met before; the table of the journal knows those whose window is written."""

    def __init__(self, journal: Journal) -> None:
        self._journal = journal
        self._waiting: dict[bytes, int] = {}

    def mark(self, window: Window) -> None:
        """Say which posts of a window the model has to be asked for."""
        self._waiting = {
            key: start for key, start in self._waiting.items() if start >= self._journal.posts
        }
        window.keys = [_key(post, window.start + i) for i, post in enumerate(window.posts)]
        known = self._journal.known(window.keys, since=window.start - KNOWN)
        known |= self._waiting.keys()
        asked = []
        for number, key in enumerate(window.keys):
            if key not in known:
                known.add(key)
                self._waiting[key] = window.start
                asked.append(number)
        window.asked = asked


def _key(post: Post, number: int) -> bytes:
    """What a post is recognized by; one that cannot be read, or has an image that is no path, only by its place."""
    plain: Any = (post.text, post.words, post.pair, post.image)
    if post.error is not None or not isinstance(post.image, (str, bytes, type(None))):
        plain = number
    text = repr(plain).encode("utf-8", errors="surrogatepass")
    return hashlib.blake2b(text, digest_size=16).digest()


def predict_posts(
    predictor: Predictor, posts: Sequence[Post], root: Path, options: PredictOptions
) -> list[dict[str, Any]]:
    """The predictions of some posts, without the columns that are kept.

    Args:
        predictor: the model.
        posts: also those that could not be read.
        root: folder that paths of images start from.
        options: tasks, batches, and what is explained.
    """
    predictions = predictor(
        [post.text for post in posts],
        pairs=[post.pair for post in posts],
        words=[post.words for post in posts],
        images=[post.image for post in posts],
        image_root=root,
        tasks=options.tasks,
        batch_size=options.batch_size,
        batch_tokens=options.batch_tokens,
        explain=options.explain,
    )
    for post, prediction in zip(posts, predictions, strict=True):
        if post.error:
            prediction["error"] = f"line {post.line} {post.error.rule}"
    return predictions


def answered(
    window: Window, predictions: Sequence[dict[str, Any]], journal: Journal
) -> tuple[list[dict[str, Any]], int]:
    """A prediction for every post of a window, and how many of them are those of an earlier post.

    Args:
        window: the posts.
        predictions: of those that the model was asked for.
        journal: keeps them, and knows the earlier ones.
    """
    if not window.keys:
        rows = predictions
    else:
        own = {window.keys[i]: row for i, row in zip(window.asked, predictions, strict=True)}
        rows = []
        for post, key in zip(window.posts, window.keys, strict=True):
            found = (
                own[key] if key in own else {"text": shown_text(post.text)} | journal.recall(key)
            )
            rows.append(found)
        short = ((key, {n: v for n, v in row.items() if n != "text"}) for key, row in own.items())
        journal.remember(short, post=window.start)
    rows = [{**post.columns, **row} for post, row in zip(window.posts, rows, strict=True)]
    asked = set(window.asked)
    return rows, sum(i not in asked and "error" not in row for i, row in enumerate(rows))
