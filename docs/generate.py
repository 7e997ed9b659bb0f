"""Writes docs/options.md, docs/recipe.schema.json and docs/commands.md from the code, docs/papers.md from a table.

python docs/generate.py
"""

from __future__ import annotations

import argparse
import csv
import importlib
import json
import sys
from collections import Counter
from collections.abc import Iterator
from pathlib import Path

DOCS = Path(__file__).resolve().parent
ROOT = DOCS.parent
if str(ROOT) not in sys.path:
    sys.path.insert(0, str(ROOT))


def parsers() -> dict[str, argparse.ArgumentParser]:
    """Command -> its parser, in the order of the page."""
    from comoe.commands.main import COMMANDS
    from comoe.starter import registry

    found = {
        f"comoe {word}": importlib.import_module(f"comoe.commands.{word}").parser()
        for word in COMMANDS
    }
    return found | {"python -m comoe.starter": registry.parser()}


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
        " [Options](options.md). `python -m comoe` is `comoe` where the command is not on the `PATH`, and"
        " `python launch/train.py` is `comoe train` of a checkout that is not installed.",
    ]
    for title, parser in parsers().items():
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


PAPERS = {
    "C": "Goals of the project",
    "0": "TaCL-CoMoE, IJCNLP 2025, and its published code",
    "1": "Stein & Keller",
    "2": "A survey of multi-task sentiment analysis (in Chinese)",
    "3": "Image-text auxiliary losses, arXiv:2309.07794",
    "4": "MT-ISA, TKDE 2025, arXiv:2412.09046",
}
"""Beginning of an element's number -> its source."""


def papers_page() -> str:
    with (DOCS / "papers.tsv").open(encoding="utf-8", newline="") as file:
        elements = list(csv.DictReader(file, delimiter="\t", quoting=csv.QUOTE_NONE))
    counts = Counter(row["state"] for row in elements)
    lines = [
        "# The source papers, element by element",
        "",
        "<!-- Written by docs/generate.py from docs/papers.tsv; change the table there. -->",
        "",
        "The papers behind comoe were split into 141 elements, and each was compared with the code. 59 were"
        " done from the start"
        " ([References](references.md), [Method](method.md)); these are the"
        f" other {len(elements)}: {counts['done']} done, {counts['refused']} refused, {counts['open']} open. Done means"
        " that a command does it; a claim is done when it was measured, whether it holds or not. Words and figures are"
        " ours unless a page says that they are quoted.",
    ]
    for key, title in PAPERS.items():
        lines += [
            "",
            f"## {title}",
            "",
            "| | element | state | command | figure or reason |",
            "|---|---|---|---|---|",
        ]
        lines += [
            f"| {row['id']} | {row['element']} | {row['state']} | {row['command']} | {row['figure or reason']} |"
            for row in elements
            if row["id"].startswith(f"{key}.")
        ]
    return "\n".join(lines) + "\n"


PAGES = {
    "options.md": options_page,
    "papers.md": papers_page,
    "recipe.schema.json": schema_file,
    "commands.md": commands_page,
}

if __name__ == "__main__":
    for name, page in PAGES.items():
        (DOCS / name).write_text(page(), encoding="utf-8")
