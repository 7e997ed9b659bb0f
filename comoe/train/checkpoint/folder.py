"""The folder of checkpoints: which are whole, which is the newest, which the best. Needs no DeepSpeed."""

from __future__ import annotations

import json
import os
import shutil
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from comoe.distributed import broadcast_object, is_main

MANIFEST = "manifest.json"
"""Written last: a checkpoint without it was cut short."""


BEST = "best.json"
"""Names the step of the best checkpoint."""


ASIDE = ".writing-"
"""What the name of a checkpoint begins with while it is written."""


@dataclass(frozen=True, slots=True)
class Found:
    """The checkpoint to go on from."""

    path: Path
    """Its folder."""
    step: int
    """Its step."""
    broken: tuple[str, ...]
    """What is wrong with newer ones that were passed over, one sentence each."""


def mark_best(folder: Path, step: int) -> None:
    """Name the best checkpoint; it is never pruned."""
    if is_main():
        write_json(folder / BEST, {"step": step})


def best_checkpoint(folder: Path) -> Path | None:
    """Folder of the best checkpoint, if one was named and is whole."""
    if not (folder / BEST).is_file():
        return None
    path = folder / f"step-{json.loads((folder / BEST).read_text())['step']:08d}"
    return path if path.is_dir() and not whats_wrong(path) else None


def find_checkpoint(folder: Path) -> Found | None:
    """The newest whole checkpoint, decided by rank 0 for all; None where there is none at all.

    Raises:
        ValueError: there are checkpoints, but none of them is whole.
    """
    found, broken = None, []
    if is_main():
        for path in sorted(folder.glob("step-*"), reverse=True):
            problem = whats_wrong(path)
            if not problem:
                found = path
                break
            broken.append(f"{path.name}: {problem}")
    found, broken = broadcast_object((found, broken))
    if found is None and broken:
        raise ValueError(
            f"{folder}: no whole checkpoint is left ({'; '.join(broken)}); start the run anew."
        )
    return (
        None
        if found is None
        else Found(found, int(found.name.removeprefix("step-")), tuple(broken))
    )


def whats_wrong(path: Path) -> str:
    """Why a checkpoint cannot be used; empty when it is whole."""
    manifest = path / MANIFEST
    if not manifest.is_file():
        return "it has no manifest, so its writing was cut short"
    try:
        files = json.loads(manifest.read_text(encoding="utf-8"))["files"]
        sizes = dict(files.items())
    except (ValueError, KeyError, TypeError, AttributeError):
        return "its manifest is damaged"
    for name, size in sizes.items():
        actual = (path / name).stat().st_size if (path / name).is_file() else None
        if actual != size:
            return f"{name} has {actual if actual is not None else 'no'} bytes instead of {size}"
    return ""


def prune(folder: Path, *, keep: int) -> None:
    """Delete all checkpoints but the ``keep`` newest whole ones and the best, also those cut short by a kill."""
    best = json.loads((folder / BEST).read_text())["step"] if (folder / BEST).is_file() else None
    spared = {f"step-{best:08d}"} if best is not None else set()
    # A broken one must not take the place of a whole one that could be resumed from.
    whole = sorted(path.name for path in folder.glob("step-*") if not whats_wrong(path))
    spared.update(whole[-max(1, keep) :])
    for path in [*folder.glob("step-*"), *folder.glob(f"{ASIDE}*")]:
        if path.name not in spared:
            shutil.rmtree(path)


def write_json(path: Path, content: Any) -> None:
    """Write a JSON file whole or not at all."""
    aside = path.with_suffix(".aside")
    with aside.open("w", encoding="utf-8") as file:
        json.dump(content, file, indent=1)
        file.flush()
        os.fsync(file.fileno())
    os.replace(aside, path)
