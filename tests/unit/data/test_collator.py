"""Tokens and batches: pairs, words, cuts, the cache, and the layout of rows and labels."""

from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from helpers_data import byte_level_tokenizer, wordpiece_tokenizer
from transformers import ByT5Tokenizer

from comoe.config.recipe import DataConfig, NormalizeConfig
from comoe.data.collator import Collator
from comoe.data.posts import PostSplit, unlabelled_posts
from comoe.data.tokens.split import TokenizedSplit, tokenize_split
from comoe.data.tokens.vocabulary import load_tokenizer
from comoe.tasks.task import Task
from comoe.types import IGNORED

MOOD = Task("mood", "single_label", ("bad", "good"), "macro_f1")
STARS = Task("stars", "regression", (), "pearson")
TOPICS = Task("topics", "multi_label", ("a", "b", "c"), "macro_f1")
NAMES = Task("names", "tags", ("O", "B"), "span_f1")
TASKS = (MOOD, STARS, TOPICS, NAMES)


def posts_of(
    texts: list[str],
    *,
    pairs: list[str | None] | None = None,
    words: list[list[str] | None] | None = None,
    **labels: list[Any],
) -> PostSplit:
    names = [task.name for task in TASKS]
    made = unlabelled_posts(texts, tasks=names, pairs=pairs, words=words)
    groups = np.arange(len(texts)) % 2
    return replace(made, labels={**made.labels, **labels}, groups=groups, group_names=("x", "y"))


def tokenized(
    posts: PostSplit, *, tokenizer: Any = None, cache_dir: Path | None = None, **data: Any
) -> TokenizedSplit:
    tokenizer = tokenizer or wordpiece_tokenizer(["one", "two", "three", "four", "rome", "@user"])
    return tokenize_split(
        posts, tokenizer, tasks=TASKS, config=DataConfig(**data), cache_dir=cache_dir
    )


def tokens_of(split: TokenizedSplit, row: int, tokenizer: Any) -> list[str]:
    return tokenizer.convert_ids_to_tokens(split.rows(np.array([row]))[0].input_ids.tolist())


@pytest.fixture
def mixed() -> TokenizedSplit:
    return tokenized(
        posts_of(
            ["one", "one two three", "x", "two"],
            mood=[1, None, 0, None],
            stars=[None, 2.5, -1.0, None],
            topics=[(0, 2), None, (), None],
        )
    )


def collator(**options: Any) -> Collator:
    return Collator(
        wordpiece_tokenizer(["one", "two", "three", "four", "rome", "@user"]), TASKS, **options
    )


def test_a_batch_is_padded_to_its_longest_post(mixed):
    batch = collator()(mixed, np.array([1, 0]))
    assert batch.input_ids_BL.shape == (2, 5)
    assert batch.attention_mask_BL.tolist() == [[1, 1, 1, 1, 1], [1, 1, 1, 0, 0]]
    assert batch.word_starts_BL.int().tolist() == [[0, 1, 1, 1, 0], [0, 1, 0, 0, 0]]
    assert batch.token_type_ids_BL.sum() == 0
    assert batch.input_ids_BL[1, 3:].tolist() == [0, 0]
    assert (batch.row_ids_B.tolist(), batch.task_ids_B.tolist()) == ([1, 0], [-1, -1])
    assert batch.unit_scale_T is None
    for name in ("input_ids_BL", "attention_mask_BL", "token_type_ids_BL", "row_ids_B"):
        assert getattr(batch, name).dtype == torch.int64
    assert collator(pad_to_multiple_of=8)(mixed, np.array([1, 0])).input_ids_BL.shape == (2, 8)


def test_by_token_one_row_has_the_labels_of_all_tasks(mixed):
    batch = collator()(mixed, np.array([0, 1, 2]))
    assert list(batch.labels) == ["mood", "stars", "topics", "names"]
    assert batch.labels["mood"].tolist() == [1, IGNORED, 0]
    assert torch.equal(batch.labels["stars"].isnan(), torch.tensor([True, False, False]))
    assert batch.labels["stars"][1:].tolist() == [2.5, -1.0]
    assert batch.labels["topics"][0].tolist() == [1, 0, 1]
    assert batch.labels["topics"][1].isnan().all()
    assert batch.labels["topics"][2].tolist() == [0, 0, 0]
    assert (batch.labels["names"] == IGNORED).all()
    assert batch.labels["names"].shape == batch.input_ids_BL.shape


def test_by_task_a_post_becomes_one_row_per_label_and_no_label_is_lost(mixed):
    batch, whole = (
        collator(row_per_task=by_task)(mixed, np.array([0, 1, 2, 3])) for by_task in (True, False)
    )
    assert list(zip(batch.row_ids_B.tolist(), batch.task_ids_B.tolist(), strict=True)) == [
        (0, 0), (0, 2), (1, 1), (2, 0), (2, 1), (2, 2),
    ]  # fmt: skip
    assert batch.labels["mood"].tolist() == [1, IGNORED, IGNORED, 0, IGNORED, IGNORED]
    for number, task in enumerate(TASKS):
        one, other = (each.labels[task.name] for each in (batch, whole))
        assert task.rules.normalizer(one, task) == task.rules.normalizer(other, task)
        assert set(batch.task_ids_B[task.rules.labelled(one)].tolist()) <= {number}


def test_prediction_by_task_asks_every_task_of_every_post(mixed):
    batch = collator(row_per_task=True)(mixed, np.array([3, 0]), all_tasks=True)
    assert batch.row_ids_B.tolist() == [3, 3, 3, 3, 0, 0, 0, 0]
    assert batch.task_ids_B.tolist() == [0, 1, 2, 3, 0, 1, 2, 3]
    assert batch.labels["mood"].tolist() == [IGNORED] * 4 + [1] + [IGNORED] * 3
    assert batch.text_numbers_B.tolist() == [0] * 4 + [1] * 4
    by_token = collator()(mixed, np.array([3, 0]), all_tasks=True)
    assert len(by_token.row_ids_B) == 2 and by_token.text_numbers_B is None


@pytest.mark.parametrize(("row_per_task", "task_id"), [(False, -1), (True, 0)])
def test_no_posts_make_one_short_row_without_labels(mixed, row_per_task, task_id):
    made = collator(row_per_task=row_per_task)
    batch = made(mixed, np.zeros(0, dtype=np.int64))
    assert (batch.row_ids_B.tolist(), batch.task_ids_B.tolist()) == ([-1], [task_id])
    assert batch.attention_mask_BL.sum() == batch.input_ids_BL.shape[1] == 3
    assert all(not task.rules.labelled(batch.labels[task.name]).any() for task in TASKS)
    # By task a post without labels has none.
    rows = made(mixed, np.array([3])).row_ids_B.tolist()
    assert rows == ([-1] if row_per_task else [3])


def test_a_second_text_is_the_second_segment_and_has_no_words():
    split = tokenized(posts_of(["one two"], pairs=["three"]))
    batch = collator()(split, np.array([0]))
    assert batch.token_type_ids_BL.tolist() == [[0, 0, 0, 0, 1, 1]]
    assert batch.word_starts_BL.tolist() == [[False, True, True, False, False, False]]


def test_posts_with_and_without_pairs_and_words_keep_their_places():
    posts = posts_of(
        ["one", "two", "three", "four"],
        pairs=[None, "one", None, "two"],
        words=[None, None, ["three", "one"], ["four"]],
    )
    tokenizer = wordpiece_tokenizer(["one", "two", "three", "four"])
    split = tokenized(posts, tokenizer=tokenizer)
    assert [" ".join(tokens_of(split, row, tokenizer)) for row in range(4)] == [
        "[CLS] one [SEP]",
        "[CLS] two [SEP] one [SEP]",
        "[CLS] three one [SEP]",
        "[CLS] four [SEP] two [SEP]",
    ]


def test_a_long_post_is_cut_and_counted():
    tokenizer = wordpiece_tokenizer(["one", "two"])
    split = tokenized(
        posts_of(["one " * 50, "two", "one " * 50], pairs=[None, None, "two two"]), max_length=16
    )
    assert list(split.lengths) == [16, 3, 16]
    assert split.truncated == 2
    assert tokens_of(split, 2, tokenizer)[-4:] == ["[SEP]", "two", "two", "[SEP]"]


def test_tags_sit_on_the_first_piece_of_each_word():
    words, no = ["one", "abc", "rome", "two"], IGNORED
    split = tokenized(posts_of(["one abc rome two"], words=[words], names=[[0, 1, 0, no]]))
    batch = collator()(split, np.array([0]))
    # [CLS] one a ##b ##c rome two [SEP]; a missing tag stays missing.
    assert batch.labels["names"].tolist() == [[no, 0, 1, no, no, 0, no, no]]
    assert batch.word_starts_BL.int().tolist() == [[0, 1, 1, 0, 0, 1, 1, 0]]


def test_words_cut_off_lose_their_tags_and_are_counted():
    tags = [[0, 1, 0, 1, IGNORED, 1], [1], [IGNORED] * 5 + [1]]
    words = [["one"] * len(row) for row in tags]
    split = tokenized(posts_of([" ".join(w) for w in words], words=words, names=tags), max_length=5)
    labels = collator()(split, np.array([0])).labels["names"]
    assert labels.tolist() == [[IGNORED, 0, 1, 0, IGNORED]]
    assert (split.truncated, split.words_cut) == (2, 3)
    # The last one's only tag was cut off: it counts as unlabelled.
    assert split.labelled.any(axis=1).tolist() == [True, True, False]


@pytest.mark.parametrize("preset", ["none", "social", "strict"])
def test_every_word_has_a_piece_whatever_it_is(preset):
    words = [
        "@Ann",
        "\u200b",
        "",
        "😀",
        "\u0301",
        "\ufffd",
        "...",
        "[UNK]",
        "two words",
        "http://x.y",
    ]
    posts = posts_of([" ".join(words)], words=[words], names=[[1, 0] * 5])
    split = tokenized(posts, normalize=NormalizeConfig(preset=preset))
    row = split.rows(np.array([0]))[0]
    assert list(row.word_ids[row.word_starts]) == list(range(10))
    targets = collator()(split, np.array([0])).labels["names"][0]
    assert targets[targets != IGNORED].tolist() == [1, 0] * 5


def test_byte_level_words_carry_the_blank_before_them():
    tokenizer = byte_level_tokenizer()
    for words in (None, [["b", "a", "b"]]):
        split = tokenized(posts_of(["b a b"], words=words), tokenizer=tokenizer)
        assert tokens_of(split, 0, tokenizer) == ["<s>", "b", "Ġa", "Ġb", "</s>"]
    assert Collator(tokenizer, TASKS)(split, np.array([0])).token_type_ids_BL is None


def test_a_tokenizer_in_pure_python_works_without_words():
    tokenizer = ByT5Tokenizer()
    split = tokenized(
        posts_of(["abc", "a" * 50], pairs=["de", None]), tokenizer=tokenizer, max_length=20
    )
    assert list(split.lengths) == [7, 20]  # abc </s> de </s>
    row = split.rows(np.array([0]))[0]
    assert list(row.word_ids) == [0, 1, 2, -1, -1, -1, -1]
    assert split.truncated == 1
    with pytest.raises(ValueError, match="ByT5Tokenizer cannot tell which word a token belongs to"):
        tokenized(posts_of(["a"], words=[["a"]]), tokenizer=tokenizer)


def test_posts_are_cleaned_before_they_are_tokenized():
    tokenizer = wordpiece_tokenizer(["one"])
    split = tokenized(posts_of(["@Bob &amp; one"]), tokenizer=tokenizer)
    assert " ".join(tokens_of(split, 0, tokenizer)) == "[CLS] @ u ##s ##e ##r & one [SEP]"


def test_the_table_of_labels_says_which_posts_have_which(mixed):
    assert mixed.labelled.astype(int).tolist() == [
        [1, 0, 1, 0], [0, 1, 0, 0], [1, 1, 1, 0], [0, 0, 0, 0]
    ]  # fmt: skip
    assert (len(mixed), list(mixed.groups)) == (4, [0, 1, 0, 1])
    assert mixed.lengths.dtype == np.int32
    assert (mixed.origins[2], mixed.texts[2]) == ("post:3", "x")


def test_prediction_sees_the_tokens_that_training_saw():
    config = DataConfig()
    posts = posts_of(["@Bob 😀 one", "two"], pairs=["three", None], words=[None, ["two", "four"]])
    trained = tokenized(posts)
    asked = collator().encode_texts(
        ["@Bob 😀 one", "two"], ["three", None], [None, ["two", "four"]], config=config
    )
    assert np.array_equal(trained.tokens.input_ids, asked.tokens.input_ids)
    assert np.array_equal(trained.tokens.word_ids, asked.tokens.word_ids)
    assert not asked.labelled.any()
    assert collator()(asked, np.array([1, 0])).row_ids_B.tolist() == [1, 0]


class CountingTokenizer:
    """Counts the posts that are tokenized."""

    def __init__(self, inner: Any) -> None:
        self._inner = inner
        self.posts = 0

    def __getattr__(self, name: str) -> Any:
        return getattr(self._inner, name)

    def __call__(self, texts: list[Any], *rest: Any, **settings: Any) -> Any:
        self.posts += len(texts)
        return self._inner(texts, *rest, **settings)


def test_tokens_are_made_once_and_read_from_the_cache_afterwards(tmp_path):
    tokenizer = CountingTokenizer(wordpiece_tokenizer())
    posts = posts_of(["abc", "def ghi"], mood=[0, 1])
    first = tokenized(posts, tokenizer=tokenizer, cache_dir=tmp_path)
    assert tokenizer.posts == 2
    second = tokenized(posts, tokenizer=tokenizer, cache_dir=tmp_path)
    assert tokenizer.posts == 2
    for name in ("input_ids", "token_types", "word_ids", "offsets", "truncated"):
        assert np.array_equal(getattr(first.tokens, name), getattr(second.tokens, name))
    assert np.array_equal(first.labelled, second.labelled)
    assert [path.suffix for path in tmp_path.iterdir()] == [".npz"]


def test_the_cache_knows_all_that_the_tokens_depend_on(tmp_path):
    tokenizer, texts = wordpiece_tokenizer(), ["abc", "def"]

    def files(posts=None, tokenizer=tokenizer, **options) -> int:
        posts = posts or posts_of(texts)
        tokenized(posts, tokenizer=tokenizer, cache_dir=tmp_path, **options)
        return len(list(tmp_path.iterdir()))

    assert files() == 1
    # What a tokenizer was called with before does not matter, nor do the labels.
    tokenizer("a", truncation=True, max_length=3)
    assert files(posts_of(texts, mood=[1, 1])) == 1
    changes = [
        {"max_length": 20}, {"normalize": NormalizeConfig(preset="strict")},
        {"tokenizer": wordpiece_tokenizer(["abc"])}, {"posts": posts_of(["abc", "deg"])},
        {"posts": posts_of(texts, pairs=["x", None])}, {"posts": posts_of(texts, words=[["abc"], None])},
    ]  # fmt: skip
    assert [files(**change) for change in changes] == [2, 3, 4, 5, 6, 7]
    assert files(cache=False, max_length=30) == 7


@pytest.mark.parametrize(
    "spoil", [lambda data: data[: len(data) // 2], lambda data: b"", lambda data: b"no archive"]
)
def test_a_cache_file_that_was_cut_short_is_made_anew(tmp_path, spoil):
    posts = posts_of(["abc", "def ghi"])
    first = tokenized(posts, cache_dir=tmp_path)
    path = next(tmp_path.iterdir())
    whole = path.read_bytes()
    path.write_bytes(spoil(whole))
    again = tokenized(posts, cache_dir=tmp_path)
    assert np.array_equal(first.tokens.input_ids, again.tokens.input_ids)
    assert len(path.read_bytes()) == len(whole)


def test_a_tokenizer_is_loaded_from_a_folder_with_its_rules(tmp_path):
    wordpiece_tokenizer(["rome"]).save_pretrained(tmp_path / "encoder")
    loaded = load_tokenizer(str(tmp_path / "encoder"))
    assert loaded.tokenize("Rome ab") == ["rome", "a", "##b"]
    assert loaded.model_max_length == 512


def test_a_missing_tokenizer_says_what_to_give(tmp_path):
    (tmp_path / "empty").mkdir()
    told = r"model.encoder \(.*empty\): no tokenizer could be loaded. Give a folder"
    with pytest.raises(ValueError, match=told):
        load_tokenizer(str(tmp_path / "empty"))
    told = r"data.max_length \(128\) is more than the encoder takes \(64 tokens\)"
    with pytest.raises(ValueError, match=told):
        tokenized(posts_of(["a"]), tokenizer=wordpiece_tokenizer(model_max_length=64))
