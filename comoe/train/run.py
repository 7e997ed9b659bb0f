"""One training run, from the recipe to the export: ``train`` for a program, ``run_and_exit`` for the command line."""

from __future__ import annotations

import os
import sys
import time
import traceback
from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from comoe.config.files import read_json
from comoe.config.load import load_recipe, load_saved_recipe, recipe_from_dict, recipe_to_dict
from comoe.config.recipe import Recipe
from comoe.config.validate import validate
from comoe.distributed import (
    barrier,
    broadcast_object,
    is_main,
    lost_connection,
    wait_for_ranks_up_to,
)
from comoe.train.environment import prepare_process
from comoe.train.fault.signals import StopSignal
from comoe.train.fault.supervisor import is_child, restart_record
from comoe.train.fault.watchdog import LOST, PREPARING, Watchdog
from comoe.train.run_folder import (
    OWN_SETTINGS,
    begun_by_this_start,
    refuse_taken,
    take,
    write_run_folder,
)
from comoe.train.state import ALL_STEPS

if TYPE_CHECKING:
    from comoe.train.training_run import TrainingRun

A_DAY = 86400.0


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


def train(
    recipe: Recipe | Path | str | None = None,
    overrides: Sequence[str] = (),
    *,
    deepspeed: Path | str | None = None,
    resume: Path | str | None = None,
) -> Path:
    """Train one recipe to its end: every rank of a launcher calls it, or a plain process alone.

    It sets up the process for DeepSpeed (environment, threads, signals while it trains), so call it
    before anything else imports DeepSpeed. SIGINT and SIGTERM end it after the current step with a
    checkpoint.

    Args:
        recipe: a recipe, the path of its YAML file, or the name of a ready one; None with ``resume``.
        overrides: options that replace those of the file, each ``key=value``; with a recipe in
            memory none.
        deepspeed: DeepSpeed JSON, or the name of a ready one; None is the run's own with ``resume``, else ZeRO 2.
        resume: run folder to continue from its newest whole checkpoint, by its own recipe.

    Returns:
        The run folder: ``results.json``, ``predictions/`` and ``export/`` are in it unless a signal
        ended the run early.

    Raises:
        ValueError: something in recipe, data or options that the user can correct.
        TrainingStopped: training cannot continue (``comoe.train.state``).

    Example:
        >>> folder = comoe.train("smoke", ["train.max_steps=6"])
        >>> predictor = comoe.Predictor.from_pretrained(folder / "export")
    """
    resumed = None if resume is None else Path(resume)
    watch = Watchdog()
    try:
        folder = run_request(Request(recipe, deepspeed, overrides, resumed), watch=watch)
    except BaseException as error:
        watch.leave(1, str(error))
        raise
    watch.leave(0)
    return folder


def run_and_exit(request: Request, stop: StopSignal | None = None) -> None:
    """Train and end the process.

    Exit codes: 0 done or stopped by a signal, 2 with one clear sentence where the user can mend it
    before training begins, 3 training cannot go on, 4 another rank is lost, 130 interrupted before
    training, 1 anything else, with its traceback.
    """
    watch = Watchdog()
    code, message, shown = 0, "", ""
    try:
        run_request(request, stop, watch)
    except KeyboardInterrupt:
        # Outside the training loop, which handles the signal and saves.
        code, message = 130, "interrupted; what was saved before is whole."
    except Exception as error:
        code, message, shown = _classify(error, request, watch)
    watch.leave(code, message)
    if code:
        _print_error(message, shown)
    sys.stdout.flush()
    sys.stderr.flush()
    # gloo's threads sometimes abort a normal exit; see deepspeed_notes.
    os._exit(code)


def _classify(error: Exception, request: Request, watch: Watchdog) -> tuple[int, str, str]:
    """Exit code, message, and the traceback if verbose."""
    plain = isinstance(error, (ValueError, OSError))
    if plain and watch.phase == PREPARING:
        return 2, str(error), traceback.format_exc() if _is_verbose(request) else ""
    from comoe.train.state import TrainingStopped

    if isinstance(error, TrainingStopped):
        return 3, str(error), ""
    # A broken pipe or disk is not a lost rank.
    if not plain and lost_connection(error):
        watch.explain(error)
        return LOST, f"no connection to the other ranks: {error}", ""
    return 1, f"{type(error).__name__}: {error}", traceback.format_exc()


def _is_verbose(request: Request) -> bool:
    try:
        return _load(request).run.verbose
    except (ValueError, OSError):
        # The recipe itself is wrong, and the message says where.
        return False


def _print_error(message: str, shown: str) -> None:
    # Usually every rank fails alike and one message is enough: the others wait for the launcher to
    # end them, and print only if it does not, because then the error is their own.
    if not is_main() or int(os.environ.get("RANK", "0")):
        time.sleep(3)
    alone = os.environ.get("WORLD_SIZE", "1") == "1"
    who = "" if alone else f"rank {os.environ.get('RANK', '0')}: "
    print(f"{shown}comoe: {who}{message}", file=sys.stderr)


def run_request(
    request: Request, stop: StopSignal | None = None, watch: Watchdog | None = None
) -> Path:
    """Run one recipe to its end and return the run folder; ``stop`` was made when the process began.

    Raises:
        ValueError: something that the user can mend; the message says what.
    """
    watch = watch or Watchdog()
    recipe = _load(request)
    prepare_process(verbose=recipe.run.verbose)
    # DeepSpeed reads the environment when it is imported, so nothing that imports it may come
    # earlier.
    from comoe.train.build import build_run
    from comoe.train.dry_run import print_dry_run
    from comoe.train.parallel.ds_config import ZERO_2, load_settings
    from comoe.train.recipe_warnings import recipe_warnings

    device = _join_ranks(recipe, watch)
    folder = request.resume or Path(recipe.run.output_dir) / recipe.run.name
    if not request.dry_run and request.resume is None and begun_by_this_start(folder):
        # Its config.yaml holds what the command line changed; some changes cannot be made twice.
        request = replace(request, config=None, resume=folder, overrides=())
        recipe = _load(request)
    watch.advice = "The last whole checkpoint is good"
    watch.advice += "." if is_child() else f": go on with --resume {folder}."
    if is_main():
        # Not on standard output: what a dry run prints there is YAML.
        for sentence in recipe_warnings(recipe):
            print(f"warning: {sentence}", file=sys.stderr)
    fresh = not request.dry_run and request.resume is None
    if fresh:
        refuse_taken(folder, overwrite=recipe.run.overwrite)
    own = request.deepspeed or (_own_settings(folder) if request.resume else None)
    settings = ZERO_2 if own is None else load_settings(own)
    if request.dry_run:
        print_dry_run(recipe, settings, device=device, gpus=request.gpus)
        return folder
    overwrite = recipe.run.overwrite
    with ExitStack() as held:
        run = build_run(
            recipe, settings, folder, device=device, resume=not fresh, verify=request.verify,
            on_ready=lambda: take(folder, held, fresh=fresh, overwrite=overwrite),
        )  # fmt: skip
        run.watch = watch
        # Also the groups of DeepSpeed.
        wait_for_ranks_up_to(max(A_DAY, recipe.parallel.timeout_seconds))
        _begin(run, settings)
        _train_and_finalize(run, stop)
        run.monitor.close()
        barrier()
    return folder


def _begin(run: TrainingRun, own_settings: Mapping[str, Any]) -> None:
    """Write the run folder, but not over a finished run: its recipe is the one that its results came from."""
    state = run.state
    if state.finished == ALL_STEPS and state.step < run.total_steps:
        state.finished = ""
    if is_main() and not state.finished:
        write_run_folder(run, own_settings=own_settings)
        if restarted := restart_record():
            run.monitor.log_event({"event": "restart", "step": state.step, **restarted})


def _train_and_finalize(run: TrainingRun, stop: StopSignal | None = None) -> None:
    from comoe.train.finalize import finalize, print_results
    from comoe.train.trainer import Trainer

    folder, state, finished_before = run.folder, run.state, bool(run.state.finished)
    if finished_before and is_main():
        print(
            f"{folder} is finished ({state.finished}, step {state.step}); nothing to do. Train it anew with "
            f"run.overwrite=true, further with a larger train.max_steps or train.epochs."
        )
    # From here on an error is not the user's: all input has been read.
    run.watch.enter("finishing" if finished_before else "first step")
    if not finished_before:
        Trainer(run, stop or StopSignal()).train()
    if state.finished and not (finished_before and _written_out(folder, state.step)):
        finalize(run)
    elif finished_before and is_main():
        print_results(folder, run.tasks)
    elif is_main():
        print(f"stopped; go on with: --resume {folder}")


def _join_ranks(recipe: Recipe, watch: Watchdog) -> Any:
    from comoe.train.parallel.setup import start_ranks

    seconds = recipe.parallel.timeout_seconds
    device = start_ranks(timeout_seconds=seconds, verbose=recipe.run.verbose)
    watch.start(timeout_seconds=seconds)
    # The watchdog limits waits; a rank may prepare or save for hours.
    wait_for_ranks_up_to(max(A_DAY, seconds))
    return device


def _written_out(folder: Path, step: int) -> bool:
    """Whether results and export are of this step: a resumed run still has those of its first end."""
    results = folder / "results.json"
    done = is_main() and results.is_file() and (folder / "export").is_dir()
    return broadcast_object(done and read_json(results)["step"] == step)


def _load(request: Request) -> Recipe:
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


def _own_settings(folder: Path) -> Path:
    own = folder / OWN_SETTINGS
    if not own.is_file():
        raise ValueError(
            f"--resume {folder}: no {OWN_SETTINGS} there, as runs of earlier versions have none; add --deepspeed with "
            f"the file that the run was begun with, such as zero2."
        )
    return own
