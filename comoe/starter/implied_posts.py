"""Generated posts whose polarity follows from aspect and opinion together, most of them without naming either.

A long battery life is good and a long wait is bad: neither the aspect nor the opinion alone
determines the polarity. Most posts paraphrase both (a charger, hours), so that few polarity labels
are not enough to learn it, while the auxiliary labels (aspect, opinion) give the meaning of the
words. A second set of auxiliary labels is partly wrong, with a confidence column that shows it.
"""

from __future__ import annotations

import random
from collections.abc import Iterator, Mapping
from itertools import islice, product
from pathlib import Path

from comoe.starter.kit_posts import write_json_lines

COUNTS = {"train": 1200, "validation": 300, "test": 1000}
"""Split -> posts."""


WRONG_SHARE = 0.6
"""Share of wrong labels in the second set."""


WRONG_CONFIDENCE, RIGHT_CONFIDENCE = (0.05, 0.2), (0.8, 1.0)
"""Lowest and highest confidence of a wrong and of a right label of the second set."""


IMPLICIT_SHARE = 0.7
"""Share of the posts that paraphrase aspect and opinion."""


PAIRS = {
    ("long", "short"): ("battery", "wait"),
    ("high", "low"): ("speed", "price"),
    ("big", "small"): ("portion", "crowd"),
    ("hot", "cold"): ("coffee", "room"),
    ("loud", "quiet"): ("music", "street"),
}
"""Opinion and its opposite -> an aspect that the first is good for and one that it is bad for."""


ASPECTS = {
    "battery": ("charger", "socket", "plug"),
    "wait": ("queue", "line", "turn"),
    "speed": ("pages", "apps", "scrolling"),
    "price": ("wallet", "cash", "receipt"),
    "portion": ("plate", "bowl", "slice"),
    "crowd": ("people", "tourists", "strangers"),
    "coffee": ("cup", "espresso", "latte"),
    "room": ("sofa", "ceiling", "window"),
    "music": ("song", "bass", "melody"),
    "street": ("traffic", "cars", "trucks"),
}
"""Aspect -> words of an implicit post for it."""


OPINIONS = {
    "long": ("hours", "forever", "ages"),
    "short": ("minutes", "seconds", "blink"),
    "high": ("peak", "soaring", "record"),
    "low": ("bottom", "sinking", "floor"),
    "big": ("huge", "mountain", "giant"),
    "small": ("tiny", "handful", "few"),
    "hot": ("steaming", "boiling", "oven"),
    "cold": ("ice", "frozen", "fridge"),
    "loud": ("booming", "thunder", "roaring"),
    "quiet": ("silent", "whisper", "library"),
}
"""Opinion -> the same."""


TARGETS = ("acme", "zenith", "orion", "lumen")
"""Target of a post; independent of all labels."""


OPENINGS = (
    "",
    "ok so",
    "well ,",
    "today at",
    "back from",
    "again with",
    "my friend and",
    "hey @user :",
    "news from",
)
"""How a post begins, the target behind it."""


FORMS = (
    ": {aspect} , {opinion}", ": {opinion} , {aspect}", "and the {aspect} : {opinion}", ", {opinion} , the {aspect}",
    "... {aspect} and {opinion}", "... {opinion} and {aspect}",
)  # fmt: skip
"""How it goes on."""


ENDINGS = ("", ".", "!", "...", "#weekend", "really", "you know", "as i said", "this time")
"""How it ends."""


def plan_implied_posts(*, count: int, seed: int, name: str = "train") -> list[dict[str, object]]:
    """Posts, no two alike; the same arguments give the same posts.

    Any 20 posts from the beginning on hold every aspect with both of its opinions once.

    Args:
        count: number of posts.
        seed: seed of the random numbers.
        name: of the split; another name gives other posts.
    """
    draw = random.Random(f"implied/{name}/{seed}")
    return list(islice(_endless(draw), count))


def build_implied_posts(
    folder: Path, *, counts: Mapping[str, int] | None = None, seed: int = 0
) -> None:
    """Write ``implied/<split>.jsonl``; no post is in two splits, and wrong guesses are in ``train`` alone.

    Args:
        folder: an existing, empty folder.
        counts: split -> posts; None is ``COUNTS``.
        seed: seed of the random numbers.
    """
    (folder / "implied").mkdir()
    sizes = COUNTS if counts is None else counts
    posts = iter(plan_implied_posts(count=sum(sizes.values()), seed=seed))
    for split, count in sizes.items():
        rows = list(islice(posts, count))
        if split != "train":
            # Predictions learned from guesses are evaluated against the right labels.
            for post, column in product(rows, ("aspect", "opinion")):
                post |= {f"guessed_{column}": post[column], f"guessed_{column}_confidence": 1.0}
        write_json_lines(folder / "implied" / f"{split}.jsonl", rows)


def implied_words() -> list[str]:
    """Every word and sign of the posts and their labels, for a vocabulary."""
    phrases = [
        *OPENINGS,
        *FORMS,
        *ENDINGS,
        *TARGETS,
        "positive negative polarity aspect opinion true false",
    ]
    phrases += [
        word
        for table in (ASPECTS, OPINIONS)
        for name, cues in table.items()
        for word in (name, *cues)
    ]
    words = [word.strip("@#{}") for phrase in phrases for word in phrase.split()]
    return list(dict.fromkeys(word for word in words if word))


def _endless(draw: random.Random) -> Iterator[dict[str, object]]:
    cells = [
        (aspect, opinion, (aspect == good) == (opinion == first))
        for (first, second), (good, bad) in PAIRS.items()
        for aspect in (good, bad)
        for opinion in (first, second)
    ]
    seen = set()
    while True:
        draw.shuffle(cells)
        for cell in cells:
            post = _post(draw, *cell)
            while post["text"] in seen:
                post = _post(draw, *cell)
            seen.add(post["text"])
            yield post


def _post(draw: random.Random, aspect: str, opinion: str, is_positive: bool) -> dict[str, object]:
    implicit = draw.random() < IMPLICIT_SHARE
    cues = {"aspect": draw.choice(ASPECTS[aspect]), "opinion": draw.choice(OPINIONS[opinion])}
    cues = cues if implicit else {"aspect": aspect, "opinion": opinion}
    target = draw.choice(TARGETS)
    parts = [draw.choice(OPENINGS), target, draw.choice(FORMS).format(**cues), draw.choice(ENDINGS)]
    guesses: dict[str, object] = {}
    for column, right, known in (("aspect", aspect, ASPECTS), ("opinion", opinion, OPINIONS)):
        wrong = draw.random() < WRONG_SHARE
        low, high = WRONG_CONFIDENCE if wrong else RIGHT_CONFIDENCE
        guesses[f"guessed_{column}"] = (
            draw.choice([name for name in known if name != right]) if wrong else right
        )
        guesses[f"guessed_{column}_confidence"] = round(draw.uniform(low, high), 4)
    return {
        "text": " ".join(part for part in parts if part), "target": target,
        "polarity": "positive" if is_positive else "negative", "implicit": implicit,
        "aspect": aspect, "opinion": opinion, **guesses,
    }  # fmt: skip
