"""Which entry of a lexicon each token belongs to."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import accumulate
from typing import Any

from comoe.tasks.lexicon import Lexicon


def entries_of(
    lexicon: Lexicon, encoding: Any, texts: Sequence[str | list[str] | None]
) -> list[int]:
    """Entry of the lexicon that each token is a piece of: its number on the first piece, the
    negative number on its others, 0 on tokens of no entry.

    Args:
        lexicon: whose entries are looked for.
        encoding: of the library tokenizers, with the characters of each token.
        texts: that were tokenized, the first and the second one; a list is of words.
    """
    entries = [0] * len(encoding.ids)
    for side, text in enumerate(texts):
        words = text if isinstance(text, list) else [text or ""]
        starts = [0, *accumulate(len(word) + 1 for word in words)]
        found, place, begun = [*lexicon.find(" ".join(words))], 0, -1
        places = zip(encoding.sequence_ids, encoding.word_ids, encoding.offsets, strict=True)
        for token, (sequence, word, (start, end)) in enumerate(places):
            if sequence != side:
                continue
            # Of pairs a byte-level tokenizer cuts the blank off twice, and with it a single letter.
            start = min(start, end - 1)
            if isinstance(text, list):
                # What stands for a word without a piece may be longer than the word.
                start, end = starts[word] + start, starts[word] + min(end, len(words[word]))
            while place < len(found) and found[place].end <= start:
                place += 1
            if place < len(found) and found[place].start < end:
                entries[token] = found[place].entry * (-1 if place == begun else 1)
                begun = place
    return entries
