"""Exports of Label Studio: labels, votes, spans in characters, and how far annotators agree."""

from __future__ import annotations

import json
import math

import pytest

from comoe.config.recipe import TaskConfig
from comoe.data.corpus import load_corpus
from comoe.data.reading.label_studio import read_label_studio
from comoe.tasks.agreement import krippendorff_alpha, set_distance, squared_distance
from tests.helpers_data import recipe_of

# Krippendorff 2011, section C: four observers, twelve units, missing cells.
_ = None
OBSERVERS = [
    [1, 2, 3, 3, 2, 1, 4, 1, 2, _, _, _],
    [1, 2, 3, 3, 2, 2, 4, 1, 2, 5, _, 3],
    [_, 3, 3, 3, 2, 3, 4, 2, 2, 5, 1, _],
    [1, 2, 3, 3, 2, 4, 4, 1, 2, 5, 1, _],
]


def test_alpha_is_that_of_the_published_example():
    units = [[row[unit] for row in OBSERVERS if row[unit]] for unit in range(12)]
    assert krippendorff_alpha(units) == pytest.approx(0.743, abs=5e-4)
    assert krippendorff_alpha(units, squared_distance) == pytest.approx(0.849, abs=5e-4)
    assert math.isnan(krippendorff_alpha([[1], [2]])) and math.isnan(krippendorff_alpha([[1, 1]]))
    sets = [[frozenset("ab"), frozenset("b")], [frozenset(), frozenset()]]
    # Observed 1/2 of one unit of two; expected over the 12 ordered pairs of four labels: 9 / 12.
    assert krippendorff_alpha(sets, set_distance) == pytest.approx(1 - (0.5 / 2) / (9 / 12))


def choice(*labels, name="mood"):
    return {
        "from_name": name,
        "to_name": "text",
        "type": "choices",
        "value": {"choices": [*labels]},
    }


def span(start, end, text, label="PER"):
    value = {"start": start, "end": end, "text": text, "labels": [label]}
    return {"from_name": "who", "to_name": "text", "type": "labels", "value": value}


def number(value):
    return {"from_name": "heat", "to_name": "text", "type": "rating", "value": {"rating": value}}


def task(text, *annotations, **more):
    return {
        "data": {"text": text, "id": 7},
        "annotations": [{"result": [*one]} for one in annotations],
    } | more


def read(tmp_path, *tasks):
    (tmp_path / "export.json").write_text(json.dumps(tasks), encoding="utf-8")
    return read_label_studio(tmp_path / "export.json")


def test_labels_votes_spans_and_numbers(tmp_path):
    annotated = [choice("good")], [choice("good"), number(4)], [choice("bad"), number(1)]
    raw = read(
        tmp_path,
        task("Ann, in Paris", *annotated),
        task("tied", [choice("good")], [choice("bad")]),
        task("nobody"),
        task("given up", annotations=[{"result": [choice("bad")], "was_cancelled": True}]),
        # Two annotators of three mark Ann behind an emoji: in characters, and as a browser counts.
        task("\U0001f44d @Ann-B!", [span(2, 8, "@Ann-B")], [span(3, 9, "@Ann-B")], []),
    )
    first, tied, spans = raw.rows
    assert first["mood"] == "good" and first["mood_votes"] == {"good": 2, "bad": 1}
    assert first["heat"] == 2.5 and first["who"] == ["O"] * 4 and first["id"] == 7
    assert first["words"] == ["Ann", ",", "in", "Paris"]
    assert tied["mood"] is None and tied["mood_votes"] == {"good": 1, "bad": 1}
    assert raw.lines == [1, 2, 5] and raw.bad == []
    assert "3 of 5 posts are labeled" in raw.notes[0]
    mood = next(note for note in raw.notes if "mood by several" in note)
    assert "in 2 posts" in mood and "1 posts where no label leads" in mood
    # The same place is one span, whoever counted it.
    assert spans["who"] == ["O", "B-PER", "O"]


def test_several_choices_are_sets_and_shares(tmp_path):
    raw = read(
        tmp_path,
        task("a", [choice("joy", "fear")], [choice("joy")], []),
        task("b", [], []),
    )
    assert raw.rows[0]["mood"] == ["joy"] and raw.rows[1]["mood"] == []
    assert raw.rows[0]["mood_votes"] == {"joy": pytest.approx(2 / 3), "fear": pytest.approx(1 / 3)}


@pytest.mark.parametrize(
    "broken, rule",
    [
        (
            task("a", [{"from_name": "mood", "type": "choices", "value": {}}]),
            "lacks what its type has",
        ),
        (task("a", [span(0, 9, "zzz")], [span(0, 9, "zzz")]), "no text of its data has"),
        (
            {"data": {"text": "a", "mood": 1}, "annotations": [{"result": [choice("x")]}]},
            "rename one",
        ),
    ],
)
def test_a_bad_task_is_a_bad_row(tmp_path, broken, rule):
    raw = read(tmp_path, task("b", [choice("x")]), broken)
    assert len(raw.rows) == 1 and rule in raw.bad[0].rule and raw.bad[0].line == 2


@pytest.mark.parametrize("content", ['{"text": "a"}', '[{"text": "a", "mood": "x"}]', "[1]", "{"])
def test_another_json_is_refused(tmp_path, content):
    (tmp_path / "export.json").write_text(content)
    with pytest.raises(ValueError, match="export.json"):
        read_label_studio(tmp_path / "export.json")


def test_a_recipe_learns_from_the_votes_and_tells_the_agreement(tmp_path):
    posts = [
        task(f"post {n}", [choice("good")], [choice("bad" if n % 4 else "good")]) for n in range(24)
    ]
    posts += [task(f"Ann {n}", [choice("bad"), span(0, 3, "Ann")]) for n in range(8)]
    for one in posts:
        del one["data"]["id"]
    (tmp_path / "labeled.json").write_text(json.dumps(posts))
    shared = {"path": "labeled.json", "format": "label_studio"}
    recipe = recipe_of(
        tmp_path,
        mood=TaskConfig(**shared, label="mood", labels=["bad", "good"], soft_label="mood_votes"),
        who=TaskConfig(**shared, text="words", label="who", kind="tags"),
    )
    corpus = load_corpus(recipe)
    train = corpus.splits["train"]
    soft = {tuple(row[0]) for row in train.soft_labels["mood"] if row is not None}
    assert soft == {(0.0, 1.0), (0.5, 0.5), (1.0, 0.0)}
    assert next(task for task in corpus.tasks if task.name == "who").labels == ("O", "B-PER")
    assert any("Krippendorff's alpha" in note for note in corpus.report.notes)
