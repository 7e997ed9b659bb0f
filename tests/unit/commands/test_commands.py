"""The command ``comoe``: words are found or refused, a recipe comes first."""

from __future__ import annotations

import gc
import importlib
import inspect
import os
import re
import subprocess
import sys
from argparse import Namespace
from pathlib import Path

import pytest

from comoe import __version__
from comoe.commands import train as train_command
from comoe.commands.arguments import load_predictor, take_recipe
from comoe.commands.main import COMMANDS, main
from comoe.experiments.cluster import plan

ROOT = Path(__file__).parents[3]


def test_every_word_has_its_module_and_a_script_of_the_same_name() -> None:
    assert {path.stem for path in ROOT.glob("launch/*.py")} <= set(COMMANDS)
    for word in COMMANDS:
        module = importlib.import_module(f"comoe.commands.{word}")
        assert module.parser().prog == f"comoe {word}"
        assert inspect.unwrap(module.main) is not module.main, f"comoe {word} is not guarded"


def test_a_word_is_handed_the_others(monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[list[str]] = []
    monkeypatch.setattr(train_command, "main", seen.append)
    main(["train", "--dry-run", "--version"])
    assert seen == [["--dry-run", "--version"]]


@pytest.mark.parametrize(
    "words, code, said",
    [
        (["--version"], 0, f"comoe {__version__}\n"),
        (["--help"], 0, "  augment   auxiliary data"),
        ([], 2, "  predict   predict the posts"),
        (
            ["trian"],
            2,
            "trian is not a command; did you mean train? (one of: init, train, predict,",
        ),
        (
            ["train", "--restarts", "-1"],
            2,
            "argument --restarts: '-1' must be a whole number, at least 0",
        ),
        (["--versoin"], 2, "--versoin is no option of comoe; did you mean --version? ("),
        (
            ["predict", "--ouput", "x"],
            2,
            "error: --ouput is no option of comoe predict; did you mean --output?",
        ),
        (["eval", "-d=x"], 2, "-d is no option of comoe eval; did you mean --device or --data? ("),
        (
            ["report", "x", "--wieght=w"],
            2,
            "--wieght is no option of comoe report; did you mean --weight?",
        ),
        (
            ["serve", "x", "--zzzz"],
            2,
            "error: --zzzz is no option of comoe serve (--help lists all)",
        ),
        (
            ["train", "smoke", "--dry-rum"],
            2,
            "--dry-rum is no option of comoe train; did you mean --dry-run?",
        ),
        (["train", "smoke", "--epoch", "3"], 2, "; did you mean train.epochs=..., without dashes?"),
        (["train", "smoke", "--epochs=3"], 2, "; did you mean train.epochs=3, without dashes?"),
        (
            ["tune", "--model.moe.topk", "1"],
            2,
            "; did you mean model.moe.top_k=..., without dashes?",
        ),
        (["select", "--", "--modle"], 2, "error: the following arguments are required: --model"),
        (
            ["export", "--checkpoint", "x", "--output", "y", "-3"],
            2,
            "error: unrecognized arguments: -3",
        ),
    ],
)
def test_what_is_no_command_is_said(
    words: list[str], code: int, said: str, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit) as ended:
        main(words)
    assert ended.value.code == code and said in "".join(capsys.readouterr())


def test_it_runs_as_a_module_in_any_folder(tmp_path: Path) -> None:
    environment = os.environ | {"PYTHONPATH": str(ROOT)}
    command = [sys.executable, "-m", "comoe", "predict", "--help"]
    done = subprocess.run(command, capture_output=True, text=True, cwd=tmp_path, env=environment)
    assert done.returncode == 0 and done.stdout.startswith("usage: comoe predict ")


@pytest.mark.parametrize(
    "config, words, recipe, overrides",
    [
        (None, [], "starter", []),
        (None, ["smoke", "train.epochs=1"], "smoke", ["train.epochs=1"]),
        (None, ["train.epochs=1"], "starter", ["train.epochs=1"]),
        ("my.yaml", ["train.epochs"], "my.yaml", ["train.epochs"]),
    ],
)
def test_the_first_word_without_an_equals_sign_is_the_recipe(
    config: str | None, words: list[str], recipe: str, overrides: list[str]
) -> None:
    given = Namespace(config=config, overrides=list(words))
    take_recipe(given)
    assert (given.config, given.overrides) == (recipe, overrides)


def numbers():
    """(command, option, least) of every option of a command that takes a number."""
    for word in COMMANDS:
        for action in importlib.import_module(f"comoe.commands.{word}").parser()._actions:
            if action.type is not None and action.type is not Path:
                yield word, max(action.option_strings, key=len, default=action.dest), action


NUMBERS = {
    f"{word} {option}": action for word, option, action in numbers() if option != "--local_rank"
}


def test_no_option_takes_a_bare_number():
    assert not [name for name, action in NUMBERS.items() if action.type in (int, float)]
    assert len(NUMBERS) >= 16


@pytest.mark.parametrize(
    "text", ["-1", "-2.5", "nan", "inf", "1e300", "9" * 30, "x", "", "0x10", "١٢", "1_0"]
)
@pytest.mark.parametrize("name", NUMBERS)
def test_a_number_that_means_nothing_is_refused_with_the_option(name, text, capsys):
    word, option = name.split()
    with pytest.raises(SystemExit) as ended:
        main([word, f"{option}={text}"])
    assert ended.value.code == 2
    assert f"argument {option}: {text!r} must be a" in capsys.readouterr().err


@pytest.mark.parametrize("flag", ["gpus", "gpus-per-node", "length", "batch"])
@pytest.mark.parametrize("text", ["0", "0.5", "-1", "1e300", "nan", "x"])
def test_a_plan_takes_whole_numbers_above_0(flag, text):
    with pytest.raises(
        ValueError, match=f"--{flag} holds '{re.escape(text)}', which must be a whole number"
    ):
        plan._count(f"--{flag}", text)


def test_a_model_is_loaded_without_a_look_for_garbage(monkeypatch: pytest.MonkeyPatch) -> None:
    from comoe.inference.predictor import Predictor

    collects: list[bool] = []
    monkeypatch.setattr(
        Predictor, "from_pretrained", lambda *_, **__: collects.append(gc.isenabled())
    )
    load_predictor(Namespace(model="m", device="cpu", no_verify=False, revision=None))
    assert collects == [False] and gc.isenabled()
