"""Tokenised posts to padded batches; the same class in training, evaluation and prediction."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor
from transformers import AutoTokenizer

from comoe.data.domains import Domains, confidences_of, domain_columns
from comoe.data.pixels import PixelReader
from comoe.data.posts import PostSplit, hidden, unlabelled_posts
from comoe.data.tokens import Tokens, cached_tokens, tokenize
from comoe.protocols import IGNORED, Batch
from comoe.rules import unknown_name
from comoe.schema import DataConfig, NormalizeConfig
from comoe.tasks.catalog import Task


def load_tokenizer(name: str, *, trust_remote_code: bool = False) -> Any:
    """The tokenizer of an encoder.

    Args:
        name: folder with the tokenizer's files, or a hub name.
        trust_remote_code: let the encoder's repository run its own Python code.

    Raises:
        ValueError: no tokenizer there, or one without a padding token.
    """
    try:
        tokenizer = AutoTokenizer.from_pretrained(name, trust_remote_code=trust_remote_code)
    except (OSError, ValueError, KeyError, ImportError) as error:
        reason = (str(error).strip().splitlines() or ["no message"])[0]
        raise ValueError(
            f"model.encoder ({name}): no tokenizer could be loaded. Give a folder that holds tokenizer.json or the "
            f"vocabulary beside config.json, or a hub name with a network at hand. ({type(error).__name__}: {reason})"
        ) from error
    if tokenizer.pad_token_id is None:
        raise ValueError(
            f"model.encoder ({name}): its tokenizer has no padding token; choose BERT, RoBERTa or DistilBERT."
        )
    return tokenizer


@dataclass(frozen=True, slots=True)
class TokenizedSplit:
    """A split ready for batching."""

    posts: PostSplit
    """The posts with their labels."""
    tokens: Tokens
    """Their tokens."""
    lengths: np.ndarray
    """Tokens per post, int32, shape (N,)."""
    labelled: np.ndarray
    """Whether a post has a label of a task, bool, shape (N, T), tasks in the order of the recipe."""
    words_cut: int
    """Labelled words that were cut off with the end of too long posts."""

    def __len__(self) -> int:
        return len(self.posts)

    @property
    def groups(self) -> np.ndarray:
        """Data set of each post, int64, shape (N,)."""
        return self.posts.groups

    @property
    def texts(self) -> Sequence[str]:
        """Raw text of each post."""
        return self.posts.texts

    @property
    def origins(self) -> Sequence[str]:
        """ "file:line" of each post."""
        return self.posts.origins

    @property
    def truncated(self) -> int:
        """Posts that were cut to the greatest length."""
        return int(self.tokens.truncated.sum())

    def rows(self, indices: np.ndarray) -> list[TokenRow]:
        """Tokens of some posts, in the order asked for."""
        bounds = [(self.tokens.offsets[i], self.tokens.offsets[i + 1]) for i in indices]
        return [
            TokenRow(self.tokens.input_ids[a:b], self.tokens.token_types[a:b], self.tokens.word_ids[a:b])
            for a, b in bounds
        ]


@dataclass(frozen=True, slots=True)
class TokenRow:
    """One post: token ids, segment ids, and the word that each token belongs to (-1: none), each of shape (L,)."""

    input_ids: np.ndarray
    token_types: np.ndarray
    word_ids: np.ndarray

    @property
    def word_starts(self) -> np.ndarray:
        """True on the first piece of each word, bool, shape (L,)."""
        return (self.word_ids >= 0) & (self.word_ids != np.concatenate(([-1], self.word_ids[:-1])))


def tokenize_split(
    split: PostSplit, tokenizer: Any, *, tasks: Sequence[Task], config: DataConfig, cache_dir: Path | None = None
) -> TokenizedSplit:
    """Clean and tokenise a split, once: later calls with the same posts and settings read the cache.

    Args:
        split: raw posts.
        tokenizer: from ``load_tokenizer``.
        tasks: all tasks.
        config: ``data`` of the recipe.
        cache_dir: folder of the cache; None, or ``data.cache: false``, keeps nothing.

    Raises:
        ValueError: ``data.max_length`` is more than the encoder takes.
    """
    if config.max_length > tokenizer.model_max_length:
        raise ValueError(
            f"data.max_length ({config.max_length}) is more than the encoder takes "
            f"({tokenizer.model_max_length} tokens); lower it."
        )
    where = cache_dir if config.cache else None
    seen = hidden(split, config.hide)
    tokens = cached_tokens(seen, tokenizer, max_length=config.max_length, normalize=config.normalize, cache_dir=where)
    # A hidden text is still shown beside predictions; a hidden picture must not be read.
    return _with_labels(replace(split, images=seen.images), tokens, tasks)


class Collator:
    """Pads posts to a batch and lays out rows and labels as the gate's routing wants them.

    ``route_by: token`` has one row per post, which serves all tasks. ``task`` and ``both`` have one row per (post,
    labelled task), with the labels of the other tasks missing.

    Args:
        tokenizer: from ``load_tokenizer``.
        tasks: all tasks.
        route_by: ``model.moe.route_by``.
        pad_to_multiple_of: rows are padded to a multiple of this many tokens.
        pixels: reads the posts' pictures; None leaves them alone.
        domains: what the adversarial loss predicts of posts; None predicts nothing.

    Raises:
        ValueError: no such ``route_by``.
    """

    def __init__(
        self,
        tokenizer: Any,
        tasks: Sequence[Task],
        *,
        route_by: str = "token",
        pad_to_multiple_of: int = 1,
        pixels: PixelReader | None = None,
        domains: Domains | None = None,
    ) -> None:
        if route_by not in ROW_PER_TASK:
            raise unknown_name("model.moe.route_by", route_by, ROW_PER_TASK)
        self.tokenizer = tokenizer
        self.tasks = tuple(tasks)
        self.pixels = pixels
        self.domains = domains
        self._row_per_task = ROW_PER_TASK[route_by]
        self._multiple = pad_to_multiple_of
        self._segments = "token_type_ids" in tokenizer.model_input_names
        self._filler = self.encode_texts(["a"], max_length=8).rows(np.array([0]))[0]

    def __call__(self, split: TokenizedSplit, indices: np.ndarray, *, all_tasks: bool = False) -> Batch:
        """One batch on the CPU.

        Args:
            split: tokenised posts.
            indices: posts, int, may be empty: the batch is then one short filler row without labels, of row id -1.
            all_tasks: where a row serves one task, make a row for every task, labelled or not (prediction).
        """
        pairs = self._layout(split, np.asarray(indices, dtype=np.int64), all_tasks=all_tasks)
        real = np.array([post for post, _ in pairs if post >= 0], dtype=np.int64)
        rows = split.rows(real) or [self._filler]
        length = -(-max(len(row.input_ids) for row in rows) // self._multiple) * self._multiple
        posts = [post for post, _ in pairs]
        images = [split.posts.images[post] if post >= 0 else None for post in posts]
        pixels, image_rows, image_numbers = (None,) * 3 if self.pixels is None else self.pixels.collate(images)
        return Batch(
            pixels_I3HW=pixels,
            image_rows_I=image_rows,
            image_numbers_I=image_numbers,
            input_ids_BL=_padded([row.input_ids for row in rows], length=length, fill=self.tokenizer.pad_token_id),
            attention_mask_BL=_padded([np.ones(len(row.input_ids)) for row in rows], length=length, fill=0),
            token_type_ids_BL=_padded([row.token_types for row in rows], length=length, fill=0)
            if self._segments
            else None,
            word_starts_BL=_padded([row.word_starts for row in rows], length=length, fill=0).bool(),
            task_ids_B=torch.tensor([task for _, task in pairs], dtype=torch.int64),
            row_ids_B=torch.tensor(posts, dtype=torch.int64),
            labels={
                task.name: task.rules.collate(
                    [
                        _target(split.posts, task, post, row) if post >= 0 and served in (-1, number) else None
                        for (post, served), row in zip(pairs, rows, strict=True)
                    ],
                    labels=task.labels,
                    length=length,
                )
                for number, task in enumerate(self.tasks)
            },
            confidences=confidences_of(split.posts, posts, self.tasks),
            **domain_columns(self.domains, split.posts, posts, split.labelled if self._row_per_task else None),
        )

    def encode_texts(
        self,
        texts: Sequence[str],
        pairs: Sequence[str | None] | None = None,
        words: Sequence[Sequence[str] | None] | None = None,
        *,
        images: Sequence[bytes | str | None] | None = None,
        max_length: int = 128,
        normalize: NormalizeConfig | None = None,
        hide: str = "none",
    ) -> TokenizedSplit:
        """Raw texts as a split without labels, by the same path as training posts.

        Args:
            texts: posts.
            pairs: second texts, None where there is none.
            words: posts as words, for tags; a text is only used where its words are None.
            images: pictures as ``comoe.data.images.locate_image`` gives them, None where there is none.
            max_length: longest post in tokens.
            normalize: how to clean; None takes the texts as they are.
            hide: ``data.hide`` of the recipe.
        """
        names = [task.name for task in self.tasks]
        posts = unlabelled_posts(texts, tasks=names, pairs=pairs, words=words, images=images)
        seen = hidden(posts, hide)
        tokens = tokenize(seen, self.tokenizer, max_length=max_length, normalize=normalize)
        return _with_labels(replace(posts, images=seen.images), tokens, self.tasks)

    def _layout(self, split: TokenizedSplit, indices: np.ndarray, *, all_tasks: bool) -> list[tuple[int, int]]:
        """(post, task) of every row; task -1 serves all tasks, post -1 is a filler."""
        if not self._row_per_task:
            return [(int(post), -1) for post in indices] or [(-1, -1)]
        tasks = range(len(self.tasks))
        pairs = [(int(post), task) for post in indices for task in tasks if all_tasks or split.labelled[post, task]]
        return pairs or [(-1, 0)]


def _with_labels(posts: PostSplit, tokens: Tokens, tasks: Sequence[Task]) -> TokenizedSplit:
    """Tokens and posts in one, with the table of labels that training can use."""
    split = TokenizedSplit(
        posts=posts,
        tokens=tokens,
        lengths=np.diff(tokens.offsets).astype(np.int32),
        labelled=np.zeros((len(posts), len(tasks)), dtype=bool),
        words_cut=0,
    )
    words_cut = 0
    for number, task in enumerate(tasks):
        column = posts.labels[task.name]
        present = np.flatnonzero([value is not None for value in column])
        split.labelled[present, number] = True
        if task.rules.per_token:
            for post, row in zip(present, split.rows(present), strict=True):
                kept = int((_target(posts, task, post, row) != IGNORED).sum())
                words_cut += int((np.asarray(column[post]) != IGNORED).sum()) - kept
                split.labelled[post, number] = kept > 0
    return TokenizedSplit(posts, tokens, split.lengths, split.labelled, words_cut)


def _target(posts: PostSplit, task: Task, post: int, row: TokenRow) -> Any:
    """The label of one post as ``Kind.collate`` takes it; for tags one id per token, IGNORED off first pieces."""
    value = posts.labels[task.name][post]
    if value is None or not task.rules.per_token:
        return value
    ids = np.full(len(row.input_ids), IGNORED, dtype=np.int64)
    starts = row.word_starts
    ids[starts] = np.asarray(value, dtype=np.int64)[row.word_ids[starts]]
    return ids


def _padded(rows: Sequence[np.ndarray], *, length: int, fill: int) -> Tensor:
    """Rows of any length as one int64 tensor (B, L)."""
    padded = np.full((len(rows), length), fill, dtype=np.int64)
    for number, row in enumerate(rows):
        padded[number, : len(row)] = row
    return torch.from_numpy(padded)


ROW_PER_TASK: dict[str, bool] = {"token": False, "task": True, "both": True}
"""``model.moe.route_by`` -> whether a row serves one task instead of all."""
