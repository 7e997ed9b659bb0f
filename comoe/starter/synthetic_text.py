"""Generated posts for tests and for trying the program out: no download, seconds to train on, labels lie in the words.

One data set with four tasks on the same posts (two of single label, one regression, one multi
label), one with word tags, one with text pairs; and four data sets laid out as the recipe
tacl_comoe reads them.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Mapping, Sequence
from itertools import islice
from pathlib import Path

from comoe.starter.kit_posts import write_json_lines
from comoe.starter.synthetic_images import caption_words

Post = dict[str, object]
"""One generated post with its labels; the text comes first."""


Generator = Callable[[random.Random], Post]
"""Random numbers -> one post."""


SIZES = {"train": 400, "validation": 80, "test": 80}
"""Split -> posts per data set."""


MISSING_SHARE = 0.1
"""Share of the posts without a topic."""


MOODS = {
    "negative": (("awful", -1.0), ("broken", -0.75), ("sad", -0.5), ("boring", -0.25)),
    "neutral": (("usual", 0.0), ("plain", 0.0), ("ordinary", 0.0), ("standard", 0.0)),
    "positive": (("nice", 0.25), ("fun", 0.5), ("lovely", 0.75), ("brilliant", 1.0)),
}
"""Mood -> words with their strength, the number that the regression task asks for."""


TOPICS = {
    "food": ("soup", "bread", "cake", "salad"),
    "music": ("song", "band", "drums", "choir"),
    "sport": ("match", "goal", "team", "race"),
    "travel": ("train", "hotel", "beach", "ticket"),
}
"""Topic -> its words."""


ASPECTS = {
    "price": ("cheap", "costly"),
    "service": ("waiter", "staff"),
    "place": ("garden", "hall"),
}
"""Aspect -> words that mention it; a post may mention none or several."""


BRANDS = ("acme", "zenith", "orion", "lumen")
"""Names of one word, tagged B-brand."""


CITIES = ("port ellis", "san remo", "new haven", "old bridge")
"""Names of two words, tagged B-city I-city."""


SHORTEST, LONGEST = 6, 12
"""Words in a post: alike in all data sets, so that batches of similar length hold posts of each."""


TARGETS = ("cars", "trees", "robots", "taxes")
"""What a stance post may be about."""


STANCES = {
    "against": ("stop", "ban", "no"),
    "favor": ("more", "love", "yes"),
    "none": ("count", "see", "read"),
}
"""Stance -> verbs in front of the target."""


FILLERS = (
    "the",
    "a",
    "today",
    "again",
    "really",
    "so",
    "with",
    "my",
    "friend",
    "and",
    "this",
    "@user",
    "#weekend",
)
"""Words that say nothing."""


def generate(
    name: str, *, count: int, seed: int, generators: Mapping[str, Generator] | None = None
) -> list[Post]:
    """Posts of one generated data set, no two alike; the same arguments give the same posts.

    Args:
        name: key of ``generators``.
        count: number of posts, some thousands at most.
        seed: seed of the random numbers.
        generators: data set -> one post; None is ``GENERATORS``.
    """
    draw, generator = (
        random.Random(f"{name}/{seed}"),
        (GENERATORS if generators is None else generators)[name],
    )
    posts: dict[str, Post] = {}
    while len(posts) < count:
        post = generator(draw)
        posts.setdefault(str(next(iter(post.values()))), post)
    return list(posts.values())


def build_generated_posts(
    folder: Path, *, generators: Mapping[str, Generator] | None = None
) -> None:
    """Write each generated data set as ``folder/<data set>/<split>.jsonl``; None is ``GENERATORS``."""
    for name in GENERATORS if generators is None else generators:
        (folder / name).mkdir()
        posts = iter(generate(name, count=sum(SIZES.values()), seed=0, generators=generators))
        for split, count in SIZES.items():
            write_json_lines(folder / name / f"{split}.jsonl", islice(posts, count))


def vocabulary() -> list[str]:
    """WordPiece vocabulary of all generated words, then letters and signs, so that other text can be read too."""
    letters = [chr(code) for code in range(33, 127) if not chr(code).isupper()]
    groups = [
        FILLERS, BRANDS, TARGETS, (word for city in CITIES for word in city.split()),
        (word for words in MOODS.values() for word, _ in words), *TOPICS.values(), *ASPECTS.values(), *STANCES.values(),
        caption_words(),
    ]  # fmt: skip
    # WordPiece splits signs off first: "@user" arrives as "@" and "user".
    words = [word.lstrip("@#") for group in groups for word in group]
    special = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]"]
    return list(dict.fromkeys([*special, *words, *letters, *(f"##{letter}" for letter in letters)]))


def _review(draw: random.Random) -> Post:
    mood, topic = draw.choice(tuple(MOODS)), draw.choice(tuple(TOPICS))
    mood_word, strength = draw.choice(MOODS[mood])
    aspects = [aspect for aspect in ASPECTS if draw.random() < 0.4]
    words = [
        mood_word,
        draw.choice(TOPICS[topic]),
        *(draw.choice(ASPECTS[aspect]) for aspect in aspects),
    ]
    return {
        "text": " ".join(_among_fillers(draw, words, spare=0)),
        "mood": mood,
        "topic": None if draw.random() < MISSING_SHARE else topic,
        "strength": strength,
        "aspects": aspects,
    }


def _mention(draw: random.Random) -> Post:
    words, tags = [], []
    named = draw.choice((["BRAND"], ["CITY"], ["BRAND", "CITY"]))
    for word in _among_fillers(draw, named, spare="CITY" in named):
        if word == "BRAND":
            words, tags = [*words, draw.choice(BRANDS)], [*tags, "B-brand"]
        elif word == "CITY":
            words, tags = [*words, *draw.choice(CITIES).split()], [*tags, "B-city", "I-city"]
        else:
            words, tags = [*words, word], [*tags, "O"]
    return {"words": words, "tags": tags}


def _stance(draw: random.Random) -> Post:
    """Two targets per text with a stance each: the label depends on which one is asked for."""
    first, second = draw.sample(TARGETS, 2)
    stances = {target: draw.choice(tuple(STANCES)) for target in (first, second)}
    clauses = [f"{draw.choice(STANCES[stances[target]])} {target}" for target in (first, second)]
    asked = draw.choice((first, second))
    # The target is a second text: a word and a separator more.
    text = " ".join(_among_fillers(draw, clauses, spare=4))
    return {"text": text, "target": asked, "stance": stances[asked]}


def _among_fillers(draw: random.Random, words: Sequence[str], *, spare: int) -> list[str]:
    """The words in any order among words that say nothing; ``spare`` is how many more words they will become."""
    length = draw.randint(SHORTEST, LONGEST)
    mixed = [*words, *draw.sample(FILLERS, max(0, length - len(words) - spare))]
    draw.shuffle(mixed)
    return mixed


def _hate(draw: random.Random) -> Post:
    mood, target = draw.choice(tuple(MOODS)), draw.choice(TARGETS)
    text = " ".join(_among_fillers(draw, [draw.choice(MOODS[mood])[0], target], spare=0))
    return {"text": text, "label": "hate" if mood == "negative" else "not-hate"}


def _entities(draw: random.Random) -> Post:
    post = _mention(draw)
    return {"tokens": post["words"], "tags": post["tags"]}


def _tacl_stance(draw: random.Random) -> Post:
    post = _stance(draw)
    return {"text": post["text"], "target": post["target"], "label": post["stance"]}


def _topic(draw: random.Random) -> Post:
    topic = draw.choice(tuple(TOPICS))
    return {
        "text": " ".join(_among_fillers(draw, draw.sample(TOPICS[topic], 2), spare=0)),
        "label": topic,
    }


GENERATORS: dict[str, Generator] = {"reviews": _review, "mentions": _mention, "stance": _stance}
"""Data set of ``smoke:posts`` -> its generator."""


TACL_GENERATORS: dict[str, Generator] = {
    "hate": _hate, "entities": _entities, "stance": _tacl_stance, "topic": _topic,
}  # fmt: skip
"""Data set of ``smoke:tacl_posts`` -> its generator."""
