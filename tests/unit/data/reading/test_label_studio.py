"""Exports of Label Studio: labels, votes, spans in characters, and how far annotators agree."""

from __future__ import annotations

import json
import math
import re

import pytest

from comoe.config.recipe import TaskConfig
from comoe.data.corpus import load_corpus
from comoe.data.datasets import groups_of, read_group
from comoe.data.reading.label_studio import read_label_studio
from comoe.tasks.agreement import krippendorff_alpha, set_distance, squared_distance
from comoe.tasks.kinds.registry import KINDS
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


def read(tmp_path, *tasks, **options):
    (tmp_path / "export.json").write_text(json.dumps(tasks), encoding="utf-8")
    return read_label_studio(tmp_path / "export.json", **options)


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
        (task("a", [span(0, 9, "zzz")], [span(0, 9, "zzz")]), "column text lacks the marked spans"),
        (
            task("a", [choice("x") | {"value": {"choices": ["x"], "start": 0, "end": 1}}]),
            "perRegion",
        ),
        (task("a", [number(float("1e999"))]), "heat has inf"),
        (task("a", [span(float("inf"), 9, "zzz")]), "lacks what its type has"),
        (task("a", [choice("x", "y")]), "chose x and y of mood, .* use kind: multi_label"),
        (
            {"data": {"text": "a", "mood": 1}, "annotations": [{"result": [choice("x")]}]},
            "rename one",
        ),
    ],
)
def test_a_bad_task_is_a_bad_row(tmp_path, broken, rule):
    kinds = {"mood": KINDS["single_label"], "who": KINDS["tags"]}
    raw = read(tmp_path, task("b", [choice("x")]), broken, kinds=kinds)
    assert len(raw.rows) == 1 and re.search(rule, raw.bad[0].rule) and raw.bad[0].line == 2


def posts(*cells, result=()):
    """Posts of these data, of which the first has a result."""
    return [
        {"data": data, "annotations": [{"result": [*result] if number == 0 else []}]}
        for number, data in enumerate(cells)
    ]


MOOD, TAGS = {"mood": KINDS["single_label"]}, {"who": KINDS["tags"]}
TWEETS = {"id": "a17", "tweet": "Ann is here"}, {"id": "a18", "tweet": "nobody is here"}
TWINS = [data | {"raw": data["tweet"]} for data in TWEETS]


@pytest.mark.parametrize(
    "cells, to_name, text, found",
    [
        (TWEETS, "text", "words", ["nobody", "is", "here"]),
        (TWINS, "raw", "words", ["nobody", "is", "here"]),  # of several that fit, as the control says
        (TWINS, "text", "raw", ["nobody", "is", "here"]),  # or the recipe
        (TWINS, "text", "words", "they fit tweet, raw; set tasks.who.text"),
        ([{"text": 3}], "text", "words", "no post has a text"),
    ],
)  # fmt: skip
def test_the_text_is_one_column_of_the_file(tmp_path, cells, to_name, text, found):
    marked = posts(*cells, result=[span(0, 3, "Ann") | {"to_name": to_name}])
    options = {"text": text, "kinds": TAGS, "option": "tasks.who.text"}
    if isinstance(found, str):
        with pytest.raises(ValueError, match=found):
            read(tmp_path, *marked, **options)
    else:
        raw = read(tmp_path, *marked, **options)
        assert [row["who"] for row in raw.rows] == [["B-PER", "O", "O"], ["O"] * 3]
        assert raw.rows[1]["words"] == found and raw.rows[1][text] == found
    # A task that reads no spans needs no such column.
    raw = read(tmp_path, *marked, text="tweet", kinds=MOOD)
    assert len(raw.rows) == len(cells) and "who" not in raw.columns and not raw.bad


@pytest.mark.parametrize("kind, cells, votes", [
    ("multi_label", [["spam"], [], ["spam"]], [{"spam": 1.0}, {}, {"spam": 1.0}]),
    ("single_label", ["spam", None, "spam"], [{"spam": 2}, None, {"spam": 1}]),
])  # fmt: skip
def test_the_kind_of_the_task_makes_sets(tmp_path, kind, cells, votes):
    spam = [choice("spam")]
    raw = read(
        tmp_path, task("a", spam, spam), task("b", []), task("c", spam),
        kinds={"mood": KINDS[kind]},
    )  # fmt: skip
    assert [row["mood"] for row in raw.rows] == cells
    assert [row["mood_votes"] for row in raw.rows] == votes
    config = TaskConfig("export.json", format="label_studio", label="mood", kind=kind,
                        labels=["spam", "ad"], soft_label="mood_votes")  # fmt: skip
    groups = groups_of(recipe_of(tmp_path, mood=config))
    read_group(groups[0], with_images=False)
    assert [row["mood"] for row in groups[0].raw["train"].rows] == cells
    for row in raw.rows:
        KINDS[kind].parse_soft(row["mood_votes"], ("spam", "ad"))


def test_what_is_not_read_is_counted_and_names_do_not_collide(tmp_path):
    other = [{"type": "taxonomy", "value": {}, "from_name": "t"}, {"type": "relation"}]
    named = span(0, 3, "Ann") | {"from_name": "words"}
    raw = read(tmp_path, task("Ann is", [*other, named]), task("b", [other[0]]))
    assert any(
        "3 results of types that are not read: 2 taxonomy, 1 relation" in n for n in raw.notes
    )
    assert raw.rows[0]["words"] == ["B-PER", "O"] and raw.rows[0]["tokens"] == ["Ann", "is"]
    with pytest.raises(ValueError, match="make the column mood_votes"):
        read(tmp_path, task("b", [choice("x"), number(1) | {"from_name": "mood_votes"}]))
    with pytest.raises(ValueError, match="make the column tokens"):
        read(tmp_path, task("Ann", [named, number(1) | {"from_name": "tokens"}]))


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
