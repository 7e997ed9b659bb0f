"""Options that a recipe sets in vain or unwisely: one sentence each when a run starts, never a reason to stop."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

from comoe.config.recipe import Recipe
from comoe.config.reference import options
from comoe.losses.image_text import HARD
from comoe.losses.weighting.strategies import WEIGHTINGS
from comoe.models.encoders.families import FAMILIES
from comoe.models.moe.gate import GATES
from comoe.models.pooling import POOLINGS
from comoe.models.vision.fusion import FUSIONS
from comoe.starter.registry import FOLDERS, home
from comoe.tasks.kinds.registry import KINDS


def recipe_warnings(recipe: Recipe) -> list[str]:
    """One sentence for each option that has no effect or is known to harm.

    Args:
        recipe: that passed ``validate``.
    """
    return [sentence for check in CHECKS for sentence in check(recipe)]


def _unread(recipe: Recipe) -> Iterator[str]:
    """Options that are set while the condition of their ``read_when`` does not hold."""
    for option in options():
        why = option.read_when and _why_unread(option.read_when, recipe)
        names = recipe.tasks if "<name>" in option.path else ("",)
        for path in [option.path.replace("<name>", name) for name in names] if why else ():
            if (value := _value_at(path, recipe)) != option.default:
                yield _in_vain(path, value, why)


def _why_unread(condition: str, recipe: Recipe) -> str:
    """Why a condition of ``comoe.config.fields.option`` does not hold; empty where it holds."""
    for part in condition.split(" and "):
        if part == "images are read":
            if not _reads_images(recipe):
                return "no image is read: model.vision.tower is null"
            continue
        path, sign, wanted = part.split(" ", 2)
        value = _value_at(path, recipe)
        if sign == ">":
            name, size = path, value
            if isinstance(value, (Mapping, list)):
                name, size = f"the number of {path}", len(value)
            if size <= float(wanted):
                return f"{name} is {size}"
        elif not set(wanted.split(" or ")) & {*(value if isinstance(value, list) else [value])}:
            return f"{path} is {value}; {wanted} would read it"
    return ""


def _experts(recipe: Recipe) -> Iterator[str]:
    moe = recipe.model.moe
    if moe.num_experts and GATES[moe.gate].for_measuring:
        why = "it is for measuring speed, not for training"
        yield f"model.moe.gate is {moe.gate}, which ignores the tokens: {why}."
    if moe.num_experts and moe.temperature != 1:
        why = "a temperature other than 1 in the gate costs sample efficiency (arXiv:2602.01466)"
        yield f"model.moe.temperature is {moe.temperature}; {why}."


def _tasks(recipe: Recipe) -> Iterator[str]:
    drawn = recipe.model.moe.num_experts and GATES[recipe.model.moe.gate].draws
    if recipe.loss.r_drop_weight and recipe.model.dropout == 0 and not drawn:
        why = "model.dropout is 0, so both passes are alike"
        yield _in_vain("loss.r_drop_weight", recipe.loss.r_drop_weight, why)
    scored = [name for name, task in recipe.tasks.items() if KINDS[task.kind].scored]
    if WEIGHTINGS[recipe.loss.weighting].adapts and len(scored) < 2:
        why = "there is one task with labels, and nothing to weigh it by"
        yield _in_vain("loss.weighting", recipe.loss.weighting, why)
    contrastive, usual = recipe.loss.contrastive, _USUAL.loss.contrastive
    if contrastive.first_steps and recipe.data.posts_per_label < 2 and contrastive.views < 2:
        why = "2 gives every label of a batch a pair, and a post without one has no loss"
        yield f"data.posts_per_label is {recipe.data.posts_per_label} with loss.contrastive.first_steps; {why}."
    if contrastive.weight or contrastive.first_steps:
        if contrastive.views == 2 and recipe.model.dropout == 0 and not drawn:
            why = "model.dropout is 0, so both views are alike"
            yield _in_vain("loss.contrastive.views", contrastive.views, why)
        if contrastive.negatives == "all" and len(recipe.tasks) < 2:
            why = "there is one task"
            yield _in_vain("loss.contrastive.negatives", contrastive.negatives, why)
        return
    why = "loss.contrastive.weight is 0"
    for key in ("learn_temperature", "queue_size", "views", "negatives"):
        if (value := getattr(contrastive, key)) != getattr(usual, key):
            yield _in_vain(f"loss.contrastive.{key}", value, why)
    if contrastive.chunk_size is not None:
        same = f"{why}, so it is train.micro_batch_size by another name"
        yield _in_vain("loss.contrastive.chunk_size", contrastive.chunk_size, same)
    for name, task in recipe.tasks.items():
        if name not in scored:
            only = f"only that loss reads its posts, and {why}"
            yield _in_vain(f"tasks.{name}.kind", task.kind, only)


def _reptile(recipe: Recipe) -> Iterator[str]:
    train = recipe.train
    carried = {
        "adamw": ("betas", train.betas[0], f"[0.0, {train.betas[1]}]"),
        "sgd": ("momentum", train.momentum, "0"),
    }
    option, share, instead = carried.get(train.optimizer, ("", 0, ""))
    if train.reptile_steps and share:
        why = "the first steps of an inner loop still go where the last data set went"
        remedy = f"take {instead} (arXiv:1803.02999)"
        value = getattr(train, option)
        yield f"train.{option} is {value} with train.reptile_steps; {why}: {remedy}."


def _states(recipe: Recipe) -> Iterator[str]:
    """What heads read, and what they pool."""
    model, modes = recipe.model, [KINDS[task.kind].mode for task in recipe.tasks.values()]
    pooling, width = POOLINGS[model.pooling], model.task_attention_width
    tags = any(task.contrastive is True or pooling.mixes_layers for task in recipe.tasks.values())
    if model.pooling != _USUAL.model.pooling and not {"pooled", *["tokens"] * tags} & {*modes}:
        why = "no task has a head that pools"
        yield _in_vain("model.pooling", model.pooling, why)
    if width and modes.count("pooled") < 2:
        why = f"of the tasks {modes.count('pooled')} have a head that pools, and it takes two"
        yield _in_vain("model.task_attention_width", width, why)
    elif width and not pooling.learned and not model.private_width:
        why = f"under model.pooling {model.pooling} all tasks pool the same states"
        yield f"model.task_attention_width is {width}, but {why}; take attention or layers."


def _images(recipe: Recipe) -> Iterator[str]:
    vision, hide, encoder = recipe.model.vision, recipe.data.hide, recipe.model.encoder
    named = [name for name, task in recipe.tasks.items() if task.image]
    none = "no image is read: model.vision.tower is null"
    if not _reads_images(recipe):
        if named:
            more = f" (and of {len(named) - 1} more)" if len(named) > 1 else ""
            yield _in_vain(f"tasks.{named[0]}.image{more}", recipe.tasks[named[0]].image, none)
        if _HIDES_ALL.get(hide):
            yield f"data.hide is {hide} and {none}, so every post is empty and nothing can be learned."
        elif hide in _HIDES_ALL:
            yield _in_vain("data.hide", hide, none)
    elif _is_single_stream(encoder):
        why = f"model.encoder ({encoder}) reads text and images in one stream"
        for name in ("fusion", "train_tower"):
            if (value := getattr(vision, name)) != getattr(_USUAL.model.vision, name):
                yield _in_vain(f"model.vision.{name}", value, why)
    else:
        if not FUSIONS[vision.fusion].in_encoder and vision.route_image_tokens:
            why = (
                f"under model.vision.fusion {vision.fusion} the text encoder reads no image tokens"
            )
            yield _in_vain("model.vision.route_image_tokens", True, why)
        if not named:
            why = "no task names a column of images (tasks.<name>.image)"
            yield _in_vain("model.vision.tower", vision.tower, why)


def _image_text(recipe: Recipe) -> Iterator[str]:
    if not _reads_images(recipe):
        return
    losses, encoder, fusion = (
        recipe.loss.image_text,
        recipe.model.encoder,
        recipe.model.vision.fusion,
    )
    alone = _is_single_stream(encoder)
    contrasts = losses.itc_weight > 0 and (losses.separate_passes or not alone)
    if alone and losses.itc_weight and not contrasts:
        why = (
            f"model.encoder ({encoder}) reads both sides in one stream, so none are there to "
            "compare; loss.image_text.separate_passes=true makes them"
        )
        yield _in_vain("loss.image_text.itc_weight", losses.itc_weight, why)
    if losses.separate_passes and not (alone and losses.itc_weight):
        why = "only the contrast of an encoder of one stream (ViLT) needs it"
        yield _in_vain("loss.image_text.separate_passes", True, why)
    if losses.itm_weight and HARD[losses.negatives] and not contrasts:
        why = "without the contrast nothing says which texts are similar; random ones are taken"
        yield _in_vain("loss.image_text.negatives", losses.negatives, why)
    reads = f"under model.encoder ({encoder})" if alone else f"under model.vision.fusion {fusion}"
    if contrasts and (alone or FUSIONS[fusion].in_encoder):
        price = (
            "the encoder reads images too, so each text with an image takes a second pass, alone"
        )
        price += ", and its image a third" if alone else ""
        yield f"loss.image_text.itc_weight is {losses.itc_weight}: {reads} {price}."
    if losses.itm_weight and (alone or FUSIONS[fusion].in_encoder):
        price = "about half of the posts with images take one more pass of the encoder, with another post's text"
        yield f"loss.image_text.itm_weight is {losses.itm_weight}: {reads} {price}."


def _reads_images(recipe: Recipe) -> bool:
    return recipe.model.vision.tower is not None or _is_single_stream(recipe.model.encoder)


def _is_single_stream(encoder: str) -> bool:
    """True for the folder, or the ready-made name, of a model of both sides; what lies elsewhere is not
    fetched for a warning."""
    folder = home() / FOLDERS[encoder][0] if encoder in FOLDERS else Path(encoder).expanduser()
    path = folder / "config.json"
    try:
        kind = json.loads(path.read_text(encoding="utf-8")).get("model_type")
    except (OSError, ValueError, AttributeError):
        return False
    return kind in FAMILIES and FAMILIES[kind].single_stream


def _value_at(path: str, recipe: Recipe) -> Any:
    value: Any = recipe
    for part in path.split("."):
        value = value[part] if isinstance(value, Mapping) else getattr(value, part)
    return value


def _in_vain(path: str, value: Any, why: str) -> str:
    return f"{path} is {value}, without effect: {why}."


_USUAL = Recipe()
_HIDES_ALL = {"text": True, "image": False}
"""What ``data.hide`` takes away -> whether nothing is left of posts without images."""

CHECKS: tuple[Callable[[Recipe], Iterator[str]], ...] = (
    _unread,
    _experts,
    _tasks,
    _reptile,
    _states,
    _images,
    _image_text,
)
"""Each looks at a recipe and gives sentences."""
