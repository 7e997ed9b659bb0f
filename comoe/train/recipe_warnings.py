"""Options that a recipe sets in vain or unwisely: said once when a run starts, never a reason to stop."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

from comoe.config.recipe import Recipe
from comoe.losses.image_text import HARD
from comoe.losses.weighting.strategies import WEIGHTINGS
from comoe.models.encoders.families import FAMILIES
from comoe.models.moe.gate import BALANCES, GATES, ROUTES, keep_bias
from comoe.models.vision.fusion import FUSIONS
from comoe.tasks.kinds.registry import KINDS


def doubts(recipe: Recipe) -> list[str]:
    """One sentence for each option that has no effect or is known to harm.

    Args:
        recipe: that passed ``validate``; names that no table holds raise their own error elsewhere
            and are left out.
    """
    return [sentence for check in CHECKS for sentence in check(recipe)]


def _gate_for_measuring(recipe: Recipe) -> list[str]:
    moe = recipe.model.moe
    if not moe.num_experts or moe.gate not in GATES or not GATES[moe.gate].for_measuring:
        return []
    return [
        f"model.moe.gate is {moe.gate}, which ignores the tokens: it is for measuring speed, not for training."
    ]


def _temperature(recipe: Recipe) -> list[str]:
    moe = recipe.model.moe
    if not moe.num_experts or moe.temperature == 1:
        return []
    return [
        f"model.moe.temperature is {moe.temperature}; a temperature other than 1 in the gate costs sample efficiency "
        "(arXiv:2602.01466)."
    ]


def _unread_by_the_gate(recipe: Recipe) -> list[str]:
    moe = recipe.model.moe
    if not moe.num_experts:
        return []
    reads_task = moe.route_by not in ROUTES or ROUTES[moe.route_by].task
    nudges = moe.balance not in BALANCES or BALANCES[moe.balance] is not keep_bias
    idle = {
        "task_embedding_width": (not reads_task, f"route_by {moe.route_by} reads no task"),
        "balance_rate": (not nudges, f"balance is {moe.balance}"),
        "cooperation_threshold": (
            moe.top_k == 1,
            "top_k is 1 and a token's best expert always counts",
        ),
    }
    return [
        _in_vain(f"model.moe.{name}", getattr(moe, name), why)
        for name, (is_idle, why) in idle.items()
        if is_idle and _is_set(moe, name)
    ]


def _without_experts(recipe: Recipe) -> list[str]:
    loss, moe, few = recipe.loss, recipe.model.moe, []
    if not moe.num_experts:
        few = ["balance_weight", "z_weight", "task_separation_weight"]
    elif moe.num_experts == 1 or len(recipe.tasks) == 1:
        few = ["task_separation_weight"]
    why = f"with {moe.num_experts} experts per layer and {len(recipe.tasks)} task(s) it has nothing to work on"
    found = [
        _in_vain(f"loss.{name}", getattr(loss, name), why) for name in few if getattr(loss, name)
    ]
    if not moe.num_experts and moe.shared_width:
        found.append(
            _in_vain(
                "model.moe.shared_width",
                moe.shared_width,
                "num_experts is 0, so no layer has a block",
            )
        )
    return found


def _task_weights(recipe: Recipe) -> list[str]:
    weighting = recipe.loss.weighting
    if weighting not in WEIGHTINGS or WEIGHTINGS[weighting].reads_task_weights:
        return []
    readers = " and ".join(name for name, kind in WEIGHTINGS.items() if kind.reads_task_weights)
    return [
        _in_vain(
            f"tasks.{name}.weight",
            task.weight,
            f"loss.weighting is {weighting}; {readers} would read it",
        )
        for name, task in recipe.tasks.items()
        if task.weight != 1
    ]


def _weighting(recipe: Recipe) -> list[str]:
    loss, weighting = recipe.loss, recipe.loss.weighting
    if weighting not in WEIGHTINGS:
        return []
    options = dict.fromkeys(option for kind in WEIGHTINGS.values() for option in kind.reads)
    found = []
    for option in (
        option
        for option in options
        if option not in WEIGHTINGS[weighting].reads and _is_set(loss, option)
    ):
        readers = ", ".join(name for name, kind in WEIGHTINGS.items() if option in kind.reads)
        why = f"loss.weighting is {weighting}; {readers} would read it"
        found.append(_in_vain(f"loss.{option}", getattr(loss, option), why))
    # An unknown kind raises its own error elsewhere.
    scored = [
        task for task in recipe.tasks.values() if task.kind not in KINDS or KINDS[task.kind].scored
    ]
    if WEIGHTINGS[weighting].adapts and len(scored) < 2:
        found.append(
            _in_vain(
                "loss.weighting",
                weighting,
                "there is one task with labels, and nothing to weigh it by",
            )
        )
    return found


def _adversarial(recipe: Recipe) -> list[str]:
    config = recipe.loss.adversarial
    idle = () if config.weight else ("predict", "hidden_width", "gamma", "balanced")
    why = "loss.adversarial.weight is 0"
    return [
        _in_vain(f"loss.adversarial.{name}", getattr(config, name), why)
        for name in idle
        if _is_set(config, name)
    ]


def _momentum(recipe: Recipe) -> list[str]:
    train = recipe.train
    if train.optimizer == "sgd" or not train.momentum:
        return []
    return [
        _in_vain(
            "train.momentum",
            train.momentum,
            f"train.optimizer is {train.optimizer}; train.betas rule there",
        )
    ]


def _contrastive(recipe: Recipe) -> list[str]:
    contrastive = recipe.loss.contrastive
    if contrastive.weight:
        idle = {
            "queue_warmup": (
                contrastive.queue_warmup and not contrastive.queue_size,
                "queue_size is 0",
            )
        }
    else:
        why = "loss.contrastive.weight is 0"
        idle = {
            name: (getattr(contrastive, name), why) for name in ("queue_size", "learn_temperature")
        }
        if contrastive.chunk_size is not None:
            idle["chunk_size"] = (True, f"{why}, so it is train.micro_batch_size by another name")
    found = [
        _in_vain(f"loss.contrastive.{name}", getattr(contrastive, name), why)
        for name, (is_idle, why) in idle.items()
        if is_idle
    ]
    if not contrastive.weight:
        # An unknown kind raises its own error elsewhere.
        plain = [
            name
            for name, task in recipe.tasks.items()
            if task.kind in KINDS and not KINDS[task.kind].scored
        ]
        kinds = {name: recipe.tasks[name].kind for name in plain}
        found += [
            _in_vain(f"tasks.{name}.kind", kind, f"only that loss reads its posts, and {why}")
            for name, kind in kinds.items()
        ]
    return found


def _pictures(recipe: Recipe) -> list[str]:
    vision, encoder = recipe.model.vision, recipe.model.encoder
    alone = _is_single_stream(encoder)
    if vision.tower is None and not alone:
        why = "no picture is read: model.vision.tower is null"
        named = [name for name, task in recipe.tasks.items() if task.image]
        more = f" (and of {len(named) - 1} more)" if len(named) > 1 else ""
        idle = [
            _in_vain(f"tasks.{name}.image{more}", recipe.tasks[name].image, why)
            for name in named[:1]
        ]
        names = [
            name
            for name in ("fusion", "train_tower", "route_image_tokens")
            if _is_set(vision, name)
        ]
        return idle + [
            _in_vain(f"model.vision.{name}", getattr(vision, name), why) for name in names
        ]
    if alone:
        why = f"model.encoder ({encoder}) reads text and pictures in one stream"
        names = [name for name in ("fusion", "train_tower") if _is_set(vision, name)]
        return [_in_vain(f"model.vision.{name}", getattr(vision, name), why) for name in names]
    if (
        vision.fusion not in FUSIONS
        or FUSIONS[vision.fusion].in_encoder
        or not vision.route_image_tokens
    ):
        return []
    why = f"under model.vision.fusion {vision.fusion} the text encoder reads no image tokens"
    return [_in_vain("model.vision.route_image_tokens", True, why)]


def _sides(recipe: Recipe) -> list[str]:
    hide, tower = recipe.data.hide, recipe.model.vision.tower
    reads = tower is not None or _is_single_stream(recipe.model.encoder)
    named = any(task.image for task in recipe.tasks.values())
    if tower is not None and not named:
        return [
            _in_vain(
                "model.vision.tower", tower, "no task names a picture column (tasks.<name>.image)"
            )
        ]
    if hide == "text" and not reads:
        return [
            "data.hide is text and no picture is read, so every post is empty and there is nothing to learn from."
        ]
    if hide == "image" and not reads:
        return [
            _in_vain("data.hide", hide, "no picture is read anyway: model.vision.tower is null")
        ]
    return []


def _image_text(recipe: Recipe) -> list[str]:
    vision, losses, encoder = recipe.model.vision, recipe.loss.image_text, recipe.model.encoder
    alone, found = _is_single_stream(encoder), []
    if vision.tower is None and not alone:
        names = [
            name
            for name in ("itc_weight", "itm_weight", "temperature", "negatives")
            if _is_set(losses, name)
        ]
        why = "no picture is read: model.vision.tower is null"
        return [_in_vain(f"loss.image_text.{name}", getattr(losses, name), why) for name in names]
    contrast = losses.itc_weight > 0
    if alone and contrast:
        why = f"model.encoder ({encoder}) reads both sides in one stream, so there are no two sides to compare"
        found.append(_in_vain("loss.image_text.itc_weight", losses.itc_weight, why))
    if losses.itm_weight and HARD.get(losses.negatives) and (alone or not contrast):
        why = "without the contrast nothing says which texts are similar; random ones are taken"
        found.append(_in_vain("loss.image_text.negatives", losses.negatives, why))
    joint = alone or (vision.fusion in FUSIONS and FUSIONS[vision.fusion].in_encoder)
    reads = f"model.encoder ({encoder})" if alone else f"model.vision.fusion {vision.fusion}"
    if joint and contrast and not alone:
        found.append(
            f"loss.image_text.itc_weight is {losses.itc_weight}: under {reads} the encoder reads pictures too, so each "
            "text with a picture takes a second pass, alone."
        )
    if joint and losses.itm_weight:
        found.append(
            f"loss.image_text.itm_weight is {losses.itm_weight}: under {reads} about half of the posts with pictures "
            "take one more pass of the encoder, with another post's text."
        )
    return found


def _noise(recipe: Recipe) -> list[str]:
    data = recipe.data
    if "typos" in data.noise or not _is_set(data, "noise_rate"):
        return []
    return [_in_vain("data.noise_rate", data.noise_rate, "typos are not among data.noise")]


def _is_single_stream(encoder: str) -> bool:
    """True for the folder of a model of both sides; what lies elsewhere is not fetched for a doubt."""
    path = Path(encoder).expanduser() / "config.json"
    try:
        kind = json.loads(path.read_text(encoding="utf-8")).get("model_type")
    except (OSError, ValueError, AttributeError):
        return False
    return kind in FAMILIES and FAMILIES[kind].single_stream


def _is_set(config: Any, name: str) -> bool:
    default = {field.name: field.default for field in dataclasses.fields(config)}[name]
    return getattr(config, name) != default


def _in_vain(path: str, value: Any, why: str) -> str:
    return f"{path} is {value}, without effect: {why}."


CHECKS: tuple[Callable[[Recipe], list[str]], ...] = (
    _gate_for_measuring, _temperature, _unread_by_the_gate, _without_experts, _task_weights, _weighting, _contrastive,
    _adversarial, _momentum, _pictures, _sides, _image_text, _noise,
)  # fmt: skip
"""Each looks at a recipe and gives sentences."""
