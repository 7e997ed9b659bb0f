"""What a run would do, printed instead of done: recipe, labels, cleaned sample posts, memory."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch

from comoe.config.load import recipe_to_yaml
from comoe.config.recipe import NormalizeConfig, Recipe
from comoe.data.corpus import Corpus
from comoe.data.posts import PostSplit
from comoe.data.sampling.sampler import sampler_of
from comoe.data.text.normalize import normalize_post, normalize_words
from comoe.data.tokens.prompts import label_tokens
from comoe.data.tokens.split import TokenizedSplit
from comoe.distributed import is_main, world_size
from comoe.tasks.task import Task
from comoe.train.fits import check_fits, plan_posts
from comoe.train.memory_plan import MemoryPlan
from comoe.train.parallel.ds_config import fill_settings, plan_layout
from comoe.train.read_data import read_posts, tokenize_posts

Seen = Callable[[Task, int], tuple[str, str]]

SAMPLES = 3
"""Posts shown per task."""

SHOWN_CHARACTERS = 160
"""Characters of a post that are shown."""


def print_dry_run(
    typed: Recipe,
    settings: Mapping[str, Any],
    *,
    device: torch.device,
    gpus: int = 0,
    ranks: int = 0,
) -> None:
    """Print what a run would do: the resolved recipe, the data, sample posts, and the memory of one rank.

    Args:
        typed: as the user wrote it.
        settings: the DeepSpeed JSON.
        device: of this rank.
        gpus: plan the memory for so many GPUs; 0 is for this machine.
        ranks: that are to be started on this machine; 0 is those that are here.

    Raises:
        ValueError: as ``build_run``; with ``gpus`` the memory of this machine does not count.
    """
    gpu = gpus > 0 or device.type == "cuda"
    layout = plan_layout(typed, settings, world_size=gpus or ranks or world_size(), gpu=gpu)
    settings = fill_settings(settings, typed, layout, gpu=gpu)
    recipe, corpus = read_posts(typed)
    splits, collator = tokenize_posts(recipe, corpus)
    plan, objective = plan_posts(typed, recipe, layout, splits, collator, settings)
    if not gpus:
        # What a start would find out, too.
        check_fits(plan, objective, device=device, ranks=ranks)
    sampler_of(recipe, splits["train"], corpus.tasks, layout.world_size, layout.micro_batch_size)
    if is_main():
        seen = seen_by_the_decoder(splits["train"], collator.tokenizer)
        lines = dry_run_lines(typed, corpus, plan, seen=seen)
        print("\n".join([*lines, "", "# precision", layout.precision]), flush=True)


def dry_run_lines(
    recipe: Recipe, corpus: Corpus, memory_plan: MemoryPlan, *, seen: Seen | None = None
) -> list[str]:
    """The lines that ``print_dry_run`` prints; every section begins with ``# ``, so the recipe stays valid YAML.

    Args:
        recipe: with everything filled in.
        corpus: the posts it names, and the report on reading them.
        memory_plan: of the layout that the run would have.
        seen: of ``seen_by_the_decoder``; needed where a decoder predicts a task.
    """
    lines = ["# recipe", *recipe_to_yaml(recipe).splitlines(), "", "# data", *corpus.report.lines()]
    lines += ["", "# sample posts"]
    for task in corpus.tasks:
        lines += sample_lines(task, corpus.splits["train"], recipe.data.normalize, seen=seen)
    return [*lines, "", "# memory", *memory_plan.lines()]


def seen_by_the_decoder(train: TokenizedSplit, tokenizer: Any) -> Seen:
    """(task that a decoder predicts, labeled post) -> (target, prompt), out of the tokens that the model is given.

    Args:
        train: tokens of the training posts.
        tokenizer: which made them.
    """

    def seen(task: Task, row: int) -> tuple[str, str]:
        value = train.posts.labels[task.name][row]
        target = (
            label_tokens(tokenizer, task)[value]
            if task.label_words
            else train.targets[task.name][row].tolist()
        )
        return tokenizer.decode(target), tokenizer.decode(train.prompts[task.name][row].tolist())

    return seen


def sample_lines(
    task: Task, split: PostSplit, config: NormalizeConfig, *, seen: Seen | None = None
) -> list[str]:
    """The first labeled posts of a task, as the encoder will see them, each after its label.

    Where a decoder predicts, its own words, end token included, and the prompt with the post in it.

    Args:
        task: whose labels are shown.
        split: usually the training posts.
        config: the cleaning.
        seen: of ``seen_by_the_decoder``; needed where a decoder predicts.
    """
    lines = [
        f"{task.name} ({task.kind}, metric {task.metric}{', auxiliary' if task.auxiliary else ''}):"
    ]
    if task.label_words:
        words = zip(task.labels, task.label_words, strict=True)
        lines.append(
            "  words of the labels: " + ", ".join(f"{label} = {word!r}" for label, word in words)
        )
    if task.mode == "decoder":
        lines.append("  target | what the encoder reads")
    count = len(lines)
    labelled = [row for row, value in enumerate(split.labels[task.name]) if value is not None]
    for row in labelled[:SAMPLES]:
        if task.mode == "decoder":
            assert seen is not None
            lines.append("  " + " | ".join(map(_cut, seen(task, row))))
            continue
        text, pair, words = split.texts[row], split.pairs[row], split.words[row]
        texts = [normalize_post(text, config)]
        if words is not None:
            texts = [" ".join(normalize_words(words, config))]
        if pair is not None:
            texts.append(normalize_post(pair, config))
        lines.append(f"  {_label_text(task, split, row)} | {' || '.join(map(_cut, texts))}")
    return lines if len(lines) > count else [*lines, "  no post has a label of this task"]


def _label_text(task: Task, split: PostSplit, row: int) -> str:
    """The label as prediction would write it: through the target tensor and back, which is what training sees."""
    if not task.rules.predicts:
        return "no label"
    value, words = split.labels[task.name][row], split.words[row]
    targets = task.rules.collate(
        [value], labels=task.labels, length=0 if words is None else len(words)
    )
    (gold,) = task.rules.gold(targets, task)
    if isinstance(gold, float):
        return f"{gold:.4g}"
    return gold if isinstance(gold, str) else ", ".join(map(str, gold)) or "none of the labels"


def _cut(text: str) -> str:
    return text if len(text) <= SHOWN_CHARACTERS else f"{text[: SHOWN_CHARACTERS - 3]}..."
