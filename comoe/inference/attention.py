"""Attention of a pooled head, shown on the words of a post."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from comoe.config.recipe import DataConfig
from comoe.data.tokens.split import TokenRow
from comoe.data.tokens.tokenize import readable


def attention_per_word(
    weights_L: np.ndarray, word_ids_L: np.ndarray, *, words: Sequence[str] | Mapping[int, str]
) -> dict[str, Any]:
    """Weights of the pieces summed per word, as shares of what fell on words; ``words[i]`` is the text of word i."""
    inside = word_ids_L >= 0
    weights_L = weights_L[: len(inside)].astype(np.float64)
    sums = np.bincount(word_ids_L[inside], weights=weights_L[inside])
    merged = [
        [words[word], float(sums[word] / sums.sum())]
        for word in np.unique(word_ids_L[inside]).tolist()
    ]
    return {"attention": merged, "attention_elsewhere": float(weights_L[~inside].sum())}


def words_of(text: str, row: TokenRow, *, tokenizer: Any, config: DataConfig) -> dict[int, str]:
    """Number of a word -> its letters in the cleaned text, which pieces do not hold ([UNK], lower case)."""
    numbers = set(row.word_ids[row.word_ids >= 0].tolist())
    if not tokenizer.is_fast:
        return {
            number: tokenizer.decode(row.input_ids[row.word_ids == number].tolist())
            for number in numbers
        }
    cleaned, _ = readable(text, config.normalize, config.max_length)
    encoded = tokenizer(cleaned, truncation=False, verbose=False)
    spans = {number: encoded.word_to_chars(number) for number in numbers}
    return {number: cleaned[span.start : span.end].strip() for number, span in spans.items()}
