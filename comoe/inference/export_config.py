"""``config.json`` of an export: all that is needed to build its model, written and read.

Tasks are a list because Hugging Face sorts the keys of dicts.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from comoe import __version__
from comoe.config.files import read_json
from comoe.config.legacy import keep_old_meanings
from comoe.config.load import recipe_from_dict
from comoe.config.recipe import Recipe
from comoe.data.datasets import read_as_words
from comoe.data.reading.inputs import columns_in_training
from comoe.inference.onnx_model import ONNX
from comoe.tasks.task import Task

FORMAT_VERSION = 1
"""Counts changes of ``config.json`` and of the weights' names that older code cannot read."""


WEIGHTS, CONFIG = "model.safetensors", "config.json"


AGAIN = "copy or export the folder again"
"""What to do about a damaged export."""


IMAGES = "preprocessor_config.json"
"""How images become numbers; in an export of a model that reads them."""


DATA_KEYS = ("max_length", "max_posts", "normalize", "hide", "max_image_pixels", "max_image_bytes")
"""Options of ``data`` that decide how a post becomes numbers."""


def read_export_config(folder: Path) -> dict[str, Any]:
    """``config.json`` of an export.

    Raises:
        ValueError: no export, or one that another version made.
    """
    # With an ONNX file the weights may be left out.
    needed = (CONFIG,) if (folder / ONNX).is_file() else (CONFIG, WEIGHTS)
    missing = [name for name in needed if not (folder / name).is_file()]
    if missing:
        raise ValueError(
            f"{folder} is not an export: {' and '.join(missing)} missing; `comoe export` makes one from a run folder."
        )
    config = read_json(folder / CONFIG)
    config = config if isinstance(config, dict) else {}
    if config.get("model_type") != "comoe":
        raise ValueError(
            f"{folder / CONFIG} has model_type {config.get('model_type')!r} instead of 'comoe'; "
            f"give the folder that `comoe export` (or a run, as export/) wrote."
        )
    version = config.get("format_version")
    if version != FORMAT_VERSION:
        raise ValueError(
            f"{folder / CONFIG} has format_version {version}, made by comoe {config.get('comoe_version')}; this comoe "
            f"({__version__}) reads {FORMAT_VERSION}: install that version, or export the run "
            f"again with this one."
        )
    return config


def recipe_of_export(config: Mapping[str, Any]) -> Recipe:
    """The recipe's part of an export's ``config.json``: ``model``, and of ``data`` what concerns reading."""
    saved = {"model": config["model"], "data": config["data"]}
    keep_old_meanings(saved)
    return recipe_from_dict(saved, saved=True)


def export_config(
    recipe: Recipe,
    tasks: Sequence[Task],
    *,
    encoder_config: Mapping[str, Any],
    tower_config: Mapping[str, Any] | None,
) -> dict[str, Any]:
    """Content of ``config.json``; arguments as of ``comoe.inference.export.export_model``."""
    model = dataclasses.asdict(recipe.model)
    # The paths of the machine that trained are of no use to others.
    model["encoder"] = base_model(recipe.model.encoder)
    model["start_from"] = None
    if recipe.model.lexicon.path is not None:
        # Where nothing but a loss reads it, a prediction needs none.
        name = Path(recipe.model.lexicon.path).name
        model["lexicon"]["path"] = name if recipe.model.lexicon.input else None
    if recipe.model.vision.tower is not None:
        model["vision"]["tower"] = base_model(recipe.model.vision.tower)
    return {
        "architectures": ["MultiTaskModel"],
        "model_type": "comoe",
        "format_version": FORMAT_VERSION,
        "comoe_version": __version__,
        "dtype": "float32",
        "num_local_experts": recipe.model.moe.num_experts,
        "num_experts_per_tok": recipe.model.moe.top_k,
        "max_length": recipe.data.max_length,
        "tasks": [task.to_dict() for task in tasks],
        "as_words": list(read_as_words(recipe)),
        "columns": columns_in_training(recipe.tasks),
        **({"plugins": recipe.plugins} if recipe.plugins else {}),
        "model": model,
        "data": {
            key: value for key, value in dataclasses.asdict(recipe.data).items() if key in DATA_KEYS
        },
        "encoder": _without_path(encoder_config),
        **({} if tower_config is None else {"tower": _without_path(tower_config)}),
    }


def export_name(folder: Path) -> str:
    """What an export is called: by its folder; one called ``export``, by the folder of its run."""
    folder = folder.resolve()
    return folder.parent.name if folder.name == "export" else folder.name


def _without_path(hf_config: Mapping[str, Any]) -> dict[str, Any]:
    return {key: value for key, value in hf_config.items() if key != "_name_or_path"}


def base_model(encoder: str) -> str:
    """Hub name of the encoder, or the last part of its folder."""
    return Path(encoder).name if Path(encoder).exists() or encoder.count("/") > 1 else encoder
