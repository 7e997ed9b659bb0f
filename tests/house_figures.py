"""Print the figures of the architecture that reviews compare: sizes, shares, imports by level.

    python tests/house_figures.py [FOLDER]     # of this checkout, or of another one

The package is counted without comoe/benchmarks, which is no part of the wheel.
"""

from __future__ import annotations

import ast
import statistics
import sys
from collections import Counter, defaultdict
from collections.abc import Iterator
from pathlib import Path

LEVELS = {
    "launch": 9, "commands": 8, "experiments": 7, "benchmarks": 7, "reporting": 7, "train": 6, "serving": 6,
    "inference": 5, "augment": 5,
    "evaluation": 4, "losses": 3, "data": 2, "models": 2, "tasks": 1, "starter": 1, "config": 0, "": 0,
}  # fmt: skip
ALIASES = ("comoe/__init__.py", "comoe/__main__.py", "comoe/hub.py", "comoe/predict.py")
"""Public names that lead to where things are: their imports are no architecture."""
Function = ast.FunctionDef | ast.AsyncFunctionDef


def lines_of(path: Path) -> list[str]:
    return path.read_text(encoding="utf-8").splitlines()


def docstring_lines(tree: ast.Module) -> set[int]:
    """Numbers of the lines of all docstrings, those beneath fields included."""
    return {
        number
        for node in ast.walk(tree)
        if isinstance(node, ast.Expr)
        and isinstance(node.value, ast.Constant)
        and isinstance(node.value.value, str)
        for number in range(node.lineno, node.end_lineno + 1)
    }


def functions_of(tree: ast.Module) -> list[Function]:
    return [node for node in ast.walk(tree) if isinstance(node, Function)]


def parameters(node: Function) -> int:
    listed = [*node.args.posonlyargs, *node.args.args, *node.args.kwonlyargs]
    return len([item for item in listed if item.arg not in ("self", "cls", "ctx")])


def names_in(tree: ast.Module) -> Counter[str]:
    """How often each name stands in a file where it is not defined."""
    nodes = (node for node in ast.walk(tree) if isinstance(node, (ast.Name, ast.Attribute)))
    return Counter(getattr(node, "id", getattr(node, "attr", None)) for node in nodes)


def used_once(tree: ast.Module, everywhere: Counter[str]) -> tuple[int, int]:
    """Private functions and methods of at most 8 lines whose name stands in one further place of the file (of all files
    for a method, which may belong to a class below), and how many of them are called there; the others stand in a
    table or are handed over."""
    here = names_in(tree)
    classes = [node for node in ast.walk(tree) if isinstance(node, ast.ClassDef)]
    methods = {id(node) for found in classes for node in found.body}
    called = {
        getattr(node.func, "id", getattr(node.func, "attr", None))
        for node in ast.walk(tree)
        if isinstance(node, ast.Call)
    }
    found = [
        node.name
        for node in functions_of(tree)
        if node.name.startswith("_")
        and not node.name.startswith("__")
        and (everywhere if id(node) in methods else here)[node.name] == 1
        and node.end_lineno - node.lineno < 8
    ]
    return len(found), len(called & set(found))


def imports_of(tree: ast.Module, root: Path) -> Iterator[str]:
    """Files of the package that a file imports."""
    for node in ast.walk(tree):
        names = []
        if isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            names = [f"{node.module}.{alias.name}" for alias in node.names]
        for name in names:
            parts = name.split(".")
            places = ["/".join(parts[:end]) for end in range(len(parts), 0, -1)]
            found = [
                f"{place}{ending}" for place in places for ending in (".py", "/__init__.py")
                if parts[0] == "comoe" and (root / f"{place}{ending}").is_file()
            ]  # fmt: skip
            yield from found[:1]


def folder_of(file: str) -> str:
    parts = file.split("/")
    return "launch" if parts[0] == "launch" else parts[1] if len(parts) > 2 else ""


def cycles(graph: dict[str, set[str]]) -> int:
    """Groups of files that import one another in a circle (Tarjan's strongly connected components)."""
    number, low, stack, groups = {}, {}, [], 0

    def visit(file: str) -> None:
        nonlocal groups
        number[file] = low[file] = len(number)
        stack.append(file)
        for other in graph.get(file, ()):
            if other not in number:
                visit(other)
            if other in stack:
                low[file] = min(low[file], low[other])
        if low[file] == number[file]:
            group = stack[stack.index(file) :]
            del stack[-len(group) :]
            groups += len(group) > 1

    for file in graph:
        if file not in number:
            visit(file)
    return groups


def import_rows(root: Path, trees: dict[str, ast.Module]) -> Iterator[tuple[str, str]]:
    graph = {
        file: set(imports_of(tree, root)) - {file, *ALIASES}
        for file, tree in trees.items()
        if file not in ALIASES
    }
    arrows = defaultdict(set)
    for file, others in graph.items():
        for other in others:
            if folder_of(other) != folder_of(file):
                arrows[folder_of(file)].add(folder_of(other))
    own = {file: len(others) for file, others in graph.items()}
    most = max(own, key=own.get)
    yield "most own imports in one file", f"{own[most]} ({most})"
    if not set(arrows) <= set(LEVELS):
        return
    up = [(a, b) for a in arrows for b in arrows[a] if b and LEVELS[b] >= LEVELS[a]]
    yield (
        "folders; arrows between them; upward; circles of files",
        (
            f"{len({*map(folder_of, trees)})}; {sum(map(len, arrows.values()))}; {len(up)}; {cycles(graph)}"
        ),
    )
    for name in sorted(arrows, key=lambda name: -LEVELS[name]):
        below = sorted(other or "comoe/*.py" for other in arrows[name])
        yield f"  {LEVELS[name]} {name or 'comoe/*.py'}", f"-> {', '.join(below)}"


def rows(root: Path) -> Iterator[tuple[str, str]]:
    """Name and value of every figure."""
    package = [
        path
        for path in sorted(root.glob("comoe/**/*.py"))
        if "benchmarks" not in path.relative_to(root).parts
    ]
    lines = {path: lines_of(path) for path in package}
    trees = {path: ast.parse("\n".join(lines[path])) for path in package}
    docs = {path: docstring_lines(trees[path]) for path in package}
    functions = [(path, node) for path in package for node in functions_of(trees[path])]
    sizes = {path: len(lines[path]) for path in package}
    total = sum(sizes.values())
    top = [path for path in package if path.parent.name == "comoe" and path.name != "__init__.py"]
    folders = {path.relative_to(root).parts[1] for path in package} - {
        path.name for path in package
    }
    comments = sum(line.strip().startswith("#") for some in lines.values() for line in some)
    written = sum(bool(line.strip()) for some in lines.values() for line in some)
    wide = sum(len(line) > 100 for some in lines.values() for line in some)
    tests = [path for path in root.glob("tests/**/*.py")]
    yield (
        "files at the top of the package (without __init__); folders",
        f"{len(top)}; {len(folders)}",
    )
    yield "files, lines of the package", f"{len(sizes)}; {total:,}"
    yield (
        "median file; files over 400 lines",
        (f"{statistics.median(sizes.values()):.0f}; {sum(size > 400 for size in sizes.values())}"),
    )
    yield "lines of the package per function", f"{total / len(functions):.1f}"
    yield (
        "functions; over 60 lines",
        (f"{len(functions)}; {sum(node.end_lineno - node.lineno >= 60 for _, node in functions)}"),
    )
    everywhere = sum(map(names_in, trees.values()), Counter())
    once = [used_once(tree, everywhere) for tree in trees.values()]
    yield (
        "private helpers used once with at most 8 lines; called",
        "; ".join(str(sum(counts)) for counts in zip(*once, strict=True)),
    )
    yield (
        "docstrings; comments, share of lines",
        (f"{sum(map(len, docs.values())) / total:.1%}; {comments / total:.1%}"),
    )
    yield "lines over 100 characters, of those not blank", f"{wide / written:.1%}"
    yield (
        "functions with 8 or more parameters",
        (f"{sum(parameters(node) >= 8 for _, node in functions)}"),
    )
    yield "lines of tests; files", f"{sum(len(lines_of(path)) for path in tests):,}; {len(tests)}"
    yield (
        "lines of README; pages of docs",
        (f"{len(lines_of(root / 'README.md'))}; {len(list(root.glob('docs/**/*.md')))}"),
    )
    every = {path.relative_to(root).as_posix(): trees[path] for path in package}
    for path in [*root.glob("launch/*.py"), *root.glob("comoe/benchmarks/*.py")]:
        every[path.relative_to(root).as_posix()] = ast.parse(path.read_text(encoding="utf-8"))
    yield from import_rows(root, every)


def main() -> None:
    root = Path(sys.argv[1] if len(sys.argv) > 1 else Path(__file__).parent.parent)
    found = list(rows(root))
    width = max(len(name) for name, _ in found)
    print("\n".join(f"{name:{width}}  {value}" for name, value in found))


if __name__ == "__main__":
    main()
