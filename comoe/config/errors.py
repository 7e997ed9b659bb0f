"""Messages for what a user got wrong: key path, value, rule, and the nearest right name."""

from __future__ import annotations

import dataclasses
import difflib
import functools
from collections.abc import Iterable, Mapping
from typing import Any, get_args, get_origin

from pydantic import ValidationError

from comoe.config.fields import base_of, describe, member, members, words_of

SHOWN = 200
"""Characters of a value that a message shows."""


def differences(begun: Mapping[str, str], now: Mapping[str, str]) -> str:
    """What two starts of one work do not have in common, for a message; empty where they are the same."""
    changed = [name for name in {**begun, **now} if begun.get(name) != now.get(name)]
    return "; ".join(f"{name} was {begun.get(name)}, is now {now.get(name)}" for name in changed)


def nearest(name: str, valid: Iterable[str]) -> str | None:
    """The valid name that looks most like ``name``, None when nothing does. Upper and lower case count as equal."""
    by_lower = {option.lower(): option for option in valid}
    close = difflib.get_close_matches(name.lower(), list(by_lower), n=1, cutoff=0.6)
    return by_lower[close[0]] if close else None


def unknown_name(what: str, name: str, valid: Iterable[str]) -> ValueError:
    """The one error for a name that a table does not hold; to be raised by the caller.

    Args:
        what: what the name should have been: a noun ("option", "gate") or a key path
            ("model.moe.gate").
        name: the wrong name.
        valid: the right names.

    Returns:
        ``gtae is not a gate; did you mean gate? (one of: ...)``, with the key path in front where
            there is one.
    """
    valid = list(valid)
    if "." in what or "/" in what:
        message = f"{what} is {name!r}, which does not exist"
    else:
        message = f"{name} is not {'an' if what[:1] in 'aeiou' else 'a'} {what}"
    guess = nearest(name, valid)
    hint = f"; did you mean {guess}?" if guess else ""
    return ValueError(f"{message}{hint} (one of: {', '.join(valid) or 'nothing'})")


def place_of(path: str, origins: Mapping[str, str]) -> str:
    """ "file:line: " of a key, or of the nearest section around it that was written down; "" when neither is known."""
    while path and path not in origins:
        path = path.rpartition(".")[0]
    return f"{origins[path]}: " if path else ""


def message_of(
    error: ValidationError, schema: type, *, raw: Any, origins: Mapping[str, str]
) -> str:
    """One sentence for the first mistake; a wrong key goes first, as it may be the cause of others.

    Args:
        error: of pydantic.
        schema: the section that was to be made.
        raw: what it was to be made of.
        origins: key path -> "file:line".
    """
    mistakes = error.errors(include_url=False, include_context=False)
    mistakes.sort(
        key=lambda mistake: mistake["type"] not in ("unexpected_keyword_argument", "invalid_key")
    )
    kind, loc, value = mistakes[0]["type"], mistakes[0]["loc"], raw
    expected: Any = schema
    keys: list[str] = []
    for depth, key in enumerate(loc):
        inner = member(expected, key)
        if dataclasses.is_dataclass(expected) and inner is None:
            return _unknown_key(".".join([*keys, str(key)]), schema, expected, origins)
        if inner is None:
            break  # behind the value come the members of a union that pydantic tried
        if loc[depth + 1 :] == ("[key]",):
            rule = "put it in quotes"
            if isinstance(key, str):
                rule = _must_be(get_args(base_of(expected))[0], key)
            path = ".".join(keys)
            return f"{place_of(path, origins)}{path} has the name {_shown(key)}; {rule}."
        keys.append(str(key))
        value, expected = value[key], inner
    path = ".".join(keys) or "a recipe"
    rule = "it must be a finite number" if kind == "finite_number" else _must_be(expected, value)
    return f"{place_of(path, origins)}{path} is {_shown(value)}; {rule}{'' if rule.endswith('?') else '.'}"


def _shown(value: Any) -> str:
    """A value as a message shows it, cut where it is long."""
    shown = repr(value)
    return shown if len(shown) <= SHOWN else f"{shown[:SHOWN]}... ({len(shown):,} characters)"


def _must_be(expected: Any, value: Any) -> str:
    """The rule for a value, and what to do about a frequent slip."""
    kinds = {base_of(part) for part in members(base_of(expected))}
    words = words_of(expected)
    rule = f"it must be {describe(expected, value=value)}"
    if isinstance(value, str) and (guess := nearest(value, words)):
        return f"{rule}; did you mean {guess}?"
    if isinstance(value, str) and any(get_origin(kind) is list for kind in kinds):
        return f"{rule}; write [{value if len(value) <= SHOWN else '...'}], in quotes on a command line"
    if isinstance(value, bool) and (words or str in kinds):
        return f"{rule}; YAML reads a bare yes, no, on, off as true or false: put it in quotes"
    if isinstance(value, (int, float)) and kinds <= {str, type(None)}:
        return f"{rule}; put it in quotes"
    return rule


@functools.cache
def _all_paths(schema: type, prefix: str = "") -> tuple[str, ...]:
    """Every dotted key outside the mappings."""
    found: list[str] = []
    for name in schema.__pydantic_fields__:
        found.append(f"{prefix}{name}")
        if dataclasses.is_dataclass(inner := member(schema, name)):
            found.extend(_all_paths(inner, f"{prefix}{name}."))
    return tuple(found)


def _unknown_key(path: str, schema: type, section: type, origins: Mapping[str, str]) -> str:
    """A key that the section lacks: the nearest here, else the same word in another section."""
    parent, _, name = path.rpartition(".")
    siblings, everywhere = list(section.__pydantic_fields__), _all_paths(schema)
    guess = nearest(name, siblings) or next(
        (known for known in siblings if name == "".join(word[0] for word in known.split("_"))), None
    )
    elsewhere = [known for known in everywhere if known.rpartition(".")[2] == name]
    guess = (
        f"{parent}.{guess}".lstrip(".")
        if guess
        else next(iter(elsewhere), nearest(path, everywhere))
    )
    hint = f" did you mean {guess}?" if guess else ""
    return (
        f"{place_of(path, origins)}{path} is not an option;{hint} (one of: {', '.join(siblings)})"
    )
