"""``comoe init``: columns are guessed, named or asked for, and the recipe that is written reads the posts."""

from __future__ import annotations

import csv
from pathlib import Path

import pytest

from comoe.commands.init import main
from comoe.config.load import load_recipe


@pytest.fixture
def posts(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "data").mkdir()
    path = tmp_path / "data/my posts.csv"
    with path.open("w", newline="") as file:
        table = csv.writer(file)
        table.writerow(["id", "tweet", "the mood", "heat"])
        for number in range(60):
            text = f"post number {number}, long enough to be the text"
            table.writerow([number, text, ("bad", "good")[number % 2], number / 7])
    return path


def test_what_is_not_said_is_guessed_and_the_label_counts_are_shown(posts, capsys):
    main([str(posts)])
    recipe = load_recipe("my posts.yaml")
    assert list(recipe.tasks) == ["the_mood"]
    task = recipe.tasks["the_mood"]
    assert (task.path, task.text, task.label) == ("data/my posts.csv", "tweet", "the mood")
    assert task.kind == "single_label" and recipe.model.encoder == "kit:minilm"
    shown = capsys.readouterr().out
    assert "task the_mood, train: bad 27, good 27" in shown
    assert "train  comoe train 'my posts.yaml'" in shown


def test_flags_choose_and_many_numbers_are_regression(posts: Path) -> None:
    words = "--label heat --encoder smoke:encoder --language de --output my.yaml"
    main([str(posts), *words.split()])
    recipe = load_recipe("my.yaml")
    assert recipe.tasks["heat"].kind == "regression"
    assert (recipe.model.encoder, recipe.data.normalize.language) == ("smoke:encoder", "de")


def test_a_terminal_is_asked(posts: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    answers = iter(["", "the mood,heat", "", "smoke:encoder", "asked.yaml"])
    asked: list[str] = []

    def answer(question: str) -> str:
        asked.append(question)
        return next(answers)

    monkeypatch.setattr("builtins.input", answer)
    monkeypatch.setattr("sys.stdin.isatty", lambda: True, raising=False)
    main([str(posts)])
    assert asked[:2] == [
        "column with the post [tweet]: ",
        "columns with labels, with commas [the mood]: ",
    ]
    assert list(load_recipe("asked.yaml").tasks) == ["the_mood", "heat"]


@pytest.mark.parametrize(
    "words, said",
    [
        (["--label", "mod"], "no column 'mod'; there is id, tweet, the mood, heat. Name one with"),
        (
            ["--label", "id", "--text", "id", "--output", "taken.yaml"],
            "taken.yaml is there already",
        ),
    ],
)
def test_mistakes_are_one_sentence_and_leave_no_recipe(words, said, posts, capsys):
    Path("taken.yaml").write_text("mine")
    with pytest.raises(SystemExit):
        main([str(posts), *words])
    assert capsys.readouterr().err.startswith(f"comoe init: {said}")
    assert [path.name for path in Path().glob("*.yaml")] == ["taken.yaml"]
    assert Path("taken.yaml").read_text() == "mine"


def test_posts_that_cannot_be_learned_from_leave_no_recipe(posts, capsys):
    posts.write_text("text,label\n" + "a,same\n" * 20)
    with pytest.raises(SystemExit):
        main([str(posts), "--label", "label"])
    assert capsys.readouterr().err.startswith("comoe init: tasks.label")
    assert list(Path().glob("*.yaml")) == []


def test_a_file_that_is_not_there_is_named(capsys):
    with pytest.raises(SystemExit):
        main(["none.csv"])
    assert capsys.readouterr().err == "comoe init: none.csv: there is no such file or folder.\n"
