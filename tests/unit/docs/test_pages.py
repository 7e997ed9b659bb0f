"""README and docs/ say what is: options, files, links, commands and tables that they name are those of the code."""

import ast
import csv
import importlib
import itertools
import json
import re
import shlex
import tomllib
from pathlib import Path

import pytest

import comoe
from comoe.augment.command import COLUMNS
from comoe.commands.arguments import take_recipe
from comoe.config.load import load_recipe
from comoe.data.corpus import load_corpus
from comoe.data.reading.sources import READERS
from comoe.data.text.normalize import PRESETS
from comoe.experiments.compare.command import run_comparison
from comoe.tasks.kinds.registry import KINDS
from docs import generate

ROOT = Path(__file__).parents[3]
DOCS = ROOT / "docs"
PAGES = {
    path.relative_to(ROOT).as_posix(): path.read_text(encoding="utf-8")
    for path in [
        *sorted(ROOT.glob("*.md")),
        *sorted(DOCS.glob("*.md")),
        *sorted(DOCS.glob("results/*.md")),
    ]
}
"""Path of a page -> its text."""
RECIPES = {path.stem for path in ROOT.glob("launch/configs/*.yaml")}
MOST_BYTES = 60_000
"""Of one figure."""
BLOCK = re.compile(r"^```(\w*)\n(.*?)^```$", flags=re.MULTILINE | re.DOTALL)


def blocks(language: str) -> list[tuple[str, str]]:
    """Page and text of every code block in a language."""
    return [
        (page, text)
        for page, whole in PAGES.items()
        for name, text in BLOCK.findall(whole)
        if name == language
    ]


def prose(*pages: str) -> str:
    return "".join(BLOCK.sub("", PAGES[page]) for page in pages or PAGES)


def spans() -> list[str]:
    """Words in backticks outside of code blocks."""
    return [span.replace(r"\|", "|") for span in re.findall(r"`([^`\n]+)`", prose())]


def commands() -> list[list[str]]:
    lines = [
        line for _, block in blocks("bash") for line in block.replace("\\\n", " ").splitlines()
    ]
    return [words for line in lines if (words := shlex.split(line, comments=True))]


def table(first_cell: str) -> dict[str, list[str]]:
    """First cell without backticks -> the other cells, of the tables whose head begins with ``first_cell``."""
    tables = re.findall(r"(?:^\|.*\n)+", prose(), flags=re.MULTILINE)
    found = [text for text in tables if text.startswith(f"| {first_cell} |")]
    assert found, f"no table begins with | {first_cell} |"
    rows = [re.split(r"(?<!\\)\|", line)[1:-1] for text in found for line in text.splitlines()[2:]]
    return {row[0].strip().split("`")[1]: [cell.strip() for cell in row[1:]] for row in rows}


OPTIONS = {
    name: cells for name, cells in table("option").items() if name[0].isalpha() and "." in name
}
"""Option of a recipe -> its default, allowed values and meaning, as docs/options.md shows them."""
SECTIONS = "|".join({option.partition(".")[0] for option in OPTIONS})
OVERRIDE = re.compile(rf"(?:{SECTIONS})\.[\w.-]+=\S+")


@pytest.mark.parametrize("page", generate.PAGES)
def test_a_generated_page_is_what_the_code_says_now(page):
    assert (DOCS / page).read_text(encoding="utf-8") == generate.PAGES[page](), (
        f"docs/{page} is out of date: python docs/generate.py"
    )


def test_a_default_can_be_typed_as_it_is_shown(tmp_path):
    recipe = tmp_path / "my.yaml"
    recipe.write_text("tasks: {mood: {path: mood.csv}}", encoding="utf-8")
    typed = [
        f"{option.replace('<name>', 'mood')}={shown.strip('`')}"
        for option, (shown, *_) in OPTIONS.items()
        if option != "tasks.<name>.path"
    ]
    default = load_recipe(recipe)
    assert len(typed) > 100
    assert [word for word in typed if load_recipe(recipe, [word]) != default] == []


def anchors(page: str) -> set[str]:
    """What a link to a heading may say: the heading in lower case, blanks as hyphens."""
    titles = re.findall(r"^#+ (.+)$", prose(page), flags=re.MULTILINE)
    return {re.sub(r"[^\w -]", "", title.lower()).replace(" ", "-") for title in titles}


@pytest.mark.parametrize("page", PAGES)
def test_links_of_a_page_lead_to_files_and_headings(page):
    for link in re.findall(r"\]\(([^)\s]+)\)", BLOCK.sub("", PAGES[page])):
        file, _, anchor = link.partition("#")
        if link.startswith("http"):
            continue
        there = (ROOT / page).parent / file if file else ROOT / page
        assert there.exists(), f"{page}: {link}"
        assert not anchor or anchor in anchors(there.resolve().relative_to(ROOT).as_posix()), link


def test_figures_are_small_and_all_shown():
    figures = {path.name: path.stat().st_size for path in (DOCS / "figures").iterdir()}
    shown = re.findall(r"figures/([\w.]+)\)", prose())
    assert figures and set(figures) == set(shown)
    assert {name: size for name, size in figures.items() if size >= MOST_BYTES} == {}


def test_the_readme_is_short_and_names_every_folder():
    assert len(PAGES["README.md"].splitlines()) <= 200
    folders = {path.parent.name for path in ROOT.glob("comoe/*/__init__.py")}
    assert {name for name in folders if f"{name}/" not in PAGES["README.md"]} == set()


def test_files_named_in_commands_and_in_the_text_exist():
    words = [word for command in commands() for word in command] + spans()
    files = [
        re.sub(r"::.*|\s.*", "", word)
        for word in words
        if re.match(r"(comoe|launch|ds_configs|tests|docs)/", word)
    ]
    missing = [
        file for file in files if not file.startswith("docs/_build") and not (ROOT / file).exists()
    ]
    assert len(files) > 20 and missing == []
    modules = [command[command.index("-m") + 1] for command in commands() if "-m" in command]
    modules += re.findall(r"python -m ([\w.]+)", prose())
    ours = [
        ROOT / name.replace(".", "/") for name in modules if name.startswith(("comoe", "tests"))
    ]
    assert ours
    assert [
        path
        for path in ours
        if not path.with_suffix(".py").is_file() and not (path / "__main__.py").is_file()
    ] == []


def test_options_of_scripts_named_in_commands_exist():
    checked, parsers = 0, generate.parsers()
    for command in commands():
        script = next((word for word in command if re.fullmatch(r"launch/\w+\.py", word)), None)
        if script is None and (command[0] != "comoe" or command[1].startswith("-")):
            continue
        name, after = (command[1], command[2:]) if script is None else (Path(script).stem, command)
        parser = parsers[f"comoe {name}"]
        known = {flag for action in parser._actions for flag in action.option_strings}
        flags = [
            word for word in after[after.index(script) if script else 0 :] if word.startswith("--")
        ]
        assert set(flags) <= known, f"{name}: {command}"
        checked += len(flags)
    assert checked > 20


def test_overrides_in_commands_are_valid_for_their_recipe():
    checked = 0
    for command in commands():
        words = []
        for before, word in itertools.pairwise(command):
            key, _, values = word.partition("=")
            each = values.split(",") if before == "--tune" else [values]
            words += [f"{key}={value}" for value in each] if OVERRIDE.fullmatch(word) else []
        given = [command[command.index("--config") + 1]] if "--config" in command else []
        given += command[2:3] if command[0] == "comoe" else []
        config = next(
            (word for word in given if (ROOT / word).is_file() or word in RECIPES), "starter"
        )
        load_recipe(ROOT / config if (ROOT / config).is_file() else config, words)
        checked += len(words)
    assert checked > 10


def papers_commands() -> list[list[str]]:
    """Commands in the table of the papers' elements."""
    with (DOCS / "papers.tsv").open(encoding="utf-8", newline="") as file:
        cells = [
            row["command"] for row in csv.DictReader(file, delimiter="\t", quoting=csv.QUOTE_NONE)
        ]
    return [shlex.split(span) for cell in cells for span in re.findall(r"`(comoe [^`]+)`", cell)]


@pytest.mark.parametrize("words", papers_commands(), ids=" ".join)
def test_a_command_of_the_table_of_papers_is_one(words, tmp_path):
    _, name, *rest = words
    parser = generate.parsers()[f"comoe {name}"]
    given = parser.parse_intermixed_args([word.replace("<folder>", str(tmp_path)) for word in rest])
    if not hasattr(given, "overrides"):
        return
    take_recipe(given)
    load_recipe(given.config, given.overrides)
    if name == "compare":
        # What it compares stands in the command: the default arms belong to other rows.
        assert given.arms != parser.get_default("arms")
        given.dry_run, given.output = True, tmp_path / "out"
        assert run_comparison(given) == []


def test_overrides_and_options_in_the_text_are_valid():
    smoke = ROOT / "launch/configs/smoke.yaml"
    overrides = [span for span in spans() if OVERRIDE.fullmatch(span) and "<" not in span]
    for override in overrides:
        load_recipe(smoke, [override.replace("tasks.mood=null", "tasks.topic=null")])
    named = {span for span in spans() if re.fullmatch(rf"(?:{SECTIONS})\.[a-z_.]+", span)}
    sections = {option.rpartition(".")[0] for option in OPTIONS}
    named -= {"model.safetensors", "model.onnx"}
    assert len(overrides) > 5 and len(named) > 10 and named - set(OPTIONS) - sections == set()


# The one with a plugin is run in tests/unit/config/test_plugins.py.
@pytest.mark.parametrize(
    "page, text", [found for found in blocks("yaml") if "plugins:" not in found[1]]
)
def test_a_recipe_of_a_page_is_valid(page, text, tmp_path):
    recipe = tmp_path / "my.yaml"
    recipe.write_text(text, encoding="utf-8")
    assert load_recipe(recipe).tasks


def test_the_recipe_for_auxiliary_data_reads_what_augment_writes(tmp_path, monkeypatch):
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
    (text,) = (block for _, block in blocks("yaml") if "aux_opinion" in block)
    (tmp_path / "my.yaml").write_text(text, encoding="utf-8")
    monkeypatch.chdir(tmp_path)
    splits = load_corpus(load_recipe(Path("my.yaml"))).splits.values()
    labels = [label for split in splits for label in split.labels["polarity"]]
    assert sorted(labels) == [0] * 4 + [1] * 4 + [2] * 4
    assert {answer for split in splits for answer in split.labels["opinion"]} == {
        row["aux_opinion"] for row in rows
    }
    assert {value for split in splits for value in split.confidences["opinion"]} == {0.25}


def test_python_of_a_page_imports_names_that_exist():
    imported = [
        (node.module, alias.name)
        for _, block in blocks("python")
        for node in ast.walk(ast.parse(block))
        if isinstance(node, ast.ImportFrom)
        for alias in node.names
    ]
    assert imported
    for module, name in imported:
        assert hasattr(importlib.import_module(module), name), f"{module} has no {name}"


def test_formats_kinds_and_presets_are_those_of_the_code():
    assert list(table("format")) == list(READERS)
    assert list(table("`data.normalize.preset`")) == list(PRESETS)
    shown = {
        kind: tuple(re.findall(r"`(\w+)`", cells[-1])) for kind, cells in table("`kind`").items()
    }
    assert shown == {name: kind.metrics for name, kind in KINDS.items()}


def test_tables_to_register_in_exist_in_the_named_file():
    checked = 0
    for line in prose("docs/extending.md").splitlines():
        cells = re.split(r"(?<!\\)\|", line)[1:-1]
        if len(cells) != 4:
            continue
        _, opened, _, registered = cells
        files = [DOCS / link for link in re.findall(r"\]\(([^)]+)\)", opened)]
        source = "".join(file.read_text(encoding="utf-8") for file in files if file.is_file())
        for name in re.findall(r"`([A-Z_]+)`", registered):
            assert re.search(rf"^{name}\b.*=", source, flags=re.MULTILINE), (
                f"{opened.strip()} has no table {name}"
            )
            checked += 1
    assert checked > 10


def test_every_paper_that_the_code_cites_stands_in_the_references():
    cited = {
        paper
        for folder in ("comoe", "launch", "docs")
        for path in (ROOT / folder).rglob("*.*")
        if path.suffix in (".py", ".yaml", ".md")
        for paper in re.findall(r"arXiv:\d{4}\.\d{5}", path.read_text(encoding="utf-8"))
    }
    index = set(re.findall(r"arXiv:\d{4}\.\d{5}", PAGES["docs/references.md"]))
    assert cited and cited - index == set()


def test_messages_of_the_troubleshooting_page_are_those_of_the_code():
    files = [*ROOT.glob("comoe/**/*.py"), *ROOT.glob("launch/*.py")]
    trees = [ast.parse(file.read_text(encoding="utf-8")) for file in files]
    said = [
        node.value
        for tree in trees
        for node in ast.walk(tree)
        if isinstance(node, ast.Constant) and isinstance(node.value, str)
    ] + [file.read_text(encoding="utf-8") for file in ROOT.glob("launch/*.sh")]
    code = "\n".join(said)
    quoted = [
        span
        for line in prose("docs/troubleshooting.md").splitlines()
        if line.startswith("| `") and not line.startswith(("| `launch", "| `bash"))
        for span in re.findall(r"`([^`]+)`", line.split(" | ")[0])
    ]
    pieces = [piece.strip() for span in quoted for piece in span.split("...")]
    assert len(pieces) > 30
    assert [piece for piece in pieces if piece not in code] == []


def test_versions_in_the_pages_are_those_of_the_package():
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    citation = (ROOT / "CITATION.cff").read_text(encoding="utf-8")
    assert f"version: {comoe.__version__}\n" in citation
    assert (
        re.findall(r"^## (.+)$", PAGES["CHANGELOG.md"], flags=re.MULTILINE)[0] == comoe.__version__
    )
    python = project["requires-python"].removeprefix(">=")
    assert set(re.findall(r"Python (3\.\d+)", prose("README.md", "docs/start.md"))) == {python}


def test_no_number_is_left_to_be_measured():
    assert [page for page, text in PAGES.items() if re.search("MEASURE|@@|TODO", text)] == []
