"""Training steps of a run, one at a time, and their optimizer's share: what the benchmarks of training time."""

from __future__ import annotations

import contextlib
import os
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import replace
from typing import Any

import torch
from deepspeed.runtime.engine import DeepSpeedEngine

from comoe.distributed import rank, sum_over_ranks, world_size
from comoe.losses.objective import count_units, unit_scale
from comoe.train.monitor.log_window import LogWindow
from comoe.train.training_run import TrainingRun

WARMUP = 4
"""Untimed steps of each contestant."""


class Steps:
    """comoe's training step, batch after batch: sampler, collator, totals over ranks, engine, and the log's numbers.

    ``counts`` holds (real, padded) tokens of each step on this rank.

    The run collates the next batch in another thread meanwhile; here it is collated within the
    step, as the Trainer's is by default.
    """

    def __init__(self, run: TrainingRun) -> None:
        self.run = run
        self.number = 0
        self.counts: list[tuple[int, int]] = []
        self.window = LogWindow(run.tasks)

    def step(self) -> None:
        """One optimizer step."""
        run = self.run
        batches = [
            run.collator(run.splits["train"], share)
            for share in run.sampler.share(self.number, rank())
        ]
        units_T = sum_over_ranks(
            torch.stack([count_units(batch, run.tasks) for batch in batches]).sum(0)
        )
        scale_T = unit_scale(units_T, world_size=world_size(), accumulation=len(batches))
        batches = [replace(batch, unit_scale_T=scale_T) for batch in batches]
        run.engine.set_rate_factor(1.0)
        report = run.engine.train_step(batches)
        self.window.add(batches, report)
        self.number += 1
        if self.number % run.recipe.train.log_every == 0:
            self.window.reduce(run.engine, report, batches)
            self.window.reset()
        real = sum(int(batch.attention_mask_BL.sum()) for batch in batches)
        self.counts.append((real, sum(batch.attention_mask_BL.numel() for batch in batches)))


@contextmanager
def clocked_optimizers() -> Iterator[Mapping[int, list[float]]]:
    """While open, every ``DeepSpeedEngine.step`` adds its seconds to its engine's list; keys are ``id(engine)``."""
    seconds: dict[int, list[float]] = {}
    original = DeepSpeedEngine.step

    def step(engine: DeepSpeedEngine, *arguments: Any, **named: Any) -> Any:
        start = time.perf_counter()
        output = original(engine, *arguments, **named)
        seconds.setdefault(id(engine), []).append(time.perf_counter() - start)
        return output

    DeepSpeedEngine.step = step
    try:
        yield seconds
    finally:
        DeepSpeedEngine.step = original


@contextmanager
def silence() -> Iterator[None]:
    """Discard the output of the libraries; errors still raise."""
    with open(os.devnull, "w", encoding="utf-8") as null:
        with contextlib.redirect_stdout(null), contextlib.redirect_stderr(null):
            yield
