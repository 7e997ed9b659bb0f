"""Makes a run ready to train: posts, tokens, soft labels, model and objective, engine and state, monitor."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch

from comoe.config.load import recipe_to_yaml
from comoe.config.recipe import Recipe
from comoe.data.sampling.sampler import sampler_of
from comoe.distributed import is_main, world_size
from comoe.train.checkpoint.resume import checkpoint_to_resume, start_engine
from comoe.train.fits import check_fits, plan_posts
from comoe.train.memory_plan import count_parameters
from comoe.train.monitor.monitor import Monitor
from comoe.train.monitor.trackers import trackers_of
from comoe.train.parallel.ds_config import fill_settings, plan_layout
from comoe.train.read_data import read_posts, tokenize_posts
from comoe.train.run_folder import SET_ASIDE, begun_in_bf16
from comoe.train.soft_labels import soft_labelled
from comoe.train.start_model import start_model
from comoe.train.training_run import TrainingRun


def build_run(
    typed: Recipe,
    settings: Mapping[str, Any],
    folder: Path,
    *,
    device: torch.device,
    resume: bool = False,
    verify: bool = True,
    on_ready: Callable[[], object] = lambda: None,
) -> TrainingRun:
    """Make a run ready to train; every rank must call it.

    Args:
        typed, settings: recipe and DeepSpeed JSON, as the user wrote them.
        folder, device: of the run; of this rank.
        resume: go on from the newest whole checkpoint in the folder; ``verify`` compares digests.
        on_ready: called once all that the user brings has been read, before anything is written.

    Raises:
        ValueError: bad recipe, data, encoder, DeepSpeed JSON or checkpoint.
    """
    gpu, begun = device.type == "cuda", begun_in_bf16(folder) if resume else None
    layout = plan_layout(typed, settings, world_size=world_size(), gpu=gpu, begun_in_bf16=begun)
    settings = fill_settings(settings, typed, layout, gpu=gpu)
    recipe, corpus = read_posts(typed)
    splits, collator = tokenize_posts(recipe, corpus)
    if not resume:
        check_fits(*plan_posts(typed, recipe, layout, splits, collator, settings), device=device)
    splits |= soft_labelled(recipe, splits, corpus.tasks, device=device, bf16=layout.bf16)
    objective, notes = start_model(
        typed, recipe, splits, collator, settings, device=device, begun=folder if resume else None
    )
    corpus.report.notes += notes
    parameters = count_parameters(objective.model, top_k=recipe.model.moe.top_k)
    if is_main():
        print(*corpus.report.lines(all_in=SET_ASIDE), f"precision: {layout.precision}", sep="\n")
    on_ready()
    found = checkpoint_to_resume(folder, typed, collator, verify=verify) if resume else None
    engine, state = start_engine(objective, recipe, settings, layout, found)
    monitor = Monitor(
        folder, enabled=is_main(), tasks=corpus.tasks, recipe_text=recipe_to_yaml(typed), shown=recipe.run,
        trackers=trackers_of(typed, folder, resumed=resume), resumed_at=state.step if resume else None,
    )  # fmt: skip
    return TrainingRun(
        recipe=typed,
        folder=folder,
        tasks=corpus.tasks,
        splits=splits,
        report=corpus.report,
        collator=collator,
        sampler=sampler_of(
            recipe, splits["train"], corpus.tasks, layout.world_size, layout.micro_batch_size
        ),
        parameters=parameters,
        layout=layout,
        settings=settings,
        engine=engine,
        state=state,
        monitor=monitor,
    )
