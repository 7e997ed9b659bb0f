"""What pip installs: the wheel holds the command, the recipes and the types, and predicts without the extras."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import tarfile
import zipfile
from email.parser import Parser
from pathlib import Path

import pytest
from helpers_export import export_tiny

from comoe.config.extras import EXTRAS, need

ROOT = Path(__file__).parents[2]
SOURCES = (
    "comoe",
    "launch",
    "ds_configs",
    "pyproject.toml",
    "README.md",
    "LICENSE",
)
BUILD = """
import sys
from setuptools import build_meta
target = sys.argv[1]  # which building replaces
build_meta.build_sdist(target)
build_meta.build_wheel(target)
"""
WITHOUT_EXTRAS = """
import sys
from comoe.config.extras import EXTRAS
sys.modules.update(dict.fromkeys(name for names in EXTRAS.values() for name in names))
sys.modules.update(dict.fromkeys(["fcntl", "resource", "grp", "termios"]))  # Windows has none
from comoe.commands.main import main
main(sys.argv[1:])
"""


@pytest.fixture(scope="module")
def built(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with the sdist, the wheel, and in ``site`` what is in the wheel."""
    folder = tmp_path_factory.mktemp("built")
    for name in SOURCES:
        copy = shutil.copytree if (ROOT / name).is_dir() else shutil.copy
        copy(ROOT / name, folder / name)
    done = subprocess.run(
        [sys.executable, "-c", BUILD, folder], cwd=folder, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    with zipfile.ZipFile(next(folder.glob("*.whl"))) as wheel:
        wheel.extractall(folder / "site")
    return folder


def test_the_wheel_holds_modules_recipes_types_and_the_command(built: Path) -> None:
    site = built / "site"
    files = {path.relative_to(site).as_posix() for path in site.rglob("*.*") if path.is_file()}
    modules = {path.relative_to(ROOT).as_posix() for path in ROOT.glob("comoe/**/*.py")}
    ready = {f"comoe/recipes/{path.name}" for path in ROOT.glob("launch/configs/*.yaml")}
    ready |= {f"comoe/ds_configs/{path.name}" for path in ROOT.glob("ds_configs/*.json")}
    pages = {path.relative_to(ROOT).as_posix() for path in ROOT.glob("comoe/**/*.html")}
    pages |= {path.relative_to(ROOT).as_posix() for path in ROOT.glob("comoe/serving/page/*")}
    expected = (
        {name for name in modules if not name.startswith("comoe/benchmarks/")} | ready | pages
    )
    assert {name for name in files if "dist-info" not in name} == expected | {"comoe/py.typed"}
    (points,) = site.glob("*.dist-info/entry_points.txt")
    assert "comoe = comoe.commands.main:main" in points.read_text()


def test_the_sdist_makes_a_wheel(built: Path) -> None:
    with tarfile.open(next(built.glob("*.tar.gz"))) as sdist:
        names = {name.partition("/")[2] for name in sdist.getnames()}
    wanted = (
        "pyproject.toml",
        "launch/configs/smoke.yaml",
        "ds_configs/zero2.json",
        "comoe/py.typed",
    )
    assert set(wanted) <= names


def test_what_an_extra_brings_is_not_required_without_it(built: Path) -> None:
    (metadata,) = (built / "site").glob("*.dist-info/METADATA")
    required = Parser().parsestr(metadata.read_text()).get_all("Requires-Dist")
    for extra, names in EXTRAS.items():
        for name in names:
            lines = [line for line in required if line.startswith(name)]
            assert lines and all("extra ==" in line for line in lines), name
            assert any(f'extra == "{extra}"' in line for line in lines), name


def run(built: Path, *words: str | Path) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-c", WITHOUT_EXTRAS, *words],
        cwd=built,
        env=os.environ | {"PYTHONPATH": str(built / "site"), "PYTHONSAFEPATH": "1"},
        capture_output=True,
        text=True,
    )


def test_it_predicts_and_scores_where_no_extra_is_installed(built: Path) -> None:
    export_tiny(built / "run")
    (built / "posts.txt").write_text("good day\nbad rain\n")
    (built / "posts.csv").write_text("text,label\ngood day,good\nbad rain,bad\n")
    model = built / "run/export"
    done = run(built, "predict", "--model", model, "--input", "posts.txt", "--output", "out.jsonl")
    assert done.returncode == 0, done.stderr
    assert len((built / "out.jsonl").read_text().splitlines()) == 2
    done = run(built, "eval", "--model", model, "--data", "posts.csv", "--task", "mood")
    assert done.returncode == 0 and "mood: " in done.stdout, done.stderr


@pytest.mark.parametrize("word", ["train", "compare", "scale"])
def test_training_without_its_extra_is_refused_with_the_line_for_pip(
    built: Path, word: str
) -> None:
    done = run(built, word, "smoke")
    assert done.returncode == 2 and done.stdout == ""
    missing = ", ".join(EXTRAS["train"])
    assert done.stderr == (
        f'comoe: comoe {word} needs {missing}, which are not installed: pip install "comoe[train]"\n'
    )


def test_serving_without_its_extra_is_refused_and_its_help_needs_nothing(built: Path) -> None:
    done = run(built, "serve", "exported")
    assert done.returncode == 2 and done.stderr.startswith("comoe: comoe serve needs fastapi, ")
    assert done.stderr.endswith('pip install "comoe[serve]"\n')
    assert run(built, "serve", "--help").stdout.startswith("usage: comoe serve ")


def test_a_single_missing_package_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    need("train", what="training")
    monkeypatch.setitem(sys.modules, "datasets", None)
    with pytest.raises(
        ValueError, match=r'^the hub needs datasets, which is not .*"comoe\[train\]"$'
    ):
        need("train", "datasets", what="the hub")
