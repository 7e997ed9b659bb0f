"""One training run, from the recipe to the export; ``comoe.train.exit`` ends the process of a command line with it."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from comoe.config.recipe import Recipe
from comoe.distributed import (
    barrier,
    is_main,
    wait_for_ranks_up_to,
)
from comoe.train.environment import prepare_process
from comoe.train.fault.signals import StopSignal
from comoe.train.fault.watchdog import Watchdog
from comoe.train.request import Request, deepspeed_settings, load_requested
from comoe.train.run_folder import (
    begin_run_folder,
    begun_by_this_start,
    resume_advice,
    take,
    taken_folder,
)

if TYPE_CHECKING:
    from comoe.train.training_run import TrainingRun

A_DAY = 86400.0


def train(
    recipe: Recipe | Path | str | None = None,
    overrides: Sequence[str] = (),
    *,
    deepspeed: Path | str | None = None,
    resume: Path | str | None = None,
) -> Path:
    """Train one recipe to its end: every rank of a launcher calls it, or a plain process alone.

    It sets up the process for DeepSpeed (environment, threads, signals while it trains), so call it
    before anything else imports DeepSpeed. SIGINT, SIGTERM and SIGHUP end it after the current step
    with a checkpoint.

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
        >>> folder = comoe.train("smoke", ["run.name=six", "train.max_steps=6"])
        >>> print(folder, sorted(path.name for path in (folder / "export").glob("*.safetensors")))
        runs/six ['model.safetensors']
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


def run_request(
    request: Request, stop: StopSignal | None = None, watch: Watchdog | None = None
) -> Path:
    """Run one recipe to its end, return the run folder; ``stop`` was made when the process began.

    Raises:
        ValueError: something that the user can mend; the message says what.
    """
    watch = watch or Watchdog()
    recipe = load_requested(request)
    prepare_process(verbose=recipe.run.verbose)
    # DeepSpeed reads the environment when it is imported, so nothing that imports it may come
    # earlier.
    from comoe.train.build import build_run
    from comoe.train.dry_run import print_dry_run
    from comoe.train.monitor.trackers import check_trackers
    from comoe.train.recipe_warnings import recipe_warnings

    check_trackers(recipe.run.trackers)
    device = _join_ranks(recipe, watch)
    folder = request.resume or Path(recipe.run.output_dir) / recipe.run.name
    if not request.dry_run and request.resume is None and begun_by_this_start(folder):
        # Its config.yaml holds what the command line changed; some changes cannot be made twice.
        request = replace(request, config=None, resume=folder, overrides=())
        recipe = load_requested(request)
    watch.advice = resume_advice(folder)
    if is_main():
        # Not on standard output: what a dry run prints there is YAML.
        for sentence in recipe_warnings(recipe):
            print(f"warning: {sentence}", file=sys.stderr)
    fresh, overwrite = request.resume is None, recipe.run.overwrite
    taken = taken_folder(folder, overwrite=overwrite) if fresh else ""
    settings = deepspeed_settings(request, recipe)
    if request.dry_run:
        # All of it, whose last word is that of a start.
        print_dry_run(recipe, settings, device=device, gpus=request.gpus, ranks=request.ranks)
    if taken:
        raise ValueError(taken)
    if request.dry_run:
        return folder
    with ExitStack() as held:
        run = build_run(
            recipe, settings, folder, device=device, resume=not fresh, verify=request.verify,
            on_ready=lambda: take(folder, held, fresh=fresh, overwrite=overwrite),
        )  # fmt: skip
        run.watch = watch
        # Also the groups of DeepSpeed.
        wait_for_ranks_up_to(max(A_DAY, recipe.parallel.timeout_seconds))
        begin_run_folder(run, settings)
        for sentence in run.too_short_for if is_main() else ():
            print(f"warning: {sentence}", file=sys.stderr)
        _train_and_finalize(run, stop)
        run.monitor.close()
        barrier()
    return folder


def _train_and_finalize(run: TrainingRun, stop: StopSignal | None = None) -> None:
    from comoe.train.finalize import finish
    from comoe.train.trainer import Trainer

    folder, state, finished_before = run.folder, run.state, bool(run.state.finished)
    if finished_before and is_main():
        print(
            f"{folder} is finished ({state.finished}, step {state.step}); nothing to do. Train it "
            f"anew with run.overwrite=true, further with a larger train.max_steps or train.epochs."
        )
    # From here on an error is not the user's: all input has been read.
    run.watch.enter("finishing" if finished_before else "first step")
    if not finished_before:
        Trainer(run, stop or StopSignal()).train()
    finish(run, trained=not finished_before)


def _join_ranks(recipe: Recipe, watch: Watchdog) -> Any:
    from comoe.train.parallel.setup import start_ranks

    seconds = recipe.parallel.timeout_seconds
    device = start_ranks(timeout_seconds=seconds, verbose=recipe.run.verbose)
    watch.start(timeout_seconds=seconds)
    # The watchdog limits waits; a rank may prepare or save for hours.
    wait_for_ranks_up_to(max(A_DAY, seconds))
    return device
