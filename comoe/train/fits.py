"""Whether a run fits into the memory of its machines, held against the plan before anything is built."""

from __future__ import annotations

import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import psutil
import torch
from torch import nn

from comoe.config.recipe import Recipe
from comoe.data.collator import Collator
from comoe.data.tokens.split import TokenizedSplit
from comoe.distributed import all_gather_objects
from comoe.starter.registry import as_typed
from comoe.train.memory_plan import ROUGH, MemoryPlan, plan_run
from comoe.train.parallel.ds_config import Layout
from comoe.train.start_model import build_model

ROUGHLY = 3
"""A plan of more than so many times the memory is refused also for what it can only estimate, such
as activations; a run that is nearer is tried, and ends with advice where the memory is short."""

CGROUPS = ("/sys/fs/cgroup/memory.max", "/sys/fs/cgroup/memory/memory.limit_in_bytes")
"""Files with the limit of a container, in bytes."""


def plan_posts(
    typed: Recipe,
    recipe: Recipe,
    layout: Layout,
    splits: Mapping[str, TokenizedSplit],
    collator: Collator,
    settings: Mapping[str, Any],
) -> tuple[MemoryPlan, nn.Module]:
    """The memory plan of a run, and its objective without weights.

    Args:
        typed: as the user wrote it.
        recipe: resolved.
        layout: of the run.
        splits: its tokens.
        collator: of the run.
        settings: complete DeepSpeed configuration.

    Raises:
        ValueError: as ``build_model``.
    """
    with as_typed(typed, recipe):
        objective = build_model(recipe, splits, collator, shape=True)
    return plan_run(recipe, layout, objective.model, splits["train"], settings), objective


def check_fits(
    plan: MemoryPlan, objective: nn.Module, *, device: torch.device, ranks: int = 0
) -> None:
    """Refuse a run that a machine of it cannot hold; every rank must call it. Arguments as ``too_large``.

    Raises:
        ValueError: on every rank, with the reason of the first one that has one.
    """
    problem = too_large(plan, objective, device=device, ranks=ranks)
    if found := next(filter(None, all_gather_objects(problem)), ""):
        raise ValueError(found)


def too_large(
    plan: MemoryPlan, objective: nn.Module, *, device: torch.device, ranks: int = 0
) -> str:
    """Why this machine cannot hold its ranks of the plan; empty where it may.

    Args:
        plan, objective: of ``plan_posts``.
        device: of this rank.
        ranks: that a start would have on this machine; 0 is those that are here.
    """
    # Queues of embeddings and the like, which no weight counts.
    held = sum(each.numel() * each.element_size() for each in objective.buffers())
    sure = held + sum(part.device_bytes for part in plan.parts if part.name not in ROUGH)
    rough, ranks = held + plan.device_bytes, ranks or int(os.environ.get("LOCAL_SIZE", "1"))
    if device.type == "cuda":
        have = torch.cuda.get_device_properties(device).total_memory
        return _problem(plan, sure, rough, have, "this GPU") or _problem(
            plan, ranks * plan.host_bytes, 0, main_memory(), "this machine, beside its GPUs,"
        )
    host = plan.host_bytes
    where = "this machine" + (f", for {ranks} ranks," if ranks > 1 else "")
    return _problem(plan, ranks * (sure + host), ranks * (rough + host), main_memory(), where)


def _problem(plan: MemoryPlan, sure: int, rough: int, have: int, where: str) -> str:
    if sure <= have and rough <= ROUGHLY * have:
        return ""
    need = sure if sure > have else rough
    largest = max(plan.parts, key=lambda part: part.device_bytes + part.host_bytes)
    return (
        f"the run needs about {need / 2**30:,.0f} GiB of memory ({plan.setting}; most of it {largest.name}), and "
        f"{where} has {have / 2**30:,.1f} GiB. --dry-run --gpus N shows the plan for N GPUs; fewer or narrower experts "
        "(model.moe), a smaller encoder or loss.contrastive.queue_size, more ranks with ZeRO 3, or "
        "a smaller train.micro_batch_size need less."
    )


def main_memory() -> int:
    """Bytes of main memory and swap that this process may have at most."""
    whole = psutil.virtual_memory().total + psutil.swap_memory().total
    for name in CGROUPS:
        try:
            # "max" where there is no limit.
            limit = int(Path(name).read_text(encoding="ascii"))
        except (OSError, ValueError):
            continue
        return min(whole, limit) if limit > 0 else whole
    return whole
