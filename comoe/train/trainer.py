"""The loop: batches in, steps, logs, evaluations, checkpoints, an orderly end."""

from __future__ import annotations

import sys
import time
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field, replace
from pathlib import Path

import numpy as np
import torch
from tqdm import tqdm

from comoe.config.recipe import Recipe
from comoe.data.collator import Collator
from comoe.data.images.pixels import PixelReader
from comoe.data.sampling.mixing import loss_gains, progress_rates
from comoe.data.sampling.sampler import TrainSampler
from comoe.data.tokens.split import TokenizedSplit
from comoe.distributed import (
    all_gather_objects,
    broadcast_object,
    is_main,
    rank,
    sum_over_ranks,
    world_size,
)
from comoe.evaluation.evaluate import Evaluation, chosen_metric
from comoe.losses.objective import count_units, unit_scale
from comoe.tasks.task import Task
from comoe.train.checkpoint.folder import mark_best
from comoe.train.checkpoint.save_load import save_checkpoint
from comoe.train.evaluator import EvaluationStopped, Evaluator
from comoe.train.fault.signals import StopSignal
from comoe.train.fault.watchdog import Watchdog
from comoe.train.monitor.log_window import Interval, count_posts, log_lost_pictures
from comoe.train.monitor.monitor import Monitor
from comoe.train.parallel.ds_config import Layout
from comoe.train.parallel.engine import Engine, StepReport
from comoe.train.state import ALL_STEPS, TrainState, rate_factor
from comoe.types import Batch


def follow_progress(
    sampler: TrainSampler,
    state: TrainState,
    evaluation: Evaluation,
    *,
    tasks: Sequence[Task],
    split: TokenizedSplit,
    every: int,
) -> Mapping[str, float]:
    """Change the rates by what the training since the last evaluation brought; nothing where they do not follow it.

    The change is noted in ``state``, which a resume hands back to the sampler, and holds from the
    next step on. Every rank must call it.

    Args:
        sampler: gets the new rates.
        state: ``mixing`` and ``validation_losses`` are read and filled.
        evaluation: of the validation split, the same on every rank.
        tasks: all tasks.
        split: the training posts.
        every: steps between evaluations.

    Returns:
        ``draws/<data set>`` -> its share of the draws from now on.
    """
    if not sampler.follows_progress:
        return {}
    now = {name: values["loss"] for name, values in evaluation.metrics.items()}
    names = np.unique(split.groups)
    has_GT = np.stack([split.labelled[split.groups == group].any(axis=0) for group in names])
    gains_G = loss_gains(state.validation_losses, now, tasks=tasks, has_GT=has_GT)
    # Rank 0 decides: a loss that another machine rounds differently must not make it draw other
    # posts.
    rates_G = np.array(broadcast_object(progress_rates(sampler.rates_G, gains_G).tolist()))
    state.validation_losses = now
    state.mixing.append(sampler.change(state.step, rates_G))
    sampler.follow(state.mixing, every=every)
    return {
        f"draws/{split.posts.group_names[group]}": float(rate)
        for group, rate in zip(names, rates_G, strict=True)
    }


SHOWN = 8
"""Posts that are named when a step is skipped; all of them are in metrics.jsonl."""


class TrainingStopped(RuntimeError):
    """The run cannot go on; the message says why and what to do."""


@dataclass(frozen=True, slots=True)
class Schedule:
    """Steps of one run, settled before it starts."""

    total: int
    """Optimizer steps."""
    eval_every: int
    """Steps between evaluations."""
    save_every: int
    """Steps between checkpoints."""


def plan_schedule(recipe: Recipe, sampler: TrainSampler) -> Schedule:
    """Turn epochs and ``auto`` into steps."""
    per_epoch = sampler.steps_per_epoch
    total = recipe.train.max_steps or max(1, round(recipe.train.epochs * per_epoch))
    eval_every = recipe.train.eval_every
    eval_every = max(1, per_epoch // 2) if eval_every == "auto" else int(eval_every)
    save_every = recipe.train.save_every
    return Schedule(total, eval_every, eval_every if save_every == "auto" else int(save_every))


@dataclass(slots=True)
class Trainer:
    """Everything one run needs; ``run`` trains until the end, a stop signal, or the patience is used up."""

    recipe: Recipe
    layout: Layout
    engine: Engine
    tasks: Sequence[Task]
    train_split: TokenizedSplit
    collator: Collator
    sampler: TrainSampler
    evaluator: Evaluator
    monitor: Monitor
    folder: Path
    state: TrainState
    schedule: Schedule
    last_validation: Evaluation | None = None
    watch: Watchdog = field(default_factory=Watchdog)
    """Told how far this rank is."""
    pixels: PixelReader | None = None
    """What the collator reads pictures with; asked which ones went bad."""

    def run(self, stop: StopSignal | None = None) -> None:
        """Train from ``state.step`` on. ``state.finished`` tells the end; it stays empty after a stop signal.

        Args:
            stop: one that was made when the process began, so that a launcher lost since then is
                noticed.

        Raises:
            TrainingStopped: too many steps in a row were not finite, or a device ran out of memory.
        """
        # A second signal, as launchers send it, must not end this rank while it writes the last
        # checkpoint.
        self.watch.step = self.state.step
        self.watch.enter("first step")
        self.evaluator.on_batch = self.watch.batch
        with stop or StopSignal() as noted:
            saved_at = self._train_until(noted)
            if saved_at != self.state.step or self.state.finished:
                # Also after a signal: all ranks agreed on it in the last reduction, so all of them
                # are here.
                self._save()
        self.watch.enter("finishing")

    @property
    def checkpoints(self) -> Path:
        """Where checkpoints go."""
        return self.folder / "checkpoints"

    def _train_until(self, stop: StopSignal) -> int:
        """Train to the end or the signal; the step of the last checkpoint that holds the state as it is now."""
        bar = tqdm(
            total=self.schedule.total,
            initial=self.state.step,
            unit="step",
            disable=not is_main(),
            dynamic_ncols=True,
            # A log file wants a line now and then, a terminal a bar that moves.
            mininterval=0.3 if sys.stderr.isatty() else 20,
        )
        interval = Interval(self.tasks)
        saved_at = -1
        if self.sampler.follows_progress:
            self.sampler.follow(self.state.mixing, every=self.schedule.eval_every)
        with ThreadPoolExecutor(1) as pool, bar:
            due = self.state.step > 0 and self._due(self.schedule.eval_every)
            owed = due and self.state.evaluated_at != self.state.step
            if owed and self._evaluate_and_mark(bar, stop):
                saved_at = self._save()
                mark_best(self.checkpoints, self.state.step)
            upcoming = pool.submit(self._collate, self.state.step)
            while self.state.step < self.schedule.total and not self.state.finished:
                began = time.perf_counter()
                batches, stopping = self._with_totals(upcoming.result(), stop)
                if stopping:
                    self._say(
                        bar,
                        f"stopping at step {self.state.step} ({stop.reason or 'asked by another rank'})",
                    )
                    break
                # The next batch is made beside this step, unless an evaluation is to say what it is
                # drawn from.
                waits = self.sampler.follows_progress and self._due(
                    self.schedule.eval_every, steps=self.state.step + 1
                )
                if not waits:
                    upcoming = pool.submit(self._collate, self.state.step + 1)
                self._step(batches, interval, bar, began=began)
                paused = time.perf_counter()
                if self._due(self.schedule.eval_every) and self._evaluate_and_mark(bar, stop):
                    saved_at = self._save()
                    mark_best(self.checkpoints, self.state.step)
                if waits:
                    upcoming = pool.submit(self._collate, self.state.step)
                if saved_at != self.state.step and self._due(self.schedule.save_every):
                    saved_at = self._save()
                # Posts per second are of training alone.
                interval.began += time.perf_counter() - paused
            upcoming.cancel()
            if self.state.step >= self.schedule.total and not self.state.finished:
                self.state.finished = ALL_STEPS
        return saved_at

    def _collate(self, step: int) -> list[Batch]:
        return [
            self.collator(self.train_split, indices) for indices in self.sampler.share(step, rank())
        ]

    def _with_totals(self, batches: list[Batch], stop: StopSignal) -> tuple[list[Batch], bool]:
        """The step's batches with the scale of each task's loss: one packed all-reduce carries the stop flag too."""
        units_T = torch.stack([count_units(batch, self.tasks) for batch in batches]).sum(0)
        more = torch.tensor(
            [sum(count_posts(batch) for batch in batches), float(stop.asked())], dtype=torch.float64
        )
        total = sum_over_ranks(torch.cat([units_T, more]).to(self.engine.device)).cpu()
        stopping = bool(total[-1] > 0)
        if not stopping:
            self.state.posts_seen += int(total[-2])
        scale_T = unit_scale(total[:-2], world_size=world_size(), accumulation=len(batches))
        now = {
            "unit_scale_T": scale_T,
            "step": self.state.step,
            "progress": self.state.step / self.schedule.total,
        }
        return [replace(batch, **now) for batch in batches], stopping

    def _step(self, batches: list[Batch], interval: Interval, bar: tqdm, *, began: float) -> None:
        rates = self.engine.set_rate_factor(
            rate_factor(self.state.step, total=self.schedule.total, config=self.recipe.train)
        )
        try:
            report = self.engine.train_step(batches)
        except RuntimeError as error:
            if not _is_short_of_memory(error):
                raise
            raise TrainingStopped(self._memory_advice()) from error
        self.state.step += 1
        # Waiting for posts and for slower ranks is training too.
        self.state.seconds += time.perf_counter() - began
        # Numbers of the log stay on the device until a line is due.
        interval.add(batches, report)
        self.watch.reached(self.state.step)
        self._watch_nonfinite(report, batches, bar)
        if (
            self.state.step % self.recipe.train.log_every == 0
            or self.state.step == self.schedule.total
        ):
            line = interval.reduce(engine=self.engine, report=report, batches=batches, rates=rates)
            self.monitor.log_train(
                self.state.step,
                loss=line.loss,
                terms=line.terms,
                metrics=line.metrics,
                rates=line.rates,
                task_weights=line.task_weights,
                grad_norm=line.grad_norm,
                posts_per_second=line.posts_per_second,
                tokens_per_second=line.tokens_per_second,
                seconds=self.state.seconds,
                skipped=line.skipped,
            )
            bar.set_postfix_str(
                f"loss {line.loss:.4f}, {line.posts_per_second:.0f} posts/s", refresh=False
            )
            interval.reset()
            log_lost_pictures(self.pixels, self.monitor, self.state.step)
        bar.update()

    def _watch_nonfinite(self, report: StepReport, batches: list[Batch], bar: tqdm) -> None:
        if not report.skipped:
            self.state.nonfinite_in_a_row = 0
            return
        self.state.nonfinite_in_a_row += 1
        self.state.nonfinite_total += 1
        rows, posts = self._posts_to_blame(report, batches)
        self.monitor.log_event({"event": "skipped", "step": self.state.step, "posts": rows})
        self._say(
            bar, f"step {self.state.step} skipped: a loss or gradient is not finite ({posts})"
        )
        if self.state.nonfinite_in_a_row >= self.recipe.train.max_nonfinite:
            raise TrainingStopped(
                f"{self.state.nonfinite_in_a_row} steps in a row (up to step {self.state.step}) had a loss or gradient "
                f"that is not finite; the last posts: {posts}. Lower train.learning_rate, or look at these posts. The "
                f"newest checkpoint is good: go on with --resume {self.folder}."
            )

    def _posts_to_blame(self, report: StepReport, batches: list[Batch]) -> tuple[list[int], str]:
        """Rows of the forward passes whose loss is not finite, on whatever rank, and the same in words.

        Where every loss is finite and a gradient is not, nobody knows whose: these are all rows of
        the step then. Every rank must call it; a step is skipped on all of them.
        """
        rows = [[int(row) for row in batch.row_ids_B.tolist() if row >= 0] for batch in batches]
        finite = [bool(torch.isfinite(output.loss.detach())) for output in report.outputs]
        everyone = [
            step
            for steps in all_gather_objects(list(zip(finite, rows, strict=True)))
            for step in steps
        ]
        bad = [rows for finite, rows in everyone if not finite] or [rows for _, rows in everyone]
        found = sorted({row for rows in bad for row in rows})
        named = ", ".join(self.train_split.origins[row] for row in found[:SHOWN])
        return found, f"{named}{f' and {len(found) - SHOWN} more' if len(found) > SHOWN else ''}"

    def _memory_advice(self) -> str:
        smaller = max(1, self.layout.micro_batch_size // 2)
        return (
            f"out of memory with {self.layout.micro_batch_size} posts per forward pass on rank {rank()}: set "
            f"train.micro_batch_size={smaller} (the batch of {self.recipe.train.batch_size} stays the same), or a "
            f"smaller data.max_length."
        )

    def _due(self, every: int, *, steps: int | None = None) -> bool:
        steps = self.state.step if steps is None else steps
        return steps % every == 0 or steps == self.schedule.total

    def _evaluate_and_mark(self, bar: tqdm, stop: StopSignal) -> bool:
        """Evaluate; True when this is the best step so far."""
        try:
            with self.watch.paused("evaluation"):
                found = self.evaluator.run("validation", asked_to_stop=stop.asked)
        except EvaluationStopped:
            # The next look at the signal ends the run; the resume begins with this evaluation.
            return False
        self.state.evaluated_at = self.state.step
        if found is None:
            return False
        evaluation = self.last_validation = found.evaluation
        value = chosen_metric(evaluation.metrics, self.tasks, self.recipe.train.early_stop_metric)
        improved = self.state.record(value, patience=self.recipe.train.patience)
        draws = follow_progress(
            self.sampler, self.state, evaluation,
            tasks=self.tasks, split=self.train_split, every=self.schedule.eval_every,
        )  # fmt: skip
        with self.watch.paused("drawing"):
            self.monitor.log_evaluation(
                self.state.step,
                split="validation",
                evaluation=evaluation,
                routing=found.routing,
                embeddings=found.embeddings,
                mean=value,
                **draws,
            )
        self._say(
            bar, f"step {self.state.step}: validation {value:.4f}{' (best)' if improved else ''}"
        )
        return improved

    def _save(self) -> int:
        with self.watch.paused("saving"):
            keep = self.recipe.train.keep_checkpoints
            save_checkpoint(self.checkpoints, self.engine, self.state, self.layout, keep=keep)
        return self.state.step

    def _say(self, bar: tqdm, text: str) -> None:
        if is_main():
            bar.write(text)


def _is_short_of_memory(error: RuntimeError) -> bool:
    # On a CPU torch raises a plain RuntimeError.
    return isinstance(error, torch.OutOfMemoryError) or "can't allocate memory" in str(error)
