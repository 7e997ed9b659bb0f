"""The types that options of a recipe have, and how a type is put in words.

One description serves error messages and the reference of options (``comoe.config.reference``).
"""

from __future__ import annotations

import dataclasses
import re
import string
import sys
import types
from collections.abc import Callable
from functools import partial
from typing import Annotated, Any, Literal, Union, get_args, get_origin

from annotated_types import Ge, Gt, Le, Len, Lt, MinLen
from pydantic import BeforeValidator, ConfigDict, Field, Strict, StrictBool, StrictStr
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
    """The table that implements the words of an option, as a member of ``Annotated``: keys that a plugin put into it
    are words too."""

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


Flag, Text = StrictBool, StrictStr
Given = Annotated[Text, MinLen(1)]
Whole = Annotated[int, Strict()]
Count, CountFrom0 = Annotated[Whole, Ge(1)], Annotated[Whole, Ge(0)]
_TEXT_TOO = BeforeValidator(_number)
Number = Annotated[float, Strict(), _TEXT_TOO]
NotNegative = Annotated[float, Strict(), Ge(0), _TEXT_TOO]
Rate = Annotated[float, Strict(), Ge(0), Le(1000), _TEXT_TOO]
Positive = Annotated[float, Strict(), Gt(0), _TEXT_TOO]
Share = Annotated[float, Strict(), Ge(0), Lt(1), _TEXT_TOO]
Fraction = Annotated[float, Strict(), Ge(0), Le(1), _TEXT_TOO]
PositiveShare = Annotated[float, Strict(), Gt(0), Le(1), _TEXT_TOO]
Temperature = Annotated[float, Strict(), Ge(0.01), _TEXT_TOO]
AT_LEAST_TWO = Rule(lambda items: len(items) > 1, "one per label")
DIFFERENT = Rule(lambda items: len(set(items)) == len(items), "all different")
Names = Annotated[list[Text], DIFFERENT]
FOLDER_NAME = Rule(
    lambda name: re.fullmatch(r"[A-Za-z0-9_][A-Za-z0-9._-]{0,199}", name) is not None,
    "a plain folder name: at most 200 letters, digits, dots, dashes, underscores, no dot or dash first",
)
KEPT_LAYERS = Rule(
    lambda word: re.fullmatch(r"(top|bottom)-[1-9][0-9]*", word) is not None, "as top-3 or bottom-3"
)
TOP_LAYERS = Rule(
    lambda text: re.fullmatch(r"top-[1-9][0-9]*", text) is not None,
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


def describe(annotation: Any) -> str:
    """A type as the user says it: "a whole number, at least 1, or auto"."""
    base, words = base_of(annotation), words_of(annotation)
    origin, arguments = get_origin(base), get_args(base)
    if origin is Literal:
        text = ("one of " if len(words) > 1 else "") + ", ".join(words)
    elif len(members(base)) > 1:
        others = [describe(part) for part in arguments if get_origin(part) is not Literal]
        text = ", or ".join([*others, *([" or ".join(words)] if words else [])])
    elif origin is list:
        text = f"a list (each item {describe(arguments[0])})"
    elif origin is dict:
        text = f"a mapping of names, each to {describe(arguments[1])}"
    else:
        text = _WORDS.get(base, "a section (key: value lines)")
    conditions = annotation.__metadata__ if base is not annotation else ()
    return ", ".join([text, *filter(None, map(_condition, conditions))])


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
