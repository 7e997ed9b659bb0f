"""Columns beside text and label: posts held out by value, slices, other domains, labels drawn evenly."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
from helpers_data import recipe_of, write_jsonl

from comoe.config.recipe import Recipe, TaskConfig
from comoe.data.columns import MAX_SLICES, extra_columns
from comoe.data.corpus import Corpus, load_corpus
from comoe.data.sampling.mixing import balanced_classes

AIRLINES = ("Delta", "United", "Virgin America")


@pytest.fixture
def airline(tmp_path) -> Path:
    """Three labels on one post: a reason for complaints only, an airline for all."""

    def rows(count: int) -> list[dict[str, Any]]:
        made = []
        for number in range(count):
            row = {
                "text": f"flight {count} {number}",
                "airline": AIRLINES[number % 3],
                "late": number // 4 % 2 == 0,
            }
            row |= (
                {"sentiment": "negative", "reason": ("bag", "crew")[number // 2 % 2]}
                if number % 2
                else {}
            )
            made.append({"sentiment": "positive"} | row)
        return made

    write_jsonl(tmp_path / "airline" / "train.jsonl", rows(24))
    write_jsonl(tmp_path / "airline" / "validation.jsonl", rows(12))
    write_jsonl(tmp_path / "airline" / "test.jsonl", [{"text": "no label"}])
    return tmp_path


def recipe_with(root: Path, **options: Any) -> Recipe:
    shared = {"path": "airline", "hold_out": options.pop("hold_out", {})}
    return recipe_of(
        root,
        sentiment=TaskConfig(label="sentiment", **shared, **options),
        reason=TaskConfig(label="reason", **shared),
        airline=TaskConfig(label="airline", **shared),
    )


def texts_of(corpus: Corpus, split: str) -> set[str]:
    return set(corpus.splits[split].texts)


def test_tasks_with_other_label_columns_train_on_the_same_posts_and_missing_labels_are_fine(
    airline,
):
    train = load_corpus(recipe_with(airline)).splits["train"]
    assert len(train) == 24 and len(train.group_names) == 1
    assert [value is None for value in train.labels["reason"]] == [True, False] * 12
    assert None not in train.labels["sentiment"] and set(train.labels["airline"]) == {0, 1, 2}


def test_held_out_posts_leave_training_and_validation_and_become_a_split(airline):
    whole = load_corpus(recipe_with(airline))
    corpus = load_corpus(recipe_with(airline, hold_out={"airline": ["Delta"]}))
    sizes = {split: len(posts) for split, posts in corpus.splits.items()}
    assert sizes == {"train": 16, "validation": 8, "test": 1, "unseen": 12}
    assert set(corpus.splits["unseen"].columns["airline"]) == {"Delta"}
    parts = [texts_of(corpus, split) for split in ("train", "validation", "unseen")]
    assert parts[0] | parts[1] | parts[2] == texts_of(whole, "train") | texts_of(
        whole, "validation"
    )
    assert sum(map(len, parts)) == 36
    note = "held out airline Delta: 8 train and 4 validation posts are the split unseen"
    assert f"data set airline: {note}" in corpus.report.notes
    assert corpus.report.posts["airline"]["unseen"] == 12
    # Truth values are held out by their names.
    corpus = load_corpus(recipe_with(airline, hold_out={"late": ["true"]}))
    assert set(corpus.splits["unseen"].columns["late"]) == {"true"}
    assert len(corpus.splits["train"]) == 12


@pytest.mark.parametrize(
    ("hold_out", "message"),
    [({"airline": ["Unitd"]}, "has the value 'Unitd'; did you mean United?"),
     ({"arline": ["United"]}, "tasks.sentiment.hold_out is 'arline', which does not exist; did you mean airline?"),
     ({"airline": []}, "tasks.sentiment.hold_out.airline lists no value"),
     ({"airline": list(AIRLINES)}, "hold_out takes every training post away")],
)  # fmt: skip
def test_what_cannot_be_held_out_is_refused_with_what_can(airline, hold_out, message):
    with pytest.raises(ValueError) as caught:
        load_corpus(recipe_with(airline, hold_out=hold_out))
    assert message in str(caught.value)


def test_training_in_one_domain_and_testing_in_another_is_a_matter_of_file_names(tmp_path):
    for name in ("laptops", "restaurants"):
        for split, count in (("train", 8), ("validation", 4)):
            rows = [
                {"text": f"{name} {split} {i}", "label": ("bad", "good")[i % 2]}
                for i in range(count)
            ]
            write_jsonl(tmp_path / "absa" / name / f"{split}.jsonl", rows)
    splits = {"train": "laptops/train.jsonl", "validation": "laptops/validation.jsonl"}
    splits["test"] = "restaurants/validation.jsonl"
    corpus = load_corpus(recipe_of(tmp_path, mood=TaskConfig(path="absa", splits=splits)))
    assert {split: {text.split()[0] for text in posts.texts} for split, posts in corpus.splits.items()} == {
        "train": {"laptops"}, "validation": {"laptops"}, "test": {"restaurants"},
    }  # fmt: skip
    assert corpus.splits["test"].labels["mood"] == [0, 1, 0, 1]


def test_extra_columns_are_kept_as_text_and_none_where_a_post_has_none(airline):
    write_jsonl(
        airline / "other" / "train.jsonl",
        [{"text": f"o {i}", "label": "ab"[i % 2]} for i in range(20)],
    )
    recipe = recipe_with(airline, slices=["late", "airline"])
    recipe.tasks["other"] = TaskConfig(path="other")
    assert extra_columns(recipe) == ("late", "airline")
    corpus = load_corpus(recipe)
    train = corpus.splits["train"]
    late = train.columns["late"]
    assert list(late[3:5]) == ["true", "false"] and set(late[24:]) == {None}
    assert corpus.splits["test"].columns == {"late": [None], "airline": [None]}
    assert train.take(np.array([1, 25])).columns["airline"] == ["United", None]


def test_a_column_that_a_loss_predicts_is_kept_and_must_exist(airline):
    recipe = recipe_with(airline)
    recipe.loss.adversarial.predict = "arline"
    assert extra_columns(recipe) == ()  # switched off: nobody reads it
    recipe.loss.adversarial.weight = 0.1
    with pytest.raises(
        ValueError, match="loss.adversarial.predict is 'arline'.*did you mean airline?"
    ):
        load_corpus(recipe)
    recipe.loss.adversarial.predict = "airline"
    assert load_corpus(recipe).splits["train"].columns["airline"][:2] == ["Delta", "United"]


def test_slices_by_a_column_that_is_not_there_or_has_too_many_values_are_refused(airline):
    with pytest.raises(
        ValueError,
        match="tasks.sentiment.slices is 'lat', which does not exist; did you mean late?",
    ):
        load_corpus(recipe_with(airline, slices=["lat"]))
    rows = [{"text": f"p {i}", "label": "ab"[i % 2], "id": i} for i in range(MAX_SLICES + 1)]
    write_jsonl(airline / "many" / "train.jsonl", rows)
    with pytest.raises(
        ValueError, match=r"column id has 51 values.*a bound of its numbers \(id<0.5\)"
    ):
        load_corpus(recipe_of(airline, many=TaskConfig(path="many", slices=["id"])))
    bounded = load_corpus(recipe_of(airline, many=TaskConfig(path="many", slices=["id<20"])))
    assert bounded.tasks[0].slices == ("id<20",) and set(bounded.splits["train"].columns) == {"id"}
    rows[7]["id"] = "seven"
    write_jsonl(airline / "many" / "train.jsonl", rows)
    with pytest.raises(
        ValueError, match="slices: id<20 compares numbers, but id is 'seven' in .*:8;"
    ):
        load_corpus(recipe_of(airline, many=TaskConfig(path="many", slices=["id<20"])))
    with pytest.raises(ValueError, match="slices is 'ids', which does not exist; did you mean id?"):
        load_corpus(recipe_of(airline, many=TaskConfig(path="many", slices=["ids<20"])))


def test_tasks_of_a_data_set_may_ask_for_even_labels_and_all_hold_out_the_same(airline):
    recipe = recipe_with(airline, balanced_sampling=True)
    corpus = load_corpus(recipe)
    classes = balanced_classes(corpus.splits["train"], corpus.tasks, recipe.tasks)
    assert classes[:, 0].tolist() == corpus.splits["train"].labels["sentiment"]
    recipe.tasks["reason"].balanced_sampling = True
    both = balanced_classes(corpus.splits["train"], corpus.tasks, recipe.tasks)
    reasons = corpus.splits["train"].labels["reason"]
    assert both[:, 1].tolist() == [-1 if value is None else value for value in reasons]
    other = recipe_with(airline)
    other.tasks["reason"].hold_out = {"airline": ["Delta"]}
    sets = recipe_with(airline, kind="multi_label", balanced_sampling=True)
    for wrong, message in (
        (other, "tasks.reason.hold_out is .* but tasks.sentiment, which shares its posts"),
        (sets, "balanced_sampling needs one label of several per post"),
    ):
        with pytest.raises(ValueError, match=message):
            load_corpus(wrong)
