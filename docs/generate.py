"""Writes what repeats the code: docs/options.md, docs/recipe.schema.json and docs/commands.md.

python docs/generate.py
"""

from __future__ import annotations

import argparse
import json
import runpy
import sys
from collections.abc import Iterator
from pathlib import Path
from unittest import mock

DOCS = Path(__file__).resolve().parent
ROOT = DOCS.parent
if str(ROOT) not in sys.path:
    sys.path.insert(0, str(ROOT))


class _Parsed(Exception):
    """Carries a parser out of the script that made it."""


def parser_of(script: Path) -> argparse.ArgumentParser:
    """The argument parser of a script, taken at the moment when it is about to read the arguments."""

    def stop(parser: argparse.ArgumentParser, *_: object, **__: object) -> None:
        raise _Parsed(parser)

    methods = ("parse_args", "parse_known_args", "parse_intermixed_args")
    with (
        mock.patch.multiple(argparse.ArgumentParser, **dict.fromkeys(methods, stop)),
        mock.patch.object(sys, "argv", [str(script)]),
        mock.patch.object(sys, "path", list(sys.path)),
    ):
        try:
            runpy.run_path(str(script), run_name="__main__")
        except _Parsed as found:
            return found.args[0]
    raise AssertionError(f"{script} reads no arguments")


def scripts() -> list[Path]:
    """The command lines, in the order of the page."""
    order = "train predict eval export compare ablate scale augment bench".split()
    found = sorted(ROOT.glob("launch/*.py"), key=lambda path: order.index(path.stem))
    return [*found, ROOT / "comoe/starter/__main__.py"]


def cell(text: object) -> str:
    return " ".join(str(text).split()).replace("|", r"\|")


def rows(parser: argparse.ArgumentParser) -> Iterator[str]:
    formatter = parser._get_formatter()
    for action in parser._actions:
        if action.help == argparse.SUPPRESS or isinstance(action, argparse._HelpAction):
            continue
        name = ", ".join(action.option_strings) or str(action.metavar or action.dest)
        value = action.metavar or ("|".join(map(str, action.choices)) if action.choices else "")
        shown = f"{name} {value}" if action.option_strings and value else name
        default = action.default
        if isinstance(default, Path):
            default = default.relative_to(ROOT) if default.is_absolute() else default
        given = "" if default in (None, False, []) else f"`{default}`"
        meaning = "" if action.help is None else formatter._expand_help(action)
        meaning = meaning.replace(f"{ROOT}/", "")
        needed = "**required.** " if action.option_strings and action.required else ""
        yield f"| `{cell(shown)}` | {cell(given)} | {needed}{cell(meaning)} |"


def commands_page() -> str:
    from comoe.starter.registry import home

    lines = [
        "# Commands",
        "",
        "<!-- Written by docs/generate.py from the argument parsers; change the parsers instead. -->",
        "",
        "Every command has `--help`. `key=value` changes an option of the recipe for this call: see"
        " [Options](options.md).",
    ]
    for script in scripts():
        parser = parser_of(script)
        name = script.relative_to(ROOT).as_posix()
        title = name if name.startswith("launch") else "python -m comoe.starter"
        summary = " ".join((parser.description or "").split("\n\n")[0].split())
        summary = summary.replace(str(home()), "the cache folder")
        lines += ["", f"## {title}", "", summary, ""]
        lines += ["| option | default | meaning |", "|---|---|---|", *rows(parser)]
    return "\n".join(lines) + "\n"


def options_page() -> str:
    from comoe.config.reference import options_markdown

    lines = [
        "# Options",
        "",
        "<!-- Written by docs/generate.py from comoe/config/recipe.py; change the fields and docstrings there. -->",
        "",
        "Every option of a recipe, with its default. In a recipe an option stands under its section; on"
        " a command line it is typed with its full name: `train.max_steps=200`. `null` and `auto` are"
        " typed as such. Options of a task carry the task's name: `tasks.mood.weight=2`;"
        " `tasks.mood=null` drops the task `mood`. Steps are optimizer steps, tokens are sub-word"
        " tokens. A wrong name or value is an error that shows the nearest right one, before anything"
        " is loaded.",
        "",
        "Editors complete and check a recipe by [recipe.schema.json](recipe.schema.json): in VS Code with"
        " the YAML extension, write `# yaml-language-server: $schema=docs/recipe.schema.json` (the path from the"
        " recipe's folder) in its first line.",
    ]
    return "\n".join(lines) + "\n\n" + options_markdown()


def schema_file() -> str:
    from comoe.config.reference import recipe_json_schema

    return json.dumps(recipe_json_schema(), indent=1) + "\n"


PAGES = {
    "options.md": options_page,
    "recipe.schema.json": schema_file,
    "commands.md": commands_page,
}

if __name__ == "__main__":
    for name, page in PAGES.items():
        (DOCS / name).write_text(page(), encoding="utf-8")
