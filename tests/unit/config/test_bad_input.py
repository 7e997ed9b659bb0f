"""Bad input: each kind stops with file, line, value and what to do, or is set aside and counted."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest
from helpers_data import labelled_rows, recipe_of, write_jsonl

from comoe.config.recipe import TaskConfig
from comoe.data.corpus import Corpus, load_corpus


def load(root: Path, *, on_error: str = "stop", **options: Any) -> Corpus:
    recipe = recipe_of(root, mood=TaskConfig(path="posts", **options))
    recipe.data.on_error = on_error
    return load_corpus(recipe)


def message(root: Path, **options: Any) -> str:
    with pytest.raises(ValueError) as caught:
        load(root, **options)
    return str(caught.value)


@pytest.fixture
def posts(tmp_path: Path) -> Path:
    """A sound data set; tests spoil it."""
    write_jsonl(tmp_path / "posts" / "train.jsonl", labelled_rows(8))
    write_jsonl(tmp_path / "posts" / "validation.jsonl", labelled_rows(4, start=100))
    return tmp_path


BAD_LINES = {
    "broken JSON": ('{"text": "a", "label": ', "is not valid JSON (Expecting value, column 24)"),
    "not an object": ('["a", "good"]', "is not a JSON object"),
    "unknown label": (
        '{"text": "a", "label": "godo"}',
        "'godo' is not a label; did you mean good?",
    ),
    "empty text": ('{"text": "  ", "label": "good"}', "column text is empty; a post needs text."),
    "no text": ('{"label": "good"}', "column text is empty; a post needs text."),
    "invisible text": ('{"text": "\u200b", "label": "good"}', "column text is empty"),
    "a text that is no text": ('{"text": {"a": 1}, "label": "good"}', "column text holds no text"),
    "NUL character": (
        '{"text": "a\\u0000b", "label": "good"}',
        "column text holds a NUL character",
    ),
    "NUL byte": (
        '{"text": "a\x00b", "label": "good"}',
        "holds a NUL byte; is the file UTF-16, or damaged?",
    ),
    "one megabyte": (
        '{"text": "' + "x" * 1_000_000 + '", "label": "good"}',
        "column text has 1,000,000 characters, more than data.max_characters (100,000); cut it, or raise the limit.",
    ),
    "a list as label": ('{"text": "a", "label": ["good"]}', "is a list"),
    "endless nesting": ('{"text": ' + "[" * 100_000, "is not valid JSON"),
    "endless number": ('{"text": "a", "label": ' + "1" * 5000 + "}", "is not valid JSON"),
}


@pytest.mark.parametrize("what", BAD_LINES)
def test_a_bad_row_stops_with_file_line_value_and_what_to_do(posts: Path, what: str) -> None:
    line, rule = BAD_LINES[what]
    path = write_jsonl(
        posts / "posts" / "train.jsonl", [*labelled_rows(8), line, *labelled_rows(3, start=50)]
    )
    said = message(posts, labels=["bad", "good"])
    assert said.startswith(f"{path}:9: ")
    assert rule in said
    assert "Found: " in said
    assert said.endswith("Correct it, or set data.on_error=skip to leave such rows out.")
    assert len(said) < 1000


@pytest.mark.parametrize("what", BAD_LINES)
def test_a_bad_row_is_set_aside_and_counted_under_skip(posts: Path, what: str) -> None:
    line, rule = BAD_LINES[what]
    path = write_jsonl(
        posts / "posts" / "train.jsonl", [*labelled_rows(8), line, *labelled_rows(3, start=50)]
    )
    corpus = load(posts, on_error="skip", labels=["bad", "good"])
    assert len(corpus.splits["train"]) == 11
    assert [(row.file, row.line) for row in corpus.report.set_aside] == [(str(path), 9)]
    assert rule in corpus.report.set_aside[0].rule
    told = corpus.report.lines()
    assert "set aside: 1 row" in told and not [text for text in told if text.startswith("  row")]
    assert any(text.startswith(f"  {path}:9: ") and rule in text for text in corpus.report.lines())
    assert corpus.splits["train"].origins[8] == f"{path}:10"


def test_the_first_bad_row_is_named_and_the_others_are_counted(posts: Path) -> None:
    rows = [*labelled_rows(8), {"text": "", "label": "good"}, "{", {"text": "a", "label": "ugly"}]
    write_jsonl(posts / "posts" / "train.jsonl", rows)
    said = message(posts, labels=["bad", "good"])
    assert ":9: column text is empty" in said
    assert said.endswith("(2 more bad rows in this file.)")


def test_where_most_rows_are_bad_the_recipe_is_to_blame_and_skipping_is_no_remedy(
    posts: Path,
) -> None:
    rows = [*labelled_rows(8), *({"text": f"post {i}", "label": "ugly"} for i in range(11))]
    write_jsonl(posts / "posts" / "train.jsonl", rows)
    said = message(posts, labels=["bad", "good"])
    assert "'ugly'" in said and "11 of 19 rows of this file are bad, so correct the recipe" in said
    assert "Correct it, or set" not in said


def test_invalid_utf8_names_file_line_and_byte(posts: Path) -> None:
    path = posts / "posts" / "train.jsonl"
    path.write_bytes(path.read_bytes() + b'{"text": "caf\xe9", "label": "good"}\n')
    assert (
        f"{path}:9: is not valid UTF-8 (byte 14 of the line); save the file as UTF-8."
        in message(posts)
    )
    assert load(posts, on_error="skip").report.set_aside[0].line == 9


def test_a_line_separator_inside_a_post_leaves_it_whole(posts: Path) -> None:
    rows = [*labelled_rows(8), {"text": "one\u2028two\u2029three\x85four", "label": "good"}]
    write_jsonl(posts / "posts" / "train.jsonl", rows)
    corpus = load(posts)
    assert len(corpus.splits["train"]) == 9
    assert corpus.splits["train"].texts[8] == "one\u2028two\u2029three\x85four"
    assert corpus.report.set_aside == []


@pytest.mark.parametrize("on_error", ["stop", "skip"])
def test_a_wrong_column_lists_the_right_ones(posts: Path, on_error: str) -> None:
    said = message(posts, label="lable", on_error=on_error)
    assert "tasks.mood.label is 'lable', but" in said and "train.jsonl has no such column" in said
    assert "did you mean label? (columns: text, label)" in said
    assert "tasks.mood.text is 'tweet'" in message(posts, text="tweet", on_error=on_error)
    assert "tasks.mood.pair is 'target'" in message(posts, pair="target", on_error=on_error)
    assert "tasks.mood.confidence is 'c'" in message(posts, confidence="c", on_error=on_error)


def test_a_label_seen_only_in_validation_names_its_line_and_the_known_ones(posts: Path) -> None:
    path = write_jsonl(
        posts / "posts" / "validation.jsonl",
        [{"text": "a", "label": "good"}, {"text": "b", "label": "meh"}],
    )
    said = message(posts)
    assert said.startswith(
        f"{path}:2: task mood, column label: 'meh' is not a label (one of: bad, good)."
    )
    assert "Labels come from the training split, unless tasks.mood.labels lists them." in said
    assert load(posts, on_error="skip").report.posts["posts"] == {"train": 8, "validation": 1}
    corpus = load(posts, labels=["bad", "good", "meh"])
    assert "task mood: no training post has the label meh" in corpus.report.warnings


@pytest.mark.parametrize("on_error", ["stop", "skip"])
def test_text_and_label_files_of_different_length_stop(tmp_path: Path, on_error: str) -> None:
    folder = tmp_path / "posts"
    folder.mkdir()
    (folder / "train_text.txt").write_text("a\nb\nc\n")
    (folder / "train_labels.txt").write_text("0\n1\n")
    said = message(tmp_path, on_error=on_error)
    assert "train_text.txt has 3 lines" in said and "train_labels.txt has 2;" in said


def test_a_label_that_mapping_does_not_know_names_the_label_file(tmp_path: Path) -> None:
    folder = tmp_path / "posts"
    folder.mkdir()
    (folder / "train_text.txt").write_text("a\nb\nc\n")
    (folder / "train_labels.txt").write_text("0\n7\n1\n")
    (folder / "mapping.txt").write_text("0\tno\n1\tyes\n")
    said = message(tmp_path)
    assert said.startswith(
        f"{folder / 'train_labels.txt'}:2: is not an id of mapping.txt (0 no, 1 yes). Found: '7'"
    )
    (folder / "mapping.txt").write_text("0 no\n1 yes\n")
    assert "must hold one line per label: its id from 0, a tab, its name" in message(tmp_path)


@pytest.mark.parametrize("on_error", ["stop", "skip"])
@pytest.mark.parametrize("name", ["train", "validation"])
def test_an_empty_data_set_stops(posts: Path, on_error: str, name: str) -> None:
    path = write_jsonl(posts / "posts" / f"{name}.jsonl", [])
    assert f"{path} holds no posts; give tasks.mood a file with posts" in message(
        posts, on_error=on_error
    )


def test_a_file_of_which_every_row_is_bad_stops_under_skip(posts: Path) -> None:
    write_jsonl(
        posts / "posts" / "train.jsonl",
        [{"text": "", "label": "good"}, {"text": " ", "label": "bad"}],
    )
    said = message(posts, on_error="skip")
    assert "has no usable post: all 2 rows are bad. The first: " in said
    assert "train.jsonl:1:" in said


def test_one_class_only_stops_with_what_to_do(posts: Path) -> None:
    write_jsonl(posts / "posts" / "train.jsonl", labelled_rows(8, labels=["good"]))
    write_jsonl(posts / "posts" / "validation.jsonl", labelled_rows(4, labels=["good"], start=100))
    assert "tasks.mood is a single_label task with 1 label(s): good; it needs" in message(posts)
    said = message(posts, labels=["bad", "good"])
    assert (
        "tasks.mood: all 8 training labels are the same (good), so there is nothing to learn"
        in said
    )
    assert "raise data.limit_per_task" in said


def test_numbers_that_are_all_the_same_stop(posts: Path) -> None:
    for name in ("train", "validation"):
        write_jsonl(
            posts / "posts" / f"{name}.jsonl",
            [{"text": f"{name} {i}", "label": 2.5} for i in range(4)],
        )
    assert "tasks.mood: all 4 training labels are the same (2.5)" in message(
        posts, kind="regression"
    )


def test_a_task_without_data_stops(posts: Path) -> None:
    rows = [
        {"text": f"post {i}", "label": "good" if i % 2 else "bad", "topic": ""} for i in range(8)
    ]
    for name in ("train", "validation"):
        write_jsonl(posts / "posts" / f"{name}.jsonl", rows)
    assert "has a label of any task; check the columns (tasks.mood.label=topic)" in message(
        posts, label="topic"
    )
    recipe = recipe_of(
        posts, mood=TaskConfig(path="posts"), topic=TaskConfig(path="posts", label="topic")
    )
    with pytest.raises(
        ValueError, match="tasks.topic: no training post has a label in column 'topic'"
    ):
        load_corpus(recipe)


def test_a_missing_folder_or_file_says_what_was_looked_for(posts: Path) -> None:
    recipe = recipe_of(posts, mood=TaskConfig(path="psots"))
    with pytest.raises(
        ValueError, match=r"tasks.mood.path \(psots\): there is no file or folder .*psots"
    ):
        load_corpus(recipe)
    recipe = recipe_of(posts / "nowhere", mood=TaskConfig(path="posts"))
    with pytest.raises(ValueError, match=r"data.root \(.*nowhere\): there is no such folder"):
        load_corpus(recipe)
    (posts / "posts" / "train.jsonl").rename(posts / "posts" / "learn.jsonl")
    said = message(posts)
    assert "no train file in" in said and "train_text.txt, train.jsonl" in said
    assert "there is learn.jsonl, validation.jsonl. Name it in tasks.mood.splits.train." in said
    assert len(load(posts, splits={"train": "learn.jsonl"}).splits["train"]) == 8
    said = message(posts, splits={"train": "learn.jsonl", "test": "tset.jsonl"})
    assert "no test file in" in said and "looked for tset.jsonl" in said


CSV_ROWS = {
    "too many cells": ("a, b,good", "has 3 cells for 2 columns"),
    "too few cells": ("a", "has 1 cells for 2 columns"),
    "a stray quote": ('"a" b,good', "is not valid CSV"),
    "a quote that never ends": ('"a,good', "is not valid CSV (unexpected end of data)"),
}


@pytest.mark.parametrize("what", CSV_ROWS)
def test_a_bad_csv_row_names_its_line(tmp_path: Path, what: str) -> None:
    line, rule = CSV_ROWS[what]
    path = tmp_path / "posts.csv"
    path.write_text("text,label\nx one,bad\nx two,good\nx three,bad\nx four,good\n" + line + "\n")
    recipe = recipe_of(tmp_path, mood=TaskConfig(path="posts.csv"))
    recipe.data.validation_fraction = 0.5
    with pytest.raises(ValueError, match=re.escape(f"{path}:6: {rule}")):
        load_corpus(recipe)
    recipe.data.on_error = "skip"
    report = load_corpus(recipe).report
    assert sum(report.posts["posts"].values()) == 4
    assert [row.line for row in report.set_aside] == [6]


def test_a_csv_text_of_one_megabyte_is_told_by_its_length(tmp_path: Path) -> None:
    (tmp_path / "posts.csv").write_text("text,label\na,bad\n" + "x" * 1_000_000 + ",good\n")
    with pytest.raises(ValueError, match="posts.csv:3: column text has 1,000,000 characters"):
        load_corpus(recipe_of(tmp_path, mood=TaskConfig(path="posts.csv")))


def test_two_columns_of_one_name_and_a_damaged_first_line_stop(tmp_path: Path) -> None:
    recipe = recipe_of(tmp_path, mood=TaskConfig(path="posts.csv"))
    (tmp_path / "posts.csv").write_text("text,label,text\na,bad,b\n")
    with pytest.raises(ValueError, match="posts.csv:1: two columns have the same name"):
        load_corpus(recipe)
    (tmp_path / "posts.csv").write_bytes(b"text,l\xe9bel\na,bad\n")
    with pytest.raises(
        ValueError, match="posts.csv:1: is not valid UTF-8 .* the line that names the columns"
    ):
        load_corpus(recipe)


def test_another_separator_is_told(tmp_path: Path) -> None:
    recipe = recipe_of(tmp_path, mood=TaskConfig(path="posts.csv"))
    (tmp_path / "posts.csv").write_text("text;label\na, b;bad\n")
    with pytest.raises(
        ValueError, match='posts.csv:1: its columns are separated by ";" and not by ","'
    ):
        load_corpus(recipe)
    recipe = recipe_of(tmp_path, mood=TaskConfig(path="posts.tsv"))
    (tmp_path / "posts.tsv").write_text("text;label\na;bad\n")
    with pytest.raises(ValueError, match=r'separated by ";" and not by "\\t"'):
        load_corpus(recipe)


def test_a_file_that_is_no_parquet_stops(tmp_path: Path) -> None:
    (tmp_path / "posts.parquet").write_text("not parquet")
    with pytest.raises(ValueError, match="posts.parquet cannot be read as Parquet"):
        load_corpus(recipe_of(tmp_path, mood=TaskConfig(path="posts.parquet")))


@pytest.mark.parametrize("value", ["high", 1.5, -0.1, True])
def test_a_confidence_outside_0_to_1_is_a_bad_row(posts: Path, value: object) -> None:
    rows = [row | {"c": 0.5} for row in labelled_rows(8)] + [
        {"text": "a", "label": "good", "c": value}
    ]
    write_jsonl(posts / "posts" / "train.jsonl", rows)
    assert ":9: task mood: the confidence must be a number from 0 to 1." in message(
        posts, confidence="c"
    )


def test_another_number_of_tags_than_of_words_is_a_bad_row(tmp_path: Path) -> None:
    rows = [
        {"tokens": ["a", "b"], "label": ["O", "B-x"]},
        {"tokens": ["a", "b", "c"], "label": ["O", "B-x"]},
    ]
    write_jsonl(tmp_path / "posts" / "train.jsonl", rows)
    assert ":2: task mood, column label: 2 tags for 3 words; give one tag per word." in message(
        tmp_path, kind="tags", text="tokens"
    )
