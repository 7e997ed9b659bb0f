"""Soft labels of posts: rows and words, joined, taken, averaged; and the batches made of them."""

from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from helpers_data import labelled_rows, recipe_of, wordpiece_tokenizer, write_jsonl

from comoe.config.recipe import DistillConfig, Recipe, TaskConfig
from comoe.data.collator import Collator
from comoe.data.corpus import load_corpus
from comoe.data.datasets import read_as_words
from comoe.data.soft_labels import SoftLabels, mean_of, preferred
from comoe.data.tokens.split import with_soft_labels
from tests.unit.data.test_collator import TASKS, posts_of, tokenized

ROWS = [np.array([[0.25, 0.75]]), None, np.array([[1.0, 0.0], [0.5, 0.5], [0.0, 1.0]])]


def shown(soft: SoftLabels) -> list[list | None]:
    return [None if (rows := soft.rows(i)) is None else rows.tolist() for i in range(len(soft))]


def test_rows_come_back_from_any_choice_of_posts():
    soft, wanted = (
        SoftLabels.from_rows(ROWS, width=2),
        [r if r is None else r.tolist() for r in ROWS],
    )
    assert shown(soft) == wanted and soft.present.tolist() == [True, False, True]
    assert [soft.has(i) for i in range(3)] == [True, False, True]
    assert shown(soft.take(np.array([2, 2, 1, 0]))) == [wanted[i] for i in (2, 2, 1, 0)]
    assert shown(SoftLabels.join([soft, soft.take(np.array([1]))])) == [*wanted, None]
    assert shown(soft.permuted([1, 0]))[0] == [[0.75, 0.25]]
    empty = SoftLabels.from_rows([None, None], width=2)
    assert shown(empty) == [None, None] and shown(empty.take(np.array([1]))) == [None]


def test_teachers_are_averaged_where_they_know_the_post_and_the_word():
    one = SoftLabels.from_rows(ROWS, width=2)
    other = SoftLabels.from_rows([None, np.array([[0.5, 0.5]]), np.array([[0.0, 1.0]])], width=2)
    assert shown(mean_of([one, other])) == [[[0.25, 0.75]], [[0.5, 0.5]], [[0.5, 0.5]]]
    assert mean_of([one]) is one
    assert shown(preferred(other, one)) == [[[0.25, 0.75]], [[0.5, 0.5]], [[0.0, 1.0]]]


@pytest.mark.parametrize("route_by", ["token", "task"])
def test_a_soft_label_makes_a_row_and_words_find_their_first_pieces(route_by):
    tokenizer = wordpiece_tokenizer(["one", "two", "three", "four", "rome", "@user"])
    words = [None, ["one", "xyz", "two"], None]
    split = tokenized(posts_of(["one", "one xyz two", "two"], words=words, mood=[1, None, None]))
    mood = SoftLabels.from_rows([None, np.array([[0.1, 0.9]]), np.array([[0.6, 0.4]])], width=2)
    # The teacher has seen two of the three words.
    names = SoftLabels.from_rows([None, np.array([[0.2, 0.8], [0.3, 0.7]]), None], width=2)
    split = with_soft_labels(split, {"mood": mood, "names": names})
    batch = Collator(tokenizer, TASKS, row_per_task=route_by != "token")(split, np.array([0, 1, 2]))
    served = list(zip(batch.row_ids_B.tolist(), batch.task_ids_B.tolist(), strict=True))
    if route_by == "token":
        assert served == [(0, -1), (1, -1), (2, -1)]
    else:
        assert served == [(0, 0), (1, 0), (1, 3), (2, 0)]
    assert set(batch.soft_labels) == {"mood", "names"}
    found = {
        served[row]: value.tolist()
        for row, value in enumerate(batch.soft_labels["mood"])
        if not value.isnan().any()
    }
    first = -1 if route_by == "token" else 0
    assert found == {(1, first): pytest.approx([0.1, 0.9]), (2, first): pytest.approx([0.6, 0.4])}
    row = served.index((1, -1 if route_by == "token" else 3))
    at = batch.soft_labels["names"][row]
    present = ~at.isnan().any(dim=-1)
    starts = batch.word_starts_BL[row].nonzero()[:, 0].tolist()
    assert present.nonzero()[:, 0].tolist() == starts[:2] and len(starts) == 3
    torch.testing.assert_close(at[starts[:2]], torch.tensor([[0.2, 0.8], [0.3, 0.7]]))
    assert batch.take(torch.tensor([row])).soft_labels["names"].shape[0] == 1


def distilling(root: Path, **changes: Any) -> Recipe:
    """Two data sets, one of words; three more posts without labels."""
    write_jsonl(root / "mood.jsonl", [*labelled_rows(8), {"text": "no, label!", "label": None}])
    tags = [{"text": ["a", f"b{i}"], "label": ["O", "X"]} for i in range(8)]
    write_jsonl(root / "names.jsonl", tags)
    (root / "more.txt").write_text("one more\nand another\nand, finally, this\n", encoding="utf-8")
    recipe = recipe_of(
        root, mood=TaskConfig(path="mood.jsonl"), names=TaskConfig(path="names.jsonl", kind="tags")
    )
    recipe.distill.teachers, recipe.distill.unlabelled = ["x"], ["more.txt"]
    return replace(recipe, **changes)


def test_posts_without_labels_join_training_and_all_posts_become_words(tmp_path):
    recipe = distilling(tmp_path)
    train = load_corpus(recipe).splits["train"]
    assert train.group_names == ("mood", "names", "more") and (train.groups == 2).sum() == 3
    assert "no, label!" in train.texts and all(words for words in train.words)
    assert train.words[list(train.texts).index("and, finally, this")] == [
        "and",
        ",",
        "finally",
        ",",
        "this",
    ]
    assert all(column[-1] is None for column in train.labels.values())
    assert read_as_words(recipe) == ("mood", "names")
    plain = distilling(tmp_path, distill=DistillConfig())
    train = load_corpus(plain).splits["train"]
    assert train.group_names == ("mood", "names") and "no, label!" not in train.texts
    assert read_as_words(plain) == ("names",)
    recipe.distill.unlabelled, recipe.distill.unlabelled_text = ["mood.jsonl"], "body"
    with pytest.raises(
        ValueError, match="distill.unlabelled_text is 'body', but .* no such column"
    ):
        load_corpus(recipe)


@pytest.mark.parametrize("taught", [True, False])
def test_evaluation_posts_that_teachers_label_in_another_data_set_are_told(tmp_path, taught):
    recipe = distilling(tmp_path)
    write_jsonl(
        tmp_path / "test.jsonl", [*labelled_rows(2), {"text": "One  more", "label": "good"}]
    )
    recipe.tasks["mood"].splits = {"test": "test.jsonl"}
    if not taught:
        recipe.distill = DistillConfig()
    warnings = " ".join(load_corpus(recipe).report.warnings)
    told = "data set mood: 1 of 3 test posts have the text of a training post of another data set"
    assert (told in warnings) is taught


CELLS = {
    "shares": ([0.25, 0.75], [0.25, 0.75], [0.25, 0.75]),
    "counts in a mapping": ({"good": 3, "bad": 1}, [0.25, 0.75], "no probability"),
    "a label left out": ({"good": 1}, [0.0, 1.0], [0.0, 1.0]),
    "json": ('{"good": 0.5, "bad": 0.5}', [0.5, 0.5], [0.5, 0.5]),
    "nothing": (None, None, None),
    "blank": (" ", None, None),
    "all 0": ([0, 0], "gives no label a share", [0.0, 0.0]),
    "too few": ([1.0], "one number of at least 0 for each label", "one number of at least 0"),
    "below 0": ([-0.5, 1.5], "one number of at least 0", "one number of at least 0"),
    "no number": (["x", 1], "one number of at least 0", "one number of at least 0"),
    "no JSON": ("[NaN, 1]", "one number of at least 0", "one number of at least 0"),
    "a label": ("good", "neither a list", "neither a list"),
    "unknown": ({"goood": 1}, "did you mean good", "did you mean good"),
}
"""Cell -> soft label of single_label and of multi_label, or what is said of it."""


@pytest.mark.parametrize("what", CELLS)
@pytest.mark.parametrize("place, kind", [(1, "single_label"), (2, "multi_label")])
def test_a_column_of_soft_labels_is_checked_cell_by_cell(tmp_path, what, place, kind):
    cell, expected = CELLS[what][0], CELLS[what][place]
    rows = labelled_rows(8)
    write_jsonl(tmp_path / "posts.jsonl", [*rows, {"text": "last", "label": None, "votes": cell}])
    recipe = recipe_of(tmp_path, mood=TaskConfig(path="posts.jsonl", kind=kind, soft_label="votes"))
    recipe.data.validation_fraction = 0.2
    if isinstance(expected, str):
        with pytest.raises(
            ValueError, match=f"posts.jsonl:9: task mood, column votes: .*{expected}"
        ):
            load_corpus(recipe)
        return
    splits = load_corpus(recipe).splits.values()
    found = [
        soft
        for posts in splits
        for text, soft in zip(posts.texts, posts.soft_labels["mood"], strict=True)
        if text == "last"
    ]
    # Without any label the post is left out.
    assert found == [] if expected is None else found[0].tolist() == [expected]
