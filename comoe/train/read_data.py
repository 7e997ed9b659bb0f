"""The first steps of a run: posts, then tokens."""

from __future__ import annotations

import os
from collections.abc import Callable
from typing import TypeVar

from comoe.config.recipe import Recipe
from comoe.data.collator import Collator
from comoe.data.columns import find_domains
from comoe.data.corpus import Corpus, load_corpus
from comoe.data.images.pixels import PixelReader, limits_of, load_image_processor
from comoe.data.tokens.split import TokenizedSplit, report_cuts, tokenize_split
from comoe.data.tokens.vocabulary import load_tokenizer
from comoe.distributed import barrier, is_main
from comoe.evaluation.evaluate import check_chosen_metric
from comoe.inference.teacher import DISTILLED, find_teachers
from comoe.models.vision.tower import image_side
from comoe.starter.registry import home, resolve
from comoe.tasks.lexicon import load_lexicon
from comoe.train.seen_before import posts_seen_before
from comoe.train.state import total_steps

Made = TypeVar("Made")


def read_posts(typed: Recipe) -> tuple[Recipe, Corpus]:
    """The recipe with ready-made names resolved to folders, and all posts that it names. Every rank must call it."""
    recipe = _one_per_node_first(lambda: resolve(typed, progress=is_main()))
    kept = home() / "pictures" if recipe.data.cache else None
    corpus = load_corpus(
        recipe, with_images=image_side(recipe.model) is not None, cache_dir=kept, progress=True
    )
    measured = {task for task, found in corpus.report.labels.items() if "validation" in found}
    teachers = find_teachers(recipe.distill, corpus.tasks)
    known = {name for teacher in teachers for name in teacher.columns}
    metric = recipe.train.early_stop_metric
    check_chosen_metric(metric, corpus.tasks, measured=measured, distilled=known)
    corpus.report.notes += [
        f"task {task.name}: no teacher; it is learned from its gold labels alone"
        for task in corpus.tasks
        if teachers and task.rules.predicts and task.name not in known
    ]
    corpus.report.notes += _first_stage(recipe, corpus)
    corpus.report.warnings += posts_seen_before(recipe, corpus) if is_main() else []
    corpus.report.notes += [
        f"task {name}: its head starts at the texts of its labels"
        + (", unless model.start_from knows the task" if recipe.model.start_from else "")
        for name, task in recipe.tasks.items()
        if task.descriptions
    ]
    return recipe, corpus


def _first_stage(recipe: Recipe, corpus: Corpus) -> list[str]:
    """What the data report says of ``loss.contrastive.first_steps``.

    Raises:
        ValueError: no step is left for the tasks, or nothing is compared.
    """
    key, first = "loss.contrastive.first_steps", recipe.loss.contrastive.first_steps
    posts, batch_size = len(corpus.splits["train"]), recipe.train.batch_size
    steps = total_steps(recipe.train, steps_per_epoch=-(-posts // batch_size))
    if first >= steps:
        raise ValueError(
            f"{key} ({first}) must be less than the {steps} steps of the run; lower it, or raise "
            "train.max_steps or train.epochs."
        )
    if first and not any(task.contrastive for task in corpus.tasks):
        raise ValueError(
            f"{key} is {first}, but no task takes part in the contrastive loss; set "
            "tasks.<name>.contrastive for one, or make it 0."
        )
    note = f"{first:,} of {steps:,} steps come first that learn from the contrastive loss alone"
    return [note] if first else []


def tokenize_posts(recipe: Recipe, corpus: Corpus) -> tuple[dict[str, TokenizedSplit], Collator]:
    """Every split as tokens, and what makes batches of them; what was cut is noted in the corpus' report.

    Args:
        recipe: of ``read_posts``.
        corpus: its posts.
    """
    domains = find_domains(corpus.splits["train"], recipe.loss.adversarial)
    corpus.report.notes += [] if domains is None else [domains.line()]
    tokenizer = load_tokenizer(
        recipe.model.encoder, trust_remote_code=recipe.model.trust_remote_code
    )
    path = recipe.model.lexicon.path
    lexicon = None if path is None else load_lexicon(path)
    cache = home() / "tokens" if recipe.data.cache else None
    teachers = find_teachers(recipe.distill, corpus.tasks)
    distilled = {name for teacher in teachers for name in teacher.columns}
    splits = _one_per_node_first(
        lambda: {
            name: tokenize_split(
                posts,
                tokenizer,
                tasks=corpus.tasks,
                config=recipe.data,
                cache_dir=cache,
                distilled=distilled if name in DISTILLED else (),
                lexicon=lexicon,
            )
            for name, posts in corpus.splits.items()
        }
    )
    report_cuts(splits, corpus.report)
    if lexicon is not None:
        found = int((splits["train"].tokens.entries > 0).sum())
        shape = f"{len(lexicon.numbers):,} words, numbers of each: {lexicon.width}"
        corpus.report.notes.append(f"lexicon {path}: {shape}; found in training posts: {found:,}")
        if not found:
            rule = "it changes nothing; is it of their language, with blanks between words?"
            corpus.report.warnings.append(
                f"lexicon {path}: no training post has a word of it, so {rule}"
            )
    pixels, images = None, image_side(recipe.model)
    if images is not None:
        processor = load_image_processor(images, trust_remote_code=recipe.model.trust_remote_code)
        pixels = PixelReader(processor, limits_of(recipe.data))
    row_per_task = recipe.model.row_per_task
    return splits, Collator(
        tokenizer, corpus.tasks, row_per_task=row_per_task, pixels=pixels, domains=domains,
        max_posts=recipe.data.max_posts, lexicon=lexicon,
    )  # fmt: skip


def _one_per_node_first(work: Callable[[], Made]) -> Made:
    """Let one rank per node do cached work first, the others after it, from the cache."""
    first = int(os.environ.get("LOCAL_RANK", "0")) == 0
    made = work() if first else None
    barrier()
    return made if first else work()
