"""The folder of a run's checkpoints: which are whole, and which is the best. A resume and an export ask here."""

from __future__ import annotations

import json
from pathlib import Path

MANIFEST = "manifest.json"
"""Written last: a checkpoint without it was cut short."""

BEST = "best.json"
"""Names the step of the best checkpoint."""


def checkpoint_of(folder: Path, step: int) -> Path:
    """Where the checkpoint of a step lies."""
    return folder / f"step-{step:08d}"


def step_of(checkpoint: Path) -> int:
    """The step of a checkpoint, by the name of its folder."""
    return int(checkpoint.name.removeprefix("step-"))


def whats_wrong(checkpoint: Path) -> str:
    """Why a checkpoint cannot be used; empty when it is whole."""
    manifest = checkpoint / MANIFEST
    if not manifest.is_file():
        return "it has no manifest, so its writing was cut short"
    try:
        files = json.loads(manifest.read_text(encoding="utf-8"))["files"]
        sizes = dict(files.items())
    except (ValueError, KeyError, TypeError, AttributeError):
        return "its manifest is damaged"
    for name, size in sizes.items():
        file = checkpoint / name
        actual = file.stat().st_size if file.is_file() else "no"
        if actual != size:
            return f"{name} has {actual} bytes instead of {size}"
    return ""


def sorted_checkpoints(folder: Path) -> tuple[list[Path], dict[Path, str]]:
    """The whole checkpoints, oldest first, and the broken ones with what is wrong, newest first."""
    wrong = {path: whats_wrong(path) for path in sorted(folder.glob("step-*"), reverse=True)}
    whole = [path for path in reversed(wrong) if not wrong[path]]
    return whole, {path: problem for path, problem in wrong.items() if problem}


def named_best(folder: Path) -> Path | None:
    """The checkpoint that an evaluation named the best, whole or not; None where none was."""
    place = folder / BEST
    step = json.loads(place.read_text(encoding="utf-8"))["step"] if place.is_file() else None
    return None if step is None else checkpoint_of(folder, step)
