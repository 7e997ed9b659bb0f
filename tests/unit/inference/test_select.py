"""Which posts are chosen to be labeled, and the folder that Label Studio reads; and back into a recipe."""

from __future__ import annotations

import csv
import gzip
import json
import math
from xml.etree import ElementTree

import numpy as np
import pytest

from comoe.data.posts import Post
from comoe.data.reading.files import csv_rows, read_whole
from comoe.data.reading.label_studio import read_label_studio
from comoe.inference.options import PredictOptions
from comoe.inference.predict_file import predict_file
from comoe.inference.select import Selector, entropies, margins, unlike, unsureness
from comoe.inference.select_file import select_file
from tests.helpers_export import tiny_predictor
from tests.helpers_model import HEAT, MOOD, SIGNS, WORDS


@pytest.fixture(scope="module")
def predictor(tmp_path_factory):
    return tiny_predictor(tmp_path_factory.mktemp("select"))


TEXTS = [
    " ".join(words) for words in (["good"] * n + ["bad"] * (n % 3) + ["sun"] for n in range(12))
]


def test_unsureness_by_hand():
    scores_NY = np.array([[0.5, 0.3, 0.2], [1 / 3, 1 / 3, 1 / 3], [1.0, 0.0, 0.0]])
    np.testing.assert_allclose(margins(scores_NY), [0.8, 1, 0])
    entropy = -sum(p * math.log(p) for p in (0.5, 0.3, 0.2)) / math.log(3)
    np.testing.assert_allclose(entropies(scores_NY), [entropy, 1, 0], atol=1e-12)
    mood = {"label": "a", "scores": dict(zip("abc", scores_NY[0], strict=True))}
    signs = {"labels": [], "scores": {"joy": 0.4, "fear": 0.1}}
    binary = [-(p * math.log(p) + (1 - p) * math.log(1 - p)) / math.log(2) for p in (0.4, 0.1)]
    assert unsureness(mood, MOOD, "margin") == pytest.approx(0.8)
    assert unsureness(signs, SIGNS, "margin") == pytest.approx(0.8)
    assert unsureness(signs, SIGNS, "entropy") == pytest.approx(np.mean(binary))
    assert unsureness({"tags": ["O", "O"], "scores": [0.9, 0.6]}, WORDS, "margin") == pytest.approx(
        0.4
    )
    assert unsureness({"value": 1.0}, HEAT, "margin") is None


def test_unlike_posts_are_one_of_each_cluster():
    generator = np.random.default_rng(0)
    centers = np.repeat(np.eye(4) * 10, 5, axis=0)
    vectors_NM = centers + generator.normal(size=(20, 4)) * 0.1
    rows = unlike(vectors_NM, np.ones(20), 4, seed=0)
    assert sorted(row // 5 for row in rows.tolist()) == [0, 1, 2, 3]
    assert len(set(unlike(np.ones((6, 2)), np.arange(6.0), 4, seed=0).tolist())) == 4


@pytest.mark.parametrize("strategy", ["margin", "entropy", "diverse", "random"])
def test_the_stream_gives_what_the_whole_list_gives(predictor, strategy):
    posts = [Post(text) for text in [*TEXTS, TEXTS[3], "GOOD  good bad sun", " "]]
    selector = Selector(predictor, strategy=strategy, tasks=["mood"], seed=3)
    found = selector.choose(
        posts, 4, excluded=[selector.identity(TEXTS[0]), selector.identity(TEXTS[5])]
    )
    chosen = [one.post.text for one in found.chosen]
    assert (found.seen, found.excluded, found.repeated, found.unusable) == (
        15,
        2,
        1 + (" ".join(["good", "good", "bad", "sun"]) in TEXTS),
        1,
    )
    assert len(set(chosen)) == 4 and not {TEXTS[0], TEXTS[5]} & set(chosen)
    assert all("mood" in one.prediction and "topic" not in one.prediction for one in found.chosen)
    if strategy in ("margin", "entropy"):
        left = [text for place, text in enumerate([*TEXTS, posts[-2].text]) if place not in (0, 5)]
        scores_NY = np.array([list(one["mood"]["scores"].values()) for one in predictor(left)])
        unsure_N = (margins if strategy == "margin" else entropies)(scores_NY)
        priorities = [one.priority for one in found.chosen]
        np.testing.assert_allclose(priorities, sorted(unsure_N)[:-5:-1], atol=1e-5)
    again = Selector(predictor, strategy=strategy, tasks=["mood"], seed=3)
    repeated = again.choose(posts, 4, excluded=[again.identity(TEXTS[0]), again.identity(TEXTS[5])])
    assert [one.post.text for one in repeated.chosen] == chosen


def test_the_folder_goes_to_label_studio_and_comes_back(predictor, tmp_path):
    rows = [
        {"id": n, "text": text} for n, text in enumerate([*TEXTS, "=2+2 Ann, sun \U0001f600 bad"])
    ]
    (tmp_path / "posts.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    options = PredictOptions()
    done = select_file(predictor, tmp_path / "posts.jsonl", tmp_path / "out", options, count=13)
    assert done.startswith("13 posts to label") and "13" in done
    tasks = json.loads((tmp_path / "out/posts.json").read_text())
    controls = ElementTree.parse(tmp_path / "out/interface.xml").getroot()
    named = {node.get("name"): node.tag for node in controls if node.get("name")}
    assert named == {
        "text": "Text", "mood": "Choices", "topic": "Choices", "heat": "Number", "words": "Labels", "signs": "Choices",
    }  # fmt: skip
    for task in tasks:
        for result in task["predictions"][0]["result"]:
            assert named[result["from_name"]].lower() == result["type"]
            if result["type"] == "labels":
                value = result["value"]
                assert task["data"]["text"][value["start"] : value["end"]] == value["text"]
        assert 0 <= task["predictions"][0]["score"] <= 1
    table = list(csv.DictReader((tmp_path / "out/posts.csv").open(encoding="utf-8")))
    assert [row["id"] for row in table] == [str(task["data"]["id"]) for task in tasks]
    priorities = [float(row["priority"]) for row in table]
    assert priorities == sorted(priorities, reverse=True)
    assert any(row["text"].startswith("'=2+2") for row in table), "a formula is defused"

    # An annotator agrees with the model: what comes back is what was predicted.
    for task in tasks:
        task["annotations"] = [{"result": task["predictions"][0]["result"]}]
        task["data"].pop("words", None)
    (tmp_path / "labeled.json").write_text(json.dumps(tasks))
    back = read_label_studio(
        tmp_path / "labeled.json", kinds={"signs": SIGNS.rules, "words": WORDS.rules}
    )
    expected = {
        row["text"]: found
        for row, found in zip(rows, predictor([r["text"] for r in rows]), strict=True)
    }
    for row in back.rows:
        assert row["mood"] == expected[row["text"]]["mood"]["label"]
        assert row["heat"] == pytest.approx(expected[row["text"]]["heat"]["value"], abs=1e-5)
        found = expected[row["text"]]["words"]
        assert row["tokens"] == found["words"] and row["words"] == found["tags"]
        assert row["signs"] == sorted(expected[row["text"]]["signs"]["labels"])
    assert any("B-PER" in row["words"] for row in back.rows)
    # And nothing is left to label.
    with pytest.raises(ValueError, match="no post is left to choose: .*13 labeled already"):
        select_file(
            predictor,
            tmp_path / "posts.jsonl",
            tmp_path / "again",
            options,
            exclude=[tmp_path / "labeled.json"],
        )


def test_what_is_skipped_or_not_annotated_is_left_to_label(predictor, tmp_path):
    (tmp_path / "posts.txt").write_text("\n".join(TEXTS[:4]))
    annotations = [], [{"was_cancelled": True, "result": []}], [{"result": []}]
    tasks = [
        {"data": {"text": text}, "annotations": one}
        for text, one in zip(TEXTS, annotations, strict=False)
    ]
    (tmp_path / "some.json").write_text(json.dumps([*tasks, {"text": TEXTS[3]}]))
    (tmp_path / "lines.json").write_text(json.dumps({"text": TEXTS[0]}) + "\n" * 2)
    exclude = [tmp_path / "some.json", tmp_path / "lines.json"]
    done = select_file(
        predictor, tmp_path / "posts.txt", tmp_path / "out", PredictOptions(), exclude=exclude
    )
    assert "1 posts to label" in done and "3 labeled already" in done
    (post,) = json.loads((tmp_path / "out/posts.json").read_text())
    assert post["data"]["text"] == TEXTS[1]


def test_files_are_looked_at_before_anything_is_predicted(tmp_path):
    for exclude, folder, rule in (
        (["nope.json"], "out", "--exclude .*nope.json: there is no such file"),
        ([], "file", "--output .*file is a file; name a folder"),
    ):
        (tmp_path / "file").write_text("")
        paths = [tmp_path / name for name in exclude]
        with pytest.raises(ValueError, match=rule):
            select_file(
                None, tmp_path / "posts.txt", tmp_path / folder, PredictOptions(), exclude=paths
            )


TRICKY = [
    "@ann good sun",
    "=2+2 bad",
    "+ good",
    "-bad, good",
    "'@quoted bad",
    "sun; =bad",
    "-5",
    "sun",
]


@pytest.mark.parametrize("keep", [None, ["more", "defused"]])
def test_the_table_is_read_back_as_the_posts_that_were_chosen(keep, predictor, tmp_path):
    rows = [{"text": text, "more": f"={text}", "defused": "text"} for text in TRICKY]
    source, table = tmp_path / "posts.jsonl", tmp_path / "out/posts.csv"
    source.write_text("".join(json.dumps(row) + "\n" for row in rows))
    options = PredictOptions(keep=keep)
    select_file(predictor, source, tmp_path / "out", options)
    with table.open(encoding="utf-8") as file:
        written = {row["text"] for row in csv.DictReader(file)}
    assert {"'@ann good sun", "'=2+2 bad", "'@quoted bad", "-5", "sun; '=bad"} <= written
    with pytest.raises(ValueError, match=f"no post is left to choose: .*{len(TRICKY)} labeled"):
        select_file(predictor, source, tmp_path / "more", options, exclude=[table])
    predict_file(predictor, table, tmp_path / "out.jsonl", PredictOptions(tasks=["mood"]))
    found = [json.loads(line)["text"] for line in (tmp_path / "out.jsonl").open()]
    assert sorted(found) == sorted(TRICKY)
    read = read_whole(table, csv_rows).rows  # as in training
    assert [row["text"] for row in read] == found
    assert keep is None or all(row["more"] == f"={row['text']}" for row in read)


def test_a_table_without_formulas_has_no_column_about_them(predictor, tmp_path):
    (tmp_path / "posts.txt").write_text("\n".join(TEXTS))
    select_file(predictor, tmp_path / "posts.txt", tmp_path / "out", PredictOptions(), count=2)
    assert "defused" not in (tmp_path / "out/posts.csv").read_text()


@pytest.mark.parametrize("name", ["posts.csv", "posts.json", "interface.xml"])
def test_files_in_the_folder_are_not_replaced(name, predictor, tmp_path):
    (tmp_path / "posts.txt").write_text("\n".join(TEXTS))
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / name).write_text("years of work")
    with pytest.raises(ValueError, match=f"{name} is there, perhaps with labels"):
        select_file(predictor, tmp_path / "posts.txt", tmp_path / "out", PredictOptions(), count=1)
    assert (tmp_path / "out" / name).read_text() == "years of work"


def test_a_packed_input_is_read_as_a_stream(predictor, tmp_path):
    (tmp_path / "posts.txt.gz").write_bytes(gzip.compress("\n".join(TEXTS).encode()))
    options = PredictOptions(tasks=["mood"])
    source = str(tmp_path / "posts.txt.gz")
    for strategy in ("margin", "diverse"):
        select_file(predictor, source, tmp_path / strategy, options, strategy=strategy, count=3)
        posts = json.loads((tmp_path / strategy / "posts.json").read_text())
        assert len(posts) == 3 and {post["data"]["text"] for post in posts} <= {*TEXTS}


@pytest.mark.parametrize(
    "strategy, tasks, rule",
    [
        ("margin", ["heat"], "heat has no probabilities to tell it by; choose diverse or random"),
        ("entropy", ["words"], "words has no probabilities .* or margin"),
        ("margins", None, "margins"),
        ("random", ["moods"], "moods"),
    ],
)
def test_what_cannot_be_chosen_by_is_refused(predictor, strategy, tasks, rule):
    with pytest.raises(ValueError, match=rule):
        Selector(predictor, strategy=strategy, tasks=tasks)
