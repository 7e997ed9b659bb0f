"""``comoe bench routing``: what routing by task costs, with the lower layers run once per post and once per task.

Every post is asked for all tasks of the recipe, as in prediction and under soft labels of all tasks.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import asdict, replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch

from comoe.benchmarks.ranks import run_on_ranks
from comoe.benchmarks.timing import (
    Contestant,
    Measurements,
    Target,
    machine_note,
    median,
    ratio,
    take_turns,
)
from comoe.benchmarks.workload import find_posts, tokenized_posts
from comoe.config.recipe import ModelConfig
from comoe.data.collator import Collator
from comoe.models.build import build_model
from comoe.models.model import MultiTaskModel
from comoe.train.parallel.setup import start_ranks
from comoe.types import Batch

LAYERS = ("top-1", "top-2", "top-3", "all")
"""Words of ``model.moe.layers``."""

BEFORE, AFTER, TOKEN = "a pass per task", "once per post below the blocks", "routed by token"
MODES = ("training", "prediction")

TARGETS = {
    f"pass_per_task_over_fan_out_{mode}_{layers}": Target(at_least=1.0)
    for mode in MODES
    for layers in LAYERS[:-1]
}


def _train(model: MultiTaskModel, optimizer: torch.optim.Optimizer, batch: Batch) -> None:
    logits = model.train()(batch).logits.values()
    sum(values.float().square().mean() for values in logits).backward()
    optimizer.step()
    optimizer.zero_grad()


def _predict(model: MultiTaskModel, batch: Batch) -> None:
    with torch.inference_mode():
        model.eval()(batch)


def measure(config: str | None, layers: Sequence[str], posts: int, rounds: int) -> dict[str, Any]:
    """Time a training step and a prediction of some posts, in turns, for each choice of layers.

    Args:
        config: recipe file; None is the default recipe.
        layers: words of ``model.moe.layers``.
        posts: per batch.
        rounds: timed rounds of each.

    Returns:
        times: layers -> "mode, variant" -> seconds per round. notes: lines.
    """
    device = start_ranks(timeout_seconds=600)
    source = find_posts(config, ["data.limit_eval=50"])
    split, by_token = tokenized_posts(source.recipe, limit=4 * posts)
    indices = np.random.default_rng(0).permutation(len(split))[:posts]
    by_task = Collator(by_token.tokenizer, by_token.tasks, row_per_task=True)
    fanned = by_task(split, indices, all_tasks=True).to(device)
    batches = {
        BEFORE: replace(fanned, text_numbers_B=None),
        AFTER: fanned,
        TOKEN: by_token(split, indices, all_tasks=True).to(device),
    }
    times = {}
    for choice in layers:

        def built(route_by: str, choice: str = choice) -> MultiTaskModel:
            moe = replace(source.recipe.model.moe, layers=choice, route_by=route_by)
            config: ModelConfig = replace(source.recipe.model, moe=moe)
            torch.manual_seed(0)
            return build_model(config, by_token.tasks).to(device)

        models = dict.fromkeys((BEFORE, AFTER), built("task")) | {TOKEN: built("token")}
        contestants: dict[str, Callable[[], None]] = {}
        for variant, model in models.items():
            optimizer = torch.optim.AdamW(model.parameters(), lr=1e-6, fused=True)
            step = partial(_train, model, optimizer, batches[variant])
            contestants[f"{MODES[0]}, {variant}"] = step
            contestants[f"{MODES[1]}, {variant}"] = partial(_predict, model, batches[variant])
        turns = {name: Contestant(run) for name, run in contestants.items()}
        times[choice] = take_turns(turns, rounds=rounds, warmup=1, device=device)
    name = torch.cuda.get_device_name() if device.type == "cuda" else "CPU"
    moe, real = source.recipe.model.moe, int(batches[TOKEN].attention_mask_BL.sum())
    notes = [
        machine_note(name, torch.get_num_threads()),
        f"recipe {source.recipe.run.name} on {source.name}: {posts} posts of {real / posts:.0f} tokens, "
        f"{len(by_token.tasks)} tasks each, {moe.num_experts} experts, top-{moe.top_k}; float32, one process",
    ]
    return {"times": times, "notes": notes}


def run(
    json_path: Path | None = None,
    *,
    config: Path | None = None,
    rounds: int | None = None,
    posts: int = 8,
    layers: Sequence[str] = LAYERS,
) -> Measurements:
    """Measure, print the table, write the JSON.

    Args:
        json_path: file to write, if any.
        config: recipe file; None is the default recipe.
        rounds: timed rounds of each contestant instead of 9.
        posts: posts per batch.
        layers: words of ``model.moe.layers``.
    """
    report = Measurements("routing: by task and by token; ratios of interleaved times", TARGETS)
    measured = run_on_ranks(
        "comoe.benchmarks.routing:measure",
        1,
        config=None if config is None else str(config.resolve()),
        layers=list(layers),
        posts=posts,
        rounds=rounds or 9,
    )
    report.notes += measured["notes"]
    for choice, times in measured["times"].items():
        for mode in MODES:
            before, after, token = (f"{mode}, {name}" for name in (BEFORE, AFTER, TOKEN))
            gain, price = asdict(ratio(times, before, after)), asdict(ratio(times, after, token))
            report.add(f"pass_per_task_over_fan_out_{mode}_{choice}", gain)
            report.add(f"fan_out_over_token_{mode}_{choice}", price)
            for name in (before, after, token):
                seconds = median(times, name)
                report.add_time(name, seconds, case=f"{choice}, {posts / seconds:.0f} posts/s")
    report.publish(json_path)
    return report
