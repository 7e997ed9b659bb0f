"""The recipes in launch/configs: each is valid, and the generated posts fit the one that tests can run."""

from __future__ import annotations

import re
import shlex
from pathlib import Path

import pytest

from comoe.config.load import load_recipe
from comoe.data.corpus import load_corpus
from comoe.starter.implied_posts import build_implied_posts
from comoe.starter.registry import PREFIXES, READY_MADE
from comoe.starter.synthetic_text import TACL_GENERATORS, build_generated_posts

FILES = (Path(__file__).parents[2] / "launch" / "configs").glob("*.yaml")
CONFIGS = sorted(path for path in FILES if not path.stem.endswith("_prompts"))


@pytest.mark.parametrize("path", CONFIGS, ids=lambda path: path.stem)
def test_a_recipe_is_valid_and_named_after_its_file(path: Path) -> None:
    recipe = load_recipe(path)
    assert recipe.run.name == path.stem
    for key, value in {
        "model.encoder": recipe.model.encoder,
        "data.root": recipe.data.root,
    }.items():
        assert value is None or not value.startswith(PREFIXES) or value in READY_MADE[key]
    assert path.read_text(encoding="utf-8").startswith("# ")


@pytest.mark.parametrize("stem", ["absa", "airline", "social", "social_all", "tweeteval", "wnut17"])
def test_the_head_of_a_recipe_for_published_posts_names_them_on_the_hub(stem: str) -> None:
    path = next(path for path in CONFIGS if path.stem == stem)
    head = "".join(
        line
        for line in path.read_text(encoding="utf-8").splitlines(keepends=True)
        if line.startswith("#")
    )
    # The indented command that follows "...", up to the line that no backslash continues.
    commands = re.findall(r"^#   \.\.\. ((?:.*\\\n)*.*)$", head, flags=re.MULTILINE)
    (words,) = (command for command in commands if ".format=hub" in command)
    words = shlex.split(words.replace("\\\n#", " "))
    recipe = load_recipe(path, words)
    (task,) = (task for task in recipe.tasks.values() if task.format == "hub")
    assert re.fullmatch(r"[\w-]+/[\w-]+", task.path) and task.splits == {} and not task.slices


def test_the_generated_implicit_posts_fit_their_recipe_and_each_seed_draws_others(
    tmp_path: Path,
) -> None:
    path = next(path for path in CONFIGS if path.stem == "implicit_smoke")
    build_implied_posts(tmp_path)
    first, second = (
        load_corpus(load_recipe(path, [f"data.root={tmp_path}", f"train.seed={seed}"]))
        for seed in (0, 1)
    )
    assert {task.name: (task.kind, task.auxiliary) for task in first.tasks} == {
        "polarity": ("label_words", False), "aspect": ("text", True), "opinion": ("text", True),
    }  # fmt: skip
    posts = [corpus.splits["train"] for corpus in (first, second)]
    assert [len(split) for split in posts] == [600, 600]
    assert 200 < len(set(posts[0].texts) & set(posts[1].texts)) < 400
    assert all(None not in labels for labels in posts[0].labels.values())


def test_no_recipe_fetches_weights_that_are_not_for_commercial_use_unasked() -> None:
    assert [
        path.stem for path in CONFIGS if load_recipe(path).model.encoder == "kit:chinese_encoder"
    ] == []


def test_the_published_mixture_runs_all_experts_by_task_and_reads_the_generated_posts(
    tmp_path: Path,
) -> None:
    recipe = load_recipe(
        next(path for path in CONFIGS if path.stem == "tacl_comoe"), [f"data.root={tmp_path}"]
    )
    moe = recipe.model.moe
    assert (moe.route_by, moe.top_k, moe.balance, recipe.loss.balance_weight) == (
        "task",
        moe.num_experts,
        "none",
        0,
    )
    assert recipe.loss.contrastive.weight > 0
    build_generated_posts(tmp_path, generators=TACL_GENERATORS)
    corpus = load_corpus(recipe)
    found = {task.name: (task.kind, task.metric, len(task.labels)) for task in corpus.tasks}
    assert found == {
        "hate": ("single_label", "macro_f1", 2),
        "entities": ("tags", "span_f1", 4),
        "stance": ("single_label", "mean_f1_against_favor", 3),
        "topic": ("single_label", "macro_f1", 4),
    }
    posts = corpus.splits["validation"]
    asked = [
        pair
        for pair, label in zip(posts.pairs, posts.labels["stance"], strict=True)
        if label is not None
    ]
    assert len(asked) == 80 and None not in asked
