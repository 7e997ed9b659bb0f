"""Cleaning of the text of a post before it is tokenized.

All presets are idempotent, so a model predicts the same for cleaned and for raw text. A post that
has any visible character never becomes empty.
"""

from __future__ import annotations

import functools
import html
import re
import unicodedata
from collections.abc import Callable, Sequence

import emoji

from comoe.config.errors import unknown_name
from comoe.config.recipe import NormalizeConfig
from comoe.data.text import chinese
from comoe.data.text.emoji_runs import replace_runs, without_emoji

VERSION = f"2-{emoji.__version__}"
"""Changes when the same text would be cleaned differently: part of the key of cached tokens."""


FALLBACK = "@user"
"""What is left of a post of which the chosen placeholders leave nothing."""


_ENTITY = re.compile(r"&(?:#\d{1,7}|#[xX][0-9a-fA-F]{1,6}|[A-Za-z][A-Za-z0-9]{1,31});")


_AMPERSANDS = re.compile(r"&(?:amp;|#0*38;|#[xX]0*26;)+")


# Joiners (U+200C, U+200D) stay: Persian and many Indic scripts, and emoji of several parts, are
# written with them.
_INVISIBLE = re.compile(
    "[\x00-\x08\x0e-\x1b\x7f-\x84\x86-\x9f\u00ad\u180e\u200b\u200e\u200f\u202a-\u202e\u2060-\u2064\u2066-\u206f\ufeff"
    "\ufff9-\ufffb\ud800-\udfff]"
)


_LEFT_OF_EMOJI = re.compile("[\ufe0e\ufe0f\u20e3]")


# Only ASCII after the scheme: in Chinese text the sentence goes on right behind the address.
_LINK = r"(?:https?://|www\.)[!#-;=?-~]*|\bpic\.twitter\.com/[!#-;=?-~]*"


_MENTION = r"(?<!\w)[@\uff20]\w+"


_HASHTAG = re.compile(r"(?<!\w)[#\uff03]\w+")


_APOSTROPHE = re.compile(r"(?<=\w)['\u2019](?=\w)")


def normalize_post(text: str, config: NormalizeConfig) -> str:
    """Clean one post as ``config.preset`` says.

    Args:
        text: the raw post.
        config: preset, language of emoji names, placeholders.

    Returns:
        The cleaned post; empty only where ``is_blank(text)``. Cleaning it again changes nothing,
            except for entities
        nested more than eight deep and placeholders that are themselves blanks, tags or emoji.

    Raises:
        ValueError: the package emoji does not know the language.
    """
    return PRESETS[config.preset](text, config)


def normalize_words(words: Sequence[str], config: NormalizeConfig) -> list[str]:
    """Clean word by word; as many words as before, a blank word as an empty string."""
    return [normalize_post(word, config) for word in words]


def same_text(text: str) -> str:
    """What posts have in common that count as one text: upper and lower case and white space make no difference."""
    return " ".join(text.casefold().split())


def is_blank(text: str) -> bool:
    """True for a text without a visible character: nothing, white space, control characters."""
    return not _visible(text).strip()


def unnormalized(text: str, config: NormalizeConfig) -> str:
    """The text as it is, without the control characters that no tokenizer takes."""
    return "" if is_blank(text) else _INVISIBLE.sub("", text)


def social(text: str, config: NormalizeConfig) -> str:
    """Users and links to placeholders, emoji to words, entities to characters, white space to single blanks.

    Case, punctuation and hashtag words stay: they carry sentiment. Placeholders are those of
    TweetEval by default.
    """
    cleaned = _plain(text, emoji_to=lambda part: _emoji_names(part, config.language))
    cleaned = _replace(_replace(cleaned, _LINK, config.url), _MENTION, config.user)
    return _single_blanks(cleaned) or ("" if is_blank(text) else FALLBACK)


def weibo(text: str, config: NormalizeConfig) -> str:
    """``social`` for Chinese posts; ``language: zh`` names emoji in Chinese.

    Full-width letters, digits and technical signs become ASCII, while ，。！？：；（）～ stay: vocabularies
    of Chinese encoders have them. Emoji codes ([笑cry]) become words as emoji do (:笑cry:). Topics
    keep words and signs and stand apart (#世界 读书日#). A user name ends at the first blank or sign;
    repost chains (//@user:) stay readable.
    """
    cleaned = text
    for _ in range(8):
        before = cleaned
        cleaned = _plain(
            cleaned, emoji_to=lambda part: _emoji_names(chinese.half_width(part), config.language)
        )
        cleaned = chinese.reposts_apart(_single_blanks(chinese.codes_to_words(cleaned)))
        cleaned = chinese.topics_apart(cleaned)
        cleaned = chinese.links_and_users(cleaned, link=_LINK, url=config.url, user=config.user)
        cleaned = _single_blanks(cleaned)
        # In turns: a link that became short can make a topic short enough to be one.
        if cleaned == before:
            break
    return cleaned or ("" if is_blank(text) else FALLBACK)


def strict(text: str, config: NormalizeConfig) -> str:
    """Lower case; links, users, hashtags and Chinese topics, emoji and emoji codes, and punctuation removed.

    A post of nothing else keeps the words of its ``social`` form ("user", "grinning face"), else
    that form itself.

    Source: the protocol of Stein & Keller.
    """
    cleaned = _plain(text, emoji_to=lambda part: without_emoji(part, " "))
    cleaned = chinese.without_topics(chinese.without_codes(cleaned)).lower()
    cleaned = re.sub(_MENTION, " ", re.sub(_LINK, " ", cleaned))
    if kept := _words_only(_HASHTAG.sub(" ", cleaned)):
        return kept
    form = social(text, config).lower()
    return _words_only(form) or form


def _plain(text: str, *, emoji_to: Callable[[str], str]) -> str:
    """HTML entities to characters, doubly escaped ones too; emoji to words; no invisible characters.

    Only entities with a semicolon: "?a=1&copy=2" has none. In turns: each can leave the others
    something to do.
    """
    for _ in range(8):
        before, text = text, _visible(text)
        if "&" in text:
            text = _visible(
                _ENTITY.sub(lambda match: html.unescape(match[0]), _AMPERSANDS.sub("&", text))
            )
        if not text.isascii():
            text = _LEFT_OF_EMOJI.sub(" ", emoji_to(text))
        if text == before:
            break
    return text


def _visible(text: str) -> str:
    return _INVISIBLE.sub("", text)


def _single_blanks(text: str) -> str:
    return re.sub(r"\s+", " ", text).strip()


def _replace(text: str, pattern: str, placeholder: str) -> str:
    """Every match becomes the placeholder; one that holds a match itself is left alone."""
    either = f"{pattern}|{re.escape(placeholder)}" if placeholder else pattern
    return re.sub(either, lambda match: placeholder, text)


def _emoji_names(text: str, language: str) -> str:
    """Each emoji becomes its name between colons. BERT's vocabularies would make it an unknown token."""
    if language not in emoji.LANGUAGES:
        raise unknown_name("data.normalize.language", language, emoji.LANGUAGES)
    names = functools.partial(emoji.demojize, delimiters=(" :", ": "), language=language)
    return replace_runs(text, names)


def _words_only(text: str) -> str:
    """Without punctuation and symbols. By category: to \\w the vowel signs of Indic scripts are no letters."""
    text = _APOSTROPHE.sub("", text)
    return _single_blanks(
        text.translate({ord(c): " " for c in set(text) if unicodedata.category(c)[0] in "PS"})
    )


PRESETS: dict[str, Callable[[str, NormalizeConfig], str]] = {
    "none": unnormalized,
    "social": social,
    "strict": strict,
    "weibo": weibo,
}
"""Preset -> cleaning of one text."""
