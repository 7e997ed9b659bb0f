"""Loads a finished run: its export, and its own posts as it read them."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

from comoe.config.load import load_saved_recipe
from comoe.data.corpus import load_corpus
from comoe.data.tokens.split import TokenizedSplit, tokenize_split
from comoe.inference.predictor import Predictor
from comoe.starter.registry import home, resolve


def load_trained(
    run_folder: Path,
    *,
    split: str,
    limit: int | None = None,
    device: str = "auto",
    verify: bool = True,
) -> tuple[Predictor, TokenizedSplit]:
    """The export of a run, and one split of the posts of its recipe.

    Args:
        run_folder: holds ``config.yaml`` and ``export/``.
        split: train, validation or test.
        limit: maximum of validation or test posts per data set; None uses all posts of the recipe.
        device: a torch device; auto is the first GPU, or the CPU.
        verify: compare the digests of the export's files.

    Raises:
        ValueError: no finished run there, or no post in the split.
    """
    config = run_folder / "config.yaml"
    if not config.is_file():
        why = "it has no config.yaml" if run_folder.is_dir() else "there is no such folder"
        raise ValueError(f"{run_folder}: {why}; give the folder of a finished run (runs/starter).")
    recipe = resolve(load_saved_recipe(config), progress=False)
    if limit is not None:
        recipe = replace(recipe, data=replace(recipe.data, limit_eval=limit))
    predictor = Predictor.from_pretrained(run_folder / "export", device=device, verify=verify)
    exported = predictor.exported
    corpus = load_corpus(recipe, with_images=exported.image_processor is not None)
    if len(corpus.splits.get(split, ())) == 0:
        raise ValueError(
            f"the recipe of {run_folder} has no {split} posts; there are {', '.join(corpus.splits)}."
        )
    cache = home() / "tokens" if recipe.data.cache else None
    tokens = tokenize_split(
        corpus.splits[split],
        exported.tokenizer,
        tasks=exported.tasks,
        config=exported.data_config,
        cache_dir=cache,
        lexicon=exported.lexicon,
    )
    return predictor, tokens
