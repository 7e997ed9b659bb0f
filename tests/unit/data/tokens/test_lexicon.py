"""Which tokens are pieces of a lexicon's words: under every way of tokenizing, cut, cached, and in a batch."""

import numpy as np
import pytest
import torch

from comoe.config.recipe import DataConfig
from comoe.data.collator import Collator
from comoe.data.posts import unlabelled_posts
from comoe.data.tokens import tokenize as module
from comoe.data.tokens.split import tokenize_split
from comoe.data.tokens.tokenize import cached_tokens, tokenize
from comoe.tasks.lexicon import Lexicon
from comoe.tasks.task import Task
from tests.helpers_data import byte_level_tokenizer, wordpiece_tokenizer

MOOD = Task("mood", "single_label", ("bad", "good"), "macro_f1")
LEXICON = Lexicon({"good": [2.0, 1.0], "so bad": [-2.0, 0.0], ":)": [1.0, 5.0]})
TOKENIZERS = {"pieces": wordpiece_tokenizer(["so"]), "bytes": byte_level_tokenizer()}


def letters_of(tokenizer, ids):
    """Characters of each token, by which the test finds the words again."""
    tokens = tokenizer.convert_ids_to_tokens([int(number) for number in ids])
    return [
        "" if token in tokenizer.all_special_tokens else token.removeprefix("##").replace("Ġ", " ")
        for token in tokens
    ]


def words_marked(tokenizer, tokens, row=0):
    """[word, entry] of each marked word, as its pieces spell it, without blanks."""
    a, b = tokens.offsets[row : row + 2]
    marked = []
    letters = letters_of(tokenizer, tokens.input_ids[a:b])
    for letter, entry in zip(letters, tokens.entries[a:b].tolist(), strict=True):
        if entry > 0:
            marked.append(["", entry])
        if entry:
            assert marked[-1][1] == abs(entry)
            marked[-1][0] += letter.strip().casefold()
    return marked


@pytest.mark.parametrize("name", TOKENIZERS)
def test_all_pieces_of_a_word_have_its_entry_and_the_first_one_begins_it(name):
    tokenizer = TOKENIZERS[name]
    posts = unlabelled_posts(["Oh GOOD good, so bad :)", "nothing"], tasks=())
    tokens = tokenize(posts, tokenizer, max_length=64, normalize=None, lexicon=LEXICON)
    assert words_marked(tokenizer, tokens) == [["good", 1], ["good", 1], ["sobad", 2], [":)", 3]]
    assert words_marked(tokenizer, tokens, 1) == []
    plain = tokenize(posts, tokenizer, max_length=64, normalize=None)
    assert plain.entries is None and np.array_equal(plain.input_ids, tokens.input_ids)


@pytest.mark.parametrize("name", TOKENIZERS)
@pytest.mark.parametrize("words", [None, ["a", "good", "so", "bad", "one"]])
def test_second_texts_have_their_own_words_and_words_are_as_texts(name, words):
    tokenizer = TOKENIZERS[name]
    posts = unlabelled_posts(
        ["a good so bad one"], tasks=(), pairs=["so good :) bad"], words=[words]
    )
    tokens = tokenize(posts, tokenizer, max_length=64, normalize=None, lexicon=LEXICON)
    expected = [["good", 1], ["sobad", 2], ["good", 1], [":)", 3]]
    assert words_marked(tokenizer, tokens) == expected
    a, b = tokens.offsets
    assert b - a == len(tokens.entries)
    # Cut in the middle of "good" of the second text: what is left of it is marked all the same.
    cut = tokenize(posts, tokenizer, max_length=int(b) - 8, normalize=None, lexicon=LEXICON)
    assert cut.truncated[0] and len(cut.entries) == cut.offsets[-1] == b - 8


def test_a_word_without_a_piece_of_its_own_moves_no_other():
    tokenizer = TOKENIZERS["pieces"]
    posts = unlabelled_posts([""], tasks=(), words=[["a", "\u200b", "good"]])
    tokens = tokenize(posts, tokenizer, max_length=16, normalize=None, lexicon=LEXICON)
    assert words_marked(tokenizer, tokens) == [["good", 1]]


def test_the_cache_knows_lexicons_by_their_content(tmp_path, monkeypatch):
    posts, tokenizer = unlabelled_posts(["so good"], tasks=()), TOKENIZERS["pieces"]
    settings = {"max_length": 16, "normalize": None, "cache_dir": tmp_path}
    first = cached_tokens(posts, tokenizer, **settings, lexicon=LEXICON)
    assert cached_tokens(posts, tokenizer, **settings).entries is None
    other = Lexicon({"so": [1.0], "good": [1.0]})
    assert (
        cached_tokens(posts, tokenizer, **settings, lexicon=other).entries.tolist()
        != first.entries.tolist()
    )
    assert len(list(tmp_path.glob("*.npz"))) == 3
    monkeypatch.setattr(module, "tokenize", None)
    again = cached_tokens(posts, tokenizer, **settings, lexicon=LEXICON)
    assert np.array_equal(again.entries, first.entries) and again.entries.dtype == np.int32
    assert cached_tokens(posts, tokenizer, **settings).entries is None


def test_a_batch_has_the_numbers_of_each_piece_and_the_starts_of_words():
    tokenizer = TOKENIZERS["pieces"]
    posts = unlabelled_posts(["so good", "a", "so bad"], tasks=["mood"])
    config = DataConfig(cache=False, max_length=16)
    split = tokenize_split(posts, tokenizer, tasks=(MOOD,), config=config, lexicon=LEXICON)
    collator = Collator(tokenizer, (MOOD,), lexicon=LEXICON)
    for made in (split, collator.encode_texts(["so good", "a", "so bad"])):
        batch = collator(made, np.arange(3))
        # [CLS] so g ##o ##o ##d [SEP]; [CLS] so b ##a ##d [SEP]
        good, bad, none = (torch.from_numpy(LEXICON.features[entry]) for entry in (1, 2, 0))
        assert torch.equal(batch.lexicon_BLK[0], torch.stack([none, none, *[good] * 4, none]))
        assert not batch.lexicon_BLK[1].any()
        assert torch.equal(batch.lexicon_BLK[2], torch.stack([none, *[bad] * 4, none, none]))
        assert batch.lexicon_starts_BL.nonzero().tolist() == [[0, 2], [2, 1]]
        part = batch.take(torch.tensor([2, 0]))
        assert torch.equal(part.lexicon_BLK, batch.lexicon_BLK[[2, 0]])
        assert torch.equal(part.lexicon_starts_BL, batch.lexicon_starts_BL[[2, 0]])
    filler = collator(split, np.array([], dtype=int))
    assert not filler.lexicon_BLK.any() and not filler.lexicon_starts_BL.any()
    assert Collator(tokenizer, (MOOD,))(split, np.arange(3)).lexicon_BLK is None


def test_a_tokenizer_that_knows_no_words_is_refused():
    class Slow:
        is_fast, unk_token_id, eos_token_id = False, 0, None

    posts = unlabelled_posts(["a"], tasks=())
    with pytest.raises(ValueError, match="Slow cannot tell .* model.lexicon needs an encoder"):
        tokenize(posts, Slow(), max_length=8, normalize=None, lexicon=LEXICON)
