"""``comoe bench updates``: how far experts have moved the states after ten steps, against one dense block.

Every arm starts from the same encoder, has the same active width in the same layers, and sees the
same posts at the same constant rates. What is compared is the update that the block adds, over the
residual that it is added to; of each arm as a share of the dense block's.
"""

from __future__ import annotations

import statistics
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from comoe.benchmarks.timing import Measurements, Target, machine_note
from comoe.benchmarks.workload import find_posts, tokenized_posts
from comoe.config.recipe import Recipe
from comoe.losses.build import build_objective
from comoe.losses.objective import count_units, unit_scale
from comoe.models.encoders.build import build_encoder_shape
from comoe.models.encoders.families import expert_width
from comoe.models.moe.block import CooperativeBlock
from comoe.tasks.task import Task
from comoe.train.parallel.setup import parameter_groups
from comoe.types import Batch

EXPERTS, SELECTED = 8, (1, 2, 4, 8)
"""E, and k of the arms."""

STEPS, SEEN = 10, 2
"""Training steps of each arm, and batches that the update is measured on afterwards."""

MEAN, NARROW = "model.moe.gate_scale=1", "model.moe.expert_init=0.02"
FORMS: dict[str, tuple[Sequence[int], Sequence[str]]] = {
    "": (SELECTED, ()),
    "weighted mean": ((2, 8), (MEAN,)),
    "start 0.02": ((2, 8), (NARROW,)),
    "weighted mean, start 0.02": ((2, 8), (MEAN, NARROW)),
}
"""Form of the block -> k of its arms, and overrides; the first is the default."""


def run(
    json_path: Path | None = None, *, config: Path | None = None, rounds: int | None = None
) -> Measurements:
    """Train every arm, print the table, write the JSON.

    Args:
        json_path: file to write, if any.
        config: recipe file, of tasks with heads; None is the default recipe.
        rounds: training steps of each arm instead of the usual number.
    """
    file, steps = None if config is None else str(config), rounds or STEPS
    source = find_posts(file)
    split, collator = tokenized_posts(source.recipe, limit=1000)
    size = (steps + SEEN, source.recipe.train.batch_size)
    order = np.resize(np.random.default_rng(0).permutation(len(split)), size)
    batches = []
    for part in order:
        batch = collator(split, part)
        # The only one of its optimizer step.
        scale = unit_scale(count_units(batch, collator.tasks), world_size=1, accumulation=1)
        batches.append(replace(batch, unit_scale_T=scale))

    def measure(num_experts: int, top_k: int, form: Sequence[str]) -> list[float]:
        shape = {"num_experts": num_experts, "top_k": top_k, "expert_width": width // top_k}
        overrides = [f"model.moe.{name}={value}" for name, value in shape.items()]
        overrides += ["model.moe.balance=none", "model.moe.output_init=0"]
        recipe = find_posts(file, [*overrides, *form]).recipe
        return relative_updates(recipe, collator.tasks, batches[:steps], batches[steps:])

    width = active_width(source.recipe)
    dense = measure(1, 1, ())
    report = Measurements(
        f"updates: update over residual after {steps} steps, as a share of the dense block's "
        "(median of the layers; lowest and highest)",
        {f"k{top_k}": Target(at_least=0.8, at_most=1.25) for top_k in SELECTED},
    )
    report.notes += [
        machine_note("CPU", torch.get_num_threads()),
        f"E {EXPERTS}, active width {width}, {size[1]} {source.name} per step at the peak rates; "
        f"dense: {', '.join(f'{value:.4f}' for value in dense)} by layer",
    ]
    for label, (selected, form) in FORMS.items():
        for top_k in selected:
            found = zip(measure(EXPERTS, top_k, form), dense, strict=True)
            shares = [value / reference for value, reference in found]
            share = {"value": statistics.median(shares), "low": min(shares), "high": max(shares)}
            report.add(f"k{top_k}", share | {"rounds": steps}, case=label)
    report.publish(json_path)
    return report


def active_width(recipe: Recipe) -> int:
    """Width of the experts of one token in the recipe, rounded to a multiple of every k of the arms."""
    hidden = build_encoder_shape(recipe.model, generates=False).config.hidden_size
    active = recipe.model.moe.top_k * expert_width(recipe.model.moe, hidden)
    return max(SELECTED) * max(1, round(active / max(SELECTED)))


def relative_updates(
    recipe: Recipe, tasks: Sequence[Task], train: Sequence[Batch], seen: Sequence[Batch]
) -> list[float]:
    """Norm of each block's update over that of its input, after one AdamW step per batch of ``train``.

    Nothing is clipped: a common factor of the gradients hardly matters to Adam.

    Args:
        recipe: optimizer, rates and block.
        tasks: of the batches.
        train: batches of one step each.
        seen: batches that the update is measured on, in evaluation mode.
    """
    torch.manual_seed(recipe.train.seed)
    objective = build_objective(recipe, tasks).train()
    groups = [
        {key: group[key] for key in ("params", "lr", "weight_decay")}
        for group in parameter_groups(objective, recipe)
    ]
    betas = (recipe.train.betas[0], recipe.train.betas[1])
    optimizer = torch.optim.AdamW(groups, betas=betas, eps=recipe.train.epsilon)
    for batch in train:
        objective.begin_step()
        objective(batch).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    objective.eval()
    blocks = objective.model.moe_layers()
    squares = torch.zeros(len(blocks), 2, dtype=torch.float64)

    def add(block: CooperativeBlock, inputs: tuple[Tensor], update_BLM: Tensor) -> None:
        real_S = block.holder.context.real_index_S
        for place, tensor in enumerate((update_BLM, inputs[0])):
            real_SM = tensor.flatten(0, 1)[real_S].double()
            squares[blocks.index(block), place] += real_SM.square().sum()

    handles = [block.register_forward_hook(add) for block in blocks]
    with torch.no_grad():
        for batch in seen:
            objective(batch, mode="evaluate")
    for handle in handles:
        handle.remove()
    return (squares[:, 0] / squares[:, 1]).sqrt().tolist()
