"""The filter of training posts: it counts posts, takes chance hits off, and warns of three or more."""

from dataclasses import replace

import numpy as np
import pytest

from comoe.data.posts import Post, PostSplit
from comoe.data.seen_posts import BITS, count_seen, write_seen


def list_of(numbers, *, pair=None):
    return [Post(text=f"Post  {number}", pair=pair) for number in numbers]


def posts_of(numbers, *, pair=None):
    return PostSplit.from_posts(list_of(numbers, pair=pair))


@pytest.fixture(scope="module")
def filter_of_1000(tmp_path_factory):
    path = tmp_path_factory.mktemp("seen") / "training_posts.npy"
    write_seen(path, posts_of(range(1000)))
    return path


def test_every_post_that_was_seen_hits_whatever_its_case_and_blanks(filter_of_1000):
    assert filter_of_1000.stat().st_size < 2200
    assert count_seen(filter_of_1000, posts_of(range(1000))) == 1000
    shouted = PostSplit.from_posts([Post(text=f" POST {n}\n") for n in range(1000)])
    assert count_seen(filter_of_1000, shouted) == 1000
    # A second text makes another post.
    assert count_seen(filter_of_1000, posts_of(range(1000), pair="of")) == 0
    assert count_seen(filter_of_1000, posts_of(range(1000), pair=("of", "on"))) == 0
    near = [replace(post, members=(post, Post(text="of"))) for post in list_of(range(1000))]
    assert count_seen(filter_of_1000, PostSplit.from_posts(near)) == 0


@pytest.mark.parametrize("seen", [0.05, 0.3, 0.8])
def test_a_mixture_is_counted_without_the_hits_of_chance(filter_of_1000, seen):
    known = round(1000 * seen)
    mixed = posts_of([*range(known), *range(5000, 6000 - known)])
    # Of 1,000 unseen posts 61 hit by chance, give or take 8.
    assert count_seen(filter_of_1000, mixed) == pytest.approx(known, abs=30)


def test_posts_that_were_never_seen_are_no_warning(filter_of_1000):
    rng = np.random.default_rng(0)
    false = 0
    for _ in range(2000):
        size, start = rng.integers(1, 60), rng.integers(10_000, 10**9)
        false += count_seen(filter_of_1000, posts_of(range(start, start + size))) > 0
    assert false <= 2000 * 1e-3 + 4


def test_one_in_17_others_hits_and_less_than_three_posts_are_no_warning(filter_of_1000):
    bits = np.unpackbits(np.load(filter_of_1000))
    assert len(bits) == BITS * 1000 and bits.mean() == pytest.approx(
        1 - np.exp(-1 / BITS), rel=0.05
    )
    for count in (1, 2):
        assert count_seen(filter_of_1000, posts_of(range(count))) == 0
    assert count_seen(filter_of_1000, posts_of(range(3))) == 3


def test_no_file_is_no_warning_and_a_damaged_one_is_told(tmp_path, filter_of_1000):
    posts = posts_of(range(10))
    assert count_seen(tmp_path / "none.npy", posts) == 0
    assert count_seen(filter_of_1000, PostSplit.from_posts([])) == 0
    whole, torn = filter_of_1000.read_bytes(), tmp_path / "torn.npy"
    for content in (b"", whole[:500], b"\x80\x04N."):
        torn.write_bytes(content)
        with pytest.raises(ValueError, match="torn.npy .*delete it, it serves a warning alone"):
            count_seen(torn, posts)
    for array in (np.zeros((2, 3), dtype=np.uint8), np.zeros(4), np.array([{}], dtype=object)):
        np.save(torn, array)
        with pytest.raises(ValueError, match="torn.npy .*delete it, it serves a warning alone"):
            count_seen(torn, posts)
