"""Authors and contexts in the data: entries, labels, parts, rows of a batch, and what is refused."""

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from comoe.config.recipe import DataConfig, Recipe, TaskConfig
from comoe.config.validate import validate
from comoe.data.authors import authors_in_order, by_author
from comoe.data.collator import Collator
from comoe.data.corpus import load_corpus
from comoe.data.posts import Post
from comoe.data.text.noise import noisy
from comoe.data.tokens.split import TokenizedSplit, tokenize_split
from comoe.tasks.task import Task
from comoe.types import IGNORED
from tests.helpers_data import recipe_of, wordpiece_tokenizer, write_jsonl

# Interleaved; the author c has one post, and the label of b is in one row alone.
ROWS = [
    {"text": "one", "user": "a", "trait": "x"},
    {"text": "two", "user": "b", "trait": None},
    {"text": "one two", "user": "a", "trait": "x"},
    {"text": "three", "user": "b", "trait": "y"},
    {"text": "four", "user": "c", "trait": "y"},
    {"text": "one two three", "user": "a", "trait": None},
]
WORDS = ["one", "two", "three", "four", "five", "six"]
AUTHORS = TaskConfig(path="posts", label="trait", author="user", per="author")
TRAIT = Task("t", "single_label", ("x", "y"), "macro_f1", reads="author")


def corpus_of(root: Path, task: TaskConfig, *, train=ROWS, validation=None, **data):
    write_jsonl(root / "posts" / "train.jsonl", train)
    if validation is not None:
        write_jsonl(root / "posts" / "validation.jsonl", validation)
    recipe = recipe_of(root, t=task)
    return load_corpus(replace(recipe, data=replace(recipe.data, **data)))


def other_authors(rows=ROWS):
    return [row | {"user": f"v{row['user']}"} for row in rows]


def tokenized(corpus, **data) -> TokenizedSplit:
    config = DataConfig(**{"max_length": 16} | data)
    return tokenize_split(
        corpus.splits["train"], wordpiece_tokenizer(WORDS), tasks=corpus.tasks, config=config
    )


def words_of(rows) -> list[list[str]]:
    tokenizer = wordpiece_tokenizer(WORDS)
    return [tokenizer.decode(row.input_ids, skip_special_tokens=True).split() for row in rows]


def test_authors_are_the_entries_whatever_the_order_of_their_posts(tmp_path):
    corpus = corpus_of(tmp_path, AUTHORS, validation=other_authors())
    train = corpus.splits["train"]
    assert train.columns["user"] == ["a", "b", "c"] and train.labels["t"] == [0, 1, 1]
    assert train.texts == ["one\none two\none two three", "two\nthree", "four"]
    assert [[post.text for post in some] for some in train.members] == [
        ["one", "one two", "one two three"], ["two", "three"], ["four"],
    ]  # fmt: skip
    assert corpus.report.labels["t"]["train"] == {"x": 1, "y": 2}
    assert any("3 train authors with 6 posts" in note for note in corpus.report.notes)
    (task,) = corpus.tasks
    assert task.reads == "author" and Task.from_dict(task.to_dict()) == task


def test_authors_with_two_labels_are_refused_or_set_aside_with_both_lines(tmp_path):
    rows = [*ROWS, {"text": "five", "user": "b", "trait": "x"}]
    with pytest.raises(ValueError, match=r"train.jsonl:7: task t: .*line 4.*tasks.t.per .*'b'"):
        corpus_of(tmp_path, AUTHORS, train=rows, validation=other_authors())
    corpus = corpus_of(tmp_path, AUTHORS, train=rows, validation=other_authors(), on_error="skip")
    assert [row.line for row in corpus.report.set_aside] == [7]
    assert corpus.splits["train"].texts[1] == "two\nthree"


@pytest.mark.parametrize(
    ("task", "rows", "message"),
    [
        (AUTHORS, [*ROWS, {"text": "x", "user": " ", "trait": "x"}], r":7: column user is empty"),
        (replace(AUTHORS, author="usr"), ROWS, r"tasks.t.author is 'usr'.*did you mean user"),
        (TaskConfig(path="posts", label="trait", context="parent"), ROWS, r"tasks.t.context is 'parent'"),
    ],
)  # fmt: skip
def test_an_empty_author_and_a_column_that_is_not_there_are_named(tmp_path, task, rows, message):
    with pytest.raises(ValueError, match=message):
        corpus_of(tmp_path, task, train=rows)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"author": None}, "tasks.t.per is author; name the column"),
        ({"kind": "tags"}, r"tasks.t.per \(author\) has no meaning for kind tags"),
        ({"image": "image"}, "reads the texts of several posts and no tasks.t.image"),
        ({"context": "parent"}, "tasks.t.context is of a post"),
        ({"per": "post", "context_as": "neighbors"}, "tasks.t.context_as is neighbors, but there is no"),
        ({"per": "post", "context": "parent", "pair": "target"}, "leave one of them out"),
        ({"per": "post", "context": "p", "kind": "text", "prompt": "a {text}"}, "give it as tasks.t.pair"),
    ],
)  # fmt: skip
def test_options_that_do_not_go_together_are_refused(changes, message):
    task = replace(AUTHORS, **changes)
    with pytest.raises(ValueError, match=message):
        validate(Recipe(tasks={"t": task}))


def test_an_author_in_two_splits_is_refused_per_author_and_warned_of_per_post(tmp_path):
    with pytest.raises(
        ValueError, match=r"tasks.t.author: 3 authors .* a \(train and validation\)"
    ):
        corpus_of(tmp_path, AUTHORS, validation=ROWS)
    corpus = corpus_of(tmp_path, replace(AUTHORS, per="post"), validation=ROWS)
    assert any("3 authors have posts in two splits" in line for line in corpus.report.warnings)


def test_held_out_parts_divide_no_author_and_two_data_sets_of_them_alike(tmp_path):
    rows = [
        {"text": f"post {n} of {user}", "user": f"u{user}", "trait": "xy"[user % 2], "mood": "pq"[n % 2]}
        for n in range(3)
        for user in range(40)
    ]  # fmt: skip
    write_jsonl(tmp_path / "posts" / "train.jsonl", rows)
    tasks = {"t": AUTHORS, "mood": TaskConfig(path="posts", label="mood", author="user")}
    recipe = recipe_of(tmp_path, **tasks)
    recipe.data.validation_fraction, recipe.data.test_fraction = 0.2, 0.1
    splits = load_corpus(recipe).splits
    homes = {}
    for split, posts in splits.items():
        for group in (0, 1):
            found = np.flatnonzero(posts.groups == group)
            homes[split, group] = {posts.columns["user"][row] for row in found}
    assert all(homes[split, 0] == homes[split, 1] for split in splits)
    assert {split: len(homes[split, 0]) for split in splits} == {
        "train": 28, "validation": 8, "test": 4,
    }  # fmt: skip
    assert len(set.union(*homes.values())) == 40


def test_an_author_has_a_row_per_post_and_the_label_on_the_first(tmp_path):
    corpus = corpus_of(tmp_path, AUTHORS, validation=other_authors())
    split = tokenized(corpus)
    collator = Collator(wordpiece_tokenizer(WORDS), corpus.tasks, max_posts=8)
    batch = collator(split, np.array([0, 2, 1]))
    assert batch.row_ids_B.tolist() == [0, 0, 0, 2, 1, 1]
    assert batch.bags_B.tolist() == [0, 0, 0, 1, 2, 2]
    assert batch.leads_B().tolist() == [True, False, False, True, True, False]
    assert batch.labels["t"].tolist() == [0, IGNORED, IGNORED, 1, 1, IGNORED]
    # The longest row of each, which is what padding costs.
    assert split.lengths.tolist() == [5, 3, 3] and split.texts_read(2).tolist() == [2, 2, 1]
    empty = collator(split, np.zeros(0, dtype=np.int64))
    assert empty.row_ids_B.tolist() == [-1] and empty.bags_B.tolist() == [0]
    assert empty.leads_B().tolist() == [True]
    plain = collator(split, np.array([0, 2, 1]), arrays=True)
    assert isinstance(plain.leads_B(), np.ndarray)
    for name in ("input_ids_BL", "attention_mask_BL", "row_ids_B", "bags_B", "leads_B"):
        found, wanted = (getattr(one, name) for one in (plain, batch))
        found, wanted = (found(), wanted()) if name == "leads_B" else (found, wanted)
        assert found.tolist() == wanted.tolist()


def test_where_a_row_serves_one_task_an_author_has_its_rows_for_each_and_every_text_its_number(
    tmp_path,
):
    corpus = corpus_of(tmp_path, AUTHORS, validation=other_authors())
    tasks = [*corpus.tasks, replace(TRAIT, name="other")]
    tokenizer = wordpiece_tokenizer(WORDS)
    posts = [(Post("one"), Post("two")), (Post("four"),)]
    collator = Collator(tokenizer, tasks, row_per_task=True)
    batch = collator(collator.encode_texts(posts), np.arange(2), all_tasks=True)
    assert batch.row_ids_B.tolist() == [0, 0, 0, 0, 1, 1]
    assert batch.task_ids_B.tolist() == [0, 0, 1, 1, 0, 1]
    assert batch.bags_B.tolist() == [0, 0, 1, 1, 2, 3]
    assert batch.text_numbers_B.tolist() == [0, 1, 0, 1, 2, 2]


def test_training_draws_posts_of_an_author_by_seed_and_step_and_evaluation_reads_the_first(
    tmp_path,
):
    rows = [{"text": word, "user": "a", "trait": "x"} for word in WORDS]
    rows.append({"text": "one", "user": "b", "trait": "y"})
    corpus = corpus_of(tmp_path, AUTHORS, train=rows, validation=other_authors())
    split = tokenized(corpus)
    read = [words_of(split.all_rows(0, most=3, draw=(7, step))) for step in range(20)]
    again = [words_of(split.all_rows(0, most=3, draw=(7, step))) for step in range(20)]
    assert read == again and len({str(some) for some in read}) > 5
    assert {word for some in read for (word,) in some} == set(WORDS)
    assert all(some == sorted(some, key=lambda row: WORDS.index(row[0])) for some in read)
    assert words_of(split.all_rows(0, most=3)) == [["one"], ["two"], ["three"]]
    assert words_of(split.all_rows(1, most=3, draw=(7, 0))) == [["one"]]


CONTEXT = [
    {"text": "one", "thread": ["six six", "two three"], "label": "x"},
    {"text": "four", "thread": None, "label": "y"},
    {"text": "one two three four five", "thread": ["six", "six"], "label": "y"},
]


def test_a_context_is_the_second_segment_the_nearest_first_and_cut_before_the_post(tmp_path):
    task = TaskConfig(path="posts", context="thread")
    corpus = corpus_of(tmp_path, task, train=CONTEXT, validation=CONTEXT)
    assert corpus.tasks[0].reads == "context"
    rows = tokenized(corpus).rows(np.arange(3))
    assert words_of(rows) == [
        "one two three six six".split(), ["four"], "one two three four five six six".split(),
    ]  # fmt: skip
    assert rows[0].token_types.tolist() == [0, 0, 0, 1, 1, 1, 1, 1]
    # [CLS] post [SEP] context [SEP]: five words and the three signs leave no room for a context.
    short = tokenized(corpus, max_length=8)
    assert words_of(short.rows(np.arange(3)))[2] == "one two three four five".split()
    assert short.cut.tolist() == [False, False, True]
    shorter = tokenized(corpus, max_length=6)
    assert words_of(shorter.rows(np.arange(3))) == [
        ["one", "two", "three"], ["four"], ["one", "two", "three", "four"],
    ]  # fmt: skip
    # A pair of the same length loses tokens of the post.
    pair = replace(task, context=None, pair="thread")
    pairs = [row | {"thread": row["thread"] and " ".join(row["thread"])} for row in CONTEXT]
    plain = tokenized(corpus_of(tmp_path, pair, train=pairs, validation=pairs), max_length=8)
    assert words_of(plain.rows(np.arange(3)))[2] == "one two three six six".split()


def test_neighbors_are_rows_of_their_own_the_nearest_first_and_never_drawn(tmp_path):
    task = TaskConfig(path="posts", context="thread", context_as="neighbors")
    corpus = corpus_of(tmp_path, task, train=CONTEXT, validation=CONTEXT)
    assert corpus.tasks[0].reads == "neighbors"
    split = tokenized(corpus)
    for draw in (None, (0, 1)):
        rows = split.all_rows(0, most=2, draw=draw)
        assert words_of(rows) == [["one"], ["two", "three"]]
    batch = Collator(wordpiece_tokenizer(WORDS), corpus.tasks)(split, np.arange(3))
    assert batch.bags_B.tolist() == [0, 0, 0, 1, 2, 2, 2]
    assert batch.labels["label" if "label" in batch.labels else "t"].tolist()[3] == 1


def test_a_stream_answers_each_run_of_an_author_in_the_memory_of_the_posts_that_are_read(capsys):
    posts = [Post(text=row["text"], author=row["user"], line=n) for n, row in enumerate(ROWS)]
    posts.insert(1, Post(text=" ", author="a"))
    found = list(authors_in_order(posts, column="user", most=2))
    assert [post.text for post in found] == [
        ["one"], ["two"], ["one two"], ["three"], ["four"], ["one two three"],
    ]  # fmt: skip
    assert found[0].columns == {"user": "a", "num_posts": 2}
    assert "3 times an author of column user came back" in capsys.readouterr().err
    many = (Post(text=f"post {n}", author="a") for n in range(10_000))
    (one,) = authors_in_order(many, column="user", most=2)
    assert (one.text, one.columns["num_posts"]) == (["post 0", "post 1"], 10_000)
    together = by_author([post for post in posts if post.text.strip()])
    assert [post.author for post in together] == ["a", "b", "c"]


def test_noise_is_in_every_post_of_an_author_and_in_a_reply_but_not_in_its_context(tmp_path):
    authors = corpus_of(tmp_path, AUTHORS, validation=other_authors()).splits["train"]
    changed = noisy(authors, "typos", rate=1.0, seed=0)
    for before, after in zip(authors.members, changed.members, strict=True):
        assert all(a.text != b.text for a, b in zip(before, after, strict=True))
    assert changed.texts == ["\n".join(post.text for post in some) for some in changed.members]
    task = TaskConfig(path="posts", context="thread", context_as="neighbors")
    posts = corpus_of(tmp_path, task, train=CONTEXT, validation=CONTEXT).splits["train"]
    changed = noisy(posts, "typos", rate=1.0, seed=0)
    assert changed.texts[0] == changed.members[0][0].text != "one"
    assert changed.members[0][1:] == posts.members[0][1:]


def test_equal_replies_to_other_posts_are_not_the_same_post(tmp_path):
    task = TaskConfig(path="posts", context="thread", context_as="neighbors")
    other = [row | {"thread": ["five"]} for row in CONTEXT]
    report = corpus_of(tmp_path, task, train=CONTEXT, validation=other).report
    assert not any("of a training post" in line for line in report.warnings)
    report = corpus_of(tmp_path, task, train=CONTEXT, validation=CONTEXT).report
    assert any("3 of 3 validation posts" in line for line in report.warnings)
