"""Tokenizers read from tokenizer.json alone: the tokens of transformers, for the tokenizers of all encoder families."""

from __future__ import annotations

import random
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import transformers
from helpers_data import byte_level_tokenizer, wordpiece_tokenizer
from helpers_model import HF_CONFIGS
from tokenizers.processors import ByteLevel
from transformers import ByT5Tokenizer, TokenizersBackend
from transformers.models.auto.tokenization_auto import TOKENIZER_MAPPING_NAMES

from comoe.config.recipe import NormalizeConfig
from comoe.data.collator import Collator
from comoe.data.posts import unlabelled_posts
from comoe.data.tokens.json_tokenizer import (
    SPECIAL,
    JsonTokenizer,
    description_of,
    read_json_tokenizer,
)
from comoe.data.tokens.pairs import encode_pairs
from comoe.data.tokens.tokenize import tokenize
from comoe.data.tokens.vocabulary import WHOLE, is_causal
from comoe.inference.exported import read_tokenizer

CORPUS = [
    "what a lovely day it is today, and the sun is shining on us",
    "this is awful and sad, nobody likes rain in the city of Paris",
    "Good-bye @user! see http://x.y #sunny 🌞 été naïve 汉字 test",
]

PARTS = [
    "a", "good day", "sun", "ny", "  ", "\n", "\t", "", "@user", "#sunny", "🌞", "👩‍👩‍👧", "été", "e\u0301te\u0301",
    "汉字", "לילה", "ﬁ", "\u200b", "##ny", "Ġa", "▁a", "'s", "don't", "http://x.y", "[MASK]", "</s>", "<s>", "<pad>",
    "[SEP]", "<unk>", "<|endoftext|>", "x" * 120, "1,234.5", "!!!", "ÀÉ", "…", "\ufffd", "\x07", "ß", "İ",
]  # fmt: skip

WITHOUT = {"mbart"}
"""Families whose tokenizer does more than its file says: it writes the language behind a text."""


def own_kind(family: str) -> Any:
    """A small tokenizer of the class that transformers has for a family."""
    name = TOKENIZER_MAPPING_NAMES.get(family)
    if name not in (None, "TokenizersBackend"):
        return getattr(transformers, name)().train_new_from_iterator(CORPUS, 300)
    trained = transformers.GPT2Tokenizer().train_new_from_iterator(CORPUS, 300)
    words = {"unk_token": "<|endoftext|>", "pad_token": "<|endoftext|>"}
    return TokenizersBackend(tokenizer_object=trained.backend_tokenizer, **words)


def as_read(tokenizer: Any, folder: Path, family: str = "bert") -> tuple[Any, Any]:
    """The tokenizer that an export of a family with these files has, and its description."""
    tokenizer.save_pretrained(folder)
    encoder = HF_CONFIGS[family].to_dict() | {"vocab_size": 5000}
    theirs = read_tokenizer(folder, {"encoder": encoder})
    return theirs, description_of(theirs, folder)


def shown(encodings: Sequence[Any]) -> list[Any]:
    """All that the library says of some texts."""
    return [
        (
            one.ids, one.type_ids, one.tokens, one.word_ids, one.sequence_ids, one.offsets, one.special_tokens_mask,
            one.attention_mask, bool(one.overflowing),
        )
        for one in encodings
    ]  # fmt: skip


def made_up(count: int) -> list[str]:
    draw = random.Random(0)
    return [
        draw.choice(["", " "]).join(draw.choices(PARTS, k=draw.randint(1, 12)))
        for _ in range(count)
    ]


@pytest.mark.parametrize("family", HF_CONFIGS)
def test_it_gives_the_tokens_of_transformers_for_every_family(family, tmp_path):
    theirs, description = as_read(own_kind(family), tmp_path, family)
    if family in WITHOUT:
        assert description is None
        return
    own = read_json_tokenizer(tmp_path, description, lambda: theirs)
    texts, others = made_up(40), made_up(40)[::-1]
    words = [text.split() or ["a"] for text in texts]
    cases = [
        (texts, None, False),
        (texts, others, False),
        (words, None, True),
        (words, [*words[::-1]], True),
    ]
    for first, second, split in cases:
        for limit in ({}, *({"truncation": "longest_first", "max_length": n} for n in (6, 24))):
            for special in (True, False):
                more = {
                    "is_split_into_words": split,
                    "add_special_tokens": special,
                    "verbose": False,
                }
                found = own(first, second, **limit, **more)
                expected = theirs(first, second, **limit, **more)
                assert shown(found.encodings) == shown(expected.encodings)
                assert found["input_ids"] == expected["input_ids"]
    for text in texts:
        assert own(text)["input_ids"] == theirs(text, verbose=False)["input_ids"]
        assert own.tokenize(text) == theirs.tokenize(text)
    for name in SPECIAL:
        assert getattr(own, f"{name}_token") == getattr(theirs, f"{name}_token")
        assert getattr(own, f"{name}_token_id") == getattr(theirs, f"{name}_token_id")
    assert own.get_vocab() == theirs.get_vocab() and len(own) == len(theirs)
    assert own.model_input_names == theirs.model_input_names
    assert own.model_max_length == theirs.model_max_length
    assert is_causal(own) == is_causal(theirs)
    for pair in (False, True):
        assert own.num_special_tokens_to_add(pair) == theirs.num_special_tokens_to_add(pair)
    posts = unlabelled_posts(texts, tasks=(), pairs=[pair or None for pair in others])
    by_words = unlabelled_posts([""] * len(words), tasks=(), words=words)
    threads = [(pair, text) for pair, text in zip(others, texts, strict=True)]
    replies = unlabelled_posts(texts, tasks=(), pairs=threads)
    replies_by_words = unlabelled_posts([""] * len(words), tasks=(), words=words, pairs=threads)
    for some in (posts, by_words, replies, replies_by_words):
        settings = {"max_length": 12, "normalize": NormalizeConfig()}
        found, expected = tokenize(some, own, **settings), tokenize(some, theirs, **settings)
        for name in ("input_ids", "token_types", "word_ids", "offsets", "truncated"):
            assert getattr(found, name).tolist() == getattr(expected, name).tolist()
    assert Collator(own, ())._segments == Collator(theirs, ())._segments
    for tokenizer in (own, theirs):
        assert_pairs_are_those_of_the_library(tokenizer)


def tokens_of(encodings: Sequence[Any]) -> list[Any]:
    """What is read of pairs."""
    return [
        (one.ids, one.type_ids, one.word_ids, one.sequence_ids, bool(one.overflowing))
        for one in encodings
    ]


def assert_pairs_are_those_of_the_library(tokenizer: Any) -> None:
    draw, side = random.Random(1), tokenizer.truncation_side
    firsts, seconds = (
        [" ".join(draw.choices(PARTS, k=draw.choice((1, 3, 9, 30)))) for _ in range(20)]
        for _ in range(2)
    )
    words = [[text.split() or ["a"] for text in some] for some in (firsts, seconds)]
    for tokenizer.truncation_side in ("left", "right"):
        for as_words, columns in ((False, (firsts, seconds)), (True, words)):
            split = {"is_split_into_words": as_words}
            for length in (7, 16, 33):
                found = encode_pairs(tokenizer, *columns, as_words=as_words, max_length=length)
                limits = {"truncation": "longest_first", "max_length": length}
                expected = tokenizer(*columns, **limits, **split).encodings
                assert tokens_of(found) == tokens_of(expected)
    tokenizer.truncation_side = side


@pytest.mark.parametrize("side", ["right", "left"])
@pytest.mark.parametrize("post", [True, False], ids=["special", "bare"])
def test_pairs_of_every_length_are_those_of_the_library(side, post):
    tokenizer = wordpiece_tokenizer(["a"])
    tokenizer.truncation_side = side
    if not post:  # then the library's own way gives the segments
        tokenizer.backend_tokenizer.post_processor = ByteLevel(trim_offsets=False)
    counts = [(first, second) for first in range(17) for second in range(17) if first + second]
    texts, pairs = ([" ".join("a" * n) for n in column] for column in zip(*counts, strict=True))
    for length in range(3, 9):
        found = encode_pairs(tokenizer, texts, pairs, as_words=False, max_length=length)
        limits = {"truncation": "longest_first", "max_length": length}
        assert tokens_of(found) == tokens_of(tokenizer(texts, pairs, **limits).encodings)
        # A context is cut, and its post is not.
        room = length - tokenizer.num_special_tokens_to_add(pair=True)
        fits = [(" ".join("a" * i), " ".join("a" * j)) for i, j in counts if i < room]
        if fits:
            columns = [list(column) for column in zip(*fits, strict=True)]
            limits["truncation"] = "only_second"
            found = encode_pairs(tokenizer, *columns, as_words=False, **limits)
            assert tokens_of(found) == tokens_of(tokenizer(*columns, **limits).encodings)


@pytest.mark.parametrize("side", ["right", "left"])
def test_what_is_cut_from_a_pair_does_not_grow_with_the_product_of_its_texts(side):
    tokenizer = own_kind("bert")
    tokenizer.truncation_side = side
    counts = []
    for characters in (300, 3000):
        text = "日本語" * (characters // 3)
        (made,) = encode_pairs(tokenizer, [text], [text], as_words=False, max_length=32)
        counts.append(len(made.overflowing))
        posts = unlabelled_posts([text], tasks=(), pairs=[text])
        assert tokenize(posts, tokenizer, max_length=32, normalize=None).truncated.tolist() == [
            True
        ]
    assert counts[0] == counts[1] < 20


def test_characters_of_a_word_are_found(tmp_path):
    theirs, description = as_read(own_kind("roberta"), tmp_path)
    own = read_json_tokenizer(tmp_path, description, lambda: theirs)
    for text in ("what a lovely day", "été 🌞 naïve"):
        found, expected = own(text), theirs(text)
        for word in {word for word in expected.encodings[0].word_ids if word is not None}:
            span = expected.word_to_chars(word)
            assert found.word_to_chars(word) == (span.start, span.end)


def test_what_comoe_does_not_use_is_asked_of_transformers(tmp_path):
    theirs, description = as_read(wordpiece_tokenizer(["rome"]), tmp_path / "a")
    asked = []
    own = read_json_tokenizer(tmp_path / "a", description, lambda: asked.append(0) or theirs)
    assert not asked and own.decode([own.get_vocab()["rome"]]) == "rome" and asked
    own.save_pretrained(tmp_path / "b")
    assert (tmp_path / "b" / WHOLE).read_bytes() == (tmp_path / "a" / WHOLE).read_bytes()
    with pytest.raises(AttributeError, match="no_such_thing"):
        own.no_such_thing  # noqa: B018
    with pytest.raises(KeyError):
        own(["a"])["attention_mask"]


def test_a_tokenizer_that_does_more_than_its_file_has_no_description(tmp_path):
    class Shouting(TokenizersBackend):
        def _encode_plus(self, text, *rest, **options):
            return super()._encode_plus([word.upper() for word in text], *rest, **options)

    plain = byte_level_tokenizer()
    assert as_read(plain, tmp_path / "plain")[1] is not None
    theirs = Shouting(tokenizer_object=plain.backend_tokenizer, pad_token="<pad>")
    theirs.save_pretrained(tmp_path / "shouting")
    assert description_of(theirs, tmp_path / "shouting") is None
    plain.chat_template = "{{ messages }}"
    assert description_of(plain, tmp_path / "plain") is None
    plain.chat_template = None
    plain.add_tokens(["anew"])  # which the file does not have
    assert description_of(plain, tmp_path / "plain") is None
    (tokenizer := ByT5Tokenizer()).save_pretrained(tmp_path / "slow")
    assert description_of(tokenizer, tmp_path / "slow") is None


def test_another_file_or_a_strange_description_is_not_read(tmp_path):
    theirs, description = as_read(wordpiece_tokenizer(["rome"]), tmp_path)

    def read(description: Any) -> JsonTokenizer | None:
        return read_json_tokenizer(tmp_path, description, lambda: theirs)

    assert isinstance(read(description), JsonTokenizer)
    assert read(None) is None and read([]) is None and read({"sha256": 1}) is None
    for change in (
        {"truncation_side": "middle"},
        {"special_tokens": {"pad": 1}},
        {"model_input_names": 3},
    ):
        with pytest.raises(Exception):  # noqa: B017  the caller makes one sentence of it
            read(description | change)
    for name in (WHOLE, "tokenizer_config.json"):
        content = (tmp_path / name).read_text()
        (tmp_path / name).write_text(content + " ")
        assert read(description) is None
        (tmp_path / name).write_text(content)
    (tmp_path / "added_tokens.json").write_text("{}")
    assert read(description) is None
    (tmp_path / "added_tokens.json").unlink()
    assert isinstance(read(description), JsonTokenizer)
    (tmp_path / WHOLE).unlink()
    assert read(description) is None
    empty = read_json_tokenizer(tmp_path / "none", description | {"sha256": {}}, lambda: theirs)
    assert empty is None
