"""What Chinese posts have that others have not: full-width forms, topics between two signs, emoji codes, repost chains.

Everything here leaves its own result alone, so that a post can be cleaned twice.
"""

from __future__ import annotations

import re

HAN = "\u3400-\u4dbf\u4e00-\u9fff\uf900-\ufaff"
"""Chinese characters, as a part of a character class."""


# The signs that make up addresses, names and codes. Sentence signs stay full-width: Chinese
# vocabularies have them so.
_FULL_WIDTH = {
    code: code - 0xFEE0 for code in range(0xFF01, 0xFF5F) if chr(code) not in "！（），：；？｛｝～"
}


_CODE = re.compile(rf"\[(?=[^\[\]]*[{HAN}A-Za-z])\w{{1,12}}\]")


_HAN_CODE = re.compile(rf"\[(?=[^\[\]]*[{HAN}])\w{{1,12}}\]")


_LATIN_CODES = re.compile(
    r"\[(?:doge|cry|good|haha|hold|kiss|love|ok|no|orz|wow|yeah)\]", flags=re.IGNORECASE
)


_HAS_HAN = re.compile(f"[{HAN}]")


_TOPIC = re.compile(r"#(?![\s#])([^#\r\n]{1,60})(?<!\s)#(?![A-Za-z0-9])")


_HAN_TOPIC = re.compile(
    rf"[#\uff03](?=[^#\uff03]*[{HAN}])(?![\s#\uff03])([^#\uff03\r\n]{{1,60}})(?<!\s)[#\uff03]"
)


_REPOST = re.compile(r"(?<!:)\s*//\s*(?=@)")


_SHORT_LINK = r"https?://t\.cn/[A-Za-z0-9]+"


# A name has at most 30 letters and ends at a blank, a colon or any other sign; before it may stand
# a Chinese word.
_MENTION = r"(?<![A-Za-z0-9_.%+-])@[\w-]{1,30}(?![\w-])"


def half_width(text: str) -> str:
    """Full-width letters, digits and technical signs to ASCII; sentence signs (，。！？：；（）～) as they are."""
    return text.translate(_FULL_WIDTH)


def codes_to_words(text: str) -> str:
    """Emoji codes to words between colons, as emoji are: ``[笑cry]`` becomes ``:笑cry:``."""
    return _CODE.sub(lambda match: f" :{match[0][1:-1]}: ", text)


def without_codes(text: str) -> str:
    """Without emoji codes: those with a Chinese character; well-known Latin ones where the text is Chinese."""
    text, chinese = _HAN_CODE.sub(" ", text), _HAS_HAN.search(text) is not None
    return _LATIN_CODES.sub(" ", text) if chinese else text


def topics_apart(text: str) -> str:
    """A blank on both sides of each ``#topic#``, whose words and signs stay.

    A topic may hold blanks inside, not at its ends, and no Latin letter follows it: ``#one#two``
    and ``#one and #two`` are hashtags.
    """
    return _TOPIC.sub(lambda match: f" {match[0]} ", text)


def without_topics(text: str) -> str:
    """Without the topics that hold a Chinese character."""
    return _HAN_TOPIC.sub(" ", text)


def reposts_apart(text: str) -> str:
    """A blank before the ``//`` of ``//@user:``, which would else be read as part of a link."""
    return _REPOST.sub(" //", text)


def links_and_users(text: str, *, link: str, url: str, user: str) -> str:
    """Links and users to placeholders, with a blank where a word touches them.

    Args:
        text: half-width, with topics and reposts apart.
        link: pattern of links in general.
        url: placeholder of links; "" removes them.
        user: placeholder of users.
    """
    return _placed(_placed(text, f"{_SHORT_LINK}|{link}", url), _MENTION, user)


def _placed(text: str, pattern: str, placeholder: str) -> str:
    """Every match becomes the placeholder; one that holds a match itself is left alone."""

    def apart(match: re.Match[str]) -> str:
        begin, end = match.span()
        # Of what is before and behind one sign alone: more would be copied for each match.
        before, after = text[max(0, begin - 1) : begin], text[end : end + 1]
        return f"{' ' * before.isalnum()}{placeholder}{' ' * after.isalnum()}"

    return re.sub(f"{pattern}|{re.escape(placeholder)}" if placeholder else pattern, apart, text)
