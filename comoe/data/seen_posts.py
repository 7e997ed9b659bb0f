"""Which posts a model was trained on: a coarse filter beside it, for warnings.

It hides no post from one who has its text, or guesses it. A miss proves that the post was not there. A
hit raises the odds that it was about 16-fold: every training post hits, and of others one in about 17.
"""

from __future__ import annotations

import hashlib
import math
from pathlib import Path

import numpy as np

from comoe.config.failure import parsing
from comoe.config.files import atomic_file
from comoe.data.posts import PostSplit
from comoe.data.text.normalize import same_text

SEEN = "training_posts.npy"
"""File of the filter, in a run folder and in an export."""

BITS = 16
"""Bits per post: one in about 17 posts that were never seen hits, too; a small file, enough to count."""

RARE = 1e-3
"""Chance from which hits are no coincidence."""


def write_seen(path: Path, posts: PostSplit) -> None:
    """Write the filter of some posts: a Bloom filter (Bloom 1970) of one hash, 2 bytes per post.

    Args:
        path: of the file, uint8, (2 N,) for N different posts, a bit per place.
        posts: text, and second text or context, count; images do not.
    """
    keys = _keys(posts)
    bits = np.zeros(BITS * max(len(keys), 1), dtype=np.uint8)
    bits[_places(keys, len(bits))] = 1
    with atomic_file(path) as file:
        np.save(file, np.packbits(bits), allow_pickle=False)


def count_seen(path: Path, posts: PostSplit) -> int:
    """About how many of some posts are among those of a filter; 0 where chance explains the hits, or without a file.

    A post that was never seen hits with the share of bits that are set, which is taken off. Chance is
    ruled out by the Chernoff bound of so many hits: it takes at least 3 different posts.

    Raises:
        ValueError: a damaged file.
    """
    if not path.is_file():
        return 0
    with parsing(path, "delete it, it serves a warning alone"):
        packed = np.load(path, mmap_mode="r", allow_pickle=False)
        if packed.dtype != np.uint8 or packed.ndim != 1 or not len(packed):
            raise ValueError(f"{path} is no filter of posts; delete it, it serves a warning alone.")
        chance = float(np.bitwise_count(packed).mean()) / 8
        keys = _keys(posts)
        byte_N, bit_N = np.divmod(_places(keys, 8 * len(packed)), 8)
        share = float(np.mean(packed[byte_N] >> (7 - bit_N) & 1)) if keys else 0.0
    if share <= chance or len(keys) * _divergence(share, chance) < -math.log(RARE):
        return 0
    return round((share - chance) / (1 - chance) * len(posts))


def _keys(posts: PostSplit) -> list[bytes]:
    members = posts.members or [()] * len(posts)
    rows = zip(posts.texts, posts.pairs, members, strict=True)
    found = {
        "\0".join([same_text(text), str(pair or ""), *(post.text for post in some)])
        for text, pair, some in rows
    }
    return [key.encode("utf-8", "surrogatepass") for key in found]


def _places(keys: list[bytes], size: int) -> np.ndarray:
    digests = b"".join(hashlib.blake2b(key, digest_size=8).digest() for key in keys)
    return (np.frombuffer(digests, dtype="<u8") % np.uint64(size)).astype(np.int64)


def _divergence(share: float, chance: float) -> float:
    """Kullback-Leibler divergence of two coins, in nats."""
    rest = (1 - share) * math.log((1 - share) / (1 - chance)) if share < 1 else 0.0
    return share * math.log(share / chance) + rest
