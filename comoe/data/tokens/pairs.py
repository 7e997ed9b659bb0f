"""Two texts in one row: cut to its length before they are put together."""

from __future__ import annotations

from typing import Any


def encode_pairs(
    tokenizer: Any,
    texts: list[Any],
    pairs: list[Any],
    *,
    as_words: bool,
    max_length: int,
    truncation: str = "longest_first",
) -> list[Any]:
    """What the tokenizer makes of pairs, in time and memory that grow with the texts alone.

    Of two texts that it cuts, the library keeps every part of the one beside every part of the other.
    """
    settings = {
        "add_special_tokens": False,
        "is_split_into_words": as_words,
        "verbose": False,
    }
    firsts = tokenizer(texts, **settings).encodings
    # As second texts they have the ids of segments and texts that the library expects.
    nothing: Any = [] if as_words else ""
    seconds = tokenizer([nothing] * len(pairs), pairs, **settings).encodings
    backend, side = tokenizer.backend_tokenizer, tokenizer.truncation_side
    backend.enable_truncation(max_length, strategy=truncation, direction=side)
    made = []
    for first, second in zip(firsts, seconds, strict=True):
        # No text keeps more, and of two that are cut alike the longer one gets the odd token.
        most = max_length + 1 + (len(first) > len(second))
        made.append(
            backend.post_process(_part(first, most, side), _part(second, max_length + 1, side))
        )
    return made


def _part(encoding: Any, most: int, side: str) -> Any:
    """The at most ``most`` tokens of an encoding that truncation on a side leaves, without what is behind them."""
    kept = min(len(encoding), most)
    whole = max(len(encoding), 2 * kept)
    # The library keeps what it cuts, in parts of one length: what is wanted is cut from a rest that
    # is as long or longer.
    encoding.pad(whole, direction=side)
    encoding.truncate(whole - kept, direction="left" if side == "right" else "right")
    return type(encoding).merge(encoding.overflowing, growing_offsets=False)
