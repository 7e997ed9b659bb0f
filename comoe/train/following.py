"""Draws that follow the progress: after an evaluation the rates of the data sets change, and the run remembers them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np

from comoe.data.rates import loss_gains, progress_rates
from comoe.data.sampling import TrainSampler
from comoe.data.tokenized import TokenizedSplit
from comoe.distributed import broadcast_object
from comoe.evaluate import Evaluation
from comoe.tasks.catalog import Task
from comoe.train.state import TrainState


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

    The change is noted in ``state``, which a resume hands back to the sampler, and holds from the next step on. Every
    rank must call it.

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
    # Rank 0 decides: a loss that another machine rounds differently must not make it draw other posts.
    rates_G = np.array(broadcast_object(progress_rates(sampler.rates_G, gains_G).tolist()))
    state.validation_losses = now
    state.mixing.append(sampler.change(state.step, rates_G))
    sampler.follow(state.mixing, every=every)
    return {f"draws/{split.posts.group_names[group]}": float(rate) for group, rate in zip(names, rates_G, strict=True)}
