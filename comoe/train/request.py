"""What one start is asked for, and the recipe and DeepSpeed settings that it means."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from comoe.config.files import read_json
from comoe.config.load import load_recipe, load_saved_recipe, recipe_from_dict, recipe_to_dict
from comoe.config.recipe import Recipe
from comoe.config.validate import validate
from comoe.train.run_folder import FILLED_SETTINGS, MARK, OWN_SETTINGS

OF_A_RUN = (MARK, OWN_SETTINGS, FILLED_SETTINGS, "tasks.json", "checkpoints")
"""What is in a run folder, whichever version wrote it; a recipe may be called config.yaml too."""


@dataclass(frozen=True, slots=True)
class Request:
    """The command line of one run."""

    config: str | Path | Recipe | None = None
    """Recipe file, or the name of a ready one; None with ``resume``."""
    deepspeed: str | Path | None = None
    """DeepSpeed JSON; None is the run's own with ``resume``, else ZeRO 2."""
    overrides: Sequence[str] = ()
    """``key=value`` changes of the recipe."""
    resume: Path | None = None
    """Run folder to resume, with its own recipe."""
    dry_run: bool = False
    """Check and print the plan without training."""
    gpus: int = 0
    """Plan the dry run for so many GPUs; 0 for this machine."""
    verify: bool = True
    """Compare the digests of the checkpoint to resume."""
    ranks: int = 0
    """Plan the dry run for so many ranks of this machine; 0 for those that are here."""


def load_requested(request: Request) -> Recipe:
    """The recipe of a start, as it was written.

    Raises:
        ValueError: no recipe, two of them, a bad one, or a run folder without one.
    """
    if request.resume is None:
        if request.config is None:
            raise ValueError(
                "there is nothing to train: give a recipe, or --resume with a run folder."
            )
        if isinstance(request.config, Recipe):
            return _checked(request.config, request.overrides)
        return load_recipe(request.config, request.overrides)
    if request.config is not None:
        raise ValueError(
            f"--config {request.config} beside --resume {request.resume}: a run goes on by its own config.yaml. Leave "
            f"--config out and change single options with key=value, or begin a new run without --resume."
        )
    saved = request.resume / "config.yaml"
    if not saved.is_file():
        raise ValueError(
            f"--resume {request.resume}: no config.yaml there; give the folder of a run, such as runs/starter."
        )
    if not any((request.resume / name).exists() for name in OF_A_RUN):
        raise ValueError(
            f"--resume {request.resume}: the folder has a config.yaml and nothing else of a run; "
            f"begin one with --config {saved}."
        )
    results = request.resume / "results.json"
    fitted = results.is_file() and read_json(results).get("baseline")
    if fitted:
        raise ValueError(
            f"--resume {request.resume}: it holds a classical model ({fitted[0]}), which comoe compare fitted at once "
            f"and no training goes on with; begin a run of its recipe with --config {saved} run.name=<another>."
        )
    recipe = load_saved_recipe(saved, request.overrides)
    router, key = recipe.train.router_learning_rate, "train.router_learning_rate"
    before = load_saved_recipe(saved).train.router_learning_rate
    if (router is None) != (before is None):
        raise ValueError(
            f"{key} is {router}, but {request.resume} was begun with {before}: null keeps the router in the optimizer "
            f"group of the experts, and a resumed run keeps its groups. Leave {key} out, or begin a new run."
        )
    return recipe


def _checked(recipe: Recipe, overrides: Sequence[str]) -> Recipe:
    if overrides:
        raise ValueError(f"{overrides[0]}: give it to load_recipe, which made the recipe.")
    raw = recipe_to_dict(recipe)
    # What a path is relative to must outlive this process: a resume may come from another folder.
    raw["data"]["root"] = raw["data"]["root"] or str(Path.cwd())
    recipe = recipe_from_dict(raw)
    validate(recipe)
    return recipe


def deepspeed_settings(request: Request, recipe: Recipe) -> Mapping[str, Any]:
    """The DeepSpeed JSON of a start: the one that is named, else the run's own with ``resume``, else ZeRO 2.

    Raises:
        ValueError: no such file, or a bad one, or one that is against the recipe.
    """
    from comoe.train.parallel.ds_config import ZERO_2, load_settings
    from comoe.train.parallel.ds_keys import check_gate

    if request.deepspeed or request.resume is None:
        settings = load_settings(request.deepspeed) if request.deepspeed else ZERO_2
        check_gate(settings, recipe)
        return settings
    own = request.resume / OWN_SETTINGS
    if not own.is_file():
        raise ValueError(
            f"--resume {request.resume}: no {OWN_SETTINGS} there, as runs of earlier versions have "
            "none; add --deepspeed with the file that the run was begun with, such as zero2."
        )
    return load_settings(own, saved=True)
