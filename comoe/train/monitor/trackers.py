"""Other places that a run's numbers go to: the trackers of ``accelerate.tracking`` (MLflow, Weights & Biases, ...)."""

from __future__ import annotations

import os
import re
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from comoe.config.extras import need
from comoe.config.failure import sentence
from comoe.config.files import read_json, write_json
from comoe.config.load import recipe_to_dict
from comoe.config.recipe import Recipe
from comoe.distributed import is_main

TENSORBOARD = "tensorboard"
"""The tracker that the monitor writes itself, with images and histograms."""
PROJECT = "comoe"
"""Project or experiment that runs are filed under, unless a variable of the tracker names another one."""
STARTED = "trackers.json"
"""File of a run folder: tracker -> what it called the run, by which a resumed run goes on there."""
UNUSUAL = re.compile(r"[^\w\-. /]")
"""What MLflow takes in no name of a metric."""


def check_trackers(names: Sequence[str]) -> None:
    """Check that the packages of trackers are installed; ValueError with the line for pip."""
    for name in names:
        if name in EXTRA:
            need(EXTRA[name], what=f"run.trackers {name}")
        elif find_spec(name) is None:
            raise ValueError(
                f"run.trackers {name} needs {name}, which is not installed: pip install {name}"
            )


class Silent:
    """Takes every call of a TensorBoard writer, and does nothing."""

    def __getattr__(self, name: str) -> Callable[..., None]:
        return lambda *args, **named: None


class Trackers:
    """The trackers of a run, on the rank that writes. What they raise never ends a run: it is reported once.

    Args:
        names: keys of ``accelerate.tracking.LOGGER_TYPE_TO_CLASS``; ``tensorboard`` is left out.
        run_dir: folder of the run; MLflow writes beside it unless ``MLFLOW_TRACKING_URI`` says where.
        options: the recipe as nested dicts, shown as the run's settings.
        resumed: go on with what an earlier process of this run began.
    """

    def __init__(
        self,
        names: Sequence[str],
        run_dir: Path,
        options: Mapping[str, Any] | None = None,
        *,
        resumed: bool = False,
    ) -> None:
        self.tensorboard = TENSORBOARD in names
        """Whether the monitor writes for TensorBoard."""
        self._open: dict[str, Any] = {}
        self._warned: set[str] = set()
        others = [name for name in names if name != TENSORBOARD]
        if not others:
            return
        _begin_alone()
        run_dir.mkdir(parents=True, exist_ok=True)
        file = run_dir / STARTED
        begun = read_json(file) if resumed and file.is_file() else {}
        shown = dict(_dotted(options or {}))
        for name in others:
            self._try(name, lambda name=name: self._start(name, run_dir, begun.get(name), shown))
        called = {n: CALLED[n](tracker) for n, tracker in self._open.items() if n in CALLED}
        write_json(file, {**begun, **called})

    def log(self, scalars: Mapping[str, float], step: int) -> None:
        """Hand finite numbers over."""
        values = {UNUSUAL.sub("_", name): value for name, value in scalars.items()}
        for name, tracker in self._open.items():
            self._try(name, lambda tracker=tracker: tracker.log(values, step=step))

    def close(self) -> None:
        """Tell the trackers that the run is over."""
        for name, tracker in self._open.items():
            self._try(name, tracker.finish)
        self._open = {}

    def _start(
        self, name: str, run_dir: Path, begun: str | None, options: Mapping[str, Any]
    ) -> None:
        from accelerate.tracking import LOGGER_TYPE_TO_CLASS

        kind = LOGGER_TYPE_TO_CLASS[name]
        arguments = ARGUMENTS.get(name, _named)(run_dir, begun)
        if kind.requires_logging_directory:
            arguments["logging_dir"] = str(run_dir)
        tracker = kind(**arguments)
        tracker.main_process_only = False  # only this rank has one
        tracker.start()
        self._open[name] = tracker
        if begun is None:
            tracker.store_init_configuration(options)

    def _try(self, name: str, work: Callable[[], object]) -> None:
        try:
            work()
        except Exception as error:  # whatever a library, a server or a network may raise
            if name not in self._warned:
                reason = f"{type(error).__name__}: {sentence(error)}"
                print(f"warning: run.trackers: {name} lacks something ({reason})", file=sys.stderr)
            self._warned.add(name)


def _begin_alone() -> None:
    """Begin the state that accelerate's log asks for, as that of a single process: only this rank
    has trackers, and with the launcher's variables it would join the ranks and set their
    threads."""
    from accelerate import PartialState

    of_mpi = ("PMI_SIZE", "OMPI_COMM_WORLD_SIZE", "MV2_COMM_WORLD_SIZE")
    names = ("RANK", "WORLD_SIZE", "LOCAL_RANK", *of_mpi)
    hidden = {name: os.environ.pop(name) for name in names if name in os.environ}
    try:
        PartialState(cpu=True)
    finally:
        os.environ.update(hidden)


def trackers_of(recipe: Recipe, run_dir: Path, *, resumed: bool) -> Trackers | None:
    """Those of a run, on the rank that writes; None on the others."""
    if not is_main():
        return None
    return Trackers(recipe.run.trackers, run_dir, recipe_to_dict(recipe), resumed=resumed)


def _dotted(options: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    """(dotted option, value that any tracker takes)."""
    for name, value in options.items():
        if isinstance(value, Mapping):
            yield from _dotted(value, f"{prefix}{name}.")
        else:
            plain = value is None or isinstance(value, (bool, int, float, str))
            yield f"{prefix}{name}", value if plain else str(value)


def _named(run_dir: Path, begun: str | None) -> dict[str, Any]:
    return {"run_name": run_dir.name}


def _mlflow(run_dir: Path, begun: str | None) -> dict[str, Any]:
    folder = (run_dir.parent / "mlflow").resolve()
    if "MLFLOW_TRACKING_URI" not in os.environ:
        folder.mkdir(parents=True, exist_ok=True)
        os.environ["MLFLOW_TRACKING_URI"] = f"sqlite:///{(folder / 'mlflow.db').as_posix()}"
    return {
        "experiment_name": PROJECT,
        "logging_dir": folder.as_uri(),
        "run_name": run_dir.name,
        "run_id": begun,
    }


def _wandb(run_dir: Path, begun: str | None) -> dict[str, Any]:
    goes_on = {"id": begun, "resume": "allow"} if begun else {}
    return {"run_name": PROJECT, "name": run_dir.name, **goes_on}


def _trackio(run_dir: Path, begun: str | None) -> dict[str, Any]:
    return {"run_name": PROJECT, "name": run_dir.name}


ARGUMENTS: dict[str, Callable[[Path, str | None], dict[str, Any]]] = {
    "mlflow": _mlflow,
    "wandb": _wandb,
    "trackio": _trackio,
}
"""Tracker -> (run folder, what it called the run before) -> arguments of its class."""
CALLED: dict[str, Callable[[Any], str]] = {
    "mlflow": lambda tracker: tracker.tracker.info.run_id,
    "wandb": lambda tracker: tracker.tracker.id,
}
EXTRA = {TENSORBOARD: "train", "mlflow": "track"}
"""Tracker -> the extra of comoe that brings its package; others have the name of theirs."""
