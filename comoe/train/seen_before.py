"""Posts of evaluation that a teacher, or the model that a run starts from, was trained on."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from functools import partial
from pathlib import Path

from comoe.config.load import load_saved_recipe
from comoe.config.recipe import Recipe
from comoe.data.corpus import Corpus, load_corpus, shared_posts
from comoe.data.held_out import split_seed
from comoe.data.posts import PART_NAMES, PostSplit
from comoe.data.seen_posts import SEEN, count_seen
from comoe.starter.registry import resolve


def posts_seen_before(recipe: Recipe, corpus: Corpus) -> list[str]:
    """One sentence for each earlier model and split of which it has learned posts, as far as that can be told.

    The recipe of its run, in the folder above an export, is read again where it names a data set of
    this run, and may have held out other posts of it. Of other exports the filter of their training
    posts counts (``comoe.data.seen_posts``), if it is there.

    Args:
        recipe: of this run.
        corpus: its posts.
    """
    named = [("model.start_from", recipe.model.start_from)]
    named += [("distill.teachers", path) for path in recipe.distill.teachers]
    return [
        sentence
        for key, path in named
        if path is not None
        for sentence in _of_model(f"{key} ({path})", Path(path).expanduser(), recipe, corpus)
    ]


def _of_model(name: str, export: Path, recipe: Recipe, corpus: Corpus) -> Iterator[str]:
    saved = export.resolve().parent / "config.yaml"
    count, about = partial(count_seen, export / SEEN), "about "
    try:
        theirs = None
        if saved.is_file():
            recipe_there = load_saved_recipe(saved)
            # With the folder of a ready-made data.root; no encoder is fetched for that.
            vision = replace(recipe_there.model.vision, tower=None)
            model = replace(recipe_there.model, encoder="none", vision=vision)
            theirs = resolve(replace(recipe_there, model=model), progress=False)
        if theirs is not None and _places(theirs) & _places(recipe):
            if _held_out_by(theirs) == _held_out_by(recipe):
                return
            known = _texts(load_corpus(theirs).splits["train"])
            count, about = partial(shared_posts, known=known), ""
        evaluated = {split: corpus.splits.get(split, ()) for split in PART_NAMES[1:]}
        found = {split: count(_texts(posts)) for split, posts in evaluated.items() if len(posts)}
    except (ValueError, OSError) as error:
        yield f"{name}: whether it has learned posts that this run is evaluated on cannot be told ({error})"
        return
    for split, repeated in found.items():
        if repeated:
            yield (
                f"{name} was trained on {about}{repeated:,} of the {len(corpus.splits[split]):,} {split} posts of this "
                "run, so that scores are too high; its recipe held out others (data.split_seed, "
                "fractions, stratify, tasks.<name>.splits, hold_out)"
            )


def _places(recipe: Recipe) -> set[Path]:
    root = Path(recipe.data.root or ".").expanduser()
    return {(root / Path(task.path).expanduser()).resolve() for task in recipe.tasks.values()}


def _held_out_by(recipe: Recipe) -> tuple:
    """What decides which posts a run learns from, and which it is evaluated on."""
    data, tasks = recipe.data, recipe.tasks
    read = {
        name: (
            task.path,
            task.format,
            task.subset,
            task.splits,
            task.hold_out,
            task.label,
            task.author,
        )
        for name, task in tasks.items()
    }
    fractions = (data.validation_fraction, data.test_fraction, data.stratify)
    return split_seed(recipe)[1], fractions, data.root, read


def _texts(posts: PostSplit) -> PostSplit:
    return replace(posts, images=[None] * len(posts))
