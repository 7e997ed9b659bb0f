"""Draws the pictures of generated posts with Pillow, and writes posts and pictures into a folder."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

import numpy as np
from PIL import Image, ImageDraw

from comoe.drawn_captions import Plan, plan_posts
from comoe.starter_posts import write_json_lines

SIZE = 48
"""Height and width of a picture, in pixels."""
COUNTS = {"train": 4000, "validation": 600, "test": 1000}
"""Split -> posts."""
PAINTS = {"red": (222, 45, 40), "green": (40, 165, 60), "blue": (45, 85, 225), "yellow": (245, 205, 25)}
"""Colour -> its RGB value, from which each picture differs a little."""
LEVELS = {"bright": (185, 250), "gloomy": (15, 75)}
"""Light -> darkest and brightest value of the background."""


def draw_picture(plan: Plan, *, seed: int | Sequence[int]) -> Image.Image:
    """The picture of a post, RGB; the same arguments give the same picture.

    Shapes differ in place, size and shade; the background is smooth noise.
    """
    assert plan.shape is not None, "this post has no picture"
    random = np.random.default_rng(seed)
    low, high = LEVELS[plan.light]
    coarse = random.integers(low, high, size=(6, 6, 3), dtype=np.uint8)
    picture = Image.fromarray(coarse).resize((SIZE, SIZE), Image.Resampling.BICUBIC)
    pen = ImageDraw.Draw(picture)
    half = SIZE // 2
    for quarter in random.permutation(4)[: plan.number]:
        radius = random.uniform(0.3, 0.46) * half
        shift = half / 2 - radius
        x, y = (half * (np.array([quarter % 2, quarter // 2]) + 0.5) + random.uniform(-shift, shift, size=2)).tolist()
        shade = np.clip(np.array(PAINTS[plan.colour]) + random.integers(-20, 21, size=3), 0, 255)
        PENS[plan.shape](pen, x, y, radius, tuple(shade.tolist()))
    return picture


def build_drawn_posts(folder: Path, *, counts: Mapping[str, int] | None = None, seed: int = 0) -> None:
    """Write ``drawn/<split>.jsonl`` and ``drawn/pictures/<split>-<number>.png``.

    Args:
        folder: an existing, empty folder.
        counts: split -> posts; None is ``COUNTS``.
        seed: seed of the random numbers.
    """
    folder = folder / "drawn"
    (folder / "pictures").mkdir(parents=True)
    for part, (split, count) in enumerate((COUNTS if counts is None else counts).items()):
        rows = []
        for number, plan in enumerate(plan_posts(count=count, seed=seed, name=split)):
            name = f"pictures/{split}-{number:05d}.png" if plan.shape is not None else None
            if name is not None:
                draw_picture(plan, seed=[seed, part, number]).save(folder / name)
            rows.append({"text": plan.text, "image": name, **plan.labels()})
        write_json_lines(folder / f"{split}.jsonl", rows)


def _circle(pen: ImageDraw.ImageDraw, x: float, y: float, radius: float, fill: tuple[int, int, int]) -> None:
    pen.ellipse((x - radius, y - radius, x + radius, y + radius), fill=fill)


def _square(pen: ImageDraw.ImageDraw, x: float, y: float, radius: float, fill: tuple[int, int, int]) -> None:
    side = 0.9 * radius
    pen.rectangle((x - side, y - side, x + side, y + side), fill=fill)


def _triangle(pen: ImageDraw.ImageDraw, x: float, y: float, radius: float, fill: tuple[int, int, int]) -> None:
    corners = [math.radians(angle) for angle in (-90, 30, 150)]
    pen.polygon([(x + radius * math.cos(angle), y + radius * math.sin(angle)) for angle in corners], fill=fill)


PENS: dict[str, Callable[..., None]] = {"circle": _circle, "square": _square, "triangle": _triangle}
"""Shape -> (pen, x, y, radius, fill) -> drawn."""
