"""Recipes: what loads, what is refused, and in which words."""

import dataclasses
from collections.abc import Callable
from pathlib import Path

import pytest

from comoe.config.errors import nearest, unknown_name
from comoe.config.load import load_recipe, recipe_from_dict, recipe_to_dict, save_recipe
from comoe.config.recipe import ContrastiveConfig, MoeConfig, Recipe, TaskConfig
from comoe.config.validate import RULES, validate

MOOD = "tasks: {mood: {path: mood.csv}}\n"


@pytest.fixture
def written(tmp_path: Path) -> Callable[[str], Path]:
    def write(text: str) -> Path:
        path = tmp_path / "recipe.yaml"
        path.write_text(text, encoding="utf-8")
        return path

    return write


def message_of(path: Path, *overrides: str) -> str:
    with pytest.raises(ValueError) as error:
        load_recipe(path, overrides)
    return str(error.value).replace(str(path), "recipe.yaml")


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


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("train.eval_evry=5", "train.eval_evry is not an option; did you mean train.eval_every? (one of: epochs, "),
        ("train.ep_size=2", "train.ep_size is not an option; did you mean parallel.ep_size?"),
        ("trian.seed=1", "trian is not an option; did you mean train?"),
        ("tasks.mood.kinnd=tags", "tasks.mood.kinnd is not an option; did you mean tasks.mood.kind?"),
        ("train.seed=true", "train.seed is True; it must be a whole number."),
        ("train.seed=1.5", "train.seed is 1.5; it must be a whole number."),
        ("train.seed.x=1", "train.seed is {'x': 1}; it must be a whole number."),
        ("run.verbose=1", "run.verbose is 1; it must be true or false."),
        ("train.learning_rate=fast", "train.learning_rate is 'fast'; it must be a number."),
        ("train.learning_rate=nan", "train.learning_rate is nan; it must be at least 0."),
        ("train.learning_rate=.inf", "train.learning_rate is inf; it must be a finite number."),
        ("train.betas=[0.9, x]", "train.betas.1 is 'x'; it must be a number."),
        ("model.moe=4", "model.moe is 4; it must be a section (key: value lines)."),
        ("model.moe.layers=first", "model.moe.layers is 'first'; it must be all, alternate, last_half, or a list of"),
        ("model.moe.layers=[1,1]", "model.moe.layers is [1, 1]; it must be"),
        ("model.train_layers=0", "model.train_layers is 0; it must be all, none, or the number of last layers"),
        ("model.train_layers=last", "model.train_layers is 'last'; it must be all, none, or the number of last"),
        ("loss.image_text.temperature=0.005", "loss.image_text.temperature is 0.005; it must be at least 0.01."),
        ("loss.task_separation_weight=-1", "loss.task_separation_weight is -1.0; it must be at least 0."),
        ("train.activation_checkpointing=1", "train.activation_checkpointing is 1; it must be true or false."),
        ("model.moe.expert_width=wide", "model.moe.expert_width is 'wide'; it must be at least 1, or auto."),
        ("model.moe.route_by=post", "model.moe.route_by is 'post'; it must be one of token, task, both."),
        ("data.validation_fraction=1", "data.validation_fraction is 1.0; it must be at least 0 and below 1."),
        ("data.limit_per_task=0", "data.limit_per_task is 0; it must be at least 1."),
        ("train.batch_size=0", "train.batch_size is 0; it must be at least 1."),
        ("run.name=../x", "run.name is '../x'; it must be a plain folder name"),
        ("tasks.mood.class_weights=[1, 0]", "tasks.mood.class_weights is [1.0, 0.0]; it must be none, balanced, or"),
        ("tasks.mood.labels=[a, a]", "tasks.mood.labels is ['a', 'a']; it must be a list of different names."),
        ("tasks.mood.labels=[yes, x]", "tasks.mood.labels.0 is True; it must be text; YAML reads a bare yes"),
        ("tasks.mood.labels=[1]", "tasks.mood.labels.0 is 1; it must be text; put it in quotes."),
        ("tasks.topic.kind=tags", "tasks.topic.path is ''; it must be the folder, file or hub name of"),
        ("tasks.mod.weight=2", "task's posts; it is empty. Did you mean task mood?"),
        ("tasks.a b.path=x", "tasks.a b is not a task name; use letters"),
        ("tasks.modo=null", "drops no task: modo is not a task; did you mean mood? (one of: mood)"),
        ("tasks={}", "tasks is empty; give the recipe at least one task"),
        ("nonsense", "'nonsense' is not an override; write key=value"),
        ("model.moe.top_k=9", "model.moe.top_k (9) must be at most model.moe.num_experts (8)"),
        ("parallel.ep_size=3", "parallel.ep_size (3) must divide model.moe.num_experts (8); set it to auto or one of"),
        ("tasks.mood.auxiliary=true", "tasks.mood.auxiliary is true for it and all others; set it to false"),
        ("data.noise=[typos, typos]", "data.noise is ['typos', 'typos']; it must be a list of different names."),
        ("data.noise_rate=1.5", "data.noise_rate is 1.5; it must be at least 0 and at most 1."),
        ("model.private_width=-1", "model.private_width is -1; it must be at least 0."),
        ("loss.orthogonal_weight=0.1", "loss.orthogonal_weight needs private parts to keep apart; set model.private"),
        ("loss.adversarial.weight=-1", "loss.adversarial.weight is -1.0; it must be at least 0."),
        ("loss.adversarial.predict=", "loss.adversarial.predict is ''; it must be given; it is empty."),
        ("tasks.mood.confidence_strategy=both", "'both'; it must be one of none, input, output, input_output."),
        ("tasks.mood.confidence_strategy=input", "is input; name the column: tasks.mood.confidence."),
        ("train.early_stop_metric=f1", "train.early_stop_metric is 'f1'; give mean or task/metric: mood/macro_f1."),
        ("train.early_stop_metric=modo/f1", "train.early_stop_metric is 'modo/f1': modo is not a task; did you mean"),
    ],
)  # fmt: skip
def test_a_wrong_override_says_what_is_wrong_and_what_is_right(
    written, override: str, message: str
):
    said = message_of(written(MOOD), override)
    assert said.startswith("command line: ") or override.startswith("tasks.topic")
    assert message in said


def test_a_balance_loss_that_would_be_constant_is_refused(written):
    said = message_of(written(MOOD), "loss.balance_weight=0.01", "model.moe.top_k=8")
    assert (
        "loss.balance_weight is 0.01, but with model.moe.top_k = num_experts (8) every expert runs"
        in said
    )


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (
            "train:\n  seed: 1\n  eval_evry: 2\n" + MOOD,
            "recipe.yaml:3: train.eval_evry is not an option; did you mean",
        ),
        (
            "train:\n  seed: 1\n  seed: 2\n" + MOOD,
            "recipe.yaml:3: seed is given twice, first in line 2; keep one.",
        ),
        (
            "train:\n  batch_size: many\n" + MOOD,
            "recipe.yaml:2: train.batch_size is 'many'; it must be a whole",
        ),
        (
            "run:\n  name: 2024\n" + MOOD,
            "recipe.yaml:2: run.name is 2024; it must be text; put it in quotes.",
        ),
        ("train:\n  epochs: 0\n" + MOOD, "recipe.yaml:2: train.epochs is 0.0; it must be above 0."),
        ("train: {seed: 1\n", "recipe.yaml:2: this is not valid YAML"),
        ("- a\n", "recipe.yaml:1: a recipe is a mapping with sections"),
        ("", "tasks is empty"),
        ("tasks:\n  1: {path: a.csv}\n", "recipe.yaml:1: tasks has the name 1; put it in quotes."),
        (
            "tasks:\n  mood:\n    path: a.csv\n    kind: !!python/name:os.system ''\n",
            "recipe.yaml:4: this is not",
        ),
        (
            "train: {seed: 1, seed: 1}\n",
            "recipe.yaml:1: seed is given twice, first in line 1; keep one.",
        ),
        ("run:\n  name: a\x00b\n", "recipe.yaml: this is not valid YAML"),
    ],
)
def test_a_wrong_file_says_the_line_and_what_is_right(written, text: str, message: str):
    assert message in message_of(written(text))


def test_a_recipe_that_is_not_there_is_named(tmp_path):
    with pytest.raises(
        ValueError,
        match="absent.yaml: the recipe cannot be read .*give an existing UTF-8 YAML file",
    ):
        load_recipe(tmp_path / "absent.yaml")


def test_a_recipe_in_another_encoding_is_refused_with_its_name(tmp_path):
    (tmp_path / "latin.yaml").write_bytes("run: {name: ü}".encode("latin-1"))
    with pytest.raises(ValueError, match="latin.yaml: the recipe cannot be read"):
        load_recipe(tmp_path / "latin.yaml")


def test_every_rule_is_for_an_option_that_exists():
    recipe = Recipe(tasks={"*": TaskConfig(path="x")})
    known = set(flat(recipe_to_dict(recipe)))
    assert set(RULES) <= known


def flat(node: dict, prefix: str = "") -> list[str]:
    found = []
    for key, value in node.items():
        found += (
            flat(value, f"{prefix}{key}.")
            if isinstance(value, dict) and value
            else [f"{prefix}{key}"]
        )
    return found


def test_the_defaults_obey_the_rules():
    recipe = Recipe(tasks={"mood": TaskConfig(path="mood.csv")})
    validate(recipe)
    broken = dataclasses.replace(recipe, tasks={"mood": TaskConfig(path="mood.csv", weight=-1.0)})
    with pytest.raises(ValueError, match="^tasks.mood.weight is -1.0; it must be at least 0.$"):
        validate(broken)


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
        ("gate", "zzz", "zzz is not a gate; (one of: "),
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
