"""Generated posts with images: what is drawn, what the caption says, and the labels that follow.

Some tasks need the text alone, some the image alone, two need both: for these each side alone tells
exactly nothing.
"""

from __future__ import annotations

import math
import random
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from itertools import islice, product
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image, ImageDraw

from comoe.starter.kit_posts import write_json_lines

SHAPES = ("circle", "square", "triangle")
"""What is drawn."""


COLORS = ("red", "green", "blue", "yellow")
"""Of all shapes of an image."""


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


OPENINGS = (
    "",
    "omg",
    "lol",
    "ok so",
    "hey @user",
    "today :",
    "well ,",
    "rt @user :",
    "new post :",
    "my wall :",
)
"""How a caption begins."""


ENDINGS = (
    "",
    "!",
    "!!",
    "...",
    "#art",
    "#photo",
    "#nofilter",
    "#weekend",
    "what do you think ?",
    "http",
)
"""How it ends."""


FEELINGS = ("feeling {}", "{} mood", "what a {} day", "{} vibes", "a {} thing", "{} , really")
"""How it says a mood."""


WITHOUT_IMAGE = 0.1
"""Share of the posts without image: only the text's own tasks have a label there."""


@dataclass(frozen=True, slots=True)
class PlannedPost:
    """One post."""

    text: str
    """The caption."""
    mood: str
    """Mood of its words."""
    topic: str
    """What the caption speaks of, a key of ``CLAIMS``."""
    claim: str | int
    """The color or number that it names."""
    shape: str | None
    """What is drawn; None for a post without image."""
    colour: str
    """Of the shapes."""
    number: int
    """How many shapes."""
    light: str
    """Of the background."""

    def labels(self) -> dict[str, str | None]:
        """Task -> label, None where the post has none."""
        labels = {"sentiment": self.mood, "claim": str(self.claim)}
        if self.shape is None:
            return labels | dict.fromkeys(
                ("shape", "colour", "number", "light", "contradiction", "sarcasm")
            )
        agrees = self.claim == {"colour": self.colour, "number": self.number}[self.topic]
        sincere = (self.mood == "positive") == (self.light == "bright")
        return labels | {
            "shape": self.shape,
            "colour": self.colour,
            "number": str(self.number),
            "light": self.light,
            "contradiction": "agrees" if agrees else "contradicts",
            "sarcasm": "sincere" if sincere else "sarcastic",
        }


def plan_posts(*, count: int, seed: int, name: str = "train") -> list[PlannedPost]:
    """Posts in random order; the same arguments give the same posts.

    Among any ``BLOCK`` posts with images from the beginning on, every image comes with every
    text equally often as far as the labels go, so that half of them contradict, whatever the
    image alone, or the text alone, is.

    Args:
        count: number of posts.
        seed: seed of the random numbers.
        name: of the split; another name gives other posts.
    """
    return list(islice(_endless(random.Random(f"drawn/{name}/{seed}")), count))


def caption_words() -> list[str]:
    """Every word and sign of the captions, for a vocabulary."""
    phrases = [*OPENINGS, *ENDINGS, *FEELINGS, *CLAIMS["colour"], *CLAIMS["number"], *COLORS]
    phrases += [word for words in (*MOODS.values(), *NUMBER_WORDS.values()) for word in words]
    # WordPiece splits signs off first.
    words = [word.strip("@#.!?{}") for phrase in phrases for word in phrase.split()]
    return list(dict.fromkeys(word for word in words if word))


def _endless(draw: random.Random) -> Iterator[PlannedPost]:
    while True:
        block = list(_block())
        draw.shuffle(block)
        for shape, colour, number, light, mood, topic, claim in block:
            if draw.random() < WITHOUT_IMAGE:
                yield PlannedPost(
                    _caption(draw, mood, topic, claim),
                    mood,
                    topic,
                    claim,
                    None,
                    colour,
                    number,
                    light,
                )
            yield PlannedPost(
                _caption(draw, mood, topic, claim), mood, topic, claim, shape, colour, number, light
            )


def _block() -> Iterator[tuple]:
    """Every image with every mood and topic; true claims as often as false ones, which take all values in turn."""
    for shape, colour, number, light, mood in product(SHAPES, COLORS, NUMBERS, LIGHTS, MOODS):
        for topic, true, values in (("colour", colour, COLORS), ("number", number, NUMBERS)):
            false = [value for value in values if value != true]
            for turn in range(TURNS):
                yield shape, colour, number, light, mood, topic, true
                yield shape, colour, number, light, mood, topic, false[turn % len(false)]


def _caption(draw: random.Random, mood: str, topic: str, claim: str | int) -> str:
    shown = draw.choice(NUMBER_WORDS[claim]) if isinstance(claim, int) else claim
    parts = [
        draw.choice(FEELINGS).format(draw.choice(MOODS[mood])),
        draw.choice(CLAIMS[topic]).format(shown),
    ]
    draw.shuffle(parts)
    return " ".join([draw.choice(OPENINGS), *parts, draw.choice(ENDINGS)]).strip()


TURNS = 6
"""Divides evenly among the three false colors and the two false numbers."""


BLOCK = len(list(_block()))
"""Posts with images after which everything has come equally often."""


SIZE = 48
"""Height and width of an image, in pixels."""


COUNTS = {"train": 4000, "validation": 600, "test": 1000}
"""Split -> posts."""


PAINTS = {
    "red": (222, 45, 40),
    "green": (40, 165, 60),
    "blue": (45, 85, 225),
    "yellow": (245, 205, 25),
}
"""Color -> its RGB value, from which each image differs a little."""


LEVELS = {"bright": (185, 250), "gloomy": (15, 75)}
"""Light -> darkest and brightest value of the background."""


def draw_image(plan: PlannedPost, *, seed: int | Sequence[int]) -> Image.Image:
    """The image of a post, RGB; the same arguments give the same image.

    Shapes differ in place, size and shade; the background is smooth noise.
    """
    assert plan.shape is not None, "this post has no image"
    random = np.random.default_rng(seed)
    low, high = LEVELS[plan.light]
    coarse = random.integers(low, high, size=(6, 6, 3), dtype=np.uint8)
    image = Image.fromarray(coarse).resize((SIZE, SIZE), Image.Resampling.BICUBIC)
    pen = ImageDraw.Draw(image)
    half = SIZE // 2
    for quarter in random.permutation(4)[: plan.number]:
        radius = random.uniform(0.3, 0.46) * half
        shift = half / 2 - radius
        x, y = (
            half * (np.array([quarter % 2, quarter // 2]) + 0.5)
            + random.uniform(-shift, shift, size=2)
        ).tolist()
        shade = np.clip(np.array(PAINTS[plan.colour]) + random.integers(-20, 21, size=3), 0, 255)
        PENS[plan.shape](pen, x, y, radius, tuple(shade.tolist()))
    return image


def build_drawn_posts(
    folder: Path, *, counts: Mapping[str, int] | None = None, seed: int = 0
) -> None:
    """Write ``drawn/<split>.jsonl`` and ``drawn/pictures/<split>-<number>.png``.

    Args:
        folder: an existing, empty folder.
        counts: split -> posts; None is ``COUNTS``.
        seed: seed of the random numbers.
    """
    write_drawn(
        folder / "drawn",
        COUNTS if counts is None else counts,
        plan=partial(plan_posts, seed=seed),
        draw=draw_image,
        seed=seed,
    )


def write_drawn(
    folder: Path,
    counts: Mapping[str, int],
    *,
    plan: Callable[..., Sequence[Any]],
    draw: Callable[..., Image.Image],
    seed: int,
) -> None:
    """Write ``<split>.jsonl`` and ``pictures/<split>-<number>.png``.

    Args:
        folder: is created.
        counts: split -> posts.
        plan: (count, name of the split) -> posts with ``text``, ``labels()`` and, if there is none, ``shape`` None.
        draw: (post, seed) -> its image.
        seed: seed of the images.
    """
    (folder / "pictures").mkdir(parents=True)
    for part, (split, count) in enumerate(counts.items()):
        rows = []
        for number, post in enumerate(plan(count=count, name=split)):
            name = f"pictures/{split}-{number:05d}.png" if post.shape is not None else None
            if name is not None:
                draw(post, seed=[seed, part, number]).save(folder / name)
            rows.append({"text": post.text, "image": name, **post.labels()})
        write_json_lines(folder / f"{split}.jsonl", rows)


def _circle(
    pen: ImageDraw.ImageDraw, x: float, y: float, radius: float, fill: tuple[int, int, int]
) -> None:
    pen.ellipse((x - radius, y - radius, x + radius, y + radius), fill=fill)


def _square(
    pen: ImageDraw.ImageDraw, x: float, y: float, radius: float, fill: tuple[int, int, int]
) -> None:
    side = 0.9 * radius
    pen.rectangle((x - side, y - side, x + side, y + side), fill=fill)


def _triangle(
    pen: ImageDraw.ImageDraw, x: float, y: float, radius: float, fill: tuple[int, int, int]
) -> None:
    corners = [math.radians(angle) for angle in (-90, 30, 150)]
    pen.polygon(
        [(x + radius * math.cos(angle), y + radius * math.sin(angle)) for angle in corners],
        fill=fill,
    )


PENS: dict[str, Callable[..., None]] = {"circle": _circle, "square": _square, "triangle": _triangle}
"""Shape -> (pen, x, y, radius, fill) -> drawn."""
