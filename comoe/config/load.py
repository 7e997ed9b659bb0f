"""Recipes: strict loading of one YAML file and ``key=value`` overrides into ``comoe.config.recipe``, checks, saving.

Every mistake is a ValueError that names the file, the line, the key, the value, the rule and what
to do.
"""

from __future__ import annotations

import dataclasses
import functools
import types
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, TypeVar, Union, get_args, get_origin, get_type_hints

import yaml

from comoe.config.errors import nearest, place_of, unknown_name
from comoe.config.files import write_atomic
from comoe.config.recipe import Recipe
from comoe.config.validate import validate

__all__ = [
    "load_recipe", "load_settings", "nearest", "recipe_from_dict", "recipe_to_dict", "recipe_to_yaml", "save_recipe",
    "unknown_name", "validate",
]  # fmt: skip


Settings = TypeVar("Settings")


COMMAND_LINE = "command line"
"""Where an override comes from, in messages."""


def load_recipe(path: str | Path, overrides: Sequence[str] = ()) -> Recipe:
    """Read one YAML recipe, put the overrides on top, check it.

    ``data.root: null`` becomes the absolute folder of the file, so that a recipe works from any
    folder.

    Args:
        path: the YAML file.
        overrides: ``key=value`` with a dotted key; the value is YAML. ``tasks.<name>.<field>=`` may
            make a new task, ``tasks.<name>=null`` drops one.

    Raises:
        ValueError: unknown key (with the nearest right one), wrong type, value against a rule,
            broken YAML, no file.

    Example:
        >>> recipe = comoe.load_recipe("launch/configs/smoke.yaml", ["train.epochs=2"])
        >>> recipe.train.epochs
        2.0
    """
    path = Path(path)
    raw, origins = _read_yaml(path)
    for override in overrides:
        _apply_override(raw, override, origins=origins)
    recipe = recipe_from_dict(raw, origins=origins)
    if recipe.data.root is None:
        recipe.data.root = str(path.resolve().parent)
    validate(recipe, origins=origins)
    return recipe


def recipe_from_dict(raw: Mapping[str, Any], *, origins: Mapping[str, str] | None = None) -> Recipe:
    """A recipe from nested plain dicts; keys that are missing keep their default.

    Args:
        raw: nested dicts, lists, numbers, strings, as YAML gives them.
        origins: key path -> "file:line", put in front of messages.

    Raises:
        ValueError: unknown key or wrong type. Values are checked by ``validate``.
    """
    return _convert(raw, Recipe, path="", origins=origins or {})


def recipe_to_dict(recipe: Recipe) -> dict[str, Any]:
    """Nested plain dicts, in the order of the schema; ``recipe_from_dict`` gives back an equal recipe."""
    return dataclasses.asdict(recipe)


def recipe_to_yaml(recipe: Recipe) -> str:
    """The whole recipe, defaults included, as YAML text."""
    return yaml.safe_dump(recipe_to_dict(recipe), sort_keys=False, allow_unicode=True, width=120)


def load_settings(path: str | Path, schema: type[Settings]) -> tuple[Settings, dict[str, str]]:
    """Another YAML file than a recipe, read as strictly, as a dataclass; and "file:line" of each dotted key."""
    raw, origins = _read_yaml(Path(path))
    return _convert(raw, schema, path="", origins=origins), origins


def save_recipe(recipe: Recipe, path: str | Path) -> None:
    """Write the whole recipe as YAML; ``load_recipe`` gives back an equal one."""
    write_atomic(Path(path), recipe_to_yaml(recipe))


class _StrictLoader(yaml.SafeLoader):
    """Plain YAML values only, and no key twice (YAML itself would silently keep the last one)."""

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
        seen: dict[Any, int] = {}
        for key_node, _ in node.value:
            key, line = key_node.value, key_node.start_mark.line + 1
            if isinstance(key, str) and key in seen:
                raise ValueError(
                    f"{self.name}:{line}: {key} is given twice, first in line {seen[key]}; keep one."
                )
            if isinstance(key, str):
                seen[key] = line
        return super().construct_mapping(node, deep=deep)


def _read_yaml(path: Path) -> tuple[dict[str, Any], dict[str, str]]:
    """The file's nested dicts, and "file:line" of each dotted key."""
    try:
        text = path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise ValueError(
            f"{path}: the recipe cannot be read ({error}); give an existing UTF-8 YAML file."
        ) from error
    try:
        loader = _StrictLoader(text)
        loader.name = str(path)
        node = loader.get_single_node()
        raw = loader.construct_document(node) if node is not None else {}
    except yaml.MarkedYAMLError as error:
        line = error.problem_mark.line + 1 if error.problem_mark else 1
        advice = "look at the quotes, colons and indents"
        raise ValueError(
            f"{path}:{line}: this is not valid YAML: {error.problem}; {advice}."
        ) from error
    except yaml.YAMLError as error:
        raise ValueError(f"{path}: this is not valid YAML: {error}.") from error
    if not isinstance(raw, dict):
        raise ValueError(
            f"{path}:1: a recipe is a mapping with sections such as train: and tasks:, not {raw!r}."
        )
    return raw, dict(_key_lines(node, name=str(path)))


def _key_lines(node: yaml.Node | None, *, name: str, prefix: str = "") -> Iterable[tuple[str, str]]:
    """(dotted key, "file:line") of every key below a YAML node."""
    if isinstance(node, yaml.MappingNode):
        for key_node, value_node in node.value:
            path = f"{prefix}{key_node.value}"
            yield path, f"{name}:{key_node.start_mark.line + 1}"
            yield from _key_lines(value_node, name=name, prefix=f"{path}.")


def _apply_override(raw: dict[str, Any], override: str, *, origins: dict[str, str]) -> None:
    """Put one ``key=value`` into the nested dicts; wrong keys and types are found later, when they become a recipe."""
    path, equals, text = override.partition("=")
    path = path.strip().lstrip("-")
    if not equals or not path or "" in path.split("."):
        raise ValueError(
            f"{COMMAND_LINE}: {override!r} is not an override; write key=value: train.max_steps=100."
        )
    expected = _type_at(path)
    try:
        value = yaml.load(text, _StrictLoader)  # noqa: S506  (a SafeLoader)
    except (yaml.YAMLError, ValueError):
        value = text
    wants_text = expected is str or (
        value is not None and set(_options(expected)) == {str, type(None)}
    )
    if wants_text and not isinstance(value, str):
        value = text  # run.name=2024 and data.root=1e3 mean the text, not the number
    *sections, last = path.split(".")
    place = raw
    for depth, section in enumerate(sections):
        if not isinstance(place.get(section), dict):
            place[section] = {}
            origins[".".join(sections[: depth + 1])] = COMMAND_LINE
        place = place[section]
    for known in [known for known in origins if known == path or known.startswith(f"{path}.")]:
        del origins[known]
    origins[path] = COMMAND_LINE
    if value is None and sections == ["tasks"]:
        if last not in place:
            raise ValueError(
                f"{COMMAND_LINE}: {override!r} drops no task: {unknown_name('task', last, place)}"
            )
        del place[last]
    else:
        place[last] = value


@functools.cache
def _fields(schema: type) -> dict[str, Any]:
    """Field name -> type of a dataclass."""
    return get_type_hints(schema)


def _options(expected: Any) -> tuple[Any, ...]:
    """The members of a union; a plain type is its own only member."""
    return get_args(expected) if get_origin(expected) in (Union, types.UnionType) else (expected,)


def _type_at(path: str) -> Any:
    """The declared type of a dotted key, None when there is no such key."""
    expected: Any = Recipe
    for part in path.split("."):
        if dataclasses.is_dataclass(expected):
            expected = _fields(expected).get(part)
        elif get_origin(expected) is dict:
            expected = get_args(expected)[1]
        else:
            return None
    return expected


@functools.cache
def _all_paths(schema: type = Recipe, prefix: str = "") -> tuple[str, ...]:
    """Every dotted key outside the tasks."""
    found: list[str] = []
    for name, expected in _fields(schema).items():
        found.append(f"{prefix}{name}")
        if dataclasses.is_dataclass(expected):
            found.extend(_all_paths(expected, f"{prefix}{name}."))
    return tuple(found)


def _unknown_key(path: str, siblings: Sequence[str], origins: Mapping[str, str]) -> ValueError:
    """The error for a key that the section does not have: the nearest here, else the same word in another section."""
    section, _, name = path.rpartition(".")
    guess = nearest(name, siblings)
    elsewhere = [known for known in _all_paths() if known.rpartition(".")[2] == name] or [
        nearest(path, _all_paths())
    ]
    guess = (f"{section}.{guess}" if section else guess) if guess else elsewhere[0]
    hint = f" did you mean {guess}?" if guess else ""
    return ValueError(
        f"{place_of(path, origins)}{path} is not an option;{hint} (one of: {', '.join(siblings)})"
    )


def _convert(value: Any, expected: Any, *, path: str, origins: Mapping[str, str]) -> Any:
    """``value`` as the declared type, or a ValueError with the key path."""
    if dataclasses.is_dataclass(expected) and (value is None or isinstance(value, Mapping)):
        known, built = _fields(expected), {}
        for key, item in (value or {}).items():
            inner = f"{path}.{key}" if path else str(key)
            if key not in known:
                raise _unknown_key(inner, list(known), origins)
            built[key] = _convert(item, known[key], path=inner, origins=origins)
        return expected(**built)
    if get_origin(expected) is dict and (value is None or isinstance(value, Mapping)):
        item_type, built = get_args(expected)[1], {}
        for key, item in (value or {}).items():
            if not isinstance(key, str):
                raise ValueError(
                    f"{place_of(path, origins)}{path} has the name {key!r}; put it in quotes."
                )
            built[key] = _convert(item, item_type, path=f"{path}.{key}", origins=origins)
        return built
    for option in _options(expected):
        if get_origin(option) is list and isinstance(value, (list, tuple)):
            (item_type,) = get_args(option)
            numbered = enumerate(value)
            return [
                _convert(item, item_type, path=f"{path}.{place}", origins=origins)
                for place, item in numbered
            ]
        if option in _SCALARS and (converted := _SCALARS[option](value)) is not _WRONG:
            return converted
    rule = f"it must be {_in_words(expected)}{_advice(value, expected)}"
    raise ValueError(f"{place_of(path, origins)}{path or 'a recipe'} is {value!r}; {rule}.")


def _advice(value: Any, expected: Any) -> str:
    """What to do about a frequent slip."""
    if isinstance(value, bool) and str in _options(expected):
        return "; YAML reads a bare yes, no, on, off as true or false: put it in quotes"
    if isinstance(value, (int, float)) and set(_options(expected)) <= {str, type(None)}:
        return "; put it in quotes"
    return ""


def _in_words(expected: Any) -> str:
    """A declared type as the user says it; beside a number ``str`` is the word auto."""
    options = _options(expected)
    numeric = int in options or float in options
    words = ["auto" if option is str and numeric else _WORDS.get(option) for option in options]
    return " or ".join(
        word or _compound_in_words(option) for word, option in zip(words, options, strict=True)
    )


def _compound_in_words(option: Any) -> str:
    """A section, list or mapping type in words."""
    if get_origin(option) is list:
        return f"a list (each item {_in_words(get_args(option)[0])})"
    if get_origin(option) is dict:
        return f"a mapping of names, each to {_in_words(get_args(option)[1])}"
    return "a section (key: value lines)"


_WRONG = object()


def _float(value: Any) -> Any:
    """A number; ``1e-4`` is text to YAML 1.1 (it wants ``1.0e-4``), so text that is a number counts too."""
    if isinstance(value, bool) or not isinstance(value, (int, float, str)):
        return _WRONG
    try:
        return float(value)
    except ValueError:
        return _WRONG


_SCALARS: dict[Any, Callable[[Any], Any]] = {
    bool: lambda value: value if isinstance(value, bool) else _WRONG,
    int: lambda value: value if isinstance(value, int) and not isinstance(value, bool) else _WRONG,
    float: _float,
    str: lambda value: value if isinstance(value, str) else _WRONG,
    type(None): lambda value: value if value is None else _WRONG,
}


_WORDS: dict[Any, str] = {
    bool: "true or false",
    int: "a whole number",
    float: "a number",
    str: "text",
    type(None): "null",
}
