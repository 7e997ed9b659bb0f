"""The corpus: shared posts, missing labels, held-out parts, limits, and what the report says."""

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from helpers_data import corpus_of, labelled_rows, recipe_of, write_jsonl

from comoe.config.recipe import TaskConfig
from comoe.data.corpus import Corpus, limited, limited_labels, load_corpus
from comoe.data.posts import Post, PostSplit, unlabelled_posts
from comoe.types import IGNORED


@pytest.fixture
def shared(tmp_path) -> Path:
    """One data set with three labels per post, some of them missing in three ways."""
    rows = [
        {"text": "one", "mood": "good", "topic": "air", "stars": 4.5, "sure": 0.5},
        {"text": "two", "mood": "bad", "topic": None, "stars": "", "sure": 1},
        {"text": "three", "mood": "good", "topic": "sea"},
        {"text": "four", "mood": "", "topic": "sea", "stars": 1},
        {"text": "five"},
    ]
    write_jsonl(tmp_path / "posts" / "train.jsonl", rows)
    write_jsonl(tmp_path / "posts" / "validation.jsonl", [{"text": "six", "mood": "bad"}])
    write_jsonl(
        tmp_path / "posts" / "test.jsonl", [{"text": "seven"}, {"text": "eight", "mood": "good"}]
    )
    return tmp_path


def three_tasks(root: Path) -> Corpus:
    return load_corpus(
        recipe_of(
            root,
            mood=TaskConfig(path="posts", label="mood", confidence="sure"),
            topic=TaskConfig(path="posts", label="topic"),
            stars=TaskConfig(path="posts", label="stars", kind="regression"),
        )
    )


def test_tasks_on_one_data_set_share_its_posts(shared):
    corpus = three_tasks(shared)
    train = corpus.splits["train"]
    assert list(train.texts) == ["one", "two", "three", "four"]
    assert train.labels == {
        "mood": [1, 0, 1, None], "topic": [0, None, 1, 1], "stars": [4.5, None, None, 1.0]
    }  # fmt: skip
    assert train.confidences == {"mood": [0.5, 1.0, None, None]}
    assert train.group_names == ("posts",)
    assert [task.labels for task in corpus.tasks] == [("bad", "good"), ("air", "sea"), ()]
    stars = corpus.tasks[2]
    assert (stars.label_mean, stars.label_std) == (2.75, 1.75)
    left_out = "data set posts: 1 training posts without any label left out"
    assert left_out in corpus.report.notes
    # Test posts without labels stay for predictions.
    test = corpus.splits["test"]
    assert list(test.texts) == ["seven", "eight"] and test.labels["mood"] == [None, 1]


def test_the_report_counts_posts_and_labels(shared):
    report = three_tasks(shared).report
    assert report.posts == {"posts": {"train": 4, "validation": 1, "test": 2}}
    assert report.labels["mood"] == {
        "train": {"bad": 1, "good": 2}, "validation": {"bad": 1}, "test": {"good": 1}
    }  # fmt: skip
    assert report.labels["stars"] == {"train": {"labelled": 2}}
    assert report.confidence == {"mood": 0.75}
    assert "task topic: no validation post has a label; it cannot be measured" in report.warnings
    mean = "task mood: mean confidence of the training labels 0.750"
    expected = {
        "data set posts: 4 train, 1 validation, 2 test", "task mood, train: bad 1, good 2",
        f"{mean} (not used: confidence_strategy is none)",
    }  # fmt: skip
    assert expected <= set(report.lines())
    report.confidence_unused.clear()
    assert mean in report.lines()


def test_other_columns_or_files_make_another_data_set(tmp_path):
    rows = [
        row | {"topic": "xy"[i % 2], "aspect": "door"} for i, row in enumerate(labelled_rows(6))
    ]
    for folder, count in (("posts", 6), ("more/posts", 4)):
        write_jsonl(tmp_path / folder / "train.jsonl", rows[:count])
        write_jsonl(tmp_path / folder / "validation.jsonl", rows[:2])
    recipe = recipe_of(
        tmp_path,
        mood=TaskConfig(path="posts"),
        topic=TaskConfig(path="posts", label="topic", pair="aspect"),
        other=TaskConfig(path="more/posts"),
    )
    train = load_corpus(recipe).splits["train"]
    assert train.group_names == ("posts", "posts/topic", "posts/other")
    assert list(train.groups) == [0] * 6 + [1] * 6 + [2] * 4
    assert train.labels["mood"] == [0, 1] * 3 + [None] * 10
    assert train.labels["topic"] == [None] * 6 + [0, 1] * 3 + [None] * 4
    assert train.pairs == [None] * 6 + ["door"] * 6 + [None] * 4


def test_without_a_validation_split_a_stratified_part_is_held_out(tmp_path):
    labels = ["a"] * 70 + ["b"] * 20 + ["c"] * 9 + ["rare"]
    rows = [{"text": f"post {i}", "label": label} for i, label in enumerate(labels)]
    write_jsonl(tmp_path / "posts.jsonl", rows)
    recipe = recipe_of(tmp_path, t=TaskConfig(path="posts.jsonl"))
    recipe.data.validation_fraction = 0.2
    corpus = load_corpus(recipe)
    train, validation = corpus.splits["train"], corpus.splits["validation"]
    # A class of one post does not hinder it.
    assert list(np.bincount(validation.labels["t"]))[:2] == [14, 4] and len(validation) == 20
    assert sorted([*train.texts, *validation.texts]) == sorted(row["text"] for row in rows)
    assert corpus.report.notes == [
        "data set posts: no validation split; 20 of 100 training posts held out, "
        "stratified by label, by data.split_seed 0"
    ]
    assert load_corpus(recipe).splits["validation"].texts == validation.texts


def test_a_test_part_is_held_out_before_the_validation_part_and_both_are_shares_of_all(tmp_path):
    moods, topics = ["bad", "good"], ["art", "sport", "war"]
    rows = [{"text": f"post {i}", "mood": moods[i % 2], "topic": topics[i % 3 if i % 2 else 0]}
            for i in range(240)]  # fmt: skip
    rows += [{"text": "alone", "mood": "good", "topic": "sport"}]
    write_jsonl(tmp_path / "posts.jsonl", rows)
    recipe = recipe_of(
        tmp_path,
        mood=TaskConfig(path="posts.jsonl", label="mood"),
        topic=TaskConfig(path="posts.jsonl", label="topic"),
    )
    recipe.data.stratify = "all"
    before = load_corpus(recipe).splits["validation"].texts
    recipe.data.test_fraction, recipe.data.validation_fraction = 0.25, 0.15
    corpus = load_corpus(recipe)
    sizes = {split: len(posts) for split, posts in corpus.splits.items()}
    assert sizes == {"train": 145, "validation": 36, "test": 60}
    texts = [text for posts in corpus.splits.values() for text in posts.texts]
    assert sorted(texts) == sorted(row["text"] for row in rows)
    # Every combination of both labels has its share in every part: 120 bad art, 40 of each good one.
    for split, (of_bad, of_good) in {"test": (30, 10), "validation": (18, 6)}.items():
        labels = corpus.splits[split].labels
        counts = np.zeros((2, 3), dtype=int)
        np.add.at(counts, (labels["mood"], labels["topic"]), 1)
        assert abs(counts[0, 0] - of_bad) <= 1 and counts[0, 1:].tolist() == [0, 0]
        assert np.abs(counts[1] - of_good).max() <= 1
    assert [note.split("; ")[1] for note in corpus.report.notes if "no test split" in note] == [
        "60 of 241 training posts held out, stratified by the labels of mood, topic, by data.split_seed 0"
    ]
    # A test file beside it stays; without a fraction the validation part is what it was.
    recipe.data.test_fraction, recipe.data.validation_fraction = 0, 0.1
    assert load_corpus(recipe).splits["validation"].texts == before
    recipe.data.stratify = "first"
    (note,) = load_corpus(recipe).report.notes
    assert "stratified by label" in note and "test" not in load_corpus(recipe).splits


def test_without_strata_a_run_of_one_task_holds_out_the_same_posts(tmp_path):
    rows = [{"text": f"post {i % 380}", "mood": "ab"[i % 2]} | ({"topic": "xy"[i % 3 % 2]} if i % 4 else {})
            for i in range(400)]  # fmt: skip
    write_jsonl(tmp_path / "posts.jsonl", rows)
    tasks = {
        "mood": TaskConfig(path="posts.jsonl", label="mood"),
        "topic": TaskConfig(path="posts.jsonl", label="topic"),
    }

    def parts(*names: str) -> dict[str, set[str]]:
        recipe = recipe_of(tmp_path, **{name: tasks[name] for name in names})
        recipe.data.stratify, recipe.data.test_fraction = "none", 0.1
        corpus = load_corpus(recipe)
        assert sum("held out, by their texts" in note for note in corpus.report.notes) == 2
        return {split: set(posts.texts) for split, posts in corpus.splits.items()}

    joint, mood, topic = parts("mood", "topic"), parts("mood"), parts("topic")
    assert (
        joint == mood and not joint["test"] & joint["train"] | joint["validation"] & joint["train"]
    )
    # Posts without a topic are in no part of its own; all others are where they were.
    with_topic = {row["text"] for row in rows if "topic" in row}
    assert topic == {split: texts & with_topic for split, texts in joint.items()}
    assert 20 < len(joint["test"]) < 60 and 20 < len(joint["validation"]) < 60
    write_jsonl(tmp_path / "posts.jsonl", rows[:2])
    with pytest.raises(ValueError, match="2 posts cannot give up a share of"):
        parts("mood")


def test_too_many_combinations_are_stratified_by_the_first_task(tmp_path):
    rows = [{"text": f"post {i}", "mood": "ab"[i % 2], "topic": str(i % 20)} for i in range(80)]
    write_jsonl(tmp_path / "posts.jsonl", rows)
    recipe = recipe_of(
        tmp_path,
        mood=TaskConfig(path="posts.jsonl", label="mood"),
        topic=TaskConfig(path="posts.jsonl", label="topic"),
    )
    recipe.data.stratify = "all"
    corpus = load_corpus(recipe)
    assert np.bincount(corpus.splits["validation"].labels["mood"]).tolist() == [4, 4]
    assert "stratified by label" in corpus.report.notes[0]


def test_posts_of_evaluation_depend_on_the_split_seed_alone(tmp_path):
    for name, count in (("train", 40), ("validation", 30), ("test", 30)):
        write_jsonl(tmp_path / "whole" / f"{name}.jsonl", labelled_rows(count, start=len(name) * 9))
    write_jsonl(tmp_path / "alone.jsonl", labelled_rows(50))
    recipe = recipe_of(
        tmp_path, a=TaskConfig(path="whole"), b=TaskConfig(path="alone.jsonl", limit=20)
    )
    recipe.data.limit_eval, recipe.data.limit_per_task = 9, 25

    def drawn(split_seed: int | str, seed: int) -> list[set[str]]:
        recipe.data.split_seed, recipe.train.seed = split_seed, seed
        splits = load_corpus(recipe).splits
        return [set(splits[name].texts) for name in ("train", "validation", "test")]

    first, second = drawn(0, 0), drawn(0, 1)
    assert first[1:] == second[1:] and first[0] != second[0]
    assert all(one != other for one, other in zip(drawn(1, 0)[1:], first[1:], strict=True))
    # As before the option.
    assert drawn("train", 0) == first
    assert all(one != other for one, other in zip(drawn("train", 1)[1:], first[1:], strict=True))


@pytest.mark.parametrize(
    ("limits", "counts"),
    [((None, None, None), (60, 30, 40)), ((10, None, None), (10, 30, 40)), ((10, 10, 10), (10, 10, 10)),
     ((10, None, 1), (10, 30, 1)), ((99, 99, 99), (60, 30, 40))],
)  # fmt: skip
def test_a_task_keeps_at_most_its_limit_of_labels(limits, counts):
    """Labels of a are in all 60 posts, of b in the first 30, of c in the last 40."""

    def post(row: int) -> Post:
        labels = {"a": row, "b": row if row < 30 else None, "c": row if row >= 20 else None}
        return Post(
            str(row), labels=labels, confidences={"a": 0.5}, soft_labels={"a": np.ones((1, 2))}
        )

    names = dict(tasks=("a", "b", "c", "other"), confidences=("a",), soft_labels=("a",))
    posts = PostSplit.from_posts([post(row) for row in range(60)], **names)
    kept = limited_labels(posts, tasks=limiting(**dict(zip("abc", limits, strict=True))), seed=3)
    present = {
        task: {int(text) for text, value in zip(kept.texts, kept.labels[task], strict=True) if value is not None}
        for task in "abc"
    }  # fmt: skip
    assert tuple(map(len, present.values())) == counts
    assert {int(text) for text in kept.texts} == set().union(*present.values())
    for column in (kept.confidences["a"], kept.soft_labels["a"]):
        assert [value is None for value in column] == [value is None for value in kept.labels["a"]]
    # One limit of tasks that label every post is so many posts.
    alike = replace(posts, labels={task: posts.labels["a"] for task in "abc"})
    for limit in (1, 7):
        few = limited_labels(alike, tasks=limiting(a=limit, b=limit, c=limit), seed=3)
        assert list(few.texts) == list(limited(posts, count=limit, seed=3).texts)
        more = limited_labels(alike, tasks=limiting(a=limit, b=limit + 5, c=None), seed=3)
        assert len(more) == 60 and more.labels["b"].count(None) == 60 - limit - 5


def limiting(**limits: int | None) -> dict[str, TaskConfig]:
    return {name: TaskConfig(limit=limit) for name, limit in limits.items()}


def test_posts_per_label_are_the_first_of_one_order():
    """Of 8 a part of 16, other posts per seed, every post of a label that has too few."""
    rng = np.random.default_rng(0)
    one = [int(label) for label in rng.choice(3, 200, p=[0.7, 0.28, 0.02])]
    sets = [tuple(np.flatnonzero(rng.random(3) < 0.4).tolist()) for _ in one]
    rows = list(zip(one, sets, strict=True))
    posts = PostSplit.from_posts(
        [Post(str(row), labels={"one": a, "sets": b}) for row, (a, b) in enumerate(rows)],
        tasks=("one", "sets"),
    )

    def kept(task: str, kind: str, *, count: int, seed: int, limit: int | None = None) -> PostSplit:
        other = {"one": "sets", "sets": "one"}[task]
        bare = replace(posts, labels=dict(posts.labels) | {other: [None] * len(posts)})
        config = TaskConfig(kind=kind, limit_per_label=count, limit=limit)
        return limited_labels(bare, tasks={task: config, other: TaskConfig()}, seed=seed)

    few = kept("one", "single_label", count=8, seed=1)
    assert np.bincount(few.labels["one"]).tolist() == [8, 8, min(8, one.count(2))]
    more = kept("one", "single_label", count=16, seed=1)
    assert np.bincount(more.labels["one"])[:2].tolist() == [16, 16]
    assert set(few.texts) < set(more.texts)
    assert set(few.texts) != set(kept("one", "single_label", count=8, seed=2).texts)
    assert len(kept("one", "single_label", count=8, seed=1, limit=5)) == 5
    # Of sets: each label and the empty set often enough, and no post that none of them needed.
    found = kept("sets", "multi_label", count=8, seed=1).labels["sets"]
    counts = [sum(label in labels for labels in found) for label in range(3)]
    assert min(counts) >= 8 and found.count(()) == 8
    assert len(found) <= 4 * 8


def test_task_limits_drop_posts_and_say_so(shared):
    recipe = recipe_of(
        shared,
        mood=TaskConfig(path="posts", label="mood"),
        stars=TaskConfig(path="posts", label="stars", kind="regression", limit=2),
        topic=TaskConfig(path="posts", label="topic", limit=1),
    )
    recipe.tasks["mood"].limit = 2
    with pytest.raises(ValueError, match="tasks.topic: all 1 training labels are the same.*limit"):
        load_corpus(recipe)
    recipe.tasks["topic"].limit = 2
    found = set()
    for recipe.train.seed in range(8):
        try:
            corpus = load_corpus(recipe)
        except ValueError:
            continue
        train = corpus.splits["train"]
        assert [len(train) - train.labels[task].count(None) for task in recipe.tasks] == [2, 2, 2]
        said = "posts left out by tasks.mood.limit, tasks.stars.limit, tasks.topic.limit"
        assert any(said in note for note in corpus.report.notes) == (len(train) < 4)
        found.add(len(train))
    assert 3 in found


def test_equal_texts_are_held_out_together(tmp_path):
    rows = [{"text": f"post {i // 2}", "aspect": f"{i}", "label": "ab"[i % 2]} for i in range(40)]
    write_jsonl(tmp_path / "posts.jsonl", rows)
    recipe = recipe_of(tmp_path, t=TaskConfig(path="posts.jsonl", pair="aspect"))
    recipe.data.validation_fraction = 0.25
    corpus = load_corpus(recipe)
    train, validation = (corpus.splits[name] for name in ("train", "validation"))
    assert len(validation) == 10
    assert not set(train.texts) & set(validation.texts)


@pytest.mark.parametrize(("count", "fraction"), [(1, 0.1), (10, 0.0)])
def test_nothing_to_hold_out_says_what_to_do(tmp_path, count, fraction):
    write_jsonl(tmp_path / "posts.jsonl", labelled_rows(count))
    recipe = recipe_of(tmp_path, t=TaskConfig(path="posts.jsonl", labels=["bad", "good"]))
    recipe.data.validation_fraction = fraction
    with pytest.raises(ValueError, match="no validation split beside it.*Add a validation file"):
        load_corpus(recipe)


def test_a_limit_draws_by_the_seed_and_a_smaller_one_draws_a_part(tmp_path):
    for name in ("train", "validation", "test"):
        write_jsonl(tmp_path / "posts" / f"{name}.jsonl", labelled_rows(60, start=len(name) * 100))
    recipe = recipe_of(tmp_path, t=TaskConfig(path="posts"))

    def drawn(limit: int | None, *, seed: int = 0) -> list[str]:
        recipe.data.limit_per_task, recipe.train.seed = limit, seed
        return list(load_corpus(recipe).splits["train"].texts)

    assert len(drawn(None)) == 60
    assert len(drawn(20)) == 20
    assert drawn(20) == drawn(20) != drawn(20, seed=1)
    assert set(drawn(10)) < set(drawn(20))
    recipe.data.limit_eval = 7
    assert load_corpus(recipe).report.posts == {"posts": {"train": 20, "validation": 7, "test": 7}}


def test_adding_a_data_set_leaves_the_draws_of_the_others_alone(tmp_path):
    for name in ("a", "b"):
        write_jsonl(tmp_path / f"{name}.jsonl", labelled_rows(50))
    drawn = []
    for names in ("b", "ab"):
        tasks = {name: TaskConfig(path=f"{name}.jsonl") for name in names}
        recipe = recipe_of(tmp_path, **tasks)
        recipe.data.limit_per_task = 9
        train = load_corpus(recipe).splits["train"]
        drawn.append([train.texts[i] for i in np.flatnonzero(train.groups == len(names) - 1)])
    assert drawn[0] == drawn[1]


def test_posts_that_are_also_training_posts_are_warned_of(tmp_path):
    test = [{"text": "POST  number 3 "}, {"text": "new"}, {"text": "new"}]
    splits = {"train": labelled_rows(10), "validation": labelled_rows(4, start=8), "test": test}
    for name, rows in splits.items():
        write_jsonl(tmp_path / "posts" / f"{name}.jsonl", rows)
    warnings = load_corpus(recipe_of(tmp_path, t=TaskConfig(path="posts"))).report.warnings
    assert warnings == [
        f"data set posts: {found} posts have the text of a training post; their scores are too high"
        for found in ("2 of 4 validation", "1 of 3 test")
    ]


def test_labels_of_the_recipe_and_of_the_data_set_keep_their_order(tmp_path):
    folder = tmp_path / "posts"
    folder.mkdir()
    for name in ("train", "val"):
        (folder / f"{name}_text.txt").write_text(f"{name} a\n{name} b\n")
        (folder / f"{name}_labels.txt").write_text("0\n1\n")
    recipe = recipe_of(tmp_path, t=TaskConfig(path="posts"))
    assert load_corpus(recipe).tasks[0].labels == ("0", "1")
    (folder / "mapping.txt").write_text("0\tz\n1\ta\n")
    corpus = load_corpus(recipe)
    assert corpus.tasks[0].labels == ("z", "a")
    assert corpus.splits["train"].labels["t"] == [0, 1]
    recipe.tasks["t"].labels = ["a", "z"]
    assert load_corpus(recipe).splits["train"].labels["t"] == [1, 0]
    (folder / "mapping.txt").unlink()
    assert load_corpus(recipe).splits["train"].labels["t"] == [
        0,
        1,
    ]  # ids in the order of tasks.t.labels


def test_tags_come_with_words_and_plain_texts_are_split_at_blanks(tmp_path):
    rows = [
        {"tokens": ["Ann", "in", "Rome"], "tags": ["B-per", "O", "B-loc"]},
        {"tokens": "to Rome", "tags": "O B-loc"},
        {"tokens": ["Bob", "x"], "tags": ["B-per", None]},
    ]
    corpus = corpus_of(tmp_path, rows, kind="tags", text="tokens", label="tags")
    train = corpus.splits["train"]
    assert corpus.tasks[0].labels == ("O", "B-loc", "B-per")
    assert list(train.words) == [["Ann", "in", "Rome"], ["to", "Rome"], ["Bob", "x"]]
    assert list(train.texts) == ["Ann in Rome", "to Rome", "Bob x"]
    assert train.labels["t"] == [[2, 0, 1], [0, 1], [2, IGNORED]]
    assert corpus.report.labels["t"]["train"] == {"O": 2, "B-loc": 2, "B-per": 2}


def test_multi_labels_are_counted_one_by_one(tmp_path):
    labels = {"p": ["a", "b"], "q": [], "r": "b; c"}
    rows = [{"text": text, "label": label} for text, label in labels.items()]
    corpus = corpus_of(tmp_path, rows, kind="multi_label")
    assert corpus.splits["train"].labels["t"] == [(0, 1), (), (1, 2)]
    assert corpus.report.labels["t"]["train"] == {"a": 1, "b": 2, "c": 1}


def test_class_weights_follow_the_posts_that_are_kept(tmp_path):
    rows = [{"text": f"post {i}", "label": "common" if i % 4 else "rare"} for i in range(16)]
    weights = corpus_of(tmp_path, rows, class_weights="balanced").tasks[0].class_weights
    assert weights == pytest.approx((16 / (2 * 12), 16 / (2 * 4)))


def test_half_a_surrogate_pair_is_replaced_and_a_whole_one_is_a_character(tmp_path):
    rows = ['{"text": "a \\ud83d", "label": "x"}', '{"text": "\\ud83d\\ude00", "label": "y"}']
    assert list(corpus_of(tmp_path, rows).splits["train"].texts) == ["a \ufffd", "😀"]


def test_unlabelled_posts_must_fit_their_pairs():
    posts = unlabelled_posts(["a", "b"], tasks=["t"], pairs=["x", None])
    assert posts.labels == {"t": [None, None]} and posts.pairs == ["x", None]
    with pytest.raises(ValueError, match="2 texts and 1 pairs"):
        unlabelled_posts(["a", "b"], tasks=["t"], pairs=["x"])


TWINS = {
    "upper and lower case": ("True", "true"),
    "an invisible sign": ("good", "go\u200bod"),
    "composed and not": ("caf\u00e9", "cafe\u0301"),
    "full-width": ("1st", "\uff11st"),
    "two blanks": ("very good", "very  good"),
    "a blank without a break": ("very good", "very\u00a0good"),
    "a soft hyphen": ("good", "go\u00adod"),
    "a text direction": ("good", "\u202egood"),
    "another form of an emoji": ("\u2764", "\u2764\ufe0f"),
    "a ligature": ("fine", "\ufb01ne"),
}


@pytest.mark.parametrize("what", TWINS)
def test_labels_that_look_alike_are_told_with_both(what: str, tmp_path: Path) -> None:
    one, other = TWINS[what]
    rows = [{"text": f"post {i}", "label": label} for i, label in enumerate([one, other, "x"] * 4)]
    write_jsonl(tmp_path / "posts" / "train.jsonl", rows)
    corpus = load_corpus(recipe_of(tmp_path, mood=TaskConfig(path="posts")))
    (told,) = [line for line in corpus.report.warnings if "look alike" in line]
    assert told.startswith("task mood: the labels ") and told.endswith("if they mean the same")
    assert all(ascii(label) in told for label in (one, other))


@pytest.mark.parametrize("labels", [["a", "b", "ab"], ["\u0928\u0940", "\u0928\u093e"], ["1", "2"]])
def test_labels_that_differ_are_not(labels: list[str], tmp_path: Path) -> None:
    rows = [{"text": f"post {i}", "label": label} for i, label in enumerate(labels * 4)]
    write_jsonl(tmp_path / "posts" / "train.jsonl", rows)
    corpus = load_corpus(recipe_of(tmp_path, mood=TaskConfig(path="posts")))
    assert not [line for line in corpus.report.warnings if "look alike" in line]


@pytest.mark.parametrize(("labels", "told"), [(40, True), (4, False)])
def test_a_label_for_each_post_is_told(labels: int, told: bool, tmp_path: Path) -> None:
    rows = [{"text": f"post {i}", "label": f"l{i % labels}"} for i in range(40)]
    write_jsonl(tmp_path / "posts" / "train.jsonl", rows)
    write_jsonl(tmp_path / "posts" / "validation.jsonl", rows[:4])
    corpus = load_corpus(recipe_of(tmp_path, mood=TaskConfig(path="posts")))
    found = [line for line in corpus.report.warnings if "one training post each" in line]
    assert bool(found) == told and (not told or "40 of its 40 labels" in found[0])


@pytest.mark.parametrize(
    "other", ["train.csv", "training.tsv", "train.txt", "train_text.txt", "validation.csv", "dev.txt", "test.tsv"]
)  # fmt: skip
def test_a_file_that_is_passed_over_for_its_format_is_told(other: str, tmp_path: Path) -> None:
    rows = [{"text": f"post {i}", "label": "ab"[i % 2]} for i in range(20)]
    write_jsonl(tmp_path / "posts" / "train.jsonl", rows)
    (tmp_path / "posts" / other).write_text("text\tlabel\none\ta\ntwo\tb\n" * 3)
    tasks = {format: TaskConfig(path="posts", format=format) for format in ("auto", "jsonl")}
    told = {}
    for format, task in tasks.items():
        try:
            report = load_corpus(recipe_of(tmp_path, mood=task)).report
        except ValueError as error:
            # train_text.txt makes it a folder of TweetEval, which lacks the labels.
            assert other == "train_text.txt" and "has no labels" in str(error)
            return
        told[format] = [line for line in report.warnings if "not read" in line]
    (line,) = told["auto"]
    assert other in line and "is read as jsonl; tasks.mood.format or tasks.mood.splits." in line
    assert not told["jsonl"]
