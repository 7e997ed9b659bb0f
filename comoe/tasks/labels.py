"""Raw cells of a data file: what is missing, which label is meant, and the order of labels."""

from __future__ import annotations

import json
import math
import re
import unicodedata
from collections.abc import Iterable, Mapping, Sequence

import numpy as np

from comoe.config.errors import unknown_name

OUTSIDE = "O"
"""The tag of a word that belongs to no span."""


WORD = re.compile(r"(?:https?://|www\.)\S+|[@#]?\w+(?:[-'’_.]\w+)*|[^\w\s]+")
"""A link, a user, a hashtag, a word (don't, U.S), or a run of signs (emoticon, full stop)."""


_LONE_SURROGATE = re.compile("[\ud800-\udfff]")


_WHOLE_NUMBER = re.compile(r"([+-]?\d+)\.0+")


def whole_characters(text: str) -> str:
    """Half a surrogate pair, which no tokenizer and no UTF-8 file takes, becomes the replacement character."""
    return _LONE_SURROGATE.sub("\ufffd", text)


def split_words(text: str) -> list[str]:
    """A post as words: links, users and hashtags whole, signs apart from letters."""
    return WORD.findall(text)


def is_missing(value: object) -> bool:
    """True for a cell without a label: None, NaN, an empty text or one of blanks only."""
    if value is None:
        return True
    if isinstance(value, str):
        return not value.strip()
    return isinstance(value, (float, np.floating)) and bool(np.isnan(value))


def label_name(value: object) -> str:
    """The name that a raw cell spells: 1, 1.0, "1" and "1.0" are one name ("1"), as are True and "true".

    A CSV column of whole numbers turns into floats as soon as one cell is empty; its labels must
    not change by that.
    """
    if isinstance(value, np.generic):
        value = value.item()
    if isinstance(value, bool):
        return str(value).lower()
    text = whole_characters(str(value)).strip()
    whole = _WHOLE_NUMBER.fullmatch(text)
    return whole[1] if whole else text


def appearance(label: str) -> str:
    """What a reader sees of a label: case, blanks, forms of one sign and invisible signs make no difference."""
    # Folding may leave what another form is a single sign for.
    seen = unicodedata.normalize("NFKC", unicodedata.normalize("NFKC", label).casefold())
    shown = (
        sign for sign in seen if unicodedata.category(sign) != "Cf" and sign not in "\ufe0e\ufe0f"
    )
    return " ".join("".join(shown).split())


def label_id(value: object, labels: Sequence[str]) -> int:
    """Id of the label that one raw cell names.

    Names are compared exactly, upper and lower case included. Where no label is itself a whole
    number, a whole number is taken as an id: data sets keep ids in their files and names beside
    them. Where labels are numbers ("1" to "5"), a number is always a name, so that a stray 0 does
    not silently become the first label.

    Args:
        value: text, int, float with a whole value, or bool.
        labels: label names in the order of their ids.

    Raises:
        ValueError: no such label, with the nearest name and all names; an object or a list.
    """
    if isinstance(value, (Mapping, list, tuple, np.ndarray)):
        raise ValueError(f"{value!r} is an object or a list; a label is a text or a number")
    name = str(value).strip()
    if name not in labels:
        name = label_name(value)
    if name in labels:
        return labels.index(name)
    if (
        _is_integer(name)
        and 0 <= int(name) < len(labels)
        and not any(_is_integer(label) for label in labels)
    ):
        return int(name)
    raise unknown_name("label", repr(name), labels)


def soft_cell(value: object, labels: Sequence[str]) -> np.ndarray:
    """Numbers of a cell, one per label, as given, float32, (Y,).

    Args:
        value: a list in the order of the labels, or a mapping of labels to numbers; or JSON of one.
        labels: label names in the order of their ids.

    Raises:
        ValueError: neither of them, an unknown label, or a number that is not finite or below 0.
    """
    try:
        found = json.loads(value) if isinstance(value, str) else value
    except ValueError:
        found = None
    if isinstance(found, Mapping):
        numbers = [0.0] * len(labels)
        for name, number in found.items():
            # A mapping of a columnar file has every key in every row.
            numbers[label_id(name, labels)] = 0.0 if number is None else number
    elif isinstance(found, (list, tuple, np.ndarray)):
        numbers = list(found)
    else:
        raise ValueError(
            f"{value!r} is neither a list of numbers nor a mapping of labels to numbers"
        )
    fine = all(
        isinstance(number, (int, float, np.number))
        and not isinstance(number, bool)
        and 0 <= number < math.inf
        for number in numbers
    )
    if len(numbers) != len(labels) or not fine:
        named = ", ".join(labels)
        raise ValueError(f"{value!r} is not one number of at least 0 for each label ({named})")
    return np.array(numbers, dtype=np.float32)


def natural_order(names: Iterable[str]) -> tuple[str, ...]:
    """Names sorted as a reader would: "2" before "10", "topic 9" before "topic 11"; "O", where there, is the first."""

    def key(name: str) -> tuple:
        if _is_integer(name):
            return (name != OUTSIDE, 0, int(name), ())
        parts = (part for part in re.split(r"(\d+)", name) if part)
        return (
            name != OUTSIDE,
            1,
            0,
            tuple((0, int(part), "") if part.isdecimal() else (1, 0, part) for part in parts),
        )

    return tuple(sorted(set(names), key=key))


def _is_integer(name: str) -> bool:
    return re.fullmatch(r"[+-]?[0-9]+", name) is not None
