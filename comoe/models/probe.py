"""The tasks' answers once more, from copies of the last states that they share, for the tasks' gradients there."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from comoe.models.heads import HeadOutput
from comoe.protocols import Probe
from comoe.tasks.catalog import Task


def probe(shared_BLM: Tensor, tasks: Sequence[Task], answer: Callable[[int, Tensor], tuple[HeadOutput, Any]]) -> Probe:
    """Run what each task has for itself on a copy of its own of the shared states, gradients on, whatever is around.

    It is a second run, because ZeRO-3 counts the backward passes of a module and allows one for each forward pass. It
    draws the dropout that the tasks draw next, and leaves the random numbers as they were.

    Args:
        shared_BLM: the last states that all tasks read.
        tasks: the tasks.
        answer: (number of the task, shared states) -> what its head answers, and something else.
    """
    states, logits = {}, {}
    with torch.random.fork_rng([shared_BLM.device] if shared_BLM.is_cuda else []), torch.enable_grad():
        for number, task in enumerate(tasks):
            states[task.name] = shared_BLM.detach().requires_grad_()
            logits[task.name] = answer(number, states[task.name])[0].logits
    return Probe(states, logits)
