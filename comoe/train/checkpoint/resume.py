"""The engine of a run, at step 0 or as a checkpoint left it."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from comoe.config.recipe import Recipe
from comoe.data.collator import Collator
from comoe.distributed import broadcast_object, is_main, rank
from comoe.inference.checkpoint_folder import checkpoint_of, whats_wrong
from comoe.losses.objective import Objective
from comoe.train.checkpoint.folder import Found, find_checkpoint, mark_best
from comoe.train.checkpoint.save_load import load_checkpoint, needs_conversion, saved_elsewhere
from comoe.train.parallel.ds_config import Layout
from comoe.train.parallel.engine import Engine
from comoe.train.parallel.setup import build_deepspeed_engine, seed_random
from comoe.train.run_folder import (
    check_same_groups,
    check_same_lexicon,
    check_same_tasks,
    check_same_words,
)
from comoe.train.state import TrainState


def checkpoint_to_resume(
    folder: Path, recipe: Recipe, collator: Collator, *, verify: bool
) -> Found | None:
    """The newest whole checkpoint of a run, whose recipe must still fit; None where there is none.

    Args:
        folder: of the run.
        recipe: as the user wrote it.
        collator: with tasks and tokenizer as this start has them.
        verify: compare digests.

    Raises:
        ValueError: tasks, words, lexicon or parameter groups are not those that the run began with.
    """
    found = find_checkpoint(folder / "checkpoints", verify=verify)
    if found is None:
        if is_main():
            print(f"{folder} has no checkpoint yet: starting at step 0.")
        return None
    check_same_tasks(folder, collator.tasks)
    check_same_words(folder, collator.tokenizer)
    check_same_lexicon(folder, collator.lexicon)
    check_same_groups(folder, recipe)
    if is_main():
        for problem in found.broken:
            print(f"warning: {problem}; using {found.path.name} instead.")
        print(f"resuming {folder} at step {found.step}")
    return found


def start_engine(
    objective: Objective,
    recipe: Recipe,
    settings: dict[str, Any],
    layout: Layout,
    found: Found | None,
) -> tuple[Engine, TrainState]:
    """Engine and state, with all that a checkpoint holds of them where one was found. Every rank must call it.

    Args:
        objective: of ``start_model``.
        recipe: resolved.
        settings: complete DeepSpeed configuration; a checkpoint of another layout changes it.
        layout: of this start.
        found: of ``checkpoint_to_resume``.
    """
    if found is not None and needs_conversion(found.path, layout):
        settings["checkpoint"] = {"load_universal": True}
        if is_main() and (moved := saved_elsewhere(found.path, layout)):
            print(f"{moved}: converting it.")
    engine = Engine(build_deepspeed_engine(objective, recipe, settings), recipe)
    # Weights are equal on all ranks; dropout must not be.
    seed_random(recipe.train.seed + 1000 * (rank() + 1))
    return engine, TrainState() if found is None else _restored(found, engine, layout)


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
