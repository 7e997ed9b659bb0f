"""A report of predictions: what it reads, what it says, and that it is one safe page."""

import json
import re
import xml.etree.ElementTree as ElementTree
from html.parser import HTMLParser
from pathlib import Path

import numpy as np
import pytest

from comoe.commands import main

SCORES = {"bad": {"bad": 0.9, "good": 0.1}, "good": {"bad": 0.2, "good": 0.8}}
HOSTILE = '<script>alert("x")</script> 你好 $_$ & <b>'


def row(number: int, **more):
    label = "bad" if number % 4 == 0 else "good"
    topics = ["food"] if number % 2 else ["food", "price"]
    return {
        "id": number,
        "text": HOSTILE if number == 3 else f"post {number}",
        "mood": {"label": label, "scores": SCORES[label]},
        "topics": {"labels": topics, "scores": {"food": 0.9, "price": 0.7 * len(topics) - 0.6}},
        "heat": {"value": number % 5},
        "names": {"spans": [{"type": "PER", "start": 0, "end": 1, "text": "Ann"}] * (number % 3)},
        "when": f"2026-01-{1 + number % 28:02}",
        "place": "here" if number % 2 else "there",
    } | more


def write(path: Path, rows) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps(one) + "\n" for one in rows))
    return path


@pytest.fixture
def predictions(tmp_path):
    bad = {"id": 400, "text": "", "error": "the text is empty"}
    return write(tmp_path / "predictions.jsonl", [*(row(number) for number in range(400)), bad])


@pytest.fixture
def labeled(tmp_path):
    """Every fifth bad post is called good, every tenth good one bad."""
    rows = []
    for number in range(200):
        gold = "bad" if number < 100 else "good"
        wrong = number % (5 if gold == "bad" else 10) == 0
        label = {"bad": "good", "good": "bad"}[gold] if wrong else gold
        rows.append({"gold": gold, "label": label, "scores": SCORES[label]})
    write(tmp_path / "validation/mood.jsonl", rows)
    return tmp_path / "validation"


def report(predictions, *words):
    main.main(["report", str(predictions), "--json", str(predictions.with_name("r.json")), *words])
    found = json.loads(predictions.with_name("r.json").read_text())
    return found | {"tasks": {task["name"]: task for task in found["tasks"]}}


def test_shares_are_counted_and_corrected(predictions, labeled):
    found = report(predictions, "--labeled", str(labeled))
    assert (found["posts"], found["errors"]) == (401, 1)
    mood = found["tasks"]["mood"]
    assert mood["counts"] == [100, 300] and mood["counted"]["share"] == [0.25, 0.75]
    # 0.25 = 0.8 s + 0.1 (1 - s)
    assert mood["corrected"]["share"][0] == pytest.approx(0.15 / 0.7, abs=0.01)
    assert mood["corrected"]["low"][0] < 0.15 / 0.7 < mood["corrected"]["high"][0]
    assert mood["accuracy"] == pytest.approx(0.85) and mood["confusion"] == [[80, 20], [10, 90]]
    assert found["tasks"]["topics"]["counted"]["share"] == [1.0, 0.5]
    assert found["tasks"]["heat"]["mean"]["mean"] == pytest.approx(2.0)
    # Two of three posts have a name.
    assert found["tasks"]["names"]["counts"] == [266]
    assert "corrected" not in found["tasks"]["topics"]


def test_periods_and_slices_hold_their_own_posts_and_say_what_is_left_out(predictions):
    found = report(predictions, "--time", "when", "--by", "place,id", "--min-posts", "50")
    time, place, number = found["tasks"]["mood"]["parts"]
    assert list(time["values"]) == [] and time["left_out"] == 400
    assert {name: part["posts"] for name, part in place["values"].items()} == {
        "there": 200,
        "here": 200,
    }
    assert place["values"]["there"]["counted"]["share"][0] == 0.5
    assert number["values"] == {} and number["left_out"] == 401
    weekly = report(predictions, "--time", "when", "--period", "week")["tasks"]["mood"]["parts"][0]
    assert list(weekly["values"]) == sorted(weekly["values"]) and len(weekly["values"]) == 4


def test_weights_count(predictions):
    rows = [row(number, w=3 if number % 4 == 0 else 1) for number in range(400)]
    found = report(write(predictions, rows), "--weight", "w")
    assert found["tasks"]["mood"]["counted"]["share"][0] == pytest.approx(0.5)
    assert found["effective_posts"] == pytest.approx(600**2 / (900 + 300))


def test_two_tasks_that_say_the_same_have_v_1(predictions):
    rows = [row(number) for number in range(80)]
    for one in rows:
        one["twin"] = {"label": {"bad": "down", "good": "up"}[one["mood"]["label"]]}
    tables = report(write(predictions, rows))["cross"]
    assert {(table["rows"], table["columns"]) for table in tables} == {
        ("mood", "twin"),
        ("twin", "mood"),
    }
    assert all(table["cramers_v"] == pytest.approx(1) for table in tables)


def test_a_csv_says_the_same_as_its_jsonl(predictions, tmp_path):
    lines = ["text,mood,mood/bad,mood/good,topics,topics/food,topics/price,when"]
    for number in range(400):
        one = row(number)
        mood, topics = one["mood"], one["topics"]
        scores = [*mood["scores"].values(), ";".join(topics["labels"]), *topics["scores"].values()]
        lines.append(",".join(map(str, [f"post {number}", mood["label"], *scores, one["when"]])))
    (tmp_path / "p.csv").write_text("\n".join(lines) + "\n")
    of_csv, of_jsonl = report(tmp_path / "p.csv"), report(predictions)
    for task in ("mood", "topics"):
        assert of_csv["tasks"][task]["counted"] == of_jsonl["tasks"][task]["counted"]


class Tags(HTMLParser):
    """Names of the tags and attributes, and addresses outside the page."""

    def __init__(self, page: str) -> None:
        super().__init__()
        self.tags, self.outside = set(), []
        self.feed(page)

    def handle_starttag(self, tag, attrs):
        self.tags.add(tag)
        self.outside += [
            value for key, value in attrs
            if key in ("src", "href", "xlink:href") and not value.startswith("#")
        ]  # fmt: skip


def test_the_page_is_whole_and_no_post_can_run_in_it(predictions, labeled):
    words = ["--labeled", str(labeled), "--time", "when", "--by", "place", "--examples", "500"]
    report(predictions, *words)
    page = predictions.with_suffix(".html").read_text()
    found = Tags(page)
    assert "script" not in found.tags and found.outside == []
    assert "&lt;script&gt;" in page and "你好" in page
    assert "default-src 'none'" in page
    for drawn in re.findall(r"<svg.*?</svg>", page, re.DOTALL):
        ElementTree.fromstring(drawn)
    ids = re.findall(r' id="(task-[^"]*|cross|method)"', page)
    assert len(ids) == len(set(ids)) == 5


def test_no_post_is_in_a_page_without_examples(predictions):
    report(predictions, "--examples", "0")
    assert "post 1" not in predictions.with_suffix(".html").read_text()


def test_predictions_that_no_mix_explains_are_warned_of(predictions, labeled):
    # The model calls a tenth of the good posts bad, so 1 % bad cannot be.
    rows = [row(number) for number in range(1, 400) if number % 4]
    report(write(predictions, rows), "--labeled", str(labeled))
    assert "cannot be trusted" in predictions.with_suffix(".html").read_text()


BAD = {
    "no file": (["missing.jsonl"], "there is no such file"),
    "no column": (["{p}", "--time", "whem"], "whem.*did you mean when"),
    "no times": (["{p}", "--time", "place"], "no cell of place .* is a time"),
    "no weight": (["{p}", "--weight", "place"], "post 1 has 'there' as place"),
    "no labels": (["{p}", "--labeled", "nowhere"], "predictions/validation of the run"),
    "itself": (["{p}", "--output", "{p}"], "would replace the predictions"),
    "no posts": (["{p}", "--min-posts", "0"], "--min-posts is 0; it must be 1 or more"),
}


@pytest.mark.parametrize("case", BAD)
def test_what_cannot_be_reported_is_told(case, predictions):
    words, message = BAD[case]
    with pytest.raises(SystemExit, match=f"(?s)comoe report: .*{message}"):
        main.main(["report", *(word.format(p=predictions) for word in words)])
    assert predictions.read_text().count("\n") == 401


def test_a_file_without_predictions_is_refused(tmp_path):
    posts = write(tmp_path / "posts.jsonl", [{"text": "a"}])
    with pytest.raises(SystemExit, match="has no predictions"):
        main.main(["report", str(posts)])


@pytest.mark.parametrize(
    "cell, expected",
    [
        ("2026-05-31", "2026-05-31T00:00:00"), ("2026-05-31T12:30:00+02:00", "2026-05-31T10:30:00"),
        (1780185600, "2026-05-31T00:00:00"), ("1780185600000", "2026-05-31T00:00:00"),
        ("Sun May 31 00:00:00 +0000 2026", "2026-05-31T00:00:00"), ("soon", None), (None, None),
        (np.nan, None),
    ],
)  # fmt: skip
def test_times_of_every_form_are_read(cell, expected):
    from comoe.reporting.predictions import read_times

    (found,) = read_times([cell])
    assert (found and found.isoformat()[:19]) == expected


def test_coverage_of_a_run_is_a_table(labeled, tmp_path, capsys):
    from comoe.reporting.coverage import main as coverage

    for split in ("validation", "test"):
        folder = tmp_path / "run/predictions" / split
        folder.mkdir(parents=True)
        (folder / "mood.jsonl").write_text((labeled / "mood.jsonl").read_text())
    coverage([str(tmp_path / "run")])
    held = capsys.readouterr().out.splitlines()[-1].split("|")
    # The same posts give confusion and corpora, so that only the draws differ.
    assert held[1].strip() == "mood" and float(held[2]) > 0.95 > 0.4 > float(held[3])
