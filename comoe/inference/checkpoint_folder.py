"""Manifests of checkpoints and exports, and the folder of a run's checkpoints: which are whole, which is the best."""

from __future__ import annotations

import re
from collections.abc import Container, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path, PureWindowsPath
from typing import Any

from comoe.config.errors import unknown_name
from comoe.config.files import digest_of, read_json, write_json
from comoe.data.seen_posts import SEEN

MANIFEST = "manifest.json"
"""Size and SHA-256 of every file of a checkpoint or an export. Written last: a checkpoint without
it was cut short."""

BEST = "best.json"
"""Names the step of the best checkpoint."""

OWNER = ".run"
"""Identifier of the run that a folder of checkpoints belongs to."""

CARD = "README.md"
"""Model card of an export."""

SPARED = (CARD, SEEN)
"""Files of an export that the manifest does not list: the card is there to be edited, the filter of posts to be
deleted."""

NEEDED = ("state.json", "weights/model.safetensors")
"""Files without which a checkpoint is none."""


STEP = re.compile(r"step-\d+")
"""Name of a whole checkpoint."""


def checkpoint_of(folder: Path, step: int) -> Path:
    """Where the checkpoint of a step lies."""
    return folder / f"step-{step:08d}"


def step_of(checkpoint: Path) -> int:
    """The step of a checkpoint, by the name of its folder."""
    return int(checkpoint.name.removeprefix("step-"))


def write_manifest(folder: Path, *, spared: Sequence[str] = (), **about: Any) -> None:
    """Write ``MANIFEST`` of the files in a folder; ``spared`` may be changed later, ``about`` is noted beside."""
    files = {
        path.relative_to(folder).as_posix(): path
        for path in sorted(folder.rglob("*"))
        if path.is_file() and path.name not in (MANIFEST, *spared)
    }
    sizes = {name: path.stat().st_size for name, path in files.items()}
    with ThreadPoolExecutor() as pool:
        digests = dict(zip(files, pool.map(digest_of, files.values()), strict=True))
    write_json(folder / MANIFEST, {**about, "files": sizes, "sha256": digests})


def read_manifest(folder: Path) -> dict[str, Any]:
    """``MANIFEST`` of a folder; an empty one where it is damaged or missing, or names a file outside of it."""
    try:
        manifest = read_json(folder / MANIFEST)
        names = [*manifest["files"].keys(), *manifest.get("sha256", {}).keys()]
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        return {}
    # Exports are copied by it, and may be a stranger's.
    paths = [PureWindowsPath(name) for name in names]  # which takes / and \ both
    return {} if any(path.anchor or ".." in path.parts for path in paths) else manifest


def is_part_of(path: Path, folder: Path) -> bool:
    """Whether a path is a file that an export or checkpoint consists of, whatever else lies in its folder."""
    place, folder = path.resolve(), folder.resolve()
    if not path.is_file() or folder not in place.parents:
        return False
    # Older versions wrote no manifest.
    own = read_manifest(folder).get("files")
    return own is None or place.relative_to(folder).as_posix() in {*own, MANIFEST, *SPARED}


def manifest_problem(
    folder: Path, *, needed: Sequence[str], verify: bool, unread: Container[str] = ()
) -> str:
    """How the files of a folder differ from its manifest; empty where they do not.

    Args:
        folder: a checkpoint or an export.
        needed: files that the manifest must list.
        verify: compare the bytes too, by their digests, which takes as long as reading them. Older
            versions wrote none.
        unread: files that nobody will read, which may be missing; else their size is enough.
    """
    if not (folder / MANIFEST).is_file():
        return "it has no manifest, so its writing was cut short"
    manifest = read_manifest(folder)
    if missing := set(needed) - manifest.get("files", {}).keys():
        lacks = f", as it lists no {min(missing)}" if manifest else ""
        return f"its manifest is damaged{lacks}"
    for name, size in manifest["files"].items():
        file = folder / name
        if not file.is_file():
            if name in unread:
                continue
            return f"{name} is missing"
        if (actual := file.stat().st_size) != size:
            return f"{name} has {actual} bytes instead of {size}"
    for name, digest in manifest.get("sha256", {}).items() if verify else ():
        if name in unread:
            continue
        if not (folder / name).is_file() or digest_of(folder / name) != digest:
            return f"{name} was changed after it was written (its SHA-256 is another)"
    return ""


def whats_wrong(checkpoint: Path, *, verify: bool = False) -> str:
    """Why a checkpoint cannot be used; empty when it is whole. ``verify`` also compares digests."""
    if not STEP.fullmatch(checkpoint.name):
        return "its name is not that of a whole checkpoint (step-<number>)"
    if problem := manifest_problem(checkpoint, needed=NEEDED, verify=verify):
        return problem
    manifest, owner = read_manifest(checkpoint), checkpoint.parent / OWNER
    if manifest.get("step", step_of(checkpoint)) != step_of(checkpoint):
        return f"it is that of step {manifest['step']}"
    if owner.is_file() and manifest.get("run", owner.read_text()) != owner.read_text():
        return "it is that of another run"
    return ""


def sorted_checkpoints(folder: Path, *, verify: bool = False) -> tuple[list[Path], dict[Path, str]]:
    """The whole checkpoints, oldest first, and the broken ones with what is wrong, newest first.

    ``verify`` compares the digests of the newest whole one, and of those before it until one is.
    """
    wrong = {path: whats_wrong(path) for path in sorted(folder.glob("step-*"), reverse=True)}
    for path in wrong if verify else ():
        wrong[path] = wrong[path] or whats_wrong(path, verify=True)
        if not wrong[path]:
            break
    whole = [path for path in reversed(wrong) if not wrong[path]]
    return whole, {path: problem for path, problem in wrong.items() if problem}


def named_best(folder: Path) -> Path | None:
    """The checkpoint that an evaluation named the best, whole or not; None where none was.

    Where ``BEST`` is lost or damaged, the newest whole checkpoint remembers it.
    """
    newest = [path / "state.json" for path in sorted_checkpoints(folder)[0][-1:]]
    for file, key in ((folder / BEST, "step"), *((file, "best_step") for file in newest)):
        try:
            found = read_json(file)
            if found.get("best_value", 0) is not None:
                return checkpoint_of(folder, int(found[key]))
        except (OSError, ValueError, KeyError, TypeError, AttributeError):
            continue
    return None


CHOICES = {
    # The newest one where no evaluation named the best.
    "best": lambda folder, whole: named_best(folder) or whole[-1],
    "last": lambda folder, whole: whole[-1],
}
"""``--which`` -> (checkpoints folder, whole checkpoints) -> checkpoint."""


def choose_checkpoint(run: Path, which: str, *, verify: bool = True) -> Path:
    """The best or last whole checkpoint of a run folder; ``verify`` also compares digests.

    Raises:
        ValueError: another word, or no such checkpoint; with what is wrong with a broken one.
    """
    if which not in CHOICES:
        raise unknown_name("choice of --which", which, CHOICES)
    if not run.exists():
        raise ValueError(f"{run}: there is no such folder; name that of a run, or a checkpoint.")
    folder = run / "checkpoints"
    whole, broken = sorted_checkpoints(folder, verify=verify)
    problems = "; ".join(f"{path.name}: {problem}" for path, problem in broken.items())
    if not whole:
        raise ValueError(
            f"{run} holds no whole checkpoint{f' ({problems})' if problems else ''}; give a run "
            "folder (with checkpoints/) or a checkpoint."
        )
    chosen = CHOICES[which](folder, whole)
    if chosen not in whole:
        names = ", ".join(path.name for path in whole)
        raise ValueError(
            f"{run} has no whole {which} checkpoint ({problems or f'{chosen.name} is gone'}); give "
            f"one of {names} in {folder}."
        )
    return chosen
