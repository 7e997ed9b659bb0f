"""One training run, from the recipe to the export: what ``launch/train.py`` calls."""

from __future__ import annotations

import json
import os
import shutil
import sys
import time
import traceback
from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

from comoe.config import load_recipe, save_recipe
from comoe.distributed import barrier, broadcast_object, is_main, world_size
from comoe.schema import Recipe
from comoe.train.environment import describe_environment, prepare_process
from comoe.train.signals import StopSignal
from comoe.train.state import ALL_STEPS


@dataclass(frozen=True, slots=True)
class Request:
    """The command line of one run."""

    config: Path
    """Recipe."""
    deepspeed: Path
    """DeepSpeed JSON."""
    overrides: Sequence[str] = ()
    """``key=value`` words."""
    resume: Path | None = None
    """Run folder to go on with; its own recipe is used then."""
    dry_run: bool = False
    """Print what would happen, and end."""


def run_and_exit(request: Request, stop: StopSignal | None = None) -> None:
    """Train, and leave with 0; with 2 and one clear sentence where the user can mend it. Does not return."""
    code = 0
    try:
        train(request, stop)
    except (ValueError, OSError) as error:
        code = 2
        if "run.verbose=true" in request.overrides:
            traceback.print_exc()
        _say_error(error)
    except RuntimeError as error:
        from comoe.train.trainer import TrainingStopped

        if not isinstance(error, TrainingStopped):
            if os.environ.get("RANK", "0") != "0":
                # A rank that lost its peers fails too; let the peer's own message come first.
                time.sleep(3)
            raise
        code = 3
        _say_error(error)
    except KeyboardInterrupt:
        # Outside of the training loop, which notes the signal and saves.
        code = 130
        _say_error("interrupted; what was saved before is whole.")
    sys.stdout.flush()
    sys.stderr.flush()
    # gloo's threads sometimes abort an ordinary exit after all is done; see deepspeed_notes.
    os._exit(code)


def _say_error(error: Exception | str) -> None:
    # Usually every rank fails alike and one message is enough. The others wait for the launcher to end them and speak
    # only if it does not, because then the error is theirs alone.
    if not is_main() or int(os.environ.get("RANK", "0")):
        time.sleep(3)
    print(f"comoe: rank {os.environ.get('RANK', '0')}: {error}", file=sys.stderr)


def train(request: Request, stop: StopSignal | None = None) -> None:
    """Run one recipe to its end; see the module for the order of things.

    Args:
        request: the command line.
        stop: one that was made when the process began.

    Raises:
        ValueError: something that the user can mend; the message says what.
    """
    recipe = _load(request)
    prepare_process(verbose=recipe.run.verbose)
    # DeepSpeed reads the environment when it is imported, so nothing that imports it may come earlier.
    from comoe.assemble import assemble
    from comoe.train.parallel import start_ranks

    device = start_ranks(timeout_seconds=recipe.parallel.timeout_seconds, verbose=recipe.run.verbose)
    _say_doubts(recipe)
    folder = request.resume or Path(recipe.run.output_dir) / recipe.run.name
    fresh = not request.dry_run and request.resume is None
    if fresh:
        _refuse_taken(folder, overwrite=recipe.run.overwrite)
    run = assemble(
        recipe,
        request.deepspeed,
        folder=folder,
        on_ready=partial(_clear, folder) if fresh else None,
        device=device,
        dry_run=request.dry_run,
        resume=request.resume is not None,
    )
    if run is None:
        return
    state = run.trainer.state
    if state.finished == ALL_STEPS and state.step < run.trainer.schedule.total:
        state.finished = ""
    finished_before = bool(state.finished)
    if is_main() and not finished_before:
        # Not over a finished run: its recipe is the one that its results came from, whatever was typed now.
        _write_beginning(run)
    if finished_before and is_main():
        print(
            f"{folder} is finished ({state.finished}, step {state.step}); nothing to do. Train it anew with "
            f"run.overwrite=true, further with a larger train.max_steps or train.epochs."
        )
    if not finished_before:
        run.trainer.run(stop)
    if state.finished and not (finished_before and _written_out(folder, state.step)):
        from comoe.finish import finish

        finish(run)
    elif finished_before and is_main():
        from comoe.finish import print_results

        print_results(folder, run.tasks)
    elif is_main():
        print(f"stopped; go on with: --resume {folder}")
    run.trainer.monitor.close()
    barrier()


def _written_out(folder: Path, step: int) -> bool:
    """Whether results and export are those of this end: a run that went on further still has those of its first end."""
    results = folder / "results.json"
    done = is_main() and results.is_file() and (folder / "export").is_dir()
    return broadcast_object(done and json.loads(results.read_text(encoding="utf-8"))["step"] == step)


def _say_doubts(recipe: Recipe) -> None:
    from comoe.doubts import doubts

    if is_main():
        # Not on standard output: what a dry run prints there is YAML.
        for doubt in doubts(recipe):
            print(f"warning: {doubt}", file=sys.stderr)


def _load(request: Request) -> Recipe:
    if request.resume is None:
        return load_recipe(request.config, request.overrides)
    saved = request.resume / "config.yaml"
    if not saved.is_file():
        raise ValueError(
            f"--resume {request.resume}: no config.yaml there; give the folder of a run, such as runs/starter."
        )
    return load_recipe(saved, request.overrides)


def _refuse_taken(folder: Path, *, overwrite: bool) -> None:
    """Refuse a folder that holds a run already, unless told to delete it."""
    taken = broadcast_object((folder / "config.yaml").exists() if is_main() else None)
    if taken and not overwrite:
        raise ValueError(
            f"{folder} holds a run already: go on with --resume {folder}, choose another run.name, or delete it with "
            f"run.overwrite=true."
        )


def _clear(folder: Path) -> None:
    """Make the run folder; an earlier run in it goes only now that recipe, posts and encoder proved to be good."""
    if is_main():
        if (folder / "config.yaml").exists():
            shutil.rmtree(folder)
        folder.mkdir(parents=True, exist_ok=True)
    barrier()


def _write_beginning(run: Any) -> None:
    """config.yaml, ds_config.json, environment.json, and what an export needs beside the weights."""
    save_recipe(run.recipe, run.folder / "config.yaml")
    run.tokenizer.save_pretrained(run.folder / "tokenizer")
    contents = {
        "ds_config.json": run.settings,
        "environment.json": describe_environment(world_size=world_size()),
        "encoder_config.json": run.trainer.engine.objective.model.encoder.config.to_dict(),
        "tasks.json": [task.to_dict() for task in run.tasks],
    }
    for name, content in contents.items():
        (run.folder / name).write_text(json.dumps(content, indent=1, default=str) + "\n", encoding="utf-8")
