"""What the values of a recipe must obey, and the errors that say so."""

from __future__ import annotations

import difflib
from collections.abc import Iterable, Mapping


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
    hint = f"did you mean {guess}? " if guess else ""
    return ValueError(f"{message}; {hint}(one of: {', '.join(valid) or 'nothing'})")


def place_of(path: str, origins: Mapping[str, str]) -> str:
    """ "file:line: " of a key, or of the nearest section around it that was written down; "" when neither is known."""
    while path and path not in origins:
        path = path.rpartition(".")[0]
    return f"{origins[path]}: " if path else ""
