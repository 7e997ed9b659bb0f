"""Posts of evaluation that an earlier model has learned are told, as far as its run is there."""

import json
import re
import shutil
from dataclasses import replace

import pytest

from comoe.config.load import load_recipe, save_recipe
from comoe.data.corpus import load_corpus, shared_posts
from comoe.data.seen_posts import SEEN, write_seen
from comoe.train.seen_before import posts_seen_before


@pytest.fixture
def recipe_of(tmp_path):
    rows = [{"text": f"post {row}", "label": "ab"[row % 2]} for row in range(60)]
    lines = "".join(json.dumps(row) + "\n" for row in rows)
    for name in ("posts", "others"):
        (tmp_path / f"{name}.jsonl").write_text(lines)
    (tmp_path / "recipe.yaml").write_text("tasks: {mood: {path: posts.jsonl}}\n")

    def made(*overrides):
        return load_recipe(tmp_path / "recipe.yaml", overrides)

    return made


@pytest.fixture
def run(recipe_of, tmp_path):
    """The run folder of a teacher that held out its posts by seed 1."""
    (tmp_path / "teacher" / "export").mkdir(parents=True)
    save_recipe(recipe_of("data.split_seed=1"), tmp_path / "teacher" / "config.yaml")
    return tmp_path / "teacher"


@pytest.mark.parametrize("key", ["distill.teachers=[{}]", "model.start_from={}"])
def test_posts_that_another_seed_held_out_were_learned(key, run, recipe_of):
    ours = recipe_of(key.format(run / "export"))
    corpus, theirs = load_corpus(ours), load_corpus(recipe_of("data.split_seed=1"))
    count = shared_posts(corpus.splits["validation"], known=theirs.splits["train"])
    (said,) = posts_seen_before(ours, corpus)
    assert count and f"was trained on {count} of the 6 validation posts of this run" in said
    assert said.startswith(f"{key.partition('=')[0]} ({run / 'export'})")


def test_nothing_is_said_of_equal_splits_other_posts_and_an_export_without_its_run(run, recipe_of):
    for words in (["data.split_seed=1"], ["tasks.mood.path=others.jsonl"]):
        ours = recipe_of(f"distill.teachers=[{run / 'export'}]", *words)
        assert posts_seen_before(ours, load_corpus(ours)) == []
    shutil.move(run / "export", run.parent / "export")
    ours = recipe_of(f"distill.teachers=[{run.parent / 'export'}]")
    assert posts_seen_before(ours, load_corpus(ours)) == []


def test_a_run_whose_posts_are_gone_is_told(run, recipe_of):
    ours = recipe_of(f"model.start_from={run / 'export'}")
    save_recipe(
        recipe_of("data.split_seed=1", "data.on_error=skip", "tasks.two.path=no.jsonl"),
        run / "config.yaml",
    )
    (said,) = posts_seen_before(ours, load_corpus(ours))
    assert "cannot be told (tasks.two.path (no.jsonl): there is no file or folder" in said


def test_an_export_without_its_run_knows_its_posts_by_its_filter(run, recipe_of):
    theirs = load_corpus(recipe_of("data.split_seed=1"))
    moved = run.parent / "moved"
    shutil.move(run / "export", moved)
    write_seen(moved / SEEN, theirs.splits["train"])
    ours = recipe_of(f"distill.teachers=[{moved}]", "data.validation_fraction=0.5")
    corpus = load_corpus(ours)
    exact = shared_posts(corpus.splits["validation"], known=theirs.splits["train"])
    (said,) = posts_seen_before(ours, corpus)
    (told,) = re.findall(r"was trained on about (\d+) of the 30 validation posts", said)
    assert abs(int(told) - exact) <= 2 and exact > 20
    # Those that it held out are not taken for learned ones.
    splits = {"train": theirs.splits["train"], "validation": theirs.splits["validation"]}
    assert posts_seen_before(ours, replace(corpus, splits=splits)) == []
    (moved / SEEN).write_bytes(b"no array")
    (said,) = posts_seen_before(ours, corpus)
    assert "cannot be told" in said and "delete it, it serves a warning alone" in said
