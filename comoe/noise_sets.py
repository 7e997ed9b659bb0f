"""How well a run's weights do on noisy posts: evaluation sets made on the fly when the run ends."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import replace

from comoe.assemble import Run
from comoe.data.noise import SEPARATOR, noisy
from comoe.data.tokenized import TokenizedSplit, tokenize_split
from comoe.evaluate import Evaluation
from comoe.tasks.catalog import Task


def noisy_splits(run: Run, split: str) -> Iterator[tuple[str, TokenizedSplit]]:
    """The posts of a split under each of ``data.noise``, by name (``validation+typos``), tokenised as the others.

    The same on every rank, and for any number of them.
    """
    data = run.recipe.data
    # More tokens than the encoder numbers may come of a slip; the run's own posts have been checked.
    config = replace(data, max_length=min(data.max_length, run.trainer.engine.objective.model.longest_text))
    for name in data.noise:
        posts = noisy(run.splits[split].posts, name, rate=data.noise_rate, seed=run.recipe.train.seed)
        yield f"{split}{SEPARATOR}{name}", tokenize_split(posts, run.tokenizer, tasks=run.tasks, config=config)


def score_noisy(run: Run, split: str, *, tasks: Sequence[Task], step: int) -> dict[str, Evaluation]:
    """Evaluations of the split under each noise, logged; every rank must call it. None where it has no labels.

    Args:
        run: with the weights to judge.
        split: validation or test.
        tasks: as the clean split was judged, with temperatures and thresholds where these were fitted.
        step: of the weights.
    """
    found = {}
    if split not in run.splits or not run.splits[split].labelled.any():
        return found
    for name, tokenized in noisy_splits(run, split):
        checked = replace(run.trainer.evaluator, splits={name: tokenized}, tasks=tasks).run(name)
        assert checked is not None
        # Pictures of each noise would bury those of the run.
        found[name] = replace(checked.evaluation, confusions={})
        run.trainer.monitor.log_evaluation(step, split=name, evaluation=found[name])
    return found
