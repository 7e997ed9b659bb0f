"""Evaluation inside a run: every rank runs the same number of forwards, all get the same numbers."""

from __future__ import annotations

import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from itertools import count

from tqdm import tqdm

from comoe.data.collator import Collator
from comoe.data.sampling.sampler import eval_batches
from comoe.data.tokens.split import TokenizedSplit
from comoe.distributed import (
    all_gather_objects,
    is_main,
    max_over_ranks,
    rank,
    sum_over_ranks,
    world_size,
)
from comoe.evaluation.embedding_stats import EmbeddingStats, EmbeddingSummary
from comoe.evaluation.evaluate import Evaluation, evaluate
from comoe.evaluation.routing_stats import RoutingStats, RoutingSummary
from comoe.tasks.task import Task
from comoe.train.parallel.engine import Engine
from comoe.types import Batch, ModelOutput, labelled_rows

EVAL_BATCH = 64


STOP_CHECK_EVERY = 8
"""Batches between two looks at the stop signal: each is a reduction over ranks."""


class EvaluationStopped(Exception):
    """An evaluation that a signal cut short."""


@dataclass(frozen=True, slots=True)
class Checked:
    """What one look at a split found; the same on every rank."""

    evaluation: Evaluation
    """Metrics and predictions."""
    routing: RoutingSummary | None
    """The gates' measures; None without experts."""
    embeddings: EmbeddingSummary
    """The embeddings' measures."""


@dataclass(slots=True)
class Evaluator:
    """Runs the engine over a split."""

    engine: Engine
    splits: Mapping[str, TokenizedSplit]
    collator: Collator
    tasks: Sequence[Task]
    on_batch: Callable[[bool], None] = lambda more: None
    """Told after each batch whether there are more."""

    def run(
        self,
        name: str,
        *,
        predictions: bool = False,
        asked_to_stop: Callable[[], bool] | None = None,
    ) -> Checked | None:
        """Metrics, predictions and measures of one split; None where it has no posts.

        Raises:
            EvaluationStopped: ``asked_to_stop`` said so on some rank; raised on all of them after
                the same batch.
        """
        split = self.splits.get(name)
        if split is None or len(split) == 0:
            return None
        batches = eval_batches(
            split.lengths, batch_size=EVAL_BATCH, rank=rank(), world_size=world_size()
        )
        model = self.engine.objective.model
        layers = [layer.layer for layer in model.moe_layers()]
        names = [task.name for task in self.tasks]
        stats = RoutingStats(
            names, num_layers=len(layers), num_experts=model.config.num_local_experts, layers=layers,
            first_decoder_layer=model.first_decoder_layer, device=self.engine.device,
        )  # fmt: skip
        embeddings = EmbeddingStats(self.tasks, labelled_NT=split.labelled)
        turn = count()
        with tqdm(
            total=len(batches),
            desc=name,
            unit="batch",
            leave=False,
            disable=not (is_main() and sys.stderr.isatty()),
        ) as bar:

            def forward(batch: Batch) -> ModelOutput:
                output = self.engine.forward(batch)
                done = next(turn) + 1
                self.on_batch(done < len(batches))
                # A launcher waits half a minute for a rank that it told to stop, and an evaluation
                # may take longer.
                if (
                    asked_to_stop is not None
                    and done % STOP_CHECK_EVERY == 1
                    and max_over_ranks(asked_to_stop())
                ):
                    raise EvaluationStopped
                # A filler row exists only so that this rank has something to run; it has no label
                # and is not counted.
                stats.update(output, labelled_rows(batch, names))
                embeddings.update(output, batch)
                bar.update()
                return output

            evaluation = evaluate(
                forward,
                split,
                # A post without labels is a row for every task where the gate reads tasks, so that
                # all are answered.
                collator=partial(self.collator, all_tasks=predictions),
                tasks=self.tasks,
                batches=batches,
                gather=all_gather_objects,
                device=self.engine.device,
                texts=split.texts,
                columns=split.posts.columns,
                predictions=predictions,
                detokenize=self.collator.detokenize,
            )
        stats.load(sum_over_ranks(stats.as_tensor()))
        return Checked(
            evaluation, stats.summary() if layers else None, embeddings.summary(all_gather_objects)
        )
