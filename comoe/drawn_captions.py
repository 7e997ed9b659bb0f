"""Plans of generated posts with pictures: what is drawn, what the caption says, and the labels that follow.

Some tasks need the text alone, some the picture alone, two need both: for these each side alone tells exactly nothing.
"""

from __future__ import annotations

import random
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import islice, product

SHAPES = ("circle", "square", "triangle")
"""What is drawn."""
COLOURS = ("red", "green", "blue", "yellow")
"""Of all shapes of a picture."""
NUMBERS = (1, 2, 3)
"""How many of them."""
LIGHTS = ("bright", "gloomy")
"""Of the background."""
MOODS = {
    "positive": ("happy", "lovely", "great", "sweet", "sunny", "glad", "superb", "joyful"),
    "negative": ("gloomy", "awful", "sad", "bitter", "nasty", "grim", "lonely", "dull"),
}
"""Mood of the words -> the words."""
NUMBER_WORDS = {1: ("one", "1", "single"), 2: ("two", "2", "pair"), 3: ("three", "3", "trio")}
"""Number -> how captions write it."""
CLAIMS = {
    "colour": ("all in {}", "so much {}", "look , {} !", "painted it {}", "{} again"),
    "number": ("i see {}", "{} of them", "count : {}", "only {} here", "there is {}"),
}
"""What a caption speaks of -> how."""
OPENINGS = ("", "omg", "lol", "ok so", "hey @user", "today :", "well ,", "rt @user :", "new post :", "my wall :")
"""How a caption begins."""
ENDINGS = ("", "!", "!!", "...", "#art", "#photo", "#nofilter", "#weekend", "what do you think ?", "http")
"""How it ends."""
FEELINGS = ("feeling {}", "{} mood", "what a {} day", "{} vibes", "a {} thing", "{} , really")
"""How it says a mood."""
WITHOUT_PICTURE = 0.1
"""Share of the posts without picture: only the text's own tasks have a label there."""


@dataclass(frozen=True, slots=True)
class Plan:
    """One post."""

    text: str
    """The caption."""
    mood: str
    """Mood of its words."""
    topic: str
    """What the caption speaks of, a key of ``CLAIMS``."""
    claim: str | int
    """The colour or number that it names."""
    shape: str | None
    """What is drawn; None for a post without picture."""
    colour: str
    """Of the shapes."""
    number: int
    """How many shapes."""
    light: str
    """Of the background."""

    def labels(self) -> dict[str, str | None]:
        """Task -> label, None where the post has none."""
        told = {"sentiment": self.mood, "claim": str(self.claim)}
        if self.shape is None:
            return told | dict.fromkeys(("shape", "colour", "number", "light", "contradiction", "sarcasm"))
        agrees = self.claim == {"colour": self.colour, "number": self.number}[self.topic]
        sincere = (self.mood == "positive") == (self.light == "bright")
        return told | {
            "shape": self.shape,
            "colour": self.colour,
            "number": str(self.number),
            "light": self.light,
            "contradiction": "agrees" if agrees else "contradicts",
            "sarcasm": "sincere" if sincere else "sarcastic",
        }


def plan_posts(*, count: int, seed: int, name: str = "train") -> list[Plan]:
    """Posts in random order; the same arguments give the same posts.

    Among any ``BLOCK`` posts with pictures from the beginning on, every picture comes with every text equally often as
    far as the labels go, so that half of them contradict, whatever the picture alone, or the text alone, is.

    Args:
        count: number of posts.
        seed: seed of the random numbers.
        name: of the split; another name gives other posts.
    """
    return list(islice(_endless(random.Random(f"drawn/{name}/{seed}")), count))


def caption_words() -> list[str]:
    """Every word and sign of the captions, for a vocabulary."""
    phrases = [*OPENINGS, *ENDINGS, *FEELINGS, *CLAIMS["colour"], *CLAIMS["number"], *COLOURS]
    phrases += [word for words in (*MOODS.values(), *NUMBER_WORDS.values()) for word in words]
    # WordPiece splits signs off first.
    words = [word.strip("@#.!?{}") for phrase in phrases for word in phrase.split()]
    return list(dict.fromkeys(word for word in words if word))


def _endless(draw: random.Random) -> Iterator[Plan]:
    while True:
        block = list(_block())
        draw.shuffle(block)
        for shape, colour, number, light, mood, topic, claim in block:
            if draw.random() < WITHOUT_PICTURE:
                yield Plan(_caption(draw, mood, topic, claim), mood, topic, claim, None, colour, number, light)
            yield Plan(_caption(draw, mood, topic, claim), mood, topic, claim, shape, colour, number, light)


def _block() -> Iterator[tuple]:
    """Every picture with every mood and topic; true claims as often as false ones, which take all values in turn."""
    for shape, colour, number, light, mood in product(SHAPES, COLOURS, NUMBERS, LIGHTS, MOODS):
        for topic, true, values in (("colour", colour, COLOURS), ("number", number, NUMBERS)):
            false = [value for value in values if value != true]
            for turn in range(TURNS):
                yield shape, colour, number, light, mood, topic, true
                yield shape, colour, number, light, mood, topic, false[turn % len(false)]


def _caption(draw: random.Random, mood: str, topic: str, claim: str | int) -> str:
    said = draw.choice(NUMBER_WORDS[claim]) if isinstance(claim, int) else claim
    parts = [draw.choice(FEELINGS).format(draw.choice(MOODS[mood])), draw.choice(CLAIMS[topic]).format(said)]
    draw.shuffle(parts)
    return " ".join([draw.choice(OPENINGS), *parts, draw.choice(ENDINGS)]).strip()


TURNS = 6
"""Divides evenly among the three false colours and the two false numbers."""
BLOCK = len(list(_block()))
"""Posts with pictures after which everything has come equally often."""
