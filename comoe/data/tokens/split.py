"""A split as tokens: rows of the heads, and prompts and targets of the decoder."""

from __future__ import annotations

from collections.abc import Container, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np

from comoe.config.recipe import DataConfig
from comoe.data.posts import PostSplit, bounds_of, flattened, hidden
from comoe.data.report import DataReport
from comoe.data.soft_labels import SoftLabels
from comoe.data.tokens.prompts import Wording
from comoe.data.tokens.tokenize import TokenLists, Tokens, cached_tokens
from comoe.tasks.lexicon import Lexicon
from comoe.tasks.prompts import wants_pair
from comoe.tasks.task import Task, decoder_tasks
from comoe.types import IGNORED

TIGHT = 8
"""Tokens for the post below which a prompt is warned of."""


@dataclass(frozen=True, slots=True)
class TokenizedSplit:
    """A split ready for batching."""

    posts: PostSplit
    """The posts with their labels."""
    tokens: Tokens
    """Rows of the heads; empty where no task has a head."""
    lengths: np.ndarray
    """Tokens of the longest row that a post has in a batch, int32, shape (N,)."""
    labelled: np.ndarray
    """Whether a post has a label of a task, bool, shape (N, T), tasks in the order of the
    recipe."""
    words_cut: int
    """Labeled words that were cut off with the end of too long posts."""
    prompts: Mapping[str, TokenLists] = field(default_factory=dict)
    """Task in decoder mode -> filled prompts of the posts with a label of it, and of those
    without any label (that have the second text the prompt needs)."""
    room: Mapping[str, int] = field(default_factory=dict)
    """Task in decoder mode -> tokens that its prompt leaves for the post and its second
    text."""
    targets: Mapping[str, TokenLists] = field(default_factory=dict)
    """Task of free text -> target tokens of the posts that have a text."""
    soft: Mapping[str, SoftLabels] = field(default_factory=dict)
    """Task -> soft labels of the posts; see ``with_soft_labels``."""
    bounds: np.ndarray | None = None
    """First row of ``tokens`` of each post, int64, (N + 1,), where some are read with others; None
    where post i has row i."""

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
    def cut(self) -> np.ndarray:
        """Posts that were cut to the greatest length in any of their rows, bool, shape (N,)."""
        cut = _of_posts(np.logical_or, self.tokens.truncated, self.bounds)
        return np.logical_or.reduce([cut, *(lists.truncated for lists in self.prompts.values())])

    @property
    def head_lengths(self) -> np.ndarray:
        """Tokens of each post as the heads read it, of several texts the longest, int64, shape (N,)."""
        return _of_posts(np.maximum, np.diff(self.tokens.offsets), self.bounds)

    def texts_read(self, most: int) -> np.ndarray:
        """Rows that each post has for a head, int64, shape (N,); ``most`` is ``data.max_posts``."""
        count = len(self.tokens.offsets) - 1
        each = np.ones(count, dtype=np.int64)
        return np.minimum(_of_posts(np.add, each, self.bounds), most)

    @property
    def truncated(self) -> int:
        """Posts that were cut to the greatest length."""
        return int(self.cut.sum())

    @property
    def prompts_cut(self) -> dict[str, tuple[int, int]]:
        """Task in decoder mode -> (prompts that lost part of {text}, all); tasks without any are left out."""
        cut = {name: int(lists.truncated.sum()) for name, lists in self.prompts.items()}
        return {
            name: (count, int((self.prompts[name].lengths > 0).sum()))
            for name, count in cut.items()
            if count
        }

    @property
    def targets_cut(self) -> dict[str, int]:
        """Task of free text -> targets that were cut to ``max_answer_length``; tasks without any are left out."""
        counts = {name: int(lists.truncated.sum()) for name, lists in self.targets.items()}
        return {name: count for name, count in counts.items() if count}

    def rows(self, indices: np.ndarray) -> list[TokenRow]:
        """Tokens of some posts as the heads read them, in the order asked for; of several texts the first."""
        return self._rows(indices if self.bounds is None else self.bounds[indices])

    def all_rows(
        self, post: int, *, most: int, draw: Sequence[int] | None = None
    ) -> list[TokenRow]:
        """Tokens of the texts that are read together for a post, in their order.

        Args:
            post: a post, an author, or a post with its neighbors.
            most: of more texts an author's are drawn, or the first taken.
            draw: seeds the draw; None takes the first.
        """
        if self.bounds is None:
            return self._rows(np.array([post]))
        first, last = self.bounds[post : post + 2]
        numbers = np.arange(first, last)
        if (
            draw is not None
            and last - first > most
            and self.posts.members[post][0].author is not None
        ):
            chosen = np.random.default_rng([*draw, post]).permutation(numbers)[:most]
            return self._rows(np.sort(chosen))
        return self._rows(numbers[:most])

    def _rows(self, numbers: np.ndarray) -> list[TokenRow]:
        tokens = self.tokens
        bounds = [(tokens.offsets[i], tokens.offsets[i + 1]) for i in numbers]
        return [
            TokenRow(
                tokens.input_ids[a:b],
                tokens.token_types[a:b],
                tokens.word_ids[a:b],
                None if tokens.entries is None else tokens.entries[a:b],
            )
            for a, b in bounds
        ]

    def prompt(self, post: int, task: str) -> TokenRow:
        """Prompt tokens of one post for a task in decoder mode, without word ids."""
        ids = self.prompts[task][post]
        return TokenRow(
            ids, np.zeros(len(ids), dtype=np.int8), np.full(len(ids), -1, dtype=np.int32)
        )


@dataclass(frozen=True, slots=True)
class TokenRow:
    """One row: token ids, segment ids, the word that each token belongs to (-1: none), and the entry of the lexicon
    (as in ``Tokens``), each of shape (L,)."""

    input_ids: np.ndarray
    token_types: np.ndarray
    word_ids: np.ndarray
    entries: np.ndarray | None = None
    masked_ids: np.ndarray | None = None
    """Token ids that ``input_ids`` hide, IGNORED elsewhere, (L,); None where nothing is to be hidden."""

    @property
    def word_starts(self) -> np.ndarray:
        """True on the first piece of each word, bool, shape (L,)."""
        return (self.word_ids >= 0) & (self.word_ids != np.concatenate(([-1], self.word_ids[:-1])))


def tokenize_split(
    split: PostSplit,
    tokenizer: Any,
    *,
    tasks: Sequence[Task],
    config: DataConfig,
    cache_dir: Path | None = None,
    distilled: Container[str] = (),
    lexicon: Lexicon | None = None,
) -> TokenizedSplit:
    """Clean and tokenize a split, once: later calls with these posts and settings read the cache.

    Args:
        split: raw posts.
        tokenizer: from ``load_tokenizer``.
        tasks: all tasks.
        config: ``data`` of the recipe.
        cache_dir: folder of the cache; None, or ``data.cache: false``, keeps nothing.
        distilled: names of the tasks that have soft labels of all posts.
        lexicon: of the model.

    Raises:
        ValueError: ``data.max_length`` is more than the encoder takes, or a prompt more than that.
    """
    if config.max_length > tokenizer.model_max_length:
        raise ValueError(
            f"data.max_length ({config.max_length}) is more than the encoder takes "
            f"({tokenizer.model_max_length} tokens); lower it."
        )
    where = cache_dir if config.cache else None
    seen = hidden(split, config.hide)
    if len(decoder_tasks(tasks)) == len(tasks):
        tokens = no_tokens(len(split))
    else:
        tokens = cached_tokens(
            hidden(flattened(split), config.hide),
            tokenizer,
            max_length=config.max_length,
            normalize=config.normalize,
            cache_dir=where,
            lexicon=lexicon,
        )
    wording = Wording(
        tokenizer, max_length=config.max_length, normalize=config.normalize, cache_dir=where
    )
    return assemble_split(split, seen, tokens, tasks=tasks, wording=wording, distilled=distilled)


def assemble_split(
    posts: PostSplit,
    seen: PostSplit,
    tokens: Tokens,
    *,
    tasks: Sequence[Task],
    wording: Wording,
    asked: Sequence[Task] | None = None,
    distilled: Container[str] = (),
) -> TokenizedSplit:
    """Tokens and posts in one, with the table of labels that training can use.

    Args:
        posts: as they are shown.
        seen: as the model is to see them.
        tokens: of ``seen``, flattened, for the heads.
        tasks: all tasks.
        wording: makes the prompts and targets.
        asked: tasks that the posts are for; None is all.
        distilled: as in ``tokenize_split``.
    """
    # A hidden text is still shown beside predictions; a hidden image must not be read.
    posts = replace(posts, images=seen.images)
    labelled = np.zeros((len(posts), len(tasks)), dtype=bool)
    split = TokenizedSplit(
        posts, tokens, np.zeros(0, dtype=np.int32), labelled, words_cut=0, bounds=bounds_of(posts)
    )
    split = replace(split, lengths=split.head_lengths.astype(np.int32))
    words_cut = sum(_mark_labelled(split, task, number) for number, task in enumerate(tasks))
    bare = ~labelled.any(axis=1)
    prompts, targets, room = {}, {}, {}
    decoded = decoder_tasks(tasks)
    for number, task in decoded.items():
        if asked is not None and task not in asked:
            continue
        # A post of another data set may lack the second text that the prompt needs.
        askable = (
            np.array([pair is not None for pair in posts.pairs])
            if wants_pair(task.prompt)
            else True
        )
        unlabelled = bare | (task.name in distilled)
        prompts[task.name] = wording.prompts(
            seen, task, asked=labelled[:, number] | (unlabelled & askable)
        )
        room[task.name] = wording.room(task)
        if not task.label_words:
            targets[task.name] = wording.targets(posts.labels[task.name], task)
    heads = [number for number in range(len(tasks)) if number not in decoded]
    read = labelled[:, heads].any(axis=1) | bare if heads else np.zeros(len(posts), dtype=bool)
    rows = [np.where(read, split.lengths, 0), *(lists.lengths for lists in prompts.values())]
    lengths = np.maximum(np.max(rows, axis=0), 1).astype(np.int32)
    return replace(
        split, lengths=lengths, words_cut=words_cut, prompts=prompts, targets=targets, room=room
    )


def report_cuts(splits: Mapping[str, TokenizedSplit], report: DataReport) -> None:
    """Note cut posts, prompts and targets, and warn of prompts that leave little room."""
    report.truncated.update(
        {name: (split.truncated, split.words_cut) for name, split in splits.items()}
    )
    report.prompts_cut.update({name: split.prompts_cut for name, split in splits.items()})
    report.targets_cut.update({name: split.targets_cut for name, split in splits.items()})
    rooms = {task: room for split in splits.values() for task, room in split.room.items()}
    report.warnings.extend(
        f"tasks.{task}.prompt almost fills data.max_length (tokens left for the post: {room}); "
        "shorten it, or raise data.max_length"
        for task, room in rooms.items()
        if room < TIGHT
    )


def target_of(split: TokenizedSplit, task: Task, post: int, row: TokenRow) -> Any:
    """The label of one post as ``Kind.collate`` takes it, None without.

    For tags one id per token, IGNORED off first pieces; for a free text the number of its tokens;
    for masked words that of the hidden ones, None where the post has no word to hide.
    """
    value = split.posts.labels[task.name][post]
    if value is None:
        return None
    if task.name in split.targets:
        return len(split.targets[task.name][post])
    if row.masked_ids is not None:
        return int((row.masked_ids != IGNORED).sum()) or None
    return task.rules.at_tokens(value, row.word_ids, row.word_starts)


def with_soft_labels(split: TokenizedSplit, soft: Mapping[str, SoftLabels]) -> TokenizedSplit:
    """The split with soft labels: a post with one is read by the heads, whatever labels it has."""
    read = np.logical_or.reduce([labels.present for labels in soft.values()])
    own = np.where(read, split.head_lengths, 0)
    lengths = np.maximum(split.lengths, own).astype(np.int32)
    return replace(split, lengths=lengths, soft=dict(soft))


def soft_of(split: TokenizedSplit, task: Task, post: int, row: TokenRow) -> np.ndarray | None:
    """The soft label of one post as ``Kind.collate_soft`` takes it, None without."""
    rows = split.soft[task.name].rows(post)
    if rows is None or task.mode != "tokens":
        return rows
    soft_LY = np.full((len(row.word_ids), rows.shape[1]), np.nan, dtype=np.float32)
    places = np.flatnonzero(row.word_starts)
    # A teacher may have cut the post earlier.
    places = places[row.word_ids[places] < len(rows)]
    soft_LY[places] = rows[row.word_ids[places]]
    return soft_LY


def _mark_labelled(split: TokenizedSplit, task: Task, number: int) -> int:
    """Fill in a task's column of ``labelled``; the labeled words that were cut off with the ends of posts."""
    column = split.posts.labels[task.name]
    present = np.flatnonzero([value is not None for value in column])
    split.labelled[present, number] = True
    if task.mode != "tokens":
        return 0
    words_cut = 0
    for post, row in zip(present, split.rows(present), strict=True):
        kept = int((target_of(split, task, post, row) != IGNORED).sum())
        words_cut += int((np.asarray(column[post]) != IGNORED).sum()) - kept
        split.labelled[post, number] = kept > 0
    return words_cut


def _of_posts(join: np.ufunc, rows: np.ndarray, bounds: np.ndarray | None) -> np.ndarray:
    """What is known of each row of tokens, joined over the rows of each post."""
    return rows if bounds is None else join.reduceat(rows, bounds[:-1])


def no_tokens(count: int) -> Tokens:
    """Tokens of posts that no head reads: none."""
    nothing = np.zeros(0, dtype=np.int32)
    offsets = np.zeros(count + 1, dtype=np.int64)
    return Tokens(nothing, nothing.astype(np.int8), nothing, offsets, np.zeros(count, dtype=bool))
