"""Evaluation inside a run: all ranks run as many forwards, and all get the same numbers."""

from __future__ import annotations

import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import partial
from typing import Any

import numpy as np
import torch
from tqdm import tqdm

from comoe.data.sampling.sampler import eval_batches
from comoe.data.text.noise import SEPARATOR, noisy
from comoe.data.tokens.split import TokenizedSplit, tokenize_split
from comoe.distributed import (
    all_gather_objects,
    is_main,
    max_over_ranks,
    rank,
    sum_over_ranks,
    world_size,
)
from comoe.evaluation.embedding_stats import EmbeddingStats
from comoe.evaluation.evaluate import TEACHER_KL, Evaluation, evaluate
from comoe.evaluation.experts_off import CONDITIONS, IN_TURN, change
from comoe.evaluation.routing_stats import RoutingStats
from comoe.tasks.task import Task
from comoe.train.training_run import TrainingRun
from comoe.types import Batch, ModelOutput, labelled_rows

EVAL_BATCH = 64

MEASURED_POSTS = 1000
"""Validation posts of each data set that ``measure_experts`` scores."""

STOP_CHECK_EVERY = 8
"""Batches between two checks of the stop signal: each is a reduction over ranks."""


class EvaluationStopped(Exception):
    """A signal interrupted the evaluation."""


def evaluate_split(
    run: TrainingRun,
    name: str,
    *,
    split: TokenizedSplit | None = None,
    tasks: Sequence[Task] | None = None,
    predictions: bool = False,
    asked_to_stop: Callable[[], bool] | None = None,
) -> Evaluation | None:
    """Metrics, predictions and measures of one split, the same on every rank; None where it has no posts.

    Args:
        run: every rank must call it.
        name: of the split.
        split: posts that are none of the run's own splits.
        tasks: the run's, with temperatures and thresholds of their own.
        predictions: make them, for every post and task.
        asked_to_stop: asked every few batches.

    Raises:
        EvaluationStopped: ``asked_to_stop`` returned true on some rank; raised on all of them after the
            same batch.
    """
    split = run.splits.get(name) if split is None else split
    tasks = run.tasks if tasks is None else tasks
    if split is None or len(split) == 0:
        return None
    batches = eval_batches(
        split.lengths, batch_size=EVAL_BATCH, rank=rank(), world_size=world_size()
    )
    bar = tqdm(
        total=len(batches),
        desc=name,
        unit="batch",
        leave=False,
        disable=not (is_main() and sys.stderr.isatty()),
    )
    observed = _Observed(run, tasks, split, bar, asked_to_stop)
    with bar, run.engine.averaged():
        evaluation = evaluate(
            observed.forward,
            split,
            # A post without labels is a row for every task where the gate reads tasks, so that all
            # are predicted.
            collator=partial(run.collator, all_tasks=predictions),
            tasks=tasks,
            batches=batches,
            gather=all_gather_objects,
            texts=split.texts,
            columns=split.posts.columns,
            predictions=predictions,
            detokenize=run.collator.detokenize,
        )
    return replace(evaluation, **observed.measures())


def evaluate_noisy(
    run: TrainingRun, split: str, *, tasks: Sequence[Task], step: int
) -> dict[str, Evaluation]:
    """Evaluations of a split under each of ``data.noise``, logged, by name (``validation+typos``).

    The noise is the same on every rank, and for any number of them. None where the split has no
    labels. Every rank must call it.

    Args:
        run: with the weights to evaluate.
        split: validation or test.
        tasks: as the clean split was evaluated, with temperatures and thresholds where these were
            fitted.
        step: of the weights.
    """
    found: dict[str, Evaluation] = {}
    if split not in run.splits or not run.splits[split].labelled.any():
        return found
    data = run.recipe.data
    # More tokens than the encoder numbers may come of a slip; the run's own posts have been
    # checked.
    config = replace(data, max_length=min(data.max_length, run.model.longest_text))
    for noise in data.noise:
        name = f"{split}{SEPARATOR}{noise}"
        posts = noisy(
            run.splits[split].posts, noise, rate=data.noise_rate, seed=run.recipe.train.seed
        )
        about = {"tasks": run.tasks, "config": config, "lexicon": run.collator.lexicon}
        tokens = tokenize_split(posts, run.collator.tokenizer, **about)
        evaluation = evaluate_split(run, name, split=tokens, tasks=tasks)
        assert evaluation is not None
        # Plots of each noise would hide those of the run.
        found[name] = replace(evaluation, confusions={}, routing=None, embeddings=None)
        run.monitor.log_evaluation(step, split=name, evaluation=found[name])
    return found


def measure_experts(run: TrainingRun, whole: Evaluation) -> dict[str, Any]:
    """What experts and gate are worth on validation posts, by the keys of ``CONDITIONS``; see ``change``.

    With soft labels also ``teacher_kl``: that of the model as trained, and of the changed one, on
    the same posts.

    Args:
        run: every rank must call it.
        whole: the run's evaluation of the validation split, with its outputs.
    """
    split = run.splits["validation"]
    counted = [task.rules.scored and not task.auxiliary for task in run.tasks]
    rows = _sample(split, split.labelled[:, counted].any(axis=1))
    if not len(rows):
        return {}
    chosen = set(rows.tolist())
    before = {
        name: [output for output in outputs if output.row in chosen]
        for name, outputs in whole.outputs.items()
    }
    batches = eval_batches(
        split.lengths[rows], batch_size=EVAL_BATCH, rank=rank(), world_size=world_size()
    )

    def forward(batch: Batch) -> ModelOutput:
        run.watch.batch(False)
        return run.engine.forward(batch.to(run.engine.device))

    found = {}
    for name, condition in CONDITIONS.items():
        if name == IN_TURN and (run.model.config.num_local_experts == 1 or run.model.draws):
            continue
        with condition(run.model), run.engine.averaged():
            after = evaluate(
                forward,
                split,
                collator=run.collator,
                tasks=run.tasks,
                batches=[rows[places] for places in batches],
                gather=all_gather_objects,
                predictions=False,
                detokenize=run.collator.detokenize,
            )
        found[name] = change(before, after.outputs, run.tasks)
        if after.divergences:
            both = {"as_trained": whole.teacher_kl(chosen), "changed": after.teacher_kl()}
            found[name][TEACHER_KL] = both
    return found


def _sample(split: TokenizedSplit, wanted_N: np.ndarray) -> np.ndarray:
    """Some of the wanted posts, at most ``MEASURED_POSTS`` of each data set, evenly spaced."""
    parts = [np.flatnonzero(wanted_N & (split.groups == group)) for group in set(split.groups)]
    kept = [
        part[np.linspace(0, len(part) - 1, min(len(part), MEASURED_POSTS)).astype(np.int64)]
        for part in parts
    ]
    return np.sort(np.concatenate(kept))


class _Observed:
    """Forward passes of a run that are measured on their way, and may be stopped between two of them."""

    def __init__(
        self,
        run: TrainingRun,
        tasks: Sequence[Task],
        split: TokenizedSplit,
        bar: tqdm,
        asked_to_stop: Callable[[], bool] | None,
    ) -> None:
        self._run, self._bar, self._asked_to_stop = run, bar, asked_to_stop
        self._names = [task.name for task in tasks]
        self._layers = [layer.layer for layer in run.model.moe_layers()]
        self._routing = RoutingStats(
            self._names, num_layers=len(self._layers), num_experts=run.model.config.num_local_experts,
            layers=self._layers, first_decoder_layer=run.model.first_decoder_layer, device=run.engine.device,
        )  # fmt: skip
        self._embeddings = EmbeddingStats(tasks, labelled_NT=split.labelled)
        self._done, self._seconds = 0, 0.0

    def forward(self, batch: Batch) -> ModelOutput:
        batch = batch.to(self._run.engine.device)
        began = time.perf_counter()
        output = self._run.engine.forward(batch)
        if torch.cuda.is_available():
            torch.cuda.synchronize()
        # Without the measures below: they take longer with more experts.
        self._seconds += time.perf_counter() - began
        self._done += 1
        self._run.watch.batch(self._done < self._bar.total)
        # A launcher waits half a minute for a rank that it told to stop, and an evaluation may take
        # longer.
        looks = self._asked_to_stop is not None and self._done % STOP_CHECK_EVERY == 1
        if looks and max_over_ranks(self._asked_to_stop()):
            raise EvaluationStopped
        # A filler row exists only so that this rank has something to run; it has no label and is
        # not counted.
        self._routing.update(output, labelled_rows(batch, self._names))
        self._embeddings.update(output, batch)
        self._bar.update()
        return output

    def measures(self) -> dict[str, Any]:
        """Over all ranks, as ``Evaluation`` has them."""
        self._routing.load(sum_over_ranks(self._routing.as_tensor()))
        return {
            "routing": self._routing.summary() if self._layers else None,
            "embeddings": self._embeddings.summary(all_gather_objects),
            "forward_seconds": max_over_ranks(self._seconds),
        }
