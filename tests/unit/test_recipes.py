"""The recipes in launch/configs: each is valid, and the generated posts fit the one that tests can run."""

from __future__ import annotations

import json
import re
import shlex
from pathlib import Path

import numpy as np
import pytest

from comoe.config.load import load_recipe
from comoe.data.corpus import load_corpus
from comoe.data.sampling.mixing import balanced_classes, joint_label_shares
from comoe.data.text.normalize import normalize_post
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


@pytest.mark.parametrize(
    "stem",
    [
        "absa",
        "airline",
        "image_posts",
        "social",
        "social_all",
        "stein_keller",
        "tacl_comoe",
        "tweeteval",
        "wnut17",
    ],
)
def test_the_head_of_a_recipe_for_published_posts_names_them_on_the_hub(stem: str) -> None:
    (words,) = (words for words in head_commands(stem) if any(".format=hub" in w for w in words))
    recipe = load_recipe(recipe_file(stem), words)
    of_hub = [task for task in recipe.tasks.values() if task.format == "hub"]
    assert of_hub
    for task in of_hub:
        assert re.fullmatch(r"[\w-]+/[\w.-]+", task.path) and task.splits == {} and not task.slices


def recipe_file(stem: str) -> Path:
    return next(path for path in CONFIGS if path.stem == stem)


def head_commands(stem: str) -> list[list[str]]:
    """Options of the indented commands that follow "...", up to the line that no backslash continues."""
    lines = recipe_file(stem).read_text(encoding="utf-8").splitlines(keepends=True)
    head = "".join(line for line in lines if line.startswith("#"))
    commands = re.findall(r"^#   \.\.\. ((?:.*\\\n)*.*)$", head, flags=re.MULTILINE)
    return [shlex.split(command.replace("\\\n#", " ")) for command in commands]


def test_recipes_for_real_posts_stop_early() -> None:
    generated = {
        path.stem for path in CONFIGS if (load_recipe(path).data.root or "").startswith("smoke:")
    }
    never = {path.stem for path in CONFIGS if not load_recipe(path).train.patience}
    assert never == generated and {"authors_smoke", "smoke"} <= never


def test_the_protocol_of_stein_and_keller_reads_one_file_and_balances_both_tasks(
    tmp_path: Path,
) -> None:
    generator = np.random.default_rng(0)
    rows = [
        {"text": f"Post {number}: so #GOOD, @you!", "sentiment": mood, "topic": topic}
        for number, (mood, topic) in enumerate(
            zip(generator.choice(["bad", "fine"], 400, p=[0.8, 0.2]),
                generator.choice(["art", "health", "war"], 400, p=[0.6, 0.3, 0.1]), strict=True)
        )
    ]  # fmt: skip
    (tmp_path / "posts.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    recipe = load_recipe(recipe_file("stein_keller"), [f"data.root={tmp_path}"])
    corpus = load_corpus(recipe)
    sizes = {split: len(posts) for split, posts in corpus.splits.items()}
    assert sizes == {"train": 320, "validation": 40, "test": 40}
    assert all("labels of sentiment, topic" in note for note in corpus.report.notes)
    assert normalize_post(rows[0]["text"], recipe.data.normalize) == "post 0 so"
    classes = balanced_classes(corpus.splits["train"], corpus.tasks, recipe.tasks)
    even = {column: np.bincount(classes[:, column], weights=_shares(classes)) for column in (0, 1)}
    assert even[0] == pytest.approx([1 / 2] * 2) and even[1] == pytest.approx([1 / 3] * 3)
    train = recipe.train
    assert (train.learning_rate, train.head_learning_rate, train.batch_size) == (3e-5, 3e-5, 32)
    assert (train.epochs, train.eval_every, recipe.data.max_length) == (10, 500, 128)
    (airline,) = (
        words for words in head_commands("stein_keller") if "tasks.topic.label=reason" in words
    )
    tasks = load_recipe(recipe_file("stein_keller"), airline[1:]).tasks
    assert {task.path for task in tasks.values()} == {"airline"}


def _shares(classes: np.ndarray) -> np.ndarray:
    """Share of the draws of each post."""
    share_N = np.zeros(len(classes))
    for rows, share in joint_label_shares(classes):
        share_N[rows] = share / len(rows)
    return share_N


def test_the_published_mixture_has_a_command_for_posts_of_two_other_recipes() -> None:
    (words,) = (words for words in head_commands("tacl_comoe") if "tasks.stance=null" in words)
    tasks = load_recipe(
        recipe_file("tacl_comoe"), [word for word in words if "<" not in word]
    ).tasks
    assert {name: task.path for name, task in tasks.items()} == {
        "hate": "tweeteval/hate", "entities": "wnut17", "sentiment": "tweeteval/sentiment",
        "irony": "tweeteval/irony",
    }  # fmt: skip


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
