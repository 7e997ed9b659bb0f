"""The state of a run besides weights and moments, and the learning rate of each step."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from statistics import median
from typing import Any

from torch import Tensor

from comoe.config.recipe import TrainConfig
from comoe.tasks.task import Task

ALL_STEPS = "all steps done"
"""Why a run ended that was not cut short by its patience; more steps asked for by a resume go on
from there."""


NORMS_KEPT = 100
"""Steps whose gradient norms ``train.max_grad_norm: auto`` looks back on."""

OUTLIER = 3.0
"""Times their median a norm is an outlier."""


LARGEST_WEIGHT = 1e6
"""A weight beyond it has diverged: those of trained encoders are below a hundred, and next to it
float32 resolves no update of theirs."""


LARGEST_LOSS = 1e3
"""Nats: a mean cross-entropy beyond it has diverged; guessing costs the logarithm of the number of
labels."""


class TrainingStopped(RuntimeError):
    """The run cannot continue; the message has the reason and the remedy."""


@dataclass(slots=True)
class TrainState:
    """Saved with every checkpoint; patience too, so that a resumed run stops where the uninterrupted one would."""

    step: int = 0
    """Optimizer steps done, skipped ones included. The sampler is a function of it."""
    best_value: float | None = None
    """Best value of the early-stop metric."""
    best_step: int = 0
    """Step of ``best_value``."""
    evaluations_without_gain: int = 0
    """Evaluations since the best one."""
    nonfinite_in_a_row: int = 0
    """Steps skipped since the last good one."""
    nonfinite_total: int = 0
    """Total of skipped steps."""
    posts_seen: int = 0
    """Posts trained on, with repetition."""
    seconds: float = 0.0
    """Seconds of training over all starts."""
    evaluated_at: int = 0
    """Step of the last evaluation; one that a signal cut short is made up for by the resume."""
    grad_norms: list[float] = field(default_factory=list)
    """Gradient norms before clipping of the last ``NORMS_KEPT`` steps that changed the weights;
    those of the contrastive stage are forgotten at its end."""
    clipped_total: int = 0
    """Steps whose gradient was scaled down."""
    mixing: list[dict[str, Any]] = field(default_factory=list)
    """Every change of the data sets' rates, as ``TrainSampler.change`` gave it; the sampler is a
    function of it too."""
    validation_losses: dict[str, float] = field(default_factory=dict)
    """Task -> loss at the last evaluation that rates were made of."""
    finished: str = ""
    """Why the run ended; empty before."""

    def record(self, value: float, *, patience: int) -> bool:
        """Note an evaluation; True when it is the best so far. Sets ``finished`` when the patience is used up."""
        # NaN would stay the best value forever.
        improved = not math.isnan(value) and (self.best_value is None or value > self.best_value)
        if improved:
            self.best_value, self.best_step, self.evaluations_without_gain = value, self.step, 0
        else:
            self.evaluations_without_gain += 1
            if patience and self.evaluations_without_gain >= patience:
                self.finished = f"no better value in {patience} evaluations"
        return improved

    def record_norm(self, norm: float | None, *, limit: float) -> bool:
        """Note the gradient norm of a step that changed the weights; True when it was scaled down to the limit."""
        if norm is None:
            return False
        self.grad_norms = [*self.grad_norms, norm][-NORMS_KEPT:]
        clipped = 0 < limit < norm
        self.clipped_total += clipped
        return clipped

    def to_dict(self) -> dict[str, Any]:
        """Plain numbers for JSON."""
        return asdict(self)


def diverged(weights: Mapping[str, Tensor]) -> str:
    """Which weights are not finite or beyond ``LARGEST_WEIGHT``, in words; empty where none is."""
    largest = {
        name: float(tensor.abs().max())
        for name, tensor in weights.items()
        if tensor.is_floating_point() and tensor.numel()
    }
    # Not NaN either.
    bad = [name for name, value in largest.items() if not value <= LARGEST_WEIGHT]
    if not bad:
        return ""
    return f"{len(bad)} of {len(largest)} weights, such as {bad[0]} ({largest[bad[0]]:.0e})"


def diverged_losses(metrics: Mapping[str, Mapping[str, float]], tasks: Sequence[Task]) -> str:
    """Tasks with a loss that is NaN or, where they have labels, beyond ``LARGEST_LOSS``, in words; empty for none.

    The square of a number's error is not judged: its unit is that of the labels.
    """
    losses = {
        task: metrics[task.name]["loss"] for task in tasks if "loss" in metrics.get(task.name, {})
    }
    bad = {
        task.name: loss
        for task, loss in losses.items()
        if not loss <= (LARGEST_LOSS if task.labels else math.inf)
    }
    return ", ".join(f"{name} {loss:.3g}" for name, loss in bad.items())


def norm_limit(config: TrainConfig, norms: Sequence[float]) -> float:
    """The gradient norm that the next step is scaled down to; 0 for none.

    A fixed number fits no two recipes: norms grow with tasks and weights of losses, and along a
    run. A limit relative to the norms of the run itself is in the spirit of AutoClip
    (arXiv:2007.14469), which takes a low percentile and so clips nearly always.

    Args:
        config: ``train`` of the recipe.
        norms: ``TrainState.grad_norms``.
    """
    if config.max_grad_norm == "auto":
        return OUTLIER * median(norms) if norms else 0.0
    return config.max_grad_norm


def total_steps(config: TrainConfig, *, steps_per_epoch: int) -> int:
    """Optimizer steps of a whole run."""
    # An inner loop that is cut short would be lost.
    return whole_loops(config, config.max_steps or max(1, round(config.epochs * steps_per_epoch)))


def whole_loops(config: TrainConfig, steps: int) -> int:
    """Steps, rounded up to whole inner loops of ``train.reptile_steps``."""
    loop = config.reptile_steps or 1
    return -(-steps // loop) * loop


def rate_factor(step: int, *, total: int, config: TrainConfig, first: int = 0) -> float:
    """Share of the peak rate in step ``step`` (from 0): linear warm-up, then the schedule, over ``total`` steps.

    The ``first`` steps of them, and the rest, have each a warm-up and a schedule of their own: a
    head that learns nothing in the first ones has moments of 0, with which Adam's first steps are
    three times as long as they are at the start of a run.
    """
    if step < first:
        total = first
    else:
        step, total = step - first, total - first
    warmup = math.ceil(config.warmup_fraction * total)
    if step < warmup:
        return (step + 1) / warmup
    progress = (step - warmup) / max(1, total - warmup)
    return SCHEDULES[config.schedule](min(1.0, progress))


def outer_rate(steps: int, *, total: int, config: TrainConfig) -> float:
    """Reptile's outer step size after so many steps of ``total``; 0 inside of an inner loop.

    After loop i (from 0) of n it is ``reptile_rate`` (1 - i / n).

    Source: arXiv:1803.02999 and its code, whose outer step is annealed linearly to 0.
    """
    loop = config.reptile_steps
    if not loop or steps % loop:
        return 0.0
    return config.reptile_rate * (1 - (steps - loop) / total)


SCHEDULES = {
    "linear": lambda progress: 1.0 - progress,
    "cosine": lambda progress: 0.5 * (1.0 + math.cos(math.pi * progress)),
    "constant": lambda progress: 1.0,
}
