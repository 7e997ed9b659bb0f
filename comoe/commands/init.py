"""Write a recipe for a file of posts, and show the labels that it finds: flags, or questions on a terminal.

    comoe init posts.csv
    comoe init posts.csv --text tweet --label mood --label topic --output my.yaml

The file is .csv, .tsv, .jsonl or .parquet. Then: comoe train my.yaml --dry-run, and comoe train my.yaml.
"""

import json
import os
import re
import shlex
import sys
from argparse import ArgumentParser, Namespace
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from comoe.commands.arguments import new_parser
from comoe.commands.guard import guarded

MOST_LABELS = 50
"""Different values of a column that is taken for labels without being named."""
MOST_NUMBERS = 20
"""A column of more different numbers is regression."""


def parser() -> ArgumentParser:
    """The command line."""
    # fmt: off
    found = new_parser("init", __doc__)
    add = found.add_argument
    add("file", type=Path, help="posts with labels")
    add("--text", metavar="COLUMN", help="column with the post (default: text, else the longest)")
    add("--label", action="append", metavar="COLUMN", help="column with labels, a task (default: all with few values)")
    add("--language", help="of the names that emoji get: en, zh, de, ... (default: en)")
    add("--encoder", help="folder, hub name or ready-made name (default: kit:minilm, English)")
    add("--output", type=Path, metavar="YAML", help="recipe to write (default: the file's name with .yaml)")
    # fmt: on
    return found


@guarded("init")
def main(argv: Sequence[str] | None = None) -> None:
    """Read the command line, ask for what is missing, write the recipe, show the labels."""
    given = parser().parse_args(argv)

    from comoe.config.files import write_atomic
    from comoe.config.load import load_recipe
    from comoe.data.corpus import load_corpus
    from comoe.data.reading.sources import read_input

    if not given.file.exists():
        raise ValueError(f"{given.file}: there is no such file or folder.")
    raw = read_input("FILE", str(given.file))
    if not raw.rows:
        first = f"; the first bad row: {raw.bad[0]}" if raw.bad else "."
        raise ValueError(f"{given.file} has no post that can be read{first}")
    settle(given, raw.rows, raw.columns, ask=sys.stdin.isatty())
    if given.output.exists():
        raise ValueError(f"{given.output} is there already; name another file with --output.")
    write_atomic(given.output, recipe_text(given, raw.rows))
    try:
        corpus = load_corpus(load_recipe(given.output))
    except BaseException:
        given.output.unlink()
        raise
    print("\n".join([*corpus.report.lines(), "", f"wrote  {given.output}"]))
    command = f"comoe train {shlex.quote(str(given.output))}"
    print(f"look   {command} --dry-run\ntrain  {command}")


def settle(
    given: Namespace, rows: Sequence[Mapping[str, Any]], columns: Sequence[str], *, ask: bool
) -> None:
    """Fill in what the command line left out: guessed from the posts, and asked for on a terminal.

    Raises:
        ValueError: a column that is not there, or none that could hold labels.
    """

    def settled(question: str, guess: str) -> str:
        return (input(f"{question} [{guess}]: ").strip() if ask else "") or guess

    longest = max(columns, key=lambda name: sum(map(len, _values(rows, name))), default="text")
    guess = "text" if "text" in columns else longest
    given.text = given.text or settled("column with the post", guess)
    if not given.label:
        values = {name: _values(rows, name) for name in columns if name != given.text}
        guess = [
            name
            for name, cells in values.items()
            if 1 < len(set(cells)) <= min(MOST_LABELS, len(cells) / 2)
        ]
        given.label = settled("columns with labels, with commas", ",".join(guess)).split(",")
    for flag, name in [("--text", given.text), *(("--label", name) for name in given.label)]:
        if name not in columns:
            what = f"no column {name!r}" if name else "no column looks like labels"
            raise ValueError(f"{what}; there is {', '.join(columns)}. Name one with {flag}.")
    given.language = given.language or settled("language of the posts (en, zh, de, ...)", "en")
    given.encoder = given.encoder or settled("encoder", "kit:minilm")
    given.output = given.output or Path(settled("recipe to write", f"{given.file.stem}.yaml"))


def recipe_text(given: Namespace, rows: Sequence[Mapping[str, Any]]) -> str:
    """The recipe, with comments on what one changes first."""
    quoted = {
        name: json.dumps(getattr(given, name), ensure_ascii=False) for name in ("text", "encoder")
    }
    path = os.path.relpath(given.file.resolve(), given.output.resolve().parent)
    lines = [
        f"# Made by: comoe init {given.file.name}. Every option: comoe's docs/options.md. Try: comoe train"
        f" {given.output.name} --dry-run",
        "run:",
        f"  name: {_plain(given.output.stem)}    # its folder below runs/",
        "model:",
        f"  encoder: {quoted['encoder']}    # folder or hub name; multilingual where the posts are",
        "data:",
        "  max_length: 64    # tokens of a post; longer ones are cut",
        f"  normalize: {{language: {given.language}}}    # of the names that emoji get",
        "train:",
        "  epochs: 3",
        "  learning_rate: 5.0e-5",
        "tasks:",
    ]
    for column in given.label:
        kind = "regression" if _is_regression(rows, column) else "single_label"
        lines += [
            f"  {_plain(column)}:",
            f"    path: {json.dumps(path, ensure_ascii=False)}    # from here; a part is kept for validation",
            f"    text: {quoted['text']}",
            f"    label: {json.dumps(column, ensure_ascii=False)}",
            f"    kind: {kind}    # single_label, multi_label, regression, tags, ...: docs/tasks.md",
        ]
    return "\n".join(lines) + "\n"


def _plain(name: str) -> str:
    """As the name of a run or task, in quotes, because YAML reads a bare ``no`` or ``1`` as something else."""
    return json.dumps(re.sub(r"[^A-Za-z0-9]+", "_", name).strip("_") or "mine")


def _values(rows: Sequence[Mapping[str, Any]], column: str) -> list[str]:
    cells = (row.get(column) for row in rows)
    return [text for cell in cells if cell is not None and (text := str(cell).strip())]


def _is_regression(rows: Sequence[Mapping[str, Any]], column: str) -> bool:
    different = set(_values(rows, column))
    return len(different) > MOST_NUMBERS and all(
        re.fullmatch(r"[-+]?\d*[.]?\d+(e[-+]?\d+)?", value, re.IGNORECASE) for value in different
    )
