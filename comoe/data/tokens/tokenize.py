"""Posts to tokens: tokenized once, kept flat in arrays, cached on disk."""

from __future__ import annotations

import bisect
import itertools
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np

from comoe.config.recipe import NormalizeConfig
from comoe.data.posts import PostSplit
from comoe.data.text.normalize import normalize_post, normalize_words
from comoe.data.tokens.cache import cached, fingerprint
from comoe.data.tokens.lexicon import entries_of
from comoe.data.tokens.pairs import encode_pairs
from comoe.data.tokens.vocabulary import is_causal
from comoe.tasks.lexicon import Lexicon

CHUNK = 1024
"""Posts per call of the tokenizer."""


CHARACTERS_PER_TOKEN = 100
"""At most this many characters of a cleaned text are tokenized for each token that the model takes:
memory grows with them, and what is behind is cut anyway (unless words have more than that on
average)."""


RAW = 10
"""Characters that are cleaned for each one that is tokenized."""


@dataclass(frozen=True, slots=True)
class Tokens:
    """The tokens of N posts in flat arrays; post i has ``offsets[i]`` to ``offsets[i + 1]``."""

    input_ids: np.ndarray
    """Token ids, int32."""
    token_types: np.ndarray
    """Segment ids, int8."""
    word_ids: np.ndarray
    """Word of the first text that a token belongs to, int32; -1 on special tokens and on the second
    text."""
    offsets: np.ndarray
    """First entry of each post, int64, shape (N + 1,)."""
    truncated: np.ndarray
    """True where a post was cut, bool, shape (N,)."""
    entries: np.ndarray | None = None
    """Entry of the lexicon that a token is a piece of, int32, as of ``entries_of``; None without a
    lexicon."""


@dataclass(frozen=True, slots=True)
class TokenLists:
    """Token ids of N texts that need no more than that (prompts, targets), as in ``Tokens``; a text may be absent."""

    input_ids: np.ndarray
    """Token ids, int32."""
    offsets: np.ndarray
    """First entry of each text, int64, shape (N + 1,)."""
    truncated: np.ndarray
    """True where a text was cut, bool, shape (N,)."""

    def __getitem__(self, index: int) -> np.ndarray:
        return self.input_ids[self.offsets[index] : self.offsets[index + 1]]

    @property
    def lengths(self) -> np.ndarray:
        """Tokens of each text, int64; 0 where it is absent."""
        return np.diff(self.offsets)


def tokenize(
    posts: PostSplit,
    tokenizer: Any,
    *,
    max_length: int,
    normalize: NormalizeConfig | None,
    lexicon: Lexicon | None = None,
) -> Tokens:
    """Clean and tokenize posts.

    A text pair is the tokenizer's second segment; of too long a post the longer text is cut first.
    So is a context, the nearest text first, which is cut before any of the post is.
    Posts given as words stay word by word: a word of which nothing is left becomes the unknown
    token, so that every word has a piece.

    Args:
        posts: raw posts.
        tokenizer: a Hugging Face tokenizer.
        max_length: longest post in tokens, special tokens included.
        normalize: how to clean; None takes the texts as they are.
        lexicon: whose entries are found in the cleaned texts.

    Raises:
        ValueError: words or a lexicon, but a tokenizer that cannot tell words apart.
    """
    parts: list[tuple[np.ndarray, ...]] = []
    # Others put a token between the two.
    between = "\n" if is_causal(tokenizer) else ""
    for start in range(0, len(posts), CHUNK):
        chunk = range(start, min(start + CHUNK, len(posts)))
        firsts: list[Any] = [list(posts.words[i] or ()) or posts.texts[i] for i in chunk]
        pairs = [posts.pairs[i] for i in chunk]
        firsts, cut = zip(*(readable(text, normalize, max_length) for text in firsts), strict=True)
        contexts = [isinstance(pair, tuple) for pair in pairs]
        pairs, cut_pair = zip(
            *(_readable_pair(pair, normalize, max_length) for pair in pairs), strict=True
        )
        pairs = [f"{between}{pair}" if pair else pair for pair in pairs]
        rows = _rows(tokenizer, firsts, pairs, contexts, max_length=max_length, lexicon=lexicon)
        shorter = zip(rows, cut, cut_pair, strict=True)
        parts.append(_flat([replace(row, cut=row.cut or a or b) for row, a, b in shorter]))
    ids, types, words, lengths, cut, entries = (
        np.concatenate(column) for column in zip(_flat([]), *parts, strict=True)
    )
    offsets = np.concatenate(([0], np.cumsum(lengths, dtype=np.int64)))
    return Tokens(ids, types, words, offsets, cut, None if lexicon is None else entries)


def readable(text: Any, normalize: NormalizeConfig | None, max_length: int) -> tuple[Any, bool]:
    """A text as the tokenizer is given it, and whether more of it was cut than the tokenizer sees.

    Args:
        text: raw; or a list of words; or None.
        normalize: how to clean; None takes the text as it is.
        max_length: of the result, in tokens.
    """
    if not text:
        return text, False
    most = CHARACTERS_PER_TOKEN * max_length
    clean = start = _limited(text, RAW * most)
    if normalize is not None:
        clean = (normalize_post if isinstance(text, str) else normalize_words)(start, normalize)
    short = _limited(clean, most)
    return short, start is not text or short is not clean


def _readable_pair(
    pair: str | tuple[str, ...] | None, normalize: NormalizeConfig | None, max_length: int
) -> tuple[Any, bool]:
    """A second text as ``readable`` makes it; of a context all of its texts, a line each."""
    if not isinstance(pair, tuple):
        return readable(pair, normalize, max_length)
    made = [readable(text, normalize, max_length) for text in pair]
    text = "\n".join(clean for clean, _ in made if clean)
    return text, any(cut for _, cut in made)


def _limited(text: Any, most: int) -> Any:
    """The beginning of a text, or of words with a blank between; the same object where it is no longer."""
    if isinstance(text, str):
        return text if len(text) <= most else text[:most]
    ends = list(itertools.accumulate(len(word) + 1 for word in text))
    if ends[-1] <= most + 1:
        return text
    count = bisect.bisect(ends, most)
    rest = text[count][: most - (ends[count - 1] if count else 0)]
    return [*text[:count], *([rest] if rest else [])]


def cached_tokens(
    posts: PostSplit,
    tokenizer: Any,
    *,
    max_length: int,
    normalize: NormalizeConfig | None,
    cache_dir: Path | None,
    lexicon: Lexicon | None = None,
) -> Tokens:
    """``tokenize``, read from ``cache_dir`` where the same posts were tokenized alike before."""

    def make() -> Tokens:
        return tokenize(
            posts, tokenizer, max_length=max_length, normalize=normalize, lexicon=lexicon
        )

    if cache_dir is None:
        return make()
    settings = [max_length, asdict(normalize) if normalize else None, fingerprint(tokenizer)]
    settings += [] if lexicon is None else [lexicon.digest]
    read = (
        [words or text, pair]
        for words, text, pair in zip(posts.words, posts.texts, posts.pairs, strict=True)
    )
    return cached(Tokens, make, settings, read, count=len(posts), cache_dir=cache_dir)


@dataclass(frozen=True, slots=True)
class _Row:
    """Tokens of one post."""

    ids: Sequence[int]
    types: Sequence[int]
    words: Sequence[int]
    cut: bool
    entries: Sequence[int] = ()
    """As of ``entries_of``, where there is a lexicon."""


def _flat(rows: list[_Row]) -> tuple[np.ndarray, ...]:
    """Ids, segments, words of all tokens; length and cut of all rows; entries of all tokens. Early: lists of numbers
    are large."""
    return (
        np.array([value for row in rows for value in row.ids], dtype=np.int32),
        np.array([value for row in rows for value in row.types], dtype=np.int8),
        np.array([value for row in rows for value in row.words], dtype=np.int32),
        np.array([len(row.ids) for row in rows], dtype=np.int64),
        np.array([row.cut for row in rows], dtype=bool),
        np.array([value for row in rows for value in row.entries], dtype=np.int32),
    )


def _rows(
    tokenizer: Any,
    firsts: Sequence[str | list[str]],
    pairs: Sequence[str | None],
    contexts: Sequence[bool],
    *,
    max_length: int,
    lexicon: Lexicon | None,
) -> list[_Row]:
    """Tokens of a chunk, by one call each for plain texts, words, and pairs and contexts of both."""
    encode = _encode_fast if tokenizer.is_fast else _encode_slow
    alike: dict[tuple[bool, bool, bool], list[int]] = {}
    columns = zip(firsts, pairs, contexts, strict=True)
    for i, (first, pair, context) in enumerate(columns):
        # A post that fills the row by itself is read without its context.
        full = context and bool(pair) and _fills(tokenizer, first, max_length)
        key = (isinstance(first, list), bool(pair) and not full, context)
        alike.setdefault(key, []).append(i)
    rows: dict[int, _Row] = {}
    for (as_words, paired, context), members in alike.items():
        seconds = [pairs[i] for i in members] if paired else None
        made = encode(
            tokenizer,
            [firsts[i] for i in members],
            seconds,
            as_words=as_words,
            lexicon=lexicon,
            max_length=max_length,
            truncation="only_second" if paired and context else "longest_first",
        )
        if context and not paired:
            made = [
                replace(row, cut=row.cut or bool(pairs[i]))
                for i, row in zip(members, made, strict=True)
            ]
        rows.update(zip(members, made, strict=True))
    # A tokenizer without special tokens makes nothing of a blank text; a row of no tokens has no
    # mean.
    unknown = tokenizer.unk_token_id
    nothing = _Row([tokenizer.pad_token_id if unknown is None else unknown], [0], [-1], False, [0])
    return [rows[i] if rows[i].ids else nothing for i in range(len(firsts))]


def _fills(tokenizer: Any, text: str | list[str], max_length: int) -> bool:
    """Whether a text leaves no token of a row for a second one."""
    texts = [text] if isinstance(text, str) else _spaced(tokenizer, [text])[0]
    ids = tokenizer(texts, add_special_tokens=False, verbose=False)["input_ids"]
    room = max_length - tokenizer.num_special_tokens_to_add(pair=True)
    return sum(max(1, len(some)) for some in ids) >= room


def _encode_fast(
    tokenizer: Any,
    texts: list[Any],
    pairs: list[Any] | None,
    *,
    as_words: bool,
    lexicon: Lexicon | None,
    **cut: Any,
) -> list[_Row]:
    if as_words:
        texts = _spaced(tokenizer, texts)
        pairs = None if pairs is None else _spaced(tokenizer, [pair.split() for pair in pairs])

    def run(texts: list[Any], pairs: list[Any] | None) -> list[Any]:
        if pairs is not None:
            return encode_pairs(tokenizer, texts, pairs, as_words=as_words, **cut)
        return tokenizer(texts, is_split_into_words=as_words, **cut).encodings

    encodings = run(texts, pairs)
    for i, encoding in enumerate(encodings if as_words else ()):
        seen = set(_word_ids(encoding))
        lost = [word for word in range(len(texts[i])) if word not in seen]
        # Some tokenizers drop rare characters: without a piece of its own a word would silently
        # lose its label.
        if lost and not encoding.overflowing:
            unseen = set(lost)
            whole = [
                (tokenizer.unk_token or "?") if word in unseen else text
                for word, text in enumerate(texts[i])
            ]
            encodings[i] = run([whole], None if pairs is None else [pairs[i]])[0]
    rows = [_Row(e.ids, e.type_ids, _word_ids(e), bool(e.overflowing)) for e in encodings]
    if lexicon is None:
        return rows
    read = zip(rows, encodings, texts, pairs or [None] * len(rows), strict=True)
    return [
        replace(row, entries=entries_of(lexicon, encoding, both)) for row, encoding, *both in read
    ]


def _encode_slow(
    tokenizer: Any,
    texts: list[Any],
    pairs: list[Any] | None,
    *,
    as_words: bool,
    lexicon: Lexicon | None,
    **cut: Any,
) -> list[_Row]:
    """For tokenizers in pure Python: each token is its own word."""
    if as_words or lexicon is not None:
        what = "a task of kind tags" if as_words else "model.lexicon"
        raise ValueError(
            f"The tokenizer {type(tokenizer).__name__} cannot tell which word a token belongs to; "
            f"{what} needs an encoder with a fast tokenizer."
        )
    rows = []
    for i, text in enumerate(texts):
        pair = None if pairs is None else pairs[i]
        over = len(tokenizer(text, pair, verbose=False)["input_ids"]) > cut["max_length"]
        made = tokenizer(
            text, pair, **cut, return_token_type_ids=True, return_special_tokens_mask=True
        )
        special = made["special_tokens_mask"]
        first = special.index(0) if 0 in special else len(special)
        end = special.index(1, first) if 1 in special[first:] else len(special)
        words = [i - first if first <= i < end else -1 for i in range(len(special))]
        rows.append(_Row(made["input_ids"], made["token_type_ids"], words, over))
    return rows


def _spaced(tokenizer: Any, rows: Sequence[Sequence[str]]) -> list[list[str]]:
    """Words as the tokenizer wants them: byte-level vocabularies hold the blank before a word within its token."""
    blank = "" if tokenizer.tokenize(" a") == tokenizer.tokenize("a") else " "
    unknown = tokenizer.unk_token or "?"
    return [
        [
            f"{blank if i else ''}{word}" if word and word != unknown else unknown
            for i, word in enumerate(words)
        ]
        for words in rows
    ]


def _word_ids(encoding: Any) -> list[int]:
    return [
        -1 if word is None or sequence != 0 else word
        for word, sequence in zip(encoding.word_ids, encoding.sequence_ids, strict=True)
    ]
