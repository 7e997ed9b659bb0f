"""The model card of an export: what the model predicts, how well, what it was trained on, and its limits."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping, Sequence
from typing import Any

from huggingface_hub import EvalResult, ModelCardData

from comoe.config.recipe import Recipe
from comoe.data.reading.inputs import pair_in_training
from comoe.evaluation.experts_off import OFF, experts_table, verdicts
from comoe.evaluation.tables import (
    calibration_sentences,
    calibration_table,
    decimal,
    markdown_table,
)
from comoe.models.encoders.families import FAMILIES
from comoe.tasks.labels import whole_characters
from comoe.tasks.prompts import wants_pair
from comoe.tasks.task import Task, decoder_tasks

MAX_LABELS_SHOWN = 12


CLASSES, WORDS, WRITING = "text-classification", "token-classification", "text-generation"
"""What the hub calls kinds of tasks."""


HUB_NAME = re.compile(r"[\w.-]+/[\w.-]+")


def model_card(
    name: str,
    *,
    recipe: Recipe,
    tasks: Sequence[Task],
    config: Mapping[str, Any],
    results: Mapping[str, Any] | None,
) -> str:
    """Markdown with a YAML front matter.

    Args:
        name: title of the card.
        recipe: the resolved recipe.
        tasks: the model's tasks; those without predictions are not mentioned.
        config: ``config.json`` of the export.
        results: content of ``results.json``: ``metrics`` (split -> task -> metric -> value) and
            ``seconds`` are read; None says in the card that nothing was measured.
    """
    tasks = [task for task in tasks if task.rules.predicts]
    calibrated, experts, found = [], [], results or {}
    if report := found.get("calibration"):
        table = _table(calibration_table(report))
        calibrated = ["## Calibration", table, *calibration_sentences(report)]
    if OFF in found:
        table = _table(experts_table(found, tasks))
        experts = [f"## What the experts add\n\n{table}", *verdicts(found)]
    parts = [
        _front_matter(tasks, recipe=recipe, config=config, results=results),
        f"# {recipe.run.name}\n\n{_summary(recipe, tasks, config)}",
        *([f"## Images\n\n{_images(config)}"] if _reads_images(config) else []),
        f"## Use\n\n{_usage(tasks, config)}",
        f"## Tasks\n\n{_task_table(tasks)}",
        f"## Measured results\n\n{_results(tasks, results)}",
        *calibrated,
        *experts,
        f"## Training\n\n{_training(recipe, config, results)}",
        f"## Limits\n\n{_limits(recipe, tasks)}",
    ]
    return whole_characters("\n\n".join(parts) + "\n")


def _front_matter(
    tasks: Sequence[Task],
    *,
    recipe: Recipe,
    config: Mapping[str, Any],
    results: Mapping[str, Any] | None,
) -> str:
    # The hub has no class of its own for classifying text and image together.
    kinds = [kind for kind in map(_hub_kind, tasks) if kind != WORDS]
    encoder = config["model"]["encoder"]
    test = (results or {}).get("metrics", {}).get("test", {})
    measured = [
        EvalResult(
            task_type=_hub_kind(task),
            dataset_type=task.name,
            dataset_name=task.name,
            dataset_split="test",
            metric_type=task.metric,
            metric_value=round(test[task.name][task.metric], 4),
        )
        for task in tasks
        if test.get(task.name, {}).get(task.metric) is not None
    ]
    data = ModelCardData(
        library_name="comoe",
        language=config["data"]["normalize"]["language"],
        tags=["comoe"]
        + (["mixture-of-experts"] if recipe.model.moe.num_experts > 1 else [])
        + ["multi-task", "social-media"]
        + (["multimodal"] if _reads_images(config) else []),
        pipeline_tag=(CLASSES if CLASSES in kinds else kinds[0]) if kinds else None,
        base_model=encoder if HUB_NAME.fullmatch(encoder) else None,
        model_name="comoe" if measured else None,
        eval_results=measured or None,
    )
    return f"---\n{data.to_yaml()}\n---"


def _hub_kind(task: Task) -> str:
    if task.mode == "tokens":
        return WORDS
    return WRITING if _writes(task) else CLASSES


def _writes(task: Task) -> bool:
    """Whether its output is a generated text."""
    return task.mode == "decoder" and not task.label_words


FORMS = {
    "beside": ("dense block", "beside the feed-forward of its layers ({layers})"),
    "lora": (
        "low-rank update",
        "of rank {rank} in the linear maps ({targets}) of its layers ({layers})",
    ),
}
"""Word in ``model.moe.form`` -> what one expert for all tokens is, and where experts are."""


def _summary(recipe: Recipe, tasks: Sequence[Task], config: Mapping[str, Any]) -> str:
    moe = recipe.model.moe
    layers = moe.layers if isinstance(moe.layers, str) else ", ".join(map(str, moe.layers))
    one, where = FORMS[moe.form]
    where = where.format(layers=layers, rank=moe.rank, targets=moe.targets)
    if moe.num_experts > 1:
        experts = (
            f"a cooperative mixture of {moe.num_experts} experts ({moe.top_k} per token, "
            f"{moe.gate} gate, routed by {moe.route_by}) {where}"
        )
    else:
        experts = f"one {one} {where}" if moe.num_experts else "no experts"
    encoder = f"`{config['model']['encoder']}`, {config['encoder'].get('model_type')}"
    if (kept := recipe.model.keep_layers) is not None:
        encoder += f", {kept} of its layers"
    names = ", ".join(task.name for task in tasks) or "none"
    listed = f"{len(tasks)} task{'s' if len(tasks) != 1 else ''}: {names}"
    post = (
        "social-media post, its text and its image,"
        if _reads_images(config)
        else "social-media post"
    )
    stacks = "encoder-decoder" if decoder_tasks(tasks) else "encoder"
    family = FAMILIES.get(config["encoder"].get("model_type"))
    stacks = "decoder-only model" if family is not None and family.causal else stacks
    return f"One {stacks} ({encoder}) with {experts}. On a {post} it predicts {listed}."


def _reads_images(config: Mapping[str, Any]) -> bool:
    return config.get("image_column") is not None


def _images(config: Mapping[str, Any]) -> str:
    """What reads the images, how they meet the text, and what the input must look like."""
    vision, tower = config["model"]["vision"], config.get("tower")
    reader = (
        "The encoder reads text and image together"
        if tower is None
        else f"A vision tower (`{vision['tower']}`, {tower.get('model_type')}) reads the image of a post; its "
        f"states meet the text by fusion `{vision['fusion']}`"
    )
    hidden = config["data"].get("hide", "none")
    return (
        f"{reader}. In training the column `{config['image_column']}` named the images, and prediction reads that "
        "column too (`--image-column` names another one). A path starts from the folder of the input file. A post "
        "without an image, or with one that cannot be read, is predicted by its text alone."
        + (
            f" This model was trained and predicts with the {hidden} of every post hidden."
            if hidden != "none"
            else ""
        )
    )


def _usage(tasks: Sequence[Task], config: Mapping[str, Any]) -> str:
    if not tasks:
        return "It predicts nothing: it is for `model.start_from` of other runs."
    with_images = _reads_images(config)
    pair = pair_in_training(config, tasks) or "pair"
    with_pair = any(wants_pair(task.prompt) for task in tasks)
    pairs, column = (', pairs=["the weather"]', f" --pair-column {pair}") if with_pair else ("", "")
    images = ', images=["img/01.png"]' if with_images else ""
    explain = ", explain=True" if any(task.mode == "pooled" for task in tasks) else ""
    fields = {"text": "what a lovely day :)"} | ({pair: "the weather"} if with_pair else {})
    row = json.dumps(fields | ({config["image_column"]: "img/01.png"} if with_images else {}))
    posts, write = (
        ("posts.jsonl", f"echo '{row}' > posts.jsonl\n")
        if with_images or with_pair
        else ("posts.txt", "")
    )
    plugins = config.get("plugins", [])
    trust = f", plugins={json.dumps(plugins)}" if plugins else ""
    flag = f" --plugins {','.join(plugins)}" if plugins else ""
    return f"""```python
from comoe import Predictor

predictor = Predictor.from_pretrained("path/to/this/folder"{trust})
prediction = predictor(["what a lovely day :)"]{pairs}{images}{explain})[0]
print(prediction[{json.dumps(tasks[0].name)}])
```

```
{write}comoe predict --model path/to/this/folder --input {posts}{column}{flag} --output predictions.jsonl
```"""


def _task_table(tasks: Sequence[Task]) -> str:
    rows = [("task", "kind", "labels", "main metric")]
    for task in tasks:
        labels = ", ".join(task.labels[:MAX_LABELS_SHOWN]) or (
            "a text" if _writes(task) else "a number"
        )
        more = len(task.labels) - MAX_LABELS_SHOWN
        name = f"{task.name} (auxiliary)" if task.auxiliary else task.name
        rows.append(
            (name, task.kind, f"{labels}, and {more} more" if more > 0 else labels, task.metric)
        )
    with_prompt = [(task.name, task.prompt) for task in tasks if task.prompt is not None]
    prompts = "\n\nThe decoder predicts these, from what the encoder reads:\n\n" + _table(
        [("task", "prompt"), *with_prompt]
    )
    return _table(rows) + (prompts if with_prompt else "")


def _results(tasks: Sequence[Task], results: Mapping[str, Any] | None) -> str:
    metrics = (results or {}).get("metrics") or {}
    rows = [("task", "metric", *metrics, "majority baseline")]
    for task in tasks:
        baseline = None
        scores = []
        for split, values in metrics.items():
            scores.append(decimal(values.get(task.name, {}).get(task.metric)))
            if split in ("validation", "test"):
                baseline = values.get(task.name, {}).get(f"majority/{task.metric}", baseline)
        rows.append((task.name, task.metric, *scores, decimal(baseline)))
    if not metrics:
        return "Nothing was measured on these weights; `comoe eval` scores them on a data set."
    note = (
        "The baseline always predicts the most frequent label (the mean, for numbers), on test, "
        "else on validation posts."
    )
    return f"{_table(rows)}\n\n{note}"


def _training(recipe: Recipe, config: Mapping[str, Any], results: Mapping[str, Any] | None) -> str:
    train, normalize = recipe.train, recipe.data.normalize
    experts = f"{train.expert_learning_rate:g} (experts), " if recipe.model.moe.num_experts else ""
    lines = [
        f"- comoe {config['comoe_version']}, batches of {train.batch_size} posts, {train.optimizer}, seed {train.seed}",
        f"- rates {train.learning_rate:g} (encoder), {experts}{train.head_learning_rate:g} (heads)",
        f"- posts cleaned with the preset `{normalize.preset}` and cut after {recipe.data.max_length} tokens",
    ]
    if results:
        lines.append(
            f"- step {results['best_step']} of {results['step']}, {results['seconds'] / 60:.1f} minutes"
        )
    if recipe.distill.teachers:
        teachers = ", ".join(_last_part(teacher) for teacher in recipe.distill.teachers)
        lines.append(
            f"- distilled from {teachers}, gold labels weighted {recipe.distill.gold_weight:g}"
        )
    rows = [("task", "data set", "posts kept at most")]
    limit = "all" if recipe.data.limit_per_task is None else str(recipe.data.limit_per_task)
    for name, task in recipe.tasks.items():
        shown = task.path if task.format == "hub" else _last_part(task.path)
        rows.append((name, shown or "-", limit))
    return "\n".join(lines) + "\n\n" + _table(rows)


def _last_part(path: str) -> str:
    """The last part of a path, or the two last of a run's export: the rest concerns nobody."""
    parts = [part for part in re.split(r"[/\\]", path) if part not in ("", ".", "..", "~")]
    return "/".join(parts[-2:] if parts[-1:] == ["export"] else parts[-1:])


def _limits(recipe: Recipe, tasks: Sequence[Task]) -> str:
    certainty = "Scores are the model's own probabilities and are not calibrated."
    if fitted := ", ".join(task.name for task in tasks if task.temperature is not None):
        certainty = f"Scores of {fitted} are calibrated on posts like the training data; on others they may be off."
    lines = [
        "- It predicts posts like those it was trained on; other platforms, languages and years were not measured.",
        f"- {certainty}",
        *_limits_of_predictions(tasks),
        "- People are affected when their posts are classified: keep a person in any decision about a person.",
        "- The licences of the encoder and of the training data apply to these weights.",
    ]
    if (layers := recipe.model.own_layers) and len(tasks) > 1:
        lines.append(
            f"- Each task has the last layers ({layers}) of the encoder for itself: from there on, and from the first "
            f"layer with experts on, a post costs one pass per task (up to {len(tasks)})."
        )
    elif recipe.model.moe.num_experts and recipe.model.moe.route_by != "token" and len(tasks) > 1:
        lines.append(
            "- The gate reads the task: from the first layer with experts on a post costs one "
            f"pass per task (up to {len(tasks)})."
        )
    return "\n".join(lines)


def _limits_of_predictions(tasks: Sequence[Task]) -> list[str]:
    """What holds for heads that pool, for words that are scored, and for texts that are written."""
    lines = []
    if any(task.mode == "pooled" for task in tasks):
        lines.append(
            "- Attention weights show what a head weighted; they do not prove why it predicted so."
        )
    if any(task.label_words for task in tasks):
        lines.append(
            "- Scored words are whole: a longer one is a product of more tokens, and likely scores lower."
        )
    if any(map(_writes, tasks)):
        lines.append("- Generated texts need not be true, nor words of the post.")
    return lines


def _table(rows: Sequence[Sequence[str]]) -> str:
    return "\n".join(markdown_table(rows[0], rows[1:]))
