"""A bad recipe is refused in one sentence that names the place, the key, the value, the rule and the remedy."""

from __future__ import annotations

import re
from itertools import pairwise
from pathlib import Path

import emoji
import pytest

from comoe.config.load import load_recipe, load_saved_recipe, recipe_from_dict
from comoe.config.recipe import LANGUAGES
from comoe.config.reference import options

MOOD = "tasks: {mood: {path: mood.csv}}\n"

OVERRIDES = [
    # Keys that do not exist.
    ("train.eval_evry=5", "train.eval_evry", "did you mean train.eval_every? (one of: epochs, "),
    ("train.ep_size=2", "train.ep_size", "did you mean parallel.ep_size?"),
    ("trian.seed=1", "trian", "did you mean train?"),
    ("tasks.mood.kinnd=tags", "tasks.mood.kinnd", "did you mean tasks.mood.kind?"),
    ("tasks.mood.kinnd=tags train.seed=x", "tasks.mood.kinnd", "did you mean tasks.mood.kind?"),
    ("nonsense", "'nonsense'", "write key=value"),
    # Types.
    ("train.seed=true", "train.seed", "is True; it must be a whole number, at least 0."),
    ("train.seed=1.5", "train.seed", "a whole number"),
    ("train.seed.x=1", "train.seed", "is {'x': 1}; it must be a whole number"),
    ("train.seed=null", "train.seed", "is None"),
    ("run.verbose=1", "run.verbose", "true or false"),
    ("train.learning_rate=fast", "train.learning_rate", "is 'fast'; it must be a number"),
    ("train.learning_rate=true", "train.learning_rate", "is True; it must be a number"),
    ("train.learning_rate=nan", "train.learning_rate", "a finite number"),
    ("train.learning_rate=.inf", "train.learning_rate", "a finite number"),
    ("train.betas=[0.9, x]", "train.betas.1", "is 'x'; it must be a number"),
    ("train.betas=[0.9]", "train.betas", "of 2 items"),
    ("model.moe=4", "model.moe", "a section (key: value lines)"),
    ("tasks.mood.labels=[yes, x]", "tasks.mood.labels.0", "YAML reads a bare yes"),
    ("tasks.mood.labels=[1]", "tasks.mood.labels.0", "put it in quotes"),
    # Soft labels.
    ("distill.unlabelled=[a.txt]", "distill.unlabelled", "there are no teachers"),
    ("distill.tasks=[moood]", "distill.tasks", "did you mean mood?"),
    ("distill.teachers=runs/a/export", "distill.teachers", "write [runs/a/export]"),
    ("train.lr=1", "train.lr", "did you mean train.learning_rate?"),
    ("distill.teachers=[a, a]", "distill.teachers", "all different"),
    ("distill.temperature=0", "distill.temperature", "above 0"),
    ("distill.annealing=cosine", "distill.annealing", "none, linear"),
    ("tasks.mood.kind=regression tasks.mood.soft_label=x", "tasks.mood.soft_label", "no meaning for kind regression"),
    (
        "distill.teachers=[a] tasks.free.path=x tasks.free.kind=text tasks.free.prompt={text}",
        "distill.tasks", "has free, but free text has no soft labels",
    ),
    ("train.early_stop_metric=teacher_kl", "train.early_stop_metric", "give mean or task/metric"),
    # Ranges.
    ("train.batch_size=0", "train.batch_size", "at least 1"),
    ("train.epochs=0", "train.epochs", "above 0"),
    ("data.limit_per_task=0", "data.limit_per_task", "at least 1, or null"),
    ("data.validation_fraction=1", "data.validation_fraction", "below 1"),
    ("data.test_fraction=0.95", "data.test_fraction", "together they leave nothing to train on"),
    ("data.noise_rate=1.5", "data.noise_rate", "at most 1"),
    ("data.max_image_pixels=1000000000", "data.max_image_pixels", "at most 178956970"),
    ("data.max_length=3", "data.max_length", "at least 4"),
    ("model.private_width=-1", "model.private_width", "at least 0"),
    ("model.own_layers=-1", "model.own_layers", "at least 0"),
    ("model.task_attention_width=-1", "model.task_attention_width", "at least 0"),
    ("model.pooling=frist", "model.pooling", "did you mean first?"),
    ("loss.soft_sharing_weight=-1", "loss.soft_sharing_weight", "at least 0"),
    ("model.moe.expert_width=wide", "model.moe.expert_width", "at least 1, or auto"),
    ("model.moe.gate=random", "model.moe.top_k", "is 2, but model.moe.gate random draws one expert"),
    ("model.moe.gate=random model.moe.top_k=1", "model.moe.balance", "is bias, but model.moe.gate"),
    ("model.moe.task_prior=1", "model.moe.task_prior", "routed by token does not know the task"),
    ("model.moe.task_prior=-1", "model.moe.task_prior", "at least 0, or own"),
    (
        "model.moe.task_prior=own model.moe.route_by=task model.moe.num_experts=3 tasks.heat.path=x",
        "model.moe.task_prior", "to a multiple of 2, at least 4.",
    ),
    ("model.moe.temperature=0", "model.moe.temperature", "above 0"),
    ("model.moe.cooperation_threshold=1", "model.moe.cooperation_threshold", "below 1"),
    ("model.keep_layers=0", "model.keep_layers", "at least 1, or text, as top-3"),
    ("model.keep_layers=even-3", "model.keep_layers", "as top-3 or bottom-3"),
    ("model.random_width=0", "model.random_width", "at least 1, or null"),
    ("model.train_layers=0", "model.train_layers", "at least 1, or auto or all or none"),
    ("loss.image_text.temperature=0.005", "loss.image_text.temperature", "at least 0.01"),
    ("loss.contrastive.temperature=0.001", "loss.contrastive.temperature", "at least 0.01"),
    ("loss.contrastive.views=3", "loss.contrastive.views", "at most 2"),
    ("loss.contrastive.negatives=al", "loss.contrastive.negatives", "did you mean all?"),
    ("run.embedding_plot=tsn", "run.embedding_plot", "did you mean tsne?"),
    ("tasks.mood.contrastive_temperature=0", "tasks.mood.contrastive_temperature", "at least 0.01"),
    ("loss.adversarial.weight=-1", "loss.adversarial.weight", "at least 0"),
    ("loss.cagrad_c=1", "loss.cagrad_c", "below 1"),
    ("tasks.mood.max_answer_length=2", "tasks.mood.max_answer_length", "at least 3"),
    ("tasks.mood.num_beams=0", "tasks.mood.num_beams", "at least 1"),
    ("tasks.mood.class_weights=[1, 0]", "tasks.mood.class_weights", "above 0"),
    ("tasks.mood.class_weights=[1]", "tasks.mood.class_weights", "one per label"),
    # Words.
    ("model.moe.gate=sigmod", "model.moe.gate", "did you mean sigmoid?"),
    ("model.moe.route_by=post", "model.moe.route_by", "one of token, task, both"),
    ("model.moe.route_by=tokens", "model.moe.route_by", "did you mean token?"),
    ("model.moe.layers=first", "model.moe.layers", "all or alternate or last_half"),
    ("model.moe.layers=top-0", "model.moe.layers", "top-<n> for the last n layers"),
    ("model.moe.gate_scale=0", "model.moe.gate_scale", "above 0, or auto"),
    ("model.moe.expert_init=fan_out", "model.moe.expert_init", "did you mean fan_in?"),
    ("model.train_layers=last", "model.train_layers", "all or none"),
    ("model.vision.fusion=gatd", "model.vision.fusion", "did you mean gated?"),
    ("loss.weighting=equals", "loss.weighting", "did you mean equal?"),
    ("data.mixing=uniforn", "data.mixing", "did you mean uniform?"),
    ("data.hide=txt", "data.hide", "did you mean text?"),
    ("data.noise=[typo]", "data.noise.0", "did you mean typos?"),
    ("data.on_error=off", "data.on_error", "one of stop, skip"),
    ("data.normalize.preset=socal", "data.normalize.preset", "did you mean social?"),
    ("train.schedule=liner", "train.schedule", "did you mean linear?"),
    ("train.optimizer=adam", "train.optimizer", "did you mean adamw?"),
    ("tasks.mood.kind=singel_label", "tasks.mood.kind", "did you mean single_label?"),
    ("tasks.mood.format=jsnl", "tasks.mood.format", "did you mean jsonl?"),
    ("tasks.mood.metric=macro_f2", "tasks.mood.metric", "did you mean macro_f1?"),
    ("tasks.mood.confidence_strategy=both", "tasks.mood.confidence_strategy", "one of none, input"),
    ("tasks.mood.splits={tain: a.csv}", "tasks.mood.splits", "'tain'; it must be one of train"),
    ("tasks.mood.splits={mood: a.csv}", "tasks.mood.splits", "'mood'; it must be one of train"),
    ("tasks.mood.contrastive=maybe", "tasks.mood.contrastive", "true or false, or auto"),
    ("tasks.mood.class_weights=balance", "tasks.mood.class_weights", "did you mean balanced?"),
    # Lists and texts.
    ("model.moe.layers=[1,1]", "model.moe.layers", "all different"),
    ("model.moe.layers=[]", "model.moe.layers", "not empty"),
    ("model.moe.layers=[-1]", "model.moe.layers", "at least 0"),
    ("data.noise=[typos, typos]", "data.noise", "all different"),
    ("tasks.mood.labels=[a, a]", "tasks.mood.labels", "all different"),
    ("tasks.mood.label_words=[a, a]", "tasks.mood.label_words", "all different"),
    *(
        (f"tasks.{name}.path=x", f"tasks.{name}", "is no name for a task: each prediction has a field of that name")
        for name in ("text", "error", "truncated", "image_error")
    ),
    ("tasks.mean.path=x", "tasks.mean", "call the mean of all tasks so; rename it."),
    ("tasks.Mood.path=x", "tasks.Mood", "and tasks.mood differ by upper and lower case alone"),
    ("run.name=../x", "run.name", "a plain folder name"),
    (f"run.name={'x' * 201}", "run.name", "at most 200 letters"),
    ("train.learning_rate=1e9", "train.learning_rate", "at most 1000"),
    ("train.router_learning_rate=1e30", "train.router_learning_rate", "at most 1000"),
    ("loss.adversarial.predict=", "loss.adversarial.predict", "is ''; it must be text, not empty"),
    ("tasks.mood.prompt=' '", "tasks.mood.prompt", "with {text} in it"),
    ("tasks.mood.prompt='{post}'", "tasks.mood.prompt", "with {text} in it"),
    ("tasks.mood.prompt='{text} {pear}'", "tasks.mood.prompt", "no other field"),
    ("tasks.mood.prompt='{text!r}'", "tasks.mood.prompt", "no other field"),
    ("tasks.mood.prompt='{text'", "tasks.mood.prompt", "a brace itself is doubled"),
    # Tasks.
    ("tasks.topic.kind=tags", "tasks.topic.path", "the folder, file or hub name"),
    ("tasks.mod.weight=2", "tasks.mod.path", "it is empty. Did you mean task mood?"),
    ("tasks.a b.path=x", "tasks.a b", "is not a task name; use at most 100 letters"),
    (f"tasks.{'x' * 101}.path=x", f"tasks.{'x' * 101}", "is not a task name"),
    ("tasks.modo=null", "'tasks.modo=null'", "did you mean mood? (one of: mood)"),
    ("tasks={}", "tasks", "is empty; give the recipe at least one task"),
    ("tasks.mood.kind=unlabelled", "tasks", "has no task with labels"),
    ("tasks.mood.auxiliary=true", "tasks.mood.auxiliary", "set it to false"),
    ("tasks.mood.auxiliary=true tasks.more={path: x, kind: unlabelled}", "tasks.mood.auxiliary", "to false"),
    ("tasks.mood.confidence_strategy=input", "tasks.mood.confidence_strategy", "name the column"),
    ("tasks.mood.kind=regression tasks.mood.limit_per_label=8", "tasks.mood.limit_per_label", "use limit"),
    ("tasks.mood.kind=regression tasks.mood.descriptions={a: b}", "tasks.mood.descriptions", "leave it out"),
    ("model={random_width: 64} tasks.mood.descriptions={a: b, c: d}", "tasks.mood.descriptions", "random weights"),
    # Tasks that a decoder predicts.
    ("tasks.mood.prompt={text}", "tasks.mood.prompt", "has no meaning for kind single_label"),
    ("tasks.mood.num_beams=2", "tasks.mood.num_beams", "let a decoder predict the task"),
    ("tasks.mood.max_answer_length=9", "tasks.mood.max_answer_length", "leave it out"),
    ("tasks.mood.label_words=[a, b]", "tasks.mood.label_words", "leave it out"),
    ("tasks.mood.kind=text", "tasks.mood.prompt", "'sentiment of: {text}'"),
    ("WRITTEN tasks.mood.prompt='{pair}: {text}'", "tasks.mood.prompt", "name the column"),
    ("WRITTEN tasks.mood.contrastive=true", "tasks.mood.contrastive", "make it auto"),
    ("WRITTEN tasks.mood.label_smoothing=0.1", "tasks.mood.label_smoothing", "no meaning for kind text"),
    ("WRITTEN tasks.mood.label_words=[a, b]", "tasks.mood.label_words", "needs tasks.mood.labels"),
    ("WRITTEN tasks.mood.length_normalized=true", "tasks.mood.length_normalized", "for kind label_words"),
    ("SCORED tasks.mood.num_beams=2", "tasks.mood.num_beams", "whose words are scored"),
    ("SCORED tasks.mood.max_answer_length=9", "tasks.mood.max_answer_length", "(Kind text with labels is"),
    ("SCORED tasks.mood.label_smoothing=0.1", "tasks.mood.label_smoothing", "(Kind text with labels is"),
    ("WRITTEN loss.weighting=pcgrad", "loss.weighting", "a decoder predicts mood; choose another"),
    ("SCORED loss.weighting=cagrad", "loss.weighting", "leaves a decoder out"),
    ("WRITTEN loss.weighting=gradnorm", "loss.weighting", "uncertainty_positive"),
    # Options that bind one another.
    ("model.moe.top_k=9", "model.moe.top_k", "(9) must be at most model.moe.num_experts (8)"),
    ("model.moe.top_k=8", "model.moe.balance", "set model.moe.balance to none"),
    ("model.moe.top_k=8 loss.balance_weight=0.01", "loss.balance_weight", "every expert runs"),
    ("model={random_width: 64, train_layers: 2}", "model.train_layers", "make it all"),
    ("model.moe.form=lora model.random_width=64", "model.train_layers", "is auto, but model.random_width"),
    ("model.moe.form=lora model.moe.shared_width=8", "model.moe.shared_width", "for model.moe.form beside"),
    ("model.moe={form: lora, gate: random, top_k: 1, balance: none}", "model.moe.gate", "choose sigmoid"),
    ("parallel={ep_size: 2} model.moe.form=lora", "parallel.ep_size", "is for model.moe.form beside"),
    ("parallel.ep_size=3", "parallel.ep_size", "set it to auto or one of [1, 2, 4, 8]"),
    ("loss.orthogonal_weight=0.1", "loss.orthogonal_weight", "set model.private_width"),
    ("loss={weighting: pcgrad} model.own_layers=1", "loss.weighting", "inside of the encoder with model.own_layers"),
    ("WRITTEN model.own_layers=1", "model.own_layers", "is 1, but a decoder predicts mood"),
    ("loss={r_drop_weight: 1, weighting: pcgrad}", "loss.r_drop_weight", "gradients of one pass"),
    ("loss.image_text={itc_weight: 0.5, itm_weight: 0.5}", "loss.image_text.itc_weight", "nothing of 1"),
    ("loss.contrastive={over: local, queue_size: 8}", "loss.contrastive.queue_size", "over: global"),
    ("loss.contrastive.chunk_size=4 train.micro_batch_size=4", "train.micro_batch_size", "make it auto"),
    ("data.mixing=temperature data.mixing_temperature=0.5", "data.mixing_temperature", "at least 1"),
    ("data.mixing=progress data.mixing_temperature=0.5", "data.mixing_temperature", "at least 1"),
    ("train={reptile_steps: 5, max_steps: 12}", "train.max_steps", "take a multiple of 5, such as 15"),
    ("train={reptile_steps: 5, average_weights: 0.9}", "train.average_weights", "chooses the weights to export too"),
    ("train.reptile_steps=5 data.mixing=progress", "data.mixing", "whose rates change within their turns"),
    ("train.reptile_steps=5 loss.weighting=pcgrad", "loss.weighting", "each step has one of them"),
    ("train.reptile_steps=5 loss.adversarial.weight=0.1", "loss.adversarial.weight", "predict: task)"),
    ("train.reptile_steps=5 loss.task_separation_weight=0.4", "loss.task_separation_weight", "one of them"),
    ("train.reptile_steps=5 loss.contrastive.first_steps=9", "loss.contrastive.first_steps", "train.reptile_steps (5)"),
    ("train.early_stop_metric=f1", "train.early_stop_metric", "mean or task/metric: mood/macro_f1"),
    ("train.early_stop_metric=modo/f1", "train.early_stop_metric", "modo is not a task; did you mean"),
    ("train.early_stop_metric=heat/f1 tasks.heat={path: x, auxiliary: true}", "train.early_stop_metric", "mean"),
]  # fmt: skip
"""Overrides separated by " <section>.", the key path that the message names, a part of the rule."""

WRITTEN = ["tasks.mood.kind=text", "tasks.mood.prompt={text}"]
BASES = {"WRITTEN": WRITTEN, "SCORED": [*WRITTEN, "tasks.mood.labels=[a, b]"]}


@pytest.mark.parametrize(("overrides", "key", "rule"), OVERRIDES)
def test_a_bad_override_is_refused(tmp_path: Path, overrides: str, key: str, rule: str):
    (tmp_path / "recipe.yaml").write_text(MOOD)
    words = re.split(r" (?=(?:tasks|train|loss|data|model)\.[\w.]+=)", overrides)
    words = [*BASES.get(words[0], words[:1]), *words[1:]]
    with pytest.raises(ValueError) as error:
        load_recipe(tmp_path / "recipe.yaml", words)
    said = str(error.value)
    assert re.match(rf"(command line|.*recipe.yaml:1): {re.escape(key)}[ :]", said), said
    assert rule in said and "\n" not in said, said


FILES = [
    ("train:\n  seed: 1\n  eval_evry: 2\n" + MOOD, 3, "train.eval_evry is not an option; did you mean"),
    ("train:\n  seed: 1\n  seed: 2\n" + MOOD, 3, "seed is given twice, first in line 2; keep one."),
    ("train: {seed: 1, seed: 1}\n", 1, "seed is given twice, first in line 1; keep one."),
    ("train:\n  batch_size: many\n" + MOOD, 2, "train.batch_size is 'many'; it must be a whole"),
    ("run:\n  name: 2024\n" + MOOD, 2, "run.name is 2024; it must be text"),
    ("run:\n  name: 2024\n" + MOOD, 2, "put it in quotes."),
    ("train:\n  epochs: 0\n" + MOOD, 2, "train.epochs is 0; it must be a number, above 0."),
    ("train:\n  schedule: off\n" + MOOD, 2, "train.schedule is False; it must be one of linear"),
    ("train:\n  7: 2\n" + MOOD, 2, "train.7 is not an option"),
    ("train: {seed: 1\n", 2, "this is not valid YAML"),
    ("- a\n", 1, "a recipe is a mapping with sections"),
    ("", None, "tasks is empty"),
    ("tasks:\n  1: {path: a.csv}\n", 1, "tasks has the name 1; put it in quotes."),
    ("tasks:\n  m:\n    path: a.csv\n    kind: !!python/name:os.system ''\n", 4, "this is not valid YAML"),
    ("run:\n  name: a\x00b\n", None, "recipe.yaml: this is not valid YAML"),
]  # fmt: skip


@pytest.mark.parametrize(("text", "line", "rule"), FILES)
def test_a_bad_file_is_refused_with_its_line(
    tmp_path: Path, text: str, line: int | None, rule: str
):
    path = tmp_path / "recipe.yaml"
    path.write_text(text, encoding="utf-8")
    with pytest.raises(ValueError) as error:
        load_recipe(path)
    assert rule in str(error.value)
    assert line is None or str(error.value).startswith(f"{path}:{line}: ")


def test_a_run_that_was_begun_with_a_name_that_is_taken_now_goes_on(tmp_path: Path) -> None:
    path = tmp_path / "config.yaml"
    path.write_text("tasks: {text: {path: a.csv}, Text: {path: b.csv}}\n")
    assert list(load_saved_recipe(path).tasks) == ["text", "Text"]
    with pytest.raises(ValueError, match="tasks.text is no name for a task"):
        load_recipe(path)


ABSURD = {
    "a number without end": 10**30,
    "another": 1e300,
    "below 0": -(10**30),
    "a path of 5,000 characters": "x" * 5000,
    "a NUL byte": "a\0b",
}


def nested(path, value):
    for key in reversed(path.replace("<name>", "mood").split(".")):
        value = {key: value}
    return value


@pytest.mark.parametrize("what", ABSURD)
@pytest.mark.parametrize("path", [option.path for option in options()])
def test_no_option_takes_a_value_that_means_nothing(path, what):
    value = ABSURD[what]
    for given in (value, [value], {"x": value}):
        with pytest.raises(ValueError) as error:
            recipe_from_dict(nested(path, given))
        assert path.replace("<name>", "mood") in str(error.value) and len(str(error.value)) < 1500


LIMITS = [
    ("model.moe.num_experts", 10**9, "at most 65,536"),
    ("model.moe.expert_width", 10**15, "at most 131,072, or auto"),
    ("loss.contrastive.queue_size", 10**12, "at most 10,000,000"),
    ("train.batch_size", 10**30, "at most 1,000,000"),
    ("train.micro_batch_size", 10**9, "at most 1,000,000, or auto"),
    ("train.epochs", 1e300, "at most 100,000"),
    ("train.max_steps", 10**12, "at most 1,000,000,000, or null"),
    ("train.seed", 2**63, "at most 1,000,000,000,000,000,000"),
    ("data.split_seed", 2**64, "at most 1,000,000,000,000,000,000, or train"),
    ("parallel.timeout_seconds", 1e-9, "at least 1"),
    ("parallel.timeout_seconds", 1e300, "at most 10,000,000"),
    ("train.epsilon", 1e-300, "at least 1e-30"),
    ("train.weight_decay", 1e300, "at most 1,000,000,000"),
    ("tasks.mood.num_beams", 10**9, "at most 1,000"),
    ("tasks.mood.path", "x" * 5000, "of at most 4,096 characters"),
    ("data.normalize.language", "xx", "one of en, es, ja, ko"),
    ("data.normalize.language", "EN", "one of en, es, ja, ko"),
]


@pytest.mark.parametrize(("path", "value", "rule"), LIMITS)
def test_a_limit_is_told_and_a_run_that_was_begun_keeps_its_value(path, value, rule):
    with pytest.raises(ValueError, match=re.escape(rule)):
        recipe_from_dict(nested(path, value))
    recipe = recipe_from_dict(nested(path, value), saved=True)
    for key in path.split("."):
        recipe = recipe[key] if isinstance(recipe, dict) else getattr(recipe, key)
    assert recipe == value


def test_what_a_resume_changes_holds_the_limits_of_now(tmp_path):
    path = tmp_path / "config.yaml"
    path.write_text("train: {epochs: 1.0e+300}\n" + MOOD)
    assert load_saved_recipe(path).train.epochs == 1e300
    assert load_saved_recipe(path, ["train.seed=3"]).train.seed == 3
    assert load_saved_recipe(path, ["train.epochs=2"]).train.epochs == 2
    with pytest.raises(
        ValueError, match="command line: train.epochs is '1e301'; .*at most 100,000"
    ):
        load_saved_recipe(path, ["train.epochs=1e301"])
    with pytest.raises(ValueError, match="train.epochs is 1e[+]300; it must be a number"):
        load_recipe(path)


def test_the_languages_are_those_of_the_package():
    assert set(LANGUAGES) == set(emoji.LANGUAGES)


BOMB = "a: &a [x, x, x, x, x, x, x, x, x, x]\n" + "".join(
    f"{one}: &{one} [{', '.join([f'*{before}'] * 10)}]\n" for before, one in pairwise("abcdefghij")
)
MERGED = "a: &a {x: 1}\n" + "".join(
    f"{one}: &{one} {{<<: [{', '.join([f'*{before}'] * 9)}]}}\n"
    for before, one in pairwise("abcdefghij")
)
HOSTILE = {
    "aliases of aliases": (BOMB, 5, "its aliases .* stand for more than 20,000 keys and values"),
    "merged aliases": (MERGED, 5, "its aliases .* stand for more than 20,000"),
    "a list that holds itself": ("data: {noise: &n [*n]}\n", 1, "holds itself by an alias"),
    "a section that holds itself": ("tasks: &t\n  mood: {path: a, splits: *t}\n", 1, "holds itself"),
    "a section merged into itself": ("tasks:\n  a: &a {<<: *a, path: x}\n", 2, "holds itself"),
    "5,000 lists": ("run: {}\ndata: " + "[" * 5000, 2, "more than 50 levels in one another"),
    "5,000 sections": ("data: " + "{a: " * 5000, 1, "more than 50 levels in one another"),
    "aliases one deeper each": (
        "a0: &a0 [x]\n" + "".join(f"a{i}: &a{i} [*a{i - 1}]\n" for i in range(1, 200)), 50, "more than 50 levels",
    ),
    "25,000 values": ("data: [" + "1, " * 25_000 + "]\n", 1, "more than 20,000 keys and values"),
    "an octal number": ("\ntrain: {seed: 010}\n", 2, "010 is 8 to YAML 1.1; write 8, or put it in quotes"),
    "with a sign": ("train: {seed: -010}\n", 1, "-010 is -8 to YAML 1.1"),
    "base 60": ("train:\n  epochs: 1:30\n", 2, "1:30 is 90 to YAML 1.1"),
    "base 60 with a point": ("train: {epochs: 1:30.5}\n", 1, "1:30.5 is 90.5 to YAML 1.1"),
    "a date": ("run: {name: 2020-01-01}\n", 1, "2020-01-01 is a date to YAML; put it in quotes"),
    "a time": ("run: {name: 2020-01-01 10:00:00}\n", 1, "is a date to YAML"),
    "5,000 digits": ("train: {seed: " + "1" * 5000 + "}\n", 1, "a number of 5,000 digits"),
    "remote code": (
        "model:\n  trust_remote_code: true\n" + MOOD, 2,
        "Python code that comes with kit:minilm .* add model.trust_remote_code=true to the command line",
    ),
}  # fmt: skip


@pytest.mark.parametrize("what", HOSTILE)
def test_a_recipe_of_a_stranger_is_refused_with_its_line(what, tmp_path):
    content, line, rule = HOSTILE[what]
    path = tmp_path / "recipe.yaml"
    path.write_text(content)
    with pytest.raises(ValueError) as error:
        load_recipe(path)
    assert str(error.value).startswith(f"{path}:{line}: ") and re.search(rule, str(error.value))


def test_the_recipe_of_a_run_that_was_begun_may_be_larger(tmp_path):
    path = tmp_path / "config.yaml"
    labels = ", ".join(f"l{number}" for number in range(21_000))
    path.write_text(f"tasks: {{mood: {{path: a.csv, labels: [{labels}]}}}}\n")
    with pytest.raises(ValueError, match="more than 20,000 keys and values"):
        load_recipe(path)
    assert len(load_saved_recipe(path).tasks["mood"].labels) == 21_000


def test_a_recipe_of_many_bytes_is_refused(tmp_path):
    path = tmp_path / "recipe.yaml"
    path.write_text("# " + "x" * 1_000_001)
    with pytest.raises(ValueError, match="at most 1,000,000 bytes"):
        load_recipe(path)


@pytest.mark.parametrize(
    ("content", "key", "value"),
    [
        ("x: &a {path: a.csv}", None, None),
        ("train: {max_steps: 1_000}", "max_steps", 1000),
        ("train: {seed: 0x10}", "seed", 16),
        ("train: {seed: 0}", "seed", 0),
        ("train: {learning_rate: 0.5}", "learning_rate", 0.5),
    ],
)
def test_what_everybody_reads_alike_is_taken(content, key, value, tmp_path):
    path = tmp_path / "recipe.yaml"
    path.write_text(f"{content}\n{MOOD}")
    if key is None:
        path.write_text("tasks:\n  a: &a {path: a.csv}\n  b: {<<: *a, label: x}\n")
        assert load_recipe(path).tasks["b"].path == "a.csv"
    else:
        assert getattr(load_recipe(path).train, key) == value


def test_code_of_a_repository_runs_only_by_a_word_on_the_command_line(tmp_path):
    path, asked = tmp_path / "recipe.yaml", "model.trust_remote_code=true"
    for content in ("model: {trust_remote_code: true}\n" + MOOD, MOOD):
        path.write_text(content)
        assert load_recipe(path, [asked]).model.trust_remote_code
    path.write_text("model: {trust_remote_code: true}\n" + MOOD)
    for other in ([], ["train.seed=1"], ["model.dropout=0.1"], ["model.trust_remote_code=null"]):
        with pytest.raises(ValueError, match="trust_remote_code"):
            load_recipe(path, other)
    # The folder of a run holds pickles, and is trusted or not as a whole.
    assert load_saved_recipe(path).model.trust_remote_code
