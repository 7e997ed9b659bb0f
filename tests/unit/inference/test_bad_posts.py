"""Rows that cannot be read, in every format: each is set aside by itself, with its line, the reason and the remedy."""

from __future__ import annotations

import json
import os
import re
from pathlib import Path

import pytest
from helpers_export import tiny_predictor

from comoe.commands.predict import main
from comoe.config.recipe import TaskConfig
from comoe.data.reading.rows import RowReader, read_rows
from comoe.data.reading.sources import read_input
from comoe.inference.options import PredictOptions
from comoe.inference.predict_file import predict_file
from comoe.inference.predictor import Predictor

GOOD = b'{"text": "good"}\n'
BAD = {
    "NaN": (".jsonl", GOOD + b'{"text": "a", "n": NaN}\n' + GOOD, {2: "NaN is no number of JSON.*write null"}),
    "infinity": (".jsonl", GOOD + b'{"n": -Infinity}\n', {2: "-Infinity is no number"}),
    "a number beyond floats": (".jsonl", GOOD + b'{"text": "a", "n": 1e999}\n', {2: "1e999 is no number"}),
    "a key twice": (".jsonl", GOOD + b'{"text": "a", "text": "b"}\n' + GOOD, {2: "'text' is there twice; keep one"}),
    "a key twice, inside": (".jsonl", b'{"text": "a", "b": {"c": 1, "c": 1}}\n' + GOOD, {1: "'c' is there twice"}),
    "an object as text": (".jsonl", b'{"text": {"a": 1}}\n' + GOOD, {1: "no text|must be text"}),
    "half a line": (".jsonl", b'{"text": "go\n' + GOOD, {1: "not valid JSON"}),
    "no UTF-8": (".txt", b"good\nbro\xffken\nbad\n", {2: "not valid UTF-8 .byte 4 of the line.; save"}),
    "UTF-16 without a mark": (".txt", b"g\0o\0\nb\0\n", {1: "NUL byte; is the file UTF-16", 2: "NUL"}),
    "a quote that is not closed": (".csv", b'id,text\n1,"good\n2,bad\n3,day\n', {2: "not valid CSV .unexpected end"}),
    "two of them": (".csv", b'id,text\n1,"good\n2,bad\n3,"day\n4,rain\n', {2: "quotes", 4: "quotes"}),
    "too many cells": (".csv", b"id,text\n1,good,bad\n2,day\n", {2: "3 cells for 2 columns"}),
}  # fmt: skip
"""What is wrong -> ending, content, line -> message."""


@pytest.fixture(scope="module")
def predictor(tmp_path_factory: pytest.TempPathFactory) -> Predictor:
    return tiny_predictor(tmp_path_factory.mktemp("model"))


def written(tmp_path: Path, ending: str, content: bytes) -> Path:
    path = tmp_path / f"posts{ending}"
    path.write_bytes(content)
    return path


@pytest.mark.parametrize("what", BAD)
def test_a_bad_row_is_set_aside_alone_in_training_and_in_prediction(
    what: str, predictor: Predictor, tmp_path: Path
) -> None:
    ending, content, wanted = BAD[what]
    source = written(tmp_path, ending, content)
    reader = RowReader({"t": TaskConfig(path="x")}, {"t": ()}, max_characters=99)
    posts = list(read_rows(read_input("x", str(source)), reader.read))
    assert {post.line for post in posts if post.error} == set(wanted)
    target = tmp_path / "out.jsonl"
    try:
        predict_file(predictor, source, target)
    except ValueError as error:
        assert "none of the" in str(error) and len(wanted) == len(posts)
        return
    rows = [json.loads(line, parse_constant=pytest.fail) for line in target.open()]
    assert len(rows) == len(posts)
    for post, row in zip(posts, rows, strict=True):
        assert ("error" in row) == (post.line in wanted) != ("mood" in row)
        for told in (str(post.error), row["error"]) if post.error else ():
            assert re.search(wanted[post.line], told)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("good\nbad\n".encode("utf-16"), "is UTF-16; save it as UTF-8"),
        (b"\xfe\xff" + "good".encode("utf-16-be"), "is UTF-16"),
        (b"good\rbad\rday\r", "carriage return alone; save it with line feeds"),
    ],
)
@pytest.mark.parametrize("ending", [".txt", ".csv", ".tsv", ".jsonl"])
def test_a_file_of_another_encoding_is_refused_as_a_whole(
    ending: str, content: bytes, message: str, predictor: Predictor, tmp_path: Path
) -> None:
    with pytest.raises(ValueError, match=message):
        predict_file(predictor, written(tmp_path, ending, content), tmp_path / "out")
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("label", ['{"a": 1}', '[{"a": 1}]', "[[1]]"])
@pytest.mark.parametrize("kind", ["single_label", "multi_label", "tags"])
def test_a_label_that_is_an_object_makes_its_row_a_bad_one(
    kind: str, label: str, tmp_path: Path
) -> None:
    rows = f'{{"text": ["a"], "label": {label}}}\n'.encode()
    raw = read_input("x", str(written(tmp_path, ".jsonl", rows)))
    config = {"t": TaskConfig(path="x", kind=kind)}
    (post,) = read_rows(raw, RowReader(config, {"t": ("a", "b")}, max_characters=99).read)
    assert post.error.line == 1 and "column label" in post.error.rule


@pytest.mark.parametrize("number", ["1e39", "-1e300", "1" + "0" * 400, '"9e99"'])
def test_a_number_that_float32_does_not_hold_makes_its_row_a_bad_one(
    number: str, tmp_path: Path
) -> None:
    rows = f'{{"text": "a", "label": {number}}}\n{{"text": "a", "label": 1e38}}\n'.encode()
    raw = read_input("x", str(written(tmp_path, ".jsonl", rows)))
    reader = RowReader({"t": TaskConfig(path="x", kind="regression")}, {"t": ()}, max_characters=99)
    bad, good = read_rows(raw, reader.read)
    assert "is not a finite number of float32" in bad.error.rule and good.labels["t"] == 1e38


@pytest.mark.parametrize("format", ["jsonl", "csv"])
def test_half_a_surrogate_pair_is_predicted_as_it_is_trained_on(
    format: str, predictor: Predictor, tmp_path: Path
) -> None:
    content = b'{"id": "\\ud800", "text": "good \\udfff"}\n' + GOOD
    target = tmp_path / "out"
    source = written(tmp_path, ".jsonl", content)
    said = str(predict_file(predictor, source, target, PredictOptions(format=format)))
    assert said.startswith("2 posts predicted") and "error instead" not in said
    if format == "jsonl":
        first, _ = map(json.loads, target.open(encoding="utf-8"))
        assert first["mood"] == predictor(["good \ufffd"])[0]["mood"]
    else:
        assert "\ufffd,good \ufffd," in target.read_text(encoding="utf-8")


def test_rows_of_several_lines_are_counted_and_told(
    predictor: Predictor, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    source = written(tmp_path, ".csv", b'id,text\n1,"good\nday"\n2,"bad\n3,rain"\n')
    predict_file(predictor, source, tmp_path / "out")
    told = capsys.readouterr().err
    assert "2 rows take several lines" in told and "the first one lines 2 to 3" in told


def test_scores_that_are_not_finite_are_an_error_and_never_written(
    predictor: Predictor, tmp_path: Path
) -> None:
    (head, *_), name = predictor.exported.model.heads, predictor.tasks[0].name
    before = {key: value.clone() for key, value in head.state_dict().items()}
    for weight in head.parameters():
        weight.data.fill_(float("nan"))
    try:
        (row,) = predictor(["good"])
        assert row["error"] == f"the scores of {name} are not finite: the model has diverged"
        assert name not in row
    finally:
        head.load_state_dict(before)


WORDS = [
    "good day",
    "bad rain",
    "the sunny paris",
    "@ann http://x.yz",
    "sun, sun!",
    "rain \U0001f600",
]
SPOILED = {
    "half a line": lambda row: json.dumps(row)[:-5],
    "NaN": lambda row: json.dumps(row | {"x": float("nan")}),
    "a key twice": lambda row: json.dumps(row)[:-1] + ', "text": "b"}',
    "no object": lambda row: json.dumps([row]),
    "no text": lambda row: json.dumps({"id": row["id"]}),
    "an empty text": lambda row: json.dumps(row | {"text": " \u200b"}),
    "an object as text": lambda row: json.dumps(row | {"text": {"a": 1}}),
    "a word that is a number": lambda row: json.dumps(row | {"text": ["a", 1]}),
    "a NUL": lambda row: json.dumps(row).replace("text", "te\0xt"),
    "nested without end": lambda row: "[" * 100_000,
    "no UTF-8": lambda row: json.dumps(row).replace('"text', '\udcff"text'),
}  # fmt: skip
LINES = int(os.environ.get("COMOE_LINES", "600"))


def test_of_a_long_file_with_every_tenth_row_bad_all_others_are_predicted_in_order(
    predictor, tmp_path, monkeypatch, capsys
):
    source, target, ways = tmp_path / "posts.jsonl", tmp_path / "out.jsonl", list(SPOILED.values())
    rows = [{"id": number, "text": WORDS[number % len(WORDS)]} for number in range(LINES)]
    lines = [
        ways[row["id"] // 10 % len(ways)](row) if row["id"] % 10 == 7 else json.dumps(row)
        for row in rows
    ]
    text = "".join(f"{line}\n" for line in lines)
    source.write_bytes(text.encode("utf-8", errors="surrogateescape"))
    monkeypatch.setattr(Predictor, "from_pretrained", lambda *_, **__: predictor)
    main(["--model", "m", "--input", str(source), "--output", str(target)])
    alone = {text: predictor([text])[0] for text in WORDS}
    found = [json.loads(line, parse_constant=pytest.fail) for line in target.open(encoding="utf-8")]
    assert len(found) == LINES
    bad = [number for number, row in enumerate(found) if "error" in row]
    assert bad == [number for number in range(LINES) if number % 10 == 7]
    for number, row in enumerate(found):
        if "error" not in row:
            assert row["id"] == number and row["text"] == rows[number]["text"]
            wanted = alone[row["text"]]["mood"]
            assert row["mood"]["label"] == wanted["label"]
            assert row["mood"]["scores"] == pytest.approx(wanted["scores"], abs=1e-4)
    said = capsys.readouterr().err
    assert f"{LINES} posts predicted" in said and f"{len(bad)} of them could not be" in said
