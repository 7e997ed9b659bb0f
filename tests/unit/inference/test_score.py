"""Scores of an export on labelled files: the metrics of the predictions that the predictor gives."""

import csv
import dataclasses
import json
import re
import runpy
import sys
from pathlib import Path

import numpy as np
import pytest
from helpers_export import MOOD, TOPIC, tiny_predictor
from sklearn.metrics import accuracy_score, f1_score

from comoe.commands.eval import main
from comoe.data.posts import unlabelled_posts
from comoe.data.reading.inputs import DataChoice
from comoe.data.seen_posts import SEEN, write_seen
from comoe.inference.score import format_scores, score
from comoe.inference.suspicious import doubted_tasks, find_suspicious
from comoe.tasks.kinds.tagging import PHRASE_TAGS
from comoe.tasks.task import Task

ROOT = Path(__file__).parents[3]
TEXTS = ["good day", "the sun is bad", "sunny", "ann in paris!", "a b c", "rain"]
GOLD = ["good", "bad", "good", "so-so", "bad", "bad"]


@pytest.fixture(scope="module")
def predictor(tmp_path_factory):
    return tiny_predictor(tmp_path_factory.mktemp("model"))


def write(path, rows):
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(path)


@pytest.mark.parametrize("route_by", ["token", "task"])
def test_scores_are_those_of_the_predictions(tmp_path, route_by):
    predictor = tiny_predictor(tmp_path, route_by=route_by)
    path = write(
        tmp_path / "d.jsonl", [{"text": t, "label": g} for t, g in zip(TEXTS, GOLD, strict=True)]
    )
    scores = score(predictor, DataChoice(path), tasks=["mood"], progress=False)
    found = [prediction["mood"]["label"] for prediction in predictor(TEXTS)]
    values = scores.evaluation.metrics["mood"]
    assert values["accuracy"] == pytest.approx(accuracy_score(GOLD, found))
    assert values["macro_f1"] == pytest.approx(
        f1_score(GOLD, found, average="macro", zero_division=0)
    )
    assert scores.posts == 6 and scores.evaluation.confusions["mood"].sum() == 6
    assert "mood: macro_f1" in format_scores(scores) and "majority" in format_scores(scores)
    assert score(predictor, path, tasks=["mood"], limit=4).posts == 4


def test_several_tasks_are_found_in_columns_of_their_names(predictor, tmp_path):
    rows = [
        {"text": text, "mood": gold, "topic": "home"}
        for text, gold in zip(TEXTS, GOLD, strict=True)
    ]
    rows[0]["topic"], rows[1]["topic"] = None, TOPIC.labels[1]
    path = write(tmp_path / "d.jsonl", rows)
    scores = score(predictor, DataChoice(path), tasks=["mood", "topic"], progress=False)
    assert set(scores.evaluation.metrics) == {"mood", "topic"}
    assert scores.evaluation.confusions["topic"].sum() == 5


def test_posts_that_training_cut_into_words_are_cut_here_and_phrases_that_are_not_there_are_told(
    tmp_path,
):
    phrases = Task("opinion", "phrases", PHRASE_TAGS, "span_f1")
    predictor = tiny_predictor(tmp_path, tasks=(MOOD, phrases), posts="same.jsonl")
    texts = [f"{text} &amp; sun" for text in TEXTS]
    rows = [
        {"text": text, "mood": gold, "opinion": "sun"}
        for text, gold in zip(texts, GOLD, strict=True)
    ]
    rows[0]["opinion"] = "moon"
    choice = DataChoice(write(tmp_path / "d.jsonl", rows), skip_bad=True)
    scores = score(predictor, choice, progress=False)
    assert scores.posts == 6 and scores.bad == () and scores.unfit == {"opinion": 1}
    assert "opinion: 1 labels left out" in format_scores(scores)
    alone = score(
        predictor, dataclasses.replace(choice, label="mood"), tasks=["mood"], progress=False
    )
    logits = [
        [prediction.logits for prediction in found.evaluation.outputs["mood"]]
        for found in (scores, alone)
    ]
    np.testing.assert_allclose(logits[0], logits[1], atol=1e-6)


def test_slices_of_the_model_are_scored_where_the_file_has_their_column(tmp_path):
    sliced = tiny_predictor(tmp_path, tasks=(dataclasses.replace(MOOD, slices=("kind", "gone")),))
    rows = [
        {"text": text, "label": gold, "kind": text in TEXTS[:2]}
        for text, gold in zip(TEXTS, GOLD, strict=True)
    ]
    path = write(tmp_path / "d.jsonl", rows)
    values = score(sliced, DataChoice(path), progress=False).evaluation.metrics["mood"]
    assert (values["n@kind=true"], values["n@kind=false"]) == (2, 4)
    whole = 2 * values["accuracy@kind=true"] + 4 * values["accuracy@kind=false"]
    assert whole == pytest.approx(6 * values["accuracy"])
    assert not any("gone" in name for name in values)


def test_a_tweeteval_folder_is_scored_on_its_test_split(predictor, tmp_path):
    for split, texts in (("train", ["x"]), ("test", TEXTS)):
        (tmp_path / f"{split}_text.txt").write_text("\n".join(texts) + "\n")
        labels = [str(MOOD.labels.index(gold)) for gold in GOLD][: len(texts)]
        (tmp_path / f"{split}_labels.txt").write_text("\n".join(labels) + "\n")
    scores = score(predictor, DataChoice(str(tmp_path)), tasks=["mood"], progress=False)
    assert scores.posts == 6
    with pytest.raises(ValueError, match="it has no validation split; choose another --split"):
        score(
            predictor, DataChoice(str(tmp_path), split="validation"), tasks=["mood"], progress=False
        )


def test_bad_rows_stop_with_file_and_line_or_are_counted(predictor, tmp_path):
    rows = [
        {"text": "good", "label": "good"},
        {"text": "bad", "label": "godo"},
        {"text": "", "label": "bad"},
    ]
    path = write(tmp_path / "d.jsonl", rows)
    with pytest.raises(
        ValueError, match=r"d.jsonl:2: .*did you mean good\?.*--skip-bad .*\(1 more bad row"
    ):
        score(predictor, DataChoice(path), tasks=["mood"], progress=False)
    scores = score(predictor, DataChoice(path, skip_bad=True), tasks=["mood"], progress=False)
    assert scores.posts == 1 and [row.line for row in scores.bad] == [2, 3]
    assert "2 bad rows left out" in format_scores(scores)


def test_wrong_names_are_refused(predictor, tmp_path):
    path = write(tmp_path / "d.jsonl", [{"text": "good", "lable": "good"}])
    other = write(tmp_path / "e.jsonl", [{"text": "good", "label": None}])
    for data, task, message in (
        (path, "mood", r"--label-column is 'label', but .* did you mean lable\?"),
        (path, "modo", r"modo is not a task of this model; did you mean mood\?"),
        (other, "mood", "no post has a label of mood"),
    ):
        with pytest.raises(ValueError, match=message):
            score(predictor, DataChoice(data), tasks=[task], progress=False)


def test_messages_name_flags_of_the_command_alone(predictor, tmp_path):
    path = write(tmp_path / "posts.jsonl", [{"text": "a", "mood": "good"}])
    with pytest.raises(
        ValueError, match=r"has no column \w+ with the labels of task .* with --task"
    ):
        score(predictor, str(path))
    with pytest.raises(
        ValueError, match=r"^--data nosuch: there is no such file .* --format hub"
    ) as told:
        score(predictor, "nosuch")
    assert "data.root" not in str(told.value)
    with pytest.raises(ValueError, match="^jsonk is not a --format; did you mean jsonl"):
        score(predictor, str(path), format="jsonk")


def test_the_command_prints_the_scores_and_writes_them(tmp_path, monkeypatch, capsys):
    tiny_predictor(tmp_path)
    write(tmp_path / "d.jsonl", [{"text": t, "label": g} for t, g in zip(TEXTS, GOLD, strict=True)])
    monkeypatch.chdir(tmp_path)
    command = "eval.py --model export --data d.jsonl --task mood --output scores.json".split()
    monkeypatch.setattr(sys, "argv", command)
    runpy.run_path(str(ROOT / "launch/eval.py"), run_name="__main__")
    assert "mood: macro_f1" in capsys.readouterr().out
    assert set(json.loads((tmp_path / "scores.json").read_text())) == {"mood"}
    data = (tmp_path / "d.jsonl").read_bytes()
    monkeypatch.setattr(sys, "argv", [*command[:-1], "d.jsonl"])
    with pytest.raises(SystemExit):
        runpy.run_path(str(ROOT / "launch/eval.py"), run_name="__main__")
    assert "is the --data itself" in capsys.readouterr().err
    assert (tmp_path / "d.jsonl").read_bytes() == data


def test_posts_that_the_model_was_trained_on_are_told(tmp_path, monkeypatch, capsys):
    tiny_predictor(tmp_path)
    monkeypatch.chdir(tmp_path)
    texts = [f"good {chr(97 + number // 26)}{chr(97 + number % 26)}" for number in range(100)]
    write(tmp_path / "d.jsonl", [{"text": text, "label": "good"} for text in texts])
    command = ["--model", "export", "--data", "d.jsonl", "--task", "mood"]
    for seen, told in ((None, False), (texts[:80], True), (TEXTS * 9, False)):
        if seen is not None:
            write_seen(tmp_path / "export" / SEEN, unlabelled_posts(seen, tasks=[]))
        main(command)
        said = re.findall(r"was trained on about (\d+) of these 100 posts", capsys.readouterr().err)
        assert len(said) == told
        if told:
            assert abs(int(said[0]) - 80) <= 6
    filter_of_9 = (tmp_path / "export" / SEEN).read_bytes()
    for content in (b"torn", filter_of_9[:-1]):
        (tmp_path / "export" / SEEN).write_bytes(content)
        main(command)
        printed = capsys.readouterr()
        assert re.search(
            r"warning: .* cannot be told \(.*training_posts.npy .*delete it", printed.err
        )
        assert "100 posts" in printed.out and "trained on about" not in printed.err


def test_metrics_by_a_column_of_the_file_and_suspicious_labels_in_a_table(
    tmp_path, monkeypatch, capsys
):
    predictor = tiny_predictor(tmp_path)
    found = [prediction["mood"] for prediction in predictor(TEXTS)]
    rows = [
        {"text": text, "label": one["label"], "kind": "ab"[turn % 2], "sure": turn / 10}
        for turn in range(10)
        for text, one in zip(TEXTS, found, strict=True)
    ]
    # The surest prediction reaches the mean of its label: another label there is suspicious.
    sure = max(range(6), key=lambda place: max(found[place]["scores"].values()))
    least = min(found[sure]["scores"], key=found[sure]["scores"].get)
    rows[6 + sure]["label"] = least
    write(tmp_path / "d.jsonl", rows)
    monkeypatch.chdir(tmp_path)
    main(
        "--model export --data d.jsonl --task mood --by kind --by sure<0.35 --output scores.json "
        "--suspicious found.csv".split()
    )
    printed = capsys.readouterr().out
    written = json.loads((tmp_path / "scores.json").read_text())["mood"]
    assert (written["n@kind=a"], written["n@sure<0.35=true"]) == (30, 24)
    gap = written["gaps"]["kind"]["accuracy"]
    assert (gap["gap"], gap["largest"]) == (pytest.approx(1 / 30), "a")
    assert written["gap/accuracy@kind"] == pytest.approx(1 / 30) and "by chance" in printed
    (line,) = csv.DictReader((tmp_path / "found.csv").read_text().splitlines())
    assert "of 60 labels are wrong; suspicious are 1 (" in printed
    assert line["place"].endswith(f"d.jsonl:{7 + sure}") and line["text"] == TEXTS[sure]
    assert (line["label"], line["likely_label"]) == (least, found[sure]["label"])
    assert float(line["score"]) < float(line["likely_score"])
    for flags, message in (
        (["--by", "knd"], r"--by is 'knd'.*did you mean kind\?"),
        (
            ["--by", "text<1"],
            "--by: text<1 compares numbers, but text is 'good day' in .*d.jsonl:1",
        ),
        (["--suspicious", "d.jsonl"], "--suspicious d.jsonl is the --data itself"),
    ):
        with pytest.raises(SystemExit):
            main("--model export --data d.jsonl --task mood".split() + flags)
        assert re.search(message, capsys.readouterr().err)


def test_labels_of_sets_are_doubted_one_by_one_and_numbers_are_not(tmp_path):
    signs = Task("signs", "multi_label", ("x", "y"), "macro_f1")
    heat = Task("heat", "regression", (), "pearson")
    predictor = tiny_predictor(tmp_path, tasks=(signs, heat))
    rows = [{"text": text, "signs": ["x"], "heat": 1.0} for text in TEXTS]
    scores = score(predictor, write(tmp_path / "d.jsonl", rows), progress=False)
    found = find_suspicious(scores)
    assert [one.name for one in found] == ["signs/x", "signs/y"]
    assert found[0].labels == ("not x", "x") and found[1].given_N.tolist() == [0] * 6
    with pytest.raises(ValueError, match="heat has none: it is for single_label"):
        doubted_tasks((heat,))
