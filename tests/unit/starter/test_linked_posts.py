"""The generated posts whose labels no single post tells: what tells them, and how much one post does at best."""

import json
from collections import Counter
from pathlib import Path

import pytest

from comoe.config.load import load_recipe
from comoe.config.ready_made import recipe_path
from comoe.data.corpus import load_corpus
from comoe.starter.linked_posts import (
    BEST_ALONE,
    OFFERS,
    POSTS_PER_AUTHOR,
    SIZES,
    WISHES,
    build_linked_posts,
)
from comoe.starter.synthetic_text import BRANDS


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    found = tmp_path_factory.mktemp("linked")
    build_linked_posts(found)
    return found


def rows(folder: Path, name: str) -> dict[str, list[dict]]:
    return {
        split: [json.loads(line) for line in (folder / name / f"{split}.jsonl").open()]
        for split in SIZES
    }


def best_by(found: list[dict], key, label: str) -> float:
    """Accuracy of the commonest label of each value of a key."""
    counts: dict[object, Counter] = {}
    for row in found:
        counts.setdefault(key(row), Counter())[row[label]] += 1
    return sum(max(count.values()) for count in counts.values()) / len(found)


def test_an_author_is_told_by_the_post_with_a_brand_and_by_no_other(folder):
    splits = rows(folder, "authors")
    homes: dict[str, str] = {}
    for split, found in splits.items():
        assert all(homes.setdefault(row["user"], split) == split for row in found)
        speaking = [row for row in found if any(brand in row["text"] for brand in BRANDS)]
        assert len(speaking) == SIZES[split] == len(found) / POSTS_PER_AUTHOR
        assert all(("love" in row["text"].split()) == (row["trait"] == "fan") for row in speaking)

    def said(row):
        words = row["text"].split()
        return "love" in words, any(brand in words for brand in BRANDS)

    assert best_by(splits["train"], said, "trait") == pytest.approx(BEST_ALONE["authors"], abs=0.03)


def test_a_reply_is_told_by_its_parent_and_a_turn_by_the_one_before(folder):
    replies = rows(folder, "threads")["train"]
    word = lambda row: "yes" in row["text"].split()  # noqa: E731
    assert best_by(replies, word, "stance") == pytest.approx(BEST_ALONE["threads"], abs=0.05)
    both = lambda row: (word(row), "love" in row["parent"].split())  # noqa: E731
    assert best_by(replies, both, "stance") == 1.0
    assert all(row["thread"][-1] == row["parent"] for row in replies)
    turns = rows(folder, "dialogues")["train"]
    more = lambda row: "more" in row["text"].split()  # noqa: E731
    for label in ("intent", "reply"):
        assert best_by(turns, more, label) == pytest.approx(BEST_ALONE["dialogues"], abs=0.05)
    for row in turns:
        (thing,) = set(row["before"].split()) & set(OFFERS)
        wanted, reply = WISHES["more" if more(row) else "stop"]
        assert (row["intent"], row["reply"]) == (f"{wanted} {thing}", reply.format(thing))


@pytest.mark.parametrize(
    ("name", "changes", "entries"),
    [
        ("authors_smoke", [], 400),
        ("authors_smoke", ["tasks.trait.per=post"], 2400),
        ("threads_smoke", ["tasks.stance.context_as=neighbors", "tasks.stance.context=thread"], 800),
        ("dialogue_smoke", [], 800),
    ],
)  # fmt: skip
def test_the_recipes_read_them(folder, name, changes, entries):
    corpus = load_corpus(load_recipe(recipe_path(name), [f"data.root={folder}", *changes]))
    assert len(corpus.splits["train"]) == entries
