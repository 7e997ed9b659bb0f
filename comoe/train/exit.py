"""The end of a process that trained: exit code, message, and the traceback in a log."""

from __future__ import annotations

import os
import sys
import time
import traceback
from contextlib import suppress
from pathlib import Path

from comoe.config.failure import FULL, behind, is_foreign, keep_traceback, sentence
from comoe.distributed import is_main, lost_connection
from comoe.starter.registry import home
from comoe.train.fault.signals import StopSignal
from comoe.train.fault.watchdog import LOST, PREPARING, Watchdog
from comoe.train.request import Request, load_requested
from comoe.train.run import run_request
from comoe.train.state import TrainingStopped


def run_and_exit(request: Request, stop: StopSignal | None = None) -> None:
    """Train and end the process.

    Exit codes: 0 done or stopped by a signal, 2 with one clear sentence where the user can mend it
    before training begins, 3 training cannot go on, 4 another rank is lost, 130 interrupted before
    training, 1 anything else, with its traceback in a log.
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
        # Usually every rank fails alike and one message is enough: the others wait for the launcher
        # to end them, and print only if it does not, because then the error is their own.
        if not is_main() or int(os.environ.get("RANK", "0")):
            time.sleep(3)
        alone = os.environ.get("WORLD_SIZE", "1") == "1"
        who = "" if alone else f"rank {os.environ.get('RANK', '0')}: "
        print(f"{shown}comoe: {who}{message}", file=sys.stderr)
    sys.stdout.flush()
    sys.stderr.flush()
    # gloo's threads sometimes abort a normal exit.
    os._exit(code)


def _classify(error: Exception, request: Request, watch: Watchdog) -> tuple[int, str, str]:
    """Exit code, message, and the traceback if verbose."""
    error = behind(error)
    plain = isinstance(error, (ValueError, OSError))
    if plain and watch.phase == PREPARING:
        verbose = False
        # The recipe itself may be wrong, and the message says where.
        with suppress(ValueError, OSError):
            verbose = load_requested(request).run.verbose
        if verbose:
            return 2, sentence(error), traceback.format_exc()
        log = keep_traceback("train", lambda: home() / "logs") if is_foreign(error) else ""
        return 2, f"{sentence(error)} {log}".rstrip(), ""
    if isinstance(error, TrainingStopped):
        return 3, str(error), ""
    if isinstance(error, OSError) and error.errno in FULL:
        return 3, f"{sentence(error)} {watch.advice}".rstrip(), ""
    # A broken pipe or disk is not a lost rank.
    if not plain and lost_connection(error):
        watch.explain(error)
        return LOST, f"no connection to the other ranks: {error}", ""
    log = keep_traceback("train", lambda: _log_folder(request, watch))
    found = f"unexpected {type(error).__name__}: {sentence(error).rstrip('.')}"
    return 1, f"{found}. {log} {watch.advice}".rstrip(), ""


def _log_folder(request: Request, watch: Watchdog) -> Path:
    """The run folder once it is this start's, where all ranks and later readers find it."""
    if watch.phase == PREPARING or request.config is None is request.resume:
        return home() / "logs"
    if request.resume is not None:
        return request.resume / "errors"
    recipe = load_requested(request)
    return Path(recipe.run.output_dir) / recipe.run.name / "errors"
