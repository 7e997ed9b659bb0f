"""Makes a run ready to train, in six steps: posts, tokens, model and objective, engine, restored state, monitor."""

from __future__ import annotations

import os
import random
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
import torch

from comoe.config.load import recipe_to_yaml
from comoe.config.recipe import Recipe
from comoe.data.collator import Collator
from comoe.data.columns import find_domains
from comoe.data.corpus import Corpus, load_corpus
from comoe.data.images.check import limits_of
from comoe.data.images.pixels import PixelReader, load_image_processor
from comoe.data.posts import PostSplit
from comoe.data.sampling.label_quota import label_members
from comoe.data.sampling.mixing import balanced_classes
from comoe.data.sampling.sampler import SamplerConfig, TrainSampler
from comoe.data.soft_labels import SoftLabels, preferred
from comoe.data.tokens.split import (
    TokenizedSplit,
    report_cuts,
    tokenize_split,
    with_soft_labels,
)
from comoe.data.tokens.vocabulary import embedding_problem, load_tokenizer
from comoe.distributed import barrier, broadcast_object, is_main, rank, world_size
from comoe.evaluation.evaluate import check_chosen_metric
from comoe.inference.checkpoint_folder import checkpoint_of, whats_wrong
from comoe.inference.teacher import find_teachers, teach
from comoe.losses.objective import Objective, build_objective
from comoe.models.vision.tower import image_side
from comoe.starter.registry import as_typed, home, resolve
from comoe.tasks.task import Task
from comoe.train.checkpoint.folder import Found, find_checkpoint, mark_best
from comoe.train.checkpoint.save_load import load_checkpoint, needs_conversion, saved_elsewhere
from comoe.train.label_texts import start_heads
from comoe.train.memory_plan import count_parameters
from comoe.train.monitor.monitor import Monitor
from comoe.train.parallel.ds_config import Layout, fill_settings, plan_layout
from comoe.train.parallel.engine import Engine
from comoe.train.parallel.setup import build_deepspeed_engine, building
from comoe.train.run_folder import SET_ASIDE, begun_in_bf16, check_same_groups, check_same_tasks
from comoe.train.start_from import start_from_export
from comoe.train.state import TrainState, total_steps
from comoe.train.training_run import TrainingRun

Made = TypeVar("Made")

TAUGHT = ("train", "validation")
"""Splits that teachers are asked about."""


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
        typed: as the user wrote it.
        settings: the DeepSpeed JSON.
        folder: run folder.
        device: of this rank.
        resume: go on from the newest whole checkpoint in the folder; ``verify`` compares digests.
        on_ready: called once all that the user brings has been read, before anything is written.

    Raises:
        ValueError: bad recipe, data, encoder, DeepSpeed JSON or checkpoint.
    """
    gpu = device.type == "cuda"
    begun = begun_in_bf16(folder) if resume else None
    layout = plan_layout(typed, settings, world_size=world_size(), gpu=gpu, begun_in_bf16=begun)
    settings = fill_settings(settings, typed, layout, gpu=gpu)
    recipe, corpus = read_posts(typed)
    splits, collator = tokenize_posts(recipe, corpus)
    splits |= soft_labelled(recipe, splits, corpus.tasks, device=device, bf16=layout.bf16)
    with as_typed(typed, recipe), building(settings):
        objective = build_model(recipe, splits, collator)
    start_heads(objective.model, recipe, collator, splits["train"], device=device)
    corpus.report.notes += _starting(recipe, objective, folder if resume else None)
    parameters = count_parameters(objective.model, top_k=recipe.model.moe.top_k)
    _print([*corpus.report.lines(all_in=SET_ASIDE), f"precision: {layout.precision}"])
    on_ready()
    found = _checkpoint_to_use(folder, typed, corpus.tasks, verify=verify) if resume else None
    engine = _start_engine(objective, recipe, settings, layout, found)
    state = TrainState() if found is None else _restored(found, engine, layout)
    monitor = Monitor(
        folder, enabled=is_main(), tasks=corpus.tasks, recipe_text=recipe_to_yaml(typed),
        histograms=recipe.run.histograms, resumed_at=state.step if resume else None,
    )  # fmt: skip
    return TrainingRun(
        recipe=typed,
        folder=folder,
        tasks=corpus.tasks,
        splits=splits,
        report=corpus.report,
        collator=collator,
        sampler=_sampler(recipe, splits["train"], corpus.tasks, layout),
        parameters=parameters,
        layout=layout,
        settings=settings,
        engine=engine,
        state=state,
        monitor=monitor,
    )


def _starting(recipe: Recipe, objective: Objective, begun: Path | None) -> list[str]:
    """The weights of ``model.start_from`` for a run that has no checkpoint yet; what is to be said of it."""
    if begun is not None and find_checkpoint(begun / "checkpoints", verify=False) is not None:
        return []
    return start_from_export(recipe.model, objective.model)


def read_posts(typed: Recipe) -> tuple[Recipe, Corpus]:
    """The recipe with ready-made names resolved to folders, and all posts that it names. Every rank must call it."""
    recipe = _one_per_node_first(lambda: resolve(typed, progress=is_main()))
    kept = home() / "pictures" if recipe.data.cache else None
    corpus = load_corpus(
        recipe, with_images=image_side(recipe.model) is not None, cache_dir=kept, progress=True
    )
    measured = {task for task, found in corpus.report.labels.items() if "validation" in found}
    teachers = find_teachers(recipe.distill, corpus.tasks)
    known = {name for teacher in teachers for name in teacher.columns}
    metric = recipe.train.early_stop_metric
    check_chosen_metric(metric, corpus.tasks, measured=measured, taught=known)
    corpus.report.notes += [
        f"task {task.name}: no teacher; it is learned from its gold labels alone"
        for task in corpus.tasks
        if teachers and task.rules.scored and task.name not in known
    ]
    corpus.report.notes += _first_stage(recipe, corpus)
    corpus.report.notes += [
        f"task {name}: its head starts at the texts of its labels"
        + (", unless model.start_from knows the task" if recipe.model.start_from else "")
        for name, task in recipe.tasks.items()
        if task.descriptions
    ]
    return recipe, corpus


def _first_stage(recipe: Recipe, corpus: Corpus) -> list[str]:
    """What the data report says of ``loss.contrastive.first_steps``.

    Raises:
        ValueError: no step is left for the tasks, or nothing is compared.
    """
    key, first = "loss.contrastive.first_steps", recipe.loss.contrastive.first_steps
    posts, batch_size = len(corpus.splits["train"]), recipe.train.batch_size
    steps = total_steps(recipe.train, steps_per_epoch=-(-posts // batch_size))
    if first >= steps:
        raise ValueError(
            f"{key} ({first}) must be less than the {steps} steps of the run; lower it, or raise train.max_steps or "
            "train.epochs."
        )
    if first and not any(task.contrastive for task in corpus.tasks):
        raise ValueError(
            f"{key} is {first}, but no task takes part in the contrastive loss; set tasks.<name>.contrastive for one, "
            "or make it 0."
        )
    note = f"{first:,} of {steps:,} steps come first that learn from the contrastive loss alone"
    return [note] if first else []


def tokenize_posts(recipe: Recipe, corpus: Corpus) -> tuple[dict[str, TokenizedSplit], Collator]:
    """Every split as tokens, and what makes batches of them; what was cut is noted in the corpus' report.

    Args:
        recipe: of ``read_posts``.
        corpus: its posts.
    """
    domains = find_domains(corpus.splits["train"], recipe.loss.adversarial)
    corpus.report.notes += [] if domains is None else [domains.line()]
    tokenizer = load_tokenizer(
        recipe.model.encoder, trust_remote_code=recipe.model.trust_remote_code
    )
    cache = home() / "tokens" if recipe.data.cache else None
    teachers = find_teachers(recipe.distill, corpus.tasks)
    taught = {name for teacher in teachers for name in teacher.columns}
    splits = _one_per_node_first(
        lambda: {
            name: tokenize_split(
                posts,
                tokenizer,
                tasks=corpus.tasks,
                config=recipe.data,
                cache_dir=cache,
                taught=taught if name in TAUGHT else (),
            )
            for name, posts in corpus.splits.items()
        }
    )
    report_cuts(splits, corpus.report)
    pixels, images = None, image_side(recipe.model)
    if images is not None:
        processor = load_image_processor(images, trust_remote_code=recipe.model.trust_remote_code)
        pixels = PixelReader(processor, limits_of(recipe.data))
    route_by = recipe.model.moe.route_by
    return splits, Collator(
        tokenizer, corpus.tasks, route_by=route_by, pixels=pixels, domains=domains
    )


def soft_labelled(
    recipe: Recipe,
    splits: Mapping[str, TokenizedSplit],
    tasks: Sequence[Task],
    *,
    device: torch.device,
    bf16: bool,
) -> dict[str, TokenizedSplit]:
    """The splits with soft labels, of teachers and their own: training to learn from, validation to be compared with.

    Every rank must call it, before anything of DeepSpeed's construction.

    Args:
        recipe: resolved.
        splits: of ``tokenize_posts``.
        tasks: of the run.
        device: of this rank, where the teachers run.
        bf16: run them in bfloat16.
    """
    teachers = find_teachers(recipe.distill, tasks)
    found = [name for name in TAUGHT if name in splits]
    taught = {}
    if teachers:
        taught = teach(
            recipe.distill,
            teachers,
            PostSplit.join([splits[name].posts for name in found]),
            device=device,
            bf16=bf16,
            cache_dir=home() / "teachers" if recipe.distill.cache else None,
        )
    made, start = {}, 0
    for name in found:
        posts = splits[name].posts
        numbers = np.arange(start, start + len(posts))
        start += len(posts)
        soft = {task: labels.take(numbers) for task, labels in taught.items()}
        for task in tasks:
            if (column := posts.soft_labels.get(task.name)) is not None:
                own = SoftLabels.from_rows(column, width=len(task.labels))
                soft[task.name] = preferred(own, soft[task.name]) if task.name in soft else own
        if soft:
            made[name] = with_soft_labels(splits[name], soft)
    return made


def build_model(
    recipe: Recipe,
    splits: Mapping[str, TokenizedSplit],
    collator: Collator,
    *,
    shape: bool = False,
) -> Objective:
    """Model and objective, the same weights on every rank; ``shape`` leaves the weights out.

    Raises:
        ValueError: posts are longer than the encoder can number.
    """
    _seed(recipe.train.seed)
    domains = collator.domains
    objective = build_objective(
        recipe, collator.tasks, num_domains=len(domains.names) if domains else 0, shape=shape
    )
    if problem := embedding_problem(collator.tokenizer, objective.model.encoder.config):
        raise ValueError(f"model.encoder ({recipe.model.encoder}): {problem}; give it its own.")
    # Many tokenizers do not know the number of positions of their encoder.
    limit = objective.model.longest_text
    longest = max(int(split.lengths.max()) for split in splits.values() if len(split))
    if longest > limit:
        beside = " beside the image tokens" if objective.model.image_tokens else ""
        raise ValueError(
            f"data.max_length ({recipe.data.max_length}) lets posts of {longest} tokens through, but model.encoder "
            f"({recipe.model.encoder}) numbers at most {limit}{beside}; set data.max_length to {limit} or less."
        )
    return objective


def _sampler(
    recipe: Recipe, train: TokenizedSplit, tasks: Sequence[Task], layout: Layout
) -> TrainSampler:
    config = SamplerConfig(
        batch_size=recipe.train.batch_size,
        world_size=layout.world_size,
        micro_batch_size=layout.micro_batch_size,
        mixing=recipe.data.mixing,
        temperature=recipe.data.mixing_temperature,
        seed=recipe.train.seed,
        posts_per_label=recipe.data.posts_per_label,
    )
    members = label_members(train.posts, tasks) if config.posts_per_label else ()
    classes = balanced_classes(train.posts, tasks, recipe.tasks)
    return TrainSampler(train.lengths, train.groups, config, label_members=members, classes=classes)


def _print(lines: Sequence[str]) -> None:
    if is_main():
        print("\n".join(lines))


def _one_per_node_first(work: Callable[[], Made]) -> Made:
    """Let one rank per node do cached work first, the others after it, from the cache."""
    first = int(os.environ.get("LOCAL_RANK", "0")) == 0
    made = work() if first else None
    barrier()
    return made if first else work()


def _seed(seed: int) -> None:
    random.seed(seed)
    np.random.seed(seed % 2**32)
    torch.manual_seed(seed)


def _checkpoint_to_use(
    folder: Path, recipe: Recipe, tasks: Sequence[Task], *, verify: bool
) -> Found | None:
    found = find_checkpoint(folder / "checkpoints", verify=verify)
    if found is None:
        if is_main():
            print(f"{folder} has no checkpoint yet: starting at step 0.")
        return None
    check_same_tasks(folder, tasks)
    check_same_groups(folder, recipe)
    if is_main():
        for problem in found.broken:
            print(f"warning: {problem}; using {found.path.name} instead.")
        print(f"resuming {folder} at step {found.step}")
    return found


def _start_engine(
    objective: Objective,
    recipe: Recipe,
    settings: dict[str, Any],
    layout: Layout,
    found: Found | None,
) -> Engine:
    if found is not None and needs_conversion(found.path, layout):
        settings["checkpoint"] = {"load_universal": True}
        if is_main() and (moved := saved_elsewhere(found.path, layout)):
            print(f"{moved}: converting it.")
    engine = Engine(build_deepspeed_engine(objective, recipe, settings), recipe)
    # Weights are equal on all ranks; dropout must not be.
    _seed(recipe.train.seed + 1000 * (rank() + 1))
    return engine


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
