"""``launch/predict.py`` and ``launch/eval.py`` on what a run exported."""

import csv
import json
import shutil
from pathlib import Path

import pytest

from tests.end_to_end.commands import Terminal, read_lines

pytestmark = pytest.mark.end_to_end

MOODS = ("negative", "neutral", "positive")
# Each is one line: an empty one, one of blanks, and signs that end a line elsewhere but not in a
# file of posts.
LINES = (
    "what a lovely salad", "", "  ", "bread\u2028and song", "a\x85b", "\u5929\u6c14 \U0001f600 @user http://a.b",
    "x " * 300, "last",
)  # fmt: skip


def predict(terminal: Terminal, run: Path, source: Path, target: Path, *words: str) -> str:
    done = terminal.here(
        "launch/predict.py", "--model", run / "export", "--input", source, "--output", target, *words
    )  # fmt: skip
    assert done.code == 0, done.said
    return done.said


@pytest.fixture
def posts(tmp_path) -> Path:
    path = tmp_path / "posts.txt"
    path.write_bytes("".join(f"{line}\n" for line in LINES).encode())
    return path


def test_tweeteval_answers_are_one_label_id_per_line(smoke_run, terminal, posts, tmp_path):
    target = tmp_path / "answers" / "mood.txt"
    said = predict(
        terminal, smoke_run.folder, posts, target, "--format", "tweeteval", "--task", "mood"
    )
    lines = target.read_bytes().decode("ascii").split("\n")
    assert lines.pop() == "" and len(lines) == len(LINES)
    assert set(lines) <= {"0", "1", "2"}
    assert "2 lines without a text were predicted as" in said
    assert f"{len(LINES)} posts predicted" in said


def test_jsonl_and_csv_hold_the_same_answers(smoke_run, terminal, posts, tmp_path):
    tasks = ("--task", "mood", "--task", "strength")
    predict(terminal, smoke_run.folder, posts, tmp_path / "a.jsonl", *tasks, "--explain")
    predict(terminal, smoke_run.folder, posts, tmp_path / "a.csv", *tasks, "--format", "csv")
    answers = read_lines(tmp_path / "a.jsonl")
    with (tmp_path / "a.csv").open(encoding="utf-8", newline="") as file:
        table = list(csv.DictReader(file))
    assert [answer["text"] for answer in answers] == [row["text"] for row in table] == list(LINES)
    assert [number for number, answer in enumerate(answers) if "error" in answer] == [1, 2]
    for answer, row in zip(answers, table, strict=True):
        if "error" in answer:
            assert row["error"] == answer["error"] and row["mood"] == ""
            continue
        scores = answer["mood"]["scores"]
        assert tuple(scores) == MOODS and sum(scores.values()) == pytest.approx(1, abs=1e-5)
        assert answer["mood"]["label"] == max(scores, key=scores.get) == row["mood"]
        assert float(row["mood/positive"]) == scores["positive"]
        assert float(row["strength"]) == answer["strength"]["value"]
    assert "attention" in json.dumps(answers[0]), "--explain adds the weight of each word"


def test_eval_measures_what_the_run_measured(smoke_run, terminal, home, tmp_path):
    data = home / "smoke-1" / "posts" / "stance" / "test.jsonl"
    done = terminal.here(
        "launch/eval.py", "--model", smoke_run.folder / "export", "--data", data, "--task", "stance",
        "--label-column", "stance", "--pair-column", "target", "--output", tmp_path / "scores.json",
    )  # fmt: skip
    assert done.code == 0 and "stance" in done.out, done.said
    measured = json.loads((tmp_path / "scores.json").read_text(encoding="utf-8"))["stance"]
    told = json.loads((smoke_run.folder / "results.json").read_text(encoding="utf-8"))
    before, after = told["calibration"]["stance"]["ece"]["test"].values()
    assert measured.pop("ece") == pytest.approx(before if after is None else after, abs=1e-5)
    assert measured == pytest.approx(told["metrics"]["test"]["stance"], rel=1e-5, abs=1e-6)


def test_a_file_that_is_not_there_is_one_sentence(smoke_run, terminal, tmp_path):
    missing, model = tmp_path / "none.txt", smoke_run.folder / "export"
    done = terminal.here(
        "launch/predict.py", "--model", model, "--input", missing, "--output", tmp_path / "x",
    )  # fmt: skip
    assert (done.code, done.err) == (
        2,
        f"comoe predict: --input {missing}: there is no such file.\n",
    )


def test_an_export_that_was_changed_does_not_answer(smoke_run, terminal, posts, tmp_path):
    model, target = (
        shutil.copytree(smoke_run.folder / "export", tmp_path / "export"),
        tmp_path / "x",
    )
    content = bytearray((model / "model.safetensors").read_bytes())
    content[-1] ^= 1
    (model / "model.safetensors").write_bytes(content)
    done = terminal.here(
        "launch/predict.py", "--model", model, "--input", posts, "--output", target,
    )  # fmt: skip
    assert done.code == 2 and not target.exists(), done.said
    assert done.err.startswith(f"comoe predict: {model}: model.safetensors was changed after")
