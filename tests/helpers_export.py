"""A tiny tokenizer, a tiny random model, and exports of them."""

from __future__ import annotations

import json
import string
from pathlib import Path

import pytest
from safetensors.torch import save_file
from transformers import BertTokenizerFast, PreTrainedTokenizerFast

from comoe.config.load import save_recipe
from comoe.config.recipe import (
    DataConfig,
    ModelConfig,
    NormalizeConfig,
    Recipe,
    RunConfig,
    TaskConfig,
)
from comoe.inference.checkpoint_folder import write_manifest
from comoe.inference.export import Backbone, export_model
from comoe.inference.predictor import Predictor
from tests.helpers_model import HF_CONFIGS, MOOD, SIGNS, TASKS, TOPIC, WORDS, moe_config, tiny_model

__all__ = [
    "MOOD",
    "SIGNS",
    "TASKS",
    "TOPIC",
    "WORDS",
    "assert_same",
    "export_tiny",
    "make",
    "make_run",
    "tiny_predictor",
    "tiny_recipe",
    "tiny_tokenizer",
]

PIECES = ["good", "bad", "day", "the", "sun", "##ny", "user", "http", "ann", "paris", "rain"]
TOKENS = [
    "[PAD]",
    "[UNK]",
    "[CLS]",
    "[SEP]",
    "[MASK]",
    *PIECES,
    *string.ascii_lowercase,
    *"@#.,!:'-",
]


def tiny_tokenizer(folder: Path) -> PreTrainedTokenizerFast:
    """A BERT tokenizer with a vocabulary that the tiny models' embedding table can hold."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "vocab.txt").write_text("\n".join(TOKENS) + "\n", encoding="utf-8")
    tokenizer = BertTokenizerFast(vocab=str(folder / "vocab.txt"), model_max_length=64)
    assert len(tokenizer) <= HF_CONFIGS["bert"].vocab_size
    return tokenizer


def tiny_recipe(
    route_by: str = "token", *, max_length: int = 16, tasks=TASKS, posts=None, own_layers: int = 0
) -> Recipe:
    """``posts`` is the file that all tasks share; None gives each one its own."""
    return Recipe(
        run=RunConfig(name="tiny"),
        model=ModelConfig(
            encoder="some/encoder",
            dropout=0.1,
            projection_width=8,
            own_layers=own_layers,
            moe=moe_config(route_by=route_by, task_prior=1.5 * (route_by == "both")),
        ),
        data=DataConfig(max_length=max_length, normalize=NormalizeConfig()),
        tasks={
            task.name: TaskConfig(path=posts or f"{task.name}.jsonl", kind=task.kind)
            for task in tasks
        },
    )


def export_tiny(folder: Path, *, tasks=TASKS, results=None, seed=0, **options):
    """Export a random model; gives back the model that was exported. ``options`` go to ``tiny_recipe``."""
    recipe = tiny_recipe(tasks=tasks, **options)
    own_layers = recipe.model.own_layers
    model = tiny_model(recipe.model.moe, tasks=tasks, seed=seed, own_layers=own_layers).eval()
    export_model(
        folder / "export",
        state_dict=model.state_dict(),
        recipe=recipe,
        tasks=tasks,
        backbone=Backbone(HF_CONFIGS["bert"].to_dict(), tiny_tokenizer(folder / "vocabulary")),
        results=results,
    )
    return model


def tiny_predictor(folder: Path, **options) -> Predictor:
    export_tiny(folder, **options)
    return Predictor.from_pretrained(folder / "export", device="cpu")


def make_run(folder, *, steps=(3, 6), best=None, results=None):
    """A run folder with checkpoints as the trainer leaves them."""
    save_recipe(tiny_recipe(), make(folder) / "config.yaml")
    (folder / "tasks.json").write_text(json.dumps([task.to_dict() for task in TASKS]))
    (folder / "encoder_config.json").write_text(json.dumps(HF_CONFIGS["bert"].to_dict()))
    tiny_tokenizer(folder / "vocabulary").save_pretrained(folder / "tokenizer")
    models = {}
    for step in steps:
        checkpoint = folder / f"checkpoints/step-{step:08d}"
        models[step] = tiny_model(tiny_recipe().model.moe, seed=step).eval()
        weights = make(checkpoint / "weights") / "model.safetensors"
        save_file(models[step].state_dict(), weights)
        (checkpoint / "state.json").write_text("{}")
        write_manifest(checkpoint, step=step)
    if best is not None:
        (folder / "checkpoints/best.json").write_text(json.dumps({"step": best}))
    if results is not None:
        (folder / "results.json").write_text(json.dumps(results))
    return models


def make(folder):
    folder.mkdir(parents=True, exist_ok=True)
    return folder


def assert_same(found, expected):
    """Equal predictions up to rounding: batches of other shapes add in another order."""
    assert type(found) is type(expected)
    if isinstance(found, dict):
        assert found.keys() == expected.keys()
        for key in found:
            assert_same(found[key], expected[key])
    elif isinstance(found, list):
        assert len(found) == len(expected)
        for one, other in zip(found, expected, strict=True):
            assert_same(one, other)
    else:
        assert found == (
            pytest.approx(expected, abs=1e-5) if isinstance(found, float) else expected
        )
