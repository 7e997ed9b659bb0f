"""One training run with all its parts: what the trainer, an evaluation and the end of a run are given."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from comoe.config.recipe import Recipe
from comoe.data.collator import Collator
from comoe.data.report import DataReport
from comoe.data.sampling.sampler import TrainSampler
from comoe.data.tokens.split import TokenizedSplit
from comoe.models.model import MultiTaskModel
from comoe.tasks.task import Task
from comoe.train.fault.watchdog import Watchdog
from comoe.train.monitor.monitor import Monitor
from comoe.train.parallel.ds_config import Layout
from comoe.train.parallel.engine import Engine
from comoe.train.state import TrainState, total_steps, whole_loops


@dataclass(slots=True)
class TrainingRun:
    """A run that is ready to train; ``comoe.train.build.build_run`` makes it."""

    recipe: Recipe
    """As the user wrote it: ready-made encoders and posts under their names."""
    folder: Path
    """Run folder."""
    tasks: tuple[Task, ...]
    """In the order of the task ids."""
    splits: Mapping[str, TokenizedSplit]
    """Split name -> tokens."""
    report: DataReport
    """What was found in the data."""
    collator: Collator
    """Makes every batch; has the tokenizer, the reader of images and what an adversary predicts."""
    sampler: TrainSampler
    """Draws the posts of each training step."""
    parameters: Mapping[str, int]
    """Of ``count_parameters``."""
    layout: Layout
    """How the run lies over its ranks."""
    settings: Mapping[str, Any]
    """Complete DeepSpeed configuration."""
    engine: Engine
    """Model, objective and optimizer."""
    state: TrainState
    """How far training is; what a checkpoint remembers beside weights and moments."""
    monitor: Monitor
    """Writes metrics, plots and events."""
    watch: Watchdog = field(default_factory=Watchdog)
    """Is notified how far this rank is."""

    @property
    def checkpoints(self) -> Path:
        """Where checkpoints go."""
        return self.folder / "checkpoints"

    @property
    def model(self) -> MultiTaskModel:
        """The model, as DeepSpeed left it."""
        return self.engine.objective.model

    @property
    def total_steps(self) -> int:
        """Optimizer steps of the whole run."""
        per_epoch = self.sampler.steps_per_epoch
        return total_steps(self.recipe.train, steps_per_epoch=per_epoch)

    @property
    def first_steps(self) -> int:
        """Steps at the start that learn from the contrastive loss alone."""
        return self.recipe.loss.contrastive.first_steps

    @property
    def too_short_for(self) -> list[str]:
        """What the recipe asks for and the run has too few steps for, a sentence each."""
        steps, found = self.total_steps, []
        if self.recipe.train.reptile_steps and (without := self.sampler.without_turn(steps)):
            names = self.splits["train"].posts.group_names
            groups = np.unique(self.splits["train"].groups)
            whose = ", ".join(names[groups[number]] for number in without)
            remedy = "more steps, or fewer train.reptile_steps, would give them one"
            found.append(f"no inner loop for {whose}; {remedy}.")
        train = self.recipe.train
        if train.eval_every != "auto" and 0 < steps // self.eval_every <= train.patience:
            found.append(
                f"train.patience is {train.patience}, and this run evaluates every {self.eval_every} of its {steps} "
                "steps: it cannot end early; train.eval_every=auto evaluates twice an epoch."
            )
        waits = self.engine.objective.weighting.waits
        if waits and steps <= waits:
            loss = self.recipe.loss
            found.append(
                f"loss.weighting: {loss.weighting} compares two windows of {loss.weighting_window} steps "
                f"before it weighs, and this run has {steps}: all weights stay 1. The steps of an epoch "
                f"({self.sampler.steps_per_epoch}) are the usual loss.weighting_window."
            )
        return found

    @property
    def eval_every(self) -> int:
        """Steps between evaluations."""
        every = self.recipe.train.eval_every
        if every != "auto":
            return int(every)
        # Inside of an inner loop there is nothing new to evaluate.
        return whole_loops(self.recipe.train, max(1, self.sampler.steps_per_epoch // 2))

    @property
    def save_every(self) -> int:
        """Steps between checkpoints."""
        every = self.recipe.train.save_every
        return self.eval_every if every == "auto" else int(every)
