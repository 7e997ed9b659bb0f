"""Files of posts, damaged in any way: every row is predicted or set aside, in order, and nothing else happens."""

import csv
import io
import json
import tempfile
from pathlib import Path
from unittest.mock import patch

import pytest
from helpers_export import tiny_predictor
from hypothesis import example, given
from hypothesis import strategies as st

from comoe.commands.predict import main
from comoe.config.recipe import TaskConfig
from comoe.data.reading.rows import RowReader, read_rows
from comoe.data.reading.sources import read_input
from comoe.data.reading.stream import open_stream
from comoe.inference.predictor import Predictor
from comoe.tasks.kinds.registry import KINDS
from tests.unit.fuzz.mutations import VALUES, damaged, files_below, fuzz, run_main

LINES = [
    {"id": 1, "text": "good day", "label": "good"},
    {"id": 2, "text": ["the", "sun"], "label": ["O", "O"]},
    {"id": 3, "text": "bad \U0001f600 #rain @ann http://x.yz", "pair": "paris", "label": 0.5},
]
CELLS = [
    ["id", "text", "label"],
    ["1", "good day", "good"],
    ["2", 'a "quoted", one', "bad"],
    ["3", "two\nlines", "bad"],
]


def jsonl(rows: list) -> bytes:
    return "".join(json.dumps(row) + "\n" for row in rows).encode()


def table(rows: list, delimiter: str) -> bytes:
    buffer = io.StringIO()
    csv.writer(buffer, delimiter=delimiter, lineterminator="\n").writerows(rows)
    return buffer.getvalue().encode()


CONTENTS = {
    ".jsonl": jsonl(LINES),
    ".csv": table(CELLS, ","),
    ".tsv": b"id\ttext\tlabel\n1\tgood day\tgood\n2\tbad\tbad\n",
    ".txt": "good day\nbad\n\nthe \U0001f600 sun\n".encode(),
}


@st.composite
def post_files(draw) -> tuple[str, bytes]:
    """Ending and content."""
    ending = draw(st.sampled_from(list(CONTENTS)))
    if ending == ".jsonl" and draw(st.booleans()):
        rows = [dict(row) for row in LINES]
        for _ in range(draw(st.integers(1, 3))):
            row = draw(st.sampled_from(rows))
            row[draw(st.sampled_from(["id", "text", "pair", "label", "x"]))] = draw(VALUES)
        return ending, jsonl(rows)
    return ending, draw(damaged([CONTENTS[ending]]))


@pytest.fixture(scope="module")
def predictor(tmp_path_factory: pytest.TempPathFactory) -> Predictor:
    return tiny_predictor(tmp_path_factory.mktemp("model"))


def rows_of(path: Path) -> int:
    """Rows that a file of posts has, readable or not."""
    return open_stream(str(path)).total


@fuzz(60)
@given(file=post_files(), format=st.sampled_from(["jsonl", "csv"]))
@example(file=(".csv", b'id,text\n1,"a\n'), format="jsonl")
def test_prediction(file, format, predictor):
    ending, content = file
    with tempfile.TemporaryDirectory() as place:
        folder = Path(place)
        source, target = folder / f"posts{ending}", folder / "out"
        source.write_bytes(content)
        words = [
            "--model",
            "m",
            "--input",
            str(source),
            "--output",
            str(target),
            "--format",
            format,
        ]
        with patch.object(Predictor, "from_pretrained", return_value=predictor):
            code, _, said = run_main(main, words)
        assert source.read_bytes() == content
        assert files_below(folder) <= {source.name, target.name}
        if code:
            assert code == 2 and "comoe predict: " in said, said
            return
        text = target.read_text(encoding="utf-8")
        if format == "jsonl":
            found = [json.loads(line, parse_constant=pytest.fail) for line in text.splitlines(True)]
            assert text.count("\n") == len(found)
        else:
            found = list(csv.DictReader(io.StringIO(text, newline="")))
        assert len(found) == rows_of(source)
        for row in found:
            assert bool(row.get("error")) != bool(row.get("mood")), row


@fuzz(60)
@given(file=post_files(), kind=st.sampled_from(sorted(KINDS)))
def test_reading_for_training(file, kind):
    ending, content = file
    with tempfile.TemporaryDirectory() as place:
        source = Path(place) / f"posts{ending}"
        source.write_bytes(content)
        config = {"t": TaskConfig(path="x", kind=kind)}
        try:
            raw = read_input("x", str(source))
            posts = list(
                read_rows(raw, RowReader(config, {"t": ("good", "bad")}, max_characters=99).read)
            )
        except ValueError as error:
            assert "\n" not in str(error) or source.name in str(error)
            return
        assert len(posts) == len(raw.rows) + len(raw.bad)
        assert [post.line for post in posts] == sorted(post.line for post in posts)
