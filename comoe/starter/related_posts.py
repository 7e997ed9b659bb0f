"""Generated posts with images whose relation is known: is what the text names drawn, and does the image add meaning?

The four relations of Vempala and Preotiuc-Pietro, 2019 (https://aclanthology.org/P19-1272), and one
sentiment that is to be told whatever the relation is:

============  =====  ===============================  ================================================
relation      share  what the post has                what tells its sentiment
============  =====  ===============================  ================================================
shown_only    3/8    the named thing; mood words      the words
absent_only   1/8    another thing; mood words        the words
shown_adds    1/4    the named thing; plain words     that the named thing is there: positive
absent_adds   1/4    another thing; plain words       that it is not: negative
============  =====  ===============================  ================================================

The text alone is right in at most 3/4 of the posts, the image alone in half of them. Plain words
want a comparison of what is named with what is drawn, which is also what the losses between image
and text want.
"""

from __future__ import annotations

import random
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from itertools import islice, product
from pathlib import Path

import numpy as np
from PIL import Image, ImageDraw

from comoe.starter.synthetic_images import (
    ENDINGS,
    FEELINGS,
    LEVELS,
    MOODS,
    OPENINGS,
    PAINTS,
    PENS,
    SIZE,
    write_drawn,
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


COUNTS = {"train": 1600, "validation": 200, "test": 600}
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
    def shape(self) -> str:
        """Of the drawn thing."""
        return THINGS[self.drawn][0]

    def labels(self) -> dict[str, str]:
        """The sentiment, the relation and its two sides."""
        return {
            "sentiment": self.sentiment,
            "relation": self.relation,
            "text_shown": "yes" if self.shown else "no",
            "image_adds": "yes" if self.adds else "no",
        }

    @property
    def relation(self) -> str:
        """``shown_only``, ``shown_adds``, ``absent_only`` or ``absent_adds``."""
        return f"{'shown' if self.shown else 'absent'}_{'adds' if self.adds else 'only'}"


def plan_related_posts(*, count: int, seed: int, name: str = "train") -> list[RelatedPost]:
    """Posts in random order; the same arguments give the same posts.

    Among any ``BLOCK`` posts from the beginning on, relations, sentiments, things
    and lights have exactly their shares.

    Args:
        count: number of posts.
        seed: seed of the random numbers.
        name: of the split; another name gives other posts.
    """
    return list(islice(_endless(random.Random(f"related/{name}/{seed}")), count))


def _endless(draw: random.Random) -> Iterator[RelatedPost]:
    while True:
        block = list(_block())
        draw.shuffle(block)
        for adds, sentiment, named, drawn, light in block:
            shown = named == drawn
            words = NEUTRAL if adds else MOODS[sentiment]
            parts = [
                draw.choice(FEELINGS).format(draw.choice(words)),
                draw.choice(MENTIONS).format(named),
            ]
            draw.shuffle(parts)
            text = " ".join([draw.choice(OPENINGS), *parts, draw.choice(ENDINGS)]).strip()
            yield RelatedPost(text, named, drawn, light, sentiment, shown, adds)


def _block() -> Iterator[tuple[bool, str, str, str, str]]:
    """Whether the image adds, sentiment, thing named, thing drawn and light, each as often as its share wants."""
    for named, drawn, light in product(THINGS, THINGS, LEVELS):
        shown, others = named == drawn, len(THINGS) - 1
        for _ in range(4 * others if shown else 4):
            yield True, "positive" if shown else "negative", named, drawn, light
        for sentiment in MOODS:
            for _ in range(3 * others if shown else 1):
                yield False, sentiment, named, drawn, light


BLOCK = len(list(_block()))
"""Posts after which everything has come equally often."""


def draw_related_image(plan: RelatedPost, *, seed: int | Sequence[int]) -> Image.Image:
    """The image of a post, RGB; the same arguments give the same image.

    Things differ in place, size and shade; the background is smooth noise in the image's light.
    """
    random = np.random.default_rng(seed)
    coarse = random.integers(*LEVELS[plan.light], size=(6, 6, 3), dtype=np.uint8)
    image = Image.fromarray(coarse).resize((SIZE, SIZE), Image.Resampling.BICUBIC)
    radius = random.uniform(0.2, 0.35) * SIZE
    x, y = random.uniform(radius, SIZE - radius, size=2).tolist()
    shade = np.clip(
        np.array(PAINTS[THINGS[plan.drawn][1]]) + random.integers(-20, 21, size=3), 0, 255
    )
    PENS[plan.shape](ImageDraw.Draw(image), x, y, radius, tuple(shade.tolist()))
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
    write_drawn(
        folder / "related",
        COUNTS if counts is None else counts,
        plan=partial(plan_related_posts, seed=seed),
        draw=draw_related_image,
        seed=seed,
    )
