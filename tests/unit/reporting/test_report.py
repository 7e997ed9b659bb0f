"""A report of predictions: what it reads, what it says, and that it is one safe page."""

import gzip
import json
import re
import xml.etree.ElementTree as ElementTree
from html.parser import HTMLParser
from pathlib import Path

import numpy as np
import pytest

from comoe.commands import main
from comoe.config.files import csv_line
from comoe.inference import parquet

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
    found = report(predictions, "--time", "when", "--by", "place,id", "--period", "day")
    assert found["notes"][-1].startswith("No day has 50 posts; a longer --period")
    time, place, number = found["tasks"]["mood"]["parts"]
    assert list(time["values"]) == [] and time["left_out"] == 400
    assert {name: part["posts"] for name, part in place["values"].items()} == {
        "there": 200,
        "here": 200,
    }
    assert place["values"]["there"]["counted"]["share"][0] == 0.5
    assert number["values"] == {} and number["left_out"] == 401
    # Of itself it takes a period that has enough.
    weekly = report(predictions, "--time", "when")["tasks"]["mood"]["parts"][0]
    assert list(weekly["values"]) == sorted(weekly["values"]) and len(weekly["values"]) == 4


def test_weights_count(predictions):
    rows = [row(number, w=3 if number % 4 == 0 else 1) for number in range(400)]
    found = report(write(predictions, rows), "--weight", "w")
    assert found["tasks"]["mood"]["counted"]["share"][0] == pytest.approx(0.5)
    assert found["effective_posts"] == pytest.approx(600**2 / (900 + 300))


def test_a_csv_says_the_same_as_its_jsonl(predictions, tmp_path):
    """Written as ``comoe predict`` does, with labels and columns that it defuses."""
    head = ["text", "mood", "mood/-", "mood/+", "topics", "topics/a", "topics/-b", "who"]
    lines, rows = [csv_line(head)], []
    for number in range(400):
        label = "-" if number % 4 == 0 else "+"
        scores = {"-": 0.9, "+": 0.1} if label == "-" else {"-": 0.2, "+": 0.8}
        topics = ["a"] if number % 2 else ["a", "-b"]
        both = {"a": 0.9, "-b": 0.1 if number % 2 else 0.8}
        who = "@ann" if number % 5 else "=1+1"
        cells = [f"=post {number}", label, *scores.values(), ";".join(topics), *both.values(), who]
        lines.append(csv_line(cells))
        rows.append(
            {"text": f"=post {number}", "mood": {"label": label, "scores": scores}, "who": who}
            | {"topics": {"labels": topics, "scores": both}}
        )
    (tmp_path / "p.csv").write_text("".join(lines))
    of_csv, of_jsonl = (
        report(tmp_path / "p.csv", "--by", "who"),
        report(write(predictions, rows), "--by", "who"),
    )
    assert list(of_csv["tasks"]) == ["mood", "topics"]
    assert of_csv["tasks"] == of_jsonl["tasks"]


def test_several_labels_are_corrected_one_by_one(predictions, tmp_path):
    """By hand: price is found in 0.9 of its posts and in 0.2 of the others, so 0.5 = 0.9 s + 0.2 (1 - s)."""
    lines = []
    for number in range(400):
        there = number < 200
        right = number % 10 if there else number % 5
        labels = ["food"] + ["price"] * (right != 0 if there else right == 0)
        gold = ["food"] + ["price"] * there
        lines.append({"gold": gold, "labels": labels, "scores": {"food": 1.0, "price": 0.5}})
    write(tmp_path / "validation/topics.jsonl", lines)
    topics = report(predictions, "--labeled", str(tmp_path / "validation"))["tasks"]["topics"]
    price = [topics["corrected"][name][1] for name in ("low", "share", "high")]
    assert price[1] == pytest.approx(0.3 / 0.7, abs=0.01) and price[0] < 0.3 / 0.7 < price[2]
    assert topics["counted"]["share"][1] == 0.5


def test_a_part_that_no_mix_explains_is_marked_and_one_of_few_posts_is_not(predictions, labeled):
    # The model calls a tenth of good posts bad: none among 190 cannot be chance, none among 10 can.
    rows = [row(number) for number in range(400)]
    places = {
        "many": [one for one in rows if one["mood"]["label"] == "good"][:190],
        "mixed": rows[:100],
    }
    some = [one | {"place": place} for place, group in places.items() for one in group]
    write(predictions, [*some, *(one | {"place": "few"} for one in places["many"][:10])])
    words = ["--labeled", str(labeled), "--by", "place", "--min-posts", "10"]
    values = report(predictions, *words)["tasks"]["mood"]["parts"][0]["values"]
    assert values["many"]["corrected"]["unexplained"] == pytest.approx(0.1, abs=0.01)
    assert (
        values["few"]["corrected"]["unexplained"]
        == values["mixed"]["corrected"]["unexplained"]
        == 0
    )
    page = predictions.with_suffix(".html").read_text()
    assert "<td>many *</td>" in page and "<td>few</td>" in page


def test_a_label_without_labeled_posts_is_told(predictions, labeled):
    lines = [json.loads(line) for line in (labeled / "mood.jsonl").read_text().splitlines()]
    write(labeled / "mood.jsonl", [one for one in lines if one["gold"] == "good"])
    mood = report(predictions, "--labeled", str(labeled))["tasks"]["mood"]
    assert mood["never_labeled"] == ["bad"] and mood["corrected"]["high"][0] > 0.5
    assert "No labeled post has bad" in predictions.with_suffix(".html").read_text()


def test_cross_table_by_hand(predictions):
    # 30 bad and 10 good posts here, 20 and 40 there: chi^2 = 100 (30 * 40 - 10 * 20)^2 / (40 * 60 * 50 * 50)
    rows, counts = [], {("bad", "x"): 30, ("good", "x"): 10, ("bad", "y"): 20, ("good", "y"): 40}
    for (mood, other), count in counts.items():
        rows += [{"text": "a", "mood": {"label": mood}, "other": {"label": other}}] * count
    tables = {
        (one["rows"], one["columns"]): one for one in report(write(predictions, rows))["cross"]
    }
    found = tables["other", "mood"]
    assert found["share"] == [[0.75, 0.25], [pytest.approx(1 / 3), pytest.approx(2 / 3)]]
    assert found["cramers_v"] == pytest.approx((1e6 / (40 * 60 * 2500)) ** 0.5)


def test_weighted_cross_tables_say_what_they_count(predictions):
    """By hand: 12 posts of weight 1 and 4 of weight 3 are worth (12 + 12)^2 / (12 + 36) = 12."""
    rows = [
        {"text": "a", "w": 1 + 2 * (number < 4), "mood": {"label": "bad" if number < 6 else "good"},
         "other": {"label": "xy"[number % 2]}}
        for number in range(16)
    ]  # fmt: skip
    rows += [{"text": "a", "w": 0, "mood": {"label": "bad"}, "other": {"label": "x"}}]
    table = report(write(predictions, rows), "--weight", "w")["cross"][0]
    assert (table["posts"], table["counts"]) == (16, [14, 10])
    assert table["effective_posts"] == pytest.approx(12)
    assert (table["cramers_v"], table["cramers_v_corrected"]) == (0, 0)
    page = predictions.with_suffix(".html").read_text()
    assert "16 posts, counted by the sum of their w: bad 14, good 10. They are worth 12" in page


def test_a_model_that_predicts_one_label_is_explained(predictions, labeled):
    lines = [json.loads(line) for line in (labeled / "mood.jsonl").read_text().splitlines()]
    good = {"label": "good", "scores": SCORES["good"]}
    write(labeled / "mood.jsonl", [one | good for one in lines])
    # Without scores the predictions do not even name the other label.
    rows = [
        {"text": "a", "mood": {"label": "good"}, "other": {"label": "xy"[number % 2]}}
        for number in range(200)
    ]
    found = report(write(predictions, rows), "--labeled", str(labeled))
    mood = found["tasks"]["mood"]
    assert mood["labels"] == ["good", "bad"] and mood["counts"] == [200, 0]
    assert all(low < 0.05 for low in mood["corrected"]["low"])
    assert all(high > 0.95 for high in mood["corrected"]["high"])
    assert found["cross"] == []
    assert found["cross_left_out"] == ["mood and other: all posts have good as mood."]
    page = predictions.with_suffix(".html").read_text()
    assert "next to nothing of the share of good, bad" in page
    assert "(it predicts good alone)" in page and "No table of mood and other: all posts" in page


@pytest.mark.parametrize("form", ["p.jsonl.gz", "p.parquet", "shards"])
def test_other_forms_of_the_same_predictions_give_the_same_report(form, predictions, monkeypatch):
    monkeypatch.setattr(parquet, "SHARD", 150)
    monkeypatch.setattr(parquet, "BATCH", 100)
    expected = report(predictions, "--by", "place", "--time", "when")
    target = predictions.with_name(form)
    if form.endswith(".gz"):
        target.write_bytes(gzip.compress(predictions.read_bytes()))
    else:
        tasks = list(expected["tasks"])
        parquet.write_parquet(predictions, target, kept=["id", "when", "place"], tasks=tasks)
    found = report(target, "--by", "place", "--time", "when")
    assert found | {"source": ""} == expected | {"source": ""}


def test_times_without_posts_break_the_line_and_bad_cells_end_nothing(predictions):
    rows = [
        row(number, when=f"2026-0{1 if number < 200 else 4}-1{number % 10}")
        for number in range(400)
    ]
    rows[0]["when"], rows[1]["when"] = "0001-01-01T00:00:00+08:00", "-99999999999"
    rows[2]["mood"], rows[3]["mood"] = {"label": None}, {"label": "good", "scores": {"good": None}}
    rows[4]["heat"], rows[5]["names"] = {"value": None}, {"spans": ["Ann"]}
    found = report(
        write(predictions, rows), "--time", "when", "--period", "month", "--min-posts", "20"
    )
    part = found["tasks"]["mood"]["parts"][0]
    assert part["periods"] == [f"2026-0{month}" for month in (1, 2, 3, 4)]
    assert {name: value["posts"] for name, value in part["values"].items()} == {
        "2026-01": 196,
        "2026-04": 200,
    }
    assert found["notes"][0].startswith("2 posts have no readable when")
    assert [line.partition(".jsonl:")[2] for line in found["set_aside"]] == [
        "3: mood has None as label.", "4: mood has {'good': None} as scores.",
        "5: heat has None as value.", "6: names has ['Ann'] as spans.",
    ]  # fmt: skip


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


def test_labels_of_the_posts_themselves_correct_what_the_model_gets_wrong(predictions):
    # A third of the bad posts is called good; every second post has a label.
    rows = [row(number) for number in range(600)]
    for number, one in enumerate(rows):
        truth = "bad" if number % 4 == 0 or number % 8 == 1 else "good"
        one["truth"] = truth if number % 2 == 0 or number % 8 == 1 else ""
    # The sample must not depend on the label: all posts whose number divided by 8 leaves 0, 1 or 2.
    for number, one in enumerate(rows):
        if number % 8 > 2:
            one["truth"] = ""
    mood = report(write(predictions, rows), "--gold", "mood=truth")["tasks"]["mood"]
    assert mood["labeled"] == 225 and mood["accuracy"] == pytest.approx(2 / 3)
    sample, called, everyone = 2 / 3, 1 / 3, 1 / 4
    low, high = mood["corrected"]["low"][0], mood["corrected"]["high"][0]
    # Between the sample alone and the sample moved by all of the predictions' difference.
    assert sample + (everyone - called) < mood["corrected"]["share"][0] < sample
    assert low < sample < high and sum(mood["corrected"]["share"]) == pytest.approx(1)


def test_posts_of_another_kind_are_warned_of(predictions, labeled):
    rows = [json.loads(line) for line in (labeled / "mood.jsonl").read_text().splitlines()]
    words = ["flight", "gate", "bag", "seat"]
    write(labeled / "mood.jsonl", [
        one | {"text": f"{words[number % 4]} {words[number // 4 % 4]} number {number}"}
        for number, one in enumerate(rows)
    ])  # fmt: skip
    mood = report(predictions, "--labeled", str(labeled))["tasks"]["mood"]
    assert mood["drift"]["words"]["auc"] > 0.95
    assert "of another kind than the labeled ones" in predictions.with_suffix(".html").read_text()


BAD = {
    "no sign": (["{p}", "--gold", "mood"], "--gold is 'mood'; it must be TASK=COLUMN"),
    "no task": (["{p}", "--gold", "mod=place"], "mod.*did you mean mood"),
    "no label": (
        ["{p}", "--gold", "mood=place"],
        "label of task mood .*, post 1 of .*predictions.jsonl. is 'there'",
    ),
    "no number": (
        ["{p}", "--gold", "heat=place"],
        r"predictions.jsonl: post 1 has 'there' as place \(--gold heat=place\); task heat predicts numbers",
    ),
    "no file": (["missing.jsonl"], "there is no such file"),
    "no shards": (["{d}"], "is a folder without a .parquet file"),
    "no column": (["{p}", "--time", "whem"], "whem.*did you mean when"),
    "no times": (["{p}", "--time", "place"], "no cell of place .* is a time"),
    "no weight": (["{p}", "--weight", "place"], "post 1 has 'there' as place"),
    "no labels": (["{p}", "--labeled", "nowhere"], "predictions/validation of the run"),
    "page and numbers": (
        ["{p}", "--output", "{d}/a.html", "--json", "{d}/a.html"],
        "is the page itself",
    ),
    "no time": (["{p}", "--period", "week"], "--period is of --time"),
    "many periods": (
        ["{p}", "--time", "when", "--period", "hour"],
        "span 649 of them; at most 400",
    ),
    "itself": (["{p}", "--output", "{p}"], "would replace what is read"),
}


@pytest.mark.parametrize("case", BAD)
def test_what_cannot_be_reported_is_told(case, predictions):
    words, message = BAD[case]
    with pytest.raises(SystemExit, match=f"(?s)comoe report: .*{message}"):
        main.main(["report", *(word.format(p=predictions, d=predictions.parent) for word in words)])
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
        (np.nan, None), ("20260531120000", "2026-05-31T12:00:00"), ("202605311200", "2026-05-31T12:00:00"),
        ("0001-01-01T00:00:00+08:00", None), ("-99999999999", None), ("1e400", None), ("2612-01-01", None),
    ],
)  # fmt: skip
def test_times_of_every_form_are_read(cell, expected):
    from comoe.reporting.times import read_times

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
