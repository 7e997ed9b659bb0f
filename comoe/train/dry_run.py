"""What a run would do, printed instead of done: recipe, labels, sample posts after cleaning, memory."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

from comoe.config.load import recipe_to_yaml
from comoe.config.recipe import NormalizeConfig, Recipe
from comoe.data.corpus import Corpus
from comoe.data.posts import PostSplit
from comoe.data.text.normalize import normalize_post, normalize_words
from comoe.data.tokens.prompts import label_tokens
from comoe.data.tokens.split import TokenizedSplit
from comoe.tasks.task import Task
from comoe.train.memory_plan import MemoryPlan

Seen = Callable[[Task, int], tuple[str, str]]


SAMPLES = 3
"""Posts shown per task."""


SHOWN_CHARACTERS = 160
"""Characters of a post that are shown."""


def print_dry_run(
    recipe: Recipe, corpus: Corpus, memory_plan: MemoryPlan, *, seen: Seen | None = None
) -> None:
    """Print the resolved recipe, labels and set-aside rows per split, sample posts, and the memory of one rank.

    Args:
        recipe: with everything filled in.
        corpus: the posts it names, and the report on reading them.
        memory_plan: of the layout that the run would have.
        seen: of ``seen_by_the_decoder``; needed where a decoder answers a task.
    """
    print("\n".join(dry_run_lines(recipe, corpus, memory_plan, seen=seen)), flush=True)


def dry_run_lines(
    recipe: Recipe, corpus: Corpus, memory_plan: MemoryPlan, *, seen: Seen | None = None
) -> list[str]:
    """The lines that ``print_dry_run`` prints; every section begins with ``# ``, so the recipe stays valid YAML."""
    lines = ["# recipe", *recipe_to_yaml(recipe).splitlines(), "", "# data", *corpus.report.lines()]
    lines += ["", "# sample posts"]
    for task in corpus.tasks:
        lines += sample_lines(task, corpus.splits["train"], recipe.data.normalize, seen=seen)
    return [*lines, "", "# memory", *memory_plan.lines()]


def seen_by_the_decoder(train: TokenizedSplit, tokenizer: Any) -> Seen:
    """(task that a decoder answers, labelled post) -> (answer, prompt), out of the tokens that the model is given.

    Args:
        train: tokens of the training posts.
        tokenizer: which made them.
    """

    def seen(task: Task, row: int) -> tuple[str, str]:
        value = train.posts.labels[task.name][row]
        answer = (
            label_tokens(tokenizer, task)[value]
            if task.label_words
            else train.answers[task.name][row].tolist()
        )
        return tokenizer.decode(answer), tokenizer.decode(train.prompts[task.name][row].tolist())

    return seen


def sample_lines(
    task: Task, split: PostSplit, config: NormalizeConfig, *, seen: Seen | None = None
) -> list[str]:
    """The first labelled posts of a task, cleaned as the encoder will see them, each after its label.

    Where a decoder answers, its own words, end sign included, and the prompt with the post in it.

    Args:
        task: whose labels are shown.
        split: usually the training posts.
        config: the cleaning.
        seen: of ``seen_by_the_decoder``; needed where a decoder answers.
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
        lines.append("  answer | what the encoder reads")
    count = len(lines)
    for row in _first_labelled(task, split):
        if task.mode == "decoder":
            assert seen is not None
            lines.append("  " + " | ".join(map(_cut, seen(task, row))))
            continue
        pair = split.pairs[row]
        texts = [
            _cleaned(split, row, config),
            *([normalize_post(pair, config)] if pair is not None else []),
        ]
        lines.append(f"  {_label_in_words(task, split, row)} | {' || '.join(map(_cut, texts))}")
    return lines if len(lines) > count else [*lines, "  no post has a label of this task"]


def _first_labelled(task: Task, split: PostSplit) -> Iterator[int]:
    labelled = (row for row, value in enumerate(split.labels[task.name]) if value is not None)
    return (row for row, _ in zip(labelled, range(SAMPLES), strict=False))


def _cleaned(split: PostSplit, row: int, config: NormalizeConfig) -> str:
    words = split.words[row]
    return (
        normalize_post(split.texts[row], config)
        if words is None
        else " ".join(normalize_words(words, config))
    )


def _label_in_words(task: Task, split: PostSplit, row: int) -> str:
    """The label as prediction would write it: through the target tensor and back, which is what training sees."""
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
