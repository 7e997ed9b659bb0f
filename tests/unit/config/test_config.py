"""Recipes: what loads, as what, and how it is saved."""

from collections.abc import Callable
from pathlib import Path

import pytest

from comoe.config.errors import nearest, unknown_name
from comoe.config.load import (
    load_recipe,
    load_saved_recipe,
    recipe_from_dict,
    recipe_to_dict,
    save_recipe,
)
from comoe.config.recipe import ContrastiveConfig, MoeConfig, Recipe, TaskConfig

MOOD = "tasks: {mood: {path: mood.csv}}\n"


@pytest.fixture
def written(tmp_path: Path) -> Callable[[str], Path]:
    def write(text: str) -> Path:
        path = tmp_path / "recipe.yaml"
        path.write_text(text, encoding="utf-8")
        return path

    return write


def test_missing_keys_keep_their_defaults(written):
    recipe = load_recipe(written("model:\n  moe: {num_experts: 4}\ntrain:\n" + MOOD))
    assert recipe.model.moe == MoeConfig(num_experts=4)
    assert recipe.tasks == {"mood": TaskConfig(path="mood.csv")}
    assert recipe.train == Recipe().train


def test_a_missing_data_root_is_the_folder_of_the_recipe(written, tmp_path, monkeypatch):
    path = written(MOOD)
    monkeypatch.chdir(tmp_path)
    assert load_recipe(path.name).data.root == str(tmp_path)
    assert load_recipe(path, ["data.root=elsewhere"]).data.root == "elsewhere"


def test_a_saved_recipe_loads_as_the_same_recipe(written, tmp_path):
    text = "train: {learning_rate: 3.3e-05, epsilon: 1e-12, betas: [0.9, 0.95]}\ndata: {normalize: {language: zh}}\n"
    tasks = "tasks: {m: {path: 'a: b #c', labels: ['no', '1', '😀']}}"
    recipe = load_recipe(
        written(text + tasks), ["model.moe.layers=[1,3]", "model.dropout=0.1", "run.name=2024"]
    )
    save_recipe(recipe, tmp_path / "saved.yaml")
    assert load_recipe(tmp_path / "saved.yaml") == recipe
    assert recipe_from_dict(recipe_to_dict(recipe)) == recipe
    assert recipe.tasks["m"].labels == ["no", "1", "😀"]


def test_numbers_as_yaml_reads_them_become_floats(written):
    recipe = load_recipe(written("train: {learning_rate: 1e-4, epochs: 2}\n" + MOOD))
    assert recipe.train.learning_rate == 1e-4
    assert isinstance(recipe.train.epochs, float) and recipe.train.epochs == 2.0


def test_overrides_win_over_the_file_and_reach_every_depth(written):
    overrides = [
        "train.max_steps=5", "--train.eval_every=auto", "loss.contrastive.temperature=5e-2", "data.root=null",
        "tasks.mood.class_weights=[1, 2.5]", "tasks.mood.splits={train: a.csv}", "parallel.ep_size=2",
        "run.verbose=true",
    ]  # fmt: skip
    recipe = load_recipe(written("train: {max_steps: 9, eval_every: 3}\n" + MOOD), overrides)
    assert (recipe.train.max_steps, recipe.train.eval_every) == (5, "auto")
    assert recipe.loss.contrastive == ContrastiveConfig(temperature=0.05)
    assert recipe.tasks["mood"].class_weights == [1.0, 2.5]
    assert recipe.tasks["mood"].splits == {"train": "a.csv"}
    assert recipe.parallel.ep_size == 2 and recipe.run.verbose


def test_an_override_can_add_and_drop_a_task(written):
    overrides = ["tasks.topic.path=topic.csv", "tasks.topic.kind=multi_label", "tasks.mood=null"]
    recipe = load_recipe(written(MOOD), overrides)
    assert recipe.tasks == {"topic": TaskConfig(path="topic.csv", kind="multi_label")}


def test_an_override_of_a_text_is_taken_word_for_word(written):
    overrides = [
        "run.name=1e3",
        "tasks.mood.label=no",
        "tasks.mood.path=/a: b/[x].csv",
        "tasks.mood.pair=null",
    ]
    recipe = load_recipe(written(MOOD), overrides)
    assert recipe.run.name == "1e3"
    assert (recipe.tasks["mood"].label, recipe.tasks["mood"].path) == ("no", "/a: b/[x].csv")
    assert recipe.tasks["mood"].pair is None


def test_a_recipe_that_is_not_there_is_named(tmp_path):
    with pytest.raises(
        ValueError,
        match=r"absent.yaml: the recipe cannot be read \(No such file or directory\); give an existing UTF-8 YAML file",
    ):
        load_recipe(tmp_path / "absent.yaml")


def test_a_recipe_in_another_encoding_is_refused_with_its_name(tmp_path):
    (tmp_path / "latin.yaml").write_bytes("run: {name: ü}".encode("latin-1"))
    with pytest.raises(ValueError, match="latin.yaml: the recipe cannot be read"):
        load_recipe(tmp_path / "latin.yaml")


def test_the_nearest_name_forgives_case_and_one_slip_but_not_everything():
    assert nearest("Sigmiod", ["softmax", "sigmoid"]) == "sigmoid"
    assert nearest("zzz", ["softmax", "sigmoid"]) is None


@pytest.mark.parametrize(
    ("what", "name", "message"),
    [
        (
            "option",
            "train.eval_evry",
            "train.eval_evry is not an option; did you mean train.eval_every? (one of: ",
        ),
        ("gate", "zzz", "zzz is not a gate (one of: "),
        (
            "model.moe.gate",
            "train.eval_evry",
            "model.moe.gate is 'train.eval_evry', which does not exist; did you",
        ),
    ],
)
def test_an_unknown_name_lists_the_right_ones(what: str, name: str, message: str):
    error = unknown_name(what, name, ["train.eval_every", "train.seed"])
    assert str(error).startswith(message)
    assert str(error).endswith("(one of: train.eval_every, train.seed)")


def test_words_that_drop_a_task_may_be_said_again_of_a_saved_recipe(tmp_path: Path) -> None:
    (tmp_path / "a.yaml").write_text("tasks: {a: {path: a}, b: {path: b}}\n")
    recipe = load_recipe(tmp_path / "a.yaml", ["tasks.b=null"])
    save_recipe(recipe, tmp_path / "config.yaml")
    assert load_saved_recipe(tmp_path / "config.yaml", ["tasks.b=null"]) == recipe
    with pytest.raises(ValueError, match="drops no task"):
        load_recipe(tmp_path / "config.yaml", ["tasks.b=null"])
