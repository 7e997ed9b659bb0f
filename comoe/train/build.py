"""Builds the parts of a run in order: posts, tokens, model, engine, trainer; and restores the checkpoint."""

from __future__ import annotations

import os
import random
from collections.abc import Callable, Mapping, Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
import torch

from comoe.config.load import recipe_to_yaml
from comoe.config.recipe import Recipe
from comoe.data.collator import Collator, load_tokenizer
from comoe.data.columns import Domains, find_domains
from comoe.data.corpus import Corpus, load_corpus
from comoe.data.images.check import limits_of
from comoe.data.images.pixels import PixelReader, load_image_processor
from comoe.data.sampling.label_quota import label_members
from comoe.data.sampling.mixing import balanced_classes
from comoe.data.sampling.sampler import TrainSampler
from comoe.data.tokens.split import TokenizedSplit, report_cuts, tokenize_split
from comoe.distributed import barrier, broadcast_object, is_main, rank, world_size
from comoe.evaluation.evaluate import check_chosen_metric
from comoe.inference.checkpoint_folder import checkpoint_of, whats_wrong
from comoe.losses.objective import Objective, build_objective
from comoe.models.vision.tower import image_side
from comoe.starter.registry import as_typed, home, resolve
from comoe.tasks.task import Task
from comoe.train.checkpoint.folder import Found, find_checkpoint, mark_best
from comoe.train.checkpoint.save_load import load_checkpoint, needs_conversion, saved_elsewhere
from comoe.train.dry_run import print_dry_run, seen_by_the_decoder
from comoe.train.evaluator import Evaluator
from comoe.train.memory_plan import count_parameters, plan_run
from comoe.train.monitor.monitor import Monitor
from comoe.train.parallel.ds_config import Layout, fill_settings, load_settings, plan_layout
from comoe.train.parallel.engine import Engine
from comoe.train.parallel.setup import build_deepspeed_engine, building
from comoe.train.run_folder import SET_ASIDE, check_same_tasks
from comoe.train.state import TrainState
from comoe.train.trainer import Trainer, plan_schedule

Result = TypeVar("Result")


@dataclass(frozen=True, slots=True)
class Run:
    """A run that is ready to train."""

    recipe: Recipe
    """With starter-kit names resolved to folders."""
    settings: Mapping[str, Any]
    """Complete DeepSpeed configuration."""
    folder: Path
    """Run folder."""
    corpus: Corpus
    """Posts, tasks, report."""
    tasks: Sequence[Task]
    """In the order of the task ids."""
    splits: Mapping[str, TokenizedSplit]
    """Split name -> tokens."""
    tokenizer: Any
    """The encoder's."""
    trainer: Trainer
    """The loop."""
    parameters: Mapping[str, int]
    """dense and expert parameters, and those active per token."""


def assemble(
    recipe: Recipe,
    deepspeed_json: Path,
    *,
    folder: Path,
    on_ready: Callable[[], object],
    device: torch.device,
    dry_run: bool,
    resume: bool,
    planned_gpus: int = 0,
) -> Run | None:
    """Build everything; None after a dry run, which prints what would happen instead.

    Args:
        recipe: as the user wrote it; ``deepspeed_json`` has ZeRO, precision and clipping.
        folder: run folder; ``resume`` goes on from its newest whole checkpoint.
        on_ready: called on every rank once all that the user brings has been read, before anything
            is written.
        planned_gpus: the dry run plans for so many GPUs; 0 is for the ranks and the device that are
            here.

    Raises:
        ValueError: bad recipe, data, encoder, DeepSpeed JSON or checkpoint; nothing has been
            trained then.
    """
    gpu = planned_gpus > 0 or device.type == "cuda"
    settings = load_settings(deepspeed_json)
    layout = plan_layout(recipe, settings, world_size=planned_gpus or world_size(), gpu=gpu)
    filled = fill_settings(settings, recipe, layout, gpu=gpu)
    named, recipe = recipe, _one_per_node_first(lambda: resolve(recipe, progress=is_main()))
    corpus, tokenizer, splits = _load_posts(recipe)
    domains = find_domains(corpus.splits["train"], recipe.loss.adversarial)
    with as_typed(named, recipe), nullcontext() if dry_run else building(filled):
        objective = _build_objective(recipe, corpus.tasks, splits, domains, shape=dry_run)
    parameters = count_parameters(objective.model, top_k=recipe.model.moe.top_k)
    if dry_run:
        if is_main():
            plan = plan_run(recipe, layout, objective.model, splits["train"], filled)
            print_dry_run(named, corpus, plan, seen=seen_by_the_decoder(splits["train"], tokenizer))
        return None
    if is_main():
        print("\n".join(corpus.report.lines(all_in=SET_ASIDE)))
    on_ready()
    found = _checkpoint_to_use(folder, corpus.tasks, resume=resume)
    if found is not None and needs_conversion(found.path, layout):
        filled["checkpoint"] = {"load_universal": True}
        if is_main() and (moved := saved_elsewhere(found.path, layout)):
            print(f"{moved}: converting it.")
    engine = Engine(build_deepspeed_engine(objective, recipe, filled), recipe)
    # Weights were the same draw on all ranks; dropout must not be.
    _seed(recipe.train.seed + 1000 * (rank() + 1))
    state = TrainState() if found is None else _restored(found, engine, layout)
    monitor = Monitor(
        folder,
        enabled=is_main(),
        tasks=corpus.tasks,
        recipe_text=recipe_to_yaml(named),
        histograms=recipe.run.histograms,
        resumed_at=state.step if resume else None,
    )
    trainer = _build_trainer(
        recipe, layout, engine, corpus.tasks, splits, tokenizer, monitor, folder, state
    )
    return Run(named, filled, folder, corpus, corpus.tasks, splits, tokenizer, trainer, parameters)


def _load_posts(recipe: Recipe) -> tuple[Corpus, Any, dict[str, TokenizedSplit]]:
    kept = home() / "pictures" if recipe.data.cache else None
    corpus = load_corpus(
        recipe, with_images=image_side(recipe.model) is not None, cache_dir=kept, progress=True
    )
    domains = find_domains(corpus.splits["train"], recipe.loss.adversarial)
    corpus.report.notes += [] if domains is None else [domains.line()]
    measured = {task for task, found in corpus.report.labels.items() if "validation" in found}
    check_chosen_metric(recipe.train.early_stop_metric, corpus.tasks, measured=measured)
    tokenizer = load_tokenizer(
        recipe.model.encoder, trust_remote_code=recipe.model.trust_remote_code
    )
    splits = _one_per_node_first(lambda: _tokenize(corpus, tokenizer, recipe))
    report_cuts(splits, corpus.report)
    return corpus, tokenizer, splits


def _build_objective(
    recipe: Recipe,
    tasks: Sequence[Task],
    splits: Mapping[str, TokenizedSplit],
    domains: Domains | None,
    *,
    shape: bool,
) -> Objective:
    _seed(recipe.train.seed)
    objective = build_objective(
        recipe, tasks, num_domains=len(domains.names) if domains else 0, shape=shape
    )
    # Many tokenizers do not know how many positions their encoder has.
    limit = objective.model.longest_text
    longest = max(int(split.lengths.max()) for split in splits.values() if len(split))
    if longest > limit:
        beside = " beside the image tokens" if objective.model.image_tokens else ""
        raise ValueError(
            f"data.max_length ({recipe.data.max_length}) lets posts of {longest} tokens through, but model.encoder "
            f"({recipe.model.encoder}) numbers at most {limit}{beside}; set data.max_length to {limit} or less."
        )
    return objective


def _build_trainer(
    recipe: Recipe,
    layout: Layout,
    engine: Engine,
    tasks: Sequence[Task],
    splits: Mapping[str, TokenizedSplit],
    tokenizer: Any,
    monitor: Monitor,
    folder: Path,
    state: TrainState,
) -> Trainer:
    train = splits["train"]
    sampler = TrainSampler(
        train.lengths,
        train.groups,
        batch_size=recipe.train.batch_size,
        world_size=layout.world_size,
        micro_batch_size=layout.micro_batch_size,
        mixing=recipe.data.mixing,
        temperature=recipe.data.mixing_temperature,
        seed=recipe.train.seed,
        label_members=label_members(train.posts, tasks) if recipe.data.posts_per_label else (),
        posts_per_label=recipe.data.posts_per_label,
        classes=balanced_classes(train.posts, tasks, recipe.tasks),
    )
    pixels = load_pixel_reader(recipe)
    domains = find_domains(train.posts, recipe.loss.adversarial)
    collator = Collator(
        tokenizer, tasks, route_by=recipe.model.moe.route_by, pixels=pixels, domains=domains
    )
    return Trainer(
        recipe=recipe,
        layout=layout,
        engine=engine,
        tasks=tasks,
        train_split=train,
        collator=collator,
        sampler=sampler,
        evaluator=Evaluator(engine, splits, collator, tasks),
        monitor=monitor,
        folder=folder,
        state=state,
        schedule=plan_schedule(recipe, sampler),
        pixels=pixels,
    )


def load_pixel_reader(recipe: Recipe) -> PixelReader | None:
    """What makes the pixels of a run; None where it reads no pictures.

    Args:
        recipe: with starter-kit names resolved to folders.
    """
    folder = image_side(recipe.model)
    if folder is None:
        return None
    processor = load_image_processor(folder, trust_remote_code=recipe.model.trust_remote_code)
    return PixelReader(processor, limits_of(recipe.data))


def _tokenize(corpus: Corpus, tokenizer: Any, recipe: Recipe) -> dict[str, TokenizedSplit]:
    cache = home() / "tokens" if recipe.data.cache else None
    return {
        name: tokenize_split(
            split, tokenizer, tasks=corpus.tasks, config=recipe.data, cache_dir=cache
        )
        for name, split in corpus.splits.items()
    }


def _one_per_node_first(work: Callable[[], Result]) -> Result:
    """Let one rank per node do cached work first, the others after it, from the cache."""
    first = int(os.environ.get("LOCAL_RANK", "0")) == 0
    result = work() if first else None
    barrier()
    return result if first else work()


def _seed(seed: int) -> None:
    random.seed(seed)
    np.random.seed(seed % 2**32)
    torch.manual_seed(seed)


def _checkpoint_to_use(folder: Path, tasks: Sequence[Task], *, resume: bool) -> Found | None:
    found = find_checkpoint(folder / "checkpoints") if resume else None
    if found is None:
        if is_main() and resume:
            print(f"{folder} has no checkpoint yet: starting at step 0.")
        return None
    check_same_tasks(folder, tasks)
    if is_main():
        for problem in found.broken:
            print(f"warning: {problem}; using {found.path.name} instead.")
        print(f"resuming {folder} at step {found.step}")
    return found


def _restored(found: Found, engine: Engine, layout: Layout) -> TrainState:
    state = load_checkpoint(found.path, engine, layout)
    best = checkpoint_of(found.path.parent, state.best_step)
    # Rank 0 decides: whether an evaluation is the best one so far decides whether all ranks save.
    whole = broadcast_object(not whats_wrong(best) if is_main() else None)
    if state.best_value is not None and whole:
        # A run that is cut short may have named a later step, which it will now reach again.
        mark_best(found.path.parent, state.best_step)
    elif state.best_value is not None:
        # The best weights are gone: the next evaluation is the best there is.
        state.best_value = None
    return state
