"""A tiny tokenizer, a tiny random model, and exports of them."""

from __future__ import annotations

import string
from pathlib import Path

from helpers_model import HF_CONFIGS, MOOD, SIGNS, TASKS, TOPIC, WORDS, moe_config, tiny_model
from transformers import BertTokenizerFast, PreTrainedTokenizerFast

from comoe.config.recipe import (
    DataConfig,
    ModelConfig,
    NormalizeConfig,
    Recipe,
    RunConfig,
    TaskConfig,
)
from comoe.inference.export import export_model
from comoe.inference.predictor import Predictor

__all__ = [
    "MOOD",
    "SIGNS",
    "TASKS",
    "TOPIC",
    "WORDS",
    "export_tiny",
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
    route_by: str = "token", *, max_length: int = 16, tasks=TASKS, posts=None
) -> Recipe:
    """``posts`` is the file that all tasks share; None gives each one its own."""
    return Recipe(
        run=RunConfig(name="tiny"),
        model=ModelConfig(
            encoder="some/encoder",
            dropout=0.1,
            projection_width=8,
            moe=moe_config(route_by=route_by),
        ),
        data=DataConfig(max_length=max_length, normalize=NormalizeConfig()),
        tasks={
            task.name: TaskConfig(path=posts or f"{task.name}.jsonl", kind=task.kind)
            for task in tasks
        },
    )


def export_tiny(
    folder: Path, *, route_by="token", max_length=16, tasks=TASKS, results=None, seed=0, posts=None
):
    """Export a random model; gives back the model that was exported."""
    recipe = tiny_recipe(route_by, max_length=max_length, tasks=tasks, posts=posts)
    model = tiny_model(recipe.model.moe, tasks=tasks, seed=seed).eval()
    export_model(
        folder / "export",
        state_dict=model.state_dict(),
        recipe=recipe,
        tasks=tasks,
        encoder_config=HF_CONFIGS["bert"].to_dict(),
        tokenizer=tiny_tokenizer(folder / "vocabulary"),
        results=results,
    )
    return model


def tiny_predictor(folder: Path, **options) -> Predictor:
    export_tiny(folder, **options)
    return Predictor.from_pretrained(folder / "export", device="cpu")
