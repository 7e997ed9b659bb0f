"""Generated posts whose labels one post alone cannot tell: of authors, of replies in threads, of turns of a dialogue.

An author is for or against brands, and says so in one of six posts, "love acme" or "stop acme"; the others love or
stop other things, so that neither the verb nor the brand tells. A reply says yes or no to a parent that loves or stops
a thing: its stance to the thing follows from both. A customer wants more or less of what the turn before names: the
intent, and the written reply, follow from both. What a single post tells at best is ``BEST_ALONE``.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Iterator
from itertools import count, islice
from pathlib import Path

from comoe.starter.kit_posts import write_json_lines
from comoe.starter.synthetic_text import BRANDS, FILLERS, TARGETS, TOPICS

SIZES = {"train": 400, "validation": 100, "test": 200}
"""Split -> authors, threads of two replies, or dialogues of two turns."""

POSTS_PER_AUTHOR = 6

BEST_ALONE = {"authors": 0.5 + 0.5 / POSTS_PER_AUTHOR, "threads": 0.5, "dialogues": 0.25}
"""Data set -> highest expected accuracy of an answer by one post alone."""

VERBS = {"fan": "love", "critic": "stop"}
"""Trait of an author -> verb in front of the brand."""

OFFERS = TOPICS["travel"]
"""What a dialogue may be about."""

WISHES = {"more": ("book", "see the {} today"), "stop": ("cancel", "no {} today")}
"""Word of a customer -> what is wanted, and the reply."""

Row = dict[str, object]


def authors(draw: random.Random, number: int) -> Iterator[Row]:
    """The posts of one author, with the author's trait in each row."""
    trait = draw.choice(tuple(VERBS))
    speaking = draw.randrange(POSTS_PER_AUTHOR)
    for place in range(POSTS_PER_AUTHOR):
        if place == speaking:
            words = [VERBS[trait], draw.choice(BRANDS)]
        else:
            words = [draw.choice(tuple(VERBS.values())), draw.choice(TARGETS)]
        yield {"text": _spoken(draw, words), "user": f"user_{number:04}", "trait": trait}


def threads(draw: random.Random, number: int) -> Iterator[Row]:
    """Two replies to one parent, below a first post that asks about the thing."""
    thing, verb = draw.choice(TARGETS), draw.choice(("love", "stop"))
    root = _spoken(draw, ["count", thing])
    parent = _spoken(draw, [verb, thing])
    for _ in range(2):
        word = draw.choice(("yes", "no"))
        stance = "favor" if (word == "yes") == (verb == "love") else "against"
        yield {
            "text": _spoken(draw, [word]), "parent": parent, "thread": [root, parent], "stance": stance,
            "conversation": f"thread_{number:04}",
        }  # fmt: skip


def dialogues(draw: random.Random, number: int) -> Iterator[Row]:
    """Two wishes of customers, each behind a turn that names the thing."""
    for _ in range(2):
        thing, word = draw.choice(OFFERS), draw.choice(tuple(WISHES))
        wanted, reply = WISHES[word]
        yield {
            "text": _spoken(draw, [word]), "before": _spoken(draw, [thing]), "intent": f"{wanted} {thing}",
            "reply": reply.format(thing),
        }  # fmt: skip


def _spoken(draw: random.Random, words: list[str]) -> str:
    """The words in their order, with some that say nothing before and behind."""
    before, behind = (draw.sample(FILLERS, draw.randint(1, 3)) for _ in range(2))
    return " ".join([*before, *words, *behind])


GENERATORS: dict[str, Callable[[random.Random, int], Iterator[Row]]] = {
    "authors": authors, "threads": threads, "dialogues": dialogues,
}  # fmt: skip
"""Data set of ``smoke:linked_posts`` -> the rows of one author, thread or dialogue."""


def build_linked_posts(folder: Path) -> None:
    """Write each data set as ``folder/<data set>/<split>.jsonl``; no author or thread is in two splits."""
    for name, generator in GENERATORS.items():
        (folder / name).mkdir()
        draw = random.Random(f"{name}/0")
        units = (list(generator(draw, number)) for number in count())
        for split, size in SIZES.items():
            rows = [row for unit in islice(units, size) for row in unit]
            write_json_lines(folder / name / f"{split}.jsonl", rows)
