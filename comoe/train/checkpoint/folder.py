"""The folder of checkpoints of a run: where to resume, what to prune. Does not need DeepSpeed."""

from __future__ import annotations

import shutil
import sys
from dataclasses import dataclass
from pathlib import Path

from comoe.config.files import write_json
from comoe.distributed import broadcast_object, is_main
from comoe.inference.checkpoint_folder import (
    BEST,
    STEP,
    named_best,
    sorted_checkpoints,
    step_of,
    whats_wrong,
)

ASIDE = ".writing-"
"""Prefix of a checkpoint's name while it is written."""


@dataclass(frozen=True, slots=True)
class Found:
    """The checkpoint to resume from."""

    path: Path
    step: int
    broken: tuple[str, ...]
    """Defects of newer checkpoints that were skipped, one sentence each."""


def mark_best(folder: Path, step: int) -> None:
    """Name the best checkpoint; it is never pruned."""
    if is_main():
        write_json(folder / BEST, {"step": step})


def best_checkpoint(folder: Path) -> Path | None:
    """Folder of the best checkpoint, if one was named and is whole; says so on stderr where it is not."""
    best = named_best(folder)
    if best is None:
        return None
    if problem := whats_wrong(best, verify=True):
        print(f"warning: {best.name}, the best one: {problem}", file=sys.stderr)
        return None
    return best


def find_checkpoint(folder: Path, *, verify: bool = True) -> Found | None:
    """The newest whole checkpoint, decided by rank 0 for all; None where there is none at all.

    Args:
        folder: of the checkpoints.
        verify: compare the digests of its files.

    Raises:
        ValueError: there are checkpoints, but none of them is whole.
    """
    found = sorted_checkpoints(folder, verify=verify) if is_main() else None
    whole, broken = broadcast_object(found)
    newer = [path for path in broken if not whole or path > whole[-1]]
    problems = tuple(f"{path.name}: {broken[path]}" for path in newer)
    if not whole and problems:
        raise ValueError(
            f"{folder}: no whole checkpoint is left ({'; '.join(problems)}); start the run anew."
        )
    return Found(whole[-1], step_of(whole[-1]), problems) if whole else None


def prune(folder: Path, *, keep: int) -> None:
    """Delete all checkpoints but the ``keep`` newest whole ones and the best, also those cut short by a kill."""
    # A broken one must not take the place of a whole one that could be resumed from.
    whole, _ = sorted_checkpoints(folder)
    spared = {*whole[-max(1, keep) :], named_best(folder)}
    # A copy that the user made, such as step-00000120.bak, stays.
    steps = [path for path in folder.glob("step-*") if STEP.fullmatch(path.name)]
    for path in [*steps, *folder.glob(f"{ASIDE}*")]:
        if path not in spared:
            shutil.rmtree(path)
