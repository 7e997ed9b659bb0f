"""The types that options of a recipe have, and how a type is put in words.

One description serves error messages and the reference of options (``comoe.config.reference``).
"""

from __future__ import annotations

import dataclasses
import re
import string
import sys
import types
from collections.abc import Callable, Sequence
from functools import partial
from typing import Annotated, Any, Literal, Union, get_args, get_origin

from annotated_types import Ge, Gt, Le, Len, Lt, MinLen
from pydantic import (
    BeforeValidator,
    ConfigDict,
    Field,
    Strict,
    StrictBool,
    StrictStr,
    ValidationInfo,
)
from pydantic.dataclasses import dataclass
from pydantic_core import core_schema

section = partial(
    dataclass,
    slots=True,
    config=ConfigDict(extra="forbid", allow_inf_nan=False, use_attribute_docstrings=True),
)
"""Decorator of a section of a recipe: a dataclass that checks its values when it is made."""


@dataclasses.dataclass(frozen=True, slots=True)
class Rule:
    """A condition beyond a range, as a member of ``Annotated``."""

    holds: Callable[[Any], bool]
    text: str
    """Follows a type in a description: a list of at least 1, **all different**."""

    def _check(self, value: Any) -> Any:
        if not self.holds(value):
            raise ValueError(self.text)
        return value

    def __get_pydantic_core_schema__(self, source: Any, handler: Callable[[Any], Any]) -> Any:
        return core_schema.no_info_after_validator_function(self._check, handler(source))


@dataclasses.dataclass(frozen=True, slots=True)
class Table:
    """The table that implements the words of an option, as a member of ``Annotated``: keys that a
    plugin put into it are words too."""

    module: str
    """Where it is; read only where something else has imported it."""
    name: str
    text: str = "or that of a plugin"
    """Follows the words in a description."""

    def words(self) -> tuple[str, ...]:
        """Its keys, none before its module is imported."""
        return tuple(getattr(sys.modules.get(self.module), self.name, ()))

    def _check(self, value: Any, check: Callable[[Any], Any]) -> Any:
        return value if isinstance(value, str) and value in self.words() else check(value)

    def __get_pydantic_core_schema__(self, source: Any, handler: Callable[[Any], Any]) -> Any:
        return core_schema.no_info_wrap_validator_function(self._check, handler(source))


SAVED = {"saved": True}
"""Context of validation: of a run that was begun, which keeps values beyond a later limit."""


@dataclasses.dataclass(frozen=True, slots=True)
class Limit(Rule):
    """A condition that only new runs must hold: without it a value would have no meaning.

    A message has it where it is broken; the reference of options where it is not ``usual``.
    """

    usual: bool = False
    """One that stands for all options of its kind."""

    def _check_new(self, value: Any, info: ValidationInfo) -> Any:
        return value if info.context == SAVED else Rule._check(self, value)

    def __get_pydantic_core_schema__(self, source: Any, handler: Callable[[Any], Any]) -> Any:
        return core_schema.with_info_after_validator_function(self._check_new, handler(source))

    def broken(self, value: Any) -> bool:
        """Whether a value of any type breaks it."""
        try:
            return not self.holds(_number(value) if self.holds is not SHORT.holds else value)
        except TypeError:
            return False


def at_least(number: float, *, usual: bool = False) -> Limit:
    """A lower limit."""
    # A value that another condition refuses breaks it alone.
    return Limit(lambda value: value >= number or value <= 0, f"at least {number:,}", usual)


def at_most(number: float, *, usual: bool = False) -> Limit:
    """An upper limit."""
    return Limit(lambda value: value <= number, f"at most {number:,}", usual)


MOST_CHARACTERS = 4096
"""Of a text in a recipe: the longest path of most systems."""

SHORT = Limit(
    lambda text: len(text) <= MOST_CHARACTERS and "\0" not in text,
    f"of at most {MOST_CHARACTERS:,} characters, none of them NUL",
    usual=True,
)


def one_of(words: Sequence[str]) -> Limit:
    """A word of a list that a library has, and another release of it may have had otherwise."""
    return Limit(lambda word: word in words, f"one of {', '.join(words)}")


def option(default: Any, *, read_when: str) -> Any:
    """A field that counts only under a condition; setting it otherwise is worth a warning.

    Args:
        default: its default.
        read_when: ``<option> = <word> or <word>`` (for a list: that one of its items is the word),
            ``<option> > <number>`` (for a mapping or list: its length), or ``images are read``; several
            joined by `` and ``.
    """
    return Field(default, json_schema_extra={"read_when": read_when})


def _number(value: Any) -> Any:
    """``1e-4`` is text to YAML 1.1, which wants ``1.0e-4``: text that is a number counts as one."""
    try:
        return float(value) if isinstance(value, str) else value
    except ValueError:
        return value


def template_fields(prompt: str) -> set[str]:
    """What stands in braces in a template; ValueError for text that is no template."""
    found = string.Formatter().parse(prompt)
    return {
        f"{name}{'!' * bool(conversion)}{conversion or ''}{':' * bool(form)}{form}"
        for _, name, form, conversion in found
        if name is not None
    }


def _is_prompt(prompt: str) -> bool:
    try:
        return {"text"} <= template_fields(prompt) <= {"text", "pair"}
    except ValueError:
        return False


Flag, Text = StrictBool, Annotated[StrictStr, SHORT]
Given = Annotated[Text, MinLen(1)]
Whole = Annotated[int, Strict()]
_MOST = at_most(10**9, usual=True)
Count, CountFrom0 = Annotated[Whole, Ge(1), _MOST], Annotated[Whole, Ge(0), _MOST]
Width, WidthFrom0 = (Annotated[Whole, Ge(least), at_most(131_072)] for least in (1, 0))
Posts = Annotated[Whole, Ge(1), at_most(1_000_000)]
Seed = Annotated[Whole, Ge(0), at_most(10**18)]
_TEXT_TOO = BeforeValidator(_number)
Number = Annotated[float, Strict(), _TEXT_TOO]
NotNegative = Annotated[float, Strict(), Ge(0), _MOST, _TEXT_TOO]
Rate = Annotated[float, Strict(), Ge(0), Le(1000), _TEXT_TOO]
Positive = Annotated[float, Strict(), Gt(0), at_least(1e-30, usual=True), _MOST, _TEXT_TOO]
Seconds = Annotated[float, Strict(), Gt(0), at_least(1), at_most(10**7), _TEXT_TOO]
Epochs = Annotated[float, Strict(), Gt(0), at_most(100_000), _TEXT_TOO]
Share = Annotated[float, Strict(), Ge(0), Lt(1), _TEXT_TOO]
Fraction = Annotated[float, Strict(), Ge(0), Le(1), _TEXT_TOO]
PositiveShare = Annotated[float, Strict(), Gt(0), Le(1), _TEXT_TOO]
Temperature = Annotated[float, Strict(), Ge(0.01), _MOST, _TEXT_TOO]
AT_LEAST_TWO = Rule(lambda items: len(items) > 1, "one per label")
DIFFERENT = Rule(lambda items: len(set(items)) == len(items), "all different")
Names = Annotated[list[Text], DIFFERENT]
FOLDER_NAME = Rule(
    lambda name: re.fullmatch(r"[A-Za-z0-9_][A-Za-z0-9._-]{0,199}", name) is not None,
    "a plain folder name: at most 200 letters, digits, dots, dashes, underscores, no dot or dash first",
)
KEPT_LAYERS = Rule(
    lambda word: re.fullmatch(r"(top|bottom)-[1-9][0-9]{0,3}", word) is not None,
    "as top-3 or bottom-3",
)
TOP_LAYERS = Rule(
    lambda text: re.fullmatch(r"top-[1-9][0-9]{0,3}", text) is not None,
    "top-<n> for the last n layers",
)
PROMPT = Rule(
    _is_prompt,
    "with {text} in it and no other field than {text} and {pair} (a brace itself is doubled)",
)


def base_of(annotation: Any) -> Any:
    """A type without its conditions."""
    return get_args(annotation)[0] if get_origin(annotation) is Annotated else annotation


def member(expected: Any, key: Any) -> Any:
    """The type below a key of a section, mapping or list; None where there is none."""
    if dataclasses.is_dataclass(expected):
        found = expected.__pydantic_fields__.get(key)
        return found and found.rebuild_annotation()
    expected = base_of(expected)
    return get_args(expected)[-1] if get_origin(expected) in (dict, list) else None


def members(annotation: Any) -> tuple[Any, ...]:
    """The members of a union; another type is its own only member."""
    is_union = get_origin(annotation) in (Union, types.UnionType)
    return get_args(annotation) if is_union else (annotation,)


def words_of(annotation: Any) -> tuple[str, ...]:
    """The words that a type allows; empty where it allows none by name."""
    bases = map(base_of, members(base_of(annotation)))
    words = [word for base in bases if get_origin(base) is Literal for word in get_args(base)]
    for condition in annotation.__metadata__ if get_origin(annotation) is Annotated else ():
        words += condition.words() if isinstance(condition, Table) else ()
    return tuple(dict.fromkeys(words))


NOTHING = object()
"""No value at all."""


def describe(annotation: Any, *, value: Any = NOTHING) -> str:
    """A type as the user says it: "a whole number, at least 1, or auto".

    Args:
        annotation: the type.
        value: that it does not take; of the limits only those that it breaks are named.
    """
    base, words = base_of(annotation), words_of(annotation)
    origin, arguments = get_origin(base), get_args(base)
    if origin is Literal:
        text = ("one of " if len(words) > 1 else "") + ", ".join(words)
    elif len(members(base)) > 1:
        others = [
            describe(part, value=value) for part in arguments if get_origin(part) is not Literal
        ]
        text = ", or ".join([*others, *([" or ".join(words)] if words else [])])
    elif origin is list:
        text = f"a list (each item {describe(arguments[0], value=value)})"
    elif origin is dict:
        text = f"a mapping of names, each to {describe(arguments[1], value=value)}"
    else:
        text = _WORDS.get(base, "a section (key: value lines)")
    conditions = annotation.__metadata__ if base is not annotation else ()
    conditions = [each for each in conditions if _is_shown(each, value)]
    return ", ".join([text, *filter(None, map(_condition, conditions))])


def _is_shown(condition: Any, value: Any) -> bool:
    if not isinstance(condition, Limit):
        return True
    return not condition.usual if value is NOTHING else condition.broken(value)


def _condition(condition: Any) -> str:
    if isinstance(condition, (Rule, Table)):
        return condition.text
    for kind, text in _CONDITIONS.items():
        if isinstance(condition, kind):
            return text.format(*dataclasses.astuple(condition))
    return ""


_WORDS: dict[Any, str] = {
    bool: "true or false",
    int: "a whole number",
    float: "a number",
    str: "text",
    types.NoneType: "null",
}

_CONDITIONS: dict[type, str] = {
    Ge: "at least {0}",
    Gt: "above {0}",
    Le: "at most {0}",
    Lt: "below {0}",
    Len: "of {0} items",
    MinLen: "not empty",
}
