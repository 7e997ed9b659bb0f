"""What the values of a recipe must obey, and the errors that say so."""

from __future__ import annotations

import dataclasses
import math
import re
from collections.abc import Callable, Iterator, Mapping
from typing import Any

from comoe.config.errors import nearest, place_of, unknown_name
from comoe.config.recipe import Recipe


def validate(recipe: Recipe, *, origins: Mapping[str, str] | None = None) -> None:
    """Check all values that need no data, no encoder and no table of another module.

    Args:
        recipe: the recipe.
        origins: key path -> "file:line", put in front of messages.

    Raises:
        ValueError: the first value against its rule: key path, value, rule.
    """
    origins = origins or {}
    for path, value in _walk(dataclasses.asdict(recipe)):
        holds, rule = RULES.get(re.sub(r"^tasks\.[^.]+\.", "tasks.*.", path), (None, ""))
        if holds is not None and not holds(value):
            hint = _misspelt(path, recipe)
            raise ValueError(
                f"{place_of(path, origins)}{path} is {value!r}; it must be {rule}.{hint}"
            )
        if isinstance(value, float) and not math.isfinite(value):
            raise ValueError(
                f"{place_of(path, origins)}{path} is {value!r}; it must be a finite number."
            )
    _validate_together(recipe, origins)


def _misspelt(path: str, recipe: Recipe) -> str:
    """A task without a path, of nearly the name of another one, was made by an option that was meant for that one."""
    name = path.removeprefix("tasks.").removesuffix(".path")
    others = [other for other in recipe.tasks if other != name]
    guess = nearest(name, others) if path == f"tasks.{name}.path" else None
    return f" Did you mean task {guess}?" if guess else ""


def _validate_together(recipe: Recipe, origins: Mapping[str, str]) -> None:
    """Rules that bind several keys."""
    moe, tasks = recipe.model.moe, recipe.tasks

    def refuse(path: str, message: str) -> None:
        raise ValueError(f"{place_of(path, origins)}{path} {message}")

    if not tasks:
        refuse(
            "tasks",
            "is empty; give the recipe at least one task, as in `tasks: {mood: {path: mood.csv}}`.",
        )
    for name in tasks:
        if not re.fullmatch(r"[A-Za-z0-9_][A-Za-z0-9_-]*", name):
            refuse(
                f"tasks.{name}",
                "is not a task name; use letters, digits, dash, underscore; no dash first.",
            )
        if tasks[name].confidence_strategy != "none" and tasks[name].confidence is None:
            strategy = tasks[name].confidence_strategy
            refuse(
                f"tasks.{name}.confidence_strategy",
                f"is {strategy}; name the column: tasks.{name}.confidence.",
            )
    if recipe.loss.orthogonal_weight and not recipe.model.private_width:
        refuse(
            "loss.orthogonal_weight",
            "needs private parts to keep apart; set model.private_width, or make it 0.",
        )
    if moe.num_experts and moe.top_k > moe.num_experts:
        refuse(
            "model.moe.top_k",
            f"({moe.top_k}) must be at most model.moe.num_experts ({moe.num_experts}); lower it.",
        )
    if recipe.loss.balance_weight and moe.num_experts and moe.top_k == moe.num_experts:
        every = f"with model.moe.top_k = num_experts ({moe.top_k}) every expert runs and the balance loss is constant"
        refuse(
            "loss.balance_weight",
            f"is {recipe.loss.balance_weight}, but {every}; set it to 0, or lower top_k.",
        )
    if isinstance(recipe.parallel.ep_size, int) and moe.num_experts % recipe.parallel.ep_size:
        sizes = [size for size in range(1, moe.num_experts + 1) if moe.num_experts % size == 0]
        rule = f"must divide model.moe.num_experts ({moe.num_experts}); set it to auto or one of {sizes}."
        refuse("parallel.ep_size", f"({recipe.parallel.ep_size}) {rule}")
    image_text = recipe.loss.image_text
    if image_text.itc_weight + image_text.itm_weight >= 1:
        share = f"{image_text.itc_weight} + loss.image_text.itm_weight {image_text.itm_weight}"
        refuse(
            "loss.image_text.itc_weight",
            f"{share} leaves nothing of 1 to the tasks; lower one of them.",
        )
    if recipe.loss.contrastive.queue_size and recipe.loss.contrastive.over == "local":
        refuse(
            "loss.contrastive.queue_size",
            "needs loss.contrastive.over: global, so that all ranks hold one queue.",
        )
    if recipe.loss.contrastive.chunk_size is not None and recipe.train.micro_batch_size != "auto":
        size = recipe.train.micro_batch_size
        refuse(
            "train.micro_batch_size",
            f"is {size}, but loss.contrastive.chunk_size already sets it; make it auto.",
        )
    if all(task.auxiliary for task in tasks.values()):
        refuse(
            f"tasks.{next(iter(tasks))}.auxiliary",
            "is true for it and all others; set it to false for one task.",
        )
    metric = recipe.train.early_stop_metric
    task, slash, _ = metric.partition("/")
    if metric != "mean" and not slash:
        refuse(
            "train.early_stop_metric",
            f"is {metric!r}; give mean or task/metric: {next(iter(tasks))}/macro_f1.",
        )
    if slash and task not in tasks:
        refuse("train.early_stop_metric", f"is {metric!r}: {unknown_name('task', task, tasks)}")
    if slash and tasks[task].auxiliary:
        refuse(
            "train.early_stop_metric",
            f"is {metric!r}, but tasks.{task} is auxiliary; name another task, or mean.",
        )


def _walk(node: Any, prefix: str = "") -> Iterator[tuple[str, Any]]:
    """(dotted key, value) of every leaf of nested dicts."""
    for key, value in node.items():
        if isinstance(value, dict) and value:
            yield from _walk(value, f"{prefix}{key}.")
        else:
            yield f"{prefix}{key}", value


def _choice(*words: str) -> tuple[Callable[[Any], bool], str]:
    return lambda value: value in words, f"one of {', '.join(words)}"


def _number(
    low: float,
    high: float | None = None,
    *,
    open_low: bool = False,
    open_high: bool = False,
    word: str | None = None,
) -> tuple[Callable[[Any], bool], str]:
    """Rule for a number in a range, a list of such numbers, null, or the word that the field also takes."""
    rule = f"{'above' if open_low else 'at least'} {low}"
    if high is not None:
        rule += f" and {'below' if open_high else 'at most'} {high}"

    def holds(value: Any) -> bool:
        if value is None or (word is not None and value == word):
            return True
        if isinstance(value, (str, list)):
            return False
        above = value > low if open_low else value >= low
        return above and (high is None or (value < high if open_high else value <= high))

    return holds, rule if word is None else f"{rule}, or {word}"


def _safe_name(value: Any) -> bool:
    return re.fullmatch(r"[A-Za-z0-9_][A-Za-z0-9._-]*", value) is not None


def _layers(value: Any) -> bool:
    if isinstance(value, str):
        return value in ("all", "alternate", "last_half")
    return bool(value) and min(value) >= 0 and len(set(value)) == len(value)


def _train_layers(value: Any) -> bool:
    return value in ("all", "none") if isinstance(value, str) else value >= 1


def _class_weights(value: Any) -> bool:
    if isinstance(value, str):
        return value in ("none", "balanced")
    return len(value) > 1 and all(0 < number < math.inf for number in value)


def _betas(value: Any) -> bool:
    return len(value) == 2 and all(0 <= beta < 1 for beta in value)


_COUNT, _COUNT_OR_AUTO, _COUNT_FROM_0 = _number(1), _number(1, word="auto"), _number(0)


_POSITIVE, _NOT_NEGATIVE, _SHARE = (
    _number(0, open_low=True),
    _number(0),
    _number(0, 1, open_high=True),
)


_TEXT = (bool, "given; it is empty")


_DIFFERENT = (lambda value: len(set(value)) == len(value), "a list of different names")


RULES: dict[str, tuple[Callable[[Any], bool], str]] = {
    "run.name": (
        _safe_name,
        "a plain folder name: letters, digits, dot, dash, underscore, no dot or dash first",
    ),
    "run.output_dir": _TEXT,
    "model.encoder": _TEXT,
    "model.dropout": _SHARE,
    "model.train_layers": (_train_layers, "all, none, or the number of last layers, at least 1"),
    "model.projection_width": _COUNT,
    "model.private_width": _COUNT_FROM_0,
    "model.moe.num_experts": _COUNT_FROM_0,
    "model.moe.top_k": _COUNT,
    "model.moe.route_by": _choice("token", "task", "both"),
    "model.moe.layers": (
        _layers,
        "all, alternate, last_half, or a list of different layer numbers from 0",
    ),
    "model.moe.expert_width": _COUNT_OR_AUTO,
    "model.moe.shared_width": _COUNT_FROM_0,
    "model.moe.output_init": _NOT_NEGATIVE,
    "model.moe.temperature": _POSITIVE,
    "model.moe.cooperation_threshold": _SHARE,
    "model.moe.task_embedding_width": _COUNT,
    "model.moe.balance": _choice("none", "bias"),
    "model.moe.balance_rate": _NOT_NEGATIVE,
    "parallel.ep_size": _COUNT_OR_AUTO,
    "parallel.timeout_seconds": _POSITIVE,
    "data.max_length": _number(4),
    "data.limit_per_task": _COUNT,
    "data.limit_eval": _COUNT,
    "data.validation_fraction": _SHARE,
    "data.on_error": _choice("stop", "skip"),
    "data.posts_per_label": _COUNT_FROM_0,
    # Twice what Pillow warns of; beyond that it refuses by itself.
    "data.max_image_pixels": _number(1, 178_956_970),
    "data.max_image_bytes": _COUNT,
    "data.on_bad_image": _choice("skip", "text"),
    "data.hide": _choice("none", "text", "image"),
    "data.max_characters": _COUNT,
    "data.noise": _DIFFERENT,
    "data.noise_rate": _number(0, 1),
    "data.mixing_temperature": _POSITIVE,
    "data.normalize.preset": _choice("none", "social", "strict", "weibo"),
    "data.normalize.language": _TEXT,
    "tasks.*.path": (bool, "the folder, file or hub name of the task's posts; it is empty"),
    "tasks.*.text": _TEXT,
    "tasks.*.label": _TEXT,
    "tasks.*.weight": _NOT_NEGATIVE,
    "tasks.*.class_weights": (
        _class_weights,
        "none, balanced, or a list with one number above 0 per label",
    ),
    "tasks.*.label_smoothing": _SHARE,
    "tasks.*.contrastive": (lambda value: value in (True, False, "auto"), "true, false, or auto"),
    "tasks.*.contrastive_weight": _NOT_NEGATIVE,
    "tasks.*.contrastive_temperature": _number(0.01),
    "tasks.*.contrastive_width": _number(0, open_low=True, word="auto"),
    "tasks.*.confidence_strategy": _choice("none", "input", "output", "input_output"),
    "tasks.*.labels": _DIFFERENT,
    "tasks.*.slices": _DIFFERENT,
    "tasks.*.prompt": (
        lambda value: value is None or value.strip(),
        "given, with {text} in it; it is empty",
    ),
    "tasks.*.label_words": _DIFFERENT,
    "tasks.*.max_answer_length": _number(3),
    "tasks.*.num_beams": _COUNT,
    "loss.contrastive.weight": _NOT_NEGATIVE,
    "loss.contrastive.temperature": _number(0.01),
    "loss.contrastive.over": _choice("global", "local"),
    "loss.contrastive.queue_size": _COUNT_FROM_0,
    "loss.contrastive.queue_warmup": _COUNT_FROM_0,
    "loss.contrastive.chunk_size": _COUNT,
    "loss.image_text.itc_weight": _SHARE,
    "loss.image_text.itm_weight": _SHARE,
    "loss.image_text.temperature": _number(0.01),
    "loss.image_text.negatives": _choice("hard", "random"),
    "loss.weighting_rate": _POSITIVE,
    "loss.weighting_temperature": _POSITIVE,
    "loss.weighting_window": _COUNT,
    "loss.gradnorm_alpha": _NOT_NEGATIVE,
    "loss.cagrad_c": _SHARE,
    "loss.adversarial.weight": _NOT_NEGATIVE,
    "loss.adversarial.predict": _TEXT,
    "loss.adversarial.hidden_width": _COUNT,
    "loss.adversarial.gamma": _NOT_NEGATIVE,
    "loss.balance_weight": _NOT_NEGATIVE,
    "loss.orthogonal_weight": _NOT_NEGATIVE,
    "loss.z_weight": _NOT_NEGATIVE,
    "loss.task_separation_weight": _NOT_NEGATIVE,
    "train.epochs": _POSITIVE,
    "train.max_steps": _COUNT,
    "train.batch_size": _COUNT,
    "train.micro_batch_size": _COUNT_OR_AUTO,
    "train.optimizer": _choice("adamw", "sgd"),
    "train.learning_rate": _NOT_NEGATIVE,
    "train.expert_learning_rate": _NOT_NEGATIVE,
    "train.head_learning_rate": _NOT_NEGATIVE,
    "train.weight_decay": _NOT_NEGATIVE,
    "train.betas": (_betas, "two numbers, at least 0 and below 1"),
    "train.epsilon": _POSITIVE,
    "train.momentum": _SHARE,
    "train.schedule": _choice("linear", "cosine", "constant"),
    "train.warmup_fraction": _SHARE,
    "train.max_grad_norm": _NOT_NEGATIVE,
    "train.log_every": _COUNT,
    "train.eval_every": _COUNT_OR_AUTO,
    "train.save_every": _COUNT_OR_AUTO,
    "train.keep_checkpoints": _COUNT,
    "train.patience": _COUNT_FROM_0,
    "train.max_nonfinite": _COUNT,
    "train.seed": _COUNT_FROM_0,
}
