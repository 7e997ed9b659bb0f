"""Hidden words: which ones, by what they are replaced, and that the same ones come back."""

from dataclasses import replace

import numpy as np
import pytest
import torch
from helpers_data import byte_level_tokenizer, wordpiece_tokenizer
from helpers_export import MOOD, PIECES, tiny_tokenizer

from comoe.config.recipe import DataConfig, TaskConfig
from comoe.data.collator import Collator
from comoe.data.posts import unlabelled_posts
from comoe.data.tokens.masking import LONGEST_WORD, Masker
from comoe.data.tokens.split import TokenizedSplit, TokenRow, tokenize_split
from comoe.data.tokens.tokenize import tokenize
from comoe.tasks.lexicon import Lexicon
from comoe.tasks.task import build_task
from comoe.types import IGNORED

DOMAIN = build_task(
    "domain", TaskConfig(kind="masked_words", probability=0.3), labels=(), label_counts={}
)
TASKS = (MOOD, DOMAIN)
TEXTS = ["the sunny day in paris good", "rain [SEP] bad day \u4e00 good", "ann user", ""]


def split_of(collator: Collator, *, mood=None, pairs=None) -> TokenizedSplit:
    """The texts as posts of the task, and of the first one's labels where they are given."""
    split = collator.encode_texts(TEXTS, pairs)
    labelled = split.labelled.copy()
    labelled[:, 1] = True
    labels = {"mood": [None] * len(TEXTS), "domain": [0] * len(TEXTS)}
    if mood is not None:
        labels["mood"] = mood
        labelled[:, 0] = [value is not None for value in mood]
    return replace(split, labelled=labelled, posts=replace(split.posts, labels=labels))


@pytest.fixture
def tokenizer(tmp_path):
    return tiny_tokenizer(tmp_path)


def hidden(batch, row):
    return (batch.masked_ids_BL[row] != IGNORED).nonzero()[:, 0].tolist()


def test_whole_words_of_the_post_are_hidden_and_nothing_else(tokenizer):
    collator = Collator(tokenizer, TASKS)
    split = split_of(collator, pairs=["good day", None, None, None])
    rows, seen = split.rows(np.arange(4)), [set() for _ in TEXTS]
    for step in range(200):
        batch = collator(split, np.arange(4), draw=(0, step))
        assert batch.task_ids_B.tolist() == [1, 1, 1, 1]
        for row, places in enumerate(map(lambda r: hidden(batch, r), range(4))):
            words = rows[row].word_ids
            # All pieces of a word or none of them, but no piece that is special.
            chosen = set(words[places])
            whole = np.isin(words, [*chosen]) & ~np.isin(
                rows[row].input_ids, tokenizer.all_special_ids
            )
            assert places == np.flatnonzero(whole).tolist() and -1 not in chosen
            originals = torch.from_numpy(rows[row].input_ids[places].astype(np.int64))
            assert torch.equal(batch.masked_ids_BL[row, places], originals)
            kept = np.setdiff1d(np.arange(len(words)), places)
            assert np.array_equal(batch.input_ids_BL[row, kept], rows[row].input_ids[kept])
            seen[row] |= set(places)
    # Every ordinary token of each post at some time; the blank one has none.
    for row, places in zip(rows, seen, strict=True):
        ordinary = (row.word_ids >= 0) & ~np.isin(row.input_ids, tokenizer.all_special_ids)
        assert places == set(np.flatnonzero(ordinary))
    special = [tokenizer.convert_ids_to_tokens(int(i)) for i in rows[1].input_ids]
    assert special.count("[SEP]") == 2 and "[UNK]" in special
    labels = batch.labels["domain"]
    assert labels[:3].tolist() == [len(hidden(batch, row)) for row in range(3)]
    assert int(labels[3]) == IGNORED


def test_shares_of_words_and_of_replacements_are_those_of_bert(tokenizer):
    collator = Collator(tokenizer, TASKS)
    masker = Masker(tokenizer)
    (row,) = collator.encode_texts([" ".join(PIECES[:5] * 4)]).rows(np.array([0]))
    words = len(set(row.word_ids) - {-1})
    counts, kinds = [], np.zeros(3)
    for step in range(4000):
        made = masker.hide(row, probability=0.17, draw=(3, step))
        places = made.masked_ids != IGNORED
        counts.append(len(set(row.word_ids[places])))
        masked = made.input_ids[places] == tokenizer.mask_token_id
        same = made.input_ids[places] == row.input_ids[places]
        kinds += [masked.sum(), same.sum(), (~masked & ~same).sum()]
        assert not np.isin(made.input_ids[places & (made.input_ids != 4)], [0, 1, 2, 3, 4]).any()
    assert set(counts) == {int(0.17 * words), int(0.17 * words) + 1}
    assert np.mean(counts) == pytest.approx(0.17 * words, abs=0.05)
    # A swapped token is the old one by chance in 1 of the vocabulary.
    chance = 0.1 / (len(tokenizer) - 5)
    np.testing.assert_allclose(kinds / kinds.sum(), [0.8, 0.1 + chance, 0.1 - chance], atol=0.01)


def test_a_run_of_tokens_too_long_for_a_word_is_not_hidden_as_a_whole():
    tokenizer = byte_level_tokenizer()
    tokenizer.add_special_tokens({"mask_token": "<mask>"})
    posts = unlabelled_posts(["\u4eca\u5929\u5929\u6c14\u5f88\u597d so good"], tasks=())
    tokens = tokenize(posts, tokenizer, max_length=64, normalize=None)
    row = TokenRow(tokens.input_ids, tokens.token_types, tokens.word_ids)
    sizes = np.bincount(row.word_ids[row.word_ids >= 0])
    long, short = sizes > LONGEST_WORD, sizes <= LONGEST_WORD
    assert long.sum() == 1 and short.sum() == 2
    seen, counts = set(), []
    for step in range(300):
        made = Masker(tokenizer).hide(row, probability=0.2, draw=(0, step))
        at = made.masked_ids != IGNORED
        hidden = np.bincount(row.word_ids[at], minlength=3)
        assert np.isin(hidden[short], [0, *sizes[short]]).all()
        counts.append(int(hidden[long].sum() + (hidden[short] > 0).sum()))
        seen |= {*np.flatnonzero(at)}
    # Each of its tokens counts as a word.
    assert np.mean(counts) == pytest.approx(0.2 * (sizes[long].sum() + 2), abs=0.1)
    assert seen == {*np.flatnonzero(row.word_ids >= 0)}


def test_masks_depend_on_seed_step_and_post_alone_and_are_fixed_without_a_draw(tokenizer):
    collator = Collator(tokenizer, TASKS)
    split = split_of(collator)

    def ids(rows, draw=None):
        batch = collator(split, np.array(rows), draw=draw)
        return {
            int(post): batch.input_ids_BL[row, :8].tolist()
            for row, post in enumerate(batch.row_ids_B)
        }

    whole, parts = ids([0, 1, 2], (7, 5)), ids([1], (7, 5)) | ids([2, 0], (7, 5))
    # The first tokens of each, whatever the padding.
    assert {post: row[:5] for post, row in parts.items()} == {
        post: row[:5] for post, row in whole.items()
    }
    draws = [(7, 5), (7, 6), (8, 5), None]
    assert len({str(ids([0, 1], draw)) for draw in draws}) == 4
    # At evaluations: by the text, wherever it stands.
    assert ids([0, 1, 2]) == ids([0, 1, 2])
    moved = collator.encode_texts(TEXTS[::-1])
    (row,) = moved.rows(np.array([3]))
    alone = Masker(tokenizer).hide(row, probability=0.3, draw=None)
    assert alone.input_ids[:8].tolist() == ids([0])[0]


@pytest.mark.parametrize("row_per_task", [False, True])
def test_other_tasks_read_the_post_as_it_is(tokenizer, row_per_task):
    collator = Collator(tokenizer, TASKS, row_per_task=row_per_task)
    split = split_of(collator, mood=[2, None, 1, None])
    batch = collator(split, np.arange(4), draw=(0, 0))
    posts, tasks = batch.row_ids_B.tolist(), batch.task_ids_B.tolist()
    shared = 0 if row_per_task else -1
    assert [*zip(posts, tasks, strict=True)] == [
        (0, shared), (0, 1), (1, 1), (2, shared), (2, 1), (3, 1)
    ]  # fmt: skip
    assert batch.labels["mood"].tolist() == [2, IGNORED, IGNORED, 1, IGNORED, IGNORED]
    assert batch.labels["domain"][[0, 3]].tolist() == [IGNORED, IGNORED]
    for row in (0, 3):
        own = split.rows(np.array([posts[row]]))[0].input_ids
        assert batch.input_ids_BL[row, : len(own)].tolist() == own.tolist()
        assert not hidden(batch, row)
    if row_per_task:
        assert len(set(batch.text_numbers_B.tolist())) == 6
    assert collator.rows_per_post(TASKS) == 2
    # Nothing is hidden from a prediction.
    batch = collator(collator.encode_texts(TEXTS), np.arange(4), all_tasks=True)
    assert batch.task_ids_B.tolist() == [shared] * 4
    assert bool((batch.masked_ids_BL == IGNORED).all())
    assert "[MASK]" not in tokenizer.decode(batch.input_ids_BL.flatten())


def test_a_tokenizer_without_a_mask_token_is_refused():
    with pytest.raises(ValueError, match=r"tasks\.domain .*no mask token.*tasks\.domain=null"):
        Collator(wordpiece_tokenizer(), TASKS)


def test_the_numbers_of_a_lexicon_do_not_tell_hidden_words(tokenizer):
    lexicon = Lexicon({"good": [2.0], "so bad": [-2.0], "day": [1.0]})
    posts = unlabelled_posts(["good day good , so bad"], tasks=["mood"])
    row = tokenize_split(
        posts,
        tokenizer,
        tasks=(MOOD,),
        config=DataConfig(cache=False, max_length=64),
        lexicon=lexicon,
    ).rows(np.arange(1))[0]
    assert {*abs(row.entries)} == {0, 1, 2, 3}
    masker, partly, twice = Masker(tokenizer), 0, 0
    for step in range(50):
        hidden = masker.hide(row, probability=0.3, draw=[0, step])
        at = hidden.masked_ids != IGNORED
        begins = np.flatnonzero(row.entries > 0)
        assert row.entries[begins].tolist() == [1, 3, 1, 2]
        for first, behind in zip(begins, [*begins[1:], len(row.entries)], strict=True):
            # An entry where it stands: its pieces, up to the next one's.
            mine = np.arange(first, behind)[row.entries[first:behind] != 0]
            assert (hidden.entries[mine] == (0 if at[mine].any() else row.entries[mine])).all()
            # Of the phrase one word may be hidden: then none of its words has numbers.
            partly += row.entries[first] == 2 and at[mine].any() and not at[mine].all()
        # Of a word that stands twice only the hidden one loses them.
        twice += len({hidden.entries[begins[0]], hidden.entries[begins[2]]}) == 2
    assert partly and twice
