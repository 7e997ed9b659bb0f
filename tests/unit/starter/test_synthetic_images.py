import filecmp
import json
from collections import Counter, defaultdict
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from transformers import AutoModel

from comoe.config.load import load_recipe
from comoe.data.corpus import load_corpus
from comoe.data.images.pixels import load_image_processor
from comoe.starter.synthetic_images import (
    BLOCK,
    COLORS,
    LIGHTS,
    MOODS,
    NUMBERS,
    SHAPES,
    SIZE,
    PlannedPost,
    build_drawn_posts,
    caption_words,
    draw_image,
    plan_posts,
)
from comoe.starter.synthetic_text import vocabulary
from comoe.starter.tiny_models import build_smoke_vision

BOTH = ("contradiction", "sarcasm")
SPARE = 2 * BLOCK
"""Enough posts for one whole block of those with an image."""


@pytest.fixture(scope="module")
def block() -> list[PlannedPost]:
    """The first whole block of posts with images."""
    return [plan for plan in plan_posts(count=SPARE, seed=3) if plan.shape is not None][:BLOCK]


def majority(plans: list[PlannedPost], task: str, told: Callable[[PlannedPost], object]) -> float:
    """Accuracy of the best answer that knows only ``told`` of a post."""
    table: dict[object, Counter] = defaultdict(Counter)
    for plan in plans:
        table[told(plan)][plan.labels()[task]] += 1
    return sum(max(counts.values()) for counts in table.values()) / len(plans)


def caption(plan: PlannedPost) -> object:
    return plan.mood, plan.topic, plan.claim


def image(plan: PlannedPost) -> object:
    return plan.shape, plan.colour, plan.number, plan.light


@pytest.mark.parametrize("task", BOTH)
def test_either_side_alone_is_exactly_at_chance_where_both_are_needed(block, task):
    assert majority(block, task, caption) == 0.5
    assert majority(block, task, image) == 0.5
    assert majority(block, task, lambda plan: (caption(plan), image(plan))) == 1.0


@pytest.mark.parametrize("task", ["colour", "number", "light"])
def test_the_image_alone_tells_its_own_tasks_and_the_caption_does_not(block, task):
    assert majority(block, task, image) == 1.0
    values = len({"colour": COLORS, "number": NUMBERS, "light": LIGHTS}[task])
    # A claim is true half of the time, which is more often than chance: so much the caption may
    # tell.
    ceiling = 0.5 if task == "light" else (0.5 + 1 / values) / 2
    assert 1 / values <= majority(block, task, caption) <= ceiling + 1e-12


@pytest.mark.parametrize("task", ["sentiment", "claim"])
def test_the_caption_alone_tells_its_own_tasks_and_the_image_does_not(block, task):
    assert majority(block, task, caption) == 1.0
    assert majority(block, task, image) <= 0.5


def test_words_say_what_the_plan_says(block):
    opposite = {"positive": "negative", "negative": "positive"}
    for plan in block[:300]:
        words = set(plan.text.split())
        assert words & set(MOODS[plan.mood]) and not words & set(MOODS[opposite[plan.mood]])
        assert words & set(COLORS) == ({plan.claim} if plan.topic == "colour" else set())
    assert len({plan.text for plan in block}) > BLOCK // 2, "captions vary"
    # The smoke encoder knows every word.
    assert set(caption_words()) <= set(vocabulary())


def test_posts_without_image_have_labels_of_the_caption_only():
    plans = plan_posts(count=4000, seed=0)
    bare = [plan for plan in plans if plan.shape is None]
    assert 0.07 < len(bare) / len(plans) < 0.12
    for plan in bare:
        assert {task for task, label in plan.labels().items() if label is not None} == {
            "sentiment",
            "claim",
        }


def test_the_same_seed_gives_the_same_posts_and_another_one_others():
    assert plan_posts(count=50, seed=1) == plan_posts(count=50, seed=1)
    assert plan_posts(count=50, seed=1) == plan_posts(count=80, seed=1)[:50]
    assert plan_posts(count=50, seed=1) != plan_posts(count=50, seed=2)
    assert plan_posts(count=50, seed=1, name="test") != plan_posts(count=50, seed=1)


def test_images_show_their_plan():
    base = next(plan for plan in plan_posts(count=50, seed=0) if plan.shape is not None)
    for light in LIGHTS:
        for number in NUMBERS:
            plan = PlannedPost(
                base.text, base.mood, base.topic, base.claim, "square", "blue", number, light
            )
            values = np.asarray(draw_image(plan, seed=4), dtype=int)
            blue = (values[:, :, 2] > values[:, :, 0] + 90) & (
                values[:, :, 2] > values[:, :, 1] + 60
            )
            ground = values[~blue].mean()
            assert ground > 150 if light == "bright" else ground < 90
            quarters = [blue[y : y + 24, x : x + 24].sum() > 20 for y in (0, 24) for x in (0, 24)]
            assert sum(quarters) == number
    shapes = [
        np.asarray(draw_image(PlannedPost("", "", "", "", shape, "red", 1, "bright"), seed=4))
        for shape in SHAPES
    ]
    assert not np.array_equal(shapes[0], shapes[1]) and not np.array_equal(shapes[1], shapes[2])


def test_the_folder_is_written_the_same_again_and_can_be_loaded(tmp_path):
    counts = {"train": 60, "validation": 20, "test": 20}
    for name in ("one", "two"):
        (tmp_path / name).mkdir()
        build_drawn_posts(tmp_path / name, counts=counts, seed=5)
    files = sorted(path.relative_to(tmp_path / "one") for path in (tmp_path / "one").rglob("*.*"))
    assert filecmp.cmpfiles(tmp_path / "one", tmp_path / "two", files, shallow=False)[1:] == (
        [],
        [],
    )
    rows = [
        json.loads(line) for line in (tmp_path / "one/drawn/train.jsonl").read_text().splitlines()
    ]
    assert len(rows) == 60 and {row["image"] is None for row in rows} == {True, False}
    assert Image.open(
        tmp_path / "one/drawn" / next(row["image"] for row in rows if row["image"])
    ).size == (SIZE, SIZE)
    recipe = load_recipe(Path(__file__).parents[3] / "launch/configs/image_text.yaml")
    recipe.data.root = str(tmp_path / "one")
    corpus = load_corpus(recipe, with_images=True)
    assert {split: len(posts) for split, posts in corpus.splits.items()} == counts
    assert corpus.report.rows() == []
    assert [len(task.labels) for task in corpus.tasks] == [2, 7, 4, 3, 2, 2, 2]


def test_the_smoke_tower_is_a_vision_model_with_its_image_processor(tmp_path):
    build_smoke_vision(tmp_path)
    processor = load_image_processor(str(tmp_path))
    assert processor.shape == (3, SIZE, SIZE)
    tower = AutoModel.from_pretrained(tmp_path)
    assert tower.config.model_type == "resnet"
    assert sum(weight.numel() for weight in tower.parameters()) < 200_000
