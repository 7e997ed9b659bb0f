"""What is gathered between two lines of ``metrics.jsonl``: one reduction over ranks per line."""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import torch

from comoe.data.images.pixels import PixelReader
from comoe.data.report import shorten
from comoe.distributed import all_gather_objects, sum_over_ranks, world_size
from comoe.losses.adversarial import ON_DOMAINS
from comoe.tasks.kinds.base import PostOutput
from comoe.tasks.task import Task
from comoe.train.monitor.monitor import Monitor
from comoe.train.parallel.engine import Engine, StepReport
from comoe.types import DOMAINS, LEXICON, Batch, soft_scales

SHOWN_IMAGES = 100
"""Lost images that one event names; all are counted."""


def count_posts(batch: Batch) -> int:
    """Posts of a batch: where the gate reads tasks a post is several rows, a filler row none."""
    return int(torch.unique(batch.row_ids_B[batch.row_ids_B >= 0]).numel())


@dataclass(slots=True)
class LogWindow:
    """Collects between two log lines; a host sync happens only in ``reduce``."""

    tasks: Sequence[Task]
    began: float = field(default_factory=lambda: time.perf_counter())
    posts: int = 0
    tokens: int = 0
    skipped: int = 0
    steps: int = 0
    clipped: int = 0

    def reset(self) -> None:
        """Begin the next line."""
        self.began, self.posts, self.tokens = time.perf_counter(), 0, 0
        self.skipped = self.steps = self.clipped = 0

    def add(self, batches: Sequence[Batch], report: StepReport, *, clipped: bool = False) -> None:
        """Count one step; ``clipped`` where its gradient was scaled down."""
        for batch in batches:
            self.posts += count_posts(batch)
            self.tokens += int(batch.attention_mask_BL.sum())
        self.skipped += report.skipped
        self.steps += 1
        self.clipped += clipped

    def reduce(
        self, engine: Engine, report: StepReport, batches: Sequence[Batch]
    ) -> dict[str, Any]:
        """What ``Monitor.log_train`` is given of this window; loss, terms, metrics and weights are of its last step.

        Terms are means over ranks, unweighted. Metrics are of tasks with a head: a decoder is told
        the right text in training. Every rank must call it; all get the same numbers.
        """
        seconds = max(1e-9, time.perf_counter() - self.began)
        terms = {"loss": report.loss, **report.terms}
        counts = [torch.tensor(float(self.posts)), torch.tensor(float(self.tokens))]
        packed = torch.stack(
            [value.double().to(engine.device) for value in (*terms.values(), *counts)]
        )
        total = sum_over_ranks(packed).tolist()
        means = dict(
            zip(terms, (value / world_size() for value in total[: len(terms)]), strict=True)
        )
        posts, tokens = total[len(terms) :]
        scales = batches[0].unit_scale_T.tolist()
        names, soft_T = {}, soft_scales(batches[0].unit_scale_T, len(self.tasks)).tolist()
        for task, gold, soft in zip(self.tasks, scales, soft_T, strict=False):
            names |= {f"task/{task.name}": gold or soft, f"gold/{task.name}": gold}
            names[f"soft/{task.name}"] = soft
        names |= {"lexicon": scales[LEXICON], **dict.fromkeys(ON_DOMAINS, scales[DOMAINS])}
        for name, scale in names.items():
            if not scale:
                # No post of the whole step has this task, or this value: its loss is not 0, there
                # is none.
                means.pop(name, None)
        weights = {task.name: means.pop(f"weight/{task.name}") for task in self.tasks}
        return {
            "loss": means.pop("loss"),
            "terms": means,
            "metrics": self._metrics(report, batches),
            "task_weights": weights,
            "grad_norm": report.grad_norm,
            "posts_per_second": posts / seconds,
            "tokens_per_second": tokens / seconds,
            "skipped": self.skipped,
            "clipped": self.clipped / max(1, self.steps),
        }

    def _metrics(self, report: StepReport, batches: Sequence[Batch]) -> dict[str, dict[str, float]]:
        measured = [task for task in self.tasks if task.rules.scored and task.mode != "decoder"]
        own: dict[str, list[PostOutput]] = {task.name: [] for task in measured}
        for output, batch in zip(report.outputs, batches, strict=True):
            for task in measured:
                rows = task.rules.labelled(batch.labels[task.name]).nonzero()[:, 0].tolist()
                own[task.name] += task.rules.outputs(output.output, batch, rows, task=task)
        shares = all_gather_objects(own)
        metrics = {}
        for task in measured:
            everyone = [output for share in shares for output in share[task.name]]
            gold, scores = task.rules.gold_and_scores(everyone, task)
            if len(gold):
                metrics[task.name] = {
                    task.metric: task.rules.score(gold, scores, task)[task.metric]
                }
        return metrics


def log_lost_images(pixels: PixelReader | None, monitor: Monitor, step: int) -> None:
    """Write which images went bad since the last call, on whatever rank: their posts went on without them.

    Every rank must call it.

    Args:
        pixels: None where the run reads no images.
        monitor: gets one event, ``pictures_lost``, if there is something to tell.
        step: optimizer steps done.
    """
    if pixels is None:
        return
    mine = {
        source if isinstance(source, str) else shorten(source): why
        for source, why in pixels.take_lost().items()
    }
    lost = {image: why for share in all_gather_objects(mine) for image, why in share.items()}
    if lost:
        shown = dict(list(lost.items())[:SHOWN_IMAGES])
        monitor.log_event(
            {"event": "pictures_lost", "step": step, "count": len(lost), "pictures": shown}
        )
