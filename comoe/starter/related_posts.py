"""Generated posts with images whose relation is known: is what the text names drawn, and does the image add meaning?

The four relations of Vempala and Preotiuc-Pietro, 2019 (https://aclanthology.org/P19-1272) are
equally frequent, and one sentiment is to be told whatever the relation is:

==============  =====================================  ======================================
relation        what the post has                      what tells its sentiment
==============  =====================================  ======================================
shown_only      the named thing is drawn; mood words   the words; the light is a coin's toss
absent_only     another two things; mood words         the words; the light is a coin's toss
absent_adds     another two things; neutral words      the light, which is that of all the image
shown_adds      the named thing is drawn; neutral      the light behind the named thing; the other
                words                                  thing stands in the opposite light
==============  =====================================  ======================================

So the text alone is right in at most 3/4 of the posts, the image alone in 5/8.
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
    "soup": ("circle", "yellow"),
    "drums": ("circle", "blue"),
    "train": ("square", "red"),
    "hotel": ("square", "blue"),
    "garden": ("square", "green"),
    "beach": ("triangle", "yellow"),
    "trees": ("triangle", "green"),
}
"""What a text can name -> the shape and the color that stand for it in an image."""


MENTIONS = ("look , the {} !", "my {} again", "the {} today", "only {} here", "i see the {}")
"""How a text names it."""


NEUTRAL = ("usual", "plain", "ordinary", "standard")
"""Words of no mood."""


LIGHT_OF = {"positive": "bright", "negative": "gloomy"}
"""Sentiment -> the light that says it."""


OTHER_LIGHT = {"bright": "gloomy", "gloomy": "bright"}
"""Of two lights the other one."""


COUNTS = {"train": 2400, "validation": 200, "test": 1200}
"""Split -> posts."""


@dataclass(frozen=True, slots=True)
class RelatedPost:
    """One post."""

    text: str
    """The caption."""
    named: str
    """The thing that it names, a key of ``THINGS``."""
    drawn: tuple[str, str]
    """The things on the left and on the right."""
    lights: tuple[str, str]
    """The light behind each."""
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
    thing and light equally often.

    Args:
        count: number of posts.
        seed: seed of the random numbers.
        name: of the split; another name gives other posts.
    """
    return list(islice(_endless(random.Random(f"related/{name}/{seed}")), count))


def _endless(draw: random.Random) -> Iterator[RelatedPost]:
    while True:
        block = list(product(*[(True, False)] * 3, LIGHT_OF, THINGS, LEVELS))
        draw.shuffle(block)
        for shown, adds, on_the_right, sentiment, named, light in block:
            light = LIGHT_OF[sentiment] if adds else light
            others = draw.sample([thing for thing in THINGS if thing != named], 2)
            # The light is that of the named thing, or of both.
            drawn, lights = tuple(others), (light, light)
            if shown:
                drawn, lights = (named, others[0]), (light, OTHER_LIGHT[light])
                if on_the_right:
                    drawn, lights = drawn[::-1], lights[::-1]
            words = NEUTRAL if adds else MOODS[sentiment]
            parts = [
                draw.choice(FEELINGS).format(draw.choice(words)),
                draw.choice(MENTIONS).format(named),
            ]
            draw.shuffle(parts)
            text = " ".join([draw.choice(OPENINGS), *parts, draw.choice(ENDINGS)]).strip()
            yield RelatedPost(text, named, drawn, lights, sentiment, shown, adds)


BLOCK = 2**3 * len(LIGHT_OF) * len(THINGS) * len(LEVELS)
"""Posts after which everything has come equally often."""


def draw_related_image(plan: RelatedPost, *, seed: int | Sequence[int]) -> Image.Image:
    """The image of a post, RGB; the same arguments give the same image.

    Things differ in place, size and shade; each half's background is smooth noise in its light.
    """
    random = np.random.default_rng(seed)
    image, half = Image.new("RGB", (SIZE, SIZE)), SIZE // 2
    pen = ImageDraw.Draw(image)
    for side, (thing, light) in enumerate(zip(plan.drawn, plan.lights, strict=True)):
        coarse = random.integers(*LEVELS[light], size=(6, 3, 3), dtype=np.uint8)
        ground = Image.fromarray(coarse).resize((half, SIZE), Image.Resampling.BICUBIC)
        image.paste(ground, (side * half, 0))
        shape, color = THINGS[thing]
        radius = random.uniform(0.3, 0.46) * half
        x = half * side + random.uniform(radius, half - radius)
        y = random.uniform(radius, SIZE - radius)
        shade = np.clip(np.array(PAINTS[color]) + random.integers(-20, 21, size=3), 0, 255)
        PENS[shape](pen, x, y, radius, tuple(shade.tolist()))
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
