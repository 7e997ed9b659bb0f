"""Phrases of a post as tags, beside tasks that read the whole post and an aspect."""

from pathlib import Path

import numpy as np
import pytest
from helpers_data import recipe_of, wordpiece_tokenizer, write_jsonl

from comoe.config.recipe import TaskConfig
from comoe.data.collator import Collator
from comoe.data.corpus import load_corpus
from comoe.data.tokens.split import tokenize_split
from comoe.tasks.kinds.registry import KINDS
from comoe.tasks.kinds.tagging import PHRASE_TAGS, word_splitter
from comoe.tasks.labels import split_words
from comoe.types import IGNORED

PHRASES = KINDS["phrases"]


def tags_of(text: str, *phrases: str) -> list[str]:
    ids = PHRASES.fitted(PHRASES.parse(list(phrases), PHRASE_TAGS), split_words(text))
    return [f"{word}/{PHRASE_TAGS[i][0]}" for word, i in zip(split_words(text), ids, strict=True)]


@pytest.mark.parametrize(
    ("text", "phrases", "marked"),
    [
        ("The staff was so Horrible, really.", ["horrible"], ["Horrible/B"]),
        ("far above average food", ["above average"], ["above/B", "average/I"]),
        ("great food, great staff", ["great"], ["great/B", "great/B"]),
        ("slow, noisy fan", ["slow noisy"], ["slow/B", ",/I", "noisy/I"]),
        # Words that stand apart are pieces, the longest first, in the order of the post.
        ("no joy, good screen and no issues", ["good no issues"], ["good/B", "no/B", "issues/I"]),
        ("it got better and better", ["better better"], ["better/B", "better/B"]),
        ("they don't care", ["do n't care"], ["don't/B", "care/I"]),
        ("good and cheap", ["cheap", "good"], ["good/B", "cheap/B"]),
        ("nothing of it", [], []),
    ],
)
def test_phrases_become_begin_and_inside(text, phrases, marked):
    assert [tag for tag in tags_of(text, *phrases) if not tag.endswith("/O")] == marked


@pytest.mark.parametrize("phrase", ["goo", "goods", "bad good"])
def test_a_phrase_that_is_not_in_the_post_is_refused(phrase):
    with pytest.raises(ValueError, match=f"'{phrase}' is not in the post"):
        tags_of("a good one", phrase)


def test_an_empty_text_is_a_missing_label_and_an_empty_list_says_that_there_is_none():
    assert PHRASES.parse("", PHRASE_TAGS) is None and PHRASES.parse([], PHRASE_TAGS) == []
    assert PHRASES.fitted([], ["a", "b"]) == [0, 0]
    assert PHRASES.discover(["", None, "good"]) == PHRASE_TAGS
    assert PHRASES.discover(["", None]) == ()


@pytest.mark.parametrize("value", [3, [1], {"a": 1}])
def test_a_cell_that_is_no_phrase_is_refused(value):
    with pytest.raises(ValueError, match="is no phrase"):
        PHRASES.parse(value, PHRASE_TAGS)
    with pytest.raises(ValueError, match="leave its labels out"):
        PHRASES.parse("good", ("O", "B-good"))


def test_tags_have_the_last_say_about_what_a_word_is():
    tags, mood = KINDS["tags"], KINDS["single_label"]
    assert word_splitter([mood]) is None
    assert word_splitter([mood, PHRASES])("so good.") == ["so", "good", "."]
    assert word_splitter([PHRASES, tags])("so good.") == ["so", "good."]


@pytest.fixture
def aspects(tmp_path) -> Path:
    twice = "Great food, slow staff"
    table = [
        (twice, "food", "good", False, "great"), (twice, "staff", "bad", False, "slow"),
        ("I waited an hour", "staff", "bad", True, ""), ("a decent wine", "wine", "good", False, "descent"),
    ]  # fmt: skip
    names = ("text", "aspect", "polarity", "implicit", "opinion")
    rows = [dict(zip(names, row, strict=True)) for row in table]
    write_jsonl(tmp_path / "meals" / "train.jsonl", rows)
    write_jsonl(tmp_path / "meals" / "validation.jsonl", rows[:2])
    return tmp_path


def recipe_for(root: Path, on_error: str):
    shared = {"path": "meals", "pair": "aspect"}
    recipe = recipe_of(
        root,
        polarity=TaskConfig(label="polarity", slices=["implicit"], **shared),
        implicit=TaskConfig(label="implicit", auxiliary=True, **shared),
        opinion=TaskConfig(label="opinion", kind="phrases", auxiliary=True, **shared),
    )
    recipe.data.on_error = on_error
    return recipe


def test_a_phrase_that_does_not_fit_stops_the_run_or_is_counted_as_a_missing_label(aspects):
    with pytest.raises(
        ValueError,
        match=r"train.jsonl:4: task opinion, column opinion: 'descent' is not in the post",
    ):
        load_corpus(recipe_for(aspects, "stop"))
    corpus = load_corpus(recipe_for(aspects, "skip"))
    train = corpus.splits["train"]
    assert len(train) == 4, "the post stays for the other tasks"
    assert train.labels["opinion"] == [[1, 0, 0, 0, 0], [0, 0, 0, 1, 0], None, None]
    assert (
        "task opinion: 1 posts of meals have no such label, because it does not fit their words"
        in (corpus.report.warnings)
    )


def test_truth_values_are_labels_and_slices(aspects):
    corpus = load_corpus(recipe_for(aspects, "skip"))
    implicit = corpus.tasks[1]
    assert implicit.labels == ("false", "true") and implicit.auxiliary
    assert corpus.splits["train"].labels["implicit"] == [0, 0, 1, 0]
    assert corpus.splits["train"].columns["implicit"] == ["false", "false", "true", "false"]
    assert corpus.tasks[0].slices == ("implicit",) and not corpus.tasks[0].auxiliary


def test_words_and_the_aspect_as_second_text_make_one_row_for_all_tasks(aspects):
    recipe = recipe_for(aspects, "skip")
    corpus = load_corpus(recipe)
    tokenizer = wordpiece_tokenizer(["great", "food", "slow", "staff", "i", "waited", "an", "hour"])
    split = tokenize_split(
        corpus.splits["train"], tokenizer, tasks=corpus.tasks, config=recipe.data
    )
    batch = Collator(tokenizer, corpus.tasks)(split, np.array([1, 2]))
    tokens = tokenizer.convert_ids_to_tokens(batch.input_ids_BL[0].tolist())
    assert tokens[:8] == ["[CLS]", "great", "food", ",", "slow", "staff", "[SEP]", "staff"]
    assert batch.token_type_ids_BL[0, :9].tolist() == [0, 0, 0, 0, 0, 0, 0, 1, 1]
    # The aspect is no word of the post: it has no tag.
    assert batch.labels["opinion"][0].tolist()[:9] == [
        IGNORED,
        0,
        0,
        0,
        1,
        0,
        IGNORED,
        IGNORED,
        IGNORED,
    ]
    assert (batch.labels["opinion"][1] == IGNORED).all()
    assert batch.labels["polarity"].tolist() == [0, 0]
    assert batch.labels["implicit"].tolist() == [0, 1]
