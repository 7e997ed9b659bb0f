"""The rules of the code, held by reading its syntax trees: levels, sizes, docstrings, who may import what."""

from __future__ import annotations

import ast
import functools
import json
import re
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
FILES = sorted(
    path.relative_to(ROOT).as_posix()
    for path in [*ROOT.glob("comoe/**/*.py"), *ROOT.glob("launch/*.py")]
)
PACKAGE = [file for file in FILES if file.startswith("comoe/")]

MAX_LAUNCH_LINES, MAX_FUNCTION_LINES, MAX_OWN_IMPORTS = 60, 60, 15

LEVELS = {
    "launch": 9,
    "comoe/commands": 8,
    "comoe/experiments": 7, "comoe/benchmarks": 7, "comoe/reporting": 7,
    "comoe/train": 6, "comoe/serving": 6,
    "comoe/inference": 5, "comoe/augment": 5,
    "comoe/evaluation": 4,
    "comoe/losses": 3,
    "comoe/data": 2, "comoe/models": 2,
    "comoe/tasks": 1, "comoe/starter": 1,
    "comoe": 0, "comoe/config": 0,
}  # fmt: skip
"""Folder -> level. A file imports from its own folder and from lower levels; two folders of one
level are strangers."""

ALIASES = ("comoe/__init__.py", "comoe/__main__.py", "comoe/hub.py", "comoe/predict.py")
"""Public names that lead to where things are, from above and only when used: no home of code."""

LONG_FILES = {
    "comoe/config/recipe.py": "every option of a recipe, in the order of the YAML file",
    "comoe/config/validate.py": "every rule that binds several options, one function for each section",
    "comoe/train/memory_plan.py": "one formula per line of the plan, then what they are fed with",
    "comoe/models/encoders/families.py": "the table of model families, and what is read off it",
    "comoe/train/monitor/monitor.py": "what a run shows: one method for each thing that is logged",
    "comoe/losses/objective.py": "the four modes of the objective, and the table of its terms",
    "comoe/tasks/kinds/base.py": "what every kind of task knows, and the losses that several kinds share",
    "comoe/models/model.py": "the parts of a model and the one forward pass through all of them",
    "comoe/starter/kit.py": "mostly the table of package archives with their checksums and licenses",
}
"""File over 400 lines -> why it is one piece."""

HOMES = {
    "deepspeed": ("comoe/train/parallel/", "comoe/train/checkpoint/"),
    "torch.distributed": ("comoe/distributed.py",),
    "transformers": ("comoe/models/encoders/", "comoe/models/vision/", "comoe/data/", "comoe/starter/",
                     "comoe/inference/exported.py", "comoe/inference/auto.py", "comoe/augment/"),
    "huggingface_hub": ("comoe/inference/", "comoe/config/hub_access.py"),
    "tokenizers": ("comoe/data/", "comoe/starter/"),
    "datasets": ("comoe/data/reading/",),
    "PIL": ("comoe/data/images/", "comoe/starter/"),
    "tensorboard": ("comoe/train/monitor/",),
    # A monitor belongs to one run; the hparams page compares finished runs.
    "torch.utils.tensorboard": ("comoe/train/monitor/", "comoe/experiments/"),
    "yaml": ("comoe/config/",),
    "fastapi": ("comoe/serving/",), "starlette": ("comoe/serving/",), "uvicorn": ("comoe/serving/",),
    "prometheus_client": ("comoe/serving/",),
    "onnx": ("comoe/inference/",), "onnxruntime": ("comoe/inference/",),
    "matplotlib": ("comoe/train/monitor/plots.py", "comoe/train/monitor/cross_plots.py",
                   "comoe/train/monitor/embedding_plots.py", "comoe/experiments/", "comoe/reporting/figures.py"),
    "jinja2": ("comoe/reporting/page.py",),
    "ray": ("comoe/inference/ray_engine.py",),
    "emoji": ("comoe/data/text/",),
    "sklearn": ("comoe/data/", "comoe/reporting/drift.py", "comoe/inference/select.py",
                "comoe/experiments/", "comoe/train/monitor/embedding_plots.py"),
    "captum": ("comoe/inference/explain.py",),
    "scipy": ("comoe/tasks/", "comoe/evaluation/", "comoe/losses/weighting/", "comoe/experiments/compare/",
              "comoe/reporting/drift.py"),
}  # fmt: skip
"""Third-party library -> beginnings of the paths that may import it; libraries without a line may
appear anywhere."""

TABLES = ("KINDS", "FUSIONS", "GATES", "LOSSES", "WEIGHTINGS", "MIXINGS", "METRICS")
"""Tables whose keys no file may branch on."""
COMMON_WORDS = {"text", "tokens"}
"""Keys that are also the name of a column, of a field of a prompt and of what a model reads; and of
a mode of kinds."""


@functools.cache
def tree_of(file: str) -> ast.Module:
    return ast.parse((ROOT / file).read_text(encoding="utf-8"))


def imports_of(file: str) -> Iterator[str]:
    """Every imported dotted name, those inside functions too; ``from a import b`` counts as a.b."""
    for node in ast.walk(tree_of(file)):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{file}:{node.lineno}: write the import with its full name"
            yield from (f"{node.module}.{alias.name}" for alias in node.names)


def is_below(name: str, top: str) -> bool:
    return name == top or name.startswith(f"{top}.")


def module_file(name: str) -> str | None:
    """The file of ours that a dotted name lies in."""
    parts = name.split(".")
    for end in range(len(parts), 0, -1):
        path = "/".join(parts[:end])
        if f"{path}.py" in FILES:
            return f"{path}.py"
        if f"{path}/__init__.py" in FILES:
            return f"{path}/__init__.py"
    return None


def our_imports(file: str) -> set[str]:
    return {found for name in imports_of(file) if (found := module_file(name)) and found != file}


def folder_of(file: str) -> str:
    """The key of ``LEVELS`` that a file belongs to."""
    return "/".join(file.split("/")[:-1][:2])


def functions_of(file: str) -> Iterator[ast.FunctionDef | ast.AsyncFunctionDef]:
    return (
        node
        for node in ast.walk(tree_of(file))
        if isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef))
    )


def test_a_script_is_short_and_a_long_file_has_a_reason():
    lines = {file: len((ROOT / file).read_text(encoding="utf-8").splitlines()) for file in FILES}
    assert {
        file: n for file, n in lines.items() if file.startswith("launch/") and n > MAX_LAUNCH_LINES
    } == {}
    assert {file for file, n in lines.items() if n > 400} == set(LONG_FILES), (
        "give the reason in LONG_FILES, or split"
    )


def test_functions_are_short():
    long = [
        f"{file}:{node.lineno} {node.name}: {size} lines"
        for file in FILES
        for node in functions_of(file)
        if (size := node.end_lineno - node.lineno + 1) > MAX_FUNCTION_LINES
    ]
    assert not long, f"functions over {MAX_FUNCTION_LINES} lines: {long}"


def test_imports_run_downwards_only():
    upward = [
        f"{file} (level {LEVELS[folder]}) imports {other} (level {LEVELS[target]})"
        for file in FILES
        if file not in ALIASES
        for other in our_imports(file)
        if (target := folder_of(other)) not in ("comoe", folder := folder_of(file))
        and LEVELS[target] >= LEVELS[folder]
    ]
    assert upward == []


def test_a_file_imports_at_most_15_of_ours():
    many = {file: n for file in FILES if (n := len(our_imports(file))) > MAX_OWN_IMPORTS}
    assert many == {}, f"over {MAX_OWN_IMPORTS}: split"


def test_no_imports_go_round_in_a_circle():
    done: set[str] = set()

    def visit(file: str, path: tuple[str, ...]) -> None:
        assert file not in path, f"a circle: {' -> '.join([*path[path.index(file) :], file])}"
        if file not in done:
            for other in our_imports(file) - set(ALIASES):
                visit(other, (*path, file))
            done.add(file)

    for file in set(FILES) - set(ALIASES):
        visit(file, ())
    assert done == set(FILES) - set(ALIASES)


# A benchmark sets our code beside other libraries, so it may import them all.
def test_third_party_libraries_stay_in_their_homes():
    abroad = [
        f"{file} imports {name}; that belongs into {homes}"
        for file in FILES
        if not file.startswith("comoe/benchmarks/")
        for name in imports_of(file)
        for library, homes in HOMES.items()
        if is_below(name, library) and not file.startswith(homes)
    ]
    assert abroad == []


def test_package_files_import_nothing_so_that_help_is_instant():
    # The two that make the public API are measured in test_api.py.
    api = (*ALIASES, "comoe/train/__init__.py")
    inits = [file for file in PACKAGE if file.endswith("/__init__.py") and file not in api]
    assert {file: names for file in inits if (names := list(imports_of(file)))} == {}


def is_stub(node: ast.FunctionDef | ast.AsyncFunctionDef) -> bool:
    """``def f(...): ...``, the form of a protocol."""
    return (
        len(node.body) == 1
        and isinstance(node.body[0], ast.Expr)
        and getattr(node.body[0].value, "value", 0) is ...
    )


@functools.cache
def all_classes() -> dict[str, ast.ClassDef]:
    return {
        node.name: node
        for file in FILES
        for node in ast.walk(tree_of(file))
        if isinstance(node, ast.ClassDef)
    }


def documented_above(name: str, bases: list[ast.expr]) -> bool:
    """True when a class of ours that is inherited from documents the method: its words hold for this one too."""
    for base in bases:
        parent = all_classes().get(getattr(base, "id", getattr(base, "attr", "")))
        if parent is None:
            continue
        methods = [
            node
            for node in parent.body
            if isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef))
        ]
        documented = any(node.name == name and ast.get_docstring(node) for node in methods)
        if documented or documented_above(name, parent.bases):
            return True
    return False


def undocumented(body: list[ast.stmt], *, bases: list[ast.expr], prefix: str = "") -> Iterator[str]:
    for node in body:
        if isinstance(
            node, (ast.ClassDef, ast.FunctionDef, ast.AsyncFunctionDef)
        ) and not node.name.startswith("_"):
            excused = not isinstance(node, ast.ClassDef) and (
                is_stub(node) or documented_above(node.name, bases)
            )
            if not ast.get_docstring(node) and not excused:
                yield f"{prefix}{node.name}"
            if isinstance(node, ast.ClassDef):
                yield from undocumented(node.body, bases=node.bases, prefix=f"{prefix}{node.name}.")


def test_everything_public_has_a_docstring():
    for file in FILES:
        tree = tree_of(file)
        empty_init = file.endswith("__init__.py") and not tree.body
        assert empty_init or ast.get_docstring(tree), f"{file} begins without a docstring"
        assert list(undocumented(tree.body, bases=[])) == [], file


@pytest.mark.parametrize("file", ["config/recipe", "types"])
def test_every_field_of_a_contract_says_what_it_means(file: str):
    file = f"comoe/{file}.py"
    for node in tree_of(file).body:
        if not isinstance(node, ast.ClassDef):
            continue
        for field, after in zip(node.body, [*node.body[1:], None], strict=True):
            if isinstance(field, ast.AnnAssign):
                said = isinstance(after, ast.Expr) and isinstance(
                    getattr(after.value, "value", None), str
                )
                assert said, (
                    f"{file}:{field.lineno}: {node.name}.{field.target.id} has no docstring beneath it"
                )


@functools.cache
def table_keys() -> frozenset[str]:
    keys: set[str] = set()
    for file in PACKAGE:
        for node in tree_of(file).body:
            targets = (
                node.targets if isinstance(node, ast.Assign) else [getattr(node, "target", None)]
            )
            if any(isinstance(target, ast.Name) and target.id in TABLES for target in targets):
                keys |= {
                    key.value
                    for key in getattr(node.value, "keys", [])
                    if isinstance(key, ast.Constant)
                }
    return frozenset(keys)


def test_no_file_branches_on_the_name_of_a_kind_loss_gate_or_strategy():
    found, keys = [], table_keys() - COMMON_WORDS
    for file in PACKAGE:
        for node in ast.walk(tree_of(file)):
            if isinstance(node, (ast.Compare, ast.MatchValue)):
                constants = {
                    part.value for part in ast.walk(node) if isinstance(part, ast.Constant)
                }
                found += [f"{file}:{node.lineno}: {word}" for word in constants & keys]
    assert not found, f"look the thing up in its table instead: {found}"


TEXTS = sorted(
    path.relative_to(ROOT).as_posix()
    for pattern in (
        "comoe/**/*.py",
        "launch/**/*.*",
        "tests/**/*.py",
        "ds_configs/*",
        "*.toml",
        "*.md",
        "docs/**/*.md",
        "docs/*.py",
        ".ci/run",
    )
    for path in ROOT.glob(pattern)
    if path.is_file() and "__pycache__" not in path.parts
)
FOREIGN = re.compile(r"python[h]osted|pypi[.]org|(?<![\w.*-])/(?:work|opt|root|mnt)/")
"""Hosts of a package registry, and folders of one machine."""


def test_no_file_names_a_registry_host_or_a_folder_of_one_machine():
    texts = {file: (ROOT / file).read_text(encoding="utf-8") for file in TEXTS}
    assert {file: found for file in texts if (found := FOREIGN.findall(texts[file]))} == {}


@pytest.mark.parametrize("stem", ["zero1", "zero2", "zero2_offload", "zero3"])
def test_a_deepspeed_file_sets_zero_and_leaves_the_recipes_numbers_to_the_recipe(stem: str):
    settings = json.loads((ROOT / f"ds_configs/{stem}.json").read_text(encoding="utf-8"))
    experts, zero = settings["expert_parallel"], settings["zero_optimization"]
    sizes = (
        "train_batch_size",
        "train_micro_batch_size_per_gpu",
        "gradient_accumulation_steps",
        "gradient_clipping",
    )
    assert {settings[key] for key in sizes} | {settings["bf16"]["enabled"]} == {"auto"}
    assert {experts["autoep_size"], experts["top_k"], experts["use_grouped_mm"]} == {"auto"}
    assert zero["stage"] == int(stem[4])
    assert ("offload_optimizer" in zero) == stem.endswith("_offload")


def test_the_house_sees_the_code_that_it_judges():
    assert "comoe/config/recipe.py" in FILES and len(PACKAGE) > 5
    assert {"deepspeed", "transformers"} <= {
        name.split(".")[0] for file in PACKAGE for name in imports_of(file)
    }
    assert {"single_label", "tags"} <= table_keys()
