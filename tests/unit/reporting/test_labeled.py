"""Labeled posts of a report: what of them is read, what is said of the rest, and of tasks without any."""

import json
from datetime import UTC, datetime, timedelta

import pytest

from comoe.commands import main
from comoe.reporting.page import _warnings
from comoe.reporting.predictions import read_labeled
from comoe.reporting.times import choose_period

SCORES = {"bad": {"bad": 0.9, "good": 0.1}, "good": {"bad": 0.2, "good": 0.8}}


def write(path, rows):
    path.parent.mkdir(parents=True, exist_ok=True)
    lines = [one if isinstance(one, str) else json.dumps(one) for one in rows]
    path.write_text("".join(line + "\n" for line in lines))
    return path


def mood(number):
    label = "bad" if number % 4 == 0 else "good"
    return {"label": label, "scores": SCORES[label]}


@pytest.fixture
def predictions(tmp_path):
    rows = [
        {"text": f"post {n}", "mood": mood(n), "heat": {"value": n % 5}, "truth": "good"}
        for n in range(100)
    ]
    return write(tmp_path / "p.jsonl", rows)


def gold_rows(count=100):
    return [{"text": f"old {n}", "gold": mood(n + n % 2)["label"], **mood(n)} for n in range(count)]


def report(predictions, *words):
    target = predictions.with_name("r.json")
    main.main(["report", str(predictions), "--json", str(target), *words])
    return json.loads(target.read_text()), predictions.with_suffix(".html").read_text()


def test_labeled_posts_of_other_tasks_alone_are_refused(predictions, tmp_path):
    write(tmp_path / "v/topic.jsonl", gold_rows())
    message = "no task in common: the labeled posts have topic, .*p.jsonl has mood, heat"
    with pytest.raises(SystemExit, match=message):
        main.main(["report", str(predictions), "--labeled", str(tmp_path / "v")])


def test_tasks_that_are_not_corrected_are_named(predictions, tmp_path, capsys):
    write(tmp_path / "v/mood.jsonl", gold_rows())
    found, page = report(predictions, "--labeled", str(tmp_path / "v"))
    assert found["warnings"] == ["Not corrected: heat (no labeled posts)."]
    assert found["warnings"][0] in page
    assert "warning: Not corrected: heat (no labeled posts)." in capsys.readouterr().err
    write(tmp_path / "v/heat.jsonl", [{"text": f"a {n}", "gold": 1, "value": 2} for n in range(30)])
    assert report(predictions, "--labeled", str(tmp_path / "v"))[0]["warnings"] == [
        "Not corrected: heat (a number)."
    ]
    assert report(predictions)[0]["warnings"] == []


def test_damaged_rows_of_labeled_posts_are_counted_and_told(predictions, tmp_path, capsys):
    rows = gold_rows()
    rows[10], rows[20] = '{"text": "cut', {"text": "b", "gold": "good", "label": None}
    rows[30], rows[40] = {"text": "c", **mood(1)}, {"text": "d", "gold": ["good"], **mood(1)}
    rows[50] = {"text": "no label", "gold": None, **mood(1)}
    path = write(tmp_path / "v/mood.jsonl", rows)
    found, page = report(predictions, "--labeled", str(tmp_path / "v"))
    told = found["warnings"][0]
    assert told.startswith(
        "mood: 4 rows of the labeled posts could not be read and do not count (95 do)"
    )
    assert f"{path}:11: " in told and told in capsys.readouterr().err
    assert "4 rows of the labeled posts could not be read" in page
    assert found["tasks"][0]["labeled"] == 95
    assert [line.partition("jsonl:")[2] for line in read_labeled(tmp_path / "v")["mood"].bad][1:] == [
        "21: it has None as label.", "31: it has no gold, as other lines have.",
        "41: it has ['good'] as gold beside label.",
    ]  # fmt: skip


def test_a_file_of_labeled_posts_without_a_row_that_can_be_read_is_refused(tmp_path):
    write(tmp_path / "v/mood.jsonl", [{"gold": "good", "label": 3}, '{"gold'])
    with pytest.raises(
        ValueError,
        match="none of its posts can be read, the first: .*mood.jsonl:2: is not valid JSON",
    ):
        read_labeled(tmp_path / "v")


def test_tags_of_words_are_spans(tmp_path):
    """As a run writes them; what a decoder generated, and other files, do not count."""
    tags = ["O", "B-city", "I-city", "B-brand"]
    rows = [{"text": "in new haven acme", "gold": tags, "tags": ["O", "B-city", "O", "O"], "scores": [1.0] * 4},
            {"text": "nothing", "gold": ["O"], "tags": ["O"], "scores": [1.0]}]  # fmt: skip
    write(tmp_path / "v/mentions.jsonl", rows)
    write(tmp_path / "v/answer.jsonl", [{"gold": "yes", "answer": "no"}])
    write(tmp_path / "v/metrics.jsonl", [{"loss": 1.0}])
    found = read_labeled(tmp_path / "v")
    assert list(found) == ["mentions"]
    task = found["mentions"]
    assert (task.what, task.labels, task.bad) == ("spans", ("city", "brand"), ())
    assert task.values.tolist() == [[1, 0], [0, 0]] and task.gold.tolist() == [[1, 1], [0, 0]]
    spans = {"spans": [{"type": "city", "start": 0, "end": 1, "text": "a"}]}
    rows = [{"text": f"a {n}", "mentions": spans} for n in range(30)]
    found, page = report(write(tmp_path / "s.jsonl", rows), "--labeled", str(tmp_path / "v"))
    assert found["tasks"][0]["labeled"] == 2 and "drift" in found["tasks"][0]
    assert found["warnings"] == ["Not corrected: mentions (spans)."]


def test_drift_of_a_number_speaks_of_no_corrected_shares(predictions, tmp_path):
    words = ["flight", "gate", "bag", "seat"]
    rows = [
        {"text": f"{words[n % 4]} {words[n // 4 % 4]} {n}", "gold": 1, "value": 2}
        for n in range(100)
    ]
    write(tmp_path / "v/heat.jsonl", rows)
    _, page = report(predictions, "--labeled", str(tmp_path / "v"))
    assert "of another kind" in page and "shares are wrong" not in page
    assert "The model may err otherwise here: label some 200" in page
    assert "By their words alone the area under the curve is" in page


def test_one_post_has_no_interval_and_the_model_is_not_blamed(predictions, tmp_path):
    write(tmp_path / "v/mood.jsonl", [one | {"gold": one["label"]} for one in gold_rows()])
    row = json.loads(predictions.read_text().splitlines()[0])
    write(predictions, [row])
    found, page = report(predictions, "--labeled", str(tmp_path / "v"))
    mood, heat = found["tasks"]
    assert mood["accuracy"] == 1 and heat["mean"] == {
        "mean": 0,
        "low": None,
        "high": None,
        "spread": 0,
    }
    assert "hardly tells these labels" not in page
    assert "Mean 0.000 (one post: no interval)." in page


def test_an_interval_of_few_posts_is_not_blamed_on_the_model():
    wide = {"low": [0.0, 0.01], "high": [0.99, 1.0]}
    for posts, text in (
        (1, "So few posts say next to nothing of shares (1 "),
        (100, "hardly tells"),
    ):
        (found,) = _warnings({"labels": ["a", "b"], "posts": posts, "corrected": wide})
        assert text in found


def test_a_period_that_has_enough_posts_is_chosen():
    days = [datetime(2026, 1, 1, tzinfo=UTC) + timedelta(days=n) for n in range(200)]
    assert [choose_period(days, least=least) for least in (1, 7, 8, 28, 60, 300)] == [
        "week", "week", "month", "month", "year", "week"
    ]  # fmt: skip
