"""Words of a post that are hidden from the encoder."""

from __future__ import annotations

import zlib
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import numpy as np

from comoe.data.tokens.split import TokenRow
from comoe.tasks.task import Task
from comoe.types import IGNORED

MASKED, SWAPPED = 0.8, 0.1
"""Shares of the hidden tokens that become the mask token and any other one; the rest stay as they are."""

LONGEST_WORD = 10
"""Most tokens of what is hidden as a whole. Many tokenizers call a Chinese sentence a word, as it has no blank."""


class Masker:
    """Hides whole words, drawn at random, of the post itself, never of its second text.

    Of W words p W are hidden, rounded up or down such that this is their mean, and at least one.
    Of what has more than ``LONGEST_WORD`` tokens each one is a word. Each hidden token becomes the
    mask token (80 %), any token (10 %), or stays (10 %). Special tokens, the unknown one too, are
    neither hidden nor put in.

    Args:
        tokenizer: of the encoder.

    Source: BERT, arXiv:1810.04805, with the whole words of its later release.
    """

    def __init__(self, tokenizer: Any) -> None:
        self._mask = tokenizer.mask_token_id
        self._special = np.array(tokenizer.all_special_ids)
        # Sorted: the order of a vocabulary in memory is no property of the tokenizer.
        self._tokens = np.setdiff1d([*tokenizer.get_vocab().values()], self._special)

    def hide(self, row: TokenRow, *, probability: float, draw: Sequence[int] | None) -> TokenRow:
        """The row with hidden words, and with ``masked_ids``.

        Args:
            row: of a post.
            probability: p.
            draw: seeds the draw, whatever the layout; None draws by the tokens alone, so that a post
                has the same hidden words at each evaluation and in each run.
        """
        ids_L = row.input_ids.copy()
        rng = np.random.default_rng([zlib.crc32(ids_L.tobytes())] if draw is None else [*draw])
        ordinary_L = (row.word_ids >= 0) & ~np.isin(ids_L, self._special)
        sizes = np.bincount(row.word_ids[ordinary_L], minlength=1)
        long_L = ordinary_L & (sizes[row.word_ids.clip(0, len(sizes) - 1)] > LONGEST_WORD)
        words_L = np.where(long_L, len(sizes) + np.arange(len(ids_L)), row.word_ids)
        words = np.unique(words_L[ordinary_L])
        count = min(len(words), max(1, int(probability * len(words) + rng.random())))
        hidden_L = ordinary_L & np.isin(words_L, rng.choice(words, count, replace=False))
        draws_L = rng.random(len(ids_L))
        ids_L[hidden_L & (draws_L < MASKED)] = self._mask
        swapped_L = hidden_L & (draws_L >= MASKED) & (draws_L < MASKED + SWAPPED)
        ids_L[swapped_L] = rng.choice(self._tokens, int(swapped_L.sum()))
        entries_L = row.entries
        if entries_L is not None:
            # The numbers of a lexicon would tell the word; those of a phrase stand on its other words
            # too. The same word elsewhere keeps them: without, it would tell what is hidden.
            places_L = np.where(entries_L != 0, np.cumsum(entries_L > 0), -1)
            told_L = (places_L >= 0) & np.isin(places_L, places_L[hidden_L])
            entries_L = np.where(told_L, 0, entries_L)
        masked_L = np.where(hidden_L, row.input_ids, IGNORED)
        return replace(row, input_ids=ids_L, masked_ids=masked_L, entries=entries_L)


def check_mask_token(tokenizer: Any, task: Task) -> None:
    """ValueError where the tokenizer has no token that stands for a hidden word."""
    if tokenizer.mask_token_id is None:
        raise ValueError(
            f"tasks.{task.name} is of kind {task.kind}, but the tokenizer of model.encoder has no mask token "
            f"to hide words with; choose an encoder that has one (BERT, RoBERTa, MPNet), or drop the "
            f"task with tasks.{task.name}=null."
        )
