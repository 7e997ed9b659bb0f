"""The state of a run besides weights and moments, and the learning rate of each step."""

from __future__ import annotations

import math
from dataclasses import asdict, dataclass, field
from typing import Any

from comoe.config.recipe import TrainConfig

ALL_STEPS = "all steps done"
"""Why a run ended that was not cut short by its patience; more steps asked for by a resume go on
from there."""


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

    def to_dict(self) -> dict[str, Any]:
        """Plain numbers for JSON."""
        return asdict(self)


def rate_factor(step: int, *, total: int, config: TrainConfig) -> float:
    """Share of the peak rate in step ``step`` (from 0): linear warm-up, then the schedule, over ``total`` steps."""
    warmup = math.ceil(config.warmup_fraction * total)
    if step < warmup:
        return (step + 1) / warmup
    progress = (step - warmup) / max(1, total - warmup)
    return SCHEDULES[config.schedule](min(1.0, progress))


SCHEDULES = {
    "linear": lambda progress: 1.0 - progress,
    "cosine": lambda progress: 0.5 * (1.0 + math.cos(math.pi * progress)),
    "constant": lambda progress: 1.0,
}
