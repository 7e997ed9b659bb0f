"""The training loop: batches, steps, logs, evaluations, checkpoints, a clean end."""

from __future__ import annotations

import contextlib
import math
import sys
import time
from collections.abc import Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field, replace

import numpy as np
import torch
from tqdm import tqdm

from comoe.data.sampling.mixing import loss_gains, progress_rates
from comoe.distributed import (
    all_gather_objects,
    broadcast_object,
    is_main,
    rank,
    sum_over_ranks,
    world_size,
)
from comoe.evaluation.evaluate import (
    CHOSEN,
    MEAN,
    TEACHER_KL,
    Evaluation,
    chosen_metric,
    mean_metric,
)
from comoe.inference.checkpoint_folder import sorted_checkpoints
from comoe.losses.objective import count_units, unit_scale
from comoe.train.checkpoint.folder import mark_best
from comoe.train.checkpoint.save_load import Diverged, save_checkpoint
from comoe.train.evaluator import EvaluationStopped, evaluate_split
from comoe.train.fault.signals import StopSignal
from comoe.train.monitor.log_window import LogWindow, count_posts, log_lost_images
from comoe.train.parallel.engine import StepReport
from comoe.train.state import (
    ALL_STEPS,
    TrainingStopped,
    diverged_losses,
    norm_limit,
    outer_rate,
    rate_factor,
)
from comoe.train.training_run import TrainingRun
from comoe.types import Batch

SHOWN = 8
"""Posts that are printed for a skipped step; all of them are in metrics.jsonl."""


def follow_progress(run: TrainingRun, evaluation: Evaluation) -> Mapping[str, float]:
    """Change the rates by what the training since the last evaluation brought; nothing where they do not follow it.

    The change is noted in the run's state (``mixing``, ``validation_losses``), which a resume hands
    back to the sampler, and holds from the next step on. Every rank must call it.

    Args:
        run: whose sampler gets the new rates.
        evaluation: of the validation split, the same on every rank.

    Returns:
        ``draws/<data set>`` -> its share of the draws from now on.
    """
    sampler, state, split = run.sampler, run.state, run.splits["train"]
    if not sampler.follows_progress:
        return {}
    now = {name: values["loss"] for name, values in evaluation.metrics.items()}
    names = np.unique(split.groups)
    has_GT = np.stack([split.labelled[split.groups == group].any(axis=0) for group in names])
    gains_G = loss_gains(state.validation_losses, now, tasks=run.tasks, has_GT=has_GT)
    # Rank 0 decides: a loss that another machine rounds differently must not make it draw other
    # posts.
    rates_G = np.array(broadcast_object(progress_rates(sampler.rates_G, gains_G).tolist()))
    state.validation_losses = now
    state.mixing.append(sampler.change(state.step, rates_G))
    sampler.follow(state.mixing, every=run.eval_every)
    return {
        f"draws/{split.posts.group_names[group]}": float(rate)
        for group, rate in zip(names, rates_G, strict=True)
    }


@dataclass
class Trainer:
    """Trains a run until its end, a stop signal, or early stopping."""

    run: TrainingRun
    stop: StopSignal = field(default_factory=StopSignal)
    """If created at process start, it also detects a launcher that was lost since then."""

    def __post_init__(self) -> None:
        self._window = LogWindow(self.run.tasks)
        self._bar = tqdm(disable=True)

    def train(self) -> None:
        """Train from ``state.step`` on. ``state.finished`` tells the end; it stays empty after a stop signal.

        Raises:
            TrainingStopped: too many steps in a row were not finite, or a device ran out of memory.
        """
        run, state = self.run, self.run.state
        run.watch.step = state.step
        run.watch.enter("first step")
        # A second signal, as launchers send it, must not end this rank while it writes the last
        # checkpoint.
        with self.stop:
            saved_at = self._train_until_end()
            if saved_at != state.step or state.finished:
                # Also after a signal: all ranks agreed on it in the last reduction, so all of them
                # are here.
                self._save()
        run.watch.enter("finishing")

    def _train_until_end(self) -> int:
        """Train to the end or the signal; the step of the last checkpoint that holds the state as it is now."""
        run, state, sampler = self.run, self.run.state, self.run.sampler
        total, eval_every = run.total_steps, run.eval_every
        self._bar = tqdm(
            total=total,
            initial=state.step,
            unit="step",
            disable=not is_main(),
            dynamic_ncols=True,
            # A log file gets a line now and then, a terminal a progress bar.
            mininterval=0.3 if sys.stderr.isatty() else 20,
        )
        self._window.reset()
        saved_at = -1
        if sampler.follows_progress:
            sampler.follow(state.mixing, every=eval_every)
        with ThreadPoolExecutor(1) as pool, self._bar:
            if self._owes_evaluation() and self._evaluate_and_mark():
                saved_at = self._save_best()
            upcoming = pool.submit(self._collate, state.step)
            while state.step < total and not state.finished:
                began = time.perf_counter()
                batches, stopping = self._with_totals(upcoming.result())
                if stopping:
                    reason = self.stop.reason or "asked by another rank"
                    self._say(f"stopping at step {state.step} ({reason})")
                    break
                # The next batch is made beside this step, unless an evaluation is to say what it is
                # drawn from.
                waits = sampler.follows_progress and self._evaluates(state.step + 1)
                if not waits:
                    upcoming = pool.submit(self._collate, state.step + 1)
                self._step(batches, began=began)
                if state.step >= total:
                    self._refuse_divergence()
                paused = time.perf_counter()
                if self._evaluates(state.step) and self._evaluate_and_mark():
                    saved_at = self._save_best()
                if waits:
                    upcoming = pool.submit(self._collate, state.step)
                if saved_at != state.step and self._due(run.save_every):
                    saved_at = self._save()
                # Posts per second count training only.
                self._window.began += time.perf_counter() - paused
            upcoming.cancel()
            if state.step >= total and self._owes_evaluation():
                # The best step is not known yet: the resume begins with this evaluation.
                self._say(f"stopping in the evaluation of the last step ({self.stop.reason})")
            elif state.step >= total and not state.finished:
                state.finished = ALL_STEPS
        return saved_at

    def _collate(self, step: int) -> list[Batch]:
        run = self.run
        draw = (run.recipe.train.seed, step)
        return [
            run.collator(run.splits["train"], posts, draw=draw)
            for posts in run.sampler.share(step, rank())
        ]

    def _with_totals(self, batches: list[Batch]) -> tuple[list[Batch], bool]:
        """The step's batches with the scale of each task's loss: one packed all-reduce carries the stop flag too."""
        run, state = self.run, self.run.state
        units_T = torch.stack([count_units(batch, run.tasks) for batch in batches]).sum(0)
        posts = float(sum(count_posts(batch) for batch in batches))
        more = torch.tensor([posts, float(self.stop.asked())], dtype=torch.float64)
        total = sum_over_ranks(torch.cat([units_T, more]).to(run.engine.device)).cpu()
        stopping = bool(total[-1] > 0)
        if not stopping:
            state.posts_seen += int(total[-2])
        now = {
            "unit_scale_T": unit_scale(
                total[:-2], world_size=world_size(), accumulation=len(batches)
            ),
            "step": state.step,
            "progress": state.step / run.total_steps,
        }
        return [replace(batch, **now) for batch in batches], stopping

    def _step(self, batches: list[Batch], *, began: float) -> None:
        run, state = self.run, self.run.state
        rates = run.engine.set_rate_factor(
            rate_factor(
                state.step, total=run.total_steps, config=run.recipe.train, first=run.first_steps
            )
        )
        limit = norm_limit(run.recipe.train, state.grad_norms)
        try:
            report = run.engine.train_step(batches, max_grad_norm=limit)
        except RuntimeError as error:
            # On a CPU torch raises a plain RuntimeError.
            out_of_memory = isinstance(error, torch.OutOfMemoryError)
            if not out_of_memory and "can't allocate memory" not in str(error):
                raise
            posts = run.layout.micro_batch_size
            raise TrainingStopped(
                f"out of memory with {posts} posts per forward pass on rank {rank()}: set "
                f"train.micro_batch_size={max(1, posts // 2)} (the batch of "
                f"{run.recipe.train.batch_size} stays the same), or a smaller data.max_length."
            ) from error
        state.step += 1
        # Also after a skipped step: the loop ends where it is.
        if outer := outer_rate(state.step, total=run.total_steps, config=run.recipe.train):
            run.engine.outer.move(outer)
        # Waiting for posts and for slower ranks counts as training.
        state.seconds += time.perf_counter() - began
        # Numbers of the log stay on the device until a line is due.
        clipped = not report.skipped and state.record_norm(report.grad_norm, limit=limit)
        self._window.add(batches, report, clipped=clipped)
        run.watch.reached(state.step)
        self._watch_nonfinite(report, batches)
        if self._due(run.recipe.train.log_every):
            line = self._window.reduce(run.engine, report, batches)
            run.monitor.log_train(state.step, **line, rates=rates, seconds=state.seconds)
            self._bar.set_postfix_str(
                f"loss {line['loss']:.4f}, {line['posts_per_second']:.0f} posts/s", refresh=False
            )
            self._window.reset()
            log_lost_images(run.collator.pixels, run.monitor, state.step)
        self._bar.update()
        if state.step == run.first_steps:
            # Norms of the contrastive gradient say nothing of what is an outlier from here on.
            state.grad_norms = []
            run.monitor.log_event({"event": "tasks_begin", "step": state.step})
            self._say(f"step {state.step}: the contrastive stage is over, the tasks are learned")

    def _watch_nonfinite(self, report: StepReport, batches: list[Batch]) -> None:
        run, state = self.run, self.run.state
        if not report.skipped:
            state.nonfinite_in_a_row = 0
            return
        state.nonfinite_in_a_row += 1
        state.nonfinite_total += 1
        rows, posts = self._posts_to_blame(report, batches)
        run.monitor.log_event({"event": "skipped", "step": state.step, "posts": rows})
        self._say(f"step {state.step} skipped: a loss or gradient is not finite ({posts})")
        if state.nonfinite_in_a_row >= run.recipe.train.max_nonfinite:
            raise TrainingStopped(
                f"{state.nonfinite_in_a_row} steps in a row (up to step {state.step}) had a loss or gradient that is "
                f"not finite; the last posts: {posts}. Lower train.learning_rate, or look at these "
                f"posts. {self._way_back()}"
            )

    def _refuse_divergence(self) -> None:
        """A run that learned nothing, or whose last steps were not finite, has no results."""
        state, row = self.run.state, self.run.state.nonfinite_in_a_row
        if row > 1 or state.nonfinite_total >= state.step:
            raise TrainingStopped(
                f"the last {row} of {state.step} steps had a loss or gradient that is not finite. "
                f"Lower train.learning_rate. {self._way_back()}"
            )

    def _way_back(self) -> str:
        whole, _ = sorted_checkpoints(self.run.checkpoints)
        if not whole:
            return "No checkpoint was saved: begin again."
        return (
            f"{whole[-1].name} is the newest whole checkpoint, of finite weights: go on with "
            f"--resume {self.run.folder}, or begin again if its losses have grown too."
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
        named = ", ".join(self.run.splits["train"].origins[row] for row in found[:SHOWN])
        return found, f"{named}{f' and {len(found) - SHOWN} more' if len(found) > SHOWN else ''}"

    def _due(self, every: int, *, steps: int | None = None) -> bool:
        steps = self.run.state.step if steps is None else steps
        return steps % every == 0 or steps == self.run.total_steps

    def _evaluates(self, steps: int) -> bool:
        """Whether an evaluation follows so many steps: not before the heads have begun to learn."""
        return steps > self.run.first_steps and self._due(self.run.eval_every, steps=steps)

    def _owes_evaluation(self) -> bool:
        """Whether a signal cut the evaluation of this step short."""
        state = self.run.state
        return self._evaluates(state.step) and state.evaluated_at != state.step

    def _evaluate_and_mark(self) -> bool:
        """Evaluate; True when this is the best step so far."""
        run, state = self.run, self.run.state
        try:
            with run.watch.paused("evaluation"):
                evaluation = self._evaluate()
        except EvaluationStopped:
            # The next look at the signal ends the run; the resume begins with this evaluation.
            return False
        state.evaluated_at = state.step
        if evaluation is None:
            return False
        options = run.recipe.train
        value = chosen_metric(evaluation.metrics, run.tasks, options.early_stop_metric)
        shown = {CHOSEN: value}
        with contextlib.suppress(ValueError):  # teachers need no label
            shown[MEAN] = mean_metric(evaluation.metrics, run.tasks)
        if not all(math.isfinite(found.get("loss", 0.0)) for found in evaluation.metrics.values()):
            # Some metrics give NaN a rank like any number.
            value, shown = math.nan, dict.fromkeys(shown, math.nan)
        improved = state.record(value, patience=options.patience)
        draws = follow_progress(run, evaluation)
        kl = evaluation.teacher_kl().get(MEAN)
        teacher_kl = {} if kl is None else {TEACHER_KL: kl}
        with run.watch.paused("drawing"):
            run.monitor.log_evaluation(
                state.step,
                split="validation",
                evaluation=evaluation,
                **shown,
                **teacher_kl,
                **draws,
            )
        if problem := diverged_losses(evaluation.metrics, run.tasks):
            raise TrainingStopped(
                f"training has diverged by step {state.step}: losses on validation posts are "
                f"{problem}. Lower the learning rates. {self._way_back()}"
            )
        remark = f"{' (best)' if improved else ''}{'' if kl is None else f', teacher_kl {kl:.4f}'}"
        self._say(f"step {state.step}: validation {value:.4f}{remark}")
        return improved

    def _evaluate(self) -> Evaluation | None:
        return evaluate_split(self.run, "validation", asked_to_stop=self.stop.asked)

    def _save(self) -> int:
        run = self.run
        with run.watch.paused("saving"):
            keep = run.recipe.train.keep_checkpoints
            try:
                save_checkpoint(run.checkpoints, run.engine, run.state, run.layout, keep=keep)
            except Diverged as error:
                raise TrainingStopped(
                    f"training has diverged by step {run.state.step}: {error}, are not finite or "
                    f"beyond all measure. Lower the learning rates. {self._way_back()}"
                ) from error
        return run.state.step

    def _save_best(self) -> int:
        saved_at = self._save()
        mark_best(self.run.checkpoints, saved_at)
        return saved_at

    def _say(self, text: str) -> None:
        if is_main():
            self._bar.write(text)
