"""Generated posts with images whose relation is known: is what the text names drawn, and does the image add meaning?

The four relations of Vempala and Preotiuc-Pietro, 2019 (https://aclanthology.org/P19-1272), and one
sentiment that is to be told whatever the relation is:

==============  =======  ===========================  =============================================
relation        share    what the post has            what tells its sentiment
==============  =======  ===========================  =============================================
shown_only      3/8      the named thing; mood words  the words; the light is a coin's toss
absent_only     1/8      another thing; mood words    the words; the light is a coin's toss
shown_adds      3/8      the named thing; plain       the light of the image
                         words
absent_adds     1/8      another thing; plain words   the light, reversed: who promises one thing and
                                                      shows another is ironic
==============  =======  ===========================  =============================================

The text alone is right in at most 3/4 of the posts, the image alone in 5/8. Who reads both but does
not compare the named thing with the drawn one is right in at most 7/8, and always wrong in
absent_adds.
"""

from __future__ import annotations

import random
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import islice, product
from pathlib import Path

import numpy as np
from PIL import Image, ImageDraw

from comoe.starter.kit_posts import write_json_lines
from comoe.starter.synthetic_images import (
    ENDINGS,
    FEELINGS,
    LEVELS,
    MOODS,
    OPENINGS,
    PAINTS,
    PENS,
    SIZE,
)

THINGS = {
    "cake": ("circle", "red"),
    "hotel": ("square", "blue"),
    "garden": ("triangle", "green"),
    "beach": ("square", "yellow"),
}
"""What a text can name -> the shape and the color that stand for it in an image."""


MENTIONS = ("look , the {} !", "my {} again", "the {} today", "only {} here", "i see the {}")
"""How a text names it."""


NEUTRAL = ("usual", "plain", "ordinary", "standard")
"""Words of no mood."""


LIGHT_OF = {"positive": "bright", "negative": "gloomy"}
"""Sentiment -> the light that says it."""


OPPOSITE = {"positive": "negative", "negative": "positive"}
"""Sentiment -> the other one."""


COUNTS = {"train": 1600, "validation": 200, "test": 1200}
"""Split -> posts."""


@dataclass(frozen=True, slots=True)
class RelatedPost:
    """One post."""

    text: str
    """The caption."""
    named: str
    """The thing that it names, a key of ``THINGS``."""
    drawn: str
    """The thing in the image."""
    light: str
    """Of the background."""
    sentiment: str
    """The label."""
    shown: bool
    """Whether the named thing is drawn."""
    adds: bool
    """Whether the image says the sentiment, and not the words."""

    @property
    def relation(self) -> str:
        """``shown_only``, ``shown_adds``, ``absent_only`` or ``absent_adds``."""
        return f"{'shown' if self.shown else 'absent'}_{'adds' if self.adds else 'only'}"


def plan_related_posts(*, count: int, seed: int, name: str = "train") -> list[RelatedPost]:
    """Posts in random order; the same arguments give the same posts.

    Among any ``BLOCK`` posts from the beginning on, each relation comes with every sentiment, named
    thing, drawn thing and light equally often.

    Args:
        count: number of posts.
        seed: seed of the random numbers.
        name: of the split; another name gives other posts.
    """
    return list(islice(_endless(random.Random(f"related/{name}/{seed}")), count))


def _endless(draw: random.Random) -> Iterator[RelatedPost]:
    while True:
        block = [
            (shown, adds, sentiment, named, drawn, light)
            for adds, sentiment, named, drawn, light in product(
                (True, False), LIGHT_OF, THINGS, THINGS, LEVELS
            )
            for shown in [named == drawn]
            # Each thing is drawn nine times where it is named for once with another name.
            for _ in range(9 if shown else 1)
        ]
        draw.shuffle(block)
        for shown, adds, sentiment, named, drawn, light in block:
            if adds:
                light = LIGHT_OF[sentiment if shown else OPPOSITE[sentiment]]
            words = NEUTRAL if adds else MOODS[sentiment]
            parts = [
                draw.choice(FEELINGS).format(draw.choice(words)),
                draw.choice(MENTIONS).format(named),
            ]
            draw.shuffle(parts)
            text = " ".join([draw.choice(OPENINGS), *parts, draw.choice(ENDINGS)]).strip()
            yield RelatedPost(text, named, drawn, light, sentiment, shown, adds)


BLOCK = 2 * len(LIGHT_OF) * len(LEVELS) * len(THINGS) * (9 + len(THINGS) - 1)
"""Posts after which everything has come equally often."""


def draw_related_image(plan: RelatedPost, *, seed: int | Sequence[int]) -> Image.Image:
    """The image of a post, RGB; the same arguments give the same image.

    Things differ in place, size and shade; the background is smooth noise in the image's light.
    """
    random = np.random.default_rng(seed)
    coarse = random.integers(*LEVELS[plan.light], size=(6, 6, 3), dtype=np.uint8)
    image = Image.fromarray(coarse).resize((SIZE, SIZE), Image.Resampling.BICUBIC)
    shape, color = THINGS[plan.drawn]
    radius = random.uniform(0.2, 0.35) * SIZE
    x, y = random.uniform(radius, SIZE - radius, size=2).tolist()
    shade = np.clip(np.array(PAINTS[color]) + random.integers(-20, 21, size=3), 0, 255)
    PENS[shape](ImageDraw.Draw(image), x, y, radius, tuple(shade.tolist()))
    return image


def build_related_posts(
    folder: Path, *, counts: Mapping[str, int] | None = None, seed: int = 0
) -> None:
    """Write ``related/<split>.jsonl`` and ``related/pictures/<split>-<number>.png``.

    Args:
        folder: an existing, empty folder.
        counts: split -> posts; None is ``COUNTS``.
        seed: seed of the random numbers.
    """
    folder = folder / "related"
    (folder / "pictures").mkdir(parents=True)
    for part, (split, count) in enumerate((COUNTS if counts is None else counts).items()):
        rows = []
        for number, plan in enumerate(plan_related_posts(count=count, seed=seed, name=split)):
            name = f"pictures/{split}-{number:05d}.png"
            draw_related_image(plan, seed=[seed, part, number]).save(folder / name)
            yes_or_no = ("no", "yes")
            rows.append(
                {
                    "text": plan.text,
                    "image": name,
                    "sentiment": plan.sentiment,
                    "relation": plan.relation,
                    "text_shown": yes_or_no[plan.shown],
                    "image_adds": yes_or_no[plan.adds],
                }
            )
        write_json_lines(folder / f"{split}.jsonl", rows)
