"""Emoji found in time linear in the text: the package emoji takes quadratic time where many are joined (U+200D)."""

from __future__ import annotations

import functools
import re
from collections.abc import Callable, Iterator

import emoji

JOINER = "\u200d"

WINDOW = 512
"""Characters that the package looks at together, at most twice where no emoji begins in them."""

LONGEST = 64
"""More than two emoji have characters: what stands so far before the end of a window is found
whole, and what joins may still take back."""


def replace_runs(text: str, replace: Callable[[str], str]) -> str:
    """``replace(text)``, for a function of the package that finds emoji, in linear time.

    Outside of runs of signs that emoji consist of nothing is to be found; a long run is cut where
    an emoji begins that no earlier one can change. The result is that of ``replace`` on the whole
    text, except that no letter is lost before a joined emoji with a second skin tone, as it is
    there.
    """
    return _runs().sub(lambda run: "".join(map(replace, _pieces(run[0]))), text)


def without_emoji(text: str, instead: str) -> str:
    """Every emoji replaced by one text."""
    return replace_runs(text, lambda run: emoji.replace_emoji(run, instead))


@functools.cache
def _runs() -> re.Pattern[str]:
    signs = {sign for name in emoji.EMOJI_DATA for sign in name} | {JOINER, "\ufe0e", "\ufe0f"}
    return re.compile(f"[{''.join(map(re.escape, sorted(signs)))}]+")


def _pieces(run: str) -> Iterator[str]:
    begin, size = 0, WINDOW
    while begin + size < len(run):
        if cut := _cut(run[begin : begin + size]):
            yield run[begin : begin + cut]
            begin, size = begin + cut, WINDOW
        else:
            size *= 2
    yield run[begin:]


def _cut(window: str) -> int:
    """Where the last emoji begins that reading may begin with; 0 where there is none.

    A skin tone belongs to what is before it, unless that is one sign and a joiner.
    """
    cut, before = 0, None
    for _, found in emoji.analyze(window, non_emoji=True, join_emoji=False):
        if not isinstance(found, str):
            tone = found.data["status"] == emoji.STATUS["component"]
            joined = before is not None and before.end == found.start - 1 == before.start + 1
            if found.start <= len(window) - LONGEST and (joined or not tone):
                cut = found.start
            before = found
    return cut
