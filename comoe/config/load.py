"""Recipes: strict loading of one YAML file and ``key=value`` overrides into ``comoe.config.recipe``, checks, saving.

Every mistake is a ValueError that names the file, the line, the key, the value, the rule and what
to do.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Literal, TypeVar, get_origin

import yaml
from pydantic import TypeAdapter, ValidationError

from comoe.config.errors import message_of, nearest, place_of, unknown_name
from comoe.config.fields import SAVED, base_of, member, members
from comoe.config.files import write_atomic
from comoe.config.legacy import keep_old_meanings
from comoe.config.plugins import consent, load_plugins
from comoe.config.ready_made import recipe_path
from comoe.config.recipe import Recipe
from comoe.config.strict_yaml import StrictLoader, read_yaml
from comoe.config.validate import validate

__all__ = [
    "load_recipe", "load_saved_recipe", "load_settings", "nearest", "recipe_from_dict", "recipe_to_dict",
    "recipe_to_yaml", "save_recipe", "unknown_name", "validate",
]  # fmt: skip


Settings = TypeVar("Settings")


TEXT_OR_NULL = {str, Literal, type(None)}
COMMAND_LINE = "command line"
"""Where an override comes from, in messages."""


def load_recipe(
    path: str | Path, overrides: Sequence[str] = (), *, plugins: Sequence[str] = ()
) -> Recipe:
    """Read one YAML recipe, put the overrides on top, check it.

    ``data.root: null`` becomes the absolute folder of the file, so that a recipe works from any
    folder.

    Args:
        path: the YAML file, or the name of a ready recipe.
        overrides: ``key=value`` with a dotted key; the value is YAML. ``tasks.<name>.<field>=`` may
            make a new task, ``tasks.<name>=null`` drops one.
        plugins: those that may be imported if the recipe names them: their code runs.

    Raises:
        ValueError: unknown key (with the nearest right one), wrong type, value against a rule,
            broken YAML, no file.

    Example:
        >>> recipe = comoe.load_recipe("smoke", ["train.epochs=2"])
        >>> recipe.train.epochs
        2.0
    """
    consent(plugins)
    return _load(recipe_path(path), overrides, saved=False)


def load_saved_recipe(path: str | Path, overrides: Sequence[str] = ()) -> Recipe:
    """The ``config.yaml`` of a run, with what its options meant when it was written.

    Args:
        path: the file.
        overrides: as for ``load_recipe``.

    Raises:
        ValueError: as ``load_recipe``.
    """
    return _load(Path(path), overrides, saved=True)


def _load(path: Path, overrides: Sequence[str], *, saved: bool) -> Recipe:
    raw, origins = read_yaml(path, saved=saved)
    if saved:
        keep_old_meanings(raw)
    for override in overrides:
        _apply_override(raw, override, origins=origins, saved=saved)
    load_plugins(raw.get("plugins"), place=origins.get("plugins", str(path)))
    recipe = recipe_from_dict(raw, origins=origins, saved=saved)
    if not saved:
        _refuse_foreign_code(recipe, origins)
    if recipe.data.root is None:
        recipe.data.root = str(path.resolve().parent)
    validate(recipe, origins=origins, saved=saved)
    return recipe


def _refuse_foreign_code(recipe: Recipe, origins: Mapping[str, str]) -> None:
    """Code of a model's repository runs where the command says so: a recipe may be a stranger's."""
    key = "model.trust_remote_code"
    place = place_of(key, origins)
    if recipe.model.trust_remote_code and not place.startswith(COMMAND_LINE):
        raise ValueError(
            f"{place}{key} is true: Python code that comes with {recipe.model.encoder} (and model.vision.tower) "
            "would run, also in a dry run. A recipe alone cannot ask for that: read the code, "
            f"then add {key}=true to the command line."
        )


def recipe_from_dict(
    raw: Mapping[str, Any], *, origins: Mapping[str, str] | None = None, saved: bool = False
) -> Recipe:
    """A recipe from nested plain dicts; keys that are missing keep their default.

    Args:
        raw: nested dicts, lists, numbers, strings, as YAML gives them.
        origins: key path -> "file:line", put in front of messages.
        saved: of a run or an export that was made, by limits that may have been others.

    Raises:
        ValueError: unknown key, wrong type, value out of its range. Rules between options are those
            of ``validate``.
    """
    return _checked(raw, Recipe, origins=origins or {}, saved=saved)


def recipe_to_dict(recipe: Recipe) -> dict[str, Any]:
    """Nested plain dicts, in the order of the schema; ``recipe_from_dict`` gives back an equal recipe."""
    return dataclasses.asdict(recipe)


def recipe_to_yaml(recipe: Recipe) -> str:
    """The whole recipe, defaults included, as YAML text."""
    return yaml.safe_dump(recipe_to_dict(recipe), sort_keys=False, allow_unicode=True, width=120)


def load_settings(path: str | Path, schema: type[Settings]) -> tuple[Settings, dict[str, str]]:
    """Another YAML file than a recipe, read as strictly, as a ``section``; and "file:line" of each dotted key."""
    raw, origins = read_yaml(Path(path))
    return _checked(raw, schema, origins=origins), origins


def save_recipe(recipe: Recipe, path: str | Path) -> None:
    """Write the whole recipe as YAML; ``load_recipe`` gives back an equal one."""
    write_atomic(Path(path), recipe_to_yaml(recipe))


def _apply_override(
    raw: dict[str, Any], override: str, *, origins: dict[str, str], saved: bool
) -> None:
    """Put one ``key=value`` into the nested dicts; wrong keys and types are found later, when they become a recipe.

    Of a saved recipe a task may have been dropped before, by the same words.
    """
    path, equals, text = override.partition("=")
    path = path.strip().lstrip("-")
    if not equals or not path or "" in path.split("."):
        raise ValueError(
            f"{COMMAND_LINE}: {override!r} is not an override; write key=value: train.max_steps=100."
        )
    expected = type_at(path)
    try:
        value = yaml.load(text, StrictLoader)  # noqa: S506  (a SafeLoader)
    except (yaml.YAMLError, ValueError):
        value = text
    kinds = {get_origin(base) or base for base in map(base_of, members(base_of(expected)))}
    if not isinstance(value, str) and kinds <= ({str, Literal} if value is None else TEXT_OR_NULL):
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
        if last not in place and not saved:
            raise ValueError(
                f"{COMMAND_LINE}: {override!r} drops no task: {unknown_name('task', last, place)}"
            )
        place.pop(last, None)
    else:
        place[last] = value


def _checked(
    raw: Any, schema: type[Settings], *, origins: Mapping[str, str], saved: bool = False
) -> Settings:
    """Plain dicts as a section, or a ValueError with the key path."""
    adapter, content = TypeAdapter(schema), _with_empty_sections(raw, schema)
    try:
        return adapter.validate_python(content)
    except ValidationError as error:
        message = message_of(error, schema, raw=raw, origins=origins)
        # What was saved keeps what it was begun with; what is said now must hold the limits of now.
        if not saved or message.startswith(COMMAND_LINE):
            raise ValueError(message) from None
    try:
        return adapter.validate_python(content, context=SAVED)
    except ValidationError as error:
        raise ValueError(message_of(error, schema, raw=raw, origins=origins)) from None


def _with_empty_sections(raw: Any, expected: Any) -> Any:
    """A section or mapping without content (``train:`` alone) is an empty one."""
    if not (dataclasses.is_dataclass(expected) or get_origin(expected) is dict):
        return raw
    if not isinstance(raw, Mapping):
        return {} if raw is None else raw
    return {key: _with_empty_sections(item, member(expected, key)) for key, item in raw.items()}


def type_at(path: str) -> Any:
    """The declared type of a dotted key, None when there is no such key."""
    expected: Any = Recipe
    for part in path.split("."):
        expected = member(expected, part)
    return expected
