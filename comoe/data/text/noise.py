"""Posts as a careless or another writer would have put them: evaluation sets made on the fly, the same everywhere.

What becomes of a post depends on its text, the kind of noise and the seed alone, so that two runs,
whatever their other data sets and ranks, are scored on the same noisy posts. Second texts (targets,
aspects) and images stay as they are.
"""

from __future__ import annotations

import re
import zlib
from collections.abc import Callable
from dataclasses import replace

import numpy as np

from comoe.data.posts import Post, PostSplit, shown_text
from comoe.data.text import emoji_runs
from comoe.data.text.chinese import without_codes, without_topics
from comoe.data.text.normalize import is_blank

SEPARATOR = "+"
"""Between a split's name and the noise on it: ``validation+typos``."""

NOISY = ("validation", "test")
"""Splits that are also scored under ``data.noise``, where they have labels."""


_WORD = re.compile(r"\S+")


_NOT_TYPED = re.compile(r"[@#\uff20\uff03]|https?://|www\.")


_LETTERS = re.compile(r"[A-Za-z\u00c0-\u024f]{3,}")


_SPOKEN = re.compile(r"[A-Za-z\u00c0-\u024f]+(?:['\u2019][A-Za-z\u00c0-\u024f]+)*")


_VOWEL = re.compile(r"[aeiouy]", re.IGNORECASE)


_HASHTAG = re.compile(r"(?<!\w)[#\uff03]\w+")


_HASH_SIGN = re.compile(r"(?<!\w)[#\uff03](?=\w)|(?<=\w)[#\uff03](?!\w)")


_ROWS = ("qwertyuiop", "asdfghjkl", "zxcvbnm")


_KEYS_BESIDE = {
    letter: "".join(row[place + step] for step in (-1, 1) if 0 <= place + step < len(row))
    for row in _ROWS
    for place, letter in enumerate(row)
}


def noisy(posts: PostSplit, name: str, *, rate: float, seed: int) -> PostSplit:
    """The posts under one kind of noise, with their labels.

    A post given as words keeps all of its words, so that tags stay where they are: a hashtag loses
    its sign there, an emoji becomes an empty word. A text that would become empty stays as it is.

    Args:
        posts: a split.
        name: key of ``NOISES``.
        rate: share of the words that get a typo, or a letter drawn out, 0 to 1.
        seed: any non-negative int.
    """
    in_text, in_word = NOISES[name]

    def rng_of(text: str) -> np.random.Generator:
        return np.random.default_rng([seed, zlib.crc32(text.encode("utf-8", "surrogatepass"))])

    def text_of(text: str) -> str:
        changed = in_text(text, rate, rng_of(text))
        return text if is_blank(changed) else changed

    def words_of(text: str, words: list[str] | None) -> list[str] | None:
        rng = rng_of(text)
        changed = None if words is None else [in_word(word, rate, rng).strip() for word in words]
        return words if changed is None or is_blank("".join(changed)) else changed

    words = [words_of(text, given) for text, given in zip(posts.texts, posts.words, strict=True)]
    texts = [
        text_of(text) if given is None else " ".join(given)
        for text, given in zip(posts.texts, words, strict=True)
    ]

    def changed(post: Post) -> Post:
        return replace(post, text=text_of(post.text), words=words_of(post.text, post.words))

    # Of an author all posts; of a post with neighbors itself, as a second text stays too.
    members = [
        tuple(
            changed(post) if place == 0 or post.author is not None else post
            for place, post in enumerate(some)
        )
        for some in posts.members
    ]
    for number, some in enumerate(members):
        if some:
            authors = some[0].author is not None
            texts[number] = shown_text(some) if authors else some[0].text
    return replace(posts, texts=texts, words=words, members=members)


def typos_in_text(text: str, rate: float, rng: np.random.Generator) -> str:
    """A share of the words with one slip each; links, users and hashtags stay."""
    return _WORD.sub(lambda match: typo_in_word(match[0], rate, rng), text)


def typo_in_word(word: str, rate: float, rng: np.random.Generator) -> str:
    """With probability ``rate`` one slip within the word: letters swapped, one lost, doubled, or the key beside it.

    The first letter stays, as it mostly does where people write (Pruthi et al. 2019,
    arXiv:1905.11268). Words without three Latin letters in a row have no such slip.
    """
    # Drawn for every word, so that one word's slip does not move the others'.
    drawn, place, kind, side = rng.random(4)
    letters = None if _NOT_TYPED.match(word) else _LETTERS.search(word)
    if drawn >= rate or letters is None:
        return word
    first, last = letters.span()
    at = first + 1 + int(place * (last - first - 1))
    slip = SLIPS[int(kind * len(SLIPS))]
    return slip(word, min(at, last - 1), side)


def informal_text(text: str, rate: float, rng: np.random.Generator) -> str:
    """Every word as ``informal_word`` writes it; links, users and hashtags stay."""
    return _WORD.sub(lambda match: informal_word(match[0], rate, rng), text)


def informal_word(word: str, rate: float, rng: np.random.Generator) -> str:
    """The short form of a common word (``SHORT_FORMS``); else no apostrophes and, with probability ``rate``, a letter
    drawn out: its last vowel two to four times more, or the last letter of a word that ends in one.
    """
    # Drawn for every word, as typos are.
    drawn, times = rng.random(2)
    letters = None if _NOT_TYPED.match(word) else _SPOKEN.search(word)
    if letters is None:
        return word
    spoken = letters[0].replace("\u2019", "'")
    if short := SHORT_FORMS.get(spoken.lower()):
        told = short.upper() if len(spoken) > 1 and spoken.isupper() else short
    else:
        told = spoken.replace("'", "")
        if drawn < rate and (vowels := list(_VOWEL.finditer(told))):
            last = vowels[-1].end()
            told = told[:last] + told[last - 1] * (2 + int(times * 3)) + told[last:]
    return word[: letters.start()] + told + word[letters.end() :]


def without_hashtags(text: str, rate: float, rng: np.random.Generator) -> str:
    """Hashtags and Chinese topics (``#...#``) dropped."""
    return _HASHTAG.sub("", without_topics(text))


def without_hash_sign(word: str, rate: float, rng: np.random.Generator) -> str:
    """The word of a hashtag."""
    return _HASH_SIGN.sub("", word)


def without_emoji(text: str, rate: float, rng: np.random.Generator) -> str:
    """Emoji and codes of emoji (``[笑cry]``) dropped."""
    return without_codes(emoji_runs.without_emoji(text, ""))


def _swapped(word: str, at: int, side: float) -> str:
    # Two equal letters would be no slip: the one before is swapped with them then, or lost.
    other = at + 1 if at + 1 < len(word) and word[at + 1].isalpha() else at - 1
    low, high = sorted((at, other))
    changed = word[:low] + word[high] + word[low] + word[high + 1 :]
    return changed if changed != word else _lost(word, at, side)


def _lost(word: str, at: int, side: float) -> str:
    return word[:at] + word[at + 1 :]


def _doubled(word: str, at: int, side: float) -> str:
    return word[: at + 1] + word[at:]


def _beside(word: str, at: int, side: float) -> str:
    letter = word[at]
    keys = _KEYS_BESIDE.get(letter.lower())
    if keys is None:
        return _doubled(word, at, side)
    key = keys[int(side * len(keys))]
    return word[:at] + (key.upper() if letter.isupper() else key) + word[at + 1 :]


SLIPS: tuple[Callable[[str, int, float], str], ...] = (_swapped, _lost, _doubled, _beside)
"""(word, place of a letter, number in [0, 1)) -> the word with a slip there."""


SHORT_FORMS: dict[str, str] = dict(
    pair.split("=")
    for pair in (
        "you=u your=ur you're=ur are=r be=b see=c why=y for=4 to=2 too=2 and=n "
        "because=cuz before=b4 great=gr8 late=l8 later=l8r mate=m8 wait=w8 hate=h8 "
        "please=pls thanks=thx thank=thx people=ppl about=abt with=w without=w/o "
        "tomorrow=tmrw tonight=2nite today=2day right=rt really=rly though=tho "
        "through=thru enough=enuf love=luv okay=ok know=kno what=wat that=dat "
        "the=da them=dem going=goin getting=gettin have=hav nothing=nothin "
        "something=smth someone=sum1 everyone=every1 message=msg minutes=mins "
        "probably=prob definitely=def seriously=srsly obviously=obv favorite=fav"
    ).split()
)
"""Word -> how it is written in haste."""


_Noise = Callable[[str, float, np.random.Generator], str]


NOISES: dict[str, tuple[_Noise, _Noise]] = {
    "typos": (typos_in_text, typo_in_word),
    "informal": (informal_text, informal_word),
    "no_hashtags": (without_hashtags, without_hash_sign),
    "no_emoji": (without_emoji, without_emoji),
}
"""``data.noise`` -> what it does to a text, and to one word of a post given as words."""
