"""Generated posts whose relation of text and image is known: what each side alone can tell, words, images, files."""

import filecmp
import json
from collections import Counter, defaultdict

import numpy as np
import pytest
from PIL import Image

from comoe.starter.related_posts import (
    BLOCK,
    COUNTS,
    MENTIONS,
    NEUTRAL,
    THINGS,
    build_related_posts,
    draw_related_image,
    plan_related_posts,
)
from comoe.starter.synthetic_images import MOODS, PAINTS, SIZE
from comoe.starter.synthetic_text import vocabulary


@pytest.fixture(scope="module")
def block():
    return plan_related_posts(count=BLOCK, seed=3)


def best(plans, told):
    """Accuracy of the best answer that knows only ``told`` of a post."""
    table = defaultdict(Counter)
    for plan in plans:
        table[told(plan)][plan.sentiment] += 1
    return sum(max(counts.values()) for counts in table.values()) / len(plans)


def moods_of(plan):
    """The sentiments that words of the text say."""
    return tuple(mood for mood, words in MOODS.items() if {*words} & {*plan.text.split()})


def test_shares_of_the_relations(block):
    counts = Counter(plan.relation for plan in block)
    shares = {relation: count / len(block) for relation, count in counts.items()}
    assert shares == {
        "shown_only": 3 / 8, "absent_only": 1 / 8, "shown_adds": 1 / 4, "absent_adds": 1 / 4,
    }  # fmt: skip
    assert Counter(plan.sentiment for plan in block) == dict.fromkeys(MOODS, BLOCK // 2)


def test_what_each_side_alone_can_tell(block):
    assert best(block, lambda plan: (moods_of(plan), plan.named)) == 3 / 4
    assert best(block, lambda plan: (plan.drawn, plan.light)) == 1 / 2
    plain = [plan for plan in block if plan.adds]
    assert best(plain, lambda plan: plan.named) == 1 / 2
    assert best(plain, lambda plan: (plan.drawn, plan.light)) == 1 / 2


def test_both_sides_together_tell_every_post(block):
    for plan in block:
        assert (plan.named == plan.drawn) == plan.shown
        told = moods_of(plan) or ["positive" if plan.shown else "negative"]
        assert [*told] == [plan.sentiment]
        assert len(moods_of(plan)) == (not plan.adds)


def test_every_word_is_in_the_vocabulary_of_the_tiny_encoder(block):
    phrases = [*MENTIONS, *NEUTRAL, *THINGS]
    words = {word.strip("@#.!?{}") for phrase in phrases for word in phrase.split()} - {""}
    assert words <= {*vocabulary()}
    assert len({THINGS[thing] for thing in THINGS}) == len(THINGS)


def test_the_same_seed_gives_the_same_posts_and_another_one_others(block):
    assert plan_related_posts(count=BLOCK, seed=3) == block
    texts = {plan.text for plan in plan_related_posts(count=BLOCK, seed=3, name="test")}
    assert len(texts & {plan.text for plan in block}) < BLOCK / 4


def test_an_image_shows_its_thing_in_its_light(block):
    for number, plan in enumerate(block[:24]):
        image = draw_related_image(plan, seed=number)
        pixels = np.asarray(image, dtype=float)
        assert image.size == (SIZE, SIZE)
        far = np.abs(pixels - np.array(PAINTS[THINGS[plan.drawn][1]])).max(axis=2)
        assert 0.05 < (far <= 21).mean() < 0.6
        assert (pixels[far > 60].mean() > 128) == (plan.light == "bright")


def test_the_folder_is_written_the_same_again(tmp_path):
    for name in ("one", "two"):
        (tmp_path / name).mkdir()
        build_related_posts(tmp_path / name, counts={"train": 6, "test": 4}, seed=1)
    first = tmp_path / "one" / "related"
    rows = [json.loads(line) for line in (first / "train.jsonl").read_text().splitlines()]
    names = ["train.jsonl", "test.jsonl", *(row["image"] for row in rows)]
    _, differ, missing = filecmp.cmpfiles(first, tmp_path / "two" / "related", names, shallow=False)
    assert not differ and not missing
    for row in rows:
        shown, adds = row["relation"].split("_")
        halves = {"shown": "yes", "absent": "no"}[shown], {"adds": "yes", "only": "no"}[adds]
        assert (row["text_shown"], row["image_adds"]) == halves
        assert Image.open(first / row["image"]).size == (SIZE, SIZE)
    assert COUNTS["train"] % 4 == 0
