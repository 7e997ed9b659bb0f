"""Noise on posts: the same for everyone, words stay in their places, nothing becomes empty."""

from __future__ import annotations

import dataclasses
import re

import numpy as np
import pytest

from comoe.data.posts import PostSplit, unlabelled_posts
from comoe.data.text.noise import NOISES, noisy

TEXTS = [
    "the weather is really wonderful around here today #sunny https://example.org/abc @someone",
    "nobody expected anything like that from these people 😀 great",
    "#only",
    "😀",
]


def changed(
    name: str, posts: PostSplit | None = None, *, rate: float = 0.3, seed: int = 0
) -> PostSplit:
    return noisy(posts or unlabelled_posts(TEXTS, tasks=[]), name, rate=rate, seed=seed)


def test_typos_depend_on_the_post_and_the_seed_alone() -> None:
    posts = unlabelled_posts(TEXTS, tasks=[])
    first = changed("typos").texts
    assert first != TEXTS and changed("typos").texts == first
    assert changed("typos", posts.take(np.array([1, 0]))).texts == [first[1], first[0]]
    assert changed("typos", seed=1).texts != first


@pytest.mark.parametrize("rate", [0.1, 0.5, 1.0])
def test_the_rate_is_the_share_of_the_words_with_one_slip(rate: float) -> None:
    words = ["weather", "people", "nothing", "yesterday"]
    posts = unlabelled_posts(
        [" ".join(np.random.default_rng(i).choice(words, 20)) for i in range(50)], tasks=[]
    )
    before = [word for text in posts.texts for word in text.split()]
    after = [word for text in changed("typos", posts, rate=rate).texts for word in text.split()]
    slips = [(a, b) for a, b in zip(before, after, strict=True) if a != b]
    assert len(slips) / len(before) == pytest.approx(rate, abs=0.05)
    assert all(abs(len(a) - len(b)) <= 1 and a[0] == b[0] for a, b in slips)
    if rate == 1.0:
        kinds = {len(b) - len(a) for a, b in slips}
        swaps = [1 for a, b in slips if sorted(a) == sorted(b)]
        keys = [1 for a, b in slips if len(a) == len(b) and sorted(a) != sorted(b)]
        assert kinds == {-1, 0, 1} and swaps and keys


def test_links_users_hashtags_and_short_words_have_no_typos() -> None:
    posts = unlabelled_posts(
        ["@someone #sunny https://example.org/abc an of I 42 :) 天气很好"], tasks=[]
    )
    assert changed("typos", posts, rate=1.0).texts == posts.texts


def test_no_typos_at_rate_0() -> None:
    assert changed("typos", rate=0.0).texts == TEXTS


def test_informal_posts_have_short_forms_and_letters_drawn_out() -> None:
    posts = unlabelled_posts(
        ["Thanks, I don\u2019t know why YOU'RE late! @to #for www.to.org/you 天气", "bad café, 42"],
        tasks=[],
    )
    assert changed("informal", posts, rate=0.0).texts == [
        "thx, I dont kno y UR l8! @to #for www.to.org/you 天气",
        "bad café, 42",
    ]
    drawn = changed("informal", posts, rate=1.0).texts
    assert re.fullmatch("thx, I{3,5} do{3,5}nt kno y UR l8! @to #for www.to.org/you 天气", drawn[0])
    assert re.fullmatch("ba{3,5}d ca{3,5}fé, 42", drawn[1])
    words = unlabelled_posts(["nice place " * 500], tasks=[])
    long = [word for word in changed("informal", words, rate=0.3).texts[0].split()]
    share = sum(word not in ("nice", "place") for word in long) / len(long)
    assert share == pytest.approx(0.3, abs=0.05)


def test_hashtags_and_emoji_are_dropped_and_no_post_becomes_empty() -> None:
    assert [text.split() for text in changed("no_hashtags").texts] == [
        [word for word in TEXTS[0].split() if word != "#sunny"], TEXTS[1].split(), ["#only"], ["😀"],
    ]  # fmt: skip
    assert changed("no_emoji").texts[1].split() == TEXTS[1].replace("😀", "").split()
    assert changed("no_emoji").texts[3] == "😀"


def test_chinese_topics_and_emoji_codes_are_known() -> None:
    posts = unlabelled_posts(["今天#好天气#真好[笑cry]", "see [1] for #c"], tasks=[])
    assert "".join(changed("no_hashtags", posts).texts[0].split()) == "今天真好[笑cry]"
    assert changed("no_emoji", posts).texts[0].split() == ["今天#好天气#真好"]
    assert changed("no_emoji", posts).texts[1] == "see [1] for #c"


@pytest.mark.parametrize("name", sorted(NOISES))
def test_a_post_as_words_keeps_its_words_and_everything_else(name: str) -> None:
    words = [["the", "wonderful", "#sunny", "day", "😀"], None]
    texts = ["the wonderful #sunny day 😀", "plain weather"]
    posts = unlabelled_posts(texts, tasks=["t"], words=words, pairs=["a", None])
    posts = dataclasses.replace(posts, labels={"t": [[0, 1, 2, 0, 0], None]})
    made = changed(name, posts, rate=1.0)
    assert len(made.words[0]) == 5 and made.words[1] is None
    assert (made.labels, list(made.pairs), made.origins) == (
        posts.labels,
        ["a", None],
        posts.origins,
    )
    expected = {
        "no_hashtags": ["sunny", "😀"],
        "no_emoji": ["#sunny", ""],
        "typos": ["#sunny", "😀"],
        "informal": ["#sunny", "😀"],
    }
    assert [made.words[0][2], made.words[0][4]] == expected[name]
