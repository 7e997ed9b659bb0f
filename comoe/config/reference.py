"""The reference of all options, made from the models of ``comoe.config.recipe``."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Iterator
from typing import Any, NamedTuple

from pydantic import TypeAdapter

from comoe.config.fields import describe, member
from comoe.config.recipe import Recipe, TaskConfig


class Option(NamedTuple):
    """One option of a recipe."""

    path: str
    """Dotted key; tasks are called ``<name>``."""
    default: Any
    allowed: str
    """Type, range and words."""
    meaning: str
    read_when: str | None
    """Condition under which it counts, of ``comoe.config.fields.option``; None: always."""


def options(schema: type = Recipe, prefix: str = "") -> Iterator[Option]:
    """Every option, in the order of a recipe."""
    for name, field in schema.__pydantic_fields__.items():
        expected, path = member(schema, name), f"{prefix}{name}"
        if dataclasses.is_dataclass(expected):
            yield from options(expected, f"{path}.")
        elif path == "tasks":
            yield from options(TaskConfig, "tasks.<name>.")
        else:
            default = field.get_default(call_default_factory=True, validated_data={})
            when = (field.json_schema_extra or {}).get("read_when")
            yield Option(path, default, describe(expected), _one_line(field.description), when)


def options_markdown() -> str:
    """Per section a heading, its meaning and a table of its options: default, allowed values, meaning."""
    lines: list[str] = []
    for section in Recipe.__pydantic_fields__:
        schema = TaskConfig if section == "tasks" else member(Recipe, section)
        meaning = (
            schema.__doc__ if dataclasses.is_dataclass(schema) else "An option without a section."
        )
        lines += ["", f"## {section}", "", _one_line(meaning), ""]
        lines += ["| option | default | allowed | meaning |", "|---|---|---|---|"]
        lines += [_row(found) for found in options() if found.path.split(".")[0] == section]
    return "\n".join(lines[1:]) + "\n"


def _row(found: Option) -> str:
    default = found.default if isinstance(found.default, str) else json.dumps(found.default)
    parts = found.read_when.split(" and ") if found.read_when else []
    code = " and ".join(part if part == "images are read" else f"`{part}`" for part in parts)
    when = f" Read when {code}." if code else ""
    shown = default.replace("e-0", "e-") or '""'
    cells = [f"`{found.path}`", f"`{shown}`", found.allowed, found.meaning + when]
    return "| " + " | ".join(cell.replace("|", "\\|") for cell in cells) + " |"


def _one_line(docstring: str | None) -> str:
    return " ".join((docstring or "").split()).replace("``", "`")


def recipe_json_schema() -> dict[str, Any]:
    """JSON Schema (draft 2020-12) of a recipe, with which editors complete and check its YAML."""
    schema = TypeAdapter(Recipe).json_schema()
    schema["description"] = (Recipe.__doc__ or "").partition("\n")[0]
    return {"$schema": "https://json-schema.org/draft/2020-12/schema", **schema}
