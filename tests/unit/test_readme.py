"""The README says what is: options, files, links, commands and tables that it names are those of the code."""

from __future__ import annotations

import ast
import dataclasses
import json
import re
import shlex
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml

from comoe.augment.command import COLUMNS
from comoe.config.load import load_recipe, recipe_from_dict
from comoe.config.recipe import Recipe, TaskConfig
from comoe.data.corpus import load_corpus
from comoe.data.reading.sources import READERS
from comoe.data.text.normalize import PRESETS
from comoe.tasks.kinds.registry import KINDS

ROOT = Path(__file__).parents[2]
README = (ROOT / "README.md").read_text(encoding="utf-8")
MOST_BYTES = 60_000
"""Of one picture."""
SECTIONS = "|".join(field.name for field in dataclasses.fields(Recipe))
OVERRIDE = re.compile(rf"(?:{SECTIONS})\.[\w.-]+=\S+")
BLOCK = re.compile(r"^```(\w*)\n(.*?)^```$", flags=re.MULTILINE | re.DOTALL)


def blocks(language: str) -> list[str]:
    return [text for name, text in BLOCK.findall(README) if name == language]


def prose() -> str:
    return BLOCK.sub("", README)


def spans() -> list[str]:
    """Words in backticks outside of code blocks."""
    return [span.replace(r"\|", "|") for span in re.findall(r"`([^`\n]+)`", prose())]


def commands() -> list[list[str]]:
    return [shlex.split(line) for block in blocks("bash") for line in block.splitlines()]


def table(first_cell: str) -> dict[str, list[str]]:
    """First cell without backticks -> the other cells, of the table whose head begins with ``first_cell``."""
    tables = re.findall(r"(?:^\|.*\n)+", prose(), flags=re.MULTILINE)
    found = [text for text in tables if text.startswith(f"| {first_cell} |")]
    assert found, f"no table of the README begins with | {first_cell} |"
    rows = [re.split(r"(?<!\\)\|", line)[1:-1] for text in found for line in text.splitlines()[2:]]
    return {row[0].strip().split("`")[1]: [cell.strip() for cell in row[1:]] for row in rows}


def options(schema: Any, prefix: str) -> Iterator[tuple[str, object]]:
    """Every option below ``prefix`` with its default."""
    for field in dataclasses.fields(schema):
        default = (
            field.default if field.default is not dataclasses.MISSING else field.default_factory()
        )
        if dataclasses.is_dataclass(default):
            yield from options(type(default), f"{prefix}{field.name}.")
        else:
            yield f"{prefix}{field.name}", default


OPTIONS = dict(options(Recipe, "")) | dict(options(TaskConfig, "tasks.<name>."))
OPTIONS.pop("tasks")


@pytest.mark.parametrize("option", OPTIONS)
def test_an_option_stands_in_the_readme_with_its_default(option: str):
    rows = table("option")
    assert option in rows, f"add a row for {option} to the section Options"
    shown, meaning = rows[option]
    *path, name = option.replace("<name>", "any").split(".")
    text, default = shown.strip("`"), OPTIONS[option]
    # Read as a recipe reads it, so that what the table shows can be typed.
    nested: Any = {
        name: text if isinstance(default, str) and text != '""' else yaml.safe_load(text)
    }
    for section in reversed(path):
        nested = {section: nested}
    read: Any = recipe_from_dict(nested)
    for part in path:
        read = read[part] if isinstance(read, dict) else getattr(read, part)
    assert getattr(read, name) == default, (
        f"{option} is {default!r} by default; the README says {shown}"
    )
    assert len(meaning) > 10


def test_the_readme_lists_no_option_that_does_not_exist():
    assert set(table("option")) == set(OPTIONS)


LINKS = re.findall(r"\]\(([^)\s]+)\)", README)


@pytest.mark.parametrize(
    "link", [link for link in dict.fromkeys(LINKS) if not link.startswith(("#", "http"))]
)
def test_a_link_leads_to_something(link: str):
    assert (ROOT / link).exists()


def test_links_within_the_page_lead_to_headings():
    titles = re.findall(r"^#+ (.+)$", prose(), flags=re.MULTILINE)
    anchors = {re.sub(r"[^\w -]", "", title.lower()).replace(" ", "-") for title in titles}
    assert {link[1:] for link in LINKS if link.startswith("#")} <= anchors


def test_pictures_are_small_and_all_shown():
    pictures = [path.relative_to(ROOT).as_posix() for path in sorted((ROOT / ".docs").iterdir())]
    assert pictures and set(pictures) == {link for link in LINKS if link.startswith(".docs/")}
    assert {
        path: size for path in pictures if (size := (ROOT / path).stat().st_size) >= MOST_BYTES
    } == {}


def test_files_named_in_commands_and_in_the_text_exist():
    words = [word for command in commands() for word in command] + spans()
    files = [
        re.sub(r"::.*|\s.*", "", word)
        for word in words
        if re.match(r"(comoe|launch|ds_configs|tests)/", word)
    ]
    assert len(files) > 20 and [file for file in files if not (ROOT / file).exists()] == []
    modules = [command[command.index("-m") + 1] for command in commands() if "-m" in command]
    modules += re.findall(r"python -m ([\w.]+)", prose())
    assert (
        modules
        and [
            name
            for name in modules
            if not (ROOT / f"{name.replace('.', '/')}.py").is_file()
            and not (ROOT / name.replace(".", "/") / "__main__.py").is_file()
        ]
        == []
    )


def test_options_of_scripts_named_in_commands_exist():
    checked, helps = 0, {}
    for command in commands():
        script = next((word for word in command if re.fullmatch(r"launch/\w+\.py", word)), None)
        for flag in (
            [word for word in command[command.index(script) :] if word.startswith("--")]
            if script
            else []
        ):
            if script not in helps:
                asked = subprocess.run(
                    [sys.executable, script, "--help"], cwd=ROOT, capture_output=True, text=True
                )
                helps[script] = set(re.findall(r"--[a-z][a-z-]*", asked.stdout))
            assert flag in helps[script], f"{script} has no option {flag}"
            checked += 1
    assert checked > 20


def test_overrides_in_commands_are_valid_for_their_recipe():
    checked = 0
    for command in commands():
        words = [word for word in command if OVERRIDE.fullmatch(word)]
        config = (
            command[command.index("--config") + 1]
            if "--config" in command
            else "launch/configs/starter.yaml"
        )
        place = ROOT / config
        load_recipe(place if place.is_file() else ROOT / "launch/configs/starter.yaml", words)
        checked += len(words)
    assert checked > 10


def test_overrides_and_options_in_the_text_are_valid():
    smoke = ROOT / "launch/configs/smoke.yaml"
    overrides = [span for span in spans() if OVERRIDE.fullmatch(span)]
    for override in overrides:
        load_recipe(smoke, [override])
    named = {span for span in spans() if re.fullmatch(rf"(?:{SECTIONS})\.[a-z_.]+", span)}
    sections = {option.rpartition(".")[0] for option in OPTIONS}
    assert len(overrides) > 5 and len(named) > 10 and named - set(OPTIONS) - sections == set()


@pytest.mark.parametrize("number", range(len(blocks("yaml"))))
def test_a_recipe_of_the_readme_is_valid(number: int, tmp_path: Path):
    recipe = tmp_path / "my.yaml"
    recipe.write_text(blocks("yaml")[number], encoding="utf-8")
    assert load_recipe(recipe).tasks


def test_the_recipe_for_auxiliary_data_reads_what_augment_writes(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    given = [
        ("They smiled.", "positive"),
        ("An hour passed.", "negative"),
        ("We sat.", "neutral"),
    ] * 4
    values = ["service", "opinion", "positive", 0.5, 0.25, 0.75, 1, True]
    rows = [
        {"text": f"{text} {number}", "aspect": "service", "polarity": label, **dict(zip(COLUMNS, values, strict=True)),
         "aux_opinion": f"opinion {number}"}
        for number, (text, label) in enumerate(given)
    ]  # fmt: skip
    (tmp_path / "augmented").mkdir()
    lines = "".join(json.dumps(row) + "\n" for row in rows)
    (tmp_path / "augmented" / "train.jsonl").write_text(lines, encoding="utf-8")
    (text,) = (block for block in blocks("yaml") if "aux_opinion" in block)
    (tmp_path / "my.yaml").write_text(text, encoding="utf-8")
    monkeypatch.chdir(tmp_path)
    splits = load_corpus(load_recipe(Path("my.yaml"))).splits.values()
    labels = [label for split in splits for label in split.labels["polarity"]]
    assert sorted(labels) == [0] * 4 + [1] * 4 + [2] * 4
    assert {answer for split in splits for answer in split.labels["opinion"]} == {
        row["aux_opinion"] for row in rows
    }
    assert {value for split in splits for value in split.confidences["opinion"]} == {0.25}


def test_python_of_the_readme_imports_names_that_exist():
    imported = [
        (node.module, alias.name)
        for block in blocks("python")
        for node in ast.walk(ast.parse(block))
        if isinstance(node, ast.ImportFrom)
        for alias in node.names
    ]
    assert imported
    for module, name in imported:
        source = (ROOT / f"{module.replace('.', '/')}.py").read_text(encoding="utf-8")
        assert name in {getattr(node, "name", None) for node in ast.parse(source).body}


def test_formats_kinds_and_presets_are_those_of_the_code():
    assert list(table("format")) == list(READERS)
    assert list(table("`data.normalize.preset`")) == list(PRESETS)
    shown = {
        kind: tuple(re.findall(r"`(\w+)`", cells[-1])) for kind, cells in table("`kind`").items()
    }
    assert shown == {name: kind.metrics for name, kind in KINDS.items()}


def test_tables_to_register_in_exist_in_the_named_file():
    rows = [line for line in README.splitlines() if line.startswith("| ") and line.count("|") == 5]
    rows = [re.split(r"(?<!\\)\|", line)[1:-1] for line in rows if "](" in line.split("|")[2]]
    checked = 0
    for _, opened, _, registered in rows:
        files = [ROOT / link for link in re.findall(r"\]\(([^)]+)\)", opened)]
        source = "".join(file.read_text(encoding="utf-8") for file in files if file.is_file())
        for name in re.findall(r"`([A-Z_]+)`", registered):
            assert re.search(rf"^{name}\b.*=", source, flags=re.MULTILINE), (
                f"{opened.strip()} has no table {name}"
            )
            checked += 1
    assert checked > 10


def test_every_paper_that_the_code_cites_stands_in_the_paper_index():
    cited = {
        paper
        for folder in ("comoe", "launch")
        for path in (ROOT / folder).rglob("*.*")
        if path.suffix in (".py", ".yaml")
        for paper in re.findall(r"arXiv:\d{4}\.\d{5}", path.read_text(encoding="utf-8"))
    }
    index = README.partition("\n## Papers\n")[2].partition("\n## ")[0]
    assert cited and cited - set(re.findall(r"arXiv:\d{4}\.\d{5}", index)) == set()


def test_no_number_is_left_to_be_measured():
    assert "MEASURE" not in README and "@@" not in README
