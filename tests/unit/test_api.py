"""The public API: quick to import, complete, and its examples print what they say."""

from __future__ import annotations

import doctest
import json
import subprocess
import sys
from dataclasses import replace
from importlib.metadata import version
from pathlib import Path

import pytest
from helpers_export import MOOD, export_tiny, make_run

import comoe

ROOT = Path(__file__).parents[2]

LIGHT = """
import sys
import comoe
heavy = {"torch", "numpy", "transformers", "deepspeed", "yaml", "pydantic"} & set(sys.modules)
assert not heavy, heavy
assert set(comoe.__all__) <= set(dir(comoe))
from comoe import train
import comoe.train.run
assert comoe.train is train and callable(comoe.train) and comoe.train.run.train
try:
    comoe.train(no_such_option=True)
except TypeError as error:
    assert "no_such_option" in str(error)
else:
    raise AssertionError
"""


def test_importing_it_imports_nothing_heavy_and_train_is_a_package_and_a_function() -> None:
    subprocess.run([sys.executable, "-c", LIGHT], check=True, cwd=ROOT)


HELP = """
import runpy, sys
sys.argv = [sys.argv[1], "--help"]
try:
    runpy.run_path(sys.argv[0], run_name="__main__")
finally:
    heavy = {"torch", "numpy", "transformers", "yaml", "pydantic", "comoe.config.load"} & set(sys.modules)
    assert not heavy, heavy
"""


@pytest.mark.parametrize("script", sorted(ROOT.glob("launch/*.py")), ids=lambda path: path.stem)
def test_help_is_printed_before_anything_heavy_is_imported(script: Path) -> None:
    done = subprocess.run(
        [sys.executable, "-c", HELP, script], capture_output=True, text=True, cwd=ROOT
    )
    assert done.returncode == 0 and done.stdout.startswith("usage: "), done.stderr


def test_every_public_name_leads_somewhere() -> None:
    assert all(getattr(comoe, name) for name in comoe.__all__)
    assert comoe.__version__ == version("comoe")
    with pytest.raises(AttributeError, match="has no attribute 'Predicter'"):
        comoe.Predicter  # noqa: B018


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A working folder with what the examples read."""
    folder = tmp_path_factory.mktemp("examples")
    (folder / "launch").symlink_to(ROOT / "launch")
    make_run(folder / "runs/smoke", steps=(60, 120))
    mood = replace(MOOD, labels=("negative", "neutral", "positive"))
    # A random model whose predictions are those that the examples print.
    for seed in range(20):
        export_tiny(folder / "runs/smoke", tasks=(mood,), seed=seed)
        predictor = comoe.Predictor.from_pretrained(folder / "runs/smoke/export", device="cpu")
        if predictor(["what a lovely day"])[0]["mood"]["label"] == "positive":
            break
    texts = ["good day", "bad rain", "the sun", "ann in paris", "so bad"]
    answers = [predictor([text])[0]["mood"]["label"] for text in texts]
    rows = [{"text": text, "feeling": label} for text, label in zip(texts, answers, strict=True)]
    (folder / "posts.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return folder


@pytest.mark.parametrize(
    "name", ["Predictor", "Recipe", "export_checkpoint", "load_recipe", "score"]
)
def test_the_example_prints_what_it_says(
    name: str, folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(folder)
    found = doctest.DocTestFinder().find(getattr(comoe, name), name, globs={"comoe": comoe})
    examples = [test for test in found if test.examples]
    assert examples
    for test in examples:
        result = doctest.DocTestRunner().run(test)
        assert result.attempted and not result.failed
