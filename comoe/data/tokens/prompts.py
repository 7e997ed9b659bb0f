"""Inputs and targets of a decoder as token ids: filled prompts, free texts, label words."""

from __future__ import annotations

import functools
import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np

from comoe.config.recipe import NormalizeConfig
from comoe.data.posts import PostSplit
from comoe.data.tokens.cache import cached, fingerprint
from comoe.data.tokens.tokenize import CHUNK, TokenLists, readable
from comoe.data.tokens.vocabulary import is_causal
from comoe.tasks.prompts import FIELDS, prompt_parts
from comoe.tasks.task import Task

if TYPE_CHECKING:
    from torch import Tensor

Parts = list[tuple[str, str | None]]


Values = dict[str, str]


class Wording:
    """Turns posts and targets into tokens for the tasks in decoder mode.

    Args:
        tokenizer: a Hugging Face tokenizer.
        max_length: longest prompt in tokens, special tokens included.
        normalize: how to clean posts; None takes them as they are.
        cache_dir: folder of the cache; None keeps nothing.
    """

    def __init__(
        self,
        tokenizer: Any,
        *,
        max_length: int,
        normalize: NormalizeConfig | None,
        cache_dir: Path | None = None,
    ) -> None:
        self._tokenizer = tokenizer
        self._max_length = max_length
        self._normalize = normalize
        self._cache_dir = cache_dir
        self._frame = frame_of(tokenizer)
        # Takes a second for a large vocabulary.
        self._fingerprint = functools.cache(lambda: fingerprint(tokenizer))

    def prompts(self, posts: PostSplit, task: Task, *, asked: np.ndarray) -> TokenLists:
        """The task's prompt, filled with each requested post.

        A prompt that is too long loses the end of {text}, and where nothing of it is left the end
        of {pair}; never a word of its own.

        Args:
            posts: as the model is to see them.
            task: which has a prompt.
            asked: bool, (N,); other posts get no tokens.

        Raises:
            ValueError: a template that is too long by itself.
        """
        assert task.prompt is not None
        parts = prompt_parts(task.prompt)
        room = self.room(task)
        if room <= 0:
            raise ValueError(
                f"tasks.{task.name}.prompt takes {self._max_length - room} tokens by itself, of "
                f"data.max_length ({self._max_length}); shorten it, or raise data.max_length."
            )
        settings = [
            "prompt",
            parts,
            self._max_length,
            asdict(self._normalize) if self._normalize else None,
            *([self._frame] if self._frame else []),
        ]
        read = (
            [text, pair] if here else 0
            for text, pair, here in zip(posts.texts, posts.pairs, asked, strict=True)
        )
        return self._kept(lambda: self._fill(posts, parts, asked), settings, read, count=len(posts))

    def room(self, task: Task) -> int:
        """Tokens of a row that the prompt, special tokens included, leaves for the post and its second text.

        Args:
            task: which has a prompt.
        """
        assert task.prompt is not None
        empty, _ = _filled(prompt_parts(task.prompt), dict.fromkeys(FIELDS, ""))
        ((ids, _),) = _encoded(self._tokenizer, [empty], self._frame)
        return self._max_length - len(ids)

    def targets(self, texts: Sequence[str | None], task: Task) -> TokenLists:
        """Target tokens of a task of free text, end token included; cut where they are too long.

        Args:
            texts: one per post, None without.
            task: has the limit, ``max_answer_length``.
        """

        def make() -> TokenLists:
            present = [row for row, text in enumerate(texts) if text is not None]
            made: dict[int, tuple[list[int], bool]] = {}
            for start in range(0, len(present), CHUNK):
                rows = present[start : start + CHUNK]
                made.update(
                    zip(
                        rows,
                        self._target_rows([str(texts[row]) for row in rows], task),
                        strict=True,
                    )
                )
            return _lists([made.get(row) for row in range(len(texts))])

        settings = ["answer", task.max_answer_length]
        if self._frame:
            settings.append(_glue(self._tokenizer, task))
        return self._kept(make, settings, texts, count=len(texts))

    def _kept(self, make: Any, settings: Sequence[Any], read: Any, *, count: int) -> TokenLists:
        if self._cache_dir is None:
            return make()
        settings = [*settings, self._fingerprint()]
        return cached(TokenLists, make, settings, read, count=count, cache_dir=self._cache_dir)

    def _fill(self, posts: PostSplit, parts: Parts, asked: np.ndarray) -> TokenLists:
        chunks = []
        for start in range(0, len(posts), CHUNK):
            rows = [row for row in range(start, min(start + CHUNK, len(posts))) if asked[row]]
            values = [
                {"text": self._clean(posts.texts[row]), "pair": self._clean(posts.pairs[row])}
                for row in rows
            ]
            made = dict(
                zip(
                    rows,
                    _fitting(
                        self._tokenizer, parts, values, self._frame, max_length=self._max_length
                    ),
                    strict=True,
                )
            )
            chunks.append(
                _lists([made.get(row) for row in range(start, min(start + CHUNK, len(posts)))])
            )
        chunks = [_lists([]), *chunks]
        lengths = np.concatenate([chunk.lengths for chunk in chunks])
        return TokenLists(
            input_ids=np.concatenate([chunk.input_ids for chunk in chunks]),
            offsets=np.concatenate(([0], np.cumsum(lengths, dtype=np.int64))),
            truncated=np.concatenate([chunk.truncated for chunk in chunks]),
        )

    def _clean(self, text: str | None) -> str:
        return readable(text, self._normalize, self._max_length)[0] or ""

    def _target_rows(self, texts: list[str], task: Task) -> Iterator[tuple[list[int], bool]]:
        """(target tokens, whether they were cut) of each text."""
        texts = [readable(text, None, task.max_answer_length)[0] for text in texts]
        whole = _answer_ids(self._tokenizer, texts, task)
        if self._frame:
            limit, end = task.max_answer_length, self._tokenizer.eos_token_id
            return (
                (ids, False) if len(ids) <= limit else ([*ids[: limit - 1], end], True)
                for ids in whole
            )
        long = [row for row, ids in enumerate(whole) if len(ids) > task.max_answer_length]
        limits = {"truncation": True, "max_length": task.max_answer_length}
        # The tokenizer cuts before it adds the end token.
        cut = dict(
            zip(
                long,
                _target_ids(self._tokenizer, [texts[row] for row in long], **limits),
                strict=True,
            )
        )
        return ((cut.get(row, ids), row in cut) for row, ids in enumerate(whole))


def label_tokens(tokenizer: Any, task: Task) -> list[list[int]]:
    """Token ids of each label's words, end token included.

    Raises:
        ValueError: words that the tokenizer does not know, or two labels whose words are the same
            to it.
    """
    found: dict[tuple[int, ...], str] = {}
    made = _answer_ids(tokenizer, task.label_words, task)
    for label, words, ids in zip(task.labels, task.label_words, made, strict=True):
        if all(token in tokenizer.all_special_ids for token in ids):
            raise ValueError(
                f"tasks.{task.name}.label_words: the tokenizer of model.encoder has no token for "
                f"{words!r} (label {label}); give words that it knows."
            )
        if (other := found.setdefault(tuple(ids), words)) != words:
            raise ValueError(
                f"tasks.{task.name}.label_words: {other!r} and {words!r} are the same tokens to "
                "the tokenizer of model.encoder; give words that it can tell apart."
            )
    return [list(ids) for ids in found]


def check_end_token(tokenizer: Any, task: Task) -> None:
    """Refuse a tokenizer that does not end texts as a decoder must.

    Raises:
        ValueError: it has no end token, or does not add it.
    """
    if is_causal(tokenizer):  # the answer's end is put behind it here
        return
    if (
        tokenizer.eos_token_id is None
        or tokenizer.eos_token_id not in _target_ids(tokenizer, ["a"])[0]
    ):
        raise ValueError(
            f"tasks.{task.name} is of kind {task.kind}, whose targets need an end token, but the tokenizer of "
            f"model.encoder ({type(tokenizer).__name__}) adds none; choose an encoder-decoder such as T5 or BART."
        )


def detokenize(ids_BD: Tensor, tokenizer: Any) -> list[str]:
    """Generated token ids as texts.

    Args:
        ids_BD: as ``ModelOutput.generated`` has them, below 0 behind the end.
        tokenizer: of the model.
    """
    texts = (
        tokenizer.decode(
            [token for token in row if token >= 0],
            skip_special_tokens=True,
            clean_up_tokenization_spaces=False,
        )
        for row in ids_BD.tolist()
    )
    # No cell may hold U+0000, so no prediction may.
    return [text.strip().replace("\x00", "\ufffd") for text in texts]


class Frame(NamedTuple):
    """Tokens around what a decoder-only model reads."""

    before: list[int]
    after: list[int]


def frame_of(tokenizer: Any) -> Frame | None:
    """What stands around a prompt: a chat template's turn of the user and the beginning of the
    answer's, or where there is none the tokenizer's own first token; None for other models."""
    if not is_causal(tokenizer):
        return None
    if not tokenizer.chat_template:
        return Frame(tokenizer("", verbose=False)["input_ids"], [])
    turns = [{"role": "user", "content": _PLACE}]
    chat = tokenizer.apply_chat_template(turns, tokenize=False, add_generation_prompt=True)
    # The post itself is tokenized apart: what looks like a special token in it stays text.
    settings = {"add_special_tokens": False, "split_special_tokens": False, "verbose": False}
    before, _, after = chat.partition(_PLACE)
    return Frame(*(tokenizer(part, **settings)["input_ids"] for part in (before, after)))


_PLACE = "\ue000"
"""Stands for the prompt in a chat template; of the private use area."""


def _glue(tokenizer: Any, task: Task) -> str:
    """What parts an answer of a decoder-only model from its prompt: a blank, or nothing where the
    answer is a turn of its own, or the prompt ends with white space."""
    return "" if tokenizer.chat_template or (task.prompt or "")[-1:].isspace() else " "


def _answer_ids(tokenizer: Any, texts: Sequence[str], task: Task) -> list[list[int]]:
    """Token ids of each label's words, or of texts, end token included."""
    if not is_causal(tokenizer) or not texts:
        return _target_ids(tokenizer, texts)
    glue = _glue(tokenizer, task)
    glued = [f"{glue}{text}" for text in texts]
    made = tokenizer(glued, add_special_tokens=False, verbose=False)["input_ids"]
    return [[*ids, tokenizer.eos_token_id] for ids in made]


def _fitting(
    tokenizer: Any,
    parts: Parts,
    values: Sequence[Values],
    frame: Frame | None = None,
    *,
    max_length: int,
) -> Iterator[tuple[list[int], bool]]:
    """(tokens, whether it was shortened) of a template filled with each of the values."""
    rows = dict(enumerate(values))
    done: dict[int, tuple[list[int], bool]] = {}
    while rows:
        filled = {row: _filled(parts, some) for row, some in rows.items()}
        made = _encoded(tokenizer, [text for text, _ in filled.values()], frame)
        left = {}
        for (row, (_, spans)), (ids, offsets) in zip(filled.items(), made, strict=True):
            if len(ids) <= max_length:
                done[row] = (ids, rows[row] != values[row])
            else:
                left[row] = _shortened(
                    rows[row], spans, offsets, excess=len(ids) - max_length, total=len(ids)
                )
        rows = left
    return (done[row] for row in range(len(values)))


def _shortened(
    values: Values,
    spans: Mapping[str, list[int]],
    offsets: list[tuple[int, int]] | None,
    *,
    excess: int,
    total: int,
) -> Values:
    """The values with one field shorter, by as many tokens as are too many, until they fit."""
    field = next(name for name in FIELDS if values[name] and name in spans)
    text, begins = values[field], spans[field]
    drop = math.ceil(excess / len(begins))
    keep = len(text) * (total - drop) // total
    if offsets is not None:
        begin, end = begins[0], begins[0] + len(text)
        inside = [first for first, last in offsets if last > begin and first < end]
        if inside:
            keep = max(0, inside[len(inside) - drop] - begin) if drop < len(inside) else 0
    # Always shorter, or this would never end.
    return values | {field: text[: min(keep, len(text) - 1)].rstrip()}


def _filled(parts: Parts, values: Values) -> tuple[str, dict[str, list[int]]]:
    """The filled template, and for each field where its values begin in it."""
    text, begins = "", {}
    for plain, field in parts:
        text += plain
        if field is not None:
            begins.setdefault(field, []).append(len(text))
            text += values[field]
    return text, begins


def _encoded(
    tokenizer: Any, texts: list[str], frame: Frame | None
) -> list[tuple[list[int], list[tuple[int, int]] | None]]:
    """(ids, places of the tokens in the text) of each text; None for tokenizers in pure Python."""
    made = tokenizer(texts, add_special_tokens=frame is None, verbose=False)
    before, after = frame or ([], [])
    if not tokenizer.is_fast:
        return [([*before, *ids, *after], None) for ids in made["input_ids"]]
    # Special tokens have no place in the text.
    nowhere = ([(0, 0)] * len(before), [(0, 0)] * len(after))
    return [
        ([*before, *one.ids, *after], [*nowhere[0], *one.offsets, *nowhere[1]])
        for one in made.encodings
    ]


def _target_ids(tokenizer: Any, texts: Sequence[str], **limits: Any) -> list[list[int]]:
    return tokenizer(text_target=list(texts), verbose=False, **limits)["input_ids"] if texts else []


def _lists(rows: Sequence[tuple[Sequence[int], bool] | None]) -> TokenLists:
    """Flat arrays of (tokens, whether cut), None for an absent text."""
    ids = [() if row is None else row[0] for row in rows]
    return TokenLists(
        input_ids=np.array([token for row in ids for token in row], dtype=np.int32),
        offsets=np.concatenate(([0], np.cumsum([len(row) for row in ids], dtype=np.int64))),
        truncated=np.array([row is not None and row[1] for row in rows], dtype=bool),
    )
